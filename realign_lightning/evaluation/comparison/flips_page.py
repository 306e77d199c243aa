"""Write the page of flipped answers: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from PIL import Image

from realign_lightning.evaluation.comparison.pairing import Comparison, Flip, worst_first
from realign_lightning.evaluation.comparison.report import flip_values
from realign_lightning.inspection.differences import differing, segments
from realign_lightning.inspection.page import script_json, with_sources
from realign_lightning.inspection.pairs import thumbnail

_THUMBNAIL = 384
"""Pixels."""


def write_flips(comparison: Comparison, path: Path, images: Path | None = None) -> int:
    """Write all flipped answers of a comparison, worst first, to be filtered and searched in a browser.

    Args:
        comparison: of two models.
        path: the HTML file; it appears when it is complete.
        images: folder with the images that the questions name; reduced copies of them go into the page.

    Returns:
        How many images are not on the page: not in the folder, or no images.
    """
    flips = sorted((flip for one in comparison.benchmarks for flip in one.flips), key=worst_first)
    pictures = _pictures(flips, images) if images else {}
    records = [_record(flip, pictures) for flip in flips]
    head, tail = _template(_facts(comparison, len(flips)), records)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(head)
            damaged = _write_pictures(file, pictures)
            file.write(tail)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    named = {flip.first.image for flip in flips if flip.first.image}
    return len(named) - len(pictures) + damaged if images else 0


def _pictures(flips: list[Flip], folder: Path) -> dict[str, tuple[str, Path]]:
    """Names on the page and files of the images that are there, by the name that questions give them."""
    found: dict[str, tuple[str, Path]] = {}
    for name in dict.fromkeys(flip.first.image for flip in flips if flip.first.image):
        path = (folder / name).resolve()
        # A run's file may not name files elsewhere.
        if path.is_relative_to(folder.resolve()) and path.is_file():
            found[name] = (f"i-{len(found)}", path)
    return found


def _write_pictures(file: IO[str], pictures: dict[str, tuple[str, Path]]) -> int:
    damaged = 0
    for name, path in pictures.values():
        try:
            with Image.open(path) as image:
                content = thumbnail(image.convert("RGB"), _THUMBNAIL)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            damaged += 1
            continue
        file.write(f'<script type="text/plain" id="{name}">{content}</script>\n')
    return damaged


def _record(flip: Flip, pictures: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    values = flip_values(flip)
    texts = flip.first.answer or "", flip.second.answer or ""
    for side, text, ranges in zip(("first", "second"), texts, differing(*texts), strict=True):
        values[side]["answer"] = [[piece.text, piece.differs] for piece in segments(text, ranges)]
    return {**values, "benchmark": flip.benchmark, "picture": pictures.get(flip.first.image, ("",))[0]}


def _facts(comparison: Comparison, flips: int) -> dict[str, Any]:
    compared = {one.name: len(one.keys) for one in comparison.benchmarks}
    return {"names": list(comparison.names), "questions": compared, "flips": flips}


def _template(facts: dict[str, Any], records: list[dict[str, Any]]) -> tuple[str, str]:
    """The page before its pictures, and behind them."""
    folder = files("realign_lightning.evaluation.comparison") / "template"
    names = ("flips.html", "flips.css", "flips.js")
    page, own, script = ((folder / name).read_text(encoding="utf-8") for name in names)
    shared = files("realign_lightning.inspection") / "template" / "page.css"
    style = f"{shared.read_text(encoding='utf-8')}\n{own}"
    # Data last: nothing in it is taken for a mark.
    before, rest = with_sources(page, style, script).split("%FACTS%")
    between, behind = rest.split("%FLIPS%")
    middle, tail = behind.split("%PICTURES%")
    return f"{before}{script_json(facts)}{between}{script_json(records)}{middle}", tail
