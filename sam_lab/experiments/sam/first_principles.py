r"""What SAM's step leaves out, and how much noise one ascent is worth.

SAM is derived as descent on f(w) = L(w + e(w)) with e = rho g/|g|. Its step is the gradient
g(w + e) that it *keeps*; the chain rule's second term, exactly

    (rho / |g|) H (I - u uᵀ) g(w + e),    u = g/|g|,    g and H at w,

is *dropped*. Two studies:

- ``dropped``: both terms along runs of SGD and of SAM, for the loss on each batch that SAM perturbs
  for, and for the loss on many more images.
- ``noise``: training with random perturbations many times as long as SAM's, until they flatten as
  SAM does.

Data, network, loss and training are those of `methods`; within a seed all runs share their initial
weights and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data
from sam_lab.curvature import Hessian
from sam_lab.experiments.edge.edge_of_stability import loss_and_gradient
from sam_lab.experiments.lab.claims import NotApplicable, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.sam import methods
from sam_lab.experiments.sam.methods import epochs, load, loss_on, measured_loss
from sam_lab.experiments.sam.sharpness_aware import moved
from sam_lab.objective import Closure
from sam_lab.training import evaluate, squared_error

__all__ = [
    "CLAIMS",
    "EXPERIMENT",
    "PRESETS",
    "STUDIES",
    "Config",
    "dropped",
    "length_needed",
    "noise",
    "terms",
]


@dataclass(frozen=True)
class Config(methods.Task):
    """What is trained (see `methods.Task`), and how much of it is looked at.

    Attributes:
        checkpoints: epochs at which both terms are computed; the last epoch among them.
        batches: how many random batches they are computed for, of the size of those trained on.
        lengths: of the random perturbations, in units of `rho`, ascending.
    """

    checkpoints: tuple[int, ...] = (0, 1, 5, 20, 40)
    batches: int = 10
    lengths: tuple[float, ...] = (20.0, 60.0)


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        **methods.PAPER,
        checkpoints=(0, 1, 2, 5, 10, 20, 50, 100),
    ),
}


# --- the two terms -------------------------------------------------------------------------------


def terms(closure: Closure, params: Sequence[Tensor], rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient (P,) of a loss, and of SAM's objective the term kept and the term dropped.

    Args:
        closure: the loss on what the perturbation is made for.
        rho: the radius. The gradient must not be zero.
    """
    H = Hessian(closure, params)
    g = H.gradient()
    unit = g / g.norm()
    with moved(params, rho * unit):
        kept = loss_and_gradient(closure, params)[1]
    across = kept - (unit @ kept) * unit
    return g, kept, rho / g.norm() * (H @ across)


def dropped(config: Config, cell: Cell) -> Columns:
    """Both terms along a run, one row a checkpoint, at the main radius whatever trains.

    On `config.batches` random batches, none of which overlap, medians over them: ``ratio`` is
    |dropped| / |kept|, with its quartiles ``ratio_low`` and ``ratio_high``; ``cosine`` the cosine
    between what SAM steps with and the whole gradient of its objective, kept + dropped;
    ``gradient`` the norm |g|. ``many_ratio`` and ``many_gradient`` are the same for the loss on
    `config.measured` images. ``sharpness`` is of that loss; ``loss`` is on all training images,
    ``test_error`` in per cent.
    """
    dataset, rows = load(config, cell.seed, cell.device), Rows()
    for epoch, model in epochs(config, dataset, cell["method"], cell["rho"], cell.seed):
        if epoch in config.checkpoints:
            rows.add(epoch=epoch, **_both_terms(config, dataset, model, 1000 * cell.seed + epoch))
        cell.tick(epoch, config.epochs)
    return rows.columns


def _both_terms(
    config: Config, dataset: data.Dataset, model: nn.Module, shuffle: int
) -> dict[str, float]:
    params = list(model.parameters())
    order = torch.randperm(len(dataset.x), generator=torch.Generator().manual_seed(shuffle))
    ratios, cosines, norms = [], [], []
    for batch in order[: config.batches * config.batch].split(config.batch):
        g, kept, lost = terms(loss_on(model, dataset, batch), params, config.rho)
        whole = kept + lost
        ratios.append(float(lost.norm() / kept.norm()))
        cosines.append(float(kept @ whole / (kept.norm() * whole.norm())))
        norms.append(float(g.norm()))
    g, kept, lost = terms(measured_loss(config, dataset, model), params, config.rho)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "cosine": float(np.median(cosines)),
        "gradient": float(np.median(norms)),
        "many_ratio": float(lost.norm() / kept.norm()),
        "many_gradient": float(g.norm()),
        **_end(config, dataset, model),
    }


def _end(config: Config, dataset: data.Dataset, model: nn.Module) -> dict[str, float]:
    H = methods.hessian(config, dataset, model)
    return {
        "sharpness": float(H.top(max_hvps=500).values[0]),
        "loss": evaluate(model, dataset.x, dataset.y, squared_error)[0],
        "test_error": 100 * evaluate(model, dataset.x_test, dataset.y_test, squared_error)[1],
    }


# --- noise ---------------------------------------------------------------------------------------


def noise(config: Config, cell: Cell) -> Columns:
    """Where training with random perturbations ends: ``sharpness``, ``loss`` and ``test_error``."""
    dataset = load(config, cell.seed, cell.device)
    for epoch, model in epochs(config, dataset, "random", cell["rho"], cell.seed):
        cell.tick(epoch, config.epochs)
        trained = model
    return {name: [value] for name, value in _end(config, dataset, trained).items()}


def paths(config: Config) -> list[Setting]:
    """A run of SGD and one of SAM."""
    return [{"method": "sgd", "rho": 0.0}, {"method": "sam", "rho": config.rho}]


def radii(config: Config) -> list[Setting]:
    """A run for each length of the random perturbation."""
    return [{"rho": length * config.rho} for length in config.lengths]


STUDIES = Studies(Study("dropped", paths, dropped), Study("noise", radii, noise))


# --- what the runs decide ------------------------------------------------------------------------


def along(runs: SeedRuns, method: str) -> Run:
    """The run of SGD or of SAM."""
    return runs.one(study="dropped", method=method)


def last_ratio(runs: SeedRuns, method: str = "sam") -> float:
    """|dropped| / |kept| at the end, median over batches."""
    return float(along(runs, method)["ratio"][-1])


def length_needed(runs: SeedRuns) -> float:
    """How many times as long as SAM's a random perturbation must be to end as flat as SAM.

    Between the lengths tried by a straight line in the logarithms of length and sharpness; the
    longest of them where even that ends sharper, which makes it a lower bound.

    Raises:
        NotApplicable: the shortest is long enough, so that nothing is known of shorter ones.
    """
    target = np.log(along(runs, "sam")["sharpness"][-1])
    tried = sorted(runs.all(study="noise"), key=lambda run: run.settings["rho"])
    at = np.log([run.settings["rho"] / runs.config["rho"] for run in tried])
    ends = np.log([run.value("sharpness") for run in tried])
    for i, end in enumerate(ends):
        if end <= target:
            if i == 0:
                raise NotApplicable("the shortest perturbation tried ends as flat as SAM")
            share = (ends[i - 1] - target) / (ends[i - 1] - end)
            return float(np.exp(at[i - 1] + share * (at[i] - at[i - 1])))
    return float(np.exp(at[-1]))


def longest_over_sam(runs: SeedRuns, name: str) -> float:
    """What training ends with under the longest random perturbations, over what SAM ends with."""
    longest = max(runs.all(study="noise"), key=lambda run: run.settings["rho"])
    return longest.value(name) / float(along(runs, "sam")[name][-1])


CHAPTER = Source("the question of chapter 3", "ours")
CONTROL = Source("the control of chapter 3", "control")


@claim(CHAPTER, high=0.1, domain="positive")
def dropped_is_small_at_the_start(runs: SeedRuns) -> float:
    """Before training, the term that SAM drops from the gradient of its objective is at most a
    tenth as long as the term it keeps: ratio of norms on SAM's batches, median over batches"""
    return float(along(runs, "sam")["ratio"][0])


@claim(CHAPTER, low=0.1, headline=True, domain="positive")
def dropped_is_no_detail(runs: SeedRuns) -> float:
    """At the end of training with SAM, the term that SAM drops is at least a tenth as long as the
    term it keeps: ratio of norms on SAM's batches, median over batches"""
    return last_ratio(runs)


@claim(CHAPTER, low=1.0, domain="positive")
def dropped_exceeds_kept(runs: SeedRuns) -> float:
    """At the end of training with SAM, the term that SAM drops is longer than the term it keeps:
    ratio of norms on SAM's batches, median over batches"""
    return last_ratio(runs)


@claim(CHAPTER, low=1.0, domain="positive")
def dropped_is_larger_for_sgd(runs: SeedRuns) -> float:
    """At the end of training, the term that SAM would drop is a larger share of what it would keep
    at SGD's weights than at SAM's: quotient of the two ratios of norms"""
    return last_ratio(runs, "sgd") / last_ratio(runs)


@claim(CHAPTER, low=1.0, domain="positive")
def dropped_is_larger_for_more_data(runs: SeedRuns) -> float:
    """At the end of training with SAM, the dropped term is a larger share of the kept one for the
    loss on many images than for the batches that SAM perturbs for: quotient of the two ratios"""
    return float(along(runs, "sam")["many_ratio"][-1]) / last_ratio(runs)


@claim(CONTROL, low=20.0, unit="times", set_after=True, domain="positive")
def noise_must_be_long(runs: SeedRuns) -> float:
    """To end as flat as SAM, training with random perturbations needs them more than twenty times
    as long as SAM's: least sufficient length over SAM's radius, or the longest tried where even
    that ends sharper"""
    return length_needed(runs)


@claim(CONTROL, low=1.0, set_after=True, headline=True, domain="positive")
def longest_noise_is_sharper(runs: SeedRuns) -> float:
    """Training with the longest random perturbations tried, sixty times as long as SAM's, still
    ends sharper than SAM: ratio of final sharpness"""
    return longest_over_sam(runs, "sharpness")


@claim(CONTROL, low=1.0, set_after=True, domain="positive")
def longest_noise_costs_loss(runs: SeedRuns) -> float:
    """Training with the longest random perturbations tried, sixty times as long as SAM's, ends with
    a larger training loss than SAM: ratio of final training losses"""
    return longest_over_sam(runs, "loss")


CLAIMS = [
    dropped_is_small_at_the_start,
    dropped_is_no_detail,
    dropped_exceeds_kept,
    dropped_is_larger_for_sgd,
    dropped_is_larger_for_more_data,
    noise_must_be_long,
    longest_noise_is_sharper,
    longest_noise_costs_loss,
]

EXPERIMENT = Experiment(
    name="first_principles",
    title="What SAM's step leaves out, and how much noise it is worth",
    source="after Foret et al. 2021",
    presets=PRESETS,
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
