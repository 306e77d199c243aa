"""Only the loss: rDPO on log-probabilities that your own code computed."""

import torch

from realign_lightning.losses import RDPOLoss, reward_metrics
from realign_lightning.types import LogProbs

# Sums over response tokens, one per example: log pi(y_w|v), log pi(y_l|v), log pi(y_w|v_l).
policy = LogProbs(
    chosen=torch.tensor([-10.0], requires_grad=True),
    rejected=torch.tensor([-14.0], requires_grad=True),
    visual=torch.tensor([-13.0], requires_grad=True),
)
reference = LogProbs(torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-12.0]))

output = RDPOLoss(beta=0.1, visual_weight=1.0)(policy, reference)
output.losses.mean().backward()

print(f"loss {output.losses.item():.4f}")
print(f"gradient of the chosen log-prob {policy.chosen.grad.item():.4f}")
for name, value in reward_metrics(output).items():
    print(f"{name} {value.item():.2f}")
