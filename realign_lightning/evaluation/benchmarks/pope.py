"""POPE from its official question files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from realign_lightning.evaluation.base import Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.benchmarks.files import Kind, given, image_path, read_rows, target_of
from realign_lightning.metrics.functional.pope import (
    COUNTS,
    PopeKind,
    PopeParser,
    _pope_compute_by_category,
    category_memberships,
    check_parser,
    pope_counts,
    pope_verdicts,
)

KINDS: tuple[PopeKind, ...] = get_args(PopeKind)
_NO_KIND = "of no kind"
_COLUMNS = (*KINDS, _NO_KIND)
_SHOWN = (
    ("accuracy", "accuracy", True),
    ("f1", "F1", True),
    ("precision", "precision", True),
    ("recall", "recall", True),
    ("yes_ratio", "yes ratio", None),
    ("unparsed", "unparsed", None),
)


class PopeBenchmark(MarkedBenchmark):
    """POPE (Li et al. 2023, arXiv 2305.10355) on the official questions of AoiDragon/POPE.

    Args:
        folder: with one file per kind, such as ``coco_pope_random.json`` (``output/coco`` of the repository); None
            where answers are scored whose file holds the labels.
        images: folder of the images, such as COCO's ``val2014``; None where only answers are scored.
        kinds: which of random, popular and adversarial; None takes those whose file is there.
        parser: how answers are read, see :class:`~realign_lightning.metrics.POPE`.
        instruction: added to every question on a line of its own. LLaVA and lmms-eval ask for a single word or phrase;
            the paper adds nothing.
        max_new_tokens: longest answer.

    Raises:
        ValueError: for an unknown parser or kind.
    """

    name = "pope"
    headline = (
        *(Score(name, title, higher_is_better=better) for name, title, better in _SHOWN),
        *(
            Score(f"{kind}/{name}", f"{kind}: {title}", higher_is_better=better)
            for kind in KINDS
            for name, title, better in _SHOWN
            if name in ("accuracy", "f1", "yes_ratio")
        ),
    )

    def __init__(
        self,
        folder: str | Path | None = None,
        images: str | Path | None = None,
        kinds: list[PopeKind] | None = None,
        parser: PopeParser = "official",
        instruction: str = "Answer the question using a single word or phrase.",
        max_new_tokens: int = 32,
    ) -> None:
        check_parser(parser)
        self.folder = None if folder is None else Path(folder)
        self.images = None if images is None else Path(images)
        self.kinds = kinds
        self.parser: PopeParser = parser
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    @cached_property
    def _files(self) -> dict[PopeKind, Path]:
        folder = given(self.folder, "folder")
        if not folder.is_dir():
            raise FileNotFoundError(f"Expected `folder` with POPE's question files, got {folder}: no such folder.")
        files: dict[PopeKind, Path] = {}
        for kind in KINDS if self.kinds is None else self.kinds:
            found = sorted(folder.glob(f"*{kind}*.json"))
            if len(found) > 1:
                raise ValueError(f"{folder} has several files for {kind}: {[path.name for path in found]}.")
            if found:
                files[kind] = found[0]
            elif self.kinds is not None:
                raise FileNotFoundError(f"{folder} has no file *{kind}*.json with POPE's questions of that kind.")
        if not files:
            raise FileNotFoundError(f"{folder} has none of POPE's files, such as coco_pope_random.json.")
        return files

    def questions(self) -> list[Question]:
        """The questions of all kinds, one kind after the other.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: naming file and row of what is no question.
        """
        fields: dict[str, Kind] = {"question_id": (int, str), "image": str, "text": str, "label": str}
        return [
            self._question(kind, path, number, row)
            for kind, path in self._files.items()
            for number, row in enumerate(read_rows(path, fields), 1)
        ]

    def _question(self, kind: PopeKind, path: Path, number: int, row: Mapping[str, Any]) -> Question:
        if not row["text"].strip():
            raise ValueError(f"{path}, row {number}: expected a question in 'text', got {row['text']!r}.")
        label = row["label"].strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, row {number}: expected the label yes or no, got {row['label']!r}.")
        prompt = f"{row['text']}\n{self.instruction}" if self.instruction else row["text"]
        place = self.images or Path()
        image = image_path(place, row["image"], f"{path}, row {number}")
        target = {"label": label, "categories": [kind]}
        return Question(prompt, image, f"{kind}/{row['question_id']}", target, row["image"], row["text"])

    @property
    def has_files(self) -> bool:
        """Whether the question files were named."""
        return self.folder is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The parser."""
        return {"parser": self.parser}

    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Mark]:
        """One mark per answer; targets are ``{"label": "yes" or "no", "categories": [kinds]}``."""
        targets = [target_of(question.target, question.key, ("label",)) for question in questions]
        labels = [str(target["label"]) for target in targets]
        counts = pope_counts(answers, labels, self.parser)
        verdicts = pope_verdicts(answers, labels, self.parser)
        kinds = [",".join(target.get("categories") or [_NO_KIND]) for target in targets]
        memberships = category_memberships(kinds, _COLUMNS, len(kinds))
        by_kind = (memberships[:, :, None] * counts[:, None, :]).flatten(1)
        return [
            _mark(row, verdict.name.lower(), label)
            for row, verdict, label in zip(by_kind.tolist(), verdicts, labels, strict=True)
        ]

    @staticmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of all questions, and of the kinds that occur in the counts."""
        by_kind = counts.reshape(*counts.shape[:-1], len(_COLUMNS), len(COUNTS))
        scores = _pope_compute_by_category(by_kind, settings["parser"], _COLUMNS)
        absent = [kind for index, kind in enumerate(_COLUMNS) if kind == _NO_KIND or not by_kind[..., index, :].any()]
        return {name: value for name, value in scores.items() if name.partition("/")[0] not in absent}


def _mark(row: Sequence[int], verdict: str, label: str) -> Mark:
    return Mark(tuple(row), verdict == label, float(verdict != label), {"read as": verdict})
