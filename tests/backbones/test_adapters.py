import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.scoring import score
from tests.conftest import preference_samples


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


def test_lora_covers_every_linear_layer_of_the_language_model_and_nothing_else(backbone):
    model = backbone.load_model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.startswith("model.language_model.")}
    assert len(expected) == 2 * 7
    adapted = LoRA(r=2, alpha=4).apply(backbone, model)
    carriers = {
        name.removesuffix(".lora_A") for name, _ in adapted.get_base_model().named_modules() if name.endswith(".lora_A")
    }
    assert carriers == expected
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_defaults_are_the_papers():
    assert (LoRA().r, LoRA().alpha, LoRA().dropout) == (128, 256, 0.05)


def test_lora_twice_is_refused(backbone):
    once = LoRA(r=2).apply(backbone, backbone.load_model())
    with pytest.raises(ValueError, match="twice"):
        LoRA(r=2).apply(backbone, once)


def test_peft_options_pass_through(backbone):
    model = LoRA(r=2, alpha=4, options={"use_dora": True, "use_rslora": True}).apply(backbone, backbone.load_model())
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


def test_qlora_quantises_the_language_model_only_and_trains(tiny_llava):
    backbone = AutoBackbone(str(tiny_llava), quantization="nf4", dtype="float32")
    model = backbone.load_model()
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is bnb.nn.Linear4bit} == {
        name for name in kinds if name.startswith("model.language_model.")
    }
    assert kinds["lm_head"] is nn.Linear
    quantised = model.model.language_model.layers[0].mlp.up_proj.weight
    assert (quantised.quant_type, quantised.compress_statistics) == ("nf4", True)

    adapted = LoRA(r=2, alpha=4, dropout=0.0).apply(backbone, model)
    batch = backbone.collate([backbone.encode_sample(sample) for sample in preference_samples(2)])
    score(backbone, adapted, batch).chosen.sum().backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
