"""What tells checkpoints and processors apart: the content of their files."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

_CHUNK = 1 << 24
_WEIGHTS = ("*.safetensors", "*.bin", "config.json")
_ADAPTER = "adapter_config.json"
_WHERE = {"is_local", "local_files_only", "name_or_path"}
"""What tokenizers save about the place that they come from."""


def hash_checkpoint(folder: Path, hash_file: Callable[[Path], str]) -> str:
    """SHA-256 over every file in a checkpoint's folder that its weights may be read from, and its configuration.

    Args:
        folder: with ``config.json`` and files of weights.
        hash_file: SHA-256 of a file.

    Raises:
        ValueError: for a PEFT adapter, whose weights are those of a base that lies elsewhere.
        FileNotFoundError: if there are no weights.
    """
    if (folder / _ADAPTER).is_file():
        raise ValueError(
            f"Expected a whole checkpoint, got {folder} with {_ADAPTER}: the base of an adapter lies elsewhere and "
            "could change unseen. Merge the adapter (realign-lightning export --merge), or use another `reference` "
            "than 'cached'."
        )
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if not any(file.suffix != ".json" for file in files):
        raise FileNotFoundError(f"Expected weights (*.safetensors or *.bin) in {folder}, found none.")
    return hash_texts({file.name: hash_file(file) for file in files})


def hash_processor(processor: Any) -> str:
    """SHA-256 over what a processor saves, but for its chat template and where it was loaded from.

    Args:
        processor: of transformers.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = [file for file in Path(folder).rglob("*") if file.is_file() and not _is_template(file)]
        return hash_texts({str(file.relative_to(folder)): hash_bytes(_content(file)) for file in files})


def hash_code(*modules: ModuleType) -> str:
    """SHA-256 over what the source of modules does, whatever its comments, docstrings and layout.

    Args:
        modules: in any order, with their source at hand.
    """
    return hash_texts({module.__name__: _without_words(inspect.getsource(module)) for module in modules})


@functools.cache
def _without_words(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def hash_texts(texts: Mapping[str, str]) -> str:
    """SHA-256 over names and texts, in the order of the names.

    Args:
        texts: texts by name.
    """
    return hash_bytes(repr(sorted(texts.items())).encode())


def hash_json(value: Any) -> str:
    """SHA-256 over plain JSON values, whatever the order of names.

    Args:
        value: plain JSON values.

    Raises:
        ValueError: for numbers that JSON does not know.
    """
    return hash_bytes(json.dumps(value, sort_keys=True, allow_nan=False).encode())


def hash_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal.

    Args:
        data: what to hash.
    """
    return hashlib.sha256(data).hexdigest()


def _content(file: Path) -> bytes:
    if file.name != "tokenizer_config.json":
        return file.read_bytes()
    settings = json.loads(file.read_bytes())
    return json.dumps({name: settings[name] for name in sorted(settings.keys() - _WHERE)}).encode()


def _is_template(file: Path) -> bool:
    return file.name.startswith("chat_template") or "additional_chat_templates" in file.parts


def file_state(path: Path) -> dict[str, int]:
    """What a file cannot keep when its content changes: size, place on the disk and times of change.

    Args:
        path: the file.

    Raises:
        OSError: if there is none.
    """
    state = path.stat()
    # The time of modification can be set by anyone, that of the last change to the file's entry cannot.
    return {name: getattr(state, name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; a progress bar shows when it takes longer than two seconds.

    Args:
        path: the file.
    """
    digest = hashlib.sha256()
    bar = tqdm(desc=f"hashing {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, delay=2, leave=False)
    with path.open("rb") as file, bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


class FileHasher:
    """SHA-256 of files; what was hashed is known again by path, size, place on the disk and times of change.

    Args:
        memory: JSON file to remember hashes in; None forgets them. If it is damaged, files are read again.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, dict[str, Any]] = {}
        if memory is not None and memory.is_file():
            try:
                known = json.loads(memory.read_bytes())
                if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
                    raise ValueError("not an object of objects")
                self._known = known
            except ValueError as error:
                log.warning("%s cannot be read (%s): files of weights are identified anew.", memory, error)

    def __call__(self, path: Path) -> str:
        """SHA-256 of a file in hexadecimal.

        Args:
            path: the file.
        """
        seen = file_state(path)
        known = self._known.get(str(path.resolve()), {})
        if {name: known.get(name) for name in seen} == seen:
            return str(known["sha256"])
        digest = file_sha256(path)
        self._known[str(path.resolve())] = {**seen, "sha256": digest}
        self._save()
        return digest

    def _save(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memory, self._known)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a JSON file as :func:`write_text` writes text.

    Args:
        path: the file, in a folder that is there.
        value: plain JSON values.
        sort_keys: whether names are written in order.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole, and is there when the machine loses its power right afterwards.

    Args:
        path: the file, in a folder that is there.
        text: its content.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
