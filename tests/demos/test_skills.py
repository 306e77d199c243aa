import numpy as np
import pytest

from realign_lightning.demos import DigitSkills
from realign_lightning.demos.policy import build_policy, build_processor
from realign_lightning.demos.scenes import CELLS, DIGITS, INKS, VOCABULARY, DigitWorld, PlacedDigit, Scene
from realign_lightning.demos.skills import SKILL_VOCABULARY, ask, large_scene
from realign_lightning.demos.teach import teach

WORLD = DigitWorld("validation", 0.0, 5)


def two_digits() -> Scene:
    scene = WORLD.scene(0)
    return Scene(scene.image, (PlacedDigit("top right", "two", "red"), PlacedDigit("bottom left", "six", "blue")))


@pytest.mark.parametrize(
    ("skill", "expected"),
    [
        ("count", {("how many digits are there ?", "two .")}),
        ("place", {("where are the digits ?", "top right , bottom left .")}),
        ("read", {("what digit is the image ?", "two .")}),
        ("colour", {("what colour is at top right ?", "red ."), ("what colour is at bottom left ?", "blue .")}),
    ],
)
def test_questions_and_right_answers(skill, expected):
    generator = np.random.default_rng(0)
    assert {ask(skill, two_digits(), generator) for _ in range(30)} == expected


def test_a_large_digit_fills_the_picture():
    quiet = DigitWorld("test", 0.0, 3, noise=0.0)
    pictures = [large_scene(quiet, index) for index in range(200)]
    assert {scene.digits[0].digit for scene in pictures} == set(DIGITS)
    assert {scene.digits[0].colour for scene in pictures} == set(INKS)
    for scene in pictures:
        assert scene.image.size == (32, 32)
        ink = np.asarray(scene.image).astype(int).max(axis=2)
        halves = [ink[:16], ink[16:], ink[:, :16], ink[:, 16:]]
        assert all(half.max() > ink.min() + 10 for half in halves), scene.digits


def test_a_large_digit_depends_on_world_and_number_alone():
    one, again, other = large_scene(WORLD, 7), large_scene(WORLD, 7), large_scene(DigitWorld("validation", 0.0, 6), 7)
    assert one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()
    assert one.image.tobytes() != large_scene(DigitWorld("test", 0.0, 5), 7).image.tobytes()


def test_the_skills_vocabulary_holds_exactly_the_words_in_use():
    generator = np.random.default_rng(0)
    used = {
        word
        for scene in WORLD.scenes(50)
        for skill in ("colour", "count", "place", "read")
        for text in ask(skill, scene, generator)
        for word in text.split()
    }
    assert used | set(VOCABULARY) == set(SKILL_VOCABULARY)
    assert len(set(SKILL_VOCABULARY)) == len(SKILL_VOCABULARY)
    assert SKILL_VOCABULARY[: len(VOCABULARY)] == VOCABULARY, "ids of scenes' words are those of other policies"


def test_scores_are_shares_of_exactly_right_answers():
    benchmark = DigitSkills(scenes=10, seed=4)
    right = [answer for *_, answer in benchmark.asked]
    assert len(benchmark.questions()) == 40
    names = ["skill colour", "skill count", "skill place", "skill read", "skills"]
    assert benchmark.score(right) == dict.fromkeys(names, 100.0)
    wrong = ["red , .", *right[1:13], "", *right[14:]]
    assert benchmark.score(wrong) == pytest.approx(dict(zip(names, [90, 90, 100, 100, 95], strict=True)))


def test_skills_ask_about_every_cell():
    asked = {prompt for skill, _, prompt, _ in DigitSkills(scenes=100).asked if skill == "colour"}
    assert asked == {f"what colour is at {cell} ?" for cell in CELLS}


def test_less_than_one_scene_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DigitSkills(scenes=0)


def test_the_tokenizer_of_skills_writes_their_texts():
    processor, model = build_processor(SKILL_VOCABULARY), build_policy(0, SKILL_VOCABULARY)
    for text in ("how many digits are there ?", "what colour is at top left ?", "where are the digits ?"):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.tokenizer.decode(ids) == text
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)


def test_teaching_skills_reports_them(tmp_path):
    settings = {"vision_steps": 3, "steps": 3, "vision_batch_size": 16, "batch_size": 8, "validation_scenes": 4}
    report = teach(tmp_path / "taught", seed=4, skill_share=0.5, **settings)
    assert {"skill count", "skill read", "skills"} <= report.keys()
    assert all(0 <= value <= 1 for name, value in report.items() if "skill" in name)
    with pytest.raises(ValueError, match="skill_share must be at least 0 and below 1, but is 1"):
        teach(tmp_path / "new", skill_share=1, **settings)
    assert not (tmp_path / "new").exists()
