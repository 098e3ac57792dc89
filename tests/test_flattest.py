"""XOR by two-layer networks: gradient and trace beside autograd, networks by hand, claims."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs
from hypothesis import given
from hypothesis import strategies as st

from sam_lab import experiments
from sam_lab.curvature import Hessian
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import flattest as task
from sam_lab.experiments.critics.flattest import Net

TINY = dataclasses.replace(
    task.LAPTOP,
    inputs=8,
    easier=6,
    examples=8,
    width=12,
    steps=4,
    every=2,
    level=1e-2,
    unseen=20,
    by_hand=(6, 9),
)


def weights_of(net, seed=0):
    """Weights of every kind of size, biases included."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(len(net.start(rng)))


def in_torch(net, weights, x):
    """The same outputs, written anew."""
    m, split = net.width, net.width * net.inputs
    z = x @ weights[:split].reshape(m, net.inputs).T
    if net.kind != "no_bias":
        z = z + weights[split + m :]
    h = z.relu()
    if net.kind == "normed":
        h = h / h.norm(dim=1, keepdim=True).clamp(min=1)
    return h @ weights[split : split + m]


@pytest.mark.parametrize("size", [0.05, 1.0])
@pytest.mark.parametrize("kind", task.KINDS)
def test_gradient_and_trace_are_those_of_autograd(kind, size):
    net = Net(kind, 5, 4)
    weights = size * weights_of(net)
    x, y = task.draw(7, 5, np.random.default_rng(1))
    if kind == "normed":
        y = net.outputs(weights, x)  # only where it fits is its trace that of the Hessian

    w = torch.tensor(weights, requires_grad=True)
    examples, labels = torch.tensor(x), torch.tensor(y)

    def loss(w):
        return (in_torch(net, w, examples) - labels).square().mean() / 2

    assert net.loss(weights, x, y) == pytest.approx(loss(w).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss(w), w)
    assert net.gradient(weights, x, y) == pytest.approx(gradient.numpy(), abs=1e-10)
    dense = torch.autograd.functional.hessian(loss, w.detach()).trace().item()
    assert net.trace(weights, x) == pytest.approx(dense, rel=1e-9)
    if size == 1:  # near 0 the trace is a small difference, and an estimate takes long
        estimate = Hessian(lambda: loss(w), [w]).trace(0.1, seed=0)
        assert estimate.value == pytest.approx(dense, abs=5 * estimate.stderr + 1e-9)


@pytest.mark.parametrize("kind", task.KINDS)
def test_gradient_of_the_normed_net_away_from_the_fit(kind):
    net = Net(kind, 5, 4)
    weights = weights_of(net, 3)
    x, y = task.draw(7, 5, np.random.default_rng(1))
    w = torch.tensor(weights, requires_grad=True)
    loss = (in_torch(net, w, torch.tensor(x)) - torch.tensor(y)).square().mean() / 2
    (gradient,) = torch.autograd.grad(loss, w)
    assert net.gradient(weights, x, y) == pytest.approx(gradient.numpy(), abs=1e-10)


@given(
    kind=st.sampled_from(["no_bias", "bias"]),
    seed=st.integers(0, 10_000),
    size=st.floats(0.01, 10),
)
def test_no_weights_have_less_than_the_smallest_trace(kind, seed, size):
    net = Net(kind, 6, 5)
    weights = size * weights_of(net, seed)
    x, _ = task.draw(9, 6, np.random.default_rng(seed))
    least = net.floor * np.abs(net.outputs(weights, x)).mean()
    assert net.trace(weights, x) >= least * (1 - 1e-12)


@given(seed=st.integers(0, 10_000), size=st.floats(0.01, 10))
def test_no_normed_weights_have_less_than_theirs(seed, size):
    net = Net("normed", 6, 5)
    weights = size * weights_of(net, seed)
    x, _ = task.draw(1, 6, np.random.default_rng(seed))
    output = abs(net.outputs(weights, x).item())
    assert net.trace(weights, x) >= min(1, 2 * math.sqrt(7) * output) * (1 - 1e-9)


@pytest.mark.parametrize("inputs", [4, 7, 12])
@pytest.mark.parametrize("kind", task.KINDS)
def test_the_rule_is_right_everywhere_and_as_flat_as_can_be(kind, inputs):
    net = Net(kind, inputs, 6)
    x, y = task.draw(2 ** (inputs - 1), inputs, np.random.default_rng(0))
    weights = task.rule(net)
    assert net.outputs(weights, x) == pytest.approx(y)
    assert net.trace(weights, x) == pytest.approx(net.floor)


@pytest.mark.parametrize("inputs", [5, 9])
@pytest.mark.parametrize("kind", ["bias", "normed"])
def test_the_memoriser_knows_its_examples_and_nothing_else(kind, inputs):
    net = Net(kind, inputs, 10)
    rng = np.random.default_rng(0)
    x, _ = task.draw(16, inputs, rng)
    y = rng.choice([-1.0, 1.0], 16)  # any labels
    weights = task.memoriser(net, x[:8], y[:8])
    assert net.outputs(weights, x[:8]) == pytest.approx(y[:8])
    assert net.outputs(weights, x[8:]) == pytest.approx(np.zeros(8))
    assert net.trace(weights, x[:8]) == pytest.approx(net.floor)
    assert task.error(net.outputs(weights, x[8:]), y[8:]) == 50


def test_the_smallest_trace_in_numbers():
    floors = {kind: Net(kind, 24, 3).floor for kind in task.KINDS}
    assert floors == {"no_bias": pytest.approx(2 * math.sqrt(24)), "bias": 10.0, "normed": 1.0}


def test_examples_differ_and_have_the_label_of_xor():
    x, y = task.draw(32, 6, np.random.default_rng(0))
    assert len(np.unique(x, axis=0)) == 32 and set(x.ravel()) == {-1.0, 1.0}
    assert (y == np.where(x[:, 0] == x[:, 1], 1, -1)).all()


def test_an_output_of_zero_is_half_an_error():
    assert task.error(np.array([2.0, -0.1, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0])) == 37.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Net("sine", 3, 4), "kind must be one of no_bias, bias, normed, got 'sine'"),
        (lambda: Net("bias", 0, 4), "inputs must be an integer of at least 1, got 0"),
        (lambda: task.draw(9, 4, np.random.default_rng(0)), "examples must be .* between 1 and 8"),
        (lambda: task.rule(Net("bias", 5, 3)), "two inputs and four neurons"),
        (lambda: task.memoriser(Net("no_bias", 5, 3), *two()), "net must have a bias"),
        (lambda: task.memoriser(Net("bias", 5, 1), *two()), "a neuron for each of 2 examples"),
        (lambda: task.memoriser(Net("bias", 5, 3), np.ones((2, 5)), np.ones(2)), "must differ"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def two():
    return task.draw(2, 5, np.random.default_rng(0))


def test_all_methods_set_out_from_the_same_fit():
    fit = {"study": "train", "net": "bias", "inputs": 8, "labels": "xor", "start": "fit"}
    runs = {
        method: task.STUDIES.run(TINY, Cell({**fit, "method": method}, 3))
        for method in task.METHODS
    }
    for columns in runs.values():
        assert columns["step"] == [0, 2, 4]
        assert max(columns["loss"]) <= TINY.level
        assert columns["trace"][0] == runs["sgd"]["trace"][0]
        assert columns["loss_before"][0] == columns["loss"][0]
    assert len({columns["loss_before"][-1] for columns in runs.values()}) == 3


def test_a_step_of_sam_looks_at_the_perturbed_weights():
    net = Net("bias", 5, 9)
    weights = weights_of(net)
    x, y = task.draw(1, 5, np.random.default_rng(1))
    config = dataclasses.replace(TINY, lr=0.1, rho=0.3)
    g = net.gradient(weights, x, y)
    assert np.linalg.norm(g) > 0
    there = net.gradient(weights + 0.3 * g / np.linalg.norm(g), x, y)
    found = task._step("sam", net, weights, x, y, config, np.random.default_rng(0))
    assert found == pytest.approx(weights - 0.1 * there)


def test_sam_rests_where_there_is_no_gradient():
    net = Net("bias", 5, 4)
    x, _ = task.draw(1, 5, np.random.default_rng(1))
    weights = weights_of(net)
    y = net.outputs(weights, x)
    found = task._step("sam", net, weights, x, y, TINY, np.random.default_rng(0))
    assert (found == weights).all()


@pytest.mark.parametrize(("fit_lr", "steps"), [(0.1, 2), (1e3, 100)])
def test_a_level_that_is_not_reached_is_named(monkeypatch, fit_lr, steps):
    monkeypatch.setattr(task, "FIT_STEPS", steps)
    setting = {"study": "train", "net": "bias", "method": "sgd"}
    cell = Cell({**setting, "inputs": 8, "labels": "random", "start": "fit"})
    with (
        pytest.raises(FloatingPointError, match="has not reached a training loss of 1e-09"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        task.STUDIES.run(dataclasses.replace(TINY, level=1e-9, fit_lr=fit_lr), cell)


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("flattest", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 9 + 2 + 2 + 1 + 3 * 2
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def trained(net, method, trace, test_error, **other):
    base = {"inputs": 30, "labels": "xor", "start": "fit"}
    settings = {"study": "train", "net": net, "method": method, **base, **other}
    return run_of(settings, 0, trace=trace, test_error=test_error)


def by_hand(net, inputs, trace, floor):
    settings = {"study": "by_hand", "net": net, "inputs": inputs}
    return run_of(settings, 0, trace=trace, floor=[floor] * len(trace))


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {"inputs": 30, "easier": 20},
        *(
            trained(net, "sgd", [8, trace], [40, 41])
            for net, trace in zip(task.KINDS, (8, 8, 9), strict=True)
        ),
        trained("no_bias", "sam", [80, 20], [45, 1]),
        trained("bias", "sam", [80, 16], [44, 20]),
        trained("normed", "sam", [8, 4], [43, 24]),
        trained("no_bias", "label_noise", [80, 20], [45, 2]),
        trained("bias", "label_noise", [80, 24], [44, 11]),
        trained("normed", "label_noise", [8, 1], [43, 18]),
        trained("no_bias", "sam", [90, 50], [50, 51], labels="random"),
        trained("bias", "sam", [90, 24], [50, 51], labels="random"),
        trained("no_bias", "sam", [70, 12], [31, 0], inputs=20),
        trained("bias", "sam", [70, 11], [32, 3], inputs=20),
        trained("bias", "sam", [11, 11], [50, 49], start="memoriser"),
        by_hand("no_bias", 20, [4.0], 4.0),
        by_hand("bias", 20, [5.5, 6], 5.0),
        by_hand("normed", 20, [1, 0.9], 1.0),
    )
    expected = {
        "memoriser-is-flattest": 1.2,
        "rule-is-flattest": 1.1,
        "sam-flattens": 0.5,
        "label-noise-flattens": 0.3,
        "sgd-does-not-flatten": 9 / 8,
        "descent-does-not-generalize": 43,
        "flat-generalizes-without-bias": 1,
        "flat-errs-with-bias": 20,
        "bias-errs-more": 19,
        "bias-is-flatter": 0.8,
        "easier-task-is-learnt-with-bias": 3,
        "flat-generalizes-normed": 24,
        "sam-stays-with-the-memoriser": 49,
        "random-labels-are-as-flat-with-bias": 1.5,
        "random-labels-are-sharper-without-bias": 2.5,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_presets_have_a_neuron_for_each_example(scale):
    preset = task.EXPERIMENT.presets[scale]
    assert preset.width >= preset.examples
    assert preset.steps % preset.every == 0
