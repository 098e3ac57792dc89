r"""A ravine in the plane whose floor is made of minima, sharp ones and flat ones.

The loss is $L(x, y) = \frac12 h(x)\, y^2$ with $h(x) = 1 + x^2$. Every point (x, 0) is a minimum,
with curvature h(x) across the ravine and none along it; the flattest is the origin. It is the
smallest loss on which gradient descent does not care how flat a minimum is, and SAM does.

Across the ravine SAM looks $\rho$ further up the wall that it is on. It therefore cannot come to
rest on the floor: it bounces from wall to wall at the height $a$ with

$$a = \mathrm{lr}\, h\, (a + \rho) - a \quad\Rightarrow\quad
a = \frac{\mathrm{lr}\, h\, \rho}{2 - \mathrm{lr}\, h},$$

and at each bounce the gradient at $y = \pm(a + \rho)$ has a part along the ravine, always to the
flatter side:

$$\Delta x = -\frac{\mathrm{lr}}{2}\, h'(x)\, (a + \rho)^2
= -2\, \mathrm{lr}\, h'(x) \left(\frac{\rho}{2 - \mathrm{lr}\, h(x)}\right)^2.$$

For small learning rates that is a step of gradient descent on $\frac{\rho^2}{2} h$, the curvature
itself (Bartlett, Long & Bousquet 2022, arXiv:2210.01513). Both formulas hold to first order in
$\rho\, h' / h$ and for $\mathrm{lr}\, h < 2$.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from sam_lab.sam import SAM

__all__ = ["amplitude", "curvature", "drift", "loss", "trajectory"]


Number = TypeVar("Number", float, Tensor)


def curvature(x: Number) -> Number:
    """Curvature across the ravine at (x, 0): 1 + x²."""
    return 1 + x * x


def loss(w: Tensor) -> Tensor:
    """The loss at the points w (..., 2); one number a point."""
    x, y = w.unbind(-1)
    return 0.5 * curvature(x) * y * y


def trajectory(
    rho: float,
    lr: float,
    start: tuple[float, float],
    steps: int,
    momentum: float = 0.0,
    **how: Any,
) -> Tensor:
    """The points (steps + 1, 2), float64, of `sam_lab.SAM` around gradient descent.

    Args:
        rho: radius of the perturbation; 0 is gradient descent itself.
        lr: learning rate. Above 2 / h(x) the floor repels gradient descent too.
        start: the first point (x, y). One on the floor, y = 0, is a minimum, where both stay.
        steps: how many steps to take. A path that diverges goes on in numbers that are not finite.
        momentum: of gradient descent.
        how: what `SAM` takes besides, such as `method`.
    """
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    sam = SAM(torch.optim.SGD([w], lr=lr, momentum=momentum), rho, **how)
    points = [w.detach().clone()]
    for _ in range(steps):
        sam.step(lambda: loss(w))
        points.append(w.detach().clone())
    return torch.stack(points)


def amplitude(x: float, rho: float, lr: float) -> float:
    """Distance |y| from the floor at which SAM bounces near (x, 0).

    Raises:
        ValueError: lr is at or above the edge 2 / h(x), where there is no such cycle.
    """
    return lr * curvature(x) * rho / _room(x, lr)


def drift(x: float, rho: float, lr: float) -> float:
    """Change of x in one step while SAM bounces there; negative for x > 0, to the flatter side.

    Raises:
        ValueError: lr is at or above the edge 2 / h(x).
    """
    slope = 2 * x
    return -2 * lr * slope * (rho / _room(x, lr)) ** 2


def _room(x: float, lr: float) -> float:
    """What is left to the edge: 2 - lr h(x)."""
    room = 2 - lr * curvature(x)
    if room <= 0:
        raise ValueError(
            f"lr must be below the edge 2 / h(x) = {2 / curvature(x):.4g} at x={x}, got {lr}"
        )
    return room
