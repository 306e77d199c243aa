"""LLaVA's instruction data: conversations about one image.

Source: https://github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; llava/train/train.py for where images stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from realign_lightning.data.sources.base import ImageFile, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import answer_text, make_prompt, read_turns
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.rows import Row
from realign_lightning.data.sources.table import RowSource, checked, row_facts
from realign_lightning.types import SampleError


class LlavaInstruct(RowSource):
    """LLaVA-Instruct JSON: rows of ``id``, ``image`` and ``conversations`` between human and gpt.

    The image stands at the beginning of its turn wherever ``<image>`` is written in it, as in LLaVA's own training.
    The ``id`` names the image in LLaVA-Instruct-150K, where many rows share one: it is kept in ``facts`` and is no key.

    Args:
        path: the JSON file, an array or JSON lines; a pattern or folder for several.
        images: folder that ``image`` is relative to; None is the folder of the file.
        turns: which of gpt's answers become records: the ``first``, or ``all``, each with the turns before it as
            history.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        turns: Literal["first", "all"] = "first",
        id_field: str = "key",
    ) -> None:
        if turns not in ("first", "all"):
            raise ValueError(f"turns must be 'first' or 'all', got {turns!r}")
        super().__init__(path, images, id_field)
        self.turns = turns

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord | SourceProblem]:
        """One record per answer; an answer that cannot be used is a problem of its own."""
        image = images.find(row.fields.get("image"), "image")
        facts = row_facts(row.fields, ("image", "conversations", self.id_field))
        conversation = row.fields.get("conversations")
        messages = read_turns(conversation, "conversations", marks="first")
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise SampleError("conversations hold no answer of gpt")
        if self.turns == "first":
            yield self._record(image, messages, answers[0], facts)
            return
        for number, index in enumerate(answers, 1):
            try:
                record = self._record(image, messages, index, facts, f"-turn-{number}")
            except SampleError as error:
                yield SourceProblem(f"{row.where}, answer {number}", str(error))
            else:
                yield record

    @staticmethod
    def _record(
        image: ImageFile, messages: list[dict[str, Any]], answer: int, facts: dict[str, Any], key: str = ""
    ) -> SourceRecord:
        chosen = answer_text(messages[answer], "conversations")
        return checked(SourceRecord(key, image, make_prompt(messages[:answer]), chosen, facts=facts))
