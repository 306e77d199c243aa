"""Dual-preference data from good answers: mask, retrieve, induce, accept."""

from realign_lightning.preferences.accept import Gate, SentenceSimilarity, Similarity, Verdict, WordOverlap
from realign_lightning.preferences.balance import surplus_answers
from realign_lightning.preferences.build import PreferenceBuilder
from realign_lightning.preferences.completing import Completer, Completion
from realign_lightning.preferences.mask import (
    KINDS,
    LIST_INSTRUCTION,
    MASK_INSTRUCTION,
    LexiconMasker,
    LLMMasker,
    MaskedResponse,
    Masker,
    MaskError,
    Span,
    SpanMasker,
    find_claims,
    read_marks,
)
from realign_lightning.preferences.near_duplicates import Band, are_near_duplicates, calibrate_band, perceptual_hash
from realign_lightning.preferences.pipeline.report import BuildReport
from realign_lightning.preferences.retrieve import (
    IVFPQ,
    EmbeddingStore,
    ImageEncoder,
    ImageIndex,
    Neighbour,
    PolicyEncoder,
    Retriever,
    TimmEncoder,
    content_hashes,
    embed_images,
    embed_missing,
)
from realign_lightning.preferences.trials import Attempt, Candidate, Outcome, Trial, Trials

__all__ = [
    "IVFPQ",
    "KINDS",
    "LIST_INSTRUCTION",
    "MASK_INSTRUCTION",
    "Attempt",
    "Band",
    "BuildReport",
    "Candidate",
    "Completer",
    "Completion",
    "EmbeddingStore",
    "Gate",
    "ImageEncoder",
    "ImageIndex",
    "LLMMasker",
    "LexiconMasker",
    "MaskError",
    "MaskedResponse",
    "Masker",
    "Neighbour",
    "Outcome",
    "PolicyEncoder",
    "PreferenceBuilder",
    "Retriever",
    "SentenceSimilarity",
    "Similarity",
    "Span",
    "SpanMasker",
    "TimmEncoder",
    "Trial",
    "Trials",
    "Verdict",
    "WordOverlap",
    "are_near_duplicates",
    "calibrate_band",
    "content_hashes",
    "embed_images",
    "embed_missing",
    "find_claims",
    "perceptual_hash",
    "read_marks",
    "surplus_answers",
]
