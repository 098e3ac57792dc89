"""Bias and variance of SAM on least squares: the formulas beside dense algebra, and made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import SAM, experiments, perturbations
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import ridge as task

TINY = dataclasses.replace(
    task.LAPTOP, examples=8, features=5, steps=(1, 2, 5), draws=50, early=2, width=0.2
)


@pytest.fixture(params=task.PROBLEMS)
def small(request):
    return task.problem(request.param, TINY, 3)


def matrices(small, lr, rho, steps):
    """The matrix that maps labels to fitted values, from steps with explicit matrices."""
    n, p = small.phi.shape
    sigma = small.phi.T @ small.phi / n
    theta = np.zeros((p, n))  # as a linear map of the labels
    for _ in range(steps):
        g = sigma @ theta - small.phi.T / n
        theta = theta - lr * (np.eye(p) + rho * sigma) @ g
    return small.phi @ theta


def test_the_formula_is_that_of_the_matrices(small):
    lr, rho = task.rates("sam", small.spectrum()[0][-1], 0.4, 1.0)
    smoother = matrices(small, lr, rho, 7)
    bias, variance = task.bias_and_variance(small, 0.3, lr, rho, 7)
    n = len(small.truth)
    assert bias == pytest.approx(np.square(smoother @ small.truth - small.truth).mean())
    assert variance == pytest.approx(0.3**2 * np.square(smoother).sum() / n)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_a_step_is_that_of_the_library(small, rho):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((8, 1))
    theta = rng.standard_normal((small.phi.shape[1], 1))
    w = torch.tensor(theta, requires_grad=True)
    phi, labels = torch.tensor(small.phi), torch.tensor(y)
    sam = SAM(torch.optim.SGD([w], lr=0.2), rho, rule=perturbations.unnormalized)

    sam.step(lambda: (phi @ w - labels).square().mean() / 2)
    assert task.step(theta, small.phi, y, 0.2, rho) == pytest.approx(w.detach().numpy(), abs=1e-12)


def test_the_matched_rate_is_that_of_sam_along_the_top():
    lr, rho = task.rates("sam", 5.0, 0.4, 1.0)
    matched, none = task.rates("matched", 5.0, 0.4, 1.0)
    assert none == 0 and matched == pytest.approx(lr * (1 + rho * 5.0))
    assert task.rates("descent", 5.0, 0.4, 1.0) == (lr, 0.0)
    eigenvalues = np.linspace(0, 5, 11)
    sam, plain, control = (
        task.fitted(eigenvalues, *task.rates(method, 5.0, 0.4, 1.0), 6)
        for method in ("sam", "descent", "matched")
    )
    assert (plain <= sam).all() and (sam <= control).all()
    assert sam[-1] == pytest.approx(control[-1])


def test_what_is_seen_is_the_formula_within_the_error_of_the_draws(small):
    config = dataclasses.replace(TINY, draws=20_000)
    lr, rho = task.rates("sam", small.spectrum()[0][-1], 0.4, 1.0)
    biases, variances = task.simulated(small, config, lr, rho, np.random.default_rng(0))
    for steps, bias, variance in zip(config.steps, biases, variances, strict=True):
        expected = task.bias_and_variance(small, config.noise, lr, rho, steps)
        assert bias == pytest.approx(expected[0])
        assert variance == pytest.approx(expected[1], rel=0.05)


def test_true_values_have_mean_square_one(small):
    assert np.square(small.truth).mean() == pytest.approx(1)
    assert small.spectrum()[1].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: task.problem("ridge", TINY, 0), "name must be one of linear, kernel, got 'ridge'"),
        (lambda: task.rates("gd", 1.0, 0.1, 0.1), "method must be one of descent, .* got 'gd'"),
        (lambda: task.rates("sam", 0.0, 0.1, 0.1), "top must be"),
        (lambda: task.rates("sam", 1.0, 0.1, -0.1), "rho must be"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("ridge", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 6
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))
    columns = task.run(TINY, Cell({"problem": "linear", "method": "sam"}, 1))
    assert columns["step"] == [1, 2, 5] and len(columns["lr"]) == 1


def made(problem, method, bias, variance, bias_seen=None, variance_seen=None):
    settings = {"problem": problem, "method": method}
    return run_of(
        settings,
        0,
        bias=bias,
        variance=variance,
        bias_seen=bias_seen or bias,
        variance_seen=variance_seen or variance,
    )


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {"steps": [1, 2, 5], "early": 2},
        made("linear", "descent", [8.0, 4, 2], [1.0, 2, 4], variance_seen=[0.95, 2, 4]),
        made("linear", "sam", [6.0, 3, 1.8], [1.5, 2.2, 4.2]),
        made("linear", "matched", [5.0, 3, 1], [2.0, 2.4, 8]),
        made("kernel", "descent", [8.0, 4, 2], [1.0, 2, 4]),
        made("kernel", "sam", [6.0, 2, 1.6], [2.0, 3, 4.4]),
        made("kernel", "matched", [4.0, 2, 1], [3.0, 6, 5], [4.8, 2, 1], [3.0, 6.6, 5]),
    )
    expected = {
        "formula-gives-the-bias": 1.2,
        "formula-gives-the-variance": 1.1,
        "sam-has-lower-bias": 0.9,
        "sam-has-higher-variance": 1.05,
        "sam-is-better-stopped-early": 5.2 / 6,
        "matched-descent-has-lower-bias": 1.0,
        "matched-descent-has-higher-variance": 2.2 / 2.4,
        "best-stopping-levels-them": 5 / 6,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_presets_stay_where_the_formulas_order_holds(scale):
    preset = task.EXPERIMENT.presets[scale]
    assert preset.lr * (1 + preset.rho) <= 1
    assert preset.draws % 2 == 0
    assert preset.early in preset.steps and list(preset.steps) == sorted(preset.steps)
