"""Which words name which object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

# What CHAIR's reference hard-codes for COCO captions (LisaAnne/Hallucination, utils/chair.py): pairs of words that are
# one thing, some of them no object of COCO; "wine glas" because that is the singular which "wine glass" is given.
_COCO_PAIRS = (
    "air plane",
    "baseball bat",
    "baseball glove",
    "cell phone",
    "fire hydrant",
    "hair drier",
    "home plate",
    "hot dog",
    "laptop computer",
    "mobile phone",
    "motor bike",
    "motor cycle",
    "parking meter",
    "potted plant",
    "sports ball",
    "stop light",
    "stop sign",
    "street light",
    "suit case",
    "teddy bear",
    "tennis racket",
    "traffic light",
    "traffic signal",
    "train track",
    "wine glass",
)
_COCO_READ_AS = {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
# A baby elephant is no person, nor is a passenger jet.
_COCO_ANIMALS = ("animal", "bear", "bird", "cat", "cow", "cub", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_COCO_QUALIFIED = {
    **{f"{age} {animal}": animal for age in ("adult", "baby") for animal in _COCO_ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
}
_COCO_COMPOUNDS = {**{pair: pair for pair in _COCO_PAIRS}, **_COCO_READ_AS, **_COCO_QUALIFIED}
_COCO_SUPPRESSED = {"seat": "toilet"}


class Lexicon:
    """Categories of objects and the names that captions give them.

    With the defaults, names are brought to the same form as the words of a caption, and names of several words are
    joined before the look-up, so that any dictionary works as one would expect.

    Args:
        names: the names of each category. A category is always a name of itself.
        compounds: phrases that are joined before the look-up, and the word each is read as. When given, only these
            phrases are joined, and names and phrases are compared with the words of a caption exactly as they stand;
            this is how CHAIR's reference works. None joins every name of several words.
        suppressed: words that do not count in a caption in which another word occurs, as
            ``{"seat": "toilet"}``, so that the seat of a toilet is no chair.

    Attributes:
        categories: the categories in their order.
        synonyms: the category of each name.

    Raises:
        ValueError: without a category, or if a name belongs to two categories.

    >>> lexicon = Lexicon({"zero": ["nought"], "hot dog": ["frankfurter"]})
    >>> lexicon.categories
    ('zero', 'hot dog')
    >>> lexicon.category("nought")
    'zero'
    """

    def __init__(
        self,
        names: Mapping[str, Iterable[str]],
        compounds: Mapping[str, str] | None = None,
        suppressed: Mapping[str, str] | None = None,
    ) -> None:
        if not names:
            raise ValueError("Expected `names` to hold at least one category, got none.")
        self.categories = tuple(names)
        self.synonyms: dict[str, str] = {}
        self.compounds = None if compounds is None else dict(compounds)
        self.suppressed = dict(suppressed or {})
        for category, synonyms in names.items():
            if isinstance(synonyms, str):
                raise ValueError(f"Expected `names` of {category!r} to be a list of names, got the text {synonyms!r}.")
            for name in (category, *synonyms):
                self._add(name, category)

    def _add(self, name: str, category: str) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Expected the names of {category!r} to be texts that are not empty, got {name!r}.")
        known = self.synonyms.setdefault(name, category)
        if known != category:
            raise ValueError(f"The name {name!r} belongs to both {known!r} and {category!r}: list it once.")

    def category(self, name: str) -> str:
        """The category that a name belongs to.

        Args:
            name: a category or another name of one, as listed.

        Raises:
            KeyError: if the lexicon does not list the name.
        """
        if name not in self.synonyms:
            raise KeyError(f"{name!r} is not in the lexicon of {len(self.categories)} categories.")
        return self.synonyms[name]

    def fingerprint(self) -> str:
        """Short text that differs between lexicons that read captions differently.

        >>> Lexicon({"dog": ["pup"]}).fingerprint() == Lexicon({"dog": ["puppy"]}).fingerprint()
        False
        """
        content = json.dumps([self.synonyms, self.compounds, self.suppressed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def from_file(cls, path: str | Path, coco_rules: bool = True) -> Lexicon:
        """Read a list in the form of CHAIR's ``synonyms.txt``: one category per line, its names joined by ", ".

        Names are taken as the reference takes them: lines are trimmed, names are not. A blank too many, or a capital
        letter, makes a name that no caption holds; with the official list these are ' motor bike', ' cheesecake' and
        'iPhone'.

        Args:
            path: the file, UTF-8. The official one is ``data/synonyms.txt`` of LisaAnne/Hallucination.
            coco_rules: apply the reference's rules for COCO captions (phrases that are joined, "baby elephant" is no
                person, the seat of a toilet is no chair). Set it to False for a list of other objects.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a line is empty, or a name belongs to two categories.
        """
        names: dict[str, list[str]] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            category, *synonyms = line.strip().split(", ")
            if not category:
                raise ValueError(f"{path}, line {number}: expected a category and its names, got an empty line.")
            names.setdefault(category, []).extend(synonyms)
        return cls(names, _COCO_COMPOUNDS, _COCO_SUPPRESSED) if coco_rules else cls(names)

    @classmethod
    def coco(cls) -> Lexicon:
        """Our own list of names for the 80 categories of COCO, with the reference's rules for COCO captions.

        The names are our own choice, made by someone who knew the official list. Words that mean something else as
        often (crane, cook, basketball) and people whom captions mention without seeing them (visitor, customer) were
        left out after a comparison on the captions below, so expect a somewhat larger distance on others.

        Distance from the official list, 500 released captions per model, and ground truth made with the official list,
        in points (ours / official):

        * ``original``, LLaVA-1.5: CHAIRs 45.0 / 44.8, CHAIRi 12.74 / 12.83;
        * ``original``, MiniGPT-4: CHAIRs 22.8 / 23.0, CHAIRi 8.65 / 8.75;
        * ``opera``, LLaVA-1.5: CHAIRs 44.8 / 44.6, CHAIRi 12.69 / 12.76;
        * ``opera``, MiniGPT-4: CHAIRs 26.0 / 26.2, CHAIRi 9.42 / 9.53.

        Use the official list (:meth:`from_file`) for numbers that stand beside published ones.
        """
        return _coco()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.categories)} categories, {len(self.synonyms)} names)"


@cache
def _coco() -> Lexicon:
    return Lexicon.from_file(Path(str(files("realign_lightning.metrics").joinpath("lexicons", "coco.txt"))))
