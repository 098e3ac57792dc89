r"""Is SAM flatter because of its perturbation, or because its step is larger?

Along an eigenvector of curvature $\lambda$ SAM acts like gradient descent with the learning rate
$\eta\,(1 + \rho\lambda/\|g\|)$. A larger learning rate alone flattens too: its edge is lower. So
that SAM is flatter than gradient descent *of the same learning rate* does not show that its
perturbation was needed. This is the missing null:

1. gradient descent with the learning rate $\eta$;
2. SAM with the same $\eta$ and a radius $\rho$; its late edge is the median of the SAM edge over
   the last tenth of its measurements;
3. gradient descent with the larger learning rate $\eta'$ for which $2/\eta'$ *is* that late edge,
   from the same initial weights.

The third run goes on until its training loss is half of SAM's closing loss, at most for as many
steps as SAM. All are compared at equal training loss, averaged over five measurements around it
(see `at_the_edge.at_equal_loss`). The errors are those on 1,000 images that no run has seen.

The task is that of `sam_edge_mlp`, at laptop scale with its smallest learning rate, where gradient
descent stays far below its own edge, and with its smallest and its largest radius.

The criteria were set before the first run of this experiment. Two things had been seen: the runs of
`sam_edge_mlp`, and the training loss (no sharpness, no error) of gradient descent with learning
rates up to 4.5 on two other seeds, which was tried to see whether it diverges. It does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from sam_lab import data
from sam_lab.experiments.lab.claims import OURS, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.experiments.sam import at_the_edge, sam_edge_mlp
from sam_lab.experiments.sam.at_the_edge import at_equal_loss, at_loss, closing
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM

__all__ = ["at_level", "descent", "larger", "perturbed", "steps_to"]

PREFIX = "larger_"  # of the columns of gradient descent with the larger learning rate


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        task: network, data, learning rates, radii (the first is 0) and steps.
        enough: the run with the larger learning rate ends where its loss is so many times SAM's.
        finer: how many times as often it is measured.
    """

    task: sam_edge_mlp.Config
    enough: float = 0.5
    finer: int = 4


LAPTOP = Config(
    replace(sam_edge_mlp.LAPTOP, lrs=(0.4,), rhos=(0.0, 0.02, 0.1), every=24),
)
PAPER = Config(sam_edge_mlp.PAPER)


def settings(config: Config) -> list[Setting]:
    """Every learning rate with every radius."""
    return at_the_edge.grid(config.task)


def problem(
    config: Config, seed: int, device: torch.device | str
) -> tuple[torch.nn.Module, Closure, Callable[[], float]]:
    """The network, its training loss, and a function that measures its test error in %."""
    task = config.task
    model, loss = sam_edge_mlp.problem(task, seed, device)
    images = data.load(task.data, train=task.images, seed=seed, device=device)
    x = images.x_test.flatten(1) - images.x.flatten(1).mean(0)

    @torch.no_grad()
    def error() -> float:
        return float(100 * (model(x).argmax(1) != images.y_test).double().mean())

    return model, loss, error


def _train(
    config: Config, cell: Cell, lr: float, rho: float, every: int, until: float = 0.0
) -> Columns:
    """A run from the initial weights of the cell's seed, until the loss is `until` or less."""
    model, closure, error = problem(config, cell.seed, cell.device)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), rho, model)
    record = EdgeRecorder(sam, closure, every=every, tol=config.task.tol)
    errors: list[float] = []
    for step in range(config.task.steps + 1):
        if step % every == 0:
            record()
            errors.append(error())
            if record["loss"][-1] <= until:
                break
        if step < config.task.steps:
            sam.step(closure)
            cell.tick(step + 1, config.task.steps)
    return {**record.columns, "test_error": errors}


def run(config: Config, cell: Cell) -> Columns:
    """Gradient descent (rho = 0), or SAM and then gradient descent with the larger learning rate.

    Columns: those of `EdgeRecorder`, and ``test_error`` in %; for SAM also, with the prefix
    ``larger_``, those of the other run, and ``larger_lr``, of length 1.

    Raises:
        FloatingPointError: a run has diverged.
    """
    every = config.task.every
    columns = _train(config, cell, cell["lr"], cell["rho"], every)
    if not cell["rho"]:
        return columns
    edge = np.array(columns["sam_edge"])
    lr = 2 / float(np.median(edge[-max(len(edge) // 10, 1) :]))
    until = config.enough * float(np.median(columns["loss"][-at_the_edge.NEAR :]))
    other = _train(config, cell, lr, 0.0, max(every // config.finer, 1), until)
    return {**columns, **{PREFIX + name: kept for name, kept in other.items()}, "larger_lr": [lr]}


# --- what a run says -----------------------------------------------------------------------------


def larger(run: Run) -> Run:
    """The run of gradient descent with the larger learning rate that belongs to a run of SAM."""
    columns = {
        name.removeprefix(PREFIX): values
        for name, values in run.columns.items()
        if name.startswith(PREFIX)
    }
    return Run({"lr": run.value("larger_lr"), "rho": 0.0}, run.seed, columns)


def descent(runs: SeedRuns, run: Run) -> Run:
    """The run of gradient descent with the same learning rate."""
    return at_the_edge.descent(runs, run.settings["lr"])


def perturbed(runs: SeedRuns) -> list[Run]:
    """The runs of SAM."""
    return at_the_edge.perturbed(runs)


def at_level(run: Run, other: Run, name: str) -> tuple[float, float]:
    """Means of a column of two runs where their training losses are equal."""
    level = max(closing(run, "loss"), closing(other, "loss"))
    one, two = (float(at_loss(each, level, name).mean()) for each in (run, other))
    return one, two


def steps_to(run: Run, level: float) -> float:
    """The step of the first measurement with that loss or less; infinite if there is none."""
    there = run["step"][run["loss"] <= level]
    return float(there[0]) if len(there) else np.inf


def _pace(run: Run) -> float:
    """Steps of the larger learning rate to SAM's closing loss, over the steps of SAM."""
    return steps_to(larger(run), closing(run, "loss")) / float(run["step"][-1])


def _at_its_edge(run: Run) -> float:
    """Sharpness over 2/lr of the larger learning rate, around SAM's closing loss."""
    other = larger(run)
    sharpness, edge = (
        at_loss(other, closing(run, "loss"), name) for name in ("sharpness", "gd_edge")
    )
    return float(np.exp(np.log(sharpness / edge).mean()))


def _gain(run: Run, other: Run) -> float:
    """By how many points the test error of the first is larger, at equal training loss."""
    one, two = at_level(run, other, "test_error")
    return one - two


# --- what the runs decide ------------------------------------------------------------------------


@claim(OURS, high=0.9, domain="positive")
def sam_flatter_than_larger_step(runs: SeedRuns) -> float:
    """At equal training loss SAM is flatter than gradient descent with the larger learning rate
    whose edge 2/lr is SAM's late edge: SAM's sharpness over gradient descent's, at the setting
    where it is largest"""
    return max(at_equal_loss(run, larger(run)) for run in perturbed(runs))


@claim(OURS, low=0.9, domain="positive", headline=True)
def larger_step_is_as_flat(runs: SeedRuns) -> float:
    """At equal training loss gradient descent with the larger learning rate whose edge 2/lr is
    SAM's late edge is as flat as SAM, or flatter: SAM's sharpness over gradient descent's, at the
    setting where it is smallest"""
    return min(at_equal_loss(run, larger(run)) for run in perturbed(runs))


@claim(OURS, high=0.9, domain="positive")
def larger_step_flattens(runs: SeedRuns) -> float:
    """At equal training loss a larger learning rate alone makes gradient descent flatter: sharpness
    with the learning rate whose 2/lr is SAM's late edge over sharpness with SAM's own learning
    rate, at the setting where it is largest"""
    return max(at_equal_loss(larger(run), descent(runs, run)) for run in perturbed(runs))


@claim(OURS, 0.9, 1.15, domain="positive")
def larger_step_at_its_edge(runs: SeedRuns) -> float:
    """Gradient descent with the larger learning rate is at its own edge where its training loss is
    SAM's closing loss: sharpness over 2/lr, at the setting where it is farthest from 1"""
    return farthest_from_one(_at_its_edge(run) for run in perturbed(runs))


@claim(OURS, high=0.5, domain="positive")
def larger_step_is_faster(runs: SeedRuns) -> float:
    """Gradient descent with the larger learning rate whose edge 2/lr is SAM's late edge reaches
    SAM's closing training loss in at most half of SAM's steps: its steps over SAM's, at the setting
    where it is largest"""
    return max(_pace(run) for run in perturbed(runs))


@claim(OURS, high=0.0, unit="points")
def sam_generalizes_better_than_descent(runs: SeedRuns) -> float:
    """At equal training loss SAM has a smaller test error than gradient descent of the same
    learning rate: SAM's test error less gradient descent's, mean over settings"""
    return float(np.mean([_gain(run, descent(runs, run)) for run in perturbed(runs)]))


@claim(OURS, high=0.0, unit="points")
def sam_generalizes_better_than_larger_step(runs: SeedRuns) -> float:
    """At equal training loss SAM has a smaller test error than gradient descent with the larger
    learning rate whose edge 2/lr is SAM's late edge: SAM's test error less gradient descent's, mean
    over settings"""
    return float(np.mean([_gain(run, larger(run)) for run in perturbed(runs)]))


EXPERIMENT = Experiment(
    name="larger_step",
    title="The control for SAM's flatness: gradient descent with a larger learning rate",
    source="this book, after Long & Bartlett 2024 (arXiv:2309.12488), formula of the SAM edge",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        sam_flatter_than_larger_step,
        larger_step_is_as_flat,
        larger_step_flattens,
        larger_step_at_its_edge,
        larger_step_is_faster,
        sam_generalizes_better_than_descent,
        sam_generalizes_better_than_larger_step,
    ],
)
