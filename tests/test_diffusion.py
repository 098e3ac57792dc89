"""Stationary laws on a noisy quadratic: closed forms, simulation, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments.theory import diffusion as study

TINY = dataclasses.replace(study.LAPTOP, lrs=(0.2, 0.8), walkers=200, warmup=5.0, times=5.0)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_the_exact_variance_is_stationary(rho):
    """A step on a variance V gives (1 - a)² V + (lr (1 + rho))²."""
    lr = 0.7
    V, felt = study.exact_variance(lr, rho), lr * (1 + rho)
    assert (1 - felt) ** 2 * V + felt**2 == pytest.approx(V)


def test_beyond_the_edge_there_is_no_variance():
    with pytest.raises(ValueError, match=r"must be below 2, got 2\.25"):
        study.exact_variance(1.5, 0.5)


def test_the_sde_is_the_limit_of_a_small_rate():
    for rho in (0.0, 0.5):
        assert study.sde_variance(1e-4, rho) == pytest.approx(study.exact_variance(1e-4, rho), 1e-3)


@pytest.mark.parametrize("lr", [0.05, 1.2])
def test_without_a_radius_sams_sde_is_that_of_sgd(lr):
    assert study.sam_sde_variance(lr, 0.0) == pytest.approx(study.sde_variance(lr, 0.0), rel=1e-6)


def test_sams_sde_is_the_limit_of_its_simulation_by_small_steps():
    """Euler's method for the SDE: its drift and its noise are those of a step of SAM, so that many
    small steps of SAM, each with the noise of a larger one, follow it."""
    lr, rho, dt = 0.8, 0.5, 0.01
    rng = np.random.default_rng(0)
    w, total, count = np.zeros(4000), 0.0, 0
    for step in range(3000):
        noisy = w + rng.standard_normal(4000)
        mean = w + rho * study.sign_mean(w)
        rest = noisy + rho * np.sign(noisy) - mean
        w = w - dt * mean - np.sqrt(dt * lr) * rest
        if step >= 1000:
            total, count = total + float((w**2).mean()), count + 1
    assert total / count == pytest.approx(study.sam_sde_variance(lr, rho), rel=0.03)


@pytest.mark.parametrize("rule", ["sgd", "unnormalized"])
def test_the_simulation_has_the_exact_variance(rule):
    rho = 0.0 if rule == "sgd" else 0.5
    rng = np.random.default_rng(1)
    value, error = study.simulated_variance(rule, 0.8, rho, TINY, rng)
    assert abs(value - study.exact_variance(0.8, rho)) < 4 * error


def test_a_small_run_measures_everything_that_its_claims_need():
    result = experiments.run("diffusion", TINY, seeds=[1], device="cpu", progress=False)
    assert [run.settings["rule"] for run in result.runs] == list(study.RULES)
    reasons = [verdict.reason for verdict in experiments.judge(result)]
    assert not any("failed" in reason for reason in reasons), reasons


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    lr = np.array([0.1, 0.2, 0.4])

    def made(rule, order, first):
        variance = first * lr / 0.1
        return run_of(
            {"rule": rule},
            0,
            lr=lr,
            variance=variance,
            sde=variance * (1 - 0.5 * lr**order),
            exact=variance + 0.02,
            stderr=np.array([0.01, 0.005, 0.02]),
        )

    runs = seed_runs(
        {},
        made("sgd", 1, 1.0),
        made("unnormalized", 1, 1.5),
        made("sam", 2, 1.4),
        made("fresh", 1, 0.9),
    )
    expected = {
        "steps-have-the-exact-variance": 4.0,
        "first-order-unnormalized": 1.0,
        "first-order-sam": 2.0,
        "no-edge-in-the-sde": 0.8,
        "flatness-has-no-use-here": 1.5,
        "both-passes-share-the-noise": 0.6,
    }
    check_statistics(study.CLAIMS, {name: (runs, value) for name, value in expected.items()})
