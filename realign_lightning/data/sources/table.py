"""What all sources of rows share: keys, checks, and one problem per row that cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from realign_lightning.data.schema import check_response, load_json
from realign_lightning.data.sources.base import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.rows import Row, find_files, read_rows
from realign_lightning.types import SampleError

_FIT = re.compile(r"[A-Za-z0-9_-]{1,80}")
_KEPT = 71
"""Characters kept of a name that is made fit: with a dash and eight digits they are 80."""


def fit_key(name: str) -> str:
    """A name as a key of 1 to 80 characters A-Z a-z 0-9 _ -, the same in every run, different for different names.

    Args:
        name: any text.

    Returns:
        The name itself if it is fit; or what is fit of it, and eight digits of its SHA-256.

    Example:
        >>> fit_key("000000033471")
        '000000033471'
        >>> fit_key("coco/33471.jpg")
        'coco_33471_jpg-37497fe8'
    """
    if _FIT.fullmatch(name):
        return name
    kept = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_KEPT]
    return f"{kept}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class Keys:
    """Keys that were given so far; none is given twice."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: Any) -> str:
        """A key for a row's own id.

        Args:
            name: the id, a text or a whole number.

        Raises:
            SampleError: if it is neither, or was taken before.
        """
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise SampleError(f"the id must be a text or a whole number, got {type(name).__name__}")
        key = fit_key(str(name))
        if key in self._taken:
            raise SampleError(f"duplicate id {name!r}: an earlier row has it")
        self._taken.add(key)
        return key


def row_facts(fields: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """What a row holds beside the pair: our own provenance as it was, anything else under ``source``.

    Args:
        fields: of the row.
        used: names that are part of the pair.

    Returns:
        Plain JSON values; what is none (bytes, dates, null) is left out.
    """
    rest = {name: value for name, value in fields.items() if name not in {*used, "provenance"} and is_plain(value)}
    facts: dict[str, Any] = {"source": rest} if rest else {}
    own = fields.get("provenance")
    if isinstance(own, str):
        try:
            own = load_json(own.encode())
        except ValueError as error:
            raise SampleError(f"provenance is no JSON: {error}") from error
    if isinstance(own, Mapping) and is_plain(own):
        facts |= own
    return facts


def is_plain(value: Any) -> bool:
    """Whether shards can hold a value: plain JSON without null, NaN, NUL characters and lone surrogates."""
    if isinstance(value, str):
        return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and is_plain(name) and is_plain(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return isinstance(value, bool | int)


class RowSource(Source):
    """Rows in files of JSON lines, JSON, CSV or Parquet. Subclass it and say what a row means (:meth:`parse`).

    Args:
        path: file, pattern or folder of files; several are read in order of their names.
        images: folder that image paths are relative to; None is the folder of the files.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None, id_field: str = "key") -> None:
        self.path = path
        self.images = images
        self.id_field = id_field

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Every row in order; see :meth:`Source.read`."""
        keys = Keys()
        finder = self._finder()
        for row in self.rows():
            if isinstance(row, SourceProblem):
                yield row
                continue
            try:
                # A row that cannot be used must not take the id of one that can.
                parsed = list(self.parse(row, finder))
                key = keys.take(row.fields.get(self.id_field, f"row-{row.number:08d}"))
            except SampleError as error:
                yield SourceProblem(row.where, str(error))
                continue
            yield from (self._keyed(item, key) for item in parsed)

    def rows(self) -> Iterable[Row | SourceProblem]:
        """The rows of the files."""
        return read_rows(self.path)

    @abstractmethod
    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord | SourceProblem]:
        """What a row means.

        Args:
            row: the row.
            images: finds its image.

        Yields:
            Records whose key is empty, or what is to be appended to the row's key; problems of parts of the row.

        Raises:
            SampleError: if the row cannot be used.
        """

    def _finder(self) -> ImageFinder:
        return ImageFinder(find_files(self.path)[0].parent if self.images is None else Path(self.images))

    @staticmethod
    def _keyed(item: SourceRecord | SourceProblem, key: str) -> SourceRecord | SourceProblem:
        return item if isinstance(item, SourceProblem) else dataclasses.replace(item, key=fit_key(key + item.key))


def checked(record: SourceRecord) -> SourceRecord:
    """A record whose answers can be stored in a shard.

    Args:
        record: the record.

    Raises:
        SampleError: if an answer is empty or holds what no JSON text may hold, if both answers are equal, or if both
            images are one.
    """
    for name, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
        if answer is not None:
            check_response(answer, name)
    if record.chosen is not None and record.rejected is not None and record.chosen.strip() == record.rejected.strip():
        raise SampleError("chosen is equal to rejected: nothing to prefer")
    if record.retrieved is not None and record.retrieved.image_id == record.image.image_id:
        raise SampleError("the rejected image is the image itself: nothing to prefer")
    return record


def other_image(image: ImageFile, value: Any, name: str, images: ImageFinder) -> ImageFile | None:
    """The rejected image of a row; None where it has none, or only repeats the image.

    Args:
        image: of the row.
        value: of the field, or None.
        name: of the field, for messages.
        images: finds it.

    Raises:
        SampleError: as :meth:`~realign_lightning.data.sources.images.ImageFinder.find`.
    """
    if value is None:
        return None
    found = images.find(value, name)
    return None if found.image_id == image.image_id else found
