"""Engines asked through a memo: what was answered once is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from realign_lightning.engines.base import Answer, Engine, Question
from realign_lightning.engines.memo import Memo

_PATIENCE = 50
"""Questions in a row that may fail before a run gives up."""


class EngineError(OSError):
    """An engine answers nothing any more."""


class AnswerBook:
    """An engine and the answers that it has given.

    Args:
        engine: who answers.
        memo: keeps answers; its identity is that of whatever makes the questions.
    """

    def __init__(self, engine: Engine, memo: Memo) -> None:
        self.engine = engine
        self.asked = 0
        self.prompt_tokens = 0
        self.new_tokens = 0
        self._memo = memo
        self._failed = 0

    def ask(self, questions: Mapping[str, Callable[[], Question | None]]) -> dict[str, str]:
        """Ask what is not known yet, in one batch; the answers are kept all together.

        Args:
            questions: what makes them, by key; None where there is none to ask. At most a batch of the engine.

        Returns:
            Why there is no answer, by key, for questions that failed. They are not kept: the next run asks again.

        Raises:
            EngineError: if the last 50 questions, or more, have all failed, in batches of which nothing was known.
        """
        made = {key: make() for key, make in questions.items() if key not in self._memo}
        asked = {key: question for key, question in made.items() if question is not None}
        if not asked:
            return {}
        answers = self._answer(asked)
        failures = {key: answer.error for key, answer in answers.items() if answer.error is not None}
        self._memo.add({key: list(answer[:2]) for key, answer in answers.items() if key not in failures})
        # Where others of the batch are known, these may be the ones that fail in every run.
        is_down = len(failures) == len(questions)
        self._failed = self._failed + len(failures) if is_down else 0
        if self._failed >= _PATIENCE:
            last = next(reversed(failures.values()))
            raise EngineError(
                f"The last {self._failed} questions to {type(self.engine).__name__} have failed, the last one with: "
                f"{last}. What was answered is kept; run again when the engine works."
            )
        return failures

    def answer(self, key: str) -> Answer | None:
        """An answer that is known; None where there was nothing to ask.

        Args:
            key: of the question.
        """
        if key not in self._memo:
            return None
        text, finished = self._memo[key][:2]
        return Answer(text, finished)

    def _answer(self, asked: Mapping[str, Question]) -> dict[str, Answer]:
        questions: Sequence[Question] = list(asked.values())
        answers = dict(zip(asked, self.engine.answer(questions), strict=True))
        self.asked += len(answers)
        self.prompt_tokens += sum(answer.prompt_tokens for answer in answers.values())
        self.new_tokens += sum(answer.new_tokens for answer in answers.values())
        return answers
