"""The toys: the valley and the bound against arithmetic, the claims against runs by hand."""

import dataclasses
import math

import numpy as np
import pytest
from claims_contract import check_statistics, run_of, seed_runs

from sam_lab.experiments import Cell
from sam_lab.experiments.late import late_toys

TINY = dataclasses.replace(
    late_toys.LAPTOP,
    valleys=40,
    radii=(0.0, 0.1, 1.5),
    steps=60,
    examples=3,
    dim=6,
    most=300,
    moments=8,
)


def test_the_valley_has_its_curvature_at_the_minimum_its_ridges_at_two_and_is_sub_quadratic():
    assert late_toys.slope(1e-6) == pytest.approx(1e-6)
    assert late_toys.slope(late_toys.RIDGE) == pytest.approx(0, abs=1e-12)
    w = np.linspace(-2, 2, 101)
    assert (np.abs(late_toys.slope(w)) <= np.abs(w) + 1e-12).all()


def test_a_step_in_the_valley_is_sam_by_hand():
    inside = -0.5 - 1.5 * 2 / math.pi * math.sin(math.pi * -0.8 / 2)
    assert late_toys.valley_step(-0.5, 1.5, 0.3) == pytest.approx(inside)
    # beyond the ridge the slope points outwards
    assert late_toys.valley_step(1.5, 1.0, 1.0) > 1.5
    assert late_toys.valley_step(0.0, 1.5, 0.3) == 0


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.99])
def test_no_run_from_the_inner_half_leaves_at_the_radius_that_the_module_derives(rate):
    w = np.linspace(-1, 1, 201)
    for _ in range(100):
        w = late_toys.valley_step(w, rate, 2 - 4 / math.pi - 1e-3)
        assert np.abs(w).max() < 4 / math.pi


def test_the_valley_reports_each_radius():
    columns = late_toys.valley(TINY, Cell({}, seed=1))
    assert columns["radius"].tolist() == [0.0, 0.1, 1.5]
    assert columns["farthest"][0] <= 1 and columns["left"][:2].tolist() == [0, 0]
    assert columns["left"][2] > 0.5 and columns["away"][1] == 1


@pytest.mark.parametrize("name", ["squares", "sine", "quartic"])
def test_a_toy_has_its_gradient_its_curvature_and_its_constant(name):
    loss, gradient, start, beta, mu = late_toys.toy(name, TINY, seed=2)
    rng = np.random.default_rng(0)
    bound = np.abs(start).max()
    for _ in range(50):
        one, other = rng.uniform(-bound, bound, (2, len(start)))
        step = 1e-6 * (other - one)
        slope = (loss(one + step) - loss(one - step)) / 2
        assert slope == pytest.approx(gradient(one) @ step, rel=1e-4, abs=1e-12)
        change = np.linalg.norm(gradient(one) - gradient(other))
        assert change <= (1 + 1e-9) * beta * np.linalg.norm(one - other)
        assert (1 + 1e-9) * np.sum(gradient(one) ** 2) >= 2 * mu * loss(one)


def test_an_unknown_toy_is_refused():
    with pytest.raises(ValueError, match='must be "squares", "sine" or "quartic", got \'cube\''):
        late_toys.toy("cube", TINY, seed=0)


def test_the_secured_factor_is_that_of_the_module():
    assert late_toys.secured(2.0, 1.0, 0.2, 0.1) == pytest.approx(1 - (0.18 - 0.0242))


def test_decades_of_an_exponential_are_equally_long_and_those_of_a_power_law_are_not():
    exponential = 10.0 ** (-np.arange(40) / 8)
    assert late_toys._decades(exponential) == pytest.approx((8, 8))
    power = np.arange(1.0, 1001.0) ** -2
    last, before = late_toys._decades(power)
    assert last / before == pytest.approx(10**0.5, rel=1e-3)


def test_settling_stops_at_its_depth_and_keeps_the_ends():
    cell = Cell({"loss": "sine", "rule": "unnormalized"}, seed=0)
    columns = late_toys.settling(TINY, cell)
    assert columns["loss"][-1] <= TINY.depth * columns["loss"][0] / late_toys.Config().radius
    assert columns["worst"] <= columns["secured"] < 1
    assert columns["step"][0] == 1 and columns["step"][-1] < TINY.most


def test_sam_stops_where_it_bounces_along_the_top_eigenvector():
    columns = late_toys.settling(TINY, Cell({"loss": "squares", "rule": "sam"}, seed=0))
    beta = late_toys.toy("squares", TINY, seed=0).beta
    bounce = TINY.rate * np.array(TINY.floors) / (2 - TINY.rate)
    assert columns["floor"] == pytest.approx(0.5 * beta * bounce**2, rel=1e-3)


def test_statistics():
    valley = run_of(
        {"study": "valley"},
        radius=np.array([0.0, 0.3, 0.5, 0.7, 1.5]),
        farthest=np.array([1.0, 1.1, 1.2, 1.3, 9.0]),
        left=np.array([0.0, 0.0, 0.0, 0.0, 0.75]),
        away=np.array([0.25, 1.0, 1.0, 1.0, 1.0]),
    )

    def settled(loss, worst, last, before):
        setting = {"study": "settling", "loss": loss, "rule": "unnormalized"}
        numbers = {"worst": worst, "last_decade": last, "decade_before": before}
        return run_of(setting, **numbers, secured=0.9)

    sam = run_of(
        {"study": "settling", "loss": "squares", "rule": "sam"},
        radius=np.array([0.01, 0.1]),
        floor=np.array([1e-6, 1e-3]),
    )
    runs = seed_runs(
        {},
        valley,
        settled("squares", 0.81, 10.0, 10.0),
        settled("sine", 0.72, 6.0, 5.0),
        settled("quartic", 1.0, 30.0, 10.0),
        sam,
    )
    check_statistics(
        late_toys.CLAIMS,
        {
            "stays-in-the-valley": (runs, 1.2),
            "leaves-the-minimum": (runs, 0.75),
            "a-wide-radius-leaves": (runs, 0.75),
            "the-bound-holds": (runs, 0.9),
            "exponential-inside": (runs, 1.2),
            "slower-outside": (runs, 3.0),
            "sam-stops-at-a-floor": (runs, 3.0),
        },
    )
