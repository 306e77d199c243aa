"""Fully sharded training through Lightning's engine."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from realign_lightning.checkpoints import (
    METADATA,
    CheckpointError,
    StagedFolder,
    check_committed,
    find_committed,
    is_remote,
    not_written,
    tidy,
)
from realign_lightning.modules.shard_reader import ShardPlanner, ShardReader
from realign_lightning.ranks import gather, on_first_rank

__all__ = ["METADATA", "FSDP2Strategy", "check_shapes"]


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, sharding over every device of every node; also on CPUs, with gloo.

    Differs from its parent in four points: all devices form one data-parallel mesh; checkpoints hold trained weights
    only; they appear under their names when they are complete and on the disk, sharded ones with a mark
    (``committed.json``) that is written last; and validation runs in ``no_grad`` instead of ``inference_mode``, whose
    tensors FSDP2 could not train on afterwards. With precision ``bf16-mixed`` weights are gathered in bfloat16, kept
    and updated in float32.

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

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save on all ranks together; whatever happens, a checkpoint of that name is the former one or the new one.

        Args:
            checkpoint: what the Trainer has gathered; weights and optimizer states are taken out of it.
            filepath: a folder, or a file with ``save_distributed_checkpoint=False``; replaced if it exists.
            storage_options: must be None.

        Raises:
            CheckpointError: on all ranks, if one could not write.
            ValueError: for a URL.
        """
        if storage_options is not None:
            raise TypeError(f"FSDP2Strategy takes no storage_options, got {storage_options!r}.")
        where = str(self.broadcast(filepath))
        if is_remote(where):
            raise ValueError(
                f"FSDP2Strategy keeps checkpoints on disks that all nodes share, got {where}: set another `dirpath`."
            )
        if not self._save_distributed_checkpoint:
            on_first_rank(lambda: self.checkpoint_io.save_checkpoint(checkpoint, where))
        else:
            self._save_shards(checkpoint, Path(where).absolute())

    def _save_shards(self, checkpoint: dict[str, Any], target: Path) -> None:
        states = {"state_dict": checkpoint.pop("state_dict")}
        for index, state in enumerate(checkpoint.pop("optimizer_states", [])):
            states[f"optimizer_{index}"] = state
        staged: list[StagedFolder] = []
        path = on_first_rank(lambda: _stage(target, staged))
        try:
            _write_shards(states, path)
            on_first_rank(lambda: _complete(staged[0], checkpoint))
        except (CheckpointException, OSError, RuntimeError) as error:
            for folder in staged:
                folder.discard()
            raise not_written(target, error) from error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load trained weights and optimizer states; sharded checkpoints also onto another number of devices.

        Raises:
            ValueError: if the checkpoint was made with another backbone or adapter, or its writing was interrupted.
        """
        path = find_committed(Path(self.broadcast(checkpoint_path)))
        if path.is_dir():
            check_committed(path)
        trained = {name: value for name, value in self._module.named_parameters() if value.requires_grad}
        if not (path / METADATA).is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("state_dict", {})
            check_shapes(_shapes(saved), _shapes(trained))
            return super().load_checkpoint(path, weights_only=True)
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)
        found = get_model_state_dict(self._module, options=options)
        # Tied weights are found under every name, and saved under their first.
        weights = {name: found[name] for name in trained}
        _check_fit(path, weights)
        load({"state_dict": weights}, storage_reader=ShardReader(path), planner=ShardPlanner())
        self._module.load_state_dict(weights)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self._module, optimizer)}
            load(state, storage_reader=ShardReader(path), planner=ShardPlanner())
            set_optimizer_state_dict(
                self._module,
                optimizer,
                optim_state_dict=state[f"optimizer_{index}"],
                options=StateDictOptions(cpu_offload=True, strict=False),
            )
        metadata: dict[str, Any] = torch.load(path / METADATA, weights_only=True, map_location="cpu")
        return metadata

    def _state_options(self, **options: Any) -> StateDictOptions:
        return StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True, **options)

    @property
    def _module(self) -> torch.nn.Module:
        assert self.model is not None  # noqa: S101
        return self.model


def _stage(target: Path, staged: list[StagedFolder]) -> Path:
    """Open a fresh folder beside the target; what killed runs have left there is cleaned up."""
    try:
        tidy(target.parent)
        staged.append(StagedFolder(target))
    except OSError as error:
        raise not_written(target, error) from error
    return staged[0].path


def _write_shards(states: dict[str, Any], folder: Path) -> None:
    """Write this rank's shards, and wait until all ranks have."""
    error = None
    try:
        save(states, storage_writer=FileSystemWriter(folder, sync_files=True))
    # PyTorch tells all ranks of errors while writing, but not of those before; the others must hear of them.
    except (CheckpointException, OSError, RuntimeError) as raised:
        error = raised
    # PyTorch puts whole tracebacks into its messages.
    told = [reason for reason in gather(error and str(error).strip().split("\n")[-1]) if reason is not None]
    if told:
        raise CheckpointError(told[0]) from error


def _complete(staged: StagedFolder, checkpoint: dict[str, Any]) -> None:
    written = {part.relative_path for part in (ShardReader(staged.path).read_metadata().storage_data or {}).values()}
    if missing := sorted(name for name in written if not (staged.path / name).is_file()):
        raise CheckpointError(
            f"{missing[0]} of another node is not seen here: FSDP2Strategy's checkpoints need a folder that all share"
        )
    torch.save(checkpoint, staged.path / METADATA)
    staged.commit()


def _check_fit(path: Path, weights: dict[str, Any]) -> None:
    """Compare names and shapes in a sharded checkpoint with those that are about to be loaded."""
    metadata = ShardReader(path).read_metadata().state_dict_metadata
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
