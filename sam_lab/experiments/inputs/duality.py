r"""Does SAM, which perturbs weights, make a network robust to perturbed inputs?

The networks differ in one thing each, and share data, initial weights and the order of the
examples:

- ``sgd``; ``sam`` at several radii; no example is attacked while they train.
- ``sam`` with a share of the training examples only, so that its test error is SGD's or above.
  Along that line, from all examples to few, the robust error is read (linearly) where the test
  error is SGD's: SAM *of equal clean accuracy*. All networks are trained to the end of their
  schedule, which a run that is stopped early is not.
- ``blind``: perturbed in random directions, a radius many times SAM's. ``decay``: SGD with strong
  weight decay, which shrinks weights and margins without knowing of sharpness.
- ``adversarial``: PGD on the examples, the yardstick.

Clean accuracy is taken out in a second way, without a further network: the *common* examples are
those test examples that both SGD and the network classify rightly.

No number rests on one attack. On the first `n_pgd` test examples there is PGD; on the first
`n_autoattack` a stronger PGD and the two attacks of AutoAttack that follow gradients (APGD on the
cross-entropy, targeted APGD on the difference of logits), pointwise worst; on the first
`n_all_attacks`, for SGD and SAM at one radius, the whole AutoAttack, with FAB-T and Square. Where a
network only *hides* its gradient (Athalye et al. 2018), an attack that needs none is stronger than
PGD: Square, or examples made on the SGD network and shown to this one.

The column of the sharpness is for the record, and no claim rests on it: the losses of these
networks are far apart, and so are the norms of their weights. `flat_and_robust` compares them at
equal loss.

Whether an attack succeeds depends on the logits' order, not on their scale. So the input gradient
alone says little; the distance to the boundary to first order, margin over gradient, is free of the
scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab.adversarial import AUTOATTACK, Attack, Threat, autoattack, pgd, standing
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import GRADIENT_ATTACKS, input_gradient, strong
from sam_lab.experiments.lab.claims import CONTROL, OURS, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Result, Run, SeedRuns, Setting
from sam_lab.experiments.lab.statistics import Ratio
from sam_lab.experiments.recipe import CIFAR, CIFAR_TENTH, DIGITS, Recipe
from sam_lab.perturbations import global_norm, random_direction
from sam_lab.state import evaluating
from sam_lab.training import Phase, Training, cosine, evaluate

__all__ = [
    "Config",
    "against_rho",
    "equal_accuracy",
    "first_order_distance",
    "network",
    "prepare",
    "run",
    "settings",
]

FEW_STEPS = 10
OTHER_ATTACKS = AUTOATTACK[len(GRADIENT_ATTACKS) :]

METHODS = ("sgd", "sam", "blind", "decay", "adversarial")


@dataclass(frozen=True)
class Config:
    """What is run. Inputs are pixels in [0, 1], and so are all eps.

    Attributes:
        recipe: data, network and SGD; the learning rate goes along half a cosine.
        attack_eps, attack_steps: of PGD in adversarial training.
        eps, pgd_steps, n_pgd: of PGD at the end: its radii, steps and test examples.
        judged_eps, n_autoattack: radii of stronger attacks, and how many of the test examples
            they see.
        n_all_attacks: those that attacks without a gradient see, at the first of `judged_eps`.
        l2_eps: radius in the Euclidean norm, for SGD and SAM at `rho`.
        rhos: radii of SAM, ascending; `rho`: the one of them that is compared with the rest.
        shares: of the training examples, for SAM at `rho` to have SGD's test error.
        blind: radius of the perturbation in a random direction.
        decay: the strong weight decay.
    """

    recipe: Recipe
    attack_eps: float
    eps: tuple[float, ...]
    judged_eps: tuple[float, ...]
    l2_eps: float
    rho: float
    rhos: tuple[float, ...]
    shares: tuple[float, ...]
    blind: float
    decay: float
    attack_steps: int = 10
    pgd_steps: int = 20
    n_pgd: int = 1000
    n_autoattack: int = 150
    n_all_attacks: int = 50


LAPTOP = Config(
    DIGITS.but(epochs=20, lr=0.1, weight_decay=0.0, tol=2e-2),
    rho=0.2,
    rhos=(0.05, 0.1, 0.2, 0.5),
    shares=(0.6,),
    blind=10.0,
    decay=1e-2,
    attack_eps=0.1,
    eps=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    judged_eps=(0.05, 0.1),
    l2_eps=1.0,
)
# On a tenth of CIFAR-10 SGD's network is all but broken at 2/255, so the judges sit at radii where
# there is something to tell apart; 8/255, that of adversarial training, shows where it all ends.
DESKTOP = Config(
    CIFAR_TENTH.but(standardize="network", test=2000, epochs=20, measured=500, tol=0.1),
    rho=0.1,
    rhos=(0.05, 0.1, 0.2),
    shares=(0.7,),
    blind=2.0,
    decay=5e-3,
    attack_eps=2 / 255,
    attack_steps=2,
    eps=(0.0, 0.5 / 255, 1 / 255, 2 / 255, 8 / 255, 32 / 255),
    judged_eps=(0.5 / 255, 1 / 255),
    l2_eps=16 / 255,
    pgd_steps=10,
    n_pgd=500,
    n_autoattack=100,
)
# The radii of the attacks are those of the evaluation that Zhang et al. released.
PAPER = dataclasses.replace(
    DESKTOP,
    recipe=CIFAR.but(standardize="network", measured=5000),
    rhos=(0.1, 0.2, 0.3, 0.4, 0.5),
    attack_steps=5,
    judged_eps=(1 / 255, 2 / 255),
    l2_eps=32 / 255,
    pgd_steps=20,
    n_pgd=10_000,
    n_autoattack=1000,
    n_all_attacks=1000,
)


def _setting(method: str, rho: float = 0.0, share: float = 1.0) -> Setting:
    return {"method": method, "rho": rho, "share": share}


SGD = _setting("sgd")


def settings(config: Config) -> list[Setting]:
    """The networks: which method, its radius, and the share of the training examples it gets.

    Raises:
        ValueError: `rho` is none of `rhos`.
    """
    if config.rho not in config.rhos:
        raise ValueError(f"rho must be one of rhos {config.rhos}, got {config.rho}")
    return [
        _setting("sgd"),
        *(_setting("sam", rho) for rho in config.rhos),
        *(_setting("sam", config.rho, share) for share in config.shares),
        _setting("blind", config.blind),
        _setting("decay"),
        _setting("adversarial"),
    ]


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A network before its first epoch, and the data (all of the training set).

    Raises:
        ValueError: an unknown method or data set, or more examples than there are.
    """
    recipe, method = config.recipe, cell["method"]
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    how: dict[str, Any] = {"rho": cell["rho"]}
    if method == "blind":
        how["rule"] = random_direction
    elif method == "adversarial":
        threat = Threat("linf", config.attack_eps)
        how["attack"] = partial(pgd, threat=threat, steps=config.attack_steps)
    elif method == "decay":
        recipe = recipe.but(weight_decay=config.decay)
    return recipe.training(
        cell.seed,
        cell.device,
        examples=round(cell["share"] * recipe.train),
        phases=[Phase(0, recipe.epochs, **how)],
        schedule=cosine,
    )


# --- what is measured -----------------------------------------------------------------------------


def first_order_distance(
    model: nn.Module, x: Tensor, y: Tensor, norm: str = "linf"
) -> tuple[Tensor, Tensor]:
    r"""How far the logits are from another order, and by how much x must change for it.

    The margin $\min_{k \ne y} z_y - z_k$, and
    $\min_{k \ne y} (z_y - z_k) / \|\nabla_x (z_y - z_k)\|_*$ with the dual norm, which is the
    distance to the boundary where the logits are linear, and does not change when they are
    multiplied by a number. Both are negative where the prediction is wrong.

    Args:
        model: ``model(x)`` gives logits (N, classes); in evaluation mode meanwhile.
        x, y: inputs (N, ...) and labels (N,).
        norm: "linf" or "l2", that in which the distance is.

    Returns:
        Margins and distances, (N,) each. Where the gradient vanishes, the distance is infinite.

    Source: the first step of DeepFool (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599).
    """
    order = {"linf": 1, "l2": 2}[norm]
    gaps, distances = [], []
    with evaluating(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        own = logits.gather(1, y[:, None])[:, 0]
        for k in range(logits.shape[1]):
            gap = own - logits[:, k]
            (grad,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            slope = torch.linalg.vector_norm(grad.flatten(1), order, dim=1)
            gap = gap.detach()
            far = torch.where(slope > 0, gap / slope, torch.inf)
            gaps.append(gap.masked_fill(y == k, torch.inf))
            distances.append(far.masked_fill(y == k, torch.inf))
    return torch.stack(gaps).amin(0), torch.stack(distances).amin(0)


@dataclass(frozen=True)
class _Trained:
    """A network at its end, and which test examples it gets right, attacked or not.

    Attributes:
        right: which of the first `n_pgd` examples, not attacked: (n_pgd,), bool.
        pgd_examples: those examples under PGD, for each eps.
        under_pgd: which of them are right under it, for each eps: (n_pgd,) each.
        under_autoattack: which of the first `n_autoattack` are right under AutoAttack's gradient
            attacks, for each judged eps: (n_autoattack,) each.
    """

    training: Training
    dataset: Dataset
    right: Tensor
    pgd_examples: list[Tensor]
    under_pgd: list[Tensor]
    under_autoattack: list[Tensor]

    def first(self, n: int) -> tuple[nn.Module, Tensor, Tensor]:
        """The network, and the first `n` test examples with their labels."""
        return self.training.model, self.dataset.x_test[:n], self.dataset.y_test[:n]


def _train(config: Config, cell: Cell) -> _Trained:
    training, dataset = prepare(config, cell)
    training.run(on_epoch=lambda: cell.tick(training.epoch, training.epochs))
    model, x, y = training.model, dataset.x_test[: config.n_pgd], dataset.y_test[: config.n_pgd]
    right = _right(model, x, y)
    pgd_examples = [_attacked(model, x, y, eps, config.pgd_steps) for eps in config.eps]
    few = model, dataset.x_test[: config.n_autoattack], dataset.y_test[: config.n_autoattack]
    judges = [_autoattack(Threat("linf", eps), cell.seed) for eps in config.judged_eps]
    return _Trained(
        training,
        dataset,
        right,
        pgd_examples,
        [right & _right(model, x_adv, y) for x_adv in pgd_examples],
        [_right(*few, judge) for judge in judges],
    )


@lru_cache(maxsize=8)  # of each seed, as the runner goes through all seeds of a setting
def _sgd(config: Config, seed: int, device: torch.device | str) -> _Trained:
    """The SGD network of a seed, which every other network is compared with."""
    return _train(config, Cell(SGD, seed, device))


def _right(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None = None) -> Tensor:
    """Which examples are classified rightly, and still are under an attack: (N,), bool."""
    return standing(model, x, y, attack or (lambda model, x, y: x))[1]


def _attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """The examples under PGD."""
    if not eps:
        return x
    attack = partial(pgd, model, threat=Threat("linf", eps), steps=steps)
    parts = zip(x.split(1000), y.split(1000), strict=True)
    return torch.cat([attack(inputs, labels) for inputs, labels in parts])


def _autoattack(threat: Threat, seed: int, attacks: Sequence[str] = GRADIENT_ATTACKS) -> Attack:
    """Some attacks of AutoAttack."""
    return partial(autoattack, threat=threat, attacks=attacks, seed=seed)


def run(config: Config, cell: Cell) -> Columns:
    """One network, trained and attacked.

    Returns:
        Single numbers: `train_loss` and `train_error` on the examples it was trained with,
        `test_loss` and `natural_error` on the whole test set; on the first `n_pgd` test examples,
        `input_gradient` (mean dual norm, of the cross-entropy) and, of those that are right, the
        medians `margin` and `distance` of `first_order_distance`, all for the maximum norm; `norm`
        of the weights; `sharpness` (of the cross-entropy of training, without attack).

        A row for each of `eps`: `pgd_error`; `transfer_error`, by the examples made on the SGD
        network; `common_pgd_error` and `common_sgd_pgd_error`, of this network and of SGD's among
        the `common` (a share) examples that both classify rightly.

        A row for each of `judged_eps`, on the first `n_autoattack` examples: `autoattack_error`
        (its gradient attacks), `pgd_error_judged` (the 50 steps and 5 restarts of `robustness`),
        `few_steps_error_judged` (10 steps, no restart), `common_autoattack_error` and
        `common_sgd_autoattack_error`.

        Single numbers, NaN but for SGD and SAM at `config.rho`: `square_error`, `whole_error` (all
        four attacks of AutoAttack), `doubted_autoattack_error` (its gradient attacks) and
        `doubted_pgd_error` (50 steps, 5 restarts) on the first `n_all_attacks` examples;
        `l2_pgd_error` and `l2_autoattack_error` on the first `n_autoattack`.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: an unknown method or data set, or more examples than there are.
    """
    sgd = _sgd(config, cell.seed, cell.device)
    here = sgd if cell.setting == SGD else _train(config, cell)
    training, dataset, recipe = here.training, here.dataset, config.recipe
    model, x, y = here.first(config.n_pgd)
    train_loss, train_error = evaluate(model, training.x, training.y)
    test_loss, natural_error = evaluate(model, dataset.x_test, dataset.y_test)
    margins, distances = _distances(model, x, y)
    thoroughly = cell.setting in (SGD, _setting("sam", config.rho))
    return {
        "train_loss": [train_loss],
        "train_error": [train_error],
        "test_loss": [test_loss],
        "natural_error": [natural_error],
        "input_gradient": [input_gradient(model, x, y)],
        "margin": [float(margins[here.right].median())],
        "distance": [float(distances[here.right].median())],
        "norm": [float(global_norm(list(model.parameters())))],
        "sharpness": [recipe.sharpness(training)],
        "eps": list(config.eps),
        "judged_eps": list(config.judged_eps),
        **_under_pgd(sgd, here, config),
        **_under_autoattack(sgd, here, config),
        **(_under_all_attacks(here, config, cell.seed) if thoroughly else _NOT_UNDER_ALL_ATTACKS),
    }


def _distances(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As `first_order_distance`, a part of the examples at a time."""
    pairs = zip(x.split(1000), y.split(1000), strict=True)
    parts = [first_order_distance(model, inputs, labels) for inputs, labels in pairs]
    margins, distances = zip(*parts, strict=True)
    return torch.cat(margins), torch.cat(distances)


def _error(right: Tensor, among: Tensor | None = None) -> float:
    """The share of examples that are not right, of all or of those in `among`; NaN of none."""
    right = right if among is None else right[among]
    return 1 - int(right.sum()) / len(right) if len(right) else math.nan


def _under_pgd(sgd: _Trained, here: _Trained, config: Config) -> Columns:
    common = sgd.right & here.right
    model, _, y = here.first(config.n_pgd)
    transferred = [here.right & _right(model, x_adv, y) for x_adv in sgd.pgd_examples]
    return {
        "pgd_error": [_error(right) for right in here.under_pgd],
        "transfer_error": [_error(right) for right in transferred],
        "common": [1 - _error(common)],
        "common_pgd_error": [_error(right, common) for right in here.under_pgd],
        "common_sgd_pgd_error": [_error(right, common) for right in sgd.under_pgd],
    }


def _under_autoattack(sgd: _Trained, here: _Trained, config: Config) -> Columns:
    examples = here.first(config.n_autoattack)
    common = (sgd.right & here.right)[: config.n_autoattack]
    threats = [Threat("linf", eps) for eps in config.judged_eps]
    light = [partial(pgd, threat=threat, steps=FEW_STEPS) for threat in threats]
    return {
        "autoattack_error": [_error(right) for right in here.under_autoattack],
        "common_autoattack_error": [_error(right, common) for right in here.under_autoattack],
        "common_sgd_autoattack_error": [_error(right, common) for right in sgd.under_autoattack],
        "pgd_error_judged": [_error(_right(*examples, strong(threat))) for threat in threats],
        "few_steps_error_judged": [_error(_right(*examples, attack)) for attack in light],
    }


def _under_all_attacks(here: _Trained, config: Config, seed: int) -> Columns:
    threat, euclidean = Threat("linf", config.judged_eps[0]), Threat("l2", config.l2_eps)
    few, more = here.first(config.n_all_attacks), here.first(config.n_autoattack)
    by_gradient = here.under_autoattack[0][: config.n_all_attacks]
    by_all = by_gradient.clone()
    if by_all.any():  # AutoAttack goes on with what its gradient attacks have left
        model, x, y = few
        others = _autoattack(threat, seed, OTHER_ATTACKS)
        by_all[by_gradient] = _right(model, x[by_gradient], y[by_gradient], others)
    return {
        "doubted_pgd_error": [_error(_right(*few, strong(threat)))],
        "square_error": [_error(_right(*few, _autoattack(threat, seed, ("square",))))],
        "doubted_autoattack_error": [_error(by_gradient)],
        "whole_error": [_error(by_all)],
        "l2_pgd_error": [_error(_right(*more, strong(euclidean)))],
        "l2_autoattack_error": [_error(_right(*more, _autoattack(euclidean, seed)))],
    }


_NOT_UNDER_ALL_ATTACKS: Columns = {
    name: [math.nan]
    for name in (
        *("doubted_pgd_error", "square_error", "doubted_autoattack_error", "whole_error"),
        *("l2_pgd_error", "l2_autoattack_error"),
    )
}


# --- what the runs say ----------------------------------------------------------------------------


def network(runs: SeedRuns, method: str, rho: float | None = None, share: float = 1.0) -> Run:
    """The run of one network.

    Args:
        rho: of SAM; that of the config unless given.

    Raises:
        ValueError: there is no such network.
    """
    if method != "sam":
        return runs.one(method=method, share=share)
    return runs.one(method=method, share=share, rho=runs.config["rho"] if rho is None else rho)


_BY_EPS = {
    "eps": ("pgd_error", "transfer_error", "common_pgd_error", "common_sgd_pgd_error"),
    "judged_eps": (
        "autoattack_error",
        "common_autoattack_error",
        "common_sgd_autoattack_error",
        "pgd_error_judged",
        "few_steps_error_judged",
    ),
}


def _at(run: Run, name: str, eps: float | None = None) -> float:
    """A column's entry at this eps, or its only one."""
    grid = next((run[grid] for grid, names in _BY_EPS.items() if name in names), None)
    if grid is None and eps is None:
        return run.value(name)
    if grid is None or eps is None:
        there = "no eps" if grid is None else f"an eps of {grid.tolist()}"
        raise ValueError(f"{name} takes {there}, got {eps}")
    which = np.flatnonzero(np.isclose(grid, eps, rtol=1e-5, atol=0))
    if len(which) != 1:
        raise ValueError(f"{name} takes an eps of {grid.tolist()}, got {eps}")
    return float(run[name][which[0]])


def against_rho(
    result: Result, name: str, eps: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A column against SAM's radius, SGD being 0.

    Args:
        name: a column of `run`.
        eps: for a column with a row for each eps, which one; among `judged_eps` for those under
            the stronger attacks.

    Returns:
        Radii (R,), ascending; values (seeds, R).

    Raises:
        ValueError: no such eps.
    """
    rhos = sorted(result.config["rhos"])
    values = [
        [
            _at(run, name, eps)
            for run in (network(runs, "sgd"), *(network(runs, "sam", rho) for rho in rhos))
        ]
        for runs in result.by_seed()
    ]
    return np.array([0.0, *rhos]), np.array(values)


def equal_accuracy(runs: SeedRuns, name: str, eps: float | None = None) -> float:
    """A column of SAM where its test error is that of SGD.

    Interpolated along SAM at the config's radius, from all training examples to few. If its error
    with all of them is larger than SGD's, or with the fewest still smaller, the nearer end.
    """
    along = [network(runs, "sam", share=share) for share in (1.0, *runs.config["shares"])]
    errors = np.array([run.value("natural_error") for run in along])
    values = np.array([_at(run, name, eps) for run in along])
    order = np.argsort(errors)
    wanted = network(runs, "sgd").value("natural_error")
    return float(np.interp(wanted, errors[order], values[order]))


def _small_eps(runs: SeedRuns) -> float:
    return float(runs.config["judged_eps"][0])


def _more_errors(runs: SeedRuns, method: str, other: str = "sam") -> float:
    """By how many points AutoAttack's error of one network lies above the other's, at the small
    eps."""
    one, two = (_at(network(runs, which), ROBUST, _small_eps(runs)) for which in (method, other))
    return 100 * (one - two)


def _over_sgd(runs: SeedRuns, name: str, method: str = "sam") -> float:
    """A single number of SAM, or of another network, over SGD's."""
    return network(runs, method).value(name) / network(runs, "sgd").value(name)


def _largest_excess(run: Run, name: str, other: str) -> float:
    """By how much a column lies above another with the same rows, most over all eps but 0."""
    grid = run["judged_eps" if name in _BY_EPS["judged_eps"] else "eps"]
    return float((run[name] - run[other])[grid > 0].max())


# --- what the runs decide -------------------------------------------------------------------------

ZHANG = Source("Zhang et al. 2024", "after")
ROBUST = "autoattack_error"  # under AutoAttack's two gradient attacks


@claim(ZHANG, low=0, unit="points", headline=True)
def sam_is_more_robust(runs: SeedRuns) -> float:
    """SAM, which never sees an attack, is more robust than SGD: by how much its error under
    AutoAttack at the small eps is smaller"""
    return _more_errors(runs, "sgd")


# A claim of no difference needs a margin: with 0 it could not be reproduced where it is true.
@claim(ZHANG, high=1, unit="points", set_after=True)
def clean_accuracy_is_kept(runs: SeedRuns) -> float:
    """SAM's robustness costs no more than a point of clean accuracy: by how much its test error is
    larger than SGD's"""
    sam, sgd = (network(runs, method).value("natural_error") for method in ("sam", "sgd"))
    return 100 * (sam - sgd)


@claim(OURS, low=0, unit="points")
def robustness_grows_with_rho(runs: SeedRuns) -> float:
    """SAM is more robust with a larger radius: by how much the error under AutoAttack at the small
    eps is smaller at the largest radius than at the smallest"""
    rhos, eps = runs.config["rhos"], _small_eps(runs)
    smallest, largest = (_at(network(runs, "sam", f(rhos)), ROBUST, eps) for f in (min, max))
    return 100 * (smallest - largest)


@claim(OURS, low=0, unit="points")
def at_equal_clean_accuracy(runs: SeedRuns) -> float:
    """SAM is more robust than SGD at equal test error too, which it has when trained on fewer
    examples: by how much its error under AutoAttack at the small eps is smaller"""
    eps = _small_eps(runs)
    return 100 * (_at(network(runs, "sgd"), ROBUST, eps) - equal_accuracy(runs, ROBUST, eps))


@claim(OURS, low=0, unit="points")
def on_common_examples(runs: SeedRuns) -> float:
    """SAM is more robust than SGD on the examples that both classify correctly too: by how much its
    error under AutoAttack at the small eps is smaller"""
    sam = network(runs, "sam")
    difference = sam["common_sgd_autoattack_error"] - sam["common_autoattack_error"]
    return 100 * float(difference[0])


@claim(OURS, low=0, unit="points")
def in_the_euclidean_norm(runs: SeedRuns) -> float:
    """SAM is more robust than SGD against attacks in the Euclidean norm too: by how much its error
    under AutoAttack is smaller"""
    sgd, sam = (network(runs, method).value("l2_autoattack_error") for method in ("sgd", "sam"))
    return 100 * (sgd - sam)


@claim(OURS, high=0.9, domain="positive")
def input_gradient_is_smaller(runs: SeedRuns) -> float:
    """SAM's input gradient is smaller than SGD's: mean dual norm, SAM's over SGD's"""
    return _over_sgd(runs, "input_gradient")


@claim(OURS, low=1.1, domain="positive")
def boundary_is_farther(runs: SeedRuns) -> float:
    """SAM's decision boundary is farther from the examples than SGD's, which a mere change of the
    scale of the logits could not bring about: distance to first order, median over correct
    examples, SAM's over SGD's"""
    return _over_sgd(runs, "distance")


@claim(CONTROL, low=0.95, domain="positive")
def weights_are_not_shorter(runs: SeedRuns) -> float:
    """SAM's weights are not shorter than SGD's: norm, SAM's over SGD's"""
    return _over_sgd(runs, "norm")


@claim(CONTROL, low=0, unit="points")
def decay_does_less(runs: SeedRuns) -> float:
    """Strong weight decay, which does not aim at sharpness, makes a network less robust than SAM
    does: by how much SAM's error under AutoAttack at the small eps is smaller"""
    return _more_errors(runs, "decay")


@claim(CONTROL, low=0, unit="points")
def blind_does_less(runs: SeedRuns) -> float:
    """Perturbations in random directions, many times as long as SAM's, make a network less robust
    than SAM does: by how much SAM's error under AutoAttack at the small eps is smaller"""
    return _more_errors(runs, "blind")


@claim(CONTROL, low=99, unit="%", domain="share")
def nobody_stands_a_large_eps(runs: SeedRuns) -> float:
    """SAM hides no gradient, as PGD breaks every example where eps is so large that no network can
    withstand it: error under PGD at the largest eps"""
    return 100 * float(network(runs, "sam")["pgd_error"][-1])


@claim(CONTROL, high=0, unit="points", headline=True)
def gradients_are_not_hidden(runs: SeedRuns) -> float:
    """Attacks that do not use the gradient of SAM's network break it no more often than PGD, which
    does: largest excess, over examples made on SGD's network at any eps and Square at the small
    eps"""
    sam = network(runs, "sam")
    square = sam.value("square_error") - sam.value("doubted_pgd_error")
    return 100 * max(square, _largest_excess(sam, "transfer_error", "pgd_error"))


@claim(CONTROL, high=2, unit="points")
def judges_agree(runs: SeedRuns) -> float:
    """Against SAM's network, AutoAttack finds at most two points more errors than PGD with
    restarts: largest excess at any judged eps"""
    return 100 * _largest_excess(network(runs, "sam"), ROBUST, "pgd_error_judged")


@claim(CONTROL, high=0, unit="points")
def two_attacks_of_four_are_enough(runs: SeedRuns) -> float:
    """Against SAM's network, FAB-T and Square add nothing to AutoAttack's gradient attacks: excess
    at the small eps"""
    sam = network(runs, "sam")
    return 100 * (sam.value("whole_error") - sam.value("doubted_autoattack_error"))


@claim(CONTROL, high=2, unit="points")
def steps_do_not_matter(runs: SeedRuns) -> float:
    """Against SAM's network, PGD with 50 steps and 5 restarts finds at most two points more errors
    than PGD with 10 steps: largest excess at any judged eps"""
    return 100 * _largest_excess(network(runs, "sam"), "pgd_error_judged", "few_steps_error_judged")


@claim(
    OURS,
    high=0.5,
    undefined="adversarial training was no more robust than SGD here",
    headline=True,
)
def far_from_adversarial_training(runs: SeedRuns) -> Ratio:
    """SAM alone has less than half of the robustness of adversarial training: share of the way from
    SGD's error under AutoAttack to that of adversarial training, at the larger eps"""
    sgd, sam, adversarial = (
        _at(network(runs, method), ROBUST, runs.config["judged_eps"][-1])
        for method in ("sgd", "sam", "adversarial")
    )
    return Ratio(sgd - sam, sgd - adversarial)


CLAIMS = [
    sam_is_more_robust,
    clean_accuracy_is_kept,
    robustness_grows_with_rho,
    at_equal_clean_accuracy,
    on_common_examples,
    in_the_euclidean_norm,
    input_gradient_is_smaller,
    boundary_is_farther,
    weights_are_not_shorter,
    decay_does_less,
    blind_does_less,
    nobody_stands_a_large_eps,
    gradients_are_not_hidden,
    judges_agree,
    two_attacks_of_four_are_enough,
    steps_do_not_matter,
    far_from_adversarial_training,
]

EXPERIMENT = Experiment(
    name="duality",
    title="The robustness of SAM without adversarial training",
    source="Zhang et al. 2024 (arXiv:2402.15152)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
    needs=["pyautoattack"],
)
