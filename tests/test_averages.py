"""Averages of weights beside SAM: the mean itself, the passes, and the claims on made runs."""

import dataclasses

import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import averages as task

TINY = dataclasses.replace(
    task.LAPTOP,
    recipe=task.LAPTOP.recipe.but(
        data="digits", train=60, test=40, hidden=(8,), batch=20, epochs=8, measured=20
    ),
)


def cell(rho=0.0, schedule="constant", noise=0.3, seed=1):
    return Cell({"noise": noise, "rho": rho, "schedule": schedule}, seed)


def test_the_average_is_the_mean_of_the_weights_after_each_step_of_the_last_quarter():
    training, _ = task.prepare(TINY, cell())
    average = task.average_along(training, TINY.share)
    again, _ = task.prepare(TINY, cell())
    seen = []
    again.run(6)
    again.run(on_step=lambda: seen.append([p.detach().clone() for p in again.model.parameters()]))
    assert len(seen) == 2 * 3
    for p, *along in zip(average.module.parameters(), *seen, strict=True):
        assert torch.allclose(p, torch.stack(along).mean(0), atol=1e-6)
    for p, q in zip(training.model.parameters(), seen[-1], strict=True):
        assert torch.equal(p, q), "averaging must not disturb the run"


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_sam_and_sgd_make_as_many_passes(rho):
    columns = task.run(TINY, cell(rho))
    training, _ = task.prepare(TINY, cell(rho))
    assert columns["passes"] == [8]
    assert training.run().history[-1]["passes"] == 8 * 3


def test_true_labels_are_true_and_the_test_set_always_is():
    clean, dataset = task.prepare(TINY, cell(noise=0.0))
    noisy, same = task.prepare(TINY, cell())
    assert torch.equal(clean.y, dataset.y) and not torch.equal(noisy.y, dataset.y)
    assert torch.equal(dataset.y_test, same.y_test)


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("averages", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 8
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def made(noise, rho, schedule, last, average, sharpness=(1.0, 1.0)):
    columns = dict(zip(("last_sharpness", "average_sharpness"), sharpness, strict=True))
    return run_of(
        {"noise": noise, "rho": rho, "schedule": schedule},
        last_test_error=last,
        average_test_error=average,
        **columns,
    )


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = [
        made(0.3, 0.0, "constant", 30.0, 27.0, (8.0, 6.0)),
        made(0.3, 0.0, "cosine", 26.0, 25.5),
        made(0.3, 0.2, "constant", 24.0, 22.0, (3.0, 2.0)),
        made(0.3, 0.2, "cosine", 21.0, 21.5),
        made(0.0, 0.0, "constant", 12.0, 11.0, (4.0, 2.0)),
        made(0.0, 0.0, "cosine", 11.25, 11.1),
        made(0.0, 0.2, "constant", 11.5, 11.25, (3.0, 1.0)),
        made(0.0, 0.2, "cosine", 10.75, 10.5),
    ]
    noisy = {
        "average-helps-sgd": 3.0,
        "average-helps-sam": 2.0,
        "sam-beats-average": 3.0,
        "both-beat-either": 2.0,
        "average-is-flatter": 0.75,
        "sam-is-flatter-than-average": 0.5,
        "decay-does-as-much": 1.0,
        "decay-does-as-much-for-sam": 1.0,
        "sam-beats-decayed-average": 4.5,
    }
    clean = {
        "average-helps-sgd": 1.0,
        "average-helps-sam": 0.25,
        "sam-beats-average": -0.5,
        "both-beat-either": -0.25,
        "average-is-flatter": 0.5,
        "sam-is-flatter-than-average": 1.5,
        "decay-does-as-much": -0.25,
        "decay-does-as-much-for-sam": 0.5,
        "sam-beats-decayed-average": 0.35,
    }
    expected = noisy | {f"{name}-clean": value for name, value in clean.items()}
    together = seed_runs({"rho": 0.2}, *runs)
    check_statistics(
        task.EXPERIMENT.claims, {name: (together, value) for name, value in expected.items()}
    )
