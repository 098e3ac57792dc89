r"""Central flows: where the centre of an oscillating optimizer goes.

At the edge of stability the iterate jumps from wall to wall of the steepest valley. Averaged over
the walls, $w_t = c + x_t$ with $x_t$ in the space of the top eigenvectors $U$ of the Hessian and
$E[x x^\top] = U X U^\top$, its centre $c$ moves smoothly. Time counts steps of the optimizer,
$\eta$ is its learning rate, $g = \nabla L(c)$, and $S$ is the largest eigenvalue. One more term of
Taylor's series says what the bounce adds to the mean gradient (U and X held):

$$\hat g = g + \tfrac12 \nabla \langle U^\top H U, X \rangle.$$

**Gradient descent** (Cohen, Damian, Talwalkar, Kolter & Lee 2024, arXiv:2410.24206):
$\dot c = -\eta\,\hat g$. X is what keeps $U^\top H U \preceq 2/\eta$: a multiplier, which is
positive semidefinite and zero along directions below the edge. With one direction and S at 2/lr it
is $\sigma^2 = \max(0, -2\, g\cdot\nabla S / |\nabla S|^2)$ (`gd_variance`).

**SAM** (derived here; we know of no earlier statement). SAM divides by the norm N of the gradient
on a wall, with $N^2 = |\hat g|^2 + \operatorname{tr}(H X H)$, and looks from
$c \pm x$ at $c + (\rho/N)\,\hat g \pm (1 + (\rho/N) H)\,x$. Hence

$$\dot c = -\eta \Big[ \nabla L\big(c + \tfrac{\rho}{N} \hat g\big)
  + \tfrac12 \nabla \langle U^\top H U, M X M \rangle \Big], \qquad
  M = 1 + \tfrac{\rho}{N} U^\top H U.$$

The bounce grows while the curvature is above SAM's edge and shrinks while it is below. N is the
gradient norm at which S is exactly at that edge, `norm_at_edge` $r(S) = \eta\rho S^2/(2 - \eta S)$:
the size of X is *slaved*, $\operatorname{tr}(H X H) = r(S)^2 - |\hat g|^2$. Where $|g| \ge r(S)$
nothing bounces, X = 0 and N = |g|. That the sharpness is at SAM's edge is therefore true by
construction along the flow, for any S below 2/lr; what it predicts is the drift of c.

*Several top eigenvalues.* The wall of the larger eigenvalue grows at the expense of the others, and
pushes its eigenvalue down: tied eigenvalues stay tied on average, and X has no part along those
below. So X is the positive semidefinite matrix of the given trace for which, a moment later,
$Z = s - U^\top H U \succeq 0$ and $Z X = 0$ with some s. As the change of $U^\top H U$ is linear in
X, with the Gram matrix of the $\nabla (u_i^\top H u_j)$, these are the optimality conditions of a
small convex quadratic program. It is that of gradient descent, where s = 2/lr is given and the
trace is free. `covariance` solves both.

What is left out: the part of $\hat g$ along U in N (it makes the two walls unequal), and the
fluctuations of X around its mean. SAM's slaving is slow as S comes near 2/lr and at the onset of
the bounce: there the flow is wrong for some steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sam_lab._checks import check_integer, check_nonnegative, check_positive
from sam_lab.curvature import ConvergenceWarning
from sam_lab.eigensolvers import inner, lanczos_top, lobpcg
from sam_lab.objective import Closure, Gradient, Objective
from sam_lab.stability import gd_edge

__all__ = [
    "CentralFlow",
    "FlowPoint",
    "averaged",
    "bounce",
    "covariance",
    "gd_variance",
    "norm_at_edge",
    "sam_variance",
    "slopes",
]

Matrix = NDArray[np.float64]

GUARDS = 1  # tracked beside the k directions that may bounce, so that none overtakes unseen
TOL = 1e-2  # residual of the tracked eigenvectors, relative to the largest eigenvalue
LARGEST = 0.1  # change of the curvature in one Euler step, relative to it
MOST_HVPS = 200  # of one search for them


# --- one direction: closed forms -----------------------------------------------------------------


def norm_at_edge(lr: float, rho: float, sharpness: float) -> float:
    r"""The gradient norm at which a sharpness is exactly at SAM's edge.

    $$r(S) = \frac{\eta\rho S^2}{2 - \eta S}, \qquad
      \text{the inverse of } \|g\| \mapsto \texttt{stability.sam\_edge}(\eta, \rho, \|g\|).$$

    Args:
        lr: learning rate, above 0.
        rho: radius of the perturbation, at least 0.
        sharpness: between 0 and 2 / lr.

    Raises:
        ValueError: an argument lies outside its range. At 2 / lr no gradient is large enough.
    """
    lr, rho = check_positive("lr", lr), check_nonnegative("rho", rho)
    edge = gd_edge(lr)
    if not 0 <= sharpness < edge:
        raise ValueError(
            f"sharpness must be at least 0 and below 2 / lr = {edge:.6g}, where SAM has an edge; "
            f"got {sharpness:.6g}"
        )
    return lr * rho * sharpness**2 / (2 - lr * sharpness)


def gd_variance(gradient: Tensor, slope: Tensor) -> float:
    r"""Variance of gradient descent's bounce along the top eigenvector while S is held at 2 / lr.

    $\sigma^2 = \max(0, -2\, g\cdot\nabla S/|\nabla S|^2)$: with it the mean gradient
    $g + \frac12\sigma^2 \nabla S$ does not change S.

    Args:
        gradient: of the loss, (P,).
        slope: gradient of the sharpness, (P,), not zero.

    Raises:
        ValueError: the shapes differ, or the slope is zero.

    Source: Cohen et al. 2024 (arXiv:2410.24206).
    """
    square = float(_dot(slope, slope))
    if gradient.shape != slope.shape or not square > 0:
        raise ValueError(
            f"gradient and slope must share a shape and the slope not be zero; got "
            f"{tuple(gradient.shape)} and {tuple(slope.shape)} with |slope|^2 = {square:g}"
        )
    return max(0.0, -2 * float(_dot(gradient, slope)) / square)


def sam_variance(lr: float, rho: float, sharpness: float, gradient: Tensor, slope: Tensor) -> float:
    r"""Variance of SAM's bounce along the top eigenvector.

    The root $\sigma^2 \ge 0$ of $|g + \frac12\sigma^2\nabla S|^2 + S^2\sigma^2 = r(S)^2$, see
    `norm_at_edge`; 0 where $|g| \ge r(S)$.

    Args:
        lr, rho, sharpness: as for `norm_at_edge`.
        gradient: of the loss at the centre without its part along the top eigenvector, (P,).
        slope: gradient of the sharpness, (P,).

    Raises:
        ValueError: an argument lies outside its range.

    Source: derived here.
    """
    norm = norm_at_edge(lr, rho, sharpness)
    return _positive_root(
        float(_dot(slope, slope)) / 4,
        sharpness**2 + float(_dot(gradient, slope)),
        float(_dot(gradient, gradient)) - norm**2,
    )


def _positive_root(a: float, b: float, c: float) -> float:
    """The root above 0 of a x² + b x + c with a >= 0 and c < 0; 0 where c >= 0."""
    if c >= 0:
        return 0.0
    root = math.sqrt(b * b - 4 * a * c)
    # of the two forms of the root the one that subtracts no equal numbers
    return -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)


# --- several directions --------------------------------------------------------------------------


def covariance(
    pull: Matrix,
    push: Matrix,
    trace: float | None = None,
    start: Matrix | None = None,
    tol: float = 1e-9,
    max_iterations: int = 2000,
) -> Matrix:
    r"""The covariance X of a bounce in k directions, by complementarity.

    X is positive semidefinite. $Z = s - \text{pull} + \text{push}[X]$ is so too, and $ZX = 0$: the
    bounce is where the curvature would otherwise end up highest, and pushes it down to s. Without
    `trace` s is 0, with it s is whatever gives X that trace. These are the optimality conditions of

    $$\min_X\ \tfrac12\langle X, \text{push}[X]\rangle - \langle X, \text{pull}\rangle
      \quad\text{over } X \succeq 0 \text{ (and } \operatorname{tr} X = \text{trace)}.$$

    Solved by projected gradients with momentum (FISTA with restarts), where the projection cuts
    off eigenvalues; with one direction in closed form. Written here because no package that the
    library needs solves semidefinite programs, and these have at most six unknowns.

    Args:
        pull: (k, k), symmetric: where the curvature (less 2 / lr for gradient descent) would be
            without a bounce.
        push: (k, k, k, k), symmetric and positive semidefinite as a matrix on matrices: what the
            bounce takes off, `einsum("ijkl,kl", push, X)`.
        trace: that of X, at least 0; None leaves it free.
        start: a guess of X, such as the last one.
        tol: change of X at which to stop, relative to its size.
        max_iterations: most gradient steps.

    Raises:
        ValueError: the shapes do not fit together, or the trace is negative.
    """
    k = len(pull)
    if pull.shape != (k, k) or push.shape != (k, k, k, k):
        raise ValueError(
            f"pull must have shape (k, k) and push (k, k, k, k); got {pull.shape} and {push.shape}"
        )
    if trace is not None and not trace >= 0:
        raise ValueError(f"trace must be at least 0 or None, got {trace:g}")
    if trace == 0 or (trace is None and np.linalg.eigvalsh(pull)[-1] <= 0):
        return np.zeros((k, k))
    if k == 1:
        steep = float(push[0, 0, 0, 0])
        return np.array([[float(pull[0, 0]) / steep if trace is None else trace]])
    square = push.reshape(k * k, k * k)
    steepest = float(np.linalg.eigvalsh((square + square.T) / 2)[-1])
    if not steepest > 0:  # the bounce changes no curvature: all of it along the highest
        if trace is None:
            raise ValueError("push is zero, so that no finite bounce can hold the curvature")
        vector = np.linalg.eigh(pull)[1][:, -1]
        return trace * np.outer(vector, vector)
    x = ahead = _project(np.zeros((k, k)) if start is None else start, trace)
    momentum = 1.0
    for _ in range(max_iterations):
        descent = pull - (square @ ahead.ravel()).reshape(k, k)
        new = _project(ahead + descent / steepest, trace)
        if np.sum((ahead - new) * (new - x)) > 0:  # momentum leads uphill: begin afresh
            momentum, ahead = 1.0, x
            continue
        change = float(np.abs(new - x).max())
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - x)
        x, momentum = new, following
        if change <= tol * max(float(np.abs(x).max()), 1e-300):
            break
    return x


def _project(x: Matrix, trace: float | None) -> Matrix:
    """The nearest positive semidefinite matrix, of the given trace if there is one."""
    values, vectors = np.linalg.eigh((x + x.T) / 2)
    if trace is None:
        values = np.maximum(values, 0)
    else:  # the nearest point of a simplex: shift all by the same amount, and cut off at 0
        falling = values[::-1]
        shifts = (np.cumsum(falling) - trace) / np.arange(1, len(values) + 1)
        values = np.maximum(values - shifts[np.flatnonzero(falling > shifts)[-1]], 0)
    projected: Matrix = (vectors * values) @ vectors.T
    return projected


def slopes(
    closure: Closure, params: Iterable[Tensor], vectors: Tensor, model: nn.Module | None = None
) -> Tensor:
    r"""Gradients of $u_i^\top H u_j$ in the parameters, the vectors held: third derivatives.

    The entry [0, 0] for the eigenvector of an eigenvalue that stands alone is the gradient of that
    eigenvalue: that the eigenvector turns does not matter to first order.

    Costs a gradient, k HVPs and k (k + 1) / 2 backward passes through them.

    Args:
        closure, params, model: as for `curvature.Hessian`.
        vectors: (P, k).

    Returns:
        (k, k, P), symmetric in the first two.

    Raises:
        ValueError: vectors of another shape.
    """
    objective = Objective(closure, params, model)
    if vectors.ndim != 2 or len(vectors) != objective.size:
        raise ValueError(
            f"vectors must have shape ({objective.size}, k), one row a parameter; "
            f"got {tuple(vectors.shape)}"
        )
    with objective.undisturbed() as batches:
        ((_, one),) = batches
        _, graph = objective.differentiate(one, create_graph=True)
        return _slopes(objective, graph, vectors)


def _slopes(objective: Objective, graph: Gradient, vectors: Tensor) -> Tensor:
    """`slopes` through the graph of a gradient."""
    k = vectors.shape[1]
    out = vectors.new_zeros(k, k, objective.size)
    pieces = [objective.unflatten(column) for column in vectors.T]
    for j in range(k):
        along = _along(objective, graph, pieces[j], create_graph=True)
        for i in range(j + 1):
            out[i, j] = objective.flatten(_along(objective, along, pieces[i]))
            out[j, i] = out[i, j]
    return out


def _along(
    objective: Objective, graph: Gradient, pieces: list[Tensor], create_graph: bool = False
) -> Gradient:
    """The gradient of graph . vector; entries that do not depend on the parameters drop out."""
    curved = [
        (f, v) for f, v in zip(graph, pieces, strict=True) if f is not None and f.requires_grad
    ]
    if not curved:
        return (None,) * len(objective.params)
    found: Gradient = torch.autograd.grad(
        [f for f, _ in curved],
        objective.params,
        [v for _, v in curved],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )
    return found


# --- the flow ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowPoint:
    """A flow at one time.

    Attributes:
        loss: at the centre.
        mean_loss: predicted mean over the walls, loss + tr(H X) / 2.
        values: (k,) float64, largest eigenvalues at the centre, descending.
        vectors: (P, k), their eigenvectors.
        covariance: (k, k) float64, X in the basis of `vectors`.
        gradient: (P,), at the centre.
    """

    loss: float
    mean_loss: float
    values: Matrix
    vectors: Tensor = field(repr=False)
    covariance: Matrix
    gradient: Tensor = field(repr=False)

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue at the centre."""
        return float(self.values[0])

    @property
    def bounce(self) -> float:
        """Root mean square distance of the iterate from the centre, sqrt(tr X)."""
        return math.sqrt(float(np.trace(self.covariance)))


@dataclass(frozen=True)
class _Here:
    """What is known at one setting of the parameters."""

    where: Tensor  # (P,)
    loss: float
    gradient: Tensor  # (P,)
    vectors: Tensor  # (P, k)
    matrix: Matrix  # (k, k), U' H U, diagonal
    slopes: Tensor  # (k, k, P)
    gram: Matrix  # (k, k, k, k), inner products of the slopes


class CentralFlow:
    r"""The centre of gradient descent's path, or of SAM's, as a differential equation.

    Moves the parameters in place, as an optimizer does: `step` by the time of one optimizer step.
    Formulas: see the module. Full batch; the loss must have three derivatives (ReLU has not). From
    SAM's or gradient descent's own start the flow bounces at once where the optimizer needs tens or
    hundreds of steps for it, since its deviation along the top eigenvector must grow from next to
    nothing: compare from where the optimizer bounces.

    Args:
        closure: evaluates the loss at the current parameters, as for `curvature.Hessian`.
        params: leaf tensors that require grad; float64 is advised.
        lr: learning rate of the optimizer.
        rho: radius of SAM's perturbation; 0 is gradient descent.
        bounce: False leaves the bounce out (X = 0): gradient flow, or, with rho,
            $\dot c = -\eta \nabla L(c + \rho g / |g|)$. The control.
        k: how many top directions may bounce, at most 3.
        substeps: Euler steps an optimizer step; more where one would change the curvature by more
            than a tenth, as near 2 / lr.
        model: the module that the closure evaluates, as for `curvature.Hessian`.
        seed: of the random start of the first search for eigenvectors.

    Top vectors and third derivatives are found once a call of `step` (LOBPCG from those of the call
    before) and held during its substeps, in which the Hessian in the top space is carried along to
    first order. A step costs `2 * substeps` gradients (`substeps` with rho = 0); with a bounce
    k + 1 HVPs, more where the vectors turn fast, and what `slopes` costs.

    Attributes:
        hvps: Hessian-vector products so far, those of `slopes` apart.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> w = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
        >>> flow = CentralFlow(lambda: 0.5 * (w[0] * w[1] - 1) ** 2, [w], lr=0.1, rho=0.1)
        >>> round(flow.read().bounce, 4)  # lr rho S / (2 - lr S) with S = 4.25
        0.027
    """

    def __init__(
        self,
        closure: Closure,
        params: Iterable[Tensor],
        lr: float,
        rho: float = 0.0,
        *,
        bounce: bool = True,
        k: int = 1,
        substeps: int = 4,
        model: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        self.lr, self.rho = check_positive("lr", lr), check_nonnegative("rho", rho)
        params = list(params)
        self._objective = Objective(closure, params, model)
        with self._evaluating():
            first, second = self._gradient()[0], self._gradient()[0]
        if first != second:
            raise ValueError(
                "closure must return the same loss at the same parameters: it gave "
                f"{first:g} and {second:g} (turn dropout off, or fix its mask)"
            )
        self.params = self._objective.params
        self.bounce = bool(bounce)
        self.k = check_integer("k", k, 1, min(3, self._objective.size))
        self.substeps = check_integer("substeps", substeps, 1)
        self.seed = check_integer("seed", seed, 0)
        self.hvps = 0
        self._block: Tensor | None = None
        self._here: _Here | None = None
        self._covariance: Matrix = np.zeros((self.k, self.k))

    def read(self) -> FlowPoint:
        """The flow at the current parameters, which stay where they are.

        Raises:
            ValueError: the sharpness is at or above 2 / lr, where SAM has no edge.
            FloatingPointError: the loss or a derivative is not finite.
        """
        here, found = self._look(), self._covariance
        mean_loss = here.loss + float((here.matrix * found).sum()) / 2
        return FlowPoint(
            here.loss, mean_loss, np.diag(here.matrix).copy(), here.vectors, found, here.gradient
        )

    def step(self, steps: int = 1) -> None:
        """Move by the time of so many optimizer steps.

        The curvature found where they begin serves all of them: two at a time cost little more than
        one, and are as exact where the top vectors turn slowly.

        Raises: as `read`.
        """
        parts = check_integer("steps", steps, 1) * self.substeps
        if self.bounce:
            here = self._look()
            matrix, gradient = here.matrix, here.gradient
            left = float(parts)
            with self._evaluating():
                while left > 0:
                    moved = self._velocity(here, matrix, gradient) / self.substeps
                    change = _numpy(here.slopes @ moved)
                    share = min(1.0, LARGEST * _size(matrix) / max(_size(change), 1e-300))
                    self._move(share * moved)
                    left -= share
                    if share < 1:  # what was found no longer holds
                        here = self._look()
                        matrix, gradient = here.matrix, here.gradient
                    elif left > 0:
                        matrix, gradient = matrix + change, self._gradient()[1]
                        self._covariance = self._bounce(here, matrix, gradient)
        else:
            with self._evaluating():
                for _ in range(parts):
                    gradient = self._gradient()[1]
                    if self.rho:
                        gradient = self._gradient_at(self.rho * _unit(gradient))
                    self._move(-self.lr / self.substeps * gradient)

    # ------------------------------------------------------------------ the equation

    def _velocity(self, here: _Here, matrix: Matrix, gradient: Tensor) -> Tensor:
        """The change of the centre in the time of one step."""
        x = self._covariance
        if not self.rho:
            return -self.lr * (gradient + _force(here, x))
        if x.any():
            mean = gradient + _force(here, x)
            ratio = self.rho / self._norm_at_edge(matrix)
        else:
            mean, ratio = gradient, self.rho / max(float(gradient.norm()), 1e-300)
        wall = np.eye(self.k) + ratio * matrix
        return -self.lr * (self._gradient_at(ratio * mean) + _force(here, wall @ x @ wall))

    def _bounce(self, here: _Here, matrix: Matrix, gradient: Tensor) -> Matrix:
        """The covariance X of the bounce, by `covariance`."""
        # what the rest of the gradient makes of U' H U in the time of one substep
        time = self.lr / self.substeps
        pull = matrix - time * _numpy(here.slopes @ gradient)
        push = time / 2 * here.gram
        x = self._covariance
        if not self.rho:
            return covariance(pull - gd_edge(self.lr) * np.eye(self.k), push, None, x)
        norm = self._norm_at_edge(matrix)
        across = gradient - here.vectors @ (here.vectors.T @ gradient)
        short = float(_dot(across, across)) - norm**2
        if short >= 0:
            return np.zeros((self.k, self.k))
        top = float(np.linalg.eigvalsh(matrix)[-1])
        push = push * (1 + self.rho / norm * top) ** 2
        if not np.trace(x) > 0:
            x = np.zeros((self.k, self.k))
            x[0, 0] = -short / top**2
        for _ in range(1 if self.k == 1 else 2):  # its shape hangs on its size, its size on both
            x = covariance(pull, push, float(np.trace(x)), x)
            shape = x / np.trace(x)
            force = _force(here, shape)
            size = _positive_root(
                float(_dot(force, force)),
                float((matrix @ matrix * shape).sum()) + 2 * float(_dot(across, force)),
                short,
            )
            x = size * shape
        return x

    def _norm_at_edge(self, matrix: Matrix) -> float:
        # where all curvature is negative there is no wall to bounce from: r = 0
        return norm_at_edge(self.lr, self.rho, max(float(np.linalg.eigvalsh(matrix)[-1]), 0.0))

    # ------------------------------------------------------------------ the loss

    def _look(self) -> _Here:
        """What is known at the current parameters, found anew where they have changed."""
        where = self._objective.flatten([p.detach() for p in self.params])
        if self._here is not None and torch.equal(where, self._here.where):
            return self._here
        k = self.k
        with self._evaluating():
            loss, graph = self._objective.differentiate(self._closure, create_graph=True)
            gradient = self._objective.flatten([None if g is None else g.detach() for g in graph])
            values, vectors = self._top(graph)
            slopes = where.new_zeros(k, k, len(where))
            if self.bounce:
                slopes = _slopes(self._objective, graph, vectors)
        flat = slopes.reshape(k * k, -1)
        gram = inner(flat, flat).numpy().reshape(k, k, k, k)
        here = _Here(where, loss, gradient, vectors, np.diag(values), slopes, gram)
        if self.bounce:
            if self._here is not None:  # what was known of X, in the new basis
                turn = _numpy(vectors.T @ self._here.vectors)
                self._covariance = turn @ self._covariance @ turn.T
            self._covariance = self._bounce(here, here.matrix, gradient)
        self._here = here
        return here

    def _top(self, graph: Gradient) -> tuple[Matrix, Tensor]:
        """The k largest eigenvalues and their vectors (P, k), from those of the look before."""

        def apply(rows: Tensor) -> Tensor:
            self.hvps += len(rows)
            pieces = map(self._objective.unflatten, rows)
            products = [_along(self._objective, graph, row) for row in pieces]
            return torch.stack([self._objective.flatten(product) for product in products])

        def draw(m: int) -> Tensor:
            drawn = torch.randn(m, self._objective.size, generator=generator, dtype=torch.float64)
            return drawn.to(self.params[0])

        generator = torch.Generator().manual_seed(self.seed)
        wide = min(self.k + GUARDS, self._objective.size)
        found = None
        if self._block is not None:
            found = lobpcg(apply, draw, self._block, self.k, TOL, MOST_HVPS)
        if found is None or not found.converged:
            found = lanczos_top(apply, draw, wide, TOL, MOST_HVPS)
        if not found.converged:
            warnings.warn(
                f"the top eigenvectors were not found to a residual of {TOL} within {MOST_HVPS} "
                "HVPs: the flow goes on with what there is",
                ConvergenceWarning,
                stacklevel=4,
            )
        self._block = found.rows[:wide]
        return found.values[: self.k].numpy(), found.rows[: self.k].T

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Around several evaluations: entering is dear beside the gradient of a small network."""
        with self._objective.undisturbed() as batches:
            ((_, self._closure),) = batches
            yield

    def _gradient(self) -> tuple[float, Tensor]:
        """Loss and gradient at the current parameters."""
        loss, pieces = self._objective.differentiate(self._closure)
        return loss, self._objective.flatten(pieces)

    def _gradient_at(self, displacement: Tensor) -> Tensor:
        """The gradient at a displaced point; the parameters are put back."""
        kept = [p.detach().clone() for p in self.params]
        self._move(displacement)
        try:
            return self._gradient()[1]
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, kept, strict=True):
                    p.copy_(value)

    def _move(self, displacement: Tensor) -> None:
        with torch.no_grad():
            for p, piece in zip(self.params, self._objective.unflatten(displacement), strict=True):
                p.add_(piece)


def _force(here: _Here, x: Matrix) -> Tensor:
    """Half the gradient of <U' H U, X>, (P,)."""
    weights = torch.from_numpy(x).to(here.slopes)
    force: Tensor = 0.5 * torch.tensordot(weights, here.slopes, 2)
    return force


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return inner(a[None], b[None])[0, 0]


def _unit(gradient: Tensor) -> Tensor:
    norm = gradient.norm()
    return gradient / norm if norm > 0 else gradient


def _size(symmetric: Matrix) -> float:
    """The largest modulus of an eigenvalue."""
    return float(np.abs(np.linalg.eigvalsh(symmetric)).max())


def _numpy(small: Tensor) -> Matrix:
    array: Matrix = small.detach().cpu().double().numpy()
    return array


# --- paths that oscillate ------------------------------------------------------------------------


def averaged(path: Tensor) -> Tensor:
    """The centre of an oscillating path, (w[t-1] + 2 w[t] + w[t+1]) / 4.

    It removes a sign that alternates and keeps straight lines as they are.

    Args:
        path: (T, ...), one point a step, T at least 3.

    Returns:
        (T - 2, ...), for the steps 1 to T - 2.

    Raises:
        ValueError: fewer than three points.
    """
    before, here, after = _neighbours(path)
    return (before + 2 * here + after) / 4


def bounce(path: Tensor, basis: Tensor) -> Tensor:
    """Distance of an oscillating path from its centre in the span of a basis, (T - 2,).

    The length of basis' (w[t-1] - 2 w[t] + w[t+1]) / 4: for w[t] = c + (-1)^t x it is |x|. Take
    more eigenvectors than seem to bounce: along one of two whose eigenvalues are nearly equal the
    number means nothing.

    Args:
        path: (T, P), one point a step, T at least 3.
        basis: (P, m), orthonormal columns.

    Raises:
        ValueError: fewer than three points, or a basis of another height.
    """
    before, here, after = _neighbours(path)
    if path.ndim != 2 or basis.ndim != 2 or len(basis) != path.shape[1]:
        raise ValueError(
            "path must be (T, P) and basis (P, m); "
            f"got {tuple(path.shape)} and {tuple(basis.shape)}"
        )
    swing: Tensor = (before - 2 * here + after) / 4 @ basis
    return swing.square().sum(1).sqrt()


def _neighbours(path: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len(path) < 3:
        raise ValueError(f"path must have at least 3 points, got {len(path)}")
    return path[:-2], path[1:-1], path[2:]
