"""From a benchmark and a model, or finished answers, to scores."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.engines.base import Engine
from realign_lightning.engines.chat_parts import text_of
from realign_lightning.engines.local import LocalEngine
from realign_lightning.engines.policy import Policy
from realign_lightning.evaluation.answering import Reply, answer_questions
from realign_lightning.evaluation.base import Answered, Benchmark, Mark, MarkedBenchmark, Question
from realign_lightning.evaluation.judge import Judge
from realign_lightning.evaluation.run_folder import Evaluated, check_run, write_run
from realign_lightning.ranks import on_first_rank

log = logging.getLogger(__name__)

WORK = "work"
"""Folder of finished answers and judgements in the folder of an evaluation."""


def evaluate(
    benchmark: MarkedBenchmark,
    engine: Engine,
    folder: str | Path,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Evaluated:
    """Ask a model a benchmark's questions, mark the answers, and write both with the scores.

    Every answer is written when it is there: after a kill the same call asks only what is missing. With several
    processes (torch.distributed) all call this, share the images, and get the same result; every question counts once.

    Args:
        benchmark: what to ask.
        engine: who answers.
        folder: for ``answers.jsonl``, ``metrics.json`` and the folder ``work`` of finished answers.
        overwrite: replace what another model or benchmark left there.
        show_progress: whether there are progress bars.

    Returns:
        Scores and answers.

    Raises:
        FileNotFoundError: if a file of the benchmark or an image is missing, before anything is asked.
        FileExistsError: if the folder holds the evaluation of another model or benchmark.
        ValueError: for files with something else in them; if no question was answered.
        EngineError: if model or judge answer nothing any more; what was answered is kept.
    """
    folder, model = Path(folder), dict(engine.identity)
    on_first_rank(lambda: check_run(folder, benchmark.name, model, overwrite))
    longest = getattr(engine, "max_new_tokens", benchmark.max_new_tokens)
    if longest != benchmark.max_new_tokens:
        log.warning(
            "Answers may take %d tokens, as the engine says; the benchmark's `max_new_tokens` is %d.",
            *(longest, benchmark.max_new_tokens),
        )
    benchmark.prepare(folder / WORK)
    questions = benchmark.questions()
    replies = answer_questions(questions, engine, folder / WORK, show_progress)
    settings = {"max_new_tokens": longest, "instruction": getattr(benchmark, "instruction", "")}
    return on_first_rank(lambda: score_replies(benchmark, questions, replies, folder, model, settings))


def local_engine(policy: Policy, benchmark: Benchmark, batch_size: int) -> LocalEngine:
    """What lets a model on this machine answer a benchmark.

    Args:
        policy: the model.
        benchmark: says how long answers may be.
        batch_size: questions per call of the model's ``generate``.
    """
    engine = LocalEngine(batch_size=batch_size, max_new_tokens=benchmark.max_new_tokens)
    engine.use(policy)
    return engine


def score_replies(
    benchmark: MarkedBenchmark,
    questions: Sequence[Question],
    replies: Sequence[Reply],
    folder: Path,
    model: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> Evaluated:
    """Mark answers, and write them with the scores.

    What has no answer, or no verdict of a judge, is left out of the scores, and counted; with benchmarks that mark
    groups the whole group is.

    Args:
        benchmark: that asked; it is prepared.
        questions: its questions.
        replies: one per question, in order.
        folder: for ``answers.jsonl`` and ``metrics.json``.
        model: what tells it from others, in plain JSON values.
        settings: of the asking, beside the benchmark's own, in plain JSON values.

    Returns:
        Scores and answers.

    Raises:
        ValueError: if nothing is left to score, or a target has not the benchmark's form.
        EngineError: if a judge answers nothing any more; what it replied is kept.
    """
    errors = {index: reply.error or "no answer" for index, reply in enumerate(replies) if reply.text is None}
    marks = _marks(benchmark, questions, replies, errors)
    if not marks:
        reasons = Counter(errors.values()).most_common(1)
        reason = reasons[0][0] if reasons else "the benchmark has no questions"
        raise ValueError(f"None of {len(replies)} questions can be scored: {reason}.")
    rows = [
        _row(benchmark, question, reply, marks.get(index), errors.get(index))
        for index, (question, reply) in enumerate(zip(questions, replies, strict=True))
    ]
    judge = getattr(benchmark, "judge", None)
    told = judge.told() if isinstance(judge, Judge) else {}
    scores = benchmark.score_marks(list(marks.values()))
    used = {**benchmark.settings, **(settings or {})}
    found = Evaluated(benchmark.name, used, scores, rows, dict(model), told)
    write_run(folder, found)
    _warn(found, replies)
    return found


def _marks(
    benchmark: MarkedBenchmark, questions: Sequence[Question], replies: Sequence[Reply], errors: dict[int, str]
) -> dict[int, Mark]:
    """Marks by the index of their question; why others have none is added to ``errors``."""
    while True:
        if benchmark.marks_groups:
            _leave_out_groups(questions, errors)
        left = [index for index in range(len(questions)) if index not in errors]
        answers = [str(replies[index].text) for index in left]
        marks = dict(zip(left, benchmark.mark([questions[index] for index in left], answers), strict=True))
        silent = [index for index, mark in marks.items() if mark is None]
        errors |= dict.fromkeys(silent, "the judge gave no reply")
        if not (silent and benchmark.marks_groups):
            return {index: mark for index, mark in marks.items() if mark is not None}


def _leave_out_groups(questions: Sequence[Question], errors: dict[int, str]) -> None:
    broken = {questions[index].group: questions[index].key for index in errors if questions[index].group}
    for index, question in enumerate(questions):
        if index not in errors and question.group in broken:
            errors[index] = f"left out with its group, since {broken[question.group]} has no answer or verdict"


def _row(
    benchmark: MarkedBenchmark, question: Question, reply: Reply, mark: Mark | None, error: str | None
) -> Answered:
    row = Answered(
        question.key,
        question.text or text_of(question.prompt),
        reply.text,
        question.group,
        _image_name(question, getattr(benchmark, "images", None)),
        question.target,
        error=error,
    )
    if mark is not None:
        row.counts, row.correct, row.badness = list(mark.counts), mark.correct, mark.badness
        row.notes = dict(mark.notes) if reply.finished else {**mark.notes, "cut": True}
    return row


def _image_name(question: Question, folder: Path | None) -> str:
    """Path of the image within the benchmark's folder of images."""
    path = question.image
    if not isinstance(path, Path):
        return ""
    return path.relative_to(folder).as_posix() if folder is not None and path.is_relative_to(folder) else path.name


def _warn(found: Evaluated, replies: Sequence[Reply]) -> None:
    missing = [row for row in found.answers if row.error is not None]
    if missing:
        log.warning(
            "%d of %d questions are left out of the scores, the first is %s: %s",
            *(len(missing), len(found.answers), missing[0].key, missing[0].error),
        )
    empty = sum(not reply.text.strip() for reply in replies if reply.text is not None)
    if empty:
        log.warning("%d of %d answers are empty: they are scored as they stand.", empty, len(replies))
    cut = sum(not reply.finished for reply in replies if reply.text is not None)
    if cut:
        log.warning("%d answers were cut at the longest length: raise `benchmark.max_new_tokens` if they matter.", cut)
