"""The vocabulary every room shares: samples, views, batches and log-probs.

A preference sample has two images and two responses. Three (response, image) pairs of it are scored, called views:

======== ======== =========
view     response image
======== ======== =========
chosen   y_w      v
rejected y_l      v
visual   y_w      v_l
======== ======== =========

with v the image, v_l the retrieved image, y_w the chosen and y_l the rejected response (Re-Align, arXiv 2502.13146).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

ViewName = Literal["chosen", "rejected", "visual"]
"""Name of one of the three scored (response, image) pairs."""

VIEWS: tuple[ViewName, ViewName, ViewName] = ("chosen", "rejected", "visual")
"""All views, in the order in which their rows are stacked."""

Message = Mapping[str, Any]
"""One chat message: ``{"role": "user" | "assistant" | "system", "content": str | list of parts}``."""

Prompt = str | Sequence[Message]
"""What the model is asked: a text, or a list of chat messages that ends with the user's turn."""


class SampleError(ValueError):
    """One sample cannot be used; its message says why. Readers skip the sample, count it and name it in the logs."""


VisualWords = Literal["all", "masked"]
"""Which words of the chosen response the visual preference compares: all of them, or those that were masked when the
pair was built, which are what it claims about the image."""


class MaskedSpan(NamedTuple):
    """A piece of a chosen response that was masked.

    Args:
        start: index of its first character.
        end: index behind its last one.
        kind: what it claims, for example ``object``.
    """

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class PreferenceSample:
    """One dual-preference sample, decoded and not yet encoded for any model.

    Args:
        key: name of the sample, unique within its shards.
        image: the image v that the prompt is about (RGB).
        retrieved: the similar image v_l, the rejected image of the visual preference (RGB).
        prompt: text or chat messages.
        chosen: the preferred response y_w.
        rejected: the rejected response y_l.
        provenance: where the pair comes from (``image_id``, ``retrieved_id``, ``retrieval_rank``,
            ``retrieval_score``, ``response_similarity``, ``masked``); empty when unknown.
        context: further images that the prompt shows before ``image``, the same in every view (RGB).
    """

    key: str
    image: Image.Image
    retrieved: Image.Image
    prompt: Prompt
    chosen: str
    rejected: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    context: Sequence[Image.Image] = ()

    def masked_spans(self) -> list[MaskedSpan]:
        """What was masked in the chosen response, as ``provenance`` says; empty when unknown.

        Raises:
            ValueError: if it says something else than spans of this response.
        """
        values = self.provenance.get("spans", [])
        if not isinstance(values, list) or not all(_is_span(value, len(self.chosen)) for value in values):
            raise ValueError("expected spans to be a list of {start, end, kind} within the chosen answer")
        return [MaskedSpan(value["start"], value["end"], value["kind"]) for value in values]


def _is_span(value: Any, length: int) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    start, end = value.get("start"), value.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end <= length


@dataclass(frozen=True)
class EncodedView:
    """Token-level inputs of one (prompt, response, image) triple, without padding.

    Args:
        tokens: 1-D tensors of one length L: ``input_ids`` and whatever else the family needs for every token.
        response_mask: (L,) bool, True exactly at the response's tokens, the end-of-turn token included.
        truncated: response tokens that did not fit and were cut.
    """

    tokens: Mapping[str, Tensor]
    response_mask: Tensor
    truncated: int = 0


@dataclass(frozen=True)
class EncodedSample:
    """A :class:`PreferenceSample` encoded by a backbone, ready to be collated.

    Args:
        key: the sample's key.
        chosen: encoding of (y_w, v).
        rejected: encoding of (y_l, v).
        visual: encoding of (y_w, v_l).
        image: what the vision tower takes for v; first dimension counts images or patches.
        retrieved: the same for v_l.
        weight: 1 for a sample, 0 for a stand-in that only keeps batches of all ranks equally long.
        skipped: samples that were passed over on the way to this one.
        fingerprint: identifies the content (images, prompt, responses), whatever the key; ``reference: cached`` finds
            log-probs by it. Empty when unknown.
        masked: (R,) bool over the tokens of the chosen response that were not cut: those of words that were masked when
            the pair was built; None when unknown.
    """

    key: str
    chosen: EncodedView
    rejected: EncodedView
    visual: EncodedView
    image: Mapping[str, Tensor]
    retrieved: Mapping[str, Tensor]
    weight: float = 1.0
    skipped: tuple[SkippedSample, ...] = ()
    fingerprint: str = ""
    masked: Tensor | None = None


class SkippedSample(NamedTuple):
    """A sample that could not be used: where it is and why.

    Args:
        shard: file name of the shard.
        key: key of the sample within the shard.
        reason: what is wrong with it.
    """

    shard: str
    key: str
    reason: str


@dataclass
class View:
    """A batch of B rows of one view, padded on the right to length L.

    Args:
        tokens: (B, L) tensors: ``input_ids``, ``attention_mask`` and whatever else the family needs for every token.
        response_mask: (B, L) bool, True exactly at response tokens.
    """

    tokens: dict[str, Tensor]
    response_mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Response tokens per row, (B,) int64."""
        return self.response_mask.sum(dim=1)

    def map(self, function: Any) -> View:
        """This view with ``function`` applied to every tensor."""
        return View({name: function(value) for name, value in self.tokens.items()}, function(self.response_mask))


@dataclass
class PreferenceBatch:
    """B preference samples as model inputs: three views and two sets of images, each image stored once.

    Args:
        chosen: rows of (y_w, v).
        rejected: rows of (y_l, v).
        visual: rows of (y_w, v_l).
        images: what the vision tower takes for the B images v, in row order.
        retrieved: the same for the B images v_l.
        weights: (B,) float32; 1 for a sample, 0 for a stand-in that must not count.
        keys: the B sample keys.
        truncated: keys of the samples of this batch with a response that did not fit and was cut at its end.
        skipped: samples that were passed over while this batch was read.
        fingerprints: of the B samples, see :class:`EncodedSample`; may be left out where nothing is cached.
        masked: of the B samples, see :class:`EncodedSample`; may be left out where all words count.
    """

    chosen: View
    rejected: View
    visual: View
    images: dict[str, Tensor]
    retrieved: dict[str, Tensor]
    weights: Tensor
    keys: tuple[str, ...]
    truncated: tuple[str, ...] = ()
    skipped: tuple[SkippedSample, ...] = ()
    fingerprints: tuple[str, ...] = ()
    masked: tuple[Tensor | None, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def map(self, function: Any) -> PreferenceBatch:
        """This batch with ``function`` applied to every tensor."""
        return dataclasses.replace(
            self,
            chosen=self.chosen.map(function),
            rejected=self.rejected.map(function),
            visual=self.visual.map(function),
            images={name: function(value) for name, value in self.images.items()},
            retrieved={name: function(value) for name, value in self.retrieved.items()},
            weights=function(self.weights),
            masked=tuple(None if one is None else function(one) for one in self.masked),
        )

    def to(self, *args: Any, **kwargs: Any) -> PreferenceBatch:
        """This batch with every tensor moved, as in :meth:`torch.Tensor.to`."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> PreferenceBatch:
        """This batch in page-locked memory; called by the data loader."""
        return self.map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class LogProbs:
    """Sums of response-token log-probabilities of the three views under one model, each (B,) float32.

    Args:
        chosen: log pi(y_w | x, v).
        rejected: log pi(y_l | x, v); None when it was not scored.
        visual: log pi(y_w | x, v_l); None when it was not scored.
    """

    chosen: Tensor
    rejected: Tensor | None = None
    visual: Tensor | None = None

    def items(self) -> Iterator[tuple[ViewName, Tensor]]:
        """Names and values of the views that were scored."""
        for name in VIEWS:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def detach(self) -> LogProbs:
        """The same values, cut from the graph."""
        return LogProbs(**{name: value.detach() for name, value in self.items()})


@dataclass(frozen=True)
class ResponseLengths:
    """Response tokens of the three views, each (B,); what length-normalised terms divide by.

    Args:
        chosen: tokens of y_w.
        rejected: tokens of y_l; None when it was not scored.
        visual: tokens of y_w beside v_l; None when it was not scored.
    """

    chosen: Tensor
    rejected: Tensor | None = None
    visual: Tensor | None = None
