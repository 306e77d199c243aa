"""Losses as modules: settings checked once, then called with log-probs."""

from __future__ import annotations

from typing import get_args

from torch import nn

from realign_lightning.losses.functional import LikelihoodPer, LossType, RDPOOutput, rdpo_loss, sft_loss
from realign_lightning.types import VIEWS, LogProbs, ResponseLengths, ViewName, VisualWords


class PreferenceLoss(nn.Module):
    """What a trainer may ask of a loss. Subclass it to bring your own.

    Attributes:
        views: the views whose log-probs :meth:`forward` reads; others need not be scored.
        needs_reference: whether it reads the reference's log-probs.
        visual_words: which words of the chosen response the visual view reads beside the retrieved image.
    """

    views: tuple[ViewName, ...] = VIEWS
    needs_reference: bool = True
    visual_words: VisualWords = "all"

    def forward(
        self, policy: LogProbs, reference: LogProbs | None = None, lengths: ResponseLengths | None = None
    ) -> RDPOOutput:
        """Losses and rewards, (B,) each.

        Args:
            policy: log-probs under the policy.
            reference: log-probs under the frozen reference.
            lengths: response tokens per view.
        """
        raise NotImplementedError


class RDPOLoss(PreferenceLoss):
    """rDPO of Re-Align (arXiv 2502.13146, Eq. 1) and its relatives; see :func:`~realign_lightning.losses.rdpo_loss`.

    DPO is ``visual_weight=0``; mDPO's terms are ``anchor_weight=1`` with cropped images as retrieved ones.

    Args:
        beta: inverse temperature, above 0.
        visual_weight: weight w_v of the visual preference, at least 0.
        label_smoothing: probability in [0, 0.5) that a preference is the wrong way round; ``sigmoid`` only.
        loss_type: ``sigmoid``, ``ipo`` or ``hinge``.
        anchor_weight: weight of mDPO's anchor, at least 0.
        sft_weight: weight of the chosen response's negative log-likelihood, at least 0.
        visual_words: ``masked`` compares only the words that were masked when the pair was built, beside image and
            retrieved image; ``all`` is Eq. 1, which also pushes down how an answer is worded, true as it may be of both
            images. Needs pairs that say what was masked.
        text_weight: weight of the preference for the chosen over the rejected response, at least 0; 0 leaves the visual
            preference alone, and no rejected response is scored.
        sft_per: ``token`` takes the mean over the chosen response's tokens, ``answer`` their sum. Where answers of very
            different lengths are mixed, as captions with yes and no, the mean favours the short ones.

    Raises:
        ValueError: for a value outside these bounds, and if all weights are 0.

    >>> import torch
    >>> start = LogProbs(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    >>> RDPOLoss(beta=0.1)(start, start).losses
    tensor([1.3863, 1.3863])
    """

    def __init__(
        self,
        beta: float = 0.1,
        visual_weight: float = 1.0,
        label_smoothing: float = 0.0,
        loss_type: LossType = "sigmoid",
        anchor_weight: float = 0.0,
        sft_weight: float = 0.0,
        visual_words: VisualWords = "all",
        text_weight: float = 1.0,
        sft_per: LikelihoodPer = "token",
    ) -> None:
        super().__init__()
        _check_per("sft_per", sft_per)
        if not beta > 0:
            raise ValueError(f"Expected `beta` to be above 0, got {beta}.")
        for name, weight in (
            ("visual_weight", visual_weight),
            ("anchor_weight", anchor_weight),
            ("sft_weight", sft_weight),
            ("text_weight", text_weight),
        ):
            if not weight >= 0:
                raise ValueError(f"Expected `{name}` to be at least 0, got {weight}.")
        if not any((text_weight, visual_weight, anchor_weight, sft_weight)):
            raise ValueError("Expected a weight above 0, got 0 for all of them: nothing would be learned.")
        if loss_type not in get_args(LossType):
            raise ValueError(f"Expected `loss_type` to be one of {get_args(LossType)}, got {loss_type!r}.")
        if visual_words not in get_args(VisualWords):
            raise ValueError(f"Expected `visual_words` to be one of {get_args(VisualWords)}, got {visual_words!r}.")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"Expected `label_smoothing` in [0, 0.5), got {label_smoothing}.")
        if label_smoothing and loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing={label_smoothing} has no meaning for loss_type {loss_type!r}: set it to 0."
            )
        self.beta = beta
        self.visual_weight = visual_weight
        self.label_smoothing = label_smoothing
        self.loss_type: LossType = loss_type
        self.anchor_weight = anchor_weight
        self.sft_weight = sft_weight
        self.visual_words: VisualWords = visual_words
        self.text_weight = text_weight
        self.sft_per: LikelihoodPer = sft_per
        unread = {"rejected": not text_weight, "visual": not visual_weight}
        self.views = tuple(view for view in VIEWS if not unread.get(view))

    def forward(
        self, policy: LogProbs, reference: LogProbs | None = None, lengths: ResponseLengths | None = None
    ) -> RDPOOutput:
        """See :func:`~realign_lightning.losses.rdpo_loss`.

        Raises:
            ValueError: if the reference, a view or the lengths that the settings need are missing.
        """
        if reference is None:
            raise ValueError("RDPOLoss compares the policy with its reference: expected `reference`, got None.")
        return rdpo_loss(
            policy,
            reference,
            beta=self.beta,
            visual_weight=self.visual_weight,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
            anchor_weight=self.anchor_weight,
            sft_weight=self.sft_weight,
            lengths=lengths,
            text_weight=self.text_weight,
            sft_per=self.sft_per,
        )

    def extra_repr(self) -> str:
        """The settings, for printing a module."""
        return (
            f"beta={self.beta}, visual_weight={self.visual_weight}, label_smoothing={self.label_smoothing}, "
            f"loss_type={self.loss_type!r}, anchor_weight={self.anchor_weight}, sft_weight={self.sft_weight}, "
            f"visual_words={self.visual_words!r}, text_weight={self.text_weight}, sft_per={self.sft_per!r}"
        )


class SFTLoss(PreferenceLoss):
    """Plain supervised fine-tuning on the chosen response, the control every preference method should beat.

    Scores the chosen view only and needs no reference.

    Args:
        per: ``token`` takes the mean over the response's tokens, ``answer`` their sum, so that all tokens weigh alike,
            as in usual SFT.

    Raises:
        ValueError: for any other ``per``.
    """

    views: tuple[ViewName, ...] = ("chosen",)
    needs_reference = False

    def __init__(self, per: LikelihoodPer = "token") -> None:
        super().__init__()
        _check_per("per", per)
        self.per: LikelihoodPer = per

    def forward(
        self, policy: LogProbs, reference: LogProbs | None = None, lengths: ResponseLengths | None = None
    ) -> RDPOOutput:
        """Negative log-likelihood of the chosen response.

        Raises:
            ValueError: if ``lengths`` is missing and needed.
        """
        return RDPOOutput(sft_loss(policy.chosen, None if lengths is None else lengths.chosen, self.per))

    def extra_repr(self) -> str:
        """The settings, for printing a module."""
        return f"per={self.per!r}"


def _check_per(name: str, per: str) -> None:
    if per not in get_args(LikelihoodPer):
        raise ValueError(f"Expected `{name}` to be one of {get_args(LikelihoodPer)}, got {per!r}.")
