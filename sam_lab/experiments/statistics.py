"""What the statistics of claims are made of: numbers from a run, and one number from each seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sam_lab.experiments.result import Result

__all__ = ["each_seed", "farthest_from_one", "late", "late_median", "late_width"]


def each_seed(statistic: Callable[[Result, int], float]) -> Callable[[Result], list[float]]:
    """A claim's statistic from one of a result and a seed."""
    return lambda result: [float(statistic(result, seed)) for seed in result.seeds]


def farthest_from_one(values: Iterable[float]) -> float:
    """The value that differs most from 1."""
    return max(values, key=lambda value: abs(value - 1))


def late(values: np.ndarray) -> np.ndarray:
    """The second half."""
    return values[len(values) // 2 :]


def late_median(values: np.ndarray) -> float:
    """The median of the second half."""
    return float(np.median(late(values)))


def late_width(values: np.ndarray) -> float:
    """From the 10th to the 90th percentile of the second half."""
    low, high = np.quantile(late(values), [0.1, 0.9])
    return float(high - low)
