"""The contract of everything that masks: what it is given, and what comes of it."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from realign_lightning.preferences.masking.sentences import sentence_bounds

Level = Literal["segment", "sentence"]
"""How much is masked: the words that claim something, or the whole sentences that they stand in."""

Otherwise = Literal["skip", "whole"]
"""What becomes of a response that holds nothing to mask: it is left out, or masked as a whole."""

KINDS = ("object", "attribute", "count", "relation")
"""What the maskers of this package tell apart."""

WORD_CHARACTER = r"[\w\u0300-\u036f]"
"""A character of a word, as a regular expression: letters, digits, and accents that are written behind their letter."""


class Span(NamedTuple):
    """A masked piece of a response.

    Args:
        start: index of its first character.
        end: index behind its last character.
        text: the piece itself.
        kind: what it claims: one of :data:`KINDS`, a kind of a list of your own, ``sentence`` for a whole sentence,
            ``response`` for a whole response, or ``other`` where an engine did not say.
    """

    start: int
    end: int
    text: str
    kind: str = "object"


@dataclass(frozen=True)
class MaskedResponse:
    """A response and the spans of it that are masked, in order and without overlap.

    >>> masked = MaskedResponse("a red bus and a cat", (Span(6, 9, "bus"), Span(16, 19, "cat")))
    >>> masked.render("[MASK]")
    'a red [MASK] and a [MASK]'
    >>> masked.segments
    ('a red ', ' and a ', '')
    """

    response: str
    spans: tuple[Span, ...]

    @property
    def segments(self) -> tuple[str, ...]:
        """The unmasked text before, between and behind the spans: one more piece than there are spans."""
        starts = [0, *(span.end for span in self.spans)]
        ends = [*(span.start for span in self.spans), len(self.response)]
        return tuple(self.response[start:end] for start, end in zip(starts, ends, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether nothing but masks and white space is left."""
        return bool(self.spans) and not "".join(self.segments).strip()

    def render(self, mask: str) -> str:
        """The response with ``mask`` in place of every span."""
        return mask.join(self.segments)


class MaskError(ValueError):
    """A response could not be masked, for example because an engine answered nonsense; its message says why."""


class Masker(ABC):
    """Chooses what to mask. Subclass it to bring your own."""

    @abstractmethod
    def mask(self, key: str, response: str) -> MaskedResponse | None:
        """Mask a response.

        Args:
            key: the sample's key; random choices depend on it alone, not on the order of samples.
            response: a chosen response.

        Returns:
            The masked response, or None when it holds nothing to mask.

        Raises:
            MaskError: if this response cannot be masked; others may be.
        """

    def mask_many(self, keys: Sequence[str], responses: Sequence[str]) -> list[MaskedResponse | MaskError | None]:
        """Mask several responses, each on its own; a masker that asks a model does so in batches.

        Args:
            keys: of N samples.
            responses: of the same samples.

        Returns:
            For each what :meth:`mask` returns, or the :class:`MaskError` that it raises.

        Raises:
            ValueError: if there are not as many keys as responses.
        """
        return [self._mask_or_error(key, response) for key, response in zip(keys, responses, strict=True)]

    def _mask_or_error(self, key: str, response: str) -> MaskedResponse | MaskError | None:
        try:
            return self.mask(key, response)
        except MaskError as error:
            return error

    @property
    def identity(self) -> dict[str, Any]:
        """All that the masks depend on beside key and response, in plain JSON values: the class and its settings.

        What was masked under an equal identity need not be masked again. Settings are the public attributes of the
        object.

        Raises:
            TypeError: if an attribute is no plain value; such a class needs an ``identity`` of its own.
        """
        return self._plain(vars(self))

    def _plain(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        settings = {name: value for name, value in attributes.items() if not name.startswith("_")}
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        try:
            plain: dict[str, Any] = json.loads(json.dumps({"class": name, **settings}))
        except TypeError as error:
            raise TypeError(
                f"{name} holds settings that are no plain values ({error}): define its `identity`."
            ) from error
        return plain


class SpanMasker(Masker):
    """A masker that finds all claims of a response and masks some of them. Subclass it and call :meth:`select`.

    Args:
        fraction: every claim is masked with this probability, in (0, 1]; at least one always is.
        otherwise: what to do with a response that holds no claim: ``whole`` masks all of it (a short answer to a
            question), ``skip`` gives None.
        seed: of the random choices.
        kinds: what to mask; None for everything.
        level: ``segment`` masks the claims, ``sentence`` whole sentences that hold one; ``fraction`` is then the share
            of these sentences.
        merge_adjacent: mask counts, attributes and objects with nothing but white space between them as one, so that
            "two red buses" is one mask. The last one gives the kind.

    Raises:
        ValueError: for settings that are none of these.
    """

    def __init__(
        self,
        fraction: float = 1.0,
        otherwise: Otherwise = "skip",
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        level: Level = "segment",
        merge_adjacent: bool = False,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"Expected `fraction` in (0, 1], got {fraction}.")
        for name, value, allowed in (("otherwise", otherwise, Otherwise), ("level", level, Level)):
            if value not in get_args(allowed):
                raise ValueError(f"Expected `{name}` to be one of {get_args(allowed)}, got {value!r}.")
        self.fraction = fraction
        self.otherwise: Otherwise = otherwise
        self.seed = seed
        self.kinds = None if kinds is None else list(kinds)
        self.level: Level = level
        self.merge_adjacent = merge_adjacent

    def select(self, key: str, response: str, claims: Iterable[Span]) -> MaskedResponse | None:
        """Mask a share of the claims, as the settings say.

        Args:
            key: decides, with the seed, which.
            response: the response.
            claims: spans of it, in order and without overlap.

        Returns:
            The masked response; without a claim, what ``otherwise`` says. None for a blank response.
        """
        if not response.strip():
            return None
        spans = [span for span in claims if self.kinds is None or span.kind in self.kinds]
        if self.merge_adjacent:
            spans = _merge_adjacent(response, spans)
        if self.level == "sentence":
            spans = _sentences_with(response, spans)
        if not spans:
            if self.otherwise == "skip":
                return None
            return MaskedResponse(response, (Span(0, len(response), response, "response"),))
        generator = random.Random(f"{self.seed}:{key}")
        kept = [span for span in spans if generator.random() < self.fraction]
        return MaskedResponse(response, tuple(kept or [generator.choice(spans)]))


def _merge_adjacent(response: str, spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is None or "relation" in (last.kind, span.kind) or response[last.end : span.start].strip():
            merged.append(span)
        else:
            merged[-1] = Span(last.start, span.end, response[last.start : span.end], span.kind)
    return merged


def _sentences_with(response: str, spans: Sequence[Span]) -> list[Span]:
    """The sentences that overlap one of the spans."""
    return [
        Span(start, end, response[start:end], "sentence")
        for start, end in sentence_bounds(response)
        if any(span.start < end and start < span.end for span in spans)
    ]
