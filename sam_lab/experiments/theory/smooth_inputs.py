r"""Does the noise of minibatches make a network smooth in its inputs?

Ma & Ying (2021) derive from the linear stability of SGD that networks found by it are smooth in
their inputs. The path, in the form used here: stability bounds the trace of the Gauss-Newton
matrix, which is the mean squared gradient of the output in the weights; those of the first layer
bound the gradient in the inputs (`gauss_newton.input_gradient_bound`).

The network and its runs are those of `noisy_edge`: all examples, minibatches, and the control, all
examples with a noise as long as that of the small batches and without its shape. They are compared
at equal training loss, and end when it is half of that. The criteria were set before the first run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.theory import noisy_edge
from sam_lab.experiments.theory.noisy_edge import LEVEL, at_level
from sam_lab.gauss_newton import input_gradient_bound, jacobian

MA_YING = Source("Ma & Ying 2021", "after")
DERIVED = Source("derived here", "ours")


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        task: network, data, learning rate, batch sizes; `time` is how long a run may be.
        every: time from one measurement to the next.
    """

    task: noisy_edge.Config
    every: float = 10.0


LAPTOP = Config(noisy_edge.LAPTOP)
PAPER = Config(noisy_edge.PAPER)


def settings(config: Config) -> list[Setting]:
    """All examples, the small batches, and the noise without their shape."""
    task = config.task
    small, _, full = task.batches
    plain = {"lr": task.lr, "rho": 0.0}
    return [
        {**plain, "batch": full, "noise": "minibatch"},
        {**plain, "batch": small, "noise": "minibatch"},
        {**plain, "batch": small, "noise": "isotropic"},
    ]


def run(config: Config, cell: Cell) -> Columns:
    """One run, until its training loss is half of the level at which runs are compared.

    Columns: ``time``, ``loss``; ``trace``, of the Gauss-Newton matrix; ``input_gradient`` and its
    ``bound``, root mean squares over the examples of the norms.
    """
    model, x, y = noisy_edge.network_problem(config.task, cell.seed, cell.device)
    params = [p.detach() for p in model.parameters()]
    order = torch.Generator().manual_seed(10 * cell.seed + 1)
    rows = Rows()
    every, steps = (round(time / cell["lr"]) for time in (config.every, config.task.time))
    for step in range(steps + 1):
        if step % every == 0:
            inputs = x.clone().requires_grad_()
            outputs = model(inputs)[:, 0]
            (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
            J = jacobian(model, x)
            first = J[:, : params[0].numel()].unflatten(1, params[0].shape)
            bound = input_gradient_bound(params[0], first, x)
            loss = 0.5 * float((outputs.detach() - y).square().mean())
            rows.add(
                time=cell["lr"] * step,
                loss=loss,
                trace=float(J.square().sum()) / len(x),
                input_gradient=math.sqrt(float(slopes.square().sum()) / len(x)),
                bound=math.sqrt(float(bound.square().mean())),
            )
            cell.tick(step, steps)
            if loss <= LEVEL / 2:
                break
        noisy_edge.take_step(params, x, y, cell.setting, order)
    return rows.columns


# --- what the runs decide -------------------------------------------------------------------------


def _runs(runs: SeedRuns) -> tuple[Run, Run, Run]:
    small, _, full = runs.config["task"]["batches"]
    plain = runs.all(noise="minibatch")
    by_batch = {run.settings["batch"]: run for run in plain}
    return by_batch[full], by_batch[small], runs.one(noise="isotropic")


@claim(MA_YING, high=0.8, domain="positive")
def minibatches_are_smoother(runs: SeedRuns) -> float:
    """Small batches make the network smoother in its inputs at equal training loss: root mean
    square of the output's gradient in the inputs, with the smallest batch over that with all
    examples"""
    full, small, _ = _runs(runs)
    return at_level(small, LEVEL, "input_gradient") / at_level(full, LEVEL, "input_gradient")


@claim(CONTROL, low=1.2, domain="positive")
def shapeless_noise_is_not_smoother(runs: SeedRuns) -> float:
    """Noise as long as that of small batches, but without its shape, makes the network less smooth
    in its inputs than small batches do, at equal training loss: root mean square of the output's
    gradient in the inputs, with this noise over that with small batches"""
    _, small, control = _runs(runs)
    return at_level(control, LEVEL, "input_gradient") / at_level(small, LEVEL, "input_gradient")


@claim(MA_YING, high=0.8, domain="positive")
def minibatches_have_a_smaller_trace(runs: SeedRuns) -> float:
    """Small batches make the trace of the Gauss-Newton matrix smaller at equal training loss: with
    the smallest batch over that with all examples"""
    full, small, _ = _runs(runs)
    return at_level(small, LEVEL, "trace") / at_level(full, LEVEL, "trace")


@claim(DERIVED, low=1.0, domain="positive")
def first_layer_bounds_the_inputs(runs: SeedRuns) -> float:
    """The first layer bounds the gradient in the inputs: bound over root mean square of the
    gradient, at the run and measurement where it is smallest"""
    return min(float((run["bound"] / run["input_gradient"]).min()) for run in runs.runs)


EXPERIMENT = Experiment(
    name="smooth_inputs",
    title="The noise of minibatches and the smoothness in the inputs",
    source="Ma & Ying 2021 (arXiv:2105.13462); the bound's form is derived here",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        minibatches_are_smoother,
        shapeless_noise_is_not_smoother,
        minibatches_have_a_smaller_trace,
        first_layer_bounds_the_inputs,
    ],
)
