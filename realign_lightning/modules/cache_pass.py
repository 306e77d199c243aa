"""The pass over the data that fills a reference cache, on all ranks at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from realign_lightning.modules.cache import Entry, ReferenceCache
from realign_lightning.ranks import gather, rank_and_world_size, sum_over_ranks
from realign_lightning.types import LogProbs, PreferenceBatch

log = logging.getLogger(__name__)


class SampleSource(Protocol):
    """Random access to the samples of a split, as ``DualPreferenceDataModule.sample_readers`` gives it."""

    def __len__(self) -> int:
        """Number of samples."""

    def fingerprint(self, row: int) -> str:
        """What the content of a sample is identified by; equal to the one in its batch.

        Args:
            row: 0 to ``len(self) - 1``.
        """

    def batches(self, rows: Sequence[tuple[int, float]]) -> Iterable[Any]:
        """Batches (:class:`~realign_lightning.types.PreferenceBatch`) of some samples, in order, equally large.

        Args:
            rows: rows with their weights; a sample that cannot be read is replaced by one of weight 0.
        """


class CachePass:
    """Computes what a cache lacks. All ranks make the same calls.

    Args:
        cache: to fill.
        score: log-probs of a batch, still on the CPU, under the reference. Ranks that hold shards of one model call it
            equally often.
        device: on which ranks add up numbers.
        show_progress: whether rank 0 shows a progress bar.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        score: Callable[[PreferenceBatch], LogProbs],
        device: torch.device,
        show_progress: bool = True,
    ) -> None:
        self.cache = cache
        self.computed = 0
        self._score = score
        self._device = device
        self._rank, self._world_size = rank_and_world_size()
        self._shows = show_progress and self._rank == 0
        self._new: dict[str, Entry] = {}

    def run(self, sources: Mapping[str, SampleSource]) -> None:
        """Compute what is missing of whole splits: samples are dealt to the ranks in turn.

        Samples that cannot be read are left out; whoever trains on them counts and names them.

        Args:
            sources: samples by name of the split.

        Raises:
            ValueError: if ranks see different caches, or a log-prob is not finite.
        """
        places: dict[str, _Place] = {}
        for split, source in sources.items():
            for row, name in enumerate(self._fingerprints(split, source)):
                places.setdefault(name, _Place(split, row))
        missing = gather([name for name in places if name not in self.cache.entries])[0]
        self._tell(len(places), len(missing))
        with tqdm(
            desc="reference log-probs",
            total=len(places),
            initial=len(places) - len(missing),
            unit="sample",
            disable=not self._shows or not missing,
        ) as bar:
            for split, source in sources.items():
                rows = [places[name].row for name in missing if places[name].split == split]
                for batch in source.batches(self._deal(rows)) if rows else ():
                    bar.update(self._compute(batch))
        self._finish()
        self._check_agreement(places)

    def run_batches(self, batches: Iterable[PreferenceBatch]) -> None:
        """Compute what is missing of this rank's batches.

        Args:
            batches: as many on every rank.

        Raises:
            ValueError: for samples without a fingerprint, and log-probs that are not finite.
        """
        for batch in tqdm(batches, desc="reference log-probs", unit="batch", disable=not self._shows):
            self._compute(batch)
        self._finish()

    def _fingerprints(self, split: str, source: SampleSource) -> list[str]:
        """Of all samples of a split; every rank reads its share."""
        mine = range(self._rank, len(source), self._world_size)
        bar = tqdm(mine, desc=f"identify {split} samples", unit="sample", disable=not self._shows, delay=2, leave=False)
        names = [""] * len(source)
        for rank, found in enumerate(gather([source.fingerprint(row) for row in bar])):
            names[rank :: self._world_size] = found
        return names

    def _deal(self, rows: Sequence[int]) -> list[tuple[int, float]]:
        """This rank's rows; filled up by rows of weight 0, so that all ranks get equally many."""
        mine = [(row, 1.0) for row in rows[self._rank :: self._world_size]]
        each = -(-len(rows) // self._world_size)
        return [*mine, *[(rows[0], 0.0)] * (each - len(mine))]

    def _compute(self, batch: PreferenceBatch) -> int:
        """Log-probs of the samples of a batch that are missing. Returns how many these are on all ranks together."""
        wanted = {
            name: row
            for row, (name, weight) in enumerate(zip(fingerprints_of(batch), batch.weights.tolist(), strict=True))
            if weight and name not in self.cache.entries
        }
        count = int(sum_over_ranks(torch.tensor(float(len(wanted)), device=self._device)))
        # No model is loaded for the sake of samples that cannot be read.
        if count:
            scores = self._score(batch)
            values = torch.stack([value.float().cpu() for _, value in scores.items()], dim=1).tolist()
            entries = {name: Entry(*values[row]) for name, row in wanted.items()}
            self.cache.add(entries, {name: batch.keys[row] for name, row in wanted.items()}, self._rank)
        # Also what only this rank knew, from the file of another run.
        known = self.cache.entries
        self._new |= {name: known[name] for name in batch.fingerprints if name in known}
        self.computed += count
        return count

    def _finish(self) -> None:
        """Hand every rank what the others computed; a network's file system may not show their files at once."""
        self.cache.close()
        for entries in gather(self._new):
            self.cache.entries.update(entries)
        self._new = {}

    def _tell(self, total: int, missing: int) -> None:
        if self._rank == 0:
            known = total - missing
            log.info("Reference log-probs of %d of %d samples are cached in %s", known, total, self.cache.folder)

    def _check_agreement(self, places: Mapping[str, _Place]) -> None:
        """Ranks on machines with folders of their own would train on different samples."""
        known = gather(sum(name in self.cache.entries for name in places))
        if len(set(known)) > 1:
            raise ValueError(
                f"The ranks see different reference caches in {self.cache.folder}: {known} of {len(places)} samples. "
                "Expected `reference_cache` to be a folder that all machines share."
            )
        if self._rank == 0 and known[0] < len(places):
            log.warning("%d samples cannot be used and have no reference log-probs.", len(places) - known[0])


class _Place(NamedTuple):
    split: str
    row: int


def fingerprints_of(batch: PreferenceBatch) -> tuple[str, ...]:
    """Fingerprints of the samples of a batch.

    Args:
        batch: B samples.

    Raises:
        ValueError: if a sample has none.
    """
    names = batch.fingerprints or ("",) * len(batch)
    if len(names) != len(batch) or not all(names):
        key = next((key for key, name in zip(batch.keys, names, strict=False) if not name), batch.keys[0])
        raise ValueError(
            f"Sample {key!r} has no fingerprint, by which reference='cached' finds its log-probs. Expected the dataset "
            "to set EncodedSample.fingerprint (realign_lightning.data.fingerprint_members makes one), and the "
            "backbone's `collate` to fill PreferenceBatch.fingerprints."
        )
    return names
