"""What of benchmarks/lmms_eval.py needs no lmms-eval; the proof is run by hand (docs/general_benchmarks.md)."""

import json
import runpy
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from benchmarks.lmms_eval import FAMILIES, TASKS, evaluate, holds, proof_table
from benchmarks.lmms_tasks import (
    HUB,
    LOCAL_TASK,
    STAND_INS,
    Asked,
    asked_questions,
    judging,
    write_local_task,
    write_stand_ins,
)


def asked(count: int) -> list[Asked]:
    picture = Image.new("RGB", (8, 8), "red")
    return [Asked(picture, f"is it number {number} ?", "yes" if number % 2 == 0 else "no") for number in range(count)]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


class TestStandIns:
    def test_every_data_set_has_a_picture_and_its_columns_for_every_question(self, tmp_path):
        write_stand_ins(tmp_path, asked(4))
        for stand_in in STAND_INS.values():
            dataset = tmp_path / HUB / stand_in.dataset
            header = yaml.safe_load((dataset / "README.md").read_text().split("---\n")[1])["configs"][0]
            assert header["config_name"] == stand_in.config
            assert header["data_files"] == [{"split": stand_in.split, "path": f"{stand_in.split}/*"}]
            rows = rows_of(dataset / stand_in.split)
            assert len(rows) == 4
            assert all((dataset / stand_in.split / row["file_name"]).is_file() for row in rows)
            assert all(row["question"].startswith(f"is it number {number} ?") for number, row in enumerate(rows))

    def test_mme_asks_two_questions_an_image_and_has_both_scores(self, tmp_path):
        write_stand_ins(tmp_path, asked(4))
        ids = [row["question_id"] for row in rows_of(tmp_path / HUB / "MME" / "test")]
        assert ids == ["existence/0.png"] * 2 + ["commonsense_reasoning/1.png"] * 2

    def test_datasets_reads_them_by_their_names_on_the_hub(self, tmp_path, monkeypatch):
        write_stand_ins(tmp_path, asked(4))
        monkeypatch.chdir(tmp_path)
        read = load_dataset(f"{HUB}/MMBench", "en", cache_dir=str(tmp_path / "cache"))["dev"]
        assert [row["answer"] for row in read] == ["A", "B", "A", "B"]
        assert read[0]["image"].size == (8, 8)

    def test_questions_are_about_digits_shown_and_not(self):
        truths = [one.truth for one in asked_questions(8, side=64)]
        assert truths == ["yes", "no"] * 4
        assert asked_questions(2, side=64)[0].image.size == (64, 64)


def test_local_task_scores_the_first_word(tmp_path):
    write_local_task(tmp_path, asked(2), 16)
    functions = runpy.run_path(str(tmp_path / f"{LOCAL_TASK}.py"))
    score = functions["process_results"]
    answers = {"yes at top left .": 1.0, "Yes": 1.0, "no .": 0.0, "": 0.0, "oh yes": 0.0}
    assert {text: score({"answer": "yes"}, [text])["exact_match"] for text in answers} == answers
    assert f"doc_to_visual: !function {LOCAL_TASK}.doc_to_visual" in (tmp_path / f"{LOCAL_TASK}.yaml").read_text()


def test_judge_answers_chat_completions():
    with judging() as address:
        messages = [{"role": "user", "content": "prompt\nis it ? | yes | no . |"}]
        body = json.dumps({"model": "rule", "messages": messages}).encode()
        request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
            assert json.load(reply)["choices"][0]["message"]["content"] == "0.0"


class TestVerdict:
    def summary(self, **changed: object) -> dict[str, dict]:
        right = {"scores": {"exact_match": 1.0}, "samples": 4, "equal": 4, "answered": 4, "answers": ["yes"] * 4}
        return dict.fromkeys(TASKS, right) | {"mme": right | changed}

    def test_holds_only_if_all_answers_are_ours(self):
        assert holds(self.summary(), 4)
        assert not holds(self.summary(equal=3), 4)
        assert not holds(self.summary(samples=3, equal=3), 4), "a sample is missing"
        assert not holds(self.summary(scores={}), 4)
        assert not holds(self.summary(answered=0), 4), "lmms-eval keeps empty answers where generating fails"

    def test_table_counts_answers_that_changed(self):
        aligned = self.summary(answers=["yes", "no", "yes", "no"])
        line = next(
            row
            for row in proof_table({"llava": {"base": self.summary(), "aligned": aligned}}).split("\n")
            if "mme" in row
        )
        assert [cell.strip() for cell in line.split("|")[5:8]] == ["2", "4 of 4", "4 of 4"]


def test_a_run_without_results_is_an_error_though_its_status_is_0(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\nprint('Error during evaluation: no such model')\n")
    interpreter.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"(?s)got 0:.*no such model"):
        evaluate(interpreter, FAMILIES["llava"], tmp_path, tmp_path, tmp_path / "out")
