"""The first stage: records are read, their images and texts checked, before any work is spent on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from realign_lightning.backbones.files import hash_bytes
from realign_lightning.data.schema import check_prompt, check_response, decode_image
from realign_lightning.data.sources.base import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.engines.memo import Memo, content_key, prompt_value
from realign_lightning.engines.policy import Policy
from realign_lightning.engines.threads import in_threads
from realign_lightning.preferences.pipeline.drafts import Draft, LeftOut, still_open
from realign_lightning.preferences.retrieve import content_hashes
from realign_lightning.ranks import gather, merge, rank_and_world_size, share
from realign_lightning.types import SampleError

_GROUP = 256
"""Images that are decoded, and texts that are encoded, before it is noted that they can be."""


@dataclass
class Album:
    """The images of a build.

    Args:
        files: by ``image_id``.
        contents: SHA-256 by ``image_id``, of those that can be decoded.
        pool: ids of images that can be retrieved.
        problems: what is wrong with the others, by ``image_id``.
    """

    files: dict[str, ImageFile] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    pool: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def retrievable(self) -> dict[str, str]:
        """SHA-256 by ``image_id`` of what can be retrieved, in order of id."""
        return {name: self.contents[name] for name in sorted(self.pool) if name in self.contents}


def read_drafts(source: Source, spill: Path, shows: bool = True) -> tuple[list[Draft], list[LeftOut]]:
    """Every record of a source; images that rows hold in memory are put into a folder.

    Args:
        source: rows.
        spill: the folder.
        shows: whether there is a progress bar.

    Returns:
        Drafts in the order of the source, and the rows that are none.
    """
    drafts: list[Draft] = []
    problems: list[LeftOut] = []
    keys: set[str] = set()
    for row in tqdm(source.read(), desc="read", unit="row", delay=1, disable=not shows):
        if isinstance(row, SourceProblem):
            problems.append(LeftOut(row.where, "row cannot be used", row.reason))
        elif row.key in keys:
            problems.append(LeftOut(row.key, "row cannot be used", "another record has the same key"))
        else:
            keys.add(row.key)
            drafts.append(Draft(_spilled(row, spill)))
    # What other ranks have spilled must be there.
    gather(None)
    return drafts, problems


def read_pool(source: Source, spill: Path) -> tuple[list[ImageFile], list[LeftOut]]:
    """The images of a source whose answers do not matter.

    Args:
        source: rows.
        spill: see :func:`read_drafts`.

    Returns:
        The images, their ids behind ``pool/``, and the rows that have none.
    """
    images: list[ImageFile] = []
    problems: list[LeftOut] = []
    for row in source.read():
        if isinstance(row, SourceProblem):
            problems.append(LeftOut(row.where, "row cannot be used", row.reason))
        else:
            # Two folders may have images of one name.
            images.append(replace(_spill(row.image, spill), image_id=f"pool/{row.image.image_id}"))
    gather(None)
    return images, problems


def _spilled(record: SourceRecord, spill: Path) -> SourceRecord:
    retrieved = None if record.retrieved is None else _spill(record.retrieved, spill)
    return replace(record, image=_spill(record.image, spill), retrieved=retrieved)


def _spill(image: ImageFile, folder: Path) -> ImageFile:
    """An image in memory as a file, which the rank writes whose turn it is."""
    if image.data is None:
        return image
    name = hash_bytes(image.data)
    path = folder / name[:2] / name
    rank, world_size = rank_and_world_size()
    # A file that lost its end with the machine's power is written again.
    is_whole = path.exists() and path.stat().st_size == len(image.data)
    if int(name[:8], 16) % world_size == rank and not is_whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.partial")
        partial.write_bytes(image.data)
        partial.replace(path)
    return ImageFile(image.image_id, path=path)


def check_images(
    drafts: Sequence[Draft], pool: Sequence[ImageFile], memo: Memo, hashes: Memo, shows: bool = True
) -> Album:
    """Identify and decode every image once, this rank its share; drafts whose images are broken are given up.

    Args:
        drafts: all of them.
        pool: further images that can be retrieved.
        memo: remembers what can be decoded.
        hashes: remembers the hashes of files.
        shows: whether there is a progress bar.

    Returns:
        The images that can be used.
    """
    album = Album()
    claims: dict[str, list[ImageFile]] = {}
    for image in _all_images(drafts, pool):
        seen = claims.setdefault(image.image_id, [])
        if image not in seen:
            seen.append(image)
    mine = [image for name in share(list(claims)) for image in claims[name]]
    contents, found = content_hashes(mine, hashes)
    problems = {problem.where: problem.reason for problem in found}
    problems |= _undecodable(mine, contents, memo, shows)
    album.problems = problems = merge(problems)
    album.contents = {name: content for name, content in merge(contents).items() if name not in problems}
    album.files = {name: images[0] for name, images in claims.items()}
    album.pool = {image.image_id for image in pool} | {draft.record.image.image_id for draft in drafts}
    for draft in drafts:
        own, given = draft.record.image.image_id, draft.record.retrieved
        if given is not None and album.contents.get(given.image_id, "") == album.contents.get(own):
            draft.leave_out("image cannot be used", f"{given.image_id}: the rejected image is the image itself")
        for name in (image.image_id for image in (draft.record.image, draft.record.retrieved) if image is not None):
            if name in problems and draft.left_out is None:
                draft.leave_out("image cannot be used", f"{name}: {problems[name]}")
    return album


def _all_images(drafts: Iterable[Draft], pool: Iterable[ImageFile]) -> Iterator[ImageFile]:
    for draft in drafts:
        yield draft.record.image
        if draft.record.retrieved is not None:
            yield draft.record.retrieved
    yield from pool


def _undecodable(
    images: Sequence[ImageFile], contents: Mapping[str, str], memo: Memo, shows: bool = True
) -> dict[str, str]:
    """What is wrong with images that cannot be decoded, by id; what could be once is not decoded again."""
    first = {content: image for image in reversed(images) if (content := contents.get(image.image_id))}
    todo = [content for content in first if content not in memo]
    groups = [todo[start : start + _GROUP] for start in range(0, len(todo), _GROUP)]
    broken: dict[str, str] = {}
    with tqdm(total=len(todo), desc="check images", unit="image", delay=1, disable=not shows) as bar:
        for group, results in in_threads(lambda content: _decoding_error(first[content]), groups):
            errors = dict(zip(group, results, strict=True))
            broken |= {content: error for content, error in errors.items() if error is not None}
            memo.add({content: True for content, error in errors.items() if error is None})
            bar.update(len(group))
    return {name: broken[content] for name, content in contents.items() if content in broken}


def _decoding_error(image: ImageFile) -> str | None:
    try:
        decode_image(image.read())
    except SampleError as error:
        return str(error)
    return None


def check_texts(drafts: Sequence[Draft], policy: Policy | None, memo: Memo, shows: bool = True) -> None:
    """Give up drafts whose texts no shard can hold or the policy cannot read; each rank looks at its share.

    Args:
        drafts: all of them.
        policy: reads prompts and responses; None reads nothing.
        memo: remembers what can be read.
        shows: whether there is a progress bar.
    """
    problems: dict[str, str] = {}
    known: dict[str, bool] = {}
    mine = share(list(still_open(drafts)))
    for draft in tqdm(mine, desc="check texts", unit="record", delay=2, disable=not shows):
        record = draft.record
        key = content_key(record.key, prompt_value(record.prompt), record.chosen, record.rejected)
        if key in memo:
            continue
        try:
            _check_texts(record, policy)
        except SampleError as error:
            problems[draft.key] = str(error)
        else:
            known[key] = True
        if len(known) == _GROUP:
            memo.add(known)
            known = {}
    memo.add(known)
    problems = merge(problems)
    for draft in drafts:
        if draft.left_out is None and draft.key in problems:
            draft.leave_out("text cannot be used", problems[draft.key])


def _check_texts(record: SourceRecord, policy: Policy | None) -> None:
    check_prompt(record.key, record.prompt)
    given = {name: text for name in ("chosen", "rejected") if (text := getattr(record, name)) is not None}
    for name, text in given.items():
        check_response(text, name)
    if len(given) == 2 and given["chosen"].strip() == given["rejected"].strip():
        raise SampleError("chosen is equal to rejected: nothing to prefer")
    if policy is not None:
        policy.backbone.response_tokenizer(record.prompt)(list(given.values()) or ["."])
