"""Step 1 of building pairs: replace what a good answer claims by masks (Re-Align, section 3.1, strategic masking)."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Span(NamedTuple):
    """A masked piece of a response.

    Args:
        start: index of its first character.
        end: index behind its last character.
        text: the piece itself.
    """

    start: int
    end: int
    text: str


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
        """


class LexiconMasker(Masker):
    """Masks the words and phrases of a list; needs no model and no download.

    Matches whole words whatever their case, longer phrases first. Every match is masked with ``probability``, and at
    least one always is.

    Args:
        words: words and phrases to mask, for example the objects of a world.
        probability: share of matches to mask, in (0, 1].
        otherwise: what to do with a response that holds none of the words: ``whole`` masks all of it (a short answer
            to a question), ``skip`` gives None.
        seed: of the random choices.

    Raises:
        ValueError: for an empty list or a probability outside (0, 1].

    >>> masker = LexiconMasker(["bus", "traffic light"])
    >>> masker.mask("k", "a Bus at a traffic light .").render("[MASK]")
    'a [MASK] at a [MASK] .'
    """

    def __init__(
        self,
        words: Sequence[str],
        probability: float = 1.0,
        otherwise: Literal["whole", "skip"] = "skip",
        seed: int = 0,
    ) -> None:
        if not words or any(not word.strip() for word in words):
            raise ValueError(f"Expected `words` to be a list of non-empty words, got {list(words)!r}.")
        if not 0 < probability <= 1:
            raise ValueError(f"Expected `probability` in (0, 1], got {probability}.")
        self.words = list(words)
        self.probability = probability
        self.otherwise: Literal["whole", "skip"] = otherwise
        self.seed = seed
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    def mask(self, key: str, response: str) -> MaskedResponse | None:
        """Mask listed words; see the class for what happens without any."""
        spans = [Span(match.start(), match.end(), match.group()) for match in self._pattern.finditer(response)]
        if not spans:
            if self.otherwise == "skip":
                return None
            return MaskedResponse(response, (Span(0, len(response), response),))
        generator = random.Random(f"{self.seed}:{key}")
        kept = [span for span in spans if generator.random() < self.probability]
        return MaskedResponse(response, tuple(kept or [generator.choice(spans)]))
