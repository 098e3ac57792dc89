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
from sam_lab.experiments.lab.statistics import (
    DOMAINS,
    Estimate,
    Ratio,
    fieller,
    mean_interval,
)
from sam_lab.experiments.lab.table import Table

__all__ = [
    "CONTROL",
    "KINDS",
    "OURS",
    "Claim",
    "Criterion",
    "NotApplicable",
    "Source",
    "Verdict",
    "claim",
    "claims_table",
]

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
DOES_NOT_APPLY = "does not apply"

MIN_SEEDS = 3

KINDS = {
    "paper": "a sentence of the paper, checked against its text",
    "code": "read in the authors' code",
    "after": "our reading of a paper, not a sentence that we could check in its text",
    "ours": "this book's own, even where a paper gave the occasion",
    "control": "a control, which would come out otherwise if a finding were an artefact",
}
"""How far a statement may be charged to its source."""


class NotApplicable(Exception):
    """Raised by a statistic when a seed's runs do not meet the condition of its claim.

    The message says what is the case instead, such as ``the run starts beyond its edge``.
    """


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

    Calling it gives the statistic: ``claim(runs)`` is one number for one seed's runs, or a `Ratio`.

    Attributes:
        id: short name, unique within its experiment.
        statement: what is claimed, in one sentence.
        source: where it is claimed.
        criterion: where the statistic has to lie for the claim to hold.
        statistic: maps the `SeedRuns` of a seed to a number, or to a `Ratio` where the claim is on
            a ratio of means over seeds. It raises `NotApplicable` where the claim has no sense.
        unit: of the statistic, ``""`` for a ratio or a count.
        set_after: whether the criterion was set after the first data were seen.
        headline: whether it is among the few that its chapter opens with.
        domain: where the statistic can lie, one of `DOMAINS`; the interval keeps to it.
        undefined: of a claim on a `Ratio`, what is the case where its denominator cannot be told
            from zero, such as ``SAM was no flatter than SGD here``.

    Raises:
        ValueError: an id that is no short name, no statement, or an unknown domain.
        TypeError: a source or a criterion of another type.
    """

    id: str
    statement: str
    source: Source
    criterion: Criterion
    statistic: Callable[[SeedRuns], float | Ratio] = field(repr=False, compare=False)
    unit: str = ""
    set_after: bool = False
    headline: bool = False
    domain: str = "real"
    undefined: str = "the denominator cannot be told from zero"

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip():
            raise ValueError(f"claim id must be a short name, got {self.id!r}")
        if not self.statement:
            raise ValueError(f"claim {self.id!r} needs a statement")
        if self.domain not in DOMAINS:
            raise ValueError(
                f"claim {self.id!r}: domain must be one of {', '.join(DOMAINS)}, "
                f"got {self.domain!r}"
            )
        for name, kind in (("source", Source), ("criterion", Criterion)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"claim {self.id!r}: {name} must be a {kind.__name__}, got {value!r}"
                )

    def __call__(self, runs: SeedRuns) -> float | Ratio:
        value = self.statistic(runs)
        return Ratio(*map(float, value)) if isinstance(value, Ratio) else float(value)

    @property
    def criterion_in_words(self) -> str:
        """The criterion with its unit, such as ``0.9 to 1.1``."""
        return f"{self.criterion} {self.unit}".rstrip()

    def under(self, suffix: str, begins: str, **settings: Any) -> Claim:
        """The same claim on those runs with these settings alone.

        Args:
            suffix: of its id.
            begins: how its statement begins, up to the space before the rest.

        Where no run of a scale has these settings, the claim does not apply to it.
        """

        def statistic(runs: SeedRuns) -> float | Ratio:
            try:
                chosen = runs.where(**settings)
            except ValueError as error:
                raise NotApplicable(str(error)) from None
            return self(chosen)

        first, second = self.statement[0], self.statement[1:2]
        # "After" goes on in small letters, "SAM" does not.
        small = first.lower() if second.islower() or second == " " else first
        return dataclasses.replace(
            self,
            id=f"{self.id}-{suffix}",
            statement=f"{begins}{small}{self.statement[1:]}",
            statistic=statistic,
        )

    def judge(self, result: Result) -> Verdict:
        """The verdict of ``result``'s seeds on this claim.

        *Reproduced* when the whole 95% interval lies inside the criterion, *not reproduced* when it
        lies wholly outside, *inconclusive* otherwise: also with fewer than three seeds, or when the
        statistic fails, is not finite or leaves its domain.

        The interval is that of the mean over seeds (`mean_interval`), or of the ratio of two means
        (`fieller`). *Does not apply* where that ratio is not defined, or where the statistic raises
        `NotApplicable` for more than half of the seeds. Where it does for fewer, the claim is
        inconclusive: a mean over the seeds that are left would be one over a selection.

        Raises:
            ImportError: SciPy, or what a statistic needs, is not installed.
        """
        values: list[float | Ratio] = []
        refusals: list[str] = []
        everything = result.by_seed()
        for runs in everything:
            try:
                value = self(runs)
            except NotApplicable as why:
                refusals.append(str(why))
            except ImportError:
                raise
            except Exception as error:  # a fault in one statistic must not hide the others
                reason = f"the statistic failed: {type(error).__name__}: {error}"
                return self._undecided(len(everything), reason)
            else:
                rounded = Ratio(*map(_six, value)) if isinstance(value, Ratio) else _six(value)
                values.append(rounded)
        n = len(everything)
        if not n:
            return self._undecided(n, "there is no run")
        if refusals:
            reason = "; ".join(dict.fromkeys(refusals))
            if 2 * len(refusals) > n:
                where = "" if len(refusals) == n else f" in {len(refusals)} of {n} seeds"
                return self._undecided(n, f"{reason}{where}", verdict=DOES_NOT_APPLY)
            return self._undecided(
                n, f"it does not apply in {len(refusals)} of {n} seeds: {reason}", values
            )
        strange = sum(not _finite(value) for value in values)
        if strange:
            return self._undecided(n, f"{strange} of {n} values are not finite", values)
        return self._weigh(values)

    def _weigh(self, values: list[float | Ratio]) -> Verdict:
        n = len(values)
        if n == 1:
            (value,) = values
            mean = value.quotient if isinstance(value, Ratio) else value
            reason = f"at least {MIN_SEEDS} seeds are needed"
            return Verdict(self, tuple(values), n, mean, None, INCONCLUSIVE, reason)
        try:
            found = self._estimate(values)
        except ValueError as error:
            return self._undecided(n, str(error), values)
        if found is None:
            if n < MIN_SEEDS:
                return self._undecided(n, f"at least {MIN_SEEDS} seeds are needed", values)
            return self._undecided(n, f"undefined: {self.undefined}", values, DOES_NOT_APPLY)
        mean, low, high = found
        verdict, reason = INCONCLUSIVE, ""
        if n < MIN_SEEDS:
            reason = f"at least {MIN_SEEDS} seeds are needed"
        elif self.criterion.low <= low and high <= self.criterion.high:
            verdict = REPRODUCED
        elif high < self.criterion.low or low > self.criterion.high:
            verdict = NOT_REPRODUCED
        else:
            reason = "the interval crosses the criterion's bound"
        return Verdict(self, tuple(values), n, mean, (low, high), verdict, reason)

    def _estimate(self, values: list[float | Ratio]) -> Estimate | None:
        pairs = [value for value in values if isinstance(value, Ratio)]
        numbers = [value for value in values if not isinstance(value, Ratio)]
        if pairs and numbers:
            raise ValueError("the statistic is a number for one seed and a ratio for another")
        if pairs:
            return fieller(pairs)
        return mean_interval(numbers, self.domain, 100.0 if self.unit == "%" else 1.0)

    def _undecided(
        self,
        n: int,
        reason: str,
        values: Iterable[float | Ratio] = (),
        verdict: str = INCONCLUSIVE,
    ) -> Verdict:
        words = " ".join(reason.split())
        return Verdict(self, tuple(values), n, math.nan, None, verdict, words)


def _six(value: float) -> float:
    """Six significant digits, as in the runs: a verdict must not hang on more."""
    return math.nan if math.isnan(value) else float(f"{value:.6g}")


def _finite(value: float | Ratio) -> bool:
    return all(map(math.isfinite, value if isinstance(value, Ratio) else (value,)))


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
    domain: str = "real",
    undefined: str = "the denominator cannot be told from zero",
) -> Callable[[Callable[[SeedRuns], float | Ratio]], Claim]:
    """Make a claim of the function below: its statistic, a number for one seed's runs.

    Args:
        source: where it is claimed.
        low, high: the criterion, as in `Criterion`.
        unit: of the statistic.
        statement: what is claimed; the function's docstring unless given.
        id: the function's name, its underscores hyphens, unless given.
        set_after: whether the criterion was set after the first data were seen.
        headline: whether it is among the few that its chapter opens with.
        domain: ``"positive"`` for a statistic above 0, ``"share"`` for one from 0 to 1 (from 0 to
            100 where the unit is %), so that the interval keeps to it.
        undefined: of a claim on a `Ratio`, what is the case where it has no sense.

    Example:
        >>> @claim(Source("Cohen et al. 2021", "after"), 0.9, 1.1)
        ... def hovers(runs):
        ...     \"\"\"Sharpness hovers at 2/lr: its median over 2/lr\"\"\"
        ...     return runs.one(rho=0).value("median")
        >>> hovers.id, str(hovers.criterion)
        ('hovers', '0.9 to 1.1')
    """

    def make(statistic: Callable[[SeedRuns], float | Ratio]) -> Claim:
        return Claim(
            id or statistic.__name__.strip("_").replace("_", "-"),
            " ".join((statement or statistic.__doc__ or "").split()),
            source,
            Criterion(low, high),
            statistic,
            unit,
            set_after,
            headline,
            domain,
            undefined,
        )

    return make


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about one claim.

    Attributes:
        values: the statistic, one a seed, in the order of the result's seeds; empty where it
            failed. Seeds to which the claim does not apply have none.
        n: how many seeds the result has.
        mean: the mean over seeds: the arithmetic one, or what the claim's domain has in its place
            (see `mean_interval`), or the ratio of two means; NaN where there is none.
        interval: its 95% interval; None where there is none.
        verdict: ``"reproduced"``, ``"not reproduced"``, ``"inconclusive"`` or ``"does not apply"``.
        reason: why it is one of the last two; empty otherwise.
    """

    claim: Claim
    values: tuple[float | Ratio, ...]
    n: int
    mean: float
    interval: tuple[float, float] | None
    verdict: str
    reason: str = ""

    @property
    def measured(self) -> str:
        """Mean over seeds, its interval and the unit, such as ``1.01 [0.98, 1.04]``.

        Equal values have no interval: ``1 in every seed``.
        """
        if math.isnan(self.mean):
            return "no value"
        unit = f" {self.claim.unit}" if self.claim.unit else ""
        if self.interval is None:
            return f"{self.mean:.3g}{unit}"
        if self.interval[0] == self.interval[1]:
            return f"{self.mean:.6g}{unit} in every seed"
        mean, low, high = _aligned(self.mean, *self.interval)
        return f"{mean} [{low}, {high}]{unit}"

    @property
    def seeds(self) -> str:
        """How many seeds it rests on, such as ``3 seeds``."""
        return f"{self.n} seed{'' if self.n == 1 else 's'}"

    @property
    def explained(self) -> str:
        """The verdict, followed by the reason where there is one."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict

    @property
    def summary(self) -> str:
        """All of it, such as ``1.01 [0.98, 1.04] (3 seeds): reproduced``."""
        if math.isnan(self.mean):
            return f"{self.explained}; {self.seeds}"
        return f"{self.measured} ({self.seeds}): {self.explained}"


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
    if largest < 1e-3 or largest >= 1e6:
        return [f"{value:.3g}" for value in (mean, low, high)]
    decimals = min(max(0, 1 - math.floor(math.log10(half))), 6)
    return [f"{value:.{decimals}f}" for value in (mean, low, high)]
