"""Gradient descent against its own central flow: the claims on made runs."""

import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab.experiments import NotApplicable
from sam_lab.experiments.theory import descent_flow as task


def made(lr=0.5, **changed):
    columns = {
        "sharpness": [4.2],
        "central_sharpness": [4.0],
        "plain_sharpness": [6.3],
        "whole_bounce": [0.3, 0.1],
        "central_bounce": [0.2, 0.2],
        "central_distance": [0.1],
        "plain_distance": [0.4],
    }
    return run_of({"lr": lr}, 0, **{**columns, **changed})


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    beyond = made(lr=0.4, sharpness=[6.0], central_sharpness=[5.0], plain_distance=[0.1])
    still = made(central_bounce=[0.2, 0.0], plain_distance=[0.1])
    runs = seed_runs({}, made(), beyond, still)
    expected = {
        "descent-follows-its-central-flow": 4.0,
        "descents-sharpness-is-predicted": 1.2,
        "descents-bounce-is-predicted-on-average": (0.05 / 0.04) ** 0.5,
        "gradient-flow-is-sharper": 6.3 / 4.2,
    }
    cases = {name: (runs, value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


def test_descent_that_is_not_at_its_edge_says_nothing():
    with pytest.raises(NotApplicable, match="gradient descent is not at 2/lr"):
        task.at_the_edge(seed_runs({}, made(sharpness=[3.0])))


@pytest.mark.parametrize("scale", ["laptop", "desktop", "paper"])
def test_presets_fit_their_horizon(scale):
    preset = task.EXPERIMENT.presets[scale]
    assert preset.every % preset.stride == 0
    for network in preset.networks:
        assert network.rhos == (0.0,)
        assert 0 < network.begin < preset.steps
        assert network.begin % preset.every == 0 == preset.steps % preset.every
