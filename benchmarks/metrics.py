"""How many answers POPE and how many captions CHAIR score in a second, beside the algorithms as they were published.

From the root of the repository:

    python -m benchmarks.metrics --json metrics.json
    python -m benchmarks.metrics --captions captions.txt

- The published algorithms are written anew here, with what makes them cost what they cost. CHAIR cuts every caption
  anew, brings every token to the singular, and makes a set of the whole list of objects for every token, twice. POPE
  splits each answer and counts in loops. CHAIR's tokens and singulars are the package's, without its memory of frequent
  words; NLTK and pattern, which the references call, take longer, so the ratio is a lower bound.
- Ours and theirs take turns on the same texts, and a result that differs ends the run. Times are medians; the first
  turn, in which nothing is remembered yet, is also told.
- Answers and captions are generated from templates and names of COCO's objects, so frequent words repeat more than in a
  model's captions. ``--captions`` takes a file with one caption on each line instead, and draws the objects of each
  image.
- One thread, unless ``--threads`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.measure import matmul_rate
from benchmarks.report import environment, table
from realign_lightning.metrics import Lexicon
from realign_lightning.metrics.functional.chair import chair
from realign_lightning.metrics.functional.pope import PopeParser, pope
from realign_lightning.metrics.functional.singularize import singularize
from realign_lightning.metrics.functional.words import tokenize

GOALS = {"POPE": 200_000, "CHAIR": 5_000}
"""Texts that are to be scored in a second."""

ANSWERS = (
    *("Yes", "No", "yes", "no.", "Yes.", "Yes, there is a {} in the image.", "No, there is no {} in the image."),
    *("There is a {} on the left.", "I do not see a {}.", "The image shows a {}, next to a {}.", "There isn't a {}."),
)
SENTENCES = (
    *("The image features a {} standing next to a {}.", "There are two {}s in the background, one of them near a {}."),
    *("A {} is placed on a wooden table, while a person looks at the {}.", "In addition, several {}s can be seen."),
    "Overall, the scene conveys a calm atmosphere, with a {} and a {} as its main elements.",
)

Scores = dict[str, float]


def published_pope(preds: Sequence[str], target: Sequence[str]) -> Scores:
    """The algorithm of AoiDragon/POPE, ``evaluate.py``.

    Args:
        preds: answers as generated.
        target: the right answers.
    """
    read = []
    for text in preds:
        first = text.split(".")[0] if text.find(".") != -1 else text
        words = first.replace(",", "").split(" ")
        read.append(0 if "No" in words or "not" in words or "no" in words else 1)
    labels = [0 if label == "no" else 1 for label in target]
    cells = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for verdict, label in zip(read, labels, strict=True):
        cells[("t" if verdict == label else "f") + ("p" if verdict else "n")] += 1
    precision = cells["tp"] / (cells["tp"] + cells["fp"])
    recall = cells["tp"] / (cells["tp"] + cells["fn"])
    return {
        "accuracy": (cells["tp"] + cells["tn"]) / len(read),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": read.count(1) / len(read),
    }


class PublishedCHAIR:
    """The algorithm of LisaAnne/Hallucination, ``utils/chair.py``, with the recall of its standalone form.

    Args:
        lexicon: names that are compared with a caption's words as they stand, and pairs that are joined.
    """

    def __init__(self, lexicon: Lexicon) -> None:
        self.objects = list(lexicon.synonyms)
        self.category = dict(lexicon.synonyms)
        self.pairs = dict(lexicon.compounds or {})

    def objects_of(self, caption: str) -> list[str]:
        """The category of each mention in a caption.

        Args:
            caption: the text.
        """
        tokens = [singularize(token) for token in tokenize(caption)]
        words, places, place = [], [], 0
        while place < len(tokens):
            places.append(place)
            pair = " ".join(tokens[place : place + 2])
            words.append(self.pairs.get(pair, tokens[place]))
            place += 2 if pair in self.pairs else 1
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        # The set is made for each word, and once more for its place, as published.
        places = [places[index] for index, word in enumerate(words) if word in set(self.objects)]
        words = [word for word in words if word in set(self.objects)]
        return [self.category[word] for word in words]

    def __call__(self, preds: Sequence[str], target: Sequence[set[str]]) -> Scores:
        """Scores of a set of captions.

        Args:
            preds: captions.
            target: the categories in each image.
        """
        hallucinated_captions = mentions = hallucinated = targets = recalled = 0
        for caption, wanted in zip(preds, target, strict=True):
            found = self.objects_of(caption)
            wrong = [name for name in found if name not in wanted]
            mentions, hallucinated = mentions + len(found), hallucinated + len(wrong)
            hallucinated_captions += bool(wrong)
            targets, recalled = targets + len(wanted), recalled + len(wanted.intersection(found))
        return {
            "chair_s": hallucinated_captions / len(preds),
            "chair_i": hallucinated / mentions,
            "recall": recalled / targets,
        }


def make_answers(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Answers from templates, and labels drawn at random.

    Args:
        count: of the answers.
        seed: of the draws.
    """
    rng, names = random.Random(seed), Lexicon.coco().categories
    preds = [rng.choice(ANSWERS).format(*rng.sample(names, 2)) for _ in range(count)]
    return preds, [rng.choice(("yes", "no")) for _ in preds]


def make_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of one to five sentences from templates, with all names of COCO's objects.

    Args:
        count: of the captions.
        seed: of the draws.
    """
    rng, names = random.Random(seed), list(Lexicon.coco().synonyms)
    drawn = [rng.choices(SENTENCES, k=rng.randint(1, 5)) for _ in range(count)]
    return [" ".join(sentence.format(*rng.sample(names, 2)) for sentence in sentences) for sentences in drawn]


def make_targets(captions: Sequence[str], seed: int = 0) -> list[set[str]]:
    """Objects of the images: each one that a caption mentions with a chance of 0.8, and two drawn at random.

    Args:
        captions: of the images.
        seed: of the draws.
    """
    rng, lexicon = random.Random(seed), Lexicon.coco()
    published = PublishedCHAIR(lexicon)
    found = [sorted(set(published.objects_of(caption))) for caption in captions]
    return [{name for name in names if rng.random() < 0.8} | set(rng.sample(lexicon.categories, 2)) for names in found]


def compare(
    preds: Sequence[str],
    target: Sequence[Any],
    ours: Callable[[Sequence[str], Sequence[Any]], Mapping[str, Tensor]],
    published: Callable[[Sequence[str], Sequence[Any]], Scores] | None,
    turns: int,
) -> dict[str, Any]:
    """Time both on the same texts, in turns.

    Args:
        preds: answers or captions.
        target: what each is compared with.
        ours: the package's function.
        published: the algorithm as published; None times ours alone.
        turns: of both.

    Returns:
        Seconds of each turn, texts a second, and the scores.

    Raises:
        RuntimeError: if the two give different scores.
    """
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(turns):
        start = time.perf_counter()
        scores = {name: value.item() for name, value in ours(preds, target).items()}
        seconds["ours"].append(time.perf_counter() - start)
        if published is not None:
            start = time.perf_counter()
            expected = published(preds, target)
            seconds["published"].append(time.perf_counter() - start)
            check_equal(scores, expected)
    medians = {name: statistics.median(found) for name, found in seconds.items() if found}
    return {
        "texts": len(preds),
        "characters": sum(map(len, preds)) / len(preds),
        "seconds": seconds,
        "rate": {name: len(preds) / median for name, median in medians.items()},
        "first_rate": len(preds) / seconds["ours"][0],
        "ratio": medians["published"] / medians["ours"] if published is not None else None,
        "scores": scores,
    }


def check_equal(scores: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Compare the scores that both have.

    Args:
        scores: ours.
        expected: the published algorithm's.

    Raises:
        RuntimeError: if one differs by more than 1e-9.
    """
    for name, value in expected.items():
        if abs(scores[name] - value) > 1e-9:
            raise RuntimeError(f"{name} is {scores[name]} by ours and {value} by the published algorithm.")


def measure_pope(count: int, turns: int) -> dict[str, dict[str, Any]]:
    """POPE by every parser; the published algorithm beside ``official``.

    Args:
        count: of the answers.
        turns: of each.
    """
    preds, target = make_answers(count)
    return {
        f"POPE {parser}": compare(
            preds,
            target,
            partial(pope, parser=parser),
            published_pope if parser == "official" else None,
            turns,
        )
        for parser in get_args(PopeParser)
    }


def measure_chair(captions: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """CHAIR with the ``original`` normaliser beside the published algorithm.

    Args:
        captions: that are scored.
        turns: of both.
    """
    published = PublishedCHAIR(Lexicon.coco())
    return {"CHAIR original": compare(captions, make_targets(captions), chair, published, turns)}


def speed_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Texts a second, in Markdown.

    Args:
        found: by :func:`measure_pope` and :func:`measure_chair`.
    """
    header = ["metric", "texts", "characters", "ours, a second", "first turn", "published, a second", "ratio", "goal"]
    rows = []
    for name, one in found.items():
        published, goal = one["rate"].get("published"), GOALS[name.split(" ")[0]]
        rows.append(
            [
                name,
                f"{one['texts']:,}",
                f"{one['characters']:.0f}",
                f"{one['rate']['ours']:,.0f}",
                f"{one['first_rate']:,.0f}",
                "-" if published is None else f"{published:,.0f}",
                "-" if one["ratio"] is None else f"{one['ratio']:.2f}",
                f"{goal:,}: {'met' if one['rate']['ours'] >= goal else 'NOT met'}",
            ]
        )
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=100_000, metavar="N", help="answers that are generated")
    parser.add_argument("--count", type=int, default=2_000, metavar="N", help="captions that are generated")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="captions to take instead, one on each line")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    device, dtype = torch.device("cpu"), torch.float32
    about = environment(device, dtype, chosen.turns, matmul_rate(device, dtype))
    print("\n".join(f"- {name}: {value}" for name, value in about.items()))
    if chosen.captions is None:
        captions, origin = make_captions(chosen.count), "captions generated from templates"
    else:
        captions = [line for line in chosen.captions.read_text(encoding="utf-8").splitlines() if line.strip()]
        origin = f"captions of {chosen.captions.name}"
    found = {**measure_pope(chosen.answers, chosen.turns), **measure_chair(captions, chosen.turns)}
    print(f"\nAnswers generated from templates, {origin}; equal scores by both.\n\n{speed_table(found)}")
    if chosen.json is not None:
        written = {"environment": about, "captions": origin, "speed": found}
        chosen.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
