"""How far measured sharpness can be trusted: stopping rules, batches, error bars, rescaling.

Five small studies, one setting each:

- ``edge``: at the edge of stability, power iteration stopped by the change of its estimate beside
  Lanczos stopped by its residual, both against float64.
- ``batches``: the top eigenvalue on ever smaller batches of one partition of the data.
- ``trace``: how often Hutchinson's interval holds the exact trace of a network small enough to have
  one.
- ``rescaling``: the layers of a ReLU network scaled by a and 1/a, which leaves its function alone.
- ``outliers``: where the largest gap in the spectrum lies, for several numbers of classes.

Loss, where not said otherwise: half the sum of squares over outputs, mean over examples.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.curvature import Hessian, SpectralDensity
from sam_lab.experiments.lab.claims import Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import t_quantile
from sam_lab.training import descend, squared_error

__all__ = [
    "CLAIMS",
    "EXPERIMENT",
    "PRESETS",
    "STUDIES",
    "Config",
    "batch_top",
    "coverage",
    "exact_top",
    "gap",
    "images",
    "mean_jacobian",
    "nested_batches",
    "network",
    "once",
    "power_iteration",
    "rescale",
    "spectra",
    "start_vector",
    "stopped",
]


@dataclass(frozen=True)
class Config:
    """What is measured, and how much of it.

    Attributes:
        dataset, train: which images, and how many.
        hidden: widths of the tanh network trained to its edge of stability.
        lr, checkpoints: its learning rate, and the steps at which it is measured.
        starts: random start vectors at each checkpoint.
        change: power iteration stops when its estimate changes by less than this, relatively.
        tol: Lanczos stops when its residual is below this, relatively.
        parts: into how many batches the data are cut; each number divides the next.
        relu_lr, relu_steps: training of the ReLU network that is rescaled.
        factors: the scales a of a layer.
        classes, outlier_steps: numbers of classes (the first ones of the data set), and the steps
            after which the outliers of their spectra are counted.
        probes, trials: random vectors behind one estimate of a trace, and number of estimates.
    """

    dataset: str = "mnist_5k"
    train: int = 1000
    hidden: tuple[int, ...] = (64, 64, 64)
    lr: float = 0.2
    checkpoints: tuple[int, ...] = (300, 400, 500)
    starts: int = 10
    change: float = 1e-3
    tol: float = 1e-2
    parts: tuple[int, ...] = (1, 2, 4, 8, 40, 200)
    relu_lr: float = 0.1
    relu_steps: int = 200
    factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    classes: tuple[int, ...] = (5, 7, 10)
    outlier_steps: int = 50
    probes: int = 32
    trials: int = 200


PRESETS = {
    "laptop": Config(),
    # The data, network and loss of Cohen et al. (2021), fc-tanh on cifar10-5k.
    "paper": Config(
        dataset="cifar10",
        train=5000,
        hidden=(200, 200),
        lr=0.02,
        checkpoints=(3000, 4000, 5000),
        parts=(1, 2, 4, 8, 40, 200, 1000),
        relu_lr=0.01,
        relu_steps=2000,
        outlier_steps=500,
        trials=1000,
    ),
}


# --- what the studies and the chapter share ------------------------------------------------------


def images(
    config: Config,
    seed: int = 0,
    device: torch.device | str = "cpu",
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Training images, standardised by `data.standardize`, and labels.

    Args:
        seed: chooses the subset of the data set.
        classes: keep only the examples with labels below this.

    Returns:
        x (N, C, H, W) float32 and y (N,) int64, on the device.
    """
    dataset = data.load(config.dataset, train=config.train, seed=seed, device=device)
    x, y = dataset.x, dataset.y
    if classes is not None:
        x, y = x[y < classes], y[y < classes]
    return data.standardize(x), y


def network(
    x: Tensor, hidden: Sequence[int], activation: str, classes: int, seed: int
) -> nn.Sequential:
    """A fully connected network for the inputs x (N, ...), on their device."""
    sizes = (x[0].numel(), *hidden, classes)
    return models.mlp(sizes, activation, seed=seed, device=x.device)


def power_iteration(operator: Any, v: Tensor) -> Iterator[tuple[float, float]]:
    """Estimate and residual norm after each product with ``operator``, from the vector v (P,)."""
    v = v / torch.linalg.vector_norm(v, dtype=torch.float64).to(v)
    while True:
        image = operator @ v
        theta = float(v.double() @ image.double())
        yield theta, float((image - theta * v).double().norm())
        v = image / image.norm()


def nested_batches(count: int, parts: Sequence[int], seed: int) -> list[list[Tensor]]:
    """One shuffle of ``range(count)``, cut into more and more parts, each cut keeping the old ones.

    Raises:
        ValueError: when a number of parts does not divide the next one, or exceeds ``count``.
    """
    if any(b % a for a, b in itertools.pairwise(parts)) or max(parts) > count:
        raise ValueError(
            f"each of parts must divide the next and none exceed {count}, got {tuple(parts)}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    levels = [[order]]
    for before, now in zip((1, *parts), parts, strict=False):
        levels.append([piece for part in levels[-1] for piece in part.tensor_split(now // before)])
    return levels[1:]


def rescale(model: nn.Sequential, factor: float) -> nn.Sequential:
    """A copy of a ReLU network with its first layer times ``factor`` and its last one divided.

    The first layer's bias goes with its weight; the last one's stays. With one hidden layer the
    function is the same (Dinh et al. 2017), and to the last bit when the factor is a power of two.
    """
    if not factor > 0:
        raise ValueError(f"factor must be above 0, got {factor!r}")
    scaled = copy.deepcopy(model)
    first, last = [layer for layer in scaled if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        last.weight.div_(factor)
    return scaled


def gap(values: Tensor) -> tuple[int, float]:
    """Where a descending list of eigenvalues falls most: (i, values[i - 1] / values[i])."""
    ratios = values[:-1] / values[1:]
    return int(ratios.argmax()) + 1, float(ratios.max())


def mean_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian (K, P) of the K outputs with respect to all parameters, mean over examples.

    With squared error, the Gauss-Newton part of the Hessian is the mean over examples of J^T J. It
    is the sum of this mean Jacobian's own J^T J, of rank K, and of a covariance, which is positive
    semi-definite. Its K largest eigenvalues are therefore at least those of J J^T (Weyl).
    """
    params = list(model.parameters())
    outputs = model(x).mean(0)
    rows = [torch.autograd.grad(output, params, retain_graph=True) for output in outputs]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a Hessian at one step of training.

    Attributes:
        density: over a fixed grid from -2 to 13.
        top: the 15 largest eigenvalues (15,), descending.
        mean: eigenvalues (K,) of the mean Jacobian's J J^T, ascending.
    """

    density: SpectralDensity
    top: Tensor
    mean: Tensor


def spectra(
    config: Config,
    activation: str,
    steps: Sequence[int],
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[int, Spectrum]:
    """The spectrum at each of these steps (ascending) of training with ``config.relu_lr``."""
    x, y = images(config, seed, device)
    model = network(x, config.hidden, activation, int(y.max()) + 1, seed)
    params = list(model.parameters())
    grid = torch.linspace(-2, 13, 600)
    at: dict[int, Spectrum] = {}
    for step in steps:
        done = max(at, default=0)
        descend(lambda: squared_error(model(x), y), params, config.relu_lr, step - done)
        H = Hessian(lambda: squared_error(model(x), y), params)
        jacobian = mean_jacobian(model, x)
        at[step] = Spectrum(
            H.density(50, probes=3, sigma=0.1, grid=grid, seed=seed),
            H.top(15, tol=1e-3, seed=seed, max_hvps=500).values,
            torch.linalg.eigvalsh(jacobian @ jacobian.T).double().cpu(),
        )
    return at


# --- the studies ---------------------------------------------------------------------------------


def once(config: object) -> list[Setting]:
    """The settings of a study that is one run."""
    return [{}]


def edge(config: Config, cell: Cell) -> Columns:
    """Stopping rules at the edge of stability; errors, changes and residuals relative to λ1.

    One row a checkpoint and start. The truth is Lanczos in float64 at a residual of 1e-5.
    """
    x, y = images(config, cell.seed, cell.device)
    model = network(x, config.hidden, "tanh", int(y.max()) + 1, cell.seed)
    params = list(model.parameters())
    H = Hessian(lambda: squared_error(model(x), y), params)
    rows, done = Rows(), 0
    for step in config.checkpoints:
        descend(lambda: squared_error(model(x), y), params, config.lr, step - done)
        done = step
        truth = exact_top(model, x, y)
        top = float(truth[0])
        for start in range(config.starts):
            power = stopped(H, start, config.change, config.tol)
            pairs = H.top(tol=config.tol, seed=start)
            theta, residual = float(pairs.values[0]), float(pairs.residuals[0])
            rows.add(
                step=step,
                lambda1=top,
                lambda2=float(truth[1]),
                edge=2 / config.lr,
                power_error=abs(top - power["theta"]) / top,
                power_residual=power["residual"],
                power_change=power["change"],
                power_hvps=power["hvps"],
                patient_error=abs(top - power["patient_theta"]) / top,
                power_hvps_to_tol=power["hvps_to_tol"],
                lanczos_error=abs(top - theta) / top,
                lanczos_residual=residual / theta,
                lanczos_hvps=pairs.hvps,
            )
            cell.tick(len(rows.columns["step"]), len(config.checkpoints) * config.starts)
    return rows.columns


def exact_top(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The two largest eigenvalues (2,) in float64, to many digits."""
    double = copy.deepcopy(model).double()
    wide = x.double()
    H = Hessian(lambda: squared_error(double(wide), y), double.parameters())
    return H.top(k=2, tol=1e-5, max_hvps=1000).values


def stopped(H: Hessian, start: int, change: float, tol: float) -> dict[str, float]:
    """Power iteration, stopped when its estimate changes by less than ``change``, relatively.

    ``patient_theta`` is the estimate after ten such changes in a row; ``hvps_to_tol`` says how many
    products a relative residual of ``tol`` takes. All end at 1000 products.
    """
    readings: dict[str, float] = {}
    previous, still = math.inf, 0
    for hvps, (theta, residual) in enumerate(power_iteration(H, start_vector(H, start)), 1):
        moved, residual = abs(theta - previous) / abs(theta), residual / abs(theta)
        previous, still = theta, still + 1 if moved < change else 0
        last = hvps == 1000
        if "theta" not in readings and (still or last):
            readings |= {"theta": theta, "residual": residual, "change": moved, "hvps": hvps}
        if "patient_theta" not in readings and (still == 10 or last):
            readings["patient_theta"] = theta
        if "hvps_to_tol" not in readings and (residual <= tol or last):
            readings["hvps_to_tol"] = hvps
        if len(readings) == 6:
            break
    return readings


def start_vector(H: Hessian, seed: int) -> Tensor:
    """A Gaussian vector (P,), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, H.shape[0], generator=generator)[0].to(H.device, H.dtype)


def batches(config: Config, cell: Cell) -> Columns:
    """Mean and spread of the top eigenvalue over the batches of each level of one partition."""
    x, y = images(config, cell.seed, cell.device)
    model = network(x, config.hidden, "tanh", int(y.max()) + 1, cell.seed)
    params = list(model.parameters())
    descend(lambda: squared_error(model(x), y), params, config.lr, config.checkpoints[0])
    levels, rows = nested_batches(len(x), config.parts, cell.seed), Rows()
    for done, level in enumerate(levels, 1):
        values = torch.tensor([batch_top(model, x[part], y[part]) for part in level])
        weights = torch.tensor([len(part) / len(x) for part in level])
        rows.add(
            size=len(x) / len(level),
            mean=float((weights * values).sum()),
            low=float(values.min()),
            high=float(values.max()),
        )
        cell.tick(done, len(levels))
    return rows.columns


def batch_top(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The top eigenvalue of the loss on these examples alone, to a residual of 0.1%."""
    H = Hessian(lambda: squared_error(model(x), y), model.parameters())
    return float(H.top(tol=1e-3, max_hvps=500).values[0])


def trace(config: Config, cell: Cell) -> Columns:
    """Hutchinson's estimates, their standard errors and the exact trace, for a small network.

    The images are averaged down to 7 x 7 (8 x 8 for CIFAR-10), so that the whole Hessian, column
    by column, costs about a thousand products.
    """
    x, y = images(config, cell.seed, cell.device)
    x = nn.functional.avg_pool2d(x, 4)
    model = network(x, (16,), "tanh", int(y.max()) + 1, cell.seed)
    params = list(model.parameters())
    descend(lambda: squared_error(model(x), y), params, config.lr, 100)
    H = Hessian(lambda: squared_error(model(x), y), params)
    dense = (H @ torch.eye(H.shape[0], device=H.device)).double()
    estimates = Rows()
    for trial in range(config.trials):
        # a tolerance that is always met: exactly `probes` samples, whatever they show
        sample = H.trace(tol=1e9, seed=trial, min_hvps=config.probes, max_hvps=config.probes)
        estimates.add(estimate=sample.value, stderr=sample.stderr)
        cell.tick(trial + 1, config.trials)
    return {
        "probes": [config.probes],
        "exact": [float(dense.trace())],
        # the standard deviation of z.Hz over random signs z
        "spread": [math.sqrt(2 * float(dense.square().sum() - dense.diag().square().sum()))],
        **estimates.columns,
    }


def rescaling(config: Config, cell: Cell) -> Columns:
    """Sharpness and outputs of a ReLU network whose layers are scaled by a and 1/a.

    ``first`` and ``last`` are the top eigenvalues of the two diagonal blocks of the Hessian, which
    bound the sharpness from below; their sum bounds it from above where the Hessian is positive
    semi-definite.
    """
    x, y = images(config, cell.seed, cell.device)
    model = network(x, (64,), "relu", int(y.max()) + 1, cell.seed)
    params = list(model.parameters())
    descend(lambda: squared_error(model(x), y), params, config.relu_lr, config.relu_steps)
    with torch.no_grad():
        outputs = model(x)

    def top(net: nn.Module, *params: nn.Parameter) -> float:
        H = Hessian(lambda: squared_error(net(x), y), params)
        return float(H.top(tol=1e-3, max_hvps=500).values[0])

    rows = Rows()
    for done, factor in enumerate(config.factors, 1):
        scaled = rescale(model, factor)
        with torch.no_grad():
            moved = float((scaled(x) - outputs).abs().max() / outputs.abs().max())
        # the last layer's bias scales with neither block, and belongs to neither
        first_weight, first_bias, last_weight, _ = scaled.parameters()
        rows.add(
            factor=factor,
            sharpness=top(scaled, *scaled.parameters()),
            first=top(scaled, first_weight, first_bias),
            last=top(scaled, last_weight),
            moved=moved,
        )
        cell.tick(done, len(config.factors))
    return rows.columns


def outliers(config: Config, cell: Cell) -> Columns:
    """Place and size of the largest gap in the top of the spectrum; one row a number of classes.

    For ReLU networks before training (``start``) and after (``relu``), and for tanh networks after
    training (``tanh``): ``..._place`` eigenvalues lie above the gap and ``..._ratio`` is the ratio
    across it; ``..._step`` is the ratio of eigenvalues number K and K + 1 for K classes, and
    ``..._mean`` the part of the K largest, summed, that the mean Jacobian accounts for.
    """
    cases = [
        ("start", "relu", 0),
        ("relu", "relu", config.outlier_steps),
        ("tanh", "tanh", config.outlier_steps),
    ]
    rows = Rows()
    for done, classes in enumerate(config.classes):
        x, y = images(config, cell.seed, cell.device, classes)
        row: dict[str, float] = {"classes": classes}
        for case, (name, activation, steps) in enumerate(cases, 1):
            model = network(x, config.hidden, activation, classes, cell.seed)

            def closure(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                return squared_error(model(x), y)

            params = list(model.parameters())
            descend(closure, params, config.relu_lr, steps)
            # a looser tolerance can pass over one of two eigenvalues that are nearly equal
            values = Hessian(closure, params).top(2 * classes, tol=1e-3, max_hvps=1000).values
            jacobian = mean_jacobian(model, x)
            row[f"{name}_place"], row[f"{name}_ratio"] = gap(values)
            row[f"{name}_step"] = float(values[classes - 1] / values[classes])
            row[f"{name}_mean"] = float(jacobian.square().sum() / values[:classes].sum())
            cell.tick(done * len(cases) + case, len(config.classes) * len(cases))
        rows.add(**row)
    return rows.columns


STUDIES = Studies(
    Study("edge", once, edge),
    Study("batches", once, batches),
    Study("trace", once, trace),
    Study("rescaling", once, rescaling),
    Study("outliers", once, outliers),
)


# --- the claims ----------------------------------------------------------------------------------


def coverage(run: Run) -> float:
    """Share of the trials whose 95% t-interval holds the exact trace."""
    width = t_quantile(int(run.value("probes")) - 1) * run["stderr"]
    return float((abs(run["estimate"] - run.value("exact")) <= width).mean())


def _of_pairs_within(errors: np.ndarray, tol: float) -> float:
    """Share of pairs of neighbouring starts of which the better one is within `tol`."""
    pairs = len(errors) // 2
    return float((errors[: 2 * pairs].reshape(pairs, 2).min(axis=1) <= tol).mean())


CHAPTER = Source("derived in chapter 2", "ours")
CHAPTER_CONTROL = Source("the control of chapter 2", "control")
DINH = Source("Dinh et al. 2017", "after")


@claim(
    Source("stopping rule of PyHessian (Yao et al. 2020)", "ours"),
    low=1.0,
    headline=True,
    domain="positive",
)
def change_is_no_certificate(runs: SeedRuns) -> float:
    """At the edge of stability, power iteration that stops once its estimate changes by less
    than 0.1% has a larger error than 0.1%: error over tolerance, median of all starts"""
    return float(np.median(runs.one(study="edge")["power_error"])) / 1e-3


@claim(
    Source("the question at the head of chapter 2", "ours"),
    high=0.95,
    headline=True,
    domain="share",
)
def patience_is_no_certificate(runs: SeedRuns) -> float:
    """At the edge of stability, power iteration whose estimate has changed by less than 0.1%
    ten times in a row is within 1% of the largest eigenvalue in less than 95% of the starts:
    that share"""
    return float((runs.one(study="edge")["patient_error"] <= 0.01).mean())


@claim(CHAPTER, 0.9, 1.1, domain="positive")
def change_is_a_residual(runs: SeedRuns) -> float:
    """When the estimate of power iteration changes by a relative amount δ, its relative
    residual is √(δ/2): median ratio of the measured residual to this prediction"""
    run = runs.one(study="edge")
    return float(np.median(run["power_residual"] / (run["power_change"] / 2) ** 0.5))


@claim(
    Source("Hessian.top, checked against float64", "ours"), low=0.95, headline=True, domain="share"
)
def residual_certifies(runs: SeedRuns) -> float:
    """At the edge of stability, Lanczos that stops at a residual of 1% finds the largest
    eigenvalue to 1%: share of all starts for which it does"""
    return float((runs.one(study="edge")["lanczos_error"] <= 0.01).mean())


@claim(
    Source("every estimate is a lower bound (chapter 2)", "ours"),
    low=0.95,
    set_after=True,
    headline=True,
    domain="share",
)
def two_starts_certify(runs: SeedRuns) -> float:
    """At the edge of stability, the larger of two Lanczos estimates, each from its own random
    start and stopped at a residual of 1%, is within 1% of the largest eigenvalue: share of all
    pairs"""
    return _of_pairs_within(runs.one(study="edge")["lanczos_error"], 0.01)


@claim(
    Source("Kuczyński & Woźniakowski 1992 (bounds for both)", "after"), low=2.0, domain="positive"
)
def lanczos_is_cheaper(runs: SeedRuns) -> float:
    """At the edge of stability, power iteration needs at least twice as many Hessian products
    as Lanczos to reach a residual of 1%: median ratio"""
    run = runs.one(study="edge")
    return float(np.median(run["power_hvps_to_tol"] / run["lanczos_hvps"]))


@claim(
    Source("Jensen's inequality gives ratio ≥ 1; the size is ours", "ours"),
    low=1.05,
    headline=True,
    domain="positive",
)
def small_batches_are_sharper(runs: SeedRuns) -> float:
    """The sharpness of batches of about 125 examples is on average at least 5% larger than that
    of all 1,000 examples: ratio of the mean over batches to the full batch"""
    run = runs.one(study="batches")
    return float(run["mean"][abs(run["size"] - 125).argmin()] / run["mean"][0])


@claim(Source("Jensen's inequality", "ours"), low=1.0, domain="positive")
def sharper_at_every_cut(runs: SeedRuns) -> float:
    """Cutting the batches of a partition into smaller ones never lowers their mean sharpness:
    smallest ratio of a level of the partition to the level before"""
    mean = runs.one(study="batches")["mean"]
    return float((mean[1:] / mean[:-1]).min())


@claim(Source("Hutchinson 1990, with a t-interval", "after"), 0.92, 0.98, domain="share")
def trace_interval_covers(runs: SeedRuns) -> float:
    """Hutchinson's 95% interval for the trace of the Hessian contains the exact trace in 95% of
    trials: share of trials"""
    return coverage(runs.one(study="trace"))


@claim(DINH, low=10.0, headline=True, domain="positive")
def rescaling_changes_sharpness(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a, for a
    between 1/8 and 8, changes the sharpness at least tenfold: largest over smallest sharpness"""
    sharpness = runs.one(study="rescaling")["sharpness"]
    return float(sharpness.max() / sharpness.min())


@claim(DINH, high=1e-6)
def rescaling_keeps_the_function(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a leaves its
    outputs on the training images unchanged: largest change, relative to the largest output"""
    return float(runs.one(study="rescaling")["moved"].max())


@claim(
    Source("Gur-Ari et al. 2018 (top subspace of that dimension)", "after"),
    0.9,
    1.1,
    domain="positive",
)
def as_many_outliers_as_classes(runs: SeedRuns) -> float:
    """In a ReLU network early in training, the largest gap among the top eigenvalues of the
    Hessian comes after as many eigenvalues as there are classes: place of the gap over number
    of classes, mean"""
    run = runs.one(study="outliers")
    return float((run["relu_place"] / run["classes"]).mean())


@claim(CHAPTER_CONTROL, high=0.5, set_after=True, domain="share")
def outliers_need_training(runs: SeedRuns) -> float:
    """The gap after as many eigenvalues as classes is made by training, so that a ReLU network
    before its first step has its largest gap elsewhere: share of the numbers of classes for
    which the gap is there already"""
    run = runs.one(study="outliers")
    return float((run["start_place"] == run["classes"]).mean())


@claim(CHAPTER, 0.85, 1.05, set_after=True)
def outliers_are_a_mean(runs: SeedRuns) -> float:
    """The outlying eigenvalues of the ReLU network come from the mean Jacobian of its outputs:
    share of the sum of these eigenvalues that the mean Jacobian accounts for, mean"""
    return float(runs.one(study="outliers")["relu_mean"].mean())


@claim(CHAPTER_CONTROL, low=1.25, set_after=True, domain="positive")
def outliers_in_tanh(runs: SeedRuns) -> float:
    """A tanh network, too, has a gap in its spectrum after as many eigenvalues as there are
    classes: ratio of eigenvalues number K and K + 1 for K classes, mean"""
    return float(runs.one(study="outliers")["tanh_step"].mean())


CLAIMS = [
    change_is_no_certificate,
    patience_is_no_certificate,
    change_is_a_residual,
    residual_certifies,
    two_starts_certify,
    lanczos_is_cheaper,
    small_batches_are_sharper,
    sharper_at_every_cut,
    trace_interval_covers,
    rescaling_changes_sharpness,
    rescaling_keeps_the_function,
    as_many_outliers_as_classes,
    outliers_need_training,
    outliers_are_a_mean,
    outliers_in_tanh,
]

EXPERIMENT = Experiment(
    name="measuring_sharpness",
    title="How far a measured sharpness can be trusted",
    source="Yao et al. 2020; Dinh et al. 2017; Gur-Ari et al. 2018; Hutchinson 1990",
    presets=PRESETS,
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
