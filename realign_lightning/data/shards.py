"""Write shards and their index, so that a crash leaves nothing that a reader would take for complete.

The shards are WebDataset tars (https://github.com/webdataset/webdataset); stock ``webdataset.WebDataset`` reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import webdataset
from PIL import Image

from realign_lightning.backbones.files import write_text
from realign_lightning.data.manifest import INDEX_NAME, ShardIndex, ShardInfo, measure_shard
from realign_lightning.data.scan import ShardError
from realign_lightning.data.schema import (
    ImageFormat,
    decode_image,
    encode_image,
    encode_members,
    image_extension,
    image_size,
    split_member_name,
    to_rgb,
)
from realign_lightning.types import PreferenceSample


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
        max_side: reduce images whose longer side has more pixels to this many, so that the loader need not do it in
            every epoch; None keeps their size. Of an original that is too large a reduced one is stored, in its format.

    Raises:
        ValueError: if ``samples_per_shard`` or ``max_side`` is below 1 or ``built_with`` is not plain JSON.
        FileExistsError: if the folder already holds shards and ``overwrite`` is False.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from realign_lightning.data import read_index
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
        max_side: int | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        if max_side is not None and max_side < 1:
            raise ValueError(f"max_side must be at least 1, or None, got {max_side}")
        try:
            json.dumps(dict(built_with or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"built_with must hold plain JSON values: {error}") from error
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.image_format = image_format
        self.built_with = dict(built_with or {})
        self.max_side = max_side
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
        sample, image = self._reduced(sample, "image", image)
        sample, retrieved = self._reduced(sample, "retrieved", retrieved)
        members = encode_members(sample, self.image_format, image, retrieved)
        if sample.key in self._keys:
            raise ValueError(f"key {sample.key!r} was already written; keys must be unique within a set of shards")
        self._keys.add(sample.key)
        if self._tar is None:
            self._open_shard()
        parts = {split_member_name(name)[1]: data for name, data in members.items()}
        with self._naming_the_shard():
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
        reduced = {} if self.max_side is None else {"max_side": self.max_side}
        index = ShardIndex(tuple(self._shards), {**self.built_with, **reduced})
        write_text(self.folder / INDEX_NAME, index.to_text())
        return index

    def _reduced(
        self, sample: PreferenceSample, part: str, original: bytes | None
    ) -> tuple[PreferenceSample, bytes | None]:
        """The sample with an image no larger than ``max_side``, and the file to store if there was an original."""
        picture: Image.Image = getattr(sample, part)
        if self.max_side is None:
            return sample, original
        # Beside its file a picture need not be the image: what is stored is the file.
        size = picture.size if original is None else image_size(original)
        if max(size) <= self.max_side:
            return sample, original
        smaller = to_rgb(picture) if original is None else decode_image(original)
        smaller.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        if original is not None:
            return sample, encode_image(smaller, image_extension(original))
        changes: dict[str, Any] = {part: smaller}
        return dataclasses.replace(sample, **changes), None

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
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._samples = 0

    def _finish_shard(self) -> None:
        assert self._file is not None  # noqa: S101 - opened together with the tar
        with self._naming_the_shard():
            self._tar.close()
            _sync(self._file)
            self._file.close()
        self._tar = self._file = None
        info = dataclasses.replace(measure_shard(self._temporary), name=self._shard_name)
        if info.samples != self._samples:
            raise ShardError(
                f"{self._temporary} holds {info.samples} samples after {self._samples} were written; write again"
            )
        self._temporary.replace(self.folder / info.name)
        self._shards.append(info)

    @contextlib.contextmanager
    def _naming_the_shard(self) -> Iterator[None]:
        """Errors of an open file do not say which it is."""
        try:
            yield
        except OSError as error:
            path = self.folder / self._shard_name
            raise OSError(error.errno, f"{error.strerror or error}; {path} was not written") from error

    def abandon(self) -> None:
        """Drop the shard that is being written; those that are finished stay, without an index."""
        if self._file is not None:
            # What made writing fail fails here again, and would hide the first error.
            with contextlib.suppress(OSError):
                self._tar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._tar = self._file = None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
