"""Noise in the labels of a fitted network: the run, and the claims on made runs."""

import dataclasses

import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import label_noise as task

TINY = dataclasses.replace(
    task.LAPTOP, images=20, hidden=(4,), fit=5, noise=1.0, steps=4, every=2, tol=0.1
)


@pytest.fixture(scope="module")
def columns():
    return {labels: task.run(TINY, Cell({"labels": labels}, 2)) for labels in task.LABELS}


def test_all_set_out_from_the_same_weights_which_fit(columns):
    for one in columns.values():
        assert one["step"] == [0, 2, 4]
        assert one["loss"][0] == 0
        assert one["trace"][0] == columns["exact"]["trace"][0]


def test_exact_labels_move_nothing_and_noise_does(columns):
    assert len(set(columns["exact"]["trace"])) == 1 and columns["exact"]["loss"] == [0, 0, 0]
    assert columns["fresh"]["loss"][-1] > 0 and columns["kept"]["loss"][-1] > 0
    assert columns["fresh"]["loss"] != columns["kept"]["loss"]


def test_the_error_of_the_trace_is_the_one_asked_for(columns):
    for error, trace in zip(columns["fresh"]["stderr"], columns["fresh"]["trace"], strict=True):
        assert 0 < error <= 0.1 * trace


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("label_noise", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 3
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    traces = {"exact": [4, 4, 4], "fresh": [4, 3, 2], "kept": [4, 5, 5.5]}
    runs = seed_runs({}, *(run_of({"labels": k}, 0, trace=v) for k, v in traces.items()))
    expected = {
        "label-noise-flattens": 0.5,
        "label-noise-goes-on-flattening": 1 / 3,
        "kept-noise-stops": -0.1,
        "kept-noise-does-not-flatten": -0.1,
        "without-noise-nothing-moves": 0.0,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)
