r"""Minibatch training with SAM, its kin and its controls, measured along the way.

SAM stands beside plain SGD, beside random perturbations as long or many times longer, beside ASAM,
and beside perturbations made for parts of each batch (m-sharpness). Within a seed all methods share
initial weights, batches and their order.

This is the study ``training`` of `sharpness_aware`, and what its other studies train with. Loss:
half the sum of squares over outputs, mean over examples. (The curvature of cross-entropy vanishes
with the loss, whichever method made the loss small.) The networks are smooth (GELU), because the
theory differentiates the loss twice and more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.edge.edge_of_stability import loss_and_gradient
from sam_lab.experiments.edge.measuring_sharpness import network
from sam_lab.experiments.lab.claims import Source, claim
from sam_lab.experiments.lab.experiment import Cell, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.objective import Closure
from sam_lab.perturbations import Rule, asam, random_direction, sam
from sam_lab.sam import SAM
from sam_lab.training import evaluate, squared_error

__all__ = [
    "CLAIMS",
    "METHODS",
    "PAPER",
    "STUDY",
    "Task",
    "bias_share",
    "build",
    "epochs",
    "hessian",
    "load",
    "loss_on",
    "measured_loss",
    "micro_norm",
    "train",
    "trained",
]

PROBES = 64  # random vectors behind a trace

METHODS: dict[str, Rule] = {
    "sgd": sam,
    "sam": sam,
    "random": random_direction,
    "asam": asam,
    "asam_all": partial(asam, adaptive=lambda p: True),
}
"""The perturbation rule of each method; plain SGD is SAM with radius 0, bit for bit."""


@dataclass(frozen=True)
class Task:
    """What is trained, with which methods, and how it is measured.

    Attributes:
        dataset, train: which images, and how many to train on (None: all).
        architecture: "mlp" with `widths` hidden units, or "cnn" with `widths` channels.
        activation: of the network.
        lr, batch, epochs: of plain SGD, which all methods take their steps with. No momentum.
        rho: the main radius, at which most claims are decided.
        rhos: radii of SAM, `rho` among them.
        random_rhos: radii of the random perturbations; `rho` and 10 `rho` have to be there.
        asam_rho: radius of ASAM where only the weights adapt, which is the default of the rule.
        asam_all_rho: radius of ASAM where all parameters do.
        micros: sizes of micro-batches, descending. Each divides `batch`, which divides the training
            set: a step averages over micro-batches, and they have to be of one size.
        every: epochs from one measurement of a main run to the next.
        measured: sharpness, trace and gradient norm are those of the loss on this many training
            images, the first ones.
    """

    dataset: str = "mnist_5k"
    train: int | None = 4000
    architecture: str = "mlp"
    widths: tuple[int, ...] = (64, 64)
    activation: str = "gelu"
    lr: float = 0.3
    batch: int = 100
    epochs: int = 40
    rho: float = 0.1
    rhos: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    random_rhos: tuple[float, ...] = (0.1, 1.0, 2.0)
    asam_rho: float = 0.5
    asam_all_rho: float = 2.0
    micros: tuple[int, ...] = (25, 5)
    every: int = 2
    measured: int = 1000

    @property
    def micro_sizes(self) -> tuple[int, ...]:
        """The whole batch, and the parts of it that a perturbation is made for."""
        return (self.batch, *self.micros)


# What is trained at the paper's scale, as fields of a task.
PAPER: dict[str, Any] = {
    "dataset": "cifar10",
    "train": None,
    "architecture": "cnn",
    "widths": (32, 64, 128),
    "lr": 0.1,
    "epochs": 100,
    "measured": 5000,
}


def load(task: Task, seed: int = 0, device: torch.device | str = "cpu") -> data.Dataset:
    """The data set, centred and scaled by the statistics of the training images.

    Args:
        seed: chooses which images train and which test.
    """
    dataset = data.load(task.dataset, train=task.train, seed=seed, device=device)
    centre = dataset.x.mean(0)
    scale = (dataset.x - centre).std()
    return dataclasses.replace(
        dataset, x=(dataset.x - centre) / scale, x_test=(dataset.x_test - centre) / scale
    )


def build(task: Task, x: Tensor, seed: int = 0) -> nn.Sequential:
    """The network with its initial weights, for inputs like x (N, C, H, W), on their device.

    Raises:
        ValueError: an architecture other than "mlp" and "cnn".
    """
    if task.architecture == "mlp":
        return network(x, task.widths, task.activation, 10, seed)
    if task.architecture == "cnn":
        return models.cnn(
            x[0].shape, 10, task.activation, widths=task.widths, seed=seed, device=x.device
        )
    raise ValueError(f'architecture must be "mlp" or "cnn", got {task.architecture!r}')


def epochs(
    task: Task,
    dataset: data.Dataset,
    method: str,
    rho: float,
    seed: int = 0,
    micro: int | None = None,
) -> Iterator[tuple[int, nn.Sequential]]:
    """Train, and yield (epoch, model) before the first epoch and after each.

    The model is the one that is trained: measure it as you like, but leave its weights alone.

    Args:
        method: a key of `METHODS`.
        rho: its radius; of no consequence for "sgd".
        seed: determines the initial weights, the batches with their order, and random directions.
        micro: perturb for parts of the batch of this size, each with its own gradient; by default
            for the batch as a whole.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    model = build(task, dataset.x, seed)
    stepper = SAM(
        torch.optim.SGD(model.parameters(), lr=task.lr),
        0.0 if method == "sgd" else rho,
        rule=METHODS[method],
        generator=torch.Generator().manual_seed(seed),
    )
    order = torch.Generator().manual_seed(seed)
    yield 0, model
    for epoch in range(1, task.epochs + 1):
        for batch in torch.randperm(len(dataset.x), generator=order).split(task.batch):
            parts = batch.split(micro or task.batch)
            stepper.step([loss_on(model, dataset, part) for part in parts], perturb="micro")
        yield epoch, model


def loss_on(model: nn.Module, dataset: data.Dataset, part: Tensor) -> Closure:
    """The loss on the training images with these indices, as a closure."""
    part = part.to(dataset.x.device)
    x, y = dataset.x[part], dataset.y[part]
    return lambda: squared_error(model(x), y)


def measured_loss(task: Task, dataset: data.Dataset, model: nn.Module) -> Closure:
    """The loss on the first `task.measured` training images."""
    return loss_on(model, dataset, torch.arange(task.measured))


def train(
    task: Task,
    method: str,
    rho: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    micro: int | None = None,
    every: int | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Columns:
    """Train with one method, and measure along the way.

    Args:
        method, rho, seed, micro: as in `epochs`.
        every: epochs from one measurement to the next, by default `task.every`; the last epoch is
            measured too.
        tick: told after each epoch how many are done, and of how many.

    Returns:
        One entry a measurement: ``epoch``; ``loss`` on all training images; ``train_error`` and
        ``test_error`` in per cent; ``sharpness`` (the largest eigenvalue of the Hessian) and
        ``gradient`` (norm) of the loss on the first `task.measured` training images. At the end:
        ``trace`` of that Hessian, and for each size in ``micro`` (that of the batch, then those
        of its parts) the mean norm ``micro_gradient`` of the gradients of such micro-batches;
        and `bias_share` of the perturbation (for "sgd", of SAM's).
    """
    dataset, rows = load(task, seed, device), Rows()
    for epoch, model in epochs(task, dataset, method, rho, seed, micro):
        last = epoch == task.epochs
        if epoch % (every or task.every) == 0 or last:
            loss, train_error = evaluate(model, dataset.x, dataset.y, squared_error)
            _, test_error = evaluate(model, dataset.x_test, dataset.y_test, squared_error)
            H = hessian(task, dataset, model)
            rows.add(
                epoch=epoch,
                loss=loss,
                train_error=100 * train_error,
                test_error=100 * test_error,
                sharpness=float(H.top(max_hvps=500).values[0]),
                gradient=float(H.gradient().norm()),
            )
        tick(epoch, task.epochs)
    # the same signs for every method; a tolerance that is always met fixes their number
    trace = H.trace(tol=1e9, seed=seed, min_hvps=PROBES, max_hvps=PROBES)
    return {
        **rows.columns,
        "trace": [trace.value],
        "micro": list(task.micro_sizes),
        "micro_gradient": [micro_norm(task, dataset, model, size) for size in task.micro_sizes],
        "bias_share": [bias_share(task, dataset, model, method, rho, seed)],
    }


def hessian(task: Task, dataset: data.Dataset, model: nn.Module) -> Hessian:
    """The Hessian of `measured_loss`."""
    return Hessian(measured_loss(task, dataset, model), model.parameters())


def micro_norm(task: Task, dataset: data.Dataset, model: nn.Module, size: int) -> float:
    """Mean norm of the gradients of micro-batches of this size, among the images measured.

    It is the rate at which the loss of a micro-batch rises along its own perturbation: to first
    order, rho times this is what SAM adds to the loss that it minimises.
    """
    params = list(model.parameters())
    parts = torch.arange(task.measured).split(size)
    norms = [loss_and_gradient(loss_on(model, dataset, part), params)[1].norm() for part in parts]
    return float(torch.stack(norms).mean())


def bias_share(
    task: Task, dataset: data.Dataset, model: nn.Module, method: str, rho: float, seed: int = 0
) -> float:
    """Share of the squared length of a method's perturbation that lies in biases.

    In parameters of one axis, that is, for the loss on the images measured.
    """
    params = list(model.parameters())
    grads = torch.autograd.grad(measured_loss(task, dataset, model)(), params)
    drawing = {"generator": torch.Generator().manual_seed(seed)} if method == "random" else {}
    parts = METHODS[method](params, grads, rho or 1.0, **drawing)
    squares = [float(part.square().sum()) for part in parts]
    biases = [square for part, square in zip(parts, squares, strict=True) if part.ndim == 1]
    return math.fsum(biases) / math.fsum(squares)


# --- the study -----------------------------------------------------------------------------------


def settings(task: Task) -> list[Setting]:
    """Each method with its radii, and SAM with smaller and smaller micro-batches."""

    def one(method: str, rho: float, micro: int = task.batch) -> Setting:
        return {"method": method, "rho": rho, "micro": micro}

    return [
        one("sgd", 0.0),
        *(one("sam", rho) for rho in task.rhos),
        *(one("random", rho) for rho in task.random_rhos),
        one("asam", task.asam_rho),
        one("asam_all", task.asam_all_rho),
        *(one("sam", task.rho, micro) for micro in task.micros),
    ]


def run(task: Task, cell: Cell) -> Columns:
    """The columns of `train`; only runs at the main radius are measured before their end."""
    method, rho, micro = cell["method"], cell["rho"], cell["micro"]
    main = micro == task.batch and rho in (0.0, task.rho, 10 * task.rho)
    every = task.every if main else task.epochs
    return train(task, method, rho, cell.seed, cell.device, micro, every, cell.tick)


STUDY = Study("training", settings, run)


# --- what the runs decide ------------------------------------------------------------------------


def trained(runs: SeedRuns, method: str, times: float = 1, micro: int | None = None) -> Run:
    """The run of a method at `times` its main radius, with micro-batches if their size is given."""
    config = runs.config
    radius = {"sgd": 0.0, "asam": config["asam_rho"], "asam_all": config["asam_all_rho"]}
    return runs.one(
        study="training",
        method=method,
        rho=times * radius.get(method, config["rho"]),
        micro=micro or config["batch"],
    )


def smallest_parts(runs: SeedRuns) -> Run:
    """The run of SAM with the smallest micro-batches."""
    return trained(runs, "sam", micro=min(runs.config["micros"]))


def final_ratio(run: Run, other: Run, name: str = "sharpness") -> float:
    """Ratio of the last entries of a column of two runs."""
    return float(run[name][-1] / other[name][-1])


def final_gain(run: Run, other: Run) -> float:
    """How far the final test error of the second run lies below that of the first."""
    return float(run["test_error"][-1] - other["test_error"][-1])


FORET = "Foret et al. 2021"
QUESTION = Source("the question of chapter 3", "ours")
CHAPTER_CONTROL = Source("the control of chapter 3", "control")


@claim(
    Source(f"{FORET} (what SAM is for; the factor is ours)", "after"),
    high=0.7,
    headline=True,
    domain="positive",
)
def sam_lowers_sharpness(runs: SeedRuns) -> float:
    """Training with SAM ends at no more than 0.7 times the sharpness at which SGD ends, after
    equally many epochs: ratio of final sharpness"""
    return final_ratio(trained(runs, "sam"), trained(runs, "sgd"))


@claim(CHAPTER_CONTROL, high=0.7, headline=True, domain="positive")
def flatter_at_equal_loss(runs: SeedRuns) -> float:
    """SAM is flatter than SGD at equal training loss too, so that it is not flatter merely
    because it has trained less: SAM's final sharpness over SGD's at the epoch where SGD's
    training loss is nearest to SAM's final one"""
    sam_run, sgd_run = trained(runs, "sam"), trained(runs, "sgd")
    nearest = abs(sgd_run["loss"] - sam_run["loss"][-1]).argmin()
    return float(sam_run["sharpness"][-1] / sgd_run["sharpness"][nearest])


@claim(QUESTION, high=1.0, domain="positive")
def flatter_with_radius(runs: SeedRuns) -> float:
    """The larger SAM's radius, the flatter training ends: largest ratio of the final sharpness
    at one radius to that at the next smaller one"""
    batch = runs.config["batch"]
    ascending = [
        runs.one(study="training", method="sam", rho=rho, micro=batch)
        for rho in sorted(runs.config["rhos"])
    ]
    return max(final_ratio(wide, narrow) for narrow, wide in itertools.pairwise(ascending))


@claim(CHAPTER_CONTROL, 0.8, 1.25, headline=True, domain="positive")
def noise_does_nothing(runs: SeedRuns) -> float:
    """Training with random perturbations as long as SAM's ends as sharp as SGD: ratio of final
    sharpness"""
    return final_ratio(trained(runs, "random"), trained(runs, "sgd"))


@claim(CHAPTER_CONTROL, low=1.25, domain="positive")
def noise_does_not_reach_it(runs: SeedRuns) -> float:
    """Training with random perturbations ten times as long as SAM's still ends at least 1.25
    times as sharp as SAM: ratio of final sharpness"""
    return final_ratio(trained(runs, "random", times=10), trained(runs, "sam"))


@claim(Source(f"{FORET} (direction)", "after"), low=0.0, unit="percentage points", headline=True)
def sam_generalises(runs: SeedRuns) -> float:
    """SAM's test error is no larger than SGD's after equally many epochs: SGD's test error
    minus SAM's"""
    return final_gain(trained(runs, "sgd"), trained(runs, "sam"))


@claim(QUESTION, low=1.0, domain="positive")
def sam_trains_slower(runs: SeedRuns) -> float:
    """SAM's training loss is larger than SGD's after equally many epochs: ratio of final
    training losses"""
    return final_ratio(trained(runs, "sam"), trained(runs, "sgd"), "loss")


@claim(QUESTION, high=0.7, domain="positive")
def asam_lowers_sharpness(runs: SeedRuns) -> float:
    """ASAM, which aims at another measure of sharpness, lowers the top eigenvalue of the
    Hessian as well: ratio of its final sharpness to SGD's"""
    return final_ratio(trained(runs, "asam"), trained(runs, "sgd"))


@claim(QUESTION, low=0.9, domain="share")
def asam_perturbs_biases(runs: SeedRuns) -> float:
    """ASAM whose biases do not adapt puts nearly all of its perturbation into the biases, which
    have the scale 1 beside weights far below 1: the biases' share of its squared length at the
    end of training"""
    return trained(runs, "asam").value("bias_share")


@claim(Source("derived in chapter 3; the factor is ours", "ours"), low=2.0, domain="positive")
def small_batches_have_long_gradients(runs: SeedRuns) -> float:
    """Groups of 5 examples have much longer gradients than batches of 100, and with them SAM
    adds more to the loss: mean gradient norm of the groups over that of the batches, at the end
    of training with SAM"""
    norms = trained(runs, "sam")["micro_gradient"]
    return float(norms[-1] / norms[0])


@claim(QUESTION, high=1.0, domain="positive")
def micro_batches_lower_sharpness(runs: SeedRuns) -> float:
    """SAM that perturbs for groups of 5 examples ends flatter than SAM that perturbs for the
    whole batch of 100: ratio of final sharpness"""
    return final_ratio(smallest_parts(runs), trained(runs, "sam"))


@claim(QUESTION, high=1.0, domain="positive")
def micro_batches_lower_trace(runs: SeedRuns) -> float:
    """SAM that perturbs for groups of 5 examples ends with a smaller trace of the Hessian than
    SAM that perturbs for the whole batch of 100: ratio of traces"""
    return final_ratio(smallest_parts(runs), trained(runs, "sam"), "trace")


@claim(QUESTION, low=0.0, unit="percentage points")
def micro_batches_generalise(runs: SeedRuns) -> float:
    """SAM that perturbs for groups of 5 examples has no larger test error than SAM that
    perturbs for the whole batch of 100: test error for the whole batch minus test error for the
    groups"""
    return final_gain(trained(runs, "sam"), smallest_parts(runs))


CLAIMS = [
    sam_lowers_sharpness,
    flatter_at_equal_loss,
    flatter_with_radius,
    noise_does_nothing,
    noise_does_not_reach_it,
    sam_generalises,
    sam_trains_slower,
    asam_lowers_sharpness,
    asam_perturbs_biases,
    small_batches_have_long_gradients,
    micro_batches_lower_sharpness,
    micro_batches_lower_trace,
    micro_batches_generalise,
]
