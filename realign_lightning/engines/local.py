"""Answers of a Hugging Face model on this machine, through its backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from realign_lightning.backbones.base import Backbone, GeneratedRow
from realign_lightning.engines.base import Answer, Engine, Form, Question, check_positive
from realign_lightning.engines.infill import ForcedInfill, FreeInfill, InfillRow, ListedInfill, SeededDraw
from realign_lightning.engines.policy import Policy, best_device
from realign_lightning.types import SampleError


class LocalEngine(Engine):
    """Generates with a Hugging Face vision-language model, several answers at a time.

    What is drawn for a question depends on its seed, not on what else is in the batch. Questions of a batch that show
    the same image object share its encoding.

    Args:
        backbone: the model; None is the policy that :meth:`use` gives, for example the one that pairs are built for.
        batch_size: questions per call of the model's ``generate``.
        max_new_tokens: longest answer.
        sample: draw from the model's distribution instead of taking its best guess.
        temperature: of the drawing.
        device: where a model of its own goes; None is a GPU where there is one.

    Raises:
        ValueError: for a size or temperature that is not positive.
    """

    can_force = True

    def __init__(
        self,
        backbone: Backbone | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        sample: bool = False,
        temperature: float = 1.0,
        device: str | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens, temperature=temperature)
        self.backbone = backbone
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.sample = sample
        self.temperature = temperature
        self._policy = None if backbone is None else Policy(backbone, device=best_device(device))

    def use(self, policy: Policy) -> None:
        """Take the policy, unless this engine has a model of its own.

        Args:
            policy: shared with other stages.
        """
        if self.backbone is None:
            self._policy = policy

    @property
    def model(self) -> nn.Module:
        """The model, loaded when first asked for."""
        return self._given.model

    @property
    def _given(self) -> Policy:
        if self._policy is None:
            raise ValueError("LocalEngine has no model: give `backbone`, or call `use(policy)`.")
        return self._policy

    @property
    def _family(self) -> Backbone:
        return self._given.backbone

    @property
    def draws(self) -> bool:
        """Whether answers depend on the seed."""
        return self.sample

    @property
    def identity(self) -> Mapping[str, Any]:
        """The checkpoint (by content), its processor and template, and how answers are drawn."""
        drawn = {"temperature": self.temperature} if self.sample else {}
        return {
            "engine": "local",
            **self._given.identity,
            "sample": self.sample,
            **drawn,
            "longest": self.max_new_tokens,
        }

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions, those with an image in one batch; those that cannot be asked get an error each."""
        errors = [self._error(question) for question in questions]
        answers = [Answer("", False, error) for error in errors]
        for shows_image in (True, False):
            rows = [
                row
                for row, question in enumerate(questions)
                if errors[row] is None and (question.image is not None) is shows_image
            ]
            if rows:
                self._given.announce()
                found = self._answer([questions[row] for row in rows])
                for row, answer in zip(rows, found, strict=True):
                    answers[row] = answer
        return answers

    def finish(self) -> None:
        """Answer along with ranks that have questions left, where they hold shards of one model."""
        if self._policy is not None:
            # One token: where the others write more, the model goes on by itself.
            idle = [Question("?", Image.new("RGB", (64, 64)))]
            self._policy.keep_up(lambda: self._answer(idle, longest=1))

    def _error(self, question: Question) -> str | None:
        try:
            if question.image is None:
                self._family.encode_prompts([question.prompt], [[]])
            tokenize = self._family.response_tokenizer(question.prompt)
            tokenize(question.form.segments if question.form is not None else ["."])
        except SampleError as error:
            return str(error)
        return None

    def _answer(self, questions: Sequence[Question], longest: int | None = None) -> list[Answer]:
        images = [[] if question.image is None else [question.image] for question in questions]
        inputs = self._family.encode_prompts([question.prompt for question in questions], images)
        forms = [self._row(question) for question in questions]
        length = inputs["input_ids"].shape[1]
        processors: list[LogitsProcessor] = []
        if any(form is not None for form in forms):
            processors.append(ForcedInfill(forms, length, self._family.pad_token_id))
        if self.sample:
            device = next(self.model.parameters()).device
            processors.append(SeededDraw([question.seed for question in questions], self.temperature, device))
        # Ranks that hold shards of one model go on until the last of them has its answer.
        together = {"synced_gpus": True} if self._given.is_sharded else {}
        rows = self._family.generate_tokens(
            self.model,
            inputs,
            **together,
            max_new_tokens=longest or self.max_new_tokens,
            logits_processor=LogitsProcessorList(processors),
        )
        read = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            Answer(self._text(question, form, row), row.finished, None, tokens, len(row.tokens))
            for question, form, row, tokens in zip(questions, forms, rows, read, strict=True)
        ]

    def _row(self, question: Question) -> InfillRow | None:
        form = question.form
        if form is None:
            return None
        tokenize, end = self._family.response_tokenizer(question.prompt), self._family.end_token_ids[0]
        if form.fillers:
            return ListedInfill(form.segments, form.fillers, tokenize, end)
        return FreeInfill(form.segments, form.longest, tokenize, end, self._family.special_token_ids)

    def _text(self, question: Question, form: InfillRow | None, row: GeneratedRow) -> str:
        if not isinstance(form, FreeInfill) or not row.finished:
            return self._family.decode(row.tokens)
        assert isinstance(question.form, Form)  # noqa: S101 - the row was made of it
        # Spliced into the original text, so that what was fixed is verbatim whatever the tokenizer makes of it.
        return question.form.fill([self._family.decode(blank) for blank in form.blanks])
