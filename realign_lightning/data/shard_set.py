"""A set of shards, local or remote: found, checked against their manifest, and read at random."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from realign_lightning.backbones.files import FileHasher
from realign_lightning.data.manifest import INDEX_NAME, ShardInfo, check_keys, check_shard, read_index
from realign_lightning.data.remote import RemoteFolder, ShardCache, is_remote
from realign_lightning.data.scan import BLOCK, Member, ShardError, StoredSample, find_shards, name_and_size, scan_shard
from realign_lightning.data.table import SampleTable
from realign_lightning.types import SampleError, SkippedSample

log = logging.getLogger(__name__)

Source = str | Path | Sequence[str | Path]
"""Where shards are: a folder with an index (a path, or an address such as ``s3://bucket/pairs``), a tar file, a pattern
such as ``shards/*.tar``, or a list of these."""

CACHE_VARIABLE = "REALIGN_CACHE"
"""Environment variable that names the folder for fetched shards and for what is known of checked ones."""

MAX_SAMPLE_BYTES = 1 << 29
"""A stored sample with more bytes counts as bad."""

_OPEN_FILES = 16
_CHECKED = "checked_shards.json"


def cache_folder() -> Path:
    """``$REALIGN_CACHE``, or ``realign-lightning`` in the user's folder for caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base, "realign-lightning"))


@dataclass(frozen=True)
class Shard:
    """One shard of a set.

    Args:
        place: its path or address.
        table: its samples.
        identity: stands for its content: its SHA-256, or without an index a digest of names, places and sizes.
        size: its size in bytes.
        info: its entry in the index, if there is one.
        source: where it is fetched from; None for a local file.
    """

    place: str
    table: SampleTable
    identity: str
    size: int
    info: ShardInfo | None = None
    source: RemoteFolder | None = None

    @property
    def name(self) -> str:
        """Its file name."""
        return self.place.rpartition("/")[2]


class ShardSet:
    """The samples of a source, in the order of its shards; those that lack a member are left out and named.

    Local shards are checked against their index, or scanned where there is none. Of remote ones the index is fetched
    and their sizes are asked for; each is checked when it is fetched.

    Args:
        source: where the shards are.
        cache: where remote shards are kept, and in whose folder it is noted which local ones were checked and have not
            changed since; None checks all, and refuses remote ones.

    Raises:
        ShardError: if shards are missing, damaged or hold a key twice.
    """

    def __init__(self, source: Source, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self._hash_file = FileHasher(_memory(cache))
        self.shards = tuple(tqdm(self._shards(source), desc="checking shards", unit="shard", delay=2, leave=False))
        tables = [shard.table for shard in self.shards]
        check_keys([shard.place for shard in self.shards], tables)
        table = SampleTable.joined(tables)
        shard_of = np.repeat(np.arange(len(tables), dtype=np.int32), [len(one) for one in tables])
        complete = table.is_complete
        self.total = len(table)
        self.skipped = tuple(self._lacking(table, shard_of, row) for row in np.flatnonzero(~complete).tolist())
        self.table = table.take(complete)
        self.shard_of = shard_of[complete]
        self._files = _OpenFiles()

    def __len__(self) -> int:
        """Number of samples that have all their members."""
        return len(self.table)

    @property
    def counts(self) -> list[int]:
        """Number of samples that have all their members, by shard."""
        return [int(count) for count in np.bincount(self.shard_of, minlength=len(self.shards))]

    @property
    def is_remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(shard.source is not None for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """What the set holds, in which order, wherever it lies: SHA-256 over the shards' identities and their samples.

        Of a tar without an index these are the names, places and sizes of members, not their content.
        """
        facts = [(shard.identity, shard.table.digest) for shard in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def stored(self, row: int) -> StoredSample:
        """Where a sample stands.

        Args:
            row: 0 to ``len(self) - 1``.
        """
        shard = self.shards[self.shard_of[row]]
        path = Path(shard.name if shard.source else shard.place)
        return StoredSample(path, self.table.key(row), self.table.members(row))

    def read(self, row: int) -> dict[str, bytes]:
        """Contents of a sample by member name.

        Args:
            row: 0 to ``len(self) - 1``.

        Raises:
            ShardError: if the shard cannot be fetched, or holds other bytes than when it was checked.
            SampleError: if the sample is larger than :data:`MAX_SAMPLE_BYTES`.
        """
        number = int(self.shard_of[row])
        members = self.table.members(row)
        size = members[-1].offset + members[-1].size - members[0].offset
        if size > MAX_SAMPLE_BYTES:
            raise SampleError(f"its members take {size} bytes, more than the {MAX_SAMPLE_BYTES} that are allowed")
        file = self._files.get(number)
        if file is None:
            file = self._files.add(number, self._open(number))
        return _read_members(file, self.shards[number], members)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch shards that will be needed soon; of local ones there is nothing to do.

        Args:
            shards: their numbers.
        """
        for shard in (self.shards[number] for number in shards):
            if shard.source is not None and shard.info is not None and self.cache is not None:
                self.cache.prefetch(shard.source, shard.info)

    def check_room(self, blocks: Sequence[Sequence[int]]) -> None:
        """Make sure that the cache holds what is read at one time: a block of remote shards and the one after it.

        Args:
            blocks: numbers of shards, by block; any two blocks may follow each other.

        Raises:
            ShardError: if the cache is too small.
        """
        if self.cache is None:
            return
        fetched = {number: shard.size for number, shard in enumerate(self.shards) if shard.source is not None}
        needed = sum(sorted(sum(fetched.get(number, 0) for number in block) for block in blocks)[-2:])
        if needed > self.cache.max_bytes:
            raise ShardError(
                f"the shards that are read at one time have {needed / 1e9:.2f} GB, and the cache holds "
                f"{self.cache.max_bytes / 1e9:.2f} GB: raise cache_size_gb, or lower block_shards"
            )

    def _open(self, number: int) -> int:
        shard = self.shards[number]
        for _ in range(3):
            if shard.source is None or shard.info is None:
                path = Path(shard.place)
            else:
                assert self.cache is not None  # noqa: S101 - without one remote shards were refused
                path = self.cache.path(shard.source, shard.info)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                if shard.source is None:
                    raise ShardError(f"shard {shard.place} has gone since it was checked") from error
                # Another process has made room in the moment between.
        raise ShardError(f"shard {shard.place} leaves {path.parent} faster than it is read: raise cache_size_gb")

    # ---- finding and checking

    def _shards(self, source: Source) -> Iterator[Shard]:
        items = [str(source)] if isinstance(source, str | Path) else [str(item) for item in source]
        remote = [item for item in items if is_remote(item)]
        for item in remote:
            yield from self._remote(item)
        local = [item for item in items if item not in remote]
        # With nothing to look for it is told what is missing.
        for path, info in _locate(local) if local or not remote else []:
            yield self._local(path, info)

    def _remote(self, address: str) -> Iterator[Shard]:
        if self.cache is None:
            raise ShardError(f"shard source {address!r} is remote, and there is no cache to fetch it to")
        if address.endswith(".tar") or set(address) & set("*?[{"):
            raise ShardError(
                f"shard source {address!r}: expected the address of a folder with an {INDEX_NAME} (made by "
                "`realign-lightning index`), got that of a tar or a pattern"
            )
        self.cache.check()
        folder = RemoteFolder(address)
        infos = folder.read_index().shards
        self.cache.check_kept(infos, self._hash_file)
        folder.check_sizes(infos)
        for info in infos:
            if info.members is None:
                raise ShardError(
                    f"{address}/{INDEX_NAME} does not say where samples stand in {info.name}; make another by "
                    "`realign-lightning index --overwrite`"
                )
            yield Shard(f"{folder.address}/{info.name}", info.members, info.sha256, info.bytes, info, folder)

    def _local(self, path: Path, info: ShardInfo | None) -> Shard:
        if info is not None and info.members is not None:
            check_shard(path, info, hash_file=self._hash_file)
            return Shard(str(path), info.members, info.sha256, info.bytes, info)
        samples = scan_shard(path)
        table = SampleTable.of(samples)
        if info is not None:
            check_shard(path, info, len(samples), self._hash_file)
        return Shard(str(path), table, info.sha256 if info else f"scan:{table.digest}", path.stat().st_size, info)

    def _lacking(self, table: SampleTable, shard_of: np.ndarray, row: int) -> SkippedSample:
        shard = self.shards[shard_of[row]]
        stored = StoredSample(Path(shard.name), table.key(row), table.members(row))
        return SkippedSample(shard.name, stored.key, f"missing member {', '.join(stored.missing)}")


def _locate(items: Sequence[str]) -> list[tuple[Path, ShardInfo | None]]:
    """Local shards and what an index says of them, if there is one beside them."""
    paths: list[str | Path] = []
    for item in items:
        paths.extend(_indexed(Path(item)) if Path(item).is_dir() else [item])
    shards = find_shards(paths)
    known = {
        folder / info.name: info
        for folder in dict.fromkeys(shard.parent for shard in shards)
        if (folder / INDEX_NAME).exists()
        for info in read_index(folder).shards
    }
    return [(shard, known.get(shard)) for shard in shards]


def _indexed(folder: Path) -> list[Path]:
    shards = [folder / info.name for info in read_index(folder).shards]
    for shard in shards:
        if not shard.is_file():
            raise ShardError(f"shard {shard} is listed in {folder / INDEX_NAME} but missing; write or copy it again")
    if strangers := sorted(set(folder.glob("[!.]*.tar")) - set(shards)):
        raise ShardError(
            f"{strangers[0]} is not listed in {folder / INDEX_NAME}: remove it, name the shards to read one by one, or "
            "list all that are there by `realign-lightning index --overwrite`"
        )
    return shards


def _memory(cache: ShardCache | None) -> Path | None:
    """File that notes which shards were checked, where it can be written."""
    if cache is None:
        return None
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("Shards are read in full at every start, as what was checked cannot be noted in a file: %s", error)
        return None
    return cache.folder / _CHECKED if os.access(cache.folder, os.W_OK) else None


def _read_members(file: int, shard: Shard, members: Sequence[Member]) -> dict[str, bytes]:
    """Contents of members that stand side by side, read at once with their headers, which must name them."""
    begin = members[0].offset - BLOCK
    data = os.pread(file, members[-1].offset + members[-1].size - begin, begin)
    contents = {}
    for name, offset, size in members:
        start = offset - begin
        contents[name] = data[start : start + size]
        header = data[start - BLOCK : start]
        if len(contents[name]) != size or name_and_size(header) != (name, size):
            raise ShardError(
                f"shard {shard.place} does not hold {name} where its index says: it has changed since it was checked, "
                "or the index is wrong. Copy both again, or make another by `realign-lightning index --overwrite`"
            )
    return contents


class _OpenFiles:
    """The files read last, by number; each process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def get(self, number: int) -> int | None:
        if self._owner != os.getpid():
            # Of a fork: the parent goes on with its own.
            self._close_all()
            self._owner = os.getpid()
        file = self._files.get(number)
        if file is not None:
            self._files.move_to_end(number)
        return file

    def add(self, number: int, file: int) -> int:
        self._files[number] = file
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _close_all(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"_files": OrderedDict(), "_owner": -1}

    def __del__(self) -> None:
        self._close_all()
