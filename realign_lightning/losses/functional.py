"""Preference losses as pure functions of log-probabilities.

No model, no batch, no state: every function takes the sums that a scorer computed and returns one loss per example.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from realign_lightning.types import LogProbs, ResponseLengths

LossType = Literal["sigmoid", "ipo", "hinge"]
"""How a preference is penalised: ``sigmoid`` (DPO, arXiv 2305.18290), ``ipo`` (arXiv 2310.12036), ``hinge`` (SLiC,
arXiv 2309.06657)."""


LikelihoodPer = Literal["token", "answer"]
"""What a likelihood is taken per: ``token``, a response's mean, so that responses weigh alike, and a short one's tokens
more than a long one's; ``answer``, its sum, so that all tokens weigh alike, as in usual SFT."""


class RDPOOutput(NamedTuple):
    """What a preference loss returns, one value per example.

    Args:
        losses: (B,), the only field with a gradient.
        chosen_rewards: (B,) beta * r(y_w | v), detached; None when there was no reference.
        rejected_rewards: (B,) beta * r(y_l | v), detached; None when that view or the reference was not scored.
        visual_rewards: (B,) beta * r(y_w | v_l), detached; None when that view or the reference was not scored.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    visual_rewards: Tensor | None = None


def preference_loss(
    preferred: Tensor,
    dispreferred: Tensor,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    preferred_lengths: Tensor | None = None,
    dispreferred_lengths: Tensor | None = None,
) -> Tensor:
    r"""Loss of one preference between two log-ratios, with :math:`h` = ``preferred - dispreferred``.

    * ``sigmoid``: :math:`-(1-\epsilon)\log\sigma(\beta h) - \epsilon\log\sigma(-\beta h)` (DPO, Eq. 7; smoothed as in
      conservative DPO).
    * ``hinge``: :math:`\max(0, 1 - \beta h)` (SLiC; label smoothing does not apply).
    * ``ipo``: :math:`(\bar h - 1/(2\beta))^2` (IPO, Eq. 17), where :math:`\bar h` is the difference of the log-ratios
      per response token, the form that IPO's authors confirmed to TRL.

    Args:
        preferred: (B,) log pi(y) - log pi_0(y) of the preferred side, summed over response tokens.
        dispreferred: (B,) the same of the other side.
        beta: inverse temperature, above 0.
        loss_type: the penalty.
        label_smoothing: probability in [0, 0.5) that a preference is the wrong way round.
        preferred_lengths: (B,) response tokens of the preferred side; ``ipo`` only.
        dispreferred_lengths: (B,) response tokens of the other side; ``ipo`` only.

    Returns:
        (B,) losses.

    Raises:
        ValueError: for an unknown ``loss_type``, and for ``ipo`` without lengths.

    >>> import torch
    >>> preference_loss(torch.tensor([2.0]), torch.tensor([-8.0]), beta=0.1)  # -log sigmoid(1)
    tensor([0.3133])
    """
    if loss_type == "ipo":
        if preferred_lengths is None or dispreferred_lengths is None:
            raise ValueError(
                "loss_type 'ipo' averages log-ratios over response tokens: expected `lengths`, got None. "
                "Pass ResponseLengths, or ones to keep the sums."
            )
        per_token = preferred / preferred_lengths.clamp(min=1) - dispreferred / dispreferred_lengths.clamp(min=1)
        return (per_token - 1 / (2 * beta)).square()
    scaled = beta * (preferred - dispreferred)
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(scaled)
        return losses - label_smoothing * F.logsigmoid(-scaled) if label_smoothing else losses
    if loss_type == "hinge":
        return F.relu(1 - scaled)
    raise ValueError(f"Expected `loss_type` to be 'sigmoid', 'ipo' or 'hinge', got {loss_type!r}.")


def anchor_loss(log_ratio: Tensor, beta: float = 0.1, delta: float = 0.0) -> Tensor:
    r"""Anchor of mDPO, :math:`-\log\sigma(\beta r(y_w|v) - \delta)`, which keeps the chosen reward from falling.

    Args:
        log_ratio: (B,) log pi(y_w | x, v) - log pi_0(y_w | x, v).
        beta: inverse temperature.
        delta: reward that the chosen response is to exceed (arXiv 2406.11839 uses 0).

    Returns:
        (B,) losses.
    """
    return -F.logsigmoid(beta * log_ratio - delta)


def sft_loss(log_probs: Tensor, lengths: Tensor | None = None, per: LikelihoodPer = "token") -> Tensor:
    """Negative log-likelihood of a response, per token the regulariser of RPO (arXiv 2404.19733, Eq. 2).

    Args:
        log_probs: (B,) summed log-probs of the chosen response.
        lengths: (B,) its tokens; needed per token.
        per: whether the mean of the response's tokens is taken, or their sum.

    Returns:
        (B,) losses.

    Raises:
        ValueError: for an unknown ``per``, and for ``token`` without lengths.

    >>> import torch
    >>> sft_loss(torch.tensor([-12.0]), torch.tensor([4])), sft_loss(torch.tensor([-12.0]), per="answer")
    (tensor([3.]), tensor([12.]))
    """
    if per == "answer":
        return -log_probs
    if per != "token":
        raise ValueError(f"Expected `per` to be 'token' or 'answer', got {per!r}.")
    if lengths is None:
        raise ValueError("The likelihood per token is a mean over tokens: expected `lengths`, got None.")
    return -log_probs / lengths.clamp(min=1)


def rdpo_loss(
    policy: LogProbs,
    reference: LogProbs,
    beta: float = 0.1,
    visual_weight: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    anchor_weight: float = 0.0,
    sft_weight: float = 0.0,
    lengths: ResponseLengths | None = None,
    text_weight: float = 1.0,
    sft_per: LikelihoodPer = "token",
) -> RDPOOutput:
    r"""rDPO: a text preference plus a visual preference (Re-Align, arXiv 2502.13146, Eq. 1).

    .. math::
        r(y|v) &= \log \pi(y|x,v) - \log \pi_0(y|x,v) \\
        L &= -\log\sigma(\beta (r(y_w|v) - r(y_l|v))) - w_v \log\sigma(\beta (r(y_w|v) - r(y_w|v_l)))

    With ``visual_weight=0`` the second term is not computed: the result is DPO to the last bit. With ``text_weight=0``
    the first is not, and the rejected response need not be scored.

    Args:
        policy: log-probs under the policy, each (B,).
        reference: log-probs under the frozen reference, each (B,).
        beta: inverse temperature.
        visual_weight: w_v.
        label_smoothing: see :func:`preference_loss`; applies to both preferences.
        loss_type: see :func:`preference_loss`; applies to both preferences.
        anchor_weight: weight of :func:`anchor_loss`.
        sft_weight: weight of :func:`sft_loss` on the chosen response.
        lengths: response tokens per view; needed by ``ipo``, and by ``sft_weight`` per token.
        text_weight: weight of the first term.
        sft_per: see :func:`sft_loss`.

    Returns:
        Losses and detached rewards (beta times the log-ratios) per example.

    Raises:
        ValueError: if a view or the lengths that the settings need are missing.

    >>> import torch
    >>> start = LogProbs(torch.tensor([-9.0]), torch.tensor([-7.0]), torch.tensor([-8.0]))
    >>> rdpo_loss(start, start).losses  # policy = reference: 2 ln 2
    tensor([1.3863])
    """
    chosen = policy.chosen - reference.chosen
    rejected = _log_ratio(policy, reference, "rejected")
    visual = _log_ratio(policy, reference, "visual")

    def over(other: Tensor, view: Literal["rejected", "visual"]) -> Tensor:
        own_length, other_length = (None, None) if lengths is None else (lengths.chosen, getattr(lengths, view))
        return preference_loss(chosen, other, beta, loss_type, label_smoothing, own_length, other_length)

    losses = torch.zeros_like(chosen)
    if text_weight:
        if rejected is None:
            raise ValueError(
                "rdpo_loss needs the rejected view: expected `policy.rejected` and `reference.rejected`, got None."
            )
        losses = text_weight * over(rejected, "rejected")
    if visual_weight:
        if visual is None:
            raise ValueError(
                f"visual_weight={visual_weight} needs the visual view: expected `policy.visual` and "
                "`reference.visual`, got None. Score it, or set visual_weight=0."
            )
        losses = losses + visual_weight * over(visual, "visual")
    if anchor_weight:
        losses = losses + anchor_weight * anchor_loss(chosen, beta)
    if sft_weight:
        losses = losses + sft_weight * sft_loss(policy.chosen, None if lengths is None else lengths.chosen, sft_per)
    return RDPOOutput(
        losses,
        beta * chosen.detach(),
        None if rejected is None else beta * rejected.detach(),
        None if visual is None else beta * visual.detach(),
    )


def _log_ratio(policy: LogProbs, reference: LogProbs, view: Literal["rejected", "visual"]) -> Tensor | None:
    ours, theirs = getattr(policy, view), getattr(reference, view)
    return None if ours is None or theirs is None else ours - theirs


def reward_metrics(output: RDPOOutput) -> dict[str, Tensor]:
    """Rewards, margins and accuracies of text and image preference, per example, under TRL's names.

    Args:
        output: what a loss returned.

    Returns:
        (B,) tensors: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` and, where
        the retrieved image was scored, ``rewards/visual``, ``rewards/visual_margins``, ``rewards/visual_accuracies``.
        An equal pair counts as wrong.
    """
    values: dict[str, Tensor] = {}
    if output.chosen_rewards is None:
        return values
    values["rewards/chosen"] = output.chosen_rewards
    for view, rewards, prefix in (
        ("rejected", output.rejected_rewards, ""),
        ("visual", output.visual_rewards, "visual_"),
    ):
        if rewards is not None:
            margins = output.chosen_rewards - rewards
            values[f"rewards/{view}"] = rewards
            values[f"rewards/{prefix}margins"] = margins
            values[f"rewards/{prefix}accuracies"] = (margins > 0).float()
    return values
