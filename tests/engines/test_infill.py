from collections import Counter

import pytest
import torch

from realign_lightning.backbones import AutoBackbone
from realign_lightning.engines import LocalEngine, Policy
from realign_lightning.engines.infill import InfillRow, ListedInfill
from realign_lightning.preferences import Completer, LexiconMasker
from tests.conftest import picture

FILLERS = ["cat", "cats and dogs", "bus", "red bus", "laptop"]


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model()


def walk(row: InfillRow, choose) -> list[int]:
    ids: list[int] = []
    while choice := row.next(ids):
        assert not choice.is_open
        ids.append(choose(sorted(choice.tokens)))
    return ids


def test_infill_row_spells_exactly_the_possible_texts(backbone):
    """Every path through the allowed tokens is one of the 5 x 5 texts, and every text is reached."""
    end = backbone.end_token_ids[0]
    segments = ("a red ", " stands beside the ", ".")

    def spell(prefix: list[int], texts: set[str]) -> None:
        row = ListedInfill(segments, FILLERS, backbone.response_tokenizer("a"), end)
        choice = None
        for length in range(len(prefix) + 1):
            choice = row.next(prefix[:length])
        if choice is None:
            texts.add(backbone.decode(prefix))
        for token in choice.tokens if choice else ():
            spell([*prefix, token], texts)

    texts: set[str] = set()
    spell([], texts)
    assert texts == {f"a red {one} stands beside the {other}." for one in FILLERS for other in FILLERS}


def test_infill_tokens_are_those_of_the_plain_text(backbone):
    end = backbone.end_token_ids[0]
    row = ListedInfill(("a ", " and a ", ""), ["laptop"], backbone.response_tokenizer("a"), end)
    assert walk(row, choose=min) == [*backbone.response_tokenizer("a")(["a laptop and a laptop"])[0], end]


def test_drawn_fillers_follow_the_policy(backbone, model):
    """Draws of the first filler occur as often as the policy's own probabilities, renormalised over first tokens."""
    fillers = ["cat", "bus", "laptop"]
    engine = LocalEngine(batch_size=300, sample=True)
    engine.use(Policy(backbone, model))
    completer = Completer("infill", engine, instruction="{masked}", fillers=fillers)
    masked = LexiconMasker(["dog"]).mask("k", "dog runs")
    asked = [completer.question("describe the image.", masked, picture(0), seed) for seed in range(300)]
    drawn = Counter(answer.text.split()[0] for answer in engine.answer(asked))
    inputs = backbone.encode_prompts(["[MASK] runs"], [picture(0)])
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    first = {filler: backbone.response_tokenizer("[MASK] runs")([f"{filler} runs"])[0][0] for filler in fillers}
    groups = {token: sum(count for word, count in drawn.items() if first[word] == token) for token in first.values()}
    total = sum(float(probabilities[token]) for token in groups)
    for token, count in groups.items():
        expected = float(probabilities[token]) / total
        assert count / 300 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 300) ** 0.5 + 0.01)


def test_completions_that_were_cut_are_not_finished(backbone, model):
    """The forced text of the first takes more than 8 tokens, that of the second fewer."""
    engine = LocalEngine(max_new_tokens=8)
    engine.use(Policy(backbone, model))
    completer = Completer("infill", engine, instruction="{masked}", fillers=["cat"])
    responses = ["there is a dog under the table, seen from above.", "a dog."]
    masks = [LexiconMasker(["dog", "table"]).mask("k", response) for response in responses]
    answers = engine.answer([completer.question("a", masked, picture(0)) for masked in masks])
    assert [answer.finished for answer in answers] == [False, True]
    assert answers[1].text == "a cat."
