import pytest

from realign_lightning.metrics.functional.singularize import singularize
from realign_lightning.metrics.functional.words import token_spans, tokenize
from tests.metrics import _oracles

FORMS = _oracles.committed("public_singularize.json")["rows"]


def test_singular_of_every_form_is_that_of_the_reference() -> None:
    assert len(FORMS) == 530
    wrong = {
        row["form"]: singularize(row["form"]) for row in FORMS if singularize(row["form"]) != row["pattern_singularize"]
    }
    assert wrong == {}


# What NLTK's documentation and the Treebank conventions say; none of it comes from our tokeniser.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("   ", []),
        (".", ["."]),
        ("They'll save and invest more.", ["they", "'ll", "save", "and", "invest", "more", "."]),
        ("hi, my name can't hello,", ["hi", ",", "my", "name", "ca", "n't", "hello", ","]),
        (
            "Good muffins cost $3.88\nin New York.  Please buy me two of them.",
            [
                "good",
                "muffins",
                "cost",
                "$",
                "3.88",
                "in",
                "new",
                "york",
                ".",
                "please",
                "buy",
                "me",
                "two",
                "of",
                "them",
                ".",
            ],
        ),
        ("A dog. A cat.", ["a", "dog", ".", "a", "cat", "."]),
        ("Mr. Smith's yacht isn't here", ["mr.", "smith", "'s", "yacht", "is", "n't", "here"]),
        ('a sign that says "stop."', ["a", "sign", "that", "says", "``", "stop", ".", "''"]),
        ("the dogs' toys", ["the", "dogs", "'", "toys"]),
        (
            "a beach... with (two) kites -- nice!",
            ["a", "beach", "...", "with", "(", "two", ")", "kites", "--", "nice", "!"],
        ),
        ("at 10:30, 1,000 people; 50% off", ["at", "10:30", ",", "1,000", "people", ";", "50", "%", "off"]),
        ("a double-decker bus cannot stop", ["a", "double-decker", "bus", "can", "not", "stop"]),
        ("dog\u2014cat", ["dog", "\u2014", "cat"]),
        ("'cat'", ["'", "cat", "'"]),
        ("Wine-cannot- more'n", ["wine-", "can", "not", "-", "more", "'n"]),
        ("'tis", ["'", "tis"]),
    ],
)
def test_tokens_are_those_of_the_treebank(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def test_spans_are_the_tokens_in_their_spelling_and_leave_out_white_space_alone() -> None:
    texts = [row["caption"] for row in _oracles.committed("public_chair.json")["captions"]]
    texts += ["He said \"stop.\" (twice); ``rain'' -- 10:30 p.m. etc.", "'Tis\tgonna  rain"]
    texts.append("\u0130STANBUL\u0130. \u03a3.")
    for text in texts:
        spans = token_spans(text)
        read = [text[start:end] for start, end in spans]
        assert "".join(read) == "".join(text.split())
        assert sorted(spans) == spans
        for token, spelled in zip(tokenize(text), read, strict=True):
            assert token == spelled.lower() or spelled in ('"', "''")
