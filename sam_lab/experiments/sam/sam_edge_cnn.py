r"""SAM at its edge, task (b) of Long & Bartlett: a convolutional network on 1,000 colour images.

The paper's network: twice a 3x3 convolution, ReLU, layer norm over the channels and 2x2
max-pooling, then one linear layer; Glorot-normal initialisation. The 1,000 images are the one
batch. The mean image is taken from them and their scale is kept, as in the paper's code. (To the
first layer the scale matters little: the layer norm behind it takes it out again, but for the
biases.) At laptop scale they are 32x32 patches of two photographs, averaged down to 8x8.

The loss is the mean over examples *and classes* of (logit - one-hot)^2; see `sam_edge_mlp` for what
that means for learning rates.

Two things to know when reading the runs. This network is sharp at its initialisation, before it has
learned anything: with a large learning rate gradient descent starts far above 2/lr, is thrown to a
flatter place within a few steps, and climbs from there. And where the ReLU leaves next to nothing
of a pixel, the layer norm divides by next to nothing: now and then an initialisation is ten times
sharper than the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import data, models
from sam_lab.experiments.lab.cost import gradient_flops
from sam_lab.experiments.lab.experiment import Experiment
from sam_lab.experiments.lab.setup import Setup
from sam_lab.experiments.sam import at_the_edge
from sam_lab.objective import Closure


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, images: the data set, and how many images are the (one) batch.
        shrink: side of the squares of pixels that are averaged into one; 1 keeps the images.
        widths: channels of the convolutions.
        chunk: images that pass through the network together: a matter of speed alone.
        lrs, rhos, steps, every, tol: see `at_the_edge.Grid`.
    """

    data: str = "photos"
    images: int = 1000
    shrink: int = 4
    widths: tuple[int, ...] = (8, 16)
    chunk: int = 1000
    lrs: tuple[float, ...] = (0.05, 0.15)
    rhos: tuple[float, ...] = (0.0, 0.03, 0.1)
    steps: int = 420
    every: int = 30
    tol: float = 1e-2


LAPTOP = Config()
# The paper's network and data; the larger learning rate puts 2/lr near the sharpness at the start.
DESKTOP = Config(
    data="cifar10",
    shrink=1,
    widths=(16, 32),
    chunk=100,
    lrs=(0.001, 0.004),
    rhos=(0.0, 0.03),
    steps=300,
    every=25,
    tol=2e-2,
)
# With a learning rate of 0.01 gradient descent diverged (seed 0).
PAPER = replace(DESKTOP, lrs=(0.002, 0.004), steps=3000, every=15, tol=1e-2)


def problem(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Closure]:
    """The network, initialised from `seed`, and its loss over the whole data.

    Raises:
        ValueError: an unknown data set, more images than there are, or a size that the pooling
            does not divide.
    """
    images = data.load(config.data, train=config.images, seed=seed, device=device)
    x = F.avg_pool2d(images.x, config.shrink)
    # Channels last, since the layer norms run over them: a third less time.
    x = (x - x.mean(0)).contiguous(memory_format=torch.channels_last)
    target = data.one_hot(images.y, images.classes)
    model = models.cnn(
        x.shape[1:],
        images.classes,
        "relu",
        widths=config.widths,
        pooling="max",
        norm="layer",
        init="glorot",
        seed=seed,
        device=device,
    )
    chunks = list(zip(x.split(config.chunk), target.split(config.chunk), strict=True))

    def closure() -> Tensor:
        # On large images small chunks, which stay in the processor's cache, halve the time.
        errors = [F.mse_loss(model(part), wanted, reduction="sum") for part, wanted in chunks]
        return torch.stack(errors).sum() / target.numel()

    return model, closure


run = at_the_edge.full_batch(problem)


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed."""
    inputs = F.avg_pool2d(torch.zeros(1, *data.SHAPES[config.data]), config.shrink)
    model = models.cnn(
        inputs.shape[1:], data.CLASSES, widths=config.widths, pooling="max", norm="layer"
    )
    gradient = config.images * gradient_flops(model, inputs)
    return at_the_edge.cost(config, gradient, gradient)


SETUP = Setup(
    "the paper's code", {"data": "cifar10", "images": 1000, "shrink": 1, "widths": (16, 32)}
)

EXPERIMENT = Experiment(
    name="sam_edge_cnn",
    title="SAM at its edge: a convolutional network on 1,000 colour images, full batch",
    source="Long & Bartlett 2024 (arXiv:2309.12488), CIFAR-10 experiments",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=at_the_edge.grid,
    run=run,
    claims=at_the_edge.CLAIMS,
    setup=SETUP,
    cost=cost,
)
