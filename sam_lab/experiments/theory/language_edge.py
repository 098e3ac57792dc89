r"""Chapter 4's language model once more, with the edge that belongs to minibatches.

In task (c) of Long & Bartlett (`sam_edge_transformer`), a Transformer on minibatches, the sharpness
lies near the edges 2/lr and `sam_edge` without being on them, for SGD and for SAM, and on the
current batch otherwise than on a fixed one. Both edges are those of one loss. Here the same runs
are measured in the second half of training by what a step on a minibatch does to the loss of that
minibatch, `recorder.batch_sharpness`: were it above 2/lr, steps would on average raise it.

The criteria were set before the first run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sam_lab import text
from sam_lab.experiments.lab.claims import OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.sam import at_the_edge, sam_edge_transformer
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM

__all__ = ["over_batch_edge", "over_own_edge"]

# Its abstract: what stabilises at 2/lr is batch sharpness, and the largest eigenvalue lies below.
ANDREYEV = Source("Andreyev & Beneventano 2024", "paper")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        task: the language model, with its learning rates, radii (the first is 0) and steps.
        moments: measurements, evenly spaced from half of the steps on.
        drawn: minibatches in a measurement of the batch sharpness.
    """

    task: sam_edge_transformer.Config
    moments: int = 4
    drawn: int = 10


LAPTOP = Config(replace(sam_edge_transformer.LAPTOP, rhos=(0.0, 0.1)))
PAPER = Config(sam_edge_transformer.PAPER, moments=16, drawn=32)


def settings(config: Config) -> list[Setting]:
    """Every learning rate with every radius."""
    return at_the_edge.grid(config.task)


def run(config: Config, cell: Cell) -> Columns:
    """One run; the columns of `EdgeRecorder` on the fixed batch, with those of batches."""
    task = config.task
    model, loss, fixed, draw = sam_edge_transformer.problem(task, cell.seed, cell.device)
    tokens = text.load(task.data, device=cell.device).tokens
    generator = torch.Generator().manual_seed(10 * cell.seed + 3)

    def batches() -> Iterable[Closure]:
        for _ in range(config.drawn):
            windows = text.windows(tokens, task.length, task.batch, generator)
            yield partial(loss, *windows)

    sam = SAM(torch.optim.SGD(model.parameters(), lr=cell["lr"]), cell["rho"], model)
    record = EdgeRecorder(sam, lambda: loss(*fixed), tol=task.tol, batches=batches)
    half = task.steps // 2
    every = max(half // config.moments, 1)
    for step in range(1, task.steps + 1):
        batch = draw()

        def current(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            return loss(*batch)

        sam.step(current)
        if step > half and (step - half) % every == 0:
            record(now=True)
        cell.tick(step, task.steps)
    return record.columns


# --- what the runs decide ----------------------------------------------------------------------


def over_batch_edge(run: Run) -> float:
    """Batch sharpness over 2/lr, geometric mean over the measurements."""
    return float(np.exp(np.log(run["batch_sharpness"] / run["gd_edge"]).mean()))


def over_own_edge(run: Run) -> float:
    """Sharpness of the fixed batch over the optimizer's edge for one loss, geometric mean."""
    return float(np.exp(np.log(run["sharpness"] / run["sam_edge"]).mean()))


def _mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def _sgd(runs: SeedRuns) -> list[Run]:
    return runs.all(rho=0.0)


def _sam(runs: SeedRuns) -> list[Run]:
    return at_the_edge.perturbed(runs)


@claim(ANDREYEV, 0.8, 1.2, domain="positive", headline=True)
def sgd_batch_sharpness(runs: SeedRuns) -> float:
    """On a Transformer language model the batch sharpness of SGD is at 2/lr in the second half of
    training: over 2/lr, at the learning rate where it is farthest from 1"""
    return max(map(over_batch_edge, _sgd(runs)), key=lambda value: abs(np.log(value)))


@claim(OURS, 0.8, 1.2, domain="positive")
def sam_batch_sharpness(runs: SeedRuns) -> float:
    """On a Transformer language model the batch sharpness along SAM's gradient is at 2/lr in the
    second half of training: over 2/lr, at the learning rate where it is farthest from 1"""
    return max(map(over_batch_edge, _sam(runs)), key=lambda value: abs(np.log(value)))


@claim(OURS, high=1.1, domain="positive")
def steps_lower_their_own_loss(runs: SeedRuns) -> float:
    """Where the sharpness of a Transformer language model lies at its edge or above, steps on
    minibatches still lower the loss of their own batch: batch sharpness over 2/lr in the second
    half of training, at the setting where it is largest"""
    return max(map(over_batch_edge, runs.runs))


@claim(OURS, 0.85, 1.18, domain="positive")
def sam_reads_as_sgd(runs: SeedRuns) -> float:
    """By the batch sharpness SAM is as near to its edge as SGD: batch sharpness over 2/lr of SAM
    over that of SGD, geometric mean over learning rates"""
    return _mean(map(over_batch_edge, _sam(runs))) / _mean(map(over_batch_edge, _sgd(runs)))


EXPERIMENT = Experiment(
    name="language_edge",
    title="The edge with minibatches on a Transformer language model",
    source="task (c) of Long & Bartlett 2024 (arXiv:2309.12488), measured as by Andreyev & "
    "Beneventano 2024 (arXiv:2412.20553)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[sgd_batch_sharpness, sam_batch_sharpness, steps_lower_their_own_loss, sam_reads_as_sgd],
)
