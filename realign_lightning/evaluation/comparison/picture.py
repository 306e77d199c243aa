"""One picture of a comparison: every difference with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from realign_lightning.evaluation.comparison.pairing import Comparison, Delta
from realign_lightning.evaluation.comparison.report import shown
from realign_lightning.evaluation.looks import BLUE, FAINT, INK, MUTED, VERMILION, check_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Shapes say the same as colours.
_LOOKS = {
    "better": (BLUE, "^", "better"),
    "worse": (VERMILION, "v", "worse"),
    "unclear": ("#6b7280", "o", "unclear: the interval holds 0"),
    "differs": ("#000000", "D", "differs; neither direction is better"),
}
_ROW = 0.3
"""Inches."""

_WIDTH = 9.0
_LONGEST = 34
"""Characters of a label."""


class _Panel(NamedTuple):
    """Rows that share an axis: all scores in percentage points, or one that is in a unit of its own."""

    scale: float
    deltas: list[tuple[str, Delta]]

    @property
    def rows(self) -> int:
        """With a line for the name of each benchmark."""
        return len(self.deltas) + len({name for name, _ in self.deltas})


def draw(comparison: Comparison, path: Path) -> None:
    """Draw every difference with its interval, by benchmark; better and worse differ in colour and in shape.

    Scores in percentage points share an axis, others have one each. Readable without colour.

    Args:
        comparison: with at least one score.
        path: the PNG file.

    Raises:
        ImportError: if matplotlib is not there.
    """
    check_matplotlib("comparison", "--no-picture")
    from matplotlib.figure import Figure

    panels = _panels(comparison)
    heights = [panel.rows * _ROW + 0.55 for panel in panels]
    top, gap = 0.9, 0.1
    height = sum(heights) + gap * (len(panels) - 1) + top + 0.15
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    _title(figure, comparison, height)
    above = top
    for panel, size in zip(panels, heights, strict=True):
        box = (0.29, 1 - (above + size - 0.45) / height, 0.42, (size - 0.55) / height)
        _draw_panel(figure.add_axes(box), panel)
        above += size + gap
    figure.savefig(path, dpi=160, format="png")


def _title(figure: Any, comparison: Comparison, height: float) -> None:
    from matplotlib.lines import Line2D

    first, second = (_short(name) for name in comparison.names)
    style = {"parse_math": False, "ha": "left", "va": "top"}
    figure.text(0.02, 1 - 0.12 / height, f"{second} minus {first}", size=13, weight="bold", color=INK, **style)
    how = comparison.resampling
    said = (
        f"difference with {100 * how.confidence:g} % interval, paired bootstrap of {how.resamples:,} resamples; "
        "\u2191 higher is better, \u2193 lower is better"
    )
    figure.text(0.02, 1 - 0.38 / height, said, size=9, color=MUTED, **style)
    used = {delta.reading for one in comparison.benchmarks for delta in one.deltas}
    marks = [
        Line2D([], [], color=color, marker=marker, lw=1.8, ms=7, label=label)
        for reading, (color, marker, label) in _LOOKS.items()
        if reading in used
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (0.012, 1 - 0.55 / height), "borderaxespad": 0.0}
    figure.legend(handles=marks, ncols=len(marks), frameon=False, fontsize=9, labelcolor=INK, **place)


def _panels(comparison: Comparison) -> list[_Panel]:
    rows = [(one.name, delta) for one in comparison.benchmarks for delta in one.deltas]
    points = [row for row in rows if row[1].score.scale == 100]
    others = [_Panel(row[1].score.scale, [row]) for row in rows if row[1].score.scale != 100]
    return ([_Panel(100, points)] if points else []) + others


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    places = iter(range(panel.rows))
    for name, rows in groupby(panel.deltas, key=lambda row: row[0]):
        _label(axes, next(places), _short(name), bold=True)
        for _, delta in rows:
            _draw_row(axes, next(places), delta)
    axes.set_ylim(panel.rows - 0.5, -0.5)
    axes.axvline(0, color=INK, lw=1, zorder=1)
    _frame(axes, panel)


def _frame(axes: Axes, panel: _Panel) -> None:
    ends = [end * panel.scale for _, delta in panel.deltas for end in _ends(delta)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.08 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_yticks([])
    axes.grid(axis="x", color=FAINT, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0, labelsize=8.5, labelcolor=MUTED)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    unit = "percentage points" if panel.scale == 100 else "in the score's own unit"
    axes.set_xlabel(unit, size=8.5, color=MUTED, labelpad=2)


def _ends(delta: Delta) -> Sequence[float]:
    ends = (delta.value, delta.interval.low, delta.interval.high)
    return [end for end in ends if end == end]


def _draw_row(axes: Axes, place: int, delta: Delta) -> None:
    color, marker, _ = _LOOKS[delta.reading]
    scale = delta.score.scale
    ends = (delta.interval.low * scale, delta.interval.high * scale)
    axes.plot(ends, (place, place), color=color, lw=2.2, solid_capstyle="round", zorder=2)
    axes.plot([delta.value * scale], [place], marker=marker, color=color, ms=7.5, mec="white", mew=0.8, zorder=3)
    _label(axes, place, _title_of(delta))
    low, high = (shown(end, scale, signed=True) for end in delta.interval[:2])
    said = f"{shown(delta.value, scale, signed=True)}  [{low}, {high}]"
    across: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    axes.text(1.03, place, said, size=9.5, color=INK, **across)


def _title_of(delta: Delta) -> str:
    arrow = {True: " \u2191", False: " \u2193", None: ""}[delta.score.higher_is_better]
    return f"{_short(delta.score.title)}{arrow}"


def _label(axes: Axes, place: int, text: str, bold: bool = False) -> None:
    across: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    axes.text(-0.64 if bold else -0.61, place, text, size=10, weight="bold" if bold else "normal", color=INK, **across)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
