"""docs/evidence.md, written from the CSV files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence_jobs import BASE
from benchmarks.evidence_report import (
    AGAINST,
    Raw,
    Verdict,
    ablation_table,
    choice_table,
    difference_table,
    draw_dials,
    draw_methods,
    draw_trades,
    judge,
    measure_of,
    method_table,
    stage_table,
    versus_table,
)
from benchmarks.evidence_settings import Experiment
from realign_lightning.evaluation.strength.sweep import Sweep


def write_page(experiment: Experiment, docs: Path, recipe: Path) -> None:
    """Write page and pictures.

    Args:
        experiment: what was run.
        docs: folder of the documentation; its ``evidence`` holds the CSV files.
        recipe: of the experiment.
    """
    folder, pictures = docs / "evidence", docs / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    raw = Raw(folder / "methods.csv", experiment.seeds)
    draw_methods(experiment, raw, experiment.pictured, pictures / "evidence_methods.png")
    parts = [
        "<!-- Written by benchmarks/evidence.py; edit recipes, or evidence/*.md, not this file. -->\n\n# Evidence",
        _verdicts(experiment, judge(experiment, raw)),
        _read(folder / "summary.md"),
        _read(folder / "introduction.md"),
        f"## What was chosen\n\nThe same grid for every method, {experiment.world.chosen_on}; the lowest "
        f"{experiment.choosing.score} of what loses at most {experiment.choosing.most_lost:g} points of "
        f"{experiment.choosing.kept} on the mean, or what loses least.",
        choice_table(experiment, folder),
    ]
    if experiment.traded:
        parts += _trades(experiment, folder, pictures)
    parts += [
        "## Results",
        "![Differences of all methods to the base policy, with intervals](images/evidence_methods.png)",
        *(_world(experiment, raw, world) for world in experiment.world.names),
    ]
    if experiment.ablation_seeds:
        seeds = experiment.seeds[: experiment.ablation_seeds]
        parts += _ablations(experiment, Raw(folder / "ablations.csv", seeds))
        parts += _dials(draw_dials(experiment, folder, pictures, seeds))
    parts += [_read(folder / "reading.md"), "## Time", stage_table(folder), _read(folder / "time.md")]
    parts += [f"Raw numbers: `docs/evidence/*.csv`. Recipe: `{recipe}`."]
    (docs / "evidence.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _verdicts(experiment: Experiment, verdicts: Sequence[Verdict]) -> str:
    """What does not hold comes first."""
    if not verdicts:
        return ""
    groups = {
        "**Not so:** the opposite is shown.": [verdict for verdict in verdicts if verdict.fails],
        "**Not shown:**": [verdict for verdict in verdicts if not (verdict.holds or verdict.fails)],
        "**Shown:**": [verdict for verdict in verdicts if verdict.holds],
    }
    policies = min(verdict.found.policies for verdict in verdicts)
    missed = max(1, round(len(verdicts) / 20))
    kind = experiment.world.seeds_are
    said = [
        f"Over {policies} {kind}, means of paired differences with Student's 95 % intervals, "
        f"each for itself: of {len(verdicts)} such intervals {missed} can be expected to miss the truth. They are "
        f"about other {kind}, with the hyper-parameters that were chosen here, and on images of the same kind. "
        "What does not hold comes first."
    ]
    for title, group in groups.items():
        lines = [f"* {verdict.line(measure_of(experiment, verdict.claim.measure))}" for verdict in group]
        said.append("\n".join([title, "", *(lines or ["* nothing"])]))
    return "\n\n".join(said)


def _world(experiment: Experiment, raw: Raw, world: str) -> str:
    key = experiment.pictured[0]
    title = measure_of(experiment, key).title
    told = f"{title}, the row less the column, bold where the interval is clear of zero:"
    parts = [f"### Pairs from the {world} world", told]
    parts += [versus_table(experiment, raw, world, key), "All measures, means:", method_table(experiment, raw, world)]
    for against in AGAINST:
        if against in (BASE, *experiment.methods):
            title = "the base policy" if against == BASE else experiment.methods[against].title
            parts += [f"Difference to {title}, bold where the interval is clear of zero:"]
            parts += [difference_table(experiment, raw, world, against)]
    return "\n\n".join(parts)


def _trades(experiment: Experiment, folder: Path, pictures: Path) -> list[str]:
    draw_trades(experiment, Raw(folder / "grid.csv", experiment.development), pictures / "evidence_trades.png")
    score, kept = (measure_of(experiment, key).title for key in (experiment.choosing.score, experiment.choosing.kept))
    told = (
        "All points of the grid, means over the policies of development: every line begins at the base policy and goes "
        f"on with the strength of the adapter. Up is better ({score}), left is what it costs ({kept}), left of the "
        "dotted line too much; lines end where more than three points are lost. No intervals: these are "
        f"{len(experiment.development)} policies, and other questions than those of the results."
    )
    return [told, "![Gain over cost at all points of the grid](images/evidence_trades.png)"]


def _ablations(experiment: Experiment, raw: Raw) -> list[str]:
    title = experiment.methods[experiment.ablated].title
    parts = [
        f"## Ablations\n\nOf {title}, with the learning rate and strength that were chosen for it as it is, so that "
        f"what is far from it starts with a disadvantage; {experiment.ablation_seeds} policies, fewer questions. "
        "Rows with a sign are paired differences, bold where the interval is clear of zero: to the row as it is, or to "
        "the row above where it says so."
    ]
    for name, ablation in experiment.ablations.items():
        parts.append(f"### {ablation.title}\n\n{ablation.question}".strip())
        for world in experiment.worlds_of(name):
            parts += [
                f"Pairs from the {world} world:",
                ablation_table(experiment, raw, world, name),
            ]
    return parts


def _dials(sweeps: dict[str, Sweep]) -> list[str]:
    parts = [
        "## The price: hallucination against untouched skills\n\nUp is fewer hallucinations, right is more skill. "
        "What `realign-lightning sweep-strength` does for one model, over all policies of the ablations, as paired "
        "differences to the base policy; points next to each other differ by less than their intervals. What is "
        "suggested is read off these very scenes; nothing above was chosen so."
    ]
    for name, sweep in sweeps.items():
        parts.append(f"![{sweep.dial}, {name.rpartition('_')[2]} world](images/{name}.png)")
        parts.append(sweep.as_table())
    return parts
