"""Real captions, official question files and the official word list: may be read but not committed.

Collected only where they lie beside the project (conftest.py); the hand-made oracles cover every rule without them.
"""

import json
from collections import Counter
from typing import Any

import pytest

from realign_lightning.metrics import Lexicon, chair_captions, ground_truth, pope_questions
from realign_lightning.metrics.functional.chair import chair
from realign_lightning.metrics.functional.pope import PopeParser, pope, pope_counts, pope_verdicts
from tests.metrics import _oracles, test_chair, test_pope

OFFICIAL_LIST = Lexicon.from_file(_oracles.uncommitted("synonyms.txt"))


def load(name: str) -> Any:
    return json.loads(_oracles.uncommitted(name).read_text())


def test_our_list_has_the_official_categories() -> None:
    assert set(Lexicon.coco().categories) == set(OFFICIAL_LIST.categories)


def test_hand_made_captions_agree_with_the_reference_by_the_official_list() -> None:
    rows = test_chair.ROWS
    captions, target = [row["caption"] for row in rows], [test_chair.TARGETS[row["image_id"]] for row in rows]
    for row, check in zip(rows, chair_captions(captions, target, synonyms=OFFICIAL_LIST), strict=True):
        test_chair.assert_row(check, row["original_pattern"], row["caption"])
    scores = chair(captions, target, synonyms=OFFICIAL_LIST)
    overall = test_chair.ORACLE["overall"]
    lisa_anne, maxlinn = overall["lisaanne_original_py27_nltk325"], overall["maxlinn_py311"]
    assert scores["chair_s"].item() == pytest.approx(lisa_anne["CHAIRs"], abs=1e-12)
    assert scores["chair_i"].item() == pytest.approx(lisa_anne["CHAIRi"], abs=1e-12)
    assert scores["recall"].item() == pytest.approx(maxlinn["Recall"], abs=1e-12)


def test_ground_truth_by_the_official_list() -> None:
    for image_id, image in test_chair.ORACLE["images"].items():
        objects = ground_truth(image["instances"], image["reference_captions"], OFFICIAL_LIST)
        assert objects == test_chair.TARGETS[int(image_id)]


def test_real_captions_agree_with_the_reference() -> None:
    for model in load("public_chair_real.json")["models"].values():
        captions = [row["caption"] for row in model["rows"]]
        target = [set(row["gt_objects"]) for row in model["rows"]]
        for row, check in zip(model["rows"], chair_captions(captions, target, synonyms=OFFICIAL_LIST), strict=True):
            test_chair.assert_row(check, row["original_pattern"], row["caption"])
        scores = chair(captions, target, synonyms=OFFICIAL_LIST)
        overall = model["overall"]["original_pattern"]
        for name, reference in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall")):
            assert scores[name].item() == pytest.approx(overall[reference], abs=1e-12)
        ours = chair(captions, target)
        assert ours["chair_s"].item() == pytest.approx(overall["CHAIRs"], abs=0.005)
        assert ours["chair_i"].item() == pytest.approx(overall["CHAIRi"], abs=0.005)


@pytest.mark.parametrize("parser", test_pope.FIVE)
def test_official_question_sets_agree_with_the_reference(parser: PopeParser) -> None:
    for question_set in load("public_pope.json")["question_sets"].values():
        preds, target = ([row[key] for row in question_set["rows"]] for key in ("answer", "label"))
        expected = question_set["expected"][test_pope.ORACLE_NAMES.get(parser, parser)]
        verdicts = [verdict.name.lower() for verdict in pope_verdicts(preds, target, parser)]
        if "pred" in expected:
            assert verdicts == [test_pope.as_verdict(read) for read in expected["pred"]]
        if "score" in expected:
            assert [float(mine == label) for mine, label in zip(verdicts, target, strict=True)] == expected["score"]
        if "TP" in expected:
            test_pope.assert_cells(pope_counts(preds, target, parser), expected)
        test_pope.assert_agrees(pope(preds, target, parser), expected)


def test_joined_categories_agree_with_the_reference() -> None:
    oracle = load("public_pope.json")["vlmevalkit_multicategory"]
    preds, target, categories = ([row[key] for row in oracle["rows"]] for key in ("answer", "label", "category"))
    expected = oracle["expected"]
    verdicts = [verdict.name.lower() for verdict in pope_verdicts(preds, target, "vlmevalkit")]
    assert verdicts == [test_pope.as_verdict(read) for read in expected["pred"]]
    scores = pope(preds, target, "vlmevalkit", categories)
    test_pope.assert_agrees(scores, expected)
    assert {name.partition("/")[0] for name in scores if "/" in name} == set(expected["rating"]) - {"Overall"}


def test_published_popular_negatives_are_as_popular_as_ours() -> None:
    """The published set broke ties in its own way, so the counts must agree, not the names."""
    oracle = load("public_pope_coco500_popular.json")
    objects = [image["objects"] for image in oracle["images"]]
    images = Counter(name for of_image in objects for name in of_image)
    ours = [question for of_image in pope_questions(objects, "popular") for question in of_image]
    published = [(row["object"], row["label"]) for row in oracle["published"]]
    assert len(ours) == len(published) == 3000
    assert [images[name] for name, _ in ours] == [images[name] for name, _ in published]
    assert [question for question in ours if question[1] == "yes"] == [row for row in published if row[1] == "yes"]
    assert sum(mine != theirs for mine, theirs in zip(ours, published, strict=True)) <= 6
