"""Bad shards on the way that a user takes them, and what webdataset makes of the same tars."""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import webdataset
from lightning.pytorch import Trainer
from PIL import Image

from realign_lightning.data import BadDataError, DualPreferenceDataModule, ShardError
from tests.data.helpers import Recorder, WordBackbone, raw_members, tar_bytes, write_tar

KEYS = [f"{number:06d}" for number in range(8)]
BAD, ALSO_BAD = 3, 5
"""Numbers of the samples that are made bad: the first alone, or both, which are more than max_bad_fraction allows."""

Changes = Mapping[str, bytes | None] | Callable[[int], Mapping[str, bytes | None]]
"""Members to replace (by None: to leave out) in a sample, or what gives them for its number."""


def trainer(folder: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**quiet, **defaults, **options})


def module(source, **options) -> DualPreferenceDataModule:
    train = [str(item) for item in source] if isinstance(source, list) else str(source)
    return DualPreferenceDataModule(WordBackbone(), train, **{"batch_size": 2, **options})


def trained(folder: Path, source, **options) -> tuple[DualPreferenceDataModule, list[str]]:
    """Fit for an epoch: the data module, and the keys that counted, sorted."""
    data, recorder = module(source, **options), Recorder()
    trainer(folder).fit(recorder, datamodule=data)
    return data, sorted(key for _, _, key, weight in recorder.seen if weight)


def refused(folder: Path, source) -> str:
    """What stops the run before its first step."""
    recorder = Recorder()
    with pytest.raises(ShardError) as error:
        trainer(folder).fit(recorder, datamodule=module(source))
    assert recorder.seen == []
    return str(error.value)


def bad_tar(path: Path, numbers: list[int], changes: Changes) -> Path:
    """A shard of eight samples, of which some are bad."""
    change = changes if callable(changes) else lambda number: changes
    return write_tar(path, [raw_members(number, change(number) if number in numbers else {}) for number in range(8)])


def quarantined(folder: Path, caplog: pytest.LogCaptureFixture, changes: Changes, reason: str) -> None:
    """One such sample of eight is skipped, counted and named, the rest is trained on; two of eight stop the run."""
    shard = bad_tar(folder / "a.tar", [BAD], changes)
    with caplog.at_level(logging.WARNING, logger="realign_lightning"):
        data, keys = trained(folder, shard)
    assert keys == [key for key in KEYS if key != KEYS[BAD]]
    (skip,) = data.skipped["train"]
    assert (skip.shard, skip.key) == ("a.tar", KEYS[BAD])
    assert reason in skip.reason
    named = [line for line in caplog.messages if f"a.tar: {KEYS[BAD]} (" in line]
    assert len(named) == 1
    assert reason in named[0]
    (line,) = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"split": "train", "shard": "a.tar", "key": KEYS[BAD], "reason": skip.reason}
    bad_tar(folder / "a.tar", [BAD, ALSO_BAD], changes)
    with pytest.raises(BadDataError, match=r"2 of 8 samples are bad, more than max_bad_fraction=0\.01") as error:
        trained(folder, shard)
    assert all(f"a.tar: {KEYS[number]} (" in str(error.value) for number in (BAD, ALSO_BAD))


# ---- others


def raw(source: Path | list[str], *decoders, **options) -> list[dict]:
    """What webdataset reads of a tar, without a word."""
    with warnings.catch_warnings():
        # It leaves its files open.
        warnings.simplefilter("ignore", ResourceWarning)
        read = webdataset.WebDataset(source if isinstance(source, list) else str(source), shardshuffle=False, **options)
        return list(read.decode(*decoders) if decoders else read)


def raw_keys(source: Path) -> list[str]:
    return [item["__key__"] for item in raw(source)]


def shown_by_pillow(data: bytes) -> np.ndarray:
    """What most loaders do: open, convert to RGB."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


# ---- members


def headers(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def shard(folder: Path, data: bytes) -> Path:
    path = folder / "bad-shard.tar"
    path.write_bytes(data)
    return path


def special_member(kind: bytes) -> bytes:
    """A tar whose second sample's JSON is no file but a link, FIFO ..."""
    first, second = (list(raw_members(number, {}).items()) for number in range(2))
    buffer = io.BytesIO(tar_bytes(first + second[:-1]))
    with tarfile.open(fileobj=buffer, mode="a", format=tarfile.USTAR_FORMAT) as tar:
        header = tarfile.TarInfo(second[-1][0])
        header.type, header.linkname = kind, "000000.json"
        tar.addfile(header)
    return buffer.getvalue()


# ---- disks


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """A small disk of its own in a folder; False where this process may not mount any."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    is_there = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0  # noqa: S603
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder that nobody can write into, root neither; where root may not mount, a file stands in its place."""
    with mounted(folder, "ro") as is_there:
        if not is_there:
            folder.chmod(0o555)
        if not is_there and os.access(folder, os.W_OK):
            folder.rmdir()
            folder.touch()
        yield folder
