r"""Losses whose curvature cannot change, and what SAM does on them.

On a quadratic, SAM multiplies the component of the gradient g along an eigenvector of curvature
$\lambda$ by

$$m = 1 - \eta\lambda\,(1 + \rho\lambda / \|g\|).$$

`sam_edge` is the curvature at which m = -1 for a given $\|g\|$. The same equation solved for the
gradient instead says at which $\|g\|$ a given curvature is exactly at the edge:

$$\|g\| = r(\lambda) = \frac{\eta\rho\lambda^2}{2 - \eta\lambda}.$$

With a shorter gradient than $r(\lambda_1)$ the component along the top eigenvector grows, with a
longer one it shrinks: the gradient is a thermostat, and SAM comes to bounce between two points at
which the sharpness over the SAM edge is 1. (That SAM on a convex quadratic ends in this cycle is
shown by Bartlett, Long & Bousquet 2022.)

There are three such losses: a `quadratic` with given eigenvalues; the squared error of a
`linearised` network; and the second-order model of any loss, `taylor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab.curvature import Hessian
from sam_lab.objective import Closure
from sam_lab.stability import gd_edge

__all__ = ["linearised", "multiplier", "orbit_norm", "quadratic", "spectrum", "taylor"]


def multiplier(lr: float, rho: float, curvature: float, grad_norm: float) -> float:
    """What one step of SAM multiplies the gradient's component of this curvature by."""
    return 1 - lr * curvature * (1 + rho * curvature / grad_norm)


def orbit_norm(lr: float, rho: float, curvature: float) -> float:
    """Gradient norm at which `curvature` is the SAM edge: that of the period-2 orbit.

    Raises:
        ValueError: the curvature is not below 2/lr. SAM then leaves, as gradient descent does.
    """
    if not 0 < curvature < gd_edge(lr):
        raise ValueError(
            f"curvature must lie between 0 and 2/lr = {gd_edge(lr):g}: there is no orbit at "
            f"{curvature:g}"
        )
    return lr * rho * curvature**2 / (2 - lr * curvature)


def spectrum(top: float, dim: int, span: float, generator: torch.Generator) -> Tensor:
    """Eigenvalues (dim,) float64, descending: `top`, the rest log-uniform from `span * top` to it.

    Raises:
        ValueError: span is not in (0, 1].
    """
    if not 0 < span <= 1:
        raise ValueError(f"span must lie in (0, 1], got {span}")
    shares = span ** torch.rand(dim - 1, generator=generator, dtype=torch.float64)
    return top * torch.cat([torch.ones(1, dtype=torch.float64), shares.sort(descending=True)[0]])


def quadratic(
    eigenvalues: Tensor,
    coordinates: Tensor,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Closure, Tensor, Tensor]:
    """The loss w.Hw / 2 with these eigenvalues, in a random orthonormal basis.

    The basis matters for rounding alone: in that of the eigenvectors a component that has died out
    is exactly zero, and cannot come back.

    Args:
        eigenvalues: (n,) float64.
        coordinates: (n,) of the start, in the basis of the eigenvectors.

    Returns:
        The loss, the weights (n,) that it reads, and the eigenvectors (n, n) as columns.
    """
    noise = torch.randn(
        len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(noise)[0]
    H = (basis * eigenvalues) @ basis.T
    H = ((H + H.T) / 2).to(device)
    w = (basis @ coordinates).to(device).requires_grad_()
    return lambda: 0.5 * w @ (H @ w), w, basis.to(device)


# --- frozen networks -----------------------------------------------------------------------------


def linearised(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Closure]:
    """The first-order model of a network around its weights now: f(w0) + J (w - w0).

    Exact to rounding (forward-mode derivatives), and differentiable as often as one likes: its
    squared error is a quadratic in w, without negative eigenvalues.

    Returns:
        The weights w (copies, at w0), and a function that evaluates the outputs (N, K) at w.
    """
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: p.clone().requires_grad_() for name, p in base.items()}

    def outputs() -> Tensor:
        direction = {name: moved[name] - base[name] for name in base}
        parts: tuple[Tensor, ...] = torch.func.jvp(
            lambda weights: torch.func.functional_call(model, weights, (x,)), (base,), (direction,)
        )
        return parts[0] + parts[1]

    return list(moved.values()), outputs


class _Product(torch.autograd.Function):
    """H v for a fixed symmetric operator; its own derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, H: Hessian) -> Tensor:
        ctx.H = H
        return H @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(grad, ctx.H), None


def taylor(closure: Closure, params: Sequence[Tensor]) -> tuple[list[Tensor], Closure]:
    """The second-order model of a loss around the weights now, by exact Hessian-vector products.

    Where the Hessian has negative eigenvalues the model falls without bound along them. The
    parameters of `closure` must stay where they are while it is in use.

    Returns:
        The weights w (copies, at w0), and the model's closure.
    """
    H = Hessian(closure, params)
    value, gradient = H.loss(), H.gradient()
    moved = [p.detach().clone().requires_grad_() for p in params]
    base = torch.cat([p.detach().flatten() for p in params])

    def model() -> Tensor:
        d = torch.cat([p.flatten() for p in moved]) - base
        curved: Tensor = _Product.apply(d, H)
        return value + d @ gradient + 0.5 * d @ curved

    return moved, model
