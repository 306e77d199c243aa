"""Step 3 of building pairs: let the policy fill the masks while it looks at another image (Re-Align, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import LogitsProcessorList

from realign_lightning.backbones.base import Backbone
from realign_lightning.preferences import completing
from realign_lightning.preferences.infill import ForcedInfill, ListedInfill
from realign_lightning.preferences.mask import MaskedResponse
from realign_lightning.types import Prompt

FREEFORM_INSTRUCTION = completing.FREEFORM_INSTRUCTION.replace("{mask}", "[MASK]")
"""Asks a general VLM for the completed response."""


class InductionRequest(NamedTuple):
    """One response to complete.

    Args:
        prompt: what the original response answers.
        masked: the masked response.
        image: the retrieved image to look at.
    """

    prompt: Prompt
    masked: MaskedResponse
    image: Image.Image


class Inducer:
    """Completes masked responses on retrieved images, in batches.

    ``freeform`` asks for the completed text, as the paper does. ``infill`` forces every unmasked word to stay and lets
    the policy choose each filler from ``fillers`` only, so that the pair differs in the masked places and nowhere else.
    A response that is masked as a whole is simply asked for again: the original prompt, on the other image.

    Args:
        mode: ``freeform`` or ``infill``.
        instruction: prompt for completing; ``{masked}`` stands for the masked response, ``{prompt}`` for the original
            prompt (plain-text prompts only).
        mask_token: what stands for a mask in the instruction.
        fillers: words that may fill a mask; needed by ``infill``.
        sample: draw from the policy's distribution instead of taking its best guess.
        temperature: of the drawing.
        max_new_tokens: longest completion.
        batch_size: requests per call of the model's ``generate``.
        seed: of the drawing; torch's global generator is left as it was.

    Raises:
        ValueError: for ``infill`` without fillers, or an instruction without ``{masked}``.
    """

    def __init__(
        self,
        mode: Literal["freeform", "infill"] = "freeform",
        instruction: str = FREEFORM_INSTRUCTION,
        mask_token: str = "[MASK]",  # noqa: S107
        fillers: Sequence[str] | None = None,
        sample: bool = False,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        if mode == "infill" and not fillers:
            raise ValueError("mode='infill' chooses every filler from a list: expected `fillers`, got none.")
        if "{masked}" not in instruction:
            raise ValueError(f"Expected `instruction` to hold '{{masked}}', got {instruction!r}.")
        self.mode: Literal["freeform", "infill"] = mode
        self.instruction = instruction
        self.mask_token = mask_token
        self.fillers = list(fillers or [])
        self.sample = sample
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.seed = seed

    def complete(
        self, backbone: Backbone, model: nn.Module, requests: Sequence[InductionRequest], description: str = "induce"
    ) -> list[str]:
        """Complete every request.

        Args:
            backbone: the model's family.
            model: the policy.
            requests: what to complete.
            description: text beside the progress bar.

        Returns:
            One completion per request; an empty text where ``max_new_tokens`` were too few.
        """
        completions: list[str] = [""] * len(requests)
        # Rows of like length share a batch, so that little of it is padding.
        order = sorted(range(len(requests)), key=lambda row: len(requests[row].masked.response))
        with isolate_rng():
            torch.manual_seed(self.seed)
            for start in tqdm(range(0, len(order), self.batch_size), desc=description, unit="batch"):
                rows = order[start : start + self.batch_size]
                texts = self._complete_batch(backbone, model, [requests[row] for row in rows])
                for row, text in zip(rows, texts, strict=True):
                    completions[row] = text
        return completions

    def _complete_batch(self, backbone: Backbone, model: nn.Module, requests: Sequence[InductionRequest]) -> list[str]:
        prompts = [self._ask(request) for request in requests]
        inputs = backbone.encode_prompts(prompts, [request.image for request in requests])
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.sample:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        if self.mode == "infill":
            rows = [
                None if request.masked.is_whole else self._infill_row(backbone, prompt, request.masked)
                for prompt, request in zip(prompts, requests, strict=True)
            ]
            forcing = ForcedInfill(rows, inputs["input_ids"].shape[1], backbone.pad_token_id)
            settings["logits_processor"] = LogitsProcessorList([forcing])
        # A completion that was cut would teach the policy to tell answers by their length.
        return backbone.generate(model, inputs, drop_unfinished=True, **settings)

    def _ask(self, request: InductionRequest) -> Prompt:
        if request.masked.is_whole:
            return request.prompt
        masked = request.masked.render(self.mask_token)
        if "{prompt}" in self.instruction and not isinstance(request.prompt, str):
            raise ValueError("The instruction holds '{prompt}', which needs plain-text prompts; this one is a chat.")
        # Not str.format: braces in a response are text.
        return self.instruction.replace("{prompt}", str(request.prompt)).replace("{masked}", masked)

    def _infill_row(self, backbone: Backbone, prompt: Prompt, masked: MaskedResponse) -> ListedInfill:
        end = backbone.end_token_ids[0]
        return ListedInfill(masked.segments, self.fillers, backbone.response_tokenizer(prompt), end)
