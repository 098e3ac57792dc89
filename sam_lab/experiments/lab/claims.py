"""What a paper says, and the verdict that our own runs give on it.

A :class:`Claim` makes one number of each seed's runs and states the range in which that number has
to lie. Its :class:`Verdict` is computed from the seeds and their spread, never typed or stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sam_lab.experiments.lab.result import Result, SeedRuns
from sam_lab.experiments.lab.statistics import t_interval
from sam_lab.experiments.lab.table import Table

__all__ = [
    "CONTROL",
    "KINDS",
    "OURS",
    "Claim",
    "Criterion",
    "Source",
    "Verdict",
    "claim",
    "claims_table",
]

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"

MIN_SEEDS = 3

KINDS = {
    "paper": "a sentence of the paper, checked against its text",
    "code": "read in the authors' code",
    "after": "our reading of a paper",
    "ours": "this book's own",
    "control": "a control, which would come out otherwise if a finding were an artefact",
}
"""How far a statement may be charged to its source."""


@dataclass(frozen=True)
class Source:
    """Where a statement comes from: a text such as ``Zhou et al. 2025``, and one of `KINDS`.

    Raises:
        ValueError: another kind.
    """

    text: str
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"the kind of a source must be one of {', '.join(KINDS)}, got {self.kind!r}"
            )

    def __str__(self) -> str:
        return self.text


OURS = Source("this book", "ours")
CONTROL = Source("control", "control")


@dataclass(frozen=True)
class Criterion:
    """The closed range ``[low, high]`` of a claim's statistic; leave out a side to keep it open.

    Raises:
        ValueError: when a bound is NaN, when ``low > high``, or when neither side is bounded.
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"criterion needs low <= high, got low={self.low}, high={self.high}")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError("criterion needs at least one finite bound, got none")

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"≥ {self.low:.4g}"
        if math.isinf(self.low):
            return f"≤ {self.high:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Claim:
    """A statement that runs can decide; :func:`claim` makes one of a function.

    Calling it gives the statistic: ``claim(runs)`` is one number for one seed's runs.

    Attributes:
        id: short name, unique within its experiment.
        statement: what is claimed, in one sentence.
        source: where it is claimed.
        criterion: where the statistic has to lie for the claim to hold.
        statistic: maps the `SeedRuns` of a seed to a number.
        unit: of the statistic, ``""`` for a ratio or a count.
        set_after: whether the criterion was set after the first data were seen.
        headline: whether it is among the few that its chapter opens with.

    Raises:
        ValueError: an id that is no short name, or no statement.
        TypeError: a source or a criterion of another type.
    """

    id: str
    statement: str
    source: Source
    criterion: Criterion
    statistic: Callable[[SeedRuns], float] = field(repr=False, compare=False)
    unit: str = ""
    set_after: bool = False
    headline: bool = False

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip():
            raise ValueError(f"claim id must be a short name, got {self.id!r}")
        if not self.statement:
            raise ValueError(f"claim {self.id!r} needs a statement")
        for name, kind in (("source", Source), ("criterion", Criterion)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"claim {self.id!r}: {name} must be a {kind.__name__}, got {value!r}"
                )

    def __call__(self, runs: SeedRuns) -> float:
        return float(self.statistic(runs))

    @property
    def criterion_in_words(self) -> str:
        """The criterion with its unit, such as ``0.9 to 1.1``."""
        return f"{self.criterion} {self.unit}".rstrip()

    def under(self, suffix: str, begins: str, **settings: Any) -> Claim:
        """The same claim on those runs with these settings alone.

        Args:
            suffix: of its id.
            begins: how its statement begins.
        """
        return dataclasses.replace(
            self,
            id=f"{self.id}-{suffix}",
            statement=begins + self.statement,
            statistic=lambda runs: self(runs.where(**settings)),
        )

    def judge(self, result: Result) -> Verdict:
        """The verdict of ``result``'s seeds on this claim.

        *Reproduced* when the whole 95% t-interval of the mean over seeds lies inside the criterion,
        *not reproduced* when it lies wholly outside, *inconclusive* otherwise: also with fewer than
        three seeds, or when the statistic fails or is not finite.
        """
        values = []
        for runs in result.by_seed():
            try:
                value = self(runs)
            except Exception as error:  # a fault in one statistic must not hide the others
                return self._undecided(f"the statistic failed: {type(error).__name__}: {error}")
            # Runs hold six significant digits: a verdict must not hang on more.
            values.append(math.nan if math.isnan(value) else float(f"{value:.6g}"))
        if not values:
            return self._undecided("there is no run")
        strange = sum(not math.isfinite(value) for value in values)
        if strange:
            return self._undecided(f"{strange} of {len(values)} values are not finite", values)
        return self._weigh(values)

    def _weigh(self, values: list[float]) -> Verdict:
        mean = math.fsum(values) / len(values)
        interval = t_interval(values) if len(values) > 1 else None
        verdict, reason = INCONCLUSIVE, ""
        if interval is None or len(values) < MIN_SEEDS:
            reason = f"at least {MIN_SEEDS} seeds are needed"
        elif self.criterion.low <= interval[0] and interval[1] <= self.criterion.high:
            verdict = REPRODUCED
        elif interval[1] < self.criterion.low or interval[0] > self.criterion.high:
            verdict = NOT_REPRODUCED
        else:
            reason = "the interval crosses the criterion's bound"
        ordered = sorted(values)
        middle = len(ordered) // 2
        median = (ordered[middle] + ordered[~middle]) / 2
        return Verdict(self, tuple(values), mean, median, interval, verdict, reason)

    def _undecided(self, reason: str, values: Iterable[float] = ()) -> Verdict:
        words = " ".join(reason.split())
        return Verdict(self, tuple(values), math.nan, math.nan, None, INCONCLUSIVE, words)


def claim(
    source: Source,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    unit: str = "",
    statement: str | None = None,
    id: str | None = None,
    set_after: bool = False,
    headline: bool = False,
) -> Callable[[Callable[[SeedRuns], float]], Claim]:
    """Make a claim of the function below: its statistic, a number for one seed's runs.

    Args:
        source: where it is claimed.
        low, high: the criterion, as in `Criterion`.
        unit: of the statistic.
        statement: what is claimed; the function's docstring unless given.
        id: the function's name, its underscores hyphens, unless given.
        set_after: whether the criterion was set after the first data were seen.
        headline: whether it is among the few that its chapter opens with.

    Example:
        >>> @claim(Source("Cohen et al. 2021", "after"), 0.9, 1.1)
        ... def hovers(runs):
        ...     \"\"\"Sharpness hovers at 2/lr: its median over 2/lr\"\"\"
        ...     return runs.one(rho=0).value("median")
        >>> hovers.id, str(hovers.criterion)
        ('hovers', '0.9 to 1.1')
    """

    def make(statistic: Callable[[SeedRuns], float]) -> Claim:
        return Claim(
            id or statistic.__name__.strip("_").replace("_", "-"),
            " ".join((statement or statistic.__doc__ or "").split()),
            source,
            Criterion(low, high),
            statistic,
            unit,
            set_after,
            headline,
        )

    return make


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about one claim.

    Attributes:
        values: the statistic, one number per seed, in the order of the result's seeds.
        interval: 95% Student-t interval for the mean over seeds; None where there is none
            (fewer than two values, or a value that is not finite).
        verdict: ``"reproduced"``, ``"not reproduced"`` or ``"inconclusive"``.
        reason: why it is inconclusive; empty otherwise.
    """

    claim: Claim
    values: tuple[float, ...]
    mean: float
    median: float
    interval: tuple[float, float] | None
    verdict: str
    reason: str = ""

    @property
    def measured(self) -> str:
        """Mean over seeds, its interval and the unit, such as ``1.01 [0.98, 1.04]``."""
        if not self.values:
            return "no value"
        unit = f" {self.claim.unit}" if self.claim.unit else ""
        if self.interval is None:
            return f"{self.mean:.3g}{unit}"
        mean, low, high = _aligned(self.mean, *self.interval)
        return f"{mean} [{low}, {high}]{unit}"

    @property
    def seeds(self) -> str:
        """How many seeds it rests on, such as ``3 seeds``."""
        return f"{len(self.values)} seed{'' if len(self.values) == 1 else 's'}"

    @property
    def explained(self) -> str:
        """The verdict, followed by the reason where there is one."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


def claims_table(verdicts: Iterable[Verdict], scale: str) -> Table:
    """The verdicts as a table: statement, source, measured, criterion, verdict."""
    rows = [
        [
            verdict.claim.statement,
            str(verdict.claim.source),
            f"{verdict.measured} ({verdict.seeds}, {scale})",
            verdict.claim.criterion_in_words,
            verdict.explained,
        ]
        for verdict in verdicts
    ]
    return Table(["Statement", "Source", "Measured", "Criterion", "Verdict"], rows)


def _aligned(mean: float, low: float, high: float) -> list[str]:
    """The three with the same decimals: two significant digits of the interval's half width."""
    half, largest = (high - low) / 2, max(abs(low), abs(high))
    if half < 1e-4 or largest >= 1e6:
        return [f"{value:.3g}" for value in (mean, low, high)]
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return [f"{value:.{decimals}f}" for value in (mean, low, high)]
