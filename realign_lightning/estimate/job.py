"""What is to be estimated: a module, and those settings of Trainer and data that memory and time depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from realign_lightning.modules import RDPOModule

Layout = Literal["single", "ddp", "fsdp2"]
"""How devices share a model: one device alone; a whole copy each (DDP); shards of it
(:class:`~realign_lightning.modules.FSDP2Strategy`)."""

Precision = Literal["16-mixed", "bf16-mixed", "32-true", "16-true", "bf16-true", "64-true"]
"""The Trainer's precisions."""

_PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}


@dataclass(frozen=True)
class Job:
    """A training run, as far as memory and time depend on it.

    Args:
        module: what is trained; its weights need not exist.
        batch_size: samples per device and forward pass.
        accumulate_grad_batches: forward passes per optimizer step.
        devices: per node.
        num_nodes: machines.
        layout: how devices share the model.
        precision: the Trainer's.
        gradient_as_bucket_view: DDP's option; True spares a second copy of the gradients.

    Raises:
        ValueError: for counts below 1.
    """

    module: RDPOModule
    batch_size: int = 1
    accumulate_grad_batches: int = 1
    devices: int = 1
    num_nodes: int = 1
    layout: Layout = "single"
    precision: Precision = "32-true"
    gradient_as_bucket_view: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate_grad_batches", "devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {getattr(self, name)}.")

    @classmethod
    def from_settings(cls, module: RDPOModule, batch_size: int, trainer: Mapping[str, Any]) -> Job:
        """A job from the Trainer's arguments, as configuration files hold them.

        Args:
            module: what is trained.
            batch_size: the data module's.
            trainer: ``devices``, ``num_nodes``, ``strategy``, ``precision``, ``accumulate_grad_batches``; others are
                not looked at. Devices that are left to the machine ("auto", -1) count as one.

        Raises:
            ValueError: for strategies and precisions whose memory is not known here.
        """
        devices = _count_devices(trainer.get("devices", "auto"))
        num_nodes = int(trainer.get("num_nodes") or 1)
        layout, options = _layout(trainer.get("strategy"), devices * num_nodes)
        return cls(
            module,
            batch_size,
            int(trainer.get("accumulate_grad_batches") or 1),
            devices,
            num_nodes,
            layout,
            _precision(trainer.get("precision")),
            bool(options.get("gradient_as_bucket_view", False)),
        )

    @property
    def world_size(self) -> int:
        """Devices on all nodes."""
        return self.devices * self.num_nodes

    @property
    def shards(self) -> int:
        """Pieces that weights are cut into."""
        return self.world_size if self.layout == "fsdp2" else 1

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all devices."""
        return self.batch_size * self.accumulate_grad_batches * self.world_size

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What mixed precision computes in; None without it."""
        return _dtype_of(self.precision) if self.precision.endswith("-mixed") else None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What the Trainer converts the weights to; None where it leaves them."""
        is_converted = self.precision.endswith("-true") and self.precision != "32-true"
        return _dtype_of(self.precision) if is_converted else None

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """What FSDP2 casts weights to while a block uses them; None where it leaves them."""
        return torch.bfloat16 if self.layout == "fsdp2" and self.precision == "bf16-mixed" else None


def _dtype_of(precision: Precision) -> torch.dtype:
    return _DTYPES[precision.split("-")[0]]


def _count_devices(value: Any) -> int:
    """Devices per node, from a number, a list of their indices or a text of either."""
    if isinstance(value, str) and "," in value:
        value = [part for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        return len(value)
    return 1 if value in (None, "auto", -1, "-1") else int(value)


def _layout(strategy: Any, world_size: int) -> tuple[Layout, Mapping[str, Any]]:
    """The layout of a strategy's name, or of its class and arguments."""
    spec: Mapping[str, Any] = strategy if isinstance(strategy, Mapping) else {"class_path": strategy or "auto"}
    name = str(spec["class_path"]).rsplit(".", 1)[-1]
    options = spec.get("init_args") or {}
    if name == "auto":
        return ("single" if world_size == 1 else "ddp"), options
    if name == "SingleDeviceStrategy":
        return "single", options
    if name == "DDPStrategy" or name == "ddp" or name.startswith("ddp_"):
        return "ddp", options
    if name == "FSDP2Strategy":
        return "fsdp2", options
    raise ValueError(
        f"Expected `trainer.strategy` to be auto, ddp or realign_lightning.modules.FSDP2Strategy, got {name!r}: how it "
        "lays out memory is not known here. Estimate with one of these, for example --trainer.strategy ddp."
    )


def _precision(value: Any) -> Precision:
    name = _PRECISIONS.get(str(value), str(value))
    for known in get_args(Precision):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"Expected `trainer.precision` to be one of {list(get_args(Precision))}, got {value!r}.")
