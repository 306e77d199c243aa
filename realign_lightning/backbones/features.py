"""Image features of a batch, kept row by row so that several rows can share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from realign_lightning.backbones.base import ImageTokenError

LANGUAGE_INPUTS = ("image_grid_thw",)
"""Image inputs that the language model's forward reads too (positions of Qwen's image tokens), one row per image."""


@dataclass(frozen=True)
class RowFeatures:
    """What ``get_image_features`` returned, cut into the rows of a batch.

    Families return one tensor, or a list with one tensor per image, with or without a dimension for tiles. What they
    all have in common is one vector per image token, in order; so rows are cut by counting their image tokens.

    Args:
        output: the family's own output class, which its forward may look into.
        pooled: per row, (T, D) embeddings of its T image tokens.
        deepstack: per layer and row the same, for families that feed several layers (Qwen3-VL).
        inputs: per row, image inputs that the language model reads too.
        as_list: whether the family hands its features on as a list.
    """

    output: type[ModelOutput]
    pooled: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...]
    inputs: Mapping[str, tuple[Tensor, ...]]
    as_list: bool

    @classmethod
    def cut(
        cls, output: Any, images: Mapping[str, Tensor], tokens_per_row: Sequence[int], images_per_row: Sequence[int]
    ) -> RowFeatures:
        """Cut a family's output into rows.

        Args:
            output: what ``get_image_features`` returned.
            images: the image inputs that it came from.
            tokens_per_row: image tokens of every row.
            images_per_row: images of every row.

        Raises:
            ImageTokenError: when there are not as many features as image tokens, in the batch or in a row.
        """
        _check_counts(output.pooler_output, tokens_per_row, images_per_row)
        inputs = {name: torch.split(images[name], list(images_per_row)) for name in LANGUAGE_INPUTS if name in images}
        return cls(
            type(output),
            _cut(output.pooler_output, tokens_per_row),
            tuple(_cut(layer, tokens_per_row) for layer in getattr(output, "deepstack_features", None) or ()),
            inputs,
            as_list=not isinstance(output.pooler_output, Tensor),
        )

    @classmethod
    def whole(cls, output: Any, images: Mapping[str, Tensor], num_tokens: int) -> RowFeatures:
        """A family's output as one row, for a batch that is used as it is.

        Args:
            output: what ``get_image_features`` returned.
            images: the image inputs that it came from.
            num_tokens: image tokens of the batch.
        """
        num_images = [len(images[name]) for name in LANGUAGE_INPUTS if name in images]
        return cls.cut(output, images, [num_tokens], num_images)

    def select(self, rows: Sequence[int]) -> RowFeatures:
        """The features of some rows, in that order; a row may occur several times."""

        def chosen(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(values[row] for row in rows)

        return RowFeatures(
            self.output,
            chosen(self.pooled),
            tuple(chosen(layer) for layer in self.deepstack),
            {name: chosen(values) for name, values in self.inputs.items()},
            self.as_list,
        )

    def forward_inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward, made anew: transformers writes into the dictionary that it is given."""
        pooled = list(self.pooled) if self.as_list else torch.cat(self.pooled)
        output = self.output(pooler_output=pooled)
        if self.deepstack:
            output["deepstack_features"] = [list(layer) for layer in self.deepstack]
        language = {name: torch.cat(values) for name, values in self.inputs.items()}
        return {"mm_encoder_outputs": {"image": output}, **language}


def _cut(features: Tensor | Sequence[Tensor], tokens_per_row: Sequence[int]) -> tuple[Tensor, ...]:
    parts = [features] if isinstance(features, Tensor) else features
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    return torch.split(flat, list(tokens_per_row))


def _check_counts(
    features: Tensor | Sequence[Tensor], tokens_per_row: Sequence[int], images_per_row: Sequence[int]
) -> None:
    """Compare features with image tokens: row by row where the family returns them by image, else in sum."""
    if isinstance(features, Tensor):
        counts = [features.shape[1:-1].numel()] * len(features)
    else:
        counts = [part.shape[:-1].numel() for part in features]
    found, expected, wrong = sum(counts), sum(tokens_per_row), []
    if len(counts) == sum(images_per_row):
        per_image = iter(counts)
        per_row = [sum(islice(per_image, images)) for images in images_per_row]
        wrong = [row for row, tokens in enumerate(tokens_per_row) if per_row[row] != tokens]
        if wrong:
            found, expected = per_row[wrong[0]], tokens_per_row[wrong[0]]
    if found != expected:
        raise ImageTokenError(
            f"Expected one image feature per image token, got {found} features for {expected} image tokens. The "
            "processor writes other numbers of image tokens than the model makes features of: compare the backbone's "
            "`processor_kwargs` and the checkpoint's processor_config.json (patch size, image size, tokens per image) "
            "with its config.json.",
            wrong,
        )
