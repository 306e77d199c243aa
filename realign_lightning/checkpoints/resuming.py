"""What makes a resumed run the run that was interrupted: random states, and batches that were accumulated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from realign_lightning.checkpoints.best import mend_best
from realign_lightning.checkpoints.folders import tidy
from realign_lightning.checkpoints.plugin import is_remote
from realign_lightning.checkpoints.progress import (
    is_between_batches,
    open_batches,
    redo_validation,
    rewind,
    settle_epoch,
)
from realign_lightning.checkpoints.random_states import derive_random_states, random_states, restore_random_states
from realign_lightning.ranks import gather, on_first_rank, rank_and_world_size

log = logging.getLogger(__name__)

RANDOM_STATES = "random_states"
"""Where a checkpoint holds the generators' states: a list with one entry per rank."""


class ResumePoint:
    """Adds to checkpoints what an exact resume needs, and restores it; a module calls it from hooks of the same names.

    A checkpoint that is saved while gradients are accumulated says that it was saved after the last optimizer step:
    weights and optimizer have not moved since, and the resumed run does the batches in between again.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._at_step: dict[str, Any] | None = None

    def forget(self) -> None:
        """A new run begins; to be called from ``setup``."""
        self._restored = None
        self._at_step = None

    def on_save_checkpoint(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, which all call this.

        Args:
            trainer: that saves.
            checkpoint: changed in place.
        """
        device = trainer.strategy.root_device
        if trainer.state.fn != TrainerFn.FITTING or self._at_step is None:
            checkpoint[RANDOM_STATES] = self._restored or gather(random_states(device))
            return
        waiting = open_batches(trainer)
        if waiting or not is_between_batches(trainer):
            rewind(checkpoint["loops"], waiting)
            checkpoint[RANDOM_STATES] = gather(self._at_step)
            return
        if trainer.validating and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch:
            redo_validation(checkpoint["loops"])
        checkpoint[RANDOM_STATES] = gather(random_states(device))

    def on_load_checkpoint(self, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Keep the random states until training begins.

        Args:
            trainer: that resumes.
            checkpoint: as it was read.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get(RANDOM_STATES)
            if self._restored is None:
                log.info("The checkpoint holds no random states: dropout goes on with other numbers.")

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Compare what a resumed run was told with what is on the disk.

        Args:
            trainer: that begins to train.

        Raises:
            ValueError: if ranks resume from different checkpoints.
        """
        if trainer.ckpt_path is None or not trainer.fit_loop.is_resuming:
            return
        paths = sorted(set(gather(f"{trainer.ckpt_path} at step {trainer.global_step}")))
        if len(paths) > 1:
            raise ValueError(f"Expected all ranks to resume from one checkpoint, got {paths}: give its path.")
        if not is_remote(trainer.ckpt_path):
            # The run may write into another folder from now on.
            on_first_rank(lambda: tidy(Path(str(trainer.ckpt_path)).parent))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                mend_best(callback, trainer.ckpt_path)

    def on_train_batch_start(self, trainer: pl.Trainer) -> None:
        """Restore the random states at the last moment, when nobody else draws any more; remember them at each step.

        Args:
            trainer: that trains.
        """
        device = trainer.strategy.root_device
        if self._at_step is None:
            settle_epoch(trainer)
        if self._restored is not None:
            self._restore(self._restored, device)
            self._restored = None
        if self._at_step is None or open_batches(trainer) == 0:
            self._at_step = random_states(device)

    def _restore(self, states: list[dict[str, Any]], device: torch.device) -> None:
        rank, world_size = rank_and_world_size()
        if len(states) == world_size:
            restore_random_states(states[rank], device)
            return
        log.info(
            "The checkpoint was made by %d processes, this run has %d: their random states are derived from those of "
            "the first, so that dropout differs from that of an undisturbed run.",
            len(states),
            world_size,
        )
        derive_random_states(states[0], rank)
