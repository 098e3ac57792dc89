r"""What the three tasks of Long & Bartlett have in common: the grid, the run, and the claims.

Each task is a network, data and a loss; it is trained with plain gradient descent (rho = 0) and
with SAM, over a grid of learning rates and radii, and followed by `EdgeRecorder`. The claims are
the same for all, so that a task is its own file and no more than what is its own.

Where a claim speaks of all settings, its statistic is that of the worst one. "After arrival" is at
the latest from half time on: a run whose sharpness never comes to its edge is judged there.

Sharpness is compared at equal training loss. What such a comparison cannot tell is whether SAM was
needed for it, or only its larger step: `larger_step` has that control.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sam_lab.experiments.lab.claims import CONTROL, NotApplicable, Source, claim
from sam_lab.experiments.lab.cost import measurement
from sam_lab.experiments.lab.experiment import Cell
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import (
    farthest_from_one,
    second_half_median,
    second_half_width,
)
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM
from sam_lab.state import whole_float32

__all__ = [
    "CLAIMS",
    "Grid",
    "arrival",
    "at_equal_loss",
    "at_loss",
    "closing",
    "cost",
    "descent",
    "follow",
    "full_batch",
    "grid",
    "keep",
    "perturbed",
    "ratio",
    "take_up",
]

LONG_BARTLETT = Source("Long & Bartlett 2024", "after")
# Statements of the paper that we could not check against its text, and what we add to it.
OURS_AFTER = Source("this book, after Long & Bartlett 2024", "ours")
ARRIVED, LASTING = 0.9, 0.9  # share of the edge, and of the measurements from then on
NEAR = 5  # measurements that are averaged: the last ones, or those nearest to a loss
COMPARABLE = 1.1  # a training loss at most so many times another is comparable or smaller


class Grid(Protocol):
    """What a task's config has, besides its own fields.

    Attributes:
        lrs: learning rates, the smallest first.
        rhos: radii; the first is 0, which is gradient descent.
        steps, every: steps of a run, and from one measurement to the next.
        tol: tolerance on the residual of an eigenpair, relative to the eigenvalue.
    """

    @property
    def lrs(self) -> tuple[float, ...]: ...
    @property
    def rhos(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def tol(self) -> float: ...


def grid(config: Grid) -> list[Setting]:
    """Every learning rate with every radius."""
    return [{"lr": lr, "rho": rho} for lr in config.lrs for rho in config.rhos]


def cost(config: Grid, gradient: float, measured: float) -> float:
    """FLOPs of all settings with one seed.

    Args:
        gradient: FLOPs of a gradient of the loss that is trained on; SAM takes two a step.
        measured: FLOPs of a gradient of the loss of which the sharpness is measured.
    """
    settings = grid(config)
    gradients = sum(2 if setting["rho"] else 1 for setting in settings) * config.steps
    measurements = len(settings) * (config.steps // config.every + 1)
    return gradients * gradient + measurements * measurement(measured)


def follow(
    sam: SAM,
    closure: Closure,
    steps: int,
    every: int,
    tol: float,
    cell: Cell,
) -> Columns:
    """So many steps of SAM on one loss, from the first to the last as `EdgeRecorder` sees them."""
    record = EdgeRecorder(sam, closure, every=every, tol=tol)
    for step in range(take_up(cell, sam, record), steps):
        record()
        keep(cell, sam, record)
        sam.step(closure)
        cell.tick(step + 1, steps)
    record(now=True)
    return record.columns


def keep(cell: Cell, sam: SAM, *records: EdgeRecorder) -> None:
    """Save where a run stands, if it is time to."""
    cell.checkpoints.save(
        "run",
        lambda: {
            "params": [p.detach() for p in sam.params],
            "sam": sam.state_dict(),
            "records": [record.state_dict() for record in records],
        },
    )


def take_up(cell: Cell, sam: SAM, *records: EdgeRecorder) -> int:
    """Go on from where a run was saved, if it was; how many steps it had made or skipped."""
    state = cell.checkpoints.load("run", cell.device)
    if state is None:
        return 0
    with torch.no_grad():
        for p, saved in zip(sam.params, state["params"], strict=True):
            p.copy_(saved)
    sam.load_state_dict(state["sam"])
    for record, saved in zip(records, state["records"], strict=True):
        record.load_state_dict(saved)
    return sam.steps + sam.skipped


def full_batch(
    problem: Callable[..., tuple[nn.Module, Closure]],
) -> Callable[[Any, Cell], Columns]:
    """The `run` of a full-batch task: SAM around plain gradient descent, followed to its end.

    Args:
        problem: ``problem(config, seed, device)`` gives the network and its loss, a closure.

    Returns:
        ``run(config, cell)``, which returns the columns of `EdgeRecorder`.
    """

    def run(config: Grid, cell: Cell) -> Columns:
        model, closure = problem(config, cell.seed, cell.device)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=cell["lr"]), cell["rho"], model)
        with whole_float32():
            return follow(sam, closure, config.steps, config.every, config.tol, cell)

    return run


# --- what a run says -----------------------------------------------------------------------------


def ratio(run: Run) -> np.ndarray:
    """Sharpness over the edge of the run's own optimizer, at each measurement."""
    return run["sharpness"] / run["sam_edge"]


def arrival(run: Run) -> float:
    """The step on which the sharpness came to its edge and, by and large, stayed.

    The first measurement with at least 90% of the edge from which on nine in ten have as much. A
    run that starts beyond its edge and is thrown far below it has not arrived. At least one
    interval between measurements; the last step where the sharpness never gets there.
    """
    there = ratio(run) >= ARRIVED
    onward = np.cumsum(there[::-1])[::-1] / np.arange(len(there), 0, -1)
    candidates = run["step"][there & (onward >= LASTING)]
    first = candidates[0] if len(candidates) else run["step"][-1]
    return float(max(first, run["step"][1]))


def closing(run: Run, name: str) -> float:
    """A column at the end of the run: the median of its last five measurements."""
    return float(np.median(run[name][-NEAR:]))


def at_loss(run: Run, level: float, name: str) -> np.ndarray:
    """A column at the five measurements whose loss is nearest to `level`, in the logarithm.

    One measurement would not do: at the edge loss and sharpness swing from step to step.
    """
    distance = np.abs(np.log(run["loss"] / level))
    return run[name][np.argsort(distance, kind="stable")[:NEAR]]


def at_equal_loss(run: Run, other: Run) -> float:
    """Sharpness of one run over that of another where their training losses are equal.

    That is at the larger of the two closing losses, which both have reached; there the sharpness is
    the geometric mean of the five measurements nearest to that loss.
    """
    level = max(closing(run, "loss"), closing(other, "loss"))
    one, two = (np.log(at_loss(each, level, "sharpness")).mean() for each in (run, other))
    return float(np.exp(one - two))


def descent(runs: SeedRuns, lr: float) -> Run:
    """The run of gradient descent."""
    return runs.one(lr=lr, rho=0.0)


def perturbed(runs: SeedRuns) -> list[Run]:
    """The runs of SAM, those with rho > 0."""
    return [run for run in runs.runs if run.settings["rho"] > 0]


def _beside_descent(runs: SeedRuns) -> list[tuple[Run, Run]]:
    """Each run of SAM with that of gradient descent at the same learning rate."""
    return [(run, descent(runs, run.settings["lr"])) for run in perturbed(runs)]


# --- what the runs decide ------------------------------------------------------------------------


def _after_arrival(run: Run, *names: str) -> list[np.ndarray]:
    """The columns from the arrival on, at the latest from half time on."""
    there = run["step"] >= min(arrival(run), run["step"][-1] / 2)
    return [run[name][there] for name in names]


def _edge_falls(run: Run) -> float:
    (edge,) = _after_arrival(run, "sam_edge")
    tail = edge[-max(len(edge) // 10, 1) :]
    return float(np.median(tail) / edge[0])


def _follows(run: Run) -> float:
    """Slope of log sharpness against log edge, from the arrival on."""
    sharpness, edge = _after_arrival(run, "sharpness", "sam_edge")
    x, y = np.log(edge), np.log(sharpness)
    return float(np.cov(x, y)[0, 1] / np.var(x, ddof=1))


def _better_aligned(run: Run) -> float:
    grad, sam = _after_arrival(run, "grad_align", "sam_align")
    return float(np.mean(sam > grad))


def _alignment_gain(run: Run) -> float:
    grad, sam = _after_arrival(run, "grad_align", "sam_align")
    return float(np.mean(sam - grad))


def _flatter_without_loss(run: Run, base: Run) -> float:
    flatter = closing(run, "sharpness") < closing(base, "sharpness")
    trained = closing(run, "loss") <= COMPARABLE * closing(base, "loss")
    return float(flatter and trained)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@claim(Source("Cohen et al. 2021; Long & Bartlett 2024", "after"), 0.9, 1.15, domain="positive")
def gd_hovers(runs: SeedRuns) -> float:
    """Gradient descent's sharpness hovers at 2/lr: sharpness over 2/lr, median over the second half
    of training, at the largest learning rate"""
    return second_half_median(ratio(descent(runs, max(runs.config["lrs"]))))


@claim(LONG_BARTLETT, 0.9, 1.15, domain="positive", headline=True)
def sam_hovers(runs: SeedRuns) -> float:
    """SAM's sharpness hovers at the SAM edge: sharpness over SAM edge, median over the second half
    of training, at the setting where it is farthest from 1"""
    return farthest_from_one(second_half_median(ratio(run)) for run in perturbed(runs))


@claim(LONG_BARTLETT, high=0.3, domain="positive")
def sam_stays_near(runs: SeedRuns) -> float:
    """SAM's sharpness stays near the SAM edge: width of sharpness over SAM edge in the second half
    of training, from its 10th to its 90th percentile, at the setting where it is largest"""
    return max(second_half_width(ratio(run)) for run in perturbed(runs))


@claim(LONG_BARTLETT, high=0.9, domain="positive", id="below-2/lr")
def below_gd_edge(runs: SeedRuns) -> float:
    """SAM's sharpness lies below 2/lr, the edge of gradient descent: sharpness over 2/lr, median
    over the second half of training, at the setting where it is largest"""
    return max(second_half_median(run["sharpness"] / run["gd_edge"]) for run in perturbed(runs))


@claim(OURS_AFTER, high=0.9, domain="positive", set_after=True, headline=True)
def below_gd_at_equal_loss(runs: SeedRuns) -> float:
    """At equal training loss SAM is flatter than gradient descent of the same learning rate: SAM's
    sharpness over gradient descent's, at the setting where it is largest"""
    return max(at_equal_loss(*pair) for pair in _beside_descent(runs))


@claim(LONG_BARTLETT, low=0.5, domain="share", set_after=True, headline=True)
def flatter_without_loss(runs: SeedRuns) -> float:
    """SAM often ends flatter than gradient descent with a comparable or smaller training loss:
    share of SAM's settings that end less sharp, with at most 1.1 times the training loss of
    gradient descent of the same learning rate after as many steps"""
    return _mean([_flatter_without_loss(*pair) for pair in _beside_descent(runs)])


@claim(LONG_BARTLETT, high=0.8, domain="positive")
def edge_falls(runs: SeedRuns) -> float:
    """The SAM edge falls as the gradient shrinks: median edge of the last tenth of training over
    the edge on arrival, at the setting where it falls least"""
    return max(_edge_falls(run) for run in perturbed(runs))


@claim(CONTROL, 0.75, 1.25, headline=True)
def sharpness_follows(runs: SeedRuns) -> float:
    """As the SAM edge falls the sharpness falls with it, which no fixed quadratic's can: slope of
    log sharpness against log SAM edge after arrival, at the setting where it is farthest from 1"""
    return farthest_from_one(_follows(run) for run in perturbed(runs))


@claim(OURS_AFTER, low=0.75, domain="share")
def sam_better_aligned(runs: SeedRuns) -> float:
    """SAM's gradient is better aligned with the top eigenvector than the plain gradient at the same
    weights: share of the measurements after arrival at which it is, mean over settings"""
    return _mean([_better_aligned(run) for run in perturbed(runs)])


@claim(OURS_AFTER, low=0.05)
def alignment_gain(runs: SeedRuns) -> float:
    """SAM's gradient is clearly better aligned with the top eigenvector than the plain gradient: by
    how much its |cos| is larger, mean over the measurements after arrival and over settings"""
    return _mean([_alignment_gain(run) for run in perturbed(runs)])


@claim(OURS_AFTER, high=0.5, domain="positive", set_after=True)
def sam_arrives_early(runs: SeedRuns) -> float:
    """SAM reaches its edge in at most half the steps that gradient descent needs to reach 2/lr:
    ratio of the steps, at the setting where it is largest of those that start below both edges"""
    below = [pair for pair in _beside_descent(runs) if all(ratio(run)[0] < ARRIVED for run in pair)]
    if not below:
        raise NotApplicable("every run starts at its edge or beyond")
    return max(arrival(run) / arrival(base) for run, base in below)


CLAIMS = [
    gd_hovers,
    sam_hovers,
    sam_stays_near,
    below_gd_edge,
    below_gd_at_equal_loss,
    flatter_without_loss,
    edge_falls,
    sharpness_follows,
    sam_better_aligned,
    alignment_gain,
    sam_arrives_early,
]
"""The paper's claims on one task, each decided by the grid of runs."""
