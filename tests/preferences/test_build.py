import json
import sys

import pytest
import torch
from PIL import Image

from realign_lightning.backbones import AutoBackbone
from realign_lightning.data import ShardDataset
from realign_lightning.preferences import (
    Inducer,
    LexiconMasker,
    PreferenceBuilder,
    SentenceSimilarity,
    SourceSample,
    WordOverlap,
)
from tests.conftest import picture

IMAGES = {f"image{number}": picture(number) for number in range(5)}
SAMPLES = [
    SourceSample(f"sample{number}", f"image{number}", "describe the image.", "a dog under the table.")
    for number in range(4)
]


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model()


class Scripted(Inducer):
    """Gives each rank the answers of a script; keeps what it was asked."""

    def __init__(self, *script: str) -> None:
        super().__init__()
        self.script, self.calls = list(script), []

    def complete(self, backbone, model, requests, description="induce"):
        self.calls.append(requests)
        return [self.script[len(self.calls) - 1]] * len(requests)


def builder(inducer: Inducer, **settings) -> PreferenceBuilder:
    return PreferenceBuilder(LexiconMasker(["dog", "table"]), inducer, **settings)


def test_ranks_are_tried_in_order_until_one_differs_enough(backbone, model):
    """Rank 0 repeats the response (1 >= tau); rank 1 shares 3 of 7 words (0.43 < 0.95) and is taken."""
    inducer = Scripted("a dog under the table.", "a bus under the laptop.", "never asked")
    pairs, report = builder(inducer).pairs(backbone, model, SAMPLES, IMAGES)
    assert len(inducer.calls) == 2
    assert [pair.key for pair in pairs] == [sample.key for sample in SAMPLES]
    for pair, at_rank_1 in zip(pairs, inducer.calls[1], strict=True):
        assert pair.rejected == "a bus under the laptop."
        assert pair.provenance["retrieval_rank"] == 1
        assert pair.provenance["retrieved_id"] != pair.provenance["image_id"]
        assert pair.retrieved is IMAGES[pair.provenance["retrieved_id"]] is at_rank_1.image
        assert pair.image is IMAGES[pair.provenance["image_id"]]
        assert pair.provenance["response_similarity"] == pytest.approx(3 / 7)
        assert pair.provenance["masked"] == "a [MASK] under the [MASK]."
    assert (report.pairs, report.exhausted, report.nothing_to_mask, report.mean_rank) == (4, 0, 0, 1.0)


def test_tau_is_a_strict_bound(backbone, model):
    """5 words each, 4 shared: 4 / 6."""
    inducer = Scripted(*["a dog under the laptop."] * 3)
    _, at_bound = builder(inducer, tau=4 / 6, top_k=3).pairs(backbone, model, SAMPLES, IMAGES)
    _, above = builder(Scripted("a dog under the laptop."), tau=4 / 6 + 1e-9).pairs(backbone, model, SAMPLES, IMAGES)
    assert (at_bound.pairs, at_bound.exhausted) == (0, 4)
    assert above.pairs == 4
    assert len(inducer.calls) == 3


def test_nothing_is_lost_without_a_count(backbone, model):
    samples = [*SAMPLES, SourceSample("plain", "image4", "describe the image.", "nothing to see.")]
    pairs, report = builder(Scripted(*["  "] * 10)).pairs(backbone, model, samples, IMAGES)
    assert pairs == []
    assert (report.nothing_to_mask, report.exhausted) == (1, 4)


def test_what_no_shard_could_hold_is_left_out_before_any_work(backbone, model, caplog):
    bad = [
        SourceSample("photo.jpg-0", "image0", "describe the image.", "a dog."),
        SourceSample("nul", "image0", "describe\0", "a dog."),
        SourceSample("empty", "image0", "describe the image.", " "),
        SourceSample("special", "image0", "describe the image.", "a dog </s> under the table."),
        SourceSample("narrow", "narrow", "describe the image.", "a dog."),
    ]
    images = {**IMAGES, "narrow": Image.new("RGB", (2, 1000)), "deep": Image.new("I", (8, 8))}
    inducer = Scripted("a cat.")
    pairs, report = builder(inducer, top_k=10).pairs(backbone, model, [*bad, SAMPLES[0]], images)
    assert [pair.key for pair in pairs] == ["sample0"]
    assert [len(requests) for requests in inducer.calls] == [1]
    assert (report.pairs, report.unusable, report.exhausted) == (1, 5, 0)
    for key in ("photo.jpg-0", "nul", "empty", "special", "narrow"):
        assert f"sample left out: {key} (" in caplog.text
    for image_id in ("narrow", "deep"):
        assert f"image left out of retrieval: {image_id} (" in caplog.text
    exhausted = builder(Scripted(*["a dog under the table."] * 10))
    exhausted.pairs(backbone, model, SAMPLES[:1], images)
    assert len(exhausted.inducer.calls) == len(IMAGES) - 1, "neither bad image was retrieved"


def test_completions_that_no_shard_could_hold_are_tried_on_the_next_image(backbone, model):
    pairs, _ = builder(Scripted("a \0 cat.", "a \ud800 cat.", "a cat.")).pairs(backbone, model, SAMPLES[:1], IMAGES)
    assert (pairs[0].rejected, pairs[0].provenance["retrieval_rank"]) == ("a cat.", 2)


def test_existing_shards_are_kept_unless_told(backbone, model, tmp_path):
    builder(Scripted("a cat.")).build(backbone, model, SAMPLES, IMAGES, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    inducer = Scripted("a bus.", *["a dog under the table."] * 10)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        builder(inducer).build(backbone, model, SAMPLES, IMAGES, tmp_path)
    assert inducer.calls == []
    with pytest.raises(ValueError, match="No pair came out"):
        builder(inducer, tau=0.0).build(backbone, model, SAMPLES, IMAGES, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    builder(Scripted("a bus.")).build(backbone, model, SAMPLES, IMAGES, tmp_path, overwrite=True)
    assert ShardDataset(str(tmp_path), backbone).decode(0).rejected == "a bus."


def test_an_image_with_the_same_pixels_is_passed_over(backbone, model):
    twins = {**IMAGES, "twin": IMAGES["image0"].copy()}
    pairs, _ = builder(Scripted("a cat.")).pairs(backbone, model, SAMPLES[:1], twins)
    assert pairs[0].provenance["retrieved_id"] not in ("twin", "image0")


def test_build_writes_shards_that_the_stream_reads(backbone, model, tmp_path):
    inducer = Inducer("infill", instruction="{masked}", fillers=["cat", "bus", "laptop"])
    report = builder(inducer).build(backbone, model, SAMPLES, IMAGES, tmp_path / "shards", {"made_from": "pictures"})
    dataset = ShardDataset(str(tmp_path / "shards"), backbone)
    assert report.pairs == len(dataset) == 4
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["built_with"]["made_from"] == "pictures"
    assert index["built_with"]["report"]["pairs"] == 4
    sample = dataset.decode(0)
    assert sample.provenance["image_id"] == "image0"
    assert sample.image.tobytes() == IMAGES["image0"].tobytes()
    assert sample.retrieved.tobytes() == IMAGES[sample.provenance["retrieved_id"]].tobytes()


@pytest.mark.parametrize(
    ("samples", "images", "message"),
    [
        ([SAMPLES[0], SAMPLES[0]], IMAGES, "key"),
        (SAMPLES, {"image0": IMAGES["image0"], "image1": IMAGES["image1"]}, "image2"),
        ([SAMPLES[0]], {"image0": IMAGES["image0"]}, "two images"),
    ],
)
def test_bad_sources_are_refused(backbone, model, samples, images, message):
    with pytest.raises(ValueError, match=message):
        builder(Scripted("a")).pairs(backbone, model, samples, images)


def test_word_overlap():
    assert WordOverlap().compare(["A b b", "", "x"], ["a b c", "", "y"]) == [2 / 4, 1.0, 0.0]
    with pytest.raises(ValueError, match="argument"):
        WordOverlap().compare(["a"], [])


def test_sentence_similarity_is_the_cosine_of_mean_pooled_embeddings(tmp_path):
    """Against plain transformers, on a tiny BERT made here."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "bus", "cat", "and"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).eval()
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), Pooling(16)]).save(str(tmp_path / "encoder"))

    def embed(text):
        with torch.inference_mode():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    first, second = ["a red bus", "a cat", "bus"], ["a red cat and a bus", "a cat", "red"]
    pairs = zip(first, second, strict=True)
    expected = [float(torch.cosine_similarity(embed(one), embed(two), 0)) for one, two in pairs]
    similarities = SentenceSimilarity(str(tmp_path / "encoder"), batch_size=2).compare(first, second)
    assert similarities == pytest.approx(expected, abs=1e-5)
    assert similarities[1] == pytest.approx(1)
    assert similarities[0] < 0.999


def test_sentence_similarity_names_the_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"realign-lightning\[build\]"):
        SentenceSimilarity().compare(["a"], ["b"])
