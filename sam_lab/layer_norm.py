r"""Layer norm whose second derivative costs little more than its first.

Torch differentiates its fused layer norm twice by some forty operations, each a pass over the
activations: in a small convolutional network that is half of a Hessian-vector product. Here the
derivative of the derivative is written out in half as many.

With $\hat x = (x - \bar x)\, r$ and $r = (\operatorname{var} x + \epsilon)^{-1/2}$, a bar for the
mean over the D entries that are normalised together, and the symmetric map

$$P z = z - \overline{z} - \hat x\, \overline{z \hat x},\qquad\text{so that}\quad
d\hat x = r\, P\, dx,$$

the output $w \hat x + b$ has, for an output gradient g, the gradients $r P(w g)$, $\sum g \hat x$
and $\sum g$. The second backward pass brings (u, a, c) for these three, and with
$\alpha = \overline{w g \hat x}$, $\beta = \overline{u \hat x}$ sends back

$$\text{to } g:\ w\, r P u + a \hat x + c,\qquad
\text{to } w:\ \sum g\, r P u,\qquad
\text{to } x:\ r P\big(a g - r (\alpha u + \beta w g)\big) - r^2 \hat x\, \overline{w g\, P u}.$$

The derivation is ours; `tests/test_layer_norm.py` holds it against finite differences.

*Where it pays.* On one CPU thread, a second backward pass through layer norm alone costs in
torch's own time 1.2 to 1.3 with 4,096 entries, 0.8 to 1 with 32,768, 0.7 with 131,072 and 0.5 with
two million, for any D from 16 to 768; the first backward pass costs 0.5 to 1.2 gradients of the
layer more. Products through the network of `experiments.sam.sam_edge_cnn` fall from 2.5 gradients
to 1.8. Not measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["SMALLEST", "FastLayerNorm", "layer_norm"]

SMALLEST = 2**17
"""Entries from which on `FastLayerNorm` takes the place of torch's: see "Where it pays"."""


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, with a second derivative in few operations.

    Equal to torch's up to rounding in value and the first two derivatives. Later ones are those of
    the formula written out, from which torch's own differ (seen with torch 2.13).

    Args:
        input: ``(..., *normalized_shape)``.
        normalized_shape: the last dimensions, which are normalised together.
        weight, bias: of that shape, or None for 1 and 0.
        eps: added to the variance.

    Raises:
        RuntimeError: as torch's, if the shapes do not fit; and inside transforms of `torch.func`
            or in forward mode, for which it has no rules.
    """
    shape = tuple(normalized_shape)
    fits = shape and tuple(input.shape[-len(shape) :]) == shape and input.numel() > 0
    if not fits or any(t is not None and tuple(t.shape) != shape for t in (weight, bias)):
        return functional.layer_norm(input, shape, weight, bias, eps)  # it says what is wrong
    rows = input.reshape(-1, math.prod(shape))
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    out: Tensor = _LayerNorm.apply(rows, *flat, eps)
    return out.view(input.shape)


class FastLayerNorm(TorchFunctionMode):
    """A context in which torch's layer norm, and so `torch.nn.LayerNorm`, is `layer_norm`.

    For inputs of at least `SMALLEST` entries, on this thread. Where ours has no rule, as inside
    transforms of `torch.func` and in forward mode, torch's own is called.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            entries = args[0] if args else kwargs["input"]
            if entries.numel() >= SMALLEST:
                try:
                    return layer_norm(*args, **kwargs)
                except RuntimeError:  # torch's own then, or its own error
                    pass
        return func(*args, **kwargs)


class _LayerNorm(torch.autograd.Function):
    """Rows (N, D) to rows: x_hat * weight + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        out, mean, r = torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, r)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        args = g.contiguous(), *ctx.saved_tensors, needed
        again = torch.is_grad_enabled()
        return *(_Gradient.apply(*args, ctx.eps) if again else _gradient(*args)), None


class _Gradient(torch.autograd.Function):
    """The gradients of `_LayerNorm` for the output gradient g; None for those not needed."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        r: Tensor,
        needed: list[bool],
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        normed = torch.native_layer_norm(x, x.shape[1:], None, None, eps)[0]
        ctx.save_for_backward(g, x, weight, mean, r, normed, g * normed)
        ctx.eps = eps
        return _gradient(g, x, weight, bias, mean, r, needed)

    @staticmethod
    def backward(
        ctx: Any, u: Tensor | None, a: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, r, normed, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative: torch must see every dependence
            mean = x.mean(1, keepdim=True)
            r = ((x - mean).square().mean(1, keepdim=True) + ctx.eps).rsqrt()
            normed = (x - mean) * r
            product = g * normed
        w = x.new_ones(x.shape[1]) if weight is None else weight
        a = torch.zeros_like(w) if a is None else a
        c = torch.zeros_like(w) if c is None else c
        u = torch.zeros_like(x) if u is None else u.contiguous()
        one = torch.ones_like(w)

        def average(rows: Tensor, times: Tensor = one) -> Tensor:
            return (rows @ (times / len(times)))[:, None]  # a product with a vector is fastest

        mean_u, beta = average(u), average(u * normed)
        turned = torch.addcmul(u, normed, beta, value=-1).sub_(mean_u).mul_(r)  # r P u
        crossed = g * turned
        to_g = torch.addcmul(c, normed, a).addcmul_(turned, w)
        to_weight = None if weight is None else crossed.sum(0)
        # the argument of the last P, its mean and its mean times x_hat, from the means above
        ra, rb = r * average(product, w), r * beta
        plain = average(g, a) - rb * average(g, w) - ra * mean_u
        along = average(product, a) - 2 * ra * beta + average(crossed, w)
        to_x = (a - rb * w).mul_(g).addcmul_(u, ra, value=-1)
        to_x = to_x.addcmul_(normed, along, value=-1).sub_(plain).mul_(r)
        return to_g, to_x, to_weight, None, None, None, None, None


def _gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    r: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Torch's fused kernel."""
    grads = torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[1:], mean, r, weight, bias, needed
    )
    return tuple(d if n else None for d, n in zip(grads, needed, strict=True))
