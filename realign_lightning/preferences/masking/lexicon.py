"""Masking by word lists and rules: no model, no download."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from realign_lightning.preferences.masking.base import (
    KINDS,
    WORD_CHARACTER,
    Level,
    MaskedResponse,
    Otherwise,
    Span,
    SpanMasker,
)
from realign_lightning.preferences.masking.english import RULES, find_claims
from realign_lightning.preferences.masking.vocabulary import lists_sha256


class LexiconMasker(SpanMasker):
    """Masks what an English answer claims about its image; needs no model and no download.

    Without ``words`` these are objects (the names of :meth:`realign_lightning.metrics.Lexicon.coco` and a longer list
    of everyday things), attributes (colours, materials, sizes, shapes, textures, states), counts ("three", "a pair of",
    "10:30") and relations ("on", "in front of", "holding", where they relate things: not "on Monday", not "in the
    image"). What counts is decided by word lists and neighbouring words; see :func:`find_claims`.

    With ``words`` nothing but these words and phrases is masked: whole words whatever their case, longer phrases first.

    Args:
        words: words and phrases to mask in place of the built-in lists, for example the objects of a world: a list,
            whose words are of the kind ``object``, or lists by kind.
        fraction: every match is masked with this probability, in (0, 1]; at least one always is.
        otherwise: what to do with a response without a match: ``whole`` masks all of it (a short answer to a
            question), ``skip`` gives None.
        seed: of the random choices, which depend on it and the sample's key alone.
        kinds: what to mask: of ``object``, ``attribute``, ``count``, ``relation``, or of the kinds of ``words``; None
            for all of them.
        level: ``segment`` masks the matches, ``sentence`` whole sentences that hold one; ``fraction`` is then the share
            of these sentences.
        merge_adjacent: mask counts, attributes and objects with nothing but white space between them as one.

    Raises:
        ValueError: for an empty list, a word that is listed twice under different kinds, or settings that are none of
            these.

    >>> LexiconMasker().mask("k", "Two red buses are parked in front of a hotel on Monday.").render("[MASK]")
    '[MASK] [MASK] [MASK] are [MASK] a [MASK] on Monday.'
    >>> masker = LexiconMasker(["bus", "traffic light"])
    >>> masker.mask("k", "a Bus at a traffic light .").render("[MASK]")
    'a [MASK] at a [MASK] .'
    """

    def __init__(
        self,
        words: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        fraction: float = 1.0,
        otherwise: Otherwise = "skip",
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        level: Level = "segment",
        merge_adjacent: bool = False,
    ) -> None:
        super().__init__(fraction, otherwise, seed, kinds, level, merge_adjacent)
        self.words = None if words is None else _by_kind(words)
        known = KINDS if self.words is None else tuple(self.words)
        if self.kinds is not None and (not self.kinds or set(self.kinds) - set(known)):
            raise ValueError(f"Expected `kinds` to be some of {known}, got {self.kinds}.")
        kind_of = _kind_of(self.words or {})
        longest_first = sorted(kind_of, key=len, reverse=True)
        self._kinds = [kind_of[word] for word in longest_first]
        # A group for each word tells which one matched; lower-casing the match does not, for all of Unicode.
        choices = "|".join(f"({re.escape(word)})" for word in longest_first)
        self._pattern = re.compile(rf"(?<!{WORD_CHARACTER})(?:{choices})(?!{WORD_CHARACTER})", re.IGNORECASE)

    def mask(self, key: str, response: str) -> MaskedResponse | None:
        """Mask what the class says; see there for a response without any of it."""
        claims = find_claims(response) if self.words is None else self._listed(response)
        return self.select(key, response, claims)

    def _listed(self, response: str) -> Iterator[Span]:
        for match in self._pattern.finditer(response):
            assert match.lastindex is not None  # noqa: S101 - one group per word
            yield Span(match.start(), match.end(), match.group(), self._kinds[match.lastindex - 1])

    @property
    def identity(self) -> dict[str, Any]:
        """The class, its settings, and the version of the built-in rules and lists where they are used."""
        return super().identity | ({"rules": RULES, "lists": lists_sha256()} if self.words is None else {})


def _by_kind(words: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    lists = words if isinstance(words, Mapping) else {"object": words}
    if not lists or any(
        isinstance(names, str) or not names or any(not name.strip() for name in names) for names in lists.values()
    ):
        raise ValueError(f"Expected `words` to be a list of non-empty words, or such lists by kind, got {words!r}.")
    return {kind: list(names) for kind, names in lists.items()}


def _kind_of(lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, names in lists.items():
        for name in names:
            if found.setdefault(name.lower(), kind) != kind:
                raise ValueError(f"Expected every word of `words` under one kind, got {name!r} under several.")
    return found
