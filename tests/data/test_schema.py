import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from realign_lightning.data.schema import (
    MAX_PIXELS,
    decode_image,
    decode_sample,
    encode_members,
    image_extension,
    load_json,
    parse_record,
    split_member_name,
    to_rgb,
)
from realign_lightning.types import SampleError
from tests.data.helpers import picture, raw_members, sample

RECORD = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def file_of(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_with_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class TestNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("000001.json", ("000001", "json")),
            ("a-B_9.image.jpg", ("a-B_9", "image.jpg")),
            ("x.retrieved.webp", ("x", "retrieved.webp")),
        ],
    )
    def test_contract_names(self, name, expected):
        assert split_member_name(name) == expected

    @pytest.mark.parametrize(
        "name",
        [
            "a.b.image.png",
            "a/b.json",
            "../a.json",
            "a\\b.json",
            ".json",
            "a.image.gif",
            "a.image.jpeg",
            "a.image",
            "a.pyd",
            "a.pickle",
            "a.json.gz",
            "a.json\n",
            "é.json",
            f"{'k' * 81}.json",
        ],
    )
    def test_other_names_are_refused(self, name):
        with pytest.raises(ValueError, match="is none of"):
            split_member_name(name)


class TestRoundTrip:
    @pytest.mark.parametrize("image_format", ["png", "webp"])
    def test_lossless(self, image_format):
        before = sample(3)
        after = decode_sample(encode_members(before, image_format))
        assert after.image.tobytes() == before.image.tobytes()
        assert after.retrieved.tobytes() == before.retrieved.tobytes()
        for field in ("key", "prompt", "chosen", "rejected", "provenance"):
            assert getattr(after, field) == getattr(before, field)

    def test_jpeg_is_close(self):
        gradient = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3)))
        members = encode_members(sample(0, image=gradient), "jpg")
        assert sorted(members) == ["000000.image.jpg", "000000.json", "000000.retrieved.jpg"]
        difference = np.abs(np.asarray(decode_sample(members).image, int) - np.asarray(gradient, int))
        assert difference.max() <= 3

    def test_chat_messages(self):
        prompt = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
        ]
        assert decode_sample(encode_members(sample(0, prompt=prompt))).prompt == prompt

    @pytest.mark.parametrize("text", ["\U0001f431 sits", "قطة على الأريكة", "猫"])
    def test_any_script(self, text):
        assert decode_sample(encode_members(sample(0, chosen=text))).chosen == text

    def test_further_fields_are_kept(self):
        provenance = {"image_id": "COCO_1", "source": {"data": "mine", "turn": 2}}
        assert decode_sample(encode_members(sample(0, provenance=provenance))).provenance == provenance

    def test_original_files_pass_through(self):
        original = file_of(picture(9), "JPEG", quality=60)
        members = encode_members(sample(0), "png", image=original)
        assert members["000000.image.jpg"] == original
        assert "000000.retrieved.png" in members

    def test_equal_samples_give_equal_bytes(self):
        assert encode_members(sample(5)) == encode_members(sample(5))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"key": "a.b"}, "no dots"),
            ({"key": ""}, "no dots"),
            ({"chosen": " "}, "chosen is empty"),
            ({"chosen": "same", "rejected": "same"}, "equal to rejected"),
            ({"chosen": "\ud800"}, "plain JSON"),
            ({"provenance": {"retrieval_score": float("nan")}}, "plain JSON"),
            ({"provenance": {"image": np.int64(1)}}, "plain JSON"),
            ({"provenance": {"chosen": "x"}}, "must not hold"),
            ({"retrieved": picture(0)}, "identical"),
            ({"image": Image.new("F", (8, 8))}, "pixel mode 'F'"),
            ({"context": (picture(3),)}, "1 more"),
        ],
    )
    def test_the_encoder_refuses_what_the_decoder_would(self, changes, reason):
        with pytest.raises(SampleError, match=reason):
            encode_members(sample(0, **changes))

    def test_unknown_format(self):
        with pytest.raises(ValueError, match=r"image_format must be one of .* got 'gif'"):
            encode_members(sample(0), "gif")


class TestMembers:
    @pytest.mark.parametrize("part", ["image.png", "retrieved.png", "json"])
    def test_missing(self, part):
        with pytest.raises(SampleError, match=f"missing member {part.split('.')[0]}"):
            decode_sample(raw_members(0, {part: None}))

    def test_two_images(self):
        with pytest.raises(SampleError, match="expected one image"):
            decode_sample(raw_members(0, {"image.jpg": file_of(picture(0), "JPEG")}))

    def test_two_keys(self):
        members = raw_members(0, {"json": None}) | {"other.json": json.dumps(RECORD).encode()}
        with pytest.raises(SampleError, match="of one key"):
            decode_sample(members)

    def test_the_broken_member_is_named(self):
        with pytest.raises(SampleError, match=r"retrieved\.png: not a readable"):
            decode_sample(raw_members(0, {"retrieved.png": b"garbage"}))

    def test_identical_images_in_different_formats(self):
        same = file_of(picture(0), "WEBP", lossless=True)
        with pytest.raises(SampleError, match="identical"):
            decode_sample(raw_members(0, {"retrieved.png": None, "retrieved.webp": same}))


class TestRecord:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b'{"prompt": "\xff"}', "utf-8"),
            (json.dumps(RECORD).encode("utf-16"), "utf-8"),
            (json.dumps(RECORD).encode("utf-16-le"), "cannot be read"),
            (json.dumps(RECORD).encode("utf-8-sig"), "BOM"),
            (b'{"prompt": "a", "prompt": "b"}', "twice"),
            (b'{"prompt": NaN}', "NaN is not"),
            (b'{"prompt": -Infinity}', "Infinity is not"),
            (b'{"prompt": 1e999}', "too large"),
            (b"", "cannot be read"),
            (b"{", "cannot be read"),
            (b"[" * 100_000, "nested too deeply"),
            (b"[]", "must be an object"),
            (b"null", "must be an object"),
        ],
    )
    def test_not_strict_json(self, data, reason):
        with pytest.raises(SampleError, match=reason):
            parse_record(data)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"chosen": None}, "'chosen' is null"),
            ({"provenance": [{"a": None}]}, "'a' is null"),
            ({"chosen": "a\0b"}, "'chosen' holds a NUL"),
            ({"a\0": 1}, "name in the JSON member holds a NUL"),
            ({"chosen": "\ud800 x"}, "lone surrogate"),
            ({"chosen": ""}, "chosen is empty"),
            ({"rejected": " \n"}, "rejected is empty"),
            ({"prompt": ""}, "prompt is empty"),
            ({"chosen": 3}, "chosen must be a text, got int '3'"),
            ({"rejected": "A cat. "}, "chosen is equal to rejected"),
            ({"prompt": []}, "non-empty list"),
            ({"prompt": {"role": "user"}}, "prompt must be a text or"),
            ({"prompt": ["hello"]}, "role and content"),
            ({"prompt": [{"role": "user"}]}, "role and content"),
            ({"prompt": [{"role": "tool", "content": "x"}]}, "role must be system"),
            ({"prompt": [{"role": "assistant", "content": "x"}]}, "end with the user"),
            ({"prompt": [{"role": "user", "content": ""}]}, "content is empty"),
            ({"prompt": [{"role": "user", "content": 1}]}, "text or a list of parts"),
            ({"prompt": [{"role": "user", "content": []}]}, "must hold a text part"),
            ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "must hold a text part"),
            ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]}, "content part"),
            ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "content part"),
            (
                {"prompt": [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}]}]},
                "at most one image part, got 2",
            ),
            ({"image_id": 1.5}, "image_id must be"),
            ({"retrieved_id": True}, "retrieved_id must be"),
            ({"retrieval_rank": "1"}, "retrieval_rank must be"),
            ({"retrieval_rank": -1}, "retrieval_rank must be"),
            ({"retrieval_score": "high"}, "retrieval_score must be"),
            ({"response_similarity": False}, "response_similarity must be"),
            ({"masked": [1]}, "masked must be"),
        ],
    )
    def test_breaks_the_contract(self, changes, reason):
        with pytest.raises(SampleError, match=reason):
            parse_record(json.dumps(RECORD | changes).encode())

    @pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
    def test_missing_field(self, name):
        record = {key: value for key, value in RECORD.items() if key != name}
        with pytest.raises(SampleError, match=f"lacks '{name}'"):
            parse_record(json.dumps(record).encode())

    def test_paired_surrogate_escapes_are_one_character(self):
        assert load_json(b'"\\ud83d\\udc31"') == "\U0001f431"


class TestImages:
    @pytest.mark.parametrize(("image_format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
    def test_content_decides(self, image_format, extension):
        data = file_of(picture(0), image_format)
        assert image_extension(data) == extension
        assert decode_image(data).mode == "RGB"

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"garbage" * 100,
            b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            file_of(picture(0), "GIF"),
            file_of(picture(0), "BMP"),
            file_of(Image.new("F", (8, 8)), "TIFF"),
            file_of(Image.new("I", (8, 8)), "TIFF"),
        ],
        ids=["empty", "garbage", "svg", "eps", "gif", "bmp", "float", "int32"],
    )
    def test_other_content_is_refused(self, data):
        with pytest.raises(SampleError, match="not a readable JPEG, PNG or WebP"):
            decode_image(data)
        with pytest.raises(SampleError, match="not a readable JPEG, PNG or WebP"):
            image_extension(data)

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_every_cut_is_refused(self, image_format):
        data = file_of(picture(0, (24, 24)), image_format)
        for length in range(0, len(data), 1 if len(data) < 800 else 7):
            with pytest.raises(SampleError):
                decode_image(data[:length])
        with pytest.raises(SampleError):
            decode_image(data[:-1])

    def test_flipped_png_byte_is_refused(self):
        data = bytearray(file_of(picture(0), "PNG"))
        data[len(data) // 2] ^= 8
        with pytest.raises(SampleError, match="not a readable"):
            decode_image(bytes(data))

    def test_16_bit_is_rescaled(self):
        """0, 257, 32896 = 128 * 257 and 65535 = 255 * 257 are 0, 1, 128 and 255 of 8 bits."""
        values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
        image = decode_image(file_of(Image.fromarray(values), "PNG"))
        assert np.asarray(image)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]

    def test_16_bit_with_a_transparent_grey_is_refused(self):
        values = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
        with pytest.raises(SampleError, match="16-bit"):
            decode_image(file_of(values, "PNG", transparency=0))

    def test_transparency_is_composited_on_white(self):
        """Half transparent black on white is 255 * (1 - 128/255) = 127; hidden red is white."""
        image = Image.new("RGBA", (3, 1))
        image.putdata([(255, 0, 0, 0), (0, 0, 0, 128), (10, 20, 30, 255)])
        for data in (file_of(image, "PNG"), file_of(image, "WEBP", lossless=True, exact=True)):
            assert np.asarray(decode_image(data))[0].tolist() == [[255] * 3, [127] * 3, [10, 20, 30]]

    def test_transparent_palette_entry_is_white(self):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        assert np.asarray(decode_image(file_of(image, "PNG", transparency=0)))[0].tolist() == [[255] * 3, [0, 0, 255]]

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA"])
    def test_few_colours(self, mode):
        image = Image.new("L", (4, 4), 255).convert(mode)
        assert np.asarray(decode_image(file_of(image, "PNG"))).min() == 255

    def test_cmyk(self):
        image = decode_image(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
        red, green, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
        assert red > 240
        assert max(green, blue) < 15

    @pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
    def test_animation_is_refused(self, image_format):
        data = file_of(picture(0), image_format, save_all=True, append_images=[picture(1)], duration=100)
        with pytest.raises(SampleError, match="animated"):
            decode_image(data)

    def test_photo_with_a_second_picture_is_its_first(self):
        first = Image.new("RGB", (16, 16), (200, 30, 30))
        data = file_of(first, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 255))])
        assert np.abs(np.asarray(decode_image(data), int) - np.asarray(first, int)).max() < 5

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
    def test_exif_orientation_is_applied_once(self, image_format):
        """Orientation 6: the stored left half (black) belongs on top."""
        image = Image.fromarray(np.repeat(np.array([[0] * 16 + [255] * 16], dtype=np.uint8), 16, axis=0)).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6
        upright = decode_image(file_of(image, image_format, exif=exif))
        assert upright.size == (16, 32)
        assert np.asarray(upright)[:12].mean() < 20
        assert np.asarray(upright)[-12:].mean() > 235
        again = decode_image(file_of(upright, image_format))
        assert again.size == (16, 32)

    def test_orientation_of_a_given_picture_is_applied(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = Image.open(io.BytesIO(file_of(picture(0, (8, 6)), "PNG", exif=exif)))
        assert decode_sample(encode_members(sample(0, image=stored))).image.size == (6, 8)

    def test_one_pixel(self):
        assert decode_image(file_of(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (255, 0, 0)

    def test_elongated(self):
        assert decode_image(file_of(Image.new("RGB", (400, 2)), "PNG")).size == (400, 2)
        with pytest.raises(SampleError, match="402 x 2 pixels are more elongated"):
            decode_image(file_of(Image.new("RGB", (402, 2)), "PNG"))

    @pytest.mark.parametrize("side", [12_000, 20_000])
    @pytest.mark.filterwarnings("error")
    def test_too_many_pixels(self, side):
        with pytest.raises(SampleError, match=r"pixels"):
            decode_image(png_with_header(side, side))

    def test_the_pixel_cap_is_below_pillows(self):
        assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS

    def test_metadata_is_dropped(self):
        data = file_of(picture(0), "PNG", icc_profile=b"x" * 200)
        assert decode_image(data).info == {}

    def test_given_picture_is_not_changed(self):
        image = picture(0)
        image.info["note"] = "mine"
        assert to_rgb(image) is not image
        assert image.info == {"note": "mine"}
