"""Saddles that hold SAM: steps, borders and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import SAM, experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import saddles as study
from sam_lab.perturbations import unnormalized

TINY = dataclasses.replace(
    study.LAPTOP,
    cases=1,
    steps=300,
    tol=0.02,
    walkers=10,
    most=300,
    batches=(1, 64),
    images=30,
    width=3,
    starts=(0.03, 3.0),
    net_steps=60,
)


@pytest.mark.parametrize("method", ["descent", "sam", "unnormalized"])
def test_a_step_is_that_of_the_library(method):
    curvatures, start, lr, rho = np.array([1.5, -0.7]), np.array([0.3, 0.2]), 0.2, 0.1
    w = torch.tensor(start, requires_grad=True)
    h = torch.tensor(curvatures)
    rule = {"rule": unnormalized} if method == "unnormalized" else {}
    sam = SAM(torch.optim.SGD([w], lr=lr), 0.0 if method == "descent" else rho, **rule)
    sam.step(lambda: 0.5 * (h * w * w).sum())
    step = study.saddle_step(start, curvatures, lr, rho, method, np.zeros(2))
    np.testing.assert_allclose(start - step, w.detach().numpy())


def test_the_critical_curvature_is_where_the_gradient_of_the_orbit_is_rho_times_it():
    assert study.critical(0.5, 1.0) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no orbit"):
        study.critical(0.5, 4.0)


def test_the_borders_are_where_they_were_derived():
    config = dataclasses.replace(TINY, steps=1500, tol=5e-3)
    rng = np.random.default_rng(0)
    found = study.borders(config, h=1.0, curvature=4.0, lr=0.25, rho=0.3, rng=rng)
    for name, value in found.items():
        assert value == pytest.approx(1, abs=6e-3), name


def test_a_border_wants_two_ends_that_differ():
    with pytest.raises(ValueError, match="no border between 1 and 2: both are True"):
        study.border(lambda x: True, 1.0, 2.0, 0.1)
    assert study.border(lambda x: x < 1.3, 1.0, 2.0, 1e-6) == pytest.approx(1.3, rel=1e-6)


def test_gradient_descent_leaves_and_sam_stays():
    config = dataclasses.replace(TINY, most=2000)
    steps = {
        method: study.escape_steps(method, 1, config, np.random.default_rng(0))
        for method in ("descent", "sam")
    }
    assert steps["descent"].max() < 400
    assert np.median(steps["sam"]) == 2000


def test_the_slopes_of_the_linear_network_are_autograds():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 4)), rng.standard_normal((9, 2))
    one, two = rng.standard_normal((3, 4)), rng.standard_normal((2, 3))
    weights = [torch.tensor(w, requires_grad=True) for w in (one, two)]
    fitted = torch.tensor(x) @ weights[0].T @ weights[1].T
    loss = (torch.tensor(y) - fitted).square().sum() / 18
    found = study._slopes(one, two, x.T @ x / 9, y.T @ x / 9)
    for mine, its in zip(found, torch.autograd.grad(loss, weights), strict=True):
        np.testing.assert_allclose(mine, its.numpy())


@pytest.mark.slow
def test_a_small_run_measures_everything_that_its_claims_need():
    result = experiments.run("saddles", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 10
    reasons = [verdict.reason for verdict in experiments.judge(result)]
    assert not any("failed" in reason for reason in reasons), reasons


def test_a_seed_repeats_its_run():
    cell = Cell({"method": "batch"}, 4)
    assert study.network(TINY, cell) == study.network(TINY, cell)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = [
        run_of({"study": "toys"}, 0, line=[1.0, 1.2], unnormalized=[0.9, 1.0], steep=[0.7, 1.2])
    ]
    for method, medians in {
        "descent": [100, 50],
        "sam": [2000, 80],
        "unnormalized": [120, 60],
        "momentum": [100, 40],
    }.items():
        runs.append(run_of({"study": "noise", "method": method}, 0, median=medians))
    for method, steps in {
        "descent": [40, 20],
        "sam": [1000, 50],
        "momentum": [500, 30],
        "batch": [800, 900],
        "batch_descent": [60, 20],
    }.items():
        runs.append(run_of({"study": "network", "method": method}, 0, steps=steps))
    expected = {
        "captured-within-rho": 1.2,
        "unnormalized-captured": 0.9,
        "critical-curvature": 0.7,
        "noise-does-not-free-sam": 20.0,
        "small-batches-free-sam": 0.04,
        "momentum-frees-sam": 0.05,
        "network-is-captured": 25.0,
        "network-beyond-the-radius-leaves": 2.5,
        "batches-free-the-network": 0.8,
        "momentum-frees-the-network": 0.5,
        "batches-without-sam-leave": 1.5,
    }
    made = seed_runs({}, *runs)
    check_statistics(study.CLAIMS, {name: (made, value) for name, value in expected.items()})
