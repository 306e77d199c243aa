"""LightningModules: preference training."""

from realign_lightning.modules.rdpo import RDPOModule, SchedulerCallable
from realign_lightning.modules.reference import AdapterOff, FrozenCopy, Reference, ReferenceKind
from realign_lightning.modules.schedule import WarmupCosine

__all__ = [
    "AdapterOff",
    "FrozenCopy",
    "RDPOModule",
    "Reference",
    "ReferenceKind",
    "SchedulerCallable",
    "WarmupCosine",
]
