"""Claims, criteria, intervals and verdicts."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toy_experiment import claim_of, result_of

from sam_lab.experiments import CONTROL, Claim, Criterion, Run, Source, claim, claims_table
from sam_lab.experiments.lab.result import Result
from sam_lab.experiments.lab.statistics import (
    farthest_from_one,
    second_half,
    second_half_median,
    second_half_width,
    t_interval,
    t_quantile,
)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 100, 1001])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_t_quantiles_equal_scipys(df, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, df)
    assert t_quantile(df, confidence) == pytest.approx(expected, rel=1e-10)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_the_interval_equals_scipys(values):
    low, high = t_interval(values)
    scale = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), scale or 1e-300)
    np.testing.assert_allclose((low, high), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("call", [lambda: t_quantile(0), lambda: t_quantile(2, 1.0)])
def test_quantiles_refuse_what_has_none(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_an_interval_needs_two_values():
    with pytest.raises(ValueError, match="at least two values, got 1"):
        t_interval([1.0])


@pytest.mark.parametrize(
    ("values", "verdict", "reason"),
    [
        ([1.00, 1.01, 0.99], "reproduced", ""),
        ([1.0, 1.0, 1.0], "reproduced", ""),
        ([0.9, 0.9, 0.9], "reproduced", ""),  # the bounds belong to the criterion
        ([2.00, 2.01, 1.99], "not reproduced", ""),
        ([0.1, 0.2, 0.15], "not reproduced", ""),
        ([1.00, 1.09, 0.91], "inconclusive", "the interval crosses the criterion's bound"),
        ([0.0, 1.0, 2.0], "inconclusive", "the interval crosses the criterion's bound"),
        ([1.0, 1.0], "inconclusive", "at least 3 seeds are needed"),
        ([1.0], "inconclusive", "at least 3 seeds are needed"),
        ([1.0, math.nan, 1.0], "inconclusive", "1 of 3 values are not finite"),
        ([1.0, math.inf, math.nan], "inconclusive", "2 of 3 values are not finite"),
    ],
)
def test_the_verdict_follows_from_the_interval(values, verdict, reason):
    judged = claim_of(values).judge(result_of(seeds=len(values)))
    assert (judged.verdict, judged.reason) == (verdict, reason)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=8), st.floats(-10, 10), st.floats(0, 5))
def test_verdicts_agree_with_their_definition(values, low, width):
    judged = claim_of(values, low, low + width).judge(result_of(seeds=len(values)))
    assert judged.interval is not None
    a, b = judged.interval
    inside = low <= a and b <= low + width
    outside = b < low or a > low + width
    expected = "reproduced" if inside else "not reproduced" if outside else "inconclusive"
    assert judged.verdict == expected
    assert judged.mean == pytest.approx(np.mean(judged.values), abs=1e-9)
    assert judged.median == pytest.approx(np.median(judged.values), abs=1e-9)


def test_one_sided_criteria():
    result = result_of()
    assert claim_of([5, 5, 5], low=1, high=math.inf).judge(result).verdict == "reproduced"
    assert claim_of([5, 5, 5], low=-math.inf, high=1).judge(result).verdict == "not reproduced"
    assert [str(Criterion(low=1)), str(Criterion(high=2)), str(Criterion(1, 2))] == [
        "≥ 1",
        "≤ 2",
        "1 to 2",
    ]


@pytest.mark.parametrize("bounds", [(2, 1), (math.nan, 1), (0, math.nan), ()])
def test_a_criterion_without_sense_is_refused(bounds):
    with pytest.raises(ValueError, match="criterion needs"):
        Criterion(*bounds)


def test_a_statistic_that_fails_is_inconclusive_with_its_reason():
    def divide(runs):
        return 1 / 0

    def later(runs):
        return 1.0 if runs.seed == 0 else runs.one()["loss"]

    for statistic, reason in (
        (divide, "ZeroDivisionError: division by"),
        (later, "KeyError: \"no column 'loss'"),
        (lambda runs: "text", "ValueError: could not convert"),
        (lambda runs: [1.0, 2.0], "TypeError: float"),
    ):
        judged = claim_of(statistic).judge(result_of())
        assert judged.verdict == "inconclusive" and reason in judged.reason
        assert judged.values == () and judged.measured == "no value"


def test_a_result_without_runs_decides_nothing():
    judged = claim_of([]).judge(result_of(seeds=0))
    assert (judged.verdict, judged.reason) == ("inconclusive", "there is no run")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"id": ""}, ValueError, "claim id must be a short name, got ''"),
        ({"id": " x"}, ValueError, "claim id must be a short name, got ' x'"),
        ({"statement": ""}, ValueError, "claim 'c' needs a statement"),
        ({"source": "Fig. 1"}, TypeError, "claim 'c': source must be a Source, got 'Fig. 1'"),
    ],
)
def test_a_claim_is_checked_when_it_is_made(change, error, message):
    with pytest.raises(error, match=message):
        claim_of([1], **change)
    with pytest.raises(TypeError, match="claim 'c': criterion must be a Criterion"):
        Claim("c", "s", CONTROL, (0, 1), lambda runs: 1.0)


def test_a_source_is_of_a_known_kind():
    assert str(Source("Zhou et al. 2025", "code")) == "Zhou et al. 2025"
    with pytest.raises(ValueError, match=r"one of paper, code, after, ours, control, got 'rumour'"):
        Source("Nobody", "rumour")


def test_a_claim_is_made_of_a_function():
    @claim(CONTROL, low=0.5, unit="points", set_after=True, headline=True)
    def grows_by_lr(runs):
        """x grows by lr
        a step"""
        return runs.one().value("x")

    assert isinstance(grows_by_lr, Claim)
    assert (grows_by_lr.id, grows_by_lr.statement) == ("grows-by-lr", "x grows by lr a step")
    assert grows_by_lr.criterion == Criterion(low=0.5) and grows_by_lr.source is CONTROL
    assert grows_by_lr.criterion_in_words == "≥ 0.5 points"
    assert grows_by_lr.set_after and grows_by_lr.headline
    assert grows_by_lr(result_of(x=[2.0]).by_seed()[0]) == 2.0

    @claim(CONTROL, high=1, id="below-2/lr", statement="It is said elsewhere")
    def _below(runs):
        return 0

    assert (_below.id, _below.statement) == ("below-2/lr", "It is said elsewhere")
    with pytest.raises(ValueError, match="criterion needs at least one finite bound"):
        claim(CONTROL)(lambda runs: 1)
    with pytest.raises(ValueError, match="claim 'silent' needs a statement"):

        @claim(CONTROL, low=0)
        def silent(runs):
            return 1


def test_a_claim_under_another_setting_sees_its_runs_alone():
    runs = [
        Run({"schedule": name}, seed, {"x": [value]})
        for name, value in (("constant", 1.0), ("steps", 5.0))
        for seed in range(3)
    ]
    result = Result("toy", "laptop", {}, runs, [])
    plain = claim_of(lambda runs: runs.base().value("x"))
    stepped = plain.under("in-steps", "In steps. ", schedule="steps")
    assert (stepped.id, stepped.statement) == ("c-in-steps", "In steps. It holds")
    assert plain.judge(result).values == (1.0, 1.0, 1.0)
    assert stepped.judge(result).values == (5.0, 5.0, 5.0)
    assert dataclasses.replace(stepped, id="c", statement="It holds") == plain


@pytest.mark.parametrize(
    ("values", "unit", "words"),
    [
        ([1.0, 1.01, 1.02], "", "1.010 [0.985, 1.035]"),
        ([100, 200, 300], "steps", "200 [-48, 448] steps"),
        ([2.0, 2.0, 2.0], "", "2 [2, 2]"),
        ([1e-9, 2e-9, 3e-9], "", "2e-09 [-4.84e-10, 4.48e-09]"),
        ([2.0], "", "2"),
    ],
)
def test_measured_values_in_words(values, unit, words):
    assert claim_of(values, unit=unit).judge(result_of(seeds=len(values))).measured == words


def test_the_table_of_claims_in_markdown_and_text():
    said = claim_of([1.0, 1.01, 1.02], statement="Norm $\\|g\\|$ and $|x|$, a | b", unit="u")
    table = claims_table([said.judge(result_of())], "laptop")
    assert table._repr_markdown_() == (
        "| Statement | Source | Measured | Criterion | Verdict |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| Norm $\\Vert{}g\\Vert{}$ and $\\vert{}x\\vert{}$, a \\| b | Fig. 1 "
        "| 1.010 [0.985, 1.035] u (3 seeds, laptop) | 0.9 to 1.1 u | reproduced |"
    )
    assert "Verdict    reproduced" in str(table) and repr(table) == str(table)
    assert str(claims_table([], "laptop")) == "nothing to show"


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_the_second_half_and_what_is_farthest_from_one(values):
    column = np.array(values)
    half = second_half(column)
    assert len(half) == (len(values) + 1) // 2 and list(half) == values[len(values) // 2 :]
    assert second_half_median(column) == np.median(half)
    assert second_half_width(column) == pytest.approx(np.ptp(np.quantile(half, [0.1, 0.9])))
    assert abs(farthest_from_one(values) - 1) == max(abs(value - 1) for value in values)
