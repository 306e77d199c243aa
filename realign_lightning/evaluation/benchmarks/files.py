"""Official files of benchmarks, read with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.backbones.files import hash_bytes
from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.evaluation.answer_files import rows as answer_files
from realign_lightning.types import SampleError

_WHERE = "the page on evaluation in the docs says where it comes from"
Kind = type | tuple[type, ...]
"""What a field holds."""


def read_rows(path: Path, fields: Mapping[str, Kind]) -> list[dict[str, Any]]:
    """The objects of a JSON array, or of a file with one per line.

    Args:
        path: the file.
        fields: that every object must have, and what they hold.

    Returns:
        At least one object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the row, if one is no object, or lacks a field, or holds something else in it; or if there
            are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {_WHERE}.")
    rows = []
    for row in answer_files.read_rows(path):
        for name, kind in fields.items():
            if not isinstance(row.values.get(name), kind):
                raise ValueError(
                    f"{path}, {row.place}: expected {name!r} to hold {_told(kind)}, got {_found(row, name)}."
                )
        rows.append(dict(row.values))
    return rows


def _told(kind: Kind) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is type(None) else one.__name__ for one in kinds)


def _found(row: answer_files.Row, name: str) -> str:
    return repr(row.values[name])[:80] if name in row.values else f"the fields {sorted(row.values)}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {_WHERE}.")
    try:
        value = load_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): was the download cut?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def image_path(folder: Path, name: str, where: str) -> Path:
    """The file of an image; it is not opened, and need not exist.

    Args:
        folder: of the images.
        name: path within it.
        where: what names it, for messages.

    Raises:
        ValueError: if the path leads out of the folder.
    """
    try:
        found = ImageFinder(folder).find(name, "image")
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    if found.path is None:
        raise ValueError(f"{where}: expected the path of an image, got {name[:80]!r}")
    return found.path


def target_of(target: Any, key: str, fields: Sequence[str]) -> dict[str, Any]:
    """A question's target, checked.

    Args:
        target: of the question.
        key: of the question.
        fields: that it must have.

    Raises:
        ValueError: naming the question, if it lacks one.
    """
    if not isinstance(target, Mapping) or not set(fields) <= target.keys():
        raise ValueError(f"Question {key!r}: expected a target with {list(fields)}, got {target!r}.")
    return dict(target)


def given(path: Path | None, name: str) -> Path:
    """A path that questions are read from.

    Args:
        path: argument of the benchmark.
        name: of the argument.

    Raises:
        ValueError: if it was left out.
    """
    if path is None:
        raise ValueError(f"Expected `{name}` of the benchmark, which its questions are read from; {_WHERE}.")
    return path


def template_hash(path: Path | None) -> str | None:
    """What tells a judge's prompt from others; None for the built-in one.

    Args:
        path: of the prompt.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"Expected `judge_template` to be a file with the judge's prompt, got {path}.")
    return hash_bytes(path.read_bytes())[:16]
