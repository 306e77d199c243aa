"""What a preference trainer of vision-language models keeps, in float32 and in bfloat16, on a tiny LLaVA.

Every invariant is one `check_...` function, asserted on the package as it is and refuted on a package that was broken
on purpose: a check that cannot fail shows nothing.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface

from realign_lightning import scoring
from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.backbones.packing import PACKED_SDPA, packed_sdpa
from realign_lightning.losses import RDPOLoss, rdpo_loss, reward_metrics
from realign_lightning.modules import AdapterOff, FrozenCopy, RDPOModule
from realign_lightning.scoring import encode_batch_images, make_rows, response_lengths, score
from realign_lightning.types import VIEWS, EncodedSample, LogProbs, PreferenceBatch, PreferenceSample, View
from tests.backbones.test_sharing import pad, plain_log_probs
from tests.conftest import picture, preference_samples
from tests.losses.trl_loss import trl_preference_losses
from tests.reliability import engine_run

# Largest residuals, relative to what is above 1: float32, bfloat16. 0 is every bit.
TABLE = {
    "start": (1e-6, 1e-2),
    "adapter off": (0, 0),
    "reference unchanged": (0, 0),
    "padding, composition, order": (1e-5, 1e-2),
    "plain forward": (1e-5, 1e-2),
    "accumulation, checkpointing, DDP": (1e-4, 1e-2),
    "FSDP2": (1e-4, 2e-2),
    "save and load": (0, 0),
    "merged": (1e-5, 2e-2),
    "resumed": (0, 0),  # On CPU.
    "cached reference": (1e-5, 1e-2),
    "text flip": (1e-6, 1e-3),
    "visual flip": (1e-6, 1e-3),
    "finite differences": (1e-4, None),
    "no loss outside responses": (0, 0),
    "DPO": (1e-6, 1e-3),
    "4-bit": (None, 1e-2),
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class World:
    """A tiny backbone in one precision, its pretrained model and a batch."""

    dtype: str
    backbone: AutoBackbone
    model: nn.Module
    samples: list[PreferenceSample]
    encoded: list[EncodedSample]
    batch: PreferenceBatch

    def tolerance(self, row: str) -> float:
        return TABLE[row][DTYPES.index(self.dtype)]


def world_of(folder: Path, dtype: str) -> World:
    backbone = AutoBackbone(str(folder), dtype=dtype)
    samples = preference_samples(4)
    encoded = [backbone.encode_sample(sample) for sample in samples]
    return World(dtype, backbone, backbone.load_model(), samples, encoded, backbone.collate(encoded))


@pytest.fixture(scope="module", params=DTYPES)
def world(request, tiny_llava) -> World:
    return world_of(tiny_llava, request.param)


@pytest.fixture(scope="module")
def exact_world(tiny_llava) -> World:
    return world_of(tiny_llava, "float32")


def module_of(world: World, kind: type[RDPOModule] = RDPOModule, **settings) -> RDPOModule:
    torch.manual_seed(0)
    module = kind(world.backbone, **{"adapter": LoRA(4, 8, 0.0), "optimizer": sgd, "lr_scheduler": None} | settings)
    module.configure_model()
    return module


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.2, momentum=0.9)


def moved(module: RDPOModule) -> RDPOModule:
    """The module after an imagined training: an adapter that changes log-probs by whole nats."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.policy.named_parameters():
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    return module


def train(module: RDPOModule, batch: PreferenceBatch, steps: int = 3) -> None:
    optimizer = sgd([value for value in module.policy.parameters() if value.requires_grad])
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
    module.eval()


def stacked(scores: LogProbs) -> Tensor:
    return torch.cat([value for _, value in scores.items()]).detach()


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """No residual is above the tolerance, and their mean is far below: rounding has no side, a drift has one."""
    if tolerance == 0:
        assert torch.equal(found, expected)
        return
    residual = (found.double() - expected.double()) / expected.double().abs().clamp(min=1)
    assert residual.abs().max() <= tolerance
    assert residual.mean().abs() <= tolerance / 2


def test_a_one_sided_drift_within_the_tolerance_is_seen():
    expected = torch.full((12,), -50.0)
    noise = 0.3 * torch.tensor([1.0, -1.0]).repeat(6)
    check_close(expected + noise, expected, 1e-2)
    with pytest.raises(AssertionError):
        check_close(expected + noise.abs(), expected, 1e-2)


@contextlib.contextmanager
def refuted():
    """The check in this block fails, as it must where something is broken."""
    with pytest.raises(AssertionError):
        yield


# ---- step 0: the loss is 2 ln 2, rewards are 0


def check_start(module: RDPOModule, batch: PreferenceBatch, tolerance: float) -> None:
    with torch.no_grad():
        output = module.loss(*module.score(batch))
    check_close(output.losses, torch.full_like(output.losses, 2 * math.log(2)), tolerance)
    for rewards in output[1:]:
        check_close(rewards, torch.zeros_like(rewards), tolerance)


@pytest.mark.parametrize("adapter", [LoRA(4, 8, 0.0), None], ids=["lora", "full"])
def test_start(world, adapter):
    check_start(module_of(world, adapter=adapter), world.batch, world.tolerance("start"))


def test_start_refuted_by_an_adapter_that_does_something(world):
    with refuted():
        check_start(moved(module_of(world)), world.batch, world.tolerance("start"))


# ---- adapter off = base model; reference unchanged after N steps


def check_adapter_off(module: RDPOModule, world: World) -> None:
    train(module, world.batch)
    with torch.no_grad():
        policy, reference = module.score(world.batch)
        base = stacked(score(world.backbone, world.model, world.batch))
    check_close(stacked(reference), base, world.tolerance("adapter off"))
    assert (stacked(policy) - base).abs().max() > 0.1, "training has moved the policy"


def test_adapter_off(world):
    check_adapter_off(module_of(world), world)


def test_adapter_off_refuted_where_it_stays_on(world, monkeypatch):
    monkeypatch.setattr(AdapterOff, "use", lambda self, policy: contextlib.nullcontext(policy))
    with refuted():
        check_adapter_off(module_of(world), world)


def check_reference_unchanged(module: RDPOModule, batch: PreferenceBatch, training: Callable) -> None:
    with torch.no_grad():
        before = stacked(module.score(batch)[1])
        with torch.enable_grad():
            training(module, batch)
        check_close(stacked(module.score(batch)[1]), before, 0)


FULL = {"adapter": None, "reference": "frozen_copy"}


@pytest.mark.parametrize("settings", [{}, FULL], ids=["lora", "full"])
def test_reference_unchanged(world, settings):
    check_reference_unchanged(module_of(world, **settings), world.batch, train)


def test_reference_unchanged_refuted_by_a_base_weight_that_moves(world):
    def careless(module, batch):
        train(module, batch)
        next(world.backbone.image_parameters(module.policy)).data.mul_(1.01)

    with refuted():
        check_reference_unchanged(module_of(world), world.batch, careless)


def test_reference_unchanged_refuted_by_a_copy_that_is_none(world, monkeypatch):
    monkeypatch.setattr(FrozenCopy, "use", lambda self, policy: contextlib.nullcontext(policy))
    with refuted():
        check_reference_unchanged(module_of(world, **FULL), world.batch, train)


# ---- log-probs do not depend on padding, batch composition and order


def padded(world: World, batch: PreferenceBatch, padding: tuple[int, int]) -> PreferenceBatch:
    views = {name: pad(getattr(batch, name), padding, world.backbone.pad_token_id) for name in VIEWS}
    return dataclasses.replace(batch, **views)


def check_batches(world: World, share_prefix, lay_out: Callable = make_rows) -> None:
    def scores(batch):
        rows = lay_out(world.backbone, world.model, batch, share_prefix=share_prefix)
        with torch.no_grad():
            return torch.stack([value for _, value in score(world.backbone, world.model, batch, rows=rows).items()])

    collate = world.backbone.collate
    alone = torch.cat([scores(collate([one])) for one in world.encoded], dim=1)
    for found in (
        scores(world.batch),
        scores(collate(world.encoded[::-1])).flip(1),
        scores(padded(world, world.batch, (5, 7))),
    ):
        check_close(found, alone, world.tolerance("padding, composition, order"))


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_padding_composition_and_order(world, share_prefix):
    check_batches(world, share_prefix)


def test_padding_refuted_without_attention_mask(world):
    def unmasked(*args, **kwargs):
        rows = make_rows(*args, **kwargs)
        ones = torch.ones_like(rows.tokens["attention_mask"])
        return dataclasses.replace(rows, tokens={**rows.tokens, "attention_mask": ones})

    with refuted():
        check_batches(world, False, unmasked)


@contextlib.contextmanager
def packed_rows_see_each_other():
    """Plain causal attention over a packed row, as if the mask had been lost."""

    def causal(module, query, key, value, attention_mask, packing=None, **kwargs):
        return packed_sdpa(module, query, key, value, None, None, **{**kwargs, "is_causal": True})

    AttentionInterface.register(PACKED_SDPA, causal)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def test_composition_refuted_where_samples_see_each_other(world):
    with packed_rows_see_each_other(), refuted():
        check_batches(world, "auto")


# ---- shared prefix, shared images and a head on responses only = plain forward


def check_plain_forward(world: World, share_prefix, lay_out: Callable = make_rows) -> None:
    rows = lay_out(world.backbone, world.model, world.batch, share_prefix=share_prefix)
    with torch.no_grad():
        found = stacked(score(world.backbone, world.model, world.batch, rows=rows))
        plain = [plain_log_probs(world.model, one) for one in world.encoded]
    expected = torch.stack([one[name] for name in VIEWS for one in plain])
    check_close(found, expected, world.tolerance("plain forward"))


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_plain_forward(world, share_prefix):
    check_plain_forward(world, share_prefix)


def shifted_mask(rows):
    return dataclasses.replace(rows, positions=rows.positions - 1)


def swapped_images(rows):
    return dataclasses.replace(rows, images=rows.images[::-1])


def running_positions(rows):
    """Places that run on over the rejected response, as if it followed the chosen one."""
    places = torch.arange(rows.tokens["position_ids"].shape[-1]).expand_as(rows.tokens["position_ids"])
    return dataclasses.replace(rows, tokens={**rows.tokens, "position_ids": places})


@pytest.mark.parametrize("broken", [shifted_mask, swapped_images, running_positions])
def test_plain_forward_refuted(world, broken):
    with refuted():
        check_plain_forward(world, "auto", lambda *args, **kwargs: broken(make_rows(*args, **kwargs)))


# ---- gradient accumulation, activation checkpointing, DDP and FSDP2 = one process


def check_same_direction(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Gradients, or what training has moved, as one vector; relative to its length."""
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - expected).mean().abs() <= tolerance / 2 * expected.abs().mean()


def gradient(module: RDPOModule, batches: list[PreferenceBatch]) -> Tensor:
    module.train()
    for batch in batches:
        (module.training_step(batch, 0) / len(batches)).backward()
    return torch.cat([value.grad.flatten() for value in module.policy.parameters() if value.grad is not None])


@pytest.mark.parametrize("size", [1, 2])
def test_gradient_accumulation(world, size):
    """The mean over batches of one size is the mean over samples; over batches of 3 and 1 it is not."""
    expected = gradient(moved(module_of(world)), [world.batch])
    parts = [world.backbone.collate(world.encoded[start : start + size]) for start in range(0, 4, size)]
    unequal = [world.backbone.collate(part) for part in (world.encoded[:3], world.encoded[3:])]
    tolerance = world.tolerance("accumulation, checkpointing, DDP")
    check_same_direction(gradient(moved(module_of(world)), parts), expected, tolerance)
    with refuted():
        check_same_direction(gradient(moved(module_of(world)), unequal), expected, tolerance)


def test_activation_checkpointing(world):
    tolerance = world.tolerance("accumulation, checkpointing, DDP")
    expected = gradient(moved(module_of(world)), [world.batch])
    found = gradient(moved(module_of(world, gradient_checkpointing=True)), [world.batch])
    check_same_direction(found, expected, tolerance)
    broken = moved(module_of(world, gradient_checkpointing=True))
    calls = []

    def changes_when_recomputed(part, inputs, output):
        calls.append(part)
        return output * (1 + 0.05 * (len(calls) - 1))

    broken.backbone.blocks(broken.policy)[0].mlp.register_forward_hook(changes_when_recomputed)
    with refuted():
        check_same_direction(gradient(broken, [world.batch]), expected, tolerance)


@pytest.fixture(scope="module")
def engines(tiny_llava, tmp_path_factory, run_module) -> Path:
    """What two processes trained, by engine, precision and whether ranks know of each other's samples."""
    folder = tmp_path_factory.mktemp("engines")
    run_module("tests.reliability.engine_run", tiny_llava, folder, processes=2)
    return folder


@pytest.mark.parametrize(
    ("engine", "row"), [("ddp", "accumulation, checkpointing, DDP"), ("fsdp", "FSDP2")], ids=["ddp", "fsdp"]
)
def test_two_processes_are_one(world, engines, engine, row, tiny_llava):
    """Three samples and a stand-in; refuted where a rank takes its own mean for that of all samples."""
    one = engine_run.fit(str(tiny_llava), "one", world.dtype)
    expected = torch.cat([value.flatten() for value in engine_run.movement(one).values()])
    for broken in (False, True):
        moves = torch.load(engines / f"{engine}-{world.dtype}-{broken}.pt", weights_only=True)
        found = torch.cat([value.flatten() for value in moves.values()])
        with refuted() if broken else contextlib.nullcontext():
            check_same_direction(found, expected, world.tolerance(row))


# ---- save then load; adapter loaded again; merged adapter = adapter; resumed = undisturbed


def check_same_scores(world: World, model: nn.Module, other: nn.Module, tolerance: float) -> None:
    with torch.no_grad():
        found, expected = (stacked(score(world.backbone, one.eval(), world.batch)) for one in (other, model))
    check_close(found, expected, tolerance)


def fit(module: RDPOModule, world: World, folder: Path, ckpt_path: Path | None = None, epochs: int = 1) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(world.encoded, batch_size=2, collate_fn=world.backbone.collate)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16().to(value.dtype) for name, value in state.items()}


def test_save_then_load(world, tmp_path):
    module = module_of(world)
    fit(module, world, tmp_path).save_checkpoint(tmp_path / "run.ckpt")
    loaded = RDPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    check_same_scores(world, module.policy, loaded.policy, world.tolerance("save and load"))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    torch.save({**saved, "state_dict": rounded(saved["state_dict"])}, tmp_path / "rounded.ckpt")
    loaded = RDPOModule.load_from_checkpoint(tmp_path / "rounded.ckpt")
    with refuted():
        check_same_scores(world, module.policy, loaded.policy, world.tolerance("save and load"))


def test_adapter_loaded_again(world, tmp_path):
    module = module_of(world)
    train(module, world.batch)
    module.export(tmp_path, steps=3)
    plain = PeftModel.from_pretrained(world.backbone.load_model(), tmp_path, autocast_adapter_dtype=True)
    check_same_scores(world, module.policy, plain, world.tolerance("save and load"))
    plain.load_state_dict(rounded(plain.state_dict()))
    with refuted():
        check_same_scores(world, module.policy, plain, world.tolerance("save and load"))


def test_merged_adapter(world):
    module = moved(module_of(world))
    merged = copy.deepcopy(module.policy).merge_and_unload()
    check_same_scores(world, module.policy, merged, world.tolerance("merged"))
    other = copy.deepcopy(module.policy)
    for layer in other.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 1.5
    with refuted():
        check_same_scores(world, module.policy, other.merge_and_unload(), world.tolerance("merged"))


def check_resumed(world: World, folder: Path, change: Callable = lambda checkpoint: None) -> None:
    whole, first, second = (module_of(world) for _ in range(3))
    fit(whole, world, folder, epochs=3)
    fit(first, world, folder).save_checkpoint(folder / "one.ckpt")
    checkpoint = torch.load(folder / "one.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "one.ckpt")
    fit(second, world, folder, folder / "one.ckpt", epochs=3)
    check_same_scores(world, whole.policy, second.policy, world.tolerance("resumed"))
    for value, other in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        check_close(value, other, world.tolerance("resumed"))


def test_resumed(world, tmp_path):
    check_resumed(world, tmp_path)


def test_resumed_refuted_without_momentum(world, tmp_path):
    def forget(checkpoint):
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["momentum_buffer"].zero_()

    with refuted():
        check_resumed(world, tmp_path, forget)


# ---- cached reference = live reference


def test_cached_reference(world, tmp_path):
    """Computed one by one, looked up in a batch of all; refuted where samples get each other's values."""
    named = [dataclasses.replace(one, fingerprint=one.key) for one in world.encoded]
    module = module_of(world, reference="cached", reference_cache=str(tmp_path))
    module.cache_reference([world.backbone.collate([one]) for one in named])
    batch, live = world.backbone.collate(named), module_of(world)

    def check_cached() -> None:
        with torch.no_grad():
            found, expected = (stacked(one.score(batch)[1]) for one in (module, live))
        check_close(found, expected, world.tolerance("cached reference"))

    check_cached()
    entries = dict(module.reference.entries)
    module.reference.entries = dict(zip(entries, reversed(entries.values()), strict=True))
    with refuted():
        check_cached()


# ---- swapped sides flip their margin


class Drifting(RDPOModule):
    """Gives the policy's first and second response 0.05 nats more on one side, whichever text or image it is."""

    def score(self, *args, **kwargs):
        policy, reference = super().score(*args, **kwargs)
        return dataclasses.replace(policy, chosen=policy.chosen + 0.05), reference


def check_flip(module: RDPOModule, batches: tuple[PreferenceBatch, PreferenceBatch], name: str, tolerance: float):
    """In padded rows to the tolerance; in a packed one, where other kernels see the swapped row, to that share of the
    log-probs that the margin is a difference of."""
    with torch.no_grad():
        policy = module.score(batches[0])[0]
        here, there = (reward_metrics(module.loss(*module.score(batch)))[name] for batch in batches)
    scale = module.loss.beta * policy.chosen.abs().clamp(min=10) if module.share_prefix else torch.ones(())
    check_close(there / scale, -here / scale, tolerance)
    assert here.abs().min() > 2e-3, "margins that a flip can change"


def other_text(sample: PreferenceSample) -> PreferenceSample:
    return dataclasses.replace(sample, chosen=sample.rejected, rejected=sample.chosen)


def other_image(sample: PreferenceSample) -> PreferenceSample:
    return dataclasses.replace(sample, image=sample.retrieved, retrieved=sample.image)


@pytest.mark.parametrize(
    ("swap", "row", "name"),
    [(other_text, "text flip", "rewards/margins"), (other_image, "visual flip", "rewards/visual_margins")],
    ids=["text", "image"],
)
@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_swapped_sides_flip_the_margin(world, swap, row, name, share_prefix):
    swapped = world.backbone.collate([world.backbone.encode_sample(swap(sample)) for sample in world.samples])
    batches = (world.batch, swapped)
    check_flip(moved(module_of(world, share_prefix=share_prefix)), batches, name, world.tolerance(row))
    drifting = moved(module_of(world, Drifting, share_prefix=share_prefix))
    with refuted():
        check_flip(drifting, batches, name, world.tolerance(row))


# ---- gradient = float64 finite difference


def exact_loss(module: RDPOModule, model: nn.Module, encoded: list[EncodedSample], reference: LogProbs) -> Tensor:
    """The loss by the plain forward of a float64 model, without anything that is shared."""

    def double(pixels):
        return {name: value.double() if value.is_floating_point() else value for name, value in pixels.items()}

    wide = [dataclasses.replace(one, image=double(one.image), retrieved=double(one.retrieved)) for one in encoded]
    with torch.no_grad():
        plain = [plain_log_probs(model, one) for one in wide]
    policy = LogProbs(**{name: torch.stack([one[name] for one in plain]) for name in VIEWS})
    return rdpo_loss(policy, reference, module.loss.beta, module.loss.visual_weight).losses.mean()


def check_gradient(module: RDPOModule, world: World) -> None:
    """Along the gradient itself and along random directions, by central differences."""
    reference = LogProbs(**{name: value.double() for name, value in module.score(world.batch)[1].items()})
    module.policy.zero_grad()
    module.training_step(world.batch, 0).backward()
    trained = {name: value for name, value in module.policy.named_parameters() if value.requires_grad}
    gradients = {name: value.grad.double() for name, value in trained.items()}
    model = copy.deepcopy(module.policy).double().eval()
    weights = {name: value for name, value in model.named_parameters() if name in trained}
    generator = torch.Generator().manual_seed(0)

    def loss_at(width: float, step: dict[str, Tensor]) -> float:
        for name, value in weights.items():
            value.data += width * step[name]
        loss = float(exact_loss(module, model, world.encoded, reference))
        for name, value in weights.items():
            value.data -= width * step[name]
        return loss

    size = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    for sign in (None, 0, 1):
        step = {
            name: value / size
            if sign is None
            else value / size + torch.randn(value.shape, generator=generator) / math.sqrt(value.numel())
            for name, value in gradients.items()
        }
        found = float(sum((gradients[name] * step[name]).sum() for name in gradients))
        expected = slope(lambda width, step=step: loss_at(width, step))
        assert abs(found - expected) <= world.tolerance("finite differences") * abs(expected)


def slope(function: Callable[[float], float], width: float = 5e-3) -> float:
    """The derivative at 0 by five points: norms of the language model round to float32 even in float64."""
    near, far = (function(step) - function(-step) for step in (width, 2 * width))
    return (8 * near - far) / (12 * width)


class HalfDetached(RDPOModule):
    """Nothing flows back through the rejected response."""

    def score(self, *args, **kwargs):
        policy, reference = super().score(*args, **kwargs)
        return dataclasses.replace(policy, rejected=policy.rejected.detach()), reference


def test_gradient_is_the_finite_difference(exact_world):
    check_gradient(moved(module_of(exact_world)).eval(), exact_world)


def test_gradient_refuted_where_a_view_is_detached(exact_world):
    with refuted():
        check_gradient(moved(module_of(exact_world, HalfDetached)).eval(), exact_world)


# ---- prompt and image tokens carry no loss


def check_only_responses(world: World, batch: PreferenceBatch, share_prefix) -> None:
    """What is predicted is, in the texts' own order, every response and its end, and nothing else."""
    rows = make_rows(world.backbone, world.model, batch, share_prefix=share_prefix)
    backbone, size = world.backbone, len(batch)
    for number, view in enumerate(VIEWS):
        for row, sample in enumerate(world.samples):
            ids = rows.labels[rows.sums == number * size + row].tolist()
            text = sample.rejected if view == "rejected" else sample.chosen
            assert ids[:-1] == backbone.response_tokenizer(sample.prompt)([text])[0]
            assert ids[-1] in backbone.end_token_ids
    seen = []
    handle = world.model.lm_head.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].shape[-2]))
    with torch.no_grad():
        score(backbone, world.model, batch, rows=rows)
    handle.remove()
    assert sum(seen) == len(rows.labels)


class Shift(NamedTuple):
    places: int

    def __call__(self, view: View) -> View:
        return View(view.tokens, view.response_mask.roll(self.places, dims=1))


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_prompt_and_image_tokens_carry_no_loss(world, share_prefix):
    check_only_responses(world, world.batch, share_prefix)


@pytest.mark.parametrize("places", [-1, 1])
def test_no_loss_refuted_by_a_mask_shifted_by_one(world, places):
    shift = Shift(places)
    shifted = dataclasses.replace(world.batch, **{name: shift(getattr(world.batch, name)) for name in VIEWS})
    with refuted():
        check_only_responses(world, shifted, False)


# ---- visual_weight 0 = DPO


def check_dpo(module: RDPOModule, batch: PreferenceBatch, tolerance: float) -> None:
    with torch.no_grad():
        policy, reference = module.score(batch)
        found = module.loss(policy, reference, response_lengths(batch)).losses.mean()
    check_close(found[None], trl_preference_losses(policy, reference, 0.1, "sigmoid")[None], tolerance)


def test_visual_weight_0_is_dpo(world):
    module = moved(module_of(world, loss=RDPOLoss(visual_weight=0)))
    check_dpo(module, world.batch, world.tolerance("DPO"))


def test_dpo_refuted_by_a_small_visual_weight(world):
    with refuted():
        check_dpo(moved(module_of(world, loss=RDPOLoss(visual_weight=0.01))), world.batch, world.tolerance("DPO"))


# ---- control: another image changes the log-probs


def check_image_matters(world: World, encode: Callable = encode_batch_images) -> None:
    """Those beside it by more than rounding could; those beside the other image by no bit, in padded rows."""
    sample = world.samples[0]
    scores = []
    for image in (sample.image, picture(99)):
        encoded = world.backbone.encode_sample(dataclasses.replace(sample, image=image))
        batch = world.backbone.collate([encoded])
        images = encode(world.backbone, world.model, batch)
        rows = make_rows(world.backbone, world.model, batch, share_prefix=False)
        with torch.no_grad():
            scores.append(score(world.backbone, world.model, batch, images=images, rows=rows))
    for view in ("chosen", "rejected"):
        here, there = (getattr(one, view).item() for one in scores)
        assert abs(here - there) > 1e-2 * max(1, abs(here)) / 4
    check_close(scores[1].visual, scores[0].visual, 0 if world.dtype == "float32" else 1e-2)


def test_another_image_changes_the_log_probs(world):
    check_image_matters(world)


def test_image_matters_refuted_by_a_blind_model(world):
    seen = []

    def blind(*args):
        seen.append(encode_batch_images(*args))
        return seen[0]

    with refuted():
        check_image_matters(world, blind)


# ---- 4-bit: compared with the same quantised model only


def test_4_bit(tiny_llava):
    """The reference is the quantised model, padded or packed; refuted by the model before it was quantised."""
    quantised = AutoBackbone(str(tiny_llava), dtype="bfloat16", quantization="nf4")
    world = world_of(tiny_llava, "bfloat16")
    module = moved(module_of(dataclasses.replace(world, backbone=quantised)))

    def check_same_base(backbone: AutoBackbone) -> None:
        model = backbone.load_model()
        rows = scoring.make_rows(backbone, model, world.batch, share_prefix=False)
        with torch.no_grad():
            reference = stacked(module.score(world.batch)[1])
            base = stacked(score(backbone, model, world.batch, rows=rows))
        check_close(reference, base, world.tolerance("4-bit"))

    check_same_base(quantised)
    with refuted():
        check_same_base(world.backbone)
