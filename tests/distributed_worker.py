"""What every process of test_distributed.py does: train, and write down what came out.

Started by torchrun with the folder for the results. Nothing is judged here: each process leaves a
file with the results of all scenarios, and the tests compare them with each other and with
formulas.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sam_lab import SAM, methods, perturbations
from sam_lab.perturbations import Rule

EVERY = 25  # steps after which weights are written down
LR, MOMENTUM, RHO = 0.05, 0.9, 0.1
Batch = tuple[Tensor, Tensor]


def batch() -> Batch:
    """The whole batch: 64 examples, a multiple of every number of processes times two."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 20, generator=generator), torch.randint(5, (64,), generator=generator)


def split(whole: Batch, parts: int) -> list[Batch]:
    x, y = whole
    return [(x[i::parts], y[i::parts]) for i in range(parts)]


def network(norm: bool = False) -> nn.Sequential:
    """The same at every call. Its last layer has fewer rows than some meshes have processes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, last = nn.Linear(20, 30), nn.Linear(30, 3 if norm else 5)
        return nn.Sequential(first, nn.BatchNorm1d(30) if norm else nn.Identity(), nn.Tanh(), last)


def loss(model: nn.Module, part: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(part[0]), part[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector; those that are sharded, put together."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def train(model: nn.Module, step: Callable[[], object], steps: int) -> dict[int, Tensor]:
    """The weights after every 25 steps and after the last."""
    after = {}
    for i in range(1, steps + 1):
        step()
        if i % EVERY == 0 or i == steps:
            after[i] = weights(model)
    return after


# --- DistributedDataParallel -------------------------------------------------------------------


def replicated(mine: Batch, sync: bool, view: bool) -> dict[str, Any]:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=view)
    sam = SAM(sgd(model), RHO, model, sync=sync)
    return {"weights": train(model, lambda: sam.step(lambda: loss(model, mine)), steps=100)}


def by_method(
    mine: Batch, wrap: Callable[[nn.Module], nn.Module], method: methods.Method
) -> dict[str, Any]:
    model = wrap(network())
    sam = SAM(sgd(model), RHO, model, method=method)
    return {"weights": train(model, lambda: sam.step(lambda: loss(model, mine)), steps=12)}


def block(mine: Batch) -> dict[str, Any]:
    model = DistributedDataParallel(network())
    optimizer = sgd(model)
    sam = SAM(optimizer, RHO, model)

    def step() -> None:
        optimizer.zero_grad()
        with model.no_sync():
            loss(model, mine).backward()
        with sam.perturbed():
            loss(model, mine).backward()
        optimizer.step()

    return {"weights": train(model, step, steps=100)}


def accumulated(mine: Batch, sync: bool, perturb: str) -> dict[str, Any]:
    model = DistributedDataParallel(network())
    sam = SAM(sgd(model), RHO, model, sync=sync)
    closures = [partial(loss, model, part) for part in split(mine, 2)]
    steps = 100 if perturb == "micro" and not sync else 25
    return {"weights": train(model, lambda: sam.step(closures, perturb=perturb), steps)}


def all_reduces(mine: Batch, sync: bool) -> dict[str, Any]:
    """How many times a step the gradients of all processes are averaged."""
    model = DistributedDataParallel(network())
    seen = 0

    def counting(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal seen
        seen += bucket.is_last()
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, counting)
    sam = SAM(sgd(model), RHO, model, sync=sync)
    counts = []
    for _ in range(5):
        before = seen
        sam.step(lambda: loss(model, mine))
        counts.append(seen - before)
    return {"counts": counts}


def batch_norm(mine: Batch, sync: bool) -> dict[str, Any]:
    mine = mine[0], mine[1] % 3
    model = DistributedDataParallel(network(norm=True))
    sam = SAM(sgd(model), RHO, model, sync=sync)
    after = train(model, lambda: sam.step(lambda: loss(model, mine)), steps=25)
    return {"weights": after, "buffers": dict(model.module.named_buffers())}


# --- FSDP2 -------------------------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    """The first layer as a unit of its own, the last as part of the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shards(model: nn.Module) -> Tensor:
    """What this process holds of the parameters."""
    return torch.cat([p.to_local().detach().reshape(-1) for p in model.parameters()])


def fsdp(mine: Batch, rule: Rule, steps: int) -> dict[str, Any]:
    model = sharded(network())
    sam = SAM(sgd(model), RHO, model, rule=rule)
    return {"weights": train(model, lambda: sam.step(lambda: loss(model, mine)), steps)}


def fsdp_accumulated(mine: Batch) -> dict[str, Any]:
    model = sharded(network())
    sam = SAM(sgd(model), RHO, model)
    closures = [partial(loss, model, part) for part in split(mine, 2)]
    return {"weights": train(model, lambda: sam.step(closures, perturb="micro"), steps=10)}


def fsdp_block(mine: Batch, dtype: torch.dtype, rule: Rule) -> dict[str, Any]:
    """The shards before, within and after a block in which nothing is done."""
    model = sharded(network().to(dtype))
    generator = torch.Generator().manual_seed(0)
    sam = SAM(sgd(model), RHO, model, rule=rule, generator=generator)
    loss(model, (mine[0].to(dtype), mine[1])).backward()
    before = shards(model)
    with sam.perturbed():
        inside = shards(model)
    return {"before": before, "inside": inside, "after": shards(model)}


def fsdp_evaluated(mine: Batch) -> dict[str, Any]:
    """Losses before, within and after a block, each of which leaves the root's weights gathered."""
    model = sharded(network())
    sam = SAM(sgd(model), RHO, model)
    loss(model, mine).backward()
    with torch.no_grad():
        losses = [loss(model, mine)]
        with sam.perturbed():
            losses.append(loss(model, mine))
        losses.append(loss(model, mine))
    return {"losses": torch.stack(losses)}


def fsdp_random_direction(mine: Batch) -> dict[str, Any]:
    model = sharded(network())
    generator = torch.Generator().manual_seed(0)
    sam = SAM(sgd(model), RHO, model, rule=perturbations.random_direction, generator=generator)
    before = shards(model)
    try:
        sam.step(lambda: loss(model, mine))
        error = ""
    except TypeError as refusal:
        error = str(refusal)
    return {"error": error, "before": before, "after": shards(model)}


# --- a gradient that is not finite -------------------------------------------------------------


METHODS: dict[str, methods.Method] = {
    "gsam": methods.gsam,
    "wsam": methods.wsam,
    "gradient_penalty": methods.gradient_penalty,
    "friendly_sam": methods.friendly_sam,
    "vasso": methods.vasso,
    "multistep": methods.multistep,
    "momentum_sam": methods.momentum_sam,
    "looksam": partial(methods.looksam, k=3),
    "graphsam": partial(methods.graphsam, k=3, beta=0.5),
}


def broken(mine: Batch, wrap: Callable[[nn.Module], nn.Module], sync: bool) -> dict[str, Any]:
    """Five steps, at one of which the last process has no finite gradient, and those without it."""
    last = dist.get_rank() == dist.get_world_size() - 1
    bad = (mine[0] * torch.inf, mine[1]) if last else mine
    ends = {}
    for name, parts in (("with", [mine, mine, bad, mine, mine]), ("without", [mine] * 4)):
        model = wrap(network())
        sam = SAM(sgd(model), RHO, model, sync=sync)
        for part in parts:
            sam.step(partial(loss, model, part))
        ends[name] = weights(model)
        ends[f"{name}: skipped"] = sam.skipped
    return ends


def scenarios() -> dict[str, Callable[[Batch], dict[str, Any]]]:
    found: dict[str, Callable[[Batch], dict[str, Any]]] = {
        "block": block,
        "fsdp sam": partial(fsdp, rule=perturbations.sam, steps=100),
        "fsdp asam": partial(fsdp, rule=perturbations.asam, steps=25),
        "fsdp awp": partial(fsdp, rule=perturbations.awp, steps=25),
        "fsdp micro": fsdp_accumulated,
        "fsdp block": partial(fsdp_block, dtype=torch.float32, rule=perturbations.sam),
        "fsdp dithered": partial(fsdp_block, dtype=torch.bfloat16, rule=perturbations.dithered),
        "fsdp evaluated": fsdp_evaluated,
        "fsdp random_direction": fsdp_random_direction,
        "fsdp broken": partial(broken, wrap=sharded, sync=True),
    }
    viewed = partial(DistributedDataParallel, gradient_as_bucket_view=True)
    for name, method in METHODS.items():
        found[f"copies {name}"] = partial(by_method, wrap=DistributedDataParallel, method=method)
        found[f"views {name}"] = partial(by_method, wrap=viewed, method=method)
        found[f"fsdp {name}"] = partial(by_method, wrap=sharded, method=method)
    for sync in (True, False):
        for view in (True, False):
            found[f"sync={sync} view={view}"] = partial(replicated, sync=sync, view=view)
        for perturb in ("batch", "micro"):
            name = f"sync={sync} {perturb}"
            found[name] = partial(accumulated, sync=sync, perturb=perturb)
        found[f"sync={sync} all-reduces"] = partial(all_reduces, sync=sync)
        found[f"sync={sync} BatchNorm"] = partial(batch_norm, sync=sync)
        found[f"sync={sync} broken"] = partial(broken, wrap=DistributedDataParallel, sync=sync)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # a process that waits for one that has failed must not wait for ever
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = split(batch(), processes)[rank]
    results = {}
    for name, scenario in scenarios().items():
        try:
            results[name] = scenario(mine)
        except Exception:
            report = f"scenario {name!r}, process {rank} of {processes}:\n{traceback.format_exc()}"
            (folder / f"{rank}.error").write_text(report, encoding="utf-8")
            raise
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
