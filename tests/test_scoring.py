import dataclasses
import math

import pytest
import torch
from PIL import Image

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.scoring import encode_batch_images, response_lengths, score
from realign_lightning.types import PreferenceSample
from tests.conftest import picture, preference_samples


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model()


def batch_of(backbone, samples):
    return backbone.collate([backbone.encode_sample(sample) for sample in samples])


def plain_log_prob(backbone, model, prompt: str, response: str, image: Image.Image) -> float:
    """The model's own forward on one text and one image: whole text tokenised by the processor, full logits.

    LLaVA 1.5 was trained on "USER: <image>\\n{prompt} ASSISTANT: {response}</s>".
    """
    before = f"USER: <image>\n{prompt} ASSISTANT:"
    whole = backbone.processor(text=f"{before} {response}</s>", images=image, return_tensors="pt")
    start = backbone.processor(text=before, images=image, return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**whole).logits[0]
    ids = whole["input_ids"][0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def test_scores_equal_the_models_own_forward(backbone, model):
    samples = preference_samples()
    with torch.no_grad():
        scores = score(backbone, model, batch_of(backbone, samples))
    for row, sample in enumerate(samples):
        expected = {
            "chosen": plain_log_prob(backbone, model, sample.prompt, sample.chosen, sample.image),
            "rejected": plain_log_prob(backbone, model, sample.prompt, sample.rejected, sample.image),
            "visual": plain_log_prob(backbone, model, sample.prompt, sample.chosen, sample.retrieved),
        }
        for view, value in scores.items():
            assert value[row].item() == pytest.approx(expected[view], abs=1e-5 * abs(expected[view]))
            assert abs(expected[view]) > 1


def test_batch_size_order_and_padding_change_nothing(backbone, model):
    samples = preference_samples()
    with torch.no_grad():
        together = dict(score(backbone, model, batch_of(backbone, samples)).items())
        backwards = dict(score(backbone, model, batch_of(backbone, samples[::-1])).items())
        alone = [dict(score(backbone, model, batch_of(backbone, [sample])).items()) for sample in samples]
    for view, values in together.items():
        torch.testing.assert_close(backwards[view].flip(0), values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([one[view] for one in alone]), values, rtol=1e-5, atol=1e-5)


def test_more_padding_changes_nothing(backbone, model):
    batch = batch_of(backbone, preference_samples(2))
    view = batch.rejected
    padded = {
        name: torch.nn.functional.pad(value, (0, 7), value=backbone.pad_token_id if name == "input_ids" else 0)
        for name, value in view.tokens.items()
    }
    with torch.no_grad():
        before = score(backbone, model, batch)
        batch.rejected = type(view)(padded, torch.nn.functional.pad(view.response_mask, (0, 7)))
        after = score(backbone, model, batch)
    for view_name, value in before.items():
        torch.testing.assert_close(getattr(after, view_name), value, rtol=1e-5, atol=1e-5)


def test_another_image_changes_the_log_probs(backbone, model):
    sample = preference_samples(1)[0]
    other = PreferenceSample("other", picture(99), sample.retrieved, sample.prompt, sample.chosen, sample.rejected)
    with torch.no_grad():
        here, there = (score(backbone, model, batch_of(backbone, [one])) for one in (sample, other))
    assert abs(here.chosen - there.chosen).item() > 1e-3
    assert abs(here.rejected - there.rejected).item() > 1e-3
    torch.testing.assert_close(here.visual, there.visual)


def test_swapping_images_swaps_chosen_and_visual(backbone, model):
    sample = preference_samples(1)[0]
    swapped = PreferenceSample("s", sample.retrieved, sample.image, sample.prompt, sample.chosen, sample.rejected)
    with torch.no_grad():
        here, there = (score(backbone, model, batch_of(backbone, [one])) for one in (sample, swapped))
    torch.testing.assert_close(here.chosen, there.visual, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(here.visual, there.chosen, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("views", "images_per_sample"),
    [(("chosen",), 1), (("chosen", "rejected"), 1), (("chosen", "rejected", "visual"), 2)],
)
def test_every_distinct_image_is_encoded_once(backbone, model, views, images_per_sample):
    encoded = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, inputs, output: encoded.append(len(inputs[0]))
    )
    batch = batch_of(backbone, preference_samples(3))
    with torch.no_grad():
        scores = score(backbone, model, batch, views)
    handle.remove()
    assert encoded == [3 * images_per_sample]
    assert tuple(name for name, _ in scores.items()) == views


def test_head_sees_response_positions_only(backbone, model):
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel())
    )
    batch = batch_of(backbone, preference_samples(3))
    with torch.no_grad():
        score(backbone, model, batch)
    handle.remove()
    lengths = response_lengths(batch)
    assert seen == [int(lengths.chosen.sum() + lengths.rejected.sum() + lengths.visual.sum())]


def test_images_can_be_encoded_beforehand(backbone, model):
    batch = batch_of(backbone, preference_samples(2))
    with torch.no_grad():
        images = encode_batch_images(backbone, model, batch)
        torch.testing.assert_close(
            score(backbone, model, batch, images=images).visual, score(backbone, model, batch).visual
        )
        without = encode_batch_images(backbone, model, batch, ["chosen", "rejected"])
    with pytest.raises(ValueError, match="retrieved"):
        score(backbone, model, batch, images=without)
    with pytest.raises(ValueError, match="chosen"):
        score(backbone, model, batch, views=["rejected"])


def test_gradient_reaches_the_adapter_and_nothing_else(backbone):
    model = LoRA(r=2, alpha=4, dropout=0.0).apply(backbone, backbone.load_model())
    scores = score(backbone, model, batch_of(backbone, preference_samples(2)))
    (scores.chosen - scores.rejected - scores.visual).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all("language_model" in name and "lora_" in name for name in with_gradient)


def test_sums_are_float32_also_under_bfloat16(backbone):
    """A head of zeros gives every word of V the same probability: N tokens are N ln(1/V), to float32's digits."""
    half = AutoBackbone(backbone.path, dtype="bfloat16")
    model = half.load_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    sample = preference_samples(1)[0]
    long = dataclasses.replace(sample, chosen=" ".join(["a red bus stands beside two people."] * 20))
    batch = batch_of(half, [long])
    with torch.no_grad():
        scores = score(half, model, batch)
    count = int(batch.chosen.response_mask.sum())
    assert count > 150
    assert scores.chosen.dtype == torch.float32
    assert scores.chosen.item() == pytest.approx(-count * math.log(model.config.text_config.vocab_size), rel=1e-5)
