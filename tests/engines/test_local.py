"""Answers of a model on this machine: what is forced, what is drawn, and that the batch does not matter."""

import itertools
import random

import pytest
import torch

from realign_lightning.backbones import AutoBackbone
from realign_lightning.engines.base import Form, Question
from realign_lightning.engines.infill import Choice, FreeInfill, SeededDraw
from realign_lightning.engines.local import LocalEngine
from realign_lightning.engines.policy import Policy
from tests.backbones.test_families import backbone_of
from tests.conftest import picture
from tests.tiny_models import make_tiny

FORM = Form(("there is a red ", " beside the ", "."), (3, 2))


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "idefics3"])
def backbone(request, tmp_path_factory):
    return backbone_of(request.param, make_tiny(request.param, tmp_path_factory.mktemp("local") / request.param))


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model()


def engine_of(backbone, model, **settings) -> LocalEngine:
    engine = LocalEngine(**{"max_new_tokens": 60, **settings})
    engine.use(Policy(backbone, model))
    return engine


def questions(count: int = 5, form: Form | None = None) -> list[Question]:
    prompts = ["what is it?", "describe the image.", "how many are there, and where?"]
    return [Question(prompts[i % 3], picture(i), seed=i, form=form) for i in range(count)]


@pytest.mark.parametrize("sample", [False, True])
def test_forms_are_kept_to_the_letter(backbone, model, sample):
    answers = engine_of(backbone, model, sample=sample).answer(questions(4, FORM))
    for answer in answers:
        assert answer.finished
        assert answer.error is None
        assert answer.text.startswith("there is a red ")
        assert " beside the " in answer.text
        assert answer.text.endswith(".")
    if sample:
        assert len({answer.text for answer in answers}) > 1


def test_an_answer_does_not_depend_on_its_batch(backbone, model):
    engine = engine_of(backbone, model, sample=True, max_new_tokens=8)
    together = engine.answer(questions())
    alone = [engine.answer([question])[0] for question in questions()]
    backwards = engine.answer(questions()[::-1])[::-1]
    assert together == alone == backwards
    again = engine.answer([question._replace(seed=question.seed + 100) for question in questions()])
    assert [answer.text for answer in again] != [answer.text for answer in together]


def test_a_question_that_cannot_be_asked_does_not_stop_the_others(backbone, model):
    special = next(
        str(token) for token in backbone.tokenizer.all_special_tokens if token != backbone.tokenizer.mask_token
    )
    given = [*questions(2), Question(f"what is {special}?", picture(7)), Question(f"what is {special}?")]
    answers = engine_of(backbone, model, max_new_tokens=4).answer(given)
    assert [answer.error is None for answer in answers] == [True, True, False, False]
    assert all(special in answer.error for answer in answers[2:])
    assert all(answer.prompt_tokens > 0 and answer.new_tokens > 0 for answer in answers[:2])


def test_questions_without_an_image_are_answered_beside_others(backbone, model):
    engine = engine_of(backbone, model, max_new_tokens=4)
    blind = Question("what is it?")
    mixed = engine.answer([questions(1)[0], blind, questions(2)[1]])
    assert mixed == [*engine.answer(questions(1)), *engine.answer([blind]), *engine.answer(questions(2)[1:])]
    assert mixed[1].prompt_tokens < mixed[0].prompt_tokens


def test_an_answer_that_was_cut_is_not_finished(backbone, model):
    (answer,) = engine_of(backbone, model, max_new_tokens=3).answer([Question("a", picture(0), form=FORM)])
    assert not answer.finished
    assert answer.new_tokens == 3


def test_identity_is_the_model_not_its_place(tiny_llava, tmp_path):
    import shutil

    moved = shutil.copytree(tiny_llava, tmp_path / "moved")
    identities = [LocalEngine(AutoBackbone(str(path))).identity for path in (tiny_llava, moved)]
    assert identities[0] == identities[1]
    assert LocalEngine(AutoBackbone(str(tiny_llava)), batch_size=3).identity == identities[0]
    assert LocalEngine(AutoBackbone(str(tiny_llava)), sample=True).identity != identities[0]
    assert LocalEngine(AutoBackbone(str(tiny_llava), dtype="bfloat16")).identity != identities[0]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=rf"Expected `{next(iter(settings))}` to be above 0"):
        LocalEngine(**settings)


class TestFreeInfill:
    """Driven by a random model over the tokens 0 to 19; 0 ends, 1 is special. Words are their own tokens."""

    END, SPECIAL = 0, 1

    @staticmethod
    def tokenize(texts):
        return [[int(word) for word in text.split()] for text in texts]

    def walk(self, segments, longest, seed):
        generator = random.Random(seed)
        row = FreeInfill(segments, longest, self.tokenize, self.END, [self.END, self.SPECIAL])
        ids: list[int] = []
        while (choice := row.next(ids)) is not None:
            allowed = set(range(20)) - choice.tokens if choice.is_open else set(choice.tokens)
            assert allowed, "there is always a way to go on"
            ids.append(generator.choice(sorted(allowed)))
            assert len(ids) < 100
        return ids, row.blanks

    @pytest.mark.parametrize("seed", range(30))
    @pytest.mark.parametrize("segments", [("5 6 ", " 7 8 ", " 9"), ("", " 7 ", ""), ("5 ", " 6 ", " 6 ", "")])
    def test_fixed_words_stay_and_blanks_are_filled(self, segments, seed):
        longest = [1 + (seed + place) % 4 for place in range(len(segments) - 1)]
        ids, blanks = self.walk(segments, longest, seed)
        assert len(blanks) == len(segments) - 1
        assert all(1 <= len(blank) <= most for blank, most in zip(blanks, longest, strict=True))
        assert not {self.END, self.SPECIAL} & set(itertools.chain(*blanks))
        fixed = self.tokenize(segments)
        expected = fixed[0] + [
            token for blank, words in zip(blanks, fixed[1:], strict=True) for token in [*blank, *words]
        ]
        assert ids == [*expected, self.END]

    def test_blanks_that_touch_are_refused(self):
        with pytest.raises(ValueError, match="join blanks that touch"):
            FreeInfill(("5 ", " ", " 6"), [2, 2], self.tokenize, self.END, [])

    def test_a_model_that_goes_on_with_the_fixed_words_ends_a_blank(self):
        row = FreeInfill(("5 ", " 7 8"), [4], self.tokenize, self.END, [self.END])
        assert row.next([]) == Choice(frozenset([5]))
        assert row.next([5]) == Choice(frozenset([self.END, 7]), is_open=True), "no blank stays empty"
        assert row.next([5, 9]) == Choice(frozenset([self.END]), is_open=True)
        assert row.next([5, 9, 7]) == Choice(frozenset([8]))
        assert row.next([5, 9, 7, 8]) == Choice(frozenset([self.END]))
        assert row.next([5, 9, 7, 8, self.END]) is None


def test_noise_draws_from_the_distribution():
    """Shares of 4000 draws of a distribution of four, within four standard deviations of a binomial."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]]).repeat(4000, 1)
    drawn = SeededDraw(range(4000), 0.5, torch.device("cpu"))(torch.zeros(4000, 1), logits).argmax(dim=1)
    expected = (logits[0] / 0.5).softmax(dim=0)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()
