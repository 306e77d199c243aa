import pytest

from realign_lightning.preferences import LexiconMasker


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


def test_probability_is_the_share_of_masked_words_and_never_none():
    masker = LexiconMasker(["cat"], probability=0.3)
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


def test_response_without_listed_words():
    assert LexiconMasker(["cat"]).mask("k", "yes, it is.") is None
    whole = LexiconMasker(["cat"], otherwise="whole").mask("k", "yes, it is.")
    assert whole.is_whole
    assert whole.render("_") == "_"
    assert not LexiconMasker(["cat"]).mask("k", "a cat").is_whole


@pytest.mark.parametrize(("words", "probability"), [([], 1.0), (["  "], 1.0), (["cat"], 0.0), (["cat"], 1.5)])
def test_impossible_settings_are_refused(words, probability):
    with pytest.raises(ValueError, match="Expected"):
        LexiconMasker(words, probability)
