"""Products of matrices from few measurements: dense differentiation, the bound, claims."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import factorisation as task

TINY = dataclasses.replace(task.LAPTOP, size=3, measurements=6, steps=4, every=2, level=1e-2)


@pytest.fixture(params=[2, 3, 4])
def point(request):
    """Factors, and measurements of another matrix."""
    rng = np.random.default_rng(request.param)
    factors = rng.standard_normal((request.param, 3, 3))
    return factors, rng.standard_normal((5, 3, 3)), rng.standard_normal(5)


def loss(factors, measures, y):
    found = torch.linalg.multi_dot(list(factors))
    return ((measures * found).sum((1, 2)) - y).square().mean() / 2


def test_gradient_and_trace_are_those_of_autograd(point):
    factors, measures, y = point
    w = torch.tensor(factors, requires_grad=True)
    measured = torch.tensor(measures)
    (gradient,) = torch.autograd.grad(loss(w, measured, torch.tensor(y)), w)
    assert task.gradient(factors, measures, y) == pytest.approx(gradient.numpy())
    exact = (measured * torch.linalg.multi_dot(list(w))).sum((1, 2)).detach()
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, measured, exact), w.detach())
    dense = hessian.reshape(w.numel(), w.numel()).trace().item()
    assert task.trace(factors, measures) == pytest.approx(dense)


def expected_trace(factors):
    """The mean of the trace over Gaussian measurements: each entry by itself, added up."""
    d = factors.shape[-1]
    units = np.eye(d * d).reshape(-1, d, d)
    return len(units) * task.trace(factors, units)


@pytest.mark.parametrize("depth", [2, 3])
def test_no_factors_have_less_than_the_bound(depth):
    rng = np.random.default_rng(0)
    for size in (0.1, 1, 3):
        factors = rng.standard_normal((depth, 4, 4)) * size
        assert expected_trace(factors) >= task.floor(task.product(factors), depth)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("depth", [2, 3])
def test_balanced_factors_reach_the_bound(depth, rank):
    d, rng = 4, np.random.default_rng(1)
    matrix = rng.standard_normal((d, rank)) @ rng.standard_normal((rank, d))
    u, s, v = np.linalg.svd(matrix)
    root, there = np.diag(np.sqrt(s)), np.diag((s > 1e-9).astype(float))
    factors = np.stack([u @ root, root @ v] if depth == 2 else [u @ root, there, root @ v])
    if depth == 3:  # so that d |W2 W3|^2 = |W1|^2 |W3|^2 = d |W1 W2|^2
        middle = (s.sum() / d) ** (1 / 3)
        factors = factors * np.array([middle**-0.5, middle, middle**-0.5])[:, None, None]
    assert task.product(factors) == pytest.approx(matrix)
    assert expected_trace(factors) == pytest.approx(task.floor(matrix, depth))


def test_the_nuclear_norm_is_the_sum_of_the_singular_values():
    matrix = np.diag([3.0, -2.0, 0.5])
    assert task.nuclear(matrix) == pytest.approx(5.5)
    assert task.floor(matrix, 2) == pytest.approx(2 * 3 * 5.5)


def test_another_depth_is_named():
    with pytest.raises(ValueError, match="depth must be 2 or 3, got 4"):
        task.floor(np.eye(3), 4)


def test_all_methods_set_out_from_the_same_fit():
    runs = {
        method: task.run(TINY, Cell({"depth": 3, "rank": 1, "method": method}, 2))
        for method in task.METHODS
    }
    for columns in runs.values():
        assert columns["step"] == [0, 2, 4]
        assert max(columns["loss"]) <= TINY.level
        assert columns["trace"][0] == runs["sgd"]["trace"][0]
    assert len({columns["trace"][-1] for columns in runs.values()}) == 3
    assert runs["sgd"]["truth"] == pytest.approx([1.0]), "of rank 1 and of norm 1"


def test_a_step_of_sam_looks_at_the_perturbed_factors(point):
    factors, measures, y = point
    one, label = measures[:1], y[:1]
    g = task.gradient(factors, one, label)
    there = task.gradient(factors + TINY.rho * g / np.linalg.norm(g), one, label)
    found = task._step("sam", factors, one, label, TINY, np.random.default_rng(0))
    assert found == pytest.approx(factors - TINY.lr * there)
    zeros = np.zeros_like(factors)
    rests = task._step("sam", zeros, one, label, TINY, np.random.default_rng(0))
    assert (rests == 0).all(), "where there is no gradient"


@pytest.mark.parametrize(("lr", "steps"), [(0.1, 3), (1e4, 50)])
def test_a_fit_that_is_not_reached_is_named(monkeypatch, lr, steps):
    monkeypatch.setattr(task, "FIT_STEPS", steps)
    config = dataclasses.replace(TINY, level=1e-9, fit_lr=lr)
    with (
        pytest.raises(FloatingPointError, match="has not reached a training loss of 1e-09"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        task.run(config, Cell({"depth": 2, "rank": 1, "method": "sgd"}))


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("factorisation", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 8
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def made(depth, rank, method, **columns):
    return run_of({"depth": depth, "rank": rank, "method": method}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    sam = {"floor": [9, 20], "nuclear": [3, 1.2], "error": [2, 0.1], "truth": 1.0}
    full = {"trace": [60, 30], "truth": 2.0}
    runs = seed_runs(
        {"size": 10},
        made(2, 1, "sgd", trace=[60, 63]),
        made(3, 1, "sgd", trace=[60, 54]),
        made(2, 1, "sam", trace=[60, 21], **sam),
        made(3, 1, "sam", trace=[50, 20], **{**sam, "nuclear": [3, 1.1], "error": [1, 0.2]}),
        made(2, 1, "label_noise", trace=[60, 30]),
        made(3, 1, "label_noise", trace=[60, 33]),
        made(2, 10, "sam", error=[1, 0.6], nuclear=[3, 1.6], **full),
        made(3, 10, "sam", error=[1, 0.7], nuclear=[3, 1.8], **full),
    )
    expected = {
        "sam-flattens-the-factors": 0.4,
        "noise-flattens-the-factors": 0.55,
        "sgd-keeps-the-factors": 0.9,
        "flat-has-the-least-nuclear-norm": 1.2,
        "trace-reaches-its-bound": 1.05,
        "flat-recovers-low-rank": 0.2,
        "full-rank-is-not-recovered": 0.6,
        "flat-is-simpler-than-full-rank": 0.9,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)
