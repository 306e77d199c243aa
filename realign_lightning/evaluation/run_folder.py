"""The folder of an evaluation: answers with their marks, and scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from realign_lightning.backbones.files import write_json, write_text
from realign_lightning.evaluation.base import Answered

ANSWERS = "answers.jsonl"
"""One line per question, in the benchmark's order."""

METRICS = "metrics.json"
"""Scores, and what they depend on."""

_AGAIN = "Run the evaluation again."


@dataclass
class Evaluated:
    """What an evaluation found.

    Args:
        benchmark: its name.
        settings: parser, lexicon and whatever else scores depend on.
        scores: by name, shares between 0 and 1 unless the benchmark says otherwise.
        answers: one per question.
        model: what tells the model from others, in plain JSON values.
        judge: what the judge was, and what it cost; empty without one.
    """

    benchmark: str
    settings: dict[str, Any]
    scores: dict[str, float]
    answers: list[Answered]
    model: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """Questions that do not count in the scores: without an answer or a verdict."""
        return sum(row.error is not None for row in self.answers)


def write_run(folder: Path, found: Evaluated) -> None:
    """Write ``answers.jsonl`` and ``metrics.json``; each is there as a whole or not at all.

    Args:
        folder: made if needed; what an earlier evaluation wrote is replaced.
        found: what to write.

    Raises:
        OSError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in found.answers)
    write_text(folder / ANSWERS, lines)
    told = {one.name: getattr(found, one.name) for one in fields(found) if one.name != "answers"}
    unanswered = sum(row.answer is None for row in found.answers)
    counts = {"questions": len(found.answers), "unanswered": unanswered, "left_out": found.left_out}
    write_json(folder / METRICS, {**told, **counts})


def read_run(folder: Path) -> Evaluated:
    """Read what :func:`write_run` wrote.

    Args:
        folder: with ``answers.jsonl`` and ``metrics.json``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the file and line that is damaged.
    """
    for name in (METRICS, ANSWERS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no folder of an evaluation: it has no {name}.")
    told = _metrics(folder)
    lines = _text(folder / ANSWERS).splitlines()
    answers = [_answered(folder / ANSWERS, number, line) for number, line in enumerate(lines, 1)]
    missing = {"benchmark", "settings", "scores"} - told.keys()
    if missing:
        raise ValueError(f"{folder / METRICS} lacks {sorted(missing)}: run the evaluation again.")
    known = {one.name for one in fields(Evaluated)} - {"answers"}
    return Evaluated(answers=answers, **{name: value for name, value in told.items() if name in known})


def _answered(path: Path, number: int, line: str) -> Answered:
    values = parse_object(line, f"{path}, line {number}", _AGAIN)
    known = {one.name for one in fields(Answered)}
    if not {"key", "question", "answer"} <= values.keys() or not values.keys() <= known:
        raise ValueError(f"{path}, line {number}: expected the fields {sorted(known)}, got {sorted(values)}.")
    return Answered(**values)


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / METRICS
    return parse_object(_text(path), str(path), _AGAIN)


def parse_object(text: str, where: str, advice: str) -> dict[str, Any]:
    """A JSON object from a file that some evaluation wrote.

    Args:
        text: the file, or one of its lines.
        where: what it is called in messages.
        advice: what to do where it is damaged.

    Raises:
        ValueError: if it is no JSON, or something else than an object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}. {advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def run_folders(folder: Path) -> list[Path]:
    """The folders of evaluations in a folder, or the folder itself.

    Args:
        folder: of one evaluation, or with one folder for each of several.
    """
    return sorted(path.parent for path in [folder / METRICS, *folder.glob(f"*/{METRICS}")] if path.is_file())


def find_runs(folder: Path) -> dict[str, Path]:
    """Evaluations in a folder, or the folder itself, by the benchmark's name.

    Args:
        folder: of one evaluation, or with one folder for each of several.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if two are of one benchmark.
    """
    paths = run_folders(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no evaluation: neither it nor a folder in it has a {METRICS}.")
    runs: dict[str, Path] = {}
    for path in paths:
        name = _metrics(path)["benchmark"]
        if name in runs:
            raise ValueError(f"{runs[name]} and {path} are both evaluations of {name}: give one of the two folders.")
        runs[name] = path
    return runs


def rows_of(answers: Sequence[Answered]) -> dict[str, Answered]:
    """Answers by the key of their question.

    Args:
        answers: of one evaluation.

    Raises:
        ValueError: if two have one key.
    """
    rows = {row.key: row for row in answers}
    if len(rows) != len(answers):
        raise ValueError(f"Expected every question once, got {len(answers)} lines of {len(rows)} questions.")
    return rows


def check_run(folder: Path, benchmark: str, model: Mapping[str, Any], overwrite: bool = False) -> None:
    """Make sure that a folder can be written to, and holds nothing that must not be replaced.

    Args:
        folder: that is going to be written; made if needed.
        benchmark: its name.
        model: what tells it from others.
        overwrite: whether another evaluation may be replaced.

    Raises:
        FileExistsError: if another model or benchmark was evaluated there, or it holds answers of somebody else.
        OSError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"Cannot write to `output` {folder}: {error.strerror}. Give another --output.") from error
    if overwrite:
        return
    if not (folder / METRICS).is_file():
        if (folder / ANSWERS).exists():
            raise FileExistsError(
                f"{folder / ANSWERS} is no evaluation's (there is no {METRICS} beside it) and would be replaced: give "
                "another --output."
            )
        return
    told = _metrics(folder)
    found = told.get("model") or {}
    changed = [name for name in sorted({*found, *model}) if found.get(name) != model.get(name)]
    if told.get("benchmark") != benchmark:
        changed = ["benchmark", *changed]
    if changed:
        raise FileExistsError(
            f"{folder} holds an evaluation of another model or benchmark, different in {', '.join(changed)}: give "
            "another --output, or --overwrite true."
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, it is no UTF-8: run the evaluation again.") from error
