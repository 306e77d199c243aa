"""Hallucination metrics as torchmetrics, usable without the rest of the package.

The functions need torch alone. ``POPE`` and ``CHAIR`` are imported when they are first used, because importing
torchmetrics is slow and itself imports ``transformers`` where that is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from realign_lightning.metrics.functional.chair import CaptionParser, chair_captions, ground_truth
from realign_lightning.metrics.functional.pope import pope_questions
from realign_lightning.metrics.lexicon import Lexicon

if TYPE_CHECKING:
    from realign_lightning.metrics.chair import CHAIR
    from realign_lightning.metrics.pope import POPE

_HOMES = {"CHAIR": "realign_lightning.metrics.chair", "POPE": "realign_lightning.metrics.pope"}

__all__ = ["CHAIR", "POPE", "CaptionParser", "Lexicon", "chair_captions", "ground_truth", "pope_questions"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
