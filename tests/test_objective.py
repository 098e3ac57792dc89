"""A measurement changes nothing, and bad input is named."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sam_lab import Hessian

X = torch.linspace(-1, 1, 24).reshape(8, 3)


def network(*extra):
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1))
    torch.set_rng_state(torch_state)
    return model


def everything(model):
    """All that a measurement could disturb."""
    return {
        "buffers": [(id(b), b.clone(), b._version) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "grads": [
            (id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ],
        "values": [(p.clone(), p._version) for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0, msg=f"{key} changed")


@pytest.mark.parametrize("mode", ["graph", "forward"])
@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_modes_buffers_gradients_and_random_state_are_as_before(mode, failure):
    model = network(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()  # modes differ from module to module
    model[0].weight.grad = torch.ones_like(model[0].weight)
    held = list(model.parameters())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        for p in held:  # a closure with bad manners
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        model.eval()
        model.train()
        model[0].register_buffer("stray", torch.ones(1))
        random.random(), np.random.rand(), torch.rand(1)
        loss = model(X).square().mean()
        if failure is not None and calls == 2:
            raise failure("in the middle")
        return loss

    H = Hessian(closure, model.parameters(), model=model, mode=mode)
    before = everything(model)

    def measure():
        H.top(1)
        H.trace(tol=10.0)
        H.density(steps=3, probes=2)
        H.reset()
        H.gradient()

    if failure is None:
        measure()
    else:
        with pytest.raises(failure):
            measure()
    assert_same(before, everything(model))
    assert calls >= 2


def test_exceptions_leave_an_operator_that_works():
    model = network(nn.BatchNorm1d(4))
    broken = True

    def closure():
        if broken:
            raise RuntimeError("not yet")
        return model(X).square().mean()

    H = Hessian(closure, model.parameters(), model=model)
    with pytest.raises(RuntimeError, match="not yet"):
        H.top()
    broken = False
    assert H.top().converged


def test_a_shared_buffer_stays_shared():
    model = network(nn.BatchNorm1d(4))
    model.register_buffer("also", model[1].running_mean)
    seen = []

    def closure():
        seen.append(model.also is model[1].running_mean)
        return model(X).square().mean()

    Hessian(closure, model.parameters(), model=model).loss()
    assert seen == [True] and model.also is model[1].running_mean


def test_batchnorm_in_training_mode_uses_batch_statistics():
    model = network(nn.BatchNorm1d(4))
    for training in (True, False):
        model.train(training)
        H = Hessian(lambda: model(X).square().mean(), model.parameters(), model=model)
        reference = network(nn.BatchNorm1d(4)).train(training)
        assert H.loss() == pytest.approx(reference(X).square().mean().item())


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("mode", ["graph", "forward"])
def test_dropout_masks_are_frozen(mode, batches):
    """Same mask at every evaluation, whatever the caller draws: symmetric and repeatable."""
    model = network(nn.Dropout(0.5)).double()
    data = list(X.double().chunk(batches))
    H = Hessian.over(data, lambda x: model(x).square().mean(), model.parameters(), model, mode)
    eye = torch.eye(H.shape[0], dtype=H.dtype)
    first = H @ eye
    torch.rand(7)
    H.reset()
    torch.testing.assert_close(H @ eye, first)
    torch.testing.assert_close(first, first.T)
    loss = H.loss()
    torch.rand(7)
    H.reset()
    assert H.loss() == loss


def test_loss_gradient_and_products_speak_of_the_same_mask():
    model = network(nn.Dropout(0.5)).double()
    data = list(X.double().chunk(4))
    flat = []
    for mode in ("graph", "forward"):
        torch.manual_seed(1)
        H = Hessian.over(data, lambda x: model(x).square().mean(), model.parameters(), model, mode)
        flat.append((H.gradient(), H @ torch.ones(H.shape[0], dtype=H.dtype)))
    torch.testing.assert_close(flat[0], flat[1])


def test_a_loader_with_its_own_generator_shuffles_on_as_if_nothing_had_been():
    model = network()

    def order(measure):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(X), batch_size=3, shuffle=True, generator=generator)
        if measure:
            Hessian.over(loader, lambda x: model(x).square().mean(), model.parameters()).top()
        return torch.cat([x for (x,) in loader])

    torch.testing.assert_close(order(True), order(False), rtol=0, atol=0)


def test_works_inside_no_grad_inference_mode_and_autocast():
    model = network(nn.BatchNorm1d(4)).eval()
    H = Hessian(lambda: model(X).square().mean(), model.parameters(), model)
    reference = H.top().values
    with torch.no_grad():
        assert torch.equal(H.top().values, reference)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(H.top().values, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(H.top().values, reference)


W = torch.tensor([1.0, 2.0], requires_grad=True)


def square():
    return W.square().sum()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Hessian(3, [W]), TypeError, "closure must be callable, got int"),
        (lambda: Hessian(square, W), TypeError, r"pass \[tensor\]"),
        (lambda: Hessian(square, []), ValueError, "params is empty"),
        (lambda: Hessian(square, ["w"]), TypeError, r"params\[0\] must be a tensor, got str"),
        (
            lambda: Hessian(square, [torch.ones(2)]),
            ValueError,
            r"params\[0\] does not require grad",
        ),
        (lambda: Hessian(square, [torch.ones(2).int()]), ValueError, "floating point.*int32"),
        (lambda: Hessian(square, [W * 2]), ValueError, r"params\[0\] must be a leaf"),
        (
            lambda: Hessian(square, [W, torch.empty(0, 3, requires_grad=True)]),
            ValueError,
            r"params\[1\] has no entries: its shape is \(0, 3\)",
        ),
        (
            lambda: Hessian(square, [W, torch.ones(1, dtype=torch.float64, requires_grad=True)]),
            ValueError,
            r"one dtype and device.*float64",
        ),
        (lambda: Hessian(square, [W, W]), ValueError, "same tensor twice"),
        (lambda: Hessian(square, [W], model=3), TypeError, "model must be .*got int"),
        (lambda: Hessian(square, [W], mode="fast"), ValueError, "mode must be .*'fast'"),
        (lambda: Hessian(square, [W], mode="forward"), ValueError, "give model="),
        (
            lambda: Hessian(square, [W], model=nn.Linear(1, 1), mode="forward"),
            ValueError,
            "parameters of the model",
        ),
        (lambda: Hessian.over([X], 3, [W]), TypeError, "loss_fn must be callable"),
        (lambda: Hessian.over(3, square, [W]), TypeError, "batches must be a list"),
        (lambda: Hessian.over([], square, [W]), ValueError, "batches is empty"),
        (lambda: Hessian.over(iter([X]), square, [W]), TypeError, "more than once"),
        (lambda: Hessian.over((x for x in [X]), square, [W]), TypeError, "more than once"),
    ],
)
def test_bad_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda: W * torch.inf, ValueError, r"real scalar, got torch.float32 of shape \(2,\)"),
        (lambda: 3.0, TypeError, "the loss must be a tensor, got float"),
        (lambda: W.sum() * torch.nan, FloatingPointError, "loss is not finite"),
        (lambda: W.sum() * torch.inf, FloatingPointError, "loss is not finite"),
        (lambda: W.detach().sum(), ValueError, "does not require grad"),
        (lambda: torch.ones(1, requires_grad=True).sum(), ValueError, "none of the parameters"),
        (lambda: (W - W).abs().sqrt().sum(), FloatingPointError, "gradient is not finite"),
        (
            lambda: ((W - W.detach()).abs() ** 1.5).sum(),
            FloatingPointError,
            "product is not finite",
        ),
    ],
)
def test_bad_losses(closure, error, message):
    H = Hessian(closure, [W])
    with pytest.raises(error, match=message):
        H @ torch.ones(2)
    assert H.hvps in (0, 1)


def test_a_closure_that_calls_backward_is_told_so_and_leaves_no_gradient():
    def closure():
        loss = W.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="without calling backward"):
        Hessian(closure, [W]).top()
    assert W.grad is None


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([{"x": X}], TypeError, "batch 0 must be a tensor or a tuple of tensors, got dict"),
        ([X, X[:0]], ValueError, "batch 1 has size 0"),
    ],
)
def test_bad_batches(batches, error, message):
    with pytest.raises(error, match=message):
        Hessian.over(batches, lambda x: (x @ torch.ones(3) * W.sum()).mean(), [W]).loss()


def test_a_data_set_of_unknown_length_that_is_empty():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="batches is empty"):
        Hessian.over(DataLoader(Stream()), square, [W]).loss()
