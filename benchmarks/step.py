"""What one training step costs: this package against TRL, the paper's release and padded rows.

A step is a forward and a backward pass of rDPO or DPO with LoRA on every linear layer of the language model, vision
tower and projector frozen, without an optimizer. All modes have the same weights, adapters and pairs. From the root of
the repository, with the ``test`` extra installed (TRL is in it):

    python -m benchmarks.step --shape llava --json llava.json
    python -m benchmarks.step --shape qwen --json qwen.json
    python -m benchmarks.step --sweep all --json sweep.json --plot docs/images/step_cost.png
    python -m benchmarks.step --shape llava-7b --device cuda --dtype bfloat16 --peak-tflops 989

What the columns mean:

- Times are medians over ``--repeats`` turns in which every mode runs once, after a step of each that is counted and not
  timed. Other work on the machine shows in the load average and the spread; processor time with ``--threads 1`` is
  disturbed least.
- Operations (FLOP) are those of matrix products, convolutions and attention, as PyTorch's FlopCounterMode counts them,
  plus the in-place products that it leaves out. The half of causal attention that a kernel may skip is counted. An
  operation belongs to the vision part while tower or projector run, to the head if one of its sides is the vocabulary,
  and to the language model otherwise.
- The floor is the operations over the rate of a large matrix product, measured in every turn.
- Memory is what a step takes at its peak above the weights. On CPUs it is resident memory in a fresh process for every
  mode, after a step on little data, with an allocator that hands memory back when it is freed.
- Differences of loss and gradient are to the first mode with the same loss: ``branches`` for rDPO, ``trl`` for DPO.
- A ratio's prediction is the ratio of operations. Where times differ from it, ``--profile`` says what they were spent
  on: every operation timed by itself.

Shapes: ``llava`` and ``qwen`` are LLaVA-1.5-7B and Qwen2.5-VL-3B scaled down to two CPU cores, tower and head with
their shares of the real models' steps; ``tiny`` and ``tiny-qwen`` are for tests; ``llava-7b`` and ``qwen-3b`` have the
real sizes. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from benchmarks.measure import count_work, matmul_rate, peak_memory, profile, time_steps
from benchmarks.modes import BASELINES, MODES, Contest, Data, Step, different_tokens
from benchmarks.report import ModeResult, Report, environment, mode_result
from benchmarks.shapes import SHAPES, Shape, make_checkpoint
from benchmarks.sweep import SWEEP_MODES, SWEEPS, draw, run_sweeps, sweep_table


@dataclass(frozen=True)
class Settings:
    """How to measure, whatever is measured.

    Args:
        modes: names of modes.
        repeats: turns.
        device: of the models.
        dtype: of their weights.
        rank: of the adapters.
        threads: of a CPU.
        memory: whether to measure memory.
        profile: whether to time every operation.
        peak: the device's operations a second by its data sheet.
    """

    modes: Sequence[str]
    repeats: int
    device: torch.device
    dtype: torch.dtype
    rank: int
    threads: int
    memory: bool
    profile: bool
    peak: float | None = None

    def contest(self, folder: Path) -> Contest:
        """The models in a folder."""
        return Contest(folder, self.device, self.dtype, self.rank)


def measure(shape: Shape, folder: Path, settings: Settings, memory: Mapping[str, int] | None = None) -> Report:
    """Measure all modes on one shape.

    Args:
        shape: model and data.
        folder: its checkpoint.
        settings: how.
        memory: bytes by mode, if they were measured before.

    Returns:
        What was found.
    """
    contest = settings.contest(folder)
    data = contest.data(shape)
    tokens = describe_tokens(contest, data, settings.modes)
    steps = [contest.step(name, data) for name in settings.modes]
    _say("counting")
    works = {step.name: count_work(step) for step in steps}
    _say("timing")
    rate_of = partial(matmul_rate, settings.device, settings.dtype)
    times, rates = time_steps(steps, settings.repeats, rate_of)
    rate = statistics.median(rates)
    profiles = {step.name: profile(step) for step in steps} if settings.profile else {}
    if settings.memory and memory is None:
        _say("memory")
        memory = _memory(steps, shape, folder, settings)
    modes: list[ModeResult] = []
    for name in settings.modes:
        baseline = works.get(BASELINES[MODES[name].group])
        peaks = (memory or {}).get(name), settings.peak
        modes.append(mode_result(name, works[name], baseline, times[name], rate, *peaks, profiles.get(name)))
    header = environment(settings.device, settings.dtype, settings.repeats, rate)
    return Report(header, asdict(shape), tokens, rate, modes)


def describe_tokens(contest: Contest, data: Data, modes: Sequence[str]) -> dict[str, str]:
    """Tokens of every row, and whether TRL's collator makes the same.

    Raises:
        RuntimeError: if it does not; the steps could not be compared.
    """
    described = {}
    for name in ("chosen", "rejected", "visual"):
        view = getattr(data.batch, name)
        whole, response = view.tokens["attention_mask"].sum(dim=1).tolist(), view.lengths.tolist()
        described[f"{name} rows"] = ", ".join(f"{w} ({r} response)" for w, r in zip(whole, response, strict=True))
    if any(mode.startswith("trl") for mode in modes):
        difference = different_tokens(data.batch, contest.trl_inputs(data))
        if difference is not None:
            raise RuntimeError(f"TRL's collator and the package's make different rows of the same pairs: {difference}.")
        described["TRL's rows"] = "the same tokens and response masks"
    return described


# ---- memory


def _memory(steps: Sequence[Step], shape: Shape, folder: Path, settings: Settings) -> dict[str, int]:
    if settings.device.type == "cuda":
        return {step.name: peak_memory(step) for step in steps}
    return {step.name: in_fresh_process(memory_of, step.name, [(shape, folder)], settings)[0] for step in steps}


def memory_of(name: str, points: Sequence[tuple[Shape, Path]], settings: Settings) -> list[int]:
    """Peak memory of a mode on some shapes; to be called in a fresh process.

    Args:
        name: of the mode.
        points: shapes with their checkpoints.
        settings: how to measure.
    """
    torch.set_num_threads(settings.threads)
    _quiet()
    found = []
    for shape, folder in points:
        contest = settings.contest(folder)
        contest.step(name, contest.data(shape.smaller())).run()
        found.append(peak_memory(contest.step(name, contest.data(shape))))
    return found


def in_fresh_process(
    function: Callable[[str, Sequence[tuple[Shape, Path]], Settings], list[int]],
    name: str,
    points: Sequence[tuple[Shape, Path]],
    settings: Settings,
) -> list[int]:
    """Call a function in a process of its own, whose allocator gives back to the system what is freed."""
    # glibc keeps what is below this threshold, and raises it by itself unless it is set.
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, returning), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, name, points, settings).result()


# ---- command line


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _quiet() -> None:
    """Keep progress bars and the deprecations of others out of the tables."""
    warnings.simplefilter("ignore", FutureWarning)
    messages: Any = transformers.utils.logging
    messages.disable_progress_bar()
    messages.set_verbosity_error()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llava")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), help="default: all; in a sweep, six")
    parser.add_argument("--repeats", type=int, help="turns; default: 5, in a sweep 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; default: 16")
    parser.add_argument("--threads", type=int, default=_cores(), help="default: the machine's cores")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    parser.add_argument(
        "--profile", action=argparse.BooleanOptionalAction, help="time every operation; default: on GPUs"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device's data sheet: prints MFU")
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps the models; default: a temporary one")
    parser.add_argument("--sweep", nargs="+", choices=[*SWEEPS, "all"], help="measure a small model at several sizes")
    parser.add_argument("--plot", type=Path, help="draw the sweep into this file (PNG, SVG)")
    parser.add_argument("--draw", type=Path, help="draw the sweep in this JSON file, and measure nothing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(arguments: argparse.Namespace, modes: Sequence[str], repeats: int) -> Settings:
    device = torch.device(arguments.device)
    return Settings(
        modes=list(dict.fromkeys(arguments.modes or modes)),
        repeats=arguments.repeats or repeats,
        device=device,
        dtype=getattr(torch, arguments.dtype),
        rank=arguments.rank,
        threads=arguments.threads,
        memory=arguments.memory,
        profile=device.type == "cuda" if arguments.profile is None else arguments.profile,
        peak=None if arguments.peak_tflops is None else arguments.peak_tflops * 1e12,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        0.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.plot is not None and given.sweep is None and given.draw is None:
        parser.error("--plot draws a sweep: add --sweep, or --draw FILE")
    if given.draw is not None:
        draw(json.loads(given.draw.read_text(encoding="utf-8")), given.plot or given.draw.with_suffix(".png"))
        return 0
    for file in (given.json, given.plot):
        # A place that cannot be written to must show before the measurements.
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    _quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.checkpoints or Path(temporary)
        found = _shape(given, folder) if given.sweep is None else _sweep(given, folder)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.sweep is not None and given.plot is not None:
        draw(found, given.plot)
    return 0


def _shape(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One shape, all modes: tables."""
    settings, shape = _settings(given, list(MODES), repeats=5), SHAPES[given.shape]
    checkpoint = make_checkpoint(shape, folder / f"{given.shape}-{given.dtype}", settings.device, settings.dtype)
    report = measure(shape, checkpoint, settings)
    print(report.text())
    return report.as_json()


def _sweep(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A small model at many sizes: a table for each, and the plot."""
    settings = _settings(given, SWEEP_MODES, repeats=2)
    names = list(SWEEPS) if "all" in given.sweep else given.sweep

    def checkpoint(shape: Shape) -> Path:
        vocabulary = folder / f"{shape.name}-{shape.vocabulary}-{given.dtype}"
        return make_checkpoint(shape, vocabulary, settings.device, settings.dtype)

    def measure_memory(mode: str, points: Sequence[tuple[Shape, Path]]) -> list[int]:
        return in_fresh_process(memory_of, mode, points, settings)

    in_processes = settings.memory and settings.device.type == "cpu"
    found = run_sweeps(
        names,
        settings.modes,
        checkpoint,
        lambda shape, path, memory: measure(shape, path, settings, memory),
        measure_memory if in_processes else None,
    )
    for name, points in found["sweeps"].items():
        print(f"{SWEEPS[name].label}\n\n{sweep_table(points)}\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
