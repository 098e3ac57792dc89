r"""Stability edges: the largest curvature at which an optimizer can still descend.

On a quadratic loss with curvature $\lambda$ along one direction, each method below multiplies the
gradient by a fixed factor a step. The method stays put in the long run while that factor lies
between -1 and 1; the *edge* is the curvature at which it reaches -1, where the iterate jumps from
one wall of the valley to the opposite one without losing height. These functions, and `growth`,
which gives the size of that factor, are plain formulas on floats, NumPy arrays and tensors (mixed
freely, broadcast, differentiable). With minibatches the factor is drawn anew each step. Its mean
square is what `mean_square_growth` and `mean_square_lr` are about, exactly, on a linear model with
few examples. `noise_kernel_norm`, `noise_kernel_lr` and `stochastic_edge` need the eigenvalues
alone, of any number of examples, and are an approximation; `alignment_bound` is a bound.

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

__all__ = [
    "alignment_bound",
    "gd_edge",
    "growth",
    "heavy_ball_edge",
    "mean_square_growth",
    "mean_square_lr",
    "noise_kernel_lr",
    "noise_kernel_norm",
    "sam_edge",
    "stochastic_edge",
]

_MOST_EXAMPLES = 64


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


def growth(lr: Any, sharpness: Any, rho: Any = 0.0, momentum: Any = 0.0) -> Any:
    r"""Factor per step by which the distance from a minimum grows along an eigenvector.

    Near a minimum the loss is a quadratic. Along an eigenvector with curvature $\lambda$ gradient
    descent (rho = 0), or SAM with the unnormalised perturbation $\epsilon = \rho g$
    (`perturbations.unnormalized`), multiplies the distance by $1 - \eta\tilde\lambda$ with

    $$\tilde\lambda = \lambda (1 + \rho\lambda).$$

    With heavy-ball momentum m, `v <- m v + g(w + eps)`, `w <- w - lr v`, the weight and the
    velocity are multiplied by a matrix, whose eigenvalues are the roots of
    $z^2 - (1 + m - \eta\tilde\lambda) z + m = 0$. The factor is the larger modulus of the two: that
    of every step without momentum, and of the mean over many steps with it. Above 1 the minimum is
    left exponentially fast; 1 is reached at `heavy_ball_edge` if rho = 0.

    The normalised SAM of Foret et al. is, at a point with gradient norm |g|, the unnormalised one
    with the radius rho / |g|. Hence `sam_edge`, the curvature that solves
    `growth(lr, curvature, rho / grad_norm) == 1`; but |g| changes from step to step, so that this
    is the factor of one step, not of a stay at the minimum.

    Args:
        lr: learning rate eta, finite and above 0.
        sharpness: the curvature lambda, finite, of either sign (along negative curvature a step
            leads away); NaN (a missing measurement) gives NaN.
        rho: radius over gradient norm, finite and at least 0. Its unit is that of 1 / curvature.
        momentum: in [0, 1).

    Each is a float, an array or a tensor; shapes are broadcast. With tensors the result is
    differentiable, apart from `1 - lr * lambda~ = 0` without momentum and from the double root
    with it; there the derivative is finite, but not one of the formula.

    Returns:
        The factor, at least `sqrt(momentum)`: a tensor if any argument is one (dtype and device of
        the tensors), otherwise an array if any is one, otherwise a float.

    Raises:
        TypeError: an argument is no real number, array or tensor.
        ValueError: an argument lies outside its range.

    Source: textbook linear stability; for SAM the simplified rule of Andriushchenko & Flammarion
    2022 (arXiv:2206.06232), on which the theory of Zhou et al. 2025 (arXiv:2410.10373) rests.

    Example:
        >>> growth(0.5, 4.0), growth(0.5, 4.0, rho=0.25), growth(0.5, 4.0, momentum=0.25)
        (1.0, 3.0, 0.5)
    """
    _check("lr", lr, above=0.0)
    _check("sharpness", sharpness, above=-math.inf, missing=True)
    _check("rho", rho, least=0.0)
    _check("momentum", momentum, least=0.0, below=1.0)
    lr, sharpness, rho, momentum = _together(lr, sharpness, rho, momentum)
    with np.errstate(over="ignore"):
        total = abs(1.0 + momentum - lr * sharpness * (1.0 + rho * sharpness))  # |sum of the roots|
        spread = total * total - 4.0 * momentum  # below 0 the roots are a complex pair
    if isinstance(spread, float):
        return math.sqrt(momentum) if spread < 0 else (total + math.sqrt(spread)) / 2.0
    # roots are taken of positive numbers alone, so that no derivative is 0/0
    where = torch.where if isinstance(spread, torch.Tensor) else np.where
    one = lr / lr
    apart = where(spread > 0, spread, one) ** 0.5 * (spread > 0)
    pair = where(spread < 0, momentum, one) ** 0.5
    return where(spread < 0, pair, (total + apart) / 2.0)[()]


def mean_square_growth(x: Any, lr: float, rho: float = 0.0, batch: int = 1) -> float:
    r"""Factor per step by which minibatch steps make the mean squared distance grow.

    A linear model with the loss $\tfrac12 (x_i \cdot \delta)^2$ on example i, at the distance
    $\delta$ from a minimum that fits all examples. Each step draws a batch B of examples, without
    replacement and independently of the other steps. SGD (rho = 0), or SAM with the unnormalised
    perturbation $\epsilon = \rho g$ from the same batch, takes

    $$\delta' = (I - \eta G_B)\,\delta, \qquad G_B = H_B (I + \rho H_B), \qquad
      H_B = \frac1b \sum_{i \in B} x_i x_i^\top,$$

    so that $\Sigma = E[\delta\delta^\top]$ is mapped to
    $E_B[(I - \eta G_B)\, \Sigma\, (I - \eta G_B)]$. The factor is the spectral radius of this map,
    found from its matrix. As the map is symmetric and keeps positive matrices positive, that is its
    largest eigenvalue. The minimum is stable in mean square if it is at most 1.

    The directions in which no x_i points are left out: nothing moves there.

    With the whole data as the batch the factor is `growth(lr, sharpness, rho) ** 2`, the largest
    over the eigenvalues of the Hessian; with a smaller one it is never less. A single trajectory
    typically grows by less than the mean square: the mean can explode, carried by ever fewer
    trajectories, while nearly all shrink.

    Args:
        x: one row an example, (n, d): its inputs or, near an interpolating minimum of a network
            with one output, the gradient of the output. An array or a tensor, computed in float64;
            at most 64 rows, as the work grows as n^6.
        lr: learning rate eta, finite and above 0.
        rho: radius over gradient norm of the batch, finite and at least 0.
        batch: examples in a batch, from 1 to n.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument lies outside its range, or x is zero.

    Source: linear stability in the sense of Wu, Ma & E 2018 and Wu, Wang & Su 2022; for SAM,
    Zhou et al. 2025, definition 4.1 (arXiv:2410.10373). The formula for all batch sizes is derived
    here, and exact.

    Example:
        >>> x = np.array([[1.0], [2.0]])
        >>> round(mean_square_growth(x, 0.5, batch=2), 4)  # (1 - 0.5 * 2.5)**2
        0.0625
        >>> round(mean_square_growth(x, 0.5, batch=1), 4)  # (0.5**2 + 1**2) / 2
        0.625
    """
    _check_number("lr", lr, above=0.0)
    first, second = _mean_square(x, rho, batch)
    return float(np.linalg.eigvalsh(np.diag(1.0 - lr * first) + lr**2 * second)[-1])


def mean_square_lr(x: Any, rho: float = 0.0, batch: int = 1) -> float:
    r"""The largest learning rate at which `mean_square_growth` is at most 1.

    The map there is $1 - \eta L_1 + \eta^2 L_2$ with symmetric $L_1, L_2 \ge 0$. Its largest
    eigenvalue is at most 1 exactly if $\eta L_2 \le L_1$: the rate is one over the largest
    eigenvalue of $L_1^{-1/2} L_2 L_1^{-1/2}$. With the whole data as the batch that is
    $2 / (\lambda (1 + \rho\lambda))$ for the largest eigenvalue of the Hessian; with a smaller
    batch it is never more.

    For SGD (rho = 0) it gives an edge, too: with x scaled by a number, the largest eigenvalue of
    the Hessian can grow to `sharpness * mean_square_lr(x) / lr` before lr is unstable.

    Args, raises, source: as `mean_square_growth`.

    Example:
        >>> x = np.array([[1.0], [2.0]])
        >>> round(mean_square_lr(x, batch=2), 4), round(mean_square_lr(x, batch=1), 4)
        (0.8, 0.5882)
    """
    first, second = _mean_square(x, rho, batch)
    root = first**-0.5
    return float(1.0 / np.linalg.eigvalsh(second * np.outer(root, root))[-1])


def noise_kernel_norm(
    eigenvalues: Any, lr: float, batch: int, examples: int, rho: float = 0.0
) -> float:
    r"""Norm K of the noise kernel: how much of its own squared size minibatch noise returns.

    The linear model of `mean_square_growth` with D examples and batches of b, drawn without
    replacement. Let $\lambda_a$ be the eigenvalues of its Hessian, the Gauss-Newton matrix. The
    mean squares $p_a$ of the residuals along the eigenvectors of the kernel $x_i \cdot x_j / D$
    obey

    $$p_a' = (1 - \eta\lambda_a)^2 p_a + \eta^2\lambda_a^2\, c \sum_b p_b, \qquad
      c = \frac{D - b}{b\,(D - 1)},$$

    if those eigenvectors are spread over many examples, so that each example has its share of every
    $p_b$. Where $\eta\lambda_a < 2$ for all a, they shrink if and only if

    $$K = c \sum_a \frac{\eta\lambda_a}{2 - \eta\lambda_a} < 1 .$$

    For a small learning rate K is about $\eta \operatorname{tr} H / 2b$: it depends on the trace,
    where the edge 2/lr depends on the largest eigenvalue alone. With the whole data as the batch K
    is 0. How far K = 1 lies from the exact edge depends on the spread: it is some per cent too
    generous for Gaussian inputs, and up to a half for inputs with few large directions.

    SAM with the unnormalised perturbation $\epsilon = \rho g$ from the same batch has

    $$\tilde\lambda_a
      = \lambda_a \big(1 + \rho\,((1 - c)\,\lambda_a + c \operatorname{tr} H)\big)$$

    in place of $\lambda_a$. This is the mean of its step, exact if all examples are of one length:
    an example in its own batch is perturbed along its own gradient, hence the trace. That the noise
    is scaled like the mean is a second approximation: the rate at K = 1 was up to 1.9 times the
    exact one, at radii up to one over the largest eigenvalue.

    Args:
        eigenvalues: those of the Hessian (Gauss-Newton matrix) of the mean loss, (n,), at least 0
            but for rounding; zeros count for nothing.
        lr: learning rate eta, finite and above 0.
        batch: examples in a batch, from 1 to `examples`.
        examples: of the data set, at least 2.
        rho: radius over gradient norm of the batch, finite and at least 0.

    Returns:
        K; infinity where some $\eta\tilde\lambda_a$ is 2 or more, as the mean is unstable there.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument lies outside its range.

    Source: Agarwala & Pennington 2024 (arXiv:2404.19261), who introduce K; this form for batches
    without replacement, and that for SAM, are derived here.

    Example:
        >>> noise_kernel_norm(np.array([1.0, 1.0]), 0.5, batch=1, examples=11)  # 2 * 0.5 / 1.5
        0.6666666666666666
    """
    _check_number("lr", lr, above=0.0)
    felt, share = _felt(eigenvalues, batch, examples, rho)
    scaled = lr * felt
    if scaled.max(initial=0.0) >= 2.0:
        return math.inf
    return float(share * (scaled / (2.0 - scaled)).sum())


def noise_kernel_lr(eigenvalues: Any, batch: int, examples: int, rho: float = 0.0) -> float:
    """The largest learning rate with `noise_kernel_norm` at most 1.

    The approximation of `mean_square_lr` that needs the eigenvalues alone. With the whole data as
    the batch it is 2 over the largest of the eigenvalues, as SAM feels them.

    Args, raises, source: as `noise_kernel_norm`; ValueError also if no eigenvalue is above 0.

    Example:
        >>> ones = np.ones(12)
        >>> round(noise_kernel_lr(ones, 12, 12), 3), round(noise_kernel_lr(ones, 1, 12), 3)
        (2.0, 0.154)
    """
    felt, share = _felt(eigenvalues, batch, examples, rho)
    top = felt.max(initial=0.0)
    if not top > 0:
        raise ValueError("eigenvalues must hold one above 0")

    def excess(x: float) -> float:
        return float(share * (x * felt / (2.0 * top - x * felt)).sum()) - 1.0

    # K rises with lr, from 0 to infinity where lr * top = x = 2; for the full batch it stays 0
    return float(_root(excess, 2.0) / top) if share else float(2.0 / top)


def stochastic_edge(
    eigenvalues: Any, lr: float, batch: int, examples: int, rho: float = 0.0
) -> float:
    """The largest sharpness with `noise_kernel_norm` at most 1, for a spectrum of this shape.

    The eigenvalues are multiplied by one number, and the largest of them is returned: to be
    compared with the largest eigenvalue as it is. It never lies above the edge of the full batch,
    `gd_edge(lr)` or `sam_edge(lr, rho, 1)`, which it becomes with the whole data as the batch.

    Args, raises, source: as `noise_kernel_lr`.

    Example:
        >>> round(stochastic_edge(np.ones(12), 0.5, 1, 12), 3), gd_edge(0.5)
        (0.308, 4.0)
    """
    _check_number("lr", lr, above=0.0)
    _check_number("rho", rho, least=0.0)
    shape, _ = _felt(eigenvalues, batch, examples, 0.0)
    top = shape.max(initial=0.0)
    if not top > 0:
        raise ValueError("eigenvalues must hold one above 0")
    shape = shape / top
    # SAM feels at least lambda (1 + (1 - c) rho lambda), so that lr * lambda < 2 at the edge
    return _root(lambda s: noise_kernel_norm(s * shape, lr, batch, examples, rho) - 1.0, 2.0 / lr)


def alignment_bound(lr: Any, alignment: Any, batch: int, examples: int) -> Any:
    r"""The largest Frobenius norm of the Gauss-Newton matrix G that minibatch noise lets stand.

    With the alignment of the noise with the curvature

    $$\mu = \frac{\operatorname{tr}(\Sigma G)}{2 L\, \|G\|_F^2},$$

    where $\Sigma$ is the covariance of the gradients of single examples and L half the mean squared
    residual, a step of the linear model gives $E[L'] \ge \eta^2 c\, \mu\, \|G\|_F^2 L$ by its noise
    alone, with c as in `noise_kernel_norm`. So L can only stay as it is, or fall, if
    $\|G\|_F \le 1 / (\eta\sqrt{c\mu})$. The bound is necessary, not sufficient.

    Args:
        lr: learning rate eta, finite and above 0; float, array or tensor.
        alignment: mu, finite and above 0; broadcast against lr. See `gauss_newton.noise_alignment`.
        batch, examples: as for `noise_kernel_norm`.

    Returns:
        The bound, of the broadcast shape; infinity with the whole data as the batch.

    Raises:
        TypeError, ValueError: as `noise_kernel_norm`.

    Source: Wu, Wang & Su 2022 (arXiv:2207.02628), for the direction; this form is derived here.

    Example:
        >>> alignment_bound(0.5, 1.0, batch=1, examples=10)
        2.0
    """
    _check("lr", lr, above=0.0)
    _check("alignment", alignment, above=0.0)
    share = _noise_share(batch, examples)
    lr, alignment = _together(lr, alignment)
    return 1.0 / (lr * (share * alignment) ** 0.5) if share else math.inf + 0.0 * lr * alignment


def _noise_share(batch: int, examples: int) -> float:
    """c of `noise_kernel_norm`: variance of a batch's mean over that of a single example."""
    for name, value, least, most in (
        ("examples", examples, 2, math.inf),
        ("batch", batch, 1, examples),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if not least <= value <= most:
            between = f"from 1 to the {most} examples" if name == "batch" else f"at least {least}"
            raise ValueError(f"{name} must be {between}; got {value}")
    return float((examples - batch) / (batch * (examples - 1)))


def _felt(eigenvalues: Any, batch: int, examples: int, rho: float) -> tuple[np.ndarray, float]:
    """The eigenvalues as SAM feels them, float64, and c of `noise_kernel_norm`."""
    _check("eigenvalues", eigenvalues, above=-math.inf)
    _check_number("rho", rho, least=0.0)
    if isinstance(eigenvalues, torch.Tensor):
        eigenvalues = eigenvalues.detach().cpu().numpy()
    values = np.atleast_1d(np.asarray(eigenvalues, dtype=np.float64))
    if values.ndim != 1:
        raise ValueError(f"eigenvalues must be of shape (n,), got {values.shape}")
    lowest, size = values.min(initial=0.0), abs(values).max(initial=0.0)
    if lowest < -1e-4 * size:
        raise ValueError(
            f"eigenvalues must be at least 0 (those of a Gauss-Newton matrix), got {lowest:g}"
        )
    share = _noise_share(batch, examples)
    values = values.clip(min=0.0)
    return values * (1.0 + rho * ((1.0 - share) * values + share * values.sum())), share


def _root(function: Any, high: float) -> float:
    """Where a rising function passes 0 between 0 and `high`, where it may be infinite."""
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return low


def _mean_square(x: Any, rho: float, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The map of `mean_square_growth` is 1 - lr L1 + lr² L2: L1 (k²,), diagonal, and L2 (k², k²).

    In the basis of the eigenvectors of E[G], in the k directions in which the rows of x point.
    """
    x = _rows(x)
    _check_number("rho", rho, least=0.0)
    n = len(x)
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer):
        raise TypeError(f"batch must be an integer, got {type(batch).__name__}")
    if not 1 <= batch <= n:
        raise ValueError(f"batch must be from 1 to the {n} examples; got {batch}")
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    rank = int((values > values[0] * max(x.shape) * np.finfo(np.float64).eps).sum())
    y = left[:, :rank] * values[:rank]
    # G = y' S C S y, where S selects the batch
    C = np.eye(n) / batch + rho * (y @ y.T) / batch**2
    # chance[m]: that m given examples are all in the batch
    chance = np.cumprod([1.0] + [(batch - m) / (n - m) if m < batch else 0.0 for m in range(4)])
    i, j, k, m = np.ix_(*[np.arange(n)] * 4)
    pairs = chance[1 + (i != j)[:, :, 0, 0]]
    eigenvalues, basis = np.linalg.eigh(y.T @ (C * pairs) @ y)
    y = y @ basis
    distinct = 1 + (j != i) + ((k != i) & (k != j)) + ((m != i) & (m != j) & (m != k))
    # E[S C S ⊗ S C S] as a matrix, from the indices (j, m) to (i, k)
    selected = C[:, :, None, None] * C[None, None] * chance[distinct]
    selected = selected.transpose(0, 2, 1, 3).reshape(n * n, n * n)
    both = np.kron(y, y)
    return np.add.outer(eigenvalues, eigenvalues).ravel(), both.T @ selected @ both


def _rows(x: Any) -> np.ndarray:
    """The examples as a float64 array, checked."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "iuf":
        what = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"x must be an array or a tensor of real numbers, got {what}")
    if x.ndim != 2:
        raise ValueError(f"x must have one row an example, (n, d); got shape {x.shape}")
    if len(x) > _MOST_EXAMPLES:
        raise ValueError(f"x may have at most {_MOST_EXAMPLES} rows, got {len(x)}")
    rows: np.ndarray = x.astype(np.float64)
    if not np.isfinite(rows).all() or not rows.any():
        raise ValueError("x must be finite and not zero everywhere")
    return rows


def _check_number(name: str, value: Any, **bounds: Any) -> None:
    _check(name, value, **bounds)
    if np.ndim(value):
        raise TypeError(f"{name} must be one number, got shape {tuple(value.shape)}")


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
        terms = [] if infinite else ["finite"]
        if above != -math.inf:
            low = f"above {above:g}" if above is not None else f"at least {least:g}"
            terms.append(low + (f" and below {below:g}" if below < math.inf else ""))
        bad = float(entries[~good].reshape(-1)[0])
        raise ValueError(f"{name} must be {', '.join(terms)}; got {bad:g}")


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
