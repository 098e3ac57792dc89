r"""Small runs side by side: a stack of networks that takes each step as one program.

A grid of small runs (seeds, learning rates, radii) spends most of its time on calling torch, not on
arithmetic. `Stack` makes the calls once for all of them. Every run keeps its own weights, learning
rate, momentum and radius, and SAM's norm is that of each run by itself: one norm over all would
couple the runs, and nothing would fail.

The smaller the networks and batches, and the more the runs, the more it saves; where arithmetic
fills the processor it saves nothing. ``python -m benchmarks stack`` measures it, and the book's
page on SAM in practice shows one such table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from sam_lab._checks import check_nonnegative
from sam_lab.perturbations import usable

__all__ = ["Stack"]

Loss = Callable[..., Tensor]
Weights = dict[str, Tensor]
"""Name -> the tensors of all runs, of shape (runs, ...)."""


class Stack:
    r"""Networks of one architecture, trained side by side by SGD with momentum and by SAM.

    Run $r$ goes, as it would by `torch.optim.SGD` alone or with `sam_lab.SAM` around it,

    $$v_r \leftarrow \mu_r v_r + \nabla L(w_r + \rho_r\, g_r / \|g_r\|), \qquad
      w_r \leftarrow w_r - \eta_r v_r,$$

    equal to the single run to rounding. A run whose gradient is not finite rests at that step, and
    the others go on. As soon as one radius is above 0, a step takes two passes for all runs.

    Args:
        models: the networks, one a run, which differ in their weights alone. They are copied.
        loss: ``loss(forward, *batch)``, the mean loss of one run, where `forward` is its network:
            ``lambda forward, x, y: cross_entropy(forward(x), y)``. `torch.func` traces it: no
            ``.item()``, and no choice that depends on a value.
        lr, rho, momentum: one number for all runs, or one a run.

    Attributes:
        weights: name of a trained parameter -> those of all runs, of shape (runs, ...).

    Raises:
        TypeError: an entry of `models` is no module.
        ValueError: no network, or nothing to train; networks whose parameters have other names or
            shapes; a norm layer that keeps running statistics, which a traced network cannot write;
            a learning rate, radius or momentum that is negative, or not one a run.

    Example:
        >>> from sam_lab import models
        >>> nets = [models.mlp([2, 4, 1], seed=seed) for seed in range(3)]
        >>> stack = Stack(nets, lambda f, x: f(x).square().mean(), lr=0.1, rho=[0, 0.05, 0.1])
        >>> stack.step(torch.ones(5, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        loss: Loss,
        lr: float | Sequence[float],
        rho: float | Sequence[float] = 0.0,
        momentum: float | Sequence[float] = 0.0,
    ) -> None:
        models = list(models)
        _check_alike(models)
        self._models, self._loss = copy.deepcopy(models), loss
        named = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
        stacked = {name: torch.stack([m[name].detach() for m in named]) for name in named[0]}
        trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
        self.weights: Weights = {name: t for name, t in stacked.items() if name in trained}
        self._fixed: Weights = {name: t for name, t in stacked.items() if name not in trained}
        if not self.weights:
            raise ValueError("the networks have no parameters that require grad")
        self._velocity = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self._lr, self._rho, self._momentum = (
            self._one_a_run(*setting)
            for setting in (("lr", lr), ("rho", rho), ("momentum", momentum))
        )
        self._perturbs = bool(self._rho.any())

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._models)

    def step(self, *batch: Tensor, own: bool = False) -> Tensor:
        """One step of all runs.

        Args:
            batch: what `loss` takes after the network; the same for all runs.
            own: each run has a batch of its own instead: tensors of shape (runs, ...).

        Returns:
            The losses before the step, at the weights that are not perturbed; (runs,).

        Raises:
            ValueError: own batches that are not one a run.
        """
        gradient, losses = self._gradient(self.weights, batch, own)
        with torch.no_grad():
            if self._perturbs:
                length = _lengths(gradient)
                factor = torch.where(usable(length), self._rho / length, 0)
                perturbed = {
                    name: w + _spread(factor, w) * gradient[name]
                    for name, w in self.weights.items()
                }
                gradient, _ = self._gradient(perturbed, batch, own)
            finite = torch.isfinite(_lengths(gradient))
            for name, w in self.weights.items():
                v = self._velocity[name]
                goes, momentum, lr = (_spread(s, w) for s in (finite, self._momentum, self._lr))
                v.copy_(torch.where(goes, momentum * v + gradient[name], v))
                w.sub_(torch.where(goes, lr * v, 0))
        return losses

    def losses(self, *batch: Tensor, own: bool = False) -> Tensor:
        """The losses of all runs, (runs,), without a step; as for `step`."""
        with torch.no_grad():
            losses: Tensor = self._of_all(self._loss_of, batch, own)(self.weights, *batch)
        return losses

    def models(self) -> Iterator[nn.Module]:
        """Copies of the networks as they are now, one a run."""
        for run, model in enumerate(self._models):
            now = copy.deepcopy(model)
            for name, p in now.named_parameters():
                if name in self.weights:
                    p.data.copy_(self.weights[name][run])
            yield now

    # --- one run, and all of them -----------------------------------------------------------------

    def _loss_of(self, weights: Weights, fixed: Weights, *batch: Tensor) -> Tensor:
        def forward(*inputs: Any, **options: Any) -> Any:
            return functional_call(self._models[0], {**weights, **fixed}, inputs, options)

        return self._loss(forward, *batch)

    def _gradient(
        self, weights: Weights, batch: Sequence[Tensor], own: bool
    ) -> tuple[Weights, Tensor]:
        found: tuple[Weights, Tensor] = self._of_all(grad_and_value(self._loss_of), batch, own)(
            weights, *batch
        )
        return found

    def _of_all(
        self, function: Callable[..., Any], batch: Sequence[Tensor], own: bool
    ) -> Callable[..., Any]:
        """The function of one run's weights and batch, as one of all runs'."""
        if own and any(t.ndim == 0 or len(t) != len(self) for t in batch):
            shapes = [tuple(t.shape) for t in batch]
            raise ValueError(
                f"own batches need tensors of shape ({len(self)}, ...), one entry a run; got "
                f"{shapes}"
            )
        axes = (0, 0, *[0 if own else None for _ in batch])
        mapped = vmap(function, in_dims=axes, randomness="different")
        return lambda weights, *rest: mapped(weights, self._fixed, *rest)

    def _one_a_run(self, name: str, value: float | Sequence[float]) -> Tensor:
        values = list(value) if isinstance(value, Sequence | Tensor) else [value] * len(self)
        if len(values) != len(self):
            raise ValueError(
                f"{name} must be one number, or one for each of the {len(self)} runs, got "
                f"{len(values)}"
            )
        numbers = [check_nonnegative(name, number) for number in values]
        like = next(iter(self.weights.values()))
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def _lengths(tensors: Weights) -> Tensor:
    """The Euclidean norm over all tensors, of each run by itself; (runs,)."""
    norms = [torch.linalg.vector_norm(t.reshape(len(t), -1), dim=1) for t in tensors.values()]
    lengths: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return lengths


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One value a run, (runs,), in a shape that multiplies (runs, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _check_alike(models: Sequence[Any]) -> None:
    if not models:
        raise ValueError("models must hold at least one network, got none")
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch.nn.Modules, got {type(model).__name__}")
        for name, module in model.named_modules():
            if getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"the layer {name!r} keeps running statistics, which a stack cannot write: "
                    "build it with track_running_stats=False, or take another norm"
                )
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in models]
    for run, own in enumerate(shapes):
        if own != shapes[0]:
            raise ValueError(
                f"all networks must have the parameters of the first, and network {run} has others"
            )
