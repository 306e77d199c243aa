"""Checks and arithmetic that the metrics share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_texts(preds: Sequence[str], target: Sequence[Any]) -> None:
    """Check that ``preds`` is a sequence of texts with one target each.

    Args:
        preds: generated texts.
        target: what each is compared with.

    Raises:
        ValueError: if either is a single text, ``preds`` holds something else than texts, or their lengths differ.
    """
    for name, value in (("preds", preds), ("target", target)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"Expected `{name}` to be a list with one entry per example, got {type(value).__name__}.")
    for index, text in enumerate(preds):
        if not isinstance(text, str):
            raise ValueError(f"Expected `preds` to hold texts, got {type(text).__name__} at index {index}.")
    if len(preds) != len(target):
        raise ValueError(f"Expected `preds` and `target` of the same length, got {len(preds)} and {len(target)}.")


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of two counts; 0 where the denominator is 0.

    Args:
        numerator: integer count.
        denominator: integer count.

    Returns:
        A float64 scalar (float32 on devices without float64) on the device of the counts.

    >>> ratio(torch.tensor(1), torch.tensor(3)), ratio(torch.tensor(0), torch.tensor(0))
    (tensor(0.3333, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    dtype = torch.float32 if denominator.device.type == "mps" else torch.float64
    return numerator.to(dtype) / denominator.clamp(min=1).to(dtype)


def fill_template(template: str, values: Mapping[str, str], source: object) -> str:
    """A prompt whose blanks are filled one after the other.

    Args:
        template: text with one ``{}`` per value.
        values: what fills them, in order, by what it is.
        source: where the template comes from, for messages.

    Raises:
        ValueError: if it has another number of blanks.

    >>> fill_template("Is it {} or {}?", {"first": "a dog", "second": "a cat"}, "template.txt")
    'Is it a dog or a cat?'
    """
    pieces = template.split("{}")
    if len(pieces) != len(values) + 1:
        raise ValueError(
            f"Expected {source} to hold '{{}}' {len(values)} times ({', '.join(values)}), got {len(pieces) - 1} times."
        )
    return "".join(piece + value for piece, value in zip(pieces, [*values.values(), ""], strict=True))
