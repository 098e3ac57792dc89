"""The two passes of a step: running statistics and random numbers are those of one.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

import random

import numpy as np
import pytest
import torch
from sam_problem import SGD, X, Y, assert_equal, copies, length, loss_of, network
from torch import nn

from sam_lab import SAM
from sam_lab.perturbations import random_direction, unnormalized


class Mean(nn.Module):
    """Replaces its buffer instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen = 0.5 * self.seen + x.detach().mean(0)
        return x


def with_statistics():
    return nn.Sequential(
        nn.Linear(3, 3),
        nn.BatchNorm1d(3),
        nn.Linear(3, 3),
        nn.BatchNorm1d(3, momentum=None),
        Mean(),
        nn.BatchNorm1d(3).eval(),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Unflatten(1, (1, 3)),
        nn.InstanceNorm1d(1, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(3, 1),
    )


@pytest.mark.parametrize("by_hand", [False, True])
def test_running_statistics_after_a_step_are_those_of_one_clean_pass(by_hand):
    """Traps: updated twice, at w + eps too (davda54/sam#17); num_batches_tracked; momentum=None."""
    model, twin = with_statistics(), with_statistics()
    twin.load_state_dict(model.state_dict())
    sam = SAM(SGD(model.parameters()), 0.5, model)
    modes = [m.training for m in model.modules()]
    for step in range(3):  # a helper that is called twice forgets the momentum it had saved
        twin.load_state_dict(model.state_dict())
        twin(X + step)

        def closure():
            return (model(X + step) - Y).square().mean()  # noqa: B023

        if by_hand:
            sam.optimizer.zero_grad()
            closure().backward()
            with sam.perturbed():
                closure().backward()
            sam.optimizer.step()
        else:
            sam.step(closure)
        assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))
        assert [m.training for m in model.modules()] == modes
    assert model[1].num_batches_tracked == 3 and model[1].momentum == 0.1
    assert model[5].num_batches_tracked == 0


def test_without_the_model_running_statistics_are_updated_in_both_passes():
    model = with_statistics()
    SAM(SGD(model.parameters())).step(lambda: model(X).square().mean())
    assert model[1].num_batches_tracked == 2


class Noisy(nn.Module):
    """Dropout that keeps its masks, and noise of Python and NumPy."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        self.drawn.append((mask, random.random(), float(np.random.rand())))
        return x * mask


def following():
    return torch.rand(3), random.random(), float(np.random.rand())


def pinned(function):
    """The result of a function that starts from the same random state each time."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    try:
        return function()
    finally:
        torch.set_rng_state(states[0]), random.setstate(states[1]), np.random.set_state(states[2])


@pytest.mark.parametrize("by_hand", [False, True])
def test_both_passes_see_the_same_random_numbers_and_those_after_are_of_one_pass(by_hand):
    """Trap: two dropout masks make SAM compare two functions."""
    noise = Noisy()
    model = network(noise)
    sam = SAM(SGD(model.parameters()))

    def run():
        if by_hand:
            before = sam.random_state()
            loss_of(model)().backward()
            with sam.perturbed(random_state=before):
                loss_of(model)().backward()
        else:
            sam.step(loss_of(model))
        return following()

    after_sam = pinned(run)
    assert_equal(*noise.drawn)
    pinned_once = pinned(lambda: (loss_of(model)(), following())[1])
    assert_equal(after_sam, pinned_once)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_passes_draw_on_if_that_is_wished(by_hand):
    noise = Noisy()
    model = network(noise)
    sam = SAM(SGD(model.parameters()), same_rng=False)
    if by_hand:
        loss_of(model)().backward()
        with sam.perturbed():
            loss_of(model)().backward()
    else:
        sam.step(loss_of(model))
    (one, *_), (two, *_) = noise.drawn
    assert not torch.equal(one, two)


def test_every_micro_batch_has_the_mask_of_its_own_clean_pass():
    for perturb, order in (("batch", [0, 1, 0, 1]), ("micro", [0, 0, 1, 1])):
        noise = Noisy()
        model = network(noise)
        SAM(SGD(model.parameters())).step([loss_of(model)] * 2, perturb)
        masks = [mask for mask, *_ in noise.drawn]
        first, last = masks[0], masks[-1]
        assert not torch.equal(first, last)
        assert_equal(masks, [(first, last)[i] for i in order])


def test_the_rules_own_generator_goes_on_from_step_to_step():
    model, seen = network(nn.Dropout(0.5)), []
    generator = torch.Generator().manual_seed(0)
    sam = SAM(SGD(model.parameters()), 0.1, rule=random_direction, generator=generator)
    before = copies(model.parameters())
    global_state = torch.get_rng_state()
    for _ in range(2):
        loss_of(model)().backward()
        with sam.perturbed():
            seen.append([p - w for p, w in zip(copies(model.parameters()), before, strict=True)])
    with torch.random.fork_rng():
        torch.set_rng_state(global_state)
        loss_of(model)(), loss_of(model)()
        drawn_by_closures = torch.get_rng_state()
    assert_equal(torch.get_rng_state(), drawn_by_closures)
    assert length(seen[0]) == pytest.approx(0.1, rel=1e-4)
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("scale", [2.0**10, torch.tensor(2.0**10)])
def test_the_scale_of_the_loss_is_undone_for_rules_that_depend_on_it(scale):
    moved = []
    for factor, told in ((1.0, None), (float(scale), scale)):
        model = network()
        sam = SAM(SGD(model.parameters()), 0.5, rule=unnormalized)
        (factor * loss_of(model)()).backward()
        with sam.perturbed(scale=told):
            moved.append(copies(model.parameters()))
    assert_equal(*moved)
