"""What the experiment of benchmarks/evidence.py runs in: policies, pairs and measurements."""

from __future__ import annotations

import fcntl
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from realign_lightning.backbones import Backbone
from realign_lightning.backbones.files import write_json
from realign_lightning.demos import DigitBackbone, DigitCHAIR, DigitPOPE, DigitScenes, DigitSkills
from realign_lightning.demos.scenes import DIGITS, INKS, Split, fill_prompt, objects, partner
from realign_lightning.demos.teach import teach
from realign_lightning.engines import LocalEngine, Policy
from realign_lightning.evaluation.base import Benchmark
from realign_lightning.preferences import (
    Completer,
    EmbeddingStore,
    Gate,
    LexiconMasker,
    Neighbour,
    PreferenceBuilder,
    Retriever,
    WordOverlap,
)
from realign_lightning.preferences.completing import Mode
from realign_lightning.preferences.masking.base import Level
from realign_lightning.preferences.pipeline.drafts import OWN

Part = Literal["validation", "test", "ablation"]
"""What is measured on: the scenes that choose hyper-parameters, those that results are about, fewer of the latter."""


PRIOR, OTHER = "hallucinated by the prior", "hallucinated otherwise"
"""Digits that are not there and whose partner is, and all other digits that are not there, per 100 mentioned."""


class World(ABC):
    """Policies, pairs and measurements. Subclass it to run the experiment on models and images of your own.

    Attributes:
        names: of the kinds of pairs that every method is trained on, one after the other.
        seeds_are: what differs from seed to seed, for the page.
        chosen_on: on what hyper-parameters are chosen, for the page.
        parts: for which there is something to measure.
        most_pairs: that are read of every folder, drawn by seed; None are all.
    """

    names: Sequence[str]
    parts: Collection[Part] = ("validation", "test", "ablation")
    most_pairs: int | None = None
    seeds_are: str = "seeds"
    chosen_on: str = "with other seeds, on the questions of the validation part"

    def prepare(self, seed: int, folder: Path) -> Mapping[str, Any]:
        """Make what belongs to a seed, if there is anything to make.

        Args:
            seed: of the policy.
            folder: for it, which is not there: what an interrupted call left was removed.

        Returns:
            Plain values that are worth keeping.
        """
        return {}

    @abstractmethod
    def backbone(self, folder: Path) -> Backbone:
        """The policy of a seed.

        Args:
            folder: of :meth:`prepare`.
        """

    @abstractmethod
    def pairs(self, name: str, changes: Mapping[str, Any], backbone: Backbone, seed: int, folder: Path) -> Path:
        """A folder with the shards of pairs to train on, built now if they are not there.

        Args:
            name: one of :attr:`names`.
            changes: arguments of the pairs that differ from the world's own.
            backbone: the policy.
            seed: of the policy.
            folder: where to build.
        """

    @abstractmethod
    def margin_pairs(self, backbone: Backbone, seed: int, part: Part, folder: Path) -> Path | None:
        """Shards of pairs about images that nothing was trained on; None where there are none.

        Args:
            backbone: the policy.
            seed: of the policy.
            part: what they belong to.
            folder: where to build.
        """

    @abstractmethod
    def benchmarks(self, seed: int, part: Part) -> Sequence[Benchmark]:
        """What is measured.

        Args:
            seed: of the policy: others are asked about other images where there are enough.
            part: how much, and on which images.
        """


@dataclass(frozen=True)
class Size:
    """How much is asked for a measurement.

    Args:
        captions: scenes to describe.
        questions: scenes to ask about, six questions each.
        skills: questions per skill.
        margins: scenes whose pairs the log-prob margins are measured on.
    """

    captions: int
    questions: int
    skills: int
    margins: int


@dataclass(frozen=True)
class DigitPairSettings:
    """How pairs of digit scenes are built.

    Args:
        tau: completions at least this similar to the truth are tried on the next image.
        top_k: retrieved images per scene.
        first_rank: of the retrieved images that are tried; 0 is the most similar.
        mask_probability: share of digit words, or other kinds, that are masked.
        level: words or sentences.
        kinds: what is masked: ``object`` are digits, ``attribute`` inks.
        mode: whether blanks are filled between the fixed words, or the whole text is written anew.
        adversarial: share of the questions about absent digits that ask for what goes with a digit that is there.
        own_mistakes: whether the policy's mistakes on the image itself are taken first.
    """

    tau: float = 0.95
    top_k: int = 5
    first_rank: int = 0
    mask_probability: float = 0.5
    level: Level = "segment"
    kinds: tuple[str, ...] = ("object",)
    mode: Mode = "infill"
    adversarial: float = 0.0
    own_mistakes: bool = False

    def builder(self, seed: int) -> PreferenceBuilder:
        """What builds them.

        Args:
            seed: of masks and sampling.
        """
        words = {"object": list(DIGITS), "attribute": list(INKS)}
        wanted = {kind: words[kind] for kind in self.kinds}
        fillers = [word for kind in self.kinds for word in words[kind]] if self.mode == "infill" else []
        return PreferenceBuilder(
            LexiconMasker(wanted, self.mask_probability, otherwise="whole", seed=seed, level=self.level),
            RankedRetriever(self.top_k, self.first_rank),
            Completer(
                self.mode,
                LocalEngine(batch_size=128, max_new_tokens=48, sample=True),
                instruction=fill_prompt("{masked}"),
                fillers=fillers,
            ),
            Gate(WordOverlap(), self.tau),
            seed=seed,
            own_mistakes=self.own_mistakes,
        )


class RankedRetriever(Retriever):
    """Leaves out the most similar images.

    Args:
        top_k: neighbours per image.
        first_rank: of the first that is taken; 0 is the most similar.
    """

    def __init__(self, top_k: int, first_rank: int = 0) -> None:
        super().__init__(top_k=first_rank + top_k)
        self.first_rank = first_rank

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that neighbours depend on."""
        return {**super().identity, "first_rank": self.first_rank}

    def neighbours(
        self, store: EmbeddingStore, contents: Mapping[str, str], queries: Sequence[str] | None = None
    ) -> Iterator[tuple[str, list[Neighbour]]]:
        """Neighbours of images from the first rank on; see :meth:`Retriever.neighbours`.

        Args:
            store: of embeddings.
            contents: hashes of the images.
            queries: images to search for.
        """
        for query, found in super().neighbours(store, contents, queries):
            yield query, found[self.first_rank :]


class DigitPrior(DigitCHAIR):
    """CHAIR with its mistakes told apart: those that the prior of the teaching world suggests, and all others."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Scores of captions, and hallucinated digits per 100 that were mentioned, by whether a partner is there."""
        shown = [set(objects(scene)) for scene in self.scenes]
        mentioned = [
            (word, truth) for text, truth in zip(answers, shown, strict=True) for word in text.split() if word in DIGITS
        ]
        wrong = [(word, truth) for word, truth in mentioned if word not in truth]
        expected = sum(partner(word) in truth for word, truth in wrong)
        share = 100 / max(1, len(mentioned))
        return super().score(answers) | {PRIOR: share * expected, OTHER: share * (len(wrong) - expected)}


class Digits(World):
    """Digit scenes: a policy that is taught from nothing for every seed, and worlds with ground truth.

    Args:
        skews: of the worlds that pairs come from, by name; measurements are on balanced worlds.
        teaching: arguments of :func:`~realign_lightning.demos.teach` beside folder and seed.
        scenes: from which pairs are built.
        sizes: of measurements, by part.
    """

    seeds_are = "fresh policies"
    chosen_on = "on other policies and other handwriting"

    def __init__(
        self,
        skews: dict[str, float],
        teaching: dict[str, Any],
        scenes: int,
        sizes: dict[Part, Size],
    ) -> None:
        self.names = list(skews)
        self.skews = skews
        self.teaching = teaching
        self.scenes = scenes
        self.sizes = sizes
        self.parts = list(sizes)

    def prepare(self, seed: int, folder: Path) -> Mapping[str, Any]:
        """Teach a policy; what it can do."""
        return teach(folder, seed=seed, **self.teaching)

    def backbone(self, folder: Path) -> Backbone:
        """The policy that was taught."""
        return DigitBackbone(str(folder))

    def pairs(self, name: str, changes: Mapping[str, Any], backbone: Backbone, seed: int, folder: Path) -> Path:
        """Pairs of scenes that the policy was not taught on."""
        settings = replace(DigitPairSettings(), **{**changes, "kinds": tuple(changes.get("kinds", ("object",)))})
        source = DigitScenes(self.scenes, "train", self.skews[name], seed, settings.adversarial)
        return build_pairs(source, settings, backbone, seed, folder)

    def margin_pairs(self, backbone: Backbone, seed: int, part: Part, folder: Path) -> Path | None:
        """Pairs of a balanced world of unseen handwriting."""
        scenes = self.sizes[part].margins
        if not scenes:
            return None
        source = DigitScenes(scenes, "validation" if part == "validation" else "test", 0.0, seed)
        return build_pairs(source, DigitPairSettings(), backbone, seed, folder)

    def benchmarks(self, seed: int, part: Part) -> Sequence[Benchmark]:
        """Captions, questions and skills on a balanced world of unseen handwriting; every seed sees other scenes."""
        size = self.sizes[part]
        split: Split = "validation" if part == "validation" else "test"
        return (
            DigitPrior(size.captions, split, 0.0, seed),
            DigitPOPE(size.questions, split, 0.0, seed),
            DigitSkills(size.skills, split, 0.0, seed),
        )


def build_pairs(source: DigitScenes, settings: DigitPairSettings, backbone: Backbone, seed: int, folder: Path) -> Path:
    """Build pairs of digit scenes, unless they are there; ``{folder}.json`` says how many there are.

    Args:
        source: of the scenes.
        settings: how.
        backbone: the policy.
        seed: of masks and sampling.
        folder: for the shards.

    Returns:
        The folder.

    Raises:
        ValueError: if no pair came out.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two jobs of a policy may want the same pairs.
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = folder.with_name(f"{folder.name}.json")
        wanted = json.loads(json.dumps(asdict(settings)))
        if told.is_file():
            _check_same(folder, json.loads(told.read_text(encoding="utf-8")), wanted)
        else:
            report = settings.builder(seed).build(source, folder, Policy(backbone), show_progress=False)
            if not report.pairs:
                raise ValueError(f"No pair came out for {settings}: {report.left_out}.")
            write_json(told, {"pairs": report.pairs, "own": report.accepted_by_rank.get(OWN, 0), **wanted})
            shutil.rmtree(folder.with_name(f"{folder.name}.work"))
    return folder


def _check_same(folder: Path, told: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse pairs that were built with other defaults."""
    other = {name: told.get(name) for name, value in wanted.items() if told.get(name) != value}
    if other:
        raise ValueError(f"Expected pairs of {folder} with {wanted}, got {other}. Give another --work, or remove them.")


class Prepared(World):
    """A model and pairs that are there: a real VLM with shards that ``realign-lightning build`` made, and benchmarks.

    Args:
        model: the policy.
        shards: folders of pairs by name.
        tests: what is measured, by part: ``validation`` and ``test``, and for ablations and dials ``ablation``.
        variants: folders of pairs by name and, behind a slash, the changes in JSON, as ablations name them.
        held_out: shards of pairs that nothing was trained on, for margins.
        most_pairs: that are read of a folder, a draw of its own for every seed: they stay in memory, and training takes
            no more than its steps times its batch size. None reads all.

    Raises:
        ValueError: if ``tests`` lacks a part that every experiment needs, or ``most_pairs`` is below 1.
    """

    seeds_are = "training seeds of one model, asked about the same images"

    def __init__(
        self,
        model: Backbone,
        shards: dict[str, str],
        tests: dict[Part, list[Benchmark]],
        variants: dict[str, str] | None = None,
        held_out: str | None = None,
        most_pairs: int | None = None,
    ) -> None:
        if missing := {"validation", "test"} - tests.keys():
            raise ValueError(
                f"Expected benchmarks for 'validation' and 'test' in `tests`, got {sorted(tests)}. Add "
                f"{sorted(missing)}."
            )
        if most_pairs is not None and most_pairs < 1:
            raise ValueError(f"Expected `most_pairs` of at least 1, or null for all, got {most_pairs}.")
        self.names = list(shards)
        self.model = model
        self.shards = shards
        self.tests = tests
        self.variants = variants or {}
        self.held_out = held_out
        self.most_pairs = most_pairs
        self.parts = list(tests)

    def backbone(self, folder: Path) -> Backbone:
        """The model; seeds differ in draw and order of the pairs and in the adapter's first weights."""
        return self.model

    def pairs(self, name: str, changes: Mapping[str, Any], backbone: Backbone, seed: int, folder: Path) -> Path:
        """The shards.

        Raises:
            KeyError: for changes that no shards are there for.
        """
        if not changes:
            return Path(self.shards[name])
        wanted = f"{name}/{json.dumps(changes, sort_keys=True)}"
        if wanted not in self.variants:
            raise KeyError(
                f"Expected shards for {wanted!r} in `variants`, got {sorted(self.variants)}. Build them "
                "(realign-lightning build), or leave the ablation out."
            )
        return Path(self.variants[wanted])

    def margin_pairs(self, backbone: Backbone, seed: int, part: Part, folder: Path) -> Path | None:
        """The shards held out."""
        return None if self.held_out is None else Path(self.held_out)

    def benchmarks(self, seed: int, part: Part) -> Sequence[Benchmark]:
        """The same for all seeds."""
        return self.tests[part]
