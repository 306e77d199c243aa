"""Skip and stop on two processes, where one of them meets what is not finite. Run by test_finite.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, DistributedSampler

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import FSDP2Strategy, NonFiniteError, RDPOModule
from realign_lightning.ranks import rank_and_world_size
from tests.conftest import preference_samples
from tests.modules.test_finite import SteepLoss, broken_at, eager_adam


class SteepOnOneRank(SteepLoss):
    """Only the second rank's gradient overflows."""

    def forward(self, policy, reference=None, lengths=None):
        if rank_and_world_size()[0] != 1:
            return RDPOLoss.forward(self, policy, reference, lengths)
        return super().forward(policy, reference, lengths)


def fit(checkpoint: str, engine: str, samples, non_finite: str, loss: RDPOLoss | None = None) -> RDPOModule:
    torch.manual_seed(0)
    module = RDPOModule(
        AutoBackbone(checkpoint),
        loss or RDPOLoss(),
        LoRA(4, 8, 0.0),
        optimizer=eager_adam,
        lr_scheduler=None,
        non_finite=non_finite,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=FSDP2Strategy() if engine == "fsdp" else "ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # Step k is sample 2k on the first rank and sample 2k + 1 on the second.
    sampler = DistributedSampler(samples, 2, trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(samples, 1, sampler=sampler, collate_fn=module.backbone.collate))
    return module


def save(module: RDPOModule, path: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(module, options=options)
    if rank_and_world_size()[0] == 0:
        torch.save(state, path)


def main(checkpoint: str, output: Path) -> None:
    backbone = AutoBackbone(checkpoint)
    samples = [backbone.encode_sample(sample) for sample in preference_samples(6)]
    broken = broken_at(samples, 3)
    for engine in ("ddp", "fsdp"):
        folder = output / engine
        folder.mkdir(exist_ok=True)
        save(fit(checkpoint, engine, samples[:2] + samples[4:], "skip"), folder / "without.pt")
        for name, data, steep_calls in (("broken", broken, []), ("steep", samples, [1])):
            save(fit(checkpoint, engine, data, "skip", SteepOnOneRank(steep_calls)), folder / f"{name}.pt")
            try:
                fit(checkpoint, engine, data, "stop", SteepOnOneRank(steep_calls))
            except NonFiniteError as error:
                (folder / f"{name}{rank_and_world_size()[0]}.txt").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
