"""Bad samples: skipped, counted, named in the log and in a file, and too many of them stop the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from realign_lightning.data.stream import describe_skips
from realign_lightning.types import SkippedSample

log = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
"""File in a run's log folder that lists its bad samples."""


class Quarantine:
    """A file of JSON lines that lists bad samples: ``split``, ``shard``, ``key``, ``reason``, each sample once.

    Several processes may write to it. A resumed run adds to it, or where it has a log folder of its own begins with the
    samples that were met in the current epoch before.

    Args:
        path: the file; made with its folder when the first sample comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = set(self._read()) if path.is_file() else set()

    def add(self, split: str, skipped: Iterable[SkippedSample]) -> None:
        """Add samples that are not in the file yet.

        Args:
            split: ``train`` or ``val``.
            skipped: the samples.
        """
        new = {(split, skip.shard, skip.key): skip for skip in skipped}
        lines = [_line(split, skip) for name, skip in new.items() if name not in self._known]
        self._known.update(new)
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One unbuffered write at the end of the file, so that lines of several processes do not mix.
            with self.path.open("ab", buffering=0) as file:
                file.write("".join(lines).encode("utf-8", "backslashreplace"))
        except OSError as error:
            log.warning("%d bad samples are named in the log only, not in %s: %s", len(lines), self.path, error)

    def _read(self) -> list[tuple[str, str, str]]:
        names = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                names.append((str(entry["split"]), str(entry["shard"]), str(entry["key"])))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("line %d of %s is damaged (%s); its sample may be listed twice", number, self.path, error)
        return names


def _line(split: str, skip: SkippedSample) -> str:
    return json.dumps({"split": split, **skip._asdict()}, ensure_ascii=False) + "\n"


class BadDataError(RuntimeError):
    """More samples are bad than is allowed; the message counts and names them."""


class SkipLog:
    """Counts skipped samples, names each once in the log, and raises when they are too many.

    They are too many when they exceed ``max_bad_fraction`` of all; a single bad sample is always let pass, unless
    ``max_bad_fraction`` is 0. In short: ``bad > max(1, max_bad_fraction * total)``, or ``bad > 0``.

    Args:
        total: samples in the shards, those that lack a member included.
        max_bad_fraction: from 0 to 1.
        skipped: samples that are known to be bad before reading begins, already named in the log.

    Raises:
        BadDataError: if these are too many already.
    """

    def __init__(self, total: int, max_bad_fraction: float, skipped: Iterable[SkippedSample] = ()) -> None:
        self.total = total
        self.allowed = max(1.0, max_bad_fraction * total) if max_bad_fraction > 0 else 0.0
        self.max_bad_fraction = max_bad_fraction
        self._known = {(skip.shard, skip.key): skip for skip in skipped}
        self._before = len(self._known)
        self._pass: dict[tuple[str, str], SkippedSample] = {}
        self.check(0)

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Every distinct bad sample that this process has met."""
        return tuple(self._known.values())

    @property
    def met(self) -> int:
        """Distinct bad samples that this process has read in the current pass over the data."""
        return len(self._pass)

    @property
    def pass_skipped(self) -> tuple[SkippedSample, ...]:
        """The distinct bad samples that this process has read in the current pass."""
        return tuple(self._pass.values())

    def resume(self, skipped: Iterable[SkippedSample]) -> None:
        """Count samples that were met in the current pass before the run was interrupted.

        Args:
            skipped: the samples, on one rank only.
        """
        for skip in skipped:
            self._known.setdefault((skip.shard, skip.key), skip)
            self._pass[skip.shard, skip.key] = skip

    def add(self, skipped: Iterable[SkippedSample]) -> None:
        """Count skipped samples; one that is new is logged as a warning.

        Args:
            skipped: samples that were skipped while a batch was read.
        """
        for skip in skipped:
            name = (skip.shard, skip.key)
            if name not in self._known:
                log.warning("sample skipped: %s", describe_skips([skip]))
                self._known[name] = skip
            self._pass[name] = skip

    def check(self, met: int) -> None:
        """Compare a number of bad samples, beside those known before reading, with what is allowed.

        Args:
            met: bad samples read in this pass, on one rank or on all.

        Raises:
            BadDataError: if they are too many.
        """
        bad = self._before + met
        if bad > self.allowed:
            raise BadDataError(
                f"{bad} of {self.total} samples are bad, more than max_bad_fraction={self.max_bad_fraction} allows "
                f"({self.allowed:g}); repair the shards or raise max_bad_fraction. "
                f"Skipped here: {describe_skips(self.skipped)}"
            )

    def begin_pass(self) -> None:
        """Begin a new pass over the data: what was met before is met again."""
        self._pass.clear()
