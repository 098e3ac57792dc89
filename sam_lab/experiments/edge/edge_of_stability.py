r"""Gradient descent at the edge of stability: sharpness rises to 2/lr, and hovers there.

Full-batch gradient descent on real images, the sharpness (top Hessian eigenvalue) measured along
the way. The main runs vary the learning rate. The others are controls, each of which could have
come out differently:

* ``flow`` and ``blocked`` branch off a main run when its sharpness first passes 2/lr. ``flow``
  goes on with steps `config.substeps` times smaller (gradient flow, to the accuracy of interest).
  ``blocked`` keeps the learning rate, but takes the top `config.blocked` eigenvectors out of every
  step, so that nothing can oscillate along them. If the oscillation is what holds the sharpness
  down, both must sail past 2/lr.
* ``random`` and ``next`` branch off there too, and take as many *other* directions out of every
  step: random ones that stay the same, and the eigenvectors that come next after the first. If it
  is the oscillation along the first that matters, neither may let the sharpness rise.
* a small learning rate, a ReLU network and cross-entropy: where the edge is not reached in the
  given time, or not held.

Where the motion goes that repeats with period two is measured beside the sharpness. The second
difference of the weights over three iterates, w'' - 2 w' + w, is -lr times the change of the
gradient from the first step to the second. It is zero for a straight path at constant speed and
largest for one that jumps to and fro. The part of its squared length along the top eigenvector is
recorded all along, and at the end of a run the parts along many eigenvectors: the *census*.

The loss "mse" is 0.5 * sum over outputs, mean over examples (the convention of Cohen et al.).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one, second_half, second_half_median
from sam_lab.objective import Closure
from sam_lab.stability import gd_edge
from sam_lab.tracker import SharpnessTracker
from sam_lab.training import LossFn, squared_error

__all__ = [
    "BRANCHES",
    "CLAIMS",
    "EXPERIMENT",
    "LAPTOP",
    "PAPER",
    "Config",
    "branches",
    "carried_at_the_edge",
    "census",
    "clock",
    "control",
    "descend",
    "excess",
    "loss_and_gradient",
    "main_runs",
    "move",
    "problem",
    "random_directions",
    "ratio",
]

# What these papers say, as we read them. The criteria were set after pilots at other settings.
COHEN = Source("Cohen et al. 2021", "after")
DAMIAN = Source("Damian et al. 2022", "after")

BRANCHES = ("flow", "blocked", "random", "next")


@dataclass(frozen=True)
class Config:
    """What is run. Times are learning rate x steps, the clock of gradient flow.

    Attributes:
        data, images: data set and size of its class-balanced training subset.
        hidden: widths of the hidden layers.
        lrs: learning rates of the main runs.
        small_lr, relu_lr, cross_entropy_lr: learning rates of the three controls.
        time: length of the main runs; the small learning rate makes as many steps as the longest.
        control_time: length of the other two controls.
        branch_lr, branch_time: learning rate and length of ``flow`` and ``blocked``.
        substeps: steps of ``flow`` for one step of gradient descent.
        blocked: number of directions that ``blocked``, ``random`` and ``next`` take out.
        census: number of top eigenvectors among which the oscillation is split at the end of a run.
        every: steps from one measurement of the sharpness to the next.
        tol: largest relative residual of a measured eigenpair.
    """

    data: str = "mnist_5k"
    images: int = 500
    hidden: tuple[int, ...] = (64, 64, 64)
    lrs: tuple[float, ...] = (0.15, 0.2, 0.3)
    small_lr: float = 0.02
    relu_lr: float = 0.1
    cross_entropy_lr: float = 0.2
    time: float = 150.0
    control_time: float = 100.0
    branch_lr: float = 0.2
    branch_time: float = 20.0
    substeps: int = 20
    blocked: int = 4
    census: int = 20
    every: int = 10
    tol: float = 1e-2


LAPTOP = Config()
# The network, data and loss of the first command in the paper's code, at its learning rate and
# two larger ones.
PAPER = Config(
    data="cifar10",
    images=5000,
    hidden=(200, 200),
    lrs=(0.01, 0.02, 0.04),
    small_lr=0.002,
    relu_lr=0.01,
    cross_entropy_lr=0.02,
    time=300.0,
    control_time=300.0,
    branch_lr=0.02,
    branch_time=40.0,
    every=50,
)


def settings(config: Config) -> list[Setting]:
    """The main runs, the branches and the three controls."""

    def one(path: str, loss: str, activation: str, lr: float) -> Setting:
        return {"path": path, "loss": loss, "activation": activation, "lr": lr}

    main = [one("gd", "mse", "tanh", lr) for lr in config.lrs]
    branches = [one(path, "mse", "tanh", config.branch_lr) for path in BRANCHES]
    controls = [
        one("gd", "mse", "tanh", config.small_lr),
        one("gd", "mse", "relu", config.relu_lr),
        one("gd", "cross-entropy", "tanh", config.cross_entropy_lr),
    ]
    return main + branches + controls


def problem(
    config: Config,
    seed: int = 0,
    device: torch.device | str = "cpu",
    loss: str = "mse",
    activation: str = "tanh",
) -> tuple[Closure, list[Tensor]]:
    """The loss, a closure, and the parameters (initialised from `seed`) of one run.

    Images are standardised by `data.standardize`.

    Raises:
        ValueError: an unknown loss, activation or data set.
    """
    losses: dict[str, LossFn] = {"mse": squared_error, "cross-entropy": F.cross_entropy}
    if loss not in losses:
        raise ValueError(f'loss must be "mse" or "cross-entropy", got {loss!r}')
    dataset = data.load(config.data, train=config.images, seed=seed, device=device)
    x = data.standardize(dataset.x.flatten(1))
    sizes = (x.shape[1], *config.hidden, dataset.classes)
    model = models.mlp(sizes, activation, seed=seed, device=device)
    return lambda: losses[loss](model(x), dataset.y), list(model.parameters())


def loss_and_gradient(closure: Closure, params: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The loss and its gradient as one flat vector (P,)."""
    loss = closure()
    grads = torch.autograd.grad(loss, params)
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


@torch.no_grad()
def move(params: Sequence[Tensor], step: Tensor) -> None:
    """Add the flat vector `step` (P,) to the parameters, in place."""
    for param, part in zip(params, step.split([p.numel() for p in params]), strict=True):
        param += part.view_as(param)


def descend(
    closure: Closure,
    params: list[Tensor],
    lr: float,
    steps: int,
    *,
    every: int = 1,
    substeps: int = 1,
    k: int = 1,
    forbidden: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-2,
    stop: Callable[[float], bool] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Columns:
    """Gradient descent with the sharpness measured every `every` steps.

    Args:
        closure, params: the loss and what it is minimised over; `params` are moved in place.
        lr: learning rate; a step is made of `substeps` steps of `lr / substeps`.
        steps: number of steps; the last point is measured too.
        k: number of top eigenpairs measured.
        forbidden: gives the directions (P, m), orthonormal, that are taken out of a step, from the
            top eigenvectors (P, k) before it. They are measured before every step, then.
        tol: largest relative residual of the eigenpairs.
        stop: ends the run after a measurement whose sharpness it says yes to.
        tick: told after each step how many are done, and of how many.

    Returns:
        Columns, one entry a measurement: ``step``, ``loss``, ``sharpness`` (top Hessian
        eigenvalue), ``residual`` (of that eigenpair), ``along`` (the gradient's component along the
        top eigenvector), ``next_along`` (the same one step later, along the same vector; NaN at the
        end), ``share`` (of the squared length of the gradient's change to the next step, the part
        along the top eigenvector; NaN at the end), ``rises`` (share of the steps since the last
        measurement on which the loss rose).

    Raises:
        FloatingPointError: when the loss stops being finite.
    """
    tracker = SharpnessTracker(closure, params, k=k, tol=tol)
    rows, measured = Rows(), -1  # measured: the step of the last row
    top = last = torch.empty(0)  # the top eigenvector and the gradient there
    before, rises = math.inf, 0
    for step in range(steps + 1):
        due = step % every == 0 or step == steps
        pairs = tracker.measure() if due or forbidden else None
        if pairs is None:
            loss, grad = loss_and_gradient(closure, params)
        else:  # loss and gradient come with the measurement
            loss, grad = tracker.hessian.loss(), tracker.hessian.gradient()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {step} steps of lr={lr:g}")
        rises += loss > before
        before = loss
        if step and measured == step - 1:
            rows.columns["next_along"][-1] = float(top @ grad)
            rows.columns["share"][-1] = float((top @ (grad - last) / (grad - last).norm()) ** 2)
        if pairs is not None and due:
            top, last, sharpness = pairs.vectors[:, 0], grad, float(pairs.values[0])
            rows.add(
                step=step,
                loss=loss,
                sharpness=sharpness,
                residual=float(pairs.residuals[0]),
                along=float(top @ grad),
                next_along=math.nan,
                share=math.nan,
                rises=rises / (step - measured),
            )
            measured, rises = step, 0
            if stop is not None and stop(sharpness):
                break
        if step == steps:
            break
        if pairs is not None and forbidden:
            out = forbidden(pairs.vectors)
            grad = grad - out @ (out.T @ grad)
        move(params, -lr / substeps * grad)
        for _ in range(substeps - 1):
            move(params, -lr / substeps * loss_and_gradient(closure, params)[1])
        tick(step + 1, steps)
    return rows.columns


def census(closure: Closure, params: list[Tensor], lr: float, k: int, tol: float) -> Columns:
    """One more step of gradient descent, and how it oscillates, among many directions.

    Returns:
        ``census_value``, the `k` largest Hessian eigenvalues before the step, and
        ``census_share``: of the squared length of the gradient's change in the step, the part along
        each of their eigenvectors.
    """
    pairs = Hessian(closure, params).top(k, tol, max_hvps=600)
    before = loss_and_gradient(closure, params)[1]
    move(params, -lr * before)
    change = loss_and_gradient(closure, params)[1] - before
    parts = (pairs.vectors.T @ change / change.norm()).square()
    return {"census_value": pairs.values.tolist(), "census_share": parts.tolist()}


def random_directions(size: int, number: int, seed: int, like: Tensor) -> Tensor:
    """Orthonormal random directions (size, number), with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, number, generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(normal)[0]
    return orthonormal.to(like)


def run(config: Config, cell: Cell) -> Columns:
    """One run. Columns as `descend` and `census` give them; ``step`` counts from the start."""
    lr, path = cell["lr"], cell["path"]
    main = cell["loss"] == "mse" and cell["activation"] == "tanh"
    steps = round((config.time if main else config.control_time) / lr)
    steps = min(steps, round(config.time / min(config.lrs)))
    closure, params = problem(config, cell.seed, cell.device, cell["loss"], cell["activation"])
    go_on = partial(descend, closure, params, lr, every=config.every, tol=config.tol)
    if path == "gd":
        columns = go_on(steps, tick=cell.tick)
        return columns | census(closure, params, lr, config.census, config.tol)
    trunk = go_on(steps, stop=lambda sharpness: sharpness >= gd_edge(lr))
    number, size = config.blocked, sum(p.numel() for p in params)
    fixed = random_directions(size, number, cell.seed, like=params[0])
    out: dict[str, dict[str, Any]] = {
        "flow": {"substeps": config.substeps},
        "blocked": {"k": number, "forbidden": lambda vectors: vectors},
        "random": {"forbidden": lambda vectors: fixed},
        "next": {"k": number + 1, "forbidden": lambda vectors: vectors[:, 1:]},
    }
    branch = go_on(round(config.branch_time / lr), **out[path], tick=cell.tick)
    branch["step"] = [trunk["step"][-1] + step for step in branch["step"]]
    return branch


# --- what a run says -----------------------------------------------------------------------------


def main_runs(runs: SeedRuns) -> list[Run]:
    """The runs of `config.lrs`, tanh and mse."""
    return [runs.one(path="gd", loss="mse", activation="tanh", lr=lr) for lr in runs.config["lrs"]]


def control(runs: SeedRuns, name: str) -> Run:
    """The control "small_lr", "relu_lr" or "cross_entropy_lr"."""
    loss = "cross-entropy" if name == "cross_entropy_lr" else "mse"
    activation = "relu" if name == "relu_lr" else "tanh"
    return runs.one(path="gd", loss=loss, activation=activation, lr=runs.config[name])


def branches(runs: SeedRuns) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and the sharpness there of "gd" and of each of `BRANCHES`."""
    lr = runs.config["branch_lr"]
    chosen = {
        path: runs.one(path=path, loss="mse", activation="tanh", lr=lr)
        for path in ("gd", *BRANCHES)
    }
    common = [set(run["step"]) for run in chosen.values()]
    steps = np.array(sorted(set.intersection(*common)))
    return steps, {
        path: run["sharpness"][np.isin(run["step"], steps)] for path, run in chosen.items()
    }


def clock(run: Run) -> np.ndarray:
    """Learning rate x step at each measurement: the time of gradient flow."""
    return float(run.settings["lr"]) * run["step"]


def ratio(run: Run) -> np.ndarray:
    """Sharpness over 2/lr at each measurement."""
    edge: float = gd_edge(run.settings["lr"])
    return run["sharpness"] / edge


# --- what the runs decide ------------------------------------------------------------------------


@claim(COHEN, low=2.0, id="progressive sharpening", domain="positive")
def progressive_sharpening(runs: SeedRuns) -> float:
    """Gradient descent with a fixed learning rate raises the sharpness: largest value over the
    initial one, at the smallest of the three main learning rates"""
    sharpness = main_runs(runs)[0]["sharpness"]
    return float(sharpness.max() / sharpness[0])


@claim(COHEN, 0.9, 1.15, id="hovers at 2/lr", domain="positive", headline=True)
def hovers(runs: SeedRuns) -> float:
    """In the second half of training the sharpness of gradient descent hovers at 2/lr: median of
    the sharpness over 2/lr, at the learning rate where that is farthest from 1"""
    return farthest_from_one(second_half_median(ratio(run)) for run in main_runs(runs))


@claim(COHEN, low=0.1, id="not monotone", domain="share")
def not_monotone(runs: SeedRuns) -> float:
    """At the edge the training loss rises on many single steps: share of such steps in the second
    half of training, at the learning rate where it is smallest"""
    return min(float(second_half(run["rises"]).mean()) for run in main_runs(runs))


@claim(COHEN, high=0.8, id="falls in the long run", domain="positive", headline=True)
def falls_in_the_long_run(runs: SeedRuns) -> float:
    """At the edge the training loss falls in the long run, although it rises on single steps: final
    loss over loss at half time, at the learning rate where it falls least"""
    losses = [run["loss"] for run in main_runs(runs)]
    return max(float(loss[-1] / loss[len(loss) // 2]) for loss in losses)


@claim(DAMIAN, low=0.5, id="oscillation lies along v1", domain="share")
def oscillation_lies_along_top(runs: SeedRuns) -> float:
    """At the edge, most of the motion that repeats with period two lies along the top eigenvector:
    its share of the squared second difference of the weights, mean over the second half of
    training, at the learning rate where it is smallest"""
    return min(float(second_half(run["share"][:-1]).mean()) for run in main_runs(runs))


@claim(
    DAMIAN,
    low=0.5,
    id="v1 carries the first burst",
    domain="share",
    set_after=True,
    headline=True,
)
def top_carries_the_first_burst(runs: SeedRuns) -> float:
    """Just before the sharpness first falls back to the edge, most of the motion that repeats with
    period two lies along the top eigenvector: its share of the squared second difference of the
    weights where the sharpness is largest, at the learning rate where that share is smallest"""
    return min(float(run["share"][run["sharpness"][:-1].argmax()]) for run in main_runs(runs))


def carried_at_the_edge(run: Run, near: float = 0.95) -> float:
    """The census' share of the eigenvectors with eigenvalues of at least `near` times 2/lr."""
    at_edge = run["census_value"] >= near * gd_edge(run.settings["lr"])
    return min(1.0, float(run["census_share"][at_edge].sum()))


@claim(
    OURS,
    low=0.9,
    id="directions at the edge carry the oscillation",
    domain="share",
    set_after=True,
    headline=True,
)
def directions_at_the_edge_carry_it(runs: SeedRuns) -> float:
    """At the end of training, the motion that repeats with period two lies along the eigenvectors
    whose eigenvalues are at the edge (at least 0.95 times 2/lr, among the top 20), however many
    they are: their share of the squared second difference of the weights, at the learning rate
    where it is smallest"""
    return min(carried_at_the_edge(run) for run in main_runs(runs))


@claim(CONTROL, high=0.1, id="no oscillation far below the edge", domain="share", set_after=True)
def no_oscillation_far_below(runs: SeedRuns) -> float:
    """Far below the edge, the top 20 eigenvectors carry next to nothing of the second difference of
    the weights: their share of its squared length at the end of training with the small learning
    rate"""
    return min(1.0, float(control(runs, "small_lr")["census_share"].sum()))


def excess(runs: SeedRuns, path: str) -> float:
    """How far the branch `path` ends above gradient descent, in units of 2/lr.

    The median over the last quarter of the branch.
    """
    _, sharpness = branches(runs)
    above = sharpness[path] - sharpness["gd"]
    edge: float = gd_edge(runs.config["branch_lr"])
    return float(np.median(above[3 * len(above) // 4 :])) / edge


@claim(DAMIAN, low=0.1, id="oscillation holds sharpness down", headline=True)
def oscillation_holds_sharpness_down(runs: SeedRuns) -> float:
    """Without the oscillation (the top four eigenvectors taken out of each step) the sharpness goes
    on rising: excess over ordinary gradient descent in the branch's last quarter, over 2/lr"""
    return excess(runs, "blocked")


@claim(CONTROL, high=0.1, id="random directions do not matter", headline=True)
def random_directions_do_not_matter(runs: SeedRuns) -> float:
    """Taking four random directions out of each step does not let the sharpness rise: excess over
    ordinary gradient descent in the branch's last quarter, over 2/lr"""
    return excess(runs, "random")


@claim(CONTROL, high=0.1, id="v2 to v5 do not matter", headline=True)
def the_next_four_do_not_matter(runs: SeedRuns) -> float:
    """Taking the second to fifth eigenvectors out of each step and leaving the first does not let
    the sharpness rise: excess over ordinary gradient descent in the branch's last quarter, over
    2/lr"""
    return excess(runs, "next")


@claim(CONTROL, low=0.1, id="the first of four matters", set_after=True)
def the_first_of_four_matters(runs: SeedRuns) -> float:
    """With the first to fourth eigenvectors taken out of each step the sharpness ends higher than
    with the second to fifth taken out: difference in the branch's last quarter, over 2/lr"""
    return excess(runs, "blocked") - excess(runs, "next")


@claim(DAMIAN, high=0.05, id="blocked follows flow")
def blocked_follows_flow(runs: SeedRuns) -> float:
    """With the top four eigenvectors taken out of each step, gradient descent follows the sharpness
    of gradient flow: largest relative difference along the branch"""
    _, sharpness = branches(runs)
    return float(np.abs(sharpness["blocked"] / sharpness["flow"] - 1).max())


@claim(CONTROL, high=0.5, id="small lr stays below", domain="positive")
def small_lr_stays_below(runs: SeedRuns) -> float:
    """With a small learning rate, gradient descent does not reach the edge in as many steps as the
    longest main run has: largest sharpness over 2/lr"""
    return float(ratio(control(runs, "small_lr")).max())


@claim(CONTROL, high=0.9, id="ReLU saturates", domain="positive")
def relu_saturates(runs: SeedRuns) -> float:
    """A ReLU network's sharpness stops rising before it reaches the edge, at half the learning rate
    at which it would reach it: largest sharpness over 2/lr"""
    return float(ratio(control(runs, "relu_lr")).max())


@claim(COHEN, high=0.5, id="cross-entropy falls at the end", domain="positive")
def cross_entropy_falls(runs: SeedRuns) -> float:
    """With cross-entropy the sharpness falls once the images are fitted: final sharpness over the
    largest"""
    sharpness = control(runs, "cross_entropy_lr")["sharpness"]
    return float(sharpness[-1] / sharpness.max())


CLAIMS = [
    progressive_sharpening,
    hovers,
    not_monotone,
    falls_in_the_long_run,
    oscillation_lies_along_top,
    top_carries_the_first_burst,
    directions_at_the_edge_carry_it,
    no_oscillation_far_below,
    oscillation_holds_sharpness_down,
    random_directions_do_not_matter,
    the_next_four_do_not_matter,
    the_first_of_four_matters,
    blocked_follows_flow,
    small_lr_stays_below,
    relu_saturates,
    cross_entropy_falls,
]

EXPERIMENT = Experiment(
    name="edge_of_stability",
    title="Gradient descent sharpens until 2/lr, and then hovers there",
    source="Cohen et al. 2021 (arXiv:2103.00065); Damian et al. 2022 (arXiv:2209.15594)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
