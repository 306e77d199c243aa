"""Make sure before training that checkpoints can be written: that their folders can, and that they fit the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from realign_lightning.checkpoints.disk import hidden_path, make_folder
from realign_lightning.checkpoints.plugin import CheckpointError, is_remote

_COPIES = 3
"""Of every trained number: the weight and the two moments that Adam keeps."""


def check_room(trainer: pl.Trainer, module: nn.Module) -> None:
    """Refuse to train where checkpoints could not be written.

    Into every folder that gets checkpoints a file is written and removed again. The disk must hold two checkpoints,
    since the old one goes when the new one is complete; their size is estimated from what is trained.

    Args:
        trainer: about to begin to fit.
        module: with the parameters that are trained.

    Raises:
        CheckpointError: if a folder cannot be written, or its disk is too full.
    """
    needed = 2 * _COPIES * sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)
    for folder in _folders(trainer):
        _write_into(folder)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"The disk of {folder} has {free >> 20} MiB left, and two checkpoints of this run take about "
                f"{(needed >> 20) + 1} MiB: free space, or set another `dirpath` of ModelCheckpoint (or "
                "`trainer.default_root_dir`)."
            )


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
