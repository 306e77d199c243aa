"""Layouts by name, and how one is recognised."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.base import Source
from realign_lightning.data.sources.coco import CocoCaptions
from realign_lightning.data.sources.image_folder import IMAGE_ENDINGS, ImageFolder
from realign_lightning.data.sources.llava import LlavaInstruct
from realign_lightning.data.sources.pairs import MsSwift, Parquet, RealignJson, ShareGptRanking, TrlPreference
from realign_lightning.data.sources.rows import (
    LINES,
    Row,
    find_files,
    first_byte,
    json_array,
    parquet,
    parquet_errors,
    read_rows,
)
from realign_lightning.data.sources.shards import Shards

LAYOUTS: dict[str, type[Source]] = {
    "shards": Shards,
    "image-folder": ImageFolder,
    "llava": LlavaInstruct,
    "coco-captions": CocoCaptions,
    "parquet": Parquet,
    "trl": TrlPreference,
    "sharegpt": ShareGptRanking,
    "ms-swift": MsSwift,
    "realign": RealignJson,
}
"""Sources by the name of their layout."""

_LOOK = 20
"""Rows that are looked at to recognise a layout."""


def open_source(path: str | Path, layout: str = "auto", **options: Any) -> Source:
    """The source for a path.

    Args:
        path: file, folder or pattern.
        layout: a name of :data:`LAYOUTS`; ``auto`` recognises it by its content (:func:`guess_layout`).
        options: further arguments of the source, such as ``images``. For a source that has no ``images`` they must not
            be given.

    Returns:
        The source; nothing is read yet.

    Raises:
        OSError: if there is nothing at the path.
        ValueError: if the layout is unknown or not recognised, or does not take an option.

    Example:
        >>> open_source("data/answers.json", layout="llava", images="data/train2014").turns
        'first'
    """
    name = guess_layout(path) if layout == "auto" else layout
    if name not in LAYOUTS:
        raise ValueError(f"layout must be 'auto' or one of {sorted(LAYOUTS)}, got {layout!r}")
    accepted = inspect.signature(LAYOUTS[name]).parameters
    unknown = sorted(options.keys() - accepted.keys())
    if unknown:
        taken = sorted(accepted.keys() - {"path"})
        raise ValueError(f"the layout {name!r} of {path} does not take {unknown}; it takes {taken}")
    return LAYOUTS[name](path, **options)  # type: ignore[call-arg]


def guess_layout(path: str | Path) -> str:
    """The name of the layout of what lies at a path, by its content.

    Args:
        path: file, folder or pattern.

    Raises:
        OSError: if there is nothing at the path.
        ValueError: if it is none of :data:`LAYOUTS`; says what was seen.
    """
    folder = Path(path)
    if folder.is_dir():
        return _guess_folder(folder)
    file = find_files(path)[0]
    ending = file.suffix.lower()
    if ending == ".tar":
        return "shards"
    if ending in (".csv", ".tsv"):
        return "image-folder"
    if ending == ".parquet":
        return _guess_columns(file)
    if ending in (*LINES, ".json"):
        return _guess_json(file)
    raise ValueError(f"{file}: cannot tell the layout of a file ending in {ending!r}; {_HINT}")


_HINT = f"name it: one of {sorted(LAYOUTS)}"


def _guess_folder(folder: Path) -> str:
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    endings = {Path(name).suffix.lower() for name in names}
    if ".tar" in endings:
        return "shards"
    if {"metadata.jsonl", "metadata.csv"} & set(names):
        return "image-folder"
    if ".parquet" in endings:
        return _guess_columns(next(folder / name for name in names if name.lower().endswith(".parquet")))
    tables = [name for name in names if Path(name).suffix.lower() in (*LINES, ".json")]
    if len(tables) == 1:
        name = _guess_json(folder / tables[0])
        if name in ("coco-captions", "image-folder"):
            raise ValueError(
                f"{folder} is a folder; give its file {tables[0]}, and the folder of the images as `images`"
            )
        return name
    if not tables and any(one.suffix.lower() in IMAGE_ENDINGS for one in folder.rglob("*")):
        return "image-folder"
    raise ValueError(f"{folder}: cannot tell the layout of a folder with {names[:10]}; {_HINT}")


def _guess_columns(file: Path) -> str:
    pq = parquet()
    with parquet_errors(file):
        schema = pq.read_schema(file)
    names = set(schema.names)
    if {"chosen", "rejected"} <= names:
        is_text = str(schema.field("chosen").type) in ("string", "large_string")
        return "parquet" if is_text and "image" in names else "trl"
    if names & {"question", "prompt", "text"} and names & {"image", "images"}:
        return "parquet"
    raise ValueError(f"{file}: cannot tell the layout of columns {sorted(names)}; {_HINT}")


def _guess_json(file: Path) -> str:
    if first_byte(file) == b"{" and file.suffix.lower() == ".json" and _is_coco(file):
        return "coco-captions"
    seen: set[str] = set()
    for row in _first_rows(file):
        name = _guess_fields(row.fields)
        if name is not None:
            return name
        seen |= row.fields.keys()
    raise ValueError(f"{file}: cannot tell the layout of rows with {sorted(seen) or 'nothing in them'}; {_HINT}")


def _is_coco(file: Path) -> bool:
    try:
        first = load_json(next(json_array(file, "annotations")))
    except (ValueError, StopIteration):
        return False
    return isinstance(first, Mapping) and {"image_id", "caption"} <= first.keys()


def _first_rows(file: Path) -> Iterator[Row]:
    for count, row in enumerate(read_rows(file)):
        if count == _LOOK:
            return
        if isinstance(row, Row):
            yield row


def _guess_fields(fields: Mapping[str, Any]) -> str | None:
    names = fields.keys()
    if "messages" in names:
        return "ms-swift"
    if "conversations" in names:
        return "sharegpt" if {"chosen", "rejected"} & names else "llava"
    whole_chats = "prompt" not in names and isinstance(fields.get("chosen"), list)
    if "retrieved_image" in names or ("image" in names and whole_chats):
        return "realign"
    if {"chosen", "rejected"} <= names:
        return "parquet" if "question" in names else "trl"
    if "file_name" in names:
        return "image-folder"
    return None
