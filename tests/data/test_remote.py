"""Shards behind a web server, of a kind that fails in every way."""

import http.server
import json
import logging
import multiprocessing
import os
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from realign_lightning.data import DualPreferenceDataModule, ShardCache, ShardDataset, ShardError
from realign_lightning.data.manifest import read_index
from realign_lightning.data.order import Blocks, EpochSampler
from realign_lightning.data.remote import RemoteFolder
from tests.data.helpers import Recorder, WordBackbone, write_shards
from tests.data.test_datamodule import trainer


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``trouble`` maps a file's name to how its next answers fail."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.trouble, self.asked = folder, {}, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body: bool):
        name = self.path.lstrip("/")
        path = self.server.folder / name
        if with_body:
            self.server.asked.append(name)
        failures = self.server.trouble.get(name, [])
        failure = failures.pop(0) if failures and with_body else None
        if failure in ("error", "forbidden"):
            self.send_error(503 if failure == "error" else 403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        status, begin = 200, 0
        if asked := self.headers.get("Range"):
            begin, end = (int(part or len(data)) for part in asked.removeprefix("bytes=").split("-"))
            status, whole, data = 206, len(data), data[begin : end + 1]
        if failure == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{whole}")
        self.end_headers()
        if with_body:
            self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)
        if failure == "cut":
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path):
    with serving(write_shards(tmp_path / "there", 23, 4)) as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("realign_lightning.data.remote.time.sleep", lambda _: None)


def dataset(server, tmp_path, max_bytes: int = 10**9) -> ShardDataset:
    return ShardDataset(server.address, WordBackbone(), ShardCache(tmp_path / "cache", max_bytes))


def cached(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*.tar"))


class TestReading:
    def test_as_from_the_disk(self, server, tmp_path):
        remote, local = dataset(server, tmp_path), ShardDataset(tmp_path / "there", WordBackbone())
        assert remote.keys == local.keys
        assert server.asked == ["index.json"]
        assert [remote.fingerprint(row) for row in range(23)] == [local.fingerprint(row) for row in range(23)]
        # Each shard came once.
        assert sorted(server.asked[1:]) == [f"shard-00000{number}.tar" for number in range(6)]
        assert remote.shards.digest == local.shards.digest

    def test_what_is_there_is_not_fetched_again(self, server, tmp_path):
        first = dataset(server, tmp_path)
        first[0]
        del server.asked[:]
        dataset(server, tmp_path)[0]
        assert server.asked == ["index.json"]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_training(self, server, tmp_path, workers):
        seen = []
        for source in (server.address, str(tmp_path / "there")):
            options = {"num_workers": workers, "block_shards": 2, "cache_dir": str(tmp_path / "cache")}
            data = DualPreferenceDataModule(WordBackbone(), source, source, 2, **options)
            recorder = Recorder()
            trainer(tmp_path, max_epochs=2).fit(recorder, datamodule=data)
            seen.append(recorder.seen)
        assert seen[0] == seen[1]
        assert [row[0] for row in seen[0]].count("train") == 2 * 23


class TestServers:
    def test_one_that_gives_no_parts(self, tmp_path, monkeypatch):
        """As Python's own does; and a shard of more than one part."""
        monkeypatch.setattr("realign_lightning.data.remote._CHUNK", 4096)
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(write_shards(tmp_path / "there", 9)))
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
            thread = threading.Thread(target=plain.serve_forever)
            thread.start()
            try:
                cache = ShardCache(tmp_path / "cache", 10**9)
                read = ShardDataset(f"http://127.0.0.1:{plain.server_port}", WordBackbone(), cache)
                assert [read[row].key for row in range(9)] == [f"{row:06d}" for row in range(9)]
            finally:
                plain.shutdown()
                thread.join()


class TestFailures:
    @pytest.mark.parametrize("failure", ["error", "cut", "flipped"])
    def test_passing_ones_are_met_by_another_attempt(self, server, tmp_path, failure, caplog):
        read = dataset(server, tmp_path)
        server.trouble["shard-000001.tar"] = [failure, failure]
        assert read[5].key == "000005"
        assert "shard-000001.tar: attempt 2 of 5 failed" in caplog.text

    @pytest.mark.parametrize("failure", ["error", "cut", "flipped"])
    def test_lasting_ones_are_an_error_that_names_the_shard(self, server, tmp_path, failure):
        read = dataset(server, tmp_path)
        server.trouble["shard-000001.tar"] = [failure] * 99
        with pytest.raises(ShardError, match=rf"{server.address}/shard-000001\.tar could not be fetched \(5 attempts"):
            read[5]
        assert not list((tmp_path / "cache" / "shards").glob(".*.partial"))
        assert cached(tmp_path) == []

    def test_one_that_refuses_is_asked_once(self, server, tmp_path):
        read = dataset(server, tmp_path)
        server.trouble["shard-000001.tar"] = ["forbidden"] * 9
        with pytest.raises(ShardError, match=r"shard-000001\.tar may not be read: .*403.*look at your credentials"):
            read[5]
        assert server.asked.count("shard-000001.tar") == 1

    def test_missing_before_training(self, server, tmp_path):
        (tmp_path / "there" / "shard-000003.tar").unlink()
        with pytest.raises(ShardError, match=r"shard-000003\.tar does not exist"):
            dataset(server, tmp_path)

    def test_cut_before_training(self, server, tmp_path):
        path = tmp_path / "there" / "shard-000003.tar"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ShardError, match=r"shard-000003\.tar has \d+ bytes, its index says \d+; upload it again"):
            dataset(server, tmp_path)

    @pytest.mark.parametrize("text", ["<html>Sign in</html>", "{}", ""])
    def test_no_index(self, server, tmp_path, text):
        (tmp_path / "there" / "index.json").write_text(text)
        with pytest.raises(ShardError, match=r"/index\.json is damaged"):
            dataset(server, tmp_path)

    def test_nobody_answers(self, tmp_path):
        with serving(tmp_path) as server:
            address = server.address
        with pytest.raises(ShardError, match=rf"{address}/index\.json could not be fetched"):
            ShardDataset(address, WordBackbone(), ShardCache(tmp_path / "cache", 10**9))

    def test_a_single_tar_or_a_pattern(self, server, tmp_path):
        cache = ShardCache(tmp_path / "cache", 10**9)
        for name in ("shard-000000.tar", "*.tar", "shard-{000000..000003}.tar"):
            with pytest.raises(ShardError, match=r"expected the address of a folder"):
                ShardDataset(f"{server.address}/{name}", WordBackbone(), cache)

    def test_an_index_that_does_not_say_where_samples_stand(self, server, tmp_path):
        path = tmp_path / "there" / "index.json"
        content = json.loads(path.read_text())
        for shard in content["shards"]:
            del shard["members"]
        path.write_text(json.dumps(content))
        with pytest.raises(ShardError, match="realign-lightning index --overwrite"):
            dataset(server, tmp_path)

    def test_a_storage_whose_package_is_missing(self, tmp_path, monkeypatch):
        def url_to_fs(address, **_):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
        with pytest.raises(ShardError, match=r"Install s3fs .* pip install realign-lightning\[remote\]"):
            ShardDataset("s3://bucket/pairs", WordBackbone(), ShardCache(tmp_path / "cache", 10**9))

    def test_a_cache_that_cannot_be_written(self, server, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(ShardError, match="set cache_dir to another"):
            dataset(server, tmp_path)


class TestCache:
    def size(self, tmp_path) -> int:
        return max(shard.bytes for shard in read_index(tmp_path / "there").shards)

    def test_never_holds_more_than_it_may(self, server, tmp_path):
        read = dataset(server, tmp_path, 2 * self.size(tmp_path))
        for row in range(23):
            assert read[row].key == f"{row:06d}"
            assert len(cached(tmp_path)) <= 2

    def test_what_was_used_last_stays(self, server, tmp_path):
        size = self.size(tmp_path)
        for row in (0, 4, 0, 8):
            # A new process each time, as it were: an open file is not opened again.
            dataset(server, tmp_path, 2 * size)[row]
            time.sleep(0.01)
        infos = read_index(tmp_path / "there").shards
        assert {path.stem for path in cached(tmp_path)} == {infos[0].sha256, infos[2].sha256}

    def test_files_of_others_stay(self, server, tmp_path):
        """The folder may be one that people keep tars in."""
        others = [
            tmp_path / "cache" / name for name in ("mine.tar", ".x.partial", "shards/mine.tar", "shards/.a.b.partial")
        ]
        for path in others:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(10**6))
            os.utime(path, (0, 0))
        read = dataset(server, tmp_path, 2 * self.size(tmp_path))
        assert [read[row].key for row in range(23)] == [f"{row:06d}" for row in range(23)]
        assert all(path.exists() for path in others)

    def test_a_kept_shard_that_was_damaged_is_fetched_again(self, server, tmp_path, caplog):
        dataset(server, tmp_path)[0]
        (path,) = cached(tmp_path)
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
        local = ShardDataset(tmp_path / "there", WordBackbone())
        assert dataset(server, tmp_path).fingerprint(0) == local.fingerprint(0)
        assert f"{path} is damaged, and will be fetched again" in caplog.text

    def test_a_folder_in_its_place(self, server, tmp_path):
        info = read_index(tmp_path / "there").shards[0]
        (tmp_path / "cache" / "shards" / f"{info.sha256}.tar").mkdir(parents=True)
        with pytest.raises(ShardError, match=r"shard-000000\.tar cannot be kept as"):
            dataset(server, tmp_path)[0]

    def test_too_small_for_two_blocks(self, server, tmp_path):
        data = DualPreferenceDataModule(
            WordBackbone(), server.address, batch_size=2, cache_dir=str(tmp_path / "cache"), cache_size_gb=1e-5
        )
        with pytest.raises(ShardError, match=r"raise cache_size_gb, or lower block_shards"):
            data.setup("fit")

    def test_too_little_disk(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda _: _Disk(10))
        with pytest.raises(ShardError, match="has 10 bytes of free disk"):
            dataset(server, tmp_path)[0]

    def test_what_a_killed_process_left_goes(self, server, tmp_path):
        read = dataset(server, tmp_path)
        left = tmp_path / "cache" / "shards" / f".{'0' * 64}.1000000000.partial"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"x")
        read[0]
        assert not left.exists()
        assert len(cached(tmp_path)) == 1

    def test_processes_fetch_each_shard_once(self, server, tmp_path):
        read = dataset(server, tmp_path)
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_read_all, args=(read,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert sorted(server.asked[1:]) == [f"shard-00000{number}.tar" for number in range(6)]

    def test_a_lock_does_not_outlive_its_holder_in_a_fork(self, tmp_path):
        cache = ShardCache(tmp_path, 10**9)
        context = multiprocessing.get_context("fork")
        with cache._lock("one"):
            child = context.Process(target=time.sleep, args=(60,))
            child.start()
        try:
            with cache._lock("one", wait=False) as is_ours:
                assert is_ours
        finally:
            child.kill()
            child.join()

    def test_in_advance(self, server, tmp_path):
        read = dataset(server, tmp_path)
        read.shards.prefetch([3, 4])
        deadline = time.monotonic() + 30
        while len(cached(tmp_path)) < 2 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert sorted(server.asked[1:]) == ["shard-000003.tar", "shard-000004.tar"]

    def test_in_advance_a_failure_is_only_told(self, server, tmp_path, caplog):
        read = dataset(server, tmp_path)
        server.trouble["shard-000003.tar"] = ["error"] * 5
        with caplog.at_level(logging.WARNING):
            read.shards.prefetch([3])
            deadline = time.monotonic() + 30
            while "not fetched in advance" not in caplog.text and time.monotonic() < deadline:
                threading.Event().wait(0.01)
        assert "not fetched in advance" in caplog.text
        assert read[12].key == "000012"


class _Disk:
    def __init__(self, free: int):
        self.free = free


def _read_all(read: ShardDataset) -> None:
    for row in range(len(read)):
        read[row]


class TestBlocks:
    def items(self, counts, size, rank=0, ranks=1, epoch=0, shuffle=True):
        sampler = EpochSampler(sum(counts), ranks, rank, 3, shuffle, blocks=Blocks(counts, size))
        sampler.set_epoch(epoch)
        return list(sampler)

    def test_one_block_after_the_other(self):
        counts = [4, 4, 4, 3, 2]
        shard_of = [number for number, count in enumerate(counts) for _ in range(count)]
        rows = [item.row for item in self.items(counts, 2)]
        assert sorted(rows) == list(range(17))
        visited = list(dict.fromkeys(shard_of[row] for row in rows))
        # Once left, a block is not come back to.
        changes = [frozenset(visited[start : start + 2]) for start in (0, 2, 4)]
        assert sorted(number for block in changes for number in block) == [0, 1, 2, 3, 4]
        position = 0
        for block in changes:
            count = sum(counts[number] for number in block)
            assert {shard_of[row] for row in rows[position : position + count]} == block
            position += count

    def test_what_comes_is_told_where_a_block_begins(self):
        counts = [4, 4, 4, 3, 2]
        told = [item.coming for item in self.items(counts, 2, rank=1, ranks=2) if item.coming]
        assert [len(one) for one in told] == [4, 3, 1]
        assert told[0][2:] == told[1][:2]
        assert told[1][2:] == told[2]

    def test_ranks_change_nothing(self):
        alone = [item.row for item in self.items([5, 3, 4], 2)]
        dealt = zip(*(self.items([5, 3, 4], 2, rank, 3) for rank in range(3)), strict=True)
        assert [item.row for items in dealt for item in items] == alone

    def test_filled_up_from_the_end(self):
        items = self.items([4, 3], 1, rank=1, ranks=2)
        assert items[-1].weight == 0
        assert items[-1].row == self.items([4, 3], 1)[-1].row

    def test_in_order(self):
        assert [item.row for item in self.items([2, 2], 1, shuffle=False)] == [0, 1, 2, 3]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="block_shards must be at least 1"):
            Blocks([1], 0)
        with pytest.raises(ValueError, match="blocks must hold 3 samples, got 2"):
            EpochSampler(3, blocks=Blocks([2], 1))


def test_addresses_need_no_slash_at_their_end():
    assert RemoteFolder("https://example.org/pairs/").address == "https://example.org/pairs"
