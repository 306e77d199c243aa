"""Estimates against models that are really loaded and trained, and against arithmetic at true size."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.cli import run
from realign_lightning.estimate import CARDS, Card, Estimate, Flops, Job, Memory, Parameters, estimate
from realign_lightning.estimate.empty import empty_models, nf4_bytes
from realign_lightning.estimate.example import FINGERPRINT, example_batch
from realign_lightning.estimate.trial import measure_optimizer
from realign_lightning.losses import RDPOLoss, SFTLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.modules.cache import Entry
from tests.tiny_models import FAMILIES, LLAVA_TEMPLATE, llama_tokenizer, make_tiny, square

ROOT = Path(__file__).parent.parent
RECIPES = [
    path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name not in ("build", "eval", "evidence")
]


class Measured(NamedTuple):
    """Bytes and FLOPs of a model that was really loaded and trained."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    saved: int
    peak: int
    forward: int
    backward: int


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of storages by address, each once."""
    return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside packed weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return tensors


def measure(job: Job) -> Measured:
    """Load the job's module from disk and train it, on batches of the same size as the estimate's."""
    module, dtype = job.module, job.autocast_dtype
    batch = example_batch(module.backbone, job.batch_size).batch
    weights, reference = storages(tensors_of(module.policy)), storages(tensors_of(module.reference))
    kept = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights | reference:
            kept[storage.data_ptr()] = storage
        return value

    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda value: value):
            loss = module.training_step(batch, 0)
        saved = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            module.training_step(batch, 0).backward()
    optimizer = module.make_optimizer([value for value in module.policy.parameters() if value.requires_grad])
    optimizer.step()
    return Measured(
        weights=sum(weights.values()),
        reference=sum(reference.values()),
        gradients=sum(value.grad.nbytes for value in module.policy.parameters() if value.grad is not None),
        optimizer=sum(storages(states_of(optimizer)).values()),
        saved=saved,
        peak=peak_of(profiled),
        forward=forward.get_total_flops(),
        backward=backward.get_total_flops(),
    )


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def peak_of(profiled: profile) -> int:
    """Most bytes that were allocated at a time, beside what was there when the profile began."""
    events = profiled.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


def backbone_of(family: str, folder: Path, **settings) -> AutoBackbone:
    return (PaliGemmaBackbone if family == "paligemma" else AutoBackbone)(str(folder), **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_llava):
    """Folder of a tiny checkpoint by family."""
    made = {"llava": tiny_llava}

    def folder_of(family: str) -> Path:
        if family == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor asks for it")
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp("estimate") / family)
        return made[family]

    return folder_of


def check(make_job) -> None:
    """Compare an estimate with a measurement: what lasts to the byte, what passes within a few percent."""
    estimated, measured = estimate(make_job()), measure(make_job())
    memory, flops = estimated.memory, estimated.flops
    assert memory.weights == measured.weights
    assert memory.reference == measured.reference
    assert memory.gradients == measured.gradients
    assert memory.optimizer == measured.optimizer
    assert memory.saved == pytest.approx(measured.saved, rel=0.02)
    assert memory.activations == pytest.approx(measured.peak, rel=0.15)
    if make_job().module.backbone.quantization is None:
        # PyTorch's counter does not know the products of bitsandbytes.
        assert flops.images + flops.policy + flops.reference == measured.forward
        assert flops.recomputed + flops.backward == measured.backward


# ---- against really loaded and trained models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_measured(family, folders):
    check(lambda: Job(RDPOModule(backbone_of(family, folders(family)))))


SMALL = {"r": 4, "alpha": 8, "dropout": 0.0}
MODULES = {
    "lora": lambda: {"adapter": LoRA(**SMALL)},
    "projector": lambda: {"adapter": LoRA(**SMALL), "trained_parts": ["projector"]},
    "tower": lambda: {"adapter": LoRA(**SMALL, parts=["language_model", "vision_tower"])},
    "copy": lambda: {"adapter": LoRA(**SMALL), "reference": "frozen_copy"},
    "dora": lambda: {"adapter": LoRA(**SMALL, options={"use_dora": True})},
    "dpo": lambda: {"adapter": LoRA(**SMALL), "loss": RDPOLoss(visual_weight=0.0)},
    "full": dict,
    "parts": lambda: {"trained_parts": ["language_model", "head"]},
    "sft": lambda: {"loss": SFTLoss()},
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [*((kind, False) for kind in MODULES), *((kind, True) for kind in ("lora", "projector", "tower", "full"))],
)
def test_llava_as_measured(kind, checkpointing, tiny_llava):
    check(
        lambda: Job(
            RDPOModule(AutoBackbone(str(tiny_llava)), gradient_checkpointing=checkpointing, **MODULES[kind]()),
            batch_size=2,
        )
    )


@pytest.mark.parametrize("kind", ["lora", "projector", "tower", "full", "dpo"])
def test_a_cached_reference_as_measured(kind, tiny_llava):
    """Neither memory nor arithmetic of a reference."""

    def make_job() -> Job:
        module = RDPOModule(AutoBackbone(str(tiny_llava)), reference="cached", **MODULES[kind]())
        # The real step that is measured needs values to look up; the estimate does not.
        module.reference.entries = {FINGERPRINT: Entry(-1.0, -2.0, -3.0)}
        return Job(module, batch_size=2)

    check(make_job)
    live = estimate(Job(RDPOModule(AutoBackbone(str(tiny_llava)), **MODULES[kind]()), batch_size=2))
    cached = estimate(make_job())
    assert live.flops.reference > 0.9 * live.flops.policy
    assert cached.flops.reference == cached.memory.reference == 0
    assert (cached.flops.policy, cached.flops.backward) == (live.flops.policy, live.flops.backward)
    encoded_twice = kind in ("projector", "tower", "full")
    assert cached.flops.images == pytest.approx(live.flops.images / (2 if encoded_twice else 1), rel=0.1)
    assert re.search(r"reference +0.00  none runs in a training step", cached.as_text())


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [("llava", "projector", True), ("llava", "copy", False), ("qwen2_5_vl", "lora", True)],
)
def test_4_bit_as_measured(family, kind, checkpointing, folders):
    check(
        lambda: Job(
            RDPOModule(
                AutoBackbone(str(folders(family)), dtype="bfloat16", quantization="nf4"),
                gradient_checkpointing=checkpointing,
                **MODULES[kind](),
            ),
            batch_size=2,
            precision="bf16-mixed",
        )
    )


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_16_bits_take_the_same_whichever_they_are(precision, tiny_llava):
    def memory(dtype: str, precision: str) -> Memory:
        backbone = AutoBackbone(str(tiny_llava), dtype=dtype)
        return estimate(Job(RDPOModule(backbone, adapter=LoRA(**SMALL)), precision=precision)).memory

    assert memory("float16", precision) == memory("bfloat16", f"bf{precision}")


@pytest.mark.parametrize(("kind", "dtype"), [("projector", "bfloat16"), ("full", "bfloat16"), ("full", "float32")])
def test_mixed_precision_as_measured(kind, dtype, folders):
    check(
        lambda: Job(
            RDPOModule(
                AutoBackbone(str(folders("qwen2_5_vl")), dtype=dtype), gradient_checkpointing=True, **MODULES[kind]()
            ),
            batch_size=2,
            precision="bf16-mixed",
        )
    )


def test_only_eager_attention_keeps_matrices_of_scores(tiny_llava):
    """Eager: float32 scores of 3 rows, 4 heads and L x L tokens in each of 2 layers. Fused: the mask as numbers.

    Both in padded rows; sdpa shares prompts, which keeps less.
    """

    def job(attention: str) -> Job:
        return Job(RDPOModule(AutoBackbone(str(tiny_llava), attn_implementation=attention), adapter=LoRA(**SMALL)))

    check(lambda: job("eager"))
    kinds = ("eager", "sdpa", "flash_attention_2")
    eager, shared, fused = (estimate(job(attention), length=300).memory.saved for attention in kinds)
    assert shared < 0.9 * fused
    assert eager - fused == pytest.approx(2 * 3 * 300 * 300 * 4 * (4 - 1), rel=0.02)


def test_dropout_keeps_a_mask_of_one_byte_as_on_gpus(tiny_llava, monkeypatch):
    def native(value, p=0.5, training=True, inplace=False):
        return torch.native_dropout(value, p, True)[0] if training and p else value

    def job() -> Job:
        return Job(RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(r=4, alpha=8, dropout=0.1)))

    estimated = estimate(job())
    monkeypatch.setattr(F, "dropout", native)
    assert estimated.memory.saved == pytest.approx(measure(job()).saved, rel=0.02)


def test_dropout_is_torchs_own_again_after_an_estimate(tiny_llava):
    before = F.dropout
    estimate(Job(RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(**SMALL))))
    assert F.dropout is before


class TestOptimizers:
    @staticmethod
    def job(tiny_llava, optimizer, **settings) -> Job:
        module = RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(r=64), optimizer=optimizer)
        return Job(module, **settings)

    @staticmethod
    def trained(job: Job) -> list[nn.Parameter]:
        return [value for value in job.module.policy.parameters() if value.requires_grad]

    @pytest.mark.parametrize(
        "optimizer",
        [
            torch.optim.AdamW,
            lambda weights: torch.optim.AdamW(weights, amsgrad=True),
            lambda weights: torch.optim.SGD(weights, lr=0.1),
            lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
            torch.optim.Adagrad,
            bnb.optim.AdamW8bit,
        ],
        ids=["adamw", "amsgrad", "sgd", "momentum", "adagrad", "adamw8bit"],
    )
    def test_states_as_measured(self, optimizer, tiny_llava):
        job = self.job(tiny_llava, optimizer)
        trained = self.trained(job)
        real = job.module.make_optimizer(trained)
        for value in trained:
            value.grad = torch.ones_like(value)
        real.step()
        assert measure_optimizer(job, trained)[0] == sum(storages(states_of(real)).values())

    def test_those_that_look_at_values_are_reckoned_by_the_element(self, tiny_llava):
        """Adafactor keeps 256 + 256 + 1 numbers of four bytes for 256 x 256 weights."""
        job = self.job(tiny_llava, torch.optim.Adafactor)
        elements = sum(value.numel() for value in self.trained(job))
        expected = elements * (256 + 256 + 1) * 4 / 256**2
        assert measure_optimizer(job, self.trained(job))[0] == pytest.approx(expected, abs=1)

    def test_foreach_holds_a_copy_for_a_moment(self, tiny_llava):
        """AdamW's denominators, of all weights at a time (torch.optim, "foreach"), unless told otherwise or sharded."""

        def temporary(optimizer, **settings) -> int:
            job = self.job(tiny_llava, optimizer, **settings)
            return measure_optimizer(job, self.trained(job))[1]

        job = self.job(tiny_llava, torch.optim.AdamW)
        together, one = (pick(value.nbytes for value in self.trained(job)) for pick in (sum, max))
        assert temporary(torch.optim.AdamW) == pytest.approx(together, rel=0.02)
        assert temporary(lambda weights: torch.optim.AdamW(weights, foreach=False)) <= 3 * one
        assert temporary(torch.optim.AdamW, layout="fsdp2") <= 3 * one


def test_16_bit_training_as_the_trainer_does_it(tiny_llava):
    from lightning.pytorch import Trainer

    def job() -> Job:
        return Job(RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(**SMALL)), precision="bf16-true")

    module = job().module
    batch = example_batch(module.backbone, 1).batch
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, precision="bf16-true", enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader([0], collate_fn=lambda _: batch))
    memory = estimate(job()).memory
    assert memory.weights == sum(storages(tensors_of(module.policy)).values())
    assert memory.optimizer == sum(storages(states_of(trainer.optimizers[0])).values())
    assert memory.gradients == sum(value.numel() * 2 for value in module.policy.parameters() if value.requires_grad)


TWO_RANKS = """
import json, sys
import torch
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile
from realign_lightning.backbones import AutoBackbone
from realign_lightning.estimate.example import example_batch
from realign_lightning.modules import FSDP2Strategy, RDPOModule
from tests.test_estimate import peak_of, states_of

def held(tensors):
    return sum((value.to_local() if hasattr(value, "to_local") else value).nbytes for value in tensors)

class Measured(RDPOModule):
    def on_fit_start(self):
        models = {"weights": self.policy, "reference": self.reference}
        self.found = {name: held([*model.parameters(), *model.buffers()]) for name, model in models.items()}

    def on_train_batch_start(self, batch, index):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_after_backward(self):
        self.profile.__exit__(None, None, None)

    def on_train_batch_end(self, outputs, batch, index):
        gradients = [value.grad for value in self.policy.parameters() if value.grad is not None]
        self.found |= {"gradients": held(gradients), "optimizer": held(states_of(self.trainer.optimizers[0]))}
        self.found["peak"] = peak_of(self.profile)

torch.set_num_threads(1)
module = Measured(AutoBackbone(sys.argv[1], dtype="float32"), gradient_checkpointing=True, lr_scheduler=None)
batch = example_batch(module.backbone, 2).batch
trainer = Trainer(
    accelerator="cpu", devices=2, strategy=FSDP2Strategy(), precision="bf16-mixed", max_steps=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, torch.utils.data.DataLoader([0] * 4, collate_fn=lambda _: batch))
if trainer.is_global_zero:
    with open(sys.argv[2], "w") as file:
        json.dump(module.found, file)
"""


def test_shards_as_measured_with_two_ranks(tiny_llava, tmp_path):
    script, output = tmp_path / "two_ranks.py", tmp_path / "found.json"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "two_ranks", str(tiny_llava), str(output)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    subprocess.run(command, check=True, timeout=300, cwd=ROOT, env=environment)  # noqa: S603
    found = json.loads(output.read_text())
    module = RDPOModule(AutoBackbone(str(tiny_llava), dtype="float32"), gradient_checkpointing=True)
    memory = estimate(Job(module, batch_size=2, devices=2, layout="fsdp2", precision="bf16-mixed")).memory
    for name in ("weights", "reference", "gradients", "optimizer"):
        assert getattr(memory, name) == found[name], name
    # What bfloat16 products take beside their result depends on the CPU: up to a fifth of these few megabytes.
    assert memory.activations + memory.communication == pytest.approx(found["peak"], rel=0.25)


@pytest.mark.parametrize("elements", [64, 4096, 64 * 257, 128 * 96 + 64])
def test_4_bit_bytes_as_bitsandbytes_keeps_them(elements):
    weight = torch.randn(elements // 32, 32, dtype=torch.bfloat16)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = packed.quant_state
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(elements) == sum(storages(parts).values())


def test_dtype_of_the_checkpoint(tiny_llava, tmp_path):
    backbone = AutoBackbone(str(tiny_llava), dtype="bfloat16")
    backbone.load_model().save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    check(lambda: Job(RDPOModule(AutoBackbone(str(tmp_path), dtype="auto"), adapter=LoRA(**SMALL))))


# ---- against arithmetic


def clip_large_336() -> int:
    """CLIP ViT-L/14 at 336 pixels: class and 24 x 24 positions, convolution without bias, 24 layers, two norms."""
    hidden, mlp, positions = 1024, 4096, 24 * 24 + 1
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * mlp + mlp + hidden + 4 * hidden
    return hidden + positions * hidden + 3 * 14 * 14 * hidden + 24 * layer + 4 * hidden


class Vicuna(NamedTuple):
    """A Llama with as many key as query heads."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int = 32064

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Shapes of a layer's matrices."""
        return [(self.hidden, self.hidden)] * 4 + [(self.hidden, self.mlp)] * 3

    @property
    def matrices(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linear)

    @property
    def total(self) -> int:
        """Embeddings, head, layers with two norms each, one norm."""
        norms = (2 * self.layers + 1) * self.hidden
        return 2 * self.vocabulary * self.hidden + self.matrices + norms

    @property
    def projector(self) -> int:
        return 1024 * self.hidden + self.hidden + self.hidden * self.hidden + self.hidden

    def lora(self, rank: int) -> int:
        return self.layers * sum(rank * (rows + columns) for rows, columns in self.linear)


VICUNAS = {"7b": Vicuna(4096, 32, 32, 11008), "13b": Vicuna(5120, 40, 40, 13824)}
LLAVA_TOTALS = {"7b": 7_063_427_072, "13b": 13_351_494_656}


def save_true_size(folder: Path, text: Vicuna) -> Path:
    """Configuration and processor of LLaVA 1.5, no weights; the tokenizer is a tiny one."""
    tokenizer = llama_tokenizer()
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=square(336)),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=text.hidden,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.heads,
            intermediate_size=text.mlp,
            vocab_size=text.vocabulary,
            max_position_embeddings=4096,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def true_size(tmp_path_factory):
    return {size: save_true_size(tmp_path_factory.mktemp("true") / size, text) for size, text in VICUNAS.items()}


@pytest.mark.parametrize("size", VICUNAS)
def test_parameters_of_llava_15(size, true_size):
    text = VICUNAS[size]
    backbone = AutoBackbone(str(true_size[size]), dtype="bfloat16")
    models = empty_models(Job(RDPOModule(backbone, adapter=LoRA(r=128), trained_parts=["projector"])))
    assert clip_large_336() + text.projector + text.total == LLAVA_TOTALS[size]
    assert sum(models.base.values()) == LLAVA_TOTALS[size]
    assert models.count_trained() == {"projector": text.projector, "adapter of language_model": text.lora(128)}


@pytest.mark.parametrize("size", VICUNAS)
def test_bytes_of_llava_15_in_4_bit(size, true_size):
    """Half a byte per weight, a byte per 64 of them, four bytes per 64 x 256 and 1092 bytes of tables per matrix."""
    text = VICUNAS[size]
    backbone = AutoBackbone(str(true_size[size]), dtype="bfloat16", quantization="nf4")
    models = empty_models(Job(RDPOModule(backbone, adapter=LoRA(r=128), reference="frozen_copy")))
    matrices = text.layers * sum(
        rows * columns * (1 / 2 + 1 / 64) + 4 * math.ceil(rows * columns / 64 / 256) + 1092
        for rows, columns in text.linear
    )
    rest = 2 * (LLAVA_TOTALS[size] - text.matrices)
    # Rotary frequencies, twice, and the positions of the tower's patches.
    buffers = 2 * 4 * text.hidden // text.heads // 2 + 8 * 577
    assert sum(models.base[name] for name in models.quantised) == text.matrices
    assert models.stored_bytes(models.reference) == matrices + rest + buffers
    assert models.stored_bytes(models.policy) == matrices + rest + buffers + 4 * text.lora(128)


def test_full_fine_tuning_of_13b_on_eight_cards(true_size):
    """Every first dimension divides by 8, but for the vectors of the tower's class, which are shards of 128."""
    backbone = AutoBackbone(str(true_size["13b"]), dtype="float32")
    job = Job(RDPOModule(backbone, trained_parts=["language_model"]), devices=8, layout="fsdp2", precision="bf16-mixed")
    models = empty_models(job)
    positions = 1024 * (math.ceil(577 / 8) - 577 / 8)
    buffers = 2 * 4 * 128 // 2 + 8 * 577
    expected = 4 * (LLAVA_TOTALS["13b"] / 8 + positions) + buffers
    assert models.stored_bytes(models.policy) == expected == models.stored_bytes(models.reference)


def test_flops_of_the_language_model(tiny_llava):
    """Two per weight and token, four per pair of tokens and channel; the head sees responses only.

    Per sample two responses of R tokens and one of R - 1: a prompt of P tokens with two responses, and another with
    one. Responses look at their prompt and, masked, at each other; causal halves count in full. The tiny language
    model: 2 layers of width 64, keys and values of width 32, MLP of width 128. Without weight gradients of frozen
    layers the backward pass of a LoRA is the forward pass and the adapters' once more, less what nothing asks for: the
    gradient of the first layer's input.
    """
    length, response, rank = 200, 50, 4
    prompt, both = length - response, 2 * response - 1
    tokens = 2 * (prompt + both + length)
    adapter = LoRA(r=rank, alpha=8, dropout=0.0)
    job = Job(RDPOModule(AutoBackbone(str(tiny_llava)), adapter=adapter), batch_size=2, accumulate_grad_batches=3)
    flops = estimate(job, length, response).flops
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    matrices = 2 * tokens * sum(ins * outs for ins, outs in shapes)
    adapters = 2 * tokens * sum(rank * (ins + outs) for ins, outs in shapes)
    attention = 4 * 2 * (prompt * prompt + both * (prompt + both) + length * length) * 64
    vocabulary = len(llama_tokenizer())
    head = 2 * 2 * (3 * response - 1) * 64 * vocabulary
    assert flops.reference == 3 * (2 * (matrices + attention) + head)
    assert flops.policy == 3 * (2 * (matrices + attention + adapters) + head)
    assert flops.recomputed == 0
    assert flops.total == flops.images + flops.policy + flops.reference + flops.backward


def test_tokens_and_views(tiny_llava):
    def tokens(loss) -> tuple[int, int]:
        module = RDPOModule(AutoBackbone(str(tiny_llava)), loss, LoRA(**SMALL))
        job = Job(module, batch_size=2, accumulate_grad_batches=4, devices=2, num_nodes=3, layout="ddp")
        result = estimate(job, length=180)
        return result.samples_per_step, result.tokens_per_step

    # Chosen and rejected share what stands before the 128 tokens of a response; the rejected one has 127.
    assert tokens(RDPOLoss()) == (2 * 4 * 6, 2 * 4 * 6 * (180 + 127 + 180))
    assert tokens(RDPOLoss(visual_weight=0.0)) == (2 * 4 * 6, 2 * 4 * 6 * (180 + 127))


def test_ddp_keeps_gradients_twice(tiny_llava):
    def communication(**settings) -> tuple[int, int]:
        module = RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(**SMALL))
        memory = estimate(Job(module, devices=2, layout="ddp", **settings)).memory
        return memory.communication, memory.gradients

    twice, gradients = communication()
    assert twice == gradients > 0
    assert communication(gradient_as_bucket_view=True)[0] == 0


def made_up(**changes) -> Estimate:
    settings = {
        "model": "Llava",
        "dtype": "bfloat16",
        "layout": "ddp",
        "devices": 4,
        "batch_size": 2,
        "accumulate_grad_batches": 5,
        "views": 3,
        "length": 700,
        "tokens": 2 * 1600,
        "response_tokens": 100,
        "gradient_checkpointing": True,
        "parameters": Parameters(10**9, {"projector": 10**6}, 0),
        "memory": Memory(5 * 10**9, 4 * 10**9, 3 * 10**9, 2 * 10**9, 10**9, 10**8, 6 * 10**9, 10**9),
        "flops": Flops(10**15, 2 * 10**15, 3 * 10**15, 4 * 10**15, 10 * 10**15),
    }
    return Estimate(**settings | changes)


def test_hours():
    """20e15 FLOPs for 40 samples: 8000 samples are 4e18, on 4 cards at half of 100e12 a second 20 000 seconds."""
    assert made_up().hours(Card("", 80, 100), samples=8000, utilisation=0.5) == pytest.approx(20_000 / 3600)


def test_memory_is_that_of_the_worst_moment():
    """The optimizer steps when activations are gone: 5 + 4 + 3 + 2 + 1 GB that last, and the larger of 1 and 6."""
    result = made_up()
    assert result.memory.total == 21 * 10**9
    assert result.fits(Card("", 22, 1))
    assert not result.fits(Card("", 21.9, 1))


@pytest.mark.parametrize(
    ("samples", "utilisation", "name"), [(0, 0.5, "samples"), (1, 0, "utilis"), (1, 1.1, "utilis")]
)
def test_impossible_assumptions_are_refused(samples, utilisation, name):
    with pytest.raises(ValueError, match=name):
        made_up().as_text(samples, utilisation)


def test_cards_without_bfloat16_are_marked():
    def v100(**changes) -> str:
        return next(line for line in made_up(**changes).as_text().splitlines() if "V100" in line)

    assert "no bfloat16" in v100()
    assert "no bfloat16" not in v100(dtype="float16")
    assert "several times slower" in made_up(dtype="float32").as_text()


# ---- lengths


class TestLengths:
    @pytest.fixture
    def backbone(self, tiny_llava):
        return AutoBackbone(str(tiny_llava), max_length=250)

    def test_rows_have_the_length_that_is_asked_for(self, backbone):
        example = example_batch(backbone, 3, length=200, response_tokens=40)
        for name, response in (("chosen", 40), ("rejected", 39), ("visual", 40)):
            view = getattr(example.batch, name)
            assert view.lengths.tolist() == [response] * 3
            assert view.tokens["attention_mask"].sum(dim=1).tolist() == [160 + response] * 3
        assert example.length == 200

    def test_default_is_the_picture_in_its_template_and_64_tokens_of_text(self, tiny_llava):
        """LLaVA's tiny processor writes 9 image tokens."""
        backbone = AutoBackbone(str(tiny_llava))
        template = backbone.processor.tokenizer("USER: \nWhat is this? ASSISTANT:")["input_ids"]
        example = example_batch(backbone, 1)
        assert example.length == pytest.approx(9 + len(template) + 64 + 128, abs=3)
        images = example.batch.chosen.tokens["input_ids"] == backbone.image_token_id
        assert images.sum() == 9

    def test_default_stays_within_max_length(self, tiny_llava):
        assert example_batch(AutoBackbone(str(tiny_llava), max_length=170), 1).length == 170

    @pytest.mark.parametrize(
        ("length", "response", "message"),
        [
            (30, 20, "`--length` to be at least"),
            (251, 20, "at most the backbone's `max_length` of 250"),
            (None, 240, "`max_length` to hold a prompt"),
            (200, 0, "`--response-tokens` to be at least 1"),
        ],
    )
    def test_lengths_that_do_not_fit_are_refused(self, backbone, length, response, message):
        with pytest.raises(ValueError, match=message):
            example_batch(backbone, 1, length, response)


# ---- jobs


class TestJobs:
    @pytest.fixture
    def module(self, tiny_llava):
        return RDPOModule(AutoBackbone(str(tiny_llava)), adapter=LoRA(**SMALL))

    @pytest.mark.parametrize(
        ("devices", "expected"),
        [("auto", 1), (-1, 1), ("-1", 1), (4, 4), ("4", 4), ([0, 2, 3], 3), ("0,1", 2), ("3,", 1)],
    )
    def test_devices(self, module, devices, expected):
        assert Job.from_settings(module, 1, {"devices": devices}).devices == expected

    @pytest.mark.parametrize(
        ("strategy", "devices", "layout"),
        [
            ("auto", 1, "single"),
            (None, 1, "single"),
            ("auto", 2, "ddp"),
            ("ddp_find_unused_parameters_true", 2, "ddp"),
            ({"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": None}, 2, "ddp"),
            ({"class_path": "realign_lightning.modules.FSDP2Strategy"}, 8, "fsdp2"),
            ({"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy"}, 1, "single"),
        ],
    )
    def test_strategies(self, module, strategy, devices, layout):
        job = Job.from_settings(module, 1, {"strategy": strategy, "devices": devices, "num_nodes": 1})
        assert job.layout == layout
        assert job.shards == (8 if layout == "fsdp2" else 1)

    def test_ddp_options(self, module):
        spec = {"class_path": "DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
        assert Job.from_settings(module, 1, {"strategy": spec, "devices": 2}).gradient_as_bucket_view

    @pytest.mark.parametrize(
        ("precision", "name"), [(None, "32-true"), (16, "16-mixed"), ("bf16", "bf16-mixed"), ("bf16-true", "bf16-true")]
    )
    def test_precisions(self, module, precision, name):
        assert Job.from_settings(module, 1, {"precision": precision}).precision == name

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"strategy": "deepspeed_stage_3"}, "trainer.strategy"),
            ({"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}, "FSDP2Strategy"),
            ({"precision": "transformer-engine"}, "trainer.precision"),
            ({"devices": 0}, "devices"),
        ],
    )
    def test_what_is_not_known_is_refused(self, module, settings, message):
        with pytest.raises(ValueError, match=message):
            Job.from_settings(module, 1, settings)

    def test_4_bit_weights_cannot_be_sharded(self, tiny_llava):
        module = RDPOModule(AutoBackbone(str(tiny_llava), quantization="nf4"), adapter=LoRA(**SMALL))
        with pytest.raises(ValueError, match="FSDP cannot shard 4-bit weights"):
            estimate(Job(module, devices=2, layout="fsdp2"))

    def test_4_bit_weights_cannot_be_trained(self, tiny_llava):
        """Refused with the words that training refuses it with."""
        job = Job(RDPOModule(AutoBackbone(str(tiny_llava), quantization="nf4"), trained_parts=["head"]))
        for refuse in (lambda: estimate(job), lambda: job.module.policy):
            with pytest.raises(ValueError, match="A 4-bit model cannot be trained in full"):
                refuse()

    def test_the_jobs_module_is_left_alone(self, module):
        estimate(Job(module))
        assert module._policy is None
        assert not any(parameter.is_meta for parameter in module.policy.parameters())


# ---- the command


@pytest.fixture
def on_tiny(tiny_llava):
    return ["--model.backbone.init_args.path", str(tiny_llava)]


def test_command_writes_json(on_tiny, capsys):
    """Nowhere on this machine are there two GPUs or the recipe's shards."""
    recipe = ["--config", str(ROOT / "recipes" / "llava13b_qlora.yaml"), *on_tiny]
    more = ["--trainer.accelerator", "cuda", "--trainer.devices", "2", "--data.train", "nowhere"]
    assert run(["estimate", *recipe, *more, "--json", "--samples", "640", "--utilisation", "0.5"]) is None
    result = json.loads(capsys.readouterr().out)
    assert result["layout"] == "ddp"
    assert result["samples_per_step"] == 64
    backbone = AutoBackbone(on_tiny[1], dtype="bfloat16", quantization="nf4")
    packed = sum(storages(tensors_of(backbone.load_model())).values())
    adapter, projector = result["parameters"]["trained"].values()
    assert sorted(result["parameters"]["trained"]) == ["adapter of language_model", "projector"]
    assert result["memory"]["weights"] == packed + 4 * (adapter + projector)
    assert result["memory"]["gradients"] == 4 * (adapter + projector)
    assert [card["name"] for card in result["cards"]] == [card.name for card in CARDS]
    first = result["cards"][0]
    assert first["hours"] == pytest.approx(result["flops"]["total"] * 10 / (2 * 312e12 * 0.5) / 3600)
    assert first["fits"]


def test_command_prints_a_table(on_tiny, capsys):
    recipe = ["--config", str(ROOT / "recipes" / "llava7b_lora.yaml"), *on_tiny]
    run(["estimate", *recipe, "--length", "200", "--response-tokens", "60", "--trainer.accumulate_grad_batches", "7"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "LlavaForConditionalGeneration" in text
    assert re.search(r"step +7 samples: 1 x 1 device \(single\) x 7 accumulated", text)
    assert "140 tokens of prompt and picture (640 x 480), 60 of response" in text
    for name in ("weights", "gradients", "optimizer", "activations", "total", "images", "backward", "H100 SXM"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_as_fit_reads_it(recipe, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(
        "realign_lightning.estimate.command.estimate", lambda job, *lengths: jobs.append(job) or made_up()
    )
    run(["estimate", "--config", str(recipe)])
    (job,), settings = jobs, yaml.safe_load(recipe.read_text())
    trainer = settings["trainer"]
    assert job.devices == trainer["devices"]
    assert job.accumulate_grad_batches == trainer.get("accumulate_grad_batches", 1)
    assert job.precision == trainer.get("precision", "32-true")
    assert (job.layout == "fsdp2") == ("fsdp2" in str(trainer.get("strategy")))
    assert job.module.gradient_checkpointing == settings["model"].get("gradient_checkpointing", False)


def test_command_refuses_before_it_works(on_tiny, capsys, monkeypatch):
    monkeypatch.setattr("realign_lightning.estimate.command.estimate", None)
    recipe = ["estimate", "--config", str(ROOT / "recipes" / "llava7b_lora.yaml"), *on_tiny]
    with pytest.raises(ValueError, match="--samples"):
        run([*recipe, "--samples", "0"])
    with pytest.raises(ValueError, match=r"trainer\.strategy"):
        run([*recipe, "--trainer.strategy", "fsdp"])
    with pytest.raises(SystemExit) as stop:
        run(["estimate", "--json"])
    assert stop.value.code == 2
    assert "expected a recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(["estimate", "--help"])
    assert stop.value.code == 0
    assert "--utilisation" in capsys.readouterr().out
