"""What training processes leave: their checkpoints, compared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from realign_lightning.checkpoints import newest_checkpoint, read_header
from tests.reliability.training import FINAL


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def lines(folder: Path) -> int:
    """Batches that all lives so far have recorded."""
    path = folder / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / FINAL, weights_only=True)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit-identical tensors and equal values, at any depth."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def listed(folder: Path) -> list[Path]:
    """Every checkpoint that shows under its name, of a kill or not."""
    return sorted(path for path in folder.rglob("*.ckpt") if not path.name.startswith("."))


def assert_all_load(folder: Path) -> int:
    """No checkpoint that is listed fails to load. Returns their number."""
    for path in listed(folder):
        header = read_header(path)
        assert header["global_step"] > 0
        if path.is_file():
            whole = torch.load(path, weights_only=True)
            assert whole["state_dict"]
            assert whole["optimizer_states"]
    return len(listed(folder))


def newest_step(folder: Path) -> int:
    path = newest_checkpoint(folder)
    return 0 if path is None else int(read_header(path)["global_step"])
