"""Damaged and invented inputs: only the documented errors, nothing lost or changed in silence; and what was found so.

The long form is ``python -m benchmarks.fuzz --seconds 1800``.
"""

import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import fuzz as fuzzing
from benchmarks.fuzz import Campaign, fuzz, main
from benchmarks.fuzz_mutations import tar_pieces, with_checksum
from benchmarks.fuzz_targets import ACCEPTED, REFUSED, TARGETS, Target, expect, run_image, run_shard, tar_file
from realign_lightning.data import ShardError, decode_sample, encode_members, scan_shard
from realign_lightning.data.convert import convert
from realign_lightning.data.manifest import parse_index, read_index
from realign_lightning.data.schema import MAX_DEPTH, decode_image, load_json, parse_record
from realign_lightning.data.sources import SourceProblem, guess_layout, open_source
from realign_lightning.data.sources.rows import json_array, read_rows
from realign_lightning.types import SampleError
from tests.data.helpers import good_members, picture, sample, write_shards

RECORD = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
EXECUTIONS = 40

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def told(campaign: Campaign) -> str:
    return "\n".join(trace for _, trace in campaign.findings.values())


class TestFuzzer:
    @pytest.mark.parametrize("name", TARGETS)
    def test_finds_nothing(self, name):
        campaign = fuzz(TARGETS[name], seed=11, executions=EXECUTIONS)
        assert not campaign.findings, told(campaign)
        assert campaign.executions == EXECUTIONS == sum(campaign.outcomes.values())
        assert min(campaign.outcomes[ACCEPTED], campaign.outcomes[REFUSED]) > 0, "it must try both"

    def test_equal_seeds_give_equal_runs(self):
        one, two, other = (fuzz(TARGETS["record"], seed, executions=80) for seed in (1, 1, 2))
        assert one.corpus == two.corpus
        assert one.outcomes == two.outcomes
        assert one.corpus != other.corpus

    def test_a_parser_that_takes_everything_is_found(self, monkeypatch):
        monkeypatch.setattr("benchmarks.fuzz_targets.parse_record", json.loads)
        assert fuzz(TARGETS["record"], executions=120).findings

    def test_a_reader_that_stops_at_damage_is_found(self, monkeypatch):
        """Without the check of what follows the last member, tarfile's own quiet ends remain."""
        monkeypatch.setattr("realign_lightning.data.scan.check_end", lambda *_: None)
        findings = told(fuzz(TARGETS["shard"], executions=150))
        assert "the members differ from those that tarfile finds" in findings

    def test_what_takes_too_long_is_found(self, monkeypatch):
        def forever(data, folder):
            time.sleep(9)

        monkeypatch.setattr(fuzzing, "SLOW_SECONDS", 0.05)
        assert "Hang" in told(fuzz(Target("slow", lambda: [b"x"], [], forever), executions=1))

    def test_findings_are_kept_and_replayed(self, tmp_path, monkeypatch, capsys):
        def breaks(data, folder):
            expect(b"{" not in data, "a brace")
            return ACCEPTED

        target = Target("record", lambda: [b'{"a": 1}', b"{}"], [], breaks)
        monkeypatch.setitem(TARGETS, "record", target)
        assert main(["--targets", "record", "--executions", "2", "--folder", str(tmp_path)]) == 1
        assert "1 findings" in capsys.readouterr().out
        (kept,) = tmp_path.glob("record-*.bin")
        assert kept.read_bytes() == b"{}", "the smallest"
        with pytest.raises(AssertionError, match="a brace"):
            main(["--targets", "record", "--replay", str(kept)])


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


class TestInvented:
    @quick
    @given(data=st.binary(max_size=200))
    def test_any_bytes_are_refused_with_the_documented_error(self, data):
        for function in (parse_record, decode_image):
            with pytest.raises(SampleError):
                function(data)

    @quick
    @given(changes=st.dictionaries(st.sampled_from([*RECORD, "image_id", "masked", "retrieval_rank"]), ANY, max_size=3))
    def test_any_field_is_taken_as_it_is_or_refused(self, changes):
        written = {**RECORD, **changes}
        try:
            assert parse_record(json.dumps(written).encode()) == written
        except SampleError as error:
            assert str(error)  # noqa: PT017 - either of both is right

    @quick
    @given(chosen=TEXT, rejected=TEXT, prompt=TEXT, more=PLAIN)
    def test_what_is_written_is_what_is_read(self, chosen, rejected, prompt, more):
        before = sample(0, prompt=prompt, chosen=chosen, rejected=rejected, provenance={"more": more})
        try:
            after = decode_sample(encode_members(before))
        except SampleError as error:
            blank = not (chosen.strip() and rejected.strip() and prompt.strip())
            assert blank or chosen.strip() == rejected.strip(), error  # noqa: PT017
            return
        assert (after.prompt, after.chosen, after.rejected) == (prompt, chosen, rejected)
        assert after.provenance == {"more": more}

    @quick
    @given(order=st.permutations(range(6)))
    def test_members_in_any_order_are_two_samples_or_an_error(self, order):
        members = [good_members(0, 1)[place] for place in order]
        beside = len({name[:6] for name, _ in members[:3]}) == 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.tar"
            path.write_bytes(tar_file(members))
            if beside:
                assert sorted(one.key for one in scan_shard(path)) == ["000000", "000001"]
            else:
                with pytest.raises(ShardError, match=r"a\.tar.*side by side"):
                    scan_shard(path)


def tar_with(folder: Path, *blocks: bytes, before: int = 3) -> Path:
    """A tar of two samples with blocks before its fourth member."""
    pieces = tar_pieces(tar_file(good_members(0, 1)))
    path = folder / "found.tar"
    path.write_bytes(b"".join([*pieces[:before], *blocks, *pieces[before:]]))
    return path


def header(kind: bytes, body: bytes, size: bytes | None = None) -> bytes:
    """A header of some type with its contents; ``size`` is the text of its size field."""
    info = tarfile.TarInfo("extension")
    info.type, info.size = kind, len(body)
    block = info.tobuf(tarfile.GNU_FORMAT)
    if size is not None:
        block = with_checksum(block[:124] + size.ljust(12, b"\0") + block[136:])
    return block + body.ljust(-(-len(body) // 512) * 512, b"\0")


def pax_record(text: bytes) -> bytes:
    """A record of a PAX header: its length, which counts itself, and its text."""
    length = len(text) + 2
    length += len(str(length + len(str(length))))
    return b"%d %s\n" % (length, text)


class TestFoundInShards:
    @pytest.mark.parametrize(
        "blocks",
        [
            header(b"x", pax_record(b"GNU.sparse.map=0,x")),
            header(b"x", pax_record(b"GNU.sparse.size=x")),
            header(b"x", pax_record(b"size=" + b"9" * 30)),
            header(b"L", b"000001.json\0", size=b"\x80" + b"\x7f" * 11),
        ],
        ids=["sparse map", "sparse size", "size of the next", "size of a name"],
    )
    def test_headers_that_tarfile_cannot_read(self, tmp_path, blocks):
        """They came out as ValueError and OverflowError, without the shard's name."""
        path = tar_with(tmp_path, blocks)
        with pytest.raises(ShardError, match=r"found\.tar"):
            scan_shard(path)
        with pytest.raises(ShardError, match=r"found\.tar"):
            list(open_source(path, "shards").read())

    def test_numbers_in_the_index_that_no_computer_holds(self, tmp_path):
        """They came out as OverflowError, without the name of the index."""
        text = (write_shards(tmp_path, 2) / "index.json").read_text()
        first = str(read_index(tmp_path).shards[0].bytes)
        damaged = text.replace(first, f"{first}{'0' * 400}")
        assert damaged != text
        with pytest.raises(ShardError, match=r"index\.json is damaged"):
            parse_index(damaged.encode(), "index.json")

    def test_a_sparse_member_of_another_tar(self, tmp_path):
        """Its size is what it would be unpacked, and was read as if it stood there."""
        info = tarfile.TarInfo("a.json")
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[156:157] = b"S"
        block[483:495] = b"77777777777\0"
        image = io.BytesIO()
        picture(0).save(image, "JPEG")
        (tmp_path / "sparse.tar").write_bytes(with_checksum(bytes(block)) + tar_file([("a.jpg", image.getvalue())]))
        with pytest.raises(ShardError, match=r"sparse\.tar: member 'a\.json' is a sparse file"):
            list(open_source(tmp_path / "sparse.tar", "shards").read())

    def test_two_images_for_one_place(self, tmp_path):
        """Of a photo and its segmentation the last one was taken."""
        buffers = [io.BytesIO(), io.BytesIO()]
        picture(0).save(buffers[0], "JPEG")
        picture(1).save(buffers[1], "PNG")
        members = [("a.jpg", buffers[0].getvalue()), ("a.seg.png", buffers[1].getvalue()), ("a.txt", b"A cat.")]
        (tmp_path / "other.tar").write_bytes(tar_file(members))
        (problem,) = open_source(tmp_path / "other.tar", "shards").read()
        assert problem.where == "other.tar: a"
        assert "compete for one place" in problem.reason


class TestFoundInJson:
    @pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 300, 960, 100_000])
    @pytest.mark.parametrize("opening", ["[", '{"a":'])
    def test_deep_nesting(self, depth, opening):
        """What the parser let pass was too deep for those who walked through it."""
        closing = {"[": "]", '{"a":': "}"}[opening]
        text = f"{opening * depth}1{closing * depth}"
        with pytest.raises(ValueError, match="nested too deeply"):
            load_json(text.encode())
        with pytest.raises(SampleError, match="nested too deeply"):
            parse_record(json.dumps(RECORD)[:-1].encode() + f', "more": {text}}}'.encode())

    def test_as_deep_as_is_allowed(self):
        assert load_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
        assert load_json(b"[" + b"[]," * 500 + b"[]]") == [[]] * 501

    @pytest.mark.parametrize("depth", [300, 960])
    def test_deep_nesting_in_a_row(self, tmp_path, depth):
        rows = [{"file_name": "a.jpg", "more": 0}, {"file_name": "b.jpg"}]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)).replace("0}", f"{'[' * depth}{']' * depth}}}"))
        first, second = open_source(path, "image-folder").read()
        assert (first.where, second.image.image_id) == ("rows.jsonl, line 1", "b.jpg")
        assert "nested too deeply" in first.reason

    @pytest.mark.parametrize("digits", [309, 4000])
    def test_whole_numbers_beyond_a_float(self, digits):
        with pytest.raises(SampleError, match="retrieval_score is too large"):
            parse_record(json.dumps({**RECORD, "retrieval_score": 10**digits}).encode())

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b'[{"a": 1}][{"a": 2}]', "goes on after the end of its JSON, at byte 10"),
            (b'[{"a": 1}] {"a": 2}', "goes on after"),
            (b'[{"a": 1}}', "ends in a brace"),
            (b"[}", "ends in a brace"),
            (b" \n", "got white space"),
        ],
    )
    def test_arrays_that_end_early(self, tmp_path, text, reason):
        """What stood behind them was lost."""
        (tmp_path / "rows.json").write_bytes(text)
        with pytest.raises(ValueError, match=rf"rows\.json.*{reason}"):
            list(read_rows(tmp_path / "rows.json"))

    def test_a_comma_after_the_last_row(self, tmp_path):
        (tmp_path / "rows.json").write_bytes(b'[{"a": 1},]')
        row, problem = read_rows(tmp_path / "rows.json")
        assert row.fields == {"a": 1}
        assert isinstance(problem, SourceProblem)

    def test_an_array_that_is_there_twice(self, tmp_path):
        """Of two, Python's parser takes the last, and we took the first."""
        (tmp_path / "rows.json").write_bytes(b'{"rows": [1], "rows": [2]}')
        with pytest.raises(ValueError, match=r"rows\.json holds its array twice"):
            list(json_array(tmp_path / "rows.json", "rows"))

    def test_the_rest_of_an_object_is_cut(self, tmp_path):
        (tmp_path / "rows.json").write_bytes(b'{"rows": [1], "images": [')
        with pytest.raises(ValueError, match=r"rows\.json is cut"):
            list(json_array(tmp_path / "rows.json", "rows"))

    def test_a_text_without_end_takes_no_longer_than_another(self, tmp_path):
        """It was begun anew at every escaped quotation mark: a megabyte took an hour."""
        (tmp_path / "rows.json").write_bytes(b'["' + b'\\"' * 500_000)
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"rows\.json is cut"):
            list(json_array(tmp_path / "rows.json"))
        assert time.monotonic() - begin < 5

    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
    def test_an_empty_file(self, tmp_path, name):
        """It was a table without rows."""
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name} is empty"):
            list(read_rows(tmp_path / name))


class TestFoundInTables:
    @pytest.mark.parametrize("first", ['a,"b', 'a,"b"c', f"a,{'b' * 140_000}"], ids=["cut", "quotes", "long"])
    def test_a_first_line_that_cannot_be_read(self, tmp_path, first):
        """It came out as csv.Error, which is no ValueError."""
        (tmp_path / "rows.csv").write_text(f"{first}\n1,2\n")
        with pytest.raises(ValueError, match=r"rows\.csv: the line of column names cannot be read"):
            list(read_rows(tmp_path / "rows.csv"))

    def test_a_quotation_mark_without_end(self, tmp_path):
        """All rows up to the end went with it, as one."""
        (tmp_path / "rows.csv").write_text('a,b\n1,2\n3,"4\n5,6\n7,8\n')
        with pytest.raises(ValueError, match=r"rows\.csv is cut, or lacks .* row 2 \(line 3\)"):
            list(read_rows(tmp_path / "rows.csv"))

    def test_a_quotation_mark_that_ends_in_a_later_row(self, tmp_path):
        (tmp_path / "rows.csv").write_text('a,b\n1,"2\n3,4\n5,"6"\n7,8\n')
        problem, row = read_rows(tmp_path / "rows.csv")
        assert (problem.where, row.fields) == ("rows.csv, row 1", {"a": "7", "b": "8"})
        assert "it takes the lines 2 to 4 of the file" in problem.reason

    def test_damaged_parquet_is_named_when_its_layout_is_looked_for(self, tmp_path):
        """pyarrow's own errors name no file."""
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"image": ["a.jpg"], "question": ["Q?"]}), path)
        data = path.read_bytes()
        for damaged in (data[:-1], data[:10], b"", data.replace(b"question", b"\xff\xfe\xfd\xfcuest")):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"rows\.parquet is damaged"):
                guess_layout(path)

    def test_two_images_with_one_id(self, tmp_path):
        """Captions went to the last."""
        images = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}, {"id": 2, "file_name": "c.jpg"}]
        captions = [{"id": number, "image_id": number, "caption": "A cat."} for number in (1, 2)]
        path = tmp_path / "captions.json"
        path.write_text(json.dumps({"images": [*images, images[2]], "annotations": captions}))
        problem, record = open_source(path, "coco-captions").read()
        assert "several images have the id 1: ['a.jpg', 'b.jpg']" in problem.reason
        assert record.image.image_id == "c.jpg"

    def test_nothing_comes_of_a_file_that_goes_on(self, tmp_path):
        """As a whole conversion: the output is not begun."""
        rows = [{"prompt": "Q?", "chosen": "A", "rejected": "B", "image": "a.jpg", "retrieved": "b.jpg"}]
        for number, name in enumerate("ab"):
            picture(number).save(tmp_path / f"{name}.jpg")
        (tmp_path / "rows.json").write_text(json.dumps(rows) * 2)
        with pytest.raises(ValueError, match=r"rows\.json goes on"):
            convert(open_source(tmp_path / "rows.json", "parquet"), "shards", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        assert convert(open_source(tmp_path / "rows.json", "parquet"), "shards", tmp_path / "out").pairs == 1


class TestFoundInImages:
    def test_too_little_memory_is_no_bad_sample(self, monkeypatch):
        """It was, and good samples went into quarantine."""
        buffer = io.BytesIO()
        picture(0).save(buffer, "PNG")

        def fails(*_):
            raise MemoryError

        monkeypatch.setattr(Image.Image, "convert", fails)
        with pytest.raises(MemoryError):
            decode_image(buffer.getvalue())

    def test_a_jpeg_of_many_scans(self):
        """Repeating the last scan of 8000 x 8000 pixels took a tenth of a second for every 100 bytes."""
        buffer = io.BytesIO()
        picture(0, (64, 64)).save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
        assert decode_image(data).size == (64, 64)
        last = data[data.rindex(b"\xff\xda") : -2]
        with Image.open(io.BytesIO(data[:-2] + last * 100 + data[-2:])) as opened:
            opened.load()
        with pytest.raises(SampleError, match="more than 100 scans"):
            decode_image(data[:-2] + last * 100 + data[-2:])

    @pytest.mark.filterwarnings("ignore:.*EXIF")
    def test_corrupt_exif_leaves_the_picture_as_it_is_stored(self):
        buffer = io.BytesIO()
        picture(0).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0")
        assert decode_image(buffer.getvalue()).size == picture(0).size
        assert run_image(buffer.getvalue(), Path()) == ACCEPTED


def test_members_renamed_by_headers_are_refused(tmp_path):
    """GNU and PAX long names are not passed over: what is read later looks at plain headers only."""
    renamed = header(b"x", pax_record(b"path=000002.json"))
    pieces = tar_pieces(tar_file(good_members(0)))
    data = b"".join([*pieces[:2], renamed, *pieces[2:]])
    assert run_shard(data, tmp_path) == REFUSED
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.tar: the header of member '000002\.json' does not name it itself"):
        scan_shard(tmp_path / "a.tar")
