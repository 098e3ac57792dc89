r"""The Gauss-Newton matrix of a loss, as a linear operator.

A network f with Jacobian J and a loss $\ell(f(w))$ has the Hessian

$$H = J^\top \nabla^2\ell\, J + \sum_i \frac{\partial \ell}{\partial f_i} \nabla^2 f_i .$$

The first part is the (generalised) Gauss-Newton matrix (Schraudolph 2002, *Fast curvature
matrix-vector products for second-order gradient descent*). It is the Hessian of the loss of the
network's linearisation at the current parameters. Where the loss is convex in the outputs, as
squared error and cross-entropy are, it has no negative eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sam_lab._checks import check_loss
from sam_lab.curvature import Hessian
from sam_lab.objective import Batches, Closure, Gradient

__all__ = ["GaussNewton"]


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
