from importlib.util import find_spec

from tests.metrics import _oracles

NLTK_DATA = ("taggers/averaged_perceptron_tagger_eng/", "corpora/wordnet/")


def _has_nltk_data() -> bool:
    if find_spec("nltk") is None:
        return False
    import nltk

    try:
        return all(nltk.data.find(resource) for resource in NLTK_DATA)
    except LookupError:
        return False


HAS_NLTK_DATA = _has_nltk_data()
collect_ignore_glob: list[str] = []
if not _oracles.UNCOMMITTED:
    collect_ignore_glob += ["test_uncommitted_*.py", "test_chair_published.py"]
if not _oracles.AMBER_DATA:
    collect_ignore_glob += ["test_uncommitted_amber*.py"]
if not HAS_NLTK_DATA:
    collect_ignore_glob += ["test_chair_wordnet.py", "test_chair_published.py", "test_uncommitted_amber_nouns.py"]


def pytest_report_header() -> list[str]:
    return [
        f"oracles that may not be committed: {_oracles.UNCOMMITTED or 'not here, their tests are left out'}",
        f"AMBER's lists of words: {_oracles.AMBER_DATA or 'not here (AMBER_DATA), their tests are left out'}",
        f"NLTK's tagger and WordNet: {'found' if HAS_NLTK_DATA else 'not here, their tests are left out'}",
    ]
