"""Vision-language model families behind one contract, and the adapters they train with.

The contract loads nothing; the families and adapters, which need transformers and peft, are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from realign_lightning.backbones.base import PARTS, Backbone, ImageFeatures, ImageTokenError, Part

if TYPE_CHECKING:
    from realign_lightning.backbones.adapters import LoRA
    from realign_lightning.backbones.auto import AutoBackbone
    from realign_lightning.backbones.packing import Packing, Tree
    from realign_lightning.backbones.paligemma import PaliGemmaBackbone
    from realign_lightning.backbones.strength import AdapterStrength

_HOMES = {
    "AdapterStrength": "realign_lightning.backbones.strength",
    "AutoBackbone": "realign_lightning.backbones.auto",
    "LoRA": "realign_lightning.backbones.adapters",
    "Packing": "realign_lightning.backbones.packing",
    "PaliGemmaBackbone": "realign_lightning.backbones.paligemma",
    "Tree": "realign_lightning.backbones.packing",
}

__all__ = [
    "PARTS",
    "AdapterStrength",
    "AutoBackbone",
    "Backbone",
    "ImageFeatures",
    "ImageTokenError",
    "LoRA",
    "Packing",
    "PaliGemmaBackbone",
    "Part",
    "Tree",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
