"""Chats of other layouts as prompts: their roles, their image placeholders, and where the answer begins."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from realign_lightning.data.schema import check_response
from realign_lightning.types import Prompt, SampleError

PLACEHOLDER = "<image>"
"""What LLaVA, LLaMA-Factory and ms-swift write where an image stands."""

Marks = Literal["place", "first", "text"]
"""What a placeholder in a text means, see :func:`read_turns`."""

_IMAGE = {"type": "image"}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SPACES = ("\n", " ")


def read_turns(value: Any, name: str, marks: Marks = "place") -> list[dict[str, Any]]:
    """Turns of a chat as messages; placeholders become image parts.

    Args:
        value: a list of ``{"from", "value"}`` or ``{"role", "content"}``; contents are texts or lists of parts.
        name: of the field, for messages.
        marks: what ``<image>`` in a text means: the ``place`` of an image; an image ``first`` in its turn, wherever it
            is written, the turn being trimmed, as in LLaVA's own code; or nothing but ``text``.

    Returns:
        Messages with the roles system, user and assistant.

    Raises:
        SampleError: if it is no such list.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise SampleError(f"{name} must be a list of chat turns, got {_kind(value)}")
    return [_read_turn(turn, name, marks) for turn in value]


def make_prompt(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A prompt of chat messages, checked, in its plainest form.

    Args:
        messages: what is asked, without the answer.

    Raises:
        SampleError: if the last turn is not the user's, a turn is empty, or more than one image is shown.
    """
    if not messages or messages[-1]["role"] != "user":
        raise SampleError("the chat must end with the user's turn, and the answer after it")
    shown = 0
    for message in messages:
        parts = _parts(message["content"])
        images = sum(part == _IMAGE for part in parts)
        if images and message["role"] != "user":
            raise SampleError(f"a turn of the {message['role']} shows an image; expected images in the user's turns")
        shown += images
        for text in [part["text"] for part in parts if part != _IMAGE] or [""]:
            check_response(text, f"a turn of the {message['role']}")
    if shown > 1:
        raise SampleError(f"the chat shows {shown} images; expected one")
    return plain_prompt(messages)


def read_prompt(value: Any, name: str, marks: Marks = "place") -> Prompt:
    """A prompt that is a text or a list of chat turns.

    Args:
        value: the text or turns.
        name: of the field, for messages.
        marks: see :func:`read_turns`.

    Raises:
        SampleError: if it is neither, or as :func:`make_prompt`.
    """
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    return make_prompt(read_turns(turns, name, marks))


def plain_prompt(prompt: Prompt) -> Prompt:
    """The plainest form of a prompt, which every model reads alike: one question is a text.

    An image part at the beginning of the first user turn says nothing, since the image is shown there anyway; a turn
    of one text part is that text; a chat of one turn is its text.

    Args:
        prompt: text or chat messages.

    Returns:
        The text, or the messages.

    Example:
        >>> plain_prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which bus?"}]}])
        'Which bus?'
    """
    if isinstance(prompt, str):
        return prompt
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None and _parts(first["content"])[:1] == [_IMAGE]:
        first["content"] = first["content"][1:]
    for message in messages:
        parts = _parts(message["content"])
        if len(parts) == 1 and parts[0] != _IMAGE:
            message["content"] = parts[0]["text"]
    if len(messages) == 1 and isinstance(messages[0]["content"], str):
        return messages[0]["content"]
    return messages


def spelled_prompt(prompt: Prompt) -> list[dict[str, Any]]:
    """The most explicit form of a prompt: messages of parts, the image where it is shown; what tables of rows hold.

    Args:
        prompt: text or chat messages.

    Returns:
        Messages whose contents are parts, one of them the image.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    spelled: list[dict[str, Any]] = [
        {"role": message["role"], "content": _parts(message["content"])} for message in messages
    ]
    if not any(part == _IMAGE for message in spelled for part in message["content"]):
        first = next(message for message in spelled if message["role"] == "user")
        first["content"].insert(0, dict(_IMAGE))
    return spelled


def marked_prompt(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as messages of plain texts with ``<image>`` where the image is shown, as ms-swift takes it.

    Args:
        prompt: text or chat messages.

    Raises:
        SampleError: if a text holds the placeholder already, which would show a second image; or if texts stand side by
            side in one turn, which would become one.
    """
    marked = []
    for message in spelled_prompt(prompt):
        parts = message["content"]
        if any(one["type"] == other["type"] == "text" for one, other in itertools.pairwise(parts)):
            raise SampleError("the prompt holds text parts side by side, which this format would join")
        texts = [PLACEHOLDER if part["type"] == "image" else part["text"] for part in parts]
        for part in parts:
            check_unmarked(part.get("text", ""), "the prompt")
        # A reader takes one white space away beside a placeholder at the border.
        if texts[0] == PLACEHOLDER and texts[1].startswith(_SPACES):
            texts.insert(1, "\n")
        elif texts[-1] == PLACEHOLDER and texts[-2].endswith(_SPACES):
            texts.insert(-1, "\n")
        marked.append({"role": message["role"], "content": "".join(texts)})
    return marked


def check_unmarked(text: str, name: str) -> None:
    """Refuse a text that holds the placeholder.

    Args:
        text: the text.
        name: of the text, for the message.

    Raises:
        SampleError: if it does.
    """
    if PLACEHOLDER in text:
        raise SampleError(f"{name} holds {PLACEHOLDER!r} as text, which this format takes for an image")


def answer_text(value: Any, name: str) -> str:
    """An answer: a text, a number, a turn, or a list of one turn.

    Args:
        value: the answer.
        name: of the field, for messages.

    Raises:
        SampleError: if it is none of them, or not the assistant's.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    turns = [value] if isinstance(value, Mapping) else value
    (turn, *more) = read_turns(turns, name)
    if more or turn["role"] != "assistant":
        raise SampleError(f"{name} must be one turn of the assistant, got {[turn['role'], *(m['role'] for m in more)]}")
    parts = _parts(turn["content"])
    if len(parts) != 1 or parts[0] == _IMAGE:
        raise SampleError(f"{name} must be one text, got {len(parts)} parts")
    text: str = parts[0]["text"]
    return text


def split_answer(turns: Sequence[Any], name: str) -> tuple[Sequence[Any], str | None]:
    """The turns before the answer, and the answer; None where the last turn is not the assistant's.

    Args:
        turns: a list of turns, not read yet.
        name: of the field, for messages.

    Raises:
        SampleError: if they are no turns.
    """
    read = read_turns(turns, name)
    if read[-1]["role"] != "assistant":
        return turns, None
    return turns[:-1], answer_text(turns[-1], name)


def _read_turn(turn: Any, name: str, marks: Marks) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise SampleError(f"{name} must hold turns with role and content, got {_kind(turn)}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(f"{name} holds a turn of {role!r}; expected one of {list(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        content = content if marks == "text" or _ROLES[role] == "assistant" else _split_text(content, marks)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        content = [_read_part(part, name) for part in content]
    else:
        raise SampleError(f"{name} holds a turn whose content is {_kind(content)}; expected a text or a list of parts")
    return {"role": _ROLES[role], "content": content}


def _split_text(text: str, marks: Marks) -> str | list[dict[str, Any]]:
    """A text as it is, or in parts if it holds placeholders."""
    if PLACEHOLDER not in text:
        return text
    if marks == "first":
        rest = text.replace(PLACEHOLDER, "").strip()
        images = [dict(_IMAGE) for _ in range(text.count(PLACEHOLDER))]
        return images + ([{"type": "text", "text": rest}] if rest else [])
    pieces = text.split(PLACEHOLDER)
    # The white space beside a placeholder at the border belongs to the placeholder.
    if not pieces[0] and pieces[1].startswith(_SPACES):
        pieces[1] = pieces[1][1:]
    if not pieces[-1] and pieces[-2].endswith(_SPACES):
        pieces[-2] = pieces[-2][:-1]
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        parts += [{"type": "text", "text": piece}] if piece else []
        parts.append(dict(_IMAGE))
    return parts[:-1]


def _read_part(part: Any, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return dict(_IMAGE)
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise SampleError(f"{name} holds the part {str(part)[:80]}; expected one of the types text and image")


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
