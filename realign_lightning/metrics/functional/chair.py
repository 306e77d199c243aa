"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): which objects of a caption are not in the image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign_lightning.metrics.functional.captions import CaptionCheck, CaptionParser, ChairNormalizer
from realign_lightning.metrics.functional.checks import check_texts, ratio
from realign_lightning.metrics.functional.coco import CocoObjects
from realign_lightning.metrics.lexicon import Lexicon

__all__ = [
    "CaptionCheck",
    "CaptionParser",
    "ChairNormalizer",
    "chair",
    "chair_captions",
    "chair_counts",
    "ground_truth",
    "highlight",
]

Targets = Sequence[Collection[str]] | Sequence[int | str]
"""The categories of each image, or image ids that an index knows."""


def chair_counts(
    preds: Sequence[str],
    target: Targets,
    normalizer: ChairNormalizer | CaptionParser = "original",
    synonyms: Lexicon | str | Path | None = None,
    *,
    ground_truth: Mapping[Any, Collection[str]] | None = None,
    objects: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """What CHAIR is computed from, one row per caption; rows add up to the counts of a set.

    Args:
        preds: captions.
        target: the categories of each image, or image ids when ``ground_truth`` is given.
        normalizer: how words are normalised, or a parser that is used again and again.
        synonyms: the names of the objects, or None for our list of the 80 COCO categories; part of the parser, if that
            is given.
        ground_truth: the categories of each image id, as :class:`~realign_lightning.metrics.CocoObjects`.
        objects: what a judge extracted from each caption, for ``objhal`` alone: normalised words that are looked up as
            they stand (:meth:`CaptionParser.object_words` makes them). The captions are then used for their length.

    Returns:
        int64, shape (N, 7), or (N, 8) with ``objhal``. Columns: captions (1); captions with a hallucinated mention;
        mentions of an object; hallucinated mentions; categories of the image; those of them that the caption mentions;
        length; with ``objhal`` also captions with any mention. The length is the number of words after phrases are
        joined, punctuation included; with ``objhal`` the number of pieces between single blanks.

    Raises:
        ValueError: if lengths differ, or a target or an extracted object is not of the form above.
        KeyError: if ``ground_truth`` does not know an image id.

    >>> chair_counts(["A dog and a cat.", "A horse."], [{"dog", "person"}, {"horse"}])
    tensor([[1, 1, 2, 1, 2, 1, 6],
            [1, 0, 1, 0, 1, 1, 3]])
    """
    parser = _parser(normalizer, synonyms)
    target = _checked(preds, target, parser, ground_truth, objects)
    extracted: Sequence[Sequence[str] | None] = [None] * len(preds) if objects is None else objects
    rows = [parser.count(*example) for example in zip(preds, target, extracted, strict=True)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, count_columns(parser))


def count_columns(parser: CaptionParser) -> int:
    """Columns of :func:`chair_counts`.

    Args:
        parser: the parser whose captions are counted.
    """
    return 8 if parser.normalizer == "objhal" else 7


def _parser(normalizer: ChairNormalizer | CaptionParser, synonyms: Lexicon | str | Path | None) -> CaptionParser:
    if not isinstance(normalizer, CaptionParser):
        return CaptionParser(synonyms, normalizer)
    if synonyms is not None:
        raise ValueError("Expected `synonyms` to be None beside a parser, which has its own: leave it out.")
    return normalizer


def _checked(
    preds: Sequence[str],
    target: Targets,
    parser: CaptionParser,
    index: Mapping[Any, Collection[str]] | None,
    objects: Sequence[Sequence[str]] | None,
) -> list[Collection[str]]:
    """The categories of each image, after everything that comes in has been checked."""
    check_texts(preds, target)
    if objects is not None:
        _check_objects(preds, objects, parser)
    if isinstance(index, CocoObjects):
        index.check_parser(parser)
    known = frozenset(parser.lexicon.categories)
    found: list[Any] = list(target)
    if index is not None:
        found = [_image_objects(index, image, i) for i, image in enumerate(target)]
    for i, categories in enumerate(found):
        _check_categories(categories, known, i)
    return found


def _check_objects(preds: Sequence[str], objects: Sequence[Sequence[str]], parser: CaptionParser) -> None:
    if parser.normalizer != "objhal":
        raise ValueError(f"Expected `objects` with the normalizer 'objhal' alone, got {parser.normalizer!r}.")
    if isinstance(objects, str) or not isinstance(objects, Sequence) or len(objects) != len(preds):
        raise ValueError(f"Expected `objects` to be a list of {len(preds)} lists, one per caption.")
    for i, words in enumerate(objects):
        is_list = isinstance(words, Sequence) and not isinstance(words, str)
        if not is_list or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"Expected `objects` to hold lists of words, got {words!r} at index {i}; "
                "leave out the captions for which the judge gave no list."
            )


def _image_objects(index: Mapping[Any, Collection[str]], image: Any, position: int) -> Collection[str]:
    if not isinstance(image, int | str):
        raise ValueError(
            f"Expected `target` to hold image ids beside `ground_truth`, got {image!r} at index {position}."
        )
    if image not in index:
        raise KeyError(
            f"`ground_truth` knows {len(index)} images, but not {image!r} (index {position} of `target`); "
            "build it from the annotations that hold this image."
        )
    return index[image]


def _check_categories(categories: Any, known: frozenset[str], position: int) -> None:
    if isinstance(categories, set | frozenset) and categories <= known:
        return
    if isinstance(categories, int):
        raise ValueError(f"Expected `ground_truth` beside image ids, got the id {categories} at index {position}.")
    if isinstance(categories, str) or not isinstance(categories, Collection):
        raise ValueError(
            f"Expected `target` to hold sets of categories, got {categories!r} at index {position}; "
            "image ids need `ground_truth`."
        )
    if unknown := [name for name in categories if not isinstance(name, str) or name not in known]:
        raise ValueError(
            f"Expected `target` to hold categories of the lexicon, got {sorted(unknown, key=str)} at index {position}; "
            "`Lexicon.category` gives the category of a synonym."
        )


def _chair_compute(counts: Tensor) -> dict[str, Tensor]:
    """Finish the counts of :func:`chair_counts`.

    Args:
        counts: summed rows, shape (..., 7) or (..., 8).
    """
    captions, hallucinating, mentions, hallucinated, targets, recalled, length, *mentioning = counts.unbind(-1)
    scores = {
        "chair_s": ratio(hallucinating, captions),
        "chair_i": ratio(hallucinated, mentions),
        "recall": ratio(recalled, targets),
        "mean_length": ratio(length, captions),
    }
    if mentioning:
        scores["chair_s_refine"] = ratio(hallucinating, mentioning[0])
    return scores


def chair(
    preds: Sequence[str],
    target: Targets,
    normalizer: ChairNormalizer | CaptionParser = "original",
    synonyms: Lexicon | str | Path | None = None,
    *,
    ground_truth: Mapping[Any, Collection[str]] | None = None,
    objects: Sequence[Sequence[str]] | None = None,
) -> dict[str, Tensor]:
    """CHAIR's scores of a set of captions; see :class:`~realign_lightning.metrics.CHAIR`.

    Args:
        preds: captions.
        target: the categories of each image, which :func:`ground_truth` makes, or image ids when ``ground_truth`` is
            given.
        normalizer: how words are normalised, or a parser.
        synonyms: the names of the objects, or None for our list of the 80 COCO categories.
        ground_truth: the categories of each image id.
        objects: what a judge extracted from each caption; see :func:`chair_counts`.

    Returns:
        chair_s (share of captions with a hallucinated mention), chair_i (share of mentions that are hallucinated),
        recall (share of the images' categories that their captions mention) and mean_length (see
        :func:`chair_counts`), each a scalar; 0 where a denominator is 0. With ``objhal`` also chair_s_refine: captions
        with a hallucinated mention / captions with any mention.

    Raises:
        ValueError: as :func:`chair_counts`, or if the normaliser is unknown.
        KeyError: if ``ground_truth`` does not know an image id.

    >>> scores = chair(["A dog and a cat.", "A horse."], [{"dog", "person"}, {"horse"}])
    >>> {name: round(value.item(), 2) for name, value in scores.items()}
    {'chair_s': 0.5, 'chair_i': 0.33, 'recall': 0.67, 'mean_length': 4.5}
    """
    counts = chair_counts(preds, target, normalizer, synonyms, ground_truth=ground_truth, objects=objects)
    return _chair_compute(counts.sum(0))


def chair_captions(
    preds: Sequence[str],
    target: Targets,
    normalizer: ChairNormalizer | CaptionParser = "original",
    synonyms: Lexicon | str | Path | None = None,
    *,
    ground_truth: Mapping[Any, Collection[str]] | None = None,
    objects: Sequence[Sequence[str]] | None = None,
) -> list[CaptionCheck]:
    """What CHAIR sees in each caption, for showing.

    Args:
        preds: captions.
        target: the categories of each image, or image ids.
        normalizer: how words are normalised, or a parser.
        synonyms: the names of the objects, or None for our list of the 80 COCO categories.
        ground_truth: the categories of each image id.
        objects: what a judge extracted from each caption.

    Raises:
        ValueError: as :func:`chair`.
        KeyError: as :func:`chair`.

    >>> chair_captions(["A dog and a wine glass."], [{"dog"}])[0].hallucinated
    (Mention(word='wine glass', category='wine glass', position=4, start=12, end=22),)
    """
    parser = _parser(normalizer, synonyms)
    target = _checked(preds, target, parser, ground_truth, objects)
    extracted: Sequence[Sequence[str] | None] = [None] * len(preds) if objects is None else objects
    return [parser.check(*example) for example in zip(preds, target, extracted, strict=True)]


def highlight(caption: str, check: CaptionCheck, before: str = "[[", after: str = "]]") -> str:
    """The caption with its hallucinated mentions marked.

    Args:
        caption: the text that was checked.
        check: what :func:`chair_captions` says of it.
        before: what is put before a mention.
        after: what is put after it.

    Raises:
        ValueError: if a judge extracted the objects, so that they have no place in the caption.

    >>> caption = "A dog and two Wine Glasses."
    >>> highlight(caption, chair_captions([caption], [{"dog"}])[0])
    'A dog and two [[Wine Glasses]].'
    """
    marked = caption
    for mention in reversed(check.hallucinated):
        if mention.end < 0:
            raise ValueError(f"Expected `check` of the caption's own words, got {mention.word!r} from a judge's list.")
        read = caption[mention.start : mention.end]
        marked = f"{marked[: mention.start]}{before}{read}{after}{marked[mention.end :]}"
    return marked


def ground_truth(
    instances: Iterable[str],
    captions: Iterable[str],
    lexicon: Lexicon | str | Path | None = None,
    normalizer: ChairNormalizer = "original",
) -> set[str]:
    """The objects of an image as CHAIR defines them: annotated instances and what reference captions mention.

    Args:
        instances: category of every annotated instance, or another listed name of it.
        captions: reference captions of the image.
        lexicon: the names of the objects, or None for our list of the 80 COCO categories.
        normalizer: how words are normalised.

    Returns:
        Categories, a target of :func:`chair`. For many images see :class:`~realign_lightning.metrics.CocoObjects`.

    Raises:
        KeyError: if the lexicon does not list an instance.

    >>> sorted(ground_truth(["dog"], ["A puppy waits for its owner beside a sofa."]))
    ['couch', 'dog']
    """
    parser = CaptionParser(lexicon, normalizer)
    annotated = {parser.lexicon.category(name) for name in instances}
    return annotated.union(*(parser.categories(caption) for caption in captions))
