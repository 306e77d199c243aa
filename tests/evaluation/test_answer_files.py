"""Reading and recognising: small files in the forms that each harness writes, rows of our own."""

import csv
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from realign_lightning.evaluation.answer_files import ForeignAnswer, questions_from, read_answers
from realign_lightning.evaluation.base import Answered
from realign_lightning.evaluation.run_folder import Evaluated, write_run

POPE_ROW = {
    "index": 7,
    "category": "random,popular",
    "question": "Is there a kite in the image?",
    "answer": "Yes",
    "image_path": "a.jpg",
    "prediction": "Yes, there is.",
}
HALLUSION_ROW = {
    "category": "VS",
    "subcategory": "map",
    "visual_input": "1",
    "set_id": "3",
    "figure_id": "2",
    "question_id": "0",
    "question": "Is the lake north of the town?",
    "gt_answer": "0",
    "gt_answer_details": "The lake is south of the town.",
    "filename": "./VS/map/3_2.png",
    "model_prediction": "No.",
}
HALLUSION_FIELDS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")
HALLUSION_TARGET = {name: HALLUSION_ROW[name] for name in HALLUSION_FIELDS}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def array(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def table(path: Path, *rows: dict[str, Any], delimiter: str = "\t") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def sheet(path: Path, *rows: dict[str, Any]) -> Path:
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def one(path: Path, form: str | None = None) -> ForeignAnswer:
    (answer,) = read_answers(path, form)
    return answer


def test_our_own_answers(tmp_path: Path) -> None:
    rows = [
        Answered("random/1", "Is there a cat?", "Yes", "a.jpg", "a.jpg", {"label": "yes", "categories": ["random"]}),
        Answered("random/2", "Is there a dog?", None, error="cut image"),
    ]
    write_run(tmp_path, Evaluated("pope", {}, {}, rows))
    answer = one(tmp_path / "answers.jsonl")
    assert (answer.key, answer.question, answer.answer, answer.image) == ("random/1", "Is there a cat?", "Yes", "a.jpg")
    (question,) = questions_from([answer], "pope")
    assert question.target == {"label": "yes", "categories": ["random"]}
    assert (question.key, question.group) == ("random/1", "a.jpg")


def test_official_pope_answers(tmp_path: Path) -> None:
    answer = one(lines(tmp_path / "example.json", {"question": "is there a bird in the image?", "answer": "yes"}))
    assert (answer.key, answer.question, answer.answer) == ("", "is there a bird in the image?", "yes")


def test_llava_answers(tmp_path: Path) -> None:
    row = {
        "question_id": 4,
        "prompt": "Is there a car?",
        "text": "No",
        "answer_id": "x",
        "model_id": "m",
        "metadata": {},
    }
    answer = one(lines(tmp_path / "a.jsonl", row))
    assert (answer.key, answer.question, answer.answer) == ("4", "Is there a car?", "No")
    assert one(lines(tmp_path / "b.jsonl", {"prompt": "Is there a car?", "text": "No"})).question == "Is there a car?"
    assert one(lines(tmp_path / "c.jsonl", {"question_id": 4, "text": "No"})).key == "4"


def test_llava_captions_name_their_image(tmp_path: Path) -> None:
    row = {"id": "COCO_val2014_000000000042.jpg", "question": "Describe it.", "answer": "A cat.", "model": "m"}
    answer = one(lines(tmp_path / "a.jsonl", row))
    assert (answer.image, answer.answer) == ("COCO_val2014_000000000042.jpg", "A cat.")


@pytest.mark.parametrize("write", [lines, array])
def test_captions(tmp_path: Path, write: Any) -> None:
    answers = read_answers(write(tmp_path / "c.json", {"image_id": 42, "caption": "A cat."}))
    assert [(one.key, one.answer, one.target) for one in answers] == [("42", "A cat.", {"image_id": 42})]


def test_amber(tmp_path: Path) -> None:
    answers = read_answers(
        array(tmp_path / "a.json", {"id": 1, "response": "A lake."}, {"id": 1005, "response": "Yes"})
    )
    assert [(one.key, one.answer) for one in answers] == [("1", "A lake."), ("1005", "Yes")]


def test_hallusionbench(tmp_path: Path) -> None:
    answer = one(array(tmp_path / "h.json", HALLUSION_ROW))
    assert (answer.key, answer.answer, answer.target) == ("VS_map_1_3_2_0", "No.", HALLUSION_TARGET)
    (question,) = questions_from([answer], "hallusionbench")
    assert question.group == "VS/map/3"
    assert question.target == {
        **HALLUSION_TARGET,
        "question": "Is the lake north of the town?",
        "reference": "The lake is south of the town.",
    }


def test_hallusionbench_without_the_right_answer_is_named_all_the_same(tmp_path: Path) -> None:
    row = {name: value for name, value in HALLUSION_ROW.items() if name != "gt_answer"}
    answer = one(array(tmp_path / "h.json", row))
    assert (answer.key, answer.target) == ("VS_map_1_3_2_0", None)
    with pytest.raises(ValueError, match=r"'VS_map_1_3_2_0' carries no target of hallusionbench"):
        questions_from([answer], "hallusionbench")


def test_mmhal(tmp_path: Path) -> None:
    row = {
        "question_type": "counting",
        "image_id": "f00",
        "image_src": "https://example.org/f00.jpg",
        "image_content": ["Boat"],
        "question": "How many boats are there?",
        "gt_answer": "Two.",
        "model_answer": "Three.",
    }
    answer = one(array(tmp_path / "response_template.json", row))
    assert answer.answer == "Three."
    (question,) = questions_from([answer], "mmhal")
    assert question.target == {
        "type": "counting",
        "question": "How many boats are there?",
        "reference": "Two.",
        "image_content": ["Boat"],
    }


def test_judge_replies(tmp_path: Path) -> None:
    replies = [{"choices": [{"message": {"content": f"Rating: {rating}"}}]} for rating in (3, 0)]
    assert [one.answer for one in read_answers(array(tmp_path / "a.json", *replies))] == ["Rating: 3", "Rating: 0"]
    assert [one.answer for one in read_answers(array(tmp_path / "b.json", "Rating: 5"))] == ["Rating: 5"]
    merged = {"model_answer": "Three.", "question": "How many?", "gpt4_review": "Rating: 1"}
    assert one(array(tmp_path / "c.json", merged), "judge").answer == "Rating: 1"
    with pytest.raises(ValueError, match=r"entry 1: expected a judge's reply"):
        read_answers(array(tmp_path / "d.json", {"choices": []}))


def comma(path: Path, *rows: dict[str, Any]) -> Path:
    return table(path, *rows, delimiter=",")


@pytest.mark.parametrize(("write", "name"), [(sheet, "m.xlsx"), (table, "m.tsv"), (comma, "m.csv"), (array, "m.json")])
def test_vlmevalkit(tmp_path: Path, write: Any, name: str) -> None:
    answer = one(write(tmp_path / name, POPE_ROW))
    assert (answer.key, answer.answer, answer.image) == ("7", "Yes, there is.", "a.jpg")
    assert (answer.target, answer.category) == ("Yes", "random,popular")
    (question,) = questions_from([answer], "pope")
    assert question.target == {"label": "yes", "categories": ["random", "popular"]}


def test_what_a_file_is_follows_from_its_content_not_its_name(tmp_path: Path) -> None:
    assert one(sheet(tmp_path / "m.xlsx", POPE_ROW).rename(tmp_path / "m.csv")).answer == "Yes, there is."
    assert one(table(tmp_path / "m.json", POPE_ROW)).answer == "Yes, there is."


def test_vlmevalkit_encodes_hallusionbench_in_its_index(tmp_path: Path) -> None:
    row = {
        "index": "VS_map_1_3_2_0",
        "question": "Is the lake north of the town?",
        "answer": "No",
        "category": "VS",
        "l2-category": "VS_map",
        "prediction": "Yes",
    }
    answer = one(table(tmp_path / "m.tsv", row))
    assert (answer.target, answer.fields["l2-category"]) == (HALLUSION_TARGET, "VS_map")
    assert questions_from([answer], "hallusionbench")[0].group == "VS/map/3"


def test_vlmevalkit_amber(tmp_path: Path) -> None:
    row = {**POPE_ROW, "category": "discriminative-attribute-state", "answer": "no"}
    (question,) = questions_from(read_answers(table(tmp_path / "m.tsv", row)), "amber")
    assert question.target == {"type": "discriminative-attribute-state", "truth": "no"}


def test_odd_cells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["=1+1", "a\n\nb", '"quoted", with comma', "_x000D_", None, "=SUM(A1:A2)", "naïve 猫", "x" * 32767, "#N/A"]
    path = sheet(tmp_path / "m.xlsx", *({"index": float(at), "prediction": text} for at, text in enumerate(texts)))
    answers = read_answers(path)
    assert [answer.key for answer in answers] == [str(at) for at in range(9)]
    expected = ["=1+1", "a\n\nb", '"quoted", with comma', "\r", "", "=SUM(A1:A2)", "naïve 猫", "x" * 32767, ""]
    assert [answer.answer for answer in answers] == expected
    assert "1 of 9 answers have 32767 characters" in caplog.text
    assert "3 of 9 answers are empty" in caplog.text


@pytest.mark.parametrize(("value", "text"), [(2, "2"), (2.0, "2"), (0.5, "0.5"), (float("nan"), ""), (None, "")])
def test_answers_that_became_numbers(tmp_path: Path, value: Any, text: str) -> None:
    assert one(array(tmp_path / "m.json", {**POPE_ROW, "prediction": value})).answer == text


def test_an_index_that_pandas_made_a_fraction(tmp_path: Path) -> None:
    rows = [{**POPE_ROW, "index": f"{number}.0"} for number in (1, 2)]
    assert [one.key for one in read_answers(table(tmp_path / "m.tsv", *rows))] == ["1", "2"]


def test_failures_of_vlmevalkit_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_answers(table(tmp_path / "m.tsv", {**POPE_ROW, "prediction": "Failed to obtain answer via API."}))
    assert "1 of 1 answers say 'Failed to obtain answer'" in caplog.text


def test_lmms_eval_pope(tmp_path: Path) -> None:
    noted = {"question_id": "3", "score": 1.0, "prediction": "no", "ground_truth": "no"}
    row = {
        "doc_id": 0,
        "target": "no",
        "filtered_resps": "No",
        "doc_hash": "0",
        "pope_accuracy": noted,
        "input": "Is there a cat?\nAnswer the question using a single word or phrase.",
    }
    answer = one(lines(tmp_path / "1_samples_pope.jsonl", row))
    assert (answer.key, answer.answer, answer.fields["question_id"]) == ("0", "No", "3")
    assert questions_from([answer], "pope")[0].target == {"label": "no", "categories": []}


def test_lmms_eval_answers_of_several_processes_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    rows = [{"doc_id": at, "target": "no", "filtered_resps": f"answer {at}"} for at in (0, 2, 10, 1)]
    assert [one.key for one in read_answers(lines(tmp_path / "s.jsonl", *rows))] == ["0", "1", "2", "10"]


def test_lmms_eval_hallusionbench(tmp_path: Path) -> None:
    row = {
        "doc_id": 0,
        "target": "The lake is south.",
        "resps": ["No."],
        "filtered_resps": "No.",
        "aAcc": HALLUSION_ROW,
    }
    answer = one(lines(tmp_path / "s.jsonl", row))
    assert (answer.key, answer.target, answer.category) == ("VS_map_1_3_2_0", HALLUSION_TARGET, "VS")
    assert answer.question == "Is the lake north of the town?"


def test_lmms_eval_captions(tmp_path: Path) -> None:
    noted = {"answer": ["cat", "sofa"], "pred": ["cat"], "image_id": 42}
    row = {"doc_id": 0, "target": "['cat', 'sofa']", "filtered_resps": ["A cat."], "coco_cap_chair_i": noted}
    (question,) = questions_from(read_answers(lines(tmp_path / "s.jsonl", row)), "chair")
    assert question.target == {"image_id": 42, "objects": ["cat", "sofa"]}


def test_several_responses_to_one_question_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "s.jsonl", {"doc_id": 0, "target": "no", "filtered_resps": ["No", "Yes"]})
    with pytest.raises(ValueError, match=r"line 1: expected one response, got 2"):
        read_answers(path)


def test_windows_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b'\xef\xbb\xbfindex,prediction\r\n1,"Yes,\r\nit is"\r\n\r\n2,No\r\n')
    assert [(one.key, one.answer) for one in read_answers(path)] == [("1", "Yes,\r\nit is"), ("2", "No")]
    path.write_bytes(b'\xef\xbb\xbf{"question": "q?", "answer": "a\xe2\x80\xa8b"}\r\n\r\n')
    assert one(path).answer == "a\u2028b"


def test_long_fields_are_read_and_the_limit_of_csv_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(one(table(tmp_path / "m.tsv", {**POPE_ROW, "prediction": "x" * (before + 1)})).answer) == before + 1
    assert csv.field_size_limit() == before


BAD_FILES = {
    "empty": (b" \n", r"is empty"),
    "empty list": (b"[]", r"is an empty list"),
    "header alone": (b"index\tprediction\n", r"holds no answers"),
    "cut line": (b'{"question": "q?", "answer": "a"}\n{"question": "q?", "ans', r"line 2: the JSON is cut or damaged"),
    "cut list": (b'[\n{"id": 1,\n "response": "a"},', r"line 3: the JSON is cut or damaged"),
    "no object": (b'{"question": "q?", "answer": "a"}\n3\n', r"line 2: expected a JSON object, got int"),
    "deep": (b"[" * 100_000, r"nested too deeply|cut or damaged"),
    "Latin-1": (b'{"question": "q?", "answer": "a"}\n{"question": "\xe9"}\n', r"line 2: not UTF-8"),
    "UTF-16": ("index,prediction".encode("utf-16"), r"UTF-16 text: save it as UTF-8"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"before 2007"),
    "gzip": (b"\x1f\x8b\x08\x00", r"compressed: unpack it"),
    "zip that is no workbook": (b"PK\x03\x04" + bytes(40), r"no readable Excel file"),
    "cut quotes": (b'index,prediction\n1,"Yes\n', r"line 2: cut or damaged"),
    "short row": (b"index,prediction\n1\n", r"line 2: expected 2 cells, one for each of .*, got 1"),
    "column twice": (b"index,prediction,index\n1,Yes,1\n", r"\['index'\] more than once"),
    "missing column": (
        b'[{"id": 1, "response": "a"}, {"id": 2}]',
        r"entry 2: .*'response'\] missing; found \['id'\]",
    ),
    "no text": (b'[{"id": 1, "response": ["a"]}]', r"entry 1: expected text in 'response', got list"),
    "questions of POPE": (b'{"question_id": 1, "image": "a", "text": "q?", "label": "yes"}', r"fit no form"),
    "data set of VLMEvalKit": (b"index\tquestion\tanswer\n1\tq?\tYes\n", r"fit no form"),
    "two forms": (
        b'[{"id": 1, "response": "a", "caption": "b", "image_id": 2}]',
        r"\['captions', 'amber'\]: say which",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, told = BAD_FILES[name]
    path = tmp_path / "answers.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        read_answers(path)
    assert str(path) in str(error.value)


def test_a_form_that_is_given_decides(tmp_path: Path) -> None:
    path = array(tmp_path / "a.json", {"id": 1, "response": "a", "caption": "b", "image_id": 2})
    assert one(path, "captions").answer == "b"
    assert one(path, "amber").answer == "a"
    with pytest.raises(ValueError, match=r"entry 1: .*'pope', \['question', 'answer'\] missing"):
        read_answers(path, "pope")
    with pytest.raises(ValueError, match=r"Expected `form` to be one of .*'vlmevalkit'.*, got 'vlm'"):
        read_answers(path, "vlm")


class Trap:
    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize("name", ["m.pkl", "m.xlsx"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"never read.*to_csv"):
        read_answers(tmp_path / name)


def test_a_missing_file_a_folder_and_a_damaged_workbook(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_answers(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"is a folder: give a file in it"):
        read_answers(tmp_path)
    path = sheet(tmp_path / "m.xlsx", *[POPE_ROW] * 500)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_answers(path)


def test_a_workbook_with_answers_on_two_sheets_is_refused(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["index", "prediction"])
    book.create_sheet("more").append(["index", "prediction"])
    book.save(tmp_path / "m.xlsx")
    with pytest.raises(ValueError, match=r"expected one sheet with answers, got \['Sheet', 'more'\]"):
        read_answers(tmp_path / "m.xlsx")


def test_without_openpyxl_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sheet(tmp_path / "m.xlsx", POPE_ROW)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"realign-lightning\[eval\].*\.tsv"):
        read_answers(path)


def test_unknown_benchmarks_and_answers_without_targets(tmp_path: Path) -> None:
    found = read_answers(array(tmp_path / "a.json", {"id": 1, "response": "Yes"}))
    with pytest.raises(ValueError, match=r"Expected `benchmark` to be one of .*, got 'mme'"):
        questions_from(found, "mme")
    for benchmark in ("pope", "chair", "amber", "hallusionbench", "mmhal"):
        with pytest.raises(ValueError, match=rf"Answer '1' carries no target of {benchmark}"):
            questions_from(found, benchmark)
