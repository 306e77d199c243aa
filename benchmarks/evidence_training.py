"""Training one method of benchmarks/evidence.py, and measuring what came of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.evidence_settings import Method, Negative, Training
from realign_lightning.backbones import Backbone, LoRA
from realign_lightning.backbones.files import hash_bytes
from realign_lightning.data import CroppedNegative, ShardDataset
from realign_lightning.data.transform import sample_random
from realign_lightning.demos import DigitBackbone
from realign_lightning.evaluation.base import Benchmark
from realign_lightning.evaluation.images import load_image
from realign_lightning.losses import PreferenceLoss, RDPOLoss, SFTLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.preferences import surplus_answers
from realign_lightning.scoring import score
from realign_lightning.types import EncodedSample, LogProbs, PreferenceBatch, PreferenceSample, ViewName

MARGIN = "truth: log-prob margin"
"""Log-prob of the chosen response beside the original image, less that beside the retrieved one, in nats."""


class EncodedPairs(pl.LightningDataModule):
    """Pairs that were encoded once, for all methods that are trained on them.

    Args:
        samples: encoded, in order.
        backbone: collates.
        batch_size: pairs per step.
        seed: of the order.
    """

    def __init__(self, samples: Sequence[EncodedSample], backbone: Backbone, batch_size: int, seed: int) -> None:
        super().__init__()
        self.samples = samples
        self.backbone = backbone
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[EncodedSample]:
        """Every pair once per epoch, in an order that depends on the seed and the number of pairs alone."""
        return DataLoader(
            self.samples,  # type: ignore[arg-type]
            self.batch_size,
            shuffle=True,
            collate_fn=self.backbone.collate,
            generator=torch.Generator().manual_seed(self.seed),
            drop_last=len(self.samples) >= self.batch_size,
        )


def read_pairs(
    folder: Path,
    backbone: Backbone,
    negative: Negative,
    seed: int,
    balanced: bool = False,
    most: int | None = None,
) -> list[EncodedSample]:
    """The pairs of a folder, with the negative image that a method wants.

    Args:
        folder: of shards.
        backbone: encodes.
        negative: see :data:`~benchmarks.evidence_settings.Negative`.
        seed: of what is drawn.
        balanced: leave out answers that turn one way more often than the other.
        most: pairs, drawn from all of the folder; None takes all.
    """
    dataset = ShardDataset(str(folder), backbone)
    rows = list(range(len(dataset)))
    if most is not None and most < len(rows):
        rows = sorted(random.Random(seed).sample(rows, most))
    if balanced:
        texts = [(sample.chosen, sample.rejected) for sample in map(dataset.decode, rows)]
        surplus = set(surplus_answers(texts, seed))
        rows = [row for place, row in enumerate(rows) if place not in surplus]
    # One by one: decoded images take more memory than encoded ones.
    return [
        replace(
            backbone.encode_sample(sample),
            fingerprint=f"{dataset.fingerprint(row)}:{hash_bytes(sample.retrieved.tobytes())}",
        )
        for row, sample in zip(rows, _with_negatives(dataset, rows, negative, seed), strict=True)
    ]


def _with_negatives(
    dataset: ShardDataset, rows: Sequence[int], negative: Negative, seed: int
) -> Iterator[PreferenceSample]:
    if negative == "random":
        yield from _with_random_negatives(dataset, rows, seed)
        return
    crop = CroppedNegative()
    for sample in map(dataset.decode, rows):
        yield crop(sample, sample_random(seed, 0, sample.key)) if negative == "crop" else sample


def _with_random_negatives(dataset: ShardDataset, rows: Sequence[int], seed: int) -> Iterator[PreferenceSample]:
    """The same texts, with the image of any pair that is about another image."""
    generator = random.Random(seed)
    images = [hash_bytes(dataset.decode(row).image.tobytes()) for row in rows]
    if len(set(images)) == 1:
        raise ValueError(
            f"Expected pairs about at least 2 images for `negative: random`, got {len(rows)} about one. Take more "
            "pairs, or leave the method out."
        )
    for place, row in enumerate(rows):
        while images[other := generator.randrange(len(rows))] == images[place]:
            pass
        yield replace(dataset.decode(row), retrieved=dataset.decode(rows[other]).image)


class ReleasedBackbone(DigitBackbone):
    """Reads log-probs as the authors' released code does: those of the best token that is NOT the label.

    Only where :meth:`released` says so. Every token of the vocabulary is scored for it, which is for small ones.

    Args:
        path: of the checkpoint.
    """

    _replaced: Tensor | None = None

    @contextmanager
    def released(self, replaced: Tensor) -> Iterator[None]:
        """Read these log-probs that way inside the block.

        Args:
            replaced: (N,) bool.
        """
        self._replaced = replaced
        try:
            yield
        finally:
            self._replaced = None

    def token_log_probs(
        self, model: Any, tokens: Any, features: Any, positions: Tensor, labels: Tensor, packing: Any = None
    ) -> Tensor:
        """See :meth:`Backbone.token_log_probs`."""
        if self._replaced is None:
            return super().token_log_probs(model, tokens, features, positions, labels, packing)
        words = torch.arange(self._inner(model).config.get_text_config().vocab_size)
        every = (
            super()
            .token_log_probs(
                model, tokens, features, positions.repeat_interleave(len(words)), words.repeat(len(positions)), packing
            )
            .view(len(positions), -1)
        )
        best = every.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        return torch.where(self._replaced, best, every.gather(1, labels[:, None])[:, 0])


class ReleasedRule(RDPOModule):
    """Eq. 1 with the log-probs of the authors' released code (github.com/taco-group/Re-Align).

    For the rejected response, and for the chosen one beside the retrieved image, it sums at every position the log-prob
    of the best token that is not the label. Only for comparison.
    """

    backbone: ReleasedBackbone

    def score(
        self,
        batch: PreferenceBatch,
        views: Sequence[ViewName] = ("chosen", "rejected", "visual"),
        with_reference: bool = True,
        rows: Any = None,
    ) -> tuple[LogProbs, LogProbs | None]:
        """See :meth:`RDPOModule.score`."""
        rows = self.make_rows(batch, views) if rows is None else rows
        with self.backbone.released(rows.sums >= len(batch)):
            return super().score(batch, views, with_reference, rows)


def train(
    method: Method,
    backbone: Backbone,
    samples: Sequence[EncodedSample],
    training: Training,
    rate: float,
    seed: int,
    work: Path,
    scoring_batch_size: int = 64,
    gradient_checkpointing: bool = False,
) -> RDPOModule:
    """Train a method.

    Args:
        method: what.
        backbone: from which policy.
        samples: on which pairs.
        training: for how long, and what is the same for all methods.
        rate: learning rate.
        seed: of the adapter's first weights and the order of the pairs.
        work: folder of the reference's log-probs.
        scoring_batch_size: pairs per forward pass of the reference.
        gradient_checkpointing: recompute activations in the backward pass.
    """
    pl.seed_everything(seed, verbose=False)
    module = make_module(method, backbone, training, rate, work, gradient_checkpointing)
    module.configure_model()
    module.to(device_of(training))
    kept = samples[: max(1, round(method.share * len(samples)))]
    trainer = pl.Trainer(
        **training.trainer,
        max_steps=training.steps_of(method),
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work,
    )
    if module.reference_kind == "cached":
        # The Trainer looks for log-probs of the precision that it computes in.
        with trainer.precision_plugin.forward_context():
            module.cache_reference(
                DataLoader(kept, scoring_batch_size, collate_fn=backbone.collate)  # type: ignore[arg-type]
            )
    trainer.fit(module, datamodule=EncodedPairs(kept, backbone, training.batch_size, seed))
    # The Trainer leaves it on the CPU.
    return module.to(device_of(training))


def device_of(training: Training) -> torch.device:
    """Where models are.

    Args:
        training: names the accelerator.
    """
    wanted = training.trainer.get("accelerator", "auto")
    is_gpu = wanted in ("gpu", "cuda") or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if is_gpu else "cpu")


def make_module(
    method: Method,
    backbone: Backbone,
    training: Training,
    rate: float,
    work: Path,
    gradient_checkpointing: bool = False,
) -> RDPOModule:
    """The module that trains a method.

    Args:
        method: which.
        backbone: from which policy.
        training: what is the same for all methods.
        rate: learning rate.
        work: folder of the reference's log-probs.
        gradient_checkpointing: recompute activations in the backward pass.
    """
    loss: PreferenceLoss = SFTLoss(**method.loss) if method.rule == "sft" else RDPOLoss(**method.loss)
    kind: type[RDPOModule] = RDPOModule
    reference: Any = "auto" if method.rule == "sft" else "cached"
    if method.rule == "released":
        if not isinstance(backbone, DigitBackbone):
            raise ValueError(f"Expected a DigitBackbone for `rule: released`, got {type(backbone).__name__}.")
        kind, reference = ReleasedRule, "adapter_off"
        backbone = ReleasedBackbone(str(backbone.path))
    return kind(
        backbone,
        loss,
        LoRA(r=training.rank, alpha=2 * training.rank, dropout=0.0),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
        reference=reference,
        gradient_checkpointing=gradient_checkpointing,
        reference_cache=str(work / "reference"),
    )


class Exam:
    """A benchmark whose questions are encoded once, for all policies that are asked.

    Args:
        benchmark: asks.
        backbone: of the policies.
        batch_size: questions per call of the model's ``generate``.
        keep: keep encoded questions in memory; for small images.
    """

    def __init__(self, benchmark: Benchmark, backbone: Backbone, batch_size: int, keep: bool) -> None:
        self.benchmark = benchmark
        self.backbone = backbone
        self._questions = benchmark.questions()
        # Questions of one length in one batch: less padding.
        self._order = sorted(range(len(self._questions)), key=lambda row: len(str(self._questions[row].prompt)))
        self._parts = _parts(self._order, batch_size)
        self._kept = [self._encode(rows) for rows in self._parts] if keep else None

    def _encode(self, rows: Sequence[int]) -> dict[str, Tensor]:
        asked = [self._questions[row] for row in rows]
        images = [[] if question.image is None else [load_image(question.image)] for question in asked]
        return self.backbone.encode_prompts([question.prompt for question in asked], images)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """What the benchmark says of a model's greedy answers.

        Args:
            model: in eval mode.
        """
        length = self.benchmark.max_new_tokens
        batches = map(self._encode, self._parts) if self._kept is None else self._kept
        told = [text for batch in batches for text in self.backbone.generate(model, batch, max_new_tokens=length)]
        answers = dict(zip(self._order, told, strict=True))
        return self.benchmark.score([answers[row] for row in range(len(told))])


def measure(
    module: RDPOModule, exams: Sequence[Exam], margins: Sequence[EncodedSample], scoring_batch_size: int = 64
) -> dict[str, float]:
    """All scores of a policy, as it now is.

    Args:
        module: trained, or not.
        exams: what is asked.
        margins: pairs about images that nothing was trained on.
        scoring_batch_size: of these per forward pass.
    """
    policy: Any = module.policy.eval()
    scores: dict[str, float] = {}
    with torch.inference_mode():
        # Half the layers to run; in 16 bit the sums would be rounded.
        merges = all(parameter.dtype == torch.float32 for parameter in policy.parameters())
        if merges:
            policy.merge_adapter()
        for exam in exams:
            scores |= exam.scores(policy)
        if margins:
            scores[MARGIN] = _margin(module, margins, scoring_batch_size)
        if merges:
            policy.unmerge_adapter()
    return scores


def _parts(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _margin(module: RDPOModule, samples: Sequence[EncodedSample], batch_size: int) -> float:
    total = 0.0
    for part in _parts(samples, batch_size):
        batch = module.transfer_batch_to_device(module.backbone.collate(list(part)), module.device, 0)
        # Not the module's score, which reads what its method compares: words or tokens of its own.
        found = score(module.backbone, module.policy, batch, ("chosen", "visual"))
        assert found.visual is not None  # noqa: S101 - it was asked for
        total += float((found.chosen - found.visual).sum())
    return total / len(samples)
