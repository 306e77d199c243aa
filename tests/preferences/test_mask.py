import json
import random

import pytest

from realign_lightning.preferences.mask import LexiconMasker, MaskedResponse, Masker, MaskError, Span

TEXT = "A red bus is parked in front of a hotel. It is sunny. Two dogs sleep on the street on Monday."


def test_masks_whole_words_whatever_their_case_longest_first():
    masked = LexiconMasker(["light", "traffic light", "bus"]).mask("k", "A Bus, a busy Traffic light and a light.")
    assert masked.render("_") == "A _, a busy _ and a _."
    assert [span.text for span in masked.spans] == ["Bus", "Traffic light", "light"]
    assert all(masked.response[span.start : span.end] == span.text for span in masked.spans)


def test_segments_and_spans_rebuild_the_response():
    masked = LexiconMasker(["cat", "dog"]).mask("k", "cat and dog and cat")
    pieces = [*masked.segments]
    for position, span in reversed(list(enumerate(masked.spans))):
        pieces.insert(position + 1, span.text)
    assert "".join(pieces) == masked.response
    assert masked.segments == ("", " and ", " and ", "")


def test_fraction_is_the_share_of_masked_words_and_never_none():
    masker = LexiconMasker(["cat"], fraction=0.3)
    counts = [len(masker.mask(str(key), "cat cat cat cat").spans) for key in range(2000)]
    assert min(counts) == 1
    # Binomial(4, 0.3), its zero (0.7^4 = 0.2401) raised to one: mean 1.2 + 0.2401; standard error 0.016.
    assert sum(counts) / len(counts) == pytest.approx(1.4401, abs=0.07)


def test_choice_depends_on_seed_and_key_only():
    words, text = ["cat"], "cat " * 12
    first, again = (LexiconMasker(words, 0.5).mask("k", text) for _ in range(2))
    assert first == again
    assert first != LexiconMasker(words, 0.5).mask("other", text)
    assert first != LexiconMasker(words, 0.5, seed=1).mask("k", text)
    generator = random.Random("0:k")
    assert [span.start for span in first.spans] == [4 * place for place in range(12) if generator.random() < 0.5]


def test_response_without_listed_words():
    assert LexiconMasker(["cat"]).mask("k", "yes, it is.") is None
    whole = LexiconMasker(["cat"], otherwise="whole").mask("k", "yes, it is.")
    assert whole.is_whole
    assert whole.render("_") == "_"
    assert [span.kind for span in whole.spans] == ["response"]
    assert not LexiconMasker(["cat"]).mask("k", "a cat").is_whole


@pytest.mark.parametrize("response", ["", " \n"])
def test_blank_responses_hold_nothing_to_mask(response):
    assert LexiconMasker(otherwise="whole").mask("k", response) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": []}, "words"),
        ({"words": ["  "]}, "words"),
        ({"words": "cat"}, "words"),
        ({"words": {}}, "words"),
        ({"words": {"animal": []}}, "words"),
        ({"words": {"animal": ["duck"], "food": ["Duck"]}}, "one kind"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"kinds": []}, "kinds"),
        ({"kinds": ["objects"]}, "kinds"),
        ({"words": ["cat"], "kinds": ["count"]}, "kinds"),
        ({"level": "word"}, "level"),
        ({"otherwise": "none"}, "otherwise"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"Expected.*{message}"):
        LexiconMasker(**settings)


def test_words_by_kind():
    masker = LexiconMasker({"animal": ["cat", "guinea pig"], "place": ["garden"]})
    masked = masker.mask("k", "A guinea pig and a cat in a garden with roses.")
    assert [(span.text, span.kind) for span in masked.spans] == [
        ("guinea pig", "animal"),
        ("cat", "animal"),
        ("garden", "place"),
    ]
    only = LexiconMasker(masker.words, kinds=["place"]).mask("k", "A cat in a garden.")
    assert only.render("_") == "A cat in a _."


def test_words_beside_unusual_letters_are_whole_words():
    masker = LexiconMasker(["cafe", "s", "i"])
    # An accent written behind its letter belongs to the word; a long s and a dotless i match as s and i do.
    assert masker.mask("k", "cafe\u0301 cafe \u017f \u0131").render("_") == "cafe\u0301 _ _ _"


def test_kinds_of_the_built_in_lists():
    def masked(*kinds):
        return LexiconMasker(kinds=kinds).mask("k", TEXT).render("_")

    assert masked("object") == "A red _ is parked in front of a _. It is sunny. Two _ sleep on the _ on Monday."
    assert masked("attribute") == TEXT.replace("red", "_").replace("sunny", "_")
    assert masked("count") == TEXT.replace("Two", "_")
    assert masked("relation") == "A red bus is _ a hotel. It is sunny. Two dogs _ the street on Monday."


def test_sentences():
    masker = LexiconMasker(kinds=["object"], level="sentence")
    masked = masker.mask("k", TEXT)
    assert masked.render("_") == "_ It is sunny. _"
    assert {span.kind for span in masked.spans} == {"sentence"}
    # The share is one of sentences: of two, half the keys mask one by the draw, or by "at least one" (1/2 + 1/4).
    counts = [
        len(LexiconMasker(kinds=["object"], level="sentence", fraction=0.5).mask(str(key), TEXT).spans)
        for key in range(1000)
    ]
    assert counts.count(1) / 1000 == pytest.approx(0.75, abs=0.05)


def test_merging_adjacent_claims():
    text = "Two big red buses, and cars on green grass."
    apart, merged = (LexiconMasker(merge_adjacent=merge).mask("k", text) for merge in (False, True))
    assert apart.render("_") == "_ _ _ _, and _ _ _ _."
    assert merged.render("_") == "_, and _ _ _."
    assert [span.kind for span in merged.spans] == ["object", "object", "relation", "object"]
    assert merged.spans[0].text == "Two big red buses"


def test_many_at_a_time_keep_their_errors():
    class Picky(Masker):
        def mask(self, key, response):
            if response == "bad":
                raise MaskError("no")
            return MaskedResponse(response, (Span(0, 1, response[0]),)) if response else None

    good, bad, nothing = Picky().mask_many(["a", "b", "c"], ["x y", "bad", ""])
    assert good.render("_") == "_ y"
    assert isinstance(bad, MaskError)
    assert nothing is None
    with pytest.raises(ValueError, match="zip"):
        Picky().mask_many(["a"], [])


def test_identity_is_plain_and_tells_settings_apart():
    identities = [
        LexiconMasker(**settings).identity
        for settings in (
            {},
            {"words": ["cat"]},
            {"words": {"animal": ["cat"]}},
            {"fraction": 0.5},
            {"seed": 1},
            {"kinds": ["count"]},
            {"level": "sentence"},
            {"otherwise": "whole"},
            {"merge_adjacent": True},
        )
    ]
    texts = [json.dumps(identity, sort_keys=True) for identity in identities]
    assert len(set(texts)) == len(texts)
    assert [json.loads(text) for text in texts] == identities
    assert LexiconMasker().identity == identities[0]


def test_identity_of_a_masker_with_other_settings_must_be_written():
    class Holder(LexiconMasker):
        def __init__(self):
            super().__init__()
            self.thing = object()

    with pytest.raises(TypeError, match=r"Holder.*identity"):
        Holder().identity  # noqa: B018
