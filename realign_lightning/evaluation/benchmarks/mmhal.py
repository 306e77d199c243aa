"""MMHal-Bench from its official file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from realign_lightning.evaluation.base import Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.benchmarks.files import Kind, given, image_path, read_rows, target_of, template_hash
from realign_lightning.evaluation.judge import Judge
from realign_lightning.metrics.functional.mmhal import (
    BAD_BELOW,
    MMHAL_TYPES,
    RATINGS,
    _mmhal_compute,
    mmhal_counts,
    mmhal_judge_prompt,
    mmhal_rating,
)


class MMHalBenchmark(MarkedBenchmark):
    """MMHal-Bench (Sun et al. 2023, arXiv 2309.14525): 96 questions whose answers a judge rates from 0 to 6.

    Args:
        file: ``response_template.json`` of Shengcao1006/MMHal-Bench; None where answers
            are scored whose file holds the rest.
        judge: rates the answers.
        images: folder of the images, which have the names in the file's links or their ``image_id``; None where only
            answers are scored.
        judge_template: file with the judge's prompt; None is our own wording. Published numbers use the authors'.
        max_new_tokens: longest answer.

    Raises:
        ValueError: without a judge.
    """

    name = "mmhal"
    headline = (
        Score("average_score", "score (0 to 6)", scale=1.0),
        Score("hallucination_rate", "hallucination rate", higher_is_better=False),
        Score("informativeness", "informativeness"),
        Score("unparsed", "unparsed", higher_is_better=None),
    )

    def __init__(
        self,
        file: str | Path | None = None,
        judge: Judge | None = None,
        images: str | Path | None = None,
        judge_template: str | Path | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        if judge is None:
            raise ValueError(
                "Expected `judge`: MMHal-Bench's answers are rated by a model. Give one, for example an EndpointEngine "
                "for an OpenAI-compatible endpoint."
            )
        self.file = None if file is None else Path(file)
        self.judge: Judge = judge
        self.images = None if images is None else Path(images)
        self.judge_template = None if judge_template is None else Path(judge_template)
        self.max_new_tokens = max_new_tokens

    def questions(self) -> list[Question]:
        """The questions in the file's order, which decides their type.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: naming the row of what is no question.
        """
        fields: dict[str, Kind] = {"question": str, "gt_answer": str, "image_src": str, "image_content": list}
        rows = read_rows(given(self.file, "file"), fields)
        return [self._question(number, row) for number, row in enumerate(rows)]

    def _question(self, number: int, row: Mapping[str, Any]) -> Question:
        name = PurePosixPath(row["image_src"]).name
        target = {
            "type": MMHAL_TYPES[number % len(MMHAL_TYPES)],
            "question": row["question"],
            "reference": row["gt_answer"],
            "image_content": [str(content) for content in row["image_content"]],
        }
        return Question(row["question"], self._image(name, row, number), str(number), target, name)

    def _image(self, name: str, row: Mapping[str, Any], number: int) -> Path:
        folder = self.images or Path()
        named = [image_path(folder, name, f"{self.file}, row {number + 1}")]
        if isinstance(identity := row.get("image_id"), str):
            named += [
                image_path(folder, f"{identity}.{end}", f"{self.file}, row {number + 1}") for end in ("jpg", "png")
            ]
        return next((path for path in named if path.is_file()), named[0])

    @property
    def has_files(self) -> bool:
        """Whether the official file was named."""
        return self.file is not None

    @property
    def settings(self) -> dict[str, Any]:
        """Who judged, and whether with words of the user's own."""
        return {"judge": dict(self.judge.engine.identity), "template": template_hash(self.judge_template)}

    def prepare(self, folder: Path) -> None:
        """Check the judge's prompt, and tell the judge where its replies are kept."""
        template_hash(self.judge_template)
        self.judge.prepare(folder)

    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Mark | None]:
        """One mark per answer; targets have ``type``, ``question``, ``reference`` and ``image_content``."""
        fields = ("type", "question", "reference", "image_content")
        targets = [target_of(question.target, question.key, fields) for question in questions]
        prompts = [
            mmhal_judge_prompt(
                target["question"], target["image_content"], target["reference"], answer, self.judge_template
            )
            for target, answer in zip(targets, answers, strict=True)
        ]
        replies = self.judge.ask(prompts)
        return [
            None if reply is None else _mark(reply, target["type"])
            for reply, target in zip(replies, targets, strict=True)
        ]

    @staticmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """MMHal's scores."""
        del settings
        return _mmhal_compute(counts)


def _mark(reply: str, kind: str) -> Mark:
    """A mark by a judge's reply; one without a rating counts as 0, as the official script has it, and as unparsed."""
    rating = mmhal_rating(reply)
    right = None if rating is None else rating >= BAD_BELOW
    (counts,) = mmhal_counts([reply], [kind]).tolist()
    return Mark(tuple(counts), right, float(max(RATINGS) - (rating or 0)), {"rating": rating, "judge": reply})
