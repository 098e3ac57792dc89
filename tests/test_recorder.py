"""The recorder against dense linear algebra and closed forms, and that it disturbs nothing."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sam_lab import (
    SAM,
    EdgeRecorder,
    Hessian,
    SharpnessTracker,
    gd_edge,
    heavy_ball_edge,
    sam_edge,
)
from sam_lab.methods import gradient_penalty, gsam, vasso, wsam
from sam_lab.perturbations import asam, random_direction, unnormalized
from sam_lab.perturbations import sam as sam_rule
from sam_lab.recorder import BATCH_COLUMNS, COLUMNS, batch_sharpness


def network(seed=0, batchnorm=False, dropout=False):
    """A small float64 network, and its squared error on fixed data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 5), nn.Tanh()]
    layers += [nn.BatchNorm1d(5)] * batchnorm + [nn.Dropout(0.3)] * dropout
    model = nn.Sequential(*layers, nn.Linear(5, 2)).double()
    return model, lambda: nn.functional.mse_loss(model(x), y)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def gradient(loss, params):
    return flat(torch.autograd.grad(loss(), params))


def dense_hessian(loss, params):
    rows = []
    grads = flat(torch.autograd.grad(loss(), params, create_graph=True))
    for g in grads:
        rows.append(flat(torch.autograd.grad(g, params, retain_graph=True)))
    return torch.stack(rows)


def quadratic(curvatures, start, lr=0.1, rho=0.0, **kw):
    h = torch.tensor(curvatures, dtype=torch.float64)
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    sam = SAM(torch.optim.SGD([w], lr=lr, **kw), rho)
    return w, sam, lambda: 0.5 * (h * w * w).sum()


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_measurement_agrees_with_dense_linear_algebra(rho):
    model, loss = network()
    params = list(model.parameters())
    sam = SAM(torch.optim.SGD(params, lr=0.2), rho)
    record = EdgeRecorder(sam, loss, tol=1e-8)
    for _ in range(3):
        sam.step(loss)
    record()

    g, hessian = gradient(loss, params), dense_hessian(loss, params)
    values, vectors = torch.linalg.eigh(hessian)
    v = vectors[:, -1]
    epsilon = rho * g / g.norm()
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, part in zip(params, epsilon.split([p.numel() for p in params]), strict=True):
            p += part.view_as(p)
    above = gradient(loss, params)
    with torch.no_grad():
        for p, q in zip(params, start, strict=True):
            p.copy_(q)

    expected = {
        "step": 3,
        "loss": loss().item(),
        "sharpness": values[-1].item(),
        "grad_norm": g.norm().item(),
        "gd_edge": 10.0,
        "sam_edge": sam_edge(0.2, rho, g.norm().item()),
        "grad_align": abs(g @ v / g.norm()).item(),
        "sam_align": abs(above @ v / above.norm()).item(),
        "rayleigh": (g @ hessian @ g / (g @ g)).item(),
    }
    for name, value in expected.items():
        assert record.columns[name] == [pytest.approx(value, rel=1e-6)], name
    assert record["residual"][0] <= 1e-7 * values[-1]


def test_every_is_counted_in_steps_of_the_optimizer_wherever_the_call_stands():
    _w, sam, loss = quadratic([2.0, 1.0], [1.0, 1.0], rho=0.1)
    before, after = EdgeRecorder(sam, loss, every=3), EdgeRecorder(sam, loss, every=3)
    for _ in range(7):
        before()
        before()  # at the same step: nothing new
        sam.step(loss)
        after()
    assert before.columns["step"] == [0, 3, 6]
    assert after.columns["step"] == [3, 6]
    after(now=True)
    after(now=True)
    assert after.columns["step"] == [3, 6, 7]
    assert len(after) == 3
    assert set(after.columns) == set(COLUMNS)


def trajectory(recorded, batchnorm=True):
    """Weights, buffers, gradients and next random numbers after a run of SAM with momentum."""
    model, loss = network(seed=1, batchnorm=batchnorm, dropout=True)
    torch.manual_seed(5)
    np.random.seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    sam = SAM(optimizer, 0.1, model)
    record = EdgeRecorder(sam, loss, every=2)
    for _ in range(6):
        sam.step(loss)
        if recorded:
            record()
    left = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    return [t.clone() for t in left], torch.rand(3), np.random.rand(3), record


def test_training_is_the_same_bit_for_bit_with_and_without_a_recorder():
    with_it, torch_with, numpy_with, record = trajectory(True)
    without, torch_without, numpy_without, _ = trajectory(False)
    assert len(record) == 3
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert torch.equal(torch_with, torch_without)
    assert np.array_equal(numpy_with, numpy_without)


def test_a_random_rule_is_not_moved_and_has_no_known_edge():
    def run(recorded):
        w, _, loss = quadratic([2.0, 1.0], [1.0, 1.0])
        generator = torch.Generator().manual_seed(0)
        sam = SAM(torch.optim.SGD([w], lr=0.1), 0.1, rule=random_direction, generator=generator)
        record = EdgeRecorder(sam, loss)
        for _ in range(3):
            sam.step(loss)
            if recorded:
                record()
        return w.detach().clone(), record

    (with_it, record), (without, _) = run(True), run(False)
    assert torch.equal(with_it, without)
    assert np.isnan(record["sam_edge"]).all()
    assert np.isnan(record["sam_align"]).all()
    assert record["gd_edge"].tolist() == [20.0] * 3


def test_asam_has_an_aligned_gradient_but_no_known_edge():
    w, _, loss = quadratic([2.0, 1.0], [1.0, 1.0])
    record = EdgeRecorder(SAM(torch.optim.SGD([w], lr=0.1), 0.1, rule=asam), loss)
    record()
    assert math.isnan(record["sam_edge"][0])
    assert 0 < record["sam_align"][0] <= 1


def with_method(method, rho=0.5, rule=sam_rule):
    w, _, loss = quadratic([2.0, 1.0], [3.0, 1.0])
    sam = SAM(torch.optim.SGD([w], lr=0.5), rho, rule=rule, method=method)
    return sam, loss, EdgeRecorder(sam, loss)


@pytest.mark.parametrize(
    ("method", "radius"),
    [
        (gsam, 0.5),
        (partial(gsam, alpha=0.2), 0.5),
        (wsam, 4.5),
        (partial(wsam, gamma=0.25), 0.5 / 3),
        (partial(wsam, gamma=0.0), 0.0),
        (partial(gradient_penalty, lam=0.3), 0.3),
    ],
)
def test_a_method_whose_edge_is_known_has_it_and_comes_to_rest_there(method, radius):
    sam, loss, record = with_method(method)
    for _ in range(60):
        record()
        sam.step(loss)
    expected = [sam_edge(0.5, radius, norm) if radius else 4.0 for norm in record["grad_norm"]]
    assert record["sam_edge"].tolist() == pytest.approx(expected)
    if radius:
        assert record["sharpness"][-1] / record["sam_edge"][-1] == pytest.approx(1.0, rel=1e-3)
    assert np.isnan(record["sam_align"]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"method": vasso},
        {"method": partial(gsam, minimize_fp=False)},
        {"method": gsam, "rule": asam},
        {"method": lambda look, state: (look(), state)},
    ],
)
def test_for_other_methods_no_edge_is_known(options):
    sam, loss, record = with_method(**options)
    record()
    assert math.isnan(record["sam_edge"][0]) and record["gd_edge"][0] == 4.0
    sam.rho = 0.0
    sam.step(loss)
    record()
    assert record["sam_edge"][1] == 4.0


def test_a_plain_optimizer_is_sam_with_radius_zero():
    model, loss = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    record = EdgeRecorder(optimizer, loss)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        record()
    assert record.columns["step"] == [1, 2]
    assert record.columns["sam_edge"] == record.columns["gd_edge"] == [10.0, 10.0]
    assert record["sam_align"] == pytest.approx(record["grad_align"])


def test_the_edges_are_those_of_the_optimizers_present_settings():
    _w, sam, loss = quadratic([2.0, 1.0], [1.0, 1.0], lr=0.1, momentum=0.5)
    sam.rho = lambda step: 0.0 if step < 2 else 0.4
    record = EdgeRecorder(sam, loss)
    record()
    sam.step(loss)
    sam.optimizer.param_groups[0]["lr"] = 0.2
    record()
    sam.step(loss)
    record()
    assert record["gd_edge"].tolist() == pytest.approx(
        [heavy_ball_edge(0.1, 0.5), *[heavy_ball_edge(0.2, 0.5)] * 2]
    )
    assert record["sam_edge"][:2].tolist() == record["gd_edge"][:2].tolist()
    assert record["sam_edge"][2] == pytest.approx(sam_edge(0.2 / 1.5, 0.4, record["grad_norm"][2]))


def test_unnormalized_sam_has_the_edge_of_a_gradient_of_length_one():
    w, _, loss = quadratic([2.0, 1.0], [3.0, 1.0])
    record = EdgeRecorder(SAM(torch.optim.SGD([w], lr=0.1), 0.2, rule=unnormalized), loss)
    record()
    assert record["sam_edge"][0] == pytest.approx(sam_edge(0.1, 0.2, 1.0))


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_weight_decay_lowers_the_edge_by_its_coefficient(momentum):
    decay, lr = 0.7, 0.5

    def grows(curvature):
        w, sam, loss = quadratic([curvature], [1.0], lr=lr, weight_decay=decay, momentum=momentum)
        for _ in range(400):
            sam.step(loss)
        return abs(w.item()) > 1

    _w, sam, loss = quadratic([1.0], [1.0], lr=lr, weight_decay=decay, momentum=momentum)
    record = EdgeRecorder(sam, loss)
    record()
    edge = record["gd_edge"][0]
    assert edge == pytest.approx(heavy_ball_edge(lr, momentum) - decay)
    assert grows(1.02 * edge)
    assert not grows(0.98 * edge)


def test_a_vanished_gradient_is_recorded_without_angles():
    _w, sam, loss = quadratic([2.0, 1.0], [0.0, 0.0], rho=0.1)
    record = EdgeRecorder(sam, loss)
    record()
    assert record["sharpness"][0] == pytest.approx(2.0)
    assert record["sam_edge"][0] == 0.0
    assert math.isnan(record["grad_align"][0])
    assert math.isnan(record["rayleigh"][0])


def test_a_ready_hessian_over_batches_serves_as_the_closure():
    model, _ = network()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(10, 2, generator=generator, dtype=torch.float64)

    def loss_fn(x, y):
        return nn.functional.mse_loss(model(x), y)

    params = list(model.parameters())
    sam = SAM(torch.optim.SGD(params, lr=0.1), 0.2)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    parts = EdgeRecorder(sam, Hessian.over(batches, loss_fn, params), tol=1e-8)
    whole = EdgeRecorder(sam, lambda: loss_fn(x, y), tol=1e-8)
    parts()
    whole()
    for name in COLUMNS:
        if name != "residual":
            assert parts[name] == pytest.approx(whole[name], rel=1e-6), name


def test_a_closure_that_reads_the_current_batch_is_seen_anew():
    w, sam, _ = quadratic([1.0, 1.0], [1.0, 1.0])
    scale = [1.0]
    record = EdgeRecorder(sam, lambda: scale[0] * (3 * w[0] ** 2 + w[1] ** 2))
    record(now=True)
    scale[0] = 2.0
    sam.step(lambda: w.sum())
    record()
    assert record["sharpness"].tolist() == pytest.approx([6.0, 12.0])
    assert record["loss"][0] == pytest.approx(4.0)


def test_the_share_of_time_lies_between_none_and_all_of_it():
    _w, sam, loss = quadratic([2.0, 1.0], [1.0, 1.0])
    record = EdgeRecorder(sam, loss)
    assert record.share == 0
    record()
    assert 0 < record.share < 1
    assert record.seconds > 0


def test_a_fault_in_the_loss_leaves_weights_columns_and_recorder_usable():
    w, sam, loss = quadratic([2.0, 1.0], [1.0, 1.0], rho=0.1)
    calls = []

    def failing():
        calls.append(1)
        if broken and len(calls) >= broken[0]:
            raise OSError("disk")
        return loss()

    broken = []
    record = EdgeRecorder(sam, failing)
    record()
    total = len(calls)
    for after in range(1, total + 1):  # at every evaluation of a measurement, the perturbed one too
        sam.step(loss)
        held = w.detach().clone()
        columns = {name: list(values) for name, values in record.columns.items()}
        calls.clear()
        broken[:] = [after]
        try:
            record()
        except OSError:
            assert record.columns == columns
        assert torch.equal(w, held)
        broken.clear()
        record()
        assert record.columns["step"][-1] == sam.steps


def test_a_run_that_has_diverged_is_an_error():
    _w, sam, loss = quadratic([2.0, 1.0], [1.0, math.inf])
    with pytest.raises(FloatingPointError, match="not finite"):
        EdgeRecorder(sam, loss)()


def made(optimizer=None, **kw):
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1) if optimizer is None else optimizer(w)
    return EdgeRecorder(optimizer, kw.pop("closure", lambda: (w**2).sum()), **kw)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: made(lambda w: torch.optim.Adam([w])), TypeError, "for Adam"),
        (lambda: made(lambda w: SAM(torch.optim.Adam([w]))), TypeError, "for Adam"),
        (lambda: made(lambda w: "sgd"), TypeError, "for str"),
        (
            lambda: made(lambda w: torch.optim.SGD([w], 0.1, momentum=0.9, nesterov=True)),
            ValueError,
            "nesterov=True",
        ),
        (
            lambda: made(lambda w: torch.optim.SGD([w], 0.1, momentum=0.9, dampening=0.5)),
            ValueError,
            "dampening=0.5",
        ),
        (lambda: made(lambda w: torch.optim.SGD([w], 0.1, maximize=True)), ValueError, "maximize"),
        (
            lambda: made(lambda w: torch.optim.SGD([w], 1.0, weight_decay=3.0)),
            ValueError,
            "weight_decay must be below the edge, 2, got 3",
        ),
        (lambda: made(every=0), ValueError, "every"),
        (lambda: made(tol=0.0), ValueError, "tol"),
        (lambda: made(closure=3), TypeError, "closure"),
        (
            lambda: made(closure=Hessian(lambda: torch.ones(1), [torch.ones(1).requires_grad_()])),
            ValueError,
            "optimizer's parameters",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_hessian_and_a_model_are_one_model_too_many():
    model, loss = network()
    hessian = Hessian(loss, model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="brings its own model"):
        EdgeRecorder(optimizer, hessian, model=model)


def test_groups_that_differ_have_no_common_edge():
    a, b = (torch.ones(1, requires_grad=True) for _ in "ab")
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]
    with pytest.raises(ValueError, match=r"one lr for all parameters, got \[0.1, 0.2\]"):
        EdgeRecorder(torch.optim.SGD(groups, lr=0.1), lambda: (a + b).sum())
    groups = [{"params": [a], "rho": 0.1}, {"params": [b]}]
    with pytest.raises(ValueError, match="one rho"):
        EdgeRecorder(SAM(torch.optim.SGD(groups, lr=0.1), 0.3), lambda: (a + b).sum())


@pytest.mark.slow
def test_on_a_fixed_quadratic_sam_comes_to_its_edge_and_gradient_descent_does_not():
    _w, sam, loss = quadratic([4.0, 1.0, 0.2], [1.0, 1.0, 1.0], lr=0.2, rho=0.5)
    record = EdgeRecorder(sam, loss, every=10, tol=1e-6)
    for _ in range(2000):
        sam.step(loss)
        record()
    assert record["sharpness"][-1] / record["sam_edge"][-1] == pytest.approx(1, abs=1e-5)
    assert record["gd_edge"][-1] == gd_edge(0.2)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_what_a_saved_recorder_records_goes_on_bit_for_bit(k, tmp_path):
    def begun():
        model, loss = network(seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        sam = SAM(optimizer, 0.2, model)
        record = EdgeRecorder(sam, loss, every=2)
        # one of its own, to see that of several vectors too
        return model, loss, sam, record, SharpnessTracker(loss, sam.params, k=k, audit_every=3)

    def go_on(loss, sam, record, tracker, steps):
        found = []
        for _ in range(steps):
            record()
            found.append(tracker.measure())
            sam.step(loss)
        return found

    model, *whole = begun()
    go_on(*whole, steps=7)
    path = tmp_path / "checkpoint.pt"
    states = [each.state_dict() for each in (model, *whole[1:])]
    torch.save(states, path)
    last = go_on(*whole, steps=8)

    model, *other = begun()
    states = torch.load(path, weights_only=True)
    for each, state in zip((model, *other[1:]), states, strict=True):
        each.load_state_dict(state)
    for one, two in zip(go_on(*other, steps=8), last, strict=True):
        assert torch.equal(one.values, two.values) and torch.equal(one.vectors, two.vectors)
        assert (one.hvps, one.crossing) == (two.hvps, two.crossing)
    (*_, record, tracker), (*_, first, followed) = other, whole
    assert record.columns == first.columns and len(record) == 8
    counts = [(t.measurements, t.hvps, t.audits, t.audit_hvps) for t in (tracker, followed)]
    assert counts[0] == counts[1] and counts[0][0] == 15 and counts[0][2] == 4


def test_a_state_is_a_copy_of_the_columns():
    model, loss = network()
    record = EdgeRecorder(torch.optim.SGD(model.parameters(), lr=0.1), loss)
    record()
    state = record.state_dict()
    record(now=True)
    record.sam.step(loss)
    record()
    assert len(state["columns"]["loss"]) == 1 and len(record) == 2
    record.load_state_dict(state)
    record.columns["loss"].append(0.0)
    assert len(state["columns"]["loss"]) == 1


def test_a_state_of_something_else_is_refused_and_nothing_is_loaded():
    _, sam, loss = quadratic([3.0, 1.0], [1.0, 1.0])
    record = EdgeRecorder(sam, loss)
    record()
    good = record.state_dict()
    of_three = quadratic([3.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    other = EdgeRecorder(of_three[1], of_three[2])
    other()
    cases = [
        (None, "columns', 'tracker'], got NoneType"),
        ({"columns": {}}, "got .'columns'."),
        ({**good, "columns": {"loss": []}}, "has the columns .'loss'., and this recorder"),
        (other.state_dict(), "of 3 parameters, and this tracker has 2"),
        ({**good, "tracker": {"counts": 3}}, "must have the keys"),
        ({**good, "tracker": 3}, "got int"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            record.load_state_dict(state)
        assert record.columns == good["columns"] and record.tracker.measurements == 1
    sam.step(loss)
    record()
    assert len(record) == 2


# --- batch sharpness -----------------------------------------------------------------------------


def on_batches(model, size, count=4):
    """The losses of some batches, each of its own data."""
    generator = torch.Generator().manual_seed(9)

    def closure():
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        y = torch.randn(size, 2, generator=generator, dtype=torch.float64)
        return lambda: nn.functional.mse_loss(model(x), y)

    return [closure() for _ in range(count)]


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_batch_sharpness_is_the_ratio_of_means_by_dense_linear_algebra(rho):
    model, _ = network()
    params = list(model.parameters())
    closures = on_batches(model, 3)
    bends, slopes = [], []
    for closure in closures:
        g, hessian = gradient(closure, params), dense_hessian(closure, params)
        moved = (rho * g / g.norm()).split([p.numel() for p in params])
        with torch.no_grad():
            for p, part in zip(params, moved, strict=True):
                p += part.view_as(p)
        s = gradient(closure, params)
        with torch.no_grad():
            for p, part in zip(params, moved, strict=True):
                p -= part.view_as(p)
        bends.append((s @ hessian @ s).item())
        slopes.append((s @ g).item())
    found = batch_sharpness(SAM(torch.optim.SGD(params, lr=0.1), rho), closures)
    assert found.value == pytest.approx(sum(bends) / sum(slopes), rel=1e-6)
    # the jackknife's error of the ratio, which agrees to first order
    left = [(sum(bends) - b) / (sum(slopes) - s) for b, s in zip(bends, slopes, strict=True)]
    assert found.stderr == pytest.approx(math.sqrt(3 * np.var(left)), rel=0.5)


@pytest.mark.parametrize("rho", [0.0, 0.4])
def test_with_one_batch_along_an_eigenvector_it_is_2_over_lr_at_the_edge_of_the_optimizer(rho):
    lr, start = 0.25, 0.3
    curvature = 1.0
    for _ in range(200):  # the curvature that is its own edge
        curvature = sam_edge(lr, rho, curvature * start)
    _w, sam, loss = quadratic([curvature, 0.5], [start, 0.0], lr, rho)
    assert batch_sharpness(sam, [loss]).value == pytest.approx(2 / lr, rel=1e-6)
    assert math.isnan(batch_sharpness(sam, [loss]).stderr)


def test_at_batch_sharpness_2_over_lr_steps_keep_the_loss_of_their_own_batch_on_average():
    """Quadratic losses, where the second order is all there is."""
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    closures = [lambda x=x: 0.5 * (x @ w).square().mean() for x in xs]
    for rho in (0.0, 0.2):
        found = batch_sharpness(SAM(torch.optim.SGD([w], lr=1.0), rho), closures).value
        changes = []
        for closure in closures:
            before, kept = closure().item(), w.detach().clone()
            SAM(torch.optim.SGD([w], lr=2 / found), rho).step(closure)
            changes.append(closure().item() - before)
            w.data.copy_(kept)
        assert sum(changes) == pytest.approx(0, abs=1e-6)


def test_the_recorder_measures_it_where_it_is_given_batches_and_disturbs_nothing():
    def run(batches):
        model, loss = network(batchnorm=True)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.05), 0.1, model)
        given = (lambda: on_batches(model, 3)) if batches else None
        record = EdgeRecorder(sam, loss, every=2, batches=given)
        for _ in range(4):
            record()
            sam.step(loss)
        return [t.clone() for t in model.state_dict().values()], record, model, sam

    with_it, record, model, sam = run(True)
    without, other, _, _ = run(False)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert set(record.columns) == {*COLUMNS, *BATCH_COLUMNS} and set(other.columns) == set(COLUMNS)
    for name in COLUMNS:
        assert record.columns[name] == other.columns[name]
    record(now=True)
    expected = batch_sharpness(sam, on_batches(model, 3), model)
    assert record["batch_sharpness"][-1] == expected.value
    assert record["batch_sharpness_stderr"][-1] == expected.stderr


def test_batch_sharpness_refuses_what_it_cannot_know():
    w, sam, loss = quadratic([2.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="at least one batch"):
        batch_sharpness(sam, [])
    drawing = SAM(
        torch.optim.SGD([w], lr=0.1), 0.1, rule=random_direction, generator=torch.Generator()
    )
    with pytest.raises(ValueError, match="neither draws nor has a state"):
        batch_sharpness(drawing, [loss])
    record = EdgeRecorder(drawing, loss, batches=lambda: [loss])
    record()
    assert math.isnan(record["batch_sharpness"][0])
    with pytest.raises(TypeError, match="batches must be a function"):
        EdgeRecorder(sam, loss, batches=[loss])
