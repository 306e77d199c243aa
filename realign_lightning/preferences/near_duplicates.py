"""Tell another photograph from the same one saved or scaled again: a perceptual hash, and a band of similarity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

PERCEPTUAL_HASH: Mapping[str, Any] = {"name": "pHash", "bits": 64, "version": 1}
"""What :func:`perceptual_hash` computes; a store of its hashes is told apart by it."""

_SIDE = 32
"""Pixels of the grey picture that is hashed, each way."""

_KEPT = 8
"""Lowest frequencies that the hash keeps, each way."""

_LEAST_CONTRAST = 2.0
"""Standard deviation of grey levels (of 255) below which a picture has no structure to compare."""

_JPEG_QUALITY = 50
_CROPPED = 0.05
_BRIGHTER = 1.1


def perceptual_hash(image: Image.Image) -> int:
    """Hash of a picture's coarse structure (pHash): near-duplicates differ in few of its 64 bits.

    The picture is scaled to 32 x 32 grey pixels; a bit tells whether a coefficient of the lowest 8 x 8 of their cosine
    transform lies above the median (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
    2010). The first bit, the mean's, is always 1.

    Args:
        image: any picture in RGB or grey.

    Returns:
        64 bits; 0 for a picture without structure, such as one plain colour, which is compared with none.

    >>> perceptual_hash(Image.new("RGB", (64, 48), "red"))
    0
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < _LEAST_CONTRAST:
        return 0
    # Symmetric pictures have coefficients that are zero but for rounding, which must not decide a bit.
    coefficients = (_COSINES @ grey @ _COSINES.T).round(3).ravel()
    bits = coefficients > np.median(coefficients[1:])
    bits[0] = True
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> npt.NDArray[np.float64]:
    """The lowest rows of the orthonormal cosine transform (DCT-II)."""
    frequencies, places = np.arange(_KEPT)[:, None], np.arange(_SIDE)
    rows: npt.NDArray[np.float64] = np.cos(np.pi * frequencies * (2 * places + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
    rows[0] /= np.sqrt(2)
    return rows


_COSINES = _cosines()


def are_near_duplicates(
    first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], max_distance: int
) -> npt.NDArray[np.bool_]:
    """Which pairs of perceptual hashes differ in at most some bits.

    Args:
        first: hashes.
        second: hashes, of a shape that broadcasts with that of ``first``.
        max_distance: most bits in which near-duplicates differ, from 0 to 64.

    Returns:
        True where both pictures have structure and their hashes are that near.

    >>> hashes = np.array([0b1111, 0b1110, 0b1000, 0], dtype=np.uint64)
    >>> are_near_duplicates(hashes[:1], hashes, max_distance=1).tolist()
    [True, True, False, False]
    """
    near: npt.NDArray[np.bool_] = np.bitwise_count(first ^ second) <= max_distance
    near &= (first != 0) & (second != 0)
    return near


def distorted_copies(image: Image.Image) -> dict[str, Image.Image]:
    """Near-duplicates of a picture, as they are found on the web.

    Args:
        image: an RGB picture.

    Returns:
        By name: saved as JPEG of quality 50, scaled to half its size, cropped by 5 % at each side, 10 % brighter.
    """
    width, height = image.size
    saved = io.BytesIO()
    image.save(saved, "JPEG", quality=_JPEG_QUALITY)
    left, top = round(width * _CROPPED), round(height * _CROPPED)
    return {
        "jpeg": Image.open(saved).convert("RGB"),
        "resize": image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BICUBIC),
        "crop": image.crop((left, top, width - left, height - top)),
        "brightness": image.point(lambda value: min(255, round(value * _BRIGHTER))),
    }


class Band(NamedTuple):
    """An end for the band of similarity in which neighbours are looked for, and what it does on the sample.

    Args:
        max_similarity: neighbours are below it.
        caught: share of the distorted copies at or above it.
        lost: share of the neighbours that are other images, yet at or above it.
    """

    max_similarity: float
    caught: float
    lost: float


def calibrate_band(same: Sequence[float], different: Sequence[float], max_lost: float = 0.01) -> Band:
    """The end of the band that leaves out near-duplicates and keeps all but a share of the true neighbours.

    It is the least similarity that loses no more than ``max_lost`` of ``different``; where copies and neighbours are so
    far apart that a higher one catches all but ``max_lost`` of ``same``, it is that.

    Args:
        same: similarities of images to distorted copies of themselves.
        different: similarities of images to their nearest neighbours, which are other images.
        max_lost: share, in [0, 1).

    Raises:
        ValueError: if a list is empty or ``max_lost`` no share.

    >>> calibrate_band([0.95, 0.97, 0.98, 0.99], [0.5, 0.6, 0.7, 0.8], max_lost=0.0)
    Band(max_similarity=0.95, caught=1.0, lost=0.0)
    >>> band = calibrate_band([0.75, 0.97, 0.98, 0.99], [0.5, 0.6, 0.7, 0.8], max_lost=0.25)
    >>> band.caught, band.lost
    (0.75, 0.0)
    """
    if not len(same) or not len(different):
        raise ValueError(
            f"Expected similarities of copies and of neighbours, got {len(same)} and {len(different)}: "
            "calibrate on more images."
        )
    if not 0 <= max_lost < 1:
        raise ValueError(f"Expected `max_lost` in [0, 1), got {max_lost}.")
    copies, others = np.sort(np.asarray(same, dtype=np.float64)), np.sort(np.asarray(different, dtype=np.float64))
    lost = others[len(others) - 1 - int(max_lost * len(others))]
    # The next float32: scores are of this type.
    keeps_others = np.nextafter(np.float32(lost), np.float32(np.inf))
    catches_copies = copies[int(max_lost * len(copies))]
    end = float(max(keeps_others, catches_copies))
    return Band(end, float(np.mean(copies >= end)), float(np.mean(others >= end)))
