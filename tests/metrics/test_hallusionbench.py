import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from realign_lightning.metrics.functional.hallusionbench import (
    ENTRY_WIDTH,
    SCORE_UNIT,
    HallusionCounts,
    HallusionRow,
    HallusionVerdict,
    _hallusionbench_compute,
    hallusionbench,
    hallusionbench_counts,
    hallusionbench_judge_prompt,
    hallusionbench_same_prompt,
    judge_same,
    judge_verdict,
    lmms_eval_answer,
    vlmevalkit_answer,
)
from realign_lightning.metrics.hallusionbench import HallusionBench
from tests.metrics._tester import Batch, MetricTester, assert_scores

INCORRECT, CORRECT, UNCLEAR = HallusionVerdict


def math(figure_id: str, question_id: str, gt_answer: str, set_id: str = "0") -> HallusionRow:
    """A visual dependent question; figure 0 is the original, the others are edited."""
    return HallusionRow("VD", "math", "1" if figure_id == "0" else "2", set_id, figure_id, question_id, gt_answer)


def chart(visual_input: str, gt_answer: str = "1", question_id: str = "0") -> HallusionRow:
    """A visual supplement question about no figure (0), the original (1) or an edited one (2)."""
    return HallusionRow("VS", "chart", visual_input, "3", visual_input, question_id, gt_answer)


FIRST: Batch = (
    ["Yes.", "No, never.", "I do not know.", "No."],
    [math("0", "0", "1"), math("0", "1", "0"), chart("0"), chart("1")],
)
SECOND: Batch = (
    ["Yes", "Yes indeed", "yes and no", "Yes."],
    [math("1", "0", "0"), math("1", "1", "1"), chart("2", "0"), math("0", "0", "1")],
)


class TestHallusionBench(MetricTester):
    """Official rules, answers read by rule.

    The second batch ends with the first question again, as a sampler pads. Verdicts, c correct, w wrong, u unclear:

    * first batch: math figure 0: c c; chart without a figure: u, which is correct; chart figure 1: w;
    * second batch: math figure 1: w c; chart figure 2: u, which is wrong; math figure 0, question 0 again: c.
    """

    takes_ids = False

    def make_metric(self) -> HallusionBench:
        return HallusionBench(variant="official", parser="vlmevalkit")

    def batches(self) -> list[Batch]:
        return [FIRST, SECOND]

    def reference(self, preds: Sequence[Any], target: Sequence[Any]) -> dict[str, float]:
        if len(preds) == 8:
            return self.of_both()
        return self.of_first() if target[0].figure_id == "0" else self.of_second()

    def of_first(self) -> dict[str, float]:
        """3 of 4 correct; pairs c, c and u w; figures: math 0 correct, chart 1 wrong, and no edited figure.

        Yes is right for 3 and said for 2 (math and the lenient chart), and the one wrong answer is to a "yes". It is
        a visual illusion, since without a figure the model was unsure.
        """
        shares = {"a_acc": 3 / 4, "q_acc": 2 / 3, "f_acc": 1 / 2, "easy": 2 / 3, "hard": 0}
        figures = {"consistency_inconsistent": 0, "consistency_wrong": 1 / 2, "figure_score": 1 / 2}
        bias = {"yes_bias_diff": (2 - 3) / 4, "yes_bias_fp": 0}
        diagnosis = {"language_hallucination": 0, "visual_illusion": 1, "mixed": 0, "undiagnosed": 0}
        return {**shares, **figures, **bias, **diagnosis, "unclear": 1 / 4, "unparsed": 1 / 4}

    def of_second(self) -> dict[str, float]:
        """2 of 4 correct; pairs c w, c and u; figures: math 0 c, math 1 w c, chart 2 u.

        Yes is right for 2 and counts as said for all 4. Both wrong answers are to a "no". Why is unknown: one
        needs ``same``, the other the answer without a figure.
        """
        shares = {"a_acc": 2 / 4, "q_acc": 1 / 3, "f_acc": 1 / 3, "easy": 1, "hard": 1 / 3}
        figures = {"consistency_inconsistent": 1 / 3, "consistency_wrong": 1 / 3, "figure_score": (1 + 1 / 2 + 0) / 3}
        bias = {"yes_bias_diff": (4 - 2) / 4, "yes_bias_fp": 1}
        diagnosis = {"language_hallucination": 0, "visual_illusion": 0, "mixed": 0, "undiagnosed": 1}
        return {**shares, **figures, **bias, **diagnosis, "unclear": 1 / 4, "unparsed": 1 / 4}

    def of_both(self) -> dict[str, float]:
        """The padded question counts once: 4 of 7 correct; pairs c w, c c and u w u; figures c c, w c, w and u.

        Easy pairs: c, c, u w; hard pairs: w, c, u. Yes is right for 4 and counts as said for 5; wrong answers are to
        "no", "yes" and "no". Both answers about charts are visual illusions; the one about math needs ``same``.
        """
        shares = {"a_acc": 4 / 7, "q_acc": 1 / 3, "f_acc": 1 / 4, "easy": 2 / 3, "hard": 1 / 3}
        figures = {"consistency_inconsistent": 1 / 4, "consistency_wrong": 2 / 4, "figure_score": (1 + 1 / 2) / 4}
        bias = {"yes_bias_diff": (5 - 4) / 7, "yes_bias_fp": 2 / 3}
        diagnosis = {"language_hallucination": 0, "visual_illusion": 1, "mixed": 0, "undiagnosed": 1 / 3}
        return {**shares, **figures, **bias, **diagnosis, "unclear": 2 / 7, "unparsed": 2 / 7}

    def test_states_are_integer_counts_that_no_checkpoint_holds(self) -> None:
        metric = self.filled().half()
        assert metric.state_dict() == {}
        assert [table.dtype for table in metric.table] == [torch.long, torch.long]
        assert_scores(metric.compute(), self.of_both())


def test_rules_of_the_variants_differ_for_questions_without_a_figure() -> None:
    """The answer without a figure holds neither word; the one about the figure is right.

    VLMEvalKit: wrong, and a figure of its own: 1 of 2 everywhere. lmms-eval: the answer counts as no, and no is right:
    all right. Official: unclear is correct, and it belongs to no figure: all right, one figure.
    """
    preds, target = ["It cannot be said.", "No."], [chart("0", "0"), chart("1", "0")]
    kit = hallusionbench(preds, target, "vlmevalkit")
    assert [kit[name].item() for name in ("a_acc", "q_acc", "f_acc")] == [0.5, 0, 0.5]
    lmms = hallusionbench(preds, target, "lmms_eval")
    assert [lmms[name].item() for name in ("a_acc", "q_acc", "f_acc")] == [1, 1, 1]
    official = HallusionCounts(*hallusionbench_counts(preds, target, "official", "vlmevalkit").sum(0).tolist())
    assert (official.correct, official.pairs_correct, official.figures, official.figures_correct) == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", True),
        ("no,it is not", False),  # the comma touches no blank, so it becomes one
        ("No, it is not", False),
        ("yes-no", None),  # two words
        ("yes -no", None),
        ("Yes.No", None),  # one word
        ("eyes, nose", None),
        ("**Yes**", None),  # asterisks are kept
        ("1,000? yes", True),
        ("a-yes 1,000", None),  # a comma within a number: marks vanish, "ayes" is left
        (". " * 32 + "yes.", None),  # only 32 periods are removed
        (". " * 31 + "yes.", True),
        ("", None),
    ],
)
def test_vlmevalkit_answer(answer: str, said: bool | None) -> None:
    assert vlmevalkit_answer(answer) is said


@pytest.mark.parametrize(("answer", "yes"), [("YES", True), ("eyes", True), ("no", False), ("", False)])
def test_lmms_eval_answer(answer: str, yes: bool) -> None:
    assert lmms_eval_answer(answer) is yes


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Correct", CORRECT),
        ("INCORRECT", INCORRECT),
        ("It is not correct.", CORRECT),
        ("correct, not incorrect", INCORRECT),
        ("unclear", UNCLEAR),
        ("42", UNCLEAR),
        ("", UNCLEAR),
    ],
)
def test_judge_verdict(reply: str, verdict: HallusionVerdict) -> None:
    assert judge_verdict(reply) is verdict


def test_a_judge_that_answers_nonsense_is_counted() -> None:
    """Two of four replies hold neither word, one of them is empty; both count as unclear, and so as wrong here."""
    target = [math("0", question, "1") for question in "0123"]
    scores = hallusionbench(["correct", "unclear", "", "Bonjour"], target, "official")
    assert [scores[name].item() for name in ("unparsed", "unclear", "a_acc")] == [2 / 4, 3 / 4, 1 / 4]


def test_verdicts_give_the_scores_of_the_replies_they_are_read_from() -> None:
    replies, target = ["correct", "incorrect", "unclear", "correct"], FIRST[1]
    read = hallusionbench(replies, target, "official")
    assert hallusionbench([judge_verdict(reply) for reply in replies], target, "official") == read
    assert hallusionbench([1, 0, 2, 1], target, "vlmevalkit")["a_acc"] == 0.5


def diagnosis(original: int | None, verdict: int, same: bool | None, edited: HallusionRow) -> str:
    """What the wrong answer about an edited figure counts as."""
    if original is None:
        counts = hallusionbench_counts([verdict], [edited], "official", same=[same])
    else:
        first = chart("0") if edited.category == "VS" else math("0", "0", "1")
        counts = hallusionbench_counts([original, verdict], [first, edited], "official", same=[None, same])
    row = HallusionCounts(*counts[-1].tolist())
    return " ".join(name for name in ("lh", "vi", "mix", "undiagnosed") if getattr(row, name))


def test_diagnosis_of_visual_dependent_questions() -> None:
    """The official tree: always a visual illusion, but for the same wrong answer as for the original, got right."""
    edited = math("1", "0", "0")
    for original, verdict, same in product((0, 1, 2), (0, 2), (True, False)):
        mixed = original == CORRECT and verdict == INCORRECT and same
        assert diagnosis(original, verdict, same, edited) == ("mix" if mixed else "vi")
        assert diagnosis(original, CORRECT, same, edited) == ""
    assert diagnosis(CORRECT, INCORRECT, None, edited) == "undiagnosed"
    assert diagnosis(None, INCORRECT, True, edited) == "undiagnosed"
    assert diagnosis(None, UNCLEAR, True, edited) == "vi"
    assert diagnosis(None, UNCLEAR, True, math("0", "0", "1")) == "vi"


@pytest.mark.parametrize(
    ("original", "verdict", "same", "shown", "expected"),
    [
        # Wrong without a figure: language hallucination where the answer stays, else both.
        (0, 0, True, "1", "lh"),
        (0, 0, False, "1", "mix"),
        (0, 2, True, "2", "mix"),
        (0, 0, None, "2", "undiagnosed"),
        # Unsure without a figure: the figure is not read.
        (2, 0, True, "1", "vi"),
        (2, 2, False, "2", "vi"),
        # Right without a figure: the figure is not read, or, if it contradicts what is known, not looked at.
        (1, 2, True, "2", "vi"),
        (1, 0, True, "1", "vi"),
        (1, 0, True, "2", "lh"),
        (1, 0, False, "2", "vi"),
        (1, 0, None, "2", "undiagnosed"),
        (1, 0, None, "1", "vi"),
        (None, 0, True, "1", "undiagnosed"),
        (0, 1, True, "1", ""),
    ],
)
def test_diagnosis_of_visual_supplement_questions(
    original: int | None, verdict: int, same: bool | None, shown: str, expected: str
) -> None:
    assert diagnosis(original, verdict, same, chart(shown)) == expected


def test_shares_of_the_diagnosis() -> None:
    """Chart: wrong without a figure (lh), then the same (lh), then unclear (mix): 2 and 1 of 3 in one mixed pair."""
    counts = hallusionbench_counts(
        [0, 0, 2], [chart("0"), chart("1"), chart("2")], "official", same=[None, True, False]
    )
    total = HallusionCounts(*counts.sum(0).tolist())
    assert (total.pairs_lh, total.pairs_vi, total.pairs_mix) == (0, 0, 1)
    assert (total.alone_lh, total.alone_vi, total.alone_mix) == (1, 1, 1)
    scores = _hallusionbench_compute(counts.sum(0))
    shares = [scores[name].item() for name in ("language_hallucination", "visual_illusion", "mixed", "undiagnosed")]
    assert shares == pytest.approx([2 / 3, 0, 1 / 3, 0])


def test_categories() -> None:
    """Of the math questions 1 of 2 is right, in one figure; the one about charts is right."""
    target = [math("0", "0", "1"), math("0", "1", "1"), chart("1")]
    scores = hallusionbench(["yes", "no", "yes"], target, per_category=True)
    split = {name: value.item() for name, value in scores.items() if "/" in name}
    wrong, right = {"a_acc": 0.5, "q_acc": 0.5, "f_acc": 0.0}, {"a_acc": 1.0, "q_acc": 1.0, "f_acc": 1.0}
    expected = {"VD": wrong, "VD_math": wrong, "VS": right, "VS_chart": right}
    assert split == {
        f"{name}/{score}": value for name, of_split in expected.items() for score, value in of_split.items()
    }
    metric = HallusionBench(per_category=True)
    assert metric(["yes", "no", "yes"], target) == scores


def test_counts_of_sets_add_up_and_broadcast() -> None:
    """Groups lie within a set of images, so its rows can be drawn with any weight: here set 1 twice, set 0 never."""
    target = [math(figure, question, "1", set_id) for set_id in "01" for figure in "01" for question in "01"]
    preds = ["yes"] * 4 + ["yes", "no", "yes", "yes"]
    counts = hallusionbench_counts(preds, target)
    assert counts.dtype == torch.long
    assert counts.shape == (8, len(HallusionCounts._fields))
    sets = torch.stack([counts[[row.cluster == ("VD", "math", name) for row in target]].sum(0) for name in "01"])
    resampled = torch.stack([torch.stack([sets.sum(0), 2 * sets[1]])])
    scores = _hallusionbench_compute(resampled)
    assert scores["a_acc"].tolist() == [[7 / 8, 3 / 4]]
    assert scores["q_acc"].tolist() == [[3 / 4, 1 / 2]]
    assert scores["f_acc"].tolist() == [[3 / 4, 1 / 2]]


def test_the_figure_score_is_exact_and_survives_large_figures() -> None:
    """1 of 3, then 1 of 29, which is no whole number of units, to a tenth of a billionth."""
    three = hallusionbench(["yes", "no", "no"], [math("0", str(number), "1") for number in range(3)])
    assert three["figure_score"].item() == 1 / 3
    many = hallusionbench(["yes"] + ["no"] * 28, [math("0", str(number), "1") for number in range(29)])
    assert many["figure_score"].item() == pytest.approx(1 / 29, abs=1e-9)
    assert all(SCORE_UNIT % size == 0 for size in range(1, 25))


def test_conflicting_duplicates_count_with_the_worst_verdict_in_any_order() -> None:
    target = [math("0", "0", "1")] * 3
    for preds in (["yes", "no", "Well"], ["Well", "yes", "no"], ["no", "Well", "yes"]):
        with pytest.warns(UserWarning, match="1 questions came more than once"):
            scores = hallusionbench(preds, target)
        assert [scores[name].item() for name in ("a_acc", "unclear", "unparsed")] == [0, 0, 0]
    with pytest.warns(UserWarning, match="more than once"):
        assert hallusionbench(["yes", "Well"], target[:2])["unclear"].item() == 1


@pytest.mark.parametrize(
    ("agreements", "expected"),
    [((True, False), (1, 0, 0)), ((True, None), (0, 0, 1)), ((False, None), (0, 0, 1)), ((True, True), (0, 1, 0))],
)
@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_verdicts_the_unknown_then_the_other_answer_counts(
    agreements: tuple[bool | None, ...], expected: tuple[int, ...], order: int
) -> None:
    """Figure 0 is right and figure 1 wrong: a mix if the answer stayed the same, else a visual illusion."""
    preds, target = ["yes", "yes", "yes"], [math("0", "0", "1"), math("1", "0", "0"), math("1", "0", "0")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = hallusionbench(preds, target, "official", "vlmevalkit", same=[None, *agreements[::order]])
    names = ("visual_illusion", "mixed", "undiagnosed")
    assert tuple(scores[name].item() for name in names) == expected


def test_the_row_of_a_dropped_duplicate_holds_zeros() -> None:
    counts = hallusionbench_counts(["yes", "yes"], [math("0", "0", "1")] * 2)
    assert counts[0].any()
    assert not counts[1].any()


def gathering(other: torch.Tensor) -> Any:
    """What the gathering of another process's table looks like from here."""

    def gather(mine: torch.Tensor, group: object) -> list[torch.Tensor]:
        assert mine.dtype == other.dtype
        if mine.ndim == 1:
            return [mine, torch.zeros_like(mine)]
        assert mine.shape[1:] == other.shape[1:]
        return [mine, other]

    return gather


@pytest.mark.parametrize("sees_nothing", [True, False])
def test_a_process_that_saw_nothing_gathers_and_is_gathered(sees_nothing: bool) -> None:
    filled = TestHallusionBench().filled()
    everything, nothing = torch.cat(filled.table), torch.zeros(0, ENTRY_WIDTH, dtype=torch.long)
    metric = TestHallusionBench().make_metric() if sees_nothing else filled
    metric.sync(dist_sync_fn=gathering(everything if sees_nothing else nothing), distributed_available=lambda: True)
    assert torch.equal(metric.table, everything)
    metric.unsync()
    assert sum(len(table) for table in metric.table) == (0 if sees_nothing else 8)


def test_nothing_gives_zeros() -> None:
    assert all(value == 0 for value in hallusionbench([], []).values())


ROW = math("0", "0", "1")


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (["yes"], [], "got 1 and 0"),
        ([1], [], "same length, got 1 verdicts"),
        ("yes", [ROW], "`preds` to be a list"),
        (["yes"], "yes", "`target` to be a list"),
        ([1], "yes", "to be lists of the same length"),
        ([None], [ROW], "texts, got NoneType at index 0"),
        ([1, "yes"], [ROW, ROW], "texts alone, or verdicts alone .* got 'yes' at index 1"),
        ([3], [ROW], "got 3 at index 0"),
        ([True], [ROW], "got True at index 0"),
        (["yes"], [tuple(ROW)], "HallusionRow, got tuple at index 0"),
        (["yes"], [ROW._replace(category="XX")], r"target\[0\].category` to be one of \('VD', 'VS'\), got 'XX'"),
        (["yes"], [ROW._replace(subcategory="chart")], r"subcategory` to be one of .* got 'chart'"),
        (["yes"], [ROW._replace(gt_answer="yes")], r"gt_answer` to be one of \('0', '1'\), got 'yes'"),
        (["yes"], [ROW._replace(gt_answer="2")], "got '2'"),
        (["yes"], [ROW._replace(visual_input="3")], "visual_input` to be one of"),
        (["yes"], [ROW._replace(visual_input="0")], "if and only if it is figure '0' of a VS question"),
        (["yes"], [chart("1")._replace(figure_id="0")], "if and only if"),
        (["yes"], [ROW._replace(set_id="-1")], "set_id` to be a whole number as text, got '-1'"),
        (["yes"], [ROW._replace(question_id="9" * 20)], "question_id` to be a whole number"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(preds: Any, target: Any, message: str) -> None:
    metric = TestHallusionBench().filled()
    with pytest.raises(ValueError, match=message):
        metric.update(preds, target)
    assert_scores(metric.compute(), TestHallusionBench().of_both())


@pytest.mark.parametrize(("same", "message"), [([], "`same` and `target` of the same length"), (["1"], "got '1'")])
def test_bad_same_is_named(same: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hallusionbench(["yes"], [ROW], same=same)


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\('official', 'lmms_eval', 'vlmevalkit'\), got 'oficial'"):
        HallusionBench(variant="oficial")
    with pytest.raises(ValueError, match=r"None or one of \('judge', .*got 'gpt'"):
        hallusionbench(["yes"], [ROW], parser="gpt")


def test_prompts_hold_what_is_judged_and_name_the_replies_that_are_read() -> None:
    prompt = hallusionbench_judge_prompt("Is {it} red?", "It is blue.", "Yes.")
    for text in ("Is {it} red?", "It is blue.", "Yes.", "correct", "incorrect", "unclear"):
        assert text in prompt
    prompt = hallusionbench_same_prompt("Yes, it is.", "No.")
    for text in ("Yes, it is.", "No.", "same", "different"):
        assert text in prompt
    assert judge_same("SAME")
    assert not judge_same("Different.")
