"""Training against one step: the attacks, what is measured, and what the claims say."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs
from torch import nn

from sam_lab import experiments, models
from sam_lab.adversarial import Threat, fgsm, pgd, robust_accuracy
from sam_lab.experiments import Cell
from sam_lab.experiments.inputs import catastrophic_overfitting as co
from sam_lab.training import evaluate

pytestmark = pytest.mark.usefixtures("light_judges")

TINY = dataclasses.replace(
    co.LAPTOP,
    recipe=co.LAPTOP.recipe.but(
        data="digits", train=40, test=30, channels=(2,), epochs=3, batch=20
    ),
    n_pgd=20,
    n_autoattack=10,
)


# --- the attacks of training ----------------------------------------------------------------------


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 1, 8, 8, generator=generator)
    return models.cnn((1, 8, 8), 10, "relu", widths=(4,), seed=seed), x, torch.arange(6)


def test_fgsm_in_training_is_fgsm_and_draws_nothing():
    model, x, y = problem()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    found = co.attack("fgsm", 0.1, 5)(model, x, y, generator=generator)
    assert torch.equal(found, fgsm(model, x, y, 0.1))
    assert torch.equal(generator.get_state(), before)


def test_a_random_start_takes_one_longer_step_and_stays_in_the_ball():
    model, x, y = problem()
    made = co.attack("random", 0.1, 5)(model, x, y, generator=torch.Generator().manual_seed(3))
    same = torch.Generator().manual_seed(3)
    by_hand = pgd(model, x, y, 0.1, steps=1, step_size=0.125, generator=same)
    assert torch.equal(made, by_hand) and not torch.equal(made, fgsm(model, x, y, 0.1))
    assert (made - x).abs().max() <= 0.1 + 1e-6


def test_an_attack_without_a_name_is_refused():
    with pytest.raises(ValueError, match="attack must be one of fgsm, random, pgd, got 'none'"):
        co.attack("none", 0.1, 5)


@pytest.mark.parametrize(("name", "passes"), [("fgsm", 2), ("random", 2), ("pgd", 4)])
def test_a_step_costs_a_pass_for_each_step_of_the_attack_and_one(name, passes):
    training, _ = co.prepare(TINY, Cell({"attack": name, "eps": 0.1}, 10))
    training.run(1)
    assert training.history[-1]["passes"] == passes * 2


# --- linearity ------------------------------------------------------------------------------------


def test_two_classes_of_a_linear_model_are_linear_everywhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    x, y = torch.rand(5, 1, 3, 3), torch.tensor([0, 1, 0, 1, 1])
    assert co.linearity(model, x, y, Threat("linf", 0.3)) == pytest.approx(1.0)


class Bowl(nn.Module):
    """The loss has its minimum in the middle of the box: its gradient points away from there."""

    def forward(self, x):
        score = 4 * (x.flatten(1) - 0.5).square().sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def test_linearity_counts_the_points_where_the_gradient_has_turned_round():
    x, y = torch.full((400, 1, 1, 1), 0.6), torch.zeros(400, dtype=torch.int64)
    # from 0.6 a ball of 0.4 reaches from 0.2 to 1: three eighths of it lie on the other side
    found = co.linearity(Bowl(), x, y, Threat("linf", 0.4))
    assert found == pytest.approx(5 / 8 - 3 / 8, abs=0.15)


def test_linearity_leaves_the_model_and_the_random_state():
    model, x, y = problem()
    state, model = torch.get_rng_state(), model.train()
    one, two = (co.linearity(model, x, y, Threat("linf", 0.2), seed=5) for _ in range(2))
    assert one == two and -1 <= one <= 1
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())


# --- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(light_judges):
    """All settings of the tiny config, one seed."""
    return experiments.run(co.EXPERIMENT, TINY, seeds=[10], device="cpu", progress=False)


def test_settings_are_all_attacks_at_one_radius_and_fgsm_at_the_others():
    compared = [tuple(setting.values()) for setting in co.settings(TINY)]
    assert compared == [
        *(("fgsm", 0.3), ("random", 0.3), ("pgd", 0.3)),
        *(("fgsm", 0.2), ("fgsm", 0.35)),
    ]


@pytest.mark.parametrize("config", co.EXPERIMENT.presets.values())
def test_in_every_preset_the_radius_of_all_attacks_lies_between_the_others(config):
    assert min(config.others) < config.eps < max(config.others)
    assert config.attack_steps < co.WATCHING_STEPS


def test_a_run_is_watched_at_every_second_epoch_and_at_the_last():
    cell = Cell({"attack": "fgsm", "eps": 0.2}, 10)
    columns = co.run(TINY, cell)
    training, dataset = co.prepare(TINY, cell)
    threat, x, y = Threat("linf", 0.2), dataset.x_test[:20], dataset.y_test[:20]
    assert columns["epoch"] == [2, 3]
    for i, epoch in enumerate((2, 3)):
        model = training.run(epoch).model
        assert columns["natural_error"][i] == pytest.approx(evaluate(model, x, y)[1])
        many = partial(pgd, threat=threat, steps=20)
        one_step = partial(fgsm, threat=threat)
        assert columns["pgd_error"][i] == 1 - robust_accuracy(model, x, y, many)[1]
        assert columns["fgsm_error"][i] == 1 - robust_accuracy(model, x, y, one_step)[1]
        assert columns["linearity"][i] == co.linearity(model, x, y, threat, 10)
    few = dataset.x_test[:10], dataset.y_test[:10]
    assert columns["end_natural_error"] == [pytest.approx(evaluate(training.model, *few)[1])]
    assert set(columns) == {
        *("epoch", "natural_error", "fgsm_error", "pgd_error", "linearity"),
        *("end_natural_error", "end_pgd_error", "end_autoattack_error"),
    }


def test_a_wide_residual_network_trains_too():
    recipe = co.DESKTOP.recipe.but(
        data="digits", train=20, test=30, epochs=1, batch=20, augment=True
    )
    config = dataclasses.replace(TINY, recipe=recipe)
    columns = co.run(config, Cell({"attack": "random", "eps": 0.1}, 10))
    assert all(np.isfinite(values).all() for values in columns.values())


def test_a_small_grid_gives_every_claim_a_number(result):
    assert len(result.runs) == 5
    (runs,) = result.by_seed()
    assert np.isfinite([claim(runs) for claim in co.EXPERIMENT.claims]).all()


# --- the claims, by hand --------------------------------------------------------------------------


def trained(attack, eps, fgsm_error, pgd_error, autoattack, linearity=(0.9, 0.8, 0.8), seed=0):
    return run_of(
        {"attack": attack, "eps": eps},
        seed,
        epoch=[2, 4, 6],
        fgsm_error=list(fgsm_error),
        pgd_error=list(pgd_error),
        linearity=list(linearity),
        end_autoattack_error=autoattack,
    )


CONFIG = {"eps": 0.3, "others": [0.35, 0.2]}
RUNS = [
    trained("fgsm", 0.3, (0.5, 0.4, 0.3), (0.6, 0.55, 0.95), 0.98),
    trained("random", 0.3, (0.5, 0.45, 0.4), (0.6, 0.6, 0.55), 0.6),
    trained("pgd", 0.3, (0.4, 0.3, 0.3), (0.5, 0.35, 0.4), 0.45),
    trained("fgsm", 0.35, (0.6, 0.3, 0.2), (0.8, 1.0, 0.8), 1.0, (0.8, 0.2, 0.4)),
    trained("fgsm", 0.2, (0.3, 0.3, 0.2), (0.3, 0.32, 0.3), 0.35),
]
EXPECTED = {
    "one-step-deceives": 70.0,
    "nothing-is-left": 100.0,
    "linearity-is-lost": 0.25,  # 0.8 to 0.2, where the errors differ most
    "small-radius-is-spared": 10.0,
    "robustness-is-lost": 40.0,
    "pgd-does-not-lose-it": 5.0,
    "random-start-helps": 50.0,  # 65 to 15
    "random-start-is-more-robust": 38.0,
    "one-step-is-as-good": 15.0,
}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    check_statistics(co.EXPERIMENT.claims, {name: (runs, x) for name, x in EXPECTED.items()})


def test_what_is_lost_is_counted_from_the_best_epoch_before():
    falling = trained("pgd", 0.3, (0, 0, 0), (0.9, 0.5, 0.2), 0.2)
    assert co.lost(falling) == 0
    recovered = trained("pgd", 0.3, (0, 0, 0), (0.5, 0.9, 0.2), 0.2)
    assert co.lost(recovered) == pytest.approx(40)


def test_curves_have_a_row_for_each_seed_and_are_those_of_one_attack():
    twice = [*RUNS, trained("fgsm", 0.3, (0.1, 0.2, 0.3), (1, 1, 1), 1.0, seed=7)]
    epochs, errors = co.curves(result_of(CONFIG, *twice), "fgsm_error", "fgsm")
    assert epochs.tolist() == [2, 4, 6]
    assert errors.tolist() == [[0.5, 0.4, 0.3], [0.1, 0.2, 0.3]]
    at_the_largest = co.curves(result_of(CONFIG, *RUNS), "linearity", "fgsm", 0.35)[1]
    assert at_the_largest.tolist() == [[0.8, 0.2, 0.4]]
