r"""Perturbation rules: where a sharpness-aware step looks before it moves, one function a rule.

A rule is called as ``rule(params, grads, rho)``, with the parameters $w$ and the gradients $g$ of
the loss at $w$ as lists of tensors, and returns the perturbation $\epsilon$ as a list of the same
shapes. It changes none of its arguments. $\|\cdot\|$ is one Euclidean norm over all tensors of the
list together, and $T$ acts elementwise.

==================  ==========================  ====================================================
rule                epsilon                     the maximiser of $g \cdot \epsilon$ over
==================  ==========================  ====================================================
`sam`               rho g / |g|                 the ball $\|\epsilon\| \le \rho$
`asam`              rho T² g / |T g|            the ellipsoid $\|T^{-1} \epsilon\| \le \rho$
`sam_linf`          rho sign(g)                 the cube, each entry at most rho
`unnormalized`      rho g                       the ball of radius rho |g|
`awp`               rho |w| g / |g|             a ball of radius rho |w| around each weight tensor
`random_direction`  rho z / |z|, z Gaussian     none: the control
`gaussian`          rho z, z Gaussian           none: a probe, rho is the size of an entry
`uniform`           rho x, x in the cube        none: a probe, each entry at most rho
==================  ==========================  ====================================================

`dithered` is another rule rounded so that weights of half precision take it up.

What all rules keep:

- `rho` is one number, or one a tensor: then each tensor's part of epsilon is scaled by its own.
- Where the gradient is zero (but for probes), or is not finite, epsilon is zero everywhere, never
  NaN.
- Norms are taken in float32 or better, and epsilon is float32 where a parameter is of half
  precision: in float16 the factor rho / |g| would overflow.
- Nothing waits for an accelerator: the norm is never read by the host.
- Sharded parameters (`DTensor`) have the norm of the whole, not that of a shard.

The rules over a ball are its `steepest` step, and so is the step of an attack on the inputs
(`sam_lab.adversarial`): there the balls are around the examples, one each, here there is one around
the weights.

To add a rule, write a function like these; arguments of its own are bound by `functools.partial`,
as in ``SAM(optimizer, 0.5, rule=partial(asam, eta=0.0))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Rule",
    "asam",
    "awp",
    "dithered",
    "gaussian",
    "global_norm",
    "is_weight",
    "random_direction",
    "sam",
    "sam_linf",
    "steepest",
    "uniform",
    "unnormalized",
    "usable",
]

HALF = (torch.float16, torch.bfloat16)
NORMS = ("l2", "linf")
Radius = float | Sequence[float]
Rule = Callable[..., list[Tensor]]
"""`rule(params, grads, rho)` returns the perturbation, one tensor a parameter."""


def sam(params: Sequence[Tensor], grads: Sequence[Tensor], rho: Radius) -> list[Tensor]:
    r"""Sharpness-aware minimization: $\epsilon = \rho\, g / \|g\|$.

    The maximiser of the loss, linearised at $w$, over the ball $\|\epsilon\|_2 \le \rho$.

    Source: Foret et al. 2021, equation 2 with p = 2 (arXiv:2010.01412).

    Example:
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> sam([w], [g], rho=0.5)
        [tensor([0.3000, 0.4000])]
    """
    grads = _wide(grads)
    return steepest(grads, rho, global_norm(grads))


def is_weight(p: Tensor) -> bool:
    """Whether a parameter has two axes or more: weights have, biases and norm scales do not."""
    return p.ndim > 1


def asam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Radius,
    *,
    eta: float = 0.01,
    adaptive: Callable[[Tensor], bool] = is_weight,
) -> list[Tensor]:
    r"""Adaptive SAM: $\epsilon = \rho\, T^2 g / \|T g\|$.

    $T = |w| + \eta$ elementwise for the adaptive parameters and 1 for the others. The radius then
    scales with the weights: with eta = 0 and biases adaptive too, multiplying one layer of a ReLU
    network and dividing the next changes the perturbed loss in nothing.

    Args:
        eta: keeps weights near zero from being out of reach; at least 0.
        adaptive: which parameters adapt. By default those with two axes or more; the authors' code
            takes every parameter that has 'weight' in its name, the scales of norm layers too,
            and other ports take all, for which the best rho is several times larger.

    Raises:
        ValueError: eta is negative.

    Source: Kwon et al. 2021, with element-wise normalisation and p = 2 (arXiv:2102.11600).
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta!r}")
    epsilon = _wide(grads)
    which = [i for i, w in enumerate(params) if adaptive(w)]
    T = [params[i].detach().to(epsilon[i].dtype).abs() + eta for i in which]
    for i, t in zip(which, T, strict=True):
        epsilon[i] = t * epsilon[i]
    length = global_norm(epsilon)
    for i, t in zip(which, T, strict=True):
        epsilon[i].mul_(t)
    del T
    return steepest(epsilon, rho, length)


def sam_linf(params: Sequence[Tensor], grads: Sequence[Tensor], rho: Radius) -> list[Tensor]:
    r"""SAM over a cube: $\epsilon = \rho\, \mathrm{sign}(g)$.

    The maximiser of the linearised loss where every entry of epsilon is at most rho.

    Source: Foret et al. 2021, equation 2 with p = infinity (arXiv:2010.01412).
    """
    grads = _wide(grads)
    return steepest(grads, rho, global_norm(grads), "linf")


def unnormalized(params: Sequence[Tensor], grads: Sequence[Tensor], rho: Radius) -> list[Tensor]:
    r"""SAM without normalisation: $\epsilon = \rho\, g$, of length $\rho \|g\|$.

    The one rule here that depends on the scale of the loss: give `SAM.perturbed` the scale where a
    GradScaler has multiplied it.

    Source: Andriushchenko & Flammarion 2022 (arXiv:2206.06232).
    """
    grads = _wide(grads)
    return _scaled(grads, rho, global_norm(grads), unit=True)


def awp(params: Sequence[Tensor], grads: Sequence[Tensor], rho: Radius) -> list[Tensor]:
    r"""Adversarial weight perturbation: $\epsilon_l = \gamma \|w_l\| g_l / \|g_l\|$ for a weight.

    Each weight has a ball of its own, as large as the weight is long, times $\gamma$ (here `rho`);
    biases and the scales of norm layers are left where they are.

    Source: Wu et al. 2020 (arXiv:2004.05884), with one step of the ascent, as in their code.

    Example:
        >>> w, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
        >>> awp([w], [g], rho=0.1)
        [tensor([[0.0000, 0.5000]])]
    """
    grads = _wide(grads)
    finite = global_norm(grads) < math.inf  # of all: one that is not stops every weight
    radii = rho if isinstance(rho, Sequence) else [rho] * len(grads)
    epsilon = []
    for w, g, radius in zip(params, grads, radii, strict=True):
        length = global_norm([g])
        (e,) = steepest([g], radius, torch.where(finite.to(length.device), length, 0))
        epsilon.append(e * (global_norm([w]) if is_weight(w) else 0))
    return epsilon


def random_direction(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Radius,
    *,
    generator: torch.Generator,
) -> list[Tensor]:
    r"""A direction drawn at random: $\epsilon = \rho\, z / \|z\|$ with Gaussian $z$.

    The control for `sam`: as long, but blind. In P dimensions it has a part of only about
    $\rho / \sqrt{P}$ along the gradient.

    Args:
        generator: the source of z. One on the CPU gives the same z for parameters on any device,
            which then has to wait for the copy.

    Raises:
        TypeError: a parameter is sharded: the shards of z would have to be drawn together.
    """
    z, length = _drawn("random_direction", torch.randn, params, grads, generator)
    # the gradient decides here too whether there is a step at all
    return steepest(z, rho, torch.where(usable(length), global_norm(z), 0))


def gaussian(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Radius,
    *,
    generator: torch.Generator,
) -> list[Tensor]:
    r"""A Gaussian probe: $\epsilon = \rho\, z$, of length about $\rho \sqrt{P}$ in P dimensions.

    What Trace-SAM and Frob-SAM average over (`sam_lab.methods`). It is there where the gradient is
    zero too.

    Args:
        generator: the source of z, as for `random_direction`.

    Raises:
        TypeError: a parameter is sharded.

    Source: Tahmasebi et al. 2024 (arXiv:2406.03682).
    """
    z, length = _drawn("gaussian", torch.randn, params, grads, generator)
    return _scaled(z, rho, length, unit=True)


def uniform(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Radius,
    *,
    generator: torch.Generator,
) -> list[Tensor]:
    r"""A probe in a cube: $\epsilon = \rho\, x$ with every entry of x uniform between -1 and 1.

    What Det-SAM averages over (`sam_lab.methods`). Arguments and errors are those of `gaussian`.

    Source: Tahmasebi et al. 2024 (arXiv:2406.03682).
    """
    x, length = _drawn("uniform", torch.rand, params, grads, generator)
    return _scaled([2 * each - 1 for each in x], rho, length, unit=True)


def _drawn(
    name: str,
    draw: Callable[..., Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor]:
    """Random numbers of the shapes of the gradients, and the norm of the gradients."""
    if any(hasattr(p, "full_tensor") for p in params):
        raise TypeError(f"{name} does not know sharded parameters (DTensor)")
    grads = _wide(grads)
    drawn = [
        draw(g.shape, generator=generator, device=generator.device, dtype=g.dtype).to(g)
        for g in grads
    ]
    return drawn, global_norm(grads)


def dithered(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho: Radius,
    *,
    rule: Rule = sam,
    generator: torch.Generator,
) -> list[Tensor]:
    r"""Another rule's perturbation, such that weights of half precision are right on average.

    Such weights are far apart: most of a perturbation is less than half the way to the next one,
    and rounded away. Here $w + \epsilon$ is one of the two neighbours of what the rule asks for,
    drawn with the probabilities that make the mean right. What this adds is noise, nearly
    orthogonal to the rule's perturbation. Parameters of other precision have that as it is.

    Args:
        rule: what is rounded, a rule without a state: ``partial(dithered, rule=asam)``.
        generator: the source of the noise.
    """
    return [
        _to_neighbours(shard(p), shard(e), generator) if p.dtype in HALF else e
        for p, e in zip(params, rule(params, grads, rho), strict=True)
    ]


def _to_neighbours(p: Tensor, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """What leads from p to a neighbour of p + epsilon in the dtype of p; float32."""
    here = p.detach().float()
    there, kind = here + epsilon, torch.finfo(p.dtype)
    exponent = torch.frexp(there).exponent - 1
    unit = torch.ldexp(torch.full_like(there, kind.eps), exponent)
    units = there / unit.clamp_min_(kind.smallest_normal * kind.eps)
    below = units.floor()
    noise = torch.rand(p.shape, generator=generator, device=generator.device).to(units)
    return (below + (noise < units - below)) * unit - here


def steepest(
    grads: Sequence[Tensor], radius: Radius, length: Tensor, norm: str = "l2"
) -> list[Tensor]:
    r"""The way up in a ball: what maximises $g \cdot \epsilon$ over $\|\epsilon\| \le r$.

    $r\, g / \|g\|_2$ in the Euclidean ball, $r\, \mathrm{sign}(g)$ in the cube: where
    $g \cdot \epsilon \le \|g\|_* \|\epsilon\|$, with the dual norm $\|\cdot\|_*$, is an equality.

    Args:
        grads: the gradient.
        radius: $r$; one number, or one a tensor.
        length: the Euclidean norm of the gradient. A 0-dim tensor where the ball is one around all
            tensors together, as SAM's; one with an axis of size 1 for each axis but the first,
            (N, 1, ..., 1), where each of N examples has a ball of its own, as in attacks. Where it
            is not finite, or zero in the Euclidean ball, the step is zero.
        norm: "l2" or "linf".

    Returns:
        One step a tensor, of its shape.

    Raises:
        ValueError: another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "linf":
        return _scaled([g.sign() for g in grads], radius, length, unit=True)
    return _scaled(grads, radius, length)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, a 0-dim tensor, in float32 or better.

    Where the tensors are sharded it is the norm of the whole, the same on every process. It is not
    read by the host: on an accelerator nothing waits for it.

    Raises:
        ValueError: the list is empty.
    """
    if not tensors:
        raise ValueError("global_norm needs at least one tensor, got none")
    norms = torch._foreach_norm(_wide(tensors), 2)
    device = norms[0].device
    if any(norm.device != device for norm in norms):
        norms = tuple(norm.to(device) for norm in norms)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def usable(norm: Tensor) -> Tensor:
    """Whether rho / norm is a number that a perturbation can be made with, entry by entry."""
    # in a norm below this the squares have underflown, and rho / norm could overflow
    smallest: float = torch.finfo(norm.dtype).smallest_normal ** 0.5
    return (norm > smallest) & (norm < math.inf)


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Half precision as float32, all others as they are."""
    plain = [t.detach() if t.requires_grad else t for t in tensors]
    return [t.float() if t.dtype in HALF else t for t in plain]


def _scaled(
    direction: Sequence[Tensor], rho: Radius, norm: Tensor, unit: bool = False
) -> list[Tensor]:
    """``rho * direction / norm``; without the division if `unit`; zeros for an unusable norm."""
    fit = norm < math.inf if unit else usable(norm)

    def factor(radius: float) -> Tensor:
        return torch.full_like(norm, radius) if unit else radius / norm

    if isinstance(rho, Sequence):
        each = {radius: factor(radius) for radius in set(rho)}
        scaled = [d * each[radius].to(d.device) for d, radius in zip(direction, rho, strict=True)]
    elif not norm.ndim and all(d.device == direction[0].device for d in direction):
        scaled = list(torch._foreach_mul(list(direction), factor(rho)))
    else:
        scaled = [d * factor(rho).to(d.device) for d in direction]
    if fit.device.type == "cpu":  # the host knows it, nothing waits
        if fit.all():
            return scaled
        if not fit.ndim:
            return [torch.zeros_like(e) for e in scaled]
    # zero times infinity is not zero, so those entries have to be chosen, not multiplied
    return [torch.where(fit.to(e.device), e, 0) for e in scaled]


def shard(t: Tensor) -> Tensor:
    """The part of a sharded tensor (`DTensor`) that this process has; all of any other."""
    return t.to_local() if hasattr(t, "to_local") else t
