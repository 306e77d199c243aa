"""Hallucination metrics as torchmetrics, usable without the rest of the package.

The functions need torch alone. The classes are imported when they are first used, because importing torchmetrics is
slow and itself imports ``transformers`` where that is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from realign_lightning.metrics.functional.amber import AmberChecker, exact_similarity, spacy_similarity
from realign_lightning.metrics.functional.captions import CaptionParser
from realign_lightning.metrics.functional.chair import chair_captions, ground_truth, highlight
from realign_lightning.metrics.functional.coco import CocoObjects
from realign_lightning.metrics.functional.hallusionbench import HallusionRow
from realign_lightning.metrics.functional.pope import pope_questions
from realign_lightning.metrics.lexicon import Lexicon

if TYPE_CHECKING:
    from realign_lightning.metrics.amber import AMBER
    from realign_lightning.metrics.chair import CHAIR
    from realign_lightning.metrics.hallusionbench import HallusionBench
    from realign_lightning.metrics.mmhal import MMHal
    from realign_lightning.metrics.pope import POPE

_HOMES = {
    "AMBER": "realign_lightning.metrics.amber",
    "CHAIR": "realign_lightning.metrics.chair",
    "HallusionBench": "realign_lightning.metrics.hallusionbench",
    "MMHal": "realign_lightning.metrics.mmhal",
    "POPE": "realign_lightning.metrics.pope",
}

__all__ = [
    "AMBER",
    "CHAIR",
    "POPE",
    "AmberChecker",
    "CaptionParser",
    "CocoObjects",
    "HallusionBench",
    "HallusionRow",
    "Lexicon",
    "MMHal",
    "chair_captions",
    "exact_similarity",
    "ground_truth",
    "highlight",
    "pope_questions",
    "spacy_similarity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
