"""Answers of a model behind an OpenAI-compatible endpoint: a service, or a server such as vLLM's."""

from __future__ import annotations

import base64
import importlib
import io
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from realign_lightning.engines.base import Answer, Engine, Question, check_positive
from realign_lightning.engines.chat_parts import chat_messages
from realign_lightning.trust import check_endpoint
from realign_lightning.types import Prompt, SampleError

_CUT = ("length", "content_filter")
"""Reasons to finish that leave an answer without its end."""

_NO_OPTIONS = {"extra_headers", "api_key", "model", "messages", "max_tokens", "temperature", "seed", "stream", "n"}
"""Fields of a request that are set here, or that could hold secrets."""


class EndpointEngine(Engine):
    """Asks an OpenAI-compatible chat endpoint, several questions at once.

    Requests that time out, are turned away for now (429) or fail on the server's side (5xx) are sent again, later and
    later, as the server asks. A question that still fails gives an answer with its ``error``; it is not kept, so that
    the next run asks again.

    Args:
        model: as the endpoint calls it.
        base_url: of the endpoint, for example ``http://localhost:8000/v1``; None is the client's own default.
        api_key_env: environment variable that holds the key. The key itself is never written anywhere.
        batch_size: requests at the same time.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        timeout: seconds that a request may take.
        retries: how often a request is sent again.
        requests_per_minute: sent at most; None sets no limit.
        image_format: that images are sent in: ``jpeg`` (quality 95) or ``png``.
        options: further fields of the request, for example ``{"top_p": 0.9}``. They are stored with what is built: no
            secrets.

    Raises:
        ValueError: for a number that is not positive, or options that have arguments of their own or hold headers; in
            safe mode for an address or a key that the environment does not name.
    """

    is_remote = True

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        batch_size: int = 16,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        timeout: float = 120.0,
        retries: int = 5,
        requests_per_minute: float | None = None,
        image_format: str = "jpeg",
        options: dict[str, Any] | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, timeout=timeout)
        if requests_per_minute is not None:
            check_positive(requests_per_minute=requests_per_minute)
        if image_format not in ("jpeg", "png"):
            raise ValueError(f"Expected `image_format` to be 'jpeg' or 'png', got {image_format!r}.")
        if taken := sorted(_NO_OPTIONS & (options or {}).keys()):
            raise ValueError(
                f"Expected `options` to be fields of a request that have no argument here, got {taken}: model, length "
                "and temperature are arguments, and headers could hold secrets, which `api_key_env` is for."
            )
        check_endpoint(base_url, api_key_env)
        self.model = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.timeout = timeout
        self.retries = retries
        self.requests_per_minute = requests_per_minute
        self.image_format = image_format
        self.options = dict(options or {})
        self._client: Any = None
        self._wait = _Pace(requests_per_minute)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Endpoint, model and settings; not how often and how fast it is asked."""
        return {
            "engine": "endpoint",
            # The client itself looks there, too.
            "base_url": self.base_url or os.environ.get("OPENAI_BASE_URL"),
            "model": self.model,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "image_format": self.image_format,
            **self.options,
        }

    @property
    def draws(self) -> bool:
        """Whether answers depend on the seed."""
        return self.temperature > 0

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask all questions at once; see the class for what happens to those that fail."""
        client = self._connect()
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(lambda question: self._ask(client, question), questions))

    def _ask(self, client: Any, question: Question) -> Answer:
        errors = importlib.import_module("openai").OpenAIError
        try:
            request = self._request(question)
        except SampleError as error:
            return Answer("", finished=False, error=str(error))
        try:
            reply = client.chat.completions.create(**request)
        except errors as error:
            return Answer("", finished=False, error=f"{type(error).__name__}: {error}")
        # What the client makes of a server that answers with no JSON.
        except ValueError as error:
            return Answer("", finished=False, error=f"the endpoint's reply is no chat completion: {error!r}")
        return self._read(reply)

    def _request(self, question: Question) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": self._messages(question.prompt, question.image),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            **({"seed": question.seed} if self.draws else {}),
            **self.options,
        }

    @staticmethod
    def _read(reply: Any) -> Answer:
        try:
            choice, usage = reply.choices[0], reply.usage
            counts = (0, 0) if usage is None else (usage.prompt_tokens or 0, usage.completion_tokens or 0)
            text = choice.message.content
        # What the client parses of a server that answers with anything else than a chat completion.
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            return Answer("", finished=False, error=f"the endpoint's reply is no chat completion: {error!r}")
        if not isinstance(text, str):
            return Answer("", finished=False, error=f"the endpoint's reply holds no text: {text!r}")
        return Answer(text.strip(), choice.finish_reason not in _CUT, None, *counts)

    def _messages(self, prompt: Prompt, image: Image.Image | None) -> list[dict[str, Any]]:
        return chat_messages(
            prompt, None if image is None else {"type": "image_url", "image_url": {"url": self._encode(image)}}
        )

    def _encode(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, self.image_format.upper(), quality=95)
        return f"data:image/{self.image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _connect(self) -> Any:
        if self._client is None:
            try:
                openai = importlib.import_module("openai")
            except ModuleNotFoundError as error:
                raise ImportError("EndpointEngine needs openai: install realign-lightning[build] or [eval].") from error
            # Also what the client sends again is sent no faster than allowed.
            hooks = {"request": [lambda _: self._wait()]}
            self._client = openai.OpenAI(
                http_client=openai.DefaultHttpxClient(event_hooks=hooks),
                base_url=self.base_url,
                # Servers of one's own ask for none, but the client does.
                api_key=os.environ.get(self.api_key_env) or "none",
                timeout=self.timeout,
                max_retries=self.retries,
            )
        return self._client


class _Pace:
    """Lets calls pass no faster than so many in a minute, from any number of threads."""

    def __init__(
        self,
        per_minute: float | None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gap = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()
        self._now = now
        self._sleep = sleep

    def __call__(self) -> None:
        with self._lock:
            start = max(self._now(), self._next)
            self._next = start + self._gap
        self._sleep(max(0.0, start - self._now()))
