"""Shards in remote storage: fetched whole into a folder on this machine, checked, kept while there is room.

Only what the manifest names is fetched, and a shard is used only when its size and SHA-256 are those of the manifest.
Addresses begin with one of :data:`SCHEMES`; nothing is ever run (``pipe:``) or unpacked (``zip://...::``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec.core
from tqdm import tqdm

from realign_lightning.data.manifest import INDEX_NAME, ShardIndex, ShardInfo, check_shard, parse_index
from realign_lightning.data.scan import ShardError

log = logging.getLogger(__name__)

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""What the address of a folder of shards may begin with."""

MAX_INDEX_BYTES = 1 << 30
"""A larger ``index.json`` is refused."""

_CHUNK = 1 << 22
_ANSWERS_WITHIN = 60
"""Seconds without a byte after which a connection counts as broken."""

_SIZE_THREADS = 16

_KEPT = re.compile(r"[0-9a-f]{64}\.tar")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.\d+\.partial")

Result = TypeVar("Result")


def is_remote(source: str) -> bool:
    """Whether a source is an address rather than a path.

    Args:
        source: as a user gave it.

    Raises:
        ShardError: for an address that is not allowed, a pipe, or several chained (``::``).
    """
    if source.startswith("pipe:") or "::" in source:
        raise ShardError(f"shard source {source!r} is a pipe or a chain; expected a path, or the address of a folder")
    if "://" not in source:
        return False
    address = urlsplit(source)
    if address.scheme not in SCHEMES:
        raise ShardError(f"shard source {source!r}: expected a path, or an address that begins with one of {SCHEMES}")
    if "@" in address.netloc or address.query or address.fragment:
        raise ShardError(
            f"the address of a folder of shards at {address.hostname} holds a user, '?' or '#'; give the plain "
            "address, and credentials by the environment, as its storage library reads them"
        )
    return True


class RemoteFolder:
    """A folder of shards in remote storage.

    Args:
        address: for example ``s3://bucket/pairs/train``.
        attempts: how often something is fetched before giving up.
        pause: seconds before the second attempt; doubled each time.
    """

    def __init__(self, address: str, attempts: int = 5, pause: float = 1.0) -> None:
        self.address = address.rstrip("/")
        self.attempts = attempts
        self.pause = pause

    def read_index(self) -> ShardIndex:
        """Fetch and read the ``index.json``.

        Raises:
            ShardError: if it cannot be fetched or is damaged.
        """
        where = f"{self.address}/{INDEX_NAME}"
        data = self._try(INDEX_NAME, lambda: self._read(INDEX_NAME))
        return parse_index(data, where)

    def check_sizes(self, shards: Sequence[ShardInfo]) -> None:
        """Ask the storage for the size of each shard, so that one that is missing or cut is found before training.

        Args:
            shards: from the index.

        Raises:
            ShardError: if one is missing, or its size is not the index's.
        """
        with ThreadPoolExecutor(_SIZE_THREADS) as pool:
            sizes = pool.map(lambda shard: self._try(shard.name, lambda: self._size(shard.name)), shards)
            bar = tqdm(sizes, desc="asking for shards", total=len(shards), unit="shard", delay=2, leave=False)
            for shard, size in zip(shards, bar, strict=True):
                if size is not None and size != shard.bytes:
                    raise ShardError(
                        f"shard {self.address}/{shard.name} has {size} bytes, its index says {shard.bytes}; upload it "
                        "again"
                    )

    def fetch(self, shard: ShardInfo, target: Path) -> None:
        """Fetch a shard into a file, and check it.

        Args:
            shard: from the index.
            target: written anew in each attempt.

        Raises:
            ShardError: if it cannot be fetched whole.
        """
        self._try(shard.name, lambda: self._fetch(shard, target))

    def _try(self, name: str, action: Callable[[], Result]) -> Result:
        """Do something, again after a failure that may pass."""
        where = f"{self.address}/{name}"
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except ImportError as error:
                raise ShardError(
                    f"{where} needs a package that is not installed ({error}): pip install realign-lightning[remote]"
                ) from error
            # Storage libraries raise errors of their own; what comes of one is a later attempt, or the error below.
            except Exception as error:
                if _is_missing(error):
                    raise ShardError(f"{where} does not exist") from error
                if _is_forbidden(error):
                    raise ShardError(f"{where} may not be read: {error}; look at your credentials") from error
                reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
                if attempt == self.attempts or isinstance(error, _LocalError):
                    raise ShardError(f"{where} could not be fetched ({attempt} attempts; last: {reason})") from error
                wait = self.pause * 2 ** (attempt - 1)
                if not threading.main_thread().is_alive():
                    raise ShardError(f"{where} is not needed any more") from error
                count = f"attempt {attempt} of {self.attempts}"
                log.warning("%s: %s failed (%s); again in %g s", where, count, reason, wait)
                time.sleep(wait)
        raise AssertionError("attempts is at least 1")

    def _file(self, name: str) -> tuple[Any, str]:
        """The storage and a file's path in it; made anew, as storages must not be used after a fork."""
        storage, path = fsspec.core.url_to_fs(f"{self.address}/{name}", **_options(self.address))
        return storage, path

    def _size(self, name: str) -> int | None:
        storage, path = self._file(name)
        size = storage.info(path).get("size")
        return None if size is None else int(size)

    def _read(self, name: str) -> bytes:
        storage, path = self._file(name)
        with storage.open(path, "rb") as file:
            data: bytes = file.read(MAX_INDEX_BYTES + 1)
        if len(data) > MAX_INDEX_BYTES:
            raise _LocalError(f"more than {MAX_INDEX_BYTES} bytes")
        return data

    def _fetch(self, shard: ShardInfo, target: Path) -> None:
        digest, size = hashlib.sha256(), 0
        storage, path = self._file(shard.name)
        # Over HTTP as one stream: not every server gives parts.
        block_size = 0 if self.address.startswith("http") else _CHUNK
        with storage.open(path, "rb", block_size=block_size) as file, _written(target) as copy:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if size > shard.bytes:
                    raise ValueError(f"more bytes came than the {shard.bytes} of its index")
                digest.update(chunk)
                with _local(target):
                    copy.write(chunk)
        if size < shard.bytes:
            raise ValueError(f"only {size} of {shard.bytes} bytes came")
        if digest.hexdigest() != shard.sha256:
            raise ValueError("what came differs from its index in SHA-256: upload shard and index again")


def _is_missing(error: Exception) -> bool:
    """Whether a storage says that there is no such file; over HTTP other failures bear the same name."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) == 404)


def _is_forbidden(error: Exception) -> bool:
    statuses = {getattr(one, "status", None) for one in (error, error.__cause__)}
    return isinstance(error, PermissionError) or bool(statuses & {401, 403})


class _LocalError(RuntimeError):
    """No further attempt will help."""


@contextlib.contextmanager
def _local(target: Path) -> Iterator[None]:
    """Errors of writing are this machine's, and no reason to fetch again."""
    try:
        yield
    except OSError as error:
        raise _LocalError(f"cannot write {target}: {error}") from error


@contextlib.contextmanager
def _written(target: Path) -> Iterator[Any]:
    with _local(target):
        file = target.open("wb")
    with file:
        yield file
        with _local(target):
            file.flush()
            os.fsync(file.fileno())


def _options(address: str) -> dict[str, Any]:
    if not address.startswith("http"):
        return {}
    # By default aiohttp gives up whatever takes longer than five minutes in all.
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=_ANSWERS_WITHIN, sock_read=_ANSWERS_WITHIN)
    return {"client_kwargs": {"timeout": timeout}}


class ShardCache:
    """Shards fetched from remote storage, in a folder of this machine, of limited size.

    All processes of the machine may share the folder: a shard is fetched by one of them while the others wait. Files
    are named by their SHA-256. When room is needed, those go that were not opened for the longest time.

    Args:
        folder: they are kept in ``shards`` in it; made when the first one comes.
        max_bytes: of all shards together; more only while several processes fetch at once and nothing else can go. A
            file that is still read when it goes leaves the disk when it is closed.

    Raises:
        ValueError: if ``max_bytes`` is below 1.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.folder = Path(folder)
        self._shards = self.folder / "shards"
        self.max_bytes = max_bytes
        self._wanted: queue.SimpleQueue[tuple[RemoteFolder, ShardInfo]] | None = None
        self._owner = 0

    def check(self) -> None:
        """Make sure, before anything is fetched, that the folder can be written.

        Raises:
            ShardError: if it cannot.
        """
        with self._lock("room"):
            pass

    def path(self, source: RemoteFolder, shard: ShardInfo) -> Path:
        """The shard on this machine, fetched if it is not there.

        Args:
            source: where it comes from.
            shard: from the index.

        Raises:
            ShardError: if it cannot be fetched, or there is no room for it.
        """
        found = self._found(shard)
        if found is None:
            with self._lock(shard.sha256):
                found = self._found(shard) or self._fetch(source, shard)
        return found

    def prefetch(self, source: RemoteFolder, shard: ShardInfo) -> None:
        """Fetch a shard in the background, unless it is there or another process fetches it already.

        A failure is not told here: whoever needs the shard meets it again.

        Args:
            source: where it comes from.
            shard: from the index.
        """
        if self._found(shard) is not None:
            return
        if self._wanted is None or self._owner != os.getpid():
            # Threads do not survive a fork.
            self._wanted, self._owner = queue.SimpleQueue(), os.getpid()
            threading.Thread(target=self._work, args=(self._wanted,), daemon=True, name="shard-prefetch").start()
        self._wanted.put((source, shard))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wanted": None}

    def _work(self, wanted: queue.SimpleQueue[tuple[RemoteFolder, ShardInfo]]) -> None:
        while True:
            source, shard = wanted.get()
            try:
                with self._lock(shard.sha256, wait=False) as is_ours:
                    if is_ours and self._found(shard) is None:
                        self._fetch(source, shard)
            except (ShardError, OSError) as error:
                if not threading.main_thread().is_alive():
                    return
                log.warning("not fetched in advance: %s", error)

    def check_kept(self, shards: Sequence[ShardInfo], hash_file: Callable[[Path], str]) -> None:
        """Remove what is damaged among kept shards, so that it is fetched again.

        Args:
            shards: those that will be read.
            hash_file: SHA-256 of a file; one that remembers saves reading those that have not changed.
        """
        for shard in shards:
            path = self._place(shard)
            if path.is_file() and hash_file(path) != shard.sha256:
                log.warning("%s is damaged, and will be fetched again", path)
                path.unlink(missing_ok=True)

    def _place(self, shard: ShardInfo) -> Path:
        return self._shards / f"{shard.sha256}.tar"

    def _found(self, shard: ShardInfo) -> Path | None:
        path = self._place(shard)
        try:
            if path.stat().st_size != shard.bytes:
                return None
            # Its time tells others that the shard is in use; that of the shard itself tells whether it was changed.
            self._lock_file(shard.sha256).touch()
        except FileNotFoundError:
            return None
        return path

    def _fetch(self, source: RemoteFolder, shard: ShardInfo) -> Path:
        partial = self._shards / f".{shard.sha256}.{shard.bytes}.partial"
        target = self._place(shard)
        try:
            partial.unlink(missing_ok=True)
            with self._lock("room"):
                self._make_room(shard.bytes)
                partial.touch()
            source.fetch(shard, partial)
            check_shard(partial, shard, hash_file=lambda _: shard.sha256)
            partial.replace(target)
        except OSError as error:
            raise ShardError(f"shard {source.address}/{shard.name} cannot be kept as {target}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _make_room(self, size: int) -> None:
        """Remove what was not used for the longest time."""
        coming = [path for path in self._shards.iterdir() if _PARTIAL.fullmatch(path.name) and self._is_coming(path)]
        there = {path: path.stat().st_size for path in self._shards.iterdir() if _KEPT.fullmatch(path.name)}
        oldest_last = sorted(there, key=lambda path: self._last_use(path), reverse=True)
        reserved = sum(int(path.name.split(".")[2]) for path in coming)
        while oldest_last and sum(there.values()) + reserved + size > self.max_bytes:
            oldest = oldest_last.pop()
            del there[oldest]
            oldest.unlink(missing_ok=True)
        free = shutil.disk_usage(self._shards).free
        if free < size:
            raise ShardError(
                f"{self._shards} has {free} bytes of free disk, and a shard of {size} comes: make room, lower "
                "cache_size_gb, or set cache_dir to another disk"
            )

    def _last_use(self, path: Path) -> int:
        lock = self._lock_file(path.stem)
        return lock.stat().st_mtime_ns if lock.exists() else 0

    def _lock_file(self, name: str) -> Path:
        return self._shards / f"{name}.lock"

    def _is_coming(self, partial: Path) -> bool:
        """Whether somebody is fetching it; what a killed process left is removed."""
        with self._lock(partial.name.split(".")[1], wait=False) as is_free:
            if is_free:
                partial.unlink(missing_ok=True)
            return not is_free

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock among all threads and processes of the machine; False if another has it and we do not wait."""
        try:
            self._shards.mkdir(parents=True, exist_ok=True)
            file = self._lock_file(name).open("ab")
        except OSError as error:
            raise ShardError(
                f"the folder for fetched shards {self.folder} cannot be written ({error}): set cache_dir to another"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise ShardError(
                    f"the folder for fetched shards {self.folder} takes no locks ({error}): set cache_dir to another"
                ) from error
            try:
                yield True
            finally:
                # A process that was forked meanwhile would hold on to it.
                fcntl.flock(file, fcntl.LOCK_UN)
