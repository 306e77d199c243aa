"""Write shards and their index, so that a crash leaves nothing that a reader would take for complete.

The shards are WebDataset tars (https://github.com/webdataset/webdataset); stock ``webdataset.WebDataset`` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import webdataset
from tqdm import tqdm

from realign_lightning.data.scan import ShardError, scan_shard
from realign_lightning.data.schema import SCHEMA_VERSION, ImageFormat, encode_members, load_json, split_member_name
from realign_lightning.types import PreferenceSample

INDEX_NAME = "index.json"
"""File beside the shards that lists them; written last."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of one shard.

    Args:
        name: file name within the folder.
        samples: samples it holds.
        bytes: its size.
        sha256: its SHA-256, hexadecimal.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


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


def refuse_existing(folder: str | Path, overwrite: bool) -> None:
    """Raise where shards would be overwritten that were not meant to be.

    Args:
        folder: where shards are to be written.
        overwrite: whether shards that are there may go.

    Raises:
        FileExistsError: if the folder holds an index or shards and ``overwrite`` is False.
    """
    old = _written(Path(folder))
    if old and not overwrite:
        raise FileExistsError(f"{folder} already holds {old[0].name}; pass overwrite=True, or give another folder")


def _written(folder: Path) -> list[Path]:
    """Index and shards of a folder, the index first."""
    return [path for path in (folder / INDEX_NAME, *sorted(folder.glob("shard-*.tar"))) if path.exists()]


class ShardWriter:
    """Write preference samples as shards ``shard-000000.tar`` ... and an ``index.json``.

    A context manager. Each shard is written under a hidden temporary name and renamed when complete; the index is
    written when the block ends without an error. Equal samples give equal bytes. A folder without an index is refused
    by :class:`~realign_lightning.data.ShardDataset`; after a crash the finished shards in it can still be read by
    naming them.

    Args:
        folder: where to write; made if it does not exist.
        samples_per_shard: samples in every shard but the last.
        image_format: how images are stored: ``png`` (default) and ``webp`` without loss, ``jpg`` at quality 95 for
            large photos. Original files can be passed through, see :meth:`write`.
        built_with: how the samples were made, plain JSON values; stored in the index.
        overwrite: remove an index and shards of this writer's naming that are already in the folder.

    Raises:
        ValueError: if ``samples_per_shard`` is below 1 or ``built_with`` is not plain JSON.
        FileExistsError: if the folder already holds shards and ``overwrite`` is False.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> image, retrieved = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        >>> sample = PreferenceSample("0", image, retrieved, "Which colour?", "Red.", "Blue.")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, built_with={"source": "an example"}) as writer:
        ...         writer.write(sample)
        ...     read_index(folder).shards[0].samples
        1
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 1000,
        image_format: ImageFormat = "png",
        built_with: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        try:
            json.dumps(dict(built_with or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"built_with must hold plain JSON values: {error}") from error
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.image_format = image_format
        self.built_with = dict(built_with or {})
        self._keys: set[str] = set()
        self._shards: list[ShardInfo] = []
        self._samples = 0
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._clear_folder(overwrite)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, sample: PreferenceSample, image: bytes | None = None, retrieved: bytes | None = None) -> None:
        """Add one sample.

        Args:
            sample: the sample; its key must be new.
            image: original JPEG, PNG or WebP file of the image, stored as it is in place of ``sample.image``.
            retrieved: the same for ``sample.retrieved``.

        Raises:
            SampleError: if the sample breaks the contract; nothing of it is written.
            ValueError: if its key was written before.
        """
        members = encode_members(sample, self.image_format, image, retrieved)
        if sample.key in self._keys:
            raise ValueError(f"key {sample.key!r} was already written; keys must be unique within a set of shards")
        self._keys.add(sample.key)
        if self._tar is None:
            self._open_shard()
        parts = {split_member_name(name)[1]: data for name, data in members.items()}
        self._tar.write({"__key__": sample.key, **parts})
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

    def close(self) -> ShardIndex:
        """Finish the last shard and write the index; called at the end of the ``with`` block.

        Returns:
            The index.

        Raises:
            ValueError: if no sample was written.
        """
        if self._tar is not None:
            self._finish_shard()
        if not self._shards:
            raise ValueError(f"no sample was written to {self.folder}; a set of shards needs at least one")
        index = ShardIndex(tuple(self._shards), self.built_with)
        text = json.dumps(asdict(index), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        temporary = self.folder / f".{INDEX_NAME}.partial"
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8"))
            _sync(file)
        temporary.replace(self.folder / INDEX_NAME)
        return index

    def _clear_folder(self, overwrite: bool) -> None:
        refuse_existing(self.folder, overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The index goes first: from here on the folder counts as incomplete.
        old = _written(self.folder)
        for path in (*old, *self.folder.glob(".*.partial")):
            path.unlink()

    @property
    def _shard_name(self) -> str:
        return f"shard-{len(self._shards):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self._shard_name}.partial"

    def _open_shard(self) -> None:
        self._file = self._temporary.open("wb")
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0.0)
        self._samples = 0

    def _finish_shard(self) -> None:
        assert self._file is not None  # noqa: S101 - opened together with the tar
        self._tar.close()
        _sync(self._file)
        self._file.close()
        self._tar = self._file = None
        if (found := len(scan_shard(self._temporary))) != self._samples:
            raise ShardError(f"{self._temporary} holds {found} samples after {self._samples} were written; write again")
        info = ShardInfo(
            self._shard_name,
            self._samples,
            self._temporary.stat().st_size,
            file_sha256(self._temporary),
        )
        self._temporary.replace(self.folder / info.name)
        self._shards.append(info)

    def abandon(self) -> None:
        """Drop the shard that is being written; those that are finished stay, without an index."""
        if self._file is not None:
            try:
                self._tar.close()
            finally:
                self._file.close()
                self._temporary.unlink()
                self._tar = self._file = None


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
            f"{folder} has no {INDEX_NAME}: writing it was interrupted, or it is not ours; "
            "write it again, or name the tar files themselves"
        )
    try:
        content = load_json(path.read_bytes())
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path} has schema version {version!r}, expected {SCHEMA_VERSION}; write the shards again"
            )
        index = ShardIndex(tuple(_shard_info(entry) for entry in content["shards"]), dict(content["built_with"]))
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged: {type(error).__name__}: {error}; write the shards again") from error
    names = [shard.name for shard in index.shards]
    if not names or len(set(names)) < len(names):
        raise ShardError(f"{path} must list at least one shard and none twice, got {names}")
    return index


def check_shard(path: Path, info: ShardInfo, samples: int) -> None:
    """Compare a shard with what the index says of it.

    Args:
        path: the tar file.
        info: its entry in the index.
        samples: samples found in it.

    Raises:
        ShardError: if size, number of samples or SHA-256 differ.
    """
    size = path.stat().st_size
    if size != info.bytes:
        raise ShardError(f"shard {path} has {size} bytes, its index says {info.bytes}; write or copy it again")
    if samples != info.samples:
        raise ShardError(f"shard {path} holds {samples} samples, its index says {info.samples}; write or copy it again")
    if file_sha256(path) != info.sha256:
        raise ShardError(f"shard {path} differs from its index in SHA-256: it was damaged or changed; copy it again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; a progress bar shows when it takes longer than two seconds.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"hashing {path.name}", delay=2, leave=False)
    with path.open("rb") as file, bar:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _shard_info(entry: Mapping[str, Any]) -> ShardInfo:
    info = ShardInfo(**entry)
    if not isinstance(info.name, str) or not _SHARD_NAME.fullmatch(info.name):
        raise ValueError(f"{info.name!r} is not a plain file name ending in .tar")
    for name in ("samples", "bytes"):
        value = getattr(info, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} of {info.name} must be a positive integer, got {value!r}")
    if not isinstance(info.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", info.sha256):
        raise ValueError(f"sha256 of {info.name} must be 64 hexadecimal digits, got {info.sha256!r}")
    return info


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
