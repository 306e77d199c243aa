"""Digit scenes, the embedded world of the quick start: handwritten digits, and a small policy that misreads them."""

from realign_lightning.demos.benchmarks import write_digit_benchmarks
from realign_lightning.demos.policy import POLICY_FOLDER
from realign_lightning.demos.quickstart import DigitBackbone, DigitCHAIR, DigitPairs, DigitPOPE
from realign_lightning.demos.scenes import DigitWorld, Scene
from realign_lightning.demos.skills import DigitSkills
from realign_lightning.demos.source import DigitScenes

__all__ = [
    "POLICY_FOLDER",
    "DigitBackbone",
    "DigitCHAIR",
    "DigitPOPE",
    "DigitPairs",
    "DigitScenes",
    "DigitSkills",
    "DigitWorld",
    "Scene",
    "write_digit_benchmarks",
]
