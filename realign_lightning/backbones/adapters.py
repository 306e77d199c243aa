"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.utils import ModulesToSaveWrapper
from torch import nn

from realign_lightning.backbones.base import Backbone, Part


@dataclass
class LoRA:
    """LoRA (arXiv 2106.09685) on the language model's linear layers; the vision tower and the head are left alone.

    On a 4-bit backbone this is QLoRA. Defaults are Re-Align's.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout before the low-rank update.
        parts: whose linear layers are adapted; add ``vision_tower`` to adapt the tower too.
        target_modules: regular expression of full module names, in place of ``parts``.
        options: further arguments of ``peft.LoraConfig``, for example ``{"use_dora": true}`` or
            ``{"use_rslora": true}``.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    parts: list[Part] = field(default_factory=lambda: ["language_model"])
    target_modules: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def starts_blank(self) -> bool:
        """Whether the adapter starts without looking at the base's weights, unlike DoRA, PiSSA and the like."""
        return not self.options.get("use_dora") and self._start in (True, False, "gaussian", "orthogonal")

    @property
    def _start(self) -> Any:
        return self.options.get("init_lora_weights", True)

    def apply(self, backbone: Backbone, model: nn.Module, trained_modules: Sequence[str] = ()) -> PeftModel:
        """Wrap a model; afterwards only the adapter is trainable, and copies of ``trained_modules``.

        The model keeps those modules as they were beside the trained copies, so that the model with its adapter off is
        the model before training. Copies are trained in float32, whatever the model's dtype: steps of 1e-5 vanish in
        16 bit.

        Args:
            backbone: the model's family.
            model: what ``backbone.load_model()`` returned.
            trained_modules: names of modules that are trained in full beside the adapter, such as the projector.

        Raises:
            ValueError: when the model already carries an adapter (two on top of each other train nothing useful), when
                ``target_modules`` names nothing, or when an option would change the base (PiSSA, OLoRA).
        """
        if isinstance(model, PeftModel):
            raise ValueError("Expected a model without adapters, got a PeftModel: LoRA would be applied twice.")
        if self._start not in (True, False, "gaussian", "orthogonal", "eva"):
            raise ValueError(
                f"init_lora_weights={self._start!r} changes the weights below the adapter, so that the model with its "
                "adapter off would no longer be the reference: leave it out."
            )
        if self.options.get("bias", "none") != "none":
            raise ValueError(
                "The option `bias` trains weights of the model itself, so that the model with its adapter off would no "
                "longer be the reference: leave it out."
            )
        config = self._config(backbone, model, trained_modules)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            endings = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"LoRA cannot be put on {type(model).__name__}: {error}\nLinear layers here end in {endings}; "
                "`target_modules` has to match full names such as '.*language_model.*q_proj', or leave it null."
            ) from error
        for module in adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                _train_in_float32(module.modules_to_save["default"])
            if type(module) is LoraLinear:
                _scale_between(module)
        return adapted

    def _config(self, backbone: Backbone, model: nn.Module, trained_modules: Sequence[str]) -> LoraConfig:
        arguments: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules or backbone.linear_pattern(model, self.parts),
            "modules_to_save": list(trained_modules) or None,
        }
        try:
            return LoraConfig(**arguments, **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"PEFT's LoraConfig does not take these settings of `adapter`: {error}") from error


class _ScaledBetween(LoraVariant):
    """Plain LoRA that multiplies by alpha / r between its two matrices, at a width of r, and not behind them.

    A multiplication by a power of two changes no bit of the result wherever it stands, and two passes over the layer's
    whole output are saved, one forward and one backward.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make beside plain LoRA's two matrices."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """The base layer's ``result`` with the adapter's share for the input ``x`` added."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        share: torch.Tensor = up(down(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter])
        return result + share

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter in it."""
        merged: torch.Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """The same in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight without the adapter again."""
        base: torch.Tensor = orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return base


def _scale_between(module: LoraLinear) -> None:
    for name, scaling in module.scaling.items():
        is_power_of_two = math.frexp(scaling)[0] == 0.5
        is_plain = name in module.lora_A and name not in module.lora_variant and module.lora_B[name].bias is None
        if is_power_of_two and is_plain:
            module.lora_variant[name] = _ScaledBetween()


def _train_in_float32(module: nn.Module) -> None:
    """Keep a module's weights in float32, and let it compute in the dtype of its inputs as it did before."""
    if next(module.parameters()).dtype == torch.float32:
        return
    module.float()
    # A method, which a copy of the module takes along as its own.
    module.forward = MethodType(_forward_in_dtype_of_inputs, module)


def _forward_in_dtype_of_inputs(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``type(module).forward`` with the weights in the dtype of the first floating input."""
    dtype = next((arg.dtype for arg in args if _is_floating(arg)), torch.float32)
    if dtype == next(module.parameters()).dtype:
        return type(module).forward(module, *args, **kwargs)
    weights = {name: value.to(dtype) for name, value in module.named_parameters()}
    # Which calls this function again, the weights cast.
    return torch.func.functional_call(module, weights, args, kwargs)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
