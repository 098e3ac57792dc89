"""Small named architectures, initialised from a seed.

The same seed gives the same weights on every device, and torch's global random state is left as it
was. A model takes a batch (N, ...) and returns logits (N, classes).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

__all__ = ["ACTIVATIONS", "INITS", "cnn", "mlp"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""Activation functions by name."""

INITS = ("torch", "glorot")
"""Initialisations: torch's own (uniform, bound 1/sqrt(fan in), for weights and biases), as in Cohen
et al. (2021), or Glorot normal with zero biases, as in Long & Bartlett (2024)."""


def mlp(
    sizes: Sequence[int],
    activation: str = "tanh",
    *,
    init: str = "torch",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Fully connected network; flattens its input to (N, sizes[0]), returns (N, sizes[-1]).

    Args:
        sizes: widths from input to output, such as (784, 200, 200, 10).
        activation: a key of `ACTIVATIONS`, between all layers.
        init: one of `INITS`.
        seed: determines the initial weights.

    Raises:
        ValueError: fewer than two sizes, a size below 1, an unknown activation or init.
    """
    sizes = [int(size) for size in sizes]
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be two or more positive integers, got {sizes}")
    act = _named("activation", activation, ACTIVATIONS)

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), act()]
        return layers[:-1]

    return _initialised(build, init, seed).to(device, dtype)


def cnn(
    shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    activation: str = "tanh",
    *,
    widths: Sequence[int] = (32, 32),
    pooling: str = "avg",
    init: str = "torch",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Convolutional network after Cohen et al. (2021): for each width a 3x3 convolution (padding
    1), the activation and 2x2 pooling; then one linear layer.

    Args:
        shape: (channels, height, width) of one image; height and width divisible by
            2 ** len(widths).
        classes: size of the output.
        activation: a key of `ACTIVATIONS`.
        widths: channels of each convolution.
        pooling: "avg" (smooth) or "max".
        init: one of `INITS`.
        seed: determines the initial weights.

    Raises:
        ValueError: a shape that the pooling does not divide, an unknown activation, pooling or
            init.
    """
    channels, height, width = (int(size) for size in shape)
    shrink = 2 ** len(widths)
    if min(channels, height, width) < 1 or height % shrink or width % shrink:
        raise ValueError(
            f"shape must be (channels, height, width) with height and width divisible by {shrink} "
            f"(pooled {len(widths)} times), got {tuple(shape)}"
        )
    act = _named("activation", activation, ACTIVATIONS)
    pool = _named("pooling", pooling, {"avg": nn.AvgPool2d, "max": nn.MaxPool2d})

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = []
        fan_in = channels
        for fan_out in widths:
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), act(), pool(2)]
            fan_in = fan_out
        features = fan_in * (height // shrink) * (width // shrink)
        return [*layers, nn.Flatten(), nn.Linear(features, classes)]

    return _initialised(build, init, seed).to(device, dtype)


def _initialised(build: Callable[[], list[nn.Module]], init: str, seed: int) -> nn.Sequential:
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    # Layers draw their weights from the global CPU generator: seed a copy of it, on the CPU
    # whatever the default device is. (torch.manual_seed would also reseed every accelerator.)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(*build())
        if init == "glorot":
            for layer in model:
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.xavier_normal_(layer.weight)
                    assert layer.bias is not None
                    nn.init.zeros_(layer.bias)
    return model


def _named(argument: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
