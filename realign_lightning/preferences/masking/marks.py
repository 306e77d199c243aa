"""What an engine marked in a response, read from its answer: a JSON list of words, or the response with masks in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from realign_lightning.preferences.masking.base import KINDS, WORD_CHARACTER, MaskError, Span

_MASK = re.compile(r"\[\s*mask(?:ed)?(?:[ _:#-]*\w+)?\s*\]", re.IGNORECASE)
_FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_LABEL = re.compile(r"(?:\w+ ){0,2}(?:answer|response|reply|text|output|result|sentence)\s*:\s*", re.IGNORECASE)
_QUOTES = ('""', "''", "\u201c\u201d", "``")
# Typewriter marks for typographic ones, a character each.
_TYPEWRITER = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def read_marks(response: str, answer: str) -> list[Span]:
    """Spans of a response that an engine named or replaced by [MASK].

    Two forms of answers are understood, also inside a code block or behind a sentence of introduction:

    * a JSON list of ``{"text": ..., "kind": ...}`` or of texts, which stand in the response in this order (whatever
      their case). Unknown kinds become ``other``;
    * the response with masks in place of some words; all other words must be those of the response, but for white
      space and the form of quotation marks. Masks with only white space between them are one span, of kind ``other``.

    Args:
        response: what was to be masked.
        answer: the engine's.

    Returns:
        Spans in order, without overlap; none if the engine marked nothing.

    Raises:
        MaskError: if the answer is of neither form, names a text that the response does not hold, or its masks fit the
            response in no way or in several.

    >>> read_marks("A red bus and a cat.", "A [MASK] and a [MASK].")
    [Span(start=2, end=9, text='red bus', kind='other'), Span(start=16, end=19, text='cat', kind='other')]
    >>> read_marks("A red bus.", '[{"text": "red", "kind": "attribute"}]')
    [Span(start=2, end=5, text='red', kind='attribute')]
    """
    if len(answer) > 2000 + 50 * len(response):
        raise MaskError(f"The engine answered {len(answer)} characters for a response of {len(response)}.")
    holds_mask = _MASK.search(response) is not None
    for candidate in () if holds_mask else _candidates(answer):
        spans = _align(response, candidate)
        if spans is not None:
            return spans
    items = _listed(answer)
    if items is not None:
        return _locate(response, items)
    if holds_mask:
        raise MaskError(f"The response itself holds a mask: {_short(response)}.")
    raise MaskError(f"The engine's answer is no JSON list and not the response with masks: {_short(answer)}.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


# JSON


def _listed(answer: str) -> list[Any] | None:
    """The first JSON list of texts or objects in an answer, or None."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\[(?=\s*[\[{\"\]])", answer):
        try:
            value, _ = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(item, str | dict) for item in value):
            return value
    return None


def _locate(response: str, items: Sequence[Any]) -> list[Span]:
    spans: list[Span] = []
    cursor = 0
    for item in items:
        text, kind = (item, None) if isinstance(item, str) else (item.get("text"), item.get("kind"))
        if not isinstance(text, str) or not text.strip():
            raise MaskError(f"Expected every item of the engine's list to hold a text, got {_short(str(item))}.")
        match = _whole_words(text).search(response, cursor)
        if match is None:
            raise MaskError(
                f"The engine named {_short(text)}, which the response does not hold behind character {cursor}: "
                f"{_short(response)}."
            )
        spans.append(Span(match.start(), match.end(), match.group(), _kind(kind)))
        cursor = match.end()
    return spans


def _whole_words(text: str) -> re.Pattern[str]:
    pattern = r"\s+".join(map(re.escape, text.split()))
    edge = re.compile(WORD_CHARACTER)
    before = f"(?<!{WORD_CHARACTER})" if edge.match(text.strip()[0]) else ""
    after = f"(?!{WORD_CHARACTER})" if edge.match(text.strip()[-1]) else ""
    return re.compile(f"{before}{pattern}{after}", re.IGNORECASE)


def _kind(kind: object) -> str:
    singular = kind.strip().lower().removesuffix("s") if isinstance(kind, str) else ""
    return singular if singular in KINDS else "other"


# The response with masks


def _candidates(answer: str) -> Iterator[str]:
    """Parts of an answer that may be the masked response."""
    text = answer.strip()
    yield text
    if fenced := _FENCE.search(text):
        yield fenced.group(1)
    if label := _LABEL.match(text):
        text = text[label.end() :].strip()
        yield text
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        yield text[1:-1]


def _align(response: str, masked: str) -> list[Span] | None:
    """Spans that the masks stand for, none without masks; None if the unmasked text is not that of the response.

    Raises:
        MaskError: if there are several ways.
    """
    positions = [index for index, character in enumerate(response) if not character.isspace()]
    flat = "".join(response[index] for index in positions).translate(_TYPEWRITER)
    first, *others = ["".join(piece.split()).translate(_TYPEWRITER) for piece in _MASK.split(masked)]
    if not others:
        return [] if first == flat else None
    # Nothing between two masks: they are one.
    pieces = [first, *(piece for piece in others[:-1] if piece), others[-1]]
    cuts = _cuts(response, positions)
    earliest = _place(flat, pieces, cuts)
    if earliest is None:
        return None
    backwards = _place(flat[::-1], [piece[::-1] for piece in reversed(pieces)], cuts[::-1])
    assert backwards is not None  # noqa: S101 - what fits from the left fits from the right
    latest = [len(flat) - start - len(piece) for start, piece in zip(reversed(backwards), pieces, strict=True)]
    if earliest != latest:
        raise MaskError(f"The masks fit the response in several ways: {_short(masked)} for {_short(response)}.")
    spans = []
    for (piece, start), (_, following) in pairwise(zip(pieces, earliest, strict=True)):
        begin, end = positions[start + len(piece)], positions[following - 1] + 1
        spans.append(Span(begin, end, response[begin:end], "other"))
    return spans


def _cuts(response: str, positions: Sequence[int]) -> list[bool]:
    """Whether a mask may begin or end before each character that is not white space, and behind the last."""
    inside = re.compile(WORD_CHARACTER * 2)
    middle = [after > before + 1 or not inside.match(response, before) for before, after in pairwise(positions)]
    return [True, *middle, True]


def _place(flat: str, pieces: Sequence[str], cuts: Sequence[bool]) -> list[int] | None:
    """Where each piece begins if all stand as far left as they can; None if they cannot.

    The first stands at the start of the text, the last at its end, and something stands between any two.
    """
    if not flat.startswith(pieces[0]) or not cuts[len(pieces[0])]:
        return None
    starts = [0]
    end = len(pieces[0])
    for piece in pieces[1:-1]:
        start = flat.find(piece, end + 1)
        while start >= 0 and not (cuts[start] and cuts[start + len(piece)]):
            start = flat.find(piece, start + 1)
        if start < 0:
            return None
        starts.append(start)
        end = start + len(piece)
    last = len(flat) - len(pieces[-1])
    if last <= end or not flat.endswith(pieces[-1]) or not cuts[last]:
        return None
    return [*starts, last]
