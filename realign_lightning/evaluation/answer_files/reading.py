"""Read answers that another harness wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from realign_lightning.evaluation.answer_files.forms import ForeignAnswer, Form, form_named, recognise
from realign_lightning.evaluation.answer_files.rows import CELL_LIMIT, Row, read_rows

log = logging.getLogger(__name__)

# VLMEvalKit writes it in place of an answer (`INFER_FAIL_MSG`), and scores it as one.
_FAILED = "Failed to obtain answer"
_WHOLE = re.compile(r"(\d+)\.0")


def read_answers(path: Path | str, form: str | None = None) -> list[ForeignAnswer]:
    """Read a file of answers: ours, a benchmark's official form, VLMEvalKit's or lmms-eval's.

    What the file is follows from its content, not its name; see the page "Answers of other harnesses". The log tells
    how many answers are empty, cut by a spreadsheet or messages of failure.

    Args:
        path: JSON, JSON lines, CSV, TSV or ``.xlsx``.
        form: name of one of ``FORMS``; None recognises it.

    Returns:
        Answers in the file's order, lmms-eval's in that of ``doc_id``. Questions that our own evaluation got no
        answer to are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if it is damaged, lacks a column, or fits no form, or several.
        ImportError: for ``.xlsx`` without openpyxl.
    """
    path = Path(path)
    chosen = None if form is None else form_named(form)
    answers: list[ForeignAnswer] = []
    for row in read_rows(path):
        chosen = chosen or _recognise(path, row)
        answer = _read(path, chosen, row)
        if answer is not None:
            answers.append(answer)
    if not answers:
        raise ValueError(f"{path} holds no answers.")
    _warn_of(path, answers)
    return _with_whole_keys(sorted(answers, key=_row_of_split))


def _row_of_split(answer: ForeignAnswer) -> int:
    """The row of the data that an lmms-eval answer is to; several processes write them as they come."""
    row = answer.fields.get("doc_id")
    return row if isinstance(row, int) else 0


def _recognise(path: Path, row: Row) -> Form:
    try:
        return recognise(list(row.values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _read(path: Path, form: Form, row: Row) -> ForeignAnswer | None:
    missing = [column for column in form.needs if column not in row.values]
    if missing:
        raise ValueError(
            f"{path}, {row.place}: expected the columns {list(form.needs)} of the form {form.name!r}, {missing} "
            f"missing; found {list(row.values)}."
        )
    try:
        return form.read(row.values)
    except ValueError as error:
        raise ValueError(f"{path}, {row.place}: {error}.") from error


def _warn_of(path: Path, answers: Sequence[ForeignAnswer]) -> None:
    counts = {
        "are empty": sum(not answer.answer.strip() for answer in answers),
        f"have {CELL_LIMIT} characters, the most that a cell of a spreadsheet holds: they were probably cut": sum(
            len(answer.answer) == CELL_LIMIT for answer in answers
        ),
        f"say {_FAILED!r}: they are scored as they stand": sum(_FAILED in answer.answer for answer in answers),
    }
    for told, count in counts.items():
        if count:
            log.warning("%s: %d of %d answers %s.", path, count, len(answers), told)


def _with_whole_keys(answers: list[ForeignAnswer]) -> list[ForeignAnswer]:
    """Undo what pandas does to a column of whole numbers that had a gap: all get a fraction."""
    whole = [_WHOLE.fullmatch(answer.key) for answer in answers]
    if not all(whole):
        return answers
    return [replace(answer, key=found[1]) for answer, found in zip(answers, whole, strict=True) if found]
