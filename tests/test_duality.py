"""The duality: networks against networks trained one by one, and claims against arithmetic."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs
from sam_problem import assert_equal, copies, length
from torch import nn

from sam_lab import models
from sam_lab.adversarial import Threat, pgd, robust_accuracy, standing
from sam_lab.curvature import Hessian
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import duality, robustness
from sam_lab.experiments.inputs.duality import (
    SGD,
    against_rho,
    equal_accuracy,
    first_order_distance,
    network,
)
from sam_lab.perturbations import random_direction, sam
from sam_lab.training import evaluate

TINY = dataclasses.replace(
    duality.LAPTOP,
    recipe=duality.LAPTOP.recipe.but(
        **{"data": "digits", "train": 100, "test": 60, "hidden": (16,), "epochs": 6, "batch": 20},
        **{"measured": 80, "tol": 1e-2},
    ),
    rho=0.1,
    rhos=(0.05, 0.1),
    shares=(0.5,),
    blind=1.0,
    attack_steps=2,
    eps=(0.0, 0.05, 0.1, 1.0),
    judged_eps=(0.05, 0.1),
    pgd_steps=5,
    n_pgd=50,
    n_autoattack=20,
    n_all_attacks=10,
)
SMALL = {**SGD, "method": "sam", "rho": 0.05}
SAM = {**SGD, "method": "sam", "rho": 0.1}
BLIND = {**SGD, "method": "blind", "rho": 1.0}
DECAY = {**SGD, "method": "decay"}
ADVERSARIAL = {**SGD, "method": "adversarial"}
FEW = {**SAM, "share": 0.5}
ALL = [SGD, SMALL, SAM, FEW, BLIND, DECAY, ADVERSARIAL]


@pytest.fixture(autouse=True)
def anew():
    """The SGD networks that are kept are those of one test."""
    duality._sgd.cache_clear()


def quick_judges(patch, autoattack):
    """Fewer steps of the strong PGD, and another AutoAttack."""
    patch.setattr(robustness, "STEPS", 12)
    patch.setattr(robustness, "RESTARTS", 2)
    patch.setattr(duality, "autoattack", autoattack)


def light(model, x, y, threat, *, attacks, seed):
    """PGD in the place of AutoAttack."""
    return pgd(model, x, y, threat, steps=20)


@pytest.fixture
def judge(monkeypatch):
    quick_judges(monkeypatch, light)


@pytest.fixture(scope="module")
def ran():
    """For each setting: its columns; which of AutoAttack's attacks were asked for, with which
    threat and seed, and for how many examples; and the progress that was shown."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        for setting in ALL:
            run = SimpleNamespace(setting=setting, asked=[], seen=[])

            def asked(model, x, y, threat, *, attacks, seed, run=run):
                run.asked.append((attacks, threat, seed, len(x)))
                return light(model, x, y, threat, attacks=attacks, seed=seed)

            quick_judges(patch, asked)
            cell = Cell(setting, 10, tick=lambda *step, run=run: run.seen.append(step))
            run.columns = duality.run(TINY, cell)
            runs.append(run)
    return runs


def columns_of(ran, setting):
    return ran[ALL.index(setting)].columns


def alone(setting, seed=10):
    """The network of a setting, trained by itself, and the examples that PGD sees."""
    training, dataset = duality.prepare(TINY, Cell(setting, seed))
    model = training.run().model.eval()
    return dataset, model, (dataset.x_test[:50], dataset.y_test[:50])


# --- what is compared -----------------------------------------------------------------------------


def test_the_networks_are_sgd_sam_and_the_controls():
    assert duality.settings(TINY) == ALL
    for config in duality.EXPERIMENT.presets.values():
        settings = duality.settings(config)
        assert settings[0] == SGD and {**SGD, "method": "sam", "rho": config.rho} in settings
        assert config.eps[0] == 0 and set(config.judged_eps) <= set(config.eps)
        assert config.n_all_attacks <= config.n_autoattack <= config.n_pgd <= config.recipe.test


def test_the_radius_that_is_compared_must_be_there():
    with pytest.raises(ValueError, match=r"rho must be one of rhos \(0.05, 0.1\), got 0.3"):
        duality.settings(dataclasses.replace(TINY, rho=0.3))


def test_a_setting_is_what_the_network_trains_with():
    expected = {
        "sgd": (0.0, sam, None, 0.0, 100),
        "sam": (0.1, sam, None, 0.0, 100),
        "blind": (1.0, random_direction, None, 0.0, 100),
        "decay": (0.0, sam, None, 0.01, 100),
        "few": (0.1, sam, None, 0.0, 50),
    }
    for name, setting in zip(expected, (SGD, SAM, BLIND, DECAY, FEW), strict=True):
        training, dataset = duality.prepare(TINY, Cell(setting, 10))
        (phase,) = training.phases
        (group,) = training.optimizer.param_groups
        got = (phase.rho, phase.rule, phase.attack, group["weight_decay"], len(training.x))
        assert got == expected[name]
        assert (phase.start, phase.stop, group["lr"], group["momentum"]) == (0, 6, 0.1, 0.9)
        assert len(dataset.x) == 100
        assert torch.equal(training.x, dataset.x[: len(training.x)])
    (phase,) = duality.prepare(TINY, Cell(ADVERSARIAL, 10))[0].phases
    assert phase.attack.func is pgd and phase.rho == 0
    assert phase.attack.keywords == {"threat": Threat("linf", 0.1), "steps": 2}


def test_networks_of_one_seed_share_data_and_initial_weights():
    one, here = duality.prepare(TINY, Cell(SGD, 10))
    two, there = duality.prepare(TINY, Cell(FEW, 10))
    other, elsewhere = duality.prepare(TINY, Cell(SGD, 11))
    assert_equal(copies(one.model.parameters()), copies(two.model.parameters()))
    assert_equal([here.x, here.x_test], [there.x, there.x_test])
    assert not torch.equal(one.model[1].weight, other.model[1].weight)
    assert not torch.equal(here.x, elsewhere.x)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of sgd, .*adversarial, got 'adam'"):
        duality.prepare(TINY, Cell({**SGD, "method": "adam"}))


def test_a_convolutional_network_takes_pixels_and_normalizes_them_itself():
    recipe = duality.DESKTOP.recipe.but(data="photos", train=50, test=20)
    config = dataclasses.replace(duality.DESKTOP, recipe=recipe)
    training, dataset = duality.prepare(config, Cell(SGD, 10))
    assert isinstance(training.model[0], models.Normalize) and training.augment is None
    assert dataset.x.min() >= 0 and dataset.x.max() <= 1
    inside = training.model[0](dataset.x)
    assert inside.mean((0, 2, 3)) == pytest.approx(0, abs=1e-4)
    assert inside.std((0, 2, 3)) == pytest.approx(1, abs=1e-3)
    assert sum(p.numel() for p in training.model.parameters()) == 77_850
    augmented = dataclasses.replace(config, recipe=recipe.but(augment=True))
    assert duality.prepare(augmented, Cell(SGD))[0].augment is not None


# --- what is measured -----------------------------------------------------------------------------


def test_which_examples_stand_is_robust_accuracy_example_by_example():
    _, model, (x, y) = alone(SGD)
    attack = partial(pgd, threat=0.1, steps=5)
    natural, robust = standing(model, x, y, attack)
    assert robust.dtype == torch.bool and 0 < robust.sum() < 50
    assert robust.float().mean().item() == pytest.approx(robust_accuracy(model, x, y, attack)[1])
    right = model(x).argmax(1) == y
    assert torch.equal(natural, right)
    attacked = attack(model, x[right], y[right])
    by_hand = torch.zeros(50, dtype=torch.bool)
    by_hand[right] = model(attacked).argmax(1) == y[right]
    assert torch.equal(robust, by_hand)


def test_examples_that_are_wrong_are_not_attacked_and_do_not_stand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0], [0.0]])  # predicts 0 for every positive input
    x, seen = torch.full((6, 1), 0.5), []

    def attack(model, x, y):
        seen.append(len(x))
        return -x

    y = torch.tensor([0, 1, 1, 1, 1, 0])
    assert not standing(model, x, y, attack, batch=2)[1].any()
    assert seen == [1, 1]  # and none at all from a batch that is all wrong
    assert standing(model, x, y, lambda model, x, y: x)[1].tolist() == [True, *[False] * 4, True]


@pytest.mark.parametrize(("norm", "order"), [("linf", 1), ("l2", 2)])
def test_the_first_order_distance_of_a_linear_model_is_that_to_the_nearest_class(norm, order):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 4)
    linear.weight.data = torch.randn(4, 5, generator=generator)
    x, y = torch.randn(8, 5, generator=generator), torch.arange(8) % 4
    z, w = linear(x).detach(), linear.weight.detach()
    margins, distances = first_order_distance(linear, x, y, norm)
    for i in range(8):
        others = [k for k in range(4) if k != y[i]]
        gaps = [float(z[i, y[i]] - z[i, k]) for k in others]
        slopes = [float((w[y[i]] - w[k]).norm(order)) for k in others]
        assert float(margins[i]) == pytest.approx(min(gaps), rel=1e-4)
        far = min(gap / slope for gap, slope in zip(gaps, slopes, strict=True))
        assert float(distances[i]) == pytest.approx(far, rel=1e-5)
    assert torch.equal(margins < 0, z.argmax(1) != y) and torch.equal(margins < 0, distances < 0)
    assert (margins < 0).any() and (margins > 0).any()


def test_an_attack_just_beyond_the_distance_breaks_a_linear_model_and_one_just_short_does_not():
    linear = nn.Linear(6, 4)
    linear.weight.data = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    linear.bias.data.zero_()
    x = 0.3 + 0.4 * torch.rand(40, 6, generator=torch.Generator().manual_seed(2))
    y = linear(x).argmax(1)
    _, distances = first_order_distance(linear, x, y)
    i = int(distances.argmin())
    one = x[i : i + 1], y[i : i + 1]
    for factor, stands in ((0.99, True), (1.05, False)):
        attack = partial(pgd, threat=factor * float(distances[i]), steps=40, restarts=10)
        assert standing(linear, *one, attack)[1].item() is stands


def test_the_distance_has_no_scale_and_the_margin_has():
    _, model, (x, y) = alone(SGD)
    margins, distances = first_order_distance(model, x, y)
    scaled = nn.Sequential(model, nn.Linear(10, 10, bias=False))
    scaled[1].weight.data = 3 * torch.eye(10)
    more, same = first_order_distance(scaled, x, y)
    torch.testing.assert_close(more, 3 * margins)
    torch.testing.assert_close(same, distances)


def test_where_the_gradient_vanishes_the_boundary_is_infinitely_far():
    dead = nn.Sequential(nn.Linear(3, 4))
    dead[0].weight.data.zero_()
    dead[0].bias.data = torch.tensor([1.0, 0.0, 0.0, 0.5])
    margins, distances = first_order_distance(dead, torch.rand(2, 3), torch.tensor([0, 0]))
    assert margins.tolist() == [0.5, 0.5] and distances.tolist() == [math.inf] * 2


@pytest.mark.slow
def test_columns_are_what_the_network_trained_alone_gives(ran):
    columns = columns_of(ran, SAM)
    dataset, model, (x, y) = alone(SAM)
    sgd = alone(SGD)[1]
    assert columns["train_loss"] == [evaluate(model, dataset.x, dataset.y)[0]]
    assert columns["train_error"] == [evaluate(model, dataset.x, dataset.y)[1]]
    test = evaluate(model, dataset.x_test, dataset.y_test)
    assert (columns["test_loss"], columns["natural_error"]) == ([test[0]], [test[1]])
    assert columns["norm"][0] == pytest.approx(length(copies(model.parameters())), rel=1e-5)
    margins, distances = first_order_distance(model, x, y)
    assert columns["margin"] == [margins[margins > 0].median().item()]
    assert columns["distance"] == [distances[margins > 0].median().item()]
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    assert columns["input_gradient"][0] == pytest.approx(
        leaf.grad.flatten(1).abs().sum(1).mean().item(), rel=1e-5
    )
    model.zero_grad()
    params = list(model.parameters())
    H = Hessian(lambda: nn.functional.cross_entropy(model(dataset.x[:80]), dataset.y[:80]), params)
    top = torch.linalg.eigvalsh((H @ torch.eye(H.shape[0])).double())[-1].item()
    assert columns["sharpness"][0] == pytest.approx(top, rel=2e-2)

    right, sgd_right = (m(x).argmax(1) == y for m in (model, sgd))
    common = right & sgd_right
    assert columns["common"] == [pytest.approx(common.float().mean().item())]
    assert columns["eps"] == list(TINY.eps)
    for i, eps in enumerate(TINY.eps):
        own, other = (pgd(m, x, y, eps, steps=5) for m in (model, sgd))
        robust = right & (model(own).argmax(1) == y)
        sgd_robust = sgd_right & (sgd(other).argmax(1) == y)
        transferred = right & (model(other).argmax(1) == y)
        for name, which in {
            "pgd_error": robust,
            "transfer_error": transferred,
            "common_pgd_error": robust[common],
            "common_sgd_pgd_error": sgd_robust[common],
        }.items():
            assert columns[name][i] == pytest.approx(1 - which.float().mean().item()), name

    few = (x[:20], y[:20])
    for i, eps in enumerate(TINY.judged_eps):
        quick = partial(pgd, threat=eps, steps=20)
        strong = partial(pgd, threat=eps, steps=12, restarts=2)
        survives = standing(model, *few, quick)[1]
        sgd_survives = standing(sgd, *few, quick)[1]
        for name, which in {
            "autoattack_error": survives,
            "common_autoattack_error": survives[common[:20]],
            "common_sgd_autoattack_error": sgd_survives[common[:20]],
            "pgd_error_judged": standing(model, *few, strong)[1],
            "few_steps_error_judged": standing(model, *few, partial(pgd, threat=eps, steps=10))[1],
        }.items():
            assert columns[name][i] == pytest.approx(1 - which.float().mean().item()), name
    euclidean = Threat("l2", TINY.l2_eps)
    for name, threat, steps, restarts, n in (
        ("doubted_pgd_error", 0.05, 12, 2, 10),
        ("square_error", 0.05, 20, 1, 10),
        ("doubted_autoattack_error", 0.05, 20, 1, 10),
        ("l2_pgd_error", euclidean, 12, 2, 20),
        ("l2_autoattack_error", euclidean, 20, 1, 20),
    ):
        attack = partial(pgd, threat=threat, steps=steps, restarts=restarts)
        error = 1 - standing(model, x[:n], y[:n], attack)[1].float().mean().item()
        assert columns[name] == [pytest.approx(error)], name


def test_sgd_is_compared_with_itself(ran):
    columns = columns_of(ran, SGD)
    assert columns["transfer_error"] == columns["pgd_error"]
    for kind in ("pgd", "autoattack"):
        assert columns[f"common_{kind}_error"] == columns[f"common_sgd_{kind}_error"]
    assert columns["common"] == [pytest.approx(1 - columns["pgd_error"][0])]


def test_at_eps_0_nothing_is_broken_and_at_1_all_is(ran):
    for setting in (SGD, SAM, ADVERSARIAL):
        columns = columns_of(ran, setting)
        assert columns["common_pgd_error"][0] == columns["common_sgd_pgd_error"][0] == 0
        assert columns["transfer_error"][0] == columns["pgd_error"][0] < 0.8
        assert columns["pgd_error"][-1] == 1
        assert columns["pgd_error"] == sorted(columns["pgd_error"])


def test_a_run_does_not_depend_on_those_before_it_and_leaves_the_random_state(ran, judge):
    state = torch.get_rng_state()
    duality.run(TINY, Cell(SAM, 11))
    again = duality.run(TINY, Cell(SAM, 10))
    assert again == columns_of(ran, SAM) == duality.run(TINY, Cell(SAM, 10))
    assert torch.equal(torch.get_rng_state(), state)


def test_attacks_without_a_gradient_see_few_examples_of_two_networks(ran):
    for run in ran:
        thorough = run.setting in (SGD, SAM)
        for name in duality._NOT_UNDER_ALL_ATTACKS:
            assert math.isfinite(run.columns[name][0]) == thorough, name
        asked = [attacks for attacks, _, _, _ in run.asked]
        assert asked.count(("square",)) == asked.count(("fab-t", "square")) == thorough
        assert {threat.norm for _, threat, _, _ in run.asked} <= {"linf", "l2"}
        assert all(seed == 10 for _, _, seed, _ in run.asked)
        assert all(n <= (20 if "apgd-ce" in attacks else 10) for attacks, _, _, n in run.asked)


def test_progress_counts_the_epochs_of_the_network(ran):
    assert ran[0].seen == []  # the network of SGD is trained for all
    for run in ran[1:]:
        assert run.seen == [(epoch, 6) for epoch in range(1, 7)]


def test_the_whole_autoattack_is_the_worst_of_its_attacks(monkeypatch):
    _, model, (x, y) = alone(SAM)
    right = model(x[:10]).argmax(1) == y[:10]

    def breaks(model, x, y, threat, *, attacks, seed):
        """The gradient attacks break the first example they see, the others the second."""
        attacked, which = x.clone(), 1 if "fab-t" in attacks else 0
        if attacks != ("square",):
            attacked[which] = pgd(model, x, y, 1.0, steps=20)[which]
        return attacked

    quick_judges(monkeypatch, breaks)
    columns = duality.run(TINY, Cell(SAM, 10))
    wrong = 10 - int(right.sum())
    assert columns["doubted_autoattack_error"] == [pytest.approx((wrong + 1) / 10)]
    assert columns["whole_error"] == [pytest.approx((wrong + 2) / 10)]
    assert columns["square_error"] == [pytest.approx(wrong / 10)]


def test_the_real_autoattack_judges():
    config = dataclasses.replace(
        TINY, n_autoattack=8, n_all_attacks=2, judged_eps=(0.4,), l2_eps=3.0
    )
    columns = duality.run(config, Cell(SGD, 10))
    assert len(columns["autoattack_error"]) == 1
    assert columns["autoattack_error"][0] >= columns["pgd_error_judged"][0] - 1e-6
    assert columns["autoattack_error"][0] > 0.5
    assert columns["whole_error"][0] >= columns["doubted_autoattack_error"][0]
    assert math.isfinite(columns["square_error"][0] + columns["l2_autoattack_error"][0])


@pytest.mark.slow
def test_a_network_with_batch_norm_is_attacked_as_it_predicts(judge):
    recipe = duality.DESKTOP.recipe.but(
        **{"data": "digits", "train": 100, "test": 40, "epochs": 8, "batch": 20},
        **{"measured": 20, "tol": 0.5},
    )
    config = dataclasses.replace(
        duality.DESKTOP,
        recipe=recipe,
        **{"pgd_steps": 2, "n_pgd": 40, "n_autoattack": 8, "n_all_attacks": 2},
        **{"eps": (0.0, 8 / 255), "judged_eps": (8 / 255,)},
    )
    columns = duality.run(config, Cell(SAM, 10))
    training, dataset = duality.prepare(config, Cell(SAM, 10))
    model = training.run().model.eval()
    wrong = (model(dataset.x_test).argmax(1) != dataset.y_test).float().mean().item()
    assert columns["pgd_error"][0] == pytest.approx(wrong)
    assert wrong < 0.8 and columns["common"][0] > 0
    for name in ("margin", "distance", "sharpness", "transfer_error", "common_pgd_error"):
        assert np.isfinite(columns[name]).all()


def test_a_small_grid_gives_every_claim_a_number(ran):
    result = result_of(
        {"rho": 0.1, "rhos": TINY.rhos, "shares": TINY.shares, "judged_eps": TINY.judged_eps},
        *(run_of(run.setting, 10, **run.columns) for run in ran),
    )
    (runs,) = result.by_seed()
    assert all(np.isfinite(claim(runs)).all() for claim in duality.CLAIMS)
    rhos, values = against_rho(result, "autoattack_error", 0.05)
    assert rhos.tolist() == [0, 0.05, 0.1] and values.shape == (1, 3)


# --- the claims, by hand --------------------------------------------------------------------------

CONFIG = {
    "rho": 0.1,
    "rhos": [0.2, 0.1, 0.05],
    "shares": [0.5],
    "judged_eps": [1 / 255, 2 / 255],
}


def made(method="sgd", rho=0.0, share=1.0, seed=0, **columns):
    grids = {"eps": [0.0, 1 / 255, 2 / 255, 1.0], "judged_eps": [1 / 255, 2 / 255]}
    return run_of({"method": method, "rho": rho, "share": share}, seed, **grids, **columns)


RUNS = [
    made(
        **{"natural_error": [0.10], "autoattack_error": [0.50, 0.80], "l2_autoattack_error": [0.6]},
        **{"input_gradient": [8.0], "distance": [0.02], "norm": [20.0]},
        sharpness=[0.5],
    ),
    made("sam", 0.05, natural_error=[0.09], autoattack_error=[0.45, 0.7]),
    made(
        *("sam", 0.1),
        **{"natural_error": [0.08], "autoattack_error": [0.40, 0.74], "l2_autoattack_error": [0.5]},
        **{"input_gradient": [6.0], "distance": [0.03], "norm": [22.0]},
        pgd_error=[0.1, 0.35, 0.70, 0.995],
        transfer_error=[0.9, 0.30, 0.69, 0.90],  # at eps 0 nothing is compared
        pgd_error_judged=[0.39, 0.70],
        few_steps_error_judged=[0.36, 0.69],
        common_autoattack_error=[0.30, 0.4],
        common_sgd_autoattack_error=[0.42, 0.5],
        doubted_pgd_error=[0.30],
        square_error=[0.28],
        doubted_autoattack_error=[0.31],
        whole_error=[0.34],
    ),
    made("sam", 0.2, natural_error=[0.12], autoattack_error=[0.30, 0.5]),
    made("sam", 0.1, 0.5, natural_error=[0.16], autoattack_error=[0.44, 0.9]),
    made("blind", 5.0, autoattack_error=[0.48, 0.8]),
    made("decay", autoattack_error=[0.37, 0.8], sharpness=[1.5]),
    made("adversarial", autoattack_error=[0.2, 0.3]),
]
EXPECTED = {
    "sam-is-more-robust": 10.0,
    "clean-accuracy-is-kept": -2.0,
    "robustness-grows-with-rho": 15.0,
    "at-equal-clean-accuracy": 9.0,  # a quarter of the way from 0.40 to 0.44
    "on-common-examples": 12.0,
    "in-the-euclidean-norm": 10.0,
    "input-gradient-is-smaller": 0.75,
    "boundary-is-farther": 1.5,
    "weights-are-not-shorter": 1.1,
    "decay-does-less": -3.0,
    "blind-does-less": 8.0,
    "nobody-stands-a-large-eps": 99.5,
    "gradients-are-not-hidden": -1.0,
    "judges-agree": 4.0,
    "two-attacks-of-four-are-enough": 3.0,
    "steps-do-not-matter": 3.0,
    "far-from-adversarial-training": 0.12,
}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    check_statistics(duality.CLAIMS, {name: (runs, x) for name, x in EXPECTED.items()})


def test_square_that_beats_pgd_shows_a_hidden_gradient():
    hidden = run_of(RUNS[2].settings, **{**RUNS[2].columns, "square_error": [0.42]})
    value = duality.gradients_are_not_hidden(seed_runs(CONFIG, hidden))
    assert value == pytest.approx(12.0)


def test_a_column_against_rho_begins_with_sgd_and_ascends():
    again = [run_of(run.settings, 1, natural_error=0.5) for run in RUNS]
    result = result_of(CONFIG, *RUNS, *again)
    rhos, values = against_rho(result, "natural_error")
    assert rhos.tolist() == [0, 0.05, 0.1, 0.2]
    assert values.tolist() == [[0.10, 0.09, 0.08, 0.12], [0.5] * 4]
    assert against_rho(result_of(CONFIG, *RUNS), "autoattack_error", 2 / 255)[1].tolist() == [
        [0.8, 0.7, 0.74, 0.5]
    ]


@pytest.mark.parametrize(
    ("name", "eps", "message"),
    [
        ("autoattack_error", None, "autoattack_error takes an eps of .*got None"),
        ("autoattack_error", 0.5, "autoattack_error takes an eps of .*got 0.5"),
        ("natural_error", 0.1, "natural_error takes no eps, got 0.1"),
    ],
)
def test_an_eps_that_is_not_there_is_refused(name, eps, message):
    with pytest.raises(ValueError, match=message):
        against_rho(result_of(CONFIG, *RUNS), name, eps)


def test_a_network_is_found_by_its_method_radius_and_share():
    runs = seed_runs(CONFIG, *RUNS)
    assert network(runs, "sgd") is RUNS[0]
    assert network(runs, "sam") is RUNS[2] and network(runs, "sam", 0.2) is RUNS[3]
    assert network(runs, "sam", share=0.5) is RUNS[4]
    assert network(runs, "blind") is RUNS[5]
    with pytest.raises(ValueError, match="no run with rho=0.7"):
        network(runs, "sam", 0.7)


@pytest.mark.parametrize(("sgd", "value"), [(0.08, 0.40), (0.12, 0.42), (0.01, 0.40), (0.3, 0.44)])
def test_at_equal_accuracy_a_column_is_interpolated_and_beyond_it_is_the_nearer_ends(sgd, value):
    runs = seed_runs(CONFIG, made(natural_error=[sgd]), RUNS[2], RUNS[4])
    assert equal_accuracy(runs, "autoattack_error", 1 / 255) == pytest.approx(value)
