"""What recipes may name: in safe mode nothing hostile is imported, wherever it stands, and the error says where."""

import json
import os
import sys
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from jsonargparse import _common, _optionals

from realign_lightning import safe_config
from realign_lightning.cli import run
from realign_lightning.engines import EndpointEngine, VLLMEngine
from realign_lightning.export import export_checkpoint
from realign_lightning.modules import RDPOModule
from realign_lightning.preferences.command import read_recipe

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "recipes" / "digits.yaml")
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "evidence")

HOSTILE = """
import os, pathlib
pathlib.Path(os.environ["HOSTILE_MARK"]).write_text("imported")
from realign_lightning.losses import RDPOLoss as Loss

def function(*args): ...

class Anything: ...
"""


class Hostile:
    """A module on Python's path that tells when it is imported."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "mark"
        (folder / "hostile_module.py").write_text(HOSTILE)

    @property
    def ran(self) -> bool:
        return self.mark.exists()


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "mark"))
    yield Hostile(tmp_path)
    sys.modules.pop("hostile_module", None)


@pytest.fixture
def safe_mode(monkeypatch):
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", "1")


def recipe(settings: dict, name: str = "recipe.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(settings))
    return name


def read(command: str, *arguments: str) -> int:
    """Exit status of a command that reads its recipe and does nothing else."""
    try:
        run([command, *arguments, "--print_config"])
    except SystemExit as stop:
        return stop.code
    return 0


LOSS = {"class_path": "hostile_module.Loss"}
THING = {"class_path": "hostile_module.Anything"}

PLACES = {
    "class_path": ({"model": {"loss": LOSS}}, "model.loss.class_path"),
    "path alone": ({"model": {"loss": "hostile_module.Loss"}}, "model.loss"),
    "function": ({"model": {"optimizer": "hostile_module.function"}}, "model.optimizer"),
    "flow in a string": ({"model": {"loss": "{class_path: hostile_module.Loss}"}}, "model.loss.class_path"),
    "list": ({"trainer": {"callbacks": [THING]}}, "trainer.callbacks[0].class_path"),
    "logger": ({"trainer": {"logger": THING}}, "trainer.logger.class_path"),
    "profiler": ({"trainer": {"profiler": THING}}, "trainer.profiler.class_path"),
    "plugins": ({"trainer": {"plugins": [THING]}}, "trainer.plugins[0].class_path"),
    "strategy": ({"trainer": {"strategy": THING}}, "trainer.strategy.class_path"),
    "untyped": ({"model": {"adapter": {"options": {"x": THING}}}}, "model.adapter.options.x.class_path"),
    "builder": ({"data": {"builder": THING}}, "data.builder.class_path"),
    "deep": (
        {
            "trainer": {
                "callbacks": [
                    {
                        "class_path": "realign_lightning.callbacks.Evaluation",
                        "init_args": {"benchmarks": [THING]},
                    }
                ]
            }
        },
        "trainer.callbacks[0].init_args.benchmarks[0].class_path",
    ),
}


@pytest.mark.parametrize(("place", "command"), [*((place, "fit") for place in PLACES), ("class_path", "validate")])
def test_hostile_imports_are_refused_with_file_and_place(hostile, safe_mode, place, command):
    settings, key = PLACES[place]
    with pytest.raises(ValueError, match="in safe mode") as refused:
        run([command, "--config", DIGITS, "--config", recipe(settings), "--print_config"])
    assert str(refused.value).startswith(f"recipe.yaml: {key}: 'hostile_module.")
    assert "REALIGN_SAFE_PACKAGES" in str(refused.value)
    assert not hostile.ran


@pytest.mark.parametrize("place", PLACES)
def test_the_guard_behind_the_reading_holds_alone(hostile, safe_mode, place, monkeypatch, capsys):
    """Should the recipes' own reading pass something over, jsonargparse's import does not happen either."""
    monkeypatch.setattr(safe_config, "_check_recipes", lambda arguments: None)
    status = read("fit", "--config", DIGITS, "--config", recipe(PLACES[place][0]))
    # What has no type is kept as it is, and is nobody's class.
    assert status == (0 if place == "untyped" else 2)
    assert "denied by the '*' entry" in capsys.readouterr().err or place == "untyped"
    assert not hostile.ran


@pytest.mark.parametrize("place", PLACES)
def test_without_safe_mode_the_same_recipes_import(hostile, place, capsys):
    read("fit", "--config", DIGITS, "--config", recipe(PLACES[place][0]))
    assert hostile.ran


@pytest.mark.parametrize(
    ("command", "base", "settings", "key"),
    [
        ("build", "build/digits.yaml", {"source": THING}, "source.class_path"),
        (
            "build",
            "build/digits.yaml",
            {"builder": {"completer": {"init_args": {"engine": THING}}}},
            "builder.completer.init_args.engine.class_path",
        ),
        ("test", "eval/digits_pope.yaml", {"benchmark": THING}, "benchmark.class_path"),
        ("test", "eval/digits_pope.yaml", {"engine": "hostile_module.Anything"}, "engine"),
    ],
)
def test_build_and_test_refuse_likewise(hostile, monkeypatch, command, base, settings, key):
    arguments = ["--config", str(ROOT / "recipes" / base), "--config", recipe(settings)]
    read(command, *arguments)
    assert hostile.ran, "the control: it would have been imported"
    hostile.mark.unlink()
    sys.modules.pop("hostile_module")
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", "1")
    with pytest.raises(ValueError, match=r"recipe\.yaml: ") as refused:
        run([command, *arguments, "--print_config"])
    assert key in str(refused.value)
    assert not hostile.ran


def test_estimate_and_recipes_read_from_python_refuse_likewise(hostile, safe_mode):
    with pytest.raises(ValueError, match=r"recipe\.yaml: model\.loss"):
        run(["estimate", "--config", DIGITS, "--config", recipe({"model": {"loss": LOSS}})])
    build = str(ROOT / "recipes" / "build" / "digits.yaml")
    with pytest.raises(ValueError, match=r"source\.yaml: source"):
        read_recipe(["--config", build, "--config", recipe({"source": THING}, "source.yaml")])
    assert not hostile.ran


def test_files_that_recipes_name_are_looked_through(hostile, safe_mode):
    Path("pieces").mkdir()
    Path("pieces/loss.yaml").write_text(yaml.safe_dump(LOSS))
    Path("pieces/callbacks.json").write_text(json.dumps([THING]))
    with pytest.raises(ValueError, match=r"pieces/loss\.yaml: class_path: 'hostile_module\.Loss'"):
        run(["fit", "--config", DIGITS, "--config", recipe({"model": {"loss": "pieces/loss.yaml"}}), "--print_config"])
    with pytest.raises(ValueError, match=r"pieces/callbacks\.json: \[0\]\.class_path"):
        run(["fit", "--config", DIGITS, "--trainer.callbacks", "pieces/callbacks.json", "--print_config"])
    for option in (["--config", "anything"], ["-c", "anything"], ["-canything"], ["--config=anything"]):
        recipe({"model": {"loss": LOSS}}, "anything")
        with pytest.raises(ValueError, match=r"^anything: model\.loss\.class_path"):
            run(["fit", "--config", DIGITS, *option])
    Path("loss.txt").write_text(yaml.safe_dump(LOSS))
    with pytest.raises(ValueError, match=r"loss\.txt: class_path: 'hostile_module\.Loss'"):
        run(["fit", "--config", DIGITS, "--model.loss", "loss.txt"])
    assert not hostile.ran


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.loss", "hostile_module.Loss"],
        ["--model.loss=hostile_module.Loss"],
        ["--model.loss", '{"class_path": "hostile_module.Loss"}'],
        ["--model.loss.class_path", "hostile_module.Loss"],
        ["--trainer.callbacks+=hostile_module.Anything"],
    ],
)
def test_the_command_line_is_held_to_the_same_list(hostile, safe_mode, arguments):
    with pytest.raises(ValueError, match="the command line: --"):
        run(["fit", "--config", DIGITS, *arguments, "--print_config"])
    assert not hostile.ran


def test_help_for_a_class_does_not_import_it_either(hostile, safe_mode):
    with pytest.raises(ValueError, match="hostile_module"):
        run(["fit", "--model.loss.help", "hostile_module.Loss"])
    assert not hostile.ran


@pytest.mark.parametrize(
    "path",
    [
        "lightning.pytorch.callbacks.LambdaCallback",
        "lightning.pytorch.callbacks.lambda_function.LambdaCallback",
        "lightning.pytorch.loggers.WandbLogger",
        "lightning.pytorch.loggers.MLFlowLogger",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.strategies.DeepSpeedStrategy",
        "realign_lightning.cli.os.system",
        "realign_lightning.cli.run",
        "realign_lightning.data.publish.main",
        "torch.load",
        "torch.hub.load",
        "torchmetrics.text.BERTScore",
        "jsonargparse.set_parsing_settings",
        "os.system",
        "builtins.eval",
    ],
)
def test_what_could_do_harm_is_not_on_the_list(path):
    assert not safe_config.is_allowed(path)


@pytest.mark.parametrize(
    ("alias", "defined_in"),
    [
        ("lightning.pytorch.callbacks.model_checkpoint.os.system", "posix"),
        ("torch.optim.optimizer.functools.partial", "functools"),
        ("torchmetrics.BLEUScore", "torchmetrics.text"),
    ],
)
def test_another_name_for_what_is_refused_does_not_help(hostile, safe_mode, alias, defined_in, capsys):
    assert safe_config.is_allowed(alias), "the name alone would pass"
    assert read("fit", "--config", DIGITS, "--config", recipe({"trainer": {"callbacks": [{"class_path": alias}]}})) == 2
    assert defined_in in capsys.readouterr().err


def test_pythons_own_dangers_are_refused_without_safe_mode_too(hostile, capsys):
    callback = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(hostile.mark)]}}
    assert read("fit", "--config", DIGITS, "--config", recipe({"trainer": {"callbacks": [callback]}})) == 2
    assert "not allowed" in capsys.readouterr().err


def test_classes_in_untyped_settings_are_never_made(hostile):
    """jsonargparse would make an object of any class that such a setting names, without asking what it is for."""
    settings = {"model": {"adapter": {"options": {"x": {"class_path": "hostile_module.Anything"}}}}}
    with pytest.raises((TypeError, ValueError)):
        run(["estimate", "--config", DIGITS, "--config", recipe(settings)])
    with pytest.raises((TypeError, ValueError)) as refused:
        run(["estimate", "--config", DIGITS, "--config", recipe(settings)])
    assert "Anything object" not in str(refused.value)


@pytest.mark.parametrize(
    "option", [["--config", "https://example.org/r.yaml"], ["--config=s3://bucket/r.yaml"], ["-c", "hf://r"]]
)
def test_recipes_from_urls_are_refused(safe_mode, option):
    with pytest.raises(ValueError, match="recipes are read from this machine only"):
        run(["fit", *option])


def test_pieces_from_urls_are_not_fetched(hostile, monkeypatch, capsys):
    with fsspec.open("memory://loss.yaml", "w") as file:
        file.write(yaml.safe_dump({"class_path": "realign_lightning.losses.RDPOLoss"}))
    piece = recipe({"model": {"loss": "memory://loss.yaml"}})
    assert read("fit", "--config", DIGITS, "--config", piece) == 0, "the control: Lightning reads them"
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", "1")
    with pytest.raises(ValueError, match=r"model\.loss: 'memory://loss\.yaml' is an address"):
        run(["fit", "--config", DIGITS, "--config", piece])
    capsys.readouterr()


def test_packages_of_the_users_own_can_be_added(hostile, safe_mode, monkeypatch):
    monkeypatch.setenv("REALIGN_SAFE_PACKAGES", "other, hostile_module")
    settings = {"model": {"loss": LOSS}}
    read("fit", "--config", DIGITS, "--config", recipe(settings))
    assert hostile.ran


@pytest.mark.parametrize(
    ("variable", "value"),
    [("REALIGN_SAFE_CONFIG", "maybe"), ("REALIGN_SAFE_PACKAGES", "a-b"), ("REALIGN_SAFE_PACKAGES", "*")],
)
def test_variables_that_say_nothing_are_errors(safe_mode, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        run(["fit", "--config", DIGITS, "--model.loss", "realign_lightning.losses.RDPOLoss", "--print_config"])


def test_settings_are_as_before_afterwards(safe_mode):
    before = dict(_common.parsing_settings), _optionals._config_read_mode
    assert read("fit", "--config", DIGITS) == 0
    assert (dict(_common.parsing_settings), _optionals._config_read_mode) == before


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_recipe_of_ours_is_read_in_safe_mode(file, tmp_path, monkeypatch, safe_mode, capsys):
    monkeypatch.chdir(tmp_path)
    command = {"build": "build", "eval": "test"}.get(file.parent.name, "fit")
    assert read(command, "--config", str(file)) == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_what_training_has_beside_its_recipes_is_allowed(hostile, safe_mode):
    """Loggers that write files, SLURM, mixed precision, other optimizers."""
    settings = {
        "model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
        "trainer": {
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "log"}},
            "plugins": [{"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}],
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
                {"class_path": "EarlyStopping"},
            ],
        },
    }
    settings["trainer"]["callbacks"][1]["init_args"] = {"monitor": "val/loss"}
    assert read("fit", "--config", DIGITS, "--config", recipe(settings)) == 0


# ---- checkpoints name classes, too


def checkpoint(backbone: str) -> Path:
    content = {
        "state_dict": {"a": torch.zeros(1)},
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {
            "backbone": {"class_path": backbone, "init_args": {}},
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        },
    }
    torch.save(content, "run.ckpt")
    return Path("run.ckpt")


@pytest.mark.parametrize(
    "load", [RDPOModule.load_from_checkpoint, lambda path: export_checkpoint(path, "out")], ids=["load", "export"]
)
def test_classes_that_a_checkpoint_names_are_held_to_the_list(hostile, monkeypatch, load):
    path = checkpoint("hostile_module.Anything")
    with pytest.raises(Exception, match="hostile_module"):
        load(path)
    assert hostile.ran, "the control: without safe mode any class of a backbone may be the user's own"
    hostile.mark.unlink()
    sys.modules.pop("hostile_module")
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", "1")
    with pytest.raises(Exception, match="not allowed"):
        load(path)
    assert not hostile.ran


@pytest.mark.parametrize("load", [RDPOModule.load_from_checkpoint, lambda path: export_checkpoint(path, "out")])
def test_a_checkpoint_cannot_name_what_runs_commands(hostile, load):
    with pytest.raises(Exception, match="not allowed"):
        load(checkpoint("os.system"))


# ---- services


def test_in_safe_mode_recipes_choose_no_address_and_no_key(safe_mode, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    EndpointEngine("gpt-4o-mini")
    with pytest.raises(ValueError, match=r"`base_url` to be null, got 'http://thief\.example'"):
        EndpointEngine("m", base_url="http://thief.example")
    with pytest.raises(ValueError, match="`api_key_env` to be OPENAI_API_KEY, got 'AWS_SECRET_ACCESS_KEY'"):
        EndpointEngine("m", api_key_env="AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://mine.example")
    assert EndpointEngine("m", base_url="http://mine.example").base_url == "http://mine.example"
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", "0")
    assert EndpointEngine("m", base_url="http://other.example").base_url == "http://other.example"


def test_in_safe_mode_vllm_takes_no_options(safe_mode, monkeypatch):
    VLLMEngine("m")
    with pytest.raises(ValueError, match=r"no `options` of VLLMEngine, got \['worker_cls'\]"):
        VLLMEngine("m", options={"worker_cls": "hostile_module.Anything"})
    monkeypatch.delenv("REALIGN_SAFE_CONFIG")
    assert VLLMEngine("m", options={"enforce_eager": True}).options == {"enforce_eager": True}


def test_the_environment_is_not_left_changed():
    assert "REALIGN_SAFE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"trainer": {"default_root_dir": "s3://bucket/runs"}}, "trainer.default_root_dir"),
        (
            {
                "trainer": {
                    "logger": {
                        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                        "init_args": {"save_dir": "", "name": "memory://bucket/x"},
                    }
                }
            },
            r"trainer\.logger\.init_args\.name",
        ),
        ({"trainer": {"default_root_dir": " simplecache::memory://x"}}, "trainer.default_root_dir"),
        (
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                            "init_args": {"dirpath": "ftp://example.org/up"},
                        }
                    ]
                }
            },
            r"trainer\.callbacks\[0\]\.init_args\.dirpath",
        ),
    ],
)
def test_a_recipe_sends_no_files_anywhere(safe_mode, tmp_path, settings, key):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {key}: .* is an address"):
        run(["fit", "--config", DIGITS, "--config", str(recipe), "--print_config"])


def test_a_piece_of_any_name_sends_no_files_anywhere(safe_mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "memory://bucket/x"}}
    Path("lg.txt").write_text(yaml.safe_dump(logger))
    for piece in ({"trainer": {"logger": "lg.txt"}}, {"trainer": "tr.txt"}):
        Path("tr.txt").write_text(yaml.safe_dump({"logger": logger}))
        Path("recipe.yaml").write_text(yaml.safe_dump(piece))
        with pytest.raises(ValueError, match=r"(lg|tr)\.txt: .*save_dir: 'memory://bucket/x' is an address"):
            run(["fit", "--config", DIGITS, "--config", "recipe.yaml", "--print_config"])


@pytest.mark.parametrize("text", ["trainer: {default_root_dir: memory://x}", "model: {loss: {class_path: a.B}}"])
def test_recipes_too_large_to_be_looked_through_are_not_read(safe_mode, tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# padding\n" * 500_000 + text)
    with pytest.raises(ValueError, match=r"recipe\.yaml looks like a recipe of more than 4 MiB"):
        run(["fit", "--config", DIGITS, "--config", str(recipe), "--print_config"])


@pytest.mark.parametrize("mode", ["0", "1"])
def test_long_texts_are_no_paths(tmp_path, monkeypatch, capsys, mode):
    monkeypatch.setenv("REALIGN_SAFE_CONFIG", mode)
    text = "What is wrong with this answer? " * 200
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"train": text}}, width=10**6))
    for arguments in (["--config", str(recipe)], ["--data.train", text]):
        with pytest.raises(SystemExit):
            run(["fit", "--config", DIGITS, *arguments, "--print_config"])
        assert "What is wrong with" in capsys.readouterr().out


def test_large_data_are_no_recipes(tmp_path, safe_mode):
    (tmp_path / "data.json").write_text(json.dumps([{"image": f"http://{number}.jpg"} for number in range(200_000)]))
    (tmp_path / "shard.tar").write_bytes(b"class_path" + bytes(5 << 20))
    for name in ("data.json", "shard.tar"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"data": {"train": str(tmp_path / name)}}))
        with pytest.raises(SystemExit):
            run(["fit", "--config", DIGITS, "--config", str(recipe), "--print_config"])


def test_code_of_checkpoints_is_refused_in_large_recipes_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# padding\n" * 500_000 + "model: {backbone: {init_args: {trust_remote_code: true}}}")
    with pytest.raises(ValueError, match="cannot let a checkpoint run its own Python code"):
        run(["fit", "--config", DIGITS, "--config", str(recipe), "--print_config"])


def test_addresses_to_write_to_are_fine_from_the_user_and_without_safe_mode(monkeypatch, capsys):
    given = ["fit", "--config", DIGITS, "--trainer.default_root_dir", "s3://bucket/runs", "--print_config"]
    for mode in ("1", "0"):
        monkeypatch.setenv("REALIGN_SAFE_CONFIG", mode)
        with pytest.raises(SystemExit):
            run(given)
        assert "s3://bucket/runs" in capsys.readouterr().out
