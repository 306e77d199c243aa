"""Compare two models' answers to the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign_lightning.evaluation.base import Answered, MarkedBenchmark, Score
from realign_lightning.evaluation.comparison.sides import Side, read_sides
from realign_lightning.evaluation.comparison.statistics import (
    Interval,
    McNemar,
    count_groups,
    mcnemar,
    paired_bootstrap,
)

_FEW_GROUPS = 50
"""Simulated 95 % intervals of accuracies held the truth in 94.6 % with 100 questions, 93 % with 50, 74 % with 10."""

_GROUPED = (
    "McNemar's test takes questions as independent of each other; here several share a group, so that its p-value may "
    "be too small. The intervals draw whole groups."
)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Args:
        resamples: how many.
        seed: of the draws.
        confidence: share of the resamples that lie in an interval.
    """

    resamples: int = 10_000
    seed: int = 0
    confidence: float = 0.95


@dataclass(frozen=True)
class Delta:
    """A score of both models, and how sure the difference is. Values are as computed, not scaled for showing.

    Args:
        score: how to show it.
        first: score of the first model.
        second: score of the second.
        interval: of second minus first.
    """

    score: Score
    first: float
    second: float
    interval: Interval

    @property
    def value(self) -> float:
        """Second minus first."""
        return self.second - self.first

    @property
    def reading(self) -> str:
        """What the interval says of the second model.

        ``better``, ``worse``, ``unclear`` if 0 lies in it or there is none, or ``differs`` for a score that is
        better neither high nor low.
        """
        if not (self.interval.low > 0 or self.interval.high < 0):
            return "unclear"
        if self.score.higher_is_better is None:
            return "differs"
        return "better" if (self.interval.low > 0) == self.score.higher_is_better else "worse"


@dataclass(frozen=True)
class Flip:
    """A question that one model answers right and the other wrong.

    Args:
        benchmark: which asks it.
        first: the first model's answer.
        second: the second model's answer.
    """

    benchmark: str
    first: Answered
    second: Answered

    @property
    def is_loss(self) -> bool:
        """Whether the second model is the wrong one."""
        return bool(self.first.correct)

    @property
    def change(self) -> float:
        """By how much the badness of the wrong answer exceeds that of the right one."""
        return abs(self.second.badness - self.first.badness)


@dataclass(frozen=True)
class BenchmarkComparison:
    """Two models on one benchmark.

    Args:
        name: of the benchmark.
        sources: where the two sides were read.
        models: what tells the models from others.
        settings: what scores depend on, the same for both.
        keys: of the questions that were compared.
        groups: how many groups were drawn from.
        deltas: the scores.
        mcnemar: of right and wrong answers; None if no answer was judged on both sides.
        flips: worst first: right became wrong, by how much; then wrong became right, by how much.
        left_out: keys of questions that were not compared, by the reason.
        notes: what a reader should know, one sentence each.
    """

    name: str
    sources: tuple[Path, Path]
    models: tuple[dict[str, Any], dict[str, Any]]
    settings: dict[str, Any]
    keys: tuple[str, ...]
    groups: int
    deltas: tuple[Delta, ...]
    mcnemar: McNemar | None
    flips: tuple[Flip, ...]
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two models on the benchmarks that both answered.

    Args:
        names: of the models.
        benchmarks: one for each that is in both runs.
        resampling: how intervals were made.
        not_compared: benchmarks that only the first, and that only the second run has.
    """

    names: tuple[str, str]
    benchmarks: tuple[BenchmarkComparison, ...]
    resampling: Resampling
    not_compared: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def intervals(self) -> int:
        """How many intervals there are."""
        return sum(len(one.deltas) for one in self.benchmarks)


def compare_runs(
    run_a: str | Path,
    run_b: str | Path,
    names: tuple[str, str] | None = None,
    resampling: Resampling = Resampling(),
    benchmarks: Mapping[str, type[MarkedBenchmark]] | None = None,
) -> Comparison:
    """Compare two models on every benchmark that both answered.

    Args:
        run_a: folder of the first model's evaluations, of this package or of lmms-eval.
        run_b: the same of the second.
        names: of the models; None takes the last parts of the paths that differ.
        resampling: how intervals are made.
        benchmarks: by name, for evaluations of this package; None takes its own.

    Raises:
        FileNotFoundError: if a folder holds nothing to compare.
        ValueError: if no benchmark is in both, or settings, a question or its target differ.
    """
    first, second = Path(run_a), Path(run_b)
    sides = read_sides(first, benchmarks), read_sides(second, benchmarks)
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        raise ValueError(
            f"No benchmark is in both: {first} has {', '.join(sides[0])}; {second} has {', '.join(sides[1])}."
        )
    names = names or _names(first.resolve(), second.resolve())
    compared = tuple(compare_sides(sides[0][name], sides[1][name], names, resampling) for name in common)
    only_first = tuple(name for name in sides[0] if name not in sides[1])
    only_second = tuple(name for name in sides[1] if name not in sides[0])
    return Comparison(names, compared, resampling, (only_first, only_second))


def _names(first: Path, second: Path) -> tuple[str, str]:
    parts = zip(reversed(first.parts), reversed(second.parts), strict=False)
    return next(((one, other) for one, other in parts if one != other), ("A", "B"))


def compare_sides(
    first: Side, second: Side, names: tuple[str, str], resampling: Resampling = Resampling()
) -> BenchmarkComparison:
    """Compare two models on one benchmark.

    Args:
        first: the first model's answers.
        second: the second model's.
        names: of the models, for messages.
        resampling: how intervals are made.

    Raises:
        ValueError: if settings, a question or its target differ, or no question is left.
    """
    _check_settings(first, second)
    for key in [key for key in first.rows if key in second.rows]:
        _check_question(first, second, key)
    left_out = _left_out(first, second, names)
    ignored = {key for keys in left_out.values() for key in keys}
    keys = tuple(key for key in first.rows if key not in ignored)
    if not keys:
        raise ValueError(f"{first.benchmark}: no question was answered in both {first.source} and {second.source}.")
    rows = [(first.rows[key], second.rows[key]) for key in keys]
    judged = [pair for pair in rows if pair[0].correct is not None and pair[1].correct is not None]
    if first.judged_by != second.judged_by:
        judged = []
    groups = count_groups([row.group for row, _ in rows])
    return BenchmarkComparison(
        name=first.benchmark,
        sources=(first.source, second.source),
        models=(first.model, second.model),
        settings=first.settings,
        keys=keys,
        groups=groups,
        deltas=_deltas(first, second, keys, resampling),
        mcnemar=mcnemar(*_verdicts(judged)) if judged else None,
        flips=_flips(first.benchmark, judged),
        left_out=left_out,
        notes=_notes(first, second, groups, len(keys), len(judged)),
    )


def _verdicts(judged: Sequence[tuple[Answered, Answered]]) -> tuple[list[bool], list[bool]]:
    return [bool(one.correct) for one, _ in judged], [bool(other.correct) for _, other in judged]


def _check_settings(first: Side, second: Side) -> None:
    names = first.settings.keys() | second.settings.keys()
    # Nobody knows how long answers from elsewhere could be, and what they were told.
    names -= {"max_new_tokens", "instruction"} - (first.settings.keys() & second.settings.keys())
    for name in sorted(name for name in names if first.settings.get(name) != second.settings.get(name)):
        raise ValueError(
            f"{first.benchmark}: {name} is {first.settings.get(name)!r} in {first.source}, but "
            f"{second.settings.get(name)!r} in {second.source}. Scores can be compared only where settings are the "
            "same: evaluate one of them again."
        )


def _check_question(first: Side, second: Side, key: str) -> None:
    one, other = first.rows[key], second.rows[key]
    for name in ("question", "target", "group"):
        values = getattr(one, name), getattr(other, name)
        if values[0] != values[1]:
            raise ValueError(
                f"{first.benchmark}, question {key!r}: its {name} is {values[0]!r} in {first.source}, but "
                f"{values[1]!r} in {second.source}. Only answers to the same questions can be compared: evaluate both "
                "with the same data."
            )


def _left_out(first: Side, second: Side, names: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    both = [key for key in first.rows if key in second.rows]
    found = {
        f"only in {names[0]}": [key for key in first.rows if key not in second.rows],
        f"only in {names[1]}": [key for key in second.rows if key not in first.rows],
    }
    for side, name in ((first, names[0]), (second, names[1])):
        found[f"no answer of {name}"] = [key for key in both if side.rows[key].answer is None]
        found[f"answer of {name} not marked"] = [
            key for key in both if side.rows[key].answer is not None and key not in side.counts
        ]
    if first.marks_groups:
        found["in a group with one of these"] = _touched(
            first, second, {key for keys in found.values() for key in keys}
        )
    return {reason: tuple(keys) for reason, keys in found.items() if keys}


def _touched(first: Side, second: Side, ignored: set[str]) -> list[str]:
    """Questions of groups that are no longer whole."""
    rows = {**first.rows, **second.rows}
    groups = {rows[key].group for key in ignored} - {""}
    return [key for key, row in first.rows.items() if row.group in groups and key not in ignored]


def _deltas(first: Side, second: Side, keys: Sequence[str], resampling: Resampling) -> tuple[Delta, ...]:
    counts = [torch.tensor([side.counts[key] for key in keys]) for side in (first, second)]
    if any(side.is_floating_point() for side in counts):
        counts = [torch.tensor([side.counts[key] for key in keys], dtype=torch.float64) for side in (first, second)]
    if counts[0].shape != counts[1].shape:
        raise ValueError(f"{first.source} and {second.source} were marked in two ways: evaluate with one version.")
    sums = [side.sum(dim=0) for side in counts]
    scores = _common_scores(first, second, set.intersection(*(set(first.compute(side)) for side in sums)))
    if not scores:
        return ()

    def compute(some: Tensor) -> dict[str, Tensor]:
        found = first.compute(some)
        nothing = torch.full(some.shape[:-1], torch.nan)
        return {score.name: found.get(score.name, nothing).double() for score in scores}

    groups = [first.rows[key].group for key in keys]
    intervals = paired_bootstrap(
        counts[0], counts[1], compute, groups, resampling.resamples, resampling.seed, resampling.confidence
    )
    if count_groups(groups) < 2:
        # Every resample is the same: nothing is known of how scores vary.
        intervals = dict.fromkeys(intervals, Interval(math.nan, math.nan))
    before, after = map(compute, sums)
    return tuple(
        Delta(score, before[score.name].item(), after[score.name].item(), intervals[score.name]) for score in scores
    )


def _common_scores(first: Side, second: Side, computed: set[str]) -> list[Score]:
    """Scores in both headlines, but for those of questions that nobody asked."""
    others = {score.name: score for score in second.headline}
    return [
        replace(score, scale=min(score.scale, others[score.name].scale))
        for score in first.headline
        if score.name in others and score.name in computed
    ]


def _flips(benchmark: str, judged: Sequence[tuple[Answered, Answered]]) -> tuple[Flip, ...]:
    flips = [Flip(benchmark, one, other) for one, other in judged if one.correct != other.correct]
    return tuple(sorted(flips, key=worst_first))


def worst_first(flip: Flip) -> tuple[bool, float]:
    """Order of flips: right became wrong, by how much worse; then wrong became right, by how much better.

    Args:
        flip: of any benchmark.
    """
    return not flip.is_loss, -flip.change


def _notes(first: Side, second: Side, groups: int, questions: int, judged: int) -> tuple[str, ...]:
    notes = [*dict.fromkeys(first.notes + second.notes)]
    if first.judged_by != second.judged_by:
        notes.append("Right is not said by the same metric on both sides: neither McNemar's test nor flips.")
    if groups < questions:
        notes.append(_GROUPED)
    if groups < _FEW_GROUPS:
        notes.append(f"Few questions or groups to draw from ({groups}): percentile intervals of so few are too narrow.")
    if 0 < judged < questions:
        notes.append(f"{questions - judged} answers were not judged right or wrong on both sides.")
    return tuple(notes)
