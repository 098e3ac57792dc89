r"""Where the bouncing leads, on losses small enough that theory gives a number for every run.

Four studies. The loss of the first three is that of `hyperbola`: pairs of weights whose product
shall be 1, where the place on the hyperbola is $q = u^2 - v^2$ and a minimum is flatter the smaller
$|q|$. The rates by which $\log q$ falls are derived in that module.

``one``: one pair, under SAM and under label noise at several learning rates and sizes; the controls
are gradient descent and SAM without normalisation, which have nothing that drives them once the
pair is fitted. The size ``match`` is the label noise that drifts as SAM does, $4\rho^2 =
\eta\sigma^2(2 - \eta s)$.

``pairs``: three pairs, a sharp, a middling and a flat one. Who moves? Wen, Ma & Li (2023) prove
that SAM on the full batch and SAM on single examples minimise different sharpnesses; which, we know
at second hand: the largest eigenvalue, and the trace. Full-batch SAM needs a tremor in its
gradient: without it the gradient of a pair that has not moved for long is exactly zero in floating
point, and SAM does not see that it has become the sharpest (the rule ``exact``).

``dimension``: SAM beside a random perturbation of the same length, for more and more pairs. A
random direction has 1/d of its square along the sharpest one.

``floors``: how close a fixed radius lets SAM come to the minimum (after Si & Yun 2023). Full batch,
$\tfrac12\lambda x^2$: SAM bounces at $|x| = \eta\lambda\rho/(2 - \eta\lambda)$, so the loss of its
floor falls as $\eta^2$. Single examples, $\tfrac12(x-1)^2$ or $(x+1)^2$: between the two minima the
gradients of the examples have opposite signs, so each is perturbed towards the other's minimum, and
the mean rests where $3x + 1 + \rho = 0$, off the optimum by $\rho/3$ and above the least loss by
$\tfrac34(\rho/3)^2$, whatever $\eta$. The spread of $x$ around that mean is SGD's own and is not
counted.

The criteria were set before the first run of this experiment: 3% in the fall of $\log q$. Pilots of
some settings, on other starts and with other code, had been seen. After one more, on other seeds,
the radius of the three pairs was raised from 0.03 to 0.04, because the flattest pair had hardly
begun to move when the run ended, and the tremor from 1e-12 to 1e-9, because a pair takes the longer
to notice that it has become the sharpest, the smaller its gradient has become. In the first run of
the whole grid one run of six steps missed the 3%; the claim on slow drifts was added then, and the
sharpest pair of `dimension` was moved off its minimum, where SAM of two seeds had no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.experiments.theory import hyperbola
from sam_lab.experiments.theory.hyperbola import Floats

DERIVED = Source("derived here", "ours")
WEN = Source("Wen, Ma & Li 2023", "after")
AHN = Source("Ahn et al. 2024", "after")
SI_YUN = Source("Si & Yun 2023", "after")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        lrs: learning rates of one pair.
        radii: of SAM on one pair.
        sigmas: label noise on one pair.
        match: learning rate and radius of SAM that label noise is matched to.
        starts: where a pair begins, from and to; each seed draws one.
        depth: by how much log q is to fall in a run of one pair, by the rate at its start.
        copies: of every run that is random.
        pairs: where three pairs begin, each moved by the seed by up to a twentieth.
        pairs_lr: learning rate of the mean over the three.
        pairs_single_lr: of single examples.
        pairs_rho: radius of SAM on the full batch.
        pairs_single_rho: of SAM on single examples.
        pairs_noise_rho: length of the random perturbation.
        pairs_sigma: label noise on three pairs.
        pairs_steps: how long.
        moments: at which the places of the three are kept.
        tremor: standard deviation of the noise in the gradient of full-batch SAM.
        sizes: numbers of pairs of `dimension`.
        size_rate, size_rho, size_depth: its learning rate of a pair, radius and depth.
        floor_lrs, floor_rhos: learning rates and radii of `floors`; the middle one is the base.
        floor_copies: its copies on single examples.
    """

    lrs: tuple[float, ...] = (0.05, 0.2, 0.4)
    radii: tuple[float, ...] = (0.02, 0.05, 0.1)
    sigmas: tuple[float, ...] = (0.1, 0.2)
    match: tuple[float, float] = (0.2, 0.02)
    starts: tuple[float, float] = (2.5, 3.5)
    depth: float = 1.0
    copies: int = 400
    pairs: tuple[float, ...] = (6.0, 3.0, 1.5)
    pairs_lr: float = 0.3
    pairs_single_lr: float = 0.1
    pairs_rho: float = 0.04
    pairs_single_rho: float = 0.05
    pairs_noise_rho: float = 0.1
    pairs_sigma: float = 0.1
    pairs_steps: int = 9000
    moments: int = 150
    tremor: float = 1e-9
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
    size_rate: float = 0.1
    size_rho: float = 0.1
    size_depth: float = 0.25
    floor_lrs: tuple[float, ...] = (0.1, 0.01, 0.001)
    floor_rhos: tuple[float, ...] = (0.03, 0.1, 0.3)
    floor_copies: int = 2000


LAPTOP = Config()
# There is no scale of a paper's here; this one is only larger.
PAPER = Config(lrs=(0.01, 0.05, 0.2, 0.4), radii=(0.01, 0.02, 0.05, 0.1), copies=4000)


def follow(
    w: Floats, steps: int, step: Callable[[Floats], Floats], moments: int = 1
) -> tuple[np.ndarray, Floats]:
    """Steps (M,), from 0 on, and the places there, mean over copies, (M, n).

    Args:
        w: (copies, 2, n).
    """
    kept = np.unique(np.linspace(0, steps, moments + 1).round().astype(int))
    places = [hyperbola.place(w).mean(0)]
    for begin, end in pairwise(kept):
        for _ in range(begin, end):
            w = step(w)
        places.append(hyperbola.place(w).mean(0))
    return kept, np.array(places)


def _fall(places: Floats) -> float:
    """By how much log q of the first pair falls."""
    return float(np.log(places[0, 0] / places[-1, 0]))


# --- one pair -------------------------------------------------------------------------------------


def _ones(config: Config) -> list[Setting]:
    sizes = {"sam": config.radii, "label_noise": config.sigmas}
    laws = [
        {"rule": rule, "lr": lr, "size": size, "match": False}
        for rule, each in sizes.items()
        for lr in config.lrs
        for size in each
    ]
    lr, rho = config.match
    rest = [
        {"rule": rule, "lr": lr, "size": rho, "match": True}
        for rule in ("sam", "label_noise", "descent", "unnormalized")
    ]
    return [*laws, *rest]


def one(config: Config, cell: Cell) -> dict[str, Any]:
    """One pair, from a place that the seed draws.

    Of the setting ``match`` the label noise is the one that drifts as SAM of the radius ``size``
    does at the start, and all rules have the steps of SAM.

    Returns:
        ``steps``; ``fall``, of log q; ``predicted``, by the rate along the way; ``small``, by its
        limit for a small learning rate; ``late``, the fall in the last nine tenths of the steps.
    """
    rng = np.random.default_rng(cell.seed)
    start = float(rng.uniform(*config.starts))
    lr, size, rule = cell["lr"], cell["size"], cell["rule"]
    s = float(hyperbola.sharpness(start))
    noisy = rule == "label_noise"
    sigma = size
    if cell["match"]:
        sigma = 2 * size / math.sqrt(lr * (2 - lr * s))

    def rate(q: Floats) -> Floats:
        if noisy:
            return hyperbola.label_noise_rate(q, lr, sigma)
        return hyperbola.sam_rate(q, lr, size if rule == "sam" else 0.0)

    pace = hyperbola.sam_rate(start, lr, size) if cell["match"] else rate(np.array([start]))
    steps = math.ceil(config.depth / float(np.squeeze(pace)))
    w = np.repeat(hyperbola.at(start, 0.1)[None], config.copies if noisy else 1, axis=0)
    _, places = follow(
        w,
        steps,
        lambda w: hyperbola.step(
            w,
            lr,
            0.0 if noisy else size,
            "descent" if noisy else rule,
            sigma=sigma if noisy else 0.0,
            rng=rng,
        ),
        moments=10,
    )
    small = lr**2 * sigma**2 if noisy else 2 * lr * size**2 if rule == "sam" else 0.0
    cell.tick(1, 1)
    return {
        "steps": steps,
        "fall": _fall(places),
        "predicted": _fall(hyperbola.flow(start, rate, steps)),
        "small": small * steps,
        "late": _fall(places[1:]),
    }


# --- three pairs ----------------------------------------------------------------------------------

PAIR_RULES = ("sam", "exact", "single_sam", "label_noise", "noise", "descent")


def _how(config: Config, rule: str) -> tuple[float, dict[str, Any], Callable[[Floats], Floats]]:
    """Learning rate and options of a rule's step, and the rate of a pair that is tied to none."""
    n, lr = len(config.pairs), config.pairs_lr
    own = lr / n  # what a pair feels of the mean's learning rate
    if rule in {"sam", "exact"}:
        tremor = config.tremor if rule == "sam" else 0.0
        rho = config.pairs_rho
        options = {"rho": rho, "rule": "sam", "tremor": tremor}
        return lr, options, lambda q: hyperbola.sam_rate(q, own, rho)
    if rule == "single_sam":
        lr, rho = config.pairs_single_lr, config.pairs_single_rho
        options = {"rho": rho, "rule": "sam", "single": True}
        return lr, options, lambda q: hyperbola.sam_rate(q, lr, rho) / n
    if rule == "label_noise":
        sigma = config.pairs_sigma
        return lr, {"sigma": sigma}, lambda q: hyperbola.label_noise_rate(q, own, sigma)
    if rule == "noise":
        rho = config.pairs_noise_rho
        options = {"rho": rho, "rule": "noise"}
        return lr, options, lambda q: hyperbola.noise_rate(q, own, rho, 2 * n)
    return lr, {}, np.zeros_like


def pairs(config: Config, cell: Cell) -> dict[str, Any]:
    """Three pairs under one rule, and where theory says that they are.

    Returns:
        ``step`` (M,); ``place_k`` and ``flow_k`` (M,) for each pair k from 1 on, the former mean
        over copies.
    """
    rng = np.random.default_rng(cell.seed)
    n, steps, rule = len(config.pairs), config.pairs_steps, cell["rule"]
    starts = np.array(config.pairs) * rng.uniform(0.95, 1.05, n)
    lr, options, rate = _how(config, rule)
    copies = config.copies // 2 if rule in {"single_sam", "label_noise", "noise"} else 1
    w = np.repeat(hyperbola.at(starts, 0.1)[None], copies, axis=0)
    kept, places = follow(
        w, steps, lambda w: hyperbola.step(w, lr, rng=rng, **options), config.moments
    )
    if rule in {"sam", "exact"}:
        theory = hyperbola.tied_flow(starts, lr, config.pairs_rho, steps)
    else:
        theory = hyperbola.flow(starts, rate, steps)
    cell.tick(1, 1)
    columns: dict[str, Any] = {"step": kept}
    for k in range(n):
        columns[f"place_{k + 1}"] = places[:, k]
        columns[f"flow_{k + 1}"] = theory[kept, k]
    return columns


# --- more and more pairs --------------------------------------------------------------------------


def dimension(config: Config, cell: Cell) -> dict[str, Any]:
    """The sharpest of more and more pairs, under SAM and under a random perturbation.

    Returns:
        For each number of pairs: ``d``, the number of weights; ``sam`` and ``noise``, the fall of
        log q a step; ``noise_over_law``, the fall under noise over the predicted one.
    """
    rng = np.random.default_rng(cell.seed)
    start = float(rng.uniform(*config.starts))
    own, rho = config.size_rate, config.size_rho
    rows = Rows()
    for done, n in enumerate(config.sizes, start=1):
        d = 2 * n
        begin = hyperbola.at(np.r_[start, np.ones(n - 1)], np.r_[0.1, np.zeros(n - 1)])[None]

        def fall(rule: str, steps: int, copies: int, begin: Floats = begin, n: int = n) -> float:
            w = np.repeat(begin, copies, axis=0)
            move = partial(hyperbola.step, lr=n * own, rho=rho, rule=rule, rng=rng)
            return _fall(follow(w, steps, move)[1])

        law = partial(hyperbola.noise_rate, lr=own, rho=rho, d=d)
        short, long = (
            math.ceil(config.size_depth / float(rate))
            for rate in (hyperbola.sam_rate(start, own, rho), law(start))
        )
        noise = fall("noise", long, config.copies)
        rows.add(
            d=d,
            sam=fall("sam", short, 1) / short,
            noise=noise / long,
            noise_over_law=noise / _fall(hyperbola.flow(start, law, long)),
        )
        cell.tick(done, len(config.sizes))
    return rows.columns


# --- floors ---------------------------------------------------------------------------------------

FLOOR_CURVATURE = 1.5  # of the mean of (x-1)²/2 and (x+1)²; the full batch has it too
FLOOR_OPTIMUM = -1 / 3
SETTLED = 8.0  # times of relaxation, 1/(lr curvature), before x is looked at, and while it is


def _floors(config: Config) -> list[Setting]:
    base = config.floor_rhos[len(config.floor_rhos) // 2]
    middle = config.floor_lrs[len(config.floor_lrs) // 2]
    sweep = [(lr, base) for lr in config.floor_lrs]
    radii = [(middle, rho) for rho in (0.0, *config.floor_rhos) if rho != base]
    return [
        {"batch": batch, "lr": lr, "rho": rho}
        for batch in ("full", "single")
        for lr, rho in [*sweep, *radii]
    ]


def floors(config: Config, cell: Cell) -> dict[str, Any]:
    """SAM on the full batch, or on one of two examples that want different minima.

    Returns:
        ``bias``, how far the iterates (full batch) or their mean (single examples) rest from the
        optimum, and ``excess``, the loss there over the least.
    """
    lr, rho = cell["lr"], cell["rho"]
    rng = np.random.default_rng(cell.seed)
    wait = math.ceil(SETTLED / (lr * FLOOR_CURVATURE))
    if cell["batch"] == "full":
        x = np.array([rng.uniform(0.5, 1.5)])
        seen = []
        for step in range(5 * wait):
            x = x - lr * FLOOR_CURVATURE * (x + rho * np.sign(x))
            if step >= 4 * wait:
                seen.append(float(np.abs(x[0])))
        bias = float(np.mean(seen))
    else:
        x = rng.uniform(-1, 1, config.floor_copies)
        total = 0.0
        for step in range(2 * wait):
            second = rng.random(config.floor_copies) < 0.5
            curvature, minimum = np.where(second, 2.0, 1.0), np.where(second, -1.0, 1.0)
            x = x - lr * curvature * (x + rho * np.sign(x - minimum) - minimum)
            if step >= wait:
                total += float(x.mean())
        bias = abs(total / wait - FLOOR_OPTIMUM)
    cell.tick(1, 1)
    return {"bias": bias, "excess": 0.5 * FLOOR_CURVATURE * bias**2}


# --- what the runs decide -------------------------------------------------------------------------


def _ones_of(runs: SeedRuns, rule: str, *, match: bool = False) -> list[Run]:
    return runs.all(study="one", rule=rule, match=match)


def _measured(run: Run) -> float:
    return run.value("fall") / run.value("predicted")


SLOW = 50  # steps that a fall by 1 takes at least, at its first pace, where theory averages


def _pairs_of(runs: SeedRuns, rule: str) -> Run:
    return runs.one(study="pairs", rule=rule)


def _places(run: Run, name: str = "place") -> np.ndarray:
    """(M, n)."""
    count = sum(column.startswith("place_") for column in run.columns)
    return np.column_stack([run[f"{name}_{k + 1}"] for k in range(count)])


def falls(run: Run, name: str = "place") -> np.ndarray:
    """By how much log q of each pair falls over the run, (n,)."""
    places = _places(run, name)
    found: np.ndarray = np.log(places[0] / places[-1])
    return found


def tie(run: Run) -> int:
    """The first moment at which the sharpest pair is as sharp as the second was at the start."""
    places = _places(run)
    there = np.flatnonzero(places[:, 0] <= places[0, 1])
    return int(there[0]) if len(there) else len(places) - 1


def _over_theory(run: Run) -> float:
    return farthest_from_one(falls(run) / falls(run, "flow"))


def _floor_of(runs: SeedRuns, batch: str) -> list[Run]:
    return runs.all(study="floors", batch=batch)


def exponent(runs: list[Run], name: str) -> float:
    """Of the excess loss, as a power of a setting, over the runs in which that setting differs."""
    values = np.array([run.settings[name] for run in runs])
    excess = np.array([run.value("excess") for run in runs])
    return float(np.polyfit(np.log(values), np.log(excess), 1)[0])


def _sweep(runs: list[Run], name: str) -> list[Run]:
    """Those with the most common value of the other setting, and a radius above 0."""
    other = "rho" if name == "lr" else "lr"
    values = [run.settings[other] for run in runs if run.settings["rho"]]
    common = max(set(values), key=values.count)
    return [run for run in runs if run.settings[other] == common and run.settings["rho"]]


@claim(DERIVED, 0.97, 1.03, domain="positive")
def sam_drifts_as_the_bounce_says(runs: SeedRuns) -> float:
    """On the hyperbola uv = 1 SAM drifts to flatter minima as fast as its averaged bounce says, by
    8ηρ²/(2 − ηs)² of log(u² − v²) a step: measured fall over predicted fall, at the learning rate
    and radius where that is farthest from 1"""
    return farthest_from_one(map(_measured, _ones_of(runs, "sam")))


@claim(DERIVED, 0.97, 1.03, domain="positive", set_after=True, headline=True)
def slow_sam_drifts_as_the_bounce_says(runs: SeedRuns) -> float:
    """Where a step changes little, on the hyperbola uv = 1 SAM drifts to flatter minima as fast as
    its averaged bounce says, by 8ηρ²/(2 − ηs)² of log(u² − v²) a step: measured fall over predicted
    fall, at the learning rate and radius where that is farthest from 1, of those by which the first
    step falls by at most a fiftieth"""
    slow = [run for run in _ones_of(runs, "sam") if run.value("steps") >= SLOW]
    return farthest_from_one(map(_measured, slow))


@claim(DERIVED, 0.97, 1.03, domain="positive")
def label_noise_drifts_as_derived(runs: SeedRuns) -> float:
    """On the hyperbola uv = 1 gradient descent with labels 1 ± σ drifts to flatter minima by
    2η²σ²/(2 − ηs) of log(u² − v²) a step: measured fall over predicted fall, mean over copies, at
    the learning rate and noise where that is farthest from 1"""
    return farthest_from_one(map(_measured, _ones_of(runs, "label_noise")))


@claim(DERIVED, low=1.5, domain="positive")
def small_rate_law_is_too_slow(runs: SeedRuns) -> float:
    """At the largest learning rate SAM drifts at least half as fast again on the hyperbola as the
    limit for small learning rates says, 2ηρ² a step: measured fall over that limit, at the radius
    where smallest"""
    found = _ones_of(runs, "sam")
    largest = max(run.settings["lr"] for run in found)
    ratios = [
        run.value("fall") / run.value("small") for run in found if run.settings["lr"] == largest
    ]
    return min(ratios)


@claim(CONTROL, high=0.01)
def without_a_force_nobody_drifts(runs: SeedRuns) -> float:
    """Gradient descent, and SAM without normalisation, do not drift on the hyperbola once they have
    fitted: fall of log(u² − v²) in the last nine tenths of the steps over SAM's, the larger one"""
    (sam,) = _ones_of(runs, "sam", match=True)
    others = ("descent", "unnormalized")
    late = [run.value("late") for rule in others for run in _ones_of(runs, rule, match=True)]
    return max(map(abs, late)) / sam.value("late")


@claim(DERIVED, 0.97, 1.03, domain="positive")
def sam_equals_label_noise(runs: SeedRuns) -> float:
    """SAM drifts on the hyperbola as label noise with 4ρ² = ησ²(2 − ηs) at the start does: SAM's
    fall of log(u² − v²) over that of label noise, each over its own prediction along the way"""
    (sam,), (noise,) = (_ones_of(runs, rule, match=True) for rule in ("sam", "label_noise"))
    return _measured(sam) / _measured(noise)


@claim(WEN, high=0.03, headline=True)
def full_batch_sam_flattens_the_sharpest(runs: SeedRuns) -> float:
    """Of three pairs full-batch SAM flattens the sharpest alone, until it is as sharp as the
    second: fall of log(u² − v²) of the other pairs until then over that of the sharpest, the larger
    one"""
    run = _pairs_of(runs, "sam")
    places = _places(run)
    fallen = np.log(places[0] / places[tie(run)])
    return float(np.abs(fallen[1:]).max() / fallen[0])


@claim(DERIVED, 0.97, 1.03, domain="positive")
def tied_pairs_share_the_bounce(runs: SeedRuns) -> float:
    """Pairs that are equally sharp share one bounce of full-batch SAM, each with its part of the
    drift: fall of log(u² − v²) over the predicted one at the end, at the pair where that is
    farthest from 1"""
    return _over_theory(_pairs_of(runs, "sam"))


@claim(WEN, low=0.3)
def single_examples_flatten_all(runs: SeedRuns) -> float:
    """SAM on single examples, and label noise, flatten all three pairs at once: fall of
    log(u² − v²) of the flattest pair over that of the sharpest, the smaller of the two"""
    found = [falls(_pairs_of(runs, rule)) for rule in ("single_sam", "label_noise")]
    return float(min(fallen[-1] / fallen[0] for fallen in found))


@claim(DERIVED, 0.97, 1.03, domain="positive")
def all_pairs_as_derived(runs: SeedRuns) -> float:
    """SAM on single examples, label noise and random perturbations flatten three pairs at the
    derived rates: fall of log(u² − v²) over the predicted one, mean over copies, at the rule and
    the pair where that is farthest from 1"""
    rules = ("single_sam", "label_noise", "noise")
    return farthest_from_one(_over_theory(_pairs_of(runs, rule)) for rule in rules)


@claim(DERIVED, high=0.5, domain="positive")
def without_a_tremor_sam_overshoots(runs: SeedRuns) -> float:
    """In floating point and without any noise full-batch SAM goes on flattening the sharpest of
    three pairs far below the second: u² − v² of the first over that of the second, at its least"""
    places = _places(_pairs_of(runs, "exact"))
    return float((places[:, 0] / places[:, 1]).min())


@claim(AHN, -1.1, -0.9)
def noise_is_one_dth_of_sam(runs: SeedRuns) -> float:
    """A random perturbation of SAM's length flattens the sharpest pair like 1/d of SAM, d the
    number of weights: exponent of d in the ratio of the falls of log(u² − v²) a step"""
    run = runs.one(study="dimension")
    return float(np.polyfit(np.log(run["d"]), np.log(run["noise"] / run["sam"]), 1)[0])


@claim(DERIVED, 0.97, 1.03, domain="positive")
def noise_drifts_as_derived(runs: SeedRuns) -> float:
    """A random perturbation of length ρ flattens a pair by 4ηρ²/(d(2 − ηs)) of log(u² − v²) a step:
    measured fall over predicted fall, mean over copies, at the number of weights where that is
    farthest from 1"""
    return farthest_from_one(runs.one(study="dimension")["noise_over_law"])


@claim(SI_YUN, 1.9, 2.1)
def full_batch_floor_falls_with_the_rate(runs: SeedRuns) -> float:
    """On a quadratic the loss at which full-batch SAM stops falls as the square of the learning
    rate: exponent"""
    return exponent(_sweep(_floor_of(runs, "full"), "lr"), "lr")


@claim(SI_YUN, -0.1, 0.1)
def single_example_floor_stays(runs: SeedRuns) -> float:
    """On two examples with different minima SAM on single examples rests off the optimum however
    small the learning rate: exponent of the learning rate in the excess loss at the mean of the
    iterates"""
    return exponent(_sweep(_floor_of(runs, "single"), "lr"), "lr")


@claim(SI_YUN, 1.9, 2.1)
def single_example_floor_is_square_in_rho(runs: SeedRuns) -> float:
    """On two examples with different minima the excess loss at the mean of the iterates of SAM on
    single examples grows as the square of the radius: exponent"""
    return exponent(_sweep(_floor_of(runs, "single"), "rho"), "rho")


@claim(DERIVED, 0.97, 1.03, domain="positive")
def single_example_floor_is_a_third(runs: SeedRuns) -> float:
    """On two examples with different minima the mean of the iterates of SAM on single examples is
    off the optimum by ρ/3: measured over predicted, at the smallest learning rate"""
    run = min(_sweep(_floor_of(runs, "single"), "lr"), key=lambda run: run.settings["lr"])
    return run.value("bias") / (float(run.settings["rho"]) / 3)


@claim(CONTROL, high=0.1)
def without_a_radius_no_floor(runs: SeedRuns) -> float:
    """With the radius 0 the mean of the iterates on single examples is at the optimum: distance
    from it over that with the middle radius, at the same learning rate"""
    found = _sweep(_floor_of(runs, "single"), "rho")
    base = sorted(found, key=lambda run: run.settings["rho"])[len(found) // 2]
    control = runs.one(study="floors", batch="single", lr=base.settings["lr"], rho=0.0)
    return control.value("bias") / base.value("bias")


STUDIES = Studies(
    Study("one", _ones, one),
    Study("pairs", lambda _: [{"rule": rule} for rule in PAIR_RULES], pairs),
    Study("dimension", lambda _: [{}], dimension),
    Study("floors", _floors, floors),
)

EXPERIMENT = Experiment(
    name="bounce_toys",
    title="Where the bouncing leads: toys with a number for every run",
    source="derived here; Wen, Ma & Li 2023 (arXiv:2211.05729), Ahn et al. 2024 "
    "(arXiv:2305.15659) and Si & Yun 2023 (arXiv:2306.09850) for the questions",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=[
        sam_drifts_as_the_bounce_says,
        slow_sam_drifts_as_the_bounce_says,
        label_noise_drifts_as_derived,
        small_rate_law_is_too_slow,
        without_a_force_nobody_drifts,
        sam_equals_label_noise,
        full_batch_sam_flattens_the_sharpest,
        tied_pairs_share_the_bounce,
        single_examples_flatten_all,
        all_pairs_as_derived,
        without_a_tremor_sam_overshoots,
        noise_is_one_dth_of_sam,
        noise_drifts_as_derived,
        full_batch_floor_falls_with_the_rate,
        single_example_floor_stays,
        single_example_floor_is_square_in_rho,
        single_example_floor_is_a_third,
        without_a_radius_no_floor,
    ],
)
