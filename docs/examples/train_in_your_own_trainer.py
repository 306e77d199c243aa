"""rDPO in a plain Trainer, beside a team's own callback and logger."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW

from realign_lightning import DualPreferenceDataModule, LoRA, RDPOLoss, RDPOModule
from realign_lightning.demos import DigitBackbone, DigitPairs


class PrintMargins(pl.Callback):
    def on_validation_end(self, trainer, module):
        values = trainer.callback_metrics
        print("step", trainer.global_step, "visual margin", float(values["val/rewards/visual_margins"]))


backbone = DigitBackbone()  # or AutoBackbone("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
pairs = DigitPairs(scenes=64, val_scenes=16)  # leave it out to read shards of your own
data = DualPreferenceDataModule(backbone, train="digits/train", val="digits/val", batch_size=8, builder=pairs)
loss = RDPOLoss(beta=0.1, visual_weight=1.0)
module = RDPOModule(backbone, loss, LoRA(r=16, alpha=32), optimizer=lambda weights: AdamW(weights, lr=3e-4))
trainer = pl.Trainer(max_epochs=2, logger=CSVLogger("logs"), callbacks=PrintMargins(), log_every_n_steps=1)
trainer.fit(module, datamodule=data)
module.export("adapter")
