"""POPE as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from realign_lightning.metrics.counted import CountedMetric
from realign_lightning.metrics.functional.pope import (
    COUNTS,
    PopeParser,
    _pope_compute,
    _pope_compute_by_category,
    category_memberships,
    check_category_names,
    check_parser,
    pope_counts,
)


class POPE(CountedMetric):
    """Polling-based object probing (Li et al. 2023, arXiv 2305.10355): does a model say yes to absent objects?

    ``update`` and ``forward`` take ``preds``, the answers as generated, and ``target``, the right answers "yes" or
    "no", both lists of texts. ``compute`` returns a dict of scalars, "yes" being the positive class:

    * ``accuracy``, ``precision``, ``recall``, ``f1``: as the reference defines them, 0 where it divides by zero;
    * ``yes_ratio``: share of answers read as yes;
    * ``unparsed``: with ``lmms_eval`` and ``vlmevalkit``, share of answers that the parser itself cannot read. The
      other rules read every answer as yes or no (mostly as yes); for them, share of answers in which neither "yes" nor
      "no" occurs as a word, in any case. A high share means that the other numbers say little;
    * ``yes_ratio_of_ground_truth``, with ``lmms_eval`` only: share of labels that are yes, which lmms-eval prints as
      its yes ratio;
    * ``overall``, with ``vlmevalkit`` only: 100 times F1, the number that VLMEvalKit puts first.

    Numbers of two parsers cannot be compared: name the parser with the number. The paper reports random, popular and
    adversarial apart: use one instance per set of questions, or ``categories``.

    Args:
        parser: how answers are read; see :data:`~realign_lightning.metrics.functional.pope.PopeParser` for the
            projects, and :data:`~realign_lightning.metrics.functional.pope.PARSERS` for the rules.
        categories: names by which results are also given apart, as ``"<category>/f1"`` and so on. ``update`` then
            takes the category of each answer as a third list.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the parser or the names of categories are not valid; by ``update`` if the lengths differ, a
            label is neither yes nor no, or a category was not named.

    >>> metric = POPE()
    >>> metric.update(["Yes.", "There is no cat."], ["yes", "no"])
    >>> metric.update(["A cat sits there."], ["no"])
    >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
    {'accuracy': 0.67, 'precision': 0.5, 'recall': 1.0, 'f1': 0.67, 'yes_ratio': 0.67, 'unparsed': 0.33}
    >>> metric = POPE("vlmevalkit", categories=["random", "popular"])
    >>> metric.update(["Yes.", "Yes."], ["yes", "no"], ["random,popular", "popular"])
    >>> scores = metric.compute()
    >>> [round(scores[name].item(), 1) for name in ("overall", "random/overall", "popular/overall")]
    [80.0, 100.0, 66.7]
    """

    higher_is_better = True

    def __init__(self, parser: PopeParser = "official", categories: Sequence[str] | None = None, **kwargs: Any) -> None:
        check_parser(parser)
        if categories is not None:
            check_category_names(categories)
        super().__init__(max(len(categories or ()), 1) * len(COUNTS), **kwargs)
        self.parser: PopeParser = parser
        self.categories = tuple(categories or ())

    def update(
        self,
        preds: Sequence[str],
        target: Sequence[str],
        categories: Sequence[str] | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Count a batch of answers.

        Args:
            preds: answers as generated.
            target: the right answers, "yes" or "no".
            categories: the category of each answer, or several joined by commas, for each of which the answer counts,
                as in VLMEvalKit. To be given if and only if the metric was made with names of categories.
            ids: numbers of the examples. What comes again with its number, as a distributed sampler pads, counts once
                (:meth:`compute` says which of different results is taken); None counts everything.
        """
        counts = pope_counts(preds, target, self.parser)
        memberships = self._memberships(categories, len(preds))
        self._count((memberships[:, :, None] * counts[:, None, :]).flatten(1), ids)

    def _memberships(self, categories: Sequence[str] | None, rows: int) -> Tensor:
        """How often each row counts for each row of the state."""
        if self.categories and categories is None:
            raise ValueError(f"Expected `categories`, one per answer, of {self.categories}, got None.")
        if categories is None:
            return torch.ones(rows, 1, dtype=torch.long)
        if not self.categories:
            raise ValueError(
                "Expected no `categories`, because none were named: make the metric as "
                "POPE(categories=(...)) with all names, since ranks must agree on them."
            )
        return category_memberships(categories, self.categories, rows)

    def _finish(self, counts: Tensor) -> dict[str, Tensor]:
        if self.categories:
            by_category = counts.reshape(len(self.categories), len(COUNTS))
            return _pope_compute_by_category(by_category, self.parser, self.categories)
        return _pope_compute(counts, self.parser)

    @staticmethod
    def _drawn_names(names: Iterable[str]) -> list[str]:
        """All but ``overall``, which is a percentage."""
        return [name for name in names if name.rpartition("/")[2] != "overall"]
