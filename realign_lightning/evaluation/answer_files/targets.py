"""Questions made of files that carry the right answers with those of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.evaluation.answer_files.forms import HALLUSION_FIELDS, ForeignAnswer
from realign_lightning.evaluation.answer_files.matching import distinct
from realign_lightning.evaluation.base import Question


def questions_from(found: Sequence[ForeignAnswer], benchmark: str) -> list[Question]:
    """Questions with targets, so that answers can be scored without the official data.

    The scores are those of the questions in the file: whether they are all of the benchmark is not known here.

    Args:
        found: as :func:`~realign_lightning.evaluation.answer_files.read_answers` gives them.
        benchmark: "pope", "chair", "amber", "hallusionbench" or "mmhal".

    Returns:
        One per answer; of equal ones one. Keys are the file's, with their place before them if they are not unique.

    Raises:
        ValueError: naming the benchmark if it is unknown, or the first answer that lacks what the target needs.
    """
    if benchmark not in _TARGETS:
        raise ValueError(f"Expected `benchmark` to be one of {list(_TARGETS)}, got {benchmark!r}.")
    answers = distinct(found)
    times = Counter(answer.key for answer in answers)
    questions = []
    for place, answer in enumerate(answers):
        key = answer.key if answer.key and times[answer.key] == 1 else f"{place}:{answer.key}".rstrip(":")
        target = _TARGETS[benchmark](answer)
        if target is None:
            raise ValueError(
                f"Answer {key!r} carries no target of {benchmark} ({_NEEDED[benchmark]}), got {answer.target!r}: give "
                "the benchmark's official files."
            )
        image = Path(answer.image) if answer.image else None
        questions.append(Question(answer.question, image, key, target, _group(answer, target, benchmark)))
    return questions


def _group(answer: ForeignAnswer, target: Mapping[str, Any], benchmark: str) -> str:
    if benchmark == "hallusionbench":
        return "/".join(target[name] for name in ("category", "subcategory", "set_id"))
    return str(answer.fields.get("group", "")) or answer.image


def _pope_target(answer: ForeignAnswer) -> dict[str, Any] | None:
    target = answer.target
    if isinstance(target, Mapping):
        return dict(target) if target.get("label") in ("yes", "no") else None
    label = target.strip().lower() if isinstance(target, str) else ""
    categories = [name.strip() for name in answer.category.split(",") if name.strip()]
    return {"label": label, "categories": categories} if label in ("yes", "no") else None


def _holding(target: Any, *names: str) -> dict[str, Any] | None:
    return dict(target) if isinstance(target, Mapping) and all(name in target for name in names) else None


def _chair_target(answer: ForeignAnswer) -> dict[str, Any] | None:
    return _holding(answer.target, "objects")


def _amber_target(answer: ForeignAnswer) -> dict[str, Any] | None:
    return _holding(answer.target, "type", "truth")


def _hallusion_target(answer: ForeignAnswer) -> dict[str, Any] | None:
    target = _holding(answer.target, *HALLUSION_FIELDS)
    if target is None:
        return None
    return {"question": answer.question, "reference": str(answer.fields.get("gt_answer_details") or ""), **target}


def _mmhal_target(answer: ForeignAnswer) -> dict[str, Any] | None:
    return _holding(answer.target, "type", "question", "reference", "image_content")


_TARGETS: Mapping[str, Callable[[ForeignAnswer], dict[str, Any] | None]] = {
    "pope": _pope_target,
    "chair": _chair_target,
    "amber": _amber_target,
    "hallusionbench": _hallusion_target,
    "mmhal": _mmhal_target,
}

_NEEDED = {
    "pope": "label yes or no",
    "chair": "objects of the image",
    "amber": "type and truth",
    "hallusionbench": ", ".join(HALLUSION_FIELDS),
    "mmhal": "image_content and gt_answer",
}
