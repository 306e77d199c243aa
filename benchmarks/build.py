"""What building pairs costs, what batches gain, what gates let through, and whether rejected responses are wrong.

From the root of the repository:

    python -m benchmarks.build --stages --json stages.json
    python -m benchmarks.build --batching --json batching.json
    python -m benchmarks.build --gates --plot docs/images/build_gates.png --json gates.json
    python -m benchmarks.build --contradictions --json contradictions.json

- ``--stages``: pairs of digit scenes with the policy that ships, every turn from an empty work folder; medians of each
  stage's time, over the accepted pairs. The model is loaded before; reading draws the scenes. Writing is what the
  stages leave of the whole time.
- ``--batching``: the same questions to :class:`LocalEngine` in batches of several sizes, in turns; medians. The digits'
  blanks between fixed words, and answers of fixed length of a larger LLaVA with random weights (``--shape``). Questions
  are sorted by length, as a build does. The exit status is 1 if an answer depends on the size of its batch.
- ``--gates``: the share of one and the same tries that each gate accepts. Tries on digit scenes are what the policy
  made of all ten similar images. Those on hand-annotated answers, long and short, are made by a rule: exactly one
  annotated span is swapped, or all of them, for spans of the same kind in any answer, of as many words where there are
  some. ``--similarity-model`` compares these by a sentence encoder, too.
- ``--contradictions``: every accepted pair of digit scenes beside what the scene really shows. A response contradicts
  the scene if one of its statements is false, and agrees if all are true; what cannot be parsed does neither.

Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from tqdm import tqdm

from benchmarks.measure import matmul_rate
from benchmarks.report import environment, table
from benchmarks.shapes import SHAPES, Shape, make_checkpoint, make_samples
from realign_lightning.backbones import AutoBackbone
from realign_lightning.data.scan import scan_shard
from realign_lightning.data.schema import decode_sample
from realign_lightning.data.sources import SourceRecord
from realign_lightning.demos.quickstart import DigitBackbone, digit_builder
from realign_lightning.demos.scenes import CELLS, DIGITS, INKS, MASK, Scene
from realign_lightning.demos.source import DigitScenes
from realign_lightning.engines import LocalEngine, Policy
from realign_lightning.engines.base import Answer, Engine, Question
from realign_lightning.preferences import Gate, SentenceSimilarity, Similarity, WordOverlap
from realign_lightning.preferences.accept import Scope, normalise
from realign_lightning.preferences.completing import text_of
from realign_lightning.preferences.mask import KINDS, MaskedResponse, Span
from realign_lightning.preferences.pipeline.run import Run
from realign_lightning.preferences.retrieval.search import faiss
from realign_lightning.types import Prompt
from tests.preferences.annotated import read_annotated

STAGES = ("read", "check", "mask", "embed", "retrieve", "complete", "write")
"""Stages of a build; what a build measures, and writing."""

TAUS = (0.85, 0.90, 0.95)
SCOPES: tuple[Scope, ...] = get_args(Scope)

FASTER = 3.0
"""Times the one-by-one rate that batches are to reach."""

CONTRADICTING, AGREEING = 0.95, 1.0
"""Shares of rejected responses that are to contradict their scene, and of chosen ones that are to agree with it."""

LARGER = Shape("llava-30m", "llava", 512, 8, 8, 8, 1408, 320, 256, 4, 4, 1024, (((8, 8), (8, 8)),), response=64)
"""Answers that are written token by token by 30 million parameters; the shipped policy has few."""

_SHAPES = {LARGER.name: LARGER, **SHAPES}

ANSWERS = ("tuning", "held_out")
"""Files of annotated answers."""

CHANGES = (*(f"one {kind}" for kind in KINDS), "all spans")
"""What is swapped in annotated answers."""

ALL = "all tries"

_SEED = 0
_ENDLESS = 10**6


# ---- time by stage


def measure_stages(scenes: int, turns: int, folder: Path | None = None) -> dict[str, Any]:
    """Seconds by stage of building pairs of digit scenes.

    Args:
        scenes: how many.
        turns: builds, each from an empty folder.
        folder: where temporary files go.
    """
    backbone = DigitBackbone()
    model = backbone.load_model()
    source = DigitScenes(scenes)
    found: list[dict[str, Any]] = []
    # A build of few scenes warms up.
    for turn, built in enumerate([DigitScenes(min(scenes, 20)), *[source] * turns]):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            # A new policy, because one that has hashed its weights would not do so again.
            policy, builder = Policy(backbone, model), digit_builder()
            start = time.perf_counter()
            report = builder.build(built, Path(own) / "pairs", policy, show_progress=False)
            total = time.perf_counter() - start
        if turn:
            tried = sum(report.tried_by_rank.values())
            counts = {"records": report.records, "pairs": report.pairs, "tried": tried, **report.calls}
            found.append({"counts": counts, "total": total, "seconds": by_stage(report.seconds, total)})
            _say(f"stages: turn {turn}, {total:.1f} s")
    counts = found[0]["counts"]
    if any(turn["counts"] != counts for turn in found):
        raise RuntimeError(f"Expected equal builds, got {[turn['counts'] for turn in found]}.")
    medians = {name: statistics.median(turn["seconds"][name] for turn in found) for name in STAGES}
    medians["total"] = statistics.median(turn["total"] for turn in found)
    return {
        "scenes": scenes,
        **counts,
        "acceptance": counts["pairs"] / counts["tried"],
        "turns": found,
        "medians": medians,
        "milliseconds_per_pair": {name: 1000 * seconds / counts["pairs"] for name, seconds in medians.items()},
    }


def by_stage(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Seconds of :data:`STAGES`; writing, and whatever is between the stages, is what they leave of the whole time.

    Args:
        seconds: as a build reports them.
        total: of the whole build.
    """
    measured = {name: seconds[name] for name in STAGES[:-1]}
    return {**measured, "write": total - sum(measured.values())}


def stages_table(found: Mapping[str, Any]) -> str:
    """Times by stage, in Markdown.

    Args:
        found: by :func:`measure_stages`.
    """
    medians, per_pair, turns = found["medians"], found["milliseconds_per_pair"], found["turns"]
    rows = []
    for name in (*STAGES, "total"):
        seconds = [turn["total"] if name == "total" else turn["seconds"][name] for turn in turns]
        spread, share = f"{min(seconds):.2f} - {max(seconds):.2f}", medians[name] / medians["total"]
        rows.append([name, f"{medians[name]:.2f}", spread, f"{per_pair[name]:.2f}", f"{share:.1%}"])
    told = (
        f"{found['scenes']} scenes, {found['records']} records, {found['pairs']} pairs, {found['tried']} completions "
        f"tried ({found['acceptance']:.0%} accepted), {len(turns)} turns"
    )
    return f"{told}\n\n" + table(["stage", "median s", "min - max", "ms a pair", "of the total"], rows)


# ---- batches


def measure_batching(
    sizes: Sequence[int], turns: int, digit_questions: int, larger_questions: int, shape: Shape, folder: Path | None
) -> list[dict[str, Any]]:
    """Answers a second by batch size, of the shipped policy and of a larger model.

    Args:
        sizes: of batches; 1 is always among them.
        turns: of all sizes.
        digit_questions: that the shipped policy is asked.
        larger_questions: that the larger model is asked.
        shape: of the larger model.
        folder: where its checkpoint goes for the time being.
    """
    found = []
    digits = Policy(DigitBackbone())
    engines = {size: LocalEngine(batch_size=size, max_new_tokens=48, sample=True) for size in {1, *sizes}}
    asked = _in_order(_digit_questions(digit_questions))
    found.append(_told("digits, blanks between fixed words", digits, asked, engines, turns))
    with tempfile.TemporaryDirectory(dir=folder) as own:
        checkpoint = make_checkpoint(shape, Path(own) / shape.name, torch.device("cpu"))
        larger = Policy(AutoBackbone(str(checkpoint), dtype="float32"))
        # Every answer has the length of the longest, as if none came to its end.
        larger.model.generation_config.min_new_tokens = shape.response  # type: ignore[union-attr]
        engines = {size: LocalEngine(batch_size=size, max_new_tokens=shape.response, sample=True) for size in engines}
        asked = _in_order(_larger_questions(larger, shape, larger_questions))
        found.append(_told(f"{shape.name}, answers of {shape.response} tokens", larger, asked, engines, turns))
    return found


def _told(
    name: str, policy: Policy, questions: Sequence[Question], engines: Mapping[int, LocalEngine], turns: int
) -> dict[str, Any]:
    for engine in engines.values():
        engine.use(policy)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    return {"workload": name, "parameters": parameters, **time_batches(questions, engines, turns)}


def _digit_questions(count: int) -> list[Question]:
    """Masked captions of scenes, each with the image of another."""
    stages, source = digit_builder().stages, DigitScenes(_ENDLESS)
    found: list[Question] = []
    for row in source.read():
        assert isinstance(row, SourceRecord)  # noqa: S101 - scenes have no problems
        masked = stages.masker.mask_many([row.key], [row.chosen or ""])[0]
        if isinstance(masked, MaskedResponse) and not masked.is_whole:
            image = source.world.scene(_ENDLESS + len(found)).image
            found.append(stages.completer.question(row.prompt, masked, image, seed=len(found)))
        if len(found) == count:
            break
    return found


def _larger_questions(policy: Policy, shape: Shape, count: int) -> list[Question]:
    """Random words, not equally many, about noise."""
    samples = make_samples(replace(shape, pairs=count), policy.backbone.tokenizer)  # type: ignore[attr-defined]
    return [
        Question(" ".join(str(sample.prompt).split()[place % 8 :]), sample.image, place)
        for place, sample in enumerate(samples)
    ]


def _in_order(questions: Sequence[Question]) -> list[Question]:
    return sorted(questions, key=lambda question: len(text_of(question.prompt)))


def time_batches(questions: Sequence[Question], engines: Mapping[int, Engine], turns: int) -> dict[str, Any]:
    """Let all engines answer the same questions, in turns.

    Args:
        questions: in the order in which batches are cut.
        engines: by size of the batches.
        turns: of all of them.
    """
    sizes = sorted(engines)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    answers: dict[int, list[Answer]] = {}
    for size in sizes:
        # The first batch warms up.
        engines[size].answer(questions[:size])
    for turn in range(turns):
        for size in sizes:
            start = time.perf_counter()
            answers[size] = [
                answer
                for first in range(0, len(questions), size)
                for answer in engines[size].answer(questions[first : first + size])
            ]
            seconds[size].append(time.perf_counter() - start)
        _say(f"batching: turn {turn + 1}, {', '.join(f'{size}: {seconds[size][-1]:.1f} s' for size in sizes)}")
    failed = [answer.error for size in sizes for answer in answers[size] if answer.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} questions were not answered: {failed[0]}")
    rates = {size: len(questions) / statistics.median(seconds[size]) for size in sizes}
    return {
        "questions": len(questions),
        "new_tokens": sum(answer.new_tokens for answer in answers[sizes[0]]),
        "sizes": [
            {
                "batch_size": size,
                "seconds": seconds[size],
                "rate": rates[size],
                "ratio": rates[size] / rates[sizes[0]],
                "differ": sum(one != other for one, other in zip(answers[sizes[0]], answers[size], strict=True)),
            }
            for size in sizes
        ],
    }


def batching_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Rates by batch size, in Markdown.

    Args:
        found: by :func:`measure_batching`.
    """
    blocks = []
    for work in found:
        rows = [
            [
                str(size["batch_size"]),
                f"{statistics.median(size['seconds']):.2f}",
                f"{min(size['seconds']):.2f} - {max(size['seconds']):.2f}",
                f"{size['rate']:.1f}",
                f"{size['ratio']:.2f}",
                str(size["differ"]),
            ]
            for size in work["sizes"]
        ]
        header = ["batch size", "median s", "min - max", "answers a second", "to one by one", "answers that differ"]
        best = max(size["ratio"] for size in work["sizes"])
        blocks += [
            f"{work['workload']}: {work['parameters'] / 1e6:.1f} million parameters, {work['questions']} questions, "
            f"{work['new_tokens'] / work['questions']:.1f} tokens an answer",
            table(header, rows),
            f"At best {best:.2f} times the one-by-one rate; {FASTER:.0f} wanted: {_met(best >= FASTER)}.",
        ]
    return "\n\n".join(blocks)


# ---- gates


class Tried(NamedTuple):
    """A completion that gates decide on.

    Args:
        record: of the chosen response.
        change: what kind of change it is.
        masked: the chosen response and its spans.
        completion: what takes its place.
    """

    record: str
    change: str
    masked: MaskedResponse
    completion: str


def measure_gates(
    scenes: int, model: str | None = None, long_words: int = 30, folder: Path | None = None
) -> dict[str, Any]:
    """Acceptance by tau and scope, of tries on digit scenes and on annotated answers.

    Args:
        scenes: of digits.
        model: folder or name of a sentence encoder; None compares by words only.
        long_words: an answer of at least so many words is long.
        folder: where temporary files go.
    """
    answers = [answer for name in ANSWERS for answer in read_annotated(name)]
    tries = swapped(answers)
    similarities: dict[str, Similarity] = {"word overlap": WordOverlap()}
    if model is not None:
        similarities["sentence similarity"] = SentenceSimilarity(model)
    parts = []
    for name, similarity in similarities.items():
        for length, is_long in (("long", True), ("short", False)):
            some = [one for one in tries if (len(one.masked.response.split()) >= long_words) == is_long]
            parts.append({"similarity": name, "length": length, **judged(some, similarity)})
    digits = judged(digit_tries(scenes, folder), WordOverlap())
    return {"scenes": scenes, "digits": digits, "answers": parts, "model": model}


def digit_tries(scenes: int, folder: Path | None = None) -> list[Tried]:
    """What the shipped policy makes of all similar images, for every record of some digit scenes.

    Args:
        scenes: how many.
        folder: where temporary files go.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        # Nothing is below 0, so that no image is left out because one before it was good enough.
        run = Run(digit_builder(tau=0.0).stages, Path(own), Policy(DigitBackbone()), shows=False)
        run.read(DigitScenes(scenes), None)
        run.respond()
        run.mask()
        return [
            Tried(trial.key, _digit_change(trial.prompt, trial.masked, attempt.text), trial.masked, attempt.text)
            for outcome in run.runner().run(run.trials(run.retrieve()))
            for trial in [outcome.trial]
            for attempt in outcome.attempts
        ]


def _digit_change(prompt: Prompt, masked: MaskedResponse, completion: str) -> str:
    if normalise(completion) == normalise(masked.response):
        return "unchanged"
    if not completion:
        return "no completion"
    if _QUESTION.fullmatch(text_of(prompt)):
        return "answer to a question"
    pairs = zip(masked.response.split(), completion.split(), strict=False)
    changed = sum(one != other for one, other in pairs)
    return f"caption, {changed} digit{'s' if changed > 1 else ''} changed"


def swapped(answers: Sequence[tuple[str, Sequence[Span]]], seed: int = _SEED) -> list[Tried]:
    """Completions of answers: each with one span swapped, and one with all of them.

    Args:
        answers: texts, and spans of some of :data:`~realign_lightning.preferences.mask.KINDS`.
        seed: of what takes a span's place.
    """
    words = {
        kind: sorted({span.text.lower() for _, spans in answers for span in spans if span.kind == kind})
        for kind in KINDS
    }
    found = []
    for number, (text, spans) in enumerate(answers):
        draw = random.Random(f"{seed}:{number}")
        masked = MaskedResponse(text, tuple(spans))
        others = [_other(span.text, words[span.kind], draw) for span in spans]
        for place, span in enumerate(spans):
            blanks = [others[place] if place == at else one.text for at, one in enumerate(spans)]
            found.append(Tried(str(number), f"one {span.kind}", masked, _filled(masked, blanks)))
        found.append(Tried(str(number), CHANGES[-1], masked, _filled(masked, others)))
    return found


def _other(text: str, words: Sequence[str], draw: random.Random) -> str:
    """Another text of the same kind: if there is one, of as many words and as plural."""
    others = [word for word in words if normalise(word) != normalise(text)]
    as_long = [word for word in others if len(word.split()) == len(text.split())]
    alike = [word for word in as_long if word.endswith("s") == text.endswith("s")]
    other = draw.choice(alike or as_long or others)
    return other.capitalize() if text[:1].isupper() else other


def _filled(masked: MaskedResponse, blanks: Sequence[str]) -> str:
    pieces = zip(blanks, masked.segments[1:], strict=True)
    return masked.segments[0] + "".join(blank + segment for blank, segment in pieces)


def judged(tries: Sequence[Tried], similarity: Similarity) -> dict[str, Any]:
    """Acceptance of every gate by kind of change, and of all tries together.

    Args:
        tries: the same for all gates.
        similarity: of the gates.
    """
    obvious = [Gate(similarity).obvious(one.masked, one.completion, MASK, None) for one in tries]
    lowest = {scope: _lowest(tries, Gate(similarity, scope=scope)) for scope in SCOPES}
    accepted = {
        (scope, tau): [
            reason is None and Gate(similarity, tau, scope).judge([value]).reason is None
            for reason, value in zip(obvious, values, strict=True)
        ]
        for scope, values in lowest.items()
        for tau in TAUS
    }
    changes: dict[str, list[int]] = {}
    for place, one in enumerate(tries):
        changes.setdefault(one.change, []).append(place)
    places = {**{change: changes[change] for change in sorted(changes, key=_place)}, ALL: list(range(len(tries)))}
    rows = [
        {
            "change": change,
            "tries": len(at),
            "median": {scope: statistics.median(lowest[scope][place] for place in at) for scope in SCOPES},
            "accepted": {
                scope: {f"{tau:.2f}": statistics.fmean(accepted[scope, tau][place] for place in at) for tau in TAUS}
                for scope in SCOPES
            },
        }
        for change, at in places.items()
        if at
    ]
    records = {one.record for one in tries}
    paired = {
        scope: {
            f"{tau:.2f}": len({one.record for one, yes in zip(tries, accepted[scope, tau], strict=True) if yes})
            for tau in TAUS
        }
        for scope in SCOPES
    }
    return {"records": len(records), "paired": paired, "changes": rows}


def _place(change: str) -> tuple[int, str]:
    return CHANGES.index(change) if change in CHANGES else 0, change


def _lowest(tries: Sequence[Tried], gate: Gate) -> list[float]:
    """The lowest similarity of what a gate compares, of every try."""
    compared = [gate.pairs(one.masked, one.completion) for one in tries]
    pairs = list(dict.fromkeys(pair for some in compared for pair in some))
    # A build takes an empty text to be like none.
    written = [pair for pair in pairs if all(text.strip() for text in pair)]
    values = dict.fromkeys(pairs, 0.0)
    if written:
        found = gate.similarity.compare([one for one, _ in written], [other for _, other in written])
        values |= dict(zip(written, found, strict=True))
    return [min((values[pair] for pair in some), default=1.0) for some in compared]


def gates_table(found: Mapping[str, Any]) -> str:
    """Acceptance by gate and median similarities, in Markdown.

    Args:
        found: by :func:`measure_gates`.
    """
    parts = [{"title": f"{found['scenes']} digit scenes, word overlap", **found["digits"]}]
    for part in found["answers"]:
        title = f"{part['records']} {part['length']} answers, {part['similarity']}"
        parts.append({"title": title, **part})
    return "\n\n".join(f"{part['title']}:\n\n{_acceptance_table(part)}" for part in parts)


def _acceptance_table(part: Mapping[str, Any]) -> str:
    gates = [(scope, f"{tau:.2f}") for scope in SCOPES for tau in TAUS]
    header = ["accepted", "tries", *(f"{scope} {tau.lstrip('0')}" for scope, tau in gates)]
    header += [f"median, {scope}" for scope in SCOPES]
    rows = [
        [
            row["change"],
            str(row["tries"]),
            *(f"{row['accepted'][scope][tau]:.0%}" for scope, tau in gates),
            *(f"{row['median'][scope]:.3f}" for scope in SCOPES),
        ]
        for row in part["changes"]
    ]
    paired = [f"{part['paired'][scope][tau] / part['records']:.0%}" for scope, tau in gates]
    return table(header, [*rows, ["records with one accepted", str(part["records"]), *paired, *["" for _ in SCOPES]]])


def draw_gates(parts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the acceptance of annotated answers by kind of change, a row of panels for each part, a column for each tau.

    Args:
        parts: the annotated answers, of :func:`measure_gates`.
        path: picture to write.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    # Only plots need it, and type checkers may not have it.
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(11.5, 2.7 * len(parts) + 0.3), layout="constrained")
    axes = figure.subplots(len(parts), len(TAUS), squeeze=False, sharey=True)
    shades = dict(zip(SCOPES, ("#d1495b", "#9ecae1", "#08519c"), strict=True))
    width = 0.8 / len(SCOPES)
    for part, line in zip(parts, axes, strict=True):
        rows = [row for row in part["changes"] if row["change"] != ALL]
        for tau, axis in zip(TAUS, line, strict=True):
            for number, scope in enumerate(SCOPES):
                left = [place + (number - 1) * width for place in range(len(rows))]
                shares = [100 * row["accepted"][scope][f"{tau:.2f}"] for row in rows]
                bars = axis.bar(left, shares, width, color=shades[scope], label=f"compares the {scope}")
                axis.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
            names = [row["change"].replace(" ", "\n") for row in rows]
            axis.set_xticks(range(len(rows)), names, fontsize=8)
            title = f"{part['records']} {part['length']} answers, {part['similarity']}"
            axis.set_title(f"{title}, below {tau:.2f}", fontsize=9)
            axis.set_ylim(0, 112)
            axis.set_yticks(range(0, 101, 25))
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel("% accepted")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SCOPES), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


# ---- what is true


def _any(words: Iterable[str]) -> str:
    return f"({'|'.join(map(re.escape, words))})"


_PHRASE = re.compile(rf"a {_any(INKS)} {_any(DIGITS)} at {_any(CELLS)}")
_QUESTION = re.compile(rf"is there a {_any(DIGITS)} in the image \?")
_YES = re.compile(rf"yes at {_any(CELLS)} \.")


def truths(prompt: str, response: str, scene: Scene) -> list[bool] | None:
    """Whether each statement of a response is true of a scene; None if the response cannot be parsed.

    Args:
        prompt: asks for a caption, or for a digit.
        response: ``a {colour} {digit} at {cell} , ... .``, ``yes at {cell} .`` or ``no .``.
        scene: what is really there.
    """
    asked = _QUESTION.fullmatch(prompt)
    if asked is None:
        body, ends, rest = response.rpartition(" .")
        phrases = [_PHRASE.fullmatch(phrase) for phrase in body.split(" , ")]
        if not ends or rest or not all(phrases):
            return None
        shown = {(placed.colour, placed.digit, placed.cell) for placed in scene.digits}
        return [phrase.groups() in shown for phrase in phrases if phrase is not None]
    if response == "no .":
        return [all(placed.digit != asked[1] for placed in scene.digits)]
    said = _YES.fullmatch(response)
    return None if said is None else [any(placed[:2] == (said[1], asked[1]) for placed in scene.digits)]


class Pair(NamedTuple):
    """A pair, and what its image really shows."""

    key: str
    prompt: str
    chosen: str
    rejected: str
    scene: Scene

    @property
    def kind(self) -> str:
        """Of the record."""
        return self.key.rpartition("-")[2]


def measure_contradictions(scenes: int, folder: Path | None = None) -> dict[str, Any]:
    """Check all pairs of digit scenes.

    Args:
        scenes: how many.
        folder: where temporary files go.
    """
    source = DigitScenes(scenes)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        output = Path(own) / "pairs"
        report = digit_builder().build(source, output, Policy(DigitBackbone()), show_progress=False)
        samples = [decode_sample(one.read()) for shard in sorted(output.glob("*.tar")) for one in scan_shard(shard)]
    pairs = [
        Pair(sample.key, text_of(sample.prompt), sample.chosen, sample.rejected, source.scene(sample.key))
        for sample in samples
    ]
    if len(pairs) != report.pairs:
        raise RuntimeError(f"{report.pairs} pairs were built, and {len(pairs)} read.")
    return {"scenes": scenes, "records": report.records, **checked(pairs)}


def checked(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Counts of contradicting rejected and agreeing chosen responses by kind of record, and the doubtful ones.

    Args:
        pairs: all of them.
    """
    rows: dict[str, dict[str, int]] = {}
    names = ("pairs", "contradict", "rejected_true", "rejected_unparsed", "agree", "chosen_false", "chosen_unparsed")
    listed: dict[str, list[dict[str, str]]] = {
        name: [] for name in names if name not in ("pairs", "contradict", "agree")
    }
    for pair in pairs:
        chosen = _one_of(truths(pair.prompt, pair.chosen, pair.scene), "agree", "chosen_false", "chosen_unparsed")
        rejected = truths(pair.prompt, pair.rejected, pair.scene)
        outcome = _one_of(rejected, "rejected_true", "contradict", "rejected_unparsed")
        for kind in (pair.kind, "all"):
            row = rows.setdefault(kind, dict.fromkeys(names, 0))
            for name in ("pairs", chosen, outcome):
                row[name] += 1
        for name in {chosen, outcome} & listed.keys():
            shown = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            listed[name].append({"key": pair.key, **shown})
    order = [*sorted(kind for kind in rows if kind != "all"), *(["all"] if rows else [])]
    return {"kinds": {kind: rows[kind] for kind in order}, "listed": listed}


def _one_of(found: Sequence[bool] | None, if_true: str, if_false: str, unparsed: str) -> str:
    if found is None:
        return unparsed
    return if_true if all(found) else if_false


def contradictions_table(found: Mapping[str, Any]) -> str:
    """Shares by kind of record, in Markdown, and what could not be parsed or is not as it should be.

    Args:
        found: by :func:`measure_contradictions`.
    """
    kinds = found["kinds"]
    header = ["record", "pairs", "rejected contradict", "true", "unparsed", "chosen agree", "false", "unparsed"]
    rows = [
        [
            kind,
            str(row["pairs"]),
            f"{row['contradict'] / row['pairs']:.2%}",
            str(row["rejected_true"]),
            str(row["rejected_unparsed"]),
            f"{row['agree'] / row['pairs']:.2%}",
            str(row["chosen_false"]),
            str(row["chosen_unparsed"]),
        ]
        for kind, row in kinds.items()
    ]
    whole = kinds["all"]
    met = whole["contradict"] >= CONTRADICTING * whole["pairs"] and whole["agree"] >= AGREEING * whole["pairs"]
    blocks = [
        f"{found['scenes']} digit scenes, {found['records']} records:",
        table(header, rows),
        f"{CONTRADICTING:.0%} and {AGREEING:.0%} wanted: {_met(met)}.",
    ]
    for name, some in found["listed"].items():
        if some:
            lines = [f"- {one['key']}: {one['prompt']} / {one['chosen']} / {one['rejected']}" for one in some]
            blocks.append(f"{name.replace('_', ', ')} (prompt, chosen, rejected):\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)


# ---- command line


def _met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


def _say(what: str) -> None:
    tqdm.write(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=__doc__.split("\n")[0])
    parser.add_argument("--stages", action="store_true", help="time by stage")
    parser.add_argument("--batching", action="store_true", help="answers a second by batch size")
    parser.add_argument("--gates", action="store_true", help="acceptance by tau and scope")
    parser.add_argument("--contradictions", action="store_true", help="check pairs beside the scenes")
    parser.add_argument("--scenes", type=int, default=1000, help="of --stages, --gates and --contradictions")
    parser.add_argument("--turns", type=int, default=5, help="of --stages and --batching")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64, 128], metavar="N")
    parser.add_argument("--questions", type=int, default=256, help="to the digits' policy, of --batching")
    parser.add_argument("--larger-questions", type=int, default=128, help="to the larger model, of --batching")
    parser.add_argument("--shape", choices=_SHAPES, default=LARGER.name, help="of the larger model")
    parser.add_argument("--similarity-model", metavar="FOLDER", help="sentence encoder, of --gates")
    parser.add_argument("--long-words", type=int, default=30, help="that an answer is long from, of --gates")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--plot", type=Path, help="picture of --gates")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit status: 1 if answers depend on the size of their batch.
    """
    chosen = _parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    faiss().omp_set_num_threads(chosen.threads)
    device, dtype = torch.device("cpu"), torch.float32
    found: dict[str, Any] = {"environment": environment(device, dtype, chosen.turns, matmul_rate(device, dtype))}
    print("\n".join(f"- {name}: {value}" for name, value in found["environment"].items()))
    questions = chosen.questions, chosen.larger_questions
    works: dict[str, tuple[bool, Callable[[], Any], Callable[[Any], str]]] = {
        "stages": (chosen.stages, lambda: measure_stages(chosen.scenes, chosen.turns, chosen.folder), stages_table),
        "batching": (
            chosen.batching,
            lambda: measure_batching(
                chosen.batch_sizes, chosen.turns, *questions, _SHAPES[chosen.shape], chosen.folder
            ),
            batching_table,
        ),
        "gates": (
            chosen.gates,
            lambda: measure_gates(chosen.scenes, chosen.similarity_model, chosen.long_words, chosen.folder),
            gates_table,
        ),
        "contradictions": (
            chosen.contradictions,
            lambda: measure_contradictions(chosen.scenes, chosen.folder),
            contradictions_table,
        ),
    }
    for name, (is_wanted, measure, as_text) in works.items():
        if is_wanted:
            found[name] = measure()
            print(f"\n{as_text(found[name])}")
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if chosen.plot is not None and chosen.gates:
        draw_gates(found["gates"]["answers"], chosen.plot)
    return int(any(size["differ"] for work in found.get("batching", ()) for size in work["sizes"]))


if __name__ == "__main__":
    sys.exit(main())
