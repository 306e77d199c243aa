"""The metrics as functions of lists."""

from realign_lightning.metrics.functional.chair import chair, chair_captions, ground_truth
from realign_lightning.metrics.functional.pope import pope, pope_questions

__all__ = ["chair", "chair_captions", "ground_truth", "pope", "pope_questions"]
