"""The order of an epoch: one for all ranks and workers, from seed, epoch and manifest alone."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from realign_lightning.data.lengths import group_by_length


class SampleIndex(NamedTuple):
    """What a sampler asks a dataset for.

    Args:
        row: position of the sample in the dataset.
        weight: 1 for a sample, 0 for one that only fills up the last batches.
        epoch: which epoch it is read in; random changes to samples depend on it.
        coming: numbers of the shards that are read now and next, told where a block of shards begins.
    """

    row: int
    weight: float = 1.0
    epoch: int = 0
    coming: tuple[int, ...] = ()


class Place(NamedTuple):
    """How far the reading of training samples has come.

    Args:
        epoch: from 0.
        consumed: samples of this epoch's order that all ranks together have read, those that fill up included.
    """

    epoch: int = 0
    consumed: int = 0


class Blocks:
    """Shards that are read together: within a block samples are shuffled, and blocks are read one after the other.

    Args:
        counts: samples per shard.
        size: shards per block.

    Raises:
        ValueError: if ``size`` is below 1.
    """

    def __init__(self, counts: Sequence[int], size: int) -> None:
        if size < 1:
            raise ValueError(f"block_shards must be at least 1, got {size}")
        self.counts = list(counts)
        self.size = size

    def shards(self, random: np.random.Generator | None) -> list[list[int]]:
        """Numbers of the shards by block, in reading order.

        Args:
            random: shuffles the shards; None leaves them in order.
        """
        numbers = np.arange(len(self.counts)) if random is None else random.permutation(len(self.counts))
        return [numbers[start : start + self.size].tolist() for start in range(0, len(numbers), self.size)]

    def order(self, blocks: Sequence[Sequence[int]], random: np.random.Generator | None) -> np.ndarray:
        """The samples in reading order.

        Args:
            blocks: from :meth:`shards`.
            random: shuffles the samples within each block; None leaves them in order.
        """
        starts = [0, *itertools.accumulate(self.counts)]
        rows = [np.concatenate([np.arange(starts[one], starts[one + 1]) for one in block]) for block in blocks]
        return np.concatenate(rows if random is None else [random.permutation(block) for block in rows])


class EpochSampler(DistributedSampler[SampleIndex]):
    """One global order per seed and epoch, dealt to the ranks in turn.

    Rank r takes positions r, r + world_size, ... of the order, so that the samples of a global batch do not depend on
    how it is split. The order is filled up to a multiple of the world size by samples of weight 0: every rank gets
    equally many, and every sample has weight 1 exactly once per epoch.

    With ``lengths``, batches hold samples of similar length (:func:`~realign_lightning.data.group_by_length`). What all
    ranks read in one step then depends on seed, epoch and ``batch_size * world_size``, and not on how many ranks they
    are. With ``blocks``, shards are read a few at a time, for storage that is slow at random access.

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
        blocks: shards that are read together; None reads at random among all.
        start: asked where a resumed run goes on, whenever an epoch begins; what comes before it in its epoch is left
            out. Its ``consumed`` is a multiple of the world size.

    Raises:
        ValueError: if an argument is out of range, or ``lengths`` are given without ``shuffle`` or with ``blocks``.

    Example:
        >>> [(item.row, item.weight) for item in EpochSampler(3, world_size=2, rank=1, shuffle=False)]
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
        blocks: Blocks | None = None,
        start: Callable[[], Place] = Place,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if lengths is not None and len(lengths) != num_samples:
            raise ValueError(f"lengths must hold one number for each of {num_samples} samples, got {len(lengths)}")
        if lengths is not None and (not shuffle or blocks is not None):
            raise ValueError("lengths group shuffled samples of all shards: set shuffle=True, or leave lengths out")
        if blocks is not None and sum(blocks.counts) != num_samples:
            raise ValueError(f"blocks must hold {num_samples} samples, got {sum(blocks.counts)}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        # The parent asks its dataset for nothing but the length.
        super().__init__(range(num_samples), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self._available = num_samples
        self._current_epoch = current_epoch
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.float64)
        self._batch_size = batch_size
        self._blocks = blocks
        self._start = start

    def __iter__(self) -> Iterator[SampleIndex]:
        """What this rank reads in the current epoch: ``len(self)`` items, fewer where a resumed run goes on."""
        start = self._start()
        if self._current_epoch is not None:
            # A checkpoint of an epoch's end is loaded before the Trainer counts that end.
            self.set_epoch(max(self._current_epoch(), start.epoch))
        order, blocks = self._order()
        ends = [] if self._blocks is None else _ends(blocks, self._blocks.counts)
        block = -1
        first = start.consumed if self.epoch == start.epoch else 0
        for position in range(first + self.rank, self.total_size, self.num_replicas):
            coming: tuple[int, ...] = ()
            if ends and position < self._available and (now := bisect.bisect_right(ends, position)) != block:
                block, coming = now, tuple(itertools.chain(*blocks[now : now + 2]))
            yield SampleIndex(int(order[position]), float(position < self._available), self.epoch, coming)

    def _order(self) -> tuple[np.ndarray, list[list[int]]]:
        """The samples in the order of this epoch, filled up to whole rounds of the ranks, and the shards by block."""
        random = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        if self._blocks is not None:
            blocks = self._blocks.shards(random)
            order = self._blocks.order(blocks, random)
            # Filled up from what was read last: the first shards may have left the cache.
            return np.pad(order, (0, self.total_size - len(order)), mode="edge"), blocks
        if random is None:
            return np.resize(np.arange(self._available), self.total_size), []
        order = random.permutation(self._available)
        if self._lengths is None:
            return np.resize(order, self.total_size), []
        return group_by_length(order, self._lengths, self._batch_size, self.num_replicas, random), []


def _ends(blocks: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
    """Positions in the order at which blocks end."""
    return list(itertools.accumulate(sum(counts[number] for number in block) for block in blocks))
