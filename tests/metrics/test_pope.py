from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import sklearn.metrics
import torch

from realign_lightning.metrics import POPE
from realign_lightning.metrics.functional.pope import (
    COUNTS,
    PARSERS,
    PopeParser,
    Verdict,
    _pope_compute,
    pope,
    pope_counts,
    pope_verdicts,
)
from tests.metrics import _oracles
from tests.metrics._tester import Batch, MetricTester, assert_scores, joined

TRICKY = _oracles.committed("public_pope_tricky.json")
ROWS = TRICKY["tricky_answers"]
ANSWERS = [row["answer"] for row in ROWS]
LABELS = TRICKY["tricky_mixed"]["labels"]
ORACLE_NAMES = {"official": "pope_official"}
"""What the oracles call a parser, where that is not its name."""

READS_EVERYTHING = ("official", "opera", "vcd")
FIVE = tuple(PARSERS)


def verdict_in(row: Mapping[str, str], parser: str, label: str) -> str:
    """The oracle's verdict: yes, no or unknown."""
    if parser == "vcd":
        return "yes" if row[f"vcd_if_label_{label}"] in ("TP", "FP") else "no"
    return as_verdict(row[ORACLE_NAMES.get(parser, parser)])


def as_verdict(read: str) -> str:
    """What a reference made of an answer; lmms-eval keeps the text, and only an exact yes or no counts."""
    return read.lower() if read.lower() in ("yes", "no") else "unknown"


VERDICTS = {
    (parser, row["answer"], label): verdict_in(row, parser, label)
    for parser in FIVE
    for row in ROWS
    for label in ("yes", "no")
}


def spoken(answer: str) -> bool:
    """Whether yes or no occurs as a word, by another way than the package's."""
    letters = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in answer.lower())
    return not {"yes", "no"}.isdisjoint(letters.split())


def sklearn_scores(parser: str, preds: Sequence[str], target: Sequence[str]) -> dict[str, float]:
    """scikit-learn's scores of the verdicts that the reference gave."""
    verdicts = [VERDICTS[parser, *pair] for pair in zip(preds, target, strict=True)]
    pairs = list(zip(target, verdicts, strict=True))
    if parser == "lmms_eval":
        pairs = [(label, verdict) for label, verdict in pairs if verdict != "unknown"]
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        [label == "yes" for label, _ in pairs],
        [verdict == "yes" for _, verdict in pairs],
        average="binary",
        zero_division=0.0,
    )
    heard = [spoken(answer) for answer in preds] if parser in READS_EVERYTHING else [v != "unknown" for v in verdicts]
    scores = {
        "accuracy": sklearn.metrics.accuracy_score(target, verdicts),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": verdicts.count("yes") / len(verdicts),
        "unparsed": heard.count(False) / len(preds),
    }
    if parser == "lmms_eval":
        scores["yes_ratio_of_ground_truth"] = target.count("yes") / len(target)
    if parser == "vlmevalkit":
        scores["overall"] = 100 * f1
    return scores


class TestPOPE(MetricTester):
    parser: PopeParser = "official"

    def make_metric(self) -> POPE:
        return POPE(self.parser)

    def batches(self) -> list[Batch]:
        # Strides, so that every batch holds an answer that lmms-eval can read.
        return [(ANSWERS[start::4], LABELS[start::4]) for start in range(4)]

    def reference(self, preds: Sequence[str], target: Sequence[str]) -> dict[str, float]:
        return sklearn_scores(self.parser, preds, target)


class TestOpera(TestPOPE):
    parser = "opera"


class TestVCD(TestPOPE):
    parser = "vcd"


class TestLmmsEval(TestPOPE):
    parser = "lmms_eval"


class TestVLMEvalKit(TestPOPE):
    parser = "vlmevalkit"


KINDS = ("random", "popular", "adversarial")


class PairedPOPE(POPE):
    """POPE for a tester that hands over two lists: the second holds label and category."""

    def update(self, preds: Sequence[str], target: Sequence[tuple[str, str]], ids: Sequence[int] | None = None) -> None:
        super().update(preds, [label for label, _ in target], [category for _, category in target], ids)


class TestCategories(MetricTester):
    """Every answer belongs to one to three of the kinds; scikit-learn sees it once for each."""

    def make_metric(self) -> POPE:
        return PairedPOPE("vlmevalkit", categories=KINDS)

    def batches(self) -> list[Batch]:
        joined_kinds = [",".join(KINDS[index % 3 : 1 + index % 5]) or KINDS[index % 3] for index in range(len(ANSWERS))]
        target = list(zip(LABELS, joined_kinds, strict=True))
        return [(ANSWERS[start : start + 25], target[start : start + 25]) for start in range(0, len(ANSWERS), 25)]

    def reference(self, preds: Sequence[str], target: Sequence[tuple[str, str]]) -> dict[str, float]:
        rows = [
            (kind, pred, label) for pred, (label, kinds) in zip(preds, target, strict=True) for kind in kinds.split(",")
        ]
        scores = sklearn_scores("vlmevalkit", [pred for _, pred, _ in rows], [label for *_, label in rows])
        for kind in KINDS:
            some = [(pred, label) for own, pred, label in rows if own == kind]
            apart = sklearn_scores("vlmevalkit", [pred for pred, _ in some], [label for _, label in some])
            scores |= {f"{kind}/{name}": value for name, value in apart.items()}
        return scores

    def test_the_function_gives_the_same(self) -> None:
        preds, target = joined(self.batches())
        labels, categories = [label for label, _ in target], [category for _, category in target]
        assert_scores(pope(preds, labels, "vlmevalkit", categories), self.reference(preds, target))


def test_the_five_parsers_are_there() -> None:
    assert FIVE == get_args(PopeParser) == ("official", "opera", "vcd", "lmms_eval", "vlmevalkit")


@pytest.mark.parametrize("label", ["yes", "no"])
@pytest.mark.parametrize("parser", FIVE)
def test_verdicts_on_tricky_answers(parser: PopeParser, label: str) -> None:
    verdicts = pope_verdicts(ANSWERS, [label] * len(ANSWERS), parser)
    expected = {answer: Verdict[VERDICTS[parser, answer, label].upper()] for answer in ANSWERS}
    assert dict(zip(ANSWERS, verdicts, strict=True)) == expected


def assert_agrees(scores: Mapping[str, torch.Tensor], expected: Mapping[str, Any], prefix: str = "") -> None:
    """Equal to the reference, and 0 where it divided by zero (None or missing in the oracle).

    The references' rates go by several names, and VLMEvalKit's are percentages.
    """
    if "rating" in expected:
        for split, rating in expected["rating"].items():
            # Without categories the oracle was made with one that is called "all".
            own = "" if split in ("Overall", "all") else f"{split}/"
            assert scores[f"{own}overall"].item() == pytest.approx(rating["f1_Overall"], abs=1e-9)
            for name, theirs in (("accuracy", "acc"), ("precision", "precision"), ("recall", "recall")):
                assert 100 * scores[own + name].item() == pytest.approx(rating[theirs], abs=1e-9), own + name
        return
    for name in ("accuracy", "precision", "recall", "f1"):
        if expected.get(name) is not None:
            assert scores[name].item() == pytest.approx(expected[name], abs=1e-12), name
        elif name != "accuracy":
            assert scores[name] == 0
    if "yes_ratio_of_GROUND_TRUTH" in expected:
        printed = scores["yes_ratio_of_ground_truth"].item()
        assert printed == pytest.approx(expected["yes_ratio_of_GROUND_TRUTH"], abs=1e-12)
    if expected.get("yes_ratio") is not None:
        assert scores["yes_ratio"].item() == pytest.approx(expected["yes_ratio"], abs=1e-12)


def assert_cells(counts: torch.Tensor, expected: Mapping[str, int]) -> None:
    """The table of a reference that prints one."""
    cells = dict(zip(COUNTS, counts.sum(0).tolist(), strict=True))
    for name, column in (("TP", "yes_read_as_yes"), ("FN", "yes_read_as_no")):
        assert cells[column] == expected[name], name
    for name, column in (("FP", "no_read_as_yes"), ("TN", "no_read_as_no")):
        assert cells[column] == expected[name], name


@pytest.mark.parametrize("case", ["tricky_mixed", "tricky_all_label_yes", "tricky_all_label_no"])
@pytest.mark.parametrize("parser", FIVE)
def test_scores_of_tricky_answers_agree_with_the_reference(parser: PopeParser, case: str) -> None:
    table = TRICKY[case]
    labels = table.get("labels", [case.rpartition("_")[2]] * len(ANSWERS))
    expected = table.get("expected", table)[ORACLE_NAMES.get(parser, parser)]
    assert_agrees(pope(ANSWERS, labels, parser), expected)
    if "TP" in expected:
        assert_cells(pope_counts(ANSWERS, labels, parser), expected)


def test_zero_where_the_reference_divides_by_zero() -> None:
    """All labels are no: nothing to recall, so recall and F1 are 0; of 91 answers 24 are read as no, accuracy 24/91."""
    scores = pope(ANSWERS, ["no"] * len(ANSWERS))
    assert scores["recall"] == scores["f1"] == scores["precision"] == 0
    assert scores["accuracy"].item() == pytest.approx(24 / 91)


def test_unparsed_counts_answers_without_the_word_yes_or_no() -> None:
    """Two of four hold neither word: "I do not know." and "". "NO!" and "Yes" do, in any case."""
    assert pope(["NO!", "Yes", "I do not know.", ""], ["no", "yes", "no", "no"])["unparsed"].item() == 0.5


def test_unparsed_counts_what_the_two_strict_parsers_cannot_read() -> None:
    """lmms-eval reads "Yes" alone. VLMEvalKit also reads "NO!" and "Yes, a cat.", and neither word in the other two."""
    preds, target = ["NO!", "Yes", "Yes, a cat.", "Yes or no.", "No: a dog."], ["no", "yes", "no", "no", "no"]
    assert pope(preds, target, "lmms_eval")["unparsed"].item() == 4 / 5
    assert pope(preds, target, "vlmevalkit")["unparsed"].item() == 2 / 5


def test_vlmevalkit_deletes_only_the_first_32_periods() -> None:
    """Its call hands the flag re.UNICODE, 32, over as a number of replacements: "no" is found behind 32 periods."""
    assert pope_verdicts(["." * 32 + "no", "." * 33 + "no"], ["no", "no"], "vlmevalkit") == [
        Verdict.NO,
        Verdict.UNKNOWN,
    ]


def test_vlmevalkit_joins_what_punctuation_parted_where_a_comma_stands_between_digits() -> None:
    """Each mark becomes a blank, unless a blank or a comma between digits is anywhere in the text."""
    preds = ["no/maybe", "no/maybe 1,000", "no/maybe / a dog", "no/maybe - a dog"]
    assert [verdict.name for verdict in pope_verdicts(preds, ["no"] * 4, "vlmevalkit")] == [
        *("NO", "UNKNOWN", "UNKNOWN", "NO"),
    ]


def test_counts_are_additive_rows_under_any_leading_dimensions() -> None:
    """Two answers right, one wrong and without yes or no; drawn as rows 0 0 1 and 2 2 2: accuracy 1 and 0."""
    counts = pope_counts(["Yes.", "No.", "A cat."], ["yes", "no", "no"])
    assert counts.dtype == torch.long
    assert counts.tolist() == [[0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1]]
    scores = _pope_compute(counts[torch.tensor([[0, 0, 1], [2, 2, 2]])].sum(-2), "official")
    assert scores["accuracy"].tolist() == [1, 0]
    assert scores["unparsed"].tolist() == [0, 1]


@pytest.mark.parametrize("parser", FIVE)
@pytest.mark.parametrize("categories", [None, KINDS])
def test_no_answers_give_zeros(parser: PopeParser, categories: Sequence[str] | None) -> None:
    metric = POPE(parser, categories)
    metric.update([], [], None if categories is None else [])
    assert all(value == 0 for value in metric.compute().values())
    assert all(value == 0 for value in pope([], [], parser, None if categories is None else []).values())


@pytest.mark.parametrize("parser", FIVE)
def test_an_empty_answer_is_counted_as_unparsed(parser: PopeParser) -> None:
    assert pope(["", " \n"], ["yes", "no"], parser)["unparsed"] == 1


def test_overall_counts_a_row_as_often_as_it_has_categories() -> None:
    """One right answer of two kinds, one wrong of one: 2/3 of the whole, though half of the answers are right."""
    scores = pope(["Yes", "Yes"], ["yes", "no"], "vlmevalkit", ["random,popular", "popular"])
    assert scores["accuracy"].item() == pytest.approx(2 / 3)
    assert scores["random/accuracy"] == 1
    assert scores["popular/accuracy"].item() == 1 / 2
    # Precision 2/3, recall 1; F1 4/5.
    assert scores["overall"].item() == pytest.approx(80)


@pytest.mark.parametrize("parser", FIVE)
@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (["yes"], ["Yes"], "'yes' and 'no', got 'Yes' at index 0: lower-case"),
        (["yes", "no"], ["yes", "no\n"], r"got 'no\\n' at index 1"),
        (["yes"], [None], "got None at index 0"),
        (["yes"], [["yes"]], r"got \['yes'\] at index 0"),
        (["yes"], [1], "got 1 at index 0"),
        (["yes", None], ["yes", "no"], "texts, got NoneType at index 1"),
        ("yes", ["yes"], "`preds` to be a list"),
        (["yes"], "yes", "`target` to be a list"),
        (["yes"], [], "got 1 and 0"),
        ([], ["yes"], "got 0 and 1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    parser: PopeParser, preds: object, target: object, message: str
) -> None:
    metric = POPE(parser)
    metric.update(["yes"], ["yes"])
    with pytest.raises(ValueError, match=message):
        metric.update(preds, target)
    assert metric.compute()["accuracy"] == 1
    with pytest.raises(ValueError, match=message):
        pope(preds, target, parser)


@pytest.mark.parametrize("parser", FIVE)
@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (None, r"one per answer, of \('random', 'popular', 'adversarial'\), got None"),
        (["random"], "one entry per answer, got 1 for 2 answers"),
        ("random", "list with one entry per answer, got str"),
        (7, "list with one entry per answer, got int"),
        (["random", None], "texts, got NoneType at index 1"),
        (["random", "populr"], "got 'populr' at index 1"),
        (["random", "random, popular"], "got ' popular' at index 1"),
        (["", "random"], "got '' at index 0"),
    ],
)
def test_bad_categories_are_named_and_change_nothing(parser: PopeParser, categories: object, message: str) -> None:
    metric = POPE(parser, categories=KINDS)
    metric.update(["yes"], ["yes"], ["random"])
    with pytest.raises(ValueError, match=message):
        metric.update(["no", "no"], ["yes", "yes"], categories)
    assert metric.compute()["accuracy"] == metric.compute()["random/accuracy"] == 1


@pytest.mark.parametrize("categories", [["random"], "random", 7, ["random", None], ["", "random"], ["random,", "a"]])
def test_the_function_names_bad_categories(categories: object) -> None:
    with pytest.raises(ValueError, match="`categories`"):
        pope(["no", "no"], ["yes", "yes"], categories=categories)


def test_categories_that_were_not_named_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"make the metric as POPE\(categories"):
        POPE().update(["yes"], ["yes"], ["random"])


@pytest.mark.parametrize("names", ["random", [], {"random", "popular"}, ["random", "random"], ["a,b"], [""], [None]])
def test_bad_names_of_categories(names: object) -> None:
    with pytest.raises(ValueError, match="`categories`"):
        POPE(categories=names)


def test_unknown_parser_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'official', 'opera', 'vcd', 'lmms_eval', 'vlmevalkit'.*got 'oficial'"):
        POPE(parser="oficial")
    for function in (pope, pope_counts, pope_verdicts):
        with pytest.raises(ValueError, match="got 'oficial'"):
            function(["yes"], ["yes"], parser="oficial")
