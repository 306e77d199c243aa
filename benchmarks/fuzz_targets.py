"""What is fuzzed, and what must hold of it: only the documented errors, and nothing changed or lost in silence.

What is accepted is compared with a second reading that shares no code with ours: tarfile, json, csv, Pillow.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz_mutations import CELLS, IMAGE, JSON, TAR, Mutation, _is_header
from realign_lightning.data import ShardDataset, ShardError, ShardWriter, scan_shard
from realign_lightning.data.convert import FORMATS, convert
from realign_lightning.data.schema import (
    MAX_ASPECT_RATIO,
    MAX_PIXELS,
    decode_image,
    decode_sample,
    encode_members,
    image_extension,
    image_size,
    parse_record,
    split_member_name,
)
from realign_lightning.data.sources import SourceProblem, SourceRecord, guess_layout, open_source
from realign_lightning.types import PreferenceSample, SampleError

ACCEPTED, REFUSED = "accepted", "refused"

_MAGIC = {"jpg": b"\xff\xd8", "png": b"\x89PNG", "webp": b"RIFF"}
_METADATA = re.compile("(?i)exif|metadata warning|malformed MPO|truncated file read|invalid APNG|skipping tag")
"""Warnings that say nothing of the pixels; a picture whose orientation cannot be read is shown as it is stored."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


class Finding(AssertionError):  # noqa: N818 - a result, not an error of the program
    """Something that must not happen; the message says what."""


@dataclass(frozen=True)
class Target:
    """A piece of code that takes bytes from elsewhere.

    Args:
        name: of the target.
        seeds: valid inputs.
        mutations: how they are damaged.
        run: feeds bytes to the code, in an empty folder, and says whether they were accepted or refused.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    mutations: Sequence[Mutation]
    run: Callable[[bytes, Path], str]


def expect(condition: object, message: str) -> None:
    """Raise unless a condition holds.

    Args:
        condition: what must hold.
        message: what it means if it does not.

    Raises:
        Finding: if it does not hold.
    """
    if not condition:
        raise Finding(message)


# ---- inputs


def picture(seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    """Noise, the same for the same seed.

    Args:
        seed: of the noise.
        size: width and height.
        mode: of the pixels.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the bytes of a file.

    Args:
        image: the image.
        kind: format, as Pillow calls it.
        options: of the format.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(number: int, **changes: Any) -> PreferenceSample:
    """A small sample.

    Args:
        number: gives its key and images.
        changes: fields that are to be different.
    """
    fields: dict[str, Any] = {
        "key": f"{number:06d}",
        "image": picture(2 * number),
        "retrieved": picture(2 * number + 1),
        "prompt": f"What is in picture {number}?",
        "chosen": f"A cat and {number} dogs.",
        "rejected": f"A bird and {number} dogs.",
        "provenance": {"image_id": number, "retrieval_score": 0.5, "masked": ["cat"]},
    }
    return PreferenceSample(**{**fields, **changes})


def tar_file(members: Sequence[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    """A tar in memory.

    Args:
        members: names and contents.
        tar_format: a constant of ``tarfile``.
        fields: of every header.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            for field, value in fields.items():
                setattr(header, field, value)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def _good_members(*numbers: int, image_format: Any = "png") -> list[tuple[str, bytes]]:
    return [pair for number in numbers for pair in encode_members(sample(number), image_format).items()]


_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
]


def _records() -> list[bytes]:
    facts = {"image_id": 1, "retrieved_id": "b", "retrieval_rank": 2, "response_similarity": 0.5, "masked": ["a"]}
    record = {"prompt": "What?", "chosen": "A \U0001f431 sits.", "rejected": "A dog.", **facts}
    return [json.dumps(record).encode(), json.dumps({**record, "prompt": _CHAT, "more": {"a": [1, 2]}}).encode()]


def _images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000)
    return [
        image_file(picture(0), "PNG"),
        image_file(picture(0, mode="P"), "PNG", transparency=3),
        image_file(picture(0, mode="LA"), "PNG"),
        image_file(wide, "PNG"),
        image_file(picture(0), "PNG", exif=exif),
        image_file(picture(0, (16, 16)), "JPEG"),
        image_file(picture(0, (16, 16)), "JPEG", progressive=True, exif=exif),
        image_file(picture(0, (16, 16), "CMYK"), "JPEG"),
        image_file(picture(0, (16, 16)), "MPO", save_all=True, append_images=[picture(1, (16, 16))]),
        image_file(picture(0), "WEBP", lossless=True),
        image_file(picture(0, mode="RGBA"), "WEBP", exif=exif),
        image_file(picture(0), "WEBP", save_all=True, append_images=[picture(1)]),
    ]


def _tars() -> list[bytes]:
    return [
        tar_file(_good_members(0, 1, 2)),
        tar_file(_good_members(0, 1, image_format="jpg"), tarfile.PAX_FORMAT, mtime=1.5),
        tar_file(_good_members(3, image_format="webp"), tarfile.GNU_FORMAT),
        tar_file(_good_members(0, 1)[:-1]),
    ]


def _other_tars() -> list[bytes]:
    data = json.dumps({"question": "What?", "chosen": "A cat.", "rejected": "A dog."}).encode()
    members = [("a/1.jpg", image_file(picture(0), "JPEG")), ("a/1.json", data), ("a/1.cls", b"3")]
    more = [("a/2.png", image_file(picture(1), "PNG")), ("a/2.txt", b"A caption.")]
    return [tar_file([*members, *more]), tar_file(_good_members(0, 1))]


# ---- JSON member


def run_record(data: bytes, _folder: Path) -> str:
    """Parse the JSON member of a sample; an accepted one must say what Python's parser says, and survive writing."""
    try:
        record = parse_record(data)
    except SampleError:
        return REFUSED
    pairs = json.loads(data, object_pairs_hook=_counted)
    expect(record == json.loads(data), "the record differs from what json reads")
    expect(pairs == _counted_again(record), "a name that occurs twice was accepted")
    fields = {name: record[name] for name in ("prompt", "chosen", "rejected")}
    facts = {name: value for name, value in record.items() if name not in fields}
    members = encode_members(sample(0, **fields, provenance=facts))
    expect(parse_record(members["000000.json"]) == record, "the record does not survive writing")
    return ACCEPTED


def _counted(pairs: list[tuple[str, Any]]) -> Any:
    return {"names": len(pairs), "values": sorted((name, str(value)) for name, value in pairs)}


def _counted_again(value: Any) -> Any:
    """A parsed value in the form that :func:`_counted` gives."""
    if isinstance(value, dict):
        return _counted([(name, _counted_again(item)) for name, item in value.items()])
    return [_counted_again(item) for item in value] if isinstance(value, list) else value


# ---- images


def run_image(data: bytes, _folder: Path) -> str:
    """Decode an image; an accepted one must look as Pillow shows it, and its header must tell the size."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = decode_image(data)
        except SampleError:
            _only_sample_errors(image_size, data)
            _only_sample_errors(image_extension, data)
            return REFUSED
    told = [str(one.message) for one in caught if not _METADATA.search(str(one.message))]
    expect(not told, f"accepted with the warning {told}")
    expect(image.mode == "RGB" and image.info == {}, "not a plain RGB picture")
    expect(image.width * image.height <= MAX_PIXELS, "more pixels than are allowed")
    expect(max(image.size) <= MAX_ASPECT_RATIO * min(image.size), "more elongated than is allowed")
    expect(data.startswith(_MAGIC[image_extension(data)]), "the content is of another format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _compare_with_pillow(data, image)
    return ACCEPTED


def _only_sample_errors(function: Callable[[bytes], Any], data: bytes) -> None:
    with contextlib.suppress(SampleError):
        function(data)


def _compare_with_pillow(data: bytes, image: Image.Image) -> None:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        oriented = opened.getexif().get(0x0112, 1) != 1
        trailing = opened.format == "PNG" and b"eXIf" in data.partition(b"IDAT")[2]
        if not trailing:
            expect(image_size(data) == image.size, f"the header says {image_size(data)}, the picture has {image.size}")
        if opened.mode in ("RGB", "L", "CMYK") and not oriented and not opened.has_transparency_data:
            expect(opened.convert("RGB").tobytes() == image.tobytes(), "the picture differs from Pillow's")
        expect(sorted(opened.size) == sorted(image.size), "the picture has another size than Pillow's")


# ---- shards


def run_shard(data: bytes, folder: Path) -> str:
    """Read a tar without an index; an accepted one must hold what ``tarfile`` finds, all of it."""
    path = folder / "fuzz.tar"
    path.write_bytes(data)
    try:
        stored = scan_shard(path)
    except ShardError as error:
        expect(path.name in str(error), f"the error does not name the shard: {error}")
        return REFUSED
    contents = [(name, body) for one in stored for name, body in one.read().items()]
    expect(contents == _tar_contents(data), "the members differ from those that tarfile finds")
    _expect_no_lost_header(data, stored)
    for one in stored:
        _check_sample(one.read())
    _check_dataset(path, [one.key for one in stored])
    return ACCEPTED


def _tar_contents(data: bytes) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True, errorlevel=2) as tar:
        for header in tar:
            file = tar.extractfile(header)
            found.append((header.name, b"" if file is None else file.read()))
    return found


def _expect_no_lost_header(data: bytes, stored: Sequence[Any]) -> None:
    """No block outside of the contents may be the header of a member of ours that was passed over without a word."""
    told = {one.key for one in stored if one.missing}
    inside: set[int] = set()
    for member in (member for one in stored for member in one.members):
        inside.update(range(member.offset // 512, -(-(member.offset + member.size) // 512)))
        inside.add(member.offset // 512 - 1)
    for block in range(len(data) // 512):
        if block not in inside and _is_header(data[512 * block : 512 * block + 512]):
            header = tarfile.TarInfo.frombuf(data[512 * block : 512 * block + 512], "utf-8", "surrogateescape")
            # A header of another type is about the next one, whatever its name.
            is_lost = header.isreg() and _is_member(header.name) and header.name.partition(".")[0] not in told
            expect(not is_lost, f"the header of {header.name} was passed over")


def _is_member(name: str) -> bool:
    try:
        split_member_name(name)
    except ValueError:
        return False
    return True


def _check_sample(members: Mapping[str, bytes]) -> None:
    try:
        decoded = decode_sample(members)
    except SampleError:
        return
    (text,) = (body for name, body in members.items() if name.endswith(".json"))
    record = json.loads(text)
    fields = {"prompt": decoded.prompt, "chosen": decoded.chosen, "rejected": decoded.rejected, **decoded.provenance}
    expect(fields == record, "the sample differs from its JSON")
    for part, image in (("image", decoded.image), ("retrieved", decoded.retrieved)):
        (body,) = (body for name, body in members.items() if f".{part}." in name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _compare_with_pillow(body, image)


def _check_dataset(path: Path, keys: list[str]) -> None:
    """Every sample of a shard is there, or skipped by name."""
    from tests.data.helpers import WordBackbone

    try:
        dataset = ShardDataset(path, WordBackbone())
    except ShardError as error:
        expect(path.name in str(error), f"the error does not name the shard: {error}")
        return
    expect(sorted([*dataset.keys, *(skip.key for skip in dataset.skipped)]) == sorted(keys), "samples were lost")
    for index, key in enumerate(dataset.keys):
        try:
            item = dataset[index]
        except ShardError as error:
            expect(path.name in str(error), f"the error does not name the shard: {error}")
            return
        named = [(skip.shard, skip.key) for skip in item.skipped]
        expect(item.key == key or named == [(path.name, key)], f"the sample {key} was replaced without a word")


# ---- shards with an index


def pack_indexed(index: bytes, tar: bytes) -> bytes:
    """An index and its shard as one input.

    Args:
        index: of ``index.json``.
        tar: of the shard.
    """
    return struct.pack(">I", len(index)) + index + tar


def _unpack(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack(">I", data[:4].rjust(4, b"\0"))[0]
    return data[4 : 4 + length], data[4 + length :]


def _indexed() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, built_with={"by": "fuzz"}) as writer:
            for number in range(3):
                writer.write(sample(number))
        return [
            pack_indexed((Path(folder) / "index.json").read_bytes(), (Path(folder) / "shard-000000.tar").read_bytes())
        ]


def mutate_indexed(data: bytes, random_: Any, _other: bytes) -> bytes:
    """Damage the index or the shard."""
    index, tar = _unpack(data)
    if random_.random() < 0.6:
        return pack_indexed(random_.choice(JSON)(index, random_, index), tar)
    return pack_indexed(index, random_.choice(TAR)(tar, random_, tar))


def run_indexed(data: bytes, folder: Path) -> str:
    """Read a folder with an index; an accepted one must hold the very samples that were written."""
    from tests.data.helpers import WordBackbone

    index, tar = _unpack(data)
    (folder / "index.json").write_bytes(index)
    (folder / "shard-000000.tar").write_bytes(tar)
    try:
        dataset = ShardDataset(folder, WordBackbone())
        items = [dataset[index] for index in range(len(dataset))]
    except ShardError as error:
        named = any(name in str(error) for name in ("index.json", "shard-000000.tar", folder.name))
        expect(named, f"the error names neither shard nor index: {error}")
        return REFUSED
    expect([item.key for item in items] == [f"{number:06d}" for number in range(3)], "samples were lost or replaced")
    for number in range(3):
        decoded, written = dataset.decode(number), sample(number)
        expect(decoded.chosen == written.chosen and decoded.rejected == written.rejected, "a text has changed")
        expect(decoded.image.tobytes() == written.image.tobytes(), "an image has changed")
    return ACCEPTED


# ---- converters

_PICTURES = {"a.jpg": ("JPEG", 0), "b.png": ("PNG", 1), "c.webp": ("WEBP", 2)}
_QUESTION = "What is on the table?"


def _turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


def _message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _rows(layout: str) -> list[dict[str, Any]]:
    """Two valid rows of a layout."""
    asked = [
        _turn("human", f"<image>\n{_QUESTION}"),
        _turn("gpt", "A cup."),
        _turn("human", "Red?"),
        _turn("gpt", "No."),
    ]
    messages = [_message("user", f"<image>{_QUESTION}"), _message("assistant", "A cup.")]
    rejected = [messages[0], _message("assistant", "A plate.")]
    rows: dict[str, list[dict[str, Any]]] = {
        "llava": [{"id": "1", "image": "a.jpg", "conversations": asked}] * 2,
        "sharegpt": [
            {"conversations": asked[:1], "chosen": asked[1], "rejected": _turn("gpt", "A plate."), "images": ["a.jpg"]},
            {"conversations": asked[:3], "chosen": asked[3], "rejected": _turn("gpt", "Yes."), "images": ["b.png"]},
        ],
        "ms-swift": [
            {"messages": messages, "images": ["a.jpg"], "rejected_messages": rejected, "rejected_images": ["a.jpg"]},
            {"messages": messages, "images": ["a.jpg"], "rejected_messages": messages, "rejected_images": ["b.png"]},
            {"messages": messages, "images": ["c.webp"], "rejected_response": "A plate."},
        ],
        "realign": [
            {
                "image": "a.jpg",
                "retrieved_image": "b.png",
                "chosen": asked[:2],
                "rejected": [asked[0], _turn("gpt", "x")],
            },
            {
                "image": "b.png",
                "retrieved_image": "c.webp",
                "chosen": asked,
                "rejected": [*asked[:3], _turn("gpt", "y")],
            },
        ],
        "trl": [
            {"prompt": messages[:1], "chosen": messages[1:], "rejected": rejected[1:], "images": ["a.jpg"]},
            {"prompt": _QUESTION, "chosen": "A cup.", "rejected": "A plate.", "images": ["b.png"], "key": "mine"},
            {"chosen": messages, "rejected": rejected, "image": "c.webp"},
        ],
        "parquet": [
            {"question": _QUESTION, "chosen": "A cup.", "rejected": "A plate.", "image": "a.jpg", "retrieved": "b.png"},
            {"text": json.dumps({"question": "Q?", "chosen": "A.", "rejected": "B."}), "image": "b.png", "n": 1.5},
        ],
        "image-folder": [{"file_name": "a.jpg", "prompt": "Q?", "answer": "A."}, {"file_name": "b.png", "answer": 2}],
    }
    return rows[layout]


def _row_files(layout: str, ending: str) -> list[bytes]:
    rows = _rows(layout)
    if ending == ".jsonl":
        return [b"".join(json.dumps(row).encode() + b"\n" for row in rows)]
    return [json.dumps(rows).encode(), json.dumps(rows[:1], indent=1).encode()]


def _captions() -> list[bytes]:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}]
    captions = [{"id": 7, "image_id": 1, "caption": "A cup."}, {"id": 8, "image_id": 2, "caption": "Two \u00e9."}]
    whole = {"info": {"annotations": [0]}, "images": images, "licenses": [], "annotations": captions}
    return [json.dumps(whole).encode(), json.dumps({"annotations": captions, "images": images}, indent=1).encode()]


def _cells() -> list[bytes]:
    return [b'file_name,prompt,answer\na.jpg,"What, ""this""?",A cup.\nb.png,Q?,"two\nlines"\nc.webp,,\n']


def _parquet_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for options in ({}, {"compression": "none", "use_dictionary": False}):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(_rows("parquet")[:1] * 3), buffer, **options)
        found.append(buffer.getvalue())
    return found


def run_rows(layout: str, file_name: str) -> Callable[[bytes, Path], str]:
    """A function that reads a file in a layout and converts it, for a :class:`Target`.

    Args:
        layout: its name.
        file_name: of the file.
    """

    def run(data: bytes, folder: Path) -> str:
        path = folder / file_name
        path.write_bytes(data)
        for name, (kind, seed) in _PICTURES.items():
            (folder / name).write_bytes(image_file(picture(seed), kind))
        _only_documented(path, lambda: guess_layout(path))
        rows = _only_documented(path, lambda: list(open_source(path, layout).read()))
        if rows is None:
            return REFUSED
        records = [row for row in rows if isinstance(row, SourceRecord)]
        _check_records(records, _strings(path, data))
        _check_count(path, layout, data, rows)
        if any(record.rejected is not None for record in records):
            _check_conversion(path, layout, rows, sorted(FORMATS)[len(data) % len(FORMATS)])
        return ACCEPTED if records else REFUSED

    return run


def _only_documented(path: Path, function: Callable[[], Any]) -> Any:
    """What a function gives; None where it refuses the file with its name."""
    try:
        return function()
    except (ValueError, OSError) as error:
        expect(path.name in str(error), f"the error does not name the file: {type(error).__name__}: {error}")
        return None


def _check_records(records: Sequence[SourceRecord], strings: set[str] | None) -> None:
    keys = [record.key for record in records]
    expect(len(set(keys)) == len(keys), "a key was given twice")
    expect(all(_KEY.fullmatch(key) for key in keys), "a key is not fit for a shard")
    for record in records:
        for text in (record.chosen, record.rejected):
            known = strings is None or text is None or any(text in string for string in strings)
            expect(known, f"the answer {text!r} stands nowhere in the file")


def _strings(path: Path, data: bytes) -> set[str] | None:
    """Every text and number of a JSON or CSV file, in our eyes or not; None where it cannot be told."""
    try:
        if path.suffix == ".jsonl":
            return {text for line in data.split(b"\n") for text in _texts_of_line(line)}
        if path.suffix == ".json":
            return set(_texts(json.loads(data.decode("utf-8-sig"))))
    except (ValueError, RecursionError):
        return None
    return None


def _texts_of_line(line: bytes) -> Iterator[str]:
    try:
        yield from _texts(json.loads(line))
    except (ValueError, RecursionError):
        return


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    else:
        yield str(value)
        if isinstance(value, str) and value[:1] in ("{", '"', "["):
            yield from _texts_of_line(value.encode("utf-8", "surrogatepass"))


def _check_count(path: Path, layout: str, data: bytes, rows: Sequence[Any]) -> None:
    """No row of the file may be missing among records and problems."""
    problems = [row for row in rows if isinstance(row, SourceProblem)]
    expect(all(problem.where and problem.reason for problem in problems), "a problem does not say where or what")
    count = _count_rows(path, layout, data)
    if count is None:
        # Of an object, what stands beside its arrays is passed over.
        whole = path.suffix != ".json" or layout == "coco-captions" or problems
        expect(whole, "a file that is no JSON was read without a problem")
        return
    halves = 2 * len(rows) if layout == "ms-swift" else len(rows)
    expect(len(rows) <= count <= halves, f"the file has {count} rows, {len(rows)} came out")


def _count_rows(path: Path, layout: str, data: bytes) -> int | None:
    if path.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in data.split(b"\n"))
    if path.suffix in (".tar", ".parquet"):
        return None
    if path.suffix == ".csv":
        return _count_cells(data)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if layout == "coco-captions":
        value = value["annotations"]
    return len(value) if isinstance(value, list) else None


def _count_cells(data: bytes) -> int | None:
    text = data.decode("utf-8-sig", "surrogateescape")
    try:
        return max(0, sum(bool(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True)) - 1)
    except csv.Error:
        return None


def _check_conversion(path: Path, layout: str, rows: Sequence[Any], to: str) -> None:
    out = path.parent / "out"
    report = _only_documented(out, lambda: convert(open_source(path, layout), to, out))
    expect(report is not None, "rows that could be read could not be converted")
    problems = Path(report.problems).read_text().splitlines() if report.problems else []
    expect(report.rows == len(rows), f"{len(rows)} rows were read, the report says {report.rows}")
    expect(len(problems) == report.rows - report.pairs, "a row that was left out is not named")
    if report.pairs:
        again = [row for row in open_source(out).read() if isinstance(row, SourceRecord)]
        expect(len(again) == report.pairs, f"{report.pairs} pairs were written, {len(again)} are read back")
        written = {
            (row.key, str(row.prompt), row.chosen, row.rejected) for row in rows if isinstance(row, SourceRecord)
        }
        back = {(row.key, str(row.prompt), row.chosen, row.rejected) for row in again}
        expect(
            back <= written, f"what is read back differs from what was written: {sorted(back - written, key=str)[:2]}"
        )
    shutil.rmtree(out, ignore_errors=True)


def _texts_of_rows(rows: Sequence[Any]) -> set[str]:
    records = [row for row in rows if isinstance(row, SourceRecord)]
    return {str((record.key, record.prompt, record.chosen, record.rejected)) for record in records}


def _row_target(layout: str, ending: str) -> Target:
    return Target(
        f"{layout}{ending}",
        lambda: _row_files(layout, ending),
        JSON,
        run_rows(layout, f"rows{ending}"),
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("record", _records, JSON, run_record),
        Target("image", _images, IMAGE, run_image),
        Target("shard", _tars, TAR, run_shard),
        Target("indexed", _indexed, (mutate_indexed,), run_indexed),
        *(_row_target(layout, ".json") for layout in ("llava", "sharegpt", "realign", "trl", "parquet")),
        *(_row_target(layout, ".jsonl") for layout in ("ms-swift", "trl", "image-folder")),
        Target("coco-captions", _captions, JSON, run_rows("coco-captions", "captions.json")),
        Target("image-folder.csv", _cells, CELLS, run_rows("image-folder", "rows.csv")),
        Target("parquet.parquet", _parquet_files, CELLS[:7], run_rows("parquet", "rows.parquet")),
        Target("tars", _other_tars, TAR, run_rows("shards", "other.tar")),
    )
}
"""What is fuzzed, by name."""
