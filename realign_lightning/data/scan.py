"""Find local shards and scan them strictly, so that damage is an error before training and never a shorter epoch.

``tarfile`` and ``webdataset`` end quietly at a cut or a broken header and take whatever members they meet. Here a shard
must be complete up to its end-of-archive marker and hold the contract's members only, those of one sample side by side.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from realign_lightning.data.schema import missing_parts, split_member_name

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a tar's blocks: a header is one, contents are filled up to whole ones."""

_CHUNK = 1 << 20


class ShardError(ValueError):
    """A set of shards is missing, damaged or not ours; the message names the shard and says what to do."""


class Member(NamedTuple):
    """One file inside a shard.

    Args:
        name: name in the tar.
        offset: where its content begins, bytes from the start of the shard.
        size: length of its content in bytes.
    """

    name: str
    offset: int
    size: int


class StoredSample(NamedTuple):
    """Where one sample stands.

    Args:
        shard: path of the tar.
        key: the sample's key.
        members: its members, in the order of the tar.
    """

    shard: Path
    key: str
    members: tuple[Member, ...]

    @property
    def missing(self) -> list[str]:
        """Which of image, retrieved and json are absent."""
        return missing_parts({split_member_name(member.name)[1]: member for member in self.members})

    def read(self) -> dict[str, bytes]:
        """Contents by member name.

        Raises:
            ShardError: if the shard has become shorter since it was scanned.
        """
        contents = {}
        with self.shard.open("rb") as file:
            for member in self.members:
                file.seek(member.offset)
                contents[member.name] = file.read(member.size)
                if len(contents[member.name]) != member.size:
                    raise ShardError(f"shard {self.shard} has changed while it was in use: {member.name} is cut")
        return contents


def find_shards(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Local tar files behind explicit paths and glob patterns, in the order given; a glob's are sorted.

    Args:
        source: path of a tar, a pattern with ``*``, ``?`` or ``[...]``, or a list of them.

    Returns:
        The tar files.

    Raises:
        ShardError: if there is none, one is missing or named twice, or a name is a URL, a pipe or a brace range.
    """
    items = [source] if isinstance(source, str | Path) else list(source)
    shards = [shard for item in items for shard in _expand(str(item))]
    if not shards:
        raise ShardError(f"no shards: expected tar files or patterns that match some, got {source!r}")
    seen: set[Path] = set()
    for shard in shards:
        if shard.resolve() in seen:
            raise ShardError(f"shard {shard} is named twice; its samples would count twice")
        seen.add(shard.resolve())
    return shards


def scan_shard(path: Path) -> list[StoredSample]:
    """List the samples of a tar by reading its headers, without reading the contents.

    Args:
        path: the tar file, uncompressed.

    Returns:
        Its samples in order; some may lack a member (:attr:`StoredSample.missing`).

    Raises:
        ShardError: if the tar is empty, cut, damaged or no tar; if a member is no regular file, bears another name
            than the contract's or occurs twice; if the members of one sample are not side by side.
    """
    size = path.stat().st_size
    if size == 0:
        raise ShardError(f"shard {path} is empty (0 bytes); write or copy it again")
    try:
        # "r:" never decompresses, so that offsets are offsets into the file.
        with tarfile.open(path, "r:") as tar:
            headers = [_check_member(path, header) for header in tar]
    except ShardError:
        raise
    # Numbers and records in headers that tarfile cannot read fail as they come.
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise ShardError(f"shard {path} is not a whole uncompressed tar ({error}); write or copy it again") from error
    if not headers:
        raise ShardError(f"shard {path} holds no samples; remove it or write it again")
    check_end(path, headers[-1], size)
    _check_headers(path, headers)
    return list(_group(path, headers))


def _expand(item: str) -> list[Path]:
    if item.startswith("pipe:") or "://" in item:
        raise ShardError(f"shard {item!r} is a URL or a pipe; only local files are read, download it first")
    if Path(item).exists() or not glob.has_magic(item):
        return [_regular_file(item)]
    # Path.glob would also take hidden files, such as what an interrupted download leaves.
    matches = [_regular_file(match) for match in sorted(glob.glob(item))]  # noqa: PTH207
    if not matches:
        raise ShardError(f"the pattern {item!r} matches no file")
    return matches


def _regular_file(item: str) -> Path:
    path = Path(item)
    if not path.exists():
        hint = "; brace ranges are not expanded, use a pattern with *" if "{" in item else ""
        raise ShardError(f"shard {item} does not exist{hint}")
    if not path.is_file():
        raise ShardError(f"shard {item} is not a regular file")
    return path


def _check_member(path: Path, header: tarfile.TarInfo) -> Member:
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.issparse():
        raise ShardError(f"shard {path}: member {header.name!r} is a link, folder or device, not a regular file")
    try:
        split_member_name(header.name)
    except ValueError as error:
        raise ShardError(f"shard {path}: {error}") from error
    return Member(header.name, header.offset_data, header.size)


def check_end(path: Path, last: Member, size: int) -> None:
    """Check that after the last member that tarfile found exactly the zero blocks of an intact tar follow, two or more.

    Args:
        path: of the tar.
        last: its last member.
        size: of the file in bytes.

    Raises:
        ShardError: if the tar is cut or damaged there.
    """
    end = last.offset + -(-last.size // BLOCK) * BLOCK
    if size - end < 2 * BLOCK:
        raise ShardError(f"shard {path} is cut: it ends without an end-of-archive marker after member {last.name!r}")
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(_CHUNK):
            if any(chunk):
                raise ShardError(f"shard {path} is damaged: unreadable data follows member {last.name!r}")


def _check_headers(path: Path, members: Iterable[Member]) -> None:
    """Make sure that the block before each content names it, as is checked again whenever a sample is read."""
    with path.open("rb") as file:
        for member in members:
            file.seek(member.offset - BLOCK)
            if name_and_size(file.read(BLOCK)) != (member.name, member.size):
                raise ShardError(
                    f"shard {path}: the header of member {member.name!r} does not name it itself but by an extension; "
                    "write the tar in plain (ustar) form"
                )


def name_and_size(header: bytes) -> tuple[str, int]:
    """What a plain tar header says of its member; nothing where it is none.

    Args:
        header: the block before the member's content.
    """
    name, size = header[:100].partition(b"\0")[0], header[124:136].strip(b" \0")
    try:
        return name.decode("ascii"), int(size, 8)
    except ValueError:
        return "", -1


def _group(path: Path, members: Iterable[Member]) -> Iterator[StoredSample]:
    """Join neighbouring members of one key to samples."""
    keys: set[str] = set()
    key, found = "", dict[str, Member]()
    for member in members:
        member_key, part = split_member_name(member.name)
        if member_key != key:
            if found:
                yield StoredSample(path, key, tuple(found.values()))
            if member_key in keys:
                raise ShardError(
                    f"shard {path}: the members of key {member_key!r} are not side by side: "
                    "a duplicate key or samples that are interleaved"
                )
            keys.add(member_key)
            key, found = member_key, {}
        role = part.split(".")[0]
        if role in found:
            raise ShardError(f"shard {path}: duplicate key {key!r}: {found[role].name!r} and then {member.name!r}")
        found[role] = member
    yield StoredSample(path, key, tuple(found.values()))
