r"""Switching to SAM at the solution that gradient descent has found: how it leaves, where it ends.

Gradient descent trains to the edge 2/lr, comes to rest a little below it, and stays there from then
on. From the same weights SAM leaves: the training loss rises, falls, and settles where the
sharpness is lower. Zhou et al. (2025) call the rise exponential, with a theory for the unnormalised
rule (epsilon = rho g) on a linearised model, and experiments with the normalised one. On a
quadratic, a step of either multiplies the gradient's component a along the eigenvector of curvature
$\lambda$ in modulus by

$$m = |1 - \eta\lambda\,(1 + \rho\lambda)|
    \quad\text{and}\quad
  m_t = |1 - \eta\lambda\,(1 + \rho\lambda/\|g_t\|)|.$$

The first is one number: above 1 the rise is exponential from beginning to end. The second is huge
while the gradient is short, whatever it consists of, and falls as the gradient grows. Once the
gradient *is* that component, $|a_{t+1}| = (\eta\lambda - 1)|a_t| + \eta\rho\lambda^2$ (for
$\eta\lambda > 1$): the same is added in every step, and where $\eta\lambda < 2$ the rise ends in a
bounce of fixed height. So "exponential" is a claim about the unnormalised rule that can be put to
the test for the normalised one.

One setting is a loss ("network", or "quadratic": its second-order model at the start, with the
exact Hessian), the gradient (of the "full" data, or of a "minibatch"; the start was then found by
SGD with the same batches), a rule and a radius. The controls: ``descent`` goes on with gradient
descent; ``random`` perturbs as far, in a random direction; ``ascent`` adds the perturbation to the
weights and never comes back, which is no SAM at all: it is what a loop measures that forgets to
restore the weights, as the escape script does that was released with the paper.

Loss: half the sum of squares over the outputs, mean over examples. Double precision: the rise
begins many orders of magnitude below the loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.experiments.sam.quadratics import taylor
from sam_lab.objective import Closure
from sam_lab.perturbations import Rule, random_direction, sam, unnormalized
from sam_lab.sam import SAM
from sam_lab.stability import growth, sam_edge
from sam_lab.tracker import SharpnessTracker
from sam_lab.training import squared_error

ZHOU = Source("Zhou et al. 2025", "after")
# Its abstract: SAM escapes exponentially fast, then converges rapidly to a flatter minimum.
ABSTRACT = Source("Zhou et al. 2025", "paper")
FACTOR = Source("Zhou et al. 2025 (direction; the factor is ours)", "after")
OUR_ZHOU = Source("this book, after Zhou et al. 2025", "ours")

RULES: dict[str, Rule] = {"sam": sam, "unnormalized": unnormalized, "random": random_direction}
CONTROLS = ("descent", "ascent")
"""What a step may be besides a rule: gradient descent, and `ascend`."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, images: the data set, and how many images are the full batch.
        hidden, activation: of the network, which is fully connected.
        lr, trunk: learning rate and steps of gradient descent, or SGD, to the start.
        decay, settle: factor of the learning rate from then on, so that what bounces at the edge
            comes to rest; and for how many more steps of the same optimizer it may do so.
        batch: size of a minibatch.
        rhos, noisy_rhos: radii of SAM with full batches, and with minibatches.
        unnormalized, noisy_unnormalized: those of the unnormalised rule. For growth
            lr x sharpness x (1 + rho x sharpness) must be above 2.
        steps: after the switch.
        dense, moments: every step is measured up to `dense`, with which the runs on the quadratic
            model end, and the ascent; from there on that many, evenly spaced in log step.
        tol: tolerance on the residual of the sharpness.
    """

    data: str = "digits"
    images: int = 300
    hidden: tuple[int, ...] = (50, 50)
    activation: str = "tanh"
    lr: float = 0.2
    trunk: int = 3000
    decay: float = 0.9
    settle: int = 60
    batch: int = 50
    rhos: tuple[float, ...] = (0.01, 0.03, 0.1)
    noisy_rhos: tuple[float, ...] = (0.03, 0.1)
    unnormalized: tuple[float, ...] = (0.05, 0.1)
    noisy_unnormalized: tuple[float, ...] = (0.1,)
    steps: int = 1500
    dense: int = 50
    moments: int = 40
    tol: float = 1e-2


LAPTOP = Config()
LIVE = replace(LAPTOP, steps=500, moments=25)
# Data, network and loss of the first command in the code of Cohen et al. (2021), at its learning
# rate, which puts the edge ten times higher than that of the laptop; batches as in the code of Zhou
# et al. (2025). The radii are chosen so that rho x sharpness is about what it is there.
PAPER = Config(
    data="cifar10",
    images=5000,
    hidden=(200, 200),
    lr=0.02,
    trunk=10_000,
    settle=100,
    batch=128,
    rhos=(0.001, 0.003, 0.01, 0.03),
    noisy_rhos=(0.003, 0.01, 0.03),
    unnormalized=(0.005, 0.01),
    noisy_unnormalized=(0.01,),
    steps=10_000,
    dense=60,
    moments=100,
)


def settings(config: Config) -> list[Setting]:
    """Every rule with each of its radii, on the network and, for two of them, on the quadratic."""

    def one(rule: str, rho: float, loss: str = "network", gradient: str = "full") -> Setting:
        return {"loss": loss, "gradient": gradient, "rule": rule, "rho": rho}

    rising = [
        *(("sam", rho) for rho in config.rhos),
        *(("unnormalized", rho) for rho in config.unnormalized),
    ]
    return [
        one("descent", 0.0),
        *(one(rule, rho) for rule, rho in rising),
        one("random", max(config.rhos)),
        one("ascent", min(config.rhos)),
        *(one(rule, rho, loss="quadratic") for rule, rho in rising),
        one("descent", 0.0, gradient="minibatch"),
        *(one("sam", rho, gradient="minibatch") for rho in config.noisy_rhos),
        *(one("unnormalized", rho, gradient="minibatch") for rho in config.noisy_unnormalized),
    ]


# --- the start -----------------------------------------------------------------------------------


def problem(
    config: Config, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, initialised from `seed`, its standardised inputs and the labels.

    Raises:
        ValueError: an unknown data set or activation, or more images than there are.
    """
    images = data.load(
        config.data, train=config.images, seed=seed, device=device, dtype=torch.float64
    )
    x = data.standardize(images.x.flatten(1))
    sizes = (x.shape[1], *config.hidden, images.classes)
    model = models.mlp(
        sizes, config.activation, init="glorot", seed=seed, device=device, dtype=torch.float64
    )
    return model, x, images.y


def batches(
    model: nn.Module, x: Tensor, y: Tensor, size: int | None, generator: torch.Generator
) -> Iterator[Closure]:
    """Without end, the loss on one batch after another; with size None each time on all data."""

    def on(inputs: Tensor, labels: Tensor) -> Closure:
        return lambda: squared_error(model(inputs), labels)

    while True:
        if size is None:
            yield on(x, y)
        else:
            drawn = torch.randperm(len(x), generator=generator)[:size].to(x.device)
            yield on(x[drawn], y[drawn])


@lru_cache(maxsize=64)
def start(
    config: Config, seed: int = 0, device: str = "cpu", minibatch: bool = False
) -> dict[str, Tensor]:
    """The network's state at the switch, shared by all settings of a seed: not to be written to."""
    model, x, y = problem(config, seed, device)
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr)
    plain = SAM(sgd, rho=0.0, same_rng=False)
    generator = torch.Generator().manual_seed(seed)
    closures = batches(model, x, y, config.batch if minibatch else None, generator)
    for step in range(config.trunk + config.settle):
        if step == config.trunk:
            sgd.param_groups[0]["lr"] *= config.decay
        plain.step(next(closures))
    return model.state_dict()


# --- from the switch on --------------------------------------------------------------------------


def ascend(closure: Closure, params: Sequence[Tensor], rho: float) -> None:
    """A step of length rho along the gradient, in place: SAM's perturbation, never taken back."""
    grads = torch.autograd.grad(closure(), params)
    with torch.no_grad():
        for p, epsilon in zip(params, sam(params, grads, rho), strict=True):
            p.add_(epsilon)


def measured_steps(steps: int, dense: int, moments: int) -> list[int]:
    """Each step from 0 to `dense`, then `moments` up to `steps`, evenly spaced in log step."""
    if steps <= dense:
        return list(range(steps + 1))
    later = np.geomspace(dense, steps, moments + 1).round().astype(int)
    return sorted({*range(dense + 1), *later.tolist()})


def follow(
    step: Callable[[], Any],
    closure: Closure,
    params: Sequence[Tensor],
    moments: Sequence[int],
    tol: float = 1e-2,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Columns:
    """Takes steps, and records what becomes of the loss.

    Args:
        step: takes one step.
        closure: the loss that is watched, that of the full batch.
        params: what the steps move.
        moments: after how many steps to measure, ascending, from 0 on.
        tol: tolerance on the residual of the sharpness; the first is measured to 1e-9.

    Returns:
        Columns, one entry a moment: ``step``; ``loss``; ``typical`` and ``highest``, median and
        maximum of the loss over the steps since the moment before; ``grad_norm``; ``along``, the
        gradient's component along the top eigenvector of the start; ``distance`` of the weights
        from the start; ``sharpness``.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    tracker = SharpnessTracker(closure, params, tol=tol)
    hessian = tracker.hessian
    # along is a small part of the gradient: an error of the direction would add some of the rest
    first = hessian.top(1, 1e-9, max_hvps=1000)
    direction = first.vectors[:, 0]
    base = torch.cat([p.detach().flatten() for p in params])
    rows = Rows()
    done = 0
    for moment in moments:
        since: list[float] = []
        while done < moment:
            step()
            done += 1
            with torch.no_grad():
                since.append(float(closure()))
        pairs = tracker.measure() if done else first
        loss, gradient = hessian.loss(), hessian.gradient()
        here = torch.cat([p.detach().flatten() for p in params])
        rows.add(
            step=done,
            loss=loss,
            typical=float(np.median(since or [loss])),
            highest=max(since or [loss]),
            grad_norm=float(gradient.norm()),
            along=float(gradient @ direction),
            distance=float((here - base).norm()),
            sharpness=float(pairs.values[0]),
        )
        tick(done, moments[-1])
    return rows.columns


def run(config: Config, cell: Cell) -> Columns:
    """One setting from the switch on; the columns are those of `follow`.

    A learning rate `config.lr * config.decay`, without momentum. For a live cell:
    ``run(LIVE, Cell({"loss": "network", "gradient": "full", "rule": "sam", "rho": 0.1}))``.

    Raises:
        ValueError: an unknown loss, gradient or rule, or gradient descent with a radius.
    """
    for name, known in (
        ("loss", ("network", "quadratic")),
        ("gradient", ("full", "minibatch")),
        ("rule", (*RULES, *CONTROLS)),
    ):
        if cell[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {cell[name]!r}")
    rule, rho, seed = cell["rule"], cell["rho"], cell.seed
    if rule == "descent" and rho:
        raise ValueError(f"rho must be 0 for the rule descent, got {rho!r}")
    minibatch = cell["gradient"] == "minibatch"
    model, x, y = problem(config, seed, cell.device)
    model.load_state_dict(start(config, seed, str(cell.device), minibatch))
    params: list[Tensor] = list(model.parameters())

    def full() -> Tensor:
        return squared_error(model(x), y)

    watched = full
    # other batches than those of the way to the start, and the same ones for every rule
    generator = torch.Generator().manual_seed(2**32 + seed)
    closures = batches(model, x, y, config.batch if minibatch else None, generator)
    if cell["loss"] == "quadratic":
        params, watched = taylor(full, params)
        closures = itertools.repeat(watched)

    chance = torch.Generator().manual_seed(seed) if rule == "random" else None
    sgd = torch.optim.SGD(params, lr=config.lr * config.decay)
    # no loss here draws random numbers, and keeping their state takes time
    optimizer = SAM(sgd, rho, rule=RULES.get(rule, sam), generator=chance, same_rng=False)

    def step() -> None:
        if rule == "ascent":
            ascend(next(closures), params, rho)
        else:
            optimizer.step(next(closures))

    brief = cell["loss"] == "quadratic" or rule == "ascent"
    steps = min(config.steps, config.dense) if brief else config.steps
    moments = measured_steps(steps, config.dense, config.moments)
    return follow(step, watched, params, moments, config.tol, cell.tick)


# --- what a run says -----------------------------------------------------------------------------


def rise(run: Run) -> np.ndarray:
    """Modulus of ``along``, step by step, from the start to half of its largest value."""
    steps = run["step"]
    every: np.ndarray = np.abs(run["along"][steps == np.arange(len(steps))])
    return every[: int(np.flatnonzero(every >= every.max() / 2)[0]) + 1]


def predicted(run: Run, lr: float) -> np.ndarray:
    """What each step of `rise` multiplies it by on a quadratic.

    From the sharpness at the start, the radius, and for the normalised rule |g| at each moment:
    nothing is fitted.

    Args:
        run: one of the rules "descent", "sam" and "unnormalized".
        lr: the learning rate after the switch.
    """
    steps = len(rise(run)) - 1
    rho = np.full(steps, run.settings["rho"])
    if run.settings["rule"] == "sam":
        rho = rho / run["grad_norm"][:steps]
    return np.asarray(growth(lr, run["sharpness"][0], rho))


def rate(run: Run) -> float:
    """Exponent of the rise a step: slope of the line fitted to its logarithm."""
    levels = np.log(rise(run))
    return float(np.polyfit(np.arange(len(levels)), levels, 1)[0])


def shapes(run: Run, column: str, points: int = 30) -> tuple[float, float]:
    """How well an exponential, and how well a power law describes the settling of a column.

    Both, c + A exp(-k t) and c + A t^-p, have three free numbers (c at least 0). t counts from the
    step with the highest loss; the fit begins ten steps later, on `points` moments evenly spaced in
    log t, so that the early part has no more weight for being measured more densely.

    Returns:
        Root mean square of the relative residuals, of the exponential and of the power law.
    """
    peak = int(np.argmax(run["highest"]))
    t, y = run["step"] - run["step"][peak] + 1, run[column]
    wanted = np.geomspace(10, t[-1], points)
    chosen = sorted({int(np.argmin(np.abs(np.log(np.maximum(t, 0.1) / at)))) for at in wanted})
    t, y = t[chosen], y[chosen]

    def residual(curve: np.ndarray) -> float:
        # least squares for c and A, each residual relative to y
        columns = np.stack([np.ones_like(t), curve], axis=1) / y[:, None]
        weights = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
        if weights[0] < 0:
            weights = np.array([0.0, columns[:, 1].sum() / (columns[:, 1] ** 2).sum()])
        return float(np.sqrt(np.mean((columns @ weights - 1) ** 2)))

    exponents, powers = np.geomspace(0.1 / t[-1], 1.0, 300), np.geomspace(0.01, 4.0, 300)
    return (
        min(residual(np.exp(-k * (t - t[0]))) for k in exponents),
        min(residual((t / t[0]) ** -p) for p in powers),
    )


# --- what the runs decide ------------------------------------------------------------------------


def learning_rate(config: Mapping[str, Any]) -> float:
    """The learning rate after the switch, from a result's config."""
    return float(config["lr"] * config["decay"])


def runs_of(runs: SeedRuns, rule: str, gradient: str = "full", loss: str = "network") -> list[Run]:
    """The runs of a rule, one a radius, the smallest first."""
    matching = runs.all(rule=rule, gradient=gradient, loss=loss)
    return sorted(matching, key=lambda run: run.settings["rho"])


def _final(run: Run, column: str) -> float:
    """Median over the last tenth of the moments, or the last three."""
    return float(np.median(run[column][-max(len(run[column]) // 10, 3) :]))


def _final_loss(run: Run) -> float:
    return _final(run, "typical") / float(run["loss"][0])


def _peak(run: Run) -> float:
    return float(run["highest"].max() / run["loss"][0])


def _over_predicted(runs: SeedRuns, run: Run) -> float:
    """The exponent of the rise over that of the theory."""
    return rate(run) / float(np.log(predicted(run, learning_rate(runs.config))[0]))


def _constancy(run: Run) -> float:
    """Mean exponent over the second half of the steps of the rise, over that of the first half.

    Raises:
        ValueError: the rise is over in one step.
    """
    levels = np.log(rise(run))
    half = (len(levels) - 1) // 2
    if half == 0:
        raise ValueError(f"a rise of {len(levels) - 1} step has no halves")
    first, second = levels[half] - levels[0], levels[-1] - levels[half]
    return float(second / (len(levels) - 1 - half) / (first / half))


def _step_by_step(runs: SeedRuns, run: Run) -> float:
    """Error of the predicted exponents of all steps, over that of the best constant one."""
    exponents = np.diff(np.log(rise(run)))
    error = exponents - np.log(predicted(run, learning_rate(runs.config)))
    return float(np.sqrt(np.mean(error**2)) / np.std(exponents))


def _fall(runs: SeedRuns, run: Run) -> float:
    """Steps from the peak until nine tenths of the rise are gone, over those to the start.

    Where that does not happen it is all steps from the peak on.
    """
    peak = int(np.argmax(run["highest"]))
    level = run["loss"][0] + 0.1 * (run["highest"][peak] - run["loss"][0])
    below = np.flatnonzero(run["typical"][peak:] <= level)
    end = run["step"][peak + below[0] if len(below) else -1]
    way = runs.config["trunk"] + runs.config["settle"]
    return float((end - run["step"][peak]) / way)


def _flatter(runs: SeedRuns, gradient: str) -> float:
    """Final sharpness over that of descent after as many steps, where it is largest."""
    descent = _final(runs_of(runs, "descent", gradient)[0], "sharpness")
    return max(_final(run, "sharpness") / descent for run in runs_of(runs, "sam", gradient))


def _exponential_over_power(run: Run, column: str) -> float:
    exponential, power = shapes(run, column)
    return exponential / power


@claim(ZHOU, low=2.0, domain="positive")
def sam_escapes(runs: SeedRuns) -> float:
    """After the switch from gradient descent to SAM, the training loss at least doubles: highest
    loss over the loss at the switch, at the radius where it rises least"""
    return min(map(_peak, runs_of(runs, "sam")))


@claim(CONTROL, high=0.05)
def controls_stay(runs: SeedRuns) -> float:
    """Neither gradient descent nor random perturbations of SAM's length make the training loss
    rise: their highest rise over SAM's, the larger of the two"""
    beside = runs_of(runs, "sam")[-1]  # of the same, the largest, radius
    controls = (runs_of(runs, rule)[0] for rule in ("descent", "random"))
    return max((_peak(run) - 1) / (_peak(beside) - 1) for run in controls)


@claim(ZHOU, 0.9, 1.1, headline=True)
def unnormalized_rate(runs: SeedRuns) -> float:
    """The unnormalised rule escapes at the rate that linear stability predicts from the sharpness
    at the switch: fitted exponent over predicted exponent, at the radius where it is farthest from
    1"""
    return farthest_from_one(_over_predicted(runs, run) for run in runs_of(runs, "unnormalized"))


@claim(ZHOU, 0.8, 1.25)
def unnormalized_exponential(runs: SeedRuns) -> float:
    """Under the unnormalised rule the escape is exponential, at one rate from beginning to end:
    mean exponent in the second half of its steps over that in the first half, at the radius where
    it is farthest from 1"""
    return farthest_from_one(map(_constancy, runs_of(runs, "unnormalized")))


@claim(ABSTRACT, 0.8, 1.25, headline=True)
def normalized_exponential(runs: SeedRuns) -> float:
    """Under SAM as it is used, with normalised perturbations, the escape is exponential: mean
    exponent in the second half of its steps over that in the first half, at the radius where it is
    farthest from 1"""
    return farthest_from_one(map(_constancy, runs_of(runs, "sam")))


@claim(CONTROL, high=0.5, domain="positive")
def step_by_step(runs: SeedRuns) -> float:
    """Each step of SAM's escape multiplies the gradient along the top eigenvector by |1 - lr λ (1 +
    rho λ/|g|)|, with the |g| of that step: error of these exponents over that of the best constant
    one, at the radius where it is largest"""
    return max(_step_by_step(runs, run) for run in runs_of(runs, "sam"))


@claim(OUR_ZHOU, 0.5, 2.0, domain="positive")
def foretold(runs: SeedRuns) -> float:
    """The second-order model of the loss at the switch predicts how far both rules escape: gradient
    along the top eigenvector at the end of the escape, measured over predicted, at the setting
    where it is farthest from 1"""
    ratios = []
    for rule in ("sam", "unnormalized"):
        on_network, on_model = (runs_of(runs, rule, loss=loss) for loss in ("network", "quadratic"))
        for run, model in zip(on_network, on_model, strict=True):
            end = len(rise(run)) - 1
            ratios.append(float(np.abs(run["along"][end] / model["along"][end])))
    return farthest_from_one(ratios)


@claim(FACTOR, high=0.2, domain="positive")
def falls(runs: SeedRuns) -> float:
    """After SAM's escape the loss falls fast: steps until nine tenths of the rise are gone, over
    the steps before the switch, at the radius where it is largest"""
    return max(_fall(runs, run) for run in runs_of(runs, "sam"))


@claim(OUR_ZHOU, high=1.25, domain="positive")
def back(runs: SeedRuns) -> float:
    """After SAM's escape the loss returns to its value at the switch: final loss over the loss at
    the switch, at the radius where it is largest"""
    return max(map(_final_loss, runs_of(runs, "sam")))


@claim(OUR_ZHOU, high=1.25, domain="positive")
def unnormalized_back(runs: SeedRuns) -> float:
    """Under the unnormalised rule, whose perturbation shrinks with the gradient, the loss returns
    to its value at the switch: final loss over the loss at the switch, at the radius where it is
    largest"""
    return max(map(_final_loss, runs_of(runs, "unnormalized")))


@claim(ABSTRACT, high=0.8, domain="positive")
def flatter(runs: SeedRuns) -> float:
    """SAM ends flatter than gradient descent after as many steps: final sharpness, SAM's over
    gradient descent's, at the radius where it is largest"""
    return _flatter(runs, "full")


@claim(OUR_ZHOU, 0.9, 1.1, domain="positive")
def at_its_edge(runs: SeedRuns) -> float:
    """The unnormalised rule ends at its own edge of linear stability: final sharpness over that
    edge, at the radius where it is farthest from 1"""
    lr = learning_rate(runs.config)
    return farthest_from_one(
        _final(run, "sharpness") / sam_edge(lr, run.settings["rho"], 1.0)
        for run in runs_of(runs, "unnormalized")
    )


@claim(OUR_ZHOU, high=1.0, domain="positive")
def exponential_sharpness(runs: SeedRuns) -> float:
    """After SAM's escape the sharpness settles exponentially rather than by a power law: residual
    of the exponential over that of the power law, at the radius where it is largest"""
    return max(_exponential_over_power(run, "sharpness") for run in runs_of(runs, "sam"))


@claim(ZHOU, high=1.0, domain="positive")
def exponential_loss(runs: SeedRuns) -> float:
    """After SAM's escape the training loss settles exponentially rather than by a power law:
    residual of the exponential over that of the power law, at the radius where it is largest"""
    return max(_exponential_over_power(run, "typical") for run in runs_of(runs, "sam"))


@claim(ZHOU, low=2.0, domain="positive")
def minibatch_escapes(runs: SeedRuns) -> float:
    """With minibatches too, the training loss rises after the switch from SGD to SAM: highest loss
    over that of SGD that goes on, at the radius where it is smallest"""
    descent = runs_of(runs, "descent", "minibatch")[0]["highest"].max()
    rises = [run["highest"].max() / descent for run in runs_of(runs, "sam", "minibatch")]
    return float(min(rises))


@claim(CONTROL, 0.75, 1.5)
def minibatch_rate(runs: SeedRuns) -> float:
    """With minibatches, the unnormalised rule escapes at the rate that linear stability predicts
    without their noise: fitted exponent over predicted exponent, at the radius where it is farthest
    from 1"""
    return farthest_from_one(
        _over_predicted(runs, run) for run in runs_of(runs, "unnormalized", "minibatch")
    )


@claim(ZHOU, high=0.8, domain="positive")
def minibatch_flatter(runs: SeedRuns) -> float:
    """With minibatches too, SAM ends flatter than SGD that goes on: final sharpness, SAM's over
    SGD's, at the radius where it is largest"""
    return _flatter(runs, "minibatch")


@claim(CONTROL, low=10.0, domain="positive")
def ascent_climbs(runs: SeedRuns) -> float:
    """A loop that does not restore the weights after SAM's ascent climbs, and is not SAM: its loss
    over SAM's after as many steps of the same radius"""
    ascent, beside = (runs_of(runs, rule)[0] for rule in ("ascent", "sam"))
    at = int(np.flatnonzero(beside["step"] == ascent["step"][-1])[0])
    return float(ascent["loss"][-1] / beside["loss"][at])


CLAIMS = [
    sam_escapes,
    controls_stay,
    unnormalized_rate,
    unnormalized_exponential,
    normalized_exponential,
    step_by_step,
    foretold,
    falls,
    back,
    unnormalized_back,
    flatter,
    at_its_edge,
    exponential_sharpness,
    exponential_loss,
    minibatch_escapes,
    minibatch_rate,
    minibatch_flatter,
    ascent_climbs,
]

EXPERIMENT = Experiment(
    name="escape",
    title="Late SAM: the escape from the solution of gradient descent, and where it ends",
    source="Zhou et al. 2025 (arXiv:2410.10373), the two phases of late SAM",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
