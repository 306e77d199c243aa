"""Writing our answers as others do, and reading them back."""

import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from realign_lightning.evaluation.answer_files import match, questions_from, read_answers, write_answers
from realign_lightning.evaluation.base import Answered, Question
from realign_lightning.metrics.functional.hallusionbench import HallusionRow, hallusionbench

TEXTS = ["Yes", "=1+1", 'no\n\n"really", tab\there', " _x0041_ naïve 猫", "no"]


def pope_answers() -> list[Answered]:
    labels, kinds = ["yes", "no", "no", "yes", "no"], [["random"], ["random"], ["random", "popular"], ["popular"], []]
    return [
        Answered(
            f"q/{at}", f"Is there thing {at}?", text, image=f"{at}.jpg", target={"label": label, "categories": kind}
        )
        for at, (text, label, kind) in enumerate(zip(TEXTS, labels, kinds, strict=True))
    ]


def hallusion_answers() -> list[Answered]:
    """Two questions about each of two figures of one set; the second figure's are answered wrong once."""
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")
    rows = [
        ("1", "0", "0", "1", "Yes."),
        ("1", "0", "1", "0", "No."),
        ("2", "1", "0", "0", "Yes"),
        ("2", "1", "1", "1", "yes"),
    ]
    return [
        Answered(
            f"VD/ocr/4/{figure}/{question}",
            f"Does it say {question}?",
            answer,
            target=dict(zip(names, ("VD", "ocr", visual, "4", figure, question, right), strict=True)),
        )
        for visual, figure, question, right, answer in rows
    ]


def mmhal_answer() -> Answered:
    target = {"type": "counting", "question": "How many?", "reference": "Two.", "image_content": ["Boat"]}
    return Answered("0", "How many?\nBe brief.", "Three.", image="f.jpg", target=target)


def as_questions(answers: list[Answered]) -> list[Question]:
    return [Question(one.question, Path(one.image) if one.image else None, one.key, one.target) for one in answers]


ROUND_TRIPS = [
    ("pope", "vlmevalkit", "m.xlsx"),
    ("pope", "vlmevalkit", "m.tsv"),
    ("pope", "vlmevalkit", "m.csv"),
    ("pope", "lmms_eval", "s.jsonl"),
    ("hallusionbench", "vlmevalkit", "m.xlsx"),
    ("hallusionbench", "vlmevalkit", "m.tsv"),
    ("hallusionbench", "lmms_eval", "s.jsonl"),
    ("hallusionbench", "official", "h.json"),
    ("mmhal", "official", "m.json"),
]
ANSWERS = {"pope": pope_answers(), "hallusionbench": hallusion_answers(), "mmhal": [mmhal_answer()]}


@pytest.mark.parametrize(("benchmark", "form", "name"), ROUND_TRIPS)
def test_what_is_written_is_read_back(tmp_path: Path, benchmark: str, form: Any, name: str) -> None:
    answers = ANSWERS[benchmark]
    (path,) = write_answers(tmp_path / "new" / name, answers, form, benchmark)
    found = read_answers(path)
    texts = [one.answer for one in answers]
    assert [one.answer for one in found] == texts
    assert match(as_questions(answers), found) == texts
    questions = questions_from(found, benchmark)
    assert match(questions, found) == texts
    for question, answer in zip(questions, answers, strict=True):
        known = {name: value for name, value in answer.target.items() if name != "categories"}
        assert {name: question.target[name] for name in known} == known


def test_vlmevalkit_reads_labels_and_kinds_as_it_writes_them(tmp_path: Path) -> None:
    (path,) = write_answers(tmp_path / "m.xlsx", pope_answers(), "vlmevalkit", "pope")
    header, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    assert header == ("index", "category", "question", "answer", "image_path", "prediction")
    assert [row[3] for row in rows] == ["Yes", "No", "No", "Yes", "No"]
    assert [row[1] for row in rows] == ["random", "random", "random,popular", "popular", "all"]
    assert all(cell.data_type == "s" for row in openpyxl.load_workbook(path).active.iter_rows() for cell in row)


def test_vlmevalkits_index_gives_the_same_hallusionbench_scores(tmp_path: Path) -> None:
    """3 of 4 are right: both about figure 0, one about figure 1; both of question 1, one of question 0."""
    (path,) = write_answers(tmp_path / "m.tsv", hallusion_answers(), "vlmevalkit", "hallusionbench")
    found = read_answers(path)
    assert [one.key for one in found] == [
        f"VD_ocr_{visual}_4_{figure}" for visual, figure in (("1", "0_0"), ("1", "0_1"), ("2", "1_0"), ("2", "1_1"))
    ]
    assert {one.fields["l2-category"] for one in found} == {"VD_ocr"}
    rows = [
        HallusionRow(**{name: question.target[name] for name in HallusionRow._fields})
        for question in questions_from(found, "hallusionbench")
    ]
    scores = hallusionbench([one.answer for one in found], rows, variant="vlmevalkit")
    assert [scores[name].item() for name in ("a_acc", "f_acc", "q_acc")] == [0.75, 0.5, 0.5]


def test_lmms_eval_lines_carry_what_its_metrics_take(tmp_path: Path) -> None:
    (path,) = write_answers(tmp_path / "s.jsonl", pope_answers()[:2], "lmms_eval", "pope")
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (first["doc_id"], first["target"], first["filtered_resps"]) == (0, "yes", "Yes")
    noted = {"question_id": "q/0", "score": 1.0, "prediction": "yes", "ground_truth": "yes"}
    assert first["pope_accuracy"] == first["pope_f1_score"] == noted
    assert (second["doc_id"], second["pope_accuracy"]["score"]) == (1, 0.0)
    (path,) = write_answers(tmp_path / "h.jsonl", hallusion_answers(), "lmms_eval", "hallusionbench")
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert (line["aAcc"]["model_prediction"], line["aAcc"]["gt_answer"], line["qAcc"]) == ("Yes.", "1", line["fAcc"])


def test_official_pope_has_a_file_for_each_kind(tmp_path: Path) -> None:
    files = write_answers(tmp_path / "a.json", pope_answers()[:4], "official", "pope")
    assert [file.name for file in files] == ["a_random.json", "a_popular.json"]
    rows = [[json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    assert rows == [TEXTS[:3], TEXTS[2:4]]
    assert write_answers(tmp_path / "b.json", pope_answers()[:2], "official", "pope") == [tmp_path / "b.json"]


@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
def test_official_captions(tmp_path: Path, name: str) -> None:
    answers = [
        Answered("x", "Describe it.", "A cat.", target={"image_id": 42, "objects": ["cat"]}),
        Answered("y", "Describe it.", "A dog.", image="COCO_val2014_000000000007.jpg", target={"objects": ["dog"]}),
    ]
    (path,) = write_answers(tmp_path / name, answers, "official", "chair")
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    assert rows == [{"image_id": 42, "caption": "A cat."}, {"image_id": 7, "caption": "A dog."}]
    with pytest.raises(ValueError, match=r"COCO's number of the image .* question 'z'"):
        write_answers(tmp_path / name, [Answered("z", "", "A cat.", target={})], "official", "chair")


def test_official_amber_and_mmhal(tmp_path: Path) -> None:
    answers = [Answered("1005", "Is it?", "Yes", target={"type": "relation", "truth": "yes"})]
    (path,) = write_answers(tmp_path / "a.json", answers, "official", "amber")
    assert json.loads(path.read_text(encoding="utf-8")) == [{"id": 1005, "response": "Yes"}]
    (path,) = write_answers(tmp_path / "m.json", [mmhal_answer()], "official", "mmhal")
    (row,) = json.loads(path.read_text(encoding="utf-8"))
    assert (row["question"], row["gt_answer"], row["model_answer"]) == ("How many?", "Two.", "Three.")
    with pytest.raises(ValueError, match=r"Expected AMBER's number as the key of a question, got 'a'"):
        write_answers(tmp_path / "a.json", [Answered("a", "", "Yes")], "official", "amber")


def test_vlmevalkit_has_no_place_for_ambers_descriptions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    described = Answered("1", "Describe it.", "A lake.", target={"type": "generative", "truth": [], "hallu": []})
    asked = Answered("1005", "Is it?", "Yes", target={"type": "relation", "truth": "no"})
    (path,) = write_answers(tmp_path / "m.tsv", [described, asked], "vlmevalkit", "amber")
    assert "1 of 2 answers are left out" in caplog.text
    (question,) = questions_from(read_answers(path), "amber")
    assert question.target == {"type": "relation", "truth": "no"}
    with pytest.raises(ValueError, match=r"Expected answers that the form has a place for, got none"):
        write_answers(tmp_path / "m.tsv", [described], "vlmevalkit", "amber")


def said(text: str | None) -> list[Answered]:
    return [Answered("a", "", text, target={"label": "yes", "categories": []})]


REFUSED = [
    ([], "vlmevalkit", "pope", "m.tsv", r"at least one answer"),
    (said(None), "vlmevalkit", "pope", "m.tsv", r"1 of 1 questions have no answer, such as 'a'"),
    (said("x") * 2, "vlmevalkit", "pope", "m.tsv", r"two with one key"),
    ([Answered("a", "", "x")], "vlmevalkit", "pope", "m.tsv", r"target of question 'a' to hold \['label'\], got None"),
    (said("x"), "vlmevalkit", "chair", "m.tsv", r"one of \['pope', .*'vlmevalkit', got 'chair'"),
    (said("x"), "helm", "pope", "m.tsv", r"Expected `form` to be one of .*, got 'helm'"),
    (said("x"), "vlmevalkit", "pope", "m.pkl", r"one of \['.xlsx', '.tsv', '.csv'\], got .*m.pkl"),
    (said("x" * 32768), "vlmevalkit", "pope", "m.xlsx", r"'prediction' of question 'a' .* \.tsv"),
    (said("bell\x07"), "vlmevalkit", "pope", "m.xlsx", r"control characters.* \.tsv"),
]


@pytest.mark.parametrize(("answers", "form", "benchmark", "name", "told"), REFUSED)
def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(
    tmp_path: Path, answers: list[Answered], form: Any, benchmark: str, name: str, told: str
) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match=told):
        write_answers(tmp_path / name, answers, form, benchmark)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"
