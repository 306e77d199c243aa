import json
import re

import pytest
import torch
from transformers import Florence2Config, LlamaConfig, LlamaForCausalLM, T5Config

from realign_lightning.backbones import AutoBackbone, PaliGemmaBackbone
from realign_lightning.types import PreferenceSample, SampleError
from tests.conftest import picture, preference_samples
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


def sample(**changes) -> PreferenceSample:
    base = {
        "key": "k",
        "image": picture(0),
        "retrieved": picture(1),
        "prompt": "what is in the picture?",
        "chosen": "a cat.",
        "rejected": "a dog.",
    }
    return PreferenceSample(**{**base, **changes})


def texts(backbone, view):
    ids = view.tokens["input_ids"]
    return (
        backbone.tokenizer.decode(ids[~view.response_mask]),
        backbone.tokenizer.decode(ids[view.response_mask]).strip(),
    )


def test_response_mask_covers_the_response_and_its_end(backbone):
    encoded = backbone.encode_sample(sample())
    prompt, response = texts(backbone, encoded.chosen)
    assert response == "a cat.</s>"
    assert prompt.replace(" ", "").replace("<image>", "") == "<s>USER:\nwhatisinthepicture?ASSISTANT:"
    assert prompt.count("<image>") == 9
    assert texts(backbone, encoded.rejected)[1] == "a dog.</s>"
    assert texts(backbone, encoded.visual) == (prompt, response)


def test_sequence_equals_the_processors_own_on_the_whole_text(backbone):
    view = backbone.encode_sample(sample()).chosen
    whole = backbone.processor(
        text="USER: <image>\nwhat is in the picture? ASSISTANT: a cat.</s>", images=picture(0), return_tensors="pt"
    )
    assert view.tokens["input_ids"].tolist() == whole["input_ids"][0].tolist()


def test_generation_prompt_is_the_training_prompt(backbone):
    view = backbone.encode_sample(sample()).chosen
    inputs = backbone.encode_prompts(["what is in the picture?"], [picture(0)])
    assert inputs["input_ids"][0].tolist() == view.tokens["input_ids"][~view.response_mask].tolist()


def test_chat_messages_and_plain_text_agree(backbone):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]}]
    as_text, as_messages = backbone.encode_sample(sample()), backbone.encode_sample(sample(prompt=messages))
    assert torch.equal(as_text.chosen.tokens["input_ids"], as_messages.chosen.tokens["input_ids"])
    several = [
        {"role": "user", "content": "describe the image."},
        {"role": "assistant", "content": "a cat."},
        {"role": "user", "content": "is there a dog?"},
    ]
    prompt, _ = texts(backbone, backbone.encode_sample(sample(prompt=several)).chosen)
    assert re.sub(r"\s|<image>", "", prompt) == "<s>USER:describetheimage.ASSISTANT:acat.USER:isthereadog?ASSISTANT:"
    assert messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": "a <image> cat"}, "image token"),
        ({"prompt": "what is <image> this?"}, "image token"),
        ({"chosen": "yes </s> no."}, "response contains the special token '</s>'"),
        ({"rejected": "no. </s>"}, "response contains the special token '</s>'"),
        ({"prompt": "a </s> USER: b"}, "prompt contains the special token '</s>'"),
        ({"prompt": [{"role": "assistant", "content": "a cat."}]}, "user turn"),
    ],
)
def test_unusable_samples_are_named(backbone, changes, message):
    with pytest.raises(SampleError, match=message):
        backbone.encode_sample(sample(**changes))


def test_only_the_response_is_cut(tiny_llava):
    full = AutoBackbone(str(tiny_llava)).encode_sample(sample(chosen="a red bus and a dog and a cat."))
    before = int((~full.chosen.response_mask).sum())
    limited = AutoBackbone(str(tiny_llava), max_length=before + 3)
    cut = limited.encode_sample(sample(chosen="a red bus and a dog and a cat."))
    assert cut.chosen.tokens["input_ids"].tolist() == full.chosen.tokens["input_ids"][: before + 3].tolist()
    assert cut.chosen.truncated == len(full.chosen.response_mask) - before - 3
    assert limited.collate([cut, full]).truncated == (cut.key,)
    with pytest.raises(SampleError, match="leaves no response token"):
        AutoBackbone(str(tiny_llava), max_length=before).encode_sample(sample())


def test_collate_pads_on_the_right_and_keeps_order(backbone):
    samples = preference_samples(3)
    encoded = [backbone.encode_sample(one) for one in samples]
    batch = backbone.collate(encoded)
    assert batch.keys == ("sample0", "sample1", "sample2")
    assert len(batch) == 3
    for row, one in enumerate(encoded):
        length = len(one.rejected.response_mask)
        assert batch.rejected.tokens["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch.rejected.response_mask.shape[1] - length
        )
        assert batch.rejected.tokens["input_ids"][row, :length].tolist() == one.rejected.tokens["input_ids"].tolist()
        assert batch.rejected.lengths[row] == one.rejected.response_mask.sum()
        torch.testing.assert_close(batch.images["pixel_values"][row], one.image["pixel_values"][0])
    assert batch.weights.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="at least one"):
        backbone.collate([])


def test_generation_stops_at_the_end_token_and_ignores_batch_mates(backbone):
    model = backbone.load_model()
    prompts, images = ["a", "what is in the picture? describe the image."], [picture(3), picture(4)]
    together = backbone.generate(model, backbone.encode_prompts(prompts, images), max_new_tokens=8)
    alone = [
        backbone.generate(model, backbone.encode_prompts([prompt], [image]), max_new_tokens=8)[0]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    assert together == alone
    assert backbone.end_token_ids == (backbone.tokenizer.eos_token_id,)
    with pytest.raises(ValueError, match="one image per prompt"):
        backbone.encode_prompts(prompts, images[:1])


def test_greedy_generation_follows_the_plain_forward(backbone):
    model = backbone.load_model()
    inputs = backbone.encode_prompts(["describe the image."], [picture(5)])
    ids, new = inputs["input_ids"], []
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        if new[-1] in backbone.end_token_ids:
            break
    expected = backbone.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert backbone.generate(model, inputs, max_new_tokens=6) == [expected]


def test_tokenized_response_continues_the_prompt(backbone):
    ids = backbone.response_tokenizer("what is in the picture?")(["a cat."])[0]
    view = backbone.encode_sample(sample()).chosen
    assert [*ids, backbone.tokenizer.eos_token_id] == view.tokens["input_ids"][view.response_mask].tolist()


def test_image_embeddings_are_normalised_tower_means(backbone):
    model = backbone.load_model()
    images = [picture(0), picture(1)]
    embeddings = backbone.embed_images(model, images)
    pixels = backbone.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_tower(pixels).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(embeddings, expected / expected.norm(dim=1, keepdim=True))


def test_image_parameters_are_tower_and_projector(backbone):
    model = backbone.load_model()
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(("model.vision_tower", "model.multi_modal"))
    }
    ids = {id(parameter) for parameter in backbone.image_parameters(model)}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in ids} == expected


def test_missing_path_and_wrong_models_are_refused(tmp_path, tiny_llava):
    with pytest.raises(OSError, match="no_such_model"):
        AutoBackbone(str(tmp_path / "no_such_model")).load_model()
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="image-text-to-text model, got 'llama'"):
        AutoBackbone(str(tmp_path / "text")).load_model()
    Florence2Config().save_pretrained(tmp_path / "florence")
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(florence2\); only decoders"):
        AutoBackbone(str(tmp_path / "florence")).load_model()
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\); only decoders"):
        AutoBackbone(str(tmp_path / "t5")).empty_model()
    with pytest.raises(ValueError, match="max_length"):
        AutoBackbone(str(tiny_llava), max_length=0)


def test_paligemma_needs_its_own_backbone_and_no_other_model_takes_it(tmp_path, tiny_llava):
    paligemma = make_tiny("paligemma", tmp_path / "paligemma")
    with pytest.raises(ValueError, match=r"set class_path to realign_lightning\.backbones\.PaliGemmaBackbone"):
        AutoBackbone(str(paligemma), chat_template="{{ messages }}").encode_sample(sample())
    with pytest.raises(ValueError, match="to be a PaliGemma, got LlavaProcessor: use AutoBackbone"):
        PaliGemmaBackbone(str(tiny_llava)).encode_sample(sample())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(SampleError, match="one user turn"):
        PaliGemmaBackbone(str(paligemma)).encode_sample(sample(prompt=chat))


def test_a_template_that_rewrites_the_prompt_is_refused(tiny_llava):
    backbone = AutoBackbone(
        str(tiny_llava),
        chat_template="<image>{% for m in messages %}{{ m.role }}{% endfor %}{{ 'GO' if add_generation_prompt }}",
    )
    with pytest.raises(ValueError, match="chat template"):
        backbone.encode_sample(sample())


def test_a_template_with_its_own_start_token_gets_no_second_one(tiny_llava):
    plain = AutoBackbone(str(tiny_llava))
    with_start = AutoBackbone(str(tiny_llava), chat_template="<s>" + plain.processor.chat_template)
    ids = with_start.encode_sample(sample()).chosen.tokens["input_ids"].tolist()
    assert ids.count(with_start.tokenizer.bos_token_id) == 1
    assert with_start.encode_prompts(["a"], [picture(0)])["input_ids"][0].tolist().count(ids[0]) == 1


def test_a_template_that_ends_the_turn_gets_no_second_end(tiny_llava):
    template = AutoBackbone(str(tiny_llava)).processor.chat_template
    closing = template.replace(
        "{{ part['text'] + ' ' }}{% endfor %}",
        "{{ part['text'] + ' ' }}{% endfor %}{% if message['role'] == 'assistant' %}</s>\n{% endif %}",
    )
    assert closing != template
    backbone = AutoBackbone(str(tiny_llava), chat_template=closing)
    view = backbone.encode_sample(sample()).chosen
    assert view.tokens["input_ids"].tolist().count(backbone.tokenizer.eos_token_id) == 1
    assert view.tokens["input_ids"][-1] == backbone.tokenizer.eos_token_id


def test_settings_are_plain_for_checkpoints(tiny_llava):
    backbone = AutoBackbone(str(tiny_llava), processor_kwargs={"use_fast": True})
    assert json.loads(json.dumps(vars(backbone)))["processor_kwargs"] == {"use_fast": True}
