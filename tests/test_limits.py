"""Samples that do not fit, and images whose tokens and features differ in number: named, counted, never cut."""

import dataclasses
import logging
from itertools import count

import pytest
import torch
from lightning.pytorch import Trainer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from realign_lightning.backbones import AutoBackbone, LoRA, PaliGemmaBackbone
from realign_lightning.backbones.base import ImageTokenError
from realign_lightning.backbones.features import RowFeatures
from realign_lightning.data import BadDataError, DualPreferenceDataModule, ShardWriter
from realign_lightning.modules import RDPOModule
from realign_lightning.scoring import encode_batch_images, make_rows, padding_fraction, score
from realign_lightning.types import PreferenceBatch, PreferenceSample, SampleError, View
from tests.conftest import picture, preference_samples
from tests.tiny_models import FAMILIES, make_tiny

FIXED = ("llava", "janus", "gemma3", "paligemma")
"""Families in which every picture takes equally many tokens."""

SIZES = [(40, 32), (90, 32), (32, 70), (200, 150), (640, 480)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family, tmp_path_factory) -> AutoBackbone:
    folder = make_tiny(family, tmp_path_factory.mktemp("family") / family)
    return (PaliGemmaBackbone if family == "paligemma" else AutoBackbone)(str(folder))


def limited(backbone: AutoBackbone, max_length: int) -> AutoBackbone:
    return type(backbone)(backbone.path, max_length=max_length)


def sample_of(image: tuple[int, int], retrieved: tuple[int, int]) -> PreferenceSample:
    texts = ("is there a dog?", "a red bus stands beside two people.", "there are three apples.")
    return PreferenceSample("k", picture(1, image), picture(2, retrieved), *texts)


def prompt_length(view) -> int:
    return int((~view.response_mask).sum())


def image_tokens(backbone, view) -> int:
    return int((view.tokens["input_ids"] == backbone.image_token_id).sum())


class TestMaxLength:
    def test_one_response_token_is_the_least(self, backbone):
        """A prompt that fills max_length is an error; with one token more it is kept whole, and so is its image."""
        sample = sample_of((90, 32), (32, 70))
        whole = backbone.encode_sample(sample)
        views = {name: getattr(whole, name) for name in ("chosen", "rejected", "visual")}
        longest = max(prompt_length(view) for view in views.values())
        with pytest.raises(
            SampleError, match=f"takes {longest} tokens.*no response token within max_length={longest};"
        ):
            limited(backbone, longest).encode_sample(sample)
        cut = limited(backbone, longest + 1).encode_sample(sample)
        kept = {name: int(getattr(cut, name).response_mask.sum()) for name in views}
        assert kept["chosen"] == kept["visual"] == 1
        assert kept["rejected"] == min(
            longest + 1 - prompt_length(whole.rejected), int(whole.rejected.response_mask.sum())
        )
        for name, view in views.items():
            ids = getattr(cut, name).tokens["input_ids"]
            assert ids.tolist() == view.tokens["input_ids"][: len(ids)].tolist()
            assert image_tokens(backbone, getattr(cut, name)) == image_tokens(backbone, view) > 0

    def test_image_tokens_alone_are_too_many(self, backbone):
        sample = sample_of((90, 32), (90, 32))
        number = image_tokens(backbone, backbone.encode_sample(sample).chosen)
        with pytest.raises(SampleError) as error:
            limited(backbone, number - 1).encode_sample(sample)
        assert f"{number} of them image tokens" in str(error.value)
        assert "raise max_length" in str(error.value)
        assert "max_pixels" in str(error.value)

    def test_the_retrieved_image_alone_does_not_fit(self, family, backbone):
        lengths = {size: prompt_length(backbone.encode_sample(sample_of(size, size)).chosen) for size in SIZES}
        small, large = min(SIZES, key=lengths.get), max(SIZES, key=lengths.get)
        assert (lengths[small] == lengths[large]) == (family in FIXED)
        name = "image" if family in FIXED else "retrieved image"
        with pytest.raises(SampleError, match=f"the prompt with its {name} takes {lengths[large]} tokens"):
            limited(backbone, lengths[large]).encode_sample(sample_of(small, large))
        with pytest.raises(SampleError, match=f"the prompt with its image takes {lengths[large]} tokens"):
            limited(backbone, lengths[large]).encode_sample(sample_of(large, small))

    def test_the_prompt_that_is_too_long_is_skipped_by_name_and_counted(self, tiny_llava, tmp_path, caplog):
        data, longest = shards_with_a_long_prompt(tiny_llava, tmp_path)
        with caplog.at_level(logging.WARNING, logger="realign_lightning"):
            trainer_of(tmp_path).fit(RDPOModule(data.backbone, adapter=LoRA(r=2)), datamodule=data)
        (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
        reason = (
            f"the prompt with its image takes {longest} tokens, 9 of them image tokens, and leaves no response token "
            f"within max_length={data.backbone.max_length}"
        )
        assert line.startswith(f"sample skipped: shard-000000.tar: sample2 ({reason}")
        (skipped,) = data.skipped["train"]
        assert skipped[:2] == ("shard-000000.tar", "sample2")
        assert skipped.reason.startswith(reason)

    def test_or_stops_the_run(self, tiny_llava, tmp_path):
        data, _ = shards_with_a_long_prompt(tiny_llava, tmp_path, max_bad_fraction=0.0)
        with pytest.raises(BadDataError, match=r"1 of 4 samples are bad.*shard-000000\.tar: sample2 \(the prompt with"):
            trainer_of(tmp_path).fit(RDPOModule(data.backbone, adapter=LoRA(r=2)), datamodule=data)


def shards_with_a_long_prompt(tiny_llava, folder, **options):
    """Four samples, the third of which has a prompt longer than all the others with their responses."""
    samples = preference_samples(4)
    samples[2] = dataclasses.replace(samples[2], prompt="is there a dog on the sofa? " * 10)
    whole = AutoBackbone(str(tiny_llava))
    encoded = [whole.encode_sample(sample) for sample in samples]
    lengths = [max(len(item.chosen.response_mask), len(item.rejected.response_mask)) for item in encoded]
    longest, limit = prompt_length(encoded[2].chosen), max(lengths[:2] + lengths[3:])
    assert longest > limit
    with ShardWriter(folder / "shards") as writer:
        for sample in samples:
            writer.write(sample)
    backbone = AutoBackbone(str(tiny_llava), max_length=limit)
    return DualPreferenceDataModule(backbone, str(folder / "shards"), batch_size=2, **options), longest


def trainer_of(folder) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=1, **quiet)


class TestImageLengths:
    def test_pictures_are_measured_without_being_encoded(self, family, backbone):
        """Differences between pictures are those between the prompts that show them.

        SmolVLM's processor does not tell, so that blank pictures are encoded, with sides rounded to powers of 1.1.
        """
        real = [prompt_length(backbone.encode_sample(sample_of(size, size)).chosen) for size in SIZES]
        told = backbone.image_lengths(SIZES)
        assert all(type(length) is int for length in told)
        assert [length - told[0] for length in told] == [length - real[0] for length in real]
        assert backbone.image_lengths([]) == []


class TestPaddingFraction:
    @staticmethod
    def batch(*lengths: list[int]) -> PreferenceBatch:
        """Views with rows of some lengths, each padded to its own longest."""
        views = []
        for rows in lengths:
            mask = (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()
            views.append(View({"input_ids": mask, "attention_mask": mask}, mask.bool()))
        return PreferenceBatch(*views, {}, {}, torch.ones(len(lengths[0])), tuple(map(str, range(len(lengths[0])))))

    def test_all_views_are_padded_to_the_longest_row(self):
        """Rows 4 and 6; 8 and 10; 2 and 7: 6 x 10 positions, 37 of them filled; without the last view 4 x 10 and 28."""
        batch = self.batch([4, 6], [8, 10], [2, 7])
        for views, expected in (
            (("chosen", "rejected", "visual"), 23 / 60),
            (("chosen", "rejected"), 12 / 40),
            (("chosen", "visual"), 9 / 28),
            (("chosen",), 2 / 12),
        ):
            share = padding_fraction(batch, views, packed=False)
            assert (share.dtype, share.shape) == (torch.float32, ())
            assert share.item() == pytest.approx(expected)
            assert padding_fraction(batch, views, packed=True).item() == 0

    def test_is_that_of_the_rows_that_are_scored(self, tiny_llava):
        backbone = AutoBackbone(str(tiny_llava))
        batch = backbone.collate([backbone.encode_sample(one) for one in preference_samples(3)])
        for views in (("chosen", "rejected", "visual"), ("chosen", "rejected")):
            rows = make_rows(backbone, backbone.load_model(), batch, views, share_prefix=False)
            empty = (rows.tokens["attention_mask"] == 0).float().mean().item()
            assert padding_fraction(batch, views, packed=False).item() == pytest.approx(empty)
            assert empty > 0.05

    def test_no_padding(self):
        assert padding_fraction(self.batch([5], [5], [5]), ("chosen", "rejected", "visual"), packed=False).item() == 0


def output(pooled) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=pooled)


class TestImageTokens:
    def test_another_patch_size_than_the_models(self, tiny_llava):
        """24 x 24 pixels are 3 x 3 features of 8 x 8; patches of 12 make 2 x 2 image tokens."""
        wrong = AutoBackbone(str(tiny_llava), processor_kwargs={"patch_size": 12})
        batch = wrong.collate([wrong.encode_sample(one) for one in preference_samples(2)])
        with pytest.raises(ImageTokenError, match="got 9 features for 4 image tokens") as error:
            score(wrong, wrong.load_model(), batch)
        images = "sample0 (image), sample1 (image), sample0 (retrieved image), sample1 (retrieved image)"
        assert str(error.value).startswith(f"Sample {images}: Expected one image feature per image token")
        assert "processor_kwargs" in str(error.value)

    def test_the_very_sample_is_named(self, tiny_llava):
        backbone = AutoBackbone(str(tiny_llava))
        wrong = AutoBackbone(str(tiny_llava), processor_kwargs={"patch_size": 12})
        first, second = preference_samples(2)
        batch = backbone.collate([backbone.encode_sample(first), wrong.encode_sample(second)])
        with pytest.raises(ImageTokenError, match=r"^Sample sample1 \(image\): .* 9 features for 4") as error:
            encode_batch_images(backbone, backbone.load_model(), batch, ["chosen", "rejected"])
        assert error.value.rows == (1,)

    def test_a_family_that_tells_no_images_apart(self, tmp_path):
        """InternVL's features come by tile: with 5 in place of 4 tokens a tile only the sum is known to be wrong."""
        right = AutoBackbone(str(make_tiny("internvl", tmp_path / "internvl")))
        wrong = AutoBackbone(right.path, processor_kwargs={"image_seq_length": 5})
        samples = [dataclasses.replace(one, image=picture(1, (90, 32))) for one in preference_samples(2)]
        batch = right.collate([right.encode_sample(samples[0]), wrong.encode_sample(samples[1])])
        with pytest.raises(ImageTokenError, match=r"^One of the samples sample0, sample1: Expected") as error:
            encode_batch_images(right, right.load_model(), batch, ["chosen"])
        assert error.value.rows == ()
        alone = wrong.collate([wrong.encode_sample(samples[1])])
        with pytest.raises(ImageTokenError, match=r"^Sample sample1: Expected"):
            encode_batch_images(wrong, wrong.load_model(), alone, ["chosen"])

    def test_equal_sums_do_not_hide_unequal_rows(self):
        """Two rows of 2 and 1 images with 3, 2 and 4 features: 5 and 4."""
        numbers = count()
        features = [torch.full((length, 8), float(next(numbers))) for length in (3, 2, 4)]
        rows = RowFeatures.cut(output(features), {}, [5, 4], [2, 1])
        assert [row[:, 0].tolist() for row in rows.pooled] == [[0, 0, 0, 1, 1], [2, 2, 2, 2]]
        with pytest.raises(ImageTokenError, match="got 5 features for 4") as error:
            RowFeatures.cut(output(features), {}, [4, 5], [2, 1])
        assert error.value.rows == (0, 1)

    def test_one_tensor_for_all(self):
        flat = torch.zeros(9, 8)
        assert [len(row) for row in RowFeatures.cut(output(flat), {}, [5, 4], [1, 1]).pooled] == [5, 4]
        with pytest.raises(ImageTokenError, match="got 9 features for 10") as error:
            RowFeatures.cut(output(flat), {}, [5, 5], [1, 1])
        assert error.value.rows == ()
