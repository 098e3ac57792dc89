r"""Bias and variance: SAM where nothing can be flattened, on linear and kernel regression.

On least squares the Hessian $\Sigma = \Phi^\top\Phi/n$ is the same everywhere, so no method finds a
flatter place. SAM still differs from gradient descent. Behdin & Mazumder 2023 (arXiv:2302.11836,
version 2) study it there, stopped early. With a perturbation that is not normalised,
$\epsilon = \rho g$, a step is

$$\theta' = \theta - \eta\,(I + \rho\Sigma)\,g, \qquad g = \Sigma\theta - \Phi^\top y/n ,$$

that is, gradient descent with the learning rate $\eta(1 + \rho\lambda)$ along the eigenvector of
$\lambda$. After $t$ steps from 0 the fitted values along it are those of the data times

$$f_t(\lambda) = 1 - \bigl(1 - \eta\lambda(1 + \rho\lambda)\bigr)^t .$$

For labels $y = \Phi\theta^* + \sigma\xi$, the expected squared error of the $n$ fitted values is
(derived here), with $c_k$ the coefficients of $\Phi\theta^*/\sqrt n$ in the eigenvectors,

$$\underbrace{\sum_k (1 - f_t(\lambda_k))^2\, c_k^2}_{\text{bias}^2}
  + \underbrace{\frac{\sigma^2}{n} \sum_k f_t(\lambda_k)^2}_{\text{variance}} .$$

As long as $\eta\lambda(1 + \rho\lambda) \le 1$, SAM's $f_t$ is the larger, so after as many steps
its bias is lower and its variance higher. **The control** is gradient descent with the learning
rate $\eta(1 + \rho\lambda_1)$, which equals SAM's along the largest eigenvalue $\lambda_1$ and is
larger along all others.

Two problems: ``linear``, Gaussian features with the variances 1, 1/2, 1/3, ..., and ``kernel``, a
Gaussian kernel on points between 0 and 1, whose features are the square root of the kernel matrix.
The steps are really taken, for many draws of the noise at once, and set beside the formulas. All in
float64. The criteria were set before the first run. After it, the noise came in opposite pairs and
in more draws, as its mean had been too rough to tell a small bias from none: the two claims that
set the formulas beside what is seen count as set after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_lab._checks import check_nonnegative, check_positive
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one

__all__ = [
    "METHODS",
    "PROBLEMS",
    "Config",
    "Problem",
    "bias_and_variance",
    "fitted",
    "problem",
    "rates",
    "simulated",
    "step",
]

Floats = NDArray[np.float64]
PROBLEMS = ("linear", "kernel")
METHODS = ("descent", "sam", "matched")
"""Gradient descent, SAM without normalisation, and descent matched to it at the top eigenvalue."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        examples, features: n, and how many features the linear problem has.
        width: standard deviation of the Gaussian kernel.
        noise: sigma, of the labels; the true values have mean square 1.
        lr, rho: learning rate and radius, both times the largest eigenvalue.
        early: steps of the comparison after stopping early.
        steps: measured after so many, ascending; `early` is one of them.
        draws: of the noise, an even number.
    """

    examples: int = 60
    features: int = 40
    width: float = 0.1
    noise: float = 0.5
    lr: float = 0.4
    rho: float = 1.0
    early: int = 5
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    draws: int = 2000


LAPTOP = Config()
PAPER = Config(examples=500, features=200, draws=4000)


@dataclass(frozen=True)
class Problem:
    """Features (n, p), the true values at the examples, (n,), and where these are.

    Attributes:
        x: points between 0 and 1, ascending, of the kernel problem; None of the linear one.
    """

    phi: Floats
    truth: Floats
    x: Floats | None = None

    def spectrum(self) -> tuple[Floats, Floats]:
        """Eigenvalues (n,) of phi phi'/n, ascending, and squared coefficients of truth/sqrt(n)."""
        n = len(self.phi)
        eigenvalues, vectors = np.linalg.eigh(self.phi @ self.phi.T / n)
        return np.maximum(eigenvalues, 0), np.square(vectors.T @ self.truth) / n


def problem(name: str, config: Config, seed: int) -> Problem:
    """One of `PROBLEMS`.

    Raises:
        ValueError: another name.
    """
    if name not in PROBLEMS:
        raise ValueError(f"name must be one of {', '.join(PROBLEMS)}, got {name!r}")
    rng = np.random.default_rng([seed, PROBLEMS.index(name)])
    n = config.examples
    x = None
    if name == "linear":
        scales = np.arange(1, config.features + 1) ** -0.5
        phi = rng.standard_normal((n, config.features)) * scales
        truth = phi @ rng.standard_normal(config.features)
    else:
        x = np.sort(rng.random(n))
        kernel = np.exp(-np.square((x[:, None] - x) / config.width) / 2)
        eigenvalues, vectors = np.linalg.eigh(kernel)
        phi = vectors * np.sqrt(np.maximum(eigenvalues, 0)) @ vectors.T
        truth = np.sin(2 * np.pi * x) + np.sin(6 * np.pi * x) / 2
    return Problem(phi, truth / np.sqrt(np.square(truth).mean()), x)


def rates(method: str, top: float, lr: float, rho: float) -> tuple[float, float]:
    """Learning rate and radius of one of `METHODS`, for a largest eigenvalue `top`.

    Args:
        lr, rho: both times the largest eigenvalue.

    Raises:
        ValueError: another method; a largest eigenvalue or learning rate that is not above 0, or a
            negative radius.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    top, lr = check_positive("top", top), check_positive("lr", lr)
    rho = check_nonnegative("rho", rho)
    if method == "sam":
        return lr / top, rho / top
    return lr * (1 + rho if method == "matched" else 1) / top, 0.0


def fitted(eigenvalues: Floats, lr: float, rho: float, steps: int) -> Floats:
    """f: what share of the data's coefficient along each eigenvector is fitted after the steps."""
    found: Floats = 1 - (1 - lr * eigenvalues * (1 + rho * eigenvalues)) ** steps
    return found


def bias_and_variance(
    task: Problem, noise: float, lr: float, rho: float, steps: int
) -> tuple[float, float]:
    """Squared bias and variance of the fitted values, mean over examples, in closed form."""
    eigenvalues, squares = task.spectrum()
    f = fitted(eigenvalues, lr, rho, steps)
    return float((np.square(1 - f) * squares).sum()), float(noise**2 * np.square(f).mean())


def step(theta: Floats, phi: Floats, y: Floats, lr: float, rho: float) -> Floats:
    """One step of SAM without normalisation on half the mean squared error.

    Args:
        theta: weights (p, draws).
        phi, y: features (n, p) and labels (n, draws).
        lr, rho: learning rate and radius; gradient descent where rho is 0.
    """

    def gradient(weights: Floats) -> Floats:
        found: Floats = phi.T @ (phi @ weights - y) / len(phi)
        return found

    g = gradient(theta)
    return theta - lr * (gradient(theta + rho * g) if rho else g)


def simulated(
    task: Problem, config: Config, lr: float, rho: float, rng: np.random.Generator
) -> tuple[list[float], list[float]]:
    """Squared bias and variance at each of the steps, from many draws of the noise.

    Every draw comes with its opposite. The fitted values are linear in the noise, so their mean
    over draws is that without noise.
    """
    noise = config.noise * rng.standard_normal((len(task.truth), config.draws // 2))
    y = task.truth[:, None] + np.concatenate([noise, -noise], axis=1)
    theta = np.zeros((task.phi.shape[1], y.shape[1]))
    biases, variances, done = [], [], 0
    for wanted in config.steps:
        for _ in range(wanted - done):
            theta = step(theta, task.phi, y, lr, rho)
        done = wanted
        values = task.phi @ theta
        biases.append(float(np.square(values.mean(1) - task.truth).mean()))
        variances.append(float(values.var(axis=1).mean()))
    return biases, variances


def settings(config: Config) -> list[Setting]:
    """Each problem with each method."""
    return [{"problem": name, "method": method} for name in PROBLEMS for method in METHODS]


def run(config: Config, cell: Cell) -> Columns:
    """One problem and method, by formula and by taking the steps.

    Columns, after each of ``step``: ``bias`` (squared) and ``variance`` by the formula,
    ``bias_seen`` and ``variance_seen`` from draws of the noise; ``lr`` and ``rho``, of length 1.
    """
    task = problem(cell["problem"], config, cell.seed)
    top = float(task.spectrum()[0][-1])
    lr, rho = rates(cell["method"], top, config.lr, config.rho)
    rng = np.random.default_rng([cell.seed, len(PROBLEMS) + METHODS.index(cell["method"])])
    seen = simulated(task, config, lr, rho, rng)
    closed = [bias_and_variance(task, config.noise, lr, rho, steps) for steps in config.steps]
    return {
        "step": list(config.steps),
        "bias": [bias for bias, _ in closed],
        "variance": [variance for _, variance in closed],
        "bias_seen": seen[0],
        "variance_seen": seen[1],
        "lr": [lr],
        "rho": [rho],
    }


# --- what a run says -----------------------------------------------------------------------------


def _over(runs: SeedRuns, name: str, other: str) -> list[float]:
    """SAM's bias or variance over that of another method, at every step of both problems."""
    found: list[float] = []
    for each in PROBLEMS:
        sam, plain = (runs.one(problem=each, method=method) for method in ("sam", other))
        found.extend(sam[name] / plain[name])
    return found


def _errors(run: Run) -> Floats:
    """Bias and variance together, at every step."""
    return run["bias"] + run["variance"]


def _seen(runs: SeedRuns, name: str) -> float:
    """What was seen over the formula, where it is farthest from 1."""
    return farthest_from_one(
        float(ratio) for run in runs.runs for ratio in run[f"{name}_seen"] / run[name]
    )


# --- what the runs decide ------------------------------------------------------------------------

# The abstract of its version 2: lower bias than gradient descent, higher variance, and that SAM can
# therefore do better, specially if it is stopped early.
BEHDIN = Source("Behdin & Mazumder 2023, version 2", "paper")
DERIVED = Source("derived here", "ours")


@claim(DERIVED, 0.999, 1.001, domain="positive", set_after=True)
def formula_gives_the_bias(runs: SeedRuns) -> float:
    """The formula gives the squared bias of SAM and of gradient descent on least squares: seen over
    formula, at the step, method and problem where it is farthest from 1"""
    return _seen(runs, "bias")


@claim(DERIVED, 0.9, 1.1, domain="positive", set_after=True)
def formula_gives_the_variance(runs: SeedRuns) -> float:
    """The formula gives the variance of SAM and of gradient descent on least squares: seen over
    formula, at the step, method and problem where it is farthest from 1"""
    return _seen(runs, "variance")


@claim(BEHDIN, high=1.0, domain="positive", headline=True)
def sam_has_lower_bias(runs: SeedRuns) -> float:
    """On least squares SAM has a lower bias than gradient descent of the same learning rate after
    as many steps: squared bias over squared bias, at the step and problem where it is largest"""
    return max(_over(runs, "bias", "descent"))


@claim(BEHDIN, low=1.0, domain="positive")
def sam_has_higher_variance(runs: SeedRuns) -> float:
    """On least squares SAM has a higher variance than gradient descent of the same learning rate
    after as many steps: variance over variance, at the step and problem where it is smallest"""
    return min(_over(runs, "variance", "descent"))


@claim(BEHDIN, high=1.0, domain="positive")
def sam_is_better_stopped_early(runs: SeedRuns) -> float:
    """On least squares, after few steps, SAM has a smaller error than gradient descent of the same
    learning rate: error over error, in the problem where it is larger"""
    at = runs.config["steps"].index(runs.config["early"])
    pairs = (
        [runs.one(problem=name, method=method) for method in ("sam", "descent")]
        for name in PROBLEMS
    )
    return max(float(_errors(sam)[at] / _errors(plain)[at]) for sam, plain in pairs)


@claim(CONTROL, low=1.0, domain="positive", headline=True)
def matched_descent_has_lower_bias(runs: SeedRuns) -> float:
    """On least squares gradient descent whose learning rate is matched to SAM at the largest
    eigenvalue has a bias as low as SAM's, or lower: SAM's squared bias over that of descent, at the
    step and problem where it is smallest"""
    return min(_over(runs, "bias", "matched"))


@claim(CONTROL, high=1.0, domain="positive")
def matched_descent_has_higher_variance(runs: SeedRuns) -> float:
    """On least squares gradient descent whose learning rate is matched to SAM at the largest
    eigenvalue has a variance as high as SAM's, or higher: SAM's variance over that of descent, at
    the step and problem where it is largest"""
    return max(_over(runs, "variance", "matched"))


@claim(OURS, 0.9, 1.1, domain="positive", headline=True)
def best_stopping_levels_them(runs: SeedRuns) -> float:
    """On least squares, each stopped at the best of the steps measured, SAM and gradient descent of
    the same learning rate have about the same error: error over error, in the problem where it is
    farthest from 1"""
    return farthest_from_one(
        float(
            _errors(runs.one(problem=name, method="sam")).min()
            / _errors(runs.one(problem=name, method="descent")).min()
        )
        for name in PROBLEMS
    )


EXPERIMENT = Experiment(
    name="ridge",
    title="Bias and variance of SAM on least squares, where nothing can be flattened",
    source="after Behdin & Mazumder 2023 (arXiv:2302.11836v2)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        formula_gives_the_bias,
        formula_gives_the_variance,
        sam_has_lower_bias,
        sam_has_higher_variance,
        sam_is_better_stopped_early,
        matched_descent_has_lower_bias,
        matched_descent_has_higher_variance,
        best_stopping_levels_them,
    ],
)
