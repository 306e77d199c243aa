"""Finished work by what it depends on, so that nothing is paid for twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realign_lightning.backbones.files import hash_json, write_json
from realign_lightning.journal import JournalError, JournalWriter, read_journal
from realign_lightning.types import Prompt

_IDENTITY = "identity.json"


def content_key(*parts: Any) -> str:
    """A name for plain JSON values: SHA-256 in hexadecimal, equal for equal values in whatever order of names.

    Args:
        *parts: plain JSON values.

    >>> content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1}) != content_key({"a": 1})
    True
    """
    return hash_json(parts)


def prompt_value(prompt: Prompt) -> Any:
    """A prompt as plain JSON values.

    Args:
        prompt: text or chat messages.
    """
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]


class Memo:
    """Results of one stage by key, in memory and in a folder; what is not there yet is computed and added.

    Several processes may add at the same time, each to a file of its own, and see what the others added when they
    :meth:`refresh`.

    Args:
        root: folder of all results.
        stage: for example ``answers``.
        identity: all that results depend on beside their keys, in plain JSON values: under another identity nothing is
            found.
        rank: of this process, for the name of its file.

    Raises:
        JournalError: if files in the folder are damaged.
    """

    def __init__(self, root: Path, stage: str, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = root / stage / content_key(dict(identity))[:16]
        self._identity = dict(identity)
        self._writer = JournalWriter(self.folder, rank)
        self._values: dict[str, Any] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def refresh(self) -> None:
        """Read what is in the folder."""
        for line in read_journal(self.folder):
            if not isinstance(line.value, dict):
                raise JournalError(f"Line {line.number} of {line.path} holds no results: remove the file.")
            self._values.update(line.value)

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep results that belong together: after a kill all of them are there, or none.

        Args:
            values: plain JSON values by key.

        Raises:
            ValueError: for values that JSON does not know.
            OSError: if the disk is full; what was added before stays.
        """
        if not values:
            return
        if not (self.folder / _IDENTITY).exists():
            self._describe()
        self._writer.write([dict(values)])
        self._values.update(values)

    def close(self) -> None:
        """Finish writing."""
        self._writer.close()

    def _describe(self) -> None:
        """For people who look into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _IDENTITY, self._identity, sort_keys=True)
