"""What the ranks of a run tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Item = TypeVar("Item")

_PATIENCE = timedelta(days=7)
"""How long ranks wait for one that does work for all of them, such as writing."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)
_talking: tuple[Any, Any] | None = None


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process counts as the only one, for work that one rank does while the others wait."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among those that train together."""
    if _alone.get():
        return 0, 1
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
    torch.distributed.all_gather_object(values, value, group=_group())
    return values


def _group() -> Any:
    """The ranks' own line for objects: it goes through host memory, and does not lose its patience."""
    global _talking
    world = torch.distributed.group.WORLD
    if _talking is None or _talking[0] is not world:
        _talking = (world, torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
    return _talking[1]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors, entry by entry; ``values`` itself is left alone.

    Args:
        values: of one shape on every rank, on the device that ranks talk through.
    """
    if rank_and_world_size()[1] > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank, on all of them alike; cheap enough for every optimizer step.

    Args:
        flag: of this rank.

    >>> any_rank(False)
    False
    """
    if rank_and_world_size()[1] == 1:
        return flag
    # In host memory: nothing waits for the device.
    highest = torch.tensor(int(flag), dtype=torch.uint8)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=_group())
    return bool(highest)


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


def on_first_rank(work: Callable[[], Item]) -> Item:
    """What the first rank's work gave, on all ranks; its error is raised on all of them.

    Args:
        work: called on the first rank only, as if it were alone; the result can be pickled.

    >>> on_first_rank(lambda: 7)
    7
    """
    result: Any = None
    error: Exception | None = None
    if rank_and_world_size()[0] == 0:
        with alone():
            try:
                result = work()
            # The others must hear of it, or they would wait for ever.
            except Exception as raised:
                error = raised
    first, told = gather((result, error))[0]
    if told is not None:
        raise told if error is None else error
    return cast("Item", first)
