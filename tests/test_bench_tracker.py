"""The tracker's benchmark: problems drawn by a seed, rows that add up."""

from dataclasses import replace

import pytest
import torch

from benchmarks import tracker as bench


@pytest.mark.parametrize("kind", bench.KINDS)
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


def test_a_run_that_diverges_ends_there():
    problem = bench.draw("mlp", 7, 20)
    problem.lr = 1e6
    assert len(bench.follow(problem, 1, replace(bench.QUICK, steps=40))) < 39
