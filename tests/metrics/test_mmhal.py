from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realign_lightning.metrics.functional.mmhal import (
    MMHAL_TYPES,
    _mmhal_compute,
    mmhal,
    mmhal_counts,
    mmhal_informativeness,
    mmhal_judge_prompt,
    mmhal_rating,
)
from realign_lightning.metrics.mmhal import MMHal
from tests.metrics import _oracles
from tests.metrics._tester import Batch, MetricTester

ORACLE = _oracles.committed("public_mmhal.json")
REPLIES, EXPECTED = ORACLE["judge_replies"], ORACLE["expected"]


class TestMMHal(MetricTester):
    def make_metric(self) -> MMHal:
        return MMHal()

    def batches(self) -> list[Batch]:
        return [(REPLIES[start : start + 24], list(range(start, start + 24))) for start in range(0, 96, 24)]

    def reference(self, preds: Sequence[Any], target: Sequence[Any]) -> dict[str, float]:
        """NumPy's means of what the reference gave for each question; unparsed are the replies that stand for 0."""
        chosen = {name: np.array(EXPECTED[name])[list(target)] for name in ("scores", "hallucination")}
        by_type = {
            f"score_{name}": chosen["scores"][np.array(target) % 8 == number].mean()
            for number, name in enumerate(MMHAL_TYPES)
        }
        return {
            "average_score": chosen["scores"].mean(),
            "hallucination_rate": chosen["hallucination"].mean(),
            "informativeness": np.array(EXPECTED["rlaifv_informativeness_per_item"])[list(target)].mean() / 3,
            "unparsed": sum(not one_rating(reply) for reply in preds) / len(preds),
            **by_type,
        }

    def test_class_attributes(self) -> None:
        metric = self.make_metric()
        assert (metric.is_differentiable, metric.full_state_update, metric.higher_is_better) == (False, False, True)
        assert (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 6.0)


def one_rating(reply: str) -> bool:
    """Whether what follows each "rating: " is one and the same digit up to 6, by another way than the package's."""
    found = {part[:1] for part in reply.lower().split("rating: ")[1:]}
    return len(found) == 1 and found < set("0123456")


def test_every_reply_agrees_with_the_reference() -> None:
    ratings = [mmhal_rating(reply) for reply in REPLIES]
    assert [rating or 0 for rating in ratings] == EXPECTED["scores"]
    assert [mmhal_informativeness(rating) for rating in ratings] == EXPECTED["rlaifv_informativeness_per_item"]
    hallucinated = mmhal_counts(REPLIES).reshape(96, 8, 8).sum(1)[:, [0, 1, 2, 7]].sum(1)
    assert hallucinated.tolist() == EXPECTED["hallucination"]


def test_aggregates_agree_with_the_reference() -> None:
    scores = mmhal(REPLIES)
    assert scores["average_score"].item() == pytest.approx(EXPECTED["average_score"], abs=1e-9)
    assert scores["hallucination_rate"].item() == pytest.approx(EXPECTED["hallucination_rate"], abs=1e-9)
    share = EXPECTED["rlaifv_mean_informativeness_x100"] / 100
    assert scores["informativeness"].item() == pytest.approx(share, abs=1e-9)
    by_type = [scores[f"score_{name}"].item() for name in MMHAL_TYPES]
    assert by_type == pytest.approx(EXPECTED["average_per_type_i_mod_8"], abs=1e-9)
    assert EXPECTED["printed"] == [
        f"Average score: {scores['average_score']:.2f}",
        f"Hallucination rate: {scores['hallucination_rate']:.2f}",
        "Average score for each question type: " + ",".join(str(round(score, 2)) for score in by_type),
    ]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("RATING: 0/6", 0),
        ("Rating: 4. Rating: 4.", 4),
        ("Rating: 4 (not Rating: 0)", None),
        ("Rating: 50", 5),
        ("Rating: 7", None),
        ("Rating:  6", None),
        ("**Rating:** 4", None),
        ("Rating - 6", None),
        ("I would rate it 3.", None),
        ("", None),
    ],
)
def test_mmhal_rating(reply: str, rating: int | None) -> None:
    assert mmhal_rating(reply) == rating


def test_types_by_name_and_by_number() -> None:
    """6 and 2 for comparison (question 10 is of type 10 mod 8 = 2), 0 for an unread reply about counting."""
    scores = mmhal(["Rating: 6", "Rating: 2", "Who knows?"], ["comparison", 10, "counting"])
    assert [scores[f"score_{name}"].item() for name in MMHAL_TYPES] == [0, 0, 4, 0, 0, 0, 0, 0]
    assert scores["average_score"].item() == pytest.approx(8 / 3)
    assert scores["hallucination_rate"].item() == pytest.approx(2 / 3)
    assert scores["informativeness"].item() == pytest.approx((3 + 2 + 0) / 9)
    assert scores["unparsed"].item() == pytest.approx(1 / 3)


def test_counts_add_up_and_broadcast() -> None:
    """Replies 6, 1 and 4; drawn as (6, 1) and as (4, 4), the means are 3.5 and 4, the rates 1/2 and 0."""
    counts = mmhal_counts(["Rating: 6", "Rating: 1", "Rating: 4"])
    assert counts.dtype == torch.long
    assert counts.shape == (3, 64)
    assert counts.sum(1).tolist() == [1, 1, 1]
    draws = counts[torch.tensor([[0, 1], [2, 2]])].sum(1)
    scores = _mmhal_compute(draws.unsqueeze(0))
    assert scores["average_score"].tolist() == [[3.5, 4]]
    assert scores["hallucination_rate"].tolist() == [[0.5, 0]]
    assert scores["score_comparison"].tolist() == [[0, 4]]


def test_nothing_gives_zeros() -> None:
    assert all(value == 0 for value in mmhal([]).values())


def test_a_judge_that_answers_nonsense_is_counted() -> None:
    """Nothing is understood: every reply counts as 0 and as hallucination."""
    scores = mmhal(["", "?!", "Rating: N"])
    assert [scores[name] for name in ("average_score", "hallucination_rate", "unparsed")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (["Rating: 1"], [], "got 1 and 0"),
        ("Rating: 1", [0], "`preds` to be a list"),
        ([4], [0], "texts, got int at index 0"),
        (["Rating: 1"], "other", "`target` to be a list"),
        (["Rating: 1"], ["others"], r"types out of \('attribute', .*got 'others' at index 0"),
        (["Rating: 1"], [-1], "from 0, .*got -1"),
        (["Rating: 1"], [True], "got True"),
        (["Rating: 1"], [None], "got None"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(preds: Any, target: Any, message: str) -> None:
    metric = MMHal()
    metric.update(["Rating: 5"], [0])
    with pytest.raises(ValueError, match=message):
        metric.update(preds, target)
    assert metric.compute()["average_score"] == 5


def test_the_prompt_holds_what_is_rated_and_no_rating() -> None:
    prompt = mmhal_judge_prompt("What {colour}?", ["Dog", "Cat"], "A black dog.", "A white {} cat.")
    for text in ("Dog, Cat", "What {colour}?", "A black dog.", "A white {} cat.", '"Rating: N"'):
        assert text in prompt
    assert mmhal_rating(prompt) is None


def test_a_prompt_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("{}|{}|{}|{}|{end}")
    assert mmhal_judge_prompt("q", ["a", "b"], "right", "said {}", file) == "a, b|q|right|said {}|{end}"
    file.write_text("{} {} {}")
    with pytest.raises(ValueError, match=r"to hold '\{\}' 4 times .*, got 3"):
        mmhal_judge_prompt("q", ["a"], "right", "said", file)
    with pytest.raises(FileNotFoundError):
        mmhal_judge_prompt("q", ["a"], "right", "said", tmp_path / "none.txt")
