"""Questions answered by an engine: images read once, finished answers kept, several ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from realign_lightning.backbones.files import hash_bytes
from realign_lightning.engines.asking import AnswerBook
from realign_lightning.engines.base import Engine
from realign_lightning.engines.base import Question as Asked
from realign_lightning.engines.memo import Memo, content_key, prompt_value
from realign_lightning.evaluation.base import Question
from realign_lightning.evaluation.images import load_image
from realign_lightning.ranks import merge, rank_and_world_size, share
from realign_lightning.types import SampleError


class Reply(NamedTuple):
    """What became of a question.

    Args:
        text: the answer; None where there is none.
        finished: whether the answer came to its end, and was not cut at the longest length.
        error: why there is no answer.
    """

    text: str | None
    finished: bool = True
    error: str | None = None


def answer_questions(
    questions: Sequence[Question], engine: Engine, folder: Path, show_progress: bool = True
) -> list[Reply]:
    """Ask an engine all questions; what it answered before is not asked again.

    Questions about one image are asked in one batch where it has room for them, so that the image is encoded once. With
    several processes (torch.distributed) all call this, share the images, and get all replies.

    Args:
        questions: with keys that differ.
        engine: who answers.
        folder: of finished answers, as JSON lines; one for any number of models and benchmarks.
        show_progress: whether there is a progress bar.

    Returns:
        One reply per question, in order.

    Raises:
        FileNotFoundError: naming the first image file that does not exist, before anything is asked.
        ValueError: for two questions of one key.
        EngineError: if the engine answers nothing any more; what was answered is kept.
    """
    _check(questions)
    groups = _by_image(questions)
    mine = share(groups)
    memo = Memo(folder, "answers", engine.identity, rank_and_world_size()[0])
    book = AnswerBook(engine, memo)
    replies: dict[str, Reply] = {}
    try:
        total = sum(len(group) for group in mine)
        with tqdm(total=total, desc="answer", unit="question", disable=not show_progress or not mine) as bar:
            for batch in _batches(mine, engine.batch_size):
                replies |= _ask(book, batch)
                bar.update(len(batch))
        engine.finish()
    finally:
        memo.close()
    found = merge(replies)
    return [found[question.key] for question in questions]


def _check(questions: Sequence[Question]) -> None:
    keys = [question.key for question in questions]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Expected keys that differ, but two questions are called {twice!r}.")
    files = dict.fromkeys(question.image for question in questions if isinstance(question.image, Path))
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}: give the folder that they "
            "lie in."
        )


def _by_image(questions: Sequence[Question]) -> list[list[Question]]:
    groups: dict[Hashable, list[Question]] = {}
    for question in questions:
        groups.setdefault(_place(question), []).append(question)
    return list(groups.values())


def _place(question: Question) -> Hashable:
    """Equal for questions about one image."""
    return question.image if isinstance(question.image, Path) else id(question.image)


def _batches(groups: Sequence[Sequence[Question]], size: int) -> Iterator[list[Question]]:
    """Whole groups together up to a size; groups that are larger are cut."""
    batch: list[Question] = []
    for group in groups:
        for start in range(0, len(group), size):
            part = list(group[start : start + size])
            if len(batch) + len(part) > size:
                yield batch
                batch = []
            batch += part
    if batch:
        yield batch


def _ask(book: AnswerBook, batch: Sequence[Question]) -> dict[str, Reply]:
    """Replies by the key of the question; every image of the batch is read once."""
    pictures: dict[Hashable, _Picture] = {}
    names: dict[str, str] = {}
    asked: dict[str, Callable[[], Asked | None]] = {}
    for question in batch:
        place = _place(question)
        if place not in pictures:
            pictures[place] = _Picture(question.image)
        picture = pictures[place]
        name = content_key(question.key, prompt_value(question.prompt), picture.content)
        names[question.key] = name
        asked[name] = partial(_question, question, picture)
    failures = book.ask(asked)
    problems = {question.key: pictures[_place(question)].problem for question in batch}
    return {key: _reply(book, name, failures.get(name) or problems[key]) for key, name in names.items()}


class _Picture:
    """An image of a batch: its content is hashed at once, and decoded when it is needed."""

    def __init__(self, image: Image.Image | Path | None) -> None:
        self._image = image
        self._decoded: Image.Image | None = None
        self.problem = ""
        self.content = "" if image is None else hash_bytes(_bytes(image))

    def decode(self) -> Image.Image | None:
        """The picture, the same object for all questions about it."""
        if self._decoded is None and self._image is not None:
            self._decoded = load_image(self._image)
        return self._decoded


def _bytes(image: Image.Image | Path) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    return f"{image.size} {image.mode} ".encode() + image.tobytes()


def _question(question: Question, picture: _Picture) -> Asked | None:
    try:
        return Asked(question.prompt, picture.decode())
    except SampleError as error:
        picture.problem = str(error)
        return None


def _reply(book: AnswerBook, name: str, problem: str | None) -> Reply:
    answer = book.answer(name)
    return Reply(None, False, problem) if answer is None else Reply(answer.text, answer.finished)
