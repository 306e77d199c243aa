"""What is asked for, and what becomes of the answers."""

import pytest

from realign_lightning.backbones import AutoBackbone
from realign_lightning.engines.base import Answer, Engine
from realign_lightning.engines.chat_parts import text_of
from realign_lightning.engines.local import LocalEngine
from realign_lightning.preferences.completing import Completer, Completion, join_touching
from realign_lightning.preferences.mask import LexiconMasker, MaskedResponse
from tests.conftest import picture

CHOSEN = "A red bus stands beside two people {here}."


class Listing(Engine):
    """Cannot be held to a form."""

    @property
    def identity(self):
        return {"engine": "listing"}

    def answer(self, questions):
        raise AssertionError("nobody asks")


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def masked(response: str = CHOSEN, *words: str) -> MaskedResponse:
    return LexiconMasker(list(words or ("red", "bus", "people"))).mask("k", response)


def test_freeform_shows_the_masked_response():
    question = Completer().question("What is it?", masked(), picture(0), seed=3)
    assert "What is it?\nA [MASK] stands beside two [MASK] {here}.\n" in question.prompt
    assert "Replace every [MASK] by" in question.prompt
    assert (question.seed, question.form) == (3, None)
    assert Completer().read(masked(), Answer("A green car.")) == Completion("A green car.")


def test_braces_in_texts_are_text():
    question = Completer(instruction="{prompt}|{masked}|{other}").question("a {masked} b", masked(), picture(0))
    assert question.prompt == "a {masked} b|A [MASK] stands beside two [MASK] {here}.|{other}"


def test_infill_holds_an_engine_to_the_unmasked_words():
    question = Completer("infill").question("What is it?", masked(), picture(0))
    assert question.form.segments == ("A ", " stands beside two ", " {here}.")
    assert question.form.longest == (len("red bus") // 3 + 4, len("people") // 3 + 4)
    assert question.form.fillers == ()
    listed = Completer("infill", fillers=["cat"]).question("What is it?", masked(), picture(0))
    assert listed.form.fillers == ("cat",)


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("1: green car\n2: dogs", "A green car stands beside two dogs {here}."),
        (" [1]: green car \n\n 2. dogs\n", "A green car stands beside two dogs {here}."),
        ("1) green: car\n2) dogs", "A green: car stands beside two dogs {here}."),
        ("1: green car", None),
        ("2: dogs\n1: green car", None),
        ("1: green car\n2: dogs\n3: cats", None),
        ("Here you are:\n1: green car\n2: dogs", None),
        ("1:\n2: dogs", None),
        ("green car, dogs", None),
        ("", None),
    ],
)
def test_infill_by_a_numbered_list(text, completed):
    completer = Completer("infill", Listing())
    question = completer.question("What is it?", masked(), picture(0))
    assert "A [1] stands beside two [2] {here}." in question.prompt
    assert question.form is None
    expected = Completion("", "nonsense") if completed is None else Completion(completed)
    assert completer.read(masked(), Answer(text)) == expected


@pytest.mark.parametrize("mode", ["freeform", "infill"])
def test_an_answer_that_was_cut_completes_nothing(mode):
    assert Completer(mode, Listing()).read(masked(), Answer("1: a\n2: b", finished=False)).reason == "unfinished"


@pytest.mark.parametrize("engine", [None, Listing()])
@pytest.mark.parametrize("mode", ["freeform", "infill"])
def test_a_response_that_is_masked_as_a_whole_is_asked_for_again(mode, engine):
    whole = LexiconMasker(["x"], otherwise="whole").mask("k", "yes, it is")
    chat = [{"role": "user", "content": "Is it?"}]
    question = Completer(mode, engine).question(chat, whole, picture(0))
    assert (question.prompt, question.form) == (chat, None)
    assert Completer(mode, engine).read(whole, Answer("no.")) == Completion("no.")


def test_spans_that_touch_are_one_blank():
    found = join_touching(masked("red  bus, bus"))
    assert [span.text for span in found.spans] == ["red  bus", "bus"]
    assert join_touching(masked("a bus")) == masked("a bus")


def test_of_a_chat_the_last_turn_is_quoted():
    chat = [
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And"}, {"type": "image"}, {"type": "text", "text": "now?"}],
        },
    ]
    assert text_of(chat) == "And\nnow?"
    assert text_of(chat[:1]) == "First."


def test_by_the_policy_only_the_blanks_change(tiny_llava):
    """A model of random weights: nonsense, but in the blanks only."""
    completer = Completer("infill", LocalEngine(AutoBackbone(str(tiny_llava)), max_new_tokens=80))
    given = [masked("a red bus stands beside two people."), masked("there are people on a bus, and a red one")]
    answers = completer.engine.answer([completer.question("what is it?", one, picture(0)) for one in given])
    for one, answer in zip(given, answers, strict=True):
        completion = completer.read(one, answer)
        assert completion.reason is None
        rest = completion.text
        for segment in join_touching(one).segments:
            assert segment in rest
            rest = rest[rest.index(segment) + len(segment) :]
        assert completion.text != one.response


def test_identity_is_what_completions_depend_on(tiny_llava):
    engine = LocalEngine(AutoBackbone(str(tiny_llava)))
    base = Completer(engine=engine).identity
    assert Completer(engine=LocalEngine(AutoBackbone(str(tiny_llava)), batch_size=2)).identity == base
    changed = [
        Completer("infill", engine),
        Completer(engine=engine, mask_token="<blank>"),
        Completer(engine=engine, instruction="{masked}"),
        Completer(engine=LocalEngine(AutoBackbone(str(tiny_llava)), sample=True)),
    ]
    assert all(completer.identity != base for completer in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "other"}, "Expected `mode`"),
        ({"instruction": "complete it"}, r"hold '\{masked\}'"),
        ({"fillers": ["cat"]}, "need mode='infill'"),
        ({"mode": "infill", "engine": Listing(), "fillers": ["cat"]}, "an engine that can be held"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Completer(**settings)
