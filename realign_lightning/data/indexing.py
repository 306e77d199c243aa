"""``realign-lightning index``: a manifest for shards that other programs wrote."""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from realign_lightning.backbones.files import write_text
from realign_lightning.data.manifest import INDEX_NAME, SHARD_NAME, ShardIndex, check_keys, measure_shard
from realign_lightning.data.scan import ShardError, find_shards


def main(args: Sequence[str]) -> None:
    """Command line of :func:`index_shards`: says in a line what was found.

    Args:
        args: options of this command.

    Raises:
        ShardError: as :func:`index_shards`.
        FileExistsError: as :func:`index_shards`.
    """
    options = _parser().parse_args(args)
    began = time.perf_counter()
    path, index = index_shards(options.shards, options.overwrite)
    sys.stdout.write(_summary(path, index, time.perf_counter() - began))


def index_shards(source: str | Path | Sequence[str | Path], overwrite: bool = False) -> tuple[Path, ShardIndex]:
    """Scan shards, read each once for its SHA-256, and write an ``index.json`` beside them.

    Args:
        source: a folder with tar files, tar files, or a pattern in quotes; all in one folder.
        overwrite: replace an index that is there.

    Returns:
        Path and content of the index.

    Raises:
        ShardError: if there are no shards, they lie in several folders, one is damaged, or a key occurs twice.
        FileExistsError: if there is an index and ``overwrite`` is False.
    """
    items = [source] if isinstance(source, str | Path) else list(source)
    paths = find_shards([_tars(Path(item)) if Path(item).is_dir() else item for item in items])
    folders = sorted({path.parent for path in paths})
    if len(folders) > 1:
        named = ", ".join(map(str, folders))
        raise ShardError(f"an index lists shards of its own folder, got shards in {named}; index each folder alone")
    for path in paths:
        if not SHARD_NAME.fullmatch(path.name):
            raise ShardError(f"{path}: an index lists plain names of A-Z a-z 0-9 . _ - ending in .tar; rename it")
    target = folders[0] / INDEX_NAME
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; pass --overwrite to replace it")
    bar = tqdm(paths, desc="indexing", unit="shard", delay=1)
    shards = tuple(measure_shard(path) for path in bar)
    check_keys([shard.name for shard in shards], [shard.members for shard in shards if shard.members is not None])
    index = ShardIndex(shards, {"command": "index"})
    write_text(target, index.to_text())
    return target, index


def _tars(folder: Path) -> str:
    return str(Path(glob.escape(str(folder))) / "*.tar")


def _summary(path: Path, index: ShardIndex, seconds: float) -> str:
    samples, size = (sum(values) for values in zip(*((one.samples, one.bytes) for one in index.shards), strict=True))
    lacking = sum(int((~one.members.is_complete).sum()) for one in index.shards if one.members is not None)
    lines = [f"{path}: {len(index.shards)} shards, {samples:,} samples, {size / 1e9:.3f} GB in {seconds:.1f} s"]
    if lacking:
        lines.append(f"{lacking:,} samples lack a member: training skips and names them")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-lightning index",
        description="Write an index.json beside shards: size, SHA-256, samples, and where each member begins. With it "
        "they are found to be damaged before training, start at once, and can be read from remote storage.",
        allow_abbrev=False,
    )
    parser.add_argument("shards", nargs="+", help="folder with tar files, tar files, or a pattern in quotes")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    return parser
