import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from realign_lightning.preferences.near_duplicates import (
    are_near_duplicates,
    calibrate_band,
    distorted_copies,
    perceptual_hash,
)

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
PIECES = [
    photo.crop((left, top, left + 200, top + 200)) for photo in PHOTOS for left in (0, 200, 400) for top in (0, 200)
]


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("photo", PHOTOS)
def test_hash_is_that_of_scipys_cosine_transform(photo):
    grey = np.asarray(photo.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    lowest = dctn(grey, norm="ortho")[:8, :8].ravel()
    bits = [True, *(lowest[1:] > np.median(lowest[1:]))]
    assert perceptual_hash(photo) == int("".join(str(int(bit)) for bit in bits), 2)


def test_copies_are_near_and_other_pictures_far():
    hashes = [perceptual_hash(piece) for piece in PIECES]
    mild = ("jpeg", "resize", "brightness")
    copies = [
        distance(own, perceptual_hash(distorted_copies(piece)[name]))
        for own, piece in zip(hashes, PIECES, strict=True)
        for name in mild
    ]
    others = [distance(one, other) for number, one in enumerate(hashes) for other in hashes[:number]]
    assert max(copies) <= 6 < min(others)


def test_pictures_without_structure_are_compared_with_none():
    plain = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    hashes = np.array([*map(perceptual_hash, plain), perceptual_hash(PHOTOS[0])], dtype=np.uint64)
    assert are_near_duplicates(hashes[:, None], hashes, 64).tolist() == [
        [False, False, False],
        [False, False, False],
        [False, False, True],
    ]


def test_distance_counts_bits_at_both_ends():
    one = np.array([2**63 + 1], dtype=np.uint64)
    other = np.array([2**63 + 2, 2**63, 1], dtype=np.uint64)
    assert are_near_duplicates(one, other, 1).tolist() == [False, True, True]
    assert are_near_duplicates(one, other, 2).tolist() == [True, True, True]
    assert are_near_duplicates(one, one, 0).tolist() == [True]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)])
def test_tiny_pictures_have_hash_and_copies(size):
    picture = Image.new("RGB", size, "red")
    assert perceptual_hash(picture) == 0
    assert {copy.mode for copy in distorted_copies(picture).values()} == {"RGB"}


def test_band_loses_no_more_neighbours_than_allowed():
    """100 neighbours at .00 .01 ... .99; copies that overlap with them."""
    neighbours = [number / 100 for number in range(100)]
    band = calibrate_band([0.5, 0.6, 0.98, 0.99], neighbours, max_lost=0.05)
    assert 0.94 < band.max_similarity < 0.95
    assert band.lost == pytest.approx(0.05)
    assert band.caught == 0.5
    # The score itself, as a float32, is below the end.
    assert np.float32(0.94) < np.float64(band.max_similarity)


def test_band_takes_no_more_than_it_must_where_copies_are_far():
    band = calibrate_band(np.linspace(0.9, 1, 101), np.linspace(0, 0.5, 101), max_lost=0.01)
    assert band == (pytest.approx(0.901), pytest.approx(100 / 101), 0)


@pytest.mark.parametrize(("same", "different", "lost"), [([], [1], 0), ([1], [], 0), ([1], [1], 1), ([1], [1], -0.1)])
def test_bad_calibrations_are_refused(same, different, lost):
    with pytest.raises(ValueError, match=r"calibrate on more images|max_lost"):
        calibrate_band(same, different, lost)
