"""A folder of images, with or without a table of prompts and answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from realign_lightning.data.sources.base import ImageFile, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import answer_text, read_prompt
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.rows import Row, read_rows
from realign_lightning.data.sources.table import RowSource, checked, fit_key, row_facts

DESCRIBE = "Describe the image."
"""What is asked where a source has no prompt of its own."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image files that shards can hold."""

_TABLES = ("metadata.jsonl", "metadata.csv")
_OTHER_IMAGES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".tif", ".tiff")


class ImageFolder(RowSource):
    """A folder of images; a table says what is asked and answered.

    The table is JSON lines, JSON, CSV or Parquet with one row per answer: image, prompt, answer. A row without prompt
    asks ``prompt``, a row without answer has none yet. Without a table every JPEG, PNG and WebP file of the folder and
    its folders is a record that asks ``prompt`` and has no answer, in the order of the paths; its key comes from its
    path, so that more images change no key. Hidden files are passed over, other images are problems.

    Args:
        path: the folder; a ``metadata.jsonl`` or ``metadata.csv`` in it is its table, as Hugging Face's ImageFolder has
            it. Or a table.
        images: folder that the table's image paths are relative to; None is the folder itself, or the table's.
        image_field: field of the table with the image's path.
        prompt_field: field with the prompt, a text or chat turns.
        answer_field: field with the answer.
        prompt: asked where the table says nothing.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        image_field: str = "file_name",
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        prompt: str = DESCRIBE,
        id_field: str = "key",
    ) -> None:
        super().__init__(path, images, id_field)
        self.image_field = image_field
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.prompt = prompt

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Every row of the table, or every image; see :meth:`Source.read`."""
        folder = Path(self.path)
        if folder.is_dir() and self._table(folder) is None:
            return self._read_folder(folder)
        return super().read()

    def rows(self) -> Iterable[Row | SourceProblem]:
        """The rows of the table."""
        folder = Path(self.path)
        return read_rows(self._table(folder) or self.path)

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """One answer about one image."""
        names = (self.image_field, self.prompt_field, self.answer_field, self.id_field)
        image, prompt, answer = (row.fields.get(name) for name in names[:3])
        yield checked(
            SourceRecord(
                key="",
                image=images.find(image, self.image_field),
                prompt=read_prompt(self.prompt if prompt is None else prompt, self.prompt_field),
                chosen=None if answer is None else answer_text(answer, self.answer_field),
                facts=row_facts(row.fields, names),
            )
        )

    @staticmethod
    def _table(folder: Path) -> Path | None:
        return next((folder / name for name in _TABLES if (folder / name).is_file()), None)

    def _finder(self) -> ImageFinder:
        folder = Path(self.path)
        if self.images is None and folder.is_dir():
            return ImageFinder(folder)
        return super()._finder()

    def _read_folder(self, folder: Path) -> Iterator[SourceRecord | SourceProblem]:
        prompt = read_prompt(self.prompt, "prompt")
        for name in _walk(folder):
            ending = Path(name).suffix.lower()
            if ending in IMAGE_ENDINGS:
                yield SourceRecord(fit_key(name), ImageFile(name, path=folder / name), prompt)
            elif ending in _OTHER_IMAGES:
                yield SourceProblem(name, f"the image is {ending[1:].upper()}; expected JPEG, PNG or WebP")


def _walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, folder by folder in order; hidden ones are left out."""
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would be passed over without a word."""
    raise error
