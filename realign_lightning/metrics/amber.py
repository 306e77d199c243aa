"""AMBER as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from realign_lightning.metrics.counted import CountedMetric
from realign_lightning.metrics.functional.amber import (
    _ANSWER_WIDTH,
    _DESCRIPTION_WIDTH,
    EPS,
    AmberChecker,
    _amber_compute,
    _amber_discriminative_compute,
    _amber_generative_compute,
    amber_counts,
    amber_discriminative_counts,
    amber_generative_counts,
)

AmberTask = Literal["all", "generative", "discriminative"]
"""Which part of AMBER is scored."""

_WIDTHS: Mapping[AmberTask, int] = {
    "all": _DESCRIPTION_WIDTH + _ANSWER_WIDTH,
    "generative": _DESCRIPTION_WIDTH,
    "discriminative": _ANSWER_WIDTH,
}
_COMPUTE = {
    "all": _amber_compute,
    "generative": _amber_generative_compute,
    "discriminative": _amber_discriminative_compute,
}
_PLOTTED = ("chair", "cover", "hal", "cog", "accuracy", "precision", "recall", "f1", "unparsed", "amber")


class AMBER(CountedMetric):
    """AMBER (Wang et al. 2023, arXiv 2311.07397): what does a model describe, and affirm, that is not in the image?

    ``update`` and ``forward`` take ``preds``, the descriptions and answers as generated, and ``target``, for each its
    entry of the official ``annotations.json``: a dict with "type" and "truth", for descriptions also "hallu".
    ``compute`` returns a dict of scalars in [0, 1]. From the descriptions ("generative"):

    * ``chair``: nouns that are hallucinated / nouns;
    * ``cover``: annotated objects that are named / annotated objects;
    * ``hal``: one minus descriptions without a hallucinated noun / descriptions;
    * ``cog``: likely hallucinations that are named / likely hallucinations annotated.

    From the answers ("discriminative"), "no" being the positive class and anything but "Yes" and "No" wrong:

    * ``accuracy``, ``precision``, ``recall``, and ``f1`` from the latter two rounded to a tenth of a percent;
    * ``unparsed``: share of answers that are neither "Yes" nor "No";
    * the same five for existence, attribute, state, number, action and relation: ``existence_accuracy`` and so on.

    From both ("all"): ``amber``, the paper's AMBER Score, (1 - chair + f1) / 2; 0 until both have been seen.
    ``round(100 * x, 1)`` is what the reference prints. Scores are 0 where nothing was counted.

    Args:
        task: the part that is scored; entries of the other are refused.
        checker: the rules for descriptions, with the similarity of words; not needed for "discriminative".
        eps: added to every denominator; 0.001 is the reference's. See
            :func:`~realign_lightning.metrics.functional.amber.amber_generative` for lmms-eval's, and
            :func:`~realign_lightning.metrics.functional.amber.amber_discriminative` for the attributes and F1.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the task is unknown or lacks its checker; by ``update`` if the lengths differ, an entry is no
            annotation of the task, or an object is no word of the checker's ``relation``.

    >>> from realign_lightning.metrics.functional.amber import exact_similarity
    >>> checker = AmberChecker({"dog": [], "cat": []}, similarity=exact_similarity, nouns=str.split)
    >>> metric = AMBER(checker=checker, eps=0)
    >>> metric.update(["a dog and a cat"], [{"type": "generative", "truth": ["dog"], "hallu": ["cat"]}])
    >>> metric.update(["No", "No."], [{"type": "relation", "truth": "no"}, {"type": "relation", "truth": "no"}])
    >>> scores = metric.compute()
    >>> {name: round(scores[name].item(), 2) for name in ("chair", "cover", "precision", "recall", "f1", "amber")}
    {'chair': 0.5, 'cover': 1.0, 'precision': 1.0, 'recall': 0.5, 'f1': 0.67, 'amber': 0.58}
    """

    higher_is_better = True

    def __init__(
        self, task: AmberTask = "all", checker: AmberChecker | None = None, eps: float = EPS, **kwargs: Any
    ) -> None:
        if task not in get_args(AmberTask):
            raise ValueError(f"Expected `task` to be one of {get_args(AmberTask)}, got {task!r}.")
        if checker is None and task != "discriminative":
            raise ValueError(
                f"Expected `checker`, an AmberChecker made of relation.json, for task {task!r}, got None: give one, or "
                "score answers alone with task 'discriminative'."
            )
        super().__init__(_WIDTHS[task], **kwargs)
        self.task: AmberTask = task
        self.checker = checker
        self.eps = eps

    def update(
        self, preds: Sequence[str], target: Sequence[Mapping[str, Any]], ids: Sequence[int] | None = None
    ) -> None:
        """Count a batch of descriptions and answers.

        Args:
            preds: as generated.
            target: the annotation of each.
            ids: numbers of the examples. What comes again with its number, as a distributed sampler pads, counts once
                (:meth:`compute` says which of different results is taken); None counts everything.
        """
        self._count(self._counts(preds, target), ids)

    def _counts(self, preds: Sequence[str], target: Sequence[Mapping[str, Any]]) -> Tensor:
        if self.task == "discriminative" or self.checker is None:
            return amber_discriminative_counts(preds, target)
        count = amber_counts if self.task == "all" else amber_generative_counts
        return count(preds, target, self.checker)

    def _finish(self, counts: Tensor) -> dict[str, Tensor]:
        return _COMPUTE[self.task](counts, self.eps)

    @staticmethod
    def _drawn_names(names: Iterable[str]) -> list[str]:
        """All but the scores by kind of question."""
        return [name for name in _PLOTTED if name in names]
