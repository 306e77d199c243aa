"""Are two models different: paired bootstrap intervals, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_EXACT_BELOW = 25
"""Discordant pairs; from there on the chi-squared distribution is near enough (Edwards 1948, and every textbook)."""

_AT_ONCE = 1 << 21
"""Weights in memory at a time: 16 MiB as integers, as much again as floating point numbers."""


class Interval(NamedTuple):
    """A percentile interval.

    Args:
        low: its lower end; not a number where no resample had a score.
        high: its upper end.
        undefined: resamples in which the score was not a number; the interval is that of the others.
    """

    low: float
    high: float
    undefined: int = 0


def paired_bootstrap(
    first: Tensor,
    second: Tensor,
    compute: Callable[[Tensor], dict[str, Tensor]],
    groups: Sequence[str] = (),
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Intervals of the differences between two models' scores on the same questions.

    Groups of questions are drawn with replacement, the same groups for both models; scores are computed from the summed
    counts of what was drawn (Efron and Tibshirani 1993, percentile interval of section 13.3). Groups whose counts are
    the same are drawn together, as one category of a multinomial distribution: the distribution is that of drawing one
    by one, and the order of questions makes no difference.

    Args:
        first: (N, K) counts of the first model, one row per question.
        second: (N, K) counts of the second.
        compute: scores (R,) by name, from summed counts (R, K).
        groups: of every question; questions of one group are drawn together, empty is the question alone. None at all
            is every question alone.
        resamples: how many.
        seed: of the draws.
        confidence: share of the resamples that lie in the interval.

    Returns:
        The interval of second minus first, by the score's name.

    Raises:
        ValueError: if shapes differ, there is no question, or a setting is out of range.

    Example:
        >>> mean = lambda sums: {"mean": sums[:, 0] / sums[:, 1]}
        >>> right = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 1]])
        >>> paired_bootstrap(right, right, mean)["mean"]
        Interval(low=0.0, high=0.0, undefined=0)
    """
    _check(first, second, groups, resamples, confidence)
    together = torch.cat([first, second], dim=1)
    counts, frequency = np.unique(_sum_groups(together, groups).numpy(), axis=0, return_counts=True)
    width = first.shape[1]
    drawn: dict[str, list[Tensor]] = {}
    for sums in _resampled(counts, frequency, resamples, seed):
        before, after = compute(sums[:, :width]), compute(sums[:, width:])
        for name, value in after.items():
            drawn.setdefault(name, []).append(value - before[name])
    return {name: _percentiles(torch.cat(parts).numpy(), confidence) for name, parts in drawn.items()}


def count_groups(groups: Sequence[str]) -> int:
    """How many groups are drawn from.

    Args:
        groups: of every question; empty is the question alone.
    """
    return len(set(groups) - {""}) + sum(group == "" for group in groups)


def _check(first: Tensor, second: Tensor, groups: Sequence[str], resamples: int, confidence: float) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"Expected two equal shapes (N, K), got {tuple(first.shape)} and {tuple(second.shape)}.")
    if not len(first):
        raise ValueError("There is no question to resample.")
    if groups and len(groups) != len(first):
        raise ValueError(f"Expected a group for each of {len(first)} questions, got {len(groups)}.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")


def _sum_groups(counts: Tensor, groups: Sequence[str]) -> Tensor:
    if not groups:
        return counts
    names: dict[str | int, int] = {}
    places = [names.setdefault(group or number, len(names)) for number, group in enumerate(groups)]
    return counts.new_zeros(len(names), counts.shape[1]).index_add(0, torch.tensor(places), counts)


def _resampled(counts: np.ndarray, frequency: np.ndarray, resamples: int, seed: int) -> Iterator[Tensor]:
    """Summed counts of resamples, some at a time."""
    generator = np.random.default_rng(seed)
    total = int(frequency.sum())
    size = max(1, _AT_ONCE // len(counts))
    for start in range(0, resamples, size):
        weights = generator.multinomial(total, frequency / total, min(size, resamples - start))
        # Products of floating point numbers are many times as fast; these are exact up to 2^53.
        sums = weights.astype(np.float64) @ counts.astype(np.float64)
        yield torch.from_numpy(sums.astype(counts.dtype))


def _percentiles(values: np.ndarray, confidence: float) -> Interval:
    defined = values[~np.isnan(values)]
    undefined = len(values) - len(defined)
    if not len(defined):
        return Interval(math.nan, math.nan, undefined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(low), float(high), undefined)


class McNemar(NamedTuple):
    """McNemar's test: do the questions that only one model answers right speak for one of them.

    Args:
        both: questions that both answer right.
        only_first: that only the first answers right.
        only_second: that only the second answers right.
        neither: that neither answers right.
        p_value: how often models without a difference would be apart as far as these or farther; two-sided.
        method: ``exact`` or ``chi-squared``.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    method: str


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's test (McNemar 1947) of two models' right and wrong answers to the same questions.

    Exact and binomial with fewer than 25 questions that only one answers right; otherwise chi-squared with one degree
    of freedom and Edwards' correction for continuity (Edwards 1948). It takes questions as independent of each other.

    Args:
        first: whether the first model's answer is right, one per question.
        second: the same of the second.

    Raises:
        ValueError: if they are not equally many.

    Example:
        Only one answers three questions, each time the first: p = 2 * (1 / 2)^3.

        >>> mcnemar([True, True, True, False], [False, False, False, False])
        McNemar(both=0, only_first=3, only_second=0, neither=1, p_value=0.25, method='exact')
    """
    if len(first) != len(second):
        raise ValueError(f"Expected as many verdicts of both models, got {len(first)} and {len(second)}.")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, neither = pairs.count((False, True)), pairs.count((False, False))
    exact = only_first + only_second < _EXACT_BELOW
    p_value = (_binomial if exact else _chi_squared)(only_first, only_second)
    return McNemar(both, only_first, only_second, neither, p_value, "exact" if exact else "chi-squared")


def _binomial(one: int, other: int) -> float:
    """Two-sided, of a fair coin: twice the smaller tail."""
    tosses = one + other
    tail = sum(math.comb(tosses, heads) for heads in range(min(one, other) + 1))
    return min(1.0, 2 * tail / (1 << tosses))


def _chi_squared(one: int, other: int) -> float:
    statistic = max(0, abs(one - other) - 1) ** 2 / (one + other)
    return math.erfc(math.sqrt(statistic / 2))
