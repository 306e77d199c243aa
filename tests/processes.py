"""Processes that tests start, and kill."""

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

from tests.conftest import alone, free_port

ROOT = Path(__file__).parents[1]


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

    def expect(self, *statuses: int) -> str:
        """Wait for the end, which is to be this. Returns what the job has said."""
        found = self.statuses()
        said = self.log.read_text()
        assert found == list(statuses), f"{found}\n{said[-4000:]}"
        return said


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


class Nursery:
    """A process that has everything imported and forks training processes, see :mod:`tests.nursery`."""

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
        program: str = "tests.reliability.training",
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
    command = [sys.executable, "-m", "tests.nursery"]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=each_its_own_port()
    ) as process:
        try:
            yield Nursery(process)
        finally:
            process.stdin.close()
            process.wait(60)
