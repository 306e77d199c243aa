"""Files read and decoded ahead of the model that looks at them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_THREADS = min(8, os.cpu_count() or 1)
"""Items that are worked on at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], groups: Iterable[Sequence[Item]]
) -> Iterator[tuple[Sequence[Item], list[Result]]]:
    """Groups with their results, in order; the next group is worked on while one is used.

    Args:
        work: on one item.
        groups: of items; two groups at a time are in memory.

    >>> list(in_threads(abs, [[-1, 2], [-3]]))
    [([-1, 2], [1, 2]), ([-3], [3])]
    """
    waiting: deque[tuple[Sequence[Item], Iterator[Result]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in groups:
            waiting.append((group, pool.map(work, group)))
            if len(waiting) > 1:
                done, results = waiting.popleft()
                yield done, list(results)
        for done, results in waiting:
            yield done, list(results)
