"""Digit scenes: small pictures of real handwritten digits with captions, questions and ground truth.

A scene is a 32 x 32 picture of a 2 x 2 grid that holds one to four different handwritten digits in coloured ink under
noise. The digits are those of scikit-learn's ``load_digits`` (the test part of the UCI set "Optical Recognition of
Handwritten Digits"); its samples are split into three disjoint parts, so that the test world shows handwriting that no
model has seen.

In a skewed world some digits are popular and digits come in pairs (:func:`partner`). A model taught there grows a
language prior that a balanced world exposes as hallucination.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

Split = Literal["train", "validation", "test"]
"""Name of one of the three disjoint parts of the handwriting samples."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Words for the digits, in order of value: the objects of a scene."""

CELLS = ("top left", "top right", "bottom left", "bottom right")
"""Words for the cells of the grid, in reading order."""

INKS = {"red": (1.0, 0.15, 0.15), "green": (0.15, 1.0, 0.15), "blue": (0.15, 0.15, 1.0), "white": (1.0, 1.0, 1.0)}
"""Ink colours as RGB light intensities between 0 (the black ground) and 1."""

MASK = "[MASK]"
"""Stands for a hidden word, as in the paper's masked responses."""

DESCRIBE = "describe the image ."
"""The prompt that asks for a caption."""

VOCABULARY = (
    *("the", "image", "a", "at", ",", ".", ":", "?", "describe", "complete", "is", "there", "in", "yes", "no"),
    *("top", "bottom", "left", "right"),
    *INKS,
    *DIGITS,
    MASK,
)
"""Every word of captions, questions, answers and prompts."""

IMAGE_SIZE = 32
"""Height and width of a scene in pixels."""

DARKEST, BRIGHTEST = -0.9, 1.9
"""Light intensities stored as 0 and 255: black and full ink with room for three standard deviations of the noise."""

_SAMPLES: dict[Split, slice] = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
_CELL_SIZE = IMAGE_SIZE // 2
_POPULARITY = 1.0 / np.arange(1, len(DIGITS) + 1) ** 0.7


class PlacedDigit(NamedTuple):
    """One digit of a scene.

    Args:
        cell: where it is, one of :data:`CELLS`.
        digit: which digit it is, one of :data:`DIGITS`.
        colour: its ink, a name in :data:`INKS`.
    """

    cell: str
    digit: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows.

    Args:
        image: RGB, 32 x 32 pixels.
        digits: one to four different digits, in reading order of their cells.
    """

    image: Image.Image
    digits: tuple[PlacedDigit, ...]


@dataclass(frozen=True)
class DigitWorld:
    """An endless, reproducible sequence of digit scenes.

    Scene ``i`` depends on the arguments and on ``i`` alone, so scenes can be drawn in any order.

    Args:
        split: which handwriting samples are shown: 1000 for training, 300 for validation, 497 for tests.
        skew: 0 draws digits evenly. Above 0 digits follow Zipf-like popularity (digit d has weight (d + 1) ** -0.7),
            and with this probability the next digit is the :func:`partner` of the one before it, if not yet shown.
        seed: not negative; worlds with different seeds show different scenes.
        noise: standard deviation of the Gaussian noise; full ink has intensity 0.6 to 1.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> world = DigitWorld("train", skew=0.9, seed=0)
        >>> caption(world.scene(14))
        'a blue four at top left , a red nine at top right .'
    """

    split: Split
    skew: float
    seed: int
    noise: float = 0.3

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {self.split!r}")
        if not 0 <= self.skew <= 1:
            raise ValueError(f"skew must be a probability between 0 and 1, not {self.skew}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but is {self.seed}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be a finite standard deviation of at least 0, not {self.noise}")

    def scene(self, index: int) -> Scene:
        """Scene number ``index``, counted from 0.

        Raises:
            ValueError: if ``index`` is negative.
        """
        if index < 0:
            raise ValueError(f"index must not be negative, but is {index}")
        generator = np.random.default_rng((self.seed, get_args(Split).index(self.split), index))
        digits = _place_digits(self.skew, generator)
        return Scene(_draw(digits, handwriting(self.split), self.noise, generator), digits)

    def scenes(self, count: int, start: int = 0) -> list[Scene]:
        """``count`` scenes from number ``start`` on."""
        return [self.scene(index) for index in range(start, start + count)]

    def __iter__(self) -> Iterator[Scene]:
        return map(self.scene, itertools.count())


def partner(digit: str) -> str:
    """The digit that follows ``digit`` most often in a skewed world: its value plus five, modulo ten.

    Example:
        >>> partner("two"), partner("seven")
        ('seven', 'two')
    """
    return DIGITS[(DIGITS.index(digit) + 5) % len(DIGITS)]


def caption(scene: Scene, masked: Collection[int] = ()) -> str:
    """The true caption of a scene.

    Args:
        scene: what to describe.
        masked: positions in ``scene.digits`` whose digit word is replaced by :data:`MASK`.

    Returns:
        One phrase per digit, such as ``"a red two at top left , a blue nine at bottom right ."``.

    Raises:
        IndexError: if a position of ``masked`` is not in the scene.
    """
    outside = [position for position in masked if not 0 <= position < len(scene.digits)]
    if outside:
        raise IndexError(f"masked names digits {outside} of a scene with {len(scene.digits)} digits")
    phrases = [
        f"a {placed.colour} {MASK if position in masked else placed.digit} at {placed.cell}"
        for position, placed in enumerate(scene.digits)
    ]
    return " , ".join(phrases) + " ."


def fill_prompt(masked_caption: str) -> str:
    """The prompt that asks to complete a masked caption."""
    return f"complete : {masked_caption}"


def question(digit: str) -> str:
    """The yes/no question whether ``digit`` is in the image.

    Raises:
        ValueError: if ``digit`` is not one of :data:`DIGITS`.
    """
    _check_digit(digit)
    return f"is there a {digit} in the image ?"


def answer(scene: Scene, digit: str) -> str:
    """The true answer to :func:`question`: ``"yes at top left ."`` with the digit's cell, or ``"no ."``.

    Raises:
        ValueError: if ``digit`` is not one of :data:`DIGITS`.
    """
    _check_digit(digit)
    for placed in scene.digits:
        if placed.digit == digit:
            return f"yes at {placed.cell} ."
    return "no ."


def objects(scene: Scene) -> list[str]:
    """The words of the digits in a scene, in reading order: the ground truth of POPE and CHAIR."""
    return [placed.digit for placed in scene.digits]


def absent(scene: Scene) -> list[str]:
    """The words of the digits that are not in a scene, in order of value."""
    return [digit for digit in DIGITS if digit not in objects(scene)]


@functools.cache
def handwriting(split: Split) -> dict[str, NDArray[np.float64]]:
    """The handwriting samples of one split.

    Args:
        split: which of the three disjoint parts.

    Returns:
        For every digit word its samples, (samples, 16, 16) ink intensities between 0 and 1: the 8 x 8 originals with
        every pixel doubled.
    """
    data = load_digits()
    # Not default_rng: only the stream of RandomState is frozen for good, and no NumPy release may move a sample that
    # the shipped policy was taught on into the test split.
    order = np.random.RandomState(0).permutation(len(data.target))[_SAMPLES[split]]
    glyphs = (data.images / 16.0).repeat(2, axis=1).repeat(2, axis=2)
    return {name: glyphs[order[data.target[order] == value]] for value, name in enumerate(DIGITS)}


def to_image(light: NDArray[np.float64], noise: float, generator: np.random.Generator) -> Image.Image:
    """The picture of light intensities under noise.

    Args:
        light: (height, width, 3); 1 is full ink.
        noise: standard deviation of the Gaussian noise.
        generator: of the noise.
    """
    light = light + generator.normal(scale=noise, size=light.shape)
    levels = (light - DARKEST) / (BRIGHTEST - DARKEST) * 255
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _place_digits(skew: float, generator: np.random.Generator) -> tuple[PlacedDigit, ...]:
    count = int(generator.integers(1, len(CELLS) + 1))
    cells = sorted(generator.choice(len(CELLS), size=count, replace=False))
    digits: list[str] = []
    while len(digits) < count:
        digits.append(_next_digit(digits, skew, generator))
    colours = generator.choice(list(INKS), size=count)
    return tuple(
        PlacedDigit(CELLS[cell], digit, str(colour)) for cell, digit, colour in zip(cells, digits, colours, strict=True)
    )


def _next_digit(shown: list[str], skew: float, generator: np.random.Generator) -> str:
    left = [value for value, name in enumerate(DIGITS) if name not in shown]
    if skew == 0:
        return DIGITS[generator.choice(left)]
    if shown and partner(shown[-1]) not in shown and generator.random() < skew:
        return partner(shown[-1])
    weights = _POPULARITY[left]
    return DIGITS[generator.choice(left, p=weights / weights.sum())]


def _draw(
    digits: tuple[PlacedDigit, ...],
    samples: dict[str, NDArray[np.float64]],
    noise: float,
    generator: np.random.Generator,
) -> Image.Image:
    light = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3))
    for placed in digits:
        row, column = divmod(CELLS.index(placed.cell), 2)
        glyph = generator.choice(samples[placed.digit]) * generator.uniform(0.6, 1.0)
        rows = slice(row * _CELL_SIZE, (row + 1) * _CELL_SIZE)
        columns = slice(column * _CELL_SIZE, (column + 1) * _CELL_SIZE)
        light[rows, columns] = glyph[:, :, None] * np.array(INKS[placed.colour])
    return to_image(light, noise, generator)


def _check_digit(digit: str) -> None:
    if digit not in DIGITS:
        raise ValueError(f"digit must be one of {', '.join(DIGITS)}, not {digit!r}")
