"""Central flows against closed forms, finite differences, and the optimizers themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_lab import models
from sam_lab.flows import (
    CentralFlow,
    averaged,
    bounce,
    covariance,
    gd_variance,
    norm_at_edge,
    sam_variance,
    slopes,
)
from sam_lab.sam import SAM
from sam_lab.stability import gd_edge, sam_edge


def weights(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# --- one direction -------------------------------------------------------------------------------


@given(st.floats(0.01, 10), st.floats(1e-3, 10), st.floats(0.01, 0.99))
def test_the_norm_at_the_edge_undoes_sams_edge(lr, rho, share):
    sharpness = share * gd_edge(lr)
    norm = norm_at_edge(lr, rho, sharpness)
    assert sam_edge(lr, rho, norm) == pytest.approx(sharpness, rel=1e-9)


def test_at_two_over_lr_no_gradient_is_large_enough():
    with pytest.raises(ValueError, match=r"below 2 / lr = 4, .* got 4"):
        norm_at_edge(0.5, 0.1, 4.0)


def test_the_bounce_of_gradient_descent_holds_the_sharpness():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(5, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, generator=generator, dtype=torch.float64)
    gradient = gradient * -torch.sign(gradient @ slope)  # descent makes it sharper
    mean = gradient + gd_variance(gradient, slope) / 2 * slope
    assert float(mean @ slope) == pytest.approx(0, abs=1e-12)
    assert gd_variance(-gradient, slope) == 0, "descent makes it flatter: nothing bounces"


def test_a_slope_of_zero_holds_nothing():
    with pytest.raises(ValueError, match=r"slope not be zero; got \(2,\) and \(2,\)"):
        gd_variance(torch.ones(2), torch.zeros(2))


@given(
    st.floats(0.05, 1),
    st.floats(0.01, 1),
    st.floats(0.1, 0.95),
    st.floats(0, 2),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_the_bounce_of_sam_is_at_sams_edge(lr, rho, share, size, slope):
    sharpness = share * gd_edge(lr)
    norm = norm_at_edge(lr, rho, sharpness)
    gradient = torch.tensor([size * norm, 0.0], dtype=torch.float64)
    slope = torch.tensor(slope, dtype=torch.float64)
    variance = sam_variance(lr, rho, sharpness, gradient, slope)
    if size >= 1:
        assert variance == 0
    else:
        mean = gradient + variance / 2 * slope
        there = float(mean @ mean) + sharpness**2 * variance
        assert there == pytest.approx(norm**2, rel=1e-9)


# --- third derivatives ---------------------------------------------------------------------------


def small_network(activation="tanh"):
    model = models.mlp((3, 4, 2), activation, init="glorot", seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return model, lambda: (model(x) - y).square().sum(1).mean() / 2


def dense_hessian(model, closure, at):
    """The Hessian by torch's own double differentiation."""
    params = list(model.parameters())
    torch.nn.utils.vector_to_parameters(at, params)
    gradient = torch.autograd.grad(closure(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = []
    for entry in flat:
        pieces = torch.autograd.grad(entry, params, retain_graph=True)
        rows.append(torch.cat([piece.reshape(-1) for piece in pieces]))
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_slopes_are_what_finite_differences_of_the_hessian_give(activation):
    model, closure = small_network(activation)
    at = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(len(at), 2, generator=generator, dtype=torch.float64)
    found = slopes(closure, model.parameters(), basis)
    assert torch.equal(found[0, 1], found[1, 0])
    h = 1e-4
    for _ in range(3):
        way = torch.randn(len(at), generator=generator, dtype=torch.float64)
        ahead, behind = (dense_hessian(model, closure, at + sign * h * way) for sign in (1, -1))
        expected = basis.T @ (ahead - behind) @ basis / (2 * h)
        torch.testing.assert_close(found @ way, expected, rtol=1e-6, atol=1e-8)


def test_the_slope_of_a_lone_eigenvalue_is_its_gradient():
    def hessian(u, v):
        cross = 2 * u * v - 1
        return torch.tensor([[v * v, cross], [cross, u * u]], dtype=torch.float64)

    def top(u, v):
        return float(torch.linalg.eigvalsh(hessian(u, v))[-1])

    w = weights(1.2, 0.7)
    vector = torch.linalg.eigh(hessian(1.2, 0.7))[1][:, -1:]
    found = slopes(lambda: 0.5 * (w[0] * w[1] - 1) ** 2, [w], vector)[0, 0]
    h = 1e-4
    expected = [
        (top(1.2 + h, 0.7) - top(1.2 - h, 0.7)) / (2 * h),
        (top(1.2, 0.7 + h) - top(1.2, 0.7 - h)) / (2 * h),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_slopes_need_a_row_a_parameter():
    w = weights(1.0, 2.0)
    with pytest.raises(ValueError, match=r"shape \(2, k\), one row a parameter; got \(3, 1\)"):
        slopes(lambda: w.square().sum(), [w], torch.ones(3, 1).double())


# --- several directions --------------------------------------------------------------------------


def random_program(seed, k):
    """A pull and a push whose slopes are in general position."""
    rng = np.random.default_rng(seed)
    pull = rng.normal(size=(k, k))
    slope = rng.normal(size=(k, k, 8))
    slope = slope + slope.transpose(1, 0, 2)
    return (pull + pull.T) / 2, np.einsum("ijp,klp->ijkl", slope, slope)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([None, 0.01, 0.3, 5.0]))
def test_the_covariance_is_complementary(seed, k, trace):
    pull, push = random_program(seed, k)
    x = covariance(pull, push, trace)
    after = pull - np.einsum("ijkl,kl->ij", push, x)
    s = 0.0 if trace is None else float((after * x).sum() / np.trace(x))
    assert np.linalg.eigvalsh(x)[0] >= -1e-9
    assert np.linalg.eigvalsh(s * np.eye(k) - after)[0] >= -1e-5
    assert np.abs((s * np.eye(k) - after) @ x).max() <= 1e-5
    if trace is not None:
        assert np.trace(x) == pytest.approx(trace)


def test_without_a_coupling_the_covariance_levels_the_eigenvalues():
    # eigenvalues 3, 2 and 0; a bounce of X_ii takes X_ii off each. A trace of 3 levels the first
    # two at 1, and leaves the third alone.
    push = np.einsum("ik,jl->ijkl", np.eye(3), np.eye(3))
    x = covariance(np.diag([3.0, 2.0, 0.0]), push, 3.0)
    assert x == pytest.approx(np.diag([2.0, 1.0, 0.0]), abs=1e-6)
    assert covariance(np.diag([3.0, -2.0, 0.0]), push) == pytest.approx(np.diag([3.0, 0, 0]))


def test_a_bounce_that_pushes_nothing_is_along_the_highest():
    pull, push = np.diag([1.0, 2.0]), np.zeros((2, 2, 2, 2))
    assert covariance(pull, push, 0.5) == pytest.approx(np.diag([0.0, 0.5]))
    with pytest.raises(ValueError, match="push is zero"):
        covariance(pull, push)


def test_shapes_of_a_program_are_checked():
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 2\)"):
        covariance(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match="trace must be at least 0 or None, got -1"):
        covariance(np.eye(1), np.ones((1, 1, 1, 1)), -1.0)


# --- the flow ------------------------------------------------------------------------------------


def on_the_hyperbola(q):
    """u and v with u v = 1 and u² - v² = q."""
    s = math.sqrt(q * q + 4)
    return weights(math.sqrt((s + q) / 2), math.sqrt((s - q) / 2))


def test_sam_slides_along_the_hyperbola_at_the_exact_rate():
    # log q falls by 8 lr rho² / (2 - lr s)² a step, an identity of SAM's own steps
    lr, rho, q = 0.2, 0.05, 3.0
    w = on_the_hyperbola(q)
    flow = CentralFlow(lambda: 0.5 * (w[0] * w[1] - 1) ** 2, [w], lr, rho, substeps=2)
    for _ in range(10):
        flow.step(10)
    for _ in range(100):
        q *= math.exp(-8 * lr * rho**2 / (2 - lr * math.sqrt(q * q + 4)) ** 2)
    moved = float(w[0].detach() ** 2 - w[1].detach() ** 2)
    assert math.log(moved / 3) == pytest.approx(math.log(q / 3), rel=0.01)


def test_gradient_descent_stays_where_it_fits():
    w = on_the_hyperbola(3.0)
    before = w.detach().clone()
    flow = CentralFlow(lambda: 0.5 * (w[0] * w[1] - 1) ** 2, [w], 0.2)
    flow.step(20)
    torch.testing.assert_close(w.detach(), before, rtol=0, atol=1e-12)


def valley(w, s0, b, a, k=0.0):
    """A valley along y, whose curvature s0 + b y grows in the direction a in which it falls."""
    return 0.5 * (s0 + b * w[1]) * w[0] ** 2 - a * w[1] + 0.5 * k * w[1] ** 2


def test_gradient_descent_is_held_at_two_over_lr():
    lr, b, a = 0.5, 0.5, 0.02
    w = weights(0.0, 5.9)
    flow = CentralFlow(lambda: valley(w, 1.0, b, a), [w], lr)
    flow.step(5)
    assert flow.read().covariance.tolist() == [[0.0]], "below the edge nothing bounces"
    for _ in range(30):
        flow.step(1)
    point = flow.read()
    assert point.sharpness == pytest.approx(gd_edge(lr), rel=1e-3)
    assert float(point.covariance[0, 0]) == pytest.approx(2 * a / b, rel=1e-3)
    assert point.mean_loss - point.loss == pytest.approx(gd_edge(lr) * a / b, rel=1e-3)


def sam_path(loss, start, lr, rho, steps):
    w = weights(*start)
    sam = SAM(torch.optim.SGD([w], lr=lr), rho)
    path = [w.detach().clone()]
    for _ in range(steps):
        sam.step(lambda: loss(w))
        path.append(w.detach().clone())
    return torch.stack(path)


@pytest.mark.slow
def test_the_flow_ends_where_sam_does():
    lr, rho, s0, b, a, steps = 0.5, 0.1, 2.5, 0.5, 0.02, 600
    path = sam_path(lambda w: valley(w, s0, b, a), (1e-3, 0.0), lr, rho, steps)
    ends = []
    for bounces in (True, False):
        w = weights(0.0, 0.0)
        flow = CentralFlow(
            lambda w=w: valley(w, s0, b, a), [w], lr, rho, bounce=bounces, substeps=2
        )
        for _ in range(steps // 20):
            flow.step(20)
        ends.append(float(w[1].detach()))
        if bounces:
            amplitude = flow.read().bounce
    there = float(averaged(path)[-1, 1])
    assert ends[0] == pytest.approx(there, rel=0.03)
    assert ends[1] > 1.5 * there, "without the bounce it goes further"
    across = torch.eye(2, dtype=torch.float64)[:, :1]
    assert amplitude == pytest.approx(float(bounce(path, across)[-1]), rel=0.02)


def test_near_two_over_lr_the_steps_are_cut():
    ends = []
    for substeps in (1, 32):
        w = weights(0.0, 0.0)
        flow = CentralFlow(lambda w=w: valley(w, 3.95, 2.0, 0.0), [w], 0.5, 0.3, substeps=substeps)
        flow.step()
        ends.append(float(w[1].detach()))
    assert ends[1] < -0.6, "the curvature falls by a third in one step"
    assert ends[0] == pytest.approx(ends[1], rel=0.2)


def test_two_tied_valleys_share_the_bounce_so_that_they_stay_tied():
    lr, rho, b = 0.5, 0.05, (1.0, 0.5)

    def loss(w):
        s = [2.5 + b[i] * w[2 + i] for i in range(2)]
        return 0.5 * sum(s[i] * w[i] ** 2 for i in range(2))

    w = weights(0.0, 0.0, 0.0, 0.0)
    flow = CentralFlow(lambda: loss(w), [w], lr, rho, k=2)
    for _ in range(10):
        flow.step(3)
    point = flow.read()
    assert point.values[1] == pytest.approx(point.values[0], rel=2e-3)
    assert point.sharpness < 2.48, "both have fallen from 2.5"
    # the curvatures fall at rates X_11 b_1² and X_22 b_2², which are equal
    sizes = torch.from_numpy(point.covariance)
    turned = point.vectors[:2] @ sizes @ point.vectors[:2].T
    share = float(turned[0, 0] / turned.trace())
    assert share == pytest.approx(b[1] ** 2 / (b[0] ** 2 + b[1] ** 2), abs=0.02)
    norm = norm_at_edge(lr, rho, point.sharpness)
    assert point.sharpness * point.bounce == pytest.approx(norm, rel=0.02)


@pytest.mark.slow
def test_two_tied_valleys_are_those_of_sam():
    lr, rho, b = 0.5, 0.05, (1.0, 0.5)

    def loss(w):
        s = [2.5 + b[i] * w[2 + i] for i in range(2)]
        return 0.5 * sum(s[i] * w[i] ** 2 for i in range(2))

    path = sam_path(loss, (0.01, 0.02, 0.0, 0.0), lr, rho, 120)
    w = weights(0.0, 0.0, 0.0, 0.0)
    flow = CentralFlow(lambda: loss(w), [w], lr, rho, k=2)
    for _ in range(40):
        flow.step(3)
    assert w[2:].tolist() == pytest.approx(averaged(path)[-1, 2:].tolist(), rel=0.05)


def test_without_a_bounce_it_is_the_gradient_flow():
    w = weights(1.0, -2.0)
    curvature = torch.tensor([0.5, 3.0]).double()
    flow = CentralFlow(lambda: 0.5 * (curvature * w**2).sum(), [w], 0.1, bounce=False, substeps=800)
    flow.step()
    expected = torch.tensor([1.0, -2.0]).double() * torch.exp(-0.1 * curvature)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-4, atol=0)
    assert flow.read().covariance.tolist() == [[0.0]]


def test_without_a_bounce_sams_flow_looks_ahead():
    w = weights(3.0, 4.0)
    flow = CentralFlow(lambda: 0.5 * (w**2).sum(), [w], 0.1, 0.5, bounce=False, substeps=1)
    flow.step()  # the gradient at w + rho w / |w|
    assert w.tolist() == pytest.approx([3.0 - 0.1 * 3.3, 4.0 - 0.1 * 4.4])


def test_a_large_gradient_does_not_bounce():
    w = weights(1.0, 0.0)
    flow = CentralFlow(lambda: 0.5 * w[0] ** 2 + 3 * w[1], [w], 0.5, 0.1)
    assert flow.read().bounce == 0


def test_where_all_curvature_is_negative_nothing_bounces():
    w = weights(0.3, 0.1)
    flow = CentralFlow(lambda: -w.square().sum(), [w], 0.5, 0.1)
    flow.step()
    assert flow.read().bounce == 0


def test_reading_leaves_no_trace_and_saves_the_step_its_work():
    model, closure = small_network()
    closure().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    flow = CentralFlow(closure, model.parameters(), 0.2, 0.1, k=2)
    flow.read()
    spent = flow.hvps
    flow.read()
    assert flow.hvps == spent
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    flow.step()
    assert flow.hvps == spent, "the step goes on from what was read"
    other, again = small_network()
    CentralFlow(again, other.parameters(), 0.2, 0.1, k=2).step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_steps_with_one_look_are_nearly_two_steps():
    ends = []
    for stride in (1, 4):
        model, closure = small_network()
        flow = CentralFlow(closure, model.parameters(), 0.2, 0.1, k=2)
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        for _ in range(20 // stride):
            flow.step(stride)
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert float((ends[0] - ends[1]).norm() / (ends[0] - start).norm()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": 0.1, "rho": -1.0}, "rho must be a finite number of at least 0, got -1.0"),
        ({"lr": 0.1, "k": 3}, "k must be an integer between 1 and 2, got 3"),
        ({"lr": 0.1, "substeps": 0}, "substeps must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_are_checked(arguments, words):
    w = weights(1.0, 2.0)
    with pytest.raises(ValueError, match=words):
        CentralFlow(lambda: w.square().sum(), [w], **arguments)


def test_a_loss_that_changes_by_itself_is_refused():
    w = weights(1.0, 2.0)
    with pytest.raises(ValueError, match="the same loss at the same parameters"):
        CentralFlow(lambda: (torch.rand(()) * w).square().sum(), [w], 0.1)


def test_sams_flow_ends_at_two_over_lr():
    w = weights(0.1, 0.1)
    flow = CentralFlow(lambda: 2.0 * w.square().sum(), [w], 0.5, 0.1)
    with pytest.raises(ValueError, match="below 2 / lr = 4, where SAM has an edge; got 4"):
        flow.read()


# --- paths ---------------------------------------------------------------------------------------


def test_an_alternating_path_has_its_line_and_its_length():
    t = torch.arange(7).double()[:, None]
    line = torch.tensor([[1.0, 2.0, 0.0]]).double() + t * torch.tensor([[0.1, 0.0, 0.3]])
    swing = torch.tensor([[0.3, 0.4, 1.0]]).double()
    path = line + (-1.0) ** t * swing
    torch.testing.assert_close(averaged(path), line[1:-1])
    plane = torch.eye(3).double()[:, :2]
    assert bounce(path, plane).tolist() == pytest.approx([0.5] * 5)


def test_paths_are_checked():
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        averaged(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"path must be \(T, P\) and basis \(P, m\)"):
        bounce(torch.zeros(5, 4), torch.zeros(3, 1))
