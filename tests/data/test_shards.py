import hashlib
import io
import json
import tarfile

import pytest
import webdataset
from PIL import Image

from realign_lightning.data import SCHEMA_VERSION, ShardDataset, ShardError, ShardIndex, ShardWriter, read_index
from realign_lightning.types import SampleError
from tests.data.helpers import WordBackbone, picture, sample, write_shards


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestWriter:
    def test_index_says_what_is_there(self, tmp_path):
        write_shards(tmp_path, 10, 4, built_with={"tau": 0.95})
        index = read_index(tmp_path)
        assert index.schema_version == SCHEMA_VERSION
        assert index.built_with == {"tau": 0.95}
        assert [shard.name for shard in index.shards] == [f"shard-00000{i}.tar" for i in range(3)]
        assert [shard.samples for shard in index.shards] == [4, 4, 2]
        for shard in index.shards:
            data = (tmp_path / shard.name).read_bytes()
            assert shard.bytes == len(data)
            assert shard.sha256 == hashlib.sha256(data).hexdigest()

    def test_equal_samples_give_equal_files(self, tmp_path):
        first, second = (write_shards(tmp_path / name, 5) for name in "ab")
        names = sorted(path.name for path in first.iterdir())
        assert names == ["index.json", "shard-000000.tar", "shard-000001.tar"]
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)

    @pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
    def test_stock_webdataset_reads_it(self, tmp_path, image_format):
        write_shards(tmp_path, 3, 8, image_format=image_format)
        stock = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
        found = list(stock)
        assert [item["__key__"] for item in found] == ["000000", "000001", "000002"]
        assert json.loads(found[2]["json"])["chosen"] == sample(2).chosen
        image = Image.open(io.BytesIO(found[2][f"image.{image_format}"]))
        assert image.size == sample(2).image.size
        if image_format != "jpg":
            assert image.tobytes() == sample(2).image.tobytes()

    def test_original_files_pass_through(self, tmp_path):
        buffer = io.BytesIO()
        picture(7).save(buffer, "JPEG")
        with ShardWriter(tmp_path) as writer:
            writer.write(sample(0), image=buffer.getvalue())
        with tarfile.open(tmp_path / "shard-000000.tar") as tar:
            assert tar.extractfile("000000.image.jpg").read() == buffer.getvalue()

    def test_crash_leaves_nothing_that_a_reader_accepts(self, tmp_path):
        def interrupted_write():
            with ShardWriter(tmp_path, samples_per_shard=2) as writer:
                for number in range(3):
                    writer.write(sample(number))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted_write()
        assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
        with pytest.raises(ShardError, match=r"has no index\.json"):
            ShardDataset(tmp_path, WordBackbone())
        assert len(ShardDataset(tmp_path / "shard-000000.tar", WordBackbone())) == 2

    def test_kill_leaves_a_hidden_file_that_no_pattern_matches(self, tmp_path):
        writer = ShardWriter(tmp_path, samples_per_shard=2)
        writer.write(sample(0))
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        for source in (tmp_path, tmp_path / "*.tar", tmp_path / "*"):
            with pytest.raises(ShardError, match=r"index\.json|matches no file"):
                ShardDataset(source, WordBackbone())

    def test_existing_shards_are_kept_unless_told(self, tmp_path):
        write_shards(tmp_path, 9, 4)
        before = (tmp_path / "index.json").read_bytes()
        with pytest.raises(FileExistsError, match=r"already holds index\.json; pass overwrite=True"):
            ShardWriter(tmp_path)
        assert (tmp_path / "index.json").read_bytes() == before
        write_shards(tmp_path, 3, 4, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-000000.tar"]

    def test_overwriting_drops_the_index_first(self, tmp_path):
        write_shards(tmp_path, 3)
        ShardWriter(tmp_path, overwrite=True)
        with pytest.raises(ShardError, match=r"has no index\.json"):
            read_index(tmp_path)

    def test_a_refused_sample_does_not_spoil_the_shard(self, tmp_path):
        with ShardWriter(tmp_path) as writer:
            writer.write(sample(0))
            with pytest.raises(SampleError, match="equal to rejected"):
                writer.write(sample(1, rejected=sample(1).chosen))
            writer.write(sample(1))
        assert ShardDataset(tmp_path, WordBackbone()).keys == ["000000", "000001"]

    def test_duplicate_key_in_another_shard(self, tmp_path):
        with ShardWriter(tmp_path, samples_per_shard=1) as writer:
            writer.write(sample(0))
            with pytest.raises(ValueError, match="key '000000' was already written"):
                writer.write(sample(0))
            writer.write(sample(1))

    def test_no_samples(self, tmp_path):
        with pytest.raises(ValueError, match="no sample was written"), ShardWriter(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="samples_per_shard must be at least 1, got 0"):
            ShardWriter(tmp_path, samples_per_shard=0)
        with pytest.raises(ValueError, match="built_with must hold plain JSON"):
            ShardWriter(tmp_path, built_with={"path": tmp_path})
        assert list(tmp_path.iterdir()) == []

    def test_closing_by_hand_returns_the_index(self, tmp_path):
        writer = ShardWriter(tmp_path)
        writer.write(sample(0))
        index = writer.close()
        assert isinstance(index, ShardIndex)
        assert index == read_index(tmp_path)


class TestReadIndex:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(ShardError, match="nowhere does not exist"):
            read_index(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "shards": 3, "built_with": {}}']
    )
    def test_damaged(self, tmp_path, text):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ShardError, match=r"index\.json is damaged"):
            read_index(tmp_path)

    def test_other_version(self, tmp_path):
        write_shards(tmp_path, 1)
        edit_index(tmp_path, schema_version=99)
        with pytest.raises(ShardError, match="schema version 99, expected 1"):
            read_index(tmp_path)

    def test_no_shards(self, tmp_path):
        write_shards(tmp_path, 1)
        edit_index(tmp_path, shards=[])
        with pytest.raises(ShardError, match="at least one shard"):
            read_index(tmp_path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "../other.tar"},
            {"name": "/etc/other.tar"},
            {"name": "a/b.tar"},
            {"name": ".hidden.tar"},
            {"samples": 0},
            {"samples": "3"},
            {"bytes": -1},
            {"sha256": "abc"},
            {"more": 1},
        ],
    )
    def test_bad_entry(self, tmp_path, changes):
        write_shards(tmp_path, 1)
        entry = json.loads((tmp_path / "index.json").read_text())["shards"][0]
        edit_index(tmp_path, shards=[entry | changes])
        with pytest.raises(ShardError, match=r"index\.json is damaged"):
            read_index(tmp_path)
