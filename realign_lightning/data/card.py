"""The dataset card of a folder of shards: ``README.md`` with what was built, from what and how, and pictures of it.

Front matter is that of the Hugging Face hub (https://huggingface.co/docs/hub/datasets-cards).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from realign_lightning.data.manifest import ShardIndex, read_index
from realign_lightning.data.scan import scan_shard
from realign_lightning.data.schema import split_member_name

log = logging.getLogger(__name__)

PICTURES = "card"
"""Folder of the card's pictures, beside the card."""

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER_SIZES = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
_LARGEST = "n>1B"

_MARK = re.compile(r"\n<!-- written by realign-lightning, (?P<digest>[0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class BuildFacts:
    """What a card tells of a build, beside what stands in the index.

    Args:
        left_out: source samples that gave no pair, by reason.
        refused: completions that were tried and refused, by reason.
        accepted_by_rank: pairs by the rank of the image that their rejected response was made on, from 0; -1 is the
            image itself.
        tried_by_rank: completions tried by rank; every rank of ``accepted_by_rank`` at least as often.
        similarities: similarity of chosen and rejected response of every pair, as far as known.
        retrieval_scores: similarity of image and retrieved image of every pair, as far as known.
        kinds: masked spans by kind.
        settings: plain values, nested as they belong together, for example under ``source``, ``policy``, ``masker``,
            ``retrieval`` and ``gates``. They are published with the card: no secrets.
        languages: ISO 639-1 codes of the texts.
        limits: sentences on what this data lacks, beside those that hold for every such data set.

    Raises:
        ValueError: for negative counts, more pairs than tries at a rank, numbers that are not finite, or settings that
            are no plain JSON values.
    """

    left_out: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    accepted_by_rank: Mapping[int, int] = field(default_factory=dict)
    tried_by_rank: Mapping[int, int] = field(default_factory=dict)
    similarities: Sequence[float] | NDArray[np.floating] = ()
    retrieval_scores: Sequence[float] | NDArray[np.floating] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    languages: Sequence[str] = ()
    limits: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("left_out", "refused", "accepted_by_rank", "tried_by_rank", "kinds"):
            for key, count in getattr(self, name).items():
                if count < 0:
                    raise ValueError(f"{name}[{key!r}] must be a count of at least 0, got {count}")
        for rank, accepted in self.accepted_by_rank.items():
            if self.tried_by_rank and accepted > self.tried_by_rank.get(rank, 0):
                raise ValueError(
                    f"accepted_by_rank[{rank}] is {accepted}, more than were tried ({self.tried_by_rank.get(rank, 0)})"
                )
        for name in ("similarities", "retrieval_scores"):
            if not np.isfinite(np.asarray(getattr(self, name), dtype=np.float64)).all():
                raise ValueError(f"{name} must hold finite numbers only")
        try:
            json.dumps(dict(self.settings), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must hold plain JSON values: {error}") from error


class Bars(NamedTuple):
    """Counts to draw.

    Args:
        title: what is counted.
        axis: what the bars are.
        labels: below the bars; empty ones stay away.
        counts: height of the bars.
        parts: of each count, a part that is drawn darker; empty for none.
    """

    title: str
    axis: str
    labels: Sequence[str]
    counts: Sequence[int]
    parts: Sequence[int] = ()


def write_card(folder: str | Path, facts: BuildFacts, title: str = "Dual-preference pairs") -> Path:
    """Write ``README.md`` and its pictures beside shards.

    A card that was edited, or written by others, is left as it is: the new one becomes ``README.new.md``, and the log
    says so.

    Args:
        folder: of shards, with an ``index.json``.
        facts: of the build.
        title: the card's heading.

    Returns:
        The card that was written.

    Raises:
        ShardError: if the folder has no index, or its first shard cannot be read.
        ValueError: if the facts tell of more pairs than the shards hold.
    """
    folder = Path(folder)
    index = read_index(folder)
    pairs = sum(shard.samples for shard in index.shards)
    told = max(sum(facts.accepted_by_rank.values()), len(facts.similarities), len(facts.retrieval_scores))
    if told > pairs:
        raise ValueError(f"the facts tell of {told} pairs, the shards in {folder} hold {pairs}: facts of another build")
    (folder / PICTURES).mkdir(exist_ok=True)
    pictures = _draw_pictures(facts)
    for name, picture in pictures.items():
        _write(folder / PICTURES / name, _png(picture))
    for stale in {path.name for path in (folder / PICTURES).glob("*.png")} & _PICTURE_NAMES - pictures.keys():
        (folder / PICTURES / stale).unlink()
    text = _card_text(folder, index, pairs, facts, title, set(pictures))
    path = folder / "README.md"
    if path.exists() and not _is_untouched(path):
        log.warning("%s holds what others wrote and is left as it is; the new card is README.new.md beside it.", path)
        path = folder / "README.new.md"
    _write(path, text.encode("utf-8"))
    return path


def draw_bars(bars: Bars, width: int = 640, height: int = 260, scale: int = 2) -> Image.Image:
    """Draw counts as bars on white, with a scale of counts and labels.

    Args:
        bars: at least one.
        width: of the picture, in units of ``scale`` pixels.
        height: the same.
        scale: pixels per unit; 2 is sharp on dense screens.

    Returns:
        An RGB picture of ``width * scale`` by ``height * scale`` pixels.

    Raises:
        ValueError: without bars.
    """
    if not bars.counts:
        raise ValueError(f"{bars.title}: expected at least one bar, got none")
    canvas = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(canvas)
    fonts = {size: ImageFont.load_default(size * scale) for size in (12, 15)}
    ticks = _ticks(max(bars.counts))
    top, bottom, left, right = 44, height - 44, 56, width - 16
    slot = (right - left) / len(bars.counts)

    def y_of(count: float) -> float:
        return bottom - (bottom - top) * count / ticks[-1]

    def text(x: float, y: float, words: str, anchor: str, size: int = 12, fill: str = _GREY) -> None:
        draw.text((x * scale, y * scale), words, fill=fill, font=fonts[size], anchor=anchor)

    def box(x: float, y: float, end: float, fill: str) -> None:
        corners = round(x * scale), round(y * scale), round(end * scale) - 1, bottom * scale - 1
        if corners[1] <= corners[3]:
            draw.rectangle(corners, fill=fill)

    text(16, 20, bars.title, "lm", 15, _BLACK)
    for tick in ticks:
        draw.line([(left * scale, y_of(tick) * scale), (right * scale, y_of(tick) * scale)], fill=_LINE, width=scale)
        text(left - 8, y_of(tick), f"{tick:,}", "rm")
    # Of narrow bars only as many labels as find room.
    step = math.ceil(max(draw.textlength(label, font=fonts[12]) for label in bars.labels) / scale * 1.3 / slot) or 1
    for number, count in enumerate(bars.counts):
        start, end = left + number * slot + slot * 0.1, left + (number + 1) * slot - slot * 0.1
        box(start, y_of(count), end, _LIGHT if bars.parts else _DARK)
        if bars.parts:
            box(start, y_of(bars.parts[number]), end, _DARK)
        if number % step == 0:
            text((start + end) / 2, bottom + 6, bars.labels[number], "mt")
    text((left + right) / 2, height - 8, bars.axis, "mb")
    return canvas


_BLACK, _GREY, _LINE, _DARK, _LIGHT = "#1b1f24", "#57606a", "#d5dae0", "#0a58ca", "#b9cdee"


# ---- pictures

_PICTURE_NAMES = {"similarity.png", "retrieval.png", "ranks.png"}


def _draw_pictures(facts: BuildFacts) -> dict[str, Image.Image]:
    pictures = {}
    if len(facts.similarities):
        bars = _histogram(facts.similarities, "Similarity of chosen and rejected response", "similarity")
        pictures["similarity.png"] = draw_bars(bars)
    if len(facts.retrieval_scores):
        bars = _histogram(facts.retrieval_scores, "Similarity of image and retrieved image", "cosine")
        pictures["retrieval.png"] = draw_bars(bars)
    if facts.tried_by_rank:
        ranks = sorted(facts.tried_by_rank)
        counts = [facts.tried_by_rank[rank] for rank in ranks]
        parts = [facts.accepted_by_rank.get(rank, 0) for rank in ranks]
        title = "Completions tried (light) and accepted (dark) by rank"
        names = [_rank_name(rank) for rank in ranks]
        pictures["ranks.png"] = draw_bars(Bars(title, "retrieval rank", names, counts, parts))
    return pictures


def _histogram(values: Sequence[float] | NDArray[np.floating], title: str, axis: str) -> Bars:
    """Counts in at most 25 bins of a round width."""
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    steps = (step * 10.0**power for power in range(-3, 300) for step in (1, 2, 5))
    width = next(step for step in steps if (high - low) / step < 24)
    first = _slots(low, width)
    counts = np.bincount((_slots(array, width) - first).astype(np.int64))
    labels = [f"{(first + number) * width:.6g}" for number in range(len(counts))]
    return Bars(f"{title}, {len(array):,} pairs", f"{axis}, bars of {width:.6g}", labels, counts.tolist())


def _slots(values: Any, width: float) -> Any:
    """Which bar values fall into; one that is an edge but for rounding is that edge."""
    return np.floor(np.asarray(values) / width + 1e-9)


def _ticks(highest: int) -> list[int]:
    """Three to six round counts from 0 up to at least ``highest``."""
    steps = (step * 10**power for power in range(18) for step in (1, 2, 5))
    step = next(step for step in steps if highest <= 5 * step)
    return list(range(0, max(highest, 1) + step, step))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


# ---- text


def _card_text(folder: Path, index: ShardIndex, pairs: int, facts: BuildFacts, title: str, pictures: set[str]) -> str:
    members = _member_parts(folder / index.shards[0].name)
    paragraphs = [
        f"---\n{_front_matter(pairs, facts, title)}---",
        f"# {_line(title)}",
        _summary(index, pairs),
        _MEMBERS,
        "## How it was built",
        _STAGES,
        *_settings(facts.settings),
        "## What came of it",
        *_outcomes(pairs, facts),
        *_pictures(pictures),
        "## Load it",
        *_loading(index, members),
        "## Licences",
        _LICENCES,
        "## Known limits",
        "\n".join(f"- {_line(limit)}" for limit in (*facts.limits, *_LIMITS)),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    return f"{text}\n<!-- written by realign-lightning, {_digest(text)} -->\n"


def _front_matter(pairs: int, facts: BuildFacts, title: str) -> str:
    header: dict[str, Any] = {
        "license": "unknown",
        "pretty_name": title,
        "task_categories": ["image-text-to-text", "visual-question-answering"],
        "size_categories": [size_category(pairs)],
        "tags": ["realign-lightning", "rdpo", "dpo", "preference", "hallucination", "webdataset"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
    }
    if facts.languages:
        header["language"] = list(facts.languages)
    return _yaml(header).replace("license: unknown\n", "license: unknown  # fill in before publishing\n", 1)


def size_category(samples: int) -> str:
    """The hub's name for how large a data set is.

    Args:
        samples: it holds.

    Returns:
        One of ``n<1K``, ``1K<n<10K`` ... ``n>1B``.

    Example:
        >>> size_category(11_000)
        '10K<n<100K'
    """
    return next((name for size, name in (*_SIZES, *_LARGER_SIZES) if samples < size), _LARGEST)


def _summary(index: ShardIndex, pairs: int) -> str:
    size = sum(shard.bytes for shard in index.shards)
    shards = "1 shard" if len(index.shards) == 1 else f"{len(index.shards):,} shards"
    return (
        f"{pairs:,} dual-preference pairs for vision-language models in {shards}, {_size(size)}. Every pair has an "
        "image with a good answer, a hallucinated answer to the same prompt, and a similar but wrong image, as in "
        "Re-Align's rDPO ([arXiv 2502.13146](https://arxiv.org/abs/2502.13146))."
    )


_MEMBERS = """\
| member | what it holds |
|---|---|
| `{key}.image.{jpg,png,webp}` | the image |
| `{key}.retrieved.{jpg,png,webp}` | the retrieved image: the rejected one |
| `{key}.json` | `prompt`, `chosen`, `rejected`, and where they come from |

`index.json` lists the shards with their SHA-256 sums."""

_STAGES = """\
Words of a good answer about objects, attributes and relations are masked; similar images are retrieved; a model fills
the masks while it looks at a retrieved image, best rank first; the first completion that differs enough from the good
answer becomes the rejected answer, and its image the rejected image."""

_LICENCES = """\
To be filled in before publishing, here and as `license` in the front matter:

| part | source | licence |
|---|---|---|
| images | *fill in* | *fill in* |
| prompts and chosen answers | *fill in* | *fill in* |
| rejected answers, written by a model | *fill in* | *fill in: terms of the model* |"""

_LIMITS = (
    "Rejected answers are a model's own hallucinations: they show the errors of that model, and are false on purpose.",
    "A completion that differs from the good answer can still be true of the image; such pairs are not sorted out "
    "unless a gate above says so.",
    "Chosen answers are as good as their source; nobody has checked them again unless it says so above.",
    "Images may show people; they are as they came from their source.",
)


def _settings(settings: Mapping[str, Any]) -> list[str]:
    if not settings:
        return []
    text = _yaml(dict(settings))
    # A fence longer than any in the text cannot be closed by it.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return ["Settings:", f"{fence}yaml\n{text}{fence}"]


def _outcomes(pairs: int, facts: BuildFacts) -> list[str]:
    given = pairs + sum(facts.left_out.values())
    paragraphs = [f"{pairs:,} of {given:,} source samples became pairs ({_share(pairs, given)})."]
    if facts.left_out:
        rows = [(_cell(reason), f"{count:,}", _share(count, given)) for reason, count in _by_count(facts.left_out)]
        paragraphs.append(_table(("source samples left out", "count", "share"), rows))
    if facts.tried_by_rank:
        paragraphs.append(_rank_table(facts))
    if facts.refused:
        tried = sum(facts.tried_by_rank.values()) or pairs + sum(facts.refused.values())
        rows = [(_cell(reason), f"{count:,}", _share(count, tried)) for reason, count in _by_count(facts.refused)]
        paragraphs.append(_table(("completions refused", "count", "share of all tried"), rows))
    if facts.kinds:
        spans = sum(facts.kinds.values())
        rows = [(_cell(kind), f"{count:,}", _share(count, spans)) for kind, count in _by_count(facts.kinds)]
        paragraphs.append(_table(("masked spans", "count", "share"), rows))
    return paragraphs


def _rank_name(rank: int) -> str:
    """How tables and pictures name a rank: the image itself, tried before all that were retrieved, is ``own``.

    Args:
        rank: from 0; -1 is the image itself.
    """
    return "own" if rank < 0 else str(rank)


def _rank_table(facts: BuildFacts) -> str:
    rows = []
    for rank in sorted(facts.tried_by_rank):
        tried, accepted = facts.tried_by_rank[rank], facts.accepted_by_rank.get(rank, 0)
        rows.append((_rank_name(rank), f"{tried:,}", f"{accepted:,}", _share(accepted, tried)))
    tried, accepted = sum(facts.tried_by_rank.values()), sum(facts.accepted_by_rank.values())
    rows.append(("all", f"{tried:,}", f"{accepted:,}", _share(accepted, tried)))
    return _table(("retrieval rank", "tried", "accepted", "acceptance rate"), rows)


_ALT = {
    "ranks.png": "Completions tried and accepted by rank",
    "similarity.png": "Histogram of the similarity of chosen and rejected response",
    "retrieval.png": "Histogram of the similarity of image and retrieved image",
}


def _pictures(names: set[str]) -> list[str]:
    return [f"![{text}]({PICTURES}/{name})" for name, text in _ALT.items() if name in names]


def _member_parts(shard: Path) -> list[tuple[str, ...]]:
    """What the members of a shard's samples are called behind their key, each combination once."""
    stored = scan_shard(shard)
    return sorted({tuple(sorted(split_member_name(member.name)[1] for member in sample.members)) for sample in stored})


def _loading(index: ShardIndex, members: Sequence[tuple[str, ...]]) -> list[str]:
    paragraphs = [
        "To train on it with realign-lightning (`pairs` is the folder of this file):",
        "```bash\nrealign-lightning fit --config recipes/llava7b_lora.yaml --data.train pairs\n```",
        "With webdataset:",
        f"```python\n{_WEBDATASET.format(name=index.shards[0].name, image=_image_part(members[0]))}\n```",
    ]
    if len(members) > 1:
        return [
            *paragraphs,
            "Hugging Face datasets cannot read these shards as they are: it takes one file format per column, and "
            "images differ in theirs. `realign-lightning convert` writes them as Parquet.",
        ]
    return [
        *paragraphs,
        "With Hugging Face datasets:",
        f"```python\n{_DATASETS.format(image=_image_part(members[0]))}\n```",
    ]


_WEBDATASET = """\
import webdataset

for sample in webdataset.WebDataset("pairs/{name}", shardshuffle=False).decode("pil"):
    sample["{image}"], sample["json"]["chosen"], sample["json"]["rejected"]"""

_DATASETS = """\
from datasets import load_dataset

pairs = load_dataset("webdataset", data_files="pairs/*.tar", split="train")
pairs[0]["{image}"], pairs[0]["json"]["chosen"], pairs[0]["json"]["rejected"]"""


def _image_part(parts: Sequence[str]) -> str:
    return next(part for part in parts if part.startswith("image."))


# ---- Markdown


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "none"


def _line(text: str) -> str:
    """A text within one line, in which nothing is markup."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))


_cell = _line


def _size(count: float) -> str:
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(int(math.log10(max(count, 1)) // 3), len(units) - 1)
    return f"{count / 1000**power:,.{0 if power == 0 else 1}f} {units[power]}"


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


# ---- files


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _is_untouched(path: Path) -> bool:
    """Whether a card is as it was written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark["digest"]


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
