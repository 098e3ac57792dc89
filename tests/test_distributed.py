"""SAM in several processes, which torchrun really starts: replicas, shards, and what they follow.

One launch with two processes and one with four run all scenarios of distributed_worker.py; the
tests look at what the processes left behind. Runs of 100 steps are in float32, the formulas they
are compared with are evaluated here, in one process and in float64.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

import distributed_worker as worker
from distributed_worker import LR, MOMENTUM, RHO, Batch

from sam_lab import SAM

pytestmark = pytest.mark.slow
Weights = dict[str, Tensor]

both = pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "each its own"])
views = pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def run(request, tmp_path_factory):
    """What the processes have left behind, and their parts of the batch."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(request.param), worker.__file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its own
        output, _ = process.communicate(timeout=60)
    if process.returncode != 0:
        errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
        pytest.fail(errors[0].read_text(encoding="utf-8") if errors else output, pytrace=False)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
    return SimpleNamespace(
        processes=request.param,
        parts=worker.split(worker.batch(), request.param),
        of=lambda scenario: [result[scenario] for result in results],
        weights=lambda scenario: results[0][scenario]["weights"],
    )


# --- the formulas, in one process and in float64 -----------------------------------------------


def along_gradient(w: Weights, g: Weights) -> Weights:
    length = sum(v.square().sum() for v in g.values()).sqrt()
    return {k: RHO * g[k] / length for k in w}


def along_adapted_gradient(w: Weights, g: Weights) -> Weights:
    T = {k: v.abs() + 0.01 if v.ndim > 1 else torch.ones_like(v) for k, v in w.items()}
    length = sum((T[k] * g[k]).square().sum() for k in w).sqrt()
    return {k: RHO * T[k] ** 2 * g[k] / length for k in w}


def along_each_gradient(w: Weights, g: Weights) -> Weights:
    return {
        k: RHO * v.norm() * g[k] / g[k].norm() if v.ndim > 1 else torch.zeros_like(v)
        for k, v in w.items()
    }


def formula(
    groups: Sequence[Sequence[Batch]],
    steps: int = 100,
    direction: Callable[[Weights, Weights], Weights] = along_gradient,
    norm: bool = False,
) -> SimpleNamespace:
    """Momentum SGD along the mean of the groups' gradients, each at a perturbed point of its own.

    A group's loss is the mean over its batches. Weights after every 25 steps and the last; buffers
    as the clean passes of the very first batch have left them.
    """
    model = worker.network(norm).double()
    w = {k: p.detach().clone() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    velocity = {k: torch.zeros_like(v) for k, v in w.items()}

    def gradient(at: Weights, group: Sequence[Batch], clean: bool) -> Weights:
        at = {k: v.detach().requires_grad_() for k, v in at.items()}
        losses = []
        for part in group:
            kept = clean and part is groups[0][0]
            own = buffers if kept else {k: b.clone() for k, b in buffers.items()}
            outputs = torch.func.functional_call(model, {**at, **own}, part[0].double())
            losses.append(torch.nn.functional.cross_entropy(outputs, part[1]))
        found = torch.autograd.grad(sum(losses) / len(group), list(at.values()))
        return dict(zip(at, found, strict=True))

    after = {}
    for i in range(1, steps + 1):
        total = {k: torch.zeros_like(v) for k, v in w.items()}
        for group in groups:
            epsilon = direction(w, gradient(w, group, clean=True))
            there = gradient({k: w[k] + epsilon[k] for k in w}, group, clean=False)
            total = {k: total[k] + there[k] / len(groups) for k in w}
        velocity = {k: MOMENTUM * velocity[k] + total[k] for k in w}
        w = {k: w[k] - LR * velocity[k] for k in w}
        if i % worker.EVERY == 0 or i == steps:
            after[i] = torch.cat([v.reshape(-1) for v in w.values()])
    return SimpleNamespace(weights=after, buffers=buffers)


def assert_close(after: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    """Equal but for the rounding of float32; the weights are of the order of one."""
    assert after.keys() == expected.keys()
    for i in after:
        torch.testing.assert_close(after[i].double(), expected[i].double(), rtol=0, atol=1e-5)


# --- DistributedDataParallel -------------------------------------------------------------------


@both
@pytest.mark.parametrize("form", ["view=False", "view=True", "micro"])
def test_replicas_stay_bit_identical(run, sync, form):
    first, *others = (result["weights"] for result in run.of(f"sync={sync} {form}"))
    assert list(first) == ([25] if sync and form == "micro" else [25, 50, 75, 100])
    for other in others:
        assert all(torch.equal(other[i], first[i]) for i in first)


@views
def test_synchronised_it_is_the_step_of_one_process_on_the_whole_batch(run, view):
    model = worker.network()
    sam = SAM(worker.sgd(model), RHO, model)
    alone = worker.train(model, lambda: sam.step(lambda: worker.loss(model, worker.batch())), 100)
    after = run.weights(f"sync=True view={view}")
    assert_close(after, alone)
    assert_close(after, formula([[worker.batch()]]).weights)


@views
def test_else_every_process_perturbs_along_its_own_part_of_the_batch(run, view):
    after = run.weights(f"sync=False view={view}")
    assert_close(after, formula([[part] for part in run.parts]).weights)
    other = run.weights(f"sync=True view={view}")
    assert all((after[i] - other[i]).abs().max() > 1e-3 for i in after)


def test_no_sync_around_the_first_pass_of_a_block_gives_the_same_weights_as_a_step(run):
    blocks, steps = run.of("block"), run.of("sync=False view=False")
    for one, other in zip(blocks, steps, strict=True):
        assert list(one["weights"]) == [25, 50, 75, 100]
        assert all(torch.equal(one["weights"][i], other["weights"][i]) for i in one["weights"])


@both
def test_micro_batches_of_every_process_can_make_up_one_perturbation(run, sync):
    groups = [[worker.batch()]] if sync else [[part] for part in run.parts]
    assert_close(run.weights(f"sync={sync} batch"), formula(groups, 25).weights)


@both
def test_or_each_micro_batch_has_a_perturbation_of_its_own(run, sync):
    micro = [worker.split(part, 2) for part in run.parts]
    if sync:  # the first of all processes together, then the second
        expected = formula(list(zip(*micro, strict=True)), 25)
    else:
        expected = formula([[part] for parts in micro for part in parts], 100)
    assert_close(run.weights(f"sync={sync} micro"), expected.weights)


@both
def test_gradients_are_averaged_twice_a_step_or_once(run, sync):
    for result in run.of(f"sync={sync} all-reduces"):
        assert result["counts"] == [2 if sync else 1] * 5


@both
def test_running_statistics_are_those_of_the_clean_passes_of_the_first_process(run, sync):
    parts = [(x, y % 3) for x, y in run.parts]
    expected = formula([parts] if sync else [[part] for part in parts], 25, norm=True)
    first, *others = run.of(f"sync={sync} BatchNorm")
    assert_close(first["weights"], expected.weights)
    for name, buffer in first["buffers"].items():
        torch.testing.assert_close(buffer, expected.buffers[name].to(buffer), rtol=1e-5, atol=1e-5)
    for other in others:
        assert torch.equal(other["weights"][25], first["weights"][25])
        assert other["buffers"]["1.num_batches_tracked"] == 25


# --- methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", worker.METHODS)
@pytest.mark.parametrize("how", ["copies", "views", "fsdp"])
def test_a_method_is_that_of_one_process_on_the_whole_batch(run, how, name):
    """Trap: bucket views of a gradient that a method holds are written over by the next pass."""
    model, (x, y) = worker.network().double(), worker.batch()
    sam = SAM(worker.sgd(model), RHO, model, method=worker.METHODS[name])
    for _ in range(12):
        sam.step(lambda: worker.loss(model, (x.double(), y)))
    assert_close(run.weights(f"{how} {name}"), {12: worker.weights(model)})


# --- FSDP2 -------------------------------------------------------------------------------------


def test_the_norm_of_sharded_gradients_is_that_of_the_whole(run):
    parts = [(r["inside"] - r["before"]).double().norm() for r in run.of("fsdp block")]
    assert torch.stack(parts).norm() == pytest.approx(RHO, rel=1e-5)
    assert max(parts) < 0.99 * RHO


@pytest.mark.parametrize("scenario", ["fsdp block", "fsdp dithered"])
def test_shards_are_restored_exactly(run, scenario):
    for result in run.of(scenario):
        assert not torch.equal(result["inside"], result["before"])
        assert torch.equal(result["after"], result["before"])


def test_sharded_it_is_the_step_of_one_process_on_the_whole_batch(run):
    assert_close(run.weights("fsdp sam"), formula([[worker.batch()]]).weights)


def test_so_is_asam_whose_norm_is_another(run):
    expected = formula([[worker.batch()]], 25, along_adapted_gradient).weights
    assert_close(run.weights("fsdp asam"), expected)
    assert (expected[25] - formula([[worker.batch()]], 25).weights[25]).abs().max() > 1e-3


def test_so_is_awp_whose_norms_are_those_of_whole_weights(run):
    expected = formula([[worker.batch()]], 25, along_each_gradient).weights
    assert_close(run.weights("fsdp awp"), expected)
    assert (expected[25] - formula([[worker.batch()]], 25).weights[25]).abs().max() > 1e-3


def test_sharded_micro_batches_can_be_perturbed_one_by_one(run):
    micro = [worker.split(part, 2) for part in run.parts]
    expected = formula(list(zip(*micro, strict=True)), 10)
    assert_close(run.weights("fsdp micro"), expected.weights)


def test_what_is_evaluated_in_a_block_has_the_perturbed_weights_of_all_layers(run):
    before, inside, after = torch.stack([r["losses"] for r in run.of("fsdp evaluated")]).mean(0)
    model = worker.network()
    sam = SAM(worker.sgd(model), RHO, model)
    clean = worker.loss(model, worker.batch())
    clean.backward()
    with sam.perturbed():
        perturbed = worker.loss(model, worker.batch())
    assert before.item() == pytest.approx(clean.item(), abs=1e-6)
    assert inside.item() == pytest.approx(perturbed.item(), abs=1e-6)
    assert after == before


def test_a_random_direction_for_shards_is_refused(run):
    for result in run.of("fsdp random_direction"):
        assert "sharded" in result["error"]
        assert torch.equal(result["after"], result["before"])


# --- a gradient that is not finite -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync=True", "sync=False", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_of_all(run, kind):
    results = run.of(f"{kind} broken")
    for result in results:
        assert (result["with: skipped"], result["without: skipped"]) == (1, 0)
        assert result["with"].isfinite().all()
        assert torch.equal(result["with"], results[0]["with"])
        # neither weights nor momentum have seen it
        assert torch.equal(result["with"], result["without"])
