r"""Does a smooth flow say where SAM goes?

SAM on a whole data set soon bounces between the walls of its steepest valley. `sam_lab.flows` has a
differential equation for the centre of the bounce. It knows nothing of the run but the initial
weights, the learning rate and the radius. Three paths start from the same weights:

1. SAM itself, full batch, and its centre (w[t-1] + 2 w[t] + w[t+1]) / 4;
2. the central flow of SAM (`flows.CentralFlow`), which predicts the centre, the size of the bounce
   and the loss averaged over the walls;
3. the same equation without the bounce, the control: what the bounce does is its difference.

With the radius 0 they are gradient descent, the central flow of Cohen, Damian et al. 2024
(arXiv:2410.24206), and gradient flow; see `descent_flow`.

Four networks: data, activation and depth are combined so that each value of one meets both values
of the other two (half of a full cross). The loss is half the sum over classes of
(logit - one-hot)^2, mean over examples, as in Cohen et al. 2021; the mean image is taken off. All
is in float64.

At laptop scale two learning rates are crossed with two radii on digits, and the larger images have
one of each. The criteria on distances (three times nearer) and on the bounce (10%, after 50 steps)
were set before the first run; learning rates and radii were chosen by looking at the sharpness of
SAM's path, so that it starts below 2/lr in all seeds and bounces within the horizon. Two seeds of a
first grid had been seen whole before the learning rates of one network were lowered, since it
started above 2/lr in another seed.

At desktop scale each network has three learning rates and three radii, and twice the time. That
grid was laid out after the laptop's runs had been seen, and run once, with all claims as they were.
So for it the criteria that count as set after the first data were set before its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, flows, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.lab.claims import CONTROL, OURS, Claim, NotApplicable, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import farthest_from_one
from sam_lab.objective import Closure
from sam_lab.sam import SAM

__all__ = [
    "Config",
    "Network",
    "at_end",
    "bouncing",
    "descents",
    "nearer",
    "onset",
    "perturbed",
    "problem",
    "settled",
    "varied",
]

SPACE = 3  # top eigenvectors in whose span the bounce is measured
SETTLED = 50  # steps after which the bounce is compared: it needs some to begin


@dataclass(frozen=True)
class Network:
    """A network and what trains it.

    Attributes:
        data: the data set.
        activation: with three derivatives.
        depth: hidden layers.
        lrs, rhos: all crossed; a radius of 0 is gradient descent.
        begin: the step of SAM from whose centre the flows set out; 0 is the initial weights.
        k: directions that may bounce in the flow.
    """

    data: str
    activation: str
    depth: int
    lrs: tuple[float, ...]
    rhos: tuple[float, ...]
    begin: int = 0
    k: int = 2


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        networks: see `Network`.
        images: the (one) batch.
        width: of the hidden layers.
        steps: of SAM, to the last measurement.
        every: steps from one measurement to the next.
        substeps: Euler steps of the flow a step of SAM.
        stride: steps of SAM that the flow takes with one look at the curvature; divides `every`.
    """

    networks: tuple[Network, ...]
    images: int = 200
    width: int = 16
    steps: int = 200
    every: int = 20
    substeps: int = 2
    stride: int = 2


RHOS = (0.1, 0.2)
LAPTOP = Config(
    (
        Network("digits", "tanh", 2, (0.1, 0.2), RHOS),
        Network("digits", "gelu", 3, (0.15, 0.3), RHOS),
        Network("mnist_5k", "tanh", 3, (0.1,), (0.1,)),
        Network("mnist_5k", "gelu", 2, (0.2,), (0.1,)),
        # gradient descent, where its sharpness comes to its edge in time
        Network("digits", "gelu", 3, (0.5,), (0.0,)),
        # how much of the flow's error is the onset of the bounce, and how much its one direction
        Network("digits", "gelu", 3, (0.15,), (0.2,), begin=80),
        Network("digits", "gelu", 3, (0.15,), (0.2,), k=1),
    )
)
# The same networks with three learning rates and three radii each, for twice as long.
WIDE = (0.05, 0.1, 0.2)
DESKTOP = Config(
    (
        Network("digits", "tanh", 2, (0.1, 0.14, 0.2), WIDE),
        Network("digits", "gelu", 3, (0.15, 0.21, 0.3), WIDE),
        Network("mnist_5k", "tanh", 3, (0.05, 0.07, 0.1), WIDE),
        Network("mnist_5k", "gelu", 2, (0.1, 0.14, 0.2), WIDE),
    ),
    steps=400,
)
# More images, wider networks, a longer time, and as fine as the original: one look a step.
PAPER = replace(DESKTOP, images=1000, width=100, steps=2000, every=40, substeps=4, stride=1)


def settings(config: Config) -> list[Setting]:
    """Every network with every learning rate and radius of its own."""
    return [
        {
            "data": network.data,
            "activation": network.activation,
            "depth": network.depth,
            "lr": lr,
            "rho": rho,
            "begin": network.begin,
            "k": network.k,
        }
        for network in config.networks
        for lr in network.lrs
        for rho in network.rhos
    ]


def problem(config: Config, cell: Cell) -> tuple[nn.Module, Closure]:
    """The network, initialised from the cell's seed, and its loss over the whole data."""
    images = data.load(
        cell["data"],
        train=config.images,
        seed=cell.seed,
        device=cell.device,
        dtype=torch.float64,
    )
    x = images.x.flatten(1)
    x = x - x.mean(0)
    target = data.one_hot(images.y, images.classes).to(x)
    model = models.mlp(
        (x.shape[1], *[config.width] * cell["depth"], images.classes),
        cell["activation"],
        init="glorot",
        seed=cell.seed,
        device=cell.device,
        dtype=torch.float64,
    )
    return model, lambda: (model(x) - target).square().sum(1).mean() / 2


def run(config: Config, cell: Cell) -> Columns:
    """SAM, its central flow, and the flow without the bounce.

    Columns, all at the steps in ``step``: of SAM's centre ``sharpness`` and ``second`` (the two
    largest eigenvalues), ``centre_loss`` and ``moved`` (its distance from the initial weights); of
    SAM ``loss``, averaged as the centre is, ``bounce``, in the space of the centre's top three
    eigenvectors, and ``whole_bounce``, in all directions; of the central flow
    ``central_sharpness``, ``central_second``, ``central_loss`` (at its own centre),
    ``central_mean_loss``, ``central_bounce`` and ``central_distance`` (from SAM's centre); of the
    flow without bounce ``plain_sharpness``, ``plain_loss`` and ``plain_distance``.

    Raises:
        ValueError: the sharpness comes to 2 / lr, where SAM's flow ends.
        FloatingPointError: a path has diverged.
    """
    lr, rho, begin = cell["lr"], cell["rho"], cell["begin"]
    model, closure = problem(config, cell)
    path, losses = _descend(model, closure, lr, rho, config.steps)
    centres = flows.averaged(path)
    mean_losses = flows.averaged(losses)
    start = centres[begin - 1] if begin else path[0]
    (central_model, central), (plain_model, plain) = (
        _flow(config, cell, start, bounce) for bounce in (True, False)
    )
    centre_hessian = Hessian(closure, model.parameters())
    rows, block = Rows(), None
    for step in range(begin + config.every, config.steps + 1, config.every):
        for _ in range(config.every // config.stride):
            central.step(config.stride)
            plain.step(config.stride)
        centre, near = centres[step - 1], path[step - 1 : step + 2]
        nn.utils.vector_to_parameters(centre, model.parameters())
        pairs = centre_hessian.top(SPACE, start=block)
        block = pairs.block
        predicted, control = central.read(), plain.read()
        rows.add(
            step=step,
            sharpness=float(pairs.values[0]),
            second=float(pairs.values[1]),
            centre_loss=centre_hessian.loss(),
            moved=float((centre - path[0]).norm()),
            loss=float(mean_losses[step - 1]),
            bounce=float(flows.bounce(near, pairs.vectors)),
            whole_bounce=float(((near[0] - 2 * near[1] + near[2]) / 4).norm()),
            central_sharpness=predicted.sharpness,
            central_second=float(predicted.values[-1]),
            central_loss=predicted.loss,
            central_mean_loss=predicted.mean_loss,
            central_bounce=predicted.bounce,
            central_distance=_distance(central_model, centre),
            plain_sharpness=control.sharpness,
            plain_loss=control.loss,
            plain_distance=_distance(plain_model, centre),
        )
        cell.tick(step, config.steps)
    return rows.columns


def _flow(
    config: Config, cell: Cell, start: Tensor, bounce: bool
) -> tuple[nn.Module, flows.CentralFlow]:
    """A flow from these weights, and the model that it moves."""
    model, closure = problem(config, cell)
    # a copy: the parameters become views of the vector, and two flows must not move one memory
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    flow = flows.CentralFlow(
        closure,
        model.parameters(),
        cell["lr"],
        cell["rho"],
        bounce=bounce,
        k=cell["k"],
        substeps=config.substeps,
    )
    return model, flow


def _descend(
    model: nn.Module, closure: Closure, lr: float, rho: float, steps: int
) -> tuple[Tensor, Tensor]:
    """SAM's weights (steps + 2, P) and its losses there: one step more, for the last centre."""
    sam = SAM(torch.optim.SGD(model.parameters(), lr=lr), rho, model)
    path, losses = [], []
    for _ in range(steps + 2):
        path.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        losses.append(sam.step(closure).detach())
    return torch.stack(path), torch.stack(losses)


def _distance(model: nn.Module, centre: Tensor) -> float:
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return float((weights - centre).norm())


# --- what a run says -----------------------------------------------------------------------------


def perturbed(runs: SeedRuns) -> list[Run]:
    """The runs of SAM whose flows set out from the initial weights, with a bounce in several
    directions."""
    plain = [run for run in runs.runs if not run.settings["begin"] and run.settings["k"] > 1]
    return _some([run for run in plain if run.settings["rho"]], "SAM")


def descents(runs: SeedRuns) -> list[Run]:
    """The runs of gradient descent."""
    return _some([run for run in runs.runs if not run.settings["rho"]], "gradient descent")


def varied(runs: SeedRuns) -> tuple[Run, Run, Run]:
    """Three runs of one setting of SAM: with the flow from the initial weights; from a later
    centre; and from the initial weights with a bounce in one direction alone."""
    (later,) = _some([run for run in runs.runs if run.settings["begin"]], "a later start")
    same = {**later.settings, "begin": 0}
    return runs.one(**same), later, runs.one(**{**same, "k": 1})


def _some(found: list[Run], of: str) -> list[Run]:
    if not found:
        raise NotApplicable(f"no run of {of} is among these")
    return found


def nearer(run: Run) -> float:
    """How many times as far from the centre the flow without the bounce ends as the central one."""
    return float(run["plain_distance"][-1] / run["central_distance"][-1])


def settled(run: Run) -> np.ndarray:
    """Measured over predicted bounce in the top three directions, at the measurements `SETTLED`
    steps or more after the first at which the flow bounces; empty where there are none. Infinite
    where the flow has come to rest again and the centre has not."""
    predicted, step = run["central_bounce"], run["step"]
    if not predicted.any():
        return np.array([])
    late = step >= step[np.flatnonzero(predicted)[0]] + SETTLED
    with np.errstate(divide="ignore"):
        found: np.ndarray = run["bounce"][late] / predicted[late]
    return found


def onset(run: Run) -> float:
    """The step of the first measurement at which SAM bounces, at least half as widely as the flow;
    infinite if there is none."""
    predicted = run["central_bounce"]
    there = (predicted > 0) & (run["whole_bounce"] >= predicted / 2)
    return float(run["step"][np.argmax(there)]) if there.any() else np.inf


def bounces_long(run: Run) -> bool:
    """Whether SAM has bounced for `SETTLED` steps or more at the end."""
    return bool(run["step"][-1] - onset(run) >= SETTLED)


def bouncing(runs: SeedRuns) -> list[Run]:
    """The runs of SAM in which it has bounced for `SETTLED` steps or more at the end."""
    found = [run for run in perturbed(runs) if bounces_long(run)]
    return _some(found, "SAM that bounces for long enough")


def _settled(runs: Iterable[Run]) -> list[np.ndarray]:
    found = [ratios for ratios in map(settled, runs) if len(ratios)]
    if not found:
        raise NotApplicable("the flow does not bounce for long enough")
    return found


def at_end(run: Run, name: str, other: str) -> float:
    """The quotient of two columns at the last measurement."""
    return float(run[name][-1] / run[other][-1])


# --- what the runs decide ------------------------------------------------------------------------


@claim(OURS, low=3.0, domain="positive", headline=True)
def sam_follows_its_central_flow(runs: SeedRuns) -> float:
    """The centre of SAM's path stays at least three times nearer to SAM's central flow than to the
    same flow without the bounce: quotient of the two distances after all steps, at the setting
    where it is smallest"""
    return min(nearer(run) for run in perturbed(runs))


@claim(OURS, low=3.0, domain="positive", set_after=True)
def sam_follows_its_central_flow_once_it_bounces(runs: SeedRuns) -> float:
    """Where SAM has bounced for 50 steps or more at the end, the centre of its path is at least
    three times nearer to SAM's central flow than to the same flow without the bounce: quotient of
    the two distances after all steps, at the setting where it is smallest"""
    return min(nearer(run) for run in bouncing(runs))


@claim(OURS, low=3.0, domain="positive", set_after=True, headline=True)
def sam_follows_its_central_flow_on_the_whole(runs: SeedRuns) -> float:
    """Where SAM has bounced for 50 steps or more at the end, the centre of its path is on the whole
    at least three times nearer to SAM's central flow than to the same flow without the bounce:
    quotient of the two distances after all steps, geometric mean over settings"""
    return float(np.exp(np.mean([np.log(nearer(run)) for run in bouncing(runs)])))


@claim(OURS, low=20.0, unit="steps", set_after=True)
def bounce_begins_late(runs: SeedRuns) -> float:
    """SAM begins to bounce later than its central flow, since a deviation of nearly zero must grow
    first: steps between the two, at the setting where they are most; where SAM has not begun, those
    to the end"""
    delays = []
    for run in perturbed(runs):
        if run["central_bounce"].any():
            begins = float(run["step"][np.flatnonzero(run["central_bounce"])[0]])
            delays.append(min(onset(run), float(run["step"][-1])) - begins)
    if not delays:
        raise NotApplicable("the flow does not bounce")
    return max(delays)


@claim(OURS, 0.9, 1.1, domain="positive")
def bounce_is_predicted(runs: SeedRuns) -> float:
    """SAM's central flow predicts the size of SAM's bounce within 10%, once it has bounced for 50
    steps: measured over predicted size in the space of the top three eigenvectors, at the setting
    and the step where it is farthest from 1"""
    return farthest_from_one(ratio for ratios in _settled(perturbed(runs)) for ratio in ratios)


@claim(OURS, 0.9, 1.1, domain="positive")
def bounce_is_predicted_on_the_whole(runs: SeedRuns) -> float:
    """SAM's central flow predicts the size of SAM's bounce within 10% for most of the time, once it
    has bounced for 50 steps: measured over predicted size in the space of the top three
    eigenvectors, median over steps, at the setting where it is farthest from 1"""
    return farthest_from_one(float(np.median(each)) for each in _settled(perturbed(runs)))


def _swings(run: Run) -> np.ndarray:
    """Measured over predicted bounce in all directions, from `SETTLED` steps after SAM's onset."""
    late = run["step"] >= onset(run) + SETTLED
    found: np.ndarray = run["whole_bounce"][late] / run["central_bounce"][late]
    return found


@claim(OURS, 0.9, 1.1, domain="positive", set_after=True, headline=True)
def bounce_in_all_directions_is_predicted(runs: SeedRuns) -> float:
    """Once SAM has bounced for 50 steps, its central flow predicts the size of the bounce in all
    directions within 10%: measured over predicted size, median over settings and steps"""
    return float(np.median(np.concatenate([_swings(run) for run in bouncing(runs)])))


@claim(OURS, 0.9, 1.1, domain="positive", set_after=True)
def bounce_in_all_directions_is_predicted_everywhere(runs: SeedRuns) -> float:
    """Once SAM has bounced for 50 steps, its central flow predicts the size of the bounce in all
    directions within 10% at every setting: measured over predicted size, median over steps, at the
    setting where it is farthest from 1"""
    return farthest_from_one(float(np.median(_swings(run))) for run in bouncing(runs))


@claim(OURS, 0.9, 1.1, domain="positive")
def sharpness_is_predicted(runs: SeedRuns) -> float:
    """SAM's central flow predicts the sharpness of SAM's averaged weights within 10%: measured over
    predicted after all steps, at the setting where it is farthest from 1"""
    return farthest_from_one(
        at_end(run, "sharpness", "central_sharpness") for run in perturbed(runs)
    )


@claim(CONTROL, low=1.1, domain="positive")
def flow_without_bounce_is_sharper(runs: SeedRuns) -> float:
    """Without the bounce the same flow ends sharper than SAM's averaged weights, after as many
    steps: quotient of the two, at the setting where it is smallest"""
    return min(at_end(run, "plain_sharpness", "sharpness") for run in perturbed(runs))


@claim(CONTROL, low=1.05, domain="positive", set_after=True)
def flow_without_bounce_is_sharper_where_sam_bounces(runs: SeedRuns) -> float:
    """Where SAM has bounced for 50 steps or more at the end, the same flow without the bounce ends
    at least 5% sharper than SAM's averaged weights, after as many steps: quotient of the two, at
    the setting where it is smallest"""
    return min(at_end(run, "plain_sharpness", "sharpness") for run in bouncing(runs))


@claim(OURS, 0.95, 1.05, domain="positive")
def loss_is_predicted(runs: SeedRuns) -> float:
    """The loss at SAM's iterate, averaged over the walls, is within 5% of what its central flow
    predicts, the loss at the flow's centre and half the trace of H X: quotient after all steps, at
    the setting where it is farthest from 1"""
    return farthest_from_one(at_end(run, "loss", "central_mean_loss") for run in perturbed(runs))


@claim(OURS, low=3.0, domain="positive")
def flow_from_a_later_centre_is_followed(runs: SeedRuns) -> float:
    """Where the flows set out from SAM's centre after 80 steps, when it bounces, the centre of
    SAM's path ends at least three times nearer to SAM's central flow than to the same flow without
    the bounce: quotient of the two distances, GELU network on digits"""
    return nearer(varied(runs)[1])


@claim(OURS, high=1.0, domain="positive")
def matrix_is_nearer_than_one_direction(runs: SeedRuns) -> float:
    """SAM's central flow with a bounce in two directions ends nearer to the centre of SAM's path
    than the flow with a bounce in one: quotient of the two distances, GELU network on digits"""
    both, _, one = varied(runs)
    return float(both["central_distance"][-1] / one["central_distance"][-1])


@claim(OURS, low=1.1, domain="positive", set_after=True)
def descent_passes_its_edge_before_it_bounces(runs: SeedRuns) -> float:
    """Gradient descent, which starts below 2/lr, passes it by a tenth or more before it bounces,
    while its central flow is held there: the largest sharpness of its averaged weights over 2/lr,
    at the setting where it is smallest"""
    return min(float(run["sharpness"].max() * run.settings["lr"]) / 2 for run in descents(runs))


def _by_activation(one: Claim) -> list[Claim]:
    """The claim on the networks of each activation."""
    return [
        replace(one, headline=False).under(
            activation, f"With {name} networks: ", activation=activation
        )
        for activation, name in (("tanh", "tanh"), ("gelu", "GELU"))
    ]


CLAIMS = [
    sam_follows_its_central_flow,
    *_by_activation(sam_follows_its_central_flow),
    sam_follows_its_central_flow_once_it_bounces,
    sam_follows_its_central_flow_on_the_whole,
    bounce_begins_late,
    bounce_is_predicted,
    *_by_activation(bounce_is_predicted),
    bounce_is_predicted_on_the_whole,
    bounce_in_all_directions_is_predicted,
    bounce_in_all_directions_is_predicted_everywhere,
    sharpness_is_predicted,
    loss_is_predicted,
    flow_without_bounce_is_sharper,
    flow_without_bounce_is_sharper_where_sam_bounces,
    flow_from_a_later_centre_is_followed,
    matrix_is_nearer_than_one_direction,
    descent_passes_its_edge_before_it_bounces,
]

EXPERIMENT = Experiment(
    name="central_flow",
    title="A differential equation for the centre of SAM's bounce, against SAM",
    source="derived here, after Cohen, Damian et al. 2024 (arXiv:2410.24206)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
