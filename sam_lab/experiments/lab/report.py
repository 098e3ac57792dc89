"""The ledger: all claims of all experiments, their scales side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sam_lab.experiments.lab.claims import KINDS, Claim, Verdict
from sam_lab.experiments.lab.cost import H100, HVPS, TWO_CORES, cost_in_words
from sam_lab.experiments.lab.experiment import SCALES, Experiment, made_with
from sam_lab.experiments.lab.registry import broken, get, names, part
from sam_lab.experiments.lab.result import Result, ResultError, command
from sam_lab.experiments.lab.table import Bullets, Table

SEEDS = 3  # of the commands for results that are missing, and of what these would cost

__all__ = [
    "Ledger",
    "LedgerCell",
    "LedgerRow",
    "headlines",
    "ledger",
    "ledger_rows",
    "side_by_side",
]


@dataclass(frozen=True)
class LedgerCell:
    """What one scale says about one claim.

    Attributes:
        measured, seeds, verdict, explained, summary: as those of `Verdict`.
    """

    measured: str
    seeds: str
    verdict: str
    explained: str
    summary: str


@dataclass(frozen=True)
class LedgerRow:
    """A claim as the ledger shows it, in plain text.

    Attributes:
        experiment, title: name and title of its experiment.
        part: folder of its part of the book: such as ``edge`` or ``family``.
        id, statement, source, kind, criterion, set_after, headline: as those of `Claim`.
        cells: for each scale that the experiment has, what was found; None where it was not run.
    """

    experiment: str
    title: str
    part: str
    id: str
    statement: str
    source: str
    kind: str
    criterion: str
    set_after: bool
    headline: bool
    cells: dict[str, LedgerCell | None]


@dataclass(frozen=True)
class Ledger:
    """Claims and their verdicts, computed from the runs of the result files of a folder.

    Attributes:
        entries: a claim each: its experiment, the claim, and its verdict at each scale that the
            experiment has (None where it was not run).
        problems: files that could not be used, and why.
    """

    entries: list[tuple[Experiment, Claim, dict[str, Verdict | None]]]
    problems: list[str] = field(default_factory=list)
    out: str = "book/results"

    def rows(self) -> list[LedgerRow]:
        """The same in plain text, one row a claim."""
        parts = {name: part(name) for name in {one.name for one, _, _ in self.entries}}
        return [
            LedgerRow(
                experiment.name,
                experiment.title,
                parts[experiment.name],
                claim.id,
                claim.statement,
                claim.source.text,
                claim.source.kind,
                claim.criterion_in_words,
                claim.set_after,
                claim.headline,
                {scale: _in_a_cell(verdict) for scale, verdict in verdicts.items()},
            )
            for experiment, claim, verdicts in self.entries
        ]

    def tables(self) -> list[tuple[str, Table]]:
        """For each experiment its title and its claims, one row a claim, one column a scale.

        Before it stands what each scale is, see `scales`. A headline's statement is bold. *Kind* is
        that of the source, and *Set* says whether the criterion was set before or after the first
        data: see `legend`.
        """
        grouped: dict[str, list[list[str]]] = {}
        headers: dict[str, list[str]] = {}
        for row in self.rows():
            grouped.setdefault(row.title, []).append(
                [
                    f"**{row.statement}**" if row.headline else row.statement,
                    row.source,
                    row.kind,
                    row.criterion,
                    "after" if row.set_after else "before",
                    *(cell.summary if cell else "not run" for cell in row.cells.values()),
                ]
            )
            scales = [scale.capitalize() for scale in row.cells]
            headers[row.title] = [
                *("Statement", "Source", "Kind", "Criterion", "Set"),
                *scales,
            ]
        leads = self.scales()
        return [
            (title, Table(headers[title], rows, lead=leads[title]))
            for title, rows in grouped.items()
        ]

    def scales(self) -> dict[str, Bullets]:
        """For each experiment, by its title: with what its scales are compared, where it knows the
        paper's own set-up; then for each scale what departs from that, and, where no machine has
        run it, the command and what it would cost."""
        found: dict[str, Bullets] = {}
        for experiment, _, verdicts in self.entries:
            if experiment.title not in found:
                run = {scale for scale, verdict in verdicts.items() if verdict}
                lines = [
                    _compared(experiment),
                    *(self._scale(experiment, scale, run=scale in run) for scale in verdicts),
                ]
                found[experiment.title] = Bullets((line, list[str]()) for line in lines if line)
        return found

    def _scale(self, experiment: Experiment, scale: str, *, run: bool) -> str:
        config, setup = experiment.presets[scale], experiment.setup
        parts: list[str] = []
        if setup:
            parts.append("; ".join(setup.departures(config)) or "no departure")
        if not run:
            words = f"Not run: `{command(experiment.name, scale, range(SEEDS), self.out)}`"
            if experiment.cost:
                words += f", {cost_in_words(SEEDS * experiment.cost(config))}"
            parts.append(words)
        return f"*{scale.capitalize()}*: {'. '.join(parts)}." if parts else ""

    def legend(self) -> str:
        """What the columns, the scales and bold statements mean."""
        shown = {scale for _, _, verdicts in self.entries for scale in verdicts}
        scales = "; ".join(f"*{name}*: {what}" for name, what in SCALES.items() if name in shown)
        kinds = "; ".join(f"*{kind}*: {meaning}" for kind, meaning in KINDS.items())
        return (
            f"**Kind** says how far a statement may be charged to its source. {kinds}.\n\n"
            "**Set** says whether the criterion was set before or after the first data were seen. "
            "A statement in bold is a headline of its chapter. A cell gives the mean over seeds, "
            "its 95% interval, the number of seeds, and the verdict. The mean of a positive number "
            "is the geometric one, and intervals keep to the range of what they measure. A claim "
            "does not apply where its condition is not met, or where it asks for a share of a "
            "difference that is not there.\n\n"
            f"**Scale**: every column after *Set* is one. {scales}. Under the title of an "
            "experiment the code lists what could be read in the paper or its code, and what of "
            "each scale departs from that. Learning rates, radii and numbers of steps could often "
            "not be read. Where a scale is *not run*, the command and the "
            f"estimated cost of {SEEDS} seeds are given: floating-point operations of matrix "
            f"products and convolutions, counted, with {HVPS} Hessian-vector products assumed for "
            "one sharpness or trace; and the time they take at "
            f"{TWO_CORES / 1e12:g} TFLOP/s on two CPU cores and {H100 / 1e12:g} TFLOP/s on one "
            "H100 in float32. Small networks reach less of a GPU than that."
        )

    def notes(self) -> list[str]:
        """Files that could not be used, and why."""
        notes = []
        if self.problems:
            notes.append("Not used:\n\n" + "\n".join(f"- {problem}" for problem in self.problems))
        return notes

    def _repr_markdown_(self) -> str:
        parts = [f"**{title}**\n\n{table._repr_markdown_()}" for title, table in self.tables()]
        return "\n\n".join([self.legend(), *parts, *self.notes()])

    def __str__(self) -> str:
        parts = [f"{title}\n\n{table}" for title, table in self.tables()]
        return "\n\n".join([*parts, *self.notes()]) or "nothing to show"

    def __repr__(self) -> str:
        return str(self)


def _compared(experiment: Experiment) -> str:
    """With what the scales are compared, if there is anything."""
    if (setup := experiment.setup) is None:
        return ""
    return f"Compared with {setup.source}: {setup.compared()}."


def _in_a_cell(verdict: Verdict | None) -> LedgerCell | None:
    if verdict is None:
        return None
    return LedgerCell(
        verdict.measured, verdict.seeds, verdict.verdict, verdict.explained, verdict.summary
    )


def _briefly(verdict: Verdict) -> str:
    if math.isnan(verdict.mean):
        return verdict.verdict
    return f"{verdict.measured}: {verdict.verdict}"


def side_by_side(results: Mapping[str, Result]) -> Table:
    """The same claims on several results: one row a statement, one column a result, by its name.

    Verdicts are computed anew from the runs. A result without that claim has an empty cell. For
    seeds and reasons see each result's own table.
    """
    statements: dict[str, str] = {}
    judged: dict[str, dict[str, Verdict]] = {}
    for name, result in results.items():
        verdicts = get(result.experiment).judge(result)
        judged[name] = {verdict.claim.id: verdict for verdict in verdicts}
        for claim in (verdict.claim for verdict in verdicts):
            words = f"{claim.statement} (criterion: {claim.criterion_in_words})"
            statements.setdefault(claim.id, words)
    rows = [
        [words, *(_briefly(found[id]) if id in found else "" for found in judged.values())]
        for id, words in statements.items()
    ]
    return Table(["Statement", *results], rows)


def headlines(*results: Result) -> Bullets:
    """The headline claims of these results as sentences: what is claimed, and what was found.

    A statement that several results decide (the same task at another scale, or another task)
    stands once, with a point for each result below it. Intervals are 95% intervals over seeds.

    Raises:
        ExperimentError: a result whose experiment is not known.
    """
    found: dict[tuple[str, str], list[tuple[Result, Verdict]]] = {}
    for result in results:
        for verdict in get(result.experiment).judge(result):
            if verdict.claim.headline:
                key = verdict.claim.statement, verdict.claim.criterion_in_words
                found.setdefault(key, []).append((result, verdict))
    items: list[tuple[str, list[str]]] = []
    for (statement, criterion), judged in found.items():
        text = f"{statement} (criterion: {criterion})."
        if len(judged) == 1:
            items.append((f"{text} Measured: {_point(*judged[0])}", []))
            continue
        titles = [get(result.experiment).title for result, _ in judged]
        heads = [f"{title}: " if len(set(titles)) > 1 else "" for title in titles]
        points = [head + _point(*one) for head, one in zip(heads, judged, strict=True)]
        items.append((text, points))
    return Bullets(items)


def _point(result: Result, verdict: Verdict) -> str:
    where = f"{verdict.seeds}, {result.scale} scale"
    if math.isnan(verdict.mean):
        return f"no value ({where}): **{verdict.verdict}**, {verdict.reason}."
    why = f", as {verdict.reason}" if verdict.reason else ""
    return f"{verdict.measured} ({where}): **{verdict.verdict}**{why}."


def ledger_rows(directory: str | os.PathLike[str]) -> list[LedgerRow]:
    """The rows of the ledger of a folder of results, in plain text."""
    return ledger(directory).rows()


def ledger(directory: str | os.PathLike[str], out: str = "book/results") -> Ledger:
    """All claims of all registered experiments, judged on ``directory``'s result files.

    Verdicts are computed anew from the stored runs, so that they follow the claims as they stand.
    Files that are damaged, or were made with another config than the preset's, are named under
    ``problems``. ``out`` is the folder that the commands for missing results name.
    """
    problems = [f"experiment `{name}` cannot be imported: {why}" for name, why in broken().items()]
    entries: list[tuple[Experiment, Claim, dict[str, Verdict | None]]] = []
    for name in names():
        experiment = get(name)
        judged: dict[str, dict[str, Verdict]] = {}
        scales = [scale for scale in SCALES if scale in experiment.presets]
        for scale in scales:
            path = Path(directory) / f"{name}.{scale}.json"
            try:
                judged[scale] = _judge(experiment, scale, path)
            except FileNotFoundError:
                judged[scale] = {}
            except (ResultError, OSError) as error:
                problems.append(str(error))
                judged[scale] = {}
        for claim in experiment.claims:
            entries.append(
                (experiment, claim, {scale: judged[scale].get(claim.id) for scale in scales})
            )
    return Ledger(entries, problems, out)


def _judge(experiment: Experiment, scale: str, path: Path) -> dict[str, Verdict]:
    result = Result.load(path)
    if (result.experiment, result.scale) != (experiment.name, scale):
        raise ResultError(f"{path.name}: holds {result.experiment} at scale {result.scale}")
    if not made_with(experiment.presets[scale], result.config):
        raise ResultError(f"{path.name}: made with another config than the preset's; run it again")
    return {verdict.claim.id: verdict for verdict in experiment.judge(result)}
