"""The word lists behind :class:`~realign_lightning.preferences.LexiconMasker`, and how words are looked up in them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cache
from importlib.resources import files

from realign_lightning.metrics.functional.singularize import singularize
from realign_lightning.metrics.lexicon import Lexicon

_FILES = {"objects.txt": "object", "attributes.txt": "attribute", "counts.txt": "count", "relations.txt": "relation"}
_NOUN = frozenset({"object", "object*"})


class Vocabulary:
    """Words and phrases with their classes.

    A class is the kind of a list (``object``, ``attribute``, ``count``), with a star where the list has one, or the
    section of ``relations.txt``. A word may belong to several: ``orange`` is an object and an attribute.

    Attributes:
        longest: the most words of any phrase that begins with a word.
    """

    def __init__(self) -> None:
        self.longest: dict[str, int] = defaultdict(lambda: 1)
        self._classes: dict[str, set[str]] = defaultdict(set)
        lexicon = Lexicon.coco()
        for name in (*lexicon.synonyms, *(lexicon.compounds or ())):
            self._add(name, "object")
        for file, kind in _FILES.items():
            self._add_file(file, kind)

    def _add_file(self, file: str, kind: str) -> None:
        for section, names in _sections(file, kind).items():
            for name in names:
                self._add(name.removesuffix("*"), section + "*" if name.endswith("*") else section)

    def _add(self, name: str, cls: str) -> None:
        first, *rest = name.split(" ")
        self.longest[first] = max(self.longest[first], 1 + len(rest))
        self._classes[name].add(cls)

    def classes(self, phrase: str) -> frozenset[str]:
        """The classes of a word or phrase, also as a plural or with hyphens; none for unknown ones.

        Args:
            phrase: lower case, one blank between words.
        """
        found = set(self._classes.get(phrase, ()))
        for singular in {phrase.removesuffix("s"), _singular(phrase)} - {phrase}:
            found |= self._classes.get(singular, set()) & _NOUN
        if not found and "-" in phrase and " " not in phrase:
            return self._hyphenated(phrase)
        return frozenset(found)

    def _hyphenated(self, word: str) -> frozenset[str]:
        """Classes of a compound that is not listed with its hyphens: those of its parts."""
        if found := self.classes(word.replace("-", " ")):
            return found
        parts = word.split("-")
        colours = all("attribute" in self._classes.get(part, ()) for part in parts if part != "and")
        counted = parts[0].isdigit() or "count" in self._classes.get(parts[0], ())
        if parts[-1] in word_set("property endings") or colours or counted:
            return frozenset({"attribute"})
        return self.classes(parts[-1]) & _NOUN


def _singular(phrase: str) -> str:
    *rest, last = phrase.split(" ")
    return " ".join([*rest, singularize(last)])


def _sections(file: str, section: str) -> dict[str, list[str]]:
    """Names of a list by section; those before the first heading belong to ``section``."""
    sections: dict[str, list[str]] = defaultdict(list)
    for line in _read(file).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            sections[section] += [name.strip() for name in line.split(",")]
    return dict(sections)


def _read(file: str) -> str:
    return files("realign_lightning.preferences").joinpath("lexicons", file).read_text(encoding="utf-8")


@cache
def vocabulary() -> Vocabulary:
    """The built-in lists, read once."""
    return Vocabulary()


@cache
def _grammar() -> dict[str, list[str]]:
    return _sections("grammar.txt", "")


def word_set(section: str) -> frozenset[str]:
    """The words of a section of ``grammar.txt``.

    Args:
        section: its heading.
    """
    return frozenset(_grammar()[section])


@cache
def lists_sha256() -> str:
    """A checksum of the built-in lists of this package, in hexadecimal digits."""
    names = "\n".join(sorted(Lexicon.coco().synonyms))
    return hashlib.sha256("\n".join([names, *map(_read, (*_FILES, "grammar.txt"))]).encode()).hexdigest()
