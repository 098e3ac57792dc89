r"""Does SAM, switched on late, stay in the valley that SGD had found?

SGD trains up to the switch, SAM from there to the end. Zhou et al. (2025): SAM first climbs out of
SGD's solution and then comes down to a flatter point *of the same valley*. Three things belong to
that, each of which can fail: on the straight line from the switch to the end there is no barrier;
the path itself does rise, above all that lies on the line; the end is flatter.

A line says something beside other lines only. From the same switch (``sgd``) SGD goes on; the two
ends are compared (``siblings``); and the end of SGD with those of two more runs of SGD, one from
the same initial weights with another order of the examples (``order``), one with other initial
weights too (``independent``). Between the latter a barrier must appear, or the lines would not see
one.

The loss is the objective of training (with label smoothing, without weight decay) over the first
`measured` training examples, in evaluation mode; that of the path is the same, after every step of
the optimizer. BatchNorm's running statistics are gathered anew at every point, of lines and of the
path. For comparison the lines are measured with interpolated statistics too, as in the code
released with the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam_lab import data, landscape
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.late import late_images, late_mnist1d
from sam_lab.experiments.recipe import Recipe
from sam_lab.objective import Closure
from sam_lab.perturbations import global_norm
from sam_lab.training import LossFn, Training, evaluate, late

ZHOU, AFTER_ZHOU = Source("Zhou et al. 2025", "paper"), Source("Zhou et al. 2025", "after")
OUR_ZHOU = Source("this book, after Zhou et al. 2025", "ours")
FRANKLE = Source("Frankle et al. 2020", "after")
JORDAN = Source("Jordan et al. 2023", "after")

LINES = {
    "sam": ("switch", "sam"),
    "sgd": ("switch", "sgd"),
    "siblings": ("sgd", "sam"),
    "order": ("sgd", "order"),
    "independent": ("sgd", "independent"),
}
"""The lines, each from one solution to another."""

ELSEWHERE = 1000  # added to the seed for another order, and for other weights
BATCH = 1000  # examples a pass where the model is only measured


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD, at a constant learning rate.
        at: the share of the epochs after which SAM is switched on.
        rho: its radius.
        smoothing: of the labels.
        batchnorm: whether a fully connected network gets batch norm before each activation; a wide
            residual network has its own, and one entry here.
        points: on a line, within [0, 1].
        watch: epochs after the switch in which the loss is measured after every step; then after
            every epoch.
    """

    recipe: Recipe
    at: float = 0.75
    rho: float = 0.1
    smoothing: float = 0.1
    batchnorm: tuple[bool, ...] = (False, True)
    points: int = 21
    watch: int = 2


LAPTOP = Config(late_mnist1d.LAPTOP.recipe.but(test=4000, measured=4000))
PAPER = Config(late_images.PAPER.recipe, at=0.875, rho=0.05, batchnorm=(True,))


def settings(config: Config) -> list[Setting]:
    """The network without batch norm and with it."""
    return [{"batchnorm": batchnorm} for batchnorm in config.batchnorm]


def prepare(
    config: Config, cell: Cell, *, weights: int | None = None, order: int | None = None
) -> tuple[Training, data.Dataset]:
    """SGD before its first epoch, and its data.

    Args:
        weights, order: seeds of their own, as `Recipe.training` takes them.

    Raises:
        ValueError: an unknown data set, or more examples than there are.
    """
    return config.recipe.training(
        cell.seed,
        cell.device,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=config.smoothing),
        norm="batch" if cell["batchnorm"] else "none",
        weights=weights,
        order=order,
    )


def run(config: Config, cell: Cell) -> Columns:
    """All runs of one seed, the lines between them, and the path from the switch.

    Returns:
        `alpha`, and on each of `LINES`, at each alpha, ``LINE_train`` (the objective) and
        ``LINE_test`` (cross-entropy on the test set); with batch norm also ``LINE_carried``, the
        objective with interpolated statistics. ``LINE_distance`` between its ends.
        `step` after the switch, and at each the objective on the path, `sam_path` and `sgd_path`.
        ``NAME_sharpness`` (of the objective) and ``NAME_error`` (on the test set) of each solution:
        switch, sam, sgd, order and independent.
    """
    epochs = config.recipe.epochs
    at = round(config.at * epochs)
    done, total = 0, 3 * epochs + 2 * (epochs - at)

    def on_epoch() -> None:
        nonlocal done
        done += 1
        cell.tick(done, total)

    elsewhere = cell.seed + ELSEWHERE
    sgd, dataset = prepare(config, cell)
    order, _ = prepare(config, cell, order=elsewhere)
    independent, _ = prepare(config, cell, order=elsewhere, weights=elsewhere)
    sgd.run(at, on_epoch=on_epoch)
    switch, sam = sgd.branch(sgd.phases), sgd.branch(late(at, epochs, rho=config.rho))
    sam_path = _follow(sam, config, on_epoch)
    sgd_path = _follow(sgd, config, on_epoch)
    for training in (order, independent):
        training.run(on_epoch=on_epoch)

    solutions = {
        "switch": switch,
        "sam": sam,
        "sgd": sgd,
        "order": order,
        "independent": independent,
    }
    columns: Columns = {"alpha": alphas(config.points)}
    for name, (one, two) in LINES.items():
        line = _line(solutions[one], solutions[two], dataset, config)
        columns |= {f"{name}_{what}": values for what, values in line.items()}
    columns |= {"step": sam_path["step"]}
    columns |= {"sam_path": sam_path["loss"], "sgd_path": sgd_path["loss"]}
    for name, training in solutions.items():
        error = evaluate(training.model, dataset.x_test, dataset.y_test)[1]
        columns |= {
            f"{name}_sharpness": [config.recipe.sharpness(training)],
            f"{name}_error": [error],
        }
    return columns


def alphas(points: int) -> list[float]:
    """So many places within [0, 1], both ends among them, and a fifth of the way beyond each."""
    last = points - 1
    return [k / last for k in range(-(last // 5), last + last // 5 + 1)]


def _mean_loss(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Closure:
    return lambda: torch.tensor(evaluate(model, x, y, loss_fn)[0], dtype=torch.float64)


def _objective(training: Training, recipe: Recipe) -> Closure:
    return _mean_loss(training.model, *recipe.examined(training), training.loss_fn)


def _inputs(training: Training, recipe: Recipe) -> list[Tensor]:
    """What BatchNorm's statistics are gathered from."""
    return list(recipe.examined(training)[0].split(BATCH))


def _follow(training: Training, config: Config, tick: Callable[[], None]) -> Columns:
    """The training to its end: each `step` from here, and the objective, `loss`, after it."""
    recipe = config.recipe
    loss, inputs = _objective(training, recipe), _inputs(training, recipe)
    watched = training.epoch + config.watch
    taken = 0
    rows = Rows()

    def record() -> None:
        here = landscape.weights(training.model)
        line = landscape.line(loss, training.model, here, here, [0.0], refresh=inputs)
        rows.add(step=taken, loss=float(line.losses))

    def on_step() -> None:
        nonlocal taken
        taken += 1
        if training.epoch < watched:
            record()

    def on_epoch() -> None:
        if rows.columns["step"][-1] < taken:
            record()
        tick()

    record()
    training.run(on_step=on_step, on_epoch=on_epoch)
    return rows.columns


def _line(one: Training, two: Training, dataset: data.Dataset, config: Config) -> Columns:
    """The straight line from one solution to another."""
    model, recipe, places = two.model, config.recipe, alphas(config.points)
    start, end = landscape.weights(one.model), landscape.weights(model)
    cross_entropy = nn.functional.cross_entropy
    losses = {
        "train": _objective(two, recipe),
        "test": _mean_loss(model, dataset.x_test, dataset.y_test, cross_entropy),
    }
    inputs = _inputs(two, recipe)
    columns: Columns = {
        what: landscape.line(loss, model, start, end, places, refresh=inputs).losses.tolist()
        for what, loss in losses.items()
    }
    if any(buffer.is_floating_point() for buffer in model.buffers()):
        columns["carried"] = _carried(one, two, places, recipe)
    apart = [b - a for a, b in zip(start, end, strict=True)]
    return columns | {"distance": [float(global_norm(apart))]}


def _carried(one: Training, two: Training, places: list[float], recipe: Recipe) -> list[float]:
    """The objective on the line with buffers interpolated as weights are."""
    start, end = landscape.weights(one.model), landscape.weights(two.model)
    between = copy.deepcopy(two.model)
    loss = _mean_loss(between, *recipe.examined(two), two.loss_fn)
    losses = []
    for alpha in places:
        models = (between, one.model, two.model)
        for buffer, a, b in zip(*(model.buffers() for model in models), strict=True):
            if buffer.is_floating_point():
                buffer.copy_(torch.lerp(a, b, alpha))
        line = landscape.line(loss, between, start, end, [alpha], refresh=False)
        losses.append(float(line.losses))
    return losses


# --- what has been run ----------------------------------------------------------------------------


def line(run: Run, name: str, what: str = "train") -> landscape.Line:
    """One of a run's lines: "train", "test" or, with batch norm, "carried"."""
    columns = run["alpha"], run[f"{name}_{what}"]
    return landscape.Line(*map(torch.from_numpy, columns))


def barrier(run: Run, name: str, what: str = "train") -> float:
    """The barrier of a line, over the mean loss of its two ends.

    That loss is not all to be won: with label smoothing none is below the entropy of the labels.
    """
    there = line(run, name, what)
    ends = [float(there.losses[there.alphas == alpha]) for alpha in (0, 1)]
    return there.barrier / (sum(ends) / 2)


def peak(runs: SeedRuns, method: str) -> float:
    """The highest loss on the first setting's path, "sam" or "sgd", within the epochs watched.

    The epochs after them have one measurement each.
    """
    run, recipe = runs.base(), runs.config["recipe"]
    steps = runs.config["watch"] * math.ceil(recipe["train"] / recipe["batch"])
    return float(run[f"{method}_path"][run["step"] <= steps].max())


def _sharpness_ratio(run: Run, one: str, two: str) -> float:
    return run.value(f"{one}_sharpness") / run.value(f"{two}_sharpness")


# --- what the runs decide -------------------------------------------------------------------------


@claim(ZHOU, high=0.05)
def no_barrier(runs: SeedRuns) -> float:
    """The switch to SAM and the end of training lie in one valley: barrier of the training loss on
    the straight line between them, over the loss at its ends"""
    return barrier(runs.base(), "sam")


@claim(AFTER_ZHOU, high=0.05)
def no_barrier_in_test_loss(runs: SeedRuns) -> float:
    """The switch to SAM and the end of training lie in one valley of the test loss too: barrier on
    the straight line between them, over the test loss at its ends"""
    return barrier(runs.base(), "sam", "test")


@claim(OUR_ZHOU, low=1.1, domain="positive")
def path_leaves_the_line(runs: SeedRuns) -> float:
    """SAM's path rises above the straight line from the switch to its end: highest loss on the path
    soon after the switch, over the highest loss on the line"""
    there = line(runs.base(), "sam")
    within = (there.alphas >= 0) & (there.alphas <= 1)
    return peak(runs, "sam") / float(there.losses[within].max())


@claim(AFTER_ZHOU, high=0.05)
def barrier_below_rise(runs: SeedRuns) -> float:
    """The barrier between the switch to SAM and the end is small beside the rise of the loss on
    SAM's path: barrier over rise"""
    run = runs.base()
    rise = peak(runs, "sam") - float(run["sam_path"][0])
    return line(run, "sam").barrier / rise if rise > 0 else math.inf


@claim(CONTROL, low=1.1, domain="positive")
def rise_is_sams(runs: SeedRuns) -> float:
    """The rise of the loss after the switch is SAM's doing, as SGD that goes on does not rise as
    high: highest loss soon after the switch, SAM's over SGD's"""
    return peak(runs, "sam") / peak(runs, "sgd")


@claim(ZHOU, high=0.8, domain="positive")
def end_is_flatter(runs: SeedRuns) -> float:
    """SAM ends flatter than where it took over from SGD: sharpness at the end over sharpness at the
    switch"""
    return _sharpness_ratio(runs.base(), "sam", "switch")


@claim(AFTER_ZHOU, high=0.8, domain="positive")
def flatter_than_sgd(runs: SeedRuns) -> float:
    """SAM ends flatter than SGD that goes on from the same switch for as many epochs: sharpness,
    SAM's over SGD's"""
    return _sharpness_ratio(runs.base(), "sam", "sgd")


@claim(CONTROL, high=0.05)
def siblings_share_it(runs: SeedRuns) -> float:
    """The two ends that start from one switch, SGD's and SAM's, lie in one valley: barrier on the
    straight line between them, over the loss at its ends"""
    return barrier(runs.base(), "siblings")


@claim(FRANKLE, low=0.2)
def independent_runs_do_not(runs: SeedRuns) -> float:
    """Between two independent runs of SGD there is a barrier: its height on the straight line
    between their ends, over the loss there"""
    return barrier(runs.base(), "independent")


@claim(FRANKLE, low=0.2)
def another_order_suffices(runs: SeedRuns) -> float:
    """Between two runs of SGD from the same initial weights, with the examples in another order,
    there is a barrier: its height on the straight line between their ends, over the loss there"""
    return barrier(runs.base(), "order")


@claim(AFTER_ZHOU, high=0.05)
def one_valley_not_two(runs: SeedRuns) -> float:
    """The barrier between the switch to SAM and the end is small beside the barrier between two
    independent runs of SGD: the first over the second"""
    ours, theirs = (line(runs.base(), name).barrier for name in ("sam", "independent"))
    return ours / theirs


@claim(AFTER_ZHOU, high=0.05)
def no_barrier_with_batchnorm(runs: SeedRuns) -> float:
    """With batch norm too, its statistics gathered anew on the line, there is no barrier between
    the switch to SAM and the end: barrier over the loss at the ends"""
    return barrier(runs.one(batchnorm=True), "sam")


@claim(JORDAN, high=0.8, domain="positive")
def statistics_matter(runs: SeedRuns) -> float:
    """Interpolated statistics of batch norm exaggerate the barrier between independent runs of SGD:
    barrier with the statistics gathered anew, over the barrier with interpolated ones"""
    run = runs.one(batchnorm=True)
    return line(run, "independent").barrier / line(run, "independent", "carried").barrier


CLAIMS = [
    no_barrier,
    no_barrier_in_test_loss,
    path_leaves_the_line,
    barrier_below_rise,
    rise_is_sams,
    end_is_flatter,
    flatter_than_sgd,
    siblings_share_it,
    independent_runs_do_not,
    another_order_suffices,
    one_valley_not_two,
    no_barrier_with_batchnorm,
    statistics_matter,
]
"""One valley, and what would show that there are two."""

EXPERIMENT = Experiment(
    name="same_valley",
    title="Late SAM stays in SGD's valley: lines between solutions",
    source="Zhou et al. 2025 (arXiv:2410.10373), linear paths and loss after the switch",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
