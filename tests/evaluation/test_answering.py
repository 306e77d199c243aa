from pathlib import Path

import pytest

from realign_lightning.backbones import AutoBackbone
from realign_lightning.engines import EngineError, LocalEngine, Policy
from realign_lightning.evaluation import Question, answer_questions
from tests.conftest import picture
from tests.evaluation.official import Parrot, write_images


@pytest.fixture
def questions(tmp_path):
    """Six questions about two files and a picture in memory, mixed."""
    folder = write_images(tmp_path / "images", ["a.png", "b.png"])
    shown = picture(9)
    places = [folder / "a.png", folder / "b.png", shown, folder / "a.png", shown, folder / "a.png"]
    return [Question(f"what is {number}?", place, str(number)) for number, place in enumerate(places)]


def test_answers_come_in_the_order_of_the_questions(questions, tmp_path):
    engine = Parrot({f"is {number}": f"answer {number}" for number in range(6)})
    replies = answer_questions(questions, engine, tmp_path / "work", show_progress=False)
    assert [reply.text for reply in replies] == [f"answer {number}" for number in range(6)]


def test_questions_about_one_image_share_a_batch_and_its_picture(questions, tmp_path):
    engine = Parrot(batch_size=4)
    answer_questions(questions, engine, tmp_path / "work", show_progress=False)
    assert [[question.prompt[8] for question in batch] for batch in engine.batches] == [list("0351"), list("24")]
    first, second = engine.batches
    assert first[0].image is first[1].image is first[2].image is not first[3].image
    assert second[0].image is second[1].image


def test_what_was_answered_is_not_asked_again(questions, tmp_path):
    first = Parrot({"is 4": "ERROR"})
    replies = answer_questions(questions, first, tmp_path / "work", show_progress=False)
    assert replies[4] == (None, False, "the parrot sleeps")
    second = Parrot({"is 4": "ERROR"})
    answer_questions(questions, second, tmp_path / "work", show_progress=False)
    assert [question.prompt for batch in second.batches for question in batch] == ["what is 4?"]
    other = Parrot({"is 4": "awake"})
    answer_questions(questions, other, tmp_path / "work", show_progress=False)
    assert other.asked == 6, "another model answers itself"


def test_another_prompt_or_picture_is_asked_anew(questions, tmp_path):
    answer_questions(questions, Parrot(), tmp_path / "work", show_progress=False)
    picture(77).save(questions[1].image)
    changed = [questions[0]._replace(prompt="what is this?"), *questions[1:]]
    engine = Parrot()
    answer_questions(changed, engine, tmp_path / "work", show_progress=False)
    assert [question.prompt for batch in engine.batches for question in batch] == ["what is this?", "what is 1?"]
    taller = picture(9, (32, 40))
    taller.putdata(list(picture(9).getdata()))
    other = Parrot()
    changed = [question._replace(image=taller) if question.key in "24" else question for question in changed]
    answer_questions(changed, other, tmp_path / "work", show_progress=False)
    assert other.asked == 2, "the same pixels in another shape are another picture"


def test_an_unreadable_image_leaves_its_questions_unanswered(questions, tmp_path):
    questions[1].image.write_bytes(b"no image")
    replies = answer_questions(questions, Parrot(), tmp_path / "work", show_progress=False)
    assert [reply.text is None for reply in replies] == [False, True, False, False, False, False]
    assert "not a readable" in replies[1].error


def test_missing_images_and_repeated_keys_are_refused_before_anything_is_asked(questions, tmp_path):
    engine = Parrot()
    Path(questions[0].image).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, the first is .*a\.png"):
        answer_questions(questions, engine, tmp_path / "work")
    with pytest.raises(ValueError, match="two questions are called '5'"):
        answer_questions([questions[5], questions[5]], engine, tmp_path / "work")
    assert engine.asked == 0


def test_an_engine_that_answers_nothing_is_given_up(tmp_path):
    questions = [Question(f"what is {number}?", None, str(number)) for number in range(60)]
    with pytest.raises(EngineError, match="The last 52 questions to Parrot have failed"):
        answer_questions(questions, Parrot({"what": "ERROR"}), tmp_path / "work", show_progress=False)


def test_the_vision_tower_sees_every_image_once(questions, tmp_path, tiny_llava, monkeypatch):
    """Three images, six questions, and as many answers as alone."""
    backbone = AutoBackbone(str(tiny_llava))
    policy = Policy(backbone)
    seen = []
    vision = backbone._vision

    def counted(model, images):
        seen.append(len(images["pixel_values"]))
        return vision(model, images)

    monkeypatch.setattr(backbone, "_vision", counted)
    engine = LocalEngine(batch_size=6, max_new_tokens=4)
    engine.use(policy)
    together = answer_questions(questions, engine, tmp_path / "together", show_progress=False)
    assert seen == [3]
    engine.batch_size = 1
    alone = answer_questions(questions, engine, tmp_path / "alone", show_progress=False)
    assert together == alone
