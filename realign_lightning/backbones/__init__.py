"""Vision-language model families behind one contract, and the adapters they train with."""

from realign_lightning.backbones.adapters import LoRA
from realign_lightning.backbones.auto import AutoBackbone
from realign_lightning.backbones.base import Backbone, ImageFeatures

__all__ = ["AutoBackbone", "Backbone", "ImageFeatures", "LoRA"]
