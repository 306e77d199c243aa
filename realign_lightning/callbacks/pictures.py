"""Pictures of samples: images beside the texts that belong to them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_TILE = 192
_MARGIN = 16
_FONT_SIZE = 15
_LINE = 20


class Row(NamedTuple):
    """One row of a picture.

    Args:
        images: pictures with a heading each, shown from left to right.
        texts: labelled texts below each other, shown right of the images.
    """

    images: Sequence[tuple[str, Image.Image]]
    texts: Sequence[tuple[str, str]]


def draw_rows(rows: Sequence[Row], text_width: int = 62) -> Image.Image:
    """Draw rows of images and texts on white.

    Args:
        rows: at least one row.
        text_width: characters per line of text.

    Returns:
        An RGB picture; its size follows from the rows.

    Raises:
        ValueError: without rows.
    """
    if not rows:
        raise ValueError("Expected at least one row to draw, got none.")
    font = ImageFont.load_default(_FONT_SIZE)
    columns = max(len(row.images) for row in rows)
    left = _MARGIN + columns * (_TILE + _MARGIN)
    wrapped = [[(label, _wrap(text, text_width)) for label, text in row.texts] for row in rows]
    heights = [max(_TILE + _LINE, sum(_LINE * (len(lines) + 1) for _, lines in texts)) + _MARGIN for texts in wrapped]
    canvas = Image.new("RGB", (left + text_width * 8 + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for row, texts, height in zip(rows, wrapped, heights, strict=True):
        for column, (heading, image) in enumerate(row.images):
            x = _MARGIN + column * (_TILE + _MARGIN)
            draw.text((x, top), heading, fill="dimgray", font=font)
            canvas.paste(_fit(image), (x, top + _LINE))
        y = top
        for label, lines in texts:
            draw.text((left, y), label, fill="dimgray", font=font)
            for number, line in enumerate(lines, start=1):
                draw.text((left, y + number * _LINE), line, fill="black", font=font)
            y += _LINE * (len(lines) + 1)
        top += height
    return canvas


def _wrap(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() or [""] for line in textwrap.wrap(part, width) or [""]]


def _fit(image: Image.Image) -> Image.Image:
    """The image in a square tile, enlarged without smoothing when it is small."""
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    tile.paste(image.convert("RGB").resize(size, method))
    return tile
