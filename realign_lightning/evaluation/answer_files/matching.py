"""Bring answers that lie in files to the questions that they answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from realign_lightning.engines.chat_parts import text_of
from realign_lightning.evaluation.answer_files.forms import HALLUSION_FIELDS, ForeignAnswer, hallusion_key
from realign_lightning.evaluation.base import Question
from realign_lightning.metrics.functional.coco import image_number

log = logging.getLogger(__name__)

_SHOWN = 3


def match(questions: Sequence[Question], found: Sequence[ForeignAnswer]) -> list[str | None]:
    """The answer to each question.

    Questions and answers are brought together by the first of these that names every answer's question, and
    contradicts none of the texts and labels that both sides have: their keys, HallusionBench's ids, image and text of
    the question, the image alone, the numbers within the only kind, their order. A number is what stands behind the
    last "/" of a question's key: files of answers to one of POPE's kinds have just that. Order serves only where there
    are as many answers as questions, keys either share nothing or all texts of questions agree, and no numbers tell
    another order. The log says so where numbers or order served.

    Args:
        questions: of the benchmark; no two with one key.
        found: as :func:`~realign_lightning.evaluation.answer_files.read_answers` gives them.

    Returns:
        One answer per question, None where there is none; the log tells how many.

    Raises:
        ValueError: naming the answers that belong to no question, or that differ for one question.
    """
    reasons = []
    for way in _WAYS:
        try:
            matched = _by_name(questions, found, way)
        except _MismatchError as mismatch:
            reasons.append(f"by {way.told}: {mismatch}")
            continue
        if way.of_question is _number:
            log.warning("Answers were matched to questions by their numbers: the file does not tell their kind.")
        return _answers(questions, matched)
    try:
        _check_order(questions, found)
    except _MismatchError as mismatch:
        told = "; ".join([*reasons, f"by order: {mismatch}"])
        raise ValueError(
            f"The answers fit the questions in no way: {told}. A file that carries the right answers can be scored "
            "without the benchmark's own files."
        ) from None
    log.warning("Answers were matched to questions by their order: the file names no question of this benchmark.")
    return _answers(questions, found)


class _MismatchError(ValueError):
    """Why answers cannot be brought to questions in some way."""


def distinct(found: Sequence[ForeignAnswer]) -> list[ForeignAnswer]:
    """Answers without those that repeat another one.

    Args:
        found: answers; the same question may come twice if the answers are equal.

    Returns:
        The first of each.

    Raises:
        ValueError: naming the questions that are answered twice, differently.
    """
    first: dict[tuple[str, str, str], ForeignAnswer] = {}
    kept, clashing = [], []
    for answer in found:
        name = (answer.key, answer.image, answer.question)
        if not answer.key or name not in first:
            first[name] = answer
            kept.append(answer)
        elif first[name].answer != answer.answer:
            clashing.append(answer.key)
    if clashing:
        raise ValueError(
            f"Expected one answer to each question, got different ones to {len(clashing)}, {_some(clashing)}."
        )
    if len(kept) < len(found):
        log.warning("%d answers repeat another one, and count once.", len(found) - len(kept))
    return kept


def _answers(questions: Sequence[Question], matched: Sequence[ForeignAnswer | None]) -> list[str | None]:
    missing = [question.key for question, answer in zip(questions, matched, strict=True) if answer is None]
    if missing:
        log.warning("%d of %d questions have no answer, %s.", len(missing), len(questions), _some(missing))
    return [None if answer is None else answer.answer for answer in matched]


def _some(names: Sequence[str]) -> str:
    return "such as " + ", ".join(repr(name) for name in names[:_SHOWN])


class _Way(NamedTuple):
    """One way to name questions.

    Args:
        told: for messages.
        of_question: a question's name; empty if it has none.
        of_answer: the name of an answer's question.
        unique: whether two questions of one name are two questions, not one that is asked twice.
    """

    told: str
    of_question: Callable[[Question], str]
    of_answer: Callable[[ForeignAnswer], str]
    unique: bool = True


def _by_name(questions: Sequence[Question], answers: Sequence[ForeignAnswer], way: _Way) -> list[ForeignAnswer | None]:
    """Each question's answer."""
    by_name = _named(answers, way)
    names = [way.of_question(question) for question in questions]
    unknown = sorted(by_name.keys() - set(names))
    if unknown:
        raise _MismatchError(f"{len(unknown)} of {len(by_name)} are unknown, {_some(unknown)}")
    named = [name for name in names if name]
    if way.unique and len(set(named)) < len(named):
        raise _MismatchError("several questions share it")
    matched = [by_name.get(name) for name in names]
    _check_pairs([(question, one) for question, one in zip(questions, matched, strict=True) if one is not None])
    if len(by_name) < len(answers):
        log.warning("%d answers repeat another one, and count once.", len(answers) - len(by_name))
    return matched


def _named(answers: Sequence[ForeignAnswer], way: _Way) -> dict[str, ForeignAnswer]:
    by_name: dict[str, ForeignAnswer] = {}
    for answer in answers:
        name = way.of_answer(answer)
        if not name:
            raise _MismatchError("some answers lack it" if by_name else "the answers lack it")
        first = by_name.setdefault(name, answer)
        if first.answer != answer.answer:
            raise _MismatchError(f"several different answers have {name!r}")
        if not _may_be_one(first.question, answer.question):
            raise _MismatchError(f"several questions have {name!r}")
    return by_name


def _check_pairs(pairs: Iterable[tuple[Question, ForeignAnswer]]) -> None:
    for question, answer in pairs:
        if problem := _contradiction(question, answer):
            raise _MismatchError(problem)


def _contradiction(question: Question, answer: ForeignAnswer) -> str:
    """Why the answer cannot be one to this question; empty if nothing speaks against it."""
    asked, told = text_of(question.prompt), answer.question
    if not _may_be_one(asked, told):
        return f"question {question.key!r} is {asked!r}, and its answer is to {told!r}"
    labels = _label(question.target), _label(answer.target)
    if all(labels) and labels[0] != labels[1]:
        return f"the right answer to question {question.key!r} is {labels[0]!r}, and to its answer's {labels[1]!r}"
    return ""


def _check_order(questions: Sequence[Question], answers: Sequence[ForeignAnswer]) -> None:
    """Refuse answers that may not be in the order of the questions."""
    if len(questions) != len(answers):
        raise _MismatchError(f"{len(answers)} answers to {len(questions)} questions")
    pairs = list(zip(questions, answers, strict=True))
    _check_pairs(pairs)
    shared = {question.key for question in questions} & {answer.key for answer in answers} - {""}
    if shared and not all(text_of(question.prompt) and answer.question for question, answer in pairs):
        raise _MismatchError(f"some keys are those of questions, {_some(sorted(shared))}, and others not")
    _check_numbers(questions, answers)


def _check_numbers(questions: Sequence[Question], answers: Sequence[ForeignAnswer]) -> None:
    """Refuse answers that are numbered as the questions are, or from first to last, and come in another order."""
    found = _from_zero([answer.key for answer in answers])
    orders = _from_zero([_number(question) or question.key for question in questions]), list(range(len(answers)))
    if found and found not in orders and sorted(found) in [sorted(order) for order in orders]:
        raise _MismatchError("the answers have the numbers of the questions, in another order")


def _from_zero(numbers: Sequence[str]) -> list[int]:
    """Numbers, the lowest of which becomes 0, since some files begin at 0 and others at 1; empty if one is none."""
    if not all(number.isdecimal() for number in numbers):
        return []
    lowest = min(map(int, numbers), default=0)
    return [int(number) - lowest for number in numbers]


def _words(told: str) -> str:
    return " ".join(told.split()).lower()


def _may_be_one(first: str, second: str) -> bool:
    """Whether two texts may ask the same, whatever instructions stand around it; an empty one may ask anything."""
    short, long = sorted((_words(first), _words(second)), key=len)
    return short in long or (bool(_up_to_mark(first)) and _words(_up_to_mark(first)) == _words(_up_to_mark(second)))


def _label(target: Any) -> str:
    """Right answer of a yes-or-no question; empty if the target tells none."""
    if isinstance(target, Mapping):
        return {"1": "yes", "0": "no"}.get(told := str(target.get("label", target.get("gt_answer", ""))), told)
    word = target.strip().lower() if isinstance(target, str) else ""
    return word if word in ("yes", "no") else ""


def _question_ids(question: Question) -> str:
    target = question.target
    return hallusion_key(target) if isinstance(target, Mapping) and set(HALLUSION_FIELDS[:-1]) <= target.keys() else ""


def _answer_ids(answer: ForeignAnswer) -> str:
    return answer.key if answer.key.count("_") == len(HALLUSION_FIELDS) - 2 else ""


def _place(image: str, asked: str) -> str:
    return f"{image}: {_words(asked)}" if image and asked else ""


def _up_to_mark(asked: str) -> str:
    """A question without the instruction that may follow it."""
    return asked.partition("?")[0] if "?" in asked else ""


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _image_name(question: Question) -> str:
    path = question.image if isinstance(question.image, Path) else getattr(question.image, "filename", None)
    return _file_name(str(path or ""))


def _number(question: Question) -> str:
    """The number that a question has within its kind; empty if its key names no kind."""
    kind, _, number = question.key.rpartition("/")
    return number if kind else ""


def _digits(image: str) -> str:
    number = image_number(image)
    return "" if number is None else str(number)


def _question_image(question: Question) -> str:
    target = question.target if isinstance(question.target, Mapping) else {}
    return _digits(str(target.get("image_id", "")) or _image_name(question) or question.key)


def _answer_image(answer: ForeignAnswer) -> str:
    target = answer.target if isinstance(answer.target, Mapping) else {}
    return _digits(str(target.get("image_id", "")) or answer.image)


_WAYS = (
    _Way("key", lambda question: question.key, lambda answer: answer.key),
    _Way("HallusionBench's ids", _question_ids, _answer_ids),
    _Way(
        "image and question",
        lambda question: _place(_image_name(question), text_of(question.prompt)),
        lambda answer: _place(_file_name(answer.image), answer.question),
        unique=False,
    ),
    _Way(
        "image and question up to its mark",
        lambda question: _place(_image_name(question), _up_to_mark(text_of(question.prompt))),
        lambda answer: _place(_file_name(answer.image), _up_to_mark(answer.question)),
        unique=False,
    ),
    _Way("image", _question_image, _answer_image),
    _Way("number within the only kind", _number, lambda answer: answer.key),
)
