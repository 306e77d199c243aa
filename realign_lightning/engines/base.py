"""Who answers: the contract of everything that can generate text, with or without an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from realign_lightning.engines.policy import Policy
from realign_lightning.types import Prompt


class Form(NamedTuple):
    """What an answer has to look like: fixed words with blanks between them.

    Args:
        segments: the fixed text before, between and behind the blanks: one more than there are blanks.
        longest: most tokens of each blank.
        fillers: what a blank may become; empty leaves it to the model.
    """

    segments: tuple[str, ...]
    longest: tuple[int, ...]
    fillers: tuple[str, ...] = ()

    def fill(self, blanks: Sequence[str]) -> str:
        """The answer with the blanks filled.

        Args:
            blanks: one text for each.

        >>> Form(("a ", " bus"), (4,)).fill(["red"])
        'a red bus'
        """
        rest = zip(blanks, self.segments[1:], strict=True)
        return self.segments[0] + "".join(blank + segment for blank, segment in rest)


class Question(NamedTuple):
    """What an engine is asked.

    Args:
        prompt: text or chat messages.
        image: to look at; None for text alone.
        seed: of what is drawn for this answer, whatever else is in the batch.
        form: what the answer has to look like; only for engines that :attr:`Engine.can_force` it.
    """

    prompt: Prompt
    image: Image.Image | None = None
    seed: int = 0
    form: Form | None = None


class Answer(NamedTuple):
    """What an engine answers.

    Args:
        text: the answer.
        finished: whether it came to its end, and was not cut at the longest length.
        error: why there is no answer; None where there is one. Such an answer is never kept for later runs.
        prompt_tokens: tokens read, image tokens included; 0 where the engine does not say.
        new_tokens: tokens written.
    """

    text: str
    finished: bool = True
    error: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0


class Engine(ABC):
    """Answers questions in batches. Subclass it to bring your own."""

    batch_size: int = 1
    """Questions that are best asked at a time."""

    can_force: bool = False
    """Whether it can be made to answer in a given form."""

    is_remote: bool = False
    """Whether somebody is paid for its tokens."""

    @property
    def draws(self) -> bool:
        """Whether answers depend on the seed of their question; where they do not, another seed asks nothing anew."""
        return True

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All that its answers depend on beside the question, in plain JSON values: model, revision, settings.

        What was answered under an equal identity is not asked again.
        """

    @abstractmethod
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer every question, in order.

        One question that cannot be answered gives an :class:`Answer` with its ``error``, and does not stop the others.

        Args:
            questions: up to ``batch_size`` of them.
        """

    def use(self, policy: Policy) -> None:  # noqa: B027 - most engines have models of their own
        """Take the policy that pairs are built for, if this engine has no model of its own.

        Args:
            policy: shared with other stages.
        """

    def finish(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Called by every rank of a run when it has no more questions of a stage."""


def check_positive(**settings: float) -> None:
    """Refuse settings of an engine that are not above 0.

    Args:
        **settings: numbers by name.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be above 0, got {value}.")
