"""Which objects a caption names, in the three dialects of CHAIR."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from realign_lightning.metrics.functional import wordnet
from realign_lightning.metrics.functional.singularize import singularize
from realign_lightning.metrics.functional.words import chunk_tokens, chunks, token_spans, tokenize
from realign_lightning.metrics.lexicon import Lexicon

ChairNormalizer = Literal["original", "opera", "objhal"]
"""How the words of a caption are brought to the form in which they are looked up:

* ``original``: a singular of every token (LisaAnne/Hallucination, Maxlinn/CHAIR-metric-standalone);
* ``opera``: WordNet's lemma of every token by its part of speech (shikiw/OPERA, lmms-eval); needs NLTK;
* ``objhal``: WordNet's lemma of every token as a noun, and every listed pair of words is one name (the rule path of
  RLHF-V/RLAIF-V's Object HalBench); needs NLTK.
"""

_WORDNET_POS = {"J": "a", "N": "n", "R": "r", "V": "v"}


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


def opera_words(text: str) -> list[str]:
    """Lemma of each token of the lower-cased text, by its part of speech in the text, as OPERA and lmms-eval have them.

    "men" stays, "vases" becomes "vas", and a man who is seated makes a "seat".

    Args:
        text: a caption.

    Returns:
        The lemmas, punctuation included.
    """
    tokens = tokenize(text)
    tags = wordnet.tag(tokens)
    return [wordnet.lemma(token, _WORDNET_POS.get(tag[:1], "n")) for token, tag in zip(tokens, tags, strict=True)]


def noun_words(text: str) -> list[str]:
    """Lemma of each token of the lower-cased text, every one taken as a noun, as Object HalBench has them.

    Args:
        text: a caption.

    Returns:
        The lemmas, punctuation included.
    """
    return [wordnet.lemma(token, "n") for token in tokenize(text)]


def _opera_forms(name: str) -> list[str]:
    """What captions may read a name as: its last word is a noun, but "dining" is tagged noun here and verb there."""
    *qualifiers, head = tokenize(name)
    lemmas = [{wordnet.lemma(token, pos) for pos in _WORDNET_POS.values()} for token in qualifiers]
    return [" ".join(words) for words in product(*lemmas, [wordnet.lemma(head, "n")])]


class _Dialect(NamedTuple):
    """What words of a caption become, the forms of a name of one's own, and the form of a name in CHAIR's list."""

    words: Callable[[str], list[str]]
    forms: Callable[[str], list[str]]
    listed: Callable[[str], str]


_DIALECTS: Mapping[ChairNormalizer, _Dialect] = {
    "original": _Dialect(original_words, lambda name: [" ".join(original_words(name))], str),
    "opera": _Dialect(opera_words, _opera_forms, str),
    "objhal": _Dialect(noun_words, lambda name: [" ".join(noun_words(name))], str.strip),
}


class Mention(NamedTuple):
    """An object that a caption names.

    Attributes:
        word: the normalised word or phrase.
        category: the category it belongs to.
        position: index of its first token among the caption's tokens, before phrases are joined; where a judge
            extracted the objects, index among these.
        start: its first character in the caption, so that ``caption[start:end]`` is what was read.
        end: the character after its last one. Both are -1 where a judge extracted the objects.
    """

    word: str
    category: str
    position: int
    start: int = -1
    end: int = -1


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
        normalizer: how words are normalised; see :data:`ChairNormalizer`.

    Raises:
        ValueError: if the normaliser is unknown, or names of two categories have the same normal form.
        ModuleNotFoundError: if the normaliser needs NLTK and it is not installed.
        LookupError: if the normaliser needs data of NLTK that are not found.

    >>> for mention in CaptionParser().parse("A man rides two horses.").mentions:
    ...     print(mention)
    Mention(word='man', category='person', position=1, start=2, end=5)
    Mention(word='horse', category='horse', position=4, start=16, end=22)
    """

    def __init__(self, synonyms: Lexicon | str | Path | None = None, normalizer: ChairNormalizer = "original") -> None:
        if normalizer not in _DIALECTS:
            raise ValueError(f"Expected `normalizer` to be one of {tuple(_DIALECTS)}, got {normalizer!r}.")
        if normalizer != "original":
            wordnet.require(tagger=normalizer == "opera")
        self.normalizer: ChairNormalizer = normalizer
        if synonyms is None:
            synonyms = Lexicon.coco()
        self.lexicon = synonyms if isinstance(synonyms, Lexicon) else Lexicon.from_file(synonyms)
        self._categories = self._look_up()
        self._compounds = self._joined_phrases()
        self._longest: dict[str, int] = {}
        for phrase in self._compounds:
            first, *rest = phrase.split(" ")
            self._longest[first] = max(self._longest.get(first, 0), 1 + len(rest))

    def _look_up(self) -> dict[str, str]:
        """Category of each normalised name."""
        dialect = _DIALECTS[self.normalizer]
        own = self.lexicon.compounds is None
        origins: dict[str, str] = {}
        for name, category in self.lexicon.synonyms.items():
            for form in dialect.forms(name) if own else [dialect.listed(name)]:
                origin = origins.setdefault(form, name)
                if self.lexicon.synonyms[origin] != category:
                    raise ValueError(
                        f"The normaliser {self.normalizer!r} reads {origin!r} and {name!r} both as {form!r}, but "
                        f"they belong to {self.lexicon.synonyms[origin]!r} and {category!r}: leave one of them out."
                    )
        return {form: self.lexicon.synonyms[name] for form, name in origins.items()}

    def _joined_phrases(self) -> dict[str, str]:
        """The phrases that are joined, and the word each is read as."""
        listed = self.lexicon.compounds
        if listed is None:
            return {name: name for name in self._categories if " " in name}
        if self.normalizer != "objhal":
            return listed
        return {name: name for name in self._categories if name.count(" ") == 1} | listed

    def parse(self, caption: str) -> CaptionObjects:
        """The words and objects of one caption.

        Args:
            caption: the text.
        """
        words, starts = self._read(caption)
        found = self._found(words)
        spans = token_spans(caption) if found else []
        ends = [*starts[1:], len(spans)]
        mentions = (
            Mention(words[i], self._categories[words[i]], starts[i], spans[starts[i]][0], spans[ends[i] - 1][1])
            for i in found
        )
        return CaptionObjects(tuple(words), tuple(mentions))

    def look_up(self, objects: Sequence[str]) -> CaptionObjects:
        """The objects among words that a judge extracted from a caption.

        Args:
            objects: normalised words or phrases, looked up as they stand; :meth:`object_words` normalises them.
        """
        found = self._found(objects)
        return CaptionObjects(
            tuple(objects), tuple(Mention(objects[i], self._categories[objects[i]], i) for i in found)
        )

    def object_words(self, objects: Iterable[str]) -> list[str]:
        """Normalised words of the objects that a judge wrote, each once, as Object HalBench counts them.

        The reference keeps the nouns that spaCy finds; here every word is kept, because the look-up leaves out what is
        no object. They differ in nouns side by side: the reference reads "pickup truck" as one unknown object.

        Args:
            objects: what the judge wrote, as ``["Two wine glasses", "a man"]``.

        Returns:
            What :meth:`look_up` takes.
        """
        return list(dict.fromkeys(word for text in objects for word in self._read(text)[0]))

    def categories(self, caption: str) -> set[str]:
        """The categories that a caption mentions.

        Args:
            caption: the text.
        """
        words, _ = self._read(caption)
        return {self._categories[words[i]] for i in self._found(words)}

    def count(self, caption: str, target: Collection[str], objects: Sequence[str] | None = None) -> tuple[int, ...]:
        """One row of :func:`~realign_lightning.metrics.functional.chair_counts`.

        Args:
            caption: the text.
            target: the categories of the image.
            objects: what a judge extracted from the caption, if not None.
        """
        words = self._read(caption)[0] if objects is None else objects
        mentioned = [self._categories[words[i]] for i in self._found(words)]
        wanted = frozenset(target)
        hallucinated = sum(category not in wanted for category in mentioned)
        counts = (1, int(hallucinated > 0), len(mentioned), hallucinated, len(wanted), len(wanted & set(mentioned)))
        if self.normalizer == "objhal":
            return (*counts, len(caption.strip().split(" ")), int(bool(mentioned)))
        return (*counts, len(words))

    def _read(self, caption: str) -> tuple[list[str], list[int]]:
        """Words with phrases joined, and the index of the first token of each."""
        tokens = _DIALECTS[self.normalizer].words(caption)
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

    def _found(self, words: Sequence[str]) -> list[int]:
        """Indices of the words that name an object and are not suppressed."""
        dropped = {word for word, other in self.lexicon.suppressed.items() if word in words and other in words}
        return [i for i, word in enumerate(words) if word in self._categories and word not in dropped]

    def check(self, caption: str, target: Collection[str], objects: Sequence[str] | None = None) -> CaptionCheck:
        """One caption against the objects of its image.

        Args:
            caption: the text.
            target: the categories of the image.
            objects: what a judge extracted from the caption; None reads the caption itself.
        """
        words, mentions = self.parse(caption) if objects is None else self.look_up(objects)
        wanted = frozenset(target)
        return CaptionCheck(
            words=words,
            mentions=mentions,
            hallucinated=tuple(mention for mention in mentions if mention.category not in wanted),
            recalled=wanted.intersection(mention.category for mention in mentions),
            target=wanted,
        )
