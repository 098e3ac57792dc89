r"""What happens inside a step of the SAM family: the papers' own reasons, measured.

Six studies on the network and the data of `second_pass`, with the same training:

- ``reuse``: along a run of SAM, how fast its gradient, the perturbed gradient and LookSAM's kept
  part turn from step to step, and how well what costs no pass (the momentum, the last perturbed
  gradient) points along the gradient.
- ``momentum``: along runs of Momentum-SAM, whether minus the momentum is uphill.
- ``examples``: along a run of SAM, how near the gradient of half of the examples comes to that of
  all: of those that rise most, of those that rise least, of random ones.
- ``surrogate``: GSAM with several alpha beside SAM of the same and of larger radii.
- ``norms``: on a network with batch norm, SAM on the norm layers alone beside all weights and as
  many random entries; each with the search of `second_pass`.
- ``frobenius``: Frob-SAM beside unnormalised SAM with rho = lambda, which it is in expectation on
  quadratics.

What measures is itself a method: it returns SAM's direction, and writes down what it saw.

The criteria were set before the first run of this experiment. Runs of a few epochs on other data
had been seen, which showed that the code works and that Frob-SAM needs a small lambda.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab.data import Dataset
from sam_lab.experiments.family import second_pass
from sam_lab.experiments.family.second_pass import STEPS, measure
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.methods import (
    NORMS,
    Look,
    State,
    frob_sam,
    gsam,
    inner,
    momentum_sam,
    plain,
    reject,
    times,
    unit,
)
from sam_lab.perturbations import Radius, Rule, global_norm, sam, unnormalized
from sam_lab.training import Phase, Training, cosine

__all__ = ["MASKS", "among", "cosine_between", "masks", "watch_examples", "watch_reuse"]

MASKS = ("all", "norms", "random")
"""What is perturbed in the study ``norms``: everything, scales and shifts of the norm layers, or as
many random entries as these have."""
LAGS = (1, 2, 3, 4)  # steps, of which LookSAM with k = 5 reuses its part


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        base: data, network, training and search, see `second_pass.Config`.
        rho: radius of SAM in all studies that do not search one.
        watched: epochs in which every step is looked into.
        lrs, momentum_rho: learning rates (constant) and radius of the study ``momentum``.
        alphas: of GSAM, the first is 0, which is SAM.
        wider: radii of SAM beside GSAM.
        lams: of the study ``frobenius``.
        draws, probe: how many probes Frob-SAM has a step, and the size of an entry.
        norm_starts: for each of `MASKS`, the smallest radius that the search tries.
    """

    base: second_pass.Config = second_pass.LAPTOP
    rho: float = 0.1
    watched: tuple[int, ...] = (1, 9, 18)
    lrs: tuple[float, ...] = (0.01, 0.1)
    momentum_rho: float = 0.5
    alphas: tuple[float, ...] = (0.0, 0.4, 0.8)
    wider: tuple[float, ...] = (0.15,)
    lams: tuple[float, ...] = (0.02,)
    draws: int = 8
    probe: float = 0.005
    norm_starts: tuple[float, ...] = (0.05, 0.2, 0.2)


LAPTOP = Config()
PAPER = Config(second_pass.PAPER, rho=0.1, watched=(5, 100, 190))


def _train(
    config: Config,
    cell: Cell,
    *,
    recipe: dict[str, Any] | None = None,
    schedule: Callable[[float], float] = cosine,
    norm: str = "none",
    on_epoch: Callable[[Training], object] = lambda training: None,
    **how: Any,
) -> tuple[Training, Dataset]:
    """A run of half the budget's epochs, as SAM's, with what a `Phase` takes."""
    epochs = max(1, config.base.recipe.epochs // 2)
    training, dataset = second_pass.prepare(
        config.base,
        config.base.recipe.but(epochs=epochs, **(recipe or {})),
        cell.seed,
        cell.device,
        phases=[Phase(0, epochs, **how)],
        schedule=schedule,
        norm=norm,
    )

    def done() -> None:
        on_epoch(training)
        cell.tick(training.epoch, epochs)

    training.run(on_epoch=done)
    return training, dataset


def cosine_between(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The cosine of the angle between two lists of tensors, each as one vector; 0 for a zero."""
    return float(inner(unit(list(a)), unit(list(b))))


# --- instruments: SAM's step, and a note of what was seen -----------------------------------------


def watch_reuse(look: Look, state: State, *, notes: list[dict[str, Any]]) -> tuple[Any, State]:
    """SAM's step; notes the gradient, the perturbed one, what LookSAM keeps, and the momentum."""
    g = look()
    gs = look.along(g)
    kept = reject(gs, g)
    notes.append(
        {
            "gradient": g,
            "perturbed": gs,
            "kept": kept,
            "momentum": [v.clone() for v in look.momentum()],
        }
    )
    return gs, state


def watch_momentum(look: Look, state: State, *, notes: list[dict[str, Any]]) -> tuple[Any, State]:
    """Momentum-SAM's step; notes by how much the loss of the batch changes either way of it."""
    look()
    here = look.losses().mean()
    back = look.epsilon(times(-1.0, look.momentum()))
    notes.append(
        {
            "minus": float(look.losses(back).mean() - here),
            "plus": float(look.losses(times(-1.0, back)).mean() - here),
        }
    )
    return momentum_sam(look, state)


def watch_examples(
    look: Look,
    state: State,
    *,
    notes: list[dict[str, float]],
    generator: torch.Generator,
) -> tuple[Any, State]:
    """SAM's step; notes the cosine of its direction with that of half of the examples."""
    g = look()
    before = look.losses()
    epsilon = look.epsilon(g)
    rise = look.losses(epsilon) - before
    count = max(1, len(rise) // 2)
    order = rise.argsort(descending=True)
    random = torch.randperm(len(rise), generator=generator, device=generator.device)
    gs = look.at(epsilon)
    notes.append(
        {
            name: cosine_between(gs, look.at(epsilon, examples=chosen.sort().values))
            for name, chosen in (
                ("top", order[:count]),
                ("bottom", order[-count:]),
                ("random", random[:count]),
            )
        }
    )
    return gs, state


def _watched(config: Config, cell: Cell, method: Any, **train: Any) -> list[list[dict[str, Any]]]:
    """The notes of each watched epoch of a run."""
    notes: list[dict[str, Any]] = []
    kept: list[list[dict[str, Any]]] = []

    def after(training: Training) -> None:
        if training.epoch - 1 in config.watched:
            kept.append(list(notes))
        notes.clear()

    _train(config, cell, method=partial(method, notes=notes), on_epoch=after, **train)
    return kept


# --- the studies ----------------------------------------------------------------------------------


def run_reuse(config: Config, cell: Cell) -> Columns:
    """A run of SAM, looked into.

    Returns:
        A row for each watched epoch, means over its steps: ``epoch``; for each lag of `LAGS` the
        cosines ``kept_1``, ``perturbed_1`` and ``gradient_1`` of a quantity with itself so many
        steps before; ``length``, of the kept part over the gradient; cosines with the gradient of
        the ``momentum`` and of ``last``, the perturbed gradient of the step before.
    """
    rows = Rows()
    for epoch, notes in zip(
        config.watched, _watched(config, cell, watch_reuse, rho=config.rho), strict=True
    ):
        row = {
            f"{name}_{lag}": fmean(
                cosine_between(one[name], two[name])
                for one, two in zip(notes, notes[lag:], strict=False)
            )
            for name in ("kept", "perturbed", "gradient")
            for lag in LAGS
        }
        rows.add(
            epoch=epoch,
            **row,
            length=fmean(
                float(global_norm(note["kept"]) / global_norm(note["gradient"])) for note in notes
            ),
            momentum=fmean(cosine_between(note["momentum"], note["gradient"]) for note in notes),
            last=fmean(
                cosine_between(one["perturbed"], two["gradient"]) for one, two in pairwise(notes)
            ),
        )
    return rows.columns


def run_momentum(config: Config, cell: Cell) -> Columns:
    """A run of Momentum-SAM at a constant learning rate: a row for each watched epoch, ``minus``
    and ``plus``, the mean change of the batch's loss a radius against and along the momentum."""
    notes = _watched(
        config,
        cell,
        watch_momentum,
        rho=config.momentum_rho,
        recipe={"lr": cell["lr"]},
        schedule=lambda done: 1.0,
    )
    return _means(config, notes)


def run_examples(config: Config, cell: Cell) -> Columns:
    """A run of SAM, looked into: a row for each watched epoch, the mean cosine of SAM's direction
    with that of half of the batch, ``top``, ``bottom`` and ``random``."""
    return _means(config, _watched(config, cell, watch_examples, rho=config.rho))


def _means(config: Config, watched: list[list[dict[str, Any]]]) -> Columns:
    rows = Rows()
    for epoch, notes in zip(config.watched, watched, strict=True):
        rows.add(epoch=epoch, **{name: fmean(note[name] for note in notes) for name in notes[0]})
    return rows.columns


def run_surrogate(config: Config, cell: Cell) -> Columns:
    """A run of GSAM, measured at its end: the columns of `second_pass.measure`, whose ``gap`` is at
    the radius of the config."""
    method = partial(gsam, alpha=cell["alpha"]) if cell["alpha"] else plain
    return _ends(config, *_train(config, cell, rho=cell["rho"], method=method))


def run_frobenius(config: Config, cell: Cell) -> Columns:
    """A run of Frob-SAM or of unnormalised SAM, measured at its end (`second_pass.measure`)."""
    how: dict[str, Any] = {"rho": cell["lam"], "rule": unnormalized}
    if cell["method"] == "frob_sam":
        how = {"rho": config.probe, "method": partial(frob_sam, lam=cell["lam"], n=config.draws)}
    return _ends(config, *_train(config, cell, **how))


def _ends(config: Config, training: Training, dataset: Dataset) -> Columns:
    return {name: [value] for name, value in measure(config.base, training, dataset).items()}


def among(
    params: list[Tensor], grads: list[Tensor], rho: Radius, *, chosen: list[Tensor]
) -> list[Tensor]:
    """The rule `sam` over some entries alone.

    Args:
        chosen: 1 where an entry is perturbed and 0 elsewhere, one tensor a parameter.
    """
    return sam(params, [g * mask.to(g) for g, mask in zip(grads, chosen, strict=True)], rho)


def masks(model: nn.Module, which: str, seed: int) -> list[Tensor]:
    """Which entries of a model's parameters are perturbed: 1 or 0, one tensor a parameter.

    Args:
        which: one of `MASKS`.
        seed: of the random entries.

    Raises:
        ValueError: another name.
    """
    if which not in MASKS:
        raise ValueError(f"which must be one of {', '.join(MASKS)}, got {which!r}")
    params = list(model.parameters())
    if which == "all":
        return [torch.ones_like(p) for p in params]
    of_norms = {
        id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    normed = [id(p) in of_norms for p in params]
    if which == "norms":
        return [torch.full_like(p, float(n)) for p, n in zip(params, normed, strict=True)]
    sizes = [p.numel() for p in params]
    count = sum(size for size, n in zip(sizes, normed, strict=True) if n)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(sum(sizes))
    flat[torch.randperm(len(flat), generator=generator)[:count]] = 1.0
    pieces = flat.split(sizes)
    return [piece.view(p.shape).to(p) for piece, p in zip(pieces, params, strict=True)]


def run_norms(config: Config, cell: Cell) -> Columns:
    """A run of SAM on some of the entries of a network with batch norm, or of SGD.

    The radius is the best of four on the seeds of the search, by the error on examples that no
    training has seen.

    Returns:
        The columns of `second_pass.measure`; ``value``, the radius; ``tried`` and
        ``validation_error``; ``share``, of the entries that is perturbed.
    """
    which = cell["perturbed"]
    start = dict(zip(MASKS, config.norm_starts, strict=True)).get(which, 0.0)
    tried = [step * start for step in STEPS] if start else [0.0]
    errors = [_normed_error(config, which, rho, cell.device) for rho in tried]
    value = tried[int(np.argmin(errors))]
    training, dataset, share = _normed(config, cell, which, value)
    return {
        **_ends(config, training, dataset),
        "value": [value],
        "tried": tried,
        "validation_error": errors,
        "share": [share],
    }


@functools.cache
def _normed_error(config: Config, which: str, rho: float, device: torch.device | str) -> float:
    found = []
    for seed in config.base.search_seeds:
        training, dataset, _ = _normed(config, Cell({}, seed, device), which, rho)
        found.append(second_pass.validation_error(config.base, training.model, dataset))
    return fmean(found)


def _normed(config: Config, cell: Cell, which: str, rho: float) -> tuple[Training, Dataset, float]:
    if which == "none":
        return *_train(config, cell, norm="batch"), 0.0
    recipe = config.base.recipe
    like = recipe.network(recipe.dataset(cell.seed, cell.device), norm="batch", device=cell.device)
    chosen = masks(like, which, cell.seed)
    share = sum(float(mask.sum()) for mask in chosen) / sum(mask.numel() for mask in chosen)
    rule: Rule = partial(among, chosen=chosen)
    return *_train(config, cell, norm="batch", rho=rho, rule=rule), share


def _surrogates(config: Config) -> list[Setting]:
    return [
        *({"rho": config.rho, "alpha": alpha} for alpha in config.alphas),
        *({"rho": rho, "alpha": 0.0} for rho in config.wider),
    ]


def _frobenius_settings(config: Config) -> list[Setting]:
    return [
        {"method": method, "lam": lam}
        for lam in config.lams
        for method in ("frob_sam", "unnormalized")
    ]


STUDIES = Studies(
    Study("reuse", lambda config: [{}], run_reuse),
    Study("momentum", lambda config: [{"lr": lr} for lr in config.lrs], run_momentum),
    Study("examples", lambda config: [{}], run_examples),
    Study("surrogate", _surrogates, run_surrogate),
    Study("norms", lambda config: [{"perturbed": name} for name in ("none", *MASKS)], run_norms),
    Study("frobenius", _frobenius_settings, run_frobenius),
)


# --- what the runs decide -------------------------------------------------------------------------


def norms(runs: SeedRuns, which: str) -> Run:
    """The run on the network with batch norm that perturbs one of `MASKS`, or "none"."""
    return runs.one(study="norms", perturbed=which)


def surrogate(runs: SeedRuns, alpha: float, rho: float | None = None) -> Run:
    """The run of GSAM, at the main radius unless another is given."""
    return runs.one(study="surrogate", alpha=alpha, rho=runs.config["rho"] if rho is None else rho)


def _wider(runs: SeedRuns) -> float:
    """The gap of GSAM with the largest alpha over the gap of SAM of the radius, main or larger,
    whose training loss is nearest to GSAM's."""
    run = surrogate(runs, max(runs.config["alphas"]))
    sams = [surrogate(runs, 0.0, rho) for rho in (runs.config["rho"], *runs.config["wider"])]
    loss = run.value("loss")
    nearest = min(sams, key=lambda other: abs(other.value("loss") - loss))
    return run.value("gap") / nearest.value("gap")


def _norm_gain(runs: SeedRuns, which: str, over: str) -> float:
    one, two = (norms(runs, name).value("test_error") for name in (which, over))
    return two - one


LIU = Source("Liu et al. 2022 (that the kept part can be reused; the measure is ours)", "after")
DU = Source("Du et al. 2021 (that the selected examples are the sensitive ones)", "after")
ZHUANG = Source("Zhuang et al. 2022 (what GSAM is for)", "after")
MUELLER = Source("Mueller et al. 2023 (that the norm layers suffice; the margin is ours)", "after")
MUELLER_SPARSE = Source("Mueller et al. 2023, abstract (other sparse perturbations)", "paper")
BECKER = Source("Becker et al. 2024 (why the sign is minus; the measure is ours)", "after")


@claim(LIU, low=0.5, headline=True)
def kept_part_turns_slowly(runs: SeedRuns) -> float:
    """What LookSAM keeps turns slowly: cosine of the part of SAM's gradient across the plain one
    with that of one to four steps before, mean over these lags and over three epochs"""
    run = runs.one(study="reuse")
    return float(np.mean([run[f"kept_{lag}"] for lag in LAGS]))


@claim(LIU, low=0.0)
def kept_part_turns_more_slowly_than_the_gradient(runs: SeedRuns) -> float:
    """What LookSAM keeps turns more slowly than the whole of SAM's gradient: difference of the
    cosines, each with that of one to four steps before"""
    run = runs.one(study="reuse")
    return float(np.mean([run[f"kept_{lag}"] - run[f"perturbed_{lag}"] for lag in LAGS]))


@claim(OURS, low=0.0)
def last_gradient_predicts_better_than_momentum(runs: SeedRuns) -> float:
    """The perturbed gradient of the step before points along the gradient more than the momentum
    does: difference of their cosines with the gradient, mean over three epochs"""
    run = runs.one(study="reuse")
    return float(np.mean(run["last"] - run["momentum"]))


def _uphill(runs: SeedRuns, lr: float) -> float:
    return float(runs.one(study="momentum", lr=lr)["minus"].mean())


@claim(BECKER, low=0.0)
def minus_momentum_is_uphill(runs: SeedRuns) -> float:
    """At the largest learning rate, a radius against the momentum the loss of the batch is larger:
    its mean change from the weights"""
    return _uphill(runs, max(runs.config["lrs"]))


@claim(OURS, high=0.0)
def minus_momentum_is_downhill_at_small_lr(runs: SeedRuns) -> float:
    """At the smallest learning rate, a radius against the momentum the loss of the batch is
    smaller, so that Momentum-SAM does not climb: its mean change from the weights"""
    return _uphill(runs, min(runs.config["lrs"]))


@claim(DU, low=0.0)
def rising_examples_are_nearer(runs: SeedRuns) -> float:
    """The half of a batch whose loss rises most says more of SAM's direction than a random half:
    difference of the cosines with the direction of the whole batch"""
    run = runs.one(study="examples")
    return float(np.mean(run["top"] - run["random"]))


@claim(CONTROL, low=0.0)
def rising_examples_are_nearer_than_others(runs: SeedRuns) -> float:
    """The half of a batch whose loss rises most says more of SAM's direction than the other half:
    difference of the cosines with the direction of the whole batch"""
    run = runs.one(study="examples")
    return float(np.mean(run["top"] - run["bottom"]))


@claim(ZHUANG, high=0.9, domain="positive")
def gsam_lowers_the_gap(runs: SeedRuns) -> float:
    """GSAM with the largest alpha ends with a smaller surrogate gap than SAM of the same radius:
    ratio of their gaps at that radius"""
    gaps = [surrogate(runs, alpha).value("gap") for alpha in runs.config["alphas"]]
    return gaps[-1] / gaps[0]


@claim(CONTROL, high=0.9, domain="positive")
def gsam_lowers_the_gap_at_equal_loss(runs: SeedRuns) -> float:
    """GSAM with the largest alpha ends with a smaller surrogate gap than SAM of the radius, of
    two, whose training loss is nearest: ratio of their gaps"""
    return _wider(runs)


@claim(MUELLER, low=-0.5, unit="points", headline=True)
def norm_layers_suffice(runs: SeedRuns) -> float:
    """On a network with batch norm SAM on the norm layers alone is at most half a point worse than
    SAM on all weights: test error of SAM less that of SAM on the norm layers, as many steps"""
    return _norm_gain(runs, "norms", "all")


@claim(CONTROL, low=0.0, unit="points")
def norm_layers_beat_sgd(runs: SeedRuns) -> float:
    """On a network with batch norm SAM on the norm layers alone has a smaller test error than SGD
    with as many steps: SGD's less its own"""
    return _norm_gain(runs, "norms", "none")


@claim(MUELLER_SPARSE, low=0.0, unit="points")
def norm_layers_beat_random_entries(runs: SeedRuns) -> float:
    """On a network with batch norm SAM on the norm layers has a smaller test error than SAM on as
    many random entries, with a radius of its own: the latter's less its own"""
    return _norm_gain(runs, "norms", "random")


@claim(MUELLER, low=1.0, domain="positive")
def norm_layers_leave_it_sharper(runs: SeedRuns) -> float:
    """On a network with batch norm SAM on the norm layers ends sharper than SAM on all weights:
    ratio of the sharpness of the smoothed training loss"""
    return norms(runs, "norms").value("sharpness") / norms(runs, "all").value("sharpness")


@claim(OURS, 0.8, 1.25, domain="positive")
def frob_sam_is_unnormalized_sam(runs: SeedRuns) -> float:
    """Frob-SAM ends with the Frobenius norm of unnormalised SAM with rho = lambda, at two passes
    instead of three: ratio of the norms of the Hessian after as many steps, geometric mean over
    lambdas"""
    logs = []
    for lam in runs.config["lams"]:
        one, two = (
            runs.one(study="frobenius", method=method, lam=lam).value("frobenius")
            for method in ("frob_sam", "unnormalized")
        )
        logs.append(np.log(one / two))
    return float(np.exp(np.mean(logs)))


def cost(config: Config) -> float:
    """FLOPs of all settings with one seed, without the Hessians; SAM's two gradients a step."""
    tries = len(STEPS) * len(config.base.search_seeds) + 1
    runs = (
        1
        + len(config.lrs)
        + 2
        + len(_surrogates(config))
        + (3 + config.draws) / 2 * len(config.lams)
    )
    runs += tries * len(MASKS) + len(config.base.search_seeds) + 1
    examples = config.base.examples * config.base.recipe.gradient_flops()
    return runs * config.base.recipe.epochs * examples


EXPERIMENT = Experiment(
    name="inside_the_step",
    title="Inside a step of the SAM family: what is reused, selected and left out",
    source="this book, after the papers of the variants",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=[
        kept_part_turns_slowly,
        kept_part_turns_more_slowly_than_the_gradient,
        last_gradient_predicts_better_than_momentum,
        minus_momentum_is_uphill,
        minus_momentum_is_downhill_at_small_lr,
        rising_examples_are_nearer,
        rising_examples_are_nearer_than_others,
        gsam_lowers_the_gap,
        gsam_lowers_the_gap_at_equal_loss,
        norm_layers_suffice,
        norm_layers_beat_sgd,
        norm_layers_beat_random_entries,
        norm_layers_leave_it_sharper,
        frob_sam_is_unnormalized_sam,
    ],
    cost=cost,
)
