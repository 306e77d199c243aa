"""The retrieval stage: similar images for each image (Re-Align, section 3.1), the image and its copies left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from realign_lightning.data.schema import decode_image
from realign_lightning.data.sources.base import ImageFile
from realign_lightning.preferences.near_duplicates import Band, calibrate_band, distorted_copies
from realign_lightning.preferences.retrieval.encoders import ImageEncoder
from realign_lightning.preferences.retrieval.ivfpq import IVFPQ, IVFPQIndex
from realign_lightning.preferences.retrieval.search import ExactIndex, Names, Rules, VectorIndex, neighbours_of
from realign_lightning.preferences.retrieval.store import EmbeddingStore, Rows, StoredVectors


class Neighbour(NamedTuple):
    """An image that resembles another.

    Args:
        image_id: which one.
        score: cosine similarity of the embeddings, in [-1, 1].
    """

    image_id: str
    score: float


class Retriever:
    """Finds the images most similar to an image, by inner product of L2-normalised embeddings.

    Up to ``flat_limit`` images the search is exact: every neighbour and every tie is that of a full sort. Beyond, an
    IVF-PQ index proposes candidates, and only these are scored; the scores are exact all the same. Equal scores are
    ordered by ``image_id``. The result does not depend on batches, threads or the number of processes.

    Never neighbours are: the image itself; an image whose file has the same bytes; one whose perceptual hash
    (:func:`~realign_lightning.preferences.near_duplicates.perceptual_hash`) differs in at most ``hash_distance`` of 64
    bits; and one whose similarity is outside ``[min_similarity, max_similarity)``. Next ones take their places, as far
    as there are any.

    Args:
        encoder: embeds the images; None is the policy's own vision tower.
        top_k: neighbours per image.
        hash_distance: see above; null compares no hashes.
        min_similarity: least similarity of a neighbour.
        max_similarity: neighbours are less similar; null for no end. :meth:`calibrate` suggests one.
        flat_limit: images up to which all embeddings are held in memory and searched exactly. Two million of 768
            numbers take 6 GB.
        ivfpq: settings of the search beyond.

    Raises:
        ValueError: for numbers out of range, or an empty band.
    """

    def __init__(
        self,
        encoder: ImageEncoder | None = None,
        top_k: int = 10,
        hash_distance: int | None = 8,
        min_similarity: float = -1.0,
        max_similarity: float | None = None,
        flat_limit: int = 2_000_000,
        ivfpq: IVFPQ | None = None,
    ) -> None:
        if flat_limit < 1:
            raise ValueError(f"Expected `flat_limit` to be at least 1, got {flat_limit}.")
        self.encoder = encoder
        self.rules = Rules(top_k, min_similarity, max_similarity, hash_distance)
        self.flat_limit = flat_limit
        self.ivfpq = IVFPQ() if ivfpq is None else ivfpq

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that neighbours depend on beside encoder and images, in plain JSON values."""
        return {**asdict(self.rules), "flat_limit": self.flat_limit, "ivfpq": asdict(self.ivfpq)}

    def below(self, max_similarity: float) -> Retriever:
        """A retriever with another end of the band and the same settings otherwise.

        Args:
            max_similarity: neighbours are less similar.
        """
        rules = self.rules
        settings = (rules.top_k, rules.hash_distance, rules.min_similarity)
        return Retriever(self.encoder, *settings, max_similarity, self.flat_limit, self.ivfpq)

    def neighbours(
        self, store: EmbeddingStore, contents: Mapping[str, str], queries: Sequence[str] | None = None
    ) -> Iterator[tuple[str, list[Neighbour]]]:
        """Neighbours of images, block by block of 4,096 queries.

        An index for more than ``flat_limit`` images is made on the first call and found again in the store's folder:
        with several processes let one call this first.

        Args:
            store: holds the embeddings of all images.
            contents: SHA-256 of every image that may be retrieved, by ``image_id``; more than one id may have one.
            queries: ids of the images to search for, in any order, for example one rank's share; None is all of them.

        Yields:
            Id and neighbours, best first, in the order of ``queries``; fewer than ``top_k`` where there are no more.

        Raises:
            KeyError: if an image has no embedding, or a query is not among ``contents``.
        """
        ids = sorted(contents)
        wanted = ids if queries is None else list(queries)
        positions = _positions(ids, wanted)
        store.refresh()
        if not ids:
            return
        vectors = StoredVectors(store, [contents[image_id] for image_id in ids])
        names = Names(vectors.records, None if self.rules.hash_distance is None else vectors.hashes)
        done = 0
        for block in neighbours_of(self._index(store, vectors), positions, self.rules, names):
            for rows, scores in zip(block.rows.tolist(), block.scores.tolist(), strict=True):
                found = [Neighbour(ids[row], score) for row, score in zip(rows, scores, strict=True) if row >= 0]
                yield wanted[done], found
                done += 1

    def calibrate(
        self,
        store: EmbeddingStore,
        contents: Mapping[str, str],
        images: Sequence[ImageFile],
        encoder: ImageEncoder,
        sample: int = 256,
        max_lost: float = 0.01,
        seed: int = 0,
    ) -> Band:
        """Suggest ``max_similarity`` from the images at hand.

        Images are drawn, distorted mildly (JPEG, scale, crop, brightness) and embedded: these similarities are of
        near-duplicates. Their neighbours in the store, those with near perceptual hashes left out, are other images.

        Args:
            store: holds the embeddings of all images.
            contents: SHA-256 by ``image_id``.
            images: files to draw from.
            encoder: the store's.
            sample: images to draw.
            max_lost: share of true neighbours that may be lost.
            seed: of the drawing.

        Returns:
            The band's end, with the shares of copies caught and of neighbours lost on the sample.

        Raises:
            ValueError: if there are fewer than two images.
        """
        files = {image.image_id: image for image in images if image.image_id in contents}
        ids = sorted(files)
        drawn = sorted(np.random.default_rng(seed).permutation(len(ids))[:sample].tolist())
        same: list[float] = []
        for number in drawn:
            picture = decode_image(files[ids[number]].read())
            own, *copies = encoder.embed([picture, *distorted_copies(picture).values()]).double()
            same += [float(own @ copy) for copy in copies]
        rules = self.rules
        open_end = Retriever(None, rules.top_k, rules.hash_distance, flat_limit=self.flat_limit, ivfpq=self.ivfpq)
        found = open_end.neighbours(store, contents, [ids[number] for number in drawn])
        return calibrate_band(same, [other.score for _, others in found for other in others], max_lost)

    def _index(self, store: EmbeddingStore, vectors: StoredVectors) -> VectorIndex:
        if len(vectors) <= self.flat_limit:
            return ExactIndex(vectors.take(np.arange(len(vectors))))
        return IVFPQIndex(store.folder, vectors, self.ivfpq)


def _positions(ids: Sequence[str], wanted: Sequence[str]) -> Rows:
    places = {image_id: place for place, image_id in enumerate(ids)}
    unknown = [image_id for image_id in wanted if image_id not in places]
    if unknown:
        raise KeyError(f"Expected every query among the images; {len(unknown)} are not, the first is {unknown[0]!r}.")
    return np.array([places[image_id] for image_id in wanted], dtype=np.int64)
