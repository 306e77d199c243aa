"""Rows of the official question file, which may be read but not committed; every expected number by a reference.

Collected only where they lie beside the project (conftest.py); test_hallusionbench.py covers every rule without them.
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from realign_lightning.metrics.functional.hallusionbench import (
    SCORE_UNIT,
    HallusionCounts,
    HallusionRow,
    hallusionbench,
    hallusionbench_counts,
    vlmevalkit_answer,
)
from realign_lightning.metrics.hallusionbench import HallusionBench
from tests.metrics import _oracles

ORACLE = json.loads(_oracles.uncommitted("public_hallusionbench.json").read_text())
CASES = {
    "all": (ORACLE["rows"], ORACLE["expected"]),
    "small": ([ORACLE["rows"][index] for index in ORACLE["small"]["row_indices"]], ORACLE["small"]["expected"]),
}
ACCURACIES = {"a_acc": "aAcc", "q_acc": "qAcc", "f_acc": "fAcc"}

Rows = Sequence[dict[str, str]]


def questions(rows: Rows) -> list[HallusionRow]:
    return [HallusionRow(*(row[name] for name in HallusionRow._fields)) for row in rows]


def numbers(rows: Rows, name: str) -> list[int]:
    return [int(row[name]) for row in rows]


def answers(rows: Rows) -> list[str]:
    return [row["model_prediction"] for row in rows]


def with_image(rows: Rows) -> Rows:
    return [row for row in rows if row["visual_input"] != "0"]


def official(rows: Rows) -> dict[str, torch.Tensor]:
    verdicts = numbers(rows, "gpt4v_output_gpt_check")
    return hallusionbench(verdicts, questions(rows), "official", same=numbers(rows, "same"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", ["all", "VD", "VS"])
def test_official_counts(case: str, block: str) -> None:
    rows, expected = CASES[case]
    of_block = [row for row in rows if block in ("all", row["category"])]
    verdicts = numbers(of_block, "gpt4v_output_gpt_check")
    counts = hallusionbench_counts(verdicts, questions(of_block), "official", same=numbers(of_block, "same"))
    ours = HallusionCounts(*counts.sum(0).tolist())
    theirs = expected["official_gpt_judged"][block]
    pairs = theirs["pair_all"]
    assert (ours.questions, ours.correct) == (theirs["per_question"]["total"], theirs["per_question"]["correct"])
    assert {"LH": ours.alone_lh, "VI": ours.alone_vi, "Mix": ours.alone_mix}.items() <= theirs["per_question"].items()
    assert (ours.questions, ours.pairs, ours.pairs_correct) == (pairs["total_q"], pairs["total"], pairs["correct"])
    assert {"LH": ours.pairs_lh, "VI": ours.pairs_vi, "Mix": ours.pairs_mix}.items() <= pairs.items()
    assert {"LH_cg": ours.lh, "VI_cg": ours.vi, "Mix_cg": ours.mix}.items() <= pairs.items()
    for kind in ("easy", "hard"):
        names = {f"{kind}_questions": "total_q", f"{kind}_pairs": "total", f"{kind}_correct": "correct"}
        for name, reference in names.items():
            assert getattr(ours, name) == theirs[f"pair_{kind}"][reference]
    figure = theirs["figure"]
    assert (ours.figures, ours.figures_correct, ours.figures_wrong) == (
        figure["total"],
        figure["correct"],
        figure["wrong"],
    )
    assert ours.figure_score / (SCORE_UNIT * ours.figures) == pytest.approx(figure["score"], abs=1e-9)
    assert ours.undiagnosed == 0


@pytest.mark.parametrize("case", CASES)
def test_official_leaderboard(case: str) -> None:
    rows, expected = CASES[case]
    scores, theirs = official(rows), expected["official_gpt_judged"]
    names = {**ACCURACIES, "easy": "easy_aAcc", "hard": "hard_aAcc"}
    for name, reference in names.items():
        assert round(100 * scores[name].item(), 4) == theirs["leaderboard"][reference]
    assert scores["yes_bias_diff"].item() == pytest.approx(theirs["yes_ratio_stats"]["diff"], abs=1e-9)
    assert scores["yes_bias_fp"].item() == pytest.approx(theirs["yes_ratio_stats"]["fp"], abs=1e-9)
    figure = theirs["all"]["figure"]
    for name, count in (("consistency_inconsistent", "inconsistent"), ("consistency_wrong", "wrong")):
        assert scores[name].item() == pytest.approx(figure[count] / figure["total"], abs=1e-9)
    assert scores["figure_score"].item() == pytest.approx(figure["score"], abs=1e-9)


@pytest.mark.parametrize(
    ("case", "name", "chosen"),
    [
        ("all", "lmms_eval_intern_all_rows", list),
        ("all", "lmms_eval_intern_image_rows_only", with_image),
        ("small", "lmms_eval_intern", list),
    ],
)
def test_lmms_eval(case: str, name: str, chosen: Any) -> None:
    rows, expected = CASES[case]
    scores = hallusionbench(answers(chosen(rows)), questions(chosen(rows)), "lmms_eval")
    for ours, theirs in ACCURACIES.items():
        assert scores[ours].item() == pytest.approx(expected[name][theirs], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "chosen"), [("vlmevalkit_image_rows_only", with_image), ("vlmevalkit_all_rows", list)]
)
def test_vlmevalkit(name: str, chosen: Any) -> None:
    rows, expected = chosen(ORACLE["rows"]), ORACLE["expected"][name]
    words = {True: "Yes", False: "No", None: "Unknown"}
    assert [words[vlmevalkit_answer(answer)] for answer in answers(rows)] == expected["extracted"]
    scores = hallusionbench(answers(rows), questions(rows), "vlmevalkit", per_category=True)
    assert {key.partition("/")[0] for key in scores if "/" in key} == set(expected["rating"]) - {"Overall"}
    for split, rating in expected["rating"].items():
        for ours, theirs in ACCURACIES.items():
            score = scores[ours if split == "Overall" else f"{split}/{ours}"]
            assert 100 * score.item() == pytest.approx(rating[theirs], abs=1e-9)


def test_batches_with_padding_give_the_scores_of_the_whole() -> None:
    rows = ORACLE["rows"]
    metric = HallusionBench("official")
    for start in range(0, len(rows) + 50, 50):
        batch = (rows + rows)[start : start + 50]
        metric.update(numbers(batch, "gpt4v_output_gpt_check"), questions(batch), numbers(batch, "same"))
    assert metric.compute() == official(rows)
