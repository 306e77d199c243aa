"""The metrics as functions of lists."""

from realign_lightning.metrics.functional.amber import (
    amber,
    amber_counts,
    amber_discriminative,
    amber_discriminative_counts,
    amber_generative,
    amber_generative_counts,
    amber_responses,
    amber_score,
)
from realign_lightning.metrics.functional.chair import chair, chair_counts
from realign_lightning.metrics.functional.hallusionbench import (
    hallusionbench,
    hallusionbench_counts,
    hallusionbench_judge_prompt,
    hallusionbench_same_prompt,
    judge_same,
    judge_verdict,
)
from realign_lightning.metrics.functional.mmhal import mmhal, mmhal_counts, mmhal_judge_prompt, mmhal_rating
from realign_lightning.metrics.functional.pope import pope, pope_counts, pope_verdicts

__all__ = [
    "amber",
    "amber_counts",
    "amber_discriminative",
    "amber_discriminative_counts",
    "amber_generative",
    "amber_generative_counts",
    "amber_responses",
    "amber_score",
    "chair",
    "chair_counts",
    "hallusionbench",
    "hallusionbench_counts",
    "hallusionbench_judge_prompt",
    "hallusionbench_same_prompt",
    "judge_same",
    "judge_verdict",
    "mmhal",
    "mmhal_counts",
    "mmhal_judge_prompt",
    "mmhal_rating",
    "pope",
    "pope_counts",
    "pope_verdicts",
]
