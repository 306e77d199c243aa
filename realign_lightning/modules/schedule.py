"""Learning-rate schedules that need to know how long training will be."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to ``final_ratio``; Re-Align warms up over 3 % of the steps.

    Args:
        optimizer: whose learning rate to schedule.
        total_steps: optimizer steps of the whole run.
        warmup_ratio: share of the steps in [0, 1] over which the rate rises from 0 to its full value.
        final_ratio: share of the full rate at the end.

    Raises:
        ValueError: for shares outside [0, 1] or fewer than one step.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = WarmupCosine(optimizer, total_steps=12, warmup_ratio=1 / 6)
    >>> rates = []
    >>> for _ in range(12):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> [round(rate, 2) for rate in rates]
    [0.5, 1.0, 1.0, 0.98, 0.9, 0.79, 0.65, 0.5, 0.35, 0.21, 0.1, 0.02]
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.03, final_ratio: float = 0.0
    ) -> None:
        for name, ratio in (("warmup_ratio", warmup_ratio), ("final_ratio", final_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"Expected `{name}` in [0, 1], got {ratio}.")
        if total_steps < 1:
            raise ValueError(f"Expected `total_steps` to be at least 1, got {total_steps}.")
        warmup = math.ceil(warmup_ratio * total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
