"""The Gauss-Newton operator against dense Jacobians and against the Hessian."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sam_lab import Hessian, SharpnessTracker, models
from sam_lab.gauss_newton import (
    GaussNewton,
    input_gradient_bound,
    jacobian,
    noise_alignment,
    noise_kernel,
)
from sam_lab.stability import noise_kernel_norm

MODES = ["graph", "forward"]


def half_squared(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(1).mean()


LOSSES = {"squared error": half_squared, "cross-entropy": functional.cross_entropy}


class Problem:
    def __init__(self, loss, activation="tanh", examples=7):
        generator = torch.Generator().manual_seed(0)
        self.model = models.mlp((4, 6, 3), activation, dtype=torch.float64)
        self.x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (examples,), generator=generator)
        self.loss_fn = LOSSES[loss]
        self.y = functional.one_hot(labels).double() if loss == "squared error" else labels
        self.params = list(self.model.parameters())
        self.size = sum(p.numel() for p in self.params)

    def outputs(self):
        return self.model(self.x)

    def loss(self, outputs):
        return self.loss_fn(outputs, self.y)

    def operator(self, mode="auto"):
        return GaussNewton(self.outputs, self.loss, self.params, self.model, mode)

    def dense(self):
        """J^T H_L J from the rows of J, one backward pass each, and torch's dense H_L."""
        outputs = self.outputs()
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, self.params, retain_graph=True)])
            for o in outputs.flatten()
        ]
        jacobian = torch.stack(rows)
        bend = torch.autograd.functional.hessian(
            lambda z: self.loss(z.view(outputs.shape)), outputs.detach().flatten()
        )
        return jacobian.T @ bend @ jacobian


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_dense_product_of_jacobians(loss, mode):
    problem = Problem(loss)
    G = problem.operator(mode)
    made = G @ torch.eye(problem.size, dtype=torch.float64)
    torch.testing.assert_close(made, problem.dense())
    assert G.hvps == problem.size
    assert float(torch.linalg.eigvalsh(made)[0]) > -1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_for_a_linear_network_it_is_the_hessian(loss):
    problem = Problem(loss)
    problem.model = nn.Linear(4, 3).double()
    params = list(problem.model.parameters())
    H = Hessian(lambda: problem.loss(problem.outputs()), params)
    G = GaussNewton(problem.outputs, problem.loss, params)
    eye = torch.eye(H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(G @ eye, H @ eye)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_batches_of_unequal_sizes_make_the_same_operator(loss, mode):
    problem = Problem(loss)
    batches = list(zip(problem.x.split(3), problem.y.split(3), strict=True))
    G = GaussNewton.over(
        batches,
        lambda x, _: problem.model(x),
        lambda outputs, _, y: problem.loss_fn(outputs, y),
        problem.params,
        problem.model,
        mode,
    )
    v = torch.arange(problem.size, dtype=torch.float64)
    torch.testing.assert_close(G @ v, problem.dense() @ v)
    whole = problem.operator()
    assert G.loss() == pytest.approx(whole.loss())
    torch.testing.assert_close(G.gradient(), whole.gradient())
    assert "GaussNewton" in repr(G)


@pytest.mark.parametrize("mode", MODES)
def test_spectrum_and_tracker_work_on_it(mode):
    problem = Problem("cross-entropy")
    dense = torch.linalg.eigvalsh(problem.dense()).flip(0)
    pairs = problem.operator(mode).top(3, tol=1e-8)
    torch.testing.assert_close(pairs.values, dense[:3])
    trace = problem.operator(mode).trace(tol=0.02, max_hvps=3000)
    assert abs(trace.value - float(dense.sum())) < 5 * trace.stderr
    density = problem.operator(mode).density(steps=problem.size, probes=2)
    assert float(torch.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=1e-3)
    tracker = SharpnessTracker(problem.operator(mode), tol=1e-6)
    for _ in range(3):
        tracker.measure()
        with torch.no_grad():
            problem.params[0].mul_(1.1)
    top = torch.linalg.eigvalsh(problem.dense())[-1]
    torch.testing.assert_close(tracker.measure().values[0], top)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_and_loss_are_those_of_the_hessian_at_the_current_parameters(mode):
    problem = Problem("squared error")
    G = problem.operator(mode)
    G @ torch.ones(problem.size, dtype=torch.float64)
    with torch.no_grad():
        problem.params[0].add_(0.5)
    H = Hessian(lambda: problem.loss(problem.outputs()), problem.params)
    assert G.loss() == pytest.approx(H.loss())
    torch.testing.assert_close(G.gradient(), H.gradient())
    v = torch.ones(problem.size, dtype=torch.float64)
    torch.testing.assert_close(G @ v, problem.dense() @ v)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_linear_in_the_outputs_has_none(mode):
    problem = Problem("squared error")
    G = GaussNewton(problem.outputs, lambda f: f.sum(), problem.params, problem.model, mode)
    assert not bool((G @ torch.ones(problem.size, dtype=torch.float64)).any())


@pytest.mark.parametrize("mode", MODES)
def test_frozen_and_unused_parameters(mode):
    problem = Problem("squared error")
    spare = nn.Linear(2, 2).double()
    both = nn.ModuleList([problem.model, spare])
    params = [*problem.params[2:], *spare.parameters()]
    G = GaussNewton(problem.outputs, problem.loss, params, both, mode)
    first = sum(p.numel() for p in problem.params[:2])
    wanted = torch.zeros(G.shape, dtype=torch.float64)
    used = problem.size - first
    wanted[:used, :used] = problem.dense()[first:, first:]
    torch.testing.assert_close(G @ torch.eye(G.shape[0], dtype=torch.float64), wanted)


def test_wrong_arguments_are_named():
    problem = Problem("squared error")
    with pytest.raises(TypeError, match="outputs must be callable, got Tensor"):
        GaussNewton(problem.x, problem.loss, problem.params)
    with pytest.raises(TypeError, match="loss_fn must be callable, got Tensor"):
        GaussNewton(problem.outputs, problem.y, problem.params)
    G = GaussNewton(lambda: (problem.outputs(),), lambda f: f[0].sum(), problem.params)
    with pytest.raises(TypeError, match="outputs must return one tensor, got tuple"):
        G.loss()
    with pytest.raises(ValueError, match="reads them directly"):
        GaussNewton(
            lambda: problem.outputs() * problem.params[0].sum(),
            problem.loss,
            problem.params,
            problem.model,
            "forward",
        ) @ torch.ones(problem.size, dtype=torch.float64)


# --- the noise of minibatches --------------------------------------------------------------------


class OneOutput:
    def __init__(self, examples=20):
        generator = torch.Generator().manual_seed(0)
        self.model = models.mlp((4, 6, 1), "tanh", dtype=torch.float64)
        self.x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
        self.params = list(self.model.parameters())
        self.matrix = GaussNewton(
            lambda: self.model(self.x), lambda f: f.square().mean() / 2, self.params
        )

    def rows(self):
        return torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(self.model(one[None]), self.params)]
                )
                for one in self.x
            ]
        )


def test_the_jacobian_has_the_gradients_of_the_outputs_as_rows():
    net = OneOutput()
    torch.testing.assert_close(jacobian(net.model, net.x), net.rows())


def test_the_jacobian_wants_one_output():
    with pytest.raises(ValueError, match=r"one output an example, got shape \(1, 3\)"):
        jacobian(models.mlp((4, 6, 3)), torch.zeros(2, 4))


def test_the_noise_kernel_by_products_is_that_of_the_eigenvalues():
    net = OneOutput()
    values = torch.linalg.svdvals(net.rows()) ** 2 / 20
    lr = 1.9 / float(values[0])
    expected = noise_kernel_norm(values, lr, 2, 20)
    found = noise_kernel(net.matrix, lr, 2, 20, probes=30)
    assert abs(found.value - expected) < 4 * found.stderr < 0.1 * expected
    assert found.hvps == net.matrix.hvps
    assert noise_kernel(net.matrix, 2.1 / float(values[0]), 2, 20).value == float("inf")


def test_the_trace_of_a_function_is_exact_where_all_eigenvalues_are_found():
    net = OneOutput()
    values = torch.linalg.eigvalsh(net.rows().T @ net.rows() / 20)
    found = net.matrix.trace_of(torch.exp, deflate=1000, tol=1e-6)
    assert found.value == pytest.approx(float(values.exp().sum()), rel=1e-6)
    assert found.stderr == 0


def test_the_alignment_is_that_of_the_dense_matrices():
    net = OneOutput()
    rows, r = net.rows(), torch.randn(20, dtype=torch.float64)
    G = rows.T @ rows / 20
    gradients = r[:, None] * rows
    sigma = torch.cov(gradients.T, correction=0)
    dense = (sigma * G).sum() / ((r**2).mean() * (G**2).sum())
    assert noise_alignment(rows, r) == pytest.approx(float(dense))


@pytest.mark.parametrize(
    ("rows", "residuals", "message"),
    [
        (torch.ones(3, 2), torch.ones(2), r"got \(3, 2\) and \(2,\)"),
        (torch.ones(3, 2), torch.zeros(3), "must not all be zero"),
    ],
)
def test_the_alignment_refuses(rows, residuals, message):
    with pytest.raises(ValueError, match=message):
        noise_alignment(rows, residuals)


def test_the_first_layer_bounds_the_gradient_in_the_inputs_and_is_met_by_a_linear_network():
    net = OneOutput()
    weight = net.params[0].detach()
    first = net.rows()[:, : weight.numel()].unflatten(1, weight.shape)
    inputs = net.x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(net.model(inputs).sum(), inputs)
    bound = input_gradient_bound(weight, first, net.x)
    assert bool((slopes.norm(dim=1) <= bound * (1 + 1e-12)).all())
    # f(x) = w.x has one row: a = 1, and the bound is |w|
    row = torch.tensor([[3.0, 4.0]])
    assert input_gradient_bound(row, torch.ones(1, 1, 2), torch.ones(1, 2)).item() == 5.0


@pytest.mark.parametrize(
    ("slopes", "x", "message"),
    [
        (torch.ones(3, 2, 5), torch.ones(3, 4), r"got \(2, 4\), \(3, 2, 5\) and \(3, 4\)"),
        (torch.ones(3, 2, 4), torch.zeros(3, 4), "no input of zeros"),
    ],
)
def test_the_bound_by_the_first_layer_refuses(slopes, x, message):
    with pytest.raises(ValueError, match=message):
        input_gradient_bound(torch.ones(2, 4), slopes, x)
