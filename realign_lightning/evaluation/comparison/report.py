"""A comparison as Markdown, and as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from realign_lightning.evaluation.base import Answered
from realign_lightning.evaluation.comparison.pairing import BenchmarkComparison, Comparison, Delta, Flip
from realign_lightning.evaluation.report import markdown_table

_LONGEST = 160
"""Characters of a text in a table."""

_LONGEST_ANSWER = 300

_NAMED = 5
"""Questions named of those that were left out; ``comparison.json`` has all."""

_MARKDOWN = re.compile(r"([\\|<>\[\]*`~$]|(?<![^\W_])_|_(?![^\W_]))")
"""Characters with a meaning in Markdown; an underscore within a word has none."""
_READINGS = {
    "better": "better",
    "worse": "worse",
    "unclear": "unclear, 0 is in the interval",
    "differs": "differs",
}
_ANSWER_FIELDS = ("answer", "correct", "badness", "notes")


def shown(value: float, scale: float, signed: bool = False) -> str:
    """A score or a difference for reading.

    Args:
        value: as computed.
        scale: what it is multiplied with: 100 gives percentage points with two decimals, others get three.
        signed: with a sign, as differences have.

    Example:
        >>> shown(0.01234, 100, signed=True), shown(8.5, 1), shown(float("nan"), 1)
        ('+1.23', '8.500', 'none')
    """
    if math.isnan(value):
        return "none"
    places = 2 if scale == 100 else 3
    # Adding 0 turns a rounded -0.0 into 0.0.
    rounded = round(value * scale, places) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{places}f}"


def markdown(comparison: Comparison, flips: int) -> str:
    """Tables of scores, of McNemar's test and of flipped answers, with what a reader should know.

    Args:
        comparison: of two models.
        flips: most flipped answers of a benchmark that are listed.
    """
    first, second = map(_cell, comparison.names)
    blocks = [f"# {second} against {first}", _score_table(comparison), multiple(comparison)]
    blocks += [_mcnemar_table(comparison), _notes(comparison)]
    blocks += [_flips(one, comparison.names, flips) for one in comparison.benchmarks]
    return "\n\n".join(block for block in blocks if block) + "\n"


def multiple(comparison: Comparison) -> str:
    """What the intervals are, and what their number means for reading them.

    Args:
        comparison: of two models.
    """
    how = comparison.resampling
    percent = f"{100 * how.confidence:g} %"
    made = f"Intervals: paired bootstrap, {percent}, percentiles of {how.resamples:,} resamples, seed {how.seed}."
    if comparison.intervals < 2:
        return made
    expected = comparison.intervals * (1 - how.confidence)
    return (
        f"{made} There are {comparison.intervals} intervals: if the models did not differ at all, about {expected:.2g} "
        "of so many would still leave out 0."
    )


def _score_table(comparison: Comparison) -> str:
    first, second = map(_cell, comparison.names)
    percent = f"{100 * comparison.resampling.confidence:g} % interval"
    head = ("benchmark", "score", "questions", first, second, "difference", percent, f"{second} is")
    rows = [(_cell(one.name), *_score_cells(one, delta)) for one in comparison.benchmarks for delta in one.deltas]
    return markdown_table(head, rows, "llrrrrrl") if rows else "No score can be compared."


def _score_cells(one: BenchmarkComparison, delta: Delta) -> tuple[str, ...]:
    scale = delta.score.scale
    ends = [shown(end, scale, signed=True) for end in (delta.interval.low, delta.interval.high)]
    return (
        _cell(delta.score.title),
        # A part of the questions has its own score, but no count of its own.
        "" if "/" in delta.score.name else f"{len(one.keys):,}",
        shown(delta.first, scale),
        shown(delta.second, scale),
        shown(delta.value, scale, signed=True),
        "none" if "none" in ends else f"{ends[0]} to {ends[1]}",
        _READINGS[delta.reading] if "none" not in ends else "unclear, no interval",
    )


def _mcnemar_table(comparison: Comparison) -> str:
    first, second = map(_cell, comparison.names)
    tests = [(one.name, one.mcnemar) for one in comparison.benchmarks if one.mcnemar]
    head = ("benchmark", "both right", f"only {first}", f"only {second}", "neither", "p", "method")
    rows = [(_cell(name), *map("{:,}".format, test[:4]), _p_value(test.p_value), test.method) for name, test in tests]
    return f"McNemar's test of right and wrong answers:\n\n{markdown_table(head, rows, 'lrrrrrl')}" if rows else ""


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _notes(comparison: Comparison) -> str:
    concerned: dict[str, list[str]] = {}
    for one in comparison.benchmarks:
        for note in _told(one):
            concerned.setdefault(note, []).append(_cell(one.name))
    lines = [f"- {', '.join(names)}: {note}" for note, names in concerned.items()]
    for name, others in zip(comparison.names, comparison.not_compared, strict=True):
        if others:
            lines.append(f"- Only {_cell(name)} has, and so not compared: {', '.join(map(_cell, others))}.")
    return "\n".join(lines)


def _told(one: BenchmarkComparison) -> list[str]:
    told = []
    for reason, keys in one.left_out.items():
        named = ", ".join(_cell(key) for key in keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
        told.append(f"{_counted(len(keys), 'question')} left out, {_cell(reason)}: {named}.")
    for delta in one.deltas:
        if delta.interval.undefined:
            told.append(f"{_cell(delta.score.title)} has no value in {delta.interval.undefined:,} resamples.")
    if one.groups < len(one.keys):
        told.append(f"{_counted(len(one.keys), 'question')} in {_counted(one.groups, 'group')}, drawn as a whole.")
    return told + [_cell(note, longest=1000) for note in one.notes]


def _flips(one: BenchmarkComparison, names: Sequence[str], limit: int) -> str:
    if not one.flips or not limit:
        return ""
    first, second = map(_cell, names)
    losses = sum(flip.is_loss for flip in one.flips)
    title = (
        f"## {_cell(one.name)}: {_counted(len(one.flips), 'flipped answer')}\n\n{losses:,} became wrong, "
        f"{len(one.flips) - losses:,} became right; {_how_many(limit, len(one.flips))}."
    )
    items = [_flip(number, flip, (first, second)) for number, flip in enumerate(one.flips[:limit], 1)]
    return "\n".join([title, "", *items])


def _how_many(limit: int, flips: int) -> str:
    return f"the worst {limit:,} listed, flips.html has all" if limit < flips else "worst first"


def _flip(number: int, flip: Flip, names: Sequence[str]) -> str:
    change = "right to wrong" if flip.is_loss else "wrong to right"
    change += f", by {flip.change:g}" if flip.change else ""
    where = ", ".join(_cell(text) for text in (flip.first.key, flip.first.image) if text)
    lines = [f"{number}. {where} ({change}): {_cell(flip.first.question)}"]
    for name, row in zip(names, (flip.first, flip.second), strict=True):
        note = f" ({_cell(_note(row))})" if row.notes else ""
        lines.append(f"   - {name}: {_cell(row.answer or '', _LONGEST_ANSWER)}{note}")
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _note(row: Answered) -> str:
    return "; ".join(f"{name}: {_listed(value)}" for name, value in row.notes.items())


def _listed(value: Any) -> str:
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _cell(text: str, longest: int = _LONGEST) -> str:
    """Text that neither breaks a table nor comes to life, as Markdown or in a terminal."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    cut = plain if len(plain) <= longest else f"{plain[: longest - 3]}..."
    return _MARKDOWN.sub(r"\\\1", cut)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison in plain JSON values: scores as computed, every flipped answer, every question left out.

    Args:
        comparison: of two models.
    """
    return {
        "names": list(comparison.names),
        **asdict(comparison.resampling),
        "intervals": comparison.intervals,
        "not_compared": dict(zip(("first", "second"), map(list, comparison.not_compared), strict=True)),
        "benchmarks": [_benchmark(one) for one in comparison.benchmarks],
    }


def _benchmark(one: BenchmarkComparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "sources": [str(source) for source in one.sources],
        "models": list(one.models),
        "settings": one.settings,
        "questions": len(one.keys),
        "groups": one.groups,
        "scores": [_delta(delta) for delta in one.deltas],
        "mcnemar": one.mcnemar._asdict() if one.mcnemar else None,
        "left_out": {reason: list(keys) for reason, keys in one.left_out.items()},
        "notes": list(one.notes),
        "flips": [flip_values(flip) for flip in one.flips],
    }


def _delta(delta: Delta) -> dict[str, Any]:
    values = {
        "first": delta.first,
        "second": delta.second,
        "difference": delta.value,
        "low": delta.interval.low,
        "high": delta.interval.high,
    }
    numbers = {name: None if math.isnan(value) else value for name, value in values.items()}
    return {**asdict(delta.score), **numbers, "undefined": delta.interval.undefined, "reading": delta.reading}


def flip_values(flip: Flip) -> dict[str, Any]:
    """A flipped answer in plain JSON values.

    Args:
        flip: of any benchmark.
    """
    return {
        "key": flip.first.key,
        "image": flip.first.image,
        "question": flip.first.question,
        "target": flip.first.target,
        "group": flip.first.group,
        "change": "right to wrong" if flip.is_loss else "wrong to right",
        "by": flip.change,
        "first": {name: getattr(flip.first, name) for name in _ANSWER_FIELDS},
        "second": {name: getattr(flip.second, name) for name in _ANSWER_FIELDS},
    }
