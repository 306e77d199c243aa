"""Hand-annotated answers, and how well a masker finds what is annotated."""

import re
from collections import Counter
from pathlib import Path

from realign_lightning.preferences.mask import KINDS, Span, find_claims

FOLDER = Path(__file__).parent / "answers"
_LETTERS = {kind[0]: kind for kind in KINDS}
_MARK = re.compile(r"\{([oacr]):([^{}]*)\}")


def read_annotated(name: str) -> list[tuple[str, list[Span]]]:
    """Answers without their annotations, and the annotated spans."""
    answers = []
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            answers.append(_parse(line))
    return answers


def _parse(line: str) -> tuple[str, list[Span]]:
    text, spans, cursor = "", [], 0
    for mark in _MARK.finditer(line):
        text += line[cursor : mark.start()]
        spans.append(Span(len(text), len(text) + len(mark[2]), mark[2], _LETTERS[mark[1]]))
        text += mark[2]
        cursor = mark.end()
    text += line[cursor:]
    assert "{" not in text, line
    return text, spans


def kind_of_words(text: str, spans: list[Span]) -> list[str | None]:
    """The kind of the span that each word lies in, None outside."""
    kinds = []
    for word in re.finditer(r"\w+", text):
        inside = [span.kind for span in spans if span.start < word.end() and word.start() < span.end]
        kinds.append(inside[0] if inside else None)
    return kinds


def precision_and_recall(name: str) -> dict[str, tuple[float, float, int]]:
    """Precision, recall and number of annotated words, by kind; ``any`` for masked or not, whatever the kind."""
    found, right, wanted = Counter(), Counter(), Counter()
    for text, spans in read_annotated(name):
        pairs = zip(kind_of_words(text, find_claims(text)), kind_of_words(text, spans), strict=True)
        for ours, theirs in pairs:
            found.update({ours, "any"} if ours else ())
            wanted.update({theirs, "any"} if theirs else ())
            right.update(({"any"} if ours and theirs else set()) | ({ours} if ours and ours == theirs else set()))
    return {kind: (right[kind] / found[kind], right[kind] / wanted[kind], wanted[kind]) for kind in (*KINDS, "any")}
