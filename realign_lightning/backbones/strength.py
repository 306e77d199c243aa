"""A trained adapter, turned up or down without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

_TURNED: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
"""What the adapters of models are set to: what they were trained as cannot be read from the models then."""

_SECOND = ("lora_B", "lora_embedding_B")
"""In the names of LoRA's second matrices."""


class AdapterStrength:
    """How much of an adapter counts: 0 is the base model, 1 the model as it was trained, more goes on in its direction.

    LoRA's update of every layer is multiplied by the strength (the scale of LoRA, arXiv 2106.09685, after training),
    and modules that were trained in full beside it, such as the projector, lie on the line from their first to their
    trained weights (as in WiSE-FT, arXiv 2109.01903).

    Args:
        model: with one active LoRA adapter that is not merged.

    Raises:
        TypeError: for a model without adapter, and for adapters of another kind than LoRA.
        ValueError: for DoRA, whose update is not proportional to any number, for trained biases, where several adapters
            are active or one is merged into the weights, and for a model that another one has turned up or down.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(
                f"Expected a model with an adapter, got {type(model).__name__}: there is nothing to turn up or down. "
                "Give the folder of an adapter, or a checkpoint of a run with `adapter`."
            )
        self.model = model
        (self.adapter, *others) = model.active_adapters
        if others:
            raise ValueError(f"Expected one active adapter, got {model.active_adapters}.")
        config: Any = model.peft_config[self.adapter]
        if config.peft_type.value != "LORA":
            raise TypeError(f"Expected a LoRA adapter, got {config.peft_type.value}: it has no strength to set.")
        if config.use_dora:
            raise ValueError("A DoRA adapter changes the length of weights, too: no part of it is a smaller adapter.")
        if config.bias != "none":
            raise ValueError(f"Expected an adapter without trained biases, got bias={config.bias!r}.")
        if (turned := _TURNED.get(model, 1.0)) != 1:
            raise ValueError(
                f"Another AdapterStrength has set this model to {turned}, which would be taken for the trained one: go "
                "on with that one, or let it set 1 first."
            )
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError("The adapter is merged into the weights: load it without merging.")
        self._full = [(layer, layer.scaling[self.adapter]) for layer in layers if self.adapter in layer.scaling]
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        self._lines = [line for one in wrappers for line in _lines(one, self.adapter)]
        self.value = 1.0

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Let the adapter count this much, whatever it was set to before.

        Args:
            strength: finite.

        Raises:
            ValueError: if it is not finite.
        """
        if not abs(strength) < float("inf"):
            raise ValueError(f"Expected a finite strength, got {strength}.")
        for layer, scaling in self._full:
            layer.scaling[self.adapter] = scaling * strength
        for weight, first, trained in self._lines:
            # At 1 the trained weights, to the last bit.
            weight.copy_(trained if strength == 1 else first + strength * (trained - first))
        self.value = strength
        _TURNED[self.model] = strength

    def save(self, folder: str | Path) -> None:
        """Write the adapter as it now counts, for plain peft: loaded, it is the model at this strength.

        The second matrices are scaled; rank and alpha stay those of the training. Other adapters that the model has,
        which are not active, are not written.

        Args:
            folder: made if needed; as always with peft, an adapter that is not called ``default`` lies in a folder of
                its own name in it.
        """
        state: Mapping[str, Tensor] = self.model.state_dict()
        own = tuple(f".{matrix}.{self.adapter}." for matrix in _SECOND)
        scaled = {
            # Those of embeddings have nothing behind the adapter's name.
            name: value * self.value if any(part in f"{name}." for part in own) else value
            for name, value in state.items()
        }
        self.model.save_pretrained(str(folder), selected_adapters=[self.adapter], state_dict=scaled)


def _lines(wrapper: ModulesToSaveWrapper, adapter: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A module's weights in use, the ones that it began with, and the trained ones."""
    if adapter not in wrapper.modules_to_save:
        return []
    first = dict(wrapper.original_module.named_parameters())
    used = dict(wrapper.modules_to_save[adapter].named_parameters())
    return [(value, first[name].detach().to(value), value.detach().clone()) for name, value in used.items()]
