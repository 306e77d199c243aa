"""HallusionBench (Guan et al. 2024, arXiv 2310.14566): yes-or-no questions asked of an image and of edited images."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from realign_lightning.metrics.functional.checks import check_texts, fill_template, ratio
from realign_lightning.metrics.functional.pope import Verdict, says_yes_or_no, vlmevalkit_verdict

HallusionVariant = Literal["official", "lmms_eval", "vlmevalkit"]
"""Whose rules hold; see :func:`hallusionbench`."""

HallusionParser = Literal["judge", "lmms_eval", "vlmevalkit"]
"""How texts are read: a judge's replies, or answers by the rule of lmms-eval or of VLMEvalKit."""

DEFAULT_PARSERS: Mapping[HallusionVariant, HallusionParser] = {
    "official": "judge",
    "lmms_eval": "lmms_eval",
    "vlmevalkit": "vlmevalkit",
}
"""The parser that belongs to each variant."""

SUBCATEGORIES: Mapping[str, tuple[str, ...]] = {
    "VD": ("figure", "illusion", "math", "ocr", "video"),
    "VS": ("chart", "map", "ocr", "table"),
}
"""The sub-categories of each category: visual dependent (VD) and visual supplement (VS) questions."""

_CATEGORIES = tuple(SUBCATEGORIES)
_SUBCATEGORIES = tuple(sorted({name for names in SUBCATEGORIES.values() for name in names}))


class HallusionRow(NamedTuple):
    """What the score needs to know of a question; the fields of ``HallusionBench.json``, all of them texts.

    Args:
        category: "VD", the question makes no sense without its image, or "VS", it can be answered without.
        subcategory: one of :data:`SUBCATEGORIES`.
        visual_input: "0" no image is shown, "1" the original image, "2" an edited or opposing image.
        set_id: number of the set of images.
        figure_id: number of the image in its set. "0" is the original in VD and no image at all in VS.
        question_id: number of the question in its set.
        gt_answer: "1" yes, "0" no.
    """

    category: str
    subcategory: str
    visual_input: str
    set_id: str
    figure_id: str
    question_id: str
    gt_answer: str

    @property
    def cluster(self) -> tuple[str, str, str]:
        """The set that the question belongs to. Pairs and figures never span two sets, so sets can be resampled."""
        return self.category, self.subcategory, self.set_id


class HallusionVerdict(IntEnum):
    """What was made of an answer, with the numbers of the official result files."""

    INCORRECT = 0
    CORRECT = 1
    UNCLEAR = 2


# Without this order the score of conflicting duplicates would depend on which process saw a question first.
_WORST_FIRST = (HallusionVerdict.INCORRECT, HallusionVerdict.UNCLEAR, HallusionVerdict.CORRECT)


def vlmevalkit_answer(answer: str) -> bool | None:
    """Read an answer as VLMEvalKit does (``YOrN_Extraction``): exactly one of the words yes and no.

    What a word is, :func:`~realign_lightning.metrics.functional.pope.vlmevalkit_verdict` says.

    Args:
        answer: the generated text.

    Returns:
        True for yes, False for no, None for both or neither.

    >>> vlmevalkit_answer("No, it is not."), vlmevalkit_answer("**Yes**")
    (False, None)
    """
    verdict = vlmevalkit_verdict(answer)
    return None if verdict is Verdict.UNKNOWN else verdict is Verdict.YES


def lmms_eval_answer(answer: str) -> bool:
    """Read an answer as lmms-eval's rule does: yes if "yes" occurs anywhere, in any case, and no otherwise.

    Args:
        answer: the generated text.

    Returns:
        True for yes, False for no.

    >>> lmms_eval_answer("The eyes are closed.")
    True
    """
    return "yes" in answer.lower()


def judge_verdict(reply: str) -> HallusionVerdict:
    """Read a judge's reply as the official code does, by substrings in any case.

    Args:
        reply: the judge's text; asked for "correct", "incorrect" or "unclear".

    Returns:
        ``INCORRECT`` if "incorrect" occurs, else ``CORRECT`` if "correct" does ("not correct" too), else ``UNCLEAR``.

    >>> judge_verdict("Incorrect.").name, judge_verdict("correct").name, judge_verdict("I pass.").name
    ('INCORRECT', 'CORRECT', 'UNCLEAR')
    """
    text = reply.lower()
    if "incorrect" in text:
        return HallusionVerdict.INCORRECT
    return HallusionVerdict.CORRECT if "correct" in text else HallusionVerdict.UNCLEAR


def judge_same(reply: str) -> bool:
    """Read the reply to :func:`hallusionbench_same_prompt` as the official code does: is "same" in it, in any case?

    Args:
        reply: the judge's text; asked for "same" or "different".

    >>> judge_same("Same"), judge_same("different")
    (True, False)
    """
    return "same" in reply.lower()


_PROMPT = """\
Grade an answer to a question about an image that you cannot see. Trust the reference.

Question: {}
Reference: {}
Answer to grade: {}

Reply with one word:
correct, if the answer agrees with the reference;
incorrect, if it contradicts the reference;
unclear, if it takes no side or says that it does not know."""


def hallusionbench_judge_prompt(
    question: str, reference: str, answer: str, template_file: str | Path | None = None
) -> str:
    """Ask a judge for the verdict on an answer, to be read by :func:`judge_verdict`.

    The built-in words are ours. Published numbers were judged by GPT-4 with the authors' prompt, which asks for the
    same three words: save its text as a file and give that to compare with them.

    Args:
        question: the question.
        reference: the right answer as a sentence, ``gt_answer_details``.
        answer: the model's answer.
        template_file: UTF-8 text with three ``{}``, for the question, the reference and the answer, in this order; None
            for ours.

    Returns:
        The text of one user message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold exactly three ``{}``.
    """
    template = _PROMPT if template_file is None else Path(template_file).read_text(encoding="utf-8")
    values = {"question": question, "reference": reference, "answer": answer}
    return fill_template(template, values, template_file)


def hallusionbench_same_prompt(answer: str, original_answer: str) -> str:
    """Ask a judge whether two answers agree, to be read by :func:`judge_same`. The words are ours.

    Args:
        answer: the answer for this figure.
        original_answer: the answer to the same question for figure 0 of the set.

    Returns:
        The text of one user message.
    """
    return (
        "Two answers were given to one question. Can both be true at once?\n\n"
        f"First answer: {answer}\nSecond answer: {original_answer}\n\n"
        "Reply with one word: same, if they do not contradict each other, and different if they do."
    )


class _Reading(NamedTuple):
    verdict: HallusionVerdict
    parsed: bool


def _read_judge(reply: str, right: bool) -> _Reading:
    del right
    parsed = "correct" in reply.lower() or "unclear" in reply.lower()
    return _Reading(judge_verdict(reply), parsed)


def _read_lmms_eval(answer: str, right: bool) -> _Reading:
    return _Reading(HallusionVerdict(lmms_eval_answer(answer) == right), says_yes_or_no(answer))


def _read_vlmevalkit(answer: str, right: bool) -> _Reading:
    said = vlmevalkit_answer(answer)
    if said is None:
        return _Reading(HallusionVerdict.UNCLEAR, parsed=False)
    return _Reading(HallusionVerdict(said == right), parsed=True)


PARSERS: Mapping[HallusionParser, Callable[[str, bool], _Reading]] = {
    "judge": _read_judge,
    "lmms_eval": _read_lmms_eval,
    "vlmevalkit": _read_vlmevalkit,
}
"""The rule behind each name: text, and whether yes is right, to verdict and whether the text was understood."""


def check_variant(variant: HallusionVariant, parser: HallusionParser | None) -> HallusionParser:
    """Check the names of a variant and a parser.

    Args:
        variant: whose rules hold.
        parser: how texts are read, or None for the variant's own.

    Returns:
        The parser.

    Raises:
        ValueError: if there is no such variant or parser.
    """
    if variant not in DEFAULT_PARSERS:
        raise ValueError(f"Expected `variant` to be one of {get_args(HallusionVariant)}, got {variant!r}.")
    if parser is None:
        return DEFAULT_PARSERS[variant]
    if parser not in PARSERS:
        raise ValueError(f"Expected `parser` to be None or one of {get_args(HallusionParser)}, got {parser!r}.")
    return parser


class _Entry(NamedTuple):
    """A question with its verdict, in integers: one row of the table that processes exchange."""

    category: int
    subcategory: int
    visual_input: int
    set_id: int
    figure_id: int
    question_id: int
    gt_answer: int
    verdict: int
    same: int
    parsed: int

    @property
    def without_figure(self) -> bool:
        return _CATEGORIES[self.category] == "VS" and self.figure_id == 0

    @property
    def question(self) -> tuple[int, ...]:
        return self.category, self.subcategory, self.set_id, self.figure_id, self.question_id

    @property
    def pair(self) -> tuple[int, ...]:
        return self.category, self.subcategory, self.set_id, self.question_id

    @property
    def figure(self) -> tuple[int, ...]:
        return self.category, self.subcategory, self.set_id, self.figure_id


ENTRY_WIDTH = len(_Entry._fields)
_UNKNOWN = -1


class HallusionCounts(NamedTuple):
    """The columns of :func:`hallusionbench_counts`, in their order.

    What belongs to a group (a pair, a figure) stands in the row of the group's first question.

    Attributes:
        questions: 1 per question.
        correct: the verdict counts as correct.
        yes: yes is the right answer.
        said_yes: the answer counts as yes: correct where yes is right, or wrong where no is.
        false_yes: wrong where no is right.
        unclear: the verdict is ``UNCLEAR``.
        unparsed: the text was not understood.
        alone_lh, alone_vi, alone_mix: the question is wrong by language hallucination, visual illusion or a mix of
            both, as far as it tells alone.
        lh, vi, mix: the same, in view of the answer for figure 0.
        undiagnosed: wrong, but the answer for figure 0, or ``same``, would be needed to tell why.
        pairs, pairs_correct: questions with all their figures; those right for every figure.
        pairs_lh, pairs_vi, pairs_mix: pairs by what their wrong answers show.
        easy_questions, easy_pairs, easy_correct: the same without edited figures (``visual_input`` not "2").
        hard_questions, hard_pairs, hard_correct: the same for edited figures alone.
        figures: figures.
        figures_correct, figures_wrong: figures with every question right, with none right.
        figure_score: share of right questions of the figure, in units of 1 / :data:`SCORE_UNIT`.
    """

    questions: Tensor
    correct: Tensor
    yes: Tensor
    said_yes: Tensor
    false_yes: Tensor
    unclear: Tensor
    unparsed: Tensor
    alone_lh: Tensor
    alone_vi: Tensor
    alone_mix: Tensor
    lh: Tensor
    vi: Tensor
    mix: Tensor
    undiagnosed: Tensor
    pairs: Tensor
    pairs_correct: Tensor
    pairs_lh: Tensor
    pairs_vi: Tensor
    pairs_mix: Tensor
    easy_questions: Tensor
    easy_pairs: Tensor
    easy_correct: Tensor
    hard_questions: Tensor
    hard_pairs: Tensor
    hard_correct: Tensor
    figures: Tensor
    figures_correct: Tensor
    figures_wrong: Tensor
    figure_score: Tensor


SCORE_UNIT = math.lcm(*range(1, 25))
"""Shares of up to 24 questions are whole multiples of 1 / this number, so they add up as exact integers."""


def _number(row: HallusionRow, name: str, index: int) -> int:
    text = str(getattr(row, name))
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"Expected `target[{index}].{name}` to be a whole number as text, got {text!r}.")
    return int(text)


def _choice(row: HallusionRow, name: str, choices: Sequence[str], index: int) -> int:
    text = str(getattr(row, name))
    if text not in choices:
        raise ValueError(f"Expected `target[{index}].{name}` to be one of {tuple(choices)}, got {text!r}.")
    return choices.index(text)


def _row_numbers(row: HallusionRow, index: int) -> tuple[int, ...]:
    if not isinstance(row, HallusionRow):
        raise ValueError(f"Expected `target` to hold HallusionRow, got {type(row).__name__} at index {index}.")
    category = _choice(row, "category", _CATEGORIES, index)
    _choice(row, "subcategory", SUBCATEGORIES[row.category], index)
    visual_input = _choice(row, "visual_input", ("0", "1", "2"), index)
    figure_id = _number(row, "figure_id", index)
    if (visual_input == 0) != (row.category == "VS" and figure_id == 0):
        raise ValueError(
            f"Expected `target[{index}]` to have visual_input '0' if and only if it is figure '0' of a VS question, "
            f"got category {row.category!r}, visual_input {visual_input} and figure_id {figure_id}."
        )
    return (
        category,
        _SUBCATEGORIES.index(row.subcategory),
        visual_input,
        _number(row, "set_id", index),
        figure_id,
        _number(row, "question_id", index),
        _choice(row, "gt_answer", ("0", "1"), index),
    )


def _same_numbers(same: Sequence[bool | int | None] | None, length: int) -> list[int]:
    if same is None:
        return [_UNKNOWN] * length
    if len(same) != length:
        raise ValueError(f"Expected `same` and `target` of the same length, got {len(same)} and {length}.")
    for index, value in enumerate(same):
        if value is not None and value not in (0, 1):
            raise ValueError(f"Expected `same` to hold True, False and None, got {value!r} at index {index}.")
    return [_UNKNOWN if value is None else int(value) for value in same]


def _given_verdicts(preds: Sequence[str | int], target: Sequence[HallusionRow]) -> list[_Reading]:
    if isinstance(target, str) or not isinstance(target, Sequence) or len(preds) != len(target):
        raise ValueError(f"Expected `preds` and `target` to be lists of the same length, got {len(preds)} verdicts.")
    for index, verdict in enumerate(preds):
        if isinstance(verdict, bool) or verdict not in (0, 1, 2):
            raise ValueError(
                "Expected `preds` to hold texts alone, or verdicts alone (0 incorrect, 1 correct, 2 unclear), "
                f"got {verdict!r} at index {index}."
            )
    return [_Reading(HallusionVerdict(int(verdict)), parsed=True) for verdict in preds]


def _readings(preds: Sequence[str | int], target: Sequence[HallusionRow], parser: HallusionParser) -> list[_Reading]:
    if not isinstance(preds, str) and any(isinstance(pred, int) for pred in preds):
        return _given_verdicts(preds, target)
    texts = cast("Sequence[str]", preds)
    check_texts(texts, target)
    return [PARSERS[parser](text, row.gt_answer == "1") for text, row in zip(texts, target, strict=True)]


def hallusionbench_table(
    preds: Sequence[str | int],
    target: Sequence[HallusionRow],
    parser: HallusionParser,
    same: Sequence[bool | int | None] | None = None,
) -> Tensor:
    """Questions and verdicts in integers, which processes can exchange.

    Args:
        preds: texts or verdicts, as :func:`hallusionbench` takes them.
        target: the question of each.
        parser: how texts are read.
        same: as :func:`hallusionbench` takes it.

    Returns:
        int64, shape (N, ``ENTRY_WIDTH``).

    Raises:
        ValueError: as :func:`hallusionbench`.
    """
    rows = [] if isinstance(target, str) else [_row_numbers(row, index) for index, row in enumerate(target)]
    readings = _readings(preds, target, parser)
    agreements = _same_numbers(same, len(rows))
    entries = [
        (*row, reading.verdict, agreement, reading.parsed)
        for row, reading, agreement in zip(rows, readings, agreements, strict=True)
    ]
    return torch.tensor(entries, dtype=torch.long).reshape(-1, ENTRY_WIDTH)


def _without_duplicates(entries: Sequence[_Entry]) -> dict[int, _Entry]:
    """One entry per question by its index: the worst verdict, and of equal ones the smallest numbers."""
    best: dict[tuple[int, ...], int] = {}
    conflicts: set[tuple[int, ...]] = set()
    for index, entry in enumerate(entries):
        other = best.setdefault(entry.question, index)
        if entry != entries[other]:
            conflicts.add(entry.question)
            best[entry.question] = min(other, index, key=lambda i: (_WORST_FIRST.index(entries[i].verdict), entries[i]))
    if conflicts:
        warnings.warn(
            f"{len(conflicts)} questions came more than once with different contents; the worst verdict counts.",
            stacklevel=2,
        )
    return {index: entries[index] for index in sorted(best.values())}


def _groups(entries: Mapping[int, _Entry], key: Callable[[_Entry], Hashable]) -> Iterator[tuple[int, list[int]]]:
    """For each group the index of its first question, and of all."""
    members: dict[Hashable, list[int]] = {}
    for index, entry in entries.items():
        members.setdefault(key(entry), []).append(index)
    return ((indices[0], indices) for indices in members.values())


def _is_correct(entry: _Entry, official: bool) -> bool:
    """The official code lets a model be unsure of what it can only have read about."""
    if entry.verdict == HallusionVerdict.UNCLEAR:
        return official and entry.without_figure
    return entry.verdict == HallusionVerdict.CORRECT


_Blame = Literal["lh", "vi", "mix", "undiagnosed"]
"""Why an answer is wrong: language hallucination, visual illusion, a mix of both, or not known."""


def _blame_alone(entry: _Entry) -> _Blame | None:
    wrong, unclear = entry.verdict == HallusionVerdict.INCORRECT, entry.verdict == HallusionVerdict.UNCLEAR
    if entry.without_figure:
        return "lh" if wrong else None
    if unclear or (wrong and entry.figure_id == 0):
        return "vi"
    return "mix" if wrong else None


def _blame(entry: _Entry, original: HallusionVerdict | None) -> _Blame | None:
    """The official diagnosis, in view of the verdict on figure 0."""
    if entry.figure_id == 0:
        return _blame_alone(entry)
    if entry.verdict == HallusionVerdict.CORRECT:
        return None
    diagnose = _blame_dependent if _CATEGORIES[entry.category] == "VD" else _blame_supplement
    return diagnose(entry, original)


def _blame_dependent(entry: _Entry, original: HallusionVerdict | None) -> _Blame:
    """A wrong or unclear answer to a VD question about an edited figure."""
    if entry.verdict == HallusionVerdict.UNCLEAR or original in (HallusionVerdict.INCORRECT, HallusionVerdict.UNCLEAR):
        return "vi"
    return "undiagnosed" if original is None else _by_same(entry, if_same="mix", if_not="vi")


def _blame_supplement(entry: _Entry, original: HallusionVerdict | None) -> _Blame:
    """A wrong or unclear answer to a VS question about a figure."""
    unclear = entry.verdict == HallusionVerdict.UNCLEAR
    if original is None:
        return "undiagnosed"
    if original == HallusionVerdict.INCORRECT:
        return "mix" if unclear else _by_same(entry, if_same="lh", if_not="mix")
    if original == HallusionVerdict.UNCLEAR or unclear or entry.visual_input == 1:
        return "vi"
    return _by_same(entry, if_same="lh", if_not="vi")


def _by_same(entry: _Entry, if_same: _Blame, if_not: _Blame) -> _Blame:
    if entry.same == _UNKNOWN:
        return "undiagnosed"
    return if_same if entry.same else if_not


def _count_question(entry: _Entry, correct: bool) -> Counter[str]:
    return Counter(
        questions=1,
        correct=int(correct),
        yes=entry.gt_answer,
        said_yes=int(correct == bool(entry.gt_answer)),
        false_yes=int(not correct and not entry.gt_answer),
        unclear=int(entry.verdict == HallusionVerdict.UNCLEAR),
        unparsed=int(not entry.parsed),
        easy_questions=int(entry.visual_input != 2),
        hard_questions=int(entry.visual_input == 2),
    )


def _count_blame(entries: Mapping[int, _Entry], counts: Sequence[Counter[str]]) -> None:
    originals = {entry.pair: HallusionVerdict(entry.verdict) for entry in entries.values() if entry.figure_id == 0}
    blames = {index: _blame(entry, originals.get(entry.pair)) for index, entry in entries.items()}
    for index, entry in entries.items():
        if alone := _blame_alone(entry):
            counts[index][f"alone_{alone}"] += 1
        if blame := blames[index]:
            counts[index][blame] += 1
    for first, indices in _groups(entries, lambda entry: entry.pair):
        seen = {blames[index] for index in indices}
        language, visual = bool(seen & {"lh", "mix"}), bool(seen & {"vi", "mix"})
        counts[first]["pairs_mix"] += language and visual
        counts[first]["pairs_lh"] += language and not visual
        counts[first]["pairs_vi"] += visual and not language


def _count_pairs(
    entries: Mapping[int, _Entry], correct: Mapping[int, bool], counts: Sequence[Counter[str]], kind: str
) -> None:
    """Pairs of the entries: the columns ``pairs`` or ``<kind>_pairs`` and ``<kind>_correct``."""
    total = "pairs" if kind == "pairs" else f"{kind}_pairs"
    for first, indices in _groups(entries, lambda entry: entry.pair):
        counts[first][total] += 1
        counts[first][f"{kind}_correct"] += all(correct[index] for index in indices)


def _count_figures(entries: Mapping[int, _Entry], correct: Mapping[int, bool], counts: Sequence[Counter[str]]) -> None:
    for first, indices in _groups(entries, lambda entry: entry.figure):
        right = sum(correct[index] for index in indices)
        counts[first]["figures"] += 1
        counts[first]["figures_correct"] += right == len(indices)
        counts[first]["figures_wrong"] += right == 0
        counts[first]["figure_score"] += right * SCORE_UNIT // len(indices)


def _table_counts(table: Tensor, variant: HallusionVariant) -> Tensor:
    """:func:`hallusionbench_counts` of a table of :func:`hallusionbench_table`."""
    official = variant == "official"
    everything = [_Entry(*values) for values in table.tolist()]
    entries = _without_duplicates(everything)
    correct = {index: _is_correct(entry, official) for index, entry in entries.items()}
    counts: list[Counter[str]] = [Counter() for _ in everything]
    for index, entry in entries.items():
        counts[index] = _count_question(entry, correct[index])
    easy = {index: entry for index, entry in entries.items() if entry.visual_input != 2}
    hard = {index: entry for index, entry in entries.items() if entry.visual_input == 2}
    shown = {index: entry for index, entry in entries.items() if not (official and entry.without_figure)}
    _count_blame(entries, counts)
    for kind, chosen in (("pairs", entries), ("easy", easy), ("hard", hard)):
        _count_pairs(chosen, correct, counts, kind)
    _count_figures(shown, correct, counts)
    columns = [[int(of_row[name]) for name in HallusionCounts._fields] for of_row in counts]
    counted = torch.tensor(columns, dtype=torch.long, device=table.device)
    return counted.reshape(-1, len(HallusionCounts._fields))


def hallusionbench_counts(
    preds: Sequence[str | int],
    target: Sequence[HallusionRow],
    variant: HallusionVariant = "vlmevalkit",
    parser: HallusionParser | None = None,
    same: Sequence[bool | int | None] | None = None,
) -> Tensor:
    """Additive counts of each question.

    A pair or a figure is counted in the row of its first question, so only sums over whole sets of images mean
    something: resample by :attr:`HallusionRow.cluster`. The row of a dropped duplicate holds zeros.

    Args:
        preds: texts or verdicts, as :func:`hallusionbench` takes them.
        target: the question of each.
        variant: whose rules hold.
        parser: how texts are read, or None for the variant's own.
        same: as :func:`hallusionbench` takes it.

    Returns:
        int64, shape (N, K), with the columns of :class:`HallusionCounts`.

    Raises:
        ValueError: as :func:`hallusionbench`.
    """
    return _table_counts(hallusionbench_table(preds, target, check_variant(variant, parser), same), variant)


def _hallusionbench_compute(counts: Tensor) -> dict[str, Tensor]:
    """Finish summed counts of shape (..., K)."""
    n = HallusionCounts(*counts.unbind(-1))
    wrong = n.questions - n.correct
    diagnosed = n.lh + n.vi + n.mix
    return {
        "a_acc": ratio(n.correct, n.questions),
        "q_acc": ratio(n.pairs_correct, n.pairs),
        "f_acc": ratio(n.figures_correct, n.figures),
        "easy": ratio(n.easy_correct, n.easy_pairs),
        "hard": ratio(n.hard_correct, n.hard_pairs),
        "consistency_inconsistent": ratio(n.figures - n.figures_correct - n.figures_wrong, n.figures),
        "consistency_wrong": ratio(n.figures_wrong, n.figures),
        "figure_score": ratio(n.figure_score, n.figures * SCORE_UNIT),
        "yes_bias_diff": ratio(n.said_yes - n.yes, n.questions),
        "yes_bias_fp": ratio(n.false_yes, wrong),
        "language_hallucination": ratio(n.lh, diagnosed),
        "visual_illusion": ratio(n.vi, diagnosed),
        "mixed": ratio(n.mix, diagnosed),
        "undiagnosed": ratio(n.undiagnosed, diagnosed + n.undiagnosed),
        "unclear": ratio(n.unclear, n.questions),
        "unparsed": ratio(n.unparsed, n.questions),
    }


_PER_CATEGORY = ("a_acc", "q_acc", "f_acc")


def _hallusionbench_scores(table: Tensor, variant: HallusionVariant, per_category: bool) -> dict[str, Tensor]:
    """The scores of a table, and those of its categories and sub-categories if wanted."""
    counts = _table_counts(table, variant)
    scores = _hallusionbench_compute(counts.sum(0))
    if per_category:
        for name, chosen in _splits(table).items():
            of_split = _hallusionbench_compute(counts[chosen].sum(0))
            scores |= {f"{name}/{score}": of_split[score] for score in _PER_CATEGORY}
    return scores


def _splits(table: Tensor) -> dict[str, Tensor]:
    """Which rows belong to each category and sub-category that occurs."""
    splits = {}
    for number, category in enumerate(_CATEGORIES):
        of_category = table[:, 0] == number
        splits[category] = of_category
        for subcategory in SUBCATEGORIES[category]:
            splits[f"{category}_{subcategory}"] = of_category & (table[:, 1] == _SUBCATEGORIES.index(subcategory))
    return {name: chosen for name, chosen in splits.items() if chosen.any()}


def hallusionbench(
    preds: Sequence[str | int],
    target: Sequence[HallusionRow],
    variant: HallusionVariant = "vlmevalkit",
    parser: HallusionParser | None = None,
    same: Sequence[bool | int | None] | None = None,
    per_category: bool = False,
) -> dict[str, Tensor]:
    """HallusionBench's scores of a set of answers; see :class:`~realign_lightning.metrics.HallusionBench`.

    The variants are those of tianyi-lab/HallusionBench (``official``, the leaderboard), lmms-eval (its rule without a
    judge) and VLMEvalKit. They differ in three things:

    ============ =================== =========================================== ==============================
    variant      texts in ``preds``  an unclear answer                           figures
    ============ =================== =========================================== ==============================
    official     judge's replies     correct for VS questions without an image   no image is no figure
    lmms_eval    the model's answers does not occur                              no image is figure 0
    vlmevalkit   the model's answers wrong                                       no image is figure 0
    ============ =================== =========================================== ==============================

    lmms-eval and VLMEvalKit ask only the 951 questions that have an image: leave out the others for their numbers.

    Args:
        preds: texts, or verdicts as integers: 0 incorrect, 1 correct, 2 unclear.
        target: the question of each.
        variant: whose rules hold.
        parser: how texts are read, or None for the variant's own. The official rules can be had without a judge by
            ``variant="official", parser="vlmevalkit"``; say so where you report that.
        same: for each answer whether it agrees with the answer to the same question for figure 0, which the official
            code asks a judge (:func:`hallusionbench_same_prompt`); None where not known. Only the diagnosis needs it.
        per_category: also give a_acc, q_acc and f_acc of each category and sub-category that occurs, as "VD/a_acc" or
            "VD_math/a_acc".

    Returns:
        Scalars in [0, 1], but for yes_bias_diff; 0 where a denominator is 0. The class documents each.

    Raises:
        ValueError: if the lengths differ, a row is malformed, texts and verdicts are mixed, or a name is unknown.

    >>> plain = HallusionRow("VD", "math", "1", "0", "0", "0", gt_answer="1")
    >>> edited = HallusionRow("VD", "math", "2", "0", "1", "0", gt_answer="0")
    >>> scores = hallusionbench(["Yes.", "Yes, they are."], [plain, edited])
    >>> {name: scores[name].item() for name in ("a_acc", "q_acc", "f_acc", "yes_bias_diff")}
    {'a_acc': 0.5, 'q_acc': 0.0, 'f_acc': 0.5, 'yes_bias_diff': 0.5}
    """
    table = hallusionbench_table(preds, target, check_variant(variant, parser), same)
    return _hallusionbench_scores(table, variant, per_category)
