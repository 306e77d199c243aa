"""Words of a caption, cut as the Penn Treebank cuts them.

CHAIR's reference tokenises lower-cased captions with NLTK, which first looks for sentences (Punkt, Kiss and Strunk
2006) and then applies the Treebank conventions (Marcus et al. 1993). This is our own scanner for both. It works on one
white-space separated chunk at a time, so that a frequent chunk needs to be cut only once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest

_CLOSING = "])}>\"'\u00bb\u201d\u2019"
_FINAL_PERIOD = re.compile(rf"(?<=[^.])\.(?=[{re.escape(_CLOSING)}]*$)")

# Marks that are always a token of their own, as the inside of a character class.
_MARKS = r"\[\](){}<>?!;@\#$%&*\"\u00ab\u00bb\u2018\u2019\u201c-\u201e"
_TOKEN = re.compile(
    rf"""
      \.{{2,}}       # ellipsis
    | --             # dash
    | `+ | ''        # quotation marks of several characters
    | [{_MARKS}]
    | [:,](?!\d)     # but not in 10:30 or 1,000
    | (?: [^\s{_MARKS}`:,.'-] | [:,](?=\d) | \.(?!\.) | -(?!-) | '(?!') )+
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=[^'])(?:n't|'(?:s|m|d|ll|re|ve)?)$")
_CHUNK = re.compile(r"\S+")
_FUSED = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}

_ABBREVIATED = """
    a.m apr aug ave blvd capt co col corp d.c dec dr e.g feb gen gov i.e inc jan jr lt ltd mr mrs ms nov oct p.m prof
    rep rev sen sept sgt sr st u.k u.n u.s vs
"""
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())
_INITIAL_OR_NUMBER = re.compile(r"[^\W\d]|-?[.,]?\d[\d,.-]*")


def tokenize(text: str) -> list[str]:
    """Cut lower-cased text into words, punctuation marks and clitics, as NLTK's ``word_tokenize`` does.

    A period is a token of its own where a sentence ends. After an abbreviation, or an initial or number that a word
    follows, the sentence goes on and the period stays.

    Args:
        text: any text; it is lower-cased first.

    Returns:
        The tokens in their order.

    >>> tokenize("Mr. Smith's dog isn't here at 10:30 p.m., is it?")
    ['mr.', 'smith', "'s", 'dog', 'is', "n't", 'here', 'at', '10:30', 'p.m.', ',', 'is', 'it', '?']
    """
    return [token for chunk, ends_sentence in chunks(text) for token in chunk_tokens(chunk, ends_sentence)]


def chunks(text: str) -> Iterator[tuple[str, bool]]:
    """White-space separated chunks of the lower-cased text, each with whether a period at its end ends a sentence.

    Args:
        text: any text.

    Returns:
        Arguments for :func:`chunk_tokens`, in their order.

    >>> list(chunks("Dr. No. A dog."))
    [('dr.', False), ('no.', True), ('a', False), ('dog.', True)]
    """
    parts = text.lower().split()
    for chunk, following in zip_longest(parts, parts[1:], fillvalue=""):
        yield chunk, "." in chunk and _ends_sentence(chunk, following)


def _ends_sentence(chunk: str, following: str) -> bool:
    """Whether the period at the end of ``chunk`` ends a sentence, ``following`` being the next chunk or empty."""
    if not following:
        return True
    before_closing = chunk.rstrip(_CLOSING)
    word = before_closing[:-1].lstrip("([{<\"'`\u201c\u2018")
    if word.rsplit("-", 1)[-1] in _ABBREVIATIONS:
        return False
    goes_on = before_closing == chunk and following[0].islower()
    return not (goes_on and _INITIAL_OR_NUMBER.fullmatch(word))


def chunk_tokens(chunk: str, ends_sentence: bool) -> list[str]:
    """Tokens of one chunk.

    Args:
        chunk: lower-case text without white space.
        ends_sentence: whether a period at its end is a token of its own.

    Returns:
        The tokens in their order.

    >>> chunk_tokens('"stop."', True)
    ['``', 'stop', '.', "''"]
    """
    return [token for token, _, _ in _scan(chunk, ends_sentence)]


def token_spans(text: str) -> list[tuple[int, int]]:
    """Where each token of :func:`tokenize` stands in the text.

    Args:
        text: any text, in its own spelling.

    Returns:
        First character and the one after the last, for each token in order.

    >>> text = "It cannot stop."
    >>> [text[start:end] for start, end in token_spans(text)]
    ['It', 'can', 'not', 'stop', '.']
    """
    spans: list[tuple[int, int]] = []
    for match, (chunk, ends_sentence) in zip(_CHUNK.finditer(text), chunks(text), strict=True):
        # Not every letter has a lower case of one character.
        origins = [index for index, letter in enumerate(match.group(), match.start()) for _ in letter.lower()]
        spans += [(origins[start], origins[end - 1] + 1) for _, start, end in _scan(chunk, ends_sentence)]
    return spans


def _scan(chunk: str, ends_sentence: bool) -> Iterator[tuple[str, int, int]]:
    """Tokens of a chunk with their first character and the one after the last."""
    period = _FINAL_PERIOD.search(chunk) if ends_sentence else None
    cut = period.start() if period else len(chunk)
    for first, last in ((0, cut), (cut, len(chunk))):
        for match in _TOKEN.finditer(chunk, first, last):
            token, start = match.group(), match.start()
            if token in ('"', "''"):
                opens = start == 0 or chunk[start - 1] in "([{<"
                yield "``" if opens else "''", start, match.end()
                continue
            for part in _parts(token):
                yield part, start, start + len(part)
                start += len(part)


def _parts(token: str) -> tuple[str, ...]:
    """The words that are written as one."""
    if token in _FUSED:
        return _FUSED[token]
    clitic = _CLITIC.search(token)
    cut = clitic.start() if clitic else len(token)
    return tuple(part for part in (token[:cut], token[cut:]) if part)
