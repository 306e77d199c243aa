"""Steps whose loss or gradient is not finite: found before the optimizer moves, by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from realign_lightning.ranks import gather, rank_and_world_size

log = logging.getLogger(__name__)

NonFinite = Literal["stop", "skip"]
"""What to do with an optimizer step whose loss or gradient is not finite: raise :class:`NonFiniteError`, or leave the
step out and go on."""

MOST_SKIPS = 10
"""Steps that may be left out in a row; at the next one training stops."""

_MOST_KEYS = 20


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; no weight has moved by it.

    Raised on all ranks at once, with the keys of the samples on all ranks.
    """


class FiniteGuard:
    """Watches the losses and gradients of one optimizer step after the other.

    Nothing is read from the device, and nothing is said to other ranks, before an optimizer step is due. What is then
    sent, :meth:`look`, is two numbers, which the caller adds to a message that ranks exchange anyway.

    Args:
        response: see :data:`NonFinite`.

    Attributes:
        skipped: optimizer steps that were left out in the whole run.
        in_a_row: how many of them were the latest.

    Raises:
        ValueError: for an unknown response.
    """

    def __init__(self, response: NonFinite = "stop") -> None:
        if response not in ("stop", "skip"):
            raise ValueError(f"Expected `non_finite` to be 'stop' or 'skip', got {response!r}.")
        self.response = response
        self.skipped = 0
        self.in_a_row = 0
        self.losses = LossMarks()

    def look(self, optimizer: Optimizer, gradients_too: bool = True) -> Tensor:
        """What is wrong with the step that is due, on this rank.

        Args:
            optimizer: about to step.
            gradients_too: False leaves gradients to a gradient scaler, for which overflow is ordinary.

        Returns:
            (2,) float32 on the losses' device: losses that are not finite, and 1 for a gradient that is not.
        """
        count = self.losses.count()
        gradient = torch.zeros_like(count)
        if gradients_too:
            gradient = _is_broken(_gradients(optimizer)).to(count)
        return torch.stack([count, gradient])

    def allows(self, found: Tensor, optimizer: Optimizer, step: int) -> bool:
        """Whether the optimizer may step; all ranks call this together, and come to the same answer.

        Where it may not and ``response`` is ``skip``, the gradients of the whole step are dropped. Optimizers pass
        over weights without a gradient, so that neither weights nor their momentum move.

        Args:
            found: (2,) sum of :meth:`look` over the ranks.
            optimizer: about to step.
            step: number of the step, for messages.

        Raises:
            NonFiniteError: if something is not finite and the response is ``stop``, or :data:`MOST_SKIPS` steps were
                left out in a row.
        """
        bad_losses, bad_gradient = found.tolist()
        marks, self.losses = self.losses, LossMarks()
        if not bad_losses and not bad_gradient:
            self.in_a_row = 0
            return True
        trouble = _describe(marks, bool(bad_losses), step)
        if self.response == "stop" or self.in_a_row >= MOST_SKIPS:
            raise NonFiniteError(f"{trouble} {self._advice()}")
        self.skipped += 1
        self.in_a_row += 1
        for weight in _weights(optimizer):
            weight.grad = None
        if rank_and_world_size()[0] == 0:
            log.warning("%s The step is left out, number %d of this run.", trouble, self.skipped)
        return False

    def _advice(self) -> str:
        advice = (
            "No weight has moved by it. Look at these samples; if they are sound, lower the learning rate, set the "
            "Trainer's gradient_clip_val, or train with precision bf16-mixed or 32-true."
        )
        if self.response == "stop":
            return f"{advice} non_finite='skip' leaves single steps like this one out."
        return f"{self.in_a_row} steps before it were left out already, so that training stops. {advice}"

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from a checkpoint.

        Args:
            state: from :meth:`state_dict`; empty for a checkpoint that has none.
        """
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


class LossMarks:
    """Samples of some batches, and which of their losses are not finite; kept on the device until asked."""

    def __init__(self) -> None:
        self._batches: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, keys: tuple[str, ...], losses: Tensor, weights: Tensor) -> None:
        """Note a batch.

        Args:
            keys: of its B samples.
            losses: (B,), detached.
            weights: (B,); samples of weight 0 do not count.
        """
        self._batches.append((keys, ~losses.isfinite() & (weights > 0)))

    def count(self) -> Tensor:
        """How many losses are not finite, 0-dimensional float32."""
        if not self._batches:
            return torch.zeros(())
        return torch.cat([marks for _, marks in self._batches]).sum().float()

    def keys(self, marked_only: bool = True) -> list[str]:
        """The samples on all ranks, in the ranks' order; all ranks ask together.

        Args:
            marked_only: only those whose loss is not finite.
        """
        own = [
            key
            for keys, marks in self._batches
            for key, marked in zip(keys, marks.tolist(), strict=True)
            if marked or not marked_only
        ]
        return list(dict.fromkeys(key for keys in gather(own) for key in keys))


def name_some(keys: Sequence[str]) -> str:
    """The first twenty keys, and how many more there are.

    >>> name_some(["a", "b"])
    'a, b'
    """
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return ", ".join(keys[:_MOST_KEYS]) + more


def counted(values: Tensor, weights: Tensor) -> Tensor:
    """The values of samples that count, and constants elsewhere: nothing flows back into a sample of weight 0.

    A product with the weight would not do: 0 times NaN is NaN, in the sum and in the gradient.

    Args:
        values: (B,).
        weights: (B,).

    >>> counted(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0])).sum()
    tensor(1.)
    """
    return torch.where(weights > 0, values, torch.zeros_like(values))


def _weights(optimizer: Optimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """This rank's gradients, of sharded weights this rank's shards."""
    found = [weight.grad for weight in _weights(optimizer) if weight.grad is not None]
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in found]
    return [gradient for gradient in own if gradient.numel()]


def _is_broken(gradients: list[Tensor]) -> Tensor:
    """Whether any entry is not finite. By the largest entry: squares of finite ones could overflow."""
    return ~get_total_norm(gradients, norm_type=float("inf")).isfinite()


def _describe(marks: LossMarks, losses: bool, step: int) -> str:
    keys = marks.keys(marked_only=losses)
    if losses:
        return f"The loss is not finite at optimizer step {step}, in {len(keys)} sample(s): {name_some(keys)}."
    return (
        f"The gradient is not finite at optimizer step {step}, though every loss is. The step's {len(keys)} "
        f"sample(s): {name_some(keys)}."
    )
