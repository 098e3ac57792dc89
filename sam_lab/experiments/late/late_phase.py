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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, landscape
from sam_lab.curvature import Hessian
from sam_lab.experiments import networks
from sam_lab.experiments.core import Claim, Criterion, Result, Run
from sam_lab.experiments.statistics import each_seed, farthest_from_one
from sam_lab.experiments.switching import (
    SCHEDULES,
    base,
    branches,
    ends,
    off_the_clock,
    reached,
    summed_lr,
)
from sam_lab.perturbations import global_norm
from sam_lab.training import LossFn, Phase, Training, crop_and_flip, evaluate

__all__ = [
    "Config",
    "claims",
    "factor_claims",
    "fallen",
    "hessian",
    "late_over_sgd",
    "objective",
    "prepare",
    "run",
    "settings",
]

ZHOU = "Zhou et al. 2025"
HERE = "this book"


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, train, test: the data set, and how many examples of it.
        hidden: widths of a fully connected network's hidden layers; empty for a wide residual
            network.
        depth, width, stride: of the wide residual network (see `models.wide_resnet`).
        augment: whether images are shifted and mirrored.
        epochs, batch, lr, momentum, weight_decay: of SGD.
        late, early: at which share of the epochs runs switch to SAM, or away from it.
        schedules, rhos, smoothings, carried: the factors; the first entry of each is the base's.
            `carried`: whether momentum survives the switch.
        measured: training examples over which the Hessian is taken.
        tol, trace_tol: of the top eigenvalue (relative residual) and of the trace (relative
            standard error).
        points: on the line from the switch to the end.
    """

    data: str
    train: int
    test: int
    hidden: tuple[int, ...] = ()
    depth: int = 10
    width: int = 1
    stride: int = 1
    augment: bool = False
    epochs: int = 80
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    late: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    early: tuple[float, ...] = (0.5, 0.9)
    schedules: tuple[str, ...] = ("constant", "steps")
    rhos: tuple[float, ...] = (0.1,)
    smoothings: tuple[float, ...] = (0.1,)
    carried: tuple[bool, ...] = (True,)
    measured: int = 1000
    tol: float = 2e-2
    trace_tol: float = 0.1
    points: int = 11


def settings(config: Config) -> list[dict[str, Any]]:
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


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, of SGD throughout, and its data.

    Raises:
        ValueError: an unknown data set or schedule, or more examples than there are.
    """
    found = data.load(config.data, train=config.train, test=config.test, seed=seed, device=device)
    if config.data != "mnist1d":  # which its generator has standardised
        found = _standardized(found)
    if setting["schedule"] not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule must be one of {known}, got {setting['schedule']!r}")
    optimizer = partial(
        torch.optim.SGD,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    training = Training(
        networks.build(config, found, seed, device),
        found.x,
        found.y,
        optimizer,
        [Phase(0, config.epochs)],
        loss_fn=nn.CrossEntropyLoss(label_smoothing=setting["smoothing"]),
        batch=config.batch,
        schedule=SCHEDULES[setting["schedule"]],
        augment=crop_and_flip() if config.augment else None,
        carry=setting["carried"],
        seed=seed,
    )
    return training, found


def _standardized(found: data.Dataset) -> data.Dataset:
    """Both sets less the training set's mean, over its standard deviation, a channel each."""
    std, mean = torch.std_mean(found.x, (0, 2, 3), keepdim=True)
    return dataclasses.replace(found, x=(found.x - mean) / std, x_test=(found.x_test - mean) / std)


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
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
    start, found = prepare(config, setting, seed, device)
    how = {"rho": setting["rho"]}
    rows = []
    for interval, switch, end in branches(start, config.late, config.early, how, progress):
        way = dict.fromkeys(_WAY, float("nan")) if switch is None else _way(switch, end, config)
        rows.append(interval | _end(end, found, config) | way)
    return {name: [row[name] for row in rows] for name in rows[0]}


_WAY = ("distance", "barrier", "switch_objective", "switch_sharpness")


def objective(training: Training, config: Config) -> Callable[[], Tensor]:
    """The loss of training over the examples that are measured, in the model's present mode."""
    x, y = training.x[: config.measured], training.y[: config.measured]
    return lambda: training.loss_fn(training.model(x), y)


def hessian(training: Training, config: Config, loss_fn: LossFn | None = None) -> Hessian:
    """The Hessian over the examples that are measured; puts the model into evaluation mode.

    Args:
        loss_fn: ``loss_fn(outputs, labels)``; that of training unless given.
    """
    few = slice(config.measured)
    return networks.hessian(
        training.model, training.x[few], training.y[few], loss_fn or training.loss_fn
    )


def _end(training: Training, found: data.Dataset, config: Config) -> dict[str, float]:
    """What is measured at the end of a run."""
    model = training.model
    train_loss, train_error = evaluate(model, found.x, found.y)
    test_loss, test_error = evaluate(model, found.x_test, found.y_test)
    plain = hessian(training, config, nn.functional.cross_entropy)
    trace = plain.trace(tol=config.trace_tol)
    return {
        "passes": training.history[-1]["passes"],
        "objective": evaluate(model, found.x, found.y, training.loss_fn)[0],
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
        "sharpness_objective": _sharpness(hessian(training, config), config),
        "sharpness": _sharpness(plain, config),
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "norm": float(global_norm(list(model.parameters()))),
    }


def _sharpness(H: Hessian, config: Config) -> float:
    return float(H.top(tol=config.tol).values[0])


def _way(switch: Training, end: Training, config: Config) -> dict[str, float]:
    """What lies between the switch and the end."""
    before, after = landscape.weights(switch.model), landscape.weights(end.model)
    H = hessian(switch, config)
    end.model.eval()
    line = landscape.line(
        objective(end, config),
        end.model,
        before,
        after,
        config.points,
        refresh=end.x[: config.measured].split(1000),
    )
    apart = [two - one for one, two in zip(before, after, strict=True)]
    return {
        "distance": float(global_norm(apart)),
        "barrier": line.barrier,
        "switch_objective": H.loss(),
        "switch_sharpness": _sharpness(H, config),
    }


# --- what the runs decide -------------------------------------------------------------------------


def _reached(run: Run, method: str, share: float, name: str = "sharpness_objective") -> float:
    return reached(run, name, method, share, log=True)


LATE = 0.9  # the share of the epochs that the claims about late SAM leave to SGD


def claims() -> list[Claim]:
    """The paper's claims on one task, and what decides them.

    At a constant learning rate; `_ALSO_IN_STEPS` with the schedule of the paper's code too.
    """
    in_steps = [
        dataclasses.replace(
            claim, id=f"{claim.id}-in-steps", statement=f"In steps. {claim.statement}"
        )
        for claim in _claims("steps")
        if claim.id in _ALSO_IN_STEPS
    ]
    return [
        *_claims("constant"),
        *in_steps,
        Claim(
            "learning-rate-decides",
            "With the schedule that takes the learning rate down in steps, SAM in the last tenth "
            "changes the sharpness less than half as much as at a constant one: ratio of the "
            "logarithms of late SAM's sharpness over SGD's",
            HERE,
            "",
            _beside("schedule", lambda constant, other: _change(other) / _change(constant)),
            Criterion(high=0.5),
        ),
    ]


_ALSO_IN_STEPS = (
    "sam-is-flatter",
    "late-sam-is-as-flat",
    "sam-generalizes-better",
    "late-sam-generalizes-better",
    "late-half-counts-more",
    "late-half-generalizes-better",
    "early-sam-is-forgotten",
)


def _claims(schedule: str) -> list[Claim]:
    """The paper's claims under one schedule."""

    def on_base(statistic: Callable[[Run], float]) -> Callable[[Result], list[float]]:
        return each_seed(lambda result, seed: statistic(base(result, seed, schedule=schedule)))

    def points(one: tuple[Any, ...], two: tuple[Any, ...]) -> Callable[[Result], list[float]]:
        """By how many percentage points the test error of one lies above that of the other."""
        return on_base(lambda run: _points(run, one, two))

    def ratio(
        name: str, one: tuple[Any, ...], two: tuple[Any, ...]
    ) -> Callable[[Result], list[float]]:
        return on_base(lambda run: ends(run, name, *one) / ends(run, name, *two))

    return [
        Claim(
            "sam-is-flatter",
            "SAM throughout ends flatter than SGD: sharpness of the training objective, ratio",
            ZHOU,
            "",
            ratio("sharpness_objective", ("full",), ("sgd",)),
            Criterion(high=0.8),
        ),
        Claim(
            "late-sam-is-as-flat",
            "SAM in the last tenth of the epochs reaches about the sharpness of SAM throughout: "
            "share of the way from SGD's, in the logarithm",
            ZHOU,
            "",
            on_base(lambda run: _reached(run, "late", LATE)),
            Criterion(low=0.8),
        ),
        Claim(
            "late-sam-is-as-flat-in-trace",
            "The same for the trace of the Hessian of cross-entropy",
            ZHOU,
            "",
            on_base(lambda run: _reached(run, "late", LATE, "trace")),
            Criterion(low=0.8),
        ),
        Claim(
            "late-sam-halfway",
            "It goes at least half of that way",
            HERE,
            "",
            on_base(lambda run: _reached(run, "late", LATE)),
            Criterion(low=0.5),
        ),
        Claim(
            "sam-generalizes-better",
            "SAM throughout has a smaller test error than SGD: by how much",
            ZHOU,
            "points",
            points(("sgd",), ("full",)),
            Criterion(low=0.0),
        ),
        Claim(
            "late-sam-generalizes-better",
            "SAM in the last tenth has a smaller test error than SGD: by how much",
            ZHOU,
            "points",
            points(("sgd",), ("late", LATE)),
            Criterion(low=0.0),
        ),
        Claim(
            "late-sam-generalizes-as-well",
            "Its test error is about that of SAM throughout: by how much it is larger",
            ZHOU,
            "points",
            points(("late", LATE), ("full",)),
            Criterion(-0.25, 0.25),
        ),
        Claim(
            "late-half-counts-more",
            "SAM in the second half of the epochs ends flatter than SAM in the first half: "
            "sharpness of the training objective, ratio",
            ZHOU,
            "",
            ratio("sharpness_objective", ("late", 0.5), ("early", 0.5)),
            Criterion(high=0.9),
        ),
        Claim(
            "late-half-generalizes-better",
            "It also has a smaller test error: by how much",
            ZHOU,
            "points",
            points(("early", 0.5), ("late", 0.5)),
            Criterion(low=0.0),
        ),
        Claim(
            "early-sam-is-forgotten",
            "After SAM for the first nine tenths, SGD ends about as sharp as SGD throughout: share "
            "of the way from SGD's sharpness to SAM's that is left",
            ZHOU,
            "",
            on_base(lambda run: _reached(run, "early", LATE)),
            Criterion(high=0.2),
        ),
        Claim(
            "no-barrier",
            "Switch and end lie in one valley: barrier on the straight line between them, over the "
            "objective at the switch",
            ZHOU,
            "",
            on_base(
                lambda run: (
                    ends(run, "barrier", "late", LATE) / ends(run, "switch_objective", "late", LATE)
                )
            ),
            Criterion(high=0.05),
        ),
    ]


def late_over_sgd(run: Run) -> float:
    """Sharpness after SAM in the last tenth, over that of SGD throughout."""
    late, sgd = (ends(run, "sharpness_objective", *which) for which in (("late", LATE), ("sgd",)))
    return late / sgd


def _change(run: Run) -> float:
    """The logarithm of `late_over_sgd`."""
    return float(np.log(late_over_sgd(run)))


def _late_ratio(one: Run, two: Run) -> float:
    """Sharpness after SAM in the last tenth, of one setting over the other's."""
    name = "sharpness_objective"
    return ends(two, name, "late", LATE) / ends(one, name, "late", LATE)


def _beside(factor: str, statistic: Callable[[Run, Run], float]) -> Callable[[Result], list[float]]:
    """A statistic of two runs: the first and the last value of a factor, all else the base's."""

    def at(result: Result, seed: int) -> float:
        values = sorted({setting[factor] for setting in result.settings})
        one, two = (base(result, seed, **{factor: value}) for value in (values[0], values[-1]))
        return statistic(one, two)

    return each_seed(at)


def fallen(result: Result, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    """How long late SAM has had, and how far the sharpness has come.

    Returns:
        The learning rate summed over the epochs of SAM (T,), ascending, for each late switch;
        sharpness at the end over that of SGD throughout, (seeds, T).
    """
    name = "sharpness_objective"
    sums, sharpness = summed_lr(result, name, **changed)
    sgd = [ends(base(result, seed, **changed), name, "sgd") for seed in result.seeds]
    return sums, sharpness / np.array(sgd)[:, None]


def _clock(result: Result) -> list[float]:
    """Late SAM's fall under the other schedules, over that at the constant rate in equal time."""

    def course(schedule: str) -> tuple[np.ndarray, np.ndarray]:
        sums, ratio = fallen(result, schedule=schedule)
        return sums, np.log(ratio)

    return [farthest_from_one(np.exp(found)) for found in off_the_clock(result, course)]


def _dropped(result: Result, seed: int) -> Run:
    return base(result, seed, schedule="drop")


def _points(run: Run, one: tuple[Any, ...], two: tuple[Any, ...]) -> float:
    """By how many percentage points the test error of one end lies above that of another."""
    return 100 * (ends(run, "test_error", *one) - ends(run, "test_error", *two))


def factor_claims() -> list[Claim]:
    """What else could decide: for tasks that change momentum, radius and smoothing too."""
    return [
        Claim(
            "learning-rate-is-the-clock",
            "What late SAM does depends on the learning rate summed over its epochs: sharpness "
            "over SGD's under the other schedules, over that at a constant rate where the sum is "
            "the same (interpolated), farthest from 1",
            HERE,
            "",
            _clock,
            Criterion(0.8, 1.25),
        ),
        Claim(
            "late-sam-before-a-drop",
            "SAM in the last quarter, with the learning rate dropping to a tenth for the last "
            "tenth, goes at least half of the way from SGD's sharpness to SAM's",
            HERE,
            "",
            each_seed(lambda result, seed: _reached(_dropped(result, seed), "late", 0.75)),
            Criterion(low=0.5),
        ),
        Claim(
            "late-sam-before-a-drop-generalizes",
            "It has a smaller test error than SGD with the same schedule: by how much",
            HERE,
            "points",
            each_seed(
                lambda result, seed: _points(_dropped(result, seed), ("sgd",), ("late", 0.75))
            ),
            Criterion(low=0.0),
        ),
        Claim(
            "early-sam-before-a-drop-generalizes",
            "So has SAM in the first quarter: by how much",
            "control",
            "points",
            each_seed(
                lambda result, seed: _points(_dropped(result, seed), ("sgd",), ("early", 0.25))
            ),
            Criterion(low=0.0),
        ),
        Claim(
            "momentum-does-not-decide",
            "Whether momentum survives the switch makes no difference: sharpness after SAM in the "
            "last tenth, carried over emptied",
            HERE,
            "",
            _beside("carried", _late_ratio),
            Criterion(0.8, 1.25),
        ),
        Claim(
            "radius-decides",
            "The larger radius ends flatter: sharpness after SAM in the last tenth, largest radius "
            "over smallest",
            HERE,
            "",
            _beside("rho", _late_ratio),
            Criterion(high=0.8),
        ),
        Claim(
            "plain-loss-misleads",
            "Trained without label smoothing, late SAM looks sharper than SGD, whose loss and "
            "curvature vanish: ratio of sharpness",
            HERE,
            "",
            _beside("smoothing", lambda plain, smoothed: late_over_sgd(plain)),
            Criterion(low=1.0),
        ),
    ]
