"""What the ranks of a run tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


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


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are this rank's work: every one of them is one rank's.

    Args:
        items: equal on all ranks.

    >>> share(["a", "b", "c"])
    ['a', 'b', 'c']
    """
    rank, world_size = rank_and_world_size()
    return items[rank::world_size]


def merge(values: dict[str, Item]) -> dict[str, Item]:
    """What all ranks know together, equal on all of them.

    Args:
        values: of this rank, under names that no other rank has; can be pickled.

    >>> merge({"a": 1})
    {'a': 1}
    """
    return {name: value for part in gather(values) for name, value in part.items()}
