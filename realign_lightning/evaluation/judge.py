"""A language model that judges answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Engine, Question
from realign_lightning.engines.memo import Memo, content_key


@dataclass
class JudgeCost:
    """What judging took.

    Args:
        asked: prompts sent now, failed ones included.
        cached: prompts whose reply was known.
        failed: prompts without a reply.
        prompt_tokens: read by the judge, as it says.
        new_tokens: written by the judge.
        cost: of these tokens, in the currency of the prices.
    """

    asked: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cost: float = 0.0


class Judge:
    """Asks a model to judge answers, and keeps its replies.

    Timeouts, refusals for now (429) and failures of the server are retried by the engine; what fails for good has no
    reply, and its answer is left out of the scores. A prompt that was replied to is never paid for again.

    Args:
        engine: who judges, for example :class:`~realign_lightning.engines.EndpointEngine` for any OpenAI-compatible
            endpoint.
        cache: folder of replies, for any number of evaluations; None is the folder of the evaluation.
        price_per_million_read: tokens read, in any currency.
        price_per_million_written: tokens written.

    Raises:
        ValueError: for a negative price.
    """

    def __init__(
        self,
        engine: Engine,
        cache: str | None = None,
        price_per_million_read: float = 0.0,
        price_per_million_written: float = 0.0,
    ) -> None:
        prices = {"read": price_per_million_read, "written": price_per_million_written}
        for name, price in prices.items():
            if not price >= 0:
                raise ValueError(f"Expected `price_per_million_{name}` to be at least 0, got {price}.")
        self.engine = engine
        self.cache = cache
        self.prices = prices
        self.cost = JudgeCost()
        self._folder = None if cache is None else Path(cache)

    def prepare(self, folder: Path) -> None:
        """Begin another evaluation: its cost is counted anew.

        Args:
            folder: where replies are kept, if the constructor named none.
        """
        if self.cache is None:
            self._folder = folder
        self.cost = JudgeCost()

    def ask(self, prompts: Sequence[str]) -> list[str | None]:
        """The judge's replies.

        Args:
            prompts: equal ones are asked once.

        Returns:
            A reply per prompt, in order; None where there is none.

        Raises:
            ValueError: if neither the constructor nor whoever runs the benchmark named a folder for the cache.
            EngineError: if the judge answers nothing any more; what it replied before is kept.
        """
        if self._folder is None:
            raise ValueError("Expected `cache` to be a folder, where replies are kept: they cost money.")
        memo = Memo(self._folder, "judge", self.engine.identity)
        book = AnswerBook(self.engine, memo)
        keys = {prompt: content_key(prompt) for prompt in prompts}
        known = sum(key in memo for key in keys.values())
        try:
            self._ask_all(book, keys)
        finally:
            memo.close()
            self._count(book, known)
        answers = {prompt: book.answer(key) for prompt, key in keys.items()}
        replies = [answers[prompt] for prompt in prompts]
        self.cost.failed += sum(answer is None for answer in answers.values())
        return [None if answer is None else answer.text for answer in replies]

    def _ask_all(self, book: AnswerBook, keys: dict[str, str]) -> None:
        size, prompts = self.engine.batch_size, list(keys)
        with tqdm(total=len(prompts), desc="judge", unit="answer", disable=not prompts) as bar:
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                book.ask({keys[prompt]: partial(Question, prompt) for prompt in batch})
                bar.update(len(batch))

    def _count(self, book: AnswerBook, known: int) -> None:
        self.cost.asked += book.asked
        self.cost.cached += known
        self.cost.prompt_tokens += book.prompt_tokens
        self.cost.new_tokens += book.new_tokens
        read, written = self.cost.prompt_tokens, self.cost.new_tokens
        self.cost.cost = (read * self.prices["read"] + written * self.prices["written"]) / 1e6

    def told(self) -> dict[str, Any]:
        """Who judged and what it took, in plain JSON values."""
        return {"engine": dict(self.engine.identity), **asdict(self.cost)}
