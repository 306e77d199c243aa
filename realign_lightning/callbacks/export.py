"""Adapters in PEFT format beside every checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO

from realign_lightning.callbacks.samples import shares_one_model

log = logging.getLogger(__name__)


class AdapterExport(pl.Callback):
    """Writes the adapter for plain transformers and peft beside every checkpoint, and removes it with it.

    For ``epoch=0-step=300.ckpt`` there is a folder ``epoch=0-step=300-adapter`` whatever callback or call saved the
    checkpoint; links (``save_last: link``) get none of their own. Load it with
    ``PeftModel.from_pretrained(base_model, folder)``. After full fine-tuning the folder is called ``...-model`` and
    holds the whole model. Processor and model card lie with it.

    Where ranks hold shards of one model (FSDP2Strategy), one export is written when training ends, to
    ``<log folder>/adapter``; the command ``realign-lightning export`` makes one of any checkpoint.

    Args:
        last_copy: also keep a copy of the newest export in ``<log folder>/adapter`` (``model`` after full fine-tuning),
            a path that does not change.
    """

    def __init__(self, last_copy: bool = True) -> None:
        self.last_copy = last_copy
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch everything that the trainer's strategy saves.

        Raises:
            TypeError: if the module cannot export itself.
        """
        if not callable(getattr(pl_module, "export", None)):
            raise TypeError(
                f"AdapterExport needs a module with `export(folder)`, got {type(pl_module).__name__}. "
                "Use RDPOModule, or remove the callback."
            )
        # Ranks agree on it by talking to each other, so all of them must ask here.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if shares_one_model(trainer):
            return
        if not isinstance(trainer.strategy.checkpoint_io, _ExportingCheckpointIO):
            trainer.strategy.checkpoint_io = _ExportingCheckpointIO(trainer.strategy.checkpoint_io, pl_module)
        trainer.strategy.checkpoint_io.module = pl_module
        trainer.strategy.checkpoint_io.copy_to = None
        if self.last_copy and trainer.log_dir is not None:
            trainer.strategy.checkpoint_io.copy_to = self._folder / _kind(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export a sharded model, on all ranks together."""
        if not shares_one_model(trainer):
            return
        folder = self._folder / _kind(pl_module)
        pl_module.export(folder)  # type: ignore[operator]
        if trainer.is_global_zero:
            log.info(
                "AdapterExport: wrote %s. Sharded checkpoints have no export beside them: "
                "`realign-lightning export --checkpoint FOLDER --output NEW_FOLDER` makes one.",
                folder,
            )


def export_folder(checkpoint: str | Path, module: Any) -> Path:
    """Where the export of a checkpoint lies.

    Args:
        checkpoint: path of the checkpoint file.
        module: the module; one without an adapter exports a whole model.

    >>> from types import SimpleNamespace
    >>> export_folder("runs/epoch=0.ckpt", SimpleNamespace(adapter=object())).as_posix()
    'runs/epoch=0-adapter'
    """
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}-{_kind(module)}")


def _kind(module: Any) -> str:
    return "model" if getattr(module, "adapter", None) is None else "adapter"


class _ExportingCheckpointIO(CheckpointIO):
    """Exports the module whenever the wrapped plugin saves a checkpoint."""

    def __init__(self, wrapped: CheckpointIO, module: Any) -> None:
        self.wrapped = wrapped
        self.module = module
        self.copy_to: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wrapped.save_checkpoint(checkpoint, path, storage_options=storage_options)
        folder = export_folder(path, self.module)
        self.module.export(folder)
        if self.copy_to is not None:
            shutil.copytree(folder, self.copy_to, dirs_exist_ok=True)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.wrapped.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.wrapped.remove_checkpoint(path)
        shutil.rmtree(export_folder(path, self.module), ignore_errors=True)

    def teardown(self) -> None:
        self.wrapped.teardown()
