r"""The Gauss-Newton matrix of a loss, as a linear operator.

A network f with Jacobian J and a loss $\ell(f(w))$ has the Hessian

$$H = J^\top \nabla^2\ell\, J + \sum_i \frac{\partial \ell}{\partial f_i} \nabla^2 f_i .$$

The first part is the (generalised) Gauss-Newton matrix (Schraudolph 2002, *Fast curvature
matrix-vector products for second-order gradient descent*). It is the Hessian of the loss of the
network's linearisation at the current parameters. Where the loss is convex in the outputs, as
squared error and cross-entropy are, it has no negative eigenvalue.

With minibatches its whole spectrum matters, and not the largest eigenvalue alone: `noise_kernel` is
`stability.noise_kernel_norm` of a network too large for its Jacobian. Where the rows of `jacobian`,
one an example, do fit into memory, their singular values squared over the number of examples are
the eigenvalues themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sam_lab._checks import check_loss
from sam_lab.curvature import Hessian, TraceEstimate
from sam_lab.objective import Batches, Closure, Gradient
from sam_lab.stability import noise_kernel_norm

__all__ = ["GaussNewton", "input_gradient_bound", "jacobian", "noise_alignment", "noise_kernel"]


class GaussNewton(Hessian):
    """J^T (the loss's Hessian in the outputs) J, with all that `Hessian` has.

    `loss()` and `gradient()` are those of the loss itself, which the linearisation shares.

    Args:
        outputs: evaluates the network at the current parameters and returns its outputs, one
            tensor of any shape.
        loss_fn: `loss_fn(outputs)` returns the loss, a scalar tensor. What it reads of the
            parameters by itself, such as weight decay, is not seen.
        params, model: as for `Hessian`.
        mode: as for `Hessian`. "graph" keeps the graph of J^T y as a function of y, whose
            derivative is J; "forward" takes the tangent of the outputs.

    Raises:
        TypeError, ValueError, FloatingPointError: as `Hessian`; TypeError also where `outputs`
            does not return one tensor.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> G = GaussNewton(lambda: w[0] * w[1:], lambda f: f.square().sum() / 2, [w])
        >>> G @ torch.tensor([1.0, 0.0])
        tensor([4., 2.])
    """

    def __init__(
        self,
        outputs: Closure,
        loss_fn: Callable[[Tensor], Tensor],
        params: Iterable[Tensor],
        model: nn.Module | None = None,
        mode: str = "auto",
    ) -> None:
        self._build(_Composed(outputs, loss_fn), None, params, model, mode)

    @classmethod
    def over(  # type: ignore[override]  # a network and a loss, where the Hessian takes one function
        cls,
        batches: Iterable[Any],
        outputs: Callable[..., Tensor],
        loss_fn: Callable[..., Tensor],
        params: Iterable[Tensor],
        model: nn.Module | None = None,
        mode: str = "auto",
    ) -> GaussNewton:
        """That of the mean loss over a data set that comes in batches.

        Args:
            batches: as for `Hessian.over`.
            outputs: `outputs(*batch)` returns the network's outputs.
            loss_fn: `loss_fn(outputs, *batch)` returns the mean loss of the batch.
            params, model, mode: as for `Hessian`.
        """
        self = cls.__new__(cls)
        self._build(_Composed(outputs, loss_fn), batches, params, model, mode)
        return self

    def _build(
        self,
        composed: _Composed,
        batches: Iterable[Any] | None,
        params: Iterable[Tensor],
        model: nn.Module | None,
        mode: str,
    ) -> None:
        self._composed = composed
        closure = composed if batches is None else Batches(batches, composed)
        super().__init__(closure, params, model, mode)

    def _differentiate(self, closure: Closure, graph: bool) -> tuple[float, Gradient, Any]:
        if not graph:
            done = super()._differentiate(closure, graph=False)
            self._composed.taken()
            return done
        value, gradient = self._objective.differentiate(closure, retain_graph=True)
        outputs, loss = self._composed.taken()
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        probe = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(
            outputs, self.params, probe, create_graph=True, allow_unused=True
        )
        return value, gradient, (outputs, slope, probe, back)

    def _second_backward(self, graph: Any, rows: Tensor, keep: bool) -> Tensor:
        outputs, slope, probe, back = graph
        used = [(i, b) for i, b in enumerate(back) if b is not None]
        out = torch.zeros_like(rows)
        if not slope.requires_grad:  # a loss that is linear in the outputs
            return out
        for j, row in enumerate(rows):
            pieces = self._objective.unflatten(row)
            (moved,) = torch.autograd.grad(
                [b for _, b in used], probe, [pieces[i] for i, _ in used], retain_graph=True
            )
            (bent,) = torch.autograd.grad(slope, outputs, moved, retain_graph=True)
            last = not keep and j + 1 == len(rows)
            out[j] = self._objective.flatten(
                torch.autograd.grad(
                    outputs, self.params, bent, retain_graph=not last, allow_unused=True
                )
            )
        return out

    def _tangent(self, closure: Closure, row: Tensor) -> Tensor:
        leaves = [p.detach().requires_grad_() for p in self.params]
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, leaves, self._objective.unflatten(row))
            check_loss(self._objective.replaced(closure, duals))
            outputs, loss = self._composed.taken()
            (slope,) = torch.autograd.grad(loss, outputs, retain_graph=True)
            bent = forward_ad.unpack_dual(slope).tangent
        # outside the level, so that the transpose is applied to values alone
        if bent is None:  # a loss that is linear in the outputs
            return torch.zeros_like(row)
        grads = torch.autograd.grad(outputs, [*leaves, *self.params], bent, allow_unused=True)
        self._check_reached(grads[len(leaves) :])
        return self._objective.flatten(grads[: len(leaves)])


def noise_kernel(
    matrix: Hessian,
    lr: float,
    batch: int,
    examples: int,
    *,
    probes: int = 8,
    steps: int = 40,
    seed: int = 0,
) -> TraceEstimate:
    """`stability.noise_kernel_norm` of SGD, by products with the Gauss-Newton matrix alone.

    Cost: about `probes * steps` products and those of the few largest eigenvalues, which enter
    exactly.

    Args:
        matrix: `GaussNewton` of half the mean squared error of a network with one output.
        lr, batch, examples: as there.
        probes, steps, seed: as for `Hessian.trace_of`.

    Returns:
        `TraceEstimate`; infinite where lr times the largest eigenvalue is 2 or more.

    Raises:
        TypeError, ValueError: as `noise_kernel_norm` and `Hessian.trace_of`.

    Source: Agarwala & Pennington 2024 (arXiv:2404.19261), for the norm; see `noise_kernel_norm`.
    """

    def summand(values: Tensor) -> Tensor:
        terms = [noise_kernel_norm(max(v, 0.0), lr, batch, examples) for v in values.tolist()]
        return torch.tensor(terms, dtype=torch.float64)

    top = matrix.top(tol=1e-3, seed=seed)
    if math.isinf(float(summand(top.values)[0])):
        return TraceEstimate(math.inf, 0.0, top.hvps, top.converged)
    found = matrix.trace_of(summand, probes=probes, steps=steps, seed=seed)
    return TraceEstimate(found.value, found.stderr, found.hvps + top.hvps, found.converged)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Gradients of a network's one output in its parameters, (D, P): one row an example.

    Args:
        model: maps (D, ...) to D outputs, (D,) or (D, 1), each of its own example alone.
        x: the examples, (D, ...).

    Raises:
        ValueError: another number of outputs.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}

    def output(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, weights, (one[None],))
        if outputs.numel() != 1:
            raise ValueError(
                f"model must have one output an example, got shape {tuple(outputs.shape)}"
            )
        return outputs.reshape(())

    rows = torch.func.vmap(torch.func.grad(output), (None, 0))(params, x)
    return torch.cat([rows[name].flatten(1) for name in params], 1)


def noise_alignment(rows: Tensor, residuals: Tensor) -> float:
    r"""Alignment mu of the gradient noise with the curvature, tr(Sigma G) / (2 L |G|_F^2).

    $G = J^\top J / D$ is the Gauss-Newton matrix, $\Sigma$ the covariance of the gradients
    $r_i J_i$ of single examples, and $L = \sum_i r_i^2 / 2D$. For a noise of the same size without
    a direction it would be about $\operatorname{tr}(\Sigma) \operatorname{tr}(G) / P$ in the
    numerator; for `stability.alignment_bound` it is what counts.

    Args:
        rows: J, (D, P), as `jacobian` gives them.
        residuals: r, (D,), not all zero.

    Raises:
        ValueError: other shapes, or all residuals, or all rows, are zero.

    Source: Wu, Wang & Su 2022 (arXiv:2207.02628), for the idea; for the exact form that is meant
    see `stability.alignment_bound`.
    """
    if rows.ndim != 2 or residuals.shape != rows.shape[:1]:
        raise ValueError(
            "rows must be (D, P) and residuals (D,), got "
            f"{tuple(rows.shape)} and {tuple(residuals.shape)}"
        )
    kernel = (rows @ rows.T).double() / len(rows)
    squares = residuals.double() ** 2
    size = float(squares.mean() * kernel.square().sum())
    if not size > 0:
        raise ValueError("residuals and rows must not all be zero")
    # J_i G J_i = D (K^2)_ii, and g G g with g = J r / D is r K K r / D
    scattered = squares @ kernel.square().sum(1)
    common = (kernel @ residuals.double()).square().sum() / len(rows)
    return float((scattered - common) / size)


def input_gradient_bound(weight: Tensor, slopes: Tensor, x: Tensor) -> Tensor:
    r"""Bound on the gradients of a network's one output in its inputs, through its first layer.

    Where the network reads x through $z = Wx$ (and a bias) alone, the gradients of its output are
    $\nabla_x f = W^\top a$ and $\nabla_W f = a x^\top$, with a the gradient in z. Hence

    $$\|\nabla_x f\| \le \|W\|_2\, \|\nabla_W f\|_F / \|x\| .$$

    What bounds the gradients in the weights, as stability under SGD does for their mean square, the
    trace of the Gauss-Newton matrix, so bounds those in the inputs.

    Args:
        weight: W, (m, d).
        slopes: gradients of the output in W, one an example, (D, m, d).
        x: the inputs, (D, d), none of them zero.

    Returns:
        The bound, (D,).

    Raises:
        ValueError: shapes that do not fit, or an input of zeros.

    Source: after Ma & Ying 2021 (arXiv:2105.13462); this form is derived here.
    """
    if slopes.shape != (len(x), *weight.shape) or x.shape[1:] != weight.shape[1:]:
        raise ValueError(
            "weight must be (m, d), slopes (D, m, d) and x (D, d), got "
            f"{tuple(weight.shape)}, {tuple(slopes.shape)} and {tuple(x.shape)}"
        )
    lengths = torch.linalg.vector_norm(x, dim=1)
    if not bool((lengths > 0).all()):
        raise ValueError("x must hold no input of zeros")
    bound: Tensor = torch.linalg.matrix_norm(weight, 2) * torch.linalg.matrix_norm(slopes) / lengths
    return bound


class _Composed:
    """loss_fn(outputs(*batch), *batch), which holds on to its parts until they are taken."""

    def __init__(self, outputs: Callable[..., Tensor], loss_fn: Callable[..., Tensor]) -> None:
        for name, function in (("outputs", outputs), ("loss_fn", loss_fn)):
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        self._outputs, self._loss_fn = outputs, loss_fn
        self._parts: tuple[Tensor, Tensor] | None = None

    def __call__(self, *batch: Any) -> Tensor:
        outputs = self._outputs(*batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"outputs must return one tensor, got {type(outputs).__name__}")
        loss = self._loss_fn(outputs, *batch)
        self._parts = outputs, loss
        return loss

    def taken(self) -> tuple[Tensor, Tensor]:
        """Outputs and loss of the latest call."""
        assert self._parts is not None
        parts, self._parts = self._parts, None
        return parts
