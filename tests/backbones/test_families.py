"""Every family end to end on a tiny checkpoint of its real classes, against its own plain forward."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.modules import RDPOModule
from realign_lightning.scoring import encode_batch_images, score
from realign_lightning.types import PreferenceSample, SampleError
from tests.conftest import picture, preference_samples
from tests.tiny_models import FAMILIES, make_tiny

CHATML = "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# What each family was trained on, written by hand; start tokens are left to the processor.
CHATS = {
    "llava": "USER: <image>\n{question} ASSISTANT: {answer}</s>",
    "llava_next_mistral": "[INST] <image>\n{question} [/INST] {answer}</s>",
    "llava_next_vicuna": "USER: <image>\n{question} ASSISTANT: {answer}</s>",
    "llava_onevision": "<|im_start|>user <image>\n{question}<|im_end|><|im_start|>assistant\n{answer}<|im_end|>",
    "qwen2_vl": SYSTEM + CHATML.replace("{image}", QWEN_IMAGE),
    "qwen2_5_vl": SYSTEM + CHATML.replace("{image}", QWEN_IMAGE),
    "qwen3_vl": CHATML.replace("{image}", QWEN_IMAGE),
    "janus": "<|User|>: <image_placeholder>\n{question}\n\n<|Assistant|>: {answer}<｜end▁of▁sentence｜>",  # noqa: RUF001
    "internvl": CHATML.replace("{image}", "<IMG_CONTEXT>\n"),
    "smolvlm": "<|im_start|>User:<image>{question}<end_of_utterance>\nAssistant: {answer}<end_of_utterance>",
    "idefics3": "User:<image>{question}<end_of_utterance>\nAssistant: {answer}<end_of_utterance>",
    "gemma3": "<start_of_turn>user\n<start_of_image>{question}<end_of_turn>\n"
    "<start_of_turn>model\n{answer}<end_of_turn>",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family, tmp_path_factory) -> AutoBackbone:
    return backbone_of(family, make_tiny(family, tmp_path_factory.mktemp("family") / family))


@pytest.fixture(scope="module")
def model(backbone) -> nn.Module:
    return backbone.load_model()


def backbone_of(family: str, folder) -> AutoBackbone:
    return (PaliGemmaBackbone if family == "paligemma" else AutoBackbone)(str(folder))


def samples_of_different_sizes() -> list[PreferenceSample]:
    sizes = [(40, 32), (90, 32), (32, 70)]
    texts = [(one.prompt, one.chosen, one.rejected) for one in preference_samples(3)]
    return [
        PreferenceSample(f"s{i}", picture(2 * i, sizes[i]), picture(2 * i + 1, sizes[(i + 1) % 3]), *texts[i])
        for i in range(3)
    ]


def batch_of(backbone, samples):
    return backbone.collate([backbone.encode_sample(sample) for sample in samples])


def plain_log_prob(family, backbone, model, question, answer, images) -> float:
    """The model's own forward from pixels on one row: whole text by the processor, full logits, float64."""
    processor = backbone.processor
    if family == "paligemma":
        text = "<image>" * len(images) + question
        whole = processor(text=[text], suffix=[answer], images=[images], return_tensors="pt")
        labels = whole.pop("labels")[0]
        start = int((labels != -100).nonzero()[0])
    else:
        chat = CHATS[family].replace("{question}", question)
        # A space before the answer is part of its first token.
        before = chat.split("{answer}")[0].rstrip(" ")
        whole = processor(text=[chat.replace("{answer}", answer)], images=[images], return_tensors="pt")
        start = processor(text=[before], images=[images], return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**whole).logits[0]
    ids = whole["input_ids"][0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def test_scores_equal_the_models_own_forward_on_images_of_different_sizes(family, backbone, model):
    samples = samples_of_different_sizes()
    with torch.no_grad():
        scores = score(backbone, model, batch_of(backbone, samples))
    for row, sample in enumerate(samples):
        expected = {
            "chosen": plain_log_prob(family, backbone, model, sample.prompt, sample.chosen, [sample.image]),
            "rejected": plain_log_prob(family, backbone, model, sample.prompt, sample.rejected, [sample.image]),
            "visual": plain_log_prob(family, backbone, model, sample.prompt, sample.chosen, [sample.retrieved]),
        }
        for view, value in scores.items():
            assert value[row].item() == pytest.approx(expected[view], rel=1e-5)
        assert abs(expected["chosen"] - expected["visual"]) > 1e-2, "another image must change the log-probs"


def test_batch_mates_change_nothing(backbone, model):
    samples = samples_of_different_sizes()
    with torch.no_grad():
        together = dict(score(backbone, model, batch_of(backbone, samples)).items())
        backwards = dict(score(backbone, model, batch_of(backbone, samples[::-1])).items())
        alone = [dict(score(backbone, model, batch_of(backbone, [sample])).items()) for sample in samples]
    for view, values in together.items():
        torch.testing.assert_close(backwards[view].flip(0), values, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.cat([one[view] for one in alone]), values, rtol=1e-5, atol=1e-4)


def test_trains_projector_and_adapter_saves_and_loads(family, backbone, tmp_path):
    torch.manual_seed(0)
    module = RDPOModule(
        backbone,
        adapter=LoRA(r=2, alpha=4, dropout=0.0),
        trained_parts=["projector"],
        part_learning_rates={"projector": 1e-3},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
        gradient_checkpointing=True,
    )
    encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
    batch = backbone.collate(encoded)
    with torch.no_grad():
        policy, reference = module.score(batch)
        for (_, ours), (_, theirs) in zip(policy.items(), reference.items(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        before = reference
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(encoded, batch_size=2, collate_fn=backbone.collate))
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    parts = backbone.parts(module.policy)
    trained = {name for name, value in module.policy.named_parameters() if value.requires_grad}
    assert {parts[name] for name in trained} == {"language_model", "projector"}
    assert all(value.any() for name, value in module.policy.named_parameters() if "lora_B" in name)
    assert not module.image_path_is_frozen
    module.eval()
    with torch.no_grad():
        policy, reference = module.score(batch)
    for (_, value), (_, unchanged) in zip(reference.items(), before.items(), strict=True):
        torch.testing.assert_close(value, unchanged, rtol=0, atol=0)
    assert (policy.chosen - reference.chosen).abs().max() > 1e-2

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = RDPOModule.load_from_checkpoint(tmp_path / "run.ckpt").eval()
    with torch.no_grad():
        again, _ = loaded.score(batch)
    for (_, value), (_, expected) in zip(again.items(), policy.items(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)

    module.export(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(backbone.path)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    sample = samples_of_different_sizes()[0]
    expected = plain_log_prob(family, backbone, plain, sample.prompt, sample.chosen, [sample.image])
    assert policy.chosen[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_in_16_bit_the_reference_is_the_policy_before_training(backbone):
    """Bit for bit, although the policy's projector is kept in float32; with and without autocast."""
    half = type(backbone)(backbone.path, dtype="bfloat16")
    module = RDPOModule(half, adapter=LoRA(r=2, dropout=0.0), trained_parts=["projector"]).eval()
    batch = batch_of(half, samples_of_different_sizes())
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            policy, reference = module.score(batch)
        for (_, ours), (_, theirs) in zip(policy.items(), reference.items(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_cut_leaves_the_same_response_beside_both_images(backbone):
    """Also where the retrieved image takes more or fewer tokens than the image."""
    answer = "three apples, a bottle of water and a laptop in this image, seen from above at night."
    for first, second in (((40, 32), (90, 32)), ((90, 32), (40, 32))):
        sample = PreferenceSample("k", picture(1, first), picture(2, second), "a dog?", answer, "no.")
        whole = backbone.encode_sample(sample)
        longest = max(int((~getattr(whole, view).response_mask).sum()) for view in ("chosen", "visual"))
        cut = type(backbone)(backbone.path, max_length=longest + 4).encode_sample(sample)
        chosen, visual = (view.tokens["input_ids"][view.response_mask] for view in (cut.chosen, cut.visual))
        assert chosen.tolist() == visual.tolist()
        assert len(chosen) == 4
        assert cut.chosen.truncated == cut.visual.truncated > 0


def test_lora_reaches_every_linear_layer_of_the_projector(backbone):
    model = backbone.load_model()
    parts = backbone.parts(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if parts[f"{name}.weight"] in ("language_model", "projector")} - {"lm_head"}
    adapted = LoRA(r=2, parts=["language_model", "projector"]).apply(backbone, model)
    assert {name.replace(".base_layer.weight", "") for name in base_layers(adapted)} == expected


def test_generates_what_plain_transformers_does(backbone, model):
    prompts, images = ["describe the image.", "is there a dog?"], [picture(3), picture(4, (90, 32))]
    inputs = backbone.encode_prompts(prompts, images)
    ours = backbone.generate(model, inputs, max_new_tokens=5)
    for prompt, image, answer in zip(prompts, images, ours, strict=True):
        row = backbone.encode_prompts([prompt], [image])
        with torch.no_grad():
            ids = model.generate(**row, max_new_tokens=5, do_sample=False, eos_token_id=list(backbone.end_token_ids))
        assert backbone.decode(ids[0, row["input_ids"].shape[1] :].tolist()) == answer


def test_rows_that_show_one_image_encode_it_once(backbone, model, monkeypatch):
    """Five questions about two images: the tower gets two, and the answers are those of five images."""
    one, other = picture(3), picture(4, (90, 32))
    prompts = ["describe the image.", "is there a dog?", "a cat?", "what is it?", "describe it."]
    shared = backbone.encode_prompts(prompts, [one, other, one, one, other])
    apart = backbone.encode_prompts(prompts, [one.copy(), other.copy(), one.copy(), one.copy(), other.copy()])
    seen = []
    vision = backbone._vision
    monkeypatch.setattr(backbone, "_vision", lambda model, images: seen.append(images) or vision(model, images))
    answers = [row.tokens for row in backbone.generate_tokens(model, shared, max_new_tokens=5)]
    expected = [row.tokens for row in backbone.generate_tokens(model, apart, max_new_tokens=5)]
    assert answers == expected
    assert seen[0]["num_images"].tolist() == [1, 1]
    assert seen[0]["pixel_values"].numel() < seen[1]["pixel_values"].numel() / 2


def test_asks_without_an_image(family, backbone, model):
    prompts = ["is it night?", "describe the image of a dog."]
    if family == "paligemma":
        with pytest.raises(SampleError, match="needs an image"):
            backbone.encode_prompts(prompts, [[], []])
        return
    inputs = backbone.encode_prompts(prompts, [[], []])
    assert not [name for name in inputs if "pixel" in name]
    answers = backbone.generate(model, inputs, max_new_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = backbone.encode_prompts([prompt], [[]])
        with torch.no_grad():
            ids = model.generate(**row, max_new_tokens=5, do_sample=False, eos_token_id=list(backbone.end_token_ids))
        assert backbone.decode(ids[0, row["input_ids"].shape[1] :].tolist()) == answer
    with pytest.raises(ValueError, match="for every prompt or for none"):
        backbone.encode_prompts(prompts, [[], picture(1)])


def test_several_images_and_turns(family, backbone, model):
    """Two images, and (but for PaliGemma, which has no chat) a turn before."""
    first, second = picture(5), picture(6, (90, 32))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a dog?"}]}
    turns = [{"role": "user", "content": "is it night?"}, {"role": "assistant", "content": "no."}]
    prompt = [question] if family == "paligemma" else [*turns, question]
    sample = PreferenceSample("k", second, picture(7), prompt, "two dogs.", "a cat.", context=(first,))
    batch = batch_of(backbone, [sample, samples_of_different_sizes()[0]])
    with torch.no_grad():
        scores = score(backbone, model, batch)
        swapped = PreferenceSample("k", first, picture(7), prompt, "two dogs.", "a cat.", context=(second,))
        other = score(backbone, model, batch_of(backbone, [swapped]))
    inputs = backbone.encode_prompts([prompt], [[first, second]])
    ids = inputs["input_ids"][0].tolist()
    view = batch.chosen
    row = view.tokens["input_ids"][0][view.tokens["attention_mask"][0].bool()]
    answer = row[view.response_mask[0][: len(row)]]
    assert row.tolist() == [*ids, *answer.tolist()]
    extra = {
        name: torch.cat([inputs[name], torch.zeros(1, len(answer), dtype=torch.long)], dim=1)
        for name in ("token_type_ids", "mm_token_type_ids")
        if name in inputs
    }
    if family == "paligemma":
        extra["token_type_ids"][:, len(ids) :] = 1
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", *extra)}
    with torch.no_grad():
        logits = model(input_ids=row[None], attention_mask=torch.ones(1, len(row)).long(), **extra, **pixels).logits[0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)[len(ids) - 1 : -1].gather(1, answer[:, None])
    assert scores.chosen[0].item() == pytest.approx(log_probs.sum().item(), rel=1e-5, abs=1e-4)
    assert abs(scores.chosen[0] - other.chosen[0]) > 1e-3, "the order of images counts"
    with pytest.raises(SampleError, match="shows 2 images, but 1 are given"):
        backbone.encode_sample(PreferenceSample("k", first, second, prompt, "a.", "b."))


def test_parts_and_adapters(family, backbone):
    empty = backbone.empty_model()
    assert all(value.is_meta for value in empty.parameters())
    loaded = backbone.load_model()
    assert {n: v.shape for n, v in empty.named_parameters()} == {n: v.shape for n, v in loaded.named_parameters()}
    parts = backbone.parts(loaded)
    assert {"vision_tower", "projector", "language_model"} <= set(parts.values())
    assert ("head" in parts.values()) == (not loaded.config.tie_word_embeddings)
    assert (None in parts.values()) == (family == "janus")
    tower = {name for name, value in parts.items() if value == "vision_tower"}
    assert all(name.split(".")[1] in ("vision_tower", "vision_model", "visual") for name in tower)
    adapted = LoRA(r=2, alpha=4).apply(backbone, loaded)
    linear = {
        name.removesuffix(".base_layer")
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, nn.Linear) and name.endswith(".base_layer")
    }
    everything = {name for name, module in backbone.load_model().named_modules() if isinstance(module, nn.Linear)}
    decoder = next(name for name, module in loaded.named_modules() if module is loaded.get_decoder())
    assert linear == {name for name in everything if name.startswith(f"{decoder}.")}
    tower_too = LoRA(r=2, parts=["language_model", "vision_tower"]).apply(backbone, backbone.load_model())
    touched = {parts[name.replace(".base_layer", "")] for name in base_layers(tower_too)}
    assert touched == {"language_model", "vision_tower"}


def base_layers(adapted):
    return [name for name, _ in adapted.get_base_model().named_parameters() if name.endswith(".base_layer.weight")]


def test_shares_image_features_between_rows(backbone, model):
    samples = samples_of_different_sizes()
    batch = batch_of(backbone, samples)
    with torch.no_grad():
        images = encode_batch_images(backbone, model, batch)
        shared = score(backbone, model, batch, images=images)
        own = score(backbone, model, batch)
    for (_, one), (_, two) in zip(shared.items(), own.items(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_embeds_images_of_any_size(backbone, model):
    images = [picture(0), picture(1, (90, 32)), picture(2, (32, 70))]
    together = backbone.embed_images(model, images)
    assert together.shape[0] == 3
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    alone = torch.cat([backbone.embed_images(model, [image]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
