import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from realign_lightning.backbones import AutoBackbone
from realign_lightning.data.sources.base import ImageFile
from realign_lightning.preferences.near_duplicates import distorted_copies, perceptual_hash
from realign_lightning.preferences.retrieval.encoders import PolicyEncoder, TimmEncoder
from realign_lightning.preferences.retrieval.retriever import Retriever
from realign_lightning.preferences.retrieval.store import EmbeddingStore, StoredVectors, content_hashes, embed_missing
from tests.conftest import picture
from tests.preferences.test_retrieve_ranks import Projection, png, smooth

IDENTITY = {"encoder": "test"}


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def vectors(count, dimension=4, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(folder, numbers, dimension=4, rank=0):
    store = EmbeddingStore(folder, IDENTITY, rank)
    for number in numbers:
        store.add([key(number)], vectors(1, dimension, number), [number + 2**63])
    store.close()
    return store


def test_what_was_added_comes_back(tmp_path):
    """From several files, hashes that end in zero bytes included."""
    filled(tmp_path, range(3), rank=0)
    filled(tmp_path, range(3, 5), rank=1)
    odd = ["00" * 32, "ff" + "00" * 31, "00" * 31 + "01"]
    store = EmbeddingStore(tmp_path, IDENTITY)
    store.add(odd, vectors(3, seed=9), [1, 2, 3])
    assert store.missing([*odd, key(0), key(7)]) == {key(7)}
    store.refresh()
    rows = store.rows([key(4), odd[1], odd[0], key(0), key(4), odd[2]])
    expected = np.concatenate([vectors(1, seed=4), vectors(3, seed=9)[[1, 0]], vectors(1, seed=0), vectors(1, seed=4)])
    assert store.vectors(rows)[:5].tolist() == expected.tolist()
    assert store.hashes(rows).tolist() == [2**63 + 4, 2, 1, 2**63, 2**63 + 4, 3]
    assert len(store) == 8
    assert rows[0] == rows[4]


def test_other_identities_are_never_mixed_in(tmp_path):
    filled(tmp_path, range(2))
    other = EmbeddingStore(tmp_path, {**IDENTITY, "revision": 2})
    assert other.missing([key(0)]) == {key(0)}
    assert other.folder != EmbeddingStore(tmp_path, IDENTITY).folder
    with pytest.raises(ValueError, match="identity"):
        embed_missing(other, Projection(), [], {})


def test_a_record_that_was_cut_is_left_out(tmp_path):
    store = filled(tmp_path, range(3))
    (file,) = store.folder.glob("*.vectors")
    whole = file.read_bytes()
    assert len(whole) == 3 * (32 + 8 + 4 * 4)
    for cut in (1, 16, 55):
        file.write_bytes(whole[:-cut])
        again = EmbeddingStore(tmp_path, IDENTITY)
        assert again.missing([key(0), key(1), key(2)]) == {key(2)}
        assert again.vectors(again.rows([key(1)])).tolist() == vectors(1, seed=1).tolist()
    file.write_bytes(whole[:10])
    assert len(EmbeddingStore(tmp_path, IDENTITY)) == 0


def test_damage_is_named(tmp_path):
    store = filled(tmp_path, range(3))
    (file,) = store.folder.glob("*.vectors")
    data = bytearray(file.read_bytes())
    data[56 + 40 : 56 + 56] = bytes(16)
    file.write_bytes(data)
    again = EmbeddingStore(tmp_path, IDENTITY)
    assert len(again.vectors(again.rows([key(0), key(2)]))) == 2
    with pytest.raises(ValueError, match=f"{file.name} is damaged.*is zero"):
        again.vectors(again.rows([key(0), key(1)]))
    facts = json.loads((store.folder / "store.json").read_text())
    for text in ("{", "[]", json.dumps({**facts, "encoder": {}}), json.dumps({**facts, "dimension": 0})):
        (store.folder / "store.json").write_text(text)
        with pytest.raises(ValueError, match="remove"):
            EmbeddingStore(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("rows", "hashes", "message"),
    [
        (np.zeros((1, 4), np.float32), [1], "is zero"),
        (np.full((1, 4), np.nan, np.float32), [1], "not finite"),
        (np.full((1, 4), np.inf, np.float32), [1], "not finite"),
        (np.ones((1, 4), np.float32), [1], "length 2"),
        (vectors(2), [1, 2], "embeddings"),
        (vectors(1), [], "hashes"),
        (vectors(1, dimension=5), [1], "of 4 numbers, got 5"),
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path, rows, hashes, message):
    store = filled(tmp_path, range(1))
    with pytest.raises(ValueError, match=message):
        store.add([key(7)], rows, hashes)
    assert len(EmbeddingStore(tmp_path, IDENTITY)) == 1


def test_what_is_not_there_is_named(tmp_path):
    store = filled(tmp_path, range(2))
    store.refresh()
    with pytest.raises(KeyError, match=f"1 of 2.*{key(5)}"):
        StoredVectors(store, [key(0), key(5)])
    contents = {"a": key(0), "b": key(1)}
    with pytest.raises(KeyError, match="'c'"):
        list(Retriever().neighbours(store, contents, ["a", "c"]))


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The second write takes half of its record and fails, as on a full disk; the third goes on in another file."""
    store = EmbeddingStore(tmp_path, IDENTITY)
    store.add([key(0)], vectors(1, seed=0), [0])
    whole = store._file

    class Full:
        def write(self, data):
            whole.write(bytes(data)[:20])
            raise OSError(28, "No space left on device")

        close = whole.close

    store._file = Full()
    with pytest.raises(OSError, match="No space left"):
        store.add([key(1)], vectors(1, seed=1), [1])
    store.add([key(2)], vectors(1, seed=2), [2])
    store.refresh()
    assert store.missing([key(0), key(1), key(2)]) == {key(1)}
    assert store.vectors(store.rows([key(0), key(2)])).tolist() == [*vectors(1).tolist(), *vectors(1, seed=2).tolist()]


# ---- images


class Broken(Projection):
    """Gives NaN for dark pictures, zero for bright ones."""

    def embed(self, images):
        embeddings = super().embed(images)
        for row, image in enumerate(images):
            level = np.asarray(image).mean()
            embeddings[row] *= float("nan") if level < 20 else 0.0 if level > 235 else 1.0
        return embeddings


def test_images_that_cannot_be_embedded_are_named_and_lose_nothing_else(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    good = {f"good{number}": png(smooth(number)) for number in range(10)}
    images = [
        ImageFile("gone", path=tmp_path / "gone.jpg"),
        ImageFile("text", path=tmp_path / "text.jpg"),
        ImageFile("text again", path=tmp_path / "text.jpg"),
        ImageFile("dark", data=png(Image.new("RGB", (9, 9), (1, 2, 3)))),
        ImageFile("bright", data=png(Image.new("RGB", (9, 9), (250, 255, 255)))),
        *(ImageFile(name, data=data) for name, data in good.items()),
        ImageFile("good0", data=good["good1"]),
        ImageFile("good1", data=good["good1"]),
    ]
    contents, problems = content_hashes(images)
    assert [(problem.where, problem.reason.split(":")[0]) for problem in problems] == [
        ("gone", f"the image file {tmp_path / 'gone.jpg'} cannot be read"),
        ("good0", "another image has the same image_id"),
    ]
    store = EmbeddingStore(tmp_path, Broken.identity)
    for _ in range(2):
        encoder = Broken()
        reasons = {problem.where: problem.reason for problem in embed_missing(store, encoder, images, contents)}
        assert set(reasons) == {"text", "text again", "dark", "bright"}
        assert "not a readable" in reasons["text"] == reasons["text again"]
        assert reasons["dark"] == "its embedding is not finite"
        assert reasons["bright"] == "its embedding is zero"
    kept = {name: content for name, content in contents.items() if name.startswith("good")}
    assert {name: len(row) for name, row in Retriever(top_k=20).neighbours(store, kept)} == dict.fromkeys(good, 9)


def test_an_encoder_that_never_works_is_an_error(tmp_path):
    images = [ImageFile("dark", data=png(Image.new("RGB", (9, 9), (1, 2, 3))))]
    contents, _ = content_hashes(images)
    with pytest.raises(ValueError, match="weights are broken"):
        embed_missing(EmbeddingStore(tmp_path, Broken.identity), Broken(), images, contents)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_after_it_was_hashed_is_named(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(smooth(0)))
    images = [ImageFile("picture", path=path), ImageFile("other", data=png(smooth(1)))]
    contents, _ = content_hashes(images)
    path.write_bytes(png(smooth(2)))
    (problem,) = embed_missing(EmbeddingStore(tmp_path, Projection.identity), Projection(), images, contents)
    assert (problem.where, problem.reason) == ("picture", "the image file has changed since it was hashed: start again")


def retrieve(folder, images, **settings):
    encoder = Projection()
    contents, _ = content_hashes(images)
    store = EmbeddingStore(folder, encoder.identity)
    embed_missing(store, encoder, images, contents)
    return dict(Retriever(**settings).neighbours(store, contents)), store, contents


def test_near_duplicates_are_left_out_and_the_next_take_their_places(tmp_path):
    pictures = [smooth(number, (128, 96)) for number in range(30)]
    images = [ImageFile(f"image{number:02}", data=png(each)) for number, each in enumerate(pictures)]
    copies = {f"{name}00": copy for name, copy in distorted_copies(pictures[0]).items() if name != "crop"}
    images += [ImageFile(name, data=png(copy)) for name, copy in copies.items()]
    near = {
        name for name, copy in copies.items() if (perceptual_hash(copy) ^ perceptual_hash(pictures[0])).bit_count() <= 6
    }
    assert near == copies.keys()
    plain, *_ = retrieve(tmp_path, images, top_k=4, hash_distance=None)
    assert {other.image_id for other in plain["image00"][:3]} == copies.keys()
    without, *_ = retrieve(tmp_path, images, top_k=4)
    expected = retrieve(tmp_path, images, top_k=99, hash_distance=None)[0]["image00"][3:]
    assert without["image00"] == expected[:4]
    by_band, *_ = retrieve(tmp_path, images, top_k=4, hash_distance=None, max_similarity=plain["image00"][2].score)
    assert by_band["image00"] == expected[:4]


def test_calibration_finds_an_end_between_copies_and_neighbours(tmp_path):
    images = [ImageFile(f"image{number:02}", data=png(smooth(number, (128, 96)))) for number in range(40)]
    found, store, contents = retrieve(tmp_path, images)
    band = Retriever().calibrate(store, contents, images, Projection(), sample=20)
    assert max(row[0].score for row in found.values()) < band.max_similarity < 1
    assert (band.lost, band.caught) == (0, pytest.approx(0.99, abs=0.011))


def test_a_single_image_has_no_neighbours(tmp_path):
    found, *_ = retrieve(tmp_path, [ImageFile("only", data=png(smooth(0)))])
    assert found == {"only": []}
    assert dict(Retriever().neighbours(EmbeddingStore(tmp_path / "none", IDENTITY), {})) == {}


def test_more_images_are_added_to_a_store(tmp_path):
    images = [ImageFile(f"image{number:02}", data=png(smooth(number))) for number in range(20)]
    retrieve(tmp_path, images[:16])
    encoder = Projection()
    contents, _ = content_hashes(images)
    store = EmbeddingStore(tmp_path, encoder.identity)
    embed_missing(store, encoder, images, contents)
    assert list(map(len, encoder.batches)) == [4]
    store.refresh()
    assert len(store) == 20


# ---- encoders


def test_policy_encoder_is_the_vision_tower(tiny_llava):
    backbone = AutoBackbone(str(tiny_llava))
    encoder = PolicyEncoder(backbone, batch_size=2)
    images = [picture(seed) for seed in range(3)]
    model = backbone.load_model()
    torch.testing.assert_close(encoder.embed(images), backbone.embed_images(model, images), rtol=0, atol=0)
    assert not encoder.model.training
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    assert encoder.identity["weights"] == PolicyEncoder(AutoBackbone(str(tiny_llava)), model).identity["weights"]


def test_timm_encoder_is_timms_model(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = TimmEncoder("test_vit", checkpoint_path=str(tmp_path / "weights.safetensors"))
    images = [picture(seed, (60, 40)) for seed in range(3)]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    with torch.no_grad():
        features = model.forward_head(
            model.forward_features(torch.stack(list(map(transform, images)))), pre_logits=True
        )
    expected = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoder.embed(images), expected, rtol=1e-5, atol=1e-6)
    assert json.loads(json.dumps(encoder.identity)) == encoder.identity
    same = TimmEncoder("test_vit", checkpoint_path=str(tmp_path / "weights.safetensors"), batch_size=1)
    other = TimmEncoder("test_vit", pretrained=False)
    assert encoder.identity == same.identity != other.identity
    with pytest.raises(RuntimeError, match="Missing key"):
        TimmEncoder("test_resnet", checkpoint_path=str(tmp_path / "weights.safetensors")).embed(images)


def test_timm_encoder_names_the_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"realign-lightning\[build\]"):
        TimmEncoder().embed([picture(0)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmEncoder(batch_size=0), "batch_size"),
        (lambda: Retriever(top_k=0), "top_k"),
        (lambda: Retriever(flat_limit=0), "flat_limit"),
        (lambda: Retriever(min_similarity=0.9, max_similarity=0.5), "max_similarity"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
