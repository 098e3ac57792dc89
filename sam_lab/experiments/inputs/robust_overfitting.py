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
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import two_judges
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Result, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS, Recipe
from sam_lab.training import Phase, Training, step_decay

__all__ = ["Config", "curves", "prepare", "rise", "run", "settings"]

LIGHT_STEPS = 10  # of the attack along the epochs


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD.
        eps, attack_steps: radius of the attack in the maximum norm, and its steps in training.
        examples: how many are trained on; the first is the base.
        validation: examples, the last of the recipe's training set, that are not trained on.
        rhos: radii of SAM around adversarial training.
        natural: whether there is training without attack.
        drops: shares of the epochs from which on the learning rate is a tenth of what it was.
        every: epochs from one measurement to the next.
        n_autoattack: test examples that AutoAttack's two gradient attacks see.
    """

    recipe: Recipe
    eps: float = 0.1
    attack_steps: int = 5
    examples: tuple[int, ...] = (1000, 2500)
    validation: int = 500
    rhos: tuple[float, ...] = (0.05,)
    natural: bool = True
    drops: tuple[float, ...] = (0.5, 0.75)
    every: int = 2
    n_autoattack: int = 200


LAPTOP = Config(DIGITS.but(standardize="network"), n_autoattack=250)
DESKTOP = Config(
    CIFAR_TENTH.but(standardize="network", train=5500, epochs=15),
    eps=4 / 255,
    attack_steps=3,
    examples=(5000,),
    natural=False,
)
PAPER = Config(
    CIFAR.but(standardize="network"),
    eps=8 / 255,
    attack_steps=10,
    examples=(20_000, 49_000),
    validation=1000,
    n_autoattack=1000,
)


def settings(config: Config) -> list[Setting]:
    """Adversarial training, and what differs from it in one factor."""
    base = {"examples": config.examples[0], "rho": 0.0, "attacked": True}
    return [
        base,
        *({**base, "examples": n} for n in config.examples[1:]),
        *({**base, "rho": rho} for rho in config.rhos),
        *([{**base, "attacked": False}] if config.natural else []),
    ]


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A run before its first epoch, and its data, validation examples among the training set.

    Raises:
        ValueError: no validation examples, or more to train on than there are beside them.
    """
    recipe, examples = config.recipe, cell["examples"]
    if not 0 < examples <= recipe.train - config.validation < recipe.train:
        raise ValueError(
            f"examples must be at most {recipe.train} less {config.validation} (1 or more) of the "
            f"validation, got {examples}"
        )
    attack = None
    if cell["attacked"]:
        attack = partial(pgd, threat=Threat("linf", config.eps), steps=config.attack_steps)
    return recipe.training(
        cell.seed,
        cell.device,
        examples=examples,
        phases=[Phase(0, recipe.epochs, cell["rho"], attack=attack)],
        schedule=step_decay({at: 0.1**k for k, at in enumerate(config.drops, 1)}),
    )


def run(config: Config, cell: Cell) -> Columns:
    """One training, watched along its epochs.

    Returns:
        `epoch` (how many are done) and at each, under the light attack or none, `robust_error` and
        `natural_error` on the test set, the same with ``train_`` before them on the measured
        training examples, and with ``validation_`` on those of the validation. Of the best epoch
        and of the last, in this order, `end_epoch` and `end_natural_error`, `end_pgd_error`,
        `end_pgd_error_judged`, `end_autoattack_error` as by `robustness.two_judges`.
    """
    training, dataset = prepare(config, cell)
    model, threat = training.model, Threat("linf", config.eps)
    attack = partial(pgd, threat=threat, steps=LIGHT_STEPS)
    held_out = slice(-config.validation, None)
    parts = {
        "": (dataset.x_test, dataset.y_test),
        "train_": config.recipe.examined(training),
        "validation_": (dataset.x[held_out], dataset.y[held_out]),
    }
    chosen_by = f"validation_{'robust' if cell['attacked'] else 'natural'}_error"
    rows, ends = Rows(), Rows()
    best_epoch, best_weights = 0, model.state_dict()

    def on_epoch() -> None:
        nonlocal best_epoch, best_weights
        cell.tick(training.epoch, training.epochs)
        if training.epoch % config.every and training.epoch < training.epochs:
            return
        row = {"epoch": float(training.epoch)}
        for part, (x, y) in parts.items():
            natural, robust = robust_accuracy(model, x, y, attack)
            row |= {f"{part}natural_error": 1 - natural, f"{part}robust_error": 1 - robust}
        rows.add(**row)
        *before, now = rows.columns[chosen_by]
        if now < min(before, default=math.inf):
            best_epoch, best_weights = training.epoch, copy.deepcopy(model.state_dict())

    training.run(on_epoch=on_epoch)
    judge = partial(
        two_judges,
        model,
        dataset.x_test,
        dataset.y_test,
        threat,
        n_autoattack=config.n_autoattack,
        seed=cell.seed,
    )
    errors = {training.epochs: judge()}
    if best_epoch < training.epochs:
        model.load_state_dict(best_weights)
        errors[best_epoch] = judge()
    for epoch in (best_epoch, training.epochs):
        ends.add(end_epoch=epoch, **{f"end_{name}": e for name, e in errors[epoch].items()})
    return rows.columns | ends.columns


# --- what the runs say ----------------------------------------------------------------------------


def curves(result: Result, name: str, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column along the epochs.

    Args:
        name: such as "robust_error" or "train_robust_error".
        changed: in what the setting differs from the first, such as ``rho=0.05``.

    Returns:
        Epochs (T,); values (seeds, T).
    """
    runs = [of_seed.base(**changed) for of_seed in result.by_seed()]
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


def _with_sam(runs: SeedRuns) -> Run:
    return runs.base(rho=runs.config["rhos"][0])


# --- what the runs decide -------------------------------------------------------------------------

RICE = Source("Rice et al. 2020", "after")


@claim(RICE, low=0, unit="points", headline=True)
def last_is_less_robust(runs: SeedRuns) -> float:
    """The last epoch of adversarial training is less robust than the best: by how much its error
    under PGD is larger"""
    return rise(runs.base(), "end_pgd_error")


@claim(CONTROL, low=0, unit="points")
def the_other_judge_agrees(runs: SeedRuns) -> float:
    """AutoAttack too finds the last epoch of adversarial training less robust than the best: by how
    much its error under AutoAttack is larger"""
    return rise(runs.base(), "end_autoattack_error")


@claim(RICE, high=0, unit="points")
def training_error_hides_it(runs: SeedRuns) -> float:
    """On training examples the robust error goes on falling from the best epoch of adversarial
    training to the last: by how much it is larger at the last"""
    return rise(runs.base(), "train_robust_error")


# A claim of no difference needs a margin: with 0 it could not be reproduced where it is true.
@claim(RICE, high=1, unit="points", set_after=True)
def natural_error_hides_it(runs: SeedRuns) -> float:
    """The natural test error rises by no more than a point from the best epoch of adversarial
    training to the last: by how much it is larger at the last"""
    return rise(runs.base(), "end_natural_error")


@claim(RICE, 0.5, 0.75, domain="share")
def best_is_after_the_first_drop(runs: SeedRuns) -> float:
    """The best epoch of adversarial training lies between the first drop of the learning rate and
    the second: its place, as a share of the epochs"""
    best, last = runs.base()["end_epoch"]
    return float(best / last)


@claim(RICE, high=0.5, unit="points")
def natural_training_does_not(runs: SeedRuns) -> float:
    """Training without an attack does not lose at its end what it had won: by how much its natural
    error is larger at the last epoch than at its best"""
    return rise(runs.base(attacked=False), "end_natural_error")


@claim(OURS, low=0, unit="points")
def more_data_helps(runs: SeedRuns) -> float:
    """With more training examples, the robust error of adversarial training rises less from its
    best epoch to the last: by how much less"""
    more = runs.base(examples=runs.config["examples"][-1])
    return rise(runs.base(), "end_pgd_error") - rise(more, "end_pgd_error")


@claim(Source("Wu et al. 2020, with SAM's ball", "after"), low=0, unit="points")
def sam_helps(runs: SeedRuns) -> float:
    """With SAM, the robust error of adversarial training rises less from its best epoch to the
    last: by how much less than without SAM"""
    return rise(runs.base(), "end_pgd_error") - rise(_with_sam(runs), "end_pgd_error")


@claim(RICE, high=1, unit="points")
def stopping_is_as_good(runs: SeedRuns) -> float:
    """Adversarial training without SAM, stopped at its best epoch, is about as robust as with SAM
    at its last: by how much its error under AutoAttack is larger"""
    best, _ = runs.base()["end_autoattack_error"]
    _, last = _with_sam(runs)["end_autoattack_error"]
    return float(100 * (best - last))


EXPERIMENT = Experiment(
    name="robust_overfitting",
    title="Robust overfitting: the best epoch and the last",
    source="Rice et al. 2020 (arXiv:2002.11569)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        last_is_less_robust,
        the_other_judge_agrees,
        training_error_hides_it,
        natural_error_hides_it,
        best_is_after_the_first_drop,
        natural_training_does_not,
        more_data_helps,
        sam_helps,
        stopping_is_as_good,
    ],
    needs=["pyautoattack"],
)
