"""What a build knows of each record on its way to a pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from realign_lightning.data.sources.base import SourceRecord
from realign_lightning.preferences.mask import MaskedResponse
from realign_lightning.preferences.trials import Attempt

Fault = Literal[
    "row cannot be used",
    "image cannot be used",
    "text cannot be used",
    "no chosen answer",
    "masking failed",
    "engine failed",
    "pair cannot be stored",
]
"""Why a record gave no pair although it should have."""

Ordinary = Literal[
    "answer not usable", "nothing to mask", "no similar image", "no completion accepted", "too many of this answer"
]
"""Why a record gave no pair, as some do in every build."""


@dataclass(frozen=True)
class LeftOut:
    """A record that gave no pair.

    Args:
        where: its key, or file and row.
        reason: what it is counted by.
        detail: what exactly is wrong.
    """

    where: str
    reason: Fault | Ordinary
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong with the record or the build, so that the exit status says so."""
        return self.reason in get_args(Fault)


OWN = -1
"""Rank of the original image itself, which comes before the most similar one."""


class Try(NamedTuple):
    """An image and what the policy made of it.

    Args:
        image_id: which image.
        score: its similarity to the original; None where nobody measured it.
        attempt: the completion and its verdict; None where a rejected response was given, or made beside the original.
        rank: of the retrieved image, from 0; :data:`OWN` for the original itself.
    """

    image_id: str
    score: float | None
    attempt: Attempt | None
    rank: int


@dataclass
class Draft:
    """A record on its way to a pair.

    Args:
        record: from the source; a chosen response that was generated is filled in.
        generated: whether the chosen response was.
        masked: the chosen response with its masks, where a rejected one is to be made.
        tries: images that were tried, in order; the last is the pair's retrieved image, whether it was tried or not.
        left_out: why there will be no pair.
    """

    record: SourceRecord
    generated: bool = False
    masked: MaskedResponse | None = None
    tries: list[Try] = field(default_factory=list)
    left_out: LeftOut | None = None

    @property
    def key(self) -> str:
        """Of the record."""
        return self.record.key

    @property
    def completed(self) -> Attempt | None:
        """The last completion; that of a pair is its rejected response. None where none was tried."""
        return next((one.attempt for one in reversed(self.tries) if one.attempt is not None), None)

    @property
    def rejected(self) -> str | None:
        """The rejected response, given or made; None where there is none yet."""
        made = self.completed
        return self.record.rejected if self.record.rejected is not None or made is None else made.text

    @property
    def lacks_pair(self) -> bool:
        """Whether retrieved image or rejected response are to be found."""
        return self.record.rejected is None or self.record.retrieved is None

    def leave_out(self, reason: Fault | Ordinary, detail: str = "") -> None:
        """Give the record up.

        Args:
            reason: what it is counted by.
            detail: what exactly is wrong.
        """
        self.left_out = LeftOut(self.key, reason, detail)


def still_open(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Drafts that were not given up.

    Args:
        drafts: in any order.
    """
    return (draft for draft in drafts if draft.left_out is None)
