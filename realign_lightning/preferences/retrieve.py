"""Step 2 of building pairs: find similar images (Re-Align, section 3.1, image retrieval)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from realign_lightning.backbones.base import Backbone


class Neighbour(NamedTuple):
    """An image that resembles another.

    Args:
        image_id: which one.
        score: cosine similarity of the embeddings, in [-1, 1].
    """

    image_id: str
    score: float


def _faiss() -> ModuleType:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ImportError("Retrieving images needs the package faiss: pip install faiss-cpu.") from error
    module: ModuleType = faiss
    return module


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
    """Exact cosine search over normalised embeddings, by FAISS.

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
        if len(embeddings) and not torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-3):
            raise ValueError("Expected L2-normalised embeddings: divide each row by its norm.")
        self.image_ids = list(image_ids)
        self._vectors = embeddings.float().contiguous().numpy()
        self._index = _faiss().IndexFlatIP(embeddings.shape[1])
        self._index.add(self._vectors)

    def neighbours(self, top_k: int = 10) -> list[list[Neighbour]]:
        """The ``top_k`` images most similar to each image, itself left out; ties in order of id.

        Args:
            top_k: how many to keep; fewer are returned when there are fewer images.

        Returns:
            One list per image, in the order of ``image_ids``, best first.

        Raises:
            ValueError: for ``top_k`` below 1.
        """
        if top_k < 1:
            raise ValueError(f"Expected `top_k` to be at least 1, got {top_k}.")
        # One more for the image itself; with duplicates FAISS may put others before it.
        scores, rows = self._index.search(self._vectors, min(top_k + 1, len(self.image_ids)))
        found = []
        for own, (row_scores, row_ids) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True)):
            others = [
                Neighbour(self.image_ids[row], score)
                for row, score in zip(row_ids, row_scores, strict=True)
                if row != own
            ]
            found.append(sorted(others, key=lambda other: (-other.score, other.image_id))[:top_k])
        return found
