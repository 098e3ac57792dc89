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
over the first `measured` training examples, the model in evaluation mode, of two losses: the
cross-entropy of the examples as they are, and that of the attacked examples, which are held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lab import data
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import late_adversarial, networks
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.robustness import input_gradient, two_judges
from sam_lab.experiments.statistics import each_seed
from sam_lab.perturbations import Rule, awp, global_norm, sam
from sam_lab.training import Phase, Training, evaluate

__all__ = [
    "RULES",
    "Config",
    "adversarial",
    "against_rho",
    "prepare",
    "run",
    "settings",
]

WU = "Wu et al. 2020"
HERE = "this book"

WATCH = 10  # steps of the attack that measures gaps and chooses radii


RULES: dict[str, Rule] = {"sam": sam, "awp": awp}


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        task: data, network, training and judges; the first of its schedules holds, and nothing
            switches. `steps` are those of the attack in training.
        validation: examples, the last of the training set, that are not trained on.
        rhos: radii of SAM in adversarial training; 0 is without it.
        gammas: relative radii of adversarial weight perturbation.
        alone: radii of SAM on examples as they are; 0 is SGD.
        longer: whether adversarial training is run with a step more of the attack too.
    """

    task: late_adversarial.Config
    validation: int = 500
    rhos: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    gammas: tuple[float, ...] = (0.01,)
    alone: tuple[float, ...] = (0.0, 0.05)
    longer: bool = True


def settings(config: Config) -> list[dict[str, Any]]:
    """What is compared: a rule, its radius, and the steps of the attack in training."""
    steps = config.task.steps
    found = [{"rule": "sam", "rho": rho, "steps": steps} for rho in config.rhos]
    found += [{"rule": "awp", "rho": gamma, "steps": steps} for gamma in config.gammas]
    if config.longer:
        found.append({"rule": "sam", "rho": 0.0, "steps": steps + 1})
    return found + [{"rule": "sam", "rho": rho, "steps": 0} for rho in config.alone]


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, and its data, validation examples among the training set.

    Raises:
        ValueError: no training example is left beside those of the validation.
    """
    task = config.task
    if not 0 < config.validation < task.train:
        raise ValueError(
            f"validation must leave some of the {task.train} training examples, "
            f"got {config.validation}"
        )
    start, found = late_adversarial.prepare(task, {"schedule": task.schedules[0]}, seed, device)
    start.x, start.y = found.x[: -config.validation], found.y[: -config.validation]
    attack = None
    if setting["steps"]:
        attack = partial(pgd, threat=Threat("linf", task.eps), steps=setting["steps"])
    rule = RULES[setting["rule"]]
    phase = Phase(0, task.epochs, rho=setting["rho"], rule=rule, attack=attack)
    return start.branch([phase]), found


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One training, and what is measured at its end, a number each.

    Returns:
        `passes` through the model in training; `natural_error`, `pgd_error`, `pgd_error_judged`,
        `autoattack_error` as by `robustness.two_judges`; under one lighter attack
        `validation_error`, `test_error` and, on the measured training examples, `train_error`,
        with `train_natural_error`; `sharpness` and `sharpness_adversarial`, `input_gradient` (mean
        1-norm), all on the measured training examples; `norm` of the weights.
    """
    training, found = prepare(config, setting, seed, device)
    training.run(on_epoch=lambda: progress(training.epoch, training.epochs))
    task, model, threat = config.task, training.model, Threat("linf", config.task.eps)
    x, y = training.x[: task.measured], training.y[: task.measured]
    held = slice(-config.validation, None)
    watched = {
        "validation_error": (found.x[held], found.y[held]),
        "test_error": (found.x_test, found.y_test),
        "train_error": (x, y),
    }
    attack = partial(pgd, threat=threat, steps=WATCH)

    def sharpness(inputs: Tensor) -> float:
        return float(networks.hessian(model, inputs, y).top(tol=task.tol).values[0])

    columns = two_judges(
        model,
        found.x_test,
        found.y_test,
        threat,
        judged=task.judged,
        seed=seed,
    )
    columns |= {
        name: 1 - robust_accuracy(model, *examples, attack)[1] for name, examples in watched.items()
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


# --- what the runs decide -------------------------------------------------------------------------

RHO = 0.05  # the usual radius of SAM, chosen before any run
GAMMA = 0.01  # that of the authors' code


def adversarial(result: Result, seed: int, rho: float = 0.0, rule: str = "sam") -> Run:
    """The run of adversarial training with this rule and radius."""
    steps = result.config["task"]["steps"]
    return result.select(seed=seed, rule=rule, rho=rho, steps=steps)[0]


def against_rho(result: Result, name: str, rule: str = "sam") -> tuple[np.ndarray, np.ndarray]:
    """A column of adversarial training against the radius.

    Args:
        name: a column, or "gap", that of the robust errors on test and on training examples.
        rule: "sam" or "awp"; both begin with adversarial training alone, at 0.

    Returns:
        Radii (T,), ascending; values (seeds, T).
    """
    radii = sorted({0.0, *result.config["rhos" if rule == "sam" else "gammas"]})
    rules = [rule if rho else "sam" for rho in radii]
    values = [
        [
            _value(adversarial(result, seed, *which), name)
            for which in zip(radii, rules, strict=True)
        ]
        for seed in result.seeds
    ]
    return np.array(radii), np.array(values)


def _value(run: Run, name: str) -> float:
    """A column of one number, or the gap."""
    if name == "gap":
        return _value(run, "test_error") - _value(run, "train_error")
    return float(run[name][0])


def _chosen(result: Result, seed: int) -> Run:
    """Adversarial training with the radius that has the least robust error on the validation
    examples; of several the smallest."""
    runs = [adversarial(result, seed, rho) for rho in sorted(result.config["rhos"])]
    return min(runs, key=lambda run: _value(run, "validation_error"))


def _natural(result: Result, seed: int, rho: float) -> Run:
    """The run on examples as they are."""
    return result.select(seed=seed, rho=rho, steps=0)[0]


def _longer(result: Result, seed: int) -> Run:
    """Adversarial training with a step more."""
    return result.select(seed=seed, rho=0, steps=result.config["task"]["steps"] + 1)[0]


def _claims() -> list[Claim]:
    """Robust errors are AutoAttack's."""

    def points(
        name: str, one: Callable[[Result, int], Run], two: Callable[[Result, int], Run]
    ) -> Callable[[Result], list[float]]:
        """By how many percentage points a column of one lies above that of the other."""
        return each_seed(
            lambda result, seed: (
                100 * (_value(one(result, seed), name) - _value(two(result, seed), name))
            )
        )

    def ratio(
        name: str, one: Callable[[Result, int], Run], two: Callable[[Result, int], Run]
    ) -> Callable[[Result], list[float]]:
        return each_seed(
            lambda result, seed: _value(one(result, seed), name) / _value(two(result, seed), name)
        )

    def largest(result: Result, seed: int) -> Run:
        return adversarial(result, seed, max(result.config["rhos"]))

    plain, with_sam = adversarial, partial(adversarial, rho=RHO)
    with_awp = partial(adversarial, rho=GAMMA, rule="awp")
    sgd, sam_alone = partial(_natural, rho=0.0), partial(_natural, rho=RHO)
    robust = "autoattack_error"
    return [
        Claim(
            "sam-makes-more-robust",
            f"Adversarial training is more robust with SAM around it, radius {RHO:g}: by how much "
            "the error under AutoAttack is smaller",
            HERE,
            "points",
            points(robust, plain, with_sam),
            Criterion(low=0.0),
        ),
        Claim(
            "chosen-radius-makes-more-robust",
            "It is so with the radius, 0 among them, that is best on validation examples",
            HERE,
            "points",
            points(robust, plain, _chosen),
            Criterion(low=0.0),
        ),
        Claim(
            "awp-makes-more-robust",
            "Adversarial training is more robust with adversarial weight perturbation, radius "
            f"{GAMMA:g} of each weight: by how much the error under AutoAttack is smaller",
            WU,
            "points",
            points(robust, plain, with_awp),
            Criterion(low=0.0),
        ),
        Claim(
            "not-the-passes",
            "It is not for SAM's further pass: with SAM it is more robust than with one step more "
            "of the attack",
            "control",
            "points",
            points(robust, _longer, with_sam),
            Criterion(low=0.0),
        ),
        Claim(
            "sam-narrows-the-gap",
            "SAM makes the robust generalisation gap smaller: by how much",
            HERE,
            "points",
            points("gap", plain, with_sam),
            Criterion(low=0.0),
        ),
        Claim(
            "awp-narrows-the-gap",
            "Adversarial weight perturbation makes the robust generalisation gap smaller: by how "
            "much",
            WU,
            "points",
            points("gap", plain, with_awp),
            Criterion(low=0.0),
        ),
        Claim(
            "sam-flattens-the-adversarial-loss",
            "The adversarial loss is flatter with SAM: sharpness over attacked examples, ratio",
            HERE,
            "",
            ratio("sharpness_adversarial", with_sam, plain),
            Criterion(high=0.8),
        ),
        Claim(
            "awp-flattens-the-adversarial-loss",
            "The adversarial loss is flatter with adversarial weight perturbation: sharpness over "
            "attacked examples, ratio",
            WU,
            "",
            ratio("sharpness_adversarial", with_awp, plain),
            Criterion(high=0.8),
        ),
        Claim(
            "large-radius-costs-accuracy",
            "With the largest radius the natural error is larger than without SAM: by how much",
            HERE,
            "points",
            points("natural_error", largest, plain),
            Criterion(low=0.0),
        ),
        Claim(
            "flat-in-weights-is-another-thing",
            "Adversarial training without SAM does not end flatter in the weights than SGD: "
            "sharpness over examples as they are, ratio",
            HERE,
            "",
            ratio("sharpness", plain, sgd),
            Criterion(low=1.0),
        ),
        Claim(
            "flat-in-inputs",
            "It ends flatter in the inputs: norm of the input gradient, ratio",
            HERE,
            "",
            ratio("input_gradient", plain, sgd),
            Criterion(high=0.5),
        ),
        Claim(
            "sam-alone-is-not-enough",
            "SAM alone stays less robust than adversarial training alone: by how much",
            "control",
            "points",
            points(robust, sam_alone, plain),
            Criterion(low=5.0),
        ),
    ]


LAPTOP = Config(
    late_adversarial.Config(
        data="mnist_5k",
        train=4000,
        test=1000,
        hidden=(200, 200),
        epochs=20,
        schedules=("steps",),
        late=(),
        early=(),
        judged=400,
    )
)
DESKTOP = Config(
    late_adversarial.Config(
        data="cifar10",
        train=5000,
        test=500,
        stride=2,
        lr=0.1,
        epochs=15,
        eps=4 / 255,
        steps=3,
        schedules=("steps",),
        late=(),
        early=(),
    ),
    rhos=(0.0, 0.05, 0.1),
    gammas=(),
    alone=(),
    longer=False,
)
PAPER = Config(
    late_adversarial.Config(
        data="cifar10",
        train=50_000,
        test=10_000,
        depth=16,
        width=8,
        augment=True,
        lr=0.1,
        epochs=100,
        eps=8 / 255,
        steps=10,
        schedules=("steps",),
        late=(),
        early=(),
        judged=1000,
    ),
    validation=1000,
)

EXPERIMENT = Experiment(
    name="adversarial_sam",
    title="Adversarial training with SAM: weights and inputs at once",
    source="Wu et al. 2020 (arXiv:2004.05884) and this book",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=_claims(),
)
