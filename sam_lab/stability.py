r"""Stability edges: the largest curvature at which an optimizer can still descend.

On a quadratic loss with curvature $\lambda$ along one direction, each method below multiplies the
gradient by a fixed factor a step. The method stays put in the long run while that factor lies
between -1 and 1; the *edge* is the curvature at which it reaches -1, where the iterate jumps from
one wall of the valley to the opposite one without losing height. All three functions are plain
formulas on floats, NumPy arrays and tensors (mixed freely, broadcast, differentiable).

==================  =============================================  ===============================
function            one step                                       edge
==================  =============================================  ===============================
`gd_edge`           w - lr g(w)                                    2 / lr
`heavy_ball_edge`   v <- m v + g(w);  w - lr v                     2 (1 + m) / lr
`sam_edge`          w - lr g(w + rho g / |g|)                      see the function
==================  =============================================  ===============================
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

__all__ = ["gd_edge", "heavy_ball_edge", "sam_edge"]


def gd_edge(lr: Any) -> Any:
    """Edge of gradient descent, `2 / lr`.

    Args:
        lr: learning rate, finite and above 0; float, array or tensor of any shape.

    Returns:
        The largest stable curvature, with the type, shape, dtype and device of `lr`.

    Raises:
        TypeError: `lr` is no real number, array or tensor.
        ValueError: `lr` is not finite and above 0.

    Source: Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the edge
    of stability* (arXiv:2103.00065).

    Example:
        >>> gd_edge(0.5)
        4.0
    """
    _check("lr", lr, above=0.0)
    return 2.0 / lr


def heavy_ball_edge(lr: Any, momentum: Any) -> Any:
    """Edge of gradient descent with heavy-ball momentum, `2 (1 + momentum) / lr`.

    The step is that of `torch.optim.SGD(momentum=m)` without dampening and without Nesterov's
    correction: `v <- m v + g`, `w <- w - lr v`.

    Args:
        lr: learning rate, finite and above 0; float, array or tensor of any shape.
        momentum: in [0, 1); broadcast against `lr`.

    Returns:
        The largest stable curvature, of the broadcast shape.

    Raises:
        TypeError: an argument is no real number, array or tensor.
        ValueError: an argument lies outside its range.

    Source: Cohen et al. 2021 (arXiv:2103.00065); Goh 2017, *Why
    momentum really works*.

    Example:
        >>> heavy_ball_edge(0.5, 0.5)
        6.0
    """
    _check("lr", lr, above=0.0)
    _check("momentum", momentum, least=0.0, below=1.0)
    lr, momentum = _together(lr, momentum)
    return 2.0 * (1.0 + momentum) / lr


def sam_edge(lr: Any, rho: Any, grad_norm: Any) -> Any:
    r"""Edge of sharpness-aware minimization (SAM) with normalized perturbation.

    $$\lambda_{\mathrm{SAM}}
      = \frac{\|g\|}{2\rho}\left(\sqrt{1 + \frac{8\rho}{\eta\|g\|}} - 1\right)
      = \frac{4/\eta}{1 + \sqrt{1 + 8\rho/(\eta\|g\|)}}$$

    The second form is the one computed: the first loses all digits when rho is small. The edge
    lies below `gd_edge(lr)` and falls as the gradient shrinks, since the perturbation has the
    length rho however small the gradient is. Limits: `gd_edge(lr)` for rho = 0 (also where
    grad_norm = 0) and for an infinite gradient; 0 for grad_norm = 0 and rho > 0.

    Args:
        lr: learning rate eta, finite and above 0.
        rho: radius of the perturbation, finite and at least 0, in the units of the weights.
        grad_norm: Euclidean norm of the full gradient at the unperturbed weights, at least 0;
            infinity is allowed, and NaN (a missing measurement) gives NaN.

    Each is a float, an array or a tensor; shapes are broadcast. With tensors the result is
    differentiable; at grad_norm = 0, where the one-sided slope is infinite, the derivative is
    taken to be 0.

    Returns:
        The largest stable curvature: a tensor if any argument is one (dtype and device of the
        tensors), otherwise an array if any is one, otherwise a float.

    Raises:
        TypeError: an argument is no real number, array or tensor.
        ValueError: an argument lies outside its range.

    Source: Long & Bartlett 2024, *Sharpness-aware minimization and the edge of stability*
    (arXiv:2309.12488).

    Example:
        >>> sam_edge(0.5, 0.0, 1.0), sam_edge(0.5, 0.75, 4.0)
        (4.0, 2.6666666666666665)
    """
    _check("lr", lr, above=0.0)
    _check("rho", rho, least=0.0)
    _check("grad_norm", grad_norm, least=0.0, infinite=True, missing=True)
    lr, rho, norm = _together(lr, rho, grad_norm)
    if isinstance(norm, float):
        if norm == 0.0:
            return 0.0 if rho > 0.0 else 2.0 / lr
        return (4.0 / lr) / (1.0 + math.sqrt(1.0 + 8.0 * (rho / norm / lr)))
    # a vanishing gradient is taken out before the division, so that neither the value nor, with
    # tensors, the derivative is 0/0
    where = torch.where if isinstance(norm, torch.Tensor) else np.where
    gone = norm == 0
    safe = where(gone, norm + 1, norm)
    with np.errstate(over="ignore"):  # rho / safe may be infinite; the edge is then 0
        edge = (4.0 / lr) / (1.0 + (1.0 + 8.0 * (rho / safe / lr)) ** 0.5)
    limit = where(rho > 0, 0.0 * edge, 2.0 / lr + 0.0 * edge)
    return where(gone, limit, edge)[()]


def _check(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float = math.inf,
    infinite: bool = False,
    missing: bool = False,
) -> None:
    """Raise unless every entry of `value` is a real number in the stated range.

    The range is open at `above` and `below`, closed at `least`; `infinite` admits infinity and
    `missing` admits NaN.
    """
    known = isinstance(value, int | float | np.ndarray | np.generic | torch.Tensor)
    dtype = str(getattr(value, "dtype", "bool" if isinstance(value, bool) else "float"))
    if not known or not any(kind in dtype for kind in ("int", "float")):
        what = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} must be a real number, an array or a tensor, got {what}")
    entries: Any = value.detach() if isinstance(value, torch.Tensor) else np.asarray(value)
    good = entries > above if above is not None else entries >= least
    good = good & (entries < below)
    if infinite:
        good = good | (entries == math.inf)
    if missing:
        good = good | (entries != entries)
    if not bool(good.all()):
        low = f"above {above:g}" if above is not None else f"at least {least:g}"
        high = f" and below {below:g}" if below < math.inf else ""
        bad = float(entries[~good].reshape(-1)[0])
        raise ValueError(f"{name} must be {'' if infinite else 'finite, '}{low}{high}; got {bad:g}")


def _together(*values: Any) -> list[Any]:
    """All as tensors if one is a tensor, else all as arrays if one is an array, else floats."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if tensors:
        dtype = torch.result_type(tensors[0], 1.0)
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, torch.result_type(tensor, 1.0))
        device = max(tensors, key=lambda tensor: tensor.ndim).device
        return [torch.as_tensor(value, dtype=dtype, device=device) for value in values]
    arrays = [value for value in values if isinstance(value, np.ndarray | np.generic)]
    if arrays:
        common = np.result_type(*arrays, 1.0)
        return [np.asarray(value, dtype=common) for value in values]
    return [float(value) for value in values]
