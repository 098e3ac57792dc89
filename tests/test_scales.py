"""How far a config is from the paper's own set-up, and what it costs to run."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_experiment import Config, claim_of, toy

from sam_lab import data, experiments, models
from sam_lab.experiments.inputs import late_adversarial
from sam_lab.experiments.lab.cost import HVPS, cost_in_words, gradient_flops
from sam_lab.experiments.lab.experiment import SCALES
from sam_lab.experiments.lab.setup import Setup
from sam_lab.experiments.late import late_images, late_phase, switching
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS, Recipe
from sam_lab.experiments.sam import sam_edge_cnn, sam_edge_mlp, sam_edge_transformer

KNOWN = [name for name in experiments.names() if experiments.get(name).setup]
COUNTED = [name for name in experiments.names() if experiments.get(name).cost]


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Config = dataclasses.field(default_factory=Config)
    widths: tuple[int, ...] = ()
    flag: bool = False
    size: int = 50_000


def test_what_departs_is_named_with_both_values():
    setup = Setup("s", {"inner.steps": 3, "widths": (16, 32), "flag": True, "size": 60_000})
    assert setup.departures(Outer()) == [
        "widths none (paper: 16–32)",
        "flag no (paper: yes)",
        "size 50,000 (paper: 60,000)",
    ]
    assert setup.compared() == "steps, widths, flag, size"


def test_what_no_field_says_departs_in_every_config():
    assert Setup("s", {"inner.lr": 0.1}).departures(Outer()) == []
    assert Setup("s", {"inner.lr": 0.1}, ["no cutout"]).departures(Outer()) == ["no cutout"]


def test_a_fact_must_be_about_a_field():
    with pytest.raises(ValueError, match=r"fields of Config, got 'stepz'"):
        dataclasses.replace(toy(claim_of([1.0])), setup=Setup("s", {"stepz": 3}))


@pytest.mark.parametrize("name", KNOWN)
def test_every_preset_of_the_ledger_is_compared(name):
    experiment = experiments.get(name)
    assert experiment.setup.source
    for scale in set(experiment.presets) & set(SCALES):
        found = experiment.setup.departures(experiment.presets[scale])
        assert set(experiment.setup.besides) <= set(found)


def test_the_papers_tasks_are_told_from_what_is_smaller():
    def departs(module, config):
        return module.EXPERIMENT.setup.departures(config)

    ours = dataclasses.replace(sam_edge_mlp.PAPER, images=10_000)
    assert departs(sam_edge_mlp, ours) == ["images 10,000 (paper: 60,000)"]
    assert departs(sam_edge_mlp, dataclasses.replace(ours, images=60_000)) == []
    assert departs(sam_edge_cnn, sam_edge_cnn.DESKTOP) == []  # whatever the preset is called
    small = dataclasses.replace(sam_edge_transformer.PAPER, layers=2, batch=16)
    assert departs(sam_edge_transformer, small) == ["layers 2 (paper: 6)", "batch 16 (paper: 128)"]
    assert any("cutout" in words for words in departs(late_images, late_images.PAPER))
    assert not any("architecture" in one for one in departs(late_images, late_images.PAPER))


def test_a_network_is_named_by_what_the_recipe_builds():
    assert DIGITS.architecture == "MLP 200–200"
    assert CIFAR.architecture == "WRN-16-8"
    assert CIFAR_TENTH.architecture == "WRN-10-1 with a first stride of 2"
    assert Recipe("cifar10", 10, 10, channels=(8, 16)).architecture == "CNN 8–16"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4))
def test_a_gradients_flops_are_those_of_its_matrix_products(sizes, n):
    pairs = list(itertools.pairwise(sizes))
    # forward, and backward to the weights of all layers and to the inputs of all but the first
    products = sum(4 * a * b for a, b in pairs) + sum(2 * a * b for a, b in pairs[1:])
    model = models.mlp(sizes, "relu")
    assert gradient_flops(model, torch.zeros(n, sizes[0])) == products


@pytest.mark.slow
def test_counting_takes_no_data(monkeypatch):
    monkeypatch.setattr(data, "load", None)
    for name in COUNTED:
        experiment = experiments.get(name)
        for scale in set(experiment.presets) & set(SCALES):
            assert experiment.cost(experiment.presets[scale]) > 0


def test_the_cost_of_a_full_batch_task_is_that_of_its_gradients():
    config = sam_edge_mlp.Config(
        images=7, hidden=(5,), lrs=(0.1,), rhos=(0.0, 0.1), steps=10, every=5
    )
    gradient = 7 * (4 * (784 * 5 + 5 * 10) + 2 * 5 * 10)
    trained, measured = 10 * (1 + 2), 2 * 3 * 2 * HVPS
    assert sam_edge_mlp.cost(config) == gradient * (trained + measured)


def test_the_cost_of_a_language_model_is_that_of_both_batches():
    config = sam_edge_transformer.Config(lrs=(0.1,), rhos=(0.0,), steps=10, every=10)
    window = sam_edge_transformer.cost(dataclasses.replace(config, batch=1, fixed=0)) / (
        10 + 2 * 2 * HVPS
    )
    measured = (16 + 64) * 2 * 2 * HVPS
    assert sam_edge_transformer.cost(config) == pytest.approx(window * (16 * 10 + measured))


def test_the_cost_of_a_switch_is_that_of_the_epochs_on_either_side():
    recipe = Recipe("digits", 100, 10, hidden=(3,), epochs=8, measured=0)
    gradient = recipe.gradient_flops()
    assert gradient == 4 * (64 * 3 + 3 * 10) + 2 * 3 * 10
    # trunks of 8 epochs; from the middle 4 of what is studied, and 2 of SGD after a switch at 6
    expected = 100 * gradient * (3 * (8 + 4) + (8 + 2))
    assert switching.cost(recipe, (0.5,), (0.75,), 3, hessians=5) == pytest.approx(expected)
    config = late_phase.Config(recipe, late=(0.5,), early=(0.75,), schedules=("constant",))
    one = late_phase.cost(config)
    assert one == pytest.approx(100 * gradient * (2 * 12 + 10))
    assert late_phase.cost(dataclasses.replace(config, rhos=(0.1, 0.2))) == pytest.approx(2 * one)
    attacked = late_adversarial.Config(
        recipe, attack_steps=2, late=(0.5,), early=(0.75,), schedules=("constant",), n_autoattack=0
    )
    judged = 4 * 250 * 10 * gradient
    assert late_adversarial.cost(attacked) == pytest.approx(expected + judged)
    alone = dataclasses.replace(attacked, with_pgd=False)
    assert late_adversarial.cost(alone) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flops", "words"),
    [
        (1e12, "1.0e+12 FLOPs: about a minute on two CPU cores, a minute on one H100"),
        (3.6e15, "3.6e+15 FLOPs: about 10 hours on two CPU cores, 2 minutes on one H100"),
        (1e18, "1.0e+18 FLOPs: about 116 days on two CPU cores, 9.3 hours on one H100"),
        (1e20, "1.0e+20 FLOPs: about 32 years on two CPU cores, 39 days on one H100"),
    ],
)
def test_a_cost_is_told_in_a_unit_that_can_be_grasped(flops, words):
    assert cost_in_words(flops) == words
