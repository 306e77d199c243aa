"""Two steps of training on one process or on two, in float32 and bfloat16. Run by test_invariants.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, DistributedSampler

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.modules import FSDP2Strategy, RDPOModule, rdpo
from realign_lightning.ranks import rank_and_world_size
from tests.conftest import preference_samples


def fit(checkpoint: str, engine: str, dtype: str) -> RDPOModule:
    """Train on three samples and a stand-in, on two processes two and one."""
    torch.manual_seed(0)
    module = RDPOModule(
        AutoBackbone(checkpoint, dtype=dtype),
        adapter=LoRA(4, 8, 0.0),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.5),
        lr_scheduler=None,
    )
    samples = [module.backbone.encode_sample(sample) for sample in preference_samples(4)]
    object.__setattr__(samples[3], "weight", 0.0)
    devices = 1 if engine == "one" else 2
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy={"one": "auto", "ddp": "ddp", "fsdp": FSDP2Strategy()}[engine],
        max_epochs=2,
        precision="bf16-mixed" if dtype == "bfloat16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    sampler = DistributedSampler(samples, devices, trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(samples, 4 // devices, sampler=sampler, collate_fn=module.backbone.collate))
    return module


def movement(module: RDPOModule) -> dict[str, torch.Tensor]:
    """The second matrices of the adapter, which start at zero, gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(module, options=options)
    return {name: value for name, value in sorted(state.items()) if "lora_B" in name}


def main(checkpoint: str, output: Path) -> None:
    for broken in (False, True):
        if broken:
            # Each rank would count its own rows as the step's.
            rdpo._Window.scale = lambda window, batches: 1.0
        for engine in ("ddp", "fsdp"):
            for dtype in ("float32", "bfloat16"):
                moves = movement(fit(checkpoint, engine, dtype))
                if rank_and_world_size()[0] == 0:
                    torch.save(moves, output / f"{engine}-{dtype}-{broken}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
