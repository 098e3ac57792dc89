"""The CNN task: its problem against an independent computation, and a small grid end to end."""

import dataclasses

import numpy as np
import pytest
import torch

from sam_lab import Hessian, data, experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.sam import at_the_edge
from sam_lab.experiments.sam import sam_edge_cnn as task
from sam_lab.recorder import COLUMNS

TINY = dataclasses.replace(
    task.LAPTOP, images=30, widths=(2, 3), chunk=30, lrs=(0.02, 0.1), steps=12, every=4
)


@pytest.fixture(scope="module")
def result():
    return experiments.run(task.EXPERIMENT, TINY, seeds=[1, 2], device="cpu", progress=False)


def by_hand(model, x):
    """The network written out in numpy, one image after the other."""
    weights = [p.detach().double().numpy() for p in model.parameters()]
    outputs = []
    for image in x.double().numpy():
        for block in range(len(weights) // 4):
            kernel, bias, scale, shift = weights[4 * block : 4 * block + 4]
            padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
            image = np.einsum("cijkl,ockl->oij", windows, kernel) + bias[:, None, None]
            image = np.maximum(image, 0)
            image = (image - image.mean(0)) / np.sqrt(image.var(0) + 1e-6)
            image = image * scale[:, None, None] + shift[:, None, None]
            channels, height, width = image.shape
            image = image.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))
        outputs.append(weights[-2] @ image.flatten() + weights[-1])
    return np.array(outputs)


@pytest.mark.parametrize("chunk", [1000, 30, 7])
def test_the_loss_is_the_mean_over_images_and_classes_of_the_squared_error(chunk):
    config = dataclasses.replace(TINY, chunk=chunk)
    model, loss = task.problem(config, seed=4)
    images = data.load("photos", train=30, seed=4)
    x = images.x.reshape(30, 3, 8, 4, 8, 4).mean((3, 5))  # 32x32 down to 8x8
    logits = by_hand(model, x - x.mean(0))
    assert logits.shape == (30, 10)
    error = (logits - np.eye(10)[images.y.numpy()]) ** 2
    assert loss().item() == pytest.approx(error.sum() / 300, rel=1e-4)


def test_images_can_stay_as_large_as_they_are():
    model, loss = task.problem(dataclasses.replace(TINY, shrink=1, images=10))
    images = data.load("photos", train=10)
    logits = by_hand(model, images.x - images.x.mean(0))
    error = (logits - np.eye(10)[images.y.numpy()]) ** 2
    assert loss().item() == pytest.approx(error.mean(), rel=1e-4)


def test_chunks_change_neither_gradient_nor_curvature():
    seen = []
    for chunk in (30, 8):
        model, loss = task.problem(dataclasses.replace(TINY, chunk=chunk))
        hessian = Hessian(loss, list(model.parameters()))
        v = torch.linspace(-1, 1, hessian.shape[0])
        seen.append((hessian.gradient(), hessian @ v))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-3, atol=1e-4)


def parameters(config, side):
    first, second = config.widths
    blocks = 27 * first + 9 * first * second + 3 * (first + second)
    return blocks + 10 * (second * (side // 4) ** 2 + 1)


def test_the_network_has_the_parameters_of_two_normed_convolutions_and_a_linear_layer():
    model, _ = task.problem(task.LAPTOP)
    assert sum(p.numel() for p in model.parameters()) == parameters(task.LAPTOP, 8) == 2090


@pytest.mark.parametrize("preset", [task.DESKTOP, task.PAPER])
def test_the_larger_presets_are_the_papers_network_and_data(preset):
    assert (preset.data, preset.images, preset.shrink) == ("cifar10", 1000, 1)
    # only the photographs can be had everywhere; they have CIFAR-10's shape
    model, _ = task.problem(dataclasses.replace(preset, data="photos"))
    assert sum(p.numel() for p in model.parameters()) == parameters(preset, 32) == 25_674
    assert preset.widths == (16, 32) and 0.004 in preset.lrs and 0.03 in preset.rhos


@pytest.mark.parametrize("name", ["laptop", "desktop", "paper"])
def test_every_preset_compares_sam_with_gradient_descent(name):
    preset = task.EXPERIMENT.presets[name]
    settings = task.EXPERIMENT.settings(preset)
    assert len(settings) == len(preset.lrs) * len(preset.rhos)
    assert {setting["lr"] for setting in settings if setting["rho"] == 0} == set(preset.lrs)
    assert any(setting["rho"] > 0 for setting in settings)
    assert list(preset.lrs) == sorted(preset.lrs) and preset.rhos[0] == 0
    assert preset.steps % preset.every == 0 and preset.steps // preset.every >= 10


@pytest.mark.slow
def test_on_the_real_images_the_network_starts_at_the_edge_of_the_larger_learning_rate(real_data):
    """What the desktop preset's learning rates were chosen for, without training."""
    model, loss = task.problem(dataclasses.replace(task.DESKTOP, images=200), seed=10)
    sharpness = Hessian(loss, list(model.parameters())).top(1).values[0].item()
    low, high = (sharpness * lr / 2 for lr in task.DESKTOP.lrs)
    assert low < 0.6 and 0.6 < high < 2.5


def test_a_small_grid_runs_end_to_end(result):
    assert len(result.runs) == 6 * 2
    for run in result.runs:
        assert set(run.columns) == set(COLUMNS)
        assert run["step"].tolist() == [0, 4, 8, 12]
        assert all(np.isfinite(run[name]).all() for name in COLUMNS)
        assert (run["residual"] <= 1.01 * TINY.tol * np.abs(run["sharpness"])).all()
        assert np.allclose(run["gd_edge"], 2 / run.settings["lr"])
        assert (run["sam_edge"] <= run["gd_edge"]).all()
        assert np.array_equal(run["sam_edge"], run["gd_edge"]) == (run.settings["rho"] == 0)
    assert all(run["loss"][-1] < run["loss"][0] for run in result.runs)


def test_every_claim_gets_a_number_from_every_seed(result):
    assert task.EXPERIMENT.claims == at_the_edge.CLAIMS
    verdicts = experiments.judge(result)
    # runs that start beyond their edge do not arrive at it
    judged = [verdict for verdict in verdicts if verdict.claim.id != "sam-arrives-early"]
    assert all(np.isfinite(verdict.values).all() for verdict in judged)
    assert all(len(verdict.values) == 2 for verdict in judged)


def test_runs_of_one_seed_start_alike_and_repeat_exactly(result):
    starts = {run["loss"][0] for run in result.runs if run.seed == 1}
    assert len(starts) == 1 and starts != {run["loss"][0] for run in result.runs if run.seed == 2}
    first, again = (task.run(TINY, Cell({"lr": 0.1, "rho": 0.03}, 1)) for _ in range(2))
    assert first == again
    run = result.select(lr=0.1, rho=0.03, seed=1)[0]
    assert all(np.allclose(run[name], first[name], rtol=1e-5) for name in COLUMNS)
