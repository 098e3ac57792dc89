"""The ledger, and results side by side."""

import dataclasses

import pytest
from toy_experiment import Config, claim_of, toy

from sam_lab import experiments
from sam_lab.experiments import (
    CONTROL,
    NotApplicable,
    Result,
    headlines,
    ledger,
    ledger_rows,
    side_by_side,
)
from sam_lab.experiments.lab.experiment import SCALES
from sam_lab.experiments.lab.registry import part
from sam_lab.experiments.lab.setup import Setup


def _only(monkeypatch, **found):
    """Let the registry hold these experiments."""
    monkeypatch.setattr("sam_lab.experiments.lab.report.names", lambda: sorted(found))
    monkeypatch.setattr("sam_lab.experiments.lab.report.get", found.__getitem__)
    monkeypatch.setattr("sam_lab.experiments.lab.report.broken", lambda: {})


def test_the_ledger_sets_both_scales_side_by_side(tmp_path, monkeypatch):
    experiment = toy(claim_of([1.0, 1.01, 1.02], statement="It holds"))
    _only(monkeypatch, toy=experiment)
    experiments.run(experiment, out=tmp_path, progress=False)
    book = ledger(tmp_path)
    assert book._repr_markdown_() == (
        f"{book.legend()}\n\n**{experiment.title}**\n\n"
        "- *Paper*: Not run: `python -m sam_lab.experiments run toy --scale paper --seeds 3 "
        "--out book/results`.\n\n"
        "| Statement | Source | Kind | Criterion | Set | Laptop | Paper |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| It holds | Fig. 1 | after | 0.9 to 1.1 | before "
        "| 1.010 [0.985, 1.035] (3 seeds): reproduced "
        "| not run |"
    )
    assert "Paper      not run" in str(book) and repr(book) == str(book)
    experiments.run(experiment, "paper", out=tmp_path, progress=False)
    complete = ledger(tmp_path)
    assert "Not run" not in complete._repr_markdown_() and complete.problems == []


def test_a_scale_between_the_two_has_its_column_where_an_experiment_has_it(tmp_path, monkeypatch):
    wide = dataclasses.replace(
        toy(claim_of([1.0, 1.01, 1.02]), name="wide"),
        presets={"paper": Config(steps=30), "laptop": Config(), "desktop": Config(steps=12)},
        title="Three scales",
    )
    _only(monkeypatch, toy=toy(claim_of([1.0, 1.01, 1.02])), wide=wide)
    experiments.run(wide, "desktop", out=tmp_path, progress=False)
    tables = dict(ledger(tmp_path).tables())
    assert tables["A toy"].header[5:] == ["Laptop", "Paper"]
    assert tables["Three scales"].header[5:] == ["Laptop", "Desktop", "Paper"]
    found = "1.010 [0.985, 1.035] (3 seeds): reproduced"
    assert tables["Three scales"].rows[0][5:] == ["not run", found, "not run"]
    legend = ledger(tmp_path).legend()
    assert all(f"*{scale}*: {SCALES[scale]}" in legend for scale in ("laptop", "desktop", "paper"))
    assert "*fast*" not in legend  # no experiment here has it


def test_every_scale_says_what_departs_from_the_papers_own_and_what_it_would_cost(
    tmp_path, monkeypatch
):
    experiment = dataclasses.replace(
        toy(claim_of([1.0, 1.01, 1.02])),
        setup=Setup("its code", {"steps": 30}),
        cost=lambda config: config.steps * 1e16,
    )
    _only(monkeypatch, toy=experiment)
    experiments.run(experiment, out=tmp_path, progress=False)
    book = ledger(tmp_path)
    compared, small, large = (line for line, _ in book.scales()["A toy"].items)
    assert compared == "Compared with its code: steps."
    assert small == "*Laptop*: steps 3 (paper: 30)."
    assert large == (
        "*Paper*: no departure. Not run: `python -m "
        "sam_lab.experiments run toy --scale paper --seeds 3 --out book/results`, "
        "9.0e+17 FLOPs: about 104 days on two CPU cores, 8.3 hours on one H100."
    )
    assert f"- {compared}\n- {small}\n- {large}\n\n| Statement |" in book._repr_markdown_()
    assert "steps 3 (paper: 30)" in str(book)


def test_results_stand_side_by_side_claim_by_claim(monkeypatch):
    experiment = toy(claim_of([1.0, 1.01, 1.02], statement="It holds"))
    _only(monkeypatch, toy=experiment)
    small = experiments.run(experiment, progress=False)
    large = experiments.run(experiment, "paper", progress=False)
    table = side_by_side({"small": small, "large": large})
    cell = "1.010 [0.985, 1.035]: reproduced"
    assert table.header == ["Statement", "small", "large"]
    assert table.rows == [["It holds (criterion: 0.9 to 1.1)", cell, cell]]


def test_the_ledger_computes_verdicts_anew(tmp_path, monkeypatch):
    experiments.run(toy(claim_of([1, 1, 1])), out=tmp_path, progress=False)
    stricter = toy(claim_of([1, 1, 1], low=2, high=3))
    _only(monkeypatch, toy=stricter)
    verdict = ledger(tmp_path).entries[0][2]["laptop"]
    assert verdict is not None and verdict.verdict == "not reproduced"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.write_text("{"), "toy.laptop.json: damaged or cut short"),
        (
            lambda path: Result("other", "laptop", {}, [], []).save(path),
            "toy.laptop.json: holds other at scale laptop",
        ),
        (
            lambda path: Result("toy", "laptop", {"steps": 9}, [], []).save(path),
            "toy.laptop.json: made with another config",
        ),
    ],
)
def test_the_ledger_names_files_it_cannot_use(tmp_path, monkeypatch, spoil, problem):
    _only(monkeypatch, toy=toy(claim_of([1, 1, 1])))
    spoil(tmp_path / "toy.laptop.json")
    book = ledger(tmp_path)
    assert len(book.problems) == 1 and book.problems[0].startswith(problem)
    assert f"- {problem}" in book._repr_markdown_()
    assert book.entries[0][2]["laptop"] is None


def test_the_ledger_shows_kind_headline_and_when_the_criterion_was_set(tmp_path, monkeypatch):
    late = claim_of([1, 1, 1], source=CONTROL, set_after=True, headline=True)
    _only(monkeypatch, toy=toy(late))
    book = ledger(tmp_path)
    assert book.tables()[0][1].rows[0][:5] == [
        "**It holds**",
        "control",
        "control",
        "0.9 to 1.1",
        "after",
    ]
    for word in ("*paper*:", "*code*:", "*after*:", "*ours*:", "*control*:", "headline"):
        assert word in book.legend()


def test_the_rows_of_the_ledger_are_plain_text(tmp_path, monkeypatch):
    experiment = toy(claim_of([1.0, 1.01, 1.02], headline=True, unit="u"))
    _only(monkeypatch, toy=experiment)
    experiments.run(experiment, out=tmp_path, progress=False)
    (row,) = ledger_rows(tmp_path)
    assert (row.experiment, row.title, row.part, row.id) == ("toy", "A toy", "", "c")
    assert (row.statement, row.source, row.kind) == ("It holds", "Fig. 1", "after")
    assert (row.criterion, row.set_after, row.headline) == ("0.9 to 1.1 u", False, True)
    cell = row.cells["laptop"]
    assert cell is not None and row.cells["paper"] is None
    assert cell.summary == f"{cell.measured} ({cell.seeds}): {cell.explained}"
    assert (cell.measured, cell.seeds) == ("1.010 [0.985, 1.035] u", "3 seeds")
    assert cell.verdict == cell.explained == "reproduced"


def test_every_experiment_belongs_to_a_part_of_the_book():
    found = {part(name) for name in experiments.names()}
    assert found == {"edge", "sam", "late", "inputs", "family", "theory", "critics"}
    assert part("late_images") == "late" and part("nobody") == ""


def test_headlines_are_sentences(monkeypatch):
    wide = dataclasses.replace(
        toy(
            claim_of([1.0, 1.01, 1.02], statement="It holds", headline=True),
            claim_of([1.0, 1.0, 1.2], id="d", statement="It lasts", headline=True, unit="u"),
            claim_of([1.0, 1.0, 1.2], id="e", statement="No headline"),
        ),
        name="wide",
        title="A wide toy",
    )
    plain = toy(claim_of(_starts_beyond, statement="It holds", headline=True))
    _only(monkeypatch, toy=plain, wide=wide)
    made = [experiments.run(one, progress=False) for one in (wide, plain)]
    alone = headlines(made[0])
    assert alone._repr_markdown_() == (
        "- It holds (criterion: 0.9 to 1.1). "
        "Measured: 1.010 [0.985, 1.035] (3 seeds, laptop scale): **reproduced**.\n"
        "- It lasts (criterion: 0.9 to 1.1 u). "
        "Measured: 1.07 [0.78, 1.35] u (3 seeds, laptop scale): **inconclusive**, "
        "as the interval crosses the criterion's bound."
    )
    assert "(3 seeds, laptop scale): reproduced." in " ".join(str(alone).split())
    assert repr(alone) == str(alone)
    both = headlines(*made)
    assert both.items[0] == (
        "It holds (criterion: 0.9 to 1.1).",
        [
            "A wide toy: 1.010 [0.985, 1.035] (3 seeds, laptop scale): **reproduced**.",
            "A toy: no value (3 seeds, laptop scale): **does not apply**, it starts beyond.",
        ],
    )
    assert "\n  - A toy: no value" in both._repr_markdown_()
    assert str(headlines()) == "nothing to show"
    assert side_by_side({"a": made[1]}).rows[0][1] == "does not apply"


def _starts_beyond(runs):
    raise NotApplicable("it starts beyond")
