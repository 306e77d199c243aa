"""Accelerators that estimates are given for."""

from __future__ import annotations

from dataclasses import dataclass

RESERVED_GB = 1.0
"""GB that are kept free on a card for CUDA's context and libraries. Data sheets call 2**30 bytes a GB, 7 % more than
the 10**9 that are counted here; those 7 % are left to gaps between PyTorch's allocations."""


@dataclass(frozen=True)
class Card:
    """An accelerator.

    Args:
        name: short name.
        memory_gb: memory in GB.
        tflops: dense 16-bit matrix peak with 32-bit accumulation, in 10**12 FLOPs a second.
        bfloat16: whether it computes in bfloat16; float16 otherwise.
    """

    name: str
    memory_gb: float
    tflops: float
    bfloat16: bool = True


# NVIDIA's data sheets: A100 80GB (2021), H100 and H200 Tensor Core GPU (SXM; their sheets give twice this, "with
# sparsity"), L40S, V100 (SXM2); "NVIDIA Ada GPU architecture" white paper, appendix, for RTX 6000 Ada and RTX 4090.
CARDS: tuple[Card, ...] = (
    Card("A100 80 GB", 80, 312),
    Card("H100 SXM", 80, 989),
    Card("H200", 141, 989),
    Card("L40S", 48, 362),
    Card("RTX 6000 Ada", 48, 364),
    Card("RTX 4090", 24, 165),
    Card("V100 32 GB", 32, 125, bfloat16=False),
)
"""All cards, in the order in which they are printed."""
