"""Gradient descent with a larger learning rate beside SAM: the run, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import data, experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.sam import larger_step as task
from sam_lab.experiments.sam import sam_edge_mlp

TASK = dataclasses.replace(
    sam_edge_mlp.LAPTOP,
    data="mnist1d",
    images=40,
    hidden=(8,),
    lrs=(0.1, 0.2),
    rhos=(0.0, 0.1),
    steps=6,
    every=2,
)
TINY = task.Config(TASK, finer=2)


def test_a_run_of_sam_carries_descent_at_twice_over_its_late_edge():
    columns = task.run(TINY, Cell({"lr": 0.2, "rho": 0.1}, 3))
    run = run_of({"lr": 0.2, "rho": 0.1}, 3, **columns)
    other = task.larger(run)
    late = np.median(columns["sam_edge"][-1:])
    assert other.settings["lr"] == pytest.approx(2 / late, rel=1e-5)
    assert other["gd_edge"] == pytest.approx(np.full(len(other["step"]), late), rel=1e-5)
    assert run["step"].tolist() == [0, 2, 4, 6]
    assert other["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert other["loss"][0] == run["loss"][0], "from the same weights"
    assert len(other["test_error"]) == len(other["step"])


def test_the_larger_step_ends_where_its_loss_is_low_enough():
    config = dataclasses.replace(TINY, enough=1.0, task=dataclasses.replace(TASK, steps=60))
    run = run_of({"lr": 0.1, "rho": 0.1}, 0, **task.run(config, Cell({"lr": 0.1, "rho": 0.1})))
    losses = task.larger(run)["loss"]
    level = np.median(run["loss"][-5:])
    assert losses[-1] <= level < losses[:-1].min()


def test_the_first_run_is_that_of_the_task_itself():
    setting = {"lr": 0.2, "rho": 0.1}
    ours, theirs = task.run(TINY, Cell(setting, 1)), sam_edge_mlp.run(TASK, Cell(setting, 1))
    assert {name: ours[name] for name in theirs} == theirs


def test_the_test_error_is_that_on_images_which_no_run_has_seen():
    model, _, error = task.problem(TINY, 0, "cpu")
    images = data.load("mnist1d", train=40)
    x = images.x_test.flatten(1) - images.x.flatten(1).mean(0)
    wrong = torch.stack([model(one[None]).argmax() for one in x]) != images.y_test
    assert error() == pytest.approx(100 * wrong.double().mean().item())


def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("larger_step", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 4
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def made(rho, loss, sharpness, error, **more):
    """Eleven measurements, ten steps apart; sharpness and error are constant."""
    columns = {
        "step": np.arange(0, 110, 10),
        "loss": np.geomspace(1, loss, 11),
        "sharpness": np.full(11, sharpness),
        "test_error": np.full(11, error),
    }
    return run_of({"lr": 0.5, "rho": rho}, 0, **columns, **more)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    descent = made(0.0, 1e-3, 3.5, 12.0)
    sams = [
        made(
            rho,
            1e-2,
            sharpness,
            error,
            larger_step=np.arange(0, 22, 2),
            larger_loss=np.geomspace(1, 1e-3, 11),
            larger_sharpness=np.full(11, 1.0),
            larger_gd_edge=np.full(11, 1.25),
            larger_test_error=np.full(11, 9.0),
            larger_lr=[1.6],
        )
        for rho, sharpness, error in ((0.1, 0.7, 10.0), (0.2, 1.4, 11.0))
    ]
    # SAM's closing loss is the median of its last five, 10**-1.6, from which 1e-3 is reached at
    # the sixth of the eleven measurements of the larger step: 10**-1.8 at step 12
    runs = seed_runs({}, descent, *sams)
    expected = {
        "sam-flatter-than-larger-step": 1.4,
        "larger-step-is-as-flat": 0.7,
        "larger-step-flattens": 1 / 3.5,
        "larger-step-at-its-edge": 0.8,
        "larger-step-is-faster": 12 / 100,
        "sam-generalizes-better-than-descent": -1.5,
        "sam-generalizes-better-than-larger-step": 1.5,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


def test_a_loss_that_is_never_reached_takes_forever():
    assert task.steps_to(made(0.0, 0.1, 1.0, 1.0), 0.01) == np.inf
    assert task.steps_to(made(0.0, 0.1, 1.0, 1.0), 0.5) == 40


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_presets_begin_with_gradient_descent(scale):
    preset = task.EXPERIMENT.presets[scale].task
    assert preset.rhos[0] == 0 and all(rho > 0 for rho in preset.rhos[1:])
    assert preset.steps % preset.every == 0
