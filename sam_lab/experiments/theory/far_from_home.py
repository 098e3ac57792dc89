r"""Far from a minimum: SAM with a perturbation that is not normalised, at its own edge.

With $\epsilon = \rho g$ SAM multiplies the distance along an eigenvector of curvature $\lambda$ by
$1 - \eta\lambda(1 + \rho\lambda)$, wherever it is and however large the gradient: its edge
$\eta\lambda(1 + \rho\lambda) = 2$, that is

$$\lambda = \frac{\sqrt{1 + 8\rho/\eta} - 1}{2\rho},$$

is one number for the whole run. (The normalised SAM has $\rho/\|g\|$ in its place, and an edge that
moves with the gradient.) Agarwala & Dauphin 2023 (arXiv:2302.08692) predict from the learning rate
and the radius where the largest eigenvalue ends. Here a GELU network on digits is trained on the
whole data set, and its sharpness is held against that edge; gradient descent with the same learning
rate, which stays below 2/lr, is the control: the edge is not where the sharpness would go anyway.

The criteria were set before the first run, but for the one of 10%. That run had the learning rate
0.3 and 600 steps, in which gradient descent came to 2/lr itself in most seeds, so that it was no
control. The learning rate was then lowered, and the time lengthened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from sam_lab import data, models
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, SeedRuns
from sam_lab.experiments.lab.statistics import farthest_from_one, second_half, second_half_median
from sam_lab.experiments.sam import at_the_edge
from sam_lab.objective import Closure
from sam_lab.perturbations import unnormalized
from sam_lab.sam import SAM

__all__ = ["Config", "problem"]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, images: the data set, and how many images are the (one) batch.
        hidden: widths of the hidden layers.
        activation: between the layers.
        lrs, rhos, steps, every, tol: see `at_the_edge.Grid`; the radius multiplies the gradient.
    """

    data: str = "digits"
    images: int = 200
    hidden: tuple[int, ...] = (16, 16, 16)
    activation: str = "gelu"
    lrs: tuple[float, ...] = (0.2,)
    rhos: tuple[float, ...] = (0.0, 0.3, 0.8)
    steps: int = 800
    every: int = 10
    tol: float = 1e-2


LAPTOP = Config()
DESKTOP = replace(LAPTOP, images=1000, hidden=(50, 50, 50), steps=2000)
PAPER = replace(LAPTOP, data="cifar10", images=5000, hidden=(200, 200), steps=5000, every=25)


def problem(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Closure]:
    """The network, initialised from `seed`, and its loss over the whole data.

    Half the sum over classes of (logit - one-hot)^2, mean over examples.
    """
    images = data.load(config.data, train=config.images, seed=seed, device=device)
    x = images.x.flatten(1)
    x = x - x.mean(0)
    target = data.one_hot(images.y, images.classes)
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(sizes, config.activation, init="glorot", seed=seed, device=device)
    return model, lambda: (model(x) - target).square().sum(1).mean() / 2


def run(config: Config, cell: Cell) -> Columns:
    """Gradient descent, or SAM with the perturbation rho g. Columns: those of `EdgeRecorder`."""
    model, closure = problem(config, cell.seed, cell.device)
    descent = torch.optim.SGD(model.parameters(), lr=cell["lr"])
    sam = SAM(descent, cell["rho"], model, rule=unnormalized)
    return at_the_edge.follow(sam, closure, config.steps, config.every, config.tol, cell)


def _settles(runs: SeedRuns) -> float:
    """Median of sharpness over SAM's edge in the second half, at the radius farthest from 1."""
    return farthest_from_one(
        second_half_median(at_the_edge.ratio(run)) for run in at_the_edge.perturbed(runs)
    )


AGARWALA = Source("Agarwala & Dauphin 2023", "after")


@claim(AGARWALA, 0.95, 1.05, domain="positive")
def unnormalised_sam_sits_at_its_edge(runs: SeedRuns) -> float:
    """SAM with the perturbation rho g, not normalised, trains at the sharpness at which
    lr * sharpness * (1 + rho * sharpness) = 2: median of sharpness over that edge in the second
    half of training, at the radius where it is farthest from 1"""
    return farthest_from_one(
        second_half_median(run["sharpness"] / run["sam_edge"])
        for run in at_the_edge.perturbed(runs)
    )


@claim(AGARWALA, 0.9, 1.1, domain="positive", set_after=True)
def unnormalised_sam_sits_near_its_edge(runs: SeedRuns) -> float:
    """SAM with the perturbation rho g, not normalised, trains within 10% of the sharpness at which
    lr * sharpness * (1 + rho * sharpness) = 2: median of sharpness over that edge in the second
    half of training, at the radius where it is farthest from 1"""
    return _settles(runs)


@claim(AGARWALA, 0.95, 1.05, domain="positive")
def unnormalised_sam_stays_at_its_edge(runs: SeedRuns) -> float:
    """SAM with the perturbation rho g, not normalised, never leaves the sharpness at which
    lr * sharpness * (1 + rho * sharpness) = 2 in the second half of training: sharpness over that
    edge, at the radius and the measurement where it is farthest from 1"""
    return farthest_from_one(
        float(ratio)
        for run in at_the_edge.perturbed(runs)
        for ratio in second_half(at_the_edge.ratio(run))
    )


@claim(CONTROL, high=0.95, domain="positive")
def descent_stays_below_its_edge(runs: SeedRuns) -> float:
    """Gradient descent with the same learning rate stays below 2/lr: its largest sharpness in the
    second half of training over 2/lr"""
    return max(
        float(second_half(run["sharpness"] / run["gd_edge"]).max()) for run in runs.all(rho=0.0)
    )


@claim(CONTROL, low=1.1, domain="positive")
def descent_goes_beyond_sams_edge(runs: SeedRuns) -> float:
    """Gradient descent with the same learning rate goes beyond the edge of SAM with the
    perturbation rho g: its median sharpness in the second half of training over that edge, at the
    radius where the quotient is smallest"""
    return min(
        second_half_median(at_the_edge.descent(runs, run.settings["lr"])["sharpness"])
        / float(run["sam_edge"][-1])
        for run in at_the_edge.perturbed(runs)
    )


EXPERIMENT = Experiment(
    name="far_from_home",
    title="SAM without normalisation at its own edge, far from any minimum",
    source="after Agarwala & Dauphin 2023 (arXiv:2302.08692)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=at_the_edge.grid,
    run=run,
    claims=[
        unnormalised_sam_sits_at_its_edge,
        unnormalised_sam_sits_near_its_edge,
        unnormalised_sam_stays_at_its_edge,
        descent_stays_below_its_edge,
        descent_goes_beyond_sams_edge,
    ],
)
