"""Read shards for training: random access by member offset, one order per seed and epoch, every sample exactly once.

The order of an epoch depends on the seed, the epoch and the number of samples, never on ranks or workers. What cannot
be used is counted and named, and its place in the batch is taken by a stand-in of weight 0, so that all ranks take
equally many steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler
from tqdm import tqdm

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.lengths import estimate_lengths, group_by_length
from realign_lightning.data.scan import ShardError, StoredSample, find_shards, scan_shard
from realign_lightning.data.schema import decode_sample, fingerprint_members
from realign_lightning.data.shards import INDEX_NAME, ShardInfo, check_shard, read_index
from realign_lightning.types import EncodedSample, PreferenceSample, SampleError, SkippedSample

log = logging.getLogger(__name__)

Source = str | Path | Sequence[str | Path]
"""Where shards are: a folder with an index, a tar file, a pattern such as ``shards/*.tar``, or a list of these."""


class SampleIndex(NamedTuple):
    """What a sampler asks a dataset for.

    Args:
        row: position of the sample in the dataset.
        weight: 1 for a sample, 0 for one that only fills up the last batches.
    """

    row: int
    weight: float = 1.0


class ShardDataset(Dataset[EncodedSample]):
    """Preference samples of local shards, each decoded and encoded for a backbone when it is asked for.

    Every shard is scanned when the dataset is made; where an ``index.json`` lists it, its size, number of samples and
    SHA-256 are checked as well. Damage to the structure of a shard is an error here, before training. A sample that
    lacks a member is left out and named in :attr:`skipped` and the log. A sample that turns out bad when it is read
    (broken image, empty response, nothing left after encoding ...) is replaced by the next good one with weight 0 and
    reported in :attr:`EncodedSample.skipped <realign_lightning.types.EncodedSample>`.

    Args:
        source: a folder with an ``index.json``, a tar file, a pattern, or a list of these.
        backbone: encodes the samples.

    Raises:
        ShardError: if shards are missing, damaged, hold a key twice, or hold no complete sample.
    """

    def __init__(self, source: Source, backbone: Backbone) -> None:
        self.backbone = backbone
        self.source = source
        stored = _scan(source)
        self._samples = [sample for sample in stored if not sample.missing]
        self.skipped: tuple[SkippedSample, ...] = tuple(
            SkippedSample(sample.shard.name, sample.key, f"missing member {', '.join(sample.missing)}")
            for sample in stored
            if sample.missing
        )
        self._bad: dict[int, str] = {}
        self._lengths: np.ndarray | None = None
        if self.skipped:
            log.warning("%d of %d samples skipped: %s", len(self.skipped), len(stored), describe_skips(self.skipped))
        if not self._samples:
            raise ShardError(f"no complete sample in {source!r}; first: {describe_skips(self.skipped[:1])}")

    def __len__(self) -> int:
        """Number of samples that have all their members."""
        return len(self._samples)

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, by index."""
        return [sample.key for sample in self._samples]

    def decode(self, index: int) -> PreferenceSample:
        """The decoded sample at ``index``, before it is encoded for the backbone.

        Args:
            index: 0 to ``len(self) - 1``.

        Raises:
            SampleError: if the sample breaks the contract.
        """
        return decode_sample(self._samples[index].read())

    def fingerprint(self, index: int) -> str:
        """What the content of the sample at ``index`` is identified by; its bytes are read, nothing is decoded.

        Args:
            index: 0 to ``len(self) - 1``.
        """
        return fingerprint_members(self._samples[index].read())

    def first(self, count: int) -> list[PreferenceSample]:
        """The first samples that can be used, for showing.

        Args:
            count: how many at most.
        """
        usable = (index for index in range(len(self)) if self._encode(index) is not None)
        return [self.decode(index) for index in itertools.islice(usable, count)]

    def estimated_lengths(self) -> np.ndarray:
        """Roughly how many tokens the longest row of every sample has; measured when first asked.

        Nothing is encoded: texts count a token per 4 UTF-8 bytes, images what the backbone's
        :meth:`~realign_lightning.backbones.Backbone.image_lengths` says of the sizes in their headers. What all samples
        share, such as a fixed number of image tokens, may be left out. A progress bar shows when it takes longer than
        two seconds.

        Returns:
            (len(self),) float64; 0 for a sample that cannot be read.
        """
        if self._lengths is None:
            self._lengths = estimate_lengths(self._samples, self.backbone)
        return self._lengths

    def __getitem__(self, item: int | SampleIndex) -> EncodedSample:
        """The encoded sample at an index, or a stand-in of weight 0.

        Args:
            item: an index, alone or with the weight that a sampler gives it.

        Returns:
            The sample; if it is bad, the next good one with weight 0 and the bad one in ``skipped``. Each bad sample is
            reported by its own index only, and not by one that merely fills up, so that an epoch reports it once.

        Raises:
            IndexError: if the index is out of range.
            ShardError: if every sample is bad.
        """
        index, weight = item if isinstance(item, SampleIndex) else (item, 1.0)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 to {len(self) - 1}")
        for candidate in (*range(index, len(self)), *range(index)):
            encoded = self._encode(candidate)
            if encoded is not None:
                break
        else:
            raise ShardError(f"all {len(self)} samples of {self.source!r} are bad; first: {self._describe(index)}")
        if candidate == index:
            return encoded if weight == 1.0 else dataclasses.replace(encoded, weight=weight)
        skipped = (self._describe(index),) if weight else ()
        return dataclasses.replace(encoded, weight=0.0, skipped=skipped)

    def _encode(self, index: int) -> EncodedSample | None:
        if index in self._bad:
            return None
        stored = self._samples[index]
        try:
            members = stored.read()
            encoded = self.backbone.encode_sample(decode_sample(members))
            return dataclasses.replace(encoded, fingerprint=fingerprint_members(members))
        except SampleError as error:
            self._bad[index] = str(error)
            return None
        except Exception as error:
            error.add_note(f"while reading sample {stored.key} of shard {stored.shard}")
            raise

    def _describe(self, index: int) -> SkippedSample:
        stored = self._samples[index]
        return SkippedSample(stored.shard.name, stored.key, self._bad[index])


class EpochSampler(DistributedSampler[SampleIndex]):
    """One global order per seed and epoch, dealt to the ranks in turn.

    Rank r takes positions r, r + world_size, ... of the order, so that the samples of a global batch do not depend on
    how it is split. The order is filled up to a multiple of the world size by samples of weight 0: every rank gets
    equally many, and every sample has weight 1 exactly once per epoch.

    With ``lengths``, batches hold samples of similar length (:func:`~realign_lightning.data.group_by_length`). What all
    ranks read in one step then depends on seed, epoch and ``batch_size * world_size``, and not on how many ranks they
    are.

    It is a :class:`torch.utils.data.DistributedSampler` because that is what Lightning leaves in place and tells the
    epoch. After a resume Lightning tells one too many from the second epoch on (it counts the end of the epoch that the
    checkpoint closed twice), so a Trainer's own count can be given as ``current_epoch``.

    Args:
        num_samples: samples in the dataset.
        world_size: number of ranks.
        rank: this rank.
        seed: not negative; equal on all ranks.
        shuffle: whether the order is shuffled, anew in every epoch.
        current_epoch: asked for the epoch whenever one begins; None trusts :meth:`set_epoch`.
        lengths: length of every sample, in any unit; None does not group them.
        batch_size: samples per batch and rank; only the grouping needs it.

    Raises:
        ValueError: if an argument is out of range, or ``lengths`` are given without ``shuffle``.

    Example:
        >>> [tuple(item) for item in EpochSampler(3, world_size=2, rank=1, shuffle=False)]
        [(1, 1.0), (0, 0.0)]
    """

    def __init__(
        self,
        num_samples: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        current_epoch: Callable[[], int] | None = None,
        lengths: Sequence[float] | np.ndarray | None = None,
        batch_size: int = 1,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if lengths is not None and len(lengths) != num_samples:
            raise ValueError(f"lengths must hold one number for each of {num_samples} samples, got {len(lengths)}")
        if lengths is not None and not shuffle:
            raise ValueError("lengths group shuffled samples: set shuffle=True, or leave lengths out")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        # The parent asks its dataset for nothing but the length.
        super().__init__(range(num_samples), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self._available = num_samples
        self._current_epoch = current_epoch
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.float64)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[SampleIndex]:
        """What this rank reads in the current epoch, ``len(self)`` items."""
        if self._current_epoch is not None:
            self.set_epoch(self._current_epoch())
        order = self._order()
        for position in range(self.rank, self.total_size, self.num_replicas):
            yield SampleIndex(int(order[position]), 1.0 if position < self._available else 0.0)

    def _order(self) -> np.ndarray:
        """The samples in the order of this epoch, filled up to a multiple of the world size."""
        if not self.shuffle:
            return np.resize(np.arange(self._available), self.total_size)
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self._available)
        if self._lengths is None:
            return np.resize(order, self.total_size)
        return group_by_length(order, self._lengths, self._batch_size, self.num_replicas, random)


def describe_skips(skipped: Sequence[SkippedSample], limit: int = 20) -> str:
    """Skipped samples in words, for logs and errors.

    Args:
        skipped: the samples.
        limit: how many are named; of the rest only the number is told.

    Returns:
        One line.

    Example:
        >>> describe_skips([SkippedSample("shard-000000.tar", "17", "chosen is empty")])
        'shard-000000.tar: 17 (chosen is empty)'
    """
    named = "; ".join(f"{shard}: {key} ({reason})" for shard, key, reason in skipped[:limit])
    return named if len(skipped) <= limit else f"{named}; and {len(skipped) - limit} more"


def _scan(source: Source) -> list[StoredSample]:
    """Scan and check all shards; keys must be unique over all of them."""
    samples: list[StoredSample] = []
    shard_of: dict[str, Path] = {}
    for path, info in tqdm(_locate(source), desc="checking shards", unit="shard", delay=2, leave=False):
        found = scan_shard(path)
        if info is not None:
            check_shard(path, info, len(found))
        for sample in found:
            if sample.key in shard_of:
                raise ShardError(f"duplicate key {sample.key!r}: in shard {shard_of[sample.key]} and in shard {path}")
            shard_of[sample.key] = path
        samples.extend(found)
    return samples


def _locate(source: Source) -> list[tuple[Path, ShardInfo | None]]:
    """Shards and what an index says of them, if there is one beside them."""
    items = [source] if isinstance(source, str | Path) else list(source)
    paths: list[str | Path] = []
    for item in items:
        paths.extend(_indexed(Path(item)) if Path(item).is_dir() else [item])
    shards = find_shards(paths)
    known = {
        folder / info.name: info
        for folder in dict.fromkeys(shard.parent for shard in shards)
        if (folder / INDEX_NAME).exists()
        for info in read_index(folder).shards
    }
    return [(shard, known.get(shard)) for shard in shards]


def _indexed(folder: Path) -> list[Path]:
    shards = [folder / info.name for info in read_index(folder).shards]
    for shard in shards:
        if not shard.is_file():
            raise ShardError(f"shard {shard} is listed in {folder / INDEX_NAME} but missing; write or copy it again")
    return shards
