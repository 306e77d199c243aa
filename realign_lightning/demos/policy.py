"""The policy of the digit scenes: a LLaVA of 1.3 million parameters with a processor of the ordinary kind.

Both are made from nothing here, taught by :mod:`realign_lightning.demos.teach` and shipped, taught, in
:data:`POLICY_FOLDER`. They are the classes that large checkpoints use, so that
``AutoModelForImageTextToText.from_pretrained(POLICY_FOLDER)`` and ``AutoProcessor.from_pretrained(POLICY_FOLDER)``
load them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from realign_lightning.demos.scenes import BRIGHTEST, DARKEST, IMAGE_SIZE, VOCABULARY

POLICY_FOLDER = Path(__file__).parent / "policy"
"""Where the shipped checkpoint lies."""

PATCH_SIZE = 8
"""Side of the vision tower's square patches in pixels; a scene has 16 of them."""

MAX_LENGTH = 256
"""Longest sequence in tokens, image tokens included."""

PAD, BEGIN, END, IMAGE, UNKNOWN = "<pad>", "<s>", "</s>", "<image>", "<unk>"
"""Special tokens, their ids are 0 to 4."""

_ROLES = ("USER", "ASSISTANT")
_SPECIAL = (PAD, BEGIN, END, IMAGE, UNKNOWN, *_ROLES)

# The turns of LLaVA 1.5. Content is a text, or a list of text and image parts.
_CHAT_TEMPLATE = """\
{%- macro render(content, allowed) -%}
    {%- if content is string -%}
        {{- content ~ ' ' -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] not in allowed -%}
                {{- raise_exception('a content part here must be one of ' ~ allowed ~ ', not ' ~ part['type']) -}}
            {%- endif -%}
            {{- ('<image>' if part['type'] == 'image' else part['text']) ~ ' ' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' ~ render(message['content'], ['image', 'text']) -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}
        {%- generation -%}{{- render(message['content'], ['text']) ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('a role must be user or assistant, not ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}
"""


def build_processor(words: Sequence[str] = VOCABULARY) -> LlavaProcessor:
    """The policy's processor: CLIP's image processor, a word-level fast tokenizer and a chat template.

    Words and punctuation marks are one token each, with or without spaces around them; a text of the scenes' vocabulary
    decodes to itself with single spaces between tokens. ``[MASK]`` is an ordinary word. Padding goes to the left, as
    generation needs it. Scenes are taken as they are; other images are resized and cropped to the square of a scene.

    Args:
        words: what the tokenizer knows.

    Returns:
        A processor that gives ``input_ids``, ``attention_mask`` and ``pixel_values`` (N, 3, 32, 32), and writes 16
        image tokens for every ``<image>``.
    """
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=_build_image_processor(),
        tokenizer=_build_tokenizer(words),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        # The class token of the tower, which "default" then drops again.
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=_CHAT_TEMPLATE,
    )


def build_policy(seed: int, words: Sequence[str] = VOCABULARY) -> LlavaForConditionalGeneration:
    """An untaught policy with random weights.

    Args:
        seed: of the random weights; the state of torch's global generator is left alone.
        words: what its tokenizer knows.

    Returns:
        A float32 model of 1.26 million parameters in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_build_config(words))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=_SPECIAL.index(PAD),
        bos_token_id=_SPECIAL.index(BEGIN),
        eos_token_id=_SPECIAL.index(END),
        do_sample=False,
        max_new_tokens=48,
    )
    model.train(False)
    return model


def _build_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        # Gives the model the light intensities that the scenes' pixels stand for.
        image_mean=[-DARKEST / (BRIGHTEST - DARKEST)] * 3,
        image_std=[1 / (BRIGHTEST - DARKEST)] * 3,
    )


def _build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\[MASK\]|\w+|[^\w\s]"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _build_config(words: Sequence[str]) -> LlavaConfig:
    width, layers, heads = 128, 4, 4
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=width,
    )
    text = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        # With the usual 0.02 so small a model learns to answer yes or no only at chance.
        initializer_range=0.06,
        pad_token_id=_SPECIAL.index(PAD),
        bos_token_id=_SPECIAL.index(BEGIN),
        eos_token_id=_SPECIAL.index(END),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_SPECIAL.index(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
