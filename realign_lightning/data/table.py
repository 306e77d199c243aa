"""Where samples stand in shards, in few bytes per sample, so that every worker of a run over millions can hold it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realign_lightning.data.scan import BLOCK, Member, StoredSample
from realign_lightning.data.schema import IMAGE_PARTS, JSON_PART, split_member_name

PARTS = (*IMAGE_PARTS, JSON_PART)
"""Parts of a sample, in the order of a table's columns."""

_FORMATS = ("jpg", "png", "webp")
_KEYS = re.compile(r"(?:[A-Za-z0-9_-]{1,80}\n)*")
_ABSENT = -1


class SampleTable:
    """Keys, and offsets and sizes of members, of N samples; about 80 bytes each.

    Args:
        keys: (N,) the samples' keys, ASCII bytes.
        offsets: (N, 3) where the content of image, retrieved and json begins, bytes from the start of the shard; -1
            where it is missing.
        sizes: (N, 3) lengths of the contents in bytes; -1 where missing.
        formats: (N, 2) file extensions of image and retrieved: 0 jpg, 1 png, 2 webp.
    """

    def __init__(self, keys: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, formats: np.ndarray) -> None:
        self.keys = keys
        self.offsets = offsets
        self.sizes = sizes
        self.formats = formats

    @classmethod
    def of(cls, samples: Sequence[StoredSample]) -> SampleTable:
        """A table of scanned samples of one shard.

        Args:
            samples: in order.
        """
        offsets = np.full((len(samples), len(PARTS)), _ABSENT, np.int64)
        sizes, formats = offsets.copy(), np.zeros((len(samples), len(IMAGE_PARTS)), np.int8)
        for row, sample in enumerate(samples):
            for member in sample.members:
                part, _, extension = split_member_name(member.name)[1].partition(".")
                column = PARTS.index(part)
                offsets[row, column], sizes[row, column] = member.offset, member.size
                if extension:
                    formats[row, column] = _FORMATS.index(extension)
        return cls(np.array([sample.key.encode() for sample in samples], np.bytes_), offsets, sizes, formats)

    @classmethod
    def joined(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """One table of several, one after the other; of which shard each sample is, the caller knows.

        Args:
            tables: at least one.
        """
        return cls(
            np.concatenate([table.keys for table in tables]),
            np.concatenate([table.offsets for table in tables]),
            np.concatenate([table.sizes for table in tables]),
            np.concatenate([table.formats for table in tables]),
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        """Whether another table says the same."""
        return isinstance(other, SampleTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 over all that the table says."""
        total = hashlib.sha256("\n".join(key.decode() for key in self.keys.tolist()).encode())
        for column in (self.offsets, self.sizes, self.formats):
            total.update(column.tobytes())
        return total.hexdigest()

    @property
    def is_complete(self) -> np.ndarray:
        """(N,) whether a sample has all its members."""
        return np.asarray((self.offsets != _ABSENT).all(axis=1))

    def take(self, rows: np.ndarray) -> SampleTable:
        """The table of some samples.

        Args:
            rows: their numbers, or (N,) whether to take each.
        """
        return SampleTable(self.keys[rows], self.offsets[rows], self.sizes[rows], self.formats[rows])

    def key(self, row: int) -> str:
        """Key of a sample.

        Args:
            row: 0 to ``len(self) - 1``.
        """
        return bytes(self.keys[row]).decode()

    def members(self, row: int) -> tuple[Member, ...]:
        """Members of a sample, in the order of the tar.

        Args:
            row: 0 to ``len(self) - 1``.
        """
        key, formats = self.key(row), self.formats[row].tolist()
        columns = zip(PARTS, self.offsets[row].tolist(), self.sizes[row].tolist(), strict=True)
        members = [
            Member(f"{key}.{part}.{_FORMATS[formats[number]]}" if part in IMAGE_PARTS else f"{key}.{part}", begin, size)
            for number, (part, begin, size) in enumerate(columns)
            if begin != _ABSENT
        ]
        return tuple(sorted(members, key=lambda member: member.offset))

    @property
    def is_plain(self) -> bool:
        """Whether members follow each other from the start, each behind one header block and nothing between them.

        A tar for which this holds has no member that the table leaves out, up to the table's end.
        """
        present = self.offsets != _ABSENT
        order = np.argsort(self.offsets[present], kind="stable")
        begins, sizes = self.offsets[present][order], self.sizes[present][order]
        ends = begins + -(-sizes // BLOCK) * BLOCK
        return bool((begins == np.concatenate([[0], ends[:-1]]) + BLOCK).all())

    @property
    def last(self) -> Member:
        """The member that stands last in the tar."""
        return self.members(int(self.offsets.max(axis=1).argmax()))[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: a list per column, file extensions once where all are alike."""
        formats = [[_FORMATS[number] for number in column] for column in self.formats.T.tolist()]
        return {
            "keys": [key.decode() for key in self.keys.tolist()],
            **{
                part: column[0] if len(set(column)) == 1 else column
                for part, column in zip(IMAGE_PARTS, formats, strict=True)
            },
            "offsets": self.offsets.T.tolist(),
            "sizes": self.sizes.T.tolist(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], size: int) -> SampleTable:
        """Read what :meth:`to_json` wrote, trusting nothing.

        Args:
            value: the JSON object.
            size: of the shard in bytes.

        Raises:
            ValueError: if it is no table of a shard of this size.
        """
        keys = value["keys"]
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
            raise ValueError("keys must be a list of texts")
        text = "".join(f"{key}\n" for key in keys)
        if not _KEYS.fullmatch(text) or text.count("\n") != len(keys) or len(set(keys)) < len(keys):
            raise ValueError("keys must be 1 to 80 characters A-Z a-z 0-9 _ - each, and none twice")
        offsets, sizes = (_columns(value[name], name, len(keys)) for name in ("offsets", "sizes"))
        present = offsets != _ABSENT
        wrong = (present & ((offsets < BLOCK) | (sizes < 0) | (offsets > size) | (sizes > size - offsets))).any()
        if wrong or ((sizes == _ABSENT) != ~present).any() or not present.any(axis=1).all():
            raise ValueError("offsets and sizes must lie in the shard, and be -1 together where a member is missing")
        samples = np.nonzero(present)[0][np.argsort(offsets[present], kind="stable")]
        if np.count_nonzero(np.diff(samples)) != len(keys) - 1:
            raise ValueError("the members of a sample must stand side by side")
        formats = np.stack([_formats(value[part], part, len(keys)) for part in IMAGE_PARTS], axis=1)
        return cls(np.array([key.encode() for key in keys], np.bytes_), offsets, sizes, formats)


def _columns(value: Any, name: str, count: int) -> np.ndarray:
    """Three lists of integers as (count, 3) int64."""
    try:
        columns = np.array(value)
    except ValueError as error:
        raise ValueError(f"{name} must be three lists of {count} integers each") from error
    if columns.dtype != np.int64 or columns.shape != (len(PARTS), count):
        raise ValueError(f"{name} must be three lists of {count} integers each")
    return np.ascontiguousarray(columns.T)


def _formats(value: Any, name: str, count: int) -> np.ndarray:
    values = [value] * count if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) != count or not set(values) <= set(_FORMATS):
        raise ValueError(f"{name} must be one of {_FORMATS}, or a list of {count} of them")
    return np.array([_FORMATS.index(item) for item in values], np.int8)
