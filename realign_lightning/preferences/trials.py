"""Steps 3 and 4 of building pairs together: images are tried in order until a completion is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

from PIL import Image

from realign_lightning.data.schema import decode_image
from realign_lightning.data.sources.base import ImageFile
from realign_lightning.data.sources.images import read_unchanged
from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Answer, Question
from realign_lightning.engines.memo import Memo, content_key, prompt_value
from realign_lightning.preferences.accept import Gate, Reason, Verdict
from realign_lightning.preferences.completing import Completer
from realign_lightning.preferences.mask import MaskedResponse
from realign_lightning.types import Prompt, SampleError


class Candidate(NamedTuple):
    """An image to complete a response on: a retrieved one, or the original itself.

    Args:
        image: its file.
        content: SHA-256 of the file.
        score: similarity to the original image; None where nobody measured it.
        is_own: whether it is the original image itself.
    """

    image: ImageFile
    content: str
    score: float | None = None
    is_own: bool = False


@dataclass(frozen=True)
class Trial:
    """A masked response and the images to complete it on.

    Args:
        key: of the record.
        prompt: what the chosen response answers.
        masked: the chosen response and its spans.
        candidates: retrieved images, best first; before them the image itself, where its own mistakes are wanted.
        objects: what the original image is known to show; None if nobody knows.
    """

    key: str
    prompt: Prompt
    masked: MaskedResponse
    candidates: Sequence[Candidate]
    objects: tuple[str, ...] | None = None


class Attempt(NamedTuple):
    """One completion that was tried.

    Args:
        rank: place of the image among the candidates, from 0.
        text: the completion; empty where there is none.
        verdict: what became of it.
    """

    rank: int
    text: str
    verdict: Verdict


@dataclass
class Outcome:
    """What became of a trial.

    Args:
        trial: the trial.
        attempts: what was tried, in order.
        error: why the engine could not answer; the trial was given up, and is taken up again by the next run.
    """

    trial: Trial
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None

    @property
    def accepted(self) -> Attempt | None:
        """The completion that became the rejected response; None if there is none."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.verdict.reason is None else None

    @property
    def is_open(self) -> bool:
        """Whether there is an image left to try."""
        is_over = self.accepted is not None or self.error is not None
        return not is_over and len(self.attempts) < len(self.trial.candidates)

    @property
    def candidate(self) -> Candidate:
        """The image to try next."""
        return self.trial.candidates[len(self.attempts)]


class _Asked(NamedTuple):
    outcome: Outcome
    key: str


class Trials:
    """Tries the images of many records at once, each record's one after the other.

    In every round each open record has its next image tried, the questions of all of them in full batches; a record
    that is done makes room for another. No image is tried once one is accepted. Answers and similarities that the memos
    hold are not asked for again; an answer with an error is not kept. A batch's answers are kept all together, and
    batches are cut from all open records whatever is known already: so a run that was killed goes on with the very
    batches of the undisturbed one.

    Args:
        completer: makes the questions, and asks its engine.
        gate: decides on the completions.
        answers: keeps answers; its identity is the completer's.
        similarities: keeps similarities; its identity is that of the gate's similarity.
        seed: of what is drawn.
        batches: open records, in batches of the engine.

    Raises:
        ValueError: for ``batches`` below 1.
    """

    def __init__(
        self,
        completer: Completer,
        gate: Gate,
        answers: Memo,
        similarities: Memo,
        seed: int = 0,
        batches: int = 8,
    ) -> None:
        if batches < 1:
            raise ValueError(f"Expected `batches` to be at least 1, got {batches}.")
        self.completer = completer
        self.gate = gate
        self.seed = seed
        self.book = AnswerBook(completer.engine, answers)
        self._similarities = similarities
        self._room = batches * completer.engine.batch_size

    def run(self, trials: Iterable[Trial], on_done: Callable[[Outcome], object] | None = None) -> Iterator[Outcome]:
        """Try them all.

        Args:
            trials: taken as there is room for them.
            on_done: called with every outcome as soon as it is known, in whatever order.

        Yields:
            What became of every trial, in their order.
        """
        source = iter(trials)
        waiting: list[Outcome] = []
        while True:
            is_open = sum(outcome.is_open for outcome in waiting)
            taken = [Outcome(trial) for trial in islice(source, self._room - is_open)]
            waiting += taken
            tried = [outcome for outcome in waiting if outcome.is_open]
            self._round(tried)
            if on_done is not None:
                for outcome in (*tried, *(one for one in taken if not one.trial.candidates)):
                    if not outcome.is_open:
                        on_done(outcome)
            done = next((place for place, outcome in enumerate(waiting) if outcome.is_open), len(waiting))
            yield from waiting[:done]
            waiting = waiting[done:]
            if not waiting and not done:
                self.completer.engine.finish()
                return

    def _round(self, outcomes: Sequence[Outcome]) -> None:
        """Try the next image of every record."""
        asked = [_Asked(outcome, self._key(outcome)) for outcome in outcomes]
        # Questions of like length share a batch, so that little of it is padding.
        in_order = sorted(asked, key=lambda one: len(one.outcome.trial.masked.response))
        size = self.completer.engine.batch_size
        failures: dict[str, str] = {}
        for start in range(0, len(in_order), size):
            batch = in_order[start : start + size]
            failures |= self.book.ask({one.key: partial(self._question, one) for one in batch})
        read = []
        for one in asked:
            if one.key in failures:
                one.outcome.error = failures[one.key]
            else:
                read.append((one.outcome, self.book.answer(one.key)))
        self._judge(read)

    def _key(self, outcome: Outcome) -> str:
        trial = outcome.trial
        spans = [[span.start, span.end] for span in trial.masked.spans]
        seed = self.seed if self.completer.engine.draws else None
        prompt = prompt_value(trial.prompt)
        return content_key(prompt, trial.masked.response, spans, outcome.candidate.content, seed)

    def _question(self, one: _Asked) -> Question | None:
        """None where the image cannot be shown."""
        outcome = one.outcome
        try:
            image: Image.Image = decode_image(read_unchanged(*outcome.candidate[:2]))
        except SampleError:
            return None
        # The seed of the answer is that of its question, so that it is drawn alike in whatever batch.
        return self.completer.question(outcome.trial.prompt, outcome.trial.masked, image, int(one.key[:15], 16))

    def _judge(self, answered: Sequence[tuple[Outcome, Answer | None]]) -> None:
        """Add an attempt to every record."""
        compared: list[tuple[Outcome, str, list[tuple[str, str]]]] = []
        for outcome, answer in answered:
            text, reason = self._obvious(outcome, answer)
            if reason is None:
                compared.append((outcome, text, self.gate.pairs(outcome.trial.masked, text)))
            else:
                outcome.attempts.append(Attempt(len(outcome.attempts), text, Verdict(reason)))
        values = self._compare(list(dict.fromkeys(pair for _, _, pairs in compared for pair in pairs)))
        for outcome, text, pairs in compared:
            verdict = self.gate.judge([values[pair] for pair in pairs])
            outcome.attempts.append(Attempt(len(outcome.attempts), text, verdict))

    def _obvious(self, outcome: Outcome, answer: Answer | None) -> tuple[str, Reason | None]:
        if answer is None:
            return "", "failed"
        completion = self.completer.read(outcome.trial.masked, answer)
        if completion.reason is not None:
            return "", completion.reason
        trial = outcome.trial
        return completion.text, self.gate.obvious(
            trial.masked, completion.text, self.completer.mask_token, trial.objects
        )

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Similarities of texts; an empty text is like none."""
        values = dict.fromkeys(pairs, 0.0)
        keys = {pair: content_key(*pair) for pair in pairs if all(text.strip() for text in pair)}
        missing = [pair for pair, key in keys.items() if key not in self._similarities]
        if missing:
            found = self.gate.similarity.compare([one for one, _ in missing], [other for _, other in missing])
            self._similarities.add({keys[pair]: value for pair, value in zip(missing, found, strict=True)})
        return values | {pair: float(self._similarities[key]) for pair, key in keys.items()}
