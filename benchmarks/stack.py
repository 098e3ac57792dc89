"""What it saves to train many small runs as one program: `Stack` beside the runs one by one.

A fully connected network (64-50-50-10) and a small CNN on 8 x 8 inputs, random data, by SGD with
momentum 0.9 and by SAM. The runs one by one are `torch.optim.SGD` alone, with its foreach
implementation, and `sam_lab.SAM` around it. Reported is their time for a step of all runs over that
of `Stack`: above 1 the stack is faster. Both take turns; the median over turns with its quartiles.
On the CPU it is processor time on one thread, on CUDA the time between two events around a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, say
from benchmarks.sam import (
    LR,
    MOMENTUM,
    RHO,
    check_device,
    ratios,
    step_seconds,
    with_quartiles,
)
from sam_lab import SAM, models
from sam_lab.experiments.lab.table import Table
from sam_lab.stack import Stack

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "MLP": lambda seed: models.mlp([64, 50, 50, 10], seed=seed),
    "CNN": lambda seed: models.cnn((1, 8, 8), widths=(8, 16), seed=seed),
}
METHODS = {"SGD": 0.0, "SAM": RHO}


@dataclass(frozen=True)
class Config:
    """How large the benchmark is.

    Attributes:
        runs: how many, one grid each.
        batches: examples in a batch.
        steps, turns: steps in a block, and turns.
    """

    runs: tuple[int, ...] = (4, 16)
    batches: tuple[int, ...] = (16, 128, 500, 1500)
    steps: int = 3
    turns: int = 9


QUICK = Config(runs=(2,), batches=(4,), steps=1, turns=2)


def loss(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(forward(x), y)


def one_by_one(nets: Sequence[nn.Module], rho: float, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A step of every run, one after the other."""
    optimizers = [torch.optim.SGD(n.parameters(), LR, MOMENTUM, foreach=True) for n in nets]
    if rho:
        sams = [SAM(o, rho, n) for o, n in zip(optimizers, nets, strict=True)]

        def perturbed() -> None:
            for net, sam in zip(nets, sams, strict=True):
                sam.step(partial(loss, net, x, y))

        return perturbed

    def plain() -> None:
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss(net, x, y).backward()
            optimizer.step()

    return plain


def measure(
    network: str, runs: int, batch: int, method: str, device: torch.device, config: Config
) -> dict[str, float]:
    """The time of the runs one by one over that of the stack."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 8, 8, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    nets = [NETWORKS[network](seed).to(device) for seed in range(runs)]
    rho = METHODS[method]
    stack = Stack(nets, loss, LR, rho, MOMENTUM)
    steps = [one_by_one(nets, rho, x, y), lambda: stack.step(x, y)]
    spent: list[list[float]] = [[], []]
    for step in steps:
        step()  # what a first step allocates is nobody's
    for turn in range(config.turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            spent[which].append(step_seconds(steps[which], config.steps, device))
    return ratios(*spent)


def run(config: Config) -> dict[str, Any]:
    """All networks, methods, batches and numbers of runs, on the CPU and, if there is one, CUDA."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    rows = []
    for device in devices:
        for network in NETWORKS:
            for batch in config.batches:
                say(f"{network}, batch {batch}, on {device}")
                for runs in config.runs:
                    for method in METHODS:
                        where = {"network": network, "batch": batch, "runs": runs, "method": method}
                        got = measure(network, runs, batch, method, torch.device(device), config)
                        rows.append({"device": device, **where, **got})
    return {"config": asdict(config), "devices": devices, "saved": rows}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'one by one over the stack':44}{'ratio':>8}{'quartiles':>13}"]
    for row in result["saved"]:
        name = (
            f"{row['network']}, batch {row['batch']}, {row['runs']} runs of {row['method']}, "
            f"{row['device']}"
        )
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        lines.append(f"{name:44}{row['ratio']:8.2f}{spread:>13}")
    return "\n".join(lines)


def chapter_table(result: dict[str, Any], device: str = "cpu") -> Table:
    """A row a network and batch; a column a number of runs and method, with quartiles.

    Raises:
        ValueError: the result has no such device.
    """
    check_device(result, device)
    header = ["Network, batch"]
    rows: dict[str, list[str]] = {}
    for row in result["saved"]:
        if row["device"] != device:
            continue
        column = f"{row['runs']} runs, {row['method']}"
        if column not in header:
            header.append(column)
        rows.setdefault(f"{row['network']}, {row['batch']}", []).append(with_quartiles(row))
    return Table(header, [[name, *cells] for name, cells in rows.items()])


BENCHMARK = Benchmark(
    name="stack",
    about="many small runs as one program, over the runs one by one",
    schema="sam_lab.benchmark.stack/1",
    measure=lambda quick: run(QUICK if quick else Config()),
    table=table,
)
