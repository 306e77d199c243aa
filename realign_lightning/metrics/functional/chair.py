"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): which objects of a caption are not in the image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from realign_lightning.metrics.functional.checks import check_texts, ratio
from realign_lightning.metrics.functional.singularize import singularize
from realign_lightning.metrics.functional.words import chunk_tokens, chunks
from realign_lightning.metrics.lexicon import Lexicon

ChairNormalizer = Literal["original"]
"""How the words of a caption are brought to the form in which they are looked up: ``original`` is the published rule,
a singular of every token."""


@lru_cache(maxsize=2**16)
def _singular_tokens(chunk: str, ends_sentence: bool) -> tuple[str, ...]:
    return tuple(singularize(token) for token in chunk_tokens(chunk, ends_sentence))


def original_words(text: str) -> list[str]:
    """Tokens of the lower-cased text, each in the singular, as LisaAnne/Hallucination has them.

    Args:
        text: a caption.

    Returns:
        The tokens, punctuation included.

    >>> original_words("Two buses and a bus.")
    ['two', 'bus', 'and', 'a', 'bu', '.']
    """
    return [token for chunk, ends_sentence in chunks(text) for token in _singular_tokens(chunk, ends_sentence)]


NORMALIZERS: Mapping[ChairNormalizer, Callable[[str], list[str]]] = {"original": original_words}
"""The function behind each name: caption to normalised tokens."""


class Mention(NamedTuple):
    """An object that a caption names.

    Attributes:
        word: the normalised word or phrase.
        category: the category it belongs to.
        position: index of its first token among the caption's tokens, before phrases are joined.
    """

    word: str
    category: str
    position: int


class CaptionObjects(NamedTuple):
    """The objects of one caption.

    Attributes:
        words: normalised words, phrases joined, punctuation included.
        mentions: the words that name an object, in their order.
    """

    words: tuple[str, ...]
    mentions: tuple[Mention, ...]


class CaptionCheck(NamedTuple):
    """One caption against the objects of its image.

    Attributes:
        words: normalised words, phrases joined, punctuation included.
        mentions: the words that name an object, in their order.
        hallucinated: the mentions whose category is not in the image.
        recalled: the categories of the image that the caption mentions.
        target: the categories of the image.
    """

    words: tuple[str, ...]
    mentions: tuple[Mention, ...]
    hallucinated: tuple[Mention, ...]
    recalled: frozenset[str]
    target: frozenset[str]


class CaptionParser:
    """Finds the objects of captions, as CHAIR defines it.

    The caption is cut into lower-case tokens, each token is normalised, phrases are joined from left to right, words
    that the lexicon suppresses are dropped, and what is left is looked up.

    Args:
        synonyms: the names of the objects: a :class:`~realign_lightning.metrics.Lexicon`, the path of a list in the
            form of the official ``synonyms.txt``, or None for our list of the 80 COCO categories.
        normalizer: how words are normalised.

    Raises:
        ValueError: if the normaliser is unknown, or names of two categories have the same normal form.

    >>> CaptionParser().parse("A man rides two horses.").mentions
    (Mention(word='man', category='person', position=1), Mention(word='horse', category='horse', position=4))
    """

    def __init__(self, synonyms: Lexicon | str | Path | None = None, normalizer: ChairNormalizer = "original") -> None:
        if normalizer not in NORMALIZERS:
            raise ValueError(f"Expected `normalizer` to be one of {tuple(NORMALIZERS)}, got {normalizer!r}.")
        self.normalizer: ChairNormalizer = normalizer
        if synonyms is None:
            synonyms = Lexicon.coco()
        self.lexicon = synonyms if isinstance(synonyms, Lexicon) else Lexicon.from_file(synonyms)
        if self.lexicon.compounds is None:
            self._categories = self._normalized_names()
            self._compounds = {name: name for name in self._categories if " " in name}
        else:
            self._categories = self.lexicon.synonyms
            self._compounds = self.lexicon.compounds
        self._longest: dict[str, int] = {}
        for phrase in self._compounds:
            first, *rest = phrase.split(" ")
            self._longest[first] = max(self._longest.get(first, 0), 1 + len(rest))

    def _normalized_names(self) -> dict[str, str]:
        origins: dict[str, str] = {}
        for name, category in self.lexicon.synonyms.items():
            normalized = " ".join(NORMALIZERS[self.normalizer](name))
            origin = origins.setdefault(normalized, name)
            if self.lexicon.synonyms[origin] != category:
                raise ValueError(
                    f"The normaliser {self.normalizer!r} reads {origin!r} and {name!r} both as {normalized!r}, but "
                    f"they belong to {self.lexicon.synonyms[origin]!r} and {category!r}: leave one of them out."
                )
        return {normalized: self.lexicon.synonyms[name] for normalized, name in origins.items()}

    def parse(self, caption: str) -> CaptionObjects:
        """The words and objects of one caption.

        Args:
            caption: the text.
        """
        words, starts = self._join(NORMALIZERS[self.normalizer](caption))
        dropped = {word for word, other in self.lexicon.suppressed.items() if word in words and other in words}
        mentions = tuple(
            Mention(word, self._categories[word], start)
            for word, start in zip(words, starts, strict=True)
            if word in self._categories and word not in dropped
        )
        return CaptionObjects(tuple(words), mentions)

    def _join(self, tokens: Sequence[str]) -> tuple[list[str], list[int]]:
        """Tokens with phrases joined, and the index of the first token of each."""
        words: list[str] = []
        starts: list[int] = []
        start = 0
        while start < len(tokens):
            word, size = tokens[start], 1
            if word in self._longest:
                word, size = self._longest_phrase(tokens, start)
            words.append(word)
            starts.append(start)
            start += size
        return words, starts

    def _longest_phrase(self, tokens: Sequence[str], start: int) -> tuple[str, int]:
        """The word that the longest phrase at ``start`` is read as, and its number of tokens."""
        for size in range(self._longest[tokens[start]], 1, -1):
            phrase = " ".join(tokens[start : start + size])
            if phrase in self._compounds:
                return self._compounds[phrase], size
        return tokens[start], 1

    def check(self, caption: str, target: Collection[str]) -> CaptionCheck:
        """One caption against the objects of its image.

        Args:
            caption: the text.
            target: the categories of the image.
        """
        words, mentions = self.parse(caption)
        wanted = frozenset(target)
        return CaptionCheck(
            words=words,
            mentions=mentions,
            hallucinated=tuple(mention for mention in mentions if mention.category not in wanted),
            recalled=wanted.intersection(mention.category for mention in mentions),
            target=wanted,
        )

    def check_all(self, preds: Sequence[str], target: Sequence[Collection[str]]) -> list[CaptionCheck]:
        """Captions against the objects of their images.

        Args:
            preds: captions.
            target: the categories of each image.

        Raises:
            ValueError: if the lengths differ, a target is a text, or holds what is no category of the lexicon.
        """
        check_texts(preds, target)
        known = frozenset(self.lexicon.categories)
        for index, categories in enumerate(target):
            if isinstance(categories, str):
                raise ValueError(f"Expected `target` to hold sets of categories, got {categories!r} at index {index}.")
            if unknown := sorted(set(categories) - known):
                raise ValueError(
                    f"Expected `target` to hold categories of the lexicon, got {unknown} at index {index}; "
                    "`Lexicon.category` gives the category of a synonym."
                )
        return [self.check(caption, categories) for caption, categories in zip(preds, target, strict=True)]


class ChairCounts(NamedTuple):
    """What CHAIR is computed from; counts of several batches add up.

    Attributes:
        captions: captions.
        hallucinated_captions: captions with a hallucinated mention.
        mentions: mentions of an object.
        hallucinated_mentions: mentions of an object that is not in the image.
        targets: distinct categories of the images, summed over captions.
        recalled: those of them that the caption mentions.
        words: words, counted after phrases are joined, punctuation included.
    """

    captions: int
    hallucinated_captions: int
    mentions: int
    hallucinated_mentions: int
    targets: int
    recalled: int
    words: int


def _chair_update(preds: Sequence[str], target: Sequence[Collection[str]], parser: CaptionParser) -> ChairCounts:
    """Count mentions."""
    checks = parser.check_all(preds, target)
    return ChairCounts(
        captions=len(checks),
        hallucinated_captions=sum(bool(check.hallucinated) for check in checks),
        mentions=sum(len(check.mentions) for check in checks),
        hallucinated_mentions=sum(len(check.hallucinated) for check in checks),
        targets=sum(len(check.target) for check in checks),
        recalled=sum(len(check.recalled) for check in checks),
        words=sum(len(check.words) for check in checks),
    )


def _chair_compute(
    captions: Tensor,
    hallucinated_captions: Tensor,
    mentions: Tensor,
    hallucinated_mentions: Tensor,
    targets: Tensor,
    recalled: Tensor,
    words: Tensor,
) -> dict[str, Tensor]:
    """Finish the counts of :func:`_chair_update`."""
    return {
        "chair_s": ratio(hallucinated_captions, captions),
        "chair_i": ratio(hallucinated_mentions, mentions),
        "recall": ratio(recalled, targets),
        "mean_length": ratio(words, captions),
    }


def chair(
    preds: Sequence[str],
    target: Sequence[Collection[str]],
    normalizer: ChairNormalizer = "original",
    synonyms: Lexicon | str | Path | None = None,
) -> dict[str, Tensor]:
    """CHAIR's scores of a set of captions; see :class:`~realign_lightning.metrics.CHAIR`.

    Args:
        preds: captions.
        target: the categories of each image; :func:`ground_truth` makes them.
        normalizer: how words are normalised.
        synonyms: the names of the objects, or None for our list of the 80 COCO categories.

    Returns:
        chair_s (share of captions with a hallucinated mention), chair_i (share of mentions that are hallucinated),
        recall (share of the images' categories that their captions mention) and mean_length (words per caption, after
        phrases are joined, punctuation included), each a scalar; 0 where a denominator is 0.

    Raises:
        ValueError: if the lengths differ, a target holds what is no category, or the normaliser is unknown.

    >>> scores = chair(["A dog and a cat.", "A horse."], [{"dog", "person"}, {"horse"}])
    >>> {name: round(value.item(), 2) for name, value in scores.items()}
    {'chair_s': 0.5, 'chair_i': 0.33, 'recall': 0.67, 'mean_length': 4.5}
    """
    counts = _chair_update(preds, target, CaptionParser(synonyms, normalizer))
    return _chair_compute(*(torch.tensor(count) for count in counts))


def chair_captions(
    preds: Sequence[str],
    target: Sequence[Collection[str]],
    normalizer: ChairNormalizer = "original",
    synonyms: Lexicon | str | Path | None = None,
) -> list[CaptionCheck]:
    """What CHAIR sees in each caption, for showing.

    Args:
        preds: captions.
        target: the categories of each image.
        normalizer: how words are normalised.
        synonyms: the names of the objects, or None for our list of the 80 COCO categories.

    Raises:
        ValueError: as :func:`chair`.

    >>> chair_captions(["A dog and a wine glass."], [{"dog"}])[0].hallucinated
    (Mention(word='wine glass', category='wine glass', position=4),)
    """
    return CaptionParser(synonyms, normalizer).check_all(preds, target)


def ground_truth(
    instances: Iterable[str],
    captions: Iterable[str],
    lexicon: Lexicon | None = None,
    normalizer: ChairNormalizer = "original",
) -> set[str]:
    """The objects of an image as CHAIR defines them: annotated instances and what reference captions mention.

    Args:
        instances: category of every annotated instance, or another listed name of it.
        captions: reference captions of the image.
        lexicon: the names of the objects, or None for our list of the 80 COCO categories.
        normalizer: how words are normalised.

    Returns:
        Categories, a target of :func:`chair`.

    Raises:
        KeyError: if the lexicon does not list an instance.

    >>> sorted(ground_truth(["dog"], ["A puppy waits for its owner beside a sofa."]))
    ['couch', 'dog']
    """
    parser = CaptionParser(lexicon, normalizer)
    mentioned = {mention.category for caption in captions for mention in parser.parse(caption).mentions}
    return {parser.lexicon.category(name) for name in instances} | mentioned
