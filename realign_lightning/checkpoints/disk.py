"""Files and folders that appear under their names as a whole, or not at all, and stay after a loss of power."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

PARTIAL = ".partial"
"""Ending of what is being written: ``.{name}.{nonce}.partial``, beside its target."""

REPLACED = ".replaced"
"""Ending of a folder that was moved aside so that a new one could take its name."""

_HIDDEN = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?:\.partial|\.replaced)")

_UNTOUCHED_SECONDS = 60.0
"""A partial file whose writer holds no lock is left alone for so long: the writer may be about to take the lock."""

_FORGOTTEN_SECONDS = 3600.0
"""The same where the file system knows no locks."""


def hidden_path(target: Path, ending: str = PARTIAL) -> Path:
    """A fresh name beside a target, for what is not in place yet.

    Args:
        target: the name that it shall have.
        ending: :data:`PARTIAL` or :data:`REPLACED`.
    """
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{ending}")


def target_of(hidden: Path) -> Path | None:
    """The target that a hidden name was made for; None if it is no such name.

    >>> target_of(Path("runs/.last.ckpt.0a1b2c3d.partial")).as_posix()
    'runs/last.ckpt'
    >>> target_of(Path("runs/last.ckpt"))
    """
    match = _HIDDEN.fullmatch(hidden.name)
    return None if match is None else hidden.with_name(match["name"])


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they stay after a loss of power."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such thing, and write names through.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_file(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its target, wait for the disk, and rename it.

    Whatever happens, the target holds what it held before, or everything that was written.

    Args:
        target: replaced if it exists.
        write: writes into the opened file.
    """
    make_folder(target.parent)
    partial = hidden_path(target)
    try:
        with partial.open("xb") as file:
            _try_lock(file.fileno())
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(ready: Path, target: Path) -> None:
    """Give something finished its name; a folder of that name is moved aside first and removed after.

    Args:
        ready: file or folder, beside its target and on the disk already.
        target: its name.
    """
    aside = None
    # A file is replaced at once by a file, but no folder by anything.
    if os.path.lexists(target) and (_is_real_folder(target) or ready.is_dir()):
        aside = hidden_path(target, REPLACED)
        target.rename(aside)
    ready.replace(target)
    sync_folder(target.parent)
    if aside is not None:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if _is_real_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def leftovers(folder: Path) -> Iterator[Path]:
    """What writers that live no more have left in a folder under hidden names."""
    if not folder.is_dir():
        return
    # What was moved aside last: it is wanted no more when what should take its place is there.
    for path in sorted(folder.iterdir(), key=lambda one: (one.name.endswith(REPLACED), one.name)):
        if target_of(path) is not None and _is_left(path):
            yield path


def _is_left(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), hold(path) as state:
        if state == "held by another":
            return False
        wait = _UNTOUCHED_SECONDS if state == "held" else _FORGOTTEN_SECONDS
        return time.time() - _last_touched(path) > wait
    return False


def _last_touched(path: Path) -> float:
    inside = path.iterdir() if _is_real_folder(path) else ()
    return max(float(one.lstat().st_mtime) for one in (path, *inside))


@contextlib.contextmanager
def hold(path: Path) -> Iterator[str]:
    """Lock a file or folder while the block runs.

    Yields:
        ``held``, ``held by another``, or ``no locks`` where the file system has none.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held by another"
    except OSError:
        return "no locks"
    return "held"
