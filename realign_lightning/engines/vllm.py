"""Answers of a model that vLLM runs on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

from realign_lightning.engines.base import Answer, Engine, Question, check_positive
from realign_lightning.engines.chat_parts import chat_messages
from realign_lightning.engines.text import checkpoint_identity
from realign_lightning.trust import REMOTE_CODE, check_engine_options, check_weights, is_remote_code_trusted
from realign_lightning.types import SampleError

_INSTALL = (
    "VLLMEngine needs vllm, which asks for another torch than this package: pip install vllm into an environment of "
    "its own. Or serve the model from there (vllm serve) and ask it with EndpointEngine."
)


class _Asked(NamedTuple):
    """A question as vLLM takes it: its place among all, chat messages, ``SamplingParams``."""

    place: int
    messages: list[dict[str, Any]]
    sampling: Any


class VLLMEngine(Engine):
    """Generates with vLLM in this process, with or without images, many answers at a time.

    What is drawn for a question depends on its seed. Sampling settings that a checkpoint ships do not apply. vLLM
    cannot be installed beside this package as a matter of course: the two ask for different versions of torch. To serve
    the model from another environment, see :class:`EndpointEngine`.

    Args:
        model: folder or hub name of a checkpoint with its tokenizer or processor.
        revision: branch, tag or commit on the hub.
        dtype: weights' dtype, as vLLM names it; ``auto`` takes the checkpoint's own.
        tensor_parallel_size: GPUs that the model is split over.
        batch_size: questions that vLLM is handed at a time; it batches them itself.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes.
        max_model_len: most tokens of prompt and answer together; None takes the model's own.
        options: further arguments of ``vllm.LLM``, for example ``{"enforce_eager": True}``.

    Raises:
        ValueError: for numbers out of their range, and options that would let a checkpoint run code of its own (in safe
            mode for any options).
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        batch_size: int = 256,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_positive(
            tensor_parallel_size=tensor_parallel_size,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        if max_model_len is not None:
            check_positive(max_model_len=max_model_len)
        if gpu_memory_utilization > 1:
            raise ValueError(f"Expected `gpu_memory_utilization` to be at most 1, got {gpu_memory_utilization}.")
        if not temperature >= 0:
            raise ValueError(f"Expected `temperature` to be 0 or above, got {temperature}.")
        check_engine_options(options or {}, "VLLMEngine")
        self.model = model
        self.revision = revision
        self.dtype = dtype
        self.tensor_parallel_size = tensor_parallel_size
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.options = dict(options or {})

    @property
    def draws(self) -> bool:
        """Whether answers depend on the seed."""
        return self.temperature > 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """The checkpoint (a folder by its content, a name by its commit) and settings, but for the use of GPUs."""
        return {
            "engine": "vllm",
            **self._checkpoint,
            "dtype": self.dtype,
            "longest": self.max_new_tokens,
            "temperature": self.temperature,
            "max_model_len": self.max_model_len,
            "options": self.options,
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Hand all questions to vLLM; those that cannot be asked, or that it refuses, get an error each."""
        answers: dict[int, Answer] = {}
        asked: list[_Asked] = []
        for place, question in enumerate(questions):
            try:
                asked.append(_Asked(place, _messages(question), self._sampling(question.seed)))
            except (SampleError, OSError) as error:
                answers[place] = Answer("", False, str(error))
        answers |= zip((one.place for one in asked), self._chat(asked), strict=True)
        return [answers[place] for place in range(len(questions))]

    def _chat(self, asked: Sequence[_Asked]) -> list[Answer]:
        """Answers to all; where vLLM refuses them, to each half, so that it is told which one it refuses and why."""
        if not asked:
            return []
        llm = self._llm
        try:
            outputs = llm.chat(
                messages=[one.messages for one in asked],
                sampling_params=[one.sampling for one in asked],
                use_tqdm=False,
            )
        # Which errors there are differs between versions of vLLM and families of models.
        except Exception as error:
            if len(asked) == 1:
                return [Answer("", False, f"{type(error).__name__}: {error}")]
            half = len(asked) // 2
            return self._chat(asked[:half]) + self._chat(asked[half:])
        # Where vLLM refused one question of a batch, older versions answer the others along with the next batch.
        return [_answer(output) for output in outputs[-len(asked) :]]

    def _sampling(self, seed: int) -> Any:
        drawn = {"seed": seed} if self.temperature else {}
        return self._vllm.SamplingParams(max_tokens=self.max_new_tokens, temperature=self.temperature, **drawn)

    @cached_property
    def _checkpoint(self) -> Mapping[str, str]:
        return checkpoint_identity(self.model, self.revision)

    @cached_property
    def _vllm(self) -> ModuleType:
        try:
            return importlib.import_module("vllm")
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ImportError(_INSTALL) from error

    @cached_property
    def _llm(self) -> Any:
        vllm = self._vllm
        check_weights(self.model)
        commit = self._checkpoint.get("revision")
        return vllm.LLM(
            **{
                "model": self.model,
                "revision": commit,
                "tokenizer_revision": commit,
                **({REMOTE_CODE: True} if is_remote_code_trusted() else {}),
                "dtype": self.dtype,
                "tensor_parallel_size": self.tensor_parallel_size,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "max_model_len": self.max_model_len,
                **self.options,
            }
        )


def _messages(question: Question) -> list[dict[str, Any]]:
    if question.form is not None:
        raise SampleError("VLLMEngine cannot be held to a form, and the question has one")
    if question.image is None:
        return chat_messages(question.prompt)
    return chat_messages(question.prompt, {"type": "image_pil", "image_pil": question.image.convert("RGB")})


def _answer(output: Any) -> Answer:
    (choice,) = output.outputs
    counts = len(output.prompt_token_ids or ()), len(choice.token_ids)
    if choice.finish_reason not in ("stop", "length"):
        return Answer("", False, f"vLLM ended the answer for another reason: {choice.finish_reason}", *counts)
    return Answer(choice.text.strip(), choice.finish_reason == "stop", None, *counts)
