import pickle
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, precision_score, recall_score

from realign_lightning.metrics.amber import AMBER
from realign_lightning.metrics.functional.amber import (
    AmberChecker,
    ResponseCheck,
    amber,
    amber_discriminative,
    amber_generative,
    amber_responses,
    amber_score,
    exact_similarity,
    nltk_nouns,
    spacy_similarity,
)
from tests.metrics._tester import Batch, MetricTester

# The function of that name hides the module.
rules = sys.modules["realign_lightning.metrics.functional.amber"]

RELATION = {
    "person": ["man", "people"],
    "man": ["boy"],
    "lake": ["water"],
    "sea": ["water"],
    "dog": ["puppy"],
    "cat": [],
    "sun": [],
    "cloud": [],
}
SIMILAR = {("cat", "dog"): 0.83, ("cloud", "sun"): 0.8}


def similarity(first: str, second: str) -> float:
    return 1.0 if first == second else SIMILAR.get((first, second), 0.0)


CHECKER = AmberChecker(RELATION, ["sun"], similarity=similarity, nouns=str.split)

# Description, truth, hallu, then nouns, hallucinated, truth, covered, hallu, cognitive, responses, clean.
DESCRIPTIONS = [
    ("a man by water", ["person", "man", "lake", "sea"], ["dog"], [2, 0, 4, 2, 1, 0, 1, 1]),
    ("dog dog sun", ["person"], ["dog", "cat"], [3, 2, 1, 0, 2, 1, 1, 0]),
    ("cat and cloud", ["dog"], ["cat", "sun"], [2, 1, 1, 1, 2, 1, 1, 0]),
    ("Dog house", ["dog"], ["cat"], [0, 0, 1, 0, 1, 0, 1, 1]),
    ("", ["dog", "dog"], [], [0, 0, 2, 0, 0, 0, 1, 1]),
    ("puppy", ["dog", "dog"], [], [1, 0, 2, 1, 0, 0, 1, 1]),
]
QUESTIONS = [
    ("No", "discriminative-hallucination", "no"),
    ("No", "discriminative-hallucination", "yes"),
    ("Yes", "discriminative-hallucination", "no"),
    ("Yes", "discriminative-attribute-state", "yes"),
    ("no", "discriminative-attribute-state", "no"),
    ("No", "discriminative-attribute-number", "no"),
    ("No.", "discriminative-attribute-number", "no"),
    ("No", "discriminative-attribute-number", "no"),
    ("Yes.", "discriminative-attribute-action", "yes"),
    ("No", "discriminative-attribute-action", "yes"),
    ("No", "discriminative-relation", "no"),
    ("", "relation", "no"),
    ("Yes", "relation", "yes"),
]
GROUPS = {
    "": ("",),
    "existence_": ("hallucination",),
    "attribute_": ("attribute",),
    "state_": ("state",),
    "number_": ("number",),
    "action_": ("action",),
    "relation_": ("relation",),
}


def described(rows: Sequence[Any]) -> Batch:
    return [row[0] for row in rows], [{"type": "generative", "truth": row[1], "hallu": row[2]} for row in rows]


def asked(rows: Sequence[Any]) -> Batch:
    return [row[0] for row in rows], [{"type": kind, "truth": truth} for _, kind, truth in rows]


def described_scores(preds: Sequence[str], target: Sequence[Any]) -> dict[str, float]:
    """Shares of the counts worked by hand."""
    worked = {(row[0], tuple(row[2])): row[3] for row in DESCRIPTIONS}
    rows = [worked[pred, tuple(wanted["hallu"])] for pred, wanted in zip(preds, target, strict=True)]
    nouns, hallucinated, truth, covered, hallu, cognitive, responses, clean = map(sum, zip(*rows, strict=True))
    return {
        "chair": hallucinated / (nouns + 0.001),
        "cover": covered / (truth + 0.001),
        "hal": 1 - clean / (responses + 0.001),
        "cog": cognitive / (hallu + 0.001),
    }


def plain_asked_scores(preds: Sequence[str], target: Sequence[Any]) -> dict[str, float]:
    """By scikit-learn, any answer but Yes and No being a class of its own."""
    scores = {}
    for prefix, parts in GROUPS.items():
        rows = [
            ({"Yes": "yes", "No": "no"}.get(pred, "neither"), wanted["truth"])
            for pred, wanted in zip(preds, target, strict=True)
            if any(part in wanted["type"] for part in parts)
        ]
        if not rows:
            names = ("accuracy", "precision", "recall", "f1", "unparsed")
            scores |= dict.fromkeys((f"{prefix}{name}" for name in names), 0.0)
            continue
        said, truth = ([row[place] for row in rows] for place in (0, 1))
        kwargs = {"labels": ["no"], "average": "micro", "zero_division": 0}
        precision, recall = precision_score(truth, said, **kwargs), recall_score(truth, said, **kwargs)
        rounded = [round(100 * share, 1) / 100 for share in (precision, recall)]
        scores[f"{prefix}accuracy"] = accuracy_score(truth, said)
        scores[f"{prefix}precision"] = precision
        scores[f"{prefix}recall"] = recall
        scores[f"{prefix}f1"] = 2 * rounded[0] * rounded[1] / sum(rounded) if sum(rounded) else 0
        scores[f"{prefix}unparsed"] = said.count("neither") / len(rows)
    return scores


class TestDescriptions(MetricTester):
    def make_metric(self) -> AMBER:
        return AMBER("generative", CHECKER)

    def batches(self) -> list[Batch]:
        return [described(DESCRIPTIONS[:2]), described(DESCRIPTIONS[2:5]), described(DESCRIPTIONS[5:])]

    def reference(self, preds: Sequence[str], target: Sequence[Any]) -> dict[str, float]:
        return described_scores(preds, target)


class TestAnswers(MetricTester):
    def make_metric(self) -> AMBER:
        return AMBER("discriminative", eps=0)

    def batches(self) -> list[Batch]:
        return [asked(QUESTIONS[:1]), asked(QUESTIONS[1:6]), asked(QUESTIONS[6:])]

    def reference(self, preds: Sequence[str], target: Sequence[Any]) -> dict[str, float]:
        return plain_asked_scores(preds, target)


class TestBoth(MetricTester):
    """Descriptions and answers in one batch, with the denominators as they are."""

    def make_metric(self) -> AMBER:
        return AMBER(checker=CHECKER, eps=0)

    def batches(self) -> list[Batch]:
        descriptions, answers = described(DESCRIPTIONS[:3]), asked(QUESTIONS[:6])
        mixed = ([*answers[0], *descriptions[0]], [*answers[1], *descriptions[1]])
        return [mixed, described(DESCRIPTIONS[3:]), asked(QUESTIONS[6:])]

    def reference(self, preds: Sequence[str], target: Sequence[Any]) -> dict[str, float]:
        pairs = list(zip(preds, target, strict=True))
        answers = [pair for pair in pairs if pair[1]["type"] != "generative"]
        scores = plain_asked_scores([pred for pred, _ in answers], [wanted for _, wanted in answers])
        worked = {(row[0], tuple(row[2])): row[3] for row in DESCRIPTIONS}
        rows = [worked[pred, tuple(wanted["hallu"])] for pred, wanted in pairs if wanted["type"] == "generative"]
        sums = [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * 8
        for name, count, total in (("chair", 1, 0), ("cover", 3, 2), ("cog", 5, 4)):
            scores[name] = sums[count] / sums[total] if sums[total] else 0
        scores["hal"] = (sums[6] - sums[7]) / sums[6] if sums[6] else 0
        scores["amber"] = (1 - scores["chair"] + scores["f1"]) / 2 if rows and answers else 0
        return scores


def checked(response: str, truth: list[str], hallu: list[str]) -> ResponseCheck:
    preds, target = described([(response, truth, hallu)])
    return amber_responses(preds, target, CHECKER)[0]


def test_descriptions_are_counted_as_by_hand() -> None:
    """The first: "man" is first met among the words of person, "water" among those of lake: 2 of 4 objects covered.

    The second: both dogs are hallucinated, and one likely hallucination is named; the sun is safe. The third: the cat
    is as good as the dog in the image (0.83), yet also a likely hallucination; a cloud is not quite a sun (0.8). The
    fourth: "Dog" and "house" are no words of the vocabulary. The last: only the first of two equal objects counts.
    """
    preds, target = described(DESCRIPTIONS)
    assert rules.amber_generative_counts(preds, target, CHECKER).tolist() == [row[3] for row in DESCRIPTIONS]


def test_a_name_counts_for_the_first_object_it_is_associated_with() -> None:
    assert checked("man", ["man", "person"], []).covered == ("person",)
    assert checked("people man boy", ["man", "person"], []).covered == ("man", "person")


def test_an_equal_and_a_similar_name_among_the_likely_hallucinations_both_count() -> None:
    """The cat is a cat, and the first name that it is similar to is the dog."""
    assert checked("cat", ["lake"], ["dog", "cat"]).cognitive == ("dog", "cat")
    assert checked("cat", ["lake"], ["cat", "dog"]).cognitive == ("cat",)


def test_safe_words_count_as_nouns_but_name_nothing() -> None:
    check = checked("sun", ["sun"], ["sun"])
    assert (check.nouns, check.safe, check.covered, check.cognitive) == (("sun",), ("sun",), (), ())


def test_what_is_in_the_image_is_no_cognitive_hallucination() -> None:
    check = checked("cat", ["cat"], ["cat"])
    assert (check.covered, check.cognitive, check.hallucinated) == (("cat",), (), ())


def test_smoothed_shares_worked_by_hand() -> None:
    """Of the first three: 3 of 7 nouns, 3 of 6 objects, 2 of 5 likely ones, 1 of 3 clean."""
    scores = amber_generative(*described(DESCRIPTIONS[:3]), CHECKER)
    expected = {"chair": 3 / 7.001, "cover": 3 / 6.001, "hal": 1 - 1 / 3.001, "cog": 2 / 5.001}
    assert {name: value.item() for name, value in scores.items()} == pytest.approx(expected, abs=1e-12)


def test_f1_of_rounded_shares_worked_by_hand() -> None:
    """Of four "no", two are found, with three times "No" said: 2 / 3.001 is 66.6 %, 2 / 4.001 is 50.0 %.

    F1 is 2 * 0.666 * 0.5 = 0.666 over 1.166 and a smoothing of 0.0001, for existence 0.001. Attribute adds up three
    smoothed counters, so its precision is 2 / 3.003.
    """
    rows = [("No", "no"), ("No", "no"), ("No", "yes"), ("Yes", "no"), ("nope", "no")]
    for kind, prefix, smoothing in (
        ("relation", "relation_", 0.0001),
        ("discriminative-hallucination", "existence_", 0.001),
        ("discriminative-attribute-action", "", 0.0001),
    ):
        scores = amber_discriminative(*asked([(said, kind, truth) for said, truth in rows]))
        assert scores[f"{prefix}precision"].item() == pytest.approx(2 / 3.001, abs=1e-12)
        assert scores[f"{prefix}recall"].item() == pytest.approx(2 / 4.001, abs=1e-12)
        assert scores[f"{prefix}accuracy"].item() == pytest.approx(2 / 5.001, abs=1e-12)
        assert scores[f"{prefix}f1"].item() == pytest.approx(0.666 / (1.166 + smoothing), abs=1e-12)
        assert scores[f"{prefix}unparsed"].item() == pytest.approx(1 / 5, abs=1e-12)
    assert scores["attribute_precision"].item() == pytest.approx(2 / 3.003, abs=1e-12)
    assert scores["attribute_accuracy"].item() == pytest.approx(2 / 5.003, abs=1e-12)


def test_many_sums_are_scored_at_once() -> None:
    """As a bootstrap does: (2, 3) sums give (2, 3) scores, each that of its own sum."""
    preds, target = (one + other for one, other in zip(described(DESCRIPTIONS), asked(QUESTIONS), strict=True))
    counts = rules.amber_counts(preds, target, CHECKER)
    draws = torch.randint(len(preds), (2, 3, len(preds)), generator=torch.Generator().manual_seed(0))
    scores = rules._amber_compute(counts[draws].sum(-2))
    drawn = draws[1, 2].tolist()
    alone = amber([preds[index] for index in drawn], [target[index] for index in drawn], CHECKER)
    assert set(scores) == set(alone)
    for name, value in scores.items():
        assert value.shape == (2, 3)
        assert value[1, 2] == alone[name]


@pytest.mark.parametrize(
    ("chair", "f1", "published"),
    [
        (21.6, 18.9, 48.7),
        (11.5, 32.7, 60.6),
        (13.6, 64.7, 75.6),
        (7.8, 74.7, 83.5),
        (5.5, 84.9, 89.7),
        (4.6, 87.4, 91.4),
    ],
)
def test_published_amber_scores(chair: float, f1: float, published: float) -> None:
    """Rows of the paper's main table, each rounded to 0.1."""
    score = amber_score(torch.tensor(chair / 100), torch.tensor(f1 / 100))
    assert 100 * score.item() == pytest.approx(published, abs=0.0501)


ANIMALS = {"type": "generative", "truth": ["dog"], "hallu": ["cat"]}
QUESTION = {"type": "relation", "truth": "no"}


@pytest.mark.parametrize(
    ("task", "preds", "target", "message"),
    [
        ("all", ["dog", "No"], [ANIMALS], "got 2 and 1"),
        ("all", [7], [ANIMALS], "texts, got int at index 0"),
        ("all", ["dog"], ["dog"], "annotations as dicts, got str at index 0"),
        ("all", ["dog"], [{"truth": ["dog"]}], r"have 'type', got \['truth'\] at index 0"),
        ("all", ["dog"], [{"type": "colour"}], "'discriminative-hallucination'.* got 'colour' at index 0"),
        ("all", ["dog", "Yes"], [ANIMALS, {"type": "relation", "truth": "Yes"}], "or 'no', got 'Yes' at index 1"),
        (
            "all",
            ["Yes", "dog"],
            [QUESTION, ANIMALS | {"truth": ["dg"]}],
            r"`relation`, got \['dg'\] at index 1",
        ),
        ("generative", ["dog"], [{"truth": ["dog"]}], "have 'hallu'"),
        ("generative", ["dog"], [ANIMALS | {"truth": "dog"}], "'truth' of `target` at index 0 to be a list of words"),
        ("generative", ["dog"], [ANIMALS | {"hallu": {"cat"}}], "'hallu' of `target` at index 0 to be a list of words"),
        ("generative", ["No"], [ANIMALS | {"type": "relation"}], "descriptions, of type 'generative', got type 'rel"),
        ("discriminative", ["dog"], [ANIMALS], "got 'generative' at index 0"),
        ("discriminative", ["No"], [{"type": "relation", "truth": None}], "'yes' or 'no', got None"),
        ("discriminative", ["No"], [{"type": ["relation"], "truth": "no"}], r"got \['relation'\] at index 0"),
        ("discriminative", "No", [QUESTION], "`preds` to be a list"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(task: Any, preds: Any, target: Any, message: str) -> None:
    metric = AMBER(task, CHECKER)
    with pytest.raises(ValueError, match=message):
        metric.update(preds, target)
    assert not metric.counts.any()


def test_an_empty_batch_counts_nothing() -> None:
    for task in ("all", "generative", "discriminative"):
        metric = AMBER(task, CHECKER)
        metric.update([], [])
        assert all(value == 0 for value in metric.compute().values())


def test_one_part_alone_has_no_amber_score() -> None:
    assert amber(*described(DESCRIPTIONS), CHECKER)["amber"] == 0
    assert amber(*asked(QUESTIONS), CHECKER)["amber"] == 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`task` to be one of .*'all'.* got 'generation'"):
        AMBER("generation", CHECKER)
    with pytest.raises(ValueError, match=r"Expected `checker`.* for task 'all', got None"):
        AMBER()
    with pytest.raises(ValueError, match="`relation` to map words to lists of words, got str"):
        AmberChecker("relation.json", similarity=similarity, nouns=str.split)
    with pytest.raises(ValueError, match="`relation` of 'dog' to be a list of words, got 'puppy'"):
        AmberChecker({"dog": "puppy"}, similarity=similarity, nouns=str.split)
    with pytest.raises(ValueError, match="`safe_words` to be a list of words, got 'sun'"):
        AmberChecker(RELATION, "sun", similarity=similarity, nouns=str.split)


def test_nouns_are_lemmas_of_what_is_tagged_so_with_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"People": "NNS", "walk": "VBP", "dogs": "NNS", "Paris": "NNP", ".": "."}
    lemmas = {"dogs": "dog"}
    monkeypatch.setattr(rules, "require", lambda tagger: None)
    monkeypatch.setattr(rules, "tag", lambda tokens: [tags[token] for token in tokens])
    monkeypatch.setattr(rules, "lemma", lambda token, pos: lemmas.get(token, token) if pos == "n" else "")
    assert nltk_nouns("People walk dogs. Paris.") == ["People", "dog", "Paris"]
    assert AmberChecker(RELATION, similarity=exact_similarity).nouns is nltk_nouns


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Cannot find a Dog", ["Can", "not", "find", "a", "Dog"]),
        ("THE MAN'S dog", ["THE", "MAN", "'S", "dog"]),
        ("I'LL, WE'VE, DON'T", ["I", "'LL", ",", "WE", "'VE", ",", "DO", "N'T"]),
        ("Isn'T a 'Dog'\u2014cat", ["Isn'T", "a", "'", "Dog", "'", "\u2014", "cat"]),
    ],
)
def test_words_are_cut_in_their_own_case(text: str, tokens: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What NLTK's tokenizer gives for these texts; every token is tagged as a noun here, so that all are returned."""
    monkeypatch.setattr(rules, "require", lambda tagger: None)
    monkeypatch.setattr(rules, "tag", lambda tokens: ["NN"] * len(tokens))
    monkeypatch.setattr(rules, "lemma", lambda token, pos: token)
    assert nltk_nouns(text) == tokens


def test_missing_nltk_is_said_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        AmberChecker(RELATION, similarity=exact_similarity)


class Doc:
    """Stands for spaCy's: a word with a vector in the plane, or none."""

    def __init__(self, word: str) -> None:
        self.vector = {"lake": (3.0, 4.0), "sea": (4.0, 3.0)}.get(word, (0.0, 0.0))
        self.vector_norm = (self.vector[0] ** 2 + self.vector[1] ** 2) ** 0.5

    def similarity(self, other: "Doc") -> float:
        dot = self.vector[0] * other.vector[0] + self.vector[1] * other.vector[1]
        return dot / (self.vector_norm * other.vector_norm)


class Pipeline:
    def __init__(self, vectors_length: int) -> None:
        self.vocab = SimpleNamespace(vectors_length=vectors_length)

    def __call__(self, word: str) -> Doc:
        return Doc(word)


def load(model: str) -> Pipeline:
    if model == "absent":
        raise OSError("[E050] Can't find model")
    return Pipeline(0 if model == "without_vectors" else 2)


def test_similarity_of_word_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """(3, 4) and (4, 3) have the cosine 24 / 25; a word without a vector resembles itself alone."""
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    similar = pickle.loads(pickle.dumps(spacy_similarity("plane")))  # noqa: S301
    assert similar("lake", "sea") == pytest.approx(24 / 25, abs=1e-12)
    assert (similar("unheard", "lake"), similar("unheard", "unheard")) == (0.0, 1.0)
    checker = AmberChecker({"lake": [], "sea": []}, similarity=similar, nouns=str.split)
    assert checker.check("lake", ["sea"], []).covered == ("sea",)


def test_missing_spacy_pipeline_and_vectors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install spacy"):
        spacy_similarity("some_model")
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(OSError, match="spacy download absent"):
        spacy_similarity("absent")
    with pytest.raises(ValueError, match="'without_vectors', which has none"):
        spacy_similarity("without_vectors")
