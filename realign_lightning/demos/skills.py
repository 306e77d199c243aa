"""What a policy of the digit scenes can do beside describing and answering about digits.

Preference pairs are about which digits a scene holds. These four skills are asked of the same eyes, and no pair touches
them: naming the ink of a cell, counting, saying which cells are full, and reading one digit that fills the picture.
What a method takes from them is its alignment tax (Re-Align, arXiv 2502.13146, leaves that balance open).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from realign_lightning.demos.scenes import (
    DIGITS,
    INKS,
    VOCABULARY,
    DigitWorld,
    PlacedDigit,
    Scene,
    Split,
    handwriting,
    to_image,
)
from realign_lightning.evaluation.base import Benchmark, Question

Skill = Literal["colour", "count", "place", "read"]
"""Name of a skill."""

COUNT = "how many digits are there ?"
"""The prompt that asks for the number of digits."""

PLACE = "where are the digits ?"
"""The prompt that asks for the cells that are full, in reading order."""

READ = "what digit is the image ?"
"""The prompt that asks for the digit that fills the picture."""

SKILL_VOCABULARY = (*VOCABULARY, "what", "how", "many", "digit", "digits", "are", "where", "colour")
"""Every word of scenes and skills."""


def colour_question(cell: str) -> str:
    """The question for the ink of the digit in a cell."""
    return f"what colour is at {cell} ?"


def ask(skill: Skill, scene: Scene, generator: np.random.Generator) -> tuple[str, str]:
    """A question and its right answer.

    Args:
        skill: ``read`` is about a :func:`large_scene`, the others about any.
        scene: what is asked about.
        generator: chooses the cell of a question for ink.

    Example:
        >>> scene = DigitWorld("train", skew=0.9, seed=0).scene(14)
        >>> ask("count", scene, np.random.default_rng(0))
        ('how many digits are there ?', 'two .')
    """
    if skill == "colour":
        placed = scene.digits[generator.integers(len(scene.digits))]
        return colour_question(placed.cell), f"{placed.colour} ."
    if skill == "count":
        return COUNT, f"{DIGITS[len(scene.digits)]} ."
    if skill == "place":
        return PLACE, " , ".join(placed.cell for placed in scene.digits) + " ."
    return READ, f"{scene.digits[0].digit} ."


def large_scene(world: DigitWorld, index: int) -> Scene:
    """A picture that one digit fills; its only :class:`~realign_lightning.demos.scenes.PlacedDigit` has no cell.

    Args:
        world: whose handwriting and noise; its skew does not count.
        index: not negative; a picture depends on it, on split and seed alone.
    """
    generator = np.random.default_rng((world.seed, get_args(Split).index(world.split), index, 1))
    digit, colour = str(generator.choice(DIGITS)), str(generator.choice(list(INKS)))
    glyph = generator.choice(handwriting(world.split)[digit]) * generator.uniform(0.6, 1.0)
    light = glyph.repeat(2, axis=0).repeat(2, axis=1)[:, :, None] * np.array(INKS[colour])
    return Scene(to_image(light, world.noise, generator), (PlacedDigit("", digit, colour),))


def skill_scene(skill: Skill, world: DigitWorld, index: int) -> Scene:
    """What a skill is asked about: a :func:`large_scene` to read, an ordinary one for the others.

    Args:
        skill: that is asked for.
        world: where scenes come from.
        index: number of the scene.
    """
    return large_scene(world, index) if skill == "read" else world.scene(index)


class DigitSkills(Benchmark):
    """Accuracy at the four skills on scenes of unseen handwriting, for policies that were taught them.

    Args:
        scenes: questions per skill, each about a scene of its own.
        split: whose handwriting.
        skew: of the world they come from; 0 is balanced.
        seed: of scenes and questions.

    Raises:
        ValueError: for less than one scene.
    """

    max_new_tokens = 16

    def __init__(self, scenes: int = 250, split: Split = "test", skew: float = 0.0, seed: int = 0) -> None:
        if scenes < 1:
            raise ValueError(f"Expected `scenes` to be at least 1, got {scenes}.")
        world, generator = DigitWorld(split, skew, seed), np.random.default_rng(seed)
        self.asked: list[tuple[Skill, Scene, str, str]] = []
        for part, skill in enumerate(get_args(Skill)):
            for index in range(part * scenes, (part + 1) * scenes):
                scene = skill_scene(skill, world, index)
                self.asked.append((skill, scene, *ask(skill, scene, generator)))

    def questions(self) -> list[Question]:
        """All questions, skill after skill."""
        return [Question(prompt, scene.image) for _, scene, prompt, _ in self.asked]

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Exactly right answers per skill, and their mean over the skills, in percent."""
        right: dict[Skill, list[bool]] = {skill: [] for skill in get_args(Skill)}
        for (skill, _, _, expected), answer in zip(self.asked, answers, strict=True):
            right[skill].append(answer == expected)
        scores = {f"skill {skill}": 100 * float(np.mean(found)) for skill, found in right.items()}
        return {**scores, "skills": float(np.mean(list(scores.values())))}
