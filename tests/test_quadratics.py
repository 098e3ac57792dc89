"""Losses of fixed curvature: closed forms of what SAM does on them, and frozen networks."""

import pytest
import torch
from torch.nn import functional as F

from sam_lab import SAM, Hessian, gd_edge, models, sam_edge
from sam_lab.experiments.sam import quadratics

LR, RHO = 0.5, 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the theory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [0.1, 1.0, 3.9])
def test_on_the_orbit_the_curvature_is_the_sam_edge_and_a_step_flips_the_gradient(curvature):
    norm = quadratics.orbit_norm(LR, RHO, curvature)
    assert sam_edge(LR, RHO, norm) == pytest.approx(curvature, rel=1e-12)
    assert quadratics.multiplier(LR, RHO, curvature, norm) == pytest.approx(-1, rel=1e-12)


@pytest.mark.parametrize("curvature", [4.0, 5.0, 0.0, -1.0])
def test_there_is_no_orbit_outside_zero_to_two_over_lr(curvature):
    with pytest.raises(ValueError, match="between 0 and 2/lr = 4"):
        quadratics.orbit_norm(LR, RHO, curvature)


def test_the_multiplier_is_what_a_step_does_to_each_component():
    eigenvalues, gradient = vector(3.0, 1.0, 0.2), vector(0.3, -0.2, 0.1)
    w = (gradient / eigenvalues).requires_grad_()
    SAM(torch.optim.SGD([w], lr=LR), RHO).step(lambda: 0.5 * (eigenvalues * w * w).sum())
    for curvature, before, after in zip(eigenvalues, gradient, w.detach(), strict=True):
        expected = quadratics.multiplier(LR, RHO, float(curvature), float(gradient.norm()))
        assert float(curvature * after / before) == pytest.approx(expected, rel=1e-12)


# --- quadratics ----------------------------------------------------------------------------------


def test_a_spectrum_has_its_top_and_the_rest_within_its_span():
    eigenvalues = quadratics.spectrum(3.0, 1000, 1e-3, generator())
    assert eigenvalues[0] == 3.0 and eigenvalues.dtype == torch.float64
    assert (eigenvalues.diff() <= 0).all() and eigenvalues[-1] >= 3e-3
    # log-uniform: as many in each decade
    decades = torch.histc(torch.log10(eigenvalues[1:] / 3.0), 3, -3.0, 0.0)
    assert decades.min() > 280
    with pytest.raises(ValueError, match="span .*got 0"):
        quadratics.spectrum(3.0, 10, 0.0, generator())


def test_a_quadratic_has_these_eigenvalues_and_starts_at_these_coordinates():
    eigenvalues, coordinates = vector(2.0, 1.0, 0.5), vector(1.0, -2.0, 3.0)
    loss, w, basis = quadratics.quadratic(eigenvalues, coordinates, generator())
    dense = Hessian(loss, [w]) @ torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(dense, (basis * eigenvalues) @ basis.T)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ w.detach(), coordinates)
    assert loss().item() == pytest.approx(0.5 * float((eigenvalues * coordinates**2).sum()))
    assert not torch.allclose(basis.abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("fraction", [0.4, 0.9])
def test_sam_settles_into_an_orbit_of_period_2_whose_edge_is_the_curvature(fraction):
    top = fraction * gd_edge(LR)
    loss, w, basis = quadratics.quadratic(
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
    assert top * abs(along[0].item()) == pytest.approx(
        quadratics.orbit_norm(LR, RHO, top), rel=1e-9
    )


def test_equal_top_eigenvalues_leave_the_direction_open_and_the_length_the_same():
    loss, w, basis = quadratics.quadratic(vector(2.0, 2.0, 0.5), vector(1.0, 3.0, 1.0), generator())
    sam = SAM(torch.optim.SGD([w], lr=LR), RHO)
    for _ in range(300):
        sam.step(loss)
    gradient = vector(2.0, 2.0, 0.5) * (basis.T @ w.detach())
    assert gradient.norm().item() == pytest.approx(quadratics.orbit_norm(LR, RHO, 2.0), rel=1e-9)
    assert float(gradient[1] / gradient[0]) == pytest.approx(3.0, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "leaves"), [(0.99, False), (1.01, True)])
def test_above_two_over_lr_sam_leaves_as_gradient_descent_does(fraction, leaves):
    loss, w, _ = quadratics.quadratic(
        vector(fraction * gd_edge(LR), 1.0), vector(1.0, 1.0), generator()
    )
    sam = SAM(torch.optim.SGD([w], lr=LR), RHO)
    lengths = []
    for _ in range(2):
        for _ in range(800):
            sam.step(loss)
        lengths.append(w.detach().norm().item())
    assert (lengths[1] > 1e3 * lengths[0]) == leaves


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
    params, outputs = quadratics.linearised(model, x)
    size = sum(p.numel() for p in params)
    step = torch.randn(size, dtype=torch.float64, generator=generator(2))
    torch.testing.assert_close(outputs(), model(x))
    moved(params, step)
    expected = model(x) + (jacobian(model, x) @ step).view(12, 3)
    torch.testing.assert_close(outputs(), expected)


def test_its_squared_error_is_a_quadratic_with_the_gauss_newton_matrix_everywhere(small):
    model, x, target, loss = small
    params, outputs = quadratics.linearised(model, x)
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
    params, taylor = quadratics.taylor(loss, list(model.parameters()))
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
    params, outputs = quadratics.linearised(model, x)
    others, taylor = quadratics.taylor(loss, list(model.parameters()))
    for weights, closure in ((params, lambda: F.mse_loss(outputs(), target)), (others, taylor)):
        SAM(torch.optim.SGD(weights, lr=0.1), 0.1).step(closure)
        assert any(not torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b) and a.grad is None
