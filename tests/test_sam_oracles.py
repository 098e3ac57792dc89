"""SAM against a closed form, an implementation in NumPy, another library, and half precision.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam_problem import SGD, assert_equal, copies
from torch import nn

from sam_lab import SAM
from sam_lab.perturbations import asam, dithered
from sam_lab.perturbations import sam as sam_rule


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 12),
    rho=st.floats(1e-3, 10),
    lr=st.floats(1e-3, 1),
)
def test_on_a_quadratic_the_gradient_and_the_step_have_their_closed_form(seed, size, rho, lr):
    """g = A (w + rho A w / |A w|), whatever the curvature."""
    generator = np.random.default_rng(seed)
    A = generator.normal(size=(size, size))
    A, w = A + A.T, generator.normal(size=size)
    expected = A @ (w + rho * A @ w / np.linalg.norm(A @ w))
    matrix = torch.from_numpy(A)
    parts = [torch.from_numpy(part.copy()).requires_grad_() for part in np.split(w, [size // 3])]
    sam = SAM(torch.optim.SGD(parts, lr=lr), rho)

    def loss():
        whole = torch.cat(parts)
        return whole @ matrix @ whole / 2

    assert float(sam.step(loss)) == pytest.approx(w @ A @ w / 2)
    np.testing.assert_allclose(
        torch.cat([p.grad for p in parts]), expected, rtol=1e-9, atol=1e-9 * abs(expected).max()
    )
    np.testing.assert_allclose(torch.cat(parts).detach(), w - lr * expected, atol=1e-8 * rho + 1e-9)


# --- an implementation that shares nothing --------------------------------------------------------


def gradient(weights, x, labels):
    """Cross-entropy of a tanh network with one hidden layer, and its gradient, by hand."""
    W1, b1, W2, b2 = weights
    hidden = np.tanh(x @ W1.T + b1)
    logits = hidden @ W2.T + b2
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), labels]).mean()
    d = (p - np.eye(len(b2))[labels]) / len(x)
    before = (d @ W2) * (1 - hidden**2)
    return loss, [before.T @ x, before.sum(0), d.T @ hidden, d.sum(0)]


def perturbation(rule, weights, grads, rho):
    if rule == "sam":
        T = [np.ones_like(w) for w in weights]
    else:
        T = [abs(w) + 0.01 if w.ndim == 2 else np.ones_like(w) for w in weights]
    norm = np.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(T, grads, strict=True)))
    return [rho * t**2 * g / norm for t, g in zip(T, grads, strict=True)]


@pytest.mark.parametrize("rule", [sam_rule, asam], ids=["sam", "asam"])
def test_a_run_agrees_with_numpy(rule):
    """Thirty steps with momentum, weight decay and mini-batches."""
    lr, momentum, decay, rho = 0.3, 0.9, 1e-3, 0.2
    generator = np.random.default_rng(0)
    weights = [0.5 * generator.normal(size=size) for size in ((7, 5), (7,), (3, 7), (3,))]
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)
    sam = SAM(optimizer, rho, rule=rule)
    velocities = [np.zeros_like(w) for w in weights]
    losses = []
    for _ in range(30):
        x = generator.normal(size=(20, 5))
        labels = (abs(x[:, 0]) > 1).astype(int) + (x[:, 1] > x[:, 2])
        inputs, targets = torch.from_numpy(x), torch.from_numpy(labels)

        clean = sam.step(lambda: nn.functional.cross_entropy(model(inputs), targets))  # noqa: B023
        loss, grads = gradient(weights, x, labels)
        epsilon = perturbation(rule.__name__, weights, grads, rho)
        _, grads = gradient([w + e for w, e in zip(weights, epsilon, strict=True)], x, labels)
        for w, v, g in zip(weights, velocities, grads, strict=True):
            v *= momentum
            v += g + decay * w
            w -= lr * v
        assert float(clean) == pytest.approx(loss, rel=1e-10)
        losses.append(loss)
    for p, w in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(p.detach(), w, rtol=1e-9, atol=1e-11)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


# --- a second opinion ---------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize(
    "base",
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
    ids=["momentum", "adamw"],
)
def test_fifty_steps_agree_with_pytorch_optimizer(base, adaptive):
    """Its adaptive form takes T = |w| for every parameter, biases too."""
    peer = pytest.importorskip("pytorch_optimizer")
    kind, settings = base
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, :1] * x[:, 1:2]).tanh()

    def network():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    ours, theirs = network(), network()
    rule = partial(asam, eta=0.0, adaptive=lambda p: True) if adaptive else sam_rule
    sam = SAM(kind(ours.parameters(), **settings), 0.1, rule=rule)
    other = peer.SAM(theirs.parameters(), kind, rho=0.1, adaptive=adaptive, **settings)
    start = copies(ours.parameters())
    for _ in range(50):
        other.zero_grad()
        (theirs(x) - y).square().mean().backward()
        other.first_step(zero_grad=True)
        (theirs(x) - y).square().mean().backward()
        other.second_step()
        sam.step(lambda: (ours(x) - y).square().mean())
    for p, q, w in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # their norm is of float32
        assert (p - w).abs().max() > 0.01


# --- half precision -----------------------------------------------------------------------------

# As radius 0.05 for ten million weights: what counts is the size of an entry of epsilon.
RHO, SIZE = 0.005, 100_000


def in_half(dtype, **options):
    """A SAM for weights of half precision and a gradient, both Gaussian."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.05 * torch.randn(SIZE, generator=generator)).to(dtype).requires_grad_()
    weight.grad = torch.randn(SIZE, generator=generator).to(dtype)
    return weight, SAM(SGD([weight]), RHO, **options)


def displacement(weight, sam):
    """What the block adds to the weights as they are, and epsilon before any rounding."""
    before = weight.detach().double()
    (epsilon,) = sam_rule([weight], [weight.grad], RHO)
    with sam.perturbed():
        there = weight.detach().double()
    assert_equal(weight.detach().double(), before)
    return there - before, epsilon.double()


def along(displacement, epsilon):
    """The projection on epsilon, in units of the radius."""
    return float(displacement @ epsilon / RHO**2)


def test_parameters_of_half_precision_cause_a_warning_unless_dithered():
    """Trap: bfloat16 weights hardly move, and SAM silently becomes the base optimizer."""
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.warns(UserWarning, match="half precision.*torch.autocast, or .*rule=dithered"):
            in_half(dtype)
        for rule in (dithered, partial(dithered, rule=asam)):
            in_half(dtype, generator=torch.Generator(), rule=rule)


@pytest.mark.filterwarnings("ignore:some parameters are of half precision")
def test_bfloat16_weights_lose_most_of_the_perturbation():
    moved, epsilon = displacement(*in_half(torch.bfloat16))
    assert epsilon.norm() == pytest.approx(RHO, rel=1e-3)
    assert (moved != 0).double().mean() < 0.25
    assert along(moved, epsilon) < 0.5
    assert float(moved @ epsilon / (moved.norm() * epsilon.norm())) < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dither_keeps_the_perturbation_on_average(dtype):
    """What is added is noise, nearly orthogonal to epsilon: the projection is kept, no cosine."""
    generator = torch.Generator().manual_seed(1)
    moved, epsilon = displacement(*in_half(dtype, rule=dithered, generator=generator))
    assert along(moved, epsilon) == pytest.approx(1, abs=0.1)


def test_under_autocast_float32_weights_keep_the_perturbation():
    """Their copies in bfloat16 are rounded too, but from anywhere between two numbers."""
    weight, sam = in_half(torch.float32)
    (epsilon,) = sam_rule([weight], [weight.grad], RHO)
    before = weight.detach().clone()
    with sam.perturbed():
        there = weight.detach().clone()
    torch.testing.assert_close(there - before, epsilon, rtol=0, atol=1e-7)
    in_bfloat16 = there.bfloat16().double() - before.bfloat16().double()
    assert along(in_bfloat16, epsilon.double()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dither_leaves_weights_without_a_perturbation_alone(dtype):
    """At zero and at powers of two, the weights of norm layers at first, spacings are special."""
    exact = torch.tensor([0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 2.0**-20, 100.0], dtype=dtype)
    weight = exact.repeat(1000).requires_grad_()
    other = torch.ones(1, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    sam = SAM(SGD([weight, other]), 0.1, rule=dithered, generator=generator)
    weight.grad, other.grad = torch.zeros_like(weight), torch.ones(1)
    with sam.perturbed():
        assert_equal(weight.detach(), exact.repeat(1000))
        assert other.item() == pytest.approx(1.1)  # in float32 as always


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -3.0, 2.0**-15])
def test_dithered_weights_are_right_on_average_and_next_to_the_exact_ones(dtype, value):
    repeats = 4000
    weight = torch.full((repeats,), value, dtype=dtype, requires_grad=True)
    for sign in (1.0, -1.0):
        generator = torch.Generator().manual_seed(1)
        each = 0.3 * torch.finfo(dtype).eps * max(abs(value), 1e-3)
        rho = each * repeats**0.5
        sam = SAM(SGD([weight]), rho, rule=dithered, generator=generator)
        weight.grad = sign * torch.ones_like(weight)
        with sam.perturbed():
            there = weight.detach().double()
        exact = weight.detach().double()[0] + sign * each
        assert len(there.unique()) <= 2
        assert there.min() <= exact * (1 + 1e-6) + 1e-12
        assert there.max() >= exact * (1 - 1e-6) - 1e-12
        spread = float(there.max() - there.min())
        assert float(there.mean()) == pytest.approx(float(exact), abs=5 * spread / repeats**0.5)


def test_dither_repeats_with_its_generator():
    once, again = (
        displacement(
            *in_half(torch.bfloat16, rule=dithered, generator=torch.Generator().manual_seed(2))
        )
        for _ in range(2)
    )
    assert_equal(once, again)


@pytest.mark.filterwarnings("ignore:some parameters are of half precision")
@pytest.mark.parametrize("size", [2.0**-24, 1e-6, 6e4])
def test_float16_weights_with_tiny_or_huge_gradients_stay_finite(size):
    """Trap: a guard of 1e-12 is zero in float16, and rho / 1e-12 infinite."""
    weight = torch.ones(100, dtype=torch.float16, requires_grad=True)
    weight.grad = torch.full_like(weight, size)
    with SAM(SGD([weight]), 1.0).perturbed():
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1.1))
