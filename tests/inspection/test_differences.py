import random
import time
from itertools import pairwise

import pytest

from realign_lightning.inspection.differences import Range, differing, segments


def pieces(text: str, ranges: list[Range]) -> list[str]:
    return [text[start:end] for start, end in ranges]


@pytest.mark.parametrize(
    ("first", "second", "ours", "theirs"),
    [
        ("A red bus.", "A red truck.", ["bus"], ["truck"]),
        ("A red bus.", "A red bus.", [], []),
        ("A bus.", "A bus", ["."], []),
        ("A red old bus.", "A bus.", ["red old"], []),
        ("A bus.", "A red bus.", [], ["red"]),
        ("a  bus\n.", "a bus .", [], []),
        ("The dog's bowl", "The cat's bowl", ["dog's"], ["cat's"]),
        ("a black-and-white cat", "a black cat", ["black-and-white"], ["black"]),
        ("two dogs, one cat", "two cats, one dog", ["dogs", "cat"], ["cats", "dog"]),
        ("", "a bus", [], ["a bus"]),
        # Chinese: a red bus / a blue bus, one character each for red and blue.
        ("\u4e00\u8f86\u7ea2\u8f66", "\u4e00\u8f86\u84dd\u8f66", ["\u7ea2"], ["\u84dd"]),
        ("caf\u00e9 \U0001f68c bus", "caf\u00e9 \U0001f68e bus", ["\U0001f68c"], ["\U0001f68e"]),
    ],
)
def test_differing_words(first, second, ours, theirs):
    found = differing(first, second)
    assert (pieces(first, found[0]), pieces(second, found[1])) == (ours, theirs)


def test_what_is_not_marked_is_the_same_in_both():
    generator = random.Random(0)
    words = ["a", "red", "bus", "near", "the", "cat", ",", "."]
    for _ in range(200):
        first, second = (" ".join(generator.choices(words, k=12)) for _ in range(2))
        rests = []
        for text, ranges in zip((first, second), differing(first, second), strict=True):
            assert all(start < end for start, end in ranges)
            assert all(one.end < other.start for one, other in pairwise(ranges))
            marked = set().union(*(range(*piece) for piece in ranges))
            rests.append("".join(" " if index in marked else letter for index, letter in enumerate(text)).split())
        assert rests[0] == rests[1]


def test_texts_too_long_to_compare_are_marked_whole_and_at_once():
    first, second = "a b " * 20_000, "b a " * 20_000
    start = time.perf_counter()
    assert differing(first, second) == ([Range(0, len(first))], [Range(0, len(second))])
    assert time.perf_counter() - start < 5
    assert differing(first, first) == ([], [])


def test_segments_make_up_the_text_and_mark_every_character_as_the_ranges_say():
    generator = random.Random(1)
    for _ in range(200):
        text = "".join(generator.choices("ab \U0001f68c", k=20))
        cuts = sorted(generator.sample(range(21), 8))
        differences, spans = [Range(*cuts[:2]), Range(*cuts[4:6])], [Range(*cuts[1:3]), Range(*cuts[5:7])]
        found = segments(text, differences, spans)
        assert "".join(piece.text for piece in found) == text
        by_letter = [(piece.differs, piece.span) for piece in found for _ in piece.text]
        for index, marks in enumerate(by_letter):
            differs = any(start <= index < end for start, end in differences)
            span = next((number for number, (start, end) in enumerate(spans) if start <= index < end), -1)
            assert marks == (int(differs), span)


def test_segments_are_not_cut_without_need():
    assert segments("abc", []) == [("abc", 0, -1)]
    assert segments("", []) == []
