"""What a step of each member of the SAM family costs: passes, time and memory, in one run.

Networks, inputs, optimizer, turns and measures are those of `benchmarks.sam`, with smaller batches
on the CPU. Blocks have five steps, so that a method that looks around at every fifth step has its
mean cost in each.

Passes are counted in the model: a forward that records a graph is one together with its backward, a
forward alone a third of one, both times the share of the batch that is in it. A method draws its
state and momentum in the first steps, which are not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sam as one
from benchmarks.common import Benchmark, say, version_of
from sam_lab import SAM, _optional, methods

PERIOD = 5  # of the methods that look around from time to time
PEER = "pytorch_optimizer"


def _ours(problem: one.Problem, method: methods.Method, **options: Any) -> one.Step:
    rho = options.pop("rho", one.RHO)
    generator = torch.Generator(problem.x.device).manual_seed(0)
    sam = SAM(
        options.pop("optimizer", None) or problem.optimizer(),
        rho,
        problem.model,
        method=method,
        generator=generator,
        **options,
    )

    def losses(examples: Any = slice(None)) -> Tensor:
        outputs = problem.model(problem.x[examples])
        return nn.functional.cross_entropy(outputs, problem.y[examples], reduction="none")

    closure: Callable[..., Tensor] = problem.closure
    if getattr(method, "func", method) is methods.esam:
        closure = losses
    return lambda: sam.step(closure)


def _sam_on(problem: one.Problem) -> one.Step:
    optimizer = torch.optim.SGD(
        methods.sam_on(problem.model), lr=one.LR, momentum=one.MOMENTUM, foreach=True
    )
    return _ours(problem, methods.plain, optimizer=optimizer)


def _msam(problem: one.Problem, parts: int = 4) -> one.Step:
    sam = SAM(problem.optimizer(), one.RHO, problem.model)
    x, y = problem.x.chunk(parts), problem.y.chunk(parts)

    def loss(i: int) -> Tensor:
        return nn.functional.cross_entropy(problem.model(x[i]), y[i])

    closures = [partial(loss, i) for i in range(len(x))]
    return lambda: sam.step(closures, perturb="micro")


def _theirs(problem: one.Problem, name: str, **options: Any) -> one.Step:
    package = _optional.require(PEER, extra="bench")
    settings = {"rho": one.RHO, "lr": one.LR, "momentum": one.MOMENTUM, "foreach": True, **options}
    model = (problem.model,) if name == "WSAM" else ()
    optimizer = getattr(package, name)(
        *model, problem.params, base_optimizer=torch.optim.SGD, **settings
    )

    def backward() -> Tensor:
        loss = problem.closure()
        loss.backward()
        return loss

    def step() -> None:
        optimizer.zero_grad()
        if name != "WSAM":  # which calls it twice itself
            backward()
        optimizer.step(backward)

    return step


class _Constant:
    """The schedule that pytorch_optimizer's GSAM asks for."""

    def step(self) -> float:
        return one.RHO


def _their_gsam(problem: one.Problem) -> one.Step:
    package = _optional.require(PEER, extra="bench")
    optimizer = package.GSAM(
        problem.params, problem.optimizer(), problem.model, _Constant(), alpha=0.4, foreach=True
    )

    def step() -> None:
        optimizer.set_closure(nn.functional.cross_entropy, problem.x, problem.y)
        optimizer.step()

    return step


def _row(how: str, method: methods.Method, **options: Any) -> one.Method:
    return one.Method("sam_lab", how, None, partial(_ours, method=method, **options))


def _peer(how: str, make: Callable[[one.Problem], one.Step]) -> one.Method:
    return one.Method(PEER, how, "pytorch-optimizer", make)


METHODS = (
    one.BASE,
    _row("SAM", methods.plain),
    one.Method("sam_lab", "SAM-ON", None, _sam_on),
    one.Method("sam_lab", "mSAM, 4 parts", None, _msam),
    _row("every 5th step", methods.plain, rho=methods.every(PERIOD, one.RHO)),
    _row("GSAM", methods.gsam),
    _row("WSAM", methods.wsam),
    _row("gradient penalty", methods.gradient_penalty),
    _row("Friendly SAM", methods.friendly_sam),
    _row("VaSSO", methods.vasso),
    _row("Sparse SAM", partial(methods.sparse_sam, every=PERIOD)),
    _row("Momentum-SAM", methods.momentum_sam),
    _row("LookSAM, k = 5", partial(methods.looksam, k=PERIOD)),
    _row("GraphSAM, k = 5", partial(methods.graphsam, k=PERIOD)),
    _row("ESAM, 1/2 and 1/2", methods.esam),
    _row("2 ascents", methods.multistep),
    _row("Trace-SAM", methods.trace_sam, rho=0.01),
    _row("Frob-SAM", methods.frob_sam, rho=0.005),
    _row("Det-SAM", methods.det_sam, rho=1.0),
    _peer("SAM", partial(_theirs, name="SAM")),
    _peer("GSAM", _their_gsam),
    _peer("WSAM", partial(_theirs, name="WSAM", decouple=False)),
    _peer("Friendly SAM", partial(_theirs, name="FriendlySAM", lmbda=0.6)),
    _peer("LookSAM, k = 5", partial(_theirs, name="LookSAM", k=PERIOD)),
)
MLP, CNN, RESNET = one.NETWORKS
NETWORKS = (
    replace(MLP, steps=PERIOD, turns=15),
    replace(CNN, steps=PERIOD, turns=7, batch=32),
    replace(RESNET, steps=PERIOD, turns=3, batch=4),
)
QUICK = tuple(replace(network, steps=PERIOD) for network in one.QUICK[:2])


def passes(method: one.Method, problem: one.Problem) -> float:
    """Passes a step, the mean of ten steps."""
    count = 0.0

    def counted(_: nn.Module, inputs: Any, __: Any) -> None:
        nonlocal count
        share = len(inputs[0]) / len(problem.x)
        count += share if torch.is_grad_enabled() else share / 3

    step = method.make(problem)
    with_hook = problem.model.register_forward_hook(counted)
    try:
        for _ in range(2 * PERIOD):
            step()
    finally:
        with_hook.remove()
    return count / (2 * PERIOD)


def fits(method: one.Method, network: one.Network) -> bool:
    """SAM-ON needs a norm layer."""
    return method.how != "SAM-ON" or any(
        isinstance(m, methods.NORMS) for m in network.build().modules()
    )


def run(networks: Sequence[one.Network]) -> dict[str, Any]:
    """All networks on the CPU and, where there is one, on CUDA; passes are counted on the MLP."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}
    small = QUICK[0]  # passes do not depend on the network
    normed = replace(small, build=lambda: nn.Sequential(nn.LayerNorm(4), small.build()))
    counts = {
        (method.tool, method.how): passes(
            method,
            one.make_problem(normed if method.how == "SAM-ON" else small, torch.device("cpu")),
        )
        for method in METHODS
        if not method.package or version_of(method.package)
    }
    for device in devices:
        for network in networks:
            about[network.name] = {"batch": network.batch, "input": list(network.shape)}
            if network.package and not version_of(network.package):
                continue
            say(f"a step of {network.name} on {device}")
            fitting = [method for method in METHODS if fits(method, network)]
            problem, measured = one.measure(network, torch.device(device), fitting)
            about[network.name]["parameters"] = sum(p.numel() for p in problem.params)
            about[network.name]["tensors"] = len(problem.params)
            rows += [
                {
                    "device": device,
                    "network": network.name,
                    **row,
                    "passes": counts.get((row["tool"], row["how"])),
                }
                for row in one.step_rows(problem, measured, fitting)
            ]
    return {
        "devices": devices,
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "networks": about,
        "peers": {"pytorch-optimizer": version_of("pytorch-optimizer")},
        "steps": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    provenance = result["provenance"]
    lines = [f"{provenance['threads']} thread(s), torch {provenance['torch']}, {result['peers']}"]
    place = None
    for row in result["steps"]:
        if place != (place := (row["device"], row["network"])):
            head = f"{'passes':>8}{'over SGD':>10}{'quartiles':>13}{'copies added':>14}{'waits':>8}"
            lines += ["", f"{row['network'] + ', ' + row['device']:40}{head}"]
        name = f"{row['tool']:20}{row['how']:20}"
        if row["missing"]:
            lines.append(f"{name}{'missing':>8}")
            continue
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        asked = {None: "-", True: "yes", False: "no"}[row["waits"]]
        lines.append(
            f"{name}{row['passes']:8.2f}{row['ratio']:10.2f}{spread:>13}{row['memory']:14.2f}"
            f"{asked:>8}"
        )
    return "\n".join(lines)


BENCHMARK = Benchmark(
    name="family",
    about="the SAM family: passes, time over a step of SGD, and memory",
    schema="sam_lab.benchmark.family/1",
    measure=lambda quick: run(QUICK if quick else NETWORKS),
    table=table,
    packages=("torchvision",),
)
