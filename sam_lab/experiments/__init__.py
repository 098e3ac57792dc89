"""Experiments that decide the claims of the papers: one module each, one command line over them.

``python -m sam_lab.experiments list`` names them; :func:`run` runs one from Python.
"""

from sam_lab.experiments.claims import Table
from sam_lab.experiments.core import (
    Busy,
    Claim,
    ClaimError,
    Criterion,
    Experiment,
    ExperimentError,
    Result,
    ResultError,
    Run,
    Verdict,
    broken,
    get,
    names,
    run,
)
from sam_lab.experiments.report import Ledger, ledger, side_by_side

__all__ = [
    "Busy",
    "Claim",
    "ClaimError",
    "Criterion",
    "Experiment",
    "ExperimentError",
    "Ledger",
    "Result",
    "ResultError",
    "Run",
    "Table",
    "Verdict",
    "broken",
    "get",
    "ledger",
    "names",
    "run",
    "side_by_side",
]
