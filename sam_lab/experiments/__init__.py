"""Experiments that decide the claims of the papers: one module each, one command line over them.

The folders follow the book: `edge` (part I), `sam` (II), `late` (III), `inputs` (IV), `family` (V),
`theory` (VI), `critics` (VII); `lab` is the machinery. ``python -m sam_lab.experiments list`` names
the experiments; :func:`run` runs one from Python.
"""

from sam_lab.experiments.lab.claims import (
    CONTROL,
    OURS,
    Claim,
    Criterion,
    NotApplicable,
    Source,
    Verdict,
    claim,
    claims_table,
)
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.registry import ExperimentError, broken, get, judge, names, table
from sam_lab.experiments.lab.report import (
    Ledger,
    LedgerCell,
    LedgerRow,
    headlines,
    ledger,
    ledger_rows,
    side_by_side,
)
from sam_lab.experiments.lab.result import Result, ResultError, Rows, Run, SeedRuns, merge
from sam_lab.experiments.lab.runner import run
from sam_lab.experiments.lab.statistics import Ratio, t_interval
from sam_lab.experiments.lab.store import Busy
from sam_lab.experiments.lab.table import Bullets, Table

__all__ = [
    "CONTROL",
    "OURS",
    "Bullets",
    "Busy",
    "Cell",
    "Claim",
    "Criterion",
    "Experiment",
    "ExperimentError",
    "Ledger",
    "LedgerCell",
    "LedgerRow",
    "NotApplicable",
    "Ratio",
    "Result",
    "ResultError",
    "Rows",
    "Run",
    "SeedRuns",
    "Source",
    "Studies",
    "Study",
    "Table",
    "Verdict",
    "broken",
    "claim",
    "claims_table",
    "get",
    "headlines",
    "judge",
    "ledger",
    "ledger_rows",
    "merge",
    "names",
    "run",
    "side_by_side",
    "t_interval",
    "table",
]
