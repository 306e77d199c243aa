"""The stage in which chosen responses are written that a source lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from PIL import Image
from tqdm import tqdm

from realign_lightning.data.schema import decode_image
from realign_lightning.data.sources.images import read_unchanged
from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Question
from realign_lightning.engines.memo import content_key, prompt_value
from realign_lightning.preferences.accept import Gate, is_writable
from realign_lightning.preferences.pipeline.drafts import Draft, still_open
from realign_lightning.preferences.pipeline.reading import Album
from realign_lightning.ranks import merge, share
from realign_lightning.types import SampleError


def write_responses(
    drafts: Sequence[Draft], album: Album, book: AnswerBook | None, gate: Gate, seed: int, shows: bool = True
) -> None:
    """Generate the chosen responses of drafts without one; each rank those of its share.

    Args:
        drafts: all of them.
        album: their images.
        book: who answers; None gives these drafts up.
        gate: knows how models decline to answer.
        seed: of what is drawn.
        shows: whether there is a progress bar.
    """
    wanted = [draft for draft in still_open(drafts) if draft.record.chosen is None]
    if book is None:
        for draft in wanted:
            draft.leave_out("no chosen answer", "the source has none; set `builder.responder` to generate it")
        return
    mine = share(wanted)
    keys = {draft.key: _key(draft, album, seed if book.engine.draws else None) for draft in mine}
    failures: dict[str, str] = {}
    with tqdm(total=len(mine), desc="answer", unit="record", disable=not shows or not mine) as bar:
        for start in range(0, len(mine), book.engine.batch_size):
            batch = mine[start : start + book.engine.batch_size]
            asked = {keys[draft.key]: partial(_question, draft, album, keys[draft.key]) for draft in batch}
            failures |= book.ask(asked)
            bar.update(len(batch))
    book.engine.finish()
    found = {draft.key: _read(book, keys[draft.key], failures) for draft in mine}
    answers = merge(found)
    for draft in wanted:
        text, finished, error = answers[draft.key]
        if error is not None:
            draft.leave_out("engine failed", error)
        elif reason := _unusable(text, finished, gate):
            draft.leave_out("answer not usable", reason)
        else:
            draft.record = replace(draft.record, chosen=text)
            draft.generated = True


def _key(draft: Draft, album: Album, seed: int | None) -> str:
    content = album.contents[draft.record.image.image_id]
    return content_key(prompt_value(draft.record.prompt), content, seed)


def _question(draft: Draft, album: Album, key: str) -> Question | None:
    file = draft.record.image
    try:
        image: Image.Image = decode_image(read_unchanged(file, album.contents[file.image_id]))
    except SampleError:
        # It has gone, or changed, since it was checked.
        return None
    return Question(draft.record.prompt, image, int(key[:15], 16))


def _read(book: AnswerBook, key: str, failures: dict[str, str]) -> tuple[str, bool, str | None]:
    answer = book.answer(key)
    if answer is None:
        return "", False, failures.get(key, "the image has gone, or changed, since it was checked")
    return answer.text, answer.finished, None


def _unusable(text: str, finished: bool, gate: Gate) -> str | None:
    if not finished:
        return "the generated answer was cut before its end: raise max_new_tokens"
    if not is_writable(text):
        return "the generated answer is empty, or holds characters that no shard can hold"
    if gate.declines(text):
        return "the model declined to answer"
    return None
