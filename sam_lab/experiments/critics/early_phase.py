r"""What do the first epochs decide? A deficit that is mended, and a learning rate that is changed.

*Deficit.* Achille et al. (2017): a network that sees blurred images in its first epochs stays worse
for good, however long it trains on sharp ones afterwards; images upside down do no lasting harm.
Here a small network trains for some epochs with a deficit, and then for a fixed number of epochs on
the examples as they are. The deficits are images averaged over squares and smoothed, images upside
down, and labels drawn at random. Two controls have no deficit: one has the epochs after it alone,
the other as many epochs in all. The learning rate is constant, so that the epochs after the deficit
move the weights as far as those before.

*Learning rate.* Jastrzębski et al. (2020): the learning rate of the early phase decides the
curvature along the rest of the run. Here the learning rate is high or low in the first epochs, and
high or low after them. The sharpness of runs with one late learning rate is compared at equal
training loss (`at_the_edge.at_equal_loss`). The loss of training is smoothed, so that its curvature
does not vanish with it.

The criteria were set before the first run of this experiment. Of the deficits, test errors of two
seeds, 50 and 51, had been seen: criteria on them count as set after the first data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.recipe import Recipe
from sam_lab.experiments.sam.at_the_edge import at_equal_loss
from sam_lab.training import evaluate, step_decay

__all__ = ["DEFICITS", "blurred", "deficient", "run_deficit", "run_rate", "upside_down"]


def blurred(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) averaged over squares of `side` pixels, and interpolated back.

    Raises:
        ValueError: the side does not divide height and width.
    """
    height, width = x.shape[-2:]
    if height % side or width % side:
        raise ValueError(f"side must divide images of {height}x{width} pixels, got {side}")
    coarse = nn.functional.avg_pool2d(x, side)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def upside_down(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with their rows in the opposite order."""
    return x.flip(-2)


DEFICITS = {
    "blur": "blurred images",
    "flip": "images upside down",
    "labels": "random labels",
    "none": "none",
}
"""What is wrong with the first epochs; "none" trains as long on the examples as they are."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD; its `epochs` are those after the deficit, and its learning
            rate, which is constant, is that of the study of the deficit.
        deficits: keys of `DEFICITS`.
        durations: of the deficit, in epochs; one of 0, no deficit at all, comes on top.
        side: of the squares over which a blurred image is averaged, in pixels.
        low, high: the learning rates of the other study.
        switches: the epochs in which the learning rate changes.
        course: epochs of a run of the other study.
        smoothing: of the labels in its loss.
    """

    recipe: Recipe
    deficits: tuple[str, ...] = tuple(DEFICITS)
    durations: tuple[int, ...] = (10, 40)
    side: int = 7
    low: float = 0.05
    high: float = 0.25
    switches: tuple[int, ...] = (4,)
    course: int = 40
    smoothing: float = 0.1


LAPTOP = Config(
    Recipe(
        "mnist_5k",
        1000,
        4000,
        "data",
        hidden=(64, 64),
        epochs=30,
        batch=50,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        measured=500,
        tol=2e-2,
    ),
)
# Their network is an all-convolutional one. The same question asked of a residual network.
PAPER = Config(
    Recipe("cifar10", 50_000, 10_000, "data", depth=16, width=4, augment=True, epochs=160, lr=0.05),
    durations=(20, 40, 80, 120),
    side=4,
    low=0.01,
    high=0.1,
    switches=(1, 4, 10),
    course=100,
)


# --- a deficit ------------------------------------------------------------------------------------


def _deficit_settings(config: Config) -> list[Setting]:
    return [
        {"deficit": "none", "duration": 0},
        *({"deficit": name, "duration": k} for name in config.deficits for k in config.durations),
    ]


def deficient(config: Config, name: str, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Examples (N, C, H, W) and labels (N,) as they are with a deficit, a key of `DEFICITS`."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "none": lambda: (x, y),
        "blur": lambda: (blurred(x, config.side), y),
        "flip": lambda: (upside_down(x), y),
        "labels": lambda: (x, y[torch.randperm(len(y), generator=generator).to(y.device)]),
    }
    return changes[name]()


def run_deficit(config: Config, cell: Cell) -> Columns:
    """A training that begins with a deficit.

    Returns:
        ``before``, the loss on the deficient examples when the deficit ends; and at the end the
        loss ``train_loss`` on the examples as they are, ``test_loss``, and ``test_error`` in %.
    """
    recipe, duration = config.recipe, cell["duration"]
    training, dataset = recipe.but(epochs=duration + recipe.epochs).training(cell.seed, cell.device)
    x, y = training.x, training.y
    training.x, training.y = deficient(config, cell["deficit"], x, y, cell.seed)
    training.run(duration)
    before, _ = evaluate(training.model, training.x, training.y)
    training.x, training.y = x, y
    training.run(on_epoch=lambda: cell.tick(training.epoch, training.epochs))
    train_loss, _ = evaluate(training.model, x, y)
    test_loss, wrong = evaluate(training.model, dataset.x_test, dataset.y_test)
    found = {"before": before, "train_loss": train_loss, "test_loss": test_loss}
    return {name: [value] for name, value in (found | {"test_error": 100 * wrong}).items()}


# --- a learning rate ------------------------------------------------------------------------------


def _rate_settings(config: Config) -> list[Setting]:
    one, two = config.low, config.high
    kept = [{"early": lr, "late": lr, "switch": 0} for lr in (one, two)]
    changed = [
        {"early": early, "late": late, "switch": switch}
        for early, late in ((two, one), (one, two))
        for switch in config.switches
    ]
    return [*kept, *changed]


def run_rate(config: Config, cell: Cell) -> Columns:
    """A training whose learning rate changes once.

    Returns:
        After every ``epoch``: ``loss`` over the training set and ``sharpness`` over the
        examined examples, both of the smoothed loss; ``test_error`` in %, of the last weights.
    """
    fn = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    schedule = step_decay({cell["switch"] / config.course: cell["late"] / cell["early"]})
    recipe = config.recipe.but(epochs=config.course, lr=cell["early"])
    training, dataset = recipe.training(cell.seed, cell.device, loss_fn=fn, schedule=schedule)
    rows = Rows()

    def record() -> None:
        loss, _ = evaluate(training.model, training.x, training.y, fn)
        rows.add(epoch=training.epoch, loss=loss, sharpness=recipe.sharpness(training))
        cell.tick(training.epoch, training.epochs)

    training.run(on_epoch=record)
    _, wrong = evaluate(training.model, dataset.x_test, dataset.y_test)
    return {**rows.columns, "test_error": [100 * wrong]}


STUDIES = Studies(
    Study("deficit", _deficit_settings, run_deficit), Study("rate", _rate_settings, run_rate)
)


# --- what the runs decide -------------------------------------------------------------------------

ACHILLE = Source("Achille et al. 2017, abstract (a temporary deficit impairs)", "paper")
FLIP = Source("Achille et al. 2017, abstract (flipping has no lasting effect)", "paper")
BREAK_EVEN = Source("Jastrzębski et al. 2020 (early learning rate, later curvature)", "after")
HARM = 0.5
"""Points of test error from which on a harm counts as one."""


def harm(runs: SeedRuns, deficit: str) -> float:
    """By how many points the longest deficit raises the test error, over no deficit and as many
    epochs after it."""
    longest = max(runs.config["durations"])
    hurt, spared = (
        runs.one(study="deficit", deficit=name, duration=k).value("test_error")
        for name, k in ((deficit, longest), ("none", 0))
    )
    return hurt - spared


def rate(runs: SeedRuns, early: str, late: str) -> Run:
    """A run of the other study: "low" or "high" first and after; the switch is the latest."""
    lrs = {name: runs.config[name] for name in ("low", "high")}
    switch = 0 if early == late else max(runs.config["switches"])
    return runs.one(study="rate", early=lrs[early], late=lrs[late], switch=switch)


@claim(ACHILLE, low=HARM, unit="points", set_after=True, headline=True)
def blur_does_lasting_harm(runs: SeedRuns) -> float:
    """A network that begins with blurred images errs more in the end than one that never saw any,
    after as many epochs on sharp images: test error after the longest deficit, less that without"""
    return harm(runs, "blur")


@claim(FLIP, high=HARM, unit="points", set_after=True)
def flip_does_no_lasting_harm(runs: SeedRuns) -> float:
    """A network that begins with images upside down does not err more in the end than one that
    never saw any, after as many epochs on upright images: test error after the longest deficit,
    less that without"""
    return harm(runs, "flip")


@claim(OURS, low=HARM, unit="points", set_after=True, headline=True)
def random_labels_do_lasting_harm(runs: SeedRuns) -> float:
    """A network that begins with random labels errs more in the end than one that never saw any,
    after as many epochs on true labels: test error after the longest deficit, less that without"""
    return harm(runs, "labels")


@claim(CONTROL, high=HARM, unit="points", set_after=True)
def more_epochs_do_no_harm(runs: SeedRuns) -> float:
    """Epochs without a deficit, as many as the longest deficit has, do no harm when they come
    first: test error with them, less that without"""
    return harm(runs, "none")


@claim(BREAK_EVEN, high=0.8, domain="positive", headline=True)
def early_rate_decides_sharpness(runs: SeedRuns) -> float:
    """A high learning rate in the first epochs makes the rest of a run at a low one flatter:
    sharpness at equal training loss, over that of a run with the low one from the beginning"""
    return at_equal_loss(rate(runs, "high", "low"), rate(runs, "low", "low"))


@claim(OURS, 0.8, 1.25, domain="positive")
def late_rate_makes_up(runs: SeedRuns) -> float:
    """A low learning rate in the first epochs leaves no mark on a run at a high one: sharpness at
    equal training loss, over that of a run with the high one from the beginning"""
    return at_equal_loss(rate(runs, "low", "high"), rate(runs, "high", "high"))


@claim(CONTROL, high=0.8, domain="positive")
def high_rate_is_flatter(runs: SeedRuns) -> float:
    """The two learning rates differ enough for a mark to be seen: sharpness at equal training loss
    with the high one throughout, over that with the low one throughout"""
    return at_equal_loss(rate(runs, "high", "high"), rate(runs, "low", "low"))


EXPERIMENT = Experiment(
    name="early_phase",
    title="What the first epochs decide: deficits that are mended, and the early learning rate",
    source="this book, after Achille et al. 2017 (arXiv:1711.08856) and Jastrzębski et al. 2020",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=[
        blur_does_lasting_harm,
        flip_does_no_lasting_harm,
        random_labels_do_lasting_harm,
        more_epochs_do_no_harm,
        early_rate_decides_sharpness,
        late_rate_makes_up,
        high_rate_is_flatter,
    ],
)
