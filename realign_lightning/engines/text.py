"""Answers of a Hugging Face language model on this machine, which sees no images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from realign_lightning.backbones.auto import DType
from realign_lightning.backbones.files import file_sha256, hash_checkpoint, hash_texts
from realign_lightning.backbones.revisions import tell_commit
from realign_lightning.engines.base import Answer, Engine, Question, check_positive
from realign_lightning.engines.chat_parts import chat_messages
from realign_lightning.engines.infill import SeededDraw
from realign_lightning.engines.policy import best_device
from realign_lightning.trust import is_remote_code_trusted, saying_what_is_missing, weights_options
from realign_lightning.types import Message, Prompt, SampleError

_ADVICE = "Expected a folder with a checkpoint, or a name owner/model on the hub: set `model` of the engine."
_SETTINGS = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Endings of the files beside the weights that tokenizers, processors and chat templates are read from."""


class _Row(NamedTuple):
    """A question as the model reads it: its place among all, token ids, seed."""

    place: int
    ids: list[int]
    seed: int


class TextEngine(Engine):
    """Generates with a Hugging Face causal language model, several answers at a time.

    For questions without an image, as those of :class:`LLMMasker`. What is drawn for a question depends on its seed,
    not on what else is in the batch. The model's own distribution is what counts: temperatures, penalties and other
    settings of decoding that a checkpoint ships do not apply, only its end tokens do.

    A prompt goes through the tokenizer's chat template. Where there is none, the texts of its turns are joined by blank
    lines. The model is loaded when it is first asked.

    Args:
        model: folder or hub name of a checkpoint with its tokenizer.
        revision: branch, tag or commit on the hub.
        dtype: weights' dtype; ``auto`` takes the checkpoint's own.
        device: where the model goes; None is a GPU where there is one.
        batch_size: questions per call of the model's ``generate``.
        max_new_tokens: longest answer.
        sample: draw from the model's distribution instead of taking its best guess.
        temperature: of the drawing.
        system: put before prompts that have no system turn of their own.

    Raises:
        ValueError: for a size or temperature that is not positive.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: DType = "auto",
        device: str | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        sample: bool = False,
        temperature: float = 1.0,
        system: str | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, temperature=temperature)
        self.model = model
        self.revision = revision
        self.dtype = dtype
        self.device = device
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.sample = sample
        self.temperature = temperature
        self.system = system

    @property
    def draws(self) -> bool:
        """Whether answers depend on the seed."""
        return self.sample

    @property
    def identity(self) -> Mapping[str, Any]:
        """The checkpoint (a folder by its content, a name by its commit), how prompts are put and answers drawn."""
        drawn = {"temperature": self.temperature} if self.sample else {}
        return {
            "engine": "text",
            **self._checkpoint,
            "dtype": self.dtype,
            "sample": self.sample,
            **drawn,
            "longest": self.max_new_tokens,
            "system": self.system,
        }

    @cached_property
    def _checkpoint(self) -> Mapping[str, str]:
        return checkpoint_identity(self.model, self.revision)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions; those with an image or a form, and too long ones, get an error each."""
        answers: dict[int, Answer] = {}
        rows: dict[int, list[_Row]] = defaultdict(list)
        for place, question in enumerate(questions):
            try:
                ids = self._encode(question)
                # Rows that run into the end of the context are cut by themselves, not those beside them.
                rows[self._longest(len(ids))].append(_Row(place, ids, question.seed))
            except SampleError as error:
                answers[place] = Answer("", False, str(error))
        for longest, group in rows.items():
            written = self._generate(group, longest)
            answers |= {row.place: self._read(row, ids) for row, ids in zip(group, written, strict=True)}
        return [answers[place] for place in range(len(questions))]

    # ---- prompts

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        with saying_what_is_missing(self.model):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.model, revision=self._checkpoint.get("revision"), trust_remote_code=is_remote_code_trusted()
            )
        return found

    @cached_property
    def _special_tokens(self) -> list[str]:
        tokenizer = self._tokenizer
        marked = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        return sorted({*map(str, tokenizer.all_special_tokens), *marked} - {"", str(tokenizer.mask_token)})

    def _encode(self, question: Question) -> list[int]:
        if question.image is not None:
            raise SampleError("TextEngine's models see no images, and the question has one")
        if question.form is not None:
            raise SampleError("TextEngine cannot be held to a form, and the question has one")
        turns = self._turns(question.prompt)
        has_template = self._tokenizer.chat_template is not None
        text = self._render(turns) if has_template else _join(turns)
        # Templates write the start token themselves.
        ids = self._tokenizer(text, add_special_tokens=not has_template, verbose=False)["input_ids"]
        if not ids:
            raise SampleError("the prompt is empty")
        return list(ids)

    def _turns(self, prompt: Prompt) -> list[Message]:
        turns: list[Message] = [{**turn, "content": _text(turn)} for turn in chat_messages(prompt)]
        if not turns or turns[-1]["role"] != "user":
            raise SampleError("the prompt must end with a user turn")
        for token in self._special_tokens:
            # The tokenizer would take it for a real one.
            if any(token in turn["content"] for turn in turns):
                raise SampleError(f"the prompt contains the special token {token!r} as text")
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def _render(self, turns: Sequence[Message]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False
                )
            )
        except TemplateError as error:
            raise SampleError(f"the chat template of {self.model!r} refuses the prompt: {error}") from error

    def _longest(self, read: int) -> int:
        """Tokens that the answer to a prompt of so many tokens may have."""
        context = _context(self._network.config.get_text_config())
        if context is not None and read >= context:
            raise SampleError(f"the prompt has {read} tokens, which leaves no room for an answer in {context}")
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - read)

    # ---- answers

    @cached_property
    def _network(self) -> PreTrainedModel:
        with saying_what_is_missing(self.model):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.model,
                revision=self._checkpoint.get("revision"),
                dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
                output_loading_info=True,
                **weights_options(),
            )
        network: Any = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ValueError(
                f"The checkpoint {self.model!r} lacks {len(missing)} weights, {missing[:3]} among them, which would be "
                "random: it is incomplete, or no causal language model."
            )
        network.generation_config = self._plain_decoding(network.generation_config)
        # A quantized model lies where it was made.
        is_quantized = getattr(network, "is_quantized", False)
        placed: PreTrainedModel = network if is_quantized else network.to(best_device(self.device))
        return placed

    def _plain_decoding(self, shipped: GenerationConfig | None) -> GenerationConfig:
        """Nothing but the end tokens of what a checkpoint ships."""
        ends = getattr(shipped, "eos_token_id", None)
        listed = ends if isinstance(ends, list) else [ends]
        found = [end for end in dict.fromkeys([*listed, self._tokenizer.eos_token_id]) if end is not None]
        if not found:
            raise ValueError(f"The checkpoint {self.model!r} names no end-of-sequence token: no answer would end.")
        return GenerationConfig(eos_token_id=found, pad_token_id=found[0])  # type: ignore[no-untyped-call]

    def _generate(self, rows: Sequence[_Row], longest: int) -> list[list[int]]:
        """Tokens that follow each prompt."""
        network, width = self._network, max(len(row.ids) for row in rows)
        device = network.device
        padded = [[0] * (width - len(row.ids)) + row.ids for row in rows]
        mask = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]
        draw = [SeededDraw([row.seed for row in rows], self.temperature, device)] if self.sample else []
        with torch.inference_mode():
            written: Any = network.generate(  # type: ignore[operator]
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=longest,
                do_sample=False,
                logits_processor=LogitsProcessorList(draw),
            )
        tokens: list[list[int]] = written[:, width:].tolist()
        return tokens

    def _read(self, row: _Row, written: Sequence[int]) -> Answer:
        ends = self._network.generation_config.eos_token_id
        stop = next((place for place, token in enumerate(written) if token in ends), None)
        text = str(self._tokenizer.decode(list(written[:stop]), skip_special_tokens=True)).strip()
        count = len(written) if stop is None else stop + 1
        return Answer(text, stop is not None, None, len(row.ids), count)


def checkpoint_identity(model: str, revision: str | None = None) -> dict[str, str]:
    """What tells a checkpoint with its tokenizer apart, in plain JSON values.

    Args:
        model: folder or hub name.
        revision: branch, tag or commit on the hub; of no meaning for folders.

    Returns:
        Of a folder, hashes of the weights and of the files that tokenizer, processor and chat template are read from,
        wherever the folder lies. Of a name on the hub, the name and the commit that the revision stands for now, as
        ``revision``.

    Raises:
        ValueError: for a checkpoint that is a PEFT adapter, whose base lies elsewhere.
        OSError: when there is no such checkpoint.
    """
    folder = Path(model)
    is_name = model.count("/") == 1 and not model.startswith((".", "~", "/"))
    if not (folder / "config.json").is_file() and (folder.is_dir() or not is_name):
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"Model {model!r}: {found}. {_ADVICE}")
    if folder.is_dir():
        return {"weights": hash_checkpoint(folder, file_sha256), "settings": _hash_settings(folder)}
    try:
        config = hf_hub_download(model, "config.json", revision=revision)
    except OSError as error:
        raise OSError(f"Model {model!r} cannot be loaded: {error}\n{_ADVICE}") from error
    # The hub's cache keeps the files of a commit in a folder of its name.
    commit = Path(config).parent.name
    tell_commit(model, revision, commit)
    return {"model": model, "revision": commit}


def _hash_settings(folder: Path) -> str:
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    read = [file for file in files if file.suffix in _SETTINGS and file.is_file()]
    return hash_texts({str(file.relative_to(folder)): file_sha256(file) for file in read})


def _text(turn: Message) -> str:
    if any(part["type"] != "text" for part in turn["content"]):
        raise SampleError("TextEngine's models see no images, and the prompt shows one")
    return "".join(str(part.get("text", "")) for part in turn["content"])


def _join(turns: Sequence[Message]) -> str:
    if any(turn["role"] == "assistant" for turn in turns):
        raise SampleError("the prompt has an assistant's turn, and the tokenizer no chat template to tell turns apart")
    return "\n\n".join(str(turn["content"]) for turn in turns)


def _context(config: Any) -> int | None:
    """Most tokens of prompt and answer together; None where the positions of a model have no end."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings") or longest
    if kind in ("dynamic", "longrope"):
        # Beyond it, positions follow the longest row of the batch, and answers would depend on those beside them.
        return int(original) if original else None
    if kind == "yarn" and original and longest:
        return max(longest, int(original * rope.get("factor", 1.0)))
    return longest
