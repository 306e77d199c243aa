"""Train an adapter or a whole model on shards with one or two CPU processes. Run by test_rdpo.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.callbacks import Evaluation, SampleAnswers
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import RDPOModule
from tests.callbacks.helpers import Lengths

STRATEGIES = {"lora": "ddp_fork", "full": "ddp_fork_find_unused_parameters_true"}


def main(checkpoint: str, shards: str, kind: str, devices: int, output: Path) -> None:
    torch.manual_seed(0)
    backbone = AutoBackbone(checkpoint)
    data = DualPreferenceDataModule(backbone, shards, batch_size=4 // devices)
    module = RDPOModule(
        backbone,
        RDPOLoss(),
        LoRA(4, 8, 0.0) if kind == "lora" else None,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.5 if kind == "lora" else 0.05),
    )
    trainer = Trainer(
        default_root_dir=output,
        accelerator="cpu",
        devices=devices,
        strategy=STRATEGIES[kind] if devices > 1 else "auto",
        max_epochs=2,
        logger=CSVLogger(output, name="log", version=str(devices)),
        callbacks=[SampleAnswers(1, max_new_tokens=2), Evaluation([Lengths(3)])],
        enable_checkpointing=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(output / f"{devices}.ckpt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
