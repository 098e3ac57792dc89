"""SAM's central flow against SAM on networks: the run, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.theory import central_flow as task
from sam_lab.sam import SAM

NETWORKS = (
    task.Network("digits", "tanh", 1, (0.1,), (0.2,)),
    task.Network("digits", "gelu", 1, (0.1,), (0.0, 0.2)),
    task.Network("digits", "gelu", 1, (0.1,), (0.2,), begin=2),
    task.Network("digits", "gelu", 1, (0.1,), (0.2,), k=1),
)
TINY = dataclasses.replace(task.LAPTOP, networks=NETWORKS, images=30, width=4, steps=6, every=2)


def cell(**changed):
    setting = {"data": "digits", "activation": "tanh", "depth": 1, "lr": 0.1, "rho": 0.2}
    return Cell({**setting, "begin": 0, "k": 2, **changed}, 3)


@pytest.mark.slow
def test_a_run_measures_sams_centre_and_both_flows():
    columns = task.run(TINY, cell())
    assert columns["step"] == [2, 4, 6]
    model, closure = task.problem(TINY, cell())
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.2)
    path, losses = [], []
    for _ in range(8):
        path.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        losses.append(float(sam.step(closure)))
    centre = (path[5] + 2 * path[6] + path[7]) / 4
    assert columns["moved"][-1] == pytest.approx(float((centre - path[0]).norm()))
    assert columns["loss"][-1] == pytest.approx((losses[5] + 2 * losses[6] + losses[7]) / 4)
    swing = (path[5] - 2 * path[6] + path[7]) / 4
    assert columns["whole_bounce"][-1] == pytest.approx(float(swing.norm()))
    assert columns["bounce"][-1] <= columns["whole_bounce"][-1]
    assert all(columns["central_mean_loss"][i] >= columns["central_loss"][i] for i in range(3))


def test_the_flows_move_apart_from_each_other_and_from_the_path():
    columns = task.run(TINY, cell(rho=5.0))
    assert columns["central_bounce"][-1] > 0
    assert columns["central_distance"][-1] != columns["plain_distance"][-1]
    assert columns["moved"][-1] not in (columns["plain_distance"][-1], 0.0)


def test_a_flow_can_set_out_from_a_later_centre():
    first, later = task.run(TINY, cell()), task.run(TINY, cell(begin=2))
    assert later["step"] == [4, 6]
    assert later["whole_bounce"] == first["whole_bounce"][1:], "SAM's path is the same"
    assert later["plain_distance"][0] < first["plain_distance"][1]


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("central_flow", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 5
    reasons = [verdict.reason for verdict in experiments.judge(result)]
    assert not any("failed" in reason for reason in reasons), reasons


def made(**changed):
    """Four measurements, the last after 120 steps; of SAM with GELU unless said."""
    setting = {**cell(activation="gelu").setting}
    columns = {
        "step": [30, 60, 90, 120],
        "sharpness": [3.0, 3.0, 3.0, 2.1],
        "central_sharpness": [3.0, 3.0, 3.0, 2.0],
        "plain_sharpness": [3.0, 3.0, 3.0, 4.2],
        "loss": [1.0, 1.0, 1.0, 0.51],
        "central_mean_loss": [1.0, 1.0, 1.0, 0.5],
        "bounce": [0.3, 0.3, 0.19, 0.22],
        "whole_bounce": [0.3, 0.3, 0.21, 0.25],
        "central_bounce": [0.2, 0.2, 0.2, 0.2],
        "central_distance": [0.1] * 4,
        "plain_distance": [0.1, 0.1, 0.1, 0.4],
    }
    for name, value in changed.items():
        (setting if name in setting else columns)[name] = value
    return run_of(setting, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(
        {},
        made(),
        made(activation="tanh", plain_distance=[0.5], plain_sharpness=[2.2], bounce=[9, 9, 0.1, 2]),
        made(rho=0.0, plain_distance=[0.35], sharpness=[2.4]),
        made(begin=80, plain_distance=[0.6]),
        made(k=1, central_distance=[0.2]),
    )
    # of the bounce the measurements at 90 and 120 count: 0.95 and 1.1; with tanh 0.5 and 10
    expected = {
        "sam-follows-its-central-flow": 4.0,
        "sam-follows-its-central-flow-tanh": 5.0,
        "sam-follows-its-central-flow-gelu": 4.0,
        "sam-follows-its-central-flow-once-it-bounces": 4.0,
        "sam-follows-its-central-flow-on-the-whole": 20**0.5,
        "bounce-begins-late": 0.0,
        "bounce-is-predicted": 10.0,
        "bounce-is-predicted-tanh": 10.0,
        "bounce-is-predicted-gelu": 1.1,
        "bounce-is-predicted-on-the-whole": 5.25,
        "bounce-in-all-directions-is-predicted": (1.05 + 1.25) / 2,
        "bounce-in-all-directions-is-predicted-everywhere": (1.05 + 1.25) / 2,
        "sharpness-is-predicted": 1.05,
        "loss-is-predicted": 1.02,
        "flow-without-bounce-is-sharper": 2.2 / 2.1,
        "flow-without-bounce-is-sharper-where-sam-bounces": 2.2 / 2.1,
        "flow-from-a-later-centre-is-followed": 6.0,
        "matrix-is-nearer-than-one-direction": 0.5,
        "descent-passes-its-edge-before-it-bounces": 0.12,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


def test_a_flow_that_never_bounces_predicts_no_size():
    assert len(task.settled(made(central_bounce=[0.0] * 4))) == 0
    late = made(central_bounce=[0.0, 0.2, 0.2, 0.2])
    assert task.settled(late) == pytest.approx(np.array([1.1]))
    assert task.settled(made(central_bounce=[0.2, 0.2, 0.2, 0.0]))[-1] == np.inf
    claim = next(each for each in task.EXPERIMENT.claims if each.id == "bounce-is-predicted")
    with pytest.raises(experiments.NotApplicable, match="does not bounce for long enough"):
        claim(seed_runs({}, made(central_bounce=[0.0] * 4)))


def test_sam_bounces_from_where_it_reaches_half_of_the_predicted_size():
    run = made(whole_bounce=[0.01, 0.09, 0.1, 0.2])
    assert task.onset(run) == 90
    assert task.bouncing(seed_runs({}, run, made(rho=0.1))) == [made(rho=0.1)]
    assert task.onset(made(whole_bounce=[0.0] * 4)) == np.inf


def test_the_delay_of_the_onset_counts_from_the_flows_own():
    claim = next(each for each in task.EXPERIMENT.claims if each.id == "bounce-begins-late")
    delayed = made(central_bounce=[0.0, 0.2, 0.2, 0.2], whole_bounce=[0.0, 0.0, 0.0, 0.1])
    never = made(central_bounce=[0.0, 0.0, 0.2, 0.2], whole_bounce=[0.0] * 4)
    assert claim(seed_runs({}, delayed)) == 60
    assert claim(seed_runs({}, never)) == 30, "at least"


@pytest.mark.parametrize("scale", ["laptop", "desktop", "paper"])
def test_presets_fit_their_horizon(scale):
    preset = task.EXPERIMENT.presets[scale]
    assert preset.every % preset.stride == 0 and preset.steps % preset.every == 0
    assert all(network.begin % preset.every == 0 for network in preset.networks)
