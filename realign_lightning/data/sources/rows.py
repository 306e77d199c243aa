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
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.base import SourceProblem

LINES = (".jsonl", ".ndjson")
"""Endings of files of JSON lines."""

TABLES = (*LINES, ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that hold rows."""

# A string that does not end is one token up to the end: to look for others in it would take forever.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[][{},:]', re.DOTALL)
_OPENING, _CLOSING = (b"[", b"{"), (b"]", b"}")
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
        ValueError: if the file is empty, holds no such array or two, ends before the array does, or goes on after it.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); copy it again")
    with path.open("rb") as file:
        # Not closed but let go: an error on its way holds what still points into it.
        yield from _array_items(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), name)


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


@contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Name the file in what pyarrow raises while it reads one.

    Args:
        file: that is read in the block.

    Raises:
        ValueError: if it is damaged, or no Parquet file.
    """
    import pyarrow as pa

    try:
        yield
    # UnicodeDecodeError: names of columns.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged, or no Parquet file ({error}); copy it again") from error


_Value = tuple[int, str, Any]
"""Number of the row in its file, file and number in words, and its value or the ValueError that tells what is wrong."""


def _read_file(file: Path) -> Iterator[_Value]:
    ending = file.suffix.lower()
    if ending in TABLES[:-1] and file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes); copy it again")
    if ending in LINES:
        return _lines(file)
    if ending == ".json":
        first = first_byte(file)
        if not first:
            raise ValueError(f"{file}: expected an array or lines of JSON, got white space")
        return _array(file) if first == b"[" else _lines(file)
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
    tokens = _TOKEN.finditer(data)
    depth, found, end = 0, False, 0
    last, field = b"", b""
    for match in tokens:
        token, end = match.group(), match.end()
        if token == b"[" and (depth == 0 if name is None else depth == 1 and _is_name(field, name)):
            if found:
                raise ValueError(f"{path} holds its array twice; expected one")
            found = True
            end = yield from _items(path, data, tokens, end)
        elif token in _OPENING:
            if depth == 0 and (name is None or token == b"["):
                break
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif token == b":":
            field = last if depth == 1 else field
        else:
            last = token
        if depth <= 0:
            break
    if not found:
        what = "an array" if name is None else f"an object with an array {name!r}"
        raise ValueError(f"{path}: expected {what} in JSON")
    if depth > 0:
        raise ValueError(f"{path} is cut: its JSON has no end; copy it again")
    if data[end:].strip():
        raise ValueError(f"{path} goes on after the end of its JSON, at byte {end}: {data[end : end + 40]!r}")


def _items(path: Path, data: mmap.mmap, tokens: Iterator[re.Match[bytes]], start: int) -> Generator[bytes, None, int]:
    """The items of an array that begins at ``start``, behind its bracket; returns where it ends."""
    depth, after_comma = 0, False
    for match in tokens:
        token = match.group()
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING and depth:
            depth -= 1
        elif token in _CLOSING:
            if token != b"]":
                raise ValueError(f"{path} is damaged: its array ends in a brace, at byte {match.start()}")
            if (rest := data[start : match.start()].strip()) or after_comma:
                yield rest
            return match.end()
        elif token == b"," and not depth:
            yield data[start : match.start()].strip()
            start, after_comma = match.end(), True
    raise ValueError(f"{path} is cut: its array has no end; copy it again")


def _is_name(token: bytes, name: str) -> bool:
    try:
        return bool(load_json(token) == name)
    except ValueError:
        return False


def _cells(file: Path, delimiter: str) -> Iterator[_Value]:
    # Bytes that are no UTF-8 come out as surrogates, so that they are a problem of their row alone.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.DictReader(opened, delimiter=delimiter, strict=True)
        names = _column_names(file, reader)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{file}: expected a first line with different column names, got {list(names)}")
        for number in itertools.count(1):
            # DictReader's own count does not move with a row that fails.
            line = reader.reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise ValueError(
                        f"{file} is cut, or lacks a quotation mark: a cell that begins in row {number} (line {line}) "
                        "has no end"
                    ) from error
                yield number, f"{file.name}, row {number}", ValueError(_unreadable(error, line, reader.reader.line_num))
                continue
            if row is None:
                return
            yield number, f"{file.name}, row {number}", _checked_cells(row)


def _column_names(file: Path, reader: csv.DictReader[str]) -> list[str]:
    try:
        return list(reader.fieldnames or [])
    except csv.Error as error:
        raise ValueError(f"{file}: the line of column names cannot be read: {error}") from error


def _unreadable(error: csv.Error, first: int, last: int) -> str:
    """What is wrong with a row, and how much of the file went with it where a quotation mark is missing."""
    lines = f"; it takes the lines {first} to {last} of the file" if last > first else ""
    return f"the row cannot be read: {error}{lines}"


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
    number = 0
    with parquet_errors(file), pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            for index in range(batch.num_rows):
                number += 1
                yield number, f"{file.name}, row {number}", _parquet_row(batch, index)


def _parquet_row(batch: Any, index: int) -> Any:
    try:
        return {name: batch.column(place)[index].as_py() for place, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        return ValueError("the row is not UTF-8")
