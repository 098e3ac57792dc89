r"""The SAM family: how often a step looks at the loss, and what descends, one function a method.

A rule of `sam_lab.perturbations` says *where* to look. A method says *how often*, and what the
optimizer gets in the end. It is called as ``method(look, state)``: `look` is the loss of this step
as an oracle (`Look`), `state` what the method returned at the last step, ``{}`` at first. It
returns the direction, one tensor a parameter, and its new state, and changes none of its arguments.
With $g$ the gradient at $w$ and $g_s$ that at $w + \epsilon$:

====================  =======================================  ==========  =========================
method                direction                                passes      is plain SAM at
====================  =======================================  ==========  =========================
`plain`               g_s                                      2           always
`gsam`                g_s less alpha times what g has across   2           alpha = 0
`wsam`                (1 - a) g + a g_s, a = gamma/(1-gamma)   2           gamma = 1/2
`gradient_penalty`    g + (lam / rho) (g_s - g)                2           lam = rho
`momentum_sam`        g_s, looking along minus the momentum    1           never
`looksam`             g_s; for k - 1 steps g + a kept part     1 + 1/k     k = 1
`graphsam`            g_s, looking along an average of g_s     1 + 1/k     k = 1
`friendly_sam`        g_s, looking along g - sigma m           2           sigma = 0
`vasso`               g_s, looking along an average of g       2           theta = 1
`sparse_sam`          g_s, epsilon masked                      2           sparsity = 0
`esam`                g_s of the examples that rise most       4/3+gamma   beta = gamma = 1
`multistep`           g_s after k small ascents                1 + k       k = 1
`trace_sam`           g + lam mean(g_i - g), random points     1 + n       never
`frob_sam`            g + lam/rho² Cov(L_i, g_i)               1 + n       never
`det_sam`             g + lam mean(psi_i (g_i - g)) / psi³     1 + n       never
====================  =======================================  ==========  =========================

A pass is a forward and a backward over the batch; a forward alone counts as a third of one. Others
of the family need no method: `sam_on` makes parameter groups, `every`, `bernoulli` and
`gsam_radius` make radii, ``step([...], perturb="micro")`` is mSAM (Behdin et al. 2023,
arXiv:2302.09693: each of m equal parts of the batch has a perturbation of its own), and AWP is the
rule `perturbations.awp`. Not here: bSAM, which is an optimizer and not something beside one.

What `SAM.step` keeps for every method:

- Where all radii are 0 the method is not called, and the step is the optimizer's own.
- The first look of a step moves running statistics, wherever it is, and later ones do not. All
  looks have the same random numbers, which go on once. The loss returned is the first look's.
- The state is committed with the optimizer's step: one that is skipped leaves it as it was.
- Rules take their norm over the parameters with a radius; blends of gradients, over all.

In `torch.autocast`, with several closures as one batch, under DistributedDataParallel and FSDP2 and
with a compiled model they work as `plain` does, with these exceptions, which say so: ESAM takes one
closure and one process; Sparse SAM and the random probes know no sharded parameters; a GradScaler
and ``sync=False`` are for `plain` alone, and ``perturb="micro"`` for methods without a state. What
ESAM selects changes shape, which a compiled model may answer with another compilation.

Methods that hold the gradient at $w$ during the second pass, and blend the two, need the memory of
one to three copies of the parameters more than `plain`, which lets it go (``make bench``).

To add a method, write a function like these; its own arguments are bound by `functools.partial`, as
in ``SAM(optimizer, 0.05, method=partial(gsam, alpha=0.4))``. One that draws random numbers has a
keyword `generator`, and is handed that of `SAM`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sam_lab._checks import check_integer, check_nonnegative, check_positive
from sam_lab.perturbations import Radius, Rule, gaussian, global_norm, uniform

__all__ = [
    "Look",
    "Method",
    "bernoulli",
    "det_sam",
    "esam",
    "every",
    "friendly_sam",
    "frob_sam",
    "gradient_penalty",
    "graphsam",
    "gsam",
    "gsam_radius",
    "inner",
    "looksam",
    "mix",
    "momentum_sam",
    "multistep",
    "plain",
    "plus",
    "reject",
    "sam_on",
    "sparse_sam",
    "times",
    "trace_sam",
    "unit",
    "vasso",
    "wsam",
]

Tensors = Sequence[Tensor]
State = dict[str, Any]
"""Numbers, and lists of one tensor a parameter."""


class Look(Protocol):
    """The loss of one step as an oracle: gradients at w and around it. The weights are at w after.

    Lists have one tensor a parameter, in the order of `params`. A parameter that the loss does not
    reach has zeros there, and no gradient in the step if no look reaches it.

    Attributes:
        params: the optimizer's parameters that require grad.
        loss: that of the last look, detached.
        rho: the radius of the step. ValueError if parameter groups have several.
    """

    params: list[Tensor]

    @property
    def loss(self) -> Tensor: ...

    @property
    def rho(self) -> float: ...

    def __call__(self) -> list[Tensor]:
        """The gradient at w."""

    def along(self, direction: Tensors, rule: Rule | None = None) -> list[Tensor]:
        """The gradient at w + rule(params, direction, rho); default the rule of the `SAM`."""

    def at(self, epsilon: Tensors, examples: Tensor | None = None) -> list[Tensor]:
        """The gradient at w + epsilon, of those examples only if they are named by index."""

    def epsilon(self, direction: Tensors, rule: Rule | None = None) -> list[Tensor]:
        """The perturbation along a direction, zero for a parameter of radius 0; no pass."""

    def losses(self, epsilon: Tensors | None = None) -> Tensor:
        """The loss of each example (N,): of the last look, or by a forward pass at w + epsilon."""

    def momentum(self) -> list[Tensor]:
        """The optimizer's own average of gradients, zeros before its first step."""


Method = Callable[..., tuple[list[Tensor], State]]
"""`method(look, state)` returns the direction, one tensor a parameter, and the next state."""


# --- blends of gradients --------------------------------------------------------------------------


def inner(a: Tensors, b: Tensors) -> Tensor:
    """The inner product of two lists of tensors, as if each were one vector; a 0-dim tensor."""
    parts = [
        (x * y).sum(dtype=torch.promote_types(x.dtype, torch.float32))
        for x, y in zip(a, b, strict=True)
    ]
    device = parts[0].device
    total = torch.stack(
        [part.to(device) if part.device != device else part for part in parts]
    ).sum()
    whole: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total
    return whole


def plus(a: Tensors, factor: float | Tensor, b: Tensors) -> list[Tensor]:
    """``a + factor * b``, tensor by tensor."""
    return list(torch._foreach_add(list(a), times(factor, b)))


def mix(share: float, a: Tensors, b: Tensors) -> list[Tensor]:
    """``share * a + (1 - share) * b``, tensor by tensor; the share may lie outside [0, 1]."""
    return plus(times(share, a), 1 - share, b)


def times(factor: float | Tensor, a: Tensors) -> list[Tensor]:
    """``factor * a``, tensor by tensor."""
    if isinstance(factor, Tensor) and len({x.device for x in a}) > 1:
        return [x * factor.to(x.device) for x in a]
    return list(torch._foreach_mul(list(a), factor))


def reject(a: Tensors, b: Tensors) -> list[Tensor]:
    r"""The part of a across b: $a - \frac{\langle a, b\rangle}{\langle b, b\rangle} b$.

    All of a where b is zero.
    """
    square = inner(b, b)
    share = torch.where(square > 0, inner(a, b) / square, torch.zeros_like(square))
    return plus(a, -share, b)


def unit(a: Tensors) -> list[Tensor]:
    """``a / |a|``, with one norm over all tensors; zero where a is."""
    length = global_norm(a)
    usable = length > torch.finfo(length.dtype).smallest_normal
    return times(torch.where(usable, 1 / length, torch.zeros_like(length)), a)


# --- two looks ------------------------------------------------------------------------------------


def plain(look: Look, state: State) -> tuple[list[Tensor], State]:
    """SAM itself, and by their rules ASAM, AWP and others: descend along the gradient at w + eps.

    Passes: 2.

    Source: Foret et al. 2021, algorithm 1 (arXiv:2010.01412).
    """
    return look.along(look()), state


def gsam(
    look: Look, state: State, *, alpha: float = 0.4, minimize_fp: bool = True
) -> tuple[list[Tensor], State]:
    r"""Surrogate gap SAM: $d = g_s - \alpha\, g_\perp$.

    $g_\perp$ is the part of $g$ across $g_s$. The step lowers the perturbed loss as SAM does,
    and climbs the loss in a direction that the perturbed loss does not see, which lowers the gap
    between the two. With `gsam_radius`, the radius follows the learning rate, as in the paper.
    Passes: 2. alpha = 0 is SAM.

    Args:
        alpha: at least 0; the authors' example for torch has 0.4, their ViT 0.6.
        minimize_fp: if not, the second form of the authors: $d = g + \alpha\, g_{s\perp}$ with
            $g_{s\perp}$ the part of $g_s$ across $g$, which descends the loss itself.

    Under DistributedDataParallel the gradients are those of the whole batch; the authors' code
    decomposes on each process and averages, which is ``step([...], perturb="micro")`` here.

    Source: Zhuang et al. 2022 (arXiv:2203.08065); the second form is in their code.
    """
    check_nonnegative("alpha", alpha)
    g = look()
    gs = look.along(g)
    if minimize_fp:
        # nothing is along a perturbed gradient of zero, and then nothing is across it
        return plus(gs, -alpha * (global_norm(gs) > 0), reject(g, gs)), state
    return plus(g, alpha, reject(gs, g)), state


def wsam(look: Look, state: State, *, gamma: float = 0.9) -> tuple[list[Tensor], State]:
    r"""Weighted SAM: $d = (1 - a)\, g + a\, g_s$ with $a = \gamma / (1 - \gamma)$.

    The coupled form; the decoupled one steps outside the optimizer. Passes: 2. gamma = 1/2 is SAM,
    0 the optimizer alone.

    Args:
        gamma: between 0 and 1, 1 excluded.

    Source: Yue et al. 2023 (arXiv:2305.15817).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be at least 0 and below 1, got {gamma!r}")
    a = gamma / (1 - gamma)
    g = look()
    return mix(a, look.along(g), g), state


def gradient_penalty(look: Look, state: State, *, lam: float = 0.05) -> tuple[list[Tensor], State]:
    r"""A penalty $\lambda \|\nabla L\|$, by a difference: $d = g + \frac\lambda\rho (g_s - g)$.

    To first order in rho the penalty's gradient is $\lambda H g / \|g\|$; SAM is the case where the
    length of the difference is the weight, lam = rho. Passes: 2.

    Args:
        lam: weight of the penalty, at least 0, in units of the weights as rho is.

    Source: Zhao et al. 2022 (arXiv:2202.03599), whose alpha is lam / rho and whose r is rho.
    """
    a = check_nonnegative("lam", lam) / look.rho
    g = look()
    return mix(a, look.along(g), g), state


def friendly_sam(
    look: Look, state: State, *, sigma: float = 1.0, lam: float = 0.6
) -> tuple[list[Tensor], State]:
    r"""Friendly SAM: looks along $g - \sigma m$, m an average of gradients.

    $m \leftarrow \lambda m + (1 - \lambda) g$. What is perturbed along is the noise of the batch,
    without the gradient that all batches share. As in the authors' code, m is that of before the
    step, and the first step is SAM's. Passes: 2. sigma = 0 is SAM.

    Args:
        sigma: how much of the average is taken off, at least 0.
        lam: how slow the average is, between 0 and 1.

    Source: Li et al. 2024 (arXiv:2403.12350).
    """
    check_nonnegative("sigma", sigma)
    _check_share("lam", lam)
    g = look()
    if "m" not in state:
        return look.along(g), {"m": g}
    m = state["m"]
    return look.along(plus(g, -sigma, m)), {"m": mix(lam, m, g)}


def vasso(look: Look, state: State, *, theta: float = 0.4) -> tuple[list[Tensor], State]:
    r"""Variance-suppressed SAM: looks along the average $d \leftarrow (1 - \theta) d + \theta g$.

    Passes: 2. theta = 1 is SAM.

    Args:
        theta: between 0 and 1. The paper tunes it; the default here is ours.

    Source: Li & Giannakis 2023 (arXiv:2309.15639); d begins as the first gradient, as in their
    code.
    """
    _check_share("theta", theta)
    g = look()
    d = mix(theta, g, state["d"]) if "d" in state else g
    return look.along(d), {"d": d}


def multistep(look: Look, state: State, *, k: int = 2) -> tuple[list[Tensor], State]:
    r"""k steps of ascent, each with a kth of the radius.

    $\epsilon \leftarrow \epsilon + \frac1k e(\nabla L(w + \epsilon))$, with e the rule. A better
    maximiser of the same problem: the perturbation stays in the ball. Passes: 1 + k. k = 1 is SAM.

    Source: the ascent of Foret et al. 2021 repeated, as Andriushchenko & Flammarion 2022
    (arXiv:2206.06232) do.
    """
    k = check_integer("k", k, 1)
    g = look()
    if k == 1:
        return look.along(g), state
    epsilon = times(1 / k, look.epsilon(g))
    for _ in range(k - 1):
        epsilon = plus(epsilon, 1 / k, look.epsilon(look.at(epsilon)))
    return look.at(epsilon), state


def sparse_sam(
    look: Look, state: State, *, sparsity: float = 0.5, every: int = 100
) -> tuple[list[Tensor], State]:
    r"""Sparse SAM: only the entries with the largest $g_i^2$ are perturbed.

    $\epsilon = M \odot e(g)$ with a mask M. As in the authors' code the length of the unmasked
    perturbation is rho, so what is left of it is shorter. They rank entries by the empirical Fisher
    information of single examples; here it is the square of the batch's gradient, which needs no
    pass of its own. Dense hardware gains nothing by it. Passes: 2. sparsity = 0 is SAM.

    Args:
        sparsity: share of the entries that stay, at least 0 and below 1.
        every: steps from one choice of the mask to the next.

    Raises:
        TypeError: parameters are sharded, whose entries would have to be ranked together.

    Source: Mi et al. 2022, SSAM-F (arXiv:2210.05177).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity!r}")
    check_integer("every", every, 1)
    g, t = look(), state.get("t", 0)
    mask = state["mask"] if t % every else _largest(g, 1 - sparsity)
    epsilon = [m * e for m, e in zip(mask, look.epsilon(g), strict=True)]
    return look.at(epsilon), {"t": t + 1, "mask": mask}


def _largest(g: Tensors, share: float) -> list[Tensor]:
    """1 for the share of all entries that are largest in magnitude, 0 for the others."""
    if any(hasattr(x, "full_tensor") for x in g):
        raise TypeError("sparse_sam does not know sharded parameters (DTensor)")
    sizes = torch.cat([x.detach().abs().flatten().to(g[0].device) for x in g])
    chosen = sizes.topk(max(1, round(share * len(sizes)))).indices
    mask = torch.zeros_like(sizes).scatter_(0, chosen, 1.0)
    pieces = mask.split([x.numel() for x in g])
    return [piece.view(x.shape).to(x) for piece, x in zip(pieces, g, strict=True)]


# --- fewer looks ----------------------------------------------------------------------------------


def momentum_sam(look: Look, state: State) -> tuple[list[Tensor], State]:
    r"""Momentum-SAM: looks along minus the optimizer's momentum, $\epsilon = -\rho\, v / \|v\|$.

    The sign is that of the authors' code: it looks where momentum is about to go, as Nesterov's
    method does, which it is for $\rho = \eta\mu\|v\|$. The momentum is that of SGD, or `exp_avg` of
    Adam and its kin. The loss that the step returns is that at $w + \epsilon$. Passes: 1.

    Raises:
        ValueError: the optimizer keeps no momentum.

    Source: Becker et al. 2024 (arXiv:2401.12033); their rho is 0.3 by default and 3 on CIFAR.
    """
    return look.along(times(-1.0, look.momentum())), state


def looksam(
    look: Look, state: State, *, k: int = 5, alpha: float = 0.7
) -> tuple[list[Tensor], State]:
    r"""LookSAM: SAM every kth step; between, $d = g + \alpha \|g\| u$.

    u is the direction of the part of $g_s$ across $g$ at the last step of SAM, of length one over
    all parameters; other ports normalise each tensor by itself. Its length does not depend on rho,
    so rho to 0 is not the optimizer alone. Where the part across is lost in rounding, u is zero.
    Passes: 1 + 1/k. k = 1 is SAM; alpha = 0 is SAM every kth step (`every`).

    Args:
        k: steps from one look around to the next.
        alpha: length of the reused part over that of the gradient, at least 0.

    Source: Liu et al. 2022 (arXiv:2203.02714); no code of the authors is known.
    """
    check_integer("k", k, 1)
    check_nonnegative("alpha", alpha)
    g, t = look(), state.get("t", 0)
    if t % k:
        return plus(g, alpha * global_norm(g), state["u"]), {"t": t + 1, "u": state["u"]}
    gs = look.along(g)
    across = reject(gs, g)
    rounding = 100 * torch.finfo(g[0].dtype).eps * global_norm(gs)
    kept = (global_norm(across) > rounding).to(g[0].dtype)
    return gs, {"t": t + 1, "u": times(kept, unit(across))}


def graphsam(
    look: Look, state: State, *, k: int = 100, beta: float = 0.99
) -> tuple[list[Tensor], State]:
    r"""GraphSAM: the last steps' gradients stand in for the one to look along.

    $h \leftarrow \beta h + (1 - \beta)\, g_s / \|g_s\|$, $\epsilon = e(h)$; every kth step $h$ is
    set to $g / \|g\|$ by a pass of its own, and the step is SAM's. This is the idea of the paper
    with one norm for all tensors. The authors' code has one for each, cuts each tensor's
    perturbation at a radius of its own, and lets both shrink from epoch to epoch. Passes: 1 + 1/k.
    k = 1 is SAM.

    Args:
        k: steps between two anchors; the authors take an epoch.
        beta: how slow the average is, between 0 and 1.

    Source: Wang et al. 2024 (arXiv:2406.13137).
    """
    check_integer("k", k, 1)
    _check_share("beta", beta)
    t = state.get("t", 0)
    if t % k:
        h, gs = state["h"], look.along(state["h"])
    else:
        g = look()
        h, gs = unit(g), look.along(g)
    return gs, {"t": t + 1, "h": mix(beta, h, unit(gs))}


def esam(
    look: Look,
    state: State,
    *,
    beta: float = 0.5,
    gamma: float = 0.5,
    generator: torch.Generator,
) -> tuple[list[Tensor], State]:
    r"""Efficient SAM: a random part of the weights, and the examples whose loss rises most.

    Each tensor is perturbed with probability beta, along the gradient of those that are, by
    $\|\epsilon\| = \rho / \beta$; then only the share gamma of the batch whose loss has risen most
    from $w$ to $w + \epsilon$ has a second pass, and d is its mean gradient. Passes: 4/3 + gamma: a
    forward says which examples rise (2 for gamma = 1, which needs none). The authors save up to a
    third of a pass more, by not computing gradients of tensors that are left out.
    beta = gamma = 1 is SAM.

    The closure takes a keyword `examples`, an index into the batch, and returns the losses (N,) of
    those::

        def losses(examples=slice(None)):
            return cross_entropy(model(x[examples]), y[examples], reduction="none")

        SAM(optimizer, method=esam, generator=generator).step(losses)

    Args:
        beta: above 0, at most 1.
        gamma: above 0, at most 1.
        generator: draws the weights that take part.

    Raises:
        ValueError: the closure does not say the losses of single examples, or there are several
            processes, whose examples would have to be ranked together.

    Source: Du et al. 2021 (arXiv:2110.03141).
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    g = look()
    if beta < 1:
        taken = torch.rand(len(g), generator=generator, device=generator.device) < beta
        g = [x if take else torch.zeros_like(x) for x, take in zip(g, taken.tolist(), strict=True)]
    if gamma == 1 and beta == 1:
        return look.along(g), state
    epsilon = times(1 / beta, look.epsilon(g))
    if gamma == 1:
        return look.at(epsilon), state
    before = look.losses()
    rise = look.losses(epsilon) - before
    kept = rise.topk(max(1, round(gamma * len(rise)))).indices.sort().values
    return look.at(epsilon, examples=kept), state


# --- random looks ---------------------------------------------------------------------------------


def trace_sam(
    look: Look, state: State, *, lam: float = 1.0, n: int = 1, generator: torch.Generator
) -> tuple[list[Tensor], State]:
    r"""Trace-SAM: $d = g + \lambda\, \mathrm{mean}_i (g_i - g)$.

    $g_i$ is the gradient at $w + \rho z_i$ with Gaussian z. d is that of
    $L + \lambda\, E[L(w + \rho z) - L]$, to second order $L + \frac12 \lambda\rho^2 \mathrm{tr} H$.
    On a quadratic that adds nothing: the trace is constant. At lam = 1 it is the gradient at random
    points. rho is the size of an entry, not of the whole. Passes: 1 + n.

    Args:
        lam: weight, at least 0.
        n: probes a step.
        generator: draws them.

    Source: Tahmasebi et al. 2024 (arXiv:2406.03682).
    """
    rule = partial(gaussian, generator=generator)
    return _universal(look, lam, n, rule, torch.ones_like), state


def frob_sam(
    look: Look, state: State, *, lam: float = 0.005, n: int = 2, generator: torch.Generator
) -> tuple[list[Tensor], State]:
    r"""Frob-SAM: $d = g + \frac{\lambda}{\rho^2} \mathrm{Cov}_i(L_i, g_i)$ over n Gaussian probes.

    Unbiased for the gradient of $\frac{\lambda}{2\rho^2} \mathrm{Var}\,L(w + \rho z) =
    \frac\lambda2 \|g\|^2 + \frac{\lambda\rho^2}{4} \|H\|_F^2 + \dots$: the Frobenius norm leads
    only where $\|g\|$ is small beside rho times it. On a quadratic the expectation is
    $(I + \lambda H) g$, that of `perturbations.unnormalized` with rho = lam. rho is the size of an
    entry. Passes: 1 + n.

    Args:
        lam: weight, at least 0. Depends on the scale of the loss.
        n: probes a step, at least 2.
        generator: draws them.

    Source: Tahmasebi et al. 2024 (arXiv:2406.03682); their rho is 0.005.
    """
    n = check_integer("n", n, 2)
    rule = partial(gaussian, generator=generator)

    def weights(rises: Tensor) -> Tensor:
        return (rises - rises.mean()) * n / (n - 1)

    return _universal(look, lam, n, rule, weights), state


def det_sam(
    look: Look,
    state: State,
    *,
    lam: float = 1.0,
    n: int = 1,
    width: float = 0.01,
    generator: torch.Generator,
) -> tuple[list[Tensor], State]:
    r"""Det-SAM: $d = g + \lambda\, \bar\psi^{-3}\, \mathrm{mean}_i\, \psi_i (g_i - g)$.

    $\psi_i = \exp(-D_i / 2)$ with the rises $D_i = (L(w + \rho x_i) - L) / \rho^2$ at points x
    uniform in a cube. With n = 1, as the authors run it, $\psi$ is $e^{D}$ and nothing of a
    determinant is left. The exponential overflows where the loss rises by more than about 80 rho²
    (float32); such a step is skipped and counted. Passes: 1 + n.

    Args:
        lam: weight, at least 0. Depends on the scale of the loss.
        n: probes a step.
        width: half the side of the cube, so that an entry moves by at most rho times width.
        generator: draws the points.

    Source: Tahmasebi et al. 2024 (arXiv:2406.03682); their rho is 1.
    """
    check_positive("width", width)

    def cube(params: Tensors, grads: Tensors, rho: Radius) -> list[Tensor]:
        return times(width, uniform(params, grads, rho, generator=generator))

    def weights(rises: Tensor) -> Tensor:
        mean = torch.logsumexp(-rises / 2, 0) - math.log(len(rises))
        return torch.exp(-rises / 2 - 3 * mean)

    return _universal(look, lam, n, cube, weights), state


def _universal(
    look: Look, lam: float, n: int, rule: Rule, weights: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """``g + lam mean_i c_i (g_i - g)`` with ``c = weights(rises)`` over n random looks.

    The derivative of ``L + rho² lam phi(mean psi(rises))``, rises (n,) = (L_i - L) / rho², whose
    chain rule gives the weights.
    """
    check_nonnegative("lam", lam)
    check_integer("n", n, 1)
    g = look()
    loss, rises, changes = look.loss, [], []
    for _ in range(n):
        changes.append(plus(look.along(g, rule), -1.0, g))
        rises.append((look.loss - loss) / look.rho**2)
    direction = g
    for weight, change in zip(weights(torch.stack(rises)), changes, strict=True):
        direction = plus(direction, lam / n * weight, change)
    return direction


# --- without a method: groups and radii -----------------------------------------------------------

NORMS = (
    nn.modules.batchnorm._NormBase,  # of batches and instances
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def sam_on(
    model: nn.Module, layers: type[nn.Module] | tuple[type[nn.Module], ...] = NORMS
) -> list[dict[str, Any]]:
    """SAM-ON: parameter groups of which only those of the normalisation layers are perturbed.

    ``SAM(torch.optim.SGD(sam_on(model), lr=0.1), rho=0.5)``. The norm that the rule takes is over
    those parameters alone. With the rule `asam` give ``adaptive=lambda p: True``: scales of norm
    layers have one axis, and would not adapt. Passes: 2. On a network with no other parameters it
    is SAM.

    Args:
        model: all of its parameters are in the groups.
        layers: the modules whose own parameters are perturbed, by type and not by name.

    Raises:
        ValueError: no such module has a parameter.

    Source: Mueller et al. 2023 (arXiv:2306.04226).
    """
    chosen = {
        id(p)
        for module in model.modules()
        if isinstance(module, layers)
        for p in module.parameters(recurse=False)
    }
    perturbed = [p for p in model.parameters() if id(p) in chosen]
    others = [p for p in model.parameters() if id(p) not in chosen]
    if not perturbed:
        raise ValueError(
            f"model must have a layer of {layers!r:.200} with parameters, "
            f"got {type(model).__name__} without"
        )
    groups: list[dict[str, Any]] = [{"params": perturbed}]
    return [*groups, {"params": others, "rho": 0.0}] if others else groups


def every(k: int, rho: float) -> Callable[[int], float]:
    """A radius of rho at every kth step, and 0, the optimizer alone, between: passes 1 + 1/k."""
    check_integer("k", k, 1)
    check_nonnegative("rho", rho)
    return lambda step: 0.0 if step % k else rho


def bernoulli(p: float, rho: float, seed: int = 0) -> Callable[[int], float]:
    """A radius of rho with probability p at each step, else 0: passes 1 + p.

    A function of seed and step alone, so that a run that is taken up again draws the same.

    Source: Zhao et al. 2022 (arXiv:2203.09962), randomised sharpness-aware training: a Bernoulli
    trial at each step says whether it is one of SAM.
    """
    _check_share("p", p)
    check_nonnegative("rho", rho)
    seed = check_integer("seed", seed, 0)

    def radius(step: int) -> float:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        return rho if float(torch.rand((), generator=generator, dtype=torch.float64)) < p else 0.0

    return radius


def gsam_radius(
    optimizer: torch.optim.Optimizer,
    rho_max: float,
    rho_min: float,
    lr_max: float,
    lr_min: float = 0.0,
) -> Callable[[int], float]:
    r"""A radius that follows the learning rate, as GSAM has it.

    $\rho = \rho_{min} + (\rho_{max} - \rho_{min})
    \frac{\eta - \eta_{min}}{\eta_{max} - \eta_{min}}$, with the learning rate of the optimizer's
    first group; rho_max where lr_max = lr_min.

    Source: Zhuang et al. 2022 (arXiv:2203.08065).
    """
    check_nonnegative("rho_min", rho_min)
    check_nonnegative("rho_max", rho_max)
    if not lr_max >= lr_min:
        raise ValueError(f"lr_max must be at least lr_min={lr_min!r}, got {lr_max!r}")

    def radius(step: int) -> float:
        if lr_max == lr_min:
            return rho_max
        share = (float(optimizer.param_groups[0]["lr"]) - lr_min) / (lr_max - lr_min)
        return rho_min + (rho_max - rho_min) * share

    return radius


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
