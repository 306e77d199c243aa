"""Low-rank adapters, through PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from realign_lightning.backbones.base import Backbone


@dataclass
class LoRA:
    """LoRA (arXiv 2106.09685) on the language model's linear layers; the vision tower and the head are left alone.

    On a 4-bit backbone this is QLoRA. Defaults are Re-Align's.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout before the low-rank update.
        target_modules: regular expression of full module names; None takes every linear layer of the language model.
        options: further arguments of ``peft.LoraConfig``, for example ``{"use_dora": true}``.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    target_modules: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def apply(self, backbone: Backbone, model: nn.Module) -> PeftModel:
        """Wrap a model; afterwards only the adapter is trainable.

        Args:
            backbone: the model's family.
            model: what ``backbone.load_model()`` returned.

        Raises:
            ValueError: when the model already carries an adapter; two on top of each other train nothing useful.
        """
        if isinstance(model, PeftModel):
            raise ValueError("Expected a model without adapters, got a PeftModel: LoRA would be applied twice.")
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or backbone.language_linear_pattern(model),
            **self.options,
        )
        return get_peft_model(model, config)
