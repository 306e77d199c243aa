"""Nearest neighbours by inner product, independent of batches, threads and ranks to the last bit and the last tie.

A fast float32 search proposes candidates. What is taken from them is scored again in float64, always in the same way,
and ordered by (score, position). For an exact index a bound on float32 rounding then tells whether anything that was
not proposed could still belong to the result; where it could, that query is searched deeper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from realign_lightning.preferences.near_duplicates import are_near_duplicates
from realign_lightning.preferences.retrieval.store import Floats, Rows

_BLOCK = 4096
"""Queries that are searched at a time."""

_SPARE = 22
"""Candidates beyond ``top_k`` of the first search."""

_DEEPER = 16
"""How many times more candidates the next search proposes to queries that need them."""

_RESULTS = 1 << 23
"""Candidates that are held at a time: fewer queries are searched at once where each has many."""

_PAIRS = 256
"""Pairs that are scored at a time: they stay in a core's cache."""


def faiss() -> Any:
    """The package faiss, imported when it is first needed.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import faiss as module
    except ModuleNotFoundError as error:
        raise ImportError("Retrieving images needs the package faiss: pip install faiss-cpu.") from error
    return module


class Candidates(NamedTuple):
    """What a search proposes.

    Args:
        rows: (Q, K) positions, -1 where there are fewer than K.
        scores: (Q, K) float32, by which they were found, best first.
    """

    rows: Rows
    scores: Floats


class VectorIndex(ABC):
    """Vectors that can be searched by inner product."""

    error: float | None
    """Most that scores of :meth:`search` are off; None where that is not known, and neighbours may be missed."""

    @abstractmethod
    def __len__(self) -> int:
        """Vectors."""

    @abstractmethod
    def search(self, queries: Floats, depth: int) -> Candidates:
        """Propose the ``depth`` best of all vectors for each query.

        Args:
            queries: (Q, D) float32.
            depth: K, at most the number of vectors.
        """

    @abstractmethod
    def take(self, rows: Rows) -> Floats:
        """Vectors at some positions, (N, D) float32."""

    def depths(self, top_k: int) -> Iterator[int]:
        """Depths of search to try one after the other.

        Args:
            top_k: neighbours that are wanted.
        """
        depth = top_k + _SPARE
        while depth < len(self):
            yield depth
            depth *= _DEEPER
        yield len(self)


class ExactIndex(VectorIndex):
    """All vectors in memory, each compared with every query (FAISS's flat search).

    Args:
        vectors: (N, D) float32, L2-normalised.
    """

    def __init__(self, vectors: Floats) -> None:
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.error = rounding_bound(vectors.shape[1])

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: Floats, depth: int) -> Candidates:
        """See :meth:`VectorIndex.search`."""
        scores, rows = faiss().knn(queries, self._vectors, depth, metric=faiss().METRIC_INNER_PRODUCT)
        return Candidates(rows, scores)

    def take(self, rows: Rows) -> Floats:
        """See :meth:`VectorIndex.take`."""
        return self._vectors[rows]


@dataclass(frozen=True)
class Rules:
    """What counts as a neighbour.

    Args:
        top_k: how many are wanted.
        min_similarity: neighbours are at least this similar.
        max_similarity: neighbours are less similar than this; None for no end.
        hash_distance: images whose perceptual hashes differ in at most so many bits are near-duplicates and no
            neighbours; None compares no hashes.

    Raises:
        ValueError: for a ``top_k`` below 1, an empty band, or a distance outside 0 to 64.
    """

    top_k: int = 10
    min_similarity: float = -1.0
    max_similarity: float | None = None
    hash_distance: int | None = None

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"Expected `top_k` to be at least 1, got {self.top_k}.")
        if self.max_similarity is not None and not self.min_similarity < self.max_similarity:
            raise ValueError(
                f"Expected `min_similarity` below `max_similarity`, got {self.min_similarity} and "
                f"{self.max_similarity}."
            )
        if self.hash_distance is not None and not 0 <= self.hash_distance <= 64:
            raise ValueError(f"Expected `hash_distance` from 0 to 64 bits, or null, got {self.hash_distance}.")


@dataclass(frozen=True)
class Names:
    """What tells vectors apart, beside their values.

    Args:
        records: (N,) equal for vectors of one image, which are never neighbours of each other.
        hashes: (N,) perceptual hashes; None where none are compared.
    """

    records: Rows
    hashes: npt.NDArray[np.uint64] | None = None


class Nearest(NamedTuple):
    """Neighbours of some queries.

    Args:
        rows: (Q, top_k) positions, best first; -1 where there are fewer.
        scores: (Q, top_k) float32, inner products; -inf where there are fewer.
    """

    rows: Rows
    scores: Floats


def rounding_bound(dimension: int) -> float:
    """Most that a float32 inner product of two normalised vectors is off, in whatever order it was added up.

    D u / (1 - D u) with u = 2**-24, times the sum of the absolute products, which is at most 1 (N. Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1); some units more for the rounding of the exact score to
    float32 and for lengths that are not quite 1.

    Args:
        dimension: D.

    >>> round(rounding_bound(768), 6)
    4.7e-05
    """
    terms = (dimension + 8) * 2.0**-24
    return 1.01 * terms / (1 - terms)


def exact_scores(left: Floats, left_rows: Rows, right: VectorIndex, right_rows: Rows) -> Floats:
    """Inner products of pairs, the same to the last bit whatever other pairs are in the batch.

    Products of two float32 numbers are exact in float64. They are added in float64, in an order that depends on the
    dimension alone, and the sum is rounded to float32 once.

    Args:
        left: (Q, D) float32.
        left_rows: (M,) rows of ``left``.
        right: vectors.
        right_rows: (M,) rows of ``right``.

    Returns:
        (M,) float32.
    """
    scores: Floats = np.empty(len(left_rows), dtype=np.float32)
    for start in range(0, len(scores), _PAIRS):
        part = slice(start, start + _PAIRS)
        products = left[left_rows[part]].astype(np.float64)
        products *= right.take(right_rows[part])
        scores[part] = products.sum(axis=1)
    return scores


def nearest(index: VectorIndex, queries: Floats, rules: Rules) -> Nearest:
    """The best of all vectors for each query.

    Args:
        index: where to look.
        queries: (Q, D) float32.
        rules: how many, and in which band; hashes are not compared.
    """
    return _search(index, queries, np.full(len(queries), -1, dtype=np.int64), rules, Names(np.arange(len(index))))


def neighbours_of(index: VectorIndex, positions: Rows, rules: Rules, names: Names) -> Iterator[Nearest]:
    """Neighbours of vectors that are in the index themselves.

    Args:
        index: where to look.
        positions: (Q,) of the queries in the index.
        rules: what counts as a neighbour.
        names: what tells the vectors apart.

    Yields:
        Neighbours of up to 4,096 queries at a time, in order.
    """
    for start in range(0, len(positions), _BLOCK):
        block = positions[start : start + _BLOCK]
        yield _search(index, index.take(block), block, rules, names)


def _search(index: VectorIndex, queries: Floats, own: Rows, rules: Rules, names: Names) -> Nearest:
    """Search deeper and deeper, until every query has all its neighbours."""
    found = Nearest(
        np.full((len(queries), rules.top_k), -1, dtype=np.int64),
        np.full((len(queries), rules.top_k), -np.inf, dtype=np.float32),
    )
    pending = np.arange(len(queries))
    for depth in index.depths(rules.top_k):
        at_once = max(1, _RESULTS // depth)
        unfinished = []
        for start in range(0, len(pending), at_once):
            part = pending[start : start + at_once]
            candidates = index.search(queries[part], depth)
            best, is_complete = _select(index, queries[part], own[part], candidates, rules, names)
            found.rows[part], found.scores[part] = best
            unfinished.append(part[~is_complete])
        pending = np.concatenate(unfinished) if unfinished else pending
        if not len(pending):
            break
    return found


def _select(
    index: VectorIndex, queries: Floats, own: Rows, candidates: Candidates, rules: Rules, names: Names
) -> tuple[Nearest, npt.NDArray[np.bool_]]:
    """The best candidates by exact score, and for which queries no vector but the candidates could be among them."""
    rows, rough = candidates
    allowed = _are_others(rows, own, rules, names)
    # Float64 scalars: numpy would round plain floats to float32 before it compares.
    lowest = np.float64(rules.min_similarity)
    highest = np.float64(np.inf if rules.max_similarity is None else rules.max_similarity)
    if index.error is not None:
        error = np.float64(index.error)
        low, high = rough - error, rough + error
        allowed &= (low < highest) & (high >= lowest)
        # What is certainly below top_k others needs no exact score.
        certain = np.where(allowed & (high < highest) & (low >= lowest), low, -np.inf)
        allowed &= high >= _kth_largest(certain, rules.top_k)[:, None]
    scores: Floats = np.full(rows.shape, -np.inf, dtype=np.float32)
    left, column = np.nonzero(allowed)
    scores[left, column] = exact_scores(queries, left, index, rows[left, column])
    scores[~((scores >= lowest) & (scores < highest))] = -np.inf
    best = _best(rows, scores, rules.top_k)
    last = best.scores[:, -1]
    if rows.shape[1] >= len(index):
        return best, np.ones(len(rows), dtype=np.bool_)
    if index.error is None:
        return best, (last > -np.inf) | (rows[:, -1] < 0)
    unseen = rough[:, -1] + np.float64(index.error)
    return best, (last > unseen) | (unseen < lowest)


def _are_others(rows: Rows, own: Rows, rules: Rules, names: Names) -> npt.NDArray[np.bool_]:
    """Which candidates show another image than the query."""
    others: npt.NDArray[np.bool_] = (names.records[rows] != names.records[own][:, None]) | (own < 0)[:, None]
    others &= rows >= 0
    if rules.hash_distance is not None and names.hashes is not None:
        others &= ~are_near_duplicates(names.hashes[own][:, None], names.hashes[rows], rules.hash_distance)
    return others


def _kth_largest(values: Floats, k: int) -> Floats:
    """(Q,) of (Q, K); -inf where there are fewer."""
    if values.shape[1] < k:
        return np.full(len(values), -np.inf, dtype=values.dtype)
    return np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]


def _best(rows: Rows, scores: Floats, top_k: int) -> Nearest:
    """Highest scores first; of equal ones the lowest position."""
    by_row = np.argsort(rows, axis=1)
    rows, scores = np.take_along_axis(rows, by_row, axis=1), np.take_along_axis(scores, by_row, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    missing = top_k - rows.shape[1]
    if missing > 0:
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    return Nearest(np.where(scores > -np.inf, rows, -1), scores)
