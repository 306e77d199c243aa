"""Fully sharded training through Lightning's engine."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

METADATA = "meta.pt"
"""The file of a sharded checkpoint that holds everything but weights and optimizer states."""


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, sharding over every device of every node; also on CPUs, with gloo.

    Differs from its parent in three points: all devices form one data-parallel mesh, checkpoints hold trained weights
    only, and validation runs in ``no_grad`` instead of ``inference_mode``, whose tensors FSDP2 could not train on
    afterwards. With precision ``bf16-mixed`` weights are gathered in bfloat16, kept and updated in float32.

    Args:
        save_distributed_checkpoint: True: every rank writes its shard into a folder, of which
            ``realign-lightning export`` makes a normal checkpoint. False: rank 0 gathers everything into one file.
        process_group_backend: torch.distributed's backend; None chooses by device.
        timeout_minutes: of collective operations.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Start the processes' communication, and lay the mesh over all devices."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up model and optimizers."""
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Trained weights, sharded or gathered on rank 0."""
        return get_model_state_dict(self._module, options=self._state_options(ignore_frozen_params=True))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load trained weights and optimizer states; sharded checkpoints also onto another number of devices.

        Raises:
            ValueError: if the checkpoint was made with another backbone or adapter.
        """
        path = Path(self.broadcast(checkpoint_path))
        trained = {name: value for name, value in self._module.named_parameters() if value.requires_grad}
        if not (path / METADATA).is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("state_dict", {})
            check_shapes(_shapes(saved), _shapes(trained))
            return super().load_checkpoint(path, weights_only)
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)
        found = get_model_state_dict(self._module, options=options)
        # Tied weights are found under every name, and saved under their first.
        weights = {name: found[name] for name in trained}
        _check_fit(path, weights)
        load({"state_dict": weights}, checkpoint_id=path)
        self._module.load_state_dict(weights)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self._module, optimizer)}
            load(state, checkpoint_id=path)
            set_optimizer_state_dict(
                self._module,
                optimizer,
                optim_state_dict=state[f"optimizer_{index}"],
                options=StateDictOptions(cpu_offload=True, strict=False),
            )
        metadata: dict[str, Any] = torch.load(path / METADATA, weights_only=weights_only)
        return metadata

    def _state_options(self, **options: Any) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, **options)

    @property
    def _module(self) -> torch.nn.Module:
        assert self.model is not None  # noqa: S101
        return self.model


def _check_fit(path: Path, weights: dict[str, Any]) -> None:
    """Compare names and shapes in a sharded checkpoint with those that are about to be loaded."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "state_dict."
    saved = {
        name.removeprefix(prefix): tuple(value.size)
        for name, value in metadata.items()
        if name.startswith(prefix) and hasattr(value, "size")
    }
    check_shapes(saved, _shapes(weights))


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_shapes(saved: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of another backbone or adapter.

    Args:
        saved: shapes of the weights in the checkpoint by name.
        expected: shapes of the weights that are trained.

    Raises:
        ValueError: if names or shapes differ.
    """
    wrong = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"The checkpoint does not fit this module: {len(wrong)} of {len(expected)} trained weights differ. "
            f"Expected {name!r} with shape {expected.get(name)}, got {saved.get(name)}. "
            "It was made with another backbone or adapter: use the recipe that made it."
        )
