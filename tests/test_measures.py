"""Measures of flatness, and what they rank: closed forms, invariance, claims on made runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs
from scipy import optimize, stats

from sam_lab import SAM, experiments, models
from sam_lab.experiments import Cell
from sam_lab.experiments.critics import measures as task
from sam_lab.experiments.recipe import Recipe, hessian
from sam_lab.perturbations import global_norm

cross_entropy = torch.nn.functional.cross_entropy
TINY = task.Config(
    Recipe("digits", 90, 100, hidden=(8,), measured=40, tol=1e-3),
    examples=60,
    pool=2,
    level=1.2,
    steps=120,
    check=10,
    lrs=(0.2, 1.0),
    batches=(20,),
    widths=(1, 2),
    rhos=(0.0, 0.1),
    probes=4,
    factors=(1.0, 4.0),
)
SETTING = {"noise": 0.3, "batch": 20, "width": 1}


@pytest.fixture(scope="module")
def small():
    """A ReLU network with examples, in float64."""
    torch.manual_seed(0)
    model = models.mlp((6, 5, 4, 3), "relu", seed=1, dtype=torch.float64)
    return model, torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_is_that_of_a_lone_run_and_is_taken_at_the_level():
    trained, _ = task.prepare(TINY, 0.3, seed=1)
    found = task.train(TINY, trained, batch=20, width=2, seed=1)
    assert [(lr, rho) for lr, rho, *_ in found] == list(itertools.product(TINY.lrs, TINY.rhos))
    lr, rho, steps, net = found[3]
    model = models.mlp((16, 16, 10), "relu", seed=1)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), rho, model)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        if step % 3 == 0:
            order = torch.randperm(60, generator=generator).split(20)
        x, y = trained.x[order[step % 3]], trained.y[order[step % 3]]
        sam.step(lambda x=x, y=y: cross_entropy(model(x), y))
        if (step + 1) % TINY.check == 0:
            with torch.no_grad():
                losses.append(float(cross_entropy(model(trained.x), trained.y)))
    assert losses[-1] <= TINY.level < min(losses[:-1], default=math.inf)
    for p, q in zip(model.parameters(), net.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_a_network_that_does_not_reach_the_level_is_counted_and_left_out():
    never = dataclasses.replace(TINY, level=0.0, steps=20)
    columns = task.run(never, Cell(SETTING))
    assert columns["reached"] == [0.0] * 4 and columns["steps"] == [20] * 4
    mixed = run_of(SETTING, reached=[1.0, 0.0], lr=[0.1, 0.2], test_error=[9.0, math.nan])
    table = task.networks(seed_runs({}, mixed))
    assert {name: values.tolist() for name, values in table.items()} == {
        "reached": [1.0],
        "lr": [0.1],
        "test_error": [9.0],
        "noise": [0.3],
        "batch": [20.0],
        "width": [1.0],
    }


def test_wrong_labels_are_trained_on_and_nothing_else_has_them():
    trained, held_out = task.prepare(TINY, 0.3, seed=2)
    clean, same = task.prepare(TINY, 0.0, seed=2)
    assert trained.x.shape == (60, 1, 4, 4) and held_out.x.shape == (30, 1, 4, 4)
    assert 0.1 < float((trained.y != clean.y).double().mean()) < 0.5
    assert torch.equal(held_out.y, same.y) and torch.equal(trained.y_test, clean.y_test)


# --- the measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_rescaled_network_is_the_same_function_with_another_hessian(small, factor):
    model, x, y = small
    other = task.rescaled(model, factor)
    assert torch.allclose(other(x), model(x))
    tops = [float(hessian(m, x, y).top(tol=1e-6).values[0]) for m in (model, other)]
    assert abs(tops[1] / tops[0] - 1) > 0.1
    one, two = (task.adaptive_sharpness(m, x, y, 0.5) for m in (model, other))
    assert one > 0 and two == pytest.approx(one, rel=1e-9)


def test_a_convolutional_network_is_rescaled_as_well():
    torch.manual_seed(0)
    model = models.cnn((3, 8, 8), 4, "relu", widths=(3, 5), pooling="max", seed=0)
    x = torch.randn(6, 3, 8, 8)
    other = task.rescaled(model, 4.0)
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert torch.equal(other[0].weight, 4 * model[0].weight)


def test_what_cannot_be_rescaled_is_refused(small):
    with pytest.raises(ValueError, match="factor must be above 0, got 0"):
        task.rescaled(small[0], 0.0)
    with pytest.raises(ValueError, match="two layers with weights or more, it has 1"):
        task.rescaled(models.mlp((3, 2)), 2.0)


def test_adaptive_sharpness_of_one_small_step_is_its_slope(small):
    model, x, y = small
    params = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model(x), y), params)
    slope = global_norm([p.detach() * g for p, g in zip(params, grads, strict=True)])
    rho = 1e-5
    assert task.adaptive_sharpness(model, x, y, rho) / rho == pytest.approx(float(slope), rel=1e-3)


def test_adaptive_sharpness_is_as_high_as_any_point_of_the_ellipsoid_that_chance_finds(small):
    model, x, y = small
    found = task.adaptive_sharpness(model, x, y, 0.5)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    start, highest = cross_entropy(model(x), y).item(), -math.inf
    generator = torch.Generator().manual_seed(0)
    other = task.rescaled(model, 1.0)
    for _ in range(200):
        z = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
        moved = weights + weights.abs() * 0.5 * z / z.norm()
        torch.nn.utils.vector_to_parameters(moved, other.parameters())
        highest = max(highest, cross_entropy(other(x), y).item() - start)
    assert found > highest


def test_the_gradient_in_the_input_is_that_of_a_linear_network():
    model = models.mlp((3, 2), seed=0, dtype=torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    W = model[1].weight.detach()
    p = model(x).softmax(1).detach() - torch.nn.functional.one_hot(y, 2)
    assert task.input_gradient(model, x, y) == pytest.approx((p @ W).norm(dim=1).mean().item())


def test_the_best_temperature_is_that_of_a_minimiser():
    torch.manual_seed(0)
    y = torch.arange(60) % 4
    logits = 5 * torch.randn(60, 4) + 3 * torch.nn.functional.one_hot(y, 4)
    found = optimize.minimize_scalar(
        lambda t: float(cross_entropy(logits.double() / math.exp(t), y)), bracket=(-1, 1)
    )
    assert task.best_temperature(logits, y) == pytest.approx(math.exp(found.x), rel=1e-4)
    assert task.best_temperature(3 * logits, y) == pytest.approx(
        3 * task.best_temperature(logits, y), rel=1e-6
    )


# --- what they rank -------------------------------------------------------------------------------


def test_concordance_is_kendalls_coefficient():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 30))
    assert task.concordance(one, two) == pytest.approx(stats.kendalltau(one, two).statistic)
    assert math.isnan(task.concordance(one, two, np.zeros((30, 30), dtype=bool)))


def grid(*columns):
    """A whole grid of 2 x 2 x 2 x 2 networks, with columns of random numbers."""
    values = np.array(list(itertools.product([0.1, 0.2], [16.0, 64.0], [1.0, 3.0], [0.0, 0.1])))
    table = dict(zip(("lr", "batch", "width", "rho"), values.T, strict=True))
    rng = np.random.default_rng(1)
    return {**table, **{name: rng.normal(size=len(values)) for name in columns}}


def test_pairs_of_one_axis_are_told_apart():
    table = grid()
    assert {axis: int(task.alone(table, axis).sum()) // 2 for axis in task.AXES} == dict.fromkeys(
        task.AXES, 8
    )
    assert int(np.triu(task.agree(table, "lr"), 1).sum()) == 2 * math.comb(8, 2)


def test_the_granulated_coefficient_is_the_mean_over_groups_and_then_over_axes():
    table = grid("sharpness", "test_error")
    means = []
    for axis in task.AXES:
        others = [name for name in task.AXES if name != axis]
        keys = np.stack([table[name] for name in others], 1)
        groups = [np.all(keys == key, axis=1) for key in np.unique(keys, axis=0)]
        pair = [table["sharpness"], table["test_error"]]
        found = [stats.kendalltau(*(c[group] for c in pair)).statistic for group in groups]
        means.append(np.mean(found))
    assert task.granulated(table, "sharpness") == pytest.approx(np.mean(means))


def test_a_gain_of_sam_is_over_sgd_with_the_same_other_settings():
    table = grid("test_error")
    expected = [
        table["test_error"][i] - table["test_error"][i + 1] for i in range(0, 16, 2)
    ]  # radii alternate
    assert task.gains(table, "test_error") == pytest.approx(np.array(expected))


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("measures", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 4
    assert not any("failed" in verdict.reason for verdict in experiments.judge(result))
    columns = result.runs[0].columns
    assert {*task.MEASURES, "trace_error", "calibrated_loss"} <= columns.keys()
    assert columns["adaptive_rescaled"] == pytest.approx(columns["adaptive"], rel=1e-5, nan_ok=True)


# --- what the runs decide -------------------------------------------------------------------------


def made(noise, seed):
    """A grid of 2 learning rates, batch sizes, widths and radii, with random columns; one network
    of each batch size and width never reached the level."""
    rng, runs = np.random.default_rng(seed), []
    for batch, width in itertools.product((32, 128), (1, 3)):
        lr, rho = np.array(list(itertools.product([0.1, 0.2], [0.0, 0.1]))).T
        names = [*task.MEASURES, "loss", "test_loss", "calibrated_loss", "test_error"]
        names += ["sharpness_0", "sharpness_1", "adaptive_rescaled"]
        columns = {name: rng.uniform(1, 2, size=4).round(3) for name in names}
        columns["test_loss"][1::2] -= 1.5
        columns["reached"] = np.array([1.0, 1.0, 1.0, 0.0])
        settings = {"noise": noise, "batch": batch, "width": width}
        runs.append(run_of(settings, 0, lr=lr, rho=rho, **columns))
    return runs


def rows_of(runs):
    """One dict a network that reached the level."""
    return [
        {**run.settings, **{name: run[name][i] for name in run.columns}}
        for run in runs
        for i in range(4)
        if run["reached"][i]
    ]


def tau(rows, name, keep=lambda a, b: True, other="test_error"):
    """Kendall's coefficient by counting the pairs that are kept."""
    votes = [
        np.sign((a[name] - b[name]) * (a[other] - b[other]))
        for a, b in itertools.combinations(rows, 2)
        if keep(a, b)
    ]
    return float(np.mean(votes))


def like(name):
    return lambda a, b: max(a[name], b[name]) < 1.05 * min(a[name], b[name])


def only(axis):
    return lambda a, b: [name for name in task.AXES if a[name] != b[name]] == [axis]


def expected_of(rows):
    """The statistics of all claims, but for those on rescaled networks."""
    granulated = {
        name: np.mean([tau(rows, name, only(axis)) for axis in task.AXES])
        for name in ("sharpness", "adaptive")
    }
    partners = [
        (a, b) for a in rows for b in rows if not a["rho"] and b["rho"] and only("rho")(a, b)
    ]
    gain = {
        name: np.mean([a[name] - b[name] for a, b in partners])
        for name in ("test_error", "test_loss", "calibrated_loss")
    }
    sharpness = tau(rows, "sharpness")
    rate = tau(rows, "sharpness", lambda a, b: a["lr"] != b["lr"], other="lr")
    ranked = ("sharpness", "trace", "rise", "adaptive", "input_gradient")
    return {
        **{f"{name.replace('_', '-')}-ranks-errors": tau(rows, name) for name in ranked},
        **{f"granulated-{name}": value for name, value in granulated.items()},
        "within-a-learning-rate": tau(rows, "sharpness", lambda a, b: a["lr"] == b["lr"]),
        "across-learning-rates": tau(rows, "sharpness", only("lr")),
        "across-batch-sizes": tau(rows, "sharpness", only("batch")),
        "across-widths": tau(rows, "sharpness", only("width")),
        "across-radii": tau(rows, "sharpness", only("rho")),
        "sharpness-tells-the-learning-rate": abs(rate) - abs(sharpness),
        "leftover-loss-ranks-nothing": abs(tau(rows, "loss")),
        "sharpness-beats-weight-norm": sharpness - tau(rows, "norm"),
        "sharpness-beats-logit-scale": sharpness - tau(rows, "temperature"),
        "adaptive-beats-sharpness": tau(rows, "adaptive") - sharpness,
        "adaptive-beats-logit-scale": tau(rows, "adaptive") - tau(rows, "temperature"),
        "sharpness-at-nearly-equal-loss": tau(rows, "sharpness", like("loss")),
        "adaptive-at-nearly-equal-loss": tau(rows, "adaptive", like("loss")),
        "adaptive-at-nearly-equal-logit-scale": tau(rows, "adaptive", like("temperature")),
        "adaptive-sharpness-is-unchanged": max(
            abs(row["adaptive_rescaled"] / row["adaptive"] - 1) for row in rows
        ),
        "sam-errs-less-at-equal-training-loss": gain["test_error"],
        "temperature-explains-gain": gain["calibrated_loss"] / gain["test_loss"],
    }


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    noisy, clean = made(0.3, 1), made(0.0, 2)
    together = seed_runs({"factors": [1.0, 4.0]}, *noisy, *clean)
    claims = {claim.id: claim for claim in task.EXPERIMENT.claims}
    clean_ones = {name for name in claims if name.endswith("-clean")}
    expected = expected_of(rows_of(noisy))
    values = expected_of(rows_of(clean))
    expected |= {name: values[name.removesuffix("-clean")] for name in clean_ones}
    rescaling = {"random-rescaling-hides-it", "rescaling-orders-at-will"}
    assert expected.keys() == claims.keys() - rescaling
    cases = {name: (together, value) for name, value in expected.items()}
    check_statistics([claims[name] for name in expected], cases)


def test_chosen_factors_put_the_networks_that_err_less_on_the_sharp_side():
    runs = seed_runs({"factors": [1.0, 4.0, 16.0]}, made(0.3, 1)[0])
    table = {
        "test_error": np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]),
        "lr": np.ones(6),
        **{f"sharpness_{i}": np.full(6, 10.0**i) for i in range(3)},
    }
    assert task.chosen(runs, table).tolist() == [1.0, 100.0, 10.0, 100.0, 10.0, 1.0]
    drawn = task.shuffled(runs, table)
    assert set(drawn) <= {1.0, 10.0, 100.0} and len(set(drawn)) > 1


def test_what_rescaling_does_is_read_off_the_sharpness_of_rescaled_networks():
    (run,) = [made(0.3, 3)[0]]
    runs = seed_runs({"factors": [1.0, 4.0]}, run)
    table = task.networks(runs)
    claims = {claim.id: claim for claim in task.EXPERIMENT.claims}
    errors = table["test_error"]
    best = errors <= np.sort(errors)[0]  # of three networks, the one best has the larger factor
    sharp = np.where(best, table["sharpness_1"], table["sharpness_0"])
    assert claims["rescaling-orders-at-will"](runs) == pytest.approx(
        stats.kendalltau(sharp, errors).statistic
    )
    ratio = claims["random-rescaling-hides-it"](runs)
    after = stats.kendalltau(task.shuffled(runs, table), errors).statistic
    assert ratio.numerator == pytest.approx(after)
    assert ratio.denominator == pytest.approx(task.ranking(table, "sharpness"))
