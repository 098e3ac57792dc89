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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import models, text
from sam_lab.experiments import at_the_edge
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.statistics import each_seed, late_median, late_width
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
# Network, text and minibatch of the paper's code, with its learning rate and radius in the grid.
PAPER = Config(
    data="shakespeare",
    layers=6,
    width=128,
    heads=8,
    key=32,
    length=64,
    batch=128,
    fixed=512,
    steps=10_000,
    every=100,
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


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One run; the columns of `EdgeRecorder` on the fixed batch, and on the current one."""
    model, loss, fixed, draw = problem(config, seed, device)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=setting["lr"]), setting["rho"], model)
    batch = draw()

    def current() -> Tensor:
        return loss(*batch)

    record = EdgeRecorder(sam, lambda: loss(*fixed), every=config.every, tol=config.tol)
    record_batch = EdgeRecorder(sam, current, every=config.every, tol=config.tol)
    for step in range(config.steps):
        record()
        record_batch()
        sam.step(current)
        batch = draw()
        progress(step + 1, config.steps)
    record(now=True)
    record_batch(now=True)
    return record.columns | {PREFIX + name: kept for name, kept in record_batch.columns.items()}


# --- what the runs decide ------------------------------------------------------------------------


def batch_ratio(run: Run) -> np.ndarray:
    """Sharpness over edge, both of the current minibatch, at each measurement."""
    return run[PREFIX + "sharpness"] / run[PREFIX + "sam_edge"]


def _mean(values: list[float]) -> float:
    """Of quotients: twice as much and half as much cancel."""
    return float(np.exp(np.mean(np.log(values))))


def _overall(
    statistic: Callable[[Run], float], sam_only: bool = False
) -> Callable[[Result], list[float]]:
    """For each seed, the mean of a statistic over its runs, or over those of SAM."""

    def runs(result: Result, seed: int) -> list[Run]:
        if sam_only:
            return at_the_edge.perturbed_runs(result, seed)
        return [run for run in result.runs if run.seed == seed]

    return each_seed(lambda result, seed: _mean([statistic(run) for run in runs(result, seed)]))


def _start(result: Result, seed: int) -> float:
    return float(at_the_edge.ratio(at_the_edge.descent(result, seed, min(result.config["lrs"])))[0])


def _beside_descent(result: Result, seed: int) -> float:
    quotients = [
        late_median(at_the_edge.ratio(run))
        / late_median(at_the_edge.ratio(at_the_edge.descent(result, seed, run.settings["lr"])))
        for run in at_the_edge.perturbed_runs(result, seed)
    ]
    return max(quotients, key=lambda quotient: abs(np.log(quotient)))


EXPERIMENT = Experiment(
    name="sam_edge_transformer",
    title="SAM at its edge: a Transformer language model, minibatches",
    source="Long & Bartlett 2024 (arXiv:2309.12488), tiny_shakespeare experiments",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=at_the_edge.grid,
    run=run,
    claims=[
        *at_the_edge.claims(),
        Claim(
            "sam-as-sgd",
            "SAM is as near to its edge as SGD of the same learning rate is to 2/lr, whatever "
            "minibatches do to either: quotient of the second-half medians of sharpness over "
            "edge, at the setting where it is farthest from 1",
            "control",
            "",
            each_seed(_beside_descent),
            Criterion(0.8, 1.25),
        ),
        Claim(
            "starts-beyond",
            "The Transformer starts beyond the edge, so that there is nothing to arrive at: "
            "sharpness over 2/lr before the first step, at the smallest learning rate",
            "control",
            "",
            each_seed(_start),
            Criterion(low=1.0),
        ),
        Claim(
            "batch-scatters",
            "On the current batch, sharpness over edge scatters more than on the fixed one: "
            "quotient of the widths from the 10th to the 90th percentile in the second half, "
            "geometric mean over settings",
            "control",
            "",
            _overall(lambda run: late_width(batch_ratio(run)) / late_width(at_the_edge.ratio(run))),
            Criterion(low=1.2),
        ),
        Claim(
            "batch-sharper",
            "The current batch is sharper than the fixed one, as the largest eigenvalue of a noisy "
            "matrix is on average above that of its mean: quotient of the second-half medians of "
            "sharpness, geometric mean over settings",
            "control",
            "",
            _overall(
                lambda run: late_median(run[PREFIX + "sharpness"]) / late_median(run["sharpness"])
            ),
            Criterion(low=1.02),
        ),
        Claim(
            "batch-edge-higher",
            "The current batch's gradient is longer by its noise, which raises SAM's edge too: "
            "quotient of the second-half medians of the edge, geometric mean over the settings of "
            "SAM",
            "control",
            "",
            _overall(
                lambda run: late_median(run[PREFIX + "sam_edge"]) / late_median(run["sam_edge"]),
                True,
            ),
            Criterion(low=1.05),
        ),
        Claim(
            "batch-reads-alike",
            "What noise does to sharpness and edge nearly cancels in SAM's ratio of the two: that "
            "on the current batch over that on the fixed one, second-half medians, geometric mean "
            "over the settings of SAM",
            "control",
            "",
            _overall(
                lambda run: late_median(batch_ratio(run)) / late_median(at_the_edge.ratio(run)),
                True,
            ),
            Criterion(0.9, 1.1),
        ),
    ],
)
