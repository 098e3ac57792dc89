"""The tracker's benchmark: problems drawn by a seed, rows that add up."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import tracker as bench
from sam_lab import Hessian


@pytest.mark.parametrize(
    "kind", [*bench.KINDS[:-1], pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_the_seed_alone_draws_a_problem(kind):
    one, same = (bench.draw(kind, 7, 20) for _ in range(2))
    assert (one.about, one.lr) == (same.about, same.lr)
    assert torch.equal(one.closure(), same.closure())
    assert len({bench.draw(kind, seed, 20).about for seed in range(6)}) > 3


def test_each_run_draws_a_seed_of_its_own():
    assert bench.Config().seed != bench.Config().seed


@pytest.mark.slow
def test_every_measurement_but_the_first_is_counted_in_one_regime():
    config = replace(bench.QUICK, ks=(1,), cnns=0, resnets=0)
    result = bench.run(config)
    rows = [row for row in result["tracking"] if row["kind"] == "all"]
    assert sum(row["measurements"] for row in rows) == 2 * (config.steps - 1)
    for row in rows:
        assert 1 <= row["median"] <= row["p90"] <= row["most"]
        assert row["residual_within"] == 1.0
    assert f"seed {config.seed}" in bench.table({**result, "provenance": {}})


@pytest.mark.parametrize("angle", [1e-3, 0.1, 0.5])
def test_no_fewer_products_than_a_search_of_the_whole_span_needs(angle):
    """Against the definition: the least residual in the span of v, Hv, .. each shift by itself."""
    values = torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, -1.0], dtype=torch.float64)
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    operator = Hessian(lambda: (values * w * w).sum() / 2, [w])
    start = torch.ones(6, dtype=torch.float64) * math.sin(angle) / 5**0.5
    start[0] = math.cos(angle)
    count = bench.fewest_products(operator, start, 5.0, 1e-2)
    powers = torch.stack([values**i * start for i in range(6)], 1)

    def least(m):
        basis = torch.linalg.qr(powers[:, :m])[0]
        return min(
            float(torch.linalg.svdvals(values[:, None] * basis - shift * basis)[-1])
            for shift in np.linspace(4.95, 5.05, 201)
        )

    assert least(count) <= 0.0501
    assert count == 1 or least(count - 1) > 0.0499
    assert bench.degrees(start, -torch.eye(6, dtype=torch.float64)[0]) == pytest.approx(
        math.degrees(angle)
    )


def test_a_run_that_diverges_ends_there():
    problem = bench.draw("mlp", 7, 20)
    problem.lr = 1e6
    assert len(bench.follow(problem, 1, replace(bench.QUICK, steps=40))) < 39
