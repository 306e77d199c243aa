"""Finding the checkpoint to go on from."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from realign_lightning.checkpoints.disk import PARTIAL, target_of
from realign_lightning.checkpoints.folders import COMMITTED, METADATA, is_committed

log = logging.getLogger(__name__)

_ENDING = ".ckpt"

_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, pickle.UnpicklingError)
"""What PyTorch raises for files that it cannot read."""


class Found(NamedTuple):
    """A complete checkpoint.

    Args:
        step: optimizer steps of the run so far.
        written: time of its last change, in seconds.
        is_link: whether the path is a link to it.
        path: file or folder.
    """

    step: int
    written: float
    is_link: bool
    path: Path


def newest_checkpoint(*folders: str | Path) -> Path | None:
    """The newest complete checkpoint of a run: the one with most optimizer steps, and of these the youngest.

    Files and sharded folders are found at any depth, the latter also under their hidden name, if the run was killed
    between completing and renaming one. Passed over with a warning is what cannot be read or is half-written; what
    holds weights only is passed over too, as nothing can be resumed from it.

    Args:
        *folders: of the run; those that do not exist are no error.

    Returns:
        Path of the file or folder; None if there is none.
    """
    found = [one for folder in folders for path in _candidates(Path(folder)) if (one := _examine(path)) is not None]
    best = max(found, key=lambda one: (one.step, one.written, not one.is_link, str(one.path)), default=None)
    return None if best is None else best.path


def read_header(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but, for folders, weights and optimizer states; tensors of files are mapped, not read.

    Args:
        path: file, or complete folder.

    Raises:
        ValueError: if this is no complete checkpoint.
        OSError: if it cannot be read. PyTorch raises errors of its own for damaged files.
    """
    if path.is_dir() and not is_committed(path):
        raise ValueError("it is half-written")
    file = path / METADATA if path.is_dir() else path
    content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    if not isinstance(content, dict) or not isinstance(content.get("global_step"), int):
        raise ValueError("it is no checkpoint of a run")
    return content


def is_readable(path: Path) -> bool:
    """Whether a complete checkpoint lies at a path."""
    try:
        read_header(path)
    except _UNREADABLE:
        return False
    return True


def _candidates(folder: Path) -> Iterator[Path]:
    """Files and folders that are, or were to become, checkpoints."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        inside = [name for name in folders if _looks_like_folder(here / name)]
        # Not looked into any further.
        folders[:] = [name for name in folders if name not in inside]
        yield from (here / name for name in sorted(inside))
        yield from (here / name for name in sorted(files) if _looks_like_file(here / name))


def _looks_like_folder(path: Path) -> bool:
    return target_of(path) is not None or (path / METADATA).exists() or (path / COMMITTED).exists()


def _looks_like_file(path: Path) -> bool:
    return (path.suffix == _ENDING or path.name.endswith(_ENDING + PARTIAL)) or (
        (target := target_of(path)) is not None and target.suffix == _ENDING
    )


def _examine(path: Path) -> Found | None:
    if not path.exists():
        # A link whose checkpoint was removed.
        return None
    if target_of(path) is not None and not (path.is_dir() and is_committed(path)):
        log.warning("Passed over: %s is half-written, by a run that was killed or still writes.", path)
        return None
    try:
        content = read_header(path)
        file = path / METADATA if path.is_dir() else path
        found = Found(content["global_step"], file.stat().st_mtime, path.is_symlink(), path)
    except _UNREADABLE as error:
        log.warning("Passed over: %s cannot be read as a checkpoint (%s).", path, str(error).split("\n")[0])
        return None
    if "lr_schedulers" not in content:
        log.info("Passed over: %s holds weights only, training cannot go on from it.", path)
        return None
    return found
