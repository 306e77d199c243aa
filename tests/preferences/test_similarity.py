import sys

import pytest
import torch

from realign_lightning.preferences import SentenceSimilarity, WordOverlap
from tests.tiny_models import make_tiny_sentence_encoder


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


def test_identity_is_the_model_not_its_place(tmp_path):
    folders = [make_tiny_sentence_encoder(tmp_path / name) for name in ("one", "two", "three")]
    with (folders[2] / "modules.json").open("a") as file:
        file.write(" ")
    one, two, three = (SentenceSimilarity(str(folder)).identity for folder in folders)
    assert one == two != three
    assert SentenceSimilarity("a/b").identity != SentenceSimilarity("a/b", revision="c").identity


def test_sentence_similarity_names_the_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"realign-lightning\[build\]"):
        SentenceSimilarity().compare(["a"], ["b"])
