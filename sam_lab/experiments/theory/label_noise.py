r"""Noise in the labels flattens a network that fits them.

Gradient descent that has fitted its labels stays where it is, however sharp. Fresh noise on the
labels at every step makes it drift along the manifold of minima, to smaller curvature (Blanc et al.
2020; Damian, Ma & Lee 2021, arXiv:2106.06530): with half the squared error, noise of standard
deviation s and n examples the drift per step is, for small learning rates, that of a step of size
lr on $(\eta s^2 / 4n) \operatorname{tr} H$.

A tanh network is trained on digits for a while; its own outputs are then taken as labels, so that
it fits them exactly and its Hessian is the Gauss-Newton matrix. From there the same steps are taken
with three kinds of labels: as they are, with noise drawn anew at each step, and with noise that was
drawn once and kept (the control: the network fits it, and then has no reason to move). The trace of
the Hessian of the loss *without* noise is measured by Hutchinson's estimate, with its error; the
random vectors are the same throughout a run, so that differences are surer than that error.

The criteria were set before the first run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting

__all__ = ["LABELS", "Config", "fall"]

LABELS = ("exact", "fresh", "kept")
"""The labels as they are, with noise drawn anew at every step, or with noise drawn once."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, images: the data set, and how many images are the (one) batch.
        hidden: widths of the hidden layers.
        lr: learning rate, of the fit and of what follows.
        fit: steps on the digits' own labels, whose outputs become the labels.
        noise: standard deviation of the noise on each entry of a label.
        steps, every: steps with noise, and from one measurement to the next.
        tol: standard error of the trace, relative to it.
    """

    data: str = "digits"
    images: int = 50
    hidden: tuple[int, ...] = (16, 16)
    lr: float = 0.2
    fit: int = 1000
    noise: float = 0.3
    steps: int = 3000
    every: int = 500
    tol: float = 0.01


LAPTOP = Config()
DESKTOP = replace(LAPTOP, images=200, hidden=(50, 50), steps=40_000, every=4000)
PAPER = replace(DESKTOP, data="mnist", images=1000, hidden=(200, 200))


def settings(config: Config) -> list[Setting]:
    """Each kind of labels."""
    return [{"labels": labels} for labels in LABELS]


def run(config: Config, cell: Cell) -> Columns:
    """Descent with these labels from weights that fit the exact ones.

    Columns, at the steps in ``step``: ``trace`` of the Hessian of the loss without noise, its
    standard error ``stderr``, and that ``loss``.
    """
    images = data.load(config.data, train=config.images, seed=cell.seed, device=cell.device)
    x = images.x.flatten(1)
    x = x - x.mean(0)
    labels = data.one_hot(images.y, images.classes)
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(sizes, "tanh", init="glorot", seed=cell.seed, device=cell.device)
    descent = torch.optim.SGD(model.parameters(), lr=config.lr)

    def loss(target: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = (model(x) - target).square()
        return squares.sum(1).mean() / 2

    def step(target: torch.Tensor) -> None:
        descent.zero_grad()
        loss(target).backward()
        descent.step()

    for _ in range(config.fit):
        step(labels)
    target = model(x).detach()
    generator = torch.Generator().manual_seed(cell.seed)

    def noise() -> torch.Tensor:
        drawn = torch.randn(target.shape, generator=generator)
        return config.noise * drawn.to(target)

    hessian = Hessian(lambda: loss(target), model.parameters())
    rows, kept = Rows(), noise()
    for at in range(config.steps + 1):
        if at % config.every == 0:
            trace = hessian.trace(config.tol, seed=cell.seed)
            rows.add(step=at, trace=trace.value, stderr=trace.stderr, loss=hessian.loss())
            cell.tick(at, config.steps)
        if at < config.steps:
            added = {"exact": None, "fresh": noise(), "kept": kept}[cell["labels"]]
            step(target if added is None else target + added)
    return rows.columns


def fall(run: Run, since: float = 0.0) -> float:
    """What share of itself the trace has lost since this part of the run; below 0 if it rose."""
    trace = run["trace"]
    return 1 - float(trace[-1] / trace[int(since * (len(trace) - 1))])


DAMIAN = Source("Blanc et al. 2020; Damian, Ma & Lee 2021", "after")


@claim(DAMIAN, low=0.1, headline=True)
def label_noise_flattens(runs: SeedRuns) -> float:
    """From weights that fit the labels, gradient descent with fresh noise on the labels loses at
    least a tenth of the trace of its Hessian: share of the trace lost"""
    return fall(runs.one(labels="fresh"))


@claim(DAMIAN, low=0.02)
def label_noise_goes_on_flattening(runs: SeedRuns) -> float:
    """With fresh noise on the labels the trace of the Hessian still falls in the second half of the
    run, by at least 2%: share of the trace lost there"""
    return fall(runs.one(labels="fresh"), since=0.5)


@claim(CONTROL, -0.02, 0.02)
def kept_noise_stops(runs: SeedRuns) -> float:
    """Noise on the labels that is drawn once and kept does not go on flattening: share of the trace
    of the Hessian lost in the second half of the run"""
    return fall(runs.one(labels="kept"), since=0.5)


@claim(CONTROL, high=0.0, set_after=True)
def kept_noise_does_not_flatten(runs: SeedRuns) -> float:
    """Noise on the labels that is drawn once and kept, which the network goes on fitting, does not
    flatten in the second half of the run: share of the trace of the Hessian lost there, which is
    below 0 where the trace rises"""
    return fall(runs.one(labels="kept"), since=0.5)


@claim(CONTROL, -0.02, 0.02)
def without_noise_nothing_moves(runs: SeedRuns) -> float:
    """Without noise, gradient descent that fits its labels keeps the trace of its Hessian: share of
    the trace lost"""
    return fall(runs.one(labels="exact"))


EXPERIMENT = Experiment(
    name="label_noise",
    title="Noise in the labels flattens a network that fits them",
    source="after Blanc et al. 2020 and Damian, Ma & Lee 2021 (arXiv:2106.06530)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        label_noise_flattens,
        label_noise_goes_on_flattening,
        kept_noise_stops,
        kept_noise_does_not_flatten,
        without_noise_nothing_moves,
    ],
)
