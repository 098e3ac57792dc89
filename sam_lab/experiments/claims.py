"""What a paper says, and the verdict that our own runs give on it.

A :class:`Claim` turns a result into one number per seed and states the range in which that number
has to lie. Its :class:`Verdict` is computed from the seeds and their spread, never typed.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_lab.experiments.result import Result

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)

CONFIDENCE = 0.95
MIN_SEEDS = 3


class ClaimError(ValueError):
    """A claim whose statistic does not give one number per seed."""


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
class Verdict:
    """What the seeds say about one claim.

    Attributes:
        values: the statistic, one number per seed, in the order of the result's seeds.
        interval: 95% Student-t interval for the mean over seeds; None where there is none
            (fewer than two values, or a value that is not finite).
        verdict: ``"reproduced"``, ``"not reproduced"`` or ``"inconclusive"``.
        reason: why it is inconclusive; empty otherwise.
    """

    id: str
    statement: str
    source: str
    unit: str
    values: tuple[float, ...]
    mean: float
    median: float
    interval: tuple[float, float] | None
    criterion: Criterion
    verdict: str
    reason: str = ""

    @property
    def measured(self) -> str:
        """Mean over seeds, its interval and the unit, such as ``1.01 [0.98, 1.04]``."""
        if not self.values:
            return "no value"
        unit = f" {self.unit}" if self.unit else ""
        if self.interval is None:
            return f"{self.mean:.3g}{unit}"
        mean, low, high = _aligned(self.mean, *self.interval)
        return f"{mean} [{low}, {high}]{unit}"

    @property
    def seeds(self) -> str:
        """How many seeds it rests on, such as ``3 seeds``."""
        return f"{len(self.values)} seed{'' if len(self.values) == 1 else 's'}"

    @property
    def criterion_in_words(self) -> str:
        """The criterion with its unit, such as ``0.9 to 1.1``."""
        return f"{self.criterion} {self.unit}".rstrip()

    @property
    def explained(self) -> str:
        """The verdict, followed by the reason where there is one."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that runs can decide.

    Args:
        id: short name, unique within its experiment.
        statement: what is claimed, in one sentence.
        source: where it is claimed (paper, figure or section).
        unit: unit of the statistic, ``""`` for a ratio or a count.
        statistic: maps a :class:`~sam_lab.experiments.Result` to one number per seed.
        criterion: where the number has to lie for the claim to hold.
    """

    id: str
    statement: str
    source: str
    unit: str
    statistic: Callable[[Result], Iterable[float]] = field(repr=False, compare=False)
    criterion: Criterion

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip():
            raise ValueError(f"claim id must be a short name, got {self.id!r}")
        if not isinstance(self.criterion, Criterion):
            raise TypeError(
                f"claim {self.id!r}: criterion must be a Criterion, got {self.criterion!r}"
            )

    def judge(self, result: Result) -> Verdict:
        """The verdict of ``result``'s seeds on this claim.

        *Reproduced* when the whole 95% t-interval of the mean over seeds lies inside the criterion,
        *not reproduced* when it lies wholly outside, *inconclusive* otherwise: also with fewer than
        three seeds, or when the statistic fails or is not finite.

        Raises:
            ClaimError: when the statistic gives something other than one number per seed.
        """
        try:
            values: Any = self.statistic(result)
            values = list(values) if isinstance(values, Iterable) else values
        except Exception as error:  # a fault in one statistic must not cost the runs
            return self.undecided(f"the statistic failed: {type(error).__name__}: {error}")
        return self._weigh(self._numbers(values, result.seeds))

    def undecided(self, reason: str) -> Verdict:
        """An inconclusive verdict without any value."""
        return self._verdict((), math.nan, math.nan, None, INCONCLUSIVE, " ".join(reason.split()))

    def _numbers(self, values: Any, seeds: tuple[int, ...]) -> tuple[float, ...]:
        try:
            # Six significant digits, as stored: a verdict read back equals the one computed.
            numbers = tuple(float(f"{float(value):.6g}") for value in values)
        except (TypeError, ValueError):
            raise ClaimError(
                f"claim {self.id!r}: the statistic must give one number per seed, "
                f"got {values!r:.100}"
            ) from None
        if len(numbers) != len(seeds):
            raise ClaimError(
                f"claim {self.id!r}: the statistic gave {len(numbers)} values for "
                f"{len(seeds)} seeds; it must give one number per seed"
            )
        return tuple(math.nan if math.isnan(number) else number for number in numbers)

    def _weigh(self, values: tuple[float, ...]) -> Verdict:
        strange = sum(not math.isfinite(value) for value in values)
        if strange:
            reason = f"{strange} of {len(values)} values are not finite"
            return self._verdict(values, math.nan, math.nan, None, INCONCLUSIVE, reason)
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
        return self._verdict(values, mean, median, interval, verdict, reason)

    def _verdict(
        self,
        values: tuple[float, ...],
        mean: float,
        median: float,
        interval: tuple[float, float] | None,
        verdict: str,
        reason: str,
    ) -> Verdict:
        return Verdict(
            self.id,
            self.statement,
            self.source,
            self.unit,
            values,
            mean,
            median,
            interval,
            self.criterion,
            verdict,
            reason,
        )


def t_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student-t interval for the mean of at least two ``values``."""
    sample = list(values)
    n = len(sample)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = math.fsum(sample) / n
    variance = math.fsum((value - mean) ** 2 for value in sample) / (n - 1)
    half = t_quantile(n - 1, confidence) * math.sqrt(variance / n)
    return mean - half, mean + half


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with ``P(|T| <= t) = confidence`` for Student's distribution with ``df`` degrees.

    For whole ``df`` the probability is a finite trigonometric sum in ``theta = atan(t / sqrt(df))``
    (Abramowitz & Stegun, 26.7.3 and 26.7.4); bisection inverts it to machine precision.
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")

    def probability(theta: float) -> float:
        sine, cosine = math.sin(theta), math.cos(theta)
        odd = df % 2
        term = cosine if odd else 1.0
        total = 0.0
        for power in range(1 if odd else 0, df - 1, 2):
            total += term
            term *= cosine * cosine * (power + 1) / (power + 2)
        return 2 / math.pi * (theta + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


class Table:
    """Rows under a header that show as a Markdown table in Jupyter, Colab and the book."""

    def __init__(self, header: list[str], rows: list[list[str]], notes: Iterable[str] = ()) -> None:
        self.header, self.rows, self.notes = header, rows, list(notes)

    def _repr_markdown_(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        return "\n\n".join([table, *self.notes])

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The same as text: one block a row, for a terminal."""
        width = max((len(name) for name in self.header), default=0)
        blocks = []
        for row in self.rows:
            lines = []
            for name, cell in zip(self.header, row, strict=True):
                head = f"{name:<{width}}  "
                lines.append(
                    textwrap.fill(cell, 100, initial_indent=head, subsequent_indent=" " * len(head))
                )
            blocks.append("\n".join(lines))
        return "\n\n".join([*blocks, *self.notes]) or "nothing to show"


def claims_table(verdicts: Iterable[Verdict], scale: str) -> Table:
    """The verdicts as a table: statement, source, measured, criterion, verdict."""
    rows = [
        [
            verdict.statement,
            verdict.source,
            f"{verdict.measured} ({verdict.seeds}, {scale})",
            verdict.criterion_in_words,
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


def _cell(text: str) -> str:
    # A bar would end the cell, and inside $...$ an escaped one would mean a norm.
    def spell(formula: re.Match[str]) -> str:
        return formula[0].replace("\\|", r"\Vert{}").replace("|", r"\vert{}")

    return re.sub(r"\$[^$]+\$", spell, " ".join(text.split())).replace("|", r"\|")
