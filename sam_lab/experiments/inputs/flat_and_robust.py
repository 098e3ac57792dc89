r"""Is a network that is flat in its weights robust to changes of its inputs?

Sharpness can be compared only where two things are equal. The loss: the curvature of cross-entropy
vanishes with it. And the scale of the weights: in a ReLU network one layer can be multiplied by a
number and the next divided by it, which changes the Hessian's top eigenvalue and no prediction.
Here every network is measured twice, *at equal loss* (at the first step after which the objective
of training lies below a common level) and at the end; all are trained with smoothed labels, whose
loss does not vanish; and beside the top eigenvalue of the Hessian $H$ stands that of $T H T$,
with $T = |w|$ elementwise, which no such rescaling changes.

The networks of a seed share data, initial weights and the order of the examples:

- ``sgd``; ``sam`` at several radii; ``decay``, SGD with strong weight decay, which knows nothing of
  sharpness; ``adversarial``, PGD on the examples, the yardstick.
- ``own``: SAM with a ball for every example. The theory of the duality speaks of the gradients of
  single examples. SAM lowers the norm of the mean gradient of a batch, which can be short while the
  single ones are long; here each example has a perturbation of its own, $\rho\, g_i / \|g_i\|$.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from sam_lab.adversarial import Threat, autoattack, pgd, robust_accuracy
from sam_lab.curvature import Hessian
from sam_lab.data import Dataset
from sam_lab.experiments.inputs.robustness import GRADIENT_ATTACKS, input_gradient
from sam_lab.experiments.lab.claims import CONTROL, OURS, Claim, Source, claim
from sam_lab.experiments.lab.experiment import Cell, Experiment
from sam_lab.experiments.lab.result import Columns, Result, Rows, Run, SeedRuns, Setting
from sam_lab.experiments.recipe import CIFAR, DIGITS, Recipe, hessian
from sam_lab.perturbations import global_norm
from sam_lab.state import evaluating
from sam_lab.training import LossFn, Phase, Training, cosine, evaluate

__all__ = [
    "AT_END",
    "AT_EQUAL_LOSS",
    "Config",
    "OwnBalls",
    "example_gradients",
    "least",
    "network",
    "prepare",
    "relative_hessian",
    "run",
    "settings",
    "values",
]

AT_EQUAL_LOSS, AT_END = 0, 1
"""The two moments at which a network is measured: rows of its columns."""
EVERY = 4  # steps from one look at the loss to the next
METHODS = ("sgd", "sam", "own", "decay", "adversarial")


@dataclass(frozen=True)
class Config:
    """What is run. Inputs are pixels in [0, 1], and so are all eps.

    Attributes:
        recipe: data, network and SGD; the learning rate goes along half a cosine.
        smoothing: of the labels.
        level: the loss, above the least that smoothed labels allow, at which networks are compared.
        rhos: radii of SAM; `rho` is the one of them that is compared with the rest.
        own_rho: radius of SAM with a ball for every example, one of `rhos`, with which it is
            compared; None for none.
        decays: weight decays; `decay` is the one of them that is compared with the rest.
        eps: radius of the attack that judges, in the maximum norm.
        attack_eps, attack_steps: of PGD in adversarial training.
        pgd_steps: of PGD at both moments, on all test examples.
        n_autoattack: test examples that AutoAttack's two gradient attacks see at the end.
        chunk: single examples whose gradients are held at a time.
    """

    recipe: Recipe
    smoothing: float = 0.1
    level: float = 0.2
    rho: float = 0.2
    rhos: tuple[float, ...] = (0.05, 0.2)
    own_rho: float | None = 0.05
    decay: float = 1e-2
    decays: tuple[float, ...] = (1e-2,)
    eps: float = 0.05
    attack_eps: float = 0.1
    attack_steps: int = 5
    pgd_steps: int = 20
    n_autoattack: int = 150
    chunk: int = 50


LAPTOP = Config(DIGITS.but(epochs=20, lr=0.1, weight_decay=0.0, tol=2e-2))
PAPER = Config(
    CIFAR.but(standardize="network", measured=5000),
    rhos=(0.1, 0.2, 0.3, 0.4, 0.5),
    own_rho=None,
    decay=5e-3,
    decays=(2e-3, 5e-3),
    eps=1 / 255,
    attack_eps=2 / 255,
    n_autoattack=1000,
    chunk=10,
)


def _setting(method: str, rho: float = 0.0, decay: float = 0.0) -> Setting:
    return {"method": method, "rho": rho, "decay": decay}


def settings(config: Config) -> list[Setting]:
    """The networks: which method, its radius, and its weight decay.

    Raises:
        ValueError: `rho` or `own_rho` is none of `rhos`, or `decay` none of `decays`.
    """
    if not {config.rho, config.own_rho or config.rho} <= {*config.rhos}:
        raise ValueError(
            f"rho and own_rho must be among rhos {config.rhos}, "
            f"got {config.rho} and {config.own_rho}"
        )
    if config.decay not in config.decays:
        raise ValueError(f"decay must be one of decays {config.decays}, got {config.decay}")
    return [
        _setting("sgd"),
        *(_setting("sam", rho=rho) for rho in config.rhos),
        *([] if config.own_rho is None else [_setting("own", rho=config.own_rho)]),
        *(_setting("decay", decay=decay) for decay in config.decays),
        _setting("adversarial"),
    ]


def least(smoothing: float, classes: int) -> float:
    """The least cross-entropy that smoothed labels allow: their own entropy."""
    wrong = smoothing / classes
    targets = [1 - smoothing + wrong] + [wrong] * (classes - 1)
    return -math.fsum(t * math.log(t) for t in targets if t > 0)


def prepare(config: Config, cell: Cell) -> tuple[Training, Dataset]:
    """A network before its first epoch, and the data.

    Raises:
        ValueError: an unknown method or data set, or more examples than there are.
    """
    recipe, method = config.recipe, cell["method"]
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    how: dict[str, Any] = {"rho": cell["rho"] if method == "sam" else 0.0}
    if method == "adversarial":
        threat = Threat("linf", config.attack_eps)
        how["attack"] = partial(pgd, threat=threat, steps=config.attack_steps)
    elif method == "decay":
        recipe = recipe.but(weight_decay=cell["decay"])
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    if method == "own":
        how["attack"] = OwnBalls(cell["rho"], loss_fn)
    return recipe.training(
        cell.seed,
        cell.device,
        phases=[Phase(0, recipe.epochs, **how)],
        schedule=cosine,
        loss_fn=loss_fn,
    )


class OwnBalls:
    r"""SAM with a ball for every example, for a network whose only parameters are linear layers.

    What a `Phase` calls an attack: it leaves the inputs as they are, and has the next pass in
    training mode see each example through weights of its own, $w + \rho\, g_i / \|g_i\|$, with the
    example's gradient $g_i$. In a layer $z = W a + b$ that is a change of rank one, since
    $\nabla_W \ell_i = \delta_i a_i^\top$ and $\nabla_b \ell_i = \delta_i$: so that a step takes
    two passes, as with SAM, however many examples there are.

    Args:
        rho: radius, at least 0.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch.

    It hooks into the layers of the model that it is first called with, and is for that one alone.
    In evaluation mode nothing is changed.
    """

    def __init__(self, rho: float, loss_fn: LossFn) -> None:
        self._rho, self._loss_fn = rho, loss_fn
        self._model: nn.Module | None = None
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
        self._moves: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def _hook_into(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        covered = {p for layer in layers for p in layer.parameters()}
        if covered != set(model.parameters()):
            raise ValueError("own balls need a model all of whose parameters are in linear layers")
        for layer in layers:
            layer.register_forward_hook(self._hook)
        self._model = model

    def _hook(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._seen is not None:
            self._seen[layer] = inputs[0].detach(), output
        elif layer.training and layer in self._moves:
            a, delta = self._moves[layer]
            return output + delta * ((a * inputs[0]).sum(1, keepdim=True) + 1)
        return None

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The inputs as they are; what changes is what the model's next passes do with them.

        Raises:
            ValueError: the model has parameters beside those of linear layers, or is another one
                than before.
        """
        if self._model is None:
            self._hook_into(model)
        if self._model is not model:
            raise ValueError("own balls are for one model, and were called with another")
        self._seen = {}
        try:
            with torch.enable_grad():
                loss = self._loss_fn(model(x), y) * len(x)
                outputs = [output for _, output in self._seen.values()]
                deltas = torch.autograd.grad(loss, outputs)
            inputs = [a for a, _ in self._seen.values()]
            layers = list(self._seen)
        finally:
            self._seen = None
        pairs = list(zip(inputs, deltas, strict=True))
        # the bias is a weight whose input is 1
        squares = [(d * d).sum(1) * ((a * a).sum(1) + 1) for a, d in pairs]
        norm = torch.stack(squares).sum(0).sqrt()
        scale = torch.where(norm > 0, self._rho / norm, 0.0)[:, None]
        moved = [(a, scale * d) for a, d in pairs]
        self._moves = dict(zip(layers, moved, strict=True))
        return x


# --- what is measured -----------------------------------------------------------------------------


def relative_hessian(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Hessian:
    r"""$T H T$ with $T = \mathrm{diag}(w)$: the Hessian of the mean loss in relative changes of the
    parameters, at the present ones.

    Its eigenvalues stay the same where a unit's incoming weights and bias are multiplied by a
    positive number and its outgoing weights divided by it, which in a ReLU network changes no
    prediction. Puts the model into evaluation mode.

    Source: the adaptive sharpness of Kwon et al. 2021 (arXiv:2102.11600), to second order.
    """
    model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    changes = {name: torch.zeros_like(p, requires_grad=True) for name, p in weights.items()}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        changed = {name: p * (1 + changes[name]) for name, p in weights.items()}
        return loss_fn(functional_call(model, changed, (x,)), y)

    batches = list(zip(x.split(1000), y.split(1000), strict=True))
    return Hessian.over(batches, loss, list(changes.values()))


def example_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn, chunk: int = 50
) -> Tensor:
    """The norms of each example's own gradient, in evaluation mode.

    Args:
        chunk: examples whose gradients are held at a time.

    Returns:
        (N, T), a norm for each example and each of the model's T parameter tensors.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, params, (x[None],)), y[None])

    def norms(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        parts = grad(loss)(params, x, y).values()
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])

    with evaluating(model):
        found: Tensor = vmap(norms, in_dims=(None, 0, 0), chunk_size=chunk)(params, x, y)
    return found.detach()


def _gradient_norm(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> float:
    """The norm of the mean gradient of these examples."""
    with evaluating(model):
        loss = loss_fn(model(x), y)
        return float(global_norm(torch.autograd.grad(loss, list(model.parameters()))))


def run(config: Config, cell: Cell) -> Columns:
    """One network, trained, and measured at two moments.

    Returns:
        Columns with two rows, `AT_EQUAL_LOSS` and `AT_END`; the first is NaN if the loss never
        comes below the level. `step`; `objective` of training (on the measured training examples),
        `train_loss` and `train_error` (cross-entropy and errors, on all), `natural_error` and
        `pgd_error` on the test set; `norm` of the weights; of the objective on the measured
        examples `sharpness` and `relative_sharpness`, and, of its gradient in the weights,
        `mean_gradient` (norm over all of them), `batch_gradient` (mean of the norms over batches as
        large as those of training), `example_gradient` (mean of the norms of single examples) and
        `first_gradient` (the same, in the weights of the first layer alone); `first_layer`, the
        spectral norm of those weights; `input_gradient` (mean 1-norm, of the cross-entropy, on the
        test set). And one number, `autoattack_error` at the end, under AutoAttack's two gradient
        attacks.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: an unknown method or data set, or more examples than there are.
    """
    training, dataset = prepare(config, cell)
    recipe, model = config.recipe, training.model
    x, y = recipe.examined(training)
    level = least(config.smoothing, dataset.classes) + config.level
    steps, found = 0, -1
    weights: dict[str, Tensor] = {}

    def look() -> None:
        nonlocal steps, found, weights
        steps += 1
        if weights or steps % EVERY:
            return
        if evaluate(model, x, y, training.loss_fn)[0] < level:
            found = steps
            weights = {name: value.clone() for name, value in model.state_dict().items()}

    training.run(on_step=look, on_epoch=lambda: cell.tick(training.epoch, training.epochs))
    end = {"step": float(steps), **_measured(training, dataset, config)}
    last = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Rows()
    if weights:
        model.load_state_dict(weights)
        rows.add(step=float(found), **_measured(training, dataset, config))
    else:
        rows.add(**dict.fromkeys(end, math.nan))
    rows.add(**end)
    model.load_state_dict(last)
    few = slice(config.n_autoattack)
    judge = partial(
        autoattack, threat=Threat("linf", config.eps), attacks=GRADIENT_ATTACKS, seed=cell.seed
    )
    robust = robust_accuracy(model, dataset.x_test[few], dataset.y_test[few], judge)[1]
    return {**rows.columns, "autoattack_error": [1 - robust]}


def _measured(training: Training, dataset: Dataset, config: Config) -> dict[str, float]:
    recipe, model, loss_fn = config.recipe, training.model, training.loss_fn
    x, y = recipe.examined(training)
    attack = partial(pgd, threat=Threat("linf", config.eps), steps=config.pgd_steps)
    natural, robust = robust_accuracy(model, dataset.x_test, dataset.y_test, attack)
    train_loss, train_error = evaluate(model, training.x, training.y, nn.functional.cross_entropy)
    batch = min(recipe.batch, len(x))
    batches = [
        part for part in zip(x.split(batch), y.split(batch), strict=True) if len(part[0]) == batch
    ]
    own = example_gradients(model, x, y, loss_fn, config.chunk)
    first = next(p for p in model.parameters() if p.ndim > 1).detach()
    curvature = {
        "sharpness": hessian(model, x, y, loss_fn),
        "relative_sharpness": relative_hessian(model, x, y, loss_fn),
    }
    return {
        "objective": evaluate(model, x, y, loss_fn)[0],
        "train_loss": train_loss,
        "train_error": train_error,
        "natural_error": 1 - natural,
        "pgd_error": 1 - robust,
        "norm": float(global_norm(list(model.parameters()))),
        **{name: float(H.top(tol=recipe.tol).values[0]) for name, H in curvature.items()},
        "mean_gradient": _gradient_norm(model, x, y, loss_fn),
        "batch_gradient": float(np.mean([_gradient_norm(model, *b, loss_fn) for b in batches])),
        "example_gradient": float(torch.linalg.vector_norm(own, dim=1).mean()),
        "first_gradient": float(own[:, 0].mean()),
        "first_layer": float(torch.linalg.matrix_norm(first.flatten(1), 2)),
        "input_gradient": input_gradient(model, dataset.x_test, dataset.y_test),
    }


# --- what the runs say ----------------------------------------------------------------------------


def network(runs: SeedRuns, method: str, **changed: Any) -> Run:
    """The run of one network: SAM at the config's `rho`, or its `own_rho` where every example has a
    ball; weight decay at its `decay`; with smoothed labels.

    Args:
        changed: another `rho` or `decay`.

    Raises:
        ValueError: there is no such network.
    """
    config = runs.config
    chosen = {
        "rho": {"sam": config["rho"], "own": config["own_rho"]}.get(method, 0.0),
        "decay": config["decay"] if method == "decay" else 0.0,
    }
    return runs.one(method=method, **{**chosen, **changed})


def values(
    result: Result, name: str, method: str, moment: int = AT_END, **changed: Any
) -> np.ndarray:
    """A column of one network at one moment, a number for each seed.

    Args:
        changed: as `network` takes it.
    """
    runs = [network(of_seed, method, **changed) for of_seed in result.by_seed()]
    return np.array([run[name][moment if len(run[name]) > 1 else 0] for run in runs])


def _ratio(runs: SeedRuns, name: str, method: str, moment: int = AT_EQUAL_LOSS) -> float:
    """A column of one network over SGD's."""
    one, two = (network(runs, which)[name][moment] for which in (method, "sgd"))
    return float(one / two)


def _balls(runs: SeedRuns) -> tuple[Run, Run]:
    """SAM with a ball for every example, and with one of the same radius for each batch."""
    return network(runs, "own"), network(runs, "sam", rho=runs.config["own_rho"])


def _fewer(runs: SeedRuns, method: str, other: str = "sgd") -> float:
    """By how many points AutoAttack's error of one network lies below the other's, at the end."""
    one, two = (network(runs, which).value("autoattack_error") for which in (method, other))
    return 100 * (two - one)


def _fewer_at_equal_loss(runs: SeedRuns, method: str) -> float:
    """By how many points PGD's error of one network lies below SGD's, at equal loss."""
    one, two = (network(runs, which)["pgd_error"][AT_EQUAL_LOSS] for which in (method, "sgd"))
    return float(100 * (two - one))


# --- what the runs decide -------------------------------------------------------------------------

ZHANG = Source("Zhang et al. 2024", "after")
MA = Source("Ma & Ying 2021", "after")

_NAMES = {
    "sam": "SAM",
    "decay": "Strong weight decay",
    "adversarial": "Adversarial training",
}
_MEASURES = {
    "sharpness": ("", "top eigenvalue of the Hessian"),
    "relative_sharpness": (
        " in relative units of the weights",
        "top eigenvalue of the Hessian in relative changes of the weights",
    ),
}
_WHEN = {
    "at-equal-loss": ("at equal training loss", AT_EQUAL_LOSS),
    "at-the-end": ("at the end of training with smoothed labels", AT_END),
}


def _is_flatter(method: str, measure: str, when: str) -> Claim:
    units, what = _MEASURES[measure]
    words, moment = _WHEN[when]
    relative = "-relative" if units else ""

    @claim(
        OURS if method == "sam" else CONTROL,
        high=0.8,
        domain="positive",
        headline=when == "at-equal-loss" and not units and method != "adversarial",
        id=f"{method}-is-flatter-{when}{relative}",
        statement=f"{_NAMES[method]} gives a flatter network than SGD {words}{units}: {what}, "
        "ratio to SGD's",
    )
    def is_flatter(runs: SeedRuns) -> float:
        return _ratio(runs, measure, method, moment)

    return is_flatter


IS_FLATTER = [
    _is_flatter(method, measure, when)
    for method in _NAMES
    for when in _WHEN
    for measure in _MEASURES
]


@claim(ZHANG, low=0, unit="points")
def sam_is_more_robust(runs: SeedRuns) -> float:
    """SAM is more robust than SGD with smoothed labels: error under AutoAttack, SGD's less SAM's"""
    return _fewer(runs, "sam")


@claim(CONTROL, low=0, unit="points")
def decay_is_more_robust(runs: SeedRuns) -> float:
    """Strong weight decay is more robust than SGD with smoothed labels: error under AutoAttack,
    SGD's less that with weight decay"""
    return _fewer(runs, "decay")


@claim(CONTROL, -5, 5, unit="points", headline=True)
def decay_and_sam_are_alike(runs: SeedRuns) -> float:
    """SAM and strong weight decay differ by less than five points in robustness: error under
    AutoAttack with weight decay less that with SAM"""
    return _fewer(runs, "sam", "decay")


@claim(OURS, low=0, unit="points")
def sam_is_more_robust_at_equal_loss(runs: SeedRuns) -> float:
    """SAM is more robust than SGD at equal training loss: error under PGD, SGD's less SAM's"""
    return _fewer_at_equal_loss(runs, "sam")


@claim(CONTROL, low=0, unit="points")
def decay_is_more_robust_at_equal_loss(runs: SeedRuns) -> float:
    """Strong weight decay is more robust than SGD at equal training loss: error under PGD, SGD's
    less that with weight decay"""
    return _fewer_at_equal_loss(runs, "decay")


@claim(OURS, low=3, domain="positive")
def single_gradients_are_longer(runs: SeedRuns) -> float:
    """The gradient of a single example is at least three times as long as the mean gradient of a
    batch: mean norms, ratio, SGD at the end of training with smoothed labels"""
    run = network(runs, "sgd")
    return float(run["example_gradient"][AT_END] / run["batch_gradient"][AT_END])


@claim(OURS, high=0.9, domain="positive")
def sam_shortens_batch_gradients(runs: SeedRuns) -> float:
    """SAM makes the mean gradient of a batch shorter than SGD's at equal training loss: mean norm,
    ratio"""
    return _ratio(runs, "batch_gradient", "sam")


@claim(MA, high=0.9, domain="positive", headline=True)
def sam_shortens_single_gradients(runs: SeedRuns) -> float:
    """SAM makes the gradients of single examples shorter than SGD's at equal training loss: mean
    norm, ratio"""
    return _ratio(runs, "example_gradient", "sam")


@claim(OURS, high=0.9, domain="positive")
def own_balls_shorten_single_gradients(runs: SeedRuns) -> float:
    """SAM with a ball for every example makes the gradients of single examples shorter than SAM
    with one ball of the same radius for each batch at equal training loss: mean norm, ratio"""
    own, one = (run["example_gradient"][AT_EQUAL_LOSS] for run in _balls(runs))
    return float(own / one)


@claim(OURS, low=0, unit="points")
def own_balls_are_more_robust(runs: SeedRuns) -> float:
    """SAM with a ball for every example is more robust than SAM with one ball of the same radius
    for each batch: error under AutoAttack, SAM's less that with a ball for every example"""
    own, one = (run.value("autoattack_error") for run in _balls(runs))
    return 100 * (one - own)


@claim(CONTROL, high=0.8, domain="positive")
def decay_shrinks_the_first_layer(runs: SeedRuns) -> float:
    """Strong weight decay shrinks the first layer, the other factor of the bound on the input
    gradient, at equal training loss: spectral norm, ratio to SGD's"""
    return _ratio(runs, "first_layer", "decay")


@claim(CONTROL, low=0.9, domain="positive")
def sam_does_not_shrink_the_first_layer(runs: SeedRuns) -> float:
    """SAM does not shrink the first layer at equal training loss: spectral norm, ratio to SGD's"""
    return _ratio(runs, "first_layer", "sam")


EXPERIMENT = Experiment(
    name="flat_and_robust",
    title="Flat in the weights, robust in the inputs: at equal loss, in relative units",
    source="this book, after Zhang et al. 2024 (arXiv:2402.15152) and Ma & Ying 2021 "
    "(arXiv:2105.13462)",
    presets={"laptop": LAPTOP, "paper": PAPER},
    settings=settings,
    run=run,
    claims=[
        *IS_FLATTER,
        sam_is_more_robust,
        decay_is_more_robust,
        decay_and_sam_are_alike,
        sam_is_more_robust_at_equal_loss,
        decay_is_more_robust_at_equal_loss,
        single_gradients_are_longer,
        sam_shortens_batch_gradients,
        sam_shortens_single_gradients,
        own_balls_shorten_single_gradients,
        own_balls_are_more_robust,
        decay_shrinks_the_first_layer,
        sam_does_not_shrink_the_first_layer,
    ],
    needs=["pyautoattack"],
)
