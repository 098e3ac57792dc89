"""The edge with minibatches: the networks' gradient and noise, and the claims on made runs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab import experiments
from sam_lab.experiments import Cell
from sam_lab.experiments.lab.claims import NotApplicable
from sam_lab.experiments.theory import noisy_edge as study
from sam_lab.sam import SAM
from sam_lab.stability import mean_square_lr

TINY = dataclasses.replace(
    study.LAPTOP,
    examples=8,
    dim=10,
    sizes=(1, 4, 8),
    images=30,
    hidden=(6, 5),
    batches=(4, 10, 30),
    time=2.0,
    moments=4,
    drawn=3,
)


@pytest.mark.parametrize("name", study.SPECTRA)
def test_a_spectrum_has_the_largest_eigenvalue_1(name):
    x = study.spectrum_of(name, study.LAPTOP, 3)
    values = torch.linalg.eigvalsh(x @ x.T / len(x))
    assert float(values[-1]) == pytest.approx(1)
    if name == "equal":
        torch.testing.assert_close(values, torch.ones_like(values))


def test_an_unknown_spectrum_is_named():
    with pytest.raises(ValueError, match="spectrum must be one of equal, gaussian, decaying"):
        study.spectrum_of("flat", TINY, 0)


def test_rates_are_in_units_of_the_full_batch():
    columns = study.linear(TINY, Cell({"spectrum": "gaussian"}, 2))
    for name in ("exact", "kernel", "sam_exact", "sam_kernel"):
        assert columns[name][-1] == pytest.approx(1), name
    x = study.spectrum_of("gaussian", TINY, 2)
    assert columns["exact"][0] == pytest.approx(mean_square_lr(x) / 2)
    assert columns["trace"][-1] == math.inf


def test_the_gradient_by_hand_is_autograds():
    model, x, y = study.network_problem(TINY, 0)
    loss = 0.5 * (model(x)[:, 0] - y).square().mean()
    by_hand = study.slopes([p.detach() for p in model.parameters()], x, y)
    for mine, its in zip(by_hand, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_isotropic_noise_is_as_long_as_that_of_the_batch_and_points_elsewhere():
    generator = torch.Generator().manual_seed(0)
    whole, part = ([torch.randn(40, 5), torch.randn(7)] for _ in range(2))
    made = study.isotropic(whole, part, generator)
    noise, other = (
        torch.cat([(a - w).flatten() for a, w in zip(g, whole, strict=True)]) for g in (made, part)
    )
    assert float(noise.norm()) == pytest.approx(float(other.norm()), rel=1e-5)
    assert abs(float(noise @ other)) < 0.3 * float(noise.norm() * other.norm())


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_run_takes_the_steps_of_the_library(rho):
    setting = {"lr": 0.1, "batch": 30, "rho": rho, "noise": "minibatch"}
    columns = study.network(TINY, Cell(setting, 1))
    model, x, y = study.network_problem(TINY, 1)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho)

    def loss():
        return 0.5 * (model(x)[:, 0] - y).square().mean()

    for _ in range(20):
        sam.step(loss)
    assert columns["time"] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert columns["loss"][-1] == pytest.approx(loss().item(), rel=1e-4)
    assert columns["diverged"] == [0.0]
    assert columns["kernel"][-1] == 0


def test_a_run_that_diverges_ends_with_what_was_measured_before():
    setting = {"lr": 50.0, "batch": 4, "rho": 0.0, "noise": "minibatch"}
    config = dataclasses.replace(TINY, time=20_000.0)
    columns = study.network(config, Cell(setting, 1))
    assert columns["diverged"] == [1.0]
    assert len(columns["loss"]) == len(columns["time"]) < 5
    assert np.isfinite(columns["loss"]).all()


@pytest.mark.slow
def test_the_small_grid_runs_to_verdicts():
    result = experiments.run("noisy_edge", TINY, seeds=[1], device="cpu", progress=False)
    assert len(result.runs) == 9
    reasons = [verdict.reason for verdict in experiments.judge(result)]
    assert not any("failed" in reason for reason in reasons), reasons


def made(batch, sharpness, lr=0.1, rho=0.0, noise="minibatch", **more):
    """Eight measurements; the loss falls by ten on the way, all else is constant."""
    columns = {
        "time": np.arange(8.0),
        "loss": np.geomspace(0.5, 0.05, 8),
        "sharpness": np.full(8, sharpness),
        "gd_edge": np.full(8, 2 / lr),
        "batch_sharpness": np.full(8, more.get("batch_sharpness", 20.0)),
        "kernel": np.full(8, more.get("kernel", 0.5)),
        "frobenius": np.full(8, 3.0),
        "bound": np.full(8, more.get("bound", 6.0)),
        "diverged": [0.0],
    }
    settings = {"study": "network", "lr": lr, "batch": batch, "rho": rho, "noise": noise}
    return run_of(settings, 0, **columns)


def linear(spectrum, kernel, exact=0.5):
    columns = {
        "batch": [1, 8, 24],
        "exact": [exact, 0.8, 1.0],
        "kernel": [kernel * exact, 0.8, 1.0],
        "trace": [1.0, 1.6, 3.0],
        "sam_exact": [exact, 0.8, 1.0],
        "sam_kernel": [1.5 * kernel * exact, 0.8, 1.0],
    }
    return run_of({"study": "linear", "spectrum": spectrum}, 0, **columns)


def test_a_claims_statistic_is_the_arithmetic_of_its_statement():
    config = dataclasses.asdict(dataclasses.replace(study.LAPTOP, sizes=(1, 8, 24)))
    runs = seed_runs(
        config,
        made(200, 19.0),
        made(32, 15.0, batch_sharpness=16.0, bound=4.0),
        made(8, 8.0, batch_sharpness=18.0, kernel=0.7),
        made(4, 9.0, lr=0.05),
        made(8, 16.0, noise="isotropic"),
        made(32, 10.0, rho=config["rho"], batch_sharpness=22.0),
        linear("equal", 0.95),
        linear("gaussian", 1.2, exact=0.25),
        linear("decaying", 1.4, exact=0.4),
    )
    expected = {
        "kernel-right-when-spread": 1.2,
        "kernel-generous-when-not": 1.4,
        "trace-alone-is-not-enough": 2.0,
        "single-examples-bear-little": 0.5,
        "kernel-of-sam": 2.1,
        "full-batch-at-its-edge": 0.95,
        "minibatches-stay-below": 0.4,
        "batch-sharpness-at-the-edge": 0.8,
        "sam-batch-sharpness-at-the-edge": 1.1,
        "sam-sharpness-below-sgd": 10 / 15,
        "kernel-near-one": 0.7,
        "conservative-sharpening": 8 / 19,
        "rate-over-batch-decides": 9 / 8,
        "shape-of-the-noise": 2.0,
        "alignment-bounds-the-curvature": 0.75,
    }
    check_statistics(study.CLAIMS, {name: (runs, value) for name, value in expected.items()})


def test_a_run_that_never_comes_down_is_not_compared():
    with pytest.raises(NotApplicable, match=r"never comes down to a loss of 0\.01"):
        study.at_level(made(8, 8.0), 0.01, "sharpness")
    assert study.at_level(made(8, 8.0), 0.1, "sharpness") == pytest.approx(8.0)
    assert study.at_time(made(8, 8.0), 2.5, "time") == 2.5
