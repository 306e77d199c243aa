"""Embeddings on disk by the content of the image, written as they come and never computed twice."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from realign_lightning.backbones.files import file_state, hash_json, write_json
from realign_lightning.data.schema import decode_image
from realign_lightning.data.sources.base import ImageFile, SourceProblem
from realign_lightning.data.sources.images import read_unchanged
from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.engines.threads import in_threads
from realign_lightning.journal import write_all
from realign_lightning.preferences.near_duplicates import PERCEPTUAL_HASH, perceptual_hash
from realign_lightning.preferences.retrieval.encoders import ImageEncoder
from realign_lightning.types import SampleError

SCHEMA = 1
"""Raised whenever this package stores or preprocesses images differently, so that older stores are not used."""

STORE_NAME = "store.json"
"""The file that says what the embeddings beside it depend on, and how long they are."""

MAX_NORM_ERROR = 1e-4
"""Most that the length of a stored embedding is off 1."""

_HASHED = 256
"""Image files that are hashed in one go."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class EmbeddingStore:
    """Embeddings and perceptual hashes by the SHA-256 of the image file, in a folder.

    Stores of several encoders share ``root``: each identity has a folder of its own, named by its hash. In it every
    writing process has a file of records of one length (hash of the file, perceptual hash, vector; 40 + 4 D bytes), so
    that processes, and runs, can write at the same time. A process that is killed loses no batch that it has added: a
    record that was cut is left out and computed anew. Vectors are read from the files as they are needed.

    Args:
        root: folder of all stores; made when the first embedding is added.
        identity: what the embeddings depend on beside the image, in plain JSON values
            (:attr:`ImageEncoder.identity`).
        rank: of this process, for the name of its file.

    Raises:
        ValueError: if the folder is damaged, or holds something else than its name says.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = EmbeddingStore(Path(folder), {"encoder": "an example"})
    ...     store.add(["ab" * 32], np.array([[0.6, 0.8]], dtype=np.float32), [7])
    ...     store.refresh()
    ...     print(store.vectors(store.rows(["ab" * 32])))
    [[0.6 0.8]]
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.identity = {"schema": SCHEMA, "perceptual_hash": dict(PERCEPTUAL_HASH), "encoder": dict(identity)}
        self.folder = Path(root) / hash_json(self.identity)[:16]
        self.dimension: int | None = None
        self._rank = rank
        self._file: IO[bytes] | None = None
        self._added: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        """Records that :meth:`refresh` saw; images that two processes embedded count twice."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def missing(self, contents: Sequence[str]) -> set[str]:
        """Which image files have no embedding here, those that this process added included.

        Args:
            contents: SHA-256 of image files, hexadecimal.
        """
        found = self.find(contents)
        return {content for content, row in zip(contents, found, strict=True) if row < 0} - self._added

    # ---- writing

    def add(self, contents: Sequence[str], embeddings: Floats, hashes: Sequence[int]) -> None:
        """Write embeddings; after a kill each is there as a whole or not at all.

        Args:
            contents: SHA-256 of N image files, hexadecimal.
            embeddings: (N, D) float32, L2-normalised.
            hashes: N perceptual hashes.

        Raises:
            ValueError: for lengths that do not fit each other or the store, or rows that are not normalised; nothing
                is written then.
            OSError: if the disk is full; what was written before stays.
        """
        if embeddings.ndim != 2 or not len(contents) == len(embeddings) == len(hashes):
            raise ValueError(
                f"Expected ({len(contents)}, D) embeddings and {len(contents)} hashes, got {embeddings.shape} and "
                f"{len(hashes)}."
            )
        if not contents:
            return
        bad = unfit_vectors(embeddings)
        if bad:
            row, reason = next(iter(bad.items()))
            raise ValueError(f"The embedding of image file {contents[row]} {reason}.")
        records = np.empty(len(contents), _record(self._dimension(embeddings.shape[1])))
        records["content"] = _digests(contents)
        records["perceptual"] = np.array(hashes, dtype=np.uint64)
        records["vector"] = embeddings
        if self._file is None:
            name = f"rank-{self._rank}-{uuid.uuid4().hex[:12]}.vectors"
            self._file = (self.folder / name).open("xb", buffering=0)
        try:
            write_all(self._file, records.tobytes())
        except OSError:
            # What was cut must stay the end of its file.
            self._file.close()
            self._file = None
            raise
        self._added.update(contents)

    def close(self) -> None:
        """Bring what was written to the disk; adding more begins another file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _dimension(self, found: int) -> int:
        """The store's dimension, which the first embedding sets."""
        if self.dimension is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / STORE_NAME
            if not path.is_file():
                write_json(path, {"dimension": found, **self.identity}, sort_keys=True)
            self.dimension = self._read_dimension()
        if self.dimension != found:
            raise ValueError(
                f"The store {self.folder} holds embeddings of {self.dimension} numbers, got {found}: the encoder's "
                "`identity` must differ where its embeddings do."
            )
        return found

    def _read_dimension(self) -> int | None:
        path = self.folder / STORE_NAME
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            dimension = int(found.pop("dimension"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} of an embedding store is damaged ({error}): remove {path.parent}.") from error
        if found != json.loads(json.dumps(self.identity)) or dimension < 1:
            raise ValueError(f"The embedding store {path.parent} does not hold what its name says: remove it.")
        return dimension

    # ---- reading

    def refresh(self) -> None:
        """See what this and other processes have written since."""
        self.dimension = self._read_dimension()
        self._parts: list[npt.NDArray[Any]] = []
        if self.dimension is not None:
            kind = _record(self.dimension)
            for path in sorted(self.folder.glob("*.vectors")):
                if whole := path.stat().st_size // kind.itemsize:
                    self._parts.append(np.memmap(path, kind, "r", shape=(whole,)))
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        contents = [np.array(part["content"]) for part in self._parts]
        joined = np.concatenate(contents) if contents else np.empty(0, _DIGEST)
        # Stable, so that of two records of one image all processes take the same.
        self._order: Rows = np.argsort(joined, kind="stable").astype(np.int64)
        self._sorted = joined[self._order]

    def find(self, contents: Sequence[str]) -> Rows:
        """Where embeddings stand.

        Args:
            contents: SHA-256 of N image files, hexadecimal.

        Returns:
            (N,) numbers of records, the same in every process that sees the same files; -1 for what is not here.
        """
        wanted = _digests(contents)
        if not len(self._sorted):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._sorted, wanted)
        places = np.minimum(places, len(self._sorted) - 1)
        return np.where(self._sorted[places] == wanted, self._order[places], -1)

    def rows(self, contents: Sequence[str]) -> Rows:
        """As :meth:`find`, where all must be here.

        Raises:
            KeyError: naming the first that is not.
        """
        found = self.find(contents)
        missing = np.flatnonzero(found < 0)
        if missing.size:
            raise KeyError(
                f"{missing.size} of {len(contents)} image files have no embedding in {self.folder}, the first is "
                f"number {missing[0]} ({contents[missing[0]]}): embed them first."
            )
        return found

    def vectors(self, rows: Rows) -> Floats:
        """Embeddings.

        Args:
            rows: (N,) numbers of records.

        Returns:
            (N, D) float32.

        Raises:
            ValueError: if one is damaged.
        """
        taken: Floats = np.empty((len(rows), self.dimension or 0), dtype=np.float32)
        self._gather(rows, "vector", taken)
        bad = unfit_vectors(taken)
        if bad:
            row, reason = next(iter(bad.items()))
            part = int(np.searchsorted(self._ends, rows[row], side="right"))
            name = self._parts[part].filename  # type: ignore[attr-defined]
            raise ValueError(f"{name} is damaged, a vector in it {reason}: remove it, what it held is computed anew.")
        return taken

    def hashes(self, rows: Rows) -> npt.NDArray[np.uint64]:
        """Perceptual hashes.

        Args:
            rows: (N,) numbers of records.

        Returns:
            (N,) of 64 bits.
        """
        taken = np.empty(len(rows), dtype=np.uint64)
        self._gather(rows, "perceptual", taken)
        return taken

    def _gather(self, rows: Rows, field: str, into: npt.NDArray[Any]) -> None:
        parts = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(parts):
            here = np.flatnonzero(parts == number)
            part = self._parts[number]
            into[here] = part[field][rows[here] - (self._ends[number] - len(part))]


class StoredVectors:
    """Some of a store's embeddings, by position.

    Args:
        store: where they are.
        contents: SHA-256 of N image files, hexadecimal; one may occur several times.

    Raises:
        KeyError: if one is not in the store.
    """

    def __init__(self, store: EmbeddingStore, contents: Sequence[str]) -> None:
        self._store = store
        self.contents = _digests(contents)
        """(N,) SHA-256 of each image file, as bytes."""
        self.records = store.rows(contents)
        """(N,) number of the record at each position; equal where the image files are."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def dimension(self) -> int:
        """Numbers in an embedding."""
        return self._store.dimension or 0

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """(N,) perceptual hashes."""
        return self._store.hashes(self.records)

    def take(self, positions: Rows) -> Floats:
        """Embeddings at some positions.

        Args:
            positions: (M,), from 0.

        Returns:
            (M, D) float32.
        """
        return self._store.vectors(self.records[positions])


def unfit_vectors(vectors: Floats) -> dict[int, str]:
    """Which rows are no normalised embeddings, and why.

    Args:
        vectors: (N, D).

    Returns:
        What is wrong by row.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    found = {}
    for row in np.flatnonzero(~(np.abs(lengths - 1) <= MAX_NORM_ERROR)):
        if not np.isfinite(vectors[row]).all():
            found[int(row)] = "is not finite"
        elif lengths[row] == 0:
            found[int(row)] = "is zero"
        else:
            found[int(row)] = f"has length {lengths[row]:.6g}, expected 1 (divide it by its norm)"
    return found


def content_hashes(images: Sequence[ImageFile], memo: Memo | None = None) -> tuple[dict[str, str], list[SourceProblem]]:
    """SHA-256 of image files, by which their embeddings are kept.

    Args:
        images: files; several may have one ``image_id`` if they hold the same bytes.
        memo: remembers the hashes of files by their path, size, place on the disk and times of change; None reads all.

    Returns:
        Hexadecimal hashes by ``image_id``, in the order given; and the files that cannot be read, or that bear the name
        of another image, which keeps it.
    """
    found: dict[str, str] = {}
    problems = []
    groups = [images[start : start + _HASHED] for start in range(0, len(images), _HASHED)]
    with tqdm(total=len(images), desc="hash images", unit="image", delay=2) as bar:
        for group, results in in_threads(lambda image: _hash(image, memo), groups):
            new = {}
            for image, (result, state) in zip(group, results, strict=True):
                if state is not None and not isinstance(result, SampleError):
                    new[state] = result
                if isinstance(result, SampleError):
                    problems.append(SourceProblem(image.image_id, str(result)))
                elif found.setdefault(image.image_id, result) != result:
                    problems.append(SourceProblem(image.image_id, "another image has the same image_id: rename one"))
            if memo is not None:
                memo.add({state: result for state, result in new.items() if state not in memo})
            bar.update(len(group))
    return found, problems


def embed_missing(
    store: EmbeddingStore,
    encoder: ImageEncoder,
    images: Sequence[ImageFile],
    contents: Mapping[str, str],
    rank: int = 0,
    world_size: int = 1,
) -> list[SourceProblem]:
    """Embed the images that a store lacks.

    The images are cut into batches in the order given, each content once, whatever is in the store already; batch ``i``
    is the work of rank ``i % world_size``, and is computed as a whole if the store lacks any of it. So an embedding is
    the same to the last bit on any number of ranks and after any kill, although last bits depend on what else is in the
    batch. Two batches of decoded images are in memory at a time.

    Args:
        store: to fill.
        encoder: embeds; its ``identity`` must be the store's.
        images: files.
        contents: their hashes by ``image_id`` (:func:`content_hashes`); images without one are passed over.
        rank: of this process.
        world_size: processes that share the work.

    Returns:
        Images of this rank's batches that have no embedding: not to be decoded, or embedded to zero or NaN.

    Raises:
        ValueError: for another encoder's store, or if no image of the first batch has a usable embedding.
    """
    if store.identity["encoder"] != dict(encoder.identity):
        raise ValueError("Expected the store of this encoder's `identity`; this one is of another encoder.")
    files: dict[str, ImageFile] = {}
    names: dict[str, list[str]] = {}
    for image in images:
        if content := contents.get(image.image_id):
            files.setdefault(content, image)
            names.setdefault(content, []).append(image.image_id)
    keys = list(files)
    batches = [keys[start : start + encoder.batch_size] for start in range(0, len(keys), encoder.batch_size)]
    todo = [batch for batch in batches[rank::world_size] if store.missing(batch)]
    problems: dict[str, str] = {}
    with tqdm(total=sum(map(len, todo)), desc="embed images", unit="image", delay=2) as bar:
        for batch, results in in_threads(lambda key: _decode(files[key], key), todo):
            problems |= _embed_batch(store, encoder, dict(zip(batch, results, strict=True)))
            bar.update(len(batch))
    encoder.finish()
    store.close()
    return [SourceProblem(name, reason) for key, reason in problems.items() for name in dict.fromkeys(names[key])]


def _embed_batch(
    store: EmbeddingStore, encoder: ImageEncoder, batch: Mapping[str, Image.Image | SampleError]
) -> dict[str, str]:
    """Embed a batch by content and store what is missing; returns what is wrong with images that cannot be."""
    problems = {key: str(result) for key, result in batch.items() if isinstance(result, SampleError)}
    pictures = {key: result for key, result in batch.items() if not isinstance(result, SampleError)}
    missing = store.missing(list(pictures))
    if not missing:
        return problems
    embeddings = encoder.embed(list(pictures.values())).float().cpu().numpy()
    if embeddings.ndim != 2 or len(embeddings) != len(pictures):
        raise ValueError(f"Expected ({len(pictures)}, D) embeddings from the encoder, got {embeddings.shape}.")
    bad = {key: reason for row, reason in unfit_vectors(embeddings).items() for key in [list(pictures)[row]]}
    if len(bad) == len(pictures) and store.dimension is None:
        raise ValueError(
            f"Not one of {len(bad)} images has a usable embedding, the first {next(iter(bad.values()))}: the encoder "
            "does not compute in this dtype, its weights are broken, or it does not normalise."
        )
    kept = [row for row, key in enumerate(pictures) if key in missing and key not in bad]
    found = [list(pictures)[row] for row in kept]
    store.add(found, embeddings[kept], [perceptual_hash(pictures[key]) for key in found])
    return problems | {key: f"its embedding {reason}" for key, reason in bad.items()}


def _hash(image: ImageFile, memo: Memo | None) -> tuple[str | SampleError, str | None]:
    """The hash, and by what it is known again, if it can be."""
    state = None if memo is None else _state(image)
    if memo is not None and state is not None and state in memo:
        return str(memo[state]), state
    try:
        return hashlib.sha256(image.read()).hexdigest(), state
    except SampleError as error:
        return error, None


def _state(image: ImageFile) -> str | None:
    """What a file cannot keep when its content changes; None for images that are not a file of their own."""
    if type(image) is not ImageFile or image.path is None:
        return None
    try:
        return content_key(str(image.path), file_state(image.path))
    except (OSError, ValueError):
        # Reading it will say what is wrong.
        return None


def _decode(image: ImageFile, content: str) -> Image.Image | SampleError:
    try:
        return decode_image(read_unchanged(image, content))
    except SampleError as error:
        return error


_DIGEST = "S32"


def _record(dimension: int) -> np.dtype[Any]:
    """One record. Numpy compares the hashes as bytes, zeros at their end left out alike on both sides."""
    return np.dtype([("content", _DIGEST), ("perceptual", "<u8"), ("vector", "<f4", (dimension,))])


def _digests(contents: Sequence[str]) -> npt.NDArray[np.bytes_]:
    return np.array([bytes.fromhex(content) for content in contents], dtype=_DIGEST)
