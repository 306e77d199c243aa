import csv
import dataclasses
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.data import DualPreferenceDataModule, ShardWriter
from realign_lightning.losses import PreferenceLoss, RDPOLoss, SFTLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.modules.rdpo import paper_adamw
from realign_lightning.scoring import score
from tests.conftest import picture, preference_samples

SMALL = LoRA(r=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def batch(backbone):
    return backbone.collate([backbone.encode_sample(sample) for sample in preference_samples(3)])


def fast_adam(parameters):
    return torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)


def module_of(backbone, **settings) -> RDPOModule:
    torch.manual_seed(0)
    return RDPOModule(backbone, **{"adapter": SMALL, "optimizer": fast_adam, **settings})


def loader_of(backbone, count: int = 4, batch_size: int = 2) -> DataLoader:
    encoded = [backbone.encode_sample(sample) for sample in preference_samples(count)]
    return DataLoader(encoded, batch_size=batch_size, collate_fn=backbone.collate)


class Recorder(pl.Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer_of(folder, recorder=None, **settings) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder] if recorder else [],
        **{"max_epochs": 2, "enable_checkpointing": False, "logger": False, **settings},
    )


@pytest.mark.parametrize("settings", [{}, {"adapter": None}], ids=["lora", "full"])
def test_first_loss_is_two_ln_two_and_rewards_are_zero(backbone, batch, settings):
    module = module_of(backbone, **settings)
    policy, reference = module.score(batch)
    for view, value in policy.items():
        torch.testing.assert_close(value, getattr(reference, view), rtol=0, atol=1e-6)
    loss = module.loss(policy, reference).losses
    torch.testing.assert_close(loss, torch.full_like(loss, 2 * math.log(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"adapter": None}, {"reference": "frozen_copy"}], ids=["lora", "full", "copy"]
)
def test_training_learns_and_leaves_the_reference_alone(backbone, batch, tmp_path, settings):
    module = module_of(backbone, **settings)
    before = module.score(batch)[1]
    recorder = Recorder()
    trainer_of(tmp_path, recorder, max_epochs=6).fit(module, loader_of(backbone))
    policy, after = module.score(batch)
    for view, value in before.items():
        assert torch.equal(value, getattr(after, view))
    assert recorder.losses[0] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert recorder.losses[-1] < 1.0
    assert (policy.chosen - after.chosen > policy.rejected - after.rejected).all()


def test_adapter_off_is_the_base_model_to_the_last_bit(backbone, batch, tmp_path):
    module = module_of(backbone)
    trainer_of(tmp_path).fit(module, loader_of(backbone))
    from realign_lightning.scoring import score

    with torch.no_grad():
        base = score(backbone, backbone.load_model(), batch)
    for view, value in base.items():
        assert torch.equal(value, getattr(module.score(batch)[1], view))


def test_frozen_image_path_is_encoded_once_for_policy_and_reference(backbone, batch):
    for adapter, calls in ((SMALL, 1), (None, 2)):
        module = module_of(backbone, adapter=adapter)
        module.configure_model()
        encoded = []
        towers = [tower for name, tower in module.named_modules() if name.endswith("vision_tower")]
        for tower in towers:
            tower.register_forward_hook(lambda tower, inputs, output, into=encoded: into.append(len(inputs[0])))
        module.score(batch)
        assert module.image_path_is_frozen == (adapter is not None)
        assert encoded == [2 * len(batch)] * calls


def test_full_training_reaches_the_vision_tower(backbone, batch):
    module = module_of(backbone, adapter=None)
    policy, reference = module.score(batch)
    module.loss(policy, reference).losses.sum().backward()
    tower = module.policy.model.vision_tower
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_freezing_a_trained_projector_leaves_it_the_policys(backbone, batch, tmp_path):
    """``freeze()`` is Lightning's call before inference; the reference still has the base's projector."""
    module = module_of(backbone, trained_parts=["projector"])
    trainer_of(tmp_path).fit(module, loader_of(backbone))
    with torch.no_grad():
        before = module.score(batch)
        module.freeze()
        after = module.score(batch)
        base = score(backbone, backbone.load_model(), batch)
    for (_, one), (_, two), (_, expected) in zip(before[1].items(), after[1].items(), base.items(), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(two, expected, rtol=1e-6, atol=1e-5)
    assert (before[0].chosen - before[1].chosen).abs().min() > 0.1
    assert not module.image_path_is_frozen


def test_a_tower_frozen_in_the_middle_of_a_run_still_counts_as_trained(backbone, batch):
    module = module_of(backbone)
    assert module.image_path_is_frozen
    images = list(backbone.image_parameters(module.policy))
    for thawed in (True, False):
        for parameter in images:
            parameter.requires_grad_(thawed)
        module.score(batch)
    assert not module.image_path_is_frozen


@pytest.mark.parametrize("reference", ["auto", "frozen_copy"])
def test_thawing_the_base_below_an_adapter(backbone, tmp_path, reference):
    """With the adapter off the policy would no longer be the reference; a frozen copy stays what it is."""

    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                for parameter in backbone.image_parameters(module.policy):
                    parameter.requires_grad_(True)

    module = module_of(backbone, reference=reference)
    if reference == "auto":
        with pytest.raises(ValueError, match="it would change with them"):
            trainer_of(tmp_path, Thaw()).fit(module, loader_of(backbone))
        return
    trainer_of(tmp_path, Thaw()).fit(module, loader_of(backbone))
    assert not module.image_path_is_frozen


def test_dropout_of_a_frozen_tower_is_off_for_both_models(backbone, batch):
    module = module_of(backbone).train()
    for block in module.policy.get_base_model().model.vision_tower.modules():
        if hasattr(block, "dropout") and isinstance(block.dropout, float):
            block.dropout = 0.5
    policy, reference = module.score(batch)
    with torch.no_grad():
        expected = score(backbone, backbone.load_model(), batch)
    torch.testing.assert_close(reference.visual, expected.visual, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(policy.visual, expected.visual, rtol=1e-6, atol=1e-5)
    assert module.policy.training


def test_logged_names(backbone, tmp_path):
    module = module_of(backbone, loss=RDPOLoss(visual_weight=0.0))
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, loader_of(backbone), loader_of(backbone))
    text = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    text |= {"logps/chosen", "logps/rejected", "padding_fraction"}
    image = {"rewards/visual", "rewards/visual_margins", "rewards/visual_accuracies", "logps/visual"}
    assert {f"train/{name}" for name in text} | {f"val/{name}" for name in text | image} == set(trainer.logged_metrics)


def test_policy_trains_in_train_mode_and_reference_in_eval_mode(backbone, tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(
                (pl_module.policy.training, pl_module.reference.training and pl_module.reference.model.training)
            )

    trainer = trainer_of(tmp_path, Watch(), max_epochs=2)
    trainer.fit(module_of(backbone, reference="frozen_copy"), loader_of(backbone), loader_of(backbone))
    assert seen == [(True, False)] * 4


def test_zero_weight_rows_do_not_count(backbone, batch):
    module = module_of(backbone, adapter=LoRA(r=4, alpha=8, dropout=0.0))
    module.score(batch)
    for parameter in module.policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    module.log = lambda *args, **kwargs: None
    masked = dataclasses.replace(batch, weights=torch.tensor([1.0, 0.0, 1.0]))
    with torch.no_grad():
        policy, reference = module.score(batch)
        losses = module.loss(policy, reference).losses
        torch.testing.assert_close(module.training_step(masked, 0), (losses[0] + losses[2]) / 2)
        torch.testing.assert_close(module.training_step(batch, 0), losses.mean())
        nothing = dataclasses.replace(batch, weights=torch.zeros(3))
        assert module.training_step(nothing, 0) == 0


def test_schedule_spans_the_estimated_steps(backbone, tmp_path):
    """8 samples, batches of 2, 2 per step, 4 epochs: 8 steps; 25 % warm-up is 2 steps, then a cosine over 6."""
    from functools import partial

    from realign_lightning.modules import WarmupCosine

    recorder = Recorder()
    module = module_of(backbone, lr_scheduler=partial(WarmupCosine, warmup_ratio=0.25))
    trainer = trainer_of(tmp_path, recorder, max_epochs=4, accumulate_grad_batches=2)
    trainer.fit(module, loader_of(backbone, count=8))
    assert trainer.global_step == 8
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(7)]
    # Rates are read after the scheduler moved on: every second batch steps.
    assert recorder.rates[1::2] == pytest.approx([5e-3 * factor for factor in [1.0, *cosine]])


def test_gradient_accumulation_and_checkpointing_change_nothing(backbone, batch):
    def gradients(module, batches):
        module.policy.train()
        module.log = lambda *args, **kwargs: None
        for one in batches:
            (module.training_step(one, 0) / len(batches)).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}

    halves = [backbone.collate([backbone.encode_sample(sample)]) for sample in preference_samples(3)]
    together = gradients(module_of(backbone), [batch])
    for others in (
        gradients(module_of(backbone), halves),
        gradients(module_of(backbone, gradient_checkpointing=True), [batch]),
    ):
        assert together.keys() == others.keys()
        for name, gradient in together.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


class TestCheckpoints:
    def fit(self, backbone, folder, **settings):
        module = module_of(backbone, **settings)
        trainer = trainer_of(folder)
        trainer.fit(module, loader_of(backbone))
        trainer.save_checkpoint(folder / "run.ckpt")
        return module, folder / "run.ckpt"

    def test_holds_only_what_was_trained_and_plain_values(self, backbone, tmp_path):
        module, path = self.fit(backbone, tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        assert set(checkpoint["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in checkpoint["state_dict"])
        assert checkpoint["hyper_parameters"]["backbone"]["init_args"]["path"] == backbone.path

    @pytest.mark.parametrize("settings", [{}, {"adapter": None, "loss": RDPOLoss(beta=0.3)}], ids=["lora", "full"])
    def test_load_from_checkpoint_rebuilds_the_module(self, backbone, batch, tmp_path, settings):
        module, path = self.fit(backbone, tmp_path, **settings)
        loaded = RDPOModule.load_from_checkpoint(path)
        assert loaded.loss.beta == module.loss.beta
        with torch.no_grad():
            for (view, ours), (_, theirs) in zip(
                module.score(batch)[0].items(), loaded.score(batch)[0].items(), strict=True
            ):
                assert torch.equal(ours, theirs), view

    def test_resumed_run_continues_with_the_same_losses(self, backbone, tmp_path):
        whole, second = Recorder(), Recorder()
        trainer_of(tmp_path / "whole", whole, max_epochs=3).fit(module_of(backbone), loader_of(backbone))
        keep = ModelCheckpoint(tmp_path / "first", save_top_k=-1, filename="{epoch}")
        halfway = trainer_of(tmp_path, keep, max_epochs=3, enable_checkpointing=True)
        halfway.fit(module_of(backbone), loader_of(backbone))
        resumed = trainer_of(tmp_path, second, max_epochs=3)
        torch.manual_seed(123)
        fresh = RDPOModule(backbone, adapter=SMALL, optimizer=fast_adam)
        resumed.fit(fresh, loader_of(backbone), ckpt_path=tmp_path / "first" / "epoch=0.ckpt")
        assert second.losses == whole.losses[2:]
        assert len(second.losses) == 4

    def test_checkpoint_of_another_adapter_is_refused(self, backbone, tmp_path):
        _, path = self.fit(backbone, tmp_path)
        with pytest.raises(ValueError, match="another backbone or adapter"):
            RDPOModule.load_from_checkpoint(path, adapter=LoRA(r=2))
        with pytest.raises(ValueError, match="another backbone or adapter"):
            RDPOModule.load_from_checkpoint(path, adapter=None)

    def test_exported_adapter_answers_alike_in_plain_transformers_and_peft(self, backbone, tmp_path):
        module, _ = self.fit(backbone, tmp_path)
        module.export(tmp_path / "adapter")
        base = AutoModelForImageTextToText.from_pretrained(backbone.path)
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        prompts, images = ["describe the image.", "is there a dog?"], [picture(1), picture(2)]
        inputs = backbone.encode_prompts(prompts, images)
        ids = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        assert module.generate(prompts, images, max_new_tokens=12) == texts
        assert texts != backbone.generate(backbone.load_model(), inputs, max_new_tokens=12)

    def test_exported_full_model_loads_in_plain_transformers(self, backbone, batch, tmp_path):
        module, _ = self.fit(backbone, tmp_path, adapter=None)
        module.export(tmp_path / "model")
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        ours = dict(module.policy.named_parameters())
        assert all(torch.equal(value, ours[name]) for name, value in plain.named_parameters())


def csv_rows(path: Path, column: str) -> list[dict[str, str]]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


def test_training_values_are_means_over_the_optimizer_step(backbone, tmp_path):
    """With a rate of 0 the weights stay, so that what is logged for 2 x 2 samples must be the mean over those 4."""
    frozen = module_of(backbone, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0), lr_scheduler=None)
    samples = [backbone.encode_sample(sample) for sample in preference_samples(6)]
    expected = []
    for part in (samples[:4], samples[4:]):
        policy, _ = frozen.score(backbone.collate(part))
        expected.append(float(policy.chosen.detach().mean()))
    logger = CSVLogger(tmp_path)
    trainer = trainer_of(
        tmp_path, logger=logger, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1, max_steps=2
    )
    trainer.fit(frozen, DataLoader(samples, batch_size=2, collate_fn=backbone.collate))
    logged = [float(row["train/logps/chosen"]) for row in csv_rows(Path(logger.log_dir) / "metrics.csv", "train/loss")]
    assert logged == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 0.1


def test_an_interrupted_step_leaves_nothing_in_the_next_runs_log(backbone, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError

    def still(logger, *callbacks):
        return trainer_of(
            tmp_path, *callbacks, logger=logger, max_steps=1, accumulate_grad_batches=2, log_every_n_steps=1
        )

    module = module_of(backbone, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.0), lr_scheduler=None)
    with pytest.raises(ZeroDivisionError):
        still(False, Stop()).fit(module, loader_of(backbone, 4))
    logger = CSVLogger(tmp_path)
    samples = [backbone.encode_sample(sample) for sample in preference_samples(6)[2:]]
    still(logger).fit(module, DataLoader(samples, batch_size=2, collate_fn=backbone.collate))
    (row,) = csv_rows(Path(logger.log_dir) / "metrics.csv", "train/loss")
    expected = float(module.score(backbone.collate(samples))[0].chosen.detach().mean())
    assert float(row["train/logps/chosen"]) == pytest.approx(expected, abs=1e-4)


def test_scoring_leaves_every_submodule_in_its_mode(backbone, batch):
    module = module_of(backbone, adapter=LoRA(r=4, alpha=8, dropout=0.5))
    module.train()
    module.policy.base_model.model.model.vision_tower.eval()
    before = {name: part.training for name, part in module.named_modules()}
    module.score(batch)
    module.generate(["a"], [picture(0)], reference=True, max_new_tokens=2)
    assert {name: part.training for name, part in module.named_modules()} == before
    assert len(set(before.values())) == 2


def test_a_schedule_needs_an_end(backbone, tmp_path):
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        trainer_of(tmp_path, max_epochs=-1, max_time="00:00:00:30").fit(module_of(backbone), loader_of(backbone))


def test_responses_that_were_cut_are_counted_and_told_once(tiny_llava, tmp_path, caplog):
    """Samples of four texts each; only one pair of texts holds a response of more than 12 words or so."""
    with ShardWriter(tmp_path / "shards") as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    whole = AutoBackbone(str(tiny_llava))
    encoded = [whole.encode_sample(sample) for sample in preference_samples(4)]
    longest = {item.key: max(len(item.chosen.response_mask), len(item.rejected.response_mask)) for item in encoded}
    limit = sorted(longest.values())[1]
    data = DualPreferenceDataModule(AutoBackbone(str(tiny_llava), max_length=limit), str(tmp_path / "shards"))
    trainer_of(tmp_path).fit(module_of(whole), datamodule=data)
    assert data.truncated["train"] == {key for key, length in longest.items() if length > limit}
    assert len(data.truncated["train"]) == 2
    assert caplog.text.count("longer than the backbone's max_length") == 1


def test_sft_control_needs_neither_reference_nor_other_views(backbone, tmp_path):
    module = module_of(backbone, loss=SFTLoss())
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, loader_of(backbone), loader_of(backbone))
    names = {"loss", "logps/chosen", "padding_fraction"}
    assert set(trainer.logged_metrics) == {f"{split}/{name}" for split in ("train", "val") for name in names}


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_the_share_of_padding_is_logged(backbone, tmp_path, share_prefix):
    """One batch of all samples: rows of three views, padded to the longest, or one row that has no padding."""
    module = module_of(backbone, share_prefix=share_prefix)
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, loader_of(backbone, 3, 3), loader_of(backbone, 3, 3))
    encoded = [backbone.encode_sample(sample) for sample in preference_samples(3)]
    lengths = [len(getattr(one, view).response_mask) for one in encoded for view in ("chosen", "rejected", "visual")]
    expected = 0.0 if share_prefix else 1 - sum(lengths) / (9 * max(lengths))
    for split in ("train", "val"):
        assert trainer.callback_metrics[f"{split}/padding_fraction"].item() == pytest.approx(expected, abs=1e-6)


def test_clone_starts_afresh(backbone, tmp_path):
    module = module_of(backbone)
    trainer_of(tmp_path, max_epochs=1).fit(module, loader_of(backbone))
    control = module.clone(loss=SFTLoss())
    assert isinstance(control.loss, SFTLoss)
    assert control.adapter == module.adapter
    assert all((p == 0).all() for n, p in control.policy.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("adapter", [SMALL, None], ids=["lora", "full"])
def test_four_batches_of_one_are_one_batch_of_four(backbone, tmp_path, adapter):
    """Responses differ in length, and the loss is a mean over samples."""

    def trained(batch_size: int) -> dict[str, torch.Tensor]:
        module = module_of(
            backbone, adapter=adapter, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1), lr_scheduler=None
        )
        trainer = trainer_of(tmp_path, max_epochs=3, accumulate_grad_batches=4 // batch_size)
        trainer.fit(module, loader_of(backbone, 4, batch_size))
        assert trainer.global_step == 3
        return {name: value.detach() for name, value in module.policy.named_parameters() if value.requires_grad}

    at_once, one_by_one = trained(4), trained(1)
    start = module_of(backbone, adapter=adapter).policy.state_dict()
    assert max((value - start[name]).abs().max() for name, value in at_once.items()) > 1e-2
    for name, value in at_once.items():
        torch.testing.assert_close(one_by_one[name], value, rtol=0, atol=1e-5)


def test_parts_have_learning_rates_of_their_own(backbone, tmp_path):
    module = module_of(
        backbone, trained_parts=["projector"], part_learning_rates={"projector": 2e-5}, optimizer=paper_adamw
    )
    trainer_of(tmp_path, max_steps=1).fit(module, loader_of(backbone))
    groups = module.trainer.optimizers[0].param_groups
    names = {id(value): name for name, value in module.named_parameters()}
    assert [group["initial_lr"] for group in groups] == [2e-5, 1e-5]
    assert all("multi_modal_projector.modules_to_save" in names[id(value)] for value in groups[0]["params"])
    assert all("lora_" in names[id(value)] for value in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == 4 + 2 * 2 * 7


def test_full_fine_tuning_freezes_the_parts_that_are_left_out(backbone, tmp_path):
    module = module_of(backbone, adapter=None, trained_parts=["projector", "head"])
    before = {name: value.clone() for name, value in module.policy.named_parameters()}
    trainer_of(tmp_path, max_steps=1).fit(module, loader_of(backbone))
    parts = backbone.parts(module.policy)
    changed = {parts[name] for name, value in module.policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"projector", "head"}
    assert not module.image_path_is_frozen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_parts": ["merger"]}, r"`trained_parts` to name parts of .*, got \['merger'\]"),
        ({"part_learning_rates": {"tower": 1.0}}, r"`part_learning_rates` to name parts of .*, got \['tower'\]"),
        ({"trained_parts": ["vision_tower"]}, r"beside an adapter to be \['projector'\], got \['vision_tower'\]"),
        ({"trained_parts": [], "adapter": None}, "Nothing to train"),
        ({"part_learning_rates": {"projector": -1.0}}, "rates of at least 0"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(backbone, settings, message):
    with pytest.raises(ValueError, match=message):
        module_of(backbone, **settings)


def test_a_learning_rate_of_a_frozen_part_is_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"parts of which nothing is trained: \['projector'\]"):
        trainer_of(tmp_path).fit(module_of(backbone, part_learning_rates={"projector": 1e-3}), loader_of(backbone))


class NamelessLoss(PreferenceLoss):
    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.scale = strength


def test_impossible_modules_are_refused(backbone, tiny_llava):
    with pytest.raises(ValueError, match="adapter_off"):
        RDPOModule(backbone, reference="adapter_off")
    with pytest.raises(TypeError, match="strength"):
        RDPOModule(backbone, loss=NamelessLoss())
    with pytest.raises(OSError, match="nowhere"):
        RDPOModule(AutoBackbone("./nowhere")).configure_model()


@pytest.mark.parametrize(
    ("batch_size", "accumulated"),
    [(7, 1), (4, 2), (2, 4), (1, 7), (3, 5)],
)
def test_a_step_is_the_mean_over_its_samples_however_they_are_spread(backbone, tmp_path, batch_size, accumulated):
    """Seven samples in one step of plain gradient descent; the last batch, and the last step's batches, are too few."""

    def weights_after(size: int, accumulate: int, broken: int | None = None) -> list[torch.Tensor]:
        samples = [backbone.encode_sample(sample) for sample in preference_samples(7)]
        if broken is not None:
            samples[broken] = dataclasses.replace(samples[broken], weight=0.0)
        settings = {"adapter": LoRA(4, 8, 0.0), "lr_scheduler": None}
        module = module_of(backbone, optimizer=lambda weights: torch.optim.SGD(weights, lr=1.0), **settings)
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(module, DataLoader(samples, size, collate_fn=backbone.collate))
        assert trainer.global_step == 2
        return [weight.detach() for weight in module.policy.parameters() if weight.requires_grad]

    for broken in (None, 2):
        for found, expected in zip(
            weights_after(batch_size, accumulated, broken), weights_after(7, 1, broken), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
