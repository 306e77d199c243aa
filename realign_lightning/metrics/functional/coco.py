"""Which objects are in which image of COCO, as CHAIR defines it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.metrics.functional.captions import CaptionParser, ChairNormalizer
from realign_lightning.metrics.lexicon import Lexicon

Paths = str | Path | Sequence[str | Path]
_NUMBER_IN_NAME = re.compile(r"(\d+)(?:\.\w+)?$")


def image_number(image: int | str) -> int | None:
    """COCO's number of an image.

    Args:
        image: the number, as text or number, or the name of a file that ends in it.

    Returns:
        The number; None where the name has none.

    >>> image_number("COCO_val2014_000000000042.jpg"), image_number(" 42 "), image_number(42), image_number("cat.jpg")
    (42, 42, 42, None)
    """
    if isinstance(image, int):
        return image
    found = _NUMBER_IN_NAME.search(image.strip())
    return None if found is None else int(found[1])


class CocoObjects(Mapping[int, frozenset[str]]):
    """The objects of each image: categories of the annotated instances, and what the reference captions mention.

    CHAIR reads captions and reference captions with the same parser, so an index belongs to a normaliser and a list of
    names; :class:`~realign_lightning.metrics.CHAIR` refuses another one's. Building it reads every reference caption
    of a split (200,000 in val2014), so save it.

    An image is looked up by its number, as text or number, or by its file name:
    ``objects[391895]``, ``objects["COCO_val2014_000000391895.jpg"]``. An unknown image is a KeyError, where the
    references take it for an empty one, in which all is hallucinated.

    Args:
        objects: categories of each image.
        normalizer: the normaliser that read the captions.
        fingerprint: of the lexicon that read them (:meth:`Lexicon.fingerprint`).
    """

    def __init__(
        self, objects: Mapping[int, Iterable[str]], normalizer: ChairNormalizer = "original", fingerprint: str = ""
    ) -> None:
        self.normalizer = normalizer
        self.fingerprint = fingerprint
        self._objects = {image: frozenset(categories) for image, categories in objects.items()}

    @classmethod
    def from_annotations(
        cls,
        instances: Paths,
        captions: Paths,
        synonyms: Lexicon | str | Path | None = None,
        normalizer: ChairNormalizer = "original",
        image_ids: Iterable[int | str] | None = None,
    ) -> CocoObjects:
        """Build the index from COCO's annotations, as CHAIR's references do.

        Args:
            instances: ``instances_val2014.json``, or several such files. The references join train and val.
            captions: ``captions_val2014.json``, or several, of the same images.
            synonyms: the names of the objects, or None for our list of the 80 COCO categories.
            normalizer: how the words of captions are normalised.
            image_ids: the images that are wanted, which saves time; None takes all.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is not such a file, an image is in one kind of file alone or has no caption, a wanted
                image is in none, or the lexicon does not list a category.
        """
        parser = CaptionParser(synonyms, normalizer)
        instance_files = [_Annotations(path, "category_id") for path in _listed(instances)]
        caption_files = [_Annotations(path, "caption") for path in _listed(captions)]
        images = _images(instance_files, caption_files)
        if image_ids is not None:
            images = _wanted(images, image_ids)
        objects: dict[int, set[str]] = {image: set() for image in images}
        uncaptioned = set(images)
        for file in instance_files:
            categories = file.categories(parser.lexicon)
            for image, category in file.rows():
                if image in objects:
                    objects[image].add(file.look_up(categories, category))
        for file in caption_files:
            for image, caption in file.rows():
                if image in objects:
                    if not isinstance(caption, str):
                        raise ValueError(f"{file.path}: expected texts as captions, got {caption!r} for image {image}.")
                    objects[image] |= parser.categories(caption)
                    uncaptioned.discard(image)
        if uncaptioned:
            raise ValueError(f"Expected `captions` to describe every image, got none for {_some(uncaptioned)}.")
        return cls(objects, normalizer, parser.lexicon.fingerprint())

    def check_parser(self, parser: CaptionParser) -> None:
        """Refuse a parser other than the one that read the reference captions.

        Args:
            parser: the one that is going to read captions.

        Raises:
            ValueError: if its normaliser or its lexicon is another.
        """
        if self.normalizer != parser.normalizer:
            raise ValueError(
                f"Expected `ground_truth` of the normalizer {parser.normalizer!r}, got that of {self.normalizer!r}: "
                "build it with the same one."
            )
        if self.fingerprint != parser.lexicon.fingerprint():
            raise ValueError("Expected `ground_truth` of the same `synonyms`, got that of others: build it with these.")

    def save(self, path: str | Path) -> None:
        """Write the index as JSON.

        Args:
            path: the file.
        """
        objects = {image: sorted(self._objects[image]) for image in sorted(self._objects)}
        content = {"normalizer": self.normalizer, "fingerprint": self.fingerprint, "objects": objects}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CocoObjects:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not such a file.
        """
        content = _read_json(path)
        if not isinstance(content, dict) or set(content) != {"normalizer", "fingerprint", "objects"}:
            raise ValueError(f"{path}: expected what `CocoObjects.save` writes, got {_shape(content)}.")
        if not isinstance(content["objects"], dict):
            raise ValueError(f"{path}: expected the 'objects' of each image, got {_shape(content['objects'])}.")
        objects = {int(image): categories for image, categories in content["objects"].items()}
        return cls(objects, content["normalizer"], content["fingerprint"])

    def __getitem__(self, image: int | str) -> frozenset[str]:
        return self._objects[_number(image)]

    def __contains__(self, image: object) -> bool:
        return isinstance(image, int | str) and _number(image) in self._objects

    def __iter__(self) -> Iterator[int]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images, normalizer={self.normalizer!r})"


def _number(image: int | str) -> int:
    """Number of an image; -1 where its name has none, which is no image's."""
    number = image_number(image)
    return -1 if number is None else number


class _Annotations:
    """One file of COCO: its images, and one value of each annotation."""

    def __init__(self, path: str | Path, field: str) -> None:
        self.path = path
        self.field = field
        content = _read_json(path)
        lists = ("images", "annotations", "categories") if field == "category_id" else ("images", "annotations")
        if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
            raise ValueError(f"{path}: expected COCO annotations with the lists {lists}, got {_shape(content)}.")
        self._content = content
        self.images = {row["id"] for row in self._fields("images", "id")}

    def _fields(self, name: str, *fields: str) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(self._content[name]):
            if not isinstance(row, dict) or not all(field in row for field in fields):
                raise ValueError(f"{self.path}: expected {fields} in entry {i} of {name!r}, got {_shape(row)}.")
            yield row

    def rows(self) -> Iterator[tuple[int, Any]]:
        for row in self._fields("annotations", "image_id", self.field):
            yield row["image_id"], row[self.field]

    def categories(self, lexicon: Lexicon) -> dict[int, str]:
        """Category in the lexicon of each number."""
        named = {row["id"]: row["name"] for row in self._fields("categories", "id", "name")}
        if unknown := sorted(name for name in named.values() if name not in lexicon.synonyms):
            raise ValueError(f"{self.path}: the lexicon does not list {unknown}; give `synonyms` that list them.")
        return {number: lexicon.category(name) for number, name in named.items()}

    def look_up(self, categories: Mapping[int, str], number: int) -> str:
        if number not in categories:
            raise ValueError(f"{self.path}: an annotation has the category {number}, which 'categories' does not list.")
        return categories[number]


def _images(instances: Sequence[_Annotations], captions: Sequence[_Annotations]) -> set[int]:
    """The images of all files, which must be the same in both kinds."""
    annotated = {image for file in instances for image in file.images}
    captioned = {image for file in captions for image in file.images}
    if annotated != captioned:
        raise ValueError(
            f"Expected `instances` and `captions` of the same images, but {_some(annotated ^ captioned)} are in one of "
            "them alone: give the files of the same splits."
        )
    return annotated


def _wanted(images: set[int], image_ids: Iterable[int | str]) -> set[int]:
    wanted = {_number(image) for image in image_ids}
    if missing := wanted - images:
        raise ValueError(f"Expected `image_ids` of the annotated images, got {_some(missing)}, which are not there.")
    return wanted


def _listed(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error}).") from error


def _shape(content: Any) -> str:
    """What stands where something else was expected, in few words."""
    return f"a dict with {sorted(content)[:10]}" if isinstance(content, dict) else type(content).__name__


def _some(images: Iterable[int]) -> str:
    ordered = sorted(images)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return f"{ordered[:5]}{more}"
