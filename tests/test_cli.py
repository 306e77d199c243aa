import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from realign_lightning.cli import main, run
from realign_lightning.data import ShardDataset, ShardWriter
from realign_lightning.demos import POLICY_FOLDER
from realign_lightning.demos.scenes import DESCRIBE, DigitWorld, question
from realign_lightning.losses import RDPOLoss
from realign_lightning.modules import RDPOModule
from realign_lightning.preferences import ImageIndex
from tests.conftest import alone, picture, preference_samples
from tests.test_recipes import SMALL_DIGITS, small
from tests.tiny_models import make_tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "shards"
    with ShardWriter(folder) as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    return str(folder)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(shards: str, tiny_llava: Path) -> list[str]:
    return [
        *small(shards, str(tiny_llava)),
        "--trainer.precision",
        "32-true",
        "--model.backbone.init_args.dtype",
        "float32",
    ]


class TestQuickStart:
    """The README's first command, reduced in scenes and steps."""

    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory):
        before = Path.cwd()
        os.chdir(tmp_path_factory.mktemp("quick"))
        try:
            cli = run(["fit", "--config", str(ROOT / "recipes" / "digits.yaml"), *SMALL_DIGITS])
            yield cli, Path.cwd() / "runs" / "digits"
        finally:
            os.chdir(before)

    def test_leaves_everything_under_one_folder(self, finished):
        _, folder = finished
        log = folder / "version_0"
        for name in ("shards/train/index.json", "shards/val/index.json", "shards/pairs.png"):
            assert (folder / name).is_file()
        for name in ("config.yaml", "evaluation.json", "evaluation.md", "adapter/adapter_config.json"):
            assert (log / name).is_file()
        assert list(log.glob("events.out.tfevents*"))
        assert [path.name for path in sorted((log / "checkpoints").iterdir())] == ["step=4-adapter", "step=4.ckpt"]
        with Image.open(folder / "shards/pairs.png") as drawn:
            assert drawn.width > 400

    def test_table_has_every_score_for_base_control_and_rdpo(self, finished):
        results = json.loads((finished[1] / "version_0" / "evaluation.json").read_text())
        assert list(results) == ["base", "SFT", "rDPO"]
        kinds = ("random", "popular", "adversarial")
        expected = {f"POPE {kind}: {name}" for kind in kinds for name in ("accuracy", "F1", "yes ratio")}
        expected |= {"CHAIRs", "CHAIRi", "CHAIR recall", "exact captions", "caption length in words"}
        for scores in results.values():
            assert set(scores) == expected
        assert results["base"] != results["rDPO"] != results["SFT"]

    def test_pairs_are_what_the_paper_asks_for(self, finished):
        cli, folder = finished
        dataset = ShardDataset(str(folder / "shards" / "train"), cli.model.backbone)
        assert 8 <= len(dataset) <= 24
        prompts = set()
        for index in range(len(dataset)):
            pair = dataset.decode(index)
            prompts.add(pair.prompt == DESCRIBE)
            assert pair.provenance["retrieved_id"] != pair.provenance["image_id"]
            assert pair.provenance["response_similarity"] < 0.95
            if pair.prompt == DESCRIBE:
                pattern = re.escape(pair.provenance["masked"]).replace(re.escape("[MASK]"), "[a-z]+")
                assert re.fullmatch(pattern, pair.chosen)
                assert re.fullmatch(pattern, pair.rejected), "only the masked words differ"
        assert prompts == {True, False}

    def test_checkpoint_rebuilds_the_module(self, finished):
        cli, folder = finished
        loaded = RDPOModule.load_from_checkpoint(folder / "version_0" / "checkpoints" / "step=4.ckpt")
        assert isinstance(loaded.loss, RDPOLoss)
        assert loaded.loss.sft_weight == cli.model.loss.sft_weight == 1.0
        images = [scene.image for scene in DigitWorld("test", 0.0, seed=5).scenes(3)]
        assert loaded.generate([DESCRIBE] * 3, images) == cli.model.generate([DESCRIBE] * 3, images)

    def test_adapter_answers_alike_in_plain_transformers_and_peft(self, finished):
        cli, folder = finished
        base = AutoModelForImageTextToText.from_pretrained(POLICY_FOLDER)
        plain = PeftModel.from_pretrained(base, folder / "version_0" / "adapter").eval()
        processor = AutoProcessor.from_pretrained(POLICY_FOLDER)
        scenes = DigitWorld("validation", 0.9, seed=50_000).scenes(4)
        prompts = [DESCRIBE, question("two"), DESCRIBE, question("seven")]
        ours = cli.model.generate(prompts, [scene.image for scene in scenes], max_new_tokens=48)
        for prompt, scene, answer in zip(prompts, scenes, ours, strict=True):
            inputs = processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": prompt}],
                    }
                ],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = plain.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(ids, skip_special_tokens=True).strip() == answer

    def test_second_run_uses_the_shards_again_and_other_settings_do_not(self, finished, monkeypatch, capsys):
        _, folder = finished
        monkeypatch.chdir(folder.parent.parent)
        tars = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
        recipe = [
            "fit",
            "--config",
            str(ROOT / "recipes" / "digits.yaml"),
            *SMALL_DIGITS,
            "--trainer.callbacks",
            "null",
        ]
        run([*recipe, "--trainer.max_steps", "1"])
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")} == tars
        run([*recipe, "--trainer.max_steps", "1", "--data.builder.init_args.tau", "0.9"])
        assert all(path.stat().st_mtime_ns != before for path, before in tars.items())

    def test_resuming_with_other_settings_is_refused_unless_it_is_meant(self, finished, monkeypatch):
        _, folder = finished
        monkeypatch.chdir(folder.parent.parent)
        recipe = [
            "fit",
            "--config",
            str(ROOT / "recipes" / "digits.yaml"),
            *SMALL_DIGITS,
            "--trainer.callbacks",
            "null",
        ]
        resume = [*recipe, "--trainer.max_steps", "5", "--ckpt_path", str(folder / "version_0/checkpoints/step=4.ckpt")]
        with pytest.raises(ValueError, match="made with other settings") as refused:
            run([*resume, "--model.loss.init_args.beta", "0.7", "--model.optimizer.init_args.lr", "0.5"])
        allowed = ["--allow_changed_settings", "true"]
        with pytest.raises(ValueError, match=r"model.optimizer.init_args.lr was 0.0003, 0.5 is given\. Give the"):
            run([*resume, "--model.optimizer.init_args.lr", "0.5", *allowed])
        assert "model.loss.init_args.beta was 0.1, 0.7 is given" in str(refused.value)
        assert "model.optimizer.init_args.lr was 0.0003, 0.5 is given" in str(refused.value)
        assert "--allow_changed_settings true" in str(refused.value)
        cli = run([*resume, "--model.loss.init_args.beta", "0.7", "--allow_changed_settings", "true"])
        assert (cli.trainer.global_step, cli.model.loss.beta) == (5, 0.7)
        assert run(resume).trainer.global_step == 5


ONE_EPOCH = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "1")


def fit_args(recipe_args: list[str], *more: str) -> list[str]:
    return ["fit", "--config", str(ROOT / "recipes" / "llava7b_lora.yaml"), *recipe_args, *more]


class HereLogger(DummyLogger):
    """Like WandbLogger, its folder is the current one."""

    @property
    def save_dir(self):
        return "."


class TestBadInput:
    @pytest.fixture
    def args(self, shards, tiny_llava, inside):
        return tiny(shards, tiny_llava)

    def test_unknown_key(self, args, inside, capsys):
        (inside / "mistake.yaml").write_text("model:\n  los:\n    class_path: realign_lightning.losses.RDPOLoss\n")
        with pytest.raises(SystemExit) as stop:
            run(fit_args(args, "--config", "mistake.yaml"))
        assert stop.value.code == 2
        assert "los" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("no/such/model", "'no/such/model': no such folder"),
            ("/nope", "'/nope': no such folder"),
            ("my_polcy", "'my_polcy': no such folder"),
            (".", "'.': a folder without config.json"),
            ("no-such-owner/model", "'no-such-owner/model' cannot be loaded"),
        ],
    )
    def test_wrong_backbone_path(self, args, path, message, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match=message) as raised:
            run(fit_args(args, "--model.backbone.init_args.path", path))
        assert "set `path` of the backbone" in str(raised.value)

    def test_the_script_ends_with_one_message(self, args, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["realign-lightning", *fit_args(args, "--data.train", "nowhere")])
        with pytest.raises(SystemExit) as stop:
            main()
        assert str(stop.value.code).startswith("error: ")
        assert "nowhere" in str(stop.value.code)
        monkeypatch.setenv("REALIGN_TRACEBACK", "1")
        with pytest.raises(ValueError, match="nowhere"):
            main()

    def test_errors_from_elsewhere_keep_their_traceback(self, args, monkeypatch):
        def broken(*args, **kwargs):
            raise ValueError("not this package's")

        monkeypatch.setattr("realign_lightning.cli.run", broken)
        with pytest.raises(ValueError, match="not this package's"):
            main()

    def test_a_configuration_in_the_current_folder_is_never_overwritten(self, args, inside):
        (inside / "config.yaml").write_text("# my own\nseed_everything: 1\n")
        quiet = ["--trainer.logger", "false", "--trainer.callbacks", "null", "--trainer.default_root_dir", "."]
        run(fit_args(args, "--config", "config.yaml", *quiet))
        wandb_like = ["--trainer.logger", "tests.test_cli.HereLogger", "--trainer.callbacks", "null"]
        run(fit_args(args, "--config", "config.yaml", *wandb_like))
        assert (inside / "config.yaml").read_text() == "# my own\nseed_everything: 1\n"

    def test_missing_shards(self, args):
        with pytest.raises(ValueError, match="nowhere"):
            run(fit_args(args, "--data.train", "nowhere"))

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nope.ckpt", "--ckpt_path nope.ckpt: no such checkpoint"),
            ("empty", "this folder is no checkpoint"),
            ("shards", "is a folder of shards, which FSDP2Strategy reads"),
            ("junk.ckpt", "PyTorch cannot read this file"),
            ("list.ckpt", "this file is no checkpoint of a run"),
        ],
    )
    def test_paths_that_are_no_checkpoints(self, args, inside, path, message):
        (inside / "empty").mkdir()
        (inside / "shards").mkdir()
        (inside / "shards" / "meta.pt").touch()
        (inside / "junk.ckpt").write_text("text")
        torch.save([1], inside / "list.ckpt")
        with pytest.raises((ValueError, OSError), match=message):
            run(fit_args(args, "--ckpt_path", path))

    def test_4_bit_without_an_adapter(self, args):
        quantised = ["--model.backbone.init_args.quantization", "nf4", "--model.adapter", "null"]
        with pytest.raises(ValueError, match="A 4-bit model cannot be trained in full: set `adapter`"):
            run(fit_args(args, *quantised, "--model.part_learning_rates", "null"))

    def test_missing_bitsandbytes(self, args, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        real = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
        )
        with pytest.raises(ImportError, match="needs the package bitsandbytes: pip install bitsandbytes"):
            run(fit_args(args, "--model.backbone.init_args.quantization", "nf4"))

    def test_missing_faiss(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ImportError, match="needs the package faiss: pip install faiss-cpu"):
            ImageIndex(["a"], torch.ones(1, 1)).neighbours(1)

    def test_unknown_lora_target(self, args):
        with pytest.raises(ValueError, match="LoRA cannot be put on LlavaForConditionalGeneration") as raised:
            run(fit_args(args, "--model.adapter.target_modules", "no_such_layer"))
        assert "'q_proj'" in str(raised.value)

    def test_fsdp_with_4_bit(self, args):
        done = subprocess.run(  # noqa: S603
            [
                *(sys.executable, "-m", "realign_lightning"),
                *fit_args(args, "--model.backbone.init_args.quantization", "nf4", "--trainer.devices", "1"),
                *("--trainer.strategy", str(ROOT / "configs" / "strategies" / "fsdp2.yaml")),
            ],
            env=alone(),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 1
        assert "error: FSDP cannot shard 4-bit weights: set `quantization: null`" in done.stderr

    def test_checkpoint_of_another_backbone(self, args, inside):
        run(fit_args(args))
        (checkpoint,) = inside.rglob("*.ckpt")
        other = make_tiny("llava_next_vicuna", inside / "other")
        swapped = fit_args(args, "--model.backbone.init_args.path", str(other), "--ckpt_path", str(checkpoint))
        with pytest.raises(
            ValueError, match=r"other settings: model.backbone.init_args.path was .*/llava', .*/other' is"
        ):
            run(swapped)
        with pytest.raises(ValueError, match="made with another backbone, a llava, and this is a llava_next"):
            run([*swapped, "--allow_changed_settings", "true"])

    def test_resume_from_a_checkpoint_whose_weights_do_not_fit(self, args, inside):
        run(fit_args(args))
        (checkpoint,) = inside.rglob("*.ckpt")
        state = torch.load(checkpoint, weights_only=True)
        state["state_dict"] = {name.replace("q_proj", "z_proj"): value for name, value in state["state_dict"].items()}
        torch.save(state, "other.ckpt")
        with pytest.raises(ValueError, match="another backbone or adapter"):
            run(fit_args(args, "--ckpt_path", "other.ckpt"))


def test_bad_samples_are_counted_and_named_and_the_rest_is_trained_on(shards, tiny_llava, inside, caplog):
    """One image token in a text among 8 samples: 12.5 % is allowed here, and 8 - 1 are trained on.

    The bad one is the first, which the recipe's SampleAnswers would show.
    """
    with ShardWriter("mixed") as writer:
        for sample in preference_samples(8):
            bad = {"chosen": "a <image> cat"} if sample.key == "sample0" else {}
            writer.write(type(sample)(**{**vars(sample), **bad}))
    args = tiny("mixed", tiny_llava)
    seen = []

    class Watched(RDPOModule):
        def training_step(self, batch, batch_idx):
            seen.extend(key for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight)
            return super().training_step(batch, batch_idx)

    from realign_lightning import modules

    original, modules.RDPOModule = modules.RDPOModule, Watched
    try:
        cli = run(fit_args(args, *ONE_EPOCH, "--data.max_bad_fraction", "0.2", "--data.val", "null"))
    finally:
        modules.RDPOModule = original
    assert sorted(seen) == [f"sample{number}" for number in range(1, 8)]
    (skip,) = cli.datamodule.skipped["train"]
    assert (skip.shard, skip.key) == ("shard-000000.tar", "sample0")
    assert "image token" in skip.reason
    assert "sample0" in caplog.text
    assert "shard-000000.tar" in caplog.text


def test_help_is_readable_and_lists_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "realign_lightning", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("fit", "validate", "teach-digits", "recipes/digits.yaml"):
        assert word in done.stdout
    assert "Traceback" not in done.stderr
    assert not done.stderr.strip(), done.stderr


def test_commands_beside_the_trainers_run(inside, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["teach-digits", "--help"])
    assert stop.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_the_installed_script_ends_with_status_zero(shards, tiny_llava, inside, monkeypatch):
    """A script is run as ``sys.exit(script())``: anything but None or 0 would be a failure."""
    (script,) = entry_points(group="console_scripts", name="realign-lightning")
    args = fit_args(tiny(shards, tiny_llava))
    monkeypatch.setattr(sys, "argv", ["realign-lightning", *args, "--trainer.max_steps", "1"])
    assert script.load()() is None
    assert list(inside.rglob("*.ckpt"))


def test_validate_runs_a_checkpoint(shards, tiny_llava, inside):
    args = tiny(shards, tiny_llava)
    trained = run(fit_args(args))
    (checkpoint,) = inside.rglob("*.ckpt")
    recipe = str(ROOT / "recipes" / "llava7b_lora.yaml")
    again = run(["validate", "--config", recipe, *args, "--ckpt_path", str(checkpoint)])
    assert again.trainer.callback_metrics["val/loss"] < 2 * math.log(2)
    assert trained.model.generate(["a"], [picture(0)]) == again.model.generate(["a"], [picture(0)])
