r"""SAM at its edge, task (a) of Long & Bartlett: a fully connected network, full batch.

ReLU network, Glorot-normal initialisation, on images of digits from which the mean image is taken,
trained by full-batch gradient descent and full-batch SAM.

The loss is the mean over examples *and classes* of (logit - one-hot)^2, as in the paper's code.
With 10 classes that is 1/5 of the loss of Cohen et al. (half the sum over classes, mean over
examples): its Hessian is 5 times smaller, and a learning rate here does what a learning rate 5
times smaller does there. Products lr x sharpness mean the same in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
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
        hidden: widths of the hidden layers.
        activation: between the layers.
        lrs, rhos, steps, every, tol: see `at_the_edge.Grid`.
    """

    data: str = "mnist_5k"
    images: int = 500
    hidden: tuple[int, ...] = (64, 64, 64)
    activation: str = "relu"
    lrs: tuple[float, ...] = (0.4, 0.8, 1.4)
    rhos: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1)
    steps: int = 1200
    every: int = 12
    tol: float = 1e-2


LAPTOP = Config()
DESKTOP = Config(
    data="mnist",
    images=5000,
    hidden=(200, 200, 200),
    lrs=(0.4, 1.0),
    rhos=(0.0, 0.03, 0.1),
    steps=400,
    every=10,
)
# The paper's network and data. The learning rates and radii of its figures are not in its code;
# this rate is large enough to reach the edge, from a start beyond 2/lr down below it, up again, and
# on along it for a hundred measurements.
PAPER = Config(
    data="mnist",
    images=60_000,
    hidden=(1000, 1000, 1000),
    lrs=(1.0,),
    rhos=(0.0, 0.05),
    steps=300,
    every=2,
)


def problem(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Closure]:
    """The network, initialised from `seed`, and its loss over the whole data.

    Raises:
        ValueError: an unknown data set or activation, or more images than there are.
    """
    images = data.load(config.data, train=config.images, seed=seed, device=device)
    x = images.x.flatten(1)
    x = x - x.mean(0)
    target = data.one_hot(images.y, images.classes)
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(sizes, config.activation, init="glorot", seed=seed, device=device)
    return model, lambda: F.mse_loss(model(x), target)


run = at_the_edge.full_batch(problem)


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed."""
    inputs = torch.zeros(1, math.prod(data.SHAPES[config.data]))
    model = models.mlp((inputs.shape[1], *config.hidden, data.CLASSES), config.activation)
    gradient = config.images * gradient_flops(model, inputs)
    return at_the_edge.cost(config, gradient, gradient)


SETUP = Setup(
    "the paper's code",
    {"data": "mnist", "images": 60_000, "hidden": (1000, 1000, 1000), "activation": "relu"},
)

EXPERIMENT = Experiment(
    name="sam_edge_mlp",
    title="SAM at its edge: a fully connected network on digits, full batch",
    source="Long & Bartlett 2024 (arXiv:2309.12488), MNIST experiments",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=at_the_edge.grid,
    run=run,
    claims=at_the_edge.CLAIMS,
    setup=SETUP,
    cost=cost,
)
