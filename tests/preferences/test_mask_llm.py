import json

import pytest

from realign_lightning.engines.base import Answer, Engine
from realign_lightning.preferences.mask import MASK_INSTRUCTION, LLMMasker, MaskError, Span, read_marks

TEXT = "A red bus is parked next to two cats, and a bus stop."


class Scripted(Engine):
    """Answers from a script, and keeps what it was asked."""

    def __init__(self, *answers, batch_size=2):
        self.answers = [Answer(answer) if isinstance(answer, str) else answer for answer in answers]
        self.batch_size = batch_size
        self.asked = []

    @property
    def identity(self):
        return {"model": "scripted", "revision": 1}

    def answer(self, questions):
        start = sum(map(len, self.asked))
        self.asked.append(questions)
        return self.answers[start : start + len(questions)]


def listed(*items):
    return json.dumps([{"text": text, "kind": kind} for text, kind in items])


@pytest.mark.parametrize(
    "answer",
    [
        "A [MASK] [MASK] is parked next to [MASK] cats, and a [MASK].",
        "A [MASK]  is parked\nnext to [mask] cats , and a [ MASK ].",
        "```\nA [MASK] is parked next to [MASK] cats, and a [MASK].\n```",
        "Masked answer: A [MASK_1] is parked next to [MASK_2] cats, and a [MASK_3].",
        '"A [MASK] is parked next to [MASK] cats, and a [MASK]."',
    ],
)
def test_masks_are_aligned_with_the_response(answer):
    assert read_marks(TEXT, answer) == [
        Span(2, 9, "red bus", "other"),
        Span(28, 31, "two", "other"),
        Span(44, 52, "bus stop", "other"),
    ]


@pytest.mark.parametrize(
    "wrap", ["{}", "Here is the list:\n```json\n{}\n```\nDone.", 'The words [as asked]: {{"spans": {}}}']
)
def test_lists_are_found_in_order(wrap):
    answer = wrap.format(listed(("red", "Attributes"), ("Bus", "object"), ("two", "count"), ("bus  stop", "place")))
    assert read_marks(TEXT, answer) == [
        Span(2, 5, "red", "attribute"),
        Span(6, 9, "bus", "object"),
        Span(28, 31, "two", "count"),
        Span(44, 52, "bus stop", "other"),
    ]


def test_lists_of_texts():
    assert read_marks(TEXT, '["red bus", "next to"]') == [
        Span(2, 9, "red bus", "other"),
        Span(20, 27, "next to", "other"),
    ]


@pytest.mark.parametrize("answer", ["[]", "[ ]", TEXT, f" {TEXT}\n"])
def test_nothing_marked(answer):
    assert read_marks(TEXT, answer) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "no JSON list"),
        ("I cannot see the image.", "no JSON list"),
        ("[MASK]" * 3 + "!", "no JSON list"),
        # A word changed, left out, added, or its case.
        ("A [MASK] was parked next to two cats, and a bus stop.", "no JSON list"),
        ("A [MASK] is parked to two cats, and a bus stop.", "no JSON list"),
        ("A [MASK] is parked next to two big cats, and a bus stop.", "no JSON list"),
        ("a [MASK] is parked next to two cats, and a bus stop.", "no JSON list"),
        # Words cut in two, a mask for nothing.
        ("A red bus is [MASK]ed next to two cats, and a bus stop.", "no JSON list"),
        ("A red [MASK] bus is parked next to two cats, and a bus stop.", "no JSON list"),
        # The lists of nonsense.
        (listed(("dog", "object")), "'dog'"),
        (listed(("bus", "object"), ("red", "attribute")), "'red'"),
        (listed(("us", "object")), "'us'"),
        (listed(("cats, and a bus st", "object")), "st'"),
        (listed((" ", "object")), "hold a text"),
        (listed((3, "object")), "hold a text"),
        ('[{"word": "bus"}]', "hold a text"),
        ('[{"text": "bus"', "no JSON list"),
        ("[" * 1000, "no JSON list"),
        ("x" * 100_000, "100000 characters"),
    ],
)
def test_nonsense_is_refused(answer, message):
    with pytest.raises(MaskError, match=message):
        read_marks(TEXT, answer)


def test_masks_that_fit_in_several_ways_are_refused():
    text = "A cat and a dog and a bird."
    with pytest.raises(MaskError, match="several ways"):
        read_marks(text, "A [MASK] and a [MASK].")
    assert [span.text for span in read_marks(text, "A [MASK] and a [MASK] and a [MASK].")] == ["cat", "dog", "bird"]


def test_a_response_that_holds_masks_or_lists_itself():
    with pytest.raises(MaskError, match="itself holds a mask"):
        read_marks("A [MASK] on a mat.", "A [MASK] on a [MASK].")
    assert read_marks("A [MASK] on a mat.", '["mat"]') == [Span(14, 17, "mat", "other")]
    text = 'A sign ["STOP"] on a pole.'
    assert [span.text for span in read_marks(text, 'A sign ["STOP"] on a [MASK].')] == ["pole"]


def test_alignment_agrees_with_all_ways_tried_one_by_one():
    # Every masking of every short text over few letters, against a search that tries all spans.
    from itertools import combinations

    def fits(words, pieces):
        """All ways to give each mask at least one word."""
        if len(pieces) == 1:
            return [()] if words == pieces[0] else []
        size = len(pieces[0])
        if words[:size] != pieces[0]:
            return []
        return [
            ((size, end), *((start + end, stop + end) for start, stop in rest))
            for end in range(size + 1, len(words) + 1)
            for rest in fits(words[end:], pieces[1:])
        ]

    checked = 0
    for text in ("a b a b a", "a a a a", "a b c a b", "b a a b a a"):
        words = text.split()
        for masks in (1, 2, 3):
            for places in combinations(range(len(words)), masks):
                masked = " ".join("[MASK]" if place in places else word for place, word in enumerate(words))
                pieces = [piece.split() for piece in masked.split("[MASK]")]
                pieces = [pieces[0], *(piece for piece in pieces[1:-1] if piece), pieces[-1]]
                ways = set(fits(words, pieces))
                if len(ways) == 1:
                    (way,) = ways
                    found = [span.text for span in read_marks(text, masked)]
                    assert found == [" ".join(words[start:end]) for start, end in way]
                else:
                    with pytest.raises(MaskError, match="several ways"):
                        read_marks(text, masked)
                checked += 1
    assert checked > 100


def test_asks_in_batches_and_keeps_going_after_failures():
    engine = Scripted(
        listed(("red", "attribute"), ("cats", "object")),
        "nonsense",
        Answer("", error="HTTP 429"),
        Answer("A [MASK]", finished=False),
        "[]",
        batch_size=2,
    )
    masker = LLMMasker(engine, kinds=["object"])
    responses = [TEXT, *(f"{TEXT} {number}" for number in range(3)), "Yes.", TEXT]
    masks = masker.mask_many([f"k{number}" for number in range(6)], responses)
    assert [len(batch) for batch in engine.asked] == [2, 2, 1]
    assert masks[0].render("_") == TEXT.replace("cats", "_")
    assert [str(error)[:30] for error in masks[1:4]] == [
        "The engine's answer is no JSON",
        "The engine did not answer: HTT",
        "The engine's answer was cut: l",
    ]
    assert all(isinstance(error, MaskError) for error in masks[1:4])
    assert masks[4] is None
    assert masks[5] == masks[0], "an equal response is asked about once"


def test_one_response_raises_its_error():
    with pytest.raises(MaskError, match="no JSON list"):
        LLMMasker(Scripted("nonsense")).mask("k", TEXT)
    assert LLMMasker(Scripted("[]"), otherwise="whole").mask("k", "Yes.").is_whole


def test_questions_show_instruction_examples_and_response():
    engine = Scripted("[]", "[]")
    example = ("A dog {x}.", "A [MASK] {x}.")
    masker = LLMMasker(engine, MASK_INSTRUCTION, examples=[example], seed=3)
    masker.mask_many(["a", "b"], [TEXT, "Yes."])
    first, second = engine.asked[0]
    assert (
        first.prompt == f"{MASK_INSTRUCTION}\n\nAnswer: A dog {{x}}.\nReply: A [MASK] {{x}}.\n\nAnswer: {TEXT}\nReply:"
    )
    assert first.image is None
    assert first.seed != second.seed
    again = Scripted("[]")
    LLMMasker(again, MASK_INSTRUCTION, seed=3).mask("a", TEXT)
    assert again.asked[0][0].seed == first.seed


@pytest.mark.parametrize(
    "settings",
    [
        {"instruction": " "},
        {"examples": [("A dog.", "A [MASK].", "x")]},
        {"examples": [("A dog.", "A [MASK] sleeps.")]},
        {"fraction": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"Expected|no JSON list"):
        LLMMasker(Scripted(), **settings)


def test_identity_holds_the_engine_and_what_is_asked():
    settings = [{}, {"instruction": MASK_INSTRUCTION}, {"examples": [("A dog.", '["dog"]')]}, {"kinds": ["object"]}]
    identities = [LLMMasker(Scripted(), **setting).identity for setting in settings]
    assert all(identity["engine"] == {"model": "scripted", "revision": 1} for identity in identities)
    texts = {json.dumps(identity, sort_keys=True) for identity in identities}
    assert len(texts) == len(settings)
    assert [json.loads(json.dumps(identity)) for identity in identities] == identities
