"""The late phase: its runs against runs made one by one, and its claims against arithmetic."""

import copy
import dataclasses
import math
from functools import partial

import claims_contract
import numpy as np
import pytest
import torch
from claims_contract import result_of, seed_runs
from sam_problem import assert_equal, copies, length
from torch import nn

from sam_lab import Hessian, experiments
from sam_lab.experiments import Cell, NotApplicable
from sam_lab.experiments.late import late_images, late_mnist1d, late_phase, switching
from sam_lab.training import Phase, early, evaluate, late


def changed(config, *, recipe=None, **fields):
    """A config with something else, in its recipe too."""
    return dataclasses.replace(config, recipe=config.recipe.but(**(recipe or {})), **fields)


SMALL = {"train": 60, "test": 40, "epochs": 10, "batch": 20, "measured": 50, "tol": 1e-3}
TIMES = {"late": (0.9, 0.5, 0.75), "early": (0.5, 0.9, 0.25), "points": 3}
TINY = changed(
    late_mnist1d.LAPTOP,
    recipe={"hidden": (4,), **SMALL},
    rhos=(0.1, 0.2),
    trace_tol=0.5,
    **TIMES,
)
IMAGES = changed(
    late_images.LAPTOP, recipe={"data": "digits", "hidden": (4,), **SMALL}, trace_tol=0.5, **TIMES
)
# batch norm, augmentation, convolutions
WIDE = changed(
    late_images.DESKTOP,
    recipe={**SMALL, "data": "digits", "augment": True, "epochs": 2},
    late=(0.5,),
    early=(),
    points=3,
    trace_tol=2.0,
)
BASE = {"schedule": "constant", "rho": 0.1, "smoothing": 0.1, "carried": True}
OTHER = {"schedule": "steps", "rho": 0.2, "smoothing": 0.0, "carried": False}
# the epochs of SAM, a run each
SPANS = [(5, 10), (8, 10), (9, 10), (10, 10), (0, 2), (0, 5), (0, 9), (0, 10)]
COLUMNS = {
    *(
        "switched_on",
        "switched_off",
        "passes",
        "objective",
        "train_loss",
        "train_error",
        "test_loss",
    ),
    *("test_error", "sharpness_objective", "sharpness", "trace", "trace_stderr", "norm"),
}
WAY = {"distance", "barrier", "switch_objective", "switch_sharpness"}
CLAIMS = [*late_phase.CLAIMS, *late_phase.FACTOR_CLAIMS]


@pytest.mark.parametrize("shares", [(0.5, 0.51), (0.01,), (0.99,)])
def test_switches_that_fall_together_or_on_an_end_are_refused(shares):
    config = dataclasses.replace(TINY, early=shares)
    with pytest.raises(ValueError, match="early must be shares of the 10 epochs"):
        late_phase.run(config, Cell(BASE))


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *late_mnist1d.EXPERIMENT.presets.values(),
        *late_images.EXPERIMENT.presets.values(),
        late_phase.Config(TINY.recipe, rhos=(0.3, 0.1), carried=(False, True)),
    ],
)
def test_every_setting_differs_from_the_base_in_one_factor(config):
    base, *others = late_phase.settings(config)
    factors = {
        "schedule": config.schedules,
        "rho": config.rhos,
        "smoothing": config.smoothings,
        "carried": config.carried,
    }
    assert base == {name: values[0] for name, values in factors.items()}
    changes = [{name for name in base if other[name] != base[name]} for other in others]
    assert all(len(change) == 1 for change in changes)
    for name, values in factors.items():
        changed_to = [
            other[name] for other, change in zip(others, changes, strict=True) if name in change
        ]
        assert [base[name], *changed_to] == list(values)


@pytest.mark.parametrize("setting", [BASE, OTHER])
def test_a_setting_is_what_the_run_trains_with(setting):
    training, dataset = late_phase.prepare(TINY, Cell(setting, seed=3))
    assert training.phases == (Phase(0, 10),) and training.epoch == 0
    assert training.carry is setting["carried"] and training.seed == 3
    assert training.loss_fn.label_smoothing == setting["smoothing"]
    factors = [training.schedule(epoch / 10) for epoch in range(10)]
    steps = [1.0] * 3 + [0.2] * 3 + [0.04] * 4
    assert factors == (steps if setting["schedule"] == "steps" else [1.0] * 10)
    (group,) = training.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert len(training.x) == 60 and len(dataset.x_test) == 40 and training.augment is None
    assert late_phase.prepare(WIDE, Cell(setting))[0].augment is not None


def test_settings_of_one_seed_share_data_and_initial_weights_and_seeds_do_not():
    (one, here), (two, there), (three, elsewhere) = (
        late_phase.prepare(TINY, Cell(setting, seed))
        for setting, seed in ((BASE, 0), (OTHER, 0), (BASE, 1))
    )
    assert_equal(copies(one.model.parameters()), copies(two.model.parameters()))
    assert_equal([here.x, here.x_test], [there.x, there.x_test])
    assert not torch.equal(one.model[1].weight, three.model[1].weight)
    assert not torch.equal(here.x, elsewhere.x)


@pytest.mark.parametrize(
    ("task", "where"), [(late_images, {"data", "patches"}), (late_mnist1d, {"nowhere"})]
)
def test_images_are_standardized_and_sequences_taken_as_they_are(task, where):
    presets = task.EXPERIMENT.presets.values()
    assert {preset.recipe.standardize for preset in presets} == where


def test_unknown_schedules_and_too_many_examples_are_refused():
    with pytest.raises(ValueError, match="one of constant, steps, drop, cosine, got 'warm'"):
        late_phase.prepare(TINY, Cell({**BASE, "schedule": "warm"}))
    with pytest.raises(ValueError, match="train"):
        late_phase.prepare(changed(IMAGES, recipe={"train": 100_000}), Cell(BASE))


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (late_mnist1d, {"laptop": 15_210, "paper": 276_010}),
        (
            late_images,
            {"laptop": 199_210, "desktop": 77_850, "fast": 1_160_970, "paper": 10_961_370},
        ),
    ],
    ids=["mnist1d", "images"],
)
def test_the_presets_are_the_networks_they_name(task, parameters):
    """With few examples; in CIFAR-10's place photographs, which are there and have its shape."""
    assert experiments.get(task.EXPERIMENT.name) is task.EXPERIMENT
    for scale, count in parameters.items():
        preset = task.EXPERIMENT.presets[scale]
        name = "photos" if preset.recipe.data == "cifar10" else preset.recipe.data
        few = changed(preset, recipe={"data": name, "train": 20, "test": 20})
        training, dataset = late_phase.prepare(few, Cell(late_phase.settings(few)[0]))
        assert sum(p.numel() for p in training.model.parameters()) == count
        assert dataset.classes == 10 and training.epochs == preset.recipe.epochs
        assert {0.5, late_phase.LATE} <= {*preset.late} & {*preset.early}
        named = ("steps",) if scale == "fast" else ("constant", "steps")
        assert preset.schedules[:2] == named
    assert set(parameters) == set(task.EXPERIMENT.presets)


# --- the runs, one by one -------------------------------------------------------------------------


def direct(config, setting, seed, span):
    """The run with SAM in these epochs, from the start, and the weights at its switch."""
    training, dataset = late_phase.prepare(config, Cell(setting, seed))
    begin, end = span
    epochs, rho = config.recipe.epochs, setting["rho"]
    phases = late(begin, epochs, rho=rho) if end == epochs else early(end, epochs, rho=rho)
    training = training.branch(phases)
    switch = training.run(end if begin == 0 else begin).branch(phases)
    return training.run(), switch, dataset


def weights(training):
    return [p.detach() for p in training.model.parameters()]


def hessian(training, loss_fn=None):
    """Over the first 50 examples, in evaluation mode."""
    model, f = training.model.eval(), loss_fn or training.loss_fn
    return Hessian(lambda: f(model(training.x[:50]), training.y[:50]), list(model.parameters()))


@pytest.fixture(scope="module", params=[BASE, OTHER], ids=["base", "other"])
def runs(request):
    """Columns of a setting, and its runs made one by one, by their epochs of SAM."""
    columns = late_phase.run(TINY, Cell(request.param, 10))
    starts, stops = (map(int, columns[name]) for name in ("switched_on", "switched_off"))
    spans = list(zip(starts, stops, strict=True))
    return columns, {span: direct(TINY, request.param, 10, span) for span in spans}


def test_runs_that_share_their_trunks_are_those_made_one_by_one(runs):
    columns, alone = runs
    assert list(alone) == SPANS and set(columns) == COLUMNS | WAY
    for i, (training, _, dataset) in enumerate(alone.values()):
        row = {name: values[i] for name, values in columns.items()}
        for part, loss_fn, x, y in (
            ("objective", training.loss_fn, dataset.x, dataset.y),
            ("train_loss", nn.functional.cross_entropy, dataset.x, dataset.y),
            ("test_loss", nn.functional.cross_entropy, dataset.x_test, dataset.y_test),
        ):
            assert row[part] == evaluate(training.model, x, y, loss_fn)[0]
        assert row["train_error"] == evaluate(training.model, dataset.x, dataset.y)[1]
        assert row["test_error"] == evaluate(training.model, dataset.x_test, dataset.y_test)[1]
        assert row["norm"] == pytest.approx(length(weights(training)), rel=1e-6)
        sam_epochs = row["switched_off"] - row["switched_on"]
        assert row["passes"] == training.history[-1]["passes"] == 3 * (10 + sam_epochs)


def test_curvature_is_that_of_the_dense_hessians_over_the_measured_examples(runs):
    columns, alone = runs
    for i in (1, 2):
        dense = {}
        for name, loss_fn in (
            ("sharpness", nn.functional.cross_entropy),
            ("sharpness_objective", None),
        ):
            H = hessian(alone[SPANS[i]][0], loss_fn)
            dense[name] = H @ torch.eye(H.shape[0])
            top = torch.linalg.eigvalsh(dense[name].double())[-1]
            assert columns[name][i] == pytest.approx(top.item(), rel=2e-3)
        trace = dense["sharpness"].trace().item()
        assert abs(columns["trace"][i] - trace) < 4 * columns["trace_stderr"][i]
        assert columns["trace_stderr"][i] <= TINY.trace_tol * columns["trace"][i]


def test_the_way_is_that_from_the_switch_to_the_end(runs):
    columns, alone = runs
    for i, (training, switch, dataset) in enumerate(alone.values()):
        row = {name: columns[name][i] for name in WAY}
        if SPANS[i] in ((10, 10), (0, 10)):
            assert all(math.isnan(value) for value in row.values())
            continue
        assert switch.epoch == SPANS[i][0] or switch.epoch == SPANS[i][1]
        before, after = weights(switch), weights(training)
        apart = [b - a for a, b in zip(before, after, strict=True)]
        assert row["distance"] == pytest.approx(length(apart), rel=1e-5)
        losses = []
        for alpha in (0.0, 0.5, 1.0):
            between = copy.deepcopy(training.model)
            with torch.no_grad():
                for p, a, b in zip(between.parameters(), before, after, strict=True):
                    p.copy_((1 - alpha) * a + alpha * b)
            losses.append(evaluate(between, dataset.x[:50], dataset.y[:50], training.loss_fn)[0])
        assert row["switch_objective"] == pytest.approx(losses[0], rel=1e-5)
        barrier = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
        assert row["barrier"] == pytest.approx(barrier, abs=1e-6)
        top = hessian(switch).top(tol=1e-4).values[0].item()
        assert row["switch_sharpness"] == pytest.approx(top, rel=2e-3)


@pytest.mark.slow
def test_a_network_with_batch_norm_is_measured_in_evaluation_mode():
    columns = late_phase.run(WIDE, Cell(BASE, 10))
    assert [*zip(columns["switched_on"], columns["switched_off"], strict=True)] == [
        (1, 2),
        (2, 2),
        (0, 2),
    ]
    assert all(np.isfinite(columns[name]).all() for name in COLUMNS)
    assert columns["passes"] == [9, 6, 12]
    training, switch, dataset = direct(WIDE, BASE, 10, (1, 2))
    assert (
        columns["objective"][0]
        == evaluate(training.model, dataset.x, dataset.y, training.loss_fn)[0]
    )
    x, y = dataset.x[:50], dataset.y[:50]
    at_switch = evaluate(switch.model, x, y, training.loss_fn)[0]
    assert columns["switch_objective"][0] == pytest.approx(at_switch, rel=1e-5)
    top = hessian(training).top(tol=1e-3).values[0].item()
    assert columns["sharpness_objective"][0] == pytest.approx(top, rel=1e-2)


def test_progress_counts_the_epochs_and_ends_where_it_said():
    seen = []
    late_phase.run(
        changed(TINY, recipe={"epochs": 4, "tol": 0.5}, late=(0.5,), early=(0.75,), trace_tol=9.0),
        Cell(BASE, 10, tick=lambda done, total: seen.append((done, total))),
    )
    assert seen == [(done, 4 + 4 + 2 + 1) for done in range(1, 12)]


# --- end to end -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("task", "config"), [(late_mnist1d, TINY), (late_images, IMAGES)])
def test_a_small_grid_gives_every_claim_a_number(task, config):
    config = changed(config, recipe={"tol": 0.1}, trace_tol=1.0)
    result = experiments.run(task.EXPERIMENT, config, seeds=[10], device="cpu", progress=False)
    assert len(result.runs) == len(late_phase.settings(config))
    for run in result.runs:
        assert all(np.isfinite(run[name]).all() for name in COLUMNS)
        switches = (run["switched_off"] - run["switched_on"]) % 10 != 0
        assert all((np.isfinite(run[name]) == switches).all() for name in WAY)
        assert (run["passes"] == 3 * (10 + run["switched_off"] - run["switched_on"])).all()
    for verdict in experiments.judge(result):
        if "than the margin itself" not in verdict.reason:  # that little may be all
            assert len(verdict.values) == 1 and np.isfinite(verdict.values).all(), verdict.reason


# --- the claims, by hand --------------------------------------------------------------------------

NAMES = [
    *("late 0.5", "late 0.75", "late 0.9", "sgd"),
    *("early 0.25", "early 0.5", "early 0.9", "full"),
]


def run_of(settings=BASE, seed=0, **columns):
    """A run of ten epochs whose columns are given by the names of its rows."""
    rows = dict(
        zip(("switched_on", "switched_off"), map(list, zip(*SPANS, strict=True)), strict=True)
    )
    for name, values in columns.items():
        rows[name] = [values.get(row, math.nan) for row in NAMES]
    return claims_contract.run_of(settings, seed, **rows)


def after(time):
    """The sharpness of late SAM after some time, at the constant rate: 4 at 0.05, 2 at 0.25."""
    return 4.0 * (0.05 / time) ** (math.log(2) / math.log(5))


SHARPNESS = {
    **{"sgd": 16.0, "full": 1.0, "late 0.5": 2.0, "late 0.75": after(0.1), "late 0.9": 4.0},
    **{"early 0.25": 6.0, "early 0.5": 4.0, "early 0.9": 8.0},
}


CONFIG = {"recipe": {"lr": 0.05}}
RUNS = [
    run_of(
        sharpness_objective=SHARPNESS,
        trace={"sgd": 100.0, "full": 10.0, "late 0.9": 10**1.25},
        test_error={
            **{"sgd": 0.30, "full": 0.25, "late 0.9": 0.27, "late 0.75": 0.27},
            **{"late 0.5": 0.26, "early 0.25": 0.29, "early 0.5": 0.28, "early 0.9": 0.26},
        },
        barrier={"late 0.9": 0.02},
        switch_objective={"late 0.9": 0.5},
    ),
    run_of(
        {**BASE, "schedule": "steps"},
        sharpness_objective={**SHARPNESS, "late 0.9": 8.0, "full": 2.0},
        trace={"sgd": 100.0, "full": 1.0, "late 0.9": 10**1.5},
        test_error={
            **{"sgd": 0.41, "full": 0.39, "late 0.9": 0.38, "late 0.75": 0.375},
            **{"late 0.5": 0.37, "early 0.25": 0.395, "early 0.5": 0.36, "early 0.9": 0.392},
        },
        barrier={"late 0.9": 0.04},
        switch_objective={"late 0.9": 0.5},
    ),
    run_of(
        {**BASE, "schedule": "drop"},
        # 1.1 times the curve of the constant rate after one epoch of it and one at a tenth
        sharpness_objective={
            **SHARPNESS,
            **{"late 0.5": after(0.205), "late 0.75": 1.1 * after(0.055)},
        },
        test_error={"sgd": 0.30, "late 0.75": 0.28, "early 0.25": 0.29},
    ),
    *(
        run_of({**BASE, **change}, sharpness_objective={**SHARPNESS, **values})
        for change, values in (
            ({"rho": 0.05}, {"late 0.9": 6.0}),
            ({"rho": 0.2}, {"late 0.9": 3.0}),
            ({"carried": False}, {"late 0.9": 5.0}),
            ({"smoothing": 0.0}, {"sgd": 0.5, "late 0.9": 2.0}),
        )
    ),
]
EXPECTED = {
    "sam-is-flatter": 1 / 16,
    "late-sam-is-as-flat": 0.5,  # 16 to 4 to 1
    "late-sam-halfway": 0.5,
    "late-sam-is-as-flat-in-trace": 0.75,
    "sam-generalizes-better": 5.0,
    "late-sam-generalizes-better": 3.0,
    "late-sam-generalizes-as-well": 2.0,
    "late-half-counts-more": 0.5,
    "late-half-generalizes-better": 2.0,
    "early-sam-is-forgotten": 0.25,  # 16 to 8 to 1
    "no-barrier": 0.04,
    "late-sam-saves-half": 3 / 5,
    "early-sam-is-forgotten-in-test-error": 4 / 5,
    "an-earlier-switch-is-flatter": 1.0,
    "an-earlier-switch-generalizes-better": 0.95,  # of ten pairs one is a tie
    "early-half-ends-no-flatter": 0.25,
    "early-half-saves": 2.0,
    "early-half-ends-no-flatter-in-steps": 0.25,
    "early-half-saves-in-steps": 5.0,
    "no-barrier-in-steps": 0.08,
    # of 28 pairs; two of them are runs with SAM in as many epochs
    "more-epochs-generalize-better": 23 / 28,
    "more-epochs-are-flatter": 19.5 / 28,
    "more-epochs-generalize-better-in-steps": 18 / 28,
    "more-epochs-are-flatter-in-steps": 21 / 28,
    "sam-is-flatter-in-steps": 1 / 8,
    "late-sam-is-as-flat-in-steps": 1 / 3,  # 16 to 8 to 2
    "late-sam-is-as-flat-in-trace-in-steps": 0.25,
    "sam-generalizes-better-in-steps": 2.0,
    "late-sam-generalizes-as-well-in-steps": -1.0,
    "late-sam-saves-half-in-steps": 1.5,
    "early-sam-is-forgotten-in-test-error-in-steps": 0.9,
    "an-earlier-switch-is-flatter-in-steps": 0.95,  # of ten pairs one is a tie
    "an-earlier-switch-generalizes-better-in-steps": 0.7,  # the end is behind the three before
    "late-sam-generalizes-better-in-steps": 3.0,
    "late-half-counts-more-in-steps": 0.5,
    "late-half-generalizes-better-in-steps": -1.0,
    "early-sam-is-forgotten-in-steps": 1 / 3,
    "learning-rate-is-the-clock": 1.1,
    "late-sam-before-a-drop": math.log(16 / (1.1 * after(0.055))) / math.log(16),
    "late-sam-before-a-drop-generalizes": 2.0,
    "early-sam-before-a-drop-generalizes": 1.0,
    "learning-rate-decides": 0.5,  # 16 to 8, where it is 16 to 4
    "momentum-does-not-decide": 4 / 5,
    "radius-decides": 3 / 6,
    "plain-loss-misleads": 4.0,
}


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    runs = seed_runs(CONFIG, *RUNS)
    claims_contract.check_statistics(
        CLAIMS, {name: (runs, expected) for name, expected in EXPECTED.items()}
    )


def test_claims_on_schedules_and_switches_that_a_scale_lacks_do_not_apply():
    whole = dataclasses.replace(RUNS[0], settings={**BASE, "schedule": "cosine"})
    there = np.array([name != "late 0.5" for name in NAMES])
    columns = {name: whole[name][there].tolist() for name in whole.columns}
    runs = [dataclasses.replace(whole, seed=seed, columns=columns) for seed in range(3)]
    verdicts = {
        claim.id: claim.judge(result_of(CONFIG, *runs)) for claim in late_images.EXPERIMENT.claims
    }
    assert not any("failed" in verdict.reason for verdict in verdicts.values())
    missing = {"learning-rate-decides", "late-half-counts-more", "late-half-generalizes-better"}
    for name, verdict in verdicts.items():
        lacks = name in missing or name.endswith("-in-steps")
        assert (verdict.verdict == "does not apply") == lacks, (name, verdict.reason)
    assert "'constant'" in verdicts["learning-rate-decides"].reason
    assert "schedule=steps" in verdicts["sam-is-flatter-in-steps"].reason


@pytest.mark.parametrize(("saved", "applies"), [(0.9, False), (1.1, True), (-2.0, False)])
def test_as_well_as_sam_is_asked_where_sam_saves_more_than_the_margin(saved, applies):
    errors = {"sgd": 0.30, "full": 0.30 - saved / 100, "late 0.9": 0.30}
    result = result_of(CONFIG, *(run_of(seed=seed, test_error=errors) for seed in range(3)))
    verdict = late_phase.late_sam_generalizes_as_well.judge(result)
    if applies:
        assert verdict.mean == pytest.approx(saved) and verdict.verdict == "not reproduced"
    else:
        assert verdict.verdict == "does not apply" and "than the margin itself" in verdict.reason


def test_where_all_runs_fall_in_steps_the_claims_that_say_so_have_them():
    """As at the scale "fast"."""
    stepped = next(run for run in RUNS if run.settings == {**BASE, "schedule": "steps"})
    result = result_of(CONFIG, *(dataclasses.replace(stepped, seed=seed) for seed in range(3)))
    verdicts = {claim.id: claim.judge(result) for claim in late_phase.CLAIMS}
    for name, verdict in verdicts.items():
        if name.endswith("-in-steps"):
            assert verdict.values[0] == verdict.values[2] and verdict.verdict != "does not apply"
        else:
            assert verdict.verdict == "does not apply", name
    assert "falls in steps in all runs" in verdicts["sam-is-flatter"].reason


def test_a_claim_has_one_number_from_each_seed():
    twice = [RUNS[0], run_of(seed=7, sharpness_objective={**SHARPNESS, "full": 4.0})]
    verdict = late_phase.sam_is_flatter.judge(result_of(CONFIG, *twice))
    assert verdict.values == (1 / 16, 1 / 4)


def test_claims_in_steps_were_set_after_the_first_data_and_three_of_them_are_headlines():
    in_steps = [claim for claim in CLAIMS if claim.statement.startswith(late_phase.IN_STEPS)]
    assert len(in_steps) == 18
    for claim in in_steps:
        assert claim.id.endswith("-in-steps") and claim.set_after
    assert list(dict.fromkeys(claim.id for claim in in_steps if claim.headline)) == [
        "late-sam-saves-half-in-steps",
        "early-sam-is-forgotten-in-test-error-in-steps",
        "more-epochs-generalize-better-in-steps",
    ]


@pytest.mark.parametrize(
    ("method", "share", "value"),
    [
        ("sgd", None, 16.0),
        ("full", None, 1.0),
        ("late", 0.5, 2.0),
        ("late", 0.9, 4.0),
        ("early", 0.5, 4.0),
        ("early", 0.9, 8.0),
        ("late", 0.93, 4.0),  # of ten epochs it is the ninth, as where the grid is made
    ],
)
def test_the_end_of_a_run_is_found_by_its_epochs_of_sam(method, share, value):
    assert switching.ends(RUNS[0], "sharpness_objective", method, share) == value


def test_reached_is_0_for_sgd_1_for_sam_and_more_beyond():
    run = run_of(
        sharpness_objective={"sgd": 16.0, "full": 4.0, "late 0.5": 2.0, "early 0.5": 32.0},
        trace={"sgd": 8.0, "full": 2.0, "late 0.5": 4.0},
    )
    way = partial(switching.reached, run, "sharpness_objective", log=True)
    assert way("sgd", 0.5).quotient == 0 and way("full", 0.5).quotient == 1
    assert way("late", 0.5) == pytest.approx((math.log(8), math.log(4)))
    assert way("late", 0.5).quotient == pytest.approx(1.5)
    assert way("early", 0.5).quotient == pytest.approx(-0.5)
    assert switching.reached(run, "trace", "late", 0.5, log=True).quotient == pytest.approx(0.5)
    assert switching.reached(run, "trace", "late", 0.5) == (4, 6)


def test_a_share_of_a_way_that_is_not_there_does_not_apply():
    ends = [{**SHARPNESS, "full": full} for full in (10.0, 20.0, 18.0)]
    runs = [run_of(seed=seed, sharpness_objective=each) for seed, each in enumerate(ends)]
    verdict = late_phase.late_sam_is_as_flat.judge(result_of(CONFIG, *runs))
    assert verdict.explained == "does not apply (undefined: SAM was no flatter than SGD here)"


def test_a_run_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(
        NotApplicable, match=r"no run with late at 0.7 of the epochs; the phases .* are 5 to 10, "
    ):
        switching.ends(RUNS[0], "trace", "late", 0.7)
    with pytest.raises(ValueError, match="method must be one of sgd, .*early, got 'adam'"):
        switching.ends(RUNS[0], "trace", "adam")


def test_shares_ascend_from_sgd_to_sam_and_values_go_with_them():
    result, name = result_of(CONFIG, *RUNS), "sharpness_objective"
    shares, late = switching.against_share(result, name, "late")
    assert shares.tolist() == [0, 0.1, 0.2, 0.5, 1]
    assert late.tolist() == [pytest.approx([16, 4, after(0.1), 2, 1], rel=1e-5)]  # as stored
    shares, early = switching.against_share(result, name, "early", rho=0.2)
    assert shares.tolist() == [0, 0.2, 0.5, 0.9, 1]
    assert early[0, [0, 2, 3, 4]].tolist() == [16, 4, 8, 1]


def test_the_learning_rate_is_summed_over_the_epochs_of_sam():
    for schedule, sums in {
        "constant": [0.05, 0.1, 0.25],
        "steps": [0.002, 0.004, 0.018],
        "drop": [0.005, 0.055, 0.205],
    }.items():
        summed, fallen = late_phase.against_summed_lr(result_of(CONFIG, *RUNS), schedule=schedule)
        assert summed == pytest.approx(sums)
        run = seed_runs(CONFIG, *RUNS).base(schedule=schedule)
        late = [run["sharpness_objective"][NAMES.index(f"late {at}")] for at in (0.9, 0.75, 0.5)]
        assert fallen.tolist() == [pytest.approx([sharpness / 16 for sharpness in late])]
