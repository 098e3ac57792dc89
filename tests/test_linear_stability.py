"""Linear stability: the simulation against the library and enumeration, thresholds, tiny runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of

from sam_lab import experiments, gd_edge, sam_edge
from sam_lab.experiments import Cell
from sam_lab.experiments.late import linear_stability as study
from sam_lab.stability import growth, mean_square_growth, mean_square_lr

LR, RHO = 0.5, 0.1
EDGE = sam_edge(study.LAPTOP.lr, study.LAPTOP.rho, 1.0)
SETTINGS = study.EXPERIMENT.settings

TINY = dataclasses.replace(
    study.LAPTOP,
    examples=4,
    dim=6,
    spectra=("decaying",),
    batches=(1, 2, 4),
    walkers=300,
    steps=120,
    warmup=40,
    rate_walkers=1000,
    tol=1e-2,
    fan_walkers=200,
    fan_steps=300,
    moments=11,
    checked=20,
    crowd=100,
    long=400,
)


def problem(seed=0, spectrum="flat", examples=4, dim=6):
    return study.problem(spectrum, examples, dim, torch.Generator().manual_seed(seed))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the model and the theory --------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["flat", "decaying", "uneven"])
def test_a_problem_has_its_shape_and_a_sharpness_of_1(spectrum):
    x = problem(3, spectrum, 12, 24)
    assert x.shape == (12, 24) and x.dtype == torch.float64
    values = torch.linalg.eigvalsh(x.T @ x / 12)
    assert values[-1].item() == pytest.approx(1)
    assert (values[-12:] > 1e-3).all()


def test_the_spectra_differ_in_what_their_names_say():
    many = {name: problem(0, name, 200, 50) for name in ("flat", "decaying", "uneven")}
    features = {name: x.square().mean(0) for name, x in many.items()}
    lengths = {name: x.norm(dim=1) for name, x in many.items()}
    assert features["flat"].max() < 2 * features["flat"].min()
    assert features["decaying"][0] > 20 * features["decaying"][-1]
    assert lengths["flat"].std() < 0.2 * lengths["flat"].mean()
    assert lengths["uneven"].std() > 0.4 * lengths["uneven"].mean()
    with pytest.raises(ValueError, match="spectrum must be .*'steep'"):
        problem(0, "steep")


@pytest.mark.parametrize("rho", [0.0, RHO])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_at_the_edge_of_the_theory_the_mean_square_neither_grows_nor_shrinks(batch, rho):
    x = problem(1, "uneven")
    edge = study.stable_sharpness(x, LR, rho, batch)
    assert mean_square_growth(x * math.sqrt(edge), LR, rho, batch) == pytest.approx(1, rel=1e-8)
    if batch == 4:
        assert edge == pytest.approx(sam_edge(LR, rho, 1.0), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_quotient_that_decides_on_stability_rises_with_the_scale(batch):
    """Which is why there is one edge: lr over the largest stable lr, along a scaled problem."""
    x = problem(2, "uneven")
    scales = np.geomspace(0.01, 100, 30)
    quotients = [1 / mean_square_lr(x * math.sqrt(scale), RHO, batch) for scale in scales]
    assert (np.diff(quotients) > 0).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_exact_mean_is_that_over_all_sequences_of_batches(batch):
    x = problem(0) * 1.2
    start = x.sum(0)
    totals = np.zeros(3)
    batches = [list(chosen) for chosen in itertools.combinations(range(4), batch)]
    for first, then in itertools.product(batches, repeat=2):
        w, step = study.library(x, LR, RHO, start)
        lengths = [w.detach().square().sum().item()]
        for rows in (first, then):
            step(torch.tensor(rows))
            lengths.append(w.detach().square().sum().item())
        totals += np.array(lengths) / len(batches) ** 2
    exact = study.exact_mean(x, LR, RHO, batch, start, 2)
    np.testing.assert_allclose(exact, totals, rtol=1e-12)


def test_in_the_long_run_the_exact_mean_grows_by_the_factor_of_the_theory():
    x = problem(0) * 1.2
    means = study.exact_mean(x, LR, RHO, 2, x.sum(0), 300)
    expected = mean_square_growth(x, LR, RHO, 2)
    assert means[-1] / means[-2] == pytest.approx(expected, rel=1e-9)


# --- simulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_batches_have_their_size_and_each_is_drawn_as_often_as_any_other(batch):
    weights = study.draw(6000, 4, batch, torch.Generator().manual_seed(0))
    assert torch.equal((weights > 0).sum(1), torch.full((6000,), batch))
    torch.testing.assert_close(weights.sum(1), torch.ones(6000, dtype=torch.float64))
    codes = (weights > 0).long() @ torch.tensor([1, 2, 4, 8])
    counts = codes.unique(return_counts=True)[1]
    expected = 6000 / math.comb(4, batch)
    assert len(counts) == math.comb(4, batch)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("rho", [0.0, RHO])
def test_a_simulated_step_is_a_step_of_the_library_on_the_same_batch(rho, unit):
    x = problem(0) * 1.5
    starts = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = study.draw(3, 4, 2, torch.Generator().manual_seed(2))
    after = study.moved(x, starts, weights, LR, rho, unit=unit)
    for start, chosen, end in zip(starts, weights, after, strict=True):
        w, step = study.library(x, LR, rho, start, unit=unit)
        step(chosen.nonzero()[:, 0])
        torch.testing.assert_close(w.detach(), end, rtol=1e-12, atol=1e-14)


def test_at_the_minimum_itself_normalised_sam_stays():
    x, rest = problem(0), torch.zeros(2, 6, dtype=torch.float64)
    weights = torch.full((2, 4), 0.25, dtype=torch.float64)
    assert torch.equal(study.moved(x, rest, weights, LR, RHO, unit=True), rest)


@pytest.mark.parametrize("rho", [0.0, RHO])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_population_with_copies_grows_as_the_mean_square(batch, rho):
    config = dataclasses.replace(TINY, walkers=2000, steps=300)
    x = problem(4, "decaying")
    for scale in (0.9, 1.3):
        scaled = x * math.sqrt(scale * study.stable_sharpness(x, LR, rho, batch))
        rate = study.walk(scaled, LR, rho, batch, config, seed=0, copy=True)
        assert rate == pytest.approx(math.log(mean_square_growth(scaled, LR, rho, batch)), abs=0.01)


def test_with_one_weight_the_typical_rate_is_the_mean_logarithm_of_the_multipliers():
    config = dataclasses.replace(TINY, walkers=4000)
    x = vector(1.0, 0.5, 2.0)[:, None]
    multipliers = (1 - LR * x**2).abs()
    rate = study.walk(x, LR, 0.0, 1, config, seed=0, copy=False)
    assert rate == pytest.approx(2 * multipliers.log().mean().item(), abs=0.01)


def test_the_full_batch_has_no_chance_in_it_and_copies_change_nothing():
    x = problem(0) * math.sqrt(1.2 * gd_edge(LR))
    expected = 2 * math.log(growth(LR, 1.2 * gd_edge(LR), RHO))
    config = dataclasses.replace(TINY, walkers=10)
    for copy in (True, False):
        rate = study.walk(x, LR, RHO, 4, config, seed=0, copy=copy)
        assert rate == pytest.approx(expected, rel=1e-9)
    assert study.full_rate(x, LR, RHO, config) == pytest.approx(expected, rel=1e-9)


def test_far_from_the_minimum_normalised_sam_is_gradient_descent():
    sharpness = 1.1 * gd_edge(LR)
    rate = study.full_rate(problem(0) * math.sqrt(sharpness), LR, RHO, TINY, unit=True)
    assert rate == pytest.approx(2 * math.log(growth(LR, sharpness)), rel=1e-9)


@pytest.mark.parametrize("guess", [0.01, 0.9, 1.0, 300.0])
def test_a_threshold_is_found_from_either_side(guess):
    found = study.threshold(lambda sharpness: math.log(sharpness / 3), guess, 1e-6)
    assert found == pytest.approx(3, rel=1e-6)


# --- the studies ---------------------------------------------------------------------------------


def test_normalised_sam_is_the_same_in_units_of_rho_for_every_rho():
    small, large = (
        study.normalized(dataclasses.replace(TINY, rho=rho), Cell({"spectrum": "flat", "batch": 1}))
        for rho in (RHO, 1e3 * RHO)
    )
    np.testing.assert_allclose(small["distance"], large["distance"], rtol=1e-6)


def test_with_the_full_batch_normalised_sam_ends_on_its_orbit():
    columns = study.normalized(TINY, Cell({"spectrum": "flat", "batch": 4}))
    assert columns["distance"][0] == TINY.start
    assert columns["orbit"] == [pytest.approx(0.8 * 2 / (2 - 0.8 * 2))]
    assert columns["last"][0] == pytest.approx(columns["orbit"][0], rel=1e-6)
    assert columns["rate_unnormalized"][0] > 0


@pytest.mark.slow
def test_a_seed_repeats_its_run_and_another_one_changes_it():
    config = dataclasses.replace(
        TINY,
        batches=(1, 4),
        walkers=50,
        steps=40,
        warmup=10,
        tol=5e-2,
        rate_walkers=50,
        fan_walkers=20,
        fan_steps=20,
        checked=5,
        crowd=10,
        long=40,
    )
    for setting in SETTINGS(config):
        first, again, other = (
            study.EXPERIMENT.run(config, Cell(setting, seed)) for seed in (0, 0, 1)
        )
        assert first == again
        assert first != other


def test_the_batches_must_end_with_the_full_one():
    with pytest.raises(ValueError, match=r"all 4 examples, got \(1, 2\)"):
        SETTINGS(dataclasses.replace(TINY, batches=(1, 2)))


def test_the_presets_have_their_settings():
    for config in study.EXPERIMENT.presets.values():
        assert len(SETTINGS(config)) == 3 * 3 * len(config.batches)


@pytest.mark.slow
def test_a_small_run_measures_everything_that_its_claims_need():
    result = experiments.run(study.EXPERIMENT, TINY, seeds=1, device="cpu", progress=False)
    assert len(result.runs) == len(SETTINGS(TINY))
    (runs,) = result.by_seed()
    claims = {claim.id: claim for claim in study.CLAIMS}
    assert all(math.isfinite(claim(runs)) for claim in study.CLAIMS)
    sure = {
        "edge-of-gradient-descent",
        "edge-of-sam",
        "edge-of-minibatches",
        "sam-is-stricter-than-sgd",
        "growth-full-batch",
        "simulation-is-the-library",
        "unnormalized-sam-explodes-there",
        "orbit-of-normalized-sam",
        "normalized-sam-leaves-for-good-beyond-2-over-lr",
    }
    for claim in (claims[name] for name in sure):
        assert claim.criterion.low <= claim(runs) <= claim.criterion.high, claim.id
    assert study.small_batches_are_stricter(runs) < 1
    with_fan = {run.settings["batch"] for run in result.select(study="edge") if "share" in run}
    assert with_fan == {1}


def made_up(gd=4.0, sam=1.0, batch=1.0, noise=1.0, rate=1.0, steep=1.0, typical=0.5, **other):
    """A result in which everything is as claimed, unless told otherwise."""
    runs = []
    for seed in range(3):
        for setting in SETTINGS(study.LAPTOP):
            full = setting["batch"] == study.LAPTOP.examples
            if setting["study"] == "normalized":
                columns = {
                    "early": [other.get("early", 2.0)],
                    "third": [4.0],
                    "last": [other.get("last", 4.0)],
                    "rate_unnormalized": [other.get("explodes", 0.2)],
                }
                if full:
                    columns |= {"orbit": [other.get("last", 4.0) * other.get("orbit", 1.0)]}
                    columns |= {"rate_outside": [other.get("outside", 0.3)], "rate_descent": [0.3]}
            else:
                top = EDGE * sam if setting["rho"] else gd
                theory = top * (1 if full else batch * {1: 0.2, 4: 0.6}[setting["batch"]])
                columns = {
                    "theory": [theory],
                    "simulated": [theory if full else noise * theory],
                    "typical": [theory * (1 if full else other.get("typical_edge", 1.05))],
                    "rate_theory": [0.4],
                    "rate_simulated": [0.4 * (steep if full else rate)],
                    "rate_typical": [0.4 * (1 if full else typical)],
                    "library_error": [other.get("error", 0.0)],
                }
                if setting["batch"] == 1:
                    columns |= {
                        "share": [0.0, other.get("share", 0.9)],
                        "mean_exact": [1.0, 1000.0],
                        "mean_sample": [1.0, other.get("sample", 20.0)],
                    }
            runs.append(run_of(setting, seed, **columns))
    return result_of(dataclasses.asdict(study.LAPTOP), *runs)


def verdicts(result):
    return {verdict.claim.id: verdict.verdict for verdict in study.EXPERIMENT.judge(result)}


def test_the_claims_hold_on_runs_made_to_hold_them():
    assert set(verdicts(made_up()).values()) == {"reproduced"}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    cases = {
        "edge-of-gradient-descent": ({"gd": 4.4}, 1.1),
        "edge-of-sam": ({"sam": 1.25}, 1.25),
        "edge-of-minibatches": ({"noise": 0.5}, 0.5),
        "sam-is-stricter-than-sgd": ({"gd": 4.0, "sam": 1.25}, 1.25 * EDGE / 4),
        "small-batches-are-stricter": ({"batch": 1.5}, 0.6 * 1.5),
        "growth-full-batch": ({"steep": 1.5}, 1.5),
        "growth-minibatches": ({"rate": 0.75}, 0.75),
        "typical-growth-is-slower": ({"typical": 0.75}, 0.75),
        "typical-edge-is-higher": ({"typical_edge": 1.25}, 1.25),
        "most-shrink-while-the-mean-explodes": ({"share": 0.7}, 0.7),
        "a-sample-misses-the-mean": ({"sample": 250.0}, 0.25),
        "simulation-is-the-library": ({"error": 1e-3}, 1e-3),
        "normalized-sam-leaves-at-once": ({"early": 2.0}, 0.5),
        "normalized-sam-stays-near": ({"last": 6.0}, 1.5),
        "unnormalized-sam-explodes-there": ({"explodes": 0.3}, 0.3),
        "orbit-of-normalized-sam": ({"orbit": 1.25}, 0.8),
        "normalized-sam-leaves-for-good-beyond-2-over-lr": ({"outside": 0.45}, 1.5),
    }
    runs = {
        name: (made_up(**change).by_seed()[0], value) for name, (change, value) in cases.items()
    }
    check_statistics(study.CLAIMS, runs)


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        ({"gd": 4.1}, {"edge-of-gradient-descent"}),
        ({"sam": 1.01}, {"edge-of-sam"}),
        ({"sam": 1.5}, {"edge-of-sam", "sam-is-stricter-than-sgd"}),
        ({"noise": 0.9}, {"edge-of-minibatches"}),
        ({"batch": 2.0}, {"small-batches-are-stricter"}),
        ({"steep": 1.01}, {"growth-full-batch"}),
        ({"rate": 0.9}, {"growth-minibatches"}),
        ({"typical": 0.95}, {"typical-growth-is-slower"}),
        ({"typical_edge": 0.95}, {"typical-edge-is-higher"}),
        ({"share": 0.4}, {"most-shrink-while-the-mean-explodes"}),
        ({"sample": 900.0}, {"a-sample-misses-the-mean"}),
        ({"error": 1e-3}, {"simulation-is-the-library"}),
        ({"early": 0.01}, {"normalized-sam-leaves-at-once"}),
        ({"last": 6.0}, {"normalized-sam-stays-near"}),
        ({"explodes": -0.1}, {"unnormalized-sam-explodes-there"}),
        ({"orbit": 1.01}, {"orbit-of-normalized-sam"}),
        ({"outside": 0.2}, {"normalized-sam-leaves-for-good-beyond-2-over-lr"}),
    ],
)
def test_each_claim_can_fail(change, falls):
    judged = verdicts(made_up(**change))
    assert falls == {name for name, verdict in judged.items() if verdict == "not reproduced"}
