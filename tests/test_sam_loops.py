"""SAM in the loops people write: mixed precision, clipping, schedules, accumulation, compilation.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

import shutil
from functools import partial

import pytest
import torch
from sam_problem import (
    OPTIMIZERS,
    SGD,
    X,
    Y,
    assert_equal,
    copies,
    everything,
    loss_of,
    network,
    nothing_waits,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

from sam_lab import SAM
from sam_lab.perturbations import asam, sam_linf, unnormalized
from sam_lab.perturbations import sam as sam_rule


def noisy(seed=0):
    return network(nn.BatchNorm1d(4), nn.Dropout(0.5), seed=seed)


def assert_same_run(one, other):
    """Two functions that return a SAM and its model leave the same behind, bit for bit."""
    results = []
    for run in (one, other):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(everything(*run()))
    assert_equal(*results)


def clip_in_the_step(optimizer, params, bound):
    def clip(*_):
        clip_grad_norm_(params, bound)

    optimizer.register_step_pre_hook(clip)


def scaled_step(sam, model, scaler, loss, *, clip=None, tell=False, autocast=None):
    """The loop that the README shows, one step of it."""
    optimizer = sam.optimizer
    lower = partial(torch.autocast, "cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    before = sam.random_state()
    optimizer.zero_grad()
    with lower():
        clean = loss()
    scaler.scale(clean).backward()
    with sam.perturbed(random_state=before, scale=scaler.get_scale() if tell else None):
        with lower():
            perturbed = loss()
        scaler.scale(perturbed).backward()
    scaler.unscale_(optimizer)
    if clip is not None:
        clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return clean.detach()


# --- mixed precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", [sam_rule, asam, sam_linf], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_loop_with_grad_scaler_and_clipping_is_the_step_itself(make, rule, clip):
    """Trap: GradScaler refuses closures, and a second unscale (davda54/sam#7, #97)."""

    def by_hand():
        model = noisy()
        sam = SAM(make(model.parameters()), 0.1, model, rule=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for _ in range(4):
            scaled_step(sam, model, scaler, loss_of(model), clip=clip)
        return sam, model

    def in_one():
        model = noisy()
        optimizer = make(model.parameters())
        if clip is not None:
            clip_in_the_step(optimizer, list(model.parameters()), clip)
        sam = SAM(optimizer, 0.1, model, rule=rule)
        for _ in range(4):
            sam.step(loss_of(model))
        return sam, model

    assert_same_run(by_hand, in_one)


def test_a_rule_that_depends_on_the_scale_is_told_it():
    def scaled():
        model = noisy()
        sam = SAM(SGD(model.parameters()), 0.5, model, rule=unnormalized)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for _ in range(4):
            scaled_step(sam, model, scaler, loss_of(model), tell=True)
        return sam, model

    def plain():
        model = noisy()
        sam = SAM(SGD(model.parameters()), 0.5, model, rule=unnormalized)
        for _ in range(4):
            sam.step(loss_of(model))
        return sam, model

    assert_same_run(scaled, plain)


def test_an_overflow_lowers_the_scale_and_changes_nothing_else():
    """Trap: infinite gradients of the first pass moved the weights for good."""
    model = noisy()
    sam = SAM(OPTIMIZERS["adamw"](model.parameters()), 0.1, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled_step(sam, model, scaler, loss_of(model))
    before = everything(sam, model)
    weights = copies(model.parameters())
    scaled_step(sam, model, scaler, lambda: loss_of(model)() * 1e38)
    after = everything(sam, model)
    assert scaler.get_scale() == 2.0**11
    assert_equal(copies(model.parameters()), weights)
    assert_equal(after["optimizer"], before["optimizer"])
    assert sam.steps == 1
    scaled_step(sam, model, scaler, loss_of(model))
    assert sam.steps == 2 and all(p.isfinite().all() for p in model.parameters())


def test_float16_with_a_scale_that_is_far_too_large_comes_down_and_learns():
    model = network()
    sam = SAM(SGD(model.parameters(), momentum=0.9), 0.05, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    start, losses, steps = copies(model.parameters()), [], []
    for _ in range(60):
        losses.append(
            scaled_step(sam, model, scaler, loss_of(model), clip=1.0, autocast=torch.float16)
        )
        steps.append(sam.steps)
        if sam.steps == 0:
            assert_equal(copies(model.parameters()), start)
    assert steps[0] == 0 and scaler.get_scale() < 2.0**24
    assert steps[-1] == 60 - steps.count(0) > 40
    assert losses[-1] < 0.5 * losses[0]


def test_a_scaled_step_inside_the_block_is_refused():
    model = network()
    sam = SAM(SGD(model.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)()).backward()
    with pytest.raises(RuntimeError, match="inside perturbed"), sam.perturbed():
        scaler.scale(loss_of(model)()).backward()
        scaler.step(sam.optimizer)


@pytest.mark.parametrize("whole", [True, False], ids=["step", "by hand"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_autocast_block_around_both_passes_computes_with_the_weights_as_they_are(whole, dtype):
    """Trap: autocast keeps copies of weights until its end, so the second pass saw the old ones."""
    model, losses = network(), []
    sam = SAM(SGD(model.parameters()), 1.0)

    def closure():
        loss = loss_of(model)()
        losses.append(loss.detach())
        return loss

    with torch.autocast("cpu", dtype=dtype):
        if whole:
            sam.optimizer.param_groups[0]["lr"] = 0.0
            sam.step(closure)
        else:
            closure().backward()
            with sam.perturbed():
                closure().backward()
        closure()
    clean, perturbed, again = losses
    assert perturbed > 1.2 * clean
    assert_equal(again, clean)


def test_bfloat16_autocast_steps_are_near_those_of_float32():
    results = []
    for enabled in (False, True):
        model = network(nn.BatchNorm1d(4))
        sam = SAM(SGD(model.parameters()), 0.1, model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(5):
                sam.step(loss_of(model))
        results.append(copies(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert p.dtype == q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)


# --- clipping and schedules --------------------------------------------------------------------


@pytest.mark.parametrize("rule", [sam_rule, asam, sam_linf, unnormalized], ids=lambda r: r.__name__)
def test_clipping_before_the_block_does_nothing_but_where_the_length_of_the_gradient_counts(rule):
    moved = []
    for clip in (False, True):
        model = network()
        sam = SAM(SGD(model.parameters()), 0.1, rule=rule)
        loss_of(model)().backward()
        if clip:
            clip_grad_norm_(model.parameters(), 1e-3)
        with sam.perturbed():
            moved.append(copies(model.parameters()))
    same = all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(*moved, strict=True))
    assert same == (rule is not unnormalized)


def test_clipping_in_the_step_bounds_what_the_optimizer_sees():
    model, seen = network(), []
    optimizer = SGD(model.parameters())
    clip_in_the_step(optimizer, list(model.parameters()), 0.1)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(copies(p.grad for p in model.parameters()))
    )
    sam = SAM(optimizer)
    before = copies(model.parameters())
    sam.step(lambda: 100 * loss_of(model)())
    (grads,) = seen
    assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])) == pytest.approx(0.1)
    for p, w, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * g)


# What SequentialLR of torch 2.8 says of its own call.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_scheduler_of_the_optimizer_works_as_without_sam_and_gives_no_warning(by_hand):
    """Trap: "lr_scheduler.step() before optimizer.step()" at every start (davda54/sam#28)."""
    rates = []
    for rho in (None, 0.1):
        model = network()
        optimizer = SGD(model.parameters())
        sam = SAM(optimizer, rho) if rho else None
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])
        rates.append([])
        for _ in range(8):
            before = copies(model.parameters())
            if sam is not None and not by_hand:
                sam.step(loss_of(model))
            else:
                optimizer.zero_grad()
                loss_of(model)().backward()
                if sam is not None:
                    with sam.perturbed():
                        loss_of(model)().backward()
                optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            for p, w in zip(model.parameters(), before, strict=True):
                torch.testing.assert_close(p.detach(), w - rate * p.grad)
            rates[-1].append(rate)
            schedule.step()
    assert rates[0] == rates[1] and len(set(rates[0])) > 5


# --- several batches to a step -----------------------------------------------------------------


def in_parts(model, parts=4):
    """The loss of each part of the data, and of the whole."""
    x, y = X.double(), Y.double()
    pieces = zip(x.chunk(parts), y.chunk(parts), strict=True)
    return [lambda a=a, b=b: (model(a) - b).square().mean() for a, b in [*pieces, (x, y)]]


def test_several_closures_perturbed_as_one_batch_are_the_step_of_one_large_batch():
    """Trap: gradient accumulation "is not possible" (davda54/sam#62)."""
    model, twin, hand = (network().double() for _ in range(3))
    sams = [SAM(SGD(m.parameters(), momentum=0.9), 0.3) for m in (model, twin, hand)]
    for _ in range(5):
        *parts, _ = in_parts(model)
        *_, whole = in_parts(twin)
        torch.testing.assert_close(sams[0].step(parts), sams[1].step(whole))
        *parts, _ = in_parts(hand)
        sams[2].optimizer.zero_grad()
        for part in parts:
            (part() / 4).backward()
        with sams[2].perturbed():
            for part in parts:
                (part() / 4).backward()
        sams[2].optimizer.step()
    for p, q, r in zip(*(m.parameters() for m in (model, twin, hand)), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p, r)


def test_each_micro_batch_perturbed_by_itself_averages_the_gradients_of_as_many_points():
    """m-sharpness, by formula and by hand with `perturbed(grads)`."""
    model, hand = (network().double() for _ in range(2))
    sam = SAM(SGD(model.parameters(), momentum=0.9), 0.3)
    other = SAM(SGD(hand.parameters(), momentum=0.9), 0.3)
    for _ in range(3):
        params = list(model.parameters())
        *parts, whole = in_parts(model)
        weights = copies(params)
        expected = [torch.zeros_like(p) for p in params]
        for part in parts:
            g = torch.autograd.grad(part(), params)
            norm = torch.cat([x.flatten() for x in g]).norm()
            with torch.no_grad():
                for p, w, x in zip(params, weights, g, strict=True):
                    p.copy_(w + 0.3 * x / norm)
            for total, x in zip(expected, torch.autograd.grad(part(), params), strict=True):
                total += x / 4
            with torch.no_grad():
                for p, w in zip(params, weights, strict=True):
                    p.copy_(w)
        clean = whole().detach()
        torch.testing.assert_close(sam.step(parts, perturb="micro"), clean)

        *parts, _ = in_parts(hand)
        other.optimizer.zero_grad()
        for part in parts:
            grads = torch.autograd.grad(part(), other.params)
            with other.perturbed(grads):
                (part() / 4).backward()
        other.optimizer.step()
        for p, g, q in zip(params, expected, hand.parameters(), strict=True):
            torch.testing.assert_close(p.grad, g)
            torch.testing.assert_close(q.grad, g)
            torch.testing.assert_close(p, q)


def test_the_two_kinds_of_accumulation_differ_but_for_a_single_closure():
    results = {}
    for perturb in ("batch", "micro"):
        for count in (1, 4):
            model = network().double()
            SAM(SGD(model.parameters()), 0.5).step(in_parts(model, count)[:-1], perturb)
            results[perturb, count] = copies(model.parameters())
    assert_equal(results["batch", 1], results["micro", 1])
    assert not torch.allclose(results["batch", 4][0], results["micro", 4][0], rtol=1e-3)


@pytest.mark.parametrize("perturb", ["batch", "micro"])
def test_a_parameter_that_some_micro_batches_do_not_use_has_the_mean_gradient(perturb):
    always, sometimes, never = (torch.full((2,), 2.0, requires_grad=True) for _ in range(3))
    sam = SAM(SGD([always, sometimes, never]), 1e-9)
    closures = [lambda: always.square().sum(), lambda: (always * sometimes).sum()]
    sam.step(closures, perturb)
    torch.testing.assert_close(always.grad, torch.full((2,), 3.0))
    torch.testing.assert_close(sometimes.grad, torch.full((2,), 1.0))
    assert never.grad is None


@pytest.mark.parametrize("perturb", ["batch", "micro"])
def test_running_statistics_see_every_micro_batch_once(perturb):
    model, twin = (network(nn.BatchNorm1d(4)).double() for _ in range(2))
    for part in in_parts(twin)[:-1]:
        part()
    SAM(SGD(model.parameters()), 0.5, model).step(in_parts(model)[:-1], perturb)
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_gradients_to_follow_leave_those_that_are_there_alone():
    model = network()
    sam = SAM(SGD(model.parameters()), 0.3)
    loss_of(model)().backward()
    held = [p.grad for p in model.parameters()]
    before = copies(held)
    with sam.perturbed([torch.ones_like(p) for p in model.parameters()]):
        pass
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    assert_equal(copies(held), before)
    with sam.perturbed([None, *before[1:]]):
        assert_equal(model[0].weight, network()[0].weight)
        assert not torch.equal(model[0].bias, network()[0].bias)


def test_older_gradients_are_cleared_and_those_of_the_step_stay():
    """Trap: a missing zero_grad adds up the gradients of all steps (rollovd/LookSAM#3)."""
    model, twin = network(), network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    for its in (model, twin):
        SAM(SGD(its.parameters())).step(loss_of(its))
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert_equal(copies(model.parameters()), copies(twin.parameters()))


# --- implementations of the optimizer, compilation ---------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_every_implementation_of_the_optimizer_gives_the_same_run(kind):
    results = {}
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = network()
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        sam = SAM(kind(model.parameters(), lr=0.05, **momentum, **how), 0.1, model)
        for _ in range(10):
            sam.step(loss_of(model))
        results[next(iter(how.items()))] = everything(sam, model)
    loop, foreach, fused = results.values()
    assert_equal(foreach, loop)
    torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-6)


@pytest.fixture
def compiler():
    """What counts the graphs that are compiled, from a clean start and to a clean end."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    yield testing.CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("wrapped", [True, False], ids=["compiled model", "module within"])
def test_a_compiled_model_is_compiled_once_and_trains_as_the_plain_one(wrapped, compiler):
    """Neither weights nor buffers that come and go make it start anew."""

    def run(compiled):
        model = noisy()
        run_it = torch.compile(model, backend=compiler) if compiled else model
        sam = SAM(SGD(model.parameters()), 0.1, run_it if wrapped else model)
        for _ in range(5):
            sam.step(lambda: (run_it(X) - Y).square().mean())
        return sam, model

    assert_same_run(lambda: run(True), lambda: run(False))
    assert compiler.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiled_to_machine_code_sees_the_perturbed_weights(compiler):
    results = []
    for compiled in (False, True):
        model = network(nn.BatchNorm1d(4))
        run_it = torch.compile(model) if compiled else model
        sam = SAM(SGD(model.parameters()), 0.5, model)
        losses = [sam.step(lambda: (run_it(X) - Y).square().mean()) for _ in range(5)]  # noqa: B023
        results.append((losses, everything(sam, model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# --- on CUDA -----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("perturb", ["batch", "micro"])
def test_on_cuda_the_host_waits_for_nothing_in_a_step(perturb):
    model = noisy().cuda()
    x, y = X.cuda(), Y.cuda()
    closures = [lambda: (model(x) - y).square().mean()] * 2
    groups = [{"params": model[0].parameters(), "rho": 0.2}, {"params": model[4].parameters()}]
    sam = SAM(SGD(groups, momentum=0.9), 0.1, model)
    sam.step(closures, perturb)  # libraries may wait when they are first used
    torch.cuda.synchronize()
    with nothing_waits():
        for _ in range(3):
            sam.step(closures, perturb)
    assert sam.steps == 4 and sam.skipped == 0


@pytest.mark.cuda
def test_on_cuda_a_gradient_that_is_not_finite_is_counted_and_does_no_harm():
    model = network().cuda()
    x, y = X.cuda(), Y.cuda()
    sam = SAM(SGD(model.parameters()), 0.1)
    before = copies(model.parameters())
    sam.step(lambda: (model(x) - y).square().mean() * float("inf"))
    assert_equal(copies(model.parameters()), before)
    assert sam.skipped == 1


@pytest.mark.cuda
def test_on_cuda_float16_with_a_scale_that_is_far_too_large_comes_down_and_learns():
    model = network().cuda()
    x, y = X.cuda(), Y.cuda()
    optimizer = SGD(model.parameters(), momentum=0.9)
    sam = SAM(optimizer, 0.05, model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
    losses = []
    for _ in range(80):
        before = sam.random_state()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):  # one block around both passes
            loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            with sam.perturbed(random_state=before):
                scaler.scale((model(x) - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**30 and 40 < sam.steps < 80
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.cuda
def test_on_cuda_one_autocast_block_around_both_passes_computes_with_the_weights_as_they_are():
    model, losses = network().cuda(), []
    x, y = X.cuda(), Y.cuda()
    sam = SAM(SGD(model.parameters(), lr=0.0), 1.0)

    def closure():
        loss = (model(x) - y).square().mean()
        losses.append(loss.detach())
        return loss

    with torch.autocast("cuda", torch.bfloat16):
        sam.step(closure)
        closure()
    clean, perturbed, again = losses
    assert perturbed > 1.2 * clean
    assert_equal(again, clean)
