"""States of the random generators, as values that ``weights_only=True`` reads."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators in this process.

    Args:
        device: that this process computes on; the generator of a CUDA device is among them.

    Returns:
        Tensors, numbers and texts by name.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators of this process to saved states.

    Args:
        states: from :func:`random_states`.
        device: that this process computes on. If the states are from a run without CUDA, its generator is left alone.
    """
    saved = states["python"]
    random.setstate((saved["version"], tuple(saved["words"].tolist()), saved["gauss"]))
    saved = states["numpy"]
    keys = saved["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, saved["position"], saved["has_gauss"], saved["cached"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def derive_random_states(states: dict[str, Any], rank: int) -> None:
    """Seed the generators of this process from a saved state and the rank, where ranks are not those that saved.

    Args:
        states: from :func:`random_states` on rank 0.
        rank: of this process.
    """
    digest = hashlib.sha256(_bytes(states["torch"]) + rank.to_bytes(8, "little")).digest()
    random.seed(digest)
    np.random.seed(list(np.frombuffer(digest, np.uint32)))  # noqa: NPY002
    # Also of CUDA.
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()
