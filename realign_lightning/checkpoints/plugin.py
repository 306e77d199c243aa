"""Lightning's plugin for checkpoints in one file, made to survive."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from realign_lightning.checkpoints.disk import make_folder, remove, sync_folder, write_file
from realign_lightning.checkpoints.folders import COMMITTED, METADATA, tidy

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; what was there before is unchanged."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a kill, a full disk or a loss of power never leaves a broken one under its name.

    A file is written beside its target (``.{name}.{nonce}.partial``, never in ``TMPDIR``, which may be another file
    system), synchronised, renamed, and its folder synchronised. What killed runs have left is removed at the next save
    into the same folder. Files are read with ``weights_only=True``. URLs (``s3://...``) go Lightning's own way.

    :class:`~realign_lightning.modules.RDPOModule` puts it in the place of Lightning's default plugin; for other modules
    write ``Trainer(plugins=[DurableCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what ``Trainer.save_checkpoint`` has gathered.
            path: target; a file of that name is replaced.
            storage_options: must be None.

        Raises:
            CheckpointError: if it could not be written, for example because the disk is full.
            TypeError: for storage options.
        """
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).absolute()
        try:
            make_folder(target.parent)
            tidy(target.parent)
            write_file(target, lambda file: torch.save(checkpoint, file))
        # PyTorch wraps errors of the disk into RuntimeErrors.
        except (OSError, RuntimeError) as error:
            raise not_written(target, error) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values, never code.

        Args:
            path: file or URL.
            map_location: as in ``torch.load``.
            weights_only: True or None.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for ``weights_only=False``.
        """
        if weights_only is False:
            raise ValueError(
                "weights_only=False would run code that a checkpoint brings along. Leave it out: this package's "
                "checkpoints hold tensors and plain values only. To read others, pass a CheckpointIO of your own to "
                "the Trainer's `plugins`."
            )
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, if it is there.

        Args:
            path: file, folder or URL.
        """
        if is_remote(path):
            super().remove_checkpoint(path)
            return
        target = Path(path).absolute()
        if os.path.lexists(target):
            remove_checkpoint_at(target)


def remove_checkpoint_at(target: Path) -> None:
    """Remove a checkpoint so that, if this is interrupted, nothing is left that looks like one.

    Args:
        target: file, link or folder.
    """
    if target.is_dir() and not target.is_symlink():
        for name in (COMMITTED, METADATA):
            (target / name).unlink(missing_ok=True)
    remove(target)
    sync_folder(target.parent)


def is_remote(path: Any) -> bool:
    """Whether a path is a URL.

    >>> is_remote("s3://bucket/last.ckpt"), is_remote("runs/last.ckpt")
    (True, False)
    """
    return "://" in str(path)


def not_written(target: Path, error: BaseException) -> CheckpointError:
    """What to say when a checkpoint could not be written.

    Args:
        target: its path.
        error: what went wrong.
    """
    number = error.errno if isinstance(error, OSError) else None
    # PyTorch puts whole tracebacks into some messages.
    reason = str(error).strip().split("\n")[-1]
    kept = "is unchanged" if os.path.lexists(target) else "does not exist"
    message = (
        f"The checkpoint {target} could not be written ({reason}). Nothing half-written is left: the file of that name "
        f"{kept}, and all earlier checkpoints are intact. Free space on the disk, or set another `dirpath`, and resume "
        "with `--ckpt_path last`."
    )
    return CheckpointError(number, message) if number is not None else CheckpointError(message)


def make_durable(trainer: pl.Trainer) -> None:
    """Put :class:`DurableCheckpointIO` in the place of Lightning's default plugin; one that a user chose stays.

    Args:
        trainer: before it saves or loads.
    """
    strategy = trainer.strategy
    # Lightning's property makes its default where none is set.
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = DurableCheckpointIO()
