"""A SAM step is exact and touches nothing it should not.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

import gc
import weakref
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
    length,
    loss_of,
    moved,
    network,
)
from torch import nn

import sam_lab.sam
from sam_lab import SAM
from sam_lab.perturbations import asam
from sam_lab.perturbations import sam as sam_rule

# --- rho = 0 --------------------------------------------------------------------------------------


def trained(make, rho, **options):
    """Five steps with BatchNorm and dropout; without SAM if rho is None."""
    model = network(nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer = make(model.parameters())
    if isinstance(rho, str):  # in the parameter group
        optimizer.param_groups[0]["rho"], rho = float(rho), 0.5
    sam = None if rho is None else SAM(optimizer, rho, model, **options)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(5):
            if sam is not None:
                losses.append(sam.step(loss_of(model)))
                continue
            optimizer.zero_grad()
            loss = loss_of(model)()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {
            "losses": losses,
            "model": dict(model.state_dict()),
            "optimizer": optimizer.state_dict()["state"],
            "grads": [p.grad for p in model.parameters()],
            "random": torch.get_rng_state(),
        }


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    "rho",
    [0, 0.0, lambda step: 0, "0", 1e-30],
    ids=["0", "0.0", "a function", "of the group", "1e-30"],
)
def test_at_rho_zero_the_step_is_the_optimizers_own_bit_for_bit(make, rho):
    """Trap: BatchNorm and dropout ran twice, so rho = 0 was another optimizer (davda54/sam#80).

    At 1e-30 there really are two passes, and still no difference.
    """
    assert_equal(trained(make, rho), trained(make, None))


def test_at_rho_zero_two_passes_with_two_dropout_masks_are_another_step():
    with pytest.raises(AssertionError):
        assert_equal(trained(SGD, 1e-30, same_rng=False), trained(SGD, None))


@pytest.mark.parametrize(("rho", "passes"), [(0.0, 1), (0.1, 2)])
def test_a_step_evaluates_the_closure_once_at_rho_zero_and_else_twice(rho, passes):
    model, calls = network(), []
    sam = SAM(SGD(model.parameters()), rho)
    sam.step(lambda: calls.append(0) or loss_of(model)())
    assert len(calls) == passes and sam.steps == 1


# --- what a step is -------------------------------------------------------------------------------


def test_the_optimizer_sees_the_gradient_at_the_perturbed_weights_and_stands_at_the_old_ones():
    model = network(nn.BatchNorm1d(4))
    params = list(model.parameters())
    before = copies(params)
    grads = torch.autograd.grad(loss_of(model)(), params)
    epsilon = sam_rule(params, grads, 0.3)
    with torch.no_grad():
        torch._foreach_add_(params, epsilon)
    expected = torch.autograd.grad(loss_of(model)(), params)
    with torch.no_grad():
        torch._foreach_copy_(params, before)
    seen = []
    optimizer = SGD(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append((copies(params), len(optimizer.state))))
    SAM(optimizer, 0.3, model).step(loss_of(model))
    assert_equal(seen, [(before, 0)])
    assert_equal([p.grad for p in params], list(expected))
    for p, w, g in zip(params, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * g)


def test_the_loss_returned_is_that_at_w_and_records_no_graph():
    """Trap: metrics logged from the perturbed pass."""
    model = network()
    clean = loss_of(model)().detach()
    loss = SAM(SGD(model.parameters()), 0.5).step(loss_of(model))
    assert_equal(loss, clean)
    assert loss.shape == () and not loss.requires_grad


def test_a_loss_of_exactly_zero_is_a_loss_like_any_other():
    """Trap: `if loss:` took it for a pass that had failed (composer)."""
    w = torch.tensor([1.0, -1.0], requires_grad=True)
    assert SAM(SGD([w])).step(lambda: w.sum()) == 0.0
    assert_equal(w.detach(), torch.tensor([0.9, -1.1]))


def test_a_loss_with_one_entry_is_scalar_enough():
    w = torch.ones(1, requires_grad=True)
    assert SAM(SGD([w])).step(lambda: 3 * w).shape == ()


def test_weight_decay_takes_part_in_the_step_and_not_in_the_perturbation():
    """Trap: the original has it in both, the ports do not, and none says so."""
    moved = {}
    for decay in (0.0, 0.5):
        model = network()
        sam = SAM(SGD(model.parameters(), weight_decay=decay))
        loss_of(model)().backward()
        with sam.perturbed():
            moved[decay] = copies(model.parameters())
    assert_equal(moved[0.0], moved[0.5])


def test_a_step_works_where_gradients_are_off():
    model, twin = network(), network()
    with torch.no_grad():
        SAM(SGD(model.parameters())).step(loss_of(model))
    SAM(SGD(twin.parameters())).step(loss_of(twin))
    assert_equal(copies(model.parameters()), copies(twin.parameters()))


def test_the_rule_and_its_own_arguments_are_an_argument():
    for rule in (
        partial(asam, eta=0.0),
        lambda params, grads, rho: [rho * g.sign() for g in grads],
    ):
        model = network()
        sam = SAM(SGD(model.parameters()), 0.2, rule=rule)
        loss_of(model)().backward()
        before = copies(model.parameters())
        epsilon = rule(before, [p.grad for p in model.parameters()], 0.2)
        with sam.perturbed():
            moved = copies(model.parameters())
        assert_equal(moved, [w + e for w, e in zip(before, epsilon, strict=True)])


def test_a_schedule_maps_the_steps_taken_to_the_radius():
    """A late phase of SAM: whoever takes the steps, they are counted."""
    model, asked = network(), []
    optimizer = SGD(model.parameters())

    def rho(step):
        asked.append(step)
        return 0.0 if step < 2 else 0.1 * step

    sam = SAM(optimizer, rho)
    for _ in range(2):
        sam.step(loss_of(model))
    loss_of(model)().backward()
    optimizer.step()
    assert sam.steps == 3
    before = copies(model.parameters())
    with sam.perturbed():
        assert moved(model, before) == pytest.approx(0.3, rel=1e-4)
    assert sorted(set(asked)) == [0, 1, 3]


def test_a_radius_can_be_changed_between_steps():
    model = network()
    sam = SAM(SGD(model.parameters()), 0.1)
    sam.rho = 0.4
    loss_of(model)().backward()
    before = copies(model.parameters())
    with sam.perturbed():
        distance = moved(model, before)
    assert distance == pytest.approx(0.4, rel=1e-4)
    sam.rho = -1.0
    with pytest.raises(ValueError, match=r"rho must be .* got -1.0"):
        sam.step(loss_of(model))


# --- exactly as before ----------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_the_block_weights_have_their_bits_storage_strides_and_views(failure):
    """Traps: w + e - e is not w; `p.data = old` leaves views behind; exceptions leave w + e."""
    together = torch.randn(30, generator=torch.Generator().manual_seed(0))
    conv = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    params = [
        together[:12].view(3, 4).requires_grad_(),  # two views of one storage, as in FSDP
        together[12:].view(2, 9).requires_grad_(),
        conv.contiguous(memory_format=torch.channels_last).requires_grad_(),
        torch.linspace(0.1, 0.9, 6).reshape(2, 3).t().requires_grad_(),
    ]
    row = params[2].detach()[1]
    layout = [(p.data_ptr(), p.stride(), p.storage_offset()) for p in params]
    before, kept, row_before = copies(params), together.clone(), row.clone()
    sam = SAM(SGD(params), 0.3)

    def loss():
        return sum((p**3).sum() for p in params)

    def run():
        loss().backward()
        with sam.perturbed():
            for p, w in zip(params, before, strict=True):
                assert not torch.equal(p, w)
            assert not torch.equal(together, kept) and not torch.equal(row, row_before)
            loss().backward()
            if failure is not None:
                raise failure

    for _ in range(20):
        if failure is None:
            run()
        else:
            with pytest.raises(failure):
                run()
        assert_equal(copies(params), before)
    assert_equal([together, row], [kept, row_before])
    assert [(p.data_ptr(), p.stride(), p.storage_offset()) for p in params] == layout


@pytest.mark.parametrize("where", ["rule", "copy", "half of the addition", "buffers", "pass"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_whatever_fails_and_wherever_all_is_as_before_and_the_next_step_works(
    where, error, monkeypatch
):
    """Trap: nobody else is safe from exceptions; running out of memory leaves w + e."""
    model, twin = (network(nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2))
    sam = SAM(SGD(model.parameters(), momentum=0.9), 0.3, model)
    other = SAM(SGD(twin.parameters(), momentum=0.9), 0.3, twin)
    for one, its in ((sam, model), (other, twin)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            one.step(loss_of(its))
    before, weights, calls = everything(sam, model), copies(model.parameters()), []

    def fails(*_args, **_options):
        raise error("in the middle")

    def half(tensors, others):
        tensors[0].add_(others[0])
        fails()

    def closure():
        calls.append(0)
        if where == "pass" and len(calls) == 2:
            fails()
        return (model(X) - Y).square().mean()

    with monkeypatch.context() as patch, torch.random.fork_rng():
        if where == "rule":
            sam.rule = fails
        elif where == "half of the addition":
            patch.setattr(torch, "_foreach_add_", half)
        elif where == "buffers":
            patch.setattr(sam_lab.sam, "kept_buffers", fails)
        elif where == "copy":
            clone, count = torch.Tensor.clone, iter(range(100))
            second = lambda t, **o: fails() if next(count) == 1 else clone(t, **o)  # noqa: E731
            patch.setattr(torch.Tensor, "clone", second)
        torch.manual_seed(1)
        with pytest.raises(error):
            sam.step(closure)
        left = torch.get_rng_state()
    after = everything(sam, model)
    assert_equal(copies(model.parameters()), weights)
    assert_equal(after["optimizer"], before["optimizer"])
    assert after["counts"] == before["counts"]
    sam.rule = sam_rule
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss_of(twin)()  # the clean pass had taken place
        assert_equal(torch.get_rng_state(), left)
        assert_equal(dict(model.state_dict()), dict(twin.state_dict()))
    for one, its in ((sam, model), (other, twin)):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            one.step(loss_of(its))
    assert_equal(everything(sam, model), everything(other, twin))


def test_parameters_that_overlap_in_memory_are_restored():
    together = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    one, two = together[:3].requires_grad_(), together[2:].requires_grad_()
    before = together.clone()
    sam = SAM(SGD([one, two]), 0.5)
    (one.square().sum() + two.square().sum()).backward()
    epsilon = sam_rule([one, two], [one.grad, two.grad], 0.5)
    with sam.perturbed():
        torch.testing.assert_close(together[2], before[2] + epsilon[0][2] + epsilon[1][0])
    assert_equal(together, before)


def test_a_block_in_which_no_backward_happens_leaves_no_gradient():
    model = network()
    sam = SAM(SGD(model.parameters()))
    loss_of(model)().backward()
    with sam.perturbed():
        pass
    assert all(p.grad is None for p in model.parameters())


def test_requires_grad_is_left_alone_also_where_it_changes_inside():
    """Trap: ESAM toggles requires_grad, which DistributedDataParallel does not survive."""
    model = network()
    before = copies(model.parameters())
    sam = SAM(SGD(model.parameters()), 0.3)
    loss_of(model)().backward()
    with sam.perturbed():
        model[0].weight.requires_grad_(False)
    assert_equal(copies(model.parameters()), before)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    sam.step(loss_of(model))
    assert_equal(model[0].weight.detach(), before[0])


# --- which parameters -----------------------------------------------------------------------------


def test_a_gradient_in_one_pass_only_is_no_error():
    """Traps: KeyError 'old_p' (davda54/sam#51); weights that stay perturbed; a stale epsilon."""
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    always = torch.full((2,), 2.0, requires_grad=True)
    sam = SAM(SGD([first, second, always]), 0.5)
    for _ in range(3):
        calls, held = [], copies([first, second])

        def closure():
            calls.append(copies([first, second]))  # noqa: B023
            other = first if len(calls) == 1 else second  # noqa: B023
            return (other * always).square().sum()

        sam.step(closure)
        (in_first, in_second), (moved_first, moved_second) = calls
        assert_equal([in_first, in_second, moved_second], [*held, held[1]])
        assert not torch.equal(moved_first, held[0])
        assert_equal(first.detach(), held[0])  # perturbed, restored, and no step of it
        assert first.grad is None and not torch.equal(second.detach(), held[1])


def test_frozen_parameters_are_neither_perturbed_nor_counted():
    model = network()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.full((4, 3), 100.0)  # from before it was frozen
    sam = SAM(SGD(model.parameters()), 0.3)
    frozen = model[0].weight.clone()
    assert len(sam.params) == 3 and all(p is not model[0].weight for p in sam.params)
    loss_of(model)().backward()
    before = copies(sam.params)
    with sam.perturbed():
        assert_equal(model[0].weight, nn.Parameter(frozen, requires_grad=False))
        there = copies(sam.params)
    epsilon = [p - w for p, w in zip(there, before, strict=True)]
    assert length(epsilon) == pytest.approx(0.3, rel=1e-4)


def test_tied_parameters_are_perturbed_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    sam = SAM(SGD(model.parameters()), 0.3)
    assert len(sam.params) == 3
    model(X).square().sum().backward()
    before, grads = copies(sam.params), copies(p.grad for p in sam.params)
    with sam.perturbed():
        assert model[1].weight is model[0].weight
        moved = copies(sam.params)
    epsilon = sam_rule(before, grads, 0.3)
    assert_equal(moved, [w + e for w, e in zip(before, epsilon, strict=True)])


def test_groups_have_radii_of_their_own_and_a_radius_of_zero_is_out_of_the_norm():
    a, b, c, d = (torch.full((2,), float(i), requires_grad=True) for i in range(1, 5))
    groups = [
        {"params": [a], "rho": 0.5},
        {"params": [b], "rho": 0},
        {"params": [c]},
        {"params": [d], "rho": None},
    ]
    sam = SAM(SGD(groups), 0.1)
    before = copies([a, b, c, d])
    sum(p.square().sum() for p in (a, b, c, d)).backward()
    grads = copies(p.grad for p in (a, b, c, d))
    norm = length([grads[0], grads[2], grads[3]])
    with sam.perturbed():
        for p, w, g, rho in zip((a, b, c, d), before, grads, (0.5, 0, 0.1, 0.1), strict=True):
            torch.testing.assert_close(p.detach(), w + rho * g / norm)
        assert_equal(b.detach(), before[1])


def test_only_the_groups_with_a_radius_are_perturbed_if_the_default_is_zero():
    model = network()
    groups = [
        {"params": [model[0].weight, model[2].weight], "rho": 0.5},
        {"params": [model[0].bias, model[2].bias]},
    ]
    sam = SAM(SGD(groups), 0.0)
    loss_of(model)().backward()
    before = copies(model.parameters())
    with sam.perturbed():
        moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, False]


def test_an_optimizer_with_a_rho_of_its_own_keeps_it():
    """Adadelta's rho is the decay of its averages, and no radius."""
    model = network()
    sam = SAM(torch.optim.Adadelta(model.parameters(), rho=0.9), 0.2)
    loss_of(model)().backward()
    before = copies(model.parameters())
    with sam.perturbed():
        distance = moved(model, before)
    assert distance == pytest.approx(0.2, rel=1e-4)


def test_the_groups_are_the_optimizers_own_whatever_happens_to_them():
    """Trap: groups of wrapper and base went apart, and a warm-up left lr = 0 (composer#3259)."""
    model = network()
    optimizer = SGD(model[0].parameters())
    sam = SAM(optimizer, 0.3)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.0, "rho": 0.1})
    assert len(sam.params) == 4
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    before = copies(model.parameters())
    sam.step(loss_of(model))
    assert [torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    assert sam.steps == 1
    for group in optimizer.param_groups:
        group["lr"] = group["rho"] = 0.0
    before = copies(model.parameters())
    sam.step(loss_of(model))
    assert_equal(copies(model.parameters()), before)


def test_nothing_of_sam_is_in_the_optimizers_state():
    """Trap: scratch in a shared state made AdamW skip its own initialisation."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append([*map(len, optimizer.state.values())]))
    sam = SAM(optimizer)
    for _ in range(2):
        sam.step(loss_of(model))
    assert found == [[], [3] * 4]  # step, exp_avg, exp_avg_sq


def test_an_optimizer_that_outlives_many_sams_keeps_no_hooks_of_theirs():
    """One for each epoch, say: every step would call them all."""
    model = network()
    optimizer = SGD(model.parameters())
    kept = SAM(optimizer)
    own = []
    optimizer.register_step_post_hook(lambda *_: own.append(0))
    for _ in range(20):
        SAM(optimizer).step(loss_of(model))
    gc.collect()
    assert len(optimizer._optimizer_step_post_hooks) == 2
    assert not optimizer._optimizer_step_pre_hooks
    kept.step(loss_of(model))
    assert kept.steps == len(own) == 21


def test_a_sam_keeps_no_optimizer_alive_that_is_not_its_own():
    """What removes the hook at the end holds neither of the two."""
    model = network()
    sam = SAM(SGD(model.parameters()))
    optimizer = weakref.ref(sam.optimizer)
    del sam
    gc.collect()
    assert optimizer() is None
