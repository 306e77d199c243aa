"""Train with cached reference log-probs on one CPU process or two. Run by test_cached_reference.py."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.modules.cache import ReferenceCache
from tests.modules.two_processes import strategy_of


class KillAfter(ReferenceCache):
    """Kills its process with SIGKILL when it has written some batches."""

    batches = 3

    def add(self, *arguments) -> None:
        super().add(*arguments)
        KillAfter.batches -= 1
        if KillAfter.batches == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Count(Callback):
    """Counts forward passes of the language model before training and in every step, and copies that were loaded."""

    def __init__(self, output: Path):
        self.output = output
        self.loads = self.calls = 0
        self.before: int | None = None
        self.steps: list[int] = []

    def setup(self, trainer, pl_module, stage):
        load = pl_module._load_base

        def counted(around):
            self.loads += 1
            model = load(around)
            self._watch(model)
            return model

        pl_module._load_base = counted

    def _watch(self, model):
        def count(*_):
            self.calls += 1

        (head,) = (module for name, module in model.named_modules() if name.endswith("language_model"))
        head.register_forward_hook(count)

    def on_fit_start(self, trainer, pl_module):
        self._watch(pl_module.policy)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.calls if self.before is None else self.before
        self.calls = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(self.calls)

    def on_fit_end(self, trainer, pl_module):
        seen = {"loads": self.loads, "before": self.before, "steps": self.steps}
        entries = getattr(pl_module.reference, "entries", {})
        record = {**seen, "entries": {name: list(entry) for name, entry in entries.items()}}
        self.output.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(record))


def main(
    checkpoint: str,
    shards: str,
    kind: str,
    engine: str,
    reference: str,
    cache: str,
    output: Path,
    precision: str = "32-true",
) -> None:
    torch.manual_seed(0)
    devices = 1 if engine == "one" else 2
    module = RDPOModule(
        AutoBackbone(checkpoint),
        RDPOLoss(),
        None if kind == "full" else LoRA(4, 8, 0.0),
        reference=reference,
        reference_cache=cache,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05 if kind == "full" else 0.5),
    )
    data = DualPreferenceDataModule(module.backbone, shards, shards, batch_size=4 // devices, eval_batch_size=1)
    data.max_bad_fraction = 0.5
    trainer = Trainer(
        default_root_dir=output.parent,
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(engine, kind),
        max_epochs=2,
        precision=precision,
        logger=CSVLogger(output.parent, name="log", version=output.name),
        callbacks=[Count(output)],
        enable_checkpointing=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    if os.environ.get("KILL_AFTER"):
        import realign_lightning.modules.rdpo as rdpo

        KillAfter.batches = int(os.environ["KILL_AFTER"])
        rdpo.ReferenceCache = KillAfter
    main(*sys.argv[1:7], Path(sys.argv[7]), *sys.argv[8:])
