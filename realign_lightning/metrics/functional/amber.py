"""AMBER (Wang et al. 2023, arXiv 2311.07397): descriptions of images and yes-or-no answers, scored by rules.

The rules are those of ``inference.py`` of junyangwang0410/AMBER. The generative part checks the nouns of a description
against the objects annotated for the image; the discriminative part counts answers that are exactly "Yes" or "No".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_lightning.metrics.functional.checks import check_texts
from realign_lightning.metrics.functional.wordnet import lemma, require, tag
from realign_lightning.metrics.functional.words import cased_tokens

EPS = 0.001
"""What the reference adds to every denominator: its counters of denominators start there."""

TYPES: Mapping[str, str] = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""What the ``type`` of a question in the official annotations asks for."""

_KINDS = tuple(dict.fromkeys(TYPES.values()))


def nltk_nouns(text: str) -> list[str]:
    """Nouns of a text as the reference finds them: words that NLTK tags NN*, each as WordNet's noun lemma.

    Case is kept, so "People" at the start of a sentence is no word of AMBER's vocabulary. The words are cut by our own
    scanner (``words.py``), so that NLTK's sentence model is not needed.

    Args:
        text: a description.

    Returns:
        The lemmas in their order, repeated where a noun is.

    Raises:
        ModuleNotFoundError: if NLTK is not installed.
        LookupError: if NLTK lacks the data of its tagger or of WordNet.
    """
    require(tagger=True)
    tokens = cased_tokens(text)
    return [lemma(token, "n") for token, label in zip(tokens, tag(tokens), strict=True) if label.startswith("NN")]


def exact_similarity(first: str, second: str) -> float:
    """A similarity that knows no near-synonyms; scores then differ from published ones.

    Args:
        first: a word.
        second: another.

    Returns:
        1 if the words are equal, else 0.
    """
    return float(first == second)


def spacy_similarity(model: str = "en_core_web_lg") -> Callable[[str, str], float]:
    """The similarity that published scores use: the cosine of spaCy's word vectors.

    Args:
        model: name or path of a spaCy pipeline with word vectors. The reference uses ``en_core_web_lg``; lmms-eval
            takes the first installed of ``en_core_web_md``, ``_sm`` and ``_lg``.

    Returns:
        A function for :class:`AmberChecker`. It remembers words and pairs, and can be pickled.

    Raises:
        ModuleNotFoundError: if spaCy is not installed.
        OSError: if spaCy has no such pipeline.
        ValueError: if the pipeline has no word vectors.
    """
    _spacy_pipeline(model)
    return partial(_spacy_cosine, model)


@lru_cache(maxsize=4)
def _spacy_pipeline(model: str) -> Any:
    try:
        spacy = importlib.import_module("spacy")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Near-synonyms by {model} need spaCy: run `pip install spacy`.") from error
    try:
        pipeline = spacy.load(model)
    except OSError as error:
        raise OSError(f"spaCy has no pipeline {model!r}: run `python -m spacy download {model}`.") from error
    if not pipeline.vocab.vectors_length:
        raise ValueError(f"Expected `model` with word vectors, as en_core_web_lg has, got {model!r}, which has none.")
    return pipeline


@lru_cache(maxsize=2**14)
def _spacy_doc(model: str, word: str) -> Any:
    return _spacy_pipeline(model)(word)


@lru_cache(maxsize=2**18)
def _spacy_cosine(model: str, first: str, second: str) -> float:
    docs = _spacy_doc(model, first), _spacy_doc(model, second)
    if not all(doc.vector_norm for doc in docs):
        return exact_similarity(first, second)
    return float(docs[0].similarity(docs[1]))


class ResponseCheck(NamedTuple):
    """One description against the annotation of its image.

    Attributes:
        nouns: the nouns that are in AMBER's vocabulary, in their order, repeated where the description repeats them.
        safe: those of them that are in the image, near-synonyms of what is, or safe words.
        hallucinated: the others.
        covered: the annotated objects that the description names.
        cognitive: the objects annotated as likely hallucinations that it names. A noun can count here and still be
            safe, as a near-synonym of an object in the image.
        truth: the annotated objects.
        hallu: the objects annotated as likely hallucinations.
    """

    nouns: tuple[str, ...]
    safe: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: tuple[str, ...]
    cognitive: tuple[str, ...]
    truth: tuple[str, ...]
    hallu: tuple[str, ...]


class _Verdict(NamedTuple):
    """One noun: whether it is safe, and the indices of the objects and likely hallucinations that it names."""

    safe: bool
    covered: frozenset[int]
    cognitive: frozenset[int]


class AmberChecker:
    """Checks descriptions as AMBER's generative part does.

    A noun outside the vocabulary, which is all words of ``relation``, is not looked at. A safe word is safe. Any other
    noun is compared with the names of the annotated objects: the words associated with the first object, then with
    the second and so on, then the objects themselves. The first equal name makes it safe and its object covered. A
    noun without one counts for the object of the first equal name, and for that of the first similar name, among the
    likely hallucinations. Then the first similar name among the objects in the image makes it safe and covers that
    object; without one it is hallucinated. So a noun associated with an early object never covers a later object of
    just that name.

    Args:
        relation: for each object the words associated with it; the official ``relation.json``.
        safe_words: nouns that are never hallucinated; the lines of the official ``safe_words.txt``.
        similarity: how alike two words are. Published scores use :func:`spacy_similarity`; :func:`exact_similarity`
            needs nothing, but makes more nouns hallucinated. There is no default, because scores depend on it.
        nouns: finds the nouns of a description; None for :func:`nltk_nouns`, which published scores use.
        threshold: words more alike than this are near-synonyms.

    Raises:
        ValueError: if ``relation`` or ``safe_words`` is a text, or a word of ``relation`` has no list of words.
        ModuleNotFoundError: if ``nouns`` is None and NLTK is not installed.
        LookupError: if ``nouns`` is None and NLTK lacks its data.

    >>> checker = AmberChecker({"dog": ["puppy"], "cat": []}, similarity=exact_similarity, nouns=str.split)
    >>> check = checker.check("a puppy and a cat", truth=["dog"], hallu=["cat"])
    >>> check.safe, check.covered, check.hallucinated, check.cognitive
    (('puppy',), ('dog',), ('cat',), ('cat',))
    """

    def __init__(
        self,
        relation: Mapping[str, Sequence[str]],
        safe_words: Collection[str] = (),
        *,
        similarity: Callable[[str, str], float],
        nouns: Callable[[str], list[str]] | None = None,
        threshold: float = 0.8,
    ) -> None:
        if not isinstance(relation, Mapping):
            raise ValueError(f"Expected `relation` to map words to lists of words, got {type(relation).__name__}.")
        for word, associated in relation.items():
            _check_words(associated, f"`relation` of {word!r}")
        if isinstance(safe_words, str):
            raise ValueError(f"Expected `safe_words` to be a list of words, got {safe_words!r}.")
        self.relation = {word: tuple(associated) for word, associated in relation.items()}
        self.safe_words = frozenset(safe_words)
        self.similarity = similarity
        if nouns is None:
            require(tagger=True)
        self.nouns = nltk_nouns if nouns is None else nouns
        self.threshold = threshold
        self.vocabulary = frozenset(self.relation).union(*self.relation.values())

    def check(self, response: str, truth: Sequence[str], hallu: Sequence[str]) -> ResponseCheck:
        """One description against the annotation of its image.

        Args:
            response: the description.
            truth: the objects in the image, each a word of ``relation``.
            hallu: the objects that are likely hallucinated, each a word of ``relation``.
        """
        nouns = tuple(noun for noun in self.nouns(response) if noun in self.vocabulary)
        names, wrong_names = self._names(truth), self._names(hallu)
        verdicts = [self._judge(noun, names, wrong_names) for noun in nouns]
        covered = {index for verdict in verdicts for index in verdict.covered}
        cognitive = {index for verdict in verdicts for index in verdict.cognitive}
        return ResponseCheck(
            nouns=nouns,
            safe=tuple(noun for noun, verdict in zip(nouns, verdicts, strict=True) if verdict.safe),
            hallucinated=tuple(noun for noun, verdict in zip(nouns, verdicts, strict=True) if not verdict.safe),
            covered=tuple(truth[index] for index in sorted(covered)),
            cognitive=tuple(hallu[index] for index in sorted(cognitive)),
            truth=tuple(truth),
            hallu=tuple(hallu),
        )

    def _names(self, objects: Sequence[str]) -> dict[str, int]:
        """Every name that stands for an object, in the order in which they are tried, with the object's index."""
        names: dict[str, int] = {}
        for index, word in enumerate(objects):
            for associated in self.relation[word]:
                names.setdefault(associated, index)
        for index, word in enumerate(objects):
            names.setdefault(word, index)
        return names

    def _judge(self, noun: str, names: Mapping[str, int], wrong_names: Mapping[str, int]) -> _Verdict:
        if noun in self.safe_words:
            return _Verdict(safe=True, covered=frozenset(), cognitive=frozenset())
        if noun in names:
            return _Verdict(safe=True, covered=frozenset({names[noun]}), cognitive=frozenset())
        equal = frozenset({wrong_names[noun]} if noun in wrong_names else ())
        near = self._near(noun, names)
        return _Verdict(safe=bool(near), covered=near, cognitive=equal | self._near(noun, wrong_names))

    def _near(self, noun: str, names: Mapping[str, int]) -> frozenset[int]:
        """The index of the object with the first similar name; empty for none."""
        for name, index in names.items():
            if self.similarity(noun, name) > self.threshold:
                return frozenset({index})
        return frozenset()


def _check_words(words: Any, name: str) -> None:
    if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"Expected {name} to be a list of words, got {words!r}.")


def _field(annotation: Mapping[str, Any], name: str, index: int) -> Any:
    if not isinstance(annotation, Mapping):
        raise ValueError(
            f"Expected `target` to hold annotations as dicts, got {type(annotation).__name__} at index {index}."
        )
    if name not in annotation:
        raise ValueError(f"Expected `target` to have {name!r}, got {list(annotation)} at index {index}.")
    return annotation[name]


def amber_responses(
    preds: Sequence[str], target: Sequence[Mapping[str, Any]], checker: AmberChecker
) -> list[ResponseCheck]:
    """What AMBER sees in each description, for showing.

    Args:
        preds: descriptions.
        target: the annotation of each image, as :func:`amber_generative` takes it.
        checker: the rules.

    Raises:
        ValueError: as :func:`amber_generative`.

    >>> checker = AmberChecker({"dog": [], "cat": []}, similarity=exact_similarity, nouns=str.split)
    >>> amber_responses(["a dog and a cat"], [{"truth": ["dog"], "hallu": []}], checker)[0].hallucinated
    ('cat',)
    """
    check_texts(preds, target)
    for index, annotation in enumerate(target):
        _check_description(annotation, index, checker)
    return [
        checker.check(response, annotation["truth"], annotation["hallu"])
        for response, annotation in zip(preds, target, strict=True)
    ]


def _check_description(annotation: Mapping[str, Any], index: int, checker: AmberChecker) -> None:
    for name in ("truth", "hallu"):
        words = _field(annotation, name, index)
        _check_words(words, f"{name!r} of `target` at index {index}")
        if unknown := [word for word in words if word not in checker.relation]:
            raise ValueError(
                f"Expected {name!r} of `target` to hold words of `relation`, got {unknown} at index {index}: add them "
                "to `relation`, with an empty list if nothing is associated with them."
            )
    kind = annotation.get("type", "generative")
    if kind != "generative":
        raise ValueError(f"Expected descriptions, of type 'generative', got type {kind!r} at index {index}.")


class AmberGenerativeCounts(NamedTuple):
    """What the generative scores are computed from: ints, or tensors of one shape.

    Attributes:
        nouns: nouns of the descriptions that are in the vocabulary, every mention.
        hallucinated: those of them that are hallucinated.
        truth: annotated objects.
        covered: those of them that are named.
        hallu: objects annotated as likely hallucinations.
        cognitive: those of them that are named.
        responses: descriptions.
        clean: descriptions without a hallucinated noun.
    """

    nouns: Any
    hallucinated: Any
    truth: Any
    covered: Any
    hallu: Any
    cognitive: Any
    responses: Any
    clean: Any


def amber_generative_counts(preds: Sequence[str], target: Sequence[Mapping[str, Any]], checker: AmberChecker) -> Tensor:
    """Count the nouns of each description.

    Args:
        preds: descriptions.
        target: the annotation of each image, as :func:`amber_generative` takes it.
        checker: the rules.

    Returns:
        (N, 8) integers; the columns are the fields of :class:`AmberGenerativeCounts`.

    Raises:
        ValueError: as :func:`amber_generative`.
    """
    rows = [_description_counts(check) for check in amber_responses(preds, target, checker)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, len(AmberGenerativeCounts._fields))


def _description_counts(check: ResponseCheck) -> AmberGenerativeCounts:
    return AmberGenerativeCounts(
        nouns=len(check.nouns),
        hallucinated=len(check.hallucinated),
        truth=len(check.truth),
        covered=len(check.covered),
        hallu=len(check.hallu),
        cognitive=len(check.cognitive),
        responses=1,
        clean=int(not check.hallucinated),
    )


def _share(count: Tensor, total: Tensor, eps: float) -> Tensor:
    """``count / (total + eps)``, and 0 where ``total`` is 0."""
    dtype = torch.float32 if total.device.type == "mps" else torch.float64
    smoothed = total.to(dtype) + eps
    return count.to(dtype) / smoothed.masked_fill(total == 0, 1)


def _amber_generative_compute(counts: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """Finish summed counts of :func:`amber_generative_counts`, (..., 8)."""
    of = AmberGenerativeCounts(*counts.unbind(-1))
    return {
        "chair": _share(of.hallucinated, of.nouns, eps),
        "cover": _share(of.covered, of.truth, eps),
        "hal": (1 - _share(of.clean, of.responses, eps)).masked_fill(of.responses == 0, 0),
        "cog": _share(of.cognitive, of.hallu, eps),
    }


def amber_generative(
    preds: Sequence[str], target: Sequence[Mapping[str, Any]], checker: AmberChecker, eps: float = EPS
) -> dict[str, Tensor]:
    """Scores of a set of descriptions.

    Args:
        preds: descriptions.
        target: the annotation of each image, a dict with the objects in the image, "truth", and those that are likely
            hallucinated, "hallu", both lists of words. An entry of the official ``annotations.json`` is one.
        checker: the rules.
        eps: added to every denominator. 0.001 is the reference's; ``0.001 * len(preds)`` gives lmms-eval's scores,
            which start anew for each description; 0 gives plain shares.

    Returns:
        Scalars in [0, 1], 0 where nothing was counted: chair (nouns that are hallucinated), cover (annotated objects
        that are named), hal (one minus the share of descriptions without a hallucinated noun) and cog (likely
        hallucinations that are named). ``round(100 * x, 1)`` is what the reference prints.

    Raises:
        ValueError: if the lengths differ, ``preds`` holds no texts, or an annotation lacks a list, is of another type
            or holds a word that ``relation`` lacks.

    >>> checker = AmberChecker({"dog": ["puppy"], "cat": [], "sky": []}, similarity=exact_similarity, nouns=str.split)
    >>> annotation = {"truth": ["dog", "sky"], "hallu": ["cat"]}
    >>> scores = amber_generative(["a puppy and a cat", "the sky"], [annotation, annotation], checker, eps=0)
    >>> {name: round(value.item(), 2) for name, value in scores.items()}
    {'chair': 0.33, 'cover': 0.5, 'hal': 0.5, 'cog': 0.5}
    """
    return _amber_generative_compute(amber_generative_counts(preds, target, checker).sum(0), eps)


class AmberAnswerCounts(NamedTuple):
    """What the scores of one kind of question are computed from: ints, or tensors of one shape.

    Attributes:
        questions: questions.
        correct: answered correctly.
        truth_no: with the right answer "no".
        said_no: answered exactly "No".
        found: answered "No", and rightly.
        unparsed: answered with anything but "Yes" and "No".
    """

    questions: Any
    correct: Any
    truth_no: Any
    said_no: Any
    found: Any
    unparsed: Any


class _Group(NamedTuple):
    """Questions that are scored together.

    Attributes:
        kinds: indices of the kinds.
        terms: how many smoothed counters the reference adds up to a denominator.
        f1_smoothing: what it adds to the denominator of F1, in units of eps.
    """

    kinds: tuple[int, ...]
    terms: int = 1
    f1_smoothing: float = 0.1


_EXISTENCE, _STATE, _NUMBER, _ACTION, _RELATION = (
    _KINDS.index(kind) for kind in ("existence", "state", "number", "action", "relation")
)
_GROUPS: Mapping[str, _Group] = {
    "": _Group(tuple(range(len(_KINDS)))),
    "existence_": _Group((_EXISTENCE,), f1_smoothing=1),
    "attribute_": _Group((_STATE, _NUMBER, _ACTION), terms=3),
    "state_": _Group((_STATE,)),
    "number_": _Group((_NUMBER,)),
    "action_": _Group((_ACTION,)),
    "relation_": _Group((_RELATION,)),
}
"""Prefix of the scores' names to questions."""


def amber_discriminative_counts(preds: Sequence[str], target: Sequence[Mapping[str, Any]]) -> Tensor:
    """Count each answer.

    Args:
        preds: answers as generated.
        target: the annotation of each question, as :func:`amber_discriminative` takes it.

    Returns:
        (N, 30) integers: the fields of :class:`AmberAnswerCounts` for existence, then for state, number, action and
        relation. All but those of the question's own kind are 0.

    Raises:
        ValueError: as :func:`amber_discriminative`.
    """
    check_texts(preds, target)
    for index, annotation in enumerate(target):
        _check_question(annotation, index)
    counts = torch.zeros(len(preds), len(_KINDS), len(AmberAnswerCounts._fields), dtype=torch.long)
    if preds:
        kinds = torch.tensor([_KINDS.index(TYPES[annotation["type"]]) for annotation in target])
        rows = [_answer_counts(pred, annotation["truth"]) for pred, annotation in zip(preds, target, strict=True)]
        counts[torch.arange(len(preds)), kinds] = torch.tensor(rows)
    return counts.flatten(1)


def _check_question(annotation: Mapping[str, Any], index: int) -> None:
    kind = _field(annotation, "type", index)
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"Expected 'type' of `target` to be one of {tuple(TYPES)}, got {kind!r} at index {index}.")
    truth = _field(annotation, "truth", index)
    if truth not in ("yes", "no"):
        raise ValueError(f"Expected 'truth' of `target` to be 'yes' or 'no', got {truth!r} at index {index}.")


def _answer_counts(answer: str, truth: str) -> AmberAnswerCounts:
    # "Yes" and "No" as the reference has them: "yes", "No." and the like are neither.
    verdict = {"Yes": "yes", "No": "no"}.get(answer)
    return AmberAnswerCounts(
        questions=1,
        correct=int(verdict == truth),
        truth_no=int(truth == "no"),
        said_no=int(verdict == "no"),
        found=int(verdict == truth == "no"),
        unparsed=int(verdict is None),
    )


def _amber_discriminative_compute(counts: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """Finish summed counts of :func:`amber_discriminative_counts`, (..., 30)."""
    by_kind = counts.reshape(*counts.shape[:-1], len(_KINDS), -1)
    scores: dict[str, Tensor] = {}
    for prefix, group in _GROUPS.items():
        of_group = AmberAnswerCounts(*by_kind[..., list(group.kinds), :].sum(-2).unbind(-1))
        results = _answer_scores(of_group, eps * group.terms, eps * group.f1_smoothing)
        scores |= {prefix + name: value for name, value in results.items()}
    return scores


def _answer_scores(of: AmberAnswerCounts, eps: float, f1_eps: float) -> dict[str, Tensor]:
    precision, recall = _share(of.found, of.said_no, eps), _share(of.found, of.truth_no, eps)
    return {
        "accuracy": _share(of.correct, of.questions, eps),
        "precision": precision,
        "recall": recall,
        "f1": _f1(_rounded(precision), _rounded(recall), f1_eps),
        "unparsed": _share(of.unparsed, of.questions, eps=0),
    }


def _rounded(share: Tensor) -> Tensor:
    """A share rounded to a tenth of a percent, with the reference's order of operations."""
    return (share * 1000).round() / 10 / 100


def _f1(precision: Tensor, recall: Tensor, eps: float) -> Tensor:
    total = precision + recall
    return 2 * precision * recall / (total + eps).masked_fill(total == 0, 1)


def amber_discriminative(
    preds: Sequence[str], target: Sequence[Mapping[str, Any]], eps: float = EPS
) -> dict[str, Tensor]:
    """Scores of a set of answers; "no" is the positive class.

    Args:
        preds: answers as generated. Only "Yes" and "No", exactly so, are answers; anything else is wrong.
        target: the annotation of each question, a dict with its "type", a key of :data:`TYPES`, and the right answer,
            "truth", "yes" or "no". An entry of the official ``annotations.json`` is one.
        eps: added to every denominator; 0.001 is the reference's. Attribute, a sum of three counters, has it three
            times, as in the reference. F1 has a tenth of it, and existence_f1 all of it.

    Returns:
        Scalars in [0, 1], 0 where nothing was counted: accuracy, precision, recall, f1 and unparsed (answers that are
        neither "Yes" nor "No"), then the same for existence, attribute (state, number and action together), state,
        number, action and relation, as ``existence_accuracy`` and so on. f1 is computed from precision and recall
        rounded to a tenth of a percent. ``round(100 * x, 1)`` is what the reference prints.

    Raises:
        ValueError: if the lengths differ, ``preds`` holds no texts, a type is unknown or a right answer is neither
            "yes" nor "no".

    >>> exists, counts = "discriminative-hallucination", "discriminative-attribute-number"
    >>> target = [{"type": exists, "truth": "no"}, {"type": exists, "truth": "yes"}, {"type": counts, "truth": "no"}]
    >>> scores = amber_discriminative(["No", "No", "no."], target, eps=0)
    >>> [round(scores[name].item(), 2) for name in ("accuracy", "precision", "recall", "unparsed", "number_recall")]
    [0.33, 0.5, 0.5, 0.33, 0.0]
    """
    return _amber_discriminative_compute(amber_discriminative_counts(preds, target).sum(0), eps)


_DESCRIPTION_WIDTH = len(AmberGenerativeCounts._fields)
_ANSWER_WIDTH = len(_KINDS) * len(AmberAnswerCounts._fields)


def amber_counts(preds: Sequence[str], target: Sequence[Mapping[str, Any]], checker: AmberChecker) -> Tensor:
    """Count descriptions and answers of one run.

    Args:
        preds: descriptions and answers.
        target: their annotations, as :func:`amber` takes them.
        checker: the rules for descriptions.

    Returns:
        (N, 38) integers: the columns of :func:`amber_generative_counts`, 0 for answers, then those of
        :func:`amber_discriminative_counts`, 0 for descriptions.

    Raises:
        ValueError: as :func:`amber`.
    """
    check_texts(preds, target)
    for index, annotation in enumerate(target):
        _check_entry(annotation, index, checker)
    descriptions = [index for index, annotation in enumerate(target) if annotation["type"] == "generative"]
    answers = [index for index, annotation in enumerate(target) if annotation["type"] != "generative"]
    counts = torch.zeros(len(preds), _DESCRIPTION_WIDTH + _ANSWER_WIDTH, dtype=torch.long)
    counts[descriptions, :_DESCRIPTION_WIDTH] = amber_generative_counts(
        [preds[index] for index in descriptions], [target[index] for index in descriptions], checker
    )
    counts[answers, _DESCRIPTION_WIDTH:] = amber_discriminative_counts(
        [preds[index] for index in answers], [target[index] for index in answers]
    )
    return counts


def _amber_compute(counts: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """Finish summed counts of :func:`amber_counts`, (..., 38)."""
    descriptions, answers = counts[..., :_DESCRIPTION_WIDTH], counts[..., _DESCRIPTION_WIDTH:]
    scores = _amber_generative_compute(descriptions, eps) | _amber_discriminative_compute(answers, eps)
    both_seen = descriptions.any(-1) & answers.any(-1)
    return scores | {"amber": amber_score(scores["chair"], scores["f1"]) * both_seen}


def _check_entry(annotation: Mapping[str, Any], index: int, checker: AmberChecker) -> None:
    kind = _field(annotation, "type", index)
    expected = ("generative", *TYPES)
    if kind not in expected:
        raise ValueError(f"Expected 'type' of `target` to be one of {expected}, got {kind!r} at index {index}.")
    if kind == "generative":
        _check_description(annotation, index, checker)
    else:
        _check_question(annotation, index)


def amber_score(chair: Tensor, f1: Tensor) -> Tensor:
    """The paper's AMBER Score: the mean of F1 and of what CHAIR leaves to 1.

    Args:
        chair: CHAIR of the descriptions, a share.
        f1: F1 of the answers, a share.

    Returns:
        A share of the same shape. The paper prints it in percent, from CHAIR and F1 rounded to a tenth of a percent.

    >>> round(amber_score(torch.tensor(0.046), torch.tensor(0.874)).item(), 3)  # the paper's row of GPT-4V
    0.914
    """
    return (1 - chair + f1) / 2


def amber(
    preds: Sequence[str], target: Sequence[Mapping[str, Any]], checker: AmberChecker, eps: float = EPS
) -> dict[str, Tensor]:
    """Scores of a run of both parts; see :class:`~realign_lightning.metrics.AMBER`.

    Args:
        preds: descriptions and answers, in any order.
        target: for each its entry of the official ``annotations.json``: a dict with "type" and, for descriptions, what
            :func:`amber_generative` takes, for answers what :func:`amber_discriminative` takes.
        checker: the rules for descriptions.
        eps: added to every denominator; see there.

    Returns:
        The scores of :func:`amber_generative`, of :func:`amber_discriminative`, and ``amber``, the paper's AMBER
        Score (:func:`amber_score`), 0 unless both descriptions and answers were given.

    Raises:
        ValueError: as they do, or if a type is neither of theirs.

    >>> checker = AmberChecker({"dog": [], "cat": []}, similarity=exact_similarity, nouns=str.split)
    >>> target = [{"type": "generative", "truth": ["dog"], "hallu": []}, {"type": "relation", "truth": "no"}]
    >>> scores = amber(["dog cat", "No"], target, checker, eps=0)
    >>> [scores[name].item() for name in ("chair", "f1", "amber")]
    [0.5, 1.0, 0.75]
    """
    return _amber_compute(amber_counts(preds, target, checker).sum(0), eps)
