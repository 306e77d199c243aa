"""What a run of the step benchmark found, as tables and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import PARTS, Kind, Part, Times, Work
from benchmarks.modes import BASELINES, MODES, NOTES

BARS: dict[str, dict[str, float]] = {
    "llava": {
        "rdpo / trl, time": 1.10,
        "rdpo_cached / trl, time": 0.75,
        "dpo / trl, time": 0.65,
        "rdpo / padded_rows, time": 0.72,
        "rdpo / padded_rows, memory": 0.65,
        "rdpo / branches, time": 0.65,
    },
    "qwen": {
        "rdpo / trl, time": 0.90,
        "rdpo_cached / trl, time": 0.62,
        "dpo / trl, time": 0.60,
        "rdpo / padded_rows, time": 0.72,
        "rdpo / padded_rows, memory": 0.65,
        "rdpo / branches, time": 0.65,
    },
}
"""Ratios that the package is to stay below, by shape."""

PAIRS = (
    *(("rdpo", "trl"), ("rdpo_cached", "trl"), ("dpo", "trl"), ("dpo_cached", "trl")),
    *(("rdpo", "trl_fused"), ("rdpo_cached", "trl_fused"), ("dpo", "trl_fused")),
    *(("rdpo", "padded_rows"), ("rdpo", "branches"), ("rdpo", "rdpo_no_sharing")),
)
"""Modes whose ratios are printed."""

TOLERANCE = 0.10
"""How far a ratio of times may be from the ratio of operations before a profile has to explain it."""


@dataclass(frozen=True)
class ModeResult:
    """One mode's figures.

    Args:
        name: of the mode.
        seconds: of every repeat.
        cpu_seconds: processor time of every repeat, of all threads together.
        flops: operations by part.
        images: pictures encoded.
        positions: positions of the language model.
        loss: value of the loss.
        loss_difference: from the group's baseline, absolute.
        gradient_difference: largest difference of an entry from the baseline's gradient.
        gradient_relative: norm of the difference over the norm of the baseline's gradient.
        floor: seconds that the operations take at the measured rate.
        memory: bytes above the weights; None where it was not measured.
        mfu: share of the device's peak; None where that is unknown.
        profile: share of the time by part and kind of operation; None where it was not measured.
    """

    name: str
    seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    flops: Mapping[str, float]
    images: int
    positions: int
    loss: float
    loss_difference: float | None
    gradient_difference: float | None
    gradient_relative: float | None
    floor: float
    memory: int | None = None
    mfu: float | None = None
    profile: Mapping[str, float] | None = None

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)

    @property
    def total_flops(self) -> float:
        """Operations of all parts."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Ratio:
    """One mode's cost over another's.

    Args:
        name: for example ``rdpo / trl, time``.
        measured: ratio of medians, or of memory.
        fastest: ratio of the fastest repeats, which other work on the machine disturbs less; None for memory.
        cpu: ratio of medians of processor time, which it disturbs least with one thread; None for memory.
        predicted: ratio of operations; None for memory.
        bar: what it is to stay below; None if nobody says.
    """

    name: str
    measured: float
    fastest: float | None
    cpu: float | None
    predicted: float | None
    bar: float | None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met."""
        return None if self.bar is None else self.measured <= self.bar

    @property
    def as_predicted(self) -> bool | None:
        """Whether the ratio of times is within :data:`TOLERANCE` of that of operations."""
        return None if self.predicted is None else abs(self.measured / self.predicted - 1) <= TOLERANCE


@dataclass(frozen=True)
class Report:
    """A whole run.

    Args:
        environment: versions, machine and settings.
        shape: the model and data.
        tokens: of every row, by view, and whether TRL's are the same.
        rate: operations a second of a large matrix product, the median.
        modes: in the order of the run.
    """

    environment: Mapping[str, Any]
    shape: Mapping[str, Any]
    tokens: Mapping[str, Any]
    rate: float
    modes: Sequence[ModeResult] = field(default_factory=list)

    def ratios(self) -> list[Ratio]:
        """Ratios of the modes that were run."""
        bars, found = BARS.get(str(self.shape["name"]), {}), {mode.name: mode for mode in self.modes}
        ratios = []
        for first, second in PAIRS:
            if first in found and second in found:
                ratios += _ratios(found[first], found[second], bars)
        return ratios

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        modes = {mode.name: {**asdict(mode), "median": mode.median} for mode in self.modes}
        ratios = [{**asdict(ratio), "met": ratio.met, "as_predicted": ratio.as_predicted} for ratio in self.ratios()]
        return {**asdict(self), "modes": modes, "ratios": ratios}

    def text(self) -> str:
        """The tables, in Markdown."""
        blocks = [
            _lines(self.environment),
            _lines(self.tokens),
            _modes_table(self.modes),
            self._shares(),
            _ratios_table(self.ratios()),
            _profile_table(self.modes),
            "\n".join(f"- {mode.name}: {MODES[mode.name].text}" for mode in self.modes),
            "\n".join(f"- {note}" for note in NOTES) if any(mode.name.startswith("trl") for mode in self.modes) else "",
        ]
        return "\n\n".join(block for block in blocks if block)

    def _shares(self) -> str:
        """Parts of TRL's default step, beside those of the model that the shape stands for."""
        trl = next((mode for mode in self.modes if mode.name == "trl"), None)
        if trl is None:
            return ""
        real = self.shape["real_shares"]
        shares = [trl.flops[part] / trl.total_flops for part in ("vision", "head")]
        wanted = "" if real is None else f" (about {real[0]:.0%} and {real[1]:.0%} wanted)"
        return f"Operations of TRL's default step: vision {shares[0]:.1%}, head {shares[1]:.1%}{wanted}."


def environment(device: torch.device, dtype: torch.dtype, repeats: int, rate: float) -> dict[str, Any]:
    """Versions and the machine.

    Args:
        device: that steps ran on.
        dtype: of the weights.
        repeats: of every mode.
        rate: measured, operations a second.
    """
    packages = ("torch", "transformers", "peft", "trl", "lightning")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
        ),
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "load average": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        "repeats": repeats,
        "matmul": f"{rate / 1e9:.0f} GFLOP/s",
    }


def mode_result(
    name: str,
    work: Work,
    baseline: Work | None,
    times: Times,
    rate: float,
    memory: int | None = None,
    peak: float | None = None,
    profile: Mapping[tuple[Part, Kind], float] | None = None,
) -> ModeResult:
    """Put a mode's measurements together.

    Args:
        name: of the mode.
        work: what it computes.
        baseline: what its group's baseline computes; None if that was not run.
        times: of every repeat.
        rate: measured operations a second.
        memory: bytes above the weights.
        peak: the device's operations a second by its data sheet.
        profile: seconds by part and kind of operation.
    """
    difference = None if baseline is None else work.gradient - baseline.gradient
    whole = sum((profile or {}).values())
    return ModeResult(
        name=name,
        seconds=times.wall,
        cpu_seconds=times.cpu,
        flops=work.flops,
        images=work.images,
        positions=work.positions,
        loss=work.loss,
        loss_difference=None if baseline is None else abs(work.loss - baseline.loss),
        gradient_difference=None if difference is None else float(difference.abs().max()),
        gradient_relative=(
            None if difference is None or baseline is None else float(difference.norm() / baseline.gradient.norm())
        ),
        floor=work.total / rate,
        memory=memory,
        mfu=None if peak is None else work.total / statistics.median(times.wall) / peak,
        profile=None if profile is None else {", ".join(place): value / whole for place, value in profile.items()},
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(width) if column else text.ljust(width) for column, (text, width) in _columns(row, widths)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if column else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def _columns(row: Sequence[str], widths: Sequence[int]) -> Iterable[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _modes_table(modes: Sequence[ModeResult]) -> str:
    header = ["step", "median s", "min - max", "CPU s", "floor s", "GB", "images", "positions", "TFLOP", *PARTS]
    header += ["loss", "difference", "max gradient difference", "relative"]
    has_mfu = any(mode.mfu is not None for mode in modes)
    return table(
        [*header, *(["MFU"] if has_mfu else [])],
        ([*_figures(mode), *([_or_none(mode.mfu, ".1%")] if has_mfu else [])] for mode in modes),
    )


def _figures(mode: ModeResult) -> list[str]:
    baseline = mode.name in BASELINES.values()
    return [
        mode.name,
        f"{mode.median:.3f}",
        f"{min(mode.seconds):.3f} - {max(mode.seconds):.3f}",
        f"{statistics.median(mode.cpu_seconds):.3f}",
        f"{mode.floor:.3f}",
        _or_none(None if mode.memory is None else mode.memory / 1e9, ".3f"),
        str(mode.images),
        str(mode.positions),
        f"{mode.total_flops / 1e12:.4f}",
        *(f"{mode.flops[part] / mode.total_flops:.1%}" for part in PARTS),
        f"{mode.loss:.6f}",
        "baseline" if baseline else _or_none(mode.loss_difference, ".1e"),
        "baseline" if baseline else _or_none(mode.gradient_difference, ".1e"),
        "baseline" if baseline else _or_none(mode.gradient_relative, ".1e"),
    ]


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratios(first: ModeResult, second: ModeResult, bars: Mapping[str, float]) -> list[Ratio]:
    name = f"{first.name} / {second.name}"
    predicted = first.total_flops / second.total_flops
    fastest = min(first.seconds) / min(second.seconds)
    cpu = statistics.median(first.cpu_seconds) / statistics.median(second.cpu_seconds)
    bar = bars.get(f"{name}, time")
    ratios = [Ratio(f"{name}, time", first.median / second.median, fastest, cpu, predicted, bar)]
    if first.memory is not None and second.memory:
        memory = first.memory / second.memory
        ratios.append(Ratio(f"{name}, memory", memory, None, None, None, bars.get(f"{name}, memory")))
    return ratios


def _ratios_table(ratios: Sequence[Ratio]) -> str:
    words = {None: "-", True: "yes", False: "no"}
    rows = (
        [
            ratio.name,
            f"{ratio.measured:.3f}",
            _or_none(ratio.fastest, ".3f"),
            _or_none(ratio.cpu, ".3f"),
            _or_none(ratio.predicted, ".3f"),
            words[ratio.as_predicted],
            _or_none(ratio.bar, ".2f"),
            words[ratio.met],
        ]
        for ratio in ratios
    )
    header = [
        "ratio",
        "of medians",
        "of fastest",
        "of CPU time",
        "predicted by operations",
        f"within {TOLERANCE:.0%}",
        "bar",
        "met",
    ]
    return table(header, rows) if ratios else ""


def _profile_table(modes: Sequence[ModeResult]) -> str:
    profiles = {mode.name: mode.profile for mode in modes if mode.profile is not None}
    places = sorted({place for shares in profiles.values() for place in shares})
    rows = ([name, *(f"{shares.get(place, 0):.1%}" for place in places)] for name, shares in profiles.items())
    return "" if not profiles else "Share of the time:\n\n" + table(["step", *places], rows)
