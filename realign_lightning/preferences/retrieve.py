"""Step 2 of building pairs: find similar images (Re-Align, section 3.1, image retrieval)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from realign_lightning.backbones.base import Backbone
from realign_lightning.preferences.retrieval.encoders import ImageEncoder, PolicyEncoder, TimmEncoder
from realign_lightning.preferences.retrieval.ivfpq import IVFPQ
from realign_lightning.preferences.retrieval.retriever import Neighbour, Retriever
from realign_lightning.preferences.retrieval.search import ExactIndex, Names, Rules, neighbours_of
from realign_lightning.preferences.retrieval.store import EmbeddingStore, content_hashes, embed_missing, unfit_vectors

__all__ = [
    "IVFPQ",
    "EmbeddingStore",
    "ImageEncoder",
    "ImageIndex",
    "Neighbour",
    "PolicyEncoder",
    "Retriever",
    "TimmEncoder",
    "content_hashes",
    "embed_images",
    "embed_missing",
]


def embed_images(backbone: Backbone, model: nn.Module, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """Embed images with the policy's own vision tower.

    Args:
        backbone: the model's family.
        model: its weights.
        images: N images.
        batch_size: images per forward pass.

    Returns:
        (N, D) float32, L2-normalised.
    """
    parts = [
        backbone.embed_images(model, images[start : start + batch_size])
        for start in tqdm(range(0, len(images), batch_size), desc="embed images", unit="batch")
    ]
    return torch.cat(parts)


class ImageIndex:
    """Exact cosine search over normalised embeddings in memory; for files on disk see :class:`Retriever`.

    Args:
        image_ids: N distinct names.
        embeddings: (N, D) float32, L2-normalised.

    Raises:
        ValueError: for names that repeat, a shape that does not fit, or rows that are not normalised.

    >>> index = ImageIndex(["a", "b", "c"], torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]))
    >>> [[(n.image_id, round(n.score, 1)) for n in row] for row in index.neighbours(2)]
    [[('b', 0.8), ('c', 0.0)], [('a', 0.8), ('c', 0.6)], [('b', 0.6), ('a', 0.0)]]
    """

    def __init__(self, image_ids: Sequence[str], embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or len(embeddings) != len(image_ids):
            raise ValueError(f"Expected ({len(image_ids)}, D) embeddings, got {tuple(embeddings.shape)}.")
        if len(set(image_ids)) != len(image_ids):
            raise ValueError("Expected every image id once; some repeat.")
        vectors = embeddings.float().cpu().numpy()
        if bad := unfit_vectors(vectors):
            row, reason = next(iter(bad.items()))
            raise ValueError(f"Expected L2-normalised embeddings; that of {image_ids[row]!r} {reason}.")
        self.image_ids = list(image_ids)
        # Ties are broken by position, so by id.
        self._order = np.array(sorted(range(len(image_ids)), key=self.image_ids.__getitem__), dtype=np.int64)
        self._index = ExactIndex(vectors[self._order])

    def neighbours(self, top_k: int = 10) -> list[list[Neighbour]]:
        """The ``top_k`` images most similar to each image, itself left out; ties in order of id.

        Args:
            top_k: how many to keep; fewer are returned when there are fewer images.

        Returns:
            One list per image, in the order of ``image_ids``, best first.

        Raises:
            ValueError: for ``top_k`` below 1.
        """
        names = Names(np.arange(len(self.image_ids)))
        found = []
        for block in neighbours_of(self._index, np.argsort(self._order), Rules(top_k), names):
            for rows, scores in zip(block.rows.tolist(), block.scores.tolist(), strict=True):
                ids = (self.image_ids[self._order[row]] for row in rows if row >= 0)
                found.append([Neighbour(image_id, score) for image_id, score in zip(ids, scores, strict=False)])
        return found
