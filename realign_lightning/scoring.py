"""Log-probs of the three views under one model, nothing computed twice.

The one place of the package that turns a batch into log-probabilities. Every distinct image is encoded once. Chosen and
rejected share their [image + prompt] prefix in one packed row without padding, where the model's attention allows it,
and the vocabulary head sees response positions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realign_lightning.backbones.base import Backbone, ImageFeatures, ImageTokenError
from realign_lightning.backbones.packing import Packing, Tree
from realign_lightning.types import VIEWS, LogProbs, PreferenceBatch, ResponseLengths, View, ViewName, VisualWords

SharePrefix = Literal["auto"] | bool
"""Whether chosen and rejected share a row from image and prompt on: True, False, or ``auto`` where the model can."""


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

    Raises:
        ImageTokenError: naming the samples, if the model makes another number of features than the processor wrote
            image tokens.
    """
    has_retrieved = "visual" in views
    images = backbone.join_images(batch.images, batch.retrieved) if has_retrieved else batch.images
    try:
        return EncodedImages(backbone.encode_images(model, images), has_retrieved)
    except ImageTokenError as error:
        raise ImageTokenError(f"{_describe_rows(batch, error.rows)}: {error}", error.rows) from error


@dataclass(frozen=True)
class Rows:
    """What the language model runs on, and which of its positions predict the responses.

    Args:
        tokens: (R, L) tensors; one row (1, L) with ``position_ids`` if it is packed.
        images: for every row, or tree of a packed row, the image that it shows: 0 to B - 1 are ``batch.images``, from B
            on ``batch.retrieved``.
        positions: (N,) places in the R x L positions from which the response tokens are predicted.
        labels: (N,) the response tokens.
        sums: (N,) which of the views x B log-probs a token counts to.
        packing: what stands where in a packed row; None for padded rows.
    """

    tokens: Mapping[str, Tensor]
    images: tuple[int, ...]
    positions: Tensor
    labels: Tensor
    sums: Tensor
    packing: Packing | None = None


def make_rows(
    backbone: Backbone,
    model: nn.Module,
    batch: PreferenceBatch,
    views: Sequence[ViewName] = VIEWS,
    share_prefix: SharePrefix = "auto",
    visual_words: VisualWords = "all",
) -> Rows:
    """Lay out the rows of a batch; policy and reference can share them.

    Args:
        backbone: the model's family.
        model: policy or reference.
        batch: B samples.
        views: the views that will be scored.
        share_prefix: see :data:`SharePrefix`. Rows that are not shared are padded to the longest.
        visual_words: with ``masked`` the log-prob of the visual view is that of the masked words beside the retrieved
            image and of all others beside the image itself, so that only the masked ones differ from the chosen view.

    Raises:
        ValueError: for ``share_prefix=True`` where the model cannot, if ``chosen`` is missing, if rows would change
            each other's log-probs (:meth:`Backbone.check_length`), or if it is not known what was masked.
    """
    rows = _lay_out(backbone, model, batch, views, share_prefix)
    if visual_words == "all" or "visual" not in views:
        return rows
    return _compare_masked(rows, batch, 2 if "rejected" in views else 1)


def _lay_out(
    backbone: Backbone, model: nn.Module, batch: PreferenceBatch, views: Sequence[ViewName], share_prefix: SharePrefix
) -> Rows:
    views = _in_order(views)
    rows = [getattr(batch, view) for view in views]
    longest = max(int(row.tokens["attention_mask"].sum(dim=1).max()) for row in rows)
    backbone.check_length(model, longest)
    if share_prefix:
        reason = backbone.unshared_reason(model, longest)
        if reason is None:
            return _packed_rows(backbone, model, batch, views)
        if share_prefix is True:
            raise ValueError(f"share_prefix=True, but {reason}. 'auto' shares where it can, False never does.")
    return _padded_rows(rows, [len(batch) * (view == "visual") for view in views], backbone.pad_token_id)


def score(
    backbone: Backbone,
    model: nn.Module,
    batch: PreferenceBatch,
    views: Sequence[ViewName] = VIEWS,
    images: EncodedImages | None = None,
    rows: Rows | None = None,
) -> LogProbs:
    """Summed response log-probs of the views under one model.

    All views go through the language model at once, and share the image features.

    Args:
        backbone: the model's family.
        model: policy or reference.
        batch: B samples.
        views: which views to score; ``chosen`` must be among them.
        images: features from :func:`encode_batch_images`; encoded here when None.
        rows: from :func:`make_rows` for the same views; laid out here when None.

    Returns:
        (B,) float32 sums per view; None for views that were not asked for.

    Raises:
        ValueError: if ``chosen`` is missing, or ``images`` lack the retrieved ones although ``visual`` is asked for.
    """
    views = _in_order(views)
    if images is None:
        images = encode_batch_images(backbone, model, batch, views)
    if "visual" in views and not images.has_retrieved:
        raise ValueError("The visual view needs the retrieved images, but `images` were encoded without them.")
    if rows is None:
        rows = make_rows(backbone, model, batch, views)
    features = backbone.select_images(images.features, rows.images)
    log_probs = backbone.token_log_probs(model, rows.tokens, features, rows.positions, rows.labels, rows.packing)
    # Sums in bfloat16 drift: 256 tokens were off by 6.4 nats in a measurement.
    sums = torch.zeros(len(views) * len(batch), dtype=torch.float32, device=log_probs.device)
    sums = sums.index_add(0, rows.sums, log_probs.float())
    return LogProbs(**dict(zip(views, torch.split(sums, len(batch)), strict=True)))


def _in_order(views: Sequence[ViewName]) -> list[ViewName]:
    if "chosen" not in views:
        raise ValueError(f"Expected the views to hold 'chosen', got {list(views)}.")
    return [view for view in VIEWS if view in views]


def response_lengths(batch: PreferenceBatch) -> ResponseLengths:
    """Response tokens of every view, (B,) each."""
    return ResponseLengths(batch.chosen.lengths, batch.rejected.lengths, batch.visual.lengths)


def _padded_rows(views: Sequence[View], first_images: Sequence[int], pad_token_id: int) -> Rows:
    """The rows of several views below each other, padded on the right to the longest."""
    size, length = len(views[0].response_mask), max(view.response_mask.shape[1] for view in views)

    def stack(tensors: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=fill) for tensor in tensors])

    tokens = {
        name: stack([view.tokens[name] for view in views], pad_token_id if name == "input_ids" else 0)
        for name in views[0].tokens
    }
    places = stack([view.response_mask for view in views], 0).flatten().nonzero()[:, 0]
    return Rows(
        tokens,
        images=tuple(first + row for first in first_images for row in range(size)),
        # The logits at one position predict the token at the next.
        positions=places - 1,
        labels=tokens["input_ids"].flatten()[places],
        sums=places // length,
    )


def _compare_masked(rows: Rows, batch: PreferenceBatch, visual: int) -> Rows:
    """Let the visual view, number ``visual``, read only masked words beside the retrieved image."""
    size = len(batch)
    unknown = [key for key, mask in zip(batch.keys, batch.masked or (None,) * size, strict=True) if mask is None]
    if unknown:
        raise ValueError(
            f"visual_words='masked' compares what was masked when a pair was built, and {len(unknown)} of {size} "
            f"samples of a batch do not say what that was (first: {unknown[0]!r}). Build pairs with `realign-lightning "
            "build`, or set visual_words='all'."
        )
    masks = [mask for mask in batch.masked if mask is not None]
    lengths = torch.tensor([len(mask) for mask in masks], device=rows.sums.device)
    starts = lengths.cumsum(0) - lengths
    read_twice = (rows.sums < size) | (rows.sums >= visual * size)
    places = starts[rows.sums % size] + _places_within(rows.sums)
    is_masked = torch.cat(masks)[places.where(read_twice, 0)]
    kept = (rows.sums < visual * size) | is_masked
    again = (rows.sums < size) & ~is_masked
    return replace(
        rows,
        positions=torch.cat([rows.positions[kept], rows.positions[again]]),
        labels=torch.cat([rows.labels[kept], rows.labels[again]]),
        sums=torch.cat([rows.sums[kept], rows.sums[again] + visual * size]),
    )


def _places_within(groups: Tensor) -> Tensor:
    """How many of a group's members stand before each: (N,) group numbers to (N,) places."""
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    first = (counts.cumsum(0) - counts)[groups[order]]
    places = torch.empty_like(groups)
    places[order] = torch.arange(len(groups), device=groups.device) - first
    return places


@dataclass(frozen=True)
class _Tree:
    """A prompt and its responses as places among all tokens of a batch.

    Args:
        prompt: (P,) places.
        responses: (R,) places of each response, with the number of the log-prob that it adds up to.
        image: what the prompt shows.
    """

    prompt: Tensor
    responses: list[tuple[int, Tensor]]
    image: int


def _packed_rows(backbone: Backbone, model: nn.Module, batch: PreferenceBatch, views: Sequence[ViewName]) -> Rows:
    """All views in one row: trees of a prompt with the responses to it, without padding."""
    rows: list[View] = [getattr(batch, view) for view in views]
    ids = torch.cat([row.tokens["input_ids"].flatten() for row in rows])
    trees = _plant(batch, views, ids.cpu())
    order, positions, labels, sums = [], [], [], []
    end = 0
    for tree in trees:
        order.append(tree.prompt)
        end += len(tree.prompt)
        before = torch.tensor([end - 1])
        for number, response in tree.responses:
            order.append(response)
            own = torch.arange(end, end + len(response))
            positions.append(torch.cat([before, own])[: len(response)])
            labels.append(response)
            sums.append(torch.full_like(response, number))
            end += len(response)
    source, predicted = torch.cat(order).to(ids.device), torch.cat(labels).to(ids.device)
    return Rows(
        tokens=_take(backbone, model, batch, views, source),
        images=tuple(tree.image for tree in trees),
        positions=torch.cat(positions).to(ids.device),
        labels=ids[predicted],
        sums=torch.cat(sums).to(ids.device),
        packing=Packing(tuple(Tree(len(t.prompt), tuple(len(places) for _, places in t.responses)) for t in trees)),
    )


def _plant(batch: PreferenceBatch, views: Sequence[ViewName], ids: Tensor) -> list[_Tree]:
    """The trees of a batch, those of ``batch.images`` in front; responses to one prompt beside one image share it."""
    trees: list[_Tree] = []
    size, offset = len(batch), 0
    for number, name in enumerate(views):
        view: View = getattr(batch, name)
        attended, response = view.tokens["attention_mask"].cpu().bool(), view.response_mask.cpu()
        for row in range(size):
            prompt = offset + (attended[row] & ~response[row]).nonzero()[:, 0]
            places = offset + response[row].nonzero()[:, 0]
            offset += len(response[row])
            image = row + size * (name == "visual")
            shared = trees[row] if name == "rejected" else None
            if shared is not None and torch.equal(ids[shared.prompt], ids[prompt]):
                shared.responses.append((number * size + row, places))
            else:
                trees.append(_Tree(prompt, [(number * size + row, places)], image))
    return trees


def _take(
    backbone: Backbone, model: nn.Module, batch: PreferenceBatch, views: Sequence[ViewName], source: Tensor
) -> dict[str, Tensor]:
    """Tokens and positions of one packed row, (1, L) each, from places among all tokens of a batch."""
    rows: list[View] = [getattr(batch, view) for view in views]
    tokens = {
        name: torch.cat([row.tokens[name].flatten() for row in rows])[source][None]
        for name in rows[0].tokens
        if name != "attention_mask"
    }
    shown = [batch.retrieved if view == "visual" else batch.images for view in views]
    counted = [
        backbone.position_ids(model, row.tokens, images).flatten(-2) for row, images in zip(rows, shown, strict=True)
    ]
    return {**tokens, "position_ids": torch.cat(counted, dim=-1)[..., None, source]}


def padding_fraction(batch: PreferenceBatch, views: Sequence[ViewName], packed: bool) -> Tensor:
    """Share of the positions that went through the language model and were padding.

    Args:
        batch: B samples.
        views: the views that were scored.
        packed: whether they were packed in one row, which has no padding.

    Returns:
        0-dimensional float32, from 0 to below 1, on the batch's device.
    """
    if packed:
        return torch.zeros((), device=batch.weights.device)
    attended = [getattr(batch, view).tokens["attention_mask"] for view in views]
    positions = sum(map(len, attended)) * max(mask.shape[1] for mask in attended)
    tokens = torch.stack([mask.sum() for mask in attended]).sum()
    share: Tensor = 1 - tokens / positions
    return share


def _describe_rows(batch: PreferenceBatch, rows: Sequence[int]) -> str:
    """Samples of a batch by the rows of their images, the B originals before the retrieved ones; all if unknown."""
    size = len(batch)
    if not rows and size > 1:
        return f"One of the samples {', '.join(batch.keys)}"
    named = [f"{batch.keys[row % size]} ({'image' if row < size else 'retrieved image'})" for row in rows]
    return f"Sample {', '.join(named or batch.keys)}"
