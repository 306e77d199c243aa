"""Approximate search for more vectors than memory holds: inverted lists of product-quantised vectors, on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from realign_lightning.preferences.retrieval.search import Candidates, ExactIndex, Rules, VectorIndex, faiss, nearest
from realign_lightning.preferences.retrieval.store import Floats, Rows, StoredVectors

log = logging.getLogger(__name__)

_INDEX = "index.faiss"
_LISTS = "lists.ivfdata"
_TRAINED = "trained"
_MERGED = "merged"
_CODE_BITS = 8
_LEAST_TRAINED = 65536
_DEEPER = 4
_DEEPEST = 16
_OF_SEARCH = ("probes", "candidates")


@dataclass(frozen=True)
class IVFPQ:
    """Settings of an IVF-PQ index (Jegou et al., Product quantization for nearest neighbor search, 2011).

    Args:
        lists: clusters of vectors; None is about 4 sqrt(N), a power of 2.
        code_bytes: bytes that a vector is compressed to, a divisor of its dimension; None is the largest up to an
            eighth of it (96 for 768, where the vector itself takes 3,072).
        probes: clusters that are looked into per query.
        candidates: vectors per query that are scored exactly.
        trained_per_list: vectors per cluster that it is trained on.
        slice_size: vectors that are compressed at a time; a build that is killed goes on with the next slice.
        seed: of what is drawn for training.

    Raises:
        ValueError: for a number below 1.
    """

    lists: int | None = None
    code_bytes: int | None = None
    probes: int = 32
    candidates: int = 200
    trained_per_list: int = 40
    slice_size: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")

    def for_vectors(self, count: int, dimension: int) -> IVFPQ:
        """The settings with everything filled in.

        Args:
            count: vectors, N.
            dimension: numbers in each.

        Raises:
            ValueError: for fewer than 256 vectors, or if ``code_bytes`` does not divide the dimension.

        >>> settings = IVFPQ().for_vectors(1_000_000, 768)
        >>> settings.lists, settings.code_bytes, settings.probes
        (4096, 96, 32)
        """
        if count < 2**_CODE_BITS:
            raise ValueError(f"Expected at least 256 vectors for IVF-PQ, got {count}: raise `flat_limit`.")
        lists = self.lists or 2 ** round(np.log2(4 * np.sqrt(count)))
        lists = min(lists, count)
        code_bytes = self.code_bytes or _largest_divisor(dimension, max(1, dimension // 8))
        if dimension % code_bytes:
            raise ValueError(f"Expected `code_bytes` to divide the dimension {dimension}, got {code_bytes}.")
        return replace(self, lists=lists, code_bytes=code_bytes, probes=min(self.probes, lists))


class IVFPQIndex(VectorIndex):
    """Compressed vectors on disk, found by cluster; made once and read again by every process.

    Clusters are chosen by exact search among their centres, codes are compared query by query, and the candidates are
    scored exactly with the stored vectors: what is found does not depend on batches or ranks. Only codes and lists that
    a query needs are read.

    Args:
        folder: where indexes lie, each in a folder named by what it holds.
        vectors: what to index.
        settings: how.
    """

    error = None

    def __init__(self, folder: Path, vectors: StoredVectors, settings: IVFPQ | None = None) -> None:
        self.settings = (settings or IVFPQ()).for_vectors(len(vectors), vectors.dimension)
        self._vectors = vectors
        self.folder = folder / f"ivfpq-{self._key()}"
        if not (self.folder / _MERGED).is_dir():
            self._build()
        self._index = faiss().read_index(str(self.folder / _MERGED / _INDEX), faiss().IO_FLAG_ONDISK_SAME_DIR)
        self._index.nprobe = self.settings.probes
        centres = faiss().downcast_index(self._index.quantizer).reconstruct_n(0, self.settings.lists)
        self._centres = ExactIndex(centres)

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def disk_bytes(self) -> int:
        """What the index takes on disk, the vectors themselves not counted."""
        return sum(path.stat().st_size for path in (self.folder / _MERGED).iterdir())

    def take(self, rows: Rows) -> Floats:
        """See :meth:`VectorIndex.take`; read from the store."""
        return self._vectors.take(rows)

    def depths(self, top_k: int) -> Iterator[int]:
        """``candidates``, then up to 16 times as many where near-duplicates leave too few."""
        depth = max(self.settings.candidates, top_k)
        for times in (1, _DEEPER, _DEEPEST):
            yield min(times * depth, len(self))

    def search(self, queries: Floats, depth: int) -> Candidates:
        """See :meth:`VectorIndex.search`."""
        lists = nearest(self._centres, queries, Rules(top_k=self.settings.probes))
        scores, rows = self._index.search_preassigned(queries, depth, lists.rows, lists.scores)
        return Candidates(rows, scores)

    # ---- building

    def _key(self) -> str:
        facts = {name: value for name, value in asdict(self.settings).items() if name not in _OF_SEARCH}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(faiss().__version__.encode())
        digest.update(self._vectors.contents.tobytes())
        return digest.hexdigest()[:16]

    def _build(self) -> None:
        """Train, compress slice by slice, merge; each step appears whole or not at all, and is not done again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._train()
        slices = range(0, len(self._vectors), self.settings.slice_size)
        paths = [self.folder / f"slice-{start:012d}.faiss" for start in slices]
        for start, path in zip(tqdm(slices, desc="compress vectors", unit="slice", delay=2), paths, strict=True):
            if not path.is_file():
                self._compress(np.arange(start, min(start + self.settings.slice_size, len(self._vectors))), path)
        self._merge(paths)
        for path in paths:
            path.unlink(missing_ok=True)

    def _train(self) -> None:
        if (self.folder / _TRAINED).is_dir():
            return
        settings, count = self.settings, len(self._vectors)
        assert settings.lists is not None  # noqa: S101 - filled in
        wanted = min(count, max(settings.trained_per_list * settings.lists, _LEAST_TRAINED))
        sample = np.random.default_rng(settings.seed).choice(count, wanted, replace=False)
        sample.sort()
        quantizer = faiss().IndexFlatIP(self._vectors.dimension)
        index = faiss().IndexIVFPQ(
            quantizer,
            self._vectors.dimension,
            settings.lists,
            settings.code_bytes,
            _CODE_BITS,
            faiss().METRIC_INNER_PRODUCT,
        )
        for clustering in (index.cp, index.pq.cp):
            clustering.seed = settings.seed
            # Few vectors are no reason for a warning to every user of a small set.
            clustering.min_points_per_centroid = 1
        log.info("Training %d clusters and codes of %d bytes.", settings.lists, settings.code_bytes)
        index.train(self._vectors.take(sample))
        with _Whole(self.folder / _TRAINED) as folder:
            faiss().write_index(index, str(folder / _INDEX))

    def _trained(self) -> Any:
        return faiss().read_index(str(self.folder / _TRAINED / _INDEX))

    def _compress(self, rows: Rows, path: Path) -> None:
        index = self._trained()
        for part in np.array_split(rows, -(-len(rows) // _LEAST_TRAINED)):
            index.add_with_ids(self._vectors.take(part), part)
        beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        faiss().write_index(index, str(beside))
        beside.replace(path)

    def _merge(self, paths: list[Path]) -> None:
        from faiss.contrib.ondisk import merge_ondisk

        with _Whole(self.folder / _MERGED) as folder:
            index = self._trained()
            merge_ondisk(index, [str(path) for path in paths], str(folder / _LISTS))
            # Else FAISS prints a line about it whenever the index is opened.
            lists = faiss().downcast_InvertedLists(faiss().extract_index_ivf(index).invlists)
            lists.filename = str(self.folder / _MERGED / _LISTS)
            faiss().write_index(index, str(folder / _INDEX))


class _Whole:
    """A folder that appears with everything in it, or not at all; of two processes the first has its way."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._folder = target.with_name(f".{target.name}-{uuid.uuid4().hex}")

    def __enter__(self) -> Path:
        self._folder.mkdir()
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._folder.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)
