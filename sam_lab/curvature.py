r"""The Hessian of a loss as a linear operator, and what products with it reveal.

A network with P parameters has a Hessian of P x P entries, far too many to write down, yet the
product of the Hessian with one vector costs about as much as one or two gradients (Pearlmutter
1994). Everything here is built from such Hessian-vector products, *HVPs*. They are counted, since
they are what curvature costs.

- `Hessian(closure, params)` is the operator at the *current* values of the parameters: `H @ v`,
  with v flat, all parameters reshaped to one dimension one after the other.
- `Hessian.top`: the largest eigenvalues, by Lanczos from a random start or by LOBPCG from vectors
  that are nearly right, such as those of the step before (see `sam_lab.eigensolvers`).
- `Hessian.trace` (Hutchinson), `Hessian.trace_of` a function of the matrix and `Hessian.density`
  (both stochastic Lanczos quadrature).

*Certificates.* An eigenpair (theta, x) is accepted when its residual |Hx - theta x| is small: some
eigenvalue lies within the residual of theta. A small change between iterations certifies nothing.
theta is never above the largest eigenvalue (up to rounding); that no larger one was missed is
likely after a random start, not certain.

*A deterministic operator that disturbs nothing.* Dropout masks are frozen as they were when the
`Hessian` was made; random state, `.grad`, buffers and modes are as before after every call (see
`sam_lab.objective`).

*Precision.* Products run in the dtype of the parameters (an `autocast` around the call is switched
off), inner products and small matrices in float64. Of parameters of half precision the vectors are
float32, rounded for each product alone: in bfloat16 a unit vector itself is known to a few
thousandths only. What a product in bfloat16 rounds stays: expect a residual of some tenths of a per
cent to one per cent of the largest eigenvalue below which none falls, and give `tol` room above it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sam_lab._checks import check_integer, check_loss, check_positive
from sam_lab.eigensolvers import Ritz, inner, lanczos, lanczos_top, lobpcg, scale
from sam_lab.objective import Batches, Closure, Gradient, Objective

__all__ = ["ConvergenceWarning", "Eigenpairs", "Hessian", "SpectralDensity", "TraceEstimate"]


class ConvergenceWarning(UserWarning):
    """An iteration ran out of Hessian-vector products before it reached its tolerance."""


@dataclass(frozen=True)
class Eigenpairs:
    """The k largest eigenvalues of a Hessian, with a certificate for each.

    Attributes:
        values: (k,) float64 on the CPU, algebraically largest first.
        vectors: (P, k) unit columns, in dtype (float32 for half precision) and on the device of
            the parameters.
        residuals: (k,) float64, |H x - value x|; an eigenvalue lies within it of each value.
        hvps: Hessian-vector products spent.
        converged: whether every residual is at most `tol * |values[0]|`.
        block: (P, m >= k) vectors and guard vectors, for `top(start=...)` at the next step.
        ahead: (P, m) `block` after one more power step where the certificate's products make it for
            nothing (a warm start), else `block`: the better start of the next step.
        crossing: whether the first vector is another one than at the measurement before. Only a
            `SharpnessTracker` has one before, see there.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    hvps: int
    converged: bool
    block: Tensor = field(repr=False)
    ahead: Tensor = field(repr=False)
    crossing: bool = False


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of the trace, its standard error, HVPs spent, and whether `tol` was met."""

    value: float
    stderr: float
    hvps: int
    converged: bool


@dataclass(frozen=True)
class SpectralDensity:
    """A smoothed density of eigenvalues, estimated from several random vectors.

    Attributes:
        grid: (points,) eigenvalue axis, float64 on the CPU.
        density: (points,) estimate; integrates to 1 over the default grid.
        stderr: (points,) standard error of the mean over the random vectors.
        sigma: standard deviation of the Gaussian that smears each eigenvalue.
        hvps: Hessian-vector products spent.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    sigma: float
    hvps: int


@dataclass
class _Point:
    """What is known at one setting of the parameters."""

    versions: tuple[int, ...]
    values: list[Tensor]
    loss: float
    gradient: Tensor
    graph: Any  # what `Hessian._second_backward` needs, where that is kept, else None


class Hessian:
    """The Hessian of `closure()` with respect to `params`, as a symmetric linear operator.

    Args:
        closure: evaluates the loss at the current values of the parameters and returns it, a
            scalar tensor; no `backward` inside. Or `objective.Batches`, as `over` makes them.
        params: leaf tensors that require grad, of one dtype on one device, such as
            `model.parameters()`. Those that the loss does not use give zero rows.
        model: the module that the closure evaluates. To be given whenever it has buffers that a
            forward pass changes, such as BatchNorm's running statistics.
        mode: how a product is computed.
            "graph": a second backward pass, through the graph of the gradient. With one batch
            the graph is kept between products (its memory is that of a few sets of activations);
            with several it is built anew for each batch.
            "forward": the tangent of the backward pass (forward over reverse). Keeps no graph and
            needs less memory; needs `model`, and operations that have forward derivatives.
            "auto": "forward" for several batches off the CPU if the model is given, else "graph".

    The operator always speaks of the current parameter values and, given the model, of its
    current buffers and modes. After a change that it cannot see, such as other data in a variable
    the closure reads, call `reset()`; `top`, `trace` and `density` do so by themselves.

    A model made by `torch.compile` is evaluated as it was written, since compiled code has no
    second derivative. Large layer norms (`torch.nn.LayerNorm`) are differentiated by
    `sam_lab.layer_norm` in graph mode, in whichever network they stand.

    Attributes:
        hvps: Hessian-vector products so far; one is one pass over all the data.

    Raises:
        TypeError, ValueError: on construction, if an argument is not as described; in use, if
            the loss is no real scalar or depends on none of the parameters.
        FloatingPointError: in use, if the loss, its gradient or a product is not finite.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> H = Hessian(lambda: 3 * w[0] ** 2 + w[1] ** 2, [w])
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([6., 2.])
    """

    def __init__(
        self,
        closure: Closure | Batches,
        params: Iterable[Tensor],
        model: nn.Module | None = None,
        mode: str = "auto",
    ) -> None:
        if mode not in ("auto", "graph", "forward"):
            raise ValueError(f'mode must be "auto", "graph" or "forward", got {mode!r}')
        self._objective = Objective(closure, params, model)
        self.params = self._objective.params
        self.model = model
        self.hvps = 0
        self._point: _Point | None = None
        obstacle = self._objective.obstacle()
        if mode == "forward" and obstacle:
            raise ValueError(f'mode="forward" is not possible: {obstacle}, or use mode="graph"')
        self._choose = mode == "auto"
        if self._choose:
            # One batch: the kept graph wins. Gradients a product, on one CPU thread: kept graph
            # 1.4 to 2.3 (4.3 through layer norm alone), graph built anew 2.0 to 3.5 (6.8), forward
            # 1.7 to 4.8 (14): benchmarks/curvature.py and, by layer, benchmarks/layers.py. With
            # several batches no graph can be kept; on a GPU forward mode is then reported to take
            # the same time and two thirds of the memory (curvlinops pull request 201; we have
            # not measured it).
            several = not self._objective.single and self.device.type != "cpu"
            mode = "forward" if several and not obstacle else "graph"
        self.mode = mode

    @classmethod
    def over(
        cls,
        batches: Iterable[Any],
        loss_fn: Callable[..., Tensor],
        params: Iterable[Tensor],
        model: nn.Module | None = None,
        mode: str = "auto",
    ) -> Hessian:
        """The Hessian of the mean loss over a data set that comes in batches.

        Args:
            batches: a list of batches or a DataLoader; read once for every product. A batch is a
                tensor or a tuple of tensors, and its size is the length of the first one.
            loss_fn: `loss_fn(*batch)` returns the mean loss of the batch. Batches are weighted by
                their sizes, so that a short last batch counts for what it is.
            params, model, mode: as for `Hessian`.
        """
        return cls(Batches(batches, loss_fn), params, model, mode)

    # ------------------------------------------------------------------ the operator

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P) for P parameters."""
        return self._objective.size, self._objective.size

    @property
    def _wide(self) -> torch.dtype:
        """The dtype of vectors: that of the parameters, but no less than float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of all vectors."""
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and of all vectors."""
        return self.params[0].device

    def __repr__(self) -> str:
        name, size = type(self).__name__, self.shape[0]
        return f"{name}({size} parameters, {self.dtype}, {self.mode}, hvps={self.hvps})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for a vector (P,), or H V for the m columns of (P, m): m products.

        In the dtype of the parameters; with parameters of half precision v may be float32, as
        eigenvectors then are, and so is the product.
        """
        size = self.shape[0]
        if not isinstance(v, Tensor):
            raise TypeError(f"H @ v needs a tensor of shape ({size},), got {type(v).__name__}")
        if v.ndim not in (1, 2) or len(v) != size:
            raise ValueError(
                f"H @ v needs shape ({size},) or ({size}, m), one row a parameter; "
                f"got {tuple(v.shape)}"
            )
        if v.dtype not in (self.dtype, self._wide) or v.device != self.device:
            raise ValueError(
                f"H @ v needs {self.dtype} on {self.device}, as the parameters are; "
                f"got {v.dtype} on {v.device}"
            )
        rows = v.detach().reshape(size, -1).T
        return self._apply(rows).T.reshape(v.shape)

    def loss(self) -> float:
        """The loss at the current parameters."""
        return self._evaluate().loss

    def gradient(self) -> Tensor:
        """The gradient at the current parameters, flat (P,)."""
        return self._evaluate().gradient.clone()

    def position(self) -> Tensor:
        """The current parameters, flat (P,), as a copy."""
        return self._objective.flatten([p.detach() for p in self.params])

    def reset(self) -> None:
        """Forget what was kept: to be called when data that the closure reads have changed."""
        self._point = None

    # ------------------------------------------------------------------ the spectrum

    def top(
        self,
        k: int = 1,
        tol: float = 1e-2,
        seed: int = 0,
        max_hvps: int = 200,
        start: Tensor | None = None,
    ) -> Eigenpairs:
        """The k algebraically largest eigenvalues and their eigenvectors.

        From a random start: Lanczos with full reorthogonalization, until the residual of each
        wanted pair is at most `tol * |theta_1|`. The error of an eigenvalue is as a rule much
        smaller, of the order of residual^2 / gap. Memory: one vector a product.

        From `start`: LOBPCG; where that does not converge, Lanczos follows.

        Args:
            k: number of eigenvalues, between 1 and P.
            tol: tolerance on residuals, relative to the largest eigenvalue.
            seed: seed of the random start.
            max_hvps: most products to spend in all.
            start: (P, m) columns near the wanted eigenvectors, such as `pairs.block` of the step
                before; columns beyond k serve as guards.

        Returns:
            `Eigenpairs`. Where `max_hvps` did not suffice, `converged` is False and a
            `ConvergenceWarning` is issued.
        """
        k = check_integer("k", k, 1, self.shape[0])
        tol = check_positive("tol", tol)
        max_hvps = check_integer("max_hvps", max_hvps, k)
        draw = self._draw(seed)
        before = self.hvps
        rows = None if start is None else self._checked_start(start)
        with self._session():
            if rows is not None and max(k, len(rows)) <= max_hvps // 2:
                ritz = lobpcg(self._apply, draw, rows, k, tol, max_hvps // 2)
                if ritz.converged:
                    return self._pairs(ritz, k, before)
            left = max_hvps - (self.hvps - before)
            ritz = lanczos_top(self._apply, draw, k, tol, left)
        if not ritz.converged:
            worst = float(ritz.residuals[:k].max()) / (scale(ritz.values, self._wide) or 1.0)
            _warn(
                f"top({k=}, {tol=}) stopped after {self.hvps - before} HVPs at a relative residual "
                f"of {worst:.1e}; raise max_hvps or tol"
            )
        return self._pairs(ritz, k, before)

    def trace(
        self, tol: float = 0.1, seed: int = 0, max_hvps: int = 1000, min_hvps: int = 16
    ) -> TraceEstimate:
        """Hutchinson's estimate of the trace: the mean of v.Hv over vectors v of random signs.

        Sampling ends when the standard error of the mean is at most `tol * |mean|`, and not
        before `min_hvps` samples, since a few of them do not show their own spread. Near the
        initialization of a network the trace is small beside that spread: expect hundreds.

        Args:
            tol: standard error wanted, relative to the estimate.
            seed: seed of the random signs.
            max_hvps, min_hvps: most and least samples.

        Returns:
            `TraceEstimate`; with a `ConvergenceWarning` where `max_hvps` did not suffice.
        """
        tol = check_positive("tol", tol)
        min_hvps = check_integer("min_hvps", min_hvps, 2)
        max_hvps = check_integer("max_hvps", max_hvps, min_hvps)
        generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
        samples: list[float] = []
        converged = False
        with self._session():
            while not converged and len(samples) < max_hvps:
                # a few vectors together share one reading of the data
                shape = min(4, max_hvps - len(samples)), self.shape[0]
                bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
                signs = (2 * bits - 1).to(device=self.device, dtype=self._wide)
                for v, image in zip(signs, self._apply(signs), strict=True):
                    samples.append(float(inner(v[None], image[None])))
                value = float(np.mean(samples))
                stderr = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
                converged = len(samples) >= min_hvps and stderr <= tol * abs(value)
        if not converged:
            _warn(
                f"trace({tol=}) stopped after {len(samples)} HVPs at {value:.3g} +- {stderr:.2g}; "
                "raise max_hvps or tol"
            )
        return TraceEstimate(value, stderr, len(samples), converged)

    def trace_of(
        self,
        function: Callable[[Tensor], Tensor],
        probes: int = 8,
        steps: int = 40,
        deflate: int = 4,
        tol: float = 1e-3,
        seed: int = 0,
    ) -> TraceEstimate:
        """The trace of a function of the Hessian: the sum of f(eigenvalue) over all eigenvalues.

        The largest eigenvalues are found by `top` and enter exactly. What is left is estimated by
        stochastic Lanczos quadrature: on each Gaussian vector orthogonal to their eigenvectors, a
        Lanczos run gives the Gauss quadrature of f for the spectrum as that vector sees it. So an f
        that is steep at the top, as a resolvent is, does not spoil the estimate.

        Args:
            function: f, elementwise on a float64 tensor; it is evaluated within the spectrum alone.
            probes: random vectors, at least 2 for the standard error.
            steps: most Lanczos steps a vector.
            deflate: eigenvalues that enter exactly; fewer where the network has fewer parameters.
            tol: tolerance of `top` on their residuals.
            seed: of all random vectors.

        Returns:
            `TraceEstimate`. Its standard error is that of the probes, without the error of the
            quadrature; `converged` is that of `top`.

        Source: Ubaru, Chen & Saad 2017, *Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature*.
        """
        probes = check_integer("probes", probes, 2)
        steps = check_integer("steps", steps, 1)
        deflate = check_integer("deflate", deflate, 1)
        before = self.hvps
        pairs = self.top(min(deflate, self.shape[0]), tol=tol, seed=seed)
        exact = float(function(pairs.values).sum())
        known = pairs.vectors.T.contiguous()
        draw = self._draw(seed + 1)

        def outside(rows: Tensor) -> Tensor:
            return rows - inner(rows, known).to(rows) @ known

        def within(rows: Tensor) -> Tensor:
            return outside(self._apply(rows))

        samples: list[float] = []
        if len(known) < self.shape[0]:
            with self._session():
                for _ in range(probes):
                    start = outside(draw(1))
                    for krylov in lanczos(within, lambda _, start=start: start):  # type: ignore[misc]
                        if krylov.closed or len(krylov.alpha) == steps:
                            break
                    nodes, vectors = krylov.eigen()
                    size = float(inner(start, start))
                    samples.append(size * float(function(nodes) @ vectors[0] ** 2))
        else:
            samples = [0.0] * probes
        stderr = float(np.std(samples, ddof=1)) / math.sqrt(probes)
        value = exact + float(np.mean(samples))
        return TraceEstimate(value, stderr, self.hvps - before, pairs.converged)

    def density(
        self,
        steps: int = 60,
        probes: int = 8,
        sigma: float | None = None,
        grid: Tensor | None = None,
        points: int = 1000,
        seed: int = 0,
    ) -> SpectralDensity:
        """The density of the eigenvalues, by stochastic Lanczos quadrature.

        A Lanczos run from a random unit vector gives nodes (the Ritz values) and weights (the
        squared first components of the small eigenvectors) of the Gauss quadrature for the
        spectrum as that vector sees it; the mean over vectors estimates the density. Each node is
        smeared with a Gaussian.

        Args:
            steps: Lanczos steps a vector; more resolve finer detail.
            probes: random vectors, at least 2 for the error bars.
            sigma: width of the Gaussian; by default 1% of the range of the nodes.
            grid: (points,) where to evaluate; by default the range of the nodes and 6 sigma
                beyond, over which the density integrates to 1.
            points: least size of the default grid.
            seed: seed of the random vectors.

        Source: Ghorbani, Krishnan & Xiao 2019 (arXiv:1901.10159).
        """
        steps = check_integer("steps", steps, 1)
        probes = check_integer("probes", probes, 2)
        points = check_integer("points", points, 2)
        draw = self._draw(seed)
        before = self.hvps
        measures = []
        with self._session():
            for _ in range(probes):
                for krylov in lanczos(self._apply, draw):
                    if krylov.closed or len(krylov.alpha) == steps:
                        nodes, vectors = krylov.eigen()
                        measures.append((nodes, vectors[0] ** 2))
                        break
        low = min(float(nodes[-1]) for nodes, _ in measures)
        high = max(float(nodes[0]) for nodes, _ in measures)
        if sigma is None:
            size = max(abs(low), abs(high))
            # a spectrum of one point has no range but rounding
            sigma = 0.01 * (high - low if high - low > 1e-6 * size else size or 1.0)
        sigma = check_positive("sigma", sigma)
        if grid is None:
            # at least one point a sigma: the trapezoidal rule then integrates Gaussians exactly
            points = max(points, math.ceil((high - low) / sigma) + 13)
            axis = torch.linspace(low - 6 * sigma, high + 6 * sigma, points, dtype=torch.float64)
        else:
            axis = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        curves = [
            torch.exp(-(((axis[:, None] - nodes) / sigma) ** 2) / 2) @ weights
            for nodes, weights in measures
        ]
        densities = torch.stack(curves) / (sigma * math.sqrt(2 * math.pi))
        stderr = densities.std(0) / math.sqrt(probes)
        return SpectralDensity(axis, densities.mean(0), stderr, sigma, self.hvps - before)

    # ------------------------------------------------------------------ products

    def _apply(self, rows: Tensor) -> Tensor:
        """H times each row of (m, P), as rows (m, P) of the same dtype."""
        wide, rows = rows.dtype, rows.to(self.dtype)
        if self.mode == "forward":
            try:
                out = self._forward_products(rows)
            except (NotImplementedError, ValueError):
                # an operation without forward derivative, or parameters read past the model
                if not self._choose:
                    raise
                self.mode = "graph"
        if self.mode == "graph":
            out = self._graph_products(rows)
        self.hvps += len(rows)
        out = out.to(wide)
        if not bool(torch.isfinite(out).all()):
            raise FloatingPointError(
                "a Hessian-vector product is not finite: neither is the vector, or the loss has "
                "no finite second derivative at the current parameters"
            )
        return out

    def _graph_products(self, rows: Tensor) -> Tensor:
        """Backward through the graph of gradient . v; the vectors share the graph of a batch."""
        if self._objective.single:
            graph = self._evaluate(graph=True).graph
            with self._objective.undisturbed():
                return self._second_backward(graph, rows, keep=True)
        out, total = torch.zeros_like(rows), 0
        with self._objective.undisturbed() as batches:
            for size, closure in batches:
                *_, graph = self._differentiate(closure, graph=True)
                out += size * self._second_backward(graph, rows, keep=False)
                total += size
        return out / total

    def _differentiate(self, closure: Closure, graph: bool) -> tuple[float, Gradient, Any]:
        """Loss and gradient of a batch; and where asked for what `_second_backward` needs."""
        value, gradient = self._objective.differentiate(closure, create_graph=graph)
        return value, gradient, gradient

    def _second_backward(self, graph: Any, rows: Tensor, keep: bool) -> Tensor:
        """The derivative of gradient . v for every row v."""
        # an entry without a graph of its own comes from a loss linear in that parameter
        curved = [(i, g) for i, g in enumerate(graph) if g is not None and g.requires_grad]
        out = torch.zeros_like(rows)
        if not curved:
            return out
        for j, row in enumerate(rows):
            pieces = self._objective.unflatten(row)
            second = torch.autograd.grad(
                [g for _, g in curved],
                self.params,
                [pieces[i] for i, _ in curved],
                retain_graph=keep or j + 1 < len(rows),
                allow_unused=True,
            )
            out[j] = self._objective.flatten(second)
        return out

    def _forward_products(self, rows: Tensor) -> Tensor:
        """Forward over reverse: the tangent of the gradient as the parameters move along v."""
        out, total = torch.zeros_like(rows), 0
        for j, row in enumerate(rows):
            total = 0
            with self._objective.undisturbed() as batches:
                for size, closure in batches:
                    out[j] += size * self._tangent(closure, row)
                    total += size
        return out / total

    def _tangent(self, closure: Closure, row: Tensor) -> Tensor:
        leaves = [p.detach().requires_grad_() for p in self.params]
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, leaves, self._objective.unflatten(row))
            loss = self._objective.replaced(closure, duals)
            check_loss(loss)
            grads = torch.autograd.grad(
                loss.reshape(()), [*leaves, *self.params], allow_unused=True
            )
            self._check_reached(grads[len(leaves) :])
            return self._objective.flatten(
                [None if g is None else forward_ad.unpack_dual(g).tangent for g in grads]
            )

    @staticmethod
    def _check_reached(grads: Gradient) -> None:
        """`grads`: of the parameters that stayed where they were."""
        if any(g is not None for g in grads):
            raise ValueError(
                'mode="forward" needs a closure that reaches the parameters through the model '
                'alone, and this one also reads them directly; use mode="graph"'
            )

    def _evaluate(self, graph: bool = False) -> _Point:
        """Loss and gradient at the current parameters, with the gradient's graph if asked."""
        point, versions = self._point, self._objective.versions()
        if (
            point is not None
            and point.versions == versions
            and (point.graph is not None or not graph)
            # writing through `p.data` changes values without a trace in the version counter
            and all(torch.equal(p, q) for p, q in zip(self.params, point.values, strict=True))
        ):
            return point
        self._point = point = None  # free the old graph before a new one is built
        keep = self._objective.single and self.mode == "graph"
        loss, flat, total = 0.0, torch.zeros((), dtype=self.dtype, device=self.device), 0
        with self._objective.undisturbed() as batches:
            for size, closure in batches:
                value, gradient, made = self._differentiate(closure, graph=keep)
                loss += size * value
                flat = flat + size * self._objective.flatten([_detached(g) for g in gradient])
                total += size
        values = [p.detach().clone() for p in self.params]
        kept = made if keep else None
        self._point = _Point(self._objective.versions(), values, loss / total, flat / total, kept)
        return self._point

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Many products at one point: begin afresh; do not hold the graph's memory afterwards."""
        self.reset()
        try:
            # the arithmetic between products is ours, whatever mode the caller is in
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            if self._point is not None:
                self._point.graph = None

    # ------------------------------------------------------------------ small helpers

    def _draw(self, seed: int) -> Callable[[int], Tensor]:
        """A source of Gaussian rows, the same on every device."""
        generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
        size, dtype, device = self.shape[0], self._wide, self.device
        return lambda m: torch.randn(m, size, generator=generator).to(device=device, dtype=dtype)

    def _checked_start(self, start: Tensor) -> Tensor:
        size = self.shape[0]
        if not isinstance(start, Tensor) or start.ndim != 2 or len(start) != size:
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"start must be a tensor of shape ({size}, m), got {got}")
        if not bool(torch.isfinite(start).all()):
            raise ValueError("start must be finite")
        return start.detach().to(device=self.device, dtype=self._wide).T.contiguous()

    def _pairs(self, ritz: Ritz, k: int, before: int) -> Eigenpairs:
        values, rows, residuals, converged, ahead = ritz
        spent = self.hvps - before
        return Eigenpairs(values[:k], rows[:k].T, residuals[:k], spent, converged, rows.T, ahead.T)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _warn(message: str) -> None:
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
