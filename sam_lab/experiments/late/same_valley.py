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

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab import data, landscape
from sam_lab.experiments import late_images, late_mnist1d, late_phase
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.statistics import each_seed
from sam_lab.perturbations import global_norm
from sam_lab.training import LossFn, Training, evaluate, late

ZHOU = "Zhou et al. 2025"
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
        task: data, network and training. The switch is at the first entry of `late`, and the first
            entry of each factor holds; `points` are those on a line within [0, 1].
        batchnorm: whether a fully connected network gets batch norm before each activation; a wide
            residual network has its own, and one entry here.
        watch: epochs after the switch in which the loss is measured after every step; then after
            every epoch.
    """

    task: late_phase.Config
    batchnorm: tuple[bool, ...] = (False, True)
    watch: int = 2


LAPTOP = Config(
    dataclasses.replace(
        late_mnist1d.LAPTOP, test=4000, late=(0.75,), early=(), measured=4000, points=21
    )
)
PAPER = Config(
    dataclasses.replace(late_images.PAPER, late=(0.875,), early=(), points=21), batchnorm=(True,)
)


def settings(config: Config) -> list[dict[str, Any]]:
    """The network without batch norm and with it."""
    return [{"batchnorm": batchnorm} for batchnorm in config.batchnorm]


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """SGD before its first epoch, and its data."""
    task = config.task
    start, found = late_phase.prepare(task, late_phase.settings(task)[0], seed, device)
    if setting["batchnorm"] and task.hidden:
        start.model = _normed(start.model)
        made = start.optimizer
        start.optimizer = type(made)(start.model.parameters(), **made.defaults)
    return start, found


def _normed(model: nn.Module) -> nn.Sequential:
    """The fully connected network with batch norm after every linear layer but the last."""
    layers: list[nn.Module] = []
    *hidden, last = model.children()
    for layer in hidden:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            layers.append(nn.BatchNorm1d(layer.out_features, device=layer.weight.device))
    return nn.Sequential(*layers, last)


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """All runs of one seed, the lines between them, and the path from the switch.

    Returns:
        `alpha`, and on each of `LINES`, at each alpha, ``LINE_train`` (the objective) and
        ``LINE_test`` (cross-entropy on the test set); with batch norm also ``LINE_carried``, the
        objective with interpolated statistics. ``LINE_distance`` between its ends.
        `step` after the switch, and at each the objective on the path, `sam_path` and `sgd_path`.
        ``NAME_sharpness`` (of the objective) and ``NAME_error`` (on the test set) of each solution:
        switch, sam, sgd, order and independent.
    """
    task = config.task
    epochs, rho = task.epochs, task.rhos[0]
    at = round(task.late[0] * epochs)
    done, total = 0, 3 * epochs + 2 * (epochs - at)

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    start, found = prepare(config, setting, seed, device)
    sgd_only = late(epochs, epochs, rho=rho)
    sgd = start.branch(sgd_only).run(at, on_epoch=tick)
    switch, sam = sgd.branch(sgd_only), sgd.branch(late(at, epochs, rho=rho))
    order, independent = start.branch(sgd_only), start.branch(sgd_only)
    order.seed = independent.seed = seed + ELSEWHERE
    other, _ = prepare(config, setting, seed + ELSEWHERE, device)
    independent.model.load_state_dict(other.model.state_dict())

    steps, sam_path = _follow(sam, config, tick)
    _, sgd_path = _follow(sgd, config, tick)
    for training in (order, independent):
        training.run(on_epoch=tick)

    solutions = {
        "switch": switch,
        "sam": sam,
        "sgd": sgd,
        "order": order,
        "independent": independent,
    }
    columns: dict[str, list[float]] = {"alpha": alphas(task.points)}
    for name, (one, two) in LINES.items():
        columns |= _line(name, solutions[one], solutions[two], found, config)
    columns |= {"step": steps, "sam_path": sam_path, "sgd_path": sgd_path}
    for name, training in solutions.items():
        columns[f"{name}_sharpness"] = [_sharpness(training, config)]
        columns[f"{name}_error"] = [evaluate(training.model, found.x_test, found.y_test)[1]]
    return columns


def alphas(points: int) -> list[float]:
    """So many places within [0, 1], both ends among them, and a fifth of the way beyond each."""
    last = points - 1
    return [k / last for k in range(-(last // 5), last + last // 5 + 1)]


def _mean_loss(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Callable[[], Tensor]:
    return lambda: torch.tensor(evaluate(model, x, y, loss_fn)[0], dtype=torch.float64)


def _objective(training: Training, config: Config) -> Callable[[], Tensor]:
    n = config.task.measured
    return _mean_loss(training.model, training.x[:n], training.y[:n], training.loss_fn)


def _inputs(training: Training, config: Config) -> list[Tensor]:
    """What BatchNorm's statistics are gathered from."""
    return list(training.x[: config.task.measured].split(BATCH))


def _follow(
    training: Training, config: Config, tick: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """The training to its end: the steps from here, and the objective after each."""
    watched = training.epoch + config.watch
    taken = 0
    steps: list[float] = []
    losses: list[float] = []

    def record() -> None:
        if taken in steps:
            return
        here = landscape.weights(training.model)
        loss, inputs = _objective(training, config), _inputs(training, config)
        found = landscape.line(loss, training.model, here, here, [0.0], refresh=inputs)
        steps.append(taken)
        losses.append(float(found.losses))

    def on_step() -> None:
        nonlocal taken
        taken += 1
        if training.epoch < watched:
            record()

    def on_epoch() -> None:
        record()
        tick()

    record()
    training.run(on_step=on_step, on_epoch=on_epoch)
    return steps, losses


def _line(
    name: str, one: Training, two: Training, found: data.Dataset, config: Config
) -> dict[str, list[float]]:
    """The straight line from one solution to another."""
    model, places = two.model, alphas(config.task.points)
    start, end = landscape.weights(one.model), landscape.weights(model)
    plain = nn.functional.cross_entropy
    measures = {
        "train": _objective(two, config),
        "test": _mean_loss(model, found.x_test, found.y_test, plain),
    }
    columns = {}
    for what, loss in measures.items():
        line = landscape.line(loss, model, start, end, places, refresh=_inputs(two, config))
        columns[f"{name}_{what}"] = line.losses.tolist()
    if any(buffer.is_floating_point() for buffer in model.buffers()):
        columns[f"{name}_carried"] = _carried(one, two, places, config)
    apart = [b - a for a, b in zip(start, end, strict=True)]
    columns[f"{name}_distance"] = [float(global_norm(apart))]
    return columns


def _carried(one: Training, two: Training, places: list[float], config: Config) -> list[float]:
    """The objective on the line with buffers interpolated as weights are."""
    start, end = landscape.weights(one.model), landscape.weights(two.model)
    between = two.branch(two.phases)  # its model is a copy
    loss = _objective(between, config)
    losses = []
    for alpha in places:
        models = (between.model, one.model, two.model)
        for buffer, a, b in zip(*(model.buffers() for model in models), strict=True):
            if buffer.is_floating_point():
                buffer.copy_(torch.lerp(a, b, alpha))
        line = landscape.line(loss, between.model, start, end, [alpha], refresh=False)
        losses.append(float(line.losses))
    return losses


def _sharpness(training: Training, config: Config) -> float:
    """The top eigenvalue of the objective's Hessian, in evaluation mode."""
    found = late_phase.hessian(training, config.task).top(tol=config.task.tol)
    return float(found.values[0])


# --- what the runs decide ------------------------------------------------------------------------


def line(run: Run, name: str, what: str = "train") -> landscape.Line:
    """One of a run's lines: "train", "test" or, with batch norm, "carried"."""
    columns = run["alpha"], run[f"{name}_{what}"]
    return landscape.Line(*map(torch.from_numpy, columns))


def barrier(run: Run, name: str, what: str = "train") -> float:
    """The barrier of a line, over the mean loss of its two ends.

    That loss is not all to be won: with label smoothing none is below the entropy of the labels.
    """
    found = line(run, name, what)
    ends = [float(found.losses[found.alphas == alpha]) for alpha in (0, 1)]
    return found.barrier / (sum(ends) / 2)


def peak(run: Run, method: str, config: dict[str, Any]) -> float:
    """The highest loss on the path, "sam" or "sgd", within the epochs that are watched.

    The epochs after them have one measurement each.
    """
    per_epoch = -(-config["task"]["train"] // config["task"]["batch"])
    watched = run["step"] <= config["watch"] * per_epoch
    return float(run[f"{method}_path"][watched].max())


def _over_line(run: Run, config: dict[str, Any]) -> float:
    """The path's peak over the highest loss on the line between its ends."""
    found = line(run, "sam")
    inside = (found.alphas >= 0) & (found.alphas <= 1)
    return peak(run, "sam", config) / float(found.losses[inside].max())


def _beside_rise(run: Run, config: dict[str, Any]) -> float:
    """The line's barrier over the rise on the path; infinite where nothing rises there."""
    rise = peak(run, "sam", config) - float(run["sam_path"][0])
    return line(run, "sam").barrier / rise if rise > 0 else math.inf


def claims() -> list[Claim]:
    """One valley, and what would show that there are two."""

    def first(
        statistic: Callable[..., float], *args: Any, config: bool = False
    ) -> Callable[[Result], list[float]]:
        """Of the first setting's run."""
        return _of(0, statistic, *args, config=config)

    def ratio(one: str, two: str) -> Callable[[Result], list[float]]:
        return first(lambda run: float(run[f"{one}_sharpness"][0] / run[f"{two}_sharpness"][0]))

    return [
        Claim(
            "no-barrier",
            "Switch and end lie in one valley: barrier on the straight line between them, over the "
            "loss at its ends",
            ZHOU,
            "",
            first(barrier, "sam"),
            Criterion(high=0.05),
        ),
        Claim(
            "no-barrier-in-test-loss",
            "The same for the test loss",
            ZHOU,
            "",
            first(barrier, "sam", "test"),
            Criterion(high=0.05),
        ),
        Claim(
            "path-leaves-the-line",
            "SAM's path rises above the line: its highest loss soon after the switch over the "
            "highest on the line",
            ZHOU,
            "",
            first(_over_line, config=True),
            Criterion(low=1.1),
        ),
        Claim(
            "barrier-below-rise",
            "The barrier is small beside the rise on the path: ratio",
            ZHOU,
            "",
            first(_beside_rise, config=True),
            Criterion(high=0.05),
        ),
        Claim(
            "rise-is-sams",
            "SGD, going on from the switch, does not rise as high: highest loss on SAM's path over "
            "that on SGD's, soon after the switch",
            "control",
            "",
            first(
                lambda run, config: peak(run, "sam", config) / peak(run, "sgd", config),
                config=True,
            ),
            Criterion(low=1.1),
        ),
        Claim(
            "end-is-flatter",
            "The end is flatter than the switch: sharpness, ratio",
            ZHOU,
            "",
            ratio("sam", "switch"),
            Criterion(high=0.8),
        ),
        Claim(
            "flatter-than-sgd",
            "SGD, going on for as many epochs, does not end as flat: sharpness after SAM over that "
            "after SGD",
            ZHOU,
            "",
            ratio("sam", "sgd"),
            Criterion(high=0.8),
        ),
        Claim(
            "siblings-share-it",
            "The two ends lie in one valley too, SGD's and SAM's: barrier over the loss at the "
            "ends",
            "control",
            "",
            first(barrier, "siblings"),
            Criterion(high=0.05),
        ),
        Claim(
            "independent-runs-do-not",
            "Between two independent runs of SGD there is a barrier: over the loss at the ends",
            "Frankle et al. 2020",
            "",
            first(barrier, "independent"),
            Criterion(low=0.2),
        ),
        Claim(
            "another-order-suffices",
            "Between two runs from the same initial weights, with the examples in another order, "
            "there is one too",
            "Frankle et al. 2020",
            "",
            first(barrier, "order"),
            Criterion(low=0.2),
        ),
        Claim(
            "one-valley-not-two",
            "The barrier between switch and end is small beside that between independent runs: "
            "ratio",
            ZHOU,
            "",
            first(lambda run: line(run, "sam").barrier / line(run, "independent").barrier),
            Criterion(high=0.05),
        ),
        Claim(
            "no-barrier-with-batchnorm",
            "With batch norm, its statistics gathered anew, there is no barrier either: over the "
            "loss at the ends",
            ZHOU,
            "",
            _of(-1, barrier, "sam"),
            Criterion(high=0.05),
        ),
        Claim(
            "statistics-matter",
            "Interpolated statistics feign a barrier between independent runs: barrier with those "
            "gathered anew, over that with interpolated ones",
            "Jordan et al. 2023",
            "",
            _of(
                -1,
                lambda run: (
                    line(run, "independent").barrier / line(run, "independent", "carried").barrier
                ),
            ),
            Criterion(high=0.8),
        ),
    ]


def _of(
    index: int, statistic: Callable[..., float], *args: Any, config: bool = False
) -> Callable[[Result], list[float]]:
    """A statistic of the runs of one setting, of the result's config too where that is asked."""

    def at(result: Result, seed: int) -> float:
        run = result.select(seed=seed, **result.settings[index])[0]
        return statistic(run, *args, *([result.config] if config else []))

    return each_seed(at)


EXPERIMENT = Experiment(
    name="same_valley",
    title="Late SAM stays in SGD's valley: lines between solutions",
    source="Zhou et al. 2025 (arXiv:2410.10373), linear paths and loss after the switch",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=claims(),
)
