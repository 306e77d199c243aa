"""Our tokenizer against NLTK's own; Punkt's data are not needed, because every text is a single sentence."""

import random
import re

import pytest
from nltk.tokenize.destructive import NLTKWordTokenizer

from realign_lightning.metrics.functional.words import cased_tokens, chunks, token_spans, tokenize
from tests.metrics import _oracles

NLTK = NLTKWordTokenizer()

WORDS = ["cat", "Dog", "MAN", "boys", "a", "wine-glass", "x-ray", "o'clock", "y'all", "café", "straße", "na_me"]
FUSED = ["cannot", "Cannot", "GIMME", "gonna", "Gotta", "lemme", "wanna", "Wanna", "more'n", "D'ye", "'tis", "'Twas"]
SHORT_CLITICS = ["'s", "'S", "'m", "'d", "'D", "n't", "N'T", "N't", "'n", "'t"]
LONG_CLITICS = ["'ll", "'LL", "'Ll", "'re", "'RE", "'ve", "'VE"]
CURLY = [*"\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"]
QUOTES = ['"', '""', "'", "''", "'''", "`", "``", "```", *CURLY]
DASHES = ["-", "--", "---", "\u2010", "\u2012", "\u2013", "\u2014", "\u2015", "\u2212"]
MARKS = [*"()[]{}<>,:;?!@#$%&*/+=_|~^", ",,", ":,", ",,,", "...", "..", "\u2026"]
NUMBERS = ["5", "10:30", "1,000", "3.88", ",5", "-2", "\u0663"]
ABBREVIATED = ["mr.", "e.g.", "U.S.", "p.m.", "St."]
UNICODE = ["\u0130", "\u01c5", "\u00df", "\u0301", "\u200b", "\uff44", "\u732b", "\U0001f408", "\u017f", "\u03a3"]
PIECES = [WORDS, WORDS, FUSED, SHORT_CLITICS, LONG_CLITICS, QUOTES, DASHES, MARKS, NUMBERS, ABBREVIATED, UNICODE]
GAPS = ["", "", "", " ", " ", " ", "  ", "\n", "\t", "\u00a0"]
ENDS = ["", "", ".", "!", "?", "...", '."', ".'", ".)", ".''", ".\u201d", "'.", '".', ","]


def sentence(generator: random.Random) -> str:
    """Pieces in any order, glued or set apart, and how a sentence ends."""
    text = generator.choice(["", "", "", " ", "\n"])
    for _ in range(generator.randint(1, 9)):
        text += generator.choice(generator.choice(PIECES)) + generator.choice(GAPS)
    return text + generator.choice(ENDS)


CLOSING = "])}>\"'\u00bb\u201d\u2019"
KNOWN = re.compile(
    rf"""
      (?:not|me|na|ta|'ye|'n)'(?:tis|twas)                         # cannot'tis
    | '[smd]'(?: \s?\Z | [^\S ] | [\[\](){{}}<>*"'\u00bb\u201d\u2019] | -- )     # dog's'
    | \.[{re.escape(CLOSING)}]*\s[\s{re.escape(CLOSING)}]*\Z       # stop. "
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""What the docstring of the tokenizer names as different, as far as the pieces above can make it."""


def several_sentences(text: str) -> bool:
    """Whether Punkt would part the text, so that NLTK's tokenizer of one sentence says nothing about it."""
    *earlier, _ = [(chunk.rstrip(CLOSING)[-1:], ends) for chunk, ends in chunks(text)] or [("", False)]
    return any(last in ("?", "!") or (last == "." and ends) for last, ends in earlier)


def single_sentences(count: int) -> list[str]:
    generator = random.Random(20250711)
    texts: list[str] = []
    while len(texts) < count:
        text = sentence(generator)
        if not several_sentences(text) and not KNOWN.search(text):
            texts.append(text)
    return texts


def caption_sentences() -> list[str]:
    """Every sentence of the committed captions, parted where a period, question or exclamation mark ends a chunk."""
    oracle = _oracles.committed("public_chair.json")
    captions = [row["caption"] for row in oracle["captions"]]
    captions += [caption for image in oracle["images"].values() for caption in image["reference_captions"]]
    sentences = []
    for caption in captions:
        found: list[str] = []
        for word, (_, ends) in zip(re.findall(r"\s*\S+", caption), chunks(caption), strict=True):
            found.append(word)
            if word.endswith(("!", "?")) or (word.rstrip(CLOSING).endswith(".") and ends):
                sentences.append("".join(found))
                found = []
        sentences.append("".join(found))
    return [text for text in sentences if text.strip()]


@pytest.mark.parametrize("texts", [single_sentences(6000), caption_sentences()], ids=["random", "captions"])
def test_tokens_are_those_of_nltk_in_both_cases(texts: list[str]) -> None:
    assert {text: tokenize(text) for text in texts if tokenize(text) != NLTK.tokenize(text.lower())} == {}
    assert {text: cased_tokens(text) for text in texts if cased_tokens(text) != NLTK.tokenize(text)} == {}


def test_spans_of_random_sentences_point_at_their_tokens() -> None:
    for text in single_sentences(2000):
        spans = token_spans(text)
        for token, (start, end) in zip(tokenize(text), spans, strict=True):
            assert token.casefold() == text[start:end].casefold() or text[start:end] in ('"', "''")
        assert sorted(spans) == spans


# The first is what NLTK says, the second what we say.
@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("the dog's'", ["the", "dog's", "'"], ["the", "dog", "'s", "'"]),
        ('stop. "', ["stop.", "``"], ["stop", ".", "``"]),
        ("on st. )", ["on", "st", ".", ")"], ["on", "st.", ")"]),
        ("cannot'tis", ["can", "not", "'t", "is"], ["can", "not", "'tis"]),
        ("'\u00bd", ["'\u00bd"], ["'", "\u00bd"]),
    ],
)
def test_differences_that_the_documentation_names(text: str, theirs: list[str], ours: list[str]) -> None:
    assert NLTK.tokenize(text) == theirs
    assert tokenize(text) == ours


@pytest.mark.parametrize("mark", ['"', "''"])
def test_a_quotation_mark_behind_a_line_break_opens_only_where_a_sentence_begins(mark: str) -> None:
    """Each line is a sentence of NLTK's in the first text, and the second text is one sentence."""
    first = [*NLTK.tokenize("A dog."), *NLTK.tokenize(f"{mark}Cat")]
    assert cased_tokens(f"A dog.\n{mark}Cat") == first
    assert cased_tokens(f"A dog\n{mark}Cat") == NLTK.tokenize(f"A dog\n{mark}Cat")
