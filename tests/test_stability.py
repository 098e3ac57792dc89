"""Edges of stability against simulation, the textbook formula and bisection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sam_lab import gd_edge, heavy_ball_edge, sam_edge

positive = st.floats(1e-3, 1e3)


def textbook(lr, rho, norm):
    return norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * norm)) - 1)


def heavy_ball_grows(curvature, lr, momentum, steps=4000):
    """Whether heavy-ball on the quadratic with this curvature leaves for infinity."""
    w, v = 1.0, 0.0
    for _ in range(steps):
        v = momentum * v + curvature * w
        w = w - lr * v
        if abs(w) > 1e6:
            return True
    return False


@given(positive)
def test_gradient_descent_flips_the_gradient_at_its_edge(lr):
    assert 1 - lr * gd_edge(lr) == pytest.approx(-1)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_heavy_ball_stays_below_its_edge_and_leaves_above_it(lr, momentum):
    edge = heavy_ball_edge(lr, momentum)
    assert not heavy_ball_grows(0.99 * edge, lr, momentum)
    assert heavy_ball_grows(1.01 * edge, lr, momentum)


def test_heavy_ball_agrees_with_torch_sgd():
    lr, momentum = 0.1, 0.9
    for factor, grows in ((0.99, False), (1.01, True)):
        curvature = factor * heavy_ball_edge(lr, momentum)
        w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
        for _ in range(1500):
            optimizer.zero_grad()
            (curvature / 2 * w**2).sum().backward()
            optimizer.step()
        assert (abs(w.item()) > 1) == grows


@given(positive)
def test_no_momentum_is_gradient_descent(lr):
    assert heavy_ball_edge(lr, 0.0) == gd_edge(lr)


@given(positive, positive, positive)
def test_sam_edge_is_the_textbook_formula(lr, rho, norm):
    # the textbook form loses digits when 8 rho / (lr |g|) is small: hence the tolerance
    lost = 1e-15 * (lr * norm / rho)
    assert sam_edge(lr, rho, norm) == pytest.approx(textbook(lr, rho, norm), rel=1e-9 + lost)


@given(positive, positive, positive)
def test_sam_edge_is_where_the_recursion_flips_the_gradient(lr, rho, norm):
    """On a quadratic SAM multiplies the gradient by 1 - lr lam (1 + rho lam / |g|)."""
    low, high = 0.0, 2 / lr
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - lr * middle * (1 + rho * middle / norm) > -1:
            low = middle
        else:
            high = middle
    assert sam_edge(lr, rho, norm) == pytest.approx(low, rel=1e-9)


@given(positive, st.floats(0, 1e3), st.floats(0, 1e3))
def test_sam_edge_lies_between_zero_and_the_edge_of_gradient_descent(lr, rho, norm):
    assert 0 <= sam_edge(lr, rho, norm) <= gd_edge(lr)


@pytest.mark.parametrize("kind", [float, np.array, torch.tensor])
def test_limits_of_the_sam_edge(kind):
    def edge(rho, norm):
        return float(sam_edge(0.5, rho, kind(norm)))

    assert edge(0.0, 1.0) == 4.0
    assert edge(0.0, 0.0) == 4.0
    assert edge(0.1, 0.0) == 0.0
    assert edge(0.1, math.inf) == 4.0
    assert math.isnan(edge(0.1, math.nan))


def test_small_rho_keeps_its_digits():
    """To first order the edge is 2/lr - 4 rho / (lr^2 |g|); the textbook form returns noise."""
    lr, rho, norm = 0.5, 1e-12, 1.0
    assert 2 / lr - sam_edge(lr, rho, norm) == pytest.approx(4 * rho / lr**2, rel=1e-3)


def test_a_tiny_gradient_overflows_into_the_limit():
    assert sam_edge(0.5, 1.0, 5e-324) == pytest.approx(0, abs=1e-100)
    assert sam_edge(0.5, 1.0, np.array([5e-324]))[0] == pytest.approx(0, abs=1e-100)


def test_types_shapes_and_dtypes_follow_the_arguments():
    assert isinstance(sam_edge(1, 0, 1), float)
    norms = np.array([0.0, 1.0, 4.0], dtype=np.float32)
    curve = sam_edge(0.5, 0.1, norms)
    assert isinstance(curve, np.ndarray) and curve.dtype == np.float32
    np.testing.assert_allclose(curve, [sam_edge(0.5, 0.1, float(n)) for n in norms], rtol=1e-6)
    grid = sam_edge(torch.tensor([[0.5], [1.0]]), 0.1, torch.tensor(norms))
    assert grid.shape == (2, 3) and grid.dtype == torch.float32
    assert sam_edge(0.5, norms, torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64
    assert gd_edge(torch.tensor([1, 2])).tolist() == [2.0, 1.0]
    np.testing.assert_array_equal(heavy_ball_edge(0.5, np.array([0.0, 0.5])), [4.0, 6.0])
    assert heavy_ball_edge(torch.tensor([0.5]), 0.5).tolist() == [6.0]


def test_derivatives_are_those_of_the_formula_and_finite_at_the_limits():
    arguments = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.1, 2.0)]
    assert torch.autograd.gradcheck(sam_edge, arguments)
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    momentum = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(heavy_ball_edge, [lr, momentum])
    norm = torch.tensor([0.0, 1.0], requires_grad=True)
    for rho in (0.0, 0.1):
        (slope,) = torch.autograd.grad(sam_edge(0.5, rho, norm).sum(), norm)
        assert torch.isfinite(slope).all() and slope[0] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gd_edge(0.0), ValueError, "lr must be finite, above 0; got 0"),
        (lambda: gd_edge(math.inf), ValueError, "lr must be finite, above 0; got inf"),
        (lambda: gd_edge(np.array([0.1, -1.0])), ValueError, "lr .*got -1"),
        (lambda: gd_edge(torch.tensor([0.1, math.nan])), ValueError, "lr .*got nan"),
        (lambda: gd_edge("0.1"), TypeError, "lr must be a real number.*str"),
        (lambda: gd_edge(True), TypeError, "lr must be a real number.*bool"),
        (lambda: gd_edge(torch.tensor([True])), TypeError, "lr .*torch.bool"),
        (lambda: gd_edge(np.array([1j])), TypeError, "lr .*complex128"),
        (lambda: gd_edge([0.1]), TypeError, "lr .*list"),
        (lambda: heavy_ball_edge(0.1, 1.0), ValueError, "momentum .* at least 0 and below 1"),
        (lambda: heavy_ball_edge(0.1, -0.1), ValueError, "momentum .*got -0.1"),
        (lambda: sam_edge(0.1, -1e-9, 1.0), ValueError, "rho must be finite, at least 0"),
        (lambda: sam_edge(0.1, math.inf, 1.0), ValueError, "rho .*got inf"),
        (lambda: sam_edge(0.1, 0.1, -1.0), ValueError, "grad_norm must be at least 0; got -1"),
    ],
)
def test_bad_input_names_argument_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
