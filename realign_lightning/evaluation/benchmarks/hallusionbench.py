"""HallusionBench from its official file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from realign_lightning.evaluation.base import Mark, MarkedBenchmark, Question, Score
from realign_lightning.evaluation.benchmarks.files import Kind, given, image_path, read_rows, target_of, template_hash
from realign_lightning.evaluation.judge import Judge
from realign_lightning.metrics.functional.hallusionbench import (
    HallusionCounts,
    HallusionParser,
    HallusionRow,
    HallusionVariant,
    HallusionVerdict,
    _hallusionbench_compute,
    hallusionbench_counts,
    hallusionbench_judge_prompt,
    hallusionbench_same_prompt,
    judge_same,
)

HallusionQuestions = Literal["all", "image"]
_FIELDS = HallusionRow._fields


class HallusionBenchmark(MarkedBenchmark):
    """HallusionBench (Guan et al. 2024, arXiv 2310.14566): questions about figures, some of them edited.

    Args:
        file: ``HallusionBench.json`` of tianyi-lab/HallusionBench; None where answers
            are scored whose file holds the rest.
        images: folder that holds ``hallusion_bench``, or is it; None where only answers are scored.
        variant: whose rules hold, see :class:`~realign_lightning.metrics.HallusionBench`.
        judge: decides whether an answer is right. None reads yes and no by VLMEvalKit's rule, which the official
            leaderboard does not.
        judge_template: file with the judge's prompt; None is our own wording. Published numbers use the authors'.
        diagnose: also ask the judge whether answers agree with those for the original figure, which tells language
            hallucination from visual illusion and costs a second call per question.
        ask: ``all`` questions, or those with an ``image``; None is ``all`` for the official variant and ``image`` for
            the others, which is what they ask.
        instruction: added to every question on a line of its own.
        max_new_tokens: longest answer.

    Raises:
        ValueError: for an unknown variant, or a judge beside another than the official one.
    """

    name = "hallusionbench"
    marks_groups = True
    headline = (
        Score("q_acc", "qAcc"),
        Score("f_acc", "fAcc"),
        Score("easy", "easy"),
        Score("hard", "hard"),
        Score("a_acc", "aAcc"),
        Score("yes_bias_diff", "yes bias: difference", scale=1.0, higher_is_better=None),
        Score("yes_bias_fp", "yes bias: false positives", scale=1.0, higher_is_better=None),
        Score("consistency_inconsistent", "inconsistent figures", higher_is_better=False),
        Score("unparsed", "unparsed", higher_is_better=None),
    )

    def __init__(
        self,
        file: str | Path | None = None,
        images: str | Path | None = None,
        variant: HallusionVariant = "official",
        judge: Judge | None = None,
        judge_template: str | Path | None = None,
        diagnose: bool = False,
        ask: HallusionQuestions | None = None,
        instruction: str = "",
        max_new_tokens: int = 128,
    ) -> None:
        for name, value, kinds in (("variant", variant, HallusionVariant), ("ask", ask, HallusionQuestions)):
            if value is not None and value not in get_args(kinds):
                raise ValueError(f"Expected `{name}` to be one of {get_args(kinds)}, got {value!r}.")
        if judge is not None and variant != "official":
            raise ValueError(f"Expected no `judge` with variant={variant!r}, which reads yes and no: leave it out.")
        self.file = None if file is None else Path(file)
        self.images = None if images is None else Path(images)
        self.variant: HallusionVariant = variant
        if diagnose and judge is None:
            raise ValueError("Expected `judge` with diagnose=True: it is asked whether answers agree.")
        self.judge = judge
        self.judge_template = None if judge_template is None else Path(judge_template)
        self.diagnose = diagnose
        self.ask: HallusionQuestions = ask or ("all" if variant == "official" else "image")
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    def questions(self) -> list[Question]:
        """The questions in the file's order.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: naming the row of what is no question.
        """
        fields: dict[str, Kind] = {**dict.fromkeys(_FIELDS, (str, int)), "question": str, "filename": (str, type(None))}
        rows = read_rows(given(self.file, "file"), fields)
        numbered = [(number, row) for number, row in enumerate(rows, 1) if self.ask == "all" or row["filename"]]
        return [self._question(number, row) for number, row in numbered]

    def _question(self, number: int, row: Mapping[str, Any]) -> Question:
        target = {name: str(row[name]) for name in _FIELDS}
        target |= {"question": row["question"], "reference": str(row.get("gt_answer_details") or "")}
        prompt = f"{row['question']}\n{self.instruction}" if self.instruction else row["question"]
        names = (target[name] for name in ("category", "subcategory", "set_id", "figure_id", "question_id"))
        group = "/".join((target["category"], target["subcategory"], target["set_id"]))
        self._check(HallusionRow(*(target[name] for name in _FIELDS)), number)
        return Question(prompt, self._image(row["filename"], number), "/".join(names), target, group, row["question"])

    def _check(self, row: HallusionRow, number: int) -> None:
        """Refuse what could not be scored before anything is asked."""
        try:
            hallusionbench_counts([int(HallusionVerdict.CORRECT)], [row], self.variant)
        except ValueError as error:
            raise ValueError(f"{self.file}, row {number}: {error}") from error

    def _image(self, name: str | None, number: int) -> Path | None:
        if not name:
            return None
        folder = self.images or Path()
        inside = name.removeprefix("./")
        # The official archive unpacks to a folder of this name, which one may give, too.
        inside = inside.removeprefix("hallusion_bench/") if folder.name == "hallusion_bench" else inside
        return image_path(folder, inside, f"{self.file}, row {number}")

    @property
    def has_files(self) -> bool:
        """Whether the official file was named."""
        return self.file is not None

    @property
    def settings(self) -> dict[str, Any]:
        """Whose rules hold, and who read the answers."""
        settings: dict[str, Any] = {"variant": self.variant, "parser": self._parser, "ask": self.ask}
        if self.judge is not None:
            template = template_hash(self.judge_template)
            settings |= {"judge": dict(self.judge.engine.identity), "template": template, "diagnose": self.diagnose}
        return settings

    @property
    def _parser(self) -> HallusionParser:
        if self.judge is not None:
            return "judge"
        return "lmms_eval" if self.variant == "lmms_eval" else "vlmevalkit"

    def prepare(self, folder: Path) -> None:
        """Check the judge's prompt, and tell the judge where its replies are kept."""
        template_hash(self.judge_template)
        if self.judge is not None:
            self.judge.prepare(folder)

    def mark(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Mark | None]:
        """One mark per answer; targets are rows of the official file. Pairs and figures count with their first row."""
        targets = [target_of(question.target, question.key, _FIELDS) for question in questions]
        rows = [HallusionRow(*(str(target[name]) for name in _FIELDS)) for target in targets]
        replies: list[str | None] = list(answers) if self.judge is None else self._judge(targets, answers)
        same = self._same(rows, answers) if self.diagnose else None
        # What has no reply is left out by whoever called; until then it must only not be in the way.
        read = [reply or "" for reply in replies]
        counts = hallusionbench_counts(read, rows, self.variant, self._parser, same)
        right = (counts[:, HallusionCounts._fields.index("correct")] == 1).tolist()
        notes = [{} if self.judge is None else {"judge": text} for text in read]
        return [
            None if reply is None else Mark(tuple(row), is_right, float(not is_right), note)
            for row, is_right, note, reply in zip(counts.tolist(), right, notes, replies, strict=True)
        ]

    def _judge(self, targets: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[str | None]:
        assert self.judge is not None  # noqa: S101 - asked by the caller
        prompts = []
        for target, answer in zip(targets, answers, strict=True):
            reference = target.get("reference") or ("yes" if target["gt_answer"] == "1" else "no")
            asked = str(target.get("question", ""))
            prompts.append(hallusionbench_judge_prompt(asked, reference, answer, self.judge_template))
        return self.judge.ask(prompts)

    def _same(self, rows: Sequence[HallusionRow], answers: Sequence[str]) -> list[bool | None]:
        """Whether each answer agrees with that for figure 0; None where there is none, or the judge is silent."""
        assert self.judge is not None  # noqa: S101 - checked by the constructor
        original = {
            (row.cluster, row.question_id): answer
            for row, answer in zip(rows, answers, strict=True)
            if row.figure_id == "0"
        }
        firsts = [original.get((row.cluster, row.question_id)) for row in rows]
        prompts = [
            hallusionbench_same_prompt(answer, first)
            for answer, first in zip(answers, firsts, strict=True)
            if first is not None
        ]
        replies = iter(self.judge.ask(prompts))
        given = [None if first is None else next(replies) for first in firsts]
        return [None if reply is None else judge_same(reply) for reply in given]

    @staticmethod
    def compute(counts: Tensor, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of all questions."""
        del settings
        return _hallusionbench_compute(counts)
