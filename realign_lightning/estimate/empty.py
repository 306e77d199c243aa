"""A module's models on the meta device, and what they take once they are real."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from realign_lightning.backbones import Backbone
from realign_lightning.backbones.packing import PACKABLE
from realign_lightning.estimate.example import FINGERPRINT
from realign_lightning.estimate.job import Job
from realign_lightning.modules import CachedReference, FrozenCopy, RDPOModule
from realign_lightning.modules.cache import Entry

_BLOCK = 64
_NESTED_BLOCK = 256
"""Elements that share a scale in bitsandbytes: of 4-bit weights, and of their scales, which have 8 bits themselves."""

_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT puts into the names of a model's own parameters."""


def nf4_bytes(elements: int) -> int:
    """Bytes of a weight in NF4 with double quantization, as bitsandbytes keeps it (``Params4bit``, ``QuantState``).

    Two elements a byte; one 8-bit scale per 64 elements, one float32 scale per 256 of these and their float32 mean; and
    per weight the float32 tables of the 16 values of NF4 and the 256 values of the scales.

    Args:
        elements: of the weight before it is quantised.

    >>> nf4_bytes(4096 * 4096) / (4096 * 4096 / 2)
    1.03186...
    """
    scales = math.ceil(elements / _BLOCK)
    return math.ceil(elements / 2) + scales + 4 * math.ceil(scales / _NESTED_BLOCK) + 4 + 4 * (16 + 256)


def share_of(shape: Sequence[int], shards: int) -> tuple[int, ...]:
    """The shape that rank 0 keeps of a parameter; FSDP2 cuts the first dimension, and no rank keeps more than rank 0.

    Args:
        shape: of the whole parameter.
        shards: pieces that it is cut into.
    """
    first, *rest = shape or (1,)
    return (math.ceil(first / shards), *rest)


def tensor_bytes(value: Tensor, shards: int = 1) -> int:
    """Bytes of a tensor, or of the first of its shards.

    Args:
        value: the whole tensor.
        shards: pieces that it is cut into.
    """
    return math.prod(share_of(value.shape, shards)) * value.element_size()


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT's wrappers around it; an adapter's own weights keep a name apart.

    Args:
        name: in the policy or the reference.

    >>> plain_name("base_model.model.model.layers.0.q_proj.base_layer.weight")
    'model.layers.0.q_proj.weight'
    """
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


def empty_models(job: Job) -> EmptyModels:
    """Policy and reference as :class:`~realign_lightning.modules.RDPOModule` makes them, on the meta device.

    Args:
        job: whose models to make; its module is left as it is.

    Raises:
        ValueError: as the backbone and the module raise it when they load.
        OSError: when the model's configuration cannot be reached.
    """
    hollow: Any = copy.copy(job.module.backbone)
    attention = getattr(hollow, "attn_implementation", None)
    share_prefix = job.module.share_prefix
    if attention not in (None, "sdpa", "eager"):
        # Flash attention and its like need a GPU to be set up, and keep what PyTorch's own fused attention keeps.
        hollow.attn_implementation = "sdpa"
        share_prefix = share_prefix if attention in PACKABLE else False
    plain = hollow.empty_model()
    quantised = _four_bit_names(hollow, plain)
    if quantised:
        _check_four_bit(job)
    base = {name: value.numel() for name, value in plain.named_parameters()}
    hollow.load_model = lambda: plain
    module = job.module.clone(backbone=hollow, share_prefix=share_prefix, compile_backend=None)
    with torch.device("meta"):
        module.configure_model()
    if isinstance(module.reference, CachedReference):
        module.reference.entries = {FINGERPRINT: Entry(0.0, 0.0, 0.0)}
    if job.weights_dtype is not None:
        module.to(job.weights_dtype)
    return EmptyModels(job, module, type(plain).__name__, base, quantised)


def _check_four_bit(job: Job) -> None:
    """Refuse what the module refuses when its weights are real, and packed."""
    if job.layout == "fsdp2":
        raise ValueError("FSDP cannot shard 4-bit weights: set `quantization: null`, or estimate for the strategy ddp.")
    if job.module.adapter is None:
        raise ValueError("A 4-bit model cannot be trained in full: set `adapter`, or `quantization: null`.")


def _four_bit_names(backbone: Backbone, model: nn.Module) -> frozenset[str]:
    """Weights that the backbone quantises when it loads."""
    if getattr(backbone, "quantization", None) is None:
        return frozenset()
    pattern = re.compile(backbone.linear_pattern(model))
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return frozenset(f"{name}.weight" for name in linear if pattern.fullmatch(name))


@dataclass(frozen=True)
class EmptyModels:
    """Policy and reference of a job on the meta device.

    Args:
        job: whose models these are.
        module: a module like the job's, with models that have no values.
        name: class of the model.
        base: elements of every parameter of the model before training, by name.
        quantised: names among ``base`` that are in 4 bit once the model is real; here they are whole.
    """

    job: Job
    module: RDPOModule
    name: str
    base: dict[str, int]
    quantised: frozenset[str]

    @property
    def policy(self) -> nn.Module:
        """What is trained, adapters included."""
        return self.module.policy

    @property
    def reference(self) -> nn.Module:
        """The frozen copy; a module without parameters, if the reference is something else."""
        reference = self.module.reference
        return reference.model if isinstance(reference, FrozenCopy) else reference

    @property
    def runs_reference(self) -> bool:
        """Whether a training step runs the reference; cached log-probs are looked up."""
        return self.module.loss.needs_reference and not isinstance(self.module.reference, CachedReference)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The policy's trained parameters."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def is_quantised(self, name: str) -> bool:
        """Whether a parameter of policy or reference is in 4 bit.

        Args:
            name: of the parameter, as ``named_parameters`` of the model tells it.
        """
        return plain_name(name) in self.quantised

    def count_trained(self) -> dict[str, int]:
        """Trained elements by part of the model; adapters are told from weights of the model's own."""
        parts = self.module.backbone.parts(self.policy)
        counts: Counter[str] = Counter()
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                is_own = plain_name(name) in self.base
                counts[f"{parts[name]}" if is_own else f"adapter of {parts[name]}"] += parameter.numel()
        return dict(counts)

    def stored_bytes(self, model: nn.Module) -> int:
        """Bytes on one device of a model's parameters and buffers, each counted once.

        Args:
            model: policy or reference.
        """
        shards = self.job.shards
        parameters = sum(
            nf4_bytes(value.numel()) if self.is_quantised(name) else tensor_bytes(value, shards)
            for name, value in model.named_parameters()
        )
        return parameters + sum(map(tensor_bytes, model.buffers()))
