"""Every layout as its makers write it, and what no layout may hold."""

import csv
import io
import json
import sys
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from jsonargparse import ArgumentParser
from PIL import Image

from realign_lightning.data import ShardError
from realign_lightning.data.schema import decode_image
from realign_lightning.data.sources import (
    LAYOUTS,
    CocoCaptions,
    ImageFile,
    ImageFolder,
    LlavaInstruct,
    MsSwift,
    Parquet,
    RealignJson,
    Shards,
    ShareGptRanking,
    Source,
    SourceProblem,
    SourceRecord,
    TrlPreference,
    fit_key,
    guess_layout,
    open_source,
    plain_prompt,
)
from realign_lightning.data.sources.chat import make_prompt, marked_prompt, read_turns, spelled_prompt
from realign_lightning.data.sources.rows import json_array, read_rows
from realign_lightning.types import SampleError
from tests.data.helpers import good_members, picture, sample, tar_bytes, write_shards

QUESTION = "What is on the table?"


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def write_lines(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def records(source) -> list[SourceRecord]:
    found = list(source.read())
    assert all(isinstance(row, SourceRecord) for row in found), found
    return found


def only(source) -> SourceRecord:
    (record,) = records(source)
    return record


def problems(source) -> list[tuple[str, str]]:
    return [(row.where, row.reason) for row in source.read() if isinstance(row, SourceProblem)]


def turn(role, text):
    return {"from": role, "value": text}


def message(role, content):
    return {"role": role, "content": content}


def text_part(text):
    return {"type": "text", "text": text}


IMAGE = {"type": "image"}


class TestChat:
    @pytest.mark.parametrize(
        ("written", "prompt"),
        [
            ("What?", "What?"),
            ("<image>\nWhat?", "What?"),
            ("<image>What?", "What?"),
            ("<image> What?", "What?"),
            ("What?\n<image>", [message("user", [text_part("What?"), IMAGE])]),
            ("In <image> what?", [message("user", [text_part("In "), IMAGE, text_part(" what?")])]),
        ],
    )
    def test_placeholders_become_places(self, written, prompt):
        assert make_prompt(read_turns([turn("human", written)], "conversations")) == prompt

    @pytest.mark.parametrize("written", ["<image>\nWhat?", "What?\n<image>", "Wh<image>at?", " <image> What? "])
    def test_llava_shows_the_image_first(self, written):
        assert make_prompt(read_turns([turn("human", written)], "conversations", "first")) == "What?"

    def test_placeholders_of_a_finished_prompt_are_text(self):
        assert make_prompt(read_turns([message("user", "Is <image> a tag?")], "prompt", "text")) == "Is <image> a tag?"

    def test_an_image_in_a_later_turn_stays_there(self):
        turns = [turn("human", "Hi."), turn("gpt", "Hello."), turn("human", "<image>\nWhat?")]
        assert make_prompt(read_turns(turns, "conversations")) == [
            message("user", "Hi."),
            message("assistant", "Hello."),
            message("user", [IMAGE, text_part("What?")]),
        ]

    @pytest.mark.parametrize(
        ("turns", "reason"),
        [
            ("What?", "must be a list of chat turns"),
            ([], "must be a list"),
            (None, "got nothing"),
            (["What?"], "turns with role and content"),
            ([turn("tool", "x")], "a turn of 'tool'"),
            ([turn("human", None)], "content is nothing"),
            ([turn("human", "")], "is empty"),
            ([turn("human", "<image>")], "is empty"),
            ([turn("human", "<image><image>What?")], "shows 2 images"),
            ([turn("human", "<image>a"), turn("gpt", "b"), turn("human", "<image>c")], "shows 2 images"),
            ([turn("human", "a"), turn("gpt", "b")], "must end with the user"),
            ([turn("system", "<image>a"), turn("human", "b")], "a turn of the system shows an image"),
            ([message("user", [{"type": "video"}])], "one of the types text and image"),
            ([message("user", [{"type": "text"}])], "one of the types text and image"),
            ([message("user", "a\0b")], "NUL"),
            ([message("user", "a\ud800")], "surrogate"),
        ],
    )
    def test_what_is_no_prompt(self, turns, reason):
        with pytest.raises(SampleError, match=reason):
            make_prompt(read_turns(turns, "conversations"))

    PROMPTS = (
        "What?",
        " What?\n",
        "\nWhat?",
        [message("user", "a"), message("assistant", "b"), message("user", "c")],
        [message("system", "Be brief."), message("user", " a")],
        [message("user", [text_part("In "), IMAGE, text_part(" what?")])],
        [message("user", [text_part("What? "), IMAGE])],
        [message("user", "a"), message("assistant", "b"), message("user", [IMAGE, text_part("\n c")])],
    )

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_written_out_and_back(self, prompt):
        assert plain_prompt(prompt) == prompt
        assert make_prompt(read_turns(spelled_prompt(prompt), "prompt")) == prompt
        assert make_prompt(read_turns(marked_prompt(prompt), "messages")) == prompt

    def test_one_image_is_marked(self):
        for prompt in self.PROMPTS:
            assert sum(one["content"].count("<image>") for one in marked_prompt(prompt)) == 1
            assert sum(one["content"].count(IMAGE) for one in spelled_prompt(prompt)) == 1

    @pytest.mark.parametrize("prompt", ["Is <image> a tag?", [message("user", [text_part("a"), text_part("b")])]])
    def test_what_marks_cannot_say_is_refused(self, prompt):
        with pytest.raises(SampleError, match="this format"):
            marked_prompt(prompt)


class TestRows:
    ROWS = ({"a": 1, "b": "x"}, {"a": 2, "b": 'braces {[,:]} and "quotes\\" \u00e9'}, {"a": [1, {"c": []}], "b": "z"})

    @pytest.mark.parametrize("indent", [None, 2])
    def test_array_and_lines_say_the_same(self, tmp_path, indent):
        array = tmp_path / "rows.json"
        array.write_text(json.dumps(self.ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
        lines = write_lines(tmp_path / "rows.jsonl", self.ROWS)
        assert [row.fields for row in read_rows(array)] == list(self.ROWS)
        assert [row.fields for row in read_rows(lines)] == list(self.ROWS)

    def test_array_within_an_object(self, tmp_path):
        value = {"info": {"rows": [[0]]}, "rows": [1, [2], {"rows": [3]}], "more": [4]}
        path = write_json(tmp_path / "rows.json", value)
        assert [json.loads(item) for item in json_array(path, "rows")] == value["rows"]
        assert [json.loads(item) for item in json_array(path, "more")] == [4]
        with pytest.raises(ValueError, match="an object with an array 'other'"):
            list(json_array(path, "other"))

    @pytest.mark.parametrize("text", [b"", b'[{"a": 1}', b'[{"a": 1},', b'[{"a": "x', b'[{"a": 1}, {"b": 2'])
    def test_a_cut_array_is_an_error(self, tmp_path, text):
        path = tmp_path / "rows.json"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"rows\.json is (cut|empty)"):
            list(json_array(path))

    def test_bad_rows_are_named_and_the_rest_is_read(self, tmp_path):
        rows = [
            {"a": 1},
            b'{"a": 2',
            b'{"a": "\xff"}',
            b'{"a": 1, "a": 2}',
            b'{"a": NaN}',
            b"[1]",
            b"",
            b'\xef\xbb\xbf{"a": 3}',
            {"a": 4},
        ]
        found = list(read_rows(write_lines(tmp_path / "rows.jsonl", rows)))
        assert [row.where for row in found] == [f"rows.jsonl, line {n}" for n in (1, 2, 3, 4, 5, 6, 8, 9)]
        assert [row.number for row in found if not isinstance(row, SourceProblem)] == [1, 9]
        reasons = [row.reason for row in found if isinstance(row, SourceProblem)]
        for reason, part in zip(reasons, ["cannot be read", "utf-8", "twice", "NaN", "got list", "BOM"], strict=True):
            assert part in reason

    def test_a_bad_row_of_an_array_is_a_problem_of_its_own(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_bytes(b'[{"a": 1}, {"a": "\xff"}, {"a": NaN}, {"a": 4}]')
        found = list(read_rows(path))
        assert [isinstance(row, SourceProblem) for row in found] == [False, True, True, False]
        assert found[3].number == 4

    def test_an_array_is_never_held_as_a_whole(self, tmp_path):
        path = write_json(tmp_path / "rows.json", [{"a": "x" * 10_000} for _ in range(1000)])
        tracemalloc.start()
        for row in read_rows(path):
            assert len(row.fields["a"]) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < path.stat().st_size / 10

    def test_csv(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_bytes(
            b'\xef\xbb\xbfname,text\r\na.jpg,"two\nlines, one comma"\r\nb.jpg,\xff\r\nc.jpg\r\nd.jpg,x,y\r\ne.jpg,\r\n'
        )
        found = list(read_rows(path))
        assert found[0].fields == {"name": "a.jpg", "text": "two\nlines, one comma"}
        assert [(row.where, row.reason) for row in found[1:4]] == [
            ("rows.csv, row 2", "the row is not UTF-8"),
            ("rows.csv, row 3", "the row has fewer cells than there are columns"),
            ("rows.csv, row 4", "the row has more cells than there are columns"),
        ]
        assert found[4].fields == {"name": "e.jpg"}

    def test_csv_with_equal_column_names(self, tmp_path):
        (tmp_path / "rows.csv").write_text("a,a\n1,2\n")
        with pytest.raises(ValueError, match="different column names"):
            list(read_rows(tmp_path / "rows.csv"))

    def test_parquet(self, tmp_path):
        binary = pa.array([b"good", b"b\xffd", b"more"])
        texts = pa.StringArray.from_buffers(3, *binary.buffers()[1:])
        pq.write_table(pa.table({"text": texts, "n": [1, 2, None]}), tmp_path / "rows.parquet")
        found = list(read_rows(tmp_path / "rows.parquet"))
        assert found[0].fields == {"text": "good", "n": 1}
        assert (found[1].where, found[1].reason) == ("rows.parquet, row 2", "the row is not UTF-8")
        assert found[2].fields == {"text": "more"}

    def test_what_is_no_parquet(self, tmp_path):
        pq.write_table(pa.table({"a": list(range(1000))}), tmp_path / "rows.parquet")
        data = (tmp_path / "rows.parquet").read_bytes()
        (tmp_path / "rows.parquet").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"rows\.parquet is damaged"):
            list(read_rows(tmp_path / "rows.parquet"))

    def test_without_pyarrow_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        (tmp_path / "a.parquet").touch()
        with pytest.raises(ImportError, match=r"realign-lightning\[build\]"):
            list(read_rows(tmp_path / "a.parquet"))

    def test_several_files_are_counted_together(self, tmp_path):
        (tmp_path / ".c.jsonl").write_text("cut")
        for name in "ba":
            write_lines(tmp_path / f"{name}.jsonl", [{"file": name}] * 2)
        for path in (tmp_path, tmp_path / "*.jsonl"):
            found = list(read_rows(path))
            assert [(row.fields["file"], row.number) for row in found] == [("a", 1), ("a", 2), ("b", 3), ("b", 4)]

    def test_nothing_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
            with pytest.raises(FileNotFoundError, match="expected a file"):
                list(read_rows(path))


class TestKeys:
    def test_fit(self):
        names = ["a", "a/b", "a_b", "x" * 80, "x" * 81, "\u00e9", "a.jpg", "a.png"]
        keys = [fit_key(name) for name in names]
        assert len(set(keys)) == len(names)
        assert all(0 < len(key) <= 80 and set(key) <= set(map(chr, range(128))) and "." not in key for key in keys)
        assert keys[0] == "a"
        assert keys[3] == "x" * 80

    def test_rows_are_numbered_and_ids_are_kept(self, tmp_path):
        rows = [{"file_name": "a.jpg"}, {"file_name": "a.jpg", "key": "mine"}, {"file_name": "a.jpg", "key": 7}]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        assert [record.key for record in records(ImageFolder(path))] == ["row-00000001", "mine", "7"]
        write_lines(path, [*rows, {"file_name": "b.jpg"}])
        assert [record.key for record in records(ImageFolder(path))][:3] == ["row-00000001", "mine", "7"]

    def test_a_second_row_of_one_id_is_a_problem(self, tmp_path):
        rows = [{"file_name": "a.jpg", "id": 1}, {"file_name": "b.jpg", "id": 1}, {"file_name": "c.jpg", "id": True}]
        source = ImageFolder(write_lines(tmp_path / "rows.jsonl", rows), id_field="id")
        assert problems(source) == [
            ("rows.jsonl, line 2", "duplicate id 1: an earlier row has it"),
            ("rows.jsonl, line 3", "the id must be a text or a whole number, got bool"),
        ]

    def test_a_row_that_cannot_be_used_does_not_take_the_id(self, tmp_path):
        rows = [{"file_name": "../a.jpg", "key": "1"}, {"file_name": "b.jpg", "key": "1"}]
        found = list(ImageFolder(write_lines(tmp_path / "rows.jsonl", rows)).read())
        assert isinstance(found[0], SourceProblem)
        assert found[1].key == "1"


class TestImages:
    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("../a.jpg", "leads out of the folder of images"),
            ("a/../../b.jpg", "leads out"),
            ("/etc/passwd", "leads out"),
            ("a\0.jpg", "leads out"),
            (".", "leads out"),
            ("http://example.com/a.jpg", "is a URL"),
            ("file:///a.jpg", "is a URL"),
            ("data:image/png;base64,xx", "is a URL"),
            ("", "names no image"),
            (None, "names no image"),
            ([], "holds 0 images"),
            (["a.jpg", "b.jpg"], "holds 2 images"),
            (3, "must be a path or the bytes"),
            ({"path": None}, "names no image"),
        ],
    )
    def test_what_is_no_image(self, tmp_path, path, reason):
        source = ShareGptRanking(write_json(tmp_path / "x.json", [share_gpt(images=path)]))
        ((where, found),) = problems(source)
        assert where == "x.json, row 1"
        assert reason in found

    def test_paths_are_within_the_folder(self, tmp_path):
        rows = [share_gpt(images=["./a/b.jpg"]), share_gpt(images=[str(tmp_path / "pictures" / "a" / "b.jpg")])]
        first, second = records(ShareGptRanking(write_json(tmp_path / "x.json", rows), images=tmp_path / "pictures"))
        assert first.image == second.image == ImageFile("a/b.jpg", path=tmp_path / "pictures/a/b.jpg")

    def test_a_missing_file_shows_when_it_is_read(self, tmp_path):
        record = only(ShareGptRanking(write_json(tmp_path / "x.json", [share_gpt()])))
        with pytest.raises(SampleError, match=r"a\.jpg cannot be read: No such file"):
            record.image.read()
        (tmp_path / "a.jpg").write_bytes(jpeg())
        assert record.image.read() == jpeg()


def share_gpt(**changes):
    row = {
        "conversations": [turn("human", f"<image>{QUESTION}")],
        "chosen": turn("gpt", "A cup."),
        "rejected": turn("gpt", "A plate."),
        "images": ["a.jpg"],
    }
    return {**row, **changes}


class TestImageFolder:
    def test_without_a_table(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden.jpg", "notes.txt", "old.gif"):
            (tmp_path / name).write_bytes(b"")
        found = list(ImageFolder(tmp_path, prompt="What?").read())
        good = [row for row in found if isinstance(row, SourceRecord)]
        assert [row.image.image_id for row in good] == ["a.jpg", "b.PNG", "sub/c.webp"]
        assert {(row.prompt, row.chosen) for row in good} == {("What?", None)}
        assert found[2] == SourceProblem("old.gif", "the image is GIF; expected JPEG, PNG or WebP")
        keys = {row.image.image_id: row.key for row in good}
        (tmp_path / "a.png").write_bytes(b"")
        after = {row.image.image_id: row.key for row in ImageFolder(tmp_path).read() if isinstance(row, SourceRecord)}
        assert keys.items() <= after.items()
        assert len(set(after.values())) == 4

    def test_with_the_table_in_it(self, tmp_path):
        rows = [{"file_name": "a.jpg", "prompt": "What?", "answer": "A cat.", "split": "train"}, {"file_name": "b.jpg"}]
        write_lines(tmp_path / "metadata.jsonl", rows)
        first, second = records(ImageFolder(tmp_path))
        assert (first.prompt, first.chosen) == ("What?", "A cat.")
        assert first.facts == {"source": {"split": "train"}}
        assert first.image.path == tmp_path / "a.jpg"
        assert (second.prompt, second.chosen) == ("Describe the image.", None)

    def test_with_other_names(self, tmp_path):
        path = tmp_path / "table.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["image", "q", "a"], ["a.jpg", "How many?", "2"], ["b.jpg", "", ""]])
        names = {"image_field": "image", "prompt_field": "q", "answer_field": "a"}
        first, second = records(ImageFolder(path, images=tmp_path / "pictures", **names))
        assert (first.prompt, first.chosen, first.image.path) == ("How many?", "2", tmp_path / "pictures/a.jpg")
        assert (second.prompt, second.chosen) == ("Describe the image.", None)

    def test_numbers_are_answers_and_empty_texts_are_not(self, tmp_path):
        rows = [{"file_name": "a.jpg", "answer": 2}, {"file_name": "a.jpg", "answer": " "}]
        found = list(ImageFolder(write_lines(tmp_path / "rows.jsonl", rows)).read())
        assert found[0].chosen == "2"
        assert found[1].reason == "chosen is empty"


LLAVA = {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": [
        turn("human", "What are the colors of the bus?\n<image>"),
        turn("gpt", "White and red."),
        turn("human", "Is it moving?"),
        turn("gpt", "Yes."),
    ],
}


class TestLlava:
    def test_first(self, tmp_path):
        path = write_json(tmp_path / "llava.json", [LLAVA, LLAVA])
        first, second = records(LlavaInstruct(path, images=tmp_path / "train2014"))
        assert (first.prompt, first.chosen) == ("What are the colors of the bus?", "White and red.")
        assert first.image == ImageFile("000000033471.jpg", path=tmp_path / "train2014/000000033471.jpg")
        assert first.facts == {"source": {"id": "000000033471"}}
        assert (first.key, second.key) == ("row-00000001", "row-00000002")

    def test_all(self, tmp_path):
        first, second = records(LlavaInstruct(write_json(tmp_path / "llava.json", [LLAVA]), turns="all"))
        assert (first.key, second.key) == ("row-00000001-turn-1", "row-00000001-turn-2")
        assert first.prompt == "What are the colors of the bus?"
        assert second.prompt == [
            message("user", "What are the colors of the bus?"),
            message("assistant", "White and red."),
            message("user", "Is it moving?"),
        ]
        assert second.chosen == "Yes."

    def test_an_answer_that_cannot_be_used_costs_no_other(self, tmp_path):
        turns = [*LLAVA["conversations"][:3], turn("gpt", ""), turn("human", "And now?"), turn("gpt", "No.")]
        source = LlavaInstruct(write_json(tmp_path / "llava.json", [{**LLAVA, "conversations": turns}]), turns="all")
        found = list(source.read())
        assert [type(row) for row in found] == [SourceRecord, SourceProblem, SourceProblem]
        assert found[1].where == "llava.json, row 1, answer 2"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"image": None}, "image names no image"),
            ({"conversations": []}, "must be a list"),
            ({"conversations": [turn("human", "a")]}, "no answer of gpt"),
            ({"conversations": [turn("gpt", "a")]}, "must end with the user"),
            ({"conversations": [turn("human", "<image>\n<image>\na"), turn("gpt", "b")]}, "shows 2 images"),
        ],
    )
    def test_problems(self, tmp_path, changes, reason):
        source = LlavaInstruct(write_json(tmp_path / "llava.json", [{**LLAVA, **changes}, LLAVA]))
        ((where, found),) = problems(source)
        assert where == "llava.json, row 1"
        assert reason in found

    def test_unknown_turns(self):
        with pytest.raises(ValueError, match="'first' or 'all', got 'last'"):
            LlavaInstruct("x.json", turns="last")


CAPTIONS = {
    "annotations": [
        {"id": 5, "image_id": 1, "caption": "A cat on a bed."},
        {"id": 6, "image_id": 1, "caption": "A sleeping cat."},
        {"id": 7, "image_id": 2, "caption": "An empty road."},
        {"id": 5, "image_id": 2, "caption": "A road."},
        {"id": 8, "image_id": 9, "caption": "Nowhere."},
        {"id": 9, "image_id": 2},
    ],
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
}
INSTANCES = {
    "images": CAPTIONS["images"],
    "annotations": [{"image_id": 1, "category_id": c, "segmentation": [[1, 2.5]]} for c in (17, 65, 17)],
    "categories": [{"id": 17, "name": "cat"}, {"id": 65, "name": "bed"}, {"id": 3, "name": "car"}],
}


class TestCoco:
    def test_captions_with_objects(self, tmp_path):
        path = write_json(tmp_path / "captions.json", CAPTIONS)
        instances = write_json(tmp_path / "instances.json", INSTANCES)
        found = list(CocoCaptions(path, tmp_path / "val", instances, prompt="Caption?").read())
        good = [row for row in found if isinstance(row, SourceRecord)]
        assert [(row.key, row.chosen, row.objects) for row in good] == [
            ("5", "A cat on a bed.", ("bed", "cat")),
            ("6", "A sleeping cat.", ("bed", "cat")),
            ("7", "An empty road.", ()),
        ]
        assert {row.prompt for row in good} == {"Caption?"}
        assert good[0].image == ImageFile("1.jpg", path=tmp_path / "val/1.jpg")
        assert [row.where for row in found[3:]] == [f"captions.json, annotation {n}" for n in (4, 5, 6)]
        for row, reason in zip(found[3:], ["duplicate id 5", "no image with the id 9", "no caption"], strict=True):
            assert reason in row.reason

    def test_without_instances_nothing_is_known(self, tmp_path):
        source = CocoCaptions(write_json(tmp_path / "captions.json", CAPTIONS))
        assert next(source.read()).objects is None


class TestParquet:
    def write(self, tmp_path, **columns):
        images = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(2)]
        pq.write_table(pa.table({"image": images, **columns}), tmp_path / "data.parquet")
        return tmp_path / "data.parquet"

    def test_rlaif_v(self, tmp_path):
        path = self.write(
            tmp_path,
            ds_name=["RLAIF-V"] * 2,
            question=[QUESTION, "And now?"],
            chosen=["A cup.", "A jar."],
            rejected=["A plate.", None],
            idx=["0", "0"],
        )
        first, second = records(Parquet(path))
        assert (first.prompt, first.chosen, first.rejected) == (QUESTION, "A cup.", "A plate.")
        assert first.image.read() == jpeg(0)
        assert first.facts == {"source": {"ds_name": "RLAIF-V", "idx": "0"}}
        assert (second.rejected, second.retrieved) == (None, None)
        assert first.image.image_id != second.image.image_id

    def test_rlhf_v(self, tmp_path):
        text = json.dumps({"question": QUESTION, "chosen": "A cup.", "rejected": "A plate."})
        first, problem = Parquet(self.write(tmp_path, text=[text, "{"], idx=[0, 1])).read()
        assert (first.prompt, first.chosen, first.rejected) == (QUESTION, "A cup.", "A plate.")
        assert first.facts == {"source": {"idx": 0}}
        assert "text is no JSON" in problem.reason

    def test_names_and_paths(self, tmp_path):
        columns = {"q": ["a?"], "yes": ["b"], "no": ["c"], "img": ["x.jpg"], "other": ["y.jpg"], "n": [1]}
        pq.write_table(pa.table(columns), tmp_path / "data.parquet")
        names = {
            "prompt_field": "q",
            "chosen_field": "yes",
            "rejected_field": "no",
            "image_field": "img",
            "retrieved_field": "other",
            "id_field": "n",
        }
        record = only(Parquet(tmp_path / "data.parquet", images=tmp_path / "p", **names))
        assert (record.key, record.prompt, record.chosen, record.rejected) == ("1", "a?", "b", "c")
        assert (record.image.path, record.retrieved.path) == (tmp_path / "p/x.jpg", tmp_path / "p/y.jpg")
        assert record.facts == {}

    def test_equal_answers_and_equal_images(self, tmp_path):
        path = self.write(tmp_path, question=["a", "a"], chosen=["b", "b"], rejected=[" b", "c"])
        table = pq.read_table(path)
        pq.write_table(table.append_column("retrieved", table.column("image")), path)
        assert [reason for _, reason in problems(Parquet(path))] == [
            "chosen is equal to rejected: nothing to prefer",
            "the rejected image is the image itself: nothing to prefer",
        ]


class TestTrl:
    CHOSEN = (message("user", QUESTION), message("assistant", "A cup."))
    REJECTED = (message("user", QUESTION), message("assistant", "A plate."))
    SPELLED = (message("user", [IMAGE, text_part(QUESTION)]),)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": QUESTION, "chosen": "A cup.", "rejected": "A plate."},
            {"prompt": CHOSEN[:1], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
            {"prompt": SPELLED, "chosen": [message("assistant", [text_part("A cup.")])], "rejected": REJECTED[1:]},
            {"chosen": CHOSEN, "rejected": REJECTED},
            {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
            {"prompt": QUESTION, "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
        ],
    )
    def test_all_forms_say_the_same(self, tmp_path, row):
        for name, value in (("images", ["a.jpg"]), ("image", "a.jpg")):
            record = only(TrlPreference(write_lines(tmp_path / "trl.jsonl", [{**row, name: value}])))
            assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", "A plate.")
            assert record.image.image_id == "a.jpg"
            assert (record.retrieved, record.facts) == (None, {})

    @pytest.mark.parametrize(
        ("chosen", "rejected"),
        [
            ("The sky is blue.", "The sky is green."),
            ("The sky is blue.", "The sky is black."),
            ("What?\nYes.", "What?\nNo."),
        ],
    )
    def test_implicit_prompts_of_texts_are_trls(self, tmp_path, chosen, rejected):
        row = {"chosen": chosen, "rejected": rejected}
        expected = trl.extract_prompt(row)
        record = only(TrlPreference(write_lines(tmp_path / "trl.jsonl", [{**row, "images": ["a.jpg"]}])))
        assert {name: getattr(record, name) for name in ("prompt", "chosen", "rejected")} == expected

    def test_parquet(self, tmp_path):
        spelled = [{"role": "user", "content": [{"type": "image", "text": None}, text_part(QUESTION)]}]
        columns = {
            "images": [[{"bytes": jpeg(), "path": None}]],
            "prompt": [spelled],
            "chosen": [list(self.CHOSEN[1:])],
            "rejected": [list(self.REJECTED[1:])],
        }
        pq.write_table(pa.table(columns), tmp_path / "trl.parquet")
        record = only(TrlPreference(tmp_path / "trl.parquet"))
        assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", "A plate.")
        assert record.image.read() == jpeg()

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "a", "chosen": "b"}, "the row has no rejected"),
            ({"chosen": "b", "rejected": "c"}, "no beginning in common"),
            ({"chosen": "b", "rejected": list(REJECTED)}, "both be texts, or both chats"),
            ({"prompt": "a", "chosen": "b", "rejected": [*REJECTED, *REJECTED]}, "one turn of the assistant"),
            ({"prompt": "a", "chosen": "b", "rejected": list(REJECTED[:1])}, "one turn of the assistant"),
            ({"prompt": [message("assistant", "a")], "chosen": "b", "rejected": "c"}, "end with the user"),
        ],
    )
    def test_problems(self, tmp_path, row, reason):
        ((_, found),) = problems(TrlPreference(write_lines(tmp_path / "trl.jsonl", [{**row, "images": ["a.jpg"]}])))
        assert reason in found


class TestShareGpt:
    def test_ranking(self, tmp_path):
        record = only(ShareGptRanking(write_json(tmp_path / "x.json", [share_gpt(id="7")])))
        assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", "A plate.")
        assert record.facts == {"source": {"id": "7"}}

    def test_history_and_system(self, tmp_path):
        turns = [turn("human", "<image>\nHi."), turn("gpt", "Hello."), turn("human", QUESTION)]
        record = only(
            ShareGptRanking(write_json(tmp_path / "x.json", [share_gpt(conversations=turns, system="Be kind.")]))
        )
        assert record.prompt == [
            message("system", "Be kind."),
            message("user", "Hi."),
            message("assistant", "Hello."),
            message("user", QUESTION),
        ]

    def test_messages_form_and_missing_rejected(self, tmp_path):
        row = share_gpt(conversations=[message("user", QUESTION)], chosen=message("assistant", "A cup."), rejected=None)
        record = only(ShareGptRanking(write_json(tmp_path / "x.json", [row])))
        assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", None)


def swift(**changes):
    messages = [message("user", f"<image>{QUESTION}"), message("assistant", "A cup.")]
    return {"messages": messages, "images": ["a.jpg"], **changes}


class TestMsSwift:
    REJECTED = (message("user", f"<image>{QUESTION}"), message("assistant", "A plate."))

    def read(self, tmp_path, *rows):
        return list(MsSwift(write_lines(tmp_path / "x.jsonl", rows)).read())

    @pytest.mark.parametrize(
        ("changes", "rejected", "retrieved"),
        [
            ({}, None, None),
            ({"rejected_response": "A plate."}, "A plate.", None),
            ({"rejected_response": [message("assistant", "A plate.")]}, "A plate.", None),
            ({"rejected_images": ["b.jpg"]}, None, "b.jpg"),
            ({"rejected_response": "A plate.", "rejected_images": ["b.jpg"]}, "A plate.", "b.jpg"),
            ({"rejected_messages": REJECTED, "rejected_images": ["a.jpg"]}, "A plate.", None),
            ({"rejected_messages": swift()["messages"], "rejected_images": ["b.jpg"]}, None, "b.jpg"),
        ],
    )
    def test_forms(self, tmp_path, changes, rejected, retrieved):
        (record,) = self.read(tmp_path, swift(**changes))
        assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", rejected)
        assert (record.retrieved and record.retrieved.image_id) == retrieved

    @pytest.mark.parametrize(
        "text", [{"rejected_response": "A plate."}, {"rejected_messages": REJECTED, "rejected_images": ["a.jpg"]}]
    )
    def test_the_halves_of_a_pair_are_joined(self, tmp_path, text):
        image = swift(rejected_images=["b.jpg"])
        found = self.read(tmp_path, swift(**text), image, swift(**text), swift(images=["c.jpg"]), image)
        pairs = [(row.key, row.rejected, row.retrieved and row.retrieved.image_id) for row in found]
        assert pairs == [
            ("row-00000001", "A plate.", "b.jpg"),
            ("row-00000003", "A plate.", None),
            ("row-00000004", None, None),
            ("row-00000005", None, "b.jpg"),
        ]

    def test_an_open_question_has_no_answer(self, tmp_path):
        (record,) = self.read(tmp_path, swift(messages=[message("user", QUESTION)], system="Be kind."))
        assert record.chosen is None
        assert record.prompt == [message("system", "Be kind."), message("user", QUESTION)]

    def test_problems(self, tmp_path):
        other = [message("user", "Else?"), message("assistant", "A plate.")]
        first, second = self.read(
            tmp_path, swift(rejected_messages=other), swift(images=["a.jpg", "b.jpg"], rejected_response="x")
        )
        assert first == SourceProblem("x.jsonl, line 1", "messages and rejected_messages answer different prompts")
        assert second == SourceProblem("x.jsonl, line 2", "images holds 2 images; expected one")


REALIGN = {
    "image": "COCO_train2014_1.jpg",
    "retrieved_image": "COCO_train2014_2.jpg",
    "chosen": [message("user", f"<image>\n{QUESTION}"), message("assistant", "A cup.")],
    "rejected": [message("user", f"{QUESTION}\n<image>"), message("assistant", "A plate.")],
}


class TestRealign:
    def test_a_pair(self, tmp_path):
        record = only(RealignJson(write_json(tmp_path / "pref_data.json", [REALIGN]), images=tmp_path / "train2014"))
        assert (record.prompt, record.chosen, record.rejected) == (QUESTION, "A cup.", "A plate.")
        assert record.image.path == tmp_path / "train2014/COCO_train2014_1.jpg"
        assert record.retrieved.path == tmp_path / "train2014/COCO_train2014_2.jpg"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"rejected": [message("user", "Else?"), message("assistant", "No.")]}, "different prompts"),
            ({"rejected": REALIGN["rejected"][:1]}, "does not end with the assistant"),
            ({"retrieved_image": "COCO_train2014_1.jpg"}, "is the image itself"),
            ({"retrieved_image": "../x.jpg"}, "retrieved_image leads out"),
            ({"chosen": None}, "chosen must be a list"),
        ],
    )
    def test_problems(self, tmp_path, changes, reason):
        ((_, found),) = problems(RealignJson(write_json(tmp_path / "pref_data.json", [{**REALIGN, **changes}])))
        assert reason in found


class TestShards:
    def test_own(self, tmp_path):
        write_shards(tmp_path, 5, samples_per_shard=2)
        found = records(Shards(tmp_path))
        assert [row.key for row in found] == [f"00000{n}" for n in range(5)]
        expected = sample(3)
        assert (found[3].prompt, found[3].chosen, found[3].rejected) == (
            expected.prompt,
            expected.chosen,
            expected.rejected,
        )
        assert found[3].facts == expected.provenance
        assert decode_image(found[3].image.read()).tobytes() == expected.image.tobytes()
        assert decode_image(found[3].retrieved.read()).tobytes() == expected.retrieved.tobytes()
        assert [row.key for row in records(Shards(tmp_path / "*.tar"))] == [row.key for row in found]

    def test_own_that_differ_from_their_index(self, tmp_path):
        write_shards(tmp_path, 2)
        (tmp_path / "shard-000000.tar").write_bytes(tar_bytes(good_members(0, 2)))
        with pytest.raises(ShardError, match=r"shard-000000\.tar differs from its index"):
            list(Shards(tmp_path).read())

    def test_own_that_lack_something(self, tmp_path):
        members = dict(good_members(0, 1, 2))
        del members["000000.retrieved.png"], members["000001.json"], members["000002.image.png"]
        record = json.loads(members["000000.json"])
        del record["rejected"]
        members["000000.json"] = json.dumps(record).encode()
        (tmp_path / "x.tar").write_bytes(tar_bytes(members.items()))
        first, second, third = Shards(tmp_path / "x.tar").read()
        assert (first.chosen, first.rejected, first.retrieved) == (sample(0).chosen, None, None)
        assert second == SourceProblem("x.tar: 000001", "missing member json")
        assert third == SourceProblem("x.tar: 000002", "missing member image")

    def test_any_webdataset(self, tmp_path):
        members = [
            ("a/0.jpg", jpeg(0)),
            ("a/0.json", json.dumps({"question": "What?", "answer": "A cat.", "url": "x"}).encode()),
            ("a/1.txt", b"A dog.\n"),
            ("a/1.png", jpeg(1)),
            ("a/1.cls", b"3"),
            ("a/2.jpg", jpeg(2)),
            ("a/3.txt", b"No image."),
            ("a/4.jpg", jpeg(4)),
            ("a/4.txt", b"\xff"),
            ("a/0.webp", jpeg(5)),
        ]
        (tmp_path / "x.tar").write_bytes(tar_bytes(members))
        found = list(Shards(tmp_path / "x.tar", prompt="Describe.").read())
        assert [(row.prompt, row.chosen, row.image.read()) for row in found[:3]] == [
            ("What?", "A cat.", jpeg(0)),
            ("Describe.", "A dog.", jpeg(1)),
            ("Describe.", None, jpeg(2)),
        ]
        assert found[0].facts == {"source": {"url": "x"}}
        assert [row.where for row in found[3:]] == ["x.tar: a/3", "x.tar: a/4", "x.tar: a/0"]
        for row, reason in zip(found[3:], ["missing member image", "not UTF-8", "duplicate id 'a/0'"], strict=True):
            assert reason in row.reason

    @pytest.mark.parametrize("own", [True, False])
    def test_a_cut_tar_is_an_error(self, tmp_path, own):
        members = good_members(0, 1) if own else [(f"{n}.jpg", jpeg(n)) for n in range(4)]
        data = tar_bytes(members)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            border = tar.getmembers()[-1].offset
        for length in (border, border + 100, border + 600):
            (tmp_path / "x.tar").write_bytes(data[:length])
            with pytest.raises(ShardError, match=r"x\.tar"):
                list(Shards(tmp_path / "x.tar").read())

    def test_an_image_is_read_when_it_is_asked_for(self, tmp_path):
        write_shards(tmp_path, 1)
        record = only(Shards(tmp_path))
        assert record.image.data is None
        (tmp_path / "shard-000000.tar").write_bytes(b"")
        with pytest.raises(SampleError, match="has become shorter"):
            record.image.read()


class TestOpen:
    def layouts(self, tmp_path):
        """A path of every layout, by name."""
        paths = {
            "llava": write_json(tmp_path / "llava.json", [LLAVA]),
            "coco-captions": write_json(tmp_path / "coco.json", CAPTIONS),
            "sharegpt": write_json(tmp_path / "sharegpt.json", [share_gpt()]),
            "ms-swift": write_lines(tmp_path / "swift.jsonl", [swift()]),
            "realign": write_json(tmp_path / "realign.json", [REALIGN]),
            "trl": write_lines(tmp_path / "trl.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            "shards": write_shards(tmp_path / "shards", 1),
            "image-folder": tmp_path / "images",
            "parquet": tmp_path / "data",
        }
        for name in ("image-folder", "parquet"):
            paths[name].mkdir()
        Image.new("RGB", (2, 2)).save(paths["image-folder"] / "a.png")
        table = pa.table({"question": ["a"], "chosen": ["b"], "rejected": ["c"], "image": [{"bytes": b"", "path": ""}]})
        pq.write_table(table, paths["parquet"] / "0.parquet")
        return paths

    def test_every_layout_is_recognised(self, tmp_path):
        paths = self.layouts(tmp_path)
        assert paths.keys() == LAYOUTS.keys()
        for name, path in paths.items():
            assert guess_layout(path) == name, name
            assert type(open_source(path)) is LAYOUTS[name]

    def test_more_forms(self, tmp_path):
        (tmp_path / "a.csv").write_text("file_name\na.jpg\n")
        assert guess_layout(tmp_path / "a.csv") == "image-folder"
        assert guess_layout(write_lines(tmp_path / "a.jsonl", [b"broken", {"file_name": "a.jpg"}])) == "image-folder"
        assert guess_layout(write_lines(tmp_path / "b.json", [share_gpt()])) == "sharegpt"
        answers = {"chosen": [message("assistant", "b")], "rejected": [message("assistant", "c")]}
        assert guess_layout(write_lines(tmp_path / "c.jsonl", [{"image": "a.jpg", "prompt": "a", **answers}])) == "trl"
        pq.write_table(pa.table({"text": ["{}"], "image": [b""]}), tmp_path / "a.parquet")
        assert guess_layout(tmp_path / "a.parquet") == "parquet"
        chats = [[message("assistant", "b")]]
        pq.write_table(pa.table({"prompt": chats, "chosen": chats, "rejected": chats}), tmp_path / "b.parquet")
        assert guess_layout(tmp_path / "b.parquet") == "trl"
        (tmp_path / "x.tar").write_bytes(tar_bytes(good_members(0)))
        assert guess_layout(str(tmp_path / "x*.tar")) == "shards"

    @pytest.mark.parametrize(
        ("name", "content", "seen"),
        [
            ("a.jsonl", b'{"foo": 1}\n{"bar": 2}\n', r"rows with \['bar', 'foo'\]; name it: one of \['coco-captions'"),
            ("a.jsonl", b"\n", "rows with nothing in them"),
            ("a.jsonl", b"", r"a\.jsonl is empty"),
            ("a.json", b'[{"foo": 1}]', r"rows with \['foo'\]"),
            ("a.xml", b"<x/>", r"ending in '\.xml'"),
        ],
    )
    def test_unknown_content_says_what_was_seen(self, tmp_path, name, content, seen):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=seen):
            open_source(tmp_path / name)

    def test_unknown_columns_and_folders(self, tmp_path):
        pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"columns \['a'\]"):
            open_source(tmp_path / "a.parquet")
        (tmp_path / "a.parquet").rename(tmp_path / "a.bin")
        with pytest.raises(ValueError, match=r"a folder with \['a\.bin'\]"):
            open_source(tmp_path)
        (tmp_path / "rows.json").write_text("[]")
        with pytest.raises(ValueError, match="rows with nothing in them"):
            open_source(tmp_path)
        write_json(tmp_path / "rows.json", CAPTIONS)
        with pytest.raises(ValueError, match=r"give its file rows\.json"):
            open_source(tmp_path)
        write_json(tmp_path / "rows.json", [LLAVA])
        assert type(open_source(tmp_path)) is LlavaInstruct
        with pytest.raises(FileNotFoundError):
            open_source(tmp_path / "none")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_source_is_made_from_yaml(self, layout):
        parser = ArgumentParser()
        parser.add_subclass_arguments(Source, "source")
        path = f"realign_lightning.data.sources.{LAYOUTS[layout].__name__}"
        config = parser.parse_string(f"source: {{class_path: {path}, init_args: {{path: data/x}}}}")
        source = parser.instantiate(config).source
        assert type(source) is LAYOUTS[layout]
        assert str(source.path) == "data/x"

    def test_wrong_names(self):
        with pytest.raises(ValueError, match="layout must be 'auto' or one of"):
            open_source("x", layout="yolo")
        with pytest.raises(ValueError, match=r"'llava' of x does not take \['prompt'\]; it takes \['id_field'"):
            open_source("x", layout="llava", prompt="a")
