"""Fingerprints of samples, and reading them outside of training."""

import hashlib

import pytest
import torch

from realign_lightning.data import DualPreferenceDataModule, ShardDataset, encode_members, fingerprint_members
from tests.data.helpers import WordBackbone, raw_members, sample, write_shards, write_tar


def expected(number: int) -> str:
    """Roles in alphabetical order, each with its length and a line break before its bytes."""
    parts = {name.split(".")[1]: data for name, data in encode_members(sample(number)).items()}
    whole = b"".join(f"{role} {len(parts[role])}\n".encode() + parts[role] for role in ("image", "json", "retrieved"))
    return hashlib.sha256(whole).hexdigest()


class TestFingerprint:
    def test_is_the_hash_of_the_stored_bytes(self):
        assert fingerprint_members(encode_members(sample(3))) == expected(3)

    @pytest.mark.parametrize("part", ["image.png", "retrieved.png", "json"])
    def test_every_byte_counts(self, part):
        members = raw_members(1, {})
        changed = raw_members(1, {part: members[f"000001.{part}"] + b" "})
        assert fingerprint_members(changed) != fingerprint_members(members)

    def test_bytes_do_not_move_from_one_member_to_the_next(self):
        one = {"a.image.png": b"12", "a.retrieved.png": b"3"}
        two = {"a.image.png": b"1", "a.retrieved.png": b"23"}
        swapped = {"a.image.png": b"3", "a.retrieved.png": b"12"}
        assert len({fingerprint_members(members) for members in (one, two, swapped)}) == 3

    def test_names_must_be_the_contracts(self):
        with pytest.raises(ValueError, match="rename or remove it"):
            fingerprint_members({"a.txt": b""})


class TestDataset:
    def test_items_carry_it_and_nothing_is_decoded_to_tell_it(self, tmp_path, monkeypatch):
        dataset = ShardDataset(write_shards(tmp_path, 5, 2), WordBackbone())
        assert [dataset[index].fingerprint for index in range(5)] == [expected(number) for number in range(5)]
        monkeypatch.setattr("realign_lightning.data.stream.decode_sample", None)
        assert [dataset.fingerprint(index) for index in range(5)] == [expected(number) for number in range(5)]

    def test_a_stand_in_carries_that_of_the_sample_that_it_is(self, tmp_path):
        shard = write_tar(tmp_path / "a.tar", [raw_members(0, {"image.png": b"broken"}), raw_members(1, {})])
        item = ShardDataset(shard, WordBackbone())[0]
        assert (item.key, item.weight, item.fingerprint) == ("000001", 0.0, expected(1))


class TestReader:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_rows_in_the_order_given(self, tmp_path, num_workers):
        data = DualPreferenceDataModule(
            WordBackbone(), str(write_shards(tmp_path, 5)), batch_size=1, eval_batch_size=2, num_workers=num_workers
        )
        assert data.sample_readers() == {}
        data.setup("fit")
        (reader,) = data.sample_readers().values()
        assert len(reader) == 5
        before = torch.get_rng_state()
        batches = list(reader.batches([(4, 1.0), (0, 1.0), (2, 0.0)]))
        assert torch.equal(torch.get_rng_state(), before)
        assert [batch.keys for batch in batches] == [("000004", "000000"), ("000002",)]
        assert [batch.weights.tolist() for batch in batches] == [[1.0, 1.0], [0.0]]
        assert [reader.fingerprint(row) for row in range(5)] == [expected(number) for number in range(5)]

    def test_splits_that_are_set_up(self, tmp_path):
        train, val = write_shards(tmp_path / "train", 3), write_shards(tmp_path / "val", 2)
        data = DualPreferenceDataModule(WordBackbone(), str(train), str(val))
        data.setup("validate")
        assert {split: len(reader) for split, reader in data.sample_readers().items()} == {"val": 2}
        data.setup("fit")
        assert {split: len(reader) for split, reader in data.sample_readers().items()} == {"train": 3, "val": 2}

    def test_bad_samples_are_not_counted(self, tmp_path):
        members = [raw_members(number, {"image.png": b"broken"} if number == 1 else {}) for number in range(3)]
        data = DualPreferenceDataModule(WordBackbone(), str(write_tar(tmp_path / "a.tar", members)))
        data.setup("fit")
        (batch,) = data.sample_readers()["train"].batches([(1, 1.0)])
        assert (batch.keys, batch.weights.tolist()) == (("000002",), [0.0])
        assert data.skipped == {"train": ()}
