"""What a preset costs to run: floating-point operations counted, and hours estimated from them.

Operations are those of matrix products and convolutions, a multiplication and an addition being
two. They are counted on the meta device, where nothing is computed. Gradients are then counted from
the config. What a measurement takes depends on the run and is estimated at `HVPS` products of
Hessian and vector.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["H100", "HVPS", "TWO_CORES", "cost_in_words", "gradient_flops", "measurement"]

TWO_CORES = 1e11
"""FLOP/s sustained by two CPU cores. Measured in float32: 0.07e12 on a product of two matrices of
3000 x 3000, 0.10e12 on the gradient of a WRN-16-4, 0.14e12 on that of the fully connected network
of three layers of 1,000."""
H100 = 3e13
"""FLOP/s assumed of one H100 in float32: not measured, about half of what its maker states."""
HVPS = 30
"""Products of Hessian and vector assumed for one measurement of the sharpness or of the trace."""
HVP = 2  # gradients that one product costs


def gradient_flops(model: nn.Module, x: torch.Tensor) -> float:
    """FLOPs of the gradient of a loss in the parameters, forward and backward, per example of x.

    Args:
        model: takes `x`, (N, ...); it is moved to the meta device, and is of no other use then.
    """
    model = model.to("meta")
    with FlopCounterMode(display=False) as counter:
        loss = model(x.to("meta")).sum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return float(counter.get_total_flops()) / len(x)


def measurement(gradient: float) -> float:
    """FLOPs assumed for one measurement of the sharpness, where a gradient costs so many."""
    return HVPS * HVP * gradient


def cost_in_words(flops: float) -> str:
    """``"4.1e+17 FLOPs: about 48 days on two CPU cores, 3.8 hours on one H100"``."""
    cores, gpu = _time(flops / TWO_CORES), _time(flops / H100)
    return f"{flops:.1e} FLOPs: about {cores} on two CPU cores, {gpu} on one H100"


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if seconds < 90:
        return "a minute"
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    if hours < 48:
        return f"{hours:.2g} hours"
    days = hours / 24
    return f"{days:.0f} days" if days < 1000 else f"{days / 365:.0f} years"
