"""Finished work on disk, in JSON lines: written by many processes at once, and safe to be killed at any moment."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

log = logging.getLogger(__name__)

_SYNC_SECONDS = 10.0
"""Most that a machine which loses its power loses; a process that is killed loses nothing that it wrote."""


class Line(NamedTuple):
    """One finished piece of work.

    Args:
        path: file that it stands in.
        number: of the line, from 1.
        value: the parsed JSON.
    """

    path: Path
    number: int
    value: Any


class JournalError(ValueError):
    """A line of a journal is damaged."""


def read_journal(folder: Path) -> Iterator[Line]:
    """All finished work in a folder; a last line that was cut when its writer was killed is left out.

    Args:
        folder: with files of JSON lines.

    Raises:
        JournalError: if any other line cannot be read.
    """
    for path in sorted(folder.glob("*.jsonl")):
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            log.warning("%s ends in the middle of a line, as its writer was killed: that work is done anew.", path)
        for number, line in enumerate(lines, 1):
            try:
                yield Line(path, number, json.loads(line))
            except ValueError as error:
                raise damaged(path, number, error) from error


def damaged(path: Path, number: int, error: Exception) -> JournalError:
    """The error for a line that does not hold what it should.

    Args:
        path: the file.
        number: of the line.
        error: what is wrong with it.
    """
    return JournalError(
        f"Line {number} of {path} is damaged ({error}): remove the file, what it held is computed anew."
    )


class JournalWriter:
    """Adds finished work to a folder; every writing process has a file of its own.

    Args:
        folder: made when the first line is written.
        rank: of this process, for the name of its file.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self._file: IO[bytes] | None = None
        self._synced = 0.0

    def write(self, values: Iterable[Any]) -> None:
        """Add lines; after a kill each is there as a whole or not at all.

        Args:
            values: plain JSON values, one per line.

        Raises:
            ValueError: for values that JSON does not know.
            OSError: if the disk is full; what was written before stays.
        """
        text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
        if not text:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"rank-{self.rank}-{uuid.uuid4().hex[:12]}.jsonl"
            self._file = (self.folder / name).open("xb", buffering=0)
            self._synced = time.monotonic()
        try:
            write_all(self._file, text.encode())
        except OSError:
            # What was cut must stay the last line of its file.
            self._file.close()
            self._file = None
            raise
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Finish the file; writing on begins another."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write to an unbuffered file, which may take a part only.

    Args:
        file: opened with ``buffering=0``.
        data: what to write.

    Raises:
        OSError: if the disk is full; a part may have been written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
