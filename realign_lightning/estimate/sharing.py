"""What devices that train together hold for a moment, beside what is their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from realign_lightning.backbones.sharded import named_blocks
from realign_lightning.estimate.empty import EmptyModels, tensor_bytes


def communication_bytes(models: EmptyModels) -> int:
    """Bytes on one device of buffers that weights and gradients pass through.

    DDP keeps a second copy of the gradients (``gradient_as_bucket_view`` spares it). FSDP2 gathers block by block, one
    in use and the next on its way; what is in no block (embeddings, head, projector) stays gathered from the forward to
    the backward pass, its gradients whole until the end of that; and the gradients of one block, or of the rest, are
    copied to be reduced.

    Args:
        models: on the meta device.
    """
    job = models.job
    if job.layout == "single" or (job.layout == "ddp" and job.gradient_as_bucket_view):
        return 0
    if job.layout == "ddp":
        return sum(map(tensor_bytes, models.trained))
    groups = [_groups(model) for model in (models.policy, models.reference)]
    blocks = [block for _, more in groups for block in more]
    roots = [root for root, _ in groups]
    cast = job.gathered_dtype
    reduced = None if cast is None else torch.float32
    gathered = sum(_bytes(root, cast) for root in roots) + 2 * max((_bytes(block, cast) for block in blocks), default=0)
    trained = [[value for value in group if value.requires_grad] for group in (*roots, *blocks)]
    whole = sum(_bytes(group, cast) for group in trained[: len(roots)])
    return gathered + whole + max(_bytes(group, cast) + _bytes(group, reduced) for group in trained)


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
    """Parameters in no block, and those of every block."""
    blocks = [list(block.parameters()) for _, block in named_blocks(model)]
    inside = {id(parameter) for block in blocks for parameter in block}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside], blocks


def _bytes(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> int:
    return sum(value.numel() * (value.dtype if dtype is None else dtype).itemsize for value in parameters)
