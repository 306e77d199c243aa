"""Fuzz what reads bytes from elsewhere: shards, JSON, images, converters. Coverage decides what is damaged further.

``python -m benchmarks.fuzz --seconds 1800 --folder /tmp/fuzz`` prints executions, edges and findings, and keeps each
finding as a file; ``--replay FILE --targets NAME`` runs one again. Equal seeds and numbers of executions give equal
runs.

The method is that of AFL (https://lcamtuf.coredump.cx/afl/): an input that takes a new edge is kept and damaged more.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from benchmarks.fuzz_targets import ACCEPTED, TARGETS, Finding, Target

SLOW_SECONDS = 5
"""An execution that computes longer is a finding; one that waits 12 times as long is stopped."""

GROWTH_BYTES = 3 << 29
"""So is one during which the peak of resident memory rises by more than this (1.5 GiB; a full-sized image takes 1)."""

_TRACED = ("realign_lightning/data/", "/tarfile.py", "/PIL/")


class Hang(BaseException):
    """An execution took too long; no handler of ``Exception`` may stop it."""


class Edges:
    """Steps from line to line that were ever taken in the code that is looked at."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int, int]] = set()
        self._is_traced: dict[str, bool] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in the block."""
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        if file not in self._is_traced:
            self._is_traced[file] = any(part in file for part in _TRACED)
        return self._follow(frame.f_code) if self._is_traced[file] else None

    def _follow(self, code: CodeType) -> Callable[..., Any]:
        last, seen = 0, self.seen

        def step(frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any]:
            nonlocal last
            seen.add((code, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step


@dataclass
class Campaign:
    """What became of one target.

    Args:
        target: what was fuzzed.
        executions: inputs that were run.
        seconds: that took.
        outcomes: how many were accepted and refused.
        findings: one input for each kind of finding.
        corpus: inputs that took a new edge.
        accepted: those of them that were accepted, and the valid ones to begin with.
        edges: that were taken.
    """

    target: Target
    executions: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    corpus: list[bytes] = field(default_factory=list)
    accepted: list[bytes] = field(default_factory=list)
    edges: Edges = field(default_factory=Edges)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.target.name}: {self.executions} executions in {self.seconds:.0f} s ({counts}), "
            f"{len(self.edges.seen)} edges, {len(self.corpus)} inputs kept, {len(self.findings)} findings"
        )


def fuzz(
    target: Target,
    seed: int = 0,
    executions: int | None = None,
    seconds: float | None = None,
    keep: Path | None = None,
    campaign: Campaign | None = None,
) -> Campaign:
    """Run damaged inputs on a target.

    Args:
        target: what is fuzzed.
        seed: of all chance.
        executions: inputs to run, the valid ones among them; None is no limit.
        seconds: time to take; None is no limit. One of the two must be given.
        keep: folder for findings, and for the input at hand should the process die; None keeps nothing.
        campaign: to go on with; None begins anew.

    Returns:
        What became of it.

    Raises:
        ValueError: without a limit.
    """
    if executions is None and seconds is None:
        raise ValueError("give executions, seconds, or both")
    campaign = campaign or Campaign(target)
    chance = random.Random(f"{target.name} {seed} {campaign.executions}")
    begin, first = time.monotonic(), campaign.executions
    waiting = [] if campaign.corpus else list(target.seeds())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        while (executions is None or campaign.executions - first < executions) and (
            seconds is None or time.monotonic() - begin < seconds
        ):
            is_seed = bool(waiting)
            data = waiting.pop() if waiting else _mutated(campaign, chance)
            edges = len(campaign.edges.seen)
            outcome = _execute(campaign, data, Path(scratch), keep)
            if is_seed or len(campaign.edges.seen) > edges:
                campaign.corpus.append(data)
                campaign.accepted += [data] if is_seed or outcome == ACCEPTED else []
    campaign.seconds += time.monotonic() - begin
    return campaign


def _mutated(campaign: Campaign, chance: random.Random) -> bytes:
    # Most that is new is refused, and what comes of it is refused alike: half of all begins with what was accepted.
    parents = campaign.accepted if chance.random() < 0.5 else campaign.corpus
    # New inputs stand at the end, and are tried more often.
    data = parents[max(chance.randrange(len(parents)), chance.randrange(len(parents)))]
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        data = chance.choice(campaign.target.mutations)(data, chance, chance.choice(campaign.corpus))
    return data


def _execute(campaign: Campaign, data: bytes, scratch: Path, keep: Path | None) -> str:
    """Run one input in an empty folder, record what becomes of it, and say it."""
    folder = scratch / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if keep is not None:
        (keep / f"{campaign.target.name}.running").write_bytes(data)
    campaign.executions += 1
    peak, begin = _peak(), time.process_time()
    try:
        with campaign.edges.recording(), _alarm():
            outcome = campaign.target.run(data, folder)
        expect_modest(time.process_time() - begin, _peak() - peak)
    # Anything but the documented errors, which the target itself takes, is what is looked for.
    except (Exception, Hang) as error:
        outcome = "finding"
        _record(campaign, data, error, keep)
    campaign.outcomes[outcome] += 1
    return outcome


def expect_modest(seconds: float, growth: int) -> None:
    """Raise if an execution took too much.

    Args:
        seconds: that it computed.
        growth: bytes by which the peak of resident memory rose.

    Raises:
        Finding: if either is too much.
    """
    if seconds > SLOW_SECONDS:
        raise Finding(f"took {seconds:.1f} s")
    if growth > GROWTH_BYTES:
        raise Finding(f"took {growth >> 20} MiB")


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"still running after {12 * SLOW_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 12 * SLOW_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    """Peak of resident memory in bytes (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _record(campaign: Campaign, data: bytes, error: BaseException, keep: Path | None) -> None:
    """Keep the smallest input of every kind of finding."""
    steps = traceback.extract_tb(error.__traceback__)
    ours = [step for step in steps if "realign_lightning" in step.filename or isinstance(error, Finding)]
    where = (ours or steps)[-1]
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "...", str(error))[:80]
    kind = f"{type(error).__name__} in {Path(where.filename).name}:{where.name}: {words}"
    if kind in campaign.findings and len(campaign.findings[kind][0]) <= len(data):
        return
    is_new = kind not in campaign.findings
    campaign.findings[kind] = (data, "".join(traceback.format_exception(error)))
    if keep is not None:
        name = f"{campaign.target.name}-{list(campaign.findings).index(kind):03d}"
        (keep / f"{name}.bin").write_bytes(data)
        (keep / f"{name}.txt").write_text(campaign.findings[kind][1], encoding="utf-8", errors="backslashreplace")
        if is_new:
            print(f"FINDING {name} ({len(data)} bytes): {kind}", flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Command line of :func:`fuzz`.

    Args:
        args: the options.

    Returns:
        1 if there are findings, otherwise 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=list(TARGETS))
    parser.add_argument("--seconds", type=float, help="over all targets")
    parser.add_argument("--executions", type=int, help="of every target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where findings go, outside of the repository")
    parser.add_argument("--replay", type=Path, help="run this one input on the one target that is given")
    options = parser.parse_args(args)
    if options.replay is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(TARGETS[options.targets[0]].run(options.replay.read_bytes(), Path(folder)))
        return 0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="findings-"))
    folder.mkdir(parents=True, exist_ok=True)
    campaigns = _take_turns(options, folder)
    print(*campaigns, sep="\n")
    total, found = sum(one.executions for one in campaigns), sum(len(one.findings) for one in campaigns)
    print(f"{total} executions, {sum(one.seconds for one in campaigns):.0f} s, {found} findings in {folder}")
    return 1 if found else 0


def _take_turns(options: argparse.Namespace, folder: Path) -> list[Campaign]:
    """Give the targets their share of time in ten rounds, so that all are reached early."""
    campaigns = [Campaign(TARGETS[name]) for name in options.targets]
    rounds = 10 if options.seconds else 1
    share = options.seconds / rounds / len(campaigns) if options.seconds else None
    executions = None if options.executions is None else max(1, options.executions // rounds)
    for turn in range(rounds):
        for campaign in campaigns:
            fuzz(campaign.target, options.seed, executions, share, folder, campaign)
            print(f"round {turn + 1}: {campaign}", flush=True)
    return campaigns


if __name__ == "__main__":
    sys.exit(main())
