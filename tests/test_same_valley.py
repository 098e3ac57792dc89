"""One valley or two: the runs behind the lines, what is measured, and what the claims say."""

import dataclasses

import claims_contract
import numpy as np
import pytest
import torch
from torch import nn

from sam_lab import experiments, models
from sam_lab.experiments import Cell, Run
from sam_lab.experiments.late import same_valley
from sam_lab.training import Phase, evaluate, late

TINY = dataclasses.replace(
    same_valley.LAPTOP,
    recipe=same_valley.LAPTOP.recipe.but(
        train=120, test=60, hidden=(12, 12), epochs=8, batch=20, measured=120, tol=0.05
    ),
    points=6,
)
PLAIN, NORMED = ({"batchnorm": batchnorm} for batchnorm in (False, True))


def tiny(*, recipe=None, **changes):
    return dataclasses.replace(TINY, recipe=TINY.recipe.but(**(recipe or {})), **changes)


def run_of(config, setting, seed=0):
    return Run(setting, seed, same_valley.run(config, Cell(setting, seed)))


@pytest.fixture(scope="module")
def result():
    return experiments.run(same_valley.EXPERIMENT, TINY, seeds=[1], device="cpu", progress=False)


def test_lines_that_share_a_solution_meet_there_and_the_paths_lead_from_end_to_end(result):
    for run in result.runs:
        at = {
            (name, alpha): run[f"{name}_train"][run["alpha"] == alpha].item()
            for name in same_valley.LINES
            for alpha in (0, 1)
        }
        assert at["sam", 0] == at["sgd", 0] == run["sam_path"][0] == run["sgd_path"][0]
        assert at["sam", 1] == at["siblings", 1] == run["sam_path"][-1]
        last = at["sgd", 1]
        assert last == at["siblings", 0] == at["order", 0] == at["independent", 0]
        assert last == run["sgd_path"][-1]
        assert len({*at.values()}) == 5


def test_each_column_has_the_length_of_its_axis(result):
    for run in result.runs:
        assert run["alpha"].tolist() == [-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
        # every step of two epochs, then every epoch
        assert run["step"].tolist() == list(range(13))
        assert len(run["sam_path"]) == len(run["sgd_path"]) == 13
        ends = {name for line in same_valley.LINES.values() for name in line}
        for name in ends:
            assert run[f"{name}_sharpness"] > 0 and 0 <= run[f"{name}_error"] <= 1
        for name in same_valley.LINES:
            assert (f"{name}_carried" in run) == run.settings["batchnorm"]
            for what in ("train", "test"):
                assert np.isfinite(run[f"{name}_{what}"]).all()
                assert len(run[f"{name}_{what}"]) == len(run["alpha"])


def test_after_the_watched_epochs_each_epoch_has_one_measurement():
    run = run_of(tiny(recipe={"epochs": 12}, watch=1), PLAIN)
    assert run["step"].tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 18]


def test_the_end_of_the_path_is_the_training_that_switches_there(result):
    start, _ = same_valley.prepare(TINY, Cell(PLAIN, 1))
    end = start.branch(late(6, 8, rho=TINY.rho)).run()
    loss, _ = evaluate(end.model, end.x, end.y, nn.CrossEntropyLoss(label_smoothing=0.1))
    (run,) = result.select(seed=1, batchnorm=False)
    assert run["sam_path"][-1] == pytest.approx(loss, rel=1e-5)


def test_without_a_radius_sam_is_sgd():
    run = run_of(tiny(rho=0.0), PLAIN)
    assert run["sam_path"].tolist() == run["sgd_path"].tolist()
    assert run["siblings_distance"] == 0 and run["sam_distance"] > 0


@pytest.mark.parametrize("setting", [PLAIN, NORMED])
def test_without_learning_only_other_initial_weights_make_a_distance(setting):
    run = run_of(tiny(recipe={"lr": 0.0}), setting)
    distances = {name: run[f"{name}_distance"].item() for name in same_valley.LINES}
    assert distances.pop("independent") > 1
    assert set(distances.values()) == {0.0}
    assert np.ptp(run["sam_path"]) == 0


def test_another_order_of_the_examples_leads_elsewhere(result):
    for run in result.runs:
        assert 0 < run["order_distance"] < run["independent_distance"]


@pytest.mark.slow
def test_runs_repeat_exactly_and_leave_the_random_state(result):
    state = torch.get_rng_state()
    again = run_of(TINY, NORMED, 1)
    assert torch.equal(torch.get_rng_state(), state)
    (run,) = result.select(seed=1, batchnorm=True)
    for name in run.columns:
        np.testing.assert_allclose(again[name], run[name], rtol=1e-4, atol=1e-6)


def test_the_setting_decides_on_batch_norm_and_changes_no_other_weight():
    (plain, _), (normed, _) = (
        same_valley.prepare(TINY, Cell(setting, 3)) for setting in (PLAIN, NORMED)
    )
    kinds = [{type(layer) for layer in training.model} for training in (plain, normed)]
    assert kinds[1] - kinds[0] == {nn.BatchNorm1d}
    linear = [layer for layer in normed.model if isinstance(layer, nn.Linear)]
    weights = plain.model.parameters(), nn.ModuleList(linear).parameters()
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_sgd_trains_at_a_constant_rate_on_smoothed_labels():
    training, _ = same_valley.prepare(TINY, Cell(NORMED))
    assert training.phases == (Phase(0, 8),)
    assert training.loss_fn.label_smoothing == 0.1
    assert {training.schedule(epoch / 8) for epoch in range(8)} == {1.0}


def test_statistics_carried_along_are_those_of_the_ends_at_the_ends():
    start, _ = same_valley.prepare(TINY, Cell(NORMED))
    one = start.branch(late(8, 8, rho=0.1)).run()
    two = start.branch(late(0, 8, rho=0.1)).run()
    first, between, last = same_valley._carried(one, two, [0.0, 0.5, 1.0], TINY.recipe)
    for training, value in ((one, first), (two, last)):
        loss, _ = evaluate(training.model, training.x, training.y, training.loss_fn)
        assert value == pytest.approx(loss, rel=1e-6)
    middle = start.branch(late(8, 8, rho=0.1)).model
    states = one.model.state_dict(), two.model.state_dict()
    middle.load_state_dict({name: (a + states[1][name]) / 2 for name, a in states[0].items()})
    loss, _ = evaluate(middle, one.x, one.y, one.loss_fn)
    assert between == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_wide_residual_network_takes_the_same_road():
    recipe = same_valley.PAPER.recipe.but(
        data="photos",
        train=40,
        test=20,
        depth=10,
        width=1,
        stride=2,
        epochs=4,
        batch=20,
        measured=20,
        tol=0.1,
    )
    config = same_valley.Config(recipe, at=0.5, batchnorm=(True,), points=3, watch=1)
    run = run_of(config, NORMED)
    assert run["step"].tolist() == [0, 1, 2, 4]
    assert same_valley.line(run, "independent").losses.isfinite().all()
    assert same_valley.line(run, "sam", "carried").losses[0] > 0


# --- statistics ----------------------------------------------------------------------------------


CONFIG = {"recipe": {"train": 7, "batch": 4}, "watch": 2}  # two steps an epoch
ALPHA = [-0.5, 0.0, 0.5, 1.0, 1.5]
BASE = {
    "alpha": ALPHA,
    "sam_train": [9.0, 2.0, 2.5, 1.0, 9.0],  # a hill of 1 over a chord from 2 down to 1
    "sam_test": [9.0, 2.0, 2.6, 2.0, 9.0],
    "siblings_train": [9.0, 1.0, 1.1, 1.0, 9.0],
    "order_train": [9.0, 2.0, 2.5, 2.0, 9.0],
    "independent_train": [9.0, 1.0, 5.0, 1.0, 9.0],
    "step": [0, 1, 2, 3, 4, 8],
    "sam_path": [2.0, 3.0, 7.0, 4.0, 1.0, 9.0],
    "sgd_path": [2.0, 3.5, 3.0, 2.0, 1.0, 9.0],
    "sam_sharpness": 2.0,
    "sgd_sharpness": 4.0,
    "switch_sharpness": 8.0,
}
EXPECTED = {
    "no-barrier": 1.0 / 1.5,
    "no-barrier-in-test-loss": 0.3,
    "path-leaves-the-line": 7.0 / 2.5,
    "barrier-below-rise": 1.0 / 5.0,
    "rise-is-sams": 7.0 / 3.5,
    "end-is-flatter": 2.0 / 8.0,
    "flatter-than-sgd": 2.0 / 4.0,
    "siblings-share-it": 0.1,
    "independent-runs-do-not": 4.0,
    "another-order-suffices": 0.25,
    "one-valley-not-two": 1.0 / 4.0,
    "no-barrier-with-batchnorm": 0.1,
    "statistics-matter": 3.0 / 6.0,
}


def made(config=CONFIG, **changes):
    """The runs of a seed, without batch norm and with it."""
    normed = claims_contract.run_of(
        NORMED,
        alpha=ALPHA,
        sam_train=[9.0, 4.0, 4.4, 4.0, 9.0],
        independent_train=[9.0, 1.0, 4.0, 1.0, 9.0],
        independent_carried=[9.0, 1.0, 7.0, 1.0, 9.0],
    )
    plain = claims_contract.run_of(PLAIN, **{**BASE, **changes})
    return claims_contract.seed_runs(config, plain, normed)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    claims_contract.check_statistics(
        same_valley.CLAIMS, {name: (made(), expected) for name, expected in EXPECTED.items()}
    )


def test_the_peak_is_that_of_the_watched_epochs():
    assert same_valley.peak(made(), "sam") == 7.0
    assert same_valley.peak(made({**CONFIG, "watch": 4}), "sam") == 9.0


def test_a_path_that_does_not_rise_decides_nothing_by_its_rise():
    falling = made(sam_path=[2.0, 1.5, 1.2, 1.1, 1.0, 1.0])
    assert same_valley.barrier_below_rise(falling) == np.inf


@pytest.mark.parametrize("points", [2, 6, 11, 21, 24])
def test_places_include_both_ends_exactly_and_go_on_beyond_them(points):
    places = same_valley.alphas(points)
    assert {0.0, 1.0} <= set(places)
    assert sum(0 <= alpha <= 1 for alpha in places) == points
    assert places[0] + places[-1] == pytest.approx(1) and places[0] >= -0.2
    assert np.diff(places) == pytest.approx(1 / (points - 1))


@pytest.mark.slow
def test_every_claim_gets_a_number_once_there_is_a_rise_and_a_barrier():
    config = tiny(recipe={"hidden": (24, 24), "epochs": 24, "lr": 0.2})
    result = experiments.run(same_valley.EXPERIMENT, config, seeds=1, device="cpu", progress=False)
    for verdict in experiments.judge(result):
        assert len(verdict.values) == 1 and np.isfinite(verdict.values).all(), verdict.claim.id


# --- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_a_preset_switches_once_after_which_the_watched_epochs_fit(scale):
    config = same_valley.EXPERIMENT.presets[scale]
    at = config.at * config.recipe.epochs
    assert at == round(at) and at + config.watch < config.recipe.epochs
    assert config.smoothing == 0.1
    assert config.points % 2 == 1  # the middle is a point


def test_the_paper_preset_is_the_papers_network_on_its_data():
    config = same_valley.PAPER
    recipe = config.recipe
    assert (recipe.data, recipe.train, recipe.test) == ("cifar10", 50_000, 10_000)
    assert (recipe.depth, recipe.width, recipe.stride, recipe.augment) == (16, 8, 1, True)
    assert same_valley.settings(config) == [NORMED]
    assert any(isinstance(m, nn.BatchNorm2d) for m in models.wide_resnet(10, 1).modules())
    assert recipe.epochs == 200 and round(config.at * recipe.epochs) == 175


def test_the_laptop_measures_over_the_whole_training_set():
    recipe = same_valley.LAPTOP.recipe
    assert recipe.measured == recipe.train
    assert [s["batchnorm"] for s in same_valley.settings(same_valley.LAPTOP)] == [False, True]
