"""How the experiments measure robustness: by two judges, and by what the attacks live on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sam_lab.adversarial import AUTOATTACK, Threat, autoattack, cross_entropy, pgd, robust_accuracy
from sam_lab.state import evaluating

__all__ = ["input_gradient", "pgd_errors", "two_judges"]

STEPS = 50
RESTARTS = 5


def pgd_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Sequence[Threat],
    *,
    steps: int = STEPS,
    restarts: int = RESTARTS,
) -> list[float]:
    """Share of examples (N, ...) that are wrong under PGD, for each threat."""
    return [
        1 - robust_accuracy(model, x, y, partial(pgd, threat=t, steps=steps, restarts=restarts))[1]
        if t.eps
        else 1 - robust_accuracy(model, x, y, lambda model, x, y: x)[1]
        for t in threats
    ]


def two_judges(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    judged: int,
    attacks: Sequence[str] = AUTOATTACK,
    seed: int = 0,
) -> dict[str, float]:
    """Share of errors by PGD on all examples, and by both judges on the first `judged`.

    Args:
        model: ``model(x)`` gives logits; x are images (N, C, H, W) in [0, 1].
        attacks: those of AutoAttack that are run; all of them unless given.

    Returns:
        `natural_error` and `pgd_error` on all N; `pgd_error_judged` and `autoattack_error` on the
        first `judged`. The last is the one to believe.
    """
    few = slice(judged)
    attack = partial(pgd, threat=threat, steps=STEPS, restarts=RESTARTS)
    natural, robust = robust_accuracy(model, x, y, attack)
    found = {"natural_error": 1 - natural, "pgd_error": 1 - robust}
    for name, judge in {
        "pgd_error_judged": attack,
        "autoattack_error": partial(autoattack, threat=threat, attacks=attacks, seed=seed),
    }.items():
        found[name] = 1 - robust_accuracy(model, x[few], y[few], judge)[1]
    return found


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, norm: str = "linf") -> float:
    r"""Mean over examples (N, ...) of the dual norm of $\nabla_x$ of the cross-entropy.

    What an attack of small eps gains, over eps: the sum of the gradient's absolute values for
    "linf", its Euclidean norm for "l2".
    """
    with evaluating(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(x), y).sum(), x)
    order = {"linf": 1, "l2": 2}[norm]
    return float(torch.linalg.vector_norm(grad.flatten(1), order, dim=1).mean())
