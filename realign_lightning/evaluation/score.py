"""``realign-lightning score``: answers that were made elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from realign_lightning.backbones.files import file_sha256
from realign_lightning.engines.worker import saying_what_is_kept
from realign_lightning.evaluation.answer_files import match, questions_from, read_answers, write_answers
from realign_lightning.evaluation.answer_files.writing import WrittenForm
from realign_lightning.evaluation.answering import Reply
from realign_lightning.evaluation.base import MarkedBenchmark
from realign_lightning.evaluation.command import add_benchmark, add_model, name_benchmark, show
from realign_lightning.evaluation.run_folder import ANSWERS, Evaluated, check_run
from realign_lightning.evaluation.running import WORK, score_replies


def score_file(
    benchmark: MarkedBenchmark,
    answers: str | Path,
    folder: str | Path,
    form: str | None = None,
    overwrite: bool = False,
) -> Evaluated:
    """Score a file of answers, and write what :func:`~realign_lightning.evaluation.evaluate` writes.

    Args:
        benchmark: whose questions were answered. Without its official files the answers' file must hold the targets.
        answers: file of answers, see :func:`~realign_lightning.evaluation.answer_files.read_answers`.
        folder: for ``answers.jsonl`` and ``metrics.json``.
        form: what wrote the file; None recognises it.
        overwrite: replace what another file or benchmark left there.

    Returns:
        Scores and answers.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if the folder holds the evaluation of other answers or another benchmark.
        ValueError: for files with something else in them, answers that belong to no question, and if there are none.
    """
    path = Path(answers)
    if not path.is_file():
        raise FileNotFoundError(f"Expected `answers` to be a file of answers, got {path}, which does not exist.")
    if path.resolve() == (Path(folder) / ANSWERS).resolve():
        raise FileExistsError(f"{path} would be replaced by its own scores: give another --output.")
    found = read_answers(path, form)
    model = {"answers": path.name, "sha256": file_sha256(path)}
    check_run(Path(folder), benchmark.name, model, overwrite)
    questions = benchmark.questions() if benchmark.has_files else questions_from(found, benchmark.name)
    texts = match(questions, found)
    benchmark.prepare(Path(folder) / WORK)
    replies = [Reply(text) if text is not None else Reply(None, False, f"not in {path.name}") for text in texts]
    return score_replies(benchmark, questions, replies, Path(folder), model)


def main(args: Sequence[str]) -> None:
    """Command line of :func:`score_file`: prints the scores.

    Args:
        args: a recipe with overrides.

    Raises:
        SystemExit: with status 3 if some questions have no answer, 2 for wrong options.
        ValueError: as :func:`score_file`.
        OSError: as :func:`score_file`.
    """
    parser = _parser()
    parts = parser.instantiate(parser.parse_args(name_benchmark(args)))
    answers = Path(parts.answers)
    output = answers.with_name(f"{answers.stem}_scores") if parts.output is None else Path(parts.output)
    with saying_what_is_kept(output / WORK):
        found = score_file(parts.benchmark, answers, output, parts.form, parts.overwrite)
        if parts.write is not None:
            for path in write_answers(parts.write, found.answers, parts.write_form, found.benchmark):
                sys.stdout.write(f"Wrote {path}\n")
    show(found, output)


def _parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(
        prog="realign-lightning score",
        description="Score answers that were made elsewhere: `realign-lightning score --benchmark pope --answers "
        "MODEL_POPE.xlsx --output runs/model`. Read are our own answers.jsonl, the benchmarks' official forms, and the "
        "files of VLMEvalKit and lmms-eval. A recipe of `test` can be given, too; who answers is then left aside. Exit "
        "status: 0 all went well, 1 something stood in the way, 3 some questions have no answer or no verdict.",
    )
    parser.add_argument("--config", action="config", help="a file with these options")
    add_benchmark(parser, default_output="FILE_scores beside the answers")
    # Not used: recipes of `test` have them.
    add_model(parser)
    parser.add_argument("--answers", type=str, required=True, help="file of answers")
    parser.add_argument("--form", type=str | None, help="what wrote the file, if it cannot be told from its content")
    parser.add_argument("--write", type=str | None, help="file to write the answers to, for another harness to read")
    told = "for whom: vlmevalkit (.xlsx, .tsv, .csv), lmms_eval (.jsonl) or official (.json)"
    parser.add_argument("--write_form", type=WrittenForm, default="vlmevalkit", help=told)
    return parser
