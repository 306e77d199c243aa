import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from realign_lightning.data import DualPreferenceDataModule, ShardError, ShardWriter, SkipLog
from realign_lightning.types import SkippedSample
from tests.conftest import alone
from tests.data.helpers import Recorder, WordBackbone, raw_members, sample, write_shards, write_tar

KEYS = [f"{number:06d}" for number in range(7)]


def module(train, **options) -> DualPreferenceDataModule:
    options = {"batch_size": 2, **options}
    return DualPreferenceDataModule(WordBackbone(), train if isinstance(train, list) else str(train), **options)


def trainer(tmp_path: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **{**quiet, **defaults, **options})


def bad_shard(path: Path, count: int, bad: dict[int, dict[str, bytes | None]]) -> Path:
    return write_tar(path, [raw_members(number, bad.get(number, {})) for number in range(count)])


def rows(recorder: Recorder, stage: str, epoch: int = 0) -> list[tuple[str, float]]:
    return [(key, weight) for name, number, key, weight in recorder.seen if (name, number) == (stage, epoch)]


class TestWithTrainer:
    def test_every_sample_once_per_epoch_in_a_new_order(self, tmp_path):
        recorder = Recorder()
        data = module(write_shards(tmp_path / "train", 7), val=str(write_shards(tmp_path / "val", 3)))
        trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(recorder, datamodule=data)
        first, second = rows(recorder, "train"), rows(recorder, "train", 1)
        assert sorted(first) == sorted(second) == [(key, 1.0) for key in KEYS]
        assert first != second
        assert rows(recorder, "val") == rows(recorder, "val", 1) == [(key, 1.0) for key in KEYS[:3]]

    def test_workers_change_nothing(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        seen = []
        for workers in (0, 2):
            recorder = Recorder()
            data = module(folder, num_workers=workers, seed=3)
            trainer(tmp_path, max_epochs=2).fit(recorder, datamodule=data)
            seen.append(recorder.seen)
        assert seen[0] == seen[1]

    def test_reading_leaves_the_global_random_state_alone(self, tmp_path):
        data = module(write_shards(tmp_path / "train", 7))
        data.setup("fit")
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        assert len(list(data.train_dataloader())) == 4
        assert torch.rand(3).equal(expected)

    def test_resumed_at_an_epochs_end(self, tmp_path):
        folder = write_shards(tmp_path / "train", 7)
        whole = Recorder()
        trainer(tmp_path, max_epochs=3).fit(whole, datamodule=module(folder))
        first = trainer(tmp_path, max_epochs=1)
        first.fit(Recorder(), datamodule=module(folder))
        first.save_checkpoint(tmp_path / "stopped.ckpt")
        rest = Recorder()
        trainer(tmp_path, max_epochs=3).fit(rest, datamodule=module(folder), ckpt_path=tmp_path / "stopped.ckpt")
        assert rest.seen == [row for row in whole.seen if row[1] > 0]

    def test_no_validation(self, tmp_path):
        recorder = Recorder()
        trainer(tmp_path).fit(recorder, datamodule=module(write_shards(tmp_path / "train", 3)))
        assert {row[0] for row in recorder.seen} == {"train"}

    def test_validate_alone_reads_no_training_shards(self, tmp_path):
        data = module(tmp_path / "nowhere", val=str(write_shards(tmp_path / "val", 3)), eval_batch_size=3)
        recorder = Recorder()
        trainer(tmp_path).validate(recorder, datamodule=data, verbose=False)
        assert [key for key, _ in rows(recorder, "val")] == KEYS[:3]

    def test_overfitting_reads_the_same_samples(self, tmp_path):
        recorder = Recorder()
        data = module(write_shards(tmp_path / "train", 7))
        trainer(tmp_path, overfit_batches=1, max_epochs=2).fit(recorder, datamodule=data)
        assert rows(recorder, "train") == rows(recorder, "train", 1)

    def test_prepare_data_may_build_the_shards(self, tmp_path):
        class Building(DualPreferenceDataModule):
            def prepare_data(self):
                write_shards(Path(self.train_source), 3)

        recorder = Recorder()
        data = Building(WordBackbone(), str(tmp_path / "built"))
        trainer(tmp_path).fit(recorder, datamodule=data)
        assert len(rows(recorder, "train")) == 3


class TestGroupByLength:
    def folder(self, tmp_path: Path) -> Path:
        """24 samples; sample i answers in i + 2 words of 4 letters, and the shards hold them mixed."""
        texts = {number: " ".join(["word"] * (number + 2)) for number in range(24)}
        with ShardWriter(tmp_path / "train") as writer:
            for number in sorted(texts, key=lambda number: number * 7 % 24):
                writer.write(sample(number, prompt="What?", chosen=texts[number], rejected="No."))
        return tmp_path / "train"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_of_neighbours_in_a_new_order_every_epoch(self, tmp_path, workers):
        """12 batches are sorted as one chunk."""
        recorder = Recorder()
        data = module(self.folder(tmp_path), group_by_length=True, num_workers=workers)
        trainer(tmp_path, max_epochs=2).fit(recorder, datamodule=data)
        first, second = rows(recorder, "train"), rows(recorder, "train", 1)
        assert sorted(first) == sorted(second) == [(f"{number:06d}", 1.0) for number in range(24)]
        assert first != second
        for epoch in (first, second):
            numbers = [int(key) for key, _ in epoch]
            assert numbers[:2] == [22, 23], "the longest come first"
            assert all(two == one + 1 for one, two in zip(numbers[::2], numbers[1::2], strict=True))

    def test_validation_keeps_its_order(self, tmp_path):
        recorder = Recorder()
        folder = self.folder(tmp_path)
        data = module(folder, val=str(folder), group_by_length=True)
        trainer(tmp_path, num_sanity_val_steps=0).fit(recorder, datamodule=data)
        assert [int(key) for key, _ in rows(recorder, "val")] == sorted(range(24), key=lambda number: number * 7 % 24)

    def test_resumed_at_an_epochs_end(self, tmp_path):
        folder, whole, rest = self.folder(tmp_path), Recorder(), Recorder()
        trainer(tmp_path, max_epochs=3).fit(whole, datamodule=module(folder, group_by_length=True))
        first = trainer(tmp_path, max_epochs=1)
        first.fit(Recorder(), datamodule=module(folder, group_by_length=True))
        first.save_checkpoint(tmp_path / "a.ckpt")
        data = module(folder, group_by_length=True)
        trainer(tmp_path, max_epochs=3).fit(rest, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
        assert rest.seen == [row for row in whole.seen if row[1] > 0]

    def test_a_bad_sample_is_still_skipped_by_name(self, tmp_path):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": b"garbage"}})
        data, recorder = module(tmp_path / "a.tar", group_by_length=True), Recorder()
        trainer(tmp_path).fit(recorder, datamodule=data)
        assert [skip.key for skip in data.skipped["train"]] == ["000002"]
        assert sorted(key for key, weight in rows(recorder, "train") if weight) == [k for k in KEYS if k != "000002"]

    def test_needs_shuffling(self):
        with pytest.raises(ValueError, match="shuffle=False"):
            module("shards", group_by_length=True, shuffle=False)


class TestRanks:
    def test_lightning_leaves_the_sampler_in_place(self, tmp_path):
        """Lightning puts its own sampler, which repeats samples, wherever none is a DistributedSampler."""
        data = module(write_shards(tmp_path / "train", 3))
        data.setup("fit")
        requires_sampler = trainer(tmp_path, devices=2, strategy="ddp")._data_connector._requires_distributed_sampler
        ours = data.train_dataloader()
        assert not requires_sampler(ours)
        assert requires_sampler(DataLoader(ours.dataset))

    def test_two_processes(self, tmp_path):
        """Seven samples, one bad: each is read once per epoch over both ranks, which take equally many steps."""
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": b"garbage"}})
        command = [sys.executable, "-m", "tests.data.two_processes", str(tmp_path)]
        subprocess.run(command, check=True, timeout=240, env=alone(), cwd=Path(__file__).parents[2])  # noqa: S603
        ranks = [[line.split() for line in (tmp_path / f"{rank}.txt").read_text().splitlines()] for rank in (0, 1)]
        assert len(ranks[0]) == len(ranks[1]) == 16  # 2 epochs of train and val, each 4 rows per rank
        for stage in ("train", "val"):
            for epoch in ("0", "1"):
                counted = [
                    key
                    for rank in ranks
                    for name, number, key, weight in rank
                    if (name, number) == (stage, epoch) and weight == "1.0"
                ]
                assert sorted(counted) == [key for key in KEYS if key != "000002"]


class TestSkips:
    def test_named_once_and_counted(self, tmp_path, caplog):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": b"garbage"}})
        data, recorder = module(tmp_path / "a.tar"), Recorder()
        with caplog.at_level(logging.WARNING, logger="realign_lightning"):
            trainer(tmp_path, max_epochs=3).fit(recorder, datamodule=data)
        lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        assert len(lines) == 1
        assert lines[0].startswith("sample skipped: a.tar: 000002 (image.png: not a readable")
        assert [skip.key for skip in data.skipped["train"]] == ["000002"]
        assert sorted(key for key, weight in rows(recorder, "train", 2) if weight) == [k for k in KEYS if k != "000002"]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_too_many_stop_the_run(self, tmp_path, workers):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": b"garbage"}, 4: {"json": b"{}"}})
        with pytest.raises(RuntimeError, match=r"2 of 7 samples are bad.*max_bad_fraction=0\.01") as error:
            trainer(tmp_path).fit(Recorder(), datamodule=module(tmp_path / "a.tar", num_workers=workers))
        assert "a.tar: 000002 (image.png" in str(error.value)
        assert "a.tar: 000004 (the JSON" in str(error.value)

    def test_a_larger_share_is_let_pass_in_every_epoch(self, tmp_path):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": b"garbage"}, 4: {"json": b"{}"}})
        data = module(tmp_path / "a.tar", max_bad_fraction=0.3)
        trainer(tmp_path, max_epochs=4).fit(Recorder(), datamodule=data)
        assert len(data.skipped["train"]) == 2

    def test_in_validation(self, tmp_path):
        bad_shard(tmp_path / "a.tar", 3, {0: {"json": b"{}"}, 1: {"json": b"{}"}})
        data = module(write_shards(tmp_path / "train", 3), val=str(tmp_path / "a.tar"))
        fit = trainer(tmp_path, num_sanity_val_steps=0)
        with pytest.raises(RuntimeError, match="2 of 3 samples are bad"):
            fit.fit(Recorder(), datamodule=data)

    def test_missing_members_count_before_training(self, tmp_path):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": None}, 4: {"json": None}})
        with pytest.raises(RuntimeError, match=r"2 of 7 samples are bad.*000002 \(missing member image\)"):
            module(tmp_path / "a.tar").setup("fit")

    def test_missing_and_broken_add_up(self, tmp_path):
        bad_shard(tmp_path / "a.tar", 7, {2: {"image.png": None}, 4: {"json": b""}})
        with pytest.raises(RuntimeError, match="2 of 7 samples are bad"):
            trainer(tmp_path).fit(Recorder(), datamodule=module(tmp_path / "a.tar"))

    def test_missing_shards_stop_before_training(self, tmp_path):
        with pytest.raises(ShardError, match="matches no file"):
            trainer(tmp_path).fit(Recorder(), datamodule=module(f"{tmp_path}/*.tar"))


class _TwoRanks:
    """A trainer's view of rank 0 of two, whose peer has always met as many bad samples."""

    world_size, global_rank, training, root_device = 2, 0, True, torch.device("cpu")
    current_epoch, global_step, sanity_checking = 0, 0, False
    accumulate_grad_batches, log_dir, num_training_batches = 1, None, float("inf")
    fit_loop = SimpleNamespace(run=None)

    def __init__(self, folder: Path):
        self.default_root_dir = str(folder)
        self.strategy = self
        self.sums = 0

    def reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        self.sums += 1
        return 2 * value


class TestSkipsOverRanks:
    @pytest.mark.parametrize(("fraction", "stops"), [(0.5, False), (0.49, True)])
    def test_ranks_are_added_up_at_the_end_of_a_pass(self, tmp_path, fraction, stops):
        """Rank 0 reads samples 0, 2, 4, 6 of 8, of which 2 and 6 are bad: with its peer's two these are half of all."""
        bad_shard(tmp_path / "a.tar", 8, {2: {"json": b""}, 6: {"json": b""}})
        data = module(tmp_path / "a.tar", batch_size=1, shuffle=False, max_bad_fraction=fraction)
        data.trainer = _TwoRanks(tmp_path)
        data.setup("fit")
        first, *batches, last = data.train_dataloader()
        for batch in (first, *batches):
            data.on_before_batch_transfer(batch, 0)
        assert data.trainer.sums == 3
        if stops:
            with pytest.raises(RuntimeError, match="4 of 8 samples are bad"):
                data.on_before_batch_transfer(last, 0)
        else:
            data.on_before_batch_transfer(last, 0)
            assert data.trainer.sums == 4

    @pytest.mark.parametrize(
        ("fraction", "limit", "expected"),
        [(0.5, float("inf"), [1, 2, 3, 6, 8]), (0.5, 7, [1, 2, 3, 6, 7]), (0.0, 8, [1, 2, 3, 4, 5, 6, 7, 8])],
    )
    def test_when_ranks_are_added_up(self, tmp_path, monkeypatch, fraction, limit, expected):
        """After the first three batches and each third, at the end of a pass that may be limited; always for none."""
        monkeypatch.setattr("realign_lightning.data.datamodule._CHECK_EVERY", 3)
        data = module(write_shards(tmp_path / "train", 16), batch_size=1, max_bad_fraction=fraction)
        data.trainer = _TwoRanks(tmp_path)
        data.trainer.num_training_batches = limit
        data.setup("fit")
        added = []
        for number, batch in enumerate([*data.train_dataloader()][: int(min(limit, 8))], 1):
            before = data.trainer.sums
            data.on_before_batch_transfer(batch, 0)
            added += [number] * (data.trainer.sums - before)
        assert added == expected

    def test_a_pass_that_ends_early_is_checked_and_forgotten_when_the_next_begins(self, tmp_path):
        """Only half of each epoch is read: 1 bad sample of rank 0 and 1 of its peer, per epoch, never 4 together."""
        bad_shard(tmp_path / "a.tar", 8, {2: {"json": b""}, 6: {"json": b""}})
        data = module(tmp_path / "a.tar", batch_size=1, shuffle=False, max_bad_fraction=0.25)
        data.trainer = _TwoRanks(tmp_path)
        data.setup("fit")
        first, second, *_ = data.train_dataloader()
        for epoch in range(4):
            data.trainer.current_epoch = epoch
            for batch in (first, second):
                data.on_before_batch_transfer(batch, 0)
            assert data.trainer.sums == 3 * epoch + 2


class TestSkipLog:
    @pytest.mark.parametrize(
        ("total", "fraction", "allowed"),
        [(10, 0.0, 0), (10, 0.01, 1), (100, 0.01, 1), (1000, 0.01, 10), (1000, 0.0155, 15), (3, 1.0, 3)],
    )
    def test_what_is_allowed(self, total, fraction, allowed):
        """0 allows none; otherwise one, or the fraction of all if that is more."""
        skips = SkipLog(total, fraction)
        skips.check(allowed)
        with pytest.raises(RuntimeError, match=f"{allowed + 1} of {total} samples are bad"):
            skips.check(allowed + 1)

    def test_a_sample_counts_once_per_pass(self):
        skips = SkipLog(10, 0.01)
        for _ in range(3):
            skips.add([SkippedSample("a.tar", "1", "why")])
        assert skips.met == 1
        skips.begin_pass()
        assert skips.met == 0
        assert skips.skipped == (SkippedSample("a.tar", "1", "why"),)


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 0},
            {"eval_batch_size": 0},
            {"num_workers": -1},
            {"seed": -1},
            {"max_bad_fraction": 1.5},
            {"max_bad_fraction": float("nan")},
        ],
    )
    def test_out_of_range(self, options):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name} must be"):
            module("shards", **options)

    def test_loader_before_setup(self):
        with pytest.raises(RuntimeError, match=r"call setup\(\)"):
            module("shards").train_dataloader()

    def test_hyperparameters_are_plain(self, tmp_path):
        data = DualPreferenceDataModule(WordBackbone(), [tmp_path / "a", "b"], val=tmp_path)
        assert dict(data.hparams) == {
            "train": [str(tmp_path / "a"), "b"],
            "val": str(tmp_path),
            "batch_size": 1,
            "eval_batch_size": None,
            "num_workers": 0,
            "shuffle": True,
            "seed": 0,
            "max_bad_fraction": 0.01,
            "pin_memory": None,
            "group_by_length": False,
            "global_batch_size": None,
            "block_shards": None,
            "cache_dir": None,
            "cache_size_gb": 50.0,
        }

    def test_checkpoint_holds_plain_values(self, tmp_path):
        fit = trainer(tmp_path)
        fit.fit(Recorder(), datamodule=module(write_shards(tmp_path / "train", 3)))
        fit.save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert checkpoint["datamodule_hyper_parameters"]["batch_size"] == 2

    @pytest.mark.parametrize("train", ["shards", ["a.tar", "b.tar"]])
    def test_from_the_command_line(self, train):
        block = {"backbone": {"class_path": "tests.data.helpers.WordBackbone"}, "train": train, "seed": 5}
        cli = LightningCLI(
            Recorder,
            DualPreferenceDataModule,
            args={"data": block},
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
        )
        assert isinstance(cli.datamodule.backbone, WordBackbone)
        assert (cli.datamodule.train_source, cli.datamodule.seed) == (train, 5)
        assert "backbone" not in cli.datamodule.hparams
