"""Bringing answers to their questions."""

from pathlib import Path

import pytest
from PIL import Image

from realign_lightning.evaluation.answer_files import ForeignAnswer, match, questions_from
from realign_lightning.evaluation.base import Question

INSTRUCTION = "\nAnswer the question using a single word or phrase."


def asked(number: int, thing: str, image: str = "a.jpg", label: str = "yes") -> Question:
    text = f"Is there a {thing} in the image?{INSTRUCTION}"
    return Question(text, Path("images") / image, f"random/{number}", {"label": label, "categories": ["random"]}, image)


QUESTIONS = [asked(1, "cat"), asked(2, "dog"), asked(3, "cat", "b.jpg")]


def found(key: str, answer: str, thing: str = "", image: str = "", target: str | None = None) -> ForeignAnswer:
    return ForeignAnswer(key, answer, f"Is there a {thing} in the image?" if thing else "", image, target)


def test_by_key_in_any_order(caplog: pytest.LogCaptureFixture) -> None:
    answers = [found("random/3", "c"), found("random/1", "a")]
    assert match(QUESTIONS, answers) == ["a", None, "c"]
    assert "1 of 3 questions have no answer, such as 'random/2'" in caplog.text


def test_by_image_and_question_whatever_folder_and_instruction() -> None:
    answers = [found("0", "c", "cat", "/data/b.jpg"), found("1", "b", "Dog", "a.jpg"), found("2", "a", "cat", "a.jpg")]
    assert match(QUESTIONS, answers) == ["a", "b", "c"]


def test_one_answer_serves_a_question_that_is_asked_twice() -> None:
    """VLMEvalKit asks what is in two of POPE's kinds once."""
    twice = [*QUESTIONS, asked(1, "cat")._replace(key="popular/1")]
    answers = [found("0", "a", "cat", "a.jpg"), found("1", "b", "dog", "a.jpg"), found("2", "c", "cat", "b.jpg")]
    assert match(twice, answers) == ["a", "b", "c", "a"]


def test_by_order_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert match(QUESTIONS, [found("", "a", "cat"), found("", "b", "dog"), found("", "c", "cat")]) == ["a", "b", "c"]
    assert "matched to questions by their order" in caplog.text
    assert match(QUESTIONS, [found("x", "a"), found("y", "b"), found("z", "c")]) == ["a", "b", "c"]


def test_order_is_refused_where_a_text_a_label_or_the_count_speaks_against_it() -> None:
    texts = [found("", "a", "cat"), found("", "b", "kite"), found("", "c", "cat")]
    with pytest.raises(ValueError, match=r"by order: question 'random/2' is .*dog.*, and its answer is to .*kite"):
        match(QUESTIONS, texts)
    labels = [found("", "a", target="Yes"), found("", "b", target="No"), found("", "c", target="Yes")]
    with pytest.raises(ValueError, match=r"by order: the right answer to question 'random/2' is 'yes', .* 'no'"):
        match(QUESTIONS, labels)
    with pytest.raises(ValueError, match=r"by order: 2 answers to 3 questions"):
        match(QUESTIONS, [found("", "a"), found("", "b")])


def test_unknown_keys_are_refused_by_name() -> None:
    answers = [found("random/1", "a"), found("random/2", "b"), found("random/9", "c")]
    with pytest.raises(ValueError, match=r"by key: 1 of 3 are unknown, such as 'random/9'.*some keys are those of"):
        match(QUESTIONS, answers)


def test_keys_that_name_other_questions_are_not_trusted() -> None:
    """Numbers from 1 against numbers from 0, in one order: the texts tell."""
    questions = [question._replace(key=str(at), image=None) for at, question in enumerate(QUESTIONS)]
    things = ("cat", "dog", "cat")
    answers = [found(str(at + 1), answer, thing) for at, (answer, thing) in enumerate(zip("abc", things, strict=True))]
    assert match(questions, answers) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"by key: question '1' is .*dog"):
        match(questions, [found("2", "c", "cat"), found("1", "a", "cat")])


def test_equal_duplicates_count_once_and_others_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    answers = [found("random/1", "a"), found("random/1", "a"), found("random/2", "b"), found("random/3", "c")]
    assert match(QUESTIONS, answers) == ["a", "b", "c"]
    assert "1 answers repeat another one" in caplog.text
    with pytest.raises(ValueError, match=r"by key: several different answers have 'random/1'"):
        match(QUESTIONS, [found("random/1", "a"), found("random/1", "b")])


def test_numbers_that_start_again_for_every_kind() -> None:
    """POPE's question_id does: the key names three questions, so place and text must."""
    answers = [found("1", "a", "cat", "a.jpg"), found("2", "b", "dog", "a.jpg"), found("1", "c", "cat", "b.jpg")]
    assert match(QUESTIONS, answers) == ["a", "b", "c"]
    questions = questions_from([one.__class__(**{**one.__dict__, "target": "Yes"}) for one in answers], "pope")
    assert [question.key for question in questions] == ["0:1", "2", "2:1"]
    assert match(questions, answers) == ["a", "b", "c"]


def test_a_file_of_kinds_that_repeat_questions_is_matched_by_order() -> None:
    """LLaVA's answers to two kinds: numbers start again, and the same questions may have the same number."""
    questions = [*QUESTIONS, *(question._replace(key=f"popular/{at}") for at, question in enumerate(QUESTIONS, 1))]
    answers = [found(str(at), text, thing) for text in "ab" for at, thing in enumerate(("cat", "dog", "cat"), 1)]
    assert match(questions, answers) == ["a", "a", "a", "b", "b", "b"]


def test_an_answer_that_is_in_the_file_twice_is_one_question() -> None:
    answers = [found("1", "yes", "cat", target="Yes")] * 2 + [found("2", "no", "dog", target="No")]
    questions = questions_from(answers, "pope")
    assert [question.key for question in questions] == ["1", "2"]
    assert match(questions, answers) == ["yes", "no"]
    with pytest.raises(ValueError, match=r"different ones to 1, such as '1'"):
        questions_from([*answers, found("1", "no", "cat", target="Yes")], "pope")


@pytest.mark.parametrize("order", [1, -1])
def test_numbers_alone_name_the_questions_of_one_kind(order: int, caplog: pytest.LogCaptureFixture) -> None:
    """LLaVA's answers to POPE may have nothing but ``question_id`` and ``text``."""
    answers = [found(number, text) for number, text in zip("123", "abc", strict=True)][::order]
    assert match(QUESTIONS, answers) == ["a", "b", "c"]
    assert "matched to questions by their numbers" in caplog.text
    assert match(QUESTIONS, [found("3", "c")]) == [None, None, "c"]
    with pytest.raises(ValueError, match=r"by number within the only kind: 1 of 2 are unknown, such as '4'"):
        match(QUESTIONS, [found("3", "c"), found("4", "d")])


def test_numbers_in_another_order_than_the_questions_are_not_matched_by_order() -> None:
    """With two kinds a number names no question; the same numbers in the same order do."""
    questions = [*QUESTIONS, *(question._replace(key=f"popular/{at}") for at, question in enumerate(QUESTIONS, 1))]
    texts = "abcdef"

    def numbered(numbers: str) -> list[ForeignAnswer]:
        return [found(number, text) for number, text in zip(numbers, texts, strict=True)]

    for numbers in ("123123", "012012", "012345", "123456"):
        assert match(questions, numbered(numbers)) == list(texts)
    for numbers in ("321321", "112233", "210210", "543210", "132456"):
        with pytest.raises(ValueError, match=r"by order: the answers have the numbers of the questions, in another"):
            match(questions, numbered(numbers))


def test_numbers_from_0_against_numbers_from_1_are_not_matched_in_another_order() -> None:
    assert match(QUESTIONS, [found("0", "a"), found("1", "b"), found("2", "c")]) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"the numbers of the questions, in another order"):
        match(QUESTIONS, [found("2", "c"), found("1", "b"), found("0", "a")])


def test_answers_without_a_name_are_questions_of_their_own() -> None:
    """Nothing says that they are to one question, so none is dropped, and none clashes."""
    answers = [found("", "Yes", target="yes"), found("", "No", target="no"), found("", "Yes", target="yes")]
    questions = questions_from(answers, "pope")
    assert [(question.key, question.target["label"]) for question in questions] == [
        ("0", "yes"),
        ("1", "no"),
        ("2", "yes"),
    ]
    assert match(questions, answers) == ["Yes", "No", "Yes"]


def test_questions_about_one_image_are_one_group() -> None:
    answers = [found(key, "Yes", image=image, target="yes") for key, image in (("1", "a.jpg"), ("2", "b.jpg"))]
    assert [question.group for question in questions_from(answers, "pope")] == ["a.jpg", "b.jpg"]


def test_hallusionbench_by_its_ids() -> None:
    target = {
        "category": "VD",
        "subcategory": "ocr",
        "visual_input": "2",
        "set_id": "4",
        "figure_id": "1",
        "question_id": "0",
        "gt_answer": "1",
    }
    question = Question("Does it say so?", None, "VD/ocr/4/1/0", target)
    assert match([question], [ForeignAnswer("VD_ocr_2_4_1_0", "Yes", "Does it say so?", target=target)]) == ["Yes"]


def test_captions_by_the_number_of_their_image() -> None:
    questions = [
        Question("Describe it.", Path("COCO_val2014_000000000042.jpg"), "first"),
        Question("Describe it.", None, "second", {"image_id": 7, "objects": ["cat"]}),
    ]
    answers = [
        ForeignAnswer("000007", "A cat.", target={"image_id": "000007"}),
        ForeignAnswer("000042", "A dog.", target={"image_id": "000042"}),
    ]
    assert match(questions, answers) == ["A dog.", "A cat."]


def test_an_image_alone_names_no_question_where_it_has_several() -> None:
    answers = [found("", "a", image="1.jpg"), found("", "b", image="2.jpg")]
    questions = [asked(1, "cat", "1.jpg"), asked(2, "dog", "1.jpg"), asked(3, "cat", "2.jpg")]
    with pytest.raises(ValueError, match=r"by image: several questions share it"):
        match(questions, answers)


def test_chats_and_decoded_images() -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a cat in the image?"}]}]
    questions = [Question(chat, Image.new("RGB", (2, 2)), "1"), Question("Is there a dog in the image?", None, "2")]
    assert match(questions, [found("2", "b", "dog"), found("1", "a", "cat")]) == ["a", "b"]
