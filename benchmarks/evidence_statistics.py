"""Means with intervals, and paired differences, over policies of different seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t  # type: ignore[import-untyped]

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean with its interval.

    Args:
        mean: over policies.
        half: half the length of Student's 95 % interval; infinite for one policy.
        policies: how many.
    """

    mean: float
    half: float
    policies: int

    @property
    def is_clear(self) -> bool:
        """Whether 0 is outside of the interval."""
        return abs(self.mean) > self.half

    def shown(self, digits: int = 1, signed: bool = False) -> str:
        """For tables.

        Args:
            digits: behind the point.
            signed: write a plus, too.
        """
        half = "∞" if math.isinf(self.half) else f"{self.half:.{digits}f}"
        # No minus in front of zero.
        mean = round(self.mean, digits) + 0.0
        return f"{mean:{'+' if signed else ''}.{digits}f} ± {half}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's interval.

    Args:
        values: one per policy, at least one.

    >>> estimate([1.0, 2.0, 3.0]).shown(2)
    '2.00 ± 2.48'
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.inf, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error, len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Of values of the same policies: the mean of ``values`` less ``others``.

    Args:
        values: one per policy.
        others: of the same policies, in the same order.

    >>> difference([2.0, 3.0, 4.5], [1.0, 2.0, 3.0]).shown(2, signed=True)
    '+1.17 ± 0.72'
    """
    return estimate([one - other for one, other in zip(values, others, strict=True)])
