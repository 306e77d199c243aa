"""POPE as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from realign_lightning.metrics.functional.pope import PopeParser, _pope_compute, _pope_update, check_parser


class POPE(Metric):
    """Polling-based object probing (Li et al. 2023, arXiv 2305.10355): does a model say yes to absent objects?

    ``update`` and ``forward`` take ``preds``, the answers as generated, and ``target``, the right answers "yes" or
    "no", both lists of texts. ``compute`` returns a dict of scalars, "yes" being the positive class:

    * ``accuracy``, ``precision``, ``recall``, ``f1``: 0 where the reference divides by zero;
    * ``yes_ratio``: share of answers read as yes;
    * ``unparsed``: share of answers in which neither "yes" nor "no" occurs as a word, in any case. The official rule
      still reads each of them as yes or no (mostly as yes), so a high share means that the other numbers say little.

    Use one instance per set of questions; the paper reports random, popular and adversarial apart.

    Args:
        parser: how answers are read. ``official`` is the rule of AoiDragon/POPE; see
            :func:`~realign_lightning.metrics.functional.pope.official_verdict`.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the parser is unknown; by ``update`` if the lengths differ or a label is neither yes nor no.

    >>> metric = POPE()
    >>> metric.update(["Yes.", "There is no cat."], ["yes", "no"])
    >>> metric.update(["A cat sits there."], ["no"])
    >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
    {'accuracy': 0.67, 'precision': 0.5, 'recall': 1.0, 'f1': 0.67, 'yes_ratio': 0.67, 'unparsed': 0.33}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    counts: Tensor
    unparsed: Tensor

    def __init__(self, parser: PopeParser = "official", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_parser(parser)
        self.parser: PopeParser = parser
        self.add_state("counts", default=torch.zeros(2, 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("unparsed", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[str], target: Sequence[str]) -> None:
        """Count a batch of answers.

        Args:
            preds: answers as generated.
            target: the right answers, "yes" or "no".
        """
        counts, unparsed = _pope_update(preds, target, self.parser)
        self.counts += counts.to(self.counts.device)
        self.unparsed += unparsed

    def compute(self) -> dict[str, Tensor]:
        """The scores of all answers so far."""
        return _pope_compute(self.counts, self.unparsed)

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
