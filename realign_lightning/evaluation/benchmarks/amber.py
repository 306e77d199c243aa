"""AMBER from its official files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from realign_lightning.evaluation.base import Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.benchmarks.files import given, image_path, read_object, read_rows, target_of
from realign_lightning.metrics.functional.amber import (
    _DESCRIPTION_WIDTH,
    AmberChecker,
    _amber_compute,
    _amber_discriminative_compute,
    _amber_generative_compute,
    amber_counts,
    amber_responses,
    exact_similarity,
    spacy_similarity,
)

AmberPart = Literal["all", "generative", "discriminative"]
AmberSimilarity = Literal["spacy", "exact"]
AmberReading = Literal["exact", "first_word"]
_GENERATIVE = "generative"


class AmberBenchmark(MarkedBenchmark):
    """AMBER (Wang et al. 2023, arXiv 2311.07397): descriptions and yes-or-no questions about 1004 images.

    Args:
        folder: ``data`` of junyangwang0410/AMBER, with ``query/``, ``annotations.json``, ``relation.json`` and
            ``safe_words.txt``; None where answers to yes-or-no questions are scored whose file holds the truth.
        images: folder of ``AMBER_1.jpg`` and the others; None where only answers are scored.
        part: which questions.
        similarity: how near-synonyms of objects are found: ``spacy`` by the word vectors that published numbers use
            (needs spacy and its model ``en_core_web_lg``); ``exact`` knows none, and finds more hallucinations.
        instruction: added to yes-or-no questions on a line of their own.
        reading: the reference counts exactly "Yes" and "No"; ``first_word`` reads "Yes, there is." as "Yes".
        max_new_tokens: longest answer.

    Raises:
        ValueError: for an unknown part, similarity or reading.
    """

    name = "amber"
    headline = (
        Score("amber", "AMBER score"),
        Score("chair", "CHAIR", higher_is_better=False),
        Score("cover", "Cover"),
        Score("hal", "Hal", higher_is_better=False),
        Score("cog", "Cog", higher_is_better=False),
        Score("accuracy", "accuracy"),
        Score("precision", "precision"),
        Score("recall", "recall"),
        Score("f1", "F1"),
    )

    def __init__(
        self,
        folder: str | Path | None = None,
        images: str | Path | None = None,
        part: AmberPart = "all",
        similarity: AmberSimilarity = "spacy",
        instruction: str = "Please answer yes or no.",
        reading: AmberReading = "exact",
        max_new_tokens: int = 512,
    ) -> None:
        for name, value, kinds in (
            ("part", part, AmberPart),
            ("similarity", similarity, AmberSimilarity),
            ("reading", reading, AmberReading),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"Expected `{name}` to be one of {get_args(kinds)}, got {value!r}.")
        self.folder = None if folder is None else Path(folder)
        self.images = None if images is None else Path(images)
        self.part = part
        self.similarity = similarity
        self.instruction = instruction
        self.reading = reading
        self.max_new_tokens = max_new_tokens

    @cached_property
    def _checker(self) -> AmberChecker:
        if self.folder is None or self.part == "discriminative":
            # Enough for yes-or-no questions; descriptions name objects, which are refused without a vocabulary.
            return AmberChecker({}, similarity=exact_similarity, nouns=str.split)
        words = self.folder / "safe_words.txt"
        if not words.is_file():
            raise FileNotFoundError(f"{words} does not exist: `folder` is `data` of AMBER's repository.")
        relation = read_object(self.folder / "relation.json")
        safe = [line.strip() for line in words.read_text(encoding="utf-8").splitlines() if line.strip()]
        similarity: Callable[[str, str], float] = exact_similarity
        if self.similarity == "spacy":
            similarity = spacy_similarity()
        return AmberChecker(relation, safe, similarity=similarity)

    def questions(self) -> list[Question]:
        """Descriptions first, then questions.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: naming what is wrong with which file and row.
        """
        folder = given(self.folder, "folder")
        path = folder / "query" / f"query_{self.part}.json"
        asked = read_rows(path, {"id": int, "image": str, "query": str})
        rows = read_rows(folder / "annotations.json", {"id": int, "type": str})
        annotations = {row["id"]: row for row in rows}
        questions = []
        for number, row in enumerate(asked, 1):
            if row["id"] not in annotations:
                raise ValueError(f"{path}, row {number}: id {row['id']} is not in annotations.json.")
            questions.append(self._question(row, annotations[row["id"]], f"{path}, row {number}"))
        return questions

    def _question(self, row: Mapping[str, Any], annotation: Mapping[str, Any], where: str) -> Question:
        asks = annotation["type"] != _GENERATIVE
        prompt = f"{row['query']}\n{self.instruction}" if asks and self.instruction else row["query"]
        image = image_path(self.images or Path(), row["image"], where)
        target = {name: value for name, value in annotation.items() if name != "id"}
        return Question(prompt, image, str(row["id"]), target, row["image"], row["query"])

    @property
    def has_files(self) -> bool:
        """Whether the official files were named."""
        return self.folder is not None

    @property
    def settings(self) -> dict[str, Any]:
        """Part, similarity, and how answers are read."""
        return {"part": self.part, "similarity": self.similarity, "reading": self.reading}

    def prepare(self, folder: Path) -> None:
        """Read the lists of words, and load what finds nouns and near-synonyms, where there are descriptions."""
        if self.part != "discriminative":
            _ = self._checker

    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Mark]:
        """One mark per answer; targets are the rows of ``annotations.json``."""
        targets = [target_of(question.target, question.key, ("type", "truth")) for question in questions]
        texts = [self._read(answer, target) for answer, target in zip(answers, targets, strict=True)]
        counts = amber_counts(texts, targets, self._checker).tolist()
        return [
            self._described(row, text, target) if target["type"] == _GENERATIVE else _answered(row, text, target)
            for row, text, target in zip(counts, texts, targets, strict=True)
        ]

    def _read(self, answer: str, target: Mapping[str, Any]) -> str:
        if self.reading == "exact" or target["type"] == _GENERATIVE:
            return answer
        first = answer.strip().partition(" ")[0].strip(".,;:!").capitalize()
        return first if first in ("Yes", "No") else answer

    def _described(self, row: Sequence[int], text: str, target: Mapping[str, Any]) -> Mark:
        (check,) = amber_responses([text], [target], self._checker)
        wrong = list(check.hallucinated)
        return Mark(tuple(row), not wrong, float(len(wrong)), {"hallucinated": wrong, "covered": list(check.covered)})

    @staticmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of the parts that were asked."""
        del settings
        described, answered = counts[..., :_DESCRIPTION_WIDTH], counts[..., _DESCRIPTION_WIDTH:]
        if not answered.any():
            return _amber_generative_compute(described)
        if not described.any():
            return _amber_discriminative_compute(answered)
        return _amber_compute(counts)


def _answered(row: Sequence[int], text: str, target: Mapping[str, Any]) -> Mark:
    right = text == str(target["truth"]).capitalize()
    return Mark(tuple(row), right, float(not right), {"type": target["type"]})
