"""Nouns as the reference finds them; collected only where NLTK's data and the uncommitted oracles are (conftest.py)."""

from realign_lightning.metrics.functional.amber import (
    AmberChecker,
    amber_generative,
    exact_similarity,
    nltk_nouns,
)
from tests.metrics.test_uncommitted_amber import ORACLE, RESPONSES, ROWS, WORDS, assert_printed


def test_nouns_of_every_description_are_those_of_the_reference() -> None:
    for row in ROWS:
        assert nltk_nouns(row["response"]) == row["nouns"], row["response"]


def test_texts_alone_score_as_the_reference_prints() -> None:
    checker = AmberChecker(WORDS["relation"], WORDS["safe_words"], similarity=exact_similarity)
    scores = amber_generative(RESPONSES, ROWS, checker)
    assert_printed(scores, ORACLE["generative"]["expected"]["exact"]["printed"])
