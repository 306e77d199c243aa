import re
from typing import Any

import pytest

from realign_lightning.metrics import pope_questions
from tests.metrics import _oracles

TINY = _oracles.committed("public_pope_sampler.json")["tiny"]
CASES = [(case, kind) for case in TINY["expected_by_seed"] for kind in ("random", "popular", "adversarial")]


def asked(question: dict[str, Any]) -> tuple[str, str]:
    # The official template says "imange" after "an".
    name = re.fullmatch(r"Is there an? (.+) in the ima(?:n)?ge\?", question["text"])
    assert name is not None
    return name[1], question["label"]


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_draws_are_those_of_the_official_sampler(case: str, kind: str) -> None:
    seed, per_image = re.fullmatch(r"seed(\d+)_n(\d+)", case).groups()
    objects = [image["objects"] for image in TINY["images"]]
    questions = pope_questions(objects, kind, seed=int(seed), per_image=int(per_image))
    expected = [asked(question) for question in TINY["expected_by_seed"][case][kind]]
    assert [question for of_image in questions for question in of_image] == expected


DIGITS = [
    ["one", "two"],
    ["two", "three", "four"],
    ["five"],
    ["one", "two", "six"],
    ["seven", "eight"],
    ["nine", "one"],
]


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_answers_are_right_and_no_object_comes_twice(kind: str) -> None:
    for objects, questions in zip(DIGITS, pope_questions(DIGITS, kind, seed=3, per_image=2), strict=True):
        assert [name for name, answer in questions if answer == "yes"] == objects[:2]
        assert all((name in objects) == (answer == "yes") for name, answer in questions)
        assert len({name for name, _ in questions}) == len(questions) == 2 * min(2, len(objects))


def test_popular_and_adversarial_worked_by_hand() -> None:
    """a and c share two images, a and b one; b is in three images, c in two.

    For image 3 (a, d): b is the most popular absent object, c the one most often seen with a.
    """
    images = [["a", "c"], ["a", "c"], ["a", "b"], ["a", "d"], ["b", "e"], ["b", "f"]]
    assert pope_questions(images, "popular", per_image=1)[3] == [("a", "yes"), ("b", "no")]
    assert pope_questions(images, "adversarial", per_image=1)[3] == [("a", "yes"), ("c", "no")]


def test_equal_seeds_give_equal_questions_and_others_do_not() -> None:
    assert pope_questions(DIGITS, "random", seed=1) == pope_questions(DIGITS, "random", seed=1)
    assert pope_questions(DIGITS, "random", seed=1) != pope_questions(DIGITS, "random", seed=2)


@pytest.mark.parametrize(
    ("objects", "settings", "message"),
    [
        (DIGITS, {"kind": "rare"}, "'adversarial'.*got 'rare'"),
        (DIGITS, {"kind": "random", "per_image": 0}, "`per_image` to be at least 1, got 0"),
        ([["one", "one"]], {"kind": "random"}, "image 0.*list each once"),
        ([["one", "two"], ["three"]], {"kind": "popular"}, "Image 0 needs 2 absent objects, but only 1"),
        (["one"], {"kind": "popular"}, "got 'one' at index 0"),
    ],
)
def test_bad_input_is_named(objects: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pope_questions(objects, **settings)
