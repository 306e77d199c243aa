"""Step 4 of building pairs: keep a completion only if it differs enough from the chosen response (section 3.1)."""

from __future__ import annotations

import difflib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from realign_lightning.backbones.files import file_sha256, hash_texts
from realign_lightning.backbones.revisions import cached_commit, tell_commit
from realign_lightning.data.schema import check_response
from realign_lightning.metrics.functional.chair import CaptionParser
from realign_lightning.preferences.masking.base import MaskedResponse
from realign_lightning.preferences.masking.sentences import sentence_bounds
from realign_lightning.trust import are_pickled_weights_allowed, is_remote_code_trusted, saying_what_is_missing
from realign_lightning.types import SampleError


class Similarity(ABC):
    """Compares texts pairwise. Subclass it to bring your own."""

    @abstractmethod
    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Similarity of ``first[i]`` and ``second[i]``; 1 for equal texts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that similarities depend on beside the texts, in plain JSON values."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}"}


class WordOverlap(Similarity):
    """Shared words over all words, counted with repetition and whatever their case; needs no model.

    >>> WordOverlap().compare(["a red bus ."], ["a red cat ."])  # 3 shared of 5
    [0.6]
    """

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Jaccard index of the texts' words; two empty texts are equal."""
        return [self._overlap(one, other) for one, other in zip(first, second, strict=True)]

    @staticmethod
    def _overlap(one: str, other: str) -> float:
        ours, theirs = Counter(one.lower().split()), Counter(other.lower().split())
        union = (ours | theirs).total()
        return (ours & theirs).total() / union if union else 1.0


class SentenceSimilarity(Similarity):
    """Cosine of sentence embeddings, as in the paper (all-mpnet-base-v2).

    Args:
        model: folder or hub name of a sentence-transformers model.
        batch_size: sentences per forward pass.
        revision: branch, tag or commit on the hub.

    Raises:
        ImportError: without the ``build`` extra.
    """

    def __init__(
        self,
        model: str = "sentence-transformers/all-mpnet-base-v2",
        batch_size: int = 64,
        revision: str | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.revision = revision
        self._encoder: Any = None

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The model: of a folder its content, of the hub its name and revision."""
        folder = Path(self.model)
        kind = {"class": f"{type(self).__module__}.{type(self).__qualname__}"}
        if not folder.is_dir():
            return {**kind, "model": self.model, "revision": self.revision}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {**kind, "content": hash_texts({str(path.relative_to(folder)): file_sha256(path) for path in files})}

    def compare(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Cosine similarity of the embeddings."""
        if self._encoder is None:
            self._encoder = self._load()
        settings = {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": False}
        ours, theirs = (self._encoder.encode(list(texts), **settings) for texts in (first, second))
        return [float(value) for value in (ours * theirs).sum(axis=1)]

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "SentenceSimilarity needs sentence-transformers: install realign-lightning[build], or use WordOverlap."
            ) from error
        only_safe = {} if are_pickled_weights_allowed() else {"use_safetensors": True}
        with saying_what_is_missing(self.model):
            encoder = SentenceTransformer(
                self.model,
                revision=self.revision,
                trust_remote_code=is_remote_code_trusted(),
                model_kwargs=only_safe,
            )
        tell_commit(self.model, self.revision, cached_commit(self.model, self.revision, "modules.json"))
        return encoder


Scope = Literal["response", "sentence", "span"]
"""What is compared: whole responses as in the paper, the sentences that differ, or the words that differ."""

Reason = Literal[
    "failed",
    "unfinished",
    "empty",
    "unwritable",
    "unchanged",
    "still masked",
    "nonsense",
    "refusal",
    "true of the image",
    "too similar",
]
"""Why a completion is no rejected response."""

REFUSALS = (
    r"\bi(?:'m| am) sorry\b",
    r"\bi apologi[sz]e\b",
    r"\bas an ai\b",
    r"\bi (?:can ?not|can't|am unable to|am not able to|'m unable to|do not have|don't have)\b",
    r"\bunable to (?:see|view|determine|complete|assist)\b",
)
"""How models decline to answer, as regular expressions that fit lower-case text."""


class Verdict(NamedTuple):
    """What becomes of a completion.

    Args:
        reason: why it is refused; None if it is accepted.
        similarity: the lowest of what was compared; None where nothing had to be.
    """

    reason: Reason | None
    similarity: float | None = None


class Gate:
    """Decides whether a completion becomes the rejected response.

    In a long answer one swapped object leaves whole responses nearly alike (a cosine of .97, .995 for a changed
    relation, was measured with all-mpnet-base-v2), so that the paper's gate refuses most such completions. The scopes
    ``sentence`` and ``span`` compare only what differs: one sentence, or one span, below ``tau`` is enough.

    Args:
        similarity: compares texts; None is :class:`SentenceSimilarity`, the paper's, which needs the ``build`` extra.
        tau: completions at least this similar are refused.
        scope: what is compared, see above.
        refusals: regular expressions of answers that decline to answer.
        refuse_true: refuse completions all of whose new objects are known to be in the original image. Only for sources
            that say what images show, and by the CHAIR lexicon.

    Raises:
        ValueError: for a scope that is none, a ``tau`` outside [-1, 1], and refusals that are no regular expressions.
    """

    def __init__(
        self,
        similarity: Similarity | None = None,
        tau: float = 0.95,
        scope: Scope = "response",
        refusals: Sequence[str] = REFUSALS,
        refuse_true: bool = False,
    ) -> None:
        if scope not in get_args(Scope):
            raise ValueError(f"Expected `scope` to be one of {get_args(Scope)}, got {scope!r}.")
        if not -1 <= tau <= 1:
            raise ValueError(f"Expected `tau` in [-1, 1], got {tau}.")
        self.similarity = SentenceSimilarity() if similarity is None else similarity
        self.tau = tau
        self.scope: Scope = scope
        self.refusals = list(refusals)
        self.refuse_true = refuse_true
        try:
            self._refusal = re.compile("|".join(self.refusals) or r"(?!)")
        except re.error as error:
            raise ValueError(f"Expected `refusals` to be regular expressions, got {self.refusals}: {error}.") from error

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that verdicts depend on beside the texts, in plain JSON values."""
        settings = {"tau": self.tau, "scope": self.scope, "refuse_true": self.refuse_true, "refusals": self.refusals}
        return {"similarity": dict(self.similarity.identity), **settings}

    def obvious(
        self, masked: MaskedResponse, completion: str, mask_token: str, objects: Sequence[str] | None
    ) -> Reason | None:
        """Why a completion is refused whatever its similarity; None if similarity decides.

        Args:
            masked: the chosen response and its spans.
            completion: what the policy wrote.
            mask_token: what stood for a mask.
            objects: what the original image is known to show; None if nobody knows.
        """
        if not completion.strip():
            return "empty"
        if not is_writable(completion):
            return "unwritable"
        if normalise(completion) == normalise(masked.response):
            return "unchanged"
        mask = mask_token.strip()
        if mask and mask in completion and mask not in masked.response:
            return "still masked"
        if self.declines(completion) and not self.declines(masked.response):
            return "refusal"
        if self.refuse_true and objects is not None and _is_true(masked.response, completion, objects):
            return "true of the image"
        return None

    def declines(self, text: str) -> bool:
        """Whether a text declines to answer.

        Args:
            text: what a model wrote.
        """
        return self._refusal.search(text.lower().replace("\u2019", "'")) is not None

    def pairs(self, masked: MaskedResponse, completion: str) -> list[tuple[str, str]]:
        """Texts of the chosen response and of the completion that are to be compared.

        Args:
            masked: the chosen response and its spans.
            completion: what the policy wrote.
        """
        chosen = masked.response
        if self.scope == "response":
            return [(chosen, completion)]
        if self.scope == "sentence":
            return _differing(_sentences(chosen), _sentences(completion))
        filled = fillings(masked, completion)
        if filled is None:
            return _differing(chosen.split(), completion.split())
        spans = zip((span.text for span in masked.spans), filled, strict=True)
        return [(one, other) for one, other in spans if normalise(one) != normalise(other)]

    def judge(self, similarities: Sequence[float]) -> Verdict:
        """Accept if one of the similarities of :meth:`pairs` is below ``tau``.

        Args:
            similarities: one for each pair; 0 for a pair one of whose texts is empty.
        """
        lowest = min(similarities, default=1.0)
        return Verdict(None if lowest < self.tau else "too similar", lowest)


def is_writable(completion: str) -> bool:
    """Whether shards can hold a completion: models can give nothing, or characters that no JSON text may hold.

    Args:
        completion: what a model wrote.
    """
    try:
        check_response(completion, "rejected")
    except SampleError:
        return False
    return True


def normalise(text: str) -> str:
    """A text as far as it says something: one form of every character, lower case, words without punctuation.

    >>> normalise("A  RED bus.") == normalise("a red bus")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def fillings(masked: MaskedResponse, completion: str) -> list[str] | None:
    """What stands in the masks of a completion that keeps every unmasked word; None if it keeps not all.

    Args:
        masked: the chosen response and its spans.
        completion: a completion.

    >>> from realign_lightning.preferences.masking.base import Span
    >>> masked = MaskedResponse("a red bus and a cat", (Span(6, 9, "bus"), Span(16, 19, "cat")))
    >>> fillings(masked, "a red car and a dog")
    ['car', 'dog']
    """
    pattern = "(.+?)".join(map(_loose, masked.segments))
    match = re.fullmatch(pattern.strip(), completion.strip(), re.DOTALL)
    return None if match is None else [text.strip() for text in match.groups()]


def _loose(text: str) -> str:
    """A regular expression for a text with any white space where it has some."""
    return "".join(r"\s+" if piece.isspace() else re.escape(piece) for piece in re.split(r"(\s+)", text))


def _sentences(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in sentence_bounds(text)]


def _differing(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """What stands in the same place of both and is not equal."""
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    blocks = (block for block in matcher.get_opcodes() if block[0] != "equal")
    return [(" ".join(ours[a:b]), " ".join(theirs[c:d])) for _, a, b, c, d in blocks]


def _is_true(chosen: str, completion: str, objects: Sequence[str]) -> bool:
    """Whether a completion names new objects, and all of them are known to be in the image."""
    parser = _object_parser()
    known = set(objects).union(*(_objects(parser, text) for text in objects))
    new = _objects(parser, completion) - _objects(parser, chosen)
    return bool(new) and new <= known


def _objects(parser: CaptionParser, text: str) -> set[str]:
    return {mention.category for mention in parser.parse(text).mentions}


@cache
def _object_parser() -> CaptionParser:
    return CaptionParser()
