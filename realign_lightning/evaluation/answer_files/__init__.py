"""Answers in the files of other evaluation harnesses: read, brought to their questions, and written."""

from realign_lightning.evaluation.answer_files.forms import FORMS, ForeignAnswer, Form
from realign_lightning.evaluation.answer_files.matching import match
from realign_lightning.evaluation.answer_files.reading import read_answers
from realign_lightning.evaluation.answer_files.targets import questions_from
from realign_lightning.evaluation.answer_files.writing import WrittenForm, write_answers

__all__ = ["FORMS", "ForeignAnswer", "Form", "WrittenForm", "match", "questions_from", "read_answers", "write_answers"]
