import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from realign_lightning.demos.scenes import (
    BRIGHTEST,
    CELLS,
    DARKEST,
    DESCRIBE,
    DIGITS,
    INKS,
    VOCABULARY,
    DigitWorld,
    PlacedDigit,
    Scene,
    absent,
    answer,
    caption,
    fill_prompt,
    handwriting,
    objects,
    partner,
    question,
)

SPLITS = ("train", "validation", "test")


def two_digits() -> Scene:
    return Scene(
        Image.new("RGB", (32, 32)),
        (PlacedDigit("top right", "two", "red"), PlacedDigit("bottom left", "seven", "white")),
    )


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scene.image)


def cell_light(scene: Scene, cell: str) -> np.ndarray:
    """Light intensities of one cell, (16, 16, 3), undoing the pixels' linear scale."""
    row, column = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}[cell]
    block = pixels(scene)[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    return block / 255 * (BRIGHTEST - DARKEST) + DARKEST


# ---- texts, worked by hand


def test_caption_names_ink_digit_and_cell_of_every_digit():
    assert caption(two_digits()) == "a red two at top right , a white seven at bottom left ."


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        ([0], "a red [MASK] at top right , a white seven at bottom left ."),
        ([1], "a red two at top right , a white [MASK] at bottom left ."),
        ({0, 1}, "a red [MASK] at top right , a white [MASK] at bottom left ."),
    ],
)
def test_masking_hides_only_the_digit_words_named(masked, expected):
    assert caption(two_digits(), masked) == expected


@pytest.mark.parametrize("position", [-1, 2])
def test_masking_a_digit_that_is_not_there_is_an_error(position):
    with pytest.raises(IndexError, match=rf"\[{position}\] of a scene with 2 digits"):
        caption(two_digits(), [position])


def test_questions_and_answers():
    scene = two_digits()
    assert question("nine") == "is there a nine in the image ?"
    assert answer(scene, "two") == "yes at top right ."
    assert answer(scene, "seven") == "yes at bottom left ."
    assert answer(scene, "nine") == "no ."
    assert fill_prompt("a red [MASK] at top left .") == "complete : a red [MASK] at top left ."


def test_objects_and_absent_digits_partition_the_digits():
    scene = two_digits()
    assert objects(scene) == ["two", "seven"]
    assert absent(scene) == ["zero", "one", "three", "four", "five", "six", "eight", "nine"]


@pytest.mark.parametrize("ask", [question, lambda digit: answer(two_digits(), digit)])
def test_an_unknown_digit_word_is_an_error(ask):
    with pytest.raises(ValueError, match=r"digit must be one of zero, .* not 'ten'"):
        ask("ten")


def test_partners_are_five_apart_and_mutual():
    assert [partner(digit) for digit in DIGITS] == [*DIGITS[5:], *DIGITS[:5]]


def test_vocabulary_holds_exactly_the_words_in_use():
    texts = [DESCRIBE, *map(question, DIGITS)]
    for scene in DigitWorld("train", 0.0, 0).scenes(300):
        texts += [caption(scene), fill_prompt(caption(scene, [0])), *(answer(scene, digit) for digit in DIGITS)]
    used = {word for text in texts for word in text.split()}
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert used == set(VOCABULARY)


# ---- handwriting


def test_splits_are_disjoint_and_cover_the_data():
    """1000 + 300 + 497 = 1797 samples, no two of them alike."""
    sizes = {split: sum(map(len, handwriting(split).values())) for split in SPLITS}
    assert sizes == {"train": 1000, "validation": 300, "test": 497}
    ours = sorted(
        glyph[::2, ::2].tobytes() for split in SPLITS for glyphs in handwriting(split).values() for glyph in glyphs
    )
    assert ours == sorted((image / 16).tobytes() for image in load_digits().images)
    assert len(set(ours)) == 1797


def test_handwriting_carries_the_right_words():
    data = load_digits()
    label_of = {(image / 16).tobytes(): target for image, target in zip(data.images, data.target, strict=True)}
    for split in SPLITS:
        for word, glyphs in handwriting(split).items():
            assert {label_of[glyph[::2, ::2].tobytes()] for glyph in glyphs} == {DIGITS.index(word)}


def test_the_split_never_moves():
    """The shipped policy was taught on these training samples; another split would leak them into the test world."""
    glyphs = np.concatenate([handwriting("train")[digit] for digit in DIGITS])
    assert (
        hashlib.sha256((glyphs[:, ::2, ::2] * 16).astype(np.uint8).tobytes()).hexdigest()
        == "c8866ae099837fae27c2add03fd572e358c06e722bbc477c973d346817cbddb2"
    )


# ---- worlds


def test_scenes_are_small_rgb_pictures_of_one_to_four_different_digits():
    scenes = DigitWorld("train", 0.9, 3).scenes(400)
    assert {(scene.image.mode, scene.image.size) for scene in scenes} == {("RGB", (32, 32))}
    assert {len(scene.digits) for scene in scenes} == {1, 2, 3, 4}
    assert {placed.colour for scene in scenes for placed in scene.digits} == set(INKS)
    for scene in scenes:
        assert len(set(objects(scene))) == len(scene.digits)
        cells = [CELLS.index(placed.cell) for placed in scene.digits]
        assert cells == sorted(set(cells))


def test_a_scene_depends_on_seed_and_number_only():
    world = DigitWorld("test", 0.9, 5)
    scenes = world.scenes(6)
    again = [DigitWorld("test", 0.9, 5).scene(index) for index in reversed(range(6))][::-1]
    streamed = list(itertools.islice(world, 6))
    for first, second, third, fourth in zip(scenes[2:], again[2:], streamed[2:], world.scenes(4, start=2), strict=True):
        assert first.digits == second.digits == third.digits == fourth.digits
        assert (
            pixels(first).tobytes() == pixels(second).tobytes() == pixels(third).tobytes() == pixels(fourth).tobytes()
        )


@pytest.mark.parametrize(
    "other", [DigitWorld("train", 0.5, 1), DigitWorld("test", 0.5, 0), DigitWorld("train", 0.5, 0, 0.1)]
)
def test_other_worlds_show_other_scenes(other):
    world = DigitWorld("train", 0.5, 0)
    assert all(
        pixels(a).tobytes() != pixels(b).tobytes() for a, b in zip(world.scenes(20), other.scenes(20), strict=True)
    )


def following_pairs(skew: float, count: int) -> list[tuple[str, str]]:
    """First and second digit of every scene that has two: the draw whose law is known in closed form."""
    return [tuple(objects(scene)[:2]) for scene in DigitWorld("train", skew, 7).scenes(count) if len(scene.digits) > 1]


def test_skew_makes_partners_occur_together_as_often_as_stated():
    """P(second = partner of first) = skew + (1 - skew) * w_partner / (sum of w - w_first), averaged over first digits.

    The share in n scenes has a standard error of at most sqrt(p (1 - p) / n); four of them are allowed.
    """
    weight = [(value + 1) ** -0.7 for value in range(10)]
    skew = 0.6
    by_chance = sum(
        weight[first] / sum(weight) * weight[(first + 5) % 10] / (sum(weight) - weight[first]) for first in range(10)
    )
    expected = skew + (1 - skew) * by_chance
    pairs = following_pairs(skew, 3000)
    share = np.mean([abs(DIGITS.index(first) - DIGITS.index(second)) == 5 for first, second in pairs])
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(pairs)) ** 0.5


def test_a_balanced_world_pairs_digits_evenly():
    """Of the nine digits left for the second place one is the partner: 1/9."""
    pairs = following_pairs(0.0, 3000)
    share = np.mean([abs(DIGITS.index(first) - DIGITS.index(second)) == 5 for first, second in pairs])
    assert abs(share - 1 / 9) < 4 * (1 / 9 * 8 / 9 / len(pairs)) ** 0.5


@pytest.mark.parametrize(("skew", "share"), [(0.0, 0.1), (0.5, 1 / sum((value + 1) ** -0.7 for value in range(10)))])
def test_zero_is_popular_in_a_skewed_world_only(skew, share):
    """The first digit is zero with probability 1/10, or 1 / sum of (d + 1) ** -0.7 = 0.245; four standard errors."""
    first = [objects(scene)[0] for scene in DigitWorld("train", skew, 8).scenes(2000)]
    assert abs(first.count("zero") / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


# ---- pictures


def test_ink_is_where_the_scene_says():
    for scene in DigitWorld("test", 0.0, 2, noise=0.0).scenes(60):
        shown = {placed.cell: placed for placed in scene.digits}
        for cell in CELLS:
            light = cell_light(scene, cell)
            if cell not in shown:
                np.testing.assert_allclose(light, 0.0, atol=0.006)
                continue
            ink = np.array(INKS[shown[cell].colour])
            assert 0.55 < light.max() < 1.01
            brightness = light.max(axis=2, keepdims=True)
            np.testing.assert_allclose(light, brightness * ink, atol=0.012)


def test_the_ink_colour_stands_out_under_noise():
    """The mean of 256 pixels has a noise of 0.3 / 16 = 0.019; a glyph's mean ink is about 0.2."""
    for scene in DigitWorld("test", 0.0, 2).scenes(60):
        for placed in scene.digits:
            red, green, blue = cell_light(scene, placed.cell).mean(axis=(0, 1))
            ink = np.array(INKS[placed.colour])
            bright, dark = np.array([red, green, blue])[ink == 1], np.array([red, green, blue])[ink < 1]
            assert bright.min() > 0.08
            assert len(dark) == 0 or bright.min() > dark.max()


def test_a_scene_shows_handwriting_of_its_own_split():
    """Without noise, ink divided by its largest value is a glyph divided by its own, up to a rounding of 1 / 255."""
    known = {split: handwriting(split) for split in SPLITS}
    for scene in DigitWorld("validation", 0.0, 4, noise=0.0).scenes(30):
        for placed in scene.digits:
            light = cell_light(scene, placed.cell).max(axis=2)
            distance = {
                split: min(abs(light / light.max() - glyph / glyph.max()).max() for glyph in known[split][placed.digit])
                for split in SPLITS
            }
            assert distance["validation"] < 0.03
            assert distance["validation"] < min(distance["train"], distance["test"])


def test_noise_has_the_stated_size_and_is_not_cut_on_one_side():
    """Empty cells hold noise alone: mean 0, standard deviation 0.3 (0.298 when cut at three of them)."""
    light = np.concatenate(
        [
            cell_light(scene, cell).ravel()
            for scene in DigitWorld("train", 0.0, 6).scenes(100)
            for cell in set(CELLS) - {placed.cell for placed in scene.digits}
        ]
    )
    assert abs(light.mean()) < 0.005
    assert 0.29 < light.std() < 0.305
    stored = np.stack([pixels(scene) for scene in DigitWorld("train", 0.0, 6).scenes(200)])
    assert (stored == 0).mean() < 0.002
    assert (stored == 255).mean() < 0.002


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split must be one of train, validation, test, not 'val'"),
        ({"skew": 1.1}, "skew must be a probability"),
        ({"skew": float("nan")}, "skew must be a probability"),
        ({"seed": -1}, "seed must not be negative"),
        ({"noise": -0.1}, "noise must be"),
        ({"noise": float("nan")}, "noise must be"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitWorld(**{"split": "train", "skew": 0.0, "seed": 0, **arguments})


def test_a_negative_scene_number_is_an_error():
    with pytest.raises(ValueError, match="index must not be negative, but is -1"):
        DigitWorld("train", 0.0, 0).scene(-1)
