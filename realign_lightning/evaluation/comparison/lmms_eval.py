"""What lmms-eval wrote with ``--log_samples``, read as sides of a comparison."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from realign_lightning.evaluation.base import Answered, Score
from realign_lightning.evaluation.comparison.sides import Side
from realign_lightning.evaluation.run_folder import parse_object

_RESULTS = "_results.json"
_DATED = f"[0-9]*{_RESULTS}"
"""Not what tasks write beside them, such as ``submissions/mmbench_en_dev_static_results.json``."""

_DEPTHS = ("", "*/", "*/*/")
"""lmms-eval makes a folder per model in its output folder, which may stand in a folder of runs."""

_SETTINGS = (
    "dataset_name",
    "filter_list",
    "generation_kwargs",
    "metric_list",
    "num_fewshot",
    "output_type",
    "repeats",
    "test_split",
)
"""Of a task's configuration, what questions, answers or scores depend on and what is no path or place in memory."""

_AGAIN = "Copy it again, or run lmms-eval again."
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_INDEPENDENT = (
    "lmms-eval does not tell which questions belong together, so each was drawn alone: intervals are too narrow "
    "where several are about one image."
)


def read_tasks(folder: Path) -> list[Side]:
    """Tasks that lmms-eval ran, one side for each task, or for each filter of a task with several.

    A sample's score on a metric is the number that lmms-eval logged, or the ``score`` in what it logged. Only metrics
    whose mean over the samples is what lmms-eval reports are compared: others, such as F1, cannot be computed from a
    file of samples. An answer is right where the first metric says so that is 0 or 1 for all samples that have it.
    Where a judge failed there is no score. Of a task that was run several times into one folder the newest is taken.

    Args:
        folder: with ``*_results.json`` and ``*_samples_*.jsonl``, in it, or one or two folders down.

    Returns:
        Sides named ``TASK (lmms-eval)``; their questions' keys are lmms-eval's ``doc_id``.

    Raises:
        ValueError: naming a file that is damaged, a task that two models have, or results without samples.
    """
    # Names begin with the date: the newest come last.
    paths = sorted((path for depth in _DEPTHS for path in folder.glob(f"{depth}{_DATED}")), key=lambda path: path.name)
    sides: dict[str, Side] = {}
    for side in (side for path in paths for side in _read_results(path)):
        older = sides.get(side.benchmark)
        if older is not None and older.source.parent != side.source.parent:
            raise ValueError(
                f"{older.source} and {side.source} are both of {side.benchmark}: give the folder of one of the models."
            )
        again = () if older is None else (f"Run more than once; the newest is compared: {side.source.name}.",)
        sides[side.benchmark] = replace(side, notes=side.notes + again)
    return list(sides.values())


def _read_results(path: Path) -> list[Side]:
    results = parse_object(path.read_text(encoding="utf-8"), str(path), _AGAIN)
    if not isinstance(results.get("results"), Mapping) or not isinstance(results.get("configs"), Mapping):
        raise ValueError(f"{path} is no file of results of lmms-eval: it lacks `results` or `configs`.")
    sides = []
    # Groups of tasks are in the results too, but have neither configuration nor samples.
    for task in [task for task in results["results"] if task in results["configs"]]:
        samples = path.with_name(f"{path.name.removesuffix(_RESULTS)}_samples_{task}.jsonl")
        if not samples.is_file():
            raise ValueError(f"{path} tells of {task}, but {samples.name} is missing: run with --log_samples.")
        sides += _read_task(task, results, samples)
    return sides


def _read_task(task: str, results: Mapping[str, Any], path: Path) -> list[Side]:
    reported = _reported(results["results"][task])
    # A task with several filters logs every document once per filter, in their order.
    filters = list(dict.fromkeys(name for _, name in reported)) or ["none"]
    samples = _by_filter(path, len(filters))
    sides = []
    for place, name in enumerate(filters):
        scores = {metric: value for (metric, of), value in reported.items() if of == name}
        title = f"{task} (lmms-eval)" if len(filters) == 1 else f"{task}, {name} (lmms-eval)"
        sides.append(_side(title, path, samples[place], scores, _facts(task, results)))
    return sides


def _reported(values: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Reported scores by metric and filter, from names such as ``exact_match,none``."""
    named = {tuple(name.split(",", 1)): value for name, value in values.items() if "," in name}
    return {
        (metric, of): float(value)
        for (metric, of), value in named.items()
        if "_stderr" not in metric and _is_number(value)
    }


def _by_filter(path: Path, filters: int) -> list[dict[str, dict[str, Any]]]:
    found: list[dict[str, dict[str, Any]]] = [{} for _ in range(filters)]
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        sample = parse_object(line, f"{path}, line {number}", _AGAIN)
        missing = {"doc_id", "filtered_resps", "target"} - sample.keys()
        if missing:
            raise ValueError(f"{path}, line {number}: a sample of lmms-eval has {sorted(missing)}; this one has not.")
        key = str(sample["doc_id"])
        place = next((place for place, samples in enumerate(found) if key not in samples), None)
        if place is None:
            raise ValueError(f"{path}, line {number}: document {key} is there more often than there are filters.")
        found[place][key] = sample
    return found


def _facts(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    config = results["configs"][task]
    settings = {name: _without_addresses(config[name]) for name in _SETTINGS if config.get(name) is not None}
    settings["version"] = results.get("versions", {}).get(task)
    settings["system_instruction"] = results.get("system_instruction")
    return {
        "settings": settings,
        "model": {name: results.get(name) for name in ("model_source", "model_name")},
        "higher_is_better": results.get("higher_is_better", {}).get(task, {}),
    }


def _without_addresses(value: Any) -> Any:
    return json.loads(_ADDRESS.sub("", json.dumps(value)))


def _side(
    title: str, path: Path, samples: dict[str, dict[str, Any]], scores: dict[str, float], facts: dict[str, Any]
) -> Side:
    values = {metric: {key: _score(sample.get(metric)) for key, sample in samples.items()} for metric in scores}
    means = [metric for metric, told in scores.items() if _is_mean(list(values[metric].values()), told)]
    higher = facts["higher_is_better"]
    verdicts, judged_by = _verdicts({name: values[name] for name in scores if higher.get(name) is not None}, higher)
    marked = [key for key, sample in samples.items() if not any(_judge_failed(sample.get(name)) for name in scores)]
    return Side(
        benchmark=title,
        source=path,
        settings={**facts["settings"], "metrics": list(scores)},
        rows={key: _answered(sample, verdicts.get(key)) for key, sample in samples.items()},
        counts={key: (*(scores[key] or 0.0 for scores in values.values()), 1.0) for key in marked},
        headline=tuple(Score(name, name, _scale(values[name]), higher.get(name)) for name in means),
        compute=_Means(tuple(scores)),
        model=facts["model"],
        judged_by=judged_by,
        notes=_notes([metric for metric in scores if metric not in means], judged_by),
    )


def _verdicts(
    values: Mapping[str, Mapping[str, float | None]], higher: Mapping[str, bool]
) -> tuple[dict[str, bool], str]:
    """Whether each sample is right, and which metrics say so: MME has one for some samples and one for others."""
    right: dict[str, bool] = {}
    used = []
    for name in [name for name, scores in values.items() if set(scores.values()) - {None} <= {0.0, 1.0}]:
        said = {key: (value == 1.0) is higher[name] for key, value in values[name].items() if value is not None}
        if said.keys() - right.keys():
            used.append(name)
            right = said | right
    return right, ", ".join(used)


class _Means:
    """Means of metrics, from columns of their sums and one of how many samples there are."""

    def __init__(self, metrics: tuple[str, ...]) -> None:
        self._metrics = metrics

    def __call__(self, counts: Tensor) -> dict[str, Tensor]:
        return {name: counts[..., place] / counts[..., -1] for place, name in enumerate(self._metrics)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _score(logged: Any) -> float | None:
    value = logged.get("score") if isinstance(logged, Mapping) else logged
    return float(value) if value is not None and _is_number(value) else None


def _is_mean(values: Sequence[float | None], reported: float) -> bool:
    """Whether a reported score is the mean over all samples, as a share or in percent, rounded or not.

    A score that only some samples have may meet their mean by chance: MME's sums do where few are right.
    """
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return False
    means = [factor * math.fsum(numbers) / len(numbers) for factor in (1, 100)]
    return any(math.isclose(mean, reported, rel_tol=1e-6, abs_tol=1e-9) or reported == round(mean, 4) for mean in means)


def _judge_failed(logged: Any) -> bool:
    """Whether a judge did not reply, which tasks log as a score of 0 by nobody, or as scores below 0."""
    if not isinstance(logged, Mapping):
        return False
    scores = logged.get("scores")
    is_negative = isinstance(scores, list) and any(_is_number(score) and score == -1 for score in scores)
    return logged.get("eval_model") == "" or is_negative


def _scale(values: Mapping[str, float | None]) -> float:
    return 100.0 if all(0 <= value <= 1 for value in values.values() if value is not None) else 1.0


def _answered(sample: Mapping[str, Any], right: bool | None) -> Answered:
    media = sample.get("input_media")
    return Answered(
        key=str(sample["doc_id"]),
        question=_text(sample.get("input")) or "",
        answer=_text(sample["filtered_resps"]),
        image=media[0] if isinstance(media, list) and media and isinstance(media[0], str) else "",
        target=sample["target"],
        correct=right,
        badness=float(right is False),
    )


def _text(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notes(others: Sequence[str], verdict: str) -> tuple[str, ...]:
    notes = [_INDEPENDENT]
    if others:
        notes.append(f"Left out, for lmms-eval's score is not the mean of the samples' scores: {', '.join(others)}.")
    notes.append(
        f"Right or wrong is told by {verdict}." if verdict else "No metric is 0 or 1 throughout: no answer is judged."
    )
    return tuple(notes)
