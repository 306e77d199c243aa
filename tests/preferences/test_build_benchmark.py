"""The build benchmark on few scenes and a tiny model: what it counts is there, and its checks are right."""

import contextlib
import io
import json
import statistics
from collections import Counter
from itertools import pairwise

import pytest
import torch
from PIL import Image

from benchmarks import build
from benchmarks.build import (
    ALL,
    ANSWERS,
    CHANGES,
    STAGES,
    Pair,
    Tried,
    by_stage,
    checked,
    contradictions_table,
    judged,
    main,
    swapped,
    time_batches,
    truths,
)
from realign_lightning.demos.scenes import DESCRIBE, DigitWorld, PlacedDigit, Scene, absent, answer, caption, question
from realign_lightning.engines import Answer, Engine, Question
from realign_lightning.preferences import WordOverlap
from realign_lightning.preferences.mask import MaskedResponse, Span
from realign_lightning.preferences.retrieval.search import faiss
from tests.preferences.annotated import read_annotated

SCENE = Scene(
    Image.new("RGB", (32, 32)), (PlacedDigit("top left", "four", "blue"), PlacedDigit("top right", "nine", "red"))
)
ANNOTATED = [one for name in ANSWERS for one in read_annotated(name)]


def run(*arguments: str, status: int = 0) -> str:
    """What the command prints; it leaves threads as they were."""
    threads = torch.get_num_threads(), faiss().omp_get_max_threads()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            assert main(["--threads", "1", *arguments]) == status
    finally:
        torch.set_num_threads(threads[0])
        faiss().omp_set_num_threads(threads[1])
    return output.getvalue()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny sentence encoder that knows the words of the annotated answers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word.strip(".,;:'") for text, _ in ANNOTATED for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(word for word in words if word)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=160, **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)])
    model.save(str(folder / "whole"))
    return folder / "whole"


@pytest.fixture(scope="module")
def printed_and_found(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("build")
    modes = ["--stages", "--batching", "--gates", "--contradictions", "--scenes", "10", "--turns", "2"]
    sizes = ["--batch-sizes", "4", "--questions", "6", "--larger-questions", "30", "--shape", "tiny"]
    files = ["--json", str(folder / "found.json"), "--plot", str(folder / "gates.png")]
    printed = run(*modes, *sizes, *files, "--similarity-model", str(encoder))
    return printed, json.loads((folder / "found.json").read_text()), folder / "gates.png"


@pytest.fixture
def found(printed_and_found):
    return printed_and_found[1]


# ---- time by stage


def test_writing_is_what_the_stages_leave_of_the_whole_time():
    seconds = {"read": 1.0, "check": 2.0, "answer": 0.25, "mask": 3.0, "embed": 4.0, "retrieve": 5.0, "complete": 6.0}
    expected = {"read": 1, "check": 2, "mask": 3, "embed": 4, "retrieve": 5, "complete": 6, "write": 9}
    assert by_stage(seconds, 30.0) == expected


def test_stages(found):
    stages = found["stages"]
    assert stages["records"] == 2 * 10
    assert 0 < stages["pairs"] <= 20
    assert stages["pairs"] == found["contradictions"]["kinds"]["all"]["pairs"]
    assert stages["acceptance"] == stages["pairs"] / stages["tried"]
    assert len(stages["turns"]) == 2
    for turn in stages["turns"]:
        # A turn that found the work of the one before it would ask nothing.
        assert turn["counts"]["complete"] > stages["pairs"] / 2
        assert sum(turn["seconds"].values()) == pytest.approx(turn["total"])
        assert all(seconds > 0 for seconds in turn["seconds"].values())
    for name in STAGES:
        median = statistics.median(turn["seconds"][name] for turn in stages["turns"])
        assert stages["milliseconds_per_pair"][name] == pytest.approx(1000 * median / stages["pairs"])


# ---- batches


def test_batching(found):
    digits, larger = found["batching"]
    assert (digits["questions"], larger["questions"]) == (6, 30)
    # The tiny shape's answers; no drawn end of a response may end one.
    assert larger["new_tokens"] == 30 * 12
    for work in (digits, larger):
        assert [size["batch_size"] for size in work["sizes"]] == [1, 4]
        assert [size["differ"] for size in work["sizes"]] == [0, 0]
        assert all(size["rate"] > 0 and len(size["seconds"]) == 2 for size in work["sizes"])


class Clockwork(Engine):
    """Takes a second for every call, whatever the batch, and answers as it is told."""

    identity = {}  # noqa: RUF012

    def __init__(self, clock: list[float], answers: dict[str, str]) -> None:
        self.clock, self.answers, self.batches = clock, answers, []

    def answer(self, questions):
        self.clock[0] += 1
        self.batches.append(len(questions))
        return [Answer(self.answers[question.prompt], new_tokens=2) for question in questions]


def test_rates_and_differences_of_batches(monkeypatch):
    clock = [0.0]
    questions = [Question(name) for name in "abcdef"]
    engines = {
        4: Clockwork(clock, dict(zip("abcdef", "ABCxyF", strict=True))),
        1: Clockwork(clock, dict(zip("abcdef", "ABCDEF", strict=True))),
    }
    with monkeypatch.context() as patched:
        patched.setattr(build.time, "perf_counter", lambda: clock[0])
        found = time_batches(questions, engines, turns=3)
    assert engines[1].batches == [1, *[1] * 6 * 3]
    assert engines[4].batches == [4, *[4, 2] * 3]
    one, four = found["sizes"]
    assert one == {"batch_size": 1, "seconds": [6.0] * 3, "rate": 1.0, "ratio": 1.0, "differ": 0}
    assert four == {"batch_size": 4, "seconds": [2.0] * 3, "rate": 3.0, "ratio": 3.0, "differ": 2}
    assert found["new_tokens"] == 12
    work = {"workload": "letters", "parameters": 0, **found}
    monkeypatch.setattr(build, "measure_batching", lambda *_: [work])
    printed = run("--batching", status=1)
    assert "At best 3.00 times the one-by-one rate; 3 wanted: met." in printed


# ---- gates


def masked(text: str, *words: str) -> MaskedResponse:
    spans = [Span(text.index(word), text.index(word) + len(word), word) for word in words]
    return MaskedResponse(text, tuple(spans))


SENTENCE = "a red bus stands in the rain beside the house."
OTHER = "two men and one dog walk through the green park."


def test_acceptance_of_hand_made_tries():
    twenty = masked(f"{SENTENCE} {OTHER}", "red", "dog")
    ten = masked(SENTENCE, "red", "rain")
    tries = [
        # 19 words of 21, 9 words of 11 in its sentence, no words of 2 in its span.
        Tried("20", "one", twenty, twenty.response.replace("red", "blue")),
        # 18 words of 22; 9 of 11 in either sentence.
        Tried("20", "two", twenty, twenty.response.replace("red", "blue").replace("dog", "cat")),
        # 9 words of 11, and once nothing at all.
        Tried("10", "one", ten, SENTENCE.replace("rain", "snow")),
        Tried("10", "same", ten, "A red bus stands in the rain beside the house"),
        Tried("refused", "refusal", ten, "I am sorry, nothing can be seen."),
    ]
    found = judged(tries, WordOverlap())
    rows = {row["change"]: row for row in found["changes"]}
    assert [row["tries"] for row in found["changes"]] == [2, 1, 1, 1, 5]
    assert rows["one"]["median"] == pytest.approx({"response": (19 / 21 + 9 / 11) / 2, "sentence": 9 / 11, "span": 0})
    assert rows["two"]["median"] == pytest.approx({"response": 18 / 22, "sentence": 9 / 11, "span": 0})
    everywhere, nowhere = (dict.fromkeys(("0.85", "0.90", "0.95"), share) for share in (1.0, 0.0))
    assert rows["one"]["accepted"] == {
        "response": {"0.85": 0.5, "0.90": 0.5, "0.95": 1.0},
        "sentence": everywhere,
        "span": everywhere,
    }
    assert rows["two"]["accepted"] == dict.fromkeys(("response", "sentence", "span"), everywhere)
    for change in ("same", "refusal"):
        assert rows[change]["accepted"] == dict.fromkeys(("response", "sentence", "span"), nowhere)
    assert rows[ALL]["accepted"]["response"] == {"0.85": 2 / 5, "0.90": 2 / 5, "0.95": 3 / 5}
    assert found["records"] == 3
    assert found["paired"]["response"] == {"0.85": 2, "0.90": 2, "0.95": 2}


def test_swaps_are_of_one_span_or_of_all():
    tries = swapped(ANNOTATED)
    counts = Counter(f"one {span.kind}" for _, spans in ANNOTATED for span in spans)
    assert Counter(one.change for one in tries) == {**counts, CHANGES[-1]: 40}
    words = {(span.kind, span.text.lower()) for _, spans in ANNOTATED for span in spans}
    for one in tries:
        text, spans = one.masked.response, one.masked.spans
        assert one.completion != text
        if one.change == CHANGES[-1]:
            assert all(segment in one.completion for segment in one.masked.segments)
            continue
        around = [
            span
            for span in spans
            if one.completion.startswith(text[: span.start]) and one.completion.endswith(text[span.end :])
        ]
        (span,) = [span for span in around if f"one {span.kind}" == one.change]
        new = one.completion[span.start : len(one.completion) - len(text) + span.end]
        assert new.lower() != span.text.lower()
        assert (span.kind, new.lower()) in words


def test_gates(printed_and_found, encoder):
    printed, found, plot = printed_and_found
    gates = found["gates"]
    assert gates["digits"]["records"] == 2 * 10
    assert gates["digits"]["changes"][-1]["tries"] > 20 * 5
    # The digits' own gate leaves the pairs that a build makes.
    assert gates["digits"]["paired"]["response"]["0.95"] == found["stages"]["pairs"]
    parts = {(part["similarity"], part["length"]): part for part in gates["answers"]}
    assert [part["records"] for part in gates["answers"]] == [14, 26, 14, 26]
    for part in gates["answers"]:
        assert [row["change"] for row in part["changes"]] == [*CHANGES, ALL]
    long = parts["word overlap", "long"]["changes"][0]
    # One word of at least 37, most often: 36 of 38 or more.
    assert long["median"]["response"] > 36 / 38
    assert long["accepted"]["response"]["0.90"] < 0.1
    assert long["accepted"]["span"]["0.85"] == 1
    # The encoder's similarities are those of the encoder.
    from sentence_transformers import SentenceTransformer

    tries = [one for one in swapped(ANNOTATED) if one.change == "one object" and len(one.masked.response.split()) >= 30]
    model = SentenceTransformer(str(encoder))
    ours, theirs = (
        torch.tensor(model.encode(texts))
        for texts in ([one.masked.response for one in tries], [one.completion for one in tries])
    )
    cosines = torch.cosine_similarity(ours, theirs).tolist()
    row = parts["sentence similarity", "long"]["changes"][0]
    assert row["median"]["response"] == pytest.approx(statistics.median(cosines), abs=1e-5)
    assert "14 long answers, sentence similarity:" in printed
    assert Image.open(plot).size == (round(11.5 * 130), round((4 * 2.7 + 0.3) * 130))


# ---- what is true


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (DESCRIBE, "a blue four at top left , a red nine at top right .", [True, True]),
        (DESCRIBE, "a red nine at top right .", [True]),
        (DESCRIBE, "a blue four at top left , a red seven at top right .", [True, False]),
        (DESCRIBE, "a green four at top left .", [False]),
        (DESCRIBE, "a blue four at bottom left .", [False]),
        (DESCRIBE, "a blue nine at top left , a red four at top right .", [False, False]),
        (DESCRIBE, "a blue four at top left", None),
        (DESCRIBE, "a blue seven at top left , .", None),
        (DESCRIBE, "a blue seven at top left a red nine at top right .", None),
        (DESCRIBE, "a purple seven at top left .", None),
        (DESCRIBE, "a blue seven at the middle .", None),
        (DESCRIBE, "yes at top left .", None),
        (DESCRIBE, "no .", None),
        (DESCRIBE, "", None),
        (question("four"), "yes at top left .", [True]),
        (question("four"), "yes at top right .", [False]),
        (question("four"), "no .", [False]),
        (question("two"), "no .", [True]),
        (question("two"), "yes at top left .", [False]),
        (question("two"), "yes .", None),
        (question("two"), "yes at middle .", None),
        (question("two"), "no", None),
        (question("two"), "a blue two at top left .", None),
    ],
)
def test_truths(prompt, response, expected):
    assert truths(prompt, response, SCENE) == expected


def test_truths_of_the_world_itself():
    scenes = DigitWorld("train", skew=0.9, seed=3).scenes(30)
    for scene, other in pairwise(scenes):
        digit, missing = scene.digits[0].digit, absent(scene)[0]
        assert truths(DESCRIBE, caption(scene), scene) == [True] * len(scene.digits)
        assert truths(question(digit), answer(scene, digit), scene) == [True]
        assert truths(question(missing), answer(scene, missing), scene) == [True]
        assert truths(DESCRIBE, caption(other), scene) == [placed in scene.digits for placed in other.digits]


def test_shares_of_contradicting_and_agreeing_responses():
    true, false = "a blue four at top left .", "a blue five at top left ."
    pairs = [
        Pair("scene1-caption", DESCRIBE, true, false, SCENE),
        Pair("scene2-caption", DESCRIBE, true, "a red nine at top right .", SCENE),
        Pair("scene3-caption", DESCRIBE, true, "a blue five at at .", SCENE),
        Pair("scene4-caption", DESCRIBE, false, false, SCENE),
        Pair("scene5-question", question("two"), "no .", "yes at top left .", SCENE),
        Pair("scene6-question", question("two"), "no", "yes at top left .", SCENE),
    ]
    found = checked(pairs)
    names = ("pairs", "contradict", "rejected_true", "rejected_unparsed", "agree", "chosen_false", "chosen_unparsed")
    assert found["kinds"] == {
        "caption": dict(zip(names, (4, 2, 1, 1, 3, 1, 0), strict=True)),
        "question": dict(zip(names, (2, 2, 0, 0, 1, 0, 1), strict=True)),
        "all": dict(zip(names, (6, 4, 1, 1, 4, 1, 1), strict=True)),
    }
    listed = {name: [one["key"] for one in some] for name, some in found["listed"].items()}
    assert listed == {
        "rejected_true": ["scene2-caption"],
        "rejected_unparsed": ["scene3-caption"],
        "chosen_false": ["scene4-caption"],
        "chosen_unparsed": ["scene6-question"],
    }
    told = contradictions_table({"scenes": 6, "records": 6, **found})
    assert "| caption  |     4 |              50.00% |" in told
    assert "95% and 100% wanted: NOT met." in told
    assert "a blue five at at ." in told
    assert "wanted: met." in contradictions_table({"scenes": 1, "records": 1, **checked([pairs[0], pairs[4]])})


def test_contradictions(found):
    kinds = found["contradictions"]["kinds"]
    assert list(kinds) == ["caption", "question", "all"]
    for row in kinds.values():
        assert row["contradict"] + row["rejected_true"] + row["rejected_unparsed"] == row["pairs"] > 0
        assert row["agree"] == row["pairs"]
        assert row["contradict"] >= 0.95 * row["pairs"]
