r"""Gradient descent at the edge of stability: sharpness rises to 2/lr, and hovers there.

Full-batch gradient descent on real images, the sharpness (top Hessian eigenvalue) measured along
the way. The main runs vary the learning rate. The others are controls, each of which could have
come out differently:

* ``flow`` and ``blocked`` branch off a main run when its sharpness first passes 2/lr. ``flow``
  goes on with steps `config.substeps` times smaller (gradient flow, to the accuracy of interest).
  ``blocked`` keeps the learning rate, but takes the top `config.blocked` eigenvectors out of every
  step, so that nothing can oscillate along them. If the oscillation is what holds the sharpness
  down, both must sail past 2/lr.
* a small learning rate, a ReLU network and cross-entropy: where the edge is not reached in the
  given time, or not held.

The loss "mse" is 0.5 * sum over outputs, mean over examples (the convention of Cohen et al.).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_lab import data, models
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.statistics import each_seed, farthest_from_one, late, late_median
from sam_lab.stability import gd_edge
from sam_lab.tracker import SharpnessTracker

COHEN = "Cohen et al. 2021"
DAMIAN = "Damian et al. 2022"


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
        blocked: number of top eigenvectors that ``blocked`` takes out.
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


def settings(config: Config) -> list[dict[str, Any]]:
    """The main runs, the two branches and the three controls."""

    def one(path: str, loss: str, activation: str, lr: float) -> dict[str, Any]:
        return {"path": path, "loss": loss, "activation": activation, "lr": lr}

    main = [one("gd", "mse", "tanh", lr) for lr in config.lrs]
    branches = [one(path, "mse", "tanh", config.branch_lr) for path in ("flow", "blocked")]
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
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The loss closure and the parameters (initialised from `seed`) of one run.

    Images are standardised by `data.standardize`.

    Raises:
        ValueError: an unknown loss, activation or data set.
    """
    images = data.load(config.data, train=config.images, seed=seed, device=device)
    x = data.standardize(images.x.flatten(1))
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(sizes, activation, seed=seed, device=device)
    if loss == "mse":
        target = data.one_hot(images.y, images.classes).to(x.dtype)

        def closure() -> Tensor:
            return 0.5 * (model(x) - target).square().sum(1).mean()

    elif loss == "cross-entropy":

        def closure() -> Tensor:
            return F.cross_entropy(model(x), images.y)

    else:
        raise ValueError(f'loss must be "mse" or "cross-entropy", got {loss!r}')
    return closure, list(model.parameters())


def gradient(closure: Callable[[], Tensor], params: list[Tensor]) -> tuple[float, Tensor]:
    """The loss and its gradient as one flat vector (P,)."""
    loss = closure()
    grads = torch.autograd.grad(loss, params)
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


@torch.no_grad()
def move(params: list[Tensor], step: Tensor) -> None:
    """Add the flat vector `step` (P,) to the parameters, in place."""
    for param, part in zip(params, step.split([p.numel() for p in params]), strict=True):
        param += part.view_as(param)


def descend(
    closure: Callable[[], Tensor],
    params: list[Tensor],
    lr: float,
    steps: int,
    *,
    every: int = 1,
    substeps: int = 1,
    blocked: int = 0,
    tol: float = 1e-2,
    stop: Callable[[float], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Gradient descent with the sharpness measured every `every` steps.

    Args:
        closure, params: the loss and what it is minimised over; `params` are moved in place.
        lr: learning rate; a step is made of `substeps` steps of `lr / substeps`.
        steps: number of steps; the last point is measured too.
        blocked: number of top eigenvectors taken out of each step (measured before each, then).
        tol: largest relative residual of the eigenpairs.
        stop: ends the run after a measurement whose sharpness it says yes to.

    Returns:
        Columns, one entry a measurement: ``step``, ``loss``, ``sharpness`` (top Hessian
        eigenvalue), ``residual`` (of that eigenpair), ``along`` (the gradient's component along the
        top eigenvector), ``next_along`` (the same one step later, along the same vector; NaN at the
        end), ``rises`` (share of the steps since the last measurement on which the loss rose).

    Raises:
        FloatingPointError: when the loss stops being finite.
    """
    tracker = SharpnessTracker(closure, params, k=max(1, blocked), tol=tol)
    names = ("step", "loss", "sharpness", "residual", "along", "next_along", "rises")
    columns: dict[str, list[float]] = {name: [] for name in names}
    before, rises, top = float("inf"), 0, torch.empty(0)
    for step in range(steps + 1):
        measured = blocked > 0 or step % every == 0 or step == steps
        if measured:  # loss and gradient come with the measurement
            pairs = tracker.measure()
            loss, grad = tracker.hessian.loss(), tracker.hessian.gradient()
        else:
            pairs = None
            loss, grad = gradient(closure, params)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after {step} steps of lr={lr:g}")
        rises += loss > before
        before = loss
        if columns["step"] and columns["step"][-1] == step - 1:
            columns["next_along"][-1] = float(top @ grad)
        if pairs is not None and (step % every == 0 or step == steps):
            top = pairs.vectors[:, 0]
            since = step - columns["step"][-1] if columns["step"] else 1
            row = (
                step,
                loss,
                float(pairs.values[0]),
                float(pairs.residuals[0]),
                float(top @ grad),
                float("nan"),
                rises / since,
            )
            rises = 0
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)
            if stop is not None and stop(row[2]):
                break
        if step == steps:
            break
        if pairs is not None and blocked:
            grad = grad - pairs.vectors @ (pairs.vectors.T @ grad)
        move(params, -lr / substeps * grad)
        for _ in range(substeps - 1):
            move(params, -lr / substeps * gradient(closure, params)[1])
        progress(step + 1, steps)
    return columns


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One run. Columns as `descend` gives them; ``step`` counts from the initialisation."""
    lr, path = setting["lr"], setting["path"]
    main = setting["loss"] == "mse" and setting["activation"] == "tanh"
    steps = round((config.time if main else config.control_time) / lr)
    steps = min(steps, round(config.time / min(config.lrs)))
    closure, params = problem(config, seed, device, setting["loss"], setting["activation"])
    if path == "gd":
        return descend(
            closure, params, lr, steps, every=config.every, tol=config.tol, progress=progress
        )
    trunk = descend(
        closure,
        params,
        lr,
        steps,
        every=config.every,
        tol=config.tol,
        stop=lambda sharpness: sharpness >= gd_edge(lr),
    )
    branch = descend(
        closure,
        params,
        lr,
        round(config.branch_time / lr),
        every=config.every,
        substeps=config.substeps if path == "flow" else 1,
        blocked=config.blocked if path == "blocked" else 0,
        tol=config.tol,
        progress=progress,
    )
    branch["step"] = [trunk["step"][-1] + step for step in branch["step"]]
    return branch


# --- what the runs decide ------------------------------------------------------------------------


def main_runs(result: Result, seed: int) -> list[Run]:
    """The runs of `config.lrs`, tanh and mse, of one seed."""
    return [
        result.select(path="gd", loss="mse", activation="tanh", lr=lr, seed=seed)[0]
        for lr in result.config["lrs"]
    ]


def control(result: Result, name: str, seed: int) -> Run:
    """The control "small_lr", "relu_lr" or "cross_entropy_lr" of one seed."""
    loss = "cross-entropy" if name == "cross_entropy_lr" else "mse"
    activation = "relu" if name == "relu_lr" else "tanh"
    lr = result.config[name]
    return result.select(path="gd", loss=loss, activation=activation, lr=lr, seed=seed)[0]


def branches(result: Result, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and the sharpness there of "gd", "flow" and "blocked", for one seed."""
    lr = result.config["branch_lr"]
    chosen = {
        path: result.select(path=path, loss="mse", activation="tanh", lr=lr, seed=seed)[0]
        for path in ("gd", "flow", "blocked")
    }
    common = [set(one["step"]) for one in chosen.values()]
    steps = np.array(sorted(set.intersection(*common)))
    return steps, {
        path: one["sharpness"][np.isin(one["step"], steps)] for path, one in chosen.items()
    }


def clock(one: Run) -> np.ndarray:
    """Learning rate x step at each measurement: the time of gradient flow."""
    return one.settings["lr"] * one["step"]


def ratio(one: Run) -> np.ndarray:
    """Sharpness over 2/lr at each measurement."""
    return one["sharpness"] / gd_edge(one.settings["lr"])


def _sharpening(result: Result, seed: int) -> float:
    sharpness = main_runs(result, seed)[0]["sharpness"]
    return sharpness.max() / sharpness[0]


def _farthest_hover(result: Result, seed: int) -> float:
    hovers = [late_median(ratio(one)) for one in main_runs(result, seed)]
    return farthest_from_one(hovers)


def _rises(result: Result, seed: int) -> float:
    return min(late(one["rises"]).mean() for one in main_runs(result, seed))


def _long_run(result: Result, seed: int) -> float:
    def fall(one: Run) -> float:
        return one["loss"][-1] / one["loss"][len(one["loss"]) // 2]

    return max(fall(one) for one in main_runs(result, seed))


def _flips(result: Result, seed: int) -> float:
    runs = main_runs(result, seed)
    flips = [late(one["along"][:-1] * one["next_along"][:-1] < 0).mean() for one in runs]
    return min(flips)


def _faded(result: Result, seed: int) -> float:
    sharpness = control(result, "cross_entropy_lr", seed)["sharpness"]
    return sharpness[-1] / sharpness.max()


def _past_the_edge(result: Result, seed: int) -> float:
    _, sharpness = branches(result, seed)
    edge = gd_edge(result.config["branch_lr"])
    excess = sharpness["blocked"] - sharpness["gd"]
    return np.median(excess[3 * len(excess) // 4 :]) / edge


def _blocked_is_flow(result: Result, seed: int) -> float:
    _, sharpness = branches(result, seed)
    return np.abs(sharpness["blocked"] / sharpness["flow"] - 1).max()


EXPERIMENT = Experiment(
    name="edge_of_stability",
    title="Gradient descent sharpens until 2/lr, and then hovers there",
    source="Cohen et al. 2021 (arXiv:2103.00065); Damian et al. 2022 (arXiv:2209.15594)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        Claim(
            "progressive sharpening",
            "Gradient descent raises the sharpness: its largest value over its initial one, at the "
            "smallest main learning rate",
            COHEN,
            "",
            each_seed(_sharpening),
            Criterion(low=2.0),
        ),
        Claim(
            "hovers at 2/lr",
            "In the second half of training the sharpness hovers at 2/lr: its median over 2/lr, at "
            "the learning rate where that is farthest from 1",
            COHEN,
            "",
            each_seed(_farthest_hover),
            Criterion(0.9, 1.15),
        ),
        Claim(
            "not monotone",
            "At the edge the loss rises on many single steps: share of them in the second half, at "
            "the learning rate where it is smallest",
            COHEN,
            "",
            each_seed(_rises),
            Criterion(low=0.1),
        ),
        Claim(
            "falls in the long run",
            "Yet the loss falls in the long run: final loss over loss at half time, at the "
            "learning rate where it falls least",
            COHEN,
            "",
            each_seed(_long_run),
            Criterion(high=0.8),
        ),
        Claim(
            "oscillates along v1",
            "The oscillation is along the top eigenvector: share of steps, in the second half, on "
            "which the gradient's component along it changes sign, at the learning rate where it "
            "is smallest",
            DAMIAN,
            "",
            each_seed(_flips),
            Criterion(low=0.8),
        ),
        Claim(
            "oscillation holds sharpness down",
            "Without the oscillation (top eigenvectors taken out of each step) the sharpness goes "
            "on rising: excess over ordinary gradient descent in the branch's last quarter, over "
            "2/lr",
            DAMIAN,
            "",
            each_seed(_past_the_edge),
            Criterion(low=0.1),
        ),
        Claim(
            "blocked follows flow",
            "Without the oscillation, gradient descent follows the sharpness of gradient flow: "
            "largest relative difference along the branch",
            DAMIAN,
            "",
            each_seed(_blocked_is_flow),
            Criterion(high=0.05),
        ),
        Claim(
            "small lr stays below",
            "With a small learning rate the edge is not reached in as many steps: largest "
            "sharpness over 2/lr",
            "control",
            "",
            each_seed(lambda result, seed: ratio(control(result, "small_lr", seed)).max()),
            Criterion(high=0.5),
        ),
        Claim(
            "ReLU saturates",
            "A ReLU network's sharpness stops rising before it reaches the edge: its largest value "
            "over 2/lr",
            "control",
            "",
            each_seed(lambda result, seed: ratio(control(result, "relu_lr", seed)).max()),
            Criterion(high=0.9),
        ),
        Claim(
            "cross-entropy falls at the end",
            "With cross-entropy the sharpness falls once the images are fitted: final value over "
            "its largest",
            COHEN,
            "",
            each_seed(_faded),
            Criterion(high=0.5),
        ),
    ],
)
