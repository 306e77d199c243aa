"""Write our answers so that other harnesses read them."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from realign_lightning.evaluation.answer_files.forms import HALLUSION_FIELDS, hallusion_key
from realign_lightning.evaluation.answer_files.rows import CELL_LIMIT, openpyxl
from realign_lightning.evaluation.base import Answered
from realign_lightning.metrics.functional.coco import image_number

log = logging.getLogger(__name__)

WrittenForm = Literal["vlmevalkit", "lmms_eval", "official"]
"""Whose form; see :func:`write_answers`."""

_LINES = ".jsonl"
_POPE_METRICS = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")
_HALLUSION_METRICS = ("aAcc", "qAcc", "fAcc")


def write_answers(path: Path | str, answered: Sequence[Answered], form: WrittenForm, benchmark: str) -> list[Path]:
    """Write answers in the form of another harness.

    * ``vlmevalkit`` (pope, hallusionbench, amber's yes-or-no questions): the table that its ``evaluate`` takes.
    * ``lmms_eval``: lines as ``--log_samples`` writes them. Those of pope and hallusionbench carry what its metrics are
      computed from; for the others it would have to read the texts again.
    * ``official``: what the benchmark's own script reads. POPE's takes one kind of questions at a time: answers of
      several kinds go to several files, the kind in the name.

    Args:
        path: ``.xlsx``, ``.tsv`` or ``.csv`` for VLMEvalKit; ``.jsonl`` for lmms-eval; ``.json`` for the
            official forms (pope and chair: ``.jsonl``, too). A file that is there is replaced, as a whole or not at
            all.
        answered: of one evaluation, targets in the benchmark's form.
        form: whose.
        benchmark: "pope", "chair", "amber", "hallusionbench" or "mmhal".

    Returns:
        Files written.

    Raises:
        ValueError: if a question has no answer, two have one key, a target lacks what the form needs, the form does not
            know the benchmark, or an answer does not fit into a cell.
        ImportError: for ``.xlsx`` without openpyxl.
    """
    path = Path(path)
    if form not in get_args(WrittenForm):
        raise ValueError(f"Expected `form` to be one of {list(get_args(WrittenForm))}, got {form!r}.")
    _check(answered)
    rows_of = _ROWS[form]
    if benchmark not in rows_of:
        raise ValueError(f"Expected `benchmark` to be one of {list(rows_of)} for {form!r}, got {benchmark!r}.")
    if form == "official" and benchmark == "pope":
        return _write_kinds(path, answered)
    rows = _made(answered, rows_of[benchmark])
    if form == "lmms_eval":
        rows = [{"doc_id": place, **row} for place, row in enumerate(rows)]
    _write(path, rows, _SUFFIXES.get((form, benchmark), _SUFFIXES[form, ""]))
    return [path]


def _check(answered: Sequence[Answered]) -> None:
    if not answered:
        raise ValueError("Expected at least one answer to write, got none.")
    without = [row.key for row in answered if row.answer is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(answered)} questions have no answer, such as {without[0]!r}: other harnesses "
            "would count them as wrong, or shift the rest. Resume the evaluation first."
        )
    if len({row.key for row in answered}) != len(answered):
        raise ValueError("Expected every question once, got two with one key.")


RowOf = Callable[[Answered], dict[str, Any] | None]
"""A row of a file, None where the form has no place for the question."""


def _made(answered: Sequence[Answered], row_of: RowOf) -> list[dict[str, Any]]:
    rows = [row for one in answered if (row := row_of(one)) is not None]
    if not rows:
        raise ValueError("Expected answers that the form has a place for, got none.")
    if left_out := len(answered) - len(rows):
        log.warning("%d of %d answers are left out: the form has no place for them.", left_out, len(answered))
    return rows


def _needed(one: Answered, *names: str) -> Mapping[str, Any]:
    """The target, if it holds these."""
    if isinstance(one.target, Mapping) and all(name in one.target for name in names):
        return one.target
    raise ValueError(f"Expected the target of question {one.key!r} to hold {list(names)}, got {one.target!r}.")


def _write_kinds(path: Path, answered: Sequence[Answered]) -> list[Path]:
    kinds = {kind: None for one in answered for kind in _needed(one, "label").get("categories") or [""]}
    files = []
    for kind in kinds:
        rows = [_pope_row(one) for one in answered if kind in (_needed(one, "label").get("categories") or [""])]
        file = path if len(kinds) == 1 else path.with_name(f"{path.stem}_{kind or 'other'}{path.suffix}")
        _write(file, rows, {".json": _json_lines, _LINES: _json_lines})
        files.append(file)
    return files


def _pope_row(one: Answered) -> dict[str, Any]:
    return {"question": one.question, "answer": one.answer}


def _vlmevalkit_pope(one: Answered) -> dict[str, Any]:
    target = _needed(one, "label")
    # Its rating needs the column.
    return _table_row(one, one.key, ",".join(target.get("categories") or ["all"]), str(target["label"]).capitalize())


def _vlmevalkit_hallusion(one: Answered) -> dict[str, Any]:
    target = _needed(one, *HALLUSION_FIELDS)
    row = _table_row(one, hallusion_key(target), str(target["category"]), "Yes" if target["gt_answer"] == "1" else "No")
    # Its figures are named by this column and the numbers: "ocr" alone would mix those of VD and VS.
    return {**row, "l2-category": f"{target['category']}_{target['subcategory']}"}


def _vlmevalkit_amber(one: Answered) -> dict[str, Any] | None:
    target = _needed(one, "type", "truth")
    if target["type"] == "generative":
        return None
    return _table_row(one, one.key, str(target["type"]), str(target["truth"]).capitalize())


def _table_row(one: Answered, index: str, category: str, right: str) -> dict[str, Any]:
    return {
        "index": index,
        "category": category,
        "question": one.question,
        "answer": right,
        "image_path": one.image,
        "prediction": one.answer,
    }


def _sample(one: Answered, target: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": target, "filtered_resps": one.answer, **metrics, "input": one.question}


def _lmms_eval_pope(one: Answered) -> dict[str, Any]:
    label = str(_needed(one, "label")["label"])
    said = (one.answer or "").lower().strip()
    noted = {"question_id": one.key, "score": float(said == label), "prediction": said, "ground_truth": label}
    return _sample(one, label, dict.fromkeys(_POPE_METRICS, noted))


def _lmms_eval_hallusion(one: Answered) -> dict[str, Any]:
    noted = _hallusion_row(one)
    return _sample(one, noted["gt_answer"], dict.fromkeys(_HALLUSION_METRICS, noted))


def _lmms_eval_text(one: Answered) -> dict[str, Any]:
    target = one.target if isinstance(one.target, Mapping) else {}
    right = next((target[name] for name in ("objects", "truth", "reference") if name in target), "")
    return _sample(one, str(right), {})


def _hallusion_row(one: Answered) -> dict[str, Any]:
    target = _needed(one, *HALLUSION_FIELDS)
    return {
        **{name: str(target[name]) for name in HALLUSION_FIELDS},
        "question": _asked(one),
        "gt_answer_details": target.get("reference", ""),
        "filename": one.image or None,
        "model_prediction": one.answer,
    }


def _caption(one: Answered) -> dict[str, Any]:
    target = one.target if isinstance(one.target, Mapping) else {}
    number = image_number(str(target.get("image_id", "")) or one.image or one.key)
    if number is None:
        raise ValueError(f"Expected COCO's number of the image in target, image or key of question {one.key!r}.")
    return {"image_id": number, "caption": one.answer}


def _amber_response(one: Answered) -> dict[str, Any]:
    if not one.key.isdecimal():
        raise ValueError(f"Expected AMBER's number as the key of a question, got {one.key!r}.")
    return {"id": int(one.key), "response": one.answer}


def _mmhal_row(one: Answered) -> dict[str, Any]:
    target = _needed(one, "image_content", "reference")
    return {
        "question_type": target.get("type", ""),
        "image_id": one.image,
        "image_content": target["image_content"],
        "question": _asked(one),
        "gt_answer": target["reference"],
        "model_answer": one.answer,
    }


def _asked(one: Answered) -> str:
    """The benchmark's own question, without the instruction that the model got with it."""
    return str(one.target["question"]) if isinstance(one.target, Mapping) and "question" in one.target else one.question


_ROWS: Mapping[str, Mapping[str, RowOf]] = {
    "vlmevalkit": {"pope": _vlmevalkit_pope, "hallusionbench": _vlmevalkit_hallusion, "amber": _vlmevalkit_amber},
    "lmms_eval": {
        "pope": _lmms_eval_pope,
        "hallusionbench": _lmms_eval_hallusion,
        "chair": _lmms_eval_text,
        "amber": _lmms_eval_text,
        "mmhal": _lmms_eval_text,
    },
    "official": {
        "pope": _pope_row,
        "hallusionbench": _hallusion_row,
        "chair": _caption,
        "amber": _amber_response,
        "mmhal": _mmhal_row,
    },
}

Writer = Callable[[Path, Sequence[Mapping[str, Any]]], None]


def _write(path: Path, rows: Sequence[Mapping[str, Any]], writers: Mapping[str, Writer]) -> None:
    suffix = path.suffix.lower()
    if suffix not in writers:
        raise ValueError(f"Expected a name that ends in one of {list(writers)}, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        writers[suffix](temporary, rows)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside it that takes its place once it is whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _json_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def _table(delimiter: str) -> Writer:
    def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)

    return write


def _excel(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    library = openpyxl()
    _check_cells(rows, library.cell.cell.ILLEGAL_CHARACTERS_RE)
    book = library.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(rows[0]))
    for row in rows:
        sheet.append([_text_cell(library, sheet, str(value)) for value in row.values()])
    book.save(path)


def _check_cells(rows: Sequence[Mapping[str, Any]], illegal: re.Pattern[str]) -> None:
    for row in rows:
        for column, value in row.items():
            if len(str(value)) > CELL_LIMIT or illegal.search(str(value)):
                raise ValueError(
                    f"{column!r} of question {row['index']!r} has more than {CELL_LIMIT} characters, or control "
                    "characters: a cell cannot hold it. Write .tsv."
                )


def _text_cell(library: Any, sheet: Any, text: str) -> Any:
    cell = library.cell.WriteOnlyCell(sheet, value=text)
    # Else an answer that starts with "=" would be computed.
    cell.data_type = "s"
    return cell


_SUFFIXES: Mapping[tuple[str, str], Mapping[str, Writer]] = {
    ("vlmevalkit", ""): {".xlsx": _excel, ".tsv": _table("\t"), ".csv": _table(",")},
    ("lmms_eval", ""): {_LINES: _json_lines},
    ("official", ""): {".json": _json_list},
    ("official", "chair"): {".json": _json_list, _LINES: _json_lines},
}
