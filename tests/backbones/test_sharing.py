"""One row for chosen and rejected: which families share, that nothing changes by it, and what is computed how often."""

import copy
import functools
import json

import pytest
import torch
from torch import nn
from transformers import Gemma4ForConditionalGeneration, Molmo2ForConditionalGeneration

from realign_lightning.backbones import AutoBackbone, LoRA, head
from realign_lightning.backbones.packing import PACKED_SDPA, Packing, Tree, packed_sdpa
from realign_lightning.modules import RDPOModule
from realign_lightning.scoring import make_rows, score
from realign_lightning.types import View
from tests.backbones.test_families import backbone_of, batch_of, samples_of_different_sizes
from tests.tiny_models import FAMILIES, make_tiny

CANNOT = {"gemma3", "paligemma"}
WEIGHTS = {"chosen": 1.0, "rejected": -0.5, "visual": 0.7}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family, tmp_path_factory) -> AutoBackbone:
    return backbone_of(family, make_tiny(family, tmp_path_factory.mktemp("sharing") / family))


@pytest.fixture(scope="module")
def model(backbone) -> nn.Module:
    return backbone.load_model()


def plain_log_probs(model, encoded) -> dict[str, torch.Tensor]:
    """Every view by the model's plain forward: one row, no padding, pixels passed, float64 log-softmax."""
    values = {}
    for name in WEIGHTS:
        view = getattr(encoded, name)
        images = encoded.retrieved if name == "visual" else encoded.image
        pixels = {key: value for key, value in images.items() if key not in ("num_image_tokens", "num_images")}
        tokens = {key: value[None] for key, value in view.tokens.items()}
        logits = model(**tokens, **pixels, attention_mask=torch.ones_like(tokens["input_ids"])).logits[0]
        places = view.response_mask.nonzero()[:, 0]
        chosen = torch.log_softmax(logits.double(), dim=-1)[places - 1, tokens["input_ids"][0, places]]
        values[name] = chosen.sum()
    return values


def gradient(model, value) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in model.parameters()]
    )


def weighted(values) -> torch.Tensor:
    return sum(WEIGHTS[name] * value.sum() for name, value in values.items())


def test_shares_unless_attention_forbids(family, backbone, model):
    batch = batch_of(backbone, samples_of_different_sizes())
    assert (make_rows(backbone, model, batch).packing is not None) == (family not in CANNOT)
    assert make_rows(backbone, model, batch, share_prefix=False).packing is None
    if family in CANNOT:
        with pytest.raises(ValueError, match=r"share_prefix=True, but .* tokens see those behind them"):
            make_rows(backbone, model, batch, share_prefix=True)
    else:
        assert make_rows(backbone, model, batch, share_prefix=True).packing is not None


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_log_probs_and_gradients_equal_the_plain_forward(backbone, model, share_prefix):
    """Log-probs to 1e-5 and gradients of every weight, vision tower included, to 1e-4, each relative."""
    encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
    batch = backbone.collate(encoded)
    model.requires_grad_(True)
    plain = [plain_log_probs(model, one) for one in encoded]
    expected = {name: torch.stack([one[name] for one in plain]) for name in WEIGHTS}
    expected_gradient = gradient(model, weighted(expected))
    scores = score(backbone, model, batch, rows=make_rows(backbone, model, batch, share_prefix=share_prefix))
    values = dict(scores.items())
    for name, value in values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0)
    assert expected_gradient.norm() > 1
    # What is far below the whole is the rounding of sums that cancel.
    floor = 1e-6 * expected_gradient.norm()
    sizes = [parameter.numel() for parameter in model.parameters()]
    found = torch.split(gradient(model, weighted(values)), sizes)
    names = [name for name, _ in model.named_parameters()]
    for name, one, two in zip(names, found, torch.split(expected_gradient, sizes), strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm() + floor, name
    model.requires_grad_(False)


def test_one_sample_padded_left_or_right(backbone, model):
    batch = batch_of(backbone, samples_of_different_sizes()[:1])
    with torch.no_grad():
        before = dict(score(backbone, model, batch).items())
    for padding in ((5, 0), (0, 5), (3, 4)):
        padded = copy.copy(batch)
        for name in WEIGHTS:
            setattr(padded, name, pad(getattr(batch, name), padding, backbone.pad_token_id))
        for share_prefix in ("auto", False):
            rows = make_rows(backbone, model, padded, share_prefix=share_prefix)
            with torch.no_grad():
                after = dict(score(backbone, model, padded, rows=rows).items())
            for name, value in before.items():
                torch.testing.assert_close(after[name], value, rtol=1e-5, atol=0)


def pad(view, padding, pad_token_id):
    tokens = {
        name: nn.functional.pad(value, padding, value=pad_token_id if name == "input_ids" else 0)
        for name, value in view.tokens.items()
    }
    return View(tokens, nn.functional.pad(view.response_mask, padding))


def test_bfloat16_is_near_the_plain_forward(family, backbone, model):
    """Of the same 16-bit model, and no nearer to what another image gives."""
    encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
    batch = backbone.collate(encoded)
    half = backbone_of(family, backbone.path)
    half.dtype = "bfloat16"
    rounded_model = half.load_model()
    with torch.no_grad():
        plain = [plain_log_probs(rounded_model, one) for one in encoded]
        rounded = dict(score(half, rounded_model, batch).items())
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        expected = torch.stack([one[name] for one in plain])
        torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)
        # Rounding has no side: a drift would show in the mean.
        assert ((value - expected) / expected).mean().abs() < 5e-3


def count_encodings(inner) -> list[tuple[int, bool]]:
    """A list that gets, for every call of the vision tower and projector, its images (or patches) and whether it is
    recorded for gradients."""
    calls = []
    encode = inner.base_model.get_image_features

    @functools.wraps(encode)
    def counted(*args, **kwargs):
        calls.append((len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]), torch.is_grad_enabled()))
        return encode(*args, **kwargs)

    inner.base_model.get_image_features = counted
    return calls


def test_every_token_and_image_once(family, backbone):
    """Counted at the layers: B trees of prompt, chosen and rejected, B of prompt and chosen; 2B images."""
    samples = samples_of_different_sizes()
    encoded = [backbone.encode_sample(sample) for sample in samples]
    module = RDPOModule(backbone, adapter=LoRA(r=2, alpha=4, dropout=0.0))
    inner = module.policy.get_base_model()
    tokens, heads = [], []
    inner.get_decoder().layers[0].register_forward_hook(
        lambda layer, inputs, kwargs, output: tokens.append(output.shape[:-1].numel()), with_kwargs=True
    )
    inner.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, output: heads.append(output.shape[:-1].numel())
    )
    images = count_encodings(inner)
    batch = backbone.collate(encoded)
    policy, _ = module.score(batch)
    lengths = [{n: len(getattr(one, n).response_mask) for n in WEIGHTS} for one in encoded]
    answers = [{n: int(getattr(one, n).response_mask.sum()) for n in WEIGHTS} for one in encoded]
    if family in CANNOT:
        expected = 3 * len(samples) * max(max(row.values()) for row in lengths)
    else:
        expected = sum(
            row["chosen"] + answer["rejected"] + row["visual"] for row, answer in zip(lengths, answers, strict=True)
        )
    assert tokens == [expected, expected], "reference and policy, one forward each"
    assert heads == [sum(sum(row.values()) for row in answers)] * 2
    pixels = len(batch.images["pixel_values"]) + len(batch.retrieved["pixel_values"])
    assert images == [(pixels, False)], "frozen image path: each image once, for policy and reference"
    assert policy.visual.requires_grad


def test_trained_projector_is_encoded_by_each_model(backbone):
    module = RDPOModule(backbone, adapter=LoRA(r=2, alpha=4, dropout=0.0), trained_parts=["projector"])
    images = count_encodings(module.policy.get_base_model())
    batch = batch_of(backbone, samples_of_different_sizes())
    module.score(batch)
    pixels = len(batch.images["pixel_values"]) + len(batch.retrieved["pixel_values"])
    assert sorted(images) == [(pixels, False), (pixels, True)]


def test_head_in_chunks_changes_nothing_and_holds_less(backbone, model, monkeypatch):
    batch = batch_of(backbone, samples_of_different_sizes())
    model.requires_grad_(True)
    whole = score(backbone, model, batch)
    expected = gradient(model, weighted(dict(whole.items())))
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    vocabulary = model.config.get_text_config().vocab_size
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", 5 * vocabulary)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        chunked = score(backbone, model, batch)
    for (_, one), (_, two) in zip(whole.items(), chunked.items(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    assert all(shape.numel() // shape[-1] <= 5 for shape in seen)
    assert not [shape for shape in kept if len(shape) and shape[-1] == vocabulary and shape.numel() > vocabulary]
    difference = gradient(model, weighted(dict(chunked.items()))) - expected
    assert difference.norm() <= 1e-5 * expected.norm()
    hook.remove()
    model.requires_grad_(False)


def test_generates_as_before(backbone, model):
    """The attention that understands packed rows is plain sdpa for anything else."""
    samples = samples_of_different_sizes()
    inputs = backbone.encode_prompts([s.prompt for s in samples], [s.image for s in samples])
    answers = backbone.generate(model, inputs, max_new_tokens=6)
    other = copy.deepcopy(model)
    other.get_decoder().config._attn_implementation = "sdpa"
    assert backbone.generate(other, inputs, max_new_tokens=6) == answers


def test_gradient_checkpointing_changes_nothing(backbone):
    batch = batch_of(backbone, samples_of_different_sizes())
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = RDPOModule(
            backbone, adapter=LoRA(r=2, alpha=4, dropout=0.0), gradient_checkpointing=checkpointing
        ).train()
        for name, value in module.policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.1)
        gradients.append(gradient(module.policy, module.training_step(batch, 0)))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_the_reference_leaves_4_bit_weights_differentiable(tiny_llava):
    """On CPUs with bfloat16 instructions bitsandbytes repacks weights in eval mode, where the reference answers."""
    backbone = AutoBackbone(str(tiny_llava), dtype="float32", quantization="nf4")
    module = RDPOModule(backbone, adapter=LoRA(r=2, alpha=4, dropout=0.0)).train()
    for name, value in module.policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    batch = batch_of(backbone, samples_of_different_sizes())
    alone, _ = module.score(batch, with_reference=False)
    trained = [value for value in module.policy.parameters() if value.requires_grad]
    expected = torch.autograd.grad(weighted(dict(alone.items())), trained)
    beside, _ = module.score(batch)
    for one, two in zip(torch.autograd.grad(weighted(dict(beside.items())), trained), expected, strict=True):
        assert two.norm() > 0
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


class TestPackedAttention:
    packing = Packing((Tree(5, (2, 3)), Tree(4, (3,)), Tree(1, (1, 1))))

    def inputs(self, heads=4, key_heads=2):
        generator = torch.Generator().manual_seed(0)
        length = len(self.packing)
        query = torch.randn(1, heads, length, 8, generator=generator)
        key, value = (torch.randn(1, key_heads, length, 8, generator=generator) for _ in range(2))
        module = nn.Module()
        module.num_key_value_groups = heads // key_heads
        module.is_causal = True
        return module, query, key, value

    def test_equals_dense_attention_under_the_mask(self):
        module, query, key, value = self.inputs()
        output, _ = packed_sdpa(module, query, key, value, None, packing=self.packing, scaling=0.3)
        repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
        scores = (query @ repeated[0].transpose(-1, -2) * 0.3).masked_fill(~self.packing.mask("cpu"), -torch.inf)
        expected = (scores.softmax(dim=-1) @ repeated[1]).transpose(1, 2)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)

    def test_the_mask_lets_nothing_leak(self):
        """Written out from the definition: same tree, earlier, and prompt or own response."""
        mask = self.packing.mask("cpu")[0, 0]
        owner = ["p0"] * 5 + ["a0"] * 2 + ["b0"] * 3 + ["p1"] * 4 + ["a1"] * 3 + ["p2", "a2", "b2"]
        for query, key in torch.cartesian_prod(torch.arange(len(owner)), torch.arange(len(owner))).tolist():
            one, other = owner[query], owner[key]
            sees = key <= query and one[1] == other[1] and other in (one, f"p{one[1]}")
            assert bool(mask[query, key]) == sees

    def test_flex_block_mask_is_the_same(self):
        packing = Packing((Tree(150, (20, 30)), Tree(90, (40,))))
        mask = packing.block_mask("cpu")
        places = torch.arange(len(packing))
        dense = mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places)
        assert torch.equal(dense, packing.mask("cpu")[0, 0])
        assert mask.sparsity() > 0

    def test_masks_are_made_once(self, monkeypatch):
        made = []
        block_diag = torch.block_diag
        monkeypatch.setattr(torch, "block_diag", lambda *blocks: made.append(1) or block_diag(*blocks))
        packing = Packing(self.packing.trees)
        module, query, key, value = self.inputs()
        for _ in range(3):
            packed_sdpa(module, query, key, value, None, packing=packing)
        assert len(made) == 2, "one for each tree of two responses"

    def test_a_model_that_drops_the_packing_is_an_error(self):
        module, query, key, value = self.inputs()
        inputs = self.packing.attention_inputs(PACKED_SDPA, "cpu")
        with pytest.raises(RuntimeError, match="share_prefix to false"):
            packed_sdpa(module, query, key, value, inputs["attention_mask"])
        with pytest.raises(RuntimeError, match="Expected 20 keys for a packed row, got 19"):
            packed_sdpa(module, query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], None, packing=self.packing)


class TestOddModels:
    """On LLaVA, the simplest family, changed by hand."""

    @pytest.fixture
    def llava(self, tiny_llava) -> AutoBackbone:
        return AutoBackbone(str(tiny_llava))

    def test_scaled_and_soft_capped_logits(self, llava, monkeypatch):
        """A family that scales and caps its logits: ours follow its forward, in chunks too."""
        model = llava.load_model()
        kind = type(model)

        class Capped(kind):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = 3.0 * torch.tanh(output.logits * 0.25 / 3.0)
                return output

        model.__class__ = Capped
        encoded = [llava.encode_sample(sample) for sample in samples_of_different_sizes()]
        monkeypatch.setattr(head, "LOGITS_AT_A_TIME", 7 * model.config.text_config.vocab_size)
        with torch.no_grad():
            scores = dict(score(llava, model, llava.collate(encoded)).items())
            expected = [plain_log_probs(model, one) for one in encoded]
            model.__class__ = kind
            uncapped = dict(score(llava, model, llava.collate(encoded)).items())
        for name, value in scores.items():
            torch.testing.assert_close(value.double(), torch.stack([one[name] for one in expected]), rtol=1e-5, atol=0)
            assert (value - uncapped[name]).abs().max() > 1

    def test_soft_capping_of_paligemma_2(self, tmp_path):
        """The one VLM family with final_logit_softcapping in its own forward."""
        backbone = backbone_of("paligemma", make_tiny("paligemma", tmp_path / "paligemma"))
        encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
        model = backbone.load_model()
        with torch.no_grad():
            before = score(backbone, model, backbone.collate(encoded)).chosen
            model.config.get_text_config().final_logit_softcapping = 2.0
            scores = dict(score(backbone, model, backbone.collate(encoded)).items())
            expected = [plain_log_probs(model, one) for one in encoded]
        for name, value in scores.items():
            torch.testing.assert_close(value.double(), torch.stack([one[name] for one in expected]), rtol=1e-5, atol=0)
        assert (before - scores["chosen"]).abs().min() > 1

    def test_families_with_masks_of_their_own_are_not_shared(self, llava):
        """Gemma 4 and Molmo2 let image tokens see each other, told by token types that a packed row has not."""
        for kind in (Gemma4ForConditionalGeneration, Molmo2ForConditionalGeneration):
            config = kind.config_class()
            with torch.device("meta"):
                model = kind._from_config(config, attn_implementation="sdpa")
            model.get_decoder().config._attn_implementation = PACKED_SDPA
            assert "tokens see those behind them" in llava.unshared_reason(model, 10), kind

    @pytest.mark.parametrize("window", [0, -1])
    def test_windows_as_long_as_the_sequences(self, window, tmp_path):
        """Mistral, whose layers look back ``sliding_window`` tokens: packed where that is far enough, and right."""
        folder = make_tiny("llava_next_mistral", tmp_path / "mistral")
        backbone = backbone_of("llava_next_mistral", folder)
        encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
        longest = max(len(getattr(one, name).response_mask) for one in encoded for name in WEIGHTS)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = longest + window
        (folder / "config.json").write_text(json.dumps(config))
        model, batch = backbone.load_model(), backbone.collate(encoded)
        rows = make_rows(backbone, model, batch)
        assert (rows.packing is not None) == (window == 0)
        with torch.no_grad():
            scores = dict(score(backbone, model, batch, rows=rows).items())
            plain = [plain_log_probs(model, one) for one in encoded]
        for name, value in scores.items():
            torch.testing.assert_close(value.double(), torch.stack([one[name] for one in plain]), rtol=1e-5, atol=0)

    def test_positions_that_follow_the_longest_row_are_refused(self, llava):
        """Dynamic RoPE beyond its context: one long response would change every other sample of the batch."""
        model = llava.load_model()
        batch = llava.collate([llava.encode_sample(sample) for sample in samples_of_different_sizes()])
        longest = max(getattr(batch, name).response_mask.shape[1] for name in WEIGHTS)
        config = model.get_decoder().config
        config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        for share_prefix in ("auto", False):
            config.max_position_embeddings = longest
            make_rows(llava, model, batch, share_prefix=share_prefix)
            config.max_position_embeddings = longest - 1
            with pytest.raises(ValueError, match=f"longer than the {longest - 1} .* max_length to {longest - 1}"):
                make_rows(llava, model, batch, share_prefix=share_prefix)

    def test_chosen_must_be_there(self, llava):
        batch = llava.collate([llava.encode_sample(sample) for sample in samples_of_different_sizes()])
        with pytest.raises(ValueError, match=r"Expected the views to hold 'chosen', got \['rejected'\]"):
            make_rows(llava, llava.load_model(), batch, ["rejected"])

    def test_4_bit_rows_equal_the_plain_forward_of_the_same_weights(self, tiny_llava, monkeypatch):
        backbone = AutoBackbone(str(tiny_llava), dtype="float32", quantization="nf4")
        model = backbone.load_model()
        encoded = [backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
        monkeypatch.setattr(head, "LOGITS_AT_A_TIME", 7 * model.config.text_config.vocab_size)
        with torch.no_grad():
            scores = dict(score(backbone, model, backbone.collate(encoded)).items())
            plain = [plain_log_probs(model, one) for one in encoded]
            whole = AutoBackbone(str(tiny_llava), dtype="float32")
            other = score(whole, whole.load_model(), whole.collate(encoded))
        for name, value in scores.items():
            torch.testing.assert_close(value.double(), torch.stack([one[name] for one in plain]), rtol=1e-5, atol=0)
        assert (other.chosen - scores["chosen"]).abs().max() > 0.01, "they are other weights"

    def test_short_windows_are_not_shared(self, llava):
        model = llava.load_model()
        batch = llava.collate([llava.encode_sample(sample) for sample in samples_of_different_sizes()])
        longest = max(getattr(batch, name).response_mask.shape[1] for name in WEIGHTS)
        config = model.get_decoder().config
        config.sliding_window = longest
        assert make_rows(llava, model, batch).packing is not None
        config.sliding_window = longest - 1
        assert make_rows(llava, model, batch).packing is None
        with pytest.raises(ValueError, match=f"looks back {longest - 1} tokens only, and .* up to {longest}"):
            make_rows(llava, model, batch, share_prefix=True)
        config.sliding_window, config.layer_types = None, ["chunked_attention", "full_attention"]
        with pytest.raises(ValueError, match="has layers of chunked_attention"):
            make_rows(llava, model, batch, share_prefix=True)

    def test_other_attention_is_not_shared(self, llava):
        eager = AutoBackbone(llava.path, attn_implementation="eager")
        model = eager.load_model()
        batch = eager.collate([eager.encode_sample(sample) for sample in samples_of_different_sizes()])
        with pytest.raises(ValueError, match="attention runs through 'eager': set the backbone's attn_implementation"):
            make_rows(eager, model, batch, share_prefix=True)
        with torch.no_grad():
            expected, scores = score(llava, llava.load_model(), batch), score(eager, model, batch)
        torch.testing.assert_close(scores.rejected, expected.rejected, rtol=1e-5, atol=0)

    def test_flex_attention(self, llava):
        """Forward only: PyTorch has no backward pass of FlexAttention for CPUs."""
        flex = AutoBackbone(llava.path, attn_implementation="flex_attention")
        model = flex.load_model()
        batch = flex.collate([flex.encode_sample(sample) for sample in samples_of_different_sizes()])
        rows = make_rows(flex, model, batch, share_prefix=True)
        with torch.no_grad():
            expected, scores = score(llava, llava.load_model(), batch), score(flex, model, batch, rows=rows)
        for (_, one), (_, two) in zip(scores.items(), expected.items(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=0)

    def test_prompts_that_differ_are_not_shared(self, llava):
        """A batch made by hand, whose rejected view asks another question."""
        one, two = (llava.encode_sample(sample) for sample in samples_of_different_sizes()[:2])
        batch, other = llava.collate([one]), llava.collate([two])
        batch.rejected = other.rejected
        model = llava.load_model()
        rows = make_rows(llava, model, batch)
        assert [len(tree.responses) for tree in rows.packing.trees] == [1, 1, 1]
        with torch.no_grad():
            packed = dict(score(llava, model, batch, rows=rows).items())
            padded = score(llava, model, batch, rows=make_rows(llava, model, batch, share_prefix=False))
        for name, value in padded.items():
            torch.testing.assert_close(packed[name], value, rtol=1e-5, atol=0)


class TestCompiled:
    def module(self, folder, quantization=None, **settings) -> RDPOModule:
        torch.manual_seed(0)
        backbone = AutoBackbone(str(folder), quantization=quantization)
        module = RDPOModule(backbone, adapter=LoRA(r=2, alpha=4, dropout=0.0), **settings).train()
        for name, value in module.policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value, std=0.1)
        return module

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_same_gradients_and_no_compilation_per_length(self, family, tmp_path):
        folder = make_tiny(family, tmp_path / family)
        eager, compiled = self.module(folder), self.module(folder, compile_backend="aot_eager")
        encoded = [eager.backbone.encode_sample(sample) for sample in samples_of_different_sizes()]
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        counts = []
        for chosen in (encoded[:2], encoded, encoded[1:], encoded[2:], encoded[:1]):
            batch = eager.backbone.collate(chosen)
            expected = gradient(eager.policy, eager.training_step(batch, 0))
            found = gradient(compiled.policy, compiled.training_step(batch, 0))
            assert expected.norm() > 0
            assert (found - expected).norm() <= 1e-5 * expected.norm()
            counts.append(graphs["unique_graphs"])
        assert counts[0] > 0
        assert counts[-1] == counts[0]

    def test_4_bit(self, tiny_llava):
        eager = self.module(tiny_llava, quantization="nf4")
        compiled = self.module(tiny_llava, quantization="nf4", compile_backend="aot_eager")
        batch = batch_of(eager.backbone, samples_of_different_sizes())
        expected = gradient(eager.policy, eager.training_step(batch, 0))
        found = gradient(compiled.policy, compiled.training_step(batch, 0))
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-5 * expected.norm()

    def test_frozen_copies_are_compiled_too(self, tiny_llava):
        module = RDPOModule(AutoBackbone(str(tiny_llava)), compile_backend="aot_eager")
        module.configure_model()
        blocks = [*module.backbone.blocks(module.policy), *module.backbone.blocks(module.reference.model)]
        assert len(blocks) == 4
        assert all(block._compiled_call_impl is not None for block in blocks)

    def test_not_with_checkpointing(self, tiny_llava):
        with pytest.raises(ValueError, match=r"compile_backend.*gradient_checkpointing.*do not go together"):
            self.module(tiny_llava, compile_backend="inductor", gradient_checkpointing=True)
