"""Words of a caption, cut as the Penn Treebank cuts them.

CHAIR's reference tokenises lower-cased captions with NLTK, which first looks for sentences (Punkt, Kiss and Strunk
2006) and then applies the Treebank conventions (Marcus et al. 1993); AMBER's does the same in the text's own case.
This is our own scanner for both. It works on one white-space separated chunk at a time, so that a frequent chunk needs
to be cut only once. Tokens are those of NLTK 3.10.4, with these known differences:

* Sentences: Punkt knows from a corpus which words often begin one. Here only a list of abbreviations, and initials
  and numbers before a lower-case word, keep their period; case is not looked at.
* Closing marks that white space sets off from the period before them: a chunk does not see that only they follow. In
  ``stop. "`` the period is cut, and NLTK leaves it; in ``st. )`` at the end of a text it is the reverse.
* In ``dog's'`` the clitic is cut. NLTK leaves it before the end of the sentence or line, a bracket, an asterisk, a
  dash of hyphens or a closing quotation mark: an effect of the order of its substitutions that writers do not mean.
* ``'tis`` is not cut right behind a fused word, as in ``cannot'tis``, which nobody writes.
* Beside an apostrophe, letters are those of Python's ``re`` and the accents U+0300 to U+036F. NLTK has them from the
  ``regex`` package, which takes every combining mark for a letter, and fractions and superscripts for none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise, zip_longest

_CLOSING = "])}>\"'\u00bb\u201d\u2019"
_FINAL_PERIOD = re.compile(rf"(?<=[^.])\.(?=[{re.escape(_CLOSING)}]*$)")

# Marks that are always a token of their own, as the inside of a character class.
_MARKS = r"\[\](){}<>?!;@\#$%&*\"\u00ab\u00bb\u2012-\u2015\u2018\u2019\u201c-\u201e"
_BEFORE_OPENING_QUOTE = frozenset("([{< `\u00ab\u2018\u201c\u201e")
_LETTER = r"[\w\u0300-\u036f]"
_WORD = rf"""
    (?: [^\s{_MARKS}`:,.'-]
      | [:,](?=\d)                                     # as in 10:30 and 1,000
      | \.(?!\.)
      | -(?!-)
      | (?<={_LETTER})'(?!') | '(?!'|{_LETTER})        # within a word or at its end
      | '(?=(?i:s|m|d|t|n|ll|re|ve)(?!{_LETTER}))     # at the start of a clitic
    )
"""
_TOKEN = re.compile(
    rf"""
      \.{{2,}}                                         # ellipsis
    | --                                               # dash
    | ``? | ''                                         # quotation marks
    | [{_MARKS}]
    | [:,](?![\d:,])
    | [:,]{{2}} {_WORD}*                               # the second of a pair stays with what follows
    | {_WORD}+
    | '                                                # opening quotation mark
    """,
    re.VERBOSE,
)
_PAIR = re.compile("[:,]{2}")
_CHUNK = re.compile(r"\S+")

_CLITICS = re.compile(
    r"""
    (.*?[^'])                                          # of the clitics, each may follow once, in this order
    (n't | N'T | '(?: ll|LL | re|RE | ve|VE ))?
    ('[sSmMdD])?
    (')?
    \Z""",
    re.VERBOSE,
)
_FUSED = {
    "can": "not",
    "d": "'ye",
    "gim": "me",
    "gon": "na",
    "got": "ta",
    "lem": "me",
    "more": "'n",
    "wan": r"na\Z",
}
_FUSED_WORD = re.compile(
    rf"\b({'|'.join(rf'{first}(?={second})' for first, second in _FUSED.items())})({'|'.join(_FUSED.values())})\b",
    re.IGNORECASE,
)

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
    return cased_tokens(text.lower())


def cased_tokens(text: str) -> list[str]:
    """Tokens of a text in its own case, as NLTK's ``word_tokenize`` finds them.

    Case matters: "isn't" and "ISN'T" are two words each, "Isn'T" is one.

    Args:
        text: any text.

    Returns:
        The tokens in their order.

    >>> cased_tokens("IT'S a dog\u2014I CANNOT see it.")
    ['IT', "'S", 'a', 'dog', '\u2014', 'I', 'CAN', 'NOT', 'see', 'it', '.']
    """
    return [token for chunk, ends_sentence in _cased_chunks(text) for token in chunk_tokens(chunk, ends_sentence)]


def chunks(text: str) -> Iterator[tuple[str, bool]]:
    """White-space separated chunks of the lower-cased text, each with whether a period at its end ends a sentence.

    A chunk that begins with a quotation mark keeps the character of white space before it within the sentence, because
    that decides whether the mark opens a quotation.

    Args:
        text: any text.

    Returns:
        Arguments for :func:`chunk_tokens`, in their order.

    >>> list(chunks('Dr. No. A "dog".'))
    [('dr.', False), ('no.', True), ('a', False), (' "dog".', True)]
    """
    return _cased_chunks(text.lower())


def _cased_chunks(text: str) -> Iterator[tuple[str, bool]]:
    """The chunks of a text in its own case."""
    parts = text.split()
    found = (
        (chunk, "." in chunk and _ends_sentence(chunk.lower(), following.lower()))
        for chunk, following in zip_longest(parts, parts[1:], fillvalue="")
    )
    return _with_space_before_quotes(text, found) if '"' in text or "''" in text else found


def _with_space_before_quotes(text: str, found: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The chunks of ``text``, with the white space before quotation marks that do not begin a sentence."""
    begins_sentence = not text[:1].isspace()
    for match, (chunk, ends_sentence) in zip(_CHUNK.finditer(text), found, strict=True):
        before = "" if begins_sentence or not chunk.startswith(('"', "''")) else text[match.start() - 1]
        yield before + chunk, ends_sentence
        last = chunk.rstrip(_CLOSING)[-1:]
        begins_sentence = last in ("?", "!") or (last == "." and ends_sentence)


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
        chunk: text without white space, but for what :func:`chunks` leaves at its start.
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
        first = match.start() - chunk[0].isspace()
        # Not every letter has a lower case of one character.
        origins = [index for index in range(first, match.end()) for _ in text[index].lower()]
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
                yield "``" if _opens(chunk, start, token) else "''", start, match.end()
                continue
            pair = _PAIR.match(token)
            for part in (token[0], *_parts(token[1:])) if pair else _parts(token):
                yield part, start, start + len(part)
                start += len(part)


def _opens(chunk: str, start: int, mark: str) -> bool:
    """Whether the quotation mark at ``start`` opens a quotation; at the start of a sentence only a double one does."""
    if start == 0:
        return mark == '"'
    return chunk[start - 1] in _BEFORE_OPENING_QUOTE or (start == 1 and chunk[0] == '"')


def _parts(token: str) -> list[str]:
    """The words that are written as one."""
    clitics = _CLITICS.match(token) if "'" in token else None
    if clitics is None:
        return _unfused(token)
    word, *others = clitics.groups()
    return [*_unfused(word), *filter(None, others)]


def _unfused(word: str) -> list[str]:
    """The word cut around and within "cannot" and its like."""
    cuts = [0]
    for match in _FUSED_WORD.finditer(word):
        cuts += [match.start(), match.start(2), match.end()]
    return [word[start:end] for start, end in pairwise([*cuts, len(word)]) if start < end]
