"""Random state, buffers and modes are as they were; a state is taken up whole or not at all."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sam_lab.state import (
    RandomState,
    evaluating,
    kept_buffers,
    load_optimizer,
    undisturbed,
    whole_float32,
)

X = torch.linspace(-1, 1, 24).reshape(8, 3)


def draws(*generators):
    return (
        torch.rand(2).tolist(),
        random.random(),
        float(np.random.rand()),
        *(torch.rand(2, generator=g).tolist() for g in generators),
    )


def test_restoring_repeats_every_global_stream_and_the_given_generators_any_number_of_times():
    generator = torch.Generator().manual_seed(1)
    state = RandomState(generators=[generator])
    first = draws(generator)
    for _ in range(2):
        assert draws(generator) != first
        state.restore()
        assert draws(generator) == first


def test_a_generator_that_was_not_given_goes_on():
    generator = torch.Generator().manual_seed(1)
    state = RandomState()
    first = draws(generator)
    state.restore()
    assert draws(generator)[:-1] == first[:-1]
    state.restore()
    assert draws(generator)[-1] != first[-1]


def test_devices_without_random_numbers_of_their_own_are_no_error():
    state = RandomState([torch.device("cpu"), torch.device("meta")])
    first = draws()
    state.restore()
    assert draws() == first


@pytest.mark.cuda
def test_on_cuda_the_stream_of_the_device_is_kept_too():
    device = torch.device("cuda", torch.cuda.current_device())
    state = RandomState([device])
    first = torch.rand(2, device=device)
    state.restore()
    assert torch.equal(first, torch.rand(2, device=device))


def held(model):
    """Buffers by name, as objects and as values."""
    return {
        name: (b, None if b is None else (b.clone(), b._version))
        for module_name, module in model.named_modules()
        for name, b in ((f"{module_name}.{n}", b) for n, b in module._buffers.items())
    }


def assert_held(before, model):
    after = held(model)
    assert list(after) == list(before)
    for name, (b, was) in before.items():
        assert after[name][0] is b, f"{name} is another tensor"
        if was is not None:
            assert torch.equal(was[0], b) and was[1] == b._version, f"{name} was written to"


class Counter(nn.Module):
    """Replaces its buffer, as modules of users do, instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.seen = self.seen + x.detach().mean(0)
        return x


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_the_buffers_of_every_kind_are_the_same_tensors_as_before_and_not_written_to(failure):
    model = nn.Sequential(
        Counter(),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Unflatten(1, (3, 1)),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    x = X.unsqueeze(-1).expand(-1, -1, 2)
    model[5](x)
    before = held(model)

    def run():
        with kept_buffers(model):
            model[:4](X)
            model[5](x)
            assert model[0].seen.any() and model[1].num_batches_tracked == 1  # on copies
            model.register_buffer("stray", torch.ones(1))
            del model[0].nothing
            if failure is not None:
                raise failure("in the middle")

    if failure is None:
        run()
    else:
        with pytest.raises(failure):
            run()
    assert_held(before, model)


def test_copies_start_from_the_present_values_and_keep_dtype_and_sharing():
    model = nn.Sequential(nn.BatchNorm1d(3), Counter())
    model(X)
    model[1].also = model[0].running_mean
    model[1].register_buffer("shared", model[0].running_mean)
    values = {name: b.clone() for name, b in model.named_buffers()}
    with kept_buffers(model):
        assert model[1].shared is model[0].running_mean
        assert model[1].shared is not model[1].also
        for name, b in model.named_buffers():
            assert torch.equal(b, values[name]) and b.dtype == values[name].dtype
    assert model[1].shared is model[0].running_mean is model[1].also


def test_buffers_that_are_not_saved_stay_out_of_the_state_dict():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(2))
    model.register_buffer("b", torch.zeros(2), persistent=False)
    with kept_buffers(model):
        assert list(model.state_dict()) == ["a"]
    assert list(model.state_dict()) == ["a"]


def test_blocks_can_be_nested():
    model = nn.BatchNorm1d(3)
    before = held(model)
    with kept_buffers(model):
        model(X)
        with kept_buffers(model):
            model(X)
            assert model.num_batches_tracked == 2
        assert model.num_batches_tracked == 1
    assert_held(before, model)


def test_a_buffer_that_cannot_be_copied_leaves_all_as_they_were(monkeypatch):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = held(model)
    calls = iter(range(10))
    clone = torch.Tensor.clone

    def fails(self, *args, **kwargs):
        if next(calls) == 4:
            raise MemoryError("no room for a copy")
        return clone(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", fails)
        with pytest.raises(MemoryError), kept_buffers(model):
            raise AssertionError("the block must not run")
    assert_held(before, model)


def test_without_a_model_nothing_happens():
    with kept_buffers(None):
        ran = True
    assert ran


# --- modes ----------------------------------------------------------------------------------------


def partly_frozen():
    """In training, but for one batch norm and what is inside the last block."""
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.Linear(3, 3))
    )
    model[1].eval()
    model[2].eval()
    model[2][1].train()
    return model, [True, True, False, False, False, True]


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_each_module_has_its_own_mode_again(failure):
    model, expected = partly_frozen()
    assert [module.training for module in model.modules()] == expected

    def run():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            model[0].train()  # what is done inside is undone too
            if failure is not None:
                raise failure("in the middle")

    if failure is None:
        run()
    else:
        with pytest.raises(failure):
            run()
    assert [module.training for module in model.modules()] == expected


def test_evaluation_inside_evaluation_is_one():
    model, expected = partly_frozen()
    with evaluating(model):
        with evaluating(model[2]):
            pass
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == expected


def test_a_model_that_cannot_be_put_into_evaluation_keeps_its_modes():
    class Stubborn(nn.Module):
        def train(self, mode=True):
            if not mode:
                raise RuntimeError("always in training")
            return super().train(mode)

    model = nn.Sequential(nn.Dropout(), Stubborn())
    with pytest.raises(RuntimeError, match="always"), evaluating(model):
        raise AssertionError("the block must not run")
    assert all(module.training for module in model.modules())


def test_evaluation_writes_to_no_buffer():
    model = nn.Sequential(Counter(), nn.BatchNorm1d(3))
    model(X)
    before = held(model[1])
    with evaluating(model):
        model(X)
    assert_held(before, model[1])


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_afterwards_nobody_can_tell_that_there_were_passes(failure):
    model, expected = partly_frozen()
    model.append(Counter())
    model[0].weight.grad = grad = torch.ones(3)
    other = torch.ones(2, requires_grad=True)
    other.grad = its_grad = torch.zeros(2)
    generator = torch.Generator().manual_seed(1)
    buffers, state = held(model), RandomState(generators=[generator])
    first = draws(generator)
    state.restore()

    def run():
        with undisturbed(model, [other], [generator]):
            assert other.grad is None and all(p.grad is None for p in model.parameters())
            model.train()
            (model(X).sum() + other.sum()).backward()
            assert other.grad.any() and model[0].num_batches_tracked == 1
            draws(generator)
            if failure is not None:
                raise failure("in the middle")

    if failure is None:
        run()
    else:
        with pytest.raises(failure):
            run()
    assert [module.training for module in model.modules()] == [*expected, True]
    assert model[0].weight.grad is grad and torch.equal(grad, torch.ones(3))
    assert other.grad is its_grad and not its_grad.any()
    assert [p.grad for p in model.parameters()][1:] == [None] * 5
    assert_held(buffers, model)
    assert draws(generator) == first


def test_every_pass_inside_can_begin_alike():
    model, expected = partly_frozen()
    generator = torch.Generator().manual_seed(1)
    with undisturbed(model, generators=[generator]) as reset:
        first = draws(generator)
        model.eval()
        reset()
        assert draws(generator) == first
        assert [module.training for module in model.modules()] == expected


def test_without_a_model_random_state_and_the_gradients_of_tensors_are_kept():
    w = torch.ones(2, requires_grad=True)
    with undisturbed(None, [w]):
        first = draws()
        w.sum().backward()
    assert w.grad is None and draws() == first


# --- the state of an optimizer --------------------------------------------------------------------

HEAVY_BALL = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.1)


def weights_and_optimizer(make, count=2):
    """Some parameters after two steps, and the optimizer that took them."""
    params = [nn.Parameter(torch.arange(1.0, 4.0)) for _ in range(count)]
    optimizer = make(params)
    for _ in range(2):
        take_step(params, optimizer)
    return params, optimizer


def take_step(params, optimizer):
    optimizer.zero_grad()
    sum(p.square().sum() for p in params).backward()
    optimizer.step()


def assert_alike(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("make", [HEAVY_BALL, ADAMW])
def test_an_optimizer_goes_on_from_the_state_of_another_and_shares_nothing_with_it(make):
    """Trap: torch's optimizers keep the tensors of the state they are given."""
    params, optimizer = weights_and_optimizer(make)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(twins)
    load_optimizer(twin, optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    take_step(twins, twin)
    assert_alike(optimizer.state_dict(), before)
    take_step(params, optimizer)
    assert_alike(list(params), list(twins))
    assert_alike(optimizer.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        weights_and_optimizer(HEAVY_BALL)[1].state_dict(),
        torch.optim.SGD([torch.ones(3), torch.ones(3)]).state_dict(),
        weights_and_optimizer(ADAMW, count=3)[1].state_dict(),
    ],
    ids=["nothing", "empty", "another kind", "another kind, unused", "more parameters"],
)
def test_a_state_that_does_not_fit_leaves_the_optimizer_as_it_was(state):
    """Trap: torch's AdamW loads the state of SGD, and fails at the next step."""
    params, optimizer = weights_and_optimizer(ADAMW)
    twins, twin = weights_and_optimizer(ADAMW)
    with pytest.raises(ValueError, match="state is not of an optimizer like this AdamW: "):
        load_optimizer(optimizer, state)
    assert_alike(optimizer.state_dict(), twin.state_dict())
    take_step(params, optimizer)
    take_step(twins, twin)
    assert_alike(list(params), list(twins))


@pytest.mark.parametrize("before", [True, False])
def test_float32_is_whole_inside_and_as_before_afterwards(monkeypatch, before):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with pytest.raises(KeyError), whole_float32():
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.cuda
def test_a_convolution_on_a_gpu_has_all_digits_of_float32():
    x, w = (torch.randn(8, 64, 9, 9, device="cuda") for _ in range(2))
    with whole_float32():
        found = nn.functional.conv2d(x, w, padding=4)
    wanted = nn.functional.conv2d(x.double(), w.double(), padding=4)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
