"""Folders that appear when all of them is written, and what is written beside them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path


def check_target(target: Path, overwrite: bool, ours: re.Pattern[str]) -> None:
    """Refuse a folder that would be replaced and was not meant to be.

    Args:
        target: where the output goes.
        overwrite: whether an earlier output may be replaced.
        ours: fits the names of what such an output holds.

    Raises:
        FileExistsError: if there is a file, a folder with anything else in it, or an earlier output and ``overwrite``
            is False.
    """
    restore_folder(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a folder")
    names = sorted(path.name for path in target.iterdir())
    foreign = [name for name in names if not ours.fullmatch(name)]
    if foreign:
        raise FileExistsError(f"{target} holds {foreign[0]}, which this command never writes; give another folder")
    if names and not overwrite:
        raise FileExistsError(f"{target} already holds {names[0]}; pass --overwrite, or give another folder")


def staging_folder(target: Path) -> Path:
    """The hidden folder beside a target in which it is written.

    Args:
        target: where the output goes.
    """
    return target.parent / f".{target.name}.partial"


def publish_folder(staging: Path, target: Path) -> None:
    """Put a finished folder in its place; the one that it replaces goes last.

    Args:
        staging: the finished folder, beside the target.
        target: where it goes.
    """
    replaced = _replaced(target)
    if replaced.exists():
        shutil.rmtree(replaced)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    # What is left of it is hidden, and goes with the next output.
    shutil.rmtree(replaced, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Put back a folder that was taken away when its successor's writer was killed.

    Args:
        target: where it was.
    """
    if not target.exists() and _replaced(target).exists():
        _replaced(target).rename(target)


def _replaced(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def publish_problems(target: Path, written: Path) -> str | None:
    """Put the list of what was left out beside the output, in place of an earlier run's.

    Args:
        target: where the output goes.
        written: the list; an empty one is none.

    Returns:
        Where it is now, or None.
    """
    problems = target.parent / f"{target.name}.problems.jsonl"
    if written.stat().st_size:
        written.replace(problems)
        return str(problems)
    written.unlink()
    # An earlier run's would be taken for this one's.
    problems.unlink(missing_ok=True)
    return None
