"""The ledger: all claims of all experiments, their scales side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sam_lab.experiments.lab.claims import KINDS, Claim, Verdict
from sam_lab.experiments.lab.experiment import SCALES, Experiment, config_dict
from sam_lab.experiments.lab.registry import broken, get, names
from sam_lab.experiments.lab.result import Result, ResultError, command
from sam_lab.experiments.lab.table import Table

__all__ = ["Ledger", "ledger", "side_by_side"]


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

    def tables(self) -> list[tuple[str, Table]]:
        """For each experiment its title and its claims, one row a claim, one column a scale.

        A headline's statement is bold. *Kind* is that of the source, and *Set* says whether the
        criterion was set before or after the first data: see `legend`.
        """
        grouped: dict[str, list[list[str]]] = {}
        headers: dict[str, list[str]] = {}
        for experiment, claim, verdicts in self.entries:
            grouped.setdefault(experiment.title, []).append(
                [
                    f"**{claim.statement}**" if claim.headline else claim.statement,
                    claim.source.text,
                    claim.source.kind,
                    claim.criterion_in_words,
                    "after" if claim.set_after else "before",
                    *(_found(verdict) for verdict in verdicts.values()),
                ]
            )
            scales = [scale.capitalize() for scale in verdicts]
            headers[experiment.title] = [
                *("Statement", "Source", "Kind", "Criterion", "Set"),
                *scales,
            ]
        return [(title, Table(headers[title], rows)) for title, rows in grouped.items()]

    def legend(self) -> str:
        """What the columns *Kind* and *Set* and bold statements mean."""
        kinds = "; ".join(f"*{kind}*: {meaning}" for kind, meaning in KINDS.items())
        return (
            f"**Kind** says how far a statement may be charged to its source. {kinds}.\n\n"
            "**Set** says whether the criterion was set before or after the first data were seen. "
            "A statement in bold is a headline of its chapter. A cell gives the mean over seeds, "
            "its 95% interval, the number of seeds, and the verdict."
        )

    def notes(self) -> list[str]:
        """Files that could not be used, and the commands for results that are missing."""
        missing = [
            command(experiment.name, scale, out=self.out)
            for experiment, _, verdicts in self.entries
            for scale, verdict in verdicts.items()
            if verdict is None
        ]
        notes = []
        if self.problems:
            notes.append("Not used:\n\n" + "\n".join(f"- {problem}" for problem in self.problems))
        if missing:
            commands = "\n".join(f"- `{command}`" for command in dict.fromkeys(missing))
            notes.append("Not yet run:\n\n" + commands)
        return notes

    def _repr_markdown_(self) -> str:
        parts = [f"**{title}**\n\n{table._repr_markdown_()}" for title, table in self.tables()]
        return "\n\n".join([self.legend(), *parts, *self.notes()])

    def __str__(self) -> str:
        parts = [f"{title}\n\n{table}" for title, table in self.tables()]
        return "\n\n".join([*parts, *self.notes()]) or "nothing to show"

    def __repr__(self) -> str:
        return str(self)


def _found(verdict: Verdict | None) -> str:
    if verdict is None:
        return "not yet run"
    return f"{verdict.measured} ({verdict.seeds}): {verdict.explained}"


def _briefly(verdict: Verdict) -> str:
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
    if result.config != config_dict(experiment.presets[scale]):
        raise ResultError(f"{path.name}: made with another config than the preset's; run it again")
    return {verdict.claim.id: verdict for verdict in experiment.judge(result)}
