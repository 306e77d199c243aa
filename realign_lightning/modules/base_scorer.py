"""Log-probs under the model that training starts from, for the cache of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import nn

from realign_lightning.backbones.base import Backbone
from realign_lightning.scoring import SharePrefix, make_rows, score
from realign_lightning.types import VIEWS, LogProbs, PreferenceBatch, VisualWords


@dataclass(frozen=True)
class Surroundings:
    """In what a batch is scored: a Trainer's precision and strategy, or the caller's own.

    Args:
        device: of the model.
        precision: context of every forward pass.
        move: brings a batch to the device, in the dtype that the model takes.
        convert: gives a model the dtype that the Trainer computes in.
    """

    device: torch.device
    precision: Callable[[], AbstractContextManager[None]]
    move: Callable[[PreferenceBatch], PreferenceBatch]
    convert: Callable[[nn.Module], nn.Module]

    @classmethod
    def of_trainer(cls, trainer: pl.Trainer) -> Surroundings:
        """Those of a Trainer that is running, as its loops set them up.

        Args:
            trainer: whose strategy has been set up.
        """
        plugin, strategy = trainer.precision_plugin, trainer.strategy

        def move(batch: PreferenceBatch) -> PreferenceBatch:
            # Without `on_before_batch_transfer`, where data modules count what they read.
            moved: PreferenceBatch = strategy.batch_to_device(plugin.convert_input(batch), dataloader_idx=0)
            return moved

        return cls(strategy.root_device, plugin.forward_context, move, plugin.convert_module)

    @classmethod
    def of_caller(cls, device: torch.device, dtype: torch.dtype) -> Surroundings:
        """No more than a device: the caller may be inside autocast.

        Args:
            device: of the model.
            dtype: of its weights.
        """
        return cls(device, nullcontext, lambda batch: batch.to(device), lambda model: model.to(dtype))

    def describe(self, dtype: torch.dtype) -> str:
        """What is computed in, as a text.

        Args:
            dtype: of the model's weights.
        """
        name = str(dtype).removeprefix("torch.")
        with self.precision():
            if torch.is_autocast_enabled(self.device.type):
                name = f"{name} under autocast to {torch.get_autocast_dtype(self.device.type)}".replace("torch.", "")
        # TF32 on GPUs, bfloat16 on CPUs: float32 in name only.
        matmul = torch.get_float32_matmul_precision()
        return name if matmul == "highest" else f"{name}, float32 products of {matmul} precision"


@dataclass(frozen=True)
class BaseScorer:
    """Scores batches under a model that is made when first needed.

    Args:
        backbone: the model's family.
        surroundings: in what to score.
        share_prefix: see :data:`~realign_lightning.scoring.SharePrefix`.
        visual_words: see :func:`~realign_lightning.scoring.make_rows`.
        make: lends the model.
    """

    backbone: Backbone
    surroundings: Surroundings
    share_prefix: SharePrefix
    visual_words: VisualWords
    make: Callable[[], AbstractContextManager[nn.Module]]

    @contextmanager
    def open(self) -> Iterator[Callable[[PreferenceBatch], LogProbs]]:
        """A function from batches to the log-probs of all views; behind the block nothing of its model is left."""
        models: list[nn.Module] = []
        with ExitStack() as stack:

            def run(batch: PreferenceBatch) -> LogProbs:
                if not models:
                    models.append(stack.enter_context(self.make()))
                with torch.no_grad(), self.surroundings.precision():
                    return self._score(models[0], self.surroundings.move(batch))

            yield run
        if models:
            models.clear()
            # Modules refer to each other in circles.
            gc.collect()
            if self.surroundings.device.type == "cuda":
                torch.cuda.empty_cache()

    def _score(self, model: nn.Module, batch: PreferenceBatch) -> LogProbs:
        rows = make_rows(self.backbone, model, batch, VIEWS, self.share_prefix, self.visual_words)
        return score(self.backbone, model, batch, VIEWS, rows=rows)
