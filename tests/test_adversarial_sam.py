"""Weights and inputs at once: the runs against runs made by hand, and the claims."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs
from torch import nn

from sam_lab import Hessian, experiments
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import adversarial_sam
from sam_lab.perturbations import awp, global_norm, sam
from sam_lab.training import Phase, evaluate

pytestmark = pytest.mark.usefixtures("light_judges")

TINY = dataclasses.replace(
    adversarial_sam.LAPTOP,
    recipe=adversarial_sam.LAPTOP.recipe.but(
        **{"data": "digits", "train": 100, "test": 40, "hidden": (8,), "epochs": 3, "batch": 20},
        **{"measured": 50, "tol": 1e-3},
    ),
    attack_steps=2,
    n_autoattack=20,
    validation=20,
)
AT = {"rule": "sam", "rho": 0.0, "steps": 2}


# --- the runs -------------------------------------------------------------------------------------


def test_settings_are_the_radii_of_both_rules_a_longer_attack_and_none():
    compared = [tuple(setting.values()) for setting in adversarial_sam.settings(TINY)]
    assert compared == [
        *(("sam", rho, 2) for rho in TINY.rhos),
        *(("awp", gamma, 2) for gamma in TINY.gammas),
        ("sam", 0.0, 3),
        *(("sam", rho, 0) for rho in TINY.alone),
    ]
    assert adversarial_sam.settings(TINY)[0] == AT


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_radii_of_the_claims_are_run(scale):
    config = adversarial_sam.EXPERIMENT.presets[scale]
    assert {0.0, adversarial_sam.RHO} <= {*config.rhos} & {*config.alone} and config.longer
    assert adversarial_sam.GAMMA in config.gammas


def test_validation_examples_are_not_trained_on():
    training, dataset = adversarial_sam.prepare(TINY, Cell(AT, 10))
    assert torch.equal(training.x, dataset.x[:80]) and torch.equal(training.y, dataset.y[:80])
    for validation in (0, 100):
        with pytest.raises(ValueError, match="some of the 100 training examples"):
            adversarial_sam.prepare(dataclasses.replace(TINY, validation=validation), Cell(AT))


@pytest.mark.parametrize(
    ("setting", "phase", "passes"),
    [
        (AT, {"rho": 0.0, "rule": sam}, 3),
        ({**AT, "rho": 0.1}, {"rho": 0.1, "rule": sam}, 4),
        ({**AT, "rho": 0.1, "rule": "awp"}, {"rho": 0.1, "rule": awp}, 4),
        ({**AT, "steps": 3}, {"rho": 0.0, "rule": sam}, 4),
        ({**AT, "rho": 0.1, "steps": 0}, {"rho": 0.1, "rule": sam}, 2),
    ],
)
def test_a_run_is_the_training_made_by_hand(setting, phase, passes):
    seen = []
    cell = Cell(setting, 10, tick=lambda *step: seen.append(step))
    columns = {name: values[0] for name, values in adversarial_sam.run(TINY, cell).items()}
    assert seen == [(1, 3), (2, 3), (3, 3)]
    start, dataset = adversarial_sam.prepare(TINY, Cell(AT, 10))
    threat = Threat("linf", TINY.eps)
    attack = partial(pgd, threat=threat, steps=setting["steps"]) if setting["steps"] else None
    training = start.branch([Phase(0, 3, attack=attack, **phase)]).run()
    model, x, y = training.model, training.x[:50], training.y[:50]
    assert columns["passes"] == passes * 3 * 4  # three epochs of four steps
    assert columns["natural_error"] == pytest.approx(
        evaluate(model, dataset.x_test, dataset.y_test)[1]
    )
    assert columns["train_natural_error"] == pytest.approx(evaluate(model, x, y)[1])
    assert columns["norm"] == pytest.approx(float(global_norm(list(model.parameters()))))
    for name, examples in {
        "train_error": (x, y),
        "test_error": (dataset.x_test, dataset.y_test),
        "validation_error": (dataset.x[80:], dataset.y[80:]),
    }.items():
        attacked = partial(pgd, threat=threat, steps=10)
        assert columns[name] == 1 - robust_accuracy(model, *examples, attacked)[1]
    model.eval()
    for name, inputs in {
        "sharpness": x,
        "sharpness_adversarial": pgd(model, x, y, threat, steps=10),
    }.items():
        loss = partial(lambda inputs: nn.functional.cross_entropy(model(inputs), y), inputs)
        H = Hessian(loss, list(model.parameters()))
        top = torch.linalg.eigvalsh((H @ torch.eye(H.shape[0])).double())[-1].item()
        assert columns[name] == pytest.approx(top, rel=5e-3)


def test_a_small_grid_gives_every_claim_a_number():
    recipe = TINY.recipe.but(tol=0.5, epochs=1, hidden=(4,))
    config = dataclasses.replace(TINY, recipe=recipe, rhos=(0.0, 0.05, 0.2))
    result = experiments.run(
        adversarial_sam.EXPERIMENT, config, seeds=[10], device="cpu", progress=False
    )
    assert len(result.runs) == 7
    (runs,) = result.by_seed()
    assert np.isfinite([claim(runs) for claim in adversarial_sam.CLAIMS]).all()
    rhos, values = adversarial_sam.against_rho(result, "autoattack_error")
    assert rhos.tolist() == [0, 0.05, 0.2] and values.shape == (1, 3)


def test_a_wide_residual_network_is_measured_in_evaluation_mode():
    recipe = adversarial_sam.DESKTOP.recipe.but(
        **{"data": "digits", "train": 60, "test": 20, "epochs": 1, "batch": 20},
        **{"measured": 20, "tol": 0.5},
    )
    config = dataclasses.replace(
        adversarial_sam.DESKTOP, recipe=recipe, attack_steps=1, n_autoattack=10, validation=20
    )
    columns = adversarial_sam.run(config, Cell({**AT, "rho": 0.05, "steps": 1}, 10))
    assert np.isfinite([*columns.values()]).all() and columns["passes"] == [3 * 2]


# --- the claims, by hand --------------------------------------------------------------------------

CONFIG = {"attack_steps": 5, "rhos": [0.0, 0.2, 0.05], "gammas": [0.01]}


def trained(rule, rho, steps, autoattack, test, train, natural, validation=0.5, **others):
    return run_of(
        {"rule": rule, "rho": rho, "steps": steps},
        autoattack_error=autoattack,
        test_error=test,
        train_error=train,
        natural_error=natural,
        validation_error=validation,
        **others,
    )


PLAIN = {"sharpness_adversarial": 10.0, "sharpness": 3.0, "input_gradient": 2.0}
RUNS = [
    trained("sam", 0.0, 5, 0.25, 0.2, 0.1, 0.05, 0.3, **PLAIN),
    trained("sam", 0.05, 5, 0.22, 0.19, 0.12, 0.04, 0.2, sharpness_adversarial=4.0),
    trained("sam", 0.2, 5, 0.31, 0.3, 0.28, 0.08, 0.25),
    trained("awp", 0.01, 5, 0.21, 0.18, 0.14, 0.05, sharpness_adversarial=2.0),
    trained("sam", 0.0, 6, 0.24, 0.2, 0.1, 0.05),
    trained("sam", 0.0, 0, 0.9, 0.9, 0.8, 0.06, sharpness=2.0, input_gradient=8.0),
    trained("sam", 0.05, 0, 0.8, 0.8, 0.7, 0.05),
]
EXPECTED = {
    "sam-makes-more-robust": 3.0,
    "chosen-radius-makes-more-robust": 3.0,
    "awp-makes-more-robust": 4.0,
    "not-the-passes": 2.0,
    "sam-narrows-the-gap": 3.0,  # 10 to 7
    "awp-narrows-the-gap": 6.0,  # 10 to 4
    "sam-flattens-the-adversarial-loss": 0.4,
    "awp-flattens-the-adversarial-loss": 0.2,
    "large-radius-costs-accuracy": 3.0,
    "flat-in-inputs": 0.25,
    "sam-alone-is-not-enough": 55.0,
}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    check_statistics(adversarial_sam.CLAIMS, {name: (runs, x) for name, x in EXPECTED.items()})


def test_the_radius_is_chosen_on_validation_examples_and_may_be_none():
    # as good as the best: the smaller radius
    plain = trained("sam", 0.0, 5, 0.25, 0.2, 0.1, 0.05, 0.2, **PLAIN)
    runs = seed_runs(CONFIG, plain, *RUNS[1:])
    assert adversarial_sam.chosen_radius_makes_more_robust(runs) == 0


def test_columns_against_the_radius_begin_without_one():
    result = result_of(CONFIG, *RUNS)
    rhos, gaps = adversarial_sam.against_rho(result, "gap")
    assert rhos.tolist() == [0, 0.05, 0.2] and gaps[0] == pytest.approx([0.1, 0.07, 0.02])
    gammas, errors = adversarial_sam.against_rho(result, "natural_error", "awp")
    assert gammas.tolist() == [0, 0.01] and errors.tolist() == [[0.05, 0.05]]
