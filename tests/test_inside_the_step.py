"""Inside a step of the SAM family: the instruments, the masks, and the claims on made runs."""

import dataclasses

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import SAM, experiments, methods, models
from sam_lab.experiments import Cell
from sam_lab.experiments.family import inside_the_step as task
from sam_lab.experiments.family import second_pass

BASE = dataclasses.replace(
    second_pass.LAPTOP,
    recipe=second_pass.LAPTOP.recipe.but(
        data="mnist1d",
        standardize="nowhere",
        train=160,
        test=40,
        batch=20,
        epochs=6,
        measured=20,
        hidden=(8,),
    ),
    validation=40,
    probes=2,
)
TINY = dataclasses.replace(task.LAPTOP, base=BASE, watched=(0, 2), draws=2)
X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


def weights_after(method, steps=4, rho=0.1, **bound):
    """The weights of a small network after some steps with a method."""
    model = models.mlp((5, 8, 3), seed=0)
    sam = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        rho,
        method=method,
        generator=torch.Generator().manual_seed(0),
    )

    def losses(examples=slice(None)):
        outputs = model(X[examples])
        return torch.nn.functional.cross_entropy(outputs, Y[examples], reduction="none")

    for _ in range(steps):
        sam.step(losses)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def watching(instrument):
    """An instrument as a method, and its notes."""
    notes = []

    def method(look, state):
        return instrument(look, state, notes=notes)

    return method, notes


def test_an_instrument_trains_as_the_method_that_it_watches():
    watched, notes = watching(task.watch_reuse)
    assert torch.equal(weights_after(watched), weights_after(methods.plain))
    assert len(notes) == 4

    def examples(look, state):
        drawn = torch.Generator().manual_seed(1)
        return task.watch_examples(look, state, notes=notes, generator=drawn)

    assert torch.equal(weights_after(examples), weights_after(methods.plain))
    climbing, notes = watching(task.watch_momentum)
    assert torch.equal(weights_after(climbing), weights_after(methods.momentum_sam))
    assert notes[0] == {"minus": 0.0, "plus": 0.0}, "there is no momentum before the first step"


def test_what_is_noted_of_reuse_is_what_looksam_keeps():
    watched, notes = watching(task.watch_reuse)
    weights_after(watched)
    for note in notes:
        assert task.cosine_between(note["kept"], note["gradient"]) == pytest.approx(0, abs=1e-4)
        whole = methods.plus(note["kept"], 1.0, _along(note["perturbed"], note["gradient"]))
        for a, b in zip(whole, note["perturbed"], strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def _along(a, b):
    return methods.times(methods.inner(a, b) / methods.inner(b, b), b)


def test_the_halves_that_rise_most_and_least_are_halves_of_the_batch():
    notes = []

    def all_of_it(look, state):
        drawn = torch.Generator().manual_seed(1)
        return task.watch_examples(look, state, notes=notes, generator=drawn)

    weights_after(all_of_it)
    for note in notes:
        assert note.keys() == {"top", "bottom", "random"}
        assert all(-1 <= value <= 1 for value in note.values())


def test_the_cosine_of_lists_is_that_of_their_vectors():
    a, b = (
        [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])],
        [torch.tensor([1.0]), torch.zeros(1, 2)],
    )
    assert task.cosine_between(a, b) == pytest.approx(0.6)
    assert task.cosine_between(a, [torch.zeros(1), torch.zeros(1, 2)]) == 0


def test_a_mask_of_norm_layers_is_what_sam_on_perturbs():
    model = models.mlp((5, 8, 3), norm="batch", seed=0)
    chosen = task.masks(model, "norms", 0)
    moved = {id(p) for p in methods.sam_on(model)[0]["params"]}
    for p, mask in zip(model.parameters(), chosen, strict=True):
        assert bool(mask.all()) == bool(mask.any()) == (id(p) in moved)


def test_a_mask_of_random_entries_has_as_many_as_the_norm_layers():
    model = models.mlp((5, 8, 3), norm="batch", seed=0)
    count = sum(int(mask.sum()) for mask in task.masks(model, "norms", 0))
    one, other = (task.masks(model, "random", seed) for seed in (0, 1))
    assert sum(int(mask.sum()) for mask in one) == count == 16
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(bool(mask.all()) for mask in task.masks(model, "all", 0))
    with pytest.raises(ValueError, match="which must be one of all, norms, random, got 'none'"):
        task.masks(model, "none", 0)


def test_sam_among_some_entries_has_its_whole_length_there():
    grads = [torch.tensor([3.0, 1.0]), torch.tensor([4.0])]
    chosen = [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    first, second = task.among(grads, grads, 0.5, chosen=chosen)
    assert first.tolist() == pytest.approx([0.3, 0.0]) and second.tolist() == pytest.approx([0.4])


@pytest.mark.parametrize(
    "setting",
    [{"study": "reuse"}, {"study": "examples"}, {"study": "momentum", "lr": 0.1}],
    ids=lambda setting: setting["study"],
)
def test_a_run_that_is_looked_into_has_a_row_for_each_watched_epoch(setting):
    columns = task.STUDIES.run(TINY, Cell(setting, 0))
    assert columns["epoch"] == [0, 2]
    assert all(len(values) == 2 and np.isfinite(values).all() for values in columns.values())


def test_sam_on_a_share_of_the_entries_is_searched_for_and_measured():
    columns = task.run_norms(TINY, Cell({"perturbed": "norms"}, 0))
    assert columns["value"][0] in columns["tried"] and len(columns["tried"]) == 4
    total = 40 * 8 + 8 + 16 + 8 * 10 + 10
    assert columns["share"] == [pytest.approx(16 / total)]
    assert task.run_norms(TINY, Cell({"perturbed": "none"}, 0))["tried"] == [0.0]


def test_beside_gsam_stands_sam_of_the_same_and_of_a_larger_radius():
    rows = [(s["rho"], s["alpha"]) for s in task.STUDIES.settings(TINY) if "alpha" in s]
    assert rows == [(0.1, 0.0), (0.1, 0.4), (0.1, 0.8), (0.15, 0.0)]
    ends = [task.run_surrogate(TINY, Cell({"rho": rho, "alpha": a}, 0))["gap"] for rho, a in rows]
    assert len({gap for (gap,) in ends}) == len(rows)


@pytest.mark.slow
def test_the_small_studies_run_to_verdicts():
    result = experiments.run("inside_the_step", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 1 + 2 + 1 + 4 + 4 + 2
    for verdict in experiments.judge(result):
        assert not verdict.reason.startswith("the statistic failed"), verdict


def made(study, columns, **settings):
    return run_of({"study": study, **settings}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    lags = {f"kept_{lag}": [0.1 * lag, 0.1] for lag in task.LAGS}
    lags |= {f"perturbed_{lag}": [0.05, 0.05] for lag in task.LAGS}
    reuse = {**lags, "last": [0.3, 0.1], "momentum": [0.1, -0.1]}

    def end(**columns):
        return {name: [value] for name, value in columns.items()}

    runs = [
        made("reuse", reuse),
        made("momentum", {"minus": [-0.2, -0.4]}, lr=0.01),
        made("momentum", {"minus": [0.1, 0.3]}, lr=0.1),
        made("examples", {"top": [0.9, 0.8], "random": [0.8, 0.8], "bottom": [0.1, 0.2]}),
        made("surrogate", end(gap=0.10, loss=1.00), alpha=0.0, rho=0.1),
        made("surrogate", end(gap=0.09, loss=1.05), alpha=0.4, rho=0.1),
        made("surrogate", end(gap=0.06, loss=1.10), alpha=0.8, rho=0.1),
        made("surrogate", end(gap=0.08, loss=1.12), alpha=0.0, rho=0.15),
        made("norms", end(test_error=30.0, sharpness=9.0), perturbed="none"),
        made("norms", end(test_error=20.0, sharpness=2.0), perturbed="all"),
        made("norms", end(test_error=21.5, sharpness=5.0), perturbed="norms"),
        made("norms", end(test_error=29.0, sharpness=8.0), perturbed="random"),
        made("frobenius", end(frobenius=6.0), method="frob_sam", lam=0.02),
        made("frobenius", end(frobenius=5.0), method="unnormalized", lam=0.02),
    ]
    config = {
        "rho": 0.1,
        "lrs": [0.01, 0.1],
        "alphas": [0.0, 0.4, 0.8],
        "wider": [0.15],
        "lams": [0.02],
    }
    expected = {
        "kept-part-turns-slowly": 0.175,
        "kept-part-turns-more-slowly-than-the-gradient": 0.125,
        "last-gradient-predicts-better-than-momentum": 0.2,
        "minus-momentum-is-uphill": 0.2,
        "minus-momentum-is-downhill-at-small-lr": -0.3,
        "rising-examples-are-nearer": 0.05,
        "rising-examples-are-nearer-than-others": 0.7,
        "gsam-lowers-the-gap": 0.6,
        "gsam-lowers-the-gap-at-equal-loss": 0.75,
        "norm-layers-suffice": -1.5,
        "norm-layers-beat-sgd": 8.5,
        "norm-layers-beat-random-entries": 7.5,
        "norm-layers-leave-it-sharper": 2.5,
        "frob-sam-is-unnormalized-sam": 1.2,
    }
    cases = {name: (seed_runs(config, *runs), value) for name, value in expected.items()}
    check_statistics(task.EXPERIMENT.claims, cases)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_epochs_that_are_watched_are_epochs_of_the_run(scale):
    config = task.EXPERIMENT.presets[scale]
    assert max(config.watched) < config.base.recipe.epochs // 2
    assert config.alphas[0] == 0 and config.rho not in config.wider
    assert len(config.norm_starts) == len(task.MASKS) and task.cost(config) > 0
