"""SAM on a small language model: the runs at equal passes, and the claims on made runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab.experiments import Cell, NotApplicable
from sam_lab.experiments.critics import language as task

TINY = dataclasses.replace(
    task.LAPTOP,
    characters=300,
    validation=300,
    width=8,
    heads=2,
    length=8,
    batch=2,
    passes=8,
    looks=4,
    windows=3,
)


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("sgd", 0.1, [0, 2, 4, 6, 8]),
        ("noise", 0.5, [0, 2, 4, 6, 8]),
        ("sam", 0.05, [0, 2, 4, 6, 8]),
        ("sam_twice", 0.05, [0, 4, 8, 12, 16]),
        ("early", 0.5, [0, 1, 2, 3, 4]),
    ],
)
def test_every_contender_makes_the_passes_it_may(name, value, passes):
    columns = task.train(TINY, name, value)
    assert columns["passes"] == passes
    for column in ("loss", "validation_loss", "test_loss"):
        assert len(columns[column]) == len(passes) and np.isfinite(columns[column]).all()


def test_all_begin_with_the_same_network_and_a_whole_share_is_sgd_itself():
    sgd, early = task.train(TINY, "sgd", TINY.lr, 3), task.train(TINY, "early", 1.0, 3)
    assert sgd == early
    assert task.train(TINY, "sam", 0.1, 3)["test_loss"][0] == sgd["test_loss"][0]


def test_the_pass_of_a_contender_is_one_of_the_network(monkeypatch):
    passes = 0

    def counted(model, x, y, loss=task._loss):
        nonlocal passes
        passes += torch.is_grad_enabled()
        return loss(model, x, y)

    monkeypatch.setattr(task, "_loss", counted)
    for name, value in (("sgd", 0.1), ("noise", 0.5), ("sam", 0.1), ("early", 0.25)):
        passes = 0
        columns = task.train(TINY, name, value)
        assert passes == columns["passes"][-1], name


def test_the_search_takes_the_value_of_the_smallest_validation_loss():
    columns = task.run(TINY, Cell({"method": "sgd"}, 1))
    tried = task.CONTENDERS["sgd"].tried
    assert columns["tried"] == list(tried)
    expected = [
        task.train(TINY, "sgd", value, TINY.search_seed)["validation_loss"][-1] for value in tried
    ]
    assert columns["search_loss"] == expected
    assert columns["value"] == [tried[int(np.argmin(expected))]]


def test_a_value_that_diverges_is_not_chosen(monkeypatch):
    ends = iter([3.0, math.nan, 2.0, math.inf])
    monkeypatch.setattr(task, "train", lambda *_: {"validation_loss": [next(ends)]})
    found = task.search(dataclasses.replace(TINY, search_seed=77), "sgd")
    assert found == (3.0, math.inf, 2.0, math.inf)


def test_the_seed_of_the_search_is_not_reported():
    with pytest.raises(ValueError, match="seed must not be the search's"):
        task.run(TINY, Cell({"method": "sgd"}, TINY.search_seed))


def made(name, loss, validation, test):
    return run_of({"method": name}, 0, loss=loss, validation_loss=validation, test_loss=test)


RUNS = seed_runs(
    {},
    made("sgd", [4.0, 2.0, 1.0], [4.0, 2.5, 3.0], [4.0, 3.0, 3.4]),
    made("early", [4.0, 2.5, 2.2], [4.0, 2.7, 2.6], [4.0, 3.2, 3.1]),
    made("noise", [4.0, 2.0, 1.1], [4.0, 2.6, 2.9], [4.0, 3.1, 3.3]),
    made("sam", [4.0, 3.0, 1.5], [4.0, 2.8, 2.6], [4.0, 3.1, 2.9]),
    made("sam_twice", [4.0, 3.0, 1.2], [4.0, 2.8, 2.7], [4.0, 3.1, 3.5]),
)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    expected = {
        "sam-beats-sgd-at-equal-passes": 0.5,
        "sam-beats-sgd-at-the-best-look": 3.0 - 2.9,
        "sam-beats-early-stopping-on-text": 0.2,
        "sam-beats-noise-on-text": 0.4,
        # SGD has SAM's 1.5 halfway between its last two looks
        "sam-is-sgd-at-equal-training-loss": 3.2 - 2.9,
        "sam-degrades-even-with-twice-the-passes": -0.1,
        "sam-fits-less-of-the-text": 0.5,
    }
    cases = {name: (RUNS, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


def test_a_training_loss_that_is_never_reached_has_no_test_loss():
    with pytest.raises(NotApplicable, match="never fell to 0.5"):
        task.at_training_loss(RUNS.one(method="sgd"), 0.5)
    assert task.at_training_loss(RUNS.one(method="sgd"), 4.0) == 4.0


def test_the_cost_counts_the_search_and_every_contender():
    twice = dataclasses.replace(TINY, passes=2 * TINY.passes)
    assert task.cost(twice) == pytest.approx(2 * task.cost(TINY))
