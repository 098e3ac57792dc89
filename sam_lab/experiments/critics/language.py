r"""Does SAM help a language model? A small Transformer on little text, at equal passes.

Bahri, Mobahi & Tay (2022, arXiv:2110.08529) report that SAM substantially improves the
generalization of language models on benchmarks such as GLUE, most where the training data is
limited. Singh et al. (2025, arXiv:2502.02407) find the contrary: SAM often makes language models
worse, even with twice the compute. Neither setting fits on a laptop. What does fit is the question:
a Transformer that predicts the next character and has so little text that it overfits.

Every contender may make the same number of passes, each over a fresh minibatch of windows: SAM,
which makes two passes a step, has half of SGD's steps, but `sam_twice`, which has as many steps as
SGD and so twice the passes. The learning rate falls along a cosine to 0. One number of each
contender is chosen of four by the validation loss at the end, on a seed that is not reported: SGD's
learning rate, SAM's radius, that of a random direction (the gradient at a random point, one pass),
and the share of the passes after which SGD is stopped (at the learning rate of SAM; its cosine is
as short).

Who makes fewer steps fits less and so overfits less. SAM's test loss is therefore also compared
with SGD's where SGD has SAM's training loss. Losses are cross-entropies in nats a character, on
windows that are the same throughout.

SAM's learning rate is not that of SGD. Ten seeds were also run with the learning rate that SGD's
search had chosen, 0.4, for all: there SAM's search ended with a larger validation loss at every
radius, so that SAM has the better one of two learning rates here. At 0.8 SGD diverged. All criteria
count as set after the first data: a pilot on the search's seed had shown SGD and SAM on more text,
and the bounds on the difference at equal training loss were set when runs had been seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import models, text
from sam_lab.experiments.family.second_pass import noise
from sam_lab.experiments.lab.claims import CONTROL, OURS, NotApplicable, Source, claim
from sam_lab.experiments.lab.cost import gradient_flops
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.sam import SAM
from sam_lab.training import cosine

__all__ = ["CONTENDERS", "Config", "Contender", "at_best", "search", "train"]

BAHRI = Source("Bahri et al. 2022 (equal passes, and the margin, are ours)", "after")
SINGH = Source("Singh et al. 2025, abstract (often worse, even with twice the compute)", "paper")


@dataclass(frozen=True)
class Contender:
    """What takes part, with the one number that the search chooses.

    Attributes:
        title: as tables and figures name it.
        tuned: what the number is, in words.
        tried: the values that are tried, in rising order.
        cost: passes a step.
        budget: passes that it may make, in units of the config's.
        like: the contender whose search serves this one too.
    """

    title: str
    tuned: str
    tried: tuple[float, ...]
    cost: int = 1
    budget: int = 1
    like: str = ""


CONTENDERS = {
    "sgd": Contender("SGD", "learning rate", (0.05, 0.1, 0.2, 0.4)),
    "early": Contender("SGD, stopped early", "share of the passes", (0.25, 0.5, 0.75, 1.0)),
    "noise": Contender("random direction", "radius", (0.25, 0.5, 1.0, 2.0)),
    "sam": Contender("SAM", "radius", (0.0125, 0.025, 0.05, 0.1), cost=2),
    "sam_twice": Contender(
        "SAM, twice the passes", "radius", (0.0125, 0.025, 0.05, 0.1), 2, 2, like="sam"
    ),
}
"""Who takes part."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: the text.
        characters: how many of its first ones are trained on.
        validation: how many of the training text's last ones the search judges by.
        layers, width, heads: of the Transformer.
        length, batch: characters of a window, and windows of a minibatch.
        lr, momentum: of SGD, but for the learning rate of the contender "sgd".
        passes: the budget.
        looks: how often the losses are measured along a run, its beginning not counted.
        windows: on how many windows each of them is.
        search_seed: of the runs that choose; it may not be reported.
    """

    data: str = "python_reference"
    characters: int = 4000
    validation: int = 20_000
    layers: int = 1
    width: int = 32
    heads: int = 4
    length: int = 32
    batch: int = 16
    lr: float = 0.2
    momentum: float = 0.9
    passes: int = 480
    looks: int = 12
    windows: int = 120
    search_seed: int = 1000


LAPTOP = Config()
# No paper trains this; the same question asked of a network and a text that are less small.
PAPER = Config(
    data="shakespeare",
    characters=300_000,
    validation=100_000,
    layers=6,
    width=128,
    heads=8,
    length=64,
    batch=128,
    passes=12_000,
    windows=1000,
)


def settings(config: Config) -> list[Setting]:
    """Every contender."""
    return [{"method": name} for name in CONTENDERS]


def train(
    config: Config,
    name: str,
    value: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Columns:
    """The run of a contender at a value of its number.

    Args:
        name: a key of `CONTENDERS`.
        tick: told after each step how many are done, and of how many.

    Returns:
        At each look: ``passes`` so far, and ``loss``, ``validation_loss``, ``test_loss`` in nats.

    Raises:
        ValueError: an unknown text, or one too short.
    """
    loaded = text.load(config.data, device=device)
    tokens = loaded.tokens[: config.characters]
    held_out = loaded.tokens[-config.validation :]
    generator = torch.Generator().manual_seed(seed)
    watched = {
        column: text.windows(part, config.length, config.windows, torch.Generator().manual_seed(0))
        for column, part in (
            ("loss", tokens),
            ("validation_loss", held_out),
            ("test_loss", loaded.tokens_test),
        )
    }
    model = network(config, seed, device)
    sam, lr = _around(model, config, name, value, seed)
    share = value if name == "early" else 1.0
    cost = CONTENDERS[name].cost
    steps = round(share * CONTENDERS[name].budget * config.passes / cost)
    seen = Rows()
    moments = {round(look * steps / config.looks) for look in range(config.looks + 1)}
    for step in range(steps + 1):
        if step in moments:
            with torch.no_grad():
                losses = {column: float(_loss(model, *part)) for column, part in watched.items()}
            seen.add(passes=step * cost, **losses)
        if step < steps:
            for group in sam.optimizer.param_groups:
                group["lr"] = lr * cosine(step / steps)
            batch = text.windows(tokens, config.length, config.batch, generator)
            sam.step(functools.partial(_loss, model, *batch))
            tick(step + 1, steps)
    return seen.columns


def network(config: Config, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """The Transformer before its first step."""
    return models.transformer(
        text.VOCAB,
        config.width,
        config.layers,
        config.heads,
        config.length,
        seed=seed,
        device=device,
    )


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _around(
    model: nn.Module, config: Config, name: str, value: float, seed: int
) -> tuple[SAM, float]:
    """A contender's optimizer, and the learning rate it begins with."""
    lr = value if name == "sgd" else config.lr
    rho = value if CONTENDERS[name].tuned == "radius" else 0.0
    how: dict[str, Any] = {}
    if name == "noise":
        how = {"method": noise, "generator": torch.Generator().manual_seed(seed)}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum)
    return SAM(optimizer, rho, model, **how), lr


@functools.cache
def search(config: Config, name: str, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """The validation loss at the end of the run on the search's seed, at each value tried;
    infinite where it diverged."""
    ends = (
        train(config, name, value, config.search_seed, device)["validation_loss"][-1]
        for value in CONTENDERS[name].tried
    )
    return tuple(loss if math.isfinite(loss) else math.inf for loss in ends)


def run(config: Config, cell: Cell) -> Columns:
    """One contender with one seed, at the value that the search chose.

    Returns:
        The columns of `train`, ``value`` that was chosen, and what it was chosen from: ``tried``
        and ``search_loss``.

    Raises:
        ValueError: the seed is the search's.
    """
    if cell.seed == config.search_seed:
        raise ValueError(
            f"seed must not be the search's, whose runs chose the values; got {cell.seed}"
        )
    name = cell["method"]
    contender = CONTENDERS[name]
    found = search(config, contender.like or name, cell.device)
    value = contender.tried[int(np.argmin(found))]
    columns = train(config, name, value, cell.seed, cell.device, cell.tick)
    return {
        **columns,
        "value": [value],
        "tried": list(contender.tried),
        "search_loss": list(found),
    }


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed and of the search, without the looks."""
    window = gradient_flops(network(config), torch.zeros(1, config.length, dtype=torch.int64))
    passes = sum(
        each.budget * (1 if each.like else 1 + len(each.tried)) for each in CONTENDERS.values()
    )
    return passes * config.passes * config.batch * window


# --- what the runs decide -------------------------------------------------------------------------


def end(runs: SeedRuns, name: str, column: str = "test_loss") -> float:
    """A column of a contender at the end of its run."""
    return float(runs.one(method=name)[column][-1])


def at_best(run: Run) -> float:
    """The test loss at the look where the validation loss is smallest."""
    return float(run["test_loss"][np.argmin(run["validation_loss"])])


def at_training_loss(run: Run, level: float) -> float:
    """The test loss where the training loss first falls to a level, linear between two looks.

    Raises:
        NotApplicable: it never does.
    """
    below = np.flatnonzero(run["loss"] <= level)
    if not len(below):
        raise NotApplicable(f"the training loss of {run.label} never fell to {level:.3g}")
    last = int(below[0])
    if not last:
        return float(run["test_loss"][0])
    (before, loss), (test_before, test) = (
        run[c][last - 1 : last + 1] for c in ("loss", "test_loss")
    )
    share = (before - level) / (before - loss)
    return float(test_before + share * (test - test_before))


def gain(runs: SeedRuns, name: str, over: str) -> float:
    """By how many nats the test loss of the first is smaller at the end than that of the second."""
    return end(runs, over) - end(runs, name)


@claim(BAHRI, low=0.0, unit="nats", set_after=True, headline=True)
def sam_beats_sgd_at_equal_passes(runs: SeedRuns) -> float:
    """At equal passes SAM ends with a smaller test loss on a language model than SGD, which makes
    twice as many steps and whose learning rate was tuned by as many tries: SGD's less SAM's"""
    return gain(runs, "sam", "sgd")


@claim(BAHRI, low=0.0, unit="nats", set_after=True)
def sam_beats_sgd_at_the_best_look(runs: SeedRuns) -> float:
    """At equal passes SAM's test loss on a language model is smaller than SGD's, each where its
    validation loss is smallest along the run: SGD's less SAM's"""
    sgd, sam = (at_best(runs.one(method=name)) for name in ("sgd", "sam"))
    return sgd - sam


@claim(CONTROL, low=0.0, unit="nats", set_after=True, headline=True)
def sam_beats_early_stopping_on_text(runs: SeedRuns) -> float:
    """On a language model SAM ends with a smaller test loss than SGD that is stopped early, its
    length tuned by as many tries: the latter's less SAM's"""
    return gain(runs, "sam", "early")


@claim(CONTROL, low=0.0, unit="nats", set_after=True)
def sam_beats_noise_on_text(runs: SeedRuns) -> float:
    """At equal passes SAM ends with a smaller test loss on a language model than SGD with the
    gradient at a random point, which makes twice as many steps: the latter's less SAM's"""
    return gain(runs, "sam", "noise")


@claim(CONTROL, -0.05, 0.05, unit="nats", set_after=True, headline=True)
def sam_is_sgd_at_equal_training_loss(runs: SeedRuns) -> float:
    """On a language model SAM's test loss is that of SGD where SGD has SAM's last training loss, so
    that neither has fitted more: SGD's less SAM's"""
    level = end(runs, "sam", "loss")
    return at_training_loss(runs.one(method="sgd"), level) - end(runs, "sam")


@claim(SINGH, high=0.0, unit="nats", set_after=True)
def sam_degrades_even_with_twice_the_passes(runs: SeedRuns) -> float:
    """On a language model SAM ends with a larger test loss than SGD even where it makes as many
    steps, and so twice the passes: SGD's test loss less SAM's"""
    return gain(runs, "sam_twice", "sgd")


@claim(OURS, low=0.0, unit="nats", set_after=True)
def sam_fits_less_of_the_text(runs: SeedRuns) -> float:
    """At equal passes SAM ends with a larger training loss on a language model than SGD: SAM's less
    SGD's"""
    return end(runs, "sam", "loss") - end(runs, "sgd", "loss")


EXPERIMENT = Experiment(
    name="language",
    title="SAM on a small Transformer with little text, at equal passes",
    source="after Bahri et al. 2022 (arXiv:2110.08529) and Singh et al. 2025 (arXiv:2502.02407)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        sam_beats_sgd_at_equal_passes,
        sam_beats_sgd_at_the_best_look,
        sam_beats_early_stopping_on_text,
        sam_beats_noise_on_text,
        sam_is_sgd_at_equal_training_loss,
        sam_degrades_even_with_twice_the_passes,
        sam_fits_less_of_the_text,
    ],
    cost=cost,
)
