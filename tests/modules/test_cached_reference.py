"""``reference: cached`` against the reference that runs in every step."""

import csv
import dataclasses
import datetime as dt
import gc
import importlib
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from realign_lightning import scoring
from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.backbones.files import hash_code
from realign_lightning.callbacks import Evaluation
from realign_lightning.cli import run as run_command
from realign_lightning.data import DualPreferenceDataModule, ShardWriter, encode_members, fingerprint_members
from realign_lightning.losses import RDPOLoss, SFTLoss
from realign_lightning.modules import CachedReference, RDPOModule, UnknownSampleError
from realign_lightning.modules.cache import FINGERPRINT
from realign_lightning.scoring import score
from tests.callbacks.helpers import Lengths
from tests.conftest import picture, preference_samples
from tests.data.helpers import write_tar
from tests.processes import ROOT
from tests.test_recipes import small
from tests.tiny_models import FAMILIES, LLAVA_TEMPLATE, make_tiny, make_tiny_llava

SMALL = LoRA(r=4, alpha=8, dropout=0.0)
BAD = 4
"""Row of the sample whose image is broken."""


def members_of(samples) -> list[dict[str, bytes]]:
    return [encode_members(sample) for sample in samples]


def break_image(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name: b"no image" if ".image." in name else data for name, data in members.items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cached") / "shards"
    with ShardWriter(folder) as writer:
        for sample in preference_samples(7):
            writer.write(sample)
    return str(folder)


@pytest.fixture(scope="module")
def with_bad_one(tmp_path_factory) -> str:
    """Eight samples, one of them broken."""
    members = members_of(preference_samples(8))
    members[BAD] = break_image(members[BAD])
    return str(write_tar(tmp_path_factory.mktemp("bad") / "shard.tar", members))


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


def module_of(backbone, reference="cached", **settings) -> RDPOModule:
    torch.manual_seed(0)
    rate = 0.5 if settings.get("adapter", SMALL) else 0.05
    given = {"adapter": SMALL, "optimizer": lambda weights: torch.optim.SGD(weights, lr=rate), **settings}
    return RDPOModule(backbone, reference=reference, **given)


def trainer_of(folder, *callbacks, **settings) -> pl.Trainer:
    given = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, **settings}
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **given,
    )


def data_of(module, shards, batch_size=2, **settings) -> DualPreferenceDataModule:
    settings = {"max_bad_fraction": 0.5, **settings}
    return DualPreferenceDataModule(module.backbone, shards, shards, batch_size=batch_size, **settings)


def lines_of(folder: Path) -> list[dict]:
    files = sorted(Path(folder, "reference_cache").glob("*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def folders_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in Path(folder, "reference_cache").glob(f"*/{FINGERPRINT}"))


def live_entries(backbone, samples) -> dict[str, list[float]]:
    """Log-probs of every sample for itself under the base model, by fingerprint."""
    model, values = backbone.load_model(), {}
    for sample in samples:
        batch = backbone.collate([backbone.encode_sample(sample)])
        with torch.no_grad():
            scores = score(backbone, model, batch)
        values[fingerprint_members(encode_members(sample))] = [value.item() for _, value in scores.items()]
    return values


def assert_same_entries(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert list(found[name]) == pytest.approx(entry, rel=1e-6, abs=1e-5), name


class Curve(pl.Callback):
    """What a step logs, and forward passes in it: of language models, and of vision towers."""

    def __init__(self):
        self.logged, self.decoded, self.encoded, self._handles = [], [], [], []

    def on_train_start(self, trainer, pl_module):
        for name, part in pl_module.named_modules():
            for suffix, calls in (("language_model", self.decoded), ("vision_tower", self.encoded)):
                if name.endswith(suffix):
                    self._handles.append(part.register_forward_hook(lambda *_, into=calls: into.append(1)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: value.item() for name, value in trainer.logged_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        for handle in self._handles:
            handle.remove()


def fit(backbone, shards, folder, reference, batch_size=2, trainer=None, **settings):
    module, curve = module_of(backbone, reference, **settings), Curve()
    trainer_of(folder, curve, **(trainer or {})).fit(module, datamodule=data_of(module, shards, batch_size))
    return module, curve


KINDS = {
    "lora": {"adapter": LoRA(r=4, alpha=8, dropout=0.2)},
    "projector": {"adapter": SMALL, "trained_parts": ["projector"]},
    "full": {"adapter": None},
    "dora": {"adapter": LoRA(r=4, alpha=8, options={"use_dora": True})},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_with_a_live_reference(kind, backbone, shards, tmp_path):
    """Twice: with an empty cache, and with a full one."""
    live, expected = fit(backbone, shards, tmp_path, "auto", **KINDS[kind])
    assert expected.logged[0]["train/loss"] == pytest.approx(1.386294, abs=1e-5)
    assert expected.logged[-1]["train/loss"] < 1.35
    assert "val/loss" in expected.logged[-1]
    for _ in range(2):
        module, curve = fit(backbone, shards, tmp_path, "cached", **KINDS[kind])
        assert len(curve.logged) == len(expected.logged) == 8
        for ours, theirs in zip(curve.logged, expected.logged, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        for (name, ours), (_, theirs) in zip(
            module.policy.named_parameters(), live.policy.named_parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)
    assert len(lines_of(tmp_path)) == 7


def test_values_are_those_of_the_base_model(backbone, shards, tmp_path):
    module, _ = fit(backbone, shards, tmp_path, "cached", trained_parts=["projector"])
    assert isinstance(module.reference, CachedReference)
    assert_same_entries(module.reference.entries, live_entries(backbone, preference_samples(7)))
    assert {line["key"] for line in lines_of(tmp_path)} == {f"sample{i}" for i in range(7)}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_runs_one_language_model_and_one_vision_tower(kind, backbone, shards, tmp_path):
    calls = {}
    for reference in ("auto", "cached"):
        # Without validation, which has forward passes of its own.
        _, curve = fit(backbone, shards, tmp_path, reference, trainer={"limit_val_batches": 0}, **KINDS[kind])
        calls[reference] = len(curve.decoded) / 8, len(curve.encoded) / 8
    assert calls == {"auto": (2, 1 if kind == "lora" else 2), "cached": (1, 1)}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_values_are_those_of_the_precision(kind, precision, backbone, shards, tmp_path):
    """One batch size and order, so that not even rounding differs."""
    logged = {}
    for reference in ("auto", "cached"):
        module = module_of(backbone, reference, **KINDS[kind])
        trainer = trainer_of(tmp_path, precision=precision)
        trainer.validate(module, datamodule=data_of(module, shards, 1), verbose=False)
        logged[reference] = {name: value.item() for name, value in trainer.logged_metrics.items()}
    # Zero reward: any difference between live and cached reference shows.
    assert logged["cached"] == pytest.approx(logged["auto"], abs=1e-6)
    assert abs(logged["cached"]["val/rewards/chosen"]) < 1e-6
    exact = live_entries(backbone, preference_samples(7))
    rounded = {name: list(entry) for name, entry in module.reference.entries.items()}
    assert rounded.keys() == exact.keys()
    assert rounded != exact, "it is another precision"


def test_16_bit_log_probs_of_other_batches_are_near_those_of_the_step(backbone, shards, tmp_path):
    """Cached one by one and used in a batch of four: rounding differs, but to neither side."""
    module = module_of(backbone)
    trainer = trainer_of(tmp_path, precision="bf16-true")
    trainer.validate(module, datamodule=data_of(module, shards, 1), verbose=False)
    samples = preference_samples(4)
    encoded = [
        dataclasses.replace(backbone.encode_sample(sample), fingerprint=fingerprint_members(encode_members(sample)))
        for sample in samples
    ]
    with torch.no_grad():
        policy, reference = module.to(torch.bfloat16).score(backbone.collate(encoded))
    ours, cached = (torch.stack([value.double() for _, value in scores.items()]) for scores in (policy, reference))
    residual = (ours - cached) / cached.abs()
    assert residual.abs().max() <= 1e-2
    assert residual.mean().abs() <= 2e-3


def test_4_bit(tiny_llava, shards, tmp_path):
    backbone = AutoBackbone(str(tiny_llava), dtype="bfloat16", quantization="nf4")
    logged = {}
    for reference in ("auto", "cached"):
        module = module_of(backbone, reference)
        trainer = trainer_of(tmp_path)
        trainer.validate(module, datamodule=data_of(module, shards, 1), verbose=False)
        logged[reference] = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged["cached"] == pytest.approx(logged["auto"], abs=1e-6)
    plain = AutoBackbone(str(tiny_llava), dtype="bfloat16")
    trainer_of(tmp_path).validate(module_of(plain), datamodule=data_of(module, shards), verbose=False)
    assert len(folders_of(tmp_path)) == 2


def test_another_run_with_other_settings_computes_nothing(backbone, shards, tmp_path, monkeypatch):
    fit(backbone, shards, tmp_path, "cached")
    before = lines_of(tmp_path)
    assert len(before) == 7
    monkeypatch.setattr(RDPOModule, "_base_scorer", refuse_to_score)
    for settings in (
        {"loss": RDPOLoss(beta=0.5, visual_weight=0.3)},
        {"loss": RDPOLoss(visual_weight=0.0), "batch_size": 3},
        {"adapter": LoRA(r=2, alpha=4), "trained_parts": ["projector"]},
        {"adapter": None},
        {"share_prefix": False},
        {"gradient_checkpointing": True},
    ):
        fit(backbone, shards, tmp_path, "cached", **settings)
    assert lines_of(tmp_path) == before
    assert len(folders_of(tmp_path)) == 1


def refuse_to_score(module, around):
    from contextlib import contextmanager

    from realign_lightning.modules.base_scorer import BaseScorer

    @contextmanager
    def make():
        raise AssertionError("a model was asked for")
        yield

    return BaseScorer(module.backbone, around, module.share_prefix, module.loss.visual_words, make)


class TestFingerprint:
    """Whatever log-probs depend on gives a cache of its own, with a warning; nothing else does."""

    def make(self, folder, checkpoint, shards, precision="32-true", matmul="highest", **settings) -> None:
        module = module_of(AutoBackbone(str(checkpoint), **settings))
        torch.set_float32_matmul_precision(matmul)
        try:
            trainer_of(folder, precision=precision).validate(module, datamodule=data_of(module, shards), verbose=False)
        finally:
            torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"dtype": "bfloat16"}, "made with dtype float32, now bfloat16; made with precision float32, now bfloat16"),
            ({"chat_template": LLAVA_TEMPLATE.replace(": ", ":  ")}, "made with other chat_template"),
            ({"max_length": 40}, "made with max_length None, now 40"),
            ({"revision": "v2"}, "made with revision None, now v2"),
            ({"processor_kwargs": {"image_mean": [0.4, 0.4, 0.4]}}, "made with other processor"),
            ({"precision": "bf16-mixed"}, "made with precision float32, now float32 under autocast to bfloat16"),
            ({"matmul": "medium"}, "made with precision float32, now float32, float32 products of medium precision"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings(self, tiny_llava, shards, tmp_path, caplog, changes, words):
        self.make(tmp_path, tiny_llava, shards)
        with caplog.at_level(logging.WARNING):
            self.make(tmp_path, tiny_llava, shards, **changes)
        assert f"is not used: {words}" in caplog.text
        assert len(folders_of(tmp_path)) == 2
        assert len(lines_of(tmp_path)) == 14

    def test_a_template_that_writes_the_date(self, tiny_llava, shards, tmp_path, caplog, monkeypatch):
        """The template is the same in both runs; what it writes is not."""

        class Clock(dt.datetime):
            today = 20

            @classmethod
            def now(cls, tz=None):
                return cls(2026, 11, cls.today)

        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
        template = "{{ strftime_now('%d %B %Y') }} " + LLAVA_TEMPLATE
        for _ in range(2):
            self.make(tmp_path, tiny_llava, shards, chat_template=template)
        assert "is not used" not in caplog.text
        Clock.today = 21
        with caplog.at_level(logging.WARNING):
            self.make(tmp_path, tiny_llava, shards, chat_template=template)
        assert "is not used: made with other prompt" in caplog.text

    def test_what_does_not_count(self, tiny_llava, shards, tmp_path):
        self.make(tmp_path, tiny_llava, shards)
        moved = shutil.copytree(tiny_llava, tmp_path / "moved")
        for settings in (
            {"attn_implementation": "eager"},
            # What `auto` takes from the checkpoint.
            {"dtype": "float32"},
        ):
            self.make(tmp_path, tiny_llava, shards, **settings)
        self.make(tmp_path, moved, shards)
        assert len(lines_of(tmp_path)) == 7

    def test_bytes_of_the_weights(self, tiny_llava, shards, tmp_path, caplog):
        checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
        self.make(tmp_path, checkpoint, shards)
        weights = load_file(checkpoint / "model.safetensors")
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name].view(-1)[0] += 0.5
        size = (checkpoint / "model.safetensors").stat().st_size
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        assert (checkpoint / "model.safetensors").stat().st_size == size
        with caplog.at_level(logging.WARNING):
            self.make(tmp_path, checkpoint, shards)
        assert "is not used: made with other weights" in caplog.text
        first, second = ({line["sample"]: line["chosen"] for line in part} for part in self.halves(tmp_path))
        assert first.keys() == second.keys()
        assert first != second

    @staticmethod
    def halves(folder: Path) -> list[list[dict]]:
        return [[json.loads(line) for f in p.glob("*.jsonl") for line in f.open()] for p in folders_of(folder)]

    def test_code_that_encodes_and_scores(self, tiny_llava, shards, tmp_path, caplog, monkeypatch):
        """A release that computes otherwise finds nothing, however its version is called."""
        self.make(tmp_path, tiny_llava, shards)
        source = inspect.getsource

        def changed(module):
            text = source(module)
            return text.replace("places - 1", "places - 2") if module is scoring else text

        monkeypatch.setattr(inspect, "getsource", changed)
        assert "places - 2" in inspect.getsource(scoring)
        with caplog.at_level(logging.WARNING):
            self.make(tmp_path, tiny_llava, shards)
        assert "is not used: made with other scoring" in caplog.text

    def test_comments_and_docstrings_do_not_count(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        bodies = {
            "code_one": 'def f(x):\n    """Add."""\n    return x + 1\n',
            "code_two": '"""A module."""\ndef f(x):\n    # Why.\n    return (x +\n            1)\n',
            "code_three": "def f(x):\n    return x + 2\n",
        }
        hashes = []
        for name, body in bodies.items():
            (tmp_path / f"{name}.py").write_text(body)
            module = importlib.import_module(name)
            module.__name__ = "code"
            hashes.append(hash_code(module))
        assert hashes[0] == hashes[1] != hashes[2]

    def test_configuration(self, tiny_llava, shards, tmp_path):
        checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
        self.make(tmp_path, checkpoint, shards)
        config = json.loads((checkpoint / "config.json").read_text())
        config["text_config"]["rms_norm_eps"] = 1e-3
        (checkpoint / "config.json").write_text(json.dumps(config))
        self.make(tmp_path, checkpoint, shards)
        assert len(folders_of(tmp_path)) == 2

    def test_tokenizer(self, tiny_llava, shards, tmp_path, caplog):
        checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
        self.make(tmp_path, checkpoint, shards)
        tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}))
        with caplog.at_level(logging.WARNING):
            self.make(tmp_path, checkpoint, shards)
        assert "made with other processor" in caplog.text

    def test_a_processor_that_was_used_is_the_same(self, tiny_llava):
        from realign_lightning.backbones.files import FileHasher

        fresh, used = AutoBackbone(str(tiny_llava)), AutoBackbone(str(tiny_llava))
        used.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
        assert fresh.fingerprint(FileHasher()) == used.fingerprint(FileHasher())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_wherever_it_lies(self, family, tmp_path):
        from realign_lightning.backbones.files import FileHasher

        first = make_tiny(family, tmp_path / "one")
        second = shutil.copytree(first, tmp_path / "two")
        kind = PaliGemmaBackbone if family == "paligemma" else AutoBackbone
        one, two = (kind(str(folder)).fingerprint(FileHasher()) for folder in (first, second))
        assert one == two
        assert all(isinstance(value, str) for value in one.values())
        limited = kind(str(first), max_length=99).fingerprint(FileHasher())
        assert {name for name in one if one[name] != limited[name]} == {"max_length"}

    def test_a_name_on_the_hub_is_what_was_downloaded(self, tiny_llava, tmp_path):
        """In a process of its own: the hub's client looks once where its files lie."""
        from realign_lightning.backbones.files import FileHasher

        repository = tmp_path / "models--owner--name"
        shutil.copytree(tiny_llava, repository / "snapshots" / ("c" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c" * 40)
        code = (
            "import json; from realign_lightning.backbones import AutoBackbone;"
            "from realign_lightning.backbones.files import FileHasher;"
            "print(json.dumps(AutoBackbone('owner/name').fingerprint(FileHasher())))"
        )
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        )
        expected = AutoBackbone(str(tiny_llava)).fingerprint(FileHasher())
        assert json.loads(done.stdout.splitlines()[-1]) == expected

    def test_an_adapter_in_the_place_of_a_checkpoint_is_refused(self, tiny_llava, tmp_path):
        from realign_lightning.backbones.files import FileHasher

        checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
        (checkpoint / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="Expected a whole checkpoint"):
            AutoBackbone(str(checkpoint)).fingerprint(FileHasher())
        for path in (checkpoint / "adapter_config.json", checkpoint / "model.safetensors"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match="Expected weights"):
            AutoBackbone(str(checkpoint)).fingerprint(FileHasher())

    def test_a_backbone_that_cannot_tell_is_refused(self):
        from tests.data.helpers import WordBackbone

        with pytest.raises(NotImplementedError, match=r"WordBackbone does not say .* use another `reference`"):
            WordBackbone().fingerprint(str)

    @pytest.mark.parametrize(
        "changes",
        [
            {"chosen": "a blue bus."},
            {"rejected": "nothing at all."},
            {"prompt": "what is this?"},
            {"image": picture(99)},
            {"retrieved": picture(99)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_every_part_of_a_sample(self, changes, backbone, tmp_path):
        samples = preference_samples(3)
        write_tar(tmp_path / "one.tar", members_of(samples))
        samples[1] = dataclasses.replace(samples[1], **changes)
        write_tar(tmp_path / "two.tar", members_of(samples))
        for name in ("one", "two"):
            fit(backbone, str(tmp_path / f"{name}.tar"), tmp_path, "cached")
        assert [line["key"] for line in lines_of(tmp_path)].count("sample1") == 2
        assert len(lines_of(tmp_path)) == 4

    def test_one_byte_of_an_image(self, backbone, tmp_path):
        """A PNG's comment: not even a pixel differs."""
        from PIL import Image, PngImagePlugin

        members = members_of(preference_samples(2))
        name = next(name for name in members[0] if ".image." in name)
        found = []
        for text in ("a", "b"):
            info = PngImagePlugin.PngInfo()
            info.add_text("comment", text)
            picture(0).save(tmp_path / "x.png", pnginfo=info)
            with Image.open(tmp_path / "x.png") as image:
                assert image.size == (40, 32)
            members[0][name.rsplit(".", 1)[0] + ".png"] = (tmp_path / "x.png").read_bytes()
            shard = write_tar(tmp_path / f"{text}.tar", members)
            fit(backbone, str(shard), tmp_path, "cached")
            found.append(len(lines_of(tmp_path)))
        assert found == [2, 3]

    def test_the_key_does_not_count(self, backbone, tmp_path):
        samples = preference_samples(3)
        write_tar(tmp_path / "one.tar", members_of(samples))
        renamed = [dataclasses.replace(sample, key=f"other{i}") for i, sample in enumerate(samples)]
        write_tar(tmp_path / "two.tar", members_of(renamed))
        for name in ("one", "two"):
            fit(backbone, str(tmp_path / f"{name}.tar"), tmp_path, "cached")
        assert len(lines_of(tmp_path)) == 3


class TestBadSamples:
    def test_they_are_skipped_and_counted_as_without_a_cache(self, backbone, with_bad_one, tmp_path, caplog):
        runs = {}
        for reference in ("auto", "cached"):
            module, curve = module_of(backbone, reference), Curve()
            data = data_of(module, with_bad_one)
            caplog.clear()
            trainer_of(tmp_path, curve).fit(module, datamodule=data)
            named = [record.message for record in caplog.records if "sample skipped" in record.message]
            runs[reference] = curve.logged, data.skipped, named
        assert runs["cached"][1:] == runs["auto"][1:]
        assert len(runs["cached"][2]) == 2, "once in train, once in val"
        for ours, theirs in zip(runs["cached"][0], runs["auto"][0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert {line["key"] for line in lines_of(tmp_path)} == {f"sample{i}" for i in range(8) if i != BAD}

    def test_no_model_is_loaded_for_their_sake(self, backbone, with_bad_one, tmp_path, monkeypatch):
        fit(backbone, with_bad_one, tmp_path, "cached", adapter=None)
        monkeypatch.setattr(RDPOModule, "_base_scorer", refuse_to_score)
        fit(backbone, with_bad_one, tmp_path, "cached", adapter=None)
        assert len(lines_of(tmp_path)) == 7

    def test_too_many_stop_the_run(self, backbone, with_bad_one, tmp_path):
        from realign_lightning.data import BadDataError

        module = module_of(backbone)
        data = data_of(module, with_bad_one, max_bad_fraction=0.0)
        with pytest.raises(BadDataError, match="1 of 8 samples are bad"):
            trainer_of(tmp_path).fit(module, datamodule=data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_of_the_base_model_stays_in_memory(num_workers, backbone, shards, tmp_path, monkeypatch):
    loaded, alive = [], []
    load = AutoBackbone.load_model

    def load_and_watch(self):
        model = load(self)
        loaded.append(weakref.ref(model))
        return model

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            alive.extend(reference() is not None for reference in loaded)
            assert not list(pl_module.reference.parameters())

    monkeypatch.setattr(AutoBackbone, "load_model", load_and_watch)
    module = module_of(backbone, adapter=None)
    gc.disable()
    try:
        trainer_of(tmp_path, Look(), max_epochs=1).fit(
            module, datamodule=data_of(module, shards, num_workers=num_workers)
        )
    finally:
        gc.enable()
    assert alive == [True, False], "the policy, and the copy that was scored"
    assert sum(value.numel() for value in module.parameters()) == sum(v.numel() for v in module.policy.parameters())


class TestRefusals:
    def test_a_sample_that_was_not_scored(self, backbone, shards, tmp_path):
        module, _ = fit(backbone, shards, tmp_path, "cached")
        other = dataclasses.replace(preference_samples(9)[8], key="stranger")
        encoded = dataclasses.replace(backbone.encode_sample(other), fingerprint="0" * 64)
        batch = backbone.collate([encoded])
        with pytest.raises(UnknownSampleError, match=r"\(7 samples\) lacks sample 'stranger'.*cache_reference"):
            module.score(batch)
        assert module.score(batch, with_reference=False)[1] is None
        with pytest.raises(ValueError, match=r"Sample 'stranger' has no fingerprint.*EncodedSample.fingerprint"):
            module.score(dataclasses.replace(batch, fingerprints=()))

    def test_a_trainer_without_a_datamodule(self, backbone, tmp_path):
        encoded = [backbone.encode_sample(sample) for sample in preference_samples(2)]
        loader = DataLoader(encoded, collate_fn=backbone.collate)
        with pytest.raises(ValueError, match=r"Expected a datamodule with `sample_readers`.* got NoneType"):
            trainer_of(tmp_path).fit(module_of(backbone), loader)

    def test_questions_to_a_reference_that_is_no_model(self, backbone, shards, tmp_path):
        module, _ = fit(backbone, shards, tmp_path, "cached", adapter=None)
        with pytest.raises(ValueError, match=r"only the reference's log-probs .* set reference='frozen_copy'"):
            module.generate(["a"], [picture(1)], reference=True)
        module = module_of(backbone, adapter=None)
        with pytest.raises(ValueError, match=r"Evaluation asks the reference .* set reference='frozen_copy'"):
            trainer_of(tmp_path, Evaluation([Lengths(2)])).fit(module, datamodule=data_of(module, shards))

    def test_a_module_without_cache(self, backbone):
        with pytest.raises(ValueError, match="nothing to cache with reference='auto'"):
            module_of(backbone, "auto").cache_reference([])


def test_with_an_adapter_the_reference_answers(backbone, shards, tmp_path):
    module, _ = fit(backbone, shards, tmp_path, "cached", adapter=SMALL)
    prompts, images = ["describe the image.", "is there a dog?"], [picture(1), picture(2)]
    inputs = backbone.encode_prompts(prompts, images)
    base = backbone.generate(backbone.load_model(), inputs, max_new_tokens=8)
    assert module.generate(prompts, images, reference=True, max_new_tokens=8) == base
    assert module.generate(prompts, images, max_new_tokens=8) != base


def test_evaluation_and_its_controls_share_the_cache(backbone, shards, tmp_path, monkeypatch):
    """Also from a folder that is not the current one."""
    monkeypatch.chdir(tmp_path)
    module = module_of(backbone)
    callback = Evaluation([Lengths(2)], {"DPO": RDPOLoss(visual_weight=0.0), "SFT": SFTLoss()})
    trainer_of(tmp_path / "run", callback).fit(module, datamodule=data_of(module, shards))
    assert set(callback.results) == {"base", "rDPO", "DPO", "SFT"}
    assert len(lines_of(tmp_path / "run")) == 7
    assert not (tmp_path / "reference_cache").exists()


def test_a_loss_without_reference_computes_nothing(backbone, shards, tmp_path):
    fit(backbone, shards, tmp_path, "cached", loss=SFTLoss())
    assert lines_of(tmp_path) == []


def test_validation_alone_scores_the_validation_samples(backbone, tmp_path):
    for name, samples in (("train", preference_samples(6)[:4]), ("val", preference_samples(6)[4:])):
        write_tar(tmp_path / f"{name}.tar", members_of(samples))
    module = module_of(backbone)
    data = DualPreferenceDataModule(backbone, str(tmp_path / "train.tar"), str(tmp_path / "val.tar"))
    trainer_of(tmp_path).validate(module, datamodule=data, verbose=False)
    assert [line["key"] for line in lines_of(tmp_path)] == ["sample4", "sample5"]
    trainer_of(tmp_path).fit(module, datamodule=data)
    assert sorted(line["key"] for line in lines_of(tmp_path)) == [f"sample{i}" for i in range(6)]


@pytest.mark.parametrize("kind", ["projector", "full"])
def test_a_resumed_run_scores_the_base_and_not_what_was_trained(kind, backbone, shards, tmp_path):
    """The cache is lost between."""
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{epoch}")
    whole = module_of(backbone, **KINDS[kind])
    trainer_of(tmp_path, keep, enable_checkpointing=True).fit(whole, datamodule=data_of(whole, shards))
    shutil.rmtree(tmp_path / "reference_cache")
    resumed = module_of(backbone, **KINDS[kind])
    trainer = trainer_of(tmp_path)
    trainer.fit(resumed, datamodule=data_of(resumed, shards), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert_same_entries(resumed.reference.entries, live_entries(backbone, preference_samples(7)))
    for (name, ours), (_, theirs) in zip(
        resumed.policy.named_parameters(), whole.policy.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)


class TestOwnLoops:
    def batches(self, backbone, count=5, batch_size=2):
        encoded = [
            dataclasses.replace(backbone.encode_sample(sample), fingerprint=fingerprint_members(encode_members(sample)))
            for sample in preference_samples(count)
        ]
        return DataLoader(encoded, batch_size=batch_size, collate_fn=backbone.collate)

    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_cache_reference_computes_what_is_missing(self, kind, backbone, tmp_path):
        module = module_of(backbone, **KINDS[kind], reference_cache=tmp_path / "reference_cache")
        assert module.cache_reference(self.batches(backbone, 3)) == 3
        assert module.cache_reference(self.batches(backbone, 5)) == 2
        assert module.cache_reference(self.batches(backbone, 5, batch_size=1)) == 0
        assert_same_entries(module.reference.entries, live_entries(backbone, preference_samples(5)))
        batch = next(iter(self.batches(backbone, 5, batch_size=5)))
        live = module_of(backbone, "auto", **KINDS[kind])
        for views in (("chosen", "rejected", "visual"), ("chosen", "rejected"), ("chosen",)):
            ours, theirs = (one.score(batch, views)[1] for one in (module, live))
            assert dict(ours.items()).keys() == set(views)
            for name, value in ours.items():
                assert value.dtype == torch.float32
                torch.testing.assert_close(value, getattr(theirs, name).detach(), rtol=1e-6, atol=1e-5)

    def test_then_a_trainer_takes_plain_loaders(self, backbone, tmp_path):
        curves = []
        for reference in ("auto", "cached"):
            curves.append(Curve())
            module = module_of(backbone, reference, reference_cache=str(tmp_path / "reference_cache"))
            if reference == "cached":
                module.cache_reference(self.batches(backbone))
            trainer_of(tmp_path, curves[-1]).fit(module, self.batches(backbone))
        for ours, theirs in zip(curves[1].logged, curves[0].logged, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    def test_autocast_around_it_is_the_trainers_precision(self, backbone, tmp_path):
        module = module_of(backbone, reference_cache=str(tmp_path / "reference_cache"))
        with torch.autocast("cpu", torch.bfloat16):
            module.cache_reference(self.batches(backbone))
        trainer_of(tmp_path, precision="bf16-mixed").fit(module, self.batches(backbone))
        with pytest.raises(ValueError, match="in the same precision"):
            trainer_of(tmp_path).fit(module_of(backbone), self.batches(backbone))

    def test_the_default_folder_is_that_of_a_trainer(self, backbone, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        module_of(backbone).cache_reference(self.batches(backbone, 2))
        assert len(lines_of(tmp_path)) == 2

    def test_weights_that_compute_nonsense_are_refused(self, backbone, tmp_path):
        module = module_of(backbone, reference_cache=str(tmp_path / "reference_cache"))
        next(p for p in module.policy.parameters() if not p.requires_grad).data.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"Sample 'sample0' has log-probs .*nan"):
            module.cache_reference(self.batches(backbone))
        assert lines_of(tmp_path) == []


def test_checkpoints_and_clones_keep_the_folder(backbone, shards, tmp_path):
    module = module_of(backbone, reference_cache=tmp_path / "here")
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data_of(module, shards))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = RDPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    for other in (loaded, module.clone()):
        assert (other.reference_kind, other.reference_cache) == ("cached", str(tmp_path / "here"))


class TestCommandLine:
    """``fit --model.reference cached`` on a recipe."""

    @pytest.fixture
    def arguments(self, shards, tiny_llava, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        exact = ["--trainer.precision", "32-true", "--model.backbone.init_args.dtype", "float32"]
        recipe = ["fit", "--config", str(ROOT / "recipes" / "llava7b_lora.yaml")]
        return [*recipe, *small(shards, str(tiny_llava)), *exact, "--seed_everything", "3"]

    def test_twice_and_against_a_live_reference(self, arguments, tmp_path):
        live = run_command(arguments)
        cached = [*arguments, "--model.reference", "cached", "--model.reference_cache", "reference_cache"]
        for _ in range(2):
            cli = run_command(cached)
            expected = {name: value.item() for name, value in live.trainer.callback_metrics.items()}
            found = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert len(lines_of(tmp_path)) == 7
        swept = run_command([*cached, "--model.loss.init_args.beta", "0.5", "--data.batch_size", "2"])
        assert swept.model.loss.beta == 0.5
        assert len(lines_of(tmp_path)) == 7

    def test_resuming_may_change_where_the_reference_comes_from(self, arguments, tmp_path):
        run_command(arguments)
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        resume = [*arguments, "--trainer.max_steps", "4", "--ckpt_path", str(checkpoint)]
        cli = run_command([*resume, "--model.reference", "cached", "--model.reference_cache", "there"])
        assert cli.trainer.global_step == 4
        assert isinstance(cli.model.reference, CachedReference)
        assert len(list((tmp_path / "there").glob("*/*.jsonl"))) == 1

    def test_exports_do_not_tell_the_folder(self, arguments, tmp_path):
        run_command([*arguments, "--model.reference", "cached", "--model.reference_cache", "secret_folder"])
        cards = [path.read_text() for path in tmp_path.rglob("README.md")]
        assert cards
        assert all("reference: cached" in card and "secret_folder" not in card for card in cards)


# ---- several processes


@pytest.fixture
def run(run_module):
    def one(checkpoint, shards, kind, engine, reference, cache, output: Path, *precision, **more) -> None:
        arguments = [checkpoint, shards, kind, engine, reference, cache, output, *precision]
        run_module("tests.modules.cached_run", *arguments, processes=1 if engine == "one" else 2, **more)

    return one


def records_of(output: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output.parent.glob(f"{output.name}.*.json"))]


def curve_of(output: Path) -> list[dict[str, float]]:
    with (output.parent / "log" / output.name / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_process_ddp_and_fsdp2_agree(kind, tiny_llava, with_bad_one, tmp_path, run):
    """Eight samples, one of them bad, dealt to one process or two."""
    run(tiny_llava, with_bad_one, kind, "one", "auto", tmp_path / "none", tmp_path / "live")
    good = [sample for i, sample in enumerate(preference_samples(8)) if i != BAD]
    expected = live_entries(AutoBackbone(str(tiny_llava)), good)
    folders = set()
    for engine in ("one", "ddp", "fsdp"):
        cache = tmp_path / engine / "reference_cache"
        run(tiny_llava, with_bad_one, kind, engine, "cached", cache, tmp_path / engine)
        ranks = records_of(tmp_path / engine)
        assert len(ranks) == (1 if engine == "one" else 2)
        for rank in ranks:
            assert_same_entries(rank["entries"], expected)
            assert rank["loads"] == (kind == "full")
            assert set(rank["steps"]) == {1}
            # Four samples for each of two ranks, one at a time; the bad one has a batch of its own, and is no work
            # unless the other rank has some.
            assert rank["before"] == (7 if engine == "one" else 4)
        assert sorted(line["key"] for line in lines_of(tmp_path / engine)) == [s.key for s in good]
        folders |= {folder.name for folder in folders_of(tmp_path / engine)}
        for ours, theirs in zip(curve_of(tmp_path / engine), curve_of(tmp_path / "live"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert len(folders) == 1, "how the work is shared does not count"
    # What two processes computed serves one.
    run(tiny_llava, with_bad_one, kind, "one", "cached", tmp_path / "fsdp" / "reference_cache", tmp_path / "again")
    (again,) = records_of(tmp_path / "again")
    assert (again["loads"], again["before"]) == (0, 0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fsdp2_in_mixed_precision(kind, tiny_llava, shards, tmp_path, run):
    """Batches of one and two samples are rounded differently."""
    for reference in ("auto", "cached"):
        cache, output = tmp_path / "reference_cache", tmp_path / reference
        run(tiny_llava, shards, kind, "fsdp", reference, cache, output, "bf16-mixed")
    live, ours = (curve_of(tmp_path / reference) for reference in ("auto", "cached"))
    assert live[0]["train/loss"] == pytest.approx(1.386294, abs=1e-2)
    for one, other in zip(live, ours, strict=True):
        assert other == pytest.approx(one, rel=2e-2, abs=2e-2)
    (folder,) = folders_of(tmp_path)
    made_with = json.loads((folder / FINGERPRINT).read_text())
    assert made_with["precision"] == "float32 under autocast to bfloat16"


def test_after_a_kill_only_the_rest_is_computed(tiny_llava, shards, tmp_path, run):
    output = tmp_path / "run"
    cache = tmp_path / "reference_cache"
    run(tiny_llava, shards, "lora", "one", "cached", cache, output, statuses=[-signal.SIGKILL], KILL_AFTER="3")
    assert len(lines_of(tmp_path)) == 3
    # And the last line is half there.
    (file,) = (tmp_path / "reference_cache").glob("*/*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    run(tiny_llava, shards, "lora", "one", "cached", tmp_path / "reference_cache", output)
    (record,) = records_of(output)
    assert record["before"] == 5
    assert_same_entries(record["entries"], live_entries(AutoBackbone(str(tiny_llava)), preference_samples(7)))


def test_a_rank_that_is_killed_leaves_what_all_ranks_wrote(tiny_llava, shards, tmp_path, run):
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "KILL_AFTER": "2"}
    arguments = [tiny_llava, shards, "full", "fsdp", "cached", tmp_path / "reference_cache", tmp_path / "run"]
    command = [sys.executable, "-m", "tests.modules.cached_run", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, timeout=300)  # noqa: S603
    assert done.returncode != 0
    count = len(lines_of(tmp_path))
    assert 2 <= count <= 4
    run(tiny_llava, shards, "full", "ddp", "cached", tmp_path / "reference_cache", tmp_path / "run")
    assert len(lines_of(tmp_path)) == 7
    assert [rank["before"] for rank in records_of(tmp_path / "run")] == [-(-(7 - count) // 2)] * 2


def test_a_tiny_llava_of_other_weights_is_another_model(tmp_path):
    """The makers of tiny checkpoints draw the same weights again: the control for every test above."""
    from realign_lightning.backbones.files import FileHasher

    one, two = (AutoBackbone(str(make_tiny_llava(tmp_path / name))).fingerprint(FileHasher()) for name in "ab")
    assert one == two


def test_logged_names_are_those_of_a_live_reference(backbone, shards, tmp_path):
    columns = []
    for reference in ("auto", "cached"):
        module = module_of(backbone, reference, loss=RDPOLoss(visual_weight=0.0))
        logger = CSVLogger(tmp_path, name=reference, version=0)
        trainer = trainer_of(tmp_path, max_epochs=1, logger=logger)
        trainer.fit(module, datamodule=data_of(module, shards))
        columns.append(set(trainer.logged_metrics))
    assert columns[0] == columns[1]
    assert "val/rewards/visual" in columns[0]
