"""Raw numbers of benchmarks/evidence.py as CSV, and from them the tables, pictures and page of docs/evidence.md."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from benchmarks.evidence_jobs import BASE, Choice, Job, Plan, Run
from benchmarks.evidence_settings import NUMBERED, Choosing, Claim, Experiment, Measure
from benchmarks.evidence_statistics import Estimate, difference, estimate
from realign_lightning.evaluation.looks import BLUE, FAINT, INK, MUTED, VERMILION
from realign_lightning.evaluation.report import markdown_table
from realign_lightning.evaluation.strength.picture import draw as draw_sweep
from realign_lightning.evaluation.strength.sweep import Axis, Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
_Named = str | tuple[str, float | None]

TRADED = (MUTED, BLUE, "#009E73", VERMILION)
"""Colours of methods whose trades are drawn; the third is Okabe and Ito's, too."""

_LINES = ("-", "--", "-.", ":")
_FARTHEST = -3.0
"""Points of the skills that are lost; what costs more is beyond the picture."""

AGAINST = (BASE, "sft", "dpo")
"""Methods that all others are compared with, as far as they are there."""


# ---- raw numbers


def write_raw(plan: Plan, folder: Path, workers: int) -> None:
    """Write every number that was measured: of grid, choices, methods, ablations, dial and stages.

    Args:
        plan: all of whose jobs are done.
        folder: made if needed.
        workers: processes that did them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    choices, experiment = plan.choices(), plan.experiment
    _write_csv(folder / "grid.csv", _rows(plan, plan.grid_jobs()))
    _write_csv(folder / "choices.csv", [_choice_row(*key, choice) for key, choice in choices.items()])
    _write_csv(folder / "methods.csv", _rows(plan, plan.method_jobs(choices)))
    if experiment.ablation_seeds:
        _write_csv(folder / "ablations.csv", _rows(plan, plan.ablation_jobs(choices)))
    if dials := plan.dial_jobs(choices):
        _write_csv(folder / "dial.csv", _rows(plan, dials))
    _write_csv(folder / "stages.csv", plan.stages(choices, workers))


def _rows(plan: Plan, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    rows = []
    for single in [one for job in jobs for one in job.singles()]:
        (run,) = single.runs
        for strength, scores in zip(run.strengths, plan.scores(single), strict=True):
            rows.append({**_labels(single, run), "strength": strength, **scores})
    return rows


def _labels(job: Job, run: Run) -> dict[str, Any]:
    world = "" if run.method is None else job.world
    return {"seed": job.seed, "world": world, "method": run.name, "rate": run.rate}


def _choice_row(world: str, method: str, choice: Choice) -> dict[str, Any]:
    return {"world": world, "method": method, **asdict(choice)}


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _plain(value) for name, value in row.items()})


def _plain(value: Any) -> Any:
    return f"{value:.10g}" if isinstance(value, float) else value


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Raw:
    """The numbers of one CSV file.

    Args:
        path: of the file.
        seeds: whose; None for all.
    """

    def __init__(self, path: Path, seeds: Sequence[int] | None = None) -> None:
        self.rows = [row for row in _read_csv(path) if seeds is None or int(row["seed"]) in seeds]

    def at_rate(self, rate: float) -> Raw:
        """The numbers of one learning rate, and those of policies as they were taught.

        Args:
            rate: the learning rate.
        """
        found = copy(self)
        found.rows = [row for row in self.rows if row["method"] == BASE or math.isclose(float(row["rate"]), rate)]
        return found

    def values(self, world: str, method: str, key: str, strength: float | None = None) -> dict[int, float]:
        """A score of a method by seed.

        Args:
            world: name; the policy as it was taught is of none.
            method: name.
            key: of the score.
            strength: of the adapter, where there are several.

        Raises:
            KeyError: if nothing was measured.
            ValueError: if a seed has several scores: of several rates or strengths.
        """
        wanted = "" if method == BASE else world
        rows = [
            row
            for row in self.rows
            if row["method"] == method
            and row["world"] == wanted
            and (strength is None or math.isclose(float(row["strength"]), strength))
        ]
        if not rows:
            raise KeyError(f"no {key!r} of {method!r} in {world!r}")
        found = {int(row["seed"]): float(row[key]) for row in rows}
        if len(found) < len(rows):
            raise ValueError(f"Expected one {key!r} of {method!r} in {world!r} per seed: say which rate and strength.")
        return found


# ---- what is and is not shown


class Verdict(NamedTuple):
    """What became of a claim in one world.

    Args:
        claim: the sentence.
        world: name.
        found: paired difference, turned so that more is better.
        holds: whether the interval bears the claim out.
        fails: whether it bears out the opposite.
    """

    claim: Claim
    world: str
    found: Estimate
    holds: bool
    fails: bool

    def line(self, measure: Measure) -> str:
        """The sentence, with its numbers, and with the reason where it does not hold.

        Args:
            measure: of the claim.
        """
        sign = _sign(measure)
        shown = Estimate(sign * self.found.mean, self.found.half, self.found.policies).shown(2, signed=True)
        line = f"{self.claim.text}, {self.world} world: {measure.title} {shown}"
        reason = None if self.holds else self.claim.reasons.get(self.world)
        return line if reason is None else f"{line}. {reason}"


def judge(experiment: Experiment, raw: Raw) -> list[Verdict]:
    """Every claim in every world.

    Args:
        experiment: makes the claims.
        raw: numbers of the methods.
    """
    return [_judge(experiment, raw, claim, world) for claim in experiment.claims for world in experiment.world.names]


def _judge(experiment: Experiment, raw: Raw, claim: Claim, world: str) -> Verdict:
    measure = measure_of(experiment, claim.measure)
    sign = _sign(measure)
    mean, half, policies = _compared(raw, world, claim.method, claim.against, claim.measure)
    found = Estimate(sign * mean, half, policies)
    least = 0.0 if claim.at_most_lost is None else -claim.at_most_lost
    return Verdict(claim, world, found, found.mean - half > least, found.mean + half < least)


def _compared(raw: Raw, world: str, name: _Named, against: _Named, key: str) -> Estimate:
    """The paired difference of a method to another; both have to know the same policies."""
    values, others = (
        raw.values(world, one, key) if isinstance(one, str) else raw.values(world, one[0], key, one[1])
        for one in (name, against)
    )
    if values.keys() != others.keys():
        raise ValueError(f"Expected {key!r} of {name!r} and {against!r} for the same seeds, got {values}, {others}.")
    return difference(list(values.values()), [others[seed] for seed in values])


def _mean(raw: Raw, world: str, name: str, key: str, strength: float | None = None) -> Estimate:
    return estimate(list(raw.values(world, name, key, strength).values()))


def _sign(measure: Measure) -> float:
    """What makes more better."""
    return -1.0 if measure.higher_is_better is False else 1.0


def measure_of(experiment: Experiment, key: str) -> Measure:
    """The measure of a score.

    Args:
        experiment: whose.
        key: of the score.
    """
    return next(measure for measure in experiment.measures if measure.key == key)


# ---- tables


def method_table(experiment: Experiment, raw: Raw, world: str) -> str:
    """Means with intervals, a row per measure and a column per method.

    Args:
        experiment: whose.
        raw: numbers of the methods.
        world: name.
    """
    names = [BASE, *experiment.methods]
    head = ["", "", *(_title(experiment, name) for name in names)]
    rows = [
        [measure.title, _arrow(measure), *(_cell(raw, world, name, measure) for name in names)]
        for measure in experiment.measures
    ]
    return markdown_table(head, rows, "ll" + "r" * len(names))


def difference_table(experiment: Experiment, raw: Raw, world: str, against: str) -> str:
    """Paired differences to a method; those whose interval is clear of zero in bold.

    Args:
        experiment: whose.
        raw: numbers of the methods.
        world: name.
        against: the method.
    """
    names = [name for name in (BASE, *experiment.methods) if name != against]
    head = ["", "", *(_title(experiment, name) for name in names)]
    rows = [
        [measure.title, _arrow(measure), *(_difference_cell(raw, world, name, against, measure) for name in names)]
        for measure in experiment.measures
    ]
    return markdown_table(head, rows, "ll" + "r" * len(names))


def versus_table(experiment: Experiment, raw: Raw, world: str, key: str) -> str:
    """Paired differences of every method (row) to every other (column) in one measure.

    Args:
        experiment: whose.
        raw: numbers of the methods.
        world: name.
        key: of the measure.
    """
    names, measure = [BASE, *experiment.methods], measure_of(experiment, key)
    rows = [
        [
            _title(experiment, name),
            *("" if name == other else _difference_cell(raw, world, name, other, measure) for other in names),
        ]
        for name in names
    ]
    head = [f"{measure.title} {_arrow(measure)}", *(_title(experiment, name) for name in names)]
    return markdown_table(head, rows, "l" + "r" * len(names))


def _cell(raw: Raw, world: str, name: str, measure: Measure) -> str:
    return _mean(raw, world, name, measure.key).shown(measure.digits)


def _difference_cell(raw: Raw, world: str, name: str, against: str, measure: Measure) -> str:
    found = _compared(raw, world, name, against, measure.key)
    text = found.shown(measure.digits, signed=True)
    return f"**{text}**" if found.is_clear else text


def _title(experiment: Experiment, name: str) -> str:
    return BASE if name == BASE else experiment.methods[name].title


def _arrow(measure: Measure) -> str:
    return {True: "↑", False: "↓", None: ""}[measure.higher_is_better]


def ablation_table(experiment: Experiment, raw: Raw, world: str, name: str) -> str:
    """Paired differences of an ablation's values to those that they are compared with; means where there is none.

    Args:
        experiment: whose.
        raw: numbers of the ablations.
        world: name.
        name: of the ablation.
    """
    ablation = experiment.ablations[name]
    compared = ablation.compared()
    measures = [measure_of(experiment, key) for key in experiment.pictured]
    rows = []
    for label, change in ablation.values.items():
        own, other = f"{name}={label}", f"{name}={compared.get(label)}"
        cells = [
            _difference_cell(raw, world, own, other, measure) if label in compared else _cell(raw, world, own, measure)
            for measure in measures
        ]
        rows.append([label if change else f"{label} (as it is)", *cells])
    titles = [f"{measure.title} {_arrow(measure)}".strip() for measure in measures]
    return markdown_table([ablation.title, *titles], rows, "l" + "r" * len(measures))


def choice_table(experiment: Experiment, folder: Path) -> str:
    """What was chosen, for every method and world.

    Args:
        experiment: whose.
        folder: of the CSV files.
    """
    choosing = experiment.choosing
    rows = []
    for row in _read_csv(folder / "choices.csv"):
        score, lost = float(row["score"]), float(row["lost"])
        chosen = [row["rate"], row["strength"], f"{score:.1f}", f"{lost:.2f}", row["tried"]]
        rows.append([_title(experiment, row["method"]), row["world"], *chosen, _remark(choosing, row)])
    scores = f"validation {choosing.score}", f"{choosing.kept} lost"
    head = ["method", "world", "learning rate", "strength", *scores, "points tried", ""]
    return markdown_table(head, rows, "llrrrrrl")


def _remark(choosing: Choosing, row: Mapping[str, str]) -> str:
    """Choices that say less than others: nothing kept enough, or the grid may be too small."""
    if float(row["lost"]) > choosing.most_lost:
        return "none loses so little"
    rate, strength = float(row["rate"]), float(row["strength"])
    corners = [min(choosing.rates), min(choosing.strengths)], [max(choosing.rates), max(choosing.strengths)]
    return "corner of the grid" if [rate, strength] in corners else ""


def stage_table(folder: Path) -> str:
    """Minutes of every stage.

    Args:
        folder: of the CSV files.
    """
    minutes = ("core minutes", "minutes")
    rows = [
        [row["stage"], row["runs"], *(f"{float(row[name]):.0f}" for name in minutes)]
        for row in _read_csv(folder / "stages.csv")
    ]
    return markdown_table(["stage", "runs", "core minutes", "divided by the processes"], rows, "lrrr")


# ---- pictures


def sweep_of(
    experiment: Experiment,
    raw: Raw,
    world: str,
    points: Mapping[float, tuple[str, float | None]],
    dial: str,
    base: tuple[str, float | None],
) -> Sweep:
    """Hallucination against skills along a dial, over policies: paired differences to the base policy.

    Args:
        experiment: whose.
        raw: numbers.
        world: name.
        points: name of the method, and strength where there are several, by value of the dial.
        dial: its title.
        base: the base policy, as points are.
    """
    choosing = experiment.choosing
    found = []
    for value, point in points.items():
        score, skill = (_compared(raw, world, point, base, key) for key in (choosing.score, choosing.kept))
        found.append(Point(value, score.mean, skill.mean, score.half, skill.half))
    measure = measure_of(experiment, choosing.score)
    axes = Axis(measure.title, bool(measure.higher_is_better)), Axis(measure_of(experiment, choosing.kept).title)
    return Sweep(*axes, tuple(found), choosing.most_lost, 0.0, dial, "the base")


def draw_methods(experiment: Experiment, raw: Raw, keys: Sequence[str], path: Path) -> None:
    """Paired differences of all methods to the base, with intervals: a panel per measure, a colour per world.

    Args:
        experiment: whose.
        raw: numbers of the methods.
        keys: of the measures.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    names = list(experiment.methods)
    figure = Figure(figsize=(3.1 * len(keys) + 1.6, 0.42 * len(names) + 1.5), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    names_of_worlds = experiment.world.names
    shifts = [0.28 * (place - (len(names_of_worlds) - 1) / 2) for place in range(len(names_of_worlds))]
    colors, markers = (BLUE, VERMILION, INK), ("o", "s", "^")
    looks = [
        (world, shifts[place], colors[place % 3], markers[place % 3]) for place, world in enumerate(names_of_worlds)
    ]
    for axes, key in zip(panels, keys, strict=True):
        measure = measure_of(experiment, key)
        for world, shift, color, marker in looks:
            found = [_compared(raw, world, name, BASE, key) for name in names]
            places = [place + shift for place in range(len(names))]
            means, halves = [one.mean for one in found], [one.half for one in found]
            style: dict[str, Any] = {"fmt": marker, "color": color, "ms": 5, "lw": 1.6, "label": f"{world} pairs"}
            axes.errorbar(means, places, xerr=halves, **style)
        axes.axvline(0, color=INK, lw=1, zorder=0)
        _dress(axes, f"{measure.title} {_arrow(measure)}", "x", ("top", "right", "left"))
    panels[0].set_yticks(range(len(names)), [experiment.methods[name].title for name in names], color=INK)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[-1].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside upper right", ncols=2
    )
    figure.supxlabel("difference to the base policy, with 95 % interval", size=9, color=MUTED)
    figure.savefig(path, dpi=150)


def draw_trades(experiment: Experiment, raw: Raw, path: Path) -> None:
    """What methods gain and what it costs, at every point of the grid: a panel per world, a line per learning rate.

    Args:
        experiment: whose.
        raw: numbers of the grid.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    score, kept = (measure_of(experiment, key) for key in (experiment.choosing.score, experiment.choosing.kept))
    worlds = experiment.world.names
    figure = Figure(figsize=(4.6 * len(worlds) + 0.6, 4.4), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(worlds), sharex=True, sharey=True, squeeze=False)[0]
    for axes, world in zip(panels, worlds, strict=True):
        for name, color in zip(experiment.traded, TRADED, strict=False):
            for rate, line in zip(experiment.choosing.rates, cycle(_LINES), strict=False):
                points = trades(experiment, raw.at_rate(rate), world, name)
                label = f"{experiment.methods[name].title}, rate {rate:g}"
                axes.plot(*points, line, color=color, marker="o", ms=4, lw=1.4, label=label)
        axes.axvline(-experiment.choosing.most_lost, color=MUTED, lw=1, ls=":")
        _dress(axes, f"{world} pairs", "both", ("top", "right"))
        axes.set_xlim(_FARTHEST, None)
        axes.set_xlabel(f"{kept.title}, difference to the base", size=9, color=MUTED)
    if score.higher_is_better is False:
        panels[0].invert_yaxis()
    panels[0].set_ylabel(f"{score.title}, difference to the base", size=9, color=MUTED)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def _dress(axes: Axes, title: str, grid: Literal["x", "both"], bare: Sequence[str]) -> None:
    """What the panels of pictures look like; ``bare`` are the sides without a line."""
    axes.set_title(title, size=10, color=INK)
    axes.grid(axis=grid, color=FAINT, lw=0.6)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    for side in bare:
        axes.spines[side].set_visible(False)


def trades(experiment: Experiment, raw: Raw, world: str, name: str) -> tuple[list[float], list[float]]:
    """What a method loses and gains with rising strength of the adapter; first the base itself.

    Args:
        experiment: whose.
        raw: numbers of the grid, at one learning rate.
        world: name.
        name: of the method.

    Returns:
        Differences to the base, means over policies: of what is to be kept, and of the score.
    """
    found: list[list[float]] = []
    for key in (experiment.choosing.kept, experiment.choosing.score):
        base = _mean(raw, world, BASE, key).mean
        scores = [_mean(raw, world, name, key, strength).mean for strength in sorted(experiment.choosing.strengths)]
        found.append([0.0, *(score - base for score in scores)])
    return found[0], found[1]


def draw_dials(experiment: Experiment, folder: Path, pictures: Path, seeds: Sequence[int]) -> dict[str, Sweep]:
    """The pictures of all dials: strength of the adapter, and ablations of weights.

    Args:
        experiment: whose.
        folder: of the CSV files.
        pictures: where to draw.
        seeds: of the ablations.

    Returns:
        Sweeps by the name of the picture.
    """
    found: dict[str, Sweep] = {}
    ablations = Raw(folder / "ablations.csv", seeds)
    for world in experiment.ablation_worlds if experiment.dial else []:
        raw = Raw(folder / "dial.csv", seeds)
        strengths = {value: ("dial", value) for value in experiment.dial}
        found[f"evidence_strength_{world}"] = sweep_of(experiment, raw, world, strengths, "strength", ("dial", 0.0))
    for name in NUMBERED:
        for world in experiment.worlds_of(name) if name in experiment.ablations else []:
            points = {float(label): (f"{name}={label}", None) for label in experiment.ablations[name].values}
            title = experiment.ablations[name].title
            ordered = dict(sorted(points.items()))
            found[f"evidence_{name}_{world}"] = sweep_of(experiment, ablations, world, ordered, title, (BASE, None))
    for name, sweep in found.items():
        draw_sweep(sweep, pictures / f"{name}.png")
    return found
