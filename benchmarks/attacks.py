"""What an attack on the inputs costs: sam_lab beside its peers, in one run.

PGD of ten steps on a batch of 128 random images in [0, 1], against an MLP 784-200-200-10 and
against WRN-10-1 of stride 2 for 32 x 32 images, both in evaluation mode. All methods start at the
images themselves and take the same steps, so that they find the same.

Time is that of one attack over that of its ten gradients alone: ten passes forward and backward to
the inputs, with nothing around them. Both are of the same turn: methods take turns, each turn
begins with another one, and what is reported is the median over turns with its quartiles. On the
CPU it is processor time on one thread, on CUDA the time between two events around a block.

Peers are called in the way that is cheapest for them: what can be made before the attack is. Of
ours, `pgd` does more than they do: it checks its inputs, keeps each module's mode and the random
numbers, and takes no step along a gradient that is not finite.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Benchmark, quiet, say, version_of
from benchmarks.sam import ratios, step_seconds
from sam_lab import _optional, models
from sam_lab.adversarial import Threat, pgd

STEPS = 10
CLASSES = 10
# radius and length of a step
SIZES = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1)}
NORMS = {"linf": "maximum norm", "l2": "Euclidean norm"}


@dataclass(frozen=True)
class Network:
    """A network, and how long attacks on it are measured.

    Attributes:
        name: as the tables have it.
        build: the network, on the CPU.
        shape: of one image.
        batch: how many images.
        blocks, turns: attacks in a block and turns of the methods, on the CPU.
        cuda_blocks, cuda_turns: the same on CUDA.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 128
    blocks: int = 1
    turns: int = 9
    cuda_blocks: int = 5
    cuda_turns: int = 20


NETWORKS = (
    Network("MLP", lambda: models.mlp((784, 200, 200, CLASSES), "relu"), (1, 28, 28), turns=40),
    Network("WRN-10-1", lambda: models.wide_resnet(10, 1, stride=2), (3, 32, 32)),
)
QUICK = (
    Network("MLP", lambda: models.mlp((16, 8, CLASSES), "relu"), (1, 4, 4), 4, turns=2),
    Network("WRN-10-1", lambda: models.wide_resnet(10, 1, (3, 8, 8)), (3, 8, 8), 4, turns=2),
)


@dataclass
class Problem:
    """A network in evaluation mode, and the images that are attacked."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str

    @property
    def device(self) -> torch.device:
        return self.x.device

    def copy(self) -> "Problem":
        return Problem(copy.deepcopy(self.model), self.x, self.y, self.norm)


def make_problem(network: Network, norm: str, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(network.batch, *network.shape, generator=generator)
    y = torch.randint(CLASSES, (network.batch,), generator=generator)
    return Problem(network.build().eval().to(device), x.to(device), y.to(device), norm)


# --- one attack by each method ----------------------------------------------------------------

Run = Callable[[], Tensor]


def _gradients(problem: Problem) -> Run:
    def run() -> Tensor:
        for _ in range(STEPS):
            x = problem.x.detach().requires_grad_()
            loss = F.cross_entropy(problem.model(x), problem.y)
            (grad,) = torch.autograd.grad(loss, x)
        return grad

    return run


def _sam_lab(problem: Problem) -> Run:
    eps, step = SIZES[problem.norm]
    threat = Threat(problem.norm, eps)
    attack = partial(pgd, steps=STEPS, step_size=step, random_start=False)
    return lambda: attack(problem.model, problem.x, problem.y, threat)


def _torchattacks(problem: Problem) -> Run:
    package = _optional.require("torchattacks", extra="test")
    kind = {"linf": package.PGD, "l2": package.PGDL2}[problem.norm]
    eps, step = SIZES[problem.norm]
    attack = kind(problem.model, eps=eps, alpha=step, steps=STEPS, random_start=False)
    return lambda: attack(problem.x, problem.y)


def _foolbox(problem: Problem) -> Run:
    package = _optional.require("foolbox", extra="bench")
    wrapped = package.PyTorchModel(problem.model, bounds=(0, 1), device=problem.device)
    kind = {"linf": package.attacks.LinfPGD, "l2": package.attacks.L2PGD}[problem.norm]
    eps, step = SIZES[problem.norm]
    attack = kind(abs_stepsize=step, steps=STEPS, random_start=False)
    return lambda: attack.run(wrapped, problem.x, problem.y, epsilon=eps)


@dataclass(frozen=True)
class Method:
    """A way to attack.

    Attributes:
        tool: as the table names it.
        package: the distribution it comes from; None for what is always there.
        make: `make(problem)` returns the function that attacks its images.
    """

    tool: str
    package: str | None
    make: Callable[[Problem], Run]


BASE = Method("the gradients alone", None, _gradients)
OURS = Method("sam_lab", None, _sam_lab)
PEERS = (
    Method("torchattacks", "torchattacks", _torchattacks),
    Method("foolbox", "foolbox", _foolbox),
)
METHODS = (BASE, OURS, *PEERS)


# --- the tables -------------------------------------------------------------------------------


def measure(network: Network, norm: str, device: torch.device) -> dict[Method, list[float]]:
    """Seconds of an attack in each turn, by all methods that are installed."""
    problem = make_problem(network, norm, device)
    runs: dict[Method, Run] = {}
    for method in METHODS:
        if method.package and not version_of(method.package):
            continue
        with quiet():
            runs[method] = method.make(problem.copy())
            runs[method]()  # what the first attack allocates is nobody's
    on_cuda = device.type == "cuda"
    block = network.cuda_blocks if on_cuda else network.blocks
    spent: dict[Method, list[float]] = {method: [] for method in runs}
    order = list(runs)
    for _ in range(network.cuda_turns if on_cuda else network.turns):
        for method in order:
            with quiet():
                spent[method].append(step_seconds(runs[method], block, device))
        order.append(order.pop(0))
    return spent


def attack_rows(spent: dict[Method, list[float]]) -> list[dict[str, Any]]:
    """One row a method: its attack beside the gradients alone."""
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"tool": method.tool, "missing": method not in spent}
        if method in spent:
            row["seconds"] = statistics.median(spent[method])
            row |= ratios(spent[method], spent[BASE])
        rows.append(row)
    return rows


def peer_rows(spent: dict[Method, list[float]]) -> list[dict[str, Any]]:
    """One row a peer that is installed: our attack over its attack."""
    return [
        {"peer": peer.tool, **ratios(spent[OURS], spent[peer])} for peer in PEERS if peer in spent
    ]


def run(networks: Sequence[Network]) -> dict[str, Any]:
    """All networks and norms on the CPU and, where there is one, on CUDA."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    attacks, against = [], []
    for device in devices:
        for network in networks:
            for norm in SIZES:
                where = {"device": device, "network": network.name, "norm": norm}
                say(f"attacks on {network.name} in the {NORMS[norm]}, {device}")
                spent = measure(network, norm, torch.device(device))
                attacks += [{**where, **row} for row in attack_rows(spent)]
                against += [{**where, **row} for row in peer_rows(spent)]
    return {
        "devices": devices,
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "networks": {n.name: {"batch": n.batch, "input": list(n.shape)} for n in networks},
        "steps": STEPS,
        "peers": {m.package: version_of(m.package) for m in METHODS if m.package},
        "attacks": attacks,
        "against": against,
        "targets": targets(against),
    }


def targets(against: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nowhere slower than a peer; it counts as slower if the lower quartile of the ratio is above
    1."""
    return [
        {
            "what": f"time over {row['peer']}",
            **{name: row[name] for name in ("device", "network", "norm")},
            "value": row["ratio"],
            "limit": 1.0,
            "reached": row["ratio_low"] <= 1.0,
        }
        for row in against
    ]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    versions = ", ".join(f"{p} {v or 'missing'}" for p, v in result["peers"].items())
    provenance = result["provenance"]
    lines = [f"{provenance['threads']} thread(s), torch {provenance['torch']}, {versions}"]
    place = None
    for row in result["attacks"]:
        if place != (place := (row["device"], row["network"], row["norm"])):
            batch = result["networks"][row["network"]]["batch"]
            head = f"PGD-{result['steps']}, {row['network']}, {NORMS[row['norm']]}"
            head += f", batch {batch}, {row['device']}"
            lines += ["", f"{head:54}{'ms':>9}{'over gradients':>16}{'quartiles':>13}"]
        lines.append(f"{row['tool']:54}{'missing':>9}" if row["missing"] else _line(row))
    lines += ["", f"{'to reach':54}{'measured':>9}{'limit':>16}"]
    for row in result["targets"]:
        name = f"{row['what']}, {row['network']}, {NORMS[row['norm']]}, {row['device']}"
        verdict = "reached" if row["reached"] else "MISSED"
        lines.append(f"{name:54}{row['value']:9.3f}{row['limit']:16.2f}{verdict:>13}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    return f"{row['tool']:54}{1e3 * row['seconds']:9.2f}{row['ratio']:16.3f}{spread:>13}"


BENCHMARK = Benchmark(
    name="attacks",
    about="PGD: time over its gradients alone",
    schema="sam_lab.benchmark.attacks/1",
    measure=lambda quick: run(QUICK if quick else NETWORKS),
    table=table,
)
