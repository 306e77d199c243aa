"""MMHal-Bench as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from realign_lightning.metrics.counted import CountedMetric
from realign_lightning.metrics.functional.mmhal import _mmhal_compute, mmhal_counts


class MMHal(CountedMetric):
    """Ratings of open answers (MMHal-Bench, Sun et al. 2023, arXiv 2309.14525): informative, and free of hallucination?

    ``update`` and ``forward`` take ``preds``, a judge's replies, and ``target``, for each the number of the question in
    the official file, counted from 0, or its type. ``compute`` returns a dict of scalars:

    * ``average_score``: mean rating, 0 to 6; a reply with no rating, or several, counts 0;
    * ``hallucination_rate``: share of ratings below 3, lower is better;
    * ``informativeness``: mean of the rating (0 to 2), or of what it is above 3 (3 to 6), as a share of 3: how much an
      answer tells, true or not (RLAIF-V reports 100 times this);
    * ``unparsed``: share of replies with no rating, or several;
    * ``score_attribute``, ``score_adversarial``, ``score_comparison``, ``score_counting``, ``score_relation``,
      ``score_environment``, ``score_holistic``, ``score_other``: mean rating by type of question.

    Values are 0 where the denominator is 0.

    Args:
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: by ``update`` if the lengths differ, a reply is no text, or a type is unknown.

    >>> metric = MMHal()
    >>> metric.update(["Rating: 6", "Rating: 1"], [0, 8])
    >>> scores = metric.compute()
    >>> scores["average_score"].item(), scores["hallucination_rate"].item(), scores["score_attribute"].item()
    (3.5, 0.5, 3.5)
    """

    higher_is_better = True
    plot_upper_bound: float = 6.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(mmhal_counts([]).shape[1], **kwargs)

    def update(self, preds: Sequence[str], target: Sequence[int | str], ids: Sequence[int] | None = None) -> None:
        """Count a batch of replies.

        Args:
            preds: the judge's replies.
            target: number or type of each question.
            ids: numbers of the examples. What comes again with its number, as a distributed sampler pads, counts once
                (:meth:`compute` says which of different results is taken); None counts everything.
        """
        self._count(mmhal_counts(preds, target), ids)

    def _finish(self, counts: Tensor) -> dict[str, Tensor]:
        return _mmhal_compute(counts)
