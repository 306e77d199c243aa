import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from tests.conftest import picture
from tests.tiny_models import CORPUS, FAMILIES, make_tiny

CLASSES = {
    "llava": "Llava",
    "llava_next_mistral": "LlavaNext",
    "llava_next_vicuna": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "janus": "Janus",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "gemma3": "Gemma3",
    "paligemma": "PaliGemma",
}
ONE_SIZE = {"llava", "janus", "gemma3", "paligemma"}
TIED = {"qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"}


class Tiny(NamedTuple):
    family: str
    model: PreTrainedModel
    processor: ProcessorMixin

    def encode(self, *images) -> BatchFeature:
        """One chat for each image; PaliGemma has no chats and returns labels unasked."""
        if self.processor.chat_template is None:
            texts = ["<image>describe the image."] * len(images)
            inputs = self.processor(images=list(images), text=texts, padding=True, return_tensors="pt")
            return BatchFeature({name: value for name, value in inputs.items() if name != "labels"})
        return self.processor.apply_chat_template(
            [[user_turn(image)] for image in images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    @property
    def image_features(self) -> Callable:
        # Janus has them on the base model only.
        return self.model.base_model.get_image_features

    @torch.no_grad()
    def last_log_probs(self, **inputs) -> torch.Tensor:
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)


def user_turn(image) -> dict:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": CORPUS[1]}]}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor asks for it")
    folder = make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Tiny(request.param, model, AutoProcessor.from_pretrained(folder))


def test_auto_classes_load_the_real_ones(tiny):
    name = CLASSES[tiny.family]
    assert type(tiny.model) is getattr(transformers, f"{name}ForConditionalGeneration")
    assert type(tiny.processor) is getattr(transformers, f"{name}Processor")
    assert "mm_encoder_outputs" in inspect.signature(tiny.model.forward).parameters
    assert (tiny.model.get_output_embeddings().weight is tiny.model.get_input_embeddings().weight) == (
        tiny.family in TIED
    )


def test_sentences_survive_the_tokenizer(tiny):
    tokenizer = tiny.processor.tokenizer
    for text in CORPUS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.pad_token_id not in tokenizer(CORPUS[0])["input_ids"]


def test_pictures_change_the_log_probs(tiny):
    first, second = (tiny.last_log_probs(**tiny.encode(picture(seed))) for seed in (0, 1))
    assert first.isfinite().all()
    assert (first - second).abs().max() > 0.1


def test_picture_sizes_change_the_number_of_tokens(tiny):
    counts = [tiny.encode(picture(0, size))["input_ids"].shape[1] for size in ((40, 32), (90, 32))]
    assert (counts[0] == counts[1]) == (tiny.family in ONE_SIZE)
    assert max(counts) < 200


def test_batches_equal_single_samples(tiny):
    pictures = [picture(0), picture(1, (90, 32))]
    inputs = tiny.encode(*pictures)
    with torch.no_grad():
        logits = tiny.model(**inputs).logits
    for i, image in enumerate(pictures):
        row = logits[i][inputs["attention_mask"][i].bool()][-1]
        torch.testing.assert_close(row.log_softmax(-1), tiny.last_log_probs(**tiny.encode(image))[0])


def test_encoded_pictures_stand_for_pixels(tiny):
    inputs = tiny.encode(picture(0), picture(1, (90, 32)))
    with torch.no_grad():
        encoded = tiny.image_features(
            **{name: inputs[name] for name in inspect.signature(tiny.image_features).parameters if name in inputs},
            return_dict=True,
        )
    rest = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    torch.testing.assert_close(
        tiny.last_log_probs(**rest, mm_encoder_outputs={"image": encoded}), tiny.last_log_probs(**inputs)
    )


def test_generates(tiny):
    inputs = tiny.encode(picture(0))
    answer = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < answer.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_answers_start_with_the_generation_prompt(tiny):
    if tiny.family == "paligemma":
        assert tiny.processor.chat_template is None
        return
    chat = [user_turn(picture(0))]
    prompt = tiny.processor.apply_chat_template(chat, add_generation_prompt=True)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes."}]}
    whole = tiny.processor.apply_chat_template([*chat, answer])
    assert whole.startswith(prompt) == (tiny.family != "llava_onevision")


@pytest.mark.parametrize("family", ["llava_next_mistral", "gemma3"])
def test_one_seed_makes_one_checkpoint(family, tmp_path):
    first, again, other = (
        (make_tiny(family, tmp_path / name, seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other
