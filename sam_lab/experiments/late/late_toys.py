r"""Two toys of the theory of late SAM: a valley of one parameter, and a loss that obeys PL.

Zhou et al. (2025) prove that SAM stays in the valley where it starts, for one parameter, and that
it converges exponentially, where the loss is smooth and obeys the inequality of Polyak and
Łojasiewicz (PL). Their constants are not at hand, so those here are derived here.

``valley``: $L'(w) = \frac{2h}{\pi}\,\sin(\pi w/2)$ has curvature $h$ at the minimum 0 and its next
maxima at $w = \pm 2$. In units of the paper's $b$, the valley is $(-2, 2)$. It is sub-quadratic,
$|L'(w)| \le h|w|$. A step moves $w$ by at most $2\eta h/\pi$ towards 0, if $|w| + \rho < 2$.
So with $\eta h < 2$ a run from $(-1, 1)$ never comes farther than $4/\pi$, and stays, while
$\rho < 2 - 4/\pi \approx 0.73$. With a larger radius SAM can look beyond the ridge, where the slope
points outwards, and nothing holds it.

``settling``: with an inequality of PL, $\|\nabla L\|^2 \ge 2\mu L$, and curvature at most $\beta$,
the rule without normalisation, $\epsilon = \rho\,\nabla L$, makes the loss smaller in every step by
the factor

$$1 - 2\mu c, \qquad c = \eta(1 - \rho\beta) - \tfrac12\beta\eta^2(1 + \rho\beta)^2 > 0,$$

since $\nabla L\cdot\nabla L(w+\epsilon) \ge (1-\rho\beta)\|\nabla L\|^2$ and
$\|\nabla L(w+\epsilon)\| \le (1+\rho\beta)\|\nabla L\|$. Two losses obey PL: ``squares``, linear
regression with more weights than examples, and ``sine``, $w^2 + 3\sin^2 w$ (Karimi et al. 2016,
$\beta = 8$, $\mu = 1/32$), which is not convex. ``quartic``, the sum of $w^4/4$, does not: its
gradient vanishes faster than the loss. SAM with normalisation runs on ``squares``, to the floor
where it bounces.

All in float64; rates and radii in units of the curvature, so that no scale is left to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one

ZHOU = Source("Zhou et al. 2025", "after")
SI_YUN = Source("Si & Yun 2023", "after")
DERIVED = Source("derived here", "ours")

RIDGE = 2.0
"""Where the valley ends, in units of half of its half-width."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        valleys: runs for each radius, each with its own learning rate and start.
        rates: learning rate over 1/h, from and to.
        radii: of SAM in the valley, in units of half its half-width; 0 is gradient descent.
        steps: in the valley.
        examples, dim: of the regression.
        rate, radius: learning rate and radius of `settling`, over 1/beta.
        floors: radii of SAM as it is used.
        most: steps of `settling`, which ends earlier once the loss has fallen by `depth`.
        depth: share of the first loss.
        moments: at which the loss is kept, evenly spaced in log step.
    """

    valleys: int = 500
    rates: tuple[float, float] = (1.0, 2.0)
    radii: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
    steps: int = 500
    examples: int = 20
    dim: int = 40
    rate: float = 0.2
    radius: float = 0.1
    floors: tuple[float, ...] = (0.01, 0.03, 0.1)
    most: int = 4000
    depth: float = 1e-10
    moments: int = 40


LAPTOP = Config()
# There is no scale of the paper's here; this one is only larger.
PAPER = Config(valleys=5000, steps=5000, examples=100, dim=300, most=40_000)


# --- the valley -----------------------------------------------------------------------------------


def slope(w: Any) -> Any:
    """L' of the valley, in units of the curvature at its minimum."""
    return RIDGE / math.pi * np.sin(math.pi * w / RIDGE)


def valley_step(w: Any, rate: Any, radius: float) -> Any:
    """One step of SAM as it is used: in one dimension g/|g| is a sign."""
    return w - rate * slope(w + radius * np.sign(slope(w)))


def valley(config: Config, cell: Cell) -> dict[str, Any]:
    """Runs from random starts in half of the valley, with random rates at which descent stays.

    Returns:
        For each radius: ``radius``; ``farthest`` |w| of all runs and steps; ``left``, the share of
        runs that were beyond the ridge; ``away``, the share that end farther from the minimum than
        a thousandth.
    """
    rng = np.random.default_rng(cell.seed)
    rates = rng.uniform(*config.rates, config.valleys)
    starts = rng.uniform(-RIDGE / 2, RIDGE / 2, config.valleys)
    rows = []
    for done, radius in enumerate(config.radii, start=1):
        w = starts
        farthest = np.abs(w)
        for _ in range(config.steps):
            w = valley_step(w, rates, radius)
            farthest = np.maximum(farthest, np.abs(w))
        away = np.abs(w) > 1e-3
        rows.append((radius, farthest.max(), (farthest > RIDGE).mean(), away.mean()))
        cell.tick(done, len(config.radii))
    return dict(zip(("radius", "farthest", "left", "away"), np.transpose(rows), strict=True))


# --- settling -------------------------------------------------------------------------------------


class Toy(NamedTuple):
    """A loss, its gradient, a start, the largest curvature on the way, and the constant of PL."""

    loss: Callable[[np.ndarray], float]
    gradient: Callable[[np.ndarray], np.ndarray]
    start: np.ndarray
    beta: float
    mu: float


def toy(name: str, config: Config, seed: int) -> Toy:
    """The loss "squares", "sine" or "quartic".

    Raises:
        ValueError: another name.
    """
    rng = np.random.default_rng(seed)
    if name == "squares":
        x = rng.normal(size=(config.examples, config.dim))
        x /= np.linalg.norm(x, 2)
        eigenvalues = np.linalg.svd(x, compute_uv=False) ** 2
        return Toy(
            lambda w: float(0.5 * np.sum((x @ w) ** 2)),
            lambda w: x.T @ (x @ w),
            rng.normal(size=config.dim),
            float(eigenvalues[0]),
            float(eigenvalues[-1]),
        )
    if name == "sine":
        return Toy(
            lambda w: float(np.sum(w**2 + 3 * np.sin(w) ** 2)),
            lambda w: 2 * w + 3 * np.sin(2 * w),
            rng.uniform(2, 5, size=1),
            8.0,
            1 / 32,
        )
    if name == "quartic":  # its curvature is largest at the start
        start = rng.uniform(0.5, 1, size=config.examples)
        return Toy(
            lambda w: float(np.sum(w**4) / 4), lambda w: w**3, start, 3 * start.max() ** 2, 0.0
        )
    raise ValueError(f'loss must be "squares", "sine" or "quartic", got {name!r}')


def secured(beta: float, mu: float, rate: float, radius: float) -> float:
    """The factor 1 - 2 mu c by which a step makes the loss smaller at least.

    Args:
        rate, radius: over 1/beta.
    """
    return 1 - 2 * mu / beta * (rate * (1 - radius) - rate**2 * (1 + radius) ** 2 / 2)


def settling(config: Config, cell: Cell) -> dict[str, Any]:
    """One loss, with the rule without normalisation, or with SAM and each of the `floors`.

    Returns:
        Without normalisation: ``step`` and ``loss``, at some moments; ``worst``, the largest factor
        of a step, and ``secured``; ``last_decade`` and ``decade_before``, the steps of the last
        factor of ten and of the one before. For SAM: ``radius``, and ``floor``, the median loss of
        the last tenth of the steps.
    """
    loss, gradient, start, beta, mu = toy(cell["loss"], config, cell.seed)
    rate = config.rate / beta
    if cell["rule"] == "sam":
        floors = []
        for done, radius in enumerate(config.floors, start=1):
            w, last = start, []
            for step in range(config.most):
                g = gradient(w)
                w = w - rate * gradient(w + radius * g / np.linalg.norm(g))
                if step >= 0.9 * config.most:
                    last.append(loss(w))
            floors.append(float(np.median(last)))
            cell.tick(done, len(config.floors))
        return {"radius": np.array(config.floors), "floor": np.array(floors)}
    w, losses = start, [loss(start)]
    while len(losses) <= config.most and losses[-1] > config.depth * losses[0]:
        w = w - rate * gradient(w + config.radius / beta * gradient(w))
        losses.append(loss(w))
    values = np.array(losses)
    kept = np.unique(np.geomspace(1, len(values) - 1, config.moments).round().astype(int))
    last_decade, decade_before = _decades(values)
    cell.tick(1, 1)
    return {
        "step": kept,
        "loss": values[kept],
        "worst": float((values[1:] / values[:-1]).max()),
        "secured": secured(beta, mu, config.rate, config.radius),
        "last_decade": last_decade,
        "decade_before": decade_before,
    }


def _decades(losses: np.ndarray) -> tuple[float, float]:
    """Steps of the last factor of ten of a falling loss, and of the one before it.

    Between two steps the loss is interpolated in the logarithm.
    """
    levels = np.log10(losses)
    steps = np.arange(len(levels))
    ends = [float(np.interp(-(levels[-1] + decade), -levels, steps)) for decade in (0.0, 1.0, 2.0)]
    return ends[0] - ends[1], ends[1] - ends[2]


# --- what the runs decide -------------------------------------------------------------------------

NEAR = 0.5  # radius up to which a run is said to stay, in units of half the valley's half-width


def _valley(runs: SeedRuns) -> Run:
    return runs.one(study="valley")


def _inside(runs: SeedRuns) -> list[Run]:
    """The losses that obey PL."""
    return [
        runs.one(study="settling", loss=loss, rule="unnormalized") for loss in ("squares", "sine")
    ]


def _slowing(run: Run) -> float:
    """Steps of the last factor of ten of the loss over those of the one before.

    It is 1 where the loss falls exponentially, and the pth root of 10 where it falls like 1/t^p.
    """
    return run.value("last_decade") / run.value("decade_before")


@claim(ZHOU, high=2.0)
def stays_in_the_valley(runs: SeedRuns) -> float:
    """In a valley of one parameter, SAM that starts in the inner half of the valley never leaves
    it, at radii up to a quarter of the valley's half-width: farthest point over half of the
    half-width"""
    run = _valley(runs)
    return float(run["farthest"][(run["radius"] > 0) & (run["radius"] <= NEAR)].max())


@claim(DERIVED, low=0.95)
def leaves_the_minimum(runs: SeedRuns) -> float:
    """In the same valley SAM does leave the minimum at which gradient descent comes to rest: share
    of runs that end away from it, SAM's at the smallest radius less gradient descent's"""
    run = _valley(runs)
    return float(run["away"][1] - run["away"][0])


@claim(CONTROL, low=0.1, domain="share")
def a_wide_radius_leaves(runs: SeedRuns) -> float:
    """A radius that reaches beyond the ridge does carry SAM out of the valley: share of the runs at
    the largest radius that leave it"""
    return float(_valley(runs)["left"][-1])


@claim(DERIVED, high=1.0)
def the_bound_holds(runs: SeedRuns) -> float:
    """Where the inequality of Polyak and Łojasiewicz holds, every step of the unnormalised rule
    makes the loss smaller by at least the derived factor: largest factor of a step over it, at the
    loss where largest"""
    return max(run.value("worst") / run.value("secured") for run in _inside(runs))


@claim(ZHOU, 0.9, 1.1)
def exponential_inside(runs: SeedRuns) -> float:
    """Where the inequality of Polyak and Łojasiewicz holds, the loss of the unnormalised rule falls
    exponentially: steps of its last factor of ten over those of the factor of ten before, at the
    loss where farthest from 1"""
    return farthest_from_one(map(_slowing, _inside(runs)))


@claim(CONTROL, low=2.0)
def slower_outside(runs: SeedRuns) -> float:
    """Where the inequality of Polyak and Łojasiewicz fails, at a quartic minimum, the loss falls
    ever more slowly: steps of its last factor of ten over those of the factor of ten before"""
    return _slowing(runs.one(study="settling", loss="quartic", rule="unnormalized"))


@claim(SI_YUN, 1.9, 2.1)
def sam_stops_at_a_floor(runs: SeedRuns) -> float:
    """SAM with normalised perturbations does not converge even where the inequality holds: its loss
    stops at a floor that is proportional to the square of the radius, exponent of the radius"""
    run = runs.one(study="settling", loss="squares", rule="sam")
    return float(np.polyfit(np.log(run["radius"]), np.log(run["floor"]), 1)[0])


CLAIMS = [
    stays_in_the_valley,
    leaves_the_minimum,
    a_wide_radius_leaves,
    the_bound_holds,
    exponential_inside,
    slower_outside,
    sam_stops_at_a_floor,
]


def _settlings(_: Config) -> list[Setting]:
    unnormalized = [
        {"loss": loss, "rule": "unnormalized"} for loss in ("squares", "sine", "quartic")
    ]
    return [*unnormalized, {"loss": "squares", "rule": "sam"}]


STUDIES = Studies(
    Study("valley", lambda _: [{}], valley),
    Study("settling", _settlings, settling),
)

EXPERIMENT = Experiment(
    name="late_toys",
    title="Late SAM in toys of its theory: one valley, and convergence under PL",
    source="Zhou et al. 2025 (arXiv:2410.10373), section 4: one-parameter valley, convergence "
    "under smoothness and PL; constants derived here",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
