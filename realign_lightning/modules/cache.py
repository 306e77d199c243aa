"""Reference log-probs on disk, to be used again exactly where everything that they depend on is the same."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from realign_lightning.backbones.files import hash_json, write_json
from realign_lightning.journal import JournalWriter, Line, damaged, read_journal
from realign_lightning.types import VIEWS, ViewName

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
"""The file that says what the log-probs beside it depend on."""

FILE_HASHES = "files.json"
"""The file that keeps the hashes of checkpoints' files."""


class Entry(NamedTuple):
    """Log-probs of a sample under the reference: sums over response tokens, float32 values.

    Args:
        chosen: log pi(y_w | x, v).
        rejected: log pi(y_l | x, v).
        visual: log pi(y_w | x, v_l).
    """

    chosen: float
    rejected: float
    visual: float


class ReferenceCache:
    """Log-probs by fingerprint of the sample, in memory and in a folder.

    Runs share ``root``. In it every fingerprint of a model has a folder of its own, with ``fingerprint.json`` and one
    file per writing process (JSON lines), so that processes, and runs, can write at the same time. In memory a sample
    takes about 350 bytes: a million are no trouble.

    Args:
        root: folder of all caches; made if needed.
        fingerprint: what the log-probs depend on beside the sample, as texts by name.

    Raises:
        ValueError: if files in the folder are damaged, or of another fingerprint.
    """

    def __init__(self, root: Path, fingerprint: Mapping[str, str]) -> None:
        self.fingerprint = dict(fingerprint)
        self.folder = root / hash_json(self.fingerprint)[:16]
        self.entries: dict[str, Entry] = {}
        self._writer = JournalWriter(self.folder)
        if self.folder.is_dir():
            self._check_fingerprint()
            self.entries.update(map(_entry, read_journal(self.folder)))
        else:
            # A folder appears whole, or not at all.
            with_content = self.folder.with_name(f".{self.folder.name}-{uuid.uuid4().hex}")
            with_content.mkdir(parents=True)
            write_json(with_content / FINGERPRINT, self.fingerprint)
            _rename_unless_there(with_content, self.folder)

    def _check_fingerprint(self) -> None:
        found = _read_json(self.folder / FINGERPRINT)
        if found != self.fingerprint:
            raise ValueError(
                f"The reference cache {self.folder} does not hold what its name says: "
                f"{describe_changes(found, self.fingerprint)}. It was changed by hand: remove it."
            )

    def add(self, entries: Mapping[str, Entry], keys: Mapping[str, str], rank: int = 0) -> None:
        """Remember log-probs, and write them to this process's file.

        Args:
            entries: log-probs by fingerprint of the sample.
            keys: the samples' keys by fingerprint, for people who read the files.
            rank: of this process, for the name of its file.

        Raises:
            ValueError: if one is not finite; nothing is kept then.
        """
        for name, entry in entries.items():
            if not all(map(math.isfinite, entry)):
                raise ValueError(
                    f"Sample {keys[name]!r} has log-probs {entry} under the reference: the model does not compute in "
                    "this dtype and precision, or its weights are broken. Nothing of this batch was cached."
                )
        self._writer.rank = rank
        self._writer.write({"sample": name, "key": keys[name], **entry._asdict()} for name, entry in entries.items())
        self.entries.update(entries)

    def close(self) -> None:
        """Finish writing; reading goes on, and writing may too."""
        self._writer.close()


def nearest_fingerprint(root: Path, fingerprint: Mapping[str, str]) -> Mapping[str, str] | None:
    """Of the caches in a folder that are of another fingerprint, what the most similar one was made with.

    Args:
        root: folder of all caches.
        fingerprint: that is looked for.

    Returns:
        A fingerprint; None if there is no cache at all, or the one that is looked for.
    """
    if (root / hash_json(dict(fingerprint))[:16] / FINGERPRINT).is_file():
        return None
    found = []
    for path in sorted(root.glob(f"[!.]*/{FINGERPRINT}")):
        try:
            found.append(_read_json(path))
        except ValueError as error:
            log.warning("%s", error)
    return min(found, key=lambda other: len(_changed(other, fingerprint)), default=None)


def describe_changes(made_with: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which entries of two fingerprints differ, in words.

    Args:
        made_with: the fingerprint of a cache.
        now: the one that is needed.

    >>> describe_changes({"dtype": "float32", "revision": "a"}, {"dtype": "bfloat16", "revision": "a"})
    'made with dtype float32, now bfloat16'
    """

    def change(name: str) -> str:
        before, after = made_with.get(name, "not known"), now.get(name, "not known")
        is_short = max(len(before), len(after)) <= _SHOWN and "\n" not in before + after
        return f"made with {name} {before}, now {after}" if is_short else f"made with other {name}"

    return "; ".join(map(change, _changed(made_with, now)))


_SHOWN = 60
"""Longest value that messages show; hashes and templates are longer."""


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{path} of a reference cache cannot be read ({error}): remove {path.parent}.") from error


def _rename_unless_there(source: Path, target: Path) -> None:
    """Move a folder to its place, or drop it where another process was faster."""
    try:
        source.rename(target)
    except OSError:
        if not (target / FINGERPRINT).is_file():
            raise
        (source / FINGERPRINT).unlink()
        source.rmdir()


def _entry(line: Line) -> tuple[str, Entry]:
    """Log-probs on a line of a cache's file by fingerprint of the sample."""
    try:
        return str(line.value["sample"]), Entry(*(_finite(line.value, view) for view in VIEWS))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(line.path, line.number, error) from error


def _finite(record: Mapping[str, Any], view: ViewName) -> float:
    value = float(record[view])
    if not math.isfinite(value):
        raise ValueError(f"{view} is {value}")
    return value
