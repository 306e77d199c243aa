"""CHAIR on images of COCO."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from realign_lightning.evaluation.base import Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.benchmarks.files import given, image_path, read_object, read_rows, target_of
from realign_lightning.metrics.functional.captions import CaptionParser, ChairNormalizer
from realign_lightning.metrics.functional.chair import _chair_compute, chair_captions, chair_counts, highlight
from realign_lightning.metrics.functional.coco import CocoObjects, image_number
from realign_lightning.metrics.lexicon import Lexicon


class ChairBenchmark(MarkedBenchmark):
    """CHAIR (Rohrbach et al. 2018, arXiv 1809.02156): what captions of COCO images name that is not there.

    Ground truth is what the references take: annotated instances, and what the reference captions mention.

    Args:
        folder: COCO's ``annotations``, with ``instances_val2014.json`` and ``captions_val2014.json``; None where
            captions are scored whose file holds the objects.
        split: of the annotations.
        images: folder of the images, such as ``val2014``; None where only captions are scored.
        image_ids: file that lists the images to caption: a JSON list of ids, or JSON lines with ``image_id`` or
            ``image``, such as the captions that another paper released; None draws ``size`` of them.
        size: images that are drawn; papers take 500.
        seed: of the drawing.
        prompt: what is asked.
        normalizer: how words are normalised, see :class:`~realign_lightning.metrics.CHAIR`.
        synonyms: path of the official list of names; None is our own.
        coco_rules: whether ``synonyms`` is a list for COCO, see :meth:`Lexicon.from_file`; False for other objects.
        max_new_tokens: longest caption. It decides much: papers take 64 or 512.

    Raises:
        ValueError: for an unknown normaliser, or a size below 1.
    """

    name = "chair"
    headline = (
        Score("chair_s", "CHAIRs", higher_is_better=False),
        Score("chair_i", "CHAIRi", higher_is_better=False),
        Score("recall", "recall"),
        Score("mean_length", "words per caption", scale=1.0, higher_is_better=None),
    )

    def __init__(
        self,
        folder: str | Path | None = None,
        images: str | Path | None = None,
        split: str = "val2014",
        image_ids: str | Path | None = None,
        size: int = 500,
        seed: int = 0,
        prompt: str = "Please describe this image in detail.",
        normalizer: ChairNormalizer = "original",
        synonyms: str | None = None,
        coco_rules: bool = True,
        max_new_tokens: int = 512,
    ) -> None:
        if size < 1:
            raise ValueError(f"Expected `size` to be at least 1, got {size}.")
        self.folder = None if folder is None else Path(folder)
        self.images = None if images is None else Path(images)
        self.split = split
        self.image_ids = None if image_ids is None else Path(image_ids)
        self.size = size
        self.seed = seed
        self.prompt = prompt
        self.normalizer: ChairNormalizer = normalizer
        self.synonyms = synonyms
        self.coco_rules = coco_rules
        self.max_new_tokens = max_new_tokens

    @cached_property
    def _parser(self) -> CaptionParser:
        lexicon = None if self.synonyms is None else Lexicon.from_file(self.synonyms, self.coco_rules)
        return CaptionParser(lexicon, self.normalizer)

    def _annotations(self, kind: str) -> Path:
        path = given(self.folder, "folder") / f"{kind}_{self.split}.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: `folder` is COCO's folder `annotations`, with instances_{self.split}.json and "
                f"captions_{self.split}.json."
            )
        return path

    def questions(self) -> list[Question]:
        """One question per image.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: naming what is wrong with which file; for wanted images that are not annotated; for fewer
                annotated images than ``size``.
        """
        return self._questions

    @cached_property
    def _questions(self) -> list[Question]:
        names = self._file_names()
        wanted = self._listed() if self.image_ids is not None else self._drawn(sorted(names))
        if unknown := [image for image in wanted if image not in names]:
            raise ValueError(f"{self.image_ids} lists images that are not in {self.folder}: {unknown[:5]}.")
        captions = self._annotations("captions")
        objects = CocoObjects.from_annotations(
            self._annotations("instances"), captions, self._parser.lexicon, self.normalizer, wanted
        )
        place = self.images or Path()
        return [
            Question(
                self.prompt,
                image_path(place, names[image], f"image {image}"),
                str(image),
                {"image_id": image, "objects": sorted(objects[image])},
                str(image),
            )
            for image in wanted
        ]

    def _file_names(self) -> dict[int, str]:
        """File name of every annotated image by its id."""
        names: dict[int, str] = {}
        for image in read_object(self._annotations("instances")).get("images", []):
            names[int(image["id"])] = str(image["file_name"])
        return names

    def _drawn(self, images: Sequence[int]) -> list[int]:
        if len(images) < self.size:
            raise ValueError(f"Expected `size` to be at most the {len(images)} annotated images, got {self.size}.")
        return sorted(random.Random(self.seed).sample(images, self.size))

    def _listed(self) -> list[int]:
        """Ids of a file, in its order, each once."""
        path = self.image_ids
        assert path is not None  # noqa: S101 - asked by the caller
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        if text is None:
            raise FileNotFoundError(f"Expected `image_ids` to be a file that lists images, got {path}.")
        if re.fullmatch(r"[\s\[\]\d,]*", text):
            return list(dict.fromkeys(int(number) for number in re.findall(r"\d+", text)))
        rows = read_rows(path, {})
        return list(dict.fromkeys(_image_id(path, number, row) for number, row in enumerate(rows, 1)))

    @property
    def has_files(self) -> bool:
        """Whether the annotations were named."""
        return self.folder is not None

    @property
    def settings(self) -> dict[str, Any]:
        """Normaliser, and what tells the list of names from others."""
        return {"normalizer": self.normalizer, "lexicon": self._parser.lexicon.fingerprint()}

    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Mark]:
        """One mark per caption; targets are ``{"objects": [categories]}``."""
        targets = [target_of(question.target, question.key, ("objects",)) for question in questions]
        objects = [set(target["objects"]) for target in targets]
        counts = chair_counts(answers, objects, self._parser).tolist()
        checks = chair_captions(answers, objects, self._parser)
        return [
            Mark(
                tuple(row),
                not check.hallucinated,
                float(len(check.hallucinated)),
                {
                    "hallucinated": [mention.word for mention in check.hallucinated],
                    "marked": highlight(answer, check),
                },
            )
            for row, check, answer in zip(counts, checks, answers, strict=True)
        ]

    @staticmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """CHAIR's scores."""
        del settings
        return _chair_compute(counts)


def _image_id(path: Path, number: int, row: Mapping[str, Any]) -> int:
    value = row.get("image_id", row.get("image"))
    found = None if value is None else image_number(str(value))
    if found is None:
        raise ValueError(f"{path}, row {number}: expected an image_id, or an image whose name ends in one, got {row}.")
    return found
