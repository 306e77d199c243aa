"""Rewards that go wrong are told once, with numbers; sound runs and noise are not."""

import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.callbacks import RewardMonitor
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import RDPOModule
from tests.conftest import preference_samples

STEPS = 1000


def line(start: float, end: float, steps: int = STEPS) -> np.ndarray:
    return np.linspace(start, end, steps)


def watch(monitor: RewardMonitor, seed: int, noise: float = 0.1, **series: np.ndarray) -> list[str]:
    """Warnings over a run of these mean rewards; a step's mean over its samples is off by the noise."""
    generator = np.random.default_rng(seed)
    names = {"chosen": "rewards/chosen", "text": "rewards/margins", "visual": "rewards/visual_margins"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = np.stack(list(series.values()), axis=1)
        values = values + noise * generator.standard_normal(values.shape)
        for start in range(0, len(values), 5):
            steps = [dict(zip(series, row, strict=True)) for row in values[start : start + 5]]
            monitor.observe((f"train/{names[name]}", value) for step in steps for name, value in step.items())
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_silent(seed):
    rising = {"chosen": line(0, 1), "text": line(0, 2), "visual": line(0, 0.8)}
    assert watch(RewardMonitor(), seed, **rising) == []


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_silent(seed):
    """Larger than all that is learned, also below 0 and in a long run."""
    still = {"chosen": np.full(5000, -0.5), "text": np.full(5000, 0.3), "visual": np.full(5000, 0.1)}
    assert watch(RewardMonitor(), seed, noise=0.4, **still) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_chosen_reward_that_keeps_falling_is_told_once(seed):
    """From 0 by 0.2 in 100 steps, the margins growing all the while."""
    falling = {"chosen": line(0, -2), "text": line(0, 2), "visual": line(0, 0.8)}
    (message,) = watch(RewardMonitor(), seed, **falling)
    assert "The chosen reward keeps falling: from " in message
    for advice in ("loss.anchor_weight", "loss.sft_weight", "loss.beta", "learning rate"):
        assert advice in message


def test_the_numbers_in_the_warning():
    """0.01 lower in each step: quarters of 25 steps are 0.25 apart, and means lie in their middles."""
    falling = {"chosen": -0.01 * np.arange(100), "text": line(0, 1, 100), "visual": line(0, 0.5, 100)}
    (message,) = watch(RewardMonitor(), 0, noise=0, **falling)
    assert "from -0.120 to -0.870 in the 100 optimizer steps" in message


def test_a_fall_that_stays_above_the_reference_is_silent():
    falling = {"chosen": line(3, 1), "text": line(0, 2), "visual": line(0, 0.8)}
    assert watch(RewardMonitor(), 0, **falling) == []


def test_a_second_fall_is_told_after_a_recovery():
    chosen = np.concatenate([line(0, -1, 300), line(-1, 0, 300), line(0, -1, 300)])
    count = len(chosen)
    some = {"chosen": chosen, "text": line(0, 2, count), "visual": line(0, 0.8, count)}
    assert len(watch(RewardMonitor(), 0, **some)) == 2


@pytest.mark.parametrize(
    "visual",
    [
        np.concatenate([line(0, 0.6, 400), line(0.6, 0, 200), line(0, 0, 400)]),
        np.concatenate([line(0, 0.6, 400), line(0.6, -1, 600)]),
        line(0, 0),
        line(0, 0.04),
    ],
    ids=["lost again", "turned", "never there", "far behind"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_visual_margin_that_collapses_is_told_once(visual, seed):
    (message,) = watch(RewardMonitor(), seed, noise=0.05, chosen=line(0, 0.5), text=line(0, 2), visual=visual)
    assert "The visual margin has collapsed: " in message
    for advice in ("loss.visual_weight", "loss.anchor_weight", "loss.sft_weight", "loss.beta", "learning rate"):
        assert advice in message


def test_a_visual_margin_that_comes_back_can_collapse_again():
    visual = np.concatenate([line(0, 0.6, 300), line(0, 0, 300), line(0, 0.6, 300), line(0, 0, 300)])
    count = len(visual)
    some = {"chosen": line(0, 1, count), "text": line(0, 2, count), "visual": visual}
    assert len(watch(RewardMonitor(), 0, noise=0.05, **some)) == 2


def test_nothing_has_collapsed_before_anything_was_learned():
    assert watch(RewardMonitor(), 0, chosen=line(0, 0), text=line(0, 0.1), visual=line(0, 0)) == []


def test_without_visual_preference_only_the_chosen_reward_is_watched():
    assert watch(RewardMonitor(), 0, chosen=line(0, 1), text=line(0, 2)) == []
    assert len(watch(RewardMonitor(), 0, chosen=line(0, -2), text=line(0, 2))) == 1


def test_values_that_are_not_finite_are_passed_over():
    chosen = line(0, -2)
    chosen[::7] = math.nan
    assert len(watch(RewardMonitor(), 0, chosen=chosen, text=line(0, 2))) == 1


def test_a_resumed_run_goes_on_where_it_was():
    """Cut before the warning it comes all the same; cut behind it, it comes no second time."""
    series = {"chosen": line(0, -2), "text": line(0, 2)}
    for cut, before, after in ((60, 0, 1), (500, 1, 0)):
        first, second = RewardMonitor(), RewardMonitor()
        assert len(watch(first, 0, **{name: value[:cut] for name, value in series.items()})) == before
        second.load_state_dict(first.state_dict())
        # Of one window alone the rest would tell it late.
        rest = {name: value[cut : cut + 60] for name, value in series.items()}
        assert len(watch(second, 1, noise=0.02, **rest)) == after


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window": 4}, "`window`"), ({"fall": 0.0}, "`fall`"), ({"share": 1.0}, "`share`")],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardMonitor(**settings)


def fit(tiny_llava, monitor, folder: Path, upwards: bool, ckpt_path=None, steps: int = 16, **loss) -> list[str]:
    """A real run, also one that climbs the loss."""
    torch.manual_seed(0)
    module = RDPOModule(
        AutoBackbone(str(tiny_llava)),
        RDPOLoss(**loss),
        LoRA(4, 8, 0.0),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.3, maximize=upwards),
        lr_scheduler=None,
    )
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )
    encoded = [module.backbone.encode_sample(sample) for sample in preference_samples(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(encoded, 2, collate_fn=module.backbone.collate), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return [str(one.message) for one in caught if "reward" in str(one.message) or "margin" in str(one.message)]


def test_in_a_real_run(tiny_llava, tmp_path):
    assert fit(tiny_llava, RewardMonitor(window=8), tmp_path, upwards=False, sft_weight=1.0) == []
    told = fit(tiny_llava, RewardMonitor(window=8), tmp_path, upwards=True, visual_weight=0.0)
    assert ["The chosen reward keeps falling" in one for one in told] == [True]


def test_state_lies_in_checkpoints(tiny_llava, tmp_path):
    """Every optimizer step is counted once, whatever batches it takes."""
    monitor = RewardMonitor(window=16)
    fit(tiny_llava, monitor, tmp_path, upwards=False, steps=6)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["RewardMonitor"]
    assert {name: len(values) for name, values in saved["series"].items()} == {
        "train/rewards/chosen": 6,
        "train/rewards/margins": 6,
        "train/rewards/visual_margins": 6,
    }
    resumed = RewardMonitor(window=16)
    fit(tiny_llava, resumed, tmp_path, upwards=False, ckpt_path=tmp_path / "last.ckpt", steps=8)
    assert resumed.state_dict()["series"]["train/rewards/chosen"][:6] == saved["series"]["train/rewards/chosen"]
    assert len(resumed.state_dict()["series"]["train/rewards/chosen"]) == 8
