"""How the cost of a step grows with image tokens, response, vocabulary and batch, and a plot of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import Report, table
from benchmarks.shapes import Grid, Shape

SWEEP_MODES = ("rdpo", "rdpo_cached", "dpo", "trl", "padded_rows", "branches")

BASE = Shape(
    *("sweep", "qwen", 384, 2, 3, 1, 2064, 2048, 128, 2, 2, 344, (((24, 24), (24, 24)),)),
    full_attention=(1,),
    prompt=20,
    pairs=1,
    tied=True,
)
"""A small Qwen-VL, whose pictures may have any size: one pair with 576 image tokens and 120 response tokens."""

_GRIDS: dict[int, Grid] = {144: (12, 12), 576: (24, 24), 1440: (40, 36), 2880: (60, 48)}


@dataclass(frozen=True)
class Sweep:
    """One quantity that varies.

    Args:
        label: for the axis.
        values: in rising order.
        change: the shape with a value.
    """

    label: str
    values: Sequence[int]
    change: Callable[[int], Shape]


SWEEPS: dict[str, Sweep] = {
    "image_tokens": Sweep(
        "image tokens", tuple(_GRIDS), lambda value: replace(BASE, grids=((_GRIDS[value], _GRIDS[value]),))
    ),
    "response": Sweep("response tokens", (30, 120, 480, 960), lambda value: replace(BASE, response=value)),
    "vocabulary": Sweep("vocabulary", (2048, 8192, 32768, 131072), lambda value: replace(BASE, vocabulary=value)),
    "batch": Sweep("pairs in a batch", (1, 2, 4, 8), lambda value: replace(BASE, pairs=value)),
}


def run_sweeps(
    names: Sequence[str],
    modes: Sequence[str],
    checkpoint: Callable[[Shape], Path],
    measure: Callable[[Shape, Path, Mapping[str, int] | None], Report],
    measure_memory: Callable[[str, Sequence[tuple[Shape, Path]]], Sequence[int]] | None,
) -> dict[str, Any]:
    """Measure all modes at all points.

    Args:
        names: of :data:`SWEEPS`.
        modes: names of modes.
        checkpoint: makes the model of a shape.
        measure: measures a shape, given bytes by mode or None.
        measure_memory: bytes of a mode at every point, in a process of its own; None leaves memory to ``measure``.

    Returns:
        Figures by sweep, value and mode, in plain values.
    """
    shapes = {(name, value): SWEEPS[name].change(value) for name in names for value in SWEEPS[name].values}
    # Points that are the same in several sweeps are measured once.
    folders = {shape: checkpoint(shape) for shape in dict.fromkeys(shapes.values())}
    memory: dict[Shape, dict[str, int]] = {shape: {} for shape in folders}
    if measure_memory is not None:
        for mode in modes:
            print(f"memory of {mode}", file=sys.stderr)
            for shape, taken in zip(folders, measure_memory(mode, list(folders.items())), strict=True):
                memory[shape][mode] = taken
    reports = {}
    for number, (shape, folder) in enumerate(folders.items(), 1):
        print(f"point {number} of {len(folders)}", file=sys.stderr)
        reports[shape] = measure(shape, folder, None if measure_memory is None else memory[shape]).as_json()
    environment = next(iter(reports.values()))["environment"]
    points = {name: {str(value): reports[shapes[name, value]] for value in SWEEPS[name].values} for name in names}
    return {"environment": environment, "sweeps": points}


def sweep_table(points: Mapping[str, Any]) -> str:
    """Seconds, floor and memory of every mode at every value, in Markdown.

    Args:
        points: of one sweep in what :func:`run_sweeps` returns.
    """
    rows = [
        [mode, value, f"{figures['median']:.3f}", f"{figures['floor']:.3f}", _gigabytes(figures["memory"])]
        for value, point in points.items()
        for mode, figures in point["modes"].items()
    ]
    return table(["step", "value", "median s", "floor s", "GB"], rows)


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.3f}"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw time and memory of a step over what was varied, the floor of the time beside it.

    Args:
        found: from :func:`run_sweeps`.
        path: picture to write; its ending says which kind.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    # Only plots need it, and type checkers may not have it.
    figures: Any = importlib.import_module("matplotlib.figure")
    sweeps = found["sweeps"]
    figure = figures.Figure(figsize=(3.3 * len(sweeps) + 0.6, 6.6), layout="constrained")
    axes = figure.subplots(2, len(sweeps), sharey="row", squeeze=False)
    for column, (name, points) in enumerate(sweeps.items()):
        _draw_column(axes[:, column], SWEEPS[name], points)
    axes[0][0].set_ylabel("seconds a step\n(thin: floor by operations)")
    axes[1][0].set_ylabel("GB above the weights")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    about = found["environment"]
    figure.supxlabel(f"{about['device']}, {about['threads']} threads, {about['dtype']}, {about['matmul']}", fontsize=8)
    figure.savefig(path, dpi=130)


_COLORS = {
    "rdpo": "#0b5fa5",
    "rdpo_cached": "#4ea3e0",
    "dpo": "#2a9d4e",
    "trl": "#d1495b",
    "padded_rows": "#e39c37",
    "branches": "#7a5195",
}


def _draw_column(axes: Any, sweep: Sweep, points: Mapping[str, Any]) -> None:
    values = [int(value) for value in points]
    modes = list(next(iter(points.values()))["modes"])
    for mode in modes:
        figures = [point["modes"][mode] for point in points.values()]
        color = _COLORS.get(mode)
        axes[0].plot(values, [figure["median"] for figure in figures], "o-", color=color, label=mode, markersize=4)
        axes[0].plot(values, [figure["floor"] for figure in figures], "--", color=color, linewidth=0.8)
        if all(figure["memory"] is not None for figure in figures):
            axes[1].plot(values, [figure["memory"] / 1e9 for figure in figures], "o-", color=color, markersize=4)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(values, [f"{value:,}".replace(",", " ") for value in values])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[1].set_xlabel(sweep.label)
