"""Dual-preference data: the shard contract, writing shards, reading them exactly, and the Lightning data module."""

from __future__ import annotations

from realign_lightning.data.builder import ShardBuilder
from realign_lightning.data.card import BuildFacts, write_card
from realign_lightning.data.datamodule import BadDataError, DualPreferenceDataModule, SampleReader, SkipLog
from realign_lightning.data.lengths import group_by_length
from realign_lightning.data.scan import ShardError, scan_shard
from realign_lightning.data.schema import SCHEMA_VERSION, decode_sample, encode_members, fingerprint_members
from realign_lightning.data.shards import ShardIndex, ShardInfo, ShardWriter, read_index
from realign_lightning.data.stream import EpochSampler, SampleIndex, ShardDataset

__all__ = [
    "SCHEMA_VERSION",
    "BadDataError",
    "BuildFacts",
    "DualPreferenceDataModule",
    "EpochSampler",
    "SampleIndex",
    "SampleReader",
    "ShardBuilder",
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
