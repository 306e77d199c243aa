"""What is read from strangers runs nothing (checkpoints, weights, code of models); known holes are excluded."""

import ast
import json
import logging
import os
import pickle
import re
import shutil
import threading
import tomllib
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from packaging.requirements import Requirement
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig

import realign_lightning
from realign_lightning.backbones import AutoBackbone, revisions
from realign_lightning.cli import run
from realign_lightning.data import ShardWriter
from realign_lightning.engines import TextEngine, VLLMEngine
from realign_lightning.evaluation.command import _of_adapter
from realign_lightning.modules import RDPOModule
from realign_lightning.modules.shard_reader import ShardPlanner, ShardReader
from realign_lightning.preferences import TimmEncoder
from realign_lightning.trust import allowed_by, are_pickled_weights_allowed, is_remote_code_trusted
from tests.conftest import preference_samples
from tests.test_recipes import small

ROOT = Path(__file__).parent.parent
PACKAGE = Path(realign_lightning.__file__).parent
DIGITS = str(ROOT / "recipes" / "digits.yaml")
LLAVA = str(ROOT / "recipes" / "llava7b_lora.yaml")
FSDP = str(ROOT / "configs" / "strategies" / "fsdp2.yaml")


class RunsACommand:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """What a hostile file makes when it is run; commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("supply") / "shards"
    with ShardWriter(folder) as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    return str(folder)


def hostile_checkpoint(mark: Path) -> Path:
    path = Path("run.ckpt")
    hyperparameters = {"backbone": {"class_path": "realign_lightning.demos.DigitBackbone", "init_args": {}}}
    torch.save({"state_dict": {}, "hyper_parameters": hyperparameters, "callbacks": RunsACommand(mark)}, path)
    torch.load(path, weights_only=False)
    assert mark.exists(), "the control: plain unpickling runs it"
    mark.unlink()
    return path


def hostile_folder(mark: Path, where: str) -> Path:
    """A folder of shards as FSDP2Strategy writes them, with a command in its description or in a value."""
    folder = Path("shards.ckpt")
    weight = {"state_dict": {"weight": torch.ones(2, 3)}}
    value = {"optimizer_0": {"rate": RunsACommand(mark) if where == "value" else 0.1}}
    dcp.save({**weight, **value}, checkpoint_id=folder, no_dist=True)
    settings = {"backbone": {"class_path": "realign_lightning.demos.DigitBackbone", "init_args": {}}}
    torch.save({"hyper_parameters": settings, "global_step": 1}, folder / "meta.pt")
    if where == "description":
        (folder / ".metadata").write_bytes(pickle.dumps(RunsACommand(mark)))
    return folder


class TestCheckpoints:
    @pytest.mark.parametrize("command", ["fit", "validate"])
    def test_training_does_not_unpickle(self, mark, command):
        path = hostile_checkpoint(mark)
        with pytest.raises(ValueError, match=f"--ckpt_path {path}: PyTorch cannot read this file"):
            run([command, "--config", DIGITS, "--ckpt_path", str(path)])
        assert not mark.exists()

    def test_evaluation_does_not_unpickle(self, mark):
        path = hostile_checkpoint(mark)
        recipe = str(ROOT / "recipes" / "eval" / "digits_pope.yaml")
        with pytest.raises(ValueError, match="which PyTorch cannot read safely"):
            run(["test", "--config", recipe, "--model.backbone", "null", "--ckpt_path", str(path)])
        assert not mark.exists()

    def test_export_does_not_unpickle(self, mark):
        with pytest.raises(ValueError, match="which PyTorch cannot read safely"):
            run(["export", "--checkpoint", str(hostile_checkpoint(mark)), "--output", "out"])
        assert not mark.exists()

    @pytest.mark.parametrize("options", [{}, {"weights_only": False}])
    def test_loading_in_python_does_not_unpickle(self, mark, options):
        with pytest.raises(pickle.UnpicklingError):
            RDPOModule.load_from_checkpoint(hostile_checkpoint(mark), **options)
        assert not mark.exists()

    def test_nor_does_loading_from_a_url_where_lightning_would(self, mark, monkeypatch):
        path = hostile_checkpoint(mark)
        monkeypatch.setenv("TORCH_HOME", str(mark.parent / "torch"))
        handler = partial(SimpleHTTPRequestHandler, directory=str(mark.parent))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                with pytest.raises(pickle.UnpicklingError):
                    RDPOModule.load_from_checkpoint(f"http://127.0.0.1:{server.server_port}/{path}")
            finally:
                server.shutdown()
                thread.join()
        assert not mark.exists()

    def test_a_recipe_cannot_ask_for_it(self, mark):
        Path("recipe.yaml").write_text("weights_only: false\n")
        small_run = ["--trainer.max_steps", "1", "--data.builder.init_args.scenes", "2"]
        with pytest.raises(ValueError, match="weights_only: false would run whatever code a checkpoint holds"):
            run(["fit", "--config", DIGITS, "--config", "recipe.yaml", *small_run])

    @pytest.mark.parametrize("where", ["description", "value"])
    def test_folders_of_shards_do_not_unpickle(self, mark, where):
        folder = hostile_folder(mark, where)
        state = {"state_dict": {"weight": torch.zeros(2, 3)}, "optimizer_0": {"rate": 0.0}}
        with pytest.raises(CheckpointException, match="Use another checkpoint"):
            dcp.load(state, storage_reader=ShardReader(folder), planner=ShardPlanner(), no_dist=True)
        assert not mark.exists()
        with suppress(CheckpointException):
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert mark.exists(), "the control: torch's own reader runs it"

    def test_commands_do_not_unpickle_folders_of_shards(self, mark):
        folder = hostile_folder(mark, "description")
        with pytest.raises(ValueError, match=r"\.metadata is not read: it asks for posix\.system"):
            run(["export", "--checkpoint", str(folder), "--output", "out"])
        with pytest.raises(ValueError, match=r"\.metadata is not read: it asks for posix\.system"):
            run(["fit", "--config", DIGITS, "--trainer.strategy", FSDP, "--ckpt_path", str(folder)])
        assert not mark.exists()

    def test_folders_of_shards_read_as_they_were_written(self, mark):
        folder = Path("good")
        optimizer = {"rate": 0.5, "betas": (0.9, 0.999), "amsgrad": False, "params": ["weight"], "none": None}
        written = {"weight": torch.arange(6.0).reshape(2, 3), "small": torch.ones(3, dtype=torch.bfloat16)}
        dcp.save({"state_dict": written, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
        read = {
            "state_dict": {name: torch.zeros_like(value) for name, value in written.items()},
            "optimizer_0": dict.fromkeys(optimizer),
        }
        dcp.load(read, storage_reader=ShardReader(folder), planner=ShardPlanner(), no_dist=True)
        assert all(read["state_dict"][name].equal(value) for name, value in written.items())
        assert read["optimizer_0"] == optimizer

    def test_shards_outside_of_their_folder_are_refused(self, mark):
        folder = hostile_folder(mark, "nowhere")
        metadata = ShardReader(folder).read_metadata()
        for part in metadata.storage_data.values():
            part.relative_path = "../secret"
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=r"names files outside of its folder: \['\.\./secret'\]"):
            ShardReader(folder).read_metadata()

    @pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(["a list"]), b"\x80\x04"])
    def test_damaged_descriptions_are_refused(self, mark, content):
        folder = hostile_folder(mark, "nowhere")
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"shards\.ckpt/\.metadata"):
            ShardReader(folder).read_metadata()


UNPICKLING = {"pickle.load", "pickle.loads", "np.load", "joblib.load", "dill.load", "yaml.load", "eval", "exec"}


def calls_in_package() -> list[tuple[str, str, ast.Call]]:
    """Every call: file, what is called, as it is written."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                owner = getattr(getattr(node.func, "value", None), "id", None)
                name = getattr(node.func, "attr", None) or node.func.id
                found.append((str(file.relative_to(PACKAGE)), f"{owner}.{name}" if owner else name, node))
    return found


def test_nothing_in_the_package_unpickles():
    calls = calls_in_package()
    loads = [(file, call) for file, name, call in calls if name == "torch.load"]
    assert loads
    for file, call in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") == "True", f"{file}: {ast.unparse(call)}"
    bare = {"eval", "exec"}
    for file, name, call in calls:
        assert name not in UNPICKLING or (name in bare and isinstance(call.func, ast.Attribute)), f"{file}: {name}"


# ---- weights


@pytest.fixture
def pickled(tiny_llava, tmp_path) -> Path:
    """The tiny LLaVA with its weights in pytorch_model.bin."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llava, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


class TestWeights:
    def test_a_model_without_safetensors_is_refused_unless_that_is_meant(self, pickled):
        with pytest.raises(ValueError, match=r"has no weights in safetensors, only pytorch_model\.bin") as refused:
            AutoBackbone(str(pickled)).load_model()
        assert "--allow_pickled_weights true" in str(refused.value)
        assert "save_pretrained" in str(refused.value)
        with allowed_by(["--allow_pickled_weights", "true"]):
            assert AutoBackbone(str(pickled)).load_model().num_parameters() > 0

    def test_allowed_pickles_still_run_nothing(self, pickled, mark):
        torch.save({"a": RunsACommand(mark)}, pickled / "pytorch_model.bin")
        with allowed_by(["--allow_pickled_weights=true"]), pytest.raises(Exception, match=r"[Ww]eights"):
            AutoBackbone(str(pickled)).load_model()
        assert not mark.exists()

    def test_engines_likewise(self, pickled):
        engine = TextEngine(str(pickled))
        with pytest.raises(ValueError, match="--allow_pickled_weights true"):
            engine._network  # noqa: B018

    def test_adapters_likewise(self, tmp_path, tiny_llava):
        (tmp_path / "adapter_config.json").write_text("{}")
        torch.save({}, tmp_path / "adapter_model.bin")
        trained = _of_adapter(AutoBackbone(str(tiny_llava)), tmp_path)
        with pytest.raises(ValueError, match=r"only adapter_model\.bin"):
            trained.load()

    def test_image_encoders_likewise(self, tmp_path):
        torch.save({}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"only weights\.pth"):
            _ = TimmEncoder("test_vit", checkpoint_path=str(tmp_path / "weights.pth")).identity


# ---- code of models


@pytest.fixture
def with_code(tiny_llava, tmp_path, mark) -> Path:
    """A checkpoint of a family that transformers does not know, with a module beside it that makes a file when run."""
    folder = tmp_path / "with_code"
    shutil.copytree(tiny_llava, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile_config.HostileConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hostile_config.py").write_text(
        "import pathlib\nfrom transformers import PretrainedConfig\n"
        f"pathlib.Path({str(mark)!r}).touch()\n"
        "class HostileConfig(PretrainedConfig):\n    model_type = 'hostile'\n"
    )
    return folder


RECIPE_PLACES = {
    "processor_kwargs": {"model": {"backbone": {"init_args": {"processor_kwargs": {"trust_remote_code": True}}}}},
    "text": {"model": {"backbone": {"init_args": {"processor_kwargs": {"trust_remote_code": "yes"}}}}},
    "nested": {"model": {"backbone": {"init_args": {"processor_kwargs": {"a": [{"trust_remote_code": True}]}}}}},
    "top": {"trust_remote_code": True},
    "code_revision": {"model": {"backbone": {"init_args": {"processor_kwargs": {"code_revision": "main"}}}}},
}


class TestRemoteCode:
    def test_a_checkpoint_with_code_is_refused_and_the_option_named(self, with_code, mark):
        with pytest.raises(ValueError, match="needs Python code that lies beside its weights") as refused:
            AutoBackbone(str(with_code)).load_model()
        assert "--trust_remote_code true" in str(refused.value)
        assert not mark.exists()
        AutoConfig.from_pretrained(str(with_code), trust_remote_code=True)
        assert mark.exists(), "the control: it would run"

    def test_the_command_line_can_allow_it(self, with_code, mark, shards):
        arguments = ["fit", "--config", LLAVA, *small(shards, str(with_code))]
        with pytest.raises(ValueError, match="--trust_remote_code true"):
            run(arguments)
        assert not mark.exists()
        # It runs now, and is no model that could be trained.
        with pytest.raises(ValueError, match="to be an image-text-to-text model, got 'hostile'"):
            run([*arguments, "--trust_remote_code", "true"])
        assert mark.exists()
        assert not is_remote_code_trusted(), "only for that command"

    @pytest.mark.parametrize("place", RECIPE_PLACES)
    def test_a_recipe_cannot(self, place, mark):
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE_PLACES[place]))
        with pytest.raises(ValueError, match=r"recipe\.yaml: .*(trust_remote_code|code_revision)") as refused:
            run(["fit", "--config", LLAVA, "--config", "recipe.yaml"])
        assert "add --trust_remote_code true to the command" in str(refused.value)

    def test_nor_can_a_file_that_it_names_or_the_option_of_a_part(self, mark):
        Path("backbone.yaml").write_text(yaml.safe_dump(RECIPE_PLACES["nested"]["model"]["backbone"]))
        with pytest.raises(ValueError, match=r"backbone\.yaml: init_args\.processor_kwargs\.a\[0\]\.trust_remote_code"):
            run(["fit", "--config", LLAVA, "--model.backbone", "backbone.yaml"])
        with pytest.raises(ValueError, match="the command line: --model"):
            run(["fit", "--config", LLAVA, "--model.backbone.init_args.processor_kwargs.trust_remote_code", "true"])

    def test_nor_can_arguments_of_the_parts(self):
        with pytest.raises(ValueError, match="`processor_kwargs` of the backbone may not set trust_remote_code"):
            AutoBackbone("a/b", processor_kwargs={"trust_remote_code": True})
        with pytest.raises(ValueError, match=r"`options` of VLLMEngine may not set hf_overrides\.trust_remote_code"):
            VLLMEngine("a/b", options={"hf_overrides": {"trust_remote_code": 1}})
        assert AutoBackbone("a/b", processor_kwargs={"trust_remote_code": False}).path == "a/b"

    def test_compiled_code_on_the_hub_is_code(self):
        with pytest.raises(ValueError, match="compiled code on the hub"):
            AutoBackbone("a/b", attn_implementation="kernels-community/flash-attn")
        with allowed_by(["--trust_remote_code=true"]):
            assert AutoBackbone("a/b", attn_implementation="kernels-community/flash-attn").path == "a/b"

    @pytest.mark.parametrize("arguments", [["--trust_remote_code"], ["--trust_remote_code", "maybe"]])
    def test_options_that_say_nothing_are_errors(self, arguments):
        with pytest.raises(ValueError, match="--trust_remote_code"), allowed_by(arguments):
            pass

    def test_options_are_taken_from_every_command_and_forgotten(self, monkeypatch):
        monkeypatch.delenv("REALIGN_TRUST_REMOTE_CODE", raising=False)
        with allowed_by(["build", "--trust_remote_code=false", "--x", "1", "--allow_pickled_weights", "yes"]) as rest:
            assert rest == ["build", "--x", "1"]
            assert (is_remote_code_trusted(), are_pickled_weights_allowed()) == (False, True)
        assert not are_pickled_weights_allowed()
        assert not {"REALIGN_TRUST_REMOTE_CODE", "REALIGN_ALLOW_PICKLED_WEIGHTS"} & os.environ.keys()


# ---- revisions

UNPINNED = {"deepseek-community/Janus-Pro-7B", "llava-hf/llava-v1.6-vicuna-13b-hf"}


def hub_names(value) -> list[tuple[str, str | None]]:
    """Names on the hub in a recipe, with the revision beside each."""
    found = []
    if isinstance(value, dict):
        name = value.get("path") if "processor_kwargs" in value else value.get("model")
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            found.append((name, value.get("revision")))
        for inner in value.values():
            found += hub_names(inner)
    elif isinstance(value, list):
        for inner in value:
            found += hub_names(inner)
    return found


def pins() -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for folder in ("recipes", "configs"):
        for file in sorted((ROOT / folder).rglob("*.yaml")):
            for name, revision in hub_names(yaml.safe_load(file.read_text())):
                found.setdefault(name, set()).add(revision)
    return found


def test_every_model_of_the_recipes_is_pinned_or_listed_as_not():
    found = pins()
    assert len(found) == 18
    for name, commits in found.items():
        (commit,) = commits
        assert revisions.is_commit(commit) is (name not in UNPINNED), name
    assert found.keys() >= UNPINNED


def test_the_table_of_commits_is_that_of_the_recipes():
    page = (ROOT / "docs" / "revisions.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+/[\w.-]+) \| (`[0-9a-f]{40}`|not pinned) \|", page, re.MULTILINE)
    table = {name: None if commit == "not pinned" else commit.strip("`") for name, commit in rows}
    pinned = {name: next(iter(commits)) for name, commits in pins().items()}
    assert table == {"timm/vit_large_patch14_clip_224.openai": None, **pinned}


def test_a_moving_revision_is_told_once_with_the_line_that_pins_it(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(revisions, "_told", set())
    commit = "0123456789" * 4
    with caplog.at_level(logging.INFO, logger="realign_lightning"):
        for _ in range(2):
            revisions.tell_commit("owner/model", None, commit)
        revisions.tell_commit("owner/pinned", commit, commit)
        revisions.tell_commit(str(tmp_path), None, commit)
        revisions.tell_commit("owner/unknown", None, None)
    (record,) = caplog.records
    assert record.getMessage().endswith(f"write into the recipe: revision: {commit}")
    assert "owner/model (revision main)" in record.getMessage()


def test_the_commit_in_the_hubs_cache_is_found(monkeypatch, tmp_path):
    commit = "89abcdef01" * 4
    file = tmp_path / "models--owner--model" / "snapshots" / commit / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    refs = tmp_path / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert revisions.cached_commit("owner/model") == commit
    assert revisions.cached_commit("owner/other") is None
    assert revisions.cached_commit(str(tmp_path)) is None


# ---- dependencies

KNOWN_BAD = {
    "torch": ["2.5.1", "2.9.1"],
    "lightning": ["2.4.0", "2.6.0", "2.6.2", "2.6.3"],
    "transformers": ["4.56.0", "4.57.6", "5.0.0", "5.2.0"],
    "pillow": ["11.2.1", "11.3.0", "12.1.1", "12.2.0"],
    "jsonargparse": ["4.38.0"],
    "jinja2": ["3.1.4", "3.1.5"],
    "pyyaml": ["5.3.1"],
    "pyarrow": ["14.0.0", "18.0.0", "23.0.0"],
    "nltk": ["3.8.1", "3.9.2"],
}


def requirements() -> dict[str, list[Requirement]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[Requirement]] = {}
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        found.setdefault(requirement.name, []).append(requirement)
    return found


@pytest.mark.parametrize("package", KNOWN_BAD)
def test_bounds_exclude_releases_with_known_holes_and_accept_what_is_installed(package):
    for requirement in requirements()[package]:
        for bad in KNOWN_BAD[package]:
            assert not requirement.specifier.contains(bad), f"{requirement} accepts {bad}"
        assert requirement.specifier.contains(version(package))


def test_every_hole_is_named_beside_its_bound():
    text = (ROOT / "pyproject.toml").read_text()
    for number in ("2025-32434", "2026-24747", "2026-31221", "2026-4372", "2026-59199", "2025-27516", "2023-47248"):
        assert f"CVE-{number}" in text


def test_the_page_on_security_names_what_there_is():
    text = (ROOT / "SECURITY.md").read_text()
    for word in (
        *("REALIGN_SAFE_CONFIG", "REALIGN_SAFE_PACKAGES", "--trust_remote_code", "--allow_pickled_weights"),
        *("weights_only", "safetensors", "revision", "quarantine", "pipe:", "OPENAI_BASE_URL"),
    ):
        assert word in text, word
    assert "@" not in text, "no address of a person"
