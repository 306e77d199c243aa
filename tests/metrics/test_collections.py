"""Metrics in a MetricCollection, which takes those whose states are equal after the first batch for one metric."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from realign_lightning.metrics import AMBER, CHAIR, POPE, HallusionBench, HallusionRow, Lexicon
from realign_lightning.metrics.functional.amber import AmberChecker, exact_similarity
from realign_lightning.metrics.functional.hallusionbench import HallusionParser
from realign_lightning.metrics.functional.pope import PopeParser

Batch = tuple[list[Any], list[Any]]
Scores = dict[str, float]


def equal_similarity(first: str, second: str) -> float:
    """Takes every word for every other."""
    return float(bool(first and second))


def checker(similarity: Callable[[str, str], float], words: Sequence[str] = ()) -> AmberChecker:
    return AmberChecker({"dog": [], "cat": []}, words, similarity=similarity, nouns=str.split)


def figure(number: str, right: str) -> HallusionRow:
    return HallusionRow("VS", "chart", number, "3", number, "0", right)


POPE_BATCHES: list[Batch] = [(["yes", "no"], ["yes", "no"]), (["isn't", "know no", "NO", "no."], ["no"] * 4)]
POPE_ACCURACIES: dict[PopeParser, float] = {
    "official": 4 / 6,  # "isn't" and "NO" are read as yes
    "opera": 6 / 6,
    "vcd": 5 / 6,  # "isn't" does not hold "no"
    "lmms_eval": 3 / 6,  # only "NO" is exactly no
    "vlmevalkit": 5 / 6,  # "isn't" holds neither word
}
CHAIR_BATCHES: list[Batch] = [(["a dog"], [{"dog"}]), (["a pup and a cat"], [{"dog"}])]
NAMED, PLAIN = Lexicon({"dog": ["pup"], "cat": []}), Lexicon({"dog": [], "cat": []})
AMBER_BATCHES: list[Batch] = [
    (["dog"], [{"type": "generative", "truth": ["dog"], "hallu": []}]),
    (["dog cat"], [{"type": "generative", "truth": ["dog"], "hallu": []}]),
]
HALLUSION_BATCHES: list[Batch] = [
    (["Yes."], [figure("0", "1")]),
    (["Eyes.", "It is not said."], [figure("1", "1"), figure("2", "1")]),
]

Case = tuple[dict[str, Callable[[], Metric]], list[Batch], str, dict[str, float]]

CASES: dict[str, Case] = {
    "parsers of POPE": (
        {parser: lambda parser=parser: POPE(parser) for parser in get_args(PopeParser)},
        POPE_BATCHES,
        "accuracy",
        dict(POPE_ACCURACIES),
    ),
    # Without the pup, the one mention that is left in the second caption is the cat.
    "lexicons of CHAIR": (
        {"named": lambda: CHAIR(synonyms=NAMED), "plain": lambda: CHAIR(synonyms=PLAIN)},
        CHAIR_BATCHES,
        "chair_i",
        {"named": 1 / 3, "plain": 1 / 2},
    ),
    "checkers of AMBER": (
        {
            "strict": lambda: AMBER("generative", checker(exact_similarity), eps=0),
            "lenient": lambda: AMBER("generative", checker(equal_similarity), eps=0),
            "safe": lambda: AMBER("generative", checker(exact_similarity, ["cat"]), eps=0),
        },
        AMBER_BATCHES,
        "chair",
        {"strict": 1 / 3, "lenient": 0, "safe": 0},
    ),
    # lmms-eval takes "Eyes." for yes; VLMEvalKit finds neither word.
    "parsers of HallusionBench": (
        {
            parser: lambda parser=parser: HallusionBench("vlmevalkit", parser)
            for parser in get_args(HallusionParser)
            if parser != "judge"
        },
        HALLUSION_BATCHES,
        "a_acc",
        {"lmms_eval": 2 / 3, "vlmevalkit": 1 / 3},
    ),
    # One hallucinated noun of three: 1 / (3 + eps).
    "eps of AMBER": (
        {
            "exact": lambda: AMBER("generative", checker(exact_similarity), eps=0),
            "large": lambda: AMBER("generative", checker(exact_similarity), eps=1),
        },
        AMBER_BATCHES,
        "chair",
        {"exact": 1 / 3, "large": 1 / 4},
    ),
    # What is unclear without an image is right for the official rules, and wrong for VLMEvalKit's.
    "variants of HallusionBench": (
        {
            "official": lambda: HallusionBench("official", "vlmevalkit"),
            "vlmevalkit": lambda: HallusionBench("vlmevalkit"),
        },
        [(["Yes."], [figure("1", "1")]), (["Perhaps."], [figure("0", "1")])],
        "a_acc",
        {"official": 2 / 2, "vlmevalkit": 1 / 2},
    ),
    "one metric twice": (
        {"first": lambda: POPE("opera"), "second": lambda: POPE("opera")},
        POPE_BATCHES,
        "accuracy",
        {"first": 1, "second": 1},
    ),
}


def collection(name: str) -> MetricCollection:
    return MetricCollection({key: make() for key, make in CASES[name][0].items()})


def feed(metrics: MetricCollection, name: str, batches: slice = slice(None)) -> MetricCollection:
    for preds, target in CASES[name][1][batches]:
        metrics.update(preds, target)
    return metrics


def assert_own(metrics: MetricCollection, name: str) -> None:
    _, _, score, expected = CASES[name]
    scores = metrics.compute()
    for key, value in expected.items():
        assert scores[f"{key}_{score}"].item() == pytest.approx(value, abs=1e-9), key


@pytest.mark.parametrize("name", CASES)
def test_every_metric_counts_by_its_own_rule(name: str) -> None:
    assert_own(feed(collection(name), name), name)


@pytest.mark.parametrize("name", CASES)
def test_after_a_reset(name: str) -> None:
    metrics = feed(collection(name), name)
    metrics.reset()
    assert_own(feed(metrics, name), name)


@pytest.mark.parametrize("name", CASES)
def test_copies_that_go_on(name: str) -> None:
    half = feed(collection(name), name, slice(1))
    copies = [half.clone(), pickle.loads(pickle.dumps(half))]  # noqa: S301
    half.reset()
    for copy in copies:
        assert_own(feed(copy, name, slice(1, None)), name)


@pytest.mark.parametrize("name", CASES)
def test_copies_of_what_has_seen_nothing(name: str) -> None:
    fresh = collection(name)
    for copy in (fresh.clone(), pickle.loads(pickle.dumps(fresh))):  # noqa: S301
        assert_own(feed(copy, name), name)


def test_forward_gives_each_its_own_batch_value() -> None:
    metrics = collection("parsers of POPE")
    easy, hard = (metrics(*batch) for batch in POPE_BATCHES)
    assert {easy[f"{parser}_accuracy"].item() for parser in POPE_ACCURACIES} == {1}
    # The accuracies of both batches, less the two of the first that every parser reads.
    for parser, accuracy in POPE_ACCURACIES.items():
        assert hard[f"{parser}_accuracy"].item() == pytest.approx((6 * accuracy - 2) / 4, abs=1e-9)


def test_a_metric_beside_its_copy() -> None:
    metric = POPE("opera")
    metrics = MetricCollection({"metric": metric, "copy": metric.clone()})
    for preds, target in POPE_BATCHES:
        metrics.update(preds, target)
    scores = metrics.compute()
    assert scores["metric_accuracy"].item() == scores["copy_accuracy"].item() == 1


def test_counts_above_what_float16_can_tell_apart() -> None:
    """Of 5001 answers 4999 are right; float16 has neither number."""
    metrics = MetricCollection({"metric": POPE()}).set_dtype(torch.float16)
    for wrong in (0, 1, 1):
        metrics.update(["yes"] * wrong + ["no"] * (1667 - wrong), ["no"] * 1667)
    metric = metrics["metric"].set_dtype(torch.float16)
    assert metric.counts.sum() == 5001
    assert metric.compute()["accuracy"].item() == pytest.approx(4999 / 5001, abs=1e-12)


def test_of_two_results_the_smallest_row_of_counts_is_taken() -> None:
    """Columns begin with "no" read as no, as yes: (0, 1) is smaller than (1, 0), so the wrong answer is taken."""
    for answers in (["no", "yes"], ["yes", "no"]):
        metric = POPE()
        for answer in answers:
            metric.update([answer], ["no"], ids=[3])
        with pytest.warns(UserWarning, match="example 3 with different results: the smallest counts are taken"):
            scores = metric.compute()
        assert (scores["accuracy"].item(), scores["yes_ratio"].item()) == (0, 1)
