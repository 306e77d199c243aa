import io
import json
import tarfile

import pytest
from PIL import Image

from realign_lightning.cli import run
from realign_lightning.data import ShardDataset, ShardError, ShardWriter, read_index
from realign_lightning.data.indexing import index_shards
from realign_lightning.data.manifest import INDEX_NAME
from realign_lightning.data.scan import scan_shard
from realign_lightning.data.schema import image_size
from realign_lightning.data.table import SampleTable
from tests.data.helpers import WordBackbone, good_members, picture, raw_members, sample, write_shards, write_tar


def pax(path, *numbers: int) -> None:
    """As Python's own default writes it: another header block before each member, for a fractional time."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in good_members(*numbers):
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), 1.5
            tar.addfile(header, io.BytesIO(data))


class TestCommand:
    def test_is_what_our_writer_would_have_said(self, tmp_path, capsys):
        write_shards(tmp_path, 9, 4)
        written = read_index(tmp_path)
        (tmp_path / INDEX_NAME).unlink()
        run(["index", str(tmp_path)])
        assert "3 shards, 9 samples" in capsys.readouterr().out
        assert read_index(tmp_path).shards == written.shards

    def test_of_another_tar_program(self, tmp_path):
        pax(tmp_path / "a.tar", 0, 1)
        index_shards(tmp_path)
        assert ShardDataset(tmp_path, WordBackbone()).keys == ["000000", "000001"]

    def test_says_what_lacks_a_member(self, tmp_path, capsys):
        write_tar(tmp_path / "a.tar", [raw_members(0, {"json": None}), raw_members(1, {})])
        run(["index", str(tmp_path / "*.tar")])
        assert "1 samples lack a member" in capsys.readouterr().out
        dataset = ShardDataset(tmp_path, WordBackbone())
        assert dataset.keys == ["000001"]
        assert [skip.key for skip in dataset.skipped] == ["000000"]

    def test_keeps_an_index_that_is_there(self, tmp_path):
        write_shards(tmp_path, 2)
        with pytest.raises(FileExistsError, match="pass --overwrite"):
            index_shards(tmp_path)
        index_shards(tmp_path, overwrite=True)

    def test_refuses(self, tmp_path):
        write_tar(tmp_path / "a.tar", [raw_members(0, {})])
        (tmp_path / "b").mkdir()
        write_tar(tmp_path / "b" / "b.tar", [raw_members(0, {})])
        with pytest.raises(ShardError, match="index each folder alone"):
            index_shards([tmp_path / "a.tar", tmp_path / "b" / "b.tar"])
        write_tar(tmp_path / "c.tar", [raw_members(0, {})])
        with pytest.raises(ShardError, match=r"duplicate key '000000': in shard a\.tar and in shard c\.tar"):
            index_shards(tmp_path)
        with pytest.raises(ShardError, match="matches no file"):
            index_shards(tmp_path / "b" / "*.zip")
        assert not (tmp_path / INDEX_NAME).exists()

    def test_a_folder_whose_name_looks_like_a_pattern(self, tmp_path):
        (tmp_path / "run[1]").mkdir()
        write_tar(tmp_path / "run[1]" / "a.tar", [raw_members(0, {})])
        assert index_shards(tmp_path / "run[1]")[1].shards[0].samples == 1

    def test_members_that_are_named_by_an_extension(self, tmp_path):
        """What is read later looks at the plain header only."""
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number, (name, data) in enumerate(good_members(0)):
                header = tarfile.TarInfo(f"zzz{number}.image.png")
                header.size, header.pax_headers = len(data), {"path": name}
                tar.addfile(header, io.BytesIO(data))
        with pytest.raises(ShardError, match=r"header of member '000000\.image\.png' does not name it itself"):
            index_shards(tmp_path)

    def test_names_that_no_index_may_list(self, tmp_path):
        write_tar(tmp_path / "train (1).tar", [raw_members(0, {})])
        with pytest.raises(ShardError, match=r"train \(1\)\.tar: an index lists plain names .*; rename it"):
            index_shards(tmp_path)


class TestTable:
    def table(self, tmp_path) -> tuple[SampleTable, list]:
        members = [raw_members(0, {}), raw_members(1, {"image.png": None}), raw_members(2, {})]
        members[2]["000002.retrieved.jpg"] = members[2].pop("000002.retrieved.png")
        stored = scan_shard(write_tar(tmp_path / "a.tar", members))
        return SampleTable.of(stored), stored

    def test_holds_what_was_scanned(self, tmp_path):
        table, stored = self.table(tmp_path)
        assert [table.key(row) for row in range(3)] == [one.key for one in stored]
        assert [table.members(row) for row in range(3)] == [one.members for one in stored]
        assert table.is_complete.tolist() == [True, False, True]
        assert table.is_plain
        assert table.last == stored[-1].members[-1]

    def test_survives_json(self, tmp_path):
        table, _ = self.table(tmp_path)
        text = json.dumps(table.to_json())
        assert SampleTable.from_json(json.loads(text), 10**6) == table

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("keys", ["a", "b"], "three lists of 2 integers"),
            ("keys", ["a", "b", "b"], "none twice"),
            ("keys", ["a", "b", "../c"], "none twice"),
            ("keys", ["a", "b", "c\nd"], "none twice"),
            ("keys", "abc", "a list of texts"),
            ("keys", [1, 2, 3], "a list of texts"),
            ("offsets", [[512, 0, 0]] * 3, "must lie in the shard"),
            ("offsets", [[512, 2**62, 512]] * 3, "must lie in the shard"),
            ("offsets", [[512.5, 1, 1]] * 3, "three lists of 3 integers"),
            ("offsets", [[512, 2**70, 512]] * 3, "three lists of 3 integers"),
            ("offsets", [[512, 512]] * 3, "three lists of 3 integers"),
            ("offsets", [[512, "x", 512]] * 3, "three lists of 3 integers"),
            ("sizes", [[1, 1, 1]] * 3, "-1 together"),
            ("sizes", [[1, -1, 2**62]] * 3, "must lie in the shard"),
            ("image", "gif", "must be one of"),
            ("retrieved", ["png"], "must be one of"),
        ],
    )
    def test_trusts_nothing(self, tmp_path, name, value, reason):
        table, _ = self.table(tmp_path)
        with pytest.raises(ValueError, match=reason):
            SampleTable.from_json({**table.to_json(), name: value}, 10**6)

    def test_members_of_a_sample_are_neighbours(self, tmp_path):
        content = self.table(tmp_path)[0].to_json()
        texts = content["offsets"][2]
        texts[0], texts[2] = texts[2], texts[0]
        with pytest.raises(ValueError, match="side by side"):
            SampleTable.from_json(content, 10**6)


class TestALyingIndex:
    """The SHA-256 is that of the shard, and what the index says of its members is not so."""

    def lie(self, folder, change) -> None:
        content = json.loads((folder / INDEX_NAME).read_text())
        change(content["shards"][0])
        (folder / INDEX_NAME).write_text(json.dumps(content))

    def test_leaves_the_last_sample_out(self, tmp_path):
        def change(shard):
            shard["samples"] = 2
            shard["members"]["keys"].pop()
            for column in (*shard["members"]["offsets"], *shard["members"]["sizes"]):
                column.pop()

        write_shards(tmp_path, 3)
        self.lie(tmp_path, change)
        with pytest.raises(ShardError, match="unreadable data follows"):
            ShardDataset(tmp_path, WordBackbone())

    @pytest.mark.parametrize("write", [write_shards, lambda folder, _: pax(folder / "a.tar", 0, 1, 2)])
    def test_leaves_a_sample_in_the_middle_out(self, tmp_path, write):
        def change(shard):
            shard["samples"] = 2
            shard["members"]["keys"].pop(1)
            for column in (*shard["members"]["offsets"], *shard["members"]["sizes"]):
                column.pop(1)

        write(tmp_path, 3)
        if not (tmp_path / INDEX_NAME).exists():
            index_shards(tmp_path)
        self.lie(tmp_path, change)
        with pytest.raises(ShardError, match="holds other members than its index says"):
            ShardDataset(tmp_path, WordBackbone())

    def test_exchanges_two_samples(self, tmp_path):
        def change(shard):
            keys = shard["members"]["keys"]
            keys[0], keys[1] = keys[1], keys[0]

        write_shards(tmp_path, 3)
        self.lie(tmp_path, change)
        dataset = ShardDataset(tmp_path, WordBackbone())
        with pytest.raises(ShardError, match=r"shard-000000\.tar does not hold 000001\.image\.png where its"):
            dataset[0]


class TestMaxSide:
    def test_reduces_what_is_larger_and_nothing_else(self, tmp_path):
        original = (tmp_path / "small.jpg", tmp_path / "large.jpg")
        picture(1, (64, 48)).save(original[0], quality=90)
        picture(2, (640, 480)).save(original[1], quality=90)
        small, large = (path.read_bytes() for path in original)
        pair = sample(0, image=Image.open(original[0]), retrieved=Image.open(original[1]))
        with ShardWriter(tmp_path / "out", max_side=100, built_with={"source": "test"}) as writer:
            writer.write(pair, small, large)
        stored = scan_shard(tmp_path / "out" / "shard-000000.tar")[0].read()
        assert stored["000000.image.jpg"] == small
        assert image_size(stored["000000.retrieved.jpg"]) == (100, 75)
        assert read_index(tmp_path / "out").built_with == {"source": "test", "max_side": 100}

    def test_bad_argument(self, tmp_path):
        with pytest.raises(ValueError, match="max_side must be at least 1"):
            ShardWriter(tmp_path, max_side=0)

    def test_convert(self, tmp_path, capsys):
        for number in range(2):
            picture(number, (300, 200)).save(tmp_path / f"{number}.jpg")
        with ShardWriter(tmp_path / "in") as writer:
            writer.write(
                sample(0, image=Image.open(tmp_path / "0.jpg"), retrieved=Image.open(tmp_path / "1.jpg")),
                *((tmp_path / f"{number}.jpg").read_bytes() for number in range(2)),
            )
        run(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--max-side", "60"])
        stored = scan_shard(tmp_path / "out" / "shard-000000.tar")[0].read()
        assert {name.partition(".")[2]: image_size(data) for name, data in stored.items() if "json" not in name} == {
            "image.jpg": (60, 40),
            "retrieved.jpg": (60, 40),
        }
        with pytest.raises(SystemExit, match="max_side is for shards"):
            run(["convert", str(tmp_path / "in"), str(tmp_path / "rows"), "--to", "ms-swift", "--max-side", "60"])
