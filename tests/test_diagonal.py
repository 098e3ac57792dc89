"""Diagonal linear networks: gradients beside autograd, what descent keeps, claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import diagonal as task

TINY = dataclasses.replace(
    task.LAPTOP, draws=3, examples=4, inputs=6, relevant=2, level=1e-2, lr=1.0, full_batch=(0.1,)
)


@pytest.fixture
def point():
    """Weights and data of three draws, and a generator that goes on."""
    rng = np.random.default_rng(0)
    data = task.draws(TINY, 1)
    return rng.standard_normal((3, 6)), rng.standard_normal((3, 6)), data


def loss(u, v, x, y):
    return (x @ (u * v) - y).square().mean() / 2


def through(function, *arrays):
    return [each.numpy() for each in function(*map(torch.tensor, arrays))]


def grads(u, v, x, y):
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    return torch.autograd.grad(loss(u, v, x, y), (u, v))


@pytest.mark.parametrize("method", task.METHODS)
def test_gradients_are_those_of_autograd(method, point):
    u, v, data = point
    rho = 0.3

    def one(u, v, x, y):
        if method == "descent":
            return grads(u, v, x, y)
        groups = (
            [(x, y)] if method == "full_batch" else list(zip(x[:, None], y[:, None], strict=True))
        )
        found = []
        for some_x, some_y in groups:
            gu, gv = grads(u, v, some_x, some_y)
            found.append(grads(u + rho * gu, v + rho * gv, some_x, some_y))
        return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]

    ours = task.gradient(u, v, data.x, data.y, method, rho)
    for draw in range(3):
        theirs = through(one, u[draw], v[draw], data.x[draw], data.y[draw])
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[draw] == pytest.approx(other, abs=1e-10)


def test_another_method_is_named(point):
    u, v, data = point
    with pytest.raises(ValueError, match="method must be one of descent, .* got 'sam'"):
        task.gradient(u, v, data.x, data.y, "sam")


def test_the_trace_is_that_of_the_dense_hessian(point):
    u, v, data = point
    x, y = torch.tensor(data.x[1]), torch.tensor(data.y[1])
    both = torch.tensor(np.concatenate([u[1], v[1]]))
    hessian = torch.autograd.functional.hessian(lambda w: loss(w[:6], w[6:], x, y), both)
    assert task.trace(u, v, data.x)[1] == pytest.approx(hessian.trace().item())


def test_the_trace_is_at_least_the_weighted_norm_and_equal_where_balanced(point):
    u, v, data = point
    s = np.square(data.x).mean(1)
    least = 2 * (s * np.abs(u * v)).sum(1)
    assert (task.trace(u, v, data.x) >= least).all()
    even = np.sqrt(np.abs(u * v))
    assert task.trace(even, np.sign(u * v) * even, data.x) == pytest.approx(least)


def test_each_draw_stops_at_the_level_by_itself():
    data = task.draws(TINY, 1)
    u, v = task.fit(data, TINY, 0.5)
    alone = task.Draws(data.x[1:2], data.y[1:2], data.truth)
    u_alone, v_alone = task.fit(alone, TINY, 0.5)
    assert u[1] == pytest.approx(u_alone[0]) and v[1] == pytest.approx(v_alone[0])
    residual = (data.x @ (u * v)[..., None])[..., 0] - data.y
    losses = np.square(residual).mean(1) / 2
    assert (losses <= TINY.level).all() and (losses > 0.5 * TINY.level).all()


def test_small_steps_of_descent_keep_the_start():
    slow = dataclasses.replace(TINY, lr=0.02, steps=100_000)
    u, v = task.fit(task.draws(slow, 1), slow, 0.5)
    assert task.left_of_start(u, v) == pytest.approx(np.full((3, 6), 0.5), rel=0.01)


def test_a_level_that_is_not_reached_is_named():
    hasty = dataclasses.replace(TINY, steps=3)
    with pytest.raises(FloatingPointError, match="3 of 3 draws have not reached"):
        task.fit(task.draws(hasty, 1), hasty, 0.1)


def test_a_run_that_diverges_is_named():
    wild = dataclasses.replace(TINY, lr=1e3)
    with (
        pytest.raises(FloatingPointError, match="one_example with rho 0.2 has diverged"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        task.fit(task.draws(wild, 1), wild, 0.1, "one_example", 0.2)


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("diagonal", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 5
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def test_a_run_holds_one_value_a_draw():
    columns = task.run(TINY, Cell({"method": "one_example", "rho": 0.2, "init": 0.1}, 4))
    assert {len(values) for values in columns.values()} == {3}
    data = task.draws(TINY, 4)
    u, v = task.fit(data, TINY, 0.1, "one_example", 0.2)
    plain_u, plain_v = task.fit(data, TINY, 0.1)
    away = np.linalg.norm(u * v - plain_u * plain_v, axis=1)
    assert columns["to_descent"] == pytest.approx(away)
    assert columns["test_error"] == pytest.approx(np.square(u * v - data.truth).sum(1) / 2)


def made(method, rho, init, test_error, **columns):
    return run_of({"method": method, "rho": rho, "init": init}, 0, test_error=test_error, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {"init": 0.1, "small": 0.02, "one_example": [0.06, 0.2]},
        made("descent", 0.0, 0.1, [4, 4, 4, 4], trace=[4, 4, 4, 4], norm=[2, 2, 2, 2]),
        made("full_batch", 0.1, 0.1, [3, 5, 5, 5]),
        made("full_batch", 1.0, 0.1, [3, 3, 5, 5]),
        made("one_example", 0.06, 0.1, [1, 3, 3, 3]),
        made(
            "one_example",
            0.2,
            0.1,
            [0.5, 2, 2, 5],
            trace=[3, 3, 3, 5],
            norm=[1, 3, 3, 3],
            start=[0.01, 0.03, 0.05, 0.07],
            to_descent=[2, 2, 4, 4],
            to_replay=[0.1, 0.1, 0.2, 0.2],
            to_even=[0.3, 0.3, 0.3, 0.3],
        ),
        made("descent", 0.0, 0.02, [1, 1, 1, 1]),
    )
    expected = {
        "one-example-beats-descent": 75,
        "full-batch-beats-descent": 50,
        "smaller-start-beats-both": 75,
        "one-example-is-flatter": 75,
        "one-example-is-sparser": 25,
        "one-example-shrinks-the-start": 0.4,
        "replay-ends-where-sam-ended": 0.05,
        "even-replay-misses": 2,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)
