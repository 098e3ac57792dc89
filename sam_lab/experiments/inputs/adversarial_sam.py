r"""Weights and inputs at once: adversarial training with SAM around it.

Every batch is attacked once, and both passes of SAM see what the attack has found: the weights are
perturbed against examples that are perturbed already. Compared are radii of SAM, down to 0, which
is plain adversarial training; adversarial weight perturbation (`awp`), which is the same with a
radius for each layer; adversarial training with a step more of the attack, which costs as many
passes as SAM does; and SGD and SAM on examples as they are.

The last `validation` training examples are not trained on: where a radius is to be chosen, they
choose it.

The judges are those of `robustness.two_judges`. The *gap* is the error on test examples less that
on training examples, both under the same attack. Sharpness is the top eigenvalue of the Hessian
over the first `recipe.measured` training examples, the model in evaluation mode, of two losses: the
cross-entropy of the examples as they are, and that of the attacked examples, which are held fixed.
No claim rests on the former: the losses of networks trained with and without attack are far apart.
`flat_and_robust` compares these two at equal loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import input_gradient, two_judges
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Result, Run, SeedRuns, Setting
from sam_lab.experiments.late.switching import SCHEDULES
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS, Recipe, hessian
from sam_lab.perturbations import Rule, awp, global_norm, sam
from sam_lab.training import Phase, Training, evaluate

__all__ = [
    "RULES",
    "Config",
    "adversarial",
    "against_rho",
    "longer_attack",
    "prepare",
    "run",
    "settings",
    "value",
]

LIGHT_STEPS = 10  # of the attack that measures gaps and chooses radii


RULES: dict[str, Rule] = {"sam": sam, "awp": awp}


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD; the learning rate goes down in `SCHEDULES["steps"]`.
        eps, attack_steps: radius of the attack in the maximum norm, and its steps in training.
        validation: examples, the last of the training set, that are not trained on.
        rhos: radii of SAM in adversarial training; 0 is without it.
        gammas: relative radii of adversarial weight perturbation.
        alone: radii of SAM on examples as they are; 0 is SGD.
        longer: whether adversarial training is run with a step more of the attack too.
        n_autoattack: test examples that AutoAttack's two gradient attacks see.
    """

    recipe: Recipe
    eps: float = 0.1
    attack_steps: int = 5
    validation: int = 500
    rhos: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    gammas: tuple[float, ...] = (0.01,)
    alone: tuple[float, ...] = (0.0, 0.05)
    longer: bool = True
    n_autoattack: int = 200


LAPTOP = Config(DIGITS.but(standardize="network", epochs=20), n_autoattack=400)
DESKTOP = Config(
    CIFAR_TENTH.but(standardize="network", epochs=15),
    eps=4 / 255,
    attack_steps=3,
    rhos=(0.0, 0.05, 0.1),
    gammas=(),
    alone=(),
    longer=False,
)
PAPER = Config(
    CIFAR.but(standardize="network"),
    eps=8 / 255,
    attack_steps=10,
    validation=1000,
    n_autoattack=1000,
)


def settings(config: Config) -> list[Setting]:
    """What is compared: a rule, its radius, and the steps of the attack in training."""
    steps = config.attack_steps
    compared = [("sam", rho, steps) for rho in config.rhos]
    compared += [("awp", gamma, steps) for gamma in config.gammas]
    compared += [("sam", 0.0, steps + 1)] if config.longer else []
    compared += [("sam", rho, 0) for rho in config.alone]
    return [{"rule": rule, "rho": rho, "steps": steps} for rule, rho, steps in compared]


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A run before its first epoch, and its data, validation examples among the training set.

    Raises:
        ValueError: no training example is left beside those of the validation.
    """
    recipe = config.recipe
    if not 0 < config.validation < recipe.train:
        raise ValueError(
            f"validation must leave some of the {recipe.train} training examples, "
            f"got {config.validation}"
        )
    attack = None
    if cell["steps"]:
        attack = partial(pgd, threat=Threat("linf", config.eps), steps=cell["steps"])
    return recipe.training(
        cell.seed,
        cell.device,
        examples=recipe.train - config.validation,
        phases=[Phase(0, recipe.epochs, cell["rho"], RULES[cell["rule"]], attack)],
        schedule=SCHEDULES["steps"],
    )


def run(config: Config, cell: Cell) -> Columns:
    """One training, and what is measured at its end, a number each.

    Returns:
        `passes` through the model in training; `natural_error`, `pgd_error`, `pgd_error_judged`,
        `autoattack_error` as by `robustness.two_judges`; under one lighter attack
        `validation_error`, `test_error` and, on the measured training examples, `train_error`,
        with `train_natural_error`; `sharpness` and `sharpness_adversarial`, `input_gradient` (mean
        1-norm), all on the measured training examples; `norm` of the weights.
    """
    training, dataset = prepare(config, cell)
    training.run(on_epoch=lambda: cell.tick(training.epoch, training.epochs))
    model, threat = training.model, Threat("linf", config.eps)
    x, y = config.recipe.examined(training)
    held_out = slice(-config.validation, None)
    parts = {
        "validation_error": (dataset.x[held_out], dataset.y[held_out]),
        "test_error": (dataset.x_test, dataset.y_test),
        "train_error": (x, y),
    }
    attack = partial(pgd, threat=threat, steps=LIGHT_STEPS)

    def sharpness(inputs: torch.Tensor) -> float:
        return float(hessian(model, inputs, y).top(tol=config.recipe.tol).values[0])

    columns = two_judges(
        model,
        dataset.x_test,
        dataset.y_test,
        threat,
        n_autoattack=config.n_autoattack,
        seed=cell.seed,
    )
    columns |= {
        name: 1 - robust_accuracy(model, *examples, attack)[1] for name, examples in parts.items()
    }
    columns |= {
        "passes": training.history[-1]["passes"],
        "train_natural_error": evaluate(model, x, y)[1],
        "sharpness": sharpness(x),
        "sharpness_adversarial": sharpness(attack(model, x, y)),
        "input_gradient": input_gradient(model, x, y),
        "norm": float(global_norm(list(model.parameters()))),
    }
    return {name: [value] for name, value in columns.items()}


# --- what the runs say ----------------------------------------------------------------------------


def adversarial(runs: SeedRuns, rho: float = 0.0, rule: str = "sam") -> Run:
    """The run of adversarial training with this rule and radius."""
    return runs.one(rule=rule, rho=rho, steps=runs.config["attack_steps"])


def longer_attack(runs: SeedRuns) -> Run:
    """The run of adversarial training with a step more of the attack."""
    return runs.one(rule="sam", rho=0.0, steps=runs.config["attack_steps"] + 1)


def _without_attack(runs: SeedRuns, rho: float) -> Run:
    """The run on examples as they are."""
    return runs.one(rule="sam", rho=rho, steps=0)


def value(run: Run, name: str) -> float:
    """A column of one number; or "gap", the robust error on test less that on training examples."""
    if name == "gap":
        return run.value("test_error") - run.value("train_error")
    return run.value(name)


def against_rho(result: Result, name: str, rule: str = "sam") -> tuple[np.ndarray, np.ndarray]:
    """A column of adversarial training against the radius.

    Args:
        name: as `value` takes it.
        rule: "sam" or "awp"; both begin with adversarial training alone, at 0.

    Returns:
        Radii (T,), ascending; values (seeds, T).
    """
    radii = sorted({0.0, *result.config["rhos" if rule == "sam" else "gammas"]})
    rules = [rule if rho else "sam" for rho in radii]
    values = [
        [value(adversarial(runs, *which), name) for which in zip(radii, rules, strict=True)]
        for runs in result.by_seed()
    ]
    return np.array(radii), np.array(values)


def _best_on_validation(runs: SeedRuns) -> Run:
    """Adversarial training with the radius that has the least robust error on the validation
    examples; of several the smallest."""
    radii = sorted(runs.config["rhos"])
    return min(
        (adversarial(runs, rho) for rho in radii), key=lambda run: run.value("validation_error")
    )


def _points(name: str, one: Run, other: Run) -> float:
    """By how many percentage points a column of one lies above that of the other."""
    return 100 * (value(one, name) - value(other, name))


def _ratio(name: str, one: Run, other: Run) -> float:
    return value(one, name) / value(other, name)


# --- what the runs decide -------------------------------------------------------------------------

WU = Source("Wu et al. 2020", "after")

RHO = 0.05  # the usual radius of SAM, chosen before any run
GAMMA = 0.01  # that of the authors' code
ROBUST = "autoattack_error"  # under AutoAttack's two gradient attacks


def _with_sam(runs: SeedRuns) -> Run:
    return adversarial(runs, RHO)


def _with_awp(runs: SeedRuns) -> Run:
    return adversarial(runs, GAMMA, "awp")


@claim(
    OURS,
    low=0,
    unit="points",
    headline=True,
    statement=f"Adversarial training with SAM (radius {RHO:g}) is more robust than without SAM: by "
    "how much the error under AutoAttack is smaller",
)
def sam_makes_more_robust(runs: SeedRuns) -> float:
    return _points(ROBUST, adversarial(runs), _with_sam(runs))


@claim(OURS, low=0, unit="points")
def chosen_radius_makes_more_robust(runs: SeedRuns) -> float:
    """Adversarial training with SAM, at the radius that is best on validation examples (0 among
    them), is more robust than without SAM: by how much the error under AutoAttack is smaller"""
    return _points(ROBUST, adversarial(runs), _best_on_validation(runs))


@claim(
    WU,
    low=0,
    unit="points",
    statement="Adversarial training with adversarial weight perturbation (radius "
    f"{GAMMA:g} of the norm of each weight, the default of the authors' code) is more robust than "
    "without: by how much the error under AutoAttack is smaller",
)
def awp_makes_more_robust(runs: SeedRuns) -> float:
    return _points(ROBUST, adversarial(runs), _with_awp(runs))


@claim(CONTROL, low=0, unit="points")
def not_the_passes(runs: SeedRuns) -> float:
    """Extra compute is not what SAM brings: adversarial training with SAM is more robust than with
    one more step of the attack: by how much the error under AutoAttack is smaller"""
    return _points(ROBUST, longer_attack(runs), _with_sam(runs))


@claim(OURS, low=0, unit="points")
def sam_narrows_the_gap(runs: SeedRuns) -> float:
    """Adversarial training with SAM has a smaller robust generalisation gap than without SAM: by
    how much the gap between test and training error under attack is smaller"""
    return _points("gap", adversarial(runs), _with_sam(runs))


@claim(WU, low=0, unit="points")
def awp_narrows_the_gap(runs: SeedRuns) -> float:
    """Adversarial training with adversarial weight perturbation has a smaller robust generalisation
    gap than without: by how much the gap between test and training error under attack is smaller"""
    return _points("gap", adversarial(runs), _with_awp(runs))


@claim(OURS, high=0.8, domain="positive")
def sam_flattens_the_adversarial_loss(runs: SeedRuns) -> float:
    """Adversarial training with SAM ends with a flatter adversarial loss than without SAM:
    sharpness over attacked examples, with SAM over without"""
    return _ratio("sharpness_adversarial", _with_sam(runs), adversarial(runs))


@claim(WU, high=0.8, domain="positive")
def awp_flattens_the_adversarial_loss(runs: SeedRuns) -> float:
    """Adversarial training with adversarial weight perturbation ends with a flatter adversarial
    loss than without: sharpness over attacked examples, with it over without"""
    return _ratio("sharpness_adversarial", _with_awp(runs), adversarial(runs))


@claim(OURS, low=0, unit="points")
def large_radius_costs_accuracy(runs: SeedRuns) -> float:
    """Adversarial training with SAM of the largest radius has a larger natural error than without
    SAM: by how much it is larger"""
    largest = adversarial(runs, max(runs.config["rhos"]))
    return _points("natural_error", largest, adversarial(runs))


@claim(OURS, high=0.5)
def flat_in_inputs(runs: SeedRuns) -> float:
    """Adversarial training ends flatter in the inputs than SGD: norm of the input gradient,
    adversarial training's over SGD's"""
    return _ratio("input_gradient", adversarial(runs), _without_attack(runs, 0.0))


@claim(CONTROL, low=5, unit="points")
def sam_alone_is_not_enough(runs: SeedRuns) -> float:
    """SAM alone is less robust than adversarial training alone: by how much its error under
    AutoAttack is larger"""
    return _points(ROBUST, _without_attack(runs, RHO), adversarial(runs))


CLAIMS = [
    sam_makes_more_robust,
    chosen_radius_makes_more_robust,
    awp_makes_more_robust,
    not_the_passes,
    sam_narrows_the_gap,
    awp_narrows_the_gap,
    sam_flattens_the_adversarial_loss,
    awp_flattens_the_adversarial_loss,
    large_radius_costs_accuracy,
    flat_in_inputs,
    sam_alone_is_not_enough,
]

EXPERIMENT = Experiment(
    name="adversarial_sam",
    title="Adversarial training with SAM: weights and inputs at once",
    source="Wu et al. 2020 (arXiv:2004.05884) and this book",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
    needs=["pyautoattack"],
)
