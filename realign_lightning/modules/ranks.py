"""What the ranks of a run tell each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among those that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in order.

    Args:
        value: of this rank; can be pickled.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors, entry by entry; ``values`` itself is left alone.

    Args:
        values: of one shape on every rank, on the device that ranks talk through.
    """
    if rank_and_world_size()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values
