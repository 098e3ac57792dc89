"""Balanced features: the pairs, the importance weights, the runs, and the claims on made runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sam_lab import data, models
from sam_lab.experiments import Cell, NotApplicable
from sam_lab.experiments.critics import features as task
from sam_lab.sam import SAM

TINY = dataclasses.replace(
    task.LAPTOP,
    train=40,
    fit=40,
    test=30,
    hidden=(12, 6),
    batch=20,
    epochs=4,
    every=2,
    level=2.5,
    radii=(0.03, 0.1, 0.3),
)


def setting(case="ten", method="sgd", rho=0.0):
    return {"case": case, "method": method, "rho": rho}


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(task.CASES))
def test_parts_belong_together_in_training_and_nowhere_else(case):
    train, fit, test = task.pairs(TINY, setting(case), 1)
    assert torch.equal(train.hard, train.easy)
    for part in (fit, test):
        assert not torch.equal(part.hard, part.easy)
    assert train.hard.max() == task.classes(case) - 1
    apart, *_ = task.pairs(TINY, setting(case, "apart"), 1)
    assert torch.equal(apart.hard, train.hard) and not torch.equal(apart.easy, apart.hard)
    assert torch.equal(apart.x[:, :784], train.x[:, :784])


def test_the_hard_part_is_the_image_and_the_easy_part_one_of_its_digit():
    train, *_ = task.pairs(TINY, setting(), 1)
    images = data.load("mnist_5k", train=TINY.train + TINY.fit, test=TINY.test, seed=1)
    assert torch.equal(train.x[:, :784], images.x[: TINY.train].flatten(1))
    digits = data.load("digits", seed=1)
    known = {tuple(x.tolist()): int(y) for x, y in zip(digits.x.flatten(1), digits.y, strict=True)}
    parts = (train.x[:, 784:] / TINY.strength).tolist()
    assert [known[tuple(part)] for part in parts] == train.easy.tolist()


def test_a_pixel_tells_the_class_by_its_place():
    for part in task.pairs(TINY, setting("pixel"), 1):
        expected = TINY.strength * F.one_hot(part.easy, 10)
        assert torch.equal(part.x[:, 784:], expected.float())


def test_two_classes_are_the_halves_of_ten():
    ten, two = (task.pairs(TINY, setting(case), 1) for case in ("ten", "two"))
    for one, other in zip(ten, two, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.hard // 5, other.hard) and torch.equal(one.easy // 5, other.easy)


def test_a_probe_reads_what_is_there_and_guesses_what_is_not():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(400) % 4
    features = F.one_hot(classes, 4) + 0.1 * torch.randn(400, 4, generator=generator)
    blind = torch.randn(400, 4, generator=generator)
    half = slice(200), slice(200, 400)
    errors = [
        task.probe_error(x[half[0]], classes[half[0]], x[half[1]], classes[half[1]])
        for x in (features, blind)
    ]
    assert errors[0] == 0 and 60 < errors[1] < 90


# --- importance weights ---------------------------------------------------------------------------


def test_importance_is_half_the_gradient_in_the_logits():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 1, 2, 1, 0])
    F.cross_entropy(logits, y, reduction="sum").backward()
    expected = logits.grad.abs().sum(1) / 2
    torch.testing.assert_close(task.importance(logits.detach(), y), expected)


def test_importance_with_two_classes_is_the_distance_of_probability_and_label():
    logits, y = torch.tensor([[0.0, 2.0], [0.0, -1.0]]), torch.tensor([1, 1])
    expected = (torch.sigmoid(logits[:, 1]) - y).abs()
    torch.testing.assert_close(task.importance(logits, y), expected)


def test_importance_keeps_its_digits_where_the_probability_is_almost_one():
    weight = task.importance(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
    assert float(weight) == pytest.approx(math.exp(-30), rel=1e-5)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(0.1, 10))
def test_gini_is_the_mean_difference_over_twice_the_mean(weights, factor):
    values = np.array(weights)
    expected = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert task.gini(weights) == pytest.approx(expected, abs=1e-9)
    assert task.gini(factor * values) == pytest.approx(expected, abs=1e-9)
    shares, sums = task.lorenz(weights)
    assert task.gini(weights) == pytest.approx(1 - 2 * np.trapezoid(sums, shares), abs=1e-9)


@pytest.mark.parametrize("weights", [[], [-1.0, 1.0], [[1.0]]])
def test_what_is_no_list_of_weights_is_refused(weights):
    with pytest.raises(ValueError, match="weights must be one number >= 0 or more"):
        task.gini(weights)


def test_weights_that_are_all_zero_have_no_curve():
    assert math.isnan(task.gini([0.0, 0.0]))
    with pytest.raises(ValueError, match="positive sum"):
        task.lorenz([0.0, 0.0])


def test_softened_weights_have_the_mean_asked_for_and_are_more_even():
    generator = torch.Generator().manual_seed(0)
    logits, y = 5 * torch.randn(30, 4, generator=generator), torch.arange(30) % 4
    logits[torch.arange(30), y] += 8
    plain = task.importance(logits, y)
    soft = task.softened(logits, y, 0.5)
    assert float(soft.mean()) == pytest.approx(0.5, abs=1e-5)
    assert task.gini(soft) < task.gini(plain)
    assert torch.equal(task.softened(logits, y, 0.5 * float(plain.mean())), plain)
    torch.testing.assert_close(task.softened(logits, y, 0.9), torch.full((30,), 0.75))


def test_evenness_measures_the_weights_where_sam_has_them():
    model = models.mlp((6, 5, 3), "relu", seed=1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(8) % 3
    found = task.evenness(model, x, y, 8, (0.1, 0.5))
    assert found["gini"] == [pytest.approx(task.gini(task.importance(model(x).detach(), y)))]
    params = list(model.parameters())
    for name, groups in (
        ("sam", [{"params": params}]),
        ("last", [{"params": params[:-2], "rho": 0.0}, {"params": params[-2:]}]),
    ):
        sam = SAM(torch.optim.SGD(groups, lr=0.1), 0.5, model)
        F.cross_entropy(model(x), y).backward()
        with sam.perturbed(), torch.no_grad():
            expected = task.gini(task.importance(model(x), y))
        sam.optimizer.zero_grad()
        assert found[f"gini_{name}"][1] == pytest.approx(expected, abs=1e-6)


def test_evenness_is_a_mean_over_minibatches():
    model = models.mlp((6, 5, 3), "relu", seed=1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(8) % 3
    both = task.evenness(model, x, y, 4, (0.1,))
    halves = [task.evenness(model, x[part], y[part], 4, (0.1,)) for part in (slice(4), slice(4, 8))]
    for name in ("gini", "gini_sam", "gini_last", "gini_soft"):
        expected = np.mean([half[name] for half in halves], 0)
        np.testing.assert_allclose(both[name], expected, rtol=1e-5)


# --- runs -----------------------------------------------------------------------------------------


def weights_of(method, rho):
    model = task.train(TINY, setting("ten", method, rho), 2).model
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_method_with_radius_zero_is_sgd():
    sgd = weights_of("sgd", 0.0)
    for method in ("sam", "last", "random"):
        assert torch.equal(weights_of(method, 0.0), sgd), method
        assert not torch.equal(weights_of(method, 0.1), sgd), method
    for method in ("weights", "scaled"):
        torch.testing.assert_close(weights_of(method, 1e-6), sgd, atol=1e-5, rtol=0)


def test_a_step_with_sams_weights_is_the_weighted_gradient_at_w():
    model = models.mlp((4, 3, 2), "relu", seed=0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 2
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    length = torch.sqrt(sum(g.square().sum() for g in grads))
    logits = model(x)
    error = torch.softmax(logits.detach(), 1) - F.one_hot(y, 2)
    moved = {
        name: p.detach() + 0.5 * g / length
        for (name, p), g in zip(model.named_parameters(), grads, strict=True)
    }
    there = torch.softmax(torch.func.functional_call(model, moved, (x,)), 1) - F.one_hot(y, 2)
    # with two classes the gradient in the logits at w, made as long as that at w + eps
    expected = torch.autograd.grad(logits, params, there.detach().abs() * error.sign() / 6)
    sam = SAM(torch.optim.SGD(params, lr=1.0), 0.5, model)
    task._reweighted(sam, model, x, y, one=False)
    for p, old, step in zip(params, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - step)
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
    task._reweighted(sam, model, x, y, one=True)
    factor = there.abs().sum() / error.abs().sum()
    for p, old, g in zip(params, before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - factor * g)


def test_a_run_has_probes_at_the_level_and_at_the_end_and_weights_for_sgd_alone():
    columns = task.run(TINY, Cell(setting(), 1))
    assert columns["step"][1] == 8 and columns["step"][0] in (2, 4, 6, 8)
    assert columns["loss"][0] <= TINY.level
    for name in ("hard_error", "easy_error"):
        assert all(0 <= error <= 100 for error in columns[name])
    assert len(columns["gini"]) == 1 and len(columns["gini_soft"]) == len(TINY.radii)
    assert "gini" not in task.run(TINY, Cell(setting("ten", "sam", 0.1), 1))


def test_a_level_that_is_never_reached_leaves_nothing_but_the_end():
    config = dataclasses.replace(TINY, level=1e-9)
    columns = task.run(config, Cell(setting(), 1))
    assert math.isnan(columns["hard_error"][0]) and columns["hard_error"][1] > 0
    with pytest.raises(NotApplicable, match="never fell to the level"):
        task.at_level(run_of(setting(), 1, **columns), "hard_error")


# --- claims ---------------------------------------------------------------------------------------


def made(case, method, rho, hard, easy, **more):
    columns = {"loss": [0.1, 0.01], "hard_error": hard, "easy_error": easy, **more}
    return run_of(setting(case, method, rho), 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    config = {"radii": [0.03, 0.1, 0.3], "rhos": [0.03, 0.1], "last_rhos": [0.3]}
    ginis = {
        "gini": [0.6],
        "gini_sam": [0.61, 0.63, 0.5],
        "gini_last": [0.6, 0.59, 0.55],
        "gini_random": [0.6, 0.601, 0.6],
        "gini_soft": [0.58, 0.53, 0.4],
    }
    runs = [
        run
        for case in task.CASES
        for run in (
            made(case, "sgd", 0.0, [30, 32], [10, 9], **ginis),
            made(case, "apart", 0.0, [math.nan, 12], [math.nan, 60]),
            made(case, "sam", 0.03, [31, 33], [12, 10]),
            made(case, "sam", 0.1, [34, 31], [11, 10]),
            made(case, "last", 0.3, [28, 30], [11, 10]),
            made(case, "random", 0.1, [30.5, 32], [10, 9]),
            made(case, "weights", 0.1, [33, 35], [10, 9]),
            made(case, "scaled", 0.1, [32.5, 35], [10, 9]),
        )
    ]
    probes = {
        "easy-part-hides-the-hard-one": 20,
        "sam-finds-the-hard-part": -2.5,
        "sam-finds-the-hard-part-in-the-end": 0,
        "last-layer-finds-the-hard-part": 2,
        "sam-suppresses-the-easy-part": 1.5,
        "random-direction-changes-nothing": -0.5,
        "weights-alone-find-the-hard-part": -3,
        "weights-find-more-than-a-longer-step": -0.5,
        "sam-is-a-longer-step": -1.5,
        "a-longer-step-hides-the-hard-part": -2.5,
    }
    weights = {
        "weights-more-even": 0.03,
        "weights-more-even-by-the-last-layer": -0.05,
        "more-even-than-by-softening": 0.1,
    }
    cases = {
        f"{name}-{case}": (seed_runs(config, *runs), value)
        for case in task.CASES
        for name, value in (probes if case == "pixel" else probes | weights).items()
    }
    check_statistics(task.EXPERIMENT.claims, cases)


@pytest.mark.parametrize("scale", list(task.EXPERIMENT.presets))
def test_the_weights_are_measured_at_the_radii_of_the_claims(scale):
    preset = task.EXPERIMENT.presets[scale]
    assert {*preset.rhos, *preset.last_rhos} <= set(preset.radii)
    assert preset.random_rho == max(preset.rhos)


def test_the_cost_is_in_proportion_to_the_epochs():
    twice = dataclasses.replace(TINY, epochs=2 * TINY.epochs)
    assert task.cost(twice) == pytest.approx(2 * task.cost(TINY))
