"""The frozen reference that rDPO measures its policy against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

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

    Exactly the model that training started from, as long as only the adapter is trained, or what PEFT keeps copies of.
    """

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy, its adapter disabled and dropout off inside the block."""
        with eval_mode(policy), policy.disable_adapter():  # type: ignore[operator]
            yield policy


class FrozenCopy(Reference):
    """A copy of the model as it was before training.

    Args:
        model: what to copy; not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in eval mode, whatever the module around it does."""
        super().train(False)
        return self

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The copy."""
        yield self.model


def make_reference(kind: ReferenceKind, model: nn.Module, has_adapter: bool) -> Reference:
    """Choose the reference for a model that is about to be trained.

    Args:
        kind: see :data:`ReferenceKind`.
        model: the model before an adapter is put on it.
        has_adapter: whether it will carry one.

    Raises:
        ValueError: for ``adapter_off`` without an adapter.
    """
    if kind == "auto":
        kind = "adapter_off" if has_adapter else "frozen_copy"
    if kind == "adapter_off" and not has_adapter:
        raise ValueError("reference='adapter_off' needs an adapter to switch off: set `adapter`, or use 'frozen_copy'.")
    return AdapterOff() if kind == "adapter_off" else FrozenCopy(model)
