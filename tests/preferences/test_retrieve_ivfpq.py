import hashlib
from pathlib import Path

import numpy as np
import pytest

from realign_lightning.preferences.retrieval.ivfpq import IVFPQ, IVFPQIndex
from realign_lightning.preferences.retrieval.retriever import Retriever
from realign_lightning.preferences.retrieval.store import EmbeddingStore, StoredVectors

COUNT, DIMENSION = 3000, 32
SETTINGS = IVFPQ(lists=24, probes=6, candidates=60, slice_size=700)


def clustered():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((40, DIMENSION))[generator.integers(0, 40, COUNT)]
    rows += 0.5 * generator.standard_normal((COUNT, DIMENSION))
    rows[1500:1600] = rows[100:200]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def contents():
    return {f"image{number:04}": hashlib.sha256(str(number).encode()).hexdigest() for number in range(COUNT)}


@pytest.fixture
def store(tmp_path, contents):
    store = EmbeddingStore(tmp_path, {"encoder": "test"})
    # Stored in another order than that of the ids.
    order = np.random.default_rng(1).permutation(COUNT)
    keys = list(contents.values())
    store.add([keys[row] for row in order], clustered()[order], list(range(COUNT)))
    store.close()
    store.refresh()
    return store


def vectors_of(store, contents):
    return StoredVectors(store, list(contents.values()))


def test_with_everything_looked_into_it_is_exact(store, contents):
    everything = IVFPQ(lists=24, probes=24, candidates=COUNT, slice_size=700)
    queries = list(contents)[:200]
    exact = dict(Retriever(hash_distance=None).neighbours(store, contents, queries))
    approximate = Retriever(hash_distance=None, flat_limit=COUNT - 1, ivfpq=everything)
    assert dict(approximate.neighbours(store, contents, queries)) == exact


def test_scores_are_exact_and_most_neighbours_are_found(store, contents):
    found = dict(Retriever(hash_distance=None, flat_limit=1, ivfpq=SETTINGS).neighbours(store, contents))
    exact = dict(Retriever(hash_distance=None).neighbours(store, contents))
    wide = clustered().astype(np.float64)
    hits = 0
    for own, row in found.items():
        assert len(row) == 10
        for other in row:
            product = wide[int(own[5:])] @ wide[int(other.image_id[5:])]
            assert other.score == float(np.float32(product))
        assert sorted(row, key=lambda other: (-other.score, other.image_id)) == row
        hits += len({*row} & {*exact[own]})
    assert hits / (10 * COUNT) > 0.9


def test_results_do_not_depend_on_what_is_searched_together(store, contents):
    retriever = Retriever(flat_limit=1, ivfpq=SETTINGS)
    ids = list(contents)[:150]
    together = dict(retriever.neighbours(store, contents, ids))
    for size in (1, 19, 20, 21):
        for start in range(0, 40, size):
            part = ids[start : start + size]
            assert dict(retriever.neighbours(store, contents, part)) == {name: together[name] for name in part}


def test_a_build_that_was_stopped_goes_on(store, contents, tmp_path, monkeypatch):
    vectors = vectors_of(store, contents)
    compressed = []
    compress = IVFPQIndex._compress

    def compress_two(self, rows, path):
        if len(compressed) == 2:
            raise KeyboardInterrupt
        compressed.append(path.name)
        compress(self, rows, path)

    monkeypatch.setattr(IVFPQIndex, "_compress", compress_two)
    with pytest.raises(KeyboardInterrupt):
        IVFPQIndex(tmp_path, vectors, SETTINGS)
    assert compressed == [f"slice-{start:012}.faiss" for start in (0, 700)]

    def compress_and_tell(self, rows, path):
        compressed.append(path.name)
        compress(self, rows, path)

    monkeypatch.setattr(IVFPQIndex, "_compress", compress_and_tell)
    monkeypatch.setattr(IVFPQIndex, "_train", lambda self: None)
    index = IVFPQIndex(tmp_path, vectors, SETTINGS)
    assert compressed == [f"slice-{start:012}.faiss" for start in range(0, COUNT, 700)]
    assert sorted(path.name for path in index.folder.iterdir()) == ["merged", "trained"]
    assert not list(Path(tmp_path).rglob(".*"))
    monkeypatch.undo()
    at_once = IVFPQIndex(tmp_path / "other", vectors, SETTINGS)
    queries = clustered()[:50]
    for one, other in zip(index.search(queries, 40), at_once.search(queries, 40), strict=True):
        assert one.tolist() == other.tolist()

    def never(self):
        raise AssertionError("built again")

    monkeypatch.setattr(IVFPQIndex, "_build", never)
    again = IVFPQIndex(tmp_path, vectors, SETTINGS)
    assert again.search(queries, 40).rows.tolist() == index.search(queries, 40).rows.tolist()


def test_other_images_make_another_index(store, contents, tmp_path):
    some = dict(list(contents.items())[:1000])
    small = IVFPQIndex(tmp_path, vectors_of(store, some), SETTINGS)
    large = IVFPQIndex(tmp_path, vectors_of(store, contents), SETTINGS)
    assert small.folder != large.folder
    assert (len(small), len(large)) == (1000, COUNT)


def test_memory_is_that_of_the_codes(store, contents, tmp_path):
    """Codes of 4 bytes and ids of 8; lists grow by powers of two on disk, so up to twice that, and the clusters."""
    index = IVFPQIndex(tmp_path, vectors_of(store, contents), SETTINGS)
    assert index.settings.code_bytes == DIMENSION // 8
    clusters = 24 * DIMENSION * 4 + 4 * 256 * 8 * 4
    assert COUNT * 12 <= index.disk_bytes - clusters < 3 * COUNT * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes"),
        ({"lists": 0}, "lists"),
        ({"candidates": -1}, "candidates"),
        ({"code_bytes": 5}, "code_bytes"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IVFPQ(**settings).for_vectors(1000, 32)


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match="raise `flat_limit`"):
        IVFPQ().for_vectors(255, 32)
