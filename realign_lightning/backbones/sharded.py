"""Loading a transformers model sharded over ranks (FSDP2), without any rank ever holding all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer


def read_shards(load: Callable[..., PreTrainedModel], empty: nn.Module, mesh: DeviceMesh) -> PreTrainedModel:
    """Read a checkpoint so that every rank reads its own rows of every weight and nothing else.

    Args:
        load: ``from_pretrained`` with everything but ``distributed_config`` bound.
        empty: the same model on the meta device.
        mesh: one-dimensional.

    Returns:
        A model to take weights from, not to run: its weights are DTensors.
    """
    blocks = {re.sub(r"\.\d+", ".*", name) for name, _ in named_blocks(empty)}
    plan = dict.fromkeys(sorted(blocks), "free_full_weight")
    with _local_rank(mesh):
        return load(distributed_config=DistributedConfig(fsdp_size=mesh.size(), fsdp_plan=plan))


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Shard a transformers model over a mesh, block by block, its vision blocks included.

    Args:
        model: outermost transformers module; on the meta device nothing is moved.
        mesh: one-dimensional.
        compute_dtype: what weights are cast to when they are gathered; gradients are reduced in float32 then.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for _, block in named_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if not hasattr(model, "get_image_features"):
        model.get_image_features = model.base_model.get_image_features  # type: ignore[union-attr]
    register_fsdp_forward_method(model, "get_image_features")
    model.run_gathered = _run  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_gathered")
    # Ranks that finish an answer early go on gathering weights for the others.
    model._is_fsdp_managed_module = True  # type: ignore[assignment]


def take_over(target: nn.Module, source: nn.Module) -> None:
    """Fill a sharded model without values from one that was read, sharing its memory.

    Copies that PEFT keeps of a module (``modules_to_save``) are filled from the module itself.

    Args:
        target: sharded, on the meta device.
        source: what :func:`read_shards` returned, with the same adapter on it.
    """
    values: dict[str, Tensor] = {
        **dict(source.named_parameters(remove_duplicate=False)),
        **dict(source.named_buffers(remove_duplicate=False)),
    }
    tied: dict[int, list[str]] = {}
    for name, parameter in target.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    used: set[int] = set()
    taken = {}
    for name, parameter in target.named_parameters():
        value = _value(name, values)
        local = _as_shard(value.detach().to(parameter.dtype), parameter)
        taken[name] = local.clone() if id(value) in used else local
        used.add(id(value))
    target.load_state_dict(taken, assign=True, strict=False)
    for first, *others in tied.values():
        for name in others:
            _set(target, name, target.get_parameter(first))
    for name, buffer in list(target.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = target.get_submodule(owner)
            module.register_buffer(leaf, _value(name, values), leaf not in module._non_persistent_buffers_set)
    # What a model made from its configuration lacks: settings of generation, and how its files name the weights.
    for attribute in ("generation_config", "_weight_conversions"):
        setattr(target, attribute, getattr(source, attribute, None))


def named_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The repeated blocks of vision tower and language model, as transformers marks them.

    Args:
        model: any transformers model.
    """
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def _run(function: Callable[..., Tensor], **inputs: Any) -> Tensor:
    return function(**inputs)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def _value(name: str, values: Mapping[str, Tensor]) -> Tensor:
    if name in values:
        return values[name]
    return values[re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.)", "", name)]


def _as_shard(value: Tensor, like: Any) -> Tensor:
    if not isinstance(value, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    local = value.to_local()
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


@contextmanager
def _local_rank(mesh: DeviceMesh) -> Iterator[None]:
    """Tell transformers, which reads LOCAL_RANK, the device that Lightning has chosen; SLURM does not set it."""
    before = os.environ.get("LOCAL_RANK")
    if mesh.device_type == "cuda":
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = before
