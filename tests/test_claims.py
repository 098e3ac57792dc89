"""Claims, criteria, intervals and verdicts."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from toy_experiment import claim_of, result_of

from sam_lab.experiments import (
    CONTROL,
    Claim,
    Criterion,
    NotApplicable,
    Ratio,
    Run,
    Source,
    claim,
    claims_table,
)
from sam_lab.experiments.lab.result import Result
from sam_lab.experiments.lab.statistics import (
    DOMAINS,
    farthest_from_one,
    fieller,
    mean_interval,
    second_half,
    second_half_median,
    second_half_width,
    t_interval,
    t_quantile,
)


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
    for of_one in (t_interval, mean_interval):
        with pytest.raises(ValueError, match="at least two values, got 1"):
            of_one([1.0])
    with pytest.raises(ValueError, match="at least two pairs, got 1"):
        fieller([Ratio(1.0, 2.0)])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.sampled_from([1.0, 100.0]))
def test_an_interval_of_shares_keeps_to_their_range(values, whole):
    mean, low, high = mean_interval([whole * value for value in values], "share", whole)
    assert 0 <= low <= mean <= high <= whole


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_an_interval_of_positive_numbers_is_that_of_their_logarithms(values):
    mean, low, high = mean_interval(values, "positive")
    assert 0 < low <= mean * (1 + 1e-12) and mean <= high * (1 + 1e-12)
    assert mean == pytest.approx(stats.gmean(values))
    turned = mean_interval([1 / value for value in values], "positive")
    np.testing.assert_allclose([1 / turned.high, 1 / turned.low], [low, high], rtol=1e-9)


@pytest.mark.parametrize("domain", DOMAINS)
def test_equal_values_make_an_interval_of_no_length_in_every_domain(domain):
    assert mean_interval([0.3, 0.3, 0.3], domain) == (0.3, 0.3, 0.3)


def test_an_interval_of_shares_holds_the_mean_about_as_often_as_it_says():
    """Where the percentile bootstrap, of as few seeds, does not."""
    rng = np.random.default_rng(0)
    samples = rng.beta(31.5, 3.5, (400, 5))  # mean 0.9, standard deviation 0.05
    ours = [mean_interval(sample, "share") for sample in samples]
    assert np.mean([low <= 0.9 <= high for _, low, high in ours]) >= 0.91
    picks = rng.integers(0, 5, (500, 5))
    low, high = np.quantile(samples[:, picks].mean(-1), [0.025, 0.975], axis=1)
    assert np.mean((low <= 0.9) & (high >= 0.9)) <= 0.87


@pytest.mark.parametrize(
    ("values", "domain", "message"),
    [
        ([1.0, 0.0], "positive", "a value must be positive here, got 0"),
        ([1.0, 1.5], "share", "a share must lie between 0 and 1, got 1.5"),
        ([1.0, -0.5], "share", "a share must lie between 0 and 1, got -0.5"),
        ([1.0, 2.0], "angle", "domain must be one of real, positive, share, got 'angle'"),
    ],
)
def test_values_outside_their_domain_are_refused(values, domain, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, domain)


def test_fiellers_interval_ends_where_a_ratio_can_just_not_be_told():
    """At either end, numerator less ratio times denominator has a t-interval that ends at 0."""
    pairs = [Ratio(1.0, 2.0), Ratio(1.5, 2.2), Ratio(0.9, 1.7), Ratio(1.1, 2.5)]
    found = fieller(pairs)
    assert found is not None
    assert found.mean == pytest.approx(4.5 / 8.4) and found.low < found.mean < found.high
    for end, at in ((found.low, 0), (found.high, 1)):
        ends = t_interval([above - end * below for above, below in pairs])
        assert ends[at] == pytest.approx(0, abs=1e-12)


def test_fiellers_interval_is_about_the_bootstraps_for_many_pairs():
    rng = np.random.default_rng(1)
    below = rng.normal(2.0, 0.6, 200)
    above = 0.5 * below + rng.normal(0, 0.4, 200)
    low, high = stats.bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        rng=rng,
    ).confidence_interval
    found = fieller([*map(Ratio, above, below)])
    assert found is not None
    np.testing.assert_allclose(found[1:], (low, high), atol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_denominator_that_is_not_above_zero_makes_no_ratio(sign):
    near = [Ratio(1.0, 0.3 * sign), Ratio(1.1, -0.2 * sign), Ratio(0.9, 0.1 * sign)]
    assert fieller(near) is None
    assert fieller([Ratio(1.0, -2.0), Ratio(1.1, -2.1), Ratio(0.9, -1.9)]) is None


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
        assert judged.summary == f"{judged.explained}; 3 seeds"


def _raises(*seeds):
    def statistic(runs):
        if runs.seed in seeds:
            raise NotApplicable("it starts beyond")
        return 1.0

    return statistic


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (range(5), "does not apply (it starts beyond)"),
        ((0, 1, 4), "does not apply (it starts beyond in 3 of 5 seeds)"),
        ((2, 4), "inconclusive (it does not apply in 2 of 5 seeds: it starts beyond)"),
        ((), "reproduced"),
    ],
)
def test_a_claim_that_does_not_apply_to_most_seeds_is_not_judged_on_the_rest(seeds, words):
    judged = claim_of(_raises(*seeds)).judge(result_of(seeds=5))
    assert (judged.explained, judged.seeds) == (words, "5 seeds")


def test_a_claim_on_a_ratio_is_judged_by_the_ratio_of_means():
    shares = [Ratio(1.0, 2.0), Ratio(1.1, 2.2), Ratio(1.2, 2.3)]
    judged = claim_of(shares, 0.4, 0.6).judge(result_of())
    assert judged.mean == pytest.approx(3.3 / 6.5) and judged.verdict == "reproduced"
    assert judged.values == tuple(shares)
    assert judged.interval == pytest.approx(fieller(shares)[1:])
    one = claim_of(shares, 0.4, 0.6).judge(result_of(seeds=1))
    assert (one.measured, one.reason) == ("0.5", "at least 3 seeds are needed")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([Ratio(1, 0.5), Ratio(1, -0.4), Ratio(1, 0.1)], "does not apply (undefined: no way)"),
        ([Ratio(1, 0.5), Ratio(1, -0.4)], "inconclusive (at least 3 seeds are needed)"),
        ([Ratio(1, 0)], "inconclusive (at least 3 seeds are needed)"),
        ([Ratio(1, math.nan)] * 3, "inconclusive (3 of 3 values are not finite)"),
        (
            [Ratio(1, 2), 0.5, 0.5],
            "inconclusive (the statistic is a number for one seed and a ratio for another)",
        ),
    ],
)
def test_a_ratio_that_is_none(values, words):
    judged = claim_of(values, undefined="no way").judge(result_of(seeds=len(values)))
    assert (judged.explained, judged.measured) == (words, "no value")


def test_an_interval_keeps_to_the_domain_of_the_claim():
    shares = claim_of([1.0, 0.9, 1.0], domain="share").judge(result_of())
    assert shares.interval is not None and shares.interval[1] == 1
    percent = claim_of([100, 90, 100], unit="%", domain="share").judge(result_of())
    assert percent.interval == pytest.approx([100 * end for end in shares.interval])
    ratios = claim_of([0.1, 0.2, 0.9], domain="positive").judge(result_of())
    assert ratios.interval is not None and ratios.interval[0] > 0
    beyond = claim_of([1.0, 1.2, 1.1], domain="share").judge(result_of())
    assert beyond.reason == "a share must lie between 0 and 1, got 1.2"


def test_a_result_without_runs_decides_nothing():
    judged = claim_of([]).judge(result_of(seeds=0))
    assert (judged.verdict, judged.reason) == ("inconclusive", "there is no run")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"id": ""}, ValueError, "claim id must be a short name, got ''"),
        ({"id": " x"}, ValueError, "claim id must be a short name, got ' x'"),
        ({"statement": ""}, ValueError, "claim 'c' needs a statement"),
        ({"domain": "any"}, ValueError, "claim 'c': domain must be one of .*, got 'any'"),
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
    stepped = plain.under("in-steps", "In steps, ", schedule="steps")
    assert (stepped.id, stepped.statement) == ("c-in-steps", "In steps, it holds")
    named = claim_of([1], statement="SAM is flat").under("in-steps", "In steps, ")
    assert named.statement == "In steps, SAM is flat"
    assert plain.judge(result).values == (1.0, 1.0, 1.0)
    assert stepped.judge(result).values == (5.0, 5.0, 5.0)
    assert dataclasses.replace(stepped, id="c", statement="It holds") == plain
    elsewhere = plain.under("in-drops", "In drops, ", schedule="drop").judge(result)
    assert elsewhere.verdict == "does not apply"
    assert elsewhere.reason == "no run with schedule=drop; schedule is constant, steps"


@pytest.mark.parametrize(
    ("values", "unit", "words"),
    [
        ([1.0, 1.01, 1.02], "", "1.010 [0.985, 1.035]"),
        ([100, 200, 300], "steps", "200 [-48, 448] steps"),
        ([2.0, 2.0, 2.0], "%", "2 % in every seed"),
        ([0.9999, 1.0, 0.9998], "", "0.99990 [0.99965, 1.00015]"),
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
