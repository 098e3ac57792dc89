r"""Where flat means simple: a matrix of low rank, from few measurements of a product of matrices.

A matrix $M$ of $d \times d$ is measured by $y_i = \langle A_i, M\rangle$, with Gaussian $A_i$ and
fewer measurements than entries. It is sought as a product $P = W_1 \cdots W_L$, with half the mean
squared error. Gatmiry et al. 2023 (arXiv:2306.13239) ask what a small trace of the Hessian means
there, and find that it goes with a small nuclear norm of $P$ (the sum of its singular values). At a
fit the Hessian is the Gauss-Newton matrix, and its trace is the mean over measurements of
$\sum_k \|(W_1 \cdots W_{k-1})^\top A_i\, (W_{k+1} \cdots W_L)^\top\|_F^2$. Its expectation over
Gaussian measurements, with AM-GM and Cauchy-Schwarz, obeys (derived here)

$$2d\,\|P\|_* \;\;(L = 2), \qquad 3\,d^{2/3}\,\|P\|_*^{4/3} \;\;(L = 3)$$

as lower bounds, which the balanced factors of $P$ reach. So the flattest fit is, as far as the
measurements are like new ones, the one of the smallest nuclear norm: that recovers a matrix of low
rank. A matrix of full rank has no small nuclear norm, and is the control.

Gradient descent fits the measurements. From there go three methods, with one measurement a step:
SGD, SAM (its perturbation is that of the measurement's own loss) and SGD with noise $\pm\sigma$ on
the measurement. Before each look a copy goes on by plain gradient descent until its training loss
is `level` or less, so that all are compared at an equal training loss. The error is
$\|P - M\|_F$, where $\|M\|_F = 1$.

Sizes, learning rate, radius and noise were chosen, and the criteria of the claims so marked were
set, after runs on one other draw. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_lab.experiments.critics import from_a_fit
from sam_lab.experiments.critics.from_a_fit import METHODS
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one

__all__ = ["METHODS", "Config", "floor", "gradient", "nuclear", "product", "trace"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        size, measurements: d, and how many measurements there are.
        depths: how many factors, 2 or 3.
        init: singular values of every factor at the start.
        lr, rho, noise: learning rate, radius of SAM, and size of the noise.
        steps, every: steps after the fit, and from one look to the next.
        fit_lr, level: gradient descent fits with this learning rate, to this training loss.
    """

    size: int = 10
    measurements: int = 60
    depths: tuple[int, ...] = (2, 3)
    init: float = 0.75
    lr: float = 0.01
    rho: float = 0.1
    noise: float = 0.5
    steps: int = 10_000
    every: int = 2000
    fit_lr: float = 0.2
    level: float = 1e-6


LAPTOP = Config()
PAPER = Config(size=30, measurements=400, lr=0.001, fit_lr=0.02, steps=500_000, every=50_000)

FIT_STEPS = 200_000  # at most


def product(factors: Floats) -> Floats:
    """P, the product of the factors (L, d, d) in their order."""
    found: Floats = factors[0]
    for factor in factors[1:]:
        found = found @ factor
    return found


def nuclear(matrix: Floats) -> float:
    """The sum of the singular values."""
    return float(np.linalg.norm(matrix, "nuc"))


def gradient(factors: Floats, measures: Floats, y: Floats) -> Floats:
    """Gradient of half the mean squared error in the factors, (L, d, d).

    Args:
        factors: (L, d, d).
        measures, y: A (n, d, d) and what was measured, (n,).
    """
    d = factors.shape[-1]
    flat = measures.reshape(len(y), -1)
    residual = flat @ product(factors).ravel() - y
    outer = (residual @ flat / len(y)).reshape(d, d)
    return np.stack([left.T @ outer @ right.T for left, right in _around(factors)])


def trace(factors: Floats, measures: Floats) -> float:
    """Trace of the Gauss-Newton matrix, which at a fit is the Hessian."""
    return sum(
        float(np.square(left.T @ measures @ right.T).sum((1, 2)).mean())
        for left, right in _around(factors)
    )


def floor(matrix: Floats, depth: int) -> float:
    """The smallest expected trace of a product of 2 or 3 factors that is this matrix (d, d).

    The expectation is over measurements with independent standard Gaussian entries.

    Raises:
        ValueError: another depth.
    """
    d, norm = len(matrix), nuclear(matrix)
    if depth == 2:
        return 2 * d * norm
    if depth == 3:
        return 3 * float((d * norm**2) ** (2 / 3))
    raise ValueError(f"depth must be 2 or 3, got {depth!r}")


def _around(factors: Floats) -> list[tuple[Floats, Floats]]:
    """The products of what stands to the left, and to the right, of each factor."""
    one = np.eye(factors.shape[-1])
    lefts, rights = [one], [one]
    for k in range(len(factors) - 1):
        lefts.append(lefts[-1] @ factors[k])
        rights.append(factors[-1 - k] @ rights[-1])
    return list(zip(lefts, reversed(rights), strict=True))


# --- what is run ---------------------------------------------------------------------------------


def settings(config: Config) -> list[Setting]:
    """Each depth with each method on a matrix of rank 1, and SAM on one of full rank."""
    return [
        *({"depth": L, "rank": 1, "method": m} for L in config.depths for m in METHODS),
        *({"depth": L, "rank": config.size, "method": "sam"} for L in config.depths),
    ]


def run(config: Config, cell: Cell) -> Columns:
    """One method from the fit of gradient descent.

    Columns, at the steps in ``step``: ``trace``, ``floor``, ``nuclear``, ``error`` and ``loss`` of
    the copy that went on by gradient descent; ``truth``, the nuclear norm of the matrix that was
    measured, of length 1.

    Raises:
        FloatingPointError: a run has diverged, or gradient descent has not reached `level`.
    """
    d, depth = config.size, cell["depth"]
    rng = np.random.default_rng([cell.seed, 1])
    measures = rng.standard_normal((config.measurements, d, d))
    truth = rng.standard_normal((d, cell["rank"])) @ rng.standard_normal((cell["rank"], d))
    truth /= np.linalg.norm(truth)
    y = measures.reshape(len(measures), -1) @ truth.ravel()
    start = rng.standard_normal((depth, d, d))
    factors = fitted(config, config.init * np.linalg.qr(start)[0], measures, y)
    rows = Rows()
    for at in range(config.steps + 1):
        if at % config.every == 0:
            copy = fitted(config, factors, measures, y)
            found = product(copy)
            rows.add(
                step=at,
                trace=trace(copy, measures),
                floor=floor(found, depth),
                nuclear=nuclear(found),
                error=float(np.linalg.norm(found - truth)),
                loss=_loss(copy, measures, y),
            )
            cell.tick(at, config.steps)
        if at < config.steps:
            i = rng.integers(len(y), size=1)
            factors = _step(cell["method"], factors, measures[i], y[i], config, rng)
    return {**rows.columns, "truth": [nuclear(truth)]}


def fitted(config: Config, factors: Floats, measures: Floats, y: Floats) -> Floats:
    """The first factors on the way of gradient descent whose training loss is `level` or less.

    Raises:
        FloatingPointError: gradient descent has diverged, or has not got there.
    """
    return from_a_fit.fitted(
        factors,
        lambda w: _loss(w, measures, y),
        lambda w: gradient(w, measures, y),
        config.fit_lr,
        config.level,
        FIT_STEPS,
    )


def _loss(factors: Floats, measures: Floats, y: Floats) -> float:
    residual = measures.reshape(len(y), -1) @ product(factors).ravel() - y
    return float(np.square(residual).mean() / 2)


def _step(
    method: str,
    factors: Floats,
    measure: Floats,
    y: Floats,
    config: Config,
    rng: np.random.Generator,
) -> Floats:
    """A step on one measurement."""
    return from_a_fit.step(
        method,
        factors,
        lambda w, labels: gradient(w, measure, labels),
        y,
        config.lr,
        config.rho,
        config.noise,
        rng,
    )


# --- what a run says -----------------------------------------------------------------------------


def _kept(run: Run, name: str) -> float:
    """The last value of a column over that of the fit of gradient descent."""
    return float(run[name][-1] / run[name][0])


def _low_rank(runs: SeedRuns, method: str) -> list[Run]:
    """The runs of this method on a matrix of rank 1, of every depth."""
    return runs.all(method=method, rank=1)


def _full_rank(runs: SeedRuns) -> list[Run]:
    """The runs of SAM on a matrix of full rank, of every depth."""
    return runs.all(method="sam", rank=runs.config["size"])


# --- what the runs decide ------------------------------------------------------------------------

# Its abstract: with the restricted isometry property, minimising the trace of the Hessian is
# approximately equivalent to minimising the Schatten 1-norm of the end-to-end matrix, which leads
# to better generalisation.
GATMIRY = Source("Gatmiry et al. 2023", "paper")


@claim(OURS, high=0.5, domain="positive", set_after=True)
def sam_flattens_the_factors(runs: SeedRuns) -> float:
    """From a fit of few measurements of a matrix of rank 1, SAM on one measurement a step at least
    halves the trace of the Hessian, at equal training loss: trace after over before, at the depth
    where it is largest"""
    return max(_kept(run, "trace") for run in _low_rank(runs, "sam"))


@claim(OURS, high=0.7, domain="positive", set_after=True)
def noise_flattens_the_factors(runs: SeedRuns) -> float:
    """From a fit of few measurements of a matrix of rank 1, SGD with noise on the measurements
    lowers the trace of the Hessian by at least 30%, at equal training loss: trace after over
    before, at the depth where it is largest"""
    return max(_kept(run, "trace") for run in _low_rank(runs, "label_noise"))


@claim(CONTROL, 0.95, 1.05, domain="positive")
def sgd_keeps_the_factors(runs: SeedRuns) -> float:
    """From a fit of few measurements of a matrix of rank 1, SGD without noise and without
    perturbation keeps the trace of the Hessian: trace after over before, at the depth where it is
    farthest from 1"""
    return farthest_from_one(_kept(run, "trace") for run in _low_rank(runs, "sgd"))


@claim(GATMIRY, 0.95, 1.05, domain="positive", headline=True, set_after=True)
def flat_has_the_least_nuclear_norm(runs: SeedRuns) -> float:
    """The flat fit of few measurements of a matrix of rank 1 has a nuclear norm as small as that of
    the matrix: nuclear norm after SAM over that of the matrix, at the depth where it is farthest
    from 1"""
    return farthest_from_one(
        float(run["nuclear"][-1]) / run.value("truth") for run in _low_rank(runs, "sam")
    )


@claim(OURS, 0.85, 1.15, domain="positive", set_after=True)
def trace_reaches_its_bound(runs: SeedRuns) -> float:
    """After SAM the trace of the Hessian is the smallest that Gaussian measurements give on average
    to a product with its nuclear norm: trace over that bound, at the depth where it is farthest
    from 1"""
    return farthest_from_one(
        float(run["trace"][-1] / run["floor"][-1]) for run in _low_rank(runs, "sam")
    )


@claim(GATMIRY, high=0.1, domain="positive", headline=True, set_after=True)
def flat_recovers_low_rank(runs: SeedRuns) -> float:
    """A matrix of rank 1 is recovered from few measurements by the flat fit: error after SAM over
    error of the fit of gradient descent, at the depth where it is largest"""
    return max(_kept(run, "error") for run in _low_rank(runs, "sam"))


@claim(CONTROL, low=0.3, domain="positive", headline=True, set_after=True)
def full_rank_is_not_recovered(runs: SeedRuns) -> float:
    """A matrix of full rank is not recovered from few measurements by the flat fit: error after SAM
    over the norm of the matrix, at the depth where it is smallest"""
    return min(float(run["error"][-1]) for run in _full_rank(runs))


@claim(OURS, high=0.95, domain="positive", set_after=True)
def flat_is_simpler_than_full_rank(runs: SeedRuns) -> float:
    """The flat fit of few measurements of a matrix of full rank has a smaller nuclear norm than the
    matrix itself, so that the matrix is not the flattest fit: nuclear norm after SAM over that of
    the matrix, at the depth where it is largest"""
    return max(float(run["nuclear"][-1]) / run.value("truth") for run in _full_rank(runs))


EXPERIMENT = Experiment(
    name="factorisation",
    title="A matrix from few measurements: a small trace is a small nuclear norm",
    source="after Gatmiry et al. 2023 (arXiv:2306.13239)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        sam_flattens_the_factors,
        noise_flattens_the_factors,
        sgd_keeps_the_factors,
        flat_has_the_least_nuclear_norm,
        trace_reaches_its_bound,
        flat_recovers_low_rank,
        full_rank_is_not_recovered,
        flat_is_simpler_than_full_rank,
    ],
)
