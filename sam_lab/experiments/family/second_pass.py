r"""What is the second pass worth? The SAM family and its controls at equal passes.

Every contender trains the same network on the same data and may make the same number of passes
over it: one that makes p passes a step trains for 1/p of the epochs, with the whole cosine of the
learning rate. SAM therefore makes half of SGD's steps.

The strength of each (most often the radius, see `Contender`) is found by one small search: four
values, each twice the one before, on seeds that no result is reported for, by the error on examples
that no training has seen. The value is then the same for all reported seeds, so that the intervals
are those of training at that value. SGD and Nesterov's method have as many tries, at their learning
rate. The choice is a function of the config alone.

Sharpness, trace and Frobenius norm are those of the loss of training, which is smoothed: its least
value is not zero, so that the curvature does not vanish with the loss.

The study ``clock`` gives each of some contenders the processor time that SGD takes, instead of its
passes. Time is that of a step in ``benchmarks.family`` on its fully connected network, where what a
method does besides passes weighs most.

A share of the training labels is wrong, so that there is something to gain. Whoever trains less
then also errs less: hence the control that is SGD with fewer passes, as many as the search finds.

The task was chosen after pilots, because SAM gained much there. On seed 50 they had SGD with all
passes and with half of them, SAM and Momentum-SAM at three radii: criteria on these count as set
after the first data. Of the other contenders nothing had been seen on this task. On clean MNIST-1D,
where SAM gained little, pilots on seeds 50 and 51 also had LookSAM, Nesterov's method and noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab._optional import require
from sam_lab.data import Dataset
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Run, SeedRuns, Setting
from sam_lab.experiments.recipe import Recipe
from sam_lab.methods import (
    Look,
    State,
    det_sam,
    esam,
    friendly_sam,
    frob_sam,
    graphsam,
    gsam,
    looksam,
    momentum_sam,
    plain,
    plus,
    reject,
    times,
    unit,
    vasso,
)
from sam_lab.perturbations import global_norm, random_direction
from sam_lab.training import Phase, Training, cosine, evaluate

__all__ = [
    "CONTENDERS",
    "Contender",
    "frobenius",
    "gap",
    "loss_fn",
    "mean_loss",
    "measure",
    "noise",
    "noisy",
    "prepare",
    "random_reuse",
    "random_subset",
    "reversed_momentum",
    "search",
    "test_error",
    "trained",
    "validation_error",
]

PERIOD = 5  # steps from one look around to the next, of those that look around now and then
STEPS = (1.0, 2.0, 4.0, 8.0)  # of the search, in units of a contender's start
WORST = 100.0  # the error, in %, of a run that diverged: the search never chooses it

# --- controls, each a method of its own -----------------------------------------------------------


def noise(look: Look, state: State, *, generator: torch.Generator) -> tuple[list[Tensor], State]:
    """The gradient at a random point as far away as SAM's: a direction that costs no pass.

    Passes: 1.
    """
    return look.along(look.params, partial(random_direction, generator=generator)), state


def reversed_momentum(look: Look, state: State) -> tuple[list[Tensor], State]:
    """Momentum-SAM with the other sign: looks to where the momentum has come from. Passes: 1."""
    return look.along(look.momentum()), state


def random_reuse(
    look: Look,
    state: State,
    *,
    k: int = PERIOD,
    alpha: float = 0.7,
    generator: torch.Generator,
) -> tuple[list[Tensor], State]:
    """LookSAM with a random direction across the gradient in the place of the kept one.

    Passes: 1 + 1/k.
    """
    g, t = look(), state.get("t", 0)
    if t % k == 0:
        return look.along(g), {"t": t + 1}
    drawn = random_direction(look.params, g, 1.0, generator=generator)
    return plus(g, alpha * global_norm(g), unit(reject(drawn, g))), {"t": t + 1}


def random_subset(
    look: Look, state: State, *, gamma: float = 0.5, generator: torch.Generator
) -> tuple[list[Tensor], State]:
    """ESAM with random examples in the place of those that rise most, and random weights as there.

    Half of the tensors are perturbed, by rho over a half. Passes: 1 + gamma, as nothing is ranked.
    """
    g = look()
    count = len(look.losses())
    taken = torch.rand(len(g), generator=generator, device=generator.device) < 0.5
    g = [x if take else torch.zeros_like(x) for x, take in zip(g, taken.tolist(), strict=True)]
    drawn = torch.randperm(count, generator=generator, device=generator.device)
    kept = drawn[: max(1, round(gamma * count))].sort().values
    return look.at(times(2.0, look.epsilon(g)), examples=kept), state


# --- who takes part -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A method in the comparison, with the one number that the search may choose.

    Attributes:
        title: as tables and figures name it.
        passes: passes a step.
        start: the smallest value that the search tries.
        how: what a `Phase` takes at a value; empty for the optimizer alone.
        recipe: what of the recipe changes at a value.
        tuned: what the value is, in words.
        share: the share of the budget that it uses at a value.
        clock: processor time of a step over one of SGD, in the study ``clock``; 0 for none.
    """

    title: str
    passes: float
    start: float
    how: Callable[[float], dict[str, Any]] = field(default=lambda value: {}, repr=False)
    recipe: Callable[[float], dict[str, Any]] = field(default=lambda value: {}, repr=False)
    tuned: str = "radius"
    share: Callable[[float], float] = field(default=lambda value: 1.0, repr=False)
    clock: float = 0.0

    def epochs(self, budget: int, value: float, cost: float | None = None) -> int:
        """How many epochs `budget` passes over the data allow, at `cost` passes a step."""
        return max(1, round(self.share(value) * budget / (cost or self.passes)))


def _method(method: Any, **bound: Any) -> Callable[[float], dict[str, Any]]:
    """A method whose radius is tuned."""
    return lambda value: {"rho": value, "method": partial(method, **bound) if bound else method}


def _lr(value: float) -> dict[str, Any]:
    return {"lr": value}


def _knob(method: Any, name: str, rho: float, **bound: Any) -> Callable[[float], dict[str, Any]]:
    """A method at a fixed radius, one argument of which is tuned."""
    return lambda value: {"rho": rho, "method": partial(method, **bound, **{name: value})}


def _every(look: Look, state: State) -> tuple[list[Tensor], State]:
    """SAM at every fifth step, as a method: LookSAM without the reused part."""
    return looksam(look, state, k=PERIOD, alpha=0.0)


CONTENDERS = {
    "sgd": Contender("SGD", 1, 0.05, recipe=_lr, tuned="learning rate"),
    "sgd_early": Contender(
        "SGD, stopped early", 1, 0.125, tuned="share of the passes", share=lambda value: value
    ),
    "nesterov": Contender(
        "Nesterov",
        1,
        0.05,
        recipe=lambda value: {"lr": value, "nesterov": True},
        tuned="learning rate",
    ),
    "noise": Contender("random direction", 1, 0.25, _method(noise)),
    "momentum_sam": Contender("Momentum-SAM", 1, 0.25, _method(momentum_sam), clock=1.44),
    "every": Contender("SAM every 5th step", 1.2, 0.1, _method(_every)),
    "looksam": Contender(
        "LookSAM", 1.2, 0.1, _knob(looksam, "alpha", 0.2, k=PERIOD), tuned="alpha"
    ),
    "random_reuse": Contender(
        "LookSAM, random part", 1.2, 0.1, _knob(random_reuse, "alpha", 0.2), tuned="alpha"
    ),
    "graphsam": Contender("GraphSAM", 1.1, 0.05, _method(graphsam, k=10)),
    "esam": Contender("ESAM", 4 / 3 + 0.5, 0.025, _method(esam)),
    "random_subset": Contender("ESAM, random examples", 1.5, 0.025, _method(random_subset)),
    "sam": Contender("SAM", 2, 0.05, _method(plain), clock=2.35),
    "gsam": Contender("GSAM", 2, 0.05, _method(gsam)),
    "friendly_sam": Contender("Friendly SAM", 2, 0.05, _method(friendly_sam)),
    "vasso": Contender("VaSSO", 2, 0.05, _method(vasso)),
    "det_sam": Contender("Det-SAM", 2, 0.005, _knob(det_sam, "width", 1.0), tuned="width"),
    "frob_sam": Contender("Frob-SAM", 3, 0.005, _knob(frob_sam, "lam", 0.005), tuned="lambda"),
}
"""Who takes part: controls, the one-pass methods, those that look now and then, and SAM's kin."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD; its `epochs` are the budget, passes over the training set.
        validation: how many of its training examples, the last ones, are not trained on; the
            search judges by them.
        noise: share of the training labels that are drawn anew, from all classes.
        smoothing: of the labels in the loss of training.
        radius: at which the surrogate gap is measured, the same for all.
        probes: random vectors behind trace and Frobenius norm.
        search_seeds: of the runs that choose the strengths; none of them may be reported.
        contenders: keys of `CONTENDERS`.
    """

    recipe: Recipe
    validation: int
    noise: float = 0.3
    smoothing: float = 0.1
    radius: float = 0.1
    probes: int = 30
    search_seeds: tuple[int, ...] = (1000,)
    contenders: tuple[str, ...] = tuple(CONTENDERS)

    @property
    def examples(self) -> int:
        """How many examples are trained on."""
        return self.recipe.train - self.validation


LAPTOP = Config(
    Recipe("mnist_5k", 2500, 2500, "data", hidden=(64,), epochs=40, batch=100, lr=0.1, tol=2e-2),
    validation=1500,
)
# No paper compares all of these. The same question asked of a wide residual network.
PAPER = Config(
    Recipe(
        "cifar10",
        50_000,
        10_000,
        standardize="data",
        depth=16,
        width=8,
        augment=True,
        epochs=400,
        lr=0.1,
        measured=5000,
    ),
    validation=5000,
)


def loss_fn(smoothing: float) -> nn.Module:
    """The losses (N,) of examples, whose mean is trained on."""
    return nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")


def mean_loss(smoothing: float) -> nn.Module:
    """The mean of `loss_fn`."""
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def noisy(y: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Labels (N,) of which a share is drawn anew, from all classes with equal probability."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.rand(len(y), generator=generator) < share
    drawn = torch.randint(classes, (len(y),), generator=generator)
    return torch.where(taken.to(y.device), drawn.to(y), y)


def prepare(
    config: Config, recipe: Recipe, seed: int, device: torch.device | str, **how: Any
) -> tuple[Training, Dataset]:
    """A run before its first epoch, on the noisy labels, and its data with the true ones.

    Args:
        how: what `Recipe.training` takes besides.
    """
    training, dataset = recipe.training(
        seed,
        device,
        loss_fn=loss_fn(config.smoothing),
        examples=config.examples,
        **{"schedule": cosine, **how},
    )
    training.y = noisy(training.y, config.noise, dataset.classes, seed)
    return training, dataset


def trained(
    config: Config,
    name: str,
    value: float,
    seed: int,
    device: torch.device | str = "cpu",
    cost: float | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Training, Dataset]:
    """The run of a contender at a value, after its last epoch.

    Args:
        name: a key of `CONTENDERS`.
        cost: what a step costs, in units of the budget; by default its passes.
        tick: told after each epoch how many are done, and of how many.
    """
    contender = CONTENDERS[name]
    epochs = contender.epochs(config.recipe.epochs, value, cost)
    recipe = config.recipe.but(epochs=epochs, **contender.recipe(value))
    phases = [Phase(0, epochs, **contender.how(value))]
    training, dataset = prepare(config, recipe, seed, device, phases=phases)
    training.run(on_epoch=lambda: tick(training.epoch, epochs))
    return training, dataset


@functools.cache
def search(config: Config, name: str, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """The validation error in %, mean over the search's seeds, at each value that is tried."""
    start, means = CONTENDERS[name].start, []
    for step in STEPS:
        found = []
        for seed in config.search_seeds:
            training, dataset = trained(config, name, step * start, seed, device)
            found.append(validation_error(config, training.model, dataset))
        means.append(fmean(found))
    return tuple(means)


def validation_error(config: Config, model: nn.Module, dataset: Dataset) -> float:
    """The error in % on the examples that are held out from training; `WORST` if it diverged."""
    held_out = slice(config.examples, None)
    return _error(model, dataset.x[held_out], dataset.y[held_out], config.smoothing)


def test_error(config: Config, model: nn.Module, dataset: Dataset) -> float:
    """The same on the test set, which no search has seen."""
    return _error(model, dataset.x_test, dataset.y_test, config.smoothing)


def _error(model: nn.Module, x: Tensor, y: Tensor, smoothing: float) -> float:
    loss, wrong = evaluate(model, x, y, mean_loss(smoothing))
    return 100 * wrong if math.isfinite(loss) else WORST


def gap(model: nn.Module, x: Tensor, y: Tensor, smoothing: float, rho: float) -> float:
    """The surrogate gap: the loss at a distance rho along the gradient, less the loss."""
    fn, params = mean_loss(smoothing), list(model.parameters())
    model.eval()
    loss = fn(model(x), y)
    ahead = times(rho, unit(torch.autograd.grad(loss, params)))
    shifted = dict(zip(dict(model.named_parameters()), plus(params, 1.0, ahead), strict=True))
    with torch.no_grad():
        there = fn(torch.func.functional_call(model, shifted, (x,)), y)
    return float(there - loss.detach())


def frobenius(H: Any, probes: int, seed: int = 0) -> tuple[float, float]:
    r"""The trace of a symmetric matrix and its Frobenius norm, from $z^T H z$ and $\|Hz\|^2$.

    Args:
        H: has a `shape`, and multiplies vectors.
        probes: vectors of random signs.
    """
    generator = torch.Generator().manual_seed(seed)
    traces, squares = [], []
    for _ in range(probes):
        z = torch.randint(2, (H.shape[1],), generator=generator).to(H.dtype).mul_(2).sub_(1)
        z = z.to(H.device)
        product = H @ z
        traces.append(float(z @ product))
        squares.append(float(product @ product))
    return fmean(traces), math.sqrt(fmean(squares))


def measure(config: Config, training: Training, dataset: Dataset) -> dict[str, float]:
    """What is measured at the end of a run.

    Returns:
        ``test_error`` and ``train_error`` in %; ``loss``, the smoothed one over all training
        examples; over those examined, of the same loss, ``sharpness``, ``trace``, ``frobenius``
        and ``gap`` (see `gap`).
    """
    fn = mean_loss(config.smoothing)
    loss, wrong = evaluate(training.model, training.x, training.y, fn)
    x, y = config.recipe.examined(training)
    H = config.recipe.hessian(training, fn)
    trace, norm = frobenius(H, config.probes)
    return {
        "test_error": test_error(config, training.model, dataset),
        "train_error": 100 * wrong,
        "loss": loss,
        "sharpness": float(H.top(tol=config.recipe.tol).values[0]),
        "trace": trace,
        "frobenius": norm,
        "gap": gap(training.model, x, y, config.smoothing, config.radius),
    }


# --- the studies ----------------------------------------------------------------------------------


def _run(config: Config, cell: Cell, cost: float | None = None) -> Columns:
    name = cell["method"]
    tried = search(config, name, cell.device)
    value = STEPS[int(np.argmin(tried))] * CONTENDERS[name].start
    training, dataset = trained(config, name, value, cell.seed, cell.device, cost, cell.tick)
    columns: Columns = {
        name: [number] for name, number in measure(config, training, dataset).items()
    }
    return {
        **columns,
        "epochs": [training.epochs],
        "passes": [training.epochs * CONTENDERS[name].passes],
        "value": [value],
        "tried": [step * CONTENDERS[name].start for step in STEPS],
        "validation_error": list(tried),
    }


def run_passes(config: Config, cell: Cell) -> Columns:
    """A contender with the budget in passes.

    Returns:
        The columns of `measure`, and ``epochs``, ``passes`` over the training set, ``value`` that
        the search chose, and what it chose from, ``tried`` and ``validation_error`` in %.
    """
    return _run(config, cell)


def run_clock(config: Config, cell: Cell) -> Columns:
    """A contender with the processor time of SGD, at the value that the search with passes chose;
    the columns are the same."""
    return _run(config, cell, CONTENDERS[cell["method"]].clock)


def _clocked(config: Config) -> list[Setting]:
    return [{"method": name} for name in config.contenders if CONTENDERS[name].clock]


STUDIES = Studies(
    Study("passes", lambda config: [{"method": n} for n in config.contenders], run_passes),
    Study("clock", _clocked, run_clock),
)


# --- what the runs decide -------------------------------------------------------------------------


def of(runs: SeedRuns, name: str, study: str = "passes") -> Run:
    """The run of a contender."""
    return runs.one(study=study, method=name)


def gain(runs: SeedRuns, name: str, over: str) -> float:
    """By how many points the test error of the first is smaller than that of the second."""
    one, two = (of(runs, each).value("test_error") for each in (name, over))
    return two - one


def _by_the_clock(runs: SeedRuns, name: str) -> float:
    """The same over SGD, in its processor time."""
    return of(runs, "sgd").value("test_error") - of(runs, name, "clock").value("test_error")


def ratio(runs: SeedRuns, name: str, over: str, column: str) -> float:
    """Ratio of a column of two contenders."""
    return of(runs, name).value(column) / of(runs, over).value(column)


BECKER = Source("Becker et al. 2024 (that one pass suffices; the margin is ours)", "after")
LIU = Source("Liu et al. 2022 (that the kept direction can be reused)", "after")
LIU_ABSTRACT = Source("Liu et al. 2022, abstract (similar gains; the margin is ours)", "paper")
ZHUANG = Source("Zhuang et al. 2022, abstract (better than SAM)", "paper")
DU = Source("Du et al. 2021 (that half of the examples suffice)", "after")


@claim(CONTROL, low=0.0, unit="points", set_after=True, headline=True)
def sam_beats_sgd(runs: SeedRuns) -> float:
    """At equal passes SAM has a smaller test error than SGD, which makes twice as many steps and
    whose learning rate was tuned by as many tries: SGD's test error less SAM's"""
    return gain(runs, "sam", "sgd")


@claim(CONTROL, low=0.0, unit="points", headline=True)
def sam_beats_early_stopping(runs: SeedRuns) -> float:
    """SAM has a smaller test error than SGD that is stopped early, its length tuned by as many
    tries: the latter's test error less SAM's"""
    return gain(runs, "sam", "sgd_early")


@claim(CONTROL, low=0.0, unit="points")
def sam_beats_noise(runs: SeedRuns) -> float:
    """At equal passes SAM has a smaller test error than SGD with the gradient at a random point,
    which makes twice as many steps: the latter's test error less SAM's"""
    return gain(runs, "sam", "noise")


@claim(BECKER, low=0.0, unit="points", set_after=True, headline=True)
def momentum_sam_beats_sgd(runs: SeedRuns) -> float:
    """With one pass a step Momentum-SAM has a smaller test error than SGD with as many steps: SGD's
    test error less Momentum-SAM's"""
    return gain(runs, "momentum_sam", "sgd")


@claim(BECKER, low=0.0, unit="points", set_after=True)
def momentum_sam_beats_sam(runs: SeedRuns) -> float:
    """At equal passes Momentum-SAM has a smaller test error than SAM: SAM's less its own"""
    return gain(runs, "momentum_sam", "sam")


@claim(CONTROL, low=0.0, unit="points")
def momentum_sam_beats_nesterov(runs: SeedRuns) -> float:
    """Momentum-SAM has a smaller test error than Nesterov's method, which it is at one radius, with
    as many passes: Nesterov's test error less its own"""
    return gain(runs, "momentum_sam", "nesterov")


@claim(CONTROL, low=0.0, unit="points")
def momentum_sam_beats_noise(runs: SeedRuns) -> float:
    """Momentum-SAM has a smaller test error than SGD with the gradient at a random point, with as
    many passes: the latter's test error less its own"""
    return gain(runs, "momentum_sam", "noise")


@claim(LIU_ABSTRACT, low=-1.0, unit="points", headline=True)
def looksam_keeps_up_with_sam(runs: SeedRuns) -> float:
    """At equal passes LookSAM, which looks around at every fifth step, is at most one point worse
    than SAM: SAM's test error less LookSAM's"""
    return gain(runs, "looksam", "sam")


@claim(LIU, low=0.0, unit="points")
def looksam_beats_sam_now_and_then(runs: SeedRuns) -> float:
    """Reusing the kept direction helps: test error of SAM at every fifth step and SGD between, less
    LookSAM's, at equal passes"""
    return gain(runs, "looksam", "every")


@claim(CONTROL, low=0.0, unit="points")
def looksam_beats_random_part(runs: SeedRuns) -> float:
    """LookSAM has a smaller test error than with a random direction across the gradient, as long,
    in the place of the kept one: the latter's test error less LookSAM's"""
    return gain(runs, "looksam", "random_reuse")


@claim(DU, low=0.0, unit="points")
def esam_beats_sam(runs: SeedRuns) -> float:
    """At equal passes ESAM has a smaller test error than SAM: SAM's less ESAM's"""
    return gain(runs, "esam", "sam")


@claim(CONTROL, low=0.0, unit="points", headline=True)
def esam_beats_random_examples(runs: SeedRuns) -> float:
    """ESAM has a smaller test error than with random examples in the place of those whose loss
    rises most, which need no ranking, at equal passes: the latter's test error less ESAM's"""
    return gain(runs, "esam", "random_subset")


@claim(ZHUANG, low=0.0, unit="points")
def gsam_beats_sam(runs: SeedRuns) -> float:
    """GSAM has a smaller test error than SAM with as many passes: SAM's less GSAM's"""
    return gain(runs, "gsam", "sam")


@claim(Source("Li et al. 2024 (what Friendly SAM is for)", "after"), low=0.0, unit="points")
def friendly_sam_beats_sam(runs: SeedRuns) -> float:
    """Friendly SAM has a smaller test error than SAM with as many passes: SAM's less its own"""
    return gain(runs, "friendly_sam", "sam")


@claim(Source("Li & Giannakis 2023 (what VaSSO is for)", "after"), low=0.0, unit="points")
def vasso_beats_sam(runs: SeedRuns) -> float:
    """VaSSO has a smaller test error than SAM with as many passes: SAM's less its own"""
    return gain(runs, "vasso", "sam")


@claim(CONTROL, high=0.7, domain="positive", set_after=True)
def sam_is_flatter_than_sgd(runs: SeedRuns) -> float:
    """At equal passes SAM ends at no more than 0.7 times the sharpness of SGD: ratio of the largest
    eigenvalues of the smoothed training loss's Hessian"""
    return ratio(runs, "sam", "sgd", "sharpness")


@claim(Source("Tahmasebi et al. 2024 (what Frob-SAM is for)", "after"), high=0.9, domain="positive")
def frob_sam_lowers_frobenius(runs: SeedRuns) -> float:
    """Frob-SAM ends with a smaller Frobenius norm of the Hessian than SAM at equal passes: its norm
    over SAM's"""
    return ratio(runs, "frob_sam", "sam", "frobenius")


@claim(OURS, low=0.5)
def flatter_methods_err_less(runs: SeedRuns) -> float:
    """Across the methods a smaller sharpness goes with a smaller test error: rank correlation of
    sharpness and test error over all contenders of a seed"""
    columns = ("sharpness", "test_error")
    values = [[run.value(name) for run in runs.all(study="passes")] for name in columns]
    return float(require("scipy.stats", extra="book").spearmanr(*values).statistic)


@claim(CONTROL, low=0.0, unit="points", set_after=True)
def sam_beats_sgd_by_the_clock(runs: SeedRuns) -> float:
    """In the processor time that SGD takes, on a network where overheads weigh most, SAM has a
    smaller test error than SGD: SGD's test error less SAM's"""
    return _by_the_clock(runs, "sam")


@claim(BECKER, low=0.0, unit="points", set_after=True)
def momentum_sam_beats_sgd_by_the_clock(runs: SeedRuns) -> float:
    """In the processor time that SGD takes, on a network where overheads weigh most, Momentum-SAM
    has a smaller test error than SGD: SGD's test error less Momentum-SAM's"""
    return _by_the_clock(runs, "momentum_sam")


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed: the passes of searches and of reported runs."""
    runs = len(config.contenders) + len(_clocked(config))
    searches = len(config.contenders) * len(STEPS) * len(config.search_seeds)
    products = runs * 2 * (config.probes + 30) * config.recipe.measured
    passes = (runs + searches) * config.recipe.epochs * config.examples
    return (passes + products) * config.recipe.gradient_flops()


EXPERIMENT = Experiment(
    name="second_pass",
    title="What the second pass is worth: the SAM family at equal passes",
    source="this book",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=[
        sam_beats_sgd,
        sam_beats_early_stopping,
        sam_beats_noise,
        momentum_sam_beats_sgd,
        momentum_sam_beats_sam,
        momentum_sam_beats_nesterov,
        momentum_sam_beats_noise,
        looksam_keeps_up_with_sam,
        looksam_beats_sam_now_and_then,
        looksam_beats_random_part,
        esam_beats_sam,
        esam_beats_random_examples,
        gsam_beats_sam,
        friendly_sam_beats_sam,
        vasso_beats_sam,
        sam_is_flatter_than_sgd,
        frob_sam_lowers_frobenius,
        flatter_methods_err_less,
        sam_beats_sgd_by_the_clock,
        momentum_sam_beats_sgd_by_the_clock,
    ],
    cost=cost,
)
