"""What a benchmark is: questions about images, and a way to mark the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from realign_lightning.types import Prompt


class Question(NamedTuple):
    """What a benchmark asks.

    Args:
        prompt: text or chat messages.
        image: the image it is about, or the file that it lies in; None for a question about text alone.
        key: name of the question, unique in its benchmark; empty is its place.
        target: what answers are marked against, in plain JSON values.
        group: questions that are not independent of each other, such as all about one image, share it; empty is the
            question alone.
        text: what is asked, without instructions on the form of the answer; empty is the text of the prompt.
    """

    prompt: Prompt
    image: Image.Image | Path | None
    key: str = ""
    target: Any = None
    group: str = ""
    text: str = ""


class Mark(NamedTuple):
    """What became of one answer.

    Args:
        counts: what scores are computed from: they are summed over questions, see :meth:`MarkedBenchmark.compute`.
        correct: whether the answer is right, or free of hallucination; None where it was not judged.
        badness: how wrong it is, to list the worst first: hallucinated objects, points lost.
        notes: what is worth showing, in plain JSON values, for example which words were hallucinated.
    """

    counts: tuple[int, ...]
    correct: bool | None
    badness: float = 0.0
    notes: Mapping[str, Any] = {}


class Benchmark(ABC):
    """Questions about images and a way to score the answers. Subclass it to bring your own.

    Attributes:
        max_new_tokens: longest answer.
    """

    max_new_tokens: int = 64

    def prepare(self, folder: Path) -> None:  # noqa: B027 - most benchmarks have nothing to prepare
        """Make ready what marking needs, so that what is missing shows before anything is asked.

        Args:
            folder: for work that must not be paid twice, such as a judge's replies.
        """

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """What to ask; always the same, in the same order."""

    @abstractmethod
    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Named scores of the answers to all questions.

        Args:
            answers: one per question, in order.
        """


@dataclass(frozen=True)
class Score:
    """How to show a score.

    Args:
        name: key in what :meth:`MarkedBenchmark.compute` returns.
        title: for tables.
        scale: what it is multiplied with to be shown; 100 for shares.
        higher_is_better: None where neither is.
    """

    name: str
    title: str
    scale: float = 100.0
    higher_is_better: bool | None = True


class MarkedBenchmark(Benchmark):
    """A benchmark whose scores are computed from sums of counts, one row of counts per answer.

    So the scores of any sample of questions, ten thousand of them for a bootstrap, are one call of :meth:`compute`.

    Attributes:
        name: of the benchmark on the command line.
        headline: the scores that tables and comparisons show, the most important first.
        marks_groups: whether an answer's counts depend on the other answers of its group. Where one of them is missing,
            the whole group is left out.
    """

    name: ClassVar[str]
    headline: ClassVar[tuple[Score, ...]]
    marks_groups: ClassVar[bool] = False

    @property
    def has_files(self) -> bool:
        """Whether :meth:`questions` can be read; without, only answers can be scored that bring their targets."""
        return True

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What marks and scores depend on beside questions and answers, in plain JSON values: parser, lexicon."""

    @abstractmethod
    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> Sequence[Mark | None]:
        """One mark per answer; None where a judge was silent.

        Args:
            questions: of this benchmark, or with targets in its form.
            answers: one per question, in order.

        Raises:
            ValueError: naming the first question whose target has not the benchmark's form.
        """

    @staticmethod
    @abstractmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of summed counts.

        Args:
            counts: (..., K), sums of :attr:`Mark.counts`.
            settings: of the benchmark that marked.

        Returns:
            Tensors of shape (...).
        """

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """The headline's scores of the answers to all questions, as they are shown: shares in percent.

        Args:
            answers: one per question, in order.

        Returns:
            Scores by the benchmark's name and their title.
        """
        marks = [mark for mark in self.mark(self.questions(), answers) if mark is not None]
        scores = self.score_marks(marks)
        shown = [score for score in self.headline if score.name in scores]
        return {f"{self.name} {score.title}": scores[score.name] * score.scale for score in shown}

    def score_marks(self, marks: Sequence[Mark]) -> dict[str, float]:
        """All scores of marked answers, as they are computed: shares between 0 and 1.

        Args:
            marks: at least one.
        """
        counts = torch.tensor([mark.counts for mark in marks]).sum(dim=0)
        return {name: value.item() for name, value in self.compute(counts, self.settings).items()}


@dataclass
class Answered:
    """One line of ``answers.jsonl``: a question, its answer and what became of it.

    Args:
        key: of the question.
        question: its text.
        answer: as generated; None where there is none.
        group: of the question.
        image: name of the image's file; empty where there is none.
        target: what the answer was marked against.
        counts: of the mark.
        correct: of the mark.
        badness: of the mark.
        notes: of the mark.
        error: why it does not count in the scores: no answer, or no verdict.
    """

    key: str
    question: str
    answer: str | None
    group: str = ""
    image: str = ""
    target: Any = None
    counts: list[int] = field(default_factory=list)
    correct: bool | None = None
    badness: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
