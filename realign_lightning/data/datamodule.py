"""The Lightning data module of dual-preference training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.builder import ShardBuilder
from realign_lightning.data.stream import EpochSampler, SampleIndex, ShardDataset, describe_skips
from realign_lightning.types import EncodedSample, PreferenceBatch, SkippedSample

log = logging.getLogger(__name__)

_CHECK_EVERY = 64
"""Batches between two sums over ranks."""


class BadDataError(RuntimeError):
    """More samples are bad than is allowed; the message counts and names them."""


class SkipLog:
    """Counts skipped samples, names each once in the log, and raises when they are too many.

    They are too many when they exceed ``max_bad_fraction`` of all; a single bad sample is always let pass, unless
    ``max_bad_fraction`` is 0. In short: ``bad > max(1, max_bad_fraction * total)``, or ``bad > 0``.

    Args:
        total: samples in the shards, those that lack a member included.
        max_bad_fraction: from 0 to 1.
        skipped: samples that are known to be bad before reading begins, already named in the log.

    Raises:
        BadDataError: if these are too many already.
    """

    def __init__(self, total: int, max_bad_fraction: float, skipped: Iterable[SkippedSample] = ()) -> None:
        self.total = total
        self.allowed = max(1.0, max_bad_fraction * total) if max_bad_fraction > 0 else 0.0
        self.max_bad_fraction = max_bad_fraction
        self._known = {(skip.shard, skip.key): skip for skip in skipped}
        self._before = len(self._known)
        self._pass: set[tuple[str, str]] = set()
        self.check(0)

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Every distinct bad sample that this process has met."""
        return tuple(self._known.values())

    @property
    def met(self) -> int:
        """Distinct bad samples that this process has read in the current pass over the data."""
        return len(self._pass)

    def add(self, skipped: Iterable[SkippedSample]) -> None:
        """Count skipped samples; one that is new is logged as a warning.

        Args:
            skipped: samples that were skipped while a batch was read.
        """
        for skip in skipped:
            name = (skip.shard, skip.key)
            if name not in self._known:
                log.warning("sample skipped: %s", describe_skips([skip]))
                self._known[name] = skip
            self._pass.add(name)

    def check(self, met: int) -> None:
        """Compare a number of bad samples, beside those known before reading, with what is allowed.

        Args:
            met: bad samples read in this pass, on one rank or on all.

        Raises:
            BadDataError: if they are too many.
        """
        bad = self._before + met
        if bad > self.allowed:
            raise BadDataError(
                f"{bad} of {self.total} samples are bad, more than max_bad_fraction={self.max_bad_fraction} allows "
                f"({self.allowed:g}); repair the shards or raise max_bad_fraction. "
                f"Skipped here: {describe_skips(self.skipped)}"
            )

    def begin_pass(self) -> None:
        """Begin a new pass over the data: what was met before is met again."""
        self._pass.clear()


class SampleReader:
    """The samples of one split, read outside of training: nothing is shuffled, and no bad sample is counted.

    Args:
        dataset: whose samples.
        batch_size: samples per batch.
        num_workers: processes that read and encode.
        pin_memory: copy batches to page-locked memory.
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, num_workers: int = 0, pin_memory: bool = False) -> None:
        self._dataset = dataset
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "collate_fn": dataset.backbone.collate,
        }

    def __len__(self) -> int:
        """Number of samples that have all their members."""
        return len(self._dataset)

    def fingerprint(self, row: int) -> str:
        """What the content of a sample is identified by, see :meth:`ShardDataset.fingerprint`.

        Args:
            row: 0 to ``len(self) - 1``.
        """
        return self._dataset.fingerprint(row)

    def batches(self, rows: Sequence[tuple[int, float]]) -> DataLoader[EncodedSample]:
        """Batches (:class:`~realign_lightning.types.PreferenceBatch`) of some samples, in the order given.

        Args:
            rows: rows with their weights; one that turns out bad is replaced by a stand-in of weight 0.
        """
        items = [SampleIndex(*row) for row in rows]
        # A generator of its own: reading must not move the global random state.
        return DataLoader(self._dataset, sampler=items, generator=torch.Generator(), **self._options)


class DualPreferenceDataModule(LightningDataModule):
    """Dual-preference shards as batches for a backbone: shuffled, split over ranks, every sample once per epoch.

    The order depends on ``seed`` and the epoch alone, not on ranks, workers or batch size; with ``group_by_length`` it
    depends on the batch size of all ranks together too. All ranks take equally many steps: the last batches are filled
    up by samples of weight 0 (``PreferenceBatch.weights``), as are the places of samples that cannot be used. These are
    logged once with shard, key and reason, and stop the run when they exceed ``max_bad_fraction`` (see
    :class:`SkipLog`); with several ranks the sum over all ranks is checked every 64 batches and at the end of each pass
    over the data.

    Args:
        backbone: encodes and collates samples; every worker holds its own copy.
        train: shards to train on: a folder with an ``index.json``, a tar file, a pattern such as ``data/*.tar``, or a
            list of these.
        val: shards to validate on, in the same forms; None for no validation.
        batch_size: samples per batch and rank.
        eval_batch_size: samples per validation batch and rank; ``batch_size`` if None.
        num_workers: processes per rank that read and encode; 0 reads in the main process.
        shuffle: shuffle the training samples anew in every epoch.
        seed: of the order; not negative.
        max_bad_fraction: share of bad samples, from 0 to 1, above which the run stops.
        pin_memory: copy batches to page-locked memory; if None, when a CUDA device is there.
        builder: makes the shards in ``train`` and ``val`` when they are not there yet; these must be folders then.
        group_by_length: fill the training batches with samples of similar length, so that little is padded; needs
            ``shuffle``. Lengths are estimated once, before training, from the stored texts and the sizes of the images
            (:meth:`ShardDataset.estimated_lengths <realign_lightning.data.ShardDataset.estimated_lengths>`). It pays
            where rows are padded (Gemma 3, PaliGemma, ``share_prefix: false``); a packed batch has no padding, and it
            only evens out steps and ranks.

    Raises:
        ValueError: if an argument is out of range, or ``group_by_length`` comes with ``shuffle=False``.

    Example::

        data = DualPreferenceDataModule(backbone, train="shards/train", val="shards/val", batch_size=4)
        trainer.fit(module, datamodule=data)
    """

    def __init__(
        self,
        backbone: Backbone,
        train: str | list[str],
        val: str | list[str] | None = None,
        batch_size: int = 1,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        pin_memory: bool | None = None,
        builder: ShardBuilder | None = None,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}")
        if group_by_length and not shuffle:
            raise ValueError(
                "group_by_length orders samples by length and chance, got shuffle=False: set shuffle=True, or leave "
                "group_by_length out"
            )
        # Hyperparameters go into checkpoints, which must hold nothing but plain values.
        train, val = _plain(train), None if val is None else _plain(val)
        self.save_hyperparameters(ignore=["backbone", "builder"])
        self.backbone = backbone
        self.train_source = train
        self.val_source = val
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.builder = builder
        if builder is not None:
            _folder(train)
            _folder(val or "")
        self._datasets: dict[str, ShardDataset] = {}
        self._skips: dict[str, SkipLog] = {}
        self._truncated: dict[str, set[str]] = {"train": set(), "val": set()}
        self._pass: dict[str, tuple[Any, ...]] = {}
        self._batches = {"train": 0, "val": 0}

    def prepare_data(self) -> None:
        """Let the builder make what is missing; Lightning calls this in one process per machine."""
        if self.builder is not None:
            self.builder.build(self.backbone, _folder(self.train_source), self.val_source and _folder(self.val_source))

    def setup(self, stage: str | None = None) -> None:
        """Scan and check the shards that a stage reads; what was scanned before is kept.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or None for all.

        Raises:
            ShardError: if shards are missing or damaged.
            BadDataError: if too many samples lack a member.
        """
        if stage in ("fit", None):
            self._open("train", self.train_source)
        if stage in ("fit", "validate", None) and self.val_source is not None:
            self._open("val", self.val_source)

    def train_dataloader(self) -> DataLoader[EncodedSample]:
        """Training batches (:class:`~realign_lightning.types.PreferenceBatch`) of this rank."""
        return self._loader("train", self.batch_size, self.shuffle)

    def val_dataloader(self) -> DataLoader[EncodedSample] | list[DataLoader[EncodedSample]]:
        """Validation batches of this rank, in the order of the shards; an empty list if there are none."""
        return [] if self.val_source is None else self._loader("val", self.eval_batch_size, shuffle=False)

    def sample_readers(self) -> dict[str, SampleReader]:
        """Readers of the splits (``train``, ``val``) that are set up; ``reference: cached`` reads through them.

        Batches hold ``eval_batch_size`` samples.
        """
        return {
            split: SampleReader(dataset, self.eval_batch_size, self.num_workers, self.pin_memory)
            for split, dataset in self._datasets.items()
        }

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count and name the samples that were skipped on the way to a batch; Lightning calls this in the main process.

        Args:
            batch: the batch.
            dataloader_idx: unused.

        Returns:
            The batch as it is.

        Raises:
            BadDataError: if too many samples are bad.
        """
        if isinstance(batch, PreferenceBatch) and self.trainer is not None:
            self._count(self.trainer, "train" if self.trainer.training else "val", batch)
        return batch

    @property
    def skipped(self) -> dict[str, tuple[SkippedSample, ...]]:
        """Distinct bad samples that this process has met so far, by split (``train``, ``val``)."""
        return {split: skips.skipped for split, skips in self._skips.items()}

    @property
    def truncated(self) -> dict[str, frozenset[str]]:
        """Keys of the samples this process has met whose responses were too long and were cut, by split."""
        return {split: frozenset(keys) for split, keys in self._truncated.items()}

    def _open(self, split: str, source: str | list[str]) -> None:
        if split not in self._datasets:
            dataset = ShardDataset(source, self.backbone)
            total = len(dataset) + len(dataset.skipped)
            self._skips[split] = SkipLog(total, self.max_bad_fraction, dataset.skipped)
            self._datasets[split] = dataset

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader[EncodedSample]:
        if split not in self._datasets:
            raise RuntimeError(f"call setup() before asking for the {split} loader")
        dataset = self._datasets[split]
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        current_epoch = None if trainer is None else lambda: trainer.current_epoch
        lengths = dataset.estimated_lengths() if self.group_by_length and split == "train" else None
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=EpochSampler(
                len(dataset), world_size, rank, self.seed, shuffle, current_epoch, lengths, batch_size
            ),
            num_workers=self.num_workers,
            collate_fn=self.backbone.collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            # A generator of its own: reading must not move the global random state, whatever is read.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _count(self, trainer: Trainer, split: str, batch: PreferenceBatch) -> None:
        self._begin_pass_if_new(trainer, split)
        self._skips[split].add(batch.skipped)
        self._count_truncated(split, batch)
        self._batches[split] += 1
        ends_pass = self._batches[split] == self._batches_per_pass(trainer, split)
        if trainer.world_size == 1 or ends_pass or self._batches[split] % _CHECK_EVERY == 0:
            self._check_skips(trainer, split)

    def _begin_pass_if_new(self, trainer: Trainer, split: str) -> None:
        """Passes may end early (limits, a step limit), so they are told apart by when they run, not by counting."""
        current: tuple[Any, ...] = (trainer.current_epoch,)
        if split == "val":
            current = (trainer.current_epoch, trainer.global_step, trainer.sanity_checking)
        if self._pass.get(split, current) != current:
            self._check_skips(trainer, split)
            self._skips[split].begin_pass()
            self._batches[split] = 0
        self._pass[split] = current

    def _check_skips(self, trainer: Trainer, split: str) -> None:
        """Compare this pass's bad samples, of all ranks together, with what is allowed; called in step on all ranks."""
        skips = self._skips[split]
        met = skips.met
        if trainer.world_size > 1:
            here = torch.tensor(float(met), device=trainer.strategy.root_device)
            met = int(trainer.strategy.reduce(here, reduce_op="sum"))
        skips.check(met)

    def _count_truncated(self, split: str, batch: PreferenceBatch) -> None:
        new = set(batch.truncated) - self._truncated[split]
        if new and not self._truncated[split]:
            log.warning(
                "Responses of %s are longer than the backbone's max_length and are cut at their end (first: %s). "
                "Raise max_length, or see how many with DualPreferenceDataModule.truncated.",
                split,
                min(new),
            )
        self._truncated[split] |= new

    def _batches_per_pass(self, trainer: Trainer, split: str) -> int:
        rows = self.batch_size if split == "train" else self.eval_batch_size
        return -(-len(self._datasets[split]) // (rows * trainer.world_size))


def _folder(source: str | list[str]) -> str:
    if not isinstance(source, str):
        raise ValueError(f"builder makes one folder per split: expected one path in train and in val, got {source!r}")
    if source.endswith(".tar") or set(source) & set("*?["):
        raise ValueError(
            f"builder makes folders, but {source!r} names shards that exist. To train on them, leave the builder out "
            "(--data.builder null)."
        )
    return source


def _plain(source: Any) -> Any:
    return [str(item) for item in source] if isinstance(source, list | tuple) else str(source)
