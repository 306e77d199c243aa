"""Preference samples of shards, decoded and encoded one by one, in whatever order they are asked for.

What cannot be used is counted and named, and its place in the batch is taken by a stand-in of weight 0, so that all
ranks take equally many steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.lengths import estimate_lengths
from realign_lightning.data.order import SampleIndex
from realign_lightning.data.remote import ShardCache
from realign_lightning.data.scan import ShardError
from realign_lightning.data.schema import decode_sample, fingerprint_members
from realign_lightning.data.shard_set import ShardSet, Source
from realign_lightning.data.transform import SampleTransform, sample_random
from realign_lightning.types import EncodedSample, PreferenceSample, SampleError, SkippedSample

log = logging.getLogger(__name__)


class ShardDataset(Dataset[EncodedSample]):
    """Preference samples of shards, each decoded and encoded for a backbone when it is asked for.

    Where an ``index.json`` lists a shard, its size and SHA-256 are checked when the dataset is made; other tars are
    scanned. Damage to the structure of a shard is an error here, before training (in a remote shard, when it is
    fetched). A sample that lacks a member is left out and named in :attr:`skipped` and the log. A sample that turns out
    bad when it is read (broken image, empty response, nothing left after encoding ...) is replaced by the next good one
    with weight 0 and reported in :attr:`EncodedSample.skipped <realign_lightning.types.EncodedSample>`.

    Args:
        source: a folder with an ``index.json`` (a path or an address), a tar file, a pattern, or a list of these.
        backbone: encodes the samples.
        cache: keeps remote shards, and remembers which local ones were checked and have not changed; without it all are
            read in full to be checked, and remote ones are refused.
        transform: changes samples before they are encoded.
        seed: of the transform's random numbers.

    Raises:
        ShardError: if shards are missing, damaged, hold a key twice, or hold no complete sample.
    """

    def __init__(
        self,
        source: Source,
        backbone: Backbone,
        cache: ShardCache | None = None,
        transform: SampleTransform | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone
        self.source = source
        self.transform = transform
        self.seed = seed
        self.shards = ShardSet(source, cache)
        self.skipped: tuple[SkippedSample, ...] = self.shards.skipped
        self._bad: dict[int, str] = {}
        self._lengths: np.ndarray | None = None
        if self.skipped:
            log.warning(
                "%d of %d samples skipped: %s", len(self.skipped), self.shards.total, describe_skips(self.skipped)
            )
        if not len(self.shards):
            raise ShardError(f"no complete sample in {source!r}; first: {describe_skips(self.skipped[:1])}")

    def __len__(self) -> int:
        """Number of samples that have all their members."""
        return len(self.shards)

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, by index."""
        return [key.decode() for key in self.shards.table.keys.tolist()]

    def decode(self, index: int) -> PreferenceSample:
        """The decoded sample at ``index``, as it is stored.

        Args:
            index: 0 to ``len(self) - 1``.

        Raises:
            SampleError: if the sample breaks the contract.
        """
        return decode_sample(self.shards.read(index))

    def fingerprint(self, index: int) -> str:
        """What the content of the sample at ``index`` is identified by; its bytes are read, nothing is decoded.

        Args:
            index: 0 to ``len(self) - 1``.
        """
        return fingerprint_members(self.shards.read(index))

    def first(self, count: int) -> list[PreferenceSample]:
        """The first samples that can be used, for showing.

        Args:
            count: how many at most.
        """
        usable = (index for index in range(len(self)) if self._encode(index, 0) is not None)
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
            self._lengths = estimate_lengths(self.shards.read, len(self), self.backbone)
        return self._lengths

    def __getitem__(self, item: int | SampleIndex) -> EncodedSample:
        """The encoded sample at an index, or a stand-in of weight 0.

        Args:
            item: an index, alone or with what a sampler says of it.

        Returns:
            The sample; if it is bad, the next good one with weight 0 and the bad one in ``skipped``. Each bad sample is
            reported by its own index only, and not by one that merely fills up, so that an epoch reports it once.

        Raises:
            IndexError: if the index is out of range.
            ShardError: if every sample is bad.
        """
        index, weight, epoch, coming = item if isinstance(item, SampleIndex) else SampleIndex(item)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 to {len(self) - 1}")
        self.shards.prefetch(coming)
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            encoded = self._encode(candidate, epoch)
            if encoded is not None:
                break
        else:
            raise ShardError(f"all {len(self)} samples of {self.source!r} are bad; first: {self._describe(index)}")
        if candidate == index:
            return encoded if weight == 1.0 else dataclasses.replace(encoded, weight=weight)
        skipped = (self._describe(index),) if weight else ()
        return dataclasses.replace(encoded, weight=0.0, skipped=skipped)

    def _encode(self, index: int, epoch: int) -> EncodedSample | None:
        if index in self._bad:
            return None
        try:
            members = self.shards.read(index)
            sample = decode_sample(members)
            if self.transform is None:
                encoded = self.backbone.encode_sample(sample)
                return dataclasses.replace(encoded, fingerprint=fingerprint_members(members))
            # Without a fingerprint: of what changes from epoch to epoch nothing may be cached.
            return self.backbone.encode_sample(self.transform(sample, sample_random(self.seed, epoch, sample.key)))
        except SampleError as error:
            self._bad[index] = str(error)
            return None
        except ShardError:
            raise
        except Exception as error:
            stored = self.shards.stored(index)
            error.add_note(f"while reading sample {stored.key} of shard {stored.shard}")
            raise

    def _describe(self, index: int) -> SkippedSample:
        stored = self.shards.stored(index)
        return SkippedSample(stored.shard.name, stored.key, self._bad[index])


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
