"""The frozen reference that rDPO measures its policy against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from realign_lightning.backbones.base import eval_mode
from realign_lightning.modules.cache import Entry
from realign_lightning.modules.cache_pass import fingerprints_of
from realign_lightning.types import VIEWS, LogProbs, PreferenceBatch, ViewName

ReferenceKind = Literal["auto", "adapter_off", "frozen_copy", "cached"]
"""``adapter_off``: the policy's own weights with its adapter switched off, at no memory. ``frozen_copy``: a second set
of weights, for full fine-tuning. ``auto``: the first if there is an adapter, else the second. ``cached``: its log-probs
are computed once per sample and kept on disk; nothing of it is in memory while training."""


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


class CachedReference(Reference):
    """Log-probs that were computed before, looked up by fingerprint of the sample; no weights.

    Args:
        has_adapter: whether the policy carries an adapter, which :meth:`use` switches off.

    Attributes:
        entries: log-probs by fingerprint of the sample.
    """

    def __init__(self, has_adapter: bool) -> None:
        super().__init__()
        self.has_adapter = has_adapter
        self.entries: Mapping[str, Entry] = {}

    def log_probs(self, batch: PreferenceBatch, views: Sequence[ViewName] = VIEWS) -> LogProbs:
        """Log-probs of the views under the reference, (B,) float32 each, on the batch's device.

        Args:
            batch: B samples.
            views: which views to look up.

        Raises:
            ValueError: for a sample without a fingerprint.
            UnknownSampleError: for a sample that was not scored before.
        """
        names = fingerprints_of(batch)
        unknown = [key for key, name in zip(batch.keys, names, strict=True) if name not in self.entries]
        if unknown:
            raise UnknownSampleError(
                f"The reference cache ({len(self.entries)} samples) lacks sample {unknown[0]!r}. A Trainer caches what "
                "its datamodule's `sample_readers` offer before it starts: the sample has changed since, or comes from "
                "elsewhere. Call RDPOModule.cache_reference(batches) before, or set another `reference`."
            )
        values = torch.tensor([self.entries[name] for name in names], dtype=torch.float32)
        columns = dict(zip(Entry._fields, values.to(batch.weights.device).unbind(dim=1), strict=True))
        return LogProbs(**{view: columns[view] for view in VIEWS if view in views})

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with its adapter off.

        Raises:
            ValueError: without an adapter: there is no such model in memory.
        """
        if not self.has_adapter:
            raise ValueError(
                "With reference='cached' and without an adapter only the reference's log-probs of the data are in "
                "memory, so that it cannot score or answer anything else: set reference='frozen_copy'."
            )
        with AdapterOff().use(policy) as model:
            yield model


class UnknownSampleError(ValueError):
    """A sample has no cached log-probs; the message names it."""


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
    if kind == "cached":
        return CachedReference(has_adapter)
    return AdapterOff() if kind == "adapter_off" else FrozenCopy(copy_model())
