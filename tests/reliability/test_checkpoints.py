"""Checkpoints through kills between any two steps, full disks, half-written files and accumulated gradients."""

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.callbacks import AdapterExport
from realign_lightning.checkpoints import (
    COMMITTED,
    METADATA,
    CheckpointError,
    DurableCheckpointIO,
    StagedFolder,
    check_committed,
    disk,
    find_committed,
    is_committed,
    newest_checkpoint,
    read_header,
    tidy,
)
from realign_lightning.checkpoints.best import mend_best
from realign_lightning.checkpoints.random_states import derive_random_states, random_states, restore_random_states
from realign_lightning.data import DualPreferenceDataModule
from realign_lightning.modules import FSDP2Strategy, RDPOModule
from tests.reliability.lives import assert_same, final, lines

CPU = torch.device("cpu")


def content(step: int, **more) -> dict:
    return {"global_step": step, "state_dict": {"a": torch.full((1000,), step)}, "lr_schedulers": [], **more}


def save_file(step: int, target: Path) -> None:
    DurableCheckpointIO().save_checkpoint(content(step), target)


def save_folder(step: int, target: Path) -> None:
    """What FSDP2Strategy does, in one process."""
    tidy(target.parent)
    staged = StagedFolder(target)
    (staged.path / "__0_0.distcp").write_bytes(bytes([step]) * 5000)
    (staged.path / ".metadata").write_bytes(b"index")
    torch.save(content(step), staged.path / METADATA)
    staged.commit()


def remove(step: int, target: Path) -> None:
    DurableCheckpointIO().remove_checkpoint(target)


SAVES = {"file": save_file, "folder": save_folder}

STEPS = (
    *((os, name) for name in ("fsync", "rmdir")),
    *((Path, name) for name in ("mkdir", "rename", "replace", "unlink")),
    *((shutil, name) for name in ("rmtree",)),
)
"""What a save is made of, as far as it changes something that others see."""


def die_at(step: int, work: Callable[[], None]) -> bool:
    """Do some work in another process that dies, as of SIGKILL, before its n-th step; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def dying(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for owner, name in STEPS:
            setattr(owner, name, dying(getattr(owner, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize(
    ("before", "after"),
    [("file", "file"), ("folder", "folder"), ("file", "folder"), ("folder", "file"), ("nothing", "folder")],
)
def test_a_kill_between_any_two_steps_of_a_save_loses_nothing(tmp_path, before, after, monkeypatch):
    """What was there is found, or what was written: whole, also under a hidden name; the next save tidies up."""
    monkeypatch.setattr(disk, "_UNTOUCHED_SECONDS", -1.0)
    steps = 0
    died = True
    seen = set()
    while died:
        folder = tmp_path / f"{steps}"
        target = folder / "last.ckpt"
        if before != "nothing":
            SAVES[before](1, target)
        died = die_at(steps, lambda target=target: SAVES[after](2, target))
        found = newest_checkpoint(folder)
        if before == "nothing" and found is None:
            seen.add(0)
        else:
            header = read_header(found)
            seen.add(header["global_step"])
            assert bool((header["state_dict"]["a"] == header["global_step"]).all())
            assert find_committed(target) == found or target.exists()
        SAVES[after](3, folder / "next.ckpt")
        assert {path.name for path in folder.iterdir()} <= {"last.ckpt", "next.ckpt"}, "hidden ones are tidied up"
        assert before == "nothing" or read_header(target)["global_step"] in (1, 2)
        steps += 1
    # Of the fewest, a file over a file: to the disk, renamed, the folder to the disk, and once to the end.
    assert steps > 3
    assert seen == {0 if before == "nothing" else 1, 2}


@pytest.mark.parametrize("kind", SAVES)
def test_a_kill_while_one_is_removed_leaves_nothing_that_looks_like_one(tmp_path, kind):
    died, steps = True, 0
    while died:
        target = tmp_path / f"{steps}" / "old.ckpt"
        SAVES[kind](1, target)
        died = die_at(steps, lambda target=target: remove(1, target))
        if not target.exists() or (target.is_dir() and not is_committed(target)):
            assert newest_checkpoint(target.parent) is None
        else:
            assert read_header(target)["global_step"] == 1
        steps += 1
    assert steps > 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_former_one_and_says_so(tmp_path, monkeypatch, error):
    target = tmp_path / "last.ckpt"
    save_file(1, target)

    def full(descriptor):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written.*Nothing half-written is left.*is unchanged"):
            save_file(2, target)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_header(target)["global_step"] == 1


def test_a_disk_that_fills_up_while_pytorch_writes(tmp_path):
    """The limit on the size of files stops the write for real."""
    target = tmp_path / "last.ckpt"
    save_file(1, target)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            DurableCheckpointIO().save_checkpoint(content(2, more=torch.zeros(100_000)), target)
        except CheckpointError as stop:
            status = 0 if "all earlier checkpoints are intact" in str(stop) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_header(target)["global_step"] == 1


def test_nothing_goes_through_the_folder_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    save_file(1, tmp_path / "a" / "b.ckpt")
    assert read_header(tmp_path / "a" / "b.ckpt")["global_step"] == 1


def test_what_another_process_still_writes_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_UNTOUCHED_SECONDS", -1.0)
    other = StagedFolder(tmp_path / "other.ckpt")
    save_file(1, tmp_path / "last.ckpt")
    assert other.path.exists()
    other.discard()
    assert not other.path.exists()


def test_the_newest_is_the_one_with_most_steps_then_the_youngest(tmp_path):
    assert newest_checkpoint(tmp_path, tmp_path / "missing") is None
    for step, name in [(2, "z.ckpt"), (10, "a.ckpt"), (9, "b.ckpt")]:
        save_file(step, tmp_path / "version_0" / name)
    assert newest_checkpoint(tmp_path).name == "a.ckpt"
    save_folder(10, tmp_path / "version_1" / "c.ckpt")
    os.utime(tmp_path / "version_1" / "c.ckpt" / METADATA, (1, 1))
    assert newest_checkpoint(tmp_path).name == "a.ckpt"
    os.utime(tmp_path / "version_0" / "a.ckpt", (0, 0))
    assert newest_checkpoint(tmp_path).name == "c.ckpt"


def test_what_cannot_be_resumed_is_passed_over_by_name(tmp_path, caplog):
    save_file(1, tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / ".next.ckpt.0123abcd.partial").write_bytes(whole)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"global_step": 9, "state_dict": {}}, tmp_path / "weights.ckpt")
    save_folder(8, tmp_path / "torn.ckpt")
    (tmp_path / "torn.ckpt" / "__0_0.distcp").write_bytes(b"less")
    (tmp_path / "gone.ckpt").symlink_to("removed.ckpt")
    (tmp_path / "link.ckpt").symlink_to("good.ckpt")
    with caplog.at_level(logging.INFO):
        assert newest_checkpoint(tmp_path) == tmp_path / "good.ckpt"
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in ("cut.ckpt", "empty.ckpt", ".next.ckpt.0123abcd.partial", "other.ckpt", "torn.ckpt"):
        assert sum(f"{name} " in message for message in warned) == 1, name
    assert "weights.ckpt holds weights only" in caplog.text


def test_a_folder_without_its_mark(tmp_path):
    """Folders of before have no mark and are read, if they hold what was written last; hidden ones are not."""
    folder = tmp_path / "old.ckpt"
    save_folder(3, folder)
    check_committed(folder)
    (folder / COMMITTED).unlink()
    check_committed(folder)
    hidden = folder.rename(tmp_path / ".old.ckpt.01234567.partial")
    with pytest.raises(ValueError, match="no complete checkpoint: its writing was interrupted"):
        check_committed(hidden)
    folder = hidden.rename(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="`--ckpt_path last` finds the newest"):
        check_committed(folder)
    (folder / COMMITTED).write_text(json.dumps({"files": {"__0_0.distcp": 4999}}))
    assert not is_committed(folder)
    (folder / COMMITTED).write_text('{"files": {"__0_0.')
    assert not is_committed(folder)


def test_nothing_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save(content(1, evil=Evil()), tmp_path / "evil.ckpt")
    plugin = DurableCheckpointIO()
    with pytest.raises(pickle.UnpicklingError):
        plugin.load_checkpoint(tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="weights_only=False would run code"):
        plugin.load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path / "was-run").exists()


def trainer_in(folder: Path, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{"max_steps": 1, **quiet, **options})


@pytest.fixture
def parts(tiny_llava, small_shards):
    module = RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(2))
    return module, DualPreferenceDataModule(module.backbone, small_shards)


def test_the_module_switches_it_on_and_leaves_what_the_user_chose(parts, tmp_path):
    module, data = parts
    trainer = trainer_in(tmp_path / "plain")
    trainer.fit(module, datamodule=data)
    assert type(trainer.strategy.checkpoint_io) is DurableCheckpointIO
    exporting = trainer_in(tmp_path / "export", callbacks=[AdapterExport()])
    exporting.fit(module, datamodule=data)
    assert type(exporting.strategy.checkpoint_io.wrapped) is DurableCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    own = trainer_in(tmp_path / "own", plugins=[Own()])
    own.fit(module, datamodule=data)
    assert type(own.strategy.checkpoint_io) is Own


def test_a_full_disk_in_a_sharded_save(parts, tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    module, data = parts
    trainer = trainer_in(tmp_path, strategy=FSDP2Strategy(), enable_checkpointing=False)
    target = tmp_path / "last.ckpt"
    try:
        trainer.fit(module, datamodule=data)
        trainer.save_checkpoint(target)
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        assert set(before) == {COMMITTED, METADATA, ".metadata", "__0_0.distcp"}

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        said = r"No space left on device.*all earlier checkpoints are intact"
        for name in ("realign_lightning.modules.strategy.save", "torch.save", "os.fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(name, full)
                with pytest.raises(CheckpointError, match=said):
                    trainer.save_checkpoint(target)
            assert {path.name: path.read_bytes() for path in target.iterdir()} == before, name
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], name
        trainer.save_checkpoint(target)
        check_committed(target)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def remembering(folder: Path, monitor: str | None, mode: str = "min", **scores: float) -> ModelCheckpoint:
    """A callback that has just been restored: it remembers a file per score."""
    callback = ModelCheckpoint(folder, monitor=monitor, mode=mode, save_top_k=3 if monitor else 1)
    paths = [str(folder / f"{name}.ckpt") for name in scores]
    callback.best_model_path = paths[0]
    if monitor:
        values = map(torch.tensor, scores.values())
        callback.best_k_models = dict(zip(paths, values, strict=True))
        callback.best_model_score = torch.tensor(next(iter(scores.values())))
        callback.kth_best_model_path = paths[-1]
    return callback


def test_the_best_model_is_one_that_is_there(tmp_path):
    """``a`` was removed since, ``b`` is cut; of ``c`` and ``d`` the smaller, or larger, is the best."""
    for name in "bcd":
        save_file(1, tmp_path / f"{name}.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"PK")
    for mode, best, worst in (("min", "c", "d"), ("max", "d", "c")):
        callback = remembering(tmp_path, "loss", mode, a=0.1, b=0.2, c=0.3, d=0.4)
        mend_best(callback, tmp_path / "d.ckpt")
        assert callback.best_model_path == str(tmp_path / f"{best}.ckpt")
        assert callback.kth_best_model_path == str(tmp_path / f"{worst}.ckpt")
        assert sorted(callback.best_k_models) == [str(tmp_path / "c.ckpt"), str(tmp_path / "d.ckpt")]
        assert callback.best_model_score == callback.best_k_models[callback.best_model_path]
    callback = remembering(tmp_path, "loss", a=0.1, b=0.2)
    mend_best(callback, tmp_path / "d.ckpt")
    assert (callback.best_model_path, callback.best_model_score, callback.best_k_models) == ("", None, {})
    assert callback.kth_value == torch.inf
    callback = remembering(tmp_path, None, a=0.0)
    mend_best(callback, tmp_path / "d.ckpt")
    assert callback.best_model_path == str(tmp_path / "d.ckpt")


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_random_states_go_through_a_file(tmp_path):
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002
    states = random_states(CPU)
    torch.save(states, tmp_path / "states")
    expected = [draw() for _ in range(3)]
    draw()
    restore_random_states(torch.load(tmp_path / "states", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected


def test_other_ranks_draw_other_numbers_but_always_the_same():
    states = random_states(CPU)
    drawn = []
    for rank in (0, 1, 2, 0):
        derive_random_states(states, rank)
        drawn.append(tuple(draw()))
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_a_resume_inside_an_accumulation_window_is_exact(warm_nursery, tiny_llava, small_shards, tmp_path):
    """Four batches per step, seven per epoch; a checkpoint after each batch, chains of resumes over epochs' ends."""
    run = ("--steps", 6, "--accumulate", 4, "--every_batch")

    def live(name: str, resume: Path | str = "none") -> Path:
        folder = tmp_path / name
        arguments = (tiny_llava, small_shards, folder, *run, "--resume", resume)
        warm_nursery.start(tmp_path / "log.txt", *arguments).expect(0)
        return folder

    whole = live("whole")
    assert lines(whole) == 21
    # After six, seven (an epoch's last) and nine batches: these are done again from the last step on.
    for after, left in ((6, 17), (7, 14), (9, 14)):
        resumed = live(f"after-{after}", whole / "checkpoints" / f"batch={after}.ckpt")
        assert lines(resumed) == left
        assert_same(final(resumed), final(whole), f"after {after} batches")
    twice = live("twice", tmp_path / "after-7" / "checkpoints" / "batch=5.ckpt")
    assert lines(twice) == 10
    assert_same(final(twice), final(whole))
