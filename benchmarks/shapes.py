"""Models and data of the step benchmark: real classes and processors, random weights, a real model's proportions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from realign_lightning.types import PreferenceSample
from tests.tiny_models import QWEN_SYSTEM, chatml_template, llama_tokenizer, qwen_tokenizer, square

Grid = tuple[int, int]
"""Columns and rows of image tokens."""

PATCH = 14
MERGE = 2
"""Patches of a Qwen tower that make one image token, along each side."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of the preference pairs that it is trained on.

    Args:
        name: as on the command line.
        family: whose classes and processor.
        hidden: width of the language model.
        layers: its layers.
        heads: its attention heads.
        key_heads: its key and value heads.
        intermediate: width of its MLPs.
        vocabulary: rows of the head.
        tower_hidden: width of the vision tower.
        tower_layers: its layers.
        tower_heads: its attention heads.
        tower_intermediate: width of its MLPs.
        full_attention: layers of a Qwen tower that see the whole image.
        grids: (image, retrieved image) of the first pair, of the second and so on, over and over.
        prompt: words of the prompt.
        response: tokens of the first chosen response; the others are a little shorter.
        pairs: in a micro-batch.
        tied: whether head and embeddings share their weights.
        real_shares: parts of TRL's default step that vision tower and head have in the model that this stands for.
    """

    name: str
    family: Literal["llava", "qwen"]
    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int
    tower_hidden: int
    tower_layers: int
    tower_heads: int
    tower_intermediate: int
    grids: tuple[tuple[Grid, Grid], ...]
    full_attention: tuple[int, ...] = ()
    prompt: int = 32
    response: int = 120
    pairs: int = 2
    tied: bool = False
    real_shares: tuple[float, float] | None = None

    def smaller(self) -> Shape:
        """The same model with as little data as makes sense."""
        return replace(self, pairs=1, response=8, prompt=4)


_SQUARE: tuple[tuple[Grid, Grid], ...] = (((24, 24), (24, 24)),)
# Photos of COCO's most frequent sizes, upright and not: 640 x 480 and 640 x 427 pixels.
_PHOTOS: tuple[tuple[Grid, Grid], ...] = (((23, 17), (15, 23)), ((23, 15), (17, 23)))

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        # Layers and widths scaled down, the ratios of widths kept, vocabulary and tower so that their shares are real.
        Shape("llava", "llava", 1024, 2, 8, 8, 2752, 704, 256, 2, 4, 704, _SQUARE, real_shares=(0.05, 0.03)),
        Shape(
            *("qwen", "qwen", 768, 2, 6, 1, 4128, 3200, 256, 4, 4, 688, _PHOTOS),
            full_attention=(3,),
            # Beside these the template takes more tokens than in life, because the tokenizer has few words.
            prompt=20,
            tied=True,
            real_shares=(0.20, 0.10),
        ),
        Shape("tiny", "llava", 64, 2, 4, 2, 128, 320, 32, 2, 2, 64, (((3, 3), (3, 3)),), response=12),
        Shape(
            *("tiny-qwen", "qwen", 64, 2, 4, 2, 128, 416, 32, 2, 2, 64, (((4, 3), (3, 3)), ((2, 5), (4, 4)))),
            full_attention=(1,),
            response=12,
            tied=True,
        ),
        # In real size, for GPUs.
        Shape("llava-7b", "llava", 4096, 32, 32, 32, 11008, 32064, 1024, 24, 16, 4096, _SQUARE),
        Shape(
            *("qwen-3b", "qwen", 2048, 36, 16, 2, 11008, 151936, 1280, 32, 16, 3420, _PHOTOS),
            full_attention=(7, 15, 23, 31),
            tied=True,
        ),
    )
}

# The layouts of LLaVA 1.5 and Qwen-VL, both ending where the answer ends. As they are on the hub, TRL would train LLaVA
# without a start and an end of sequence, and Qwen on the line break behind the end of its turn.
_LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% for part in message.content if part.type == 'image' %}{{ 'USER: <image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{{ part.text + ' ' if message.role == 'user' else 'ASSISTANT: ' + part.text + eos_token }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_TEMPLATE = chatml_template("<|vision_start|><|image_pad|><|vision_end|>", QWEN_SYSTEM).replace(
    "{{ '<|im_end|>\n' }}",
    "{{ '<|im_end|>' if loop.last and message.role == 'assistant' else '<|im_end|>\n' }}",
)


def make_checkpoint(
    shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Save model and processor of a shape.

    Args:
        shape: the sizes.
        folder: where to; one that is there is taken as it is.
        device: where the random weights are drawn.
        dtype: of the weights.
        seed: of the weights.

    Returns:
        ``folder``.
    """
    if folder.exists():
        return folder
    config, processor = (_llava if shape.family == "llava" else _qwen)(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    # A run that was interrupted leaves no half of a checkpoint behind.
    partial.rename(folder)
    return folder


def _text_sizes(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 8192,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _llava(shape: Shape) -> tuple[PreTrainedConfig, ProcessorMixin]:
    side = PATCH * shape.grids[0][0][0]
    tokenizer = llama_tokenizer()
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square(side)),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",  # noqa: S106 - no secret
        chat_template=_LLAVA_TEMPLATE,
    )
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_hidden,
            intermediate_size=shape.tower_intermediate,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
            image_size=side,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(**_text_sizes(shape, tokenizer)),
        image_token_index=image_token,
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=shape.tied,
    )
    return config, processor


def _qwen(shape: Shape) -> tuple[PreTrainedConfig, ProcessorMixin]:
    tokenizer = qwen_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    # Wide enough that every picture keeps its size.
    pixels = {"shortest_edge": 4 * PATCH**2, "longest_edge": 2**16 * PATCH**2}
    patches: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": 2}
    processor = Qwen2_5_VLProcessor(  # type: ignore[no-untyped-call]
        image_processor=Qwen2VLImageProcessor(size=pixels, merge_size=MERGE, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, merge_size=MERGE, **patches),
        chat_template=_QWEN_TEMPLATE,
    )
    half = shape.hidden // shape.heads // 2
    ids: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"))
    }
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": shape.tower_layers,
            "hidden_size": shape.tower_hidden,
            "intermediate_size": shape.tower_intermediate,
            "num_heads": shape.tower_heads,
            "out_hidden_size": shape.hidden,
            "spatial_merge_size": MERGE,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": list(shape.full_attention),
            **patches,
        },
        text_config={
            **_text_sizes(shape, tokenizer),
            # The shares of time, height and width in the real models.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
        },
        tie_word_embeddings=shape.tied,
        **ids,
    )
    return config, processor


def make_samples(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[PreferenceSample]:
    """Random words and noise: ``shape.pairs`` preference samples of the sizes that the shape asks for.

    Args:
        shape: the sizes.
        tokenizer: the model's; every word is one of its tokens.
        seed: of words and noise.
    """
    words, draw, noise = _words(tokenizer), random.Random(seed), np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    def picture(grid: Grid) -> Image.Image:
        scale = PATCH * (MERGE if shape.family == "qwen" else 1)
        return Image.fromarray(noise.integers(0, 256, (grid[1] * scale, grid[0] * scale, 3), dtype=np.uint8))

    samples = []
    for row in range(shape.pairs):
        image, retrieved = shape.grids[row % len(shape.grids)]
        # One token more each: what ends the turn.
        chosen, rejected = shape.response - 1 - row % 4, shape.response - 3 - (row + 2) % 4
        samples.append(
            PreferenceSample(
                key=str(row),
                image=picture(image),
                retrieved=picture(retrieved),
                prompt=text(shape.prompt),
                chosen=text(chosen),
                rejected=text(rejected),
            )
        )
    return samples


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the vocabulary that stay one token in a text."""
    texts: list[str] = [str(tokenizer.decode([token])).strip() for token in sorted(tokenizer.get_vocab().values())]
    words = [text for text in dict.fromkeys(texts) if text.isascii() and text.isalpha()]
    return [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]
