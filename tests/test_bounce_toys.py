"""The toys of chapter 8: runs against theory at small sizes, the claims on runs made by hand."""

import dataclasses

import numpy as np
import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import bounce_toys, hyperbola

TINY = dataclasses.replace(
    bounce_toys.LAPTOP,
    lrs=(0.2,),
    radii=(0.02,),
    sigmas=(0.2,),
    match=(0.2, 0.1),
    copies=20,
    depth=0.5,
    pairs=(2.0, 1.9),
    pairs_rho=0.1,
    pairs_steps=150,
    moments=3,
    sizes=(2, 3),
    size_depth=0.05,
    floor_lrs=(0.2, 0.1, 0.05),
    floor_copies=200,
)


def test_a_path_is_kept_at_its_moments_as_the_mean_over_copies():
    w = np.stack([hyperbola.at(2.0), hyperbola.at(4.0)])
    kept, places = bounce_toys.follow(w, 7, lambda w: w, moments=2)
    assert kept.tolist() == [0, 4, 7]
    assert places == pytest.approx(np.full((3, 1), 3.0))


def test_one_pair_falls_as_far_as_asked_and_as_theory_says():
    columns = bounce_toys.one(
        TINY, Cell({"rule": "sam", "lr": 0.2, "size": 0.02, "match": False}, seed=3)
    )
    assert columns["fall"] == pytest.approx(columns["predicted"], rel=0.03)
    assert columns["small"] == pytest.approx(2 * 0.2 * 0.02**2 * columns["steps"])
    assert 0.2 < columns["fall"] < TINY.depth


def test_label_noise_is_matched_to_sam_where_both_begin():
    lr, rho = TINY.match
    q = np.random.default_rng(5).uniform(*TINY.starts)
    s = float(hyperbola.sharpness(q))
    columns = bounce_toys.one(
        TINY, Cell({"rule": "label_noise", "lr": lr, "size": rho, "match": True}, seed=5)
    )
    square = columns["small"] / (lr**2 * columns["steps"])
    assert 4 * rho**2 == pytest.approx(lr * square * (2 - lr * s))


def test_the_full_batch_rests_on_the_closed_form_of_its_floor():
    lr, rho, curvature = 0.1, 0.1, bounce_toys.FLOOR_CURVATURE
    columns = bounce_toys.floors(TINY, Cell({"batch": "full", "lr": lr, "rho": rho}))
    rest = lr * curvature * rho / (2 - lr * curvature)
    assert columns["bias"] == pytest.approx(rest)
    assert columns["excess"] == pytest.approx(curvature * rest**2 / 2)


def test_the_optimum_of_the_two_examples_is_that_of_the_module():
    x = np.linspace(-1, 1, 2001)
    loss = (0.5 * (x - 1) ** 2 + (x + 1) ** 2) / 2
    assert x[loss.argmin()] == pytest.approx(bounce_toys.FLOOR_OPTIMUM, abs=1e-3)
    assert np.gradient(np.gradient(loss, x), x)[1000] == pytest.approx(bounce_toys.FLOOR_CURVATURE)


@pytest.mark.slow
def test_a_small_grid_runs_to_verdicts():
    result = experiments.run("bounce_toys", TINY, seeds=[1], device="cpu", progress=False)
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def one(rule, lr, size, fall, *, match=False, **more):
    setting = {"study": "one", "rule": rule, "lr": lr, "size": size, "match": match}
    return run_of(
        setting, fall=fall, **{"predicted": 1.0, "small": 0.5, "late": 0.8, "steps": 50} | more
    )


def pairs(rule, places, flow):
    names = {"place": np.array(places).T, "flow": np.array(flow).T}
    columns = {f"{kind}_{k + 1}": row for kind, rows in names.items() for k, row in enumerate(rows)}
    return run_of({"study": "pairs", "rule": rule}, step=[0, 1, 2], **columns)


def floor(batch, lr, rho, bias):
    setting = {"study": "floors", "batch": batch, "lr": lr, "rho": rho}
    return run_of(setting, bias=bias, excess=0.75 * bias**2)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    e = np.e
    theory = [[4.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    runs = seed_runs(
        {},
        one("sam", 0.1, 0.1, 0.99),
        one("sam", 0.4, 0.1, 1.04, steps=49),
        one("sam", 0.4, 0.2, 1.02, small=0.6),
        one("label_noise", 0.1, 0.1, 0.96),
        one("sam", 0.2, 0.1, 1.1, match=True),
        one("label_noise", 0.2, 0.1, 1.0, match=True),
        one("descent", 0.2, 0.1, 0.0, match=True, late=0.0),
        one("unnormalized", 0.2, 0.1, 0.0, match=True, late=-0.004),
        pairs("sam", [[4.0, 2.0], [2.0, 1.96], [1.0, 2.0 * 0.5**1.1]], theory),
        pairs("exact", [[4.0, 2.0], [0.5, 2.0], [1.0, 2.0]], theory),
        pairs("single_sam", [[e, 1.0], [1.0, 1.0], [1.0, e**-0.5]], [[e, 1]] * 2 + [[1, e**-0.5]]),
        pairs("label_noise", [[e, 1.0], [1.0, 1.0], [1.0, e**-0.7]], [[e, 1]] * 2 + [[1, e**-0.7]]),
        pairs("noise", [[e, 1.0], [1.0, 1.0], [1.0, e**-0.9]], [[e, 1.0]] * 2 + [[1.0, e**-1.0]]),
        run_of(
            {"study": "dimension"},
            d=[2.0, 8.0],
            sam=[1.0, 2.0],
            noise=[0.5, 0.25],
            noise_over_law=[1.01, 0.98],
        ),
        *[floor("full", lr, 0.1, 2 * lr) for lr in (0.1, 0.01, 0.001)],
        *[floor("full", 0.01, rho, rho) for rho in (0.0, 0.3)],
        *[floor("single", lr, 0.1, 0.03) for lr in (0.1, 0.01, 0.001)],
        *[
            floor("single", 0.01, rho, bias)
            for rho, bias in ((0.0, 0.0015), (0.03, 0.009), (0.3, 0.09))
        ],
    )
    expected = {
        "sam-drifts-as-the-bounce-says": 1.04,
        "slow-sam-drifts-as-the-bounce-says": 1.02,
        "label-noise-drifts-as-derived": 0.96,
        "small-rate-law-is-too-slow": 1.02 / 0.6,
        "without-a-force-nobody-drifts": 0.005,
        "sam-equals-label-noise": 1.1,
        "full-batch-sam-flattens-the-sharpest": np.log(2 / 1.96) / np.log(2),
        "tied-pairs-share-the-bounce": 1.1,
        "single-examples-flatten-all": 0.5,
        "all-pairs-as-derived": 0.9,
        "without-a-tremor-sam-overshoots": 0.25,
        "noise-is-one-dth-of-sam": -1.0,
        "noise-drifts-as-derived": 0.98,
        "full-batch-floor-falls-with-the-rate": 2.0,
        "single-example-floor-stays": 0.0,
        "single-example-floor-is-square-in-rho": 2.0,
        "single-example-floor-is-a-third": 0.9,
        "without-a-radius-no-floor": 0.05,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(bounce_toys.EXPERIMENT.claims, cases)
