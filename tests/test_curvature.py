"""The Hessian operator against dense second derivatives, and its spectrum against eigvalsh."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam_lab import Hessian, models
from sam_lab.curvature import ConvergenceWarning


def mlp(sizes, seed=0, dtype=torch.float64):
    """A tanh network with weights drawn without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=dtype)
        with torch.no_grad():
            for p in layer.parameters():
                draw = torch.rand(p.shape, generator=generator, dtype=torch.float64)
                p.copy_((2 * draw - 1) / fan_in**0.5)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def problem(sizes=(5, 8, 3), examples=30, seed=0, dtype=torch.float64):
    """A network, its loss, and inputs and classes that go with it."""
    generator = torch.Generator().manual_seed(seed + 100)
    model = mlp(sizes, seed, dtype)
    x = torch.randn(examples, sizes[0], generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, sizes[-1], (examples,), generator=generator)
    return model, x, y


def dense(closure, params):
    """The Hessian as a matrix, by torch.autograd alone."""
    grads = torch.autograd.grad(closure(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    unit = torch.eye(len(flat), dtype=flat.dtype)
    rows = torch.autograd.grad(flat, params, unit, is_grads_batched=True)
    return torch.cat([row.reshape(len(flat), -1) for row in rows], dim=1)


def train(model, closure, lr, steps):
    params = list(model.parameters())
    for _ in range(steps):
        grads = torch.autograd.grad(closure(), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= lr * g


def digits_network(seed=0, steps=300, lr=0.4):
    """64-128-128-10 tanh on scikit-learn's digits, cross-entropy, full-batch gradient descent."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    model = mlp((64, 128, 128, 10), seed, torch.float32)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    train(model, closure, lr, steps)
    return model, closure


# ---------------------------------------------------------------------- products


@pytest.mark.parametrize("mode", ["graph", "forward"])
@pytest.mark.parametrize("sizes", [None, [30], [10, 10, 10], [16, 13, 1]])
def test_products_are_those_of_the_dense_hessian(mode, sizes):
    """Also in batches, of unequal sizes: they are weighted by their sizes."""
    model, x, y = problem()
    params = list(model.parameters())

    def loss_fn(x, y):
        return nn.functional.cross_entropy(model(x), y)

    expected = dense(lambda: loss_fn(x, y), params)
    if sizes is None:
        H = Hessian(lambda: loss_fn(x, y), params, model, mode)
    else:
        batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        H = Hessian.over(batches, loss_fn, params, model, mode)
    assert H.shape == tuple(expected.shape) and H.mode == mode
    assert H.dtype == torch.float64 and H.device.type == "cpu"
    torch.testing.assert_close(H @ torch.eye(len(expected), dtype=H.dtype), expected)
    torch.testing.assert_close(H @ expected[0], expected @ expected[0])
    assert H.hvps == len(expected) + 1
    assert H.loss() == pytest.approx(loss_fn(x, y).item())
    grads = torch.autograd.grad(loss_fn(x, y), params)
    torch.testing.assert_close(H.gradient(), torch.cat([g.reshape(-1) for g in grads]))
    assert H.hvps == len(expected) + 1, "loss and gradient are no products"
    assert f"hvps={H.hvps}" in repr(H)


def test_a_data_loader_is_read_once_for_a_block_of_products():
    model, x, y = problem()
    calls = 0

    def loss_fn(x, y):
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(model(x), y)

    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    H = Hessian.over(loader, loss_fn, model.parameters())
    block = torch.randn(H.shape[0], 6, dtype=H.dtype)
    calls = 0
    product = H @ block
    assert calls == 5 and H.hvps == 6
    whole = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    torch.testing.assert_close(product, whole @ block)


def test_a_batch_may_be_a_bare_tensor():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    H = Hessian.over([x[:3], x[3:]], lambda x: 0.5 * (x @ w).square().mean(), [w])
    torch.testing.assert_close(H @ torch.eye(3, dtype=torch.float64), x.T @ x / 4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_operator_is_symmetric_and_linear(seed):
    model, x, y = problem(seed=seed % 7)
    H = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, H.shape[0], generator=generator, dtype=H.dtype)
    torch.testing.assert_close(u @ (H @ v), v @ (H @ u))
    torch.testing.assert_close(H @ (2 * u - v), 2 * (H @ u) - H @ v)


def test_the_graph_is_kept_between_products_and_follows_the_parameters():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return (w**4).sum() / 12

    H = Hessian(closure, [w])
    one = torch.ones(2)
    assert (H @ one).tolist() == [1.0, 4.0] and (H @ one).tolist() == [1.0, 4.0]
    assert H.loss() == pytest.approx(17 / 12) and calls == 1
    with torch.no_grad():
        w += 1
    assert (H @ one).tolist() == [4.0, 9.0] and calls == 2
    w.data.add_(1)  # invisible to the version counter
    assert (H @ one).tolist() == [9.0, 16.0] and calls == 3
    w.data = torch.tensor([5.0, 6.0])
    assert (H @ one).tolist() == [25.0, 36.0] and calls == 4
    assert H.gradient().tolist() == pytest.approx([125 / 3, 72.0])


def test_changed_buffers_and_modes_are_seen_when_the_model_is_given():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double().eval()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    H = Hessian(lambda: model(x).square().mean(), model.parameters(), model)
    seen = [H.loss()]
    model[1].running_var.fill_(9.0)
    seen.append(H.loss())
    model.train()
    seen.append(H.loss())
    assert len(set(seen)) == 3


def test_other_data_need_a_reset_for_products_but_not_for_top():
    w = torch.tensor([1.0], requires_grad=True)
    scale = 1.0
    H = Hessian(lambda: scale * w.square().sum() / 2, [w])
    assert (H @ torch.ones(1)).item() == 1
    scale = 2.0
    assert H.top().values.item() == 2
    assert (H @ torch.ones(1)).item() == 2
    scale = 3.0
    H.reset()
    assert (H @ torch.ones(1)).item() == 3


@pytest.mark.parametrize("mode", ["graph", "forward"])
def test_unused_and_linear_parameters_give_zero_rows(mode):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("curved", "linear", "unused"):
                setattr(self, name, nn.Parameter(torch.tensor([1.0, 2.0])))

        def forward(self):
            return self.curved.square().sum() + 3 * self.linear.sum()

    model = Three()
    H = Hessian(model, model.parameters(), model, mode)
    assert (H @ torch.ones(6)).tolist() == [2, 2, 0, 0, 0, 0]
    assert H.gradient().tolist() == [2, 4, 3, 3, 0, 0]
    flat = Hessian(lambda: model.linear.sum(), model.parameters())
    assert (flat @ torch.ones(6)).tolist() == [0] * 6
    assert flat.top(3).values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["graph", "forward"])
def test_attention_can_be_differentiated_twice(mode):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(12, 4, generator=generator))
    x = torch.randn(2, 5, 4, generator=generator)

    def closure():
        q, k, v = (part[:, None] for part in model(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()

    H = Hessian(closure, model.parameters(), model, mode)
    eye = torch.eye(H.shape[0])
    torch.testing.assert_close(H @ eye, (H @ eye).T, rtol=1e-4, atol=1e-5)
    assert H.top().values[0] > 0


def test_tied_weights_move_together_in_forward_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    both = [
        Hessian(lambda: model(x).square().mean(), model.parameters(), model, mode)
        for mode in ("graph", "forward")
    ]
    v = torch.ones(both[0].shape[0], dtype=torch.float64)
    torch.testing.assert_close(both[0] @ v, both[1] @ v)


def test_forward_mode_refuses_a_closure_that_reads_parameters_past_the_model():
    model, x, y = problem()
    params = list(model.parameters())

    def closure():
        penalty = sum(p.square().sum() for p in params)  # would go unnoticed: no curvature from it
        return nn.functional.cross_entropy(model(x), y) + penalty

    v = torch.ones(sum(p.numel() for p in params), dtype=torch.float64)
    H = Hessian(closure, params, model, mode="forward")
    with pytest.raises(ValueError, match='use mode="graph"'):
        H @ v
    assert H.hvps == 0


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "tensor of shape"),
        (torch.ones(3), ValueError, r"got \(3,\)"),
        (torch.ones(3, 2), ValueError, r"got \(3, 2\)"),
        (torch.ones(2, 2, 2), ValueError, r"\(2, 2, 2\)"),
        (torch.ones(2, dtype=torch.float64), ValueError, "needs torch.float32.*got torch.float64"),
        (torch.ones(2, device="meta"), ValueError, "got torch.float32 on meta"),
        (torch.tensor([1.0, torch.nan]), FloatingPointError, "neither is the vector"),
    ],
)
def test_bad_vectors(vector, error, message):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        Hessian(lambda: w.square().sum(), [w]) @ vector


# ---------------------------------------------------------------------- top eigenpairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "steps"), [((5, 8, 3), 0), ((10, 20, 10), 300), ((20, 30, 25, 5), 200)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_top_five_agree_with_dense_eigvalsh(sizes, steps, seed):
    model, x, y = problem(sizes, 100, seed)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    train(model, closure, 0.5, steps)
    params = list(model.parameters())
    H = Hessian(closure, params)
    assert H.shape[0] <= 2000
    pairs = H.top(5, tol=1e-5, seed=seed)
    exact = torch.linalg.eigvalsh(dense(closure, params)).flip(0)[:5]
    torch.testing.assert_close(pairs.values, exact, rtol=1e-6, atol=0)
    assert pairs.converged and pairs.hvps == H.hvps
    defects = H @ pairs.vectors - pairs.vectors * pairs.values
    torch.testing.assert_close(defects.norm(dim=0), pairs.residuals, rtol=1e-3, atol=1e-12)
    gram = pairs.vectors.T @ pairs.vectors
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64))


def test_the_certificate_holds():
    """Some eigenvalue lies within the residual of each value, at every tolerance."""
    model, x, y = problem((10, 20, 10), 100)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    spectrum = torch.linalg.eigvalsh(dense(closure, list(model.parameters())))
    H = Hessian(closure, model.parameters())
    for tol in (0.3, 0.1, 1e-2, 1e-4):
        for seed in range(5):
            pairs = H.top(4, tol=tol, seed=seed)
            distance = (spectrum[:, None] - pairs.values).abs().min(0).values
            assert (distance <= pairs.residuals + 1e-12).all()
            assert (pairs.residuals <= tol * pairs.values[0]).all()
            assert pairs.values[0] <= spectrum[-1] + 1e-12


@pytest.mark.slow
def test_cold_start_on_trained_digits_stays_in_its_budget_of_products():
    for seed in (0, 1):
        model, closure = digits_network(seed)
        H = Hessian(closure, model.parameters())
        exact = H.top(5, tol=1e-4, seed=99).values
        spent = {1: [], 5: []}
        for k, counts in spent.items():
            for start in range(5):
                pairs = H.top(k, tol=1e-2, seed=start)
                assert pairs.converged and (pairs.residuals <= 1e-2 * pairs.values[0]).all()
                torch.testing.assert_close(pairs.values, exact[:k], rtol=5e-3, atol=0)
                counts.append(pairs.hvps)
        assert max(spent[5]) <= 21
        assert np.mean(spent[1]) <= 10


def test_same_seed_same_answer_other_seed_other_start():
    model, x, y = problem()
    H = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    first, again, other = (H.top(1, tol=0.1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.vectors, again.vectors) and first.hvps == again.hvps
    assert not torch.equal(first.vectors, other.vectors)


def test_indefinite_and_negative_definite_hessians_give_the_algebraically_largest():
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for curvatures in ([-9.0, 1.0, 2.0, 3.0], [-4.0, -3.0, -2.0, -1.0], [0.0, 0.0, -5.0, 0.0]):
        d = torch.tensor(curvatures, dtype=torch.float64)
        found = Hessian(lambda d=d: (d * w.square()).sum() / 2, [w]).top(2).values
        torch.testing.assert_close(found, d.sort(descending=True).values[:2], rtol=0, atol=1e-12)


def test_too_small_a_budget_is_said_aloud():
    model, x, y = problem((10, 20, 10), 100)
    H = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    with pytest.warns(ConvergenceWarning, match=r"top\(k=3, tol=1e-06\) stopped after 4 HVPs") as w:
        pairs = H.top(3, tol=1e-6, max_hvps=4)
    assert not pairs.converged and pairs.hvps == 4 and pairs.values.shape == (3,)
    assert w[0].filename == __file__
    with pytest.warns(ConvergenceWarning):
        assert H.top(3, tol=1e-6, max_hvps=9, start=pairs.block).hvps <= 9


@pytest.mark.slow
def test_a_warm_start_at_the_solution_costs_its_vectors_only():
    model, closure = digits_network()
    H = Hessian(closure, model.parameters())
    for k, width in ((1, 1), (5, 7)):
        cold = H.top(k, tol=1e-3)
        assert cold.block.shape == (H.shape[0], width)
        warm = H.top(k, tol=1e-2, start=cold.block)
        assert warm.converged and warm.hvps == width
        torch.testing.assert_close(warm.values, cold.values, rtol=1e-5, atol=0)


def test_a_hopeless_warm_start_falls_back_to_lanczos():
    model, x, y = problem((10, 20, 10), 100)
    H = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    start = torch.zeros(H.shape[0], 1, dtype=H.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = H.top(1, tol=1e-8, start=start, max_hvps=200)
    torch.testing.assert_close(pairs.values, H.top(1, tol=1e-8).values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer between 1 and 2, got 0"),
        ({"k": 3}, "between 1 and 2, got 3"),
        ({"k": 1.0}, "k must be an integer"),
        ({"tol": 0}, "tol must be a finite number above 0, got 0"),
        ({"tol": float("nan")}, "tol must be"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"k": 2, "max_hvps": 1}, "max_hvps must be an integer of at least 2"),
        ({"start": torch.ones(2)}, r"start must be a tensor of shape \(2, m\), got \(2,\)"),
        ({"start": [1.0, 2.0]}, "start must be a tensor.*got list"),
        ({"start": torch.full((2, 1), torch.nan)}, "start must be finite"),
    ],
)
def test_bad_arguments_of_top(arguments, message):
    w = torch.ones(2, requires_grad=True)
    H = Hessian(lambda: w.square().sum(), [w])
    with pytest.raises(ValueError, match=message):
        H.top(**arguments)
    assert H.hvps == 0


# ---------------------------------------------------------------------- trace and density


def test_the_trace_lies_within_its_error_bars():
    model, x, y = problem((10, 20, 10), 100)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    train(model, closure, 0.5, 200)
    exact = float(dense(closure, list(model.parameters())).trace())
    H = Hessian(closure, model.parameters())
    scores = []
    for seed in range(20):
        estimate = H.trace(tol=0.05, seed=seed)
        assert estimate.converged and estimate.stderr <= 0.05 * abs(estimate.value)
        assert estimate.hvps >= 16
        scores.append((estimate.value - exact) / estimate.stderr)
    assert np.abs(scores).max() < 4 and abs(np.mean(scores)) < 1
    assert 0.4 < np.std(scores) < 2


def test_the_trace_of_a_diagonal_hessian_is_exact_and_takes_the_least_samples():
    w = torch.ones(3, requires_grad=True)
    d = torch.tensor([1.0, 2.0, 4.0])
    H = Hessian(lambda: (d * w.square()).sum() / 2, [w])
    estimate = H.trace(tol=1e-9, min_hvps=20)
    assert (estimate.value, estimate.stderr, estimate.hvps) == (7.0, 0.0, 20)
    assert Hessian(lambda: 0 * w.square().sum(), [w]).trace().value == 0


def test_a_trace_that_stays_uncertain_is_said_aloud():
    model, x, y = problem()
    H = Hessian(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    with pytest.warns(ConvergenceWarning, match="stopped after 18 HVPs"):
        estimate = H.trace(tol=1e-6, max_hvps=18)
    assert not estimate.converged and estimate.hvps == H.hvps == 18


@pytest.mark.slow
def test_the_density_integrates_to_one_and_counts_eigenvalues_where_they_are():
    model, x, y = problem((6, 12, 4), 60)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    train(model, closure, 0.5, 100)
    H = Hessian(closure, model.parameters())
    found = H.density(steps=40, probes=30, seed=1)
    assert found.hvps == H.hvps == 30 * 40
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-6)
    assert (found.density >= 0).all() and found.stderr.shape == found.grid.shape
    eigenvalues = torch.linalg.eigvalsh(dense(closure, list(model.parameters())))
    exact = torch.exp(-(((found.grid[:, None] - eigenvalues) / found.sigma) ** 2) / 2).mean(1)
    exact /= found.sigma * (2 * np.pi) ** 0.5
    within = (found.density - exact).abs() <= 4 * found.stderr + 1e-3 * exact.max()
    assert within.float().mean() > 0.97
    mean = torch.trapezoid(found.density * found.grid, found.grid)
    assert mean.item() == pytest.approx(eigenvalues.mean().item(), rel=0.2)


def test_the_density_of_a_multiple_of_the_identity_is_one_gaussian():
    w = torch.ones(50, dtype=torch.float64, requires_grad=True)
    H = Hessian(lambda: 2 * w.square().sum(), [w])
    found = H.density(steps=10, probes=3)
    assert found.hvps == 3, "the Krylov space closes at once"
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-6)
    assert found.grid[found.density.argmax()].item() == pytest.approx(4, abs=found.sigma)
    assert found.stderr.max() < 1e-6 * found.density.max()
    own = H.density(steps=2, probes=2, sigma=0.5, grid=torch.linspace(3, 5, 11))
    assert own.grid.tolist() == pytest.approx(np.linspace(3, 5, 11).tolist()) and own.sigma == 0.5
    assert own.density[5].item() == pytest.approx(1 / (0.5 * (2 * np.pi) ** 0.5))
    zero = Hessian(lambda: 0 * w.square().sum(), [w]).density(steps=2, probes=2)
    assert torch.trapezoid(zero.density, zero.grid).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda H: H.trace(tol=-1), "tol must be"),
        (lambda H: H.trace(min_hvps=1), "min_hvps must be an integer of at least 2, got 1"),
        (lambda H: H.trace(max_hvps=3), "max_hvps must be an integer of at least 16"),
        (lambda H: H.density(probes=1), "probes must be an integer of at least 2, got 1"),
        (lambda H: H.density(steps=0), "steps must be"),
        (lambda H: H.density(points=1), "points must be"),
        (lambda H: H.density(steps=1, sigma=0.0), "sigma must be a finite number above 0"),
    ],
)
def test_bad_arguments_of_trace_and_density(call, message):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        call(Hessian(lambda: w.square().sum(), [w]))


def test_auto_mode_falls_back_to_the_graph_where_forward_mode_cannot_serve():
    model, x, y = problem()
    params = list(model.parameters())

    def closure():
        return nn.functional.cross_entropy(model(x), y) + sum(p.square().sum() for p in params)

    H = Hessian(closure, params, model)
    assert H.mode == "graph", "one batch"
    H.mode = "forward"  # as chosen for several batches on a GPU
    v = torch.ones(H.shape[0], dtype=H.dtype)
    torch.testing.assert_close(H @ v, dense(closure, params) @ v)
    assert H.mode == "graph" and H.hvps == 1


@pytest.mark.slow  # torch's compiler is imported
@pytest.mark.parametrize("mode", ["graph", "forward"])
def test_a_compiled_model_has_the_hessian_of_the_module_beneath(mode):
    model, x = models.mlp((4, 8, 3), dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager")

    def hessian(net):
        return Hessian(lambda: net(x).square().mean(), net.parameters(), net, mode=mode)

    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    compiled(x).sum().backward()  # compiled before
    torch.testing.assert_close(hessian(compiled) @ v, hessian(model) @ v)


def test_vectors_of_half_precision_parameters_may_be_float32():
    """Eigenvectors then are; the product itself runs in the dtype of the parameters."""
    w = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    H = Hessian(lambda: 3 * w[0] ** 2 + w[1] ** 2, [w])
    v = torch.tensor([1.0, -2.0])
    assert torch.equal(H @ v, torch.tensor([6.0, -4.0]))
    assert torch.equal(H @ v.bfloat16(), torch.tensor([6.0, -4.0], dtype=torch.bfloat16))
    pairs = H.top(1, tol=1e-2)
    assert pairs.vectors.dtype == pairs.block.dtype == torch.float32
    assert pairs.values.item() == pytest.approx(6.0, rel=1e-2)
    with pytest.raises(ValueError, match=r"H @ v needs torch.bfloat16"):
        H @ v.double()
