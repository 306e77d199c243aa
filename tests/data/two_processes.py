"""Fit on two CPU processes; every rank writes down what it was given. Run by test_datamodule.py."""

import sys
from pathlib import Path

from lightning.pytorch import Trainer

from realign_lightning.data import DualPreferenceDataModule
from tests.data.helpers import Recorder, WordBackbone


def main(folder: Path) -> None:
    shard = str(folder / "a.tar")
    data = DualPreferenceDataModule(WordBackbone(), shard, val=shard, batch_size=2, max_bad_fraction=0.2)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(folder), datamodule=data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
