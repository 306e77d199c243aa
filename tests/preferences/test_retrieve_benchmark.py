"""The retrieval benchmark on few vectors: what it compares is there, and its formulas are right."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from benchmarks.retrieval import PROBES, main, make_vectors, predicted_bytes
from realign_lightning.preferences.retrieval.search import faiss


@pytest.fixture(scope="module")
def printed_and_found(tmp_path_factory):
    path = tmp_path_factory.mktemp("retrieval") / "found.json"
    threads = torch.get_num_threads(), faiss().omp_get_max_threads()
    arguments = ["--product", "--count", "300", "--recall", "2000", "4000", "--dimension", "64", "--queries", "50"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            assert main([*arguments, "--repeats", "1", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads[0])
        faiss().omp_set_num_threads(threads[1])
    return output.getvalue(), path


def test_figures(printed_and_found):
    printed, path = printed_and_found
    found = json.loads(path.read_text())
    product = found["product"]
    assert product["ratio"] == pytest.approx(product["medians"]["retrieval"] / product["medians"]["product"])
    assert product["gflops"]["product"] == pytest.approx(2 * 300**2 * 64 / product["medians"]["product"] / 1e9)
    for point, count in zip(found["recall"], (2000, 4000), strict=True):
        recalls = [step["recall"] for step in point["curve"]]
        assert [step["probes"] for step in point["curve"]] == list(PROBES)
        # More clusters looked into find more, up to what the codes let through.
        assert recalls[-1] > 0.9
        assert recalls[-1] > recalls[0]
        assert point["exact"]["bytes"] == count * 64 * 4
        # The formula rounds no number of clusters to a power of two: at most sqrt(2) off.
        clusters = 4 * 64 * 4 * np.sqrt(count)
        assert abs(point["bytes"] - predicted_bytes(count, 64, 8)) < 0.5 * clusters + 20_000
    assert "| 4 000 " in printed


def test_plot(printed_and_found):
    _, path = printed_and_found
    assert main(["--draw", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_vectors_are_normalised_and_clustered():
    vectors = np.concatenate(list(make_vectors(1000, 64)))
    assert vectors.shape == (1000, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(1000), abs=1e-5)
    products = vectors @ vectors.T - 2 * np.eye(1000)
    assert np.median(products.max(axis=1)) > np.median(products) + 0.5
