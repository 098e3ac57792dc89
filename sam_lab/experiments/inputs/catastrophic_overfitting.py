r"""Catastrophic overfitting: training against one step of an attack.

One step to the border of the ball (FGSM) costs a fraction of what PGD costs, and for a while it
seems to train as well. Then the network learns to be right where that step ends, and nowhere else:
its error under FGSM stays low while that under PGD goes up to everything. What has failed is the
linearity that the step relies on: `linearity` is the cosine between the loss's gradient at an
example and at a random point of the ball around it, mean over examples; 1 where the loss is linear.

Three attacks train a network each: FGSM; one step of 1.25 eps from a random start; and PGD with few
steps. FGSM does so at other radii too. All are watched along the epochs, over the first `n_pgd`
test examples, under PGD with more steps than any of them trains with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab.adversarial import Attack, Threat, cross_entropy, fgsm, pgd, robust_accuracy
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import two_judges
from sam_lab.experiments.lab.claims import CONTROL, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Result, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS, Recipe
from sam_lab.state import evaluating
from sam_lab.training import Phase, Training

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
    "trained_against",
]

ATTACKS = ("fgsm", "random", "pgd")
"""What a network is trained against: FGSM, one step from a random start, PGD."""

WATCHING_STEPS = 20  # of PGD along the epochs: more than any training has


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        recipe: data, network and SGD, at a constant learning rate.
        eps: radius in the maximum norm at which all three attacks train.
        others: radii at which FGSM trains too. Each network is judged at its own.
        attack_steps: of PGD in training.
        every: epochs from one look to the next.
        n_pgd: test examples that are looked at along the epochs.
        n_autoattack: test examples that AutoAttack's two gradient attacks see at the end.
    """

    recipe: Recipe
    eps: float = 0.3
    others: tuple[float, ...] = (0.2, 0.35)
    attack_steps: int = 3
    every: int = 2
    n_pgd: int = 200
    n_autoattack: int = 50


LAPTOP = Config(DIGITS.but(train=1000, hidden=(), channels=(16, 32), epochs=24, batch=32, lr=0.01))
DESKTOP = Config(
    CIFAR_TENTH.but(standardize="network", epochs=30), eps=8 / 255, others=(4 / 255, 16 / 255)
)
PAPER = Config(
    CIFAR.but(standardize="network"),
    eps=8 / 255,
    others=(4 / 255, 16 / 255),
    attack_steps=10,
    n_pgd=1000,
    n_autoattack=1000,
)


def settings(config: Config) -> list[Setting]:
    """Every attack at the one radius, and FGSM at the others."""
    return [
        *({"attack": name, "eps": config.eps} for name in ATTACKS),
        *({"attack": "fgsm", "eps": eps} for eps in config.others),
    ]


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


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A run before its first epoch, and its data."""
    against = attack(cell["attack"], cell["eps"], config.attack_steps)
    phase = Phase(0, config.recipe.epochs, attack=against)
    return config.recipe.training(cell.seed, cell.device, phases=[phase])


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


def run(config: Config, cell: Cell) -> Columns:
    """One training, watched along its epochs.

    Returns:
        `epoch` (how many are done), and there, on the first `n_pgd` test examples,
        `natural_error`, `fgsm_error`, `pgd_error` and `linearity`. Of the last epoch, on the first
        `n_autoattack` test examples, `end_natural_error`, `end_pgd_error` and
        `end_autoattack_error` as by `robustness.two_judges`.
    """
    training, dataset = prepare(config, cell)
    model, threat = training.model, Threat("linf", cell["eps"])
    x, y = dataset.x_test[: config.n_pgd], dataset.y_test[: config.n_pgd]
    rows = Rows()

    def on_epoch() -> None:
        cell.tick(training.epoch, training.epochs)
        if training.epoch % config.every and training.epoch < training.epochs:
            return
        natural, one_step = robust_accuracy(model, x, y, partial(fgsm, threat=threat))
        _, many = robust_accuracy(model, x, y, partial(pgd, threat=threat, steps=WATCHING_STEPS))
        rows.add(
            epoch=training.epoch,
            natural_error=1 - natural,
            fgsm_error=1 - one_step,
            pgd_error=1 - many,
            linearity=linearity(model, x, y, threat, cell.seed),
        )

    training.run(on_epoch=on_epoch)
    n = config.n_autoattack
    judges = two_judges(
        model, dataset.x_test[:n], dataset.y_test[:n], threat, n_autoattack=n, seed=cell.seed
    )
    del judges["pgd_error_judged"]  # here it is `pgd_error`
    return rows.columns | {f"end_{name}": [error] for name, error in judges.items()}


# --- what the runs say ----------------------------------------------------------------------------


def trained_against(runs: SeedRuns, attack: str, eps: float | None = None) -> Run:
    """The run trained against this attack, at this radius or the one of all three."""
    return runs.one(attack=attack, eps=runs.config["eps"] if eps is None else eps)


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
    runs = [trained_against(of_seed, attack, eps) for of_seed in result.by_seed()]
    return runs[0]["epoch"], np.array([run[name] for run in runs])


def deception(run: Run) -> float:
    """By how many points the error under PGD exceeds that under FGSM, where that is most."""
    return float(100 * (run["pgd_error"] - run["fgsm_error"]).max())


def lost(run: Run) -> float:
    """How many points of accuracy under PGD were won at some epoch and lost by a later one."""
    error = run["pgd_error"]
    return float(100 * (error - np.minimum.accumulate(error)).max())


def _at_largest_radius(runs: SeedRuns) -> Run:
    return trained_against(runs, "fgsm", max(runs.config["others"]))


def _autoattack_error(runs: SeedRuns, attack: str, eps: float | None = None) -> float:
    """After the last epoch, in per cent; arguments are those of `trained_against`."""
    return 100 * trained_against(runs, attack, eps).value("end_autoattack_error")


# --- what the runs decide -------------------------------------------------------------------------

WONG = Source("Wong et al. 2020", "after")
ANDRIUSHCHENKO = Source("Andriushchenko & Flammarion 2020", "after")


@claim(WONG, low=40, unit="points", headline=True)
def one_step_deceives(runs: SeedRuns) -> float:
    """A network trained against FGSM at the largest radius withstands FGSM but not PGD: by how much
    its error under PGD is larger, at the epoch where that is most"""
    return deception(_at_largest_radius(runs))


@claim(Source("Croce & Hein 2020", "after"), low=95, unit="%", domain="share")
def nothing_is_left(runs: SeedRuns) -> float:
    """AutoAttack breaks nearly every prediction of a network trained against FGSM at the largest
    radius: its error after the last epoch"""
    return _autoattack_error(runs, "fgsm", max(runs.config["others"]))


@claim(ANDRIUSHCHENKO, high=0.5)
def linearity_is_lost(runs: SeedRuns) -> float:
    """Where training against FGSM at the largest radius fails most, the loss is no longer linear in
    the inputs: linearity at that epoch over its largest value"""
    run = _at_largest_radius(runs)
    epoch = int((run["pgd_error"] - run["fgsm_error"]).argmax())
    return float(run["linearity"][epoch] / run["linearity"].max())


@claim(ANDRIUSHCHENKO, high=20, unit="points")
def small_radius_is_spared(runs: SeedRuns) -> float:
    """At the smallest radius, training against FGSM does not fail in this way: by how much the
    error under PGD is larger than that under FGSM, at the epoch where that is most"""
    return deception(trained_against(runs, "fgsm", min(runs.config["others"])))


@claim(WONG, low=20, unit="points")
def robustness_is_lost(runs: SeedRuns) -> float:
    """At the middle radius, training against FGSM loses robustness that it had: by how much the
    error under PGD rises above its lowest value so far"""
    return lost(trained_against(runs, "fgsm"))


@claim(CONTROL, high=20, unit="points")
def pgd_does_not_lose_it(runs: SeedRuns) -> float:
    """At the middle radius, training against PGD keeps the robustness that it had: by how much the
    error under PGD rises above its lowest value so far"""
    return lost(trained_against(runs, "pgd"))


@claim(WONG, low=0, unit="points")
def random_start_helps(runs: SeedRuns) -> float:
    """At the middle radius, training against one step from a random start is fooled less than
    training against FGSM: by how much the largest excess of PGD's error over FGSM's is smaller"""
    return deception(trained_against(runs, "fgsm")) - deception(trained_against(runs, "random"))


@claim(WONG, low=0, unit="points")
def random_start_is_more_robust(runs: SeedRuns) -> float:
    """At the middle radius, training against one step from a random start ends more robust than
    training against FGSM: by how much the error under AutoAttack is smaller"""
    return _autoattack_error(runs, "fgsm") - _autoattack_error(runs, "random")


@claim(WONG, high=5, unit="points")
def one_step_is_as_good(runs: SeedRuns) -> float:
    """At the middle radius, training against one step from a random start makes a network about as
    robust as training against PGD: by how much the error under AutoAttack is larger"""
    return _autoattack_error(runs, "random") - _autoattack_error(runs, "pgd")


EXPERIMENT = Experiment(
    name="catastrophic_overfitting",
    title="Catastrophic overfitting: training against one step",
    source="Wong et al. 2020 (arXiv:2001.03994); Andriushchenko & Flammarion 2020 "
    "(arXiv:2007.02617)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        one_step_deceives,
        nothing_is_left,
        linearity_is_lost,
        small_radius_is_spared,
        robustness_is_lost,
        pgd_does_not_lose_it,
        random_start_helps,
        random_start_is_more_robust,
        one_step_is_as_good,
    ],
    needs=["pyautoattack"],
)
