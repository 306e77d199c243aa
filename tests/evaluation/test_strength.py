"""Sweeps over the strength of an adapter: which point is suggested, and that every point is what it says."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file

from realign_lightning.backbones import AdapterStrength, LoRA
from realign_lightning.backbones.files import file_sha256
from realign_lightning.cli import run
from realign_lightning.demos import DigitBackbone, DigitCHAIR, write_digit_benchmarks
from realign_lightning.engines import Policy
from realign_lightning.evaluation import PopeBenchmark
from realign_lightning.evaluation.base import Score
from realign_lightning.evaluation.run_folder import read_run
from realign_lightning.evaluation.strength import (
    Axis,
    Measures,
    Point,
    Sweep,
    draw,
    measure_strengths,
    read_scales,
    read_skill,
)
from realign_lightning.evaluation.strength.picture import joined_labels

ROOT = Path(__file__).parents[2]
RECIPE = ["--config", str(ROOT / "recipes" / "eval" / "digits_pope.yaml")]
CPU = ["--trainer.accelerator", "cpu"]
CHAIR = Axis("CHAIRi", higher_is_better=False)
SKILL = Axis("skills")
POINTS = (
    Point(0.0, 14.0, 93.0),
    Point(0.5, 11.0, 92.8),
    Point(1.0, 9.0, 92.4),
    Point(1.1, 9.5, 92.1),
    Point(1.5, 8.0, 88.0),
)


class TestScales:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0:1.5:0.5", (0, 0.5, 1, 1.5)),
            ("0:1:0.1", tuple(number / 10 for number in range(11))),
            ("0:0.35:0.1", (0, 0.1, 0.2, 0.3)),
            ("1", (0, 1)),
            ("1,0.5,1", (0, 0.5, 1)),
            ("0.5:0.5:1", (0, 0.5)),
        ],
    )
    def test_what_they_stand_for(self, text, expected):
        assert read_scales(text) == expected

    @pytest.mark.parametrize(
        "text", ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "-1,1", "0:1:0.001", "nan", "0:inf:1"]
    )
    def test_what_is_none(self, text):
        with pytest.raises(ValueError, match="Expected `scales` like"):
            read_scales(text)


class TestSweep:
    def test_the_front_holds_what_nothing_beats(self):
        sweep = Sweep(CHAIR, SKILL, POINTS, 0.5)
        assert [point.strength for point in sweep.front] == [0, 0.5, 1, 1.5], "1.1 loses both ways against 1"

    @pytest.mark.parametrize(("tolerance", "expected"), [(0, 0), (0.2, 0.5), (0.5, 0.5), (0.6, 1), (10, 1.5)])
    def test_the_best_that_keeps_the_skill_is_suggested(self, tolerance, expected):
        assert Sweep(CHAIR, SKILL, POINTS, tolerance).suggested.strength == expected

    def test_other_directions(self):
        points = tuple(Point(one.strength, -one.score, -(one.skill or 0)) for one in POINTS)
        sweep = Sweep(Axis("POPE"), Axis("errors", higher_is_better=False), points, 0.6)
        assert sweep.suggested.strength == 1
        assert [point.strength for point in sweep.front] == [0, 0.5, 1, 1.5]

    def test_of_equal_scores_the_smallest_strength(self):
        points = tuple(Point(strength, 5.0, 90.0) for strength in (0.0, 1.0, 2.0))
        assert Sweep(CHAIR, SKILL, points, 0.0).suggested.strength == 0

    def test_without_skills_the_best_score(self):
        points = tuple(Point(one.strength, one.score) for one in POINTS)
        sweep = Sweep(CHAIR, None, points, 0.5)
        assert sweep.suggested.strength == 1.5
        assert "was not measured" in sweep.as_table()

    def test_the_table(self):
        lines = Sweep(CHAIR, SKILL, POINTS, 0.6).as_table().splitlines()
        assert lines[0] == "| strength | CHAIRi ↓ | skills ↑ |                  |"
        assert lines[4] == "|        1 |     9.00 |    92.40 | front, suggested |"
        assert lines[-1].startswith(
            "Suggested: strength 1, the best CHAIRi of those that lose at most 0.6 of the base's"
        )

    def test_titles_say_what_values_are_differences_to(self):
        sweep = Sweep(CHAIR, SKILL, POINTS, 0.6, compared="the base")
        head, advice = sweep.as_table().splitlines()[0], sweep.as_table().splitlines()[-1]
        assert "CHAIRi, difference to the base ↓ | skills, difference to the base ↑" in head
        assert "difference" not in advice

    def test_the_table_shows_intervals_where_there_are_any(self):
        points = (Point(0.0, 9.0, 90.0, 0.5, 1.25), Point(1.0, 8.0, 90.0, 0.25), Point(2.0, 8.5, 89.0))
        cells = [line.split("|")[2:4] for line in Sweep(CHAIR, SKILL, points, 0.5).as_table().splitlines()[2:5]]
        assert [[cell.strip() for cell in row] for row in cells] == [
            ["9.00 ± 0.50", "90.00 ± 1.25"],
            ["8.00 ± 0.25", "90.00"],
            ["8.50", "89.00"],
        ]

    @pytest.mark.parametrize("skill", [SKILL, Axis("errors", higher_is_better=False), None])
    def test_the_picture(self, tmp_path, skill):
        draw(Sweep(CHAIR, skill, POINTS, 0.5), tmp_path / "sweep.png")
        assert Image.open(tmp_path / "sweep.png").size[0] > 800

    def test_where_none_keeps_the_skill_nothing_is_suggested(self, tmp_path, monkeypatch):
        """Of a base with 95: 92.8, 92.4 and 92.1 are left, all of which lose more than 0.5."""
        sweep = Sweep(CHAIR, SKILL, POINTS[1:4], 0.5, base_skill=95.0)
        assert sweep.suggested == POINTS[1]
        lines = sweep.as_table().splitlines()
        assert "suggested" not in sweep.as_table()
        assert "loses least" in lines[2]
        assert lines[-1] == "No strength loses at most 0.5 of the base's skills: strength 0.5 loses least."
        assert json.loads(json.dumps(sweep.as_json()))["keeps_skill"] is False
        titles = []
        monkeypatch.setattr(Axes, "set_title", lambda _, title, **kwargs: titles.append(title))
        draw(sweep, tmp_path / "sweep.png")
        assert titles == ["Strength of the adapter: none loses at most 0.5, 0.5 loses least"]

    def test_of_equal_least_losses_the_best_score(self):
        points = (Point(0.5, 9.0, 90.0), Point(1.0, 8.0, 90.0), Point(1.5, 7.0, 89.0))
        assert Sweep(CHAIR, SKILL, points, 0.0, base_skill=93.0).suggested.strength == 1

    @pytest.mark.parametrize("strengths", [(), (0.5, 1.0), (0.0, 1.0, 0.5), (0.0, 1.0, 1.0), (0.0, float("nan"))])
    def test_strengths_that_make_no_sweep(self, strengths):
        with pytest.raises(ValueError, match="Expected `points` to"):
            Sweep(CHAIR, None, tuple(Point(strength, 1.0) for strength in strengths), 0.5)

    @pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
    def test_tolerances_that_no_loss_can_be_compared_with(self, tolerance):
        with pytest.raises(ValueError, match="Expected `tolerance` to be at least 0"):
            Sweep(CHAIR, SKILL, POINTS, tolerance)

    def test_intervals_are_written(self):
        sweep = Sweep(CHAIR, SKILL, (Point(0.0, 9.0, 90.0, 0.5, 1.25), Point(1.0, 8.0, 89.0)), 0.5, compared="the base")
        rows = list(csv.DictReader(sweep.as_csv().splitlines()))
        assert rows[0] == {"strength": "0", "score": "9.0", "skill": "90.0", "score_half": "0.5", "skill_half": "1.25"}
        assert (rows[1]["skill"], rows[1]["score_half"]) == ("89.0", "")
        told = sweep.as_json()
        assert (told["dial"], told["compared"], told["base_skill"]) == ("strength", "the base", 90)
        assert Sweep(CHAIR, SKILL, POINTS, 0.5, base_skill=95.0).as_json()["base_skill"] == 95

    def test_labels_that_would_lie_on_each_other_are_one(self):
        """Three letters are 15 points wide: 8 to the right is on it, 8 up is on its line, 30 away is free."""
        places = [(100.0, 50.0), (108.0, 50.0), (100.0, 58.0), (130.0, 80.0)]
        assert joined_labels(places, [0.75, 0.5, 1.0, 2.0]) == [(0, "0.5, 0.75, 1"), (3, "2")]
        assert joined_labels([(0.0, 0.0), (0.0, 10.0)], [1.0, 2.0]) == [(0, "1"), (1, "2")]

    @pytest.mark.parametrize("higher_is_better", [True, False])
    def test_the_picture_joins_labels_of_points_on_each_other(self, tmp_path, monkeypatch, higher_is_better):
        labels = []
        monkeypatch.setattr(Axes, "annotate", lambda _, text, *args, **kwargs: labels.append(text))
        skills = {0.0: 93.0, 0.5: 92.0, 0.75: 92.001, 1.0: 88.0}
        scores = {0.0: 14.0, 0.5: 11.0, 0.75: 11.0, 1.0: 9.0}
        points = tuple(Point(strength, scores[strength], skill) for strength, skill in skills.items())
        draw(Sweep(CHAIR, Axis("skills", higher_is_better), points, 0.5), tmp_path / "sweep.png")
        assert sorted(labels) == ["0", "0.5, 0.75", "1"]


class TestSkillFiles:
    def write(self, folder: Path, name: str, value: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        results = {"results": {"mme": {"alias": "mme", "mme_score,none": value}}}
        (folder / name).write_text(json.dumps(results))

    def test_the_newest_of_a_strength_is_read(self, tmp_path):
        for name, value in (("20260101_results.json", 1.0), ("20260102_results.json", 2.0)):
            self.write(tmp_path / "0.7" / "model", name, value)
        pattern = f"{tmp_path}/{{strength}}/*/*_results.json"
        assert read_skill(pattern, 0.7, "mme/mme_score,none") == 2
        with pytest.raises(FileNotFoundError, match=r"no file .*/0\.8/"):
            read_skill(pattern, 0.8, "mme/mme_score,none")
        for name in ("mme/accuracy", "mme/alias", "other/x", None):
            with pytest.raises(ValueError, match=r"one of \[.*mme/mme_score,none"):
                read_skill(pattern, 0.7, name)

    def test_settings_that_do_not_go_together(self):
        benchmark = PopeBenchmark()
        for settings in ({"skill_files": "a.json", "skill_score": "a/b"}, {"skill_files": "{strength}.json"}):
            with pytest.raises(ValueError, match=r"`skill_files` with \{strength\} in the path"):
                Measures(benchmark, **settings)
        with pytest.raises(ValueError, match="Expected `score` to be one of accuracy, f1"):
            Measures(benchmark, score="yes_ratio")

    @pytest.mark.parametrize("name", ["x", "accuracy", None])
    def test_an_unknown_score_of_skills_is_refused_before_anything_is_asked(self, name):
        with pytest.raises(ValueError, match=r"Expected `skill_score` to be one of pope accuracy, pope F1, .* got "):
            Measures(PopeBenchmark(), skills=PopeBenchmark(), skill_score=name)

    def test_scores_that_cannot_be_known_before_pass(self):
        class OneScore(PopeBenchmark):
            headline = (Score("accuracy", "accuracy"),)

        class OwnScore(PopeBenchmark):
            def score(self, answers):
                return {"own": 1.0}

        Measures(PopeBenchmark(), skills=OneScore())
        for skills in (OwnScore(), DigitCHAIR(scenes=2)):
            Measures(PopeBenchmark(), skills=skills, skill_score="own")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that changes answers."""
    torch.manual_seed(0)
    backbone = DigitBackbone()
    model = LoRA(4, 8, 0.0).apply(backbone, backbone.load_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_digit_benchmarks("data/digit_benchmarks", 8)
    return tmp_path


SKILLS = ["--skills", "realign_lightning.demos.DigitCHAIR", "--skills.scenes", "6", "--skill_score", "exact captions"]


def answers(folder: str) -> list[str | None]:
    return [row.answer for row in read_run(Path(folder)).answers]


def test_every_point_is_the_model_at_that_strength(inside, adapter, capsys):
    arguments = [*RECIPE, *CPU, "--adapter", str(adapter), "--output", "sweep"]
    run(["sweep-strength", *arguments, *SKILLS, "--scales", "0.5,1", "--write_adapters", "true"])
    printed = capsys.readouterr().out
    run(["test", *RECIPE, *CPU, "--output", "base"])
    run(["test", *RECIPE, *CPU, "--adapter", str(adapter), "--output", "whole"])
    run(["test", *RECIPE, *CPU, "--adapter", "sweep/strength_0.5/adapter", "--output", "half"])
    for folder, strength in (("base", "0"), ("half", "0.5"), ("whole", "1")):
        assert answers(folder) == answers(f"sweep/strength_{strength}"), folder
    assert len({tuple(answers(folder)) for folder in ("base", "half", "whole")}) == 3, "the adapter matters"
    told = json.loads(Path("sweep/sweep.json").read_text())
    with Path("sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for point, row, folder in zip(told["points"], rows, ("base", "half", "whole"), strict=True):
        assert point["score"] == pytest.approx(100 * read_run(Path(folder)).scores["accuracy"])
        assert float(row["score"]) == point["score"]
        assert float(row["skill"]) == point["skill"]
    assert f"Suggested: strength {told['suggested']:g}" in printed
    assert Path("sweep/sweep.png").is_file()
    PeftModel.from_pretrained(DigitBackbone().load_model(), "sweep/adapter")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_the_trained_one_afterwards(inside, adapter, monkeypatch, fails):
    backbone = DigitBackbone()
    model = PeftModel.from_pretrained(backbone.load_model(), str(adapter)).eval()
    policy = Policy(backbone, model)
    folder = Path("data/digit_benchmarks")
    benchmark = PopeBenchmark(folder / "pope", folder / "images", instruction="", max_new_tokens=8)
    if fails:
        monkeypatch.setattr(AdapterStrength, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            measure_strengths(policy, [0.0, 0.5], Measures(benchmark), "sweep", show_progress=False)
    else:
        measure_strengths(policy, [0.0, 0.5], Measures(benchmark), "sweep", show_progress=False)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == 8 / 4
    # Refused for a model that is turned.
    assert AdapterStrength(model).value == 1


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([0.5, 1.0], "to begin with strength 0"),
        ([0.0, 1.0, 0.5], "to .* rising order"),
        ([], "to .* rising order"),
        ([0.0, 1.0000001, 1.0000002], "that differ within six digits"),
    ],
)
def test_scales_that_make_no_sweep_are_refused_before_anything_is_asked(inside, adapter, scales, message):
    backbone = DigitBackbone()
    policy = Policy(backbone, PeftModel.from_pretrained(backbone.load_model(), str(adapter)))
    with pytest.raises(ValueError, match=f"Expected `scales` {message}"):
        measure_strengths(policy, scales, Measures(PopeBenchmark()), "sweep")
    assert not Path("sweep").exists()


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_is_checked_before_anything_is_asked(inside, tolerance):
    with pytest.raises(ValueError, match=f"Expected `tolerance` to be at least 0 and finite, got {tolerance}"):
        measure_strengths(Policy(DigitBackbone()), [0.0, 1.0], Measures(PopeBenchmark()), "sweep", tolerance)
    assert not Path("sweep").exists()


def test_the_written_adapter_is_the_suggested_one_and_weights_are_hashed_once(inside, adapter):
    hashed: Counter[Path] = Counter()

    def counting(path: Path) -> str:
        hashed[path] += 1
        return file_sha256(path)

    backbone = DigitBackbone()
    policy = Policy(backbone, PeftModel.from_pretrained(backbone.load_model(), str(adapter)).eval())
    policy.hash_file = counting
    folder = Path("data/digit_benchmarks")
    benchmark = PopeBenchmark(folder / "pope", folder / "images", instruction="", max_new_tokens=8)
    for strength, value in (("0", 0.0), ("0.5", 1.0), ("2", 0.0)):
        TestSkillFiles().write(Path("lmms") / strength, "1_results.json", value)
    measures = Measures(benchmark, skill_files="lmms/{strength}/*_results.json", skill_score="mme/mme_score,none")
    sweep = measure_strengths(policy, [0.0, 0.5, 2.0], measures, "sweep", show_progress=False)
    taken = sweep.suggested.strength
    written, whole = (load_file(Path(one) / "adapter_model.safetensors") for one in ("sweep/adapter", adapter))
    for name, value in whole.items():
        assert torch.equal(written[name], value * taken if "lora_B" in name else value), name
    assert set(hashed.values()) == {1}


def test_a_second_run_asks_nothing_again_and_takes_scores_of_others(inside, adapter, capsys, monkeypatch):
    arguments = ["sweep-strength", *RECIPE, *CPU, "--adapter", str(adapter), "--output", "sweep", "--scales", "1"]
    run([*arguments, "--picture", "false"])
    assert "was not measured" in capsys.readouterr().out
    assert not Path("sweep/sweep.png").exists()
    for strength, value in (("0", 0.9), ("1", 0.7)):
        TestSkillFiles().write(Path("lmms") / strength, "1_results.json", value)
    monkeypatch.setattr(DigitBackbone, "generate_tokens", lambda *args, **kwargs: pytest.fail("asked again"))
    run([*arguments, "--skill_files", "lmms/{strength}/*_results.json", "--skill_score", "mme/mme_score,none"])
    assert [point["skill"] for point in json.loads(Path("sweep/sweep.json").read_text())["points"]] == [0.9, 0.7]


def test_what_has_no_strength_is_refused(inside, adapter):
    with pytest.raises(ValueError, match="Expected an adapter: --adapter"):
        run(["sweep-strength", *RECIPE, *CPU])
    with pytest.raises(ValueError, match=r"Expected `skill_score` to be one of CHAIRs, .* got 'x'"):
        run(["sweep-strength", *RECIPE, *CPU, "--adapter", str(adapter), *SKILLS[:4], "--skill_score", "x"])
