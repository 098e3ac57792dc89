r"""Saddles that hold SAM: when, and what lets it out again.

Near a saddle with curvature $-h$ along one direction gradient descent multiplies the distance along
it by $1 + \eta h$ and leaves. SAM multiplies it by $1 + \eta h\,(1 - \rho h/\|g\|)$: where the
gradient is shorter than $\rho h$ it looks across the saddle, sees the slope of the other side, and
walks *towards* the saddle. So in one dimension it is captured from everywhere within $\rho$. The
unnormalised rule, $\epsilon = \rho g$, is captured where $\rho h > 1$.

With a steep direction of curvature $\lambda$ beside it, SAM bounces there with the gradient norm
$r = \eta\rho\lambda^2/(2 - \eta\lambda)$, its edge's (`experiments.sam.quadratics.orbit_norm`). It
is captured if and only if $r < \rho h$:

$$h > h_c = \frac{\eta\lambda^2}{2 - \eta\lambda},$$

whatever $\rho$: steep bouncing frees SAM from shallow saddles. (Far above, where
$\eta h\,(h/h_c - 1) > 2$, it overshoots and is not held either.) Three studies:

* ``toys``: the three borders, each found by bisection from what runs do.
* ``noise``: how long gradient descent, both rules of SAM, and SAM with momentum take to leave under
  gradient noise, and with how much noise (how small a batch) SAM gets away.
* ``network``: a linear network with two layers near zero, on digits: a saddle whose steepest
  directions have the curvatures $\pm h$, with h the largest singular value of the correlation of
  inputs and targets. It is left, or not, from starts of various sizes, by gradient descent, SAM,
  SAM with momentum, and SAM and SGD on minibatches. The noise of those vanishes at the saddle, as
  each example's gradient does.

Components that decay are kept from the floor of floating point numbers by a noise of 1e-12, without
which a captured run would prove nothing. All in float64. Each criterion was set before the first
run of what it judges; the borders had been seen in other code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sam_lab import data
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.experiments.sam.quadratics import orbit_norm

__all__ = ["border", "borders", "captured", "critical", "escape_steps", "saddle_step"]

# Its abstract: a saddle point can become an attractor under SAM dynamics.
KIM = Source("Kim et al. 2023", "paper")
AFTER_KIM = Source("Kim et al. 2023", "after")
DERIVED = Source("derived here", "ours")

TINY = 1e-12  # of the noise that keeps decayed components alive


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        cases: saddles drawn for each border.
        steps: of a run at a border; twice as many and half as many give the same to the digits of
            `tol`.
        tol: relative width to which a border is bisected.
        walkers, most, noise: of the study ``noise``: runs, steps at most, and the standard
            deviation of each component of the gradient's noise.
        batches: by how many times smaller the batch is; the noise is the root of it as long.
        lr, rho, curvature: of that study; the saddle has the curvatures plus and minus this.
        images, width: of the linear network.
        net_lr, net_rho: its learning rate and radius.
        starts: sizes of its start, distance from the saddle over rho.
        batch, momentum: of the ways out.
        net_steps: at most.
    """

    cases: int = 5
    steps: int = 2000
    tol: float = 1e-3
    walkers: int = 100
    most: int = 20_000
    noise: float = 0.05
    batches: tuple[int, ...] = (1, 4, 16, 64)
    lr: float = 0.05
    rho: float = 0.1
    curvature: float = 1.0
    images: int = 200
    width: int = 10
    net_lr: float = 0.1
    net_rho: float = 0.1
    starts: tuple[float, ...] = (0.03, 0.3, 3.0)
    batch: int = 8
    momentum: float = 0.9
    net_steps: int = 10_000


LAPTOP = Config()
# No scale of the paper's could be verified; this one is only larger.
PAPER = Config(cases=30, walkers=1000, most=100_000, images=1000, width=50, net_steps=100_000)

METHODS = ("descent", "sam", "unnormalized", "momentum")


# --- the saddle -----------------------------------------------------------------------------------


def critical(lr: float, curvature: float) -> float:
    """The negative curvature h_c above which SAM is captured beside a direction of this curvature.

    Raises:
        ValueError: as `orbit_norm`.
    """
    return orbit_norm(lr, 1.0, curvature)


def saddle_step(
    w: np.ndarray, curvatures: np.ndarray, lr: float, rho: float, method: str, noise: np.ndarray
) -> np.ndarray:
    """What one step takes from each walker, on the loss (w . curvatures w) / 2.

    Args:
        w: (..., n), one walker a row.
        curvatures: (n,), or broadcast against w.
        method: one of `METHODS`; "momentum" perturbs like "sam".
        noise: added to the gradient in both passes, as of one batch.
    """
    g: np.ndarray = curvatures * w + noise
    if method == "descent":
        return lr * g
    scale = 1.0 if method == "unnormalized" else 1 / np.linalg.norm(g, axis=-1, keepdims=True)
    ahead: np.ndarray = g + rho * scale * curvatures * g
    return lr * ahead


def captured(
    curvatures: np.ndarray,
    start: np.ndarray,
    lr: float,
    rho: float,
    method: str,
    steps: int,
    rng: np.random.Generator,
) -> bool:
    """Whether the last coordinate, of negative curvature, is smaller after a run than before."""
    w = start.copy()
    for _ in range(steps):
        w = w - saddle_step(w, curvatures, lr, rho, method, TINY * rng.standard_normal(w.shape))
        if not abs(w[-1]) < 1e6:
            return False
    return bool(abs(w[-1]) < abs(start[-1]))


def border(is_captured: Callable[[float], bool], low: float, high: float, tol: float) -> float:
    """Where `is_captured` changes, by bisection in the logarithm between two values that differ.

    Raises:
        ValueError: they do not differ.
    """
    at_low = is_captured(low)
    if at_low == is_captured(high):
        raise ValueError(f"no border between {low:g} and {high:g}: both are {at_low}")
    while high / low > 1 + tol:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_captured(middle) == at_low else (low, middle)
    return math.sqrt(low * high)


def borders(
    config: Config, h: float, curvature: float, lr: float, rho: float, rng: np.random.Generator
) -> dict[str, float]:
    """Borders found over borders derived, see `toys`.

    Args:
        h: size of the negative curvature, where it is not varied.
        curvature: of the steep direction.
    """

    def held(start: list[float], curvatures: list[float], radius: float, method: str) -> bool:
        return captured(
            np.array(curvatures), np.array(start), lr, radius, method, config.steps, rng
        )

    line = border(lambda y: held([y], [-h], rho, "sam"), rho / 3, 3 * rho, config.tol)
    plain = border(
        lambda radius: held([1e-3], [-h], radius, "unnormalized"), 0.3 / h, 2 / h, config.tol
    )
    h_c, orbit = critical(lr, curvature), orbit_norm(lr, rho, curvature) / curvature
    # beyond this multiple of h_c the capture would overshoot: lr h (h/h_c - 1) is 1.5
    most = (1 + math.sqrt(1 + 6 / (lr * h_c))) / 2
    steep = border(
        lambda k: held([orbit, 1e-3 * rho], [curvature, -k], rho, "sam"),
        h_c / 2,
        min(2.0, most) * h_c,
        config.tol,
    )
    return {"line": line / rho, "unnormalized": plain * h, "steep": steep / h_c}


def toys(config: Config, cell: Cell) -> Columns:
    """Borders found over borders derived, one entry a random saddle: ``line``, where the start is
    varied in one dimension; ``unnormalized``, where rho is; ``steep``, where h is, with SAM
    bouncing along the steep direction from the start."""
    rng = np.random.default_rng(cell.seed)
    rows = Rows()
    for done in range(config.cases):
        h, lr, rho = rng.uniform(0.3, 2), rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.5)
        curvature = rng.uniform(0.6, 1.6) / lr
        rows.add(**borders(config, h, curvature, lr, rho, rng))
        cell.tick(done + 1, config.cases)
    return rows.columns


# --- noise ----------------------------------------------------------------------------------------


def escape_steps(method: str, times: int, config: Config, rng: np.random.Generator) -> np.ndarray:
    """Steps until the coordinate of negative curvature passes 1, (walkers,); `most` where it never
    does. The noise of a batch that is `times` as small is the root of it as long."""
    curvatures = config.curvature * np.array([1.0, -1.0])
    w = np.zeros((config.walkers, 2))
    v = np.zeros_like(w)
    out = np.full(config.walkers, float(config.most))
    inside = np.arange(config.walkers)
    sigma = config.noise * math.sqrt(times)
    for step in range(1, config.most + 1):
        noise = sigma * rng.standard_normal(w.shape)
        move = saddle_step(w, curvatures, config.lr, config.rho, method, noise)
        v = (config.momentum if method == "momentum" else 0.0) * v + move
        w = w - v
        left = np.abs(w[:, 1]) > 1
        if left.any():
            out[inside[left]] = step
            inside, w, v = inside[~left], w[~left], v[~left]
            if not len(inside):
                break
    return out


def noise(config: Config, cell: Cell) -> Columns:
    """Columns: ``times``, and the ``median`` steps of the escape; ``cut``, share never escaped."""
    rows = Rows()
    for done, times in enumerate(config.batches, start=1):
        rng = np.random.default_rng([cell.seed, METHODS.index(cell["method"]), times])
        steps = escape_steps(cell["method"], times, config, rng)
        rows.add(
            times=times, median=float(np.median(steps)), cut=float((steps >= config.most).mean())
        )
        cell.tick(done, len(config.batches))
    return rows.columns


# --- a linear network -----------------------------------------------------------------------------


def network(config: Config, cell: Cell) -> Columns:
    """The loss (1/2n) |Y - W2 W1 X|^2 from starts near W1 = W2 = 0.

    The learning rate is `net_lr` over the saddle's curvature h, the largest singular value of the
    correlation of X and Y.

    Columns: ``start``, the size over rho; ``steps`` until the loss has fallen by a tenth of what
    the saddle has over the best linear fit, `net_steps` where it never does; ``curvature``, h.
    """
    images = data.load("digits", train=config.images, seed=cell.seed)
    x = images.x.flatten(1).double().numpy()
    x = (x - x.mean(0)) / x.std()
    y = np.eye(10)[images.y.numpy()] - 0.1
    h = float(np.linalg.norm(y.T @ x / len(x), 2))
    lr, rho = config.net_lr / h, config.net_rho
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    saddle, best = float((y**2).sum() / 2), float(((y - x @ fit) ** 2).sum() / 2)
    goal = (saddle - 0.1 * (saddle - best)) / len(x)
    method = cell["method"]
    whole = "batch" not in method
    moment = config.momentum if method == "momentum" else 0.0
    rows = Rows()
    for done, size in enumerate(config.starts, start=1):
        rng = np.random.default_rng([cell.seed, done])
        one, two = (
            rng.standard_normal((config.width, x.shape[1])),
            rng.standard_normal((10, config.width)),
        )
        length = math.sqrt((one**2).sum() + (two**2).sum())
        one, two = (size * rho / length * part for part in (one, two))
        speed = [np.zeros_like(one), np.zeros_like(two)]
        inner, cross, power = x.T @ x / len(x), y.T @ x / len(x), (y**2).sum() / (2 * len(x))
        taken = config.net_steps
        for step in range(1, config.net_steps + 1):
            a, c = inner, cross
            if not whole:
                chosen = rng.choice(len(x), config.batch, replace=False)
                a, c = (
                    x[chosen].T @ x[chosen] / config.batch,
                    y[chosen].T @ x[chosen] / config.batch,
                )
            g = _slopes(one, two, a, c)
            if "descent" not in method:
                norm = math.sqrt(sum(float((part**2).sum()) for part in g))
                g = _slopes(one + rho * g[0] / norm, two + rho * g[1] / norm, a, c)
            speed = [moment * v + part for v, part in zip(speed, g, strict=True)]
            one = one - lr * speed[0] + TINY * rng.standard_normal(one.shape)
            two = two - lr * speed[1] + TINY * rng.standard_normal(two.shape)
            if step % 10 == 0:
                product = two @ one
                loss = power - (product * cross).sum() + ((product @ inner) * product).sum() / 2
                if loss < goal:
                    taken = step
                    break
        rows.add(start=size, steps=taken, curvature=h)
        cell.tick(done, len(config.starts))
    return rows.columns


def _slopes(
    one: np.ndarray, two: np.ndarray, inner: np.ndarray, cross: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rest = two @ (one @ inner) - cross
    return two.T @ rest, rest @ one.T


# --- what the runs decide -------------------------------------------------------------------------


def _toys(runs: SeedRuns, name: str) -> float:
    return farthest_from_one(runs.one(study="toys")[name])


def _net(runs: SeedRuns, method: str) -> Run:
    return runs.one(study="network", method=method)


def _noise(runs: SeedRuns, method: str) -> Run:
    return runs.one(study="noise", method=method)


@claim(DERIVED, 0.99, 1.01, domain="positive")
def captured_within_rho(runs: SeedRuns) -> float:
    """In one dimension a saddle captures SAM from everywhere within the radius rho, whatever the
    curvature: the border of the captured starts over rho, at the saddle where it is farthest from 1
    """
    return _toys(runs, "line")


@claim(AFTER_KIM, 0.99, 1.01, domain="positive")
def unnormalized_captured(runs: SeedRuns) -> float:
    """A saddle of negative curvature -h captures the unnormalised rule where rho h > 1: rho h at
    the border, at the saddle where it is farthest from 1"""
    return _toys(runs, "unnormalized")


@claim(DERIVED, 0.99, 1.01, domain="positive", headline=True)
def critical_curvature(runs: SeedRuns) -> float:
    """Beside a steep direction of curvature a, in which SAM bounces, a saddle captures SAM if and
    only if its negative curvature exceeds lr a^2 / (2 - lr a): curvature at the border over this,
    at the saddle where it is farthest from 1"""
    return _toys(runs, "steep")


@claim(KIM, low=10.0, domain="positive")
def noise_does_not_free_sam(runs: SeedRuns) -> float:
    """Under gradient noise shorter than its radius SAM stays at a saddle that gradient descent
    leaves: median steps of SAM until it has left over those of gradient descent, a lower bound
    where SAM never does"""
    return float(_noise(runs, "sam")["median"][0] / _noise(runs, "descent")["median"][0])


@claim(KIM, high=0.1, domain="positive")
def small_batches_free_sam(runs: SeedRuns) -> float:
    """A smaller batch, whose noise is longer, frees SAM from the saddle: median steps until SAM has
    left with a batch a sixty-fourth as large over those with the whole one"""
    medians = _noise(runs, "sam")["median"]
    return float(medians[-1] / medians[0])


@claim(KIM, high=0.1, domain="positive")
def momentum_frees_sam(runs: SeedRuns) -> float:
    """Momentum frees SAM from the saddle at the same gradient noise: median steps until SAM with
    momentum 0.9 has left over those without"""
    return float(_noise(runs, "momentum")["median"][0] / _noise(runs, "sam")["median"][0])


@claim(KIM, low=10.0, domain="positive")
def network_is_captured(runs: SeedRuns) -> float:
    """A linear network of two layers that starts well within the radius of the saddle at zero
    never gets away with SAM: steps of SAM until its loss has fallen by a tenth over those of
    gradient descent, a lower bound where SAM's never does"""
    return float(_net(runs, "sam")["steps"][0] / _net(runs, "descent")["steps"][0])


@claim(CONTROL, high=3.0, domain="positive")
def network_beyond_the_radius_leaves(runs: SeedRuns) -> float:
    """The same network that starts well outside of the radius leaves the saddle with SAM about as
    fast as with gradient descent: steps of SAM until its loss has fallen by a tenth over those of
    gradient descent"""
    return float(_net(runs, "sam")["steps"][-1] / _net(runs, "descent")["steps"][-1])


@claim(KIM, high=0.5, domain="positive")
def batches_free_the_network(runs: SeedRuns) -> float:
    """Minibatches free the linear network that the saddle at zero holds with the full batch: steps
    of SAM with batches of eight until the loss has fallen by a tenth over those with the full batch
    """
    return float(_net(runs, "batch")["steps"][0] / _net(runs, "sam")["steps"][0])


@claim(KIM, high=0.5, domain="positive")
def momentum_frees_the_network(runs: SeedRuns) -> float:
    """Momentum frees the linear network that the saddle at zero holds without: steps of SAM with
    momentum 0.9 until the loss has fallen by a tenth over those without"""
    return float(_net(runs, "momentum")["steps"][0] / _net(runs, "sam")["steps"][0])


@claim(CONTROL, high=3.0, domain="positive")
def batches_without_sam_leave(runs: SeedRuns) -> float:
    """Without SAM minibatches leave the saddle at zero of a linear network as fast as the full
    batch does: steps of SGD with batches of eight until the loss has fallen by a tenth over those
    of gradient descent"""
    return float(_net(runs, "batch_descent")["steps"][0] / _net(runs, "descent")["steps"][0])


CLAIMS = [
    captured_within_rho,
    unnormalized_captured,
    critical_curvature,
    noise_does_not_free_sam,
    small_batches_free_sam,
    momentum_frees_sam,
    network_is_captured,
    network_beyond_the_radius_leaves,
    batches_free_the_network,
    momentum_frees_the_network,
    batches_without_sam_leave,
]


def _methods(*names: str) -> Callable[[Config], list[Setting]]:
    return lambda _: [{"method": name} for name in names]


STUDIES = Studies(
    Study("toys", lambda _: [{}], toys),
    Study("noise", _methods(*METHODS), noise),
    Study("network", _methods("descent", "sam", "momentum", "batch", "batch_descent"), network),
)

EXPERIMENT = Experiment(
    name="saddles",
    title="Saddles that hold SAM, and what lets it out",
    source="Kim et al. 2023 (arXiv:2301.06308); Compagnoni et al. 2023 (arXiv:2301.08203); borders "
    "derived here",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
