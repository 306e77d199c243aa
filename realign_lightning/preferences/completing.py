"""Step 3 of building pairs: ask for a masked response's completion beside another image (Re-Align, section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image

from realign_lightning.engines.base import Answer, Engine, Form, Question
from realign_lightning.engines.chat_parts import text_of
from realign_lightning.engines.local import LocalEngine
from realign_lightning.preferences.mask import MaskedResponse, Span
from realign_lightning.types import Prompt

Mode = Literal["freeform", "infill"]
"""Whether the whole completed text is asked for, or the blanks only."""

FREEFORM_INSTRUCTION = (
    "Here is an answer to the question about this image: {prompt}\n{masked}\n"
    "Replace every {mask} by what you see in the image and write out the completed answer, nothing else."
)
"""Asks a general VLM for the completed response, or one that is held to the unmasked words anyway; the paper prints no
wording of its own."""

LIST_INSTRUCTION = (
    "Here is an answer to the question about this image, with numbered blanks: {prompt}\n{masked}\n"
    "For every blank write a line: its number, a colon, and the words that fit what you see in the image. Write "
    "nothing else."
)
"""Asks for the blanks only, from an engine that cannot be held to the unmasked words."""

_LINE = re.compile(r"\s*\[?(\d+)\]?\s*[:.)]\s*(.+?)\s*")


class Completion(NamedTuple):
    """What came of an answer.

    Args:
        text: the completed response; empty where there is none.
        reason: why there is none (``unfinished``, ``nonsense``); None where there is one.
    """

    text: str
    reason: Literal["unfinished", "nonsense"] | None = None


class Completer:
    """Makes questions of masked responses, and completions of the answers.

    ``freeform`` asks for the completed text, as the paper does. ``infill`` asks for the blanks only and splices them
    into the chosen response, so that everything unmasked is verbatim. An engine that can be held to a form writes the
    blanks between the fixed words; any other lists them by number, and a list that does not fit is nonsense. A response
    that is masked as a whole is simply asked for again: the original prompt, on the given image.

    Args:
        mode: ``freeform`` or ``infill``.
        engine: who answers; None is the policy on this machine (:class:`LocalEngine`).
        instruction: prompt for completing, with ``{masked}`` for the masked response, ``{prompt}`` for the original
            prompt (of a chat the last turn) and ``{mask}`` for the mask; None is the default of the mode.
        mask_token: what stands for a mask; in a numbered list ``[1]``, ``[2]`` and so on do.
        fillers: what a blank may become, for ``infill`` with an engine that can be held to it; empty leaves it free.
        extra_tokens: a free blank may be this many tokens longer than the text that it stands for has characters
            divided by three, a cautious guess of its tokens.

    Raises:
        ValueError: for an unknown mode, an instruction without ``{masked}``, or fillers that the engine cannot be held
            to.
    """

    def __init__(
        self,
        mode: Mode = "freeform",
        engine: Engine | None = None,
        instruction: str | None = None,
        mask_token: str = "[MASK]",  # noqa: S107 - no secret
        fillers: Sequence[str] = (),
        extra_tokens: int = 3,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"Expected `mode` to be one of {get_args(Mode)}, got {mode!r}.")
        self.mode: Mode = mode
        self.engine = LocalEngine() if engine is None else engine
        self.mask_token = mask_token
        self.fillers = list(fillers)
        self.extra_tokens = extra_tokens
        if self.fillers and not (mode == "infill" and self.engine.can_force):
            raise ValueError("`fillers` need mode='infill' and an engine that can be held to a form (LocalEngine).")
        self.instruction = self._default_instruction if instruction is None else instruction
        if "{masked}" not in self.instruction:
            raise ValueError(f"Expected `instruction` to hold '{{masked}}', got {self.instruction!r}.")

    @property
    def _lists(self) -> bool:
        return self.mode == "infill" and not self.engine.can_force

    @property
    def _default_instruction(self) -> str:
        return LIST_INSTRUCTION if self._lists else FREEFORM_INSTRUCTION

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that completions depend on beside prompt, masked response and image."""
        settings = {"mode": self.mode, "instruction": self.instruction, "mask_token": self.mask_token}
        return {**settings, "fillers": self.fillers, "extra": self.extra_tokens, "engine": dict(self.engine.identity)}

    def question(self, prompt: Prompt, masked: MaskedResponse, image: Image.Image, seed: int = 0) -> Question:
        """What to ask for a completion.

        Args:
            prompt: what the chosen response answers.
            masked: the chosen response and its spans.
            image: the retrieved image, or the original itself.
            seed: of what is drawn.
        """
        masked = join_touching(masked)
        if masked.is_whole:
            return Question(prompt, image, seed)
        numbered = iter(range(1, len(masked.spans) + 1))
        texts = [f"[{next(numbered)}]" if self._lists else self.mask_token for _ in masked.spans]
        shown = Form(masked.segments, ()).fill(texts)
        # Not str.format: braces in a response are text.
        asked = re.sub(
            r"\{(prompt|masked|mask)\}",
            lambda match: {"prompt": text_of(prompt), "masked": shown, "mask": self.mask_token}[match[1]],
            self.instruction,
        )
        form = None
        if self.mode == "infill" and self.engine.can_force:
            longest = tuple(len(span.text) // 3 + 1 + self.extra_tokens for span in masked.spans)
            form = Form(masked.segments, longest, tuple(self.fillers))
        return Question(asked, image, seed, form)

    def read(self, masked: MaskedResponse, answer: Answer) -> Completion:
        """What an answer completes the response to.

        Args:
            masked: as it was asked for.
            answer: without an error.
        """
        if not answer.finished:
            return Completion("", "unfinished")
        masked = join_touching(masked)
        if not self._lists or masked.is_whole:
            return Completion(answer.text)
        blanks = _listed(answer.text, len(masked.spans))
        return Completion("", "nonsense") if blanks is None else Completion(Form(masked.segments, ()).fill(blanks))


def join_touching(masked: MaskedResponse) -> MaskedResponse:
    """The response with spans joined that have nothing but white space between them: to complete they are one.

    Args:
        masked: a response and its spans.

    >>> masked = MaskedResponse("a red bus", (Span(2, 5, "red", "attribute"), Span(6, 9, "bus")))
    >>> join_touching(masked).render("[MASK]")
    'a [MASK]'
    """
    joined: list[Span] = []
    for span in masked.spans:
        if joined and not masked.response[joined[-1].end : span.start].strip():
            start = joined.pop().start
            span = Span(start, span.end, masked.response[start : span.end], span.kind)
        joined.append(span)
    return MaskedResponse(masked.response, tuple(joined))


def _listed(text: str, count: int) -> list[str] | None:
    """The words of a numbered list from 1 to ``count``; None for anything else."""
    lines = [line for line in text.splitlines() if line.strip()]
    matches = [match for line in lines if (match := _LINE.fullmatch(line)) is not None]
    numbers = [int(match[1]) for match in matches]
    if len(matches) != len(lines) or numbers != list(range(1, count + 1)):
        return None
    return [match[2] for match in matches]
