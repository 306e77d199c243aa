"""A sweep as a picture: what is gained over what is lost elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign_lightning.evaluation.looks import BLUE, FAINT, INK, MUTED, VERMILION, check_matplotlib
from realign_lightning.evaluation.strength.sweep import Axis, Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Shapes say the same as colours.
_FRONT, _OTHER, _SUGGESTED = BLUE, "#9aa3ad", VERMILION

_LETTER, _LINE = 5.0, 9.0
"""Width of a letter and height of a line of the points' labels, in points of print."""


def draw(sweep: Sweep, path: Path) -> None:
    """Draw the score over the skill, one point per strength, with Pareto's front and the suggested point.

    Without a skill the score is drawn over the strength. Better is up, and to the right. Intervals are drawn where
    points have them.

    Args:
        sweep: what to draw.
        path: the PNG file.

    Raises:
        ImportError: if matplotlib is not there.
    """
    check_matplotlib("sweep", "--picture false")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    if sweep.skill_axis is None:
        _draw_over_strength(axes, sweep)
    else:
        _draw_front(axes, sweep, sweep.skill_axis)
    _frame(axes)
    axes.set_title(_title(sweep), loc="left", size=11, weight="bold", color=INK, parse_math=False)
    figure.savefig(path, dpi=150, format="png")


def _title(sweep: Sweep) -> str:
    dial = "Strength of the adapter" if sweep.dial == "strength" else sweep.dial
    strength = f"{sweep.suggested.strength:g}"
    if sweep.keeps_skill:
        return f"{dial}: {strength} is suggested"
    return f"{dial}: none loses at most {sweep.tolerance:g}, {strength} loses least"


def _draw_over_strength(axes: Axes, sweep: Sweep) -> None:
    strengths, scores = zip(*((point.strength, point.score) for point in sweep.points), strict=True)
    axes.plot(strengths, scores, "o-", color=_FRONT, ms=5)
    _ring(axes, sweep, sweep.suggested.strength)
    axes.set_xlabel("strength (0 is the base model, 1 as trained)" if sweep.dial == "strength" else sweep.dial)
    _point_up(axes, sweep)


def _draw_front(axes: Axes, sweep: Sweep, skill_axis: Axis) -> None:
    shown = [point for point in sweep.points if point.skill is not None]
    axes.plot([_skill(point) for point in shown], [point.score for point in shown], "-", color=FAINT, lw=1.2, zorder=1)
    for point in shown:
        halves: dict[str, Any] = {"xerr": point.skill_half, "yerr": point.score_half}
        axes.errorbar(_skill(point), point.score, **halves, fmt="none", ecolor=FAINT, elinewidth=1.4, zorder=2)
    front = sweep.front
    for group, color, marker, label in (
        ([point for point in shown if point not in front], _OTHER, "o", "beaten by another point"),
        ([point for point in shown if point in front], _FRONT, "D", "front: nothing gained without a loss"),
    ):
        if group:
            places = [_skill(point) for point in group], [point.score for point in group]
            axes.scatter(*places, color=color, marker=marker, s=34, zorder=3, label=label)
    _ring(axes, sweep, _skill(sweep.suggested))
    first = sweep.first_skill
    assert first is not None  # noqa: S101 - points have skills
    lowest = first - skill_axis.worth(sweep.tolerance)
    label = f"the base's skill less {sweep.tolerance:g}"
    axes.axvline(lowest, color=MUTED, lw=1, ls=":", zorder=0, label=label)
    axes.set_xlabel(sweep.title(skill_axis) + ("" if skill_axis.higher_is_better else " (lower is better: right)"))
    if not skill_axis.higher_is_better:
        axes.invert_xaxis()
    _point_up(axes, sweep)
    _label(axes, shown)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write strengths beside their points; only where axes have their last limits."""
    axes.autoscale_view()
    values = [(_skill(point), point.score) for point in points]
    places = axes.transData.transform(values) * 72 / axes.figure.dpi
    for first, label in joined_labels([(x, y) for x, y in places], [point.strength for point in points]):
        axes.annotate(label, values[first], (5, 5), textcoords="offset points", size=8.5, color=INK)


def joined_labels(places: Sequence[tuple[float, float]], strengths: Sequence[float]) -> list[tuple[int, str]]:
    """Labels of points, one for all whose labels would be printed on each other.

    Args:
        places: of the points on the paper, in points of print.
        strengths: one per place.

    Returns:
        For every label, the index of the point furthest to the left, where it begins, and what it says.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda one: places[one][0]):
        x, y = places[index]
        for group in groups:
            left, height = places[group[0]]
            if x - left < _LETTER * len(_joined(strengths, group)) and abs(y - height) < _LINE:
                group.append(index)
                break
        else:
            groups.append([index])
    return [(group[0], _joined(strengths, group)) for group in groups]


def _joined(strengths: Sequence[float], group: Sequence[int]) -> str:
    return ", ".join(f"{strength:g}" for strength in sorted(strengths[index] for index in group))


def _skill(point: Point) -> float:
    return float("nan") if point.skill is None else point.skill


def _point_up(axes: Axes, sweep: Sweep) -> None:
    """Let better be up."""
    is_up = sweep.score_axis.higher_is_better
    axes.set_ylabel(sweep.title(sweep.score_axis) + ("" if is_up else " (lower is better: up)"))
    if not is_up:
        axes.invert_yaxis()


def _ring(axes: Axes, sweep: Sweep, x: float) -> None:
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": _SUGGESTED, "linewidths": 2.2}
    axes.scatter([x], [sweep.suggested.score], s=190, zorder=4, label=sweep.verdict, **style)


def _frame(axes: Axes) -> None:
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
