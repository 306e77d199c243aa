"""LightningModules: preference training."""

from realign_lightning.modules.finite import NonFinite, NonFiniteError
from realign_lightning.modules.rdpo import RDPOModule, SchedulerCallable
from realign_lightning.modules.reference import (
    AdapterOff,
    CachedReference,
    FrozenCopy,
    Reference,
    ReferenceKind,
    UnknownSampleError,
)
from realign_lightning.modules.schedule import WarmupCosine
from realign_lightning.modules.strategy import FSDP2Strategy

__all__ = [
    "AdapterOff",
    "CachedReference",
    "FSDP2Strategy",
    "FrozenCopy",
    "NonFinite",
    "NonFiniteError",
    "RDPOModule",
    "Reference",
    "ReferenceKind",
    "SchedulerCallable",
    "UnknownSampleError",
    "WarmupCosine",
]
