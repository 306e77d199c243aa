"""The pairs of an inspection page: found in shards, read one by one, and reduced to what the page shows."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from realign_lightning.data.manifest import INDEX_NAME, read_index
from realign_lightning.data.scan import ShardError, StoredSample, find_shards, scan_shard
from realign_lightning.data.schema import decode_sample, split_member_name
from realign_lightning.inspection.differences import Range, differing, segments
from realign_lightning.types import PreferenceSample, Prompt, SkippedSample

_LOSSLESS_SIZE = 96
"""Thumbnails up to this many pixels on a side keep every pixel; larger ones are JPEG."""

_JPEG = {"format": "JPEG", "quality": 82, "optimize": True}


class Found(NamedTuple):
    """What was found in shards, before anything is decoded.

    Args:
        samples: where the samples stand, in order.
        damaged: shards that cannot be read at all; their ``key`` is empty.
        built_with: what each index says of how its shards were built, by folder.
    """

    samples: list[StoredSample]
    damaged: list[SkippedSample]
    built_with: dict[str, Any]


class Pair(NamedTuple):
    """A pair as a page shows it.

    Args:
        record: texts, scores and provenance, plain JSON values.
        pictures: thumbnails by name, as data URLs without their ``data:``.
    """

    record: dict[str, Any]
    pictures: dict[str, str]


def find_samples(source: str | Path | Sequence[str | Path]) -> Found:
    """Find the samples of shards; a shard that is damaged is named and left out, for this is how damage is looked at.

    Sizes and SHA-256 sums of an index are not compared.

    Args:
        source: a folder, a tar file, a pattern such as ``shards/*.tar``, or a list of these. In a folder without an
            index, such as an interrupted build leaves, every tar is read.

    Returns:
        The samples, the damaged shards, and how they were built.

    Raises:
        ShardError: if there are no shards, or an index is damaged.
    """
    items = [source] if isinstance(source, str | Path) else list(source)
    found = Found([], [], {})
    paths: list[str | Path] = []
    for item in items:
        folder = Path(item)
        if not folder.is_dir():
            paths.append(item)
        elif (folder / INDEX_NAME).is_file():
            index = read_index(folder)
            found.built_with[str(folder)] = dict(index.built_with)
            listed = [folder / shard.name for shard in index.shards]
            paths += [path for path in listed if path.is_file()]
            found.damaged.extend(
                SkippedSample(path.name, "", f"{path} is listed in {INDEX_NAME} but missing")
                for path in listed
                if not path.is_file()
            )
        elif tars := sorted(folder.glob("*.tar")):
            paths += tars
        else:
            raise ShardError(f"{folder} holds neither an {INDEX_NAME} nor tar files; give a folder of shards")
    # Where every shard of an index is missing, there is nothing to look for.
    for path in find_shards(paths) if paths or not found.damaged else []:
        try:
            found.samples.extend(scan_shard(path))
        except ShardError as error:
            found.damaged.append(SkippedSample(path.name, "", str(error)))
    return found


def spread(samples: Sequence[StoredSample], limit: int) -> list[StoredSample]:
    """At most ``limit`` samples, spread evenly over all.

    Args:
        samples: in order.
        limit: at least 1.

    Returns:
        The samples, in the same order.
    """
    count = min(limit, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def read_pair(stored: StoredSample, size: int, known: Container[str] = ()) -> Pair:
    """Read and decode a sample, and reduce it to what a page shows.

    Args:
        stored: where the sample stands.
        size: longest side of thumbnails, in pixels.
        known: names of thumbnails that are not needed again.

    Returns:
        The pair.

    Raises:
        SampleError: if the sample breaks the shard contract; the message says how.
        ShardError: if the shard has become shorter since it was scanned.
    """
    members = stored.read()
    sample = decode_sample(members)
    files = {split_member_name(name)[1].split(".")[0]: data for name, data in members.items()}
    images = {"image": sample.image, "retrieved": sample.retrieved}
    names = {part: hashlib.sha256(files[part]).hexdigest()[:20] for part in images}
    pictures = {name: thumbnail(images[part], size) for part, name in names.items() if name not in known}
    sides = {part: [*image.size] for part, image in images.items()}
    return Pair({"shard": stored.shard.name, **_texts(sample), **names, "sizes": sides}, pictures)


def _texts(sample: PreferenceSample) -> dict[str, Any]:
    chosen, rejected = differing(sample.chosen, sample.rejected)
    spans, problem = _spans(sample)
    return {
        "key": sample.key,
        "prompt": _turns(sample.prompt),
        "chosen": segments(sample.chosen, chosen, [span for span, _ in spans]),
        "rejected": segments(sample.rejected, rejected),
        "kinds": [kind for _, kind in spans],
        "problem": problem,
        "provenance": dict(sample.provenance),
    }


def _turns(prompt: Prompt) -> list[list[Any]]:
    """Role and parts of every turn; a part is a text, or an empty list for the place of the image."""
    if isinstance(prompt, str):
        return [["user", [prompt]]]
    return [[message["role"], _parts(message["content"])] for message in prompt]


def _parts(content: str | Sequence[Mapping[str, str]]) -> list[Any]:
    return [content] if isinstance(content, str) else [part.get("text", []) for part in content]


def _spans(sample: PreferenceSample) -> tuple[list[tuple[Range, str]], str]:
    """Masked spans of the chosen response with their kinds, and what is wrong with them, if anything is."""
    try:
        return [(Range(span.start, span.end), span.kind) for span in sample.masked_spans()], ""
    except ValueError as error:
        return [], f"Masked spans are not marked: {error}."


def thumbnail(image: Image.Image, size: int) -> str:
    """Media type and content of a small copy, the form in which ``data:`` URLs have them.

    Args:
        image: RGB.
        size: longest side in pixels.
    """
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    is_lossless = max(small.size) <= _LOSSLESS_SIZE
    file = io.BytesIO()
    small.save(file, **({"format": "PNG"} if is_lossless else _JPEG))
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f"image/{'png' if is_lossless else 'jpeg'};base64,{content}"
