"""Opera and objhal through NLTK's tagger and WordNet; collected only where their data are found (conftest.py)."""

from collections.abc import Sequence

import pytest

from realign_lightning.metrics import CHAIR, CaptionParser, Lexicon, ground_truth
from realign_lightning.metrics.functional import wordnet
from realign_lightning.metrics.functional.captions import opera_words
from tests.metrics import _oracles, test_chair
from tests.metrics._tester import Batch, MetricTester

TRUTHS = {"opera": "opera_wordnet", "objhal": "rlaifv_refined_synonyms_noun_lemmas"}
ROWS = {"opera": "opera_wordnet", "objhal": "rlaifv_nongpt"}


class DialectTester(MetricTester):
    """Our list of names on the hand-made captions, counted from the oracle's rows."""

    normalizer: str

    def make_metric(self) -> CHAIR:
        return CHAIR(self.normalizer)

    def batches(self) -> list[Batch]:
        truth = test_chair.ORACLE["gt_objects"][TRUTHS[self.normalizer]]
        rows = test_chair.SHARED_ROWS
        parts = [rows[start : start + 15] for start in range(0, len(rows), 15)]
        return [([row["caption"] for row in part], [truth[str(row["image_id"])] for row in part]) for part in parts]

    def reference(self, preds: Sequence[str], target: Sequence[list[str]]) -> dict[str, float]:
        by_caption = {row["caption"]: row for row in test_chair.ROWS}
        rows = [by_caption[caption][ROWS[self.normalizer]] for caption in preds]
        recalled = sum(len(set(row["node_words"]) & set(wanted)) for row, wanted in zip(rows, target, strict=True))
        hallucinating = sum(row["CHAIRs"] for row in rows)
        scores = {
            "chair_s": hallucinating / len(rows),
            "chair_i": sum(len(row["hallucinated"]) for row in rows) / sum(len(row["node_words"]) for row in rows),
            "recall": recalled / sum(len(wanted) for wanted in target),
        }
        if self.normalizer == "opera":
            return scores | {"mean_length": sum(len(row["words"]) for row in rows) / len(rows)}
        length = sum(len(caption.strip().split(" ")) for caption in preds) / len(preds)
        return scores | {
            "mean_length": length,
            "chair_s_refine": hallucinating / sum(bool(row["node_words"]) for row in rows),
        }


class TestOperaCHAIR(DialectTester):
    normalizer = "opera"


class TestObjhalCHAIR(DialectTester):
    normalizer = "objhal"


def test_lemmas_of_every_form_are_those_of_the_reference() -> None:
    rows = _oracles.committed("public_singularize.json")["rows"]
    assert len(rows) == 530
    for row in rows:
        assert wordnet.lemma(row["form"], "n") == row["wordnet_lemma_noun"]
        assert wordnet.lemma(row["form"], "v") == row["wordnet_lemma_verb"]


def test_hand_made_captions_agree_with_the_references_by_our_list() -> None:
    opera, objhal = CaptionParser(normalizer="opera"), CaptionParser(normalizer="objhal")
    for row in test_chair.SHARED_ROWS:
        image = str(row["image_id"])
        check = opera.check(row["caption"], test_chair.ORACLE["gt_objects"]["opera_wordnet"][image])
        test_chair.assert_row(check, row["opera_wordnet"], row["caption"], opera_words)
        assert [mention.category for mention in check.mentions] == row["lmms_eval_node_words"]
        found = objhal.check(row["caption"], test_chair.ORACLE["gt_objects"][TRUTHS["objhal"]][image])
        assert [mention.word for mention in found.mentions] == row["rlaifv_nongpt"]["words"]
        assert [mention.category for mention in found.mentions] == row["rlaifv_nongpt"]["node_words"]
        assert [mention.word for mention in found.hallucinated] == row["rlaifv_nongpt"]["hallucinated"]


@pytest.mark.parametrize("normalizer", ["opera", "objhal"])
def test_ground_truth_is_instances_and_reference_captions(normalizer: str) -> None:
    """In opera the canoes of image 22 that are tied to the dock make it hold a tie."""
    for image_id, image in test_chair.ORACLE["images"].items():
        expected = set(test_chair.ORACLE["gt_objects"][TRUTHS[normalizer]][image_id])
        assert ground_truth(image["instances"], image["reference_captions"], normalizer=normalizer) == expected


def test_names_of_an_own_lexicon_are_found_in_opera() -> None:
    parser = CaptionParser(Lexicon({"furniture": ["dining table"], "toy": ["stuffed animal"]}), "opera")
    found = parser.parse("A dining table, two stuffed animals at dining tables.").mentions
    assert [mention.category for mention in found] == ["furniture", "toy", "furniture"]
