"""Which completions become rejected responses, by each gate."""

import pytest

from realign_lightning.preferences.accept import Gate, Similarity, WordOverlap, fillings, normalise
from realign_lightning.preferences.mask import LexiconMasker, MaskedResponse, Span

CHOSEN = "A red bus stands beside two people. The sky is blue."


def masked(response: str = CHOSEN, *words: str) -> MaskedResponse:
    return LexiconMasker(list(words or ("bus", "people", "blue"))).mask("k", response)


class Fixed(Similarity):
    """Remembers what it was asked."""

    def __init__(self, value: float):
        self.value, self.asked = value, []

    def compare(self, first, second):
        self.asked += list(zip(first, second, strict=True))
        return [self.value] * len(first)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("A red car stands beside two dogs. The sky is grey.", None),
        ("", "empty"),
        (" \n ", "empty"),
        ("a red bus \x00", "unwritable"),
        ("A red bus \ud800", "unwritable"),
        (CHOSEN, "unchanged"),
        ("a RED bus stands beside two people - the sky is blue", "unchanged"),
        ("A red [MASK] stands beside two people.", "still masked"),
        ("I'm sorry, but I can't see a bus.", "refusal"),
        ("I\u2019m sorry, I do not know.", "refusal"),
        ("As an AI model I have no eyes.", "refusal"),
        ("I am unable to assist with that.", "refusal"),
    ],
)
def test_obvious_reasons(completion, reason):
    assert Gate().obvious(masked(), completion, "[MASK]", None) == reason


def test_a_chosen_response_that_declines_may_be_rejected_by_another():
    chosen = masked("I cannot see a bus.", "bus")
    assert Gate().obvious(chosen, "I cannot see a dog.", "[MASK]", None) is None
    assert Gate(refusals=[]).obvious(masked(), "I cannot see a dog.", "[MASK]", None) is None


@pytest.mark.parametrize(
    ("completion", "objects", "reason"),
    [
        ("A red car stands beside two people.", ["car", "bus", "person"], "true of the image"),
        ("A red car stands beside two dogs.", ["car", "bus", "person"], None),
        ("A red car stands beside two people.", None, None),
        ("A blue bus stands beside two people.", ["car", "bus", "person"], None),
        ("A red bicycle stands beside two people.", ["a parked bike"], "true of the image"),
    ],
)
def test_hallucinations_that_happen_to_be_true(completion, objects, reason):
    """By the objects that the source knows; what names no new object is left to similarity."""
    assert Gate(refuse_true=True).obvious(masked(), completion, "[MASK]", objects) == reason
    assert Gate().obvious(masked(), completion, "[MASK]", objects) is None


def test_scopes_compare_what_differs():
    swapped = "A red car stands beside two people. The sky is blue."
    pairs = {scope: Gate(scope=scope).pairs(masked(), swapped) for scope in ("response", "sentence", "span")}
    assert pairs == {
        "response": [(CHOSEN, swapped)],
        "sentence": [("A red bus stands beside two people.", "A red car stands beside two people.")],
        "span": [("bus", "car")],
    }
    rewritten = "A red car waits. The sky is blue."
    assert Gate(scope="span").pairs(masked(), rewritten) == [("bus stands beside two people.", "car waits.")]
    shorter = "A red bus stands beside two people."
    assert Gate(scope="sentence").pairs(masked(), shorter) == [("The sky is blue.", "")]


def test_one_difference_below_tau_is_enough():
    gate = Gate(tau=0.9)
    assert gate.judge([0.97, 0.3]) == (None, 0.3)
    assert gate.judge([0.97, 0.9]) == ("too similar", 0.9)
    assert gate.judge([0.8999]) == (None, 0.8999)
    assert gate.judge([]) == ("too similar", 1.0), "nothing differs"


def test_word_overlap_by_scope():
    """One word of ten: 9 / 11 over all of it, 0 over the span."""
    swapped = CHOSEN.replace("bus", "car")
    for scope, expected in (("response", 10 / 12), ("sentence", 6 / 8), ("span", 0.0)):
        ours, theirs = zip(*Gate(scope=scope).pairs(masked(), swapped), strict=True)
        assert WordOverlap().compare(ours, theirs) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("A red car stands beside two dogs. The sky is dark grey.", ["car", "dogs", "dark grey"]),
        ("A red car  stands\nbeside two dogs. The sky is x.", ["car", "dogs", "x"]),
        ("A red car stood beside two dogs. The sky is grey.", None),
        ("A red stands beside two dogs. The sky is grey.", None),
        ("A red car stands beside two dogs. The sky is grey. Indeed", None),
    ],
)
def test_fillings(completion, expected):
    assert fillings(masked(), completion) == expected


def test_fillings_at_the_ends_and_with_signs():
    response = "bus (big) and a cat"
    spans = (Span(0, 3, "bus"), Span(16, 19, "cat"))
    assert fillings(MaskedResponse(response, spans), "car (big) and a dog") == ["car", "dog"]
    assert fillings(MaskedResponse("a cat", (Span(2, 5, "cat"),)), "a sand and a castle") == ["sand and a castle"]


@pytest.mark.parametrize("one", ["A red  bus.", "a RED bus", "\uff21 red bus!"])
def test_normal_forms(one):
    assert normalise(one) == "a red bus"


def test_normal_forms_keep_what_has_no_words():
    assert normalise("!") != normalise("?")
    assert normalise("3") != normalise("4")


def test_identity_tells_models_apart():
    from realign_lightning.preferences import SentenceSimilarity

    identities = [dict(one.identity) for one in (WordOverlap(), SentenceSimilarity(), SentenceSimilarity("other"))]
    assert len({str(sorted(identity.items(), key=str)) for identity in identities}) == 3


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="Expected `scope` to be one of"):
        Gate(scope="word")
