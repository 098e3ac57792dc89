"""Gradients without a direction never harm the weights, and errors of use are named.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sam_problem import (
    OPTIMIZERS,
    SGD,
    Elsewhere,
    X,
    Y,
    assert_equal,
    copies,
    everything,
    loss_of,
    network,
)
from torch import nn

import sam_lab.sam
from sam_lab import SAM
from sam_lab.perturbations import asam, dithered, random_direction

# --- gradients that are zero, not finite, or missing ----------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_where_the_gradient_is_zero_the_step_is_the_optimizers_own(make):
    """Trap: 0 / 0 (optax, moskomule/sam.pytorch)."""
    w, twin = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    optimizer = make([twin])
    sam = SAM(make([w]), 0.1)
    for factor in (1.0, 0.0, 1.0):
        sam.step(lambda: (factor * w**2).sum())  # noqa: B023
        optimizer.zero_grad()
        at = twin.detach() + 0.1 * factor * torch.nn.functional.normalize(2 * twin.detach(), dim=0)
        twin.grad = 2 * factor * at
        optimizer.step()
        torch.testing.assert_close(w, twin)
    assert sam.skipped == 0 and sam.steps == 3


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("passes", [{1, 2}, {2}], ids=["both passes", "the second pass"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(bad, passes, make):
    """Trap: one overflow, and weights, momentum or BatchNorm's averages are NaN for ever."""
    model = network(nn.BatchNorm1d(4))
    sam = SAM(make(model.parameters()), 0.1, model)
    sam.step(loss_of(model))
    before, calls = everything(sam, model), []

    def closure():
        calls.append(0)
        h = model[1](model[0](X) * (bad if len(calls) == 2 and 1 not in passes else 1.0))
        return (model[2:](h) - Y).square().mean() * (bad if len(calls) in passes else 1.0)

    sam.step(closure)
    after = everything(sam, model)
    assert after.pop("counts") == [1, 1] and before.pop("counts") == [1, 0]
    clean = network(nn.BatchNorm1d(4))
    clean.load_state_dict(before.pop("model"))
    clean(X)
    assert_equal(after.pop("model"), dict(clean.state_dict()))
    assert_equal(after, before)
    sam.step(loss_of(model))
    assert sam.steps == 2 and sam.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_first_pass_that_is_not_finite_does_not_move_the_weights():
    model = network()
    sam = SAM(SGD(model.parameters()), 0.3)
    loss_of(model)().backward()
    model[0].weight.grad[0, 0] = math.inf
    before = copies(model.parameters())
    with sam.perturbed():
        assert_equal(copies(model.parameters()), before)


def test_at_rho_zero_too_a_gradient_that_is_not_finite_is_skipped():
    model = network()
    sam = SAM(SGD(model.parameters()), 0.0)
    before = copies(model.parameters())
    sam.step(lambda: loss_of(model)() * math.nan)
    assert_equal(copies(model.parameters()), before)
    assert (sam.steps, sam.skipped) == (0, 1)


def test_on_an_accelerator_a_gradient_that_is_not_finite_becomes_zeros(monkeypatch):
    norm = sam_lab.sam.global_norm
    monkeypatch.setattr(
        sam_lab.sam, "global_norm", lambda grads: norm(grads).as_subclass(Elsewhere)
    )
    model = network()
    sam = SAM(SGD(model.parameters(), momentum=0.5), 0.1)
    sam.step(loss_of(model))
    assert all(p.grad.any() for p in model.parameters()) and sam.skipped == 0
    before = copies(model.parameters())
    momenta = [
        state["momentum_buffer"].clone().as_subclass(torch.Tensor)
        for state in sam.optimizer.state.values()
    ]
    for _ in range(2):
        sam.step(lambda: loss_of(model)() * math.inf)
    assert not any(p.grad.any() for p in model.parameters())
    expected = [w - 0.1 * (0.5 + 0.25) * m for w, m in zip(before, momenta, strict=True)]
    for p, w in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w)
    assert sam.skipped == 2
    sam.step(lambda: loss_of(model)() * math.inf)
    assert sam.state_dict()["skipped"] == 3 and sam.skipped == 3


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_a_step_reads_no_value_of_a_device(make):
    """On the meta device no tensor has a value: `if norm > 0` or `.item()` would be an error."""
    model = network(nn.BatchNorm1d(4), nn.Dropout(0.5)).to("meta")
    x = X.to("meta")
    sam = SAM(make(model.parameters(), foreach=True), 0.1, model)
    for perturb in ("batch", "micro"):
        loss = sam.step([lambda: model(x).square().mean()] * 2, perturb)
    assert loss.device.type == "meta" and sam.steps == 2


def test_without_any_gradient_perturbed_says_what_is_missing():
    """Trap: torch.stack of an empty list."""
    model = network()
    sam = SAM(SGD(model.parameters()))
    with (
        pytest.raises(RuntimeError, match=r"no parameter has a gradient.*needs a backward before"),
        sam.perturbed(),
    ):
        raise AssertionError("the block must not run")
    sam.rho = 0.0
    with sam.perturbed():  # nothing to follow, and nothing wrong
        assert_equal(copies(model.parameters()), copies(network().parameters()))


@pytest.mark.parametrize("named", [True, False])
def test_a_sparse_gradient_is_refused_by_name(named):
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    before = copies(model.parameters())
    sam = SAM(SGD(model.parameters()), model=model if named else None)
    name = "parameter '0.weight'" if named else r"a parameter of shape \(4, 2\) \(give SAM the"
    with pytest.raises(ValueError, match=rf"dense and real.*{name}.*sparse_coo.*sparse=False"):
        sam.step(lambda: model(torch.tensor([1, 2])).square().sum())
    assert_equal(copies(model.parameters()), before)


def test_a_complex_gradient_is_refused_by_name():
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    sam = SAM(SGD(model.parameters()), model=model)
    with pytest.raises(ValueError, match=r"dense and real.*'phase'.*complex64"):
        sam.step(lambda: model.phase.abs().sum())


# --- errors of use --------------------------------------------------------------------------------


def test_an_optimizer_step_inside_the_block_is_refused_and_afterwards_works():
    model = network()
    optimizer = SGD(model.parameters())
    sam = SAM(optimizer)
    loss_of(model)().backward()
    before = copies(model.parameters())
    refused = pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside perturbed\(\)")
    with refused, sam.perturbed():
        loss_of(model)().backward()
        optimizer.step()
    assert_equal(copies(model.parameters()), before)
    optimizer.step()
    assert sam.steps == 1 and not torch.equal(model[0].weight, before[0])


def test_blocks_cannot_be_nested():
    """Trap: the copy of the weights was overwritten with perturbed ones."""
    model = network()
    sam = SAM(SGD(model.parameters()))
    loss_of(model)().backward()
    before = copies(model.parameters())
    with sam.perturbed():
        moved = copies(model.parameters())
        loss_of(model)().backward()
        grads = copies(p.grad for p in model.parameters())
        with pytest.raises(RuntimeError, match="at w \\+ eps already"), sam.perturbed():
            raise AssertionError("the block must not run")
        assert_equal(copies(model.parameters()), moved)
        assert_equal([p.grad for p in model.parameters()], grads)
        with pytest.raises(RuntimeError, match="at w \\+ eps already"):
            sam.step(loss_of(model))
    assert_equal(copies(model.parameters()), before)


w = torch.ones(3, requires_grad=True)


def calls_backward():
    loss = w.square().sum()
    loss.backward()
    return loss


def calls_backward_on_a_sum():
    loss = w.sum()  # its backward could run twice
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (calls_backward, ValueError, "without calling backward"),
        (calls_backward_on_a_sum, ValueError, "without calling backward"),
        (lambda: None, TypeError, "must return the loss, a tensor; got None"),
        (lambda: 3.0, TypeError, "must return the loss, a tensor; got 3.0"),
        (lambda: w**2, ValueError, r"scalar loss .* got shape \(3,\)"),
        (lambda: w.sum().detach(), ValueError, "requires_grad=False"),
        (3, TypeError, "closure must be a function or a list of functions, got 3"),
        (w.sum(), TypeError, r"closure must be a function .* got tensor\(3\."),
        ([], TypeError, r"closure must be .* got \[\]"),
        ([lambda: w.sum(), None], TypeError, "closure must be"),
    ],
)
def test_a_closure_that_is_not_one_is_refused_clearly(closure, error, message):
    """Trap: closures that call backward, and closures that do not, are both called closures."""
    sam = SAM(SGD([w]))
    with pytest.raises(error, match=message):
        sam.step(closure)
    assert_equal(w.detach(), torch.ones(3))
    assert sam.steps == 0


def test_a_closure_that_does_not_run_the_model_anew_is_told_so():
    """Trap: the forward of the first pass used twice (davda54/sam#10)."""
    model = network()
    prediction = model(X)
    with pytest.raises(ValueError, match="must run the model anew"):
        SAM(SGD(model.parameters())).step(lambda: (prediction - Y).square().mean())


def test_an_error_of_the_closures_own_is_not_dressed_up():
    model = network()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        SAM(SGD(model.parameters())).step(lambda: model(X.t()).mean())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": torch.optim.SGD}, TypeError, r"torch.optim.Optimizer.*got <class"),
        ({"rho": -0.1}, ValueError, "rho must be a finite number of at least 0, got -0.1"),
        ({"rho": math.nan}, ValueError, "rho must be .* got nan"),
        ({"rho": math.inf}, ValueError, "rho must be .* got inf"),
        ({"rho": "0.1"}, ValueError, "rho must be .* got '0.1'"),
        ({"rho": True}, ValueError, "rho must be .* got True"),
        ({"rho": None}, ValueError, "rho must be .* got None"),
        ({"rho": lambda step: -1}, ValueError, r"rho\(0\) must be .* got -1"),
        ({"model": "resnet"}, TypeError, "model must be a torch.nn.Module or None, got str"),
        ({"rule": "sam"}, TypeError, "rule must be a function .* got 'sam'"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
        ({"rule": random_direction}, ValueError, "random_direction draws .* give generator="),
        ({"rule": dithered}, ValueError, "the rule dithered draws random numbers: give generator="),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, error, message):
    model = network()
    with pytest.raises(error, match=message):
        SAM(**{"optimizer": SGD(model.parameters()), **arguments})


def test_a_bad_radius_of_a_group_is_named():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="rho of parameter group 1 must be .* got -2"):
        SAM(SGD([{"params": [a]}, {"params": [b], "rho": -2}]))


@pytest.mark.parametrize("rho", [np.float32(0.25), torch.tensor(0.25), 1])
def test_a_radius_may_be_any_number(rho):
    weight = torch.ones(1, requires_grad=True)
    sam = SAM(SGD([weight]), rho)
    weight.sum().backward()
    with sam.perturbed():
        assert weight.item() == 1 + float(rho)


def test_perturb_is_batch_or_micro():
    with pytest.raises(ValueError, match='perturb must be "batch" or "micro", got \'each\''):
        SAM(SGD([w])).step(lambda: w.sum(), "each")


def test_gradients_to_follow_have_to_fit_the_parameters():
    model = network()
    sam = SAM(SGD(model.parameters()), model=model)
    grads = [torch.ones_like(p) for p in model.parameters()]
    too_few = pytest.raises(ValueError, match="one entry for each of the 4 parameters .* got 3")
    with too_few, sam.perturbed(grads[:3]):
        raise AssertionError("the block must not run")
    grads[1] = torch.ones(5)
    other = pytest.raises(ValueError, match=r"'0.bias' has the shape \(4,\), its gradient \(5,\)")
    with other, sam.perturbed(grads):
        raise AssertionError("the block must not run")


def test_its_repr_says_what_it_is():
    sam = SAM(SGD([w]), 0.1, rule=asam)
    assert repr(sam) == "SAM(SGD, rho=0.1, rule=asam)"
    assert "eta" in repr(SAM(SGD([w]), rule=partial(asam, eta=0.1)))


def test_a_sparse_gradient_is_refused_by_name_also_where_nothing_is_perturbed():
    table = nn.Embedding(4, 2, sparse=True)
    sam = SAM(torch.optim.SGD(table.parameters(), lr=0.1), rho=0.0, model=table)
    with pytest.raises(ValueError, match="parameter 'weight'.*sparse=False"):
        sam.step(lambda: table(torch.tensor([1])).sum())


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="LBFGS"):
        SAM(torch.optim.LBFGS([w]))


def test_gradients_can_only_be_left_apart_by_a_model_that_knows_how(monkeypatch):
    monkeypatch.setattr("sam_lab.sam._processes", lambda: 2)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given in (None, model):
        with pytest.raises(ValueError, match="sync=False needs model=, wrapped in Distributed"):
            SAM(optimizer, model=given, sync=False)
    SAM(optimizer, model=model)  # along the gradient of the whole batch, there is nothing to leave
    monkeypatch.setattr("sam_lab.sam._processes", lambda: 1)
    SAM(optimizer, sync=False)  # and one process has nobody to leave out
