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

PopeParser = Literal["official", "opera", "vcd", "lmms_eval", "vlmevalkit"]
"""How an answer is read, by the project whose evaluation does so:

* ``official``: AoiDragon/POPE, ``evaluate.py``; LLaVA, LLaVA-RLHF and Re-Align use the same rule;
* ``opera``: shikiw/OPERA, ``pope_eval.py``;
* ``vcd``: DAMO-NLP-SG/VCD, ``experiments/eval/eval_pope.py``;
* ``lmms_eval``: EvolvingLMMs-Lab/lmms-eval, task ``pope``;
* ``vlmevalkit``: open-compass/VLMEvalKit, its yes-or-no datasets without a judge.
"""

PopeKind = Literal["random", "popular", "adversarial"]
"""Which absent objects are asked for."""


class Verdict(IntEnum):
    """What a parser makes of an answer."""

    NO = 0
    YES = 1
    UNKNOWN = 2


_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)


def says_yes_or_no(answer: str) -> bool:
    """Whether "yes" or "no" occurs as a word, in any case; where neither does, a rule that reads every text guesses.

    Args:
        answer: the generated text.

    >>> says_yes_or_no("NO!"), says_yes_or_no("I know."), says_yes_or_no("")
    (True, False, False)
    """
    return _YES_OR_NO.search(answer) is not None


def official_verdict(answer: str, label: str = "") -> Verdict:
    """Read an answer as POPE's ``evaluate.py`` does.

    The text before the first period loses its commas and is split at single blanks; it means no if one of the words is
    exactly "No", "no" or "not", and yes otherwise. So "NO", "no!", "isn't" and an empty answer all mean yes.

    Args:
        answer: the generated text.
        label: the right answer. Only ``vcd`` looks at it.

    Returns:
        ``YES`` or ``NO``.

    >>> official_verdict("There is no dog, sadly.").name, official_verdict("NO").name
    ('NO', 'YES')
    """
    del label
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return Verdict.NO if "No" in words or "not" in words or "no" in words else Verdict.YES


def opera_verdict(answer: str, label: str = "") -> Verdict:
    """Read an answer as OPERA's ``pope_eval.py`` does.

    The whole text loses its periods and commas and is split at single blanks; it means no if a word is exactly "No",
    "no", "NO" or "not", or ends in "n't", and yes otherwise.

    Args:
        answer: the generated text.
        label: the right answer. Only ``vcd`` looks at it.

    Returns:
        ``YES`` or ``NO``.

    >>> opera_verdict("It is a street. There isn't a car.").name, opera_verdict("no!").name
    ('NO', 'YES')
    """
    del label
    words = answer.replace(".", "").replace(",", "").split(" ")
    is_no = not _OPERA_NO.isdisjoint(words) or any(word.endswith("n't") for word in words)
    return Verdict.NO if is_no else Verdict.YES


def vcd_verdict(answer: str, label: str) -> Verdict:
    """Read an answer as VCD's ``eval_pope.py`` does, which looks only for the right answer.

    Where the label is yes, the answer means yes if the lower-cased text holds "yes" anywhere; where it is no, the
    answer means no if the text holds "no" anywhere, as "know" and "another" do. Anything else is the wrong answer.

    Args:
        answer: the generated text.
        label: the right answer, "yes" or "no".

    Returns:
        ``YES`` or ``NO``.

    >>> vcd_verdict("I know.", "no").name, vcd_verdict("I know.", "yes").name, vcd_verdict("Absent.", "no").name
    ('NO', 'NO', 'YES')
    """
    is_right = label in answer.lower()
    return Verdict.YES if is_right is (label == "yes") else Verdict.NO


def lmms_eval_verdict(answer: str, label: str = "") -> Verdict:
    """Read an answer as lmms-eval's task ``pope`` does: the lower-cased, trimmed text must be exactly "yes" or "no".

    Args:
        answer: the generated text.
        label: the right answer. Only ``vcd`` looks at it.

    Returns:
        ``YES``, ``NO``, or ``UNKNOWN`` for any other text.

    >>> lmms_eval_verdict(" YES ").name, lmms_eval_verdict("Yes.").name
    ('YES', 'UNKNOWN')
    """
    del label
    return _LMMS_EVAL.get(answer.lower().strip(), Verdict.UNKNOWN)


def vlmevalkit_verdict(answer: str, label: str = "") -> Verdict:
    """Read an answer as VLMEvalKit's exact matching does: one of the words yes and no must occur, and the other not.

    Words are those of the lower-cased text without punctuation. A mark that has a blank beside it anywhere in the text
    is deleted, any other becomes a blank; all are deleted if a comma stands between digits. Periods go unless a digit
    is beside them, and colons and apostrophes stay, so "no-one" holds the word no, and "no:" does not.

    Args:
        answer: the generated text.
        label: the right answer. Only ``vcd`` looks at it.

    Returns:
        ``YES``, ``NO``, or ``UNKNOWN`` where neither word occurs, or both do.

    >>> [vlmevalkit_verdict(answer).name for answer in ("There is no dog.", "It is absent.", "Yes and no.")]
    ['NO', 'UNKNOWN', 'UNKNOWN']
    """
    del label
    words = _without_punctuation(answer.lower()).split()
    if ("yes" in words) is ("no" in words):
        return Verdict.UNKNOWN
    return Verdict.YES if "yes" in words else Verdict.NO


def _without_punctuation(text: str) -> str:
    """VLMEvalKit's ``process_punctuation``."""
    marks = _PUNCTUATION.intersection(text)
    if marks:
        has_number = _COMMA_IN_NUMBER.search(text) is not None
        table = {ord(mark): "" if has_number or f"{mark} " in text or f" {mark}" in text else " " for mark in marks}
        text = text.translate(table)
    return _PERIOD.sub("", text, count=_PERIODS) if "." in text else text


PARSERS: Mapping[PopeParser, Callable[[str, str], Verdict]] = {
    "official": official_verdict,
    "opera": opera_verdict,
    "vcd": vcd_verdict,
    "lmms_eval": lmms_eval_verdict,
    "vlmevalkit": vlmevalkit_verdict,
}
"""The rule behind each name: answer and label to verdict."""

COUNTS = (
    *("no_read_as_no", "no_read_as_yes", "no_read_as_unknown"),
    *("yes_read_as_no", "yes_read_as_yes", "yes_read_as_unknown"),
    "unparsed",
)
"""Columns of :func:`pope_counts`: label and verdict, and whether the answer is unparsed (see :func:`pope`)."""

_OPERA_NO = frozenset(("No", "not", "no", "NO"))
_LMMS_EVAL = {"yes": Verdict.YES, "no": Verdict.NO}
_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
# The reference passes the flag re.UNICODE, which is 32, where re.sub takes the number of replacements.
_PERIODS = 32
_MAY_NOT_KNOW = ("lmms_eval", "vlmevalkit")
_LABELS = {"no": 0, "yes": 1}


def check_parser(parser: str) -> None:
    """Check the name of a parser.

    Args:
        parser: the name.

    Raises:
        ValueError: if there is no such parser.
    """
    if parser not in PARSERS:
        raise ValueError(f"Expected `parser` to be one of {tuple(PARSERS)}, got {parser!r}.")


def check_category_names(names: Sequence[str]) -> None:
    """Check names of categories.

    Args:
        names: the categories that a row may belong to.

    Raises:
        ValueError: if there are none, one occurs twice, or one is no text, is empty or holds a comma.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"Expected `categories` to be a list of at least one name, got {names!r}.")
    for name in names:
        if not isinstance(name, str) or not name or "," in name:
            raise ValueError(f"Expected `categories` to hold names without a comma, got {name!r}.")
    if len(set(names)) != len(names):
        raise ValueError(f"Expected distinct `categories`, got {tuple(names)}: name each once.")


def _labels(preds: Sequence[str], target: Sequence[str]) -> list[int]:
    """1 for each label "yes", 0 for each "no"; checks answers and labels."""
    check_texts(preds, target)
    try:
        return [_LABELS[label] for label in target]
    except (KeyError, TypeError):
        index = next(place for place, label in enumerate(target) if label not in tuple(_LABELS))
    raise ValueError(
        f"Expected `target` to hold 'yes' and 'no', got {target[index]!r} at index {index}: lower-case and trim the "
        "labels of your file, as in [label.strip().lower() for label in labels]."
    )


def pope_verdicts(preds: Sequence[str], target: Sequence[str], parser: PopeParser = "official") -> list[Verdict]:
    """Each answer as a reference reads it.

    Args:
        preds: answers as generated.
        target: the right answers, "yes" or "no".
        parser: how answers are read.

    Returns:
        The verdicts in the order of the answers.

    Raises:
        ValueError: if the lengths differ, a label is neither "yes" nor "no", or the parser is unknown.

    >>> [verdict.name for verdict in pope_verdicts(["Yes.", "no", "A cat."], ["yes", "no", "no"], "vlmevalkit")]
    ['YES', 'NO', 'UNKNOWN']
    """
    check_parser(parser)
    _labels(preds, target)
    read = PARSERS[parser]
    return [read(answer, label) for answer, label in zip(preds, target, strict=True)]


def pope_counts(preds: Sequence[str], target: Sequence[str], parser: PopeParser = "official") -> Tensor:
    """What each answer adds to the counts that POPE is computed from.

    Args:
        preds: answers as generated.
        target: the right answers, "yes" or "no".
        parser: how answers are read.

    Returns:
        int64, shape (N, 7), of zeros and ones; the columns are :data:`COUNTS`.

    Raises:
        ValueError: if the lengths differ, a label is neither "yes" nor "no", or the parser is unknown.

    >>> pope_counts(["Yes.", "A cat."], ["yes", "no"])
    tensor([[0, 0, 0, 0, 1, 0, 0],
            [0, 1, 0, 0, 0, 0, 1]])
    """
    check_parser(parser)
    labels, read = _labels(preds, target), PARSERS[parser]
    verdicts = [read(answer, label) for answer, label in zip(preds, target, strict=True)]
    if parser in _MAY_NOT_KNOW:
        unparsed = [verdict is Verdict.UNKNOWN for verdict in verdicts]
    else:
        unparsed = [not says_yes_or_no(answer) for answer in preds]
    cells = len(Verdict) * torch.tensor(labels, dtype=torch.long) + torch.tensor(verdicts, dtype=torch.long)
    counts = torch.zeros(len(preds), len(COUNTS), dtype=torch.long).scatter_(1, cells[:, None], 1)
    counts[:, -1] = torch.tensor(unparsed, dtype=torch.long)
    return counts


def category_memberships(categories: Sequence[str], names: Sequence[str], rows: int) -> Tensor:
    """How often each row belongs to each category; VLMEvalKit's comma-joined categories are taken apart.

    Args:
        categories: the category of each row, or several joined by commas without blanks.
        names: the categories that a row may belong to.
        rows: number of rows.

    Returns:
        int64, shape (rows, categories).

    Raises:
        ValueError: if there is not one entry per row, or an entry is no text or holds another category than ``names``.

    >>> category_memberships(["popular", "random,popular"], ["random", "popular"], 2)
    tensor([[0, 1],
            [1, 1]])
    """
    _check_categories(categories, rows)
    parts = {text: text.split(",") for text in dict.fromkeys(categories)}
    for text, found in parts.items():
        if unknown := [part for part in found if part not in names]:
            raise ValueError(
                f"Expected `categories` to hold {tuple(names)}, several joined by commas without blanks, got "
                f"{unknown[0]!r} at index {categories.index(text)}."
            )
    of_text = {text: [found.count(name) for name in names] for text, found in parts.items()}
    return torch.tensor([of_text[text] for text in categories], dtype=torch.long).reshape(rows, len(names))


def _check_categories(categories: Sequence[str], rows: int) -> None:
    if isinstance(categories, str) or not isinstance(categories, Sequence):
        raise ValueError(
            f"Expected `categories` to be a list with one entry per answer, got {type(categories).__name__}."
        )
    if len(categories) != rows:
        raise ValueError(f"Expected `categories` with one entry per answer, got {len(categories)} for {rows} answers.")
    for index, text in enumerate(categories):
        if not isinstance(text, str):
            raise ValueError(f"Expected `categories` to hold texts, got {type(text).__name__} at index {index}.")


def _pope_compute(counts: Tensor, parser: PopeParser) -> dict[str, Tensor]:
    """Scores of summed counts.

    Args:
        counts: sums of rows of :func:`pope_counts`, shape (..., 7).
        parser: how the answers were read.

    Returns:
        The scores of :func:`pope`, each of shape (...).
    """
    no, yes, unparsed = counts[..., :3], counts[..., 3:6], counts[..., 6]
    true_positives, said_yes = yes[..., Verdict.YES], no[..., Verdict.YES] + yes[..., Verdict.YES]
    positives, total = yes.sum(-1), (no + yes).sum(-1)
    # lmms-eval forgets positives that it cannot read, everywhere but in the accuracy.
    wanted = positives - yes[..., Verdict.UNKNOWN] if parser == "lmms_eval" else positives
    scores = {
        "accuracy": ratio(true_positives + no[..., Verdict.NO], total),
        "precision": ratio(true_positives, said_yes),
        "recall": ratio(true_positives, wanted),
        "f1": ratio(2 * true_positives, said_yes + wanted),
        "yes_ratio": ratio(said_yes, total),
        "unparsed": ratio(unparsed, total),
    }
    if parser == "lmms_eval":
        scores["yes_ratio_of_ground_truth"] = ratio(positives, total)
    if parser == "vlmevalkit":
        scores["overall"] = 100 * scores["f1"]
    return scores


def _pope_compute_by_category(counts: Tensor, parser: PopeParser, names: Sequence[str]) -> dict[str, Tensor]:
    """Scores of all rows and of each category.

    Args:
        counts: summed counts of each category, shape (..., categories, 7).
        parser: how the answers were read.
        names: of the categories.

    Returns:
        The scores of :func:`pope`, each of shape (...).
    """
    by_category = _pope_compute(counts, parser)
    apart = {
        f"{name}/{score}": values[..., index]
        for index, name in enumerate(names)
        for score, values in by_category.items()
    }
    # As in VLMEvalKit, a row of several categories counts in the whole as often as in its categories.
    return {**_pope_compute(counts.sum(-2), parser), **apart}


def pope(
    preds: Sequence[str],
    target: Sequence[str],
    parser: PopeParser = "official",
    categories: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """POPE's scores of a set of answers; see :class:`~realign_lightning.metrics.POPE`.

    Args:
        preds: answers as generated.
        target: the right answers, "yes" or "no".
        parser: how answers are read.
        categories: the category of each answer, or several joined by commas. Such an answer counts once for each, in
            the whole, too, as VLMEvalKit has it.

    Returns:
        Scalars, 0 where a denominator is 0; "yes" is positive:

        * accuracy, precision, recall, f1: as the reference defines them. An answer read as unknown is wrong in the
          accuracy; in precision, recall and F1 it is a no (``vlmevalkit``) or left out (``lmms_eval``).
        * yes_ratio: share of answers read as yes.
        * unparsed: share of answers that the parser reads as unknown (``lmms_eval``, ``vlmevalkit``), or in which
          neither "yes" nor "no" occurs as a word, in any case (the others, which read every answer as one of both).
        * yes_ratio_of_ground_truth (``lmms_eval``): share of labels that are yes, which lmms-eval prints as yes ratio.
        * overall (``vlmevalkit``): 100 times F1, its headline.
        * the same for each of the ``categories``, in the order of their first occurrence, as "<category>/<score>".

    Raises:
        ValueError: if the lengths differ, a label is neither "yes" nor "no", a category is empty, or the parser is
            unknown.

    >>> scores = pope(["Yes.", "There is no cat.", "A cat sits there."], ["yes", "no", "no"])
    >>> {name: round(value.item(), 2) for name, value in scores.items()}
    {'accuracy': 0.67, 'precision': 0.5, 'recall': 1.0, 'f1': 0.67, 'yes_ratio': 0.67, 'unparsed': 0.33}
    """
    counts = pope_counts(preds, target, parser)
    if categories is None:
        return _pope_compute(counts.sum(0), parser)
    _check_categories(categories, len(preds))
    names = list(dict.fromkeys(name for text in categories for name in text.split(",") if name))
    memberships = category_memberships(categories, names, len(preds))
    return _pope_compute_by_category(memberships.T @ counts, parser, names)


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
