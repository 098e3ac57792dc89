"""The registry: an experiment is found by the name of its module, in whichever folder it lies.

A module of a sub-package with a constant ``EXPERIMENT``, named as the module, is an experiment.
Adding one touches no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from sam_lab.experiments.lab.claims import Verdict, claims_table
from sam_lab.experiments.lab.experiment import Experiment
from sam_lab.experiments.lab.result import Result
from sam_lab.experiments.lab.table import Table

__all__ = ["ExperimentError", "broken", "get", "judge", "names", "part", "table"]


class ExperimentError(ValueError):
    """An experiment that does not exist, or was asked for something that it cannot do."""


def names() -> list[str]:
    """Names of the experiments that can be imported."""
    return sorted(_registry()[0])


def broken() -> dict[str, str]:
    """Experiments whose module cannot be imported, and why."""
    return _registry()[1]


def get(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ExperimentError: when there is none, or when its module cannot be imported.
    """
    found, failed = _registry()
    if name in found:
        return found[name]
    if name in failed:
        raise ExperimentError(f"experiment {name!r} cannot be imported: {failed[name]}")
    raise ExperimentError(f"no experiment {name!r}; there are {', '.join(sorted(found)) or 'none'}")


def part(name: str) -> str:
    """The part of the book to which an experiment belongs, by its folder, such as ``late``."""
    package = _package()
    for path in _modules(package, {}):
        if path.rpartition(".")[2] == name:
            return path.removeprefix(f"{package.__name__}.").rpartition(".")[0]
    return ""


def judge(result: Result) -> list[Verdict]:
    """The verdicts that a result's runs give on the claims of its experiment as they stand now.

    Raises:
        ExperimentError: when there is no experiment of that name.
    """
    return get(result.experiment).judge(result)


def table(result: Result) -> Table:
    """The same as a table: statement, source, measured, criterion, verdict."""
    return claims_table(judge(result), result.scale)


def _registry() -> tuple[dict[str, Experiment], dict[str, str]]:
    package = _package()
    found: dict[str, Experiment] = {}
    failed: dict[str, str] = {}
    for path in _modules(package, failed):
        name = path.rpartition(".")[2]
        try:
            experiment = getattr(importlib.import_module(path), "EXPERIMENT", None)
            if experiment is None:
                continue
            if not isinstance(experiment, Experiment):
                raise TypeError(f"EXPERIMENT must be an Experiment, got {experiment!r:.100}")
            if experiment.name != name:
                raise ValueError(f"its name is {experiment.name!r}, which is not its module's")
            if name in found:
                raise ValueError("another folder has an experiment of this name")
            found[name] = experiment
        except Exception as error:  # one experiment that is broken must not hide the others
            failed[name] = f"{type(error).__name__}: {error}"
    return found, failed


def _package() -> ModuleType:
    return importlib.import_module(__package__.rpartition(".")[0])  # of which this is a part


def _modules(package: ModuleType, failed: dict[str, str]) -> Iterator[str]:
    """The modules of a package and of the packages in it, by their full names."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = module.name.rpartition(".")[2]
        if name.startswith("_"):
            continue
        if not module.ispkg:
            yield module.name
            continue
        try:
            inner = importlib.import_module(module.name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            yield from _modules(inner, failed)
