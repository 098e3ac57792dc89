"""Pairs whose product shall be 1: steps against torch and exact identities, rates against both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sam_lab import SAM, perturbations
from sam_lab.experiments.theory import hyperbola

places = st.floats(0.1, 6.0)


def loss_of(w, labels=1.0):
    """The loss of one copy (2, n), in torch."""
    return 0.5 * ((w[0] * w[1] - labels) ** 2).mean()


@given(q=places, residual=st.floats(-0.5, 1.0))
def test_weights_are_at_the_place_asked_for_with_the_residual_asked_for(q, residual):
    w = hyperbola.at(q, residual)
    assert w.shape == (2, 1)
    assert hyperbola.place(w) == pytest.approx(q, rel=1e-9)
    assert w[0] * w[1] == pytest.approx(1 + residual, rel=1e-9)


def test_the_gradient_is_that_of_the_loss():
    w = np.random.default_rng(0).normal(size=(4, 2, 3))
    for found, copy in zip(hyperbola.gradient(w), w, strict=True):
        leaf = torch.tensor(copy, requires_grad=True)
        loss_of(leaf).backward()
        assert found == pytest.approx(leaf.grad.numpy())


def test_the_sharpness_is_the_top_eigenvalue_of_the_hessian_at_the_minimum():
    q = np.array([3.0, 1.0])
    w = torch.tensor(hyperbola.at(q))
    hessian = torch.autograd.functional.hessian(loss_of, w).reshape(4, 4)
    values = torch.linalg.eigvalsh(hessian).numpy()
    assert values[-2:] == pytest.approx(np.sort(hyperbola.sharpness(q)) / 2)
    assert values[:2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rule", [perturbations.sam, perturbations.unnormalized])
def test_a_step_of_sam_is_the_librarys(rule):
    start = hyperbola.at([3.0, 1.0], 0.1)
    leaf = torch.nn.Parameter(torch.tensor(start))
    sam = SAM(torch.optim.SGD([leaf], lr=0.2), 0.3, rule=rule)
    w = start[None]
    for _ in range(5):
        sam.step(lambda: loss_of(leaf))
        w = hyperbola.step(w, 0.2, 0.3, rule.__name__)
    assert w[0] == pytest.approx(leaf.detach().numpy(), rel=1e-9)


@given(q=places, residual=st.floats(-0.5, 0.5), label=st.floats(0.5, 1.5))
def test_descent_multiplies_the_place_by_one_less_the_square_of_its_step(q, residual, label):
    w = hyperbola.at(q, residual)
    after = w - 0.1 * hyperbola.gradient(w, label)
    error = 1 + residual - label
    assert hyperbola.place(after) == pytest.approx(q * (1 - (0.1 * error) ** 2), rel=1e-9)


@given(q=places, residual=st.floats(0.01, 0.5))
def test_sam_multiplies_the_place_by_the_factor_of_the_module(q, residual):
    lr, rho = 0.1, 0.05
    w = hyperbola.at(q, residual)
    s = np.sum(w**2)
    c = rho / np.sqrt(s)
    ahead = residual + c * s + c**2 * (1 + residual)
    factor = (1 - lr * ahead * c) ** 2 - (lr * ahead) ** 2
    after = hyperbola.step(w[None], lr, rho, "sam")
    assert hyperbola.place(after) == pytest.approx(q * factor, rel=1e-9)


@given(q=places, pace=st.floats(0.05, 1.8))
def test_sams_rate_is_that_of_its_bounce_for_a_small_radius(q, pace):
    s = float(hyperbola.sharpness(q))
    lr, rho = pace / s, 1e-4
    ahead = 2 * rho * np.sqrt(s) / (2 - lr * s)  # residual at the perturbed point
    factor = (1 - lr * ahead * rho / np.sqrt(s)) ** 2 - (lr * ahead) ** 2
    # the logarithm of a number so near 1 holds eight digits
    assert -np.log(factor) == pytest.approx(float(hyperbola.sam_rate(q, lr, rho)), rel=1e-4)


def test_sam_comes_to_bounce_between_the_two_walls_of_the_module():
    lr, rho, q = 0.2, 0.001, 3.0
    w = hyperbola.at(q, 0.1)[None]
    for _ in range(200):
        w = hyperbola.step(w, lr, rho, "sam")
    s = float(hyperbola.sharpness(hyperbola.place(w))[0, 0])
    residual = abs(float(w[0, 0, 0] * w[0, 1, 0]) - 1)
    assert residual == pytest.approx(lr * rho * s**1.5 / (2 - lr * s), rel=0.01)


def test_the_residual_under_label_noise_has_its_stationary_mean_square():
    lr, sigma = 0.2, 0.02
    rng = np.random.default_rng(0)
    w = np.repeat(hyperbola.at(3.0)[None], 4000, axis=0)
    for _ in range(60):
        w = hyperbola.step(w, lr, sigma=sigma, rng=rng)
    s = float(hyperbola.sharpness(3.0))
    labels = 1 + sigma * rng.choice((-1, 1), size=4000)
    found = np.mean((w[:, 0, 0] * w[:, 1, 0] - labels) ** 2)
    assert found == pytest.approx(2 * sigma**2 / (2 - lr * s), rel=0.05)


def test_a_random_direction_moves_the_place_as_an_average_over_all_directions_does():
    """On the circle the mean is an integral; off the minimum the noise has made a residual."""
    lr, rho, q = 0.1, 1e-3, 2.0
    s = float(hyperbola.sharpness(q))
    turns = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    direction = np.stack([np.cos(turns), np.sin(turns)], axis=1)[:, :, None]
    spread = rho * np.sqrt(lr * s**2 / (2 * (2 - lr * s)))  # stationary, of the residual
    mean = 0.0
    for residual in (-spread, spread):
        w = hyperbola.at(q, residual)[None]
        after = w - lr * hyperbola.gradient(w + rho * direction)
        mean += float(np.log(hyperbola.place(after) / q).mean()) / 2
    assert -mean == pytest.approx(float(hyperbola.noise_rate(q, lr, rho, 2)), rel=1e-2)


def test_on_single_examples_one_pair_moves_and_by_its_own_loss():
    w = np.repeat(hyperbola.at([3.0, 1.0, 0.5], 0.2)[None], 50, axis=0)
    after = hyperbola.step(w, 0.1, 0.05, "sam", single=True, rng=np.random.default_rng(0))
    moved = np.abs(after - w).max(axis=1) > 0
    assert (moved.sum(axis=1) == 1).all() and moved.any(axis=0).all()
    alone = hyperbola.step(hyperbola.at(3.0, 0.2)[None], 0.1, 0.05, "sam")
    assert after[moved[:, 0]][0, :, 0] == pytest.approx(alone[0, :, 0])


def test_a_copy_does_not_depend_on_its_neighbours():
    w = hyperbola.at([[3.0, 1.0], [2.0, 0.5]], 0.1)
    together = hyperbola.step(w, 0.2, 0.1, "sam")
    for copy, found in zip(w, together, strict=True):
        assert found == pytest.approx(hyperbola.step(copy[None], 0.2, 0.1, "sam")[0])


def test_a_pair_at_rest_stays_at_rest():
    w = np.ones((1, 2, 1))  # its residual is 0 in floating point too
    assert (hyperbola.step(w, 0.2, 0.1, "sam") == w).all()


def test_what_cannot_be_done_is_refused():
    w = hyperbola.at(3.0)[None]
    with pytest.raises(ValueError, match="rule must be one of descent, sam, .*, got 'newton'"):
        hyperbola.step(w, 0.1, 0.1, "newton")
    with pytest.raises(ValueError, match="rng must be a generator"):
        hyperbola.step(w, 0.1, sigma=0.1)


def test_a_flow_of_constant_rate_is_an_exponential():
    found = hyperbola.flow(3.0, lambda q: np.full_like(q, 0.01), 100)
    assert found[:, 0] == pytest.approx(3 * np.exp(-0.01 * np.arange(101)))


def test_tied_pairs_move_together_and_share_what_one_alone_would_fall():
    start = np.array([1.5, 2.0])
    found = hyperbola.tied_flow(start, lr=0.2, rho=0.1, steps=2000)
    assert (found[:20, 0] == 1.5).all(), "the flatter one waits"
    tied = found[:, 1] <= 1.5
    assert tied.any() and found[tied][:, 0] == pytest.approx(found[tied][:, 1])
    first, last = np.flatnonzero(tied)[[1, -1]]
    alone = hyperbola.flow(
        found[first, 0], lambda q: hyperbola.sam_rate(q, 0.1, 0.1) / 2, last - first
    )
    assert found[last, 0] == pytest.approx(alone[-1, 0])
