"""A small training run that goes on from its newest checkpoint, for tests that kill it.

LoRA with dropout on a tiny LLaVA: every batch draws random numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.callbacks import Preemption
from realign_lightning.checkpoints import newest_checkpoint, read_header
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.modules import FSDP2Strategy, RDPOModule

FINAL = "final.pt"


class Record(Callback):
    """Writes the loss of every batch as it was computed: lines of ``step batch loss keys``; saves after it if told."""

    def __init__(self, path: Path, pause: float, saves: bool) -> None:
        self.path = path
        self.pause = pause
        self.saves = saves
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        best = trainer.checkpoint_callback.best_model_path
        if self.batches == 0 and best:
            # After a resume it must name what is there.
            assert read_header(Path(best))["global_step"] <= trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            line = [trainer.global_step, batch_idx, float(outputs["loss"]).hex(), list(batch.keys)]
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.batches += 1
        if self.saves:
            trainer.save_checkpoint(self.path.parent / "checkpoints" / f"batch={self.batches}.ckpt")
        time.sleep(self.pause)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=["one", "ddp", "fsdp", "fsdp_file"], default="one")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--every_steps", type=int)
    parser.add_argument("--every_batch", action="store_true", help="a checkpoint after each batch, also in a window")
    parser.add_argument("--save_last", action="store_true")
    parser.add_argument("--validate_every", type=int)
    parser.add_argument("--resume", default="newest", help="newest, none, or a path")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--val", action="store_true")
    return parser.parse_args(arguments)


def module_of(options: argparse.Namespace) -> RDPOModule:
    return RDPOModule(
        AutoBackbone(options.checkpoint),
        adapter=LoRA(4, 8, 0.3),
        trained_parts=["projector"],
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2),
    )


def trainer_of(options: argparse.Namespace) -> Trainer:
    strategies: dict[str, Any] = {"one": "auto", "ddp": "ddp"}
    if options.engine.startswith("fsdp"):
        strategies[options.engine] = FSDP2Strategy(save_distributed_checkpoint=options.engine == "fsdp")
    checkpoints = ModelCheckpoint(
        options.folder / "checkpoints",
        "{step}",
        save_last=options.save_last,
        save_top_k=1 if options.save_last else -1,
        every_n_train_steps=options.every_steps,
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        default_root_dir=options.folder,
        accelerator="cpu",
        devices=1 if options.engine == "one" else 2,
        strategy=strategies[options.engine],
        max_steps=options.steps,
        # Not -1: with an end in sight schedules ask for the number of batches, before a checkpoint is restored.
        max_epochs=1000,
        accumulate_grad_batches=options.accumulate,
        logger=False,
        callbacks=[
            Record(options.folder / "losses.jsonl", options.pause, options.every_batch),
            Preemption(),
            checkpoints,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic=True,
        gradient_clip_val=1.0,
        val_check_interval=options.validate_every,
        check_val_every_n_epoch=None if options.validate_every else 1,
    )


def resume_path(options: argparse.Namespace) -> Path | None:
    if options.resume == "none":
        return None
    return newest_checkpoint(options.folder) if options.resume == "newest" else Path(options.resume)


def run(options: argparse.Namespace) -> Trainer:
    """Fit to the end, or until preempted; the finished run writes ``final.pt``."""
    torch.set_num_threads(1)
    path = resume_path(options)
    # A resumed process has other random numbers than the first had, unless they are restored.
    seed_everything(0 if path is None else os.getpid(), verbose=False)
    module, trainer = module_of(options), trainer_of(options)
    data = DualPreferenceDataModule(
        module.backbone,
        options.shards,
        val=options.shards if options.val else None,
        batch_size=options.batch_size,
        num_workers=options.workers,
    )
    trainer.fit(module, datamodule=data, ckpt_path=path)
    (preemption,) = (one for one in trainer.callbacks if isinstance(one, Preemption))
    if preemption.preempted:
        raise SystemExit(preemption.exit_code(trainer))
    if trainer.global_step != options.steps:
        raise RuntimeError(f"the run ended at step {trainer.global_step}")
    keep(trainer, options.folder / FINAL)
    return trainer


def keep(trainer: Trainer, path: Path) -> None:
    """Write trained weights and optimizer states, whole."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    if isinstance(trainer.strategy, FSDP2Strategy):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = get_model_state_dict(module, options=options)
        moments = get_optimizer_state_dict(module, optimizer, options=options)
    else:
        weights = {name: value for name, value in module.named_parameters() if value.requires_grad}
        moments = optimizer.state_dict()
    if trainer.is_global_zero:
        partial = path.with_suffix(".tmp")
        torch.save({"weights": weights, "optimizer": moments}, partial)
        partial.rename(path)


if __name__ == "__main__":
    run(read_options())
