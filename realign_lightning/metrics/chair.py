"""CHAIR as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from realign_lightning.metrics.counted import CountedMetric
from realign_lightning.metrics.functional.captions import CaptionParser, ChairNormalizer
from realign_lightning.metrics.functional.chair import Targets, _chair_compute, chair_counts, count_columns
from realign_lightning.metrics.functional.coco import CocoObjects
from realign_lightning.metrics.lexicon import Lexicon


class CHAIR(CountedMetric):
    """Caption hallucination (Rohrbach et al. 2018, arXiv 1809.02156): which objects of a caption are not in the image?

    ``update`` and ``forward`` take ``preds``, a list of captions, and ``target``, the set of categories in each image
    (:func:`~realign_lightning.metrics.ground_truth` makes it from annotations). ``compute`` returns a dict of scalars:

    * ``chair_s``: captions with a hallucinated object / captions;
    * ``chair_i``: hallucinated mentions / mentions, counting every mention, not every object;
    * ``recall``: distinct objects mentioned and in the image / objects in the image, summed over captions;
    * ``mean_length``: words per caption, after names of several words are joined, punctuation included; with
      ``objhal`` pieces between single blanks. Longer captions hallucinate more, so compare ``chair_s`` at like length;
    * ``chair_s_refine``, with ``objhal`` alone: captions with a hallucinated object / captions that mention any object.

    Shares are 0 where the denominator is 0. Names elsewhere: OPERA's ``Len`` is ``mean_length`` / 100; of Object
    HalBench, ``obj_rec`` is ``recall``, ``avg_word_len`` is ``mean_length``, ``correct_rate`` is 1 - ``chair_s_refine``
    and ``object_correct_rate`` is 1 - ``chair_i``; lmms-eval multiplies by 100.

    Args:
        normalizer: how words are brought to the form in which they are looked up:

            * ``original`` is the published rule, a singular of every token; see
              :func:`~realign_lightning.metrics.functional.singularize.singularize` for its oddities;
            * ``opera`` takes WordNet's lemma by part of speech, as OPERA and lmms-eval do;
            * ``objhal`` takes WordNet's lemma of every token as a noun, as Object HalBench (RLAIF-V) does.

            The last two need NLTK and its data.
        synonyms: the names of the objects: a :class:`~realign_lightning.metrics.Lexicon`, the path of a list in the
            form of the official ``synonyms.txt``, or None for our list of the 80 COCO categories. Published numbers
            use the official list; those of ``objhal`` use RLAIF-V's ``synonyms_refine.txt``.
        ground_truth: the categories of each image id, as :class:`~realign_lightning.metrics.CocoObjects`; ``target`` is
            then a list of image ids.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the normaliser is unknown, or ``ground_truth`` was made with another parser; by ``update`` if the
            lengths differ or a target holds what is no category of the lexicon.
        KeyError: by ``update``, if ``ground_truth`` does not know an image id.
        ModuleNotFoundError: if the normaliser needs NLTK and it is not installed.
        LookupError: if the normaliser needs data of NLTK that are not found.

    >>> metric = CHAIR(synonyms=Lexicon({"zero": [], "one": [], "seven": []}))
    >>> metric.update(["A zero and two ones.", "A seven."], [{"zero"}, {"seven", "one"}])
    >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
    {'chair_s': 0.5, 'chair_i': 0.33, 'recall': 0.67, 'mean_length': 4.5}
    """

    higher_is_better = False

    def __init__(
        self,
        normalizer: ChairNormalizer = "original",
        synonyms: Lexicon | str | Path | None = None,
        ground_truth: Mapping[Any, Collection[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        parser = CaptionParser(synonyms, normalizer)
        if isinstance(ground_truth, CocoObjects):
            ground_truth.check_parser(parser)
        super().__init__(count_columns(parser), **kwargs)
        self.parser = parser
        self.ground_truth = ground_truth

    def update(
        self,
        preds: Sequence[str],
        target: Targets,
        objects: Sequence[Sequence[str]] | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Count a batch of captions.

        Args:
            preds: captions.
            target: the categories in each image, or image ids where the metric has a ``ground_truth``.
            objects: what a judge extracted from each caption, for ``objhal`` alone; see
                :func:`~realign_lightning.metrics.functional.chair_counts`.
            ids: numbers of the examples. What comes again with its number, as a distributed sampler pads, counts once
                (:meth:`compute` says which of different results is taken); None counts everything.
        """
        counts = chair_counts(preds, target, self.parser, ground_truth=self.ground_truth, objects=objects)
        self._count(counts, ids)

    def _finish(self, counts: Tensor) -> dict[str, Tensor]:
        return _chair_compute(counts)

    @staticmethod
    def _drawn_names(names: Iterable[str]) -> list[str]:
        """All but ``mean_length``, which is no share."""
        return [name for name in names if name != "mean_length"]
