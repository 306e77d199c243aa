import copy
import shutil

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.scoring import score
from tests.conftest import preference_samples
from tests.tiny_models import make_tiny


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merged", [False, True])
def test_scaling_between_the_matrices_changes_no_bit(tiny_llava, dtype, merged):
    """Against PEFT's own layers, which scale behind them; of the answers and of the gradients."""
    backbone = AutoBackbone(str(tiny_llava), dtype=dtype)
    ours = LoRA(r=4, alpha=8, dropout=0.0).apply(backbone, backbone.load_model())
    theirs = get_peft_model(backbone.load_model(), ours.peft_config["default"])
    variants = [m for m in ours.modules() if isinstance(m, LoraLayer) and m.lora_variant]
    assert len(variants) == 2 * 7
    assert not any(m.lora_variant for m in theirs.modules() if isinstance(m, LoraLayer))
    fill_adapters(ours)
    theirs.load_state_dict(ours.state_dict())
    batch = backbone.collate([backbone.encode_sample(sample) for sample in preference_samples(2)])
    values = []
    for model in (ours, theirs):
        scored = model.merge_and_unload(safe_merge=True) if merged else model
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            values.append(score(backbone, scored, batch))
        if not merged:
            values[-1].chosen.sum().backward()
    assert torch.equal(values[0].chosen, values[1].chosen)
    assert torch.equal(values[0].visual, values[1].visual)
    blank = score(backbone, backbone.load_model(), batch)
    assert (values[0].chosen - blank.chosen).abs().min() > 0.1
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=3, alpha=4),
        LoRA(r=4, alpha=8, options={"use_dora": True}),
        LoRA(r=4, alpha=8, options={"lora_bias": True}, target_modules=r".*language_model.*(q|k|v)_proj"),
    ],
)
def test_other_layers_stay_pefts(tmp_path, lora):
    """No power of two would round differently, DoRA has a forward of its own, a bias is scaled too."""
    # Of the families, the one whose layers have the bias that lora_bias asks for.
    backbone = AutoBackbone(str(make_tiny("qwen2_5_vl", tmp_path / "qwen")))
    model = lora.apply(backbone, backbone.load_model())
    kinds = {
        type(variant).__module__
        for m in model.modules()
        if isinstance(m, LoraLayer)
        for variant in m.lora_variant.values()
    }
    assert kinds == ({"peft.tuners.lora.variants"} if "use_dora" in lora.options else set())


def test_a_copy_of_a_16_bit_model_computes_with_its_own_projector(tiny_llava):
    backbone = AutoBackbone(str(tiny_llava), dtype="bfloat16")
    model = backbone.load_model()
    adapted = LoRA(r=2, alpha=4, dropout=0.0).apply(backbone, model, backbone.projector_modules(model))
    batch = backbone.collate([backbone.encode_sample(sample) for sample in preference_samples(2)])
    with torch.no_grad():
        before = score(backbone, adapted, batch).chosen
        copied = copy.deepcopy(adapted)
        for name, value in adapted.named_parameters():
            if "modules_to_save" in name:
                value += 0.3
        assert torch.equal(score(backbone, copied, batch).chosen, before)
        assert not torch.equal(score(backbone, adapted, batch).chosen, before)


def test_merging_in_place_and_back(backbone):
    model = LoRA(r=4, alpha=8, dropout=0.0).apply(backbone, backbone.load_model())
    fill_adapters(model)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    before = layer.base_layer.weight.clone()
    layer.merge()
    expected = before + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=1e-6, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=1e-6, atol=1e-6)


def fill_adapters(model) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.copy_(0.2 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_projector_is_trained_in_float32_beside_a_16_bit_model(tiny_llava, quantization):
    backbone = AutoBackbone(str(tiny_llava), dtype="bfloat16", quantization=quantization)
    model = backbone.load_model()
    batch = backbone.collate([backbone.encode_sample(sample) for sample in preference_samples(2)])
    with torch.no_grad():
        before = score(backbone, model, batch)
    adapted = LoRA(r=2, alpha=4, dropout=0.0).apply(backbone, model, backbone.projector_modules(model))
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    projector = {name: value for name, value in trained.items() if "lora_" not in name}
    assert {backbone.parts(adapted)[name] for name in projector} == {"projector"}
    assert all(value.dtype == torch.float32 for value in trained.values())
    frozen = [value for name, value in adapted.named_parameters() if "original_module" in name]
    assert frozen
    assert all(value.dtype == torch.bfloat16 and not value.requires_grad for value in frozen)
    with torch.no_grad():
        torch.testing.assert_close(score(backbone, adapted, batch).chosen, before.chosen, rtol=2e-2, atol=0.3)
    optimizer = torch.optim.SGD(projector.values(), lr=0.1)
    score(backbone, adapted, batch).visual.sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert (score(backbone, adapted, batch).visual - before.visual).abs().max() > 0.1
        with adapted.disable_adapter():
            again = score(backbone, adapted, batch)
    torch.testing.assert_close(again.visual, before.visual, rtol=0, atol=0)


def test_an_unknown_target_says_what_there_is(backbone):
    with pytest.raises(ValueError, match=r"cannot be put on LlavaForConditionalGeneration.*\n.*'q_proj'"):
        LoRA(r=2, target_modules="nothing").apply(backbone, backbone.load_model())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_reference_are_refused(backbone, start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the weights below"):
        LoRA(r=2, options={"init_lora_weights": start}).apply(backbone, backbone.load_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "trains weights of the model itself"),
        ({"use_dorra": True}, "does not take .* `adapter`: .*dorra"),
    ],
)
def test_other_options_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(r=2, options=options).apply(backbone, backbone.load_model())


def test_missing_weights_are_refused_instead_of_made_up(tiny_llava, tmp_path):
    shutil.copytree(tiny_llava, tmp_path / "partial")
    file = tmp_path / "partial" / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "q_proj" not in name}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 8 weights, .*q_proj"):
        AutoBackbone(str(tmp_path / "partial")).load_model()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_options_that_start_from_the_base_cannot_be_sharded(backbone, options):
    assert LoRA(options={"use_rslora": True}).starts_blank
    with pytest.raises(ValueError, match="FSDP cannot shard LoRA with"):
        backbone.load_sharded(None, LoRA(r=2, options=options))


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
