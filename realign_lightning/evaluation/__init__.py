"""Benchmarks of hallucination: ask a model, mark its answers, compare two models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from realign_lightning.evaluation.base import Answered, Benchmark, Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.run_folder import Evaluated, read_run, write_run

if TYPE_CHECKING:
    from realign_lightning.evaluation.answering import Reply, answer_questions
    from realign_lightning.evaluation.benchmarks.amber import AmberBenchmark
    from realign_lightning.evaluation.benchmarks.chair import ChairBenchmark
    from realign_lightning.evaluation.benchmarks.hallusionbench import HallusionBenchmark
    from realign_lightning.evaluation.benchmarks.mmhal import MMHalBenchmark
    from realign_lightning.evaluation.benchmarks.pope import PopeBenchmark
    from realign_lightning.evaluation.judge import Judge, JudgeCost
    from realign_lightning.evaluation.running import evaluate
    from realign_lightning.evaluation.score import score_file

_HOMES = {
    "AmberBenchmark": "realign_lightning.evaluation.benchmarks.amber",
    "ChairBenchmark": "realign_lightning.evaluation.benchmarks.chair",
    "HallusionBenchmark": "realign_lightning.evaluation.benchmarks.hallusionbench",
    "Judge": "realign_lightning.evaluation.judge",
    "JudgeCost": "realign_lightning.evaluation.judge",
    "MMHalBenchmark": "realign_lightning.evaluation.benchmarks.mmhal",
    "PopeBenchmark": "realign_lightning.evaluation.benchmarks.pope",
    "Reply": "realign_lightning.evaluation.answering",
    "answer_questions": "realign_lightning.evaluation.answering",
    "evaluate": "realign_lightning.evaluation.running",
    "score_file": "realign_lightning.evaluation.score",
}

__all__ = [
    "AmberBenchmark",
    "Answered",
    "Benchmark",
    "ChairBenchmark",
    "Evaluated",
    "HallusionBenchmark",
    "Judge",
    "JudgeCost",
    "MMHalBenchmark",
    "Mark",
    "MarkedBenchmark",
    "PopeBenchmark",
    "Question",
    "Reply",
    "Score",
    "answer_questions",
    "evaluate",
    "read_run",
    "score_file",
    "write_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
