"""Lines, planes and directions against closed forms, and that a picture disturbs nothing."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sam_lab import Hessian, landscape
from sam_lab.landscape import direction, filter_normalized, line, plane, through, weights


class Weights(nn.Module):
    """Nothing but parameters, in two tensors of different shapes."""

    def __init__(self, values):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(values[:1], dtype=torch.float64))
        rest = torch.tensor(values[1:], dtype=torch.float64)
        self.rest = nn.Parameter(rest.reshape(1, -1))

    def flat(self):
        return torch.cat([p.reshape(-1) for p in self.parameters()])


CURVATURES = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)


def quadratic(values=(0.0, 0.0, 0.0)):
    model = Weights(list(values))
    return model, lambda: 0.5 * (CURVATURES * model.flat() ** 2).sum()


def point(*values):
    return torch.tensor(values, dtype=torch.float64)


def network(seed=0, *, batchnorm=False, dropout=False, dtype=torch.float64, device="cpu"):
    """A small network, and its cross-entropy on fixed data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 6, generator=generator, dtype=dtype) * 2 + 1
    y = torch.randint(0, 3, (40,), generator=generator)
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(8)] * batchnorm + [nn.Dropout(0.3)] * dropout
    model = nn.Sequential(nn.Linear(6, 8), *norm, nn.ReLU(), nn.Linear(8, 3))
    model, x, y = model.to(device, dtype), x.to(device), y.to(device)
    return model, x, lambda: F.cross_entropy(model(x), y)


def elsewhere(model, seed=1, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [
        w + scale * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights(model)
    ]


def by_hand(model, loss, where):
    """The loss at these weights, in the plainest way."""
    before = weights(model)
    with torch.no_grad():
        for p, t in zip(model.parameters(), where, strict=True):
            p.copy_(t)
        value = loss().item()
        for p, t in zip(model.parameters(), before, strict=True):
            p.copy_(t)
    return value


# --- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_on_a_quadratic_a_line_is_a_parabola(chunk):
    model, loss = quadratic()
    a, b = point(1.0, -2.0, 0.5), point(-1.0, 4.0, 2.0)
    found = line(loss, model, a, b, 11, chunk=chunk)
    alphas = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(found.alphas, alphas)
    at = (1 - alphas)[:, None] * a + alphas[:, None] * b
    torch.testing.assert_close(found.losses, 0.5 * (CURVATURES * at**2).sum(1))
    assert found.losses.dtype == torch.float64


def test_both_ends_are_evaluated_exactly_at_the_weights_given():
    model, _, loss = network(dtype=torch.float32)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    found = line(loss, model, a, b, 3)
    assert found.losses[0].item() == by_hand(model, loss, a)
    assert found.losses[-1].item() == by_hand(model, loss, b)


def test_alphas_may_lie_beyond_the_ends_and_in_any_order():
    model, loss = quadratic()
    found = line(loss, model, point(0.0, 0, 0), point(1.0, 0, 0), [2.0, -1.0, 0.5])
    assert found.alphas.tolist() == [2.0, -1.0, 0.5]
    assert found.losses.tolist() == [6.0, 1.5, 0.375]
    same = line(loss, model, point(0.0, 0, 0), point(1.0, 0, 0), np.array([2.0, -1.0, 0.5]))
    assert torch.equal(same.losses, found.losses)


def test_the_points_may_be_flat_vectors_snapshots_or_the_living_parameters():
    model, loss = quadratic((1.0, 2.0, 3.0))
    flat = line(loss, model, point(1.0, 2.0, 3.0), point(0.0, 0, 0), 5)
    zeros = [torch.zeros_like(w) for w in weights(model)]
    assert torch.equal(line(loss, model, weights(model), zeros, 5).losses, flat.losses)
    assert torch.equal(line(loss, model, model.parameters(), zeros, 5).losses, flat.losses)
    assert torch.equal(line(loss, model, zeros, model.parameters(), 5).losses, flat.losses.flip(0))


def test_a_snapshot_is_a_copy_of_the_parameters_alone():
    model, _, _ = network(batchnorm=True)
    snapshot = weights(model)
    assert len(snapshot) == len(list(model.parameters())) < len(model.state_dict())
    assert not any(w.requires_grad for w in snapshot)
    with torch.no_grad():
        model[0].weight.zero_()
    assert snapshot[0].any()


def test_a_closure_that_reads_its_parameters_past_the_model_is_followed_too():
    model, loss = quadratic()
    held = list(model.parameters())
    aside = lambda: 0.5 * (CURVATURES * torch.cat([p.reshape(-1) for p in held]) ** 2).sum()  # noqa: E731
    a, b = point(1.0, -2.0, 0.5), point(-1.0, 4.0, 2.0)
    expected = line(loss, model, a, b).losses
    for chunk in (1, 10):
        assert torch.equal(line(aside, model, a, b, chunk=chunk).losses, expected)


def test_a_loss_that_leaves_the_numbers_is_reported_as_it_is():
    model, _ = quadratic()
    start, end = point(0.0, 0, 0), point(2.0, 0, 0)
    found = line(lambda: (1e200 * model.first[0]) ** 2, model, start, end, 3)
    assert found.losses.tolist() == [0.0, math.inf, math.inf]
    assert math.isnan(found.barrier)
    inside = line(lambda: 1 / (model.first[0] - 1).abs(), model, start, end, 3)
    assert inside.losses.tolist() == [1.0, math.inf, 1.0] and inside.barrier == math.inf
    found = line(lambda: model.first[0].log(), model, -end, end, 3)
    assert math.isnan(found.losses[0]) and math.isnan(found.barrier)


# --- barriers ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_a_convex_loss_has_no_barrier(values):
    model, loss = quadratic()
    found = line(loss, model, point(*values[:3]), point(*values[3:]), 9)
    assert 0 <= found.barrier <= 1e-12 * (1 + float(found.losses.max()))


def test_a_double_well_has_the_barrier_of_its_hill_over_the_chord():
    model, _ = quadratic()
    tilt = 0.25

    def well():
        w = model.first[0]
        return (w**2 - 1) ** 2 + tilt * w

    found = line(well, model, point(-1.0, 0, 0), point(1.0, 0, 0), 41)
    assert found.barrier == pytest.approx(1.0)  # above the tilted chord, not above the lower end
    assert float(found.losses.max()) > 1.0 + found.losses[0].item()


def test_what_lies_beyond_the_ends_is_no_part_of_the_barrier():
    model, _ = quadratic()
    alphas = [-2.0, 0.0, 0.5, 1.0, 3.0]
    found = line(lambda: -(model.first[0] ** 3), model, point(0.0, 0, 0), point(1.0, 0, 0), alphas)
    assert found.barrier == pytest.approx(0.5 - 0.125)


def test_a_barrier_without_both_ends_is_an_error():
    model, loss = quadratic()
    found = line(loss, model, point(0.0, 0, 0), point(1.0, 0, 0), [0.0, 0.5])
    with pytest.raises(ValueError, match="alphas must include 0 and 1"):
        _ = found.barrier


# --- planes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5])
def test_on_a_quadratic_a_plane_is_exact_with_a_row_for_each_y(chunk):
    model, loss = quadratic()
    origin, u, v = point(1.0, 0, -1.0), point(1.0, 1.0, 0), point(0.0, 2.0, 1.0)
    xs, ys = [-1.0, 0.0, 0.5], [0.0, 3.0]
    found = plane(loss, model, origin, u, v, xs, ys, chunk=chunk)
    assert found.losses.shape == (2, 3)
    assert (found.xs.tolist(), found.ys.tolist()) == (xs, ys)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            at = origin + x * u + y * v
            expected = 0.5 * (CURVATURES * at**2).sum()
            torch.testing.assert_close(found.losses[i, j], expected)


def test_along_an_eigenvector_the_loss_bends_by_its_eigenvalue():
    model, _, loss = network()
    pair = Hessian(loss, model.parameters()).top(1, tol=1e-6)
    here = torch.cat([w.reshape(-1) for w in weights(model)])
    across = torch.zeros_like(here)
    h = 1e-3
    found = plane(loss, model, here, pair.vectors[:, 0], across, [-h, 0.0, h], [0.0]).losses[0]
    second = (found[0] - 2 * found[1] + found[2]) / h**2
    assert second.item() == pytest.approx(pair.values[0].item(), rel=1e-3)


coordinates = st.lists(st.floats(-10, 10), min_size=4, max_size=4)


@given(coordinates, coordinates, coordinates)
def test_the_plane_through_three_points_is_orthonormal_and_gives_them_back(a, b, c):
    a, b, c = point(*a), point(*b), point(*c)
    first, second = b - a, c - a
    if first.norm() < 1e-3:
        return
    beside = second - (second @ first) / first.norm() ** 2 * first
    if beside.norm() < 1e-6 * (1 + second.norm()):
        return
    origin, u, v, points = through(a, b, c)
    torch.testing.assert_close(torch.stack([u @ u, v @ v, u @ v]), point(1, 1, 0))
    assert points[0].tolist() == [0, 0]
    assert points[1, 0] > 0 and abs(points[1, 1]) < 1e-9 and points[2, 1] > 0
    for (x, y), expected in zip(points, (a, b, c), strict=True):
        torch.testing.assert_close(origin + x * u + y * v, expected, atol=1e-9, rtol=0)


def test_a_plane_through_snapshots_shows_their_losses_where_they_lie():
    model, _, loss = network()
    three = [elsewhere(model, seed) for seed in (1, 2, 3)]
    axes = through(*three)
    assert [t.shape for t in axes.v] == [p.shape for p in model.parameters()]
    for (x, y), where in zip(axes.points, three, strict=True):
        found = plane(loss, model, *axes[:3], [x], [y])
        assert found.losses.item() == pytest.approx(by_hand(model, loss, where), rel=1e-9)


def test_three_points_on_a_line_are_no_plane():
    a, b = point(1.0, 2, 3), point(2.0, 4, 6)
    with pytest.raises(ValueError, match="b must lie at a finite distance from a, got 0"):
        through(a, a, b)
    with pytest.raises(ValueError, match="c must not lie on the line through a and b"):
        through(a, b, 3 * b - 2 * a)
    with pytest.raises(ValueError, match="c must not lie"):
        through(a, b, a)


# --- directions ----------------------------------------------------------------------------------


def test_each_filter_gets_the_norm_of_its_own_in_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )
    found = dict(zip([n for n, _ in model.named_parameters()], direction(model), strict=True))
    for name, width in (("0.weight", 4), ("4.weight", 5)):
        own = model.get_parameter(name).detach().reshape(width, -1).norm(dim=1)
        torch.testing.assert_close(found[name].reshape(width, -1).norm(dim=1), own)
        assert len({round(n, 4) for n in own.tolist()}) == width
    for name in ("0.bias", "1.weight", "1.bias", "4.bias"):
        assert not found[name].any()


def test_norm_layers_stay_though_their_scales_have_several_dimensions():
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(), nn.Linear(6, 2))
    scale, shift, kernel, bias = direction(model)
    assert not scale.any() and not shift.any() and not bias.any() and kernel.any()


def test_a_filter_of_zeros_gives_zeros():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    d = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    (found,) = filter_normalized([d], [w])
    assert found.tolist() == [[0.0, 5.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_rescaled_relu_network_has_the_same_picture():
    model, _, loss = network()
    twin, _, loss_of_twin = network()
    with torch.no_grad():  # the same function with other weights
        twin[0].weight *= 10
        twin[0].bias *= 10
        twin[-1].weight /= 10
    assert loss_of_twin().item() == pytest.approx(loss().item())

    def picture(model, loss, u, v):
        return plane(loss, model, weights(model), u, v, [-1.0, 0.3], [-0.5, 1.0]).losses

    one = picture(model, loss, direction(model, 3), direction(model, 4))
    two = picture(twin, loss_of_twin, direction(twin, 3), direction(twin, 4))
    torch.testing.assert_close(one, two)
    raw = [torch.randn(p.shape, dtype=p.dtype) for p in model.parameters()]
    there, here = picture(model, loss, raw, raw), picture(twin, loss_of_twin, raw, raw)
    assert not torch.allclose(there, here, rtol=0.1)


def test_a_direction_is_its_seeds_and_leaves_the_random_state():
    model, _, _ = network()
    state = torch.get_rng_state()
    first, again, other = direction(model, 5), direction(model, 5), direction(model, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


# --- several points in one pass ------------------------------------------------------------------


@pytest.mark.parametrize("batchnorm", [False, True])
def test_points_evaluated_together_give_what_they_give_one_by_one(batchnorm, monkeypatch):
    model, _, loss = network(batchnorm=batchnorm)
    model.eval()
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    one = line(loss, model, a, b, 7, chunk=1, refresh=False)
    passes = []
    replaced = landscape.Objective.replaced
    monkeypatch.setattr(
        landscape.Objective, "replaced", lambda *args: passes.append(1) or replaced(*args)
    )
    several = line(loss, model, a, b, 7, chunk=3, refresh=False)
    assert len(passes) == 3  # 3 + 3 + 1 points, and no second attempt
    torch.testing.assert_close(one.losses, several.losses)


def branching(model, loss):
    return lambda: loss() * (2 if loss() > 1.2 else 1)


@pytest.mark.parametrize("obstacle", ["batchnorm", "dropout", "branch", "frozen"])
def test_what_cannot_be_evaluated_together_is_evaluated_one_by_one(obstacle):
    model, _, loss = network(batchnorm=obstacle == "batchnorm", dropout=obstacle == "dropout")
    if obstacle == "branch":
        loss = branching(model, loss)
    if obstacle == "frozen":
        model[0].requires_grad_(False)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    one, several = (line(loss, model, a, b, 7, chunk=chunk).losses for chunk in (1, 3))
    assert torch.equal(one, several)
    assert len(set(one.tolist())) == 7


@pytest.mark.parametrize("chunk", [1, 8])
def test_an_error_of_the_loss_is_the_callers(chunk):
    model, _ = quadratic()

    def broken():
        raise LookupError("no such batch")

    with pytest.raises(LookupError, match="no such batch"):
        line(broken, model, point(0.0, 0, 0), point(1.0, 0, 0), chunk=chunk)


def test_dropout_is_the_same_mask_at_every_point():
    model, _, loss = network(dropout=True)
    here = weights(model)
    found = line(loss, model, here, here, 5)
    assert len(set(found.losses.tolist())) == 1
    torch.manual_seed(torch.initial_seed())
    state = torch.get_rng_state()
    first = line(loss, model, here, here, 2).losses[0].item()
    torch.set_rng_state(state)
    assert loss().item() == first


# --- BatchNorm -----------------------------------------------------------------------------------


def test_refreshed_statistics_are_those_of_training_mode_over_the_data():
    model, x, loss = network(batchnorm=True)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    whole = line(loss, model, a, b, 5).losses  # in training mode: statistics of this one batch
    model.eval()
    found = line(loss, model, a, b, 5, refresh=[x]).losses
    # running variances are divided by n - 1, those of a batch by n
    torch.testing.assert_close(found, whole, rtol=0.02, atol=0)

    seen = {}

    def spy():
        seen["mean"], seen["var"] = model[1].running_mean.clone(), model[1].running_var.clone()
        return loss()

    line(spy, model, a, b, [1.0], refresh=[(x, None)])
    hidden = F.linear(x, b[0], b[1])
    torch.testing.assert_close(seen["mean"], hidden.mean(0))
    torch.testing.assert_close(seen["var"], hidden.var(0))


def task():
    """Inputs far from 0, in three classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    return x + 3, (x @ torch.randn(6, 3, generator=generator)).argmax(1)


def test_every_point_starts_from_the_modes_found_at_the_call():
    model, x, loss = network(batchnorm=True, dropout=True)
    model[1].eval()  # frozen statistics in a model that trains; update_bn would unfreeze them
    modes = [module.training for module in model.modules()]
    seen = []

    def watched():
        seen.append([module.training for module in model.modules()])
        model.eval()
        return loss()

    line(watched, model, elsewhere(model, 1), elsewhere(model, 2), 3, refresh=[x])
    line(watched, model, elsewhere(model, 1), elsewhere(model, 2), 3, refresh=False)
    assert seen == [modes] * 6


def trained(seed, x, y):
    """A network with BatchNorm, and its loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss():
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model.eval(), loss


def test_without_refresh_batchnorm_makes_a_rise_that_is_none_of_the_weights():
    x, y = task()
    model, loss = trained(0, x, y)
    start = weights(model)
    # the same function: BatchNorm undoes the scale, with statistics of its own
    end = [w.clone() for w in start]
    end[0] *= 5
    end[1] *= 5
    spurious = line(loss, model, start, end, 11, refresh=False)
    with pytest.warns(UserWarning, match="give refresh=batches"):
        assert torch.equal(line(loss, model, start, end, 11).losses, spurious.losses)
    true = line(loss, model, start, end, 11, refresh=[x])
    assert spurious.losses.max() > 10 * spurious.losses[0]
    assert true.barrier < 1e-3
    assert true.losses.max() < 1.01 * true.losses[0]


def test_between_two_trained_networks_refreshing_lowers_the_rise_to_that_of_the_weights():
    x, y = task()
    (model, loss), (other, _) = trained(1, x, y), trained(2, x, y)
    start, end = weights(model), weights(other)
    kept = line(loss, model, start, end, refresh=False)
    fresh = line(loss, model, start, end, refresh=[x[:100], x[100:]])
    chord = (fresh.losses[0] + fresh.losses[-1]) / 2
    assert 0 < fresh.barrier < 0.5 * float(kept.losses.max() - chord)
    assert kept.losses[-1] > 5 * fresh.losses[-1]  # one network with the other's statistics


def test_only_running_statistics_in_use_are_worth_a_warning():
    model, x, loss = network(batchnorm=True)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    line(loss, model, a, b, 2)  # training mode: statistics of the batch
    model.eval()
    line(loss, model, a, b, 2, refresh=[x])
    plain, x, loss = network()
    line(loss, plain.eval(), a[:2] + a[4:], b[:2] + b[4:], 2)
    line(loss, plain, a[:2] + a[4:], b[:2] + b[4:], 2, refresh=[x])
    untracked = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False)).eval()
    here = weights(untracked)
    line(lambda: untracked(x.float()).square().mean(), untracked, here, here, 2)


# --- nothing is disturbed ------------------------------------------------------------------------


def everything(model):
    """Objects and values that must be as before."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "objects": [id(t) for t in tensors],
        "storage": [t.data_ptr() for t in tensors],
        "versions": [t._version for t in tensors],
        "values": [t.detach().clone() for t in tensors],
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "momenta": [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.rand.__name__),
        "numpy": np.random.get_state()[1].tolist(),
    }


def assert_same(before, after):
    for name in before:
        if name in ("values", "grads"):
            for a, b in zip(before[name], after[name], strict=True):
                assert (a is b) if name == "grads" else torch.equal(a, b), name
        else:
            assert before[name] == after[name], name


def busy(training=True):
    """A network with gradients, mixed modes, statistics, and a loss that moves what it can."""
    model, x, plain = network(batchnorm=True, dropout=True)
    plain().backward()
    model.train(training)
    model[2].train(not training)

    def loss():
        random.random()
        np.random.rand()
        model.zero_grad()
        return plain() + 0 * torch.rand(())

    return model, x, loss


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("refreshed", [False, True])
def test_the_model_and_the_random_state_are_as_before_bit_for_bit(chunk, training, refreshed):
    model, x, loss = busy(training)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    before = everything(model)
    for refresh in ([x[:20], x[20:]],) if refreshed else (False,):
        line(loss, model, a, b, 5, chunk=chunk, refresh=refresh)
        plane(loss, model, a, b, b, [0.0, 1.0], [0.0], chunk=chunk, refresh=refresh)
    assert_same(before, everything(model))


@pytest.mark.parametrize("chunk", [1, 4])
def test_they_are_as_before_after_an_error_too(chunk):
    model, x, loss = busy(training=False)
    before = everything(model)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    calls = []

    def failing():
        calls.append(1)
        model.train()
        if len(calls) >= 3:
            raise LookupError("the data are gone")
        return loss()

    with pytest.raises(LookupError, match="the data are gone"):
        line(failing, model, a, b, chunk=chunk, refresh=False)
    assert_same(before, everything(model))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        line(loss, model, a, b, chunk=chunk, refresh=[x, x[:, :3]])  # within update_bn's pass
    assert_same(before, everything(model))


def test_a_loader_with_its_own_generator_is_put_back_and_read_alike_at_every_point():
    model, x, loss = network(batchnorm=True)
    model.eval()
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(x, 8, shuffle=True, generator=generator)
    state = generator.get_state()
    here = weights(model)
    found = line(loss, model, here, here, 4, refresh=loader)
    assert len(set(found.losses.tolist())) == 1
    assert torch.equal(generator.get_state(), state)


def test_a_graph_built_before_can_still_be_walked_back():
    model, _, loss = network()
    expected = torch.autograd.grad(loss(), list(model.parameters()))
    pending = loss()
    line(loss, model, elsewhere(model, 1), elsewhere(model, 2), 5)
    pending.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_no_graph_is_built():
    model, loss = quadratic()
    seen = []

    def watched():
        value = loss()
        seen.append((value.requires_grad, torch.is_grad_enabled()))
        return value

    line(watched, model, point(0.0, 0, 0), point(1.0, 0, 0), 3)
    assert seen == [(False, False)] * 3 and torch.is_grad_enabled()


# --- arguments -----------------------------------------------------------------------------------

ZERO, ONE = point(0.0, 0, 0), point(1.0, 1, 1)


def drawn(**changes):
    model, loss = quadratic()
    arguments = {"closure": loss, "model": model, "start": ZERO, "end": ONE, **changes}
    return line(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"closure": 3.0}, TypeError, "closure must be callable, got float"),
        ({"closure": lambda: 3.0}, TypeError, "the loss must be a tensor, got float"),
        ({"closure": lambda: torch.ones(2)}, ValueError, r"real scalar, got .* of shape \(2,\)"),
        ({"closure": lambda: torch.tensor(1)}, ValueError, "real scalar, got torch.int64"),
        ({"model": [ZERO]}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"model": nn.ReLU()}, ValueError, "model has no parameters"),
        ({"start": point(1.0, 2)}, ValueError, r"start must have shape \(3,\).*got \(2,\)"),
        ({"start": {"first": ZERO}}, TypeError, "start must be a list of tensors.*got dict"),
        ({"end": [ZERO]}, ValueError, "end must hold 2 tensors, got 1"),
        ({"end": [ZERO[:1], ZERO[1:]]}, ValueError, r"end\[1\] must be .*\(1, 2\).*, got .*\(2,\)"),
        ({"end": [1.0, 2.0]}, TypeError, "end must be a list of tensors.*; entry 0 is float"),
        ({"end": ONE.float()}, ValueError, r"end\[0\] must be torch.float64.*got torch.float32"),
        ({"end": None}, TypeError, "end must be a list of tensors.*got NoneType"),
        ({"alphas": 1}, ValueError, "alphas must be an integer of at least 2, got 1"),
        ({"alphas": []}, ValueError, r"alphas must be a sequence of one or more numbers"),
        ({"alphas": [[0.0, 1.0]]}, ValueError, r"alphas must be .*got shape \(1, 2\)"),
        ({"alphas": [0.0, math.inf]}, ValueError, "alphas must be finite, got inf"),
        ({"alphas": "all"}, TypeError, "alphas must be a sequence of numbers, got 'all'"),
        ({"chunk": 0}, ValueError, "chunk must be an integer of at least 1, got 0"),
        ({"refresh": torch.ones(4, 2)}, TypeError, "refresh must be a list.*got Tensor"),
        ({"refresh": iter([ZERO])}, TypeError, "refresh must be a list.*got list_iterator"),
        ({"refresh": True}, TypeError, "refresh must be a list.*got bool"),
        ({"refresh": []}, ValueError, "refresh is empty"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        drawn(**changes)


def test_bad_input_to_planes_and_directions_is_named():
    model, loss = quadratic()
    with pytest.raises(ValueError, match=r"v must have shape \(3,\)"):
        plane(loss, model, ZERO, ONE, ONE[:2], [0.0], [0.0])
    with pytest.raises(ValueError, match="ys must be finite, got nan"):
        plane(loss, model, ZERO, ONE, ONE, [0.0], [math.nan])
    with pytest.raises(ValueError, match=r"c must have shape \(3,\)"):
        through(ZERO, ONE, ONE[:2])
    with pytest.raises(ValueError, match=r"direction\[0\] must be .*\(2, 2\).*, got .*\(2, 3\)"):
        filter_normalized([torch.ones(2, 3)], [torch.ones(2, 2)])
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        direction(model, -1)


def test_nothing_is_said_where_nothing_is_wrong():
    model, loss = quadratic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line(loss, model, ZERO, ONE)
    assert not caught


@pytest.mark.cuda
def test_on_cuda_points_together_and_one_by_one_agree_with_the_cpu():
    model, _, loss = network(dtype=torch.float32)
    a, b = elsewhere(model, 1), elsewhere(model, 2)
    expected = line(loss, model, a, b).losses
    model, _, loss = network(dtype=torch.float32, device="cuda")
    ends = [t.cuda() for t in a], [t.cuda() for t in b]
    for chunk in (1, 8):
        found = line(loss, model, *ends, chunk=chunk).losses
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
