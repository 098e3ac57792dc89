"""Layer norm against torch's, against finite differences, and inside a Hessian."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sam_lab import Hessian, SharpnessTracker, layer_norm, models


def tensors(shape, normalized, weight=True, bias=True, seed=0):
    """Input, weight and bias in float64; None for what is left out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(of):
        return torch.randn(of, generator=generator, dtype=torch.float64).requires_grad_()

    return draw(shape), draw(normalized) if weight else None, draw(normalized) if bias else None


def wave(t):
    return t.sin().sum()


def derivatives(function, leaves, order):
    """The gradient of the sum of sines of the gradient of ..., flat."""
    out = wave(function())
    for _ in range(order):
        grads = torch.autograd.grad(
            out, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        out = sum(wave(g) for g in grads)
    return torch.cat([g.detach().flatten() for g in grads])


def written_out(x, dims, weight, bias, eps):
    mean = x.mean(dims, keepdim=True)
    normed = (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt()
    return normed * weight + bias


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape, normalized", [((3, 4, 5), (5,)), ((2, 3, 4), (3, 4)), ((6,), (6,))]
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    shape, normalized, weight, bias
):
    x, w, b = tensors(shape, normalized, weight, bias)
    leaves = [t for t in (x, w, b) if t is not None]

    def function(*_):
        return layer_norm.layer_norm(x, normalized, w, b, 1e-3)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 7),
    size=st.integers(1, 9),
    frozen=st.sampled_from([(), (0,), (1,), (2,), (0, 1), (1, 2)]),
    eps=st.sampled_from([1e-6, 1e-2, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_two_derivatives_equal_torchs_whatever_is_frozen(rows, size, frozen, eps, scale):
    inputs = tensors((rows, size), (size,), seed=rows + 10 * size)
    with torch.no_grad():
        inputs[0].mul_(scale)
    for i in frozen:
        inputs[i].requires_grad_(False)
    leaves = [t for t in inputs if t.requires_grad]
    x, w, b = inputs
    for order in (1, 2):
        ours, torchs = (
            derivatives(lambda f=f: f(x, (size,), w, b, eps), leaves, order)
            for f in (layer_norm.layer_norm, functional.layer_norm)
        )
        # terms of size 1 / (var + eps) may cancel, and leave their rounding
        atol = 1e-8 * float(torchs.abs().max()) + 1e-15 / eps
        torch.testing.assert_close(ours, torchs, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("order", [3, 4])
def test_later_derivatives_are_right_too(order):
    x, w, b = tensors((3, 5), (5,))
    ours = derivatives(lambda: layer_norm.layer_norm(x, (5,), w, b, 1e-3), [x, w, b], order)
    plain = derivatives(lambda: written_out(x, -1, w, b, 1e-3), [x, w, b], order)
    torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)


def test_a_pixel_without_variance_has_finite_second_derivatives():
    x = torch.zeros(4, 8, requires_grad=True)
    bend = derivatives(lambda: layer_norm.layer_norm(x, (8,), eps=1e-6), [x], 2)
    assert bool(torch.isfinite(bend).all())


@pytest.mark.parametrize("wrong", [{"normalized_shape": (4,)}, {"weight": torch.ones(2)}])
def test_shapes_that_do_not_fit_are_torchs_error(wrong):
    arguments = {"input": torch.ones(2, 3), "normalized_shape": (3,), **wrong}
    with pytest.raises(RuntimeError, match="shape"):
        layer_norm.layer_norm(**arguments)


@pytest.fixture
def counted(monkeypatch):
    """Calls of ours, which now takes the place of torch's whatever the size."""
    calls = []
    ours = layer_norm.layer_norm
    monkeypatch.setattr(layer_norm, "SMALLEST", 0)
    monkeypatch.setattr(layer_norm, "layer_norm", lambda *a, **k: calls.append(1) or ours(*a, **k))
    return calls


def hessian_of(model, x, y, **options):
    def loss():
        return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    return Hessian(loss, model.parameters(), model, **options)


def networks():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    classes = torch.randint(3, (6,), generator=generator)
    words = torch.randint(11, (3, 5), generator=generator)
    cnn = models.cnn((2, 8, 8), 3, "gelu", widths=(4, 4), norm="layer", dtype=torch.float64)
    text = models.transformer(11, 8, 2, 2, 5, dtype=torch.float64)
    norm = nn.LayerNorm(12, elementwise_affine=False)
    user = nn.Sequential(nn.Linear(4, 12), norm, nn.Linear(12, 3)).double()
    points = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return {
        "cnn": (cnn, images, classes),
        "transformer": (text, words, words),
        "user's": (user, points, classes),
    }


@pytest.mark.parametrize("name", ["cnn", "transformer", "user's"])
def test_a_hessian_uses_it_in_whatever_network_and_the_products_are_the_same(name, counted):
    H = hessian_of(*networks()[name], mode="graph")
    v = torch.randn(H.shape[0], 2, generator=torch.Generator().manual_seed(1), dtype=H.dtype)
    fast = H @ v
    assert counted
    before = len(counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_norm, "SMALLEST", 10**9)
        H.reset()
        torchs = H @ v
    assert len(counted) == before
    torch.testing.assert_close(fast, torchs, rtol=1e-9, atol=1e-11)


def test_small_ones_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(layer_norm, "layer_norm", None)  # calling it would be an error
    H = hessian_of(*networks()["user's"])
    assert bool(torch.isfinite(H @ torch.ones(H.shape[0], dtype=H.dtype)).all())


def test_the_tracker_finds_the_top_eigenvalue_through_it(counted):
    model, x, y = networks()["user's"]
    H = hessian_of(model, x, y, mode="graph")
    dense = H @ torch.eye(H.shape[0], dtype=H.dtype)
    pairs = SharpnessTracker(H, tol=1e-6).measure()
    assert counted
    np.testing.assert_allclose(float(pairs.values[0]), float(torch.linalg.eigvalsh(dense)[-1]))


def test_a_closure_with_transforms_of_its_own_falls_back_to_torchs(counted):
    model, x, _ = networks()["user's"]

    def loss():  # squared slopes of the outputs, by vmap over grad
        slope = torch.func.vmap(torch.func.grad(lambda z: model(z).sum()))(x)
        _, moved = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        return slope.square().mean() + moved.square().mean()

    def by_hand():
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        jacobian = torch.autograd.functional.jacobian(model, x, create_graph=True)
        return slope.square().mean() + jacobian.sum((2, 3)).square().mean()

    assert loss().item() == pytest.approx(by_hand().item())
    H = Hessian(loss, model.parameters(), mode="graph")
    assert bool(torch.isfinite(H @ torch.ones(H.shape[0], dtype=H.dtype)).all())


def test_torchs_layer_norm_is_back_outside():
    x, w, b = tensors((3, 5), (5,))
    with pytest.raises(ZeroDivisionError), layer_norm.FastLayerNorm():
        raise ZeroDivisionError
    assert "NativeLayerNorm" in type(functional.layer_norm(x, (5,), w, b).grad_fn).__name__
