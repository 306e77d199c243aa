"""TRL's own loss on log-probs of our choice: its method runs unbound, on a stand-in for the trainer and the model."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import DPOTrainer

from realign_lightning.types import LogProbs


def trl_preference_losses(policy: LogProbs, reference: LogProbs, beta: float, loss_type: str) -> Tensor:
    """Mean DPO loss as TRL computes it; each response is one token, so its log-prob is the sum."""
    per_token = torch.cat([policy.chosen, policy.rejected])[:, None]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.ones_like(per_token, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        beta=beta,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    completion = torch.tensor([[0, 1]]).expand(len(per_token), 2)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference.chosen,
        "ref_rejected_logps": reference.rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
