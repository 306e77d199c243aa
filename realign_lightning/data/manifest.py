"""The manifest of a set of shards, ``index.json``: what there is, to the byte, and where each sample stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realign_lightning.backbones.files import file_sha256
from realign_lightning.data.scan import ShardError, check_end, scan_shard
from realign_lightning.data.schema import SCHEMA_VERSION, load_json
from realign_lightning.data.table import SampleTable

INDEX_NAME = "index.json"
"""File beside the shards that lists them; written last."""

SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")
"""Names that shards in an index may have."""


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of one shard.

    Args:
        name: file name within the folder.
        samples: samples it holds.
        bytes: its size.
        sha256: its SHA-256, hexadecimal.
        members: where its samples stand; None in an index that does not say, whose shards are scanned.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    members: SampleTable | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The content of ``index.json``.

    Args:
        shards: the shards, in reading order.
        built_with: how they were built, plain JSON values.
        schema_version: version of the shard contract.
    """

    shards: tuple[ShardInfo, ...]
    built_with: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION

    def to_text(self) -> str:
        """The text of the file: a line per shard, the rest laid out to be read."""
        head = json.dumps(dict(self.built_with), indent=2, sort_keys=True, ensure_ascii=False).replace("\n", "\n  ")
        lines = ",\n".join(f"    {_shard_text(shard)}" for shard in self.shards)
        version = f'"schema_version": {self.schema_version}'
        return f'{{\n  "built_with": {head},\n  {version},\n  "shards": [\n{lines}\n  ]\n}}\n'


def measure_shard(path: Path) -> ShardInfo:
    """What an index says of a shard that is there: scanned, and read once for its SHA-256.

    Args:
        path: the tar file.

    Raises:
        ShardError: if it is damaged or not ours.
    """
    samples = scan_shard(path)
    return ShardInfo(path.name, len(samples), path.stat().st_size, file_sha256(path), SampleTable.of(samples))


def read_index(folder: str | Path) -> ShardIndex:
    """Read and validate the ``index.json`` of a folder of shards.

    Args:
        folder: the folder.

    Returns:
        The index. The shards themselves are not looked at.

    Raises:
        ShardError: if the folder or index is missing or the index is damaged, empty or of another schema version.
    """
    path = Path(folder) / INDEX_NAME
    if not path.parent.is_dir():
        raise ShardError(f"the folder of shards {folder} does not exist")
    if not path.is_file():
        raise ShardError(
            f"{folder} has no {INDEX_NAME}: writing it was interrupted, or it is not ours; write it again, make one "
            "by `realign-lightning index`, or name the tar files themselves"
        )
    return parse_index(path.read_bytes(), str(path))


def parse_index(data: bytes, where: str) -> ShardIndex:
    """Parse and validate an ``index.json``.

    Args:
        data: content of the file.
        where: what to call it in errors.

    Raises:
        ShardError: if it is damaged, empty or of another schema version.
    """
    try:
        content = load_json(data)
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{where} has schema version {version!r}, expected {SCHEMA_VERSION}; write the shards again"
            )
        index = ShardIndex(tuple(_shard_info(entry) for entry in content["shards"]), dict(content["built_with"]))
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ShardError(
            f"{where} is damaged: {type(error).__name__}: {error}; write the shards again, or make another index of "
            "them by `realign-lightning index --overwrite`"
        ) from error
    names = [shard.name for shard in index.shards]
    if not names or len(set(names)) < len(names):
        raise ShardError(f"{where} must list at least one shard and none twice, got {names}")
    return index


def check_shard(
    path: Path, info: ShardInfo, samples: int | None = None, hash_file: Callable[[Path], str] = file_sha256
) -> None:
    """Compare a shard with what the index says of it.

    Args:
        path: the tar file.
        info: its entry in the index.
        samples: samples found in it, if it was scanned.
        hash_file: SHA-256 of a file; one that remembers saves reading shards again that have not changed.

    Raises:
        ShardError: if size, number of samples or SHA-256 differ, or the index does not tell of every sample.
    """
    size = path.stat().st_size
    if size != info.bytes:
        raise ShardError(f"shard {path} has {size} bytes, its index says {info.bytes}; write or copy it again")
    if samples is not None and samples != info.samples:
        raise ShardError(f"shard {path} holds {samples} samples, its index says {info.samples}; write or copy it again")
    if hash_file(path) != info.sha256:
        raise ShardError(f"shard {path} differs from its index in SHA-256: it was damaged or changed; copy it again")
    if info.members is not None:
        _check_members(path, info.members)


def check_keys(shards: Sequence[str], tables: Sequence[SampleTable]) -> None:
    """Make sure that no key occurs twice in a set of shards.

    Args:
        shards: what to call them in the error.
        tables: their samples.

    Raises:
        ShardError: naming the key, and the two shards that hold it first.
    """
    keys = np.concatenate([table.keys for table in tables])
    first = np.unique(keys, return_index=True)[1]
    if len(first) == len(keys):
        return
    again = int(np.setdiff1d(np.arange(len(keys)), first)[0])
    before = int(np.flatnonzero(keys == keys[again])[0])
    shard_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    raise ShardError(
        f"duplicate key {bytes(keys[again]).decode()!r}: in shard {shards[shard_of[before]]} and in shard "
        f"{shards[shard_of[again]]}"
    )


def _check_members(path: Path, table: SampleTable) -> None:
    """Make sure that a table leaves nothing of a shard out."""
    if table.is_plain:
        check_end(path, table.last, path.stat().st_size)
    elif SampleTable.of(scan_shard(path)) != table:
        raise ShardError(
            f"shard {path} holds other members than its index says; make another by `realign-lightning index "
            "--overwrite`"
        )


def _shard_info(entry: Mapping[str, Any]) -> ShardInfo:
    info = ShardInfo(**entry)
    if not isinstance(info.name, str) or not SHARD_NAME.fullmatch(info.name):
        raise ValueError(f"{info.name!r} is not a plain file name ending in .tar")
    for name in ("samples", "bytes"):
        value = getattr(info, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} of {info.name} must be a positive integer, got {value!r}")
    if not isinstance(info.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", info.sha256):
        raise ValueError(f"sha256 of {info.name} must be 64 hexadecimal digits, got {info.sha256!r}")
    if info.members is None:
        return info
    try:
        table = SampleTable.from_json(entry["members"], info.bytes)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"members of {info.name}: {error}") from error
    if len(table) != info.samples:
        raise ValueError(f"members of {info.name} are of {len(table)} samples, and it holds {info.samples}")
    return ShardInfo(info.name, info.samples, info.bytes, info.sha256, table)


def _shard_text(shard: ShardInfo) -> str:
    content: dict[str, Any] = {"bytes": shard.bytes, "name": shard.name, "samples": shard.samples}
    if shard.members is not None:
        content["members"] = shard.members.to_json()
    return json.dumps({**content, "sha256": shard.sha256}, sort_keys=True, separators=(",", ":"))
