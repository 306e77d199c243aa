"""Checkpoints that are folders: written under a hidden name, marked when complete, then renamed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from realign_lightning.checkpoints.disk import (
    REPLACED,
    hidden_path,
    hold,
    leftovers,
    make_folder,
    put_in_place,
    remove,
    sync_file,
    sync_folder,
    target_of,
    write_file,
)

log = logging.getLogger(__name__)

METADATA = "meta.pt"
"""The file of a sharded checkpoint that holds everything but weights and optimizer states."""

COMMITTED = "committed.json"
"""The file of a sharded checkpoint that is written last: names and sizes of all others."""

_SHARD_INDEX = ".metadata"
"""The file that torch.distributed.checkpoint writes after all shards."""


class StagedFolder:
    """A checkpoint folder in the making; rank 0 opens and closes it, all ranks write into :attr:`path`.

    Args:
        target: the folder's name when it is complete.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = hidden_path(target)
        make_folder(target.parent)
        self.path.mkdir()
        self._held = contextlib.ExitStack()
        self._held.enter_context(hold(self.path))

    def commit(self) -> None:
        """Mark the folder as complete and give it its name; to be called when all ranks have written."""
        mark(self.path)
        put_in_place(self.path, self.target)
        self._held.close()

    def discard(self) -> None:
        """Remove what was written, after a failure."""
        self._held.close()
        remove(self.path)


def mark(folder: Path) -> None:
    """Wait until every file of a folder is on the disk, then write the mark that says so."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync_file(path)
    sync_folder(folder)
    sizes = {path.name: path.stat().st_size for path in files}
    write_file(folder / COMMITTED, lambda file: file.write(json.dumps({"files": sizes}, indent=1).encode()))


def is_committed(folder: Path) -> bool:
    """Whether a folder is a complete sharded checkpoint, under its own or under its hidden name.

    Folders from before the mark was written count as complete if they have the files that were written last then; under
    a hidden name nothing counts without the mark.
    """
    try:
        sizes = json.loads((folder / COMMITTED).read_bytes())["files"]
    except FileNotFoundError:
        return target_of(folder) is None and all((folder / name).is_file() for name in (_SHARD_INDEX, METADATA))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def check_committed(folder: Path) -> None:
    """Refuse a folder that is no complete sharded checkpoint.

    Args:
        folder: of a sharded checkpoint.

    Raises:
        ValueError: naming what to do.
    """
    if not is_committed(folder):
        raise ValueError(
            f"{folder} is no complete checkpoint: its writing was interrupted (no valid {COMMITTED}), or files were "
            "removed since. Take another one; `--ckpt_path last` finds the newest that is complete."
        )


def find_committed(path: Path) -> Path:
    """Where a checkpoint lies: at its path, or under a hidden name if its writer was killed just before the rename.

    Args:
        path: as it was asked for.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return path
    found = [one for one in path.parent.iterdir() if target_of(one) == path and one.is_dir() and is_committed(one)]
    # What was moved aside is older than what should take its place.
    return min(found, key=lambda one: (one.name.endswith(REPLACED), -_marked_at(one)), default=path)


def tidy(folder: Path) -> None:
    """Finish or remove what killed runs have left in a folder; to be called by one process.

    A complete checkpoint under a hidden name gets its own name, unless a newer one has it.

    Args:
        folder: of checkpoints.
    """
    for path in leftovers(folder):
        try:
            _tidy_one(path)
        except OSError as error:
            log.warning("%s, which a killed run has left, could not be removed (%s).", path, error)


def _tidy_one(path: Path) -> None:
    target = target_of(path)
    assert target is not None  # noqa: S101
    if path.is_dir() and is_committed(path) and _is_newer(path, target):
        log.info("Finishing the interrupted rename of %s", target)
        put_in_place(path, target)
    elif not path.name.endswith(REPLACED) or os.path.lexists(target):
        log.info("Removing %s, which a killed run has left half-written or replaced", path)
        remove(path)


def _is_newer(path: Path, target: Path) -> bool:
    if not os.path.lexists(target):
        return not path.name.endswith(REPLACED) or find_committed(target) == path
    if path.name.endswith(REPLACED):
        return False
    return target.is_dir() and _marked_at(path) > _marked_at(target)


def _marked_at(folder: Path) -> float:
    mark_file = folder / COMMITTED
    return mark_file.stat().st_mtime if mark_file.is_file() else 0.0
