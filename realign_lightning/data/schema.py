"""The shard contract: what one sample looks like inside a tar, and its strict decoder and encoder.

One sample is three members of a WebDataset tar::

    {key}.image.{jpg,png,webp}       the image v
    {key}.retrieved.{jpg,png,webp}   the retrieved image v_l
    {key}.json                       prompt, chosen, rejected, and where they come from

The JSON is one UTF-8 object. ``prompt`` is a text or a list of chat messages that ends with the user's turn; ``chosen``
and ``rejected`` are texts that differ in more than outer white space. The provenance fields ``image_id``,
``retrieved_id``, ``retrieval_rank``, ``retrieval_score``, ``response_similarity`` and ``masked`` are optional and
typed; any further field is kept with them as it is. Nothing is ever unpickled, fetched or run.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from realign_lightning.types import PreferenceSample, Prompt, SampleError

SCHEMA_VERSION = 1
"""Version of this contract, written into every ``index.json``."""

ImageFormat = Literal["jpg", "png", "webp"]
"""File extension of an image member."""

IMAGE_PARTS = ("image", "retrieved")
"""Names of the two image members of a sample."""

JSON_PART = "json"
"""Name of the text member of a sample."""

MAX_DEPTH = 100
"""JSON that is nested more deeply is refused; below what any function of Python's that follows it can take."""

MAX_PIXELS = 8192 * 8192
"""Larger images are refused; below the size at which Pillow starts to warn of decompression bombs."""

MAX_JSON_BYTES = 1 << 20
"""Larger JSON members are refused: small JSON can become very much of memory."""

MAX_ASPECT_RATIO = 200
"""Images whose longer side is more than this many times the shorter one are refused."""

MAX_SCANS = 100
"""JPEG files with more scans are refused: each takes a pass over all pixels, and few bytes. Encoders write ten."""

JPEG_QUALITY = 95
"""Quality of the JPEG members that :func:`encode_members` makes."""

_MEMBER = re.compile(r"(?P<key>[A-Za-z0-9_-]{1,80})\.(?P<part>json|(?:image|retrieved)\.(?:jpg|png|webp))")
_EXTENSIONS: dict[str, ImageFormat] = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": JPEG_QUALITY},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}
_PNG_END = b"IEND\xae\x42\x60\x82"
# A start of scan with one to four components, which other bytes hardly ever look like.
_JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16")


def split_member_name(name: str) -> tuple[str, str]:
    """Split the name of a tar member into the sample's key and the member's part.

    Args:
        name: the member's name in the tar.

    Returns:
        The key, and ``json``, ``image.{extension}`` or ``retrieved.{extension}``.

    Raises:
        ValueError: if the name is not one of the contract's.

    Example:
        >>> split_member_name("000017.image.png")
        ('000017', 'image.png')
    """
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ValueError(
            f"member {name!r} is none of {{key}}.image.{{jpg,png,webp}}, {{key}}.retrieved.{{jpg,png,webp}} and "
            "{key}.json with a key of 1 to 80 characters A-Z a-z 0-9 _ - (no dots, no slashes); rename or remove it"
        )
    return match["key"], match["part"]


def fingerprint_members(members: Mapping[str, bytes]) -> str:
    """What a sample's content is identified by: SHA-256 over the bytes of its members, whatever its key.

    Args:
        members: contents by member name, as they stand in the tar or as :func:`encode_members` returns them.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: if a member's name is not one of the contract's.

    Example:
        >>> one = fingerprint_members({"a.json": b"1", "a.image.png": b"2"})
        >>> one == fingerprint_members({"b.image.png": b"2", "b.json": b"1"})
        True
    """
    parts = {split_member_name(name)[1].split(".")[0]: data for name, data in members.items()}
    digest = hashlib.sha256()
    for name, data in sorted(parts.items()):
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def missing_parts(parts: Mapping[str, Any]) -> list[str]:
    """Which of image, retrieved and json are absent, given parts as :func:`split_member_name` returns them."""
    present = {part.split(".")[0] for part in parts}
    return [part for part in (*IMAGE_PARTS, JSON_PART) if part not in present]


def decode_sample(members: Mapping[str, bytes]) -> PreferenceSample:
    """Decode the three members of one sample, trusting nothing.

    Args:
        members: contents by member name, as they stand in the tar.

    Returns:
        The sample, both images in plain RGB.

    Raises:
        SampleError: if the sample breaks the contract; the message says how.
    """
    key, parts = _split_members(members)
    record = parse_record(parts.pop(JSON_PART))
    images = {part.split(".")[0]: _named(part, decode_image, data) for part, data in parts.items()}
    if _are_identical(images["image"], images["retrieved"]):
        raise SampleError("the retrieved image is identical to the image: nothing to prefer")
    prompt, chosen, rejected = (record.pop(name) for name in ("prompt", "chosen", "rejected"))
    return PreferenceSample(key, images["image"], images["retrieved"], prompt, chosen, rejected, record)


def encode_members(
    sample: PreferenceSample,
    image_format: ImageFormat = "png",
    image: bytes | None = None,
    retrieved: bytes | None = None,
) -> dict[str, bytes]:
    """Encode a sample as the members of a shard; what comes back is sure to be readable by :func:`decode_sample`.

    Args:
        sample: the sample.
        image_format: how images are stored: ``png`` and ``webp`` without loss, ``jpg`` at quality 95.
        image: original JPEG, PNG or WebP file of the image; stored as it is in place of ``sample.image``.
        retrieved: the same for ``sample.retrieved``.

    Returns:
        Contents by member name.

    Raises:
        SampleError: if the sample breaks the contract.
        ValueError: if ``image_format`` is unknown.

    Example:
        >>> image, retrieved = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        >>> sample = PreferenceSample("000017", image, retrieved, "Which colour?", "Red.", "Blue.")
        >>> list(encode_members(sample))
        ['000017.image.png', '000017.retrieved.png', '000017.json']
        >>> decode_sample(encode_members(sample)).chosen
        'Red.'
    """
    if image_format not in _SAVE_OPTIONS:
        raise ValueError(f"image_format must be one of {sorted(_SAVE_OPTIONS)}, got {image_format!r}")
    if sample.context:
        raise SampleError(f"shards hold one image per sample, and {len(sample.context)} more (context) would be lost")
    members: dict[str, bytes] = {}
    for part, picture, original in (("image", sample.image, image), ("retrieved", sample.retrieved, retrieved)):
        data = encode_image(picture, image_format) if original is None else original
        extension = _named(part, image_extension, data)
        members[f"{sample.key}.{part}.{extension}"] = data
    members[f"{sample.key}.{JSON_PART}"] = _encode_record(sample)
    decode_sample(members)
    return members


def check_source(key: str, prompt: Prompt, chosen: str, image: Image.Image) -> None:
    """Check what is known of a sample before its rejected side is made, so that no work is spent on it in vain.

    Args:
        key: the sample's key.
        prompt: the prompt.
        chosen: the chosen response.
        image: the image.

    Raises:
        SampleError: if no sample with these could be written.
    """
    check_prompt(key, prompt)
    check_response(chosen, "chosen")
    check_picture(image)


def check_prompt(key: str, prompt: Prompt) -> None:
    """Check that a sample with this key and prompt can be stored in a shard.

    Args:
        key: the sample's key.
        prompt: the prompt.

    Raises:
        SampleError: if none could.
    """
    try:
        split_member_name(f"{key}.{JSON_PART}")
    except ValueError as error:
        raise SampleError(str(error)) from error
    _check_prompt(prompt)
    _check_plain(prompt, "prompt")


def check_response(response: str, name: str) -> None:
    """Check that a response can be stored in a shard.

    Args:
        response: the response.
        name: what to call it in the error.

    Raises:
        SampleError: if it is empty or holds a character that no JSON text may hold.
    """
    _check_text(response, name)
    _check_plain(response, name)


def check_picture(image: Image.Image) -> None:
    """Check that an image can be stored in a shard.

    Args:
        image: any picture.

    Raises:
        SampleError: if it is too large, too elongated, animated, or of a pixel mode without a faithful RGB form.
    """
    _check_picture(image)
    _check_mode(image)


def load_json(data: bytes) -> Any:
    """Parse UTF-8 JSON, refusing what Python's parser lets pass: duplicate names, NaN, infinities.

    Args:
        data: the JSON file.

    Returns:
        The parsed value.

    Raises:
        ValueError: if it is not strict JSON in UTF-8 without a byte order mark, or nested too deeply.

    Example:
        >>> load_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the name 'a' occurs twice in one JSON object
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    # Few brackets cannot be nested deeply, and counting bytes costs next to nothing.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise ValueError(f"the JSON is nested too deeply: more than {MAX_DEPTH} levels")
    return value


def parse_record(data: bytes) -> dict[str, Any]:
    """Parse and validate the JSON member of a sample.

    Args:
        data: contents of ``{key}.json``.

    Returns:
        ``prompt``, ``chosen``, ``rejected`` and the provenance fields that are there.

    Raises:
        SampleError: if it breaks the contract.
    """
    if len(data) > MAX_JSON_BYTES:
        raise SampleError(f"the JSON member has {len(data)} bytes, more than the {MAX_JSON_BYTES} that are allowed")
    try:
        record = load_json(data)
    except ValueError as error:
        raise SampleError(f"the JSON member cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise SampleError(f"the JSON member must be an object, got {_kind(record)}")
    _check_plain(record, "the JSON member")
    for name in ("prompt", "chosen", "rejected"):
        if name not in record:
            raise SampleError(f"the JSON member lacks {name!r}")
    _check_prompt(record["prompt"])
    _check_text(record["chosen"], "chosen")
    _check_text(record["rejected"], "rejected")
    if record["chosen"].strip() == record["rejected"].strip():
        raise SampleError("chosen is equal to rejected: nothing to prefer")
    for name, check in _PROVENANCE.items():
        if name in record:
            check(record[name], name)
    return record


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to plain RGB, the way it is meant to be seen.

    EXIF orientation is applied, transparency is composited on white, 16-bit greys are rescaled. The file's content
    decides, whatever its name says. Metadata that cannot be read is passed over with Pillow's warning: the picture is
    then as it is stored, which is how viewers show it.

    Args:
        data: the image file.

    Returns:
        The picture, RGB, without metadata.

    Raises:
        SampleError: if it is another format, broken, truncated, animated, larger than :data:`MAX_PIXELS`, more
            elongated than :data:`MAX_ASPECT_RATIO`, or of more than :data:`MAX_SCANS` scans.
    """
    with warnings.catch_warnings():
        # Too many pixels are refused below, before anything is decompressed.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = _open_image(data)
            _check_picture(picture)
            # Pillow lets a PNG pass whose end is cut off.
            if picture.format == "PNG" and _PNG_END not in data:
                raise SampleError("not a readable JPEG, PNG or WebP image: the PNG is truncated")
            if picture.format in ("JPEG", "MPO") and len(_JPEG_SCAN.findall(data)) > MAX_SCANS:
                raise SampleError(f"the JPEG has more than {MAX_SCANS} scans, and would take very long to decode")
            return to_rgb(picture)
        # Too little memory says nothing of the image: a good sample would be dropped.
        except (SampleError, MemoryError):
            raise
        # Pillow's decoders raise almost any type on broken input; each means that this image cannot be read.
        except Exception as error:
            raise SampleError(f"not a readable JPEG, PNG or WebP image: {error or type(error).__name__}") from error


def image_extension(data: bytes) -> ImageFormat:
    """File extension that fits the content of an image file.

    Args:
        data: the image file.

    Returns:
        ``jpg``, ``png`` or ``webp``.

    Raises:
        SampleError: if it is none of them.
    """
    try:
        return _EXTENSIONS[_open_image(data).format or ""]
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"not a readable JPEG, PNG or WebP image: {error or type(error).__name__}") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file as :func:`decode_image` would return it, from its header alone.

    An orientation that a PNG tells behind its pixels is not seen.

    Args:
        data: the image file.

    Returns:
        Width and height in pixels, orientation applied.

    Raises:
        SampleError: if it is no JPEG, PNG or WebP file, or larger than is allowed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = _open_image(data)
            _check_picture(picture)
            width, height = picture.size
            # Pillow decodes a whole PNG in search of metadata behind its pixels.
            has_metadata = picture.format != "PNG" or "exif" in picture.info
            is_turned = has_metadata and picture.getexif().get(ExifTags.Base.Orientation) in _TURNED
            return (height, width) if is_turned else (width, height)
        except SampleError:
            raise
        # As in decode_image: any error of Pillow's means that this image cannot be read.
        except Exception as error:
            raise SampleError(f"not a readable JPEG, PNG or WebP image: {error or type(error).__name__}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as plain RGB: orientation applied, transparency on white, 16-bit greys rescaled, no metadata.

    Args:
        picture: any picture that a JPEG, PNG or WebP file can hold.

    Returns:
        A new RGB picture.

    Raises:
        SampleError: if its pixels have no faithful 8-bit form (32-bit integers, floats, keyed 16-bit transparency).
    """
    _check_mode(picture)
    picture.load()
    # Which Pillow would copy also where nothing is to be turned.
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I;16":
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    picture.info = {}
    return picture


def encode_image(picture: Image.Image, image_format: ImageFormat) -> bytes:
    """An image file of a picture, in plain RGB.

    Args:
        picture: any picture that :func:`to_rgb` takes.
        image_format: ``png`` and ``webp`` without loss, ``jpg`` at quality 95.

    Raises:
        SampleError: as :func:`to_rgb`.
    """
    buffer = io.BytesIO()
    to_rgb(picture).save(buffer, **_SAVE_OPTIONS[image_format])
    return buffer.getvalue()


# ---- members


def _split_members(members: Mapping[str, bytes]) -> tuple[str, dict[str, bytes]]:
    parts: dict[str, bytes] = {}
    keys = set()
    for name, data in members.items():
        try:
            key, part = split_member_name(name)
        except ValueError as error:
            raise SampleError(str(error)) from error
        keys.add(key)
        parts[part] = data
    if missing := missing_parts(parts):
        raise SampleError(f"missing member {', '.join(missing)}")
    if len(keys) > 1 or len(parts) > len(IMAGE_PARTS) + 1:
        raise SampleError(f"expected one image, one retrieved image and one JSON of one key, got {sorted(members)}")
    return keys.pop(), parts


def _named(part: str, function: Callable[[bytes], Any], data: bytes) -> Any:
    """``function(data)``, its error naming the member."""
    try:
        return function(data)
    except SampleError as error:
        raise SampleError(f"{part}: {error}") from error


# ---- JSON


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r} occurs twice in one JSON object")
        result[name] = value
    return result


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether parsed JSON is nested more deeply than ``limit``; level by level, since recursion may not get there."""
    level = [value]
    for _ in range(limit + 1):
        lists = [item for item in level if isinstance(item, dict | list)]
        if not lists:
            return False
        level = [inner for item in lists for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _encode_record(sample: PreferenceSample) -> bytes:
    prompt = sample.prompt if isinstance(sample.prompt, str) else [dict(message) for message in sample.prompt]
    record = {"prompt": prompt, "chosen": sample.chosen, "rejected": sample.rejected}
    if clash := sorted(record.keys() & sample.provenance.keys()):
        raise SampleError(f"provenance must not hold {clash}: these are fields of the sample itself")
    try:
        text = json.dumps({**record, **sample.provenance}, ensure_ascii=False, allow_nan=False, sort_keys=True)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(f"prompt, responses and provenance must be plain JSON values: {error}") from error


def _check_plain(value: Any, where: str) -> None:
    """Refuse null, NUL characters and lone surrogates anywhere in parsed JSON."""
    if value is None:
        raise SampleError(f"{where} is null; leave the field out instead")
    if isinstance(value, str):
        if "\0" in value:
            raise SampleError(f"{where} holds a NUL character")
        if _SURROGATE.search(value):
            raise SampleError(f"{where} holds a lone surrogate, which is no character")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_plain(name, f"a name in {where}")
            _check_plain(item, f"{name!r}")
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, f"an item of {where}")


def _check_prompt(prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
        return
    if not isinstance(prompt, list) or not prompt:
        raise SampleError(f"prompt must be a text or a non-empty list of chat messages, got {_kind(prompt)}")
    for message in prompt:
        _check_message(message)
    if prompt[-1]["role"] != "user":
        raise SampleError(f"prompt must end with the user's turn, got a last turn of {prompt[-1]['role']!r}")
    pictures = [part for message in prompt for part in _parts(message) if part["type"] == "image"]
    if len(pictures) > 1:
        raise SampleError(f"prompt must hold at most one image part, got {len(pictures)}")


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        found = sorted(message) if isinstance(message, dict) else _kind(message)
        raise SampleError(f"a chat message must have exactly the names role and content, got {found}")
    if message["role"] not in ("system", "user", "assistant"):
        raise SampleError(f"a chat message's role must be system, user or assistant, got {message['role']!r}")
    content = message["content"]
    if isinstance(content, str):
        _check_text(content, "a chat message's content")
        return
    if not isinstance(content, list):
        raise SampleError(f"a chat message's content must be a text or a list of parts, got {_kind(content)}")
    for part in content:
        # An exact form, because chat templates fetch what image parts name under `url` or `path`.
        is_image = part == {"type": "image"}
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not is_image and not is_text:
            raise SampleError(
                f'a content part must be {{"type": "image"}} or {{"type": "text", "text": ...}}, got {part!r}'
            )
        if is_text:
            _check_text(part["text"], "a text part")
    if not any(part["type"] == "text" for part in content):
        raise SampleError("a chat message must hold a text part, got none")


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message["content"] if isinstance(message["content"], list) else []


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise SampleError(f"{name} must be a text, got {_kind(value)}")
    if not value.strip():
        raise SampleError(f"{name} is empty")


def _check_id(value: Any, name: str) -> None:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise SampleError(f"{name} must be a text or an integer, got {_kind(value)}")


def _check_rank(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SampleError(f"{name} must be an integer of at least 0, got {value!r}")


def _check_number(value: Any, name: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SampleError(f"{name} must be a number, got {_kind(value)}")
    # Whole numbers have no limit in JSON, and those beyond a float's fail wherever they are used.
    if abs(value) > sys.float_info.max:
        raise SampleError(f"{name} is too large for a float")


def _check_masked(value: Any, name: str) -> None:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise SampleError(f"{name} must be a text or a list of texts, got {_kind(value)}")


_PROVENANCE: dict[str, Callable[[Any, str], None]] = {
    "image_id": _check_id,
    "retrieved_id": _check_id,
    "retrieval_rank": _check_rank,
    "retrieval_score": _check_number,
    "response_similarity": _check_number,
    "masked": _check_masked,
}


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"


# ---- images


def _open_image(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    # Its own message holds nothing but an address in memory.
    except UnidentifiedImageError as error:
        raise SampleError("not a readable JPEG, PNG or WebP image") from error


def _check_picture(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise SampleError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are allowed")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleError(f"{width} x {height} pixels are more elongated than {MAX_ASPECT_RATIO} : 1")
    # A JPEG with several pictures (MPO) is a photo with previews or depth; the first one is the photo.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise SampleError("the image is animated; store a single frame")


def _are_identical(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB pictures are the same; nearly all that are not differ in their middle row."""
    if first.size != second.size:
        return False
    middle = (0, first.height // 2, first.width, first.height // 2 + 1)
    return first.crop(middle).tobytes() == second.crop(middle).tobytes() and first.tobytes() == second.tobytes()


def _check_mode(picture: Image.Image) -> None:
    if picture.mode not in _MODES:
        raise SampleError(f"pixel mode {picture.mode!r} has no faithful RGB form; expected one of {_MODES}")
    if picture.mode == "I;16" and picture.has_transparency_data:
        raise SampleError("a 16-bit image with a transparent grey value is not supported")
