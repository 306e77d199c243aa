"""PaliGemma: a prefix language model without chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PaliGemmaProcessor

from realign_lightning.backbones.auto import AutoBackbone, RenderedPrompt, ResponseTokens
from realign_lightning.types import EncodedView, Prompt, SampleError


class PaliGemmaBackbone(AutoBackbone):
    """PaliGemma 1 and 2 (arXiv 2407.07726); arguments as :class:`AutoBackbone`, ``chat_template`` stays None.

    Differs from every chat model in three points. A prompt is one text: the processor writes image tokens, start token,
    text and a line break, and the answer follows with the end-of-sequence token. Prompt tokens see each other in both
    directions while answer tokens are causal, which the model reads from ``token_type_ids``: 1 on answers. Without them
    every position sees the whole answer, and log-probs mean nothing.
    """

    def _check_template(self, processor: Any) -> None:
        if not isinstance(processor, PaliGemmaProcessor):
            raise ValueError(
                f"Expected {self.path!r} to be a PaliGemma, got {type(processor).__name__}: use AutoBackbone."
            )
        if self.chat_template is not None:
            raise ValueError("PaliGemma has no chat: leave `chat_template` null.")

    def _render_prompt(self, prompt: Prompt, num_images: int = 1) -> RenderedPrompt:
        messages = self._messages(prompt, num_images)
        if len(messages) > 1:
            raise SampleError("PaliGemma takes one user turn, no chat")
        if not num_images:
            raise SampleError("PaliGemma needs an image")
        parts = messages[0]["content"]
        text = " ".join(part["text"] for part in parts if part.get("type") == "text")
        return RenderedPrompt(messages, self.processor.image_token * num_images + text)

    def _render_responses(self, prompt: RenderedPrompt, responses: Sequence[str]) -> list[str]:
        return [f"{response.strip()}{self.tokenizer.eos_token}" for response in responses]

    def _response_tokens(self, prompt: RenderedPrompt, responses: Sequence[str]) -> list[ResponseTokens]:
        for response in responses:
            self._check_plain(response, "response")
        endings = self._render_responses(prompt, responses)
        rows = self._tokenize(endings, special=False)
        return [ResponseTokens(*row, ending) for row, ending in zip(rows, endings, strict=True)]

    def _takes_start_token(self, text: str) -> bool:
        return True

    def _with_response(self, prompt_tokens: Mapping[str, Tensor], ids: Sequence[int], room: int) -> EncodedView:
        view = super()._with_response(prompt_tokens, ids, room)
        tokens = {**view.tokens, "token_type_ids": view.response_mask.long()}
        return EncodedView(tokens, view.response_mask, view.truncated)
