from collections.abc import Sequence

import pytest
import sklearn.metrics

from realign_lightning.metrics import POPE
from realign_lightning.metrics.functional.pope import Verdict, official_verdict, pope
from tests.metrics import _oracles
from tests.metrics._tester import Batch, MetricTester

TRICKY = _oracles.committed("public_pope_tricky.json")
VERDICTS = {row["answer"]: row["pope_official"] for row in TRICKY["tricky_answers"]}
ANSWERS = [row["answer"] for row in TRICKY["tricky_answers"]]


def spoken(answer: str) -> bool:
    """Whether yes or no occurs as a word, by another way than the package's."""
    letters = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in answer.lower())
    return not {"yes", "no"}.isdisjoint(letters.split())


class TestPOPE(MetricTester):
    def make_metric(self) -> POPE:
        return POPE()

    def batches(self) -> list[Batch]:
        labels = TRICKY["tricky_mixed"]["labels"]
        return [(ANSWERS[start : start + 25], labels[start : start + 25]) for start in range(0, len(ANSWERS), 25)]

    def reference(self, preds: Sequence[str], target: Sequence[str]) -> dict[str, float]:
        """scikit-learn's scores of the verdicts that the reference gave."""
        verdicts = [VERDICTS[answer] for answer in preds]
        precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
            target, verdicts, pos_label="yes", average="binary", zero_division=0.0
        )
        return {
            "accuracy": sklearn.metrics.accuracy_score(target, verdicts),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_ratio": verdicts.count("yes") / len(verdicts),
            "unparsed": sum(not spoken(answer) for answer in preds) / len(preds),
        }


@pytest.mark.parametrize(("answer", "verdict"), VERDICTS.items())
def test_official_verdict_on_tricky_answers(answer: str, verdict: str) -> None:
    assert official_verdict(answer) is Verdict[verdict.upper()]


def assert_agrees(scores: dict, expected: dict) -> None:
    """Equal to the reference, and 0 where it divided by zero (None in the oracle)."""
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        if expected[name] is not None:
            assert scores[name].item() == pytest.approx(expected[name], abs=1e-12), name


@pytest.mark.parametrize("case", ["tricky_mixed", "tricky_all_label_yes", "tricky_all_label_no"])
def test_scores_of_tricky_answers_agree_with_the_reference(case: str) -> None:
    table = TRICKY[case]
    labels = table.get("labels", [case.rpartition("_")[2]] * len(ANSWERS))
    assert_agrees(pope(ANSWERS, labels), table.get("expected", table)["pope_official"])


def test_zero_where_the_reference_divides_by_zero() -> None:
    """All labels are no: nothing to recall, so recall and F1 are 0; of 91 answers 24 are read as no, accuracy 24/91."""
    scores = pope(ANSWERS, ["no"] * len(ANSWERS))
    assert scores["recall"] == scores["f1"] == scores["precision"] == 0
    assert scores["accuracy"].item() == pytest.approx(24 / 91)


def test_unparsed_counts_answers_without_the_word_yes_or_no() -> None:
    """Two of four hold neither word: "I do not know." and "". "NO!" and "Yes" do, in any case."""
    assert pope(["NO!", "Yes", "I do not know.", ""], ["no", "yes", "no", "no"])["unparsed"].item() == 0.5


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (["yes"], ["Yes"], "'yes' and 'no', got 'Yes' at index 0"),
        (["yes", None], ["yes", "no"], "texts, got NoneType at index 1"),
        ("yes", ["yes"], "`preds` to be a list"),
        (["yes"], "yes", "`target` to be a list"),
        (["yes"], [], "got 1 and 0"),
    ],
)
def test_bad_input_is_named(preds: object, target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POPE().update(preds, target)


def test_unknown_parser_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\('official',\), got 'oficial'"):
        POPE(parser="oficial")
    with pytest.raises(ValueError, match="got 'oficial'"):
        pope(["yes"], ["yes"], parser="oficial")
