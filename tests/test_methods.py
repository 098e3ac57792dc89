"""The methods of the SAM family, each by the identity that defines it, and what all steps keep."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sam_problem import (
    OPTIMIZERS,
    SGD,
    Elsewhere,
    X,
    Y,
    assert_equal,
    copies,
    everything,
    network,
    nothing_waits,
)
from torch import nn

from sam_lab import SAM, methods, models
from sam_lab.methods import (
    bernoulli,
    det_sam,
    esam,
    every,
    friendly_sam,
    frob_sam,
    gradient_penalty,
    graphsam,
    gsam,
    gsam_radius,
    inner,
    looksam,
    mix,
    momentum_sam,
    multistep,
    plain,
    plus,
    reject,
    sam_on,
    sparse_sam,
    times,
    trace_sam,
    unit,
    vasso,
    wsam,
)
from sam_lab.perturbations import asam, awp, gaussian, sam_linf, uniform, unnormalized
from sam_lab.perturbations import sam as sam_rule

# Each method, and how many passes a step takes on average over six steps.
METHODS = {
    "plain": (plain, 2),
    "gsam": (gsam, 2),
    "gsam, second form": (partial(gsam, minimize_fp=False), 2),
    "wsam": (wsam, 2),
    "gradient_penalty": (partial(gradient_penalty, lam=0.02), 2),
    "friendly_sam": (friendly_sam, 2),
    "vasso": (vasso, 2),
    "multistep": (partial(multistep, k=3), 4),
    "sparse_sam": (partial(sparse_sam, every=4), 2),
    "momentum_sam": (momentum_sam, 1),
    "looksam": (partial(looksam, k=3), 4 / 3),
    "graphsam": (partial(graphsam, k=3, beta=0.5), 4 / 3),
    "esam": (esam, 2.5),  # of closures; a forward and half of the examples
    "trace_sam": (trace_sam, 2),
    "frob_sam": (frob_sam, 3),
    "det_sam": (partial(det_sam, n=2), 3),
}
STATEFUL = ["friendly_sam", "vasso", "sparse_sam", "looksam", "graphsam"]
# What is plain SAM, bit for bit.
REDUCTIONS = {
    "gsam": partial(gsam, alpha=0.0),
    "wsam": partial(wsam, gamma=0.5),
    "gradient_penalty": partial(gradient_penalty, lam=0.2),
    "friendly_sam": partial(friendly_sam, sigma=0.0),
    "vasso": partial(vasso, theta=1.0),
    "multistep": partial(multistep, k=1),
    "sparse_sam": partial(sparse_sam, sparsity=0.0),
    "looksam": partial(looksam, k=1),
    "graphsam": partial(graphsam, k=1),
    "esam": partial(esam, beta=1.0, gamma=1.0),
}
NOISY = (nn.BatchNorm1d(4), nn.Dropout(0.5))
MOMENTUM = partial(SGD, momentum=0.9)
every_method = pytest.mark.parametrize("name", METHODS)


def losses_of(model, scale=1.0):
    """A closure for all methods, those that select examples too."""

    def losses(examples=slice(None)):
        return scale * (model(X[examples]) - Y[examples]).square().mean(1)

    return losses


def made(method, rho=0.2, make=MOMENTUM, extra=NOISY, **options):
    model = network(*copy.deepcopy(extra))
    generator = torch.Generator().manual_seed(5)
    sam = SAM(make(model.parameters()), rho, model, method=method, generator=generator, **options)
    return model, sam


def train(model, sam, steps, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        losses = [sam.step(losses_of(model)) for _ in range(steps)]
        return losses, torch.get_rng_state()


def after(method, steps=6, **options):
    """All that a run leaves behind."""
    model, sam = made(method, **options)
    losses, random = train(model, sam, steps)
    return {**everything(sam, model), "losses": losses, "random": random}


# --- the seam: nine rules -------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_at_rho_zero_the_method_is_not_called_and_the_step_is_the_optimizers_own(name, make):
    method, _ = METHODS[name]

    def alone():
        model = network(*copy.deepcopy(NOISY))
        optimizer = make(model.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(4):
                optimizer.zero_grad()
                losses_of(model)().mean().backward()
                optimizer.step()
            return dict(model.state_dict()), optimizer.state_dict()["state"], torch.get_rng_state()

    found = after(method, 4, rho=0.0, make=make)
    assert_equal((found["model"], found["optimizer"], found["random"]), alone())


@every_method
def test_the_first_look_moves_statistics_and_random_numbers_and_later_ones_do_not(name):
    """Of a step: after it, buffers and random state are those of one forward."""
    method, _ = METHODS[name]
    model, sam = made(method, rho=0.2)
    train(model, sam, 1)  # so that momentum and states are there
    twin = copy.deepcopy(model)
    if name == "momentum_sam":  # its first look is not at w
        before = [-v for v in (sam.optimizer.state[p]["momentum_buffer"] for p in sam.params)]
        epsilon = sam_rule(sam.params, before, 0.2)
        with torch.no_grad():
            torch._foreach_add_(list(twin.parameters()), epsilon)
    if name == "graphsam":
        epsilon = sam_rule(sam.params, sam._state["h"], 0.2)
        with torch.no_grad():
            torch._foreach_add_(list(twin.parameters()), epsilon)
    (loss,), random = train(model, sam, 1, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert_equal(loss, losses_of(twin)().mean().detach())
        assert_equal(random, torch.get_rng_state())
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert int(model[1].num_batches_tracked) == 2


@every_method
def test_the_looks_of_a_step_are_counted_and_see_the_same_random_numbers(name):
    method, passes = METHODS[name]
    model, sam = made(method)
    masks = []

    def losses(examples=slice(None)):
        masks.append(torch.get_rng_state())
        return losses_of(model)(examples)

    per_step = []
    for _ in range(6):
        masks.clear()
        sam.step(losses)
        per_step.append(len(masks))
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert sum(per_step) / 6 == pytest.approx(passes + 0.5 * (name == "esam"))


@every_method
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_look_that_fails_leaves_weights_buffers_and_state_as_they_were(name, at):
    method, _ = METHODS[name]
    model, sam = made(method)
    train(model, sam, 3)
    weights, state, calls = copies(model.parameters()), copy.deepcopy(sam.state_dict()), []

    def losses(examples=slice(None)):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt
        return losses_of(model)(examples)

    try:
        sam.step(losses)
    except KeyboardInterrupt:
        assert_equal(copies(model.parameters()), weights)
        found = sam.state_dict()
        assert_equal(found["optimizer"], state["optimizer"])
        assert found["steps"] == state["steps"] and found["skipped"] == 0
        assert ("method" in found) == ("method" in state)
        if "method" in found:
            assert_equal(found["method"]["state"], state["method"]["state"])
    else:
        assert len(calls) < at
    assert not sam._inside
    sam.step(losses_of(model))


@every_method
@pytest.mark.parametrize("at", [1, 2])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state(name, at):
    """Trap: one bad batch, and the average that a method keeps is NaN for ever."""
    method, _ = METHODS[name]
    model, sam = made(method)
    train(model, sam, 4)
    before, state, calls = everything(sam, model), copy.deepcopy(sam._state), []

    def losses(examples=slice(None)):
        calls.append(0)
        return losses_of(model, math.nan if len(calls) == at else 1.0)(examples)

    sam.step(losses)
    if len(calls) < at or (name == "plain" and at == 1):  # which then steps from w itself
        return
    found = everything(sam, model)
    assert found["counts"] == [4, 1]
    assert_equal(found["optimizer"], before["optimizer"])
    assert_equal(
        dict(model.named_parameters()).keys() and copies(model.parameters()),
        [before["model"][key] for key, _ in model.named_parameters()],
    )
    assert_equal(sam._state, state)
    train(model, sam, 2)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("first", [True, False])
def test_on_an_accelerator_the_state_stays_what_it_was_without_the_host_asking(
    name, first, monkeypatch
):
    method, _ = METHODS[name]
    model, sam = made(method)
    if not first:
        train(model, sam, 4)
    before = copy.deepcopy(sam._state)
    monkeypatch.setattr("sam_lab.sam.torch.isfinite", lambda t: (t - t == 0).as_subclass(Elsewhere))
    sam.step(lambda: losses_of(model, math.nan)().mean())
    for key, value in sam._state.items():
        if isinstance(value, list):
            plain_tensors = [t.as_subclass(torch.Tensor) for t in value]
            if first:
                assert not any(t.any() for t in plain_tensors)
            else:
                assert_equal(plain_tensors, before[key])


@every_method
@pytest.mark.parametrize("make", [MOMENTUM, OPTIMIZERS["adamw"]], ids=["momentum", "adamw"])
@pytest.mark.parametrize("at", [3, 4])
def test_a_run_that_was_saved_in_the_middle_goes_on_bit_for_bit(name, make, at, tmp_path):
    """Traps: counters, averages and reused gradients that are in no checkpoint (THUDM/INFTY#18)."""
    method, _ = METHODS[name]
    model, sam = made(method, make=make)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(at):
            sam.step(losses_of(model))
        state = {"model": model.state_dict(), "sam": sam.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, tmp_path / "checkpoint.pt")
        losses = [sam.step(losses_of(model)) for _ in range(4)]
        resumed, other = made(method, make=make)
        other.generator.manual_seed(99)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["sam"])
        torch.set_rng_state(state["rng"])
        assert_equal([other.step(losses_of(resumed)) for _ in range(4)], losses)
    assert_equal(everything(other, resumed), everything(sam, model))
    assert_equal(other._state, sam._state)
    assert bool(sam._state) == (name in STATEFUL)


def test_a_state_is_copied_on_load_and_refused_where_it_does_not_fit():
    model, sam = made(vasso)
    train(model, sam, 2)
    _, other = made(vasso)
    state = sam.state_dict()
    other.load_state_dict(state)
    assert all(a is not b for a, b in zip(other._state["d"], sam._state["d"], strict=True))
    with pytest.raises(ValueError, match="state is of the method vasso, and this SAM has plain"):
        made(plain)[1].load_state_dict(state)
    _, smaller = made(vasso, extra=())
    with pytest.raises(ValueError, match="state 'd' of the method vasso must have one tensor for"):
        smaller.load_state_dict(state)
    other.load_state_dict(made(vasso)[1].state_dict())  # of before the first step
    assert other._state == {}


@every_method
def test_a_copy_goes_on_by_itself(name):
    method, _ = METHODS[name]
    model, sam = made(method)
    train(model, sam, 2)
    twin, other = copy.deepcopy((model, sam))
    train(twin, other, 3)
    train(model, sam, 3)
    assert_equal(everything(other, twin), everything(sam, model))


@every_method
def test_a_parameter_without_a_gradient_has_none_afterwards_and_is_not_moved(name):
    method, _ = METHODS[name]
    used, unused = torch.full((3,), 0.5, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []

    def losses(examples=slice(None)):
        seen.append(unused.detach().clone())
        return (X[examples] @ used - Y[examples, 0]).square()

    optimizer = torch.optim.SGD([used, unused], 0.1, momentum=0.9, weight_decay=0.1)
    sam = SAM(optimizer, 0.1, method=method, generator=torch.Generator())
    for _ in range(4):
        sam.step(losses)
    assert unused.grad is None and torch.equal(unused.detach(), torch.ones(2))
    assert used.grad is not None and not torch.equal(used.detach(), torch.full((3,), 0.5))
    if name != "momentum_sam":  # it cannot know before its first look
        assert all(torch.equal(t, torch.ones(2)) for t in seen)


SCALE_FREE = [
    "plain", "gsam", "gsam, second form", "wsam", "gradient_penalty", "friendly_sam", "vasso",
    "multistep", "sparse_sam", "looksam", "graphsam", "esam", "trace_sam",
]  # fmt: skip


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_loss_times_a_power_of_two_is_a_direction_times_it(name):
    """Momentum-SAM is, too, once the momentum is scaled; Frob-SAM and Det-SAM are not."""
    method, _ = METHODS[name]
    grads = []
    for scale in (1.0, 2.0**7):
        model, sam = made(method, make=partial(torch.optim.SGD, lr=0.0), extra=())
        for _ in range(2):
            sam.step(losses_of(model, scale))
        grads.append([p.grad / scale for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_plain_by_the_seam_is_what_it_is_by_hand():
    def by_hand(look, state):
        g = look()
        return look.at(look.epsilon(g)), state

    for rule in (sam_rule, asam, awp, sam_linf, unnormalized):
        assert_equal(after(by_hand, rule=rule), after(plain, rule=rule))


def test_the_block_and_unsynchronised_gradients_are_for_plain_sam_and_say_so():
    model, sam = made(gsam)
    losses_of(model)().mean().backward()
    with pytest.raises(RuntimeError, match=r"has the method gsam, which needs step\(closure\)"):
        sam.perturbed().__enter__()
    with pytest.raises(ValueError, match="sync=False is for plain SAM: the method vasso"):
        made(vasso, sync=False)


# --- what is not a method ---------------------------------------------------------------------


def returning(direction, state):
    return lambda look, _: (direction(look()), state)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (lambda look, state: (look.params, state), ValueError, "has not looked at the loss"),
        (returning(lambda g: g[:2], {}), ValueError, "must return one tensor for each of the 4"),
        (returning(lambda g: [x[:1] for x in g], {}), ValueError, "of its shape"),
        (returning(list, None), TypeError, "must return a dict as its state, got None"),
        (returning(list, {"x": [1]}), ValueError, "the state 'x' of the method .* one tensor for"),
        (returning(list, {"x": torch.ones(1)}), TypeError, "'x' .* a number or a list of tensors"),
        (lambda look, state: (look.momentum(), state), ValueError, "this SGD does not keep"),
        (lambda look, state: (look.loss, state), ValueError, "look.loss needs a look"),
        (lambda look, state: (look.losses(), state), ValueError, "takes examples="),
        (
            lambda look, state: (look.at(look(), examples=torch.tensor([0])), state),
            ValueError,
            "selects examples: give step one closure that takes examples=",
        ),
    ],
)
def test_a_method_that_is_none_is_told_so_and_nothing_happens(method, error, message):
    model, sam = made(method, make=SGD, extra=())
    before = everything(sam, model)
    with pytest.raises(error, match=message):
        sam.step(lambda: losses_of(model)().mean())
    assert_equal(everything(sam, model), before)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (partial(gsam, alpha=-1), "alpha must be .* got -1"),
        (partial(wsam, gamma=1.0), "gamma must be at least 0 and below 1, got 1.0"),
        (partial(gradient_penalty, lam=-1), "lam must be .* got -1"),
        (partial(friendly_sam, sigma=-1), "sigma must be .* got -1"),
        (partial(friendly_sam, lam=2), "lam must be between 0 and 1, got 2"),
        (partial(vasso, theta=-0.1), "theta must be between 0 and 1, got -0.1"),
        (partial(multistep, k=0), "k must be .* got 0"),
        (partial(sparse_sam, sparsity=1.0), "sparsity must be .* got 1.0"),
        (partial(looksam, k=0), "k must be .* got 0"),
        (partial(looksam, alpha=math.nan), "alpha must be .* got nan"),
        (partial(graphsam, beta=2), "beta must be between 0 and 1, got 2"),
        (partial(esam, beta=0.0), "beta must be above 0 and at most 1, got 0.0"),
        (partial(esam, gamma=2), "gamma must be above 0 and at most 1, got 2"),
        (partial(frob_sam, n=1), "n must be .* of at least 2, got 1"),
        (partial(det_sam, width=0), "width must be .* got 0"),
        (partial(trace_sam, lam=-1), "lam must be .* got -1"),
    ],
)
def test_a_bad_argument_of_a_method_is_named(method, message):
    model, sam = made(method)
    with pytest.raises(ValueError, match=message):
        sam.step(losses_of(model))


@pytest.mark.parametrize("method", [esam, trace_sam, frob_sam, det_sam], ids=lambda m: m.__name__)
def test_a_method_that_draws_asks_for_a_generator(method):
    with pytest.raises(
        ValueError, match=f"the method {method.__name__} draws random numbers: give"
    ):
        SAM(SGD(network().parameters()), method=method)


def test_a_method_that_divides_by_rho_needs_one_radius():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    groups = [{"params": [a], "rho": 0.1}, {"params": [b], "rho": 0.2}, {"params": [c], "rho": 0}]
    sam = SAM(SGD(groups), method=gradient_penalty)
    with pytest.raises(ValueError, match=r"divides by rho and needs one .* got \[0.1, 0.2\]"):
        sam.step(lambda: (a * b * c).sum())
    groups[1]["rho"] = 0.1
    SAM(SGD(groups), method=gradient_penalty).step(lambda: (a * b * c).sum())


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="method must be a function of sam_lab.methods, got 'gsam'"):
        made("gsam")
    assert repr(made(partial(gsam, alpha=0.1))[1]).endswith("rule=sam, method=gsam)")


# --- reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("rule", [sam_rule, asam, awp], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("make", [MOMENTUM, OPTIMIZERS["adamw"]], ids=["momentum", "adamw"])
def test_at_one_setting_it_is_plain_sam_bit_for_bit(name, rule, make):
    found = after(REDUCTIONS[name], rule=rule, make=make)
    assert_equal(found, after(plain, rule=rule, make=make))


def test_wsam_at_gamma_zero_is_the_optimizer_alone():
    assert_equal(after(partial(wsam, gamma=0.0)), after(plain, rho=0.0))


def test_looksam_at_alpha_zero_is_sam_every_kth_step():
    found = after(partial(looksam, k=3, alpha=0.0), steps=7)
    assert_equal(found, after(plain, rho=every(3, 0.2), steps=7))


@pytest.mark.parametrize("rho", [0.0, 1e-30])
def test_momentum_sam_at_radius_zero_is_sgd_with_momentum(rho):
    assert_equal(after(momentum_sam, rho=rho), after(plain, rho=0.0))


def test_momentum_sam_at_one_radius_is_nesterovs_method():
    """The points at which it looks are the iterates of torch's `nesterov=True`."""
    lr, mu = 0.05, 0.8
    A = torch.diag(torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64))
    w, v = (torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True) for _ in "ab")
    nesterov = torch.optim.SGD([v], lr, momentum=mu, nesterov=True)
    optimizer, looked = torch.optim.SGD([w], lr, momentum=mu), []

    def radius(_):
        average = optimizer.state.get(w, {}).get("momentum_buffer")
        return lr * mu * float(average.norm()) if average is not None else 1e-9

    sam = SAM(optimizer, radius, method=momentum_sam)

    def loss():
        looked.append(w.detach().clone())
        return w @ A @ w / 2

    for _ in range(30):
        iterate = v.detach().clone()
        sam.step(loss)
        torch.testing.assert_close(looked[-1], iterate, rtol=1e-12, atol=1e-13)
        nesterov.zero_grad()
        (v @ A @ v / 2).backward()
        nesterov.step()


def test_adams_momentum_is_its_first_moment():
    model, sam = made(momentum_sam, make=OPTIMIZERS["adamw"], extra=())
    train(model, sam, 2)
    averages = [-sam.optimizer.state[p]["exp_avg"] for p in sam.params]
    expected = [
        w + e for w, e in zip(copies(sam.params), sam_rule(sam.params, averages, 0.2), strict=True)
    ]
    seen = []
    sam.step(lambda: seen.append(copies(sam.params)) or losses_of(model)().mean())
    assert_equal(seen, [expected])


def test_sam_on_is_sam_on_a_net_of_nothing_else_and_moves_nothing_else_elsewhere():
    norms = nn.Sequential(nn.LayerNorm(3), nn.Tanh(), nn.GroupNorm(1, 3))
    runs = []
    for grouped in (False, True):
        model = copy.deepcopy(norms)
        sam = SAM(SGD(sam_on(model) if grouped else model.parameters()), 0.3)
        for _ in range(3):
            sam.step(lambda: (model(X) - Y).square().mean())  # noqa: B023
        runs.append(copies(model.parameters()))
    assert_equal(*runs)
    model = network(nn.BatchNorm1d(4))
    sam, before = SAM(SGD(sam_on(model)), 0.3), dict(copy.deepcopy(model).named_parameters())
    losses_of(model)().mean().backward()
    with sam.perturbed():
        moved = {
            name: (p.detach() - before[name].detach()).norm()
            for name, p in model.named_parameters()
        }
    assert {name for name, size in moved.items() if size} == {"1.weight", "1.bias"}
    assert torch.stack(list(moved.values())).norm() == pytest.approx(0.3, rel=1e-4)


def test_sam_on_goes_by_type_and_wants_a_layer_to_perturb():
    """Trap: by name, `downsample.1` of a ResNet is no norm layer (mueller-mp/SAM-ON)."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True)
    )
    first, others = sam_on(model)
    assert len(first["params"]) == 4 and others["rho"] == 0.0 and len(others["params"]) == 2
    assert sam_on(model, nn.Conv2d)[0]["params"] == list(model[0].parameters())
    for bare in (nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(3, elementwise_affine=False))):
        with pytest.raises(ValueError, match="model must have a layer of .* got"):
            sam_on(bare)


def test_msam_in_one_part_is_sam_and_of_quadratics_the_mean_of_their_steps():
    model, twin = network(), network()
    sams = [SAM(SGD(m.parameters()), 0.3) for m in (model, twin)]
    sams[0].step([losses_of(model)], perturb="micro")
    sams[1].step(losses_of(twin))
    assert_equal(copies(model.parameters()), copies(twin.parameters()))
    A, B = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 5.0]))
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    at = w.detach().clone()
    SAM(SGD([w]), 0.3).step([lambda: w @ A @ w / 2, lambda: w @ B @ w / 2], perturb="micro")
    steps = [M @ (at + 0.3 * (M @ at) / (M @ at).norm()) for M in (A, B)]
    torch.testing.assert_close(w.grad, sum(steps) / 2)


def test_msam_of_single_examples_is_a_perturbation_for_each():
    model = network()
    params, expected = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(X)):
        twin = network()
        SAM(SGD(twin.parameters()), 0.3).step(lambda: losses_of(twin)(slice(i, i + 1)))  # noqa: B023
        torch._foreach_add_(expected, [p.grad / len(X) for p in twin.parameters()])
    parts = [lambda i=i: losses_of(model)(slice(i, i + 1)).mean() for i in range(len(X))]
    SAM(SGD(params), 0.3).step(parts, perturb="micro")
    torch.testing.assert_close([p.grad for p in params], expected)


@pytest.mark.parametrize("name", ["gsam", "frob_sam", "momentum_sam"])
def test_a_method_without_a_state_takes_micro_batches_and_one_with_a_state_does_not(name):
    method, _ = METHODS[name]
    model, sam = made(method, extra=())
    sam.step([lambda: losses_of(model)().mean()] * 3, perturb="micro")
    assert sam.steps == 1
    for stateful in STATEFUL:
        model, sam = made(METHODS[stateful][0], extra=())
        before = everything(sam, model)
        with pytest.raises(
            ValueError, match=f'"micro" is for methods without a state, and {stateful}'
        ):
            sam.step([lambda: losses_of(model)().mean()] * 2, perturb="micro")  # noqa: B023
        assert_equal(everything(sam, model), before)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "esam"])
def test_several_closures_are_one_large_batch(name):
    method, _ = METHODS[name]
    runs = []
    for parts in (1, 4):
        model, sam = made(method, extra=())
        model.double()
        x, y = X.double().chunk(parts), Y.double().chunk(parts)
        closures = [
            lambda a=a, b=b: (model(a) - b).square().mean()  # noqa: B023
            for a, b in zip(x, y, strict=True)
        ]
        for _ in range(4):
            sam.step(closures)
        runs.append(copies(model.parameters()))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-8)


def test_awp_of_a_single_layer_is_sam_with_a_radius_relative_to_its_norm():
    runs = []
    for rule in (awp, sam_rule):
        layer = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 5 - 0.3)
        rho = 0.1 if rule is awp else 0.1 * float(layer.weight.detach().norm())
        SAM(SGD(layer.parameters()), rho, rule=rule).step(lambda: layer(X).square().mean())  # noqa: B023
        runs.append(layer.weight.detach())
    torch.testing.assert_close(*runs)


# --- blends and directions ------------------------------------------------------------------------

vectors = st.lists(st.floats(-10, 10), min_size=4, max_size=4).map(
    lambda x: list(torch.tensor(x, dtype=torch.float64).split([1, 3]))
)


@given(a=vectors, b=vectors)
def test_a_rejection_is_across_and_a_unit_has_length_one(a, b):
    left, square = reject(a, b), float(inner(b, b))
    assert abs(float(inner(left, b))) <= 1e-9 * max(1.0, float(inner(a, a)), square)
    if square == 0:
        assert_equal(left, a)
    assert math.isclose(float(inner(unit(a), unit(a))), 1.0) or float(inner(a, a)) < 1e-300
    assert_equal(plus(a, 0.0, times(2.0, b)), a)
    if square > 1e-100:
        assert_equal([x.abs().sum() for x in reject(b, b)], [torch.zeros_like(b[0]).sum()] * 2)


@given(a=vectors, b=vectors, share=st.floats(-3, 3))
def test_a_mix_is_a_weighted_mean_and_the_first_at_a_share_of_one(a, b, share):
    for mixed, x, y in zip(mix(share, a, b), a, b, strict=True):
        assert torch.allclose(mixed, share * x + (1 - share) * y)
    assert_equal(mix(1.0, a, b), a)


class OnQuadratic:
    """The oracle of `Look` on L = w.Hw / 2, by its formula: a method needs no more than that."""

    def __init__(self, H, w, rho):
        self.H, self.params, self.rho, self.loss, self.count = H, [w], rho, None, 0

    def __call__(self):
        return self.at([torch.zeros_like(self.params[0])])

    def at(self, epsilon, examples=None):
        there = self.params[0] + epsilon[0]
        self.loss, self.count = there @ self.H @ there / 2, self.count + 1
        return [self.H @ there]

    def epsilon(self, direction, rule=None):
        return (rule or sam_rule)(self.params, direction, self.rho)

    def along(self, direction, rule=None):
        return self.at(self.epsilon(direction, rule))


def quadratic(seed=0, size=6, rho=0.1):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(size, size, generator=generator, dtype=torch.float64)
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    return OnQuadratic(H + H.T, w, rho)


@given(seed=st.integers(0, 10**6), rho=st.floats(1e-3, 1.0), alpha=st.floats(0.0, 1.0))
def test_the_table_of_coefficients_in_the_plane_of_the_first_two_lanczos_vectors(seed, rho, alpha):
    """d - g = a q1 + b q2 with q1 = g / |g|, and q2 the part of H q1 across it."""
    look = quadratic(seed, rho=rho)
    (g,) = look()
    q1 = g / g.norm()
    a1 = q1 @ look.H @ q1
    q2 = look.H @ q1 - a1 * q1
    b1 = q2.norm()
    q2 = q2 / b1
    norm = g.norm()

    def coefficients(method, state=None, rule=None):
        along = look.along
        if rule is not None:
            look.along = lambda d, other=None: along(d, other or rule)
        ((d,), _) = method(look, state or {})
        look.along = along
        extra = d - g
        a, b = extra @ q1, extra @ q2
        # nothing outside of the plane
        torch.testing.assert_close(extra, a * q1 + b * q2, rtol=1e-6, atol=1e-8 * float(norm + b1))
        return float(a), float(b)

    def close(found, *expected):
        scale = float(rho * (abs(a1) + b1) + norm)
        assert found == pytest.approx([float(x) for x in expected], rel=1e-7, abs=1e-8 * scale)

    close(coefficients(plain), rho * a1, rho * b1)
    close(coefficients(plain, rule=unnormalized), norm * rho * a1, norm * rho * b1)
    weight = alpha / 2 / (1 - alpha / 2)
    close(coefficients(partial(wsam, gamma=alpha / 2)), weight * rho * a1, weight * rho * b1)
    close(coefficients(partial(gradient_penalty, lam=alpha)), alpha * a1, alpha * b1)
    first = partial(gsam, alpha=alpha, minimize_fp=False)
    close(coefficients(first), 0.0, alpha * rho * b1)
    _, kept = partial(looksam, k=2)(look, {})
    close(coefficients(partial(looksam, k=2, alpha=alpha), kept), 0.0, alpha * norm)
    # GSAM's own form is exact to first order in rho only
    tiny, size = 1e-6 * float(norm / (abs(a1) + b1 + norm)), float(abs(a1) + b1)
    look.rho = tiny
    a, b = coefficients(partial(gsam, alpha=alpha))
    assert a == pytest.approx(float(tiny * a1), abs=1e-4 * tiny * size)
    assert b == pytest.approx(float((1 + alpha) * tiny * b1), abs=1e-4 * tiny * size)


@given(seed=st.integers(0, 10**6), alpha=st.floats(0.0, 2.0))
def test_gsam_leaves_what_lies_along_the_perturbed_gradient(seed, alpha):
    look = quadratic(seed)
    g = look()
    gs = look.along(g)
    d, _ = gsam(look, {}, alpha=alpha)
    torch.testing.assert_close(inner(d, gs), inner(gs, gs))
    across = reject(g, gs)
    torch.testing.assert_close(inner(d, g), inner(gs, g) - alpha * inner(across, across))


def test_gsam_along_an_eigenvector_is_sam_and_at_a_perturbed_gradient_of_zero_is_that():
    H = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    look = OnQuadratic(H, torch.tensor([2.0, 0.0], dtype=torch.float64), 0.1)
    assert_equal(gsam(look, {}, alpha=0.9)[0], plain(look, {})[0])
    look = OnQuadratic(-H, torch.tensor([0.1, 0.0], dtype=torch.float64), 0.1)
    torch.testing.assert_close(gsam(look, {})[0][0], torch.zeros(2, dtype=torch.float64))


def test_looksam_keeps_a_direction_and_where_nothing_is_across_none():
    look = quadratic()
    _, state = looksam(look, {})
    (g,), (u,) = look(), state["u"]
    assert float(u.norm()) == pytest.approx(1.0) and abs(float(u @ g)) < 1e-12 * float(g.norm())
    look.rho = 1e-17  # lost in rounding
    _, state = looksam(look, {})
    assert not state["u"][0].any()
    d, _ = looksam(look, state)
    assert_equal(d, look())
    one = OnQuadratic(torch.ones(1, 1), torch.ones(1), 0.1)  # a single parameter has no across
    assert not looksam(one, {})[1]["u"][0].any()


def test_graphsam_looks_along_the_average_that_it_keeps():
    look, state = quadratic(), {}
    gs, state = graphsam(look, state, k=3, beta=0.0)
    assert_equal(state["h"], unit(gs))  # beta = 0: the last one alone
    again, _ = graphsam(look, state, k=3, beta=0.0)
    assert_equal(again, look.along(unit(gs)))


def test_friendly_sam_and_vasso_look_along_their_averages():
    look, other = quadratic(0), quadratic(1)
    g, h = look(), other()
    _, state = friendly_sam(look, {}, lam=0.6)
    d, state = friendly_sam(other, state, sigma=0.7, lam=0.6)
    assert_equal(d, other.along([h[0] - 0.7 * g[0]]))
    torch.testing.assert_close(state["m"], [0.6 * g[0] + 0.4 * h[0]])
    _, state = vasso(look, {}, theta=0.3)
    d, state = vasso(other, state, theta=0.3)
    torch.testing.assert_close(state["d"], [0.7 * g[0] + 0.3 * h[0]])
    assert_equal(d, other.along(state["d"]))


def test_several_ascents_climb_higher_than_one_and_stay_in_the_ball():
    look = quadratic(3, rho=2.0)
    heights = []
    for k in (1, 2, 20):
        look.count = 0
        multistep(look, {}, k=k)
        heights.append(float(look.loss))
        assert look.count == 1 + k
        e = torch.linalg.solve(look.H, multistep(look, {}, k=k)[0][0]) - look.params[0]
        assert float(e.norm()) <= 2.0 * (1 + 1e-9)
    assert heights[0] < heights[1] < heights[2]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_sparse_sam_moves_the_largest_entries_by_what_sam_moves_them(sparsity):
    look = quadratic(size=20)
    (g,) = look()
    (d,), state = sparse_sam(look, {}, sparsity=sparsity, every=2)
    kept = g.abs().argsort(descending=True)[: round(20 * (1 - sparsity))]
    expected = torch.zeros_like(g)
    expected[kept] = (0.1 * g / g.norm())[kept]
    torch.testing.assert_close(d, look.H @ (look.params[0] + expected))
    look.params = [-look.params[0].roll(3)]
    _, after = sparse_sam(look, state, sparsity=sparsity, every=2)
    assert after["mask"] is state["mask"]  # until it is chosen again
    assert not torch.equal(
        sparse_sam(look, after, sparsity=sparsity, every=2)[1]["mask"][0], state["mask"][0]
    )


# --- ESAM -----------------------------------------------------------------------------------------


def test_esam_moves_a_share_of_the_tensors_by_rho_over_beta():
    moved, taken = [], 0
    model, sam = made(partial(esam, beta=0.5, gamma=1.0), make=partial(SGD, lr=0.0), extra=())
    before = copies(model.parameters())

    def losses(examples=slice(None)):
        moved.append([p.detach() - w for p, w in zip(model.parameters(), before, strict=True)])
        return losses_of(model)(examples)

    for _ in range(200):
        moved.clear()
        sam.step(losses)
        clean, epsilon = moved
        assert not any(e.any() for e in clean)
        which = [bool(e.any()) for e in epsilon]
        taken += sum(which)
        size = math.sqrt(sum(float(e.square().sum()) for e in epsilon))
        assert size == pytest.approx(0.2 / 0.5 if any(which) else 0.0, rel=1e-3)
    assert abs(taken / 800 - 0.5) < 4.5 * 0.5 / 800**0.5


@pytest.mark.parametrize(("gamma", "count"), [(0.5, 4), (0.3, 2), (0.01, 1), (0.9, 7)])
def test_esam_descends_along_the_examples_that_rise_most(gamma, count):
    """Trap: a strict comparison with the cutoff drops one of them, and may leave none."""
    model, sam = made(partial(esam, beta=1.0, gamma=gamma), extra=())
    asked, values = [], []

    def losses(examples=slice(None)):
        asked.append(examples)
        values.append(losses_of(model)(examples))
        return values[-1]

    twin = copy.deepcopy(model)
    sam.step(losses)
    assert asked[:2] == [slice(None)] * 2 and len(asked) == 3
    rise = (values[1] - values[0]).detach()
    expected = rise.argsort(descending=True)[:count].sort().values
    assert torch.equal(asked[2], expected)
    assert rise[asked[2]].mean() >= rise.mean()
    params = list(twin.parameters())
    grads = torch.autograd.grad(losses_of(twin)().mean(), params)
    with torch.no_grad():
        torch._foreach_add_(params, sam_rule(params, grads, 0.2))
    expected = torch.autograd.grad(losses_of(twin)(expected).mean(), params)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_esam_ranks_the_examples_of_one_process_only(monkeypatch):
    model, sam = made(esam, extra=())
    monkeypatch.setattr("sam_lab.sam._processes", lambda: 2)
    with pytest.raises(
        ValueError, match="esam selects among the examples of one process, and .* 2"
    ):
        sam.step(losses_of(model))
    assert sam.steps == 0


def test_a_closure_of_losses_is_their_mean_for_every_other_method_too():
    model, twin = network(), network()
    SAM(SGD(model.parameters()), 0.1).step(losses_of(model))
    SAM(SGD(twin.parameters()), 0.1).step(lambda: losses_of(twin)().mean())
    assert_equal(copies(model.parameters()), copies(twin.parameters()))


# --- the universal class --------------------------------------------------------------------------


def test_with_the_draws_at_hand_the_random_methods_are_their_formulas():
    look, rho, lam, n = quadratic(), 0.1, 0.7, 3
    H, (w,), (g,) = look.H, look.params, look()

    def drawn(rule):
        generator = torch.Generator().manual_seed(4)
        points = [rule([w], [g], rho, generator=generator)[0] for _ in range(n)]
        there = [w + e for e in points]
        return torch.stack([x @ H @ x / 2 for x in there]), torch.stack([H @ x for x in there])

    losses, grads = drawn(gaussian)
    covariance = ((losses - losses.mean())[:, None] * grads).sum(0) / (n - 1)
    expected = {
        frob_sam: g + lam / rho**2 * covariance,
        trace_sam: g + lam * (grads.mean(0) - g),
    }
    for method, direction in expected.items():
        (found,), _ = method(look, {}, lam=lam, n=n, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(found, direction)
    width = 0.3
    losses, grads = drawn(lambda *a, generator: times(width, uniform(*a, generator=generator)))
    psi = torch.exp(-(losses - w @ H @ w / 2) / rho**2 / 2)
    direction = g + lam * (psi[:, None] * (grads - g)).mean(0) / psi.mean() ** 3
    (found,), _ = det_sam(
        look, {}, lam=lam, n=n, width=width, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(found, direction)


def test_det_sam_with_one_probe_has_no_determinant_left():
    look = quadratic()
    generator = torch.Generator().manual_seed(1)
    (g,), loss = look(), None
    loss = look.loss
    (e,) = uniform(look.params, [g], 0.1 * 0.01, generator=torch.Generator().manual_seed(1))
    (ge,) = look.at([e])
    rise = (look.loss - loss) / 0.1**2
    (found,), _ = det_sam(look, {}, generator=generator)
    torch.testing.assert_close(found, g + rise.exp() * (ge - g))


@pytest.mark.parametrize("method", [trace_sam, frob_sam], ids=lambda m: m.__name__)
def test_on_a_quadratic_the_mean_over_draws_has_its_closed_form(method):
    """Frob-SAM: (I + lam H) g, USAM's with rho = lam; Trace-SAM: g, the trace is constant."""
    look, lam, generator = quadratic(size=4, rho=0.3), 0.5, torch.Generator().manual_seed(0)
    (g,) = look()
    expected = g + (lam * look.H @ g if method is frob_sam else 0)
    draws = torch.stack([method(look, {}, lam=lam, generator=generator)[0][0] for _ in range(4000)])
    error = (draws.mean(0) - expected) / (draws.std(0) / 4000**0.5)
    assert float(error.abs().max()) < 4.5
    if method is frob_sam:
        torch.testing.assert_close(look.along([g], lambda p, d, _: times(lam, d))[0], expected)


def test_frob_sams_own_term_is_there_where_the_gradient_is_zero():
    """L = x²y²/2 at y = 0: the covariance over rho² is (0, 0) + rho² (x³ + 4 x rho²) along x."""

    class OnValley(OnQuadratic):
        def at(self, epsilon, examples=None):
            x, y = self.params[0] + epsilon[0]
            self.loss = x**2 * y**2 / 2
            return [torch.stack([x * y**2, x**2 * y])]

    x, rho = 1.3, 0.3
    look = OnValley(None, torch.tensor([x, 0.0], dtype=torch.float64), rho)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [frob_sam(look, {}, lam=1.0, n=8, generator=generator)[0][0][0] for _ in range(800)]
    )
    expected = rho**2 * (x**3 + 4 * x * rho**2)
    assert abs(float(draws.mean()) - expected) < 4.5 * float(draws.std()) / 800**0.5
    assert expected > 8 * float(draws.std()) / 800**0.5


def test_probes_are_as_long_as_they_say_and_there_at_a_zero_gradient():
    w = [torch.zeros(20_000, dtype=torch.float64)]
    generator = torch.Generator().manual_seed(0)
    (z,) = gaussian(w, w, 0.5, generator=generator)
    assert float(z.std()) == pytest.approx(0.5, rel=0.03) and abs(float(z.mean())) < 0.02
    (x,) = uniform(w, w, 0.5, generator=generator)
    assert float(x.abs().max()) == pytest.approx(0.5, rel=1e-3)
    assert float(x.std()) == pytest.approx(0.5 / 3**0.5, rel=0.03)
    assert not gaussian(w, [w[0] + math.nan], 0.5, generator=generator)[0].any()


# --- radii ----------------------------------------------------------------------------------------


def test_radii_by_the_step():
    assert [every(3, 0.1)(step) for step in range(5)] == [0.1, 0.0, 0.0, 0.1, 0.0]
    draws = [bernoulli(0.3, 0.1, seed=1)(step) for step in range(2000)]
    assert draws == [bernoulli(0.3, 0.1, seed=1)(step) for step in range(2000)]
    assert draws != [bernoulli(0.3, 0.1, seed=2)(step) for step in range(2000)]
    assert abs(draws.count(0.1) / 2000 - 0.3) < 4.5 * (0.21 / 2000) ** 0.5
    assert set(draws) == {0.0, 0.1}
    assert {bernoulli(1.0, 0.1)(s) for s in range(9)} == {0.1}
    assert {bernoulli(0.0, 0.1)(s) for s in range(9)} == {0.0}


def test_a_radius_that_follows_the_learning_rate():
    """Trap: with a relative rate the radius was too large, and runs exploded (big_vision#8)."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    radius = gsam_radius(optimizer, rho_max=0.6, rho_min=0.1, lr_max=0.1, lr_min=0.02)
    for lr, rho in ((0.1, 0.6), (0.06, 0.35), (0.02, 0.1)):
        optimizer.param_groups[0]["lr"] = lr
        assert radius(0) == pytest.approx(rho)
    assert gsam_radius(optimizer, 0.6, 0.1, 0.1, 0.1)(0) == 0.6
    with pytest.raises(ValueError, match="lr_max must be at least lr_min=0.2, got 0.1"):
        gsam_radius(optimizer, 0.6, 0.1, 0.1, 0.2)


# --- precision, compilation, a real network -------------------------------------------------------


@every_method
def test_in_bfloat16_autocast_a_run_is_near_that_of_float32(name):
    method, _ = METHODS[name]
    results = []
    for enabled in (False, True):
        model, sam = made(method, extra=(), rho=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(4):
                sam.step(lambda examples=slice(None): losses_of(model)(examples))  # noqa: B023
        results.append(copies(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert p.dtype == q.dtype == torch.float32
        assert float((p - q).abs().max()) < 0.1 and q.isfinite().all()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "esam"])
def test_a_compiled_model_is_compiled_once_and_trains_as_the_plain_one(name):
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    counter = testing.CompileCounter()
    results = []
    for compiled in (False, True):
        model, sam = made(METHODS[name][0])
        run_it = torch.compile(model, backend=counter) if compiled else model
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(4):
                sam.step(lambda: (run_it(X) - Y).square().mean())  # noqa: B023
        results.append(everything(sam, model))
    torch._dynamo.reset()
    assert_equal(*results)
    assert counter.frame_count == 1


@pytest.mark.cuda
@every_method
def test_on_cuda_the_host_waits_for_nothing_in_a_step(name):
    model, x, y = network(*copy.deepcopy(NOISY)).cuda(), X.cuda(), Y.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    if name == "esam":  # draws for the host which tensors take part
        generator = torch.Generator().manual_seed(0)
    sam = SAM(
        MOMENTUM(model.parameters()), 0.1, model, method=METHODS[name][0], generator=generator
    )

    def losses(examples=slice(None)):
        return (model(x[examples]) - y[examples]).square().mean(1)

    for _ in range(3):  # libraries may wait when they are first used
        sam.step(losses)
    torch.cuda.synchronize()
    with nothing_waits():
        for _ in range(4):
            sam.step(losses)
    assert sam.steps == 7 and sam.skipped == 0


@every_method
def test_every_method_lowers_the_loss_of_a_small_network(name):
    method, _ = METHODS[name]
    model = models.mlp((3, 8, 1), "gelu", seed=0)
    sam = SAM(MOMENTUM(model.parameters()), 0.02, model, method=method, generator=torch.Generator())
    losses = [float(sam.step(losses_of(model))) for _ in range(60)]
    assert sam.skipped == 0
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_module_names_all_that_it_has():
    found = {
        name
        for name, value in vars(methods).items()
        if callable(value)
        and getattr(value, "__module__", "") == methods.__name__
        and not name.startswith("_")
    }
    assert found <= set(methods.__all__)
    assert set(methods.__all__) - found <= {"Method", "State"}
