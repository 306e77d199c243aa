"""Runs of random shape, stopped at random places: optimizer step by optimizer step, they read what they would have."""

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from realign_lightning.checkpoints.resuming import ResumePoint
from tests.data.helpers import write_shards
from tests.data.test_datamodule import module, trainer
from tests.data.test_resume import Asking, Stop

HOOKS = ("on_train_batch_end", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")


class Steps(Asking):
    """Keeps what every optimizer step was made of: epoch, keys and weights."""

    def __init__(self):
        super().__init__()
        self.steps, self.waiting = [], []

    def training_step(self, batch, batch_idx):
        self.waiting += zip(batch.keys, batch.weights.tolist(), strict=True)
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.steps.append((self.current_epoch, tuple(self.waiting)))
        self.waiting = []


class WithResumePoint(Steps):
    """As our own module: checkpoints in the middle of an accumulation say that they were made before it."""

    def __init__(self):
        super().__init__()
        self.point = ResumePoint()

    def setup(self, stage):
        self.point.forget()

    def on_save_checkpoint(self, checkpoint):
        self.point.on_save_checkpoint(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint):
        self.point.on_load_checkpoint(self.trainer, checkpoint)

    def on_train_start(self):
        self.point.on_train_start(self.trainer)

    def on_train_batch_start(self, batch, batch_idx):
        self.point.on_train_batch_start(self.trainer)


class Shape:
    """Settings of a run, drawn at random."""

    def __init__(self, folder: Path, chance: random.Random):
        samples, batch_size = chance.randint(3, 17), chance.randint(1, 3)
        batches = -(-samples // batch_size)
        self.folder, self.chance, self.batches = folder, chance, batches
        self.data = {"batch_size": batch_size, "seed": chance.randint(0, 3)}
        if chance.random() < 0.3:
            self.data["block_shards"] = chance.randint(1, 3)
        self.shards = write_shards(folder / "train", samples, samples_per_shard=4)
        self.module = chance.choice([Steps, WithResumePoint])
        self.options = {"num_sanity_val_steps": 0, "max_epochs": chance.choice([2, 3, 4])}
        if chance.random() < 0.5:
            self.options["max_steps"] = chance.randint(2, 3 * batches)
            if chance.random() < 0.5:
                self.options["max_epochs"] = -1
        limit = chance.randint(1, batches) if chance.random() < 0.3 else batches
        self.options["limit_train_batches"] = limit
        if chance.random() < 0.5:
            self.data["val"] = str(write_shards(folder / "val", 3))
            self.options["val_check_interval"] = chance.randint(1, limit)
            if chance.random() < 0.4:
                self.options |= {"check_val_every_n_epoch": None, "val_check_interval": chance.randint(1, 2 * batches)}
        self.schedule = {0: chance.randint(1, 4), 1: chance.randint(1, 3)} if chance.random() < 0.25 else None
        if self.schedule is None:
            self.options["accumulate_grad_batches"] = chance.choice([1, 1, 2, 3, 4])

    def fit(self, *callbacks, resume: Path | None = None) -> list[tuple]:
        schedule = [] if self.schedule is None else [GradientAccumulationScheduler(self.schedule)]
        recorder = self.module()
        fit = trainer(self.folder, callbacks=[*schedule, *callbacks], **self.options)
        read = {"ckpt_path": resume, "weights_only": None if resume is None else True}
        fit.fit(recorder, datamodule=module(self.shards, **self.data), **read)
        return recorder.steps

    def fit_in_parts(self, parts: int) -> tuple[list[tuple], int]:
        """The same in several lives, and in how many: a place that is never reached ends none."""
        steps, resume = [], None
        for part in range(parts):
            path = self.folder / f"{part}.ckpt"
            hook = self.chance.choice(HOOKS if "val" in self.data else HOOKS[:1])
            last = self.batches if part == 0 else 3 * self.batches
            stop = Stop(path, self.chance.randint(1, last), hook)
            found = self.fit(stop, resume=resume)
            if not path.exists():
                return steps + found, part
            done = torch.load(path, weights_only=True)["global_step"]
            steps += found[: done - len(steps)]
            resume = path
        return steps + self.fit(resume=resume), parts

    def __str__(self) -> str:
        return f"{self.module.__name__} {self.data} {self.options} {self.schedule}"


@pytest.mark.parametrize("group", range(6))
def test_any_run_stopped_anywhere(tmp_path, group):
    stopped = 0
    for number in range(12):
        shape = Shape(tmp_path / str(number), random.Random(100 * group + number))
        whole = shape.fit()
        found, stops = shape.fit_in_parts(shape.chance.choice([1, 2, 3]))
        assert found == whole, shape
        stopped += stops
    assert stopped > 6
