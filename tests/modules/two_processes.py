"""Train an adapter or a whole model on shards with one CPU process or two. Run by test_engines.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from realign_lightning.backbones import AutoBackbone, LoRA, head
from realign_lightning.callbacks import Evaluation, SampleAnswers
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import FSDP2Strategy, RDPOModule
from tests.callbacks.helpers import Lengths

STEPS = 10


def strategy_of(engine: str, kind: str):
    if engine == "fsdp":
        return FSDP2Strategy()
    if engine == "ddp":
        # LLaVA never uses the last layers of its vision tower.
        return "ddp_find_unused_parameters_true" if kind == "full" else "ddp"
    return "auto"


def module_of(checkpoint: str, kind: str, engine: str) -> RDPOModule:
    rate = 0.05 if kind == "full" else 0.5
    return RDPOModule(
        AutoBackbone(checkpoint),
        RDPOLoss(),
        None if kind == "full" else LoRA(4, 8, 0.0),
        trained_parts=["projector"] if kind == "projector" else None,
        part_learning_rates={"projector": 0.05} if kind == "projector" else None,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=rate),
        gradient_checkpointing=kind == "projector",
        # Sharded and compiled is to agree with one process that is neither.
        compile_backend="aot_eager" if (kind, engine) == ("lora", "fsdp") else None,
    )


def main(checkpoint: str, shards: str, kind: str, engine: str, output: Path) -> Trainer:
    devices = 1 if engine == "one" else 2
    if engine == "fsdp":
        # So that the head works in chunks of a few of the 311 words' logits, computed again in the backward pass.
        head.LOGITS_AT_A_TIME = 5 * 311
    torch.manual_seed(0)
    module = module_of(checkpoint, kind, engine)
    data = DualPreferenceDataModule(module.backbone, shards, shards, batch_size=4 // devices)
    trainer = Trainer(
        default_root_dir=output,
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(engine, kind),
        max_steps=STEPS,
        logger=CSVLogger(output, name="log", version=engine),
        callbacks=[SampleAnswers(1, max_new_tokens=2), Evaluation([Lengths(3)], batch_size=2)],
        enable_checkpointing=False,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Without it the reference answers before any other forward pass.
        num_sanity_val_steps=int(kind != "projector"),
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(output / f"{engine}.ckpt")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5]))
