"""What the three tasks share: the statistics on runs made by hand, and the MLP task end to end."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import data, experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.sam import at_the_edge, sam_edge_mlp

TINY = dataclasses.replace(
    sam_edge_mlp.LAPTOP,
    data="mnist1d",
    images=40,
    hidden=(8,),
    lrs=(0.1, 0.2),
    rhos=(0.0, 0.1),
    steps=6,
    every=2,
)


def made(rho, lr=0.5, seed=0, **columns):
    """A run of eleven measurements, ten steps apart, exactly at its edge unless said otherwise."""
    edge = np.full(11, 4.0) if rho == 0 else np.linspace(3.0, 1.0, 11)
    base = {
        "step": np.arange(0, 110, 10),
        "loss": np.geomspace(1.0, 0.1, 11),
        "sharpness": edge.copy(),
        "gd_edge": np.full(11, 2 / lr),
        "sam_edge": edge,
        "grad_align": np.full(11, 0.5),
        "sam_align": np.full(11, 0.6),
    }
    return run_of({"lr": lr, "rho": rho}, seed, **{**base, **columns})


# At its edge, but for the start, and once above it.
SAM_FROM_1 = np.array([1.5, 2.8, 2.6, 2.4, 2.2, 2.2, 1.8, 1.6, 1.4, 1.2, 1.0])


def judged(make):
    """Verdicts by id on three seeds of one gradient-descent and one SAM run."""
    runs = [run for seed in range(3) for run in make(seed)]
    result = result_of({"lrs": [0.5]}, *runs)
    return {claim.id: claim.judge(result) for claim in at_the_edge.CLAIMS}


def as_the_paper_says(seed=0):
    """Gradient descent arrives at step 60, SAM, whose edge falls, at step 10."""
    return [
        made(0.0, seed=seed, sharpness=np.where(np.arange(11) < 6, 1.0, 4.0)),
        made(0.1, seed=seed, sharpness=SAM_FROM_1),
    ]


def test_runs_that_behave_as_the_paper_says_reproduce_every_claim():
    assert {verdict.verdict for verdict in judged(as_the_paper_says).values()} == {"reproduced"}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs({"lrs": [0.5]}, *as_the_paper_says())
    expected = {
        "gd-hovers": 1,
        "sam-hovers": 1,
        "sam-stays-near": 0.05,
        "below-2/lr": 1.5 / 4,
        "below-gd-at-equal-loss": np.exp(np.log([1.8, 1.6, 1.4, 1.2, 1.0]).mean()) / 4,
        "flatter-without-loss": 1,
        "edge-falls": 1 / 2.8,
        "sharpness-follows": np.polyfit(
            np.log(np.linspace(2.8, 1.0, 10)), np.log(SAM_FROM_1[1:]), 1
        )[0],
        "sam-better-aligned": 1,
        "alignment-gain": 0.1,
        "sam-arrives-early": 10 / 60,
    }
    check_statistics(at_the_edge.CLAIMS, {name: (runs, value) for name, value in expected.items()})


def test_a_fixed_quadratic_at_its_edge_is_told_from_a_network():
    """Constant sharpness, an edge that comes down to it and stays: near the edge, but not by SAM's
    doing."""
    edge = np.linspace(2.1, 2.0, 11)
    fixed = {"sharpness": np.full(11, 2.0), "sam_edge": edge}
    descent = {"sharpness": np.full(11, 2.0)}
    verdicts = judged(lambda seed: [made(0.0, seed=seed, **descent), made(0.1, seed=seed, **fixed)])
    assert verdicts["sam-hovers"].verdict == "reproduced"
    assert verdicts["sharpness-follows"].verdict == "not reproduced"
    assert verdicts["below-gd-at-equal-loss"].verdict == "not reproduced"
    assert verdicts["edge-falls"].verdict == "not reproduced"


def test_flatter_at_the_price_of_the_training_loss_does_not_count():
    def share(loss, sharpness):
        descent = made(0.0, loss=np.full(11, 0.1))
        sam = made(0.1, loss=np.full(11, loss), sharpness=np.full(11, sharpness))
        (claim,) = (one for one in at_the_edge.CLAIMS if one.id == "flatter-without-loss")
        return claim(seed_runs({"lrs": [0.5]}, descent, sam))

    assert share(0.109, 3.9) == 1
    assert share(0.111, 3.9) == 0
    assert share(0.109, 4.1) == 0


def test_a_run_above_its_edge_does_not_hover():
    verdicts = judged(
        lambda seed: [made(0.0, seed=seed), made(0.1, seed=seed, sharpness=np.full(11, 3.0))]
    )
    assert verdicts["sam-hovers"].verdict == "not reproduced"
    assert verdicts["sam-hovers"].mean == pytest.approx((3 / 1.6 + 3 / 1.4) / 2, rel=1e-5)


def test_arrival_is_the_step_from_which_on_the_sharpness_is_at_the_edge():
    def arrives(sharpness):
        return at_the_edge.arrival(made(0.1, sharpness=sharpness, sam_edge=np.full(11, 2.0)))

    assert arrives(np.linspace(0.0, 3.0, 11)) == 60
    assert arrives(np.zeros(11)) == 100, "never: the last step"
    assert arrives(np.full(11, 2.0)) == 10, "there from the start: one interval"
    thrown = np.array([9.0, 1.0, 1.2, 1.4, 1.6, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert arrives(thrown) == 50, "beyond the edge at first, but thrown below it"
    glance = np.array([0.5, 2.0, 2.0, 2.0, 2.0, 1.7, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert arrives(glance) == 10, "one measurement of ten below does not count"


def test_equal_loss_is_the_larger_of_the_closing_losses_averaged_over_five_measurements():
    slow = made(0.1, loss=0.5 ** np.arange(11), sharpness=2.0 ** np.arange(11))
    fast = made(0.0, loss=0.25 ** np.arange(11), sharpness=3.0 ** np.arange(11))
    # slow closes at 2**-8, its eighth measurement; fast is there at its fourth
    assert at_the_edge.at_equal_loss(slow, fast) == pytest.approx(2.0**8 / 3.0**4)
    assert at_the_edge.at_equal_loss(fast, slow) == pytest.approx(3.0**4 / 2.0**8)


def test_one_measurement_that_swings_does_not_decide_the_comparison_at_equal_loss():
    swinging = np.full(11, 2.0)
    swinging[8] = 4.0
    slow = made(0.1, loss=0.5 ** np.arange(11), sharpness=swinging)
    fast = made(0.0, loss=0.25 ** np.arange(11), sharpness=np.full(11, 2.0))
    assert at_the_edge.at_equal_loss(slow, fast) == pytest.approx(2 ** (1 / 5))


def test_who_arrives_first_is_asked_only_where_both_start_below_their_edge():
    def pair(lr, seed, start):
        descent = np.where(np.arange(11) < 6, 1.0, 4.0)
        descent[0] = start
        return [made(0.0, lr, seed, sharpness=descent), made(0.1, lr, seed, sharpness=SAM_FROM_1)]

    def verdict(*starts):
        runs = [
            run for seed in range(3) for i, at in enumerate(starts, 1) for run in pair(i, seed, at)
        ]
        return at_the_edge.sam_arrives_early.judge(result_of({"lrs": [1, 2]}, *runs))

    assert verdict(9.0, 9.0).explained == "does not apply (every run starts at its edge or beyond)"
    assert verdict(9.0, 1.0).measured == "0.166667 in every seed"


def test_the_grid_holds_every_rate_with_every_radius():
    assert at_the_edge.grid(TINY) == [
        {"lr": lr, "rho": rho} for lr in (0.1, 0.2) for rho in (0.0, 0.1)
    ]


def test_the_loss_is_a_fifth_of_cohens():
    model, loss = sam_edge_mlp.problem(TINY, seed=3)
    images = data.load("mnist1d", train=40, seed=3)
    x = images.x.flatten(1)
    error = model(x - x.mean(0)) - torch.eye(10)[images.y]
    cohen = 0.5 * error.square().sum(1).mean()
    assert loss().item() == pytest.approx(cohen.item() / 5, rel=1e-6)


def test_the_mlp_task_runs_to_a_result_and_the_same_seed_gives_the_same_numbers():
    result = experiments.run("sam_edge_mlp", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 4
    for run in result.runs:
        assert run["step"].tolist() == [0, 2, 4, 6]
        assert all(np.isfinite(values).all() for values in run.columns.values())
        if run.settings["rho"] == 0:
            assert (run["sam_edge"] == run["gd_edge"]).all()
        else:
            assert (run["sam_edge"] < run["gd_edge"]).all()
    setting = {"lr": 0.2, "rho": 0.1}
    again = run_of(setting, 1, **sam_edge_mlp.run(TINY, Cell(setting, 1)))
    assert again == result.select(**setting)[0]
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))


def test_gradient_descent_in_the_grid_is_plain_gradient_descent():
    columns = sam_edge_mlp.run(TINY, Cell({"lr": 0.2, "rho": 0.0}))
    model, loss = sam_edge_mlp.problem(TINY, seed=0)
    for _ in range(TINY.steps):
        model.zero_grad()
        loss().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.2 * p.grad
    assert columns["loss"][-1] == pytest.approx(loss().item(), rel=1e-6)


@pytest.mark.parametrize("scale", ["laptop", "desktop", "paper"])
def test_presets_begin_with_gradient_descent_and_measure_often_enough(scale):
    config = sam_edge_mlp.EXPERIMENT.presets[scale]
    assert config.rhos[0] == 0
    assert all(rho > 0 for rho in config.rhos[1:])
    assert list(config.lrs) == sorted(config.lrs)
    assert config.steps >= 40 * config.every
