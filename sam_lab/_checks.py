"""Checks of arguments that several rooms share: each names the argument, its value and the rule."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from torch import Tensor

__all__ = [
    "check_examples",
    "check_integer",
    "check_loss",
    "check_nonnegative",
    "check_positive",
    "check_scalar",
]


def check_integer(
    name: str, value: Any, least: int, most: float = math.inf, what: str = "an integer"
) -> int:
    """The argument as an int; ValueError unless it is one between `least` and `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        between = f"between {least} and {most}" if most < math.inf else f"of at least {least}"
        raise ValueError(f"{name} must be {what} {between}, got {value!r}")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """The argument as a float; ValueError unless it is a finite number above 0."""
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r:.80}")
    return number


def check_nonnegative(name: str, value: Any) -> float:
    """The argument as a float; ValueError unless it is a finite number of at least 0."""
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r:.80}")
    return number


def _number(value: Any) -> float:
    """A number of any library, one in a tensor too, as a float; NaN for all else."""
    if isinstance(value, bool | str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        return math.nan


def check_examples(x: Any, y: Any) -> None:
    """TypeError unless x and y are tensors; ValueError unless they hold one entry an example."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise ValueError(
            "x and y must hold one entry an example, at least one, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_scalar(loss: Any) -> Tensor:
    """The loss; TypeError unless it is a tensor, ValueError unless that is a real scalar."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"the loss must be a real scalar, got {loss.dtype} of shape {tuple(loss.shape)}"
        )
    return loss


def check_loss(loss: Any) -> float:
    """The loss as a number; TypeError, ValueError or FloatingPointError if it is not usable."""
    value = check_scalar(loss).detach().item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is not finite ({value})")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not require grad: it depends on none of the parameters, "
            "or was detached or computed under torch.no_grad()"
        )
    return value
