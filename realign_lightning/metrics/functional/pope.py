"""POPE (Li et al. 2023, arXiv 2305.10355): yes-or-no questions about objects that are, or are not, in an image."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Literal, get_args

import torch
from torch import Tensor

from realign_lightning.metrics.functional.checks import check_texts, ratio

PopeParser = Literal["official"]
"""How an answer is read: ``official`` is the rule of AoiDragon/POPE, also used by LLaVA and Re-Align."""

PopeKind = Literal["random", "popular", "adversarial"]
"""Which absent objects are asked for."""


class Verdict(IntEnum):
    """What a parser makes of an answer."""

    NO = 0
    YES = 1
    UNKNOWN = 2


def official_verdict(answer: str, label: str = "") -> Verdict:
    """Read an answer as POPE's ``evaluate.py`` does.

    The text before the first period loses its commas and is split at single blanks; it means no if one of the words is
    exactly "No", "no" or "not", and yes otherwise. So "NO", "no!", "isn't" and an empty answer all mean yes.

    Args:
        answer: the generated text.
        label: the right answer. This rule does not look at it; some others do.

    Returns:
        ``YES`` or ``NO``.

    >>> official_verdict("There is no dog, sadly.").name, official_verdict("NO").name
    ('NO', 'YES')
    """
    del label
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return Verdict.NO if "No" in words or "not" in words or "no" in words else Verdict.YES


PARSERS: Mapping[PopeParser, Callable[[str, str], Verdict]] = {"official": official_verdict}
"""The rule behind each name: answer and label to verdict."""

_LABELS = {"no": 0, "yes": 1}
_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def check_parser(parser: str) -> None:
    """Check the name of a parser.

    Args:
        parser: the name.

    Raises:
        ValueError: if there is no such parser.
    """
    if parser not in PARSERS:
        raise ValueError(f"Expected `parser` to be one of {tuple(PARSERS)}, got {parser!r}.")


def _pope_update(preds: Sequence[str], target: Sequence[str], parser: PopeParser) -> tuple[Tensor, int]:
    """Count answers.

    Returns:
        The (2, 3) table of label (no, yes) against verdict (no, yes, unknown), and the number of unparsed answers.
    """
    check_texts(preds, target)
    for index, label in enumerate(target):
        if label not in _LABELS:
            raise ValueError(f"Expected `target` to hold 'yes' and 'no', got {label!r} at index {index}.")
    read = PARSERS[parser]
    cells = Counter((_LABELS[label], int(read(answer, label))) for answer, label in zip(preds, target, strict=True))
    counts = torch.tensor([[cells[label, verdict] for verdict in Verdict] for label in (0, 1)])
    return counts, sum(_YES_OR_NO.search(answer) is None for answer in preds)


def _pope_compute(counts: Tensor, unparsed: Tensor) -> dict[str, Tensor]:
    """Finish the counts of :func:`_pope_update`."""
    true_positives = counts[1, Verdict.YES]
    said_yes = counts[:, Verdict.YES].sum()
    positives, total = counts[1].sum(), counts.sum()
    return {
        "accuracy": ratio(true_positives + counts[0, Verdict.NO], total),
        "precision": ratio(true_positives, said_yes),
        "recall": ratio(true_positives, positives),
        "f1": ratio(2 * true_positives, said_yes + positives),
        "yes_ratio": ratio(said_yes, total),
        "unparsed": ratio(unparsed, total),
    }


def pope(preds: Sequence[str], target: Sequence[str], parser: PopeParser = "official") -> dict[str, Tensor]:
    """POPE's scores of a set of answers; see :class:`~realign_lightning.metrics.POPE`.

    Args:
        preds: answers as generated.
        target: the right answers, "yes" or "no".
        parser: how answers are read.

    Returns:
        accuracy, precision, recall, f1 ("yes" is positive), yes_ratio (share of answers read as yes) and unparsed
        (share of answers in which neither "yes" nor "no" occurs as a word, in any case), each a scalar in [0, 1]; 0
        where a denominator is 0.

    Raises:
        ValueError: if the lengths differ, a label is neither "yes" nor "no", or the parser is unknown.

    >>> scores = pope(["Yes.", "There is no cat.", "A cat sits there."], ["yes", "no", "no"])
    >>> {name: round(value.item(), 2) for name, value in scores.items()}
    {'accuracy': 0.67, 'precision': 0.5, 'recall': 1.0, 'f1': 0.67, 'yes_ratio': 0.67, 'unparsed': 0.33}
    """
    check_parser(parser)
    counts, unparsed = _pope_update(preds, target, parser)
    return _pope_compute(counts, torch.tensor(unparsed))


def pope_questions(
    objects_per_image: Sequence[Sequence[str]], kind: PopeKind, seed: int = 0, per_image: int = 3
) -> list[list[tuple[str, str]]]:
    """Choose the objects that POPE asks for, as the official sampler does.

    The first ``per_image`` objects of an image are asked for with the answer "yes", and each is followed by an absent
    one with the answer "no":

    * ``random``: drawn uniformly from all objects of all images;
    * ``popular``: the absent object that is in most images;
    * ``adversarial``: the absent object that is most often in one image with the present one just asked for; a random
      one where none is left.

    No object is asked for twice in an image. Equal counts are ranked by first occurrence. The draws are those of the
    reference (AoiDragon/POPE, ``main.py``) after ``random.seed(seed)``: it makes the three kinds one after the other
    from one stream of random numbers.

    Args:
        objects_per_image: the distinct objects of each image; their order decides which are asked for.
        kind: how absent objects are chosen.
        seed: of the draws.
        per_image: present objects asked for, and absent ones, per image. An image with fewer objects gets as many
            questions as it has; the official set leaves such images out beforehand.

    Returns:
        For each image the (object, "yes" or "no") in the order of the questions.

    Raises:
        ValueError: for an unknown kind, a ``per_image`` below 1, an object listed twice in an image, or an image in
            which too few objects are absent.

    >>> scenes = [["one", "two"], ["two", "three"], ["two"], ["one", "four"]]
    >>> pope_questions(scenes, "popular", per_image=1)
    [[('one', 'yes'), ('three', 'no')], [('two', 'yes'), ('one', 'no')], [('two', 'yes'), ('one', 'no')], \
[('one', 'yes'), ('two', 'no')]]
    """
    if kind not in get_args(PopeKind):
        raise ValueError(f"Expected `kind` to be one of {get_args(PopeKind)}, got {kind!r}.")
    if per_image < 1:
        raise ValueError(f"Expected `per_image` to be at least 1, got {per_image}.")
    vocabulary = _by_first_occurrence(objects_per_image)
    _check_images(objects_per_image, len(vocabulary), per_image)
    rng = random.Random(seed)
    earlier_kinds = get_args(PopeKind)[: get_args(PopeKind).index(kind)]
    for earlier in earlier_kinds:
        _questions(objects_per_image, earlier, vocabulary, rng, per_image)
    return _questions(objects_per_image, kind, vocabulary, rng, per_image)


def _questions(
    objects_per_image: Sequence[Sequence[str]],
    kind: PopeKind,
    vocabulary: Sequence[str],
    rng: random.Random,
    per_image: int,
) -> list[list[tuple[str, str]]]:
    rankings = _rankings(objects_per_image, kind, vocabulary)
    return [list(_questions_of_image(objects, rankings, vocabulary, rng, per_image)) for objects in objects_per_image]


def _by_first_occurrence(objects_per_image: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for objects in objects_per_image for name in objects))


def _check_images(objects_per_image: Sequence[Sequence[str]], vocabulary_size: int, per_image: int) -> None:
    for index, objects in enumerate(objects_per_image):
        if isinstance(objects, str):
            raise ValueError(f"Expected `objects_per_image` to hold lists of names, got {objects!r} at index {index}.")
        if len(set(objects)) != len(objects):
            raise ValueError(f"Expected the distinct objects of image {index}, got {list(objects)}: list each once.")
        needed, absent = min(per_image, len(objects)), vocabulary_size - len(objects)
        if absent < needed:
            raise ValueError(
                f"Image {index} needs {needed} absent objects, but only {absent} of the {vocabulary_size} objects in "
                "`objects_per_image` are absent from it: give more images, or lower `per_image`."
            )


def _rankings(
    objects_per_image: Sequence[Sequence[str]], kind: PopeKind, vocabulary: Sequence[str]
) -> dict[str, list[str]]:
    """For each present object, the candidates for the absent one, best first; nothing for ``random``."""
    if kind == "random":
        return {name: [] for name in vocabulary}
    if kind == "popular":
        images = Counter(name for objects in objects_per_image for name in objects)
        ranked = [name for name, _ in images.most_common()]
        return dict.fromkeys(vocabulary, ranked)
    together: dict[str, Counter[str]] = {name: Counter() for name in vocabulary}
    for objects in objects_per_image:
        for name in objects:
            together[name].update(other for other in objects if other != name)
    return {name: [other for other, _ in counts.most_common()] for name, counts in together.items()}


def _questions_of_image(
    objects: Sequence[str],
    rankings: Mapping[str, Sequence[str]],
    vocabulary: Sequence[str],
    rng: random.Random,
    per_image: int,
) -> Iterator[tuple[str, str]]:
    taken = set(objects)
    for present in objects[:per_image]:
        yield present, "yes"
        absent = next((name for name in rankings[present] if name not in taken), None)
        while absent is None or absent in taken:
            absent = rng.choice(vocabulary)
        taken.add(absent)
        yield absent, "no"
