"""Starts training processes quickly: imports everything once, then forks for every job.

Jobs come as JSON lines ``{"program": "training", "arguments": [...], "environment": {...}, "processes": 1, "log":
path, "folder": path}`` on standard input; the program is our training script or ``command``, the command line.
Answers go to standard output: ``{"pids": [...]}`` when they live, ``{"statuses": [...]}`` when all have ended; negative
numbers are signals. One thread only has run before the fork, and every job gets a process group of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch

from realign_lightning import cli
from tests.reliability import training

LAZY = ("torch._dynamo", "transformers.models.llava.modeling_llava", "peft", "realign_lightning.modules")
"""What would be imported when it is first used, in every life anew."""


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
        run(job)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the parent's exit handlers.
        os._exit(status)


def run(job: dict) -> None:
    os.chdir(job["folder"])
    if job["program"] == "command":
        sys.argv = ["realign-lightning", *job["arguments"]]
        cli.main()
        return
    # What Lightning's own launcher starts a second process with.
    sys.modules["__main__"].__spec__ = training.__spec__
    sys.argv = ["training", *job["arguments"]]
    training.run(training.read_options(job["arguments"]))


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
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses}), flush=True)
    # Nothing to tidy up, and taking PyTorch down takes seconds.
    os._exit(0)


if __name__ == "__main__":
    main()
