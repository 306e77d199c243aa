"""Which commit of a model on the hub was loaded, and how to load the very same again."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_told: set[tuple[str, str]] = set()


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which never moves, and no branch or tag.

    Args:
        revision: branch, tag or commit on the hub; None is the main branch.

    >>> is_commit("b234b804b114d9e37bb655e11cbbb5f5e971b7a9"), is_commit("main"), is_commit(None)
    (True, False, False)
    """
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def tell_commit(model: str, revision: str | None, commit: str | None) -> None:
    """Log the commit that a name stood for when it was loaded, once and on one rank, with the line that pins it.

    Args:
        model: folder or hub name.
        revision: as it was asked for; a commit needs no words.
        commit: what it stood for; None where that is not known, as of folders.
    """
    is_first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    if commit is None or is_commit(revision) or Path(model).is_dir() or (model, commit) in _told or not is_first:
        return
    _told.add((model, commit))
    log.info(
        "%s (revision %s) is at commit %s now. To load the very same next time, write into the recipe: revision: %s",
        *(model, revision or "main", commit, commit),
    )


def cached_commit(model: str, revision: str | None = None, file: str = "config.json") -> str | None:
    """The commit that a name on the hub stood for when a file of it was last fetched; None for folders.

    Args:
        model: folder or name on the hub.
        revision: branch, tag or commit.
        file: of the model's repository.
    """
    if Path(model).is_dir():
        return None
    found = try_to_load_from_cache(model, file, revision=revision)
    # The hub's cache keeps the files of a commit in a folder of its name.
    return Path(found).parent.name if isinstance(found, str) else None
