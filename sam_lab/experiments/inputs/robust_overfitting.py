r"""Robust overfitting: adversarial training past its best epoch.

In natural training the test error goes on falling, or stays, while the training error goes to zero.
Under attack it is otherwise: once the learning rate has dropped, the robust error on training
examples keeps falling and that on test examples rises again. Whoever watches the natural error does
not see it, and whoever reports the last epoch reports less than was there.

The learning rate drops to a tenth at each of the `drops`. Every `every` epochs the errors are
measured, under a light attack; the *best* of these epochs is the one with the least error on
validation examples, which are neither trained nor tested on: robust error in adversarial training,
natural error in natural training. It is compared with the *last*, by the judges of
`robustness.two_judges`.

Adversarial training has SAM around it (see `adversarial_sam`), more examples, or no attack at all.
With more examples an epoch has more steps, so that they have no less time to overfit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import adversarial_sam, late_adversarial
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.robustness import two_judges
from sam_lab.experiments.statistics import each_seed
from sam_lab.experiments.switching import base
from sam_lab.training import Training, step_decay

__all__ = ["Config", "curves", "prepare", "rise", "run", "settings"]

RICE = "Rice et al. 2020"
HERE = "this book"

WATCH = 10  # steps of the attack along the epochs


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        task: data, network, training and judges, as in `adversarial_sam`; its schedules do not
            hold, and nothing switches.
        examples: how many are trained on; the first is the base.
        validation: examples, the last of the task's training set, that are not trained on.
        rhos: radii of SAM around adversarial training.
        natural: whether there is training without attack.
        drops: shares of the epochs from which on the learning rate is a tenth of what it was.
        every: epochs from one measurement to the next.
    """

    task: late_adversarial.Config
    examples: tuple[int, ...] = (1000, 2500)
    validation: int = 500
    rhos: tuple[float, ...] = (0.05,)
    natural: bool = True
    drops: tuple[float, ...] = (0.5, 0.75)
    every: int = 2


def settings(config: Config) -> list[dict[str, Any]]:
    """Adversarial training, and what differs from it in one factor."""
    base = {"examples": config.examples[0], "rho": 0.0, "attacked": True}
    changed: list[dict[str, Any]] = [{"examples": n} for n in config.examples[1:]]
    changed += [{"rho": rho} for rho in config.rhos]
    changed += [{"attacked": False}] if config.natural else []
    return [base, *({**base, **change} for change in changed)]


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, and its data, validation examples among the training set.

    Raises:
        ValueError: more examples are asked for than there are beside those of the validation.
    """
    examples = setting["examples"]
    if not 0 < examples <= config.task.train - config.validation:
        raise ValueError(
            f"examples must be at most {config.task.train} less {config.validation} of the "
            f"validation, got {examples}"
        )
    about = adversarial_sam.Config(config.task, config.validation)
    how = {
        "rule": "sam",
        "rho": setting["rho"],
        "steps": config.task.steps if setting["attacked"] else 0,
    }
    training, found = adversarial_sam.prepare(about, how, seed, device)
    training.x, training.y = found.x[:examples], found.y[:examples]
    training.schedule = step_decay({at: 0.1**k for k, at in enumerate(config.drops, 1)})
    return training, found


ENDS = ("best", "last")
WATCHED = (
    *("natural_error", "robust_error", "train_natural_error", "train_robust_error"),
    *("validation_natural_error", "validation_robust_error"),
)


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One training, watched along its epochs.

    Returns:
        `epoch` (how many are done) and at each, under the light attack or none, `robust_error` and
        `natural_error` on the test set, the same with ``train_`` before them on the measured
        training examples, and with ``validation_`` on those of the validation. Of the best epoch
        and of the last, in this order, `end_epoch` and `end_natural_error`, `end_pgd_error`,
        `end_pgd_error_judged`, `end_autoattack_error` as by `robustness.two_judges`.
    """
    training, found = prepare(config, setting, seed, device)
    task, model, threat = config.task, training.model, Threat("linf", config.task.eps)
    attack = partial(pgd, threat=threat, steps=WATCH)
    held = slice(-config.validation, None)
    watched = {
        "": (found.x_test, found.y_test),
        "train_": (training.x[: task.measured], training.y[: task.measured]),
        "validation_": (found.x[held], found.y[held]),
    }
    chosen_by = f"validation_{'robust' if setting['attacked'] else 'natural'}_error"
    columns: dict[str, list[float]] = {name: [] for name in ("epoch", *WATCHED)}
    best: tuple[int, dict[str, Tensor]] = 0, {}

    def on_epoch() -> None:
        nonlocal best
        progress(training.epoch, training.epochs)
        if training.epoch % config.every and training.epoch < training.epochs:
            return
        for part, (x, y) in watched.items():
            natural, robust = robust_accuracy(model, x, y, attack)
            columns[f"{part}natural_error"].append(1 - natural)
            columns[f"{part}robust_error"].append(1 - robust)
        columns["epoch"].append(float(training.epoch))
        *before, now = columns[chosen_by]
        if now < min(before, default=2.0):
            best = training.epoch, copy.deepcopy(model.state_dict())

    training.run(on_epoch=on_epoch)
    ends = {training.epochs: _judged(model, found, config, seed)}
    if best[0] != training.epochs:
        model.load_state_dict(best[1])
        ends[best[0]] = _judged(model, found, config, seed)
    for epoch in (best[0], training.epochs):
        for name, value in {"epoch": float(epoch), **ends[epoch]}.items():
            columns.setdefault(f"end_{name}", []).append(value)
    return columns


def _judged(model: nn.Module, found: data.Dataset, config: Config, seed: int) -> dict[str, float]:
    task = config.task
    return two_judges(
        model,
        found.x_test,
        found.y_test,
        Threat("linf", task.eps),
        judged=task.judged,
        seed=seed,
    )


# --- what the runs decide -------------------------------------------------------------------------


def curves(result: Result, name: str, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column along the epochs.

    Args:
        name: such as "robust_error" or "train_robust_error".
        changed: in what the setting differs from the first, such as ``rho=0.05``.

    Returns:
        Epochs (T,); values (seeds, T).
    """
    runs = [base(result, seed, **changed) for seed in result.seeds]
    return runs[0]["epoch"], np.array([run[name] for run in runs])


def rise(run: Run, name: str) -> float:
    """By how many percentage points an error is larger at the last epoch than at the best.

    Args:
        name: of a column with these two rows, such as "end_pgd_error", or of one along the epochs.
    """
    values = run[name]
    if not name.startswith("end_"):
        values = values[[int(np.flatnonzero(run["epoch"] == at)[0]) for at in run["end_epoch"]]]
    best, last = values
    return float(100 * (last - best))


def _claims() -> list[Claim]:
    def rises(name: str, **changed: Any) -> Callable[[Result], list[float]]:
        return each_seed(lambda result, seed: rise(base(result, seed, **changed), name))

    def more(changed: Callable[[Result], dict[str, Any]]) -> Callable[[Result], list[float]]:
        """By how much the robust error rises more without the change."""
        name = "end_pgd_error"
        return each_seed(
            lambda result, seed: (
                rise(base(result, seed), name) - rise(base(result, seed, **changed(result)), name)
            )
        )

    def sam(result: Result) -> dict[str, Any]:
        return {"rho": result.config["rhos"][0]}

    def stopped(result: Result, seed: int) -> float:
        plain, other = base(result, seed), base(result, seed, **sam(result))
        name = "end_autoattack_error"
        return 100 * (float(plain[name][0]) - float(other[name][1]))

    return [
        Claim(
            "last-is-less-robust",
            "The last epoch of adversarial training is less robust than the best: by how much its "
            "error under PGD is larger",
            RICE,
            "points",
            rises("end_pgd_error"),
            Criterion(low=0.0),
        ),
        Claim(
            "the-other-judge-agrees",
            "The same under AutoAttack",
            "control",
            "points",
            rises("end_autoattack_error"),
            Criterion(low=0.0),
        ),
        Claim(
            "training-error-hides-it",
            "On training examples the robust error falls meanwhile: by how much it is larger",
            RICE,
            "points",
            rises("train_robust_error"),
            Criterion(high=0.0),
        ),
        Claim(
            "natural-error-hides-it",
            "The natural test error does not rise: by how much it is larger",
            RICE,
            "points",
            rises("end_natural_error"),
            Criterion(high=0.0),
        ),
        Claim(
            "best-is-after-the-first-drop",
            "The best epoch lies between the first drop of the learning rate and the second: share "
            "of the epochs",
            RICE,
            "",
            each_seed(
                lambda result, seed: (
                    base(result, seed)["end_epoch"][0] / base(result, seed)["end_epoch"][1]
                )
            ),
            Criterion(0.5, 0.75),
        ),
        Claim(
            "natural-training-does-not",
            "Training without attack does not overfit in this way: by how much its natural error "
            "is larger at the last epoch than at its best",
            RICE,
            "points",
            rises("end_natural_error", attacked=False),
            Criterion(high=0.5),
        ),
        Claim(
            "more-data-helps",
            "With more examples the robust error rises less: by how much",
            HERE,
            "points",
            more(lambda result: {"examples": result.config["examples"][-1]}),
            Criterion(low=0.0),
        ),
        Claim(
            "sam-helps",
            "With SAM around it the robust error rises less: by how much",
            "Wu et al. 2020, with SAM's ball",
            "points",
            more(sam),
            Criterion(low=0.0),
        ),
        Claim(
            "stopping-is-as-good",
            "The best epoch without SAM is about as robust as the last with it: by how much its "
            "error under AutoAttack is larger",
            RICE,
            "points",
            each_seed(stopped),
            Criterion(high=1.0),
        ),
    ]


LAPTOP = Config(
    dataclasses.replace(adversarial_sam.LAPTOP.task, epochs=40, judged=250, schedules=("constant",))
)
DESKTOP = Config(
    dataclasses.replace(adversarial_sam.DESKTOP.task, train=5500, schedules=("constant",)),
    examples=(5000,),
    natural=False,
)
PAPER = Config(
    dataclasses.replace(adversarial_sam.PAPER.task, schedules=("constant",)),
    examples=(20_000, 49_000),
    validation=1000,
)

EXPERIMENT = Experiment(
    name="robust_overfitting",
    title="Robust overfitting: the best epoch and the last",
    source="Rice et al. 2020 (arXiv:2002.11569)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=_claims(),
)
