"""From a benchmark and a model, or finished answers, to scores."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.engines.base import Engine
from realign_lightning.engines.chat_parts import text_of
from realign_lightning.evaluation.answering import Reply, answer_questions
from realign_lightning.evaluation.base import Answered, Mark, MarkedBenchmark, Question
from realign_lightning.evaluation.judge import Judge
from realign_lightning.evaluation.run_folder import Evaluated, check_run, write_run
from realign_lightning.ranks import alone, gather, rank_and_world_size

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
    if rank_and_world_size()[0] == 0 and not overwrite:
        check_run(folder, benchmark.name, model)
    questions = benchmark.questions()
    replies = answer_questions(questions, engine, folder / WORK, show_progress)
    return _on_first_rank(lambda: score_replies(benchmark, questions, replies, folder, model, show_progress))


def score_replies(
    benchmark: MarkedBenchmark,
    questions: Sequence[Question],
    replies: Sequence[Reply],
    folder: Path,
    model: Mapping[str, Any],
    show_progress: bool = True,
) -> Evaluated:
    """Mark answers, and write them with the scores.

    Args:
        benchmark: that asked.
        questions: its questions.
        replies: one per question, in order. Questions without an answer are left out of the scores, and counted.
        folder: for ``answers.jsonl`` and ``metrics.json``.
        model: what tells it from others, in plain JSON values.
        show_progress: whether there is a progress bar of the judge.

    Returns:
        Scores and answers.

    Raises:
        ValueError: if no question was answered, or a target has not the benchmark's form.
        EngineError: if a judge answers nothing any more; what it replied is kept.
    """
    answered = [index for index, reply in enumerate(replies) if reply.text is not None]
    if not answered:
        reasons = Counter(reply.error for reply in replies).most_common(1)
        raise ValueError(
            f"None of {len(replies)} questions was answered: {reasons[0][0] if reasons else 'none asked'}."
        )
    judge = getattr(benchmark, "judge", None)
    if isinstance(judge, Judge):
        judge.prepare(folder / WORK, show_progress)
    marks = benchmark.mark([questions[index] for index in answered], [str(replies[index].text) for index in answered])
    by_index = dict(zip(answered, marks, strict=True))
    rows = [
        _row(question, reply, by_index.get(index))
        for index, (question, reply) in enumerate(zip(questions, replies, strict=True))
    ]
    told = judge.told() if isinstance(judge, Judge) else {}
    found = Evaluated(benchmark.name, benchmark.settings, benchmark.score_marks(marks), rows, dict(model), told)
    write_run(folder, found)
    _warn(found, replies)
    return found


def _on_first_rank(work: Callable[[], Evaluated]) -> Evaluated:
    """What the first rank found, on all ranks; or its error."""
    outcome: Evaluated | BaseException | None = None
    if rank_and_world_size()[0] == 0:
        with alone():
            try:
                outcome = work()
            # The others must hear of it, or they would wait for ever.
            except Exception as error:
                outcome = error
    first = gather(outcome)[0]
    if isinstance(first, BaseException):
        raise outcome if isinstance(outcome, BaseException) else first
    found: Evaluated = first
    return found


def _row(question: Question, reply: Reply, mark: Mark | None) -> Answered:
    row = Answered(
        question.key,
        text_of(question.prompt),
        reply.text,
        question.group,
        question.image.name if isinstance(question.image, Path) else "",
        question.target,
        error=reply.error,
    )
    if mark is not None:
        row.counts, row.correct, row.badness = list(mark.counts), mark.correct, mark.badness
        row.notes = dict(mark.notes) if reply.finished else {**mark.notes, "cut": True}
    return row


def _warn(found: Evaluated, replies: Sequence[Reply]) -> None:
    missing = [row for row in found.answers if row.answer is None]
    if missing:
        log.warning(
            "%d of %d questions have no answer and are left out of the scores, the first is %s: %s",
            *(len(missing), len(found.answers), missing[0].key, missing[0].error),
        )
    cut = sum(not reply.finished for reply in replies if reply.text is not None)
    if cut:
        log.warning("%d answers were cut at the longest length: raise `benchmark.max_new_tokens` if they matter.", cut)
