"""The Lightning data module of dual-preference training."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from realign_lightning.backbones.base import Backbone
from realign_lightning.data.builder import ShardBuilder
from realign_lightning.data.order import Blocks, EpochSampler, Place, SampleIndex
from realign_lightning.data.quarantine import QUARANTINE_NAME, Quarantine, SkipLog
from realign_lightning.data.remote import ShardCache
from realign_lightning.data.shard_set import cache_folder
from realign_lightning.data.stream import ShardDataset
from realign_lightning.data.transform import SampleTransform
from realign_lightning.ranks import gather
from realign_lightning.types import EncodedSample, PreferenceBatch, SkippedSample

log = logging.getLogger(__name__)

_CHECK_EVERY = 64
"""Batches between two sums over ranks."""

_REMOTE_BLOCK = 4
"""Shards per block of remote storage, unless told otherwise."""


class ResumableLoader(DataLoader[EncodedSample]):
    """A loader that goes on where a checkpoint left off.

    How far it had come is in the data module's state, so that it has none of its own. Lightning asks loaders that
    cannot resume to be replaced, and knows those that can by these methods.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing; see :meth:`DualPreferenceDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Does nothing.

        Args:
            state_dict: empty.
        """


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

        Raises:
            ValueError: if the samples are changed at random, so that nothing of them can be kept.
        """
        if self._dataset.transform is not None:
            raise ValueError(
                "reference='cached' keeps log-probs of samples as they are stored, and `transform` changes them in "
                "every epoch: set another `reference`, or leave the transform out."
            )
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

    The order depends on ``seed``, the epoch and the samples alone, not on ranks, workers or batch size; with
    ``group_by_length`` it depends on the batch size of all ranks together too, with ``block_shards`` on how the samples
    are spread over shards. All ranks take equally many steps: the last batches are filled up by samples of weight 0
    (``PreferenceBatch.weights``), as are the places of samples that cannot be used. These are logged once with shard,
    key and reason, listed in ``quarantine.jsonl`` in the run's log folder, and stop the run when they exceed
    ``max_bad_fraction`` (see :class:`SkipLog`); with several ranks the sum over all ranks is checked after each of the
    first 64 batches of a pass over the data, then every 64 batches and at its end; after every batch where none is
    allowed.

    A checkpoint knows how far the epoch had come: a resumed run goes on with the very next batch, on any number of
    ranks, as long as the global batch (``batch_size`` x ranks x ``accumulate_grad_batches``) stays the same.

    Shards may lie in remote storage (``http://``, ``https://``, ``s3://``, ``gs://``, ``hf://``): they are read a block
    at a time, and fetched in advance to ``cache_dir``.

    Args:
        backbone: encodes and collates samples; every worker holds its own copy.
        train: shards to train on: a folder with an ``index.json`` (a path, or an address such as
            ``s3://bucket/pairs``), a tar file, a pattern such as ``data/*.tar``, or a list of these.
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
        global_batch_size: samples per optimizer step, of all ranks together. If given, the Trainer's
            ``accumulate_grad_batches`` is set to what it takes; it must be divisible.
        block_shards: shards that are read together. Samples are shuffled within such a block, and blocks are read one
            after the other in random order, which suits storage that is slow at random access. None is 4 for remote
            shards; local ones are read at random among all.
        cache_dir: folder for fetched shards, and for a note of which local ones were checked and have not changed.
            None is ``$REALIGN_CACHE``, or ``~/.cache/realign-lightning``.
        cache_size_gb: most that fetched shards may take there, in 1e9 bytes.
        transform: changes training samples before they are encoded, at random but reproducibly.

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
        global_batch_size: int | None = None,
        block_shards: int | None = None,
        cache_dir: str | None = None,
        cache_size_gb: float = 50.0,
        transform: SampleTransform | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("global_batch_size", 1 if global_batch_size is None else global_batch_size, 1),
            ("block_shards", 1 if block_shards is None else block_shards, 1),
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
        if not cache_size_gb > 0:
            raise ValueError(f"cache_size_gb must be above 0, got {cache_size_gb}")
        # Hyperparameters go into checkpoints, which must hold nothing but plain values.
        train, val = _plain(train), None if val is None else _plain(val)
        self.save_hyperparameters(ignore=["backbone", "builder", "transform"])
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
        self.global_batch_size = global_batch_size
        self.block_shards = block_shards
        self.transform = transform
        self.cache = ShardCache(cache_dir or cache_folder(), int(cache_size_gb * 1e9))
        if builder is not None:
            _folder(train)
            _folder(val or "")
        self._datasets: dict[str, ShardDataset] = {}
        self._skips: dict[str, SkipLog] = {}
        self._truncated: dict[str, set[str]] = {"train": set(), "val": set()}
        self._pass: dict[str, tuple[Any, ...]] = {}
        self._batches = {"train": 0, "val": 0}
        self._quarantine: Quarantine | None = None
        self._resumed: dict[str, Any] | None = None
        self._sampler: EpochSampler | None = None
        self._accumulated: int | None = None

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
            ValueError: if ``global_batch_size`` is not divisible.
        """
        if self._quarantine is None and self.trainer is not None:
            self._quarantine = Quarantine(Path(self.trainer.log_dir or self.trainer.default_root_dir, QUARANTINE_NAME))
        if stage == "fit" and self.trainer is not None:
            self._resumed = self._accumulated = None
            self._begin_from_place(self.trainer)
        if stage in ("fit", None):
            self._set_accumulation()
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
        if self._accumulated is not None and self.trainer is not None and self.trainer.training:
            # A schedule would say so itself only where an epoch begins.
            self.trainer.accumulate_grad_batches, self._accumulated = self._accumulated, None
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

    # ---- where a run has come to

    def state_dict(self) -> dict[str, Any]:
        """How far the training data is consumed, for checkpoints; every rank has to call it together.

        Returns:
            ``epoch``; ``consumed``, samples of its order that all ranks have read; what that order depends on
            (``manifest``, ``seed``, ``shuffle``, ``group_by_length``, ``block_shards``); ``global_batch`` and
            ``rank_batch``, samples per optimizer step and per batch of all ranks; ``batches``, those of all epochs up
            to there; ``skipped``, the bad samples of this epoch. Empty where nothing is trained.
        """
        trainer = self.trainer
        if trainer is None or "train" not in self._datasets or trainer.state.fn != "fit":
            return {}
        # Lightning replaces the sampler where it is to overfit some batches.
        if getattr(trainer, "overfit_batches", 0):
            return {}
        place = self._place(trainer)
        current, total = _batch_counts(trainer)
        again = 0 if place.epoch > self._epoch else current.processed - place.consumed // self._rank_batch(trainer)
        met = gather([list(skip) for skip in self._skips["train"].pass_skipped])
        return {
            **place._asdict(),
            **self._order_facts(),
            "rank_batch": self._rank_batch(trainer),
            "global_batch": self._rank_batch(trainer) * trainer.accumulate_grad_batches,
            "batches": total.processed - again,
            "skipped": [skip for rank in met for skip in rank] if place.consumed else [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there in the fit that is being prepared; other stages read everything.

        That the data, their order and the global batch are the same is checked before the first batch.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._resumed = dict(state_dict)

    def _begin_from_place(self, trainer: Trainer) -> None:
        """Let this fit begin where a checkpoint left off.

        That is known only now and then: some strategies restore checkpoints after optimizers were made, which may have
        asked for the number of batches and so for the loader; and Lightning restores its own counts after that.
        """
        loop = trainer.fit_loop
        if getattr(loop.run, "goes_on", False):
            return
        run = loop.run

        def run_from_place() -> None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(data, DualPreferenceDataModule):
                data._go_on(trainer)
            run()

        run_from_place.goes_on = True  # type: ignore[attr-defined]
        vars(loop)["run"] = run_from_place

    def _place(self, trainer: Trainer) -> Place:
        """Where the Trainer is in the training data.

        An epoch that has ended is the beginning of the next. What was accumulated since the last optimizer step is in
        no checkpoint, so that these batches are read again.
        """
        epoch = self._epoch
        batches: int = _batch_counts(trainer)[0].processed
        if batches >= trainer.num_training_batches:
            return Place(epoch + 1)
        whole = batches - batches % trainer.accumulate_grad_batches
        return Place(epoch, whole * self._rank_batch(trainer))

    @property
    def _epoch(self) -> int:
        """The epoch that is read."""
        return self._start.epoch if self._sampler is None else max(self._sampler.epoch, self._start.epoch)

    def _rank_batch(self, trainer: Trainer) -> int:
        """Samples that all ranks read in one batch each."""
        return self.batch_size * trainer.world_size

    def _order_facts(self) -> dict[str, Any]:
        """What the order of the training samples depends on, beside the epoch."""
        return {
            "manifest": self._datasets["train"].shards.digest,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "group_by_length": self.group_by_length,
            "block_shards": self._block_shards("train"),
        }

    @property
    def _start(self) -> Place:
        """Where training goes on."""
        return Place() if not self._resumed else Place(self._resumed["epoch"], self._resumed["consumed"])

    def _check_resumed(self, trainer: Trainer, state: Mapping[str, Any], accumulated: int) -> None:
        """Refuse to go on in the middle of an epoch of other data, or in other steps."""
        now = self._order_facts()
        called = {"manifest": f"what is in the shards (now {self.train_source}): manifest"}
        different = [name for name in now if state.get(name) != now[name]]
        changed = [f"{called.get(name, name)} was {state.get(name)!r}, is {now[name]!r}" for name in different]
        rank_batch, was = self._rank_batch(trainer), state["global_batch"]
        batch = rank_batch * accumulated
        if batch != was:
            changed.append(
                f"the global batch was {was} samples, is {self.batch_size} (batch_size) x {trainer.world_size} (ranks) "
                f"x {accumulated} (accumulate_grad_batches) = {batch}"
            )
        if self.group_by_length and rank_batch != state["rank_batch"]:
            changed.append(
                f"group_by_length made batches of {state['rank_batch']} samples of all ranks, would make {rank_batch}"
            )
        if changed:
            raise ValueError(
                f"The checkpoint was made in the middle of epoch {state['epoch']}, after {state['consumed']} samples, "
                f"and the run cannot go on from there with other data or steps: {'; '.join(changed)}. Restore what has "
                "changed, or start from a checkpoint of an epoch's end."
            )

    def _set_accumulation(self) -> None:
        """Let the Trainer accumulate as many batches as ``global_batch_size`` takes."""
        if self.global_batch_size is None or self.trainer is None:
            return
        step = self._rank_batch(self.trainer)
        batches, rest = divmod(self.global_batch_size, step)
        if rest or not batches:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by batch_size={self.batch_size} x "
                f"{self.trainer.world_size} ranks = {step}: change one of them"
            )
        if self.trainer.accumulate_grad_batches not in (1, batches):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} takes accumulate_grad_batches={batches}, and the Trainer "
                f"has {self.trainer.accumulate_grad_batches}: leave one of them out"
            )
        self.trainer.accumulate_grad_batches = batches

    # ---- reading

    def _open(self, split: str, source: str | list[str]) -> None:
        if split not in self._datasets:
            transform = self.transform if split == "train" else None
            dataset = ShardDataset(source, self.backbone, self.cache, transform, self.seed)
            if self._quarantine is not None and self.trainer is not None and self.trainer.global_rank == 0:
                self._quarantine.add(split, dataset.skipped)
            self._skips[split] = SkipLog(dataset.shards.total, self.max_bad_fraction, dataset.skipped)
            self._datasets[split] = dataset
            if (blocks := self._blocks(split)) is not None:
                dataset.shards.check_room(blocks.shards(None))

    def _block_shards(self, split: str) -> int | None:
        """Shards per block, None where all are read at random."""
        return self.block_shards or (_REMOTE_BLOCK if self._datasets[split].shards.is_remote else None)

    def _blocks(self, split: str) -> Blocks | None:
        size = self._block_shards(split)
        if size is None:
            return None
        if self.group_by_length and split == "train":
            raise ValueError(
                "group_by_length measures every sample before training and orders them all: it does not go together "
                "with remote shards or block_shards"
            )
        return Blocks(self._datasets[split].shards.counts, size)

    def _loader(self, split: str, batch_size: int, shuffle: bool) -> DataLoader[EncodedSample]:
        if split not in self._datasets:
            raise RuntimeError(f"call setup() before asking for the {split} loader")
        dataset = self._datasets[split]
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        is_training = split == "train"
        lengths = dataset.estimated_lengths() if self.group_by_length and is_training else None
        sampler = EpochSampler(
            len(dataset),
            world_size,
            rank,
            self.seed,
            shuffle,
            None if trainer is None else lambda: trainer.current_epoch,
            lengths,
            batch_size,
            self._blocks(split),
            (lambda: self._start) if is_training else Place,
        )
        if is_training:
            self._sampler = sampler
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.backbone.collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            # A generator of its own: reading must not move the global random state, whatever is read.
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=_keep_memory_shared,
        )

    def _go_on(self, trainer: Trainer) -> None:
        """Let the Trainer, and the count of bad samples, know how much of the epoch is behind."""
        state = self._resumed
        if not state:
            return
        # A loader that was made before may have begun to read elsewhere.
        trainer.fit_loop._combined_loader = None
        if not state["consumed"]:
            if not _validation_is_open(trainer):
                _begin_epoch(trainer, state["epoch"], state.get("batches"))
            return
        self._accumulated = _accumulated_batches(trainer, state["epoch"])
        self._check_resumed(trainer, state, self._accumulated)
        batches = state["consumed"] // self._rank_batch(trainer)
        current, total = _batch_counts(trainer)
        _count_on(current, total, batches)
        epochs: Any = trainer.fit_loop.epoch_progress
        _count_on(epochs.current, epochs.total, state["epoch"])
        for counts in (epochs.current, epochs.total):
            # This epoch has begun, and not ended, whatever was counted when the checkpoint was made.
            counts.ready = counts.started = counts.processed + 1
        trainer.fit_loop.restarting = True
        self._batches["train"] = batches
        self._pass["train"] = (state["epoch"],)
        if trainer.global_rank == 0:
            skipped = [SkippedSample(*skip) for skip in state["skipped"]]
            self._skips["train"].resume(skipped)
            if self._quarantine is not None:
                self._quarantine.add("train", skipped)

    def _count(self, trainer: Trainer, split: str, batch: PreferenceBatch) -> None:
        self._begin_pass_if_new(trainer, split)
        self._skips[split].add(batch.skipped)
        if batch.skipped and self._quarantine is not None:
            self._quarantine.add(split, batch.skipped)
        self._count_truncated(split, batch)
        self._batches[split] += 1
        number = self._batches[split]
        is_early = number <= _CHECK_EVERY or self.max_bad_fraction == 0
        ends_pass = number == self._batches_per_pass(trainer, split)
        if trainer.world_size == 1 or is_early or ends_pass or number % _CHECK_EVERY == 0:
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
        whole = -(-len(self._datasets[split]) // (rows * trainer.world_size))
        if split == "train":
            return int(min(whole, trainer.num_training_batches))
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return int(min([whole, *limits]))


def _batch_counts(trainer: Trainer) -> tuple[Any, Any]:
    """The Trainer's counts of training batches, in this epoch and in all."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current, progress.total


def _validation_is_open(trainer: Trainer) -> bool:
    """Whether a checkpoint was made in a validation, which the Trainer then does again before it goes on."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return bool(progress.total.ready > progress.total.processed)


def _begin_epoch(trainer: Trainer, epoch: int, batches: int | None) -> None:
    """Let the Trainer begin an epoch as if the ones before had just been trained.

    What it would make of a checkpoint of an epoch's end by itself depends on where in its hooks it was saved and on
    whether there is a limit of steps (Lightning 2.6.6): a batch may be trained twice, or an epoch left out.

    Args:
        trainer: that has restored its counts.
        epoch: the one to begin.
        batches: of all epochs before; None where an older checkpoint does not tell.
    """
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress
    current, total = _batch_counts(trainer)
    done = total.processed if batches is None else batches
    for counts, number in ((epochs.current, epoch), (epochs.total, epoch), (current, 0), (total, done)):
        counts.ready = counts.started = counts.processed = counts.completed = number
    # Saved right after a step, which is counted after that.
    if loop.epoch_loop._batches_that_stepped == trainer.global_step - 1:
        loop.epoch_loop._batches_that_stepped += 1
    # The setter would insist on restarting where there is a limit of steps.
    loop._restarting = False
    loop.epoch_loop.restarting = False


def _accumulated_batches(trainer: Trainer, epoch: int) -> int:
    """How many batches the Trainer accumulates in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _keep_memory_shared(_: int) -> None:
    """Let the garbage collector of a data worker pass over what it has from its parent, which it would copy."""
    gc.freeze()


def _count_on(current: Any, total: Any, number: int) -> None:
    """Set the Trainer's count of this epoch, or run, and add as many to the total."""
    more = number - current.processed
    for counts in (current, total):
        counts.processed += more
        counts.ready = counts.started = counts.completed = counts.processed


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
