import builtins
import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from realign_lightning.evaluation.comparison import Resampling, compare_runs, main, write_comparison
from realign_lightning.evaluation.comparison.report import as_json, markdown
from tests.evaluation.comparing import BENCHMARKS, YesNo, row, write, write_lmms

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&amp;|`*_\x1b[31m\n\u2028]]>"
FEW = Resampling(resamples=200)


def compare(first: Path, second: Path, **settings):
    return compare_runs(first, second, resampling=FEW, benchmarks=BENCHMARKS, **settings)


def only(comparison):
    (one,) = comparison.benchmarks
    return one


@pytest.fixture
def runs(tmp_path):
    """Eight questions. A is right on 0 to 4, B on 2 to 6; all targets are yes, but for 7."""
    first = [row(number, number < 5, "no" if number == 7 else "yes") for number in range(8)]
    second = [row(number, 2 <= number < 7, "no" if number == 7 else "yes") for number in range(8)]
    return write(tmp_path / "base", first), write(tmp_path / "aligned", second)


def test_scores_are_computed_from_the_answers_to_the_same_questions(runs):
    """Right: 5 of 8 each. Said yes: 0 to 4 and 7 in A, 2 to 7 in B."""
    found = compare(*runs)
    assert found.names == ("base", "aligned")
    accuracy, yes = only(found).deltas
    assert (accuracy.first, accuracy.second, accuracy.value) == (0.625, 0.625, 0.0)
    assert (yes.first, yes.second) == (0.75, 0.75)
    assert accuracy.interval.low < 0 < accuracy.interval.high
    assert accuracy.reading == "unclear"
    assert only(found).mcnemar[:4] == (3, 2, 2, 1)
    assert only(found).models == ({"name": "base"}, {"name": "aligned"})


def test_the_same_run_twice_differs_by_nothing(runs):
    found = compare(runs[0], runs[0])
    assert found.names == ("A", "B")
    for delta in only(found).deltas:
        assert (delta.value, delta.interval) == (0.0, (0.0, 0.0, 0))
    assert only(found).mcnemar.p_value == 1.0
    assert only(found).flips == ()


def test_a_difference_in_every_question_is_read_by_its_direction(tmp_path):
    """A says yes and is wrong, B says no and is right, and hallucinates always."""
    first = write(tmp_path / "a" / "yes_no", [row(number, False, "no") for number in range(60)])
    second = write(tmp_path / "b" / "yes_no", [row(number, True, "no") for number in range(60)])
    for folder, counts in ((first, [0, 7, 1]), (second, [1, 7, 1])):
        rows = [row(number, counts=counts, correct=not counts[0]) for number in range(60)]
        write(folder.parent / "captions", rows, "captions")
    found = compare(first.parent, second.parent)
    readings = {
        delta.score.name: (delta.reading, delta.interval[:2]) for one in found.benchmarks for delta in one.deltas
    }
    assert readings == {
        "accuracy": ("better", (1.0, 1.0)),
        "yes": ("differs", (-1.0, -1.0)),
        "chair_s": ("worse", (1.0, 1.0)),
        "words": ("unclear", (0.0, 0.0)),
    }
    assert found.intervals == 4
    assert "There are 4 intervals: if the models did not differ at all, about 0.2 of so many" in markdown(found, 0)


def test_flips_are_listed_worst_first(tmp_path):
    badness = {0: 1.0, 1: 3.0, 2: 2.0, 3: 5.0, 4: 4.0}
    first = [row(n, n < 3, badness=0.0 if n < 3 else badness[n]) for n in range(5)] + [row(5)]
    second = [row(n, n >= 3, badness=badness[n] if n < 3 else 0.0) for n in range(5)] + [row(5)]
    found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second))
    listed = [(flip.first.key, flip.is_loss, flip.change) for flip in only(found).flips]
    assert listed == [("q1", True, 3.0), ("q2", True, 2.0), ("q0", True, 1.0), ("q3", False, 5.0), ("q4", False, 4.0)]
    told = markdown(found, 2)
    assert "3 became wrong, 2 became right; the worst 2 listed" in told
    assert "1. q1, 1.png (right to wrong, by 3): Is there thing 1?\n   - a: yes (verdict: yes)\n   - b: no" in told
    assert "q0, 0.png" not in told


def test_questions_that_cannot_be_paired_are_counted_named_and_left_out(tmp_path):
    """In both and answered: 0 and 1; A is right on one of them."""
    first = [row(0), row(1, False), row(2), row(3, None), row(4), row(6, True, counts=[])]
    second = [row(1), row(0), row(3), row(4, None), row(5), row(6)]
    found = only(compare(write(tmp_path / "a", first), write(tmp_path / "b", second)))
    assert found.keys == ("q0", "q1")
    assert found.deltas[0].first == 0.5
    assert found.left_out == {
        "only in a": ("q2",),
        "only in b": ("q5",),
        "no answer of a": ("q3",),
        "no answer of b": ("q4",),
        "answer of a not marked": ("q6",),
    }
    assert "1 question left out, no answer of a: q3." in markdown(compare(tmp_path / "a", tmp_path / "b"), 0)


class Figures(YesNo):
    """Counts may be those of all questions of a group."""

    marks_groups = True


def test_where_counts_are_of_groups_only_whole_groups_are_compared(tmp_path):
    """Group a lacks an answer, group b a question; question 6 belongs to nobody."""
    groups = ["a", "a", "b", "b", "c", "c", ""]
    first = [row(number, None if number == 0 else True, group=group) for number, group in enumerate(groups)]
    second = [row(number, group=group) for number, group in enumerate(groups) if number != 3]
    runs = write(tmp_path / "a", first), write(tmp_path / "b", second)
    assert only(compare(*runs)).keys == ("q1", "q2", "q4", "q5", "q6")
    found = only(compare_runs(*runs, resampling=FEW, benchmarks={"yes_no": Figures}))
    assert found.keys == ("q4", "q5", "q6")
    assert found.left_out["in a group with one of these"] == ("q1", "q2")


class Parts(YesNo):
    """Tells a score only where there is something to tell it of, as AMBER does."""

    @staticmethod
    def compute(counts, settings):
        scores = YesNo.compute(counts, settings)
        return scores if counts[..., 1].any() else {"accuracy": scores["accuracy"]}


def test_scores_of_a_part_that_nobody_asked_are_left_out(tmp_path):
    """Nobody says yes to the questions of both, and so nothing is said of the share of yes."""
    first = write(tmp_path / "a", [row(0, target="no"), row(1)])
    second = write(tmp_path / "b", [row(0, target="no"), row(2)])
    found = only(compare_runs(first, second, resampling=FEW, benchmarks={"yes_no": Parts}))
    assert [delta.score.name for delta in found.deltas] == ["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "no"}, r"yes_no, question 'q1': its target is 'yes' in .*a, but 'no' in .*b\. .*same data"),
        ({"question": "Is it?"}, r"question 'q1': its question is 'Is there thing 1\?' in .*a, but 'Is it\?'"),
        ({"group": "x"}, "question 'q1': its group is '' in .*a, but 'x'"),
    ],
)
def test_another_question_under_the_same_key_is_refused(tmp_path, change, message):
    first = write(tmp_path / "a", [row(0), row(1)])
    second = write(tmp_path / "b", [row(0), row(1, **change)])
    with pytest.raises(ValueError, match=message):
        compare(first, second)


def test_other_settings_are_refused(tmp_path):
    first = write(tmp_path / "a", [row(0)])
    second = write(tmp_path / "b", [row(0)], parser="opera")
    with pytest.raises(ValueError, match=r"yes_no: parser is 'first word' in .*a, but 'opera' in .*b"):
        compare(first, second)


def test_scores_that_are_not_those_of_the_answers_are_refused(runs):
    path = runs[0] / "metrics.json"
    told = json.loads(path.read_text())
    told["scores"]["accuracy"] = 0.5
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"accuracy is 0.5, the counts of the answers give 0.625.*run it again"):
        compare(*runs)


def test_rows_of_counts_are_of_one_length(tmp_path):
    folder = write(tmp_path / "a", [row(0), row(1)])
    path = folder / "answers.jsonl"
    path.write_text(path.read_text().replace("[1, 1, 1]", "[1, 1]", 1))
    with pytest.raises(ValueError, match=r"rows of counts have \[2, 3\] numbers"):
        compare(folder, folder)


def test_nothing_in_common_is_refused(runs, tmp_path):
    captions = write(tmp_path / "captions", [row(0, counts=[1, 7, 1])], "captions")
    with pytest.raises(ValueError, match=r"No benchmark is in both: .*base has yes_no; .*captions has captions"):
        compare(runs[0], captions)
    other = write(tmp_path / "other", [row(99)])
    with pytest.raises(ValueError, match="yes_no: no question was answered in both"):
        compare(runs[0], other)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        compare(tmp_path / "nowhere", runs[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds nothing to compare"):
        compare(runs[0], tmp_path / "empty")


def test_an_unknown_benchmark_is_refused(runs):
    with pytest.raises(ValueError, match=r"base is an evaluation of 'yes_no', which is none of \['captions'\]"):
        compare_runs(*runs, benchmarks={"captions": BENCHMARKS["captions"]})


def test_benchmarks_in_one_run_alone_are_named(runs, tmp_path):
    both = tmp_path / "both"
    write(both / "yes_no", [row(number) for number in range(3)])
    write(both / "captions", [row(0, counts=[1, 7, 1])], "captions")
    found = compare(runs[0], both)
    assert found.not_compared == ((), ("captions",))
    assert "Only both has, and so not compared: captions." in markdown(found, 0)


def test_runs_of_both_kinds_in_one_folder(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "yes_no", [row(0), row(1)])
        write_lmms(tmp_path / name / "other", [{"m": 1.0}, {"m": 0.0}], {"m,none": 0.5}, higher_is_better={"m": True})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [one.name for one in found.benchmarks] == ["yes_no", "task (lmms-eval)"]


def test_groups_are_told_and_warned_of(tmp_path):
    rows = [row(number, group=f"image {number // 3}") for number in range(9)]
    found = compare(write(tmp_path / "a", rows), write(tmp_path / "b", rows))
    assert only(found).groups == 3
    told = markdown(found, 0)
    assert "9 questions in 3 groups, drawn as a whole." in told
    assert "McNemar's test takes questions as independent of each other; here several share a group" in told
    assert "Few questions or groups to draw from (3)" in told


def test_one_group_gives_no_interval(tmp_path):
    """Every resample would be the same, and the interval without width."""
    first = write(tmp_path / "a", [row(number, True, group="image") for number in range(9)])
    second = write(tmp_path / "b", [row(number, False, group="image") for number in range(9)])
    found = compare(first, second)
    assert only(found).deltas[0].reading == "unclear"
    assert as_json(found)["benchmarks"][0]["scores"][0]["low"] is None
    assert re.search(r"\| +-100\.00 \| +none \| unclear, no interval", markdown(found, 0))
    write_comparison(found, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_answers_that_nobody_judged_have_no_test(tmp_path):
    rows = [row(number, correct=None) for number in range(3)]
    found = compare(write(tmp_path / "a", rows), write(tmp_path / "b", rows))
    assert only(found).mcnemar is None
    assert "McNemar" not in markdown(found, 5)
    some = [row(0), *rows[1:]]
    found = compare(write(tmp_path / "c", some), write(tmp_path / "d", some))
    assert only(found).mcnemar[:4] == (1, 0, 0, 0)
    assert "2 answers were not judged right or wrong on both sides." in only(found).notes


# ---- what is written


def test_everything_is_written(runs, tmp_path):
    found = compare(*runs)
    write_comparison(found, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written == as_json(found)
    (one,) = written["benchmarks"]
    assert (one["questions"], one["scores"][0]["difference"], one["mcnemar"]["only_first"]) == (8, 0.0, 2)
    assert [flip["key"] for flip in one["flips"]] == ["q0", "q1", "q5", "q6"]
    assert one["flips"][0]["second"] == {"answer": "no", "correct": False, "badness": 1.0, "notes": {"verdict": "no"}}
    assert (tmp_path / "out" / "comparison.md").read_text() == markdown(found, 20)
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width == 1440
        assert len(picture.convert("L").getcolors()) > 50
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "flips.html",
    ]


def test_better_and_worse_are_blue_and_orange(tmp_path):
    for name, right in (("bad", False), ("good", True)):
        write(tmp_path / name, [row(number, right and number > 5) for number in range(60)])

    def colours(first: str, second: str) -> set[tuple[int, int, int]]:
        out = tmp_path / f"{first}-{second}"
        write_comparison(compare(tmp_path / first, tmp_path / second), out)
        with Image.open(out / "comparison.png") as picture:
            return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}

    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    assert {blue, orange} & colours("bad", "good") == {blue}
    assert {blue, orange} & colours("good", "bad") == {orange}


def test_tables_survive_any_text(tmp_path):
    rows = [[row(0, right, answer=HOSTILE, question=HOSTILE, notes={HOSTILE: [HOSTILE]})] for right in (True, False)]
    found = compare(write(tmp_path / "a", rows[0]), write(tmp_path / "b", rows[1]), names=("x|y", "<b>"))
    told = markdown(found, 5)
    assert "\x1b" not in told
    assert not re.search(r"(?<!\\)[<`]", told)
    tables = [line for line in told.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:4]} == {9}
    assert "yes \\| ratio" in told


class Page(HTMLParser):
    """Elements of a page, and the texts of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self._name = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._name = dict(attrs).get("id", tag) if tag in ("script", "style") else ""
        if self._name:
            self.texts[self._name] = ""

    def handle_endtag(self, tag):
        self._name = ""

    def handle_data(self, data):
        if self._name:
            self.texts[self._name] += data


def page(comparison, folder: Path, **settings) -> Page:
    write_comparison(comparison, folder, picture=False, **settings)
    return Page(folder / "flips.html")


def test_the_page_has_every_flip_and_what_differs(runs, tmp_path):
    read = page(compare(*runs), tmp_path / "out")
    flips = json.loads(read.texts["flips"])
    assert [(flip["key"], flip["change"]) for flip in flips] == [
        ("q0", "right to wrong"),
        ("q1", "right to wrong"),
        ("q5", "wrong to right"),
        ("q6", "wrong to right"),
    ]
    assert (flips[0]["first"]["answer"], flips[0]["second"]["answer"]) == ([["yes", 1]], [["no", 1]])
    assert json.loads(read.texts["facts"]) == {
        "names": ["base", "aligned"],
        "questions": {"yes_no": 8},
        "flips": 4,
    }


def test_nothing_on_the_page_is_markup_or_from_elsewhere(runs, tmp_path):
    hostile = [[row(0, right, answer=HOSTILE, question=HOSTILE, image=HOSTILE)] for right in (True, False)]
    first, second = (write(tmp_path / name, rows) for name, rows in zip("ab", hostile, strict=True))
    read = page(compare(first, second, names=(HOSTILE, "%FLIPS%")), tmp_path / "hostile")
    tame = page(compare(*runs), tmp_path / "tame")
    assert read.tags == tame.tags
    assert json.loads(read.texts["flips"])[0]["question"] == HOSTILE
    assert json.loads(read.texts["facts"])["names"] == [HOSTILE, "%FLIPS%"]
    assert "<img" not in read.source
    assert not re.search(r"https?:|innerHTML|insertAdjacent|document\.write|\beval\b|\bfetch\b", read.texts["script"])
    assert "url(" not in read.texts["style"]
    assert "default-src 'none'; img-src data:" in read.source


def test_images_come_from_their_folder_and_from_nowhere_else(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in (images / "0.png", tmp_path / "secret.png"):
        Image.new("RGB", (40, 30), "red").save(path)
    (images / "1.png").write_bytes(b"damaged")
    names = {0: "0.png", 1: "1.png", 2: "2.png", 3: "../secret.png"}
    runs = [
        write(tmp_path / name, [row(n, right, image=names[n]) for n in names])
        for name, right in (("a", True), ("b", False))
    ]
    found = compare(*runs)
    assert write_comparison(found, tmp_path / "out", images=images, picture=False) == 3
    read = Page(tmp_path / "out" / "flips.html")
    assert [flip["picture"] for flip in json.loads(read.texts["flips"])] == ["i-0", "i-1", "", ""]
    assert {name for name in read.texts if name.startswith("i-")} == {"i-0"}
    assert read.texts["i-0"].startswith("image/png;base64,")


def test_only_an_older_comparison_is_replaced(runs, tmp_path):
    found = compare(*runs)
    for _ in range(2):
        write_comparison(found, tmp_path / "out", picture=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match="mine is there and holds no comparison"):
        write_comparison(found, tmp_path / "mine")


# ---- the command


@pytest.fixture
def known(monkeypatch):
    """The benchmarks of these tests, where the command looks for those of the package."""
    module = types.ModuleType("realign_lightning.evaluation.benchmarks")
    module.BENCHMARKS = BENCHMARKS
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_command_prints_and_writes_beside_the_second_run(runs, known, capsys):
    main([*map(str, runs), "--resamples", "300", "--seed", "5", "--confidence", "0.9", "--flips", "1"])
    told = capsys.readouterr().out
    folder = runs[1].parent / "aligned_against_base"
    assert told == (folder / "comparison.md").read_text() + f"\nWritten: {folder}\n"
    assert "# aligned against base" in told
    assert "90 %, percentiles of 300 resamples, seed 5" in told
    assert "; the worst 1 listed" in told
    written = json.loads((folder / "comparison.json").read_text())
    assert (written["resamples"], written["seed"], written["confidence"]) == (300, 5, 0.9)


def test_models_can_be_named_and_images_shown(runs, known, capsys, tmp_path):
    options = [
        "--names",
        "LLaVA",
        "Re-Align",
        "--images",
        str(tmp_path),
        "--no-picture",
        "--output",
        str(tmp_path / "o"),
    ]
    main([*map(str, runs), *options])
    told = capsys.readouterr().out
    assert "# Re-Align against LLaVA" in told
    assert f"4 images are not in {tmp_path}" in told
    assert not (tmp_path / "o" / "comparison.png").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--resamples", "0"], ValueError, "--resamples must be at least 1, got 0"),
        (["--confidence", "95"], ValueError, "--confidence must lie between 0 and 1, such as 0.95, got 95"),
        (["--flips", "-1"], ValueError, "--flips must not be negative"),
        (["--images", "nowhere"], FileNotFoundError, "--images nowhere is no folder"),
    ],
)
def test_options_are_checked_first(runs, known, options, error, message):
    with pytest.raises(error, match=message):
        main([*map(str, runs), *options])
    assert sorted(path.name for path in runs[1].parent.iterdir()) == ["aligned", "base"]


def test_without_matplotlib_the_command_says_what_to_do(runs, known, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib; or add --no-picture"):
        main([*map(str, runs)])
    main([*map(str, runs), "--no-picture"])
