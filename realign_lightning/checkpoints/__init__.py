"""Checkpoints that survive kills, full disks and losses of power, and runs that go on from them exactly."""

from realign_lightning.checkpoints.folders import (
    COMMITTED,
    METADATA,
    StagedFolder,
    check_committed,
    find_committed,
    is_committed,
    tidy,
)
from realign_lightning.checkpoints.plugin import (
    CheckpointError,
    DurableCheckpointIO,
    is_remote,
    make_durable,
    not_written,
)
from realign_lightning.checkpoints.progress import open_batches
from realign_lightning.checkpoints.resuming import RANDOM_STATES, ResumePoint
from realign_lightning.checkpoints.room import check_room
from realign_lightning.checkpoints.search import newest_checkpoint, read_header

__all__ = [
    "COMMITTED",
    "METADATA",
    "RANDOM_STATES",
    "CheckpointError",
    "DurableCheckpointIO",
    "ResumePoint",
    "StagedFolder",
    "check_committed",
    "check_room",
    "find_committed",
    "is_committed",
    "is_remote",
    "make_durable",
    "newest_checkpoint",
    "not_written",
    "open_batches",
    "read_header",
    "tidy",
]
