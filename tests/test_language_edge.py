"""The language model at the edge of minibatches: a tiny run, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab.experiments import Cell
from sam_lab.experiments.theory import language_edge as study
from sam_lab.recorder import BATCH_COLUMNS, COLUMNS

TASK = dataclasses.replace(
    study.LAPTOP.task, layers=1, width=8, heads=2, key=4, length=8, batch=4, fixed=8, steps=4
)
TINY = dataclasses.replace(study.LAPTOP, task=TASK, moments=2, drawn=2)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_the_second_half_is_measured_on_the_fixed_batch_and_on_others(rho):
    columns = study.run(TINY, Cell({"lr": 0.1, "rho": rho}, 1))
    assert set(columns) == {*COLUMNS, *BATCH_COLUMNS}
    assert columns["step"] == [3, 4]
    assert np.isfinite(columns["batch_sharpness"]).all()


def test_every_rate_comes_with_every_radius():
    assert study.settings(TINY) == [
        {"lr": lr, "rho": rho} for lr in (0.1, 0.4) for rho in (0.0, 0.1)
    ]


def made(lr, rho, over):
    columns = {
        "batch_sharpness": np.array([0.5, 2.0]) * over * 2 / lr,  # geometric mean: `over`
        "gd_edge": np.full(2, 2 / lr),
        "sharpness": np.full(2, 3.0),
        "sam_edge": np.full(2, 4.0),
    }
    return run_of({"lr": lr, "rho": rho}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {}, made(0.1, 0.0, 0.5), made(0.1, 0.1, 0.9), made(0.4, 0.0, 1.0), made(0.4, 0.1, 1.25)
    )
    expected = {
        "sgd-batch-sharpness": 0.5,
        "sam-batch-sharpness": 1.25,
        "steps-lower-their-own-loss": 1.25,
        "sam-reads-as-sgd": (0.9 * 1.25 / 0.5) ** 0.5,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(study.EXPERIMENT.claims, cases)
    assert study.over_own_edge(runs.runs[0]) == 0.75
