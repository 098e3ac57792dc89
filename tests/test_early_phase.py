"""What the first epochs decide: the deficits, the change of the learning rate, and the claims."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import early_phase as task
from sam_lab.training import evaluate

TINY = dataclasses.replace(
    task.LAPTOP,
    recipe=task.LAPTOP.recipe.but(
        data="digits", train=60, test=40, hidden=(8,), batch=20, epochs=3, measured=20
    ),
    durations=(1, 2),
    side=4,
    switches=(1,),
    course=5,
)


def test_a_blurred_image_keeps_what_is_constant_and_loses_what_alternates():
    assert torch.allclose(task.blurred(torch.full((2, 1, 8, 8), 0.3), 4), torch.tensor(0.3))
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(1, 1, 8, 8)
    assert torch.allclose(task.blurred(board, 4), torch.tensor(0.5))


def test_a_blur_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="side must divide images of 8x8 pixels, got 3"):
        task.blurred(torch.zeros(1, 1, 8, 8), 3)


def test_a_deficit_changes_what_it_names_and_nothing_else():
    x, y = torch.rand(30, 1, 28, 28), torch.arange(30) % 10
    found = {name: task.deficient(task.LAPTOP, name, x, y, seed=0) for name in task.DEFICITS}
    assert torch.equal(found["flip"][0], x.flip(2)) and found["flip"][1] is y
    assert found["blur"][0].shape == x.shape and found["blur"][1] is y
    assert found["labels"][0] is x
    assert torch.equal(found["labels"][1].sort().values, y.sort().values)
    assert not torch.equal(found["labels"][1], y)
    assert found["none"] == (x, y)


@pytest.mark.parametrize("deficit", task.DEFICITS)
def test_a_deficit_is_mended_for_as_many_epochs_as_without_it(deficit):
    cell = Cell({"deficit": deficit, "duration": 2}, 1)
    columns = task.run_deficit(TINY, cell)
    training, dataset = TINY.recipe.but(epochs=5).training(1)
    x, y = training.x, training.y
    training.x, training.y = task.deficient(TINY, deficit, x, y, 1)
    training.run(2)
    training.x, training.y = x, y
    training.run()
    _, wrong = evaluate(training.model, dataset.x_test, dataset.y_test)
    assert columns["test_error"] == [100 * wrong]
    assert columns["train_loss"] == [evaluate(training.model, x, y)[0]]


def test_the_learning_rate_changes_once_and_all_else_is_as_it_was():
    runs = {
        (early, late): task.run_rate(TINY, Cell({"early": early, "late": late, "switch": switch}))
        for early, late, switch in ((0.05, 0.05, 0), (0.05, 0.25, 1), (0.25, 0.25, 0))
    }
    low, changed, high = runs.values()
    assert changed["loss"][0] == low["loss"][0] != high["loss"][0], "the first epoch is the low one"
    assert changed["loss"][1] != low["loss"][1]
    assert changed["epoch"] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("early_phase", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 9 + 4
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def deficit(name, duration, error):
    return run_of({"study": "deficit", "deficit": name, "duration": duration}, test_error=error)


def course(early, late, sharpness):
    """Ten epochs to one closing loss, at a constant sharpness."""
    switch = 0 if early == late else 4
    return run_of(
        {"study": "rate", "early": early, "late": late, "switch": switch},
        loss=np.geomspace(2.0, 0.6, 10),
        sharpness=np.full(10, sharpness),
    )


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    config = {"durations": [10, 40], "switches": [1, 4], "low": 0.05, "high": 0.25}
    runs = [
        deficit("none", 0, 10.0),
        deficit("blur", 10, 99.0),
        deficit("blur", 40, 11.5),
        deficit("flip", 40, 10.25),
        deficit("labels", 40, 13.0),
        deficit("none", 40, 9.75),
        course(0.05, 0.05, 10.0),
        course(0.25, 0.25, 4.0),
        course(0.25, 0.05, 7.0),
        course(0.05, 0.25, 5.0),
    ]
    expected = {
        "blur-does-lasting-harm": 1.5,
        "flip-does-no-lasting-harm": 0.25,
        "random-labels-do-lasting-harm": 3.0,
        "more-epochs-do-no-harm": -0.25,
        "early-rate-decides-sharpness": 0.7,
        "late-rate-makes-up": 1.25,
        "high-rate-is-flatter": 0.4,
    }
    together = seed_runs(config, *runs)
    check_statistics(
        task.EXPERIMENT.claims, {name: (together, value) for name, value in expected.items()}
    )
