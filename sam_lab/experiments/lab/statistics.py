"""What claims are made of: intervals over seeds, and numbers from a run's columns.

Intervals and quantiles are SciPy's. It is imported where one is computed, so that experiments run
without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from sam_lab._optional import require

__all__ = [
    "CONFIDENCE",
    "DOMAINS",
    "Estimate",
    "Ratio",
    "farthest_from_one",
    "fieller",
    "mean_interval",
    "second_half",
    "second_half_median",
    "second_half_width",
    "t_interval",
    "t_quantile",
]

CONFIDENCE = 0.95

DOMAINS = {
    "real": "any number",
    "positive": "a number above 0, such as a ratio of two sharpnesses",
    "share": "a number from 0 to 1, or from 0 to 100 where the unit is %",
}
"""Where a statistic can lie; see `mean_interval`."""


class Estimate(NamedTuple):
    """A mean over seeds, and the ends of its interval."""

    mean: float
    low: float
    high: float


class Ratio(NamedTuple):
    """One seed's share of a claim whose number is the ratio of two means over seeds.

    The mean of the seeds' own quotients has no finite expectation where a denominator may come
    near zero; the ratio of the means has an honest interval, `fieller`. Write both parts so that
    the denominator is positive where the claim has a sense.
    """

    numerator: float
    denominator: float

    @property
    def quotient(self) -> float:
        """That of this seed alone; NaN where the denominator is 0."""
        return self.numerator / self.denominator if self.denominator else math.nan


def t_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student-t interval for the mean of at least two ``values``.

    Raises:
        ValueError: fewer than two values.
        ImportError: SciPy is not installed.
    """
    sample = list(values)
    if len(sample) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(sample)}")
    mean = math.fsum(sample) / len(sample)
    half = t_quantile(len(sample) - 1, confidence) * float(_stats().sem(sample))
    return mean - half, mean + half


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with ``P(|T| <= t) = confidence`` for Student's distribution with ``df`` degrees.

    Raises:
        ValueError: no such distribution, or no such quantile.
        ImportError: SciPy is not installed.
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return float(_stats().t.ppf((1 + confidence) / 2, df))


def mean_interval(
    values: Iterable[float],
    domain: str = "real",
    whole: float = 1.0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    r"""The mean of at least two ``values`` and an interval that keeps to their range.

    - ``"real"``: the arithmetic mean and Student's t-interval.
    - ``"positive"``: both are computed in the logarithm and carried back, so that the mean is the
      geometric one. A factor and its inverse count alike.
    - ``"share"``: both are computed for the angle $\arcsin\sqrt{x}$ of a share $x$, cut off at 0
      and 1, and carried back. Unlike the logit, the angle is finite for shares of 0 and 1. A
      bootstrap is no choice at the three to five seeds of this book: simulated on beta
      distributions with a mean from 0.5 to 0.95, its percentile interval holds the mean in 70 to
      85% of samples, the interval given here in 92 to 95%. Nearer to 0 or 1 than the seeds'
      spread, no interval from so few seeds holds what it promises.

    Equal values make an interval of no length, which is no certainty: say in how many seeds.

    Args:
        whole: the largest share, 1 or 100.

    Raises:
        ValueError: fewer than two values, an unknown domain, or a value outside of it.
        ImportError: SciPy is not installed.
    """
    sample = list(values)
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    if domain == "positive" and min(sample) <= 0:
        raise ValueError(f"a value must be positive here, got {min(sample):.6g}")
    if domain == "share" and not (min(sample) >= 0 and max(sample) <= whole):
        wrong = min(sample) if min(sample) < 0 else max(sample)
        raise ValueError(f"a share must lie between 0 and {whole:g}, got {wrong:.6g}")
    if len(sample) > 1 and len(set(sample)) == 1:
        return Estimate(sample[0], sample[0], sample[0])
    if domain == "positive":
        logs = [math.log(value) for value in sample]
        return Estimate(*(math.exp(value) for value in _centred(logs, confidence)))
    if domain == "share":
        angles = [math.asin(math.sqrt(value / whole)) for value in sample]
        cut = (min(max(angle, 0.0), math.pi / 2) for angle in _centred(angles, confidence))
        return Estimate(*(whole * math.sin(angle) ** 2 for angle in cut))
    return _centred(sample, confidence)


def _centred(sample: list[float], confidence: float) -> Estimate:
    return Estimate(math.fsum(sample) / len(sample), *t_interval(sample, confidence))


def fieller(pairs: Sequence[Ratio], confidence: float = CONFIDENCE) -> Estimate | None:
    r"""The ratio of the means of at least two pairs, and Fieller's interval for it.

    It holds all $r$ for which the t-interval of the mean of (numerator - $r$ denominator) holds 0,
    whence a quadratic inequality (E. C. Fieller 1954). None where the interval of the denominator's
    mean does not lie above 0: such ratios are everything and nothing.

    Raises:
        ValueError: fewer than two pairs.
        ImportError: SciPy is not installed.
    """
    if len(pairs) < 2:
        raise ValueError(f"an interval needs at least two pairs, got {len(pairs)}")
    if t_interval([pair.denominator for pair in pairs], confidence)[0] <= 0:
        return None
    above, below = np.mean(pairs, axis=0)
    cov = np.cov(np.transpose(pairs)) / len(pairs)
    squared = t_quantile(len(pairs) - 1, confidence) ** 2
    # a r^2 - 2 b r + c <= 0
    a, b, c = (
        float(one * two - squared * spread)
        for one, two, spread in (
            (below, below, cov[1, 1]),
            (above, below, cov[0, 1]),
            (above, above, cov[0, 0]),
        )
    )
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    return Estimate(float(above / below), b / a - half, b / a + half)


def _stats() -> ModuleType:
    return require("scipy.stats", extra="book")


def farthest_from_one(values: Iterable[float]) -> float:
    """The value that differs most from 1."""
    return max(values, key=lambda value: abs(value - 1))


def second_half(values: np.ndarray) -> np.ndarray:
    """The second half of a column; of an odd number of values, the middle one belongs to it."""
    return values[len(values) // 2 :]


def second_half_median(values: np.ndarray) -> float:
    """The median of the second half."""
    return float(np.median(second_half(values)))


def second_half_width(values: np.ndarray) -> float:
    """From the 10th to the 90th percentile of the second half."""
    low, high = np.quantile(second_half(values), [0.1, 0.9])
    return float(high - low)
