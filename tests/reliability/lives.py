"""Training processes that are started, killed and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from realign_lightning.checkpoints import newest_checkpoint, read_header
from tests.conftest import alone, free_port
from tests.reliability.training import FINAL

ROOT = Path(__file__).parents[2]


def each_its_own_port() -> dict[str, str]:
    """For a process whose children are killed: what one has left must not stand in the way of the next."""
    return {name: value for name, value in alone().items() if name != "MASTER_PORT"}


class Life:
    """One job of a nursery: its processes, from start to end."""

    def __init__(self, nursery: Nursery, pids: list[int], log: Path) -> None:
        self._nursery = nursery
        self.pids = pids
        self.log = log
        self.started = time.monotonic()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to the whole group of every rank: its data workers die with it."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def statuses(self) -> list[int]:
        """How all ended; waits for it."""
        return self._nursery.read()["statuses"]

    def is_over(self) -> bool:
        return all(_has_ended(pid) for pid in self.pids)

    def expect(self, *statuses: int) -> None:
        found = self.statuses()
        assert found == list(statuses), f"{found}\n{self.log.read_text()[-4000:]}"


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


class Nursery:
    """A process that has everything imported and forks training processes, see :mod:`tests.reliability.nursery`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.read()

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the nursery has ended"
        return json.loads(line)

    def start(
        self,
        log: Path,
        *arguments: object,
        processes: int = 1,
        program: str = "training",
        folder: Path = ROOT,
        **environment: str,
    ) -> Life:
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        job = {
            "program": program,
            "folder": str(folder),
            "arguments": [str(one) for one in arguments],
            "environment": environment,
            "processes": processes,
            "log": str(log),
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Life(self, self.read()["pids"], log)


@contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-m", "tests.reliability.nursery"]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=each_its_own_port()
    ) as process:
        try:
            yield Nursery(process)
        finally:
            process.stdin.close()
            process.wait(60)


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def lines(folder: Path) -> int:
    """Batches that all lives so far have recorded."""
    path = folder / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / FINAL, weights_only=True)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bit-identical tensors and equal values, at any depth."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), where
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def listed(folder: Path) -> list[Path]:
    """Every checkpoint that shows under its name, of a kill or not."""
    return sorted(path for path in folder.rglob("*.ckpt") if not path.name.startswith("."))


def assert_all_load(folder: Path) -> int:
    """No checkpoint that is listed fails to load. Returns their number."""
    for path in listed(folder):
        header = read_header(path)
        assert header["global_step"] > 0
        if path.is_file():
            whole = torch.load(path, weights_only=True)
            assert whole["state_dict"]
            assert whole["optimizer_states"]
    return len(listed(folder))


def newest_step(folder: Path) -> int:
    path = newest_checkpoint(folder)
    return 0 if path is None else int(read_header(path)["global_step"])
