r"""The late phase, what its tasks have in common: the grid of switching times, and the claims.

The runs of a setting share their trunks, as `switching` says; what is studied is SAM.

A *setting* differs from the base in one factor at most: the schedule of the learning rate, the
radius, whether the optimizer's momentum survives the switch, label smoothing.

Sharpness and trace are of the Hessian at the end of a run, over the first `measured` training
examples without augmentation, the model in evaluation mode (batch norm with its running
statistics); of two losses: the objective of training (with label smoothing, without weight decay)
and plain cross-entropy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sam_lab import data, landscape
from sam_lab.experiments.lab.claims import CONTROL, OURS, NotApplicable, Source, claim
from sam_lab.experiments.lab.experiment import Cell
from sam_lab.experiments.lab.result import Columns, Result, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import Ratio, farthest_from_one
from sam_lab.experiments.late import switching
from sam_lab.experiments.late.switching import (
    IN_STEPS,
    SCHEDULES,
    branches,
    ends,
    off_the_clock,
    reached,
    scheduled,
    summed_lr,
    unless_in_steps,
)
from sam_lab.experiments.recipe import Recipe
from sam_lab.objective import Closure
from sam_lab.perturbations import global_norm
from sam_lab.training import Training, evaluate

__all__ = [
    "CLAIMS",
    "FACTOR_CLAIMS",
    "Config",
    "against_summed_lr",
    "cost",
    "late_over_sgd",
    "objective",
    "prepare",
    "run",
    "settings",
]

ZHOU, AFTER_ZHOU = Source("Zhou et al. 2025", "paper"), Source("Zhou et al. 2025", "after")
OUR_ZHOU = Source("this book, after Zhou et al. 2025", "ours")
SHARPNESS = "sharpness_objective"
SGD_ONLY, SAM_ONLY = ("sgd",), ("full",)  # as `switching.ends` takes them


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD.
        late, early: at which share of the epochs runs switch to SAM, or away from it.
        schedules, rhos, smoothings, carried: the factors; the first entry of each is the base's.
            `carried`: whether momentum survives the switch.
        trace_tol: of the trace, relative standard error.
        points: on the line from the switch to the end.
    """

    recipe: Recipe
    late: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    early: tuple[float, ...] = (0.5, 0.9)
    schedules: tuple[str, ...] = ("constant", "steps")
    rhos: tuple[float, ...] = (0.1,)
    smoothings: tuple[float, ...] = (0.1,)
    carried: tuple[bool, ...] = (True,)
    trace_tol: float = 0.1
    points: int = 11


def settings(config: Config) -> list[Setting]:
    """The base, and every setting that differs from it in one factor."""
    factors: dict[str, Sequence[Any]] = {
        "schedule": config.schedules,
        "rho": config.rhos,
        "smoothing": config.smoothings,
        "carried": config.carried,
    }
    base = {name: values[0] for name, values in factors.items()}
    changed = [{**base, name: v} for name, values in factors.items() for v in values[1:]]
    return [base, *changed]


def prepare(config: Config, cell: Cell, **how: Any) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, of SGD throughout, and its data.

    Args:
        how: what else `Recipe.training` takes.

    Raises:
        ValueError: an unknown data set or schedule, or more examples than there are.
    """
    if cell["schedule"] not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule must be one of {known}, got {cell['schedule']!r}")
    return config.recipe.training(
        cell.seed,
        cell.device,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=cell["smoothing"]),
        schedule=SCHEDULES[cell["schedule"]],
        carry=cell["carried"],
        **how,
    )


def run(config: Config, cell: Cell) -> Columns:
    """All switching times of one setting.

    Returns:
        Columns with a row for each run, whose epochs of SAM are [`switched_on`, `switched_off`); an
        empty interval is SGD throughout. `passes` through the model in training; `objective` (mean
        loss of training over the whole training set), `train_loss` and `train_error` (cross-entropy
        and share of errors), `test_loss`, `test_error`; `sharpness_objective`, `sharpness`,
        `trace`, `trace_stderr` (the latter three of cross-entropy), `norm` of the weights; and from
        the switch to the end, NaN where nothing switches, `distance` and `barrier`, with
        `switch_objective` and `switch_sharpness` (of the objective) as they were before.

    Raises:
        ValueError: shares of the epochs in `late` or `early` that fall on one epoch, or on none
            that can be switched at.
    """
    start, dataset = prepare(config, cell)
    how = {"rho": cell["rho"]}
    rows = Rows()
    for interval, switch, end in branches(start, config.late, config.early, how, cell):
        way = dict.fromkeys(_WAY, float("nan")) if switch is None else _way(switch, end, config)
        rows.add(**interval, **_end(end, dataset, config), **way)
    return rows.columns


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed; of SAM two gradients a step, of the Hessian two
    sharpnesses and a trace at the end of a run, and a sharpness at its switch."""
    one = switching.cost(config.recipe, config.late, config.early, studied=2, hessians=4)
    return len(settings(config)) * one


_WAY = ("distance", "barrier", "switch_objective", "switch_sharpness")


def objective(training: Training, recipe: Recipe) -> Closure:
    """The loss of training over the examined examples, a closure; in the model's present mode."""
    x, y = recipe.examined(training)
    return lambda: training.loss_fn(training.model(x), y)


def _end(training: Training, dataset: data.Dataset, config: Config) -> dict[str, float]:
    """What is measured at the end of a run."""
    model, recipe = training.model, config.recipe
    cross_entropy = nn.functional.cross_entropy
    train_loss, train_error = evaluate(model, dataset.x, dataset.y)
    test_loss, test_error = evaluate(model, dataset.x_test, dataset.y_test)
    trace = recipe.hessian(training, cross_entropy).trace(tol=config.trace_tol)
    return {
        "passes": training.history[-1]["passes"],
        "objective": evaluate(model, dataset.x, dataset.y, training.loss_fn)[0],
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
        "sharpness_objective": recipe.sharpness(training),
        "sharpness": recipe.sharpness(training, cross_entropy),
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "norm": float(global_norm(list(model.parameters()))),
    }


def _way(switch: Training, end: Training, config: Config) -> dict[str, float]:
    """What lies between the switch and the end."""
    recipe = config.recipe
    before, after = landscape.weights(switch.model), landscape.weights(end.model)
    end.model.eval()
    line = landscape.line(
        objective(end, recipe),
        end.model,
        before,
        after,
        config.points,
        refresh=recipe.examined(end)[0].split(1000),
    )
    apart = [two - one for one, two in zip(before, after, strict=True)]
    return {
        "distance": float(global_norm(apart)),
        "barrier": line.barrier,
        "switch_objective": recipe.hessian(switch).loss(),
        "switch_sharpness": recipe.sharpness(switch),
    }


# --- what has been run ----------------------------------------------------------------------------

LATE = 0.9  # the share of the epochs that the claims about late SAM leave to SGD


def late_over_sgd(run: Run) -> float:
    """Sharpness after SAM in the last tenth, over that of SGD throughout."""
    return _ratio(run, SHARPNESS, ("late", LATE), SGD_ONLY)


def against_summed_lr(result: Result, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    """How far the sharpness has come, against how long late SAM has had.

    Args:
        changed: the factor in which the setting differs from the base.

    Returns:
        The learning rate summed over the epochs of SAM (T,), ascending, for each late switch;
        sharpness at the end over that of SGD throughout, (seeds, T).
    """
    courses = [_course(runs, **changed) for runs in result.by_seed()]
    return courses[0][0], np.array([ratio for _, ratio in courses])


def _course(runs: SeedRuns, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    sums, sharpness = summed_lr(runs, SHARPNESS, **changed)
    return sums, sharpness / ends(runs.base(**changed), SHARPNESS, *SGD_ONLY)


def _ratio(run: Run, name: str, one: tuple[Any, ...], two: tuple[Any, ...]) -> float:
    return ends(run, name, *one) / ends(run, name, *two)


def _points(run: Run, one: tuple[Any, ...], two: tuple[Any, ...]) -> float:
    """By how many percentage points the test error of one end lies above that of another."""
    return 100 * (ends(run, "test_error", *one) - ends(run, "test_error", *two))


def _share(run: Run, method: str, at: float, name: str = SHARPNESS) -> Ratio:
    """The share of the way from SGD to SAM throughout, in the logarithm."""
    return reached(run, name, method, at, log=True)


def _in_order(run: Run, name: str) -> float:
    """Of all pairs of late switches, the share in which the longer phase of SAM has the smaller
    value; a tie counts half."""
    late = run["switched_off"] == run["switched_off"].max()
    return _falling(-run["switched_on"][late], run[name][late])


def _by_epochs(runs: SeedRuns, name: str) -> float:
    """Of all pairs of runs, the share in which the one with more epochs of SAM has the smaller
    value; a tie counts half."""
    run = runs.base()
    return _falling(run["switched_off"] - run["switched_on"], run[name])


def _falling(x: np.ndarray, y: np.ndarray) -> float:
    """Of all pairs of points, the share in which y falls as x grows; a tie counts half."""
    pairs = itertools.combinations(zip(x, y, strict=True), 2)
    return float(np.mean([(1 - np.sign((b - a) * (d - c))) / 2 for (a, c), (b, d) in pairs]))


def _late_sharpness(run: Run) -> float:
    return ends(run, SHARPNESS, "late", LATE)


# --- what the runs decide -------------------------------------------------------------------------

NO_FLATTER = "SAM was no flatter than SGD here"
NOTHING_SAVED = "SAM saved no test error here"


@claim(AFTER_ZHOU, high=0.8, domain="positive")
def sam_is_flatter(runs: SeedRuns) -> float:
    """SAM throughout ends flatter than SGD: sharpness of the training objective, SAM's over
    SGD's"""
    return _ratio(runs.base(), SHARPNESS, SAM_ONLY, SGD_ONLY)


@claim(ZHOU, low=0.8, headline=True, undefined=NO_FLATTER)
def late_sam_is_as_flat(runs: SeedRuns) -> Ratio:
    """SAM in the last tenth of the epochs ends about as flat as SAM throughout: share of the way
    from SGD's sharpness to SAM's that it covers, in the logarithm"""
    return _share(runs.base(), "late", LATE)


@claim(AFTER_ZHOU, low=0.8, undefined="SAM's trace was no smaller than SGD's here")
def late_sam_is_as_flat_in_trace(runs: SeedRuns) -> Ratio:
    """SAM in the last tenth of the epochs ends with about the trace of SAM throughout: share of the
    way from SGD's trace to SAM's that it covers, in the logarithm, for the Hessian of
    cross-entropy"""
    return _share(runs.base(), "late", LATE, "trace")


@claim(OURS, low=0.5, undefined=NO_FLATTER)
def late_sam_halfway(runs: SeedRuns) -> Ratio:
    """SAM in the last tenth of the epochs covers at least half of the way from SGD's sharpness to
    that of SAM throughout: share of the way, in the logarithm"""
    return _share(runs.base(), "late", LATE)


@claim(AFTER_ZHOU, low=0.0, unit="points")
def sam_generalizes_better(runs: SeedRuns) -> float:
    """SAM throughout has a smaller test error than SGD: by how much it is smaller"""
    return _points(runs.base(), SGD_ONLY, SAM_ONLY)


@claim(AFTER_ZHOU, low=0.0, unit="points")
def late_sam_generalizes_better(runs: SeedRuns) -> float:
    """SAM in the last tenth of the epochs has a smaller test error than SGD: by how much it is
    smaller"""
    return _points(runs.base(), SGD_ONLY, ("late", LATE))


# A smaller margin could not be met by design: it is about the half width of the interval of five
# seeds. Where all that SAM saves lies within the margin, SGD would meet it too.
MARGIN = 1.0


@claim(ZHOU, high=MARGIN, unit="points", set_after=True)
def late_sam_generalizes_as_well(runs: SeedRuns) -> float:
    """SAM in the last tenth of the epochs has about the test error of SAM throughout: by how much
    it is larger"""
    run = runs.base()
    if _points(run, SGD_ONLY, SAM_ONLY) <= MARGIN:
        raise NotApplicable("SAM throughout saved no more than the margin itself")
    return _points(run, ("late", LATE), SAM_ONLY)


@claim(AFTER_ZHOU, high=0.9, domain="positive")
def late_half_counts_more(runs: SeedRuns) -> float:
    """SAM in the second half of the epochs ends flatter than SAM in the first half: sharpness of
    the training objective, the former's over the latter's"""
    return _ratio(runs.base(), SHARPNESS, ("late", 0.5), ("early", 0.5))


@claim(OUR_ZHOU, low=0.0, unit="points")
def late_half_generalizes_better(runs: SeedRuns) -> float:
    """SAM in the second half of the epochs has a smaller test error than SAM in the first half: by
    how much it is smaller"""
    return _points(runs.base(), ("early", 0.5), ("late", 0.5))


@claim(AFTER_ZHOU, high=0.2, undefined=NO_FLATTER)
def early_sam_is_forgotten(runs: SeedRuns) -> Ratio:
    """After SAM in the first nine tenths of the epochs, SGD in the last tenth ends about as sharp
    as SGD throughout: share of the way from SGD's sharpness to SAM's that is left, in the
    logarithm"""
    return _share(runs.base(), "early", LATE)


@claim(ZHOU, high=0.05)
def no_barrier(runs: SeedRuns) -> float:
    """The switch to SAM, a tenth before the end, and the end of training lie in one valley: barrier
    of the training objective on the straight line between them, over the objective at the switch"""
    barrier, level = (
        ends(runs.base(), name, "late", LATE) for name in ("barrier", "switch_objective")
    )
    return barrier / level


@claim(OURS, high=0.5, undefined="late SAM was no flatter than SGD at the constant rate here")
def learning_rate_decides(runs: SeedRuns) -> Ratio:
    """A learning rate that falls in steps takes more than half of its effect from SAM in the last
    tenth of the epochs: change of the logarithm of the sharpness against SGD, in steps over that at
    a constant rate"""
    constant, steps = (
        -float(np.log(late_over_sgd(scheduled(runs, name)))) for name in ("constant", "steps")
    )
    return Ratio(steps, constant)


_AT_THE_BASE = [
    sam_is_flatter,
    late_sam_is_as_flat,
    late_sam_is_as_flat_in_trace,
    late_sam_halfway,
    sam_generalizes_better,
    late_sam_generalizes_better,
    late_sam_generalizes_as_well,
    late_half_counts_more,
    late_half_generalizes_better,
    early_sam_is_forgotten,
    no_barrier,
]
# Asked after the runs were seen: the paper's headline under the schedule of its code, what SAM does
# to the test error when SGD has the last word, whether that takes a flatter end, and the order of
# the switching times.


@claim(AFTER_ZHOU, low=0.5, set_after=True, undefined=NOTHING_SAVED)
def late_sam_saves_half(runs: SeedRuns) -> Ratio:
    """SAM in the last tenth of the epochs saves at least half of the test error that SAM throughout
    saves against SGD: share of it"""
    return reached(runs.base(), "test_error", "late", LATE)


@claim(AFTER_ZHOU, high=0.5, set_after=True, undefined=NOTHING_SAVED)
def early_sam_is_forgotten_in_test_error(runs: SeedRuns) -> Ratio:
    """After SAM for the first nine tenths of the epochs, SGD in the last tenth keeps less than half
    of the test error that SAM throughout saves against SGD: share of it"""
    return reached(runs.base(), "test_error", "early", LATE)


@claim(AFTER_ZHOU, low=0.75, domain="share", set_after=True)
def an_earlier_switch_is_flatter(runs: SeedRuns) -> float:
    """The earlier the switch to SAM, the flatter the end: share of pairs of switching times, SGD
    and SAM throughout among them, whose sharpness is in this order"""
    return _in_order(runs.base(), SHARPNESS)


@claim(AFTER_ZHOU, low=0.75, domain="share", set_after=True)
def an_earlier_switch_generalizes_better(runs: SeedRuns) -> float:
    """The earlier the switch to SAM, the smaller the test error: share of pairs of switching times,
    SGD and SAM throughout among them, whose test error is in this order"""
    return _in_order(runs.base(), "test_error")


@claim(OURS, low=0.9, domain="positive", set_after=True)
def early_half_ends_no_flatter(runs: SeedRuns) -> float:
    """After SAM in the first half of the epochs, SGD in the second half ends no flatter than SGD
    throughout: sharpness of the training objective, the former's over the latter's"""
    return _ratio(runs.base(), SHARPNESS, ("early", 0.5), SGD_ONLY)


@claim(OURS, low=0.0, unit="points", set_after=True)
def early_half_saves(runs: SeedRuns) -> float:
    """After SAM in the first half of the epochs, SGD in the second half ends with a smaller test
    error than SGD throughout: by how much it is smaller"""
    return _points(runs.base(), SGD_ONLY, ("early", 0.5))


@claim(OURS, low=0.75, domain="share", set_after=True)
def more_epochs_generalize_better(runs: SeedRuns) -> float:
    """Whether SAM comes first or last, the more epochs it has, the smaller the test error: share of
    pairs of runs, SGD and SAM throughout among them, whose test error is in this order"""
    return _by_epochs(runs, "test_error")


@claim(OURS, low=0.75, domain="share", set_after=True)
def more_epochs_are_flatter(runs: SeedRuns) -> float:
    """Whether SAM comes first or last, the more epochs it has, the flatter the end: share of pairs
    of runs, SGD and SAM throughout among them, whose sharpness is in this order"""
    return _by_epochs(runs, SHARPNESS)


_AFTERWARDS = [
    late_sam_saves_half,
    early_sam_is_forgotten_in_test_error,
    an_earlier_switch_is_flatter,
    an_earlier_switch_generalizes_better,
    early_half_ends_no_flatter,
    early_half_saves,
    more_epochs_generalize_better,
    more_epochs_are_flatter,
]
# With the criteria of the others.
_IN_STEPS = [
    dataclasses.replace(
        one.under("in-steps", IN_STEPS, schedule="steps"),
        set_after=True,
        headline=one
        in (
            late_sam_saves_half,
            early_sam_is_forgotten_in_test_error,
            more_epochs_generalize_better,
        ),
    )
    for one in (
        sam_is_flatter,
        late_sam_is_as_flat,
        late_sam_is_as_flat_in_trace,
        sam_generalizes_better,
        late_sam_generalizes_better,
        late_sam_generalizes_as_well,
        late_half_counts_more,
        late_half_generalizes_better,
        early_sam_is_forgotten,
        no_barrier,
        *_AFTERWARDS,
    )
]
CLAIMS = [
    *map(unless_in_steps, [*_AT_THE_BASE, *_AFTERWARDS]),
    *_IN_STEPS,
    learning_rate_decides,
]
"""The paper's claims on one task, with a constant learning rate and with the schedule of the
paper's code, and what decides them."""


@claim(OURS, 0.8, 1.25, set_after=True, headline=True, domain="positive")
def learning_rate_is_the_clock(runs: SeedRuns) -> float:
    """What late SAM does depends on the learning rate summed over its epochs, not on the schedule:
    sharpness over SGD's under other schedules, over that at a constant rate with the same sum
    (interpolated), where it is farthest from 1"""

    def course(schedule: str) -> tuple[np.ndarray, np.ndarray]:
        sums, ratio = _course(runs, schedule=schedule)
        return sums, np.log(ratio)

    return farthest_from_one(np.exp(off_the_clock(runs, course)))


@claim(OURS, low=0.5, undefined=NO_FLATTER)
def late_sam_before_a_drop(runs: SeedRuns) -> Ratio:
    """SAM in the last quarter of the epochs, with the learning rate dropping to a tenth for the
    last tenth, covers at least half of the way from SGD's sharpness to that of SAM throughout:
    share of the way, in the logarithm"""
    return _share(runs.base(schedule="drop"), "late", 0.75)


@claim(OURS, low=0.0, unit="points")
def late_sam_before_a_drop_generalizes(runs: SeedRuns) -> float:
    """SAM in the last quarter of the epochs, with the learning rate dropping to a tenth for the
    last tenth, has a smaller test error than SGD with the same schedule: by how much it is
    smaller"""
    return _points(runs.base(schedule="drop"), SGD_ONLY, ("late", 0.75))


@claim(CONTROL, low=0.0, unit="points")
def early_sam_before_a_drop_generalizes(runs: SeedRuns) -> float:
    """SAM in the first quarter of the epochs, with the learning rate dropping to a tenth for the
    last tenth, has a smaller test error than SGD with the same schedule: by how much it is
    smaller"""
    return _points(runs.base(schedule="drop"), SGD_ONLY, ("early", 0.25))


@claim(OURS, 0.8, 1.25, domain="positive")
def momentum_does_not_decide(runs: SeedRuns) -> float:
    """Emptying the momentum at the switch, as the paper's code does, makes no difference: sharpness
    after SAM in the last tenth of the epochs, with the momentum kept, over that with the momentum
    emptied"""
    carried, emptied = (_late_sharpness(runs.base(carried=carried)) for carried in (True, False))
    return carried / emptied


@claim(OURS, high=0.8, domain="positive")
def radius_decides(runs: SeedRuns) -> float:
    """The larger the radius, the flatter late SAM ends: sharpness after SAM in the last tenth of
    the epochs, at the largest radius over that at the smallest"""
    radii = [run.settings["rho"] for run in runs.runs]
    largest, smallest = (_late_sharpness(runs.base(rho=rho)) for rho in (max(radii), min(radii)))
    return largest / smallest


@claim(OURS, low=1.0, domain="positive")
def plain_loss_misleads(runs: SeedRuns) -> float:
    """Without label smoothing, SAM in the last tenth of the epochs looks sharper than SGD, because
    SGD's loss and curvature vanish: sharpness, late SAM's over SGD's"""
    return late_over_sgd(runs.base(smoothing=0.0))


FACTOR_CLAIMS = [
    learning_rate_is_the_clock,
    late_sam_before_a_drop,
    late_sam_before_a_drop_generalizes,
    early_sam_before_a_drop_generalizes,
    momentum_does_not_decide,
    radius_decides,
    plain_loss_misleads,
]
"""What else could decide: for tasks that change momentum, radius and smoothing too."""
