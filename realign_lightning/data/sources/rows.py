"""Rows of tables, whatever the file: JSON lines, a JSON array, CSV or Parquet. Each row is read by itself, as it comes.

A row that cannot be read is a problem of that row, named by file and number; a file that is cut or of another kind is
an error. Nothing is held in memory but the row at hand: a JSON array is mapped and taken item by item.
"""

from __future__ import annotations

import csv
import glob
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.base import SourceProblem

LINES = (".jsonl", ".ndjson")
"""Endings of files of JSON lines."""

TABLES = (*LINES, ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that hold rows."""

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{},:]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 16


class Row(NamedTuple):
    """A row of a table.

    Args:
        where: file and number, for messages.
        number: of the row, from 1, counted over all files.
        fields: values by name; fields that are null are left out.
    """

    where: str
    number: int
    fields: dict[str, Any]


def find_files(path: str | Path, endings: tuple[str, ...] = TABLES) -> list[Path]:
    """The files behind a path.

    Args:
        path: a file, a pattern with ``*``, ``?`` or ``[...]``, or a folder: then its files with one of the endings,
            hidden ones (such as what an interrupted download leaves) left out.
        endings: in small letters, each with its dot.

    Returns:
        The files; a pattern's and a folder's are sorted by name.

    Raises:
        FileNotFoundError: if there is none.
    """
    if Path(path).is_dir():
        visible = (one for one in Path(path).iterdir() if not one.name.startswith("."))
        found = sorted(one for one in visible if one.suffix.lower() in endings)
    elif Path(path).exists() or not glob.has_magic(str(path)):
        found = [Path(path)]
    else:
        found = [Path(one) for one in sorted(glob.glob(str(path)))]  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found or not all(file.is_file() for file in found):
        raise FileNotFoundError(f"{path}: expected a file, a folder with files {', '.join(endings)}, or a pattern")
    return found


def read_rows(path: str | Path) -> Iterator[Row | SourceProblem]:
    """Every row of a table, in order.

    Args:
        path: file, folder or pattern, see :func:`find_files`. The ending of a file decides how it is read; ``.json`` is
            an array of objects, or JSON lines.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is cut, empty, or not what its ending says.
        ImportError: for Parquet without pyarrow.
    """
    before = 0
    for file in find_files(path):
        count = 0
        for count, where, value in _read_file(file):
            if isinstance(value, ValueError):
                yield SourceProblem(where, str(value))
            elif not isinstance(value, dict):
                yield SourceProblem(where, f"expected an object with named fields, got {type(value).__name__}")
            else:
                yield Row(where, before + count, {name: item for name, item in value.items() if item is not None})
        before += count


def json_array(path: Path, name: str | None = None) -> Iterator[bytes]:
    """The items of an array in a JSON file, one by one, each as the bytes that it takes there.

    Args:
        path: the file.
        name: of the array, if the file holds an object; None if it holds the array itself.

    Raises:
        ValueError: if the file is empty, holds no such array, or ends before the array does.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _array_items(path, data, name)


def parquet() -> Any:
    """The module pyarrow.parquet.

    Raises:
        ImportError: if pyarrow is missing; says how to get it.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: install it, or the extra that brings it: "
            "pip install 'realign-lightning[build]'"
        ) from error
    return pyarrow.parquet


_Value = tuple[int, str, Any]
"""Number of the row in its file, file and number in words, and its value or the ValueError that tells what is wrong."""


def _read_file(file: Path) -> Iterator[_Value]:
    ending = file.suffix.lower()
    if ending in LINES:
        return _lines(file)
    if ending == ".json":
        return _array(file) if first_byte(file) == b"[" else _lines(file)
    if ending in (".csv", ".tsv"):
        return _cells(file, "\t" if ending == ".tsv" else ",")
    if ending == ".parquet":
        return _parquet_rows(file)
    raise ValueError(f"{file}: expected a file ending in {', '.join(TABLES)}")


def first_byte(file: Path) -> bytes:
    """The first byte of a file that is not white space (nor a byte order mark); empty if there is none."""
    with file.open("rb") as opened:
        start = opened.read(4096)
    return start.removeprefix(_BOM).lstrip()[:1]


def _parsed(text: bytes) -> Any:
    try:
        return load_json(text)
    except ValueError as error:
        return ValueError(f"the JSON cannot be read: {error}")


def _lines(file: Path) -> Iterator[_Value]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, f"{file.name}, line {number}", _parsed(line)


def _array(file: Path) -> Iterator[_Value]:
    for number, item in enumerate(json_array(file), 1):
        yield number, f"{file.name}, row {number}", _parsed(item)


def _array_items(path: Path, data: mmap.mmap, name: str | None) -> Iterator[bytes]:
    """Follow brackets, commas and colons from one to the next; strings are passed over as a whole."""
    level = 1 if name is None else 2
    depth, start, inside = 0, 0, False
    last, field = b"", b""
    for match in _TOKEN.finditer(data):
        token = match.group()
        if token in (b"[", b"{"):
            named = name is None or _is_name(field, name)
            if not inside and token == b"[" and depth == level - 1 and named:
                inside, start = True, match.end()
            elif depth == 0 and (name is None or token == b"["):
                break
            depth += 1
        elif token in (b"]", b"}"):
            depth -= 1
            if inside and depth == level - 1:
                if rest := data[start : match.start()].strip():
                    yield rest
                return
        elif token == b",":
            if inside and depth == level:
                yield data[start : match.start()].strip()
                start = match.end()
        elif token == b":":
            field = last if depth == 1 else field
        else:
            last = token
    if inside:
        raise ValueError(f"{path} is cut: its array has no end; copy it again")
    what = "an array" if name is None else f"an object with an array {name!r}"
    raise ValueError(f"{path}: expected {what} in JSON")


def _is_name(token: bytes, name: str) -> bool:
    try:
        return bool(load_json(token) == name)
    except ValueError:
        return False


def _cells(file: Path, delimiter: str) -> Iterator[_Value]:
    # Bytes that are no UTF-8 come out as surrogates, so that they are a problem of their row alone.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.DictReader(opened, delimiter=delimiter, strict=True)
        names = reader.fieldnames or []
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{file}: expected a first line with different column names, got {list(names)}")
        for number in itertools.count(1):
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield number, f"{file.name}, row {number}", ValueError(f"the row cannot be read: {error}")
                continue
            if row is None:
                return
            yield number, f"{file.name}, row {number}", _checked_cells(row)


def _checked_cells(row: dict[Any, Any]) -> Any:
    if None in row:
        return ValueError("the row has more cells than there are columns")
    if None in row.values():
        return ValueError("the row has fewer cells than there are columns")
    if any("\udc80" <= character <= "\udcff" for cell in row.values() for character in cell):
        return ValueError("the row is not UTF-8")
    # An empty cell is how a table says that there is nothing.
    return {name: cell for name, cell in row.items() if cell}


def _parquet_rows(file: Path) -> Iterator[_Value]:
    pq = parquet()
    import pyarrow as pa

    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, f"{file.name}, row {number}", _parquet_row(batch, index)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged, or no Parquet file ({error}); copy it again") from error


def _parquet_row(batch: Any, index: int) -> Any:
    try:
        return {name: batch.column(place)[index].as_py() for place, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        return ValueError("the row is not UTF-8")
