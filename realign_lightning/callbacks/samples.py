"""Answers while training, beside their images, in whatever logger there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image

from realign_lightning.callbacks.pictures import Row, draw_rows
from realign_lightning.types import PreferenceSample


class SampleAnswers(pl.Callback):
    """Shows what the policy answers to a few validation samples, before training and after every validation.

    Each picture holds the sample's image, its prompt, the chosen and the rejected response and the policy's own answer.
    It goes to every logger that takes pictures: TensorBoard, and any logger with ``log_image`` (Weights & Biases,
    MLflow). Without one it is written to ``<log folder>/answers``.

    Args:
        count: how many samples to show, the first ones of the validation data.
        max_new_tokens: longest answer.

    Raises:
        ValueError: for a count below 1.
    """

    def __init__(self, count: int = 4, max_new_tokens: int = 128) -> None:
        if count < 1:
            raise ValueError(f"Expected `count` to be at least 1, got {count}.")
        self.count = count
        self.max_new_tokens = max_new_tokens
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the log folder; ranks agree on it by talking to each other, so all of them must ask here."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the answers before the first step."""
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the answers after a validation during training."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the answers of the trained policy."""
        self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, pl_module: Any) -> None:
        samples = self._samples(trainer) if trainer.is_global_zero or shares_one_model(trainer) else []
        if not samples:
            return
        answers = pl_module.generate(
            [sample.prompt for sample in samples],
            [sample.image for sample in samples],
            max_new_tokens=self.max_new_tokens,
        )
        if trainer.is_global_zero:
            picture = draw_rows([_row(sample, answer) for sample, answer in zip(samples, answers, strict=True)])
            log_picture(trainer, "answers", picture, self._folder)

    def _samples(self, trainer: pl.Trainer) -> list[PreferenceSample]:
        """The first usable samples of the first loader whose dataset can name them."""
        loaders = trainer.val_dataloaders or trainer.train_dataloader
        for loader in loaders if isinstance(loaders, Sequence) else [loaders]:
            dataset = getattr(loader, "dataset", None)
            if dataset is not None and hasattr(dataset, "first"):
                shown: list[PreferenceSample] = dataset.first(self.count)
                return shown
        return []


def shares_one_model(trainer: pl.Trainer) -> bool:
    """Whether ranks hold shards of one model, so that all of them have to take part when it answers.

    Args:
        trainer: whose strategy to look at.
    """
    return isinstance(trainer.strategy, ModelParallelStrategy)


def _row(sample: PreferenceSample, answer: str) -> Row:
    prompt = sample.prompt if isinstance(sample.prompt, str) else str(sample.prompt[-1]["content"])
    texts = [("prompt", prompt), ("chosen", sample.chosen), ("rejected", sample.rejected), ("answer", answer)]
    return Row([(sample.key, sample.image)], texts)


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image, folder: Path) -> Path | None:
    """Hand a picture to every logger that takes one, or write it to the log folder.

    Args:
        trainer: whose loggers and step to use.
        name: tag in the logger, or name of a folder in ``folder``.
        picture: RGB.
        folder: log folder. Not read from the trainer: its ``log_dir`` may only be asked for on all ranks at once.

    Returns:
        The file that was written, or None when a logger took the picture.
    """
    taken = False
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
            taken = True
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=trainer.global_step)
            taken = True
    if taken:
        return None
    path = folder / name / f"step={trainer.global_step}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path
