import pytest
import torch
import torch.nn.functional as F

from realign_lightning.backbones import AutoBackbone
from realign_lightning.preferences import ImageIndex, embed_images
from tests.conftest import picture


def test_neighbours_equal_a_full_sort_by_cosine():
    vectors = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = [f"image{i:02}" for i in range(40)]
    cosines = vectors @ vectors.T
    for own, row in enumerate(ImageIndex(ids, vectors).neighbours(top_k=5)):
        others = sorted((other for other in range(40) if other != own), key=lambda other: -cosines[own, other])[:5]
        assert [neighbour.image_id for neighbour in row] == [ids[other] for other in others]
        assert [n.score for n in row] == pytest.approx([float(cosines[own, other]) for other in others], abs=1e-6)


def test_ties_are_broken_by_id_and_the_image_itself_never_returns():
    same = F.normalize(torch.ones(4, 3), dim=1)
    rows = ImageIndex(["d", "b", "a", "c"], same).neighbours(top_k=10)
    assert [[n.image_id for n in row] for row in rows] == [
        ["a", "b", "c"],
        ["a", "c", "d"],
        ["b", "c", "d"],
        ["a", "b", "d"],
    ]


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a"], torch.eye(2), "embeddings"),
        (["a", "a"], torch.eye(2), "once"),
        (["a", "b"], 2 * torch.eye(2), "normalised"),
    ],
)
def test_bad_embeddings_are_refused(ids, vectors, message):
    with pytest.raises(ValueError, match=message):
        ImageIndex(ids, vectors)
    with pytest.raises(ValueError, match="top_k"):
        ImageIndex(["a", "b"], torch.eye(2)).neighbours(0)


def test_embedding_in_batches_changes_nothing(tiny_llava):
    backbone = AutoBackbone(str(tiny_llava))
    model = backbone.load_model()
    images = [picture(seed) for seed in range(5)]
    torch.testing.assert_close(embed_images(backbone, model, images, 2), embed_images(backbone, model, images, 5))
