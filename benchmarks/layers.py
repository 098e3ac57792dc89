"""What a Hessian-vector product costs layer by layer: sam_lab beside its peers, in one run.

Convolution, layer norm and attention each stand alone, two in a row, so that the second derivative
also passes through one; and two networks that are made of them, a convolutional one with layer norm
and a Transformer that predicts a last token. Inputs are random, the loss is cross-entropy.

A cost is in gradients of the same loss, both of the same turn, processor seconds on one thread:
the median over turns with its quartiles (`benchmarks.curvature.product_table`). Attention is twice
there: written out, and torch's module, whose gradient is fused while no product can be: fused
attention has no second derivative. A tool *fails* where it does not switch the fusing off.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, say, version_of
from benchmarks.curvature import PRODUCTS, Problem, product_line, product_table
from sam_lab import models


class Attention(nn.Module):
    """Causal self-attention of (B, T, width): written out, or torch's module."""

    def __init__(self, width: int, heads: int, written_out: bool) -> None:
        super().__init__()
        self.whole: nn.Module
        if written_out:
            self.whole = models.Block(width, heads, width // heads, 2)
            del self.whole.norms, self.whole.network
        else:
            self.whole = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.whole, models.Block):
            return self.whole.attention(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = self.whole(x, x, x, attn_mask=future, need_weights=False)[0]
        return out


class Last(nn.Module):
    """(B, T, classes) to what is said of the last token, (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def _twice(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), make(), nn.Flatten())


# name: (network, shape of a batch, classes of the labels; 0 for tokens as inputs and labels)
Layer = tuple[Callable[[], nn.Module], tuple[int, ...], int]
LAYERS: dict[str, Layer] = {
    "convolution": (lambda: _twice(lambda: nn.Conv2d(32, 32, 3, padding=1)), (16, 32, 28, 28), 10),
    "layer norm": (lambda: _twice(lambda: nn.LayerNorm(128)), (32, 64, 128), 10),
    "attention, written out": (lambda: _twice(lambda: Attention(128, 4, True)), (16, 64, 128), 10),
    "attention, torch's": (lambda: _twice(lambda: Attention(128, 4, False)), (16, 64, 128), 10),
    "CNN with layer norm": (
        lambda: models.cnn((1, 28, 28), 10, "relu", widths=(16, 32), pooling="max", norm="layer"),
        (32, 1, 28, 28),
        10,
    ),
    "Transformer": (
        lambda: nn.Sequential(models.transformer(128, 64, 2, 4, 64), Last()),
        (16, 64),
        0,
    ),
}
SMALL: dict[str, Layer] = {
    "convolution": (lambda: _twice(lambda: nn.Conv2d(2, 2, 3, padding=1)), (2, 2, 4, 4), 10),
    "attention, torch's": (lambda: _twice(lambda: Attention(4, 2, False)), (2, 3, 4), 10),
    "Transformer": (lambda: nn.Sequential(models.transformer(16, 4, 1, 2, 4), Last()), (2, 4), 0),
}
"""Seconds instead of minutes; shows that everything runs, not what it costs."""


def make_problem(layer: Layer) -> Problem:
    """The network with random weights, inputs and labels, the same each time."""
    build, shape, classes = layer
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build()
    if classes:
        x = torch.randn(shape, generator=generator)
    else:
        x = torch.randint(16, shape, generator=generator)
    y = torch.randint(classes or 16, shape[:1], generator=generator)
    return Problem("CE", model, x, y)


def run(layers: dict[str, Layer], turns: int) -> dict[str, Any]:
    """Each layer by each tool that is installed."""
    rows, parameters = [], {}
    for name, layer in layers.items():
        say(f"products through {name}")
        problem = make_problem(layer)
        parameters[name] = sum(p.numel() for p in problem.params)
        rows += [{"layer": name, **row} for row in product_table(problem, turns)]
    peers = {package: version_of(package) for *_, package, _ in PRODUCTS if package}
    return {"turns": turns, "parameters": parameters, "peers": peers, "products": rows}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in result["peers"].items())
    provenance = result["provenance"]
    lines = [f"{provenance['threads']} thread(s), torch {provenance['torch']}, {versions}"]
    for name, parameters in result["parameters"].items():
        head = f"{name}, {parameters} parameters"
        lines += ["", f"{head:49}{'gradients':>10}{'quartiles':>13}"]
        lines += [product_line(row) for row in result["products"] if row["layer"] == name]
    return "\n".join(lines)


BENCHMARK = Benchmark(
    name="layers",
    about="a Hessian-vector product through convolution, layer norm and attention, in gradients",
    schema="sam_lab.benchmark.layers/1",
    measure=lambda quick: run(SMALL, 2) if quick else run(LAYERS, 30),
    table=table,
)
