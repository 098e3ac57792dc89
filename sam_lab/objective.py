r"""A loss as a deterministic function of its parameters, evaluated without a trace.

Curvature is measured in the middle of somebody's training run. Two things follow.

*The loss must be one function.* With dropout it would be another one at every evaluation, and its
Hessian not even symmetric. Each pass over the data therefore starts from the random state found
when the `Objective` was made: the loss is the one with that dropout mask, frozen.

*Nothing is disturbed.* Random state and `.grad`, and given the model its buffers and modes, are as
before after every pass, also after an exception.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_lab._checks import check_loss
from sam_lab.layer_norm import FastLayerNorm
from sam_lab.state import RandomState, undisturbed

__all__ = ["Batches", "Closure", "Gradient", "Objective"]

Closure = Callable[[], Tensor]
"""Evaluates the loss at the current values of the parameters and returns it, a scalar tensor; no
`backward` inside."""
Gradient = Sequence[Tensor | None]
"""One entry a parameter; None where the loss does not use it."""


class Objective:
    """The mean of a loss over its data, as a function of flat parameters.

    Args:
        closure: evaluates the loss at the current values of the parameters; or `Batches`.
        params: leaf tensors that require grad, of one dtype on one device.
        model: the module that is evaluated, whose buffers and modes are kept.

    Attributes:
        params, size, device: the parameters, how many numbers they hold, and where.
        single: whether the data come in one batch.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """

    def __init__(
        self, closure: Closure | Batches, params: Iterable[Tensor], model: nn.Module | None
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
        # a closure is the loss of the one batch of its data set, a batch of no tensors
        whole = closure if isinstance(closure, Batches) else Batches([()], closure, "closure")
        self._batches, self.single = whole, whole.single
        self.params = _checked_params(params)
        self.device = self.params[0].device
        self.model = model
        self._sizes = [p.numel() for p in self.params]
        self.size = sum(self._sizes)
        self._random = RandomState([self.device], self._batches.generators)

    def differentiate(
        self, closure: Closure, create_graph: bool = False, retain_graph: bool | None = None
    ) -> tuple[float, Gradient]:
        """Loss and gradient of one batch, checked."""
        # a graph is built to be differentiated again, whoever wrote the layers
        with FastLayerNorm() if create_graph else nullcontext():
            loss = closure()
        value = check_loss(loss)
        try:
            gradient = torch.autograd.grad(
                loss.reshape(()),
                self.params,
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "second time" in str(error):
                message = "the closure must return the loss without calling backward on it"
                raise ValueError(message) from error
            raise
        used = [g for g in gradient if g is not None]
        if not used:
            raise ValueError("the loss depends on none of the parameters in `params`")
        if not all(bool(torch.isfinite(g).all()) for g in used):
            raise FloatingPointError(f"the gradient is not finite (the loss is {value:g})")
        return value, gradient

    def replaced(self, closure: Closure, tensors: Iterable[Tensor]) -> Tensor:
        """The loss of one batch with these tensors in the places of the parameters.

        The closure reads its parameters from the model by itself; `functional_call` exchanges them
        there for the time of the call.
        """
        caller = _Caller(self.model, closure)
        names = {id(p): name for name, p in caller.named_parameters()}
        moved = {names[id(p)]: t for p, t in zip(self.params, tensors, strict=True)}
        loss: Tensor = torch.func.functional_call(caller, moved, ())
        return loss

    def obstacle(self) -> str:
        """Why `replaced` cannot be used, or an empty string where it can."""
        if self.model is None:
            return "the parameters are moved inside the model: give model=..."
        owned = {id(p) for p in self.model.parameters()}
        if not all(id(p) in owned for p in self.params):
            return "params must be parameters of the model"
        return ""

    @contextmanager
    def undisturbed(self) -> Iterator[Batches]:
        """One pass over the data inside, from the frozen random state; then all is as before."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            undisturbed(self.model, self.params, self._batches.generators),
            torch.autocast(self.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            _eager(),
        ):
            self._random.restore()
            yield self._batches

    def versions(self) -> tuple[int, ...]:
        """A key that changes when parameters, buffers or modes do, as far as torch counts it."""
        seen, modes = list(self.params), []
        if self.model is not None:
            seen += self.model.buffers()
            modes = [module.training for module in self.model.modules()]
        return (*map(id, seen), *(tensor._version for tensor in seen), *modes)

    def flatten(self, pieces: Gradient) -> Tensor:
        """One tensor a parameter (None for zeros), as one flat vector (P,)."""
        pairs = zip(self.params, pieces, strict=False)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for p, t in pairs])

    def unflatten(self, row: Tensor) -> list[Tensor]:
        """A flat vector (P,) in the shapes of the parameters."""
        pieces = row.split(self._sizes)
        return [piece.view_as(p) for p, piece in zip(self.params, pieces, strict=True)]


class Batches:
    """A data set as pairs (size, closure), one a batch, read anew in every pass.

    Args:
        batches: a list or DataLoader of tensors or tuples of tensors.
        loss_fn: `loss_fn(*batch)` returns the mean loss of the batch.
        name: what error messages call `loss_fn`.
    """

    def __init__(
        self, batches: Iterable[Any], loss_fn: Callable[..., Tensor], name: str = "loss_fn"
    ) -> None:
        if not callable(loss_fn):
            raise TypeError(f"{name} must be callable, got {type(loss_fn).__name__}")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be a list or DataLoader, got {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches must be readable more than once; an iterator is empty after the first "
                "product: pass a list or a DataLoader"
            )
        try:
            count = len(batches)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over an IterableDataset has no length
            count = -1
        if count == 0:
            raise ValueError("batches is empty")
        self.single = count == 1
        self.batches, self.loss_fn = batches, loss_fn
        owners = (batches, getattr(batches, "sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        self.generators = [g for g in generators if isinstance(g, torch.Generator)]

    def __iter__(self) -> Iterator[tuple[int, Closure]]:
        empty = True
        for i, batch in enumerate(self.batches):
            empty = False
            inputs = (batch,) if isinstance(batch, Tensor) else batch
            if not isinstance(inputs, tuple | list):
                raise TypeError(
                    f"batch {i} must be a tensor or a tuple of tensors, got {type(batch).__name__}"
                )
            size = len(inputs[0]) if inputs else 1
            if size == 0:
                raise ValueError(f"batch {i} has size 0")
            yield size, lambda inputs=inputs: self.loss_fn(*inputs)  # type: ignore[misc]
        if empty:
            raise ValueError("batches is empty")


class _Caller(nn.Module):
    """A closure as a module around its model, as `functional_call` wants it."""

    def __init__(self, model: nn.Module | None, closure: Closure) -> None:
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self) -> Tensor:
        return self.closure()


def _eager() -> AbstractContextManager[object]:
    """What `torch.compile` has made runs as it was written: compiled, it has no second derivative.

    Nothing can be compiled before torch's compiler is imported, which takes seconds.
    """
    if "torch._dynamo" in sys.modules:
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def _checked_params(params: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, Tensor):
        raise TypeError("params must be a list of tensors, got one tensor: pass [tensor]")
    params = list(params)
    if not params:
        raise ValueError("params is empty (an iterator such as model.parameters() serves once)")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] must be a tensor, got {type(p).__name__}")
        if not p.is_floating_point():
            raise ValueError(f"params[{i}] must be real floating point, got {p.dtype}")
        if not p.requires_grad:
            raise ValueError(
                f"params[{i}] does not require grad: "
                "pass [p for p in model.parameters() if p.requires_grad]"
            )
        if not p.is_leaf:
            raise ValueError(f"params[{i}] must be a leaf tensor, got the result of an operation")
        if p.numel() == 0:
            raise ValueError(f"params[{i}] has no entries: its shape is {tuple(p.shape)}")
        if (p.dtype, p.device) != (params[0].dtype, params[0].device):
            raise ValueError(
                f"params must share one dtype and device; params[0] is {params[0].dtype} on "
                f"{params[0].device}, params[{i}] is {p.dtype} on {p.device}"
            )
    if len({id(p) for p in params}) < len(params):
        raise ValueError("params holds the same tensor twice")
    return params
