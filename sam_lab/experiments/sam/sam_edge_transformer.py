r"""SAM at its edge, task (c) of Long & Bartlett: a Transformer language model with minibatches.

Next-character prediction on real text: SAM around plain SGD, a fresh random minibatch for every
step, the same in all runs of one seed. The loss is the cross-entropy in nats, mean over tokens.

With minibatches "the Hessian" and "the gradient" are two questions each. Every run is therefore
measured twice, at the same steps:

* on a large *fixed* batch (columns without a prefix): the training loss, but for the sampling error
  of that batch. Its edge has the norm of its own gradient in it, although SAM perturbs along the
  minibatch's, which is longer by the minibatch's noise;
* on the *current* minibatch (columns ``batch_...``), whose gradient and Hessian the step uses; this
  is what the paper's code does. The step after it is on other data: to be above this edge once
  need not make the iterate swing ever wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import models, text
from sam_lab.experiments.lab.claims import CONTROL, claim
from sam_lab.experiments.lab.cost import gradient_flops
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns
from sam_lab.experiments.lab.setup import Setup
from sam_lab.experiments.lab.statistics import second_half_median, second_half_width
from sam_lab.experiments.sam import at_the_edge
from sam_lab.experiments.sam.at_the_edge import descent, perturbed, ratio
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM

PREFIX = "batch_"  # of the columns that are measured on the current minibatch

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: the text.
        layers, width, heads, key: of the Transformer.
        length: characters of a window.
        batch: windows of a minibatch.
        fixed: windows of the fixed batch.
        lrs, rhos, steps, every, tol: see `at_the_edge.Grid`.
    """

    data: str = "python_reference"
    layers: int = 2
    width: int = 32
    heads: int = 4
    key: int = 8
    length: int = 32
    batch: int = 16
    fixed: int = 64
    lrs: tuple[float, ...] = (0.1, 0.4)
    rhos: tuple[float, ...] = (0.0, 0.03, 0.1)
    steps: int = 400
    every: int = 16
    tol: float = 2e-2


LAPTOP = Config()
DESKTOP = Config(
    data="shakespeare",
    layers=3,
    width=64,
    key=16,
    length=64,
    rhos=(0.0, 0.1),
    steps=1200,
    every=60,
)
# Network, text, minibatch, learning rate and radius of the paper's code. A seed takes one core two
# to three hours, most of them for measuring.
PAPER = Config(
    data="shakespeare",
    layers=6,
    width=128,
    heads=8,
    key=32,
    length=64,
    batch=128,
    fixed=512,
    lrs=(0.1,),
    rhos=(0.0, 0.1),
    steps=800,
    every=40,
    tol=5e-2,
)


def problem(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Batch, Callable[[], Batch]]:
    """What one run consists of, all of it from `seed`.

    Returns:
        The network; its loss on given inputs and targets; the fixed batch; and a function that
        draws the next minibatch.

    Raises:
        ValueError: an unknown text, or a network that cannot be built.
    """
    tokens = text.load(config.data, device=device).tokens
    model = models.transformer(
        text.VOCAB,
        config.width,
        config.layers,
        config.heads,
        config.length,
        key=config.key,
        seed=seed,
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)
    fixed = text.windows(tokens, config.length, config.fixed, generator)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def draw() -> Batch:
        return text.windows(tokens, config.length, config.batch, generator)

    return model, loss, fixed, draw


def run(config: Config, cell: Cell) -> Columns:
    """One run; the columns of `EdgeRecorder` on the fixed batch, and on the current one."""
    model, loss, fixed, draw = problem(config, cell.seed, cell.device)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=cell["lr"]), cell["rho"], model)
    batch: Batch

    def current() -> Tensor:
        return loss(*batch)

    record = EdgeRecorder(sam, lambda: loss(*fixed), every=config.every, tol=config.tol)
    record_batch = EdgeRecorder(sam, current, every=config.every, tol=config.tol)
    begun = at_the_edge.take_up(cell, sam, record, record_batch)
    for _ in range(begun + 1):  # what has been trained on is drawn again and passed over
        batch = draw()
    for step in range(begun, config.steps):
        record()
        record_batch()
        at_the_edge.keep(cell, sam, record, record_batch)
        sam.step(current)
        batch = draw()
        cell.tick(step + 1, config.steps)
    record(now=True)
    record_batch(now=True)
    return record.columns | {PREFIX + name: kept for name, kept in record_batch.columns.items()}


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed."""
    model = models.transformer(
        text.VOCAB, config.width, config.layers, config.heads, config.length, key=config.key
    )
    window = gradient_flops(model, torch.zeros(1, config.length, dtype=torch.int64))
    batches = config.batch + config.fixed  # each measurement is made on both
    return at_the_edge.cost(config, config.batch * window, batches * window)


SETUP = Setup(
    "the paper's code",
    {
        "data": "shakespeare",
        "layers": 6,
        "heads": 8,
        "key": 32,
        "width": 128,
        "length": 64,
        "batch": 128,
    },
)


# --- what the runs decide ------------------------------------------------------------------------


def batch_ratio(run: Run) -> np.ndarray:
    """Sharpness over edge, both of the current minibatch, at each measurement."""
    return run[PREFIX + "sharpness"] / run[PREFIX + "sam_edge"]


def _over_fixed(run: Run, name: str) -> float:
    """A column's second-half median on the current batch, over that on the fixed one."""
    return second_half_median(run[PREFIX + name]) / second_half_median(run[name])


def _mean(quotients: Iterable[float]) -> float:
    """The geometric mean: twice as much and half as much cancel."""
    return float(np.exp(np.mean(np.log(list(quotients)))))


@claim(CONTROL, 0.8, 1.25, domain="positive")
def sam_as_sgd(runs: SeedRuns) -> float:
    """With minibatches SAM is as near to its edge as SGD of the same learning rate is to 2/lr:
    SAM's sharpness over edge divided by SGD's, medians over the second half of training, at the
    setting where the quotient is farthest from 1"""
    quotients = [
        second_half_median(ratio(run))
        / second_half_median(ratio(descent(runs, run.settings["lr"])))
        for run in perturbed(runs)
    ]
    return max(quotients, key=lambda quotient: abs(np.log(quotient)))


@claim(CONTROL, low=1.0, domain="positive")
def starts_beyond(runs: SeedRuns) -> float:
    """The Transformer starts beyond the edge, so that there is nothing to arrive at from below:
    sharpness over 2/lr before the first step, at the smallest learning rate"""
    return float(ratio(descent(runs, min(runs.config["lrs"])))[0])


@claim(CONTROL, low=1.2, domain="positive")
def batch_scatters(runs: SeedRuns) -> float:
    """On the current batch, sharpness over edge scatters more than on a fixed large one: its width
    on the current batch over that on the fixed one, from the 10th to the 90th percentile in the
    second half of training, geometric mean over settings"""
    return _mean(
        second_half_width(batch_ratio(run)) / second_half_width(ratio(run)) for run in runs.runs
    )


@claim(CONTROL, low=1.02, domain="positive")
def batch_sharper(runs: SeedRuns) -> float:
    """The loss is sharper on the current batch than on a fixed large one, as the largest eigenvalue
    of a noisy matrix is on average above that of its mean: sharpness on the current batch over that
    on the fixed one, medians over the second half of training, geometric mean over settings"""
    return _mean(_over_fixed(run, "sharpness") for run in runs.runs)


@claim(CONTROL, low=1.05, domain="positive")
def batch_edge_higher(runs: SeedRuns) -> float:
    """The current batch's gradient is longer than that of a fixed large batch by its noise, and so
    SAM's edge is higher on it: edge on the current batch over that on the fixed one, medians over
    the second half of training, geometric mean over the settings of SAM"""
    return _mean(_over_fixed(run, "sam_edge") for run in perturbed(runs))


@claim(CONTROL, 0.9, 1.1, domain="positive")
def batch_reads_alike(runs: SeedRuns) -> float:
    """The current batch raises SAM's sharpness and SAM's edge by nearly the same factor: sharpness
    over edge on the current batch divided by that on a fixed large one, medians over the second
    half of training, geometric mean over the settings of SAM"""
    return _mean(
        second_half_median(batch_ratio(run)) / second_half_median(ratio(run))
        for run in perturbed(runs)
    )


EXPERIMENT = Experiment(
    name="sam_edge_transformer",
    title="SAM at its edge: a Transformer language model, minibatches",
    source="Long & Bartlett 2024 (arXiv:2309.12488), tiny_shakespeare experiments",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=at_the_edge.grid,
    run=run,
    claims=[
        *at_the_edge.CLAIMS,
        sam_as_sgd,
        starts_beyond,
        batch_scatters,
        batch_sharper,
        batch_edge_higher,
        batch_reads_alike,
    ],
    setup=SETUP,
    cost=cost,
)
