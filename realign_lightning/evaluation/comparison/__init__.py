"""Compare two models on the same questions: differences with intervals, McNemar's test, flipped answers."""

from realign_lightning.evaluation.comparison.command import main, write_comparison
from realign_lightning.evaluation.comparison.pairing import (
    BenchmarkComparison,
    Comparison,
    Delta,
    Flip,
    Resampling,
    compare_runs,
)
from realign_lightning.evaluation.comparison.statistics import Interval, McNemar, mcnemar, paired_bootstrap

__all__ = [
    "BenchmarkComparison",
    "Comparison",
    "Delta",
    "Flip",
    "Interval",
    "McNemar",
    "Resampling",
    "compare_runs",
    "main",
    "mcnemar",
    "paired_bootstrap",
    "write_comparison",
]
