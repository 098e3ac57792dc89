"""What goes on from a fit, in NumPy: descent to a training loss, and steps on one example."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["METHODS", "fitted", "step"]

Floats = NDArray[np.float64]
METHODS = ("sgd", "sam", "label_noise")
"""What goes on from the fit of gradient descent, with one example a step."""


def fitted(
    weights: Floats,
    loss: Callable[[Floats], float],
    gradient: Callable[[Floats], Floats],
    lr: float,
    level: float,
    steps: int,
) -> Floats:
    """The first weights on the way of gradient descent whose loss is `level` or less.

    Args:
        weights: of any shape, as those that `loss` and `gradient` take.
        steps: how many it may make.

    Raises:
        FloatingPointError: gradient descent has diverged, or has not got there.
    """
    for _ in range(steps):
        value = loss(weights)
        if value <= level:
            return weights
        if not math.isfinite(value):
            break
        weights = weights - lr * gradient(weights)
    raise FloatingPointError(
        f"gradient descent has not reached a training loss of {level:g}, it is {value:g}"
    )


def step(
    method: str,
    weights: Floats,
    gradient: Callable[[Floats, Floats], Floats],
    y: Floats,
    lr: float,
    rho: float,
    noise: float,
    rng: np.random.Generator,
) -> Floats:
    """The weights after a step on one example.

    Args:
        method: one of `METHODS`. SAM rests where the gradient is 0.
        weights: of any shape.
        gradient: of the example's loss, at given weights and labels.
        y: its label, (1,).
        lr, rho, noise: learning rate, radius of SAM, size of the noise on the label.
    """
    if method == "label_noise":
        y = y + noise * rng.choice([-1.0, 1.0], y.shape)
    g = gradient(weights, y)
    if method == "sam":
        length = float(np.linalg.norm(g))
        if length > 0:
            g = gradient(weights + rho / length * g, y)
    return weights - lr * g
