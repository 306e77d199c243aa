import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import AutoConfig, LlavaForConditionalGeneration

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.data import ShardWriter
from realign_lightning.modules import FSDP2Strategy, RDPOModule
from tests.conftest import preference_samples
from tests.processes import ROOT
from tests.tiny_models import FAMILIES, make_tiny, make_tiny_llava


def test_every_family_scores_trains_and_answers_alike_when_sharded(tmp_path):
    folders = [f"{family}={make_tiny(family, tmp_path / family)}" for family in FAMILIES]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603
        [*command, "-m", "tests.modules.sharded_families", *folders],
        check=True,
        timeout=300,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" done")} == set(FAMILIES)


def make_large_llava(folder: Path) -> int:
    """A LLaVA of 207 million random float32 weights in files of 200 MB. Returns its size in bytes."""
    make_tiny_llava(folder)
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 2048, 8192, 3
    text.num_attention_heads = text.num_key_value_heads = 16
    text.head_dim = 128
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def test_no_rank_ever_holds_the_whole_model(tmp_path, run_module):
    size = make_large_llava(tmp_path / "large")
    assert size > 8e8
    run_module("tests.modules.sharded_memory", tmp_path / "large", tmp_path, processes=2)
    for rank in (0, 1):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        assert measured["held"] >= 0.49 * size, "every weight was read"
        assert measured["held"] <= measured["peak"] <= 0.65 * size


def test_a_resumed_sharded_run_is_the_undisturbed_one(tiny_llava, tmp_path, run_module):
    """Five epochs of two steps, and again from the middle of the third, with the schedule that recipes have."""
    with ShardWriter(tmp_path / "shards") as writer:
        for sample in preference_samples(4):
            writer.write(sample)
    run_module("tests.modules.sharded_resume", tiny_llava, tmp_path / "shards", tmp_path, processes=2)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    refusal = (tmp_path / "refused.txt").read_text()
    assert "another backbone or adapter" in refusal


@pytest.fixture
def one_device_trainer(tmp_path, monkeypatch):
    # Lightning's launcher would hand these to later tests.
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(strategy):
        return Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    yield make
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def loader(backbone) -> DataLoader:
    encoded = [backbone.encode_sample(sample) for sample in preference_samples(2)]
    return DataLoader(encoded, batch_size=2, collate_fn=backbone.collate)


def test_4_bit_weights_are_refused(tiny_llava, one_device_trainer):
    backbone = AutoBackbone(str(tiny_llava), quantization="nf4", dtype="float32")
    with pytest.raises(ValueError, match="FSDP cannot shard 4-bit weights: set `quantization: null`"):
        one_device_trainer(FSDP2Strategy()).fit(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone))


def test_the_parent_strategy_is_refused(tiny_llava, one_device_trainer):
    backbone = AutoBackbone(str(tiny_llava))
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(ValueError, match=r"Expected a single device, ddp, or .* got ModelParallelStrategy"):
        one_device_trainer(strategy).fit(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone))


def test_precisions_without_meaning_are_refused(tiny_llava, one_device_trainer):
    trainer = one_device_trainer(FSDP2Strategy())
    trainer.strategy.precision_plugin.precision = "16-mixed"
    backbone = AutoBackbone(str(tiny_llava))
    with pytest.raises(ValueError, match="Expected precision 32-true, bf16-mixed or bf16-true with FSDP2Strategy"):
        trainer.fit(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone))


def test_a_16_bit_model_trains_its_projector_in_float32(tiny_llava, one_device_trainer):
    backbone = AutoBackbone(str(tiny_llava), dtype="bfloat16")
    trainer = one_device_trainer(FSDP2Strategy())
    module = RDPOModule(backbone, adapter=LoRA(2), trained_parts=["projector"])
    trainer.fit(module, loader(backbone))
    trained = [value for value in module.policy.parameters() if value.requires_grad]
    assert len(trained) == 4 + 2 * 2 * 7
    assert {value.dtype for value in trained} == {torch.float32}
    assert {value.dtype for value in module.policy.parameters() if not value.requires_grad} == {torch.bfloat16}
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(1.386294, abs=1e-5)


def test_a_file_that_does_not_fit_is_refused(tiny_llava, one_device_trainer, tmp_path):
    backbone = AutoBackbone(str(tiny_llava))
    trainer = one_device_trainer(FSDP2Strategy(save_distributed_checkpoint=False))
    trainer.fit(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    assert (tmp_path / "whole.ckpt").is_file()
    again = one_device_trainer(FSDP2Strategy())
    again.validate(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone), tmp_path / "whole.ckpt", verbose=False)
    with pytest.raises(ValueError, match="another backbone or adapter"):
        one_device_trainer(FSDP2Strategy()).validate(
            RDPOModule(backbone, adapter=LoRA(2, parts=["vision_tower"])), loader(backbone), tmp_path / "whole.ckpt"
        )


def test_one_device_is_enough(tiny_llava, one_device_trainer):
    backbone = AutoBackbone(str(tiny_llava))
    trainer = one_device_trainer(FSDP2Strategy())
    trainer.fit(RDPOModule(backbone, adapter=LoRA(2)), loader(backbone))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(1.386294, abs=1e-5)
