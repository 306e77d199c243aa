"""Step 1 of building pairs: replace what a good answer claims by masks (Re-Align, section 3.1, strategic masking)."""

from __future__ import annotations

from realign_lightning.preferences.masking.base import (
    KINDS,
    Level,
    MaskedResponse,
    Masker,
    MaskError,
    Otherwise,
    Span,
    SpanMasker,
)
from realign_lightning.preferences.masking.english import find_claims
from realign_lightning.preferences.masking.lexicon import LexiconMasker
from realign_lightning.preferences.masking.llm import LIST_INSTRUCTION, MASK_INSTRUCTION, LLMMasker
from realign_lightning.preferences.masking.marks import read_marks

__all__ = [
    "KINDS",
    "LIST_INSTRUCTION",
    "MASK_INSTRUCTION",
    "LLMMasker",
    "Level",
    "LexiconMasker",
    "MaskError",
    "MaskedResponse",
    "Masker",
    "Otherwise",
    "Span",
    "SpanMasker",
    "find_claims",
    "read_marks",
]
