"""Signals of a scheduler: one checkpoint, one exit code, and a run that goes on as if nothing had happened."""

import os
import signal
import stat
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.utils.data import DataLoader, TensorDataset

from realign_lightning.callbacks import EXIT_CODE, Preemption
from realign_lightning.checkpoints import DurableCheckpointIO, newest_checkpoint, read_header
from tests.reliability.lives import assert_same, final, lines, wait_for
from tests.test_cli import fit_args, tiny

RUN = ("--steps", 30, "--accumulate", 2, "--every_steps", 50)


class Line(pl.LightningModule):
    """One weight vector; counts its validations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.validated = 0

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Send(pl.Callback):
    """Sends signals to its own process from a hook, when it is called for the n-th time."""

    def __init__(self, hook: str, time: int, *numbers: int) -> None:
        self.left = time
        self.numbers = numbers
        setattr(self, hook, self._call)

    def _call(self, *args, **kwargs) -> None:
        self.left -= 1
        if self.left == 0:
            for number in self.numbers:
                os.kill(os.getpid(), number)


class Interrupted(DurableCheckpointIO):
    """Gets the same signal again in the middle of a save."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.kill(os.getpid(), signal.SIGTERM)
        super().save_checkpoint(checkpoint, path, storage_options)
        os.kill(os.getpid(), signal.SIGUSR1)


def loader(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=1)


def fit(folder: Path, *callbacks: pl.Callback, resume: Path | None = None, module: Line | None = None, **options):
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[Interrupted()],
        callbacks=list(callbacks),
        **{"max_steps": 6, **options},
    )
    trainer.fit(Line() if module is None else module, loader(8), loader(3), ckpt_path=resume)
    return trainer


@pytest.fixture
def handlers():
    """Tests must leave the signals' handlers as they found them."""

    def others(number, frame):
        raise AssertionError("a handler from before the fit was called")

    before = {number: signal.signal(number, others) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield others
    for number, handler in before.items():
        assert signal.signal(number, handler) is others, "the handler from before the fit is back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_a_second_disturbs_nothing(tmp_path, handlers, number):
    preemption = Preemption()
    trainer = fit(tmp_path, preemption, Send("on_train_batch_start", 3, number, number))
    assert preemption.preempted
    assert trainer.global_step == 3
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "preempted.ckpt"
    assert preemption.exit_code(trainer) == EXIT_CODE == 75
    again = fit(tmp_path, preemption, resume=newest_checkpoint(tmp_path))
    assert not preemption.preempted
    assert again.global_step == 6


def test_gradients_that_are_being_accumulated_are_waited_for(tmp_path, handlers):
    """Told in the first of three batches, it stops after the third."""
    preemption = Preemption()
    trainer = fit(tmp_path, preemption, Send("on_train_batch_start", 4, signal.SIGTERM), accumulate_grad_batches=3)
    assert preemption.preempted
    assert trainer.global_step == 2
    assert trainer.fit_loop.epoch_loop.batch_progress.current.processed == 6


def test_a_validation_stops_too_and_no_other_follows(tmp_path, handlers):
    module = Line()
    preemption = Preemption()
    fit(tmp_path, preemption, Send("on_validation_batch_start", 2, signal.SIGTERM), module=module, val_check_interval=4)
    assert preemption.preempted
    assert module.validated == 2
    assert read_header(newest_checkpoint(tmp_path))["global_step"] == 4


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_end"])
def test_where_there_is_nothing_to_save_the_process_ends_at_once(tmp_path, handlers, hook):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, Preemption(), Send(hook, 1, signal.SIGTERM))
    assert stop.value.code == 75
    assert not list(tmp_path.rglob("preempted.ckpt"))


def test_it_can_be_switched_off_and_the_first_of_two_counts(tmp_path, handlers):
    off, other = Preemption([]), Preemption()
    with pytest.raises(AssertionError, match="from before the fit"):
        fit(tmp_path, off, other, Send("on_train_batch_start", 2, signal.SIGUSR1))
    with pytest.raises(ValueError, match=r"names such as 'SIGTERM', got \['SIGNAL'\]"):
        Preemption(["SIGNAL"])


@pytest.fixture
def inputs(tiny_llava, small_shards) -> tuple[Path, Path]:
    return tiny_llava, small_shards


@pytest.fixture(scope="session")
def undisturbed(warm_nursery, tiny_llava, small_shards, tmp_path_factory):
    """The final weights of a run on one process and on two."""

    def run(processes: int, engine: str) -> dict:
        folder = tmp_path_factory.mktemp(f"whole-{engine}")
        life = warm_nursery.start(
            folder / "log.txt", tiny_llava, small_shards, folder, *RUN, "--engine", engine, processes=processes
        )
        life.expect(*[0] * processes)
        return final(folder)

    return {"one": run(1, "one"), "fsdp": run(2, "fsdp")}


def test_slurm_requeues_by_the_exit_code_and_lightning_does_not_interfere(warm_nursery, inputs, undisturbed, tmp_path):
    """SIGUSR1 as of ``#SBATCH --signal=SIGUSR1@120``, to all processes of the job, data workers too."""
    called = tmp_path / "scontrol-was-called"
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho $@ >> {called}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    folder = tmp_path / "run"
    for number in (signal.SIGUSR1, signal.SIGTERM):
        before = lines(folder)
        life = warm_nursery.start(tmp_path / "log.txt", *inputs, folder, *RUN, "--workers", 2, "--pause", 0.02, **slurm)
        wait_for(lambda before=before: lines(folder) > before + 4)
        os.killpg(life.pids[0], number)
        life.expect(75)
    warm_nursery.start(tmp_path / "log.txt", *inputs, folder, *RUN, **slurm).expect(0)
    assert_same(final(folder), undisturbed["one"])
    assert not called.exists()
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's own handler saved"


@pytest.mark.parametrize(
    "told", [[1], pytest.param([0], marks=pytest.mark.soak), pytest.param([0, 1], marks=pytest.mark.soak)]
)
def test_it_does_not_matter_which_rank_is_told(warm_nursery, inputs, undisturbed, tmp_path, told):
    """Two ranks under FSDP2: the first exits with the code, and the one that Lightning started beside it with 0."""
    run = (*RUN, "--engine", "fsdp", "--pause", 0.02)
    life = warm_nursery.start(tmp_path / "log.txt", *inputs, tmp_path, *run, processes=2)
    wait_for(lambda: lines(tmp_path) > 3)
    life.send(signal.SIGTERM, *told)
    statuses = life.statuses()
    # Ranks started by hand look like those that Lightning starts, of which only the first may tell.
    assert statuses == [75, 0], life.log.read_text()[-3000:]
    assert newest_checkpoint(tmp_path).name == "preempted.ckpt"
    warm_nursery.start(tmp_path / "log.txt", *inputs, tmp_path, *run, processes=2).expect(0, 0)
    assert_same(final(tmp_path), undisturbed["fsdp"])


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "told",
    [
        "first",
        pytest.param("second", marks=pytest.mark.soak),
        pytest.param("group", marks=pytest.mark.soak),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_under_lightnings_own_launcher(warm_nursery, inputs, tmp_path, told):
    """DDP: the first process starts the second. All save together whoever is told, and the first exits with 75."""
    life = warm_nursery.start(tmp_path / "log.txt", *inputs, tmp_path, *RUN, "--engine", "ddp", "--pause", 0.05)
    wait_for(lambda: lines(tmp_path) > 3)
    (second,) = children(life.pids[0])
    if told == "group":
        os.killpg(life.pids[0], signal.SIGTERM)
    else:
        os.kill(life.pids[0] if told == "first" else second, signal.SIGTERM)
    life.expect(75)
    header = read_header(tmp_path / "checkpoints" / "preempted.ckpt")
    assert header["global_step"] > 0
    assert len(header["random_states"]) == 2
    wait_for(lambda: not Path(f"/proc/{second}").exists())


def test_before_training_lightnings_launcher_takes_its_processes_along(tmp_path, handlers, monkeypatch):
    killed = []
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    launcher = _SubprocessScriptLauncher(trainer.strategy, 1, 1)
    monkeypatch.setattr(launcher, "kill", killed.append)
    monkeypatch.setattr(trainer.strategy, "_launcher", launcher)
    with pytest.raises(SystemExit):
        Preemption()._on_signal(trainer, os.getpid(), signal.SIGTERM)
    assert killed == [signal.SIGKILL]


def test_the_same_command_line_starts_goes_on_and_finishes(warm_nursery, inputs, tmp_path):
    """As a requeued job does it: ``--ckpt_path last`` begins where there is nothing, and goes on where there is."""
    tiny_llava, shards = map(str, inputs)
    recipe = [*fit_args(tiny(shards, tiny_llava)), "--trainer.callbacks", "null", "--trainer.max_steps", "40"]
    recipe += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "runs"]
    recipe += ["--trainer.logger.name", "mine", "--trainer.logger.flush_logs_every_n_steps", "1"]
    recipe += ["--trainer.log_every_n_steps", "1", "--ckpt_path", "last"]
    log = tmp_path / "log.txt"
    life = warm_nursery.start(log, *recipe, program="realign_lightning", folder=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("metrics.csv")))
    life.send(signal.SIGTERM)
    life.expect(75)
    assert "no checkpoint yet, a new run begins" in log.read_text()
    (saved,) = tmp_path.rglob("preempted.ckpt")
    step = read_header(saved)["global_step"]
    assert 0 < step < 40
    warm_nursery.start(log, *recipe, program="realign_lightning", folder=tmp_path).expect(0)
    assert f"going on from {saved.relative_to(tmp_path)}" in log.read_text()
    assert read_header(newest_checkpoint(tmp_path))["global_step"] == 40
    other = [*recipe, "--model.loss.init_args.beta", "0.7"]
    warm_nursery.start(log, *other, program="realign_lightning", folder=tmp_path).expect(1)
    assert "made with other settings: model.loss.init_args.beta was 0.1" in log.read_text()
