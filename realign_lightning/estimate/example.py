"""A batch as a family's processor makes it, of samples whose size is chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from realign_lightning.backbones import Backbone
from realign_lightning.types import EncodedView, PreferenceBatch, PreferenceSample

PICTURE = (640, 480)
"""Width and height of the assumed pictures in pixels, those of most photographs in COCO."""

PROMPT_TOKENS = 64
"""Assumed text tokens of a prompt, beside its chat template and picture."""

RESPONSE_TOKENS = 128
"""Assumed tokens of a response."""


FINGERPRINT = "example"
"""Fingerprint of the samples, by which cached log-probs are looked up."""


@dataclass(frozen=True)
class Example:
    """A batch and its sizes.

    Args:
        batch: real tokens and pictures.
        length: tokens of every row, padding included.
        response_tokens: tokens of the chosen responses; rejected ones are one shorter, so that there is padding, as
            between any two responses.
    """

    batch: PreferenceBatch
    length: int
    response_tokens: int


def example_batch(
    backbone: Backbone, batch_size: int, length: int | None = None, response_tokens: int = RESPONSE_TOKENS
) -> Example:
    """A batch of equal samples with pictures of 640 x 480 pixels.

    Args:
        backbone: encodes it; its processor is loaded.
        batch_size: samples.
        length: tokens of a row; None takes the template with its picture, 64 tokens of text and the response, or what
            the backbone's ``max_length`` leaves of them.
        response_tokens: tokens of a response.

    Raises:
        ValueError: if the tokens do not fit into ``length``, or that not into the backbone's ``max_length``.
        OSError: if the processor cannot be loaded.
    """
    picture = Image.new("RGB", PICTURE)
    sample = PreferenceSample("example", picture, picture, "What is this?", "A bus.", "A cat.")
    encoded = backbone.encode_sample(sample)
    least = int((~encoded.chosen.response_mask).sum())
    length = _length(least, length, response_tokens, getattr(backbone, "max_length", None))
    prompt = length - response_tokens
    encoded = dataclasses.replace(
        encoded,
        chosen=_resize(encoded.chosen, prompt, response_tokens),
        rejected=_resize(encoded.rejected, prompt, max(1, response_tokens - 1)),
        visual=_resize(encoded.visual, prompt, response_tokens),
        fingerprint=FINGERPRINT,
    )
    return Example(backbone.collate([encoded] * batch_size), length, response_tokens)


def _length(prompt: int, length: int | None, response_tokens: int, max_length: int | None) -> int:
    if response_tokens < 1:
        raise ValueError(f"Expected `--response-tokens` to be at least 1, got {response_tokens}.")
    least = prompt + response_tokens
    if max_length is not None and least > max_length:
        raise ValueError(
            f"Expected the backbone's `max_length` to hold a prompt with its picture ({prompt} tokens) and a response "
            f"({response_tokens}), got {max_length}: raise it, or lower --response-tokens."
        )
    if length is None:
        return min(least + PROMPT_TOKENS, max_length or least + PROMPT_TOKENS)
    if length < least:
        raise ValueError(
            f"Expected `--length` to be at least {least}, got {length}: a prompt with its picture takes {prompt} "
            f"tokens, the response {response_tokens}."
        )
    if max_length is not None and length > max_length:
        raise ValueError(
            f"Expected `--length` to be at most the backbone's `max_length` of {max_length}, got {length}: longer "
            "sequences are cut in training."
        )
    return length


def _resize(view: EncodedView, prompt: int, response: int) -> EncodedView:
    """Repeat the last token of prompt and response until there are as many as asked for."""
    given = int((~view.response_mask).sum())

    def resize(values: Tensor) -> Tensor:
        more = values[given - 1].expand(prompt - given)
        return torch.cat([values[:given], more, values[-1].expand(response)])

    mask = torch.arange(prompt + response) >= prompt
    return EncodedView({name: resize(values) for name, values in view.tokens.items()}, mask)
