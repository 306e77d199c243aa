"""A backbone without a model, and preference samples and shards made from noise."""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from realign_lightning.backbones.base import Backbone
from realign_lightning.data import ShardWriter, encode_members
from realign_lightning.types import (
    EncodedSample,
    EncodedView,
    PreferenceBatch,
    PreferenceSample,
    SampleError,
    View,
)


def picture(seed: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(number: int, **changes) -> PreferenceSample:
    fields = {
        "key": f"{number:06d}",
        "image": picture(2 * number),
        "retrieved": picture(2 * number + 1),
        "prompt": f"What is in picture {number} ?",
        "chosen": f"A cat and {number} dogs .",
        "rejected": f"A bird and {number} dogs .",
        "provenance": {"image_id": number, "retrieval_rank": 1, "retrieval_score": 0.5, "masked": ["cat"]},
    }
    return PreferenceSample(**{**fields, **changes})


def write_shards(folder: Path, count: int, samples_per_shard: int = 4, **options) -> Path:
    with ShardWriter(folder, samples_per_shard, **options) as writer:
        for number in range(count):
            writer.write(sample(number))
    return folder


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def good_members(*numbers: int) -> list[tuple[str, bytes]]:
    return [member for number in numbers for member in encode_members(sample(number)).items()]


def write_tar(path: Path, samples: Sequence[Mapping[str, bytes]]) -> Path:
    path.write_bytes(tar_bytes(member for members in samples for member in members.items()))
    return path


def raw_members(number: int, changes: Mapping[str, bytes | None]) -> dict[str, bytes]:
    """Members of a good sample with parts replaced (or, by None, left out)."""
    members = encode_members(sample(number))
    for part, data in changes.items():
        name = f"{number:06d}.{part}"
        if data is None:
            del members[name]
        else:
            members[name] = data
    return members


class WordBackbone(Backbone):
    """Words become tokens by their length and first letter; images become 3 x 8 x 8 floats."""

    def encode_sample(self, sample: PreferenceSample) -> EncodedSample:
        if "<image>" in sample.chosen:
            raise SampleError("chosen holds the reserved token <image>")
        if "boom" in sample.chosen:
            raise ZeroDivisionError("a mistake in the backbone")
        chosen, rejected = self._view(sample.prompt, sample.chosen), self._view(sample.prompt, sample.rejected)
        image, retrieved = ({"pixels": self._pixels(item)} for item in (sample.image, sample.retrieved))
        return EncodedSample(sample.key, chosen, rejected, chosen, image, retrieved)

    def collate(self, samples: Sequence[EncodedSample]) -> PreferenceBatch:
        def view(name: str) -> View:
            views = [getattr(item, name) for item in samples]
            tokens = pad_sequence([item.tokens["input_ids"] for item in views], batch_first=True)
            mask = pad_sequence([item.response_mask for item in views], batch_first=True)
            return View({"input_ids": tokens}, mask)

        return PreferenceBatch(
            view("chosen"),
            view("rejected"),
            view("visual"),
            {"pixels": torch.cat([item.image["pixels"] for item in samples])},
            {"pixels": torch.cat([item.retrieved["pixels"] for item in samples])},
            torch.tensor([item.weight for item in samples]),
            tuple(item.key for item in samples),
            skipped=tuple(skip for item in samples for skip in item.skipped),
        )

    @staticmethod
    def _view(prompt: str, response: str) -> EncodedView:
        ids = [len(word) * 256 + ord(word[0]) for word in f"{prompt} {response}".split()]
        count = len(response.split())
        return EncodedView({"input_ids": torch.tensor(ids)}, torch.arange(len(ids)) >= len(ids) - count)

    @staticmethod
    def _pixels(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)[None]

    pad_token_id = 0
    end_token_ids = (1,)

    def _no_model(self, *args, **kwargs):
        raise NotImplementedError("these tests read data only")

    encode_prompts = response_tokenizer = decode = load_model = encode_images = join_images = select_images = _no_model
    token_log_probs = generate_tokens = embed_images = parts = projector_modules = linear_pattern = _no_model


class Recorder(LightningModule):
    """Learns nothing; remembers what it was given, and writes it to ``folder/rank.txt`` if there is one."""

    def __init__(self, folder: Path | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[tuple[str, int, str, float]] = []

    def record(self, stage: str, batch: PreferenceBatch) -> None:
        rows = zip(batch.keys, batch.weights.tolist(), strict=True)
        self.seen.extend((stage, self.current_epoch, key, weight) for key, weight in rows)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> torch.Tensor:
        self.record("train", batch)
        return self.weight * batch.weights.sum()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.record("val", batch)

    def on_fit_end(self) -> None:
        if self.folder is not None:
            lines = [" ".join(map(str, row)) for row in self.seen]
            (self.folder / f"{self.global_rank}.txt").write_text("\n".join(lines))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
