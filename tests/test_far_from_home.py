"""SAM without normalisation at its own edge: the run, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import far_from_home as task
from sam_lab.stability import growth

TINY = dataclasses.replace(
    task.LAPTOP, images=30, hidden=(4,), lrs=(0.2,), rhos=(0.0, 0.5), steps=4, every=2
)


def test_the_edge_is_where_a_distance_neither_grows_nor_shrinks():
    columns = task.run(TINY, Cell({"lr": 0.2, "rho": 0.5}, 1))
    assert columns["step"] == [0, 2, 4]
    for edge in columns["sam_edge"]:
        assert growth(0.2, edge, 0.5) == pytest.approx(1)


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("far_from_home", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 2
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def made(rho, ratios, edge):
    """Four measurements; these shares of the edge."""
    ratios = np.array(ratios)
    columns = {"sharpness": edge * ratios, "sam_edge": np.full(4, edge), "gd_edge": np.full(4, 10)}
    return run_of({"lr": 0.2, "rho": rho}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {},
        made(0.0, [0.1, 0.2, 0.6, 0.8], 10.0),
        made(0.1, [2.0, 2.0, 0.9, 1.0], 5.0),
        made(0.3, [2.0, 2.0, 1.2, 1.0], 4.0),
    )
    expected = {
        "unnormalised-sam-sits-at-its-edge": 1.1,
        "unnormalised-sam-sits-near-its-edge": 1.1,
        "unnormalised-sam-stays-at-its-edge": 1.2,
        "descent-stays-below-its-edge": 0.8,
        "descent-goes-beyond-sams-edge": 7 / 5,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)
