"""Flat and robust: balls of their own against one example at a time, and claims by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs
from torch import nn

from sam_lab import models
from sam_lab.adversarial import pgd
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import flat_and_robust as study
from sam_lab.experiments.inputs.flat_and_robust import (
    AT_END,
    AT_EQUAL_LOSS,
    OwnBalls,
    example_gradients,
    least,
    network,
    relative_hessian,
    values,
)
from sam_lab.perturbations import sam
from sam_lab.training import evaluate

LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)
TINY = dataclasses.replace(
    study.LAPTOP,
    recipe=study.LAPTOP.recipe.but(
        **{"data": "digits", "train": 100, "test": 40, "hidden": (12,), "epochs": 6, "batch": 20},
        **{"measured": 80, "tol": 1e-2, "lr": 0.3},
    ),
    rho=0.1,
    rhos=(0.05, 0.1),
    level=1.6,
    pgd_steps=3,
    attack_steps=2,
    n_autoattack=20,
)


def small(seed=1):
    """A network of three layers in double precision, and seven examples."""
    draws = torch.Generator().manual_seed(seed)
    net = models.mlp((6, 5, 4, 3), "relu", seed=seed).double()
    x = torch.randn(7, 6, generator=draws, dtype=torch.float64)
    return net, x, torch.randint(0, 3, (7,), generator=draws)


def gradient(net, x, y):
    return torch.autograd.grad(LOSS(net(x), y), list(net.parameters()))


# --- balls of their own ---------------------------------------------------------------------------


def test_a_step_with_own_balls_is_the_mean_of_steps_of_sam_on_single_examples():
    net, x, y = small()
    own = OwnBalls(0.3, LOSS)
    assert own(net.train(), x, y) is x
    together = gradient(net, x, y)
    net.eval()
    params, one_by_one = list(net.parameters()), []
    for i in range(len(x)):
        example = x[i : i + 1], y[i : i + 1]
        moves = sam(params, gradient(net, *example), 0.3)
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p += move
        one_by_one.append(gradient(net, *example))
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p -= move
    for k, part in enumerate(together):
        torch.testing.assert_close(part, torch.stack([g[k] for g in one_by_one]).mean(0))


def test_own_balls_change_nothing_in_evaluation_mode_or_with_radius_0():
    net, x, y = small()
    plain = net(x)
    OwnBalls(0.0, LOSS)(net.train(), x, y)
    assert torch.equal(net(x), plain)
    other, *_ = small()
    OwnBalls(0.3, LOSS)(other.train(), x, y)
    assert not torch.allclose(other(x), plain)
    assert torch.equal(other.eval()(x), plain)


def test_own_balls_are_for_one_network_of_linear_layers():
    net, x, y = small()
    own = OwnBalls(0.3, LOSS)
    own(net.train(), x, y)
    with pytest.raises(ValueError, match="own balls are for one model"):
        own(small()[0].train(), x, y)
    with pytest.raises(ValueError, match="all of whose parameters are in linear layers"):
        OwnBalls(0.3, LOSS)(models.cnn((1, 8, 8), 3, "relu", widths=(2,)), x, y)


# --- what is measured -----------------------------------------------------------------------------


def test_single_gradients_are_those_of_single_examples():
    net, x, y = small()
    norms = example_gradients(net, x, y, LOSS, chunk=3)
    for i in range(len(x)):
        expected = [g.norm() for g in gradient(net, x[i : i + 1], y[i : i + 1])]
        torch.testing.assert_close(norms[i], torch.stack(expected))


def test_the_relative_hessian_is_that_of_the_weights_times_their_sizes_on_both_sides():
    net, x, y = small()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    H = study.hessian(net, x, y, LOSS)
    plain = H @ torch.eye(len(flat), dtype=torch.float64)
    relative = relative_hessian(net, x, y, LOSS) @ torch.eye(len(flat), dtype=torch.float64)
    torch.testing.assert_close(relative, flat[:, None] * plain * flat)


def test_a_rescaling_that_changes_no_prediction_changes_the_sharpness_and_not_the_relative_one():
    net, x, y = small()

    def tops():
        found = (study.hessian(net, x, y, LOSS), relative_hessian(net, x, y, LOSS))
        return [float(H.top(tol=1e-4).values[0]) for H in found]

    logits, (plain, relative) = net(x), tops()
    with torch.no_grad():
        net[1].weight *= 3
        net[1].bias *= 3
        net[3].weight /= 3
    torch.testing.assert_close(net(x), logits)
    other, same = tops()
    assert same == pytest.approx(relative, rel=1e-3)
    assert other != pytest.approx(plain, rel=0.1)


def test_the_least_loss_of_smoothed_labels_is_that_of_a_network_that_predicts_them():
    smoothing, classes = 0.1, 4
    targets = torch.full((classes,), smoothing / classes)
    targets[2] += 1 - smoothing
    loss = nn.functional.cross_entropy(
        targets.log()[None], torch.tensor([2]), label_smoothing=smoothing
    )
    assert least(smoothing, classes) == pytest.approx(loss.item(), rel=1e-5)
    assert least(0.0, classes) == 0


@pytest.fixture
def judge(monkeypatch):
    def light(model, x, y, threat, *, attacks, seed):
        return pgd(model, x, y, threat, steps=4)

    monkeypatch.setattr(study, "autoattack", light)


def test_every_network_is_measured_at_equal_loss_and_at_the_end(judge):
    config = TINY
    level = least(config.smoothing, 10) + config.level
    for setting in study.settings(config):
        seen = []
        cell = Cell(setting, 3, tick=lambda *step, seen=seen: seen.append(step))
        columns = study.run(config, cell)
        assert seen[-1] == (6, 6)
        assert columns["objective"][AT_EQUAL_LOSS] < level
        assert columns["step"][AT_END] == 30 >= columns["step"][AT_EQUAL_LOSS] > 0
        assert all(len(column) == 2 for name, column in columns.items() if "auto" not in name)
        assert np.isfinite(np.concatenate(list(columns.values()))).all()
        assert columns["autoattack_error"][0] >= columns["natural_error"][AT_END] - 0.2


def test_the_columns_of_the_end_are_those_of_the_trained_network(judge):
    setting = study.settings(TINY)[0]
    columns = study.run(TINY, Cell(setting, 3))
    training, _ = study.prepare(TINY, Cell(setting, 3))
    model = training.run().model
    x, y = training.x[:80], training.y[:80]
    assert columns["train_loss"][AT_END] == evaluate(model, training.x, training.y)[0]
    assert columns["objective"][AT_END] == evaluate(model, x, y, LOSS)[0]
    batches = [gradient(model, *part) for part in zip(x.split(20), y.split(20), strict=True)]
    norms = [math.sqrt(sum(float((g * g).sum()) for g in batch)) for batch in batches]
    assert columns["batch_gradient"][AT_END] == pytest.approx(np.mean(norms), rel=1e-4)
    singles = example_gradients(model, x, y, LOSS)
    assert columns["example_gradient"][AT_END] == pytest.approx(singles.norm(dim=1).mean().item())
    first = model[1].weight
    assert columns["first_layer"][AT_END] == pytest.approx(
        torch.linalg.svdvals(first.detach())[0].item(), rel=1e-4
    )


def test_a_loss_that_never_comes_below_the_level_is_no_number(judge):
    config = dataclasses.replace(TINY, level=1e-6)
    columns = study.run(config, Cell(study.settings(config)[0], 3))
    assert math.isnan(columns["sharpness"][AT_EQUAL_LOSS])
    assert math.isfinite(columns["sharpness"][AT_END])


def test_the_networks_that_are_compared_must_be_there():
    for changed in ({"rho": 0.3}, {"own_rho": 0.3}):
        with pytest.raises(ValueError, match="rho and own_rho must be among rhos"):
            study.settings(dataclasses.replace(TINY, **changed))
    with pytest.raises(ValueError, match="decay must be one of decays"):
        study.settings(dataclasses.replace(TINY, decay=1.0))
    with pytest.raises(ValueError, match="method must be one of"):
        study.prepare(TINY, Cell({"method": "adam"}, 0))
    for config in study.EXPERIMENT.presets.values():
        settings = study.settings(config)
        assert len({tuple(setting.items()) for setting in settings}) == len(settings)


# --- the claims, by hand --------------------------------------------------------------------------

CONFIG = {"rho": 0.2, "own_rho": 0.05, "decay": 0.01}


def made(method, rho=0.0, decay=0.0, **columns):
    return run_of({"method": method, "rho": rho, "decay": decay}, **columns)


def curvature(plain, relative):
    return {"sharpness": plain, "relative_sharpness": relative}


RUNS = [
    made(
        "sgd",
        **curvature([4.0, 2.0], [0.10, 0.2]),
        **{"pgd_error": [0.5, 0.4], "autoattack_error": [0.45], "first_layer": [2.0, 3.0]},
        **{"example_gradient": [2.0, 1.0], "batch_gradient": [0.5, 0.2]},
    ),
    made(
        "sam",
        0.2,
        **curvature([2.0, 0.5], [0.05, 0.3]),
        **{"pgd_error": [0.4, 0.3], "autoattack_error": [0.35], "first_layer": [1.9, 3.0]},
        **{"example_gradient": [1.5, 1.0], "batch_gradient": [0.4, 0.2]},
    ),
    made("sam", 0.5, **curvature([9.0, 9.0], [9.0, 9.0])),
    made("sam", 0.05, example_gradient=[1.5, 9.0], autoattack_error=[0.35]),
    made("own", 0.05, example_gradient=[0.9, 0.5], autoattack_error=[0.30]),
    made(
        "decay",
        decay=0.01,
        **curvature([5.0, 3.0], [0.02, 0.1]),
        **{"pgd_error": [0.45, 0.3], "autoattack_error": [0.37], "first_layer": [1.0, 1.0]},
    ),
    made("adversarial", **curvature([6.0, 5.0], [0.08, 0.1])),
    made("decay", decay=0.5, **curvature([9.0, 9.0], [9.0, 9.0])),
]
EXPECTED = {
    "sam-is-flatter-at-equal-loss": 0.5,
    "sam-is-flatter-at-equal-loss-relative": 0.5,
    "sam-is-flatter-at-the-end": 0.25,
    "sam-is-flatter-at-the-end-relative": 1.5,
    "decay-is-flatter-at-equal-loss": 1.25,
    "decay-is-flatter-at-equal-loss-relative": 0.2,
    "decay-is-flatter-at-the-end": 1.5,
    "decay-is-flatter-at-the-end-relative": 0.5,
    "adversarial-is-flatter-at-equal-loss": 1.5,
    "adversarial-is-flatter-at-equal-loss-relative": 0.8,
    "adversarial-is-flatter-at-the-end": 2.5,
    "adversarial-is-flatter-at-the-end-relative": 0.5,
    "sam-is-more-robust": 10.0,
    "decay-is-more-robust": 8.0,
    "decay-and-sam-are-alike": 2.0,
    "sam-is-more-robust-at-equal-loss": 10.0,
    "decay-is-more-robust-at-equal-loss": 5.0,
    "single-gradients-are-longer": 5.0,
    "sam-shortens-batch-gradients": 0.8,
    "sam-shortens-single-gradients": 0.75,
    "own-balls-shorten-single-gradients": 0.6,
    "own-balls-are-more-robust": 5.0,
    "decay-shrinks-the-first-layer": 0.5,
    "sam-does-not-shrink-the-first-layer": 0.95,
}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    check_statistics(study.EXPERIMENT.claims, {name: (runs, x) for name, x in EXPECTED.items()})


def test_a_network_is_found_by_its_method_and_its_numbers_by_their_moment():
    runs = seed_runs(CONFIG, *RUNS)
    assert network(runs, "sam") is RUNS[1] and network(runs, "sam", rho=0.5) is RUNS[2]
    assert network(runs, "decay", decay=0.5) is RUNS[-1]
    result = result_of(CONFIG, *RUNS)
    assert values(result, "sharpness", "sgd", AT_EQUAL_LOSS) == [4.0]
    assert values(result, "sharpness", "sgd") == [2.0]
    assert values(result, "autoattack_error", "sam") == [0.35]
