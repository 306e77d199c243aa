"""The vocabulary head on response positions, a few at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

LOGITS_AT_A_TIME = 2**25
"""Logits that are held at a time (128 MiB in float32), whatever the vocabulary and the length of the responses."""


def token_log_probs(model: Any, output: BaseModelOutputWithPast, positions: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of tokens, from a float32 log-softmax of the model's own logits.

    Positions go through the head in chunks of :data:`LOGITS_AT_A_TIME` logits; for the backward pass these are computed
    once more instead of being kept.

    Args:
        model: a transformers model with a vocabulary head; its own forward applies head, scaling and soft-capping.
        output: of the layers below the head, with ``last_hidden_state`` (B, L, D).
        positions: (N,) places in the B x L positions from which the tokens are predicted; a place may occur twice.
        labels: (N,) the tokens.

    Returns:
        (N,) float32.
    """
    states = output.last_hidden_state
    assert states is not None  # noqa: S101
    hidden = states.flatten(0, 1)[positions]
    size = max(1, LOGITS_AT_A_TIME // _vocabulary(model))
    chunks = list(zip(torch.split(hidden, size), torch.split(labels, size), strict=True))
    again = torch.is_grad_enabled() and len(chunks) > 1
    below = type(output)
    parts = [
        checkpoint(_log_probs, model, below, *chunk, use_reentrant=False, preserve_rng_state=False)
        if again
        else _log_probs(model, below, *chunk)
        for chunk in chunks
    ]
    return torch.cat(parts)


class _Done:
    """Stands for the layers below the head when they have run: calling them gives their output.

    So a model's own forward applies head, scaling and soft-capping, and none of this is written down a second time.
    """

    def __init__(self, below: nn.Module, output: BaseModelOutputWithPast) -> None:
        self._below = below
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)


def _log_probs(model: Any, output: type[BaseModelOutputWithPast], hidden: Tensor, labels: Tensor) -> Tensor:
    done = _Done(model.base_model, output(last_hidden_state=hidden[None]))
    # Not copy.copy, for which FSDP2's classes run their constructor.
    head = object.__new__(type(model))
    head.__dict__ = {**model.__dict__, "_modules": {**model._modules, model.base_model_prefix: done}}
    logits = type(model).forward(head).logits[0]
    with torch.autocast(logits.device.type, enabled=False):
        return -F.cross_entropy(logits.float(), labels, reduction="none")


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
