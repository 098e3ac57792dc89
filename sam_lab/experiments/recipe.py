"""What a run trains, whatever is studied: data, a network, and plain SGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.data import Dataset
from sam_lab.experiments.lab.cost import gradient_flops
from sam_lab.experiments.lab.device import has_bfloat16
from sam_lab.training import LossFn, Phase, Training, crop_and_flip

__all__ = ["CIFAR", "CIFAR_FAST", "CIFAR_TENTH", "DIGITS", "Recipe", "hessian"]

STANDARDIZE = ("nowhere", "data", "network", "patches")


@dataclass(frozen=True)
class Recipe:
    """Data, network and SGD of an experiment on images, and what its Hessian is taken over.

    Attributes:
        data, train, test: the data set, and how many examples of it.
        standardize: where the channels are brought to mean 0 and variance 1: "nowhere"; in the
            "data"; or in a first layer of the "network", which then takes pixels in [0, 1], as
            attacks on the inputs need them. With "patches" it whitens 2x2 patches instead (see
            `models.Whiten`), and a GELU comes behind.
        hidden: widths of a fully connected network's hidden layers; if there are none, `channels`
            of a convolutional network (see `models.cnn`); if there are none of these either,
            `groups` of a fast residual one (see `models.fast_resnet`); and if there are no groups
            `depth`, `width` and `stride` of a wide residual network (see `models.wide_resnet`).
        augment: whether images are shifted and mirrored.
        shift: pixels by which they are shifted at most.
        epochs, batch, lr, momentum, weight_decay: of SGD.
        nesterov: whether its momentum is Nesterov's.
        bfloat16: whether the passes of training are in bfloat16 (see `Training`'s autocast) where
            the device has instructions for it, as GPUs and some CPUs do; elsewhere they are in
            float32, and so is all that is measured.
        measured: training examples over which the Hessian is taken.
        tol: of its top eigenvalue, relative residual.

    Raises:
        ValueError: another value of `standardize`.
    """

    data: str
    train: int
    test: int
    standardize: str = "nowhere"
    hidden: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    depth: int = 10
    width: int = 1
    stride: int = 1
    augment: bool = False
    shift: int = 4
    epochs: int = 40
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    measured: int = 1000
    tol: float = 5e-2
    nesterov: bool = False
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.standardize not in STANDARDIZE:
            raise ValueError(
                f"standardize must be one of {', '.join(STANDARDIZE)}, got {self.standardize!r}"
            )

    @property
    def architecture(self) -> str:
        """The network's name, such as "WRN-16-8"."""
        kinds = (("MLP", self.hidden), ("CNN", self.channels), ("fast ResNet", self.groups))
        for kind, widths in kinds:
            if widths:
                return f"{kind} {'–'.join(map(str, widths))}"
        name = f"WRN-{self.depth}-{self.width}"
        return name if self.stride == 1 else f"{name} with a first stride of {self.stride}"

    def gradient_flops(self) -> float:
        """FLOPs of the gradient of the loss of one example."""
        x, y = torch.rand(2, *data.SHAPES[self.data]), torch.zeros(2, dtype=torch.int64)
        some = Dataset(self.data, x, y, x, y, data.CLASSES, "noise")
        return gradient_flops(self.network(some), x)

    def but(self, **changed: Any) -> Recipe:
        """The same recipe with something changed."""
        return dataclasses.replace(self, **changed)

    def dataset(self, seed: int = 0, device: torch.device | str = "cpu") -> Dataset:
        """The data that a run with this seed has.

        Raises:
            ValueError: an unknown data set, or more examples than there are.
        """
        dataset = data.load(self.data, train=self.train, test=self.test, seed=seed, device=device)
        if self.standardize != "data":
            return dataset
        std, mean = torch.std_mean(dataset.x, (0, 2, 3), keepdim=True)
        return dataclasses.replace(
            dataset, x=(dataset.x - mean) / std, x_test=(dataset.x_test - mean) / std
        )

    def network(
        self,
        dataset: Dataset,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        norm: str = "none",
    ) -> nn.Module:
        """A new network for the inputs and classes of the data; a residual one has its weights with
        the channels last.

        Args:
            norm: that of `models.mlp` or `models.cnn`; a residual network has batch norm whatever
                it is.

        Raises:
            ValueError: a norm that the network cannot have.
        """
        first = [layer.to(device) for layer in self._first(dataset)]
        shape = nn.Sequential(*first)(dataset.x[:1]).shape[1:]
        net = self._network(shape, dataset.classes, seed, device, norm)
        return nn.Sequential(*first, net) if first else net

    def _first(self, dataset: Dataset) -> list[nn.Module]:
        """The layers that standardise, if the network does it."""
        if self.standardize == "patches":
            return [models.Whiten(dataset.x[:5000]), nn.GELU()]
        if self.standardize == "network":
            std, mean = torch.std_mean(dataset.x, (0, 2, 3))
            return [models.Normalize(mean.tolist(), std.tolist())]
        return []

    def _network(
        self, shape: torch.Size, classes: int, seed: int, device: torch.device | str, norm: str
    ) -> nn.Module:
        if self.hidden:
            sizes = (shape.numel(), *self.hidden, classes)
            return models.mlp(sizes, "relu", norm=norm, seed=seed, device=device)
        if self.channels:
            return models.cnn(
                shape,
                classes,
                "relu",
                widths=self.channels,
                pooling="max",
                norm=norm,
                seed=seed,
                device=device,
            )
        net: nn.Module
        if self.groups:
            net = models.fast_resnet(shape, classes, widths=self.groups, seed=seed, device=device)
        else:
            net = models.wide_resnet(
                self.depth, self.width, shape, classes, stride=self.stride, seed=seed, device=device
            )
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net

    def training(
        self,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        phases: Sequence[Phase] | None = None,
        examples: int | None = None,
        norm: str = "none",
        weights: int | None = None,
        order: int | None = None,
        **how: Any,
    ) -> tuple[Training, Dataset]:
        """A run before its first epoch, and its data.

        Args:
            phases: of the training; SGD alone unless given.
            examples: how many of the training set are trained on; all unless given.
            norm: of the network, see `network`.
            weights, order: seeds of their own for the initial weights, and for the order of the
                examples and all else that the epochs draw; `seed` unless given.
            how: what `Training` takes besides: `schedule`, `loss_fn`, `carry`.

        Raises:
            ValueError: an unknown data set, more examples than there are, or a norm that the
                network cannot have.
        """
        dataset = self.dataset(seed, device)
        few = slice(examples)
        optimizer = partial(
            torch.optim.SGD,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        training = Training(
            self.network(dataset, seed if weights is None else weights, device, norm=norm),
            dataset.x[few],
            dataset.y[few],
            optimizer,
            [Phase(0, self.epochs)] if phases is None else phases,
            batch=self.batch,
            augment=crop_and_flip(self.shift) if self.augment else None,
            seed=seed if order is None else order,
            autocast=torch.bfloat16 if self.bfloat16 and has_bfloat16(dataset.x.device) else None,
            **how,
        )
        return training, dataset

    def examined(self, training: Training) -> tuple[Tensor, Tensor]:
        """The training examples over which the Hessian is taken, and their labels."""
        return training.x[: self.measured], training.y[: self.measured]

    def hessian(self, training: Training, loss_fn: LossFn | None = None) -> Hessian:
        """The Hessian over the examined examples, of the loss of training unless another is given;
        puts the model into evaluation mode."""
        return hessian(training.model, *self.examined(training), loss_fn or training.loss_fn)

    def sharpness(self, training: Training, loss_fn: LossFn | None = None) -> float:
        """The top eigenvalue of that Hessian."""
        return float(self.hessian(training, loss_fn).top(tol=self.tol).values[0])


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


DIGITS = Recipe("mnist_5k", 4000, 1000, hidden=(200, 200))
"""The laptop's: the real MNIST digits that a package carries, and a fully connected network."""
CIFAR_TENTH = Recipe("cifar10", 5000, 500, stride=2, lr=0.1)
"""The desktop's: a tenth of CIFAR-10, and a small wide residual network."""
CIFAR = Recipe("cifar10", 50_000, 10_000, depth=16, width=8, augment=True, epochs=100, lr=0.1)
"""The paper's: WRN-16-8 on all of CIFAR-10."""
CIFAR_FAST = Recipe(
    "cifar10",
    50_000,
    10_000,
    standardize="patches",
    groups=(64, 128, 256),
    augment=True,
    shift=2,
    epochs=30,
    batch=256,
    lr=0.2,
    nesterov=True,
    bfloat16=True,
)
"""All of CIFAR-10 and a small network that learns it fast."""
