"""A small world to build pairs in: pictures of one colour each, whose policy says what colour it sees."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from realign_lightning.data.sources import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.engines import Answer, Engine
from realign_lightning.preferences import (
    Completer,
    Gate,
    ImageEncoder,
    LexiconMasker,
    PreferenceBuilder,
    Retriever,
    WordOverlap,
)

COLOURS = ["red", "green", "blue", "pink", "brown", "black", "white", "grey", "gold", "teal", "lime", "navy"]


def picture(number: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Coarse noise, unlike any other; its first pixel tells the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.putpixel((0, 0), (number // 256, number % 256, 77))
    return image


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def number_of(image: Image.Image) -> int:
    high, low, mark = image.getpixel((0, 0))
    assert mark == 77
    return 256 * high + low


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def answer_of(asked: int, seen: int) -> str:
    """The answer to the question of one record by who sees the image of another: seven words."""
    return f"number {asked} is {colour(seen)}, says my eye."


def file_of(number: int) -> ImageFile:
    return ImageFile(f"image{number:03d}", data=png(picture(number)))


def record(number: int, **changes) -> SourceRecord:
    values = {
        "key": f"record{number:03d}",
        "image": file_of(number),
        "prompt": f"what colour is number {number}?",
        "chosen": answer_of(number, number),
    }
    return SourceRecord(**{**values, **changes})


class Listed(Source):
    """Rows at hand."""

    def __init__(self, *rows: SourceRecord | SourceProblem) -> None:
        self.rows = rows

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        return iter(self.rows)


class Pixels(ImageEncoder):
    """A random projection of the pixels."""

    batch_size = 8
    identity = {"encoder": "pixels"}  # noqa: RUF012

    def __init__(self) -> None:
        self.embedded = 0

    def embed(self, images):
        weight = torch.randn(8 * 8 * 3, 16, generator=torch.Generator().manual_seed(0))
        pixels = [torch.tensor(np.asarray(image.resize((8, 8)))).flatten() for image in images]
        self.embedded += len(images)
        return F.normalize((torch.stack(pixels).float() / 255 - 0.5) @ weight, dim=1)


class Eyes(Engine):
    """Says what colour an image is; some of what it is asked goes wrong.

    Args:
        log: file that every question is noted in when it is answered.
        wrong: gives another answer for (image, prompt), or None.
        pause: seconds that a batch takes.
    """

    def __init__(
        self,
        log: Path | None = None,
        wrong: Callable[[int, str], Answer | None] = lambda number, prompt: None,
        pause: float = 0.0,
        batch_size: int = 4,
    ) -> None:
        self.batch_size = batch_size
        self.asked: list[tuple[str, int]] = []
        self._log, self._wrong, self._pause = log, wrong, pause

    @property
    def identity(self):
        return {"engine": "eyes"}

    def answer(self, questions):
        time.sleep(self._pause)
        asked = [(question.prompt, number_of(question.image)) for question in questions]
        self.asked += asked
        if self._log is not None:
            with self._log.open("a") as file:
                file.writelines(f"{number} {prompt!r}\n" for prompt, number in asked)
        return [self._wrong(number, prompt) or self._say(number, prompt) for prompt, number in asked]

    @staticmethod
    def _say(number: int, prompt: str) -> Answer:
        if "[MASK]" in prompt:
            return Answer(prompt.replace("[MASK]", colour(number)), True, None, 10, 5)
        asked = int(prompt.split()[-1].removesuffix("?"))
        return Answer(answer_of(asked, number), True, None, 10, 5)


def builder(engine: Engine | None = None, encoder: ImageEncoder | None = None, **settings) -> PreferenceBuilder:
    top_k = settings.pop("top_k", 4)
    parts = {
        "masker": LexiconMasker(COLOURS),
        "retriever": Retriever(encoder or Pixels(), top_k=top_k),
        "completer": Completer(engine=engine or Eyes(), instruction="{masked}"),
        "gate": Gate(WordOverlap()),
    }
    return PreferenceBuilder(**{**parts, **settings})
