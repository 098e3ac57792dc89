r"""What the ascent of SAM buys: curvature, test error, and at which price.

Five studies:

- ``training``: minibatch training, SAM beside SGD and its controls; see `methods`.
- ``linearisation``: what the first-order solution of the inner maximisation misses, along a run of
  SGD and one of SAM.
- ``one_step``: what one step of SAM does to the gradient norm and the sharpness that one step of
  gradient descent from the same weights does not.
- ``drift``: full-batch SAM let loose where gradient descent is at its edge of stability.
- ``rescaling``: the layers of a ReLU network scaled by a and 1/a, as SAM and as ASAM see them.

Loss and networks are those of `methods`, except for the last study's network.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data
from sam_lab.curvature import Hessian
from sam_lab.experiments.edge.edge_of_stability import loss_and_gradient, move
from sam_lab.experiments.edge.measuring_sharpness import network, once, rescale
from sam_lab.experiments.lab.claims import Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.sam import methods
from sam_lab.experiments.sam.methods import PROBES, build, epochs, load, measured_loss
from sam_lab.objective import Closure, Objective
from sam_lab.perturbations import Rule, asam, sam
from sam_lab.sam import SAM
from sam_lab.training import descend, squared_error

__all__ = [
    "CLAIMS",
    "EXPERIMENT",
    "PRESETS",
    "STUDIES",
    "Config",
    "ascend",
    "drift",
    "linearisation",
    "moved",
    "one_step",
    "predicted_change",
    "rescaling",
    "sharpness_gradient",
]


@dataclass(frozen=True)
class Config(methods.Task):
    """What is trained (see `methods.Task`), and how much of it is studied.

    The studies other than ``training`` take the loss on the first `measured` training images.

    Attributes:
        checkpoints: epochs at which the inner maximisation is studied.
        radii: radii of that study, `rho` among them.
        ascent: steps of projected gradient ascent from each start.
        draws: random perturbations to average over.
        gd_checkpoints: steps of full-batch gradient descent at which single steps are studied.
        step_lrs, step_radii: learning rates and radii of those single steps.
        drift_steps, drift_every: length of the paths from the last of these checkpoints, and steps
            from one measurement to the next.
        relu_lr, relu_steps: training of the ReLU network that is rescaled.
        factors: the scales a of a layer.
    """

    checkpoints: tuple[int, ...] = (1, 10, 40)
    radii: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    ascent: int = 20
    draws: int = 32
    gd_checkpoints: tuple[int, ...] = (50, 100, 200, 300)
    step_lrs: tuple[float, ...] = (0.001, 0.01, 0.1)
    step_radii: tuple[float, ...] = (0.001, 0.1)
    drift_steps: int = 60
    drift_every: int = 4
    relu_lr: float = 0.1
    relu_steps: int = 200
    factors: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        **methods.PAPER,
        checkpoints=(1, 10, 50, 100),
        ascent=50,
        gd_checkpoints=(200, 500, 1000, 2000),
        drift_steps=200,
        drift_every=10,
        relu_lr=0.01,
        relu_steps=2000,
    ),
}


# --- what the studies share ----------------------------------------------------------------------


@contextmanager
def moved(params: Sequence[Tensor], offset: Tensor) -> Iterator[None]:
    """Parameters displaced by the flat vector `offset` (P,) inside, and as before afterwards."""
    saved = [p.detach().clone() for p in params]
    try:
        move(params, offset)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)


def ascend(
    closure: Closure, params: Sequence[Tensor], radius: float, start: Tensor, steps: int
) -> tuple[float, Tensor]:
    """Projected gradient ascent on the loss over the ball of this radius around the weights.

    Each step is as long as the radius, along the gradient, and is followed by the projection onto
    the ball; a point that no step moves is one where gradient and perturbation are parallel, as in
    a maximum on the sphere.

    Args:
        start: direction (P,) of the first point, which lies on the sphere.
        steps: how many steps to take.

    Returns:
        The largest loss met, the first point's included, and where it was met, as an offset (P,).
    """
    offset = radius * start / start.norm()
    best = (-math.inf, offset)
    for step in range(steps + 1):
        with moved(params, offset):
            loss, gradient = loss_and_gradient(closure, params)
        if loss > best[0]:
            best = loss, offset
        if step < steps:
            offset = offset + radius * gradient / gradient.norm()
            offset = offset * (radius / offset.norm()).clamp(max=1)
    return best


def sharpness_gradient(closure: Closure, params: Sequence[Tensor], v: Tensor) -> Tensor:
    """The gradient (P,) of the sharpness, for its unit eigenvector v (P,).

    That of v.Hv with v held fixed, by differentiating the loss three times. While the largest
    eigenvalue is a simple one, v's own change contributes nothing.
    """
    params = list(params)
    parts = Objective(closure, params, None).unflatten(v)

    def along(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([(t * part).sum() for t, part in zip(tensors, parts, strict=True)]).sum()

    slope = along(torch.autograd.grad(closure(), params, create_graph=True))
    bend = along(torch.autograd.grad(slope, params, create_graph=True, materialize_grads=True))
    third = torch.autograd.grad(bend, params, materialize_grads=True)
    return torch.cat([part.flatten() for part in third])


# --- linearisation -------------------------------------------------------------------------------


def linearised(config: Config) -> list[Setting]:
    """A run of SGD and one of SAM."""
    return [{"method": "sgd", "rho": 0.0}, {"method": "sam", "rho": config.rho}]


def linearisation(config: Config, cell: Cell) -> Columns:
    """What the first-order solution of the inner maximisation finds, and misses.

    One row a checkpoint and radius. All increases are of the loss on the images measured:

    - ``first``: of the first-order solution, along the gradient;
    - ``best``: the largest that projected gradient ascent finds from four starts (the gradient,
      the top eigenvector and its opposite, a random direction). A lower bound of the maximum;
    - ``linear``, ``quadratic``: what Taylor's polynomials predict for the first-order solution;
    - ``random``: mean over `config.draws` random perturbations; ``random_quadratic`` what the
      trace predicts for it, radius² trace / 2P; ``alignment`` the root mean square of the cosine
      between them and the gradient, times √P.

    ``penalty_error`` compares the gradient g' that SAM steps with to g + radius H g/|g|, which is
    the gradient of the loss with the penalty radius |g|: |g' - that| over |g' - g|.
    """
    dataset, rows = load(config, cell.seed, cell.device), Rows()
    for epoch, model in epochs(config, dataset, cell["method"], cell["rho"], cell.seed):
        if epoch in config.checkpoints:
            for row in _inner_problem(config, dataset, model, cell.seed):
                rows.add(epoch=epoch, **row)
        cell.tick(epoch, config.epochs)
    return rows.columns


def _inner_problem(
    config: Config, dataset: data.Dataset, model: nn.Module, seed: int
) -> Iterator[dict[str, float]]:
    """What a checkpoint holds, a row a radius."""
    params = list(model.parameters())
    closure = measured_loss(config, dataset, model)
    H = Hessian(closure, params)
    loss, g = loss_and_gradient(closure, params)
    size = g.norm()
    ahead = g / size
    image = H @ ahead
    pairs = H.top(max_hvps=500)
    top = pairs.vectors[:, 0]
    trace = H.trace(tol=1e9, seed=seed, min_hvps=PROBES, max_hvps=PROBES).value
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(config.draws, len(g), generator=generator).to(g)
    noise = noise / noise.norm(dim=1, keepdim=True)
    for radius in config.radii:
        with moved(params, radius * ahead):
            above, looked = loss_and_gradient(closure, params)
        ascents = [
            ascend(closure, params, radius, start, config.ascent)[0]
            for start in (ahead, top, -top, noise[0])
        ]
        blind = []
        for direction in noise:
            with moved(params, radius * direction), torch.no_grad():
                blind.append(float(closure()) - loss)
        yield {
            "radius": radius,
            "loss": loss,
            "gradient": float(size),
            "sharpness": float(pairs.values[0]),
            "curvature": float(ahead @ image),
            "first": above - loss,
            "best": max(ascents) - loss,
            "linear": radius * float(size),
            "quadratic": radius * float(size) + radius**2 / 2 * float(ahead @ image),
            "random": math.fsum(blind) / len(blind),
            "random_quadratic": radius**2 * trace / (2 * len(g)),
            "alignment": math.sqrt(len(g)) * float((noise @ ahead).square().mean().sqrt()),
            "penalty_error": float((looked - g - radius * image).norm() / (looked - g).norm()),
        }


# --- one step ------------------------------------------------------------------------------------


def one_step(config: Config, cell: Cell) -> Columns:
    """One full-batch step of SAM beside one of gradient descent, from the same weights.

    One row a checkpoint of gradient descent, learning rate and radius, all in float64. ``norm``
    and ``sharpness`` are the gradient's norm and the sharpness before the step, ``gd_norm`` and
    ``gd_sharpness`` those after the step of gradient descent, and ``norm_change`` and
    ``sharpness_change`` what SAM's step adds to these. (Differences, since the digits of a stored
    number would not be enough for them.) To first order in learning rate and radius theory says
    ``norm_predicted`` = -lr radius |H g/|g||² and ``sharpness_predicted`` =
    -lr radius (H g/|g|) . ∇λ1. ``alignment`` is the cosine between gradient and top eigenvector.
    """
    dataset = load(config, cell.seed, cell.device)
    model = build(config, dataset.x, cell.seed)
    closure, params = measured_loss(config, dataset, model), list(model.parameters())
    wide = dataclasses.replace(dataset, x=dataset.x[: config.measured].double())
    rows, done = Rows(), 0
    for count, step in enumerate(config.gd_checkpoints, 1):
        descend(closure, params, config.lr, step - done)
        done = step
        double = copy.deepcopy(model).double()
        for row in _single_steps(config, double, measured_loss(config, wide, double)):
            rows.add(step=step, **row)
        cell.tick(count, len(config.gd_checkpoints))
    return rows.columns


def _single_steps(config: Config, model: nn.Module, closure: Closure) -> Iterator[dict[str, float]]:
    """What a checkpoint holds, a row a learning rate and radius."""
    params = list(model.parameters())
    H = Hessian(closure, params)
    pairs = H.top(k=2, tol=1e-4, max_hvps=1000)
    _, g = loss_and_gradient(closure, params)
    size = g.norm()
    image = H @ (g / size)
    uphill = sharpness_gradient(closure, params, pairs.vectors[:, 0])

    def after(offset: Tensor) -> tuple[float, float]:
        with moved(params, offset):
            there = Hessian(closure, params)
            # from the eigenvectors before the step, which a small one hardly turns
            top = there.top(tol=1e-5, max_hvps=1000, start=pairs.vectors)
            return float(there.gradient().norm()), float(top.values[0])

    for lr in config.step_lrs:
        gd_norm, gd_sharpness = after(-lr * g)
        for radius in config.step_radii:
            with moved(params, radius * g / size):
                looked = loss_and_gradient(closure, params)[1]
            sam_norm, sam_sharpness = after(-lr * looked)
            yield {
                "lr": lr,
                "radius": radius,
                "norm": float(size),
                "sharpness": float(pairs.values[0]),
                "alignment": abs(float(g @ pairs.vectors[:, 0] / size)),
                "gd_norm": gd_norm,
                "norm_change": sam_norm - gd_norm,
                "norm_predicted": -lr * radius * float(image @ image),
                "gd_sharpness": gd_sharpness,
                "sharpness_change": sam_sharpness - gd_sharpness,
                "sharpness_predicted": -lr * radius * float(image @ uphill),
            }


# --- drift ---------------------------------------------------------------------------------------


def drift(config: Config, cell: Cell) -> Columns:
    """Sharpness and loss along full-batch paths that leave gradient descent at its edge.

    From the last of `config.gd_checkpoints`: gradient descent (``gd_...``) and SAM with the main
    radius (``sam_...``), with the learning rate that led there, and with half of it (``..._half``),
    for which the place is no edge.
    """
    dataset = load(config, cell.seed, cell.device)
    model = build(config, dataset.x, cell.seed)
    closure, params = measured_loss(config, dataset, model), list(model.parameters())
    descend(closure, params, config.lr, config.gd_checkpoints[-1])
    counts = range(0, config.drift_steps + 1, config.drift_every)
    columns: Columns = {"step": [float(count) for count in counts]}
    paths = {
        "gd": (0.0, config.lr),
        "sam": (config.rho, config.lr),
        "gd_half": (0.0, config.lr / 2),
        "sam_half": (config.rho, config.lr / 2),
    }
    for done, (name, (rho, lr)) in enumerate(paths.items(), 1):
        walker, rows = copy.deepcopy(model), Rows()
        closure = measured_loss(config, dataset, walker)
        stepper = SAM(torch.optim.SGD(walker.parameters(), lr=lr), rho)
        for step in range(config.drift_steps + 1):
            if step in counts:
                H = Hessian(closure, walker.parameters())
                rows.add(sharpness=float(H.top(max_hvps=500).values[0]), loss=H.loss())
            stepper.step(closure)
        columns |= {f"{name}_{what}": values for what, values in rows.columns.items()}
        cell.tick(done, len(paths))
    return columns


# --- rescaling -----------------------------------------------------------------------------------


def rescaling(config: Config, cell: Cell) -> Columns:
    """SAM and ASAM on a ReLU network whose layers are scaled by a and 1/a.

    The scaling leaves the function of the network alone. One row a factor a.

    Increases of the loss under the perturbation: ``sam``, with the main radius; ``asam``, with
    eta = 0 and all parameters adapting; ``asam_weights``, with eta = 0 where the biases do not
    adapt, which is the default of the rule. (The first layer's bias is scaled with its weights.)

    Outputs after a whole step with the learning rate `config.relu_lr`, relative to those before,
    root mean square of the change: ``step_sam``, ``step_asam``.
    """
    dataset = load(config, cell.seed, cell.device)
    x, y = dataset.x[: config.measured], dataset.y[: config.measured]
    model = network(x, (64,), "relu", 10, cell.seed)
    params = list(model.parameters())
    descend(lambda: squared_error(model(x), y), params, config.relu_lr, config.relu_steps)
    with torch.no_grad():
        outputs = model(x)
    everywhere = partial(asam, eta=0.0, adaptive=lambda p: True)
    rules: dict[str, tuple[Rule, float]] = {
        "sam": (sam, config.rho),
        "asam": (everywhere, config.asam_all_rho),
        "asam_weights": (partial(asam, eta=0.0), config.asam_rho),
    }
    rows = Rows()
    for done, factor in enumerate(config.factors, 1):
        row = {"factor": factor}
        for name, (rule, rho) in rules.items():
            scaled = rescale(model, factor)

            def closure(scaled: nn.Module = scaled) -> Tensor:
                return squared_error(scaled(x), y)

            stepper = SAM(torch.optim.SGD(scaled.parameters(), lr=config.relu_lr), rho, rule=rule)
            before = closure()
            before.backward()
            with stepper.perturbed(), torch.no_grad():
                row[name] = float(closure() - before)
            stepper.step(closure)
            if name in ("sam", "asam"):
                with torch.no_grad():
                    change = (scaled(x) - outputs).norm() / outputs.norm()
                row[f"step_{name}"] = float(change)
        rows.add(**row)
        cell.tick(done, len(config.factors))
    return rows.columns


STUDIES = Studies(
    methods.STUDY,
    Study("linearisation", linearised, linearisation),
    Study("one_step", once, one_step),
    Study("drift", once, drift),
    Study("rescaling", once, rescaling),
)


# --- what the runs decide ------------------------------------------------------------------------


def at_main_radius(runs: SeedRuns, above: str, below: str | None = None) -> float:
    """A column of the study of linearisation, or a ratio of two, at the main radius.

    Mean over checkpoints, and over the runs of SGD and of SAM.
    """
    means = []
    for run in runs.all(study="linearisation"):
        values = run[above] if below is None else run[above] / run[below]
        means.append(values[run["radius"] == runs.config["rho"]].mean())
    return fmean(means)


def order_of_error(run: Run) -> float:
    """The exponent with which ``penalty_error`` grows with the radius: mean over checkpoints."""
    slopes = []
    for epoch in np.unique(run["epoch"]):
        rows = run["epoch"] == epoch
        slopes.append(
            np.polyfit(np.log(run["radius"][rows]), np.log(run["penalty_error"][rows]), 1)[0]
        )
    return float(np.mean(slopes))


def predicted_change(run: Run, of: str) -> float:
    """What SAM's step does beyond gradient descent's, over what theory says of it.

    Median over checkpoints, at the smallest learning rate and radius.
    """
    rows = (run["lr"] == run["lr"].min()) & (run["radius"] == run["radius"].min())
    return float(np.median((run[f"{of}_change"] / run[f"{of}_predicted"])[rows]))


def over_factors(runs: SeedRuns, name: str) -> float:
    """Largest over smallest value of a column of the study of rescaling."""
    values = runs.one(study="rescaling")[name]
    return float(values.max() / values.min())


CHAPTER = Source("derived in chapter 3", "ours")
BARTLETT = Source("Bartlett, Long & Bousquet 2022 (direction; the factor is ours)", "after")


@claim(
    Source(
        "Foret et al. 2021 (approximation of the inner problem; the number is ours)",
        "after",
    ),
    low=0.9,
    domain="positive",
)
def first_order_suffices(runs: SeedRuns) -> float:
    """SAM's first-order perturbation raises the loss by at least 90% of the largest rise that
    projected gradient ascent finds in the same ball: ratio of the rises, mean over checkpoints"""
    return at_main_radius(runs, "first", "best")


@claim(methods.QUESTION, high=0.5, domain="positive")
def linear_value_is_wrong(runs: SeedRuns) -> float:
    """The linear approximation predicts at most half of the rise of the loss under SAM's
    perturbation: predicted over measured rise, mean over checkpoints"""
    return at_main_radius(runs, "linear", "first")


@claim(Source("Taylor's formula; the tolerance is ours", "ours"), 0.9, 1.1, domain="positive")
def quadratic_value_is_right(runs: SeedRuns) -> float:
    """With the curvature along the gradient added, Taylor's formula predicts the rise of the
    loss under SAM's perturbation: predicted over measured rise, mean over checkpoints"""
    return at_main_radius(runs, "quadratic", "first")


@claim(CHAPTER, 0.8, 1.2)
def sam_is_a_gradient_penalty(runs: SeedRuns) -> float:
    """SAM's gradient is that of the loss with the penalty ρ|∇L|, up to a relative error that
    falls linearly with ρ: exponent of ρ in that error"""
    return fmean(order_of_error(run) for run in runs.all(study="linearisation"))


@claim(CHAPTER, 0.8, 1.25, domain="positive")
def noise_is_blind(runs: SeedRuns) -> float:
    """The component of a random unit vector along the gradient is 1/√P in P dimensions: root
    mean square of the cosine, times √P"""
    return at_main_radius(runs, "alignment")


@claim(methods.CHAPTER_CONTROL, high=0.01)
def noise_hardly_rises(runs: SeedRuns) -> float:
    """A random perturbation raises the loss by at most 1% of what SAM's perturbation of the
    same length does: ratio of the rises, mean over checkpoints"""
    return at_main_radius(runs, "random", "first")


@claim(CHAPTER, 0.9, 1.1)
def step_lowers_gradient_norm(runs: SeedRuns) -> float:
    """One step of SAM lowers the gradient norm by lr ρ |H g/|g||² more than one step of
    gradient descent does: measured over predicted difference, median of checkpoints"""
    return predicted_change(runs.one(study="one_step"), "norm")


@claim(CHAPTER, 0.9, 1.1)
def step_changes_sharpness(runs: SeedRuns) -> float:
    """One step of SAM changes the sharpness by -lr ρ (H g/|g|)·∇λ1 more than one step of
    gradient descent does: measured over predicted difference, median of checkpoints"""
    return predicted_change(runs.one(study="one_step"), "sharpness")


@claim(BARTLETT, high=0.9, headline=True, domain="positive")
def sam_leaves_the_edge(runs: SeedRuns) -> float:
    """SAM that starts where gradient descent is at its edge of stability, with the same
    learning rate, moves to flatter places: its final sharpness over that of gradient descent
    from the same weights"""
    run = runs.one(study="drift")
    return float(run["sam_sharpness"][-1] / run["gd_sharpness"][-1])


@claim(BARTLETT, high=0.9, domain="positive")
def drift_needs_no_edge(runs: SeedRuns) -> float:
    """SAM moves to flatter places also at half the learning rate, for which gradient descent is
    far from its edge: its final sharpness over that of gradient descent from the same weights"""
    run = runs.one(study="drift")
    return float(run["sam_half_sharpness"][-1] / run["gd_half_sharpness"][-1])


@claim(
    Source("Dinh et al. 2017; Kwon et al. 2021; the factor is ours", "after"),
    low=2.0,
    domain="positive",
)
def sam_sees_the_scaling(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a changes the
    rise of the loss under SAM's perturbation at least twofold: largest over smallest rise"""
    return over_factors(runs, "sam")


@claim(Source("Kwon et al. 2021", "after"), high=1.001, domain="positive")
def asam_does_not(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a leaves the
    rise of the loss under ASAM's perturbation unchanged, with η = 0 and all parameters
    adapting: largest over smallest rise"""
    return over_factors(runs, "asam")


@claim(methods.QUESTION, low=2.0, domain="positive")
def fixed_biases_lose_it(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a changes the
    rise of the loss under ASAM's perturbation at least twofold if the biases do not adapt:
    largest over smallest rise"""
    return over_factors(runs, "asam_weights")


@claim(methods.QUESTION, low=2.0, domain="positive")
def asam_steps_do(runs: SeedRuns) -> float:
    """Multiplying the first layer of a ReLU network by a and dividing the last by a changes
    what a whole step of ASAM does to the outputs at least twofold, even with all parameters
    adapting: largest over smallest change"""
    return over_factors(runs, "step_asam")


CLAIMS = [
    *methods.CLAIMS,
    first_order_suffices,
    linear_value_is_wrong,
    quadratic_value_is_right,
    sam_is_a_gradient_penalty,
    noise_is_blind,
    noise_hardly_rises,
    step_lowers_gradient_norm,
    step_changes_sharpness,
    sam_leaves_the_edge,
    drift_needs_no_edge,
    sam_sees_the_scaling,
    asam_does_not,
    fixed_biases_lose_it,
    asam_steps_do,
]

EXPERIMENT = Experiment(
    name="sharpness_aware",
    title="What the ascent of SAM buys",
    source="Foret et al. 2021; Kwon et al. 2021; Bartlett, Long & Bousquet 2022",
    presets=PRESETS,
    settings=STUDIES.settings,
    run=STUDIES.run,
    claims=CLAIMS,
)
