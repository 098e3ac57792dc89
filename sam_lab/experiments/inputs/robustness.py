"""How the experiments measure robustness: by two judges, and by what the attacks live on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sam_lab.adversarial import (
    AUTOATTACK,
    Attack,
    Threat,
    autoattack,
    cross_entropy,
    pgd,
    robust_accuracy,
)
from sam_lab.state import evaluating
from sam_lab.training import evaluate

__all__ = ["GRADIENT_ATTACKS", "input_gradient", "strong", "two_judges"]

STEPS = 50
RESTARTS = 5

GRADIENT_ATTACKS = AUTOATTACK[:2]
"""Those of AutoAttack that use the gradient and nothing else; the rest take most of the time."""


def strong(threat: Threat) -> Attack:
    """PGD with many steps and restarts."""
    return partial(pgd, threat=threat, steps=STEPS, restarts=RESTARTS)


def two_judges(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    n_autoattack: int,
    attacks: Sequence[str] = GRADIENT_ATTACKS,
    with_pgd: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Share of errors by PGD on all examples, and by both judges on the first `n_autoattack`.

    Args:
        model: ``model(x)`` gives logits; x are images (N, C, H, W) in [0, 1].
        attacks: those of AutoAttack that are run.
        with_pgd: whether PGD is run too; without it the two errors by PGD are missing.

    Returns:
        `natural_error` and `pgd_error` on all N; `pgd_error_judged` and `autoattack_error` on the
        first `n_autoattack`. The last is the one to believe.
    """
    few, attack = slice(n_autoattack), strong(threat)
    judge = partial(autoattack, threat=threat, attacks=attacks, seed=seed)

    def error(judge: Attack, which: slice = few) -> float:
        return 1 - robust_accuracy(model, x[which], y[which], judge)[1]

    errors = {"natural_error": evaluate(model, x, y)[1]}
    if with_pgd:
        errors |= {"pgd_error": error(attack, slice(None)), "pgd_error_judged": error(attack)}
    return {**errors, "autoattack_error": error(judge)}


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, norm: str = "linf") -> float:
    r"""Mean over examples (N, ...) of the dual norm of $\nabla_x$ of the cross-entropy.

    What an attack of small eps gains, over eps: the sum of the gradient's absolute values for
    "linf", its Euclidean norm for "l2".
    """
    order = {"linf": 1, "l2": 2}[norm]
    total = 0.0
    with evaluating(model), torch.enable_grad():
        for inputs, labels in zip(x.split(1000), y.split(1000), strict=True):
            inputs = inputs.detach().requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(model(inputs), labels).sum(), inputs)
            total += float(torch.linalg.vector_norm(grad.flatten(1), order, dim=1).sum())
    return total / len(x)
