"""What claims are made of: intervals over seeds, and numbers from a run's columns."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

__all__ = [
    "CONFIDENCE",
    "farthest_from_one",
    "second_half",
    "second_half_median",
    "second_half_width",
    "t_interval",
    "t_quantile",
]

CONFIDENCE = 0.95


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
