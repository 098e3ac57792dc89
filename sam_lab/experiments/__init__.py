"""Experiments that decide the claims of the papers: one module each, one command line over them.

The folders follow the book: `edge` (part I), `sam` (II), `late` (III), `inputs` (IV); `lab` is the
machinery. ``python -m sam_lab.experiments list`` names the experiments; :func:`run` runs one from
Python.
"""

from sam_lab.experiments.lab.claims import (
    CONTROL,
    OURS,
    Claim,
    Criterion,
    Source,
    Verdict,
    claim,
    claims_table,
)
from sam_lab.experiments.lab.experiment import Cell, Experiment, Studies, Study
from sam_lab.experiments.lab.registry import ExperimentError, broken, get, judge, names, table
from sam_lab.experiments.lab.report import Ledger, ledger, side_by_side
from sam_lab.experiments.lab.result import Result, ResultError, Rows, Run, SeedRuns, merge
from sam_lab.experiments.lab.runner import run
from sam_lab.experiments.lab.statistics import t_interval
from sam_lab.experiments.lab.store import Busy
from sam_lab.experiments.lab.table import Table

__all__ = [
    "CONTROL",
    "OURS",
    "Busy",
    "Cell",
    "Claim",
    "Criterion",
    "Experiment",
    "ExperimentError",
    "Ledger",
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
    "judge",
    "ledger",
    "merge",
    "names",
    "run",
    "side_by_side",
    "t_interval",
    "table",
]
