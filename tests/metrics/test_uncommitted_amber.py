"""The reference's responses, answers and counters: may be read but not committed.

Collected only where they lie beside the project, and AMBER's lists of words too (conftest.py); test_amber.py covers
every rule without them.
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from realign_lightning.metrics.amber import AMBER
from realign_lightning.metrics.functional.amber import (
    AmberChecker,
    amber_discriminative,
    amber_discriminative_counts,
    amber_generative,
    amber_generative_counts,
    exact_similarity,
)
from tests.metrics import _oracles

ORACLE = json.loads(_oracles.uncommitted("public_amber.json").read_text())
DATA = _oracles.AMBER_DATA
WORDS = {
    "relation": json.loads((DATA / "relation.json").read_text()),
    "safe_words": (DATA / "safe_words.txt").read_text().splitlines(),
}
ROWS = ORACLE["generative"]["rows"]
RESPONSES = [row["response"] for row in ROWS]
QUESTIONS = ORACLE["discriminative"]["rows"]
ANSWERS = [row["response"] for row in QUESTIONS]

# The reference's names of our columns.
NOUN_COUNTERS = (
    *("chair_num", "chair_score", "safe_cover_num", "safe_cover_score"),
    *("hallu_cover_num", "hallu_cover_score", "non_hallu_num", "non_hallu_score"),
)
ANSWER_COUNTERS = ("qa_correct_num", "qa_correct_score", "qa_no_num", "qa_ans_no_num", "qa_ans_no_score")
KINDS = ("ha_", "as_", "an_", "aa_", "asso_")
PREFIXES = {"Descriminative Task": "", "Exsitence": "existence_"}
SIMILAR = {frozenset(pair[:2]): pair[2] for pair in ORACLE["generative"]["similarity_table"]}


def by_table(first: str, second: str) -> float:
    return 1.0 if first == second else SIMILAR.get(frozenset((first, second)), 0.0)


def checker(name: str) -> AmberChecker:
    nouns = {row["response"]: row["nouns"] for row in ROWS}
    return AmberChecker(
        WORDS["relation"],
        WORDS["safe_words"],
        similarity={"exact": exact_similarity, "table": by_table}[name],
        nouns=lambda response: nouns[response],
        threshold=ORACLE["generative"]["similarity_threshold"],
    )


def assert_counters(ours: Sequence[int], theirs: dict[str, float], names: Sequence[str], prefix: str = "") -> None:
    """The reference's counters of denominators, "_num", start at 0.001."""
    for count, name in zip(ours, names, strict=True):
        start = 0.001 if name.endswith("_num") else 0
        assert count + start == pytest.approx(theirs[prefix + name], abs=1e-9), prefix + name


def assert_printed(scores: dict[str, torch.Tensor], expected: dict[str, dict[str, float]]) -> None:
    for title, numbers in expected.items():
        prefix = "" if title == "Generative Task" else PREFIXES.get(title, f"{title.lower()}_")
        for name, number in numbers.items():
            assert round(100 * scores[prefix + name.lower()].item(), 1) == number, (title, name)


@pytest.mark.parametrize("similarity", ["exact", "table"])
def test_every_description_is_counted_as_by_the_reference(similarity: str) -> None:
    counts = amber_generative_counts(RESPONSES, ROWS, checker(similarity))
    for row, ours in zip(ROWS, counts.tolist(), strict=True):
        assert_counters(ours, row[f"counters_{similarity}"], NOUN_COUNTERS)
    assert_counters(counts.sum(0).tolist(), ORACLE["generative"]["expected"][similarity]["counters"], NOUN_COUNTERS)


@pytest.mark.parametrize("similarity", ["exact", "table"])
def test_descriptions_score_as_the_reference_prints_and_lmms_eval_computes(similarity: str) -> None:
    scores = amber_generative(RESPONSES, ROWS, checker(similarity))
    assert_printed(scores, ORACLE["generative"]["expected"][similarity]["printed"])
    scores = amber_generative(RESPONSES, ROWS, checker(similarity), eps=0.001 * len(ROWS))
    for name, expected in ORACLE["generative"]["lmms_eval"][similarity].items():
        assert 100 * scores[name].item() == pytest.approx(expected, abs=1e-9)


def test_answers_are_counted_and_scored_as_by_the_reference() -> None:
    counts = amber_discriminative_counts(ANSWERS, QUESTIONS).sum(0).reshape(len(KINDS), -1)
    expected: dict[str, Any] = ORACLE["discriminative"]["expected"]
    for prefix, ours in [*zip(KINDS, counts.tolist(), strict=True), ("", counts.sum(0).tolist())]:
        assert_counters(ours[:-1], expected["counters"], ANSWER_COUNTERS, prefix)
        assert ours[ANSWER_COUNTERS.index("qa_ans_no_score")] == expected["counters"][f"{prefix}qa_no_score"]
    assert counts.sum(0)[-1] == sum(answer not in ("Yes", "No") for answer in ANSWERS)
    assert_printed(amber_discriminative(ANSWERS, QUESTIONS), expected["printed"])


def test_a_run_of_both_parts_scores_as_the_reference_prints() -> None:
    metric = AMBER(checker=checker("table"))
    descriptions = [row | {"type": "generative"} for row in ROWS]
    metric.update([*ANSWERS[:50], *RESPONSES, *ANSWERS[50:]], [*QUESTIONS[:50], *descriptions, *QUESTIONS[50:]])
    printed = ORACLE["all_type_a_table_similarity"]["printed"]
    assert_printed(metric.compute(), printed)
    chair, f1 = printed["Generative Task"]["CHAIR"], printed["Descriminative Task"]["F1"]
    assert 100 * metric.compute()["amber"].item() == pytest.approx((100 - chair + f1) / 2, abs=0.05)
