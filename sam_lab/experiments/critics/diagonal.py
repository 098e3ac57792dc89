r"""Where flatness does help: diagonal linear networks, and the control of a smaller initialisation.

A diagonal linear network predicts $y$ from $x \in R^d$ by $\beta \cdot x$ with $\beta = u \odot v$.
With few examples, $n < d$, many $\beta$ fit, and the sparse one is wanted. Andriushchenko &
Flammarion 2022 (arXiv:2206.06232) use it to ask what SAM adds to gradient descent. Their code
(tml-epfl/understanding-sam) has $n = 20$, $d = 30$, the start $u = u_0$, $v = 0$, and perturbations
that are *not* normalised: $\rho$ times the gradient of the loss over all examples, or, for each
example by itself, $\rho$ times the gradient of its own loss. (That loss is the full square there
and half of it here, so that a radius of 0.2 here is their 0.1.) Theirs is a single draw of the
data. Here are 20 draws a seed.

The loss is half the mean squared error. The outputs are linear in each weight, so the trace of the
Hessian is, at any weights,

$$\operatorname{tr} H = \sum_j s_j\,(u_j^2 + v_j^2) \;\ge\; 2 \sum_j s_j\,|\beta_j|,
  \qquad s_j = \frac1n \sum_i x_{ij}^2 .$$

So the flattest fit is the one of the smallest weighted 1-norm: here flat means sparse, because of
how $\beta$ is made of $u$ and $v$ (derived here).

**Why the start matters.** Gradient flow keeps every $u_j^2 - v_j^2$, which is $u_0^2$ at the start,
and the smaller $u_0$, the sparser the fit. With SAM for each example these differences shrink. Take
the root of what is left at the end, $\sqrt{|u_j^2 - v_j^2|}$, as the start of another run of
gradient descent, without any SAM: *the replay*. If it ends where SAM ended, then SAM was, as far as
its solution goes, a smaller start. Its control is a replay from the same value for all coordinates,
their root mean square.

Each draw goes on until its training loss is `level`, so all are compared at equal training loss.
The test error is $\tfrac12\|\beta - \beta^*\|^2$, the expected loss on Gaussian inputs. The radii
and the criteria of the claims so marked were chosen after pilots on other draws. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import Ratio

__all__ = ["METHODS", "Config", "Draws", "draws", "fit", "gradient", "left_of_start", "trace"]

Floats = NDArray[np.float64]
METHODS = ("descent", "full_batch", "one_example")
"""No perturbation; that of the loss over all examples; for each example that of its own loss."""

SMALLEST = 1e-6  # start of a replay


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        draws: data sets a seed.
        examples, inputs, relevant: n, d, and how many coordinates of the truth are not 0.
        lr: learning rate times d.
        init, small: start of u, and the smaller one of the control; v starts at 0.
        full_batch, one_example: radii of the two kinds of SAM.
        level, steps: the training loss at which a draw is done, and steps at most.
    """

    draws: int = 20
    examples: int = 20
    inputs: int = 30
    relevant: int = 3
    lr: float = 5.0
    init: float = 0.1
    small: float = 0.02
    full_batch: tuple[float, ...] = (0.1, 1.0)
    one_example: tuple[float, ...] = (0.06, 0.2)
    level: float = 1e-5
    steps: int = 50_000


LAPTOP = Config()
PAPER = Config(draws=100, level=1e-7, steps=500_000)


@dataclass(frozen=True)
class Draws:
    """Data sets side by side: x (s, n, d), y (s, n), and the true coefficients (d,)."""

    x: Floats
    y: Floats
    truth: Floats


def draws(config: Config, seed: int) -> Draws:
    """Gaussian inputs; labels without noise of a truth of length 1, equal where it is not 0."""
    rng = np.random.default_rng([seed, 0])
    x = rng.standard_normal((config.draws, config.examples, config.inputs))
    truth = np.zeros(config.inputs)
    truth[: config.relevant] = config.relevant**-0.5
    return Draws(x, x @ truth, truth)


def gradient(
    u: Floats, v: Floats, x: Floats, y: Floats, method: str = "descent", rho: float = 0.0
) -> tuple[Floats, Floats]:
    """What a step subtracts, over the learning rate, from u and from v, (s, d) each.

    Args:
        u, v: weights, (s, d).
        x, y: examples (s, n, d) and labels (s, n).
        method: one of `METHODS`.
        rho: radius; the perturbation is rho times the gradient, of half the squared error.

    Raises:
        ValueError: another method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    residual = (x @ (u * v)[..., None])[..., 0] - y
    if method == "one_example":
        back = rho * residual[..., None] * x  # (s, n, d)
        u_there, v_there = u[:, None] + back * v[:, None], v[:, None] + back * u[:, None]
        back = ((x * u_there * v_there).sum(-1) - y)[..., None] * x
        return (back * v_there).mean(1), (back * u_there).mean(1)
    n = x.shape[1]
    back = _transposed(x, residual) / n
    if method == "full_batch":
        u, v = u + rho * back * v, v + rho * back * u
        back = _transposed(x, (x @ (u * v)[..., None])[..., 0] - y) / n
    return back * v, back * u


def _transposed(x: Floats, residual: Floats) -> Floats:
    found: Floats = (residual[:, None] @ x)[:, 0]
    return found


def fit(
    data: Draws, config: Config, init: Floats | float, method: str = "descent", rho: float = 0.0
) -> tuple[Floats, Floats]:
    """u and v, (s, d) each, at the first step at which each draw's training loss is `level`.

    Args:
        init: u at the start, one number or (s, d); v is 0.

    Raises:
        FloatingPointError: a draw has diverged, or has not got there within `steps`.
    """
    s, _, d = data.x.shape
    u, v = np.array(np.broadcast_to(init, (s, d)), dtype=float), np.zeros((s, d))
    going = np.arange(s)
    x, y = data.x, data.y
    for _ in range(config.steps):
        error = np.square((x @ (u[going] * v[going])[..., None])[..., 0] - y).mean(1) / 2
        if not np.isfinite(error).all():
            raise FloatingPointError(f"{method} with rho {rho:g} has diverged")
        if (error <= config.level).any():
            going = going[error > config.level]
            x, y = data.x[going], data.y[going]
            if not len(going):
                return u, v
        along_u, along_v = gradient(u[going], v[going], x, y, method, rho)
        u[going] -= config.lr / d * along_u
        v[going] -= config.lr / d * along_v
    raise FloatingPointError(
        f"{method} with rho {rho:g}: {len(going)} of {s} draws have not reached a training loss of "
        f"{config.level:g} in {config.steps} steps"
    )


def trace(u: Floats, v: Floats, x: Floats) -> Floats:
    """Trace of the Hessian of each draw, (s,), at u and v, (s, d), on the examples (s, n, d)."""
    found: Floats = (np.square(x).mean(1) * (u * u + v * v)).sum(-1)
    return found


def left_of_start(u: Floats, v: Floats) -> Floats:
    """The start of u from which gradient flow, with v = 0, would have these u² - v², (s, d).

    It is at least `SMALLEST`: a coordinate that starts at 0 stays there.
    """
    return np.maximum(np.sqrt(np.abs(u * u - v * v)), SMALLEST)


def settings(config: Config) -> list[Setting]:
    """Descent, the two kinds of SAM with each radius, and descent from the smaller start."""
    return [
        {"method": "descent", "rho": 0.0, "init": config.init},
        *({"method": "full_batch", "rho": r, "init": config.init} for r in config.full_batch),
        *({"method": "one_example", "rho": r, "init": config.init} for r in config.one_example),
        {"method": "descent", "rho": 0.0, "init": config.small},
    ]


def run(config: Config, cell: Cell) -> Columns:
    """All draws of a seed under one method; for SAM for each example also its replays.

    Columns, one value a draw: ``test_error``, ``loss`` in training, ``norm`` (the 1-norm of beta),
    ``trace``, ``start`` (the root mean square of `left_of_start`). With replays also how far, in
    beta, SAM ended from descent (``to_descent``), from the replay (``to_replay``), and from that
    from the root mean square (``to_even``).

    Raises:
        FloatingPointError: see `fit`.
    """
    data = draws(config, cell.seed)
    method = cell["method"]
    u, v = fit(data, config, cell["init"], method, cell["rho"])
    beta, start = u * v, left_of_start(u, v)
    residual = (data.x @ beta[..., None])[..., 0] - data.y
    even = np.sqrt(np.square(start).mean(1, keepdims=True))
    columns = {
        "test_error": np.square(beta - data.truth).sum(1) / 2,
        "loss": np.square(residual).mean(1) / 2,
        "norm": np.abs(beta).sum(1),
        "trace": trace(u, v, data.x),
        "start": even[:, 0],
    }
    if method == "one_example":
        others = {"to_descent": cell["init"], "to_replay": start, "to_even": even}
        for name, init in others.items():
            u, v = fit(data, config, init)
            columns[name] = np.linalg.norm(u * v - beta, axis=1)
    return {name: values.tolist() for name, values in columns.items()}


# --- what a run says -----------------------------------------------------------------------------


def _descent(runs: SeedRuns, init: str = "init") -> Run:
    """Gradient descent from the start, or from the smaller one."""
    return runs.one(method="descent", init=runs.config[init])


def _below(run: Run, other: Run, name: str) -> float:
    """Share of draws in which the first has the smaller value, in %."""
    return float(100 * (run[name] < other[name]).mean())


def _largest(runs: SeedRuns) -> Run:
    """SAM for each example with its largest radius."""
    return runs.one(method="one_example", rho=max(runs.config["one_example"]))


# --- what the runs decide ------------------------------------------------------------------------

ANDRIUSHCHENKO = Source("Andriushchenko & Flammarion 2022", "after")


@claim(ANDRIUSHCHENKO, low=75.0, unit="%", domain="share", set_after=True)
def one_example_beats_descent(runs: SeedRuns) -> float:
    """On diagonal networks SAM whose perturbation is that of each example by itself has a smaller
    test error than gradient descent from the same start, at equal training loss: share of draws of
    the data, at the largest radius"""
    return _below(_largest(runs), _descent(runs), "test_error")


@claim(ANDRIUSHCHENKO, low=75.0, unit="%", domain="share", set_after=True)
def full_batch_beats_descent(runs: SeedRuns) -> float:
    """On diagonal networks SAM whose perturbation is that of the full batch has a smaller test
    error than gradient descent from the same start, at equal training loss: share of draws of the
    data, at the radius where it is largest"""
    full = runs.all(method="full_batch")
    return max(_below(run, _descent(runs), "test_error") for run in full)


@claim(CONTROL, low=75.0, unit="%", domain="share", headline=True, set_after=True)
def smaller_start_beats_both(runs: SeedRuns) -> float:
    """On diagonal networks gradient descent from a smaller start has a smaller test error than SAM
    from the larger one, at equal training loss: share of draws of the data, against the kind and
    radius of SAM against which it is smallest"""
    sams = [*runs.all(method="full_batch"), *runs.all(method="one_example")]
    return min(_below(_descent(runs, "small"), run, "test_error") for run in sams)


@claim(OURS, low=75.0, unit="%", domain="share", set_after=True)
def one_example_is_flatter(runs: SeedRuns) -> float:
    """On diagonal networks SAM whose perturbation is that of each example by itself ends flatter
    than gradient descent from the same start, at equal training loss: share of draws with the
    smaller trace, at the largest radius"""
    return _below(_largest(runs), _descent(runs), "trace")


@claim(OURS, low=75.0, unit="%", domain="share", set_after=True)
def one_example_is_sparser(runs: SeedRuns) -> float:
    """On diagonal networks SAM whose perturbation is that of each example by itself ends sparser
    than gradient descent from the same start, at equal training loss: share of draws with the
    smaller 1-norm of the coefficients, at the largest radius"""
    return _below(_largest(runs), _descent(runs), "norm")


@claim(OURS, high=0.5, domain="positive", set_after=True)
def one_example_shrinks_the_start(runs: SeedRuns) -> float:
    """On diagonal networks SAM whose perturbation is that of each example by itself ends as from a
    start of at most half the size: root mean square of the start that its weights speak of, over
    the start that it had, at the largest radius, median over draws"""
    return float(np.median(_largest(runs)["start"])) / float(runs.config["init"])


@claim(OURS, high=0.25, domain="positive", set_after=True)
def replay_ends_where_sam_ended(runs: SeedRuns) -> Ratio:
    """Gradient descent without SAM, from the start that the weights of SAM for each example speak
    of, ends where SAM ended: its distance from SAM's coefficients over that of gradient descent
    from SAM's own start, at the largest radius"""
    run = _largest(runs)
    return Ratio(float(run["to_replay"].mean()), float(run["to_descent"].mean()))


@claim(CONTROL, low=1.5, domain="positive", set_after=True)
def even_replay_misses(runs: SeedRuns) -> Ratio:
    """It matters which coordinates have how small a start: gradient descent from their root mean
    square ends farther from SAM's coefficients than from the start of each: distance over distance,
    at the largest radius"""
    run = _largest(runs)
    return Ratio(float(run["to_even"].mean()), float(run["to_replay"].mean()))


EXPERIMENT = Experiment(
    name="diagonal",
    title="Diagonal linear networks: SAM, and the control of a smaller initialisation",
    source="after Andriushchenko & Flammarion 2022 (arXiv:2206.06232) and their code",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        one_example_beats_descent,
        full_batch_beats_descent,
        smaller_start_beats_both,
        one_example_is_flatter,
        one_example_is_sparser,
        one_example_shrinks_the_start,
        replay_ends_where_sam_ended,
        even_replay_misses,
    ],
)
