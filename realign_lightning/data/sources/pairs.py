"""Preference pairs that others publish: RLHF-V and RLAIF-V, TRL, LLaMA-Factory, ms-swift, and the paper's own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign_lightning.data.schema import load_json
from realign_lightning.data.sources.base import SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import (
    answer_text,
    make_prompt,
    read_prompt,
    read_turns,
    split_answer,
)
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.rows import Row
from realign_lightning.data.sources.table import RowSource, checked, other_image, row_facts
from realign_lightning.types import Message, SampleError

_TEXTS = ("question", "chosen", "rejected")


class Parquet(RowSource):
    """Rows of prompt, chosen, rejected and image, as in RLHF-V, RLAIF-V and our own Parquet files.

    Images are ``{"bytes", "path"}`` as Hugging Face datasets store them, bytes, or paths. The column ``text`` of
    RLHF-V-Dataset, a JSON text with question, chosen and rejected, is read where there is no column of the prompt. What
    a row does not have (rejected, retrieved) is left to be built. Images of a row are in memory as long as its record.

    Args:
        path: a Parquet file, a pattern, or a folder of files (JSON lines, JSON and CSV of this form are read too).
        images: folder that image paths are relative to; None is the folder of the files.
        prompt_field: column of the prompt, a text or chat messages; None takes ``prompt`` or ``question``.
        chosen_field: column of the chosen answer.
        rejected_field: column of the rejected answer.
        image_field: column of the image; ``images`` with one image each is taken too.
        retrieved_field: column of the rejected image.
        id_field: column with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path | None = None,
        prompt_field: str | None = None,
        chosen_field: str = "chosen",
        rejected_field: str = "rejected",
        image_field: str = "image",
        retrieved_field: str = "retrieved",
        id_field: str = "key",
    ) -> None:
        super().__init__(path, images, id_field)
        self.prompt_field = prompt_field
        self.chosen_field = chosen_field
        self.rejected_field = rejected_field
        self.image_field = image_field
        self.retrieved_field = retrieved_field

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """One pair, or the half that is there."""
        fields = row.fields
        prompt_field = self.prompt_field or ("prompt" if "prompt" in fields else "question")
        if prompt_field in fields or "text" not in fields:
            texts = [fields.get(name) for name in (prompt_field, self.chosen_field, self.rejected_field)]
            used = [prompt_field, self.chosen_field, self.rejected_field]
        else:
            texts, used = _packed_texts(fields["text"]), ["text"]
        prompt, chosen, rejected = texts
        image_field = self.image_field if self.image_field in fields else "images"
        image = images.find(fields.get(image_field), self.image_field)
        retrieved = fields.get(self.retrieved_field)
        yield checked(
            SourceRecord(
                key="",
                image=image,
                prompt=read_prompt(prompt, prompt_field),
                chosen=_answer(chosen, self.chosen_field),
                rejected=_answer(rejected, self.rejected_field),
                retrieved=None if retrieved is None else images.find(retrieved, self.retrieved_field),
                facts=row_facts(fields, (*used, image_field, self.retrieved_field, self.id_field)),
            )
        )


class TrlPreference(RowSource):
    """TRL's preference format: prompt, chosen, rejected as texts or chat messages, and images.

    Where the prompt is implicit, it is what chosen and rejected have in common at their beginning: messages, or
    characters (then without a space at the end), as TRL takes it
    (https://huggingface.co/docs/trl/dataset_formats#preference).

    Args:
        path: a Parquet file or JSON lines, a pattern, or a folder of files.
        images: folder that image paths are relative to; None is the folder of the files.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """The text half of a pair."""
        fields = row.fields
        prompt, chosen, rejected = (fields.get(name) for name in ("prompt", "chosen", "rejected"))
        if chosen is None or rejected is None:
            raise SampleError(f"the row has no {'chosen' if chosen is None else 'rejected'}")
        # A text prompt beside whole chats repeats what stands in them; TRL passes it over, too.
        if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1):
            prompt, chosen, rejected = _common_prompt(chosen, rejected)
        image_field = "images" if "images" in fields else "image"
        yield checked(
            SourceRecord(
                key="",
                image=images.find(fields.get(image_field), image_field),
                prompt=read_prompt(prompt, "prompt"),
                chosen=answer_text(chosen, "chosen"),
                rejected=answer_text(rejected, "rejected"),
                facts=row_facts(fields, ("prompt", "chosen", "rejected", image_field, self.id_field)),
            )
        )


class ShareGptRanking(RowSource):
    """LLaMA-Factory's ShareGPT format with ranking: conversations, chosen, rejected, images.

    Turns are ``{"from", "value"}`` of human, gpt and system, or ``{"role", "content"}``
    (https://github.com/hiyouga/LLaMA-Factory, data/README.md).

    Args:
        path: the JSON file, an array or JSON lines; a pattern or folder for several.
        images: folder that ``images`` are relative to; None is the folder of the file.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """The text half of a pair; without rejected, an answer."""
        fields = row.fields
        turns = read_turns(fields.get("conversations"), "conversations")
        yield checked(
            SourceRecord(
                key="",
                image=images.find(fields.get("images"), "images"),
                prompt=make_prompt([*_system(fields), *turns]),
                chosen=_answer(fields.get("chosen"), "chosen"),
                rejected=_answer(fields.get("rejected"), "rejected"),
                facts=row_facts(fields, ("conversations", "chosen", "rejected", "images", "system", self.id_field)),
            )
        )


class MsSwift(RowSource):
    """ms-swift's messages with ``rejected_response``, or with ``rejected_messages`` and ``rejected_images``.

    A row whose answer alone is rejected and a next row of the same messages and images whose image alone is rejected
    are the halves of one pair, and come out as one record (https://swift.readthedocs.io, Custom dataset).

    Args:
        path: JSON lines or a JSON array; a pattern or folder for several.
        images: folder that image paths are relative to; None is the folder of the file.
        id_field: field with an id that no other pair has; it becomes the key. Rows without it are numbered.
    """

    def rows(self) -> Iterator[Row | SourceProblem]:
        """The rows, halves of one pair joined."""
        held: Row | None = None
        for row in super().rows():
            if held is not None and isinstance(row, Row) and _are_halves(held.fields, row.fields):
                yield held._replace(fields={**row.fields, **_rejected_text(held.fields)})
                held = None
                continue
            if held is not None:
                yield held
            held = row if isinstance(row, Row) else None
            if held is None:
                yield row
        if held is not None:
            yield held

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """A pair, or the half that is there."""
        fields = row.fields
        turns, chosen = split_answer(_turns(fields.get("messages"), "messages"), "messages")
        rejected = _rejected_text(fields)
        prompt = make_prompt([*_system(fields), *read_turns(turns, "messages")])
        image = images.find(fields.get("images"), "images")
        text = rejected.get("rejected_response")
        yield checked(
            SourceRecord(
                key="",
                image=image,
                prompt=prompt,
                chosen=chosen,
                rejected=None if text is None else answer_text(text, "rejected_response"),
                retrieved=other_image(image, fields.get("rejected_images"), "rejected_images", images),
                facts=row_facts(fields, (*_SWIFT, self.id_field)),
            )
        )


class RealignJson(RowSource):
    """The pref_data.json of Re-Align's own release: image, retrieved_image, chosen and rejected as chats.

    The image stands at the beginning of its turn wherever ``<image>`` is written in it, as in the release
    (https://github.com/taco-group/Re-Align, train_rdpo.py).

    Args:
        path: the JSON file, an array or JSON lines; a pattern or folder for several.
        images: folder of both images (``dataset/train2014`` there); None is the folder of the file.
        id_field: field with an id that no other row has; it becomes the key. Rows without it are numbered.
    """

    def parse(self, row: Row, images: ImageFinder) -> Iterator[SourceRecord]:
        """A whole pair; what is missing of it is left to be built."""
        fields = row.fields
        image = images.find(fields.get("image"), "image")
        prompt, chosen = self._chat(fields, "chosen")
        rejected = None
        if "rejected" in fields:
            other, rejected = self._chat(fields, "rejected")
            if other != prompt:
                raise SampleError("chosen and rejected answer different prompts")
        retrieved = fields.get("retrieved_image")
        yield checked(
            SourceRecord(
                key="",
                image=image,
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                retrieved=None if retrieved is None else images.find(retrieved, "retrieved_image"),
                facts=row_facts(fields, ("image", "retrieved_image", "chosen", "rejected", self.id_field)),
            )
        )

    @staticmethod
    def _chat(fields: Mapping[str, Any], name: str) -> tuple[Any, str]:
        turns, answer = split_answer(_turns(fields.get(name), name), name)
        if answer is None:
            raise SampleError(f"{name} does not end with the assistant's turn")
        return make_prompt(read_turns(turns, name, marks="first")), answer


_SWIFT = (
    "messages",
    "images",
    "system",
    "rejected_response",
    "rejected_messages",
    "rejected_images",
)


def _packed_texts(text: Any) -> list[Any]:
    """Question, chosen and rejected of RLHF-V's ``text``: a JSON text, or the object itself."""
    if isinstance(text, str):
        try:
            text = load_json(text.encode())
        except (ValueError, UnicodeEncodeError) as error:
            raise SampleError(f"text is no JSON: {error}") from error
    if not isinstance(text, Mapping):
        raise SampleError(f"text must be an object with {', '.join(_TEXTS)}, got {type(text).__name__}")
    return [text.get(name) for name in _TEXTS]


def _answer(value: Any, name: str) -> str | None:
    return None if value is None else answer_text(value, name)


def _is_chat(value: Any) -> bool:
    return not isinstance(value, str)


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if _is_chat(chosen) != _is_chat(rejected) or not all(isinstance(one, Sequence) for one in (chosen, rejected)):
        raise SampleError("chosen and rejected must both be texts, or both chats")
    length = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        length += 1
    if isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    if not length:
        raise SampleError("there is no prompt: chosen and rejected have no beginning in common")
    return chosen[:length], chosen[length:], rejected[length:]


def _system(fields: Mapping[str, Any]) -> list[Message]:
    """The system's turn where a field of its own holds it."""
    text = fields.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _turns(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise SampleError(f"{name} must be a list of chat turns, got {type(value).__name__}")
    return value


def _rejected_text(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``rejected_response``, where the row rejects a text: as such, or as the last of ``rejected_messages``."""
    if "rejected_response" in fields:
        return {"rejected_response": fields["rejected_response"]}
    if "rejected_messages" not in fields:
        return {}
    messages = _turns(fields.get("messages"), "messages")
    rejected = _turns(fields["rejected_messages"], "rejected_messages")
    if rejected[:-1] != messages[:-1]:
        raise SampleError("messages and rejected_messages answer different prompts")
    return {} if rejected == messages else {"rejected_response": [rejected[-1]]}


def _are_halves(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows are the text half and the image half of one pair."""
    if any(first.get(name) != second.get(name) for name in ("messages", "images", "system")):
        return False
    try:
        texts = bool(_rejected_text(first)), bool(_rejected_text(second))
    except SampleError:
        return False
    images = [row.get("rejected_images") not in (None, row.get("images")) for row in (first, second)]
    return texts == (True, False) and images == [False, True]
