"""Perturbation rules against independent formulas in float64, dual norms and invariances."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam_problem import Elsewhere, nothing_waits

from sam_lab import perturbations
from sam_lab.perturbations import (
    asam,
    awp,
    dithered,
    global_norm,
    is_weight,
    random_direction,
    sam,
    sam_linf,
    steepest,
    unnormalized,
)

RULES = {
    "sam": sam,
    "asam": asam,
    "sam_linf": sam_linf,
    "unnormalized": unnormalized,
    "awp": awp,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

seeds = st.integers(0, 2**32 - 1)
radii = st.floats(1e-3, 1e2)
shapes = st.lists(
    st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4
).filter(lambda several: any(math.prod(shape) for shape in several))


def drawn(shapes, seed, dtype=torch.float64, scale=1.0):
    """Weights and gradients, Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        [
            (factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for shape in shapes
        ]
        for factor in (1.0, scale)
    )


def direction(params, grads, rho, seed=0):
    return random_direction(params, grads, rho, generator=torch.Generator().manual_seed(seed))


def rounded(params, grads, rho, seed=0):
    return dithered(params, grads, rho, generator=torch.Generator().manual_seed(seed))


def flat(tensors):
    """One float64 vector of NumPy."""
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def by_hand(rule, params, grads, rho, eta=0.01):
    """The table of the module's docstring, written again."""
    g = flat(grads)
    if rule == "sam":
        return rho * g / np.sqrt((g**2).sum())
    if rule == "asam":
        T = np.concatenate(
            [abs(flat([p])) + eta if p.ndim > 1 else np.ones(p.numel()) for p in params]
        )
        return rho * T**2 * g / np.sqrt(((T * g) ** 2).sum())
    if rule == "awp":
        pairs = [(flat([p]), flat([g]), p.ndim > 1) for p, g in zip(params, grads, strict=True)]
        return np.concatenate(
            [
                rho * np.linalg.norm(w) * g / np.linalg.norm(g) if weight and len(g) else 0 * g
                for w, g, weight in pairs
            ]
        )
    return rho * (np.sign(g) if rule == "sam_linf" else g)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(shapes=shapes, seed=seeds, rho=radii, dtype=st.sampled_from(DTYPES))
def test_each_rule_is_its_formula(rule, shapes, seed, rho, dtype):
    params, grads = drawn(shapes, seed, dtype)
    epsilon = RULES[rule](params, grads, rho)
    assert [e.shape for e in epsilon] == [p.shape for p in params]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {e.dtype for e in epsilon} == {wide}
    tolerance = 100 * torch.finfo(wide).eps
    np.testing.assert_allclose(
        flat(epsilon), by_hand(rule, params, grads, rho), rtol=tolerance, atol=tolerance * rho
    )


@settings(deadline=None)
@given(shapes=shapes, seed=seeds, rho=radii)
def test_the_perturbation_attains_the_dual_norm_of_the_gradient(shapes, seed, rho):
    """It maximises the linearised loss over its set: the ball, the ellipsoid, the cube."""
    params, grads = drawn(shapes, seed)
    g, w = flat(grads), flat(params)
    T = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in params]) * (abs(w) + 0.01 - 1) + 1
    e = flat(sam(params, grads, rho))
    assert np.linalg.norm(e) == pytest.approx(rho)
    assert g @ e == pytest.approx(rho * np.linalg.norm(g))
    e = flat(asam(params, grads, rho))
    assert np.linalg.norm(e / T) == pytest.approx(rho)
    assert g @ e == pytest.approx(rho * np.linalg.norm(T * g))
    e = flat(sam_linf(params, grads, rho))
    assert abs(e).max() == rho
    assert g @ e == pytest.approx(rho * abs(g).sum())


@pytest.mark.parametrize("rule", ["sam", "asam", "sam_linf", "awp"])
@settings(deadline=None)
@given(shapes=shapes, seed=seeds, exponent=st.integers(-20, 30))
def test_a_loss_scale_changes_nothing(rule, shapes, seed, exponent):
    """What a GradScaler multiplies the loss with needs no undoing before the perturbation."""
    params, grads = drawn(shapes, seed, torch.float32)
    scaled = [g * 2.0**exponent for g in grads]
    for e, same in zip(
        RULES[rule](params, grads, 0.05), RULES[rule](params, scaled, 0.05), strict=True
    ):
        torch.testing.assert_close(e, same, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(shapes=shapes, seed=seeds, rho=radii)
def test_unnormalized_with_rho_over_the_norm_is_sam(shapes, seed, rho):
    params, grads = drawn(shapes, seed)
    norm = float(np.linalg.norm(flat(grads)))
    for e, same in zip(
        unnormalized(params, grads, rho / norm), sam(params, grads, rho), strict=True
    ):
        torch.testing.assert_close(e, same)


@settings(deadline=None)
@given(seed=seeds, factor=st.floats(0.05, 20.0))
def test_asam_without_eta_does_not_see_a_rescaling_of_a_relu_network(seed, factor):
    """(a W1, a b1, W2 / a) is the same function, and so is its loss at the perturbed weights."""
    generator = torch.Generator().manual_seed(seed)
    W1, b1, W2, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 4), (6,), (3, 6), (10, 4))
    )

    def perturbed_loss(rule, a):
        def loss(W1, b1, W2):
            return (torch.relu(x @ W1.T + b1) @ W2.T - 1).square().mean()

        weights = [w.clone().requires_grad_() for w in (a * W1, a * b1, W2 / a)]
        epsilon = rule(weights, torch.autograd.grad(loss(*weights), weights), 0.5)
        return loss(*(w + e for w, e in zip(weights, epsilon, strict=True))).item()

    every = partial(asam, eta=0.0, adaptive=lambda p: True)
    assert perturbed_loss(every, factor) == pytest.approx(perturbed_loss(every, 1.0))
    if not 0.5 < factor < 2:
        assert perturbed_loss(sam, factor) != pytest.approx(perturbed_loss(sam, 1.0))


def test_asam_adapts_weights_and_not_biases_unless_told_otherwise():
    """Trap: which parameters adapt moves the best rho several times over (davda54/sam#81, #37)."""
    params, grads = drawn([(3, 2), (3,)], 0)
    assert [is_weight(p) for p in params] == [True, False]
    weight, bias = asam(params, grads, 1.0)
    T = [params[0].abs() + 0.01, torch.ones(3, dtype=torch.float64)]
    length = math.hypot(*(float((t * g).norm()) for t, g in zip(T, grads, strict=True)))
    torch.testing.assert_close(weight, T[0] ** 2 * grads[0] / length)
    torch.testing.assert_close(bias, grads[1] / length)
    every = asam(params, grads, 1.0, eta=0.0, adaptive=lambda p: True)
    length = float(np.linalg.norm(flat(params) * flat(grads)))
    torch.testing.assert_close(every[1], params[1] ** 2 * grads[1] / length)
    none = asam(params, grads, 1.0, adaptive=lambda p: False)
    for e, same in zip(none, sam(params, grads, 1.0), strict=True):
        assert torch.equal(e, same)


@pytest.mark.parametrize("eta", [-0.01, math.nan])
def test_asam_refuses_an_eta_that_is_no_length(eta):
    with pytest.raises(ValueError, match=f"eta must be at least 0, got {eta}"):
        asam([torch.ones(2)], [torch.ones(2)], 0.1, eta=eta)


def test_asam_without_eta_leaves_zero_weights_where_they_are():
    params, grads = [torch.tensor([[0.0, 2.0]])], [torch.tensor([[5.0, 1.0]])]
    torch.testing.assert_close(asam(params, grads, 0.5, eta=0.0), [torch.tensor([[0.0, 1.0]])])
    assert not asam([torch.zeros(2, 2)], [torch.ones(2, 2)], 0.5, eta=0.0)[0].any()


# --- random directions ------------------------------------------------------------------------


@settings(deadline=None)
@given(shapes=shapes, seed=seeds, rho=radii, dtype=st.sampled_from(DTYPES))
def test_a_random_direction_has_length_rho_and_does_not_look_at_the_gradient(
    shapes, seed, rho, dtype
):
    params, grads = drawn(shapes, seed, dtype)
    one = direction(params, grads, rho, seed)
    other = direction(params, [g.neg().exp() for g in grads], rho, seed)
    assert np.linalg.norm(flat(one)) == pytest.approx(rho, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_generator_in_the_same_state_draws_the_same_direction_whatever_happened_to_the_step():
    generator, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    params, grads = drawn([(4, 2), (4,)], 0)
    unusable = [torch.full_like(g, math.inf) for g in grads]
    random_direction(params, grads, 0.1, generator=generator)
    random_direction(params, unusable, 0.1, generator=other)  # draws as many numbers
    for a, b in zip(
        random_direction(params, grads, 0.1, generator=generator),
        random_direction(params, grads, 0.1, generator=other),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert not torch.equal(
        random_direction(params, grads, 0.1, generator=generator)[0],
        random_direction(params, grads, 0.1, generator=generator)[0],
    )


def test_random_directions_are_blind_in_many_dimensions():
    """Cosines with a fixed direction are Gaussian with variance 1/P: mean 0, not one of 200 big."""
    params, grads = drawn([(100, 40)], 0)
    g = flat(grads) / np.linalg.norm(flat(grads))
    cosines = np.array([g @ flat(direction(params, grads, 1.0, seed)) for seed in range(200)])
    deviations = cosines * np.sqrt(g.size)
    assert abs(deviations.mean()) < 5 / np.sqrt(200)
    assert deviations.std() == pytest.approx(1, abs=0.25)
    assert abs(deviations).max() < 6


def test_a_random_direction_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    direction(*drawn([(3,)], 0), 0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_direction_of_sharded_parameters_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    p = torch.ones(3).as_subclass(Sharded)
    with pytest.raises(TypeError, match="random_direction does not know sharded"):
        direction([p], [torch.ones(3)], 0.1)


# --- one ball, or one each ---------------------------------------------------------------------


def one_each(g, norm=2):
    """The length of each example of a gradient, (N, 1, ..., 1)."""
    flat = torch.linalg.vector_norm(g.reshape(len(g), -1), norm, dim=1)
    return flat.reshape(-1, *[1] * (g.ndim - 1))


@pytest.mark.parametrize(("norm", "rule"), [("l2", sam), ("linf", sam_linf)])
@settings(deadline=None)
@given(seed=seeds, shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), rho=radii)
def test_in_a_ball_each_every_example_steps_as_if_it_were_alone(norm, rule, seed, shape, rho):
    """The step of SAM and that of an attack are one function."""
    _, (g,) = drawn([shape], seed)
    (step,) = steepest([g], rho, one_each(g), norm)
    assert step.shape == g.shape
    for alone, part in zip(step, g, strict=True):
        torch.testing.assert_close(alone, rule([part], [part], rho)[0])
    (together,) = steepest([g], rho, g.norm(), norm)
    torch.testing.assert_close(together, rule([g], [g], rho)[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_an_example_without_a_usable_gradient_stays_and_holds_no_other_back(norm, bad):
    _, (g,) = drawn([(3, 2, 2)], 0)
    g[1] = 0.0
    g[1, 0, 1] = bad
    (step,) = steepest([g], 0.5, one_each(g), norm)
    assert torch.equal(step[1], torch.zeros(2, 2, dtype=g.dtype))
    size = torch.linalg.vector_norm(step.flatten(1), 2 if norm == "l2" else math.inf, dim=1)
    assert size.tolist() == pytest.approx([0.5, 0.0, 0.5])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_each_tensor_may_have_its_radius_where_each_example_has_its_ball(norm):
    _, (g,) = drawn([(3, 4)], 0)
    length = one_each(g)
    steps = steepest([g, g, -g], [0.5, 0.0, 2.0], length, norm)
    (unit,) = steepest([g], 1.0, length, norm)
    for step, factor in zip(steps, (0.5, 0.0, -2.0), strict=True):
        torch.testing.assert_close(step, factor * unit)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_length_of_an_example_is_read_by_the_host(norm):
    g = torch.ones(3, 2, device="meta")
    (step,) = steepest([g], 0.1, one_each(g), norm)
    assert step.shape == g.shape and step.device.type == "meta"


@pytest.mark.parametrize("norm", ["L2", 2, "l1", None])
def test_a_ball_of_an_unknown_norm_is_refused(norm):
    with pytest.raises(ValueError, match=f"norm must be one of l2, linf, got {norm!r}"):
        steepest([torch.ones(2)], 0.1, torch.ones(()), norm)


def test_awp_has_a_ball_for_each_weight_as_large_as_the_weight_is_long():
    w1, w2 = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]])
    g1, g2 = torch.tensor([[0.0, -7.0]]), torch.tensor([[30.0], [40.0]])
    e1, e2 = awp([w1, w2], [g1, g2], 0.1)
    torch.testing.assert_close(e1, torch.tensor([[0.0, -0.5]]))
    torch.testing.assert_close(e2, torch.tensor([[0.12], [0.16]]))


def test_awp_leaves_biases_and_scales_where_they_are():
    bias, grad = torch.ones(3), torch.ones(3)
    assert awp([bias], [grad], 0.1)[0].tolist() == [0, 0, 0]


def test_awp_leaves_a_weight_without_a_gradient_where_it_is_and_moves_the_others():
    w = torch.ones(2, 2)
    still, moved = awp([w, w], [torch.zeros(2, 2), w], 0.1)
    assert not still.any() and moved.norm().item() == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(deadline=None)
@given(shapes=shapes, seed=seeds, rho=radii)
def test_dithered_leads_to_a_neighbour_of_where_the_rule_leads(dtype, shapes, seed, rho):
    params, grads = drawn(shapes, seed, dtype)
    exact = RULES["asam"](params, grads, rho)
    found = dithered(params, grads, rho, rule=asam, generator=torch.Generator().manual_seed(seed))
    for p, e, exact_e in zip(params, found, exact, strict=True):
        there, wanted = p.clone().add_(e), p.float() + exact_e
        unit = wanted.abs().clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        assert ((there.float() - wanted).abs() <= unit).all()


def test_dithered_leaves_other_precisions_to_the_rule():
    params, grads = drawn([(2, 3)], 0, torch.float32)
    (e,) = rounded(params, grads, 0.1)
    assert torch.equal(e, sam(params, grads, 0.1)[0])


# --- what all rules keep ----------------------------------------------------------------------

every_rule = pytest.mark.parametrize(
    "rule", [*RULES.values(), direction, rounded], ids=lambda f: f.__name__
)


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_zero_or_not_finite_gives_zeros(rule, dtype, bad):
    """Trap: 0 * inf and 0 * nan are NaN, so zeros have to be selected (optax pick_one)."""
    params, grads = drawn([(2, 3), (3,), ()], 0, dtype)
    if bad == 0:
        grads = [torch.zeros_like(g) for g in grads]
    else:
        grads[1][1] = bad
        grads[0][0] = 0.0
    for e in rule(params, grads, 0.1):
        assert torch.equal(e, torch.zeros_like(e))


@every_rule
@pytest.mark.parametrize("bad", [0.0, 1.0, math.inf, math.nan])
def test_the_same_holds_on_an_accelerator_where_nobody_knows_the_norm(rule, bad, monkeypatch):
    params, grads = drawn([(2, 3), (3,), ()], 0, torch.float32)
    grads[0][0], grads[1][1] = 0.0, bad
    grads = [bad * g for g in grads] if bad == 0 else grads
    here = rule(params, grads, 0.1)
    norm = perturbations.global_norm
    monkeypatch.setattr(perturbations, "global_norm", lambda ts: norm(ts).as_subclass(Elsewhere))
    for e, same in zip(rule(params, grads, 0.1), here, strict=True):
        assert torch.equal(e.as_subclass(torch.Tensor), same)


@every_rule
def test_neither_weights_nor_gradients_are_written_to(rule):
    params, grads = drawn([(2, 3), (3,)], 0)
    before = [(t.clone(), t._version) for t in params + grads]
    epsilon = rule(params, grads, 0.1)
    with torch.no_grad():
        for e in epsilon:
            e.fill_(7.0)  # nor are they what comes out
    for t, (value, version) in zip(params + grads, before, strict=True):
        assert torch.equal(t, value) and t._version == version


@every_rule
def test_nothing_is_recorded_for_autograd(rule):
    params, grads = drawn([(2, 3)], 0)
    assert not rule([params[0].requires_grad_()], [grads[0].requires_grad_()], 0.1)[0].requires_grad


@every_rule
def test_a_radius_for_each_tensor_scales_its_part(rule):
    params, grads = drawn([(2, 3), (3,), (2,)], 0)
    whole = rule(params, grads, 1.0)
    parts = rule(params, grads, [0.5, 2.0, 0.0])
    for e, part, rho in zip(whole, parts, (0.5, 2.0, 0.0), strict=True):
        torch.testing.assert_close(part, rho * e)


@every_rule
def test_a_radius_too_many_is_an_error(rule):
    with pytest.raises(ValueError, match="zip"):
        rule(*drawn([(2,), (2,)], 0), [0.5, 2.0, 0.0])


@every_rule
def test_no_value_is_read_by_the_host(rule):
    """Tensors on the meta device have none: reading one, as `if norm > 0`, is an error."""
    params = [torch.ones(2, 3, device="meta"), torch.ones(3, device="meta", dtype=torch.bfloat16)]
    epsilon = rule(params, params, [0.1, 0.2])
    assert [(e.device.type, e.dtype) for e in epsilon] == [("meta", torch.float32)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2.0**-24, 1e-6, 1.0, 6e4])
def test_half_precision_gradients_of_any_size_give_the_radius(dtype, size):
    """Trap: in float16, 1e-12 is 0 and rho / 1e-12 is infinite (Jannoshh/simple-sam#5)."""
    grads = [torch.full((300,), size, dtype=dtype), torch.zeros(3, dtype=dtype)]
    for rule in (sam, partial(asam, eta=0.0)):
        epsilon = rule([torch.ones_like(g) for g in grads], grads, 0.05)
        assert np.linalg.norm(flat(epsilon)) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@settings(deadline=None)
@given(exponent=st.floats(-320, 308))
def test_gradients_of_any_size_give_the_radius_or_nothing(dtype, shape, exponent):
    """Never NaN or infinity, also where squares or rho / |g| leave the range of the numbers."""
    g = torch.full(shape, min(10.0**exponent, torch.finfo(dtype).max), dtype=dtype)
    for rule in (sam, asam, direction):
        length = np.linalg.norm(flat(rule([torch.ones(shape, dtype=dtype)], [g], 0.05)))
        if -15 < exponent < 15:
            assert length > 0.04
        assert length == 0 or 0.04 < length < 0.06


def test_tensors_of_several_precisions_have_one_norm():
    params, grads = zip(*(drawn([(5,)], i, dtype) for i, dtype in enumerate(DTYPES)), strict=True)
    grads = [g for (g,) in grads]
    assert float(global_norm(grads)) == pytest.approx(np.linalg.norm(flat(grads)), rel=1e-6)
    epsilon = sam([p for (p,) in params], grads, 0.1)
    assert np.linalg.norm(flat(epsilon)) == pytest.approx(0.1, rel=1e-6)


@settings(deadline=None)
@given(shapes=shapes, seed=seeds)
def test_the_norm_is_that_of_all_entries(shapes, seed):
    tensors, _ = drawn(shapes, seed)
    norm = global_norm(tensors)
    assert norm.shape == () and norm.dtype == torch.float64
    assert float(norm) == pytest.approx(math.sqrt(sum(x * x for x in flat(tensors))))


def test_the_norm_of_half_precision_is_taken_in_float32():
    halves = [torch.full((100,), 6e4, dtype=torch.float16)]
    assert global_norm(halves).dtype == torch.float32
    assert float(global_norm(halves)) == pytest.approx(6e5, rel=1e-3)


def test_the_norm_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one tensor, got none"):
        global_norm([])


@pytest.mark.cuda
def test_on_cuda_nothing_waits_for_the_device_and_a_cpu_generator_draws_the_same():
    params, grads = drawn([(3, 2), (4,)], 0, torch.float32)
    there = [[t.cuda() for t in tensors] for tensors in (params, grads)]
    with nothing_waits():
        epsilons = {name: rule(*there, 0.1) for name, rule in RULES.items()}
    for name, epsilon in epsilons.items():
        for e, here in zip(epsilon, RULES[name](params, grads, 0.1), strict=True):
            torch.testing.assert_close(e.cpu(), here)
    for e, here in zip(direction(*there, 0.1), direction(params, grads, 0.1), strict=True):
        torch.testing.assert_close(e.cpu(), here)
