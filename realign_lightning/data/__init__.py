"""Dual-preference data: the shard contract, writing shards, reading them exactly, and the Lightning data module."""

from __future__ import annotations

from realign_lightning.data.builder import ShardBuilder
from realign_lightning.data.card import BuildFacts, write_card
from realign_lightning.data.datamodule import DualPreferenceDataModule, SampleReader
from realign_lightning.data.lengths import group_by_length
from realign_lightning.data.manifest import ShardIndex, ShardInfo, read_index
from realign_lightning.data.order import Blocks, EpochSampler, Place, SampleIndex
from realign_lightning.data.quarantine import BadDataError, SkipLog
from realign_lightning.data.remote import ShardCache
from realign_lightning.data.scan import ShardError, scan_shard
from realign_lightning.data.schema import SCHEMA_VERSION, decode_sample, encode_members, fingerprint_members
from realign_lightning.data.shards import ShardWriter
from realign_lightning.data.stream import ShardDataset
from realign_lightning.data.table import SampleTable
from realign_lightning.data.transform import CroppedNegative, SampleTransform

__all__ = [
    "SCHEMA_VERSION",
    "BadDataError",
    "Blocks",
    "BuildFacts",
    "CroppedNegative",
    "DualPreferenceDataModule",
    "EpochSampler",
    "Place",
    "SampleIndex",
    "SampleReader",
    "SampleTable",
    "SampleTransform",
    "ShardBuilder",
    "ShardCache",
    "ShardDataset",
    "ShardError",
    "ShardIndex",
    "ShardInfo",
    "ShardWriter",
    "SkipLog",
    "decode_sample",
    "encode_members",
    "fingerprint_members",
    "group_by_length",
    "read_index",
    "scan_shard",
    "write_card",
]
