"""What finding similar images costs: exact search beside the bare matrix product, IVF-PQ beside exact search.

From the root of the repository:

    python -m benchmarks.retrieval --product --json product.json
    python -m benchmarks.retrieval --recall 100000 300000 1000000 --json recall.json --plot docs/images/retrieval.png
    python -m benchmarks.retrieval --draw recall.json --plot docs/images/retrieval.png

- ``--product``: the whole retrieval of 20,000 images among themselves, from the store on disk to named neighbours,
  beside the product of the same matrices by torch (in blocks into one buffer, nothing kept), in turns; medians.
- ``--recall``: for each number of vectors, how many of the ten nearest neighbours IVF-PQ finds by the number of
  clusters it looks into, and what index and search take. The vectors are synthetic: clusters of clusters in 48
  dimensions, turned into 768, with noise in all of them. Real embeddings are easier or harder; try yours.
- Memory of the exact search is that of the vectors; IVF-PQ's is what the index takes on disk, of which a search reads
  the lists that it looks into. Resident memory is what a search adds at its peak, pages of files included.

Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from benchmarks.measure import ResidentPeak, matmul_rate
from benchmarks.report import environment, table
from realign_lightning.preferences.retrieval.ivfpq import IVFPQ, IVFPQIndex
from realign_lightning.preferences.retrieval.retriever import Retriever
from realign_lightning.preferences.retrieval.search import faiss
from realign_lightning.preferences.retrieval.store import EmbeddingStore, StoredVectors

TOP_K = 10
PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Clusters that are looked into, for the curve of recall."""

_LATENT = 48
_PER_CLUSTER = 200
_PER_GROUP = 40
_GROUPS = 8
_SLICE = 50_000
_BLOCK = 4096


def make_vectors(count: int, dimension: int, seed: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """Synthetic embeddings, slice by slice: clusters of clusters of low dimension, and noise in every direction.

    Args:
        count: of vectors; clusters grow in number with it.
        dimension: of each.
        seed: of all of it.

    Yields:
        (up to 50,000, dimension) float32, L2-normalised.
    """
    generator = np.random.default_rng(seed)
    latent = min(_LATENT, dimension)
    turn = np.linalg.qr(generator.standard_normal((dimension, latent)))[0].T.astype(np.float32)
    clusters = max(1, count // _PER_CLUSTER)
    groups = generator.standard_normal((max(_GROUPS, clusters // _PER_GROUP), latent), dtype=np.float32)
    centres = groups[generator.integers(0, len(groups), clusters)]
    centres = centres + 0.7 * generator.standard_normal(centres.shape, dtype=np.float32)
    noise = 0.3 * math.sqrt(latent / dimension)
    for start in range(0, count, _SLICE):
        size = min(_SLICE, count - start)
        inside = centres[generator.integers(0, clusters, size)]
        inside = inside + 0.9 * generator.standard_normal(inside.shape, dtype=np.float32)
        vectors = inside @ turn + noise * generator.standard_normal((size, dimension), dtype=np.float32)
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@contextmanager
def filled_store(
    count: int, dimension: int, folder: Path | None = None
) -> Iterator[tuple[EmbeddingStore, dict[str, str]]]:
    """A store of synthetic embeddings, with the contents by name; removed in the end.

    Args:
        count: of vectors.
        dimension: of each.
        folder: where temporary files go.
    """
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        store = EmbeddingStore(Path(inside), {"encoder": "synthetic"})
        contents = {f"{row:09d}": hashlib.sha256(str(row).encode()).hexdigest() for row in range(count)}
        keys, hashes = list(contents.values()), np.random.default_rng(1).integers(1, 2**63, count)
        start = 0
        for vectors in make_vectors(count, dimension):
            end = start + len(vectors)
            store.add(keys[start:end], vectors, hashes[start:end].tolist())
            start = end
        store.close()
        store.refresh()
        yield store, contents


# ---- exact search beside the bare product


def measure_product(count: int, dimension: int, repeats: int) -> dict[str, Any]:
    """Seconds of the product of all vectors with all, and of their retrieval.

    Args:
        count: of vectors.
        dimension: of each.
        repeats: turns.
    """
    with filled_store(count, dimension) as (store, contents):
        keys = [contents[name] for name in sorted(contents)]
        vectors = torch.from_numpy(store.vectors(store.rows(keys)))
        works = {
            "product": lambda: _product(vectors),
            "product in numpy": lambda: _product_in_numpy(vectors.numpy()),
            "faiss flat": lambda: _flat(vectors.numpy()),
            "retrieval": lambda: sum(len(found) for _, found in Retriever(top_k=TOP_K).neighbours(store, contents)),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(repeats + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                # The first turn warms up.
                if turn:
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "count": count,
        "dimension": dimension,
        "seconds": times,
        "medians": medians,
        "gflops": {name: 2 * count * count * dimension / seconds / 1e9 for name, seconds in medians.items()},
        "ratio": medians["retrieval"] / medians["product"],
    }


def _product(vectors: torch.Tensor) -> None:
    buffer = torch.empty(min(_BLOCK, len(vectors)), len(vectors))
    for block in vectors.split(_BLOCK):
        torch.mm(block, vectors.T, out=buffer[: len(block)])


def _product_in_numpy(vectors: npt.NDArray[np.float32]) -> None:
    buffer = np.empty((min(_BLOCK, len(vectors)), len(vectors)), dtype=np.float32)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        np.matmul(block, vectors.T, out=buffer[: len(block)])


def _flat(vectors: npt.NDArray[np.float32]) -> None:
    index = faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    index.search(vectors, TOP_K + 1)


def product_table(found: Mapping[str, Any]) -> str:
    """Medians, in Markdown.

    Args:
        found: by :func:`measure_product`.
    """
    rows = [
        [
            name,
            f"{found['medians'][name]:.3f}",
            f"{min(seconds):.3f} - {max(seconds):.3f}",
            f"{found['gflops'][name]:.0f}",
            f"{found['medians'][name] / found['medians']['product']:.2f}",
        ]
        for name, seconds in found["seconds"].items()
    ]
    size = f"{found['count']:,} x {found['count']:,} x {found['dimension']}".replace(",", " ")
    return f"{size}\n\n" + table(["", "median s", "min - max", "GFLOP/s", "of the product"], rows)


# ---- IVF-PQ beside exact search


def measure_recall(
    count: int, dimension: int, queries: int, settings: IVFPQ, folder: Path | None = None
) -> dict[str, Any]:
    """Recall, time and memory of IVF-PQ and of exact search.

    Args:
        count: of vectors.
        dimension: of each.
        queries: of them that are searched for.
        settings: of the index; ``probes`` does not count.
        folder: where temporary files go.
    """
    with filled_store(count, dimension, folder) as (store, contents):
        names = sorted(contents)
        vectors = StoredVectors(store, [contents[name] for name in names])
        drawn = [names[row] for row in np.random.default_rng(2).choice(count, min(queries, count), replace=False)]
        _say(f"{count} vectors: exact search")
        start = time.perf_counter()
        exact = dict(Retriever(top_k=TOP_K).neighbours(store, contents, drawn))
        exact_seconds = time.perf_counter() - start
        _say(f"{count} vectors: building")
        start = time.perf_counter()
        index = IVFPQIndex(store.folder, vectors, settings)
        build_seconds = time.perf_counter() - start
        curve = []
        for probes in PROBES:
            if probes <= (index.settings.lists or 0):
                changed = replace(settings, probes=probes)
                retriever = Retriever(top_k=TOP_K, flat_limit=1, ivfpq=changed)
                # The first search opens the index and reads it from the disk.
                list(retriever.neighbours(store, contents, drawn[:64]))
                with ResidentPeak() as peak:
                    start = time.perf_counter()
                    found = dict(retriever.neighbours(store, contents, drawn))
                    seconds = time.perf_counter() - start
                hits = [len({*found[name]} & {*exact[name]}) / max(1, len(exact[name])) for name in drawn]
                curve.append(
                    {
                        "probes": probes,
                        "recall": statistics.fmean(hits),
                        "queries_per_second": len(drawn) / seconds,
                        "resident": peak.bytes,
                    }
                )
                _say(f"{count} vectors: {probes} probes, recall {curve[-1]['recall']:.3f}")
        return {
            "count": count,
            "dimension": dimension,
            "queries": len(drawn),
            "settings": asdict(index.settings),
            "exact": {"queries_per_second": len(drawn) / exact_seconds, "bytes": 4 * dimension * count},
            "build_seconds": build_seconds,
            "bytes": index.disk_bytes,
            "curve": curve,
        }


def recall_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Recall and cost of every number of vectors and of clusters looked into, in Markdown.

    Args:
        points: by :func:`measure_recall`.
    """
    header = [
        "vectors",
        "clusters",
        "looked into",
        "recall@10",
        "queries/s",
        "exact queries/s",
        "search adds MB",
        "index MB",
        "exact MB",
        "build s",
    ]
    rows = [
        [
            f"{point['count']:,}".replace(",", " "),
            str(point["settings"]["lists"]),
            str(step["probes"]),
            f"{step['recall']:.3f}",
            f"{step['queries_per_second']:.0f}",
            f"{point['exact']['queries_per_second']:.0f}",
            f"{step['resident'] / 1e6:.0f}",
            f"{point['bytes'] / 1e6:.1f}",
            f"{point['exact']['bytes'] / 1e6:.0f}",
            f"{point['build_seconds']:.0f}",
        ]
        for point in points
        for step in point["curve"]
    ]
    return table(header, rows)


def predicted_bytes(count: float, dimension: int, code_bytes: int) -> float:
    """What an IVF-PQ index takes: codes and ids, centres of 4 sqrt(N) clusters, centres of the codes.

    Args:
        count: of vectors.
        dimension: of each.
        code_bytes: that each is compressed to.

    >>> round(predicted_bytes(1e8, 768, 96) / 1e9, 2)
    10.52
    """
    return count * (code_bytes + 8) + 4 * dimension * 4 * math.sqrt(count) + 256 * 4 * dimension


# ---- plot


def draw(points: Sequence[Mapping[str, Any]], path: Path, about: Mapping[str, Any]) -> None:
    """Draw recall over clusters looked into, and memory and speed over the number of vectors.

    Args:
        points: by :func:`measure_recall`.
        path: picture to write.
        about: the machine.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    # Only plots need it, and type checkers may not have it.
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(11.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    shades = ("#9ecae1", "#4292c6", "#08519c", "#041f3d")
    for point, shade in zip(points, shades[-len(points) :], strict=False):
        label = f"{point['count']} vectors, {point['settings']['lists']} clusters"
        _line(left, point["curve"], "probes", "recall", label=label, color=shade)
    left.set_xscale("log", base=2)
    left.set_xticks(PROBES, [str(probes) for probes in PROBES])
    left.set(xlabel="clusters looked into", ylabel="recall@10", ylim=(0, 1.02), title="IVF-PQ finds")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    counts = [point["count"] for point in points]
    dimension, code_bytes = points[0]["dimension"], points[0]["settings"]["code_bytes"]
    far = np.logspace(math.log10(min(counts)), 8, 50)
    middle.plot(far, 4 * dimension * far / 1e9, "--", color="#d1495b", linewidth=1)
    middle.plot(far, [predicted_bytes(n, dimension, code_bytes) / 1e9 for n in far], "--", color="#08519c", linewidth=1)
    middle.plot(
        counts, [point["exact"]["bytes"] / 1e9 for point in points], "o", color="#d1495b", label="exact: memory"
    )
    middle.plot(counts, [point["bytes"] / 1e9 for point in points], "o", color="#08519c", label="IVF-PQ: index on disk")
    middle.set(xscale="log", yscale="log", xlabel="vectors", ylabel="GB", title="Size (dashed: by formula)")
    middle.legend(frameon=False, fontsize=8)
    exact = [point["exact"]["queries_per_second"] for point in points]
    right.plot(counts, exact, "o-", color="#d1495b", label="exact")
    for probes, shade in zip((8, 32, 128), shades, strict=False):
        speeds = [step["queries_per_second"] for point in points for step in point["curve"] if step["probes"] == probes]
        if len(speeds) == len(counts):
            right.plot(counts, speeds, "o-", color=shade, label=f"IVF-PQ, {probes} clusters looked into")
    right.set(xscale="log", yscale="log", xlabel="vectors", ylabel="queries a second", title="Speed")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.supxlabel(f"{about['device']}, {about['threads']} threads; {dimension} dimensions", fontsize=8)
    figure.savefig(path, dpi=130)


def _line(axis: Any, curve: Sequence[Mapping[str, float]], x: str, y: str, **style: Any) -> None:
    axis.plot([step[x] for step in curve], [step[y] for step in curve], "o-", markersize=4, **style)


# ---- command line


def _say(what: str) -> None:
    tqdm.write(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def _about(repeats: int) -> dict[str, Any]:
    device, dtype = torch.device("cpu"), torch.float32
    return {**environment(device, dtype, repeats, matmul_rate(device, dtype)), "faiss": version("faiss-cpu")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.split("\n")[0])
    parser.add_argument("--product", action="store_true", help="time exact search beside the bare product")
    parser.add_argument("--recall", type=int, nargs="+", default=[], metavar="N", help="numbers of vectors for IVF-PQ")
    parser.add_argument("--count", type=int, default=20_000, help="vectors of --product")
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1000, help="of --recall")
    parser.add_argument("--repeats", type=int, default=5, help="of --product")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what an earlier run wrote")
    parser.add_argument("--plot", type=Path, help="picture of --recall or --draw")
    chosen = parser.parse_args(arguments)
    if chosen.draw is not None:
        found = json.loads(chosen.draw.read_text(encoding="utf-8"))
        draw(found["recall"], chosen.plot or chosen.draw.with_suffix(".png"), found["environment"])
        return 0
    torch.set_num_threads(chosen.threads)
    faiss().omp_set_num_threads(chosen.threads)
    found: dict[str, Any] = {"environment": _about(chosen.repeats)}
    print("\n".join(f"- {name}: {value}" for name, value in found["environment"].items()))
    if chosen.product:
        found["product"] = measure_product(chosen.count, chosen.dimension, chosen.repeats)
        print(f"\n{product_table(found['product'])}")
    if chosen.recall:
        found["recall"] = []
        for count in sorted(chosen.recall):
            found["recall"].append(measure_recall(count, chosen.dimension, chosen.queries, IVFPQ(), chosen.folder))
            _write(found, chosen.json)
        print(f"\n{recall_table(found['recall'])}")
        if chosen.plot is not None:
            draw(found["recall"], chosen.plot, found["environment"])
    _write(found, chosen.json)
    return 0


def _write(found: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
