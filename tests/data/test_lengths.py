import io
import json

import numpy as np
import pytest
from PIL import Image

from realign_lightning.data import EpochSampler, ShardDataset
from realign_lightning.data.lengths import SampleSize, estimate_lengths, group_by_length, measure_sample
from realign_lightning.data.schema import image_size
from realign_lightning.types import SampleError
from tests.data.helpers import WordBackbone, picture, raw_members, write_tar


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(**changes) -> bytes:
    return json.dumps({"prompt": "a?", "chosen": "b", "rejected": "c", **changes}, ensure_ascii=False).encode()


class TestSizes:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize(("orientation", "expected"), [(1, (8, 6)), (3, (8, 6)), (6, (6, 8)), (8, (6, 8))])
    def test_an_image_is_as_large_as_it_is_decoded(self, kind, orientation, expected):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert image_size(file_of(picture(0), kind, exif=exif)) == expected

    def test_no_pixel_is_decoded(self):
        for kind in ("JPEG", "PNG"):
            whole = file_of(picture(0, (300, 200)), kind)
            assert image_size(whole[: len(whole) // 2]) == (300, 200)

    @pytest.mark.parametrize("data", [b"", b"<svg/>", file_of(picture(0, (402, 2)), "PNG")])
    def test_what_cannot_be_read(self, data):
        with pytest.raises(SampleError):
            image_size(data)

    def test_sample(self):
        """Bytes, not characters: 3 letters of Cyrillic are 6."""
        members = raw_members(0, {"json": record(prompt="what?", chosen="кот", rejected="a dog")})
        assert measure_sample(members) == SampleSize(5, 6, 5, (8, 6), (8, 6))

    def test_messages(self):
        prompt = [
            {"role": "system", "content": "ab"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "cde"}]},
        ]
        assert measure_sample(raw_members(0, {"json": record(prompt=prompt)})).prompt == 5


class Areas(WordBackbone):
    """A picture takes as many tokens as it has pixels."""

    def image_lengths(self, sizes):
        return [width * height for width, height in sizes]


class TestEstimate:
    def test_the_longest_of_the_three_rows(self, tmp_path):
        """Pictures of 48 pixels and of 80; text in bytes / 4."""
        large = {"retrieved.png": file_of(picture(9, (10, 8)), "PNG")}
        path = write_tar(
            tmp_path / "a.tar",
            [
                raw_members(0, {"json": record(prompt="p" * 8, chosen="c" * 40, rejected="r" * 12)}),
                raw_members(1, {"json": record(prompt="p" * 8, chosen="c" * 40, rejected="r" * 80)}),
                raw_members(2, {"json": record(prompt="p" * 8, chosen="c" * 4, rejected="r" * 80), **large}),
                raw_members(3, {"json": record(), "image.png": b"garbage"}),
                raw_members(4, {"json": b"{}"}),
            ],
        )
        expected = [2 + 48 + 10, 2 + 48 + 20, 2 + 80 + 1, 0, 0]
        assert ShardDataset(path, Areas()).estimated_lengths().tolist() == expected
        in_words_only = [2 + 10, 2 + 20, 2 + 20, 0, 0]
        assert ShardDataset(path, WordBackbone()).estimated_lengths().tolist() == in_words_only

    def test_measured_once(self, tmp_path, monkeypatch):
        read = ShardDataset(write_tar(tmp_path / "a.tar", [raw_members(0, {})]), WordBackbone())
        first = read.estimated_lengths()
        (tmp_path / "a.tar").unlink()
        assert read.estimated_lengths() is first

    def test_no_samples(self):
        assert estimate_lengths(dict, 0, WordBackbone()).tolist() == []


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(4, 0.8, count).round()


def epoch(lengths, batch_size: int, world_size: int, seed: int = 0, number: int = 0):
    """Per rank the batches of an epoch, each a list of (row, weight)."""
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(len(lengths), world_size, rank, seed, lengths=lengths, batch_size=batch_size)
        sampler.set_epoch(number)
        items = list(sampler)
        assert len(items) == len(sampler)
        ranks.append([items[start : start + batch_size] for start in range(0, len(items), batch_size)])
    return ranks


def global_batches(ranks) -> list[list[int]]:
    return [sorted(item.row for batch in step for item in batch if item.weight) for step in zip(*ranks, strict=True)]


class TestGrouping:
    @pytest.mark.parametrize("num_samples", [1, 2, 5, 7, 12, 103, 1009])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    def test_every_sample_exactly_once(self, num_samples, world_size, batch_size):
        ranks = epoch(lengths_of(num_samples), batch_size, world_size)
        items = [item for batches in ranks for batch in batches for item in batch]
        assert sorted(item.row for item in items if item.weight == 1) == list(range(num_samples))
        assert len(items) == -(-num_samples // world_size) * world_size
        assert {item.weight for item in items} <= {0.0, 1.0}
        for batches in ranks:
            assert all(item.weight == 1 for batch in batches[:-1] for item in batch), "only the last batch is filled up"

    def test_an_order_by_hand(self):
        """11 samples, 2 ranks, batches of 2: one chunk of 2 whole global batches of 4 and one of 3.

        Sample i has length i, so the sorted order is 0 to 10. The global batch that is not full is cut at 0 or 4.
        """
        for seed in range(20):
            ranks = epoch(np.arange(11.0), 2, 2, seed)
            first, second, last = global_batches(ranks)
            if last == [4, 5, 6]:
                assert (first, second) == ([7, 8, 9, 10], [0, 1, 2, 3])
            else:
                assert (last, first, second) == ([0, 1, 2], [7, 8, 9, 10], [3, 4, 5, 6])
            for batches in ranks:
                for batch in batches[:2]:
                    assert batch[1].row == batch[0].row + 1, "a rank gets neighbours"
            filled = [item for batches in ranks for item in batches[2] if not item.weight]
            assert [item.row for item in filled] == last[:1]

    def test_samples_stay_in_their_chunk(self):
        """400 samples in batches of 4: 4 chunks of 25 global batches, 100 samples each."""
        lengths = lengths_of(400)
        order = np.random.default_rng(5).permutation(400)
        grouped = group_by_length(order, lengths, 4, 1, np.random.default_rng(0)).reshape(-1, 4)
        chunk_of = np.empty(400, dtype=int)
        chunk_of[order] = np.arange(400) // 100
        expected = set()
        for chunk in range(4):
            members = sorted(order[chunk * 100 : chunk * 100 + 100], key=lambda row: lengths[row])
            expected |= {tuple(lengths[members[start : start + 4]]) for start in range(0, 100, 4)}
        assert all(len(set(chunk_of[batch])) == 1 for batch in grouped)
        assert {tuple(lengths[batch]) for batch in grouped} == expected

    def test_the_longest_comes_first(self):
        lengths = lengths_of(1003)
        for seed in range(10):
            for world_size in (1, 2):
                assert int(lengths.argmax()) in global_batches(epoch(lengths, 4, world_size, seed))[0]

    def test_the_batches_of_all_ranks_together_do_not_depend_on_the_ranks(self):
        lengths = lengths_of(203)
        alone = global_batches(epoch(lengths, 12, 1))
        assert global_batches(epoch(lengths, 6, 2)) == global_batches(epoch(lengths, 4, 3)) == alone

    def test_seed_and_epoch_change_the_batches(self):
        lengths = lengths_of(200)
        seen = {str(epoch(lengths, 4, 1, seed, number)) for seed in range(3) for number in range(3)}
        assert len(seen) == 9
        assert epoch(lengths, 4, 2, 1, 2) == epoch(lengths, 4, 2, 1, 2)
        first, second = (set(map(tuple, global_batches(epoch(lengths, 4, 1, 0, number)))) for number in (0, 1))
        assert len(first & second) < 5, "samples meet others in the next epoch"

    def test_little_is_padded(self):
        """Share of padding where every batch is padded to its longest sample."""
        lengths = lengths_of(4001)

        def padding(order) -> float:
            batches = [lengths[order[start : start + 8]] for start in range(0, len(order), 8)]
            return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)

        plain = padding([item.row for item in EpochSampler(4001)])
        grouped = padding([item.row for item in EpochSampler(4001, lengths=lengths, batch_size=8)])
        assert plain > 0.5
        assert grouped < 0.1

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"lengths": [1.0, 2.0]}, "lengths must hold one number for each of 3 samples, got 2"),
            ({"lengths": [1.0, 2.0, 3.0], "shuffle": False}, "set shuffle=True"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_bad_arguments(self, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            EpochSampler(3, **arguments)
