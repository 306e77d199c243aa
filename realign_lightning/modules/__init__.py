"""LightningModules: preference training."""

from realign_lightning.modules.rdpo import RDPOModule, SchedulerCallable
from realign_lightning.modules.reference import AdapterOff, FrozenCopy, Reference, ReferenceKind
from realign_lightning.modules.schedule import WarmupCosine
from realign_lightning.modules.strategy import FSDP2Strategy

__all__ = [
    "AdapterOff",
    "FSDP2Strategy",
    "FrozenCopy",
    "RDPOModule",
    "Reference",
    "ReferenceKind",
    "SchedulerCallable",
    "WarmupCosine",
]
