r"""The control for SAM's edge: what SAM does where the curvature cannot change.

On a quadratic SAM's gradient adapts until the SAM edge *is* the sharpness (see `quadratics`). No
curvature has moved; the edge has come to it. So a ratio of 1 alone is weak evidence that SAM has
lowered the sharpness of a network.

The studies, each with its settings:

* ``bisection``: the edge found by brute force, a step of `sam_lab.SAM` at a time;
* ``spectrum``: fixed quadratics with random spectra and their top at fractions of 2/lr, from a
  random start. One learning rate and one radius will do: any other is the same run in other units
  of the loss and of the weights;
* ``pair``: two top eigenvalues close together. The ratio is within their gap of 1 at once, but the
  gradient's direction takes the longer to settle the closer they are;
* ``noise``: gradient noise as from minibatches, which no Hessian knows of. The ratio leaves 1, to
  different sides for the norm of the noisy gradient and of the full one;
* ``network``: SAM on a living network, and from the same weights on its ``linearised`` model
  $f(w_0) + J(w - w_0)$, whose squared error is a quadratic, and on the second-order ``taylor``
  model of its loss. The latter has negative eigenvalues, and no floor: its loss falls below 0,
  which no squared error can, and in the end the gradient along them outgrows the orbit. So the
  linearised network is the clean control.

The loss of the networks is the mean over examples and classes of (output - one-hot)^2, as in
`sam_edge_mlp`. All is in float64, so that a ratio of 1 can be told from 1.001.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sam_lab import data, models
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns
from sam_lab.experiments.lab.statistics import (
    farthest_from_one,
    second_half,
    second_half_median,
)
from sam_lab.experiments.sam.at_the_edge import follow, ratio
from sam_lab.experiments.sam.quadratics import (
    linearised,
    multiplier,
    orbit_norm,
    quadratic,
    spectrum,
    taylor,
)
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM
from sam_lab.stability import gd_edge, sam_edge
from sam_lab.tracker import SharpnessTracker

BARTLETT = Source("Bartlett, Long & Bousquet 2022", "after")
LONG_BARTLETT = Source("Long & Bartlett 2024", "after")
KEPT = ("step", "loss", "sharpness", "grad_norm", "sam_edge", "grad_align")
PATHS = ("living", "linearised", "taylor")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        lrs, rhos, norms: grid of the bisection: learning rates, radii, gradient norms.
        lr, rho: of the fixed quadratics.
        dim, span: how many eigenvalues, and the range of all but the first: log-uniform from
            `span` times the first up to it.
        start: standard deviation of each weight at the start.
        fractions: top eigenvalues of the fixed quadratics, over 2/lr.
        steps, moments: steps on them, and at how many, spaced evenly in log step, is measured.
        gaps, gap_time: 1 - second over first eigenvalue; steps x gap on each such pair.
        fraction: top eigenvalue over 2/lr of the pairs and of the quadratics with noise.
        noises: norm of the gradient noise (root mean square) over that of the orbit's gradient.
        images, data, hidden: data and widths of the network (tanh).
        network_lr, network_rho: of the network.
        trunk: steps of gradient descent to the weights at which it is frozen. The sharpness must
            be below 2/lr there, or there is no orbit.
        network_steps, every: steps of SAM from there, and from one measurement to the next.
        tol: tolerance on the residual of an eigenpair of the network.
    """

    lrs: tuple[float, ...] = (0.05, 0.5)
    rhos: tuple[float, ...] = (0.02, 0.2)
    norms: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    lr: float = 0.5
    rho: float = 0.1
    dim: int = 30
    span: float = 1e-3
    start: float = 5.0
    fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.9)
    steps: int = 1500
    moments: int = 80
    gaps: tuple[float, ...] = (0.1, 0.01)
    gap_time: float = 5.0
    fraction: float = 0.5
    noises: tuple[float, ...] = (0.1, 1.0, 10.0)
    data: str = "digits"
    images: int = 200
    hidden: tuple[int, ...] = (40, 40)
    network_lr: float = 0.5
    network_rho: float = 0.1
    trunk: int = 150
    network_steps: int = 200
    every: int = 10
    tol: float = 1e-2


LAPTOP = Config()
PAPER = Config(
    lrs=(0.01, 0.1, 1.0),
    rhos=(0.01, 0.1, 1.0),
    norms=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0),
    dim=300,
    fractions=(0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.98),
    steps=10_000,
    moments=150,
    gaps=(0.1, 0.01, 0.001),
    noises=(0.1, 0.3, 1.0, 3.0, 10.0),
    data="mnist_5k",
    images=2000,
    hidden=(200, 200),
    network_steps=2000,
)


def _sam(params: Iterable[Tensor], lr: float, rho: float) -> SAM:
    # no loss here draws random numbers, and keeping their state takes half the time of a step
    return SAM(torch.optim.SGD(params, lr=lr), rho, same_rng=False)


def _generator(cell: Cell) -> torch.Generator:
    return torch.Generator().manual_seed(cell.seed)


# --- the edge by brute force ---------------------------------------------------------------------


def threshold(lr: float, rho: float, gradient: Tensor, shares: Tensor) -> float:
    """The top curvature from which on SAM makes the gradient's first component grow.

    Found by bisection, each trial one step of `sam_lab.SAM` on a quadratic; no formula is used.

    Args:
        gradient: (n,) at the start, in the basis of the eigenvectors, the top one first.
        shares: (n,) eigenvalues over the top one, which is what is varied.
    """

    def grows(top: float) -> bool:
        eigenvalues = top * shares
        w = (gradient / eigenvalues).requires_grad_()
        sam = _sam([w], lr, rho)
        sam.step(lambda: 0.5 * (eigenvalues * w * w).sum())
        return bool(abs(top * w[0]) >= abs(gradient[0]))

    low, high = 0.0, 4 / lr
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (low, middle) if grows(middle) else (middle, high)


def bisection(config: Config, cell: Cell) -> Columns:
    """The edge by brute force, for gradients of random directions.

    Columns, one entry a gradient norm: ``grad_norm``, ``threshold``, ``formula``, and ``error``,
    their ratio less 1.
    """
    generator = _generator(cell)
    rows = Rows()
    for norm in config.norms:
        shares = spectrum(1.0, config.dim, config.span, generator)
        gradient = torch.randn(config.dim, generator=generator, dtype=torch.float64)
        gradient *= norm / gradient.norm()
        measured = threshold(cell["lr"], cell["rho"], gradient, shares)
        formula = sam_edge(cell["lr"], cell["rho"], norm)
        rows.add(grad_norm=norm, threshold=measured, formula=formula, error=measured / formula - 1)
    return rows.columns


# --- fixed quadratics ----------------------------------------------------------------------------


def settling(config: Config, cell: Cell) -> Columns:
    """SAM on a fixed quadratic from a random start.

    Columns: those of `KEPT` as `EdgeRecorder` gives them, at steps evenly spaced in their logarithm
    and on the last two; and of length 1: ``orbit``, the gradient norm of the theory.
    """
    generator = _generator(cell)
    top = cell["fraction"] * gd_edge(config.lr)
    eigenvalues = spectrum(top, config.dim, config.span, generator)
    start = config.start * torch.randn(config.dim, generator=generator, dtype=torch.float64)
    closure, w, _ = quadratic(eigenvalues, start, generator, cell.device)
    sam = _sam([w], config.lr, config.rho)
    record = EdgeRecorder(sam, closure, tol=1e-8)
    spaced = np.geomspace(1, config.steps + 1, config.moments) - 1
    moments = {*spaced.round().astype(int).tolist(), config.steps - 1, config.steps}
    for step in range(config.steps + 1):
        if step in moments:
            record()
            cell.tick(step, config.steps)
        if step < config.steps:
            sam.step(closure)
    return {
        **{name: record.columns[name] for name in KEPT},
        "orbit": [orbit_norm(config.lr, config.rho, top)],
    }


def pair(config: Config, cell: Cell) -> Columns:
    """SAM on two eigenvalues close together, from a gradient of the orbit's length between them.

    Columns, one entry a step: ``step``, ``ratio`` of the larger one to the SAM edge, ``tangent`` of
    the angle from its eigenvector to the gradient; and of length 1: ``rate``, what the theory
    multiplies the tangent by in a step of the orbit.
    """
    generator = _generator(cell)
    top, gap = config.fraction * gd_edge(config.lr), cell["gap"]
    eigenvalues = top * torch.tensor([1.0, 1.0 - gap], dtype=torch.float64)
    length = orbit_norm(config.lr, config.rho, top)
    angle = (0.2 + 0.6 * torch.rand(1, generator=generator).item()) * np.pi / 2
    direction = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float64)
    start = length * direction / eigenvalues
    closure, w, basis = quadratic(eigenvalues, start, generator, cell.device)
    sam = _sam([w], config.lr, config.rho)
    rows = Rows()
    for step in range(round(config.gap_time / gap)):
        first, second = (eigenvalues * (basis.T @ w.detach()).cpu()).tolist()
        edge = sam_edge(config.lr, config.rho, float(np.hypot(first, second)))
        rows.add(step=step, ratio=top / edge, tangent=abs(second / first))
        sam.step(closure)
    rate = -multiplier(config.lr, config.rho, top * (1 - gap), length)
    return {**rows.columns, "rate": [rate]}


def noisy(config: Config, cell: Cell) -> Columns:
    """SAM on a fixed quadratic whose gradient is measured with noise, drawn anew for each step.

    Both passes of a step see the same noise, as both see the same minibatch.

    Columns, every 10 steps of the second half: ``step``, ``batch`` and ``full``, the ratio of the
    top eigenvalue to the SAM edge by the norm of the noisy gradient and of the true one.
    """
    generator = _generator(cell)
    top = config.fraction * gd_edge(config.lr)
    eigenvalues = spectrum(top, config.dim, config.span, generator)
    start = config.start * torch.randn(config.dim, generator=generator, dtype=torch.float64)
    closure, w, _ = quadratic(eigenvalues, start, generator, cell.device)
    sam = _sam([w], config.lr, config.rho)
    size = cell["noise"] * orbit_norm(config.lr, config.rho, top) / np.sqrt(config.dim)

    def over_edge(gradient: Tensor) -> float:
        return float(top / sam_edge(config.lr, config.rho, gradient.norm().item()))

    rows = Rows()
    for step in range(config.steps):
        noise = size * torch.randn(config.dim, generator=generator, dtype=torch.float64)
        noise = noise.to(cell.device)
        if step >= config.steps // 2 and step % 10 == 0:
            (gradient,) = torch.autograd.grad(closure(), w)
            rows.add(step=step, batch=over_edge(gradient + noise), full=over_edge(gradient))
        sam.step(lambda: closure() + noise @ w)  # noqa: B023 (called before the next draw)
        cell.tick(step + 1, config.steps)
    return rows.columns


# --- frozen networks -----------------------------------------------------------------------------


def network(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network after `config.trunk` steps of gradient descent, its inputs and its targets.

    Raises:
        ValueError: an unknown data set, or more images than there are.
    """
    images = data.load(
        config.data, train=config.images, seed=seed, device=device, dtype=torch.float64
    )
    x = data.standardize(images.x.flatten(1))
    target = data.one_hot(images.y, images.classes, torch.float64)
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(sizes, "tanh", init="glorot", seed=seed, device=device, dtype=torch.float64)
    descent = _sam(model.parameters(), config.network_lr, 0.0)
    for _ in range(config.trunk):
        descent.step(lambda: F.mse_loss(model(x), target))
    return model, x, target


def frozen(config: Config, cell: Cell) -> Columns:
    """SAM on the ``living`` network, or on its ``linearised`` or ``taylor`` model.

    The frozen models are made where `config.trunk` steps of gradient descent have led.

    Columns: those of `KEPT` as `EdgeRecorder` gives them, for the loss that is trained on.

    Raises:
        ValueError: an unknown path.
    """
    model, x, target = network(config, cell.seed, cell.device)
    params, closure = _on_path(cell["path"], model, x, target)
    sam = _sam(params, config.network_lr, config.network_rho)
    columns = follow(sam, closure, config.network_steps, config.every, config.tol, cell)
    return {name: columns[name] for name in KEPT}


def _on_path(
    path: str, model: nn.Module, x: Tensor, target: Tensor
) -> tuple[list[Tensor], Closure]:
    """What is trained on a path, and its loss."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")

    def living() -> Tensor:
        return F.mse_loss(model(x), target)

    if path == "linearised":
        params, outputs = linearised(model, x)
        return params, lambda: F.mse_loss(outputs(), target)
    params = list(model.parameters())
    return taylor(living, params) if path == "taylor" else (params, living)


def filmed(
    config: Config,
    path: str,
    steps: int = 60,
    reach: float = 0.16,
    points: int = 25,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """`frozen` at every step, with the valley that the weights bounce in.

    The valley is the loss itself, along the top eigenvector at step 0, through the weights now.

    Args:
        path: one of `PATHS`.
        steps: steps of SAM; one more are measured, the first before any.
        reach: how far along the eigenvector the valley is followed, to both sides of the start.
        points: on each valley, spaced evenly.

    Returns:
        ``step``, ``loss``, ``sharpness``, ``sam_edge``, ``gd_edge`` and ``position``, the distance
        from the start along the eigenvector, (T,) each; ``along`` (points,), positions; and
        ``valley`` (T, points), the loss there.

    Raises:
        ValueError: an unknown path.
    """
    model, x, target = network(config, seed, device)
    params, closure = _on_path(path, model, x, target)
    sam = _sam(params, config.network_lr, config.network_rho)
    tracker = SharpnessTracker(closure, params, tol=config.tol)
    along = torch.linspace(-reach, reach, points, dtype=torch.float64)
    start, rows, valleys = parameters_to_vector(params).detach(), Rows(), []
    for step in range(steps + 1):
        pairs, hessian = tracker.measure(), tracker.hessian
        if step == 0:
            direction = pairs.vectors[:, 0]
        weights = parameters_to_vector(params).detach()
        position = float((weights - start) @ direction)
        rows.add(
            step=step,
            loss=hessian.loss(),
            sharpness=float(pairs.values[0]),
            sam_edge=sam_edge(
                config.network_lr, config.network_rho, float(hessian.gradient().norm())
            ),
            gd_edge=gd_edge(config.network_lr),
            position=position,
        )
        with torch.no_grad():
            valley = []
            for place in along.tolist():
                vector_to_parameters(weights + (place - position) * direction, params)
                valley.append(float(closure()))
            vector_to_parameters(weights, params)
        valleys.append(valley)
        sam.step(closure)
    columns = {name: np.array(column) for name, column in rows.columns.items()}
    return {**columns, "along": along.numpy(), "valley": np.array(valleys)}


# --- what a run says -----------------------------------------------------------------------------


def settled(run: Run, within: float = 0.01) -> int:
    """Index of the first measurement from which on the ratio stays this near to 1.

    Raises:
        ValueError: it is not there at the end.
    """
    outside = np.flatnonzero(np.abs(ratio(run) - 1) > within)
    first = int(outside[-1]) + 1 if len(outside) else 0
    if first == len(run["step"]):
        raise ValueError(f"the ratio ends {ratio(run)[-1] - 1:+.3g} away from 1")
    return first


def _while_positive(run: Run) -> np.ndarray:
    """Sharpness over edge, up to where the loss falls below 0."""
    below = np.flatnonzero(run["loss"] <= 0)
    return ratio(run)[: below[0] if len(below) else None]


def _fading(run: Run) -> float:
    """Measured rate (log of the factor a step) over the theory's, in the second half."""
    tail = np.log(second_half(run["tangent"]))
    return float((tail[-1] - tail[0]) / (len(tail) - 1) / np.log(run.value("rate")))


def _change(run: Run) -> float:
    """Largest less smallest sharpness, over the first."""
    return float(np.ptp(run["sharpness"]) / run["sharpness"][0])


def _on_network(runs: SeedRuns, path: str) -> Run:
    return runs.one(study="network", path=path)


def _with_noise(runs: SeedRuns, noise: float) -> Run:
    return runs.one(study="noise", noise=noise)


# --- what the runs decide ------------------------------------------------------------------------


@claim(LONG_BARTLETT, high=1e-6, id="edge by brute force")
def edge_by_brute_force(runs: SeedRuns) -> float:
    """On a quadratic the curvature from which on SAM makes the gradient's component grow, found by
    bisection, is the SAM edge: relative difference, where it is largest"""
    return float(max(np.abs(run["error"]).max() for run in runs.all(study="bisection")))


@claim(BARTLETT, high=1e-3, id="ratio of 1 on a quadratic")
def ratio_of_1(runs: SeedRuns) -> float:
    """On a fixed quadratic the sharpness ends at the SAM edge: |sharpness over edge - 1| on the
    last two steps, at the spectrum where it is largest"""
    return float(max(np.abs(ratio(run)[-2:] - 1).max() for run in runs.all(study="spectrum")))


@claim(CONTROL, high=1e-3, id="curvature is constant")
def curvature_is_constant(runs: SeedRuns) -> float:
    """SAM comes to its edge on fixed quadratics and frozen networks without any change of
    curvature: largest less smallest measured sharpness, over the first"""
    frozen_networks = [_on_network(runs, path) for path in ("linearised", "taylor")]
    return max(_change(run) for run in [*runs.all(study="spectrum"), *frozen_networks])


@claim(BARTLETT, high=1e-3, id="gradient adapts")
def gradient_adapts(runs: SeedRuns) -> float:
    """On a fixed quadratic the length of SAM's gradient adjusts and ends at lr rho λ²/(2 - lr λ):
    relative difference from it, at the spectrum where it is largest"""
    norms = [run["grad_norm"][-1] / run.value("orbit") for run in runs.all(study="spectrum")]
    return float(max(abs(norm - 1) for norm in norms))


@claim(CONTROL, low=1.1, domain="positive", id="overshoots first")
def overshoots_first(runs: SeedRuns) -> float:
    """On the way to the edge of a fixed quadratic, sharpness over SAM edge can pass 1 by far, where
    the top component had died out while the gradient was long: largest ratio of a run, at the
    spectrum where it is largest"""
    return float(max(ratio(run).max() for run in runs.all(study="spectrum")))


@claim(CONTROL, high=0.9, domain="share", id="ratio before orbit")
def ratio_before_orbit(runs: SeedRuns) -> float:
    """On a fixed quadratic, sharpness over SAM edge is 1 before SAM bounces along the top
    eigenvector alone: |cos| of gradient and eigenvector once the ratio is within 1% of 1 for good,
    at the spectrum where it is smallest"""
    spectra = runs.all(study="spectrum")
    return float(min(run["grad_align"][settled(run)] for run in spectra))


@claim(CONTROL, 0.95, 1.05, domain="positive", id="close eigenvalues settle slowly")
def close_eigenvalues_settle_slowly(runs: SeedRuns) -> float:
    """Beside a close second eigenvalue SAM's gradient takes about 1/gap steps to settle along the
    top eigenvector: measured over predicted rate, at the gap where that is farthest from 1"""
    return farthest_from_one(_fading(run) for run in runs.all(study="pair"))


@claim(CONTROL, 0.98, 1.02, domain="positive", id="little noise does little")
def little_noise_does_little(runs: SeedRuns) -> float:
    """On a fixed quadratic, gradient noise that is small beside the orbit's gradient leaves
    sharpness over SAM edge at 1: median over steps, by the noisy gradient, at the smallest noise"""
    return float(np.median(_with_noise(runs, min(runs.config["noises"]))["batch"]))


@claim(CONTROL, low=1.1, domain="positive", id="noise splits the ratio")
def noise_splits_the_ratio(runs: SeedRuns) -> float:
    """On a fixed quadratic, noise as long as the orbit's gradient makes sharpness over SAM edge
    read higher by the full gradient than by the noisy one: median ratio by the one over that by the
    other"""
    run = _with_noise(runs, min(runs.config["noises"], key=lambda noise: abs(np.log(noise))))
    return float(np.median(run["full"]) / np.median(run["batch"]))


@claim(CONTROL, high=0.9, domain="positive", id="much noise takes SAM off its edge")
def much_noise_takes_sam_off_its_edge(runs: SeedRuns) -> float:
    """On a fixed quadratic, noise that is long beside the orbit's gradient keeps the sharpness
    below the SAM edge: median of sharpness over edge at the largest noise, by the full or the noisy
    gradient, whichever is larger"""
    run = _with_noise(runs, max(runs.config["noises"]))
    return float(max(np.median(run[name]) for name in ("full", "batch")))


@claim(CONTROL, 0.9, 1.15, domain="positive", id="frozen network", headline=True)
def frozen_network(runs: SeedRuns) -> float:
    """A linearised network, whose curvature cannot change, passes the criterion for SAM at its
    edge: sharpness over SAM edge, median over the second half of the run"""
    return second_half_median(ratio(_on_network(runs, "linearised")))


@claim(CONTROL, 0.9, 1.15, domain="positive", id="frozen loss")
def frozen_loss(runs: SeedRuns) -> float:
    """The second-order model of a network's loss passes the criterion for SAM at its edge, as long
    as that loss is positive: sharpness over SAM edge, median over the second half of that time"""
    return second_half_median(_while_positive(_on_network(runs, "taylor")))


@claim(LONG_BARTLETT, 0.9, 1.15, domain="positive", id="living network")
def living_network(runs: SeedRuns) -> float:
    """A network that is not linearised passes the criterion for SAM at its edge: sharpness over SAM
    edge, median over the second half of the run"""
    return second_half_median(ratio(_on_network(runs, "living")))


@claim(CONTROL, high=0.8, domain="positive", id="living falls, frozen stays", headline=True)
def living_falls(runs: SeedRuns) -> float:
    """Started from the same weights, SAM ends less sharp on a network than on its linearisation,
    which cannot be flattened: sharpness at the end, of the network over that of its
    linearisation"""
    living, other = (_on_network(runs, path)["sharpness"] for path in ("living", "linearised"))
    return float(living[-1] / other[-1])


@claim(CONTROL, low=0.95, domain="share", id="frozen gradient is aligned")
def frozen_gradient_is_aligned(runs: SeedRuns) -> float:
    """On a linearised network SAM's gradient comes to lie along the top eigenvector: |cos| of the
    two, median over the second half of the run"""
    return second_half_median(_on_network(runs, "linearised")["grad_align"])


@claim(CONTROL, high=0.7, domain="share", id="living gradient is not")
def living_gradient_is_not(runs: SeedRuns) -> float:
    """On a network that is not linearised most of the gradient does not lie along the top
    eigenvector: |cos| of the two, median over the second half of SAM's run"""
    return second_half_median(_on_network(runs, "living")["grad_align"])


CLAIMS = [
    edge_by_brute_force,
    ratio_of_1,
    curvature_is_constant,
    gradient_adapts,
    overshoots_first,
    ratio_before_orbit,
    close_eigenvalues_settle_slowly,
    little_noise_does_little,
    noise_splits_the_ratio,
    much_noise_takes_sam_off_its_edge,
    frozen_network,
    frozen_loss,
    living_network,
    living_falls,
    frozen_gradient_is_aligned,
    living_gradient_is_not,
]

STUDIES = Studies(
    Study(
        "bisection",
        lambda config: [{"lr": lr, "rho": rho} for lr in config.lrs for rho in config.rhos],
        bisection,
    ),
    Study("spectrum", lambda config: [{"fraction": share} for share in config.fractions], settling),
    Study("pair", lambda config: [{"gap": gap} for gap in config.gaps], pair),
    Study("noise", lambda config: [{"noise": noise} for noise in config.noises], noisy),
    Study("network", lambda config: [{"path": path} for path in PATHS], frozen),
)

EXPERIMENT = Experiment(
    name="sam_on_quadratics",
    title="The control: SAM sits at its edge where the curvature cannot change",
    source="Bartlett, Long & Bousquet 2022 (arXiv:2210.01513); Long & Bartlett 2024 "
    "(arXiv:2309.12488), formula of the SAM edge",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
