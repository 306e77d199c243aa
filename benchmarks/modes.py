"""The training steps that the benchmark compares: this package's, TRL's, and two in plain transformers."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from benchmarks.shapes import Shape, make_samples
from realign_lightning.backbones.adapters import LoRA
from realign_lightning.backbones.auto import AutoBackbone
from realign_lightning.data import encode_members, fingerprint_members
from realign_lightning.losses import PreferenceLoss, RDPOLoss, RDPOOutput
from realign_lightning.modules import RDPOModule
from realign_lightning.scoring import SharePrefix
from realign_lightning.types import EncodedSample, LogProbs, PreferenceBatch, PreferenceSample, View

Group = Literal["rdpo", "dpo"]
"""Steps of one group have the same loss: Eq. 1 on three views, or plain DPO on two."""

BETA = 0.1


@dataclass(frozen=True)
class Mode:
    """One way to compute a training step.

    Args:
        group: which loss it computes.
        text: what it does, for the table's legend.
    """

    group: Group
    text: str


MODES: dict[str, Mode] = {
    "rdpo": Mode("rdpo", "RDPOModule: each image encoded once, chosen and rejected share their prompt"),
    "rdpo_cached": Mode("rdpo", "the same, the reference's log-probs cached"),
    "rdpo_no_sharing": Mode("rdpo", "RDPOModule with share_prefix=False: padded rows"),
    "branches": Mode("rdpo", "plain transformers: three branches one by one, pixels and all logits in each"),
    "padded_rows": Mode("rdpo", "plain transformers: three rows a pair in one padded batch, pixels for every row"),
    "dpo": Mode("dpo", "RDPOModule with visual_weight=0: two views"),
    "dpo_cached": Mode("dpo", "the same, the reference's log-probs cached"),
    "trl": Mode("dpo", "TRL's DPOTrainer as it comes: its fused head, which runs on every position without Triton"),
    "trl_fused": Mode("dpo", "TRL's DPOTrainer with its fused head on response positions, as where there is Triton"),
}

BASELINES: dict[Group, str] = {"rdpo": "branches", "dpo": "trl"}
"""What loss and gradient of a group are compared with."""

NOTES = (
    f"TRL {version('trl')} has one log-prob head, the fused one, and no option for another. With Triton (CUDA, XPU) it "
    "takes the response positions only; elsewhere it takes every position (trl). trl_fused makes it take the response "
    "positions here too, its kernels replaced by TRL's own PyTorch ones. use_liger_kernel is deprecated in TRL, "
    "changes layers and no longer the head, and needs the package liger-kernel and Triton: not measured.",
    "TRL's gradient checkpointing, on by default, is off here: no mode recomputes its layers.",
)


@dataclass(frozen=True)
class Data:
    """A micro-batch.

    Args:
        samples: the preference pairs.
        batch: encoded and collated by the package, on the model's device.
    """

    samples: Sequence[PreferenceSample]
    batch: PreferenceBatch


@dataclass(frozen=True)
class Step:
    """A training step that can be run again and again.

    Args:
        name: one of :data:`MODES`.
        model: the PEFT model that it trains.
        forward: computes the loss, with its graph.
        precision: context of the forward pass.
    """

    name: str
    model: nn.Module
    forward: Callable[[], Tensor]
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: value for name, value in sorted(self.model.named_parameters()) if value.requires_grad}

    def run(self) -> Tensor:
        """Forward and backward pass; returns the loss."""
        with self.precision():
            loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.trained.values():
            parameter.grad = None

    def gradient(self) -> Tensor:
        """The trained parameters' gradients as one vector, in the order of their names."""
        return torch.cat([value.grad.flatten().float() for value in self.trained.values() if value.grad is not None])


class Contest:
    """Models with the same weights and the same adapters, each loaded when a mode first needs it.

    Args:
        folder: checkpoint with its processor.
        device: of every model.
        dtype: of the weights.
        rank: of the adapters, which sit on every linear layer of the language model.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, rank: int = 16) -> None:
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.rank = rank
        self.backbone = AutoBackbone(str(folder), dtype="bfloat16" if dtype == torch.bfloat16 else "float32")

    # ---- data

    def data(self, shape: Shape, seed: int = 0) -> Data:
        """Random preference pairs of a shape."""
        samples = make_samples(shape, self.backbone.tokenizer, seed)
        return Data(samples, self.backbone.collate([self._encode(sample) for sample in samples]).to(self.device))

    def _encode(self, sample: PreferenceSample) -> EncodedSample:
        fingerprint = fingerprint_members(encode_members(sample))
        return replace(self.backbone.encode_sample(sample), fingerprint=fingerprint)

    def trl_inputs(self, data: Data) -> Mapping[str, Tensor]:
        """The same pairs through TRL's own collator."""
        rows: Any = Dataset.from_list([_trl_row(sample) for sample in data.samples])
        collate: Any = self.trainer.data_collator
        inputs: Mapping[str, Tensor] = collate(list(rows)).to(self.device)
        return inputs

    # ---- models

    @cached_property
    def module(self) -> RDPOModule:
        """The package's module, for every mode of its own."""
        adapter = LoRA(r=self.rank, alpha=2 * self.rank, dropout=0.0)
        module = RDPOModule(self.backbone, adapter=adapter)
        module.configure_model()
        _fill_adapters(module.policy)
        return module.to(self.device).train()

    @cached_property
    def cached_module(self) -> RDPOModule:
        """The same with the reference's log-probs on disk, beside the checkpoint."""
        module = self.module.clone(reference="cached", reference_cache=f"{self.folder}-reference")
        module.configure_model()
        _fill_adapters(module.policy)
        return module.to(self.device).train()

    @cached_property
    def plain(self) -> nn.Module:
        """A plain transformers model with PEFT's adapters."""
        model: Any = get_peft_model(self._base(), self._lora())
        _fill_adapters(model)
        return model.train()  # type: ignore[no-any-return]

    @cached_property
    def trainer(self) -> Any:
        """TRL's trainer. It makes the adapters itself: a model that has some becomes the reference with them on."""
        first = Dataset.from_list([_trl_row(make_samples(_ANY, self.backbone.tokenizer)[0])])
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                folder,
                beta=BETA,
                max_length=None,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=self.device.type == "cpu",
                report_to="none",
            )
            processor = self.backbone.processor
            trainer: Any = DPOTrainer(
                self._base(), args=arguments, train_dataset=first, processing_class=processor, peft_config=self._lora()
            )
        _fill_adapters(trainer.model)
        trainer.model.train()
        return trainer

    def _base(self) -> Any:
        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=self.dtype)
        return model.to(self.device)

    def _lora(self) -> LoraConfig:
        linear = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules=linear)

    # ---- steps

    def step(self, name: str, data: Data) -> Step:
        """A mode on a micro-batch.

        Args:
            name: one of :data:`MODES`.
            data: from :meth:`data`.
        """
        model, forward = self._forward(name, data)
        return Step(name, model, forward, self._autocast)

    def _autocast(self) -> torch.autocast:
        """Adapters are float32 also on 16-bit weights, and compute in 16 bit beside them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)

    def _forward(self, name: str, data: Data) -> tuple[nn.Module, Callable[[], Tensor]]:
        batch, loss = data.batch, make_loss(MODES[name].group)
        if name in ("trl", "trl_fused"):
            head = _response_positions() if name == "trl_fused" else contextlib.nullcontext
            return self.trainer.model, partial(_trl, self.trainer, self.trl_inputs(data), head)
        if name in ("branches", "padded_rows"):
            score = _branches if name == "branches" else _padded_rows
            return self.plain, partial(_plain, self.plain, batch, loss, score)
        if name.endswith("_cached"):
            with self._autocast():
                self.cached_module.cache_reference([batch])
            return self.cached_module.policy, partial(_ours, self.cached_module, batch, loss, "auto")
        share: SharePrefix = False if name == "rdpo_no_sharing" else "auto"
        return self.module.policy, partial(_ours, self.module, batch, loss, share)


_ANY = Shape("any", "llava", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, (((2, 2), (2, 2)),), response=8, prompt=1)


def make_loss(group: Group) -> PreferenceLoss:
    """The loss of a group of modes."""
    return RDPOLoss(beta=BETA, visual_weight=1.0 if group == "rdpo" else 0.0)


def _fill_adapters(model: Any) -> None:
    """Adapters that change the model, the same for every model: each drawn from its name."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(values)


# ---- this package


def _ours(module: RDPOModule, batch: PreferenceBatch, loss: PreferenceLoss, share: SharePrefix) -> Tensor:
    module.loss, module.share_prefix = loss, share
    # Its means for the logs are over steps with one loss.
    module.on_train_start()
    return module.training_step(batch, 0)


# ---- TRL


def _trl_row(sample: PreferenceSample) -> dict[str, Any]:
    return {
        "images": [sample.image],
        "prompt": [{"role": "user", "content": sample.prompt}],
        "chosen": [{"role": "assistant", "content": sample.chosen}],
        "rejected": [{"role": "assistant", "content": sample.rejected}],
    }


def _trl(
    trainer: Any,
    inputs: Mapping[str, Tensor],
    head: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Tensor:
    """What ``DPOTrainer.training_step`` does before its backward pass; the reference is the model, adapters off."""
    with head():
        loss: Tensor = trainer.compute_loss(trainer.model, dict(inputs))
    return loss


def _response_positions() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Make TRL's fused head choose response positions, as it does itself where there is Triton."""
    return partial(patch, "trl.trainer.utils._use_triton", return_value=True)


def different_tokens(batch: PreferenceBatch, inputs: Mapping[str, Tensor]) -> str | None:
    """Where the rows that TRL's collator makes are not those of the package's, or None if they are the same.

    Args:
        batch: from the package's collator.
        inputs: from TRL's: chosen rows, then rejected ones.
    """
    for number, (ours, theirs) in enumerate(zip(_rows(batch), _trl_rows(inputs), strict=True)):
        for what, mine, other in zip(("tokens", "response mask"), ours, theirs, strict=True):
            if not torch.equal(mine, other):
                return f"row {number}: {what} of {len(mine)} and {len(other)}: {mine.tolist()} and {other.tolist()}"
    return None


def _rows(batch: PreferenceBatch) -> Iterator[tuple[Tensor, Tensor]]:
    for view in (batch.chosen, batch.rejected):
        for row, kept in enumerate(view.tokens["attention_mask"].bool()):
            yield view.tokens["input_ids"][row][kept], view.response_mask[row][kept]


def _trl_rows(inputs: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for row, kept in enumerate(inputs["attention_mask"].bool()):
        yield inputs["input_ids"][row][kept], inputs["completion_mask"][row][kept].bool()


# ---- plain transformers

_Score = Callable[[nn.Module, PreferenceBatch], LogProbs]


def _plain(model: Any, batch: PreferenceBatch, loss: PreferenceLoss, score: _Score) -> Tensor:
    policy = score(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference = score(model, batch)
    output: RDPOOutput = loss(policy, reference)
    return output.losses.mean()


def _branches(model: nn.Module, batch: PreferenceBatch) -> LogProbs:
    """Each view by itself: its pixels through the tower, logits at every position, as Re-Align's release does."""

    def score(view: View, images: Mapping[str, Tensor]) -> Tensor:
        logits = model(**view.tokens, **_pixels(model, images), use_cache=False).logits[:, :-1].float()
        labels, kept = view.tokens["input_ids"][:, 1:], view.response_mask[:, 1:]
        log_probs = logits.log_softmax(dim=-1).gather(2, labels[..., None])[..., 0]
        sums: Tensor = (log_probs * kept).sum(dim=1)
        return sums

    return LogProbs(
        score(batch.chosen, batch.images), score(batch.rejected, batch.images), score(batch.visual, batch.retrieved)
    )


def _padded_rows(model: nn.Module, batch: PreferenceBatch) -> LogProbs:
    """All views below each other, padded to the longest row, with pixels for every row and logits of responses."""
    tokens, response = _stack([batch.chosen, batch.rejected, batch.visual])
    images = [_pixels(model, inputs) for inputs in (batch.images, batch.images, batch.retrieved)]
    pixels = {name: torch.cat([inputs[name] for inputs in images]) for name in images[0]}
    # The logits at one position predict the token at the next.
    kept = F.pad(response[:, 1:], (0, 1))
    logits = model(**tokens, **pixels, logits_to_keep=kept, use_cache=False).logits
    log_probs = -F.cross_entropy(logits.float(), tokens["input_ids"][response], reduction="none")
    rows = torch.zeros(len(response), device=log_probs.device).index_add(0, response.nonzero()[:, 0], log_probs)
    return LogProbs(*torch.split(rows, len(batch)))


def _stack(views: Sequence[View]) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens and response masks of several views as rows of one length; what is padded is not attended to."""
    length = max(view.response_mask.shape[1] for view in views)

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])

    tokens = {name: join([view.tokens[name] for view in views]) for name in views[0].tokens}
    return tokens, join([view.response_mask for view in views])


def _pixels(model: Any, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Image inputs that a transformers model takes; the package's batches count images beside them."""
    accepted = inspect.signature(model.get_base_model().forward).parameters
    return {name: value for name, value in images.items() if name in accepted}
