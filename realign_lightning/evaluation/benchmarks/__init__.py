"""The benchmarks that come with the package, by their names on the command line."""

from realign_lightning.evaluation.base import MarkedBenchmark
from realign_lightning.evaluation.benchmarks.amber import AmberBenchmark
from realign_lightning.evaluation.benchmarks.chair import ChairBenchmark
from realign_lightning.evaluation.benchmarks.hallusionbench import HallusionBenchmark
from realign_lightning.evaluation.benchmarks.mmhal import MMHalBenchmark
from realign_lightning.evaluation.benchmarks.pope import PopeBenchmark

_ALL: tuple[type[MarkedBenchmark], ...] = (
    PopeBenchmark,
    ChairBenchmark,
    AmberBenchmark,
    HallusionBenchmark,
    MMHalBenchmark,
)
BENCHMARKS: dict[str, type[MarkedBenchmark]] = {kind.name: kind for kind in _ALL}
"""Classes by name."""
