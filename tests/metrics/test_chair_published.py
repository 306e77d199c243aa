"""Opera and objhal with the official list, on the hand-made and the real captions.

Collected only where these and NLTK's data are found (conftest.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from realign_lightning.metrics import CaptionParser, Lexicon, chair_captions, ground_truth
from realign_lightning.metrics.functional.captions import opera_words
from realign_lightning.metrics.functional.chair import chair
from tests.metrics import _oracles, test_chair

OFFICIAL = _oracles.uncommitted("synonyms.txt")
CAPTIONS = [row["caption"] for row in test_chair.ROWS]


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RLAIF-V's ``synonyms_refine.txt`` has four names more than the official list, and no blanks too many."""
    more = {"person": "brother, pedestrian", "dining table": "coffee table", "remote": "remote control"}
    lines = [line.strip() for line in OFFICIAL.read_text().splitlines()]
    path = tmp_path_factory.mktemp("lists") / "refined.txt"
    path.write_text("\n".join(", ".join(filter(None, (line, more.get(line.split(", ")[0])))) for line in lines))
    return path


def targets(reference: str) -> list[set[str]]:
    objects = test_chair.ORACLE["gt_objects"][reference]
    return [set(objects[str(row["image_id"])]) for row in test_chair.ROWS]


def assert_overall(scores: dict[str, Any], expected: dict[str, float], names: dict[str, str]) -> None:
    for name, reference in names.items():
        assert scores[name].item() == pytest.approx(expected[reference], abs=1e-12), name


def test_hand_made_captions_in_opera() -> None:
    target = targets("opera_wordnet")
    checks = chair_captions(CAPTIONS, target, "opera", OFFICIAL)
    for row, check in zip(test_chair.ROWS, checks, strict=True):
        test_chair.assert_row(check, row["opera_wordnet"], row["caption"], opera_words)
        assert [mention.category for mention in check.mentions] == row["lmms_eval_node_words"]
    scores = chair(CAPTIONS, target, "opera", OFFICIAL)
    overall = test_chair.ORACLE["overall"]
    names = {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "Recall"}
    assert_overall(scores, overall["opera_py311"], names)
    assert scores["mean_length"].item() / 100 == pytest.approx(overall["opera_py311"]["Len"], abs=1e-12)
    for name, value in overall["lmms_eval_x100_with_opera_gt"].items():
        assert scores[name].item() * 100 == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("reference", ["rlaifv_nongpt", "rlaifv_llm_extracted"])
def test_hand_made_captions_in_objhal(reference: str, refined: Path) -> None:
    rows = [row[reference] for row in test_chair.ROWS]
    objects = [row["extracted_objects"] for row in rows] if "llm" in reference else None
    target = targets("rlaifv_refined_synonyms_noun_lemmas")
    checks = chair_captions(CAPTIONS, target, "objhal", refined, objects=objects)
    for row, check in zip(rows, checks, strict=True):
        assert [mention.word for mention in check.mentions] == row["words"]
        assert [mention.category for mention in check.mentions] == row["node_words"]
        assert [mention.word for mention in check.hallucinated] == row["hallucinated"]
        assert bool(check.hallucinated) == row["CHAIRs"]
        share = len(check.hallucinated) / len(check.mentions) if check.mentions else 0
        assert share == pytest.approx(row["CHAIRi"], abs=1e-12)
    scores = chair(CAPTIONS, target, "objhal", refined, objects=objects)
    expected = test_chair.ORACLE["overall"][reference]
    names = {"chair_s": "CHAIRs", "chair_s_refine": "CHAIRs_refine", "chair_i": "CHAIRi", "recall": "obj_rec"}
    assert_overall(scores, expected, names | {"mean_length": "avg_word_len"})
    assert 1 - scores["chair_s_refine"].item() == pytest.approx(expected["correct_rate"], abs=1e-12)
    assert 1 - scores["chair_i"].item() == pytest.approx(expected["object_correct_rate"], abs=1e-12)
    counts = (len(checks), sum(bool(check.mentions) for check in checks), sum(len(check.recalled) for check in checks))
    names_of_counts = ("sentence_num", "coco_sentence_num", "coco_word_count")
    assert counts == tuple(expected[name] for name in names_of_counts)
    assert sum(len(check.target) for check in checks) == expected["gt_word_count"]


def test_ground_truth(refined: Path) -> None:
    lists = {"opera": ("opera_wordnet", OFFICIAL), "objhal": ("rlaifv_refined_synonyms_noun_lemmas", refined)}
    for normalizer, (reference, names) in lists.items():
        for image_id, image in test_chair.ORACLE["images"].items():
            objects = ground_truth(image["instances"], image["reference_captions"], names, normalizer)
            assert objects == set(test_chair.ORACLE["gt_objects"][reference][image_id])


def test_real_captions_in_opera_and_the_distance_of_our_list() -> None:
    official, ours = CaptionParser(Lexicon.from_file(OFFICIAL), "opera"), CaptionParser(normalizer="opera")
    for model in json.loads(_oracles.uncommitted("public_chair_real.json").read_text())["models"].values():
        captions = [row["caption"] for row in model["rows"]]
        target = [set(row["gt_objects"]) for row in model["rows"]]
        for row, check in zip(model["rows"], chair_captions(captions, target, official), strict=True):
            test_chair.assert_row(check, row["opera_wordnet"], row["caption"], opera_words)
        expected = model["overall"]["opera_wordnet"]
        scores = chair(captions, target, official)
        assert_overall(scores, expected, {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "Recall"})
        assert scores["mean_length"].item() / 100 == pytest.approx(expected["Len"], abs=1e-12)
        by_ours = chair(captions, target, ours)
        assert by_ours["chair_s"].item() == pytest.approx(expected["CHAIRs"], abs=0.005)
        assert by_ours["chair_i"].item() == pytest.approx(expected["CHAIRi"], abs=0.005)
