"""Starts training processes quickly: imports everything once, then forks for every job.

Jobs come as JSON lines ``{"program": "tests.reliability.training", "arguments": [...], "environment": {...},
"processes": 1, "log": path, "folder": path}`` on standard input; the program is a module that is run as a script would
be, such as ``realign_lightning``, the command line. Answers go to standard output: ``{"pids": [...]}`` when they live,
``{"statuses": [...]}`` when all have ended; negative numbers are signals. One thread only has run before the fork, and
every process of a job gets a group of its own. Where one fails, those that would wait for it are killed after a while.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

LAZY = (
    *("torch._dynamo", "torch.distributed.tensor", "transformers.models.llava.modeling_llava", "peft"),
    *("realign_lightning.cli", "realign_lightning.modules", "realign_lightning.callbacks"),
)
"""What would be imported when it is first used, in every life anew."""

PATIENCE = 60.0
"""Seconds that processes may go on after another of their job has failed."""


def live(job: dict, rank: int) -> None:
    """What a forked process does; it never returns."""
    os.setpgid(0, 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"])
    if job["processes"] > 1:
        os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(job["processes"])})
    status = 1
    try:
        os.chdir(job["folder"])
        sys.argv = [job["program"], *job["arguments"]]
        runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        print(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the parent's exit handlers.
        os._exit(status)


def statuses_of(pids: list[int]) -> list[int]:
    """How all processes of a job have ended; waits for it."""
    ended: dict[int, int] = {}
    failed = None
    while len(ended) < len(pids):
        for pid in pids:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                ended[pid] = os.waitstatus_to_exitcode(found[1])
                failed = failed or (time.monotonic() if ended[pid] else None)
        if failed and time.monotonic() > failed + PATIENCE:
            for pid in set(pids) - ended.keys():
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[pid] for pid in pids]


def main() -> None:
    torch.set_num_threads(1)
    for name in LAZY:
        importlib.import_module(name)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["log"]).parent.mkdir(parents=True, exist_ok=True)
        pids = []
        for rank in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                live(job, rank)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                # Here too: it may be killed before it has come to it.
                os.setpgid(pid, pid)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"statuses": statuses_of(pids)}), flush=True)
    # Nothing to tidy up, and taking PyTorch down takes seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
