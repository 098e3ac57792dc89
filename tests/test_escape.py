"""The escape: closed forms on a quadratic, the start, the controls, and a small run end to end."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs
from torch.nn import functional as F

from sam_lab import SAM, Hessian, data, experiments
from sam_lab.experiments import Cell, Run
from sam_lab.experiments.lab.experiment import config_dict
from sam_lab.experiments.late import escape
from sam_lab.experiments.sam.quadratics import quadratic
from sam_lab.perturbations import sam, unnormalized
from sam_lab.stability import growth, sam_edge
from sam_lab.training import squared_error

LR, TOP = 0.18, 10.0
CONFIG = {"lr": 0.2, "decay": 0.9, "trunk": 20, "settle": 10}
COLUMNS = {"step", "loss", "typical", "highest", "grad_norm", "along", "distance", "sharpness"}
SPECTRUM = torch.tensor([TOP, 3.0, 0.5], dtype=torch.float64)

# small, and yet it gets to its edge
TINY = dataclasses.replace(
    escape.LAPTOP,
    images=40,
    hidden=(16,),
    lr=0.4,
    trunk=300,
    settle=25,
    batch=10,
    rhos=(0.02, 0.1),
    noisy_rhos=(0.1,),
    unnormalized=(0.2, 0.4),
    noisy_unnormalized=(0.4,),
    steps=32,
    dense=15,
    moments=3,
)


@pytest.fixture(scope="module")
def result():
    return experiments.run(escape.EXPERIMENT, TINY, seeds=[2], device="cpu", progress=False)


def setting(rule="sam", rho=0.1, loss="network", gradient="full"):
    return {"loss": loss, "gradient": gradient, "rule": rule, "rho": rho}


def on_quadratic(rule, rho, coordinates, steps=20):
    """A run of `follow` on an exact quadratic, from these coordinates along its eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor(coordinates, dtype=torch.float64)
    loss, w, _ = quadratic(SPECTRUM, start, generator)
    optimizer = SAM(torch.optim.SGD([w], lr=LR), rho, rule=rule)
    columns = escape.follow(lambda: optimizer.step(loss), loss, [w], range(steps + 1))
    name = "unnormalized" if rule is unnormalized else "sam"
    return Run(setting(name, rho, "quadratic"), 0, columns)


def made(along, grad_norm=1.0, sharpness=TOP, rule="unnormalized", rho=0.1, where=None, **more):
    """A run with these amplitudes, one a step; `where` changes other settings."""
    n = len(along)
    columns = {
        "step": list(range(n)),
        "along": list(along),
        "grad_norm": [grad_norm] * n,
        "sharpness": [sharpness] * n,
    }
    return run_of({**setting(rule, rho), **(where or {})}, **{**columns, **more})


# --- on an exact quadratic -----------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.03, 0.1])
def test_unnormalised_amplitudes_are_a_geometric_sequence_of_the_predicted_factor(rho):
    run = on_quadratic(unnormalized, rho, [1e-6, 0.3, -0.2])
    factor = growth(LR, TOP, rho)
    expected = TOP * 1e-6 * factor ** np.arange(21)
    assert np.allclose(np.abs(run["along"]), expected, rtol=1e-5, atol=0)
    assert np.all(np.diff(np.sign(run["along"])) != 0)  # from wall to wall
    assert np.allclose(escape.predicted(run, LR), factor)


@pytest.mark.parametrize("rho", [0.03, 0.1])
def test_the_fitted_rate_of_the_unnormalised_rule_is_the_predicted_one(rho):
    run = on_quadratic(unnormalized, rho, [1e-6, 0.3, -0.2])
    assert growth(LR, TOP, rho) > 1.2
    assert escape.rate(run) == pytest.approx(math.log(growth(LR, TOP, rho)), rel=1e-5)
    assert escape._constancy(run) == pytest.approx(1, rel=1e-5)


def test_normalised_amplitudes_grow_by_the_factor_of_each_step():
    run = on_quadratic(sam, 0.01, [1e-6, 0.003, 0.02])
    level = np.abs(run["along"])
    factors = escape.predicted(run, LR)
    assert len(factors) == len(escape.rise(run)) - 1 >= 4
    assert np.allclose(level[1 : len(factors) + 1] / level[: len(factors)], factors, rtol=1e-5)
    assert factors[0] > 10 and factors[-1] < 2  # anything but one rate
    assert escape._constancy(run) < 0.6


def test_once_the_gradient_is_the_component_the_same_is_added_in_every_step():
    rho = 0.02
    run = on_quadratic(sam, rho, [1e-3, 0.0, 0.0], steps=60)
    level = np.abs(run["along"])
    expected = (LR * TOP - 1) * level[:-1] + LR * rho * TOP**2
    assert np.allclose(level[1:], expected, rtol=1e-5)
    # which ends in a bounce of the height at which that changes nothing any more
    assert level[-1] == pytest.approx(LR * rho * TOP**2 / (2 - LR * TOP), rel=1e-4)


def test_the_columns_say_where_the_weights_are():
    coordinates = [0.2, 0.3, -0.1]
    run = on_quadratic(sam, 0.0, coordinates, steps=1)
    after = (1 - LR * SPECTRUM.numpy()) * coordinates
    for i, w in enumerate((coordinates, after)):
        gradient = SPECTRUM.numpy() * w
        assert run["loss"][i] == pytest.approx(0.5 * gradient @ w, rel=1e-5)
        assert run["grad_norm"][i] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert abs(run["along"][i]) == pytest.approx(abs(gradient[0]), rel=1e-5)
        moved = np.linalg.norm(np.subtract(w, coordinates))
        assert run["distance"][i] == pytest.approx(moved, rel=1e-5)
    assert np.allclose(run["sharpness"], TOP, rtol=1e-4)


def test_between_moments_the_median_and_the_highest_loss_are_kept():
    levels = iter([5.0, 1.0, 9.0, 2.0, 2.0, 3.0])
    w = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)

    def step():
        with torch.no_grad():
            w.copy_(torch.tensor([math.sqrt(2 * next(levels)), 0.0]))

    columns = escape.follow(step, lambda: 0.5 * w.square().sum(), [w], [0, 1, 4, 6])
    assert columns["step"] == [0, 1, 4, 6]
    assert np.allclose(columns["loss"], [0.625, 5, 2, 3])
    assert np.allclose(columns["typical"], [0.625, 5, 2, 2.5])
    assert np.allclose(columns["highest"], [0.625, 5, 9, 3])


def test_moments_are_every_step_and_then_fewer_and_fewer():
    moments = escape.measured_steps(1000, 10, 8)
    assert moments[:11] == list(range(11)) and moments[-1] == 1000
    gaps = np.diff(moments[10:])
    assert len(gaps) == 8 and (np.diff(gaps) > 0).all()
    assert escape.measured_steps(7, 10, 8) == list(range(8))


# --- the start, the rules and the controls -------------------------------------------------------


def test_the_loss_is_half_the_sum_of_squares_over_outputs_mean_over_examples():
    model, x, y = escape.problem(TINY, seed=3)
    images = data.load("digits", train=40, seed=3, dtype=torch.float64)
    inputs = data.standardize(images.x.flatten(1))
    error = (model(inputs) - F.one_hot(images.y, 10)).square().sum() / 80
    losses = escape.batches(model, x, y, None, torch.Generator())
    assert next(losses)().item() == pytest.approx(error.item(), rel=1e-12)
    assert next(losses)().item() == next(losses)().item()


def test_minibatches_are_drawn_anew_without_repeats_and_average_to_the_whole():
    model, x, y = escape.problem(TINY)
    losses = escape.batches(model, x, y, 10, torch.Generator().manual_seed(0))
    drawn = [next(losses)().item() for _ in range(200)]
    whole = next(escape.batches(model, x, y, None, torch.Generator()))().item()
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert abs(np.mean(drawn) - whole) < 4 * error < 0.2 * whole and len(set(drawn)) > 190
    # a batch of everything is the whole only if nobody is in it twice
    every = next(escape.batches(model, x, y, 40, torch.Generator()))().item()
    assert every == pytest.approx(whole, rel=1e-12)
    one = next(losses)
    assert one().item() == one().item()  # both passes of a step see the same batch


def test_the_start_is_where_gradient_descent_ends_at_the_two_learning_rates():
    config = dataclasses.replace(TINY, trunk=5, settle=3)
    model, x, y = escape.problem(config, seed=1)
    for step in range(8):
        error = (model(x) - F.one_hot(y, 10)).square().sum() / 80
        grads = torch.autograd.grad(error, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= config.lr * (config.decay if step >= 5 else 1.0) * g
    for p, weight in zip(model.parameters(), escape.start(config, 1).values(), strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", ["full", "minibatch"])
@pytest.mark.parametrize("rule", [*escape.RULES, *escape.CONTROLS])
def test_no_rule_touches_the_start_that_all_share(rule, gradient):
    config = dataclasses.replace(TINY, trunk=20, settle=2, steps=5, dense=5)
    shared = escape.start(config, 0, "cpu", gradient == "minibatch")
    before = copy.deepcopy(shared)
    rho = 0.0 if rule == "descent" else 0.05
    columns = escape.run(config, Cell(setting(rule, rho, gradient=gradient)))
    assert columns["distance"][-1] > 0
    assert escape.start(config, 0, "cpu", gradient == "minibatch") is shared
    assert all(torch.equal(shared[name], before[name]) for name in before)


def test_ascent_goes_up_by_its_radius_in_every_step_and_does_not_come_back():
    config = dataclasses.replace(TINY, dense=4)
    columns = escape.run(config, Cell(setting("ascent", 0.02)))
    assert columns["step"] == [0, 1, 2, 3, 4]
    assert columns["distance"][1] == pytest.approx(0.02, rel=1e-9)
    assert max(columns["distance"]) <= 4 * 0.02 + 1e-12
    assert (np.diff(columns["loss"]) > 0).all()


def test_sam_steps_back_from_where_the_ascent_stays():
    """One step each, by hand: SAM ends at w - lr g(w + eps), the ascent at w + eps."""
    config = dataclasses.replace(TINY, steps=1, dense=1)
    model, x, y = escape.problem(config)
    model.load_state_dict(escape.start(config))
    params = list(model.parameters())
    hessian = Hessian(lambda: squared_error(model(x), y), params)
    g = hessian.gradient()
    epsilon = 0.02 * g / g.norm()
    with torch.no_grad():
        for p, e in zip(params, epsilon.split([p.numel() for p in params]), strict=True):
            p += e.view_as(p)
    moved = config.lr * config.decay * hessian.gradient()
    for rule, shift, loss in (
        ("ascent", epsilon, hessian.loss()),
        ("sam", moved, None),
    ):
        columns = escape.run(config, Cell(setting(rule, 0.02)))
        assert columns["distance"][1] == pytest.approx(shift.norm().item(), rel=1e-9)
        assert loss is None or columns["loss"][1] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "value"), [("loss", "cubic"), ("gradient", "half"), ("rule", "asam")]
)
def test_an_unknown_setting_is_refused_with_what_there_is(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
        escape.run(TINY, Cell({**setting(), name: value}))


def test_gradient_descent_has_no_radius():
    with pytest.raises(ValueError, match=r"rho must be 0 for the rule descent, got 0.02"):
        escape.run(TINY, Cell(setting("descent", 0.02)))


# --- what a run says -----------------------------------------------------------------------------


def test_a_rise_ends_once_half_of_the_highest_is_passed():
    assert escape.rise(made([1, -2, 4, -9, 16, 3])).tolist() == [1, 2, 4, 9]
    sparse = Run(setting(), 0, {"step": [0, 1, 2, 5, 9], "along": [1, 2, 3, 50, 100]})
    assert escape.rise(sparse).tolist() == [1, 2]  # of consecutive steps alone


def test_the_prediction_takes_the_radius_over_the_norm_for_the_normalised_rule_alone():
    run = made([1, 2, 4, 8], grad_norm=0.5, rule="sam", rho=0.1)
    assert np.allclose(escape.predicted(run, LR), [growth(LR, TOP, 0.2)] * 2)
    run = made([1, 2, 4, 8], grad_norm=0.5, rho=0.1)
    assert np.allclose(escape.predicted(run, LR), [growth(LR, TOP, 0.1)] * 2)


def test_a_rise_in_one_step_has_no_halves():
    with pytest.raises(ValueError, match="1 step has no halves"):
        escape._constancy(made([1, 10]))


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize(("fast", "power"), [(0.002, 0.3), (0.004, 0.6)])
def test_an_exponential_and_a_power_law_are_told_apart(floor, fast, power):
    step = np.array(escape.measured_steps(1500, 50, 200))
    highest = np.where(step == 5, 9.0, 1.0)
    for y, better in (
        (floor + np.exp(-fast * (step - 5)), 0),
        (floor + np.maximum(step - 4.0, 1.0) ** -power, 1),
    ):
        run = Run(setting(), 0, {"step": step, "highest": highest, "sharpness": y})
        residuals = escape.shapes(run, "sharpness")
        assert residuals[better] < 0.02 and residuals[better] < 0.2 * residuals[1 - better]


def test_what_has_settled_already_is_described_by_both():
    step = np.arange(100)
    run = Run(setting(), 0, {"step": step, "highest": -1.0 * step, "sharpness": [2.0] * 100})
    assert max(escape.shapes(run, "sharpness")) < 1e-9


def test_the_fall_lasts_until_nine_tenths_of_the_rise_are_gone():
    run = made(
        [1.0] * 6,
        loss=[1.0] * 6,
        highest=[1, 5, 21, 9, 3, 2],
        typical=[1, 5, 21, 9, 3.01, 2.99],
    )
    runs = seed_runs(CONFIG, run)
    assert escape._fall(runs, run) == pytest.approx(3 / 30)
    stays = made([1.0] * 3, loss=[1.0] * 3, highest=[1, 5, 21], typical=[1, 5, 21])
    assert escape._fall(runs, stays) == 0  # there is no step after the peak
    high = made([1.0] * 4, loss=[1.0] * 4, highest=[1, 21, 5, 4], typical=[1, 21, 5, 4])
    assert escape._fall(runs, high) == pytest.approx(2 / 30)


# --- what the runs decide ------------------------------------------------------------------------


def peaks(rule, *highest, gradient="full"):
    """A run for each radius, 0.1, 0.2 and so on, with this highest loss, from 2."""
    return [
        run_of(setting(rule, 0.1 * i, gradient=gradient), loss=2.0, highest=[2.0, top])
        for i, top in enumerate(highest, 1)
    ]


def ends(column, rule, *values, gradient="full"):
    """A run for each radius, 0.1, 0.2 and so on, with this value at the end of a column."""
    return [
        run_of(setting(rule, 0.1 * i, gradient=gradient), loss=1.0, **{column: [9.0, *[value] * 3]})
        for i, value in enumerate(values, 1)
    ]


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    factor, slower = growth(LR, TOP, 0.1), growth(LR, TOP, 0.05)
    fast = factor ** (2 * np.arange(5))
    uneven = [1.0, 2.0, 4.0, 16.0, 64.0, 3.0]
    errors = np.log([2.0, 4.0]) - math.log(factor)
    foretold = {
        ("sam", "network"): 8.0,
        ("sam", "quadratic"): 4.0,
        ("unnormalized", "network"): 8.0,
        ("unnormalized", "quadratic"): 6.4,
    }
    falling = [
        run_of(
            setting(rho=rho),
            step=np.arange(5),
            loss=1.0,
            highest=[1.0, 11.0, 9.0, 9.0, 2.0],
            typical=typical,
        )
        for rho, typical in ((0.1, [1, 11, 2, 1, 1]), (0.2, [1, 11, 9, 9, 1]))
    ]
    settled, ratios = {}, {}
    for column in ("sharpness", "typical"):
        settled[column] = [
            run_of(
                setting(rho=rho),
                step=np.arange(200),
                highest=-np.arange(200.0),
                **{column: (1 + np.arange(200.0)) ** -rho},
            )
            for rho in (0.3, 0.6)
        ]
        pairs = [escape.shapes(run, column) for run in settled[column]]
        ratios[column] = max(exponential / power for exponential, power in pairs)
    cases = {
        "sam-escapes": (peaks("sam", 6, 10), 3),
        "controls-stay": (
            [*peaks("sam", 4, 10), *peaks("descent", 2.4), *peaks("random", 2.8)],
            (1.4 - 1) / (5 - 1),
        ),
        "unnormalized-rate": (
            [
                made(factor ** np.arange(5)),
                made(fast, rho=0.05),
            ],
            2 * math.log(factor) / math.log(slower),
        ),
        "unnormalized-exponential": ([made(uneven)], 2),
        "normalized-exponential": ([made(uneven, rule="sam")], 2),
        "step-by-step": (
            [made([1.0, 2.0, 8.0, 3.0], rule="sam")],
            math.sqrt(np.mean(errors**2)) / (math.log(2) / 2),
        ),
        "foretold": (
            [
                made([1.0, 2.0, height, 3.0], rule=rule, where={"loss": loss})
                for (rule, loss), height in foretold.items()
            ],
            2,
        ),
        "falls": (falling, 3 / 30),
        "back": (ends("typical", "sam", 1.5, 1.25), 1.5),
        "unnormalized-back": (ends("typical", "unnormalized", 1.5, 1.25), 1.5),
        "flatter": (
            [*ends("sharpness", "descent", 8.0), *ends("sharpness", "sam", 2.0, 4.0)],
            0.5,
        ),
        "at-its-edge": (ends("sharpness", "unnormalized", 20.0), 20.0 / sam_edge(LR, 0.1, 1.0)),
        "exponential-sharpness": (settled["sharpness"], ratios["sharpness"]),
        "exponential-loss": (settled["typical"], ratios["typical"]),
        "minibatch-escapes": (
            [
                *peaks("descent", 3, gradient="minibatch"),
                *peaks("sam", 6, 12, gradient="minibatch"),
            ],
            2,
        ),
        "minibatch-rate": ([made(fast, where={"gradient": "minibatch"})], 2),
        "minibatch-flatter": (
            [
                *ends("sharpness", "descent", 8.0, gradient="minibatch"),
                *ends("sharpness", "sam", 2.0, 4.0, gradient="minibatch"),
            ],
            0.5,
        ),
        "ascent-climbs": (
            [
                run_of(setting("ascent"), step=[0, 1, 2], loss=[1.0, 5.0, 20.0]),
                run_of(setting("sam"), step=[0, 1, 2, 9], loss=[1.0, 3.0, 2.0, 1.0]),
            ],
            10,
        ),
    }
    check_statistics(
        escape.CLAIMS,
        {name: (seed_runs(CONFIG, *runs), expected) for name, (runs, expected) in cases.items()},
    )


# --- end to end ----------------------------------------------------------------------------------


def test_every_setting_and_seed_has_finite_columns(result):
    assert len(result.runs) == len(escape.settings(TINY))
    for run in result.runs:
        assert set(run.columns) == COLUMNS
        assert all(np.isfinite(run[name]).all() for name in COLUMNS)
        brief = run.settings["loss"] == "quadratic" or run.settings["rule"] == "ascent"
        moments = escape.measured_steps(15 if brief else 32, 15, 3)
        assert run["step"].tolist() == moments
        assert run["distance"][0] == 0 and (run["highest"] >= run["typical"]).all()


def test_all_settings_of_a_seed_and_a_gradient_begin_alike(result):
    for gradient in ("full", "minibatch"):
        for name in ("loss", "grad_norm", "sharpness"):
            runs = result.select(gradient=gradient)
            assert np.ptp([run[name][0] for run in runs]) < 1e-5 * abs(runs[0][name][0])
    ways = [result.select(gradient=g)[0]["loss"][0] for g in ("full", "minibatch")]
    assert ways[0] != ways[1]


def test_on_the_quadratic_model_of_a_network_the_rise_is_the_predicted_one(result):
    lr = escape.learning_rate(result.config)
    for rule in ("sam", "unnormalized"):
        for run in result.select(rule=rule, loss="quadratic"):
            level = escape.rise(run)
            expected = escape.predicted(run, lr)
            assert np.allclose(level[1:] / level[:-1], expected, rtol=1e-3)
            assert np.allclose(run["sharpness"], run["sharpness"][0], rtol=0.05)


def test_the_small_network_escapes_as_predicted_and_its_controls_do_not(result):
    (runs,) = result.by_seed()
    assert escape.sam_escapes(runs) > 2
    assert escape._peak(escape.runs_of(runs, "unnormalized")[-1]) > 2
    assert escape._peak(escape.runs_of(runs, "descent")[0]) < 1.1
    assert escape.unnormalized_rate(runs) == pytest.approx(1, abs=0.1)


def test_every_claim_gets_a_finite_number(result):
    (runs,) = result.by_seed()
    assert all(math.isfinite(claim(runs)) for claim in escape.CLAIMS)


@pytest.mark.slow
def test_a_run_repeats_exactly_and_is_plain_lists():
    config = dataclasses.replace(TINY, steps=6, dense=6)
    for rule, gradient in (("sam", "minibatch"), ("random", "full")):
        first, again = (
            escape.run(config, Cell(setting(rule, 0.05, gradient=gradient), 2)) for _ in range(2)
        )
        assert first == again
        assert all(type(column) is list for column in first.values())


@pytest.mark.parametrize("name", sorted(escape.EXPERIMENT.presets))
def test_the_radii_of_every_preset_make_the_unnormalised_rule_leave_the_edge(name):
    preset = escape.EXPERIMENT.presets[name]
    lr, edge = escape.learning_rate(config_dict(preset)), 2 / preset.lr
    assert growth(lr, edge) < 0.95  # gradient descent stays
    for rho in (*preset.unnormalized, *preset.noisy_unnormalized):
        assert growth(lr, edge, rho) > 1.5
    # over several decades within the steps that are measured one by one
    assert growth(lr, edge, min(preset.unnormalized)) ** preset.dense > 1e6
    assert set(preset.noisy_rhos) <= set(preset.rhos)
