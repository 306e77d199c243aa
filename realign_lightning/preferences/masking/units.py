"""An English answer as a row of words and phrases, each with what the word lists say of it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from realign_lightning.preferences.masking.vocabulary import Vocabulary, vocabulary, word_set

_LETTER = r"(?:[^\W_]|[\u0300-\u036f])"
_APOSTROPHE = "['\u2019]"
_TOKEN = re.compile(
    rf"""
      \d+(?:[.,:/]\d+)*(?:%|[ap]m)?(?!{_LETTER}|[-'\u2019]{_LETTER})  # 3, 1,000, 10:25, 50%, 9am
    | {_LETTER}+(?:[-\u2010\u2011'\u2019]{_LETTER}+)*                       # words, with hyphens and apostrophes
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(rf"(?<=.){_APOSTROPHE}s$")
_NUMBER = re.compile(r"\d[\d.,:/]*(?:%|[ap]m)?")
_BLANK_LINE = re.compile(r"\n\s*\n")

_SIDE_LEADS = word_set("side leads")
_SIDE_ARTICLES = word_set("side articles")
_SIDE_MODIFIERS = word_set("side modifiers")
_SIDES = word_set("sides")
_PARTS = word_set("parts")


class Unit(NamedTuple):
    """A word, phrase or punctuation mark.

    Args:
        start: index of its first character.
        end: index behind its last character.
        text: in lower case, one blank between words, hyphens and apostrophes as on a typewriter.
        classes: what the word lists say of it, see :class:`~.vocabulary.Vocabulary`; ``side`` and ``side of`` for
            phrases such as "on the left" and "on the left side of".
        joined: whether nothing but white space separates it from the unit before.
    """

    start: int
    end: int
    text: str
    classes: frozenset[str]
    joined: bool


class _Token(NamedTuple):
    start: int
    end: int
    text: str
    joined: bool


def units_of(text: str) -> list[Unit]:
    """Cut a text into units, the longest listed phrases first.

    Args:
        text: an English answer.
    """
    tokens = _tokens(text)
    words = vocabulary()
    units = []
    index = 0
    while index < len(tokens):
        run = _joined_run(tokens, index)
        size, classes = _longest(words, run)
        last = tokens[index + size - 1]
        units.append(Unit(tokens[index].start, last.end, " ".join(run[:size]), classes, tokens[index].joined))
        index += size
    return units


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(text):
        clitic = _CLITIC.search(match.group())
        cut = match.start() + clitic.start() if clitic else match.end()
        for start, end in ((match.start(), cut), (cut, match.end())):
            if start < end:
                gap = text[tokens[-1].end : start] if tokens else ""
                joined = bool(tokens) and not gap.strip() and not _BLANK_LINE.search(gap)
                tokens.append(_Token(start, end, _plain(text[start:end]), joined))
    return tokens


def _plain(word: str) -> str:
    lower = unicodedata.normalize("NFC", word.lower())
    return re.sub("[\u2010\u2011]", "-", lower.replace("\u2019", "'"))


def _joined_run(tokens: Sequence[_Token], start: int, most: int = 8) -> list[str]:
    """Texts of the tokens that may make a phrase with the one at ``start``."""
    run = [tokens[start].text]
    for token in tokens[start + 1 : start + most]:
        if not token.joined or not token.text[0].isalnum():
            break
        run.append(token.text)
    return run


def _longest(words: Vocabulary, run: Sequence[str]) -> tuple[int, frozenset[str]]:
    """Size and classes of the longest phrase at the start of a run; a single word where none is listed."""
    side, side_class = _side(run)
    if side_class == "side" and side < len(run) and not words.classes(run[side]).isdisjoint(("object", "object*")):
        side = 0  # "on the right hand"
    for size in range(min(words.longest.get(run[0], 1), len(run)), 0, -1):
        if size < side:
            break
        if classes := words.classes(" ".join(run[:size])):
            return size, classes
    if side:
        return side, frozenset({side_class})
    if _NUMBER.fullmatch(run[0]):
        return 1, frozenset({"count"})
    if amount := _amount(words, run):
        return amount, frozenset({"count"})
    return 1, frozenset()


def _side(run: Sequence[str]) -> tuple[int, str]:
    """Size and class of a phrase such as "on the left side of"; 0 where there is none."""
    if run[0] not in _SIDE_LEADS or len(run) < 3 or run[1] not in _SIDE_ARTICLES:
        return 0, ""
    end = 2
    while end + 1 < len(run) and run[end] in _SIDE_MODIFIERS and run[end + 1] in _SIDE_MODIFIERS | _SIDES | _PARTS:
        end += 1
    if run[end] not in _SIDES | _PARTS:
        return 0, ""
    if run[end + 1 : end + 2] == ["of"]:
        return end + 2, "side of"
    return (end + 1, "side") if run[end] in _SIDES else (0, "")


def _amount(words: Vocabulary, run: Sequence[str]) -> int:
    """Size of an amount that holds an adjective: "a large group of"."""
    without = " ".join([run[0], *run[2:4]])
    return 4 if run[0] == "a" and len(run) > 3 and run[3] == "of" and "count" in words.classes(without) else 0
