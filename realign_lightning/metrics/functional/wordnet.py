"""Parts of speech and lemmas through NLTK, as CHAIR's successors and AMBER use them.

NLTK is an optional dependency and is imported when it is first needed. Its data are installed apart from it: the tagger
``averaged_perceptron_tagger_eng`` and the dictionary ``wordnet`` (WordNet 3.0, Princeton University). Tokens come from
our own tokeniser, so that ``punkt`` is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

_TAGGER = "taggers/averaged_perceptron_tagger_eng"
_DICTIONARY = "corpora/wordnet"


def require(tagger: bool) -> None:
    """Load what the functions of this module need, or say what is missing.

    Args:
        tagger: whether :func:`tag` is going to be used; :func:`lemma` needs the dictionary alone.

    Raises:
        ModuleNotFoundError: if NLTK is not installed.
        LookupError: if its data are not found.
    """
    try:
        import nltk
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CHAIR's normalizers 'opera' and 'objhal' and AMBER's nouns need NLTK, which is not installed: "
            "pip install 'realign-lightning[eval]', or nltk>=3.10."
        ) from error
    for resource, load in ((_TAGGER, _tagger), (_DICTIONARY, _lemmatizer)):
        if resource == _TAGGER and not tagger:
            continue
        try:
            nltk.data.find(f"{resource}/")
            load()
        except (LookupError, OSError) as error:
            name = resource.split("/")[-1]
            raise LookupError(
                f"NLTK's data {name!r} are not found or not complete. Run "
                f"python -c \"import nltk; nltk.download('{name}')\", or set the environment variable NLTK_DATA to the "
                f"folder that holds {resource}; it was looked for in {nltk.data.path}."
            ) from error


def tag(tokens: Sequence[str]) -> list[str]:
    """Part of speech of each token, by NLTK's averaged perceptron.

    Args:
        tokens: the tokens of a text in their order.

    Returns:
        Tags of the Penn Treebank, as ``"NNS"``.
    """
    return [label for _, label in _tagger().tag(tokens)]


@lru_cache(maxsize=2**16)
def lemma(token: str, pos: str) -> str:
    """Base form of a token: the shortest that WordNet lists.

    Args:
        token: one lower-case token.
        pos: ``"n"``, ``"v"``, ``"a"`` or ``"r"``: noun, verb, adjective or adverb.

    Returns:
        The base form; the token itself where WordNet lists none.
    """
    return str(_lemmatizer().lemmatize(token, pos))


@cache
def _tagger() -> Any:
    from nltk.tag import PerceptronTagger

    return PerceptronTagger()


@cache
def _lemmatizer() -> Any:
    from nltk.corpus import wordnet
    from nltk.stem import WordNetLemmatizer

    wordnet.ensure_loaded()
    return WordNetLemmatizer()
