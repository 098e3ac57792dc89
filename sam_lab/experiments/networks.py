"""The networks that the experiments on images train, as their configs describe them, and their
Hessian."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.training import LossFn

__all__ = ["Hidden", "Wide", "build", "hessian", "normalized", "wide_resnet"]


class Wide(Protocol):
    """A config that describes a wide residual network: the arguments of `models.wide_resnet`."""

    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def stride(self) -> int: ...


class Hidden(Wide, Protocol):
    """A config that describes a fully connected network by the widths of its hidden layers, or, if
    there are none, a wide residual network."""

    @property
    def hidden(self) -> tuple[int, ...]: ...


def build(
    config: Hidden, found: data.Dataset, seed: int = 0, device: torch.device | str = "cpu"
) -> nn.Module:
    """The network that a config describes, for the inputs and classes of a data set."""
    if not config.hidden:
        return wide_resnet(config, found, seed, device)
    sizes = (found.x[0].numel(), *config.hidden, found.classes)
    return models.mlp(sizes, "relu", seed=seed, device=device)


def wide_resnet(
    config: Wide, found: data.Dataset, seed: int = 0, device: torch.device | str = "cpu"
) -> nn.Module:
    """The wide residual network that a config describes, its weights with the channels last."""
    net: nn.Module = models.wide_resnet(
        config.depth,
        config.width,
        found.x.shape[1:],
        found.classes,
        stride=config.stride,
        seed=seed,
        device=device,
    )
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def normalized(net: nn.Module, found: data.Dataset) -> nn.Sequential:
    """The network behind a layer that standardises the channels of the training set, so that it
    takes pixels."""
    std, mean = torch.std_mean(found.x, (0, 2, 3))
    return nn.Sequential(models.Normalize(mean.tolist(), std.tolist()).to(found.x.device), net)


def hessian(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn = nn.functional.cross_entropy
) -> Hessian:
    """The Hessian of the mean loss over examples (N, ...) with labels (N,), in the model's
    parameters; puts the model into evaluation mode."""
    model.eval()
    return Hessian.over(
        list(zip(x.split(1000), y.split(1000), strict=True)),
        lambda x, y: loss_fn(model(x), y),
        list(model.parameters()),
        model,
    )
