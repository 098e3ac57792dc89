"""The control for SAM's edge: closed forms on quadratics, frozen networks, tiny runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sam_lab import SAM, Hessian, experiments, gd_edge, models, sam_edge
from sam_lab.experiments import Result, Run
from sam_lab.experiments import sam_on_quadratics as study

LR, RHO = 0.5, 0.1

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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the theory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [0.1, 1.0, 3.9])
def test_on_the_orbit_the_curvature_is_the_sam_edge_and_a_step_flips_the_gradient(curvature):
    norm = study.orbit_norm(LR, RHO, curvature)
    assert sam_edge(LR, RHO, norm) == pytest.approx(curvature, rel=1e-12)
    assert study.multiplier(LR, RHO, curvature, norm) == pytest.approx(-1, rel=1e-12)


@pytest.mark.parametrize("curvature", [4.0, 5.0, 0.0, -1.0])
def test_there_is_no_orbit_outside_zero_to_two_over_lr(curvature):
    with pytest.raises(ValueError, match="between 0 and 2/lr = 4"):
        study.orbit_norm(LR, RHO, curvature)


def test_the_multiplier_is_what_a_step_does_to_each_component():
    eigenvalues, gradient = vector(3.0, 1.0, 0.2), vector(0.3, -0.2, 0.1)
    w = (gradient / eigenvalues).requires_grad_()
    SAM(torch.optim.SGD([w], lr=LR), RHO).step(lambda: 0.5 * (eigenvalues * w * w).sum())
    for curvature, before, after in zip(eigenvalues, gradient, w.detach(), strict=True):
        expected = study.multiplier(LR, RHO, float(curvature), float(gradient.norm()))
        assert float(curvature * after / before) == pytest.approx(expected, rel=1e-12)


# --- quadratics ----------------------------------------------------------------------------------


def test_a_spectrum_has_its_top_and_the_rest_within_its_span():
    eigenvalues = study.spectrum(3.0, 1000, 1e-3, generator())
    assert eigenvalues[0] == 3.0 and eigenvalues.dtype == torch.float64
    assert (eigenvalues.diff() <= 0).all() and eigenvalues[-1] >= 3e-3
    # log-uniform: as many in each decade
    decades = torch.histc(torch.log10(eigenvalues[1:] / 3.0), 3, -3.0, 0.0)
    assert decades.min() > 280
    with pytest.raises(ValueError, match="span .*got 0"):
        study.spectrum(3.0, 10, 0.0, generator())


def test_a_quadratic_has_these_eigenvalues_and_starts_at_these_coordinates():
    eigenvalues, coordinates = vector(2.0, 1.0, 0.5), vector(1.0, -2.0, 3.0)
    loss, w, basis = study.quadratic(eigenvalues, coordinates, generator())
    dense = Hessian(loss, [w]) @ torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(dense, (basis * eigenvalues) @ basis.T)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ w.detach(), coordinates)
    assert loss().item() == pytest.approx(0.5 * float((eigenvalues * coordinates**2).sum()))
    assert not torch.allclose(basis.abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("norm", [1e-3, 1.0, 50.0])
def test_the_threshold_found_without_the_formula_is_the_formula(norm):
    gradient = norm * vector(0.6, 0.0, -0.8)
    found = study.threshold(LR, RHO, gradient, vector(1.0, 0.7, 0.01))
    assert found == pytest.approx(sam_edge(LR, RHO, norm), rel=1e-12)


@pytest.mark.parametrize("fraction", [0.4, 0.9])
def test_sam_settles_into_an_orbit_of_period_2_whose_edge_is_the_curvature(fraction):
    top = fraction * gd_edge(LR)
    loss, w, basis = study.quadratic(
        vector(top, 0.6 * top, 0.3 * top), vector(1.0, 2.0, -1.0), generator()
    )
    sam = SAM(torch.optim.SGD([w], lr=LR), RHO)
    for _ in range(300):
        sam.step(loss)
    here = w.detach().clone()
    sam.step(loss)
    torch.testing.assert_close(w.detach(), -here, rtol=1e-9, atol=1e-12)
    along = basis.T @ here
    assert abs(along[1:]).max() < 1e-9 * abs(along[0])
    assert top * abs(along[0].item()) == pytest.approx(study.orbit_norm(LR, RHO, top), rel=1e-9)


def test_equal_top_eigenvalues_leave_the_direction_open_and_the_length_the_same():
    loss, w, basis = study.quadratic(vector(2.0, 2.0, 0.5), vector(1.0, 3.0, 1.0), generator())
    sam = SAM(torch.optim.SGD([w], lr=LR), RHO)
    for _ in range(300):
        sam.step(loss)
    gradient = vector(2.0, 2.0, 0.5) * (basis.T @ w.detach())
    assert gradient.norm().item() == pytest.approx(study.orbit_norm(LR, RHO, 2.0), rel=1e-9)
    assert float(gradient[1] / gradient[0]) == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize(("fraction", "leaves"), [(0.99, False), (1.01, True)])
def test_above_two_over_lr_sam_leaves_as_gradient_descent_does(fraction, leaves):
    loss, w, _ = study.quadratic(vector(fraction * gd_edge(LR), 1.0), vector(1.0, 1.0), generator())
    sam = SAM(torch.optim.SGD([w], lr=LR), RHO)
    lengths = []
    for _ in range(2):
        for _ in range(800):
            sam.step(loss)
        lengths.append(w.detach().norm().item())
    assert (lengths[1] > 1e3 * lengths[0]) == leaves


# --- the studies ---------------------------------------------------------------------------------


def test_bisection_agrees_with_the_formula_for_random_directions():
    columns = study.bisection(TINY, LR, RHO, generator())
    assert columns["grad_norm"] == [0.01, 1.0]
    assert np.allclose(columns["formula"], [sam_edge(LR, RHO, norm) for norm in TINY.norms])
    assert np.abs(columns["error"]).max() < 1e-12


def test_on_a_quadratic_the_gradient_falls_to_the_orbit_and_the_curvature_stays():
    columns = study.settling(TINY, 0.5, generator())
    assert columns["step"][0] == 0 and columns["step"][-2:] == [119, 120]
    assert np.allclose(columns["sharpness"], 2.0, rtol=1e-12)
    assert columns["grad_norm"][0] > 10 * columns["orbit"][0]
    assert columns["grad_norm"][-1] == pytest.approx(columns["orbit"][0], rel=1e-3)
    assert columns["sam_edge"][0] > 3.5
    assert columns["sam_edge"][-1] == pytest.approx(2.0, rel=1e-3)


def test_beside_a_close_eigenvalue_the_direction_settles_at_the_predicted_rate():
    columns = study.pair(TINY, 0.2, generator())
    tangent = np.array(columns["tangent"])
    assert len(tangent) == 25
    assert tangent[-1] / tangent[-2] == pytest.approx(columns["rate"][0], rel=1e-6)
    assert columns["ratio"][-1] == pytest.approx(1, abs=1e-6)
    # between the orbits of the two eigenvalues, the ratio is off by less than the gap at once
    assert abs(columns["ratio"][0] - 1) < 0.2


def test_noise_moves_the_ratio_to_different_sides_of_the_noiseless_one():
    config = dataclasses.replace(TINY, dim=20, steps=600)
    quiet, even, loud = (
        {
            name: float(np.median(values))
            for name, values in study.noisy(config, noise, generator()).items()
        }
        for noise in (0.0, 1.0, 10.0)
    )
    assert quiet["batch"] == pytest.approx(1, abs=1e-4)
    assert quiet["full"] == quiet["batch"]
    assert even["batch"] < 0.98 < 1.05 < even["full"]
    assert max(loud["batch"], loud["full"]) < 0.9


# --- frozen networks -----------------------------------------------------------------------------


@pytest.fixture
def small():
    """A small network in float64 and its loss on random data."""
    model = models.mlp((4, 5, 3), "tanh", seed=0, dtype=torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64, generator=generator())
    target = torch.randn(12, 3, dtype=torch.float64, generator=generator(1))
    return model, x, target, lambda: F.mse_loss(model(x), target)


def moved(params, step):
    with torch.no_grad():
        for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            p += part.view_as(p)


def jacobian(model, x):
    rows = []
    for output in model(x).flatten():
        grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_the_linearised_network_is_the_network_plus_its_jacobian_times_the_step(small):
    model, x, _, _ = small
    params, outputs = study.linearised(model, x)
    size = sum(p.numel() for p in params)
    step = torch.randn(size, dtype=torch.float64, generator=generator(2))
    torch.testing.assert_close(outputs(), model(x))
    moved(params, step)
    expected = model(x) + (jacobian(model, x) @ step).view(12, 3)
    torch.testing.assert_close(outputs(), expected)


def test_its_squared_error_is_a_quadratic_with_the_gauss_newton_matrix_everywhere(small):
    model, x, target, loss = small
    params, outputs = study.linearised(model, x)
    H = Hessian(lambda: F.mse_loss(outputs(), target), params)
    J = jacobian(model, x)
    gauss_newton = 2 / 36 * J.T @ J
    identity = torch.eye(H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(H.gradient(), Hessian(loss, model.parameters()).gradient())
    for _ in range(2):
        torch.testing.assert_close(H @ identity, gauss_newton)
        moved(params, torch.ones(H.shape[0], dtype=torch.float64))


def test_the_taylor_model_has_the_loss_gradient_and_hessian_of_the_point_it_was_made_at(small):
    model, _, _, loss = small
    true = Hessian(loss, model.parameters())
    identity = torch.eye(true.shape[0], dtype=torch.float64)
    dense, gradient = true @ identity, true.gradient()
    params, taylor = study.taylor(loss, list(model.parameters()))
    H = Hessian(taylor, params)
    assert H.loss() == pytest.approx(true.loss(), rel=1e-12)
    torch.testing.assert_close(H.gradient(), gradient)
    step = torch.randn(true.shape[0], dtype=torch.float64, generator=generator(2))
    moved(params, step)
    expected = true.loss() + float(gradient @ step + 0.5 * step @ dense @ step)
    assert H.loss() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(H.gradient(), gradient + dense @ step)
    torch.testing.assert_close(H @ identity, dense)


def test_frozen_models_leave_the_network_alone(small):
    model, x, target, loss = small
    before = [p.detach().clone() for p in model.parameters()]
    params, outputs = study.linearised(model, x)
    others, taylor = study.taylor(loss, list(model.parameters()))
    for weights, closure in ((params, lambda: F.mse_loss(outputs(), target)), (others, taylor)):
        SAM(torch.optim.SGD(weights, lr=0.1), 0.1).step(closure)
        assert any(not torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b) and a.grad is None


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
    starts = {path: study.frozen(config, path) for path in ("living", "linearised", "taylor")}
    for name in ("loss", "grad_norm", "sam_edge"):
        values = [columns[name][0] for columns in starts.values()]
        assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    with pytest.raises(ValueError, match="path .*'dead'"):
        study.frozen(config, "dead")


# --- the experiment ------------------------------------------------------------------------------


def test_a_small_run_measures_everything_that_its_claims_need():
    pytest.importorskip("sklearn")
    result = experiments.run(study.EXPERIMENT, TINY, seeds=3, device="cpu", progress=False)
    assert len(result.runs) == 3 * len(study.settings(TINY))
    assert [len(claim.values) for claim in result.claims] == [3] * len(study.EXPERIMENT.claims)
    assert all(math.isfinite(v) for claim in result.claims for v in claim.values)
    found = {claim.id: claim.verdict for claim in result.claims}
    exact = ("edge by brute force", "curvature is constant", "close eigenvalues settle slowly")
    assert {found[name] for name in exact} == {"reproduced"}


def test_a_seed_repeats_its_run_and_another_one_changes_it():
    pytest.importorskip("sklearn")
    for setting in study.settings(TINY):
        first, again, other = (study.run(TINY, setting, seed, "cpu") for seed in (0, 0, 1))
        assert first == again
        # the threshold is the same for all directions of the gradient and all spectra
        assert setting["study"] == "bisection" or first != other


def made_up(hover=1.0, frozen=1.0, moved=1.0, error=0.0, align=0.3, norm=1.0, full=1.3):
    """A result in which everything is as claimed, unless told otherwise."""
    config, runs = dataclasses.asdict(study.LAPTOP), []
    n = 20
    for seed in range(3):
        for setting in study.settings(study.LAPTOP):
            columns = {}
            if setting["study"] == "bisection":
                columns = {"error": [0.0, error]}
            elif setting["study"] == "spectrum":
                ratio = np.array([0.5, 0.8, 1.3, *[1.0] * (n - 5), hover, hover])
                columns = {
                    "step": np.arange(n),
                    "sharpness": np.linspace(1, moved, n) * 2.0,
                    "sam_edge": np.linspace(1, moved, n) * 2.0 / ratio,
                    "grad_norm": np.full(n, norm),
                    "grad_align": np.linspace(0.1, 1, n),
                    "orbit": [1.0],
                }
            elif setting["study"] == "pair":
                columns = {"tangent": 0.9 ** np.arange(n), "rate": [0.9]}
            elif setting["study"] == "noise":
                batch = {0.1: 1.0, 1.0: 0.95, 10.0: 0.6}[setting["noise"]]
                columns = {"batch": [batch], "full": [full * batch]}
            else:
                living = setting["path"] == "living"
                sharpness = np.linspace(2, 1, n) if living else np.full(n, 2.0)
                # the second-order model leaves its edge once its loss has fallen below 0
                floor = np.where(np.arange(n) < 12, 1.0, -1.0)
                left = (setting["path"] == "taylor") & (floor < 0)
                columns = {
                    "loss": floor if setting["path"] == "taylor" else np.ones(n),
                    "sharpness": sharpness,
                    "sam_edge": sharpness / np.where(left, 0.1, 1.05 if living else frozen),
                    "grad_align": np.full(n, align if living else 0.99),
                }
            runs.append(Run(setting, seed, columns))
    return Result("sam_on_quadratics", "laptop", config, runs, [], {})


def verdicts(result):
    return {verdict.id: verdict.verdict for verdict in study.EXPERIMENT.judge(result)}


def test_the_claims_hold_on_runs_made_to_hold_them():
    assert set(verdicts(made_up()).values()) == {"reproduced"}


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
    found = verdicts(made_up(**change))
    assert falls == {name for name, verdict in found.items() if verdict == "not reproduced"}


def test_a_ratio_that_never_settles_is_no_value_but_a_reason():
    claims = {verdict.id: verdict for verdict in study.EXPERIMENT.judge(made_up(hover=1.5))}
    assert claims["ratio before orbit"].verdict == "inconclusive"
    assert "+0.5 away from 1" in claims["ratio before orbit"].reason
