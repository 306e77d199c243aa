"""Dual-preference data from good answers: mask, retrieve, induce, accept."""

from realign_lightning.preferences.accept import Gate, SentenceSimilarity, Similarity, Verdict, WordOverlap
from realign_lightning.preferences.build import BuildReport, PreferenceBuilder, SourceSample
from realign_lightning.preferences.endpoint import EndpointEngine
from realign_lightning.preferences.engine import Answer, Engine, Form, Question
from realign_lightning.preferences.induce import Inducer, InductionRequest
from realign_lightning.preferences.local import LocalEngine
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
from realign_lightning.preferences.memo import Memo, content_key
from realign_lightning.preferences.near_duplicates import Band, are_near_duplicates, calibrate_band, perceptual_hash
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

__all__ = [
    "IVFPQ",
    "KINDS",
    "LIST_INSTRUCTION",
    "MASK_INSTRUCTION",
    "Answer",
    "Band",
    "BuildReport",
    "EmbeddingStore",
    "EndpointEngine",
    "Engine",
    "Form",
    "Gate",
    "ImageEncoder",
    "ImageIndex",
    "Inducer",
    "InductionRequest",
    "LLMMasker",
    "LexiconMasker",
    "LocalEngine",
    "MaskError",
    "MaskedResponse",
    "Masker",
    "Memo",
    "Neighbour",
    "PolicyEncoder",
    "PreferenceBuilder",
    "Question",
    "Retriever",
    "SentenceSimilarity",
    "Similarity",
    "SourceSample",
    "Span",
    "SpanMasker",
    "TimmEncoder",
    "Verdict",
    "WordOverlap",
    "are_near_duplicates",
    "calibrate_band",
    "content_hashes",
    "content_key",
    "embed_images",
    "embed_missing",
    "find_claims",
    "perceptual_hash",
    "read_marks",
]
