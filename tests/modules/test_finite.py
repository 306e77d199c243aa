"""A loss or gradient that is not finite: found before the optimizer moves; a step that is left out leaves no trace."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import NonFiniteError, RDPOModule
from realign_lightning.modules.finite import MOST_SKIPS, FiniteGuard, name_some
from realign_lightning.types import EncodedSample
from tests.conftest import preference_samples
from tests.modules.test_engines import csv_rows


def with_broken_image(sample: EncodedSample) -> EncodedSample:
    """Pixels of NaN: everything that the model makes of them is NaN."""
    image = {
        name: torch.full_like(value, math.nan) if value.is_floating_point() else value
        for name, value in sample.image.items()
    }
    return dataclasses.replace(sample, image=image)


class SteepLoss(RDPOLoss):
    """A finite loss whose gradient is infinite at single calls: the square root's slope at 0."""

    def __init__(self, steep_calls: list[int] | None = None) -> None:
        super().__init__()
        self.steep_calls = steep_calls or []
        self.calls = 0

    def forward(self, policy, reference=None, lengths=None):
        output = super().forward(policy, reference, lengths)
        self.calls += 1
        if self.calls - 1 not in self.steep_calls:
            return output
        return output._replace(losses=output.losses + (policy.chosen - policy.chosen.detach()).abs().sqrt())


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def samples(backbone) -> list[EncodedSample]:
    return [backbone.encode_sample(sample) for sample in preference_samples(12)]


def eager_adam(weights):
    """Momentum and decay move weights also where the gradient is zero."""
    return torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)


def module_of(backbone, kind=RDPOModule, **settings) -> RDPOModule:
    adapter = LoRA(4, 8, 0.0)
    defaults = {"adapter": adapter, "optimizer": eager_adam, "lr_scheduler": None, "non_finite": "skip"}
    return kind(backbone, **defaults | settings)


def fit(module, samples, folder=Path(), val=None, ckpt_path=None, **settings) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, "max_epochs": 1, "gradient_clip_val": 1.0} | settings,
    )
    collate = module.backbone.collate
    # The adapter's first weights are drawn when the fit begins.
    torch.manual_seed(0)
    loaders = [DataLoader(data, batch_size=2, collate_fn=collate) for data in (samples, val or [])]
    trainer.fit(module, loaders[0], loaders[1] if val else None, ckpt_path=ckpt_path)
    return trainer


def trained(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def broken_at(samples, *places) -> list[EncodedSample]:
    return [with_broken_image(sample) if place in places else sample for place, sample in enumerate(samples)]


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_stop_names_the_samples_and_moves_nothing(backbone, samples):
    two_steps, stopped = (module_of(backbone, non_finite="stop", share_prefix=False) for _ in range(2))
    fit(two_steps, samples[:4])
    with pytest.raises(NonFiniteError, match=r"optimizer step 2, in 1 sample\(s\): sample5\. No weight has moved"):
        fit(stopped, broken_at(samples, 5))
    assert_same_bits(trained(stopped), trained(two_steps))


def test_stop_is_the_default(backbone):
    assert RDPOModule(backbone).non_finite == "stop"


@pytest.mark.parametrize(
    ("accumulated", "broken", "left_out"),
    [(1, (5,), range(4, 6)), (2, (6,), range(4, 8)), (1, (0, 10), (0, 1, 10, 11)), (3, (11,), range(6, 12))],
)
def test_a_skipped_step_leaves_no_trace(backbone, samples, caplog, tmp_path, accumulated, broken, left_out):
    """Whichever of the accumulated batches it is in, the run goes on as if the step's samples had not been there."""
    skipping, without = module_of(backbone, share_prefix=False), module_of(backbone, share_prefix=False)
    loggers = [CSVLogger(tmp_path, version=name) for name in ("skipping", "without")]
    some = {"accumulate_grad_batches": accumulated}
    fit(skipping, broken_at(samples, *broken), logger=loggers[0], **some)
    kept = [sample for place, sample in enumerate(samples) if place not in left_out]
    fit(without, kept, logger=loggers[1], **some)
    assert_same_bits(trained(skipping), trained(without))
    moments = [module.trainer.optimizers[0].state_dict()["state"] for module in (skipping, without)]
    for index, state in moments[1].items():
        assert_same_bits(moments[0][index], state)
    rows, expected = (csv_rows(Path(logger.log_dir) / "metrics.csv", "train/skipped_steps") for logger in loggers)
    counts = [0.0, *(float(row["train/skipped_steps"]) for row in rows)]
    assert counts[-1] == len(broken)
    made = [row for row, before, after in zip(rows, counts, counts[1:], strict=False) if before == after]
    assert [row["train/loss"] for row in made] == [row["train/loss"] for row in expected]
    assert len(rows) == skipping.global_step == len(samples) // 2 // accumulated
    assert all(row["train/loss"] != "nan" for row in rows)
    for place in broken:
        assert f"in 1 sample(s): sample{place}. The step is left out" in caplog.text


def test_the_schedule_goes_on_over_skipped_steps(backbone, samples):
    def linear(optimizer, steps):
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)

    module = module_of(backbone, lr_scheduler=linear)
    trainer = fit(module, broken_at(samples, 5))
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_an_infinite_gradient_below_a_finite_loss_is_found(backbone, samples, caplog):
    skipping, without = module_of(backbone, loss=SteepLoss([2])), module_of(backbone)
    fit(skipping, samples)
    fit(without, samples[:4] + samples[6:])
    assert_same_bits(trained(skipping), trained(without))
    assert "though every loss is. The step's 2 sample(s): sample4, sample5." in caplog.text
    with pytest.raises(NonFiniteError, match="The gradient is not finite at optimizer step 2, though every loss is"):
        fit(module_of(backbone, loss=SteepLoss([2]), non_finite="stop"), samples)


def test_large_gradients_are_no_infinite_ones():
    """Squares of 1e30 overflow float32; the entries do not."""
    weight = torch.nn.Parameter(torch.zeros(3))
    guard, optimizer = FiniteGuard(), torch.optim.SGD([weight], lr=1.0)
    for value, expected in ((1e30, 0.0), (math.inf, 1.0), (math.nan, 1.0)):
        weight.grad = torch.tensor([0.0, value, 1.0])
        assert guard.look(optimizer).tolist() == [0.0, expected]
        assert guard.look(optimizer, gradients_too=False).tolist() == [0.0, 0.0]


def test_ten_in_a_row_are_too_many(backbone, samples):
    assert MOST_SKIPS == 10
    module = module_of(backbone)
    broken = broken_at(samples, *range(12))
    with pytest.raises(NonFiniteError, match="10 steps before it were left out already, so that training stops"):
        fit(module, broken, max_epochs=2)
    assert module.global_step == 10
    # A sound step between starts the count anew.
    module = module_of(backbone)
    fit(module, broken + samples[:2] + broken[:8], max_epochs=1, limit_train_batches=11)
    assert module._finite.state_dict() == {"skipped": 10, "in_a_row": 4}


def test_the_counts_go_on_after_a_resume(backbone, samples, tmp_path):
    module = module_of(backbone)
    broken = broken_at(samples[:4], 3)
    fit(module, broken, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["non_finite"] == "skip"
    assert RDPOModule.load_from_checkpoint(tmp_path / "one.ckpt").non_finite == "skip"
    resumed = module_of(backbone)
    trainer = fit(resumed, broken, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert trainer.callback_metrics["train/skipped_steps"] == 2
    assert module.clone().non_finite == "skip"


class Patched(RDPOModule):
    """Row 1 of every batch gets log-probs that are not finite, from the policy, the reference or both."""

    broken = ("policy",)

    def score(self, *args, **kwargs):
        scores = dict(zip(("policy", "reference"), super().score(*args, **kwargs), strict=True))
        for name in self.broken:
            for view, value in scores[name].items():
                noise = torch.zeros_like(value)
                noise[1] = math.nan if view == "chosen" else -math.inf
                scores[name] = dataclasses.replace(scores[name], **{view: value + noise})
        return scores["policy"], scores["reference"]


@pytest.mark.parametrize("broken", [("policy",), ("reference",), ("policy", "reference")])
def test_a_stand_in_of_weight_zero_poisons_nothing(backbone, samples, broken, monkeypatch):
    """0 times NaN is NaN: loss, gradient and logged means are those of the other samples all the same."""
    monkeypatch.setattr(Patched, "broken", broken)
    weighted = [dataclasses.replace(sample, weight=float(place % 2 == 0)) for place, sample in enumerate(samples[:4])]
    sound, patched = module_of(backbone), module_of(backbone, Patched)
    trainers = [fit(module, weighted, val=weighted) for module in (sound, patched)]
    assert_same_bits(trained(sound), trained(patched))
    for name, value in trainers[0].callback_metrics.items():
        assert trainers[1].callback_metrics[name] == value, name
    assert trainers[1].callback_metrics["train/skipped_steps"] == 0


def test_a_validation_loss_that_is_not_finite_is_told_and_stops_nothing(backbone, samples):
    module = module_of(backbone, non_finite="stop", share_prefix=False)
    with pytest.warns(UserWarning, match=r"The validation loss is not finite in 1 sample\(s\): sample3\."):
        trainer = fit(module, samples[:4], val=broken_at(samples[:4], 3), num_sanity_val_steps=0)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/loss"].isnan()


def test_unknown_responses_are_refused(backbone):
    with pytest.raises(ValueError, match="Expected `non_finite` to be 'stop' or 'skip', got 'ignore'"):
        RDPOModule(backbone, non_finite="ignore")


def test_messages_name_twenty_samples_at_most():
    assert name_some([str(number) for number in range(23)]).endswith("18, 19 and 3 more")


def test_ranks_skip_and_stop_together(tiny_llava, tmp_path, run_module):
    """One rank's sample is broken; with every loss finite, one rank's gradient overflows."""
    run_module("tests.modules.finite_run", tiny_llava, tmp_path, processes=2)
    for engine in ("ddp", "fsdp"):
        weights = {path.stem: torch.load(path, weights_only=True) for path in (tmp_path / engine).glob("*.pt")}
        assert set(weights) == {"broken", "steep", "without"}
        assert_same_bits(weights["broken"], weights["without"])
        assert_same_bits(weights["steep"], weights["without"])
        for rank in (0, 1):
            broken, steep = ((tmp_path / engine / f"{name}{rank}.txt").read_text() for name in ("broken", "steep"))
            assert "optimizer step 1, in 1 sample(s): sample3. No weight" in broken
            assert "optimizer step 1, though every loss is. The step's 2 sample(s): sample2, sample3. No" in steep


def test_overflow_below_a_gradient_scaler_is_the_scalers(backbone, samples, tmp_path):
    """It leaves the step out by itself and halves its scale; a loss that is not finite still stops."""

    def scaled(loss, data):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        module = module_of(backbone, loss=loss, non_finite="stop")
        fit(module, data, plugins=[plugin])
        return plugin.scaler.get_scale(), module

    assert scaled(None, samples[:4])[0] == 1024.0
    scale, module = scaled(SteepLoss([1]), samples[:4])
    assert scale == 512.0
    assert all(value.isfinite().all() for value in trained(module).values())
    with pytest.raises(NonFiniteError, match="The loss is not finite at optimizer step 1"):
        scaled(None, broken_at(samples[:4], 3))
