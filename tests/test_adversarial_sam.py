"""Weights and inputs at once: the runs against runs made by hand, and the claims."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sam_lab import Hessian, experiments
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import adversarial_sam, robustness
from sam_lab.experiments.core import Result, Run
from sam_lab.perturbations import awp, global_norm, sam
from sam_lab.training import Phase, evaluate

TINY = dataclasses.replace(
    adversarial_sam.LAPTOP,
    task=dataclasses.replace(
        adversarial_sam.LAPTOP.task,
        data="digits",
        train=100,
        test=40,
        hidden=(8,),
        epochs=3,
        batch=20,
        steps=2,
        judged=20,
        measured=50,
        tol=1e-3,
    ),
    validation=20,
)
CLAIMS = adversarial_sam.EXPERIMENT.claims
AT = {"rule": "sam", "rho": 0.0, "steps": 2}


@pytest.fixture(autouse=True)
def light_judges(monkeypatch):
    """What the judges find is tested where they live; here they are quick."""
    monkeypatch.setattr(robustness, "STEPS", 3)
    monkeypatch.setattr(robustness, "RESTARTS", 1)
    monkeypatch.setattr(
        robustness,
        "autoattack",
        lambda model, x, y, *, threat, attacks, seed: pgd(model, x, y, threat, steps=5),
    )


# --- the runs -------------------------------------------------------------------------------------


def test_settings_are_the_radii_of_both_rules_a_longer_attack_and_none():
    found = [tuple(setting.values()) for setting in adversarial_sam.settings(TINY)]
    assert found == [
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
    training, found = adversarial_sam.prepare(TINY, AT, 10)
    assert torch.equal(training.x, found.x[:80]) and torch.equal(training.y, found.y[:80])
    for validation in (0, 100):
        with pytest.raises(ValueError, match="some of the 100 training examples"):
            adversarial_sam.prepare(dataclasses.replace(TINY, validation=validation), AT, 10)


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
    columns = {
        name: values[0] for name, values in adversarial_sam.run(TINY, setting, seed=10).items()
    }
    start, found = adversarial_sam.prepare(TINY, AT, 10)
    threat = Threat("linf", TINY.task.eps)
    attack = partial(pgd, threat=threat, steps=setting["steps"]) if setting["steps"] else None
    training = start.branch([Phase(0, 3, attack=attack, **phase)]).run()
    model, x, y = training.model, training.x[:50], training.y[:50]
    assert columns["passes"] == passes * 3 * 4  # three epochs of four steps
    assert columns["natural_error"] == pytest.approx(evaluate(model, found.x_test, found.y_test)[1])
    assert columns["train_natural_error"] == pytest.approx(evaluate(model, x, y)[1])
    assert columns["norm"] == pytest.approx(float(global_norm(list(model.parameters()))))
    for name, examples in {
        "train_error": (x, y),
        "test_error": (found.x_test, found.y_test),
        "validation_error": (found.x[80:], found.y[80:]),
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


def test_progress_counts_the_epochs():
    seen = []
    adversarial_sam.run(TINY, AT, 10, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_small_grid_gives_every_claim_a_number_from_every_seed():
    task = dataclasses.replace(TINY.task, tol=0.5, epochs=1, hidden=(4,))
    config = dataclasses.replace(TINY, task=task, rhos=(0.0, 0.05, 0.2), gammas=(0.01,))
    result = experiments.run(
        adversarial_sam.EXPERIMENT, config, seeds=[10, 11], device="cpu", progress=False
    )
    assert len(result.runs) == 2 * 7
    for claim in result.claims:
        assert "failed" not in claim.reason and len(claim.values) == 2
        assert np.isfinite(claim.values).all()
    rhos, values = adversarial_sam.against_rho(result, "autoattack_error")
    assert rhos.tolist() == [0, 0.05, 0.2] and values.shape == (2, 3)


def test_a_wide_residual_network_is_measured_in_evaluation_mode():
    task = dataclasses.replace(
        adversarial_sam.DESKTOP.task,
        **{"data": "digits", "train": 60, "test": 20, "epochs": 1, "batch": 20, "steps": 1},
        **{"judged": 10, "measured": 20, "tol": 0.5},
    )
    config = dataclasses.replace(adversarial_sam.DESKTOP, task=task, validation=20)
    columns = adversarial_sam.run(config, {**AT, "rho": 0.05, "steps": 1}, seed=10)
    assert np.isfinite([*columns.values()]).all() and columns["passes"] == [3 * 2]


# --- the claims, by hand --------------------------------------------------------------------------


def result_of(*rows, seed=0):
    """A result from settings and columns."""
    config = {"task": {"steps": 5}, "rhos": [0.0, 0.2, 0.05], "gammas": [0.01]}
    runs = [
        Run(
            dict(zip(("rule", "rho", "steps"), setting, strict=True)),
            seed,
            {name: [value] for name, value in columns.items()},
        )
        for *setting, columns in rows
    ]
    return Result("hand-made", "laptop", config, runs, [], {})


def columns(autoattack, test, train, natural, validation=0.5, **others):
    return {
        **{"autoattack_error": autoattack, "test_error": test, "train_error": train},
        **{"natural_error": natural, "validation_error": validation, **others},
    }


ROWS = [
    ("sam", 0.0, 5, columns(0.25, 0.2, 0.1, 0.05, 0.3, sharpness_adversarial=10.0, sharpness=3.0)),
    ("sam", 0.05, 5, columns(0.22, 0.19, 0.12, 0.04, 0.2, sharpness_adversarial=4.0)),
    ("sam", 0.2, 5, columns(0.31, 0.3, 0.28, 0.08, 0.25)),
    ("awp", 0.01, 5, columns(0.21, 0.18, 0.14, 0.05, sharpness_adversarial=2.0)),
    ("sam", 0.0, 6, columns(0.24, 0.2, 0.1, 0.05)),
    ("sam", 0.0, 0, columns(0.9, 0.9, 0.8, 0.06, sharpness=2.0, input_gradient=8.0)),
    ("sam", 0.05, 0, columns(0.8, 0.8, 0.7, 0.05)),
]
ROWS[0][3]["input_gradient"] = 2.0
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
    "flat-in-weights-is-another-thing": 1.5,
    "flat-in-inputs": 0.25,
    "sam-alone-is-not-enough": 55.0,
}


def test_every_claim_is_tested_here():
    assert sorted(EXPECTED) == sorted(claim.id for claim in CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
@pytest.mark.parametrize("order", [1, -1])
def test_a_claims_statistic_is_the_arithmetic_of_its_statement(claim, order):
    assert claim.statistic(result_of(*ROWS[::order])) == [pytest.approx(EXPECTED[claim.id])]


def test_the_radius_is_chosen_on_validation_examples_and_may_be_none():
    rows = [(*setting, dict(found)) for *setting, found in ROWS]
    rows[0][3]["validation_error"] = 0.2  # as good as the best: the smaller radius
    chosen = next(claim for claim in CLAIMS if claim.id == "chosen-radius-makes-more-robust")
    assert chosen.statistic(result_of(*rows)) == [0.0]


def test_columns_against_the_radius_begin_without_one():
    result = result_of(*ROWS)
    rhos, gaps = adversarial_sam.against_rho(result, "gap")
    assert rhos.tolist() == [0, 0.05, 0.2] and gaps[0] == pytest.approx([0.1, 0.07, 0.02])
    gammas, errors = adversarial_sam.against_rho(result, "natural_error", "awp")
    assert gammas.tolist() == [0, 0.01] and errors.tolist() == [[0.05, 0.05]]
