"""The digit scenes as a run: the policy as a backbone, pairs built from its own hallucinations, and benchmarks."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from realign_lightning.backbones import AutoBackbone, Backbone
from realign_lightning.callbacks.pictures import Row, draw_rows
from realign_lightning.data import ShardBuilder, ShardDataset, read_index
from realign_lightning.demos.policy import POLICY_FOLDER
from realign_lightning.demos.scenes import (
    DESCRIBE,
    DIGITS,
    DigitWorld,
    Scene,
    Split,
    caption,
    fill_prompt,
    objects,
    question,
)
from realign_lightning.demos.source import DigitScenes
from realign_lightning.engines import LocalEngine, Policy
from realign_lightning.evaluation.base import Benchmark, Question
from realign_lightning.metrics import CHAIR, POPE, Lexicon, pope_questions
from realign_lightning.metrics.functional.pope import PopeKind
from realign_lightning.preferences import Completer, Gate, LexiconMasker, PreferenceBuilder, Retriever, WordOverlap
from realign_lightning.ranks import alone
from realign_lightning.types import PreferenceSample

log = logging.getLogger(__name__)

_WORLD = "digit scenes"

TEACHING_SKEW = 0.9
"""Skew of the world that the shipped policy was taught in."""


class DigitBackbone(AutoBackbone):
    """The policy of the digit scenes.

    Args:
        path: folder of a checkpoint; None takes the one that ships with this package. ``realign-lightning
            teach-digits`` makes another.
        max_length: see :class:`~realign_lightning.backbones.AutoBackbone`.
    """

    def __init__(self, path: str | None = None, max_length: int | None = None) -> None:
        super().__init__(str(POLICY_FOLDER) if path is None else path, dtype="float32", max_length=max_length)


class DigitPairs(ShardBuilder):
    """Builds the quick start's pairs: the policy masks, retrieves and hallucinates on scenes that it has not seen.

    Every scene gives a caption, of which digit words are masked, and a question about one digit, whose answer is masked
    as a whole. Shards that were built with the same settings from the same policy are used again.

    Args:
        scenes: training scenes; twice as many pairs at most.
        val_scenes: validation scenes, of handwriting that training does not show.
        skew: see :class:`~realign_lightning.demos.DigitWorld`.
        mask_probability: share of digit words that are masked.
        tau: completions at least this similar to the truth are tried on the next image.
        top_k: retrieved images per scene.
        seed: of scenes, masks and sampling.
        picture: file for a picture of a few pairs, beside the training shards; None for none.

    Raises:
        ValueError: for fewer than two scenes.
    """

    def __init__(
        self,
        scenes: int = 1000,
        val_scenes: int = 150,
        skew: float = TEACHING_SKEW,
        mask_probability: float = 0.5,
        tau: float = 0.95,
        top_k: int = 10,
        seed: int = 0,
        picture: str | None = "pairs.png",
    ) -> None:
        for name, count in (("scenes", scenes), ("val_scenes", val_scenes)):
            if count < 2:
                raise ValueError(f"Expected `{name}` to be at least 2, one to retrieve for the other, got {count}.")
        self.scenes = scenes
        self.val_scenes = val_scenes
        self.skew = skew
        self.mask_probability = mask_probability
        self.tau = tau
        self.top_k = top_k
        self.seed = seed
        self.picture = picture

    def build(self, backbone: Backbone, train: str, val: str | None) -> None:
        """Build the shards that are missing or were built otherwise.

        Args:
            backbone: the policy.
            train: folder for the training shards.
            val: folder for the validation shards.

        Raises:
            FileExistsError: if a folder holds shards that are not of digit scenes; they are left alone.
        """
        wanted: list[tuple[str, Split, int]] = [(train, "train", self.scenes)]
        if val is not None:
            wanted.append((val, "validation", self.val_scenes))
        facts = {folder: self._facts(backbone, split, count) for folder, split, count in wanted}
        stale = [(folder, split, count) for folder, split, count in wanted if not _is_built(folder, facts[folder])]
        if not stale:
            log.info("Using the pairs in %s.", ", ".join(folder for folder, _, _ in wanted))
            return
        for folder, _, _ in stale:
            if _built_with(folder) is None and any(Path(folder).glob("*.tar")):
                raise FileExistsError(
                    f"{folder} holds shards that this builder did not make, or did not finish. To train on your own, "
                    "leave the builder out (--data.builder null); to build here, give another folder or delete it."
                )
        policy = Policy(backbone)
        for folder, split, count in stale:
            self._build_split(policy, folder, split, count, facts[folder])
        if self.picture is not None:
            path = Path(train).parent / self.picture
            draw_pairs(ShardDataset(train, backbone).first(4)).save(path)
            log.info("A picture of a few pairs: %s", path)

    def _facts(self, backbone: Backbone, split: Split, count: int) -> dict[str, Any]:
        """What the shards of a split depend on."""
        settings = {name: getattr(self, name) for name in ("skew", "mask_probability", "tau", "top_k", "seed")}
        return {"world": _WORLD, "split": split, "scenes": count, "policy": dict(Policy(backbone).identity), **settings}

    def _build_split(self, policy: Policy, folder: str, split: Split, count: int, facts: dict[str, Any]) -> None:
        log.info("Building %s pairs from %d scenes into %s.", split, count, folder)
        ours = _built_with(folder) is not None
        source = DigitScenes(count, split, self.skew, self.seed)
        builder = digit_builder(self.mask_probability, self.tau, self.top_k, self.seed)
        # Of several processes that train, one builds while the others wait.
        with alone():
            report = builder.build(source, folder, policy, title="Digit scenes", settings=facts, overwrite=ours)
        if not report.pairs:
            raise ValueError(f"No pair came out, nothing was written to {folder}: {report.left_out}. Raise `tau`.")
        log.info("%s", report.as_text())


def digit_builder(
    mask_probability: float = 0.5, tau: float = 0.95, top_k: int = 10, seed: int = 0
) -> PreferenceBuilder:
    """What builds pairs of digit scenes: digit words are masked, and filled with digit words.

    Answers to questions, which hold none, are masked as a whole and asked for again.

    Args:
        mask_probability: share of digit words that are masked.
        tau: completions at least this similar to the truth, in words, are tried on the next image.
        top_k: retrieved images per scene.
        seed: of masks and sampling.
    """
    return PreferenceBuilder(
        LexiconMasker(DIGITS, mask_probability, otherwise="whole", seed=seed),
        Retriever(top_k=top_k),
        Completer(
            "infill",
            LocalEngine(batch_size=128, max_new_tokens=48, sample=True),
            instruction=fill_prompt("{masked}"),
            fillers=DIGITS,
        ),
        Gate(WordOverlap(), tau),
        seed=seed,
    )


def _built_with(folder: str) -> dict[str, Any] | None:
    """What the pairs of digit scenes in a folder were built with; None where there are none, or others."""
    if not (Path(folder) / "index.json").is_file():
        return None
    built_with = dict(read_index(folder).built_with)
    return built_with if built_with.get("world") == _WORLD else None


def _is_built(folder: str, facts: dict[str, Any]) -> bool:
    built_with = _built_with(folder)
    if built_with is None:
        return False
    if all(built_with.get(name) == value for name, value in facts.items()):
        return True
    log.info("The pairs in %s were built with other settings or another policy: building them again.", folder)
    return False


def draw_pairs(samples: Sequence[PreferenceSample]) -> Any:
    """A picture of pairs: original and retrieved image, chosen and rejected response.

    Args:
        samples: at least one.

    Returns:
        An RGB picture.
    """
    return draw_rows(
        [
            Row(
                [("image", sample.image), ("retrieved image", sample.retrieved)],
                [("prompt", str(sample.prompt)), ("chosen", sample.chosen), ("rejected", sample.rejected)],
            )
            for sample in samples
        ]
    )


class _SceneBenchmark(Benchmark):
    """Scenes of unseen handwriting.

    Args:
        scenes: how many scenes to show.
        split: whose handwriting.
        skew: of the world they come from; 0 is balanced.
        seed: of the scenes.
    """

    def __init__(self, scenes: int = 500, split: Split = "test", skew: float = 0.0, seed: int = 0) -> None:
        if scenes < 1:
            raise ValueError(f"Expected `scenes` to be at least 1, got {scenes}.")
        self.world = DigitWorld(split, skew, seed)
        self.scenes = self.world.scenes(scenes)


class DigitPOPE(_SceneBenchmark):
    """POPE on digit scenes: one digit that is there and one that is not, per scene and kind.

    ``popular`` and ``adversarial`` ask for what is frequent, and what goes together, in the world that the policy was
    taught in: that is the prior it hallucinates from. Scores are percentages.
    """

    max_new_tokens = 8

    @cached_property
    def asked(self) -> dict[PopeKind, list[tuple[Scene, str, str]]]:
        """Scene, digit and right answer of every question, by kind."""
        return {kind: self._choose(kind) for kind in get_args(PopeKind)}

    def _choose(self, kind: PopeKind) -> list[tuple[Scene, str, str]]:
        generator = random.Random(self.world.seed)
        shown = [generator.sample(objects(scene), len(scene.digits)) for scene in self.scenes]
        # Scenes of the teaching world, so many that their counts decide what is popular and what goes together.
        taught = [objects(scene) for scene in DigitWorld("train", TEACHING_SKEW, seed=1).scenes(8 * len(shown))]
        chosen = pope_questions([*shown, *taught], kind, self.world.seed, per_image=1)[: len(shown)]
        return [
            (scene, digit, label) for scene, pairs in zip(self.scenes, chosen, strict=True) for digit, label in pairs
        ]

    def questions(self) -> list[Question]:
        """Questions of the three kinds, one kind after the other."""
        return [Question(question(digit), scene.image) for asked in self.asked.values() for scene, digit, _ in asked]

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy, F1 and share of yes, per kind, in percent."""
        scores: dict[str, float] = {}
        start = 0
        for kind, asked in self.asked.items():
            metric = POPE()
            metric.update(list(answers[start : start + len(asked)]), [label for _, _, label in asked])
            start += len(asked)
            values = metric.compute()
            for name, title in (("accuracy", "accuracy"), ("f1", "F1"), ("yes_ratio", "yes ratio")):
                scores[f"POPE {kind}: {title}"] = 100 * values[name].item()
        return scores


class DigitCHAIR(_SceneBenchmark):
    """CHAIR on captions of digit scenes, with what it must be read beside: recall, exact captions and their length."""

    max_new_tokens = 48

    def questions(self) -> list[Question]:
        """Asks for a caption of every scene."""
        return [Question(DESCRIBE, scene.image) for scene in self.scenes]

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """CHAIR, recall and exact match in percent, caption length in words."""
        metric = CHAIR(synonyms=Lexicon({digit: [] for digit in DIGITS}))
        metric.update(list(answers), [set(objects(scene)) for scene in self.scenes])
        values = metric.compute()
        exact = sum(text == caption(scene) for text, scene in zip(answers, self.scenes, strict=True))
        return {
            "CHAIRs": 100 * values["chair_s"].item(),
            "CHAIRi": 100 * values["chair_i"].item(),
            "CHAIR recall": 100 * values["recall"].item(),
            "exact captions": 100 * exact / len(self.scenes),
            "caption length in words": values["mean_length"].item(),
        }
