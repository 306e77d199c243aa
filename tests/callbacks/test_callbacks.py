import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from peft import PeftModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.callbacks import (
    AdapterExport,
    Evaluation,
    Row,
    SampleAnswers,
    draw_rows,
    format_table,
)
from realign_lightning.data import DualPreferenceDataModule, ShardWriter
from realign_lightning.evaluation import HallusionBenchmark, PopeBenchmark
from realign_lightning.losses import SFTLoss
from realign_lightning.modules import RDPOModule
from tests.callbacks.helpers import Lengths
from tests.conftest import preference_samples
from tests.evaluation.official import write_hallusionbench, write_pope


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "train") as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    return str(folder / "train")


def fast_adam(parameters):
    return torch.optim.AdamW(parameters, lr=5e-3)


def run(backbone, shards, callbacks, logger, **settings) -> tuple[pl.Trainer, RDPOModule]:
    torch.manual_seed(0)
    module = RDPOModule(backbone, adapter=LoRA(r=4, alpha=8, dropout=0.0), optimizer=fast_adam)
    data = DualPreferenceDataModule(backbone, train=shards, val=shards, batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"max_epochs": 2, **settings},
    )
    trainer.fit(module, datamodule=data)
    return trainer, module


def test_adapter_lies_beside_every_checkpoint_and_goes_with_it(backbone, shards, tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=1, save_last=False)
    trainer, module = run(backbone, shards, [saver, AdapterExport()], CSVLogger(tmp_path))
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["epoch=1-adapter", "epoch=1.ckpt"]
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    base = AutoModelForImageTextToText.from_pretrained(backbone.path)
    for folder in (
        tmp_path / "ckpt" / "epoch=1-adapter",
        tmp_path / "by_hand-adapter",
        Path(trainer.log_dir) / "adapter",
    ):
        plain = PeftModel.from_pretrained(base, folder).eval()
        ours = {name: value for name, value in module.policy.state_dict().items() if "lora_" in name}
        assert ours
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.items())
        base = plain.unload()


def test_export_needs_a_module_that_can(tmp_path):
    with pytest.raises(TypeError, match="export"):
        AdapterExport().setup(pl.Trainer(logger=False, accelerator="cpu"), pl.LightningModule(), "fit")


class PictureLogger(Logger):
    """Takes pictures the way the logger of Weights & Biases does."""

    def __init__(self):
        super().__init__()
        self.pictures = []

    name, version = "pictures", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None, **kwargs):
        self.pictures.append((key, images, step))


def test_answers_go_to_whatever_takes_pictures(backbone, shards, tmp_path):
    board, pictures = TensorBoardLogger(tmp_path, name="board"), PictureLogger()
    run(backbone, shards, [SampleAnswers(count=2, max_new_tokens=4)], [board, pictures], max_epochs=1)
    events = EventAccumulator(board.log_dir)
    events.Reload()
    steps = [event.step for event in events.Images("answers")]
    assert steps == [0, 2, 2]
    assert [(key, step) for key, _, step in pictures.pictures] == [("answers", step) for step in steps]
    assert all(isinstance(image, Image.Image) for _, images, _ in pictures.pictures for image in images)


def test_answers_are_files_where_no_logger_takes_pictures(backbone, shards, tmp_path):
    trainer, _ = run(backbone, shards, [SampleAnswers(count=2, max_new_tokens=4)], CSVLogger(tmp_path), max_epochs=1)
    files = sorted(path.name for path in (Path(trainer.log_dir) / "answers").iterdir())
    assert files == ["step=0.png", "step=2.png"]
    with pytest.raises(ValueError, match="count"):
        SampleAnswers(count=0)


def test_drawn_rows_show_their_images():
    image = Image.new("RGB", (8, 8), (200, 10, 30))
    drawn = draw_rows([Row([("a", image), ("b", image)], [("prompt", "what is it?"), ("answer", "word " * 200)])])
    pixels = np.asarray(drawn).reshape(-1, 3)
    assert (pixels == (200, 10, 30)).all(axis=1).sum() == 2 * 192 * 192
    assert drawn.height > draw_rows([Row([("a", image)], [("prompt", "short")])]).height
    with pytest.raises(ValueError, match="at least one"):
        draw_rows([])


def test_evaluation_compares_base_controls_and_policy(backbone, shards, tmp_path, capsys):
    benchmark = Lengths()
    evaluation = Evaluation([benchmark], controls={"SFT": SFTLoss()}, batch_size=2)
    trainer, module = run(backbone, shards, [evaluation], CSVLogger(tmp_path), max_epochs=4)
    base, policy, control = benchmark.seen
    questions = benchmark.questions()
    plain = backbone.load_model()
    for arm, model in ((base, plain), (policy, module.policy)):
        for question, answer in zip(questions, arm, strict=True):
            inputs = backbone.encode_prompts([question.prompt], [question.image])
            assert backbone.generate(model, inputs, max_new_tokens=6) == [answer]
    assert base != policy
    assert base != control
    saved = json.loads((Path(trainer.log_dir) / "evaluation.json").read_text())
    assert list(saved) == ["base", "SFT", "rDPO"]
    assert saved["rDPO"]["characters"] == sum(map(len, policy))
    printed = capsys.readouterr().out
    assert (Path(trainer.log_dir) / "evaluation.md").read_text().strip() in printed
    assert trainer.log_dir in printed


def test_evaluation_reads_benchmarks_of_official_files(backbone, shards, tmp_path):
    benchmark = PopeBenchmark(write_pope(tmp_path / "pope"), tmp_path / "pope" / "images", max_new_tokens=4)
    trainer, _ = run(backbone, shards, [Evaluation([benchmark])], CSVLogger(tmp_path), max_epochs=1)
    saved = json.loads((Path(trainer.log_dir) / "evaluation.json").read_text())
    assert set(saved) == {"base", "rDPO"}
    assert saved["base"]["pope accuracy"] in [100 * right / 12 for right in range(13)]
    folder = write_hallusionbench(tmp_path / "hb")
    blind = HallusionBenchmark(folder / "HallusionBench.json", folder)
    with pytest.raises(ValueError, match="HallusionBenchmark asks without an image"):
        run(backbone, shards, [Evaluation([blind])], CSVLogger(tmp_path), max_epochs=1)
    (tmp_path / "pope" / "images" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        run(backbone, shards, [Evaluation([benchmark])], CSVLogger(tmp_path), max_epochs=1)


@pytest.mark.parametrize("limit", [1.0, 1])
def test_control_trains_from_the_same_base_on_the_same_batches(backbone, shards, tmp_path, limit):
    seen = {"rDPO": [], "SFT": []}

    class Watched(RDPOModule):
        def training_step(self, batch, batch_idx):
            seen["SFT" if isinstance(self.loss, SFTLoss) else "rDPO"].append(batch.keys)
            return super().training_step(batch, batch_idx)

    module = Watched(backbone, adapter=LoRA(r=2, dropout=0.0))
    data = DualPreferenceDataModule(backbone, train=shards, batch_size=2)
    evaluation = Evaluation([Lengths(1)], controls={"SFT": SFTLoss()})
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[evaluation],
        logger=False,
        max_steps=5,
        max_epochs=-1,
        limit_train_batches=limit,
    )
    trainer.fit(module, datamodule=data)
    assert seen["SFT"] == seen["rDPO"]
    assert len(seen["SFT"]) == 5


def test_impossible_evaluations_are_refused(backbone, shards, tmp_path):
    with pytest.raises(ValueError, match="at least one benchmark"):
        Evaluation([])
    with pytest.raises(ValueError, match="collide"):
        Evaluation([Lengths()], controls={"base": SFTLoss()})
    with pytest.raises(ValueError, match="clone"):
        Evaluation([Lengths()], controls={"SFT": SFTLoss()}).setup(
            pl.Trainer(logger=False, accelerator="cpu"), pl.LightningModule(), "fit"
        )
    with pytest.raises(ValueError, match="same name"):
        run(backbone, shards, [Evaluation([Lengths(1), Lengths(1)])], CSVLogger(tmp_path), max_epochs=1)


def test_table_is_aligned_markdown():
    table = format_table({"base": {"a": 1.0, "long name": 22.25}, "rDPO": {"a": 3.0, "long name": 0.0}})
    assert table.splitlines() == [
        "|           | base | rDPO |",
        "|-----------|-----:|-----:|",
        "| a         |  1.0 |  3.0 |",
        "| long name | 22.2 |  0.0 |",
    ]
