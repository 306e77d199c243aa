"""HallusionBench as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from realign_lightning.metrics.counted import BenchmarkMetric
from realign_lightning.metrics.functional.hallusionbench import (
    ENTRY_WIDTH,
    HallusionParser,
    HallusionRow,
    HallusionVariant,
    _hallusionbench_scores,
    check_variant,
    hallusionbench_table,
)


class HallusionBench(BenchmarkMetric):
    """Language hallucination and visual illusion (Guan et al. 2024, arXiv 2310.14566), by yes-or-no questions.

    ``update`` and ``forward`` take ``preds``, the answers (or a judge's replies, or verdicts), and ``target``, a
    :class:`~realign_lightning.metrics.functional.hallusionbench.HallusionRow` for each. A question is asked for several
    figures (a pair), and several questions are asked for a figure. ``compute`` returns a dict of scalars:

    * ``a_acc``: questions answered correctly / questions;
    * ``q_acc``: pairs with a correct answer for every figure / pairs;
    * ``f_acc``: figures with every question answered correctly / figures;
    * ``easy``, ``hard``: as ``q_acc`` without edited figures, and with edited figures alone;
    * ``consistency_inconsistent``, ``consistency_wrong``: figures with some, and with no, question answered correctly;
      with ``f_acc`` they make 1;
    * ``figure_score``: share of correct answers of a figure, averaged over figures;
    * ``yes_bias_diff``: share of answers that count as yes, less the share of questions where yes is right, in
      [-1, 1]; as in the official code, a wrong answer counts as the opposite of the right one;
    * ``yes_bias_fp``: share of the wrong answers that are to questions where no is right;
    * ``language_hallucination``, ``visual_illusion``, ``mixed``: the official diagnosis of the wrong answers, as
      shares of those that can be diagnosed;
    * ``undiagnosed``: share of the wrong answers for which ``same``, or the answer for figure 0, is missing;
    * ``unclear``: answers with the verdict unclear / questions;
    * ``unparsed``: share of texts that were not understood. By a rule: neither "yes" nor "no" occurs as a word, or,
      for ``vlmevalkit``, both do. By the judge: its reply holds neither "correct" nor "unclear". A high share means
      that the other numbers say little.

    Shares are 0 where the denominator is 0. Groups reach across batches and processes, so the state holds a few
    integers per question. A question that comes twice, as samplers pad, counts once; if its verdicts differ, the
    worst counts, and a warning says so; of equal verdicts, that whose ``same`` is None, then False.

    Args:
        variant: whose rules hold; see :func:`~realign_lightning.metrics.functional.hallusionbench.hallusionbench`.
        parser: how texts are read, or None for the variant's own.
        per_category: also give ``a_acc``, ``q_acc`` and ``f_acc`` of each category and sub-category that occurs.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if a name is unknown; by ``update`` if the lengths differ, a row is malformed, or texts and
            verdicts are mixed.

    >>> from realign_lightning.metrics.functional.hallusionbench import HallusionRow
    >>> metric = HallusionBench()
    >>> metric.update(["Yes."], [HallusionRow("VD", "math", "1", "0", "0", "0", gt_answer="1")])
    >>> metric.update(["Yes."], [HallusionRow("VD", "math", "2", "0", "1", "0", gt_answer="0")])
    >>> {name: value.item() for name, value in metric.compute().items() if name.endswith("acc")}
    {'a_acc': 0.5, 'q_acc': 0.0, 'f_acc': 0.5}
    """

    higher_is_better = True

    table: list[Tensor] | Tensor

    def __init__(
        self,
        variant: HallusionVariant = "vlmevalkit",
        parser: HallusionParser | None = None,
        per_category: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.parser: HallusionParser = check_variant(variant, parser)
        self.variant: HallusionVariant = variant
        self.per_category = per_category
        self.add_table("table", ENTRY_WIDTH)

    def update(
        self,
        preds: Sequence[str | int],
        target: Sequence[HallusionRow],
        same: Sequence[bool | int | None] | None = None,
    ) -> None:
        """Take a batch of answers.

        Args:
            preds: texts, or verdicts as integers: 0 incorrect, 1 correct, 2 unclear.
            target: the question of each.
            same: whether each answer agrees with that for figure 0, or None where not known.
        """
        self.add_rows("table", hallusionbench_table(preds, target, self.parser, same))

    def compute(self) -> dict[str, Tensor]:
        """The scores of all answers so far."""
        return _hallusionbench_scores(self.table_of("table"), self.variant, self.per_category)

    @staticmethod
    def _drawn_names(names: Iterable[str]) -> list[str]:
        """All but ``yes_bias_diff``, which is no share."""
        return [name for name in names if name != "yes_bias_diff"]
