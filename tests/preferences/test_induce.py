import re
from collections import Counter

import pytest
import torch

from realign_lightning.backbones import AutoBackbone
from realign_lightning.preferences import Inducer, InductionRequest, LexiconMasker
from realign_lightning.preferences.infill import InfillRow, ListedInfill
from tests.conftest import picture

FILLERS = ["cat", "cats and dogs", "bus", "red bus", "laptop"]


@pytest.fixture(scope="module")
def backbone(tiny_llava):
    return AutoBackbone(str(tiny_llava))


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model()


def request(response: str, seed: int = 0) -> InductionRequest:
    masked = LexiconMasker(["dog", "table"], otherwise="whole").mask("k", response)
    return InductionRequest("describe the image.", masked, picture(seed))


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


@pytest.mark.parametrize("sample", [False, True])
def test_infill_changes_masked_places_only(backbone, model, sample):
    inducer = Inducer("infill", instruction="{masked}", fillers=FILLERS, sample=sample, batch_size=4, max_new_tokens=80)
    responses = ["a dog.", "there is a dog under the table, seen from above.", "dog", "the dog and the dog"]
    torch.manual_seed(0)
    completions = inducer.complete(backbone, model, [request(text, seed) for seed, text in enumerate(responses)])
    filler = "|".join(FILLERS)
    for response, completion in zip(responses, completions, strict=True):
        if response == "dog":
            continue  # masked as a whole: asked anew, nothing is forced
        assert re.fullmatch(re.sub("dog|table", f"({filler})", re.escape(response)), completion), completion


def test_completions_that_were_cut_are_dropped(backbone, model):
    """The forced text of the first takes more than 8 tokens, that of the second fewer; freeform stops in the middle."""
    requests = [request("there is a dog under the table, seen from above."), request("a dog.")]
    infill = Inducer("infill", instruction="{masked}", fillers=["cat"], max_new_tokens=8)
    cut, whole = infill.complete(backbone, model, requests)
    assert cut == ""
    assert whole == "a cat."
    assert backbone.generate(model, backbone.encode_prompts(["a"], [picture(0)]), max_new_tokens=2) != [""]
    assert Inducer("freeform", max_new_tokens=2).complete(backbone, model, requests) == ["", ""]


def test_infill_sampling_follows_the_policy(backbone, model):
    """Draws of the first filler occur as often as the policy's own probabilities, renormalised over first tokens."""
    one = request("dog runs")
    fillers = ["cat", "bus", "laptop"]
    inducer = Inducer("infill", instruction="{masked}", fillers=fillers, sample=True, batch_size=300)
    torch.manual_seed(0)
    drawn = Counter(text.split()[0] for text in inducer.complete(backbone, model, [one] * 300))
    inputs = backbone.encode_prompts(["[MASK] runs"], [picture(0)])
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    first = {filler: backbone.response_tokenizer("[MASK] runs")([f"{filler} runs"])[0][0] for filler in fillers}
    groups = {token: sum(count for word, count in drawn.items() if first[word] == token) for token in first.values()}
    total = sum(float(probabilities[token]) for token in groups)
    for token, count in groups.items():
        expected = float(probabilities[token]) / total
        assert count / 300 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 300) ** 0.5 + 0.01)


def test_freeform_asks_with_the_masked_text_and_whole_masks_ask_the_prompt(backbone, model):
    asked = []

    class Listening(Inducer):
        def _complete_batch(self, backbone, model, requests):
            asked.extend(self._ask(one) for one in requests)
            return super()._complete_batch(backbone, model, requests)

    inducer = Listening("freeform", instruction="complete {masked} for {prompt}", max_new_tokens=3)
    completions = inducer.complete(backbone, model, [request("a dog {here}."), request("yes.")])
    assert sorted(asked) == ["complete a [MASK] {here}. for describe the image.", "describe the image."]
    assert len(completions) == 2


def test_completions_keep_the_order_of_requests_whatever_the_batch(backbone, model):
    requests = [
        request("a dog and a long table with more.", 1),
        request("a dog.", 2),
        request("the table of a dog.", 3),
    ]
    settings = {"mode": "infill", "instruction": "{masked}", "fillers": FILLERS}
    one_by_one = Inducer(**settings, batch_size=1).complete(backbone, model, requests)
    together = Inducer(**settings, batch_size=3).complete(backbone, model, requests)
    assert one_by_one == together
    assert [text.startswith("the ") for text in together] == [False, False, True]


def test_impossible_settings_are_refused(backbone, model):
    with pytest.raises(ValueError, match="fillers"):
        Inducer("infill")
    with pytest.raises(ValueError, match="masked"):
        Inducer(instruction="complete this")
    chat = InductionRequest([{"role": "user", "content": "a"}], request("a dog").masked, picture(0))
    with pytest.raises(ValueError, match="plain-text"):
        Inducer().complete(backbone, model, [chat])
