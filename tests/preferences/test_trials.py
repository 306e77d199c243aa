"""Candidates are tried in order, lazily, in full batches, and nothing is asked twice."""

import hashlib
import io
import itertools
import random

import pytest

from realign_lightning.data.sources.base import ImageFile
from realign_lightning.engines.base import Answer, Engine
from realign_lightning.engines.memo import Memo
from realign_lightning.preferences.accept import Gate, WordOverlap
from realign_lightning.preferences.completing import Completer
from realign_lightning.preferences.mask import LexiconMasker
from realign_lightning.preferences.trials import Candidate, Trial, Trials
from tests.conftest import picture

WORDS = ["cat", "dog", "bus", "cup", "bed", "car", "hat", "owl", "pig", "fox"]
IMAGES = 12


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


FILES = [ImageFile(f"image{number}", data=image_bytes(number)) for number in range(IMAGES)]
CONTENTS = [hashlib.sha256(file.read()).hexdigest() for file in FILES]
NUMBER_OF = {picture(number).convert("RGB").tobytes(): number for number in range(IMAGES)}


class Scripted(Engine):
    """Sees a word in every image; on most it repeats the chosen word, so that the image is passed over."""

    def __init__(self, batch_size: int = 4, stop_after: int | None = None, fails=()):
        self.batch_size, self.stop_after, self.fails = batch_size, stop_after, set(fails)
        self.batches: list[list[tuple[str, int]]] = []

    @property
    def identity(self):
        return {"engine": "scripted"}

    def answer(self, questions):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        asked = [(question.prompt, NUMBER_OF[question.image.tobytes()]) for question in questions]
        self.batches.append(asked)
        return [self._one(*pair) for pair in asked]

    def _one(self, prompt: str, image: int) -> Answer:
        if image in self.fails:
            return Answer("", False, error="out of order")
        record = int(prompt.split()[1])
        if (record + image) % 5 == 0:
            return Answer(f"there is a {WORDS[(record + 1 + image % 3) % 10]}")
        if (record + image) % 7 == 0:
            return Answer("there is a", finished=False)
        return Answer(f"there is a {WORDS[record % 10]}")


def trials_of(count: int = 23, candidates: int = 5) -> list[Trial]:
    found = []
    for record in range(count):
        order = random.Random(record).sample(range(IMAGES), candidates)
        response = f"there is a {WORDS[record % 10]}"
        found.append(
            Trial(
                f"record{record}",
                f"record {record} {{}}",
                LexiconMasker(WORDS).mask("k", response),
                [Candidate(FILES[number], CONTENTS[number], 0.5) for number in order],
            )
        )
    return found


def runner(folder, engine: Engine, batches: int = 2, **gate) -> Trials:
    completer = Completer(engine=engine, instruction="{prompt}{masked}")
    answers = Memo(folder, "answers", completer.identity)
    return Trials(
        completer,
        Gate(WordOverlap(), **gate),
        answers,
        Memo(folder, "similarities", WordOverlap().identity),
        batches=batches,
    )


def plain(outcomes) -> list:
    return [(outcome.trial.key, outcome.error, outcome.attempts) for outcome in outcomes]


def by_hand(trials) -> list[tuple[str, list[str | None]]]:
    """What the script says of every record, candidate by candidate, up to the first that is accepted."""
    engine, expected = Scripted(), []
    for trial in trials:
        reasons: list[str | None] = []
        for candidate in trial.candidates:
            answer = engine._one(trial.prompt, int(candidate.image.image_id.removeprefix("image")))
            if not answer.finished:
                reasons.append("unfinished")
            elif answer.text == trial.masked.response:
                reasons.append("unchanged")
            else:
                reasons.append(None)
                break
        expected.append((trial.key, reasons))
    return expected


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("batches", [1, 3])
def test_candidates_in_order_up_to_the_first_that_is_accepted(tmp_path, batch_size, batches):
    engine = Scripted(batch_size)
    run = runner(tmp_path, engine, batches)
    outcomes = list(run.run(trials_of()))
    reasons = [(outcome.trial.key, [attempt.verdict.reason for attempt in outcome.attempts]) for outcome in outcomes]
    assert reasons == by_hand(trials_of())
    assert {len(found) for _, found in reasons} == {1, 2, 3, 4, 5}
    assert any(found[-1] is not None for _, found in reasons), "some find nothing"
    asked = list(itertools.chain(*engine.batches))
    assert len(asked) == run.book.asked == sum(len(found) for _, found in reasons), "never k where one serves"
    assert len(set(asked)) == len(asked)


def test_batches_are_full_while_there_is_work(tmp_path):
    engine = Scripted(4)
    list(runner(tmp_path, engine, batches=3).run(trials_of(60)))
    sizes = [len(batch) for batch in engine.batches]
    assert sum(sizes) / len(sizes) > 3.4


def test_what_is_known_is_not_asked_again(tmp_path):
    first, second = Scripted(), Scripted()
    outcomes = plain(runner(tmp_path, first).run(trials_of()))
    assert plain(runner(tmp_path, second).run(trials_of())) == outcomes
    assert first.batches
    assert second.batches == []
    stricter = Scripted()
    list(runner(tmp_path, stricter, tau=0.1).run(trials_of()))
    asked = set(itertools.chain(*first.batches))
    assert stricter.batches
    assert not asked & set(itertools.chain(*stricter.batches)), "a later gate asks for what is new only"


def test_stopped_anywhere_it_goes_on_with_the_batches_of_the_undisturbed_run(tmp_path):
    undisturbed = Scripted()
    expected = plain(runner(tmp_path / "whole", undisturbed).run(trials_of()))
    for stop in range(len(undisturbed.batches)):
        folder, batches = tmp_path / f"stopped{stop}", []
        broken = Scripted(stop_after=stop)
        with pytest.raises(KeyboardInterrupt):
            list(runner(folder, broken).run(trials_of()))
        batches += broken.batches
        again = Scripted()
        assert plain(runner(folder, again).run(trials_of())) == expected
        assert batches + again.batches == undisturbed.batches


def test_a_run_can_be_extended(tmp_path):
    first, second = Scripted(), Scripted()
    list(runner(tmp_path, first).run(trials_of(10)))
    outcomes = list(runner(tmp_path, second).run(trials_of(23)))
    assert [outcome.trial.key for outcome in outcomes] == [f"record{number}" for number in range(23)]
    asked = [set(itertools.chain(*engine.batches)) for engine in (first, second)]
    assert not asked[0] & asked[1]
    assert {prompt.split()[1] for prompt, _ in asked[1]} == {str(number) for number in range(10, 23)}


def test_a_failure_gives_a_record_up_for_this_run_only(tmp_path):
    broken, mended = Scripted(fails=[0, 1, 2]), Scripted()
    outcomes = list(runner(tmp_path, broken).run(trials_of()))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    assert failed
    assert len(failed) < len(outcomes)
    assert {outcome.error for outcome in failed} == {"out of order"}
    whole = Scripted()
    expected = plain(runner(tmp_path / "whole", whole).run(trials_of()))
    assert plain(runner(tmp_path, mended).run(trials_of())) == expected
    asked_before = {pair for pair in itertools.chain(*broken.batches) if pair[1] not in broken.fails}
    assert not asked_before & set(itertools.chain(*mended.batches)), "what was answered is not asked again"


def test_an_image_that_cannot_be_read_is_passed_over(tmp_path):
    damaged = Candidate(ImageFile("damaged", data=b"no image"), "0" * 64)
    trial = trials_of(1)[0]
    trial = Trial(trial.key, trial.prompt, trial.masked, [damaged, *trial.candidates])
    (outcome,) = runner(tmp_path, Scripted()).run([trial])
    assert outcome.attempts[0].verdict.reason == "failed"
    assert outcome.error is None
    assert [attempt.rank for attempt in outcome.attempts] == list(range(len(outcome.attempts)))


def test_nothing_to_try(tmp_path):
    assert list(runner(tmp_path, Scripted()).run([])) == []
    trial = trials_of(1)[0]
    (outcome,) = runner(tmp_path, Scripted()).run([Trial(trial.key, trial.prompt, trial.masked, [])])
    assert (outcome.attempts, outcome.accepted, outcome.error) == ([], None, None)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected `batches` to be at least 1, got 0"):
        runner(tmp_path, Scripted(), batches=0)
