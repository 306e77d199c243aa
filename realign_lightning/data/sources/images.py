"""Images that rows name or hold, as files within one folder; nothing is opened here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from realign_lightning.data.sources.base import ImageFile
from realign_lightning.types import SampleError


class ImageFinder:
    """Finds the images of rows.

    Args:
        folder: what paths are relative to; none may lead out of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, value: Any, name: str) -> ImageFile:
        """The one image of a field.

        Args:
            value: a path, the bytes of a file, ``{"path", "bytes"}`` as Hugging Face datasets store it, or a list of
                one of these.
            name: of the field, for messages.

        Returns:
            The image. Its id is the path within the folder, or the SHA-256 of the bytes.

        Raises:
            SampleError: if there is none, more than one, a URL, or a path that leads out of the folder.
        """
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) != 1:
                raise SampleError(f"{name} holds {len(value)} images; expected one")
            value = value[0]
        if isinstance(value, Mapping):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return ImageFile(content_id(value), data=value)
        if value is None or value == "":
            raise SampleError(f"{name} names no image")
        if not isinstance(value, str):
            raise SampleError(f"{name} must be a path or the bytes of an image, got {type(value).__name__}")
        path = self._relative(value, name)
        return ImageFile(str(path), path=self.folder / path)

    def _relative(self, value: str, name: str) -> PurePosixPath:
        if "://" in value or value.startswith("data:"):
            raise SampleError(f"{name} is a URL; only files are read, download it first")
        path = PurePosixPath(value)
        inside = "\0" not in value and ".." not in path.parts
        if path.is_absolute() and path.is_relative_to(folder := self.folder.absolute().as_posix()):
            path = path.relative_to(folder)
        if not inside or path.is_absolute() or not path.parts:
            raise SampleError(f"{name} leads out of the folder of images: {value[:200]!r}")
        return path


def read_unchanged(image: ImageFile, sha256: str) -> bytes:
    """The bytes of a file that was hashed before.

    Args:
        image: the file.
        sha256: its hash then, hexadecimal.

    Raises:
        SampleError: if it cannot be read, or has changed since.
    """
    data = image.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SampleError("the image file has changed since it was hashed: start again")
    return data


def content_id(data: bytes) -> str:
    """What an image in memory is called: two with one id have the same bytes.

    Args:
        data: the file.

    Returns:
        32 hexadecimal digits, the first half of its SHA-256.
    """
    return hashlib.sha256(data).hexdigest()[:32]
