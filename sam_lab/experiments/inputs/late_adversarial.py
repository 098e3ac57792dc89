r"""When to begin adversarial training: what late-phase SAM asks, asked of attacks on the inputs.

SGD up to some epoch and adversarial training from there, the reverse, and each throughout, under
schedules of the learning rate that leave the late phase more of it or less (see `switching`).
Training attacks with few steps of PGD. The judges are PGD with many steps and restarts, and of
AutoAttack its two attacks that use the gradient and nothing else; where the other two, which take
most of the time, are run as well, it is to see what they add.

The laptop has a fully connected network on the real MNIST digits that a package carries; the
desktop a small wide residual network on a tenth of CIFAR-10, at the radius of the paper's code; the
paper's scale that network on all of CIFAR-10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sam_lab import data
from sam_lab.adversarial import AUTOATTACK, Threat, autoattack, pgd, robust_accuracy
from sam_lab.experiments import networks
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.robustness import GRADIENT_ATTACKS, input_gradient, two_judges
from sam_lab.experiments.statistics import each_seed
from sam_lab.experiments.switching import (
    SCHEDULES,
    base,
    branches,
    ends,
    off_the_clock,
    reached,
    summed_lr,
)
from sam_lab.training import Phase, Training, crop_and_flip, evaluate

__all__ = ["DESKTOP", "EXPERIMENT", "LAPTOP", "PAPER", "Config", "attack", "prepare", "run"]

ZHOU = "Zhou et al. 2025, carried over to adversarial training"
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
        eps, steps: radius of the attack in the maximum norm, and its steps in training.
        late, early: at which share of the epochs runs switch to attacked examples, or away.
        schedules: of the learning rate; the first is the base's.
        judged: test examples that AutoAttack's first two attacks see.
        checked: those that all four see, of the network that was attacked throughout.
        measured: training examples over which sharpness and input gradient are taken.
        tol: of the sharpness (relative residual).
    """

    data: str
    train: int
    test: int
    hidden: tuple[int, ...] = ()
    depth: int = 10
    width: int = 1
    stride: int = 1
    augment: bool = False
    epochs: int = 40
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    eps: float = 0.1
    steps: int = 5
    late: tuple[float, ...] = (0.5, 0.75, 0.9)
    early: tuple[float, ...] = (0.5, 0.9)
    schedules: tuple[str, ...] = ("constant", "steps")
    judged: int = 200
    checked: int = 0
    measured: int = 1000
    tol: float = 5e-2


def attack(config: Config) -> Callable[..., torch.Tensor]:
    """The attack of training."""
    return partial(pgd, threat=Threat("linf", config.eps), steps=config.steps)


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, of SGD throughout, and its data.

    The model takes pixels in [0, 1] and has its normalisation inside.
    """
    found = data.load(config.data, train=config.train, test=config.test, seed=seed, device=device)
    training = Training(
        networks.normalized(networks.build(config, found, seed, device), found),
        found.x,
        found.y,
        partial(
            torch.optim.SGD,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        ),
        [Phase(0, config.epochs)],
        batch=config.batch,
        schedule=SCHEDULES[setting["schedule"]],
        augment=crop_and_flip() if config.augment else None,
        seed=seed,
    )
    return training, found


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """All switching times of one setting.

    Returns:
        Columns with a row for each run, which trained on attacked examples in the epochs
        [`switched_on`, `switched_off`); an empty interval is SGD throughout. `passes` through the
        model in training; `natural_error` and `pgd_error` on the test set, `pgd_error_judged` and
        `autoattack_error` on its first `judged` examples; `train_error` and `train_pgd_error` on
        the measured training examples, the latter under the attack of training; `sharpness` of the
        cross-entropy in the weights, `input_gradient` (mean 1-norm), on the same. Of the network
        that was attacked throughout, `checked_error` under all of AutoAttack and
        `checked_error_by_two` under its first two attacks, on the first `checked` examples.

    Raises:
        ValueError: shares of the epochs in `late` or `early` that fall on one epoch, or on none
            that can be switched at.
    """
    start, found = prepare(config, setting, seed, device)
    how = {"attack": attack(config)}
    rows = []
    for interval, _, end in branches(start, config.late, config.early, how, progress):
        rows.append(interval | _end(end, found, config, seed))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if config.checked:  # the last run was attacked throughout
        x, y = found.x_test[: config.checked], found.y_test[: config.checked]
        judge = partial(autoattack, threat=Threat("linf", config.eps), seed=seed)
        judges = {"checked_error": AUTOATTACK, "checked_error_by_two": GRADIENT_ATTACKS}
        for name, attacks in judges.items():
            robust = robust_accuracy(end.model, x, y, partial(judge, attacks=attacks))[1]
            columns[name] = [1 - robust]
    return columns


def _end(training: Training, found: data.Dataset, config: Config, seed: int) -> dict[str, float]:
    model, few = training.model, slice(config.measured)
    x, y = found.x[few], found.y[few]
    judges = two_judges(
        model,
        found.x_test,
        found.y_test,
        Threat("linf", config.eps),
        judged=config.judged,
        seed=seed,
    )
    H = networks.hessian(model, x, y)
    return {
        "passes": training.history[-1]["passes"],
        **judges,
        "train_error": evaluate(model, x, y)[1],
        "train_pgd_error": 1 - robust_accuracy(model, x, y, attack(config))[1],
        "sharpness": float(H.top(tol=config.tol).values[0]),
        "input_gradient": input_gradient(model, x, y),
    }


# --- what the runs decide -------------------------------------------------------------------------


LATE = 0.9  # the share of the epochs that the claims about late training leave to SGD


def _clock(result: Result) -> list[float]:
    """By how many points the robust error after a late phase under another schedule lies above
    that at a constant rate where the summed learning rate is the same, mean over the switches.

    Raises:
        ValueError: there is no other schedule with a late phase of a length to compare.
    """

    def course(schedule: str) -> tuple[np.ndarray, np.ndarray]:
        return summed_lr(result, "autoattack_error", schedule=schedule)

    return [100 * float(np.mean(found)) for found in off_the_clock(result, course)]


def _claims(schedule: str) -> list[Claim]:
    """What is asked under one schedule; robust errors are by AutoAttack's first two attacks."""

    def on(statistic: Callable[[Run], float]) -> Callable[[Result], list[float]]:
        return each_seed(lambda result, seed: statistic(base(result, seed, schedule=schedule)))

    def points(
        name: str, one: tuple[Any, ...], two: tuple[Any, ...]
    ) -> Callable[[Result], list[float]]:
        """By how many percentage points the error of one lies above that of the other."""
        return on(lambda run: 100 * (ends(run, name, *one) - ends(run, name, *two)))

    robust = "autoattack_error"
    return [
        Claim(
            "late-is-robust",
            "Adversarial training in the last tenth of the epochs becomes about as robust as "
            "throughout: share of the way from SGD's robust error",
            ZHOU,
            "",
            on(lambda run: reached(run, robust, "late", LATE)),
            Criterion(low=0.8),
        ),
        Claim(
            "late-half-is-robust",
            "In the second half it does",
            HERE,
            "",
            on(lambda run: reached(run, robust, "late", 0.5)),
            Criterion(low=0.8),
        ),
        Claim(
            "late-is-natural",
            "In the last tenth it costs no more natural error than throughout: by how much more",
            ZHOU,
            "points",
            points("natural_error", ("late", LATE), ("full",)),
            Criterion(high=0.0),
        ),
        Claim(
            "early-is-forgotten",
            "After adversarial training for the first nine tenths, SGD ends about as vulnerable as "
            "SGD throughout: share of the way that is left",
            ZHOU,
            "",
            on(lambda run: reached(run, robust, "early", LATE)),
            Criterion(high=0.2),
        ),
        Claim(
            "late-half-counts-more",
            "The second half of the epochs makes more robust than the first half: by how much the "
            "robust error is smaller",
            ZHOU,
            "points",
            points(robust, ("early", 0.5), ("late", 0.5)),
            Criterion(low=0.0),
        ),
        Claim(
            "training-costs-accuracy",
            "Adversarial training throughout has a larger natural error than SGD: by how much",
            "Tsipras et al. 2019",
            "points",
            points("natural_error", ("full",), ("sgd",)),
            Criterion(low=0.0),
        ),
    ]


def claims() -> list[Claim]:
    """The claims at a constant learning rate, the same in steps, and what compares the two."""

    def both(statistic: Callable[[Run, Run], float]) -> Callable[[Result], list[float]]:
        return each_seed(
            lambda result, seed: statistic(
                *(base(result, seed, schedule=name) for name in ("constant", "steps"))
            )
        )

    in_steps = [
        dataclasses.replace(
            claim, id=f"{claim.id}-in-steps", statement=f"In steps. {claim.statement}"
        )
        for claim in _claims("steps")
    ]
    return [
        *_claims("constant"),
        *in_steps,
        Claim(
            "schedule-decides",
            "The schedule decides what the last tenth can do: share of the way at a constant "
            "learning rate less that in steps",
            HERE,
            "",
            both(
                lambda constant, steps: (
                    reached(constant, "autoattack_error", "late", LATE)
                    - reached(steps, "autoattack_error", "late", LATE)
                )
            ),
            Criterion(low=0.2),
        ),
        Claim(
            "learning-rate-is-the-clock",
            "What late adversarial training does depends on the learning rate summed over its "
            "epochs: robust error after it under the other schedules, less that at a constant "
            "rate where the sum is the same (interpolated)",
            HERE,
            "points",
            _clock,
            Criterion(-5.0, 5.0),
        ),
        Claim(
            "no-judge-is-alone",
            "AutoAttack's first two attacks find more than PGD with restarts: by how much the "
            "error is larger, on the same examples, after adversarial training throughout",
            "Croce & Hein 2020",
            "points",
            both(
                lambda constant, _: (
                    100
                    * (
                        ends(constant, "autoattack_error", "full")
                        - ends(constant, "pgd_error_judged", "full")
                    )
                )
            ),
            Criterion(low=0.0),
        ),
        Claim(
            "two-attacks-suffice",
            "All of AutoAttack finds hardly more than its first two attacks: by how much the error "
            "is larger, on the same examples, after adversarial training throughout",
            "control",
            "points",
            both(
                lambda constant, _: (
                    100 * float(constant["checked_error"][0] - constant["checked_error_by_two"][0])
                )
            ),
            Criterion(high=1.0),
        ),
    ]


LAPTOP = Config(
    data="mnist_5k",
    train=4000,
    test=1000,
    hidden=(200, 200),
    schedules=("constant", "steps", "drop"),
    judged=500,
    checked=200,
)
DESKTOP = Config(
    data="cifar10",
    train=5000,
    test=500,
    stride=2,
    lr=0.1,
    epochs=30,
    eps=4 / 255,
    steps=4,
)
PAPER = dataclasses.replace(
    DESKTOP,
    train=50_000,
    test=10_000,
    depth=16,
    width=8,
    stride=1,
    augment=True,
    epochs=160,
    steps=10,
    late=(0.5, 0.75, 0.9, 0.9375),
    schedules=("constant", "steps", "drop"),
    judged=1000,
    checked=1000,
)

EXPERIMENT = Experiment(
    name="late_adversarial",
    title="Late adversarial training: the switching time",
    source="Zhou et al. 2025 (arXiv:2410.10373), the extension to adversarial training",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=lambda config: [{"schedule": schedule} for schedule in config.schedules],
    run=run,
    claims=claims(),
)
