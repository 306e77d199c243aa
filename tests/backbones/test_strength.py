"""The strength of an adapter against weights that are put together by hand."""

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file

from realign_lightning.backbones import AdapterStrength, AutoBackbone, LoRA
from tests.conftest import picture


@pytest.fixture(scope="module")
def backbone(tiny_llava) -> AutoBackbone:
    return AutoBackbone(str(tiny_llava), dtype="float32")


def trained(backbone, **options) -> PeftModel:
    """An adapter and a projector that have moved."""
    model = LoRA(4, 6, 0.0, options=options).apply(backbone, backbone.load_model(), ["multi_modal_projector"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def model(backbone) -> PeftModel:
    return trained(backbone)


@pytest.fixture(scope="module")
def logits_of(backbone):
    inputs = backbone.encode_prompts(["describe the image.", "no people."], [picture(0), picture(1)])

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    return logits


def merged_by_hand(backbone, model, strength: float):
    """The base with strength times alpha / r times B A added to every adapted layer, and the projector in between."""
    base = backbone.load_model()
    state = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, weight in base.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.default.weight" in state:
                down, up = state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]
                weight += strength * (6 / 4) * up @ down
            elif "multi_modal_projector" in name:
                other = name.replace("multi_modal_projector.", "multi_modal_projector.modules_to_save.default.")
                weight.mul_(1 - strength).add_(strength * state[other])
    return base


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.5])
def test_the_model_between_base_and_trained(backbone, model, logits_of, strength):
    expected = logits_of(merged_by_hand(backbone, model, strength))
    AdapterStrength(model).set(strength)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_strengths_differ_and_those_at_the_ends_are_exact(model, logits_of):
    whole = logits_of(model)
    with model.disable_adapter():
        base = logits_of(model)
    assert not torch.allclose(base, whole, atol=1e-2)
    strength = AdapterStrength(model)
    strength.set(0.7)
    assert not torch.allclose(logits_of(model), whole, atol=1e-3)
    strength.set(0)
    assert torch.equal(logits_of(model), base)
    strength.set(1)
    assert torch.equal(logits_of(model), whole)


def test_a_turned_adapter_is_not_taken_for_a_trained_one(model, logits_of):
    first, whole = AdapterStrength(model), logits_of(model)
    first.set(0.5)
    with pytest.raises(ValueError, match=r"has set this model to 0\.5"):
        AdapterStrength(model)
    first.set(1.0)
    AdapterStrength(model).set(1.0)
    assert torch.equal(logits_of(model), whole)


def test_what_is_written_is_the_model_at_that_strength(backbone, model, logits_of, tmp_path):
    strength = AdapterStrength(model)
    strength.set(0.6)
    expected = logits_of(model)
    strength.save(tmp_path / "adapter")
    assert torch.equal(logits_of(model), expected), "writing changes nothing"
    found = PeftModel.from_pretrained(backbone.load_model(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-5)
    first = load_file(Path(tmp_path) / "adapter" / "adapter_model.safetensors")
    strength.set(1)
    strength.save(tmp_path / "whole")
    whole = load_file(Path(tmp_path) / "whole" / "adapter_model.safetensors")
    assert first.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], value) == ("lora_A" in name), name


def test_what_has_no_strength_is_refused(backbone, model):
    with pytest.raises(TypeError, match="Expected a model with an adapter, got LlavaForConditionalGeneration"):
        AdapterStrength(backbone.load_model())
    with pytest.raises(ValueError, match="DoRA"):
        AdapterStrength(trained(backbone, use_dora=True))
    other = get_peft_model(
        backbone.load_model(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(TypeError, match="Expected a LoRA adapter, got IA3"):
        AdapterStrength(other)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        AdapterStrength(merged)
    with pytest.raises(ValueError, match="finite strength, got inf"):
        AdapterStrength(model).set(float("inf"))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(model, bias):
    model.peft_config["default"].bias = bias
    with pytest.raises(ValueError, match=f"without trained biases, got bias='{bias}'"):
        AdapterStrength(model)


def test_an_inactive_adapter_is_not_written(backbone, tmp_path):
    model = LoRA(4, 6, 0.0).apply(backbone, backbone.load_model())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 1 if ".second." in name else 2
    strength = AdapterStrength(model)
    strength.set(0.25)
    strength.save(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists(), "the inactive one"
    written = load_file(tmp_path / "second" / "adapter_model.safetensors")
    values = {value for name, weight in written.items() if "lora_B" in name for value in weight.unique().tolist()}
    assert values == {0.25}, "B begins with zeros, 1 was added"


def test_several_adapters_are_refused(backbone):
    model = LoRA(4, 6, 0.0).apply(backbone, backbone.load_model())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter"):
        AdapterStrength(model)
