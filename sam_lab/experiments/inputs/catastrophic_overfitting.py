r"""Catastrophic overfitting: training against one step of an attack.

One step to the border of the ball (FGSM) costs a fraction of what PGD costs, and for a while it
seems to train as well. Then the network learns to be right where that step ends, and nowhere else:
its error under FGSM stays low while that under PGD goes up to everything. What has failed is the
linearity that the step relies on: `linearity` is the cosine between the loss's gradient at an
example and at a random point of the ball around it, mean over examples; 1 where the loss is linear.

Three attacks train a network each: FGSM; one step of 1.25 eps from a random start; and PGD with few
steps. FGSM does so at other radii too. All are watched along the epochs, over the first `watched`
test examples, under PGD with more steps than any of them trains with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data, models
from sam_lab.adversarial import (
    Attack,
    Threat,
    cross_entropy,
    fgsm,
    pgd,
    robust_accuracy,
)
from sam_lab.experiments import networks
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.robustness import two_judges
from sam_lab.experiments.statistics import each_seed
from sam_lab.state import evaluating
from sam_lab.training import Phase, Training, constant, crop_and_flip

__all__ = [
    "ATTACKS",
    "Config",
    "attack",
    "curves",
    "deception",
    "linearity",
    "lost",
    "prepare",
    "run",
    "settings",
]

WONG = "Wong et al. 2020"
ANDRIUSHCHENKO = "Andriushchenko & Flammarion 2020"

ATTACKS = ("fgsm", "random", "pgd")
"""What a network is trained against: FGSM, one step from a random start, PGD."""

WATCH = 20  # steps of PGD along the epochs: more than any training has


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data, train, test: the data set, and how many examples of it.
        channels: of a convolutional network's layers (see `models.cnn`); empty for a wide residual
            network.
        depth, width, stride: of the wide residual network (see `models.wide_resnet`).
        augment: whether images are shifted and mirrored.
        epochs, batch, lr, momentum, weight_decay: of SGD, at a constant learning rate.
        eps: radius in the maximum norm at which all three attacks train.
        others: radii at which FGSM trains too. Each network is judged at its own.
        steps: of PGD in training.
        every: epochs from one look to the next.
        watched: test examples that are looked at.
        judged: test examples that AutoAttack's first two attacks see.
    """

    data: str
    train: int
    test: int
    channels: tuple[int, ...] = ()
    depth: int = 10
    width: int = 1
    stride: int = 1
    augment: bool = False
    epochs: int = 30
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    eps: float = 0.3
    others: tuple[float, ...] = (0.2, 0.35)
    steps: int = 3
    every: int = 2
    watched: int = 200
    judged: int = 50


def settings(config: Config) -> list[dict[str, Any]]:
    """Every attack at the one radius, and FGSM at the others."""
    found: list[dict[str, Any]] = [{"attack": name, "eps": config.eps} for name in ATTACKS]
    return found + [{"attack": "fgsm", "eps": eps} for eps in config.others]


def attack(name: str, eps: float, steps: int) -> Attack:
    """One of `ATTACKS`, as a phase of the training takes it.

    Raises:
        ValueError: another name.
    """
    threat = Threat("linf", eps)
    known: dict[str, Attack] = {
        "fgsm": partial(pgd, threat=threat, steps=1, step_size=eps, random_start=False),
        "random": partial(pgd, threat=threat, steps=1, step_size=1.25 * eps),
        "pgd": partial(pgd, threat=threat, steps=steps),
    }
    if name not in known:
        raise ValueError(f"attack must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A run before its first epoch, and its data."""
    found = data.load(config.data, train=config.train, test=config.test, seed=seed, device=device)
    net: nn.Module
    if config.channels:
        net = models.cnn(
            found.x.shape[1:],
            found.classes,
            "relu",
            widths=config.channels,
            pooling="max",
            seed=seed,
            device=device,
        )
    else:
        net = networks.normalized(networks.wide_resnet(config, found, seed, device), found)
    training = Training(
        net,
        found.x,
        found.y,
        partial(
            torch.optim.SGD,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        ),
        [Phase(0, config.epochs, attack=attack(setting["attack"], setting["eps"], config.steps))],
        batch=config.batch,
        schedule=constant,
        augment=crop_and_flip() if config.augment else None,
        seed=seed,
    )
    return training, found


def linearity(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> float:
    r"""Local linearity: $\cos(\nabla \ell(x), \nabla \ell(x + \eta))$, $\eta$ drawn from the ball.

    Args:
        model: in evaluation mode meanwhile.
        x, y: inputs (N, ...) and labels (N,).
        seed: of the points drawn, one an example.

    Returns:
        The mean over examples; one without a gradient counts as 0.

    Source: Andriushchenko & Flammarion 2020 (arXiv:2007.02617).
    """

    def gradient(inputs: Tensor) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(inputs), y).sum(), inputs)
        return grad.flatten(1).double()

    elsewhere = threat.start(x, torch.Generator().manual_seed(seed))
    with evaluating(model), torch.enable_grad():
        cosines = nn.functional.cosine_similarity(gradient(x), gradient(elsewhere), eps=1e-30)
    return float(cosines.mean())


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One training, watched along its epochs.

    Returns:
        `epoch` (how many are done), and there, on the watched test examples, `natural_error`,
        `fgsm_error`, `pgd_error` and `linearity`. Of the last epoch, on the first `judged` test
        examples, `end_natural_error`, `end_pgd_error` and `end_autoattack_error` as by
        `robustness.two_judges`.
    """
    training, found = prepare(config, setting, seed, device)
    model, threat = training.model, Threat("linf", setting["eps"])
    x, y = found.x_test[: config.watched], found.y_test[: config.watched]
    columns: dict[str, list[float]] = {
        name: [] for name in ("epoch", "natural_error", "fgsm_error", "pgd_error", "linearity")
    }

    def on_epoch() -> None:
        progress(training.epoch, training.epochs)
        if training.epoch % config.every and training.epoch < training.epochs:
            return
        natural, one_step = robust_accuracy(model, x, y, partial(fgsm, threat=threat))
        _, many = robust_accuracy(model, x, y, partial(pgd, threat=threat, steps=WATCH))
        row = {
            "epoch": float(training.epoch),
            "natural_error": 1 - natural,
            "fgsm_error": 1 - one_step,
            "pgd_error": 1 - many,
            "linearity": linearity(model, x, y, threat, seed),
        }
        for name, value in row.items():
            columns[name].append(value)

    training.run(on_epoch=on_epoch)
    few = slice(config.judged)
    judges = two_judges(
        model,
        found.x_test[few],
        found.y_test[few],
        threat,
        judged=config.judged,
        seed=seed,
    )
    del judges["pgd_error_judged"]  # all are judged
    return columns | {f"end_{name}": [value] for name, value in judges.items()}


# --- what the runs decide -------------------------------------------------------------------------


def _run(result: Result, seed: int, attack: str, eps: float | None = None) -> Run:
    """The run trained against this attack, at the radius of all three or another."""
    eps = result.config["eps"] if eps is None else eps
    return result.select(seed=seed, attack=attack, eps=eps)[0]


def curves(
    result: Result, name: str, attack: str, eps: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A column along the epochs.

    Args:
        name: "natural_error", "fgsm_error", "pgd_error" or "linearity".
        attack: one of `ATTACKS`, that which the network was trained against.
        eps: its radius; by default the one at which all three train.

    Returns:
        Epochs (T,); values (seeds, T).
    """
    runs = [_run(result, seed, attack, eps) for seed in result.seeds]
    return runs[0]["epoch"], np.array([run[name] for run in runs])


def deception(run: Run) -> float:
    """By how many points the error under PGD exceeds that under FGSM, where that is most."""
    return float(100 * (run["pgd_error"] - run["fgsm_error"]).max())


def lost(run: Run) -> float:
    """How many points of accuracy under PGD were won at some epoch and lost by a later one."""
    error = run["pgd_error"]
    return float(100 * (error - np.minimum.accumulate(error)).max())


def _claims() -> list[Claim]:
    def largest(result: Result, seed: int) -> Run:
        return _run(result, seed, "fgsm", max(result.config["others"]))

    def smallest(result: Result, seed: int) -> Run:
        return _run(result, seed, "fgsm", min(result.config["others"]))

    def of(
        statistic: Callable[[Run], float], which: Callable[[Result, int], Run]
    ) -> Callable[[Result], list[float]]:
        return each_seed(lambda result, seed: statistic(which(result, seed)))

    def less(statistic: Callable[[Run], float], one: str, two: str) -> Callable[..., list[float]]:
        """By how much a statistic of one attack's network lies above that of the other's."""
        return each_seed(
            lambda result, seed: (
                statistic(_run(result, seed, one)) - statistic(_run(result, seed, two))
            )
        )

    def final(name: str) -> Callable[[Run], float]:
        return lambda run: float(100 * run[f"end_{name}"][0])

    def straightness(result: Result, seed: int) -> float:
        run = largest(result, seed)
        where = int((run["pgd_error"] - run["fgsm_error"]).argmax())
        return float(run["linearity"][where] / run["linearity"].max())

    fgsm_run, pgd_run = (partial(_run, attack=name) for name in ("fgsm", "pgd"))
    return [
        Claim(
            "one-step-deceives",
            "Trained against FGSM at the largest radius, a network is robust against FGSM alone: "
            "by how much its error under PGD is larger, at the epoch where that is most",
            WONG,
            "points",
            of(deception, largest),
            Criterion(low=40.0),
        ),
        Claim(
            "nothing-is-left",
            "AutoAttack leaves next to nothing of it after the last epoch: its error",
            "Croce & Hein 2020",
            "%",
            of(final("autoattack_error"), largest),
            Criterion(low=95.0),
        ),
        Claim(
            "linearity-is-lost",
            "The loss is no longer linear there: linearity at that epoch over its largest value",
            ANDRIUSHCHENKO,
            "",
            each_seed(straightness),
            Criterion(high=0.5),
        ),
        Claim(
            "small-radius-is-spared",
            "At the smallest radius FGSM does not deceive: by how much the error under PGD is "
            "larger, at the epoch where that is most",
            ANDRIUSHCHENKO,
            "points",
            of(deception, smallest),
            Criterion(high=20.0),
        ),
        Claim(
            "robustness-is-lost",
            "At the radius between, FGSM training loses robustness that it had: by how much the "
            "error under PGD rises again",
            WONG,
            "points",
            of(lost, fgsm_run),
            Criterion(low=20.0),
        ),
        Claim(
            "pgd-does-not-lose-it",
            "Training against PGD does not",
            "control",
            "points",
            of(lost, pgd_run),
            Criterion(high=20.0),
        ),
        Claim(
            "random-start-helps",
            "One step from a random start deceives less than FGSM: by how much",
            WONG,
            "points",
            less(deception, "fgsm", "random"),
            Criterion(low=0.0),
        ),
        Claim(
            "random-start-is-more-robust",
            "It ends more robust: by how much the error under AutoAttack is smaller",
            WONG,
            "points",
            less(final("autoattack_error"), "fgsm", "random"),
            Criterion(low=0.0),
        ),
        Claim(
            "one-step-is-as-good",
            "From a random start one step makes about as robust as PGD: by how much the error "
            "under AutoAttack is larger",
            WONG,
            "points",
            less(final("autoattack_error"), "random", "pgd"),
            Criterion(high=5.0),
        ),
    ]


LAPTOP = Config(
    data="mnist_5k",
    train=1000,
    test=1000,
    channels=(16, 32),
    epochs=24,
    batch=32,
    lr=0.01,
)
DESKTOP = Config(
    data="cifar10",
    train=5000,
    test=500,
    stride=2,
    lr=0.1,
    eps=8 / 255,
    others=(4 / 255, 16 / 255),
)
PAPER = Config(
    data="cifar10",
    train=50_000,
    test=10_000,
    depth=16,
    width=8,
    augment=True,
    epochs=100,
    lr=0.1,
    eps=8 / 255,
    others=(4 / 255, 16 / 255),
    steps=10,
    watched=1000,
    judged=1000,
)

EXPERIMENT = Experiment(
    name="catastrophic_overfitting",
    title="Catastrophic overfitting: training against one step",
    source="Wong et al. 2020 (arXiv:2001.03994); Andriushchenko & Flammarion 2020 "
    "(arXiv:2007.02617)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=_claims(),
)
