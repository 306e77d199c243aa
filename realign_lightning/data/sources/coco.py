"""COCO captions (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.base import Source, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import read_prompt
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.rows import json_array
from realign_lightning.data.sources.table import Keys, checked
from realign_lightning.types import SampleError

CAPTION = "Describe the image in one sentence."
"""What is asked of a caption."""


class CocoCaptions(Source):
    """COCO captions: every caption is an answer. Its annotation's id is the key.

    The file is read item by item, twice: images, then captions. With instances, a record knows the objects of its
    image.

    Args:
        path: a captions JSON, such as ``annotations/captions_train2017.json``.
        images: folder of the images; None is the folder of the file.
        instances: the instances JSON of the same images; gives the objects. None knows none.
        prompt: what is asked.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        instances: str | Path | None = None,
        prompt: str = CAPTION,
    ) -> None:
        self.path = path
        self.images = images
        self.instances = instances
        self.prompt = prompt

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Every caption in order; see :meth:`Source.read`."""
        path = Path(self.path)
        finder = ImageFinder(path.parent if self.images is None else Path(self.images))
        files = _files_by_image(path)
        objects = None if self.instances is None else _objects_by_image(Path(self.instances))
        prompt = read_prompt(self.prompt, "prompt")
        keys = Keys()
        for number, text in enumerate(json_array(path, "annotations"), 1):
            where = f"{path.name}, annotation {number}"
            try:
                caption = _parse(text)
                image_id = caption.get("image_id")
                if image_id not in files:
                    raise SampleError(f"there is no image with the id {image_id!r}")
                if len(files[image_id]) > 1:
                    raise SampleError(f"several images have the id {image_id!r}: {files[image_id][:2]}")
                image = finder.find(files[image_id][0], "file_name")
                answer = caption.get("caption")
                if not isinstance(answer, str):
                    raise SampleError("the annotation has no caption; is this a captions file?")
                record = checked(
                    SourceRecord(
                        "",
                        image,
                        prompt,
                        answer,
                        objects=None if objects is None else objects.get(image_id),
                        facts={"source": {"image_id": image_id}},
                    )
                )
                key = keys.take(caption.get("id"))
            except SampleError as error:
                yield SourceProblem(where, str(error))
                continue
            yield dataclasses.replace(record, key=key)


def _parse(text: bytes) -> Mapping[str, Any]:
    try:
        item = load_json(text)
    except ValueError as error:
        raise SampleError(f"the JSON cannot be read: {error}") from error
    if not isinstance(item, Mapping) or not isinstance(item.get("image_id", 0), int | str):
        raise SampleError("expected an annotation with image_id, id and caption")
    return item


def _objects(path: Path, name: str, id_field: str = "id") -> Iterator[Mapping[str, Any]]:
    """Items of an array of objects with an id; what is none is left out, and missed where it is asked for."""
    for text in json_array(path, name):
        try:
            item = load_json(text)
        except ValueError:
            continue
        if isinstance(item, Mapping) and isinstance(item.get(id_field), int | str):
            yield item


def _files_by_image(path: Path) -> dict[Any, list[Any]]:
    """Names of the files of every image; more than one where an id was given twice."""
    files: dict[Any, list[Any]] = {}
    for item in _objects(path, "images"):
        if item.get("file_name") not in (names := files.setdefault(item["id"], [])):
            names.append(item.get("file_name"))
    return files


def _objects_by_image(path: Path) -> dict[Any, tuple[str, ...]]:
    """Names of the categories of every image, in order of the alphabet; empty for an image without any."""
    names = {item["id"]: str(item.get("name")) for item in _objects(path, "categories")}
    found: dict[Any, set[str]] = {item["id"]: set() for item in _objects(path, "images")}
    for item in _objects(path, "annotations", "image_id"):
        if item.get("category_id") in names:
            found.setdefault(item["image_id"], set()).add(names[item["category_id"]])
    return {image: tuple(sorted(objects)) for image, objects in found.items()}
