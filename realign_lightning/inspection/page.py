"""Write an inspection page: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from realign_lightning.data.scan import ShardError, StoredSample
from realign_lightning.inspection.pairs import Pair, find_samples, read_pair, spread
from realign_lightning.types import SampleError, SkippedSample

_GENERATOR = '<meta name="generator" content="realign-lightning inspect">'
_THREADS = 4
_AT_ONCE = 32
"""Samples in work; only their thumbnails and texts are kept."""

_SKIPPED_SHOWN = 200


class PageReport(NamedTuple):
    """What a page shows.

    Args:
        pairs: shown on it.
        samples: found in the shards.
        skipped: samples that cannot be read, and shards, whose ``key`` is empty.
        bytes: size of the page.
    """

    pairs: int
    samples: int
    skipped: tuple[SkippedSample, ...]
    bytes: int


def write_page(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    limit: int = 2000,
    thumbnail: int = 384,
) -> PageReport:
    """Write a page with the pairs of shards. It appears when it is complete; an older page of ours is replaced.

    Samples are read one after another and spooled to disk, so that memory does not grow with them but for their names.
    An image that several pairs share is stored once.

    Args:
        source: a folder, a tar file, a pattern such as ``shards/*.tar``, or a list of these.
        output: the HTML file; its folder is made if it does not exist.
        limit: most pairs, spread evenly over all.
        thumbnail: longest side of the images on the page, in pixels.

    Returns:
        What the page shows.

    Raises:
        ValueError: if ``limit`` or ``thumbnail`` is out of range.
        FileExistsError: if ``output`` is there and is no such page.
        ShardError: if there are no shards, or not one pair can be read.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not 16 <= thumbnail <= 4096:
        raise ValueError(f"thumbnail must be 16 to 4096 pixels, got {thumbnail}")
    output = Path(output)
    _refuse_foreign(output)
    found = find_samples(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    skipped = list(found.damaged)
    shown = 0
    with tempfile.TemporaryFile(dir=output.parent) as records, tempfile.TemporaryFile(dir=output.parent) as pictures:
        written: set[str] = set()
        for item in _read(spread(found.samples, limit), thumbnail, written):
            if isinstance(item, SkippedSample):
                skipped.append(item)
                continue
            records.write((",\n" if shown else "").encode() + script_json(item.record).encode())
            shown += 1
            for name in [name for name in item.pictures if name not in written]:
                pictures.write(f'<script type="text/plain" id="i-{name}">{item.pictures[name]}</script>\n'.encode())
                written.add(name)
        if not shown:
            reason = skipped[0].reason if skipped else "the shards hold no samples"
            raise ShardError(f"not one pair of {source!r} can be read; first: {reason}")
        facts = _facts(source, shown, len(found.samples), skipped, found.built_with)
        size = _assemble(output, facts, records, pictures)
    return PageReport(shown, len(found.samples), tuple(skipped), size)


def _read(samples: Sequence[StoredSample], size: int, known: set[str]) -> Iterator[Pair | SkippedSample]:
    """Pairs in the order of ``samples``, a few of them decoded at once."""

    def read(stored: StoredSample) -> Pair | SkippedSample:
        try:
            return read_pair(stored, size, known)
        except (SampleError, ShardError) as error:
            return SkippedSample(stored.shard.name, stored.key, str(error))

    bar = tqdm(total=len(samples), desc="reading pairs", unit="pair", delay=2, leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, bar:
        for start in range(0, len(samples), _AT_ONCE):
            for item in pool.map(read, samples[start : start + _AT_ONCE]):
                bar.update()
                yield item


def _facts(
    source: str | Path | Sequence[str | Path],
    shown: int,
    samples: int,
    skipped: Sequence[SkippedSample],
    built_with: dict[str, Any],
) -> dict[str, Any]:
    sources = [source] if isinstance(source, str | Path) else source
    return {
        "sources": [str(item) for item in sources],
        "pairs": shown,
        "samples": samples,
        "skipped_shards": sum(not item.key for item in skipped),
        "skipped_samples": sum(bool(item.key) for item in skipped),
        "skipped": [[item.shard, item.key, item.reason] for item in skipped[:_SKIPPED_SHOWN]],
        "built_with": built_with,
    }


def _assemble(output: Path, facts: dict[str, Any], records: IO[bytes], pictures: IO[bytes]) -> int:
    """Put the parts together under a hidden name, and rename the file when it is complete; its size in bytes."""
    head, middle, tail = _template()
    partial = output.with_name(f".{output.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(f"{head}{script_json(facts)}{middle}[".encode())
            _append(file, records)
            before, after = tail.split("%PICTURES%")
            file.write(f"]{before}".encode())
            _append(file, pictures)
            file.write(after.encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _append(file: IO[bytes], part: IO[bytes]) -> None:
    part.seek(0)
    shutil.copyfileobj(part, file, 1 << 20)


def _template() -> tuple[str, str, str]:
    """The page around its data: before the facts, between facts and pairs, behind the pairs."""
    folder = files("realign_lightning.inspection") / "template"
    page, style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    page = with_sources(page.replace("%GENERATOR%", _GENERATOR), style, script)
    head, rest = page.split("%FACTS%")
    middle, tail = rest.split("%PAIRS%")
    return head, middle, tail


def with_sources(page: str, style: str, script: str) -> str:
    """A page with its style and script, and a policy that allows nothing else.

    Args:
        page: HTML with the marks ``%POLICY%``, ``%STYLE%`` and ``%SCRIPT%``, and no data yet.
        style: CSS.
        script: JavaScript.
    """
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'"
    )
    for mark, text in (("%POLICY%", policy), ("%STYLE%", style), ("%SCRIPT%", script)):
        page = page.replace(mark, text)
    return page


def _source_hash(text: str) -> str:
    """How a Content-Security-Policy names the one script or style that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def script_json(value: Any) -> str:
    """JSON in ASCII that no HTML parser takes for markup.

    Args:
        value: plain JSON values.

    Raises:
        ValueError: for values that JSON does not know.
    """
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _refuse_foreign(output: Path) -> None:
    """Refuse to replace a file that is not one of our pages."""
    if not output.exists():
        return
    if output.is_file():
        with output.open("rb") as file:
            if _GENERATOR.encode() in file.read(4096):
                return
    raise FileExistsError(f"{output} is there and is no inspection page; give another file as output")
