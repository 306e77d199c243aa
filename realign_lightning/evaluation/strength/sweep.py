"""An adapter at several strengths: scores, what they cost elsewhere, and the strength to take."""

from __future__ import annotations

import itertools
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
        points: in rising order of strength; the first is the base model, of strength 0, unless ``base_skill`` is given.
        tolerance: how much of the base's skill may be lost, in the skill's own unit.
        base_skill: what losses are counted from; None is the first point's.
        dial: what is turned from point to point.
        compared: what scores and skills are differences to, for titles; empty where they are what was measured.

    Raises:
        ValueError: for points in another order, and for a tolerance that is negative or no number.
    """

    score_axis: Axis
    skill_axis: Axis | None
    points: tuple[Point, ...]
    tolerance: float
    base_skill: float | None = None
    dial: str = "strength"
    compared: str = ""

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        check_strengths("points", [point.strength for point in self.points], self.base_skill is None)

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

        Of equal scores the smallest strength: it changes least. Where no point keeps the skill, which only happens
        where the base is no point, the one that loses least: :attr:`verdict` says which of both it is.
        """
        allowed = [point for point in self.points if self._keeps_skill(point)]
        if not allowed:
            return max(self.points, key=lambda point: self._goods(point)[::-1])
        return max(allowed, key=lambda point: (self.score_axis.worth(point.score), -point.strength))

    @property
    def keeps_skill(self) -> bool:
        """Whether any point loses no more of the base's skill than :attr:`tolerance`."""
        return any(map(self._keeps_skill, self.points))

    @property
    def verdict(self) -> str:
        """What :attr:`suggested` is to be called: nothing that loses too much is suggested."""
        return "suggested" if self.keeps_skill else "loses least"

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
        notes += [self.verdict] if point == self.suggested else []
        skill = [] if self.skill_axis is None else [_shown(point.skill, point.skill_half)]
        return [f"{point.strength:g}", _shown(point.score, point.score_half), *skill, ", ".join(notes)]

    def _advice(self) -> str:
        best = self.suggested
        if self.skill_axis is None:
            return (
                f"Best score at {self.dial} {best.strength:g}. What it costs elsewhere was not measured: give `skills`."
            )
        if not self.keeps_skill:
            return (
                f"No {self.dial} loses at most {self.tolerance:g} of the base's {self.skill_axis.title}: {self.dial} "
                f"{best.strength:g} loses least."
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
            "dial": self.dial,
            "compared": self.compared,
            "base_skill": self.first_skill,
            "tolerance": self.tolerance,
            "points": [point._asdict() for point in self.points],
            "front": [point.strength for point in self.front],
            "suggested": self.suggested.strength,
            "keeps_skill": self.keeps_skill,
        }

    def as_csv(self) -> str:
        """One line per point, by the names of :class:`Point`; empty is what was not measured."""
        lines = [",".join(Point._fields)]
        for strength, *values in self.points:
            lines.append(",".join([f"{strength:g}", *("" if value is None else repr(value) for value in values)]))
        return "\n".join(lines) + "\n"


def check_tolerance(tolerance: float) -> None:
    """Refuse what no loss can be compared with.

    Args:
        tolerance: of a sweep.

    Raises:
        ValueError: if it is negative, infinite or no number.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(
            f"Expected `tolerance` to be at least 0 and finite, got {tolerance}: give the most of the base's skill "
            "that may be lost, in the skill's own unit."
        )


def check_strengths(name: str, strengths: Sequence[float], needs_base: bool = True) -> None:
    """Refuse strengths that make no sweep.

    Args:
        name: of the argument that holds them.
        strengths: of a sweep.
        needs_base: whether 0 has to be among them, as what losses are counted from.

    Raises:
        ValueError: if there are none, or one is not finite, or they do not rise, or 0 is missing at the start.
    """
    is_rising = all(one < other for one, other in itertools.pairwise(strengths))
    if len(strengths) == 0 or not is_rising or not all(map(math.isfinite, strengths)):
        raise ValueError(
            f"Expected `{name}` to have finite strengths in rising order, each once, got {list(strengths)}: sort them, "
            "and leave out what is there twice."
        )
    if needs_base and strengths[0] != 0:
        raise ValueError(
            f"Expected `{name}` to begin with strength 0, the base model that losses are counted from, got "
            f"{list(strengths)}: put 0 before the others."
        )


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


def check_skill_name(benchmark: Benchmark, name: str | None) -> None:
    """Refuse the name of a score that a benchmark of skills cannot have, before it is asked.

    Args:
        benchmark: whose scores are known before there are answers only if it is a
            :class:`~realign_lightning.evaluation.MarkedBenchmark`; others pass.
        name: which of its scores; None where it has one.

    Raises:
        ValueError: if the name is missing or unknown.
    """
    if isinstance(benchmark, MarkedBenchmark) and type(benchmark).score is MarkedBenchmark.score:
        _named(name, [f"{benchmark.name} {score.title}" for score in benchmark.headline])


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
    name = _named(name, list(scores))
    return name, scores[name]


def _named(name: str | None, known: Sequence[str]) -> str:
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        raise ValueError(f"Expected `skill_score` to be one of {', '.join(known)}, got {name!r}.")
    return name


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
