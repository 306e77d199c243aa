"""English plural to singular, as CHAIR's original pipeline sees it.

CHAIR was published with the singulariser of ``pattern.en``, which cannot be installed beside current Python. These are
our own rules: a description, in endings and word lists, of what that singulariser (clips/pattern, BSD-3) answers,
checked against 530 of its answers. They are deliberately not better English: CHAIR's numbers depend on its mistakes
("bus" becomes "bu", so a bus is never counted, although "buses" is).
"""

from __future__ import annotations

# Nouns with one form for both numbers, and mass nouns that end like a plural. "is" and "as" are function words that the
# reference also leaves alone.
_INVARIABLE_WORDS = """
    as bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn eland
    elk flounder gallows georgia graffiti happiness headquarters herpes high-jinks homework innings is jackanapes
    mackerel mathematics measles mews mumps news pincers pliers proceedings progress rabies s salmon scissors series
    shears species ss swine swiss trout tuna whiting wildebeest
"""
_INVARIABLE = frozenset(_INVARIABLE_WORDS.split())

# Nouns in -ie. Their plural is not recognised as one, and stays.
_NOUNS_IN_IE = """
    auntie beanie birdie bogie collie cookie cutie doggie eyrie freebie genie goalie groupie hankie hoagie hoodie hottie
    indie junkie laddie lingerie movie newbie nightie oldie pixie prairie reverie roadie rookie smoothie softie sortie
    sweetie techie toughie townie veggie weenie yuppie zombie
"""
_PLURALS_IN_IES = tuple(noun + "s" for noun in _NOUNS_IN_IE.split())

# Plurals that no ending explains. They also end compounds: firemen, grandchildren. "our" is listed as the plural of
# "my", with strange results for other words.
_IRREGULAR = {
    "axes": "axe",
    "beeves": "beef",
    "brethren": "brother",
    "children": "child",
    "corpora": "corpus",
    "feet": "foot",
    "geese": "goose",
    "genera": "genus",
    "kine": "cow",
    "loaves": "loaf",
    "men": "man",
    "monies": "money",
    "moves": "move",
    "opera": "opus",
    "our": "my",
    "oxen": "ox",
    "oxens": "oxs",
    "people": "person",
    "sexes": "sex",
    "teeth": "tooth",
}

# Ending of the plural and what stands there in the singular. The longest ending that a word has decides.
_ENDINGS = {
    "s": "",
    # -es after a sibilant, and after o
    "xes": "x",
    "ches": "ch",
    "shes": "sh",
    "sses": "ss",
    "buses": "bus",
    "aliases": "alias",
    "statuses": "status",
    "quizzes": "quiz",
    "oes": "o",
    "shoes": "shoe",
    # -ies for -y after a consonant; after a vowel only the s goes
    "ies": "y",
    "aies": "aie",
    "eies": "eie",
    "iies": "iie",
    "oies": "oie",
    "uies": "uie",
    "yies": "yie",
    "quies": "quy",
    "series": "series",
    # -ves for -f and -fe, and the many words that simply end in -ve
    "ves": "fe",
    "fves": "fve",
    "lves": "lf",
    "rves": "rf",
    "erves": "erve",
    "aves": "ave",
    "eves": "eve",
    "oves": "ove",
    "eaves": "eaf",
    "deaves": "deave",
    "hives": "hive",
    "sives": "sive",
    "tives": "tive",
    # Greek and Latin
    "crises": "crisis",
    "testes": "testis",
    "bases": "basis",
    "theses": "thesis",
    "parentheses": "parenthesis",
    "opses": "opsis",
    "yses": "ysis",
    "oses": "osis",
    "boses": "bose",
    "closes": "close",
    "doses": "dose",
    "hoses": "hose",
    "noses": "nose",
    "ooses": "oose",
    "poses": "pose",
    "roses": "rose",
    "diagnoses": "diagnosis",
    "prognoses": "prognosis",
    "apices": "apex",
    "vertices": "vertex",
    "indices": "index",
    "matrices": "matrix",
    "itis": "itis",
    "ae": "a",
    "eaux": "eau",
    "ia": "ium",
    "ta": "tum",
    "ci": "cus",
    "ii": "ius",
    "oi": "ous",
    "pi": "pus",
    "ri": "rus",
    "ti": "tus",
    "vi": "vus",
    # mice and lice, hence also slice
    "mice": "mouse",
    "lice": "louse",
}

_PREPOSITIONS = "about above at before by for from in into of off on over to under with"


def singularize(word: str) -> str:
    """Singular of a word, by the rules that CHAIR's original pipeline applies to every token, noun or not.

    Args:
        word: one lower-case token.

    Returns:
        The singular; the word itself where no rule applies.

    >>> [singularize(word) for word in ("buses", "knives", "children", "mothers-in-law", "bus", "four")]
    ['bus', 'knife', 'child', 'mother-in-law', 'bu', 'fmy']
    """
    head, *rest = word.split("-")
    if rest and rest[0] in _PREPOSITIONS.split():
        return "-".join([singularize(head), *rest])
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if word in _INVARIABLE or word.endswith(_PLURALS_IN_IES):
        return word
    return _replace_ending(word, _IRREGULAR) or _replace_ending(word, _ENDINGS) or word


def _replace_ending(word: str, endings: dict[str, str]) -> str | None:
    """The word with its longest listed ending replaced; None where it has none of them."""
    for start in range(len(word)):
        if word[start:] in endings:
            return word[:start] + endings[word[start:]]
    return None
