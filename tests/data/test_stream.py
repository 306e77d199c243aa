import io
import json
import logging
import os
import tarfile

import numpy as np
import pytest
from torch.utils.data import DataLoader

from realign_lightning.data import EpochSampler, SampleIndex, ShardDataset, ShardError
from realign_lightning.data.schema import encode_members
from realign_lightning.types import SkippedSample
from tests.data.helpers import WordBackbone, good_members, picture, raw_members, sample, tar_bytes, write_shards
from tests.data.helpers import write_tar as write_members

RECORD = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def dataset(source) -> ShardDataset:
    return ShardDataset(source, WordBackbone())


def shard(tmp_path, data: bytes):
    path = tmp_path / "bad-shard.tar"
    path.write_bytes(data)
    return path


def headers(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


class TestReading:
    def test_items_are_the_written_samples(self, tmp_path):
        read = dataset(write_shards(tmp_path, 9, 4))
        assert len(read) == 9
        assert read.skipped == ()
        for number in range(9):
            assert read.decode(number).image.tobytes() == sample(number).image.tobytes()
            item = read[number]
            assert (item.key, item.weight, item.skipped) == (f"{number:06d}", 1.0, ())

    def test_forms_of_source(self, tmp_path):
        write_shards(tmp_path / "a", 3, 2)
        keys = ["000000", "000001", "000002"]
        tars = [tmp_path / "a" / f"shard-00000{i}.tar" for i in range(2)]
        for source in (tmp_path / "a", str(tmp_path / "a"), [tmp_path / "a"], tars, str(tmp_path / "a" / "*.tar")):
            assert dataset(source).keys == keys
        assert dataset(tars[1]).keys == ["000002"]

    def test_tar_without_an_index(self, tmp_path):
        assert dataset(shard(tmp_path, tar_bytes(good_members(0, 1)))).keys == ["000000", "000001"]

    def test_tar_of_another_tar_program(self, tmp_path):
        """Python's own default: PAX headers, here for a fractional time."""
        path = tmp_path / "pax.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in good_members(0, 1):
                header = tarfile.TarInfo(name)
                header.size, header.mtime = len(data), 1.5
                tar.addfile(header, io.BytesIO(data))
        assert dataset(path)[1].key == "000001"

    def test_index_out_of_range(self, tmp_path):
        read = dataset(write_shards(tmp_path, 2))
        for index in (2, -1):
            with pytest.raises(IndexError, match=f"index {index} is outside 0 to 1"):
                read[index]

    def test_weight_of_the_sampler(self, tmp_path):
        read = dataset(write_shards(tmp_path, 2))
        assert read[SampleIndex(1, 0.0)].weight == 0.0
        assert read[SampleIndex(1)].weight == 1.0

    def test_a_mistake_in_the_backbone_is_an_error_that_names_the_sample(self, tmp_path):
        path = write_members(tmp_path / "a.tar", [encode_members(sample(0, chosen="boom"))])
        with pytest.raises(ZeroDivisionError) as error:
            dataset(path)[0]
        assert "000000 of shard" in error.value.__notes__[0]

    def test_shard_cut_after_the_scan(self, tmp_path):
        path = shard(tmp_path, tar_bytes(good_members(0)))
        read = dataset(path)
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(ShardError, match=r"bad-shard\.tar does not hold .* where its index says"):
            read[0]


class TestStructuralDamage:
    """Each is an error before training that names the shard."""

    def test_missing(self, tmp_path):
        with pytest.raises(ShardError, match=r"nothing\.tar does not exist"):
            dataset(tmp_path / "nothing.tar")

    def test_brace_range(self, tmp_path):
        with pytest.raises(ShardError, match="brace ranges are not expanded"):
            dataset(f"{tmp_path}/shard-{{000000..000004}}.tar")

    def test_pattern_without_a_match(self, tmp_path):
        with pytest.raises(ShardError, match="matches no file"):
            dataset(f"{tmp_path}/*.tar")

    def test_no_shards(self):
        with pytest.raises(ShardError, match="no shards"):
            dataset([])

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("pipe:cat /dev/null", "is a pipe or a chain"),
            ("zip://a.tar::http://example.org/a.zip", "is a pipe or a chain"),
            ("file:///a.tar", "expected a path, or an address that begins with"),
            ("ftp://example.org/shards", "expected a path, or an address that begins with"),
            ("https://user:secret@example.org/shards", "the address of a folder of shards at example.org holds a user"),
            ("https://example.org/shards?key=secret", "holds a user, '\\?' or '#'"),
            ("http://example.org/shards", "there is no cache to fetch it to"),
        ],
    )
    def test_urls_and_pipes(self, source, reason):
        with pytest.raises(ShardError, match=reason) as caught:
            dataset(source)
        assert "secret" not in str(caught.value)

    def test_named_twice(self, tmp_path):
        path = shard(tmp_path, tar_bytes(good_members(0)))
        with pytest.raises(ShardError, match="named twice"):
            dataset([path, str(path)])

    def test_fifo_as_shard(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.tar")
        for source in (tmp_path / "pipe.tar", tmp_path / "*.tar"):
            with pytest.raises(ShardError, match="not a regular file"):
                dataset(source)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "empty"),
            (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a whole uncompressed tar"),
            (b"<html>" * 1000, "not a whole uncompressed tar"),
            (bytes(10240), "holds no samples"),
        ],
        ids=["zero bytes", "short page", "long page", "no members"],
    )
    def test_not_a_tar(self, tmp_path, data, reason):
        with pytest.raises(ShardError, match=rf"bad-shard\.tar.*{reason}"):
            dataset(shard(tmp_path, data))

    def test_compressed(self, tmp_path):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo("000000.json"))
        with pytest.raises(ShardError, match="uncompressed tar"):
            dataset(shard(tmp_path, buffer.getvalue()))

    def test_cut_anywhere(self, tmp_path):
        """At, inside and between headers and contents, and inside the two zero blocks that end the last member."""
        data = tar_bytes(good_members(0, 1))
        last = headers(data)[-1]
        end = last.offset_data + -(-last.size // 512) * 512 + 1024
        for length in {*range(1, end, 128), *(header.offset for header in headers(data)), end - 1}:
            with pytest.raises(ShardError, match=r"bad-shard\.tar"):
                dataset(shard(tmp_path, data[:length]))
        assert len(dataset(shard(tmp_path, data[:end]))) == 2

    def test_flipped_header_byte(self, tmp_path):
        data = tar_bytes(good_members(0, 1))
        for header in headers(data):
            damaged = bytearray(data)
            damaged[header.offset + 3] ^= 1
            with pytest.raises(ShardError, match=r"bad-shard\.tar"):
                dataset(shard(tmp_path, bytes(damaged)))

    def test_data_after_the_end(self, tmp_path):
        with pytest.raises(ShardError, match="unreadable data follows"):
            dataset(shard(tmp_path, tar_bytes(good_members(0)) + tar_bytes(good_members(1))))

    def test_flipped_payload_bit_is_found_by_the_hash(self, tmp_path):
        write_shards(tmp_path, 2)
        path = tmp_path / "shard-000000.tar"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"A cat and 1 dogs", b"A cat and 3 dogs"))
        for source in (tmp_path, path, f"{tmp_path}/*.tar"):
            with pytest.raises(ShardError, match=r"shard-000000\.tar differs from its index in SHA-256"):
                dataset(source)

    def test_shard_of_the_index_is_missing(self, tmp_path):
        write_shards(tmp_path, 6, 4)
        (tmp_path / "shard-000001.tar").unlink()
        with pytest.raises(ShardError, match=r"shard-000001\.tar is listed in .* but missing"):
            dataset(tmp_path)

    def test_shard_that_the_index_does_not_list(self, tmp_path):
        """It would be left out in silence."""
        write_shards(tmp_path, 2)
        write_members(tmp_path / "more.tar", [raw_members(7, {})])
        with pytest.raises(ShardError, match=r"more\.tar is not listed in .*index\.json: remove it, name the shards"):
            dataset(tmp_path)
        assert dataset([tmp_path / "shard-000000.tar", tmp_path / "more.tar"]).keys == ["000000", "000001", "000007"]

    @pytest.mark.parametrize(("field", "value"), [("bytes", 10), ("samples", 3)])
    def test_differs_from_the_index(self, tmp_path, field, value):
        write_shards(tmp_path, 2)
        content = json.loads((tmp_path / "index.json").read_text())
        content["shards"][0][field] = value
        # An index of another program: it does not say where samples stand.
        del content["shards"][0]["members"]
        (tmp_path / "index.json").write_text(json.dumps(content))
        with pytest.raises(ShardError, match=rf"shard-000000\.tar .* its index says {value}"):
            dataset(tmp_path)

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            (good_members(0, 0), "duplicate key '000000'"),
            (good_members(0, 1, 0), "'000000' are not side by side"),
            ([pair for pairs in zip(good_members(0), good_members(1), strict=True) for pair in pairs], "side by side"),
            ([*good_members(0), ("000001.image.v2.png", b"x")], r"'000001\.image\.v2\.png' is none of"),
            ([*good_members(0), ("000000.pyd", b"x")], r"'000000\.pyd' is none of"),
            ([*good_members(0), ("README", b"x")], "'README' is none of"),
            ([*good_members(0), ("../1.json", b"x")], r"'\.\./1\.json' is none of"),
            ([*good_members(0), ("000000.image.jpg", b"x")], "duplicate key '000000'"),
        ],
    )
    def test_members(self, tmp_path, members, reason):
        with pytest.raises(ShardError, match=rf"bad-shard\.tar: .*{reason}"):
            dataset(shard(tmp_path, tar_bytes(members)))

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
    def test_member_that_is_no_file(self, tmp_path, kind):
        path = tmp_path / "bad-shard.tar"
        with tarfile.open(path, "w") as tar:
            header = tarfile.TarInfo("000000.json")
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        with pytest.raises(ShardError, match=r"bad-shard\.tar: member '000000\.json' is a link"):
            dataset(path)

    def test_duplicate_key_in_another_shard(self, tmp_path):
        for name in "ab":
            write_shards(tmp_path / name, 1)
        with pytest.raises(ShardError, match=r"duplicate key '000000': in shard .*a/shard.* and in shard .*b/shard"):
            dataset([tmp_path / "a", tmp_path / "b"])


class TestRandomDamage:
    def test_only_our_errors(self, tmp_path):
        """Bytes flipped, cut, inserted or repeated, no index: an error that names the shard, or skipped samples."""
        data = tar_bytes(good_members(0, 1))
        random = np.random.default_rng(0)
        for _ in range(400):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                kind, length = random.integers(4), int(random.integers(1, 600))
                if kind == 0:
                    damaged[place % len(damaged)] ^= 1 << random.integers(8)
                elif kind == 1:
                    del damaged[place : place + length]
                elif kind == 2:
                    damaged[place:place] = random.bytes(length)
                else:
                    damaged[place:place] = damaged[place : place + length]
            try:
                read = dataset(shard(tmp_path, bytes(damaged)))
                items = [read[index] for index in range(len(read))]
                assert all(item.weight == 1 or item.skipped for item in items)
            except ShardError as error:
                assert "bad-shard.tar" in str(error)  # noqa: PT017


class TestBadSamples:
    """Each is skipped, counted and named, and its place is taken with weight 0."""

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"image.png": b"garbage"}, "image.png: not a readable"),
            ({"retrieved.png": encode_members(sample(3))["000003.image.png"][:-30]}, "retrieved.png: not a readable"),
            ({"json": b"{}"}, "lacks 'prompt'"),
            ({"json": b"\xff\xfe"}, "cannot be read"),
            ({"json": json.dumps(RECORD | {"chosen": ""}).encode()}, "chosen is empty"),
            ({"json": json.dumps(RECORD | {"rejected": "A cat."}).encode()}, "chosen is equal to rejected"),
            ({"json": json.dumps(RECORD | {"chosen": "<image>"}).encode()}, "reserved token"),
            ({"retrieved.png": encode_members(sample(1))["000001.image.png"]}, "identical"),
        ],
    )
    def test_one_bad(self, tmp_path, changes, reason):
        read = dataset(write_members(tmp_path / "a.tar", [raw_members(n, changes if n == 1 else {}) for n in range(3)]))
        items = [read[index] for index in range(3)]
        assert [item.key for item in items] == ["000000", "000002", "000002"]
        assert [item.weight for item in items] == [1.0, 0.0, 1.0]
        ((shard_name, key, why),) = items[1].skipped
        assert (shard_name, key) == ("a.tar", "000001")
        assert reason in why
        assert items[0].skipped == items[2].skipped == ()

    def test_each_bad_sample_is_reported_by_its_own_turn(self, tmp_path):
        broken = {"image.png": b""}
        read = dataset(write_members(tmp_path / "a.tar", [raw_members(n, broken if n > 0 else {}) for n in range(4)]))
        for _ in range(2):
            items = [read[index] for index in range(4)]
            assert [item.key for item in items] == ["000000"] * 4
            assert [[skip.key for skip in item.skipped] for item in items] == [[], ["000001"], ["000002"], ["000003"]]

    def test_filling_up_reports_nothing(self, tmp_path):
        read = dataset(
            write_members(tmp_path / "a.tar", [raw_members(n, {"json": b""} if n == 0 else {}) for n in range(2)])
        )
        item = read[SampleIndex(0, 0.0)]
        assert (item.key, item.weight, item.skipped) == ("000001", 0.0, ())

    def test_all_bad(self, tmp_path):
        read = dataset(write_members(tmp_path / "a.tar", [raw_members(n, {"json": b""}) for n in range(2)]))
        with pytest.raises(ShardError, match=r"all 2 samples .* are bad; first: .*shard='a\.tar', key='000001'"):
            read[1]

    @pytest.mark.parametrize("part", ["image.png", "retrieved.png", "json"])
    def test_missing_member(self, tmp_path, caplog, part):
        path = write_members(tmp_path / "a.tar", [raw_members(n, {part: None} if n == 1 else {}) for n in range(3)])
        with caplog.at_level(logging.WARNING):
            read = dataset(path)
        reason = f"missing member {part.split('.')[0]}"
        assert read.keys == ["000000", "000002"]
        assert read.skipped == (SkippedSample("a.tar", "000001", reason),)
        assert f"1 of 3 samples skipped: a.tar: 000001 ({reason})" in caplog.text

    def test_every_sample_lacks_a_member(self, tmp_path):
        path = write_members(tmp_path / "a.tar", [raw_members(n, {"json": None}) for n in range(2)])
        with pytest.raises(ShardError, match=r"no complete sample .*000000 \(missing member json\)"):
            dataset(path)

    def test_an_error_in_a_shard_does_not_drop_its_tail(self, tmp_path):
        members = [raw_members(n, {"json": b"{"} if n == 2 else {}) for n in range(6)]
        read = dataset(write_members(tmp_path / "a.tar", members))
        counted = [item.key for item in (read[index] for index in range(6)) if item.weight]
        assert counted == ["000000", "000001", "000003", "000004", "000005"]


def epoch(num_samples: int, world_size: int, seed: int = 0, number: int = 0, shuffle: bool = True):
    samplers = [EpochSampler(num_samples, world_size, rank, seed, shuffle) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(number)
    return [list(sampler) for sampler in samplers]


class TestEpochSampler:
    def test_the_trainers_own_count_of_epochs_wins(self):
        """After a resume Lightning tells the sampler one epoch too many."""
        told = EpochSampler(9, seed=1)
        told.set_epoch(3)
        asked = EpochSampler(9, seed=1, current_epoch=lambda: 3)
        asked.set_epoch(4)
        assert list(asked) == list(told)
        told.set_epoch(4)
        assert list(asked) != list(told)

    @pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 12])
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_exactly_once(self, num_samples, world_size):
        ranks = epoch(num_samples, world_size)
        assert {len(items) for items in ranks} == {-(-num_samples // world_size)}
        assert sorted(item.row for items in ranks for item in items if item.weight == 1) == list(range(num_samples))
        assert {item.weight for items in ranks for item in items} <= {0.0, 1.0}

    def test_length_is_what_comes(self):
        assert len(EpochSampler(7, 3, 2)) == 3

    def test_the_order_does_not_depend_on_the_ranks(self):
        alone = [item.row for item in epoch(12, 1)[0]]
        for world_size in (2, 3, 4):
            dealt = zip(*epoch(12, world_size), strict=True)
            assert [item.row for items in dealt for item in items] == alone

    def test_seed_and_epoch_change_the_order(self):
        orders = {tuple(item.row for item in epoch(50, 1, seed, number)[0]) for seed in range(3) for number in range(3)}
        assert len(orders) == 9
        assert epoch(50, 1, 1, 2) == epoch(50, 1, 1, 2)

    def test_without_shuffling(self):
        assert [item.row for item in epoch(5, 1, number=3, shuffle=False)[0]] == list(range(5))

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [({"num_samples": 0}, "num_samples"), ({"seed": -1}, "seed"), ({"world_size": 2, "rank": 2}, "rank")],
    )
    def test_bad_arguments(self, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            EpochSampler(**{"num_samples": 3, **arguments})


class TestLoader:
    @pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 2), (2, 2), (7, 2), (12, 5)])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_every_sample_once_over_ranks_and_workers(self, tmp_path, num_samples, batch_size, world_size):
        read = dataset(write_shards(tmp_path, num_samples, 5))
        by_workers = []
        for workers in (0, 2):
            ranks = [
                list(
                    DataLoader(
                        read,
                        batch_size,
                        sampler=EpochSampler(num_samples, world_size, rank, seed=1),
                        num_workers=workers,
                        collate_fn=read.backbone.collate,
                    )
                )
                for rank in range(world_size)
            ]
            assert len({len(batches) for batches in ranks}) == 1
            rows = [
                [row for batch in batches for row in zip(batch.keys, batch.weights.tolist(), strict=True)]
                for batches in ranks
            ]
            assert sorted(key for rank in rows for key, weight in rank if weight) == sorted(read.keys)
            by_workers.append(rows)
        assert by_workers[0] == by_workers[1]

    def test_images_reach_the_batch(self, tmp_path):
        read = dataset(write_shards(tmp_path, 2))
        batch = read.backbone.collate([read[0], read[1]])
        assert batch.images["pixels"].shape == (2, 3, 8, 8)
        assert batch.images["pixels"][1].equal(WordBackbone._pixels(picture(2))[0])
