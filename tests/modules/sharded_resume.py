"""Ten steps on two processes, and the last five again from a sharded checkpoint. Run by test_sharded.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.modules import FSDP2Strategy, RDPOModule


def fit(checkpoint: str, shards: str, folder: Path, rank: int = 4, resume: Path | None = None) -> Trainer:
    seed_everything(0, verbose=False)
    module = RDPOModule(
        AutoBackbone(checkpoint),
        adapter=LoRA(rank, 8, 0.0),
        trained_parts=["projector"],
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=FSDP2Strategy(),
        max_epochs=5,
        logger=False,
        callbacks=[
            ModelCheckpoint(folder, "step={step}", auto_insert_metric_name=False, every_n_train_steps=5, save_top_k=-1)
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=DualPreferenceDataModule(module.backbone, shards, batch_size=1), ckpt_path=resume)
    return trainer


def save(trainer: Trainer, path: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(trainer.lightning_module, options=options)
    if dist.get_rank() == 0:
        torch.save(state, path)


def main(checkpoint: str, shards: str, output: Path) -> None:
    save(fit(checkpoint, shards, output / "whole"), output / "whole.pt")
    half = output / "whole" / "step=5.ckpt"
    save(fit(checkpoint, shards, output / "resumed", resume=half), output / "resumed.pt")
    try:
        fit(checkpoint, shards, output / "refused", rank=2, resume=half)
    except ValueError as error:
        (output / "refused.txt").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
