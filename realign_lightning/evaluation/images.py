"""Pictures of questions."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from realign_lightning.data.schema import decode_image, to_rgb


def load_image(image: Image.Image | Path) -> Image.Image:
    """The picture of a question, RGB.

    Args:
        image: a picture, or the file that it lies in.

    Raises:
        SampleError: if the file cannot be read as a JPEG, PNG or WebP image.
        FileNotFoundError: if there is no such file.
    """
    return to_rgb(image) if isinstance(image, Image.Image) else decode_image(image.read_bytes())
