"""What an experiment is: presets, settings to compare, one run, and the claims that runs decide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sam_lab.experiments.lab.checkpoints import Checkpoints
from sam_lab.experiments.lab.claims import Claim, Verdict
from sam_lab.experiments.lab.result import Columns, Result, Setting, plain
from sam_lab.experiments.lab.setup import Setup

__all__ = [
    "SCALES",
    "Cell",
    "Experiment",
    "Studies",
    "Study",
    "check_config",
    "config_dict",
    "made_with",
]

REQUIRED = ("laptop", "paper")
SCALES = {
    "laptop": "a small network on little data, which two cores finish in minutes",
    "desktop": "the largest run on the papers' own data that two cores finish in about an hour",
    "fast": "all of CIFAR-10, with a small network meant to learn it in few epochs",
    "paper": "the paper's own network and data where it has them, on whatever machine it ran",
}
"""The presets that the ledger sets side by side, from small to large, and what each of them is."""


@dataclass(frozen=True)
class Cell:
    """One setting with one seed: what a call of `Experiment.run` measures.

    ``cell["lr"]`` is ``cell.setting["lr"]``.

    Attributes:
        tick: ``tick(done, total)`` may be called along the way, to show progress.
        checkpoints: where a long run may keep what it needs to go on after an interruption.
    """

    setting: Setting
    seed: int = 0
    device: torch.device | str = "cpu"
    tick: Callable[[int, int], None] = field(default=lambda done, total: None, repr=False)
    checkpoints: Checkpoints = field(default_factory=Checkpoints, repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.setting[name]


@dataclass(frozen=True)
class Experiment:
    """One claim or figure of a paper, as code that decides it.

    Args:
        name: name of its module.
        title: one line for a reader.
        source: paper, figure or section.
        presets: a frozen dataclass instance for ``"laptop"`` (minutes on two cores) and one for
            ``"paper"``, and for what there is between, see `SCALES`; more presets are allowed,
            but are not in the ledger.
        settings: ``settings(config)`` lists what is compared, each a dict such as ``{"lr": 0.1}``.
        run: ``run(config, cell)`` measures one setting with one seed and returns columns,
            ``{"loss": [...], ...}``. All randomness comes from ``cell.seed``.
        claims: what the runs decide.
        setup: the paper's own, as far as it is known, from which each preset may depart.
        cost: ``cost(config)`` counts the FLOPs of all settings with one seed, without data.
        needs: optional packages without which a run would fail at its end: looked for before the
            first one begins.

    Raises:
        ValueError, TypeError: when a part is missing or of the wrong kind.
    """

    name: str
    title: str
    source: str
    presets: Mapping[str, Any]
    settings: Callable[[Any], list[Setting]] = field(repr=False)
    run: Callable[[Any, Cell], Mapping[str, Any]] = field(repr=False)
    claims: Sequence[Claim] = ()
    setup: Setup | None = None
    cost: Callable[[Any], float] | None = field(default=None, repr=False)
    needs: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"experiment name must be a module name, got {self.name!r}")
        missing = [scale for scale in REQUIRED if scale not in self.presets]
        if missing:
            raise ValueError(f"experiment {self.name!r} needs a preset {missing[0]!r}")
        for scale, config in self.presets.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", scale):
                raise ValueError(f"experiment {self.name!r}: a preset cannot be called {scale!r}")
            check_config(config, f"experiment {self.name!r}, preset {scale!r}")
            if self.setup:
                self.setup.departures(config)  # a fact without its field is an error here
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"experiment {self.name!r}: claim ids must differ, got {ids}")

    def judge(self, result: Result) -> list[Verdict]:
        """The verdicts that ``result``'s runs give on the claims as they stand now."""
        return [claim.judge(result) for claim in self.claims]


@dataclass(frozen=True)
class Study:
    """One of several questions that an experiment asks under one config; see `Experiment`."""

    name: str
    settings: Callable[[Any], list[Setting]] = field(repr=False)
    run: Callable[[Any, Cell], Mapping[str, Any]] = field(repr=False)


class Studies:
    """Several studies as the `settings` and the `run` of one experiment.

    Each setting names its study: ``{"study": "drift", "rho": 0.1}``.
    """

    def __init__(self, *studies: Study) -> None:
        self._studies = {study.name: study for study in studies}

    def settings(self, config: Any) -> list[Setting]:
        """The settings of each study, one study after the other."""
        return [
            {"study": name, **setting}
            for name, study in self._studies.items()
            for setting in study.settings(config)
        ]

    def run(self, config: Any, cell: Cell) -> Columns:
        """Run the study that the cell's setting names."""
        return dict(self._studies[cell["study"]].run(config, cell))


def check_config(config: Any, where: str) -> None:
    """TypeError unless ``config`` is a frozen dataclass that a result file can hold."""
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"{where} must be an instance of a dataclass, got {config!r:.100}")
    if not getattr(type(config), "__dataclass_params__").frozen:  # noqa: B009 (typeshed omits it)
        raise TypeError(f"{where}: {type(config).__name__} must be a frozen dataclass")
    config_dict(config)


def config_dict(config: Any) -> dict[str, Any]:
    """The config as a result file holds it."""
    found: dict[str, Any] = plain(dataclasses.asdict(config), type(config).__name__)
    return found


def made_with(config: Any, found: Mapping[str, Any]) -> bool:
    """Whether a result file that holds the config `found` was made with this one.

    A field that the file does not have came after it. It must have its default here, which by
    convention is what was done before there was the field.
    """
    ours = config_dict(config)
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name not in found:
            same = value == each.default
        elif dataclasses.is_dataclass(value) and isinstance(found[each.name], Mapping):
            same = made_with(value, found[each.name])
        else:
            same = ours[each.name] == found[each.name]
        if not same:
            return False
    return set(found) <= set(ours)
