"""MMHal-Bench as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from realign_lightning.metrics.functional.mmhal import _mmhal_compute, mmhal_counts


class MMHal(Metric):
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

    Values are 0 where the denominator is 0. Counts add up, so a question that a sampler pads in counts twice: let no
    sampler pad.

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

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 6.0

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=mmhal_counts([]).sum(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[int | str]) -> None:
        """Count a batch of replies.

        Args:
            preds: the judge's replies.
            target: number or type of each question.
        """
        self.counts += mmhal_counts(preds, target).sum(0).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """The scores of all replies so far."""
        return _mmhal_compute(self.counts)

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot one result or several.

        Args:
            val: what ``forward`` or ``compute`` returned, or a list of that; None plots ``compute()``.
            ax: a matplotlib axis to draw on.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self._plot(val, ax)
