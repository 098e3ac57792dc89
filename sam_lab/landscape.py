r"""The loss along a line and in a plane of weight space.

A slice answers questions that a path cannot: whether two solutions lie in one valley (`line`, and
its `barrier`), and what the valley looks like around them (`plane`, on the axes of three solutions,
`through`, or of random ones, `direction`)::

    start = weights(model)
    ...  # train on
    path = line(closure, model, start, weights(model))
    path.losses, path.barrier

A point of weight space is a list of tensors shaped as `model.parameters()`, such as a snapshot by
`weights`, or all of them in one flat vector (P,). Buffers are no part of it. Running statistics of
BatchNorm belong to the weights they were gathered at: at weights in between they are wrong, and the
loss rises for no other reason. `refresh` gathers them anew at every point (Izmailov et al. 2018).

A picture disturbs nothing: weights, gradients, buffers, modes and random state are as before, bit
for bit, also after an exception. The loss is one function: every point is evaluated from the
buffers, modes and random state found at the call, so a dropout mask is the same at all. No graph is
built. A loss that is infinite or NaN is reported as such.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim.swa_utils import update_bn

from sam_lab._checks import check_integer, check_scalar
from sam_lab.eigensolvers import inner
from sam_lab.objective import Batches, Closure, Objective
from sam_lab.state import kept_buffers, undisturbed

__all__ = [
    "Axes",
    "Line",
    "Plane",
    "direction",
    "filter_normalized",
    "line",
    "plane",
    "through",
    "weights",
]

Point = Tensor | Iterable[Tensor]
Numbers = Sequence[float] | np.ndarray | Tensor
Refresh = Iterable[Any] | Literal[False] | None
Where = Callable[[Tensor], list[Tensor]]  # k rows of coordinates to weights, each (k, *shape)

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class Line:
    """The loss along a straight line.

    Attributes:
        alphas: (m,) places on it, 0 the start and 1 the end; float64 on the CPU.
        losses: (m,) the loss at each; float64 on the CPU.
    """

    alphas: Tensor
    losses: Tensor

    @property
    def barrier(self) -> float:
        r"""How far the loss rises above the straight line between its values at the two ends.

        $\max_\alpha L(w_\alpha) - [(1 - \alpha) L(w_0) + \alpha L(w_1)]$ over the alphas within
        [0, 1]: 0 where nothing rises, since both ends count, as for every convex loss (Entezari et
        al. 2022). In Frankle et al. 2020 the mean of the two ends is subtracted instead, which is
        the same where they are equal. NaN where the loss at an end is not finite.

        Raises:
            ValueError: the alphas do not include 0 and 1.
        """
        ends = [self.losses[self.alphas == alpha] for alpha in (0, 1)]
        if not all(len(end) for end in ends):
            raise ValueError("a barrier needs the losses at both ends: alphas must include 0 and 1")
        chord = (1 - self.alphas) * ends[0][0] + self.alphas * ends[1][0]
        inside = (self.alphas >= 0) & (self.alphas <= 1)
        return float((self.losses - chord)[inside].max())


@dataclass(frozen=True, eq=False)
class Plane:
    """The loss on a grid in a plane; all float64 on the CPU.

    Attributes:
        xs, ys: coordinates along the first and the second axis.
        losses: (len(ys), len(xs)), as contour plots want them.
    """

    xs: Tensor
    ys: Tensor
    losses: Tensor


class Axes(NamedTuple):
    """A plane: a point, two axes of length 1 at right angles, and the coordinates of three points.

    Attributes:
        origin, u, v: as the points were given: lists of tensors, or flat vectors.
        points: (3, 2) coordinates (x, y) of a, b and c, float64 on the CPU.
    """

    origin: Any
    u: Any
    v: Any
    points: Tensor


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of the model's parameters (not of its buffers), detached, in their order."""
    return [p.detach().clone() for p in _parameters(model)]


def line(
    closure: Closure,
    model: nn.Module,
    start: Point,
    end: Point,
    alphas: int | Numbers = 25,
    *,
    chunk: int = 1,
    refresh: Refresh = None,
) -> Line:
    r"""The loss at $(1 - \alpha)$ `start` $+\ \alpha$ `end`.

    Args:
        closure: evaluates the loss at the current values of the parameters and returns it, a scalar
            tensor; no `backward` inside.
        model: the module that it evaluates.
        start, end: two points of its weight space, in dtype and on the device of its parameters.
        alphas: the places, any finite numbers, beyond [0, 1] too; or how many of them, evenly
            spaced from 0 to 1.
        chunk: points evaluated in one pass (by `torch.func.vmap`; it needs a loss that reads the
            parameters from the model, of one dtype, all requiring grad). Where that is impossible,
            as with random numbers, buffers that change or a Python `if` on values, points are taken
            one by one all the same. On the CPU one by one is best: several took up to 2.5 times as
            long, and gained only with some 20 examples (2 to 3 times faster). On a GPU they may
            gain where a small network waits for launches (we have not measured it).
        refresh: inputs as for `torch.optim.swa_utils.update_bn`, a list of batches or a DataLoader
            (of a tuple the first tensor is the input): at every point, BatchNorm's running
            statistics are gathered anew from one pass in training mode, dropout included. Batches
            count alike, whatever their sizes. Then points are evaluated one by one. Without it they
            are those that the model has, at all points; where that matters, in evaluation mode, a
            `UserWarning` is issued. `False` says that this is meant.

    Returns:
        `Line`.

    Raises:
        TypeError, ValueError: an argument is not as described; the loss is no real scalar.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> closure = lambda: model.weight.square().sum()
        >>> line(closure, model, torch.tensor([-1.0]), torch.tensor([3.0]), 5).losses.tolist()
        [1.0, 0.0, 1.0, 4.0, 9.0]
    """
    params = _parameters(model)
    a, b = _shaped("start", start, params), _shaped("end", end, params)
    if isinstance(alphas, int):
        places = torch.linspace(0, 1, check_integer("alphas", alphas, 2), dtype=torch.float64)
    else:
        places = _numbers("alphas", alphas)

    def where(rows: Tensor) -> list[Tensor]:  # lerp is exact at both ends
        return [torch.lerp(s, e, _along(rows[:, 0], s)) for s, e in zip(a, b, strict=True)]

    return Line(places, _losses(closure, model, where, places[:, None], chunk, refresh))


def plane(
    closure: Closure,
    model: nn.Module,
    origin: Point,
    u: Point,
    v: Point,
    xs: Numbers,
    ys: Numbers,
    *,
    chunk: int = 1,
    refresh: Refresh = None,
) -> Plane:
    """The loss at `origin` + x `u` + y `v` for every x in `xs` and y in `ys`.

    Args:
        closure, model, chunk, refresh: as for `line`.
        origin, u, v: a point and two directions, such as the first three of `through`, or
            `weights(model)` and two of `direction`.
        xs, ys: coordinates, any finite numbers.

    Returns:
        `Plane`.

    Raises:
        TypeError, ValueError: as for `line`.
    """
    params = _parameters(model)
    named = zip(("origin", "u", "v"), (origin, u, v), strict=True)
    base, first, second = (_shaped(name, value, params) for name, value in named)
    x, y = _numbers("xs", xs), _numbers("ys", ys)

    def where(rows: Tensor) -> list[Tensor]:
        return [
            o + _along(rows[:, 0], o) * d + _along(rows[:, 1], o) * e
            for o, d, e in zip(base, first, second, strict=True)
        ]

    grid = torch.cartesian_prod(y, x).flip(1)
    losses = _losses(closure, model, where, grid, chunk, refresh)
    return Plane(x, y, losses.reshape(len(y), len(x)))


def through(a: Point, b: Point, c: Point) -> Axes:
    """The plane through three points: origin `a`, first axis towards `b`, and `c` above it.

    Distances in it are those of weight space (Garipov et al. 2018).

    Args:
        a, b, c: points alike in shapes, dtype and device: lists of tensors, or flat vectors.

    Returns:
        `Axes`; ``plane(closure, model, *axes[:3], xs, ys)`` draws it.

    Raises:
        TypeError, ValueError: a point is not as described, or the three lie on one line.
    """
    flat = isinstance(a, Tensor)
    shapes = [a.detach()] if isinstance(a, Tensor) else _tensors("a", a)
    base, *others = (
        torch.cat([t.reshape(-1) for t in _shaped(name, value, shapes)])
        for name, value in zip("abc", (a, b, c), strict=True)
    )
    towards, beside = (other - base for other in others)
    length = _dot(towards, towards) ** 0.5
    if not 0 < length < math.inf:
        raise ValueError(f"b must lie at a finite distance from a, got {length:g}")
    u = towards / length
    v = beside
    for _ in range(2):  # once leaves rounding
        v = v - _dot(v, u) * u
    height, far = _dot(v, v) ** 0.5, _dot(beside, beside) ** 0.5
    if not 100 * torch.finfo(v.dtype).eps * far < height < math.inf:
        raise ValueError("c must not lie on the line through a and b, and be finite")
    v = v / height
    places = [[_dot(offset, u), _dot(offset, v)] for offset in (towards, beside)]
    points = torch.tensor([[0.0, 0.0], *places], dtype=torch.float64)
    shaped = [row if flat else _shaped("axis", row, shapes) for row in (base, u, v)]
    return Axes(shaped[0], shaped[1], shaped[2], points)


def direction(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """A random Gaussian direction at the model's weights, filter-normalised (Li et al. 2018).

    A step along it changes every filter in proportion to its norm. So pictures of networks whose
    weights differ in scale can be compared: where BatchNorm or ReLU make two networks of different
    weights the same function, their pictures are the same too. Biases and the parameters of
    normalisation layers stay where they are, as in the paper's code.

    Args:
        model: the network.
        seed: determines the direction, which is the same on every device.

    Returns:
        A list of tensors shaped as `model.parameters()`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    params = _parameters(model)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
    drawn = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]
    normalized = filter_normalized(drawn, params)
    norms = (module for module in model.modules() if isinstance(module, NORMS))
    fixed = {id(p) for module in norms for p in module.parameters(recurse=False)}
    return [
        torch.zeros_like(d) if id(p) in fixed else d
        for p, d in zip(params, normalized, strict=True)
    ]


def filter_normalized(direction: Iterable[Tensor], weights: Iterable[Tensor]) -> list[Tensor]:
    """The direction with each filter at the norm of the same filter of the weights.

    A filter is what makes one output: a row of a dense layer's weights, an output channel of a
    convolution's, in general an entry of the first axis. Tensors of one dimension or none, that is
    biases and the scales and shifts of normalisation layers, become zeros; so does a filter that is
    zero in either argument.

    Args:
        direction, weights: lists of tensors of the same shapes, dtypes and devices.

    Raises:
        TypeError, ValueError: they are not.

    Source: Li et al. 2018, *Visualizing the loss landscape of neural nets* (arXiv:1712.09913).
    """

    def normalized(d: Tensor, w: Tensor) -> Tensor:
        if d.ndim <= 1:
            return torch.zeros_like(d)
        own, wanted = (t.flatten(1).norm(dim=1) for t in (d, w))
        scale = torch.where(own > 0, wanted / own, 0)
        return d * scale.reshape(-1, *[1] * (d.ndim - 1))

    target = _tensors("weights", weights)
    pairs = zip(_shaped("direction", direction, target), target, strict=True)
    return [normalized(d, w) for d, w in pairs]


# --- evaluating ----------------------------------------------------------------------------------


def _losses(
    closure: Closure,
    model: nn.Module,
    where: Where,
    rows: Tensor,
    chunk: int,
    refresh: Refresh,
) -> Tensor:
    """The loss at the weights of each row of coordinates (n, d): (n,) float64 on the CPU."""
    if not callable(closure):
        raise TypeError(f"closure must be callable, got {type(closure).__name__}")
    params = _parameters(model)
    device = params[0].device
    chunk = check_integer("chunk", chunk, 1)
    gather = _checked_refresh(refresh, model)
    generators = Batches(gather, model).generators if gather is not None else ()

    def one(row: Tensor) -> Tensor:
        with kept_buffers(model):
            for p, t in zip(params, where(row[None]), strict=True):
                p.data = t[0]
            if gather is not None:
                update_bn(gather, model, device)
                reset()
            return _scalar(closure())

    def several(some: Tensor) -> Tensor:
        objective = Objective(closure, params, model)
        with kept_buffers(model):
            together = torch.func.vmap(lambda *at: _scalar(objective.replaced(closure, at)))
            losses = together(*where(some))
        if len(some) > 1 and losses.stride(0) == 0:  # one number, shown as many
            raise ValueError("the loss does not read its parameters from the model")
        return losses

    def measured(evaluate: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> Tensor:
        losses = []
        for part in parts:
            reset()
            losses.append(evaluate(part).reshape(-1))
        return torch.cat(losses).cpu().double()

    with torch.no_grad(), undisturbed(model, generators=generators) as reset, _kept_weights(model):
        if min(chunk, len(rows)) > 1 and gather is None:
            # an error: impossible for this loss, or one of its own, which comes again below
            with suppress(Exception):
                return measured(several, rows.split(chunk))
        return measured(one, rows)


@contextmanager
def _kept_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights may be exchanged; afterwards the original tensors are in their places."""
    data = [(p, p.data) for p in model.parameters()]
    # update_bn takes BatchNorm's momentum away for the time of its pass
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        yield
    finally:
        for p, values in data:
            p.data = values
        for norm, momentum in norms:
            norm.momentum = momentum


def _scalar(loss: Any) -> Tensor:
    return check_scalar(loss).detach().reshape(())


# --- arguments -----------------------------------------------------------------------------------


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    params = list(model.parameters())
    if not params:
        raise ValueError("model has no parameters")
    return params


def _checked_refresh(refresh: Refresh, model: nn.Module) -> Iterable[Any] | None:
    """The batches; None without any, with a warning where that makes a difference."""
    if refresh is None or refresh is False:
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training)
        if refresh is None and any(m.running_mean is not None for m in norms):
            warnings.warn(
                "BatchNorm's running statistics are those that the model has now, at every point; "
                "give refresh=batches to gather them anew, or refresh=False if this is meant",
                stacklevel=4,
            )
        return None
    if isinstance(refresh, Tensor | Iterator) or not isinstance(refresh, Iterable):
        raise TypeError(
            "refresh must be a list of batches or a DataLoader, which can be read once a point, "
            f"got {type(refresh).__name__}"
        )
    if isinstance(refresh, Sequence) and not refresh:
        raise ValueError("refresh is empty; refresh=False keeps the statistics as they are")
    return refresh


def _tensors(name: str, value: Any) -> list[Tensor]:
    """A list of tensors, detached: what a snapshot is, and `model.parameters()` too."""
    wrong = f"{name} must be a list of tensors, such as weights(model), or a flat vector (P,)"
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{wrong}; got {type(value).__name__}")
    tensors = list(value)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{wrong}; entry {i} is {type(t).__name__}")
    return [t.detach() for t in tensors]


def _shaped(name: str, value: Point, like: Sequence[Tensor]) -> list[Tensor]:
    """The value as tensors like these in shape, dtype and device; an error if it cannot be."""
    if isinstance(value, Tensor):
        sizes = [t.numel() for t in like]
        if tuple(value.shape) != (sum(sizes),):
            raise ValueError(
                f"{name} must have shape ({sum(sizes)},), one entry a parameter, or be a list of "
                f"tensors; got {tuple(value.shape)}"
            )
        parts = value.detach().split(sizes)
        tensors = [part.view(t.shape) for part, t in zip(parts, like, strict=True)]
    else:
        tensors = _tensors(name, value)
    if len(tensors) != len(like):
        raise ValueError(f"{name} must hold {len(like)} tensors, got {len(tensors)}")
    for i, kinds in enumerate(zip(map(_kind, tensors), map(_kind, like), strict=True)):
        if kinds[0] != kinds[1]:
            raise ValueError(f"{name}[{i}] must be {kinds[1]}, got {kinds[0]}")
    return tensors


def _kind(t: Tensor) -> str:
    return f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"


def _numbers(name: str, value: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a sequence of numbers, got {value!r:.100}") from None
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(
            f"{name} must be a sequence of one or more numbers, got shape {tuple(numbers.shape)}"
        )
    wrong = numbers[~torch.isfinite(numbers)]
    if len(wrong):
        raise ValueError(f"{name} must be finite, got {wrong[0].item()}")
    return numbers


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Numbers (k,) to multiply tensors of this shape with: (k, 1, ..., 1), in its dtype."""
    return values.to(like).reshape(-1, *[1] * like.ndim)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(inner(a[None], b[None]))
