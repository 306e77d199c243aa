"""Estimates, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from realign_lightning.estimate.cards import CARDS, RESERVED_GB, Card
from realign_lightning.estimate.example import PICTURE
from realign_lightning.estimate.job import Layout

GB = 10**9
"""Bytes."""

UTILISATION = 0.35
"""Assumed share of a card's peak that training reaches."""

PAPER_SAMPLES = 11_000
"""Pairs that Re-Align trains on (arXiv 2502.13146)."""


def check_assumptions(samples: int, utilisation: float) -> None:
    """Refuse impossible assumptions.

    Args:
        samples: that are trained on.
        utilisation: share of a card's peak that is reached.

    Raises:
        ValueError: for fewer samples than one, or a share that is not above 0 and at most 1.
    """
    if samples < 1:
        raise ValueError(f"Expected `--samples` to be at least 1, got {samples}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"Expected `--utilisation` to be above 0 and at most 1, got {utilisation}.")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Args:
        total: of the model, without adapters and copies.
        trained: by part of the model.
        quantised: of the model, kept in 4 bit.
    """

    total: int
    trained: dict[str, int]
    quantised: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; on rank 0 where weights are sharded.

    Args:
        weights: the policy's parameters and buffers, adapters included.
        reference: those of a frozen copy; 0 where the reference is the policy with its adapter off, or is cached.
        gradients: of the trained weights.
        optimizer: its states.
        activations: most that forward and backward pass hold at a time beside the above.
        saved: the share of ``activations`` that the forward pass keeps for the backward pass.
        optimizer_step: what the optimizer's step holds for a moment; activations are gone by then.
        communication: buffers that weights and gradients of several devices pass through.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    saved: int
    optimizer_step: int
    communication: int

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        lasting = self.weights + self.reference + self.gradients + self.optimizer + self.communication
        return lasting + max(self.activations, self.optimizer_step)


@dataclass(frozen=True)
class Flops:
    """FLOPs of an optimizer step on all devices together: matrix products, convolutions and attention.

    A multiplication and an addition are two. Causal attention counts in full, as the implementations that take a mask
    compute it.

    Args:
        images: vision tower and projector; under policy and reference, where they are trained.
        policy: forward pass of the policy's language model.
        reference: that of the reference's.
        recomputed: forward passes that gradient checkpointing repeats.
        backward: gradients.
    """

    images: int
    policy: int
    reference: int
    recomputed: int
    backward: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.images + self.policy + self.reference + self.recomputed + self.backward


@dataclass(frozen=True)
class Estimate:
    """What a training run takes.

    Args:
        model: class of the model.
        dtype: what most is computed in.
        layout: how devices share the model.
        devices: on all nodes.
        batch_size: samples per device and forward pass.
        accumulate_grad_batches: forward passes per optimizer step.
        views: rows per sample.
        length: tokens of the longest view, pictures included.
        tokens: that go through the language model in one forward pass of a device, padding included.
        response_tokens: tokens per response.
        gradient_checkpointing: whether activations are recomputed.
        parameters: their numbers.
        memory: bytes per device.
        flops: per optimizer step.
    """

    model: str
    dtype: str
    layout: Layout
    devices: int
    batch_size: int
    accumulate_grad_batches: int
    views: int
    length: int
    tokens: int
    response_tokens: int
    gradient_checkpointing: bool
    parameters: Parameters
    memory: Memory
    flops: Flops

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.accumulate_grad_batches * self.devices

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, padding and image tokens included; a prefix that views share counts once."""
        return self.tokens * self.accumulate_grad_batches * self.devices

    def fits(self, card: Card) -> bool:
        """Whether every device's share fits a card, with :data:`~realign_lightning.estimate.cards.RESERVED_GB` left.

        Args:
            card: of which there are ``devices``.
        """
        return self.memory.total <= (card.memory_gb - RESERVED_GB) * GB

    def hours(self, card: Card, samples: int, utilisation: float = UTILISATION) -> float:
        """Hours of training on ``devices`` cards; reading data, validation and checkpoints are not counted.

        Args:
            card: of which there are ``devices``.
            samples: how many are trained on, all epochs together.
            utilisation: share of the card's peak that is reached.

        Raises:
            ValueError: as :func:`check_assumptions`.
        """
        check_assumptions(samples, utilisation)
        flops = self.flops.total / self.samples_per_step * samples
        return flops / (self.devices * card.tflops * 1e12 * utilisation) / 3600

    def as_dict(self, samples: int = PAPER_SAMPLES, utilisation: float = UTILISATION) -> dict[str, Any]:
        """Everything as plain values, in bytes, FLOPs and hours.

        Args:
            samples: how many are trained on.
            utilisation: share of a card's peak that is reached.
        """
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["flops"]["total"] = self.flops.total
        values |= {
            "samples_per_step": self.samples_per_step,
            "tokens_per_step": self.tokens_per_step,
            "samples": samples,
            "utilisation": utilisation,
            "cards": [
                {**asdict(card), "fits": self.fits(card), "hours": self.hours(card, samples, utilisation)}
                for card in CARDS
            ],
        }
        return values

    def as_text(self, samples: int = PAPER_SAMPLES, utilisation: float = UTILISATION) -> str:
        """A table for the terminal.

        Args:
            samples: how many are trained on.
            utilisation: share of a card's peak that is reached.
        """
        sections = (self._head(), self._memory(), self._arithmetic(), self._cards(samples, utilisation))
        return "\n\n".join("\n".join(section) for section in sections) + "\n"

    def _head(self) -> Iterator[str]:
        counts, trained = self.parameters, sum(self.parameters.trained.values())
        yield _row("model", f"{self.model}, {counts.total:,} parameters")
        if counts.quantised:
            yield _row("", f"{counts.quantised:,} of them in 4 bit")
        yield _row("trained", f"{trained:,} ({trained / counts.total:.1%} of the model's)")
        for part, count in counts.trained.items():
            yield _row("", f"{count:,} {part}")
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        yield _row("computes", f"in {self.dtype}{checkpointing}")
        devices = f"{self.devices} {_plural('device', self.devices)} ({self.layout})"
        accumulated = f" x {self.accumulate_grad_batches} accumulated" if self.accumulate_grad_batches > 1 else ""
        yield _row("step", f"{self.samples_per_step} samples: {self.batch_size} x {devices}{accumulated}")
        per_sample = f"{self.tokens / self.batch_size:,.0f} a sample"
        yield _row("", f"{self.tokens_per_step:,} tokens: {per_sample}, {self.views} views of up to {self.length}")
        width, height = PICTURE
        prompt = f"{self.length - self.response_tokens} tokens of prompt and picture ({width} x {height})"
        yield _row("assumed", f"{prompt}, {self.response_tokens} of response")

    def _memory(self) -> Iterator[str]:
        memory = self.memory
        scale, unit = _unit(memory.total, "B")
        without_copy = "the policy with its adapter off" if self.flops.reference else "none runs in a training step"
        notes = {
            "weights": "",
            "reference": "" if memory.reference else without_copy,
            "gradients": "",
            "optimizer": "",
            "activations": f"at most; {memory.saved / scale:.2f} of them kept for the backward pass",
            "optimizer_step": "not while there are activations",
            "communication": "",
            "total": f"and {RESERVED_GB:g} GB for CUDA",
        }
        yield f"memory per device, {unit}"
        for name, note in notes.items():
            value = getattr(memory, name)
            if value or name not in ("optimizer_step", "communication"):
                yield _number(name.replace("_", " "), value / scale, note)

    def _arithmetic(self) -> Iterator[str]:
        flops = self.flops
        notes = {
            "images": "vision tower and projector",
            "policy": "forward pass",
            "reference": "forward pass",
            "recomputed": "gradient checkpointing",
            "backward": "",
            "total": "",
        }
        scale, unit = _unit(flops.total, "FLOP")
        yield f"arithmetic per step, {unit}"
        for name, note in notes.items():
            value = getattr(flops, name)
            if value or name != "recomputed":
                yield _number(name, value / scale, note)

    def _cards(self, samples: int, utilisation: float) -> Iterator[str]:
        steps = math.ceil(samples / self.samples_per_step)
        yield (
            f"{samples:,} samples, {steps:,} steps, {self.devices} {_plural('card', self.devices)} at "
            f"{utilisation:.0%} of the 16-bit peak"
        )
        yield f"  {'card':16}{'GB':>9}{'TFLOP/s':>10}{'fits':>7}{'hours':>10}"
        for card in CARDS:
            fits = "yes" if self.fits(card) else "no"
            hours = _short(self.hours(card, samples, utilisation))
            lacks = "  no bfloat16" if self.dtype == "bfloat16" and not card.bfloat16 else ""
            yield f"  {card.name:16}{card.memory_gb:9g}{card.tflops:10g}{fits:>7}{hours:>10}{lacks}"
        if self.dtype in ("float32", "float64"):
            yield f"  In {self.dtype} cards are several times slower than these hours, which are for 16 bit."


_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _row(name: str, text: str) -> str:
    return f"{name:12}{text}"


def _number(name: str, value: float, note: str) -> str:
    return f"  {name:16}{value:9.2f}  {note}".rstrip()


def _unit(value: float, name: str) -> tuple[float, str]:
    """The largest unit that a value has at least one of."""
    scale, prefix = next(
        pair for pair in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if value >= pair[0]
    )
    return scale, f"{prefix}{name}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _short(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 0.05 else "< 0.1"
