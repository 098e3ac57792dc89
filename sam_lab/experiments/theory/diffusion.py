r"""How far the diffusion limit carries: SAM, its unnormalised rule and SGD on a noisy quadratic.

Compagnoni et al. (2023) derive stochastic differential equations (SDEs) whose laws approximate the
steps of SAM, with an error that scales with the learning rate. On the loss $\lambda w^2/2$, with a
Gaussian noise of standard deviation s added to the gradient, the same in both passes of a step, all
can be written down. The unnormalised rule, $\epsilon = \rho g$, takes
$w' = w - \eta\,(1 + \rho\lambda)(\lambda w + s\xi)$, and its stationary variance is

$$\frac{\eta\,(1 + \rho\lambda)\,s^2}{\lambda\,(2 - a)}, \qquad a = \eta\lambda(1 + \rho\lambda),$$

exactly. Its SDE has the same drift and the noise $\sqrt\eta\,(1 + \rho\lambda) s$ a unit of time.
Its variance has 2 in place of $2 - a$. So the SDE is short by the factor $1 - a/2$. It knows
nothing of the edge $a = 2$, where the steps diverge. With $\rho = 0$ this is SGD.

SAM, $\epsilon = \rho\,g/|g|$, steps along
$\lambda w + s\xi + \rho\lambda \operatorname{sgn}(\lambda w + s\xi)$. The SDE that is taken for it
has the mean of this for its drift and the variance of this
for its noise; its stationary density in one dimension is an integral, done here on a grid. The
steps are simulated, many walkers at once.

Also measured: the loss in the unit of SGD's (on a fixed quadratic SAM cannot flatten anything, so
that it only costs), and the unnormalised rule with a noise drawn afresh for the second pass, as of
another batch, which is another process.

All in float64; lengths in units of s/lambda, learning rates over 1/lambda. The criteria were set
before the first run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting

__all__ = [
    "exact_variance",
    "sam_sde_variance",
    "sde_variance",
    "sign_mean",
    "simulated_variance",
]

# Its abstract: the SDEs approximate the algorithms in a weak sense, linearly in the learning rate.
COMPAGNONI = Source("Compagnoni et al. 2023", "paper")
DERIVED = Source("derived here", "ours")

RULES = ("sgd", "unnormalized", "sam", "fresh")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        lrs: learning rates, over 1/lambda, ascending.
        radius: of the unnormalised rule, rho over 1/lambda; of SAM, rho over s/lambda.
        walkers: at once.
        warmup, times: relaxation times before, and during, the average; one is 1/(lr lambda) steps.
    """

    lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.2)
    radius: float = 0.5
    walkers: int = 20_000
    warmup: float = 10.0
    times: float = 40.0


LAPTOP = Config()
PAPER = Config(lrs=(0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2), walkers=100_000, times=100.0)


def exact_variance(lr: float, rho: float) -> float:
    """Stationary variance of the unnormalised rule, in units of (s/lambda)^2.

    Raises:
        ValueError: there is none: lr (1 + rho) is 2 or more.
    """
    felt = lr * (1 + rho)
    if felt >= 2:
        raise ValueError(f"lr * (1 + rho) must be below 2, got {felt:g}")
    return felt / (2 - felt)


def sde_variance(lr: float, rho: float) -> float:
    """Stationary variance of its SDE, in the same units."""
    return lr * (1 + rho) / 2


def sign_mean(w: np.ndarray) -> np.ndarray:
    """Mean of the sign of w + xi, for a standard Gaussian xi."""
    found: np.ndarray = torch.erf(torch.from_numpy(w) / math.sqrt(2)).numpy()
    return found


def sam_sde_variance(lr: float, rho: float) -> float:
    """Stationary variance of the SDE of SAM, in the same units.

    The density of dw = -b(w) dt + sqrt(lr D(w)) dB in one dimension is proportional to
    exp(-2 int b / (lr D)) / D.
    """
    end = 12 * math.sqrt(lr) + 4 * rho
    w = np.linspace(0, end, 40_001)
    sign = sign_mean(w)
    # mean of xi times the sign of w + xi
    along = 2 * np.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
    drift = w + rho * sign
    spread = 1 + 2 * rho * along + rho**2 * (1 - sign**2)
    slope = 2 * drift / (lr * spread)
    step = w[1] - w[0]
    exponent = np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) * step / 2)])
    density = np.exp(-exponent) / spread
    density[[0, -1]] /= 2  # the trapezoidal rule
    return float((w**2 * density).sum() / density.sum())


def simulated_variance(
    rule: str, lr: float, rho: float, config: Config, rng: np.random.Generator
) -> tuple[float, float]:
    """Stationary variance of the steps, and its standard error.

    Args:
        rule: one of `RULES`; "fresh" is the unnormalised rule with another noise in its second
            pass, "sgd" has no second pass.
    """
    w = rng.standard_normal(config.walkers) * math.sqrt(lr)
    warmup, steps = (math.ceil(time / lr) for time in (config.warmup, config.times))
    sums = np.zeros(config.walkers)
    for step in range(warmup + steps):
        xi = rng.standard_normal(config.walkers)
        g = w + xi
        if rule == "sam":
            g = g + rho * np.sign(g)
        elif rule == "unnormalized":
            g = (1 + rho) * g
        elif rule == "fresh":
            g = w + rho * g + rng.standard_normal(config.walkers)
        w = w - lr * g
        if step >= warmup:
            sums += w * w
    means = sums / steps  # of each walker: independent of the others
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(config.walkers))


def run(config: Config, cell: Cell) -> Columns:
    """One rule at each learning rate.

    Columns: ``lr``; ``variance`` and its ``stderr``, measured; ``sde``, that of the SDE; ``exact``,
    where it is known, else NaN.
    """
    rule, rows = cell["rule"], Rows()
    rho = 0.0 if rule == "sgd" else config.radius
    for done, lr in enumerate(config.lrs, start=1):
        rng = np.random.default_rng([cell.seed, RULES.index(rule), done])
        variance, stderr = simulated_variance(rule, lr, rho, config, rng)
        sde: Callable[[float, float], float] = sam_sde_variance if rule == "sam" else sde_variance
        known = rule in ("sgd", "unnormalized")
        rows.add(
            lr=lr,
            variance=variance,
            stderr=stderr,
            sde=sde(lr, rho),
            exact=exact_variance(lr, rho) if known else math.nan,
        )
        cell.tick(done, len(config.lrs))
    return rows.columns


# --- what the runs decide -------------------------------------------------------------------------


def _order(run: Run) -> float:
    """Slope of the logarithm of the SDE's relative error against that of the learning rate."""
    error = np.abs(1 - run["sde"] / run["variance"])
    return float(np.polyfit(np.log(run["lr"]), np.log(error), 1)[0])


@claim(CONTROL, high=4.0)
def steps_have_the_exact_variance(runs: SeedRuns) -> float:
    """The stationary variance of SGD and of the unnormalised rule on a noisy quadratic is the
    derived one: distance in standard errors of the simulation, at the rule and learning rate where
    it is largest"""
    both = [runs.one(rule=rule) for rule in ("sgd", "unnormalized")]
    return max(
        float(np.max(np.abs(run["variance"] - run["exact"]) / run["stderr"])) for run in both
    )


@claim(COMPAGNONI, 0.9, 1.1)
def first_order_unnormalized(runs: SeedRuns) -> float:
    """The error of the SDE of the unnormalised rule is of first order in the learning rate: slope
    of the logarithm of the relative error of its stationary variance, over that of the steps,
    against the logarithm of the learning rate"""
    return _order(runs.one(rule="unnormalized"))


@claim(COMPAGNONI, 0.8, 1.2)
def first_order_sam(runs: SeedRuns) -> float:
    """The error of the SDE of SAM is of first order in the learning rate: slope of the logarithm of
    the relative error of its stationary variance, over that of the steps, against the logarithm of
    the learning rate"""
    return _order(runs.one(rule="sam"))


@claim(DERIVED, high=0.2, domain="positive")
def no_edge_in_the_sde(runs: SeedRuns) -> float:
    """The SDE does not know the edge: its stationary variance over that of the steps, of the
    unnormalised rule at nine tenths of its largest stable learning rate"""
    run = runs.one(rule="unnormalized")
    return float(run["sde"][-1] / run["variance"][-1])


@claim(DERIVED, low=1.3, domain="positive")
def flatness_has_no_use_here(runs: SeedRuns) -> float:
    """On a fixed quadratic the unnormalised rule of SAM only raises the stationary loss: loss over
    that of SGD at the smallest learning rate"""
    return float(runs.one(rule="unnormalized")["variance"][0] / runs.one(rule="sgd")["variance"][0])


@claim(CONTROL, high=0.9, domain="positive")
def both_passes_share_the_noise(runs: SeedRuns) -> float:
    """It matters that both passes of a step see the same noise: stationary variance with a noise
    drawn afresh for the second pass over that with the same, at the smallest learning rate"""
    return float(
        runs.one(rule="fresh")["variance"][0] / runs.one(rule="unnormalized")["variance"][0]
    )


CLAIMS = [
    steps_have_the_exact_variance,
    first_order_unnormalized,
    first_order_sam,
    no_edge_in_the_sde,
    flatness_has_no_use_here,
    both_passes_share_the_noise,
]


def settings(_: Config) -> list[Setting]:
    """Each of the rules."""
    return [{"rule": rule} for rule in RULES]


EXPERIMENT = Experiment(
    name="diffusion",
    title="How far the diffusion limit of SAM carries: a noisy quadratic",
    source="Compagnoni et al. 2023 (arXiv:2301.08203); stationary laws derived here",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
