"""What a step of sharpness-aware minimization costs: sam_lab beside its peers, in one run.

Three networks: a deep MLP of 128 small tensors, where the work around the passes shows most; a
small CNN; and ResNet-18 for 32 x 32 images (3 x 3 stem, no max pooling; needs torchvision). Inputs
are random, 128 a batch. The optimizer underneath is the same for all, SGD with momentum 0.9 and its
foreach implementation. All methods but ASAM take the same step: the gradient at w + rho g / |g|.

Time is that of one step over one step of SGD, both of the same turn: methods take turns, each turn
begins with another one, and what is reported is the median over turns with its quartiles. On the
CPU it is processor time on one thread, on CUDA the time between two events around a block of steps.

Memory is the peak within a step once the optimizer has its state, minus that of a step of SGD, in
copies of the parameters. On the CPU every allocation and release of torch is recorded and summed up
in order; on CUDA the allocator keeps the peak.

On CUDA it is also asked whether the host waits for the device anywhere in a step.

Peers are called in the way that is cheapest for them: `pytorch_optimizer` with foreach and without
a second clearing of gradients. Of ours, `SAM.step` does more than they do: it keeps the statistics
of BatchNorm to the clean pass, runs both passes with the same random numbers, and takes no step
along a gradient that is not finite.

The perturbation is not compiled: on 128 tensors of 64 x 64 and 64, one CPU thread, torch 2.13, the
rule under `torch.compile` took 2.0 times the time of the rule as it is written (30 pairs in turns,
quartiles 1.8 and 2.3).
"""

import copy
import gc
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function

from benchmarks.common import Benchmark, quiet, say, seconds, version_of
from sam_lab import SAM, _optional, models
from sam_lab.experiments.lab.table import Table
from sam_lab.perturbations import asam

RHO = 0.05
LR = 0.01
MOMENTUM = 0.9
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A network, and how long it is measured.

    Attributes:
        name: as the tables have it.
        build: the network, on the CPU.
        shape: of one input.
        batch: how many inputs.
        package: the distribution it comes from; None for what is always there.
        steps, turns: steps in a block and turns of the methods, on the CPU.
        cuda_steps, cuda_turns: the same on CUDA.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 128
    package: str | None = None
    steps: int = 1
    turns: int = 5
    cuda_steps: int = 10
    cuda_turns: int = 20


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images: a 3 x 3 convolution of stride 1 as stem, and no max pooling."""
    resnet = _optional.torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = resnet(num_classes=CLASSES)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def deep_mlp(width: int = 64, depth: int = 64) -> nn.Module:
    # with torch's own initialisation the gradient would vanish on its way through so many layers
    return models.mlp([width] * depth + [CLASSES], init="glorot")


NETWORKS = (
    Network("MLP", deep_mlp, (64,), steps=5, turns=40),
    Network("CNN", lambda: models.cnn((3, 32, 32)), (3, 32, 32), steps=2, turns=20),
    Network("ResNet-18", resnet18, (3, 32, 32), package="torchvision", turns=9),
)
QUICK = (
    Network("MLP", lambda: deep_mlp(4, 3), (4,), 4, turns=2),
    Network("CNN", lambda: models.cnn((3, 8, 8), widths=(4, 4)), (3, 8, 8), 4, turns=2),
    Network("ResNet-18", resnet18, (3, 8, 8), 4, package="torchvision", turns=2),
)


@dataclass
class Problem:
    """A network with one batch, and the loss that a step lowers."""

    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def bytes(self) -> int:
        """Of one copy of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.params)

    def closure(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def optimizer(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.params, lr=LR, momentum=MOMENTUM, foreach=True)

    def copy(self) -> "Problem":
        return Problem(copy.deepcopy(self.model), self.x, self.y)


def make_problem(network: Network, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(network.batch, *network.shape, generator=generator)
    y = torch.randint(CLASSES, (network.batch,), generator=generator)
    return Problem(network.build().to(device), x.to(device), y.to(device))


# --- one step by each method ------------------------------------------------------------------

Step = Callable[[], object]


def _base(problem: Problem) -> Step:
    optimizer = problem.optimizer()

    def step() -> None:
        optimizer.zero_grad()
        problem.closure().backward()
        optimizer.step()

    return step


def _sam_lab(problem: Problem, **options: Any) -> Step:
    sam = SAM(problem.optimizer(), RHO, problem.model, **options)
    return lambda: sam.step(problem.closure)


def _sam_lab_block(problem: Problem) -> Step:
    optimizer = problem.optimizer()
    sam = SAM(optimizer, RHO, problem.model)

    def step() -> None:
        optimizer.zero_grad()
        problem.closure().backward()
        with sam.perturbed():
            problem.closure().backward()
        optimizer.step()

    return step


def _pytorch_optimizer(problem: Problem) -> Step:
    package = _optional.require("pytorch_optimizer", extra="bench")
    sam = package.SAM(
        problem.params, torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM, foreach=True
    )

    def backward() -> Tensor:
        loss = problem.closure()
        loss.backward()
        return loss

    def step() -> None:
        sam.zero_grad()
        backward()
        sam.step(backward)  # clears the gradients itself before it calls

    return step


def _loop(problem: Problem) -> Step:
    """What fits on half a page, one tensor at a time."""
    optimizer, params = problem.optimizer(), problem.params

    def step() -> None:
        optimizer.zero_grad()
        problem.closure().backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm()  # type: ignore[union-attr]
            epsilon = []
            for p in params:
                e = p.grad * (RHO / (norm + 1e-12))
                p.add_(e)
                epsilon.append(e)
        optimizer.zero_grad()
        problem.closure().backward()
        with torch.no_grad():
            for p, e in zip(params, epsilon, strict=True):
                p.sub_(e)
        optimizer.step()

    return step


@dataclass(frozen=True)
class Method:
    """A way to take a step.

    Attributes:
        tool, how: as the table names them.
        package: the distribution it comes from; None for what is always there.
        make: `make(problem)` returns the function that takes one.
    """

    tool: str
    how: str
    package: str | None
    make: Callable[[Problem], Step]


BASE = Method("SGD", "the base step", None, _base)
OURS = Method("sam_lab", "SAM.step", None, _sam_lab)
PEERS = (
    Method("pytorch_optimizer", "SAM, foreach", "pytorch-optimizer", _pytorch_optimizer),
    Method("plain loop", "tensor by tensor", None, _loop),
)
METHODS = (
    BASE,
    OURS,
    Method("sam_lab", "SAM.perturbed", None, _sam_lab_block),
    Method("sam_lab", "SAM.step, rule=asam", None, lambda p: _sam_lab(p, rule=asam)),
    *PEERS,
)


# --- measures ---------------------------------------------------------------------------------


def cuda_seconds(action: Step, device: torch.device) -> float:
    """Seconds on the device from the first thing that `action` puts there to the last."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record(torch.cuda.current_stream(device))
    action()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def step_seconds(step: Step, steps: int, device: torch.device) -> float:
    """Seconds of one step, the mean of a block."""

    def block() -> None:
        for _ in range(steps):
            step()

    spent = cuda_seconds(block, device) if device.type == "cuda" else seconds(block)
    return spent / steps


def peak_bytes(make: Callable[[], Step], device: torch.device) -> tuple[int, Step]:
    """The peak of memory in a second step, counted from before `make`; and the step made."""
    gc.collect()  # what goes in between would count as released by the step
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        step = make()
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, step
    mark = "second step"
    with profile(profile_memory=True) as recorded:
        step = make()
        step()
        with record_function(mark):
            step()
    events = sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == mark)
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = held if event.start_ns() < begin else max(peak, held)
    return peak, step


def waits(step: Step, device: torch.device) -> bool | None:
    """Whether the host waits for the device within a step; None where there is none to wait for."""
    if device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any("called a synchronizing" in str(w.message) for w in caught)


# --- the tables -------------------------------------------------------------------------------


@dataclass
class Measured:
    """What is known of one method: seconds of a step in each turn, peak in bytes."""

    step: Step
    peak: int
    waits: bool | None
    seconds: list[float]


def measure(
    network: Network, device: torch.device, methods: Sequence[Method] = METHODS
) -> tuple[Problem, dict[Method, Measured]]:
    """All methods that are installed, in turns."""
    problem = make_problem(network, device)
    _base(problem.copy())()  # what the first pass of a process allocates is nobody's
    measured: dict[Method, Measured] = {}
    for method in methods:
        if method.package and not version_of(method.package):
            continue
        own = problem.copy()
        with quiet():
            peak, step = peak_bytes(partial(method.make, own), device)
            measured[method] = Measured(step, peak, waits(step, device), [])
    on_cuda = device.type == "cuda"
    steps = network.cuda_steps if on_cuda else network.steps
    order = list(measured.values())
    for _ in range(network.cuda_turns if on_cuda else network.turns):
        for each in order:
            with quiet():
                each.seconds.append(step_seconds(each.step, steps, device))
        order.append(order.pop(0))
    return problem, measured


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The ratio in each turn: its median and quartiles."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def step_rows(
    problem: Problem, measured: dict[Method, Measured], methods: Sequence[Method] = METHODS
) -> list[dict[str, Any]]:
    """One row a method: its step beside that of SGD."""
    rows = []
    for method in methods:
        row: dict[str, Any] = {"tool": method.tool, "how": method.how}
        got = measured.get(method)
        row["missing"] = got is None
        if got is not None:
            row["seconds"] = statistics.median(got.seconds)
            row |= ratios(got.seconds, measured[BASE].seconds)
            row["memory"] = (got.peak - measured[BASE].peak) / problem.bytes
            row["waits"] = got.waits
        rows.append(row)
    return rows


def peer_rows(measured: dict[Method, Measured]) -> list[dict[str, Any]]:
    """One row a peer that is installed: our step over its step."""
    return [
        {"peer": peer.tool, **ratios(measured[OURS].seconds, measured[peer].seconds)}
        for peer in PEERS
        if peer in measured
    ]


def run(networks: Sequence[Network]) -> dict[str, Any]:
    """All networks on the CPU and, where there is one, on CUDA."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    about: dict[str, dict[str, Any]] = {}
    steps, against = [], []
    for device in devices:
        for network in networks:
            where = {"device": device, "network": network.name}
            about[network.name] = {"batch": network.batch, "input": list(network.shape)}
            if network.package and not version_of(network.package):
                steps += [{**where, "tool": m.tool, "how": m.how, "missing": True} for m in METHODS]
                continue
            say(f"a step of {network.name} on {device}")
            problem, measured = measure(network, torch.device(device))
            about[network.name]["parameters"] = sum(p.numel() for p in problem.params)
            about[network.name]["tensors"] = len(problem.params)
            steps += [{**where, **row} for row in step_rows(problem, measured)]
            against += [{**where, **row} for row in peer_rows(measured)]
    return {
        "devices": devices,
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "networks": about,
        "peers": {m.package: version_of(m.package) for m in METHODS if m.package},
        "steps": steps,
        "against": against,
        "targets": targets(steps, against),
    }


def targets(steps: list[dict[str, Any]], against: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `SAM.step` is to reach, and whether it does.

    At most 2.05 steps of SGD on ResNet-18; nowhere slower than a peer (it counts as slower if the
    lower quartile of the ratio is above 1); at most 1.1 copies of the parameters more.
    """
    ours = [s for s in steps if (s["tool"], s["how"]) == (OURS.tool, OURS.how) and not s["missing"]]
    rows = []

    def add(row: dict[str, Any], what: str, value: float, limit: float, reached: bool) -> None:
        where = {name: row[name] for name in ("device", "network")}
        rows.append({"what": what, **where, "value": value, "limit": limit, "reached": reached})

    for row in ours:
        if row["network"] == "ResNet-18":
            add(row, "time over SGD", row["ratio"], 2.05, row["ratio"] <= 2.05)
    for row in against:
        add(row, f"time over {row['peer']}", row["ratio"], 1.0, row["ratio_low"] <= 1.0)
    for row in ours:
        add(row, "copies of the parameters added", row["memory"], 1.1, row["memory"] <= 1.1)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in result["peers"].items())
    provenance = result["provenance"]
    lines = [f"{provenance['threads']} thread(s), torch {provenance['torch']}, {versions}"]
    place = None
    for row in result["steps"]:
        if place != (place := (row["device"], row["network"])):
            head = f"{'ms':>9}{'over SGD':>10}{'quartiles':>13}{'copies added':>14}{'waits':>8}"
            lines += ["", f"{_heading(result, *place):49}{head}"]
        name = f"{row['tool']:20}{row['how']:29}"
        lines.append(f"{name}{'missing':>9}" if row["missing"] else name + _cells(row))
    lines += ["", f"{'to reach':49}{'measured':>9}{'limit':>10}"]
    for row in result["targets"]:
        name = f"{row['what']}, {row['network']}, {row['device']}"
        verdict = "reached" if row["reached"] else "MISSED"
        lines.append(f"{name:49}{row['value']:9.3f}{row['limit']:10.2f}{verdict:>13}")
    return "\n".join(lines)


def _heading(result: dict[str, Any], device: str, network: str) -> str:
    about = result["networks"][network]
    tensors = f"{about['tensors']} tensors, " if "tensors" in about else ""
    return f"{network}, {tensors}batch {about['batch']}, {device}"


def _cells(row: dict[str, Any]) -> str:
    spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    asked = {None: "-", True: "yes", False: "no"}[row["waits"]]
    return (
        f"{1e3 * row['seconds']:9.2f}{row['ratio']:10.3f}{spread:>13}"
        f"{row['memory']:14.3f}{asked:>8}"
    )


def check_device(result: dict[str, Any], device: str) -> None:
    """ValueError unless the result has that device."""
    if device not in result["devices"]:
        raise ValueError(f"device must be one of {', '.join(result['devices'])}, got {device!r}")


def with_quartiles(row: dict[str, Any]) -> str:
    """What `ratios` found, as a cell of a table."""
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})"


def chapter_table(result: dict[str, Any], device: str = "cpu") -> Table:
    """The methods beside each other: where the result counts them, passes a step; then a pair of
    columns a network, time over SGD and memory added.

    Raises:
        ValueError: the result has no such device.
    """
    check_device(result, device)
    steps = [r for r in result["steps"] if r["device"] == device and r["tool"] != BASE.tool]
    networks = [n for n in result["networks"] if any(r["network"] == n for r in steps)]
    counted = any("passes" in row for row in steps)
    header = ["Method", *(["Passes"] if counted else [])]
    for network in networks:
        header += [f"{network}: time", "memory"]
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    counts: dict[tuple[str, str], list[str]] = {}
    for row in steps:
        key = (row["tool"], row["how"])
        cells = ["–", "–"]
        if not row["missing"]:
            cells = [with_quartiles(row), f"{row['memory']:.2f}"]
        rows.setdefault(key, {})[row["network"]] = cells
        counts[key] = [f"{row['passes']:.2f}"] if row.get("passes") else ["–"] * counted
    return Table(
        header,
        [
            [
                f"{tool}, {how}",
                *counts[tool, how],
                *(cell for name in networks for cell in found.get(name, ["–", "–"])),
            ]
            for (tool, how), found in rows.items()
        ],
    )


BENCHMARK = Benchmark(
    name="sam",
    about="a step of SAM: time over a step of SGD, and memory",
    schema="sam_lab.benchmark.sam/1",
    measure=lambda quick: run(QUICK if quick else NETWORKS),
    table=table,
    packages=("torchvision",),
)
