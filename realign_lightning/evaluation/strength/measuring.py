"""Questions asked of a model at several strengths of its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from torch import nn
from tqdm import tqdm

from realign_lightning.backbones import AdapterStrength
from realign_lightning.engines.base import Engine
from realign_lightning.engines.policy import Policy, TrainedWeights
from realign_lightning.evaluation.answering import answer_questions
from realign_lightning.evaluation.base import Benchmark, MarkedBenchmark
from realign_lightning.evaluation.running import WORK, evaluate, local_engine
from realign_lightning.evaluation.strength.sweep import (
    Axis,
    Point,
    Sweep,
    axis_of,
    check_skill_name,
    check_strengths,
    check_tolerance,
    read_skill,
    skill_of,
)
from realign_lightning.ranks import on_first_rank


@dataclass(frozen=True)
class Measures:
    """What is measured at every strength.

    Args:
        benchmark: what the adapter was trained for.
        score: key of its score; None takes the headline's first.
        skills: what the training never touched; None where that is not asked here.
        skill_score: name of a score of ``skills``, or ``TASK/METRIC`` in ``skill_files``.
        skill_files: results of lmms-eval, see :func:`~realign_lightning.evaluation.strength.read_skill`.
        skill_title: what to call the score of skills; None takes its name.
        skill_higher_is_better: which way it is good.

    Raises:
        ValueError: for skills from both sources, for files without the name of a score, and for names of scores that a
            benchmark of this package does not have.
    """

    benchmark: MarkedBenchmark
    score: str | None = None
    skills: Benchmark | None = None
    skill_score: str | None = None
    skill_files: str | None = None
    skill_title: str | None = None
    skill_higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.skills is not None and self.skill_files is not None:
            raise ValueError("Expected `skills` or `skill_files`, got both.")
        if self.skill_files is not None and (self.skill_score is None or "{strength}" not in self.skill_files):
            raise ValueError(
                "Expected `skill_files` with {strength} in the path and `skill_score` as TASK/METRIC, got "
                f"{self.skill_files!r} and {self.skill_score!r}."
            )
        axis_of(self.benchmark, self.score)
        if self.skills is not None:
            check_skill_name(self.skills, self.skill_score)


def measure_strengths(
    policy: Policy,
    scales: Sequence[float],
    measures: Measures,
    output: str | Path,
    tolerance: float = 0.5,
    batch_size: int = 32,
    write_adapters: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Sweep:
    """Measure a model at several strengths of its adapter.

    The model is loaded once. Every strength has an evaluation of its own in ``strength_S`` of the output, which
    ``realign-lightning compare`` reads. Afterwards, and after an error, the model is as it was trained again, of
    strength 1: load the written adapter for the suggested strength, or set it with an ``AdapterStrength`` of your own.

    Args:
        policy: with a LoRA adapter, see :class:`~realign_lightning.backbones.AdapterStrength`.
        scales: strengths in rising order, each once; the first is 0.
        measures: what to ask.
        output: folder; answers in it are not asked for again.
        tolerance: how much of the base's skill may be lost at the suggested strength, in the skill's unit.
        batch_size: questions per call of the model's ``generate``.
        write_adapters: whether the adapter of every strength is written to ``strength_S/adapter``.
        overwrite: replace evaluations of another model.
        show_progress: whether there are progress bars.

    Returns:
        All points; the adapter at the suggested strength is written to ``adapter`` in the output.

    Raises:
        TypeError: for a model without a LoRA adapter.
        ValueError: for an adapter whose strength cannot be set, for strengths and tolerances that make no sweep, and
            for unknown scores.
        FileNotFoundError: if a file of a benchmark, or of ``skill_files``, is missing.
    """
    output = Path(output)
    check_tolerance(tolerance)
    _check_scales(scales)
    key, unit, axis = axis_of(measures.benchmark, measures.score)
    # Before anything is asked.
    told = {} if measures.skill_files is None else _told_skills(measures.skill_files, scales, measures.skill_score)
    title = measures.skill_score if told else None
    points = []
    hash_file = cache(policy.hash_file)
    with _trained_again_afterwards(policy.model) as strength:
        for scale in tqdm(scales, desc="strength", unit="strength", disable=not show_progress):
            strength.set(scale)
            folder = output / f"strength_{scale:g}"
            at_scale = _policy_at(policy, scale, hash_file)
            engine = local_engine(at_scale, measures.benchmark, batch_size)
            found = evaluate(measures.benchmark, engine, folder, overwrite, show_progress)
            skill = told.get(scale)
            if measures.skills is not None:
                engine = local_engine(at_scale, measures.skills, batch_size)
                title, skill = _ask_skills(measures.skills, measures.skill_score, engine, output / WORK, show_progress)
            points.append(Point(scale, found.scores[key] * unit, skill))
            if write_adapters:
                on_first_rank(partial(strength.save, folder / "adapter"))
        skill_axis = None if title is None else Axis(measures.skill_title or title, measures.skill_higher_is_better)
        sweep = Sweep(axis, skill_axis, tuple(points), tolerance)
        strength.set(sweep.suggested.strength)
        on_first_rank(partial(strength.save, output / "adapter"))
    return sweep


def _check_scales(scales: Sequence[float]) -> None:
    check_strengths("scales", scales)
    # Folders and kept answers have these names.
    if len({f"{scale:g}" for scale in scales}) < len(scales):
        raise ValueError(
            f"Expected `scales` that differ within six digits, got {list(scales)}: answers are kept under names of "
            "that length. Round them, and leave out what is there twice."
        )


@contextmanager
def _trained_again_afterwards(model: nn.Module) -> Iterator[AdapterStrength]:
    """The strength of a model's adapter; whatever it is set to, the caller gets the trained model back."""
    strength = AdapterStrength(model)
    try:
        yield strength
    finally:
        strength.set(1.0)


def _policy_at(policy: Policy, scale: float, hash_file: Callable[[Path], str]) -> Policy:
    """The same weights under another identity, so that no answer is taken for one of another strength."""
    trained = policy.trained
    identity = f"{'' if trained is None else trained.identity} at strength {scale:g}"
    other = TrainedWeights(lambda: policy.model, identity)
    found = Policy(policy.backbone, policy.model, policy.device, policy.is_sharded, policy.precision, other)
    found.hash_file = hash_file
    return found


def _told_skills(files: str, scales: Sequence[float], name: str | None) -> dict[float, float]:
    return {scale: read_skill(files, scale, name) for scale in scales}


def _ask_skills(
    skills: Benchmark, name: str | None, engine: Engine, folder: Path, show_progress: bool
) -> tuple[str, float]:
    asked = skills.questions()
    questions = [question._replace(key=question.key or str(number)) for number, question in enumerate(asked)]
    replies = answer_questions(questions, engine, folder, show_progress)
    unanswered = [reply.error for reply in replies if reply.text is None]
    if unanswered:
        raise ValueError(f"{len(unanswered)} of {len(replies)} questions of `skills` have no answer: {unanswered[0]}")
    return skill_of(skills, [str(reply.text) for reply in replies], name)
