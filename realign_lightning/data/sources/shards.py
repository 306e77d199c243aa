"""Shards: our own, and any WebDataset tar with an image and a text beside it."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realign_lightning.data.manifest import INDEX_NAME, ShardInfo, check_shard, read_index
from realign_lightning.data.scan import Member, ShardError, StoredSample, check_end, find_shards, scan_shard
from realign_lightning.data.schema import JSON_PART, load_json, split_member_name
from realign_lightning.data.sources.base import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import answer_text, read_prompt
from realign_lightning.data.sources.image_folder import DESCRIBE
from realign_lightning.data.sources.images import content_id
from realign_lightning.data.sources.table import Keys, checked, is_plain, row_facts
from realign_lightning.types import SampleError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("json", "txt")
_PROMPTS = ("prompt", "question")
_ANSWERS = ("chosen", "answer", "caption")
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError)
"""What tarfile raises on damaged headers; numbers and PAX records in them fail as they come."""


@dataclass(frozen=True)
class ShardImage(ImageFile):
    """An image in a tar, read when it is asked for.

    Args:
        image_id: see :class:`~realign_lightning.data.sources.ImageFile`; here from the content.
        path: of the tar.
        data: None.
        offset: where the file begins in the tar.
        size: its length in bytes.
    """

    offset: int = 0
    size: int = 0

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            SampleError: if the tar cannot be read, or has become shorter.
        """
        assert self.path is not None  # noqa: S101 - that is how it is made
        try:
            data = _read(self.path, Member("", self.offset, self.size))
        except OSError as error:
            raise SampleError(f"the shard {self.path} cannot be read: {error.strerror or error}") from error
        if len(data) != self.size:
            raise SampleError(f"the shard {self.path} has become shorter")
        return data


class Shards(Source):
    """Shards in the WebDataset form.

    Our own (``{key}.image.jpg``, ``{key}.retrieved.jpg``, ``{key}.json``; a folder with an index, whose checksums are
    compared) come out as whole pairs, with their provenance; those that lack a retrieved image or a rejected answer as
    what is there. Of other tars the samples are ``{key}.jpg`` (or png, webp) with ``{key}.json`` or ``{key}.txt``: the
    text is the answer; of the JSON the fields prompt or question, chosen, answer or caption, and rejected are taken.
    Members of other kinds are not looked at. Images are read once, to be named by their content, and again when they
    are needed.

    Args:
        path: a folder with an index or with tar files, a tar file, or a pattern such as ``data/*.tar``.
        prompt: asked where a sample has no prompt.
    """

    def __init__(self, path: str | Path, prompt: str = DESCRIBE) -> None:
        self.path = path
        self.prompt = prompt

    def read(self) -> Iterator[SourceRecord | SourceProblem]:
        """Every sample in order; see :meth:`Source.read`.

        Raises:
            ShardError: if a shard is missing, damaged, or differs from its index.
        """
        keys = Keys()
        for shard, info in _shards(Path(self.path)):
            own = is_own(shard)
            samples = scan_shard(shard) if own else _scan_other(shard)
            if info is not None:
                check_shard(shard, info, len(samples))
            for sample in samples:
                try:
                    record = checked(self._record(sample, own))
                    key = keys.take(sample.key)
                except SampleError as error:
                    yield SourceProblem(f"{shard.name}: {sample.key}", str(error))
                else:
                    yield replace(record, key=key)

    def _record(self, sample: StoredSample, own: bool) -> SourceRecord:
        members = {_role(member.name): member for member in sample.members}
        if len(members) < len(sample.members):
            raise SampleError(f"members compete for one place: {[member.name for member in sample.members]}")
        missing = [name for name in ("image", *([JSON_PART] if own else [])) if name not in members]
        if missing:
            raise SampleError(f"missing member {', '.join(missing)}")
        fields = _fields(sample, members)
        prompt = _first(fields, _PROMPTS)
        chosen, rejected = _first(fields, _ANSWERS), fields.get("rejected")
        retrieved = members.get("retrieved")
        return SourceRecord(
            key="",
            image=_image(sample.shard, members["image"]),
            prompt=read_prompt(self.prompt if prompt is None else prompt, "prompt", "text" if own else "place"),
            chosen=None if chosen is None else answer_text(chosen, "chosen"),
            rejected=None if rejected is None else answer_text(rejected, "rejected"),
            retrieved=None if retrieved is None else _image(sample.shard, retrieved),
            facts=_facts(fields, own),
        )


def is_own(shard: Path) -> bool:
    """Whether a tar has members named as our shards' images are.

    Args:
        shard: the tar; its first three members are looked at.

    Raises:
        ShardError: if it is no tar, or an empty one.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            names = [header.name for header in itertools.islice(tar, 3)]
    except _TAR_ERRORS as error:
        raise ShardError(f"shard {shard} is not a whole uncompressed tar ({error}); write or copy it again") from error
    if not names:
        raise ShardError(f"shard {shard} holds no samples; remove it or write it again")
    return any(_is_own_image(name) for name in names)


def _is_own_image(name: str) -> bool:
    try:
        return split_member_name(name)[1] != JSON_PART
    except ValueError:
        return False


def _shards(path: Path) -> list[tuple[Path, ShardInfo | None]]:
    if not path.is_dir():
        return [(shard, None) for shard in find_shards(path)]
    if (path / INDEX_NAME).is_file():
        return [(path / info.name, info) for info in read_index(path).shards]
    return [(shard, None) for shard in find_shards(str(path / "*.tar"))]


def _scan_other(shard: Path) -> list[StoredSample]:
    """Samples of a tar that is not our own: members side by side that share all before the first dot of their name."""
    samples: list[StoredSample] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            headers = list(tar)
    except _TAR_ERRORS as error:
        raise ShardError(f"shard {shard} is damaged ({error}); write or copy it again") from error
    last = headers[-1]
    check_end(shard, Member(last.name, last.offset_data, last.size), shard.stat().st_size)
    for header in headers:
        if header.issparse():
            # Its size is not that of what stands in the tar.
            raise ShardError(f"shard {shard}: member {header.name!r} is a sparse file; pack it again without")
        folder, slash, name = header.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not header.isreg() or not stem or ending.lower().rpartition(".")[2] not in (*_IMAGES, *_TEXTS):
            continue
        key, member = folder + slash + stem, Member(ending.lower(), header.offset_data, header.size)
        if samples and samples[-1].key == key:
            samples[-1] = samples[-1]._replace(members=(*samples[-1].members, member))
        else:
            samples.append(StoredSample(shard, key, (member,)))
    return samples


def _role(name: str) -> str:
    """What a member is for: image, retrieved, json or txt."""
    *first, ending = name.split(".")
    if ending in _TEXTS:
        return ending
    return "retrieved" if first[-1:] == ["retrieved"] else "image"


def _fields(sample: StoredSample, members: Mapping[str, Member]) -> dict[str, Any]:
    if "json" in members:
        try:
            fields = load_json(_read(sample.shard, members["json"]))
        except ValueError as error:
            raise SampleError(f"the JSON member cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise SampleError(f"the JSON member must be an object, got {type(fields).__name__}")
    else:
        fields = {}
    if "txt" in members and _first(fields, _ANSWERS) is None:
        try:
            fields["caption"] = _read(sample.shard, members["txt"]).decode().strip()
        except UnicodeDecodeError as error:
            raise SampleError(f"the text member is not UTF-8: {error}") from error
    return fields


def _facts(fields: Mapping[str, Any], own: bool) -> dict[str, Any]:
    used = {*_PROMPTS, *_ANSWERS, "rejected"}
    if not own or isinstance(fields.get("provenance"), str):
        return row_facts(fields, used)
    return {
        name: value
        for name, value in fields.items()
        if name not in ("prompt", "chosen", "rejected") and is_plain(value)
    }


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _image(shard: Path, member: Member) -> ShardImage:
    return ShardImage(content_id(_read(shard, member)), shard, None, member.offset, member.size)


def _read(shard: Path, member: Member) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
