"""Every recipe and every piece through the real command line, on tiny checkpoints of their families."""

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import yaml

from realign_lightning.cli import run
from realign_lightning.data import ShardWriter
from tests.conftest import preference_samples
from tests.tiny_models import make_tiny

ROOT = Path(__file__).parent.parent
OTHERS = sorted(path for kind in ("build", "eval", "evidence") for path in (ROOT / "recipes" / kind).glob("*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(OTHERS))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# The family of a checkpoint, by what its name on the hub contains.
FAMILY_OF = {
    "llava-1.5": "llava",
    "llava-v1.6-mistral": "llava_next_mistral",
    "llava-v1.6-vicuna": "llava_next_vicuna",
    "llava-onevision": "llava_onevision",
    "Qwen2-VL": "qwen2_vl",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Janus": "janus",
    "InternVL": "internvl",
    "SmolVLM": "smolvlm",
    "gemma-3": "gemma3",
    "paligemma": "paligemma",
}

# Keeps the digits' quick start small; everything else is as the recipe has it.
SMALL_DIGITS = [
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"),
    *("--data.batch_size", "8", "--data.builder.init_args.scenes", "12", "--data.builder.init_args.val_scenes", "4"),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def backbone_file(recipe: Path) -> Path:
    return (recipe.parent / yaml.safe_load(recipe.read_text())["model"]["backbone"]).resolve()


def is_fsdp(recipe: Path) -> bool:
    return "fsdp2" in str(yaml.safe_load(recipe.read_text())["trainer"].get("strategy"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recipes") / "shards"
    with ShardWriter(folder) as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory):
    """The tiny checkpoint that stands for the path in a backbone file."""
    made: dict[str, Path] = {}

    def find(file: Path) -> str:
        path = yaml.safe_load(file.read_text())["init_args"]["path"]
        (family,) = (family for part, family in FAMILY_OF.items() if part in path)
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp("tiny") / family)
        return str(made[family])

    return find


def small(shards: str, checkpoint: str) -> list[str]:
    """What makes a recipe run here: a tiny checkpoint of the same family in place of its own, a CPU, few steps."""
    return [
        *("--model.backbone.init_args.path", checkpoint),
        *("--data.train", shards, "--data.val", shards, "--data.num_workers", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.max_epochs", "-1"),
        *("--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "2"),
        *("--trainer.accumulate_grad_batches", "1", "--trainer.default_root_dir", "run"),
        # The last callback shows answers.
        *("--trainer.enable_progress_bar", "false", "--trainer.callbacks.max_new_tokens", "4"),
    ]


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit_and_validate(arguments: list[str], folder: Path) -> None:
    """Fit, then validate what was fitted from its checkpoint, in this process."""
    cli = run(["fit", *arguments])
    assert cli.trainer.global_step == 2
    assert math.isfinite(cli.trainer.callback_metrics["train/loss"])
    trained = {name: value for name, value in cli.model.policy.named_parameters() if value.requires_grad}
    assert all(value.any() for name, value in trained.items() if "lora_B" in name), "every adapter starts at zero"
    projector = [(name, value) for name, value in trained.items() if "modules_to_save" in name]
    assert projector, "the projector is trained as in the paper"
    weights = dict(cli.model.policy.named_parameters())
    before = [weights[name.replace("modules_to_save.default", "original_module")] for name, _ in projector]
    moved = [not value.equal(old) for (_, value), old in zip(projector, before, strict=True)]
    assert sum(moved) > len(moved) / 2, "and moves, but for what a tiny model never uses"
    if cli.model.backbone.quantization is not None:
        kinds = {name for name, module in cli.model.policy.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert kinds
        assert all(cli.model.backbone.parts(cli.model.policy)[f"{name}.weight"] == "language_model" for name in kinds)
    (checkpoint,) = folder.rglob("*.ckpt")
    validated = run(["validate", *arguments, "--ckpt_path", str(checkpoint)])
    assert math.isfinite(validated.trainer.callback_metrics["val/loss"])
    assert validated.trainer.callback_metrics["val/loss"] == pytest.approx(
        float(cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]["val/loss"]), abs=1e-3
    )


def fit_and_validate_in_two_processes(arguments: list[str], folder: Path, run_module: Callable[..., str]) -> None:
    """The same by the command itself, on two ranks with gloo."""

    def call(*more: str) -> None:
        run_module("realign_lightning", *more, processes=2, folder=folder)

    two = [*arguments, "--trainer.devices", "2", "--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
    two += ["--trainer.logger.save_dir", "log"]
    call("fit", *two)
    (checkpoint,) = folder.rglob("*.ckpt")
    assert checkpoint.is_dir()
    assert (checkpoint / "meta.pt").is_file()
    assert list(folder.rglob("model/config.json")), "the whole model is written when training ends"
    call("validate", *two, "--ckpt_path", str(checkpoint))
    rows = [row for file in sorted(folder.rglob("metrics.csv")) for row in csv.DictReader(file.open())]
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses[0] == pytest.approx(2 * math.log(2), rel=0.02)
    assert all(math.isfinite(float(row["val/loss"])) for row in rows if row.get("val/loss"))
    assert any(row.get("val/loss") for row in rows)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_recipe_fits_two_steps_and_validates(recipe, shards, tiny_of, inside, run_module):
    if recipe.name == "digits.yaml":
        # Builds its own pairs for the policy that ships with the package.
        cli = run(["fit", "--config", str(recipe), *SMALL_DIGITS])
        assert cli.trainer.global_step == 4
        (checkpoint,) = inside.rglob("*.ckpt")
        again = run(["validate", "--config", str(recipe), *SMALL_DIGITS, "--ckpt_path", str(checkpoint)])
        assert math.isfinite(again.trainer.callback_metrics["val/loss"])
        return
    arguments = ["--config", str(recipe), *small(shards, tiny_of(backbone_file(recipe)))]
    if is_fsdp(recipe):
        fit_and_validate_in_two_processes(arguments, inside, run_module)
    else:
        fit_and_validate(arguments, inside)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.parent.name == "backbones"], ids=name_of)
def test_every_backbone_file_serves_a_recipe_of_another(config, shards, tiny_of, inside, capsys):
    """Swapping the backbone is one line; a file that no recipe names is trained with here."""
    recipe = ["--config", str(ROOT / "recipes" / "llava7b_lora.yaml"), "--model.backbone", str(config)]
    with pytest.raises(SystemExit) as stop:
        run(["fit", *recipe, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["backbone"] == yaml.safe_load(config.read_text()), "a backbone file names every argument"
    if not any(backbone_file(recipe) == config for recipe in RECIPES):
        fit_and_validate([*recipe, *small(shards, tiny_of(config))], inside)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.parent.name != "backbones"], ids=name_of)
def test_every_other_piece_is_used_by_a_recipe(config):
    assert any(f"/{config.relative_to(ROOT)}" in recipe.read_text() for recipe in RECIPES)


@pytest.mark.parametrize("recipe", [one for one in [*RECIPES, *OTHERS] if one.parent.name != "evidence"], ids=name_of)
def test_every_recipe_introduces_itself_with_a_command_that_names_it(recipe):
    header = re.match(r"(#[^\n]*\n)+", recipe.read_text()).group()
    command = {"build": "build", "eval": "test"}.get(recipe.parent.name, "fit")
    assert f"realign-lightning {command} --config {recipe.relative_to(ROOT)}" in header
    assert len(header.splitlines()) >= 6


def test_the_nine_models_of_the_paper_and_its_ablations_have_recipes():
    names = {recipe.stem for recipe in RECIPES}
    assert names >= {
        *("llava7b_lora", "llava13b_qlora", "llava13b_fsdp", "llava16_mistral7b_lora", "llava16_vicuna7b_lora"),
        *("llava16_vicuna13b_qlora", "qwen25vl_3b_lora", "qwen25vl_7b_lora", "qwen25vl_7b_fsdp", "qwen3vl_8b_qlora"),
        *("januspro_1b_lora", "januspro_7b_lora"),
    }
    settings = [yaml.safe_load(recipe.read_text()) for recipe in RECIPES if recipe.parent.name == "ablations"]
    losses = [one["model"]["loss"] for one in settings]
    weights = {loss["init_args"]["visual_weight"] for loss in losses if "init_args" in loss}
    assert weights == {0, 0.25, 0.5, 0.75, 1}
