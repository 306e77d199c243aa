"""Samples per second of the data loader beside raw WebDataset on the same tars, its memory, and indexing.

From the root of the repository:

    python -m benchmarks.loader --samples 1000000 --json loader.json
    python -m benchmarks.loader --folder /data/pairs

- The tars hold tiny images, so that what is measured is reading and checking and not the scaling of photographs, and so
  that a million samples, which real images take hours for, pass in minutes. ``--folder`` takes shards of your own
  instead; they are read, not changed.
- Both sides read in order, with as many worker processes, and give the same batches: both images decoded to RGB, the
  JSON parsed, and all of it turned into tensors by the same code. WebDataset is the plain pipeline of its
  documentation, ``WebDataset(urls).decode("pil")``. It checks nothing. Ours compares each sample with the shard
  contract, and hashes its content.
- They take turns on equal parts of the shards; the figure is the median of the turns' ratios.
- The long run is one shuffled epoch over everything. Memory is what the process and its workers have for themselves
  (proportional set size of what is no file), file descriptors are counted in all of them. Growth is the last tenth of
  the run over the second.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.measure import matmul_rate
from benchmarks.report import environment, table
from realign_lightning.backbones.base import Backbone
from realign_lightning.data import DualPreferenceDataModule, read_index
from realign_lightning.data.indexing import index_shards
from realign_lightning.types import EncodedSample, EncodedView, PreferenceBatch, PreferenceSample, View

TURNS = 5
"""Turns that each side takes."""

TURN_SHARDS = 4
"""Most shards that are read in a turn."""

GROWTH = 1.02
"""Most that memory may grow after the warm-up."""

_PICTURES = 512


class PixelBackbone(Backbone):
    """Gives pixels and the bytes of texts as tensors; there is no model."""

    pad_token_id = 0
    end_token_ids = (1,)

    def encode_sample(self, sample: PreferenceSample) -> EncodedSample:
        """Tensors of a sample."""
        views = [self._view(sample.chosen), self._view(sample.rejected), self._view(sample.chosen)]
        image, retrieved = (
            {"pixels": torch.from_numpy(np.array(picture))[None]} for picture in (sample.image, sample.retrieved)
        )
        return EncodedSample(sample.key, *views, image, retrieved)

    def collate(self, samples: Sequence[EncodedSample]) -> PreferenceBatch:
        """A batch of samples; texts are cut to the shortest, which costs as much for both sides."""
        chosen, rejected, visual = (
            self._join([getattr(sample, name) for sample in samples]) for name in ("chosen", "rejected", "visual")
        )
        pixels = [{"pixels": _stack([getattr(item, name)["pixels"] for item in samples])} for name in _IMAGES]
        weights = torch.tensor([sample.weight for sample in samples])
        keys = tuple(sample.key for sample in samples)
        skipped = tuple(skip for sample in samples for skip in sample.skipped)
        return PreferenceBatch(chosen, rejected, visual, *pixels, weights, keys, skipped=skipped)

    @staticmethod
    def _view(text: str) -> EncodedView:
        ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return EncodedView({"input_ids": ids}, torch.ones(len(ids), dtype=torch.bool))

    @staticmethod
    def _join(views: Sequence[EncodedView]) -> View:
        length = min(len(view.response_mask) for view in views)
        ids = torch.stack([view.tokens["input_ids"][:length] for view in views])
        return View({"input_ids": ids}, torch.stack([view.response_mask[:length] for view in views]))

    def _no_model(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this benchmark reads data only")

    encode_prompts = response_tokenizer = decode = load_model = encode_images = join_images = select_images = _no_model
    token_log_probs = generate_tokens = embed_images = parts = projector_modules = linear_pattern = _no_model


_IMAGES = ("image", "retrieved")


def _stack(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pictures of one size as one tensor; those of others as their first pixels, which is enough to have them read."""
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    return torch.cat([picture[:, :height, :width] for picture in pictures])


def write_tars(folder: Path, samples: int, per_shard: int) -> None:
    """Write shards of tiny images as another program would: without an index.

    Args:
        folder: an empty folder.
        samples: how many.
        per_shard: samples in each but the last.
    """
    pictures = [_png(number) for number in range(_PICTURES)]
    for start in tqdm(range(0, samples, per_shard), desc="writing tars", unit="shard"):
        path = folder / f"part-{start // per_shard:05d}.tar"
        with path.open("wb") as file:
            for number in range(start, min(samples, start + per_shard)):
                for name, data in _members(number, pictures):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                    file.write(header.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
            file.write(b"\0" * 2 * tarfile.BLOCKSIZE)


def _png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _members(number: int, pictures: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
    key = f"{number:09d}"
    record = {
        "prompt": "What is in the picture?",
        "chosen": f"The picture shows a cat beside {number} dogs in the sun.",
        "rejected": f"The picture shows a bird beside {number} cats in the rain.",
        "image_id": f"picture-{number}",
        "retrieval_score": 0.75,
    }
    yield f"{key}.image.png", pictures[number % _PICTURES]
    yield f"{key}.retrieved.png", pictures[(number + 1 + number // _PICTURES) % _PICTURES]
    yield f"{key}.json", json.dumps(record).encode()


def ours(tars: Sequence[Path], batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """Our loader over some shards.

    Args:
        tars: paths.
        batch_size: samples per batch.
        workers: processes.
        shuffle: whether to read at random.
    """
    data = DualPreferenceDataModule(
        PixelBackbone(), [str(tar) for tar in tars], batch_size=batch_size, num_workers=workers, shuffle=shuffle
    )
    data.setup("fit")
    return data.train_dataloader()


def theirs(tars: Sequence[Path], batch_size: int, workers: int) -> DataLoader[Any]:
    """WebDataset's plain pipeline over the same shards, with the same tensors.

    Args:
        tars: paths.
        batch_size: samples per batch.
        workers: processes.
    """
    backbone = PixelBackbone()
    pictures = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode("pil")
    return DataLoader(
        pictures.map(lambda item: backbone.encode_sample(_sample(item))),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=backbone.collate,
    )


def _sample(item: Mapping[str, Any]) -> PreferenceSample:
    image, retrieved = (
        next(item[f"{part}.{ending}"] for ending in ("png", "jpg", "webp") if f"{part}.{ending}" in item)
        for part in _IMAGES
    )
    record = item["json"]
    return PreferenceSample(item["__key__"], image, retrieved, record["prompt"], record["chosen"], record["rejected"])


def count_per_second(loader: DataLoader[Any]) -> tuple[int, float]:
    """Samples of a loader, and how many come in a second; starting its workers counts.

    Args:
        loader: to read once.
    """
    began = time.perf_counter()
    count = sum(len(batch) for batch in loader)
    return count, count / (time.perf_counter() - began)


def compare(tars: Sequence[Path], batch_size: int, workers: int) -> list[tuple[float, float]]:
    """Samples per second of both sides, in turns on equal parts of the shards.

    Args:
        tars: at least as many as there are turns.
        batch_size: samples per batch.
        workers: processes.
    """
    rates = []
    for turn in range(TURNS):
        part = tars[turn::TURNS][:TURN_SHARDS]
        sides: list[Callable[..., DataLoader[Any]]] = [ours, theirs]
        found = {side: count_per_second(side(part, batch_size, workers)) for side in sides[:: 1 if turn % 2 else -1]}
        if found[ours][0] != found[theirs][0]:
            raise RuntimeError(f"ours gave {found[ours][0]} samples, theirs {found[theirs][0]}")
        rates.append((found[ours][1], found[theirs][1]))
    return rates


def long_run(tars: Sequence[Path], batch_size: int, workers: int, looks: int = 200) -> dict[str, Any]:
    """One shuffled epoch over all shards, with memory and file descriptors on the way.

    Args:
        tars: paths.
        batch_size: samples per batch.
        workers: processes.
        looks: how often memory and descriptors are looked at; a look takes tenths of a second.
    """
    loader = ours(tars, batch_size, workers, shuffle=True)
    every = max(1, len(loader) // looks)
    points: list[tuple[int, float, int]] = []
    began, seen = time.perf_counter(), 0
    for number, batch in enumerate(tqdm(loader, desc="long run", unit="batch"), 1):
        seen += len(batch)
        if number % every == 0:
            points.append((seen, *_held()))
    second = points[len(points) // 10 : len(points) // 5]
    last = points[-max(1, len(points) // 10) :]
    memory = [statistics.median(point[1] for point in part) for part in (second, last)]
    return {
        "samples": seen,
        "samples_per_second": seen / (time.perf_counter() - began),
        "megabytes": memory,
        "growth": memory[1] / memory[0],
        "file_descriptors": [max(point[2] for point in part) for part in (second, last)],
        "points": points,
    }


def _held() -> tuple[float, int]:
    """Megabytes and open files of this process and its children."""
    megabytes, files = 0.0, 0
    for process in [os.getpid(), *_children()]:
        folder = Path("/proc") / str(process)
        lines = (folder / "smaps_rollup").read_text().splitlines()
        # Not the pages of programs and libraries, which the system drops and reads again as it likes.
        megabytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1e3
        files += len(list((folder / "fd").iterdir()))
    return megabytes, files


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def index_times(folder: Path) -> dict[str, float]:
    """Index a folder of tars that has no index.

    Args:
        folder: of the tars.
    """
    began = time.perf_counter()
    _, index = index_shards(folder)
    seconds = time.perf_counter() - began
    size = sum(shard.bytes for shard in index.shards) / 1e9
    read_index(folder)
    began = time.perf_counter()
    read_index(folder)
    return {
        "gigabytes": size,
        "seconds": seconds,
        "seconds_per_gigabyte": seconds / size,
        "samples_per_second": sum(shard.samples for shard in index.shards) / seconds,
        "seconds_to_read_it": time.perf_counter() - began,
    }


def measure(folder: Path, batch_size: int, workers: int) -> dict[str, Any]:
    """All figures for a folder of tars.

    Args:
        folder: of the tars; without an index it is indexed, and timed.
        batch_size: samples per batch.
        workers: processes.

    Raises:
        ValueError: if there are fewer tars than turns.
    """
    tars = sorted(folder.glob("*.tar"))
    if len(tars) < TURNS:
        raise ValueError(f"expected at least {TURNS} tars in {folder}, found {len(tars)}")
    found: dict[str, Any] = {} if (folder / "index.json").exists() else {"index": index_times(folder)}
    rates = compare(tars, batch_size, workers)
    ratio = statistics.median(own / other for own, other in rates)
    return {**found, "rates": rates, "ratio": ratio, "long_run": long_run(tars, batch_size, workers)}


def report(found: Mapping[str, Any]) -> str:
    """The figures in words and tables.

    Args:
        found: from :func:`measure`.
    """
    own, other = (statistics.median(pair[side] for pair in found["rates"]) for side in (0, 1))
    run = found["long_run"]
    rows = [
        ["in order, ours", f"{own:,.0f} samples/s"],
        ["in order, WebDataset", f"{other:,.0f} samples/s"],
        ["ratio, median of turns", f"{found['ratio']:.2f}"],
        ["shuffled, ours", f"{run['samples_per_second']:,.0f} samples/s over {run['samples']:,} samples"],
        ["memory, second and last tenth", f"{run['megabytes'][0]:,.1f} MB, {run['megabytes'][1]:,.1f} MB"],
        ["growth", f"{100 * (run['growth'] - 1):+.2f} %"],
        ["open files, second and last tenth", "{}, {}".format(*run["file_descriptors"])],
    ]
    if index := found.get("index"):
        rows += [
            ["indexing", f"{index['seconds_per_gigabyte']:.1f} s per GB, {index['samples_per_second']:,.0f} samples/s"],
            ["reading the index", f"{index['seconds_to_read_it']:.1f} s"],
        ]
    return table(["", ""], rows)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples to write (default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples per shard (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="tars of your own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.float32
    about = {
        **environment(device, dtype, TURNS, matmul_rate(device, dtype)),
        "webdataset": version("webdataset"),
        "settings": ", ".join(f"{name} {value}" for name, value in vars(options).items() if value is not None),
    }
    sys.stdout.write("\n".join(f"- {name}: {value}" for name, value in about.items()) + "\n")
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.folder is None:
            write_tars(folder, options.samples, options.per_shard)
        found = measure(folder, options.batch_size, options.workers)
    sys.stdout.write(report(found) + "\n")
    if options.json:
        options.json.write_text(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    main()
