"""Shards that are made when a run needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from realign_lightning.backbones.base import Backbone


class ShardBuilder(ABC):
    """Makes the shards of a data module before they are read. Subclass it to bring your own."""

    @abstractmethod
    def build(self, backbone: Backbone, train: str, val: str | None) -> None:
        """Make sure that the shards exist; called once per machine, before training. Reuse what is there.

        Args:
            backbone: the policy's family; it can load the policy to build pairs from its own hallucinations.
            train: folder for the training shards.
            val: folder for the validation shards, or None.
        """
