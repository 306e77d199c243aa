import hashlib
import json
import logging
import math
import os
import time

import numpy as np
import pytest

from realign_lightning.backbones.files import FileHasher
from realign_lightning.modules.cache import (
    FINGERPRINT,
    Entry,
    ReferenceCache,
    describe_changes,
    nearest_fingerprint,
)

MADE_WITH = {"weights": "a" * 64, "dtype": "float32", "max_length": "None"}


def entry(number: float) -> Entry:
    return Entry(-number, -2 * number, -3 * number)


def add(cache: ReferenceCache, *numbers: int, rank: int = 0) -> None:
    cache.add({f"f{n}": entry(n) for n in numbers}, {f"f{n}": f"key{n}" for n in numbers}, rank)


def test_float32_values_come_back_to_the_last_bit(tmp_path):
    values = np.random.default_rng(0).normal(-80, 60, (500, 3)).astype(np.float32)
    values[0] = [np.finfo(np.float32).max, np.finfo(np.float32).tiny, np.float32(1e-45)]
    cache = ReferenceCache(tmp_path, MADE_WITH)
    cache.add({str(i): Entry(*row.tolist()) for i, row in enumerate(values)}, {str(i): "key" for i in range(500)})
    cache.close()
    again = ReferenceCache(tmp_path, MADE_WITH).entries
    read = np.array([again[str(i)] for i in range(500)], dtype=np.float32)
    assert read.tobytes() == values.tobytes()


def test_every_process_writes_a_file_of_its_own_and_reads_all(tmp_path):
    caches = [ReferenceCache(tmp_path, MADE_WITH) for _ in range(3)]
    for rank, cache in enumerate(caches):
        add(cache, rank, rank=rank % 2)
    assert len(list(caches[0].folder.glob("rank-0-*.jsonl"))) == 2, "of two runs at the same time"
    assert len(list(caches[0].folder.glob("rank-1-*.jsonl"))) == 1
    assert ReferenceCache(tmp_path, MADE_WITH).entries == {f"f{n}": entry(n) for n in range(3)}


def test_what_was_added_is_on_disk_before_the_file_is_closed(tmp_path):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    add(cache, 1, 2)
    (file,) = cache.folder.glob("*.jsonl")
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["key1", "key2"]


@pytest.mark.parametrize("cut", [1, 5, 40, -1])
def test_a_last_line_that_was_cut_is_left_out_and_counted(tmp_path, caplog, cut):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    add(cache, 1, 2, 3)
    cache.close()
    (file,) = cache.folder.glob("*.jsonl")
    data = file.read_bytes()
    start = data[:-1].rindex(b"\n") + 1
    file.write_bytes(data[:-1] if cut < 0 else data[: start + cut])
    with caplog.at_level(logging.WARNING):
        again = ReferenceCache(tmp_path, MADE_WITH)
    assert again.entries.keys() == {"f1", "f2"}
    assert "that work is done anew" in caplog.text
    add(again, 3)
    again.close()
    assert ReferenceCache(tmp_path, MADE_WITH).entries.keys() == {"f1", "f2", "f3"}


@pytest.mark.parametrize("line", ["\0" * 40, '{"sample": "f", "key": "k", "chosen": -1.0}', "[]", '{"sample": 1}'])
def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path, line):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    add(cache, 1, 2, 3)
    cache.close()
    (file,) = cache.folder.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, lines[2], ""]))
    with pytest.raises(ValueError, match=r"Line 2 of .*jsonl is damaged.* remove the file"):
        ReferenceCache(tmp_path, MADE_WITH)


def test_a_value_that_is_no_number_on_disk_is_damage(tmp_path):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    (cache.folder / "rank-0-x.jsonl").write_text('{"sample": "f", "chosen": NaN, "rejected": 1.0, "visual": 1.0}\n')
    with pytest.raises(ValueError, match=r"Line 1 .*chosen is nan"):
        ReferenceCache(tmp_path, MADE_WITH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    with pytest.raises(ValueError, match="Sample 'bad' has log-probs"):
        cache.add({"a": entry(1), "b": Entry(-1.0, value, -1.0)}, {"a": "good", "b": "bad"})
    assert cache.entries == {}
    assert ReferenceCache(tmp_path, MADE_WITH).entries == {}


def test_another_fingerprint_is_another_folder(tmp_path):
    first = ReferenceCache(tmp_path, MADE_WITH)
    add(first, 1)
    for name in MADE_WITH:
        other = ReferenceCache(tmp_path, MADE_WITH | {name: "other"})
        assert other.folder != first.folder
        assert other.entries == {}


def test_a_folder_of_another_fingerprint_under_this_name_is_refused(tmp_path):
    cache = ReferenceCache(tmp_path, MADE_WITH)
    (cache.folder / FINGERPRINT).write_text(json.dumps(MADE_WITH | {"dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="made with dtype bfloat16, now float32"):
        ReferenceCache(tmp_path, MADE_WITH)
    (cache.folder / FINGERPRINT).unlink()
    with pytest.raises(ValueError, match=r"cannot be read .* remove"):
        ReferenceCache(tmp_path, MADE_WITH)


def test_the_nearest_of_other_caches_is_described(tmp_path):
    assert nearest_fingerprint(tmp_path / "nowhere", MADE_WITH) is None
    ReferenceCache(tmp_path, MADE_WITH | {"dtype": "bfloat16", "max_length": "7"})
    near = MADE_WITH | {"dtype": "bfloat16", "weights": MADE_WITH["weights"]}
    ReferenceCache(tmp_path, near)
    assert nearest_fingerprint(tmp_path, MADE_WITH) == near
    assert describe_changes(near, MADE_WITH) == "made with dtype bfloat16, now float32"
    longer = {"weights": "b" * 64, "dtype": "float32", "max_length": "None", "revision": "main"}
    assert describe_changes(MADE_WITH, longer) == ("made with revision not known, now main; made with other weights")
    ReferenceCache(tmp_path, MADE_WITH)
    assert nearest_fingerprint(tmp_path, MADE_WITH) is None


class TestFileHasher:
    def test_hash_is_that_of_the_content(self, tmp_path):
        data = np.random.default_rng(0).bytes((1 << 24) + 12345)
        (tmp_path / "large").write_bytes(data)
        assert FileHasher()(tmp_path / "large") == hashlib.sha256(data).hexdigest()

    def test_a_file_is_read_once(self, tmp_path, monkeypatch):
        file = tmp_path / "weights"
        file.write_bytes(b"one")
        before = FileHasher(tmp_path / "cache" / "files.json")(file)
        monkeypatch.setattr(hashlib, "sha256", None)
        assert FileHasher(tmp_path / "cache" / "files.json")(file) == before

    def test_a_file_that_changed_is_read_again(self, tmp_path):
        file = tmp_path / "weights"
        for second, content in enumerate((b"one", b"two", b"three")):
            file.write_bytes(content)
            # File systems tell times in steps of a few milliseconds.
            os.utime(file, (second, second))
            found = FileHasher(tmp_path / "files.json")(file)
            assert found == hashlib.sha256(content).hexdigest()

    def test_a_file_with_its_old_time_set_again_is_read_again(self, tmp_path):
        """As unpacked from an archive with fixed times: the same size, the same time of modification."""
        file = tmp_path / "weights"
        for content in (b"one", b"two"):
            # File systems tell times in steps of a few milliseconds.
            time.sleep(0.05)
            file.write_bytes(content)
            os.utime(file, (1, 1))
            assert FileHasher(tmp_path / "files.json")(file) == hashlib.sha256(content).hexdigest()

    def test_damaged_memory_costs_no_more_than_reading(self, tmp_path, caplog):
        file = tmp_path / "weights"
        file.write_bytes(b"one")
        (tmp_path / "files.json").write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            assert FileHasher(tmp_path / "files.json")(file) == hashlib.sha256(b"one").hexdigest()
        assert "identified anew" in caplog.text
        assert json.loads((tmp_path / "files.json").read_text())


def test_a_damaged_neighbour_stops_nobody(tmp_path, caplog):
    (ReferenceCache(tmp_path, MADE_WITH | {"dtype": "bfloat16"}).folder / FINGERPRINT).write_bytes(b"")
    near = MADE_WITH | {"max_length": "7"}
    ReferenceCache(tmp_path, near)
    with caplog.at_level(logging.WARNING):
        assert nearest_fingerprint(tmp_path, MADE_WITH) == near
    assert "cannot be read" in caplog.text
