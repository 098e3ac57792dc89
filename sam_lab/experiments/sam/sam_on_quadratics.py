r"""The control for SAM's edge: what SAM does where the curvature cannot change.

On a quadratic, SAM multiplies the component of the gradient g along an eigenvector of curvature
$\lambda$ by

$$m = 1 - \eta\lambda\,(1 + \rho\lambda / \|g\|).$$

`sam_edge` is the curvature at which m = -1 for a given $\|g\|$. The same equation solved for the
gradient instead says at which $\|g\|$ a given curvature is exactly at the edge:

$$\|g\| = r(\lambda) = \frac{\eta\rho\lambda^2}{2 - \eta\lambda}.$$

With a shorter gradient than $r(\lambda_1)$ the component along the top eigenvector grows, with a
longer one it shrinks: the gradient is a thermostat, and SAM comes to bounce between two points at
which the sharpness over the SAM edge is 1. No curvature has moved; the edge has come to it. (That
SAM on a convex quadratic ends in this cycle is shown by Bartlett, Long & Bousquet 2022.) So a ratio
of 1 alone is weak evidence that SAM has lowered the sharpness of a network.

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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.at_the_edge import follow, ratio
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.statistics import each_seed, farthest_from_one, late, late_median
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM
from sam_lab.stability import gd_edge, sam_edge

BARTLETT = "Bartlett, Long & Bousquet 2022"
LONG_BARTLETT = "Long & Bartlett 2024"
KEPT = ("step", "loss", "sharpness", "grad_norm", "sam_edge", "grad_align")

Tick = Callable[[int, int], None]


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


def settings(config: Config) -> list[dict[str, Any]]:
    """The five studies."""
    grid = [
        {"study": "bisection", "lr": lr, "rho": rho} for lr in config.lrs for rho in config.rhos
    ]
    return [
        *grid,
        *({"study": "spectrum", "fraction": fraction} for fraction in config.fractions),
        *({"study": "pair", "gap": gap} for gap in config.gaps),
        *({"study": "noise", "noise": noise} for noise in config.noises),
        *({"study": "network", "path": path} for path in ("living", "linearised", "taylor")),
    ]


# --- the theory ----------------------------------------------------------------------------------


def multiplier(lr: float, rho: float, curvature: float, grad_norm: float) -> float:
    """What one step of SAM multiplies the gradient's component of this curvature by."""
    return 1 - lr * curvature * (1 + rho * curvature / grad_norm)


def orbit_norm(lr: float, rho: float, curvature: float) -> float:
    """Gradient norm at which `curvature` is the SAM edge: that of the period-2 orbit.

    Raises:
        ValueError: the curvature is not below 2/lr. SAM then leaves, as gradient descent does.
    """
    if not 0 < curvature < gd_edge(lr):
        raise ValueError(
            f"curvature must lie between 0 and 2/lr = {gd_edge(lr):g}: there is no orbit at "
            f"{curvature:g}"
        )
    return lr * rho * curvature**2 / (2 - lr * curvature)


def _sam(params: Iterable[Tensor], lr: float, rho: float) -> SAM:
    # no loss here draws random numbers, and keeping their state takes half the time of a step
    return SAM(torch.optim.SGD(params, lr=lr), rho, same_rng=False)


# --- quadratics ----------------------------------------------------------------------------------


def spectrum(top: float, dim: int, span: float, generator: torch.Generator) -> Tensor:
    """Eigenvalues (dim,) float64, descending: `top`, the rest log-uniform from `span * top` to it.

    Raises:
        ValueError: span is not in (0, 1].
    """
    if not 0 < span <= 1:
        raise ValueError(f"span must lie in (0, 1], got {span}")
    shares = span ** torch.rand(dim - 1, generator=generator, dtype=torch.float64)
    return top * torch.cat([torch.ones(1, dtype=torch.float64), shares.sort(descending=True)[0]])


def quadratic(
    eigenvalues: Tensor,
    coordinates: Tensor,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Closure, Tensor, Tensor]:
    """The loss w.Hw / 2 with these eigenvalues, in a random orthonormal basis.

    The basis matters for rounding alone: in that of the eigenvectors a component that has died out
    is exactly zero, and cannot come back.

    Args:
        eigenvalues: (n,) float64.
        coordinates: (n,) of the start, in the basis of the eigenvectors.

    Returns:
        The closure, the weights (n,) that it reads, and the eigenvectors (n, n) as columns.
    """
    noise = torch.randn(
        len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(noise)[0]
    H = (basis * eigenvalues) @ basis.T
    H = ((H + H.T) / 2).to(device)
    w = (basis @ coordinates).to(device).requires_grad_()
    return lambda: 0.5 * w @ (H @ w), w, basis.to(device)


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


# --- frozen networks -----------------------------------------------------------------------------


def linearised(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The first-order model of a network around its weights now: f(w0) + J (w - w0).

    Exact to rounding (forward-mode derivatives), and differentiable as often as one likes: its
    squared error is a quadratic in w, without negative eigenvalues.

    Returns:
        The weights w (copies, at w0), and a function that evaluates the outputs (N, K) at w.
    """
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: p.clone().requires_grad_() for name, p in base.items()}

    def outputs() -> Tensor:
        direction = {name: moved[name] - base[name] for name in base}
        found = torch.func.jvp(
            lambda weights: torch.func.functional_call(model, weights, (x,)), (base,), (direction,)
        )
        return found[0] + found[1]

    return list(moved.values()), outputs


class _Product(torch.autograd.Function):
    """H v for a fixed symmetric operator; its own derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, H: Hessian) -> Tensor:
        ctx.H = H
        return H @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(grad, ctx.H), None


def taylor(loss: Closure, params: Sequence[Tensor]) -> tuple[list[Tensor], Closure]:
    """The second-order model of a loss around the weights now, by exact Hessian-vector products.

    Where the Hessian has negative eigenvalues the model falls without bound along them. The
    parameters of `loss` must stay where they are while it is in use.

    Returns:
        The weights w (copies, at w0), and the model's closure.
    """
    H = Hessian(loss, params)
    value, gradient = H.loss(), H.gradient()
    moved = [p.detach().clone().requires_grad_() for p in params]
    base = torch.cat([p.detach().flatten() for p in params])

    def model() -> Tensor:
        d = torch.cat([p.flatten() for p in moved]) - base
        return value + d @ gradient + 0.5 * d @ _Product.apply(d, H)

    return moved, model


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


# --- the studies ---------------------------------------------------------------------------------


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str,
    progress: Tick = lambda done, total: None,
) -> dict[str, list[float]]:
    """One setting of one study; the columns are those of the study's function."""
    generator = torch.Generator().manual_seed(seed)
    study = setting["study"]
    if study == "bisection":
        return bisection(config, setting["lr"], setting["rho"], generator)
    if study == "spectrum":
        return settling(config, setting["fraction"], generator, device, progress)
    if study == "pair":
        return pair(config, setting["gap"], generator, device)
    if study == "noise":
        return noisy(config, setting["noise"], generator, device, progress)
    return frozen(config, setting["path"], seed, device, progress)


def bisection(
    config: Config, lr: float, rho: float, generator: torch.Generator
) -> dict[str, list[float]]:
    """The edge by brute force, for gradients of random directions.

    Columns, one entry a gradient norm: ``grad_norm``, ``threshold``, ``formula``, and ``error``,
    their ratio less 1.
    """
    columns: dict[str, list[float]] = {
        name: [] for name in ("grad_norm", "threshold", "formula", "error")
    }
    for norm in config.norms:
        shares = spectrum(1.0, config.dim, config.span, generator)
        gradient = torch.randn(config.dim, generator=generator, dtype=torch.float64)
        gradient *= norm / gradient.norm()
        found, formula = threshold(lr, rho, gradient, shares), sam_edge(lr, rho, norm)
        for name, value in zip(columns, (norm, found, formula, found / formula - 1), strict=True):
            columns[name].append(value)
    return columns


def settling(
    config: Config,
    fraction: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Tick = lambda done, total: None,
) -> dict[str, list[float]]:
    """SAM on a fixed quadratic from a random start.

    Columns: those of `KEPT` as `EdgeRecorder` gives them, at steps evenly spaced in their logarithm
    and on the last two; and of length 1: ``orbit``, the gradient norm of the theory.
    """
    top = fraction * gd_edge(config.lr)
    eigenvalues = spectrum(top, config.dim, config.span, generator)
    start = config.start * torch.randn(config.dim, generator=generator, dtype=torch.float64)
    loss, w, _ = quadratic(eigenvalues, start, generator, device)
    sam = _sam([w], config.lr, config.rho)
    record = EdgeRecorder(sam, loss, tol=1e-8)
    spaced = np.geomspace(1, config.steps + 1, config.moments) - 1
    moments = {*spaced.round().astype(int).tolist(), config.steps - 1, config.steps}
    for step in range(config.steps + 1):
        if step in moments:
            record()
            progress(step, config.steps)
        if step < config.steps:
            sam.step(loss)
    return {
        **{name: record.columns[name] for name in KEPT},
        "orbit": [orbit_norm(config.lr, config.rho, top)],
    }


def pair(
    config: Config, gap: float, generator: torch.Generator, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """SAM on two eigenvalues close together, from a gradient of the orbit's length between them.

    Columns, one entry a step: ``step``, ``ratio`` of the larger one to the SAM edge, ``tangent`` of
    the angle from its eigenvector to the gradient; and of length 1: ``rate``, what the theory
    multiplies the tangent by in a step of the orbit.
    """
    top = config.fraction * gd_edge(config.lr)
    eigenvalues = top * torch.tensor([1.0, 1.0 - gap], dtype=torch.float64)
    length = orbit_norm(config.lr, config.rho, top)
    angle = (0.2 + 0.6 * torch.rand(1, generator=generator).item()) * np.pi / 2
    direction = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float64)
    loss, w, basis = quadratic(eigenvalues, length * direction / eigenvalues, generator, device)
    sam = _sam([w], config.lr, config.rho)
    columns: dict[str, list[float]] = {"step": [], "ratio": [], "tangent": []}
    for step in range(round(config.gap_time / gap)):
        first, second = (eigenvalues * (basis.T @ w.detach()).cpu()).tolist()
        edge = sam_edge(config.lr, config.rho, float(np.hypot(first, second)))
        columns["step"].append(step)
        columns["ratio"].append(top / edge)
        columns["tangent"].append(abs(second / first))
        sam.step(loss)
    return {**columns, "rate": [-multiplier(config.lr, config.rho, top * (1 - gap), length)]}


def noisy(
    config: Config,
    noise: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: Tick = lambda done, total: None,
) -> dict[str, list[float]]:
    """SAM on a fixed quadratic whose gradient is measured with noise, drawn anew for each step.

    Both passes of a step see the same noise, as both see the same minibatch.

    Columns, every 10 steps of the second half: ``step``, ``batch`` and ``full``, the ratio of the
    top eigenvalue to the SAM edge by the norm of the noisy gradient and of the true one.
    """
    top = config.fraction * gd_edge(config.lr)
    eigenvalues = spectrum(top, config.dim, config.span, generator)
    start = config.start * torch.randn(config.dim, generator=generator, dtype=torch.float64)
    loss, w, _ = quadratic(eigenvalues, start, generator, device)
    sam = _sam([w], config.lr, config.rho)
    size = noise * orbit_norm(config.lr, config.rho, top) / np.sqrt(config.dim)
    columns: dict[str, list[float]] = {"step": [], "batch": [], "full": []}
    for step in range(config.steps):
        drawn = size * torch.randn(config.dim, generator=generator, dtype=torch.float64)
        drawn = drawn.to(device)
        if step >= config.steps // 2 and step % 10 == 0:
            (gradient,) = torch.autograd.grad(loss(), w)
            columns["step"].append(step)
            for name, g in (("batch", gradient + drawn), ("full", gradient)):
                columns[name].append(top / sam_edge(config.lr, config.rho, g.norm().item()))
        sam.step(lambda: loss() + drawn @ w)  # noqa: B023 (called before the next draw)
        progress(step + 1, config.steps)
    return columns


def frozen(
    config: Config,
    path: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Tick = lambda done, total: None,
) -> dict[str, list[float]]:
    """SAM on the ``living`` network, or on its ``linearised`` or ``taylor`` model.

    The frozen models are made where `config.trunk` steps of gradient descent have led.

    Columns: those of `KEPT` as `EdgeRecorder` gives them, for the loss that is trained on.

    Raises:
        ValueError: an unknown path.
    """
    model, x, target = network(config, seed, device)

    def living() -> Tensor:
        return F.mse_loss(model(x), target)

    params: list[Tensor] = list(model.parameters())
    loss = living
    if path == "linearised":
        params, outputs = linearised(model, x)

        def loss() -> Tensor:
            return F.mse_loss(outputs(), target)

    elif path == "taylor":
        params, loss = taylor(living, params)
    elif path != "living":
        raise ValueError(f'path must be "living", "linearised" or "taylor", got {path!r}')
    sam = _sam(params, config.network_lr, config.network_rho)
    columns = follow(sam, loss, config.network_steps, config.every, config.tol, progress)
    return {name: columns[name] for name in KEPT}


# --- what the runs decide ------------------------------------------------------------------------


def runs_of(result: Result, study: str, seed: int) -> list[Run]:
    """The runs of one study and seed, in the order of the settings."""
    return result.select(study=study, seed=seed)


def frozen_run(result: Result, path: str, seed: int) -> Run:
    """The run of one path of the study ``network``."""
    return result.select(study="network", path=path, seed=seed)[0]


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


def _worst(
    study: str, statistic: Callable[[Run], float], choose: Callable[..., float] = max
) -> Callable[[Result], list[float]]:
    """The statistic of the run of this study in which it is largest (or what `choose` says)."""
    return each_seed(lambda result, seed: choose(map(statistic, runs_of(result, study, seed))))


def _on_network(path: str, statistic: Callable[[Run], float]) -> Callable[[Result], list[float]]:
    return each_seed(lambda result, seed: statistic(frozen_run(result, path, seed)))


def _hover(run: Run) -> float:
    return late_median(ratio(run))


def _hover_while_positive(run: Run) -> float:
    below = np.flatnonzero(run["loss"] <= 0)
    return late_median(ratio(run)[: below[0] if len(below) else None])


def _late_alignment(run: Run) -> float:
    return late_median(run["grad_align"])


def _moved(result: Result, seed: int) -> float:
    quadratics = [
        *runs_of(result, "spectrum", seed),
        *(frozen_run(result, path, seed) for path in ("linearised", "taylor")),
    ]
    return max(float(np.ptp(run["sharpness"]) / run["sharpness"][0]) for run in quadratics)


def _fading(run: Run) -> float:
    """Measured rate (log of the factor a step) over the theory's, in the second half."""
    tail = np.log(late(run["tangent"]))
    return float((tail[-1] - tail[0]) / (len(tail) - 1) / np.log(run["rate"][0]))


def _noise(result: Result, seed: int, choose: Callable[..., float]) -> Run:
    return result.select(study="noise", noise=choose(result.config["noises"]), seed=seed)[0]


def _apart(result: Result, seed: int) -> float:
    one = _noise(result, seed, lambda noises: min(noises, key=lambda noise: abs(np.log(noise))))
    return float(np.median(one["full"]) / np.median(one["batch"]))


def _loud(result: Result, seed: int) -> float:
    one = _noise(result, seed, max)
    return max(float(np.median(one[name])) for name in ("full", "batch"))


def _fallen(result: Result, seed: int) -> float:
    living, other = (frozen_run(result, path, seed) for path in ("living", "linearised"))
    return float(living["sharpness"][-1] / other["sharpness"][-1])


EXPERIMENT = Experiment(
    name="sam_on_quadratics",
    title="The control: SAM sits at its edge where the curvature cannot change",
    source="Bartlett, Long & Bousquet 2022 (arXiv:2210.01513); Long & Bartlett 2024 "
    "(arXiv:2309.12488), formula of the SAM edge",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        Claim(
            "edge by brute force",
            "The curvature from which on SAM makes the gradient's component grow, found by "
            "bisection, is the SAM edge: relative difference, where it is largest",
            LONG_BARTLETT,
            "",
            _worst("bisection", lambda run: np.abs(run["error"]).max()),
            Criterion(high=1e-6),
        ),
        Claim(
            "ratio of 1 on a quadratic",
            "On a fixed quadratic the sharpness ends at the SAM edge: |ratio - 1| on the last two "
            "steps, where it is largest",
            BARTLETT,
            "",
            _worst("spectrum", lambda run: np.abs(ratio(run)[-2:] - 1).max()),
            Criterion(high=1e-3),
        ),
        Claim(
            "curvature is constant",
            "It does so without any change of curvature: largest less smallest measured sharpness, "
            "over the first, on fixed quadratics and frozen networks",
            "control",
            "",
            each_seed(_moved),
            Criterion(high=1e-3),
        ),
        Claim(
            "gradient adapts",
            "What changes is the gradient: its norm ends at lr rho λ²/(2 - lr λ); relative "
            "difference, where it is largest",
            BARTLETT,
            "",
            _worst("spectrum", lambda run: abs(run["grad_norm"][-1] / run["orbit"][0] - 1)),
            Criterion(high=1e-3),
        ),
        Claim(
            "overshoots first",
            "On the way there the ratio can pass 1 by far, where the top component had died out "
            "while the gradient was long: largest ratio of a run, largest of the spectra",
            "control",
            "",
            _worst("spectrum", lambda run: ratio(run).max()),
            Criterion(low=1.1),
        ),
        Claim(
            "ratio before orbit",
            "The ratio is 1 before SAM bounces along the top eigenvector: |cos| of gradient and "
            "eigenvector once the ratio is within 1% for good, smallest of the spectra",
            "control",
            "",
            _worst("spectrum", lambda run: run["grad_align"][settled(run)], min),
            Criterion(high=0.9),
        ),
        Claim(
            "close eigenvalues settle slowly",
            "Beside a close second eigenvalue the direction settles only in about 1/gap steps: "
            "measured over predicted rate, at the gap where that is farthest from 1",
            "control",
            "",
            _worst("pair", _fading, farthest_from_one),
            Criterion(0.95, 1.05),
        ),
        Claim(
            "little noise does little",
            "Gradient noise that is small beside the orbit's gradient leaves the ratio at 1: "
            "median over steps, by the noisy gradient, at the smallest noise",
            "control",
            "",
            each_seed(lambda result, seed: np.median(_noise(result, seed, min)["batch"])),
            Criterion(0.98, 1.02),
        ),
        Claim(
            "noise splits the ratio",
            "Noise as large as the orbit's gradient splits it: median ratio by the full gradient "
            "over that by the noisy one",
            "control",
            "",
            each_seed(_apart),
            Criterion(low=1.1),
        ),
        Claim(
            "much noise takes SAM off its edge",
            "Noise that is large beside the orbit's gradient keeps the sharpness below the SAM "
            "edge: median ratio at the largest noise, the larger of the two",
            "control",
            "",
            each_seed(_loud),
            Criterion(high=0.9),
        ),
        Claim(
            "frozen network",
            "A linearised network, whose curvature cannot change, passes the criterion for SAM at "
            "its edge: second-half median of sharpness over edge",
            "control",
            "",
            _on_network("linearised", _hover),
            Criterion(0.9, 1.15),
        ),
        Claim(
            "frozen loss",
            "So does the second-order model of the loss, as long as it is positive: median of "
            "sharpness over edge in the second half of that time",
            "control",
            "",
            _on_network("taylor", _hover_while_positive),
            Criterion(0.9, 1.15),
        ),
        Claim(
            "living network",
            "The living network passes it too: second-half median of sharpness over edge",
            LONG_BARTLETT,
            "",
            _on_network("living", _hover),
            Criterion(0.9, 1.15),
        ),
        Claim(
            "living falls, frozen stays",
            "What tells them apart is the sharpness: that of the living network at the end, over "
            "that of the linearised one",
            LONG_BARTLETT,
            "",
            each_seed(_fallen),
            Criterion(high=0.8),
        ),
        Claim(
            "frozen gradient is aligned",
            "On the linearised network the gradient comes to lie along the top eigenvector: "
            "second-half median of |cos|",
            "control",
            "",
            _on_network("linearised", _late_alignment),
            Criterion(low=0.95),
        ),
        Claim(
            "living gradient is not",
            "On the living network most of the gradient does not lie along the top eigenvector: "
            "second-half median of |cos|",
            "control",
            "",
            _on_network("living", _late_alignment),
            Criterion(high=0.7),
        ),
    ],
)
