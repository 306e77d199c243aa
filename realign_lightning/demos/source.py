"""Digit scenes as a source of answers about images."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

from PIL import Image

from realign_lightning.data.sources import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.demos.scenes import (
    DESCRIBE,
    DigitWorld,
    Scene,
    Split,
    absent,
    answer,
    caption,
    objects,
    partner,
    question,
)

_FAR = 50_000
"""Seeds of worlds that the shipped policy was not taught in."""


class DigitScenes(Source):
    """True answers about digit scenes that the shipped policy has not seen.

    Every scene gives a caption, and a question about one digit that is there or not, each as likely. Questions about
    absent digits can be those of POPE's adversarial kind: they ask for what goes with a digit that is there.

    Args:
        scenes: how many; twice as many records.
        split: whose handwriting they show.
        skew: see :class:`~realign_lightning.demos.DigitWorld`.
        seed: of scenes and questions.
        adversarial: share of the scenes where an absent digit, if one is asked for, is the
            :func:`~realign_lightning.demos.scenes.partner` of a digit that is there, as far as one is absent.

    Raises:
        ValueError: for fewer than two scenes: one is retrieved for the other; and for a share that is none.
    """

    def __init__(
        self,
        scenes: int = 1000,
        split: Split = "train",
        skew: float = 0.9,
        seed: int = 0,
        adversarial: float = 0.0,
    ) -> None:
        if not 0 <= adversarial <= 1:
            raise ValueError(f"Expected `adversarial` from 0 to 1, got {adversarial}.")
        if scenes < 2:
            raise ValueError(f"Expected `scenes` to be at least 2, one to retrieve for the other, got {scenes}.")
        self.world = DigitWorld(split, skew, seed=_FAR + seed)
        self.scenes = scenes
        self.seed = seed
        self.adversarial = adversarial

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Caption and question of every scene; the digits in it are its known objects."""
        for number in range(self.scenes):
            yield from self._records(f"scene{number:05d}", self.world.scene(number))

    def scene(self, key: str) -> Scene:
        """The scene that a record is about.

        Args:
            key: of the record.
        """
        return self.world.scene(int(key.removeprefix("scene").partition("-")[0]))

    def _records(self, name: str, scene: Scene) -> Iterator[SourceRecord]:
        image, known = ImageFile(name, data=_png(scene.image)), tuple(objects(scene))
        yield SourceRecord(f"{name}-caption", image, DESCRIBE, caption(scene), objects=known)
        generator = random.Random(f"{self.seed}:{name}")
        digit = generator.choice(objects(scene) if generator.random() < 0.5 else self._absent(scene, generator))
        yield SourceRecord(f"{name}-question", image, question(digit), answer(scene, digit), objects=known)

    def _absent(self, scene: Scene, generator: random.Random) -> list[str]:
        likely = [digit for digit in map(partner, objects(scene)) if digit not in objects(scene)]
        # Nothing is drawn for a share of 0: the questions stay what they always were.
        return likely if self.adversarial and likely and generator.random() < self.adversarial else absent(scene)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
