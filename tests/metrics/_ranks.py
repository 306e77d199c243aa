"""What each of two processes runs; imports little, because every process pays for it again."""

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

Case = tuple[Metric, Sequence[tuple[list[Any], list[Any]]]]


def score_on_rank(rank: int, cases: Sequence[Case], folder: str) -> None:
    """Every second batch of each case goes to each rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = []
    for metric, batches in cases:
        for preds, target in batches[rank::2]:
            metric.update(preds, target)
        scores.append(metric.compute())
    torch.save(scores, f"{folder}/scores{rank}.pt")
    torch.distributed.destroy_process_group()
