"""Score, train a step and generate with every family sharded over two processes. Run by test_sharded.py."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from realign_lightning.backbones import LoRA
from realign_lightning.scoring import score
from tests.backbones.test_families import backbone_of, batch_of, samples_of_different_sizes
from tests.conftest import picture


def compare(family: str, folder: Path) -> None:
    backbone = backbone_of(family, folder)
    batch = batch_of(backbone, samples_of_different_sizes())
    mesh = init_device_mesh("cpu", (2,))
    adapter = LoRA(r=2, alpha=4, dropout=0.0)
    whole = backbone.load_model()
    trained = backbone.projector_modules(whole)
    torch.manual_seed(0)
    whole = adapter.apply(backbone, whole, trained)
    torch.manual_seed(0)
    sharded = backbone.load_sharded(mesh, adapter, trained)
    assert not any(value.is_meta for value in [*sharded.parameters(), *sharded.buffers()])
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5) for model in (whole, sharded)
    ]
    for _ in range(2):
        scores = [score(backbone, model, batch) for model in (whole, sharded)]
        for (_, one), (_, two) in zip(scores[0].items(), scores[1].items(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-4)
        for scored, optimizer in zip(scores, optimizers, strict=True):
            (scored.rejected - scored.chosen).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    after = score(backbone, whole, batch)
    assert (after.chosen - scores[0].chosen).abs().max() > 1e-2, f"{family}: the steps change something"
    with torch.no_grad(), sharded.disable_adapter(), whole.disable_adapter():
        one, two = score(backbone, whole, batch), score(backbone, sharded, batch)
        torch.testing.assert_close(two.visual, one.visual, rtol=1e-5, atol=1e-4)
    # Answers of different lengths on the two ranks.
    inputs = backbone.encode_prompts(["a", "is there a dog?"], [picture(1), picture(2, (90, 32))])
    length = 3 + 2 * dist.get_rank()
    answers = [
        backbone.generate(model, copy.copy(inputs), max_new_tokens=length, **options)
        for model, options in ((whole, {}), (sharded, {"synced_gpus": True}))
    ]
    assert answers[0] == answers[1], family


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        compare(name, Path(path))
        print(f"{name} done", flush=True)
    dist.destroy_process_group()
