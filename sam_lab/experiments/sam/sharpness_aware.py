r"""What the ascent of SAM buys: curvature, test error, and at which price.

Five studies:

- ``training``: minibatch training, SAM beside plain SGD, beside random perturbations as long or
  many times longer, and with perturbations made for parts of each batch (m-sharpness). Within a
  seed all methods share initial weights, batches and their order.
- ``linearisation``: what the first-order solution of the inner maximisation misses, along a run of
  SGD and one of SAM.
- ``one_step``: what one step of SAM does to the gradient norm and the sharpness that one step of
  gradient descent from the same weights does not.
- ``drift``: full-batch SAM let loose where gradient descent is at its edge of stability.
- ``rescaling``: the layers of a ReLU network scaled by a and 1/a, as SAM and as ASAM see them.

Loss: half the sum of squares over outputs, mean over examples. (The curvature of cross-entropy
vanishes with the loss, whichever method made the loss small.) The networks are smooth (GELU),
except for the last study's, because the theory differentiates the loss twice and more.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.curvature import Hessian
from sam_lab.experiments.claims import Claim, Criterion
from sam_lab.experiments.core import Experiment
from sam_lab.experiments.measuring_sharpness import network, rescale
from sam_lab.experiments.result import Result
from sam_lab.objective import Closure
from sam_lab.perturbations import Rule, asam, random_direction, sam
from sam_lab.sam import SAM
from sam_lab.training import descend, squared_error

__all__ = [
    "EXPERIMENT",
    "METHODS",
    "Config",
    "Split",
    "ascend",
    "bias_share",
    "build",
    "epochs",
    "evaluate",
    "hessian",
    "load",
    "loss_and_gradient",
    "loss_on",
    "micro_norm",
    "moved",
    "sharpness_gradient",
    "train",
]

Tick = Callable[[int, int], Any]

PROBES = 64  # random vectors behind a trace

METHODS: dict[str, Rule] = {
    "sgd": sam,
    "sam": sam,
    "random": random_direction,
    "asam": asam,
    "asam_all": partial(asam, adaptive=lambda p: True),
}
"""The perturbation rule of each method; plain SGD is SAM with radius 0, bit for bit."""


@dataclass(frozen=True)
class Config:
    """What is trained and measured, and how much of it.

    Attributes:
        dataset, train: which images, and how many to train on (None: all).
        architecture: "mlp" with `widths` hidden units, or "cnn" with `widths` channels.
        activation: of all networks but those of the study of rescaling.
        lr, batch, epochs: of plain SGD, which all methods take their steps with. No momentum.
        rho: the main radius, at which most claims are decided.
        rhos: radii of SAM, `rho` among them.
        random_rhos: radii of the random perturbations; `rho` and 10 `rho` have to be there.
        asam_rho: radius of ASAM where only the weights adapt, which is the default of the rule.
        asam_all_rho: radius of ASAM where all parameters do.
        micros: sizes of micro-batches, descending. Each divides `batch`, which divides the training
            set: a step averages over micro-batches, and they have to be of one size.
        every: the main runs are measured each so many epochs.
        measured: sharpness, trace and gradient norm are those of the loss on the first so many
            training images; so are the full-batch studies.
        checkpoints: epochs at which the inner maximisation is studied.
        radii: radii of that study, `rho` among them.
        ascent: steps of projected gradient ascent from each start.
        draws: random perturbations to average over.
        gd_checkpoints: steps of full-batch gradient descent at which single steps are studied.
        step_lrs, step_radii: learning rates and radii of those single steps.
        drift_steps, drift_every: length of the paths from the last of these checkpoints, and how
            often they are measured.
        relu_lr, relu_steps: training of the ReLU network that is rescaled.
        factors: the scales a of a layer.
    """

    dataset: str = "mnist_5k"
    train: int | None = 4000
    architecture: str = "mlp"
    widths: tuple[int, ...] = (64, 64)
    activation: str = "gelu"
    lr: float = 0.3
    batch: int = 100
    epochs: int = 40
    rho: float = 0.1
    rhos: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    random_rhos: tuple[float, ...] = (0.1, 1.0, 2.0)
    asam_rho: float = 0.5
    asam_all_rho: float = 2.0
    micros: tuple[int, ...] = (25, 5)
    every: int = 2
    measured: int = 1000
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

    @property
    def micro_sizes(self) -> tuple[int, ...]:
        """The whole batch, and the parts of it that a perturbation is made for."""
        return (self.batch, *self.micros)


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        dataset="cifar10",
        train=None,
        architecture="cnn",
        widths=(32, 64, 128),
        lr=0.1,
        epochs=100,
        measured=5000,
        checkpoints=(1, 10, 50, 100),
        ascent=50,
        gd_checkpoints=(200, 500, 1000, 2000),
        drift_steps=200,
        drift_every=10,
        relu_lr=0.01,
        relu_steps=2000,
    ),
}


# --- what the studies and the chapter share ------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """Standardised images (N, C, H, W), float32, and labels (N,), for training and for testing.

    Both are centred and scaled by the statistics of the training images.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(config: Config, seed: int = 0, device: torch.device | str = "cpu") -> Split:
    """The data set; `seed` chooses which images train and which test."""
    sample = data.load(config.dataset, train=config.train, seed=seed, device=device)
    centre = sample.x.mean(0)
    scale = (sample.x - centre).std()
    return Split(
        (sample.x - centre) / scale, sample.y, (sample.x_test - centre) / scale, sample.y_test
    )


def build(config: Config, x: Tensor, seed: int = 0) -> nn.Sequential:
    """The network with its initial weights, for inputs like x (N, C, H, W), on their device.

    Raises:
        ValueError: an architecture other than "mlp" and "cnn".
    """
    if config.architecture == "mlp":
        return network(x, config.widths, config.activation, 10, seed)
    if config.architecture == "cnn":
        return models.cnn(
            x[0].shape, 10, config.activation, widths=config.widths, seed=seed, device=x.device
        )
    raise ValueError(f'architecture must be "mlp" or "cnn", got {config.architecture!r}')


def epochs(
    config: Config, split: Split, method: str, rho: float, seed: int = 0, micro: int | None = None
) -> Iterator[tuple[int, nn.Sequential]]:
    """Train, and yield (epoch, model) before the first epoch and after each.

    The model is the one that is trained: measure it as you like, but leave its weights alone.

    Args:
        method: a key of `METHODS`.
        rho: its radius; of no consequence for "sgd".
        seed: determines the initial weights, the batches with their order, and random directions.
        micro: perturb for parts of the batch of this size, each with its own gradient; by default
            for the batch as a whole.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    model = build(config, split.x, seed)
    stepper = SAM(
        torch.optim.SGD(model.parameters(), lr=config.lr),
        0.0 if method == "sgd" else rho,
        rule=METHODS[method],
        generator=torch.Generator().manual_seed(seed),
    )
    order = torch.Generator().manual_seed(seed)
    yield 0, model
    for epoch in range(1, config.epochs + 1):
        for batch in torch.randperm(len(split.x), generator=order).split(config.batch):
            parts = batch.split(micro or config.batch)
            stepper.step([loss_on(model, split, part) for part in parts], perturb="micro")
        yield epoch, model


def loss_on(model: nn.Module, split: Split, part: Tensor) -> Closure:
    """The loss on the training images with these indices, as a function to call."""
    part = part.to(split.x.device)
    x, y = split.x[part], split.y[part]
    return lambda: squared_error(model(x), y)


def train(
    config: Config,
    method: str,
    rho: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    micro: int | None = None,
    every: int | None = None,
    progress: Tick = lambda *_: None,
) -> dict[str, list[float]]:
    """Train with one method, and measure along the way.

    Args:
        method, rho, seed, micro: as in `epochs`.
        every: measure each so many epochs, besides the first and the last; by default
            `config.every`.
        progress: called as ``progress(epochs done, epochs in all)``.

    Returns:
        One entry a measurement: ``epoch``; ``loss`` on all training images; ``train_error`` and
        ``test_error`` in percent; ``sharpness`` (the largest eigenvalue of the Hessian) and
        ``gradient`` (norm) of the loss on the first `config.measured` training images. At the end:
        ``trace`` of that Hessian, and for each size in ``micro`` (that of the batch, then those
        of its parts) the mean norm ``micro_gradient`` of the gradients of such micro-batches;
        and `bias_share` of the perturbation (for "sgd", of SAM's).
    """
    split = load(config, seed, device)
    columns: dict[str, list[float]] = {}
    for epoch, model in epochs(config, split, method, rho, seed, micro):
        last = epoch == config.epochs
        if epoch % (every or config.every) == 0 or last:
            loss, train_error = evaluate(model, split.x, split.y)
            H = hessian(config, split, model)
            row = {
                "epoch": epoch,
                "loss": loss,
                "train_error": train_error,
                "test_error": evaluate(model, split.x_test, split.y_test)[1],
                "sharpness": float(H.top(max_hvps=500).values[0]),
                "gradient": float(H.gradient().norm()),
            }
            _append(columns, row)
        if last:
            # the same signs for every method; a tolerance that is always met fixes their number
            trace = H.trace(tol=1e9, seed=seed, min_hvps=PROBES, max_hvps=PROBES)
            columns["trace"] = [trace.value]
            columns["micro"] = list(config.micro_sizes)
            columns["micro_gradient"] = [
                micro_norm(config, split, model, size) for size in config.micro_sizes
            ]
            columns["bias_share"] = [bias_share(config, split, model, method, rho, seed)]
        progress(epoch, config.epochs)
    return columns


def hessian(config: Config, split: Split, model: nn.Module) -> Hessian:
    """The Hessian of the loss on the first `config.measured` training images."""
    return Hessian(loss_on(model, split, torch.arange(config.measured)), model.parameters())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The loss, and the error in percent, on these images; 1,000 at a time."""
    loss, wrong = 0.0, 0
    for inputs, labels in zip(x.split(1000), y.split(1000), strict=True):
        outputs = model(inputs)
        loss += float(squared_error(outputs, labels)) * len(labels)
        wrong += int((outputs.argmax(1) != labels).sum())
    return loss / len(y), 100 * wrong / len(y)


def micro_norm(config: Config, split: Split, model: nn.Module, size: int) -> float:
    """Mean norm of the gradients of micro-batches of this size, among the images measured.

    It is the rate at which the loss of a micro-batch rises along its own perturbation: to first
    order, rho times this is what SAM adds to the loss that it minimises.
    """
    params = list(model.parameters())
    parts = torch.arange(config.measured).split(size)
    norms = [loss_and_gradient(loss_on(model, split, part), params)[1].norm() for part in parts]
    return float(torch.stack(norms).mean())


def bias_share(
    config: Config, split: Split, model: nn.Module, method: str, rho: float, seed: int = 0
) -> float:
    """Share of the squared length of a method's perturbation that lies in biases.

    In parameters of one axis, that is, for the loss on the images measured.
    """
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_on(model, split, torch.arange(config.measured))(), params)
    drawing = {"generator": torch.Generator().manual_seed(seed)} if method == "random" else {}
    parts = METHODS[method](params, grads, rho or 1.0, **drawing)
    squares = [float(part.square().sum()) for part in parts]
    biases = [square for part, square in zip(parts, squares, strict=True) if part.ndim == 1]
    return math.fsum(biases) / math.fsum(squares)


def loss_and_gradient(closure: Closure, params: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The loss and its gradient as one flat vector (P,)."""
    loss = closure()
    grads = torch.autograd.grad(loss, list(params))
    return float(loss.detach()), torch.cat([g.flatten() for g in grads])


@contextmanager
def moved(params: Sequence[Tensor], offset: Tensor) -> Iterator[None]:
    """Parameters displaced by the flat vector `offset` (P,) inside, and as before afterwards."""
    saved = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, part in zip(params, _pieces(offset, params), strict=True):
                p.add_(part)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)


def _pieces(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in params])
    return [part.view_as(p) for part, p in zip(parts, params, strict=True)]


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
    parts = _pieces(v, params)

    def along(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([(t * part).sum() for t, part in zip(tensors, parts, strict=True)]).sum()

    slope = along(torch.autograd.grad(closure(), params, create_graph=True))
    bend = along(torch.autograd.grad(slope, params, create_graph=True, materialize_grads=True))
    third = torch.autograd.grad(bend, params, materialize_grads=True)
    return torch.cat([part.flatten() for part in third])


def _append(columns: dict[str, list[float]], row: Mapping[str, float]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)


# --- the studies ---------------------------------------------------------------------------------


def settings(config: Config) -> list[dict[str, Any]]:
    """The runs of the training study, then one setting for each of the other studies."""

    def training(method: str, rho: float, micro: int = config.batch) -> dict[str, Any]:
        return {"study": "training", "method": method, "rho": rho, "micro": micro}

    return [
        training("sgd", 0.0),
        *(training("sam", rho) for rho in config.rhos),
        *(training("random", rho) for rho in config.random_rhos),
        training("asam", config.asam_rho),
        training("asam_all", config.asam_all_rho),
        *(training("sam", config.rho, micro) for micro in config.micros),
        {"study": "linearisation", "method": "sgd", "rho": 0.0},
        {"study": "linearisation", "method": "sam", "rho": config.rho},
        *({"study": study} for study in ("one_step", "drift", "rescaling")),
    ]


def run(
    config: Config, setting: Mapping[str, Any], seed: int, device: torch.device, progress: Tick
) -> dict[str, list[float]]:
    """The columns of one setting."""
    study = setting["study"]
    if study == "training":
        method, rho, micro = setting["method"], setting["rho"], setting["micro"]
        main = micro == config.batch and rho in (0.0, config.rho, 10 * config.rho)
        every = config.every if main else config.epochs
        return train(config, method, rho, seed, device, micro, every, progress)
    if study == "linearisation":
        method, rho = setting["method"], setting["rho"]
        return linearisation(config, method, rho, seed, device, progress)
    single = {"one_step": one_step, "drift": drift, "rescaling": rescaling}[study]
    return single(config, seed, device, progress)


def linearisation(
    config: Config,
    method: str,
    rho: float,
    seed: int,
    device: torch.device,
    progress: Tick = lambda *_: None,
) -> dict[str, list[float]]:
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
    split = load(config, seed, device)
    columns: dict[str, list[float]] = {}
    for epoch, model in epochs(config, split, method, rho, seed):
        if epoch in config.checkpoints:
            for row in _inner_problem(config, split, model, seed):
                _append(columns, {"epoch": epoch, **row})
        progress(epoch, config.epochs)
    return columns


def _inner_problem(
    config: Config, split: Split, model: nn.Module, seed: int
) -> Iterator[dict[str, float]]:
    params = list(model.parameters())
    closure = loss_on(model, split, torch.arange(config.measured))
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
        found = [
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
            "best": max(found) - loss,
            "linear": radius * float(size),
            "quadratic": radius * float(size) + radius**2 / 2 * float(ahead @ image),
            "random": math.fsum(blind) / len(blind),
            "random_quadratic": radius**2 * trace / (2 * len(g)),
            "alignment": math.sqrt(len(g)) * float((noise @ ahead).square().mean().sqrt()),
            "penalty_error": float((looked - g - radius * image).norm() / (looked - g).norm()),
        }


def one_step(
    config: Config, seed: int, device: torch.device, progress: Tick = lambda *_: None
) -> dict[str, list[float]]:
    """One full-batch step of SAM beside one of gradient descent, from the same weights.

    One row a checkpoint of gradient descent, learning rate and radius, all in float64. ``norm``
    and ``sharpness`` are the gradient's norm and the sharpness before the step, ``gd_norm`` and
    ``gd_sharpness`` those after the step of gradient descent, and ``norm_change`` and
    ``sharpness_change`` what SAM's step adds to these. (Differences, since the digits of a stored
    number would not be enough for them.) To first order in learning rate and radius theory says
    ``norm_predicted`` = -lr radius |H g/|g||² and ``sharpness_predicted`` =
    -lr radius (H g/|g|) . ∇λ1. ``alignment`` is the cosine between gradient and top eigenvector.
    """
    split = load(config, seed, device)
    model = build(config, split.x, seed)
    few = torch.arange(config.measured)
    columns: dict[str, list[float]] = {}
    done = 0
    for count, step in enumerate(config.gd_checkpoints, 1):
        descend(loss_on(model, split, few), list(model.parameters()), config.lr, step - done)
        done = step
        double = copy.deepcopy(model).double()
        wide = dataclasses.replace(split, x=split.x[: config.measured].double())
        for row in _single_steps(config, double, loss_on(double, wide, few)):
            _append(columns, {"step": step, **row})
        progress(count, len(config.gd_checkpoints))
    return columns


def _single_steps(config: Config, model: nn.Module, closure: Closure) -> Iterator[dict[str, float]]:
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
            found = there.top(tol=1e-5, max_hvps=1000, start=pairs.vectors)
            return float(there.gradient().norm()), float(found.values[0])

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


def drift(
    config: Config, seed: int, device: torch.device, progress: Tick = lambda *_: None
) -> dict[str, list[float]]:
    """Sharpness and loss along full-batch paths that leave gradient descent at its edge.

    From the last of `config.gd_checkpoints`: gradient descent (``gd_...``) and SAM with the main
    radius (``sam_...``), with the learning rate that led there, and with half of it (``..._half``),
    for which the place is no edge.
    """
    split = load(config, seed, device)
    model = build(config, split.x, seed)
    few = torch.arange(config.measured)
    start = config.gd_checkpoints[-1]
    descend(loss_on(model, split, few), list(model.parameters()), config.lr, start)
    counts = range(0, config.drift_steps + 1, config.drift_every)
    columns: dict[str, list[float]] = {"step": [float(count) for count in counts]}
    paths = {
        "gd": (0.0, config.lr),
        "sam": (config.rho, config.lr),
        "gd_half": (0.0, config.lr / 2),
        "sam_half": (config.rho, config.lr / 2),
    }
    for done, (name, (rho, lr)) in enumerate(paths.items(), 1):
        walker = copy.deepcopy(model)
        closure = loss_on(walker, split, few)
        stepper = SAM(torch.optim.SGD(walker.parameters(), lr=lr), rho)
        for step in range(config.drift_steps + 1):
            if step in counts:
                H = Hessian(closure, walker.parameters())
                columns.setdefault(f"{name}_sharpness", []).append(
                    float(H.top(max_hvps=500).values[0])
                )
                columns.setdefault(f"{name}_loss", []).append(H.loss())
            stepper.step(closure)
        progress(done, len(paths))
    return columns


def rescaling(
    config: Config, seed: int, device: torch.device, progress: Tick = lambda *_: None
) -> dict[str, list[float]]:
    """SAM and ASAM on a ReLU network whose layers are scaled by a and 1/a.

    The scaling leaves the function of the network alone. One row a factor a.

    Increases of the loss under the perturbation: ``sam``, with the main radius; ``asam``, with
    eta = 0 and all parameters adapting; ``asam_weights``, with eta = 0 where the biases do not
    adapt, which is the default of the rule. (The first layer's bias is scaled with its weights.)

    Outputs after a whole step with the learning rate `config.relu_lr`, relative to those before,
    root mean square of the change: ``step_sam``, ``step_asam``.
    """
    split = load(config, seed, device)
    x, y = split.x[: config.measured], split.y[: config.measured]
    model = network(x, (64,), "relu", 10, seed)
    descend(
        lambda: squared_error(model(x), y),
        list(model.parameters()),
        config.relu_lr,
        config.relu_steps,
    )
    with torch.no_grad():
        outputs = model(x)
    everywhere = partial(asam, eta=0.0, adaptive=lambda p: True)
    rules: dict[str, tuple[Rule, float]] = {
        "sam": (sam, config.rho),
        "asam": (everywhere, config.asam_all_rho),
        "asam_weights": (partial(asam, eta=0.0), config.asam_rho),
    }
    columns: dict[str, list[float]] = {}
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
        _append(columns, row)
        progress(done, len(config.factors))
    return columns


# --- the claims ----------------------------------------------------------------------------------

Pick = Callable[..., Any]


def _trained(statistic: Callable[[Pick], float]) -> Callable[[Result], list[float]]:
    """A statistic of the training study, seed by seed.

    It gets ``pick(method, times=1, micro=None)``, which finds a run at ``times`` its main radius.
    """

    def values(result: Result) -> list[float]:
        config = result.config
        main = {
            "sgd": 0.0,
            "sam": config["rho"],
            "random": config["rho"],
            "asam": config["asam_rho"],
            "asam_all": config["asam_all_rho"],
        }

        def pick_of(seed: int) -> Pick:
            def pick(method: str, times: float = 1, micro: int | None = None) -> Any:
                return result.select(
                    seed=seed,
                    study="training",
                    method=method,
                    rho=times * main[method],
                    micro=micro or config["batch"],
                )[0]

            return pick

        return [statistic(pick_of(seed)) for seed in result.seeds]

    return values


def _smallest(statistic: Callable[[Any, Any], float]) -> Callable[[Result], list[float]]:
    """A statistic of SAM's runs with the smallest micro-batches and with none, seed by seed."""

    def values(result: Result) -> list[float]:
        least = min(result.config["micros"])
        return _trained(lambda pick: statistic(pick("sam", micro=least), pick("sam")))(result)

    return values


def _each(study: str, statistic: Callable[[Any], float]) -> Callable[[Result], list[float]]:
    """A statistic of one study, seed by seed, mean over its runs."""

    def values(result: Result) -> list[float]:
        found = [result.select(seed=seed, study=study) for seed in result.seeds]
        return [math.fsum(map(statistic, runs)) / len(runs) for runs in found]

    return values


def _at_main(statistic: Callable[[Any], Any]) -> Callable[[Result], list[float]]:
    """A statistic with one value a row of the study of linearisation, mean at the main radius."""

    def values(result: Result) -> list[float]:
        rho = result.config["rho"]
        return _each(
            "linearisation", lambda run: float(statistic(run)[run["radius"] == rho].mean())
        )(result)

    return values


def _final(above: Any, below: Any, name: str = "sharpness") -> float:
    """Ratio of the last entries of a column of two runs."""
    return float(above[name][-1] / below[name][-1])


def at_equal_loss(sam_run: Any, sgd_run: Any) -> float:
    """Final sharpness of the first run over the second one's where its loss comes nearest."""
    nearest = abs(sgd_run["loss"] - sam_run["loss"][-1]).argmin()
    return float(sam_run["sharpness"][-1] / sgd_run["sharpness"][nearest])


def worst_growth(result: Result) -> list[float]:
    """The largest ratio of SAM's final sharpness at one radius to that at the next smaller one."""
    values = []
    for seed in result.seeds:
        runs = [
            result.select(
                seed=seed, study="training", method="sam", rho=rho, micro=result.config["batch"]
            )[0]
            for rho in sorted(result.config["rhos"])
        ]
        values.append(max(_final(b, a) for a, b in itertools.pairwise(runs)))
    return values


def order_of_error(run: Any) -> float:
    """The exponent with which ``penalty_error`` grows with the radius: mean over checkpoints."""
    slopes = []
    for epoch in np.unique(run["epoch"]):
        rows = run["epoch"] == epoch
        slopes.append(
            np.polyfit(np.log(run["radius"][rows]), np.log(run["penalty_error"][rows]), 1)[0]
        )
    return float(np.mean(slopes))


def predicted_change(run: Any, of: str) -> float:
    """What SAM's step does beyond gradient descent's, over what theory says of it.

    Median over checkpoints, at the smallest learning rate and radius.
    """
    rows = (run["lr"] == run["lr"].min()) & (run["radius"] == run["radius"].min())
    return float(np.median((run[f"{of}_change"] / run[f"{of}_predicted"])[rows]))


def _spread(values: Any) -> float:
    return float(values.max() / values.min())


CLAIMS = [
    Claim(
        "sam-lowers-sharpness",
        "SAM ends where the sharpness is at most 0.7 times that of SGD: ratio",
        "Foret et al. 2021 (what SAM is for; the factor is ours)",
        "",
        _trained(lambda pick: _final(pick("sam"), pick("sgd"))),
        Criterion(high=0.7),
    ),
    Claim(
        "flatter-at-equal-loss",
        "This is not because SAM has trained less: the same ratio, with SGD taken at the epoch "
        "where its training loss is nearest to SAM's final one",
        "the control of chapter 3",
        "",
        _trained(lambda pick: at_equal_loss(pick("sam"), pick("sgd"))),
        Criterion(high=0.7),
    ),
    Claim(
        "flatter-with-radius",
        "The larger the radius, the flatter: largest ratio of the final sharpness at one radius "
        "to that at the next smaller one",
        "the question of chapter 3",
        "",
        worst_growth,
        Criterion(high=1.0),
    ),
    Claim(
        "noise-does-nothing",
        "Random perturbations of the same length leave the sharpness of SGD: ratio",
        "the control of chapter 3",
        "",
        _trained(lambda pick: _final(pick("random"), pick("sgd"))),
        Criterion(0.8, 1.25),
    ),
    Claim(
        "noise-does-not-reach-it",
        "Ten times as long, random perturbations still end at least 1.25 times as sharp as SAM: "
        "ratio",
        "the control of chapter 3",
        "",
        _trained(lambda pick: _final(pick("random", times=10), pick("sam"))),
        Criterion(low=1.25),
    ),
    Claim(
        "sam-generalises",
        "SAM's test error is not above that of SGD: SGD minus SAM, after equally many epochs",
        "Foret et al. 2021 (direction)",
        "percentage points",
        _trained(lambda pick: float(pick("sgd")["test_error"][-1] - pick("sam")["test_error"][-1])),
        Criterion(low=0.0),
    ),
    Claim(
        "sam-trains-slower",
        "Its training loss is larger after equally many epochs: ratio to SGD's",
        "the question of chapter 3",
        "",
        _trained(lambda pick: _final(pick("sam"), pick("sgd"), "loss")),
        Criterion(low=1.0),
    ),
    Claim(
        "asam-lowers-sharpness",
        "ASAM, which aims at another sharpness, lowers this one as well: ratio to SGD's",
        "the question of chapter 3",
        "",
        _trained(lambda pick: _final(pick("asam"), pick("sgd"))),
        Criterion(high=0.7),
    ),
    Claim(
        "asam-perturbs-biases",
        "Where biases do not adapt, with T = 1 beside weights far below 1, ASAM perturbs little "
        "else: their share of its squared length, at the end of training",
        "the question of chapter 3",
        "",
        _trained(lambda pick: float(pick("asam")["bias_share"][0])),
        Criterion(low=0.9),
    ),
    Claim(
        "small-batches-have-long-gradients",
        "The smaller the batch, the longer its gradient, and with it what SAM adds to the loss: "
        "mean norm for micro-batches over that for batches, at the end of SAM",
        "derived in chapter 3; the factor is ours",
        "",
        _trained(
            lambda pick: float(pick("sam")["micro_gradient"][-1] / pick("sam")["micro_gradient"][0])
        ),
        Criterion(low=2.0),
    ),
    Claim(
        "micro-batches-lower-sharpness",
        "Perturbing for small parts of the batch ends flatter than for the whole one: ratio of "
        "sharpness",
        "the question of chapter 3",
        "",
        _smallest(_final),
        Criterion(high=1.0),
    ),
    Claim(
        "micro-batches-lower-trace",
        "The same with the trace of the Hessian: ratio",
        "the question of chapter 3",
        "",
        _smallest(partial(_final, name="trace")),
        Criterion(high=1.0),
    ),
    Claim(
        "micro-batches-generalise",
        "Perturbing for small parts of the batch does not raise the test error: whole minus parts",
        "the question of chapter 3",
        "percentage points",
        _smallest(lambda parts, whole: float(whole["test_error"][-1] - parts["test_error"][-1])),
        Criterion(low=0.0),
    ),
    Claim(
        "first-order-suffices",
        "The first-order solution finds 90% of the largest increase that projected gradient "
        "ascent finds in the ball: mean over checkpoints",
        "Foret et al. 2021 (approximation of the inner problem; the number is ours)",
        "",
        _at_main(lambda run: run["first"] / run["best"]),
        Criterion(low=0.9),
    ),
    Claim(
        "linear-value-is-wrong",
        "As a value the linearisation is no approximation: it predicts at most half of that "
        "increase, mean over checkpoints",
        "the question of chapter 3",
        "",
        _at_main(lambda run: run["linear"] / run["first"]),
        Criterion(high=0.5),
    ),
    Claim(
        "quadratic-value-is-right",
        "With the second-order term the prediction is right: ratio to the increase, mean over "
        "checkpoints",
        "Taylor's formula; the tolerance is ours",
        "",
        _at_main(lambda run: run["quadratic"] / run["first"]),
        Criterion(0.9, 1.1),
    ),
    Claim(
        "sam-is-a-gradient-penalty",
        "SAM's gradient is that of the loss with the penalty ρ|∇L|, up to an error that falls "
        "linearly with ρ: exponent",
        "derived in chapter 3",
        "",
        _each("linearisation", order_of_error),
        Criterion(0.8, 1.2),
    ),
    Claim(
        "noise-is-blind",
        "A random direction points along the gradient by 1/√P only: root mean square of the "
        "cosine, times √P",
        "derived in chapter 3",
        "",
        _at_main(lambda run: run["alignment"]),
        Criterion(0.8, 1.25),
    ),
    Claim(
        "noise-hardly-rises",
        "A random perturbation raises the loss by at most 1% of what the gradient's direction "
        "does: ratio, mean over checkpoints",
        "the control of chapter 3",
        "",
        _at_main(lambda run: run["random"] / run["first"]),
        Criterion(high=0.01),
    ),
    Claim(
        "step-lowers-gradient-norm",
        "One step of SAM lowers the gradient norm by lr ρ |H g/|g||² more than one of gradient "
        "descent: measured over predicted, median of checkpoints",
        "derived in chapter 3",
        "",
        _each("one_step", lambda run: predicted_change(run, "norm")),
        Criterion(0.9, 1.1),
    ),
    Claim(
        "step-changes-sharpness",
        "It changes the sharpness by -lr ρ (H g/|g|)·∇λ1 more: measured over predicted, median "
        "of checkpoints",
        "derived in chapter 3",
        "",
        _each("one_step", lambda run: predicted_change(run, "sharpness")),
        Criterion(0.9, 1.1),
    ),
    Claim(
        "sam-leaves-the-edge",
        "From the edge of stability of gradient descent, SAM with the same learning rate drifts "
        "to flatter places: final sharpness over that of gradient descent",
        "Bartlett, Long & Bousquet 2022 (direction; the factor is ours)",
        "",
        _each("drift", lambda run: float(run["sam_sharpness"][-1] / run["gd_sharpness"][-1])),
        Criterion(high=0.9),
    ),
    Claim(
        "drift-needs-no-edge",
        "It does so too where gradient descent is far from its edge, at half the learning rate: "
        "the same ratio",
        "Bartlett, Long & Bousquet 2022 (direction; the factor is ours)",
        "",
        _each(
            "drift", lambda run: float(run["sam_half_sharpness"][-1] / run["gd_half_sharpness"][-1])
        ),
        Criterion(high=0.9),
    ),
    Claim(
        "sam-sees-the-scaling",
        "Scaling the layers of a ReLU network by a and 1/a changes the loss that SAM looks at: "
        "largest increase over smallest, twofold or more",
        "Dinh et al. 2017; Kwon et al. 2021; the factor is ours",
        "",
        _each("rescaling", lambda run: _spread(run["sam"])),
        Criterion(low=2.0),
    ),
    Claim(
        "asam-does-not",
        "It leaves that of ASAM with η = 0 alone, where all parameters adapt: largest over "
        "smallest increase",
        "Kwon et al. 2021",
        "",
        _each("rescaling", lambda run: _spread(run["asam"])),
        Criterion(high=1.001),
    ),
    Claim(
        "fixed-biases-lose-it",
        "Where the biases do not adapt, the invariance is lost: the same ratio, twofold or more",
        "the question of chapter 3",
        "",
        _each("rescaling", lambda run: _spread(run["asam_weights"])),
        Criterion(low=2.0),
    ),
    Claim(
        "asam-steps-do",
        "The step of ASAM is another matter: the change of the outputs varies twofold or more",
        "the question of chapter 3",
        "",
        _each("rescaling", lambda run: _spread(run["step_asam"])),
        Criterion(low=2.0),
    ),
]

EXPERIMENT = Experiment(
    name="sharpness_aware",
    title="What the ascent of SAM buys",
    source="Foret et al. 2021; Kwon et al. 2021; Bartlett, Long & Bousquet 2022",
    presets=PRESETS,
    settings=settings,
    run=run,
    claims=CLAIMS,
)
