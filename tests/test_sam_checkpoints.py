"""Runs of SAM are saved, resumed and copied without a difference of one bit.

Docstrings that begin with "Trap" name what goes wrong in other implementations, with the public
discussion where there is one.
"""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from sam_problem import OPTIMIZERS, SGD, assert_equal, copies, everything, loss_of, network
from torch import nn

from sam_lab import SAM
from sam_lab.perturbations import asam, random_direction
from sam_lab.perturbations import sam as sam_rule


class Momentum:
    """A rule with a state: it follows the average of the gradients."""

    def __init__(self):
        self.average = None

    def __call__(self, params, grads, rho):
        if self.average is None:
            self.average = [torch.zeros_like(g) for g in grads]
        self.average = [0.5 * a + g for a, g in zip(self.average, grads, strict=True)]
        return sam_rule(params, self.average, rho)

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]


RULES = {
    "sam": lambda: sam_rule,
    "asam": lambda: partial(asam, eta=0.1),
    "random": lambda: random_direction,
    "stateful": Momentum,
}


def late(step):
    return 0.0 if step < 3 else 0.1


def run(make, rule, rho, generator=True):
    """A model with BatchNorm and dropout, and its SAM."""
    model = network(nn.BatchNorm1d(4), nn.Dropout(0.5))
    generator = torch.Generator().manual_seed(5) if generator else None
    return model, SAM(make(model.parameters()), rho, model, rule=rule(), generator=generator)


def train(model, sam, steps):
    return [sam.step(loss_of(model)) for _ in range(steps)]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("rho", [0.1, late], ids=["constant", "late"])
def test_a_run_that_was_saved_goes_on_bit_for_bit(make, rule, rho, tmp_path):
    """Traps: half a checkpoint, the base optimizer's state missing (davda54/sam#73); counters and
    generators that are in no checkpoint.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, sam = run(make, rule, rho)
        train(model, sam, 4)
        torch.save(
            {"model": model.state_dict(), "sam": sam.state_dict(), "rng": torch.get_rng_state()},
            tmp_path / "checkpoint.pt",
        )
        losses = train(model, sam, 4)

        torch.manual_seed(99)
        resumed, other = run(make, rule, rho)
        other.generator.manual_seed(99)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["sam"])
        torch.set_rng_state(state["rng"])
        assert other.steps == 4
        assert_equal(train(resumed, other, 4), losses)
    assert_equal(everything(other, resumed), everything(sam, model))
    assert_equal(other.generator.get_state(), sam.generator.get_state())


def test_settings_of_the_optimizer_and_the_count_of_skipped_steps_are_in_the_state():
    model, sam = run(SGD, RULES["sam"], 0.1)
    sam.optimizer.param_groups[0]["lr"] = 0.025
    train(model, sam, 2)
    sam.step(lambda: loss_of(model)() * float("nan"))
    _, other = run(SGD, RULES["sam"], 0.1)
    other.load_state_dict(sam.state_dict())
    assert (other.steps, other.skipped) == (2, 1)
    assert other.optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_holds_what_the_optimizer_alone_would_save_and_no_copy_of_the_model(make):
    """Trap: `old_p` and `e_w` in every checkpoint, as large as the model each."""
    model, sam = run(make, RULES["sam"], 0.1)
    train(model, sam, 2)
    alone = network(nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer = make(alone.parameters())
    loss_of(alone)().backward()
    optimizer.step()

    def shapes(state):
        return {
            i: {key: getattr(value, "shape", None) for key, value in entry.items()}
            for i, entry in state["state"].items()
        }

    state = sam.state_dict()
    assert shapes(state["optimizer"]) == shapes(optimizer.state_dict())
    assert state["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    others = [value for key, value in state.items() if key != "optimizer"]
    assert all(value is None or isinstance(value, int) or value is others[2] for value in others)
    assert_equal(others[2], sam.generator.get_state())


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def changed(key, value):
    return lambda state: {**state, key: value(state[key])}


def of_another(make, steps, **options):
    def saved(_):
        model, sam = run(make, RULES["stateful"], 0.1, **options)
        train(model, sam, steps)
        return sam.state_dict()

    return saved


def of_other_parameters(_):
    model = nn.Linear(2, 2, bias=False)
    sam = SAM(SGD(model.parameters()), rule=Momentum(), generator=torch.Generator())
    sam.rule.average = [torch.zeros(2, 2)]
    return sam.state_dict()


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda state: None, "state must have the keys .* got NoneType"),
        (without("steps"), r"must have the keys .*'steps'.* got \['generator', 'optimizer'"),
        (changed("steps", lambda steps: "many"), "many"),
        (lambda state: {**state, "epoch": 3}, "state must have the keys .* got .*'epoch'"),
        (changed("generator", lambda g: None), "state has no state of a generator, .* has one"),
        (changed("rule", lambda rule: None), "state has no state of a rule, .* has one"),
        (changed("generator", lambda g: g[:16]), "not of a generator like this one"),
        (changed("generator", lambda g: "seed 3"), "not of a generator like this one"),
        (changed("optimizer", lambda state: {}), "not of an optimizer like this AdamW"),
        (of_other_parameters, "not of an optimizer like this AdamW"),
        (of_another(OPTIMIZERS["momentum"], 0), "not of an optimizer like this AdamW"),
        (of_another(OPTIMIZERS["momentum"], 2), "not of an optimizer like this AdamW"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_is_loaded(spoilt, message):
    """Torch itself loads the state of SGD into AdamW and fails at a later step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (model, sam), (twin, other) = (
            run(OPTIMIZERS["adamw"], RULES["stateful"], late) for _ in range(2)
        )
        for one, its in ((model, sam), (twin, other)):
            torch.manual_seed(0)
            train(one, its, 4)
        state = spoilt(copy.deepcopy(sam.state_dict()))
        with pytest.raises(ValueError, match=message):
            sam.load_state_dict(state)
        assert_equal(everything(sam, model), everything(other, twin))
        assert_equal(sam.generator.get_state(), other.generator.get_state())
        for one, its in ((model, sam), (twin, other)):
            torch.manual_seed(1)
            train(one, its, 2)
    assert_equal(everything(sam, model), everything(other, twin))


@pytest.mark.parametrize(("saved", "loads"), [("generator", False), ("rule", sam_rule)])
def test_a_state_with_more_than_this_sam_has_is_refused(saved, loads):
    model, sam = run(SGD, RULES["stateful"], 0.1)
    train(model, sam, 1)
    options = {"generator": sam.generator, "rule": sam.rule, saved: loads or None}
    other = SAM(SGD(model.parameters()), rule=options["rule"], generator=options["generator"])
    with pytest.raises(ValueError, match=f"state has a state of a {saved}, .* has none"):
        other.load_state_dict(sam.state_dict())


def test_a_rule_that_refuses_its_state_leaves_all_as_it_was():
    class Strict(Momentum):
        def load_state_dict(self, state):
            if state["average"] is None:
                raise ValueError("there has to be an average")
            super().load_state_dict(state)

    model = network()
    sam = SAM(OPTIMIZERS["adamw"](model.parameters()), rule=Strict())
    empty = sam.state_dict()
    train(model, sam, 2)
    before, average = everything(sam, model), sam.rule.average
    with pytest.raises(ValueError, match="there has to be an average"):
        sam.load_state_dict(empty)
    assert_equal(everything(sam, model), before)
    assert sam.rule.average is average


# --- copies -------------------------------------------------------------------------------------


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", [RULES["asam"], RULES["random"]], ids=["asam", "random"])
def test_a_copy_trains_its_own_model_on_and_counts_its_own_steps(duplicate, make, rule):
    """Trap: a copy of a wrapper had lost its base optimizer."""
    model, sam = run(make, rule, late)
    train(model, sam, 4)
    other_model, other = duplicate((model, sam))
    assert other.model is other_model and other.optimizer is not sam.optimizer
    assert all(p is q for p, q in zip(other.params, other_model.parameters(), strict=True))
    assert_equal(everything(other, other_model), everything(sam, model))
    before = everything(sam, model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(other_model, other, 3)
    assert_equal(everything(sam, model), before)
    assert (sam.steps, other.steps) == (4, 7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train(model, sam, 3)
    assert_equal(everything(sam, model), everything(other, other_model))
    other.optimizer.step()
    assert (sam.steps, other.steps) == (7, 8)  # each step is counted once


def test_a_copy_restores_and_refuses_as_the_original_does():
    model, sam = copy.deepcopy(run(SGD, RULES["sam"], 0.1))
    loss_of(model)().backward()
    before = copies(model.parameters())
    with pytest.raises(RuntimeError, match="inside perturbed"), sam.perturbed():
        sam.optimizer.step()
    assert_equal(copies(model.parameters()), before)


def test_a_sam_that_is_gone_is_no_burden_to_its_optimizer():
    model = network()
    optimizer = SGD(model.parameters())
    gone = weakref.ref(SAM(optimizer))
    gc.collect()
    assert gone() is None
    loss_of(model)().backward()
    optimizer.step()
    kept = SAM(optimizer)
    optimizer.step()
    assert kept.steps == 1
