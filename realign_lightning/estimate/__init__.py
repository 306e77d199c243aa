"""Memory, arithmetic and hours of a training run, from the model's configuration: no weights, no accelerator.

Weights, gradients and optimizer states are counted on the meta device, byte for byte. Activations and FLOPs are counted
while one real training step runs on tensors that have a shape but no values
(:mod:`realign_lightning.estimate.trial`), so that they hold for any model family and follow every change of the
training step.
"""

from realign_lightning.estimate.cards import CARDS, Card
from realign_lightning.estimate.command import main
from realign_lightning.estimate.estimator import estimate
from realign_lightning.estimate.job import Job, Layout
from realign_lightning.estimate.result import Estimate, Flops, Memory, Parameters

__all__ = ["CARDS", "Card", "Estimate", "Flops", "Job", "Layout", "Memory", "Parameters", "estimate", "main"]
