"""rDPO and its relatives, on plain log-probabilities; usable without the rest of the package."""

from realign_lightning.losses.functional import (
    LikelihoodPer,
    LossType,
    RDPOOutput,
    anchor_loss,
    preference_loss,
    rdpo_loss,
    reward_metrics,
    sft_loss,
)
from realign_lightning.losses.rdpo import PreferenceLoss, RDPOLoss, SFTLoss

__all__ = [
    "LikelihoodPer",
    "LossType",
    "PreferenceLoss",
    "RDPOLoss",
    "RDPOOutput",
    "SFTLoss",
    "anchor_loss",
    "preference_loss",
    "rdpo_loss",
    "reward_metrics",
    "sft_loss",
]
