"""Training in phases: what each epoch runs, and that nothing but the phases tells runs apart."""

import copy
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sam_problem import SGD, assert_equal, copies
from torch import nn

from sam_lab import SAM
from sam_lab.adversarial import Threat, pgd
from sam_lab.methods import esam, graphsam, gsam, looksam, momentum_sam, vasso
from sam_lab.perturbations import asam, random_direction
from sam_lab.training import (
    Phase,
    Training,
    constant,
    cosine,
    crop_and_flip,
    descend,
    early,
    evaluate,
    late,
    squared_error,
    step_decay,
)

N, BATCH, STEPS = 20, 8, 3  # the third batch of an epoch has 4 examples
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 2, 4, 4, generator=GENERATOR)
Y = torch.randint(3, (N,), generator=GENERATOR)
MOMENTUM = partial(SGD, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def network(seed=0, dropout=0.3):
    """All that could depend on more than the weights: running statistics and random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def made(phases, optimizer=MOMENTUM, *, model=None, **options):
    options = {"batch": BATCH, "schedule": cosine, "augment": crop_and_flip(1), **options}
    return Training(network() if model is None else model, X, Y, optimizer, phases, **options)


def plain(phases, optimizer=MOMENTUM, **options):
    """Without augmentation and dropout: a loop by hand can follow."""
    model = network(dropout=0)
    return made(phases, optimizer, model=model, augment=None, **{"schedule": constant, **options})


def everything(training):
    return copy.deepcopy(training.state_dict())


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return [torch.get_rng_state(), list(random.getstate()[1]), keys, position]


class Failure(Exception):
    """What no code expects."""


# --- which epochs run what ------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("switch", [late, early])
def test_an_interval_of_epochs_is_half_open(switch, at):
    """Trap: the released code counts both ends as inside."""
    passes, done = [], []

    def counted(outputs, targets):
        passes.append(len(outputs))
        return nn.functional.cross_entropy(outputs, targets)

    training = made(switch(at, 4, rho=0.1), loss_fn=counted)
    training.run(on_epoch=lambda: done.append(len(passes)))
    with_sam = [(epoch >= at) == (switch is late) for epoch in range(4)]
    expected = [STEPS * (2 if sam else 1) for sam in with_sam]
    assert np.diff([0, *done]).tolist() == expected
    assert [row["passes"] for row in training.history] == done
    assert [row["rho"] for row in training.history] == [0.1 if sam else 0.0 for sam in with_sam]
    assert sum(passes) == sum(expected) // STEPS * N


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_every_epoch_has_the_one_phase_whose_interval_it_is_in(lengths):
    ends = list(itertools.accumulate(lengths))
    phases = [
        Phase(stop - length, stop, rho=i)
        for i, (stop, length) in enumerate(zip(ends, lengths, strict=True))
    ]
    training = made(phases)
    assert training.epochs == sum(lengths)
    for epoch in range(training.epochs):
        (phase,) = [phase for phase in phases if phase.start <= epoch < phase.stop]
        assert training.phase(epoch) is phase


def test_a_switch_at_either_end_is_none():
    assert late(4, 4, rho=0.1) == early(0, 4, rho=0.1) == (Phase(0, 4),)
    assert late(0, 4, rho=0.1) == early(4, 4, rho=0.1) == (Phase(0, 4, rho=0.1),)
    rule = random_direction
    assert late(1, 4, rho=0.1, rule=rule) == (Phase(0, 1), Phase(1, 4, 0.1, rule))
    assert early(1, 4, rho=0.1, rule=rule) == (Phase(0, 1, 0.1, rule), Phase(1, 4))


def test_the_rule_of_a_phase_is_the_one_that_perturbs():
    weights = []
    for rule in (partial(asam, eta=0.0), random_direction):
        training = made([Phase(0, 1, 0.5, rule)]).run()
        weights.append(copies(training.model.parameters()))
    assert not torch.equal(weights[0][0], weights[1][0])


def test_running_in_parts_is_running():
    whole = made(late(2, 4, rho=0.1)).run()
    parts = made(late(2, 4, rho=0.1))
    for until in (1, 1, 3, 2, None, None):
        assert parts.run(until) is parts
    assert_equal(everything(parts), everything(whole))
    assert parts.epoch == parts.epochs == len(parts.history) == 4


def test_steps_and_epochs_are_called_back_after_each():
    calls = []
    training = made(late(1, 2, rho=0.1))

    def on_step():
        assert all(module.training for module in training.model.modules())
        calls.append(training.epoch)

    training.run(on_step=on_step, on_epoch=lambda: calls.append(f"{training.epoch} done"))
    assert calls == [0, 0, 0, "1 done", 1, 1, 1, "2 done"]


def test_every_epoch_is_in_training_mode_whatever_measurements_leave_behind():
    training = made([Phase(0, 3)])
    training.model.eval()
    training.run(on_epoch=training.model.eval)
    assert_equal(everything(training), everything(made([Phase(0, 3)]).run()))


# --- against loops by hand ------------------------------------------------------------------------


def followed(training):
    """Run it; the batches of its steps as indices, an epoch a list."""
    labels, epochs, seen = training.y, [], []
    loss_fn = training.loss_fn
    training.y = torch.arange(N)

    def noted(outputs, indices):
        seen.append(indices)
        return loss_fn(outputs, labels[indices])

    def close():
        passes = 2 if training.history[-1]["rho"] else 1
        assert all(torch.equal(seen[i], seen[i - i % passes]) for i in range(len(seen)))
        epochs.append(seen[::passes])
        seen.clear()

    training.loss_fn = noted
    training.run(on_epoch=close)
    return epochs


def test_an_epoch_takes_every_example_once_in_an_order_of_its_own():
    orders = [
        torch.cat(epoch).tolist()
        for seed in (0, 1)
        for epoch in followed(plain([Phase(0, 3)], seed=seed))
    ]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert [len(part) for part in followed(plain([Phase(0, 1)]))[0]] == [8, 8, 4]


def test_runs_of_one_seed_take_the_examples_in_the_same_order_whatever_else_they_do():
    sgd = followed(plain([Phase(0, 3)]))
    assert_equal(followed(plain(early(1, 3, rho=0.1))), sgd)
    assert_equal(followed(plain([Phase(0, 3, 0.1, random_direction)], ADAMW)), sgd)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
@pytest.mark.parametrize("phases", [[Phase(0, 3)], [Phase(0, 1), Phase(1, 3)]])
def test_without_sam_it_is_a_plain_loop_bit_for_bit(optimizer, phases):
    """Momentum that is carried: a boundary between like phases is none."""
    training = plain(phases, optimizer, schedule=cosine)
    model = copy.deepcopy(training.model)
    own = optimizer(model.parameters())
    lr = own.param_groups[0]["lr"]
    means = []
    for epoch, batches in enumerate(followed(training)):
        own.param_groups[0]["lr"] = lr * cosine(epoch / 3)
        losses = []
        for batch in batches:
            own.zero_grad()
            loss = nn.functional.cross_entropy(model(X[batch]), Y[batch])
            loss.backward()
            own.step()
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
    assert_equal(dict(training.model.state_dict()), dict(model.state_dict()))
    assert_equal(training.optimizer.state_dict(), own.state_dict())
    assert [row["loss"] for row in training.history] == means


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(
    "phases",
    [
        late(2, 4, rho=0.1),
        early(2, 4, rho=0.1),
        [Phase(0, 1), Phase(1, 2), Phase(2, 4)],  # boundaries between like phases are ones too
    ],
    ids=["late", "early", "sgd"],
)
def test_momentum_is_carried_or_each_phase_has_an_optimizer_of_its_own(phases, carry):
    """The released code has two optimizers on the same parameters."""
    training = plain(phases, carry=carry)
    model = copy.deepcopy(training.model)
    epochs = iter(followed(training))
    own = MOMENTUM(model.parameters())
    for phase in phases:
        if not carry:
            own = MOMENTUM(model.parameters())
        sam = SAM(own, phase.rho, model)
        for batches in itertools.islice(epochs, phase.stop - phase.start):
            for batch in batches:
                sam.step(lambda i=batch: nn.functional.cross_entropy(model(X[i]), Y[i]))
    assert_equal(dict(training.model.state_dict()), dict(model.state_dict()))
    assert_equal(training.optimizer.state_dict()["state"], own.state_dict()["state"])


def test_whether_momentum_is_carried_makes_a_difference_only_from_the_boundary_on():
    carried, emptied = (plain(late(2, 4, rho=0.1), carry=carry) for carry in (True, False))
    assert_equal(everything(carried.run(until=2)), everything(emptied.run(until=2)))
    weights = [training.run().model[0].weight for training in (carried, emptied)]
    assert not torch.equal(*weights)


def test_an_optimizer_whose_state_is_never_empty_can_begin_anew():
    """Adagrad makes its state where it is made, and fails without."""
    adagrad = partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5)
    training = plain([Phase(0, 1), Phase(1, 2)], adagrad, carry=False).run()
    assert all(state["step"] == STEPS for state in training.optimizer.state.values())


# --- branches -------------------------------------------------------------------------------------

late_random = partial(late, rule=random_direction)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("switch", [late, early, late_random], ids=["late", "early", "random"])
def test_a_branch_is_the_run_that_had_these_phases_from_the_beginning(switch, carry):
    trunk = made(switch(5, 5, rho=0.1), carry=carry)
    for at in (1, 3):
        trunk.run(until=at)
        branch = trunk.branch(switch(at, 5, rho=0.1)).run()
        direct = made(switch(at, 5, rho=0.1), carry=carry).run()
        assert_equal(everything(branch), everything(direct))
    assert_equal(everything(trunk.run()), everything(made(switch(5, 5, rho=0.1)).run()))


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
def test_a_trunk_is_untouched_by_its_branches_and_they_by_it(optimizer):
    trunk = made([Phase(0, 4)], optimizer).run(until=2)
    before = everything(trunk)
    branch = trunk.branch(late(2, 4, rho=0.1))
    assert_equal(everything(branch), before)
    for _ in range(2):  # in turn
        branch.run(branch.epoch + 1)
        assert trunk.epoch == 2
        assert_equal(everything(trunk), before)
    after = everything(branch)
    trunk.run()
    assert_equal(everything(branch), after)
    assert_equal(everything(trunk), everything(made([Phase(0, 4)], optimizer).run()))


def test_a_branch_of_a_branch_is_one():
    trunk = made([Phase(0, 4)]).run(until=1)
    branch = trunk.branch(late(1, 4, rho=0.1)).run(until=2)
    last = branch.branch([Phase(0, 1), Phase(1, 2, 0.1), Phase(2, 4, 0.3)]).run()
    direct = made([Phase(0, 1), Phase(1, 2, 0.1), Phase(2, 4, 0.3)]).run()
    assert_equal(everything(last), everything(direct))


def test_a_branch_keeps_how_its_tensors_lie_in_memory():
    model = network().to(memory_format=torch.channels_last)
    branch = made([Phase(0, 2)], model=model).run(1).branch([Phase(0, 2)])
    momentum = branch.optimizer.state[branch.model[0].weight]["momentum_buffer"]
    assert branch.model[0].weight.stride() == momentum.stride() == model[0].weight.stride()
    assert not momentum.is_contiguous()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (late(1, 4, rho=0.1), r"epoch 1 with lr 0.1, rho 0, .* have lr 0.1, rho 0.1,"),
        (late(3, 8, rho=0.1), r"epoch 2 with lr 0.05, rho 0, .* have lr 0.1, rho 0,"),
    ],
    ids=["other phases", "other lengths of the schedule"],
)
def test_a_branch_has_the_past_that_it_comes_from(phases, message):
    trunk = plain(late(4, 4, rho=0.1), schedule=step_decay({0.5: 0.5})).run(3)
    with pytest.raises(ValueError, match=message):
        trunk.branch(phases)


def test_a_branch_that_would_have_ended_already_is_refused():
    trunk = plain([Phase(0, 4)]).run(until=3)
    with pytest.raises(ValueError, match="state has 3 epochs done, and the phases end at 2"):
        trunk.branch(late(1, 2, rho=0.1))
    assert trunk.branch([Phase(0, 3)]).run().epoch == 3


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
@pytest.mark.parametrize("carry", [True, False])
def test_a_checkpoint_goes_on_in_a_fresh_training_bit_for_bit(optimizer, carry, tmp_path):
    phases = [Phase(0, 2), Phase(2, 4, 0.1, random_direction)]
    training = made(phases, optimizer, carry=carry)
    training.run(on_epoch=lambda: training.save(tmp_path / f"{training.epoch}.pt"))
    for epoch in (1, 2, 3, 4):
        fresh = made(phases, optimizer, carry=carry, model=network(seed=9))
        assert fresh.load(tmp_path / f"{epoch}.pt") is fresh
        assert fresh.epoch == epoch
        assert_equal(everything(fresh.run()), everything(training))


def parts(training):
    """What a training has, the state of its method by the side."""
    state = everything(training)
    method = state.pop("method", {"name": None, "state": {}})
    return state, method["name"], method["state"]


def assert_same(one, other):
    (a, name, kept), (b, other_name, other_kept) = parts(one), parts(other)
    assert name == other_name
    assert_equal((a, kept), (b, other_kept))


PER_EXAMPLE = nn.CrossEntropyLoss(reduction="none")
METHODS = {
    "gsam": gsam,
    "momentum_sam": momentum_sam,
    "vasso": partial(vasso, theta=0.3),
    "looksam": partial(looksam, k=4),
    "graphsam": partial(graphsam, k=5, beta=0.5),
    "esam": esam,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_phase_with_a_method_goes_on_in_a_fresh_training_and_in_a_branch(name, tmp_path):
    """With three steps an epoch and a look around every fourth, the counter has to be saved."""
    phases = [Phase(0, 1), Phase(1, 4, 0.1, method=METHODS[name]), Phase(4, 5)]
    training = made(phases, loss_fn=PER_EXAMPLE)
    training.run(on_epoch=lambda: training.save(tmp_path / f"{training.epoch}.pt"))
    for epoch in (1, 2, 3, 4):
        fresh = made(phases, model=network(seed=9), loss_fn=PER_EXAMPLE)
        fresh.load(tmp_path / f"{epoch}.pt")
        assert_same(fresh.run(), training)
    trunk = made(phases, loss_fn=PER_EXAMPLE).run(2)
    before = parts(trunk)
    assert_same(trunk.branch(phases).run(), training)
    assert_equal((parts(trunk)[0], parts(trunk)[2]), (before[0], before[2]))
    state = torch.load(tmp_path / "3.pt", weights_only=True)
    assert ("method" in state) == (name in ("vasso", "looksam", "graphsam"))
    assert "method" not in torch.load(tmp_path / "5.pt", weights_only=True)


def test_a_method_ends_with_its_phase_and_begins_anew_in_the_next():
    how = {"rho": 0.1, "method": METHODS["looksam"]}
    passes = []
    for phases in ([Phase(0, 4, **how)], [Phase(0, 1, **how), Phase(1, 4, **how)]):
        training = made(phases).run()
        passes.append(np.diff([0.0, *(row["passes"] for row in training.history)]).tolist())
    # twelve steps of which each fourth has two passes, counted from the start of the phase
    assert passes == [[4.0, 4.0, 4.0, 3.0], [4.0, 4.0, 4.0, 4.0]]


def test_an_epoch_that_fails_leaves_the_method_as_it_was():
    training = made([Phase(0, 3, 0.1, method=METHODS["vasso"])]).run(1)
    before = parts(training)
    fails = iter([False, True])

    def on_step():
        if next(fails):
            raise Failure

    with pytest.raises(Failure):
        training.run(on_step=on_step)
    assert_equal((parts(training)[0], parts(training)[2]), (before[0], before[2]))


def test_the_state_of_another_method_is_refused_where_the_phase_goes_on():
    state = made([Phase(0, 3, 0.1, method=METHODS["vasso"])]).run(1).state_dict()
    other = made([Phase(0, 3, 0.1, method=METHODS["looksam"])])
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="state is of the method vasso, and this SAM has looksam"):
        other.run()
    assert other.epoch == 1


def test_a_method_that_selects_examples_needs_their_losses():
    with pytest.raises(ValueError, match="the method esam selects examples"):
        made([Phase(0, 1, 0.1, method=esam)]).run()


def test_a_checkpoint_is_readable_as_weights_only_and_holds_the_state(tmp_path):
    training = made(late(1, 2, rho=0.1)).run()
    training.save(str(tmp_path / "c.pt"))
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert_equal({**state, "model": dict(state["model"])}, {**everything(training)})


def test_a_file_that_could_run_code_is_not_read(tmp_path):
    torch.save({**made([Phase(0, 1)]).state_dict(), "history": [Failure()]}, tmp_path / "c.pt")
    with pytest.raises(pickle.UnpicklingError, match="Failure"):
        made([Phase(0, 1)]).load(tmp_path / "c.pt")


@pytest.mark.parametrize("place", ["torch.save", "os.replace"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(place, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    training = made([Phase(0, 3)]).run(1)
    training.save(path)
    before = path.read_bytes()
    training.run(2)

    def fail(what, where, *_):
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    def refuse(*_):
        raise OSError("not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail if place == "torch.save" else refuse)
        with pytest.raises(OSError):
            training.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]
    assert path.read_bytes() == before
    assert made([Phase(0, 3)]).load(path).epoch == 1


KILLED = """
import sys
from test_training import made
from sam_lab.training import late

training = made(late(2, 5, rho=0.1))
steps = 0

def on_step():
    global steps
    steps += 1
    if steps == 8:
        print("here", flush=True)
        sys.stdin.read()  # for the end

training.run(on_step=on_step, on_epoch=lambda: training.save(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_a_training_that_is_killed_in_an_epoch_goes_on_from_its_last_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    command = [sys.executable, "-W", "error", "-c", KILLED, str(path)]
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        said = process.stdout.readline()
        process.kill()
        assert said == "here\n", process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    training = made(late(2, 5, rho=0.1), model=network(seed=9)).load(path)
    assert training.epoch == 2
    assert_equal(everything(training.run()), everything(made(late(2, 5, rho=0.1)).run()))


@pytest.mark.parametrize("take", ["state_dict", "save", "branch"])
def test_in_the_middle_of_an_epoch_there_is_no_state_to_take(take, tmp_path):
    training = made([Phase(0, 2)])
    arguments = {"state_dict": (), "save": (tmp_path / "c.pt",), "branch": ([Phase(0, 2)],)}[take]
    with pytest.raises(RuntimeError, match="epoch 0 is not done, .* from on_epoch"):
        training.run(on_step=lambda: getattr(training, take)(*arguments))
    assert not list(tmp_path.iterdir())
    training.run(on_epoch=lambda: getattr(training, take)(*arguments))


# --- states that do not fit -----------------------------------------------------------------------


def other(**changes):
    return lambda state: {**state, **changes}


def model_of(layer):
    return made([Phase(0, 3)], model=nn.Sequential(nn.Flatten(), layer)).run(1).state_dict()


STRANGE = {
    "no mapping": (lambda state: [state], "state must have the keys .*, got list"),
    "no history": (
        lambda state: {name: state[name] for name in state if name != "history"},
        r"state must have the keys .*, got \['draws', 'epoch', 'model', 'optimizer'\]",
    ),
    "another seed": (
        lambda _: made([Phase(0, 3)], seed=7).state_dict(),
        "state is of a training with .*'seed': 7.*, this one has .*'seed': 0",
    ),
    "another batch size": (
        lambda _: made([Phase(0, 3)], batch=5).state_dict(),
        "'batch': 5.*, this one has .*'batch': 8",
    ),
    "more examples": (
        other(draws={"seed": 0, "batch": 8, "examples": 21}),
        "'examples': 21}, this one has .*'examples': 20",
    ),
    "a later epoch": (other(epoch=4), "state has 4 epochs done, and the phases end at 3"),
    "an epoch below 0": (other(epoch=-1), "epoch of the state must be an integer .* got -1"),
    "an epoch that is none": (other(epoch="1"), "epoch of the state must be .* got '1'"),
    "other layers": (
        lambda state: {**state, "model": model_of(nn.Linear(32, 3))["model"]},
        "(?s)state is of another model or optimizer: .*0.weight",
    ),
    "other shapes": (
        lambda state: {**state, "model": {**state["model"], "5.weight": torch.ones(3, 2)}},
        r"(?s)state is of another model or optimizer: .*size mismatch.*\[3, 2\]",
    ),
    "another optimizer": (
        lambda _: made([Phase(0, 3)], partial(torch.optim.AdamW, lr=0.1)).run(1).state_dict(),
        "state is of another model or optimizer: state is not of an optimizer like this SGD",
    ),
    "an optimizer of fewer parameters": (
        lambda state: {**state, "optimizer": model_of(nn.Linear(32, 3))["optimizer"]},
        "state is of another model or optimizer: .*parameter group",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    change, message = STRANGE[name]
    training = made([Phase(0, 3)]).run(1)
    # all entries of the model's state would be new, up to the one that does not fit
    state = change(copy.deepcopy(made([Phase(0, 3)]).run(2).state_dict()))
    before = everything(training)
    with pytest.raises((TypeError, ValueError), match=message):
        training.load_state_dict(state)
    assert_equal(everything(training), before)
    assert_equal(everything(training.run()), everything(made([Phase(0, 3)]).run()))


def test_two_trainings_may_go_on_from_one_state():
    """Trap: torch's optimizers keep the tensors of the state they are given."""
    first = made([Phase(0, 3)]).run(1)
    state = everything(first)
    second = made([Phase(0, 3)], model=network(seed=9))
    second.load_state_dict(first.state_dict())
    second.run()
    assert_equal(everything(first), state)
    assert_equal(everything(first.run()), everything(second))


# --- exceptions in the middle ---------------------------------------------------------------------


def failing_at(call, error, function):
    """The function, failing once, at this call."""
    calls = itertools.count(1)

    def called(*arguments):
        if next(calls) == call:
            raise error
        return function(*arguments)

    return called


@pytest.mark.parametrize("error", [Failure(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
@pytest.mark.parametrize("where", ["step", "loss", "perturbed", "augment", "optimizer", "schedule"])
def test_an_exception_in_an_epoch_leaves_the_training_as_before_it(where, optimizer, error):
    """Epoch 3 is the second of SAM: momentum, running statistics and generators are in use."""
    phases = [Phase(0, 2), Phase(2, 5, 0.1, random_direction)]
    training = made(phases, optimizer).run(until=3)
    before, outside = everything(training), random_states()
    options = {}
    if where == "step":
        options["on_step"] = failing_at(2, error, lambda: None)
    elif where in ("loss", "perturbed"):
        training.loss_fn = failing_at(3 if where == "loss" else 4, error, training.loss_fn)
    elif where == "augment":
        training.augment = failing_at(2, error, training.augment)
    elif where == "schedule":
        training.schedule = failing_at(1, error, training.schedule)
    else:
        hook = failing_at(2, error, lambda *_: None)
        training.optimizer.register_step_post_hook(hook)
    with pytest.raises(type(error)):
        training.run(**options)
    assert_equal(everything(training), before)
    assert_equal(random_states(), outside)
    assert_equal(everything(training.run()), everything(made(phases, optimizer).run()))


def test_an_exception_after_an_epoch_keeps_it():
    training = made([Phase(0, 3)])
    with pytest.raises(Failure):
        training.run(on_epoch=failing_at(2, Failure(), lambda: None))
    assert training.epoch == len(training.history) == 2
    assert_equal(everything(training.run()), everything(made([Phase(0, 3)]).run()))


def test_a_phase_that_was_left_in_its_first_epoch_begins_with_an_empty_state_again():
    training = made(late(2, 3, rho=0.1), carry=False).run(2)
    momentum = copies(state["momentum_buffer"] for state in training.optimizer.state.values())
    with pytest.raises(Failure):
        training.run(on_step=failing_at(2, Failure(), lambda: None))
    restored = [state["momentum_buffer"] for state in training.optimizer.state.values()]
    assert_equal(copies(restored), momentum)
    direct = made(late(2, 3, rho=0.1), carry=False).run()
    assert_equal(everything(training.run()), everything(direct))


# --- attacked examples ----------------------------------------------------------------------------

CUBE = Threat("linf", 0.1, -10, 10)  # the inputs here are Gaussian
attack = partial(pgd, threat=CUBE, steps=2)


def test_adversarial_training_can_be_late_or_early_and_together_with_sam():
    assert late(1, 4, attack=attack) == (Phase(0, 1), Phase(1, 4, attack=attack))
    both = Phase(0, 1, rho=0.1, attack=attack)
    assert early(1, 4, rho=0.1, attack=attack) == (both, Phase(1, 4))


@pytest.mark.parametrize(
    ("options", "of_attack"),
    [({"steps": 1}, 1), ({"steps": 7}, 7), ({"steps": 3, "restarts": 2}, 2 * (3 + 1))],
)
def test_an_attack_costs_its_own_passes_once_whether_or_not_sam_needs_two(options, of_attack):
    """Trap: attacked anew for each pass of SAM it would be 2K + 2, and another loss in each."""
    phases = [Phase(0, 1), Phase(1, 2, attack=partial(attack, **options))]
    phases += [Phase(2, 3, 0.1), Phase(3, 4, 0.1, attack=partial(attack, **options))]
    training, counted = made(phases), []
    training.model.register_forward_hook(lambda *_: counted.append(training.epoch))
    training.run()
    each = [1, of_attack + 1, 2, of_attack + 2]
    assert [row["attacked"] for row in training.history] == [0, 1, 0, 1]
    assert [row["passes"] for row in training.history] == np.cumsum(each).dot(STEPS).tolist()
    assert [counted.count(epoch) / STEPS for epoch in range(4)] == each
    assert len(training.model._forward_hooks) == 1


def test_each_batch_is_attacked_once_and_all_passes_of_its_step_see_the_same():
    attacks, seen = [], []

    def noted(model, x, y, generator):
        assert generator is training._generator
        x_adv = attack(model, x, y, generator=generator)
        assert (x_adv - x).abs().amax((1, 2, 3)) == pytest.approx(0.1, rel=1e-4)
        attacks.append(x_adv)
        seen.clear()
        return x_adv

    def check():
        assert len(seen) == 2
        assert all(torch.equal(x, attacks[-1]) for x in seen)

    training = plain([Phase(0, 2, 0.1, attack=noted)])
    training.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    training.run(on_step=check)
    assert [len(x_adv) for x_adv in attacks] == [8, 8, 4] * 2


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_an_attack_of_no_strength_trains_as_none_bit_for_bit(rho):
    """Its passes leave running statistics, gradients, random numbers and modes alone."""
    none = partial(pgd, threat=Threat("linf", 0.0, -10, 10), random_start=False, restarts=2)
    attacked, expected = (made([Phase(0, 3, rho, attack=a)]).run() for a in (none, None))
    assert_equal(dict(attacked.model.state_dict()), dict(expected.model.state_dict()))
    assert_equal(attacked.optimizer.state_dict(), expected.optimizer.state_dict())
    assert [row["loss"] for row in attacked.history] == [row["loss"] for row in expected.history]


def test_an_attack_makes_a_difference_from_its_first_epoch_on():
    trained, expected = made(late(2, 4, attack=attack)), made([Phase(0, 4)])
    same = [everything(training.run(2))["model"] for training in (trained, expected)]
    assert_equal(*map(dict, same))
    other = [everything(training.run(3))["model"] for training in (trained, expected)]
    assert not torch.equal(other[0]["0.weight"], other[1]["0.weight"])
    assert trained.history[2]["loss"] > expected.history[2]["loss"]


@pytest.mark.parametrize("how", [{}, {"rho": 0.1}, {"rho": 0.1, "rule": random_direction}])
@pytest.mark.parametrize("switch", [late, early])
def test_an_attacked_run_with_random_starts_can_be_branched_and_resumed(switch, how, tmp_path):
    how = {"attack": attack, **how}
    direct = made(switch(2, 4, **how)).run()
    trunk = made(switch(4, 4, **how))
    for at in (1, 2):
        trunk.run(at)
        branch = trunk.branch(switch(at, 4, **how)).run()
        assert_equal(everything(branch), everything(made(switch(at, 4, **how)).run()))
    interrupted = made(switch(2, 4, **how))
    interrupted.run(on_epoch=lambda: interrupted.save(tmp_path / f"{interrupted.epoch}.pt"))
    for epoch in (1, 3):
        fresh = made(switch(2, 4, **how), model=network(seed=9)).load(tmp_path / f"{epoch}.pt")
        assert_equal(everything(fresh.run()), everything(direct))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (attack, None, "epoch 0 with .*attacked 1, where phases .* attacked 0"),
        (None, attack, "epoch 0 with .*attacked 0, where phases .* attacked 1"),
    ],
)
def test_a_past_with_an_attack_is_another_than_one_without(before, after, message):
    training = made([Phase(0, 3, attack=before)]).run(1)
    other = made([Phase(0, 3, attack=after)])
    state = everything(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(training.state_dict())
    assert_equal(everything(other), state)
    with pytest.raises(ValueError, match=message):
        training.branch([Phase(0, 3, attack=after)])


@pytest.mark.parametrize("error", [Failure(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("inside", [False, True], ids=["attack", "model in the attack"])
def test_an_exception_in_an_attack_leaves_the_training_as_before_the_epoch(inside, error):
    def loss_fn(outputs, y):
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    def phases(attack):
        return late(1, 4, rho=0.1, attack=attack)

    direct = made(phases(attack)).run()
    if inside:  # an epoch calls it six times
        failing = partial(attack, loss_fn=failing_at(STEPS * 2 + 4, error, loss_fn))
    else:
        once = failing_at(STEPS + 2, error, lambda: None)

        def failing(model, x, y, generator):
            once()
            return attack(model, x, y, generator=generator)

    training = made(phases(failing)).run(2)
    before, outside = everything(training), random_states()
    with pytest.raises(type(error)):
        training.run()
    assert_equal(everything(training), before)
    assert_equal(random_states(), outside)
    assert not training.model._forward_hooks
    assert_equal(everything(training.run()), everything(direct))


def test_examples_outside_the_box_stop_the_epoch_with_a_hint_and_leave_the_training_as_it_was():
    training = made(late(1, 3, attack=partial(pgd, threat=0.1))).run(1)
    before = everything(training)
    with pytest.raises(ValueError, match=r"x must lie in the box \[0.0, 1.0\].*Normalize"):
        training.run()
    assert_equal(everything(training), before)


# --- in bfloat16 ----------------------------------------------------------------------------------


def in_bfloat16(phases):
    """A training whose passes are in bfloat16, and the dtypes that its layers gave."""
    training, seen = made(phases, autocast=torch.bfloat16), set()
    for layer in training.model:
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
    return training.run(), seen


@pytest.mark.parametrize("how", [{}, {"rho": 0.1}, {"attack": attack}], ids=["sgd", "sam", "at"])
def test_autocast_computes_the_passes_and_leaves_what_is_kept_in_float32(how):
    training, seen = in_bfloat16([Phase(0, 2, **how)])
    assert seen == {torch.bfloat16}
    kept = [*training.model.parameters(), *training.model.buffers()]
    kept += [t for state in training.optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
    whole = made([Phase(0, 2, **how)]).run()
    for one, two in zip(training.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)
        assert not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "bfloat16"])
def test_autocast_is_to_bfloat16(dtype):
    with pytest.raises(
        ValueError, match=r"autocast must be None or torch.bfloat16 .*, got .*16|32"
    ):
        made([Phase(0, 1)], autocast=dtype)


def test_without_autocast_a_block_around_the_run_is_in_force():
    training, seen = made([Phase(0, 1)]), set()
    training.model[0].register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        training.run()
    assert seen == {torch.bfloat16}


# --- random numbers -------------------------------------------------------------------------------


def test_training_leaves_the_global_random_numbers_alone_and_they_leave_it_alone():
    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            before = random_states()
            training = made([Phase(0, 1), Phase(1, 3, 0.1, random_direction)]).run(2)
            training.branch(training.phases).run()
            ends.append(everything(training.run()))
            assert_equal(random_states(), before)
    assert_equal(*ends)


def test_an_augmentation_may_draw_from_any_global_generator():
    """Trap: those of Python and NumPy gave the same numbers in every epoch, or others each time."""
    drawn = []

    def noise(x, generator):
        numbers = [random.random(), np.random.random(), float(torch.rand(()))]
        numbers.append(float(torch.rand((), generator=generator)))
        drawn.append(numbers)
        return x + sum(numbers)

    whole = made([Phase(0, 4)], augment=noise).run()
    assert all(len(set(column)) == len(drawn) == 4 * STEPS for column in zip(*drawn, strict=True))
    half = made([Phase(0, 4)], augment=noise).run(2)
    random.random(), np.random.random(), torch.rand(())
    assert_equal(everything(half.branch([Phase(0, 4)]).run()), everything(whole))
    assert drawn[: 4 * STEPS] == drawn[4 * STEPS :]


def test_the_seed_decides():
    first, again, third = (made([Phase(0, 2)], seed=seed).run() for seed in (3, 3, 4))
    assert_equal(everything(first), everything(again))
    assert not torch.equal(first.model[0].weight, third.model[0].weight)


# --- schedules ------------------------------------------------------------------------------------


def rates(phases, schedule, optimizer=MOMENTUM):
    """The learning rates with which each epoch steps, a group each, and those of the history."""
    used = []
    training = plain(phases, optimizer, schedule=schedule, batch=N)
    training.run(on_step=lambda: used.append([g["lr"] for g in training.optimizer.param_groups]))
    return used, [row["lr"] for row in training.history]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (constant, [1.0] * 10),
        (cosine, [0.5 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)]),
        (step_decay({0.6: 0.04, 0.3: 0.2}), [1.0] * 3 + [0.2] * 3 + [0.04] * 4),
        (step_decay({0.7: 0.5}), [1.0] * 7 + [0.5] * 3),
        (step_decay({0: 0.5, 1: 0.1}), [0.5] * 10),
        (step_decay({}), [1.0] * 10),
    ],
)
def test_a_schedule_is_one_across_all_phases(schedule, factors):
    for phases in (late(10, 10, rho=0.1), late(7, 10, rho=0.1), early(3, 10, rho=0.1)):
        used, noted = rates(phases, schedule)
        assert used == [[pytest.approx(0.1 * factor)] for factor in factors]
        assert noted == [lr for (lr,) in used]


def test_groups_keep_the_ratio_of_their_learning_rates():
    def grouped(params):
        first, *rest = params
        return torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": rest}], lr=0.1)

    used, noted = rates([Phase(0, 4)], step_decay({0.5: 0.1}), grouped)
    assert used == [[pytest.approx(lr), pytest.approx(lr / 10)] for lr in (1.0, 1.0, 0.1, 0.1)]
    assert noted == [lr for lr, _ in used]


@given(
    st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.integers(0, 1000),
)
def test_a_step_is_at_the_epoch_that_exact_arithmetic_says(epoch_of, share):
    epochs, epoch = epoch_of
    lowered = Fraction(epoch, epochs) >= Fraction(share, 1000)
    assert step_decay({share / 1000: 0.5})(epoch / epochs) == (0.5 if lowered else 1.0)


@given(st.integers(1, 1000), st.data())
def test_a_step_at_a_share_of_the_epochs_is_at_that_epoch(epochs, data):
    at = data.draw(st.integers(0, epochs - 1))
    epoch = data.draw(st.integers(0, epochs - 1))
    assert step_decay({at / epochs: 0.5})(epoch / epochs) == (0.5 if epoch >= at else 1.0)


def test_a_step_may_be_at_a_share_with_a_rounding_error():
    assert 1 - 0.7 > 0.3
    assert [step_decay({1 - 0.7: 0.5})(epoch / 10) for epoch in (2, 3)] == [1.0, 0.5]


# --- bad arguments --------------------------------------------------------------------------------


def training_of(**changes):
    arguments = {
        "model": network(),
        "x": X,
        "y": Y,
        "optimizer": MOMENTUM,
        "phases": [Phase(0, 2)],
        **changes,
    }
    return Training(**arguments)


def elsewhere(_):
    return SGD(network().parameters())


WRONG = {
    "start": (lambda: Phase(-1, 2), "start must be an integer of at least 0, got -1"),
    "start that is no number": (lambda: Phase("0", 2), "start must be an integer .* got '0'"),
    "stop": (lambda: Phase(2, 2), "stop must be an integer of at least 3, got 2"),
    "half an epoch": (lambda: Phase(0, 2.5), "stop must be an integer .* got 2.5"),
    "rho below 0": (lambda: Phase(0, 1, -0.1), "rho must be a finite number .* got -0.1"),
    "rho infinite": (lambda: Phase(0, 1, math.inf), "rho must be .* got inf"),
    "rho nan": (lambda: Phase(0, 1, math.nan), "rho must be .* got nan"),
    "rho in words": (lambda: Phase(0, 1, "0.1"), "rho must be .* got '0.1'"),
    "rho yes": (lambda: Phase(0, 1, True), "rho must be .* got True"),
    "rule": (lambda: Phase(0, 1, 0.1, "sam"), "rule must be a function .* got 'sam'"),
    "method": (
        lambda: Phase(0, 1, 0.1, method="gsam"),
        "method must be a function of sam_lab.methods, got 'gsam'",
    ),
    "attack": (lambda: Phase(0, 1, attack=0.1), "attack must be a function .*, got 0.1"),
    "attack late": (lambda: late(0, 1, attack="pgd"), "attack must be a function .*, got 'pgd'"),
    "rule with a state": (
        lambda: Phase(0, 1, 0.1, nn.ReLU()),
        r"rule must be without a state, .* got ReLU\(\)",
    ),
    "at": (lambda: late(5, 4, rho=0.1), "at must be an integer between 0 and 4, got 5"),
    "at early": (lambda: early(-1, 4, rho=0.1), "at must be an integer between 0 and 4, got -1"),
    "epochs": (lambda: late(0, 0, rho=0.1), "epochs must be an integer of at least 1, got 0"),
    "share above 1": (lambda: step_decay({1.5: 0.1}), r"factors must map .* got \{1.5: 0.1\}"),
    "factor 0": (lambda: step_decay({0.5: 0.0}), r"factors must map .* got \{0.5: 0.0\}"),
    "factor nan": (lambda: step_decay({0.5: math.nan}), "factors must map .* got {0.5: nan}"),
    "model": (lambda: training_of(model=len), "model must be a torch.nn.Module, got <built-in"),
    "x": (
        lambda: training_of(x=X.numpy()),
        "x and y must be tensors, got ndarray and Tensor",
    ),
    "lengths": (
        lambda: training_of(x=X[1:]),
        r"x and y must hold one entry an example, .* got shapes \(19, 2, 4, 4\) and \(20,\)",
    ),
    "nothing": (
        lambda: training_of(x=X[:0], y=Y[:0]),
        r"x and y must hold one entry an example, at least one, got shapes \(0, .* and \(0,\)",
    ),
    "optimizer ready made": (
        lambda: training_of(optimizer=SGD(network().parameters())),
        "optimizer must make the optimizer from the parameters, .* got SGD",
    ),
    "optimizer that is none": (
        lambda: training_of(optimizer=lambda params: None),
        "optimizer must make a torch.optim.Optimizer, which None is not",
    ),
    "optimizer of another model": (
        lambda: training_of(optimizer=elsewhere),
        "optimizer must take the parameters it is called with, .* got <function elsewhere",
    ),
    "loss_fn": (lambda: training_of(loss_fn="mse"), "loss_fn must be a function, got 'mse'"),
    "schedule": (
        lambda: training_of(schedule="cosine"),
        "schedule must be a function, got 'cosine'",
    ),
    "augment": (lambda: training_of(augment=4), "augment must be a function, got 4"),
    "batch": (lambda: training_of(batch=0), "batch must be an integer of at least 1, got 0"),
    "seed": (lambda: training_of(seed=-1), "seed must be an integer of at least 0, got -1"),
    "no phases": (lambda: training_of(phases=[]), r"phases must be a list of .*, got \[\]"),
    "one phase": (
        lambda: training_of(phases=Phase(0, 2)),
        r"phases must be a list of .*, got Phase\(start=0, stop=2",
    ),
    "phases that are none": (
        lambda: training_of(phases=[(0, 2)]),
        r"phases must be a list of .*, got \[\(0, 2\)\]",
    ),
    "late start": (
        lambda: training_of(phases=[Phase(1, 2)]),
        r"phases must follow each other from epoch 0 without a gap, got \[1, 2\)",
    ),
    "gap": (
        lambda: training_of(phases=[Phase(0, 2), Phase(3, 4)]),
        r"without a gap, got \[0, 2\), \[3, 4\)",
    ),
    "overlap": (
        lambda: training_of(phases=[Phase(0, 2), Phase(1, 4)]),
        r"without a gap, got \[0, 2\), \[1, 4\)",
    ),
    "until": (
        lambda: training_of().run(until=3),
        "until must be an integer between 0 and 2, got 3",
    ),
    "epoch": (
        lambda: training_of().phase(2),
        "epoch must be an integer between 0 and 1, got 2",
    ),
    "branch": (lambda: training_of().branch([Phase(1, 2)]), r"without a gap, got \[1, 2\)"),
    "pad": (lambda: crop_and_flip(-1), "pad must be an integer of at least 0, got -1"),
    "no images": (
        lambda: crop_and_flip()(X[0], GENERATOR),
        r"x must be images \(N, C, H, W\), got shape \(2, 4, 4\)",
    ),
    "evaluate's batch": (
        lambda: evaluate(network(), X, Y, batch=0),
        "batch must be an integer of at least 1, got 0",
    ),
    "evaluate's lengths": (
        lambda: evaluate(network(), X, Y[1:]),
        r"x and y must hold .* got shapes \(20, 2, 4, 4\) and \(19,\)",
    ),
    "evaluate nothing": (
        lambda: evaluate(network(), X[:0], Y[:0]),
        r"x and y must hold .* got shapes \(0, 2, 4, 4\) and \(0,\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_argument_is_refused_with_its_name_and_value(name):
    attempt, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        attempt()


def test_a_branch_cannot_train_the_trunks_model():
    model = network()
    training = training_of(model=model, optimizer=lambda _: SGD(model.parameters()))
    with pytest.raises(ValueError, match="optimizer must take the parameters it is called with"):
        training.branch([Phase(0, 2)])


# --- augmentation ---------------------------------------------------------------------------------


def candidates(image, pad, flip):
    """Every picture that one image can become, by slices."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    found = {}
    for top, left, mirrored in itertools.product(
        range(2 * pad + 1), range(2 * pad + 1), (False, True) if flip else (False,)
    ):
        part = padded[:, top : top + height, left : left + width]
        found[top, left, mirrored] = part[:, :, ::-1] if mirrored else part
    return found


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (1, False), (2, True), (4, True)])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 6, 7)])
def test_each_image_is_cropped_and_flipped_by_itself_every_way_as_often(pad, flip, shape):
    generator = torch.Generator().manual_seed(3)
    n = 40 * (2 * pad + 1)
    x = torch.randn(n, *shape, generator=generator)
    ways = []
    for image, got in zip(x.numpy(), crop_and_flip(pad, flip)(x, generator).numpy(), strict=True):
        all_ways = candidates(image, pad, flip)
        (way,) = [way for way, picture in all_ways.items() if np.array_equal(picture, got)]
        ways.append(way)
    for counts, kinds in ((Counter(column), set(column)) for column in zip(*ways, strict=True)):
        mean = n / len(kinds)
        assert all(abs(count - mean) < 4.5 * mean**0.5 for count in counts.values())
    expected = [2 * pad + 1, 2 * pad + 1, 2 if flip else 1]
    assert [len(set(column)) for column in zip(*ways, strict=True)] == expected
    tops, lefts, flips = np.array(ways, dtype=float).T
    for one, two in ((tops, lefts), (tops, flips), (lefts, flips)):  # drawn apart
        assert (
            abs(((one - one.mean()) * (two - two.mean())).mean())
            < 4.5 * (one.std() * two.std() / n**0.5) + 1e-9
        )


def test_augmentation_is_the_generators_alone():
    augment, state = crop_and_flip(2), torch.get_rng_state()
    first, again, third = (augment(X, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(augment(X, generator), augment(X, generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_augmentation_keeps_shape_and_dtype_and_its_input(dtype):
    x = X.mul(9).abs().to(dtype)
    before = x.clone()
    got = crop_and_flip(3)(x, torch.Generator())
    assert got.shape == x.shape and got.dtype == dtype
    assert torch.equal(x, before)


def test_augmentation_without_shift_and_flip_is_none():
    assert torch.equal(crop_and_flip(pad=0, flip=False)(X, torch.Generator()), X)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 7, 20, 1000])
@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_evaluation_is_one_pass_over_everything_whatever_the_batch(batch, loss_fn):
    model = made([Phase(0, 2)]).run().model
    options = {} if loss_fn is None else {"loss_fn": loss_fn}
    found = evaluate(model, X, Y, batch=batch, **options)
    with torch.no_grad():
        outputs = copy.deepcopy(model).double().eval()(X.double())
    expected = (loss_fn or nn.functional.cross_entropy)(outputs, Y).item()
    wrong = sum(outputs[i].argmax() != Y[i] for i in range(N)).item()
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == wrong / N and 0 < wrong < N


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_leaves_modes_statistics_gradients_and_random_numbers_alone(fails):
    training = made([Phase(0, 1)]).run()
    model = training.model
    model[3].eval()  # a part in another mode than the whole
    before, outside = everything(training), random_states()
    grads = copies(p.grad for p in model.parameters())
    modes = [module.training for module in model.modules()]
    seen = []

    def loss_fn(outputs, targets):
        seen.append([module.training for module in model.modules()])
        assert not outputs.requires_grad
        if fails:
            raise Failure
        return nn.functional.cross_entropy(outputs, targets)

    if fails:
        with pytest.raises(Failure):
            evaluate(model, X, Y, loss_fn)
    else:
        evaluate(model, X, Y, loss_fn)
    assert not any(itertools.chain(*seen))
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert_equal(everything(training), before)
    assert_equal(copies(p.grad for p in model.parameters()), grads)
    assert_equal(random_states(), outside)
    assert torch.is_grad_enabled()


# --- without phases -------------------------------------------------------------------------------


def test_descend_is_gradient_descent_on_a_quadratic():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    curvature = torch.tensor([1.0, 3.0])
    start = w.detach().clone()
    descend(lambda: 0.5 * (curvature * w**2).sum(), [w], lr=0.1, steps=7)
    torch.testing.assert_close(w.detach(), start * (1 - 0.1 * curvature) ** 7)


def test_descend_refuses_a_loss_that_has_left_the_numbers():
    w = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="lr=100"):
        descend(lambda: (w**4).sum(), [w], lr=100.0, steps=200)


def test_squared_error_is_half_the_sum_over_outputs_and_the_mean_over_examples():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert float(squared_error(outputs, torch.tensor([0, 0]))) == pytest.approx(
        0.5 * (0 + (1 + 9)) / 2
    )
