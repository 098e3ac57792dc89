"""The best epoch and the last: how it is chosen, what is measured, and what the claims say."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from sam_lab import experiments
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import robust_overfitting as ro
from sam_lab.experiments import robustness
from sam_lab.experiments.core import Result, Run
from sam_lab.training import evaluate

TINY = dataclasses.replace(
    ro.LAPTOP,
    task=dataclasses.replace(
        ro.LAPTOP.task,
        **{"data": "digits", "train": 100, "test": 40, "hidden": (8,), "epochs": 8, "batch": 20},
        **{"steps": 2, "judged": 20, "measured": 30},
    ),
    examples=(40, 70),
    validation=30,
)
AT = {"examples": 40, "rho": 0.0, "attacked": True}
CLAIMS = ro.EXPERIMENT.claims


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


def tiny(**changes):
    return dataclasses.replace(TINY, task=dataclasses.replace(TINY.task, **changes))


# --- the runs -------------------------------------------------------------------------------------


def test_every_setting_differs_from_adversarial_training_in_one_factor():
    base, *others = ro.settings(TINY)
    assert base == AT
    assert others == [{**AT, "examples": 70}, {**AT, "rho": 0.05}, {**AT, "attacked": False}]
    assert ro.settings(dataclasses.replace(TINY, natural=False)) == [base, *others[:2]]


def test_the_learning_rate_drops_to_a_tenth_and_to_a_hundredth():
    training, _ = ro.prepare(TINY, AT, 10)
    training.run()
    rates = [row["lr"] / TINY.task.lr for row in training.history]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert all(row["attacked"] for row in training.history)


@pytest.mark.parametrize(
    ("setting", "passes"),
    [(AT, 3), ({**AT, "rho": 0.05}, 4), ({**AT, "attacked": False}, 1)],
)
def test_a_setting_decides_what_a_step_costs(setting, passes):
    training, _ = ro.prepare(TINY, setting, 10)
    assert training.run(1).history[-1]["passes"] == 2 * passes


def test_validation_examples_are_not_trained_on_and_all_settings_have_the_same():
    for examples in (40, 70):
        training, found = ro.prepare(TINY, {**AT, "examples": examples}, 10)
        assert torch.equal(training.x, found.x[:examples]) and len(found.x) == 100
        assert torch.equal(training.y, found.y[:examples])
    with pytest.raises(ValueError, match="at most 100 less 30 of the validation, got 71"):
        ro.prepare(TINY, {**AT, "examples": 71}, 10)


@pytest.mark.parametrize("attacked", [True, False])
def test_the_best_epoch_is_that_of_the_validation_examples_and_both_ends_are_judged(attacked):
    setting = {**AT, "attacked": attacked}
    config = tiny(lr=0.5)  # so that the last epoch is not the best by itself
    columns = ro.run(config, setting, seed=10)
    training, found = ro.prepare(config, setting, seed=10)
    threat = Threat("linf", config.task.eps)
    attack = partial(pgd, threat=threat, steps=10)
    parts = {
        "": (found.x_test, found.y_test),
        "train_": (found.x[:30], found.y[:30]),
        "validation_": (found.x[70:], found.y[70:]),
    }
    assert columns["epoch"] == [2, 4, 6, 8]
    by_hand = {}
    for i, epoch in enumerate((2, 4, 6, 8)):
        model = training.run(epoch).model
        for part, examples in parts.items():
            error = evaluate(model, *examples)[1]
            assert columns[f"{part}natural_error"][i] == pytest.approx(error)
            robust = robust_accuracy(model, *examples, attack)[1]
            assert columns[f"{part}robust_error"][i] == 1 - robust
        by_hand[epoch] = robustness.two_judges(
            model, found.x_test, found.y_test, threat, judged=20, seed=10
        )
    errors = columns[f"validation_{'robust' if attacked else 'natural'}_error"]
    best = [2, 4, 6, 8][int(np.argmin(errors))]
    assert columns["end_epoch"] == [best, 8]
    for name in by_hand[8]:
        assert columns[f"end_{name}"] == [by_hand[best][name], by_hand[8][name]]


def test_the_last_epoch_is_measured_whatever_the_distance():
    columns = ro.run(dataclasses.replace(TINY, every=3), AT, seed=10)
    assert columns["epoch"] == [3, 6, 8] and columns["end_epoch"][1] == 8


def test_of_epochs_that_are_as_good_the_first_is_the_best():
    columns = ro.run(tiny(lr=0.0), AT, seed=10)
    assert columns["end_epoch"] == [2, 8]
    assert len({*columns["validation_robust_error"]}) == 1
    assert columns["end_pgd_error"][0] == columns["end_pgd_error"][1]


def test_a_small_grid_gives_every_claim_a_number_from_every_seed():
    result = experiments.run(
        ro.EXPERIMENT, tiny(epochs=2), seeds=[10, 11], device="cpu", progress=False
    )
    assert len(result.runs) == 2 * 4
    for claim in result.claims:
        assert "failed" not in claim.reason and len(claim.values) == 2
        assert np.isfinite(claim.values).all()


@pytest.mark.parametrize("config", ro.EXPERIMENT.presets.values())
def test_every_preset_has_its_validation_examples_besides(config):
    assert max(config.examples) + config.validation <= config.task.train


# --- the claims, by hand --------------------------------------------------------------------------


def run_of(pgd_errors, autoattack, natural, changed=None, seed=0, end_epoch=(4, 6), train=None):
    return Run(
        {**AT, **(changed or {})},
        seed,
        {
            "epoch": [2, 4, 6],
            "train_robust_error": train or [0.5, 0.2, 0.05],
            "robust_error": [0.5, 0.4, 0.45],
            "end_epoch": list(end_epoch),
            "end_pgd_error": list(pgd_errors),
            "end_autoattack_error": list(autoattack),
            "end_natural_error": list(natural),
        },
    )


def result_of(*runs):
    config = {"rhos": [0.05], "examples": [40, 70]}
    return Result("hand-made", "laptop", config, list(runs), [], {})


RUNS = [
    run_of((0.40, 0.46), (0.42, 0.50), (0.10, 0.09)),
    run_of((0.30, 0.32), (0.3, 0.3), (0.08, 0.08), {"examples": 70}),
    run_of((0.38, 0.41), (0.40, 0.41), (0.10, 0.10), {"rho": 0.05}),
    run_of((0.9, 0.9), (1.0, 1.0), (0.05, 0.052), {"attacked": False}),
]
EXPECTED = {
    "last-is-less-robust": 6.0,
    "the-other-judge-agrees": 8.0,
    "training-error-hides-it": -15.0,
    "natural-error-hides-it": -1.0,
    "best-is-after-the-first-drop": 4 / 6,
    "natural-training-does-not": 0.2,
    "more-data-helps": 4.0,
    "sam-helps": 3.0,
    "stopping-is-as-good": 1.0,
}


def test_every_claim_is_tested_here():
    assert sorted(EXPECTED) == sorted(claim.id for claim in CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claims_statistic_is_the_arithmetic_of_its_statement(claim):
    assert claim.statistic(result_of(*RUNS)) == [pytest.approx(EXPECTED[claim.id])]


def test_a_rise_is_from_the_best_epoch_to_the_last():
    run = RUNS[0]
    assert ro.rise(run, "end_pgd_error") == pytest.approx(6)
    assert ro.rise(run, "train_robust_error") == pytest.approx(-15)
    assert ro.rise(run, "robust_error") == pytest.approx(5)


def test_curves_have_a_row_for_each_seed_and_are_those_of_one_setting():
    other = run_of((0, 0), (0, 0), (0, 0), seed=7, train=[0.6, 0.3, 0.1])
    epochs, errors = ro.curves(result_of(*RUNS, other), "train_robust_error")
    assert epochs.tolist() == [2, 4, 6]
    assert errors.tolist() == [[0.5, 0.2, 0.05], [0.6, 0.3, 0.1]]
    assert ro.curves(result_of(*RUNS), "robust_error", rho=0.05)[1].shape == (1, 3)
