"""What a source of answers about images yields, whatever its layout: records, and rows that cannot be used."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realign_lightning.types import Prompt, SampleError


@dataclass(frozen=True)
class ImageFile:
    """An image as a file, on disk or in memory; nothing is decoded.

    Args:
        image_id: its name: two records with one ``image_id`` show the same image.
        path: where it lies; None where ``data`` is given.
        data: its bytes; None where ``path`` is given.

    Raises:
        ValueError: unless exactly one of ``path`` and ``data`` is given.
    """

    image_id: str
    path: Path | None = None
    data: bytes | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError(f"Image {self.image_id!r}: expected either `path` or `data`, got both or neither.")

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            SampleError: if it cannot be read; the message says why.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None  # noqa: S101 - one of the two is given
        try:
            return self.path.read_bytes()
        # ValueError: a path that no file can have.
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            name = str(self.path).encode("utf-8", "backslashreplace").decode()
            raise SampleError(f"the image file {name} cannot be read: {reason}") from error


@dataclass(frozen=True)
class SourceRecord:
    """An answer about an image, or part of a pair; what is None is built.

    Args:
        key: name, unique within its source, fit for a shard: 1 to 80 characters A-Z a-z 0-9 _ -.
        image: the image v.
        prompt: text or chat messages, without image placeholders of any model.
        chosen: the good answer y_w; None where it is to be generated.
        rejected: the rejected answer y_l, where the source has one.
        retrieved: the rejected image v_l, where the source has one.
        objects: what the image is known to show, where the source says so.
        facts: what else is to be kept beside the pair (plain JSON values), for example the row's own id.
    """

    key: str
    image: ImageFile
    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    retrieved: ImageFile | None = None
    objects: tuple[str, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceProblem:
    """A row that cannot be used.

    Args:
        where: file and row, or key.
        reason: what is wrong with it.
    """

    where: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row: quoted words, paths and numbers.

        >>> SourceProblem("row 7", "the image file /data/7.jpg cannot be read: 'x' of 12 bytes").kind
        'the image file ... cannot be read: ... of ... bytes'
        """
        return re.sub(r"'[^']*'|\"[^\"]*\"|(?<!\w)/\S+|\d+", "...", self.reason)


class Source(ABC):
    """Answers about images in some layout. Subclass it to bring your own."""

    @abstractmethod
    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Every row, in the order of the source: a record, or what is wrong with it. Images are not read.

        Rows come out the same in every run, with the same keys, as long as the files are the same; rows that are added
        at the end change none before them.

        Raises:
            OSError: if the source itself cannot be read.
            ValueError: if it is not of this layout at all.
        """
