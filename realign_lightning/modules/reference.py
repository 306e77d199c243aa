"""The frozen reference that rDPO measures its policy against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from realign_lightning.backbones.base import eval_mode

ReferenceKind = Literal["auto", "adapter_off", "frozen_copy"]
"""``adapter_off``: the policy's own weights with its adapter switched off, at no memory. ``frozen_copy``: a second set
of weights, for full fine-tuning. ``auto``: the first if there is an adapter, else the second."""


class Reference(nn.Module):
    """A model whose log-probs never change; :meth:`use` lends it."""

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference model, in eval mode, for the length of a ``with`` block.

        Args:
            policy: the model that is being trained, adapter included.
        """
        raise NotImplementedError
        yield policy


class AdapterOff(Reference):
    """The policy with its adapter off.

    Exactly the model that training started from: what is trained beside the adapter (the projector) is a copy, and the
    module as it was is used while the adapter is off.
    """

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy, its adapter disabled and dropout off inside the block."""
        # Not PEFT's disable_adapter, which also toggles what requires a gradient: FSDP2 would not notice the way back.
        switches: list[Any] = [m for m in policy.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        with eval_mode(policy):
            try:
                for module in switches:
                    module._disable_adapters = True
                yield policy
            finally:
                for module in switches:
                    module._disable_adapters = False


class FrozenCopy(Reference):
    """A copy of the model as it was before training.

    Args:
        model: the copy; frozen here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in eval mode, whatever the module around it does."""
        super().train(False)
        return self

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The copy."""
        yield self.model


def make_reference(kind: ReferenceKind, has_adapter: bool, copy_model: Callable[[], nn.Module]) -> Reference:
    """Choose the reference for a model that is about to be trained.

    Args:
        kind: see :data:`ReferenceKind`.
        has_adapter: whether the model carries an adapter.
        copy_model: makes a second model with the weights that training starts from.

    Raises:
        ValueError: for ``adapter_off`` without an adapter.
    """
    if kind == "auto":
        kind = "adapter_off" if has_adapter else "frozen_copy"
    if kind == "adapter_off" and not has_adapter:
        raise ValueError("reference='adapter_off' needs an adapter to switch off: set `adapter`, or use 'frozen_copy'.")
    return AdapterOff() if kind == "adapter_off" else FrozenCopy(copy_model())
