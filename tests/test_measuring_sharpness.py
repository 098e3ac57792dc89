"""The chapter on measuring: its helpers against closed forms, its studies on a small network."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import Hessian, experiments, models
from sam_lab.experiments import Cell
from sam_lab.experiments.edge import measuring_sharpness as study
from sam_lab.training import descend, squared_error

SMALL = dataclasses.replace(
    study.Config(),
    train=40,
    hidden=(6,),
    checkpoints=(3, 6),
    starts=2,
    parts=(1, 2, 4),
    relu_steps=5,
    factors=(0.25, 1.0, 4.0),
    classes=(3,),
    outlier_steps=5,
    probes=16,
    trials=20,
)


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("mlxtend")
    return experiments.run(study.EXPERIMENT, SMALL, seeds=[1], device="cpu", progress=False)


@pytest.fixture(scope="module")
def runs(result):
    return result.by_seed()[0]


# --- helpers -------------------------------------------------------------------------------------


def test_power_iteration_follows_the_closed_form_of_its_estimate():
    values = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    steps = itertools.islice(study.power_iteration(values.diag(), start), 6)
    for k, (theta, residual) in enumerate(steps):
        weights = start**2 * values ** (2 * k)
        weights = weights / weights.sum()
        expected = float((weights * values).sum())
        assert theta == pytest.approx(expected, rel=1e-12)
        spread = float((weights * (values - expected) ** 2).sum()) ** 0.5
        assert residual == pytest.approx(spread, rel=1e-9)


def test_the_change_of_power_iteration_is_the_squared_residual_of_the_chapter():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    matrix = square + square.T + 10 * torch.eye(8)
    v = torch.randn(8, dtype=torch.float64, generator=generator)
    (theta, residual), (after, _) = itertools.islice(study.power_iteration(matrix, v), 2)
    v = v / v.norm()
    r = matrix @ v - theta * v
    rho = float(r @ matrix @ r / (r @ r))
    expected = (theta + rho) * residual**2 / (theta**2 + residual**2)
    assert after - theta == pytest.approx(expected, rel=1e-9)


def test_power_iteration_stopped_by_its_change_says_when_its_residual_would_have_been_enough():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([10.0, 9.0, 1.0], dtype=torch.float64)
    H = Hessian(lambda: 0.5 * (values * w**2).sum(), [w])
    stop = study.stopped(H, start=0, change=1e-3, tol=1e-4)
    assert stop["change"] < 1e-3
    assert stop["residual"] > 1e-4
    assert stop["hvps_to_tol"] > stop["hvps"]
    steps = study.power_iteration(H, study.start_vector(H, 0))
    path = list(itertools.islice(steps, int(stop["hvps_to_tol"])))
    assert path[-1][1] <= 1e-4 * path[-1][0]
    assert path[-2][1] > 1e-4 * path[-2][0]
    assert path[int(stop["hvps"]) - 1][0] == pytest.approx(stop["theta"])


def test_power_iteration_that_never_settles_ends_all_the_same():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    H = Hessian(lambda: 0.5 * (w[0] ** 2 - w[1] ** 2), [w])  # 1 and -1: equal in size
    stop = study.stopped(H, start=0, change=1e-300, tol=1e-6)
    assert stop["hvps_to_tol"] == 1000


def test_nested_batches_are_partitions_and_each_cut_keeps_the_ones_before():
    levels = study.nested_batches(30, (1, 2, 6), seed=0)
    assert [len(level) for level in levels] == [1, 2, 6]
    for level in levels:
        assert sorted(torch.cat(level).tolist()) == list(range(30))
    for coarse, fine in itertools.pairwise(levels):
        for i, part in enumerate(coarse):
            share = len(fine) // len(coarse)
            torch.testing.assert_close(torch.cat(fine[i * share : (i + 1) * share]), part)


def test_nested_batches_depend_on_the_seed_alone():
    first, again, other = (study.nested_batches(20, (1,), seed)[0][0] for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("parts", [(1, 2, 3), (1, 64)])
def test_nested_batches_refuse_cuts_that_are_not_nested_or_too_many(parts):
    with pytest.raises(ValueError, match="parts must divide"):
        study.nested_batches(32, parts, seed=0)


@pytest.mark.parametrize("factor", [0.1, 3.0, 16.0])
def test_rescaling_keeps_the_function_and_scales_the_blocks_of_the_hessian(factor):
    model = models.mlp((5, 7, 3), "relu", seed=0, dtype=torch.float64)
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 3
    scaled = study.rescale(model, factor)
    torch.testing.assert_close(scaled(x), model(x), rtol=1e-12, atol=1e-12)

    def dense(net, name):
        params = dict(net.named_parameters())
        H = Hessian(lambda: squared_error(net(x), y), [params[name]])
        return H @ torch.eye(H.shape[0], dtype=torch.float64)

    first, last = "1.weight", "3.weight"
    torch.testing.assert_close(dense(scaled, first), dense(model, first) / factor**2)
    torch.testing.assert_close(dense(scaled, last), dense(model, last) * factor**2)


def test_rescaling_leaves_the_original_alone_and_refuses_a_factor_of_zero():
    model = models.mlp((4, 3, 2), "relu", seed=0)
    before = [p.clone() for p in model.parameters()]
    study.rescale(model, 2.0)
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="factor must be above 0, got 0"):
        study.rescale(model, 0.0)


def test_the_gap_is_where_the_values_fall_most():
    assert study.gap(torch.tensor([8.0, 7.0, 2.0, 1.9])) == (2, 3.5)


def test_the_mean_jacobian_bounds_the_outliers_of_a_linear_model_from_below():
    model = models.mlp((6, 3), seed=0, dtype=torch.float64)
    x = 1 + torch.rand(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    jacobian = study.mean_jacobian(model, x)
    mean = torch.cat([x.mean(0), torch.ones(1, dtype=torch.float64)])
    expected = torch.full((3,), float(mean @ mean), dtype=torch.float64)
    parts = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    torch.testing.assert_close(parts, expected)
    H = Hessian(lambda: squared_error(model(x), y), model.parameters())
    values = torch.linalg.eigvalsh(H @ torch.eye(H.shape[0], dtype=torch.float64)).flip(0)
    assert bool((values[:3] >= parts - 1e-9).all())


# --- the studies, small --------------------------------------------------------------------------


def test_there_are_five_studies_of_one_run_each(runs):
    names = ["edge", "batches", "trace", "rescaling", "outliers"]
    assert [run.settings["study"] for run in runs.runs] == names


def test_each_measurement_at_the_edge_ended_by_its_own_rule(runs):
    run = runs.one(study="edge")
    assert len(run["step"]) == len(SMALL.checkpoints) * SMALL.starts
    assert np.all(run["lambda1"] >= run["lambda2"])
    assert np.all(run["power_change"] < SMALL.change)
    assert np.all(run["lanczos_residual"] <= SMALL.tol * (1 + 1e-5))
    assert np.all(run["power_hvps_to_tol"] < 1000)


def test_the_full_batch_is_the_first_level_and_jensens_inequality_holds(runs):
    run = runs.one(study="batches")
    assert run["low"][0] == run["mean"][0] == run["high"][0]
    assert np.all(np.diff(run["mean"]) > -1e-5)
    assert np.all(run["size"] == SMALL.train / np.array(SMALL.parts))


def test_rescaled_sharpness_lies_between_its_blocks_and_their_sum_and_outputs_stay(runs):
    run = runs.one(study="rescaling")
    blocks = np.maximum(run["first"], run["last"])
    assert np.all(run["sharpness"] >= blocks * (1 - 1e-3))
    assert np.all(run["moved"] <= 1e-6)
    np.testing.assert_allclose(run["first"] * run["factor"] ** 2, run["first"][1], rtol=1e-2)
    np.testing.assert_allclose(run["last"] / run["factor"] ** 2, run["last"][1], rtol=1e-2)


def test_the_spread_of_the_trace_is_the_variance_formula(runs):
    run = runs.one(study="trace")
    # the standard errors of single trials scatter about spread / sqrt(probes)
    expected = run.value("spread") / np.sqrt(SMALL.probes)
    assert np.median(run["stderr"]) == pytest.approx(expected, rel=0.25)
    assert abs(run["estimate"].mean() - run.value("exact")) < 5 * expected / np.sqrt(SMALL.trials)


def test_the_same_seed_gives_the_same_columns(runs):
    setting = {"study": "batches"}
    again = study.batches(SMALL, Cell(setting, seed=1))
    assert run_of(setting, 1, **again) == runs.one(**setting)


@pytest.mark.slow
def test_the_paper_preset_measures_cifar(real_data):
    few = dataclasses.replace(
        study.PRESETS["paper"], train=20, probes=4, trials=3, relu_steps=2, factors=(1.0, 2.0)
    )
    x, y = study.images(few)
    assert x.shape == (20, 3, 32, 32)
    assert float(x.std()) == pytest.approx(1, abs=1e-4)
    assert y.bincount().tolist() == [2] * 10
    columns = study.rescaling(few, Cell({"study": "rescaling"}))
    assert max(columns["moved"]) <= 1e-6


# --- the claims ----------------------------------------------------------------------------------


def test_every_claim_can_be_read_off_the_runs(runs):
    assert all(np.isfinite(claim(runs)) for claim in study.CLAIMS)


MADE = seed_runs(
    {},
    run_of(
        {"study": "edge"},
        power_error=[0.01, 0.02, 0.06],
        patient_error=[0.001, 0.02, 0.005],
        power_residual=[0.02, 0.03, 0.05],
        power_change=[0.0008, 0.0008, 0.0008],
        power_hvps_to_tol=[30, 60, 20],
        lanczos_error=[0.001, 0.02, 0.03],
        lanczos_hvps=[10, 10, 10],
    ),
    run_of({"study": "batches"}, size=[1000, 500, 120, 25], mean=[2.0, 3.0, 2.4, 6.0]),
    run_of(
        {"study": "trace"}, probes=32, exact=1.0, estimate=[1.0, 1.3, 0.9, 0.0], stderr=[0.1] * 4
    ),
    run_of({"study": "rescaling"}, sharpness=[9.0, 3.0, 60.0], moved=[0.0, 0.1, 0.0]),
    run_of(
        {"study": "outliers"},
        classes=[5, 10],
        relu_place=[5, 9],
        start_place=[5, 2],
        relu_mean=[0.9, 1.0],
        tanh_step=[1.1, 1.5],
    ),
)
EXPECTED = {
    "change-is-no-certificate": 20,
    "patience-is-no-certificate": 2 / 3,
    "change-is-a-residual": 1.5,
    "residual-certifies": 1 / 3,
    "two-starts-certify": 1,  # of the only pair
    "lanczos-is-cheaper": 3,
    "small-batches-are-sharper": 1.2,
    "sharper-at-every-cut": 0.8,
    "trace-interval-covers": 0.5,  # t is 2.04 with 31 degrees of freedom
    "rescaling-changes-sharpness": 20,
    "rescaling-keeps-the-function": 0.1,
    "as-many-outliers-as-classes": 0.95,
    "outliers-need-training": 0.5,
    "outliers-are-a-mean": 0.95,
    "outliers-in-tanh": 1.3,
}


def test_every_claims_statistic_is_the_arithmetic_of_its_statement():
    check_statistics(study.CLAIMS, {name: (MADE, value) for name, value in EXPECTED.items()})


@pytest.mark.parametrize(
    ("claim", "name", "columns", "verdict"),
    [
        ("change-is-no-certificate", "edge", {"power_error": [0.01, 0.02, 0.03]}, "reproduced"),
        ("change-is-no-certificate", "edge", {"power_error": [1e-5, 1e-4, 2e-4]}, "not reproduced"),
        ("residual-certifies", "edge", {"lanczos_error": [0.001, 0.002]}, "reproduced"),
        ("residual-certifies", "edge", {"lanczos_error": [0.001, 0.02]}, "not reproduced"),
        ("two-starts-certify", "edge", {"lanczos_error": [0.001, 0.02, 0.03, 0.0]}, "reproduced"),
        ("two-starts-certify", "edge", {"lanczos_error": [0.02, 0.02, 0.0]}, "not reproduced"),
        (
            "trace-interval-covers",
            "trace",
            {"probes": [32], "exact": [1.0], "estimate": [1.0, 9.0], "stderr": [0.1, 0.1]},
            "not reproduced",
        ),
        ("rescaling-changes-sharpness", "rescaling", {"sharpness": [3.0, 60.0]}, "reproduced"),
        ("rescaling-keeps-the-function", "rescaling", {"moved": [0.0, 0.1]}, "not reproduced"),
        ("sharper-at-every-cut", "batches", {"mean": [3.0, 2.0, 4.0]}, "not reproduced"),
        (
            "as-many-outliers-as-classes",
            "outliers",
            {"relu_place": [5, 10], "classes": [5, 10]},
            "reproduced",
        ),
    ],
)
def test_the_verdict_of_a_claim_follows_from_its_columns(claim, name, columns, verdict):
    chosen = next(one for one in study.CLAIMS if one.id == claim)
    runs = [run_of({"study": name}, seed, **columns) for seed in range(3)]
    assert chosen.judge(result_of({}, *runs)).verdict == verdict


def test_spectra_follow_training_and_their_outliers_lie_above_the_mean_jacobian():
    pytest.importorskip("mlxtend")
    spectra = study.spectra(SMALL, "relu", (0, 5), seed=0)
    assert list(spectra) == [0, 5]
    for spectrum in spectra.values():
        assert spectrum.top.shape == (15,)
        assert bool((spectrum.top.diff() <= 0).all())
        assert bool((spectrum.density.density >= 0).all())
    x, y = study.images(SMALL, seed=0)
    model = models.mlp((784, 6, 10), "relu", seed=0)
    params = list(model.parameters())
    descend(lambda: squared_error(model(x), y), params, SMALL.relu_lr, 5)
    jacobian = study.mean_jacobian(model, x)
    torch.testing.assert_close(
        spectra[5].mean, torch.linalg.eigvalsh(jacobian @ jacobian.T).double(), rtol=1e-3, atol=1e-4
    )
