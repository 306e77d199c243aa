"""Peak host memory of one of two ranks while it loads a sharded model. Run by test_sharded.py."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.modules import FSDP2Strategy, RDPOModule


def memory(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at their highest. Mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class Measured(RDPOModule):
    """Measures its own loading."""

    def configure_model(self) -> None:
        if self._policy is not None:
            return
        dist.barrier()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        super().configure_model()
        # Read every weight once: what is mapped from a file takes no memory before.
        total = sum(float(value.to_local().sum()) for value in self.policy.parameters())
        assert math.isfinite(total)
        peak = memory("VmHWM") - before
        held = sum(value.to_local().nbytes for value in self.policy.parameters())
        (self.output / f"{dist.get_rank()}.json").write_text(json.dumps({"peak": peak, "held": held}))


def main(checkpoint: str, output: Path) -> None:
    module = Measured(AutoBackbone(checkpoint), adapter=LoRA(8, 16))
    module.output = output
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=FSDP2Strategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, dataloaders=[])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
