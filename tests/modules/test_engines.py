"""One process, DDP and FSDP2 on two processes: the same global batches give the same run."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from realign_lightning.data import ShardWriter
from tests.conftest import preference_samples
from tests.modules import two_processes

ENGINES = ("one", "ddp", "fsdp")
LOGGED = ("train/loss", "train/logps/chosen", "train/logps/visual", "train/rewards/margins", "train/rewards/accuracies")


@pytest.fixture(scope="module", params=["lora", "projector", "full"])
def runs(request, tiny_llava, tmp_path_factory, run_module) -> tuple[str, Path]:
    """Seven samples in batches of 4 or 2 x 2: in every second step one rank holds two samples, the other one."""
    folder = tmp_path_factory.mktemp(request.param)
    with ShardWriter(folder / "shards") as writer:
        for sample in preference_samples(7):
            writer.write(sample)
    for engine in ENGINES:
        arguments = (tiny_llava, folder / "shards", request.param, engine, folder)
        run_module("tests.modules.two_processes", *arguments, processes=1 if engine == "one" else 2)
    return request.param, folder


def csv_rows(path: Path, column: str) -> list[dict[str, str]]:
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_the_loss_curve_is_that_of_one_process(runs, engine):
    _, folder = runs
    alone, together = (csv_rows(folder / "log" / name / "metrics.csv", "train/loss") for name in ("one", engine))
    assert len(alone) == two_processes.STEPS == 10
    losses = [float(row["train/loss"]) for row in alone]
    assert losses[0] == pytest.approx(1.386294, abs=1e-6)
    assert losses[-1] < 0.6, "ten steps that learn something"
    for one, other in zip(alone, together, strict=True):
        for name in LOGGED:
            assert float(other[name]) == pytest.approx(float(one[name]), abs=1e-4), (one["step"], name)
    alone, together = (csv_rows(folder / "log" / name / "metrics.csv", "val/loss") for name in ("one", engine))
    assert len(alone) == 5
    for one, other in zip(alone, together, strict=True):
        assert float(other["val/loss"]) == pytest.approx(float(one["val/loss"]), abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_the_trained_weights_are_those_of_one_process(runs, engine, tmp_path):
    kind, folder = runs
    saved = folder / f"{engine}.ckpt"
    if engine == "fsdp":
        assert saved.is_dir(), "every rank writes its shard"
        dcp_to_torch_save(saved, tmp_path / "gathered.pt")
        saved = tmp_path / "gathered.pt"
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (folder / "one.ckpt", saved))
    assert one.keys() == other.keys(), "trained weights and nothing else"
    if kind != "full":
        assert all("lora_" in name or "modules_to_save" in name for name in one)
        assert any("modules_to_save" in name for name in one) == (kind == "projector")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_callbacks_work_under_every_engine(runs, engine):
    _, folder = runs
    assert (folder / "log" / engine / "answers" / "step=0.png").is_file()
    assert (folder / "log" / engine / "answers" / "step=10.png").is_file()
    reports = [json.loads((folder / "log" / name / "evaluation.json").read_text()) for name in ("one", engine)]
    assert reports[0]["base"] == reports[1]["base"]
