"""The two sides of a comparison: what a folder holds, in one form whatever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign_lightning.evaluation.base import Answered, MarkedBenchmark, Score
from realign_lightning.evaluation.run_folder import METRICS, Evaluated, find_runs, read_run, rows_of, run_folders


@dataclass
class Side:
    """One model's answers to one benchmark.

    Args:
        benchmark: its name.
        source: where it was read.
        settings: what scores depend on; both sides need the same.
        rows: answers by the key of their question, in the benchmark's order.
        counts: what scores are computed from, by key; all of one length. Keys that were not marked are missing.
        headline: the scores to compare.
        compute: scores from summed counts (..., K).
        model: what tells the model from others.
        marks_groups: whether an answer's counts depend on the other answers of its group, so that only whole groups can
            be compared.
        judged_by: what calls an answer right, where there is a choice.
        notes: what a reader should know, one sentence each.
    """

    benchmark: str
    source: Path
    settings: dict[str, Any]
    rows: dict[str, Answered]
    counts: dict[str, tuple[float, ...]]
    headline: tuple[Score, ...]
    compute: Callable[[Tensor], dict[str, Tensor]]
    model: dict[str, Any] = field(default_factory=dict)
    marks_groups: bool = False
    judged_by: str = ""
    notes: tuple[str, ...] = ()


def read_sides(folder: Path, benchmarks: Mapping[str, type[MarkedBenchmark]] | None = None) -> dict[str, Side]:
    """Everything in a folder that can be compared, by the benchmark's name.

    Args:
        folder: of one evaluation, with one folder for each of several, or what lmms-eval wrote; also several of these.
        benchmarks: by name; None takes those of this package.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: naming a file that is damaged, a benchmark that is not known, or one that is there twice.
    """
    from realign_lightning.evaluation.comparison.lmms_eval import read_tasks

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give what `realign-lightning test` or lmms-eval wrote.")
    runs = find_runs(folder) if run_folders(folder) else {}
    sides = {name: _read_side(path, _benchmark(name, path, benchmarks)) for name, path in runs.items()}
    sides |= {side.benchmark: side for side in read_tasks(folder)}
    if not sides:
        raise FileNotFoundError(
            f"{folder} holds nothing to compare: no {METRICS} of `realign-lightning test`, in it or in a folder in "
            "it, and no *_results.json of lmms-eval."
        )
    return sides


def _benchmark(name: str, path: Path, known: Mapping[str, type[MarkedBenchmark]] | None) -> type[MarkedBenchmark]:
    if known is None:
        from realign_lightning.evaluation.benchmarks import BENCHMARKS

        known = BENCHMARKS
    if name not in known:
        raise ValueError(f"{path} is an evaluation of {name!r}, which is none of {sorted(known)}.")
    return known[name]


def _read_side(path: Path, benchmark: type[MarkedBenchmark]) -> Side:
    found = read_run(path)
    rows = rows_of(found.answers)
    side = Side(
        benchmark=found.benchmark,
        source=path,
        settings=found.settings,
        rows=rows,
        counts={key: tuple(row.counts) for key, row in rows.items() if row.counts},
        headline=benchmark.headline,
        compute=partial(_compute, benchmark, found.settings),
        model=found.model,
        marks_groups=benchmark.marks_groups,
    )
    _check_counts(side)
    _check_scores(side, found)
    return side


def _compute(benchmark: type[MarkedBenchmark], settings: Mapping[str, Any], counts: Tensor) -> dict[str, Tensor]:
    return benchmark.compute(counts, settings)


def _check_counts(side: Side) -> None:
    widths = {len(counts) for counts in side.counts.values()}
    if len(widths) > 1:
        raise ValueError(f"{side.source}: rows of counts have {sorted(widths)} numbers. Run the evaluation again.")


def _check_scores(side: Side, found: Evaluated) -> None:
    """Refuse counts that do not give the scores which the evaluation wrote: files mixed up, or another version."""
    if not side.counts:
        return
    scores = side.compute(torch.tensor(list(side.counts.values())).sum(dim=0))
    told_too = {name for name, value in found.scores.items() if value is not None}
    for name in [score.name for score in side.headline if score.name in scores.keys() & told_too]:
        told, computed = found.scores[name], scores[name].item()
        if not math.isclose(told, computed, rel_tol=1e-6, abs_tol=1e-6) and not math.isnan(told):
            raise ValueError(
                f"{side.source}: {METRICS} says that {name} is {told}, the counts of the answers give {computed}. The "
                "two files are not of one evaluation, or of another version of this package: run it again."
            )
