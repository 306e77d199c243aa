"""Step 4 of building pairs: keep a completion only if it differs enough from the chosen response (section 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any


class Similarity(ABC):
    """Compares texts pairwise. Subclass it to bring your own."""

    @abstractmethod
    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Similarity of ``first[i]`` and ``second[i]``; 1 for equal texts."""


class WordOverlap(Similarity):
    """Shared words over all words, counted with repetition and whatever their case; needs no model.

    >>> WordOverlap().compare(["a red bus ."], ["a red cat ."])  # 3 shared of 5
    [0.6]
    """

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Jaccard index of the texts' words; two empty texts are equal."""
        return [self._overlap(one, other) for one, other in zip(first, second, strict=True)]

    @staticmethod
    def _overlap(one: str, other: str) -> float:
        ours, theirs = Counter(one.lower().split()), Counter(other.lower().split())
        union = (ours | theirs).total()
        return (ours & theirs).total() / union if union else 1.0


class SentenceSimilarity(Similarity):
    """Cosine of sentence embeddings, as in the paper (all-mpnet-base-v2).

    Args:
        model: folder or hub name of a sentence-transformers model.
        batch_size: sentences per forward pass.

    Raises:
        ImportError: without the ``build`` extra.
    """

    def __init__(self, model: str = "sentence-transformers/all-mpnet-base-v2", batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self._encoder: Any = None

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosine similarity of the embeddings."""
        if self._encoder is None:
            self._encoder = self._load()
        settings = {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": False}
        ours, theirs = (self._encoder.encode(list(texts), **settings) for texts in (first, second))
        return [float(value) for value in (ours * theirs).sum(axis=1)]

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "SentenceSimilarity needs sentence-transformers: install realign-lightning[build], or use WordOverlap."
            ) from error
        return SentenceTransformer(self.model)
