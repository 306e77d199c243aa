"""Exact search against a full sort of float64 products: every neighbour, every tie."""

import numpy as np
import pytest

from realign_lightning.preferences.retrieval.search import (
    Candidates,
    ExactIndex,
    Names,
    Rules,
    exact_scores,
    nearest,
    neighbours_of,
    rounding_bound,
)


def normalised(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def noise(count, dimension, seed=0):
    return normalised(np.random.default_rng(seed).standard_normal((count, dimension)))


def brute_force(vectors, rules, records=None, hashes=None):
    """Rows and scores by a full sort, in Python and float64."""
    wide = vectors.astype(np.float64)
    scores = (wide @ wide.T).astype(np.float32)
    records = np.arange(len(vectors)) if records is None else records
    highest = np.inf if rules.max_similarity is None else rules.max_similarity
    found = []
    for own in range(len(vectors)):
        others = [
            (-float(scores[own, other]), other)
            for other in range(len(vectors))
            if records[other] != records[own]
            and rules.min_similarity <= float(scores[own, other]) < highest
            and not (
                rules.hash_distance is not None
                and hashes is not None
                and hashes[own]
                and hashes[other]
                and (int(hashes[own]) ^ int(hashes[other])).bit_count() <= rules.hash_distance
            )
        ]
        found.append([(row, -negative) for negative, row in sorted(others)[: rules.top_k]])
    return found


def search(vectors, rules, records=None, hashes=None, positions=None):
    names = Names(np.arange(len(vectors)) if records is None else records, hashes)
    positions = np.arange(len(vectors)) if positions is None else positions
    return [
        [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for block in neighbours_of(ExactIndex(vectors), positions, rules, names)
        for rows, scores in zip(block.rows.tolist(), block.scores.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("count", "dimension"), [(1, 4), (2, 4), (9, 5), (10, 768), (11, 1), (700, 96), (5000, 16)])
def test_every_neighbour_is_that_of_a_full_sort(count, dimension):
    """More than one block of queries, fewer images than k, one image."""
    vectors = noise(count, dimension)
    if count == 5000:
        rows = search(vectors, Rules())
        assert [len(row) for row in rows] == [10] * count
        sample = np.random.default_rng(1).choice(count, 50, replace=False)
        expected = (vectors[sample].astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
        for own, scores in zip(sample, expected, strict=True):
            order = sorted((-score, other) for other, score in enumerate(scores.tolist()) if other != own)
            assert rows[own] == [(other, -score) for score, other in order[:10]]
    else:
        assert search(vectors, Rules()) == brute_force(vectors, Rules())


def test_ties_across_the_kth_place():
    """Four halves with signs: all products are multiples of 1/4, so that hundreds tie for the tenth place."""
    generator = np.random.default_rng(0)
    vectors = np.zeros((900, 12), dtype=np.float32)
    for row in vectors:
        row[generator.choice(12, 4, replace=False)] = generator.choice([-0.5, 0.5], 4)
    expected = brute_force(vectors, Rules())
    tenth = [row[-1][1] for row in expected]
    products = vectors @ vectors.T
    assert np.median([(products[own] == score).sum() for own, score in enumerate(tenth)]) > 30
    assert search(vectors, Rules()) == expected


def test_planted_copies_and_almost_copies():
    """Copies tie to the last bit; changes in the last bits of float32 are told apart as float64 tells them."""
    base = noise(60, 96)
    last_bits = np.nextafter(base, np.float32(2))
    vectors = np.concatenate([base, base[::-1], last_bits, base[::2], np.repeat(base[:1], 80, axis=0)])
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    assert search(vectors, Rules()) == brute_force(vectors, Rules())


def test_all_vectors_equal():
    vectors = np.repeat(noise(1, 24), 300, axis=0)
    rows = search(vectors, Rules(top_k=3))
    assert [[row for row, _ in found] for found in rows[:3]] == [[1, 2, 3], [0, 2, 3], [0, 1, 3]]
    assert [row for row, _ in rows[299]] == [0, 1, 2]


@pytest.mark.parametrize(
    "rules",
    [
        Rules(top_k=7, min_similarity=0.3),
        Rules(top_k=7, max_similarity=0.25),
        Rules(top_k=7, min_similarity=-0.1, max_similarity=0.1),
        Rules(top_k=7, min_similarity=0.999),
        Rules(top_k=1, max_similarity=-0.2),
        Rules(top_k=5, hash_distance=2),
        Rules(top_k=50, hash_distance=64),
        Rules(top_k=5, hash_distance=0, max_similarity=0.6),
    ],
    ids=str,
)
def test_bands_and_hashes(rules):
    vectors = noise(400, 24)
    generator = np.random.default_rng(3)
    hashes = generator.integers(0, 2**6, 400).astype(np.uint64)
    records = generator.integers(0, 300, 400)
    assert search(vectors, rules, records, hashes) == brute_force(vectors, rules, records, hashes)


def test_band_ends_are_closed_below_and_open_above():
    vectors = np.array([[1, 0, 0], [0.5, 0.75, np.sqrt(1 - 0.8125)], [0.25, 0.5, np.sqrt(1 - 0.3125)]], np.float32)
    assert search(vectors, Rules())[0] == [(1, 0.5), (2, 0.25)]
    assert search(vectors, Rules(min_similarity=0.25, max_similarity=0.5))[0] == [(2, 0.25)]
    assert search(vectors, Rules(min_similarity=np.nextafter(0.25, 1), max_similarity=np.nextafter(0.5, 1)))[0] == [
        (1, 0.5)
    ]


def test_results_do_not_depend_on_what_is_searched_together():
    vectors = noise(3000, 768, seed=5)
    together = search(vectors, Rules())
    for size in (1, 7, 19, 20, 21, 333):
        parts = [np.arange(start, min(start + size, 340)) for start in range(0, 340, size)]
        alone = [row for part in parts for row in search(vectors, Rules(), positions=part)]
        assert alone == together[:340], size


def test_exact_scores_are_correctly_rounded_sums():
    """Against exact rational arithmetic."""
    from fractions import Fraction

    vectors = noise(40, 768)
    rows = np.arange(20)
    scores = exact_scores(vectors[:20], rows, ExactIndex(vectors), rows + 20)
    for row, score in zip(rows, scores, strict=True):
        exact = sum(
            Fraction(float(a)) * Fraction(float(b)) for a, b in zip(vectors[row], vectors[row + 20], strict=True)
        )
        assert float(score) == float(np.float32(float(exact)))


@pytest.mark.parametrize("dimension", [3, 96, 768, 4096])
def test_float32_products_stay_within_the_bound(dimension):
    vectors = np.concatenate([noise(150, dimension), normalised(np.ones((1, dimension)))])
    single = vectors @ vectors.T
    double = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    one_by_one = np.cumsum(vectors * vectors[:1], axis=1, dtype=np.float32)[:, -1]
    assert max(np.abs(single - double).max(), np.abs(one_by_one - double[0]).max()) < rounding_bound(dimension)


class Careless(ExactIndex):
    """Proposes in another order than that of the true scores, within the error that it admits."""

    def __init__(self, vectors, error):
        super().__init__(vectors)
        self.error = error

    def search(self, queries, depth):
        shift = np.random.default_rng(0).uniform(-self.error, self.error, (len(queries), len(self)))
        scores = (queries @ self._vectors.T + shift).astype(np.float32)
        rows = np.argsort(-scores, axis=1)[:, :depth]
        return Candidates(rows, np.take_along_axis(scores, rows, axis=1))


def test_the_error_that_an_index_admits_changes_nothing():
    vectors = noise(2000, 32)
    exact = nearest(ExactIndex(vectors), vectors[:100], Rules(top_k=5))
    careless = nearest(Careless(vectors, 0.1), vectors[:100], Rules(top_k=5))
    assert exact.rows.tolist() == careless.rows.tolist()
    assert exact.scores.tolist() == careless.scores.tolist()
    assert exact.rows[:, 0].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"min_similarity": 0.5, "max_similarity": 0.5}, "max_similarity"),
        ({"hash_distance": 65}, "hash_distance"),
        ({"hash_distance": -1}, "hash_distance"),
    ],
)
def test_impossible_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rules(**arguments)
