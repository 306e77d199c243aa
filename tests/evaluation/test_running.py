"""From replies to scores: what is left out, what is written, and when what is missing shows."""

import json

import pytest

from realign_lightning.evaluation import (
    AmberBenchmark,
    ChairBenchmark,
    HallusionBenchmark,
    Judge,
    MMHalBenchmark,
    PopeBenchmark,
    Reply,
    evaluate,
    read_run,
)
from realign_lightning.evaluation.running import score_replies
from tests.evaluation.official import (
    Parrot,
    write_amber,
    write_coco,
    write_hallusionbench,
    write_mmhal,
    write_pope,
)


def hallusion(tmp_path, **changed):
    folder = write_hallusionbench(tmp_path / "hb")
    return HallusionBenchmark(folder / "HallusionBench.json", folder, **changed)


def test_answers_and_scores_are_written(tmp_path):
    folder = write_pope(tmp_path / "pope", ["random"])
    benchmark = PopeBenchmark(folder, folder / "images")
    found = evaluate(benchmark, Parrot({"cat": "No", "car": "no"}), tmp_path / "run", show_progress=False)
    assert found.scores["accuracy"] == 1.0
    assert read_run(tmp_path / "run") == found
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (told["questions"], told["unanswered"], told["left_out"]) == (4, 0, 0)
    assert told["settings"]["parser"] == "official"
    assert told["settings"]["max_new_tokens"] == 32
    assert found.answers[0].image == "a.png"


def test_the_path_of_an_image_is_kept_within_its_folder(tmp_path):
    found = evaluate(hallusion(tmp_path), Parrot(), tmp_path / "run", show_progress=False)
    assert found.answers[0].image == "hallusion_bench/VD/math/0_0.png"
    assert found.answers[2].image == ""


def test_an_unanswered_question_takes_its_group_out_of_group_scores(tmp_path):
    """VD math is whole and right; of VS chart one answer is missing, so that its set of two does not count."""
    benchmark = hallusion(tmp_path)
    replies = [Reply("Yes."), Reply("No."), Reply(None, False, "the engine sleeps"), Reply("Yes.")]
    found = score_replies(benchmark, benchmark.questions(), replies, tmp_path / "run", {})
    assert found.scores["a_acc"] == found.scores["q_acc"] == found.scores["f_acc"] == 1.0
    assert [row.error is None for row in found.answers] == [True, True, False, False]
    assert found.answers[2].error == "the engine sleeps"
    assert "left out with its group, since VS/chart/0/0/0" in found.answers[3].error
    assert found.left_out == 2
    assert found.answers[3].counts == []


def test_without_groups_only_the_question_itself_is_left_out(tmp_path):
    folder = write_pope(tmp_path / "pope", ["random"])
    benchmark = PopeBenchmark(folder)
    replies = [Reply("Yes"), Reply(None, False, "x"), Reply("Yes"), Reply("No", finished=False)]
    found = score_replies(benchmark, benchmark.questions(), replies, tmp_path / "run", {})
    assert (found.scores["accuracy"], found.left_out) == (1.0, 1)
    assert [row.notes.get("cut", False) for row in found.answers] == [False, False, False, True]


def test_a_silent_judge_moves_no_score(tmp_path):
    """Without a reply there is no verdict: MMHal's second question does not count, HallusionBench's whole pair."""
    folder = write_mmhal(tmp_path / "mmhal")
    judge = Judge(Parrot({"number 1": "ERROR", "": "Rating: 6"}))
    benchmark = MMHalBenchmark(folder / "response_template.json", judge, folder / "images")
    found = evaluate(benchmark, Parrot(), tmp_path / "m", show_progress=False)
    assert (found.scores["average_score"], found.scores["hallucination_rate"], found.scores["unparsed"]) == (6, 0, 0)
    assert [row.error for row in found.answers[:3]] == [None, "the judge gave no reply", None]
    assert found.judge["failed"] == 1
    judge = Judge(Parrot({"edited": "ERROR", "": "correct"}))
    benchmark = hallusion(tmp_path, judge=judge)
    found = evaluate(benchmark, Parrot({"VD": "yes", "VS": "edited"}), tmp_path / "h", show_progress=False)
    assert found.scores["a_acc"] == 1.0
    assert [row.error is None for row in found.answers] == [True, True, False, False]


def test_a_judge_that_never_replies_gives_no_scores_at_all(tmp_path):
    benchmark = hallusion(tmp_path, judge=Judge(Parrot({"": "ERROR"})))
    with pytest.raises(ValueError, match="None of 4 questions can be scored: the judge gave no reply"):
        evaluate(benchmark, Parrot(), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_judge_in_two_evaluations_keeps_and_counts_each_apart(tmp_path):
    folder = write_mmhal(tmp_path / "mmhal")
    judge = Judge(Parrot({"": "Rating: 4"}))
    benchmark = MMHalBenchmark(folder / "response_template.json", judge, folder / "images")
    first = evaluate(benchmark, Parrot({"": "a dog"}), tmp_path / "one", show_progress=False)
    second = evaluate(benchmark, Parrot({"": "a cat"}), tmp_path / "two", show_progress=False)
    assert first.judge["asked"] == second.judge["asked"] == 9
    assert (tmp_path / "two" / "work" / "judge").is_dir()
    again = evaluate(benchmark, Parrot({"": "a cat"}), tmp_path / "two", show_progress=False)
    assert (again.judge["asked"], again.judge["cached"]) == (0, 9)


def test_what_marking_needs_is_asked_for_before_the_model(tmp_path, monkeypatch):
    engine = Parrot()
    folder = write_amber(tmp_path / "amber")
    (folder / "safe_words.txt").unlink()
    with pytest.raises(FileNotFoundError, match="safe_words"):
        evaluate(AmberBenchmark(folder, folder / "images", similarity="exact"), engine, tmp_path / "a")
    with pytest.raises((ModuleNotFoundError, OSError), match=r"[sS]pa[cC]y"):
        evaluate(AmberBenchmark(write_amber(tmp_path / "b"), tmp_path / "b" / "images"), engine, tmp_path / "a")
    template = tmp_path / "prompt.txt"
    with pytest.raises(FileNotFoundError, match="`judge_template` to be a file"):
        evaluate(hallusion(tmp_path, judge=Judge(Parrot()), judge_template=template), engine, tmp_path / "h")
    assert engine.asked == 0


def test_chair_takes_the_annotations_of_its_split_alone(tmp_path):
    """COCO's archive holds train and val, and images are of one of them."""
    write_coco(tmp_path)
    for kind in ("instances", "captions"):
        text = (tmp_path / f"{kind}_val2014.json").read_text()
        changed = text.replace("COCO_val2014", "COCO_train2014").replace('"id": 1,', '"id": 10001,')
        (tmp_path / f"{kind}_train2014.json").write_text(changed.replace('"image_id": 1,', '"image_id": 10001,'))
    questions = ChairBenchmark(tmp_path, size=3).questions()
    assert [question.key for question in questions] == ["1", "2", "3"]
    assert "10001" in [question.key for question in ChairBenchmark(tmp_path, size=3, split="train2014").questions()]
    with pytest.raises(FileNotFoundError, match=r"instances_test2014\.json does not exist"):
        ChairBenchmark(tmp_path, size=3, split="test2014").questions()
