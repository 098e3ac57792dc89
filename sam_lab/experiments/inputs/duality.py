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

No number rests on one attack. On all `tested` examples there is PGD; on the first `judged` of them
a stronger PGD and the two attacks of AutoAttack that follow gradients (APGD on the cross-entropy,
targeted APGD on the difference of logits), pointwise worst; on the first `doubted`, for SGD and SAM
at one radius, the whole AutoAttack, with FAB-T and Square. Where a network only *hides* its
gradient (Athalye et al. 2018), an attack that needs none is stronger than PGD: Square, or examples
made on the SGD network and shown to this one.

Whether an attack succeeds depends on the logits' order, not on their scale. So the input gradient
alone says little; the distance to the boundary to first order, margin over gradient, is free of the
scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_lab import data
from sam_lab.adversarial import AUTOATTACK, Attack, Threat, autoattack, pgd, standing
from sam_lab.experiments import networks
from sam_lab.experiments.core import Claim, Criterion, Experiment, Result, Run
from sam_lab.experiments.robustness import GRADIENT_ATTACKS, input_gradient, strong
from sam_lab.experiments.statistics import each_seed
from sam_lab.perturbations import global_norm, random_direction
from sam_lab.state import evaluating
from sam_lab.training import Phase, Training, cosine, crop_and_flip, evaluate

__all__ = [
    "Config",
    "against_rho",
    "equal_accuracy",
    "first_order_distance",
    "network",
    "prepare",
    "run",
    "settings",
    "share_of_the_way",
    "stands",
]

ZHANG = "Zhang et al. 2024"
HERE = "this book"
CONTROL = "control"

FEW_STEPS = 10
OTHER_ATTACKS = AUTOATTACK[len(GRADIENT_ATTACKS) :]

SGD: dict[str, Any] = {"method": "sgd", "rho": 0.0, "share": 1.0}
METHODS = ("sgd", "sam", "blind", "decay", "adversarial")


@dataclass(frozen=True)
class Config:
    """What is run. Inputs are pixels in [0, 1], and so are all eps.

    Attributes:
        data, train, test: the data set, and how many examples of it.
        hidden: widths of a fully connected network's hidden layers; empty for a wide residual
            network, behind `models.Normalize`.
        depth, width, stride: of the wide residual network.
        augment: whether images are shifted and mirrored.
        epochs, batch, lr, momentum, weight_decay: of SGD, the rate along half a cosine.
        rhos: radii of SAM, ascending; `rho`: the one of them that is compared with the rest.
        shares: of the training examples, for SAM at `rho` to have SGD's test error.
        blind: radius of the perturbation in a random direction.
        decay: the strong weight decay.
        attack_eps, attack_steps: of PGD in adversarial training.
        tested: test examples that PGD attacks, in `steps` steps, at each of `eps`.
        judged: of them, those that stronger attacks see, at each of `judged_eps`.
        doubted: of them, those that attacks without a gradient see, at the first of `judged_eps`.
        l2_eps: radius in the Euclidean norm, for SGD and SAM at `rho`.
        measured: training examples over which the Hessian is taken, to the relative residual `tol`.
    """

    data: str
    train: int
    test: int
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
    hidden: tuple[int, ...] = ()
    depth: int = 10
    width: int = 1
    stride: int = 1
    augment: bool = False
    epochs: int = 20
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    tested: int = 1000
    steps: int = 20
    judged: int = 150
    doubted: int = 50
    measured: int = 1000
    tol: float = 2e-2


LAPTOP = Config(
    data="mnist_5k",
    train=4000,
    test=1000,
    hidden=(200, 200),
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
    data="cifar10",
    train=5000,
    test=2000,
    stride=2,
    epochs=20,
    weight_decay=5e-4,
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
    tested=500,
    steps=10,
    judged=100,
    doubted=50,
    measured=500,
    tol=0.1,
)
# The radii of the attacks are those of the evaluation that Zhang et al. released.
PAPER = dataclasses.replace(
    DESKTOP,
    train=50_000,
    test=10_000,
    depth=16,
    width=8,
    stride=1,
    augment=True,
    epochs=100,
    rhos=(0.1, 0.2, 0.3, 0.4, 0.5),
    attack_steps=5,
    judged_eps=(1 / 255, 2 / 255),
    l2_eps=32 / 255,
    tested=10_000,
    steps=20,
    judged=1000,
    doubted=1000,
    measured=5000,
    tol=5e-2,
)


def settings(config: Config) -> list[dict[str, Any]]:
    """The networks: which method, its radius, and the share of the training examples it gets.

    Raises:
        ValueError: `rho` is none of `rhos`.
    """
    if config.rho not in config.rhos:
        raise ValueError(f"rho must be one of rhos {config.rhos}, got {config.rho}")
    return [
        dict(SGD),
        *({**SGD, "method": "sam", "rho": rho} for rho in config.rhos),
        *({**SGD, "method": "sam", "rho": config.rho, "share": share} for share in config.shares),
        {**SGD, "method": "blind", "rho": config.blind},
        {**SGD, "method": "decay"},
        {**SGD, "method": "adversarial"},
    ]


def prepare(
    config: Config, setting: dict[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Training, data.Dataset]:
    """A network before its first epoch, and the data (all of the training set).

    Raises:
        ValueError: an unknown method or data set, or more examples than there are.
    """
    found = data.load(config.data, train=config.train, test=config.test, seed=seed, device=device)
    net = networks.build(config, found, seed, device)
    how: dict[str, Any] = {"rho": setting["rho"]}
    method = setting["method"]
    if method == "blind":
        how["rule"] = random_direction
    elif method == "adversarial":
        threat = Threat("linf", config.attack_eps)
        how["attack"] = partial(pgd, threat=threat, steps=config.attack_steps)
    elif method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    optimizer = partial(
        torch.optim.SGD,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.decay if method == "decay" else config.weight_decay,
    )
    few = slice(round(setting["share"] * len(found.x)))
    training = Training(
        net if config.hidden else networks.normalized(net, found),
        found.x[few],
        found.y[few],
        optimizer,
        [Phase(0, config.epochs, **how)],
        batch=config.batch,
        schedule=cosine,
        augment=crop_and_flip() if config.augment else None,
        seed=seed,
    )
    return training, found


# --- what is measured -----------------------------------------------------------------------------


def stands(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
    """Which examples (N, ...) are classified rightly, and still are under an attack: (N,), bool."""
    return standing(model, x, y, attack)[1]


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which examples are classified rightly: (N,), bool."""
    return stands(model, x, y, lambda model, x, y: x)


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
    """A network at its end, and which test examples stand under which attack."""

    training: Training
    found: data.Dataset
    right: Tensor  # (tested,)
    attacked: list[Tensor]  # the tested examples under PGD, at each eps
    stands: list[Tensor]  # (tested,) under it
    survives: list[Tensor]  # (judged,) under AutoAttack's gradient attacks, at each judged eps


def _train(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> _Trained:
    training, found = prepare(config, setting, seed, device)
    training.run(on_epoch=lambda: progress(training.epoch, training.epochs))
    model, x, y = training.model, found.x_test[: config.tested], found.y_test[: config.tested]
    attacked = [_pgd(model, x, y, eps, config) for eps in config.eps]
    right = _right(model, x, y)
    return _Trained(
        training,
        found,
        right,
        attacked,
        [right & _right(model, x_adv, y) for x_adv in attacked],
        [
            _judged(model, found, config, Threat("linf", eps), GRADIENT_ATTACKS, seed)
            for eps in config.judged_eps
        ],
    )


def _pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, config: Config) -> Tensor:
    if not eps:
        return x
    attack = partial(pgd, model, threat=Threat("linf", eps), steps=config.steps)
    parts = zip(x.split(1000), y.split(1000), strict=True)
    return torch.cat([attack(inputs, labels) for inputs, labels in parts])


def _judged(
    model: nn.Module,
    found: data.Dataset,
    config: Config,
    threat: Threat,
    attacks: tuple[str, ...],
    seed: int,
) -> Tensor:
    """Which of the judged examples stand under some of AutoAttack's attacks: (judged,)."""
    few = slice(config.judged)
    judge = partial(autoattack, threat=threat, attacks=attacks, seed=seed)
    return stands(model, found.x_test[few], found.y_test[few], judge)


@lru_cache(maxsize=8)  # of each seed, as the runner goes through all seeds of a setting
def _sgd(config: Config, seed: int, device: torch.device | str) -> _Trained:
    """The SGD network of a seed, which every other network is compared with."""
    return _train(config, SGD, seed, device)


def run(
    config: Config,
    setting: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """One network, trained and attacked.

    Returns:
        Single numbers: `train_loss` and `train_error` on the examples it was trained with,
        `test_loss` and `natural_error` on the whole test set; on the tested examples,
        `input_gradient` (mean dual norm, of the cross-entropy) and, of those that are right, the
        medians `margin` and `distance` of `first_order_distance`, all for the maximum norm; `norm`
        of the weights; `sharpness` (of the cross-entropy of training, without attack).

        A row for each of `eps`: `pgd_error`; `transfer_error`, by the examples made on the SGD
        network; `common_pgd_error` and `common_sgd_pgd_error`, of this network and of SGD's among
        the `common` (a share) examples that both classify rightly.

        A row for each of `judged_eps`, on the judged examples: `autoattack_error` (its gradient
        attacks), `pgd_error_judged` (the 50 steps and 5 restarts of `robustness`),
        `few_steps_error_judged` (10 steps, no restart), `common_autoattack_error` and
        `common_sgd_autoattack_error`.

        Single numbers, NaN but for SGD and SAM at `config.rho`: `square_error`, `whole_error` (all
        four attacks of AutoAttack), `doubted_autoattack_error` (its gradient attacks) and
        `doubted_pgd_error` (50 steps, 5 restarts) on the doubted examples; `l2_pgd_error` and
        `l2_autoattack_error` on the judged ones.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: an unknown method or data set, or more examples than there are.
    """
    sgd = _sgd(config, seed, device)
    here = sgd if setting == SGD else _train(config, setting, seed, device, progress)
    training, found, model = here.training, here.found, here.training.model
    x, y = found.x_test[: config.tested], found.y_test[: config.tested]
    train_loss, train_error = evaluate(model, training.x, training.y)
    test_loss, natural_error = evaluate(model, found.x_test, found.y_test)
    margins, distances = _distances(model, x, y)
    columns: dict[str, list[float]] = {
        "train_loss": [train_loss],
        "train_error": [train_error],
        "test_loss": [test_loss],
        "natural_error": [natural_error],
        "input_gradient": [input_gradient(model, x, y)],
        "margin": [float(margins[here.right].median())],
        "distance": [float(distances[here.right].median())],
        "norm": [float(global_norm(list(model.parameters())))],
        "sharpness": [_sharpness(training, config)],
        "eps": list(config.eps),
        "judged_eps": list(config.judged_eps),
    }
    columns |= _on_tested(sgd, here, y)
    columns |= _on_judged(sgd, here, config)
    columns |= _on_doubted(here, config, seed, thorough=setting in _doubted(config))
    return columns


def _doubted(config: Config) -> list[dict[str, Any]]:
    return [SGD, {**SGD, "method": "sam", "rho": config.rho}]


def _distances(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    parts = zip(x.split(1000), y.split(1000), strict=True)
    found = [first_order_distance(model, inputs, labels) for inputs, labels in parts]
    margins, distances = zip(*found, strict=True)
    return torch.cat(margins), torch.cat(distances)


def _sharpness(training: Training, config: Config) -> float:
    """The top eigenvalue of the Hessian over the measured examples, in evaluation mode."""
    few = slice(config.measured)
    found = networks.hessian(training.model, training.x[few], training.y[few])
    return float(found.top(tol=config.tol).values[0])


def _error(standing: Tensor, among: Tensor | None = None) -> float:
    """The share of examples that do not stand, of all or of those in `among`; NaN of none."""
    standing = standing if among is None else standing[among]
    return 1 - int(standing.sum()) / len(standing) if len(standing) else math.nan


def _on_tested(sgd: _Trained, here: _Trained, y: Tensor) -> dict[str, list[float]]:
    common = sgd.right & here.right
    model = here.training.model
    transferred = [here.right & _right(model, x_adv, y) for x_adv in sgd.attacked]
    return {
        "pgd_error": [_error(s) for s in here.stands],
        "transfer_error": [_error(s) for s in transferred],
        "common": [1 - _error(common)],
        "common_pgd_error": [_error(s, common) for s in here.stands],
        "common_sgd_pgd_error": [_error(s, common) for s in sgd.stands],
    }


def _on_judged(sgd: _Trained, here: _Trained, config: Config) -> dict[str, list[float]]:
    few = slice(config.judged)
    common = (sgd.right & here.right)[few]
    model, x, y = here.training.model, here.found.x_test[few], here.found.y_test[few]
    columns: dict[str, list[float]] = {
        "autoattack_error": [_error(s) for s in here.survives],
        "common_autoattack_error": [_error(s, common) for s in here.survives],
        "common_sgd_autoattack_error": [_error(s, common) for s in sgd.survives],
    }
    threats = [Threat("linf", eps) for eps in config.judged_eps]
    for name, attacks in (
        ("pgd_error_judged", [strong(threat) for threat in threats]),
        (
            "few_steps_error_judged",
            [partial(pgd, threat=threat, steps=FEW_STEPS) for threat in threats],
        ),
    ):
        columns[name] = [_error(stands(model, x, y, attack)) for attack in attacks]
    return columns


_ON_DOUBTED = ("doubted_pgd_error", "square_error", "doubted_autoattack_error", "whole_error")
_IN_L2 = ("l2_pgd_error", "l2_autoattack_error")


def _on_doubted(
    here: _Trained, config: Config, seed: int, *, thorough: bool
) -> dict[str, list[float]]:
    if not thorough:
        return {name: [math.nan] for name in (*_ON_DOUBTED, *_IN_L2)}
    model, few = here.training.model, slice(config.doubted)
    x, y = here.found.x_test[few], here.found.y_test[few]
    threat = Threat("linf", config.judged_eps[0])
    judge = partial(autoattack, threat=threat, seed=seed)
    whole = here.survives[0][few].clone()
    if whole.any():  # AutoAttack goes on with what its first attacks have left
        whole[whole.clone()] = stands(
            model, x[whole], y[whole], partial(judge, attacks=OTHER_ATTACKS)
        )
    euclidean = Threat("l2", config.l2_eps)
    judged = here.found.x_test[: config.judged], here.found.y_test[: config.judged]
    standing = (
        stands(model, x, y, strong(threat)),
        stands(model, x, y, partial(judge, attacks=("square",))),
        here.survives[0][few],
        whole,
        stands(model, *judged, strong(euclidean)),
        _judged(model, here.found, config, euclidean, GRADIENT_ATTACKS, seed),
    )
    names = (*_ON_DOUBTED, *_IN_L2)
    return {name: [_error(s)] for name, s in zip(names, standing, strict=True)}


# --- what the runs decide -------------------------------------------------------------------------


def network(
    result: Result, seed: int, method: str, rho: float | None = None, share: float = 1.0
) -> Run:
    """The run of one network.

    Args:
        rho: of SAM; that of the config unless given.

    Raises:
        ValueError: there is no such network.
    """
    wanted: dict[str, Any] = {"method": method, "share": share}
    if method == "sam":
        wanted["rho"] = result.config["rho"] if rho is None else rho
    return result.select(seed=seed, **wanted)[0]


def against_rho(
    result: Result, name: str, eps: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A column against SAM's radius, SGD being 0.

    Args:
        name: a column of `run`.
        eps: for a column with a row for each eps, which one; among `judged_eps` for those on the
            judged examples.

    Returns:
        Radii (R,), ascending; values (seeds, R).

    Raises:
        ValueError: no such eps.
    """
    rhos = sorted(result.config["rhos"])
    runs = [
        [network(result, seed, "sgd"), *(network(result, seed, "sam", rho) for rho in rhos)]
        for seed in result.seeds
    ]
    values = [[_at(run, name, eps) for run in of_seed] for of_seed in runs]
    return np.array([0.0, *rhos]), np.array(values)


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
    column = run[name]
    grid = next((run[grid] for grid, names in _BY_EPS.items() if name in names), None)
    if grid is None and eps is None:
        return float(column[0])
    if grid is None or eps is None:
        there = "no eps" if grid is None else f"an eps of {grid.tolist()}"
        raise ValueError(f"{name} takes {there}, got {eps}")
    which = np.flatnonzero(np.isclose(grid, eps, rtol=1e-5, atol=0))
    if len(which) != 1:
        raise ValueError(f"{name} takes an eps of {grid.tolist()}, got {eps}")
    return float(column[which[0]])


def equal_accuracy(result: Result, seed: int, name: str, eps: float | None = None) -> float:
    """A column of SAM where its test error is that of SGD.

    Interpolated along SAM at the config's radius, from all training examples to few. If its error
    with all of them is larger than SGD's, or with the fewest still smaller, the nearer end.
    """
    share = [1.0, *result.config["shares"]]
    runs = [network(result, seed, "sam", share=s) for s in share]
    errors = np.array([float(run["natural_error"][0]) for run in runs])
    values = np.array([_at(run, name, eps) for run in runs])
    order = np.argsort(errors)
    wanted = float(network(result, seed, "sgd")["natural_error"][0])
    return float(np.interp(wanted, errors[order], values[order]))


def _points(
    name: str, one: tuple[Any, ...], two: tuple[Any, ...]
) -> Callable[[Result], list[float]]:
    """By how many points a column of one network lies above another's, at the small eps."""

    def at(result: Result, seed: int) -> float:
        first, second = (network(result, seed, *which) for which in (one, two))
        eps = result.config["judged_eps"][0] if name in _BY_EPS["judged_eps"] else None
        return 100 * (_at(first, name, eps) - _at(second, name, eps))

    return each_seed(at)


def _ratio(name: str, method: str = "sam") -> Callable[[Result], list[float]]:
    """A single number of SAM, or of another network, over SGD's."""

    def at(result: Result, seed: int) -> float:
        other, sgd = (network(result, seed, which) for which in (method, "sgd"))
        return _at(other, name) / _at(sgd, name)

    return each_seed(at)


def _within_sam(statistic: Callable[[Run], float]) -> Callable[[Result], list[float]]:
    """A statistic of SAM at the config's radius alone, a share, in per cent."""
    return each_seed(lambda result, seed: 100 * statistic(network(result, seed, "sam")))


def _largest(one: str, two: str) -> Callable[[Run], float]:
    """The largest difference between two columns with the same rows, over all eps but 0."""

    def at(run: Run) -> float:
        grid = run["judged_eps" if one in _BY_EPS["judged_eps"] else "eps"]
        return float((run[one] - run[two])[grid > 0].max())

    return at


def _without_gradient(run: Run) -> float:
    """By how much attacks that do not use the network's gradient exceed PGD."""
    square = float(run["square_error"][0] - run["doubted_pgd_error"][0])
    return max(square, _largest("transfer_error", "pgd_error")(run))


def _growth(result: Result, seed: int) -> float:
    """By how many points the smallest radius lies above the largest."""
    ends = min(result.config["rhos"]), max(result.config["rhos"])
    eps = result.config["judged_eps"][0]
    one, two = (_at(network(result, seed, "sam", rho), "autoattack_error", eps) for rho in ends)
    return 100 * (one - two)


def _at_equal_accuracy(result: Result, seed: int) -> float:
    """By how many points SGD lies above SAM of equal clean accuracy."""
    name, eps = "autoattack_error", result.config["judged_eps"][0]
    sgd = _at(network(result, seed, "sgd"), name, eps)
    return 100 * (sgd - equal_accuracy(result, seed, name, eps))


def _on_common(result: Result, seed: int) -> float:
    """The same among the examples that both classify rightly."""
    sam = network(result, seed, "sam")
    difference = sam["common_sgd_autoattack_error"] - sam["common_autoattack_error"]
    return 100 * float(difference[0])


def share_of_the_way(result: Result, seed: int, eps: float) -> float:
    """How far SAM comes from SGD (0) to adversarial training (1), in AutoAttack's errors.

    Args:
        eps: among `judged_eps`.
    """
    sgd, sam, adversarial = (
        _at(network(result, seed, method), "autoattack_error", eps)
        for method in ("sgd", "sam", "adversarial")
    )
    return (sgd - sam) / (sgd - adversarial)


SAM, PLAIN = ("sam",), ("sgd",)

CLAIMS = [
    Claim(
        "sam-is-more-robust",
        "SAM, which never saw an attack, is more robust than SGD: AutoAttack's errors at the small "
        "eps, how many fewer",
        ZHANG,
        "points",
        _points("autoattack_error", PLAIN, SAM),
        Criterion(low=0.0),
    ),
    Claim(
        "clean-accuracy-is-kept",
        "It costs no clean accuracy: by how much SAM's test error is larger than SGD's",
        ZHANG,
        "points",
        _points("natural_error", SAM, PLAIN),
        Criterion(high=0.0),
    ),
    Claim(
        "robustness-grows-with-rho",
        "The larger the radius, the fewer errors under attack: how many fewer at the largest than "
        "at the smallest",
        HERE,
        "points",
        each_seed(_growth),
        Criterion(low=0.0),
    ),
    Claim(
        "at-equal-clean-accuracy",
        "Also where its test error is SGD's, as it was trained on fewer examples: how many fewer",
        HERE,
        "points",
        each_seed(_at_equal_accuracy),
        Criterion(low=0.0),
    ),
    Claim(
        "on-common-examples",
        "Also among the examples that both classify rightly: how many fewer",
        HERE,
        "points",
        each_seed(_on_common),
        Criterion(low=0.0),
    ),
    Claim(
        "in-the-euclidean-norm",
        "Also against attacks in the Euclidean norm: how many fewer",
        HERE,
        "points",
        _points("l2_autoattack_error", PLAIN, SAM),
        Criterion(low=0.0),
    ),
    Claim(
        "input-gradient-is-smaller",
        "SAM's input gradient is smaller than SGD's: mean dual norm, ratio",
        HERE,
        "",
        _ratio("input_gradient"),
        Criterion(high=0.9),
    ),
    Claim(
        "boundary-is-farther",
        "That is not the scale of its logits: the distance to the boundary to first order, which "
        "has no scale, is larger: median over the examples that are right, ratio",
        HERE,
        "",
        _ratio("distance"),
        Criterion(low=1.1),
    ),
    Claim(
        "weights-are-not-shorter",
        "Nor are its weights shorter than SGD's: norm, ratio",
        CONTROL,
        "",
        _ratio("norm"),
        Criterion(low=0.95),
    ),
    Claim(
        "decay-does-less",
        "Strong weight decay, which knows nothing of sharpness, does less: how many errors fewer "
        "SAM has",
        CONTROL,
        "points",
        _points("autoattack_error", ("decay",), SAM),
        Criterion(low=0.0),
    ),
    Claim(
        "decay-is-not-flatter",
        "Nor is weight decay SAM in disguise, it ends sharper than SGD: sharpness, ratio",
        CONTROL,
        "",
        _ratio("sharpness", "decay"),
        Criterion(low=1.0),
    ),
    Claim(
        "blind-does-less",
        "A perturbation in random directions, at many times the radius, does less: how many errors "
        "fewer SAM has",
        CONTROL,
        "points",
        _points("autoattack_error", ("blind",), SAM),
        Criterion(low=0.0),
    ),
    Claim(
        "nobody-stands-a-large-eps",
        "SAM hides no gradient: where eps is so large that nothing can stand, PGD breaks all",
        CONTROL,
        "%",
        _within_sam(lambda run: float(run["pgd_error"][-1])),
        Criterion(low=99.0),
    ),
    Claim(
        "gradients-are-not-hidden",
        "Attacks without its gradient break it no more often than its own PGD does: excess of "
        "examples made on SGD's network, at any eps, and of Square at the small one, the larger",
        CONTROL,
        "points",
        _within_sam(_without_gradient),
        Criterion(high=0.0),
    ),
    Claim(
        "judges-agree",
        "AutoAttack finds at most two points more than PGD with restarts: excess at any judged eps",
        CONTROL,
        "points",
        _within_sam(_largest("autoattack_error", "pgd_error_judged")),
        Criterion(high=2.0),
    ),
    Claim(
        "two-attacks-of-four-are-enough",
        "FAB-T and Square add nothing to AutoAttack's gradient attacks: excess at the small eps",
        CONTROL,
        "points",
        _within_sam(lambda run: float(run["whole_error"][0] - run["doubted_autoattack_error"][0])),
        Criterion(high=0.0),
    ),
    Claim(
        "steps-do-not-matter",
        "50 steps and 5 restarts find at most two points more than 10 steps: excess at any judged "
        "eps",
        CONTROL,
        "points",
        _within_sam(_largest("pgd_error_judged", "few_steps_error_judged")),
        Criterion(high=2.0),
    ),
    Claim(
        "far-from-adversarial-training",
        "SAM is far from adversarial training: share of the way from SGD, in AutoAttack's errors "
        "at the larger eps",
        HERE,
        "",
        each_seed(
            lambda result, seed: share_of_the_way(result, seed, result.config["judged_eps"][-1])
        ),
        Criterion(high=0.5),
    ),
]

EXPERIMENT = Experiment(
    name="duality",
    title="The robustness of SAM without adversarial training",
    source="Zhang et al. 2024 (arXiv:2402.15152)",
    presets={"laptop": LAPTOP, "desktop": DESKTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=CLAIMS,
)
