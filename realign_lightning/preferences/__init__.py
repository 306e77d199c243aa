"""Dual-preference data from good answers: mask, retrieve, induce, accept."""

from realign_lightning.preferences.accept import SentenceSimilarity, Similarity, WordOverlap
from realign_lightning.preferences.build import BuildReport, PreferenceBuilder, SourceSample
from realign_lightning.preferences.induce import Inducer, InductionRequest
from realign_lightning.preferences.mask import LexiconMasker, MaskedResponse, Masker, Span
from realign_lightning.preferences.retrieve import ImageIndex, Neighbour, embed_images

__all__ = [
    "BuildReport",
    "ImageIndex",
    "Inducer",
    "InductionRequest",
    "LexiconMasker",
    "MaskedResponse",
    "Masker",
    "Neighbour",
    "PreferenceBuilder",
    "SentenceSimilarity",
    "Similarity",
    "SourceSample",
    "Span",
    "WordOverlap",
    "embed_images",
]
