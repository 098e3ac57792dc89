r"""When to begin adversarial training: what late-phase SAM asks, asked of attacks on the inputs.

SGD up to some epoch and adversarial training from there, the reverse, and each throughout, under
schedules of the learning rate that leave the late phase more of it or less (see `switching`).
Training attacks with few steps of PGD. The judges are PGD with many steps and restarts, and of
AutoAttack its two attacks that use the gradient and nothing else. The other two take most of the
time: they are run on few examples, to see what they add.

The laptop has a fully connected network on the real MNIST digits that a package carries; the
desktop a small wide residual network on a tenth of CIFAR-10, at the radius of the paper's code;
"fast" all of CIFAR-10 and a small network that learns it in few epochs, at that radius and at twice
that (the network is half as wide as for late SAM: two cores with bfloat16 finish three seeds in two
hours); the paper's scale the smaller network of the paper's code on all of CIFAR-10.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sam_lab.adversarial import AUTOATTACK, Attack, Threat, autoattack, pgd, robust_accuracy
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import (
    GRADIENT_ATTACKS,
    RESTARTS,
    STEPS,
    input_gradient,
    two_judges,
)
from sam_lab.experiments.lab.claims import CONTROL, OURS, NotApplicable, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.setup import Setup
from sam_lab.experiments.lab.statistics import Ratio
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
from sam_lab.experiments.recipe import CIFAR, CIFAR_FAST, CIFAR_TENTH, DIGITS, Recipe
from sam_lab.training import Training, evaluate

__all__ = [
    "DESKTOP",
    "EXPERIMENT",
    "LAPTOP",
    "PAPER",
    "Config",
    "attack",
    "prepare",
    "run",
    "settings",
]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD.
        eps, attack_steps: radius of the attack in the maximum norm, and its steps in training.
        late, early: at which share of the epochs runs switch to attacked examples, or away.
        schedules: of the learning rate; the first is the base's.
        further: radii of the attack at which the base is run once more.
        with_pgd: whether PGD judges too, on the test set; without it AutoAttack alone does.
        n_autoattack: test examples that AutoAttack's two gradient attacks see.
        n_all_attacks: those that all four see, of the network that was attacked throughout.
    """

    recipe: Recipe
    eps: float = 0.1
    attack_steps: int = 5
    late: tuple[float, ...] = (0.5, 0.75, 0.9)
    early: tuple[float, ...] = (0.5, 0.9)
    schedules: tuple[str, ...] = ("constant", "steps")
    further: tuple[float, ...] = ()
    with_pgd: bool = True
    n_autoattack: int = 200
    n_all_attacks: int = 0


LAPTOP = Config(
    DIGITS.but(standardize="network"),
    schedules=("constant", "steps", "drop"),
    n_autoattack=500,
    n_all_attacks=200,
)
DESKTOP = Config(
    CIFAR_TENTH.but(standardize="network", epochs=30),
    eps=4 / 255,
    attack_steps=4,
)
FAST = Config(
    CIFAR_FAST.but(groups=(32, 64, 128), epochs=10),
    eps=4 / 255,
    late=(0.9,),
    early=(0.9,),
    schedules=("steps",),
    further=(8 / 255,),
    with_pgd=False,
    n_autoattack=500,
)
PAPER = Config(
    CIFAR.but(standardize="network", epochs=160),
    eps=4 / 255,
    attack_steps=10,
    late=(0.5, 0.75, 0.9, 0.9375),
    schedules=("constant", "steps", "drop"),
    n_autoattack=1000,
    n_all_attacks=1000,
)


def settings(config: Config) -> list[Setting]:
    """Every schedule at the radius of the base, and every further radius under the base's
    schedule; a setting names its radius where there are several."""
    schedules = [{"schedule": schedule} for schedule in config.schedules]
    if not config.further:
        return schedules
    radii = [{**schedules[0], "eps": eps} for eps in config.further]
    return [*({**each, "eps": config.eps} for each in schedules), *radii]


def attack(config: Config) -> Attack:
    """The attack of training."""
    return partial(pgd, threat=Threat("linf", config.eps), steps=config.attack_steps)


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A run before its first epoch, of SGD throughout, and its data."""
    return config.recipe.training(cell.seed, cell.device, schedule=SCHEDULES[cell["schedule"]])


def run(config: Config, cell: Cell) -> Columns:
    """All switching times of one setting.

    Returns:
        Columns with a row for each run, which trained on attacked examples in the epochs
        [`switched_on`, `switched_off`); an empty interval is SGD throughout. `passes` through the
        model in training; `natural_error` on the test set, `autoattack_error` on its first
        `n_autoattack` examples, and with PGD `pgd_error` on the test set and `pgd_error_judged` on
        those; `train_error` and `train_pgd_error` on the measured training examples, the latter
        under the attack of training; `sharpness` of the cross-entropy in the weights,
        `input_gradient` (mean 1-norm), on the same. Of the network that was attacked throughout,
        `checked_error` under all of AutoAttack and `checked_error_by_two` under its two gradient
        attacks, on the first `n_all_attacks` examples.

    Raises:
        ValueError: shares of the epochs in `late` or `early` that fall on one epoch, or on none
            that can be switched at.
    """
    config = replace(config, eps=cell.setting.get("eps", config.eps))
    start, dataset = prepare(config, cell)
    rows = Rows()
    how = {"attack": attack(config)}
    for interval, _, end in branches(start, config.late, config.early, how, cell):
        rows.add(**interval, **_at_end(end, dataset, config, cell.seed))
    columns = rows.columns
    if config.n_all_attacks:  # the last run was attacked throughout
        few = slice(config.n_all_attacks)
        x, y = dataset.x_test[few], dataset.y_test[few]
        judge = partial(autoattack, threat=Threat("linf", config.eps), seed=cell.seed)
        judges = {"checked_error": AUTOATTACK, "checked_error_by_two": GRADIENT_ATTACKS}
        for name, attacks in judges.items():
            robust = robust_accuracy(end.model, x, y, partial(judge, attacks=attacks))[1]
            columns[name] = [1 - robust]
    return columns


APGD = 1000  # gradients an example that AutoAttack's gradient attacks are counted with, at most


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed; the attacks that judge are counted as if no example fell
    before their end, and AutoAttack's other two attacks, of one run in each setting, are not."""
    judged = STEPS * RESTARTS * (config.recipe.test + config.n_autoattack) * config.with_pgd
    one = switching.cost(
        config.recipe,
        config.late,
        config.early,
        studied=config.attack_steps + 1,
        hessians=1,
        judged=judged + APGD * config.n_autoattack,
    )
    return len(settings(config)) * one


SETUP = Setup(
    "the paper's code, with the smaller of its two networks for attacks",
    {
        "recipe.data": "cifar10",
        "recipe.train": 50_000,
        "recipe.architecture": "WRN-16-8",
        "recipe.epochs": 160,
        "eps": 4 / 255,
        "attack_steps": 10,
    },
    besides=["momentum carried over the switch (paper: not)"],
)


def _at_end(training: Training, dataset: Dataset, config: Config, seed: int) -> dict[str, float]:
    recipe, model = config.recipe, training.model
    x, y = recipe.examined(training)
    errors = two_judges(
        model,
        dataset.x_test,
        dataset.y_test,
        Threat("linf", config.eps),
        n_autoattack=config.n_autoattack,
        with_pgd=config.with_pgd,
        seed=seed,
    )
    return {
        "passes": training.history[-1]["passes"],
        **errors,
        "train_error": evaluate(model, x, y)[1],
        "train_pgd_error": 1 - robust_accuracy(model, x, y, attack(config))[1],
        "sharpness": recipe.sharpness(training),
        "input_gradient": input_gradient(model, x, y),
    }


# --- what the runs decide -------------------------------------------------------------------------

ZHOU = Source("Zhou et al. 2025, carried over to adversarial training", "after")
OUR_ZHOU = Source("this book, after Zhou et al. 2025", "ours")

LATE = 0.9  # the share of the epochs that the claims about late training leave to SGD
ROBUST = "autoattack_error"  # under AutoAttack's two gradient attacks
NO_MORE_ROBUST = "adversarial training throughout was no more robust than SGD here"


def _points(run: Run, name: str, one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
    """By how many percentage points the error at the end of one lies above that of the other."""
    return 100 * (ends(run, name, *one) - ends(run, name, *other))


@claim(ZHOU, low=0.8, headline=True, undefined=NO_MORE_ROBUST)
def late_is_robust(runs: SeedRuns) -> Ratio:
    """Adversarial training in the last tenth of the epochs makes a network about as robust as
    adversarial training throughout: share of the way from SGD's error under AutoAttack to that of
    adversarial training that it covers"""
    return reached(runs.base(), ROBUST, "late", LATE)


@claim(OURS, low=0.8, undefined=NO_MORE_ROBUST)
def late_half_is_robust(runs: SeedRuns) -> Ratio:
    """Adversarial training in the second half of the epochs makes a network about as robust as
    adversarial training throughout: share of the way from SGD's error under AutoAttack to that of
    adversarial training that it covers"""
    return reached(runs.base(), ROBUST, "late", 0.5)


# A claim of no difference needs a margin: with 0 it could not be reproduced where it is true.
@claim(OUR_ZHOU, high=1, unit="points", set_after=True)
def late_is_natural(runs: SeedRuns) -> float:
    """Adversarial training in the last tenth of the epochs costs at most a point of natural error
    against adversarial training throughout: by how much the error is larger"""
    return _points(runs.base(), "natural_error", ("late", LATE), ("full",))


@claim(ZHOU, high=0.2, undefined=NO_MORE_ROBUST)
def early_is_forgotten(runs: SeedRuns) -> Ratio:
    """After adversarial training in the first nine tenths of the epochs, SGD in the last tenth ends
    about as vulnerable as SGD throughout: share of the way from SGD's error under AutoAttack to
    that of adversarial training that is left"""
    return reached(runs.base(), ROBUST, "early", LATE)


@claim(ZHOU, low=0, unit="points")
def late_half_counts_more(runs: SeedRuns) -> float:
    """Adversarial training in the second half of the epochs makes a network more robust than in the
    first half: by how much the error under AutoAttack is smaller"""
    return _points(runs.base(), ROBUST, ("early", 0.5), ("late", 0.5))


@claim(Source("Tsipras et al. 2019", "after"), low=0, unit="points")
def training_costs_accuracy(runs: SeedRuns) -> float:
    """Adversarial training throughout has a larger natural error than SGD: by how much it is
    larger"""
    return _points(runs.base(), "natural_error", ("full",), ("sgd",))


@claim(OURS, low=0.2)
def schedule_decides(runs: SeedRuns) -> float:
    """The schedule decides what adversarial training in the last tenth of the epochs can do: share
    of the way from SGD's error under AutoAttack to that of adversarial training, at a constant
    learning rate less that in steps"""
    constant, steps = (
        reached(scheduled(runs, schedule), ROBUST, "late", LATE).quotient
        for schedule in ("constant", "steps")
    )
    return constant - steps


@claim(OURS, -5, 5, unit="points", set_after=True)
def learning_rate_is_the_clock(runs: SeedRuns) -> float:
    """What late adversarial training does depends on the learning rate summed over its epochs, not
    on the schedule: error under AutoAttack under other schedules, less that at a constant rate with
    the same sum (interpolated)"""

    def course(schedule: str) -> tuple[np.ndarray, np.ndarray]:
        return summed_lr(runs, ROBUST, schedule=schedule)

    return 100 * float(np.mean(off_the_clock(runs, course)))


@claim(Source("Croce & Hein 2020", "after"), low=0, unit="points")
def no_judge_is_alone(runs: SeedRuns) -> float:
    """After adversarial training throughout, AutoAttack's two gradient attacks find more errors
    than PGD with restarts: by how much the error is larger, on the same examples"""
    run = runs.base()
    if "pgd_error_judged" not in run:
        raise NotApplicable("AutoAttack was the only judge here")
    return 100 * (ends(run, ROBUST, "full") - ends(run, "pgd_error_judged", "full"))


@claim(CONTROL, high=1, unit="points", set_after=True)
def two_attacks_suffice(runs: SeedRuns) -> float:
    """After adversarial training throughout, all of AutoAttack finds hardly more errors than its
    two gradient attacks: by how much the error is larger, on the same examples"""
    run = runs.base()
    if "checked_error" not in run:
        raise NotApplicable("all of AutoAttack was not run here")
    return 100 * (run.value("checked_error") - run.value("checked_error_by_two"))


UNDER_EACH_SCHEDULE = [
    late_is_robust,
    late_half_is_robust,
    late_is_natural,
    early_is_forgotten,
    late_half_counts_more,
    training_costs_accuracy,
]
AT_EACH_RADIUS = [late_is_robust, late_is_natural, early_is_forgotten, training_costs_accuracy]
WIDER = f"{IN_STEPS}and at a radius of 8/255, "
CLAIMS = [
    *map(unless_in_steps, UNDER_EACH_SCHEDULE),
    *(each.under("in-steps", IN_STEPS, schedule="steps") for each in UNDER_EACH_SCHEDULE),
    *(
        replace(
            each.under("at-8-255", WIDER, schedule="steps", eps=8 / 255),
            headline=False,
        )
        for each in AT_EACH_RADIUS
    ),
    schedule_decides,
    learning_rate_is_the_clock,
    no_judge_is_alone,
    two_attacks_suffice,
]

EXPERIMENT = Experiment(
    name="late_adversarial",
    title="Late adversarial training: the switching time",
    source="Zhou et al. 2025 (arXiv:2410.10373), the extension to adversarial training",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "fast": FAST, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
    setup=SETUP,
    cost=cost,
    needs=["pyautoattack"],
)
