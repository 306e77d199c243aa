"""Scores for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from realign_lightning.evaluation.base import Score
from realign_lightning.evaluation.benchmarks import BENCHMARKS
from realign_lightning.evaluation.run_folder import Evaluated


def as_table(found: Evaluated) -> str:
    """A Markdown table of the scores in a benchmark's headline, and what else there is to know.

    Args:
        found: scores and answers.
    """
    headline = BENCHMARKS[found.benchmark].headline if found.benchmark in BENCHMARKS else _plain(found)
    rows = [_row(score, found.scores[score.name]) for score in headline if score.name in found.scores]
    width = max(len(title) for title, _ in rows)
    lines = [f"| {found.benchmark.ljust(width)} |    score |", f"|-{'-' * width}-|---------:|"]
    lines += [f"| {title.ljust(width)} | {value} |" for title, value in rows]
    return "\n".join([*lines, "", *_remarks(found)])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], aligned: str) -> str:
    """A Markdown table whose columns are as wide as their widest cell.

    Args:
        head: of the columns.
        rows: cells, which hold no bars.
        aligned: ``l`` or ``r`` for every column.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[place]) for line in lines)) for place in range(len(head))]
    ruler = ["-" * (width - 1) + (":" if side == "r" else "-") for width, side in zip(widths, aligned, strict=True)]
    pads = [str.rjust if side == "r" else str.ljust for side in aligned]
    padded = [[pad(*cell) for pad, cell in zip(pads, zip(line, widths, strict=True), strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], ruler, *padded[1:]])


def _plain(found: Evaluated) -> tuple[Score, ...]:
    """All scores as they are, for a benchmark that is not one of ours."""
    return tuple(Score(name, name, scale=1.0) for name in found.scores)


def _row(score: Score, value: float) -> tuple[str, str]:
    unit = " %" if score.scale == 100 else "  "
    return score.title, f"{value * score.scale:6.2f}{unit}"


def _remarks(found: Evaluated) -> list[str]:
    told = {name: value for name, value in found.settings.items() if value and isinstance(value, str)}
    settings = ", ".join(f"{name} {value}" for name, value in told.items())
    lines = [f"{len(found.answers)} questions, {found.left_out} left out" + (f"; {settings}" if settings else "")]
    if found.judge:
        judge = found.judge
        lines.append(
            f"judge: {judge['asked']} prompts asked, {judge['cached']} known, {judge['failed']} without a reply; "
            f"{judge['prompt_tokens']} tokens read, {judge['new_tokens']} written, cost {judge['cost']:.2f}"
        )
    return lines
