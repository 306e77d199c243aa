"""The forms that answers come in, and how a row of each is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from realign_lightning.evaluation.answer_files.rows import REPLY
from realign_lightning.metrics.functional.hallusionbench import HallusionRow

HALLUSION_FIELDS = HallusionRow._fields
"""What HallusionBench's target holds; the names are those of the official file."""

_AMBER_TYPES = ("discriminative", "generative", "relation")


@dataclass(frozen=True)
class ForeignAnswer:
    """An answer that lies in a file, of whatever harness.

    Args:
        key: what the file calls the question; empty where it has no name.
        answer: the text; empty if the file's is.
        question: its text, empty if the file has none. Some harnesses write the prompt, which says more.
        image: name or path of the image, empty if the file has none.
        target: the right answer if the file has it, in the benchmark's own form where the file tells the benchmark.
        category: what the file says of the kind of question.
        fields: everything else in the row.
    """

    key: str
    answer: str
    question: str = ""
    image: str = ""
    target: Any = None
    category: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


class Form(NamedTuple):
    """One way to write answers.

    Args:
        name: for ``form=`` and ``--form``.
        needs: columns that every row must have.
        signs: whether a row with these columns is surely of this form.
        read: makes an answer of a row; None if it holds none.
    """

    name: str
    needs: tuple[str, ...]
    signs: Callable[[Set[str]], bool]
    read: Callable[[Mapping[str, Any]], ForeignAnswer | None]


def text(row: Mapping[str, Any], column: str, default: str = "") -> str:
    """A value as text: numbers lose the fraction that spreadsheets give them, nothing (None, NaN) is ``default``.

    Args:
        row: by column.
        column: which value.
        default: where there is none.

    Raises:
        ValueError: naming the column, if it is neither text nor number.

    >>> text({"index": 3.0}, "index"), text({"prediction": float("nan")}, "prediction")
    ('3', '')
    """
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return default
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"expected text in {column!r}, got {type(value).__name__}")


def _first(row: Mapping[str, Any], *columns: str) -> str:
    return next((found for column in columns if (found := text(row, column))), "")


def _rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in used}


def hallusion_target(row: Mapping[str, Any]) -> dict[str, str] | None:
    """The target of one of HallusionBench's official rows, None if it lacks a field.

    Args:
        row: with the columns of ``HallusionBench.json``.
    """
    target = {name: text(row, name) for name in HALLUSION_FIELDS}
    return target if all(target.values()) else None


def hallusion_key(target: Mapping[str, Any]) -> str:
    """A question's name in VLMEvalKit's ``index``: category, subcategory, visual input, set, figure, question.

    Args:
        target: with :data:`HALLUSION_FIELDS`.

    >>> fields = ("VD", "ocr", "1", "4", "0", "2", "1")
    >>> hallusion_key(dict(zip(HALLUSION_FIELDS, fields)))
    'VD_ocr_1_4_0_2'
    """
    return "_".join(str(target[name]) for name in HALLUSION_FIELDS[:-1])


def _ours(row: Mapping[str, Any]) -> ForeignAnswer | None:
    if row["answer"] is None:
        return None
    return ForeignAnswer(
        text(row, "key"),
        text(row, "answer"),
        text(row, "question"),
        text(row, "image"),
        row.get("target"),
        fields=_rest(row, "key", "answer", "question", "image", "target"),
    )


def _pope(row: Mapping[str, Any]) -> ForeignAnswer:
    used = ("question_id", "answer", "question", "image")
    # LLaVA's loader for captions, as Re-Align has it, writes the name of the image as `id`.
    return ForeignAnswer(
        text(row, "question_id"),
        text(row, "answer"),
        text(row, "question"),
        _first(row, "image", "id"),
        fields=_rest(row, *used),
    )


def _llava(row: Mapping[str, Any]) -> ForeignAnswer:
    return ForeignAnswer(
        text(row, "question_id"),
        text(row, "text"),
        text(row, "prompt"),
        _first(row, "image", "image_id"),
        category=text(row, "category"),
        fields=_rest(row, "question_id", "text", "prompt", "image", "image_id", "category"),
    )


def _caption(row: Mapping[str, Any]) -> ForeignAnswer:
    return ForeignAnswer(
        text(row, "image_id"),
        text(row, "caption"),
        text(row, "question"),
        text(row, "image"),
        {"image_id": row["image_id"]},
        fields=_rest(row, "image_id", "caption", "question", "image"),
    )


def _amber(row: Mapping[str, Any]) -> ForeignAnswer:
    return ForeignAnswer(
        text(row, "id"),
        text(row, "response"),
        _first(row, "query", "question"),
        text(row, "image"),
        category=text(row, "type"),
        fields=_rest(row, "id", "response", "query", "question", "image", "type"),
    )


def _hallusion(row: Mapping[str, Any]) -> ForeignAnswer:
    target = hallusion_target(row)
    return ForeignAnswer(
        # Official result files leave the right answer out; the question is named all the same.
        hallusion_key(row) if all(text(row, name) for name in HALLUSION_FIELDS[:-1]) else "",
        text(row, "model_prediction"),
        text(row, "question"),
        text(row, "filename"),
        target,
        text(row, "category"),
        _rest(row, "model_prediction", "question", "filename", *HALLUSION_FIELDS),
    )


def _mmhal(row: Mapping[str, Any]) -> ForeignAnswer:
    asked, content = text(row, "question"), row.get("image_content")
    target = {"type": text(row, "question_type"), "question": asked, "reference": text(row, "gt_answer")}
    return ForeignAnswer(
        "",
        text(row, "model_answer"),
        asked,
        _first(row, "image_src", "image_id"),
        {**target, "image_content": content} if content and all(target.values()) else None,
        target["type"],
        _rest(row, "model_answer", "question", "question_type", "gt_answer", "image_content"),
    )


def _judge(row: Mapping[str, Any]) -> ForeignAnswer:
    return ForeignAnswer("", _reply(row), fields=_rest(row, "choices", REPLY))


def _reply(row: Mapping[str, Any]) -> str:
    for column in (REPLY, "gpt4_review", "reply"):
        if column in row:
            return text(row, column)
    try:
        return text(row["choices"][0]["message"], "content")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("expected a judge's reply in choices[0].message.content, 'gpt4_review' or 'reply'") from error


def _vlmevalkit(row: Mapping[str, Any]) -> ForeignAnswer:
    key, answer, category = text(row, "index"), text(row, "answer"), text(row, "category")
    return ForeignAnswer(
        key,
        text(row, "prediction"),
        text(row, "question"),
        _first(row, "image_path", "image_name"),
        _vlmevalkit_target(key, answer, category),
        category,
        _rest(row, "index", "prediction", "question", "image_path", "image", "answer", "category"),
    )


def _vlmevalkit_target(key: str, answer: str, category: str) -> Any:
    parts = key.split("_")
    label = answer.strip().lower()
    if len(parts) == len(HALLUSION_FIELDS) - 1 and parts[0] in ("VD", "VS") and label in ("yes", "no"):
        return dict(zip(HALLUSION_FIELDS, [*parts, str(int(label == "yes"))], strict=True))
    if category.startswith(_AMBER_TYPES) and label in ("yes", "no"):
        return {"type": category, "truth": label}
    return answer or None


def _lmms_eval(row: Mapping[str, Any]) -> ForeignAnswer:
    pope, hallusion, caption = (_metric(row, name) for name in ("pope_accuracy", "aAcc", "coco_cap_chair_i"))
    # Older versions wrote the document, too.
    doc = row["doc"] if isinstance(row.get("doc"), dict) else {}
    target = hallusion_target(hallusion) or row.get("target")
    if caption:
        target = {"image_id": caption["image_id"], "objects": list(caption["answer"])}
    rest = _rest(row, "filtered_resps", "resps", "input", "target")
    return ForeignAnswer(
        hallusion_key(hallusion) if "model_prediction" in hallusion else text(row, "doc_id"),
        _response(row),
        text(hallusion or doc, "question") or _input(row),
        _first(hallusion, "filename") or text(caption, "image_id"),
        target,
        text(hallusion or doc, "category"),
        {**rest, "question_id": pope["question_id"]} if "question_id" in pope else rest,
    )


def _metric(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the task noted of the question under the name of a metric; empty where that is but a number."""
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _response(row: Mapping[str, Any]) -> str:
    value = row.get("filtered_resps", row.get("resps"))
    while isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"expected one response, got {len(value)} (lmms-eval's `repeats`): score them one by one")
        value = value[0]
    return text({"filtered_resps": value}, "filtered_resps")


def _input(row: Mapping[str, Any]) -> str:
    value = row.get("input")
    return value if isinstance(value, str) else ""


_WRITERS = {"model", "model_id", "answer_id"}

FORMS: tuple[Form, ...] = (
    Form("realign", ("key", "question", "answer"), lambda have: {"key", "question", "answer", "counts"} <= have, _ours),
    Form(
        "pope",
        ("question", "answer"),
        # A file of questions has these two as well, its `answer` being the right one.
        lambda have: {"question", "answer"} <= have and (len(have) == 2 or bool(have & _WRITERS)),
        _pope,
    ),
    Form(
        "llava",
        ("text",),
        # In files of questions `text` is the question.
        lambda have: "text" in have and (bool(have & (_WRITERS | {"prompt"})) or have == {"question_id", "text"}),
        _llava,
    ),
    Form("captions", ("image_id", "caption"), lambda have: {"image_id", "caption"} <= have, _caption),
    Form("amber", ("id", "response"), lambda have: {"id", "response"} <= have, _amber),
    Form(
        "hallusionbench",
        ("model_prediction", "question"),
        lambda have: {"model_prediction", "set_id", "figure_id", "question_id"} <= have,
        _hallusion,
    ),
    Form("mmhal", ("model_answer",), lambda have: "model_answer" in have, _mmhal),
    Form("judge", (), lambda have: "choices" in have or REPLY in have, _judge),
    Form("vlmevalkit", ("index", "prediction"), lambda have: {"index", "prediction"} <= have, _vlmevalkit),
    Form(
        "lmms_eval",
        ("doc_id",),
        lambda have: "doc_id" in have and bool(have & {"filtered_resps", "resps"}),
        _lmms_eval,
    ),
)
"""Forms that are read."""


def recognise(columns: Sequence[str]) -> Form:
    """The form of rows with these columns.

    Args:
        columns: of the first row.

    Raises:
        ValueError: if none fits, or several do.
    """
    fitting = [form for form in FORMS if form.signs(set(columns))]
    if len(fitting) == 1:
        return fitting[0]
    names = [form.name for form in fitting or FORMS]
    if fitting:
        raise ValueError(f"the columns {list(columns)} fit several forms, {names}: say which one (form=, --form)")
    raise ValueError(
        f"the columns {list(columns)} fit no form. A file of questions has no answers; if it is one of answers, say "
        f"which form (form=, --form): one of {names}"
    )


def form_named(name: str) -> Form:
    """The form of that name.

    Args:
        name: of one of ``FORMS``.

    Raises:
        ValueError: naming the forms that there are.
    """
    for form in FORMS:
        if form.name == name:
            return form
    raise ValueError(f"Expected `form` to be one of {[form.name for form in FORMS]}, got {name!r}.")
