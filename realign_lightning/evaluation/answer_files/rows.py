"""Rows of JSON, JSON lines, CSV, TSV and Excel files, told apart by what the files hold."""

from __future__ import annotations

import codecs
import csv
import importlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REPLY = "(text)"
"""Column of a file that is a list of texts."""

CELL_LIMIT = 32767
"""Most characters that a cell of an Excel file holds; XlsxWriter, and so VLMEvalKit, cuts longer ones silently."""

_PICKLES = {".pkl", ".pickle"}
_REFUSED = {
    codecs.BOM_UTF16_LE: "UTF-16 text: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: save it as UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel file from before 2007: save it as .xlsx or .tsv",
    b"\x1f\x8b": "compressed: unpack it",
}
_LONGEST_FIELD = 2**31 - 1
# What XlsxWriter makes of control characters; openpyxl gives it back as it stands.
_ESCAPED = re.compile(r"_x(00[01][0-9A-Fa-f])_")


class Row(NamedTuple):
    """One answer as its file has it.

    Args:
        place: where it stands, for messages: "line 3".
        values: by column. Texts from CSV and TSV; JSON values, numbers and None from others.
    """

    place: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row. JSON lists are held in memory as a whole, anything else is streamed.

    Args:
        path: JSON list, JSON lines, CSV, TSV or ``.xlsx``, whatever its name ends in.

    Yields:
        Rows; empty lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if it is a folder, empty, damaged, no UTF-8, or a pickle.
        ImportError: for ``.xlsx`` without openpyxl.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file in it.")
    with path.open("rb") as file:
        head = file.read(8)
    _check_head(path, head)
    if head.startswith(b"PK"):
        return _excel_rows(path)
    first = next((line.strip() for line in _lines(path) if line.strip()), "")
    if not first:
        raise ValueError(f"{path} is empty.")
    if first.startswith("["):
        return _list_rows(path)
    return _json_lines(path) if first.startswith("{") else _table_rows(path, "\t" if "\t" in first else ",")


def _check_head(path: Path, head: bytes) -> None:
    # Protocols 2 to 5 of pickle start so; no text does.
    if path.suffix.lower() in _PICKLES or (head[:1] == b"\x80" and head[1:2] <= b"\x05"):
        raise ValueError(
            f"{path} is a pickle, and reading a pickle runs whatever code it holds: it is never read. If you trust it, "
            "convert it: python -c \"import pandas; pandas.read_pickle('FILE.pkl').to_csv('FILE.tsv', sep='\\t', "
            'index=False)"'
        )
    for start, told in _REFUSED.items():
        if head.startswith(start):
            raise ValueError(f"{path} is {told}.")


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, split at line feeds only: text may hold any other line separator."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield _decode(path, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number)


def _decode(path: Path, data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def _list_rows(path: Path) -> Iterator[Row]:
    text = _decode(path, path.read_bytes().removeprefix(codecs.BOM_UTF8), 1)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: the JSON is cut or damaged ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON is nested too deeply.") from error
    if not entries:
        raise ValueError(f"{path} is an empty list.")
    for number, entry in enumerate(entries, 1):
        yield _row(path, f"entry {number}", {REPLY: entry} if isinstance(entry, str) else entry)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: the JSON is cut or damaged ({error}). Expected one object a line, or one list."
            ) from error
        yield _row(path, f"line {number}", value)


def _row(path: Path, place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{path}, {place}: expected a JSON object, got {type(value).__name__}.")
    return Row(place, value)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be long while a file is read: some carry their images."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    with _long_fields():
        try:
            columns: list[str] | None = None
            for cells in reader:
                if not cells:
                    continue
                if columns is None:
                    columns = _columns(path, cells)
                    continue
                _check_width(path, f"line {reader.line_num}", columns, cells)
                yield Row(f"line {reader.line_num}", _named(columns, cells))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: cut or damaged ({error}).") from error


def _columns(path: Path, cells: Sequence[Any]) -> list[str]:
    columns = ["" if cell is None else str(cell).strip() for cell in cells]
    named = [column for column in columns if column]
    if len(set(named)) != len(named):
        twice = sorted({column for column in named if named.count(column) > 1})
        raise ValueError(f"{path}: expected every column once, got {twice} more than once.")
    return columns


def _check_width(path: Path, place: str, columns: Sequence[str], cells: Sequence[Any]) -> None:
    if len(cells) != len(columns):
        raise ValueError(
            f"{path}, {place}: expected {len(columns)} cells, one for each of {list(columns)}, got {len(cells)}."
        )


def _named(columns: Sequence[str], cells: Sequence[Any]) -> dict[str, Any]:
    return {column: cell for column, cell in zip(columns, cells, strict=True) if column}


def openpyxl() -> Any:
    """The library that reads and writes Excel files.

    Raises:
        ImportError: saying how to get it, or do without.
    """
    try:
        return importlib.import_module("openpyxl")
    except ImportError as error:
        raise ImportError(
            "Excel files need openpyxl: pip install 'realign-lightning[eval]', or use .tsv (VLMEvalKit: "
            "PRED_FORMAT=tsv)."
        ) from error


def _excel_rows(path: Path) -> Iterator[Row]:
    library = openpyxl()
    # By its path openpyxl would judge a file by its name.
    with path.open("rb") as file:
        try:
            # Formulas as they were written: an answer that starts with "=" may have become one.
            book = library.load_workbook(file, read_only=True, data_only=False)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, SyntaxError) as error:
            raise ValueError(f"{path} is no readable Excel file: {error}.") from error
        try:
            yield from _sheet_rows(path, book.worksheets)
        except (zipfile.BadZipFile, SyntaxError, EOFError) as error:
            raise ValueError(f"{path}: cut or damaged ({error}).") from error


def _sheet_rows(path: Path, sheets: Sequence[Any]) -> Iterator[Row]:
    filled = [sheet for sheet in sheets if next(iter(sheet.iter_rows(max_row=1)), None)]
    if len(filled) != 1:
        raise ValueError(f"{path}: expected one sheet with answers, got {[sheet.title for sheet in filled]}.")
    # Some writers tell a wrong size.
    filled[0].reset_dimensions()
    columns: list[str] | None = None
    for number, cells in enumerate(filled[0].iter_rows(), 1):
        values = [_cell(cell) for cell in cells]
        if all(value is None for value in values):
            continue
        if columns is None:
            columns = _columns(path, values)
            continue
        values += [None] * (len(columns) - len(values))
        _check_width(path, f"row {number}", columns, values)
        yield Row(f"row {number}", _named(columns, values))


def _cell(cell: Any) -> Any:
    if cell.value is None or cell.data_type == "e":
        return None
    if isinstance(cell.value, str):
        return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), cell.value)
    return cell.value
