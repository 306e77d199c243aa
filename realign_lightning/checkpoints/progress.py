"""Where a run stands between two optimizer steps, and how a checkpoint says so."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_COUNTS = ("ready", "started", "processed", "completed")


def open_batches(trainer: pl.Trainer) -> int:
    """Batches that were done since the last optimizer step, and wait for more to be accumulated.

    Args:
        trainer: of the run; 0 when it is not training.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    # An epoch's last batch always ends with a step.
    if progress.processed == progress.ready and (progress.ready == 0 or loop._num_ready_batches_reached()):
        return 0
    return int(progress.processed % trainer.accumulate_grad_batches)


def is_between_batches(trainer: pl.Trainer) -> bool:
    """Whether no batch is being worked on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def settle_epoch(trainer: pl.Trainer) -> None:
    """Count an epoch that is being trained as begun and not ended.

    After a resume from a checkpoint of an epoch's last batch Lightning (2.6.6) does not count that the next epoch has
    begun; what is saved then would say that it has ended.

    Args:
        trainer: in the middle of an epoch.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    for counts in (progress.total, progress.current):
        # `completed` is what the Trainer calls its current epoch.
        counts.processed = counts.completed
        counts.ready = counts.started = counts.completed + 1


def rewind(loops: dict[str, Any], batches: int) -> None:
    """Let a checkpoint say that its last batches were not done yet.

    Weights and optimizer are those after the last optimizer step; what was accumulated since is not saved, so the
    resumed run does these batches again.

    Args:
        loops: the entry ``loops`` of a checkpoint; changed in place.
        batches: how many were done since the last optimizer step.
    """
    counts = loops["fit_loop"][_BATCHES]
    for part in ("total", "current"):
        done = counts[part]["processed"] - batches
        counts[part].update(dict.fromkeys(_COUNTS, done))
    counts["is_last_batch"] = False


def redo_validation(loops: dict[str, Any]) -> None:
    """Let a checkpoint say that the validation after its last batch had only begun: a resumed run does it again.

    Args:
        loops: the entry ``loops`` of a checkpoint; changed in place.
    """
    counts = loops["fit_loop"][_VALIDATION]
    for part in ("total", "current"):
        counts[part].update({"ready": 1, "started": 1, "processed": 0, "completed": 0})
    counts["is_last_batch"] = False
