r"""Does flatness tell which network errs less? A grid of networks, all at one training loss.

Networks that differ in learning rate, batch size, width and SAM's radius (0 for SGD) learn the same
examples until their training loss falls to one level; each is measured there, and one that never
gets there is left out. At one training loss sharpness can be compared, and nobody gains by having
trained less. A share of the labels is drawn anew, so that there is something to gain; the whole
grid is also trained on true labels.

Each measure is asked in how far it ranks the networks by their test error: Kendall's coefficient,
the share of pairs that it puts in the right order less the share that it puts in the wrong one
(`concordance`). Over all pairs it can owe everything to one hyper-parameter which moves both. So it
is also taken over the pairs that agree in one hyper-parameter, and over those that differ in one
alone: the mean of the latter over the hyper-parameters is the granulated coefficient of Jiang et
al. (2020).

Two more questions are asked of the same networks. *Rescaling* (Dinh et al. 2017): with its first
layer times a factor and the next over it, a ReLU network is the same function, and its Hessian is
another. What is left of the ranking if the factor is drawn, or chosen? *Logit scale*: test losses
are compared as they are, and with all logits of a network over one temperature, fitted on examples
that were held out. This cannot change an error.

Before the first run of this experiment sharpness, trace and test error of 17 networks of a larger
size had been seen, all with wrong labels and on seed 50: criteria on these count as set after the
first data. So do those that compare adaptive sharpness with other measures, which were added when
two seeds had been seen, and those at nearly equal training loss or logit scale, added after all of
them. Of all else nothing had been seen but the steps that networks of seed 50 take.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from sam_lab.data import Dataset
from sam_lab.experiments.family.second_pass import gap, noisy
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import Ratio
from sam_lab.experiments.recipe import Recipe, hessian
from sam_lab.perturbations import global_norm, steepest
from sam_lab.stack import Stack
from sam_lab.training import evaluate

__all__ = [
    "AXES",
    "MEASURES",
    "adaptive_sharpness",
    "agree",
    "alone",
    "best_temperature",
    "concordance",
    "granulated",
    "input_gradient",
    "measure",
    "near",
    "networks",
    "prepare",
    "ranking",
    "rescaled",
    "train",
]

cross_entropy = nn.functional.cross_entropy
Table = dict[str, NDArray[np.float64]]
"""Column -> one entry a network."""

AXES = {
    "lr": "learning rate",
    "batch": "batch size",
    "width": "width",
    "rho": "radius",
}
"""The hyper-parameters of the grid."""

MEASURES = {
    "sharpness": "sharpness λ₁",
    "trace": "trace of the Hessian",
    "rise": "rise along the gradient",
    "adaptive": "adaptive sharpness",
    "input_gradient": "gradient in the input",
    "norm": "weight norm",
    "temperature": "best temperature",
    "steps": "steps to the level",
}
"""What is asked to rank networks by test error; all but the last three are measures of flatness."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data and network; its `train` examples are `examples` that are trained on and, after
            them, those that are held out.
        examples: how many are trained on.
        pool: images are averaged over squares of so many pixels before.
        noises: shares of their labels that are drawn anew, from all classes.
        level: of the training loss, at which a network is measured.
        steps: after which a network is left out.
        check: steps from one look at the training loss to the next.
        lrs, batches, widths, rhos: the grid. A width multiplies all hidden layers or channels of
            the recipe; the first radius is 0, SGD.
        radius: of the rise along the gradient.
        adaptive_radius: of the adaptive sharpness.
        ascents: steps of its ascent.
        probes: random vectors behind the trace.
        factors: by which networks are rescaled; the first is 1, and they grow.
    """

    recipe: Recipe
    examples: int
    pool: int = 1
    noises: tuple[float, ...] = (0.3, 0.0)
    level: float = 0.1
    steps: int = 1000
    check: int = 20
    lrs: tuple[float, ...] = (0.15, 0.3, 0.6)
    batches: tuple[int, ...] = (32, 128)
    widths: tuple[int, ...] = (1, 3)
    rhos: tuple[float, ...] = (0.0, 0.05, 0.15)
    radius: float = 0.1
    adaptive_radius: float = 0.5
    ascents: int = 10
    probes: int = 20
    factors: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)


LAPTOP = Config(
    Recipe("mnist_5k", 1000, 4000, "data", hidden=(40,), measured=500, tol=2e-2),
    examples=500,
    pool=2,
)
# Jiang et al. have networks of their own. The same question asked of a convolutional network.
PAPER = Config(
    Recipe("cifar10", 50_000, 10_000, "data", channels=(32, 64), measured=5000, tol=2e-2),
    examples=45_000,
    steps=100_000,
    check=500,
    lrs=(0.05, 0.1, 0.2),
    batches=(32, 64, 128),
    widths=(1, 2, 4),
)


def settings(config: Config) -> list[Setting]:
    """One stack of networks for each share of wrong labels, batch size and width."""
    return [
        {"noise": noise, "batch": batch, "width": width}
        for noise in config.noises
        for batch in config.batches
        for width in config.widths
    ]


# --- the networks ---------------------------------------------------------------------------------


def prepare(
    config: Config, noise: float, seed: int, device: torch.device | str = "cpu"
) -> tuple[Dataset, Dataset]:
    """The data of a seed: as it is trained on, and as it is held out.

    Returns:
        Two data sets with the same test set, with true labels. The training set of the first has
        labels of which a share is drawn anew; that of the second are the examples held out.
    """
    dataset = config.recipe.dataset(seed, device)

    def pooled(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, config.pool) if config.pool > 1 else x

    x, x_test = pooled(dataset.x), pooled(dataset.x_test)
    y = noisy(dataset.y, noise, dataset.classes, seed)
    n = config.examples
    parts = [(x[:n], y[:n]), (x[n:], dataset.y[n:])]
    trained, held_out = (
        Dataset(dataset.name, *part, x_test, dataset.y_test, dataset.classes, dataset.source)
        for part in parts
    )
    return trained, held_out


def _network(config: Config, dataset: Dataset, width: int, seed: int) -> nn.Module:
    recipe = config.recipe
    wide = recipe.but(
        hidden=tuple(width * size for size in recipe.hidden),
        channels=tuple(width * size for size in recipe.channels),
    )
    return wide.network(dataset, seed, dataset.x.device)


def train(
    config: Config,
    dataset: Dataset,
    batch: int,
    width: int,
    seed: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, float, int, nn.Module | None]]:
    """Every learning rate with every radius, from the same weights and on the same batches.

    Returns:
        For each run its learning rate, radius, steps, and network at the first look at which its
        training loss was the level or less; no network where there was no such look.
    """
    model = _network(config, dataset, width, seed)
    pairs = [(lr, rho) for lr in config.lrs for rho in config.rhos]
    found: dict[tuple[float, float], tuple[int, nn.Module]] = {}
    left, models = pairs, [model] * len(pairs)
    stack = _stack(models, left)
    batches = _batches(dataset, batch, seed)
    for steps in range(1, config.steps + 1):
        stack.step(*next(batches))
        if steps % config.check:
            continue
        tick(steps, config.steps)
        there = (stack.losses(dataset.x, dataset.y) <= config.level).tolist()
        if not any(there):
            continue
        models = list(stack.models())
        for pair, net, done in zip(left, models, there, strict=True):
            if done:
                found[pair] = steps, net
        # plain SGD has no state, so the others go on as they were
        models = [net for net, done in zip(models, there, strict=True) if not done]
        left = [pair for pair, done in zip(left, there, strict=True) if not done]
        if not left:
            break
        stack = _stack(models, left)
    return [(*pair, *found.get(pair, (config.steps, None))) for pair in pairs]


def _batches(dataset: Dataset, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset.x), generator=generator).to(dataset.x.device)
        for part in order.split(batch):
            yield dataset.x[part], dataset.y[part]


def _stack(models: Sequence[nn.Module], pairs: Sequence[tuple[float, float]]) -> Stack:
    lrs, rhos = zip(*pairs, strict=True)
    return Stack(models, lambda forward, x, y: cross_entropy(forward(x), y), lrs, rhos)


# --- the measures ---------------------------------------------------------------------------------


def adaptive_sharpness(
    model: nn.Module, x: Tensor, y: Tensor, rho: float, steps: int = 10
) -> float:
    r"""How far the loss rises within an ellipsoid that scales with the weights.

    $\max L(w + \epsilon) - L(w)$ over $\|\epsilon / w\| \le \rho$, the quotient elementwise, of the
    mean cross-entropy L. It is searched by normalised gradient steps of $2\rho$ over their number,
    with projection, and the highest loss on the way counts: a bound from below. Layers that are
    rescaled without changing a ReLU network leave it as it is.

    Args:
        x, y: examples (N, ...) and labels (N,).
        rho: radius, without a unit.

    Source: Kwon et al. 2021, definition of adaptive sharpness with element-wise normalisation
    (arXiv:2102.11600); here over all parameters, biases too, with eta = 0.
    """
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach() for p in model.parameters()]
    sizes = [w.abs() for w in weights]

    def loss_at(scaled: Sequence[Tensor]) -> Tensor:
        moved = [w + t * e for w, t, e in zip(weights, sizes, scaled, strict=True)]
        out = functional_call(model, dict(zip(names, moved, strict=True)), (x,))
        return cross_entropy(out, y)

    scaled = [torch.zeros_like(w) for w in weights]
    start = highest = -math.inf
    for step in range(steps + 1):
        for e in scaled:
            e.requires_grad_(True)
        loss = loss_at(scaled)
        value = float(loss.detach())
        start = value if step == 0 else start
        highest = max(highest, value)
        grads = torch.autograd.grad(loss, scaled)
        ahead = steepest(grads, 2 * rho / steps, global_norm(grads))
        scaled = [e.detach() + a for e, a in zip(scaled, ahead, strict=True)]
        shrink = (rho / global_norm(scaled)).clamp(max=1.0)
        scaled = [e * shrink for e in scaled]
    return highest - start


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean over examples (N, ...) of the length of the loss's gradient in the input."""
    x = x.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), x)
    return float(g.flatten(1).norm(dim=1).mean())


def best_temperature(logits: Tensor, y: Tensor) -> float:
    r"""The temperature T for which the mean cross-entropy of ``logits / T`` is least.

    The cross-entropy is convex in 1/T, so that a bisection on its slope finds T, here between
    1/1000 and 1000.

    Args:
        logits: (N, K).
        y: labels (N,).

    Source: Guo et al. 2017, temperature scaling (arXiv:1706.04599).
    """
    logits = logits.detach().double()
    right = logits.gather(1, y[:, None])[:, 0]

    def slope(beta: float) -> float:
        expected = ((beta * logits).softmax(1) * logits).sum(1)
        return float((expected - right).mean())

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(50):
        middle = (low + high) / 2
        if slope(math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def rescaled(model: nn.Module, factor: float) -> nn.Module:
    """A copy of the network with its first layer times a factor, and the next one's weight over it.

    Of a ReLU network without norm layers it is the same function.

    Raises:
        ValueError: the factor is not above 0, or there are fewer than two layers with weights.
    """
    if not factor > 0:
        raise ValueError(f"factor must be above 0, got {factor!r}")

    other = copy.deepcopy(model)
    layers = [m for m in other.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if len(layers) < 2:
        raise ValueError(f"model must have two layers with weights or more, it has {len(layers)}")
    with torch.no_grad():
        for p in layers[0].parameters():
            p.mul_(factor)
        layers[1].weight.div_(factor)
    return other


def measure(
    config: Config, model: nn.Module, trained: Dataset, held_out: Dataset
) -> dict[str, float]:
    """What is measured of a network.

    Returns:
        Those of `MEASURES` that are not of the training, over the examined examples as they are
        trained on; ``trace_error``, the standard error of the trace; ``loss`` over all training
        examples; ``test_loss``, ``calibrated_loss`` (at the best temperature for the examples held
        out) and ``test_error`` in %, with true labels; ``sharpness_I`` of the network rescaled by
        factor I of the config, and ``adaptive_rescaled`` by the last one.
    """
    recipe = config.recipe
    x, y = trained.x[: recipe.measured], trained.y[: recipe.measured]
    H = hessian(model, x, y)
    # so wide a tolerance that it ends with the least number of probes
    trace = H.trace(tol=10.0, max_hvps=config.probes, min_hvps=config.probes)
    ways = [rescaled(model, factor) for factor in config.factors]
    tops = [float(hessian(way, x, y).top(tol=recipe.tol).values[0]) for way in ways]
    adaptive, adaptive_rescaled = (
        adaptive_sharpness(way, x, y, config.adaptive_radius, config.ascents)
        for way in (model, ways[-1])
    )
    with torch.no_grad():
        temperature = best_temperature(model(held_out.x), held_out.y)
    test_loss, wrong = evaluate(model, trained.x_test, trained.y_test)
    calibrated, _ = evaluate(
        model,
        trained.x_test,
        trained.y_test,
        lambda logits, labels: cross_entropy(logits / temperature, labels),
    )
    return {
        "sharpness": tops[0],
        "trace": trace.value,
        "rise": gap(model, x, y, 0.0, config.radius),
        "adaptive": adaptive,
        "input_gradient": input_gradient(model, x, y),
        "norm": float(global_norm(list(model.parameters()))),
        "temperature": temperature,
        "trace_error": trace.stderr,
        "loss": evaluate(model, trained.x, trained.y)[0],
        "test_loss": test_loss,
        "calibrated_loss": calibrated,
        "test_error": 100 * wrong,
        **{f"sharpness_{i}": top for i, top in enumerate(tops)},
        "adaptive_rescaled": adaptive_rescaled,
    }


def run(config: Config, cell: Cell) -> Columns:
    """All networks of one batch size and width.

    Returns:
        One entry a network: ``lr``, ``rho``, ``reached`` (1, or 0 where its training loss never
        came down to the level), ``steps``, and what `measure` returns, NaN where it was left out.
    """
    trained, held_out = prepare(config, cell["noise"], cell.seed, cell.device)
    found = train(config, trained, cell["batch"], cell["width"], cell.seed, cell.tick)
    measured = [
        None if net is None else measure(config, net, trained, held_out) for *_, net in found
    ]
    names = next((row for row in measured if row is not None), {})
    nothing = dict.fromkeys(names, math.nan)
    rows = Rows()
    for (lr, rho, steps, _), row in zip(found, measured, strict=True):
        reached = float(row is not None)
        rows.add(lr=lr, rho=rho, reached=reached, steps=steps, **(row or nothing))
    return rows.columns


# --- what the runs say ----------------------------------------------------------------------------


def networks(runs: SeedRuns) -> Table:
    """All networks of one seed that reached the level, as one table with the columns of `run`, and
    those of its setting: ``batch`` and ``width``, and ``noise``, which is that of the first run."""
    tables = []
    for run in runs.all(noise=runs.runs[0].settings["noise"]):
        there = run["reached"] > 0
        settings = {name: np.full(len(there), float(run.settings[name])) for name in run.settings}
        columns = {name: run[name] for name in run.columns}
        tables.append({name: values[there] for name, values in (columns | settings).items()})
    full = [table for table in tables if len(table["lr"])]
    return {name: np.concatenate([table[name] for table in full]) for name in full[0]}


def concordance(
    one: NDArray[np.float64], two: NDArray[np.float64], pairs: NDArray[np.bool_] | None = None
) -> float:
    """Kendall's coefficient over some of the pairs: the share that both order alike, less the share
    that they order contrariwise. A tie counts as neither.

    Args:
        one, two: (N,).
        pairs: (N, N), which pairs count; all, unless given. NaN where none does.

    Example:
        >>> concordance(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
        0.3333333333333333
    """
    signs = np.sign(one[:, None] - one) * np.sign(two[:, None] - two)
    counted = np.triu(np.ones(signs.shape, dtype=bool), 1)
    if pairs is not None:
        counted &= pairs
    return float(signs[counted].mean()) if counted.any() else math.nan


def agree(table: Table, *axes: str) -> NDArray[np.bool_]:
    """The pairs of networks, (N, N), with the same value on each of these axes."""
    same = np.ones((len(table["lr"]),) * 2, dtype=bool)
    for axis in axes:
        same &= table[axis][:, None] == table[axis]
    return same


def alone(table: Table, axis: str) -> NDArray[np.bool_]:
    """The pairs of networks, (N, N), that differ on this axis and on no other."""
    others = [name for name in AXES if name != axis]
    return agree(table, *others) & ~agree(table, axis)


def near(table: Table, column: str, share: float) -> NDArray[np.bool_]:
    """The pairs of networks, (N, N), whose values in a column of numbers above 0 differ by less
    than this share."""
    logs = np.log(table[column])
    close: NDArray[np.bool_] = np.abs(logs[:, None] - logs) < math.log1p(share)
    return close


def ranking(table: Table, measure: str, pairs: NDArray[np.bool_] | None = None) -> float:
    """Kendall's coefficient of a measure and the test error: above 0 where less goes with less."""
    return concordance(table[measure], table["test_error"], pairs)


def granulated(table: Table, measure: str) -> float:
    r"""The granulated coefficient: that of the pairs which differ in one hyper-parameter alone, the
    mean over the hyper-parameters.

    Source: Jiang et al. 2020, section 4 (arXiv:1912.02178), where it is the mean over groups of
    networks; with groups of one size, that is the mean over pairs taken here.
    """
    found = [ranking(table, measure, alone(table, axis)) for axis in AXES]
    return float(np.nanmean(found))


def gains(table: Table, column: str) -> NDArray[np.float64]:
    """For each network of SAM, SGD's value in a column less its own; SGD has the same learning
    rate, batch size and width. Those without such a partner have no entry."""
    pairs = alone(table, "rho") & (table["rho"][:, None] == 0)
    sgd, sam = np.nonzero(pairs)
    difference: NDArray[np.float64] = table[column][sgd] - table[column][sam]
    return difference


def shuffled(runs: SeedRuns, table: Table) -> NDArray[np.float64]:
    """The sharpness of the networks after each is rescaled by a factor drawn for it."""
    factors = len(runs.config["factors"])
    drawn = np.random.default_rng(runs.seed).integers(factors, size=len(table["lr"]))
    return _at(table, drawn)


def chosen(runs: SeedRuns, table: Table) -> NDArray[np.float64]:
    """The same with the factors chosen: the fewer errors, the larger the factor."""
    factors = len(runs.config["factors"])
    order = np.argsort(np.argsort(-table["test_error"], kind="stable"), kind="stable")
    return _at(table, order * factors // len(order))


def _at(table: Table, which: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sharpness of each network rescaled by the factor of this number."""
    return np.array([table[f"sharpness_{factor}"][i] for i, factor in enumerate(which)])


# --- what the runs decide -------------------------------------------------------------------------

JIANG = Source("Jiang et al. 2020 (that flatness ranks networks; the criterion is ours)", "after")
MODERN = Source("Andriushchenko et al. 2023, abstract (learning rate, not error)", "paper")
DINH = Source("Dinh et al. 2017, abstract (equivalent networks, sharper at will)", "paper")
KWON = Source("Kwon et al. 2021 (what adaptive sharpness is for)", "after")
KESKAR = Source("Keskar et al. 2017 (small batches: flatter, fewer errors)", "after")


@claim(JIANG, low=0.2, set_after=True, headline=True)
def sharpness_ranks_errors(runs: SeedRuns) -> float:
    """At equal training loss a smaller sharpness goes with a smaller test error: Kendall's
    coefficient of the two over all pairs of networks"""
    return ranking(networks(runs), "sharpness")


@claim(JIANG, low=0.2, set_after=True)
def trace_ranks_errors(runs: SeedRuns) -> float:
    """At equal training loss a smaller trace of the Hessian goes with a smaller test error:
    Kendall's coefficient of the two over all pairs of networks"""
    return ranking(networks(runs), "trace")


@claim(JIANG, low=0.2)
def rise_ranks_errors(runs: SeedRuns) -> float:
    """At equal training loss a smaller rise of the loss along its gradient goes with a smaller test
    error: Kendall's coefficient of the two over all pairs of networks"""
    return ranking(networks(runs), "rise")


@claim(JIANG, low=0.2)
def adaptive_ranks_errors(runs: SeedRuns) -> float:
    """At equal training loss a smaller adaptive sharpness goes with a smaller test error: Kendall's
    coefficient of the two over all pairs of networks"""
    return ranking(networks(runs), "adaptive")


@claim(OURS, low=0.2)
def input_gradient_ranks_errors(runs: SeedRuns) -> float:
    """At equal training loss a smaller gradient of the loss in the input goes with a smaller test
    error: Kendall's coefficient of the two over all pairs of networks"""
    return ranking(networks(runs), "input_gradient")


@claim(JIANG, low=0.2, set_after=True)
def granulated_sharpness(runs: SeedRuns) -> float:
    """Where one hyper-parameter alone is changed, a smaller sharpness goes with a smaller test
    error: Kendall's coefficient over such pairs, mean over learning rate, batch size, width and
    radius"""
    return granulated(networks(runs), "sharpness")


@claim(JIANG, low=0.2)
def granulated_adaptive(runs: SeedRuns) -> float:
    """Where one hyper-parameter alone is changed, a smaller adaptive sharpness goes with a smaller
    test error: Kendall's coefficient over such pairs, mean over learning rate, batch size, width
    and radius"""
    return granulated(networks(runs), "adaptive")


@claim(OURS, low=0.2, set_after=True)
def within_a_learning_rate(runs: SeedRuns) -> float:
    """Among networks of one learning rate a smaller sharpness goes with a smaller test error:
    Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", agree(table, "lr"))


@claim(OURS, low=0.2, set_after=True)
def across_learning_rates(runs: SeedRuns) -> float:
    """Where the learning rate alone is changed, a smaller sharpness goes with a smaller test error:
    Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", alone(table, "lr"))


@claim(KESKAR, low=0.2, set_after=True)
def across_batch_sizes(runs: SeedRuns) -> float:
    """Where the batch size alone is changed, a smaller sharpness goes with a smaller test error:
    Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", alone(table, "batch"))


@claim(OURS, low=0.2)
def across_widths(runs: SeedRuns) -> float:
    """Where the width alone is changed, a smaller sharpness goes with a smaller test error:
    Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", alone(table, "width"))


@claim(OURS, low=0.2, set_after=True)
def across_radii(runs: SeedRuns) -> float:
    """Where SAM's radius alone is changed, a smaller sharpness goes with a smaller test error:
    Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", alone(table, "rho"))


@claim(MODERN, low=0.0)
def sharpness_tells_the_learning_rate(runs: SeedRuns) -> float:
    """Sharpness is a better sign of the learning rate than of the test error: Kendall's coefficient
    of sharpness and learning rate over all pairs that differ in it, its sign left out, less that of
    sharpness and test error over all pairs, its sign left out"""
    table = networks(runs)
    told = concordance(table["sharpness"], table["lr"], ~agree(table, "lr"))
    return abs(told) - abs(ranking(table, "sharpness"))


@claim(CONTROL, high=0.2)
def leftover_loss_ranks_nothing(runs: SeedRuns) -> float:
    """What is left of differences in training loss does not tell the test error: Kendall's
    coefficient of the two over all pairs of networks, its sign left out"""
    return abs(ranking(networks(runs), "loss"))


@claim(CONTROL, low=0.0)
def sharpness_beats_weight_norm(runs: SeedRuns) -> float:
    """Sharpness ranks networks by test error better than their weight norm does: Kendall's
    coefficient with the test error, sharpness's less the norm's"""
    table = networks(runs)
    return ranking(table, "sharpness") - ranking(table, "norm")


@claim(CONTROL, low=0.0)
def sharpness_beats_logit_scale(runs: SeedRuns) -> float:
    """Sharpness ranks networks by test error better than their best temperature does: Kendall's
    coefficient with the test error, sharpness's less the temperature's"""
    table = networks(runs)
    return ranking(table, "sharpness") - ranking(table, "temperature")


@claim(KWON, low=0.2, set_after=True, headline=True)
def adaptive_beats_sharpness(runs: SeedRuns) -> float:
    """Adaptive sharpness ranks networks by test error better than sharpness does: Kendall's
    coefficient with the test error, adaptive sharpness's less that of sharpness"""
    table = networks(runs)
    return ranking(table, "adaptive") - ranking(table, "sharpness")


@claim(CONTROL, low=0.0, set_after=True)
def adaptive_beats_logit_scale(runs: SeedRuns) -> float:
    """Adaptive sharpness ranks networks by test error better than their best temperature does:
    Kendall's coefficient with the test error, adaptive sharpness's less that of the temperature"""
    table = networks(runs)
    return ranking(table, "adaptive") - ranking(table, "temperature")


@claim(CONTROL, low=0.2, set_after=True)
def sharpness_at_nearly_equal_loss(runs: SeedRuns) -> float:
    """Among networks whose training losses differ by less than 5% a smaller sharpness goes with a
    smaller test error: Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "sharpness", near(table, "loss", 0.05))


@claim(CONTROL, low=0.2, set_after=True)
def adaptive_at_nearly_equal_loss(runs: SeedRuns) -> float:
    """Among networks whose training losses differ by less than 5% a smaller adaptive sharpness goes
    with a smaller test error: Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "adaptive", near(table, "loss", 0.05))


@claim(CONTROL, low=0.2, set_after=True)
def adaptive_at_nearly_equal_logit_scale(runs: SeedRuns) -> float:
    """Among networks whose best temperatures differ by less than 5% a smaller adaptive sharpness
    goes with a smaller test error: Kendall's coefficient over such pairs"""
    table = networks(runs)
    return ranking(table, "adaptive", near(table, "temperature", 0.05))


@claim(DINH, high=0.5, undefined="sharpness did not rank the networks before either")
def random_rescaling_hides_it(runs: SeedRuns) -> Ratio:
    """Layers rescaled by factors drawn at random, the functions unchanged, take more than half of
    what sharpness says: Kendall's coefficient of sharpness and test error after, over before"""
    table = networks(runs)
    after = concordance(shuffled(runs, table), table["test_error"])
    return Ratio(after, ranking(table, "sharpness"))


@claim(DINH, high=-0.5)
def rescaling_orders_at_will(runs: SeedRuns) -> float:
    """Layers rescaled by chosen factors, the functions unchanged, make sharper networks err less:
    Kendall's coefficient of sharpness and test error after it"""
    table = networks(runs)
    return concordance(chosen(runs, table), table["test_error"])


@claim(KWON, high=1e-3)
def adaptive_sharpness_is_unchanged(runs: SeedRuns) -> float:
    """Adaptive sharpness is that of the function, not of the scale of its layers: largest change
    by the largest factor, as a share of itself, over all networks"""
    table = networks(runs)
    return float(np.max(np.abs(table["adaptive_rescaled"] / table["adaptive"] - 1)))


@claim(CONTROL, low=0.0, unit="points", set_after=True)
def sam_errs_less_at_equal_training_loss(runs: SeedRuns) -> float:
    """Where SGD and SAM stop at one training loss, so that neither has trained less, SAM errs less:
    test error, SGD's less SAM's with the same learning rate, batch size and width, mean over all
    networks of SAM"""
    return float(gains(networks(runs), "test_error").mean())


@claim(OURS, high=0.5, undefined="SAM's test loss was no smaller than SGD's")
def temperature_explains_gain(runs: SeedRuns) -> Ratio:
    """SAM's gain in test loss over SGD, both at one training loss, is mostly one of logit scale:
    the gain with each network at its best temperature, over the gain without"""
    table = networks(runs)
    after, before = (float(gains(table, name).mean()) for name in ("calibrated_loss", "test_loss"))
    return Ratio(after, before)


EXPERIMENT = Experiment(
    name="measures",
    title="Does flatness tell which network errs less? A grid at one training loss",
    source="this book, after Jiang et al. 2020 (arXiv:1912.02178) and Andriushchenko et al. 2023",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        sharpness_ranks_errors,
        trace_ranks_errors,
        rise_ranks_errors,
        adaptive_ranks_errors,
        input_gradient_ranks_errors,
        granulated_sharpness,
        granulated_adaptive,
        within_a_learning_rate,
        across_learning_rates,
        across_batch_sizes,
        across_widths,
        across_radii,
        sharpness_tells_the_learning_rate,
        leftover_loss_ranks_nothing,
        sharpness_beats_weight_norm,
        sharpness_beats_logit_scale,
        adaptive_beats_sharpness,
        adaptive_beats_logit_scale,
        sharpness_at_nearly_equal_loss,
        adaptive_at_nearly_equal_loss,
        adaptive_at_nearly_equal_logit_scale,
        random_rescaling_hides_it,
        rescaling_orders_at_will,
        adaptive_sharpness_is_unchanged,
        sam_errs_less_at_equal_training_loss,
        temperature_explains_gain,
        *(
            dataclasses.replace(each, headline=False).under(
                "clean", "With true labels alone, ", noise=0.0
            )
            for each in (
                sharpness_ranks_errors,
                adaptive_ranks_errors,
                adaptive_beats_sharpness,
                granulated_sharpness,
                across_radii,
                sam_errs_less_at_equal_training_loss,
                temperature_explains_gain,
            )
        ),
    ],
)
