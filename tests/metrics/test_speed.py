"""Speed with bounds far below what is measured, because machines of continuous integration are busy, and the benchmark
on few texts: what it compares is there, and its results are the package's."""

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.metrics import (
    GOALS,
    PublishedCHAIR,
    check_equal,
    compare,
    main,
    make_answers,
    make_captions,
    make_targets,
    published_pope,
)
from realign_lightning.metrics import Lexicon
from realign_lightning.metrics.functional.chair import chair
from realign_lightning.metrics.functional.pope import PopeParser, pope


def best_rate(score: Callable[[], object], texts: int, turns: int = 5) -> float:
    """Texts a second of the fastest turn."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        score()
        seconds.append(time.perf_counter() - start)
    return texts / min(seconds)


@pytest.mark.parametrize("parser", get_args(PopeParser))
def test_pope_scores_many_answers_a_second(parser: PopeParser) -> None:
    preds, target = make_answers(10_000)
    assert best_rate(lambda: pope(preds, target, parser), len(preds)) >= GOALS["POPE"] / 5


def test_chair_scores_many_captions_a_second() -> None:
    captions = make_captions(500)
    target = make_targets(captions)
    assert best_rate(lambda: chair(captions, target), len(captions)) >= GOALS["CHAIR"] / 5


@pytest.fixture(scope="module")
def printed_and_found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("speed")
    (folder / "captions.txt").write_text("A dog and a cat on a toilet seat.\n\nTwo buses, three wine glasses.\n")
    threads, output = torch.get_num_threads(), io.StringIO()
    arguments = ["--answers", "300", "--turns", "3", "--captions", str(folder / "captions.txt")]
    try:
        with contextlib.redirect_stdout(output):
            assert main([*arguments, "--json", str(folder / "found.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    return output.getvalue(), json.loads((folder / "found.json").read_text())


def test_figures(printed_and_found: tuple[str, dict[str, Any]]) -> None:
    printed, found = printed_and_found
    assert found["environment"]["threads"] == 1
    assert list(found["speed"]) == [*(f"POPE {parser}" for parser in get_args(PopeParser)), "CHAIR original"]
    for name, one in found["speed"].items():
        assert one["texts"] == (2 if "CHAIR" in name else 300)
        middle = sorted(one["seconds"]["ours"])[1]
        assert one["rate"]["ours"] == pytest.approx(one["texts"] / middle)
        assert one["first_rate"] == pytest.approx(one["texts"] / one["seconds"]["ours"][0])
        assert f"| {name} " in printed
        if one["ratio"] is not None:
            assert one["ratio"] == pytest.approx(sorted(one["seconds"]["published"])[1] / middle)
    assert [name for name, one in found["speed"].items() if one["ratio"]] == ["POPE official", "CHAIR original"]
    assert "captions of captions.txt; equal scores by both" in printed


def test_results_of_the_published_algorithms(tmp_path: Path) -> None:
    """Of five answers three are read as yes, two of them rightly, and the label of one that is read as no is yes:
    accuracy 3/5, precision and recall 2/3. Of the two captions one names a bus beside the dog of the image; the toilet
    seat is a toilet, a bus is none, the glass is one of wine."""
    preds, target = ["Yes.", "A cat", "It isn't", "no", "No, two"], ["yes", "yes", "no", "no", "yes"]
    assert published_pope(preds, target) == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    published = PublishedCHAIR(Lexicon.coco())
    assert published.objects_of("A toilet seat, a bus and two wine glasses. The seat!") == ["toilet", "wine glass"]
    scores = published(["A dog near two buses.", "A cat."], [{"dog", "person"}, {"cat"}])
    assert scores == pytest.approx({"chair_s": 1 / 2, "chair_i": 1 / 3, "recall": 2 / 3})


def test_a_difference_ends_the_run() -> None:
    check_equal({"f1": 0.5, "unparsed": 1.0}, {"f1": 0.5 + 1e-12})
    with pytest.raises(RuntimeError, match=r"f1 is 0.5 by ours and 0.51"):
        check_equal({"f1": 0.5}, {"f1": 0.51})
    preds, target = make_answers(100)
    with pytest.raises(RuntimeError, match="accuracy"):
        compare(preds, target, lambda preds, target: pope(preds, target, "vlmevalkit"), published_pope, turns=1)
