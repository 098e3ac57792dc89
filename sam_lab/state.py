"""State that is kept, or taken up whole.

What a pass over the data changes besides gradients (random state, buffers, modes) is as it was
afterwards; the state of an optimizer is loaded entirely or not at all.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "RandomState",
    "check_state",
    "evaluating",
    "kept_buffers",
    "load_optimizer",
    "save_whole",
    "undisturbed",
    "whole_float32",
]


class RandomState:
    """The state of every generator that a closure may draw from, as it is now.

    Those are the global ones of torch (CPU, and of the given devices), Python and NumPy, and the
    given generators.
    """

    def __init__(
        self, devices: Iterable[torch.device] = (), generators: Iterable[torch.Generator] = ()
    ) -> None:
        self._states: list[tuple[Callable[[Any], Any], Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state(legacy=False)),
        ]
        self._states += [(g.set_state, g.get_state()) for g in generators]
        for device in devices:
            if device.type not in ("cpu", "meta"):
                self._states.append(_device_state(device))

    def restore(self) -> None:
        """Put the state back; any number of times."""
        for setter, state in self._states:
            setter(state)


def _device_state(device: torch.device) -> tuple[Callable[[Any], Any], Any]:
    module = torch.get_device_module(device)
    where = () if device.type == "mps" else (device,)
    return lambda state: module.set_rng_state(state, *where), module.get_rng_state(*where)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards each of its modules in its own again.

    ``model.train()`` would not do: it wakes batch norms that were frozen.
    """
    reset = _modes(model)
    try:
        model.eval()
        yield
    finally:
        reset()


def _modes(model: nn.Module | None) -> Callable[[], None]:
    """What gives each module the mode again that it has now."""
    modules = model.modules() if model is not None else ()
    modes = [(module, module.training) for module in modules]

    def reset() -> None:
        for module, training in modes:
            module.training = training

    return reset


@contextmanager
def kept_buffers(model: nn.Module | None) -> Iterator[None]:
    """Inside, the model works on copies of its buffers; afterwards it has its own ones again.

    The original tensors are not written to, so they need no copying back, and what autograd or a
    compiled graph knows of them stays true. Without a model, nothing happens.
    """
    modules = model.modules() if model is not None else ()
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    try:
        copies: dict[int, Tensor | None] = {id(None): None}
        for live, own in buffers:
            for name, buffer in own.items():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                live[name] = copies[id(buffer)]
        yield
    finally:
        for live, own in buffers:
            if live or own:  # a module may have made its first one inside
                live.clear()
                live.update(own)


@contextmanager
def undisturbed(
    model: nn.Module | None,
    tensors: Iterable[Tensor] = (),
    generators: Iterable[torch.Generator] = (),
) -> Iterator[Callable[[], None]]:
    """Inside, passes through the model; afterwards nobody can tell that there were any.

    Random state, gradients, buffers and modes are as before, also after an exception. Gradients, as
    buffers, are not saved and written back but swapped: inside there are none, and afterwards the
    original tensors, which nobody has touched, return to their places.

    Args:
        model: the module whose gradients, buffers and modes are kept; None for none.
        tensors: others whose gradients are kept. Random state is that of all their devices too.
        generators: those whose state is kept besides the global ones.

    Yields:
        A function that puts random state and modes back at once, for the next pass inside.
    """
    owners = [*tensors, *(model.parameters() if model is not None else ())]
    grads = [owner.grad for owner in owners]
    random_state = RandomState({owner.device for owner in owners}, generators)
    modes = _modes(model)

    def reset() -> None:
        modes()
        random_state.restore()

    try:
        for owner in owners:
            owner.grad = None
        with kept_buffers(model):
            yield reset
    finally:
        for owner, grad in zip(owners, grads, strict=True):
            owner.grad = grad
        reset()


def save_whole(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """``torch.save`` that writes a file whole, or leaves what was there as it was."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def check_state(state: Any, keys: Iterable[str], optional: Iterable[str] = ()) -> None:
    """ValueError unless a state that is to be loaded has these keys, and no others but these."""
    wanted = set(keys)
    if not isinstance(state, Mapping) or set(state) - set(optional) != wanted:
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state must have the keys {sorted(wanted)}, got {got}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take up a copy of a state of `Optimizer.state_dict`; torch's own loading has two traps.

    It keeps the tensors that it is given, so that two optimizers would write to one momentum. And
    it takes the state of another kind of optimizer, to break on it at a later step.

    Raises:
        ValueError: the state is not of an optimizer of this kind over as many parameters. The
            optimizer is as it was then.
    """
    was = optimizer.state, optimizer.param_groups
    try:
        optimizer.load_state_dict(copy.deepcopy(dict(state)))
        if any(set(optimizer.defaults) - set(group) for group in optimizer.param_groups):
            raise ValueError("its parameter groups have other settings")
    except Exception as error:
        optimizer.state, optimizer.param_groups = was
        name = type(optimizer).__name__
        raise ValueError(f"state is not of an optimizer like this {name}: {error!r}") from error


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, convolutions in float32 on a GPU are not rounded to TensorFloat-32, which is torch's
    default for them and keeps three decimal digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
