"""Make sure before training that checkpoints can be written: that their folders can, and that they fit the disk."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from realign_lightning.checkpoints.disk import hidden_path, make_folder
from realign_lightning.checkpoints.plugin import CheckpointError, is_remote
from realign_lightning.ranks import on_first_rank

log = logging.getLogger(__name__)

_COPIES = 3
"""Of every trained number: the weight and the two moments that Adam keeps."""


def check_room(trainer: pl.Trainer, module: nn.Module) -> None:
    """Refuse to train where checkpoints could not be written; all ranks call this.

    Into every folder that gets checkpoints a file is written and removed again, by the ranks that will write there. A
    disk that does not hold a checkpoint is refused; where it may not hold two, the log warns: the old one goes when the
    new one is complete. Their size is estimated from what is trained, with the two moments that Adam keeps of it.

    Args:
        trainer: about to begin to fit.
        module: with the parameters that are trained.

    Raises:
        CheckpointError: on all ranks that check, if a folder cannot be written, or its disk is too full.
    """
    weights = sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)
    weights_only = all(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks)
    needed = weights * (1 if weights_only else _COPIES)
    folders = _folders(trainer)
    if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
        _check(folders, needed)
    else:
        on_first_rank(lambda: _check(folders, needed))


def _check(folders: list[Path], needed: int) -> None:
    for folder in folders:
        _write_into(folder)
        free = shutil.disk_usage(folder).free
        advice = "free space, or set another `dirpath` of ModelCheckpoint (or `trainer.default_root_dir`)."
        about = f"The disk of {folder} has {free >> 20} MiB left, and"
        if free < needed:
            raise CheckpointError(f"{about} a checkpoint of this run takes about {(needed >> 20) + 1} MiB: {advice}")
        if free < 2 * needed:
            log.warning("%s two checkpoints may take %d MiB: %s", about, (2 * needed >> 20) + 1, advice)


def _folders(trainer: pl.Trainer) -> list[Path]:
    """Folders of this machine that get checkpoints."""
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = [folder or trainer.log_dir or trainer.default_root_dir for folder in given]
    return [Path(folder) for folder in dict.fromkeys(map(str, folders)) if not is_remote(folder)]


def _write_into(folder: Path) -> None:
    probe = hidden_path(folder / "room")
    try:
        make_folder(folder)
        with probe.open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            error.errno,
            f"Checkpoints are to be written into {folder}, and nothing can be ({error.strerror}): free space or change "
            "its permissions, or set another `dirpath` of ModelCheckpoint (or `trainer.default_root_dir`).",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
