"""Log-probs of the three views under one model: every distinct image encoded once, vocabulary head on responses only.

The one place of the package that turns a batch into log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realign_lightning.backbones.base import Backbone, ImageFeatures
from realign_lightning.types import VIEWS, LogProbs, PreferenceBatch, ResponseLengths, View, ViewName


@dataclass(frozen=True)
class EncodedImages:
    """Image features of a batch, to be read by every view and, if the image path is frozen, by every model.

    Args:
        features: what the backbone's ``encode_images`` returned.
        has_retrieved: whether the retrieved images follow the B original ones.
    """

    features: ImageFeatures
    has_retrieved: bool


def encode_batch_images(
    backbone: Backbone, model: nn.Module, batch: PreferenceBatch, views: Sequence[ViewName] = VIEWS
) -> EncodedImages:
    """Encode each distinct image that ``views`` need once: B images, 2B with the visual view.

    Args:
        backbone: the model's family.
        model: whose vision tower and projector to use.
        batch: B samples.
        views: the views that will be scored.
    """
    if "visual" in views:
        images = backbone.join_images(batch.images, batch.retrieved)
        return EncodedImages(backbone.encode_images(model, images), has_retrieved=True)
    return EncodedImages(backbone.encode_images(model, batch.images), has_retrieved=False)


def score(
    backbone: Backbone,
    model: nn.Module,
    batch: PreferenceBatch,
    views: Sequence[ViewName] = VIEWS,
    images: EncodedImages | None = None,
) -> LogProbs:
    """Summed response log-probs of the views under one model.

    All views go through the language model as one padded batch of rows, and share the image features.

    Args:
        backbone: the model's family.
        model: policy or reference.
        batch: B samples.
        views: which views to score; ``chosen`` must be among them.
        images: features from :func:`encode_batch_images`; encoded here when None.

    Returns:
        (B,) float32 sums per view; None for views that were not asked for.

    Raises:
        ValueError: if ``chosen`` is missing, or ``images`` lack the retrieved ones although ``visual`` is asked for.
    """
    views = [view for view in VIEWS if view in views]
    if "chosen" not in views:
        raise ValueError(f"Expected the views to hold 'chosen', got {views}.")
    if images is None:
        images = encode_batch_images(backbone, model, batch, views)
    if "visual" in views and not images.has_retrieved:
        raise ValueError("The visual view needs the retrieved images, but `images` were encoded without them.")
    size = len(batch)
    stacked = _stack([getattr(batch, view) for view in views], backbone.pad_token_id)
    rows = [size * (view == "visual") + row for view in views for row in range(size)]
    features = backbone.select_images(images.features, rows)
    # The logits at position t predict token t + 1.
    keep = F.pad(stacked.response_mask[:, 1:], (0, 1))
    logits = backbone.response_logits(model, stacked.tokens, features, keep)
    labels = stacked.tokens["input_ids"][stacked.response_mask]
    sums = sum_log_probs(logits, labels, rows=stacked.response_mask.nonzero()[:, 0], num_rows=len(rows))
    return LogProbs(**dict(zip(views, torch.split(sums, size), strict=True)))


def sum_log_probs(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum token log-probs per row, from a float32 log-softmax.

    Sums in bfloat16 drift: 256 tokens were off by 6.4 nats in a measurement.

    Args:
        logits: (N, V) at the N response positions.
        labels: (N,) the tokens they predict.
        rows: (N,) the row that each token belongs to.
        num_rows: rows in the result.

    Returns:
        (num_rows,) float32; 0 for a row without tokens.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = -F.cross_entropy(logits.float(), labels, reduction="none")
        return torch.zeros(num_rows, dtype=torch.float32, device=logits.device).index_add(0, rows, log_probs)


def response_lengths(batch: PreferenceBatch) -> ResponseLengths:
    """Response tokens of every view, (B,) each."""
    return ResponseLengths(batch.chosen.lengths, batch.rejected.lengths, batch.visual.lengths)


def _stack(views: Sequence[View], pad_token_id: int) -> View:
    """The rows of several views below each other, padded on the right to the longest."""
    length = max(view.response_mask.shape[1] for view in views)

    def stack(tensors: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=fill) for tensor in tensors])

    return View(
        {
            name: stack([view.tokens[name] for view in views], pad_token_id if name == "input_ids" else 0)
            for name in views[0].tokens
        },
        stack([view.response_mask for view in views], 0),
    )
