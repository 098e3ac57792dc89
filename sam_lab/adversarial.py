r"""Attacks on the inputs: the game that SAM plays with the weights, played with the examples.

Adversarial training minimises
$\mathbb{E} \max_{\|\delta\| \le \epsilon} \ell(w, x + \delta)$, SAM
$\max_{\|v\| \le \rho} \mathbb{E}\, \ell(w + v, x)$. In both the maximiser goes up along the
gradient, in the `perturbations.steepest` step of its ball: SAM once, in one ball for all weights;
an attack several times, in a ball for each example, cut to the box of valid inputs.

The two compose through the data. The batch is attacked once, and both passes of SAM see the same
attacked batch: K + 2 passes through the model for K steps of the attack::

    x_adv = pgd(model, x, y, Threat("linf", 8 / 255), generator=generator)
    sam.step(lambda: loss_fn(model(x_adv), y))

An attack changes nothing but what it returns: no gradient of a parameter (a leak into them would
turn SAM's ascent), no running statistics, no module's mode, no random state.

Inputs are as they are measured, pixels in [0, 1]: normalisation belongs into the model
(`models.Normalize`), where the attack sees through it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_lab import _optional
from sam_lab._checks import check_examples, check_integer, check_nonnegative
from sam_lab.perturbations import HALF, NORMS, steepest
from sam_lab.state import evaluating, undisturbed

__all__ = [
    "AUTOATTACK",
    "Attack",
    "Threat",
    "autoattack",
    "fgsm",
    "pgd",
    "robust_accuracy",
    "standing",
    "trades",
]

Attack = Callable[..., Tensor]
"""``attack(model, x, y)`` returns the attacked inputs, such as ``partial(pgd, threat=0.1)``; in a
`training.Phase` it is called with a ``generator`` too."""
LossFn = Callable[[Tensor, Tensor], Tensor]

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
"""What the standard version of AutoAttack runs, in this order."""

_TOLERANCE = 1e-6  # of floating point: the ball and the box are kept up to this


@dataclass(frozen=True)
class Threat:
    r"""What an attacker may do to an example: any $x'$ with $\|x' - x\| \le \epsilon$ in a box.

    Args:
        norm: "linf" (the largest change of an entry) or "l2" (Euclidean, over all entries).
        eps: radius of the ball, in the units of the inputs.
        low, high: the box: bounds of each entry.

    Raises:
        ValueError: another norm, a radius that is not a finite number of at least 0, or bounds that
            are not low < high.

    Source: the threat models of Madry et al. 2018 (arXiv:1706.06083).
    """

    norm: str
    eps: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        check_nonnegative("eps", self.eps)
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low!r} and high={self.high!r}")

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The attacked inputs (N, ...) brought back into the ball around x (N, ...), then the box.

        As x lies in the box, cutting to the box does not leave the ball.
        """
        delta = x_adv - x
        if self.norm == "linf":
            delta.clamp_(-self.eps, self.eps)
        else:
            delta.mul_((self.eps / _lengths(delta).clamp(min=1e-12)).clamp(max=1))
        return delta.add_(x).clamp_(self.low, self.high)

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point of the ball around each example, cut to the box.

        Uniform in the cube; in the Euclidean ball uniform in direction and in distance.

        Args:
            generator: where the numbers are drawn; one on the CPU serves inputs on any device.
        """

        def draw(sample: Callable[..., Tensor], shape: torch.Size) -> Tensor:
            return sample(shape, generator=generator, device=generator.device).to(x)

        if self.norm == "linf":
            delta = self.eps * (2 * draw(torch.rand, x.shape) - 1)
        else:
            z = draw(torch.randn, x.shape)
            lengths = _lengths(z)
            delta = self.eps * draw(torch.rand, lengths.shape) * z / lengths.clamp(min=1e-12)
        return self.project(x + delta, x)

    def ascend(self, grad: Tensor, step: float) -> Tensor:
        """The step of this length, in this norm, that goes up most steeply: (N, ...) as `grad`.

        Each example goes its own way; where its gradient is zero or not finite, it stays.
        """
        wide = grad.float() if grad.dtype in HALF else grad  # else small ones would count as zero
        return steepest([wide], step, _lengths(wide), self.norm)[0].to(grad)


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean norm of each example, (N, 1, ..., 1)."""
    if x.ndim == 1:
        return x.abs()
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    return norm


# --- attacks --------------------------------------------------------------------------------------


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Of each example, (N,)."""
    return F.cross_entropy(outputs, y, reduction="none")


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | float,
    *,
    loss_fn: LossFn = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The fast gradient sign method: one step to the border of the ball.

    Arguments, return value and errors are those of `pgd`; there is no random start, and the
    generator is for use in a `training.Phase`. Where the loss is linear in x, no attack
    is stronger (as long as the box does not bind).

    Source: Goodfellow et al. 2015 (arXiv:1412.6572).
    """
    eps = _threat(threat).eps
    return pgd(model, x, y, threat, steps=1, step_size=eps, random_start=False, loss_fn=loss_fn)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    loss_fn: LossFn = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss of each example.

    The model is in evaluation mode meanwhile. Works under `torch.no_grad` too.

    Args:
        model: ``model(x)`` gives logits (N, classes). Afterwards its parameters' gradients, buffers
            and modes (each module's own) are as they were.
        x: inputs (N, ...), floating point, in the box of the threat.
        y: labels (N,), or whatever `loss_fn` takes.
        threat: a `Threat`; a number is the radius in the maximum norm, inputs in [0, 1].
        steps: of the ascent, a pass forward and backward each.
        step_size: length of a step, in the norm of the threat; default 2.5 eps / steps, so that the
            border is reached from everywhere.
        random_start: start at a random point of the ball instead of at x.
        restarts: how often to try. Of each example the worst attempt is kept: the first that
            changes the prediction from y, or else the one with the largest loss.
        loss_fn: ``loss_fn(model(x), y)`` is the loss of each example, (N,).
        generator: where random starts are drawn from. By default from one with seed 0, in every
            call anew: an evaluation is repeatable, and in training one should be given.

    Returns:
        Attacked inputs (N, ...), detached, in ball and box up to rounding.

    Raises:
        TypeError, ValueError: x is no floating-point tensor or lies outside the box, or another
            argument is not as described.

    Source: Madry et al. 2018 (arXiv:1706.06083), whose step sizes and restarts are free; the rule
    for the step size is that of Engstrom et al., *robustness* (2019).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
        >>> pgd(model, x, y, 0.1, random_start=False)
        tensor([[0.4000, 0.5000]])
    """
    threat = _threat(threat)
    _check_inputs(model, x, y, threat)
    check_integer("steps", steps, 1)
    check_integer("restarts", restarts, 1)
    if step_size is None:
        step_size = 2.5 * threat.eps / steps
    check_nonnegative("step_size", step_size)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        x, y = x.detach().clone(), y.clone()  # tensors of inference mode do not differentiate
        worst, reached = x, torch.empty(0)
        for attempt in range(restarts):
            x_adv = threat.start(x, generator) if random_start else x.clone()
            with undisturbed(model, [x]):  # after the start: its generator may be a global one
                for _ in range(steps):
                    x_adv.requires_grad_()
                    # the sum, so that one example's gradient does not depend on how many there are
                    loss = loss_fn(model(x_adv), y).sum()
                    (grad,) = torch.autograd.grad(loss, x_adv)
                    x_adv = threat.project(x_adv.detach() + threat.ascend(grad, step_size), x)
                if restarts > 1:
                    harm = _harm(model, x_adv, y, loss_fn)
                    if attempt:
                        better = harm > reached
                        x_adv = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, worst)
                        harm = torch.where(better, harm, reached)
                    reached = harm
                worst = x_adv
    return worst


@torch.no_grad()
def _harm(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
    """How bad each example is, (N,): its loss, or infinitely where the prediction is wrong."""
    outputs = model(x)
    wrong = outputs.argmax(1) != (y if y.ndim == 1 else y.argmax(1))
    return loss_fn(outputs, y).masked_fill(wrong, math.inf)


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | float,
    *,
    attacks: Sequence[str] = AUTOATTACK,
    seed: int = 0,
    batch: int = 250,
) -> Tensor:
    """AutoAttack, the second opinion: four attacks without a parameter to tune, one without any
    gradient, each on the examples that have stood so far.

    Minutes rather than seconds, even for small models. Needs the package pyautoattack.

    Args:
        model: ``model(x)`` gives logits (N, classes) for 4 classes or more; left as by `pgd`.
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        threat: as for `pgd`; its box must be [0, 1].
        attacks: those of the standard version unless given.
        seed: of all that is random in it.
        batch: examples at a time.

    Returns:
        Attacked inputs (N, C, H, W), detached; an example that was not broken is as it was.

    Raises:
        ImportError: pyautoattack is not installed.
        TypeError, ValueError: an argument is not as described.

    Source: Croce & Hein 2020 (arXiv:2003.01690).
    """
    threat = _threat(threat)
    _check_inputs(model, x, y, threat)
    if x.ndim != 4 or (threat.low, threat.high) != (0, 1):
        raise ValueError(
            "autoattack takes images (N, C, H, W) in [0, 1], "
            f"got shape {tuple(x.shape)} and the box [{threat.low}, {threat.high}]"
        )
    check_integer("batch", batch, 1)
    package = _optional.require("pyautoattack", extra="book")
    required = [(p, p.requires_grad) for p in model.parameters()]
    tracing = sys.gettrace()
    try:
        with torch.inference_mode(False), undisturbed(model, [x]), evaluating(model):
            x, y = x.detach().clone(), y.clone()  # as in `pgd`
            for p, _ in required:  # it needs gradients of the inputs only
                p.requires_grad_(False)
            classes = model(x[:1]).shape[1]
            if classes < 4:
                raise ValueError(f"model must have 4 classes or more for autoattack, got {classes}")
            judge = package.AutoAttack(
                model,
                norm={"linf": "Linf", "l2": "L2"}[threat.norm],
                eps=threat.eps,
                seed=seed,
                device=x.device,
                version="custom",
                attacks=list(attacks),
            )
            # as its standard version, but no more target classes than there are
            judge.apgd.n_restarts = judge.fab.n_restarts = 1
            for targeted in (judge.apgd_targeted, judge.fab):
                targeted.n_restarts, targeted.n_target_classes = 1, min(9, classes - 1)
            attacked: Tensor = judge.run_standard_evaluation(x, y, batch_size=batch)[0]
    finally:
        sys.settrace(tracing)  # it traces a pass through the model, and then turns all tracing off
        for p, requires_grad in required:
            p.requires_grad_(requires_grad)
    return attacked.detach()


# --- what attacks are for -------------------------------------------------------------------------


def robust_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, batch: int = 1000
) -> tuple[float, float]:
    """The share of right predictions, and of those that stay right under an attack.

    Only examples that are classified rightly are attacked. The second number is an upper bound: a
    stronger attack may find less. Do not believe it on the word of one attack.

    Args:
        model: in evaluation mode meanwhile; left as by `pgd`.
        x, y: inputs (N, ...) and labels (N,).
        attack: ``attack(model, x, y)`` gives attacked inputs:
            ``partial(pgd, threat=0.1, steps=50, restarts=5)``, ``partial(autoattack, threat=0.1)``.
        batch: examples at a time.

    Returns:
        Natural and robust accuracy, between 0 and 1.

    Raises:
        TypeError, ValueError: x and y are not as described, or what the attack finds them to be.
    """
    natural, robust = standing(model, x, y, attack, batch=batch)
    return int(natural.sum()) / len(x), int(robust.sum()) / len(x)


@torch.no_grad()
def standing(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, batch: int = 1000
) -> tuple[Tensor, Tensor]:
    """Which examples are classified rightly, and which of them still are under an attack.

    Arguments and errors are those of `robust_accuracy`, which gives the shares.

    Returns:
        Two masks, (N,) each, bool.
    """
    check_integer("batch", batch, 1)
    _check_pairs(x, y)
    natural, robust = [], []
    with evaluating(model):
        for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
            right = model(inputs).argmax(1) == labels
            natural.append(right)
            right = right.clone()
            if right.any():
                attacked = attack(model, inputs[right], labels[right])
                right[right.clone()] = model(attacked).argmax(1) == labels[right]
            robust.append(right)
    return torch.cat(natural), torch.cat(robust)


def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | float,
    *,
    beta: float = 6.0,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The loss of TRADES: be right on x, and say the same around it.

    $$ \ell(f(x), y) + \beta \max_{x'} \mathrm{KL}\big(p(x) \,\|\, p(x')\big), \qquad
    p = \mathrm{softmax} \circ f, $$

    mean over examples, the maximum as `pgd` finds it, from a random start: at x itself the gradient
    of the divergence is zero.

    Args:
        beta: weight of the second part, at least 0.
        model, x, y, threat, steps, step_size, generator: as for `pgd`. The model is in evaluation
            mode while it is attacked, and in its own for the loss: two passes there.

    Returns:
        The loss, a 0-dim tensor to call ``backward`` on.

    Raises:
        TypeError, ValueError: as `pgd`, or a negative beta.

    Source: Zhang et al. 2019, equation 5 (arXiv:1901.08573); their code starts closer to x.
    """
    check_nonnegative("beta", beta)
    _check_inputs(model, x, y, _threat(threat))
    with evaluating(model), torch.no_grad():
        before = model(x).softmax(1)
    x_adv = pgd(
        model,
        x,
        before,
        threat,
        steps=steps,
        step_size=step_size,
        loss_fn=_divergence,
        generator=generator,
    )
    outputs = model(x)
    apart = _divergence(model(x_adv), outputs.softmax(1)).mean()
    return F.cross_entropy(outputs, y) + beta * apart


def _divergence(outputs: Tensor, p: Tensor) -> Tensor:
    """KL divergence of the softmax of the outputs from p, of each example."""
    return F.kl_div(outputs.log_softmax(1), p, reduction="none").sum(1)


# --- what comes in --------------------------------------------------------------------------------


def _threat(threat: Threat | float) -> Threat:
    return threat if isinstance(threat, Threat) else Threat("linf", threat)


def _check_pairs(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
        kinds = [t.dtype if isinstance(t, Tensor) else type(t).__name__ for t in (x, y)]
        raise TypeError(f"x and y must be tensors, x of floats, got {kinds[0]} and {kinds[1]}")
    check_examples(x, y)


def _check_inputs(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r:.80}")
    _check_pairs(x, y)
    low, high = (float(bound) for bound in x.detach().aminmax())
    if not (threat.low - _TOLERANCE <= low and high <= threat.high + _TOLERANCE):
        raise ValueError(
            f"x must lie in the box [{threat.low}, {threat.high}], got values from {low:.4g} to "
            f"{high:.4g}: attack inputs as they are measured, and normalise inside the model, "
            "as by torch.nn.Sequential(models.Normalize(mean, std), model)"
        )
