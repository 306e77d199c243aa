"""Conversions, read back by us and by the libraries that they are made for."""

import io
import json
import os
import resource

import datasets
import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from realign_lightning.data import ShardWriter, decode_sample, read_index, scan_shard
from realign_lightning.data import convert as convert_module
from realign_lightning.data.convert import FORMATS, ConversionReport, convert, main
from realign_lightning.data.sources import (
    ImageFile,
    LlavaInstruct,
    MsSwift,
    Shards,
    Source,
    SourceProblem,
    SourceRecord,
    open_source,
)
from realign_lightning.types import PreferenceSample
from tests.data.helpers import picture, write_shards

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is it?"},
]
PLACED = [
    {"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "!"}]}
]
PROMPTS = ("What is in the picture?", " \n spaces ", CHAT, PLACED, "\u00bfQu\u00e9 es? \U0001f431")
KINDS = (("JPEG", "PNG"), ("PNG", "WEBP"), ("WEBP", "JPEG"), ("JPEG", "JPEG"), ("PNG", "PNG"))
BOTH_HALVES = sorted(FORMATS.keys() - {"trl"})


def file_of(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def content(source: Source) -> list[tuple]:
    """What every pair holds, images as the bytes of their files."""
    found = list(source.read())
    assert all(isinstance(row, SourceRecord) for row in found), found
    return [
        (row.key, row.prompt, row.chosen, row.rejected, row.image.read(), row.retrieved and row.retrieved.read())
        for row in found
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pairs with every kind of prompt, of image file and of provenance."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for number, (prompt, kinds) in enumerate(zip(PROMPTS, KINDS, strict=True)):
            blank = picture(0)
            facts = {"retrieval_rank": number, "retrieval_score": 0.5, "spans": [{"start": 0, "kind": "object"}]}
            facts = {**facts, "image_id": number if number % 2 else f"{number}.jpg"}
            pair = PreferenceSample(f"pair_{number}", blank, blank, prompt, f"A {number}.", f"B {number}. ", facts)
            image, retrieved = (file_of(2 * number + one, kind) for one, kind in enumerate(kinds))
            writer.write(pair, image, retrieved)
    return folder


class TestRoundTrips:
    @pytest.mark.parametrize("to", BOTH_HALVES)
    def test_nothing_changes(self, shards, tmp_path, to):
        there, back = tmp_path / "there", tmp_path / "back"
        assert convert(Shards(shards), to, there) == ConversionReport(rows=5, pairs=5)
        assert convert(open_source(there), "shards", back) == ConversionReport(rows=5, pairs=5)
        assert content(Shards(back)) == content(Shards(shards))
        assert [prompt for _, prompt, *_ in content(Shards(back))] == list(PROMPTS)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]

    @pytest.mark.parametrize("to", BOTH_HALVES)
    def test_provenance_stays(self, shards, tmp_path, to):
        convert(Shards(shards), to, tmp_path / "there")
        convert(open_source(tmp_path / "there"), "shards", tmp_path / "back")
        for before, after in zip(Shards(shards).read(), Shards(tmp_path / "back").read(), strict=True):
            assert before.facts.items() <= after.facts.items()
            assert after.facts.keys() - before.facts.keys() == {"retrieved_id"}

    def test_the_text_half_through_trl(self, shards, tmp_path):
        convert(Shards(shards), "trl", tmp_path / "there")
        assert [row[:5] for row in content(open_source(tmp_path / "there"))] == [
            row[:5] for row in content(Shards(shards))
        ]

    def test_shards_come_out_byte_for_byte(self, shards, tmp_path):
        for name in "ab":
            convert(Shards(shards), "shards", tmp_path / name)
        names = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert names == ["index.json", "shard-000000.tar"]
        assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)

    @pytest.mark.parametrize("to", FORMATS)
    def test_over_several_files(self, tmp_path, monkeypatch, to):
        monkeypatch.setattr(convert_module, "SAMPLES_PER_TAR", 4)
        monkeypatch.setattr(convert_module, "ROWS_PER_FILE", 4)
        monkeypatch.setattr(convert_module, "ROWS_PER_GROUP", 3)
        write_shards(tmp_path / "in", 10)
        assert convert(Shards(tmp_path / "in"), to, tmp_path / "out").pairs == 10
        files = [path.suffix for path in (tmp_path / "out").iterdir() if path.suffix in (".tar", ".parquet")]
        assert len(files) == (0 if to == "ms-swift" else 3)
        assert [row[:4] for row in content(open_source(tmp_path / "out"))] == [
            row[:4] for row in content(Shards(tmp_path / "in"))
        ]

    def test_the_webdataset_form_keeps_the_shard_contract(self, shards, tmp_path):
        convert(Shards(shards), "webdataset", tmp_path / "there")
        stored = [sample for shard in sorted((tmp_path / "there").iterdir()) for sample in scan_shard(shard)]
        assert [decode_sample(sample.read()).chosen for sample in stored] == [f"A {number}." for number in range(5)]


class TestOtherReaders:
    """What Hugging Face datasets and TRL make of the output."""

    def load(self, kind, pattern, tmp_path):
        return datasets.load_dataset(kind, data_files=str(pattern), split="train", cache_dir=str(tmp_path / "cache"))

    def test_webdataset(self, shards, tmp_path):
        convert(Shards(shards), "webdataset", tmp_path / "out")
        rows = self.load("webdataset", tmp_path / "out/*.tar", tmp_path)
        assert set(rows.column_names) == {"image.jpg", "retrieved.png", "json", "__key__", "__url__"}
        assert rows["__key__"][:] == [f"pair_{number}" for number in range(5)]
        for row, (_, prompt, chosen, rejected, image, retrieved) in zip(rows, content(Shards(shards)), strict=True):
            assert (row["json"]["chosen"], row["json"]["rejected"]) == (chosen, rejected)
            assert [turn["role"] for turn in row["json"]["prompt"]] == (
                [turn["role"] for turn in prompt] if isinstance(prompt, list) else ["user"]
            )
            for name, data in (("image.jpg", image), ("retrieved.png", retrieved)):
                with convert_module.Image.open(io.BytesIO(data)) as expected:
                    assert row[name].convert("RGB").tobytes() == expected.convert("RGB").tobytes()

    def test_webdataset_of_shards_as_they_are_is_refused_by_them(self, shards, tmp_path):
        """Why there is a format of its own: members that differ in their names."""
        with pytest.raises(Exception, match=r"don't share the same|generating the dataset"):
            self.load("webdataset", shards / "*.tar", tmp_path)

    def test_parquet(self, shards, tmp_path):
        convert(Shards(shards), "parquet", tmp_path / "out")
        rows = self.load("parquet", tmp_path / "out/*.parquet", tmp_path)
        assert rows.features["image"] == rows.features["retrieved"] == datasets.Image()
        assert rows["chosen"][:] == [f"A {number}." for number in range(5)]
        assert rows[0]["image"].size == picture(0).size
        raw = rows.cast_column("retrieved", datasets.Image(decode=False))
        assert [row["retrieved"]["bytes"] for row in raw] == [row[5] for row in content(Shards(shards))]
        assert json.loads(rows[3]["provenance"])["retrieval_rank"] == 3

    def test_trl(self, shards, tmp_path, tiny_llava):
        """TRL's own collator takes the rows, and makes of them what it makes of rows written by hand."""
        convert(Shards(shards), "trl", tmp_path / "out")
        rows = self.load("parquet", tmp_path / "out/*.parquet", tmp_path)
        assert rows.features["images"] == datasets.List(datasets.Image())
        collate = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(tiny_llava))
        columns = ("images", "prompt", "chosen", "rejected")
        texts = [0, 2]
        batch = collate([{name: rows[index][name] for name in columns} for index in texts])
        pairs = [content(Shards(shards))[index] for index in texts]
        by_hand = collate(
            [
                {
                    "images": [convert_module.Image.open(io.BytesIO(image))],
                    "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
                for _, prompt, chosen, rejected, image, _ in pairs
            ]
        )
        assert batch.keys() == by_hand.keys()
        for name, values in batch.items():
            assert values.equal(by_hand[name]), name

    def test_ms_swift(self, shards, tmp_path):
        """As its documentation has it: every image is marked once in each chat, and no value is null."""
        convert(Shards(shards), "ms-swift", tmp_path / "out")
        lines = (tmp_path / "out/train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 10
        assert len({tuple(sorted(row)) for row in rows}) == 1
        for row in rows:
            for chat, images in (("messages", "images"), ("rejected_messages", "rejected_images")):
                assert sum(turn["content"].count("<image>") for turn in row[chat]) == len(row[images]) == 1
                assert row[chat][-1]["role"] == "assistant"
                assert (tmp_path / "out" / row[images][0]).is_file()
        text, image = rows[:2]
        assert text["messages"][-1] != text["rejected_messages"][-1]
        assert text["images"] == text["rejected_images"]
        assert image["messages"] == image["rejected_messages"]
        assert image["images"] != image["rejected_images"]
        loaded = self.load("json", tmp_path / "out/train.jsonl", tmp_path)
        assert loaded["messages"][:] == [row["messages"] for row in rows]


class Listed(Source):
    def __init__(self, *rows):
        self.rows = rows

    def read(self):
        for row in self.rows:
            if isinstance(row, BaseException):
                raise row
            yield row


def record(key="a", **changes):
    image, retrieved = (ImageFile(name, data=file_of(seed, "PNG")) for seed, name in enumerate(("v", "v_l")))
    whole = {"image": image, "retrieved": retrieved, "prompt": "p", "chosen": "c", "rejected": "r"}
    return SourceRecord(**{"key": key, **whole, **changes})


INCOMPLETE = (
    SourceProblem("file, row 1", "the row is broken"),
    SourceProblem("file, row 2", "the row is broken"),
    record("b", rejected=None),
    record("c", retrieved=None),
    record("d", chosen=None),
    record("e", image=ImageFile("gone", path=convert_module.Path("/nowhere/gone.jpg"))),
    record("f", image=ImageFile("x", data=b"GIF89a")),
)


class TestLeftOut:
    @pytest.mark.parametrize("to", BOTH_HALVES)
    def test_counted_and_named(self, tmp_path, to):
        report = convert(Listed(record(), *INCOMPLETE), to, tmp_path / "out")
        assert (report.rows, report.pairs) == (8, 1)
        named = [json.loads(line) for line in (tmp_path / "out.problems.jsonl").read_text().splitlines()]
        assert [row["where"] for row in named] == ["file, row 1", "file, row 2", "b", "c", "d", "e", "f"]
        assert report.problems == str(tmp_path / "out.problems.jsonl")
        assert sum(report.left_out.values()) == 7
        assert report.left_out["the row is broken"] == 2
        assert report.left_out["the row has no rejected answer"] == 1
        assert report.left_out["the row has no rejected image"] == 1
        assert report.left_out["the row has no chosen answer"] == 1
        assert report.left_out["the image file ... cannot be read: No such file or directory"] == 1
        assert [row[0] for row in content(open_source(tmp_path / "out"))] == ["a"]

    def test_the_text_half_needs_no_rejected_image(self, tmp_path):
        report = convert(Listed(record(), record("c", retrieved=None)), "trl", tmp_path / "out")
        assert report == ConversionReport(rows=2, pairs=2)
        assert pq.read_table(tmp_path / "out").column("key").to_pylist() == ["a", "c"]

    @pytest.mark.parametrize("to", FORMATS)
    def test_nothing_left(self, tmp_path, to):
        report = convert(Listed(*INCOMPLETE[:3]), to, tmp_path / "out")
        assert report.pairs == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out.problems.jsonl"]

    def test_an_image_token_in_a_text(self, tmp_path):
        rows = (record(), record("b", prompt="Is <image> a tag?"), record("c", rejected="<image>"))
        report = convert(Listed(*rows), "ms-swift", tmp_path / "out")
        assert report.left_out == {
            "the prompt holds ... as text, which this format takes for an image": 1,
            "rejected holds ... as text, which this format takes for an image": 1,
        }
        convert(Listed(*rows), "shards", tmp_path / "shards")
        assert [row[1] for row in content(Shards(tmp_path / "shards"))] == ["p", "Is <image> a tag?", "p"]

    def test_limit(self, tmp_path):
        report = convert(Listed(*(record(str(n)) for n in range(9))), "shards", tmp_path / "out", limit=3)
        assert report == ConversionReport(rows=3, pairs=3)
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            convert(Listed(), "shards", tmp_path / "out", limit=0)


class TestPlace:
    @pytest.mark.parametrize("to", FORMATS)
    @pytest.mark.parametrize("error", [ValueError("cut"), KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_an_interrupted_conversion_leaves_what_was_there(self, tmp_path, to, error):
        with pytest.raises(type(error)):
            convert(Listed(record(), error), to, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        convert(Listed(record()), to, tmp_path / "out")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        with pytest.raises(type(error)):
            convert(Listed(record("b"), error), to, tmp_path / "out", overwrite=True)
        after = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert after == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("to", FORMATS)
    def test_a_disk_that_is_full(self, tmp_path, to):
        """The system refuses to write more than 15,000 bytes into one file."""
        write_shards(tmp_path / "in", 60)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large; .*out was not written"):
                convert(Shards(tmp_path / "in"), to, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def test_overwriting_is_asked_for(self, tmp_path):
        convert(Listed(record(), *INCOMPLETE), "parquet", tmp_path / "out")
        with pytest.raises(FileExistsError, match=r"already holds train-00000\.parquet; pass --overwrite"):
            convert(Listed(record("b")), "shards", tmp_path / "out")
        convert(Listed(record("b")), "shards", tmp_path / "out", overwrite=True)
        assert [info.samples for info in read_index(tmp_path / "out").shards] == [1]
        # The old run's list would be taken for this one's.
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_nothing_foreign_is_ever_removed(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.pdf").touch()
        with pytest.raises(FileExistsError, match=r"holds thesis\.pdf, which this command never writes"):
            convert(Listed(record()), "shards", tmp_path / "out", overwrite=True)
        with pytest.raises(FileExistsError, match="is a file"):
            convert(Listed(record()), "shards", tmp_path / "out" / "thesis.pdf", overwrite=True)

    def test_a_killed_run_does_not_disturb_the_next(self, tmp_path):
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial" / "shard-000000.tar").touch()
        convert(Listed(record()), "shards", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert read_index(tmp_path / "out").shards[0].samples == 1

    @pytest.mark.parametrize("to", FORMATS)
    def test_a_folder_that_cannot_be_written_to(self, tmp_path, to):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            convert(Listed(record()), to, tmp_path / "file" / "out")

    def test_unknown_format(self, tmp_path):
        with pytest.raises(ValueError, match=r"to must be one of .* got 'csv'"):
            convert(Listed(), "csv", tmp_path / "out")


class TestCommand:
    def test_the_papers_file(self, tmp_path, capsys):
        """pref_data.json with its images becomes shards that hold the very files."""
        for number in range(2):
            (tmp_path / f"{number}.jpg").write_bytes(file_of(number, "JPEG"))
        rows = [
            {
                "image": f"{number}.jpg",
                "retrieved_image": f"{1 - number}.jpg",
                "chosen": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
                "rejected": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}],
            }
            for number in range(3)
        ]
        (tmp_path / "pref_data.json").write_text(json.dumps(rows))
        main([str(tmp_path / "pref_data.json"), str(tmp_path / "out")])
        printed = capsys.readouterr().out
        assert [line.rsplit(maxsplit=1) for line in printed.splitlines()[:3]] == [
            ["rows read", "3"],
            ["pairs written", "2"],
            ["rows left out", "1"],
        ]
        assert "the image file ... cannot be read" in printed
        files = [file_of(number, "JPEG") for number in range(2)]
        assert content(Shards(tmp_path / "out")) == [
            ("row-00000001", "What?", "A cat.", "A dog.", files[0], files[1]),
            ("row-00000002", "What?", "A cat.", "A dog.", files[1], files[0]),
        ]
        facts = [row.facts for row in Shards(tmp_path / "out").read()]
        assert facts[0] == {"image_id": "0.jpg", "retrieved_id": "1.jpg"}

    def test_options(self, tmp_path, capsys):
        write_shards(tmp_path / "in", 3)
        arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--to", "ms-swift", "--limit", "2", "--json"]
        main(arguments)
        assert json.loads(capsys.readouterr().out) == {"rows": 2, "pairs": 2, "left_out": {}, "problems": None}
        with pytest.raises(SystemExit, match="pass --overwrite"):
            main(arguments)
        main([*arguments, "--overwrite", "--option", "prompt=What?"])
        assert type(open_source(tmp_path / "out/train.jsonl")) is MsSwift

    def test_layout_images_and_options_reach_the_source(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            convert_module, "convert", lambda source, *rest: seen.append((source, rest)) or ConversionReport(1, 1)
        )
        main(["a.json", "out", "--from", "llava", "--images", "pictures", "--option", "turns=all"])
        ((source, rest),) = seen
        assert (type(source), source.path, source.images, source.turns) == (LlavaInstruct, "a.json", "pictures", "all")
        assert rest == ("shards", "out", False, None, None)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["none.json", "out"], "none.json: expected a file"),
            (["same", "same"], "is read and cannot be written at the same time"),
            (["a.json", "out", "--from", "realign", "--option", "x"], "expected NAME=VALUE"),
            (["a.json", "out", "--from", "realign", "--option", "x=1"], "does not take"),
        ],
    )
    def test_what_stands_in_the_way_is_said(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=message):
            main(arguments)
        assert os.listdir(tmp_path) == []  # noqa: PTH208

    def test_status_when_nothing_came_out(self, tmp_path, capsys):
        (tmp_path / "a.jsonl").write_text('{"file_name": "a.jpg"}\n')
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "a.jsonl"), str(tmp_path / "out")])
        assert stop.value.code == 1
        assert "the row has no chosen answer" in capsys.readouterr().out


def test_memory_stays_small(tmp_path):
    """Rows stream: a source of many pairs is never held as a whole."""
    import tracemalloc

    seen = 0

    class Many(Source):
        def read(self):
            nonlocal seen
            for number in range(400):
                seen += 1
                noise = picture(number, (120, 100))
                buffer = io.BytesIO()
                noise.save(buffer, "PNG")
                yield record(str(number), image=ImageFile(str(number), data=buffer.getvalue()))

    convert(Listed(record()), "parquet", tmp_path / "warm")
    tracemalloc.start()
    convert(Many(), "parquet", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert seen == 400
    assert peak < 0.75 * size
