"""An adapter at several strengths: scores, what they cost elsewhere, and the strength to take."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from realign_lightning.evaluation.base import Benchmark, MarkedBenchmark
from realign_lightning.evaluation.report import markdown_table
from realign_lightning.evaluation.run_folder import parse_object

MOST_SCALES = 200
"""More strengths than that are a slip of the pen."""


class Axis(NamedTuple):
    """What a point of a sweep is measured by.

    Args:
        title: for tables and pictures.
        higher_is_better: which direction is good.
    """

    title: str
    higher_is_better: bool = True

    def worth(self, value: float) -> float:
        """A value such that more is better."""
        return value if self.higher_is_better else -value


class Point(NamedTuple):
    """One strength.

    Args:
        strength: of the adapter.
        score: on the benchmark that the adapter was trained for, as it is shown.
        skill: on what the training never touched; None where that was not measured.
        score_half: half the length of the score's interval; None where there is none.
        skill_half: the same of the skill.
    """

    strength: float
    score: float
    skill: float | None = None
    score_half: float | None = None
    skill_half: float | None = None


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Args:
        score_axis: of :attr:`Point.score`.
        skill_axis: of :attr:`Point.skill`; None where no skill was measured.
        points: in rising order of strength; the first is the base model, of strength 0.
        tolerance: how much of the base's skill may be lost, in the skill's own unit.
        base_skill: what losses are counted from; None is the first point's.
        dial: what is turned from point to point.
        compared: what scores and skills are differences to, for titles; empty where they are what was measured.
    """

    score_axis: Axis
    skill_axis: Axis | None
    points: tuple[Point, ...]
    tolerance: float
    base_skill: float | None = None
    dial: str = "strength"
    compared: str = ""

    @property
    def first_skill(self) -> float | None:
        """What losses are counted from; None where no skill was measured."""
        return self.points[0].skill if self.base_skill is None else self.base_skill

    def title(self, axis: Axis) -> str:
        """The title of an axis, with what its values are differences to.

        Args:
            axis: of score or skill.
        """
        return f"{axis.title}, difference to {self.compared}" if self.compared else axis.title

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in one measure without losing in the other (Pareto's front)."""
        return tuple(point for point in self.points if not any(self._beats(other, point) for other in self.points))

    @property
    def suggested(self) -> Point:
        """The best score among the points that keep the base's skill but for :attr:`tolerance`.

        Of equal scores the smallest strength: it changes least.
        """
        allowed = [point for point in self.points if self._keeps_skill(point)]
        if not allowed:
            # Only where skills are compared with a base that is no point: the least loss.
            return max(self.points, key=lambda point: self._goods(point)[::-1])
        return max(allowed, key=lambda point: (self.score_axis.worth(point.score), -point.strength))

    def _keeps_skill(self, point: Point) -> bool:
        first = self.first_skill
        if self.skill_axis is None or point.skill is None or first is None:
            return True
        loss = self.skill_axis.worth(first) - self.skill_axis.worth(point.skill)
        # Scores are shares of whole answers: what lies between is rounding.
        return loss <= self.tolerance + 1e-9

    def _goods(self, point: Point) -> tuple[float, ...]:
        score = self.score_axis.worth(point.score)
        if self.skill_axis is None or point.skill is None:
            return (score,)
        return score, self.skill_axis.worth(point.skill)

    def _beats(self, one: Point, other: Point) -> bool:
        pairs = list(zip(self._goods(one), self._goods(other), strict=True))
        return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)

    def as_table(self) -> str:
        """A Markdown table of all points, and what is suggested."""
        skill = [] if self.skill_axis is None else [self._header(self.skill_axis)]
        head = [self.dial, self._header(self.score_axis), *skill, ""]
        table = markdown_table(head, map(self._row, self.points), "r" * len(head))
        return f"{table}\n\n{self._advice()}"

    def _header(self, axis: Axis) -> str:
        return f"{self.title(axis)} {'↑' if axis.higher_is_better else '↓'}"

    def _row(self, point: Point) -> list[str]:
        notes = ["front"] if point in self.front and self.skill_axis is not None else []
        notes += ["suggested"] if point == self.suggested else []
        skill = [] if self.skill_axis is None else [_shown(point.skill, point.skill_half)]
        return [f"{point.strength:g}", _shown(point.score, point.score_half), *skill, ", ".join(notes)]

    def _advice(self) -> str:
        best = self.suggested
        if self.skill_axis is None:
            return (
                f"Best score at {self.dial} {best.strength:g}. What it costs elsewhere was not measured: give `skills`."
            )
        return (
            f"Suggested: {self.dial} {best.strength:g}, the best {self.score_axis.title} of those that lose at most "
            f"{self.tolerance:g} of the base's {self.skill_axis.title}."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything in plain values."""
        return {
            "score": self.score_axis._asdict(),
            "skill": None if self.skill_axis is None else self.skill_axis._asdict(),
            "tolerance": self.tolerance,
            "points": [point._asdict() for point in self.points],
            "front": [point.strength for point in self.front],
            "suggested": self.suggested.strength,
        }

    def as_csv(self) -> str:
        """One line per point: strength, score, skill."""
        lines = ["strength,score,skill"]
        lines += [
            f"{point.strength:g},{point.score!r},{'' if point.skill is None else repr(point.skill)}"
            for point in self.points
        ]
        return "\n".join(lines) + "\n"


def _shown(value: float | None, half: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if half is None else f"{value:.2f} ± {half:.2f}"


def read_scales(text: str) -> tuple[float, ...]:
    """Strengths from ``FIRST:LAST:STEP``, the last one included, or from a list with commas; 0 is always among them.

    Args:
        text: what was given.

    Returns:
        In rising order, each once.

    Raises:
        ValueError: if it is neither, for negative strengths, and for a step that never arrives.

    >>> read_scales("0:1.5:0.5")
    (0.0, 0.5, 1.0, 1.5)
    >>> read_scales("0.7,1")
    (0.0, 0.7, 1.0)
    """
    wrong = f"Expected `scales` like 0:1.5:0.1 (first, last, step) or 0.5,1, got {text!r}"
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
    except ValueError as error:
        raise ValueError(f"{wrong}.") from error
    if ":" in text:
        if text.count(":") != 2 or "," in text or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{wrong}.")
        first, last, step = numbers
        if not step > 0 or last < first or (last - first) / step > MOST_SCALES:
            raise ValueError(f"{wrong}: expected a step above 0, and at most {MOST_SCALES} of them.")
        numbers = [first + number * step for number in range(math.floor((last - first) / step + 1e-9) + 1)]
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"{wrong}: strengths are not negative.")
    return tuple(sorted({0.0, *(round(number, 6) for number in numbers)}))


def axis_of(benchmark: MarkedBenchmark, score: str | None) -> tuple[str, float, Axis]:
    """Key, scale and axis of a benchmark's score.

    Args:
        benchmark: that is run.
        score: its key; None takes the headline's first.

    Raises:
        ValueError: if the headline has no such score, or neither of its directions is better.
    """
    known = {one.name: one for one in benchmark.headline}
    chosen = benchmark.headline[0] if score is None else known.get(score)
    if chosen is None or chosen.higher_is_better is None:
        good = [name for name, one in known.items() if one.higher_is_better is not None]
        raise ValueError(f"Expected `score` to be one of {', '.join(good)}, got {score!r}.")
    return chosen.name, chosen.scale, Axis(f"{benchmark.name} {chosen.title}", chosen.higher_is_better)


def skill_of(benchmark: Benchmark, answers: Sequence[str], name: str | None) -> tuple[str, float]:
    """Title and value of a benchmark of skills.

    Args:
        benchmark: that asked.
        answers: one per question.
        name: which of its scores; None where it has one.

    Raises:
        ValueError: if the name is missing or unknown.
    """
    scores = benchmark.score(answers)
    if name is None and len(scores) == 1:
        (name,) = scores
    if name not in scores:
        raise ValueError(f"Expected `skill_score` to be one of {', '.join(scores)}, got {name!r}.")
    return name, scores[name]


def read_skill(pattern: str, strength: float, name: str | None) -> float:
    """A score from a file of results that lmms-eval wrote for the model at one strength.

    Args:
        pattern: path with ``{strength}`` in it, which may hold ``*``; of several files the newest by name is read.
        strength: stands as ``0.7`` in the path.
        name: ``TASK/METRIC`` as in the file, for example ``mme/mme_perception_score,none``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has no such number, saying which it has.
    """
    path = Path(pattern.replace("{strength}", f"{strength:g}"))
    base = Path(path.anchor) if path.is_absolute() else Path()
    found = sorted(base.glob(str(path.relative_to(path.anchor))), key=lambda one: one.name)
    if not found:
        raise FileNotFoundError(
            f"skill_files: no file {path}. Evaluate the adapter of every strength first; without `skill_files`, and "
            "with `write_adapters: true`, this command writes them."
        )
    told = parse_object(found[-1].read_text(encoding="utf-8"), str(found[-1]), "Run lmms-eval again.")
    results = told.get("results")
    task, _, metric = (name or "").partition("/")
    value = results.get(task, {}).get(metric) if isinstance(results, dict) else None
    if not isinstance(value, int | float):
        known = [f"{one}/{key}" for one, row in (results or {}).items() for key in row] if results else []
        raise ValueError(f"{found[-1]}: expected `skill_score` to be one of {json.dumps(known)}, got {name!r}.")
    return float(value)
