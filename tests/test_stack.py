"""A stack of runs: each goes as it would alone, and none knows of the others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sam_lab import SAM, models
from sam_lab.stack import Stack

STEPS = 6


def data(examples: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (examples,), generator=generator)


def networks(runs: int = 4) -> list[nn.Module]:
    return [models.mlp([3, 6, 5, 4], seed=seed, dtype=torch.float64) for seed in range(runs)]


def loss(forward, x, y):
    return F.cross_entropy(forward(x), y)


def alone(model, lr, rho, momentum, batches):
    """The losses and the last weights of one run by torch's optimizer and `SAM`."""
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), rho, model)
    losses = [sam.step(lambda x=x, y=y: loss(model, x, y)) for x, y in batches]
    return torch.stack(losses), nn.utils.parameters_to_vector(model.parameters()).detach()


def weights_of(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


SETTINGS = {"lr": [0.1, 0.3, 0.05, 0.2], "rho": [0.0, 0.05, 0.2, 0.5], "momentum": [0, 0.9, 0.5, 0]}


@pytest.mark.parametrize("rho", [[0.0] * 4, SETTINGS["rho"]], ids=["SGD", "SAM"])
def test_each_run_goes_as_it_would_alone(rho):
    nets, batches = networks(), [data(seed=step) for step in range(STEPS)]
    stack = Stack(nets, loss, SETTINGS["lr"], rho, SETTINGS["momentum"])
    losses = torch.stack([stack.step(*batch) for batch in batches])
    for run, model in enumerate(stack.models()):
        expected, weights = alone(
            nets[run], SETTINGS["lr"][run], rho[run], SETTINGS["momentum"][run], batches
        )
        torch.testing.assert_close(losses[:, run], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(weights_of(model), weights, rtol=1e-11, atol=1e-13)


def test_runs_may_have_batches_of_their_own():
    nets = networks(3)
    batches = [[data(seed=10 * step + run) for run in range(3)] for step in range(STEPS)]
    stack = Stack(nets, loss, 0.2, 0.1)
    for own in batches:
        x, y = (torch.stack(part) for part in zip(*own, strict=True))
        stack.step(x, y, own=True)
    for run, model in enumerate(stack.models()):
        _, weights = alone(nets[run], 0.2, 0.1, 0, [own[run] for own in batches])
        torch.testing.assert_close(weights_of(model), weights, rtol=1e-11, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(
    rhos=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 2.0]), min_size=1, max_size=4),
    lr=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_what_stands_beside_a_run_does_not_move_it(rhos, lr):
    """The usual mistake is one norm over the stack: it would shrink the perturbation of each."""
    nets, batch = networks(len(rhos)), data()
    together = Stack(nets, loss, lr, rhos)
    together.step(*batch)
    for run, (model, net) in enumerate(zip(together.models(), nets, strict=True)):
        single = Stack([net], loss, lr, rhos[run])
        single.step(*batch)
        (other,) = single.models()
        torch.testing.assert_close(weights_of(model), weights_of(other), rtol=1e-12, atol=1e-14)


def test_a_run_that_diverges_rests_and_the_others_go_on():
    nets, batch = networks(2), data()
    with torch.no_grad():
        next(nets[0].parameters()).fill_(math.nan)
    stack = Stack(nets, loss, 0.2, 0.1, 0.9)
    for _ in range(3):
        stack.step(*batch)
    broken, sound = stack.models()
    _, weights = alone(nets[1], 0.2, 0.1, 0.9, [batch] * 3)
    torch.testing.assert_close(weights_of(sound), weights, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weights_of(broken), weights_of(nets[0]), equal_nan=True)


def test_a_run_at_a_stationary_point_is_not_perturbed():
    nets = networks(2)
    with torch.no_grad():
        for p in nets[0].parameters():
            p.zero_()
    stack = Stack(nets, lambda forward, x: forward(x).square().mean(), 0.1, 0.3)
    stack.step(data()[0])
    still, _ = stack.models()
    assert not weights_of(still).any()


def test_the_networks_that_were_given_stay_as_they_were():
    nets, batch = networks(2), data()
    before = [weights_of(net) for net in nets]
    stack = Stack(nets, loss, 0.2)
    stack.step(*batch)
    for net, weights in zip(nets, before, strict=True):
        assert torch.equal(weights_of(net), weights)
    assert len(stack) == 2


def test_losses_take_no_step():
    nets, batch = networks(3), data()
    stack = Stack(nets, loss, 0.2, 0.1)
    expected = torch.stack([loss(net, *batch).detach() for net in nets])
    torch.testing.assert_close(stack.losses(*batch), expected)
    torch.testing.assert_close(stack.losses(*batch), stack.step(*batch))


def test_what_is_frozen_and_buffers_are_each_networks_own():
    class Shifted(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.tensor(shift), requires_grad=False)
            self.register_buffer("scale", torch.tensor(1 + shift))
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.scale * self.w * x + self.frozen

    nets = [Shifted(0.5), Shifted(2.0)]
    stack = Stack(nets, lambda forward, x: forward(x).mean(), 0.1)
    x = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(stack.step(x), torch.tensor([1.5 * 2 + 0.5, 3 * 2 + 2.0]))
    assert list(stack.weights) == ["w"]
    for model, net in zip(stack.models(), nets, strict=True):
        assert torch.equal(model.frozen, net.frozen)
        torch.testing.assert_close(model.w.detach(), 1 - 0.1 * net.scale * 2)


def test_dropout_differs_from_run_to_run():
    nets = [nn.Sequential(nn.Dropout(0.5), models.mlp([50, 1], seed=0)) for _ in range(2)]
    torch.manual_seed(0)
    one, two = Stack(nets, lambda forward, x: forward(x).sum(), 0.1).step(torch.ones(8, 50))
    assert one != two


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"models": []}, ValueError, "models must hold at least one"),
        ({"models": [len]}, TypeError, "models must be torch.nn.Modules, got builtin"),
        ({"models": [nn.Flatten()]}, ValueError, "no parameters that require grad"),
        ({"models": [nn.Linear(2, 1), nn.Linear(3, 1)]}, ValueError, "network 1 has others"),
        (
            {"models": [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]},
            ValueError,
            "the layer '1' keeps running statistics",
        ),
        ({"lr": -0.1}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        ({"rho": [0.1]}, ValueError, "rho must be one number, or one for each of the 2 runs"),
        ({"momentum": [0.1, math.nan]}, ValueError, "momentum must be a finite number"),
    ],
)
def test_what_cannot_be_stacked_is_named(arguments, kind, message):
    given_ = {"models": networks(2), "loss": loss, "lr": 0.1, **arguments}
    with pytest.raises(kind, match=message):
        Stack(**given_)


def test_own_batches_are_one_a_run():
    with pytest.raises(ValueError, match=r"need tensors of shape \(2, ...\)"):
        Stack(networks(2), loss, 0.1).step(*data(12), own=True)
