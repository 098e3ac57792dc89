"""The best epoch and the last: how it is chosen, what is measured, and what the claims say."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import experiments
from sam_lab.adversarial import Threat, pgd, robust_accuracy
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import robust_overfitting as ro
from sam_lab.experiments.inputs import robustness
from sam_lab.training import evaluate

pytestmark = pytest.mark.usefixtures("light_judges")

TINY = dataclasses.replace(
    ro.LAPTOP,
    recipe=ro.LAPTOP.recipe.but(
        **{"data": "digits", "train": 100, "test": 40, "hidden": (8,), "epochs": 8, "batch": 20},
        measured=30,
    ),
    attack_steps=2,
    n_autoattack=20,
    examples=(40, 70),
    validation=30,
)
AT = {"examples": 40, "rho": 0.0, "attacked": True}


def tiny(**changes):
    return dataclasses.replace(TINY, recipe=TINY.recipe.but(**changes))


# --- the runs -------------------------------------------------------------------------------------


def test_every_setting_differs_from_adversarial_training_in_one_factor():
    base, *others = ro.settings(TINY)
    assert base == AT
    assert others == [{**AT, "examples": 70}, {**AT, "rho": 0.05}, {**AT, "attacked": False}]
    assert ro.settings(dataclasses.replace(TINY, natural=False)) == [base, *others[:2]]


def test_the_learning_rate_drops_to_a_tenth_and_to_a_hundredth():
    training, _ = ro.prepare(TINY, Cell(AT, 10))
    training.run()
    rates = [row["lr"] / TINY.recipe.lr for row in training.history]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert all(row["attacked"] for row in training.history)


@pytest.mark.parametrize(
    ("setting", "passes"),
    [(AT, 3), ({**AT, "rho": 0.05}, 4), ({**AT, "attacked": False}, 1)],
)
def test_a_setting_decides_what_a_step_costs(setting, passes):
    training, _ = ro.prepare(TINY, Cell(setting, 10))
    assert training.run(1).history[-1]["passes"] == 2 * passes


def test_validation_examples_are_not_trained_on_and_all_settings_have_the_same():
    for examples in (40, 70):
        training, dataset = ro.prepare(TINY, Cell({**AT, "examples": examples}, 10))
        assert torch.equal(training.x, dataset.x[:examples]) and len(dataset.x) == 100
        assert torch.equal(training.y, dataset.y[:examples])
    with pytest.raises(ValueError, match=r"at most 100 less 30 \(1 or more\) of the .*, got 71"):
        ro.prepare(TINY, Cell({**AT, "examples": 71}, 10))
    with pytest.raises(ValueError, match=r"at most 100 less 0 \(1 or more\) of the .*, got 40"):
        ro.prepare(dataclasses.replace(TINY, validation=0), Cell(AT, 10))


@pytest.mark.parametrize("attacked", [True, False])
def test_the_best_epoch_is_that_of_the_validation_examples_and_both_ends_are_judged(attacked):
    cell = Cell({**AT, "attacked": attacked}, 10)
    config = tiny(lr=0.5)  # so that the last epoch is not the best by itself
    columns = ro.run(config, cell)
    training, dataset = ro.prepare(config, cell)
    threat = Threat("linf", config.eps)
    attack = partial(pgd, threat=threat, steps=10)
    parts = {
        "": (dataset.x_test, dataset.y_test),
        "train_": (dataset.x[:30], dataset.y[:30]),
        "validation_": (dataset.x[70:], dataset.y[70:]),
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
            model, dataset.x_test, dataset.y_test, threat, n_autoattack=20, seed=10
        )
    errors = columns[f"validation_{'robust' if attacked else 'natural'}_error"]
    best = [2, 4, 6, 8][int(np.argmin(errors))]
    assert columns["end_epoch"] == [best, 8]
    for name in by_hand[8]:
        assert columns[f"end_{name}"] == [by_hand[best][name], by_hand[8][name]]


def test_the_last_epoch_is_measured_whatever_the_distance():
    columns = ro.run(dataclasses.replace(TINY, every=3), Cell(AT, 10))
    assert columns["epoch"] == [3, 6, 8] and columns["end_epoch"][1] == 8


def test_of_epochs_that_are_as_good_the_first_is_the_best():
    columns = ro.run(tiny(lr=0.0, epochs=4), Cell(AT, 10))
    assert columns["end_epoch"] == [2, 4]
    assert len({*columns["validation_robust_error"]}) == 1
    assert columns["end_pgd_error"][0] == columns["end_pgd_error"][1]


def test_a_small_grid_gives_every_claim_a_number():
    result = experiments.run(
        ro.EXPERIMENT, tiny(epochs=2), seeds=[10], device="cpu", progress=False
    )
    assert len(result.runs) == 4
    (runs,) = result.by_seed()
    assert np.isfinite([claim(runs) for claim in ro.EXPERIMENT.claims]).all()


@pytest.mark.parametrize("config", ro.EXPERIMENT.presets.values())
def test_every_preset_has_its_validation_examples_besides(config):
    assert max(config.examples) + config.validation <= config.recipe.train


# --- the claims, by hand --------------------------------------------------------------------------


def trained(pgd_errors, autoattack, natural, changed=None, seed=0, train=(0.5, 0.2, 0.05)):
    return run_of(
        {**AT, **(changed or {})},
        seed,
        epoch=[2, 4, 6],
        train_robust_error=list(train),
        robust_error=[0.5, 0.4, 0.45],
        end_epoch=[4, 6],
        end_pgd_error=list(pgd_errors),
        end_autoattack_error=list(autoattack),
        end_natural_error=list(natural),
    )


CONFIG = {"rhos": [0.05], "examples": [40, 70]}
RUNS = [
    trained((0.40, 0.46), (0.42, 0.50), (0.10, 0.09)),
    trained((0.30, 0.32), (0.3, 0.3), (0.08, 0.08), {"examples": 70}),
    trained((0.38, 0.41), (0.40, 0.41), (0.10, 0.10), {"rho": 0.05}),
    trained((0.9, 0.9), (1.0, 1.0), (0.05, 0.052), {"attacked": False}),
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


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    check_statistics(ro.EXPERIMENT.claims, {name: (runs, x) for name, x in EXPECTED.items()})


def test_a_rise_is_from_the_best_epoch_to_the_last():
    run = RUNS[0]
    assert ro.rise(run, "end_pgd_error") == pytest.approx(6)
    assert ro.rise(run, "train_robust_error") == pytest.approx(-15)
    assert ro.rise(run, "robust_error") == pytest.approx(5)


def test_curves_have_a_row_for_each_seed_and_are_those_of_one_setting():
    other = trained((0, 0), (0, 0), (0, 0), seed=7, train=(0.6, 0.3, 0.1))
    epochs, errors = ro.curves(result_of(CONFIG, *RUNS, other), "train_robust_error")
    assert epochs.tolist() == [2, 4, 6]
    assert errors.tolist() == [[0.5, 0.2, 0.05], [0.6, 0.3, 0.1]]
    assert ro.curves(result_of(CONFIG, *RUNS), "robust_error", rho=0.05)[1].shape == (1, 3)
