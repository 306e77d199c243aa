"""Any Hugging Face image-text-to-text model, through its own processor and chat template."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationMixin,
    PaliGemmaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from realign_lightning.backbones import base, features, head, packing
from realign_lightning.backbones.adapters import LoRA
from realign_lightning.backbones.base import Backbone, GeneratedRow, ImageFeatures, Part, PromptImages, eval_mode
from realign_lightning.backbones.features import RowFeatures
from realign_lightning.backbones.files import hash_checkpoint, hash_code, hash_processor, hash_texts
from realign_lightning.backbones.head import token_log_probs
from realign_lightning.backbones.packing import PACKABLE, PACKED_SDPA, Packing
from realign_lightning.backbones.revisions import tell_commit
from realign_lightning.backbones.sharded import named_blocks, read_shards, shard, take_over
from realign_lightning.trust import (
    check_attention,
    is_remote_code_trusted,
    refuse_remote_code,
    saying_what_is_missing,
    weights_options,
)
from realign_lightning.types import (
    VIEWS,
    EncodedSample,
    EncodedView,
    Message,
    PreferenceBatch,
    PreferenceSample,
    Prompt,
    SampleError,
    View,
)

DType = Literal["auto", "float32", "bfloat16", "float16"]


class RenderedPrompt(NamedTuple):
    """A prompt as chat messages, and as the chat template writes it up to where the answer begins.

    Args:
        messages: with lists of parts as contents.
        text: what the processor takes.
    """

    messages: Sequence[Message]
    text: str


class ResponseTokens(NamedTuple):
    """A response as it follows a prompt.

    Args:
        ids: of its tokens, the end-of-turn token last.
        ranges: first and last character of each token in ``ending``; None where the tokenizer cannot tell.
        ending: what the chat template writes behind the prompt.
    """

    ids: list[int]
    ranges: Sequence[tuple[int, int]] | None
    ending: str


class AutoBackbone(Backbone):
    """Serves any model that ``AutoModelForImageTextToText`` loads and whose forward takes ``mm_encoder_outputs``.

    Prompts pass through the processor's chat template, images through its image processor. The response is what the
    template appends for the assistant's turn; where the template forgets the end-of-sequence token (LLaVA 1.5 on the
    hub does), it is added, because generation has to stop and log pi(y | x, v) includes stopping.

    Weights are read from safetensors only, and code that lies beside a checkpoint is not run, unless the command line
    says otherwise (:mod:`realign_lightning.trust`).

    Args:
        path: folder or hub name of a checkpoint with its processor.
        revision: branch, tag or commit on the hub; a commit never moves. What another one stood for is logged.
        dtype: weights' dtype; ``auto`` takes the checkpoint's own.
        attn_implementation: ``sdpa``, ``flash_attention_2``, ``eager`` ...; None lets transformers choose.
        quantization: ``nf4`` loads the language model in 4 bit with double quantization (QLoRA, arXiv 2305.14314);
            vision tower, projector and head stay as they are.
        max_length: longest sequence in tokens, image tokens included. A longer response is cut at its end and
            counted; a prompt that leaves no room for a response is an error of that sample. None: no limit.
        chat_template: Jinja chat template that replaces the processor's.
        processor_kwargs: further arguments of the processor, for example ``{"max_pixels": 602112}``.

    Raises:
        ValueError: when the checkpoint has no chat template, is no image-text-to-text decoder, or would need what the
            user did not allow: code of its own, or pickled weights.
        OSError: when the path is neither a folder with a checkpoint nor a name that the hub knows.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: DType = "auto",
        attn_implementation: str | None = None,
        quantization: Literal["nf4"] | None = None,
        max_length: int | None = None,
        chat_template: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"Expected `max_length` to be a positive number of tokens or None, got {max_length}.")
        refuse_remote_code(processor_kwargs, "`processor_kwargs` of the backbone")
        check_attention(attn_implementation)
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.quantization = quantization
        self.max_length = max_length
        self.chat_template = chat_template
        self.processor_kwargs = dict(processor_kwargs or {})

    @contextmanager
    def _naming_the_path(self) -> Iterator[None]:
        """Say that it is the backbone's path that is wrong, and do not ask a hub for what can only be a folder."""
        advice = "Expected a folder with a checkpoint, or a name owner/model on the hub: set `path` of the backbone."
        folder = Path(self.path)
        is_name = self.path.count("/") == 1 and not self.path.startswith((".", "~", "/"))
        if not (folder / "config.json").is_file() and (folder.is_dir() or not is_name):
            found = "a folder without config.json" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"Backbone {self.path!r}: {found}. {advice}")
        try:
            with saying_what_is_missing(self.path):
                yield
        except OSError as error:
            if self.revision is not None:
                advice += f" `revision` {self.revision} belongs to the name it was written for; null is the newest."
            raise OSError(f"Backbone {self.path!r} cannot be loaded: {error}\n{advice}") from error
        # Those of transformers do not say which checkpoint they mean.
        except ValueError as error:
            if self.path in str(error):
                raise
            raise ValueError(f"Backbone {self.path!r} cannot be loaded: {error}\n{advice}") from error

    # ---- processor

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, with this backbone's chat template if one was given."""
        with self._naming_the_path():
            processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                self.path, revision=self.revision, trust_remote_code=is_remote_code_trusted(), **self.processor_kwargs
            )
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"Expected {self.path!r} to hold a processor for images and text, got {type(processor).__name__}. "
                "rDPO needs a vision-language model."
            )
        self._check_template(processor)
        return processor

    def _check_template(self, processor: Any) -> None:
        if isinstance(processor, PaliGemmaProcessor):
            raise ValueError(
                f"{self.path!r} is a PaliGemma, which has no chat and attends to its prompt in both directions: set "
                "class_path to realign_lightning.backbones.PaliGemmaBackbone."
            )
        if self.chat_template is not None:
            processor.chat_template = self.chat_template
        if processor.chat_template is None:
            raise ValueError(f"The processor of {self.path!r} has no chat template: pass `chat_template`.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, or its end-of-sequence token where it has none."""
        tokenizer = self.tokenizer
        return self._token_id(tokenizer.eos_token if tokenizer.pad_token is None else tokenizer.pad_token)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a response: what the chat template closes a turn with, and end-of-sequence."""
        (ending,) = self._render_responses(self._render_prompt("a"), ["a"])
        last = self._ids([ending])[0][0][-1]
        return tuple(dict.fromkeys((last, self._token_id(self.tokenizer.eos_token))))

    @cached_property
    def _special_tokens(self) -> list[str]:
        """What a text must not spell: the tokenizer's special tokens, and what the processor takes for a picture."""
        marked = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        named = [value for name, value in vars(self.processor).items() if name.endswith("_token")]
        return list(dict.fromkeys(map(str, filter(None, [*self.tokenizer.all_special_tokens, *marked, *named]))))

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """What the tokenizer calls special, and its added tokens that are marked so; image tokens."""
        marked = (number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return tuple(sorted({*self.tokenizer.all_special_ids, *marked, self.image_token_id, *self.end_token_ids}))

    @cached_property
    def image_token_id(self) -> int:
        """The token that stands for one image feature."""
        token = getattr(self._config(), "image_token_id", None)
        if token is None:
            raise ValueError(f"{self.path!r} has no image token in its configuration: this family cannot serve.")
        return int(token)

    def _token_id(self, token: object) -> int:
        return cast("int", self.tokenizer.convert_tokens_to_ids(str(token)))

    # ---- encoding

    def encode_sample(self, sample: PreferenceSample) -> EncodedSample:
        """Encode the three views; tokenises each distinct prompt and preprocesses each image once.

        Raises:
            SampleError: when a text contains a special token, or the prompt leaves no room for a response.
        """
        prompt = self._render_prompt(sample.prompt, 1 + len(sample.context))
        chosen, rejected = self._response_tokens(prompt, [sample.chosen, sample.rejected])
        masked = self._masked_tokens(sample, chosen)
        tokens, image = self._encode_prompt(prompt, [*sample.context, sample.image])
        visual_tokens, retrieved = self._encode_prompt(prompt, [*sample.context, sample.retrieved])
        # The visual view has to score the very tokens that the chosen view scores, however large its image is.
        room = min(self._room(tokens, "image"), self._room(visual_tokens, "retrieved image"))
        return EncodedSample(
            key=sample.key,
            chosen=self._with_response(tokens, chosen.ids, room),
            rejected=self._with_response(tokens, rejected.ids, self._room(tokens, "image")),
            visual=self._with_response(visual_tokens, chosen.ids, room),
            image=image,
            retrieved=retrieved,
            masked=None if masked is None else masked[:room],
        )

    def _masked_tokens(self, sample: PreferenceSample, row: ResponseTokens) -> Tensor | None:
        """Which tokens of the chosen response stand for masked words; None when unknown."""
        try:
            spans = sample.masked_spans()
        except ValueError as error:
            raise SampleError(str(error)) from error
        if not spans or row.ranges is None:
            return None
        # Spans count the characters of the response as it is stored.
        shift = row.ending.index(sample.chosen.strip()) - (len(sample.chosen) - len(sample.chosen.lstrip()))
        return torch.tensor(
            [any(start < span.end + shift and end > span.start + shift for span in spans) for start, end in row.ranges]
        )

    def _messages(self, prompt: Prompt, num_images: int) -> Sequence[Message]:
        """The prompt as chat messages; where none shows an image, the first user turn shows all."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = [dict(message) for message in prompt]
        if not messages or messages[-1].get("role") != "user":
            raise SampleError("the prompt must end with a user turn")
        for message in messages:
            if isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        parts = [part for message in messages for part in message["content"]]
        for part in parts:
            self._check_plain(part.get("text", ""), "prompt")
        shown = sum(part.get("type") == "image" for part in parts)
        if not shown:
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [*[{"type": "image"}] * num_images, *first["content"]]
        elif shown != num_images:
            raise SampleError(f"the prompt shows {shown} images, but {num_images} are given")
        return messages

    def _check_plain(self, text: str, name: str) -> None:
        """Refuse special tokens written as text: the tokenizer would take them for real ones."""
        for token in (self.processor.image_token, *self._special_tokens):
            if str(token) in text and token != self.tokenizer.mask_token:
                kind = "image token" if token == self.processor.image_token else "special token"
                raise SampleError(f"the {name} contains the {kind} {token!r} as text")

    def _render_prompt(self, prompt: Prompt, num_images: int = 1) -> RenderedPrompt:
        messages = self._messages(prompt, num_images)
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return RenderedPrompt(messages, text)

    def _render_responses(self, prompt: RenderedPrompt, responses: Sequence[str]) -> list[str]:
        """What the chat template appends for each answer, with its end-of-turn token."""
        answers = [{"role": "assistant", "content": [{"type": "text", "text": response}]} for response in responses]
        chats = [[*prompt.messages, answer] for answer in answers]
        rendered: list[str] = self.processor.apply_chat_template(chats, tokenize=False)
        return [self._ending(prompt, *pair) for pair in zip(responses, rendered, strict=True)]

    def _ending(self, prompt: RenderedPrompt, response: str, whole: str) -> str:
        """What follows the generation prompt: the answer, and the token that ends a turn or a sequence."""
        answer = response.strip()
        asked = _without_spaces(prompt.text)
        starts = _places_of(answer, whole)
        start = next((start for start in starts if _without_spaces(whole[:start]) == asked), None)
        if start is None:
            raise ValueError(
                f"The chat template of {self.path!r} does not append the assistant's turn to the generation prompt, so "
                f"that the response cannot be told from the prompt: {prompt.text!r} against {whole!r}. "
                "Pass `chat_template`."
            )
        before = whole[:start]
        # Some templates put other white space before an answer than into the prompt that asks for it.
        lead = before[len(prompt.text) :] if before.startswith(prompt.text) else ""
        end = whole[start + len(answer) :].strip()
        if not any(end.endswith(token) for token in self._special_tokens):
            end = str(self.tokenizer.eos_token)
        return f"{lead}{answer}{end}"

    def _ids(self, texts: Sequence[str]) -> list[tuple[list[int], list[Any] | None]]:
        """Token ids of rendered chats, with the characters that they stand for where the tokenizer can tell.

        Templates that write the start token themselves get no second one.
        """
        return self._tokenize(texts, self._takes_start_token(texts[0]))

    def _tokenize(self, texts: Sequence[str], special: bool) -> list[tuple[list[int], list[Any] | None]]:
        ranges = {"return_offsets_mapping": True} if self.tokenizer.is_fast else {}
        encoded = self.tokenizer(list(texts), add_special_tokens=special, **ranges)
        offsets = encoded["offset_mapping"] if ranges else [None] * len(texts)
        return [(list(ids), places) for ids, places in zip(encoded["input_ids"], offsets, strict=True)]

    def _takes_start_token(self, text: str) -> bool:
        start = self.tokenizer.bos_token
        return start is None or not text.startswith(str(start))

    def _encode_prompt(
        self, prompt: RenderedPrompt, images: Sequence[Image.Image]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token-level tensors (L,) of the prompt with its images expanded, and the image inputs."""
        # One list per text: families with several images per text ask for it. Some take nothing but RGB.
        shown = [[image if image.mode == "RGB" else image.convert("RGB") for image in images]]
        encoded = self.processor(
            text=[prompt.text],
            **({"images": shown} if images else {}),
            add_special_tokens=self._takes_start_token(prompt.text),
            return_tensors="pt",
        )
        length = encoded["input_ids"].shape[1]
        tokens, image_inputs = {}, {}
        for name, value in encoded.items():
            if name in _TOKEN_INPUTS:
                if value.shape != (1, length):
                    raise ValueError(
                        f"Expected {name} of shape (1, {length}) from the processor, got {tuple(value.shape)}."
                    )
                tokens[name] = value[0]
            else:
                image_inputs[name] = value
        tokens.pop("attention_mask", None)
        image_inputs.pop("labels", None)
        image_inputs[_TOKENS_PER_ROW] = (tokens["input_ids"] == self.image_token_id).sum()[None]
        image_inputs[_IMAGES_PER_ROW] = torch.tensor([len(images)])
        return tokens, image_inputs

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """What the processor says itself, or else takes for blank pictures of about these sizes."""
        # An aid for serving that transformers may change; most families have it, SmolVLM and Janus do not.
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is not None:
            return list(count(image_sizes=[(height, width) for width, height in sizes])["num_image_tokens"])
        prompt = self._render_prompt("a")
        rounded = [(_round_side(width), _round_side(height)) for width, height in sizes]
        measured = {
            size: len(self._encode_prompt(prompt, [Image.new("RGB", size)])[0]["input_ids"])
            for size in tqdm(dict.fromkeys(rounded), desc="measuring image sizes", unit="size", delay=2, leave=False)
        }
        return [measured[size] for size in rounded]

    def response_tokenizer(self, prompt: Prompt) -> Callable[[Sequence[str]], list[list[int]]]:
        """A function from responses to their token ids as they follow ``prompt``, without the end-of-turn token.

        It raises SampleError for a response that contains a special token as text.
        """
        rendered = self._render_prompt(prompt)

        def tokenize(responses: Sequence[str]) -> list[list[int]]:
            with_end = [row.ids for row in self._response_tokens(rendered, responses)]
            return [ids[:-1] if ids[-1] in self.end_token_ids else ids for ids in with_end]

        return tokenize

    def _response_tokens(self, prompt: RenderedPrompt, responses: Sequence[str]) -> list[ResponseTokens]:
        """Response tokens, the end-of-turn token last, such that prompt tokens never depend on the response."""
        for response in responses:
            self._check_plain(response, "response")
        endings = self._render_responses(prompt, responses)
        (prompt_ids, _), *whole = self._ids([prompt.text, *(prompt.text + ending for ending in endings)])
        before = len(prompt.text)
        rows = []
        for ending, (ids, places) in zip(endings, whole, strict=True):
            if ids[: len(prompt_ids)] == prompt_ids:
                own = None if places is None else places[len(prompt_ids) :]
                ranges = None if own is None else [(start - before, end - before) for start, end in own]
                rows.append(ResponseTokens(ids[len(prompt_ids) :], ranges, ending))
            else:
                # A merge across the border would change the prompt that generation sees: tokenise the answer alone.
                rows.append(ResponseTokens(*self._tokenize([ending], special=False)[0], ending))
        return rows

    def _room(self, prompt_tokens: Mapping[str, Tensor], image: str) -> int:
        """How many response tokens fit behind a prompt; nothing of the prompt, image tokens least of all, is cut."""
        if self.max_length is None:
            return sys.maxsize
        ids = prompt_tokens["input_ids"]
        if self.max_length <= len(ids):
            raise SampleError(
                f"the prompt with its {image} takes {len(ids)} tokens, {int((ids == self.image_token_id).sum())} of "
                f"them image tokens, and leaves no response token within max_length={self.max_length}; raise "
                "max_length, or let the processor make fewer image tokens (processor_kwargs, for example max_pixels)"
            )
        return self.max_length - len(ids)

    def _with_response(self, prompt_tokens: Mapping[str, Tensor], ids: Sequence[int], room: int) -> EncodedView:
        before = len(prompt_tokens["input_ids"])
        room = min(len(ids), room)
        tokens = {
            name: torch.cat([value, torch.zeros(room, dtype=value.dtype)]) for name, value in prompt_tokens.items()
        }
        tokens["input_ids"][before:] = torch.tensor(ids[:room])
        response_mask = torch.arange(before + room) >= before
        return EncodedView(tokens, response_mask, truncated=len(ids) - room)

    def collate(self, samples: Sequence[EncodedSample]) -> PreferenceBatch:
        """Pad every view on the right to its longest row, and stack the images of all samples."""
        if not samples:
            raise ValueError("Expected at least one sample to collate, got none.")
        views = {name: self._collate_view([getattr(sample, name) for sample in samples]) for name in VIEWS}
        return PreferenceBatch(
            **views,
            images=self._stack_images([sample.image for sample in samples]),
            retrieved=self._stack_images([sample.retrieved for sample in samples]),
            weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
            keys=tuple(sample.key for sample in samples),
            truncated=tuple(sample.key for sample in samples if sample.weight and _is_cut(sample)),
            skipped=tuple(skipped for sample in samples for skipped in sample.skipped),
            fingerprints=tuple(sample.fingerprint for sample in samples),
            masked=tuple(sample.masked for sample in samples),
        )

    def _collate_view(self, rows: Sequence[EncodedView]) -> View:
        length = max(len(row.response_mask) for row in rows)
        tokens = {name: self._pad([row.tokens[name] for row in rows], length, name) for name in rows[0].tokens}
        lengths = torch.tensor([len(row.response_mask) for row in rows])
        tokens["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        response = torch.stack([F.pad(row.response_mask, (0, length - len(row.response_mask))) for row in rows])
        return View(tokens, response)

    def _pad(self, rows: Sequence[Tensor], length: int, name: str, left: bool = False) -> Tensor:
        fill = self.pad_token_id if name == "input_ids" else 0
        return torch.stack(
            [F.pad(row, (length - len(row), 0) if left else (0, length - len(row)), value=fill) for row in rows]
        )

    @staticmethod
    def _stack_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join image inputs along their first dimension; other dimensions are padded with zeros to the largest."""
        return {name: _pad_and_cat([inputs[name] for inputs in images]) for name in images[0]}

    def encode_prompts(self, prompts: Sequence[Prompt], images: Sequence[PromptImages]) -> dict[str, Tensor]:
        """Inputs for generation, one row per (prompt, image or images), padded on the left.

        Rows that show the same image objects share their image inputs, so that it is encoded once.

        Raises:
            ValueError: when there are not as many images as prompts, or none at all; or rows with images beside rows
                without.
            SampleError: for prompts without an image in families that need one.
        """
        if len(prompts) != len(images) or not prompts:
            raise ValueError(f"Expected one image per prompt, got {len(prompts)} prompts and {len(images)} images.")
        shown = [[item] if isinstance(item, Image.Image) else list(item) for item in images]
        if len({bool(row) for row in shown}) > 1:
            raise ValueError("Expected an image for every prompt or for none: ask those without an image apart.")
        encoded = [
            self._encode_prompt(self._render_prompt(prompt, len(row)), row)
            for prompt, row in zip(prompts, shown, strict=True)
        ]
        rows = [tokens for tokens, _ in encoded]
        length = max(len(row["input_ids"]) for row in rows)
        inputs = {name: self._pad([row[name] for row in rows], length, name, left=True) for name in rows[0]}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        inputs["attention_mask"] = (torch.arange(length) >= length - lengths[:, None]).long()
        if not shown[0]:
            return inputs
        places = {tuple(map(id, row)): place for place, row in reversed(list(enumerate(shown)))}
        distinct = sorted(places.values())
        stacked = self._stack_images([encoded[place][1] for place in distinct])
        if len(distinct) == len(shown):
            return {**inputs, **{name: value for name, value in stacked.items() if name not in _COUNTS}}
        owners = [distinct.index(places[tuple(map(id, row))]) for row in shown]
        return {**inputs, **stacked, _IMAGES_OF_ROWS: torch.tensor(owners)}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated token ids, special tokens left out, outer white space stripped."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def save_processor(self, folder: str | Path) -> None:
        """Write tokenizer, image processor and the chat template in use."""
        self.processor.save_pretrained(str(folder))

    def fingerprint(self, hash_file: Callable[[Path], str]) -> dict[str, str]:
        """The checkpoint's files, and everything given to this backbone but ``attn_implementation``.

        Where the checkpoint lies does not count. A subclass whose own arguments change weights or inputs adds them.

        Raises:
            ValueError: for a checkpoint that is a PEFT adapter, whose base lies elsewhere.
            OSError: when the checkpoint is not on this machine.
        """
        fresh = copy.copy(self)
        # Tokenizers remember how they were last called, and save it.
        fresh.__dict__.pop("processor", None)
        dtype = self._config().dtype if self.dtype == "auto" else self.dtype
        return {
            "backbone": f"{type(self).__module__}.{type(self).__qualname__}",
            "weights": hash_checkpoint(self._folder(), hash_file),
            "revision": str(self.revision),
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": str(self.quantization),
            "processor": hash_processor(fresh.processor),
            "chat_template": str(fresh.processor.chat_template),
            # What a template writes may change by itself, as dates do.
            "prompt": hash_texts({"a": fresh._render_prompt("a").text}),
            "processor_kwargs": json.dumps(self.processor_kwargs, sort_keys=True),
            "max_length": str(self.max_length),
            "code": hash_code(*_SCORING_CODE, sys.modules[__name__], *_own_modules(type(self))),
            **{package: version(package) for package in ("transformers", "torchvision", "pillow")},
            **({} if self.quantization is None else {"bitsandbytes": version("bitsandbytes")}),
        }

    def _folder(self) -> Path:
        """Where the checkpoint's files lie on this machine."""
        folder = Path(self.path)
        if folder.is_dir():
            return folder
        with self._naming_the_path():
            return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))

    # ---- model

    def load_model(self) -> PreTrainedModel:
        """Load the pretrained weights, in eval mode.

        Raises:
            ValueError: when the checkpoint is no image-text-to-text decoder that takes ``mm_encoder_outputs``.
        """
        if self.quantization is None:
            return self._from_pretrained()
        model = self._from_pretrained(quantization_config=self._nf4())
        for module in model.modules():
            # Where a CPU has bfloat16 instructions, bitsandbytes repacks weights when a layer answers in eval mode, as
            # the reference does, and the policy that shares them gets no gradient through them any more.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return model

    def empty_model(self) -> PreTrainedModel:
        """The model on the meta device, from its configuration alone; 4-bit layers are plain ones here.

        Raises:
            ValueError: as :meth:`load_model`.
        """
        config, dtype = self._config(), self._torch_dtype()
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=is_remote_code_trusted(),
            )
        return self._checked(model)

    def load_sharded(
        self,
        mesh: DeviceMesh,
        adapter: LoRA | None = None,
        trained_modules: Sequence[str] = (),
        compute_dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Load the weights sharded over a mesh (FSDP2), each rank reading its own rows from the safetensors files.

        Raises:
            ValueError: for 4-bit weights, which FSDP cannot shard, and as :meth:`load_model`.
        """
        if self.quantization is not None:
            raise ValueError(
                "FSDP cannot shard 4-bit weights: set `quantization: null`, or keep 4 bit and use a strategy that "
                "holds the whole model on every device (trainer.strategy: ddp)."
            )
        if adapter is not None and not adapter.starts_blank:
            raise ValueError(
                f"FSDP cannot shard LoRA with {adapter.options}, which starts from whole base weights that no "
                "rank holds: leave these options out, or use trainer.strategy: ddp."
            )
        source: nn.Module = read_shards(self._from_pretrained, self.empty_model(), mesh)
        target: nn.Module = self.empty_model()
        if adapter is not None:
            with torch.random.fork_rng(devices=[]):
                target = adapter.apply(self, target, trained_modules)
            # Real values of the adapter come from here, drawn as they would be without FSDP.
            source = adapter.apply(self, source)
        shard(self._inner(target), mesh, compute_dtype)
        take_over(self._inner(target), self._inner(source))
        target.train(False)
        return target

    def _config(self) -> PretrainedConfig:
        """The checkpoint's configuration, if this class can serve it."""
        with self._naming_the_path():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=is_remote_code_trusted()
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{self.path!r} is an encoder-decoder ({config.model_type}); only decoders are supported.")
        is_remote = is_remote_code_trusted() and _AUTO_CLASS in (getattr(config, "auto_map", None) or {})
        if type(config) not in AutoModelForImageTextToText._model_mapping and not is_remote:
            raise ValueError(
                f"Expected {self.path!r} to be an image-text-to-text model, got {config.model_type!r}. "
                "rDPO scores images: choose a vision-language checkpoint."
            )
        return config

    def _from_pretrained(self, **kwargs: Any) -> PreTrainedModel:
        tell_commit(self.path, self.revision, getattr(self._config(), "_commit_hash", None))
        kwargs = {"revision": self.revision, "dtype": self._torch_dtype(), **weights_options(), **kwargs}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        with self._naming_the_path():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(self.path, output_loading_info=True, **kwargs)
        model: PreTrainedModel = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ValueError(
                f"The checkpoint {self.path!r} lacks {len(missing)} weights, {missing[:3]} among them, which would be "
                "random: it is incomplete, or of another class than its config.json says."
            )
        return self._checked(model)

    @staticmethod
    def _checked(model: PreTrainedModel) -> PreTrainedModel:
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"{type(model).__name__} is not supported: it does not take `mm_encoder_outputs`, so that "
                "responses cannot share their image."
            )
        model.train(False)
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        if decoder.config._attn_implementation == "sdpa" and decoder._supports_attention_backend:
            decoder.config._attn_implementation = PACKED_SDPA
        return model

    def _torch_dtype(self) -> torch.dtype | str:
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)

    def _nf4(self) -> BitsAndBytesConfig:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                "quantization='nf4' needs the package bitsandbytes: pip install bitsandbytes, or set "
                "`quantization: null`."
            )
        compute = torch.bfloat16 if self.dtype == "auto" else self._torch_dtype()
        empty = self.empty_model()
        quantised = re.compile(self.linear_pattern(empty))
        linear = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear)]
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # Full names: patterns match from a name's start, and a list replaces the default that spares the head.
            llm_int8_skip_modules=[name for name in linear if not quantised.fullmatch(name)],
        )

    @staticmethod
    def _inner(model: nn.Module) -> Any:
        """The transformers model below PEFT's wrapper."""
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

    def encode_images(self, model: nn.Module, images: Mapping[str, Tensor]) -> ImageFeatures:
        """The model's own ``get_image_features`` on every image of the batch, in one call."""
        counts = [images[name].tolist() for name in _COUNTS]
        return RowFeatures.cut(self._vision(model, images), images, *counts)

    def _vision(self, model: nn.Module, images: Mapping[str, Tensor]) -> Any:
        inner = self._inner(model)
        accepted = inspect.signature(inner.base_model.get_image_features).parameters
        # Through the outermost module where it can: under FSDP2 only that gathers weights.
        encode = getattr(inner, "get_image_features", inner.base_model.get_image_features)
        return encode(**{name: value for name, value in images.items() if name in accepted}, return_dict=True)

    def join_images(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Image inputs of two batches as one batch, those of ``first`` in front."""
        return self._stack_images([first, second])

    def select_images(self, features: ImageFeatures, rows: Sequence[int]) -> ImageFeatures:
        """Features of the rows ``rows`` of the batch that they were encoded from, in that order."""
        return features.select(rows)

    def token_log_probs(
        self,
        model: nn.Module,
        tokens: Mapping[str, Tensor],
        features: ImageFeatures,
        positions: Tensor,
        labels: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """Log-probs of tokens, the model's own head on their positions only, a chunk at a time."""
        inner = self._inner(model)
        inputs = {**tokens, **features.forward_inputs()}
        if packing is not None:
            inputs |= packing.attention_inputs(_attention_of(inner), positions.device)

        def run(**inputs: Any) -> Tensor:
            return token_log_probs(inner, inner.base_model(**inputs, use_cache=False), positions, labels)

        # Under FSDP2 only methods that it knows gather the weights of the head.
        return cast("Tensor", inner.run_gathered(run, **inputs) if hasattr(inner, "run_gathered") else run(**inputs))

    def check_length(self, model: nn.Module, longest: int) -> None:
        """Refuse sequences beyond the original context of a model whose position frequencies follow the longest one.

        Raises:
            ValueError: for ``rope_type`` dynamic or longrope, where a long row changes all others of its batch.
        """
        config = self._inner(model).get_decoder().config
        rope = getattr(config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if rope.get("rope_type") in ("dynamic", "longrope") and original is not None and longest > original:
            raise ValueError(
                f"Sequences of up to {longest} tokens are longer than the {original} that {type(model).__name__} was "
                f"made for, and its positions ({rope['rope_type']}) follow the longest sequence of a batch, so that "
                f"log-probs would depend on the batch: set the backbone's max_length to {original}."
            )

    def unshared_reason(self, model: nn.Module, longest: int) -> str | None:
        """Prompts that see their whole self, windows shorter than the sequences and other attention forbid sharing."""
        inner = self._inner(model)
        config = inner.get_decoder().config
        kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
        window = getattr(config, "sliding_window", None)
        kinds_of_model = [kind for kind in type(inner).__mro__ if kind is not GenerationMixin]
        makes_own_masks = any("create_masks_for_generate" in vars(kind) for kind in kinds_of_model)
        if makes_own_masks or "token_type_ids" in inspect.signature(inner.forward).parameters:
            return f"{type(inner).__name__} lets prompt or image tokens see those behind them"
        if kinds:
            return f"{type(inner).__name__} has layers of {', '.join(kinds)}"
        if _attention_of(inner) not in PACKABLE:
            return (
                f"attention runs through {_attention_of(inner)!r}: set the backbone's attn_implementation to null, "
                "sdpa or flex_attention"
            )
        if window is not None and longest > window:
            return f"{type(inner).__name__} looks back {window} tokens only, and sequences have up to {longest}"
        return None

    def position_ids(self, model: nn.Module, tokens: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> Tensor:
        """The model's own ``get_rope_index`` where positions have several axes (Qwen), else the tokens counted."""
        inner = self._inner(model)
        if not hasattr(inner.base_model, "get_rope_index"):
            return super().position_ids(model, tokens, images)
        accepted = inspect.signature(inner.base_model.get_rope_index).parameters
        inputs = {name: value for name, value in {**images, **tokens}.items() if name in accepted}
        positions: Tensor = inner.base_model.get_rope_index(**inputs)[0]
        return positions

    def generate_tokens(self, model: nn.Module, inputs: Mapping[str, Tensor], **kwargs: Any) -> list[GeneratedRow]:
        """Tokens that answer the rows of :meth:`encode_prompts`, cut behind the end-of-turn token.

        Greedy unless ``do_sample=True``; sampling settings that the checkpoint ships do not apply to greedy decoding.
        """
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if not kwargs.get("do_sample", False):
            kwargs = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **kwargs}
        settings = {"pad_token_id": self.pad_token_id, "eos_token_id": list(self.end_token_ids), **kwargs}
        tokens = {name: inputs[name] for name in _TOKEN_INPUTS if name in inputs}
        # Not inference_mode: weights that FSDP gathers in it could not be trained on afterwards.
        # Compiled blocks run as they are: decoding would compile them anew for caches of every kind and length.
        with torch.compiler.set_stance("force_eager"), eval_mode(model), torch.no_grad():
            rows = model.generate(**tokens, **self._shown(model, inputs), **settings)  # type: ignore[operator]
        return [self._cut(row) for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]

    def _shown(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model's forward takes for the images of :meth:`encode_prompts`, each encoded once."""
        if inputs.keys() <= {*_TOKEN_INPUTS}:
            if hasattr(self._inner(model), "run_gathered"):
                self._keep_up(model)
            return {}
        if _IMAGES_OF_ROWS in inputs:
            features = self.encode_images(model, inputs)
            return cast("RowFeatures", self.select_images(features, inputs[_IMAGES_OF_ROWS].tolist())).forward_inputs()
        num_tokens = int((inputs["input_ids"] == self.image_token_id).sum())
        return RowFeatures.whole(self._vision(model, inputs), inputs, num_tokens).forward_inputs()

    def _keep_up(self, model: nn.Module) -> None:
        """Encode a blank image: ranks that hold shards of one model gather the weights of its tower together."""
        device = next(model.parameters()).device
        blank = self._encode_prompt(self._render_prompt("?"), [Image.new("RGB", (64, 64))])[1]
        self._vision(model, {name: value.to(device) for name, value in blank.items()})

    def _cut(self, tokens: Sequence[int]) -> GeneratedRow:
        end = next((place for place, token in enumerate(tokens) if token in self.end_token_ids), None)
        return GeneratedRow(list(tokens), False) if end is None else GeneratedRow(list(tokens[: end + 1]), True)

    def embed_images(self, model: nn.Module, images: Sequence[Image.Image]) -> Tensor:
        """Mean over the vision tower's last hidden states, L2-normalised, (N, D) float32 on the CPU."""
        device = next(model.parameters()).device
        inputs = [self.processor.image_processor(images=[image], return_tensors="pt") for image in images]
        joined = {name: value.to(device) for name, value in self._stack_images(inputs).items()}
        # Not inference_mode: weights that FSDP gathers in it could not be used outside of it.
        with torch.no_grad():
            if len(inputs) == 1:
                return F.normalize(self._mean_feature(model, joined)[None], dim=-1).cpu()
            hidden = self._vision(model, joined).last_hidden_state
            if hidden.ndim == 3 and len(hidden) == len(images):
                means = hidden.float().mean(dim=1)
            else:
                # Several tiles or a varying number of patches per image: one image at a time tells them apart.
                means = torch.stack([self._mean_feature(model, one) for one in inputs])
        return F.normalize(means, dim=-1).cpu()

    def _mean_feature(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        hidden = self._vision(model, {name: value.to(device) for name, value in inputs.items()}).last_hidden_state
        return cast("Tensor", hidden.float().reshape(-1, hidden.shape[-1]).mean(dim=0))

    # ---- parts

    def parts(self, model: nn.Module) -> dict[str, Part | None]:
        """The part of every parameter, told from transformers' accessors and the names of its modules."""
        inner = self._inner(model)
        decoder = {id(parameter) for parameter in inner.get_decoder().parameters()}
        head = {id(parameter) for parameter in inner.get_output_embeddings().parameters()} - decoder

        def part(name: str, parameter: nn.Parameter) -> Part | None:
            if id(parameter) in decoder:
                return "language_model"
            if id(parameter) in head:
                return "head"
            pieces = set(name.split("."))
            if pieces & _UNUSED:
                return None
            return "projector" if pieces & _PROJECTORS else "vision_tower"

        return {name: part(name, value) for name, value in model.named_parameters(remove_duplicate=False)}

    def projector_modules(self, model: nn.Module) -> list[str]:
        """The projector's modules, the items of module lists one by one."""
        found = []
        for name, module in self._inner(model).named_modules():
            *_, last = name.split(".")
            if last in _PROJECTORS:
                items = isinstance(module, nn.ModuleList)
                found += [f"{name}.{index}" for index in range(len(module))] if items else [name]
        return found

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the language model, as transformers marks them."""
        return [block for _, block in named_blocks(self._inner(model).get_decoder())]

    def linear_pattern(self, model: nn.Module, parts: Sequence[Part] = ("language_model",)) -> str:
        """Pattern of the linear layers of some parts, 4-bit ones included."""
        inner = self._inner(model)
        owner = self.parts(inner)
        # By identity: a head that shares the embeddings' weights counts to the language model.
        head = inner.get_output_embeddings()
        blocks = {name: _any_index(name) for name, _ in named_blocks(inner)}
        names = [
            _pattern(name, blocks)
            for name, module in inner.named_modules()
            if isinstance(module, nn.Linear) and module is not head and owner[f"{name}.weight"] in parts
        ]
        if not names:
            raise ValueError(f"Found no linear layer in {list(parts)} of {type(inner).__name__}.")
        return "|".join(dict.fromkeys(names))


_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Names of processor outputs with one value per token; everything else describes images."""

_TOKENS_PER_ROW, _IMAGES_PER_ROW = _COUNTS = "num_image_tokens", "num_images"
"""Counts that travel with the image inputs, one per row, so that features can be cut into rows."""

_IMAGES_OF_ROWS = "images_of_rows"
"""Where rows of a prompt batch share images: for each row, which of the image inputs are its own."""

_SCORING_CODE = (base, features, head, packing)
"""What scores depend on, beside this file and those of families."""

_AUTO_CLASS = "AutoModelForImageTextToText"
"""What a checkpoint with a model class of its own calls it in ``auto_map``."""

_PROJECTORS = {"multi_modal_projector", "connector", "aligner", "merger", "deepstack_merger_list", "image_newline"}
"""What transformers calls the parts between vision tower and language model."""

_UNUSED = {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head"}
"""Parts of Janus that make images."""


def _attention_of(model: Any) -> str:
    return str(model.get_decoder().config._attn_implementation)


def _any_index(block: str) -> str:
    """Pattern of a block and its siblings: any number in the place of the last one."""
    owner, _, index = block.rpartition(".")
    return re.escape(f"{owner}.") + (r"\d+" if index.isdigit() else re.escape(index))


def _pattern(name: str, blocks: Mapping[str, str]) -> str:
    """Pattern of a module that stands for the same module in every sibling of its block; otherwise its very name."""
    block = max((block for block in blocks if name.startswith(f"{block}.")), key=len, default=None)
    return re.escape(name) if block is None else blocks[block] + re.escape(name[len(block) :])


def _round_side(pixels: int) -> int:
    """The next power of 1.1, so that a collection of photos has a few dozen sizes."""
    return round(1.1 ** round(math.log(pixels, 1.1)))


def _places_of(part: str, whole: str) -> Iterator[int]:
    """Where ``part`` starts in ``whole``, first to last."""
    start = whole.find(part)
    while start >= 0:
        yield start
        start = whole.find(part, start + 1)


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _is_cut(sample: EncodedSample) -> bool:
    return any(getattr(sample, view).truncated for view in VIEWS)


def _pad_and_cat(tensors: Sequence[Tensor]) -> Tensor:
    sizes = [max(tensor.shape[dim] for tensor in tensors) for dim in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [pad for amount in reversed(missing) for pad in (0, amount)]))
    return torch.cat(padded)


def _own_modules(kind: type) -> list[ModuleType]:
    """Modules of this package that a family's class and its bases are written in."""
    names = {base.__module__ for base in kind.__mro__ if base.__module__.startswith(f"{_PACKAGE}.")}
    return [sys.modules[name] for name in sorted(names)]


_PACKAGE = __name__.partition(".")[0]
