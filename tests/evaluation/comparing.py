"""Small runs to compare: a benchmark of yes-or-no questions, and what lmms-eval writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from realign_lightning.evaluation.base import Answered, Mark, MarkedBenchmark, Score
from realign_lightning.evaluation.run_folder import Evaluated, write_run


class YesNo(MarkedBenchmark):
    """Counts: right, said yes, 1."""

    name = "yes_no"
    headline = (Score("accuracy", "accuracy"), Score("yes", "yes | ratio", higher_is_better=None))

    @property
    def settings(self):
        return {"parser": "first word"}

    def questions(self):
        return []

    def mark(self, questions, answers):
        return [Mark((0, 0, 1), None) for _ in answers]

    @staticmethod
    def compute(counts, settings):
        right, yes, total = counts.double().unbind(-1)
        return {"accuracy": right / total, "yes": yes / total}


class Captions(YesNo):
    """Counts: hallucinated captions, words, 1."""

    name = "captions"
    headline = (Score("chair_s", "CHAIRs", higher_is_better=False), Score("words", "words", 1.0, None))

    @staticmethod
    def compute(counts, settings):
        hallucinated, words, total = counts.double().unbind(-1)
        return {"chair_s": hallucinated / total, "words": words / total}


BENCHMARKS: dict[str, type[MarkedBenchmark]] = {"yes_no": YesNo, "captions": Captions}


def row(number: int, right: bool | None = True, target: str = "yes", **values: Any) -> Answered:
    """An answer to a question of :class:`YesNo`; ``right`` None is no answer."""
    said = target if right else {"yes": "no", "no": "yes"}[target]
    fields: dict[str, Any] = {
        "key": f"q{number}",
        "question": f"Is there thing {number}?",
        "answer": None if right is None else said,
        "image": f"{number}.png",
        "target": target,
        "counts": [] if right is None else [int(right), int(said == "yes"), 1],
        "correct": right,
        "badness": 0.0 if right or right is None else 1.0,
        "notes": {} if right is None else {"verdict": said},
    }
    return Answered(**{**fields, **values})


def write(folder: Path, rows: Sequence[Answered], benchmark: str = "yes_no", **settings: Any) -> Path:
    """Write a run, with the scores that its counts give."""
    counts = torch.tensor([one.counts for one in rows if one.counts]).sum(dim=0)
    scores = {name: value.item() for name, value in BENCHMARKS[benchmark].compute(counts, {}).items()}
    settings = {"parser": "first word", **settings}
    write_run(folder, Evaluated(benchmark, settings, scores, list(rows), {"name": folder.name}))
    return folder


def write_lmms(
    folder: Path,
    samples: Sequence[dict[str, Any]],
    reported: dict[str, Any],
    task: str = "task",
    date: str = "20261122_051302",
    higher_is_better: dict[str, bool] | None = None,
    **config: Any,
) -> Path:
    """Write what lmms-eval 0.8 writes for one task; ``samples`` have what differs from sample to sample."""
    inside = folder / "org__model"
    inside.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {task: {"alias": task, **reported}},
        "configs": {
            task: {
                "task": task,
                "doc_to_visual": f"<function visual at {hex(id(samples))}>",
                "metric_list": [{"metric": "m", "aggregation": f"<function mean at {hex(id(samples))}>"}],
                "generation_kwargs": {"max_new_tokens": 16},
                **config,
            }
        },
        "versions": {task: 1.0},
        "higher_is_better": {task: higher_is_better or {}},
        "model_source": "llava_hf",
        "model_name": "org/model",
    }
    (inside / f"{date}_results.json").write_text(json.dumps(results, indent=2))
    lines = [
        {
            "doc_id": number,
            "target": "yes",
            "filtered_resps": "yes",
            "doc_hash": "0",
            "input": f"Is it {number}?",
            **one,
        }
        for number, one in enumerate(samples)
    ]
    path = inside / f"{date}_samples_{task}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
