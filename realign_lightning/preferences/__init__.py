"""Dual-preference data from good answers: mask, retrieve, induce, accept."""

from realign_lightning.preferences.accept import SentenceSimilarity, Similarity, WordOverlap
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
from realign_lightning.preferences.retrieve import ImageIndex, Neighbour, embed_images

__all__ = [
    "KINDS",
    "LIST_INSTRUCTION",
    "MASK_INSTRUCTION",
    "Answer",
    "BuildReport",
    "EndpointEngine",
    "Engine",
    "Form",
    "ImageIndex",
    "Inducer",
    "InductionRequest",
    "LLMMasker",
    "LexiconMasker",
    "LocalEngine",
    "MaskError",
    "MaskedResponse",
    "Masker",
    "Neighbour",
    "PreferenceBuilder",
    "Question",
    "SentenceSimilarity",
    "Similarity",
    "SourceSample",
    "Span",
    "SpanMasker",
    "WordOverlap",
    "embed_images",
    "find_claims",
    "read_marks",
]
