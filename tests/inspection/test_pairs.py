import base64
import io

import numpy as np
import pytest
from PIL import Image

from realign_lightning.data import ShardError, encode_members, scan_shard
from realign_lightning.inspection.pairs import find_samples, read_pair, spread
from realign_lightning.types import SampleError
from tests.data.helpers import good_members, picture, raw_members, sample, tar_bytes, write_shards, write_tar


def pair_of(folder, size: int = 384, known=(), **changes):
    path = write_tar(folder / "one.tar", [encode_members(sample(7, **changes))])
    return read_pair(scan_shard(path)[0], size, known)


def decoded(url: str) -> Image.Image:
    head, content = url.split(",")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert head == f"image/{image.format.lower()};base64"
    return image


def test_texts_and_provenance(tmp_path):
    record = pair_of(tmp_path, chosen="A cat .", rejected="A dog .").record
    assert (record["key"], record["shard"]) == ("000007", "one.tar")
    assert record["prompt"] == [["user", ["What is in picture 7 ?"]]]
    assert [tuple(piece) for piece in record["chosen"]] == [("A ", 0, -1), ("cat", 1, -1), (" .", 0, -1)]
    assert [tuple(piece) for piece in record["rejected"]] == [("A ", 0, -1), ("dog", 1, -1), (" .", 0, -1)]
    assert record["provenance"] == {"image_id": 7, "retrieval_rank": 1, "retrieval_score": 0.5, "masked": ["cat"]}
    assert record["sizes"] == {"image": [8, 6], "retrieved": [8, 6]}


def test_chat_prompts_keep_their_turns_and_the_place_of_the_image(tmp_path):
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]},
    ]
    assert pair_of(tmp_path, prompt=prompt).record["prompt"] == [["system", ["Be brief."]], ["user", ["Look:", []]]]


def test_masked_spans_count_characters_not_code_units(tmp_path):
    chosen = "\U0001f68c A red bus ."
    spans = [{"start": 4, "end": 7, "kind": "attribute"}, {"start": 8, "end": 11, "kind": "object"}]
    record = pair_of(tmp_path, chosen=chosen, rejected="\U0001f68c A red cat .", provenance={"spans": spans}).record
    masked = {record["kinds"][span]: text for text, _, span in record["chosen"] if span >= 0}
    assert masked == {"attribute": "red", "object": "bus"}
    assert record["problem"] == ""


@pytest.mark.parametrize(
    "spans",
    [
        "bus",
        ["bus"],
        [{"start": 0, "end": 3}],
        [{"start": 3, "end": 3, "kind": "object"}],
        [{"start": -1, "end": 3, "kind": "object"}],
        [{"start": 0, "end": 99, "kind": "object"}],
        [{"start": True, "end": 3, "kind": "object"}],
        [{"start": 0, "end": 3, "kind": 1}],
    ],
)
def test_spans_that_do_not_fit_are_said_and_not_marked(tmp_path, spans):
    record = pair_of(tmp_path, provenance={"spans": spans}).record
    assert all(span == -1 for _, _, span in record["chosen"])
    assert "Masked spans are not marked" in record["problem"]
    assert record["provenance"] == {"spans": spans}


def test_small_images_keep_every_pixel(tmp_path):
    pair = pair_of(tmp_path)
    assert (np.asarray(decoded(pair.pictures[pair.record["image"]])) == np.asarray(picture(14))).all()
    assert (np.asarray(decoded(pair.pictures[pair.record["retrieved"]])) == np.asarray(picture(15))).all()


def test_large_images_are_reduced_and_keep_their_shape(tmp_path):
    large = Image.linear_gradient("L").resize((1000, 500)).convert("RGB")
    pair = pair_of(tmp_path, image=large, size=200)
    thumbnail = decoded(pair.pictures[pair.record["image"]])
    assert thumbnail.size == (200, 100)
    expected = np.asarray(large.resize((200, 100)), dtype=float)
    assert abs(np.asarray(thumbnail, dtype=float) - expected).mean() < 2
    assert pair.record["sizes"]["image"] == [1000, 500]


def test_thumbnails_are_named_by_content_and_not_made_twice(tmp_path):
    first = pair_of(tmp_path)
    again = pair_of(tmp_path, known={first.record["image"]}, retrieved=picture(99))
    assert again.record["image"] == first.record["image"]
    assert again.record["retrieved"] != first.record["retrieved"]
    assert list(again.pictures) == [again.record["retrieved"]]


def test_bad_samples_are_errors_that_say_why(tmp_path):
    path = write_tar(tmp_path / "bad.tar", [raw_members(1, {"image.png": b"garbage"}), raw_members(2, {"json": None})])
    first, second = scan_shard(path)
    with pytest.raises(SampleError, match=r"image\.png: not a readable"):
        read_pair(first, 64)
    with pytest.raises(SampleError, match="missing member json"):
        read_pair(second, 64)


def test_shards_of_a_folder_with_an_index(tmp_path):
    write_shards(tmp_path, 10, samples_per_shard=4, built_with={"tau": 0.95})
    (tmp_path / "shard-000001.tar").unlink()
    (tmp_path / "shard-000002.tar").write_bytes(b"cut")
    (tmp_path / "other.tar").write_bytes(tar_bytes(good_members(99)))
    found = find_samples(tmp_path)
    assert [stored.key for stored in found.samples] == ["000000", "000001", "000002", "000003"]
    assert [(item.shard, item.key) for item in found.damaged] == [("shard-000001.tar", ""), ("shard-000002.tar", "")]
    assert "missing" in found.damaged[0].reason
    assert "not a whole uncompressed tar" in found.damaged[1].reason
    assert found.built_with == {str(tmp_path): {"tau": 0.95}}


def test_shards_of_an_interrupted_build_patterns_and_files(tmp_path):
    for name, number in (("b", 2), ("a", 1)):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(good_members(number)))
    expected = ["000001", "000002"]
    assert [stored.key for stored in find_samples(tmp_path).samples] == expected
    assert [stored.key for stored in find_samples(str(tmp_path / "*.tar")).samples] == expected
    assert [stored.key for stored in find_samples([tmp_path / "a.tar", tmp_path / "b.tar"]).samples] == expected


def test_no_shards(tmp_path):
    with pytest.raises(ShardError, match=r"neither an index\.json nor tar files"):
        find_samples(tmp_path)
    with pytest.raises(ShardError, match="does not exist"):
        find_samples(tmp_path / "none.tar")


def test_a_part_is_spread_evenly(tmp_path):
    path = write_shards(tmp_path, 10, samples_per_shard=10) / "shard-000000.tar"
    stored = scan_shard(path)
    assert [item.key for item in spread(stored, 4)] == ["000000", "000002", "000005", "000007"]
    assert spread(stored, 100) == stored
    assert spread([], 5) == []
