"""realign-lightning: Re-Align / rDPO for vision-language models on PyTorch Lightning.

Public names are imported when they are first used, so that ``import realign_lightning`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign_lightning.backbones import AutoBackbone, Backbone, LoRA
    from realign_lightning.data import DualPreferenceDataModule
    from realign_lightning.losses import RDPOLoss, SFTLoss, rdpo_loss
    from realign_lightning.metrics import AMBER, CHAIR, POPE, HallusionBench, MMHal
    from realign_lightning.modules import RDPOModule
    from realign_lightning.types import LogProbs, PreferenceBatch, PreferenceSample

__version__ = "0.1.0"

_HOMES = {
    "AutoBackbone": "realign_lightning.backbones",
    "Backbone": "realign_lightning.backbones",
    "LoRA": "realign_lightning.backbones",
    "DualPreferenceDataModule": "realign_lightning.data",
    "RDPOLoss": "realign_lightning.losses",
    "SFTLoss": "realign_lightning.losses",
    "rdpo_loss": "realign_lightning.losses",
    "AMBER": "realign_lightning.metrics",
    "CHAIR": "realign_lightning.metrics",
    "HallusionBench": "realign_lightning.metrics",
    "MMHal": "realign_lightning.metrics",
    "POPE": "realign_lightning.metrics",
    "RDPOModule": "realign_lightning.modules",
    "LogProbs": "realign_lightning.types",
    "PreferenceBatch": "realign_lightning.types",
    "PreferenceSample": "realign_lightning.types",
}

__all__ = [
    "AMBER",
    "CHAIR",
    "POPE",
    "AutoBackbone",
    "Backbone",
    "DualPreferenceDataModule",
    "HallusionBench",
    "LoRA",
    "LogProbs",
    "MMHal",
    "PreferenceBatch",
    "PreferenceSample",
    "RDPOLoss",
    "RDPOModule",
    "SFTLoss",
    "rdpo_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
