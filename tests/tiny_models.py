"""Tiny checkpoints of the real model classes with real processors, made from nothing and saved to disk.

Each maker stands for one family of the hub: the layout of its chat template, its special tokens, the tokens that end
an answer, its tied or untied embeddings and its image preprocessing are the family's own, only everything is tiny.
The templates leave out what no test needs: videos, tools and the numbering of pictures.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaTokenizer,
    GenerationConfig,
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    JanusConfig,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT as JANUS_SYSTEM

CORPUS = [
    "USER: ASSISTANT: describe the image. what is in the picture? is there a dog on the sofa? yes, no.",
    "a red bus stands beside two people and a traffic light. the cat sleeps on a green chair under the table.",
    "there are three apples, a bottle of water and a laptop in this image, seen from above at night.",
    "\nabcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?'\"-()[]<>/",
]
QWEN_SYSTEM = "You are a helpful assistant."

# What sentencepiece falls back on for characters that its vocabulary does not hold.
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Idefics3 and SmolVLM name the place of each tile.
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]

# The layout of the template that LLaVA 1.5 ships on the hub: no end-of-sequence token after the answer.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# No generation prompt, and what ends an answer is the text `<\s>`, no token: the hub's own slip.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ '<<SYS>>\n' + message.content[0].text + '\n<</SYS>>\n\n' }}"
    "{% elif message.role == 'user' %}{{ '[INST] ' }}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content[0].text + '<\\\\s> ' }}{% endif %}"
    "{% endfor %}"
)

# Turns start with the role and a space, the generation prompt with the role and a line break.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    "{% for part in message.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ '\n' + part.text }}{% endgeneration %}"
    "{% else %}{{ '\n' + part.text }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The end-of-sentence token stands between turns only, not after the last one.
JANUS_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<|User|>: ' }}"
    "{% elif message.role == 'assistant' %}{{ '<|Assistant|>:' }}"
    "{% if add_generation_prompt or not loop.last or message.content[0].text != '' %}{{ ' ' }}{% endif %}"
    "{% else %}{{ message.role.capitalize() + ': ' }}{% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}"
    "{{ ('' if loop.first else '\n') + '<image_placeholder>' + ('' if loop.last else '\n') }}"
    "{% else %}{{ part.text.strip() }}{% endif %}"
    "{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}"
    "{{ '\n\n' if message.role == 'user' else '<\uff5cend\u2581of\u2581sentence\uff5c>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)

GEMMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0] if messages[0].role == 'system' else none %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% if loop.first and system %}"
    "{{ (system.content if system.content is string else system.content[0].text) + '\n\n' }}{% endif %}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def chatml_template(image: str, system: str = "") -> str:
    """The template of Qwen-VL and InternVL; `system` is the system message of a conversation that has none."""
    default = f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        "{% for message in messages %}"
        + ("{% if loop.first and message.role != 'system' %}" + default + "{% endif %}" if system else "")
        + "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def idefics_template(bos: str) -> str:
    """The template of Idefics3 and SmolVLM: no space between the role and an image that starts the turn."""
    return (
        bos + "{% for message in messages %}"
        "{{ message.role.capitalize() + (':' if message.content[0].type == 'image' else ': ') }}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
        "{{ '<end_of_utterance>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


def train_bpe(
    pre_tokenizer: Any, size: int = 400, specials: Sequence[str] = (), texts: Iterable[str] = CORPUS
) -> Tokenizer:
    """A byte pair encoding of a few sentences, its special tokens first."""
    raw = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in specials else None))
    raw.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else []
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return raw


def vocab_and_merges(raw: Tokenizer) -> dict[str, Any]:
    """What the tokenizer classes of the families take."""
    state = json.loads(raw.to_str())["model"]
    return {"vocab": state["vocab"], "merges": [tuple(pair) for pair in state["merges"]]}


def llama_tokenizer(more: Sequence[str] = (), size: int = 400, **changed: Any) -> LlamaTokenizer:
    """A Llama tokenizer (sentencepiece-like BPE) trained on a few sentences."""
    raw = train_bpe(pre_tokenizers.Metaspace(), size, ["<unk>", "<s>", "</s>", "<pad>", "<image>", *more])
    tokenizer = LlamaTokenizer(**vocab_and_merges(raw), pad_token="<pad>", add_bos_token=True, **changed)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def gemma_tokenizer(more: Sequence[str] = (), **named: str) -> GemmaTokenizer:
    """A Gemma tokenizer; `named` special tokens become its attributes, as `image_token`."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *more, *named.values()]
    raw = train_bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), 600, [*specials, *BYTES])
    return GemmaTokenizer(
        **vocab_and_merges(raw),
        add_bos_token=True,
        padding_side="left",
        extra_special_tokens=list(more),
        model_specific_special_tokens=named,
    )


def byte_level(texts: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE as GPT-2's, trained on CORPUS and more texts."""
    raw = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), 400, texts=[*CORPUS, *texts])
    raw.decoder = decoders.ByteLevel()
    return raw


def qwen_tokenizer(more: Sequence[str], **named: str) -> Qwen2Tokenizer:
    """The tokenizer of Qwen, LLaVA-OneVision and InternVL."""
    return Qwen2Tokenizer(
        **vocab_and_merges(byte_level([QWEN_SYSTEM, "<|im_start|>system user assistant"])),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=["<|im_start|>", *more],
        model_specific_special_tokens=named,
    )


def text_arguments(tokenizer: Any, **changed: Any) -> dict[str, Any]:
    """Arguments of a tiny language model that wants large differences between its log-probabilities."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    } | changed


def vision_arguments(**changed: Any) -> dict[str, Any]:
    """Arguments of a tiny image encoder: 3 x 3 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
    } | changed


def save(
    folder: Path, seed: int, config: PreTrainedConfig, processor: ProcessorMixin, ends: Sequence[str] = ()
) -> Path:
    """Make the model of `config` and save it; `ends` are the tokens at which its generation config stops."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        # Gemma 3 starts its projector at zero, InternVL its positions: pictures would change little or nothing.
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = processor.tokenizer
    if ends:
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids(list(ends)),
            pad_token_id=tokenizer.pad_token_id,
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def square(size: int) -> dict[str, int]:
    """The size of a square picture as image processors take it."""
    return {"height": size, "width": size}


def make_tiny_llava(folder: Path, seed: int = 0, hidden: int = 64) -> Path:
    """LLaVA 1.5: CLIP tower, MLP projector, Llama."""
    tokenizer = llama_tokenizer()
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=square(24), do_center_crop=True),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_arguments(num_hidden_layers=3, **sizes)),
        text_config=LlamaConfig(**text_arguments(tokenizer, max_position_embeddings=256, **sizes)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return save(folder, seed, config, processor)


def make_tiny_llava_next(
    folder: Path, seed: int = 0, text: Callable[..., PreTrainedConfig] = LlamaConfig, template: str = LLAVA_TEMPLATE
) -> Path:
    """LLaVA 1.6 (NeXT): the picture small and as a grid of tiles, a newline embedding behind each row."""
    tokenizer = llama_tokenizer(BYTES, 600, padding_side="left")
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 24}, crop_size=square(24), image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision_arguments(num_hidden_layers=3)),
        text_config=text(**text_arguments(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return save(folder, seed, config, processor)


def make_tiny_llava_onevision(folder: Path, seed: int = 0) -> Path:
    """LLaVA-OneVision: SigLIP tower, up to 6 x 6 tiles scaled down to the features of nine, Qwen2."""
    tokenizer = qwen_tokenizer(["<image>", "<video>"])
    pinpoints = [[24 * rows, 24 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square(24), image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=square(24)),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=ONEVISION_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision_arguments(vision_use_head=False)),
        text_config=Qwen2Config(**text_arguments(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return save(folder, seed, config, processor, ends=["<|im_end|>", "<|endoftext|>"])


def make_tiny_qwen_vl(
    folder: Path,
    seed: int,
    config: type[PreTrainedConfig],
    processor: type[ProcessorMixin],
    video_processor: type,
    vision: dict[str, Any],
    text: dict[str, Any],
    system: str = "",
    tied: bool = False,
) -> Path:
    """Qwen-VL: pictures in their own resolution, four patches of 4 x 4 pixels a token, rotary positions in 3D."""
    tokenizer = qwen_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    # 4 to 64 tokens.
    size = {"shortest_edge": 4 * 64, "longest_edge": 64 * 64}
    patches = {"patch_size": 4, "temporal_patch_size": 2}
    made = processor(
        image_processor=Qwen2VLImageProcessor(size=size, merge_size=2, **patches),
        tokenizer=tokenizer,
        video_processor=video_processor(size=size, merge_size=2, **patches),
        chat_template=chatml_template("<|vision_start|><|image_pad|><|vision_end|>", system),
    )
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}
    made_config = config(
        vision_config={"num_heads": 2, "spatial_merge_size": 2, **patches, **vision},
        text_config=text_arguments(tokenizer, **text),
        tie_word_embeddings=tied,
        **ids,
    )
    return save(folder, seed, made_config, made, ends=["<|im_end|>", "<|endoftext|>"])


def make_tiny_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL 7B."""
    return make_tiny_qwen_vl(
        folder,
        seed,
        Qwen2VLConfig,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        vision={"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        system=QWEN_SYSTEM,
    )


def make_tiny_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL 3B: attention in windows but for the last block of the tower, tied embeddings."""
    return make_tiny_qwen_vl(
        folder,
        seed,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        vision={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        system=QWEN_SYSTEM,
        tied=True,
    )


def make_tiny_qwen3_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen3-VL 4B: features of two blocks of the tower added behind the first layers of the language model, tied."""
    return make_tiny_qwen_vl(
        folder,
        seed,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        vision={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text={
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        tied=True,
    )


def make_tiny_janus(folder: Path, seed: int = 0) -> Path:
    """Janus-Pro: SigLIP-like tower, Llama, and the VQ-VAE and head that make pictures."""
    names = ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "\u2581pad\u2581")
    bos, eos, pad = (f"<\uff5c{name}\uff5c>" for name in names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level([JANUS_SYSTEM]),
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        add_bos_token=True,
        padding_side="left",
        extra_special_tokens=["<|User|>", "<|Assistant|>"],
        model_specific_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    processor = JanusProcessor(
        image_processor=JanusImageProcessor(size=square(24), min_size=2),
        tokenizer=tokenizer,
        chat_template=JANUS_TEMPLATE,
        use_default_system_prompt=True,
        num_image_tokens=9,
    )
    config = JanusConfig(
        vision_config=JanusVisionConfig(
            hidden_size=32,
            mlp_ratio=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            projection_dim=64,
            num_image_tokens=9,
        ),
        text_config=LlamaConfig(**text_arguments(tokenizer)),
        # 32 groups of its norms: no fewer channels.
        vq_config=JanusVQVAEConfig(
            num_embeddings=32,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=64,
            image_token_embed_dim=64,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return save(folder, seed, config, processor, ends=[eos])


def make_tiny_internvl(folder: Path, seed: int = 0) -> Path:
    """InternVL 3: one to four tiles and a thumbnail, four patches a token, Qwen2."""
    tokenizer = qwen_tokenizer(
        [],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square(32), min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=square(32)),
        image_seq_length=4,
        chat_template=chatml_template("{{ '<IMG_CONTEXT>\n' }}"),
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision_arguments(image_size=32, attention_bias=True)),
        text_config=Qwen2Config(**text_arguments(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return save(folder, seed, config, processor, ends=["<|im_end|>", "<|endoftext|>"])


def make_tiny_smolvlm(folder: Path, seed: int = 0) -> Path:
    """SmolVLM2: pictures enlarged and split into up to 2 x 2 tiles and the whole, nine patches a token, Llama."""
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = GPT2Tokenizer(
        **vocab_and_merges(byte_level(["User: Assistant:"])),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        truncation_side="left",
        extra_special_tokens=TILES,
        model_specific_special_tokens=named,
    )
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(size={"longest_edge": 24}, max_image_size={"longest_edge": 24}),
        image_seq_len=4,
        chat_template=idefics_template("<|im_start|>"),
    )
    config = SmolVLMConfig(
        vision_config=vision_arguments(patch_size=4),
        text_config=LlamaConfig(**text_arguments(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=3,
    )
    return save(folder, seed, config, processor, ends=["<end_of_utterance>"])


def make_tiny_idefics3(folder: Path, seed: int = 0) -> Path:
    """Idefics3: as SmolVLM with Llama 3, whose generation does not stop at the token that ends a turn."""
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["User: Assistant:"]),
        bos_token="<|begin_of_text|>",
        eos_token=ends[0],
        pad_token="<|reserved_special_token_0|>",
        add_bos_token=True,
        extra_special_tokens=[
            *ends[1:],
            *TILES,
            "<global-img>",
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ],
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer,
        image_seq_len=9,
        chat_template=idefics_template("<|begin_of_text|>"),
    )
    config = Idefics3Config(
        vision_config=vision_arguments(patch_size=4),
        text_config=LlamaConfig(
            **text_arguments(tokenizer, eos_token_id=tokenizer.convert_tokens_to_ids(ends)),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return save(folder, seed, config, processor)


def make_tiny_gemma3(folder: Path, seed: int = 0) -> Path:
    """Gemma 3 4B: SigLIP tower averaged to 4 x 4 tokens that see each other, sliding windows, tied embeddings."""
    tokenizer = gemma_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=square(32)),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=GEMMA3_TEMPLATE,
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision_arguments(image_size=32, patch_size=4, vision_use_head=False)),
        text_config=Gemma3TextConfig(
            **text_arguments(
                tokenizer,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=64,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
            )
        ),
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        initializer_range=0.2,
    )
    return save(folder, seed, config, processor, ends=["<eos>", "<end_of_turn>"])


def make_tiny_paligemma(folder: Path, seed: int = 0) -> Path:
    """PaliGemma: SigLIP tower, Gemma with a prefix that sees itself whole, no chat template."""
    image_processor = SiglipImageProcessor(size=square(24))
    image_processor.image_seq_length = 9
    # The processor adds its image token and those for places and segments.
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=gemma_tokenizer())
    tokenizer = processor.tokenizer
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision_arguments(vision_use_head=False)),
        text_config=GemmaConfig(**text_arguments(tokenizer, head_dim=16, num_key_value_heads=1)),
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
    )
    return save(folder, seed, config, processor)


FAMILIES: dict[str, Callable[[Path, int], Path]] = {
    "llava": make_tiny_llava,
    "llava_next_mistral": partial(
        make_tiny_llava_next, text=partial(MistralConfig, sliding_window=None), template=MISTRAL_TEMPLATE
    ),
    "llava_next_vicuna": make_tiny_llava_next,
    "llava_onevision": make_tiny_llava_onevision,
    "qwen2_vl": make_tiny_qwen2_vl,
    "qwen2_5_vl": make_tiny_qwen2_5_vl,
    "qwen3_vl": make_tiny_qwen3_vl,
    "janus": make_tiny_janus,
    "internvl": make_tiny_internvl,
    "smolvlm": make_tiny_smolvlm,
    "idefics3": make_tiny_idefics3,
    "gemma3": make_tiny_gemma3,
    "paligemma": make_tiny_paligemma,
}


def make_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny checkpoint of one of FAMILIES in `folder`."""
    return FAMILIES[family](folder, seed)


def make_tiny_sentence_encoder(folder: Path) -> Path:
    """Save a sentence-transformers model of random weights that reads English letter by letter."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).eval().save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(16)]
    SentenceTransformer(modules=modules).save(str(folder / "encoder"))
    return folder / "encoder"
