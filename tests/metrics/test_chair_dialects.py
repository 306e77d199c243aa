"""The dialects opera and objhal without NLTK's data: stand-ins for its tagger and lemmatizer from the oracles."""

import sys
from pathlib import Path
from typing import Any

import nltk
import pytest

from realign_lightning.metrics import CHAIR, CaptionParser, Lexicon, chair_captions
from realign_lightning.metrics.functional import wordnet
from realign_lightning.metrics.functional.captions import noun_words, opera_words
from realign_lightning.metrics.functional.chair import chair, chair_counts, highlight
from realign_lightning.metrics.functional.words import tokenize
from tests.metrics import _oracles
from tests.metrics.test_chair import ORACLE, ROWS, SHARED_ROWS, assert_row

FORMS = {row["form"]: row for row in _oracles.committed("public_singularize.json")["rows"]}


class StandIn:
    """Tags and lemmas by tables; a token that they lack is a noun and stays as it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tags: dict[str, str] = {}
        self.lemmas: dict[tuple[str, str], str] = {}
        self.required: list[bool] = []
        monkeypatch.setattr(wordnet, "require", lambda tagger: self.required.append(tagger))
        monkeypatch.setattr(wordnet, "tag", lambda tokens: [self.tags.get(token, "NN") for token in tokens])
        monkeypatch.setattr(wordnet, "lemma", lambda token, pos: self.lemmas.get((token, pos), token))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(monkeypatch)
    for form, row in FORMS.items():
        stand_in.lemmas[form, "n"] = row["wordnet_lemma_noun"]
        stand_in.lemmas[form, "v"] = row["wordnet_lemma_verb"]
    return stand_in


def test_a_dialect_asks_for_what_it_needs(stand_in: StandIn) -> None:
    for normalizer in ("original", "opera", "objhal"):
        CaptionParser(normalizer=normalizer)
    assert stand_in.required == [True, False]


def test_lemmas_are_by_part_of_speech_in_opera_and_of_nouns_in_objhal(stand_in: StandIn) -> None:
    """Every form of the oracle whose lemmas as noun and as verb differ; a particle (RP) is taken for an adverb."""
    different = [form for form, row in FORMS.items() if row["wordnet_lemma_noun"] != row["wordnet_lemma_verb"]]
    text = " ".join(form for form in different if tokenize(form) == [form])
    forms = tokenize(text)
    assert len(forms) > 20
    nouns = [FORMS[form]["wordnet_lemma_noun"] for form in forms]
    assert opera_words(text) == noun_words(text) == nouns
    stand_in.tags = dict.fromkeys(forms, "VBZ")
    assert opera_words(text) == [FORMS[form]["wordnet_lemma_verb"] for form in forms]
    assert noun_words(text) == nouns
    stand_in.lemmas[forms[0], "r"] = "adverb"
    stand_in.lemmas[forms[0], "a"] = "adjective"
    for tag, lemma in (("RP", "adverb"), ("RB", "adverb"), ("JJ", "adjective"), ("IN", nouns[0]), ("''", nouns[0])):
        stand_in.tags = {forms[0]: tag}
        assert opera_words(forms[0]) == [lemma]


def _alignable(row: dict[str, Any]) -> bool:
    """Whether the oracle's words give the lemma of each token: no phrase was read as a shorter one."""
    return len(" ".join(row["opera_wordnet"]["words"]).split()) == len(tokenize(row["caption"]))


def test_hand_made_captions_in_opera_from_the_lemmas_of_the_oracle(stand_in: StandIn) -> None:
    rows = [row for row in SHARED_ROWS if _alignable(row)]
    assert len(rows) > 40
    parser = CaptionParser(normalizer="opera")
    for row in rows:
        lemmas = " ".join(row["opera_wordnet"]["words"]).split()
        stand_in.lemmas = {(token, "n"): lemma for token, lemma in zip(tokenize(row["caption"]), lemmas, strict=True)}
        target = ORACLE["gt_objects"]["opera_wordnet"][str(row["image_id"])]
        assert_row(parser.check(row["caption"], target), row["opera_wordnet"], row["caption"], opera_words)


def test_every_listed_pair_is_joined_in_objhal(stand_in: StandIn, tmp_path: Path) -> None:
    """A pair that the rules for COCO do not know, a name with a blank too many, and none of three words."""
    path = tmp_path / "synonyms.txt"
    path.write_text("dining table, table, coffee table\ntie, bow tie\ncake,  cheesecake\noven, stove, stove top oven\n")
    caption = "A coffee table, a bow tie, a cheesecake, a stove top oven"
    found = {name: CaptionParser(path, name).parse(caption) for name in ("opera", "objhal")}
    assert [mention.word for mention in found["opera"].mentions] == ["table", "tie", "stove", "oven"]
    objhal = [(mention.word, caption[mention.start : mention.end]) for mention in found["objhal"].mentions]
    assert objhal == [
        ("coffee table", "coffee table"),
        ("tie", "bow tie"),
        ("cheesecake", "cheesecake"),
        ("stove", "stove"),
        ("oven", "oven"),
    ]


def test_own_names_are_found_however_their_first_word_is_tagged(stand_in: StandIn) -> None:
    stand_in.lemmas["dining", "v"] = "din"
    parser = CaptionParser(Lexicon({"furniture": ["dining table"]}), "opera")
    assert [mention.category for mention in parser.parse("A dining table").mentions] == ["furniture"]
    stand_in.tags["dining"] = "VBG"
    assert [mention.word for mention in parser.parse("A dining table").mentions] == ["din table"]


def test_counts_in_objhal_worked_by_hand(stand_in: StandIn) -> None:
    """Length counts what single blanks separate: 5, 6 (two blanks hold an empty piece) and 1 (an empty caption).

    Two of three captions mention an object and one of them another's: 1/3 of all, 1/2 of those with an object.
    """
    captions, target = ["A dog and a cat.", " It is  a dog. ", ""], [{"dog"}, {"dog", "cat"}, {"dog"}]
    counts = chair_counts(captions, target, "objhal")
    assert counts.tolist() == [[1, 1, 2, 1, 1, 1, 5, 1], [1, 0, 1, 0, 2, 1, 5, 1], [1, 0, 0, 0, 1, 0, 1, 0]]
    scores = {name: score.item() for name, score in chair(captions, target, "objhal").items()}
    expected = {"chair_s": 1 / 3, "chair_i": 1 / 3, "recall": 2 / 4, "mean_length": 11 / 3, "chair_s_refine": 1 / 2}
    assert scores == pytest.approx(expected, abs=1e-12)


def test_objects_that_a_judge_extracted(stand_in: StandIn) -> None:
    rows = SHARED_ROWS
    objects = [row["rlaifv_llm_extracted"]["extracted_objects"] for row in rows]
    targets = [set(ORACLE["gt_objects"]["rlaifv_refined_synonyms_noun_lemmas"][str(row["image_id"])]) for row in rows]
    captions = [row["caption"] for row in rows]
    checks = chair_captions(captions, targets, "objhal", objects=objects)
    for row, check in zip(rows, checks, strict=True):
        expected = row["rlaifv_llm_extracted"]
        assert [mention.category for mention in check.mentions] == expected["node_words"]
        assert [mention.word for mention in check.mentions] == expected["words"]
        assert [mention.word for mention in check.hallucinated] == expected["hallucinated"]
    metric = CHAIR("objhal")
    for start in range(0, len(rows), 20):
        part = slice(start, start + 20)
        metric.update(captions[part], targets[part], objects=objects[part])
    extracted = [row["rlaifv_llm_extracted"] for row in rows]
    hallucinating = sum(row["CHAIRs"] for row in extracted)
    assert metric.compute()["chair_s"].item() == pytest.approx(hallucinating / len(rows), abs=1e-12)
    with_object = sum(bool(row["words"]) for row in extracted)
    assert metric.compute()["chair_s_refine"].item() == pytest.approx(hallucinating / with_object, abs=1e-12)
    with pytest.raises(ValueError, match="from a judge's list"):
        highlight(captions[0], next(check for check in checks if check.hallucinated))


def test_the_length_of_every_hand_made_caption(stand_in: StandIn) -> None:
    captions = [row["caption"] for row in ROWS]
    length = chair(captions, [set() for _ in captions], "objhal")["mean_length"].item()
    assert length == pytest.approx(ORACLE["overall"]["rlaifv_nongpt"]["avg_word_len"], abs=1e-12)


def test_what_a_judge_wrote_is_normalised_each_word_once(stand_in: StandIn) -> None:
    stand_in.lemmas.update({("glasses", "n"): "glass", ("men", "n"): "man"})
    parser = CaptionParser(normalizer="objhal")
    words = parser.object_words(["Two Men", "wine glasses", "a man"])
    assert words == ["two", "man", "wine glass", "a"]
    assert [mention.category for mention in parser.look_up(words).mentions] == ["person", "wine glass"]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([["dog"], ["cat"]], "list of 1 lists"),
        ("dog", "list of 1 lists"),
        (["dog"], "lists of words, got 'dog' at index 0"),
        ([None], "leave out the captions for which the judge gave no list"),
        ([["dog", 7]], "at index 0"),
    ],
)
def test_bad_objects_are_named(stand_in: StandIn, objects: Any, message: str) -> None:
    metric = CHAIR("objhal")
    with pytest.raises(ValueError, match=message):
        metric.update(["A dog."], [{"dog"}], objects=objects)
    assert not metric.counts.any()


def test_extracted_objects_are_of_objhal_alone() -> None:
    with pytest.raises(ValueError, match="'objhal' alone, got 'original'"):
        chair(["A dog."], [{"dog"}], objects=[["dog"]])


@pytest.mark.parametrize("normalizer", ["opera", "objhal"])
def test_without_nltk_the_error_says_what_to_install(normalizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'realign-lightning\[eval\]'"):
        CHAIR(normalizer)


@pytest.mark.parametrize(
    ("normalizer", "resource"), [("opera", "averaged_perceptron_tagger_eng"), ("objhal", "wordnet")]
)
def test_without_data_the_error_says_what_to_load(
    normalizer: Any, resource: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(LookupError, match=rf"nltk.download\('{resource}'\).*NLTK_DATA") as raised:
        CHAIR(normalizer)
    assert str(tmp_path) in str(raised.value)
