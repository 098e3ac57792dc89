"""The control for SAM's edge: its studies on tiny configs, and its claims on runs made by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of
from torch.nn import functional as F

from sam_lab import experiments, sam_edge
from sam_lab.experiments import Cell
from sam_lab.experiments.sam import sam_on_quadratics as study

LR, RHO = 0.5, 0.1
SETTINGS = study.EXPERIMENT.settings

TINY = dataclasses.replace(
    study.LAPTOP,
    lrs=(0.5,),
    norms=(0.01, 1.0),
    dim=5,
    span=0.1,
    fractions=(0.5, 0.9),
    steps=120,
    moments=20,
    gaps=(0.2,),
    noises=(0.1, 1.0, 10.0),
    data="digits",
    images=30,
    hidden=(6,),
    trunk=30,
    network_steps=60,
)


# --- the edge by brute force ---------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1e-3, 1.0, 50.0])
def test_the_threshold_found_without_the_formula_is_the_formula(norm):
    gradient = norm * torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    shares = torch.tensor([1.0, 0.7, 0.01], dtype=torch.float64)
    assert study.threshold(LR, RHO, gradient, shares) == pytest.approx(
        sam_edge(LR, RHO, norm), rel=1e-12
    )


def test_bisection_agrees_with_the_formula_for_random_directions():
    columns = study.bisection(TINY, Cell({"lr": LR, "rho": RHO}))
    assert columns["grad_norm"] == [0.01, 1.0]
    assert np.allclose(columns["formula"], [sam_edge(LR, RHO, norm) for norm in TINY.norms])
    assert np.abs(columns["error"]).max() < 1e-12


# --- fixed quadratics ----------------------------------------------------------------------------


def test_on_a_quadratic_the_gradient_falls_to_the_orbit_and_the_curvature_stays():
    columns = study.settling(TINY, Cell({"fraction": 0.5}))
    assert columns["step"][0] == 0 and columns["step"][-2:] == [119, 120]
    assert np.allclose(columns["sharpness"], 2.0, rtol=1e-12)
    assert columns["grad_norm"][0] > 10 * columns["orbit"][0]
    assert columns["grad_norm"][-1] == pytest.approx(columns["orbit"][0], rel=1e-3)
    assert columns["sam_edge"][0] > 3.5
    assert columns["sam_edge"][-1] == pytest.approx(2.0, rel=1e-3)


def test_beside_a_close_eigenvalue_the_direction_settles_at_the_predicted_rate():
    columns = study.pair(TINY, Cell({"gap": 0.2}))
    tangent = np.array(columns["tangent"])
    assert len(tangent) == 25
    assert tangent[-1] / tangent[-2] == pytest.approx(columns["rate"][0], rel=1e-6)
    assert columns["ratio"][-1] == pytest.approx(1, abs=1e-6)
    # between the orbits of the two eigenvalues, the ratio is off by less than the gap at once
    assert abs(columns["ratio"][0] - 1) < 0.2


@pytest.mark.slow
def test_noise_moves_the_ratio_to_different_sides_of_the_noiseless_one():
    config = dataclasses.replace(TINY, dim=20, steps=600)
    quiet, even, loud = (
        {
            name: float(np.median(values))
            for name, values in study.noisy(config, Cell({"noise": noise})).items()
        }
        for noise in (0.0, 1.0, 10.0)
    )
    assert quiet["batch"] == pytest.approx(1, abs=1e-4)
    assert quiet["full"] == quiet["batch"]
    assert even["batch"] < 0.98 < 1.05 < even["full"]
    assert max(loud["batch"], loud["full"]) < 0.9


# --- the network ---------------------------------------------------------------------------------


def test_the_network_is_that_of_the_seed_after_gradient_descent():
    pytest.importorskip("sklearn")
    model, x, target = study.network(TINY, seed=1)
    fresh, _, _ = study.network(dataclasses.replace(TINY, trunk=0), seed=1)
    for _ in range(TINY.trunk):
        grads = torch.autograd.grad(F.mse_loss(fresh(x), target), list(fresh.parameters()))
        with torch.no_grad():
            for p, g in zip(fresh.parameters(), grads, strict=True):
                p -= TINY.network_lr * g
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert x.dtype == torch.float64 and target.sum(1).tolist() == [1.0] * 30


def test_all_paths_start_at_the_same_weights_and_an_unknown_one_is_named():
    pytest.importorskip("sklearn")
    config = dataclasses.replace(TINY, network_steps=1)
    starts = {path: study.frozen(config, Cell({"path": path})) for path in study.PATHS}
    for name in ("loss", "grad_norm", "sam_edge"):
        values = [columns[name][0] for columns in starts.values()]
        assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    with pytest.raises(ValueError, match="path .*'dead'"):
        study.frozen(config, Cell({"path": "dead"}))
    with pytest.raises(ValueError, match="path .*'dead'"):
        study.filmed(config, "dead")


def test_a_film_measures_what_the_run_measures_and_shows_the_valley_it_is_in():
    pytest.importorskip("sklearn")
    config = dataclasses.replace(TINY, network_steps=20, every=1)
    for path in ("linearised", "living"):
        film = study.filmed(config, path, steps=20, reach=0.2, points=9)
        run = study.frozen(config, Cell({"path": path}))
        for name in ("step", "loss", "sharpness", "sam_edge"):
            np.testing.assert_allclose(film[name], run[name], rtol=1e-6, err_msg=name)
        assert film["gd_edge"].tolist() == [2 / config.network_lr] * 21
        assert film["position"][0] == 0 and film["valley"].shape == (21, 9)
        np.testing.assert_allclose(film["along"], np.linspace(-0.2, 0.2, 9))
        assert film["valley"][0, 4] == pytest.approx(film["loss"][0])  # the middle is the start
        # the weights lie in the valley: a curve through it has their loss where they are
        inside = [
            np.polyval(np.polyfit(film["along"], valley, 4), position)
            for valley, position in zip(film["valley"], film["position"], strict=True)
        ]
        np.testing.assert_allclose(inside, film["loss"], rtol=1e-3)
        if path == "linearised":  # the valley is a parabola, and stays the one it was
            curved = [2 * np.polyfit(film["along"], valley, 2)[0] for valley in film["valley"]]
            np.testing.assert_allclose(curved, film["sharpness"][0], rtol=1e-3)


# --- the experiment ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_run_measures_everything_that_its_claims_need():
    pytest.importorskip("sklearn")
    result = experiments.run(study.EXPERIMENT, TINY, seeds=1, device="cpu", progress=False)
    assert len(result.runs) == len(SETTINGS(TINY))
    (runs,) = result.by_seed()
    assert all(math.isfinite(claim(runs)) for claim in study.CLAIMS)
    for claim in (
        study.edge_by_brute_force,
        study.curvature_is_constant,
        study.close_eigenvalues_settle_slowly,
    ):
        assert claim.criterion.low <= claim(runs) <= claim.criterion.high


@pytest.mark.slow
def test_a_seed_repeats_its_run_and_another_one_changes_it():
    pytest.importorskip("sklearn")
    config = dataclasses.replace(
        TINY, norms=(0.1,), steps=20, moments=5, noises=(1.0,), trunk=5, network_steps=20
    )
    for setting in SETTINGS(config):
        first, again, other = (
            study.EXPERIMENT.run(config, Cell(setting, seed)) for seed in (0, 0, 1)
        )
        assert first == again
        # the threshold is the same for all directions of the gradient and all spectra
        assert setting["study"] == "bisection" or first != other


def made_up(hover=1.0, frozen=1.0, moved=1.0, error=0.0, align=0.3, norm=1.0, full=1.3):
    """A result in which everything is as claimed, unless told otherwise."""
    runs = []
    n = 20
    for seed in range(3):
        for setting in SETTINGS(study.LAPTOP):
            columns = {}
            if setting["study"] == "bisection":
                columns = {"error": [0.0, error]}
            elif setting["study"] == "spectrum":
                ratio = np.array([0.5, 0.8, 1.25, *[1.0] * (n - 5), hover, hover])
                columns = {
                    "step": np.arange(n),
                    "sharpness": np.linspace(1, moved, n) * 2.0,
                    "sam_edge": np.linspace(1, moved, n) * 2.0 / ratio,
                    "grad_norm": np.full(n, norm),
                    "grad_align": 0.05 * np.arange(1, n + 1),
                    "orbit": 1.0,
                }
            elif setting["study"] == "pair":
                columns = {"tangent": 0.5 ** np.arange(n), "rate": 0.5}
            elif setting["study"] == "noise":
                batch = {0.1: 1.0, 1.0: 0.95, 10.0: 0.6}[setting["noise"]]
                columns = {"batch": batch, "full": full * batch}
            else:
                living = setting["path"] == "living"
                sharpness = np.linspace(2, 1, n) if living else np.full(n, 2.0)
                # the second-order model leaves its edge once its loss has fallen below 0
                floor = np.where(np.arange(n) < 12, 1.0, -1.0)
                left = (setting["path"] == "taylor") & (floor < 0)
                columns = {
                    "loss": floor if setting["path"] == "taylor" else np.ones(n),
                    "sharpness": sharpness,
                    "sam_edge": sharpness / np.where(left, 0.1, 1.0 if living else frozen),
                    "grad_align": np.full(n, align if living else 0.99),
                }
            runs.append(run_of(setting, seed, **columns))
    return result_of(dataclasses.asdict(study.LAPTOP), *runs)


def verdicts(result):
    return {verdict.claim.id: verdict for verdict in study.EXPERIMENT.judge(result)}


def test_the_claims_hold_on_runs_made_to_hold_them():
    assert {verdict.verdict for verdict in verdicts(made_up()).values()} == {"reproduced"}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    cases = {
        "edge by brute force": ({"error": -1e-5}, 1e-5),
        "ratio of 1 on a quadratic": ({"hover": 1.25}, 0.25),
        "curvature is constant": ({"moved": 1.5}, 0.5),
        "gradient adapts": ({"norm": 1.25}, 0.25),
        "overshoots first": ({}, 1.25),
        "ratio before orbit": ({}, 0.2),
        "close eigenvalues settle slowly": ({}, 1.0),
        "little noise does little": ({"full": 1.3}, 1.0),
        "noise splits the ratio": ({"full": 1.3}, 1.3),
        "much noise takes SAM off its edge": ({"full": 1.3}, 0.78),
        "frozen network": ({"frozen": 0.8}, 0.8),
        "frozen loss": ({"frozen": 0.8}, 0.8),
        "living network": ({"frozen": 0.8}, 1.0),
        "living falls, frozen stays": ({}, 0.5),
        "frozen gradient is aligned": ({"align": 0.3}, 0.99),
        "living gradient is not": ({"align": 0.3}, 0.3),
    }
    runs = {
        name: (made_up(**change).by_seed()[0], value) for name, (change, value) in cases.items()
    }
    check_statistics(study.CLAIMS, runs)


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        ({"error": -1e-5}, {"edge by brute force"}),
        ({"hover": 1.005}, {"ratio of 1 on a quadratic"}),
        ({"moved": 1.01}, {"curvature is constant"}),
        ({"norm": 1.1}, {"gradient adapts"}),
        ({"full": 1.0}, {"noise splits the ratio"}),
        ({"full": 2.0}, {"much noise takes SAM off its edge"}),
        ({"frozen": 0.5}, {"frozen network", "frozen loss"}),
        ({"align": 0.9}, {"living gradient is not"}),
    ],
)
def test_each_claim_can_fail(change, falls):
    judged = verdicts(made_up(**change))
    assert falls == {name for name in judged if judged[name].verdict == "not reproduced"}


def test_a_ratio_that_never_settles_is_no_value_but_a_reason():
    verdict = verdicts(made_up(hover=1.5))["ratio before orbit"]
    assert verdict.verdict == "inconclusive"
    assert "+0.5 away from 1" in verdict.reason
