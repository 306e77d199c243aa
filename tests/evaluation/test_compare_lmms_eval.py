import json

import pytest

from realign_lightning.evaluation.comparison import Resampling, compare_runs
from realign_lightning.evaluation.comparison.lmms_eval import read_tasks
from realign_lightning.evaluation.comparison.report import markdown
from tests.evaluation.comparing import write_lmms

RIGHT_HALF = [{"m": 1.0}, {"m": 0.0}]


def compare(first, second):
    return compare_runs(first, second, resampling=Resampling(resamples=200))


def test_means_are_compared_and_the_binary_metric_judges(tmp_path):
    """Of four samples A has 2 right, B 3; the first flips to right twice, the last to wrong."""
    first = [{"m": value, "filtered_resps": f"a{value}"} for value in (0.0, 0.0, 1.0, 1.0)]
    second = [{"m": value, "filtered_resps": [f"b{value}"]} for value in (1.0, 1.0, 1.0, 0.0)]
    write_lmms(tmp_path / "a", first, {"m,none": 0.5, "m_stderr,none": 0.28}, higher_is_better={"m": True})
    write_lmms(tmp_path / "b", second, {"m,none": 0.75, "m_stderr,none": "N/A"}, higher_is_better={"m": True})
    found = compare(tmp_path / "a", tmp_path / "b")
    (one,) = found.benchmarks
    (delta,) = one.deltas
    assert one.name == "task (lmms-eval)"
    assert (delta.first, delta.second, delta.value, delta.score.scale) == (0.5, 0.75, 0.25, 100.0)
    assert one.mcnemar[:4] == (1, 1, 2, 0)
    assert [(flip.first.key, flip.first.answer, flip.second.answer) for flip in one.flips] == [
        ("3", "a1.0", "b0.0"),
        ("0", "a0.0", "b1.0"),
        ("1", "a0.0", "b1.0"),
    ]
    assert "Right or wrong is told by m." in one.notes
    assert "does not tell which questions belong together" in markdown(found, 0)


def test_scores_that_are_no_mean_are_left_out_and_named(tmp_path):
    """As lmms-eval's POPE: every metric logs the same score of right or wrong, but F1 is not its mean."""
    logged = [{"score": score, "prediction": "yes"} for score in (1.0, 1.0, 0.0)]
    samples = [{"accuracy": one, "f1": one, "submission": None} for one in logged]
    reported = {"accuracy,none": 2 / 3, "f1,none": 0.8, "submission,none": " "}
    higher = {"accuracy": True, "f1": True}
    for name in "ab":
        write_lmms(tmp_path / name, samples, reported, higher_is_better=higher)
    (one,) = compare(tmp_path / "a", tmp_path / "b").benchmarks
    assert [delta.score.name for delta in one.deltas] == ["accuracy"]
    assert any("not the mean of the samples' scores: f1." in note for note in one.notes)
    assert one.mcnemar.both == 2


@pytest.mark.parametrize("reported", [2 / 3, 66.6667, 66.66666667, 200 / 3])
def test_a_mean_may_be_reported_in_percent_and_rounded(tmp_path, reported):
    write_lmms(tmp_path, [{"m": 1}, {"m": True}, {"m": 0}], {"m,none": reported}, higher_is_better={"m": True})
    (side,) = read_tasks(tmp_path)
    assert [score.name for score in side.headline] == ["m"]


def test_points_that_are_no_shares_are_not_scaled(tmp_path):
    write_lmms(tmp_path, [{"m": 4.0}, {"m": 2.0}], {"m,none": 3.0}, higher_is_better={"m": True})
    (side,) = read_tasks(tmp_path)
    assert side.headline[0].scale == 1.0
    assert side.judged_by == ""
    assert all(row.correct is None for row in side.rows.values())


def test_a_metric_that_should_be_low_judges_the_other_way(tmp_path):
    write_lmms(tmp_path, RIGHT_HALF, {"m,none": 0.5}, higher_is_better={"m": False})
    (side,) = read_tasks(tmp_path)
    assert [row.correct for row in side.rows.values()] == [False, True]
    assert [row.badness for row in side.rows.values()] == [1.0, 0.0]


def test_a_metric_of_some_samples_is_no_mean(tmp_path):
    """MME with one of two questions about every image right: 50 and no point for the pair, as if it were a mean."""
    samples = [{"perception": {"score": 1.0}}, {"perception": {"score": 0.0}}, {"cognition": {"score": 1.0}}]
    write_lmms(tmp_path, samples, {"perception,none": 50.0, "cognition,none": 100.0})
    (side,) = read_tasks(tmp_path)
    assert side.headline == ()


def test_filters_are_compared_one_by_one(tmp_path):
    """lmms-eval logs every document once for each filter, in the order of its results."""
    samples = [{"doc_id": number % 2, "input": "?", "m": value} for number, value in enumerate((1.0, 0.0, 1.0, 1.0))]
    write_lmms(tmp_path, samples, {"m,strict": 0.5, "m,loose": 1.0}, higher_is_better={"m": True})
    strict, loose = read_tasks(tmp_path)
    assert (strict.benchmark, loose.benchmark) == ("task, strict (lmms-eval)", "task, loose (lmms-eval)")
    assert [row.correct for row in strict.rows.values()] == [True, False]
    assert [row.correct for row in loose.rows.values()] == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation_kwargs": {"max_new_tokens": 9}}, "generation_kwargs is .*16.* but .*9"),
        ({"samples": [{"m": 1.0, "target": "no"}, {"m": 0.0}]}, "question '0': its target is 'yes'"),
        ({"samples": [{"m": 1.0}, {"m": 0.0, "input": "What?"}]}, r"question '1': its question is 'Is it 1\?'"),
    ],
)
def test_other_questions_and_settings_are_refused(tmp_path, change, message):
    write_lmms(tmp_path / "a", RIGHT_HALF, {"m,none": 0.5})
    write_lmms(tmp_path / "b", **{"samples": list(RIGHT_HALF), "reported": {"m,none": 0.5}, **change})
    with pytest.raises(ValueError, match=message):
        compare(tmp_path / "a", tmp_path / "b")


def test_of_several_runs_of_a_task_the_newest_is_taken(tmp_path):
    write_lmms(tmp_path, RIGHT_HALF, {"m,none": 0.5}, date="20261123_000000")
    write_lmms(tmp_path, [{"m": 1.0}, {"m": 1.0}], {"m,none": 1.0})
    (side,) = read_tasks(tmp_path)
    assert side.source.name == "20261123_000000_samples_task.jsonl"
    assert "Run more than once; the newest is compared: 20261123_000000_samples_task.jsonl." in side.notes


def test_a_task_of_two_models_is_refused(tmp_path):
    for name in ("one", "other"):
        write_lmms(tmp_path / name, RIGHT_HALF, {"m,none": 0.5})
    with pytest.raises(ValueError, match=r"are both of task \(lmms-eval\): give the folder of one of the models"):
        read_tasks(tmp_path)


def test_what_tasks_write_beside_the_results_is_none(tmp_path):
    write_lmms(tmp_path, RIGHT_HALF, {"m,none": 0.5})
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "mmbench_en_dev_static_results.json").write_text('{"overall_acc": 1}')
    assert len(read_tasks(tmp_path)) == 1


def test_samples_of_mme_are_judged_by_the_metric_that_they_have(tmp_path):
    """Its sums of two accuracies are no means: 0.5 of perception is reported as 50 + 0."""
    samples = [
        {"perception": {"score": 1.0, "category": "a"}, "input_media": ["a/0.png"]},
        {"perception": {"score": 0.0, "category": "a"}, "input_media": ["a/0.png"]},
        {"cognition": {"score": 1.0, "category": "b"}},
    ]
    higher = {"perception": True, "cognition": True}
    write_lmms(tmp_path, samples, {"perception,none": 75.0, "cognition,none": 175.0}, higher_is_better=higher)
    (side,) = read_tasks(tmp_path)
    assert side.headline == ()
    assert side.judged_by == "perception, cognition"
    assert [(row.correct, row.image) for row in side.rows.values()] == [
        (True, "a/0.png"),
        (False, "a/0.png"),
        (True, ""),
    ]


@pytest.mark.parametrize(
    "failed", [{"score": 0.0, "eval_model": ""}, {"score": 0.0, "scores": [-1, -1], "eval_model": "judge"}]
)
def test_where_the_judge_failed_there_is_no_score(tmp_path, failed):
    """Of the three that the judges of both answered A has 2 / 3, B all."""
    right, wrong = ({"m": {"score": score, "eval_model": "judge"}} for score in (1.0, 0.0))
    write_lmms(tmp_path / "a", [right, right, wrong, {"m": failed}], {"m,none": 0.5}, higher_is_better={"m": True})
    write_lmms(tmp_path / "b", [right] * 4, {"m,none": 1.0}, higher_is_better={"m": True})
    (one,) = compare(tmp_path / "a", tmp_path / "b").benchmarks
    assert one.left_out == {"answer of a not marked": ("3",)}
    assert (one.deltas[0].first, one.deltas[0].second) == (2 / 3, 1.0)
    assert [flip.first.key for flip in one.flips] == ["2"]


def test_results_without_samples_say_how_to_log_them(tmp_path):
    write_lmms(tmp_path, RIGHT_HALF, {"m,none": 0.5})
    next(tmp_path.glob("*/*.jsonl")).unlink()
    with pytest.raises(ValueError, match=r"samples_task.jsonl is missing: run with --log_samples"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"doc_id": 1', "line 3 is no JSON"),
        ("[]", "line 3: expected a JSON object, got list"),
        ('{"doc_id": 9, "target": "yes"}', r"line 3: a sample of lmms-eval has \['filtered_resps'\]; this"),
        ('{"doc_id": 1, "target": "", "filtered_resps": ""}', "line 3: document 1 is there more often than"),
    ],
)
def test_damaged_samples_are_named(tmp_path, line, message):
    write_lmms(tmp_path, RIGHT_HALF, {"m,none": 0.5})
    path = next(tmp_path.glob("*/*.jsonl"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path)


def test_other_results_are_refused(tmp_path):
    (tmp_path / "2026_results.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(ValueError, match="is no file of results of lmms-eval: it lacks `results` or `configs`"):
        read_tasks(tmp_path)
