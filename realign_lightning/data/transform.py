"""Changes to samples while they are read, random and yet the same in every run."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod

import numpy as np

from realign_lightning.types import PreferenceSample, SampleError


class SampleTransform(ABC):
    """Changes a sample before it is encoded. Subclass it to bring your own; workers hold copies of it.

    Not together with ``reference='cached'`` : log-probs that are kept belong to samples that stay as they are.
    """

    @abstractmethod
    def __call__(self, sample: PreferenceSample, random: np.random.Generator) -> PreferenceSample:
        """The changed sample.

        Args:
            sample: as it is stored.
            random: the only source of chance to use: it depends on seed, epoch and the sample's key, so that neither
                ranks and workers nor a resumed run change what comes out.

        Raises:
            SampleError: if nothing can be made of this sample; it is skipped and counted.
        """


class CroppedNegative(SampleTransform):
    """The negative image of mDPO (arXiv 2406.11839): a random crop of the image in place of the retrieved one.

    Args:
        least: smallest share of the image's area that is left.
        most: largest share.

    Raises:
        ValueError: if these are no shares above 0 and below 1, in order.
    """

    def __init__(self, least: float = 0.01, most: float = 0.2) -> None:
        if not 0 < least <= most < 1:
            raise ValueError(f"expected 0 < least <= most < 1, got least={least} and most={most}")
        self.least = least
        self.most = most

    def __call__(self, sample: PreferenceSample, random: np.random.Generator) -> PreferenceSample:
        """See :class:`SampleTransform`."""
        side = float(random.uniform(self.least, self.most)) ** 0.5
        width, height = (max(1, round(length * side)) for length in sample.image.size)
        if (width, height) == sample.image.size:
            raise SampleError(f"an image of {width} x {height} pixels is too small to be cropped")
        left = int(random.integers(sample.image.width - width + 1))
        top = int(random.integers(sample.image.height - height + 1))
        return dataclasses.replace(sample, retrieved=sample.image.crop((left, top, left + width, top + height)))


def sample_random(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The random numbers of a sample in an epoch.

    Args:
        seed: not negative.
        epoch: from 0.
        key: the sample's key.

    Example:
        >>> sample_random(0, 1, "a").random() == sample_random(0, 1, "a").random()
        True
    """
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    return np.random.default_rng([seed, epoch, number])
