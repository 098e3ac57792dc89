"""One valley or two: the runs behind the lines, what is measured, and what the claims say."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sam_lab import experiments, models
from sam_lab.experiments import late_phase, same_valley
from sam_lab.experiments.core import Run
from sam_lab.training import evaluate, late

TINY = dataclasses.replace(
    same_valley.LAPTOP,
    task=dataclasses.replace(
        same_valley.LAPTOP.task,
        train=120,
        test=60,
        hidden=(12, 12),
        epochs=8,
        batch=20,
        measured=120,
        points=6,
        tol=0.05,
    ),
)
PLAIN, NORMED = ({"batchnorm": batchnorm} for batchnorm in (False, True))


def tiny(**changes):
    return dataclasses.replace(TINY, task=dataclasses.replace(TINY.task, **changes))


@pytest.fixture(scope="module")
def result():
    return experiments.run(same_valley.EXPERIMENT, TINY, seeds=3, device="cpu", progress=False)


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
    config = dataclasses.replace(tiny(epochs=12), watch=1)
    run = Run(PLAIN, 0, same_valley.run(config, PLAIN, 0))
    assert run["step"].tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 18]


def test_the_end_of_the_path_is_the_training_that_switches_there(result):
    start, _ = same_valley.prepare(TINY, PLAIN, 1)
    end = start.branch(late(6, 8, rho=TINY.task.rhos[0])).run()
    loss, _ = evaluate(end.model, end.x, end.y, nn.CrossEntropyLoss(label_smoothing=0.1))
    run = result.select(seed=1, batchnorm=False)[0]
    assert run["sam_path"][-1] == pytest.approx(loss, rel=1e-5)


def test_without_a_radius_sam_is_sgd():
    run = Run(PLAIN, 0, same_valley.run(tiny(rhos=(0.0,)), PLAIN, 0))
    assert run["sam_path"].tolist() == run["sgd_path"].tolist()
    assert run["siblings_distance"] == 0 and run["sam_distance"] > 0


@pytest.mark.parametrize("setting", [PLAIN, NORMED])
def test_without_learning_only_other_initial_weights_make_a_distance(setting):
    run = Run(setting, 0, same_valley.run(tiny(lr=0.0), setting, 0))
    distances = {name: run[f"{name}_distance"].item() for name in same_valley.LINES}
    assert distances.pop("independent") > 1
    assert set(distances.values()) == {0.0}
    assert np.ptp(run["sam_path"]) == 0


def test_another_order_of_the_examples_leads_elsewhere(result):
    for run in result.runs:
        assert 0 < run["order_distance"] < run["independent_distance"]


def test_runs_repeat_exactly_and_leave_the_random_state(result):
    state = torch.get_rng_state()
    again = Run(NORMED, 2, same_valley.run(TINY, NORMED, 2))
    assert torch.equal(torch.get_rng_state(), state)
    run = result.select(seed=2, batchnorm=True)[0]
    for name in run.columns:
        np.testing.assert_allclose(again[name], run[name], rtol=1e-4, atol=1e-6)


def test_batch_norm_comes_after_every_linear_layer_but_the_last_and_changes_no_weight():
    plain, _ = same_valley.prepare(TINY, PLAIN, 3)
    normed, _ = same_valley.prepare(TINY, NORMED, 3)
    kinds = [type(layer).__name__ for layer in normed.model]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == ["Flatten", *hidden, *hidden, "Linear"]
    state = plain.model.state_dict()
    same = [p for p in normed.model.parameters() if any(torch.equal(p, q) for q in state.values())]
    assert len(same) == len(state) == 6
    trained = {id(p) for group in normed.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in normed.model.parameters()}
    for group in ("lr", "momentum", "weight_decay"):
        assert normed.optimizer.param_groups[0][group] == plain.optimizer.param_groups[0][group]


def test_statistics_carried_along_are_those_of_the_ends_at_the_ends():
    start, _ = same_valley.prepare(TINY, NORMED, 0)
    one = start.branch(late(8, 8, rho=0.1)).run()
    two = start.branch(late(0, 8, rho=0.1)).run()
    found = same_valley._carried(one, two, [0.0, 0.5, 1.0], TINY)
    for training, value in ((one, found[0]), (two, found[-1])):
        loss, _ = evaluate(training.model, training.x, training.y, training.loss_fn)
        assert value == pytest.approx(loss, rel=1e-6)
    middle = start.branch(late(8, 8, rho=0.1)).model
    states = one.model.state_dict(), two.model.state_dict()
    middle.load_state_dict({name: (a + states[1][name]) / 2 for name, a in states[0].items()})
    loss, _ = evaluate(middle, one.x, one.y, one.loss_fn)
    assert found[1] == pytest.approx(loss, rel=1e-5)


def test_a_wide_residual_network_takes_the_same_road():
    task = dataclasses.replace(
        same_valley.PAPER.task,
        data="photos",
        train=40,
        test=20,
        depth=10,
        width=1,
        stride=2,
        epochs=4,
        batch=20,
        late=(0.5,),
        measured=20,
        points=3,
        tol=0.1,
    )
    config = same_valley.Config(task, batchnorm=(True,), watch=1)
    run = Run(NORMED, 0, same_valley.run(config, NORMED, 0))
    assert run["step"].tolist() == [0, 1, 2, 4]
    assert same_valley.line(run, "independent").losses.isfinite().all()
    assert same_valley.line(run, "sam", "carried").losses[0] > 0


# --- statistics ----------------------------------------------------------------------------------


def made(**columns):
    """A run with the columns of a hill of 1 over a chord from 2 down to 1."""
    alpha = [-0.5, 0.0, 0.5, 1.0, 1.5]
    return Run(
        {},
        0,
        {
            "alpha": alpha,
            "sam_train": [9.0, 2.0, 2.5, 1.0, 9.0],
            "step": [0, 1, 2, 3, 4, 8],
            "sam_path": [2.0, 3.0, 7.0, 4.0, 1.0, 9.0],
            **columns,
        },
    )


CONFIG = {"task": {"train": 7, "batch": 4}, "watch": 2}  # two steps an epoch


def test_a_barrier_is_relative_to_the_mean_of_its_ends():
    assert same_valley.barrier(made(), "sam") == pytest.approx(1.0 / 1.5)


def test_the_peak_is_that_of_the_watched_epochs():
    assert same_valley.peak(made(), "sam", CONFIG) == 7.0
    assert same_valley.peak(made(), "sam", {**CONFIG, "watch": 4}) == 9.0


def test_the_path_is_compared_with_the_line_between_its_ends():
    assert same_valley._over_line(made(), CONFIG) == pytest.approx(7 / 2.5)
    assert same_valley._beside_rise(made(), CONFIG) == pytest.approx(1 / 5)


@pytest.mark.parametrize("points", [2, 6, 11, 21, 24])
def test_places_include_both_ends_exactly_and_go_on_beyond_them(points):
    places = same_valley.alphas(points)
    assert {0.0, 1.0} <= set(places)
    assert sum(0 <= alpha <= 1 for alpha in places) == points
    assert places[0] + places[-1] == pytest.approx(1) and places[0] >= -0.2
    assert np.diff(places) == pytest.approx(1 / (points - 1))


def test_every_claim_gets_a_number_once_there_is_a_rise_and_a_barrier():
    config = tiny(hidden=(24, 24), epochs=24, lr=0.2)
    result = experiments.run(same_valley.EXPERIMENT, config, seeds=1, device="cpu", progress=False)
    assert [claim.id for claim in result.claims] == [claim.id for claim in same_valley.claims()]
    for claim in result.claims:
        assert len(claim.values) == 1 and np.isfinite(claim.values).all(), claim.id


def test_a_path_that_does_not_rise_decides_nothing_by_its_rise():
    falling = made(sam_path=[2.0, 1.5, 1.2, 1.1, 1.0, 1.0])
    assert same_valley._beside_rise(falling, CONFIG) == np.inf


def test_the_claims_on_batch_norm_look_at_the_network_that_has_it(result):
    claims = {claim.id: claim for claim in result.claims}
    for name, batchnorm in (("no-barrier", False), ("no-barrier-with-batchnorm", True)):
        runs = result.select(batchnorm=batchnorm)
        expected = [same_valley.barrier(run, "sam") for run in runs]
        assert list(claims[name].values) == pytest.approx(expected, rel=1e-5)


# --- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_a_preset_switches_once_after_which_the_watched_epochs_fit(scale):
    config = same_valley.EXPERIMENT.presets[scale]
    (share,) = config.task.late
    at = share * config.task.epochs
    assert at == round(at) and at + config.watch < config.task.epochs
    assert late_phase.settings(config.task)[0]["smoothing"] == 0.1
    assert config.task.points % 2 == 1  # the middle is a point


def test_the_paper_preset_is_the_papers_network_on_its_data():
    task = same_valley.PAPER.task
    assert (task.data, task.train, task.test, task.epochs) == ("cifar10", 50_000, 10_000, 200)
    assert (task.depth, task.width, task.stride, task.augment) == (16, 8, 1, True)
    assert same_valley.settings(same_valley.PAPER) == [NORMED]
    assert any(isinstance(m, nn.BatchNorm2d) for m in models.wide_resnet(10, 1).modules())
    assert round(task.late[0] * task.epochs) == 175


def test_the_laptop_measures_over_the_whole_training_set():
    assert same_valley.LAPTOP.task.measured == same_valley.LAPTOP.task.train
    assert [s["batchnorm"] for s in same_valley.settings(same_valley.LAPTOP)] == [False, True]
