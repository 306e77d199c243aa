"""``realign-lightning convert``: preference pairs of any layout as our shards, or as what other libraries read.

Nothing is built here: a row becomes a pair if it has everything that the format asks for. What is left out is counted,
and named in a file beside the output. Image files pass through as they are. The output appears when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import webdataset
from PIL import Image
from tqdm import tqdm

from realign_lightning.data.publish import check_target, publish_folder, publish_problems, staging_folder
from realign_lightning.data.schema import (
    check_response,
    check_source,
    decode_image,
    encode_members,
    image_extension,
)
from realign_lightning.data.shards import ShardWriter
from realign_lightning.data.sources.base import Source, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import check_unmarked, marked_prompt, spelled_prompt
from realign_lightning.data.sources.images import content_id
from realign_lightning.data.sources.layouts import LAYOUTS, open_source
from realign_lightning.data.sources.rows import parquet
from realign_lightning.types import PreferenceSample, Prompt, SampleError

SAMPLES_PER_TAR = 1000
"""Pairs in every tar but the last."""

ROWS_PER_FILE = 5000
"""Pairs in every Parquet file but the last."""

ROWS_PER_GROUP = 100
"""Pairs in a row group of a Parquet file; readers hold one group in memory."""


class Pair(NamedTuple):
    """A preference pair to be written.

    Args:
        key: unique, as in shards.
        prompt: text or chat messages.
        chosen: the chosen answer y_w.
        rejected: the rejected answer y_l.
        image: the file of the image v.
        retrieved: the file of the rejected image v_l; None where the format does not hold one.
        provenance: what else is known, plain JSON values.
    """

    key: str
    prompt: Prompt
    chosen: str
    rejected: str
    image: bytes
    retrieved: bytes | None
    provenance: Mapping[str, Any]


@dataclass
class ConversionReport:
    """What became of the rows.

    Args:
        rows: rows that were read, those that cannot be used among them.
        pairs: pairs that were written.
        left_out: rows that were left out, by reason.
        problems: file that names each of these; None where there are none.
    """

    rows: int = 0
    pairs: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    problems: str | None = None

    def as_text(self) -> str:
        """The report as a table."""
        counts = {"rows read": self.rows, "pairs written": self.pairs, "rows left out": self.rows - self.pairs}
        counts |= {f"  {reason}": count for reason, count in sorted(self.left_out.items(), key=lambda item: -item[1])}
        width = max(map(len, counts))
        lines = [f"{name:<{width}}  {count:>9,}" for name, count in counts.items()]
        return "\n".join([*lines, *([f"named in {self.problems}"] if self.problems else [])]) + "\n"


def convert(
    source: Source,
    to: str,
    folder: str | Path,
    overwrite: bool = False,
    limit: int | None = None,
    max_side: int | None = None,
) -> ConversionReport:
    """Write the complete pairs of a source.

    Args:
        source: gives the rows.
        to: a name of :data:`FORMATS`.
        folder: where the output goes; it appears when all of it is written. What is left out is named in
            ``{folder}.problems.jsonl``.
        overwrite: replace what this command has written there before.
        limit: rows that are read at most.
        max_side: of shards, most pixels of an image's longer side, see :class:`~realign_lightning.data.ShardWriter`.

    Returns:
        What became of the rows. If no pair came out, the folder is left as it was.

    Raises:
        ValueError: if the format is unknown or a number below 1, and as the source.
        FileExistsError: if there is something in the folder and ``overwrite`` is False, or something that this command
            does not write.
        OSError: if the source cannot be read, or the output not be written.
        ImportError: for Parquet without pyarrow.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {sorted(FORMATS)}, got {to!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if max_side is not None and (to != "shards" or max_side < 1):
        raise ValueError(f"max_side is for shards and at least 1, got max_side={max_side} and to={to!r}")
    target = Path(folder).absolute()
    check_target(target, overwrite, _OURS)
    staging = staging_folder(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with (target.parent / f".{target.name}.problems.partial").open("w", encoding="utf-8") as problems:
            writer = FORMATS[to](staging) if max_side is None else _Shards(staging, max_side)
            report = _write(source, writer, problems, limit)
        report.problems = publish_problems(target, Path(problems.name))
        if report.pairs:
            publish_folder(staging, target)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, f"{error.strerror or error}; {target} was not written") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        (target.parent / f".{target.name}.problems.partial").unlink(missing_ok=True)
    return report


def main(args: Sequence[str]) -> None:
    """Command line of :func:`convert`: prints the report.

    Args:
        args: the options.

    Raises:
        SystemExit: with status 1 if nothing came out or something stood in the way, 2 for wrong options.
    """
    options = _parser().parse_args(args)
    try:
        arguments = dict(_split_option(item) for item in options.option)
        if options.images is not None:
            arguments["images"] = options.images
        if Path(options.input).resolve() == Path(options.output).resolve():
            raise ValueError(f"{options.input} is read and cannot be written at the same time; give another folder")
        source = open_source(options.input, options.layout, **arguments)
        report = convert(source, options.to, options.output, options.overwrite, options.limit, options.max_side)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"realign-lightning convert: {error}") from error
    sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n" if options.json else report.as_text())
    if not report.pairs:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-lightning convert",
        description="Turn preference pairs of any layout into shards, and shards into what other libraries read. Rows "
        "that lack a rejected answer or image are left out and counted; `realign-lightning build` makes these.",
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="IN", help="file, folder or pattern")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--to", choices=sorted(FORMATS), default="shards", help="format of OUT (default: %(default)s)")
    parser.add_argument(
        "--from",
        dest="layout",
        choices=["auto", *sorted(LAYOUTS)],
        default="auto",
        help="layout of IN (default: recognised by its content)",
    )
    parser.add_argument("--images", metavar="DIR", help="folder that image paths are relative to (default: IN's own)")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="further argument of the layout, such as turns=all; can be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote to OUT")
    parser.add_argument("--limit", metavar="N", type=int, help="read at most N rows")
    parser.add_argument(
        "--max-side", metavar="PIXELS", type=int, help="reduce images whose longer side has more pixels (shards only)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _split_option(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--option {item}: expected NAME=VALUE")
    return name, value


# ---- from records to pairs


def _write(source: Source, writer: PairWriter, problems: IO[str], limit: int | None) -> ConversionReport:
    report, left_out = ConversionReport(), Counter[str]()
    rows = itertools.islice(source.read(), limit)
    try:
        for row in tqdm(rows, desc="converting", unit="row", delay=1, leave=False):
            report.rows += 1
            if isinstance(row, SourceProblem):
                problem = row
            else:
                try:
                    writer.write(make_pair(row, writer.needs_retrieved))
                except SampleError as error:
                    problem = SourceProblem(row.key, str(error))
                else:
                    report.pairs += 1
                    continue
            left_out[problem.kind] += 1
            problems.write(json.dumps(asdict(problem)) + "\n")
        if report.pairs:
            writer.close()
    finally:
        writer.abandon()
    report.left_out = dict(left_out)
    return report


def make_pair(record: SourceRecord, needs_retrieved: bool = True) -> Pair:
    """The pair of a complete record; its images are read.

    Args:
        record: from a source.
        needs_retrieved: whether the rejected image belongs to a pair.

    Raises:
        SampleError: if something is missing or cannot be read; says what.
    """
    if record.chosen is None:
        raise SampleError("the row has no chosen answer")
    if record.rejected is None:
        raise SampleError("the row has no rejected answer")
    if needs_retrieved and record.retrieved is None:
        raise SampleError("the row has no rejected image")
    provenance = {"image_id": record.image.image_id}
    retrieved = None
    if needs_retrieved and record.retrieved is not None:
        provenance["retrieved_id"] = record.retrieved.image_id
        retrieved = record.retrieved.read()
    return Pair(
        record.key,
        record.prompt,
        record.chosen,
        record.rejected,
        record.image.read(),
        retrieved,
        {**provenance, **record.facts},
    )


# ---- formats


class PairWriter(ABC):
    """Writes pairs in one format into an empty folder.

    Args:
        folder: the folder.
    """

    needs_retrieved = True
    """Whether the format holds the rejected image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def write(self, pair: Pair) -> None:
        """Add a pair.

        Raises:
            SampleError: if the pair cannot be written; nothing of it is.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the output."""

    def abandon(self) -> None:
        """Let go of open files; does nothing after :meth:`close`."""
        # What made the output fail fails here again, and would hide the first error.
        with contextlib.suppress(Exception):
            self.close()


_UNREAD = Image.new("RGB", (1, 1))
"""Stands where a sample wants a decoded image although its file is given."""


def sample_of(pair: Pair) -> PreferenceSample:
    """A pair as :class:`~realign_lightning.data.ShardWriter` takes it beside its image files; nothing is decoded.

    Args:
        pair: to be written.
    """
    return PreferenceSample(pair.key, _UNREAD, _UNREAD, pair.prompt, pair.chosen, pair.rejected, dict(pair.provenance))


def _check(pair: Pair) -> None:
    """Refuse what no shard could hold, whatever the format, so that it can come back."""
    if pair.retrieved is not None:
        encode_members(sample_of(pair), image=pair.image, retrieved=pair.retrieved)
    else:
        check_source(pair.key, pair.prompt, pair.chosen, decode_image(pair.image))
        check_response(pair.rejected, "rejected")


class _Shards(PairWriter):
    """Our shards."""

    def __init__(self, folder: Path, max_side: int | None = None) -> None:
        super().__init__(folder)
        self._writer = ShardWriter(folder, SAMPLES_PER_TAR, built_with={"command": "convert"}, max_side=max_side)

    def write(self, pair: Pair) -> None:
        self._writer.write(sample_of(pair), pair.image, pair.retrieved)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        self._writer.abandon()


class _WebDataset(PairWriter):
    """Tars whose samples all have members of the same names and JSON of the same types, as Hugging Face datasets asks.

    It takes what follows the first dot as the name of a column, and the columns from the first five samples. So all
    images bear the ending of the first one (readers go by the content), prompts are chat messages, and the provenance
    is a JSON text.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._pairs = 0
        self._endings: dict[str, str] = {}

    def write(self, pair: Pair) -> None:
        _check(pair)
        if self._pairs % SAMPLES_PER_TAR == 0:
            self._close_tar()
            number = self._pairs // SAMPLES_PER_TAR
            self._file = (self.folder / f"train-{number:06d}.tar").open("wb")
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0.0)
        members = {}
        for name, data in (("image", pair.image), ("retrieved", pair.retrieved or b"")):
            members[f"{name}.{self._endings.setdefault(name, image_extension(data))}"] = data
        record = {
            "prompt": spelled_prompt(pair.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "provenance": _json(pair.provenance),
        }
        self._tar.write({"__key__": pair.key, **members, "json": _json(record).encode()})
        self._pairs += 1

    def close(self) -> None:
        self._close_tar()

    def _close_tar(self) -> None:
        if self._file is not None:
            with self._file:
                self._tar.close()
            self._file = None


class _ParquetRows(PairWriter):
    """Parquet files whose image columns Hugging Face datasets decodes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parquet = parquet()
        self._schema = self.schema()
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._pairs = 0

    @abstractmethod
    def schema(self) -> Any:
        """The columns."""

    @abstractmethod
    def row(self, pair: Pair) -> dict[str, Any]:
        """Values by column."""

    def write(self, pair: Pair) -> None:
        _check(pair)
        self._rows.append(self.row(pair))
        self._pairs += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()
        if self._pairs % ROWS_PER_FILE == 0:
            self._close_file()

    def close(self) -> None:
        self._flush()
        self._close_file()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        if self._writer is None:
            number = (self._pairs - 1) // ROWS_PER_FILE
            path = self.folder / f"train-{number:05d}.parquet"
            # Files of images do not become smaller, and a dictionary of them only costs memory.
            self._writer = self._parquet.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _close_file(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Parquet(_ParquetRows):
    """One row per pair: key, image, retrieved, prompt (chat messages), chosen, rejected, provenance (JSON text)."""

    def schema(self) -> Any:
        import pyarrow as pa

        fields = [("key", pa.string()), ("image", _image_type()), ("retrieved", _image_type())]
        fields += [("prompt", _chat_type())]
        fields += [(name, pa.string()) for name in ("chosen", "rejected", "provenance")]
        return pa.schema(fields, metadata=_features(image={"_type": "Image"}, retrieved={"_type": "Image"}))

    def row(self, pair: Pair) -> dict[str, Any]:
        return {
            "key": pair.key,
            "image": _image_value(pair.image),
            "retrieved": _image_value(pair.retrieved or b""),
            "prompt": spelled_prompt(pair.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "provenance": _json(pair.provenance),
        }


class _Trl(_ParquetRows):
    """TRL's conversational preference format: the text half of every pair."""

    needs_retrieved = False

    def schema(self) -> Any:
        import pyarrow as pa

        fields = [("key", pa.string()), ("images", pa.list_(_image_type()))]
        fields += [(name, _chat_type()) for name in ("prompt", "chosen", "rejected")]
        # "Sequence" is what all versions of datasets understand.
        return pa.schema(fields, metadata=_features(images={"feature": {"_type": "Image"}, "_type": "Sequence"}))

    def row(self, pair: Pair) -> dict[str, Any]:
        answers = {
            name: [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
            for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
        }
        images = [_image_value(pair.image)]
        return {"key": pair.key, "images": images, "prompt": spelled_prompt(pair.prompt), **answers}


class _MsSwift(PairWriter):
    """ms-swift's messages, two rows per pair: one whose answer is rejected, one whose image is.

    Both say it as ``rejected_messages`` and ``rejected_images``: in a file where some rows have ``rejected_response``
    the others get a null there, and ms-swift drops rows with a null ``rejected_response`` (its
    swift/dataset/preprocessor/core.py). Needs ms-swift 3.8 or later.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "images").mkdir()
        self._file = (folder / "train.jsonl").open("w", encoding="utf-8")

    def write(self, pair: Pair) -> None:
        _check(pair)
        prompt = marked_prompt(pair.prompt)
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            check_unmarked(text, name)
        chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
        image, retrieved = self._save(pair.image), self._save(pair.retrieved or b"")
        for messages, other in ((rejected, image), (chosen, retrieved)):
            row = {
                "key": pair.key,
                "messages": chosen,
                "images": [image],
                "rejected_messages": messages,
                "rejected_images": [other],
                "provenance": _json(pair.provenance),
            }
            self._file.write(_json(row) + "\n")

    def close(self) -> None:
        self._file.close()

    def _save(self, data: bytes) -> str:
        """Path of an image file, relative to the rows; equal images are one file."""
        path = f"images/{content_id(data)}.{image_extension(data)}"
        if not (self.folder / path).exists():
            (self.folder / path).write_bytes(data)
        return path


_OURS = re.compile(r"index\.json|shard-\d{6}\.tar|train-\d{6}\.tar|train-\d{5}\.parquet|train\.jsonl|images")
"""What conversions write."""

FORMATS: dict[str, Callable[[Path], PairWriter]] = {
    "shards": _Shards,
    "webdataset": _WebDataset,
    "parquet": _Parquet,
    "trl": _Trl,
    "ms-swift": _MsSwift,
}
"""Writers by the name of their format."""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)


def _image_type() -> Any:
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _image_value(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": f"{content_id(data)}.{image_extension(data)}"}


def _chat_type() -> Any:
    import pyarrow as pa

    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))


def _features(**features: Any) -> dict[str, str]:
    """What Hugging Face datasets reads out of a schema; columns that are not named are taken as they are."""
    return {"huggingface": json.dumps({"info": {"features": features}})}
