r"""Is an average of weights as good as SAM, and do the two add up?

The mean of the weights along the last quarter of a training (stochastic weight averaging) lies
closer to the middle of a valley than its last point, and costs no pass. SGD and SAM, each with a
constant learning rate, are compared at equal passes: SAM makes half of SGD's steps. Of each run
both ends are measured, its last weights and the mean of its weights after every step of the last
quarter.

The control is the learning rate: letting it fall along half a cosine also calms the noise that an
average takes out, and it too costs no pass.

Task, network and radius are those of `second_pass`, where a search found the radius: 1,000 images,
and a share of the labels drawn anew; the same is done with true labels. The network has no batch
norm, whose statistics an average would need anew. Sharpness is that of the loss of training, which
is smoothed: its least value is not zero, so that the curvature does not vanish with the loss.

The criteria were set before the first run of this experiment; the last weights under a falling
learning rate are known from `second_pass`, on other seeds of the same task.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sam_lab.data import Dataset
from sam_lab.experiments.family import second_pass
from sam_lab.experiments.family.second_pass import mean_loss, noisy
from sam_lab.experiments.lab.claims import CONTROL, OURS, Claim, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, SeedRuns, Setting
from sam_lab.experiments.recipe import Recipe, hessian
from sam_lab.training import Phase, Training, constant, cosine, evaluate

__all__ = ["SCHEDULES", "average_along", "end", "measure", "prepare"]

SCHEDULES = {"constant": constant, "cosine": cosine}
"""Of the learning rate, by name."""
CONSTANT = "constant"
ENDS = ("last", "average")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD; its `epochs` are those of SGD, twice those of SAM.
        rho: SAM's radius.
        noises: shares of the training labels that are drawn anew, from all classes.
        smoothing: of the labels in the loss of training.
        share: of the steps, the last ones, whose weights are averaged.
    """

    recipe: Recipe
    rho: float = 0.2
    noises: tuple[float, ...] = (0.3, 0.0)
    smoothing: float = 0.1
    share: float = 0.25


LAPTOP = Config(second_pass.LAPTOP.recipe.but(train=1000, test=3500))
# Wide residual networks average well, but have batch norm; this one has none.
PAPER = Config(
    Recipe("cifar10", 50_000, 10_000, "data", channels=(64, 128), epochs=200, batch=128, lr=0.05),
    rho=0.1,
)


def settings(config: Config) -> list[Setting]:
    """SGD (radius 0) and SAM with every schedule, with each share of wrong labels."""
    return [
        {"noise": noise, "rho": rho, "schedule": schedule}
        for noise in config.noises
        for rho in (0.0, config.rho)
        for schedule in SCHEDULES
    ]


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A run before its first epoch, and its data with true labels."""
    recipe, rho = config.recipe, cell["rho"]
    epochs = recipe.epochs // 2 if rho else recipe.epochs
    training, dataset = recipe.training(
        cell.seed,
        cell.device,
        phases=[Phase(0, epochs, rho=rho)],
        loss_fn=mean_loss(config.smoothing),
        schedule=SCHEDULES[cell["schedule"]],
    )
    training.y = noisy(training.y, cell["noise"], dataset.classes, cell.seed)
    return training, dataset


def average_along(training: Training, share: float) -> AveragedModel:
    """Train to the end; the mean of the weights after each step of the last share of the epochs.

    Args:
        training: before its first epoch. Its model has the last weights afterwards.
        share: of the epochs, rounded to whole ones, at least one.
    """
    epochs = training.epochs
    training.run(epochs - max(1, round(share * epochs)))
    average = AveragedModel(training.model)
    training.run(on_step=lambda: average.update_parameters(training.model))
    return average


def measure(
    config: Config, model: nn.Module, training: Training, dataset: Dataset
) -> dict[str, float]:
    """What is measured of a network: ``test_error`` and ``train_error`` in %, of the training
    labels; ``test_loss`` without smoothing; ``loss`` and ``sharpness`` of the smoothed one."""
    fn, recipe = mean_loss(config.smoothing), config.recipe
    loss, wrong = evaluate(model, training.x, training.y, fn)
    test_loss, test_wrong = evaluate(model, dataset.x_test, dataset.y_test)
    H = hessian(model, *recipe.examined(training), fn)
    return {
        "test_error": 100 * test_wrong,
        "train_error": 100 * wrong,
        "test_loss": test_loss,
        "loss": loss,
        "sharpness": float(H.top(tol=recipe.tol).values[0]),
    }


def run(config: Config, cell: Cell) -> Columns:
    """One run.

    Returns:
        What `measure` returns, with the prefix ``last_`` of the last weights and ``average_`` of
        their mean; ``passes`` over the training set.
    """
    training, dataset = prepare(config, cell)
    average = average_along(training, config.share)
    columns: Columns = {}
    for name, model in zip(ENDS, (training.model, average.module), strict=True):
        found = measure(config, model, training, dataset)
        columns |= {f"{name}_{what}": [value] for what, value in found.items()}
    passes = training.epochs * (2 if cell["rho"] else 1)
    return columns | {"passes": [passes]}


# --- what the runs say ----------------------------------------------------------------------------


def end(
    runs: SeedRuns, method: str, which: str, column: str = "test_error", schedule: str = CONSTANT
) -> float:
    """A number of one end of a run; the share of wrong labels is that of the first run.

    Args:
        method: "sgd" or "sam".
        which: "last" or "average".
    """
    rho = {"sgd": 0.0, "sam": runs.config["rho"]}[method]
    return runs.base(rho=rho, schedule=schedule).value(f"{which}_{column}")


# --- what the runs decide -------------------------------------------------------------------------

IZMAILOV = Source("Izmailov et al. 2018 (what averaging is for)", "after")
KADDOUR = Source("Kaddour et al. 2022 (that the two can be combined)", "after")


@claim(IZMAILOV, low=0.0, unit="points", headline=True)
def average_helps_sgd(runs: SeedRuns) -> float:
    """At a constant learning rate the average of SGD's weights errs less than its last weights:
    test error of the last, less that of the average"""
    return end(runs, "sgd", "last") - end(runs, "sgd", "average")


@claim(KADDOUR, low=0.0, unit="points", headline=True)
def average_helps_sam(runs: SeedRuns) -> float:
    """At a constant learning rate the average of SAM's weights errs less than its last weights:
    test error of the last, less that of the average"""
    return end(runs, "sam", "last") - end(runs, "sam", "average")


@claim(OURS, low=0.0, unit="points", headline=True)
def sam_beats_average(runs: SeedRuns) -> float:
    """At equal passes and a constant learning rate SAM's last weights err less than the average of
    SGD's: test error of SGD's average, less that of SAM's last weights"""
    return end(runs, "sgd", "average") - end(runs, "sam", "last")


@claim(KADDOUR, low=0.0, unit="points")
def both_beat_either(runs: SeedRuns) -> float:
    """At equal passes the average of SAM's weights errs less than SAM's last weights and than
    SGD's average: the smaller test error of the two, less that of SAM's average"""
    either = min(end(runs, "sgd", "average"), end(runs, "sam", "last"))
    return either - end(runs, "sam", "average")


@claim(IZMAILOV, high=0.9, domain="positive")
def average_is_flatter(runs: SeedRuns) -> float:
    """At a constant learning rate the average of SGD's weights is flatter than its last weights:
    sharpness of the smoothed loss, the average's over that of the last"""
    return end(runs, "sgd", "average", "sharpness") / end(runs, "sgd", "last", "sharpness")


@claim(OURS, high=0.9, domain="positive")
def sam_is_flatter_than_average(runs: SeedRuns) -> float:
    """At equal passes and a constant learning rate SAM's last weights are flatter than the average
    of SGD's: sharpness of the smoothed loss, SAM's over that of SGD's average"""
    return end(runs, "sam", "last", "sharpness") / end(runs, "sgd", "average", "sharpness")


@claim(CONTROL, -0.5, 0.5, unit="points", headline=True)
def decay_does_as_much(runs: SeedRuns) -> float:
    """A learning rate that falls does for SGD what an average does: test error of the average at a
    constant learning rate, less that of the last weights after half a cosine"""
    decayed = end(runs, "sgd", "last", schedule="cosine")
    return end(runs, "sgd", "average") - decayed


@claim(CONTROL, -0.5, 0.5, unit="points")
def decay_does_as_much_for_sam(runs: SeedRuns) -> float:
    """A learning rate that falls does for SAM what an average does: test error of the average at a
    constant learning rate, less that of the last weights after half a cosine"""
    decayed = end(runs, "sam", "last", schedule="cosine")
    return end(runs, "sam", "average") - decayed


@claim(CONTROL, low=0.0, unit="points")
def sam_beats_decayed_average(runs: SeedRuns) -> float:
    """At equal passes, both with a learning rate that falls along half a cosine, SAM's last weights
    err less than the average of SGD's: test error of SGD's average, less SAM's"""
    sgd = end(runs, "sgd", "average", schedule="cosine")
    return sgd - end(runs, "sam", "last", schedule="cosine")


CLAIMS = [
    average_helps_sgd,
    average_helps_sam,
    sam_beats_average,
    both_beat_either,
    average_is_flatter,
    sam_is_flatter_than_average,
    decay_does_as_much,
    decay_does_as_much_for_sam,
    sam_beats_decayed_average,
]
"""Decided with wrong labels, and with true labels alone."""


def _clean(one: Claim) -> Claim:
    plain = dataclasses.replace(one, headline=False)
    return plain.under("clean", "With true labels alone, ", noise=0.0)


EXPERIMENT = Experiment(
    name="averages",
    title="An average of weights beside SAM, at equal passes",
    source="this book, after Kaddour et al. 2022 (arXiv:2202.00661)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[*CLAIMS, *map(_clean, CLAIMS)],
)
