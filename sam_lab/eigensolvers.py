r"""Lanczos and LOBPCG for a symmetric operator that can only be multiplied with vectors.

A set of vectors is a matrix with one vector a *row* (contiguous in memory), and the operator is a
function `apply(rows) -> rows`, one product a row. Inner products and norms are summed in float64
whatever the dtype of the vectors, and the small projected matrices live in float64 on the CPU.

Both methods are Rayleigh-Ritz: restrict the operator to a small space, take the eigenpairs
(theta, x), |x| = 1, of the restriction (*Ritz pairs*), and accept them when their residuals
|H x - theta x| are small. Some eigenvalue then lies within the residual of theta. That none larger
was missed is a statement about the start: see `lanczos_top`.

Sources: Parlett 1998, *The symmetric eigenvalue problem*, chapters 11 and 13; Knyazev 2001,
*Toward the optimal preconditioned eigensolver* (LOBPCG).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Krylov",
    "Ritz",
    "extrapolate",
    "guards",
    "inner",
    "lanczos",
    "lanczos_top",
    "lobpcg",
    "missing",
    "scale",
]

Apply = Callable[[Tensor], Tensor]  # rows (m, P) -> H times each row, (m, P)
Draw = Callable[[int], Tensor]  # m -> m random rows (m, P)


class Ritz(NamedTuple):
    """Approximate eigenpairs, largest first, and whether the wanted ones met the tolerance."""

    values: Tensor  # (m,) float64
    rows: Tensor  # (m, P) orthonormal
    residuals: Tensor  # (m,) float64
    converged: bool
    ahead: Tensor  # (m, P) rows a power step nearer to the eigenvectors, where it costs no product


def guards(k: int) -> int:
    """Guard vectors carried beside k wanted ones: none for one, two for more.

    They keep the next neighbours of the k-th eigenvalue in view, in case they change places.
    """
    return 0 if k == 1 else 2


def scale(values: Tensor, dtype: torch.dtype) -> float:
    """|theta_1|, which residuals are measured by; for a top near 0, the rounding of the largest."""
    return max(abs(float(values[0])), 100 * torch.finfo(dtype).eps * float(values.abs().max()))


class Krylov:
    """State of a Lanczos run: an orthonormal basis and the projection of H on it.

    Attributes:
        rows: (steps, P) basis.
        alpha, beta: diagonal of the projected tridiagonal matrix and the entries beside it;
            `beta[-1]` is the norm of what H has left over outside the basis.
        closed: the basis spans an invariant space; nothing is left over but rounding.
        first: where the block begins that was started after the last closure.
        dropped: largest norm of a leftover that was taken for rounding.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self._basis = like.new_empty(16, size)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.first = 0
        self.closed = False
        self.dropped = 0.0

    @property
    def rows(self) -> Tensor:
        return self._basis[: len(self.alpha)]

    def append(self, row: Tensor, alpha: float) -> None:
        steps = len(self.alpha)
        if steps == len(self._basis):  # full: double it
            self._basis = torch.cat([self._basis, torch.empty_like(self._basis)])
        self._basis[steps] = row
        self.alpha.append(alpha)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (descending) and eigenvectors (columns) of the projected matrix."""
        beside = torch.tensor(self.beta[:-1], dtype=torch.float64)
        diagonal = torch.tensor(self.alpha, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(diagonal.diag() + beside.diag(1) + beside.diag(-1))
        return values.flip(0), vectors.flip(1)


def lanczos(apply: Apply, draw: Draw) -> Iterator[Krylov]:
    """Lanczos with full reorthogonalization from a random start: one product, one yield a step.

    When the space has become invariant (`closed`), the run goes on from a new random direction
    orthogonal to it. The projected matrix then falls into blocks, and each further block sees the
    copies of multiple eigenvalues that the ones before it could not.
    """
    row = draw(1)[0]
    size, eps = len(row), torch.finfo(row.dtype).eps
    krylov = Krylov(size, row)
    row = row / _norm(row)
    while True:
        image = apply(row[None])[0]
        krylov.append(row, float(inner(row[None], image[None])))
        rest = _orthogonal(image, krylov.rows)
        beta = _norm(rest)
        largest = max(map(abs, krylov.alpha + krylov.beta))
        # Below this the rest is rounding, and its direction means nothing. Well above eps, because
        # the steps before it may have magnified the rounding of their own.
        krylov.closed = beta <= eps ** (2 / 3) * largest or len(krylov.alpha) == size
        krylov.beta.append(0.0 if krylov.closed else beta)
        if krylov.closed:
            krylov.dropped = max(krylov.dropped, beta)
        yield krylov
        if len(krylov.alpha) == size:
            return
        if krylov.closed:
            krylov.first = len(krylov.alpha)
            rest = _orthogonal(draw(1)[0], krylov.rows)
            beta = _norm(rest)
        row = rest / beta


def lanczos_top(apply: Apply, draw: Draw, k: int, tol: float, max_products: int) -> Ritz:
    """The k largest eigenpairs, from a random start.

    Residuals cost nothing here: |H x - theta x| = beta |last entry of the small eigenvector|.

    Small residuals come early, while an eigenvalue that the start vector holds little of may
    still be on its way; a pair of near neighbours may pass for one. For k > 1 the tolerance must
    therefore be met in three steps running. (On a digits network at the edge of stability the
    first such step missed one of the top five in a fifth of the runs, the third in a fiftieth.)
    """
    patience = 0 if k == 1 else 2
    held = 0
    for krylov in lanczos(apply, draw):
        steps, (values, vectors) = len(krylov.alpha), krylov.eigen()
        dtype = krylov.rows.dtype
        rounding = max(torch.finfo(dtype).eps * float(values.abs().max()), krylov.dropped)
        residuals = (krylov.beta[-1] * vectors[-1].abs()).clamp(min=rounding)
        allowed = max(tol * scale(values, dtype), rounding)
        met = steps >= k and bool((residuals[:k] <= allowed).all())
        held = held + 1 if met else 0
        done = steps == krylov.rows.shape[1]
        if met and not done:
            if krylov.first == 0 and not krylov.closed:
                done = held > patience
            else:
                # After a closure copies of multiple eigenvalues may hide, until the largest value
                # of the latest block falls no higher than the k-th of all.
                of_block = vectors[krylov.first :].square().sum(0) > 0.5
                best = int(of_block.nonzero()[0])
                below = float(values[best]) <= float(values[k - 1]) + rounding
                done = below and bool(residuals[best] <= allowed)
        if done or steps >= max_products:
            break
    m = min(steps, k + guards(k))
    rows = vectors[:, :m].T.to(krylov.rows) @ krylov.rows
    return Ritz(values[:m], rows, residuals[:m], met and done, rows)


def lobpcg(apply: Apply, draw: Draw, start: Tensor, k: int, tol: float, max_products: int) -> Ritz:
    """The k largest eigenpairs, from rows that are nearly right.

    Locally optimal block preconditioned conjugate gradients, without preconditioner:
    Rayleigh-Ritz on the span of X (current vectors), R (residuals of the wanted ones that are not
    yet good enough) and P (the directions X moved in last). H X and H P follow from the same
    small linear combinations as X and P, so that only R costs products: at most k an iteration.
    The basis is kept orthonormal, hence P is formed in its coordinates.

    Rows of `start` beyond k are guards: they take part, but their residuals are not pursued.

    The products of the certificate make one more power step for nothing: `ahead` are the rows
    H x / theta. (Where theta is small beside the largest, its quarter divides, lest the step leap.)
    """
    basis = _orthonormal(start)
    if len(basis) < k:  # of too low rank: filled up at random
        basis = torch.cat([basis, _orthonormal(draw(k - len(basis)), basis)])
    m, eps = len(basis), torch.finfo(basis.dtype).eps
    spent = m
    image = apply(basis)
    while True:
        projected = inner(basis, image)
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        values, vectors = values.flip(0)[:m], vectors.flip(1)[:, :m]
        # P: the part of the new X that lies outside the old X, made orthogonal to the new X
        moved = vectors.clone()
        moved[:m] = 0
        turn = torch.linalg.qr(torch.cat([vectors, moved], 1))[0]
        turn[:, :m] = vectors
        basis, image = turn.T.to(basis) @ basis, turn.T.to(basis) @ image
        defects = image[:m] - values.to(basis)[:, None] * basis[:m]
        residuals = torch.stack([inner(row[None], row[None])[0, 0] for row in defects]).sqrt()
        residuals = residuals.clamp(min=eps * float(values.abs().max()))  # no less than rounding
        pursued = torch.nonzero(residuals[:k] > tol * scale(values, basis.dtype))[:, 0]
        if len(pursued) == 0 or spent + len(pursued) > max_products:
            break
        fresh = _orthonormal(defects[pursued.to(defects.device)], basis)
        if len(fresh) == 0:  # residuals within the basis are rounding
            break
        basis, image = torch.cat([basis, fresh]), torch.cat([image, apply(fresh)])
        spent += len(fresh)
    divisors = values.clamp(min=scale(values, basis.dtype) / 4)
    ahead = basis[:m] + defects / divisors.to(basis)[:, None]
    return Ritz(values, basis[:m], residuals, len(pursued) == 0, ahead)


# ------------------------------------------------------------------ subspaces along a path


def extrapolate(points: list[Tensor], spans: list[Tensor], point: Tensor, noise: float) -> Tensor:
    r"""A guess of the span at `point`, from what it was at points near by.

    To first order a span depends on the point linearly. Where the point is an affine combination
    of the known ones, the span is then the same combination of the known spans, each turned within
    itself to lie closest to the last one (orthogonal Procrustes). The coefficients minimise, over
    $\sum_j c_j = 1$,

    $$d^2\, |x - \textstyle\sum_j c_j x_j|^2 + \epsilon^2 \textstyle\sum_j c_j^2 ,$$

    the expected square error of a combination of rows that carry errors $\epsilon$ each, where the
    span turns by d a unit of length, estimated from the spans themselves (median over the pairs
    with the last one). Spans that hardly turn are averaged, others are followed.

    Args:
        points: (P,) each, two at least, the last one nearest.
        spans: (m, P) rows, nearly orthonormal, at these points.
        point: (P,) where the span is wanted.
        noise: epsilon, the error of a row.

    Returns:
        (m, P) rows, nearly orthonormal as long as the spans differ little.

    Source: the coefficients come from the points, as in Polack, Dusson, Stamm & Lipparini 2021,
    *Grassmann extrapolation of density matrices for Born-Oppenheimer molecular dynamics*; the
    weighting by noise, and working with rows in place of the manifold's tangents, are ours.
    """
    *earlier, last = spans
    moved = torch.stack([x - points[-1] for x in points[:-1]])
    lengths = inner(moved, moved)
    wanted = inner(moved, (point - points[-1])[None])[:, 0]
    turns, nearest, size = [], [], _square(last)
    for span in earlier:
        left, cosines, right = torch.linalg.svd(inner(last, span))
        turns.append((size + _square(span) - 2 * float(cosines.sum())) / len(last))
        nearest.append(left @ right)
    away = lengths.diagonal() > 0
    rates = (torch.tensor(turns, dtype=torch.float64) / lengths.diagonal())[away]
    rate = float(rates.median()) if len(rates) else 0.0
    if not rate > 0 or not bool(torch.isfinite(wanted).all()):  # nothing turned, or no number
        return last
    # moves along one line leave the coefficients open but for the penalty, which has a floor
    penalty = max(noise**2 / rate, 1e-9 * float(lengths.trace()))
    ones = torch.ones(len(earlier), dtype=torch.float64)
    # the last coefficient is 1 minus the others: its square is penalised with theirs
    system = lengths + penalty * (ones.diag() + torch.outer(ones, ones))
    weights = torch.linalg.solve(system, wanted + penalty)
    guess = (1 - float(weights.sum())) * last
    for weight, turn, span in zip(weights, nearest, earlier, strict=True):
        guess += (weight * turn).to(span) @ span
    return guess


def missing(start: Tensor, rows: Tensor) -> float:
    """The share of orthonormal `rows` that lies outside the span of `start`, 0 to 1 (a sine)."""
    along = inner(start, rows)
    within = float((along * (torch.linalg.pinv(inner(start, start), hermitian=True) @ along)).sum())
    return math.sqrt(max(0.0, 1 - within / len(rows)))


# ------------------------------------------------------------------ reductions in float64


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for rows (m, P) and (n, P): (m, n), summed in float64 a piece at a time, on the CPU."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64  # Apple's GPUs lack float64
    pieces = zip(a.split(1 << 20, 1), b.split(1 << 20, 1), strict=True)
    return torch.stack([x.to(wide) @ y.to(wide).T for x, y in pieces]).sum(0).cpu().double()


def _norm(row: Tensor) -> float:
    return math.sqrt(_square(row[None]))


def _square(rows: Tensor) -> float:
    return float(inner(rows, rows).trace())


def _orthogonal(row: Tensor, basis: Tensor) -> Tensor:
    """`row` without its components along orthonormal rows; twice, since once leaves rounding."""
    for _ in range(2):
        row = row - (inner(row[None], basis).to(row) @ basis)[0]
    return row


def _orthonormal(rows: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the rows' span, orthogonal to `against`; dependent rows drop out."""
    threshold = 100 * torch.finfo(rows.dtype).eps
    for _ in range(2):
        norms = inner(rows, rows).diagonal().sqrt()
        kept = norms > 0
        rows = rows[kept.to(rows.device)] / norms[kept].to(rows)[:, None]
        if against is not None:
            rows = rows - inner(rows, against).to(rows) @ against
        values, vectors = torch.linalg.eigh(inner(rows, rows))
        kept = values > threshold
        rows = (vectors[:, kept] / values[kept].sqrt()).T.to(rows) @ rows
    return rows
