"""The ledger: all claims of all experiments, laptop and paper scale side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sam_lab.experiments.claims import Claim, Table, Verdict
from sam_lab.experiments.core import SCALES, Experiment, broken, config_dict, get, names
from sam_lab.experiments.result import Result, ResultError


@dataclass(frozen=True)
class Ledger:
    """Claims and their verdicts, computed from the runs of the result files of a folder.

    Attributes:
        entries: a claim each: its experiment, the claim, and its verdict at each scale (None where
            that scale was not run).
        problems: files that could not be used, and why.
    """

    entries: list[tuple[Experiment, Claim, dict[str, Verdict | None]]]
    problems: list[str] = field(default_factory=list)
    out: str = "book/results"

    def table(self) -> Table:
        """One row a claim; what is missing says how to make it."""
        rows = []
        missing: dict[str, None] = {}
        for experiment, claim, verdicts in self.entries:
            cells = []
            for scale, verdict in verdicts.items():
                if verdict is None:
                    missing[experiment.command(scale, out=self.out)] = None
                    cells.append("not yet run")
                else:
                    cells.append(f"{verdict.measured} ({verdict.seeds}): {verdict.explained}")
            words = f"{claim.criterion} {claim.unit}".rstrip()
            rows.append([claim.statement, claim.source, words, *cells])
        notes = []
        if self.problems:
            notes.append("Not used:\n\n" + "\n".join(f"- {problem}" for problem in self.problems))
        if missing:
            notes.append("Not yet run:\n\n" + "\n".join(f"- `{command}`" for command in missing))
        header = ["Statement", "Source", "Criterion", *(scale.capitalize() for scale in SCALES)]
        return Table(header, rows, notes)

    def _repr_markdown_(self) -> str:
        return self.table()._repr_markdown_()

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return str(self)


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
        for scale in SCALES:
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
                (experiment, claim, {scale: judged[scale].get(claim.id) for scale in SCALES})
            )
    return Ledger(entries, problems, out)


def _judge(experiment: Experiment, scale: str, path: Path) -> dict[str, Verdict]:
    result = Result.load(path)
    if (result.experiment, result.scale) != (experiment.name, scale):
        raise ResultError(f"{path.name}: holds {result.experiment} at scale {result.scale}")
    if result.config != config_dict(experiment.presets[scale]):
        raise ResultError(f"{path.name}: made with another config than the preset's; run it again")
    return {verdict.id: verdict for verdict in experiment.judge(result)}
