"""What SAM drops, against autograd and by hand, and the length of noise that does as much."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import experiments, models
from sam_lab.experiments import Cell
from sam_lab.experiments.sam import first_principles as study
from sam_lab.experiments.sam import methods
from sam_lab.training import squared_error

SMALL = dataclasses.replace(
    study.Config(),
    train=60,
    widths=(6,),
    lr=0.05,
    batch=20,
    epochs=2,
    measured=40,
    micros=(5,),
    checkpoints=(0, 2),
    batches=2,
    lengths=(5.0, 20.0),
)


@pytest.fixture(scope="module")
def runs():
    pytest.importorskip("mlxtend")
    result = experiments.run(study.EXPERIMENT, SMALL, seeds=[1], device="cpu", progress=False)
    return result.by_seed()[0]


# --- the two terms -------------------------------------------------------------------------------


def test_what_is_kept_and_what_is_dropped_are_together_the_gradient_of_sams_objective():
    model = models.mlp((4, 5, 3), "gelu", seed=0, dtype=torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    weights, rho = dict(model.named_parameters()), 0.3

    def loss_at(there):
        return squared_error(torch.func.functional_call(model, there, (x,)), y)

    g = torch.autograd.grad(loss_at(weights), list(weights.values()), create_graph=True)
    size = torch.cat([part.flatten() for part in g]).norm()
    ahead = {n: w + rho * part / size for (n, w), part in zip(weights.items(), g, strict=True)}
    whole = torch.autograd.grad(loss_at(ahead), list(weights.values()))
    expected = torch.cat([part.flatten() for part in whole])
    plain, kept, lost = study.terms(lambda: loss_at(weights), list(weights.values()), rho)
    torch.testing.assert_close(plain, torch.cat([part.flatten() for part in g]).detach())
    torch.testing.assert_close(kept + lost, expected, rtol=1e-8, atol=1e-10)
    assert float(lost.norm()) > 0.01 * float(kept.norm())


@pytest.mark.parametrize("rho", [0.1, 0.4])
def test_the_dropped_term_at_an_eigenvector_is_of_third_order_unless_the_loss_is_quadratic(rho):
    a, lam, mu = 1.5, 3.0, 2.0
    for c in (0.0, 0.5):
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)

        def bent(w=w, c=c):
            x, y = w
            return a * y + lam * y**2 / 2 + mu * x**2 / 2 + c * x * y**2

        _, kept, lost = study.terms(bent, [w], rho)
        assert kept.tolist() == pytest.approx([c * rho**2, a + lam * rho])
        assert lost.tolist() == pytest.approx([mu * c * rho**3 / a, 0.0])


# --- the studies, small --------------------------------------------------------------------------


def test_the_rows_are_the_checkpoints_and_both_paths_start_at_the_same_weights(runs):
    assert [run.settings for run in runs.runs] == study.EXPERIMENT.settings(SMALL)
    sgd, sam = (study.along(runs, method) for method in ("sgd", "sam"))
    for run in (sgd, sam):
        assert run["epoch"].tolist() == [0, 2]
        assert np.all(run["ratio_low"] <= run["ratio"])
        assert np.all(run["ratio"] <= run["ratio_high"])
        assert np.all((run["cosine"] > 0) & (run["cosine"] <= 1))
    assert sgd["ratio"][0] == sam["ratio"][0] and sgd["loss"][0] == sam["loss"][0]
    assert sgd["loss"][1] != sam["loss"][1]


def test_the_ratio_of_many_images_is_that_of_their_loss(runs):
    dataset = methods.load(SMALL, seed=1)
    model = methods.build(SMALL, dataset.x, seed=1)
    closure = methods.measured_loss(SMALL, dataset, model)
    g, kept, lost = study.terms(closure, list(model.parameters()), SMALL.rho)
    run = study.along(runs, "sam")
    assert run["many_ratio"][0] == pytest.approx(float(lost.norm() / kept.norm()), rel=1e-4)
    assert run["many_gradient"][0] == pytest.approx(float(g.norm()), rel=1e-5)


def test_the_same_seed_gives_the_same_columns(runs):
    setting = {"study": "noise", "rho": 5 * SMALL.rho}
    again = study.EXPERIMENT.run(SMALL, Cell(setting, seed=1))
    assert run_of(setting, 1, **again) == runs.one(**setting)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_presets_hold_what_the_claims_look_up(scale):
    config = study.PRESETS[scale]
    assert config.checkpoints[0] == 0 and config.checkpoints[-1] == config.epochs
    assert list(config.lengths) == sorted(config.lengths)
    assert config.batches * config.batch <= (config.train or 50_000)


# --- the claims ----------------------------------------------------------------------------------


def test_every_claim_can_be_read_off_the_runs(runs):
    for claim in study.CLAIMS:
        try:
            assert math.isfinite(claim(runs))
        except experiments.NotApplicable:
            assert claim.id == "noise-must-be-long"


CONFIG = {"rho": 0.1}


def path(method, ratio, many, sharpness, seed=0):
    columns = {"ratio": ratio, "many_ratio": many, "sharpness": sharpness, "loss": [0.9, 0.2]}
    return run_of({"study": "dropped", "method": method}, seed, **columns)


def noise(times, sharpness):
    return run_of({"study": "noise", "rho": times * 0.1}, sharpness=sharpness, loss=0.3)


MADE = seed_runs(
    CONFIG,
    path("sgd", [0.02, 0.9], [0.02, 2.0], [1.0, 8.0]),
    path("sam", [0.02, 0.6], [0.03, 0.9], [1.0, 2.0]),
    noise(20.0, 4.0),
    noise(80.0, 1.0),
)
EXPECTED = {
    "dropped-is-small-at-the-start": 0.02,
    "dropped-is-no-detail": 0.6,
    "dropped-exceeds-kept": 0.6,
    "dropped-is-larger-for-sgd": 1.5,
    "dropped-is-larger-for-more-data": 1.5,
    "noise-must-be-long": 40,  # halfway in both logarithms
    "longest-noise-is-sharper": 0.5,
    "longest-noise-costs-loss": 1.5,
}


def test_every_claims_statistic_is_the_arithmetic_of_its_statement():
    check_statistics(study.CLAIMS, {name: (MADE, value) for name, value in EXPECTED.items()})


def test_noise_that_never_reaches_sam_counts_with_its_longest_and_too_easy_noise_not_at_all():
    sam = path("sam", [0.1], [0.1], [2.0])
    never = seed_runs(CONFIG, sam, noise(20.0, 4.0), noise(80.0, 3.0))
    assert study.length_needed(never) == pytest.approx(80)
    easy = seed_runs(CONFIG, sam, noise(20.0, 1.5))
    with pytest.raises(experiments.NotApplicable, match="shortest"):
        study.length_needed(easy)


@pytest.mark.parametrize(("ratio", "verdict"), [(0.3, "reproduced"), (0.01, "not reproduced")])
def test_the_verdict_of_a_claim_follows_from_its_criterion(ratio, verdict):
    made = [path("sam", [0.01, ratio * (1 + seed / 100)], [1], [1], seed) for seed in range(3)]
    assert study.dropped_is_no_detail.judge(result_of(CONFIG, *made)).verdict == verdict
