"""Edges of stability against brute force by torch and SAM, limits and the textbook formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sam_lab import SAM, gd_edge, heavy_ball_edge, sam_edge
from sam_lab.perturbations import unnormalized

positive = st.floats(1e-3, 1e3)
more = st.floats(1.01, 100)
GRID = [(0.5, 0.1, 1.0), (0.5, 0.1, 1e-4), (0.02, 1.0, 3.0), (2.0, 0.01, 0.05)]  # lr, rho, |g|


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


@given(positive, positive, positive)
def test_for_small_rho_or_large_gradients_the_sam_edge_tends_to_that_of_gradient_descent(
    lr, rho, norm
):
    below = gd_edge(lr) - sam_edge(lr, rho, norm)
    assert -1e-15 * gd_edge(lr) <= below <= 4 * rho / (lr**2 * norm) + 1e-15 * gd_edge(lr)


@given(positive, positive, positive)
def test_for_small_gradients_the_sam_edge_tends_to_a_square_root(lr, rho, norm):
    """a = sqrt(2 |g| / (lr rho)), to first order less b = |g| / (2 rho), to second plus b²/2a."""
    a, b = math.sqrt(2 * norm / (lr * rho)), norm / (2 * rho)
    rest = sam_edge(lr, rho, norm) - (a - b)
    rounding = 1e-15 * (a + b)
    assert -rounding <= rest <= b**2 / (2 * a) + rounding


@given(positive, positive, positive, more)
def test_the_sam_edge_falls_as_the_gradient_falls_and_as_rho_or_lr_grows(lr, rho, norm, factor):
    edge = sam_edge(lr, rho, norm)
    assert sam_edge(lr, rho, norm / factor) < edge
    assert sam_edge(lr, rho * factor, norm) < edge
    assert sam_edge(lr * factor, rho, norm) < edge


@given(positive, positive, positive, positive)
def test_units_of_the_weights_and_of_the_loss_scale_the_sam_edge(lr, rho, norm, c):
    edge = sam_edge(lr, rho, norm)
    # only the ratio of rho and |g| counts
    assert sam_edge(lr, c * rho, c * norm) == pytest.approx(edge, rel=1e-12)
    # weights in units c times smaller: w and rho are c times as long, g is c times shorter
    assert sam_edge(c**2 * lr, c * rho, norm / c) == pytest.approx(edge / c**2, rel=1e-12)
    # a loss c times as large, with the learning rate that undoes it
    assert sam_edge(lr / c, rho, c * norm) == pytest.approx(c * edge, rel=1e-12)


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


# --- the SAM edge by brute force: real steps of sam_lab.SAM on quadratics ------------------------


def bisect(grows, high):
    """The number between 0 and `high` where `grows` turns from False to True, to the last digit."""
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if grows(middle) else (middle, high)
    return high


def weights(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("lr", "rho", "norm"), GRID)
def test_in_one_dimension_sam_lengthens_the_gradient_above_its_edge_and_shortens_it_below(
    lr, rho, norm
):
    def grows(curvature, steps=10):
        w = weights(norm / curvature)
        sam = SAM(torch.optim.SGD([w], lr=lr), rho)
        for _ in range(steps):
            sam.step(lambda: 0.5 * curvature * w.square().sum())
        return curvature * abs(w.item()) >= norm

    edge = sam_edge(lr, rho, norm)
    assert not grows(0.9 * edge) and grows(1.1 * edge)
    assert bisect(grows, high=4 / lr) == pytest.approx(edge, rel=1e-9)


@pytest.mark.parametrize(("lr", "rho", "norm"), GRID)
def test_in_many_dimensions_the_norm_of_the_whole_gradient_decides_for_each_component(
    lr, rho, norm
):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    gradient = torch.randn(6, generator=generator, dtype=torch.float64)
    gradient *= norm / gradient.norm()
    shares = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.01, 2.0], dtype=torch.float64)

    def grows(curvature):
        H = (basis * (curvature * shares)) @ basis.T
        w = (basis @ (gradient / (curvature * shares))).requires_grad_()
        sam = SAM(torch.optim.SGD([w], lr=lr), rho)
        sam.step(lambda: 0.5 * w @ (H @ w))
        return bool(abs(basis[:, 0] @ (H @ w)) >= abs(gradient[0]))

    assert bisect(grows, high=4 / lr) == pytest.approx(sam_edge(lr, rho, norm), rel=1e-9)


@pytest.mark.parametrize("norm", [0.01, 1.0])
@pytest.mark.parametrize(("lr", "rho"), [(0.5, 0.1), (0.02, 3.0)])
def test_unnormalized_sam_has_the_edge_of_a_gradient_of_length_one_whatever_its_length(
    lr, rho, norm
):
    """It multiplies the gradient by 1 - lr lam (1 + rho lam)."""

    def grows(curvature):
        w = weights(norm / curvature)
        sam = SAM(torch.optim.SGD([w], lr=lr), rho, rule=unnormalized)
        for _ in range(3):
            sam.step(lambda: 0.5 * curvature * w.square().sum())
        return curvature * abs(w.item()) >= norm

    assert bisect(grows, high=4 / lr) == pytest.approx(sam_edge(lr, rho, 1.0), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("lr", "rho", "norm"), GRID)
def test_with_momentum_the_step_flips_at_the_sam_edge_of_lr_over_one_plus_m(
    lr, rho, norm, momentum
):
    """|g| is held at `norm`: rho / |g| is, which makes the map of (weight, velocity) linear."""

    def image(curvature, w0, velocity):
        w = weights(w0)
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
        optimizer.state[w]["momentum_buffer"] = weights(velocity).detach()
        sam = SAM(optimizer, rho=lambda step: rho * curvature * abs(w0) / norm)
        sam.step(lambda: 0.5 * curvature * w.square().sum())
        if momentum == 0:
            return w.item(), 0.0
        return w.item(), optimizer.state[w]["momentum_buffer"].item()

    def flips(curvature):
        (a, c), (b, d) = image(curvature, 1.0, 0.0), image(curvature, 0.0, 1.0)
        return (a + 1) * (d + 1) - b * c <= 0  # det(M + I): an eigenvalue has passed -1

    edge = sam_edge(lr / (1 + momentum), rho, norm)
    assert bisect(flips, high=8 / lr) == pytest.approx(edge, rel=1e-9)


def with_momentum(curvature, lr, rho, momentum, start, velocity, steps=1500):
    """The last eight weights of SAM around heavy-ball."""
    w = weights(start)
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    optimizer.state[w]["momentum_buffer"] = weights(velocity).detach()
    sam = SAM(optimizer, rho, same_rng=False)
    path = []
    for _ in range(steps):
        sam.step(lambda: 0.5 * curvature * w.square().sum())
        path.append(w.item())
    return np.array(path[-8:])


@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_with_momentum_sam_near_its_orbit_of_period_2_settles_exactly_at_that_edge(momentum):
    lr, rho, curvature, start = 0.5, 0.1, 1.5, 0.03
    path = with_momentum(curvature, lr, rho, momentum, start, -2 * start / lr)
    np.testing.assert_allclose(path[1:], -path[:-1], rtol=1e-9)
    norm = curvature * abs(path[-1])
    assert sam_edge(lr / (1 + momentum), rho, norm) == pytest.approx(curvature, rel=1e-9)


def test_with_much_momentum_sam_can_settle_below_its_edge_in_an_orbit_of_period_4():
    """What momentum adds: the orbit of period 2 is stable still, but no longer the only one."""
    lr, rho, momentum, curvature = 0.5, 0.1, 0.9, 1.5
    a, b = rho * curvature * lr / (1 + momentum**2) * np.array([1.0, momentum])
    path = with_momentum(curvature, lr, rho, momentum, a, (a + b) / lr)
    np.testing.assert_allclose(path[4:], path[:4], rtol=1e-9)
    np.testing.assert_allclose(path[2:], -path[:-2], rtol=1e-9)
    assert curvature < 0.9 * sam_edge(lr / (1 + momentum), rho, curvature * abs(path).min())


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
