"""What an inspection page marks in a text: the words that the other text does not have, and masked spans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

_MAX_COMPARISONS = 4_000_000
"""Words of one text times words of the other; above it, nothing is compared (2,000 words each take a second)."""

# Chinese and Japanese put no space between words: there every character is one.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['\u2019-][^\W{_UNSPACED}]+)*|[^\w\s]")


class Range(NamedTuple):
    """A piece of a text.

    Args:
        start: index of its first character.
        end: index behind its last character.
    """

    start: int
    end: int


class Segment(NamedTuple):
    """A piece of a text that is marked the same throughout.

    Args:
        text: the piece.
        differs: 1 where the other text does not have it, else 0.
        span: position of the masked span that it belongs to; -1 where it is not masked.
    """

    text: str
    differs: int
    span: int


def differing(first: str, second: str) -> tuple[list[Range], list[Range]]:
    """Which words each text has that the other has not, in order; differences of white space alone are not counted.

    Args:
        first: a text.
        second: another text.

    Returns:
        Ranges of ``first`` and ranges of ``second``. All of both, if they are too long to compare (more than 2,000
        words each).

    Example:
        >>> ours, theirs = differing("a red bus at noon .", "a red cat .")
        >>> [(start, end) for start, end in ours], ["a red cat ."[start:end] for start, end in theirs]
        ([(6, 17)], ['cat'])
    """
    ours, theirs = list(_WORD.finditer(first)), list(_WORD.finditer(second))
    if len(ours) * len(theirs) > _MAX_COMPARISONS:
        return ([Range(0, len(first))], [Range(0, len(second))]) if first != second else ([], [])
    words = [match.group() for match in ours], [match.group() for match in theirs]
    opcodes = SequenceMatcher(None, *words, autojunk=False).get_opcodes()
    changes = [code[1:] for code in opcodes if code[0] != "equal"]
    return (
        [Range(ours[start].start(), ours[end - 1].end()) for start, end, _, _ in changes if start < end],
        [Range(theirs[start].start(), theirs[end - 1].end()) for _, _, start, end in changes if start < end],
    )


def segments(text: str, differences: Sequence[Range], spans: Sequence[Range] = ()) -> list[Segment]:
    """Cut a text wherever a mark begins or ends.

    Args:
        text: a text.
        differences: ranges of it that differ.
        spans: masked ranges of it.

    Returns:
        Pieces that make up the text when joined.

    Example:
        >>> [tuple(piece) for piece in segments("a red bus", [Range(2, 9)], [Range(6, 9)])]
        [('a ', 0, -1), ('red ', 1, -1), ('bus', 1, 0)]
    """
    cuts = {0, len(text)}.union(*differences, *spans)
    edges = sorted(cut for cut in cuts if cut <= len(text))
    return [
        Segment(text[start:end], int(_position(start, differences) >= 0), _position(start, spans))
        for start, end in pairwise(edges)
    ]


def _position(index: int, ranges: Sequence[Range]) -> int:
    """Position of the first range that holds a character; -1 if none does."""
    holding = (number for number, (start, end) in enumerate(ranges) if start <= index < end)
    return next(holding, -1)
