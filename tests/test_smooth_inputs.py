"""Smoothness in the inputs: the run against autograd, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import noisy_edge, smooth_inputs

TASK = dataclasses.replace(
    noisy_edge.LAPTOP, images=30, hidden=(6, 5), batches=(4, 10, 30), time=4.0
)
TINY = smooth_inputs.Config(TASK, every=1.0)


def test_a_run_measures_the_network_that_it_has_trained():
    cell = Cell(smooth_inputs.settings(TINY)[1], 2)
    columns = smooth_inputs.run(TINY, cell)
    assert columns["time"] == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])
    model, x, y = noisy_edge.network_problem(TASK, 2)
    order = torch.Generator().manual_seed(21)
    params = [p.detach() for p in model.parameters()]
    for _ in range(40):
        noisy_edge.take_step(params, x, y, cell.setting, order)
    squares = []
    for one in x:
        one = one[None].clone().requires_grad_()
        squares.append(float(torch.autograd.grad(model(one).sum(), one)[0].square().sum()))
    assert columns["input_gradient"][-1] == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)


def test_a_run_ends_where_its_loss_is_half_of_the_level():
    config = dataclasses.replace(TINY, task=dataclasses.replace(TASK, time=3000.0), every=20.0)
    losses = smooth_inputs.run(config, Cell(smooth_inputs.settings(config)[0], 0))["loss"]
    assert losses[-1] <= noisy_edge.LEVEL / 2 < min(losses[:-1])


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("smooth_inputs", TINY, seeds=[1], device="cpu", progress=False)
    reasons = [verdict.reason for verdict in experiments.judge(result)]
    assert len(result.runs) == 3
    assert not any("failed" in reason for reason in reasons), reasons


def made(batch, noise, gradient, trace):
    columns = {
        "loss": np.geomspace(0.5, 0.05, 8),
        "input_gradient": np.full(8, gradient),
        "trace": np.full(8, trace),
        "bound": 1.5 * np.full(8, gradient) + np.arange(8),
    }
    return run_of({"lr": 0.1, "rho": 0.0, "batch": batch, "noise": noise}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        dataclasses.asdict(smooth_inputs.LAPTOP),
        made(200, "minibatch", 3.0, 50.0),
        made(8, "minibatch", 1.2, 20.0),
        made(8, "isotropic", 2.4, 40.0),
    )
    expected = {
        "minibatches-are-smoother": 0.4,
        "shapeless-noise-is-not-smoother": 2.0,
        "minibatches-have-a-smaller-trace": 0.4,
        "first-layer-bounds-the-inputs": 1.5,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(smooth_inputs.EXPERIMENT.claims, cases)
