"""Interrupted in the middle of an epoch and gone on with, a run reads what it would have read."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from realign_lightning.data import CroppedNegative, DualPreferenceDataModule, SampleTransform
from realign_lightning.data.transform import sample_random
from tests.conftest import alone
from tests.data.helpers import Recorder, WordBackbone, picture, raw_members, sample, write_shards, write_tar
from tests.data.test_datamodule import module, trainer


class Stop(Callback):
    """Saves a checkpoint in one of the hooks, after so many batches, and stops."""

    def __init__(self, path: Path, after: int, hook: str = "on_train_batch_end"):
        self.path, self.after, self.hook = path, after, hook

    def _save(self, trainer, hook):
        if hook == self.hook and trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "on_train_epoch_end")


class Asking(Recorder):
    """Asks for the number of steps when its optimizer is made, as schedules do: then there is a loader already."""

    def configure_optimizers(self):
        if self.trainer.max_epochs is not None:
            assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def run(
    tmp_path, data: DualPreferenceDataModule, *callbacks, resume: Path | None = None, epochs: int | None = 3, **options
):
    recorder = Asking()
    fit = trainer(tmp_path, max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    fit.fit(recorder, datamodule=data, ckpt_path=resume)
    return [row for row in recorder.seen if row[0] == "train"]


class TestMidEpoch:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("after", [1, 3, 4, 5, 6, 11, 12])
    def test_goes_on_with_the_very_next_batch(self, tmp_path, workers, after):
        """4 batches an epoch, 3 epochs; 4 and 12 are an epoch's last batch, whose end the checkpoint does not know."""
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder, num_workers=workers))
        first = run(tmp_path, module(folder, num_workers=workers), Stop(tmp_path / "a.ckpt", after))
        rest = run(tmp_path, module(folder, num_workers=workers), resume=tmp_path / "a.ckpt")
        # The last batch of an epoch holds one sample.
        assert len(first) == 7 * (after // 4) + 2 * (after % 4)
        assert first + rest == whole

    @pytest.mark.parametrize("after", [2, 4, 8])
    def test_saved_after_a_validation(self, tmp_path, after):
        folder, val = write_shards(tmp_path / "train", 7), str(write_shards(tmp_path / "val", 3))
        whole = run(tmp_path, module(folder, val=val), val_check_interval=2)
        stop = Stop(tmp_path / "a.ckpt", after, "on_validation_end")
        first = run(tmp_path, module(folder, val=val), stop, val_check_interval=2)
        rest = run(tmp_path, module(folder, val=val), resume=tmp_path / "a.ckpt", val_check_interval=2)
        assert first + rest == whole

    def test_saved_at_an_epochs_end(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder))
        first = run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 8, "on_train_epoch_end"))
        rest = run(tmp_path, module(folder), resume=tmp_path / "a.ckpt")
        assert first + rest == whole

    @pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
    @pytest.mark.parametrize("after", [4, 8])
    def test_with_a_limit_of_steps(self, tmp_path, hook, after):
        """Lightning counts an epoch too many after such a resume."""
        folder = write_shards(tmp_path / "train", 7)
        limits = {"epochs": None, "max_steps": 14}
        whole = run(tmp_path, module(folder), **limits)
        first = run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", after, hook), **limits)
        second = run(tmp_path, module(folder), Stop(tmp_path / "b.ckpt", 10), resume=tmp_path / "a.ckpt", **limits)
        third = run(tmp_path, module(folder), resume=tmp_path / "b.ckpt", **limits)

        def keys(rows):
            return [key for _, _, key, _ in rows]

        assert keys(first) + keys(second) + keys(third) == keys(whole)

    def test_stopped_in_the_middle_and_saved_at_the_epochs_end(self, tmp_path):
        """The Trainer calls it an epoch's end when it stops early; the rest of the samples is still to come."""

        class StopEarly(Stop):
            def on_train_batch_end(self, trainer, *_):
                trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.after

        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder))
        first = run(tmp_path, module(folder), StopEarly(tmp_path / "a.ckpt", 6, "on_train_epoch_end"))
        rest = run(tmp_path, module(folder), resume=tmp_path / "a.ckpt")
        assert len(first) == 11
        assert first + rest == whole

    def test_interrupted_twice(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder))
        first = run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 2))
        second = run(tmp_path, module(folder), Stop(tmp_path / "b.ckpt", 7), resume=tmp_path / "a.ckpt")
        third = run(tmp_path, module(folder), resume=tmp_path / "b.ckpt")
        assert first + second + third == whole

    def test_of_a_limited_epoch(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder), limit_train_batches=3)
        first = run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 5), limit_train_batches=3)
        rest = run(tmp_path, module(folder), resume=tmp_path / "a.ckpt", limit_train_batches=3)
        assert first + rest == whole

    def test_grouped_by_length_and_in_blocks(self, tmp_path):
        folder = write_shards(tmp_path / "train", 23, 4)
        for options in ({"group_by_length": True}, {"block_shards": 2}, {"shuffle": False}):
            whole = run(tmp_path, module(folder, **options))
            first = run(tmp_path, module(folder, **options), Stop(tmp_path / "a.ckpt", 17))
            rest = run(tmp_path, module(folder, **options), resume=tmp_path / "a.ckpt")
            assert first + rest == whole

    def test_what_was_accumulated_is_read_again(self, tmp_path):
        """5 batches are 2 steps of 2 and a half one, whose gradients no checkpoint holds."""
        folder = write_shards(tmp_path / "train", 16)
        whole = run(tmp_path, module(folder), accumulate_grad_batches=2, epochs=1)
        run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 5), accumulate_grad_batches=2, epochs=1)
        rest = run(tmp_path, module(folder), resume=tmp_path / "a.ckpt", accumulate_grad_batches=2, epochs=1)
        assert rest == whole[8:]

    def test_other_batches_of_the_same_step(self, tmp_path):
        """Of a step of 4 samples 1 x 4, 2 x 2 or 4 x 1 batches; the Trainer's own counts follow."""
        folder = write_shards(tmp_path / "train", 17)
        whole = run(tmp_path, module(folder, batch_size=4))
        for size, after in {1: 17 + 4, 2: 9 + 4, 4: 5 + 4}.items():
            data = module(folder, batch_size=size, global_batch_size=4)
            first = run(tmp_path, data, Stop(tmp_path / "a.ckpt", after))
            for other in (1, 2, 4):
                data = module(folder, batch_size=other, global_batch_size=4)
                rest = run(tmp_path, data, resume=tmp_path / "a.ckpt")
                assert first + rest == whole


class TestOnce:
    """A place is gone on from in the fit that resumes, and in no other."""

    def test_a_fresh_fit_with_the_same_data_module(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder))
        data = module(folder, val=str(write_shards(tmp_path / "val", 3)))
        run(tmp_path, data, Stop(tmp_path / "a.ckpt", 6))
        run(tmp_path, data, resume=tmp_path / "a.ckpt")
        assert run(tmp_path, data) == whole
        trainer(tmp_path).validate(Asking(), datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert run(tmp_path, data) == whole

    def test_loaders_that_are_made_anew_every_epoch(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = run(tmp_path, module(folder))
        options = {"reload_dataloaders_every_n_epochs": 1}
        first = run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 6), **options)
        assert first + run(tmp_path, module(folder), resume=tmp_path / "a.ckpt", **options) == whole

    def test_a_schedule_of_accumulation(self, tmp_path):
        """From the second epoch on 2 batches are a step."""
        folder = write_shards(tmp_path / "train", 16)
        whole = run(tmp_path, module(folder), GradientAccumulationScheduler({1: 2}))
        callbacks = [GradientAccumulationScheduler({1: 2}), Stop(tmp_path / "a.ckpt", 12)]
        first = run(tmp_path, module(folder), *callbacks)
        rest = run(tmp_path, module(folder), GradientAccumulationScheduler({1: 2}), resume=tmp_path / "a.ckpt")
        assert first + rest == whole

    def test_overfitting_has_no_place(self, tmp_path):
        folder = write_shards(tmp_path / "train", 8)
        run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 3), overfit_batches=2)
        assert "DualPreferenceDataModule" not in torch.load(tmp_path / "a.ckpt", weights_only=True)


class TestRefused:
    def stopped(self, tmp_path, **options) -> Path:
        folder = write_shards(tmp_path / "train", 9)
        run(tmp_path, module(folder, **options), Stop(tmp_path / "a.ckpt", 2))
        return folder

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"batch_size": 1}, r"the global batch was 2 samples, is 1 \(batch_size\) x 1 \(ranks\)"),
            ({"seed": 4}, "seed was 0, is 4"),
            ({"shuffle": False}, "shuffle was True, is False"),
            ({"group_by_length": True}, "group_by_length was False, is True"),
            ({"block_shards": 2}, "block_shards was None, is 2"),
        ],
    )
    def test_other_settings(self, tmp_path, changes, reason):
        folder = self.stopped(tmp_path)
        with pytest.raises(ValueError, match=reason):
            run(tmp_path, module(folder, **changes), resume=tmp_path / "a.ckpt")

    def test_other_samples(self, tmp_path):
        self.stopped(tmp_path)
        other = write_shards(tmp_path / "other", 10)
        with pytest.raises(ValueError, match=r"after 4 samples, .* manifest was '[0-9a-f]{64}', is"):
            run(tmp_path, module(other), resume=tmp_path / "a.ckpt")

    def test_the_same_samples_elsewhere_are_fine(self, tmp_path):
        folder = self.stopped(tmp_path)
        folder.rename(tmp_path / "moved")
        assert len(run(tmp_path, module(tmp_path / "moved"), resume=tmp_path / "a.ckpt")) == 27 - 4

    def test_at_an_epochs_end_anything_may_change(self, tmp_path):
        folder = write_shards(tmp_path / "train", 9)
        run(tmp_path, module(folder), Stop(tmp_path / "a.ckpt", 5, "on_train_epoch_end"))
        other = write_shards(tmp_path / "other", 10)
        assert len(run(tmp_path, module(other, batch_size=5, seed=2), resume=tmp_path / "a.ckpt")) == 20

    def test_samples_in_another_order(self, tmp_path):
        """The same shards, listed the other way round in an index that was edited by hand."""
        self.stopped(tmp_path)
        index = tmp_path / "train" / "index.json"
        told = json.loads(index.read_text())
        for shard in told["shards"]:
            members = shard["members"]
            for column in (members["keys"], *members["offsets"], *members["sizes"]):
                column.reverse()
        index.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"manifest was '\w+', is"):
            run(tmp_path, module(tmp_path / "train"), resume=tmp_path / "a.ckpt")

    def test_tars_without_an_index_are_told_apart(self, tmp_path):
        shard = write_tar(tmp_path / "a.tar", [raw_members(number, {}) for number in range(9)])
        run(tmp_path, module(shard), Stop(tmp_path / "a.ckpt", 2))
        write_tar(shard, [raw_members(number + 1, {}) for number in range(9)])
        with pytest.raises(ValueError, match="manifest was"):
            run(tmp_path, module(shard), resume=tmp_path / "a.ckpt")


class TestBadSamplesOfAnInterruptedEpoch:
    def test_are_still_counted(self, tmp_path):
        """3 of 12 samples are bad, one more than the 20 % that are allowed; the run is interrupted between them."""
        bad = {number: {"json": b""} for number in (1, 2, 9)}
        shard = write_tar(tmp_path / "a.tar", [raw_members(number, bad.get(number, {})) for number in range(12)])
        options = {"shuffle": False, "max_bad_fraction": 0.2}
        run(tmp_path, module(shard, **options), Stop(tmp_path / "a.ckpt", 3))
        with pytest.raises(RuntimeError, match="3 of 12 samples are bad"):
            run(tmp_path, module(shard, **options), resume=tmp_path / "a.ckpt")
        lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
        assert [line.split('"key": ')[1][:8] for line in lines] == ['"000001"', '"000002"', '"000009"']


class TestGlobalBatch:
    def test_sets_accumulation(self, tmp_path):
        data = module(write_shards(tmp_path / "train", 8), global_batch_size=4)
        recorder = Recorder()
        fit = trainer(tmp_path)
        fit.fit(recorder, datamodule=data)
        assert (fit.accumulate_grad_batches, fit.global_step) == (2, 2)

    def test_not_divisible(self, tmp_path):
        data = module(write_shards(tmp_path / "train", 8), global_batch_size=3)
        with pytest.raises(ValueError, match=r"global_batch_size=3 is not divisible by batch_size=2 x 1 ranks = 2"):
            trainer(tmp_path).fit(Recorder(), datamodule=data)

    def test_contradicts_the_trainer(self, tmp_path):
        data = module(write_shards(tmp_path / "train", 8), global_batch_size=4)
        with pytest.raises(ValueError, match="takes accumulate_grad_batches=2, and the Trainer has 3"):
            trainer(tmp_path, accumulate_grad_batches=3).fit(Recorder(), datamodule=data)


class Noted(SampleTransform):
    """Writes a random number into the chosen answer."""

    def __call__(self, sample, random):
        return dataclasses.replace(sample, chosen=f"{sample.chosen} {'a' * int(random.integers(1, 200))}")


class TestTransform:
    def epochs(self, tmp_path, workers: int, batch_size: int, resume: Path | None = None, stop: int = 0):
        class Lengths(Recorder):
            def training_step(self, batch, batch_idx):
                self.seen += zip(batch.keys, batch.chosen.tokens["input_ids"].amax(dim=1).tolist(), strict=True)
                return self.weight * batch.weights.sum()

        recorder = Lengths()
        options = {"num_workers": workers, "batch_size": batch_size, "global_batch_size": 4}
        data = module(tmp_path / "train", transform=Noted(), **options)
        callbacks = [Stop(tmp_path / "a.ckpt", stop)] if stop else []
        fit = trainer(tmp_path, max_epochs=2, callbacks=callbacks)
        fit.fit(recorder, datamodule=data, ckpt_path=resume)
        return recorder.seen

    def test_same_chance_whatever_reads(self, tmp_path):
        write_shards(tmp_path / "train", 8)
        seen = self.epochs(tmp_path, 0, 4)
        assert seen == self.epochs(tmp_path, 2, 2)
        assert dict(seen[:8]) != dict(seen[8:])
        first = self.epochs(tmp_path, 0, 2, stop=6)
        assert first + self.epochs(tmp_path, 0, 2, resume=tmp_path / "a.ckpt") == seen

    def test_cropped_negative(self):
        whole = sample(0, image=picture(3, (200, 100)))
        areas = []
        for number in range(50):
            cropped = CroppedNegative()(whole, sample_random(0, 0, str(number))).retrieved
            areas.append(cropped.width * cropped.height / 20000)
        assert 0.005 < min(areas) < 0.05
        assert 0.15 < max(areas) < 0.21
        with pytest.raises(ValueError, match="0 < least <= most < 1"):
            CroppedNegative(0.5, 0.2)

    def test_nothing_of_it_can_be_cached(self, tmp_path):
        data = module(write_shards(tmp_path / "train", 3), transform=Noted())
        data.setup("fit")
        with pytest.raises(ValueError, match="leave the transform out"):
            data.sample_readers()["train"].fingerprint(0)


def test_state_is_plain_and_empty_outside_of_a_fit(tmp_path):
    data = module(write_shards(tmp_path / "train", 5))
    assert data.state_dict() == {}
    fit = trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2)])
    fit.fit(Recorder(), datamodule=data)
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["DualPreferenceDataModule"]
    assert (saved["epoch"], saved["consumed"], saved["global_batch"], saved["skipped"]) == (0, 4, 2, [])


@pytest.mark.parametrize("shards", [1, 5, 7])
def test_world_sizes_workers_and_shards_change_no_global_batch(tmp_path, shards):
    """35 samples in steps of 12: with 1, 2, 3 and 4 ranks 12, 6, 4 and 3 a batch; the epoch's last step is padded."""
    data_folder = write_shards(tmp_path / "train", 35, -(-35 // shards))
    assert len(list(data_folder.glob("*.tar"))) == shards
    seen = set()
    for ranks, workers in itertools.product((1, 2, 3, 4), (0, 1, 3)):
        loaders = [loader_of(data_folder, rank, ranks, 12 // ranks, workers) for rank in range(ranks)]
        steps = []
        for batches in zip(*loaders, strict=True):
            rows = [row for batch in batches for row in zip(batch.keys, batch.weights.tolist(), strict=True)]
            steps.append(tuple(sorted(key for key, weight in rows if weight)))
        assert sorted(key for step in steps for key in step) == [f"{number:06d}" for number in range(35)]
        seen.add(tuple(steps))
    assert len(seen) == 1
    assert [len(step) for step in seen.pop()] == [12, 12, 11]


def loader_of(folder: Path, rank: int, ranks: int, batch_size: int, workers: int, epoch: int = 2):
    class Rank:
        world_size, global_rank, current_epoch, accumulate_grad_batches = ranks, rank, epoch, 1
        log_dir = default_root_dir = str(folder)
        fit_loop = SimpleNamespace(run=None)

    data = DualPreferenceDataModule(WordBackbone(), str(folder), batch_size=batch_size, num_workers=workers, seed=5)
    data.trainer = Rank()
    data.setup("fit")
    return data.train_dataloader()


def test_from_two_ranks_to_four_and_back(tmp_path):
    """Processes for real: 3 steps of 12 an epoch, 2 epochs; stopped after 2 steps and after 5."""
    folder = write_shards(tmp_path / "train", 35, 5)
    expected = []
    for epoch in (0, 1):
        loader = loader_of(folder, 0, 1, 12, 0, epoch)
        expected += [sorted(key for key, weight in zip(batch.keys, batch.weights, strict=True)) for batch in loader]
    script = [sys.executable, "-m", "tests.data.resumed_ranks", str(folder), str(tmp_path)]
    done = subprocess.run(script, env=alone(), capture_output=True, text=True, timeout=240)  # noqa: S603
    assert done.returncode == 0, done.stderr
    steps = []
    for part, ranks in (("a", 2), ("b", 4), ("c", 2)):
        texts = [(tmp_path / f"{part}-{rank}.txt").read_text() for rank in range(ranks)]
        read = [[line.split() for line in text.split("\n")] for text in texts]
        size = 12 // ranks
        # The last step of an epoch has 35 - 24 samples, and one that fills up.
        lengths = [size, size, -(-11 // ranks)] * 2
        lengths = {"a": lengths[:2], "b": lengths[2:5], "c": lengths[5:]}[part]
        for rank in read:
            assert len(rank) == sum(lengths)
        start = 0
        for length in lengths:
            rows = [row for rank in read for row in rank[start : start + length]]
            steps.append(sorted(key for key, weight in rows if float(weight)))
            start += length
    assert steps == expected
