"""Attacks on the inputs: other packages and closed forms agree, and nothing else is touched."""

import contextlib
import copy
import itertools
import math
import random
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam_problem import assert_equal, copies
from torch import nn
from torch.nn import functional as F

from sam_lab import SAM, data
from sam_lab.adversarial import Threat, autoattack, fgsm, pgd, robust_accuracy, trades
from sam_lab.models import Normalize, mlp
from sam_lab.perturbations import sam, sam_linf
from sam_lab.training import Phase, Training

N, CLASSES = 16, 5
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(N, 3, 8, 8, generator=GENERATOR)
Y = torch.randint(CLASSES, (N,), generator=GENERATOR)
EPS = {"linf": 8 / 255, "l2": 0.5}
STEP = {"linf": 2 / 255, "l2": 0.1}
both_norms = pytest.mark.parametrize("norm", EPS)
seeds = st.integers(0, 2**32 - 1)


class Failure(Exception):
    """What no code expects."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(*extra, dtype=torch.float32):
    """With running statistics that are not those of a batch; in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Flatten(),
            *extra,
            nn.Linear(54, CLASSES),
        )
        for part in X.split(4):
            model(part.square())
    return model.to(dtype).eval()


def lengths(delta, norm):
    """Of each example, (N,)."""
    order = math.inf if norm == "linf" else 2
    flat = delta.detach().double().reshape(len(delta), -1)
    return torch.linalg.vector_norm(flat, order, dim=1)


def right(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) == y


def losses(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


# --- against other packages -----------------------------------------------------------------------


def by_torchattacks(model, norm, one_step):
    torchattacks = pytest.importorskip("torchattacks")
    if one_step:
        return torchattacks.FGSM(model, eps=EPS[norm])(X, Y)
    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    return kind(model, eps=EPS[norm], alpha=STEP[norm], steps=10, random_start=False)(X, Y)


def by_foolbox(model, norm, one_step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of SciPy, for what it imports
        foolbox = pytest.importorskip("foolbox")
    attacks = foolbox.attacks
    if one_step:
        attack = (attacks.FGSM if norm == "linf" else attacks.FGM)()
    else:
        kind = attacks.LinfPGD if norm == "linf" else attacks.L2PGD
        attack = kind(abs_stepsize=STEP[norm], steps=10, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack.run(wrapped, X, Y, epsilon=EPS[norm])


@pytest.mark.parametrize(
    ("other", "norm", "one_step"),
    [
        (by_torchattacks, "linf", True),
        (by_torchattacks, "linf", False),
        (by_torchattacks, "l2", False),
        (by_foolbox, "linf", True),
        (by_foolbox, "linf", False),
        (by_foolbox, "l2", True),
        (by_foolbox, "l2", False),
    ],
)
def test_from_a_fixed_start_other_packages_find_the_same(other, norm, one_step):
    model, threat = network(), Threat(norm, EPS[norm])
    expected = other(copy.deepcopy(model), norm, one_step)
    if one_step:
        got = fgsm(model, X, Y, threat)
    else:
        got = pgd(model, X, Y, threat, steps=10, step_size=STEP[norm], random_start=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (lengths(got - X, norm) > 0.7 * EPS[norm]).all()


# --- closed forms ---------------------------------------------------------------------------------


def linear(seed, inputs):
    """Two classes: the margin of the first is w.x + b, that of the second the opposite."""
    generator = seeded(seed)
    model = nn.Linear(inputs, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = 2 * torch.rand(6, inputs, generator=generator, dtype=torch.float64) - 1
    y = torch.randint(2, (6,), generator=generator)
    w = (model.weight[0] - model.weight[1]).detach() * (1 - 2 * y).unsqueeze(1)
    return model, x, y, w


def margins(model, x, y):
    outputs = model(x).detach()
    return (outputs[:, 0] - outputs[:, 1]) * (1 - 2 * y)


ATTACKS = {
    "fgsm": fgsm,
    "pgd": partial(pgd, random_start=False),
    "pgd in large steps": partial(pgd, random_start=False, steps=3, step_size=5.0),
}


@pytest.mark.parametrize("attack", ATTACKS)
@settings(deadline=None, max_examples=25)
@given(seed=seeds, inputs=st.integers(1, 20), eps=st.floats(1e-3, 2.0))
def test_the_worst_case_of_a_linear_model_is_the_closed_form(attack, seed, inputs, eps):
    model, x, y, w = linear(seed, inputs)
    before = margins(model, x, y)
    cube = ATTACKS[attack](model, x, y, Threat("linf", eps, -10, 10))
    torch.testing.assert_close(cube, x - eps * w.sign())
    torch.testing.assert_close(before - margins(model, cube, y), eps * w.abs().sum(1))
    ball = ATTACKS[attack](model, x, y, Threat("l2", eps, -10, 10))
    torch.testing.assert_close(ball, x - eps * w / w.norm(dim=1, keepdim=True))
    torch.testing.assert_close(before - margins(model, ball, y), eps * w.norm(dim=1))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, inputs=st.integers(1, 20), eps=st.floats(1e-3, 2.0))
def test_where_the_box_binds_the_worst_case_in_the_maximum_norm_is_cut_to_it(seed, inputs, eps):
    model, x, y, w = linear(seed, inputs)
    worst = (x - eps * w.sign()).clamp(-1, 1)
    for attack in (fgsm, pgd, partial(pgd, steps=3, restarts=2)):
        torch.testing.assert_close(attack(model, x, y, Threat("linf", eps, -1, 1)), worst)


def test_from_anywhere_in_the_ball_the_worst_case_is_reached():
    """By default: 2.5 times the radius is further than across."""
    model, x, y, w = linear(3, 8)
    before = margins(model, x, y)
    for steps in (1, 2, 10):
        cube = pgd(model, x, y, Threat("linf", 0.3, -10, 10), steps=steps)
        torch.testing.assert_close(cube, x - 0.3 * w.sign())
        ball = pgd(model, x, y, Threat("l2", 0.3, -10, 10), steps=steps)
        share = (before - margins(model, ball, y)) / (0.3 * w.norm(dim=1))
        assert share.min() > 0.9 and share.max() < 1


def test_normalisation_inside_the_model_leaves_the_radius_in_pixels():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.5]
    model, inside = network(), nn.Sequential(Normalize(mean, std), network())
    x_adv = pgd(inside, X, Y, 0.1, random_start=False)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert lengths(x_adv - X, "linf").max() == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match=r"normalise inside the model.*Normalize\(mean, std\)"):
        pgd(model, inside[0](X), Y, 0.1)


# --- the ball and the box -------------------------------------------------------------------------


@st.composite
def threats(draw, dtype=torch.float32):
    """A threat, examples in its box, and points anywhere."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    low = draw(st.sampled_from([0.0, -1.0, -0.3]))
    threat = Threat(draw(st.sampled_from(["linf", "l2"])), draw(st.floats(0, 2)), low, 1.0)
    generator = seeded(draw(seeds))
    x = low + (1 - low) * torch.rand(shape, generator=generator, dtype=dtype)
    away = 10 ** draw(st.floats(-3, 3)) * torch.randn(shape, generator=generator, dtype=dtype)
    return threat, x, x + away


def assert_allowed(threat, x_adv, x, tolerance=1e-6):
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert (lengths(x_adv.double() - x.double(), threat.norm) <= threat.eps + tolerance).all()
    assert x_adv.min() >= threat.low - tolerance and x_adv.max() <= threat.high + tolerance


@given(threats())
def test_projection_leads_into_ball_and_box_and_moves_nothing_that_is_there(case):
    threat, x, points = case
    projected = threat.project(points, x)
    assert_allowed(threat, projected, x)
    torch.testing.assert_close(threat.project(projected, x), projected, rtol=0, atol=1e-6)
    torch.testing.assert_close(threat.project(x, x), x, rtol=0, atol=0)


@given(threats(torch.float64))
def test_in_the_maximum_norm_the_projection_is_the_nearest_point_of_ball_and_box(case):
    threat, x, points = case
    threat = Threat("linf", threat.eps, threat.low, threat.high)
    corners = (x - threat.eps).clamp(min=threat.low), (x + threat.eps).clamp(max=threat.high)
    nearest = torch.maximum(torch.minimum(points, corners[1]), corners[0])
    torch.testing.assert_close(threat.project(points, x), nearest)


@given(threats(torch.float64), seeds)
def test_in_the_euclidean_norm_the_projection_is_the_nearest_point_of_the_ball(case, seed):
    """From the nearest point of a convex set, none of its points lies in the direction of ours."""
    threat, x, points = case
    ball = Threat("l2", threat.eps, -1e6, 1e6)
    projected = ball.project(points, x)
    z = torch.randn((20, *x.shape), generator=seeded(seed), dtype=x.dtype)
    for direction in z:
        other = x + threat.eps * ball.ascend(direction, 1.0)
        onwards = ((points - projected) * (other - projected)).reshape(len(x), -1).sum(1)
        size = lengths(points - projected, "l2")
        assert (onwards <= 1e-9 * (1 + size)).all()


@given(threats(), seeds)
def test_a_start_is_in_ball_and_box_and_the_generators_alone(case, seed):
    threat, x, _ = case
    before = torch.get_rng_state()
    start = threat.start(x, seeded(seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert_allowed(threat, start, x)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(threat.start(x, seeded(seed)), start)


@both_norms
def test_starts_are_as_far_apart_as_promised(norm):
    """Uniform in the cube; uniform in direction and in distance in the Euclidean ball."""
    x = torch.full((20_000, 3), 0.5)
    threat, generator = Threat(norm, 0.4), seeded()
    delta = threat.start(x, generator) - x
    assert not torch.equal(threat.start(x, generator) - x, delta)
    if norm == "linf":
        uniform = delta / 0.4
    else:
        distance = delta.norm(dim=1, keepdim=True)
        # a coordinate of a random direction in three dimensions is uniform too
        uniform = torch.cat([2 * distance / 0.4 - 1, delta / distance], 1)
    for column in uniform.T:
        ranks = torch.linspace(-1, 1, len(x))
        assert (column.sort().values - ranks).abs().max() < 0.03
    assert uniform.T.corrcoef().triu(1).abs().max() < 0.03


@given(threats(torch.float64), st.floats(1e-3, 10), seeds)
def test_the_step_has_its_length_and_no_other_of_that_length_goes_up_more(case, step, seed):
    threat, _, grad = case
    move = threat.ascend(grad, step)
    flat = grad.reshape(len(grad), -1)
    rise = (move.reshape(len(grad), -1) * flat).sum(1)
    assert lengths(move, threat.norm) == pytest.approx(np.full(len(grad), step))
    dual = flat.abs().sum(1) if threat.norm == "linf" else flat.norm(dim=1)
    torch.testing.assert_close(rise, step * dual)
    others = torch.randn((20, *flat.shape), generator=seeded(seed), dtype=flat.dtype)
    for other in others:
        other *= step / lengths(other, threat.norm).unsqueeze(1)
        assert ((other * flat).sum(1) <= rise * (1 + 1e-9)).all()


@both_norms
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_an_example_whose_gradient_is_zero_or_not_finite_stays_and_the_others_go(norm, bad):
    grad = torch.randn(3, 2, 4, generator=seeded())
    grad[1] = bad if bad == 0 else grad[1]
    grad[1, 0, 2] = bad
    move = Threat(norm, 1.0).ascend(grad, 0.3)
    assert torch.equal(move[1], torch.zeros(2, 4))
    for i in (0, 2):
        assert torch.equal(move[i], Threat(norm, 1.0).ascend(grad[i : i + 1], 0.3)[0])
        assert move[i].any()


@both_norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2.0**-24, 1e-6, 1.0, 6e4])
def test_half_precision_gradients_of_any_size_give_the_whole_step(norm, dtype, size):
    """Trap: of a confident example they are so small that their squares vanish."""
    grad = torch.full((2, 300), size, dtype=dtype)
    move = Threat(norm, 1.0).ascend(grad, 0.5)
    assert move.dtype == dtype
    assert lengths(move, norm) == pytest.approx(np.full(2, 0.5), rel=1e-2)


@given(threats(torch.float64), st.floats(1e-3, 10))
def test_the_step_of_an_attack_is_that_of_sam(case, step):
    """In the ball of each example as in the one around the weights."""
    threat, x, grad = case
    rule = sam_linf if threat.norm == "linf" else sam
    for i, move in enumerate(threat.ascend(grad, step)):
        torch.testing.assert_close(move, rule([x[i]], [grad[i]], step)[0])


@both_norms
def test_a_radius_of_zero_is_no_attack(norm):
    model = network()
    for attack in (fgsm, pgd, partial(pgd, restarts=3)):
        assert torch.equal(attack(model, X, Y, Threat(norm, 0.0)), X)
    assert (
        robust_accuracy(model, X, Y, partial(pgd, threat=Threat(norm, 0.0)))
        == (pytest.approx(float(right(model, X, Y).float().mean())),) * 2
    )


@both_norms
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
    ids=str,
)
def test_the_attacked_inputs_are_in_ball_and_box_and_of_their_precision(
    norm, random_start, dtype, tolerance
):
    model, x = network(dtype=dtype), X.to(dtype)
    threat = Threat(norm, EPS[norm])
    x_adv = pgd(model, x, Y, threat, random_start=random_start)
    assert_allowed(threat, x_adv, x, tolerance)
    assert (losses(model, x_adv, Y) >= losses(model, x, Y)).all()


def test_channels_last_stays_and_changes_nothing():
    model = network()
    x = X.contiguous(memory_format=torch.channels_last)
    there = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_adv = pgd(there, x, Y, 0.1)
    assert x_adv.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x_adv, pgd(model, X, Y, 0.1), rtol=0, atol=1e-6)


# --- strength -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A small network that knows its digits, and 200 that it has not seen."""
    found = data.load("digits")
    model = mlp((64, 32, 10), "relu")
    optimizer = partial(torch.optim.Adam, lr=0.01)
    Training(model, found.x, found.y, optimizer, [Phase(0, 4)], batch=64).run()
    assert right(model, found.x_test, found.y_test).float().mean() > 0.9
    return model.eval(), found.x_test[:200], found.y_test[:200]


GRID = {"linf": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.5), "l2": (0.0, 0.2, 0.5, 0.8, 1.2, 5.0)}


@both_norms
def test_robust_accuracy_falls_with_the_radius_from_the_natural_one_to_none(digits, norm):
    """Trap: what is left in a ball as large as the box is a weakness of the attack."""
    found = [robust_accuracy(*digits, partial(pgd, threat=Threat(norm, eps))) for eps in GRID[norm]]
    natural, robust = zip(*found, strict=True)
    assert len(set(natural)) == 1 and natural[0] == robust[0] > 0.9
    assert list(robust) == sorted(robust, reverse=True)
    assert robust[-1] == 0 and len(set(robust)) > 4


@both_norms
def test_several_steps_are_not_weaker_than_one_and_no_loss_falls(digits, norm):
    model, x, y = digits
    stronger = 0
    for eps in GRID[norm][1:-1]:
        one, ten = fgsm(*digits, Threat(norm, eps)), pgd(*digits, Threat(norm, eps))
        assert (losses(model, ten, y) >= losses(model, x, y)).all()
        difference = int(right(model, one, y).sum() - right(model, ten, y).sum())
        assert difference >= 0
        stronger += difference
    assert stronger > 0


@both_norms
def test_each_restart_keeps_what_is_broken_and_adds_to_it(digits, norm):
    model, x, y = digits
    threat = Threat(norm, GRID[norm][3])
    weak = partial(pgd, *digits, threat, steps=1, step_size=threat.eps / 2)
    attempts = [weak(restarts=r) for r in (1, 2, 5)]
    for fewer, more in itertools.pairwise(attempts):
        stands = right(model, more, y)
        assert (right(model, fewer, y) | ~stands).all()
        assert (losses(model, more, y) >= losses(model, fewer, y))[stands].all()
        assert_allowed(threat, more, x)
    assert right(model, attempts[0], y).sum() > right(model, attempts[-1], y).sum()


def test_of_several_attempts_the_first_wrong_prediction_is_kept_or_else_the_largest_loss():
    """Steps of length 0: the attempts are the starts, which the generator tells."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model.bias.copy_(torch.tensor([-0.8, 0.0]))  # the first class where the sum is above 0.8
    x, y = torch.full((200, 2), 0.5), torch.arange(200) % 2
    x[100:], threat = 0.9, Threat("linf", 0.25)

    def bumpy(outputs, y):
        return (50 * outputs[:, 0]).sin()  # whatever is right

    still = partial(pgd, steps=1, step_size=0, restarts=3)
    got = still(model, x, y, threat, loss_fn=bumpy, generator=seeded())
    generator = seeded()
    starts = [threat.start(x, generator) for _ in range(3)]
    kinds = set()
    for i, chosen in enumerate(got):
        tried = [start[i] for start in starts]
        outputs = model(torch.stack(tried)).detach()
        wrong = (outputs.argmax(1) != y[i]).tolist()
        best = wrong.index(True) if any(wrong) else int(bumpy(outputs, None).argmax())
        assert torch.equal(chosen, tried[best])
        kinds.add((any(wrong), best))
    assert len(kinds) == 6


def test_robust_accuracy_is_a_loop_over_all_examples_whatever_the_batch(digits):
    model, x, y = digits[0], digits[1][:60], digits[2][:60]
    attack = partial(pgd, threat=0.1, random_start=False)
    natural = robust = 0
    for image, label in zip(x.split(1), y.split(1), strict=True):
        natural += bool(right(model, image, label))
        x_adv = attack(model, image, label)
        robust += bool(right(model, image, label) & right(model, x_adv, label))
    assert 0 < robust < natural < len(x)
    for batch in (7, 64, 1000):
        found = robust_accuracy(model, x, y, attack, batch=batch)
        assert found == (natural / len(x), robust / len(x))


def test_only_examples_that_are_classified_rightly_are_attacked(digits):
    model, x, y = digits
    y = torch.where(torch.arange(len(y)) < 100, (y + 1) % 10, y)  # a batch without a right one
    known = right(model, x, y)
    seen = []

    def attack(model, x, y):
        assert not any(module.training for module in model.modules())
        seen.append((x, y))
        return x

    share = float(known.double().mean())
    assert robust_accuracy(model, x, y, attack, batch=30) == (share, share)
    inputs, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(inputs, x[known]) and torch.equal(labels, y[known])
    assert all(len(labels) for _, labels in seen)


def test_an_attack_that_helps_cannot_raise_the_accuracy(digits):
    """An example that was wrong is lost, whatever an attacker makes of it."""
    model, x, y = digits
    wrong = (y + (torch.arange(len(y)) % 2)) % 10
    best = {int(label): x[(y == label) & right(model, x, y)][:1] for label in y.unique()}

    def help_(model, x, y):
        return torch.cat([best[int(label)] for label in y])

    natural, robust = robust_accuracy(model, x, wrong, help_)
    assert natural == robust == pytest.approx(float(right(model, x, wrong).double().mean()))
    assert 0.3 < natural < 0.7


def test_one_full_step_from_the_example_itself_is_the_fast_gradient_sign_method():
    model = network()
    for threat in (0.1, Threat("linf", 0.1), Threat("l2", 0.5)):
        eps = threat if isinstance(threat, float) else threat.eps
        step = pgd(model, X, Y, threat, steps=1, step_size=eps, random_start=False)
        assert torch.equal(fgsm(model, X, Y, threat), step)
    assert torch.equal(fgsm(model, X, Y, 0.1), fgsm(model, X, Y, Threat("linf", 0.1)))


def test_an_attack_goes_up_the_loss_that_it_is_given():
    model = network()

    def towards_first(outputs, y):
        return outputs[:, 0]

    for attack in (fgsm, pgd):
        x_adv = attack(model, X, Y, Threat("l2", 0.1), loss_fn=towards_first)
        assert (model(x_adv)[:, 0] > model(X)[:, 0]).all()


def test_by_default_every_call_starts_alike_and_a_given_generator_goes_on():
    model = network()
    attack = partial(pgd, model, X, Y, 0.1, steps=1, step_size=0.01)
    assert torch.equal(attack(), attack())
    generator = seeded()
    first, second = attack(generator=generator), attack(generator=generator)
    assert torch.equal(first, attack()) and not torch.equal(first, second)
    generator.manual_seed(0)
    assert torch.equal(attack(generator=generator), first)


def test_the_global_generator_goes_on_too_where_it_is_given():
    model = network()
    with torch.random.fork_rng():
        attack = partial(pgd, model, X, Y, 0.1, steps=1, generator=torch.default_generator)
        assert not torch.equal(attack(), attack())


# --- nothing leaks --------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws and writes to its buffer in each mode, and fails at one of its calls."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.calls, self.fails_at = 0, fails_at
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.calls == self.fails_at:
            raise Failure
        self.calls += 1
        self.seen += 1
        noise = random.random() + np.random.rand() + torch.rand(x.shape)
        return x + 1e-6 * noise


def noisy(fails_at=None):
    """In training, but for a frozen batch norm; some gradients there, some not, one not wanted."""
    model = network(Noisy(fails_at), nn.Dropout(0.2)).train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].weight.requires_grad_(False)
    return model


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return [torch.get_rng_state(), list(random.getstate()[1]), keys, position]


def held(model):
    """The very tensors of a model, how often each was written to, and its modes."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters()]
    return (
        [(id(t), None if t is None else t._version) for t in tensors],
        [t if t is None else t.detach().clone() for t in tensors],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
    )


def untouched(function, model, failure=None):
    """Call the function; all that it should leave alone is as before. Returns its value."""
    before, outside = held(model), random_states()
    inputs, targets = X.clone(), Y.clone()
    value = None
    if failure is None:
        value = function()
    else:
        with pytest.raises(failure):
            function()
    assert_equal(held(model), before)
    assert_equal(random_states(), outside)
    assert torch.equal(X, inputs) and torch.equal(Y, targets)
    assert X.grad is None and not X.requires_grad
    assert torch.is_grad_enabled()
    return value


def quick_autoattack(model, **options):
    pytest.importorskip("pyautoattack")
    return autoattack(model, X, Y, 0.1, attacks=("apgd-ce",), **options)


CALLS = {
    "fgsm": lambda model: fgsm(model, X, Y, 0.1),
    "pgd": lambda model: pgd(model, X, Y, Threat("l2", 0.5), steps=3, restarts=2),
    "autoattack": quick_autoattack,
}


@pytest.mark.parametrize("call", CALLS)
def test_an_attack_changes_nothing_but_what_it_returns(call):
    model = noisy()
    x_adv = untouched(lambda: CALLS[call](model), model)
    assert not x_adv.requires_grad and x_adv.grad_fn is None and x_adv.is_leaf
    assert x_adv.data_ptr() != X.data_ptr()


@pytest.mark.parametrize(
    ("call", "calls"),
    [("fgsm", 0), ("pgd", 0), ("pgd", 3), ("pgd", 7), ("autoattack", 0), ("autoattack", 20)],
)
def test_the_same_holds_where_the_model_fails(call, calls):
    model = noisy()
    model[7].fails_at = model[7].calls + calls
    untouched(lambda: CALLS[call](model), model, Failure)


@pytest.mark.parametrize("calls", [0, 2])
def test_the_same_holds_where_the_loss_fails(calls):
    model, counter = noisy(), itertools.count()

    def loss_fn(outputs, y):
        if next(counter) == calls:
            raise Failure
        return F.cross_entropy(outputs, y, reduction="none")

    untouched(lambda: pgd(model, X, Y, 0.1, loss_fn=loss_fn), model, Failure)


def test_robust_accuracy_leaves_the_model_as_it_was_whatever_the_attack_does():
    model = network(nn.Dropout(0.2)).train()
    model[1].eval()
    untouched(lambda: robust_accuracy(model, X, Y, partial(pgd, threat=0.1), batch=5), model)

    def fails(model, x, y):
        raise Failure

    assert right(copy.deepcopy(model).eval(), X, Y).any()
    untouched(lambda: robust_accuracy(model, X, Y, fails), model, Failure)


def test_modes_do_not_change_the_attack():
    model = network(nn.Dropout(0.2))
    expected = pgd(model, X, Y, 0.1)
    assert torch.equal(pgd(model.train(), X, Y, 0.1), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_works_where_gradients_are_off(mode):
    model = network()
    expected = pgd(model, X, Y, 0.1, restarts=2)
    with mode():
        x, y = X.clone(), Y.clone()
        x_adv = pgd(model, x, y, 0.1, restarts=2)
        shares = robust_accuracy(model, x, y, partial(pgd, threat=0.1))
    assert torch.equal(x_adv, expected) and not x_adv.requires_grad
    assert shares == robust_accuracy(model, X, Y, partial(pgd, threat=0.1))


def test_parameters_need_no_gradient_and_inputs_may_have_one():
    model = network()
    expected = pgd(model, X, Y, 0.1)
    model.requires_grad_(False)
    assert torch.equal(pgd(model, X, Y, 0.1), expected)
    x = X.clone().requires_grad_()
    assert torch.equal(pgd(model, x, Y, 0.1), expected)
    assert x.requires_grad and x.grad is None


def test_the_gradient_that_sam_sees_is_that_of_the_attacked_batch_alone():
    """In one step of a phase with both: attacked once, and neither pass sees another gradient."""
    attacked, gradients, passes = [], [], []

    def attack(model, x, y, generator):
        attacked.append((pgd(model, x, y, 0.1, generator=generator), y))
        return attacked[-1][0]

    def rule(params, grads, rho):
        gradients.append(copies(grads))
        return sam(params, grads, rho)

    def loss_fn(outputs, y):
        passes.append(outputs)
        return F.cross_entropy(outputs, y)

    model = network()
    at_start = copy.deepcopy(model).train()
    optimizer = partial(torch.optim.SGD, lr=0.1)
    phases = [Phase(0, 1, rho=0.1, rule=rule, attack=attack)]
    Training(model, X, Y, optimizer, phases, batch=N, loss_fn=loss_fn).run()
    ((x_adv, y),) = attacked
    assert len(passes) == 2
    loss = F.cross_entropy(at_start(x_adv), y)
    assert_equal(gradients, [list(torch.autograd.grad(loss, list(at_start.parameters())))])


def ascent_of_a_plain_loop(attack):
    """SAM's perturbation of the usual kind of loop, which clears gradients before the attack."""
    model = network()
    model.zero_grad()
    x_adv = attack(model, X, Y)
    F.cross_entropy(model(x_adv), Y).backward()
    params = list(model.parameters())
    return x_adv, torch.cat([p.grad.flatten() for p in params])


def leaky(model, x, y):
    """The attack that is often seen: it calls backward, which reaches the parameters too."""
    x_adv = x.clone()
    for _ in range(10):
        x_adv.requires_grad_()
        x_adv.grad = None
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + 0.025 * x_adv.grad.sign()
        x_adv = (x + (x_adv - x).clamp(-0.1, 0.1)).clamp(0, 1)
    return x_adv


def test_an_attack_that_calls_backward_would_have_turned_sams_ascent():
    clean, gradient = ascent_of_a_plain_loop(partial(pgd, threat=0.1, random_start=False))
    same, leaked = ascent_of_a_plain_loop(leaky)
    torch.testing.assert_close(same, clean, rtol=0, atol=1e-6)  # it is the same attack
    model = network()
    loss = F.cross_entropy(model(clean), Y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(gradient, torch.cat([g.flatten() for g in grads]))
    assert leaked.norm() > 2 * gradient.norm()
    assert F.cosine_similarity(leaked, gradient, dim=0) < 0.999


# --- TRADES ---------------------------------------------------------------------------------------


def divergence(model, x_adv, outputs):
    """KL divergence of the predictions at x_adv from these, of each example; by its definition."""
    p, q = outputs.softmax(1), model(x_adv).softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def trades_by_hand(model, x, y, beta, eps, steps, generator):
    judge = copy.deepcopy(model).eval()
    before = judge(x).detach()
    x_adv = x + eps * (2 * torch.rand(x.shape, generator=generator).to(x) - 1)
    for _ in range(steps):
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1).requires_grad_()
        (grad,) = torch.autograd.grad(divergence(judge, x_adv, before).sum(), x_adv)
        x_adv = x_adv.detach() + 2.5 * eps / steps * grad.sign()
    x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    outputs = model(x)
    return F.cross_entropy(outputs, y) + beta * divergence(model, x_adv, outputs).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_is_its_formula(training, beta):
    model = network(dtype=torch.float64).train(training)
    x, again = X.double(), copy.deepcopy(model)
    expected = trades_by_hand(again, x, Y, beta, 0.05, 5, seeded(1))
    loss = trades(model, x, Y, 0.05, beta=beta, steps=5, generator=seeded(1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(again.parameters())),
    )
    torch.testing.assert_close(dict(model.state_dict()), dict(again.state_dict()))


def test_trades_pulls_at_both_ends_of_the_divergence():
    """Trap: with the predictions at x detached it would be another gradient."""
    model = network(dtype=torch.float64)
    params, x = list(model.parameters()), X.double()
    weighed = torch.autograd.grad(trades(model, x, Y, 0.1, beta=3.0), params)
    natural = torch.autograd.grad(F.cross_entropy(model(x), Y), params)
    before = model(x).detach().softmax(1)

    def loss_fn(outputs, p):
        return F.kl_div(outputs.log_softmax(1), p, reduction="none").sum(1)

    x_adv = pgd(model, x, before, 0.1, loss_fn=loss_fn)
    apart = divergence(model, x_adv, model(x)).mean()
    whole = torch.autograd.grad(apart, params, retain_graph=True)
    half = torch.autograd.grad(divergence(model, x_adv, model(x).detach()).mean(), params)
    expected = [n + 3 * w for n, w in zip(natural, whole, strict=True)]
    torch.testing.assert_close(list(weighed), expected)
    assert (whole[0] - half[0]).norm() > 0.1 * whole[0].norm()


def test_trades_without_its_second_part_is_the_cross_entropy():
    model = network()
    loss = trades(model, X, Y, 0.1, beta=0)
    expected = F.cross_entropy(model(X), Y)
    assert loss.shape == () and torch.equal(loss, expected)
    params = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, params), torch.autograd.grad(expected, params)
    )


def test_trades_leaves_gradients_and_modes_alone_and_attacks_in_evaluation_mode():
    model = network(nn.Dropout(0.2)).train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]
    statistics, seen = model[4].num_batches_tracked.clone(), []
    hook = model[4].register_forward_hook(lambda module, *_: seen.append(module.training))
    loss = trades(model, X, Y, 0.1, steps=3)
    hook.remove()
    assert seen == [False] * 4 + [True] * 2
    assert model[4].num_batches_tracked == statistics + 2
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_sam_descends_on_trades_as_on_any_loss():
    model = network()
    method = SAM(torch.optim.SGD(model.parameters(), lr=0.5), 0.05, model)
    found = [float(method.step(lambda: trades(model, X, Y, 0.01, steps=2))) for _ in range(20)]
    assert found[-1] < 0.7 * found[0]


# --- AutoAttack -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_digits():
    """Four classes, the fewest that AutoAttack can tell apart, and a model that knows them."""
    pytest.importorskip("pyautoattack")
    found = data.load("digits")
    train, test = found.y < 4, found.y_test < 4
    model = mlp((64, 16, 4), "relu")
    optimizer = partial(torch.optim.Adam, lr=0.02)
    phases = [Phase(0, 4)]
    Training(model, found.x[train], found.y[train], optimizer, phases, batch=64).run()
    return model.eval(), found.x_test[test][:12], found.y_test[test][:12]


@pytest.mark.slow
def test_autoattack_is_not_weaker_than_pgd_and_stays_in_ball_and_box(four_digits):
    model, x, y = four_digits
    threat = Threat("linf", 0.15)
    x_adv = untouched(lambda: autoattack(*four_digits, threat), model)
    assert_allowed(threat, x_adv, x)
    by_pgd = right(model, pgd(*four_digits, threat, steps=20, restarts=2), y)
    stands = right(model, x_adv, y)
    assert 0 < stands.sum() <= by_pgd.sum() < right(model, x, y).sum()
    assert torch.equal(x_adv[stands], x[stands])


@pytest.mark.parametrize("fails_at", [None, 7])
def test_a_debugger_or_a_measurement_of_coverage_goes_on_after_autoattack(fails_at):
    """Trap: the package traces a call of the model, and then turns all tracing off."""
    model, traced = network(Noisy()), []
    model[7].fails_at = fails_at and model[7].calls + fails_at

    def trace(frame, event, argument):
        traced.append(frame)

    outside = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(Failure) if fails_at else contextlib.nullcontext():
            quick_autoattack(model)
        inside = sys.gettrace()
    finally:
        sys.settrace(outside)
    assert inside is trace and traced


def test_autoattack_in_the_euclidean_ball(four_digits):
    model, x, y = four_digits
    threat, attacks = Threat("l2", 0.8), ("apgd-ce", "apgd-t", "fab-t")
    x_adv = autoattack(*four_digits, threat, attacks=attacks)
    assert_allowed(threat, x_adv, x)
    by_pgd = right(model, pgd(*four_digits, threat, steps=20, restarts=2), y)
    assert 0 < right(model, x_adv, y).sum() <= by_pgd.sum()


def test_autoattack_is_the_seeds_alone(four_digits):
    attack = partial(autoattack, *four_digits, 0.15, attacks=("apgd-ce",), batch=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = attack()
        torch.manual_seed(2)
        assert torch.equal(attack(seed=0), first)
    assert not torch.equal(attack(seed=1), first)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autoattack_works_where_gradients_are_off(four_digits, mode):
    model, x, y = four_digits
    attack = partial(autoattack, threat=0.15, attacks=("apgd-ce", "fab-t"))
    shares = robust_accuracy(*four_digits, attack)
    with mode():
        assert robust_accuracy(model, x.clone(), y.clone(), attack) == shares


@pytest.mark.slow
def test_another_port_of_autoattack_finds_as_much(four_digits):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = four_digits
    other = torchattacks.AutoAttack(
        copy.deepcopy(model), norm="Linf", eps=0.15, n_classes=4, seed=0
    )
    found = right(model, other(x, y), y)
    ours = right(model, autoattack(*four_digits, 0.15, attacks=("apgd-ce", "apgd-t")), y)
    assert torch.equal(found, ours)


def test_without_its_package_autoattack_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[book\]'"):
        autoattack(network(), X, Y, 0.1)


# --- bad arguments --------------------------------------------------------------------------------


def attacked(model=None, x=X, y=Y, threat=0.1, **options):
    return pgd(network() if model is None else model, x, y, threat, **options)


def changed(value):
    x = X.clone()
    x[3, 1, 2, 2] = value
    return x


WRONG = {
    "norm": (lambda: Threat("l1", 0.1), "norm must be one of l2, linf, got 'l1'"),
    "eps below 0": (lambda: Threat("l2", -0.1), "eps must be a finite number of at least 0.*-0.1"),
    "eps nan": (lambda: Threat("l2", math.nan), "eps must be .* got nan"),
    "eps infinite": (lambda: attacked(threat=math.inf), "eps must be .* got inf"),
    "eps in words": (lambda: attacked(threat="0.1"), "eps must be .* got '0.1'"),
    "box": (lambda: Threat("l2", 0.1, 1, 1), "low must be below high, got low=1 and high=1"),
    "box nan": (lambda: Threat("l2", 0.1, math.nan), "low must be below high, got low=nan"),
    "model": (lambda: attacked(len), "model must be a torch.nn.Module, got <built-in function len"),
    "x above": (
        lambda: attacked(x=changed(1.5)),
        r"x must lie in the box \[0.0, 1.0\], got values from .* to 1.5: .*Normalize\(mean, std\)",
    ),
    "x below": (lambda: attacked(x=changed(-0.01)), "x must lie in the box .* from -0.01 to"),
    "x of another box": (
        lambda: attacked(threat=Threat("linf", 0.1, 0.5, 2)),
        r"x must lie in the box \[0.5, 2\]",
    ),
    "x nan": (lambda: attacked(x=changed(math.nan)), "x must lie in the box .* from nan to nan"),
    "x of bytes": (
        lambda: attacked(x=(255 * X).to(torch.uint8)),
        "x and y must be tensors, x of floats, got torch.uint8 and torch.int64",
    ),
    "x of NumPy": (lambda: attacked(x=X.numpy()), "x and y must be tensors, .* got ndarray and"),
    "y in a list": (lambda: attacked(y=Y.tolist()), "x and y must be tensors, .* and list"),
    "lengths": (
        lambda: attacked(y=Y[1:]),
        r"x and y must hold one entry an example, .* got shapes \(16, 3, 8, 8\) and \(15,\)",
    ),
    "nothing": (lambda: attacked(x=X[:0], y=Y[:0]), r"at least one, got shapes \(0, .* \(0,\)"),
    "steps": (lambda: attacked(steps=0), "steps must be an integer of at least 1, got 0"),
    "half a step": (lambda: attacked(steps=2.5), "steps must be an integer .* got 2.5"),
    "step_size": (
        lambda: attacked(step_size=-0.1),
        "step_size must be a finite number of at least 0, got -0.1",
    ),
    "restarts": (lambda: attacked(restarts=0), "restarts must be an integer of at least 1, got 0"),
    "batch of robust_accuracy": (
        lambda: robust_accuracy(network(), X, Y, pgd, batch=0),
        "batch must be an integer of at least 1, got 0",
    ),
    "lengths of robust_accuracy": (
        lambda: robust_accuracy(network(), X, Y[1:], pgd),
        r"x and y must hold one entry an example, .* and \(15,\)",
    ),
    "x of robust_accuracy": (
        lambda: robust_accuracy(network(), 2 * X, Y, partial(pgd, threat=0.1)),
        "x must lie in the box",
    ),
    "beta": (
        lambda: trades(network(), X, Y, 0.1, beta=-1),
        "beta must be a finite number of at least 0, got -1",
    ),
    "model of trades": (lambda: trades(len, X, Y, 0.1), "model must be a torch.nn.Module, got <"),
    "x of trades": (lambda: trades(network(), 2 * X, Y, 0.1), "x must lie in the box"),
    "lengths of trades": (
        lambda: trades(network(), X, Y[1:], 0.1),
        r"x and y must hold one entry an example, .* and \(15,\)",
    ),
    "vectors for autoattack": (
        lambda: autoattack(nn.Linear(192, 5), X.flatten(1), Y, 0.1),
        r"autoattack takes images \(N, C, H, W\) in \[0, 1\], got shape \(16, 192\)",
    ),
    "another box for autoattack": (
        lambda: autoattack(network(), X, Y, Threat("linf", 0.1, -1, 1)),
        r"autoattack takes images .* and the box \[-1, 1\]",
    ),
    "x of autoattack": (lambda: autoattack(network(), 2 * X, Y, 0.1), "x must lie in the box"),
    "batch of autoattack": (
        lambda: autoattack(network(), X, Y, 0.1, batch=0),
        "batch must be an integer of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_argument_is_refused_with_its_name_and_value(name):
    attempt, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        attempt()


def test_autoattack_refuses_three_classes_and_leaves_the_model_as_it_was():
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="model must have 4 classes or more for autoattack, got 3"):
        autoattack(model, X, Y % 3, 0.1)
    assert model.training and all(p.requires_grad for p in model.parameters())


# --- on an accelerator ----------------------------------------------------------------------------


@pytest.mark.cuda
@both_norms
def test_on_cuda_the_attack_is_the_same_and_a_cpu_generator_serves(norm):
    model, threat = network(dtype=torch.float64), Threat(norm, EPS[norm])
    there = copy.deepcopy(model).cuda()
    x, y = X.double().cuda(), Y.cuda()
    for options in ({"random_start": False}, {"restarts": 2}):
        here = pgd(model, X.double(), Y, threat, generator=seeded(3), **options)
        found = pgd(there, x, y, threat, generator=seeded(3), **options)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), here)
    before = torch.cuda.get_rng_state()
    first = pgd(there, x, y, threat)
    assert torch.equal(pgd(there, x, y, threat), first)  # by default one on the device
    assert torch.equal(torch.cuda.get_rng_state(), before)
