"""The experiment behind chapter 1, against closed forms on quadratics and on made-up runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments.edge import edge_of_stability as eos

CURVATURES = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
START = (1.0, 2.0, -1.0)


@pytest.fixture
def quadratic():
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    return (lambda: 0.5 * (CURVATURES * w**2).sum()), [w]


def closed_form(lr, steps):
    """Loss of gradient descent after 0, 1, ... steps."""
    factors = (1 - lr * CURVATURES.numpy()) ** np.arange(steps + 1)[:, None]
    return 0.5 * (CURVATURES.numpy() * (factors * np.array(START)) ** 2).sum(1)


def test_descend_is_gradient_descent(quadratic):
    run = eos.descend(*quadratic, lr=0.3, steps=10, every=2, tol=1e-8)
    assert run["step"] == [0, 2, 4, 6, 8, 10]
    assert np.allclose(run["loss"], closed_form(0.3, 10)[::2])
    assert np.allclose(run["sharpness"], 4.0)
    assert max(run["residual"]) <= 1e-8 * 4.0


def test_the_component_along_the_top_eigenvector_is_multiplied_by_one_minus_lr_lambda(quadratic):
    run = eos.descend(*quadratic, lr=0.6, steps=6, tol=1e-10)
    along, after = np.array(run["along"]), np.array(run["next_along"])
    assert np.allclose(after[:-1] / along[:-1], 1 - 0.6 * 4.0)
    assert math.isnan(after[-1])


def test_rises_counts_the_steps_on_which_the_loss_rose(quadratic):
    stable = eos.descend(*quadratic, lr=0.4, steps=8, every=4)
    assert stable["rises"] == [0, 0, 0]
    with torch.no_grad():
        quadratic[1][0].copy_(torch.tensor(START))
    unstable = eos.descend(*quadratic, lr=0.6, steps=8, every=4)
    rose = np.diff(closed_form(0.6, 8)) > 0
    assert unstable["rises"] == [0, rose[:4].mean(), rose[4:].mean()]


def test_small_substeps_follow_gradient_flow(quadratic):
    eos.descend(*quadratic, lr=0.5, steps=2, substeps=400)
    flow = torch.tensor(START, dtype=torch.float64) * torch.exp(-CURVATURES * 1.0)
    assert torch.allclose(quadratic[1][0].detach(), flow, atol=2e-3)


@pytest.mark.parametrize(("forbidden", "still"), [(slice(0, 1), 0), (slice(1, 2), 1)])
def test_forbidden_directions_do_not_move(quadratic, forbidden, still):
    eos.descend(*quadratic, 0.6, 5, k=2, forbidden=lambda v: v[:, forbidden], tol=1e-10)
    w = quadratic[1][0].detach()
    expected = torch.tensor(START) * (1 - 0.6 * CURVATURES) ** 5
    expected[still] = START[still]
    assert torch.allclose(w, expected, atol=1e-6)


def test_the_share_of_the_oscillation_along_the_top_eigenvector(quadratic):
    run = eos.descend(*quadratic, lr=0.6, steps=8, every=2, tol=1e-10)
    # the gradient's change in a step is -lr H g, here lr * curvature^2 * w along each axis
    steps = np.arange(0, 8, 2)[:, None]
    change = CURVATURES.numpy() ** 2 * (1 - 0.6 * CURVATURES.numpy()) ** steps * np.array(START)
    expected = change[:, 0] ** 2 / (change**2).sum(1)
    assert np.allclose(run["share"][:-1], expected)
    assert math.isnan(run["share"][-1])


def test_the_census_splits_one_step_among_many_directions(quadratic):
    lr = 0.6
    columns = eos.census(*quadratic, lr, k=3, tol=1e-10)
    assert np.allclose(columns["census_value"], CURVATURES)
    change = (CURVATURES.numpy() ** 2 * np.array(START)) ** 2
    assert np.allclose(columns["census_share"], change / change.sum())
    assert torch.allclose(quadratic[1][0], (1 - lr * CURVATURES) * torch.tensor(START))


def test_random_directions_are_orthonormal_and_follow_their_seed():
    like = torch.zeros(1, dtype=torch.float64)
    one, again, other = (eos.random_directions(30, 4, seed, like) for seed in (1, 1, 2))
    assert torch.allclose(one.T @ one, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert one.equal(again) and not one.equal(other)


def test_descend_stops_where_it_is_told_to(quadratic):
    run = eos.descend(*quadratic, lr=0.1, steps=50, every=5, stop=lambda sharpness: True)
    assert run["step"] == [0]
    assert quadratic[1][0].tolist() == list(START)


def test_a_run_that_diverges_says_when(quadratic):
    with pytest.raises(FloatingPointError, match="lr=1000"):
        eos.descend(*quadratic, lr=1000.0, steps=200, every=1000)


def test_the_loss_is_half_the_squared_error_summed_over_outputs():
    config = dataclasses.replace(eos.LAPTOP, data="digits", images=20, hidden=(4,))
    loss, params = eos.problem(config, seed=0)
    with torch.no_grad():
        for p in params:
            p.zero_()
    assert loss().item() == pytest.approx(0.5)  # one target of ten is 1


def test_images_are_centred_and_share_one_scale():
    config = dataclasses.replace(eos.LAPTOP, data="digits", images=50, hidden=())
    loss, params = eos.problem(config, seed=0)
    weight, bias = params
    with torch.no_grad():
        weight.fill_(1.0)
        bias.zero_()
    # a linear map of centred inputs: the gradient with respect to the bias is the mean of
    # (prediction - target), and the predictions cancel
    grads = torch.autograd.grad(loss(), params)
    assert torch.allclose(grads[1], torch.full((10,), -0.1), atol=1e-5)


def test_seeds_change_the_run_and_repeat_it():
    config = dataclasses.replace(eos.LAPTOP, data="digits", images=20, hidden=(4,))
    values = [eos.problem(config, seed=seed)[0]().item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_an_unknown_loss_is_named():
    config = dataclasses.replace(eos.LAPTOP, data="digits", images=20, hidden=(4,))
    with pytest.raises(ValueError, match="'hinge'"):
        eos.problem(config, loss="hinge")


TINY = dataclasses.replace(
    eos.LAPTOP,
    data="digits",
    images=50,
    hidden=(8,),
    lrs=(0.4, 0.8),
    small_lr=0.05,
    relu_lr=0.4,
    cross_entropy_lr=0.4,
    time=20.0,
    control_time=12.0,
    branch_lr=0.8,
    branch_time=4.0,
    blocked=1,
    census=4,
    every=5,
)


def test_a_small_run_measures_everything_that_its_claims_need():
    result = experiments.run(eos.EXPERIMENT, TINY, seeds=1, progress=False)
    assert len(result.runs) == len(eos.settings(TINY))
    (runs,) = result.by_seed()
    assert all(math.isfinite(claim(runs)) for claim in eos.CLAIMS)
    steps, sharpness = eos.branches(runs)
    assert len(steps) > 1 and {len(s) for s in sharpness.values()} == {len(steps)}
    # branches start from the weights of the main run
    assert np.allclose(sharpness["flow"][0], sharpness["gd"][0], rtol=0.02)


def made_up(hover=1.02, blocked=1.5, others=1.02, top=0.95, below=0.05, burst=0.8, seed=0):
    """Runs of one seed in which everything is as claimed, unless told otherwise."""
    config, runs = dataclasses.asdict(eos.LAPTOP), []
    for setting in eos.settings(eos.LAPTOP):
        edge, n = 2 / setting["lr"], 41
        rise = np.minimum(np.linspace(0.2, 2.2, n), hover) * edge
        if setting["path"] == "blocked":
            rise = np.linspace(1, blocked, n) * edge
        if setting["path"] == "flow":
            rise = np.linspace(1, 1.5, n) * edge
        if setting["path"] in ("random", "next"):
            rise = np.minimum(np.linspace(0.2, 2.2, n), others) * edge
        if setting["lr"] == eos.LAPTOP.small_lr:
            rise = rise / 10
        if setting["loss"] == "cross-entropy":
            rise = rise[::-1]
        if setting["activation"] == "relu":
            rise = rise / 2
        columns = {
            "step": (0 if setting["path"] == "gd" else 100) + 10 * np.arange(n),
            "loss": np.logspace(0, -3, n),
            "sharpness": rise,
            "rises": np.full(n, 0.4),
        }
        if setting["path"] == "gd":
            first = below if setting["lr"] == eos.LAPTOP.small_lr else top
            halves = np.full(n // 2, burst), np.full(n // 2, first)
            columns["share"] = np.r_[(*halves, np.nan)]
            columns["census_value"] = np.array([1.05, 0.96, 0.94]) * edge
            columns["census_share"] = np.array([0.0, first, 0.0])
        runs.append(run_of(setting, seed, **columns))
    return seed_runs(config, *runs)


EXPECTED = {
    "progressive sharpening": 1.02 / 0.2,
    "hovers at 2/lr": 1.02,
    "not monotone": 0.4,
    "falls in the long run": 10**-1.5,
    "v1 carries the first burst": 0.8,
    "directions at the edge carry the oscillation": 0.95,
    "no oscillation far below the edge": 0.05,
    "oscillation lies along v1": 0.95,
    # the branches share the steps 100 to 400: the last 8 of 31 are those from 330 on
    "oscillation holds sharpness down": 1 + 0.5 * 26.5 / 40 - 1.02,
    "random directions do not matter": 0.0,
    "v2 to v5 do not matter": 0.0,
    "the first of four matters": 1 + 0.5 * 26.5 / 40 - 1.02,
    "blocked follows flow": 0.0,
    "small lr stays below": 0.102,
    "ReLU saturates": 0.51,
    "cross-entropy falls at the end": 0.2 / 1.02,
}


def test_every_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = made_up()
    check_statistics(eos.CLAIMS, {name: (runs, value) for name, value in EXPECTED.items()})


def verdicts(**change):
    seeds = [made_up(**change, seed=seed) for seed in range(3)]
    result = result_of(seeds[0].config, *(run for runs in seeds for run in runs.runs))
    return {verdict.claim.id: verdict.verdict for verdict in eos.EXPERIMENT.judge(result)}


def test_the_claims_hold_on_runs_made_to_hold_them():
    assert set(verdicts().values()) == {"reproduced"}


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        ({"hover": 1.3}, {"hovers at 2/lr"}),
        ({"blocked": 1.0}, {"oscillation holds sharpness down", "blocked follows flow"}),
        ({"others": 1.3}, {"random directions do not matter", "v2 to v5 do not matter"}),
        ({"top": 0.2}, {"oscillation lies along v1"}),
        ({"top": 0.6}, {"directions at the edge carry the oscillation"}),
        ({"others": 1.5}, {"the first of four matters"}),
        ({"burst": 0.1}, {"v1 carries the first burst"}),
        ({"below": 0.6}, {"no oscillation far below the edge"}),
    ],
)
def test_each_claim_can_fail(change, falls):
    judged = verdicts(**change)
    assert falls <= {name for name, verdict in judged.items() if verdict == "not reproduced"}


def test_the_paper_preset_is_the_network_of_the_papers_code():
    assert eos.PAPER.data == "cifar10" and eos.PAPER.images == 5000
    assert eos.PAPER.hidden == (200, 200) and 0.01 in eos.PAPER.lrs
