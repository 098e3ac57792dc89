"""Small named architectures, initialised from a seed.

The same seed gives the same weights on every device, and torch's global random state is left as it
was. A model takes a batch (N, ...) and returns logits (N, classes); `transformer` those of every
place in a text.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

__all__ = [
    "ACTIVATIONS",
    "INITS",
    "Normalize",
    "Whiten",
    "cnn",
    "fast_resnet",
    "mlp",
    "transformer",
    "wide_resnet",
]

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
    norm: str = "none",
    init: str = "torch",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Fully connected network; flattens its input to (N, sizes[0]), returns (N, sizes[-1]).

    Args:
        sizes: widths from input to output, such as (784, 200, 200, 10).
        activation: a key of `ACTIVATIONS`, between all layers.
        norm: "batch" puts batch norm before each activation; "none" nothing.
        init: one of `INITS`.
        seed: determines the initial weights.

    Raises:
        ValueError: fewer than two sizes, a size below 1, an unknown activation, norm or init.
    """
    sizes = [int(size) for size in sizes]
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be two or more positive integers, got {sizes}")
    act = _named("activation", activation, ACTIVATIONS)
    normed = _named("norm", norm, {"none": False, "batch": True})

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers.append(nn.Linear(fan_in, fan_out))
            layers += [nn.BatchNorm1d(fan_out)] if normed else []
            layers.append(act())
        return [*layers, nn.Linear(sizes[-2], sizes[-1])]

    return _initialised(build, init, seed).to(device, dtype)


def cnn(
    shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    activation: str = "tanh",
    *,
    widths: Sequence[int] = (32, 32),
    pooling: str = "avg",
    norm: str = "none",
    init: str = "torch",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Convolutional network after Cohen et al. (2021): for each width a 3x3 convolution (padding
    1), the activation and 2x2 pooling; then one linear layer.

    That of Long & Bartlett (2024) has activation "relu", widths (16, 32), pooling "max", norm
    "layer" and init "glorot".

    Args:
        shape: (channels, height, width) of one image; height and width divisible by
            2 ** len(widths).
        classes: size of the output.
        activation: a key of `ACTIVATIONS`.
        widths: channels of each convolution.
        pooling: "avg" (smooth) or "max".
        norm: "layer" puts a `ChannelNorm` between activation and pooling; "none" nothing.
        init: one of `INITS`.
        seed: determines the initial weights.

    Raises:
        ValueError: a shape that the pooling does not divide, an unknown activation, pooling, norm
            or init.
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
    normed = _named("norm", norm, {"none": False, "layer": True})

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = []
        fan_in = channels
        for fan_out in widths:
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), act()]
            layers += [ChannelNorm(fan_out)] if normed else []
            layers.append(pool(2))
            fan_in = fan_out
        features = fan_in * (height // shrink) * (width // shrink)
        return [*layers, nn.Flatten(), nn.Linear(features, classes)]

    return _initialised(build, init, seed).to(device, dtype)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of images (N, C, H, W), as flax's LayerNorm does.

    With a scale and a shift for each channel, and flax's eps of 1e-6: where the activation has
    switched all channels of a pixel off, there is no variance to divide by.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def wide_resnet(
    depth: int = 16,
    width: int = 8,
    shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    *,
    stride: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Wide residual network WRN-depth-width with batch norm, without dropout.

    A 3x3 convolution to 16 channels; three groups of (depth - 4) / 6 residual blocks with 16, 32
    and 64 times `width` channels, the second and third at half the resolution of the one before;
    batch norm, ReLU, the mean over all pixels, one linear layer. Convolutions have no bias.

    Args:
        depth: 10, 16, 22, 28, ...
        width: factor of the numbers of channels.
        shape: (channels, height, width) of one image.
        classes: size of the output.
        stride: of the first convolution; 1 in the paper, 2 makes all else four times as cheap.
        seed: determines the initial weights (He normal, by fan out; batch norms begin as 1 and 0).

    Raises:
        ValueError: a depth that is not 6 n + 4, a width, stride or shape below 1.

    Source: Zagoruyko & Komodakis 2016, *Wide residual networks* (arXiv:1605.07146).
    """
    blocks, odd = divmod(depth - 4, 6)
    if odd or blocks < 1:
        raise ValueError(f"depth must be 10, 16, 22, 28 and so on, got {depth}")
    if min(width, stride, *shape) < 1 or len(shape) != 3:
        raise ValueError(
            "width, stride and shape (channels, height, width) must be positive, "
            f"got {width}, {stride} and {tuple(shape)}"
        )

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, stride, padding=1, bias=False)]
        fan_in = 16
        for group, fan_out in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                first = 2 if group > 0 and block == 0 else 1
                layers.append(Residual(fan_in, fan_out, first))
                fan_in = fan_out
        layers += [nn.BatchNorm2d(fan_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers.append(nn.Linear(fan_in, classes))
        return _he_normal(layers)

    return _initialised(build, "torch", seed).to(device, dtype)


def fast_resnet(
    shape: Sequence[int] = (24, 31, 31),
    classes: int = 10,
    *,
    widths: Sequence[int] = (64, 128, 256),
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """A small residual network that learns CIFAR-10 in few epochs, best behind `Whiten`.

    For each width a `Group` at half the resolution; the largest value of each channel over all
    pixels; one linear layer, its outputs over `SOFTER`. Convolutions have no bias.

    Args:
        shape: (channels, height, width) of one input; the default is what `Whiten` makes of a 32x32
            image of three colours.
        classes: size of the output.
        widths: channels of each group.
        seed: determines the initial weights (He normal, by fan out; batch norms begin as 1 and 0).

    Raises:
        ValueError: a width or shape below 1, or more groups than halvings of the resolution.

    Source: the shape of network that those who train CIFAR-10 for speed have settled on (Page 2018,
    *How to train your ResNet*; Jordan 2024, arXiv:2404.00498), without what is there for speed
    alone.
    """
    channels, height, across = (int(size) for size in shape)
    if not widths or min(channels, *widths) < 1 or min(height, across) < 2 ** len(widths):
        raise ValueError(
            "widths and channels must be positive, and each side of shape at least "
            f"2 ** {len(widths)} for {len(widths)} groups, got {tuple(widths)} and {tuple(shape)}"
        )

    def build() -> list[nn.Module]:
        layers: list[nn.Module] = [
            Group(fan_in, fan_out) for fan_in, fan_out in pairwise((channels, *widths))
        ]
        layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), Soft(widths[-1], classes)]
        return _he_normal(layers)

    return _initialised(build, "torch", seed).to(device, dtype)


SOFTER = 8.0
"""What the logits of `fast_resnet` are divided by: the largest values over an image are large, and
without it the loss is so sharp in the last layer that large learning rates are unstable there."""


class Soft(nn.Linear):
    """A linear layer whose outputs are divided by `SOFTER`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / SOFTER


class Group(nn.Module):
    """A part of `fast_resnet`: a 3x3 convolution, 2x2 max-pooling, batch norm and GELU; and to
    that the same once more, without the pooling."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(self.conv1(x), 2)
        x = nn.functional.gelu(self.norm1(pooled))
        out: Tensor = x + nn.functional.gelu(self.norm2(self.conv2(x)))
        return out


class Whiten(nn.Module):
    """Images (N, C, H, W) to their 2x2 patches, decorrelated: (N, 8 C, H - 1, W - 1).

    The first layer of a model that takes pixels, fixed: it has no parameters. A channel is the
    projection of a patch, less the mean patch, onto an eigenvector of the patches' covariance, over
    the square root of that eigenvalue plus `eps`; and each comes with its negative, as the
    activation behind would throw half of it away.

    Args:
        x: images (N, C, H, W) that the statistics are taken from.
        eps: keeps directions that hardly occur from becoming noise.

    Raises:
        ValueError: x are no images of at least 2x2 pixels.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, x: Tensor, eps: float = 5e-4) -> None:
        super().__init__()
        if x.ndim != 4 or min(x.shape[2:]) < 2:
            raise ValueError(
                f"x must be images (N, C, H, W) of at least 2x2 pixels, got {tuple(x.shape)}"
            )
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # side by side: each pixel counts once
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T).double())
        filters = (vectors / (values + eps).sqrt()).T.to(x.dtype)
        filters = torch.cat([filters, -filters])
        self.register_buffer("weight", filters.unflatten(1, (x.shape[1], 2, 2)).contiguous())
        self.register_buffer("bias", -(filters @ mean))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


class Normalize(nn.Module):
    """Images (N, C, H, W) less a mean, over a standard deviation, a channel each.

    The first layer of a model that takes pixels: then an attack's eps is in pixels too.

    Args:
        mean, std: of each channel, (C,).

    Raises:
        ValueError: a standard deviation that is not above 0, or not one for each mean.

    Example:
        >>> Normalize([0.5], [0.25])(torch.full((1, 1, 1, 1), 0.75))
        tensor([[[[1.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(std) != len(mean) or not all(s > 0 for s in std):
            raise ValueError(
                f"std must be above 0 in each of the {len(mean)} channels, got {list(std)}"
            )
        self.register_buffer("mean", torch.as_tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Residual(nn.Module):
    """A block of `wide_resnet`: twice batch norm, ReLU and a 3x3 convolution, added to the input.

    Where the number of channels or the resolution changes, a 1x1 convolution of the first ReLU's
    output stands for the input.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        same = fan_in == fan_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = nn.functional.relu(self.norm1(x))
        second = nn.functional.relu(self.norm2(self.conv1(first)))
        skip = x if self.shortcut is None else self.shortcut(first)
        out: Tensor = skip + self.conv2(second)
        return out


def transformer(
    vocab: int = 128,
    width: int = 128,
    layers: int = 6,
    heads: int = 8,
    length: int = 64,
    *,
    key: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Decoder-only language model: tokens (B, T), int64, to logits (B, T, vocab) of each next one.

    Learned positions; blocks of causal self-attention and a GELU network of 4 * width, both with
    layer norm before and a residual connection around; layer norm; a linear layer of its own
    (untied). No dropout. The defaults and ``key=32`` are the network of Long & Bartlett (2024).

    Initialised as theirs, but with whole normal distributions where theirs are cut off at two
    standard deviations: deviation 0.02 for embeddings, sqrt(2 / (layers * fan in)) for weights in
    blocks, sqrt(1 / fan in) for the output layer; zero biases.

    Args:
        vocab: number of different tokens.
        width: size of the vector that stands for a token.
        layers: number of blocks.
        heads: attention heads of a block.
        length: most tokens of a sequence, T <= length.
        key: size of a head's keys, queries and values; default width / heads.
        seed: determines the initial weights.

    Raises:
        ValueError: an argument below 1; without `key`, a width that `heads` does not divide. In
            use, a sequence longer than `length`.
    """
    for name, value in zip(
        ("vocab", "width", "layers", "heads", "length", "key"),
        (vocab, width, layers, heads, length, 1 if key is None else key),
        strict=True,
    ):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if key is None and width % heads:
        raise ValueError(
            f"width must be divisible by heads={heads} unless key is given, got {width}"
        )
    size = width // heads if key is None else key

    def build() -> list[nn.Module]:
        blocks = [Block(width, heads, size, layers) for _ in range(layers)]
        last = [nn.LayerNorm(width), _linear(width, vocab)]
        return [Embedding(vocab, width, length), *blocks, *last]

    return _initialised(build, "torch", seed).to(device, dtype)


class Embedding(nn.Module):
    """Tokens (B, T) to vectors (B, T, C): one learned for the token plus one for its place."""

    def __init__(self, vocab: int, width: int, length: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(vocab, width))
        self.place = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.place):
            most, got = len(self.place), x.shape[1]
            raise ValueError(f"sequences must have at most {most} tokens, got {got}")
        return self.token[x] + self.place[: x.shape[1]]


class Block(nn.Module):
    """A layer of a Transformer: x + attention(norm(x)), and to that the same with a network."""

    def __init__(self, width: int, heads: int, key: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = _linear(width, 3 * heads * key, 2 / layers)
        self.out = _linear(heads * key, width, 2 / layers)
        wide, narrow = _linear(width, 4 * width, 2 / layers), _linear(4 * width, width, 2 / layers)
        self.network = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.network(self.norms[1](x))
        return out

    def attention(self, x: Tensor) -> Tensor:
        """Written out, since fused attention has no second derivative."""
        # each (B, heads, T, key)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def _linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer with normal weights of variance gain / fan_in, and zero biases."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, std=(gain / fan_in) ** 0.5)
    nn.init.zeros_(layer.bias)
    return layer


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


def _he_normal(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers, each convolution in them with He-normal weights, by fan out."""
    for layer in nn.Sequential(*layers).modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layers


def _named(argument: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
