"""What a build would take, from a sample of its records."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from realign_lightning.data.sources.base import Source, SourceProblem, SourceRecord
from realign_lightning.engines.policy import Policy
from realign_lightning.preferences.pipeline.run import Run, Stages
from realign_lightning.ranks import gather, rank_and_world_size

if TYPE_CHECKING:
    from realign_lightning.preferences.build import PreferenceBuilder

SAMPLE = 20
"""Records that a plan is made from."""

_WARM_UP = 4
"""Records that are built before, twice as many as are needed to retrieve one for the other."""


class Prices(NamedTuple):
    """What tokens cost.

    Args:
        read: a million tokens read, in any currency.
        written: a million tokens written.
    """

    read: float = 0.0
    written: float = 0.0


@dataclass
class Counts:
    """How much there is to do.

    Args:
        records: that can be read.
        unreadable: rows that cannot.
        images: distinct ones that can be retrieved.
        answer: records whose chosen response is to be generated.
        complete: records whose rejected response is to be made.
        retrieve: records whose rejected image is to be found.
    """

    records: int = 0
    unreadable: int = 0
    images: int = 0
    answer: int = 0
    complete: int = 0
    retrieve: int = 0

    def add(self, record: SourceRecord) -> None:
        """Count a record, but not its image.

        Args:
            record: of the source.
        """
        self.records += 1
        self.answer += record.chosen is None
        self.complete += record.rejected is None
        self.retrieve += record.retrieved is None


@dataclass
class Plan:
    """What a build would take.

    Args:
        counts: what there is to do.
        sampled: records that were really built, to find out.
        pairs: pairs to expect.
        calls: questions to engines to expect.
        tokens: tokens read and written to expect by stage, as far as engines say.
        paid: stages whose engine is not on this machine.
        seconds: to expect, by stage, on this machine with these devices, all models loaded.
        prices: what tokens cost.
    """

    counts: Counts
    sampled: int
    pairs: float
    calls: dict[str, float]
    tokens: dict[str, tuple[float, float]]
    paid: frozenset[str] = frozenset()
    seconds: dict[str, float] = field(default_factory=dict)
    prices: Prices = field(default_factory=Prices)

    @property
    def hours(self) -> float:
        """All stages together."""
        return sum(self.seconds.values()) / 3600

    @property
    def cost(self) -> float:
        """Of the tokens of engines that are not on this machine, in the currency of the prices."""
        counts = [self.tokens[stage] for stage in self.tokens if stage in self.paid]
        return sum(read * self.prices.read + written * self.prices.written for read, written in counts) / 1e6

    def as_text(self) -> str:
        """The plan as a table."""
        counts = self.counts
        rows = [
            ("records", f"{counts.records:,}"),
            ("rows that cannot be read", f"{counts.unreadable:,}"),
            ("images to retrieve from", f"{counts.images:,}"),
            ("chosen responses to generate", f"{counts.answer:,}"),
            ("rejected images to find", f"{counts.retrieve:,}"),
            ("rejected responses to make", f"{counts.complete:,}"),
            ("pairs to expect", f"{self.pairs:,.0f}"),
            *((f"calls, {stage}", f"{count:,.0f}") for stage, count in self.calls.items()),
            *((f"tokens read, {stage}", f"{read:,.0f}") for stage, (read, _) in self.tokens.items()),
            *((f"tokens written, {stage}", f"{written:,.0f}") for stage, (_, written) in self.tokens.items()),
            *((f"hours, {stage}", _hours(seconds)) for stage, seconds in self.seconds.items()),
            ("hours", _hours(self.hours * 3600)),
            ("cost of what others answer", f"{self.cost:,.2f}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:>12}" for name, value in rows]
        notes = f"From {self.sampled} records, built on each other's images only; more images are more similar, and "
        return "\n".join([*lines, f"{notes}gates refuse more. Nothing was written.", ""])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3f}" if seconds >= 3.6 else f"{seconds / 3600:,.5f}"


class _Listed(Source):
    """Records at hand."""

    def __init__(self, records: Sequence[SourceRecord]) -> None:
        self._records = records

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        return iter(self._records)


def make_plan(
    builder: PreferenceBuilder,
    source: Source,
    policy: Policy | None = None,
    pool: Source | None = None,
    prices: Prices = Prices(),  # noqa: B008 - a tuple
    size: int = SAMPLE,
) -> Plan:
    """Build a sample of the records in a folder that is thrown away, and multiply.

    Args:
        builder: whose stages are measured.
        source: records; all of them are read, the images of the sample only.
        policy: see :meth:`PreferenceBuilder.build`.
        pool: further images that can be retrieved; some of them are looked at.
        prices: what tokens cost.
        size: records of the sample, drawn at random with the builder's seed.

    Returns:
        What to expect.

    Raises:
        ValueError: if there are no records, and as :meth:`PreferenceBuilder.build`.
    """
    counts, sample = _look(source, size, builder.stages.seed)
    pooled, others = (Counts(), []) if pool is None else _look(pool, size, builder.stages.seed)
    counts.images += pooled.images
    others_source = _Listed(others) if others else None
    if not sample:
        raise ValueError(f"The source has no records that can be read, and {counts.unreadable} rows that cannot.")
    # All ranks work in one folder, which rank 0 removes.
    with tempfile.TemporaryDirectory() as own:
        folder = Path(gather(own)[0])
        # Models are loaded and identified by the first records: that is no part of what is multiplied.
        _run_sample(builder.stages, sample[:_WARM_UP], others_source, policy, folder / "warm_up")
        run = _run_sample(builder.stages, sample, others_source, policy, folder / "sample")
        gather(None)
    taken = Counts(images=len(run.album.pool))
    for record in sample:
        taken.add(record)
    return _scaled(run, counts, taken, prices)


def _look(source: Source, size: int, seed: int) -> tuple[Counts, list[SourceRecord]]:
    """Count all records, and draw some (reservoir sampling: every record is as likely)."""
    counts, sample, images = Counts(), list[SourceRecord](), set[str]()
    generator = random.Random(seed)
    shows = rank_and_world_size()[0] == 0
    for row in tqdm(source.read(), desc="read", unit="row", delay=1, disable=not shows):
        if isinstance(row, SourceProblem):
            counts.unreadable += 1
            continue
        counts.add(row)
        images.add(row.image.image_id)
        if len(sample) < size:
            sample.append(row)
        elif (place := generator.randrange(counts.records)) < size:
            sample[place] = row
    counts.images = len(images)
    return counts, sample


def _run_sample(
    stages: Stages, sample: Sequence[SourceRecord], pool: Source | None, policy: Policy | None, work: Path
) -> Run:
    run = Run(stages, work, policy, shows=False)
    run.read(_Listed(sample), pool)
    run.respond()
    run.mask()
    run.complete(run.retrieve())
    run.report.count(run.drafts, run.others)
    return run


def _scaled(run: Run, counts: Counts, taken: Counts, prices: Prices) -> Plan:
    report = run.report
    times = {
        "read": counts.records / taken.records,
        "check": counts.images / max(taken.images, 1),
        "answer": counts.answer / max(taken.answer, 1),
        "mask": counts.complete / max(taken.complete, 1),
        "embed": counts.images / max(taken.images, 1),
        "complete": counts.complete / max(taken.complete, 1),
    }
    seconds = {stage: report.seconds[stage] * times[stage] for stage in times if stage in report.seconds}
    if counts.retrieve:
        seconds["retrieve"] = _search_seconds(counts.retrieve, counts.images, run.dimension)
    calls = {stage: count * times[stage] for stage, count in report.calls.items()}
    tokens = {stage: (read * times[stage], new * times[stage]) for stage, (read, new) in report.tokens.items()}
    pairs = counts.records * report.pairs / taken.records
    return Plan(counts, taken.records, pairs, calls, tokens, run.paid_stages, seconds, prices)


def _search_seconds(queries: int, images: int, dimension: int) -> float:
    """Of comparing every query with every image, at the speed that this machine multiplies matrices with."""
    block = np.ones((2048, max(dimension, 1)), dtype=np.float32)
    started = time.monotonic()
    block @ block.T
    return (time.monotonic() - started) / 2048**2 * queries * images
