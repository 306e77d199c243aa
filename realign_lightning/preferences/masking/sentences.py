"""Where the sentences of an answer begin and end."""

from __future__ import annotations

import re

from realign_lightning.metrics.functional.words import chunks

_BLANK_LINE = re.compile(r"\n\s*\n")
_CLOSING = ")]}\"'\u00bb\u201d\u2019"


def sentence_bounds(text: str) -> list[tuple[int, int]]:
    """Start and end of every sentence, without the white space around it.

    A sentence ends behind a period as CHAIR's reference finds it, a question or exclamation mark, or at a blank line.

    Args:
        text: any text.

    Returns:
        Character indices, in order; all other characters are white space.

    >>> text = "A dog at 10 a.m. on a mat. It sleeps!  Why?"
    >>> [text[start:end] for start, end in sentence_bounds(text)]
    ['A dog at 10 a.m. on a mat.', 'It sleeps!', 'Why?']
    """
    words = list(re.finditer(r"\S+", text))
    bounds = []
    start = None
    for index, (word, (_, ends)) in enumerate(zip(words, chunks(text), strict=True)):
        start = word.start() if start is None else start
        last = index + 1 == len(words)
        ends = ends or word.group().rstrip(_CLOSING).endswith(("!", "?", "…"))
        if last or ends or _BLANK_LINE.search(text, word.end(), words[index + 1].start()):
            bounds.append((start, word.end()))
            start = None
    return bounds
