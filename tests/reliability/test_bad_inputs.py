"""Every bad input of the catalogue, by its row: an error before training, a sample in quarantine, or handled.

Where webdataset or Pillow lets something pass without a word, the test shows that, too, so that it cannot pass for
another reason.
"""

import dataclasses
import io
import json
import pickle
import re
import resource
import shutil
import struct
import sys
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import webdataset
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from realign_lightning.backbones import AutoBackbone, LoRA
from realign_lightning.cli import run
from realign_lightning.data import (
    BadDataError,
    DualPreferenceDataModule,
    EpochSampler,
    ShardDataset,
    ShardError,
    ShardWriter,
)
from realign_lightning.data.convert import main as convert_main
from realign_lightning.data.schema import decode_image, decode_sample, encode_members
from realign_lightning.modules import RDPOModule
from realign_lightning.types import PreferenceSample, SampleError
from tests.conftest import preference_samples
from tests.data.helpers import (
    Recorder,
    WordBackbone,
    good_members,
    picture,
    raw_members,
    sample,
    tar_bytes,
    write_shards,
    write_tar,
)
from tests.data.test_remote import serving
from tests.data.test_resume import Stop
from tests.reliability.bad_shards import (
    KEYS,
    bad_tar,
    headers,
    module,
    mounted,
    quarantined,
    raw,
    raw_keys,
    read_only,
    refused,
    shard,
    shown_by_pillow,
    special_member,
    trained,
    trainer,
)
from tests.test_cli import fit_args, tiny
from tests.tiny_models import make_tiny

RECORD = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
TWO = good_members(0, 1)


def record(**changes) -> bytes:
    return json.dumps({**RECORD, **changes}).encode()


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestShards:
    def test_01_cut_at_a_member_boundary(self, tmp_path):
        data = tar_bytes(TWO)
        path = shard(tmp_path, data[: headers(data)[3].offset])
        assert raw_keys(path) == ["000000"], "webdataset loses a sample"
        assert "bad-shard.tar is cut" in refused(tmp_path, path)

    def test_02_cut_inside_a_header(self, tmp_path):
        data = tar_bytes(TWO)
        path = shard(tmp_path, data[: headers(data)[3].offset + 300])
        assert raw_keys(path) == ["000000"]
        assert "bad-shard.tar" in refused(tmp_path, path)

    def test_03_one_header_byte_flipped(self, tmp_path):
        data = bytearray(tar_bytes(good_members(0, 1, 2)))
        data[headers(bytes(data))[3].offset + 3] ^= 1
        path = shard(tmp_path, bytes(data))
        assert raw_keys(path) == ["000000"], "the rest vanishes"
        assert "bad-shard.tar" in refused(tmp_path, path)

    def test_04_cut_between_members_of_one_sample(self, tmp_path):
        data = tar_bytes(TWO)
        path = shard(tmp_path, data[: headers(data)[5].offset])
        assert [sorted(item)[-2:] for item in raw(path)][1] == ["image.png", "retrieved.png"]
        assert "bad-shard.tar is cut" in refused(tmp_path, path)

    def test_05_cut_inside_data(self, tmp_path):
        data = tar_bytes(TWO)
        assert "bad-shard.tar" in refused(tmp_path, shard(tmp_path, data[: headers(data)[4].offset_data + 20]))

    def test_06_a_bit_flip_that_still_decodes(self, tmp_path):
        """b and c differ in one bit."""
        path = write_shards(tmp_path, 2) / "shard-000000.tar"
        path.write_bytes(path.read_bytes().replace(b"A cat and 1 dogs", b"A bat and 1 dogs"))
        assert raw(path, "pil")[1]["json"]["chosen"] == "A bat and 1 dogs ."
        for source in (tmp_path, path):
            assert "shard-000000.tar differs from its index in SHA-256" in refused(tmp_path, source)

    def test_07_zero_bytes(self, tmp_path):
        assert "bad-shard.tar is empty" in refused(tmp_path, shard(tmp_path, b""))

    @pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>404</title>", b"<html>" * 1000], ids=["short", "long"])
    def test_08_an_error_page(self, tmp_path, page):
        assert "bad-shard.tar is not a whole uncompressed tar" in refused(tmp_path, shard(tmp_path, page))

    def test_09_interleaved_samples(self, tmp_path):
        pairs = zip(good_members(0), good_members(1), strict=True)
        path = shard(tmp_path, tar_bytes([member for pair in pairs for member in pair]))
        assert raw_keys(path) == ["000000", "000001"] * 3, "six samples of one member each"
        message = refused(tmp_path, path)
        assert "bad-shard.tar" in message
        assert "'000000' are not side by side" in message

    def test_10_adjacent_duplicate_key(self, tmp_path):
        message = refused(tmp_path, shard(tmp_path, tar_bytes(good_members(0, 0))))
        assert "bad-shard.tar: duplicate key '000000'" in message

    def test_11_distant_duplicate_key(self, tmp_path):
        path = shard(tmp_path, tar_bytes(good_members(0, 1, 0)))
        assert raw_keys(path) == ["000000", "000001", "000000"]
        message = refused(tmp_path, path)
        assert "bad-shard.tar" in message
        assert "'000000'" in message

    def test_11_duplicate_key_in_another_shard(self, tmp_path):
        paths = [write_shards(tmp_path / name, 1) / "shard-000000.tar" for name in "ab"]
        message = refused(tmp_path, paths)
        assert "duplicate key '000000'" in message
        assert all(str(path) in message for path in paths)

    def test_12_dots_in_a_key(self, tmp_path):
        members = [(name.replace("00000", "a.", 1), data) for name, data in TWO]
        path = shard(tmp_path, tar_bytes(members))
        assert raw_keys(path) == ["a"], "two samples become one"
        message = refused(tmp_path, path)
        assert "bad-shard.tar: member 'a.0.image.png'" in message
        assert "no dots" in message

    def test_13_unknown_extension(self, tmp_path):
        path = shard(tmp_path, tar_bytes([*good_members(0), ("000000.pyd", pickle.dumps({"loaded": True}))]))
        assert raw(path, "pil")[0]["pyd"] == {"loaded": True}, "webdataset unpickles it"
        message = refused(tmp_path, path)
        assert "bad-shard.tar" in message
        assert "'000000.pyd'" in message

    @pytest.mark.parametrize("part", ["image.png", "retrieved.png", "json"])
    def test_14_a_missing_member(self, tmp_path, caplog, part):
        quarantined(tmp_path, caplog, {part: None}, f"missing member {part.split('.')[0]}")

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE], ids=["link", "fifo", "hard"])
    def test_15_a_member_that_is_no_file(self, tmp_path, kind):
        path = shard(tmp_path, special_member(kind))
        if kind != tarfile.LNKTYPE:
            assert "json" not in raw(path)[1], "webdataset passes it over"
        assert "bad-shard.tar: member '000001.json' is a link" in refused(tmp_path, path)

    def test_16_a_pattern_that_matches_nothing(self, tmp_path):
        assert list(tmp_path.glob("*.tar")) == [], "what most scripts hand to a loader"
        assert "*.tar' matches no file" in refused(tmp_path, tmp_path / "*.tar")

    def test_16_a_pattern_that_is_not_expanded(self, tmp_path):
        write_shards(tmp_path, 6)
        message = refused(tmp_path, tmp_path / "shard-{000000..000001}.tar")
        assert "brace ranges are not expanded" in message
        _, keys = trained(tmp_path, tmp_path / "shard-*.tar")
        assert keys == KEYS[:6]

    def test_17_no_shards(self, tmp_path):
        assert "no shards" in refused(tmp_path, [])
        assert "has no index.json" in refused(tmp_path, tmp_path)

    def test_18_fewer_shards_than_workers(self, tmp_path):
        _, keys = trained(tmp_path, write_shards(tmp_path / "train", 6, 6), num_workers=3)
        assert keys == KEYS[:6]

    def test_21_an_error_inside_a_shard_does_not_drop_its_tail(self, tmp_path, caplog):
        path = bad_tar(tmp_path / "a.tar", [3], {"image.png": b"garbage"})
        stopping = {"handler": webdataset.ignore_and_stop}
        read = webdataset.WebDataset(str(path), shardshuffle=False, **stopping).decode("pil", **stopping)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            assert [item["__key__"] for item in read] == KEYS[:3]
        quarantined(tmp_path, caplog, {"image.png": b"garbage"}, "image.png: not a readable")


JSON_ROWS = [
    pytest.param({"json": record().replace(b"cat", b"c\xff")}, "utf-8", id="23 not UTF-8"),
    pytest.param({"json": record(a="x" * 8).decode().encode("utf-16")}, "utf-8", id="24 UTF-16"),
    pytest.param({"json": record().decode().encode("utf-16-le")}, "cannot be read", id="24 UTF-16 without a mark"),
    pytest.param({"json": record().decode().encode("utf-8-sig")}, "BOM", id="24 byte order mark"),
    pytest.param({"json": record()[:-1] + b', "chosen": "A bird."}'}, "'chosen' occurs twice", id="25 duplicate keys"),
    pytest.param({"json": record(retrieval_score=float("nan"))}, "NaN is not a JSON number", id="26 NaN"),
    pytest.param({"json": record(retrieval_score=float("-inf"))}, "Infinity is not", id="26 Infinity"),
    pytest.param({"json": record(chosen=None)}, "'chosen' is null", id="27 null"),
    pytest.param({"json": record(image_id=None)}, "'image_id' is null", id="27 null provenance"),
    pytest.param({"json": b"[" + record() + b"]"}, "must be an object, got list", id="28 a list"),
    pytest.param({"json": record(chosen="\ud800 cat")}, "lone surrogate", id="29 lone surrogate"),
    pytest.param({"json": record(chosen="a\0cat")}, "NUL", id="30 NUL"),
    pytest.param({"json": record(prompt=" \n")}, "prompt is empty", id="32 empty prompt"),
    pytest.param({"json": record(chosen="")}, "chosen is empty", id="32 empty chosen"),
    pytest.param({"json": record(rejected="\t")}, "rejected is empty", id="32 empty rejected"),
    pytest.param({"json": record(rejected="A cat. ")}, "chosen is equal to rejected", id="33 equal responses"),
]

PASSED_SILENTLY = [row for row in JSON_ROWS if row.id[:2] in ("24", "25", "26", "27", "29") and "without" not in row.id]


class TestText:
    @pytest.mark.parametrize(("changes", "reason"), JSON_ROWS)
    def test_is_skipped_by_name(self, tmp_path, caplog, changes, reason):
        quarantined(tmp_path, caplog, changes, reason)

    @pytest.mark.parametrize(("changes", "reason"), PASSED_SILENTLY)
    def test_webdataset_lets_it_pass(self, tmp_path, changes, reason):
        path = write_tar(tmp_path / "a.tar", [raw_members(0, changes)])
        (item,) = raw(path, "pil")
        assert set(RECORD) <= set(item["json"])

    @pytest.mark.parametrize(
        "text", ["\U0001f431\u200d\U0001f680 sits", "قطة على الأريكة", "\u202eright to left", "猫 🏳️‍🌈"], ids=ascii
    )
    def test_31_any_script(self, tmp_path, text):
        members = [encode_members(sample(number, chosen=f"{text} {number}")) for number in range(2)]
        data, keys = trained(tmp_path, write_tar(tmp_path / "a.tar", members))
        assert keys == KEYS[:2]
        assert [decode_sample(one).chosen for one in members] == [f"{text} 0", f"{text} 1"]
        assert data.skipped["train"] == ()

    def test_38_retrieved_image_identical_to_the_image(self, tmp_path, caplog):
        """Also where it is another file."""
        quarantined(
            tmp_path,
            caplog,
            lambda number: {
                "retrieved.png": None,
                "retrieved.webp": file_of(picture(2 * number), "WEBP", lossless=True),
            },
            "identical",
        )


def png(width: int, height: int) -> bytes:
    """A small PNG file that says it is of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
FLOATS = Image.fromarray(np.array([[0.5, 70000.0]] * 4, dtype=np.float32))
MOVING = {"save_all": True, "append_images": [picture(1)], "duration": 100}

IMAGE_ROWS = [
    pytest.param(b"garbage" * 50, "not a readable", id="39 garbage"),
    pytest.param(SVG, "not a readable", id="39 SVG"),
    pytest.param(EPS, "not a readable", id="39 EPS"),
    pytest.param(file_of(picture(0), "GIF"), "not a readable", id="39 GIF"),
    pytest.param(file_of(picture(0))[:-30], "not a readable", id="40 truncated PNG"),
    pytest.param(file_of(picture(0), "JPEG")[:-30], "not a readable", id="40 truncated JPEG"),
    pytest.param(file_of(picture(0), "WEBP", lossless=True)[:-30], "not a readable", id="40 truncated WebP"),
    pytest.param(file_of(FLOATS, "TIFF"), "not a readable", id="42 float"),
    pytest.param(file_of(Image.new("I", (8, 8), 70000), "TIFF"), "not a readable", id="42 32-bit"),
    pytest.param(file_of(picture(0), "PNG", **MOVING), "animated", id="46 moving PNG"),
    pytest.param(file_of(picture(0), "WEBP", **MOVING), "animated", id="46 moving WebP"),
    pytest.param(file_of(Image.new("RGB", (402, 2))), "402 x 2 pixels are more elongated", id="49 aspect ratio"),
    pytest.param(png(20_000, 20_000), "pixels", id="50 decompression bomb"),
    pytest.param(png(12_000, 12_000), "12000 x 12000 pixels are more than", id="51 very large"),
]


class TestImages:
    @pytest.mark.parametrize(("data", "reason"), IMAGE_ROWS)
    @pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
    def test_is_skipped_by_name(self, tmp_path, caplog, data, reason):
        quarantined(tmp_path, caplog, {"retrieved.png": data}, reason)

    def test_39_content_decides_not_the_name(self, tmp_path):
        """A WebP named .png is a WebP."""
        data = file_of(picture(9), "WEBP", lossless=True)
        _, keys = trained(tmp_path, bad_tar(tmp_path / "a.tar", [3], {"image.png": data}))
        assert keys == KEYS

    def test_42_pillow_clips_floats(self):
        assert shown_by_pillow(file_of(FLOATS, "TIFF"))[0].tolist() == [[0] * 3, [255] * 3]

    def test_46_pillow_shows_the_first_frame(self):
        for kind in ("PNG", "WEBP"):
            data = file_of(picture(0), kind, **{**MOVING, "lossless": True})
            assert shown_by_pillow(data).tolist() == np.asarray(picture(0)).tolist()

    def test_51_pillow_only_warns(self):
        with pytest.warns(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(png(12_000, 12_000)))
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(png(20_000, 20_000)))

    def check(self, tmp_path, data: bytes, expected: np.ndarray) -> None:
        """The image reaches the batch as it should be; 8 x 8 pictures pass through the backbone unchanged."""
        path = write_tar(tmp_path / "a.tar", [raw_members(0, {"image.png": None, "image.jpg": data})])
        dataset, keys = trained(tmp_path, path)
        assert keys == ["000000"]
        (batch,) = dataset.train_dataloader()
        assert batch.images["pixels"][0].permute(1, 2, 0).numpy().tolist() == expected.astype(float).tolist()
        assert decode_image(data).size == expected.shape[1::-1]

    def test_41_16_bit(self, tmp_path):
        """0 to 65535 in steps of 257 is 0 to 255; Pillow alone shows nearly all of it white."""
        ramp = np.arange(0, 256, 4).reshape(8, 8)
        data = file_of(Image.fromarray((ramp * 257).astype(np.uint16)))
        assert np.mean(shown_by_pillow(data) == 255) > 0.9
        self.check(tmp_path, data, np.repeat(ramp[:, :, None], 3, axis=2))

    def test_43_transparency_that_hides_a_colour(self, tmp_path):
        hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        hidden.paste((0, 0, 255, 255), (0, 0, 4, 8))
        expected = np.full((8, 8, 3), 255)
        expected[:, :4] = (0, 0, 255)
        assert shown_by_pillow(file_of(hidden))[0, 7].tolist() == [255, 0, 0], "Pillow shows what nobody sees"
        self.check(tmp_path, file_of(hidden), expected)

    def test_44_cmyk(self, tmp_path):
        """Full magenta and yellow ink is red; the file is its own inverse, as Adobe writes it."""
        data = file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
        seen = np.asarray(decode_image(data)).astype(int)
        assert np.abs(seen - (255, 0, 0)).max() <= 2
        self.check(tmp_path, data, seen)

    def test_45_palette(self, tmp_path):
        indexed = Image.new("P", (8, 8), 1)
        indexed.putpalette([9, 9, 9, 0, 200, 0])
        self.check(tmp_path, file_of(indexed), np.tile([0, 200, 0], (8, 8, 1)))

    def test_47_exif_orientation(self, tmp_path):
        """Orientation 6: what is stored on the left belongs on top."""
        stored = np.zeros((8, 8, 3), dtype=np.uint8)
        stored[:, :4] = 255
        exif = Image.Exif()
        exif[0x0112] = 6
        data = file_of(Image.fromarray(stored), "PNG", exif=exif)
        assert shown_by_pillow(data)[:, 0].min() == 255, "Pillow shows it lying"
        self.check(tmp_path, data, stored.transpose(1, 0, 2))


FAMILIES = ("llava", "qwen2_5_vl", "internvl", "gemma3", "janus", "idefics3", "smolvlm")
"""Families whose tokenizers have tokens that a text could spell."""


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory) -> AutoBackbone:
    return AutoBackbone(str(make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)))


def short_sample(**changes) -> PreferenceSample:
    return dataclasses.replace(preference_samples(1)[0], **changes)


def spelled_tokens(backbone: AutoBackbone) -> list[str]:
    """Special tokens but the image's; a mask is what builders of pairs write."""
    tokenizer = backbone.tokenizer
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(tokens - {backbone.processor.image_token, tokenizer.mask_token})


def count(backbone: AutoBackbone, view, token_id: int) -> int:
    return int((view.tokens["input_ids"] == token_id).sum())


class TestTokens:
    @pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
    def test_34_the_image_token_in_the_text(self, backbone, field):
        token = backbone.processor.image_token
        number = backbone.tokenizer.convert_tokens_to_ids(token)
        assert number in backbone.tokenizer(f"a {token} b")["input_ids"], "the tokenizer takes it for one"
        with pytest.raises(SampleError, match=rf"contains the image token {re.escape(repr(token))} as text"):
            backbone.encode_sample(short_sample(**{field: f"what {token} is it?"}))

    def test_34_the_token_of_a_video_in_the_text(self, backbone):
        """What a processor would put a video for is refused; elsewhere it is plain text."""
        token = getattr(backbone.processor, "video_token", None)
        if token is not None:
            with pytest.raises(SampleError, match=rf"{re.escape(repr(token))} as text"):
                backbone.encode_sample(short_sample(prompt=f"what {token} is it?"))
            return
        plain = backbone.tokenizer("<video>", add_special_tokens=False)["input_ids"]
        assert len(plain) > 1
        encoded = backbone.encode_sample(short_sample(prompt="what <video> is it?"))
        assert len(encoded.chosen.tokens["input_ids"]) > len(plain)

    @pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
    def test_35_other_special_tokens_in_the_text(self, backbone, field):
        """None reaches the model as itself."""
        tokens = spelled_tokens(backbone)
        assert tokens
        for token in tokens:
            number = backbone.tokenizer.convert_tokens_to_ids(token)
            assert number in backbone.tokenizer(f"a {token} b", add_special_tokens=False)["input_ids"]
            with pytest.raises(SampleError, match=rf"contains the special token {re.escape(repr(token))} as text"):
                backbone.encode_sample(short_sample(**{field: f"what {token} is it?"}))

    def test_36_a_response_that_is_too_long_is_cut_and_the_image_is_not(self, backbone):
        whole = backbone.encode_sample(short_sample(chosen="a red bus. " * 40))
        # The two pictures may take different numbers of tokens.
        longest = max(int((~view.response_mask).sum()) for view in (whole.chosen, whole.visual))
        limited = AutoBackbone(backbone.path, max_length=longest + 5)
        cut = limited.encode_sample(short_sample(chosen="a red bus. " * 40))
        for name in ("chosen", "visual"):
            before, after = getattr(whole, name), getattr(cut, name)
            assert after.truncated == int(before.response_mask.sum()) - int(after.response_mask.sum()) > 0
            assert len(after.tokens["input_ids"]) <= longest + 5
            images = count(backbone, after, backbone.image_token_id)
            assert images == count(backbone, before, backbone.image_token_id) > 0
        assert int(cut.chosen.response_mask.sum()) == int(cut.visual.response_mask.sum())

    def test_37_no_response_token_left(self, backbone):
        whole = backbone.encode_sample(short_sample())
        longest = max(int((~view.response_mask).sum()) for view in (whole.chosen, whole.visual))
        with pytest.raises(SampleError, match="leaves no response token within max_length"):
            AutoBackbone(backbone.path, max_length=longest).encode_sample(short_sample())

    def test_48_one_pixel(self, backbone):
        """All of them enlarge it."""
        encoded = backbone.encode_sample(short_sample(image=Image.new("RGB", (1, 1), "red")))
        assert count(backbone, encoded.chosen, backbone.image_token_id) > 0


class TestTokensOnTheWay:
    """What the rows above refuse is skipped by name in a real run, and what is cut is counted."""

    def run(self, tmp_path, tiny_llava, samples, max_length=None, **options):
        with ShardWriter(tmp_path / "shards") as writer:
            for one in samples:
                writer.write(one)
        backbone = AutoBackbone(str(tiny_llava), max_length=max_length)
        data = DualPreferenceDataModule(backbone, str(tmp_path / "shards"), batch_size=4, **options)
        recorder = Recorder()
        trainer(tmp_path).fit(recorder, datamodule=data)
        return data, sorted(key for _, _, key, weight in recorder.seen if weight)

    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param({"chosen": "a <image> b"}, id="34 image token"),
            pytest.param({"prompt": "what </s> is it?"}, id="35 special token"),
            pytest.param({"prompt": "is it a bus? " * 200}, id="37 nothing left"),
        ],
    )
    def test_is_skipped_by_name(self, tmp_path, tiny_llava, caplog, bad):
        first, *rest = preference_samples(8)
        data, keys = self.run(tmp_path, tiny_llava, [dataclasses.replace(first, **bad), *rest], max_length=600)
        assert keys == [one.key for one in rest]
        (skip,) = data.skipped["train"]
        assert (skip.shard, skip.key) == ("shard-000000.tar", "sample0")
        assert f"shard-000000.tar: sample0 ({skip.reason})" in caplog.text
        assert json.loads((tmp_path / "quarantine.jsonl").read_text())["key"] == "sample0"
        two = [dataclasses.replace(one, **bad) for one in (first, rest[0])]
        (tmp_path / "more").mkdir()
        with pytest.raises(BadDataError, match="2 of 8 samples are bad"):
            self.run(tmp_path / "more", tiny_llava, [*two, *rest[1:]], max_length=600)

    def test_36_what_is_cut_is_counted(self, tmp_path, tiny_llava, caplog):
        first, *rest = preference_samples(4)
        samples = [dataclasses.replace(first, rejected="a red bus. " * 200), *rest]
        data, keys = self.run(tmp_path, tiny_llava, samples, max_length=600)
        assert keys == [one.key for one in samples]
        assert data.truncated["train"] == {"sample0"}
        assert "are cut at their end (first: sample0)" in caplog.text

    def test_19_more_ranks_than_shards(self, tmp_path):
        """One shard, five samples, four ranks: each sample counts once, and all ranks take equally many steps."""
        write_shards(tmp_path, 5, 5)
        read = ShardDataset(tmp_path, WordBackbone())
        ranks = [list(EpochSampler(len(read), world_size=4, rank=rank)) for rank in range(4)]
        assert {len(items) for items in ranks} == {2}
        items = [read[item] for rank in ranks for item in rank]
        assert sorted(item.key for item in items if item.weight) == KEYS[:5]

    def test_20_an_interrupted_download_is_retried(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr("realign_lightning.data.remote.time.sleep", lambda _: None)
        write_shards(tmp_path / "there", 6, 3)
        with serving(tmp_path / "there") as server:
            server.trouble = {"shard-000001.tar": ["cut", "error"]}
            _, keys = trained(tmp_path, server.address, cache_dir=str(tmp_path / "cache"))
        assert keys == KEYS[:6]
        assert "shard-000001.tar: attempt 1" in caplog.text

    def test_20_a_download_that_stays_interrupted(self, tmp_path, monkeypatch):
        monkeypatch.setattr("realign_lightning.data.remote.time.sleep", lambda _: None)
        write_shards(tmp_path / "there", 6, 6)
        with serving(tmp_path / "there") as server:
            server.trouble = {"shard-000000.tar": ["cut"] * 99}
            data = module(server.address, cache_dir=str(tmp_path / "cache"))
            with pytest.raises(ShardError, match=r"shard-000000\.tar could not be fetched"):
                trainer(tmp_path).fit(Recorder(), datamodule=data)
        assert not list((tmp_path / "cache").glob("*.tar")), "what came of it is no shard"

    def test_22_a_manifest_that_changed_before_a_resume(self, tmp_path):
        folder = write_shards(tmp_path / "train", 8)
        stop = Stop(tmp_path / "a.ckpt", 2)
        trainer(tmp_path, callbacks=[stop]).fit(Recorder(), datamodule=module(folder))
        write_shards(folder, 7, overwrite=True)
        recorder = Recorder()
        with pytest.raises(ValueError, match="manifest was"):
            trainer(tmp_path).fit(recorder, datamodule=module(folder), ckpt_path=tmp_path / "a.ckpt")
        assert recorder.seen == []


class Watched(RDPOModule):
    """Tells whether training began."""

    steps = 0

    def training_step(self, batch, batch_idx):
        type(self).steps += 1
        return super().training_step(batch, batch_idx)


CHECKPOINTS = {"enable_checkpointing": True, "max_steps": 1}


class TestEnvironment:
    """Each is an error before training, on the way that a user takes: the Trainer, or the command line."""

    @pytest.fixture
    def args(self, tmp_path, tiny_llava, monkeypatch) -> list[str]:
        with ShardWriter(tmp_path / "shards") as writer:
            for one in preference_samples(4):
                writer.write(one)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("realign_lightning.modules.RDPOModule", Watched)
        Watched.steps = 0
        yield fit_args(tiny(str(tmp_path / "shards"), tiny_llava))
        assert Watched.steps == 0, "training began"

    @pytest.fixture
    def parts(self, tmp_path, tiny_llava):
        """A module and its data."""
        with ShardWriter(tmp_path / "shards") as writer:
            for one in preference_samples(4):
                writer.write(one)
        backbone = AutoBackbone(str(tiny_llava))
        Watched.steps = 0
        yield Watched(backbone, adapter=LoRA(r=2)), DualPreferenceDataModule(backbone, str(tmp_path / "shards"))
        assert Watched.steps == 0, "training began"

    def test_52_disk_full_for_checkpoints(self, tmp_path, parts, monkeypatch):
        model, data = parts
        with mounted(tmp_path / "disk", "size=20k") as is_there:
            if not is_there:
                full = shutil.disk_usage(tmp_path)._replace(free=16_000)
                monkeypatch.setattr("shutil.disk_usage", lambda _: full)
            saving = ModelCheckpoint(dirpath=tmp_path / "disk" / "checkpoints")
            with pytest.raises(OSError, match="disk/checkpoints has 0 MiB left, and a checkpoint of this run takes"):
                trainer(tmp_path, callbacks=[saving], **CHECKPOINTS).fit(model, datamodule=data)

    def test_52_disk_full_for_shards(self, tmp_path):
        """Files of this process may not grow beyond 100 KB, which is how any system can play a full disk."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                write_shards(tmp_path / "out", 400, 400)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "shard-000000.tar" in str(error.value)
        assert list((tmp_path / "out").iterdir()) == [], "nothing half-written stays"
        assert "has no index.json" in refused(tmp_path, tmp_path / "out")

    def test_53_read_only_folder_for_checkpoints(self, tmp_path, parts):
        model, data = parts
        with read_only(tmp_path / "fixed") as folder:
            saving = ModelCheckpoint(dirpath=folder / "checkpoints")
            with pytest.raises(OSError, match="fixed/checkpoints, and nothing can be"):
                trainer(tmp_path, callbacks=[saving], **CHECKPOINTS).fit(model, datamodule=data)

    def test_53_read_only_folder_for_shards_and_logs(self, tmp_path, args):
        with read_only(tmp_path / "fixed") as folder:
            with pytest.raises(OSError, match="fixed"):
                ShardWriter(folder / "shards")
            with pytest.raises(SystemExit, match="fixed"):
                convert_main([str(tmp_path / "shards"), str(folder / "out")])
            with pytest.raises(OSError, match="fixed"):
                run([*args, "--trainer.default_root_dir", str(folder / "run")])

    def test_54_missing_optional_package(self, tmp_path, args, monkeypatch):
        for name in ("pyarrow", "pyarrow.parquet", "s3fs"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit, match=r"Parquet files need pyarrow.*realign-lightning\[build\]"):
            convert_main([str(tmp_path / "shards"), str(tmp_path / "out"), "--to", "parquet"])
        with pytest.raises(ShardError, match=r"s3://bucket/shards/index\.json .*install realign-lightning\[remote\]"):
            run([*args, "--data.train", "s3://bucket/shards"])

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            pytest.param({"model_type": "yet_unknown"}, "yet_unknown", id="55 unknown class"),
            pytest.param({"model_type": "clip"}, "image-text-to-text model, got 'clip'", id="55 unsupported class"),
            pytest.param({"model_type": "florence2"}, "is an encoder-decoder", id="56 encoder-decoder"),
            pytest.param({"model_type": "llama"}, "image-text-to-text model, got 'llama'", id="57 text only"),
        ],
    )
    def test_another_model(self, tmp_path, tiny_llava, args, config, reason):
        shutil.copytree(tiny_llava, tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=reason) as error:
            run([*args, "--model.backbone.init_args.path", str(tmp_path / "other")])
        assert str(tmp_path / "other") in str(error.value)

    def test_58_global_batch_that_is_not_divisible(self, args):
        batches = ["--data.batch_size", "2", "--data.global_batch_size", "3"]
        with pytest.raises(ValueError, match=r"global_batch_size=3 is not divisible by batch_size=2 x 1 ranks"):
            run([*args, *batches])

    def test_59_a_checkpoint_of_another_backbone(self, tmp_path, tiny_llava, args, monkeypatch):
        monkeypatch.setattr("realign_lightning.modules.RDPOModule", RDPOModule)
        run(args)
        monkeypatch.setattr("realign_lightning.modules.RDPOModule", Watched)
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        other = make_tiny("llava_next_vicuna", tmp_path / "other")
        swapped = [*args, "--model.backbone.init_args.path", str(other), "--ckpt_path", str(checkpoint)]
        with pytest.raises(ValueError, match=r"other settings: model\.backbone\.init_args\.path was .*/other' is"):
            run(swapped)

    def test_60_a_recipe_with_an_unknown_key(self, tmp_path, args, capsys):
        (tmp_path / "mistake.yaml").write_text("data:\n  shufle: true\n")
        with pytest.raises(SystemExit) as stop:
            run([*args, "--config", "mistake.yaml"])
        assert stop.value.code == 2
        assert "shufle" in capsys.readouterr().err


def rows_tested() -> set[int]:
    """Numbers at the beginning of the names of tests, or of their parameters' ids."""
    found: set[int] = set()
    for case in (item for item in globals().values() if isinstance(item, type) and item.__name__.startswith("Test")):
        for name, function in vars(case).items():
            numbers = re.findall(r"^test_(\d\d)_", name)
            for mark in getattr(function, "pytestmark", []):
                values = mark.args[1] if mark.name == "parametrize" else []
                numbers += [value.id[:2] for value in values if getattr(value, "id", None)]
            found |= {int(number) for number in numbers}
    return found


def test_every_row_of_the_catalogue_has_a_test():
    assert rows_tested() == set(range(1, 61))
