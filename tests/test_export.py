"""What `realign-lightning export` writes, loaded by plain transformers and peft. Run as a module it trains by FSDP2."""

import copy
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.callbacks import AdapterExport
from realign_lightning.cli import run
from realign_lightning.data import ShardWriter
from realign_lightning.export import export_checkpoint
from realign_lightning.losses import RDPOLoss, SFTLoss
from realign_lightning.modules import RDPOModule
from tests.conftest import picture, preference_samples
from tests.modules import two_processes
from tests.tiny_models import FAMILIES, LLAVA_TEMPLATE, make_tiny

ROOT = Path(__file__).parent.parent
QUESTION = "describe the image."
LORA = LoRA(r=4, alpha=8, dropout=0.0)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "projector": {"adapter": LORA, "trained_parts": ["projector"]},
    "full": {"adapter": None},
}


class Trained(NamedTuple):
    """A module after two steps, and its checkpoint."""

    module: RDPOModule
    checkpoint: Path


def train(folder: Path, backbone: AutoBackbone, **settings: Any) -> Trained:
    torch.manual_seed(0)
    module = RDPOModule(backbone, optimizer=lambda weights: torch.optim.Adam(weights, lr=5e-3), **settings)
    samples = [backbone.encode_sample(sample) for sample in preference_samples(2)]
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples, batch_size=2, collate_fn=backbone.collate))
    trainer.save_checkpoint(folder / "run.ckpt")
    return Trained(module.eval(), folder / "run.ckpt")


def inputs_of(processor: Any) -> Mapping[str, Tensor]:
    """What a plain processor makes of one question about one image."""
    if processor.chat_template is None:
        return processor(text=f"<image>{QUESTION}", images=picture(7), return_tensors="pt")
    content = [{"type": "image", "image": picture(7)}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def assert_same_logits(model: nn.Module, expected: nn.Module, inputs: Mapping[str, Tensor], merged: bool) -> None:
    """Compare in float32; a merged model, which adds in another order, in float64, so that only its weights count."""
    if merged:
        model, expected = (copy.deepcopy(one).double() for one in (model, expected))
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    result, wanted = logits_of(model, inputs), logits_of(expected, inputs)
    print(f"largest difference of logits {(result - wanted).abs().max():.1e}, largest logit {wanted.abs().max():.1f}")
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-5)


def distance(first: nn.Module, second: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Largest difference of logits."""
    return float((logits_of(first, inputs) - logits_of(second, inputs)).abs().max())


def header_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def code_of(folder: Path) -> str:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 5
    assert "realign" not in code.replace(str(folder), "")
    return code


def load_as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Any]:
    """Run the card's code in the folder that it lies in."""
    names: dict[str, Any] = {}
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        exec(code_of(folder), names)  # noqa: S102
    return names["model"], names["processor"]


class TestFile:
    """Checkpoints in one file, of modules made in Python."""

    @pytest.fixture(
        scope="class",
        params=[(family, kind) for family in ("llava", "qwen2_5_vl", "paligemma") for kind in KINDS],
        ids="-".join,
    )
    def trained(self, request, tmp_path_factory) -> Trained:
        family, kind = request.param
        folder = tmp_path_factory.mktemp("file")
        backbone = PaliGemmaBackbone if family == "paligemma" else AutoBackbone
        return train(folder, backbone(str(make_tiny(family, folder / family))), **KINDS[kind])

    @pytest.mark.parametrize("merge", [False, True], ids=["as it is", "merged"])
    def test_loads_as_the_card_says_and_gives_the_same_logits(self, trained, merge, tmp_path, monkeypatch):
        module = trained.module
        export_checkpoint(trained.checkpoint, tmp_path / "out", merge)
        model, processor = load_as_the_card_says(tmp_path / "out", monkeypatch)
        is_adapter = module.adapter is not None and not merge
        assert isinstance(model, PeftModel) == is_adapter
        inputs = inputs_of(processor)
        assert_same_logits(model, module.policy, inputs, merge)
        assert distance(module.policy, module.backbone.load_model(), inputs) > 0.01, "training moved it"
        ours = module.backbone.encode_prompts([QUESTION], [picture(7)])
        assert torch.equal(ours["input_ids"], inputs["input_ids"])
        torch.testing.assert_close(ours["pixel_values"], inputs["pixel_values"])
        header = header_of(tmp_path / "out")
        assert header["base_model"] == module.backbone.path
        assert header["library_name"] == ("peft" if is_adapter else "transformers")
        assert header["pipeline_tag"] == "image-text-to-text"
        assert "rdpo" in header["tags"]
        assert "2 optimizer steps" in (tmp_path / "out" / "README.md").read_text()

    def test_whole_models_keep_their_tied_weights_and_every_other(self, trained, tmp_path):
        export_checkpoint(trained.checkpoint, tmp_path / "out", merge=True)
        names = {Path(path).name: set(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
        base = trained.module.backbone.path
        assert names == {path.name: set(load_file(path)) for path in Path(base).glob("*.safetensors")}
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())
        models = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (tmp_path / "out", base))
        now, before = (one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in models)
        assert now == before


@pytest.fixture(scope="module")
def lora(tiny_llava, tmp_path_factory) -> Trained:
    return train(tmp_path_factory.mktemp("lora"), AutoBackbone(str(tiny_llava)), **KINDS["lora"])


@pytest.fixture(scope="module")
def full(tiny_llava, tmp_path_factory) -> Trained:
    loss = RDPOLoss(beta=0.3, visual_weight=0.0)
    return train(tmp_path_factory.mktemp("full"), AutoBackbone(str(tiny_llava)), loss=loss, adapter=None)


def test_the_package_is_not_needed_to_load(lora, tmp_path):
    export_checkpoint(lora.checkpoint, tmp_path / "out")
    (tmp_path / "realign_lightning.py").write_text("raise RuntimeError('not needed')")
    code = f"import sys\nsys.path.insert(0, '..')\n{code_of(tmp_path / 'out')}\nprint(type(model).__name__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path / "out")  # noqa: S603
    assert done.stdout.split()[-1].startswith("PeftModel")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_but_what_is_needed_is_loaded(kind, request, tmp_path, monkeypatch):
    """An adapter needs no weights of the base, a whole model no second copy for the reference."""
    checkpoint = request.getfixturevalue(kind).checkpoint
    loaded = []
    load_model = AutoBackbone.load_model
    monkeypatch.setattr(AutoBackbone, "load_model", lambda backbone: loaded.append(load_model(backbone)) or loaded[-1])
    monkeypatch.setattr("copy.deepcopy", deepcopy_of_no_model)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert len(loaded) == (0 if kind == "lora" else 1)


def deepcopy_of_no_model(value, *rest, original=copy.deepcopy):
    assert not isinstance(value, nn.Module)
    return original(value, *rest)


def test_card_tells_the_loss_and_the_adapter(lora, full, tmp_path):
    export_checkpoint(full.checkpoint, tmp_path / "dpo")
    assert header_of(tmp_path / "dpo")["tags"] == ["realign-lightning", "dpo"]
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (tmp_path / "dpo" / "README.md").read_text(), re.S)[1])
    assert settings["loss"]["init_args"]["beta"] == 0.3
    assert settings["backbone"]["init_args"]["path"] == full.module.backbone.path
    export_checkpoint(lora.checkpoint, tmp_path / "rdpo")
    card = (tmp_path / "rdpo" / "README.md").read_text()
    assert "arXiv 2502.13146" in card
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
    assert settings["adapter"]["init_args"] == {"r": 4, "alpha": 8, "dropout": 0.0, "parts": ["language_model"]}


def test_card_of_another_loss_names_it(tiny_llava, tmp_path):
    module = RDPOModule(AutoBackbone(str(tiny_llava), revision="main", dtype="float32"), SFTLoss(), LORA)
    module.export(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "trained with SFT" in card
    assert 'revision="main", dtype="float32"' in card
    assert "steps" not in card


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_survive_saving(family, tmp_path):
    backbone = PaliGemmaBackbone if family == "paligemma" else AutoBackbone
    base = make_tiny(family, tmp_path / "base", 0)
    backbone(str(base)).save_processor(tmp_path / "saved")
    before, after = (inputs_of(AutoProcessor.from_pretrained(folder)) for folder in (base, tmp_path / "saved"))
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name


class TestCommandLine:
    """A checkpoint made and exported by commands; the base has moved in between."""

    TEMPLATE = LLAVA_TEMPLATE.replace("<image>\n", "look: <image>")

    @pytest.fixture(scope="class")
    def finished(self, tiny_llava, tmp_path_factory):
        folder = tmp_path_factory.mktemp("cli")
        with ShardWriter(folder / "shards") as writer:
            for sample in preference_samples(2):
                writer.write(sample)
        shutil.copytree(tiny_llava, folder / "base")
        (folder / "template.yaml").write_text(
            yaml.safe_dump({"model": {"backbone": {"init_args": {"chat_template": self.TEMPLATE}}}})
        )
        cli = run(
            [
                *("fit", "--config", str(ROOT / "recipes" / "llava7b_lora.yaml")),
                *("--model.backbone.init_args.path", str(folder / "base")),
                *("--config", str(folder / "template.yaml"), "--model.backbone.init_args.dtype", "float32"),
                *("--model.optimizer.init_args.lr", "0.01", "--trainer.accumulate_grad_batches", "1"),
                *("--data.train", str(folder / "shards"), "--data.val", "null", "--data.num_workers", "0"),
                *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2"),
                *("--trainer.callbacks", "null", "--trainer.logger", "false"),
                *("--trainer.enable_checkpointing", "false", "--trainer.default_root_dir", str(folder)),
            ]
        )
        cli.trainer.save_checkpoint(folder / "run.ckpt")
        (folder / "base").rename(folder / "moved")
        return cli.model, folder

    def test_base_that_moved_is_named(self, finished, tmp_path, monkeypatch):
        module, folder = finished
        with pytest.raises(FileNotFoundError, match="no such folder") as error:
            run(["export", "--checkpoint", str(folder / "run.ckpt"), "--output", str(tmp_path / "out")])
        assert "--base" in error.value.__notes__[0]
        moved = str(folder / "moved")
        run(["export", "--checkpoint", f"{folder}/run.ckpt", "--output", str(tmp_path / "out"), "--base", moved])
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == moved
        model, processor = load_as_the_card_says(tmp_path / "out", monkeypatch)
        assert processor.chat_template == self.TEMPLATE
        assert_same_logits(model, module.policy, inputs_of(processor), merged=False)

    def test_card_tells_the_optimizer_too(self, finished, tmp_path):
        export_checkpoint(finished[1] / "run.ckpt", tmp_path / "out", base=finished[1] / "moved")
        card = (tmp_path / "out" / "README.md").read_text()
        settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
        assert settings["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert "chat_template" not in settings["backbone"]["init_args"]

    def test_help_needs_no_checkpoint(self, capsys):
        with pytest.raises(SystemExit) as stop:
            run(["export", "--help"])
        assert stop.value.code == 0
        assert "--merge" in capsys.readouterr().out


class TestFourBit:
    """QLoRA: the adapter fits the quantised base, the merged model is not quantised."""

    @pytest.fixture(scope="class")
    def trained(self, tiny_llava, tmp_path_factory) -> Trained:
        backbone = AutoBackbone(str(tiny_llava), dtype="float32", quantization="nf4")
        return train(tmp_path_factory.mktemp("nf4"), backbone, **KINDS["projector"])

    def test_adapter_gives_the_same_logits_on_the_quantised_base(self, trained, tmp_path):
        export_checkpoint(trained.checkpoint, tmp_path / "out")
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
        base = AutoModelForImageTextToText.from_pretrained(
            trained.module.backbone.path, dtype="float32", quantization_config=quantised
        )
        for module in base.modules():
            # Some CPUs would compute in bfloat16, whatever the compute dtype.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path / "out"))
        model = PeftModel.from_pretrained(base, tmp_path / "out")
        assert_same_logits(model, trained.module.policy, inputs, merged=False)
        assert "in 4 bit" in (tmp_path / "out" / "README.md").read_text()

    def test_merged_model_is_the_unquantised_base_with_the_adapter(self, trained, tmp_path, monkeypatch, caplog):
        export_checkpoint(trained.checkpoint, tmp_path / "adapter")
        with caplog.at_level(logging.INFO, "realign_lightning"):
            export_checkpoint(trained.checkpoint, tmp_path / "out", merge=True)
        assert "merging into the unquantised base" in caplog.text
        assert "unquantised" in (tmp_path / "out" / "README.md").read_text()
        base = AutoModelForImageTextToText.from_pretrained(trained.module.backbone.path)
        expected = PeftModel.from_pretrained(base, tmp_path / "adapter")
        model, processor = load_as_the_card_says(tmp_path / "out", monkeypatch)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert_same_logits(model, expected, inputs_of(processor), merged=True)

    def test_merging_into_a_base_that_is_stored_in_4_bit_is_refused(self, trained, lora, tmp_path):
        AutoBackbone(str(trained.module.backbone.path), quantization="nf4").load_model().save_pretrained(tmp_path / "b")
        trained.module.backbone.save_processor(tmp_path / "b")
        with pytest.raises(ValueError, match="stored quantised"):
            export_checkpoint(lora.checkpoint, tmp_path / "out", merge=True, base=tmp_path / "b")


def test_merged_model_has_the_bases_dtype_throughout(tiny_llava, tmp_path, monkeypatch):
    """The projector is trained in float32 beside a model in bfloat16."""
    trained = train(tmp_path, AutoBackbone(str(tiny_llava), dtype="bfloat16"), **KINDS["projector"])
    export_checkpoint(trained.checkpoint, tmp_path / "adapter")
    export_checkpoint(trained.checkpoint, tmp_path / "model", merge=True)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    merged = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    model, processor = load_as_the_card_says(tmp_path / "model", monkeypatch)
    inputs = inputs_of(processor)
    largest = float(logits_of(trained.module.policy, inputs).abs().max())
    assert distance(model, trained.module.policy, inputs) < 0.05 * largest


class TestShardedFolder:
    """What two processes wrote with FSDP2; the export by the callback, and by the command in this process."""

    @pytest.fixture(scope="class", params=[("llava", "projector"), ("qwen2_5_vl", "full")], ids="-".join)
    def run_of(self, request, tmp_path_factory, run_module) -> tuple[str, Path]:
        family, kind = request.param
        folder = tmp_path_factory.mktemp(kind)
        make_tiny(family, folder / "base")
        with ShardWriter(folder / "shards") as writer:
            for sample in preference_samples(7):
                writer.write(sample)
        run_module("tests.test_export", folder / "base", folder / "shards", kind, folder, processes=2)
        return kind, folder

    def plain(self, kind: str, folder: Path) -> nn.Module:
        """The trained model, put together from torch's own reading of the shards by plain transformers and peft."""
        dcp_to_torch_save(folder / "fsdp.ckpt", folder / "gathered.pt")
        saved = torch.load(folder / "gathered.pt", weights_only=True)["state_dict"]
        weights = {name.removeprefix("_policy."): value for name, value in saved.items()}
        model = AutoModelForImageTextToText.from_pretrained(folder / "base")
        if kind == "projector":
            layers = {name.split("base_model.model.")[1].split(".lora_")[0] for name in weights if ".lora_" in name}
            config = LoraConfig(
                r=4, lora_alpha=8, target_modules=sorted(layers), modules_to_save=["multi_modal_projector"]
            )
            model = get_peft_model(model, config)
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model

    @pytest.mark.parametrize("merge", [False, True], ids=["as it is", "merged"])
    def test_command_gives_the_logits_of_the_shards(self, run_of, merge, tmp_path, monkeypatch):
        kind, folder = run_of
        export_checkpoint(folder / "fsdp.ckpt", tmp_path / "out", merge)
        model, processor = load_as_the_card_says(tmp_path / "out", monkeypatch)
        inputs, expected = inputs_of(processor), self.plain(kind, folder)
        assert_same_logits(model, expected, inputs, merge)
        assert distance(expected, AutoModelForImageTextToText.from_pretrained(folder / "base"), inputs) > 0.01
        assert "10 optimizer steps" in (tmp_path / "out" / "README.md").read_text()

    def test_callback_writes_the_same_once_when_training_ends(self, run_of, tmp_path):
        kind, folder = run_of
        written = folder / "log" / "fsdp" / ("model" if kind == "full" else "adapter")
        export_checkpoint(folder / "fsdp.ckpt", tmp_path / "out")
        assert {path.name for path in written.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
        name, keys = ("config.json", ["architectures"]) if kind == "full" else ("adapter_config.json", None)
        ours, theirs = (json.loads((path / name).read_text()) for path in (tmp_path / "out", written))
        assert {key: ours[key] for key in keys or ours} == {key: theirs[key] for key in keys or theirs}
        for path in written.glob("*.safetensors"):
            ours, theirs = load_file(path), load_file(tmp_path / "out" / path.name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert (written / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()
        assert not list(folder.glob("fsdp-*")), "nothing beside sharded checkpoints"

    def test_half_written_folders_are_refused(self, run_of, tmp_path):
        _, folder = run_of
        for name in ("meta.pt", ".metadata", "__1_0.distcp"):
            broken = tmp_path / name
            shutil.copytree(folder / "fsdp.ckpt", broken)
            (broken / name).unlink()
            with pytest.raises(ValueError, match=f"{re.escape(name)}.*interrupted"):
                export_checkpoint(broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.fixture
    def unread(self, tmp_path) -> Path:
        """A path that must never be written."""
        yield tmp_path / "unread"
        assert not (tmp_path / "unread").exists()

    def test_nothing_is_overwritten(self, lora, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        for path in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
            with pytest.raises(FileExistsError, match=f"new or empty folder, got {path}"):
                export_checkpoint(lora.checkpoint, path)
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
        (tmp_path / "empty").mkdir()
        export_checkpoint(lora.checkpoint, tmp_path / "empty")

    def test_missing_checkpoint(self, unread):
        with pytest.raises(FileNotFoundError, match=r"`checkpoint`.*nowhere\.ckpt"):
            export_checkpoint("nowhere.ckpt", unread)

    @pytest.mark.parametrize(
        "content",
        [
            b"not a checkpoint",
            b"",
            torch.zeros(2),
            {"weights": torch.zeros(2)},
            {"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": {"backbone": "resnet50"}},
            {"state_dict": {}, "hyper_parameters": {"backbone": {"class_path": "a.B"}}},
            {"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": {"backbone": {"class_path": "torch.nn.Linear"}}},
            {"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": {"backbone": Path("pickled")}},
        ],
        ids=["text", "empty", "tensor", "dictionary", "other module", "no weights", "no backbone", "pickle"],
    )
    def test_something_else(self, content, tmp_path, unread):
        path = tmp_path / "other.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match="`checkpoint`"):
            export_checkpoint(path, unread)

    def test_folder_of_something_else(self, tiny_llava, unread):
        with pytest.raises(ValueError, match=r"meta\.pt.*Choose another"):
            export_checkpoint(tiny_llava, unread)

    def test_weights_that_do_not_fit_the_base(self, lora, full, tmp_path, unread):
        other = make_tiny("paligemma", tmp_path / "other")
        for trained in (lora, full):
            with pytest.raises(ValueError, match="does not fit") as error:
                export_checkpoint(trained.checkpoint, unread, base=other)
            assert "--base" in error.value.__notes__[0]

    def test_base_for_a_backbone_without_a_path(self, tmp_path, unread):
        settings = {"backbone": {"class_path": "mine.Backbone", "init_args": {"size": 3}}}
        torch.save({"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": settings}, tmp_path / "run.ckpt")
        with pytest.raises(ValueError, match=r"`base` .*mine\.Backbone has none"):
            export_checkpoint(tmp_path / "run.ckpt", unread, base="elsewhere")

    def test_merging_into_shared_weights(self, tmp_path, unread):
        backbone = AutoBackbone(str(make_tiny("qwen2_5_vl", tmp_path / "tied")))
        adapter = LoRA(r=2, alpha=4, dropout=0.0, target_modules=r".*language_model.*q_proj|lm_head")
        trained = train(tmp_path, backbone, adapter=adapter)
        with pytest.raises(ValueError, match=r"lm_head.*shared"):
            export_checkpoint(trained.checkpoint, unread, merge=True)


class ExportingTrainer(pl.Trainer):
    """The Trainer of two_processes.py with one callback more."""

    def __init__(self, callbacks: list[pl.Callback], **settings: Any) -> None:
        super().__init__(callbacks=[*callbacks, AdapterExport()], **settings)


if __name__ == "__main__":
    two_processes.Trainer = ExportingTrainer
    two_processes.main(sys.argv[1], sys.argv[2], sys.argv[3], "fsdp", Path(sys.argv[4]))
