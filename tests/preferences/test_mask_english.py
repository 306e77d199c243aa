import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from realign_lightning.preferences.mask import LexiconMasker, Masker, find_claims
from realign_lightning.preferences.masking.sentences import sentence_bounds
from tests.preferences.annotated import precision_and_recall, read_annotated


def claims(text):
    return [(span.text, span.kind[0]) for span in find_claims(text)]


@pytest.mark.parametrize("name", ["held_out", "tuning"])
def test_finds_what_a_person_would_mask(name):
    scores = precision_and_recall(name)
    for kind, least in (("object", 0.9), ("attribute", 0.9), ("count", 0.9), ("relation", 0.8), ("any", 0.9)):
        precision, recall, words = scores[kind]
        assert words >= 20, f"{kind}: too few words to tell"
        assert min(precision, recall) >= least, f"{kind}: precision {precision:.2f}, recall {recall:.2f}"


PAGE = Path(__file__).parents[2].joinpath("docs", "masking.md").read_text(encoding="utf-8")


def test_the_documented_numbers_are_the_measured_ones():
    for kind, held_out in precision_and_recall("held_out").items():
        numbers = [*held_out, *precision_and_recall("tuning")[kind]]
        cells = [str(number) if isinstance(number, int) else f"{number:.2f}" for number in numbers]
        assert f"| {kind} | {' | '.join(cells)} |" in PAGE


def test_the_documented_examples_are_what_comes_out():
    (text,) = re.findall(r'^"(.*)" becomes$', PAGE, re.MULTILINE)
    rows = re.findall(r"^\| (?:`(\w+: .*)`|\(default\)) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for settings, masked in rows:
        assert LexiconMasker(**yaml.safe_load(settings or "{}")).mask("k", text).render("[MASK]") == masked


def test_annotations_are_two_halves_of_twenty():
    assert len(read_annotated("held_out")) == len(read_annotated("tuning")) == 20
    assert not {text for text, _ in read_annotated("held_out")} & {text for text, _ in read_annotated("tuning")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An orange on an orange plate.", [("orange", "o"), ("on", "r"), ("orange", "a"), ("plate", "o")]),
        ("The cat is orange.", [("cat", "o"), ("orange", "a")]),
        ("Two oranges.", [("Two", "c"), ("oranges", "o")]),
        (
            "A glass of milk in a glass bowl.",
            [("glass", "o"), ("milk", "o"), ("in", "r"), ("glass", "a"), ("bowl", "o")],
        ),
        ("They watch a dog.", [("watch", "r"), ("dog", "o")]),
        ("He has a watch.", [("watch", "o")]),
        ("A man watches the birds.", [("man", "o"), ("watches", "r"), ("birds", "o")]),
        ("Her left hand.", [("left", "a"), ("hand", "o")]),
        ("A dog to the left of a cat.", [("dog", "o"), ("to the left of", "r"), ("cat", "o")]),
        ("A mug is left on the desk.", [("mug", "o"), ("left on", "r"), ("desk", "o")]),
        ("Open windows.", [("Open", "a"), ("windows", "o")]),
        ("She can open the window.", [("open", "r"), ("window", "o")]),
        ("Beans in a can.", [("Beans", "o"), ("in", "r"), ("can", "o")]),
        ("You can see a kite.", [("kite", "o")]),
        ("A kite can be seen.", [("kite", "o")]),
        ("A man guards the door.", [("man", "o"), ("door", "o")]),
        ("A kitchen counter.", [("kitchen counter", "o")]),
        ("A bird flies over a park.", [("bird", "o"), ("flies over", "r"), ("park", "o")]),
        ("A car is parked.", [("car", "o"), ("parked", "a")]),
    ],
)
def test_neighbours_decide_between_readings(text, expected):
    assert claims(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "On Monday it might be seen in general.",
        "In the image, on the other hand, it is at the moment in good order.",
        "By the way, this is at night.",
        "It is in the middle of a conversation and on the right track.",
        "Yes.",
        "As long as it is, one of them is as good as the other one.",
        "How many are there?",
        "?! ... -- '' \u00e9 \u0301",
        "\u732b\u304c\u3044\u308b\u3002 \U0001f408",
    ],
)
def test_nothing_to_mask(text):
    assert claims(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "3 dogs and 1,200 birds at 10:30",
            [("3", "c"), ("dogs", "o"), ("1,200", "c"), ("birds", "o"), ("10:30", "c")],
        ),
        ("a large group of people", [("a large group of", "c"), ("people", "o")]),
        (
            "half a dozen eggs, a pair of shoes",
            [("half a dozen", "c"), ("eggs", "o"), ("a pair of", "c"), ("shoes", "o")],
        ),
        ("one man, one of the men", [("one", "c"), ("man", "o"), ("men", "o")]),
        ("both cats; both cats and dogs", [("both", "c"), ("cats", "o"), ("cats", "o"), ("dogs", "o")]),
    ],
)
def test_counts(text, expected):
    assert claims(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the man's dog", ["man", "dog"]),
        ("the man\u2019s dog", ["man", "dog"]),
        ("a black-and-white cat", ["black-and-white", "cat"]),
        ("a snow\u2011covered roof", ["snow\u2011covered", "roof"]),
        ("a T-shirt", ["T-shirt"]),
        ("A CAT", ["CAT"]),
        ("cafe\u0301 tables", ["cafe\u0301 tables"]),
        ("a cat\n\non\n\na mat", ["cat", "mat"]),
        ("a red\nbus", ["red", "bus"]),
        ("snake_case_dog", ["snake", "dog"]),
        ("dogs\u3002cats", ["dogs", "cats"]),
    ],
)
def test_hyphens_apostrophes_and_unicode(text, expected):
    assert [span.text for span in find_claims(text)] == expected


@pytest.mark.parametrize("name", ["held_out", "tuning"])
def test_spans_are_in_order_apart_and_verbatim(name):
    for text, _ in read_annotated(name):
        end = 0
        for span in find_claims(text):
            assert end <= span.start < span.end
            assert text[span.start : span.end] == span.text == span.text.strip()
            end = span.end


def test_long_answers_take_no_more_than_linear_time():
    masker = LexiconMasker()
    text = "A red bus, and a very very shiny , red and green and blue car on the left side of it. "
    assert len(masker.mask("k", text * 400).spans) == 400 * len(masker.mask("k", text).spans)
    assert find_claims("orange and " * 3000) != []
    assert find_claims("red and " * 3000) != []
    assert find_claims("on the " * 3000) == []


def test_sentences_are_as_a_reader_sees_them():
    text = '  Mr. Smith waits at 10 a.m. here. "Is it a cat?" Yes!\nNo period\n\nA new paragraph. 3 dogs.'
    assert [text[start:end] for start, end in sentence_bounds(text)] == [
        "Mr. Smith waits at 10 a.m. here.",
        '"Is it a cat?"',
        "Yes!",
        "No period",
        "A new paragraph.",
        "3 dogs.",
    ]
    assert sentence_bounds(" \n") == []
    assert re.sub(r"\s", "", "".join(text[start:end] for start, end in sentence_bounds(text))) == re.sub(
        r"\s", "", text
    )


@pytest.mark.parametrize(
    "settings",
    ["{}", "words: [bus, cat]", "words: {animal: [cat]}", "{kinds: [count], fraction: 0.5, level: sentence}"],
)
def test_settings_come_from_yaml(settings):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--masker", type=Masker)
    block = {"class_path": "realign_lightning.preferences.mask.LexiconMasker", "init_args": yaml.safe_load(settings)}
    made = parser.instantiate(parser.parse_object({"masker": block})).masker
    assert made.identity == LexiconMasker(**yaml.safe_load(settings)).identity
