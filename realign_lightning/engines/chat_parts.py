"""Prompts as chat messages whose contents are lists of parts, with the image in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realign_lightning.types import Prompt, SampleError


def chat_messages(prompt: Prompt, image: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A prompt as chat messages whose contents are lists of parts; what was given is not changed.

    Args:
        prompt: text or chat messages.
        image: the part that stands for the image, as the receiver takes it. It goes where the prompt shows an image, or
            before the first user's text where it shows none. None leaves the prompt as it is.

    Raises:
        SampleError: for turns that are no chat messages, and when there is no user's turn that could show the image.

    >>> chat_messages("what is it?", {"type": "photo"})
    [{'role': 'user', 'content': [{'type': 'photo'}, {'type': 'text', 'text': 'what is it?'}]}]
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{**turn, "content": _parts(turn)} for turn in given]
    if image is None:
        return messages
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise SampleError("the prompt has no user's turn that could show the image")
        first["content"].insert(0, {"type": "image"})
    for message in messages:
        message["content"] = [dict(image) if part["type"] == "image" else part for part in message["content"]]
    return messages


def text_of(prompt: Prompt) -> str:
    """A prompt as one text: of a chat the texts of its last turn.

    Args:
        prompt: text or chat messages.

    >>> text_of([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    'What is it?'
    """
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _parts(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if "role" not in turn or not isinstance(content, list | tuple) or not all("type" in part for part in content):
        raise SampleError(f"the prompt must be chat messages with a role and a text or a list of parts, got {turn!r}")
    return [dict(part) for part in content]
