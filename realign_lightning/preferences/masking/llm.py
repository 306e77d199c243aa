"""Masking by a model: an engine marks what a response claims."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Answer, Engine, Question
from realign_lightning.engines.memo import content_key
from realign_lightning.preferences.masking.base import Level, MaskedResponse, MaskError, Otherwise, SpanMasker
from realign_lightning.preferences.masking.marks import read_marks

LIST_INSTRUCTION = (
    "Below is an answer to a question about an image. List the words or segments of it that are about objects, "
    "attributes (such as colours, materials, sizes, states), counts, and logical relations between things (such as "
    '"on", "behind", "holding"). Reply with a JSON list of {"text": ..., "kind": "object", "attribute", "count" or '
    '"relation"}, in the order of the answer, each text copied exactly, and with nothing else.'
)
"""Asks for a list of words with their kinds: the shortest answer that says all, and small models copy words well."""

MASK_INSTRUCTION = (
    "Below is an answer to a question about an image. Replace the words or segments of it that are about objects, "
    "attributes or logical relations by [MASK], copy everything else exactly, and reply with nothing else."
)
"""Asks for the response with masks in it, as the paper does (section 3.1; it prints no wording of its own)."""


class LLMMasker(SpanMasker):
    """Asks an engine what to mask, as the paper asks GPT-4o mini (section 3.1).

    The engine sees the response, not the image. Its answer may be a JSON list of words with their kinds or the response
    with masks; see :func:`read_marks`. An answer that does not fit the response is a :class:`MaskError`, never a wrong
    span.

    Args:
        engine: a local model or an endpoint.
        instruction: what is asked; the response follows it. :data:`LIST_INSTRUCTION`, :data:`MASK_INSTRUCTION` or your
            own.
        examples: pairs of a response and the right reply, shown before the question.
        fraction: see :class:`SpanMasker`.
        otherwise: see :class:`SpanMasker`.
        seed: of the random choices, and of what the engine draws.
        kinds: what to mask of what the engine names; None for everything. Masks have no kinds: leave it at None for
            instructions that ask for them.
        level: see :class:`SpanMasker`.
        merge_adjacent: see :class:`SpanMasker`.

    Raises:
        ValueError: for a blank instruction, an example that is not two texts, or settings that are none of these.
    """

    def __init__(
        self,
        engine: Engine,
        instruction: str = LIST_INSTRUCTION,
        examples: Sequence[tuple[str, str]] = (),
        fraction: float = 1.0,
        otherwise: Otherwise = "skip",
        seed: int = 0,
        kinds: Sequence[str] | None = None,
        level: Level = "segment",
        merge_adjacent: bool = False,
    ) -> None:
        super().__init__(fraction, otherwise, seed, kinds, level, merge_adjacent)
        if not instruction.strip():
            raise ValueError(f"Expected `instruction` to be a text, got {instruction!r}.")
        for number, example in enumerate(examples):
            if len(example) != 2 or not all(isinstance(text, str) for text in example):
                raise ValueError(f"Expected `examples` to be pairs of texts, got {example!r} at index {number}.")
            # An example that cannot be read would teach the engine to answer so.
            read_marks(*example)
        self.engine = engine
        self._book: AnswerBook | None = None
        self.instruction = instruction
        self.examples = [(response, reply) for response, reply in examples]

    def mask(self, key: str, response: str) -> MaskedResponse | None:
        """Ask the engine about one response; :meth:`mask_many` asks about several at a time."""
        (masked,) = self.mask_many([key], [response])
        if isinstance(masked, MaskError):
            raise masked
        return masked

    def mask_many(self, keys: Sequence[str], responses: Sequence[str]) -> list[MaskedResponse | MaskError | None]:
        """Ask the engine in batches of its own size; see :meth:`Masker.mask_many`."""
        pairs = list(zip(keys, responses, strict=True))
        answers = self._answers(list(dict.fromkeys(responses)))
        return [self._read(key, response, answers[response]) for key, response in pairs]

    def keep(self, book: AnswerBook) -> None:
        """Keep the engine's answers, so that no response is asked about twice, whatever is then made of them.

        Args:
            book: asks this masker's engine.
        """
        self._book = book

    def _answers(self, responses: Sequence[str]) -> dict[str, Answer]:
        """What the engine says of different responses."""
        size, found = max(1, self.engine.batch_size), dict[str, Answer]()
        for start in range(0, len(responses), size):
            batch = responses[start : start + size]
            questions = [Question(self.prompt(response), seed=_seed(self.seed, response)) for response in batch]
            answers = self.engine.answer(questions) if self._book is None else self._kept(self._book, questions)
            found |= zip(batch, answers, strict=True)
        return found

    def _kept(self, book: AnswerBook, questions: Sequence[Question]) -> list[Answer]:
        seeds = [question.seed if self.engine.draws else None for question in questions]
        keys = [content_key(question.prompt, seed) for question, seed in zip(questions, seeds, strict=True)]
        failures = book.ask({key: partial(_same, one) for key, one in zip(keys, questions, strict=True)})
        return [book.answer(key) or Answer("", False, failures.get(key, "no answer")) for key in keys]

    def prompt(self, response: str) -> str:
        """What the engine is asked about a response."""
        shown = "".join(f"Answer: {example}\nReply: {reply}\n\n" for example, reply in self.examples)
        return f"{self.instruction}\n\n{shown}Answer: {response}\nReply:"

    def _read(self, key: str, response: str, answer: Answer) -> MaskedResponse | MaskError | None:
        try:
            if answer.error is not None:
                raise MaskError(f"The engine did not answer: {answer.error}")
            if not answer.finished:
                raise MaskError("The engine's answer was cut: let it write more tokens.")
            return self.select(key, response, read_marks(response, answer.text))
        except MaskError as error:
            return error

    @property
    def identity(self) -> dict[str, Any]:
        """The class, its settings, and the identity of its engine."""
        settings = {name: value for name, value in vars(self).items() if name != "engine"}
        return self._plain(settings | {"engine": dict(self.engine.identity)})


def _same(question: Question) -> Question:
    return question


def _seed(seed: int, response: str) -> int:
    """A seed for each response, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{response}".encode()).digest()[:4])
