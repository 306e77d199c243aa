"""What each of two processes runs; imports little, because every process pays for it again."""

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

Case = tuple[Metric, Sequence[tuple[list[Any], list[Any]]], bool]


def score_on_rank(rank: int, cases: Sequence[Case], folder: str) -> None:
    """Each rank gets what DistributedSampler gives it: every second example, and the first again where they are odd.

    The third part of a case says whether ``update`` takes ids; without, an odd example is left to one rank.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = []
    for metric, batches, takes_ids in cases:
        preds = [pred for batch, _ in batches for pred in batch]
        target = [wanted for _, batch in batches for wanted in batch]
        padded = [*range(len(preds)), *([0] if takes_ids and len(preds) % 2 else [])]
        mine = padded[rank::2]
        for start in range(0, len(mine), 7):
            part = mine[start : start + 7]
            more = {"ids": part} if takes_ids else {}
            metric.update([preds[index] for index in part], [target[index] for index in part], **more)
        scores.append(metric.compute())
    torch.save(scores, f"{folder}/scores{rank}.pt")
    torch.distributed.destroy_process_group()
