"""Several sequences in one row without padding, responses sharing the prompt that they answer.

A row is a list of trees: a prompt with its image, then the responses to it. Every token sees the prompt of its tree and
what stands before it in its own response, nothing else, so that hidden states are those of each (prompt, response) by
itself. A prompt with two responses is computed once, in the forward pass and in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "sdpa_packed"
"""Name of the attention implementation that understands a packed row, and is ``sdpa`` for everything else."""

PACKABLE = (PACKED_SDPA, "flex_attention")
"""Attention implementations that can run a packed row."""


@dataclass(frozen=True)
class Tree:
    """A prompt and the responses to it, one behind the other in a packed row.

    Args:
        prompt: tokens of the prompt, image tokens included.
        responses: tokens of every response.
    """

    prompt: int
    responses: tuple[int, ...]

    def __len__(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Packing:
    """What stands where in a packed row.

    Args:
        trees: in the order of the row.

    Example:
        >>> packing = Packing((Tree(2, (1, 1)), Tree(1, (1,))))
        >>> len(packing)
        6
        >>> packing.mask("cpu").int().tolist()[0][0]
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], \
[0, 0, 0, 0, 1, 1]]
    """

    trees: tuple[Tree, ...]

    def __len__(self) -> int:
        """Tokens of the row."""
        return sum(map(len, self.trees))

    def mask(self, device: torch.device | str) -> Tensor:
        """Who sees whom, (1, 1, L, L) bool: True where the token of a row may attend to that of a column.

        Args:
            device: of the mask.
        """
        tree, response = self._labels(device)
        place = torch.arange(len(self), device=device)
        same = (tree[:, None] == tree) & ((response[:, None] == response) | (response == _PROMPT))
        return (same & (place[:, None] >= place))[None, None]

    def block_mask(self, device: torch.device | str) -> BlockMask:
        """The same for FlexAttention, which then skips every block that nobody looks at.

        While it is made, PyTorch holds a matrix of booleans of the size of the row squared.

        Args:
            device: of the mask.
        """
        tree, response = self._labels(device)

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_sight = (response[key] == _PROMPT) | (response[query] == response[key])
            return (query >= key) & (tree[query] == tree[key]) & in_sight

        return create_block_mask(sees, B=None, H=None, Q_LEN=len(self), KV_LEN=len(self), device=str(device))

    def attention_inputs(self, implementation: str, device: torch.device | str) -> dict[str, Any]:
        """Arguments of a model's forward that make it see a packed row.

        Args:
            implementation: of its attention, one of :data:`PACKABLE`.
            device: of the model.
        """
        if implementation == "flex_attention":
            return {"attention_mask": self.block_mask(device)}
        # A mask of four dimensions is handed on as it is, and this one fits no other attention.
        return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "packing": self}

    def response_masks(self, device: torch.device) -> list[Tensor | None]:
        """For every tree what its responses see of it, (1, 1, responses, tree) bool; None for trees of one response.

        Made once for all layers, and for policy and reference.

        Args:
            device: of the masks.
        """
        if device not in self._masks:
            masks = [_response_mask(tree, device) for tree in self.trees]
            self._masks[device] = masks
        return self._masks[device]

    @cached_property
    def _masks(self) -> dict[torch.device, list[Tensor | None]]:
        return {}

    def _labels(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """For every token the number of its tree, and of its response within the tree."""
        trees, responses = [], []
        for number, tree in enumerate(self.trees):
            trees += [number] * len(tree)
            responses += [_PROMPT] * tree.prompt
            responses += [place for place, length in enumerate(tree.responses) for _ in range(length)]
        return torch.tensor(trees, device=device), torch.tensor(responses, device=device)


_PROMPT = -1


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, tree by tree through ``scaled_dot_product_attention``; ``sdpa`` where nothing is packed.

    A prompt is plain causal attention. Responses look at prompt and responses through a mask of their own few rows, so
    that no matrix of the size of the row squared is made.

    Args:
        module: the attention layer.
        query: (1, heads, L, D).
        key: (1, key heads, L, D).
        value: as ``key``.
        attention_mask: only where nothing is packed.
        packing: what stands where; None for any other input.
        **kwargs: as transformers hands them to every attention.

    Returns:
        (1, L, heads, D), and None in place of the attention weights.

    Raises:
        RuntimeError: if the model has dropped ``packing`` on its way here, or caches keys.
    """
    if packing is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise RuntimeError(
                f"{type(module).__name__} does not hand arguments on to its attention, so that prompts cannot be "
                "shared: set share_prefix to false."
            )
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    if key.shape[2] != len(packing):
        raise RuntimeError(f"Expected {len(packing)} keys for a packed row, got {key.shape[2]}.")
    kwargs["is_causal"] = True
    outputs = []
    # Splits, not slices: the backward pass of a slice fills a whole row with zeros.
    lengths = [len(tree) for tree in packing.trees]
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for tree, mask, part in zip(packing.trees, packing.response_masks(query.device), parts, strict=True):
        outputs += _tree_attention(module, tree, mask, *part, **kwargs)
    return torch.cat(outputs, dim=1), None


def _tree_attention(
    module: nn.Module, tree: Tree, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> list[Tensor]:
    """Attention of one tree, the prompt before the responses: (1, rows, heads, D) each."""
    if mask is None:
        return [_sdpa(module, query, key, value, None, **kwargs)[0]]
    asks = torch.split(query, [tree.prompt, len(tree) - tree.prompt], dim=2)
    prompt = _sdpa(module, asks[0], key[:, :, : tree.prompt], value[:, :, : tree.prompt], None, **kwargs)[0]
    return [prompt, _sdpa(module, asks[1], key, value, mask, **kwargs)[0]]


def _response_mask(tree: Tree, device: torch.device) -> Tensor | None:
    """(1, 1, responses, tree) bool; None for a tree of one response, which is plain causal attention."""
    if len(tree.responses) < 2:
        return None
    blocks = [torch.ones(length, length, device=device).tril() for length in tree.responses]
    own = torch.block_diag(*blocks).bool()  # type: ignore[no-untyped-call]
    prompt = torch.ones(len(own), tree.prompt, dtype=torch.bool, device=device)
    return torch.cat([prompt, own], dim=1)[None, None]


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
