"""SIGKILL at random moments of a training run: it ends with the weights of the undisturbed one, bit by bit.

One run is killed again and again over its life, and goes on each time from the newest checkpoint; where it finishes
before enough kills were counted, another run begins. A quarter of the moments is drawn from the time in which a process
starts, loads and resumes; the others lie in or after one of its first ten batches, up to 0.2 seconds later, in which it
trains, saves and removes.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from realign_lightning.checkpoints import disk
from tests.processes import Nursery
from tests.reliability.lives import assert_all_load, assert_same, final, lines, newest_step, wait_for
from tests.reliability.training import FINAL

ONE = ("--steps", 120, "--accumulate", 2, "--every_steps", 2, "--save_last", "--pause", 0.01)
SHARDED = (*ONE, "--engine", "fsdp")


class KilledRun:
    """Runs of one kind, killed until there were enough kills.

    Args:
        nursery: forks the processes.
        folder: the undisturbed run is in ``whole``, the others in ``killed-0`` and so on.
        arguments: of the training script, without folder.
        processes: ranks.
        environment: of the processes.
    """

    def __init__(self, nursery: Nursery, folder: Path, arguments: tuple, processes: int = 1, **environment: str):
        self.nursery = nursery
        self.folder = folder
        self.arguments = arguments
        self.processes = processes
        self.environment = environment
        self.chance = random.Random(0)
        self.moments: list[str] = []
        self.checked = 0
        self.startup = self._run_undisturbed()

    def _start(self, folder: Path):
        *inputs, options = self.arguments
        return self.nursery.start(
            folder / "log.txt", *inputs, folder, *options, processes=self.processes, **self.environment
        )

    def _run_undisturbed(self) -> float:
        folder = self.folder / "whole"
        life = self._start(folder)
        wait_for(lambda: lines(folder) or life.is_over())
        startup = time.monotonic() - life.started
        life.expect(*[0] * self.processes)
        return startup

    def kill(self, times: int) -> None:
        runs = 0
        while len(self.moments) < times:
            folder = self.folder / f"killed-{runs}"
            while not (folder / FINAL).exists():
                self._live(folder, times)
            assert_same(final(self.folder / "whole"), final(folder), f"run {runs}")
            shutil.rmtree(folder)
            runs += 1

    def _live(self, folder: Path, times: int) -> None:
        """One life: killed at a random moment, or lived to the end when there were enough kills."""
        known = lines(folder)
        life = self._start(folder)
        if len(self.moments) >= times:
            wait_for(life.is_over, 300)
        elif self.chance.random() < 0.25:
            time.sleep(self.chance.uniform(0, self.startup))
        else:
            batches = self.chance.randint(1, 10)
            wait_for(lambda: lines(folder) >= known + batches or life.is_over(), 300)
            time.sleep(self.chance.uniform(0, 0.2))
        if life.is_over():
            life.expect(*[0] * self.processes)
            return
        before = newest_step(folder)
        self._kill(life)
        statuses = life.statuses()
        if not any(statuses):
            # It came to its end in the moment before.
            return
        assert -signal.SIGKILL in statuses, f"{statuses}\n{life.log.read_text()[-3000:]}"
        trained = lines(folder) - known
        seconds = time.monotonic() - life.started
        self.moments.append(f"{folder.name}: after {seconds:.2f} s, {trained} batches, on from step {before}")
        self.checked += assert_all_load(folder)
        assert newest_step(folder) >= before, "nothing that was complete is lost"

    def _kill(self, life) -> None:
        """Of several ranks sometimes one dies first, and the other has time to go wrong."""
        first = self.chance.randrange(self.processes + 1)
        if self.processes > 1 and first < self.processes:
            os.kill(life.pids[first], signal.SIGKILL)
            time.sleep(self.chance.uniform(0, 0.3))
        life.kill()


@pytest.fixture
def other_file_system(tmp_path) -> Path:
    """A folder for temporary files on another file system than the checkpoints', where there is one."""
    for place in map(Path, ("/dev/shm", "/run", "/tmp")):  # noqa: S108
        if place.is_dir() and os.access(place, os.W_OK) and place.stat().st_dev != tmp_path.stat().st_dev:
            folder = place / f"kills-{os.getpid()}"
            folder.mkdir()
            yield folder
            shutil.rmtree(folder)
            return
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield folder


def killed_run(nursery, folder, inputs, options, processes=1, **environment) -> KilledRun:
    return KilledRun(nursery, folder, (*inputs, options), processes, **environment)


@pytest.fixture
def inputs(tiny_llava, small_shards) -> tuple[Path, Path]:
    return tiny_llava, small_shards


def test_a_killed_run_ends_as_the_undisturbed_one(warm_nursery, inputs, tmp_path, other_file_system):
    """Also with temporary files on another file system, to which nothing of a checkpoint goes."""
    options = (*ONE, "--workers", 1)
    run = killed_run(warm_nursery, tmp_path, inputs, options, TMPDIR=str(other_file_system))
    run.kill(3)
    assert len(run.moments) == 3
    assert not [path for path in other_file_system.rglob("*") if path.suffix in (".ckpt", disk.PARTIAL)]


def test_a_killed_sharded_run_ends_as_the_undisturbed_one(warm_nursery, inputs, tmp_path):
    run = killed_run(warm_nursery, tmp_path, inputs, (*SHARDED, "--steps", 30), 2)
    run.kill(1)
    assert len(run.moments) == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 2])
def test_fifty_kills(warm_nursery, inputs, tmp_path, other_file_system, workers):
    options = (*ONE, "--workers", workers)
    run = killed_run(warm_nursery, tmp_path, inputs, options, TMPDIR=str(other_file_system))
    run.kill(50)
    print(*run.moments, f"{run.checked} checkpoints read after kills", sep="\n")
    assert len(run.moments) == 50
    assert run.checked > 25


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_kills_of_two_ranks(warm_nursery, inputs, tmp_path):
    run = killed_run(warm_nursery, tmp_path, inputs, SHARDED, 2)
    run.kill(10)
    print(*run.moments, f"{run.checked} checkpoints read after kills", sep="\n")
    assert len(run.moments) == 10
    assert run.checked > 5
