"""The scoreboard names claims that exist, and reads them as it says."""

import pytest
from toy_experiment import claim_of, toy

from sam_lab import experiments
from sam_lab.experiments.critics import scoreboard
from sam_lab.experiments.critics.scoreboard import EXPLANATIONS, Evidence, Explanation

EVIDENCE = [(one.name, evidence) for one in EXPLANATIONS for evidence in one.evidence]


@pytest.mark.parametrize("name, evidence", EVIDENCE, ids=str)
def test_every_piece_of_evidence_is_a_claim_of_the_ledger(name, evidence):
    experiment = experiments.get(evidence.experiment)
    assert evidence.claim in {claim.id for claim in experiment.claims}
    assert evidence.scale in experiment.presets


def test_no_explanation_counts_a_claim_twice():
    for explanation in EXPLANATIONS:
        named = [(one.experiment, one.claim, one.scale) for one in explanation.evidence]
        assert len(set(named)) == len(named), explanation.name
    assert len({one.name for one in EXPLANATIONS}) == len(EXPLANATIONS)


def weighed(monkeypatch, folder, values, counts, saved=True, **how):
    """What evidence of one claim with these values over seeds, to lie in [0.9, 1.1], says."""
    experiment = toy(claim_of(values))
    monkeypatch.setattr(scoreboard, "get", {"toy": experiment}.__getitem__)
    if saved:
        experiments.run(experiment, out=folder, progress=False)
    evidence = Evidence("toy", "c", counts, "the value of the toy", **how)
    (one,) = scoreboard.weigh(folder, [Explanation("Toys", "It is the toy.", (evidence,))])
    return one


@pytest.mark.parametrize(
    ("values", "counts", "side"),
    [
        ([1.0, 1.01, 1.02], "for", "for"),
        ([1.0, 1.01, 1.02], "against", "against"),
        ([2.0, 2.01, 2.02], "for", "against"),
        ([2.0, 2.01, 2.02], "against", "for"),
        ([1.0, 1.0, 1.3], "for", "undecided"),
    ],
)
def test_a_verdict_speaks_for_a_side(monkeypatch, tmp_path, values, counts, side):
    one = weighed(monkeypatch, tmp_path, values, counts)
    assert one.side == side
    assert one.measured == one.verdict.measured
    assert scoreboard.table([one]).rows == [
        ["**Toys**", "the value of the toy", one.measured, side, "`toy`: c"]
    ]
    numbers = [str(int(side == each)) for each in ("for", "against", "undecided")]
    table = scoreboard.counts([one])
    assert table.header == ["Explanation", "It says", "For", "Against", "Undecided"]
    assert table.rows == [["**Toys**", "It is the toy.", *numbers]]


@pytest.mark.parametrize("values, side", [([2.0, 2.01, 2.02], "undecided"), ([1.0, 1.01], "for")])
def test_a_claim_that_is_not_reproduced_may_speak_for_nobody(monkeypatch, tmp_path, values, side):
    one = weighed(monkeypatch, tmp_path, [*values, values[-1]], "for", missed="undecided")
    assert one.side == side


def test_what_was_not_run_is_said_to_be_so(monkeypatch, tmp_path):
    one = weighed(monkeypatch, tmp_path, [1.0, 1.0, 1.0], "for", saved=False)
    assert one.side == one.measured == "not run" and one.verdict is None
    table = scoreboard.counts([one])
    assert table.header[-1] == "Not run" and table.rows[0][2:] == ["0", "0", "0", "1"]


def test_the_name_of_an_explanation_stands_once(monkeypatch, tmp_path):
    one = weighed(monkeypatch, tmp_path, [1.0, 1.01, 1.02], "for")
    assert [row[0] for row in scoreboard.table([one, one]).rows] == ["**Toys**", ""]
    assert scoreboard.counts([one, one]).rows[0][2] == "2"


def test_evidence_speaks_for_or_against():
    with pytest.raises(ValueError, match="toy/c: counts must be 'for' or 'against', got 'maybe'"):
        Evidence("toy", "c", "maybe", "the value")
    with pytest.raises(ValueError, match="toy/c: missed must be one of for, against, undecided"):
        Evidence("toy", "c", "for", "the value", missed="never")


def test_evidence_on_a_claim_that_does_not_exist_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(scoreboard, "get", {"toy": toy(claim_of([1.0]))}.__getitem__)
    evidence = Evidence("toy", "nobody", "for", "the value")
    with pytest.raises(KeyError, match="nobody"):
        scoreboard.weigh(tmp_path, [Explanation("Toys", "It is the toy.", (evidence,))])
