"""Each benchmark reads its official files, and scores what can be counted by hand."""

import json

import pytest
import torch

from realign_lightning.evaluation import (
    AmberBenchmark,
    ChairBenchmark,
    HallusionBenchmark,
    Judge,
    MMHalBenchmark,
    PopeBenchmark,
    Question,
)
from realign_lightning.evaluation.benchmarks import BENCHMARKS
from tests.evaluation.official import (
    Parrot,
    write_amber,
    write_coco,
    write_hallusionbench,
    write_lines,
    write_mmhal,
    write_pope,
)


def scores_of(benchmark, answers: list[str]) -> dict[str, float]:
    return benchmark.score_marks(benchmark.mark(benchmark.questions(), answers))


def answered(benchmark, answers: dict[str, str]) -> list[str]:
    """Answers by a part of the question's key or prompt."""
    return [
        next(answer for part, answer in answers.items() if part in f"{question.key} {question.prompt}")
        for question in benchmark.questions()
    ]


def test_every_headline_names_scores_that_exist():
    width = {"pope": 28, "chair": 7, "amber": 38, "hallusionbench": 29, "mmhal": 64}
    settings = {"parser": "official", "variant": "official"}
    for name, kind in BENCHMARKS.items():
        scores = kind.compute(torch.ones(5, width[name], dtype=torch.long), settings)
        assert {score.name for score in kind.headline} <= scores.keys(), name
        assert all(value.shape == (5,) for value in scores.values()), name


def test_scores_are_shown_in_percent_under_names_of_their_own(tmp_path):
    """For the table of the Evaluation callback, in which several benchmarks stand."""
    shown = PopeBenchmark(write_pope(tmp_path), kinds=["random"]).score(["yes", "no", "yes", "yes"])
    assert shown["pope accuracy"] == shown["pope random: accuracy"] == 75.0
    benchmark = ChairBenchmark(write_coco(tmp_path / "coco"), size=3)
    assert benchmark.score(["A dog and a cat.", "A street.", "A cat."])["chair words per caption"] == pytest.approx(4)


class TestPope:
    """Of four questions of a kind "yes" is right for two."""

    def test_questions_are_those_of_the_files(self, tmp_path):
        benchmark = PopeBenchmark(write_pope(tmp_path), tmp_path / "images", instruction="Answer with one word.")
        questions = benchmark.questions()
        assert [question.key for question in questions] == [
            f"{kind}/{number}" for kind in ("random", "popular", "adversarial") for number in (1, 2, 3, 4)
        ]
        assert questions[1].prompt == "Is there a cat in the image?\nAnswer with one word."
        assert questions[1].image == tmp_path / "images" / "a.png"
        assert questions[1].target == {"label": "no", "categories": ["random"]}
        assert [question.group for question in questions[:4]] == ["a.png", "a.png", "b.png", "b.png"]

    def test_scores_by_kind_and_over_all(self, tmp_path):
        """Random: all yes, accuracy 2/4. Popular: all no, 2/4. Adversarial: yes to dog alone: 3/4, precision 1."""
        benchmark = PopeBenchmark(write_pope(tmp_path))
        answers = answered(benchmark, {"random": "Yes", "popular": "No", "dog": "Yes", "adversarial": "No."})
        scores = scores_of(benchmark, answers)
        assert scores["random/accuracy"] == scores["popular/accuracy"] == 0.5
        assert (scores["adversarial/accuracy"], scores["adversarial/precision"]) == (0.75, 1.0)
        assert scores["accuracy"] == pytest.approx(7 / 12)
        assert scores["yes_ratio"] == pytest.approx(5 / 12)

    def test_marks_tell_right_from_wrong(self, tmp_path):
        benchmark = PopeBenchmark(write_pope(tmp_path), kinds=["random"])
        marks = benchmark.mark(benchmark.questions(), ["yes"] * 4)
        assert [mark.correct for mark in marks] == [True, False, True, False]
        assert [mark.badness for mark in marks] == [0, 1, 0, 1]

    def test_answers_of_no_kind_count_in_the_whole_alone(self):
        benchmark = PopeBenchmark()
        marks = benchmark.mark([Question("?", None, "a", {"label": "yes"})], ["yes"])
        assert {name for name in benchmark.score_marks(marks) if "/" in name} == set()
        assert benchmark.score_marks(marks)["accuracy"] == 1

    def test_only_the_kinds_that_are_there(self, tmp_path):
        benchmark = PopeBenchmark(write_pope(tmp_path, ["popular"]))
        assert len(benchmark.questions()) == 4
        assert "random/accuracy" not in scores_of(benchmark, ["yes"] * 4)
        with pytest.raises(FileNotFoundError, match=r"no file \*random\*\.json"):
            PopeBenchmark(tmp_path, kinds=["random"]).questions()

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"question_id": 1, "image": "a.png", "text": "?", "label": "maybe"},
                "row 1: expected the label yes or no",
            ),
            ({"question_id": 1, "image": "a.png", "text": "?"}, "expected 'label' to hold str, got the fields"),
            ({"question_id": 1, "image": "../a.png", "text": "?", "label": "yes"}, "leads out of the folder"),
            ({"question_id": 1, "image": 7, "text": "?", "label": "yes"}, "expected 'image' to hold str, got 7"),
            ({"question_id": 1, "image": "a.png", "text": " ", "label": "yes"}, "expected a question in 'text'"),
        ],
    )
    def test_bad_rows_are_named(self, tmp_path, row, message):
        write_lines(tmp_path / "coco_pope_random.json", [row])
        with pytest.raises(ValueError, match=message):
            PopeBenchmark(tmp_path).questions()

    def test_missing_and_cut_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            PopeBenchmark(tmp_path / "nowhere").questions()
        with pytest.raises(FileNotFoundError, match="none of POPE's files"):
            PopeBenchmark(tmp_path).questions()
        with pytest.raises(ValueError, match="Expected `folder` of the benchmark"):
            PopeBenchmark().questions()
        (tmp_path / "coco_pope_random.json").write_text('{"question_id": 1, "ima')
        with pytest.raises(ValueError, match=r"coco_pope_random\.json, line 1"):
            PopeBenchmark(tmp_path).questions()


class TestChair:
    def test_ground_truth_is_instances_and_captions(self, tmp_path):
        benchmark = ChairBenchmark(write_coco(tmp_path), tmp_path / "images", size=3)
        questions = benchmark.questions()
        assert [question.target["objects"] for question in questions] == [["couch", "dog"], ["bus"], ["cat"]]
        assert questions[1].image == tmp_path / "images" / "COCO_val2014_000000000002.jpg"

    def test_scores_by_hand(self, tmp_path):
        """Caption 1 names dog and cat, 2 nothing, 3 a cat: CHAIRs 1/3, CHAIRi 1/3, recall 2 of 4 objects."""
        benchmark = ChairBenchmark(write_coco(tmp_path), size=3)
        scores = scores_of(benchmark, ["A dog and a cat.", "A street.", "A cat."])
        assert scores["chair_s"] == scores["chair_i"] == pytest.approx(1 / 3)
        assert scores["recall"] == 0.5
        (mark, *_) = benchmark.mark(benchmark.questions(), ["A dog and a cat.", "A street.", "A cat."])
        assert (mark.correct, mark.badness) == (False, 1.0)
        assert mark.notes["marked"] == "A dog and a [[cat]]."

    def test_drawn_images_are_the_same_every_time(self, tmp_path):
        write_coco(tmp_path)
        draws = {tuple(question.key for question in ChairBenchmark(tmp_path, size=2).questions()) for _ in range(3)}
        assert len(draws) == 1
        others = {tuple(q.key for q in ChairBenchmark(tmp_path, size=2, seed=seed).questions()) for seed in range(9)}
        assert others == {("1", "2"), ("1", "3"), ("2", "3")}
        with pytest.raises(ValueError, match="at most the 3 annotated images, got 500"):
            ChairBenchmark(tmp_path).questions()

    @pytest.mark.parametrize(
        "text",
        [
            "[3, 1]",
            "3\n1\n",
            '{"image_id": 3, "caption": "x"}\n{"image_id": 1, "caption": "y"}\n',
            '[{"image": "COCO_val2014_000000000003.jpg"}, {"image": "COCO_val2014_000000000001.jpg"}]',
        ],
    )
    def test_images_of_another_paper(self, tmp_path, text):
        (tmp_path / "ids").write_text(text)
        benchmark = ChairBenchmark(write_coco(tmp_path / "coco"), image_ids=tmp_path / "ids")
        assert [question.key for question in benchmark.questions()] == ["3", "1"]

    def test_unknown_images_and_missing_files_are_named(self, tmp_path):
        write_coco(tmp_path)
        (tmp_path / "ids").write_text("[1, 77]")
        with pytest.raises(ValueError, match=r"images that are not in .*: \[77\]"):
            ChairBenchmark(tmp_path, image_ids=tmp_path / "ids").questions()
        with pytest.raises(FileNotFoundError, match=r"instances_val2014\.json does not exist"):
            ChairBenchmark(tmp_path / "images", size=1).questions()
        with pytest.raises(FileNotFoundError, match="`image_ids` to be a file"):
            ChairBenchmark(tmp_path, image_ids=tmp_path / "nowhere").questions()


class TestAmber:
    """Descriptions need nouns, which are given here by splitting at blanks; NLTK's are tested with the metric."""

    @pytest.fixture
    def benchmark(self, tmp_path, monkeypatch):
        from realign_lightning.evaluation.benchmarks import amber

        benchmark = AmberBenchmark(write_amber(tmp_path), tmp_path / "images", similarity="exact")
        relation = json.loads((tmp_path / "relation.json").read_text())
        made = amber.AmberChecker(relation, ["image"], similarity=amber.exact_similarity, nouns=str.split)
        monkeypatch.setitem(benchmark.__dict__, "_checker", made)
        return benchmark

    def test_questions_of_both_parts(self, benchmark, tmp_path):
        described, asked, _ = benchmark.questions()
        assert described.prompt == "Describe this image."
        assert asked.prompt == "Is there a dog in this image?\nPlease answer yes or no."
        assert described.image == asked.image == tmp_path / "images" / "AMBER_1.jpg"
        assert asked.target == {"type": "discriminative-hallucination", "truth": "yes"}
        only = AmberBenchmark(tmp_path, part="discriminative", similarity="exact")
        assert [question.key for question in only.questions()] == ["2", "3"]

    def test_scores_by_hand(self, benchmark):
        """A puppy (a dog, safe) and a cat: CHAIR 1/2, Cover 1/2, Hal 1, Cog 1. Both answers right: F1 of "no" 1.

        To within the reference's 0.001 in every denominator.
        """
        scores = scores_of(benchmark, ["a puppy and a cat", "Yes", "No"])
        for name, value in {"chair": 0.5, "cover": 0.5, "hal": 1, "cog": 1, "accuracy": 1, "f1": 1}.items():
            assert scores[name] == pytest.approx(value, abs=2e-3), name
        marks = benchmark.mark(benchmark.questions(), ["a puppy and a cat", "Yes", "yes"])
        assert [mark.correct for mark in marks] == [False, True, False]
        assert marks[0].notes == {"hallucinated": ["cat"], "covered": ["dog"]}

    def test_a_first_word_is_read_on_request(self, benchmark):
        benchmark.reading = "first_word"
        marks = benchmark.mark(benchmark.questions(), ["grass", "yes, there is.", "No."])
        assert [mark.correct for mark in marks] == [True, True, True]
        benchmark.reading = "exact"
        marks = benchmark.mark(benchmark.questions(), ["grass", "yes, there is.", "No."])
        assert [mark.correct for mark in marks] == [True, False, False]

    def test_one_part_alone_gives_its_scores_alone(self, tmp_path):
        benchmark = AmberBenchmark(write_amber(tmp_path), part="discriminative", similarity="exact")
        scores = scores_of(benchmark, ["Yes", "No"])
        assert "f1" in scores
        assert not {"chair", "amber"} & scores.keys()

    def test_bad_settings_and_files(self, tmp_path):
        with pytest.raises(ValueError, match="`part` to be one of"):
            AmberBenchmark(part="some")
        with pytest.raises(ValueError, match="`reading` to be one of"):
            AmberBenchmark(reading="last_word")
        write_amber(tmp_path)
        (tmp_path / "annotations.json").write_text('[{"id": 1, "type": "generative", "truth": [], "hallu": []}]')
        with pytest.raises(ValueError, match="id 2 is not in annotations"):
            AmberBenchmark(tmp_path, similarity="exact").questions()


class TestHallusionBench:
    def test_questions_with_and_without_a_figure(self, tmp_path):
        folder = write_hallusionbench(tmp_path)
        benchmark = HallusionBenchmark(folder / "HallusionBench.json", folder)
        questions = benchmark.questions()
        assert [question.image is None for question in questions] == [False, False, True, False]
        assert questions[0].image == folder / "hallusion_bench" / "VD" / "math" / "0_0.png"
        assert questions[0].image.is_file()
        inside = HallusionBenchmark(folder / "HallusionBench.json", folder / "hallusion_bench").questions()
        assert [question.image for question in inside] == [question.image for question in questions]
        assert len(HallusionBenchmark(folder / "HallusionBench.json", variant="vlmevalkit").questions()) == 3
        assert [question.group for question in questions] == ["VD/math/0"] * 2 + ["VS/chart/0"] * 2

    def test_rows_that_could_not_be_scored_are_refused_before_anything_is_asked(self, tmp_path):
        folder = write_hallusionbench(tmp_path)
        file = folder / "HallusionBench.json"
        file.write_text(file.read_text().replace('"subcategory": "chart"', '"subcategory": "math"'))
        with pytest.raises(ValueError, match=r"HallusionBench\.json, row 3: .*subcategory"):
            HallusionBenchmark(file, folder).questions()

    def test_scores_by_rule(self, tmp_path):
        """Right, wrong, unclear (counts as right without a figure), right: aAcc 3/4, one of two pairs."""
        folder = write_hallusionbench(tmp_path)
        benchmark = HallusionBenchmark(folder / "HallusionBench.json")
        scores = scores_of(benchmark, ["Yes.", "Yes.", "Who knows?", "Yes."])
        assert (scores["a_acc"], scores["q_acc"]) == (0.75, 0.5)
        marks = benchmark.mark(benchmark.questions(), ["Yes.", "Yes.", "Who knows?", "Yes."])
        assert [mark.correct for mark in marks] == [True, False, True, True]

    def test_a_judge_decides(self, tmp_path):
        folder = write_hallusionbench(tmp_path)
        judge = Judge(Parrot({"two": "incorrect", "three": "unclear", "": "correct"}), str(tmp_path / "cache"))
        benchmark = HallusionBenchmark(folder / "HallusionBench.json", judge=judge)
        scores = scores_of(benchmark, ["one", "two", "three", "four"])
        assert scores["a_acc"] == 0.75
        assert benchmark.settings["parser"] == "judge"
        with pytest.raises(ValueError, match="Expected no `judge` with variant='vlmevalkit'"):
            HallusionBenchmark(variant="vlmevalkit", judge=judge)

    def test_a_diagnosis_asks_whether_answers_agree(self, tmp_path):
        """Wrong on the edited figure, and as on the original; asked against the answer for figure 0, not another."""
        folder = write_hallusionbench(tmp_path)
        parrot = Parrot({"both be true": "same", "two": "incorrect", "": "correct"})
        judge = Judge(parrot, str(tmp_path / "cache"))
        file = folder / "HallusionBench.json"
        plain = scores_of(HallusionBenchmark(file, judge=judge), ["one", "two", "three", "four"])
        asked = judge.cost.asked
        scores = scores_of(HallusionBenchmark(file, judge=judge, diagnose=True), ["one", "two", "three", "four"])
        assert judge.cost.asked == asked + 4
        assert plain["a_acc"] == scores["a_acc"] == 0.75
        assert scores["undiagnosed"] == 0
        asked_of = [
            question.prompt for batch in parrot.batches for question in batch if "both be true" in question.prompt
        ]
        assert any("First answer: two\nSecond answer: one" in prompt for prompt in asked_of)
        assert any("First answer: four\nSecond answer: three" in prompt for prompt in asked_of)
        with pytest.raises(ValueError, match="Expected `judge` with diagnose=True"):
            HallusionBenchmark(file, diagnose=True)

    def test_the_judges_prompt_can_be_the_authors(self, tmp_path):
        folder = write_hallusionbench(tmp_path)
        (tmp_path / "prompt.txt").write_text("Q {} R {} A {}")
        engine = Parrot({"": "correct"})
        judge = Judge(engine, str(tmp_path / "cache"))
        benchmark = HallusionBenchmark(
            folder / "HallusionBench.json", judge=judge, judge_template=tmp_path / "prompt.txt"
        )
        scores_of(benchmark, ["one", "two", "three", "four"])
        assert engine.batches[0][0].prompt == "Q Is it so in VD? R It is. A one"
        assert len(benchmark.settings["template"]) == 16
        (tmp_path / "prompt.txt").write_text("Q {} A {}")
        with pytest.raises(ValueError, match=r"3 times \(question, reference, answer\), got 2 times"):
            scores_of(benchmark, ["one", "two", "three", "four"])

    def test_a_judge_that_talks_nonsense_is_counted(self, tmp_path):
        folder = write_hallusionbench(tmp_path)
        judge = Judge(Parrot({"": "bananas"}), str(tmp_path / "cache"))
        scores = scores_of(
            HallusionBenchmark(folder / "HallusionBench.json", judge=judge), ["one", "two", "three", "four"]
        )
        assert scores["unparsed"] == 1.0


class TestMMHal:
    def test_questions_and_their_images(self, tmp_path):
        folder = write_mmhal(tmp_path)
        benchmark = MMHalBenchmark(folder / "response_template.json", Judge(Parrot()), folder / "images")
        questions = benchmark.questions()
        assert questions[1].image == folder / "images" / "1_o.jpg"
        assert questions[8].image == folder / "images" / "0008.png", "by its id where the link's name is not there"
        assert [question.target["type"] for question in questions][::8] == ["attribute", "attribute"]

    def test_scores_by_hand(self, tmp_path):
        """Ratings 6, then 1, then nonsense, then 4 six times: (6 + 1 + 0 + 24) / 9; below 3 are two of nine."""
        folder = write_mmhal(tmp_path)
        replies = {"number 0": "Rating: 6", "number 1": "Rating: 1", "number 2": "bananas", "": "Rating: 4"}
        judge = Judge(Parrot(replies), str(tmp_path / "cache"))
        benchmark = MMHalBenchmark(folder / "response_template.json", judge)
        scores = scores_of(benchmark, ["a dog"] * 9)
        assert scores["average_score"] == pytest.approx(31 / 9)
        assert scores["hallucination_rate"] == pytest.approx(2 / 9)
        assert scores["unparsed"] == pytest.approx(1 / 9)
        marks = benchmark.mark(benchmark.questions(), ["a dog"] * 9)
        assert [mark.correct for mark in marks][:4] == [True, False, None, True]

    def test_without_a_judge_it_says_what_to_give(self):
        with pytest.raises(ValueError, match="Expected `judge`"):
            MMHalBenchmark()
