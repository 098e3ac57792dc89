r"""Where the edge lies with minibatches: linear models, and a network with one output.

A step on a minibatch multiplies the distance from a minimum by a matrix that is drawn anew each
time, so that it is the *mean square* that decides. `sam_lab.stability` has its edge exactly for few
examples (`mean_square_lr`), by the norm K of the noise kernel for any number (`noise_kernel_lr`),
and `recorder.batch_sharpness` asks for less: whether a step on a batch lowers the loss on that very
batch. Two studies put them to the test:

* ``linear``: the largest stable learning rate of a linear model against the batch size, exactly,
  by K, and by two simpler rules: 2 over the largest eigenvalue, and K without its resolvent, which
  is the trace alone. Three spectra: all eigenvalues ``equal`` (orthogonal examples), ``gaussian``
  inputs, and ``decaying`` ones, feature j of size 1/j, where few directions carry most. For SGD,
  and for SAM with the unnormalised perturbation.
* ``network``: a tanh network with one output, half the mean squared error, on 200 digits (0 to 4
  against 5 to 9, as -1 and 1) with three in ten labels flipped, so that there is something left to
  sharpen for. From equal weights: the full batch, minibatches, half the learning rate with half the
  batch (the same lr / batch, hence the same noise), and SAM. The control has the gradient of the
  full batch and a noise that is redrawn each step, as long as that of a minibatch and in a random
  direction, so that only its shape differs.

Distances along a run are measured in time, lr times steps. Sharpness is the largest eigenvalue of
the Hessian of the training loss; K, the trace and the Frobenius norm are of the Gauss-Newton
matrix, from exact per-example Jacobians.

The criteria were set before the runs on these seeds. What had been seen: runs of SGD on seed 100,
with these labels and with clean ones, where minibatch runs fit the data before they come near any
edge; and K against the exact rate on some draws of Gaussian and decaying inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.experiments.lab.claims import CONTROL, OURS, NotApplicable, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.gauss_newton import jacobian, noise_alignment
from sam_lab.objective import Closure
from sam_lab.recorder import EdgeRecorder
from sam_lab.sam import SAM
from sam_lab.stability import (
    alignment_bound,
    mean_square_lr,
    noise_kernel_lr,
    noise_kernel_norm,
)

__all__ = [
    "at_level",
    "at_time",
    "closing",
    "isotropic",
    "network_problem",
    "slopes",
    "spectrum_of",
]

AGARWALA = Source("Agarwala & Pennington 2024", "after")
# Its abstract: what stabilises at 2/lr is batch sharpness, and the largest eigenvalue lies below.
ANDREYEV = Source("Andreyev & Beneventano 2024", "paper")
WU = Source("Wu, Wang & Su 2022", "after")
DERIVED = Source("derived here", "ours")

SPECTRA = ("equal", "gaussian", "decaying")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        examples, dim: of the linear models.
        sizes: their batch sizes, ascending; the last is `examples`.
        radius: rho of unnormalised SAM there, over one over the largest eigenvalue.
        data: the images, of ten classes; the network tells the first five from the others.
        images, hidden: of the network.
        flipped: share of its labels that are wrong.
        lr: its learning rate; `settings` has half of it, too.
        batches: its batch sizes, ascending; the last is `images`.
        rho: radius of SAM.
        time: lr times steps of a run.
        moments: measurements of a run, after the first.
        drawn: minibatches in a measurement of the batch sharpness.
    """

    examples: int = 24
    dim: int = 40
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 24)
    radius: float = 0.3
    images: int = 200
    hidden: tuple[int, ...] = (50, 50)
    flipped: float = 0.3
    lr: float = 0.1
    batches: tuple[int, ...] = (8, 32, 200)
    rho: float = 0.02
    time: float = 1000.0
    moments: int = 25
    drawn: int = 16
    data: str = "digits"


LAPTOP = Config()
# MNIST's own images, and more of them. In 784 pixels labels are fitted sooner than in 64.
DESKTOP = Config(data="mnist", images=1000, batches=(8, 32, 1000), time=500.0, moments=20)
# No scale of the papers' could be verified; this one is only larger.
PAPER = Config(
    dim=200, images=1000, hidden=(200, 200), batches=(8, 32, 1000), time=4000.0, drawn=64
)


# --- linear models -------------------------------------------------------------------------------


def spectrum_of(name: str, config: Config, seed: int) -> Tensor:
    """Inputs (examples, dim) float64 of a linear model whose largest eigenvalue is 1.

    Raises:
        ValueError: a name that is not in `SPECTRA`.
    """
    generator = torch.Generator().manual_seed(seed)
    if name not in SPECTRA:
        raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}, got {name!r}")
    x = torch.randn(config.examples, config.dim, generator=generator, dtype=torch.float64)
    if name == "equal":
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        x = left @ right
    elif name == "decaying":
        x /= torch.arange(1, config.dim + 1, dtype=torch.float64)
    largest: Tensor = torch.linalg.matrix_norm(x, 2)
    return x * (math.sqrt(config.examples) / largest)


def linear(config: Config, cell: Cell) -> Columns:
    """The largest stable learning rate at each batch size, over 2 / (largest eigenvalue).

    Columns: ``batch``; ``exact`` and ``kernel`` of SGD; ``trace``, by K without its resolvent;
    ``sam_exact`` and ``sam_kernel``, of unnormalised SAM, over its own rate with the full batch.
    """
    x = spectrum_of(cell["spectrum"], config, cell.seed)
    values = torch.linalg.svdvals(x) ** 2 / len(x)
    n, rho = len(x), config.radius
    rows = Rows()
    for done, batch in enumerate(config.sizes, start=1):
        share = (n - batch) / (batch * (n - 1))
        rows.add(
            batch=batch,
            exact=mean_square_lr(x, 0.0, batch) / 2,
            kernel=noise_kernel_lr(values, batch, n) / 2,
            trace=1 / (share * float(values.sum())) if share else math.inf,
            sam_exact=mean_square_lr(x, rho, batch) * (1 + rho) / 2,
            sam_kernel=noise_kernel_lr(values, batch, n, rho) * (1 + rho) / 2,
        )
        cell.tick(done, len(config.sizes))
    return rows.columns


# --- a network with one output -------------------------------------------------------------------


def network_problem(
    config: Config, seed: int, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, its inputs (images, pixels), centred, and its targets (images,), -1 or 1."""
    images = data.load(config.data, train=config.images, seed=seed, device=device)
    x = images.x.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(x), generator=generator) < config.flipped
    y = torch.where((images.y < 5) ^ wrong.to(x.device), -1.0, 1.0)
    model = models.mlp((x.shape[1], *config.hidden, 1), "tanh", seed=seed, device=device)
    return model, x - x.mean(0), y


def slopes(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradient of half the mean squared error of the tanh network, by hand.

    On batches this small torch's recording of each operation would take most of the time.

    Args:
        weights: weight and bias of each layer in turn, as `models.mlp` has them.
    """
    layers = list(zip(weights[::2], weights[1::2], strict=True))
    states = [x]
    for weight, bias in layers[:-1]:
        states.append(torch.addmm(bias, states[-1], weight.T).tanh_())
    weight, bias = layers[-1]
    back = (torch.addmm(bias, states[-1], weight.T) - y[:, None]) / len(x)
    found: list[Tensor] = []
    for (weight, _), state in zip(reversed(layers), reversed(states), strict=True):
        found = [back.T @ state, back.sum(0), *found]
        back = (back @ weight) * (1 - state * state)  # not used after the first layer
    return found


def isotropic(
    whole: Sequence[Tensor], part: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """`whole` plus a noise as long as `part - whole`, in a random direction over all tensors."""
    length = _norm([p - w for p, w in zip(part, whole, strict=True)])
    draws = [torch.randn(w.shape, generator=generator).to(w) for w in whole]
    scale = length / _norm(draws)
    return [w + scale * draw for w, draw in zip(whole, draws, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors]))
    return length


def take_step(
    params: Sequence[Tensor], x: Tensor, y: Tensor, setting: Setting, order: torch.Generator
) -> None:
    """One step of a run of the network, in place.

    Args:
        params: as for `slopes`.
        setting: ``lr``, ``batch``, ``rho`` and ``noise``, "minibatch" or "isotropic".
        order: draws the batch, unless it is the full one, and the noise.
    """
    inputs, targets = x, y
    if setting["batch"] < len(x):
        chosen = torch.randperm(len(x), generator=order)[: setting["batch"]].to(x.device)
        inputs, targets = x[chosen], y[chosen]
    g = slopes(params, inputs, targets)
    if setting["noise"] == "isotropic":
        g = isotropic(slopes(params, x, y), g, order)
    if setting["rho"]:
        scale = setting["rho"] / _norm(g)
        moved = [p + scale * part for p, part in zip(params, g, strict=True)]
        g = slopes(moved, inputs, targets)
    for p, part in zip(params, g, strict=True):
        p.sub_(part, alpha=setting["lr"])


def network(config: Config, cell: Cell) -> Columns:
    """One run from the weights of the cell's seed.

    Columns: ``time``; those of `EdgeRecorder` with batches; of the Gauss-Newton matrix the largest
    eigenvalue ``gn_top``, the ``trace``, the norm ``kernel`` of the noise kernel, the Frobenius
    norm ``frobenius`` and its bound ``bound`` by the ``alignment`` of the noise. A run that
    diverges ends with its last measurement before, and ``diverged`` is 1.
    """
    model, x, y = network_problem(config, cell.seed, cell.device)
    lr, batch, rho = (cell[name] for name in ("lr", "batch", "rho"))
    size = len(x)
    order, other = (torch.Generator().manual_seed(10 * cell.seed + k) for k in (1, 2))

    def loss(rows: Tensor | None = None) -> Tensor:
        inputs, targets = (x, y) if rows is None else (x[rows], y[rows])
        value: Tensor = 0.5 * (model(inputs)[:, 0] - targets).square().mean()
        return value

    def batches() -> list[Closure]:
        if batch == size:
            return [loss]
        orders = [torch.randperm(size, generator=other) for _ in range(config.drawn)]
        return [partial(loss, rows[:batch].to(x.device)) for rows in orders]

    params = [p.detach() for p in model.parameters()]  # the same memory
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), rho, model)
    record = EdgeRecorder(sam, loss, tol=2e-2, batches=batches)
    rows = Rows()
    steps = round(config.time / lr)
    every = steps // config.moments
    diverged = False
    for step in range(steps + 1):
        if step % every == 0:
            sam.steps = step  # taken below, for speed; the recorder looks at nothing else of SAM's
            try:
                record(now=True)
            except FloatingPointError:
                diverged = True
                break
            rows.add(time=lr * step, **_gauss_newton(model, x, y, lr, batch))
            cell.tick(step, steps)
        if step == steps:
            break
        take_step(params, x, y, cell.setting, order)
    kept = {name: values[: len(rows.columns["time"])] for name, values in record.columns.items()}
    return {**kept, **rows.columns, "diverged": [float(diverged)]}


def _gauss_newton(
    model: nn.Module, x: Tensor, y: Tensor, lr: float, batch: int
) -> dict[str, float]:
    J = jacobian(model, x)
    with torch.no_grad():
        residuals = model(x)[:, 0] - y
    values = torch.linalg.eigvalsh((J @ J.T).double() / len(x)).clamp(min=0)
    alignment = noise_alignment(J, residuals)
    return {
        "gn_top": float(values[-1]),
        "trace": float(values.sum()),
        "kernel": noise_kernel_norm(values, lr, batch, len(x)),
        "frobenius": float(values.square().sum().sqrt()),
        "alignment": alignment,
        "bound": alignment_bound(lr, alignment, batch, len(x)),
    }


def _runs(config: Config) -> list[Setting]:
    """The runs of the network: full batch first."""
    small, middle, full = config.batches
    plain = {"rho": 0.0, "noise": "minibatch"}
    return [
        {"lr": config.lr, "batch": full, **plain},
        {"lr": config.lr, "batch": middle, **plain},
        {"lr": config.lr, "batch": small, **plain},
        {"lr": config.lr / 2, "batch": small // 2, **plain},
        {"lr": config.lr, "batch": small, "rho": 0.0, "noise": "isotropic"},
        {"lr": config.lr, "batch": middle, "rho": config.rho, "noise": "minibatch"},
    ]


# --- what a run says -----------------------------------------------------------------------------


def closing(run: Run, name: str) -> float:
    """The median of a column over the last quarter of its measurements."""
    values = run[name]
    return float(np.median(values[-max(len(values) // 4, 1) :]))


def over_edge(run: Run, name: str) -> float:
    """The closing sharpness, or batch sharpness, over 2/lr."""
    return closing(run, name) / float(run["gd_edge"][0])


def at_time(run: Run, time: float, name: str) -> float:
    """A column at a time, interpolated."""
    return float(np.interp(time, run["time"], run[name]))


def at_level(run: Run, level: float, name: str) -> float:
    """The geometric mean of a column over the three measurements whose loss is nearest to `level`,
    in the logarithm.

    Raises:
        NotApplicable: the run never comes down to the level.
    """
    if run["loss"].min() > level:
        raise NotApplicable(f"the run with {run.label} never comes down to a loss of {level:g}")
    nearest = np.argsort(np.abs(np.log(run["loss"] / level)), kind="stable")[:3]
    return float(np.exp(np.log(run[name][nearest]).mean()))


def _network(runs: SeedRuns, batch: int, **other: object) -> Run:
    config = runs.config
    chosen = {"lr": config["lr"], "rho": 0.0, "noise": "minibatch", **other}
    return runs.one(study="network", batch=batch, **chosen)


def _small(runs: SeedRuns, **other: object) -> Run:
    return _network(runs, runs.config["batches"][0], **other)


def _middle(runs: SeedRuns, **other: object) -> Run:
    return _network(runs, runs.config["batches"][1], **other)


def _full(runs: SeedRuns) -> Run:
    return _network(runs, runs.config["batches"][2])


def _linear(runs: SeedRuns, spectrum: str, name: str, other: str = "exact") -> np.ndarray:
    run = runs.one(study="linear", spectrum=spectrum)
    return run[name] / run[other]


LEVEL = 0.1
"""Training loss at which runs are compared; it is about 0.5 at the start."""


# --- what the runs decide ------------------------------------------------------------------------


@claim(AGARWALA, 0.9, 1.2, domain="positive", headline=True)
def kernel_right_when_spread(runs: SeedRuns) -> float:
    """For linear models with equal eigenvalues or Gaussian inputs (24 examples) the largest stable
    learning rate follows from the eigenvalues alone, by the norm of the noise kernel: the rate by
    the kernel over the exact one, at the spectrum and batch size where it is farthest from 1"""
    return farthest_from_one(
        value for name in ("equal", "gaussian") for value in _linear(runs, name, "kernel")
    )


@claim(DERIVED, low=1.1, domain="positive")
def kernel_generous_when_not(runs: SeedRuns) -> float:
    """For a linear model with a decaying spectrum, whose eigenvectors are not spread over the
    examples, the noise kernel allows too large a learning rate: the rate by the kernel over the
    exact one, at the batch size where it is largest"""
    return float(_linear(runs, "decaying", "kernel").max())


@claim(DERIVED, low=1.3, domain="positive")
def trace_alone_is_not_enough(runs: SeedRuns) -> float:
    """For Gaussian inputs with batches of a third of the examples the trace alone, which is the
    noise kernel for small learning rates, allows too large a learning rate: the rate by the trace
    over the exact one"""
    third = np.argmin(np.abs(3 * np.array(runs.config["sizes"]) - runs.config["examples"]))
    return float(_linear(runs, "gaussian", "trace")[third])


@claim(DERIVED, high=0.5, domain="positive")
def single_examples_bear_little(runs: SeedRuns) -> float:
    """With batches of one example a linear model bears less than half of the learning rate that the
    full batch bears: largest stable learning rate with one example over that with all, at the
    spectrum where it is largest"""
    return max(float(runs.one(study="linear", spectrum=name)["exact"][0]) for name in SPECTRA)


@claim(DERIVED, 1.0, 2.0, domain="positive")
def kernel_of_sam(runs: SeedRuns) -> float:
    """For SAM with the unnormalised perturbation the noise kernel with the curvatures that SAM
    feels is right to within a factor of two: the largest stable learning rate by the kernel over
    the exact one, at the spectrum and batch size where it is farthest from 1"""
    return farthest_from_one(
        value for name in SPECTRA for value in _linear(runs, name, "sam_kernel", "sam_exact")
    )


@claim(CONTROL, 0.9, 1.1, domain="positive")
def full_batch_at_its_edge(runs: SeedRuns) -> float:
    """With the full batch the network comes to the edge of gradient descent: sharpness over 2/lr,
    median over the last quarter of training"""
    return over_edge(_full(runs), "sharpness")


@claim(ANDREYEV, high=0.8, domain="positive", headline=True)
def minibatches_stay_below(runs: SeedRuns) -> float:
    """With small batches the sharpness stays below the edge of gradient descent: sharpness over
    2/lr with the smallest batch, median over the last quarter of training"""
    return over_edge(_small(runs), "sharpness")


@claim(ANDREYEV, 0.8, 1.2, domain="positive", headline=True)
def batch_sharpness_at_the_edge(runs: SeedRuns) -> float:
    """With minibatches it is the batch sharpness that comes to 2/lr: batch sharpness over 2/lr,
    median over the last quarter of training, at the batch size where it is farthest from 1"""
    return farthest_from_one(
        over_edge(run, "batch_sharpness") for run in (_small(runs), _middle(runs))
    )


@claim(OURS, 0.8, 1.2, domain="positive")
def sam_batch_sharpness_at_the_edge(runs: SeedRuns) -> float:
    """With SAM on minibatches the batch sharpness along SAM's gradient comes to 2/lr: over 2/lr,
    median over the last quarter of training"""
    run = _middle(runs, rho=runs.config["rho"])
    return over_edge(run, "batch_sharpness")


@claim(OURS, high=0.8, domain="positive")
def sam_sharpness_below_sgd(runs: SeedRuns) -> float:
    """With minibatches SAM lies at a smaller sharpness than SGD of the same learning rate and batch
    size at equal training loss: SAM's sharpness over SGD's"""
    sam, sgd = _middle(runs, rho=runs.config["rho"]), _middle(runs)
    return at_level(sam, LEVEL, "sharpness") / at_level(sgd, LEVEL, "sharpness")


@claim(AGARWALA, 0.5, 1.1, domain="positive")
def kernel_near_one(runs: SeedRuns) -> float:
    """With small batches the norm of the noise kernel comes near its edge, 1, and stays below:
    median over the last quarter of training with the smallest batch"""
    return closing(_small(runs), "kernel")


@claim(AGARWALA, high=0.7, domain="positive", headline=True)
def conservative_sharpening(runs: SeedRuns) -> float:
    """The noise of small batches holds the sharpness back long before an edge: sharpness with the
    smallest batch over that with the full batch, where both have the same training loss of 0.1"""
    return at_level(_small(runs), LEVEL, "sharpness") / at_level(_full(runs), LEVEL, "sharpness")


@claim(AGARWALA, 0.8, 1.25, domain="positive")
def rate_over_batch_decides(runs: SeedRuns) -> float:
    """How far the sharpness is held back depends on lr / batch: sharpness with half the learning
    rate and half the batch over that with both whole, at the same training loss of 0.1"""
    small = runs.config["batches"][0]
    half = _network(runs, small // 2, lr=runs.config["lr"] / 2)
    return at_level(half, LEVEL, "sharpness") / at_level(_small(runs), LEVEL, "sharpness")


@claim(CONTROL, low=1.3, domain="positive", headline=True)
def shape_of_the_noise(runs: SeedRuns) -> float:
    """Noise as long as that of the smallest batch, but without its shape, does not hold the
    sharpness back as much: sharpness with it over that with minibatches, at the same training loss
    of 0.1"""
    control = _small(runs, noise="isotropic")
    return at_level(control, LEVEL, "sharpness") / at_level(_small(runs), LEVEL, "sharpness")


@claim(WU, high=1.0, domain="positive")
def alignment_bounds_the_curvature(runs: SeedRuns) -> float:
    """At the end of training with minibatches the Frobenius norm of the Gauss-Newton matrix lies
    below the bound that the alignment of the gradient noise puts on it: norm over bound, median
    over the last quarter of training, at the batch size where it is largest"""
    return max(
        float(np.median((run["frobenius"] / run["bound"])[-max(len(run["bound"]) // 4, 1) :]))
        for run in (_small(runs), _middle(runs))
    )


CLAIMS = [
    kernel_right_when_spread,
    kernel_generous_when_not,
    trace_alone_is_not_enough,
    single_examples_bear_little,
    kernel_of_sam,
    full_batch_at_its_edge,
    minibatches_stay_below,
    batch_sharpness_at_the_edge,
    sam_batch_sharpness_at_the_edge,
    sam_sharpness_below_sgd,
    kernel_near_one,
    conservative_sharpening,
    rate_over_batch_decides,
    shape_of_the_noise,
    alignment_bounds_the_curvature,
]

STUDIES = Studies(
    Study("linear", lambda _: [{"spectrum": name} for name in SPECTRA], linear),
    Study("network", _runs, network),
)

EXPERIMENT = Experiment(
    name="noisy_edge",
    title="The edge with minibatches: mean square instead of mean",
    source="Agarwala & Pennington 2024 (arXiv:2404.19261); Andreyev & Beneventano 2024 "
    "(arXiv:2412.20553); Wu, Wang & Su 2022 (arXiv:2207.02628); formulas derived here",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
