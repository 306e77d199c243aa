"""What an English answer claims about an image, by word lists and neighbouring words.

The lists of objects, attributes, counts and relations stand in ``preferences/lexicons``. Where a word can be several
things ("orange", "watch", "left", "back"), its neighbours decide. ``docs/masking.md`` compares what is found with
hand-annotated answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from realign_lightning.preferences.masking.base import Span
from realign_lightning.preferences.masking.units import Unit, units_of
from realign_lightning.preferences.masking.vocabulary import word_set

_DETERMINERS = word_set("determiners")
_PRONOUNS = word_set("pronouns")
_EACH_OTHER = {"each": "other", "one": "another"}
_COPULAS = word_set("copulas")
_LINKS = frozenset(["and", "or", ",", "&", "/"])
_ADVERBS = word_set("adverbs")
_FUNCTION = word_set("function")
_ABSTRACT = word_set("abstract")
_IMAGES = word_set("images")
_ABOUT = word_set("about")

RULES = 1
"""Version of the rules below; raised whenever they find other spans, so that kept masks are made anew."""


class _Claim(NamedTuple):
    first: int
    last: int
    kind: str


def find_claims(text: str) -> list[Span]:
    """Find objects, attributes, counts and relations in an English answer.

    Args:
        text: any text; what is in other languages is mostly not found.

    Returns:
        Spans in order and without overlap, each of one of :data:`~realign_lightning.preferences.KINDS`.

    >>> [(span.text, span.kind) for span in find_claims("An orange cat is sitting on 2 oranges.")]
    [('orange', 'attribute'), ('cat', 'object'), ('sitting on', 'relation'), ('2', 'count'), ('oranges', 'object')]
    """
    units = units_of(text)
    spans = []
    for claim in _Reader(units).claims():
        start, end = units[claim.first].start, units[claim.last].end
        spans.append(Span(start, end, text[start:end], claim.kind))
    return spans


class _Reader:
    """Decides for every unit of an answer what it claims.

    Args:
        units: of one answer.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units

    def claims(self) -> list[_Claim]:
        """All claims in order; nouns that follow one another are one object."""
        found: list[_Claim] = []
        index = 0
        while index < len(self._units):
            claim = self._claim(index)
            index = index + 1 if claim is None else claim.last + 1
            if claim is None:
                continue
            before = found[-1] if found else None
            if before and before.kind == claim.kind == "object" and self._follows(before.last, claim.first):
                found[-1] = _Claim(before.first, claim.last, "object")
            else:
                found.append(claim)
        return found

    def _claim(self, index: int) -> _Claim | None:
        if not self._units[index].classes:
            return None
        if self._is_count(index):
            return _Claim(index, index, "count")
        if self._is_object(index):
            return _Claim(index, index, "object")
        last = self._relation_end(index)
        if last is not None:
            return _Claim(index, last, "relation")
        if self._is_attribute(index) or self._is_state(index):
            return _Claim(index, index, "attribute")
        return None

    # Neighbours

    def _text(self, index: int) -> str:
        """Text of a unit; empty outside the answer."""
        return self._units[index].text if 0 <= index < len(self._units) else ""

    def _is(self, index: int, *classes: str) -> bool:
        return 0 <= index < len(self._units) and not self._units[index].classes.isdisjoint(classes)

    def _follows(self, before: int, index: int) -> bool:
        """Whether a unit stands directly behind another, without punctuation."""
        return index == before + 1 and index < len(self._units) and self._units[index].joined and self._is_word(index)

    def _is_word(self, index: int) -> bool:
        return self._text(index)[:1].isalnum()

    def _behind_determiner(self, index: int) -> bool:
        return self._text(index - 1) in _DETERMINERS or self._is(index - 1, "count", "count*")

    def _in_noun_position(self, index: int) -> bool:
        """Whether a word that may also be a verb stands where only nouns do."""
        if not self._units[index].joined:
            return False
        if self._is(index - 1, "object", "object*") and not self._is(index, "verbs", "postures"):
            # "a kitchen counter", but neither "the man can" nor "the man guards the door".
            return self._text(index) not in _FUNCTION and self._text(index + 1) not in _DETERMINERS
        before = self._text(index - 1)
        listed = before in _LINKS and self._is(index - 2, "object", "object*")
        adjacent = self._is(index - 1, "attribute", "attribute*", "prepositions", "side of", "verbs")
        return self._behind_determiner(index) or before in ("of", "with") or listed or adjacent

    # What a unit is

    def _is_object(self, index: int) -> bool:
        if not self._is(index, "object", "object*"):
            return False
        as_noun = self._in_noun_position(index)
        if not self._is(index, "object") and not as_noun:
            return False
        if self._is(index, "verbs", "postures") and not as_noun and self._is_followed_as_verb(index):
            return False
        if self._is(index, "attribute", "attribute*"):
            return not self._reads_as_attribute(index)
        return True

    def _is_followed_as_verb(self, index: int) -> bool:
        if not self._follows(index, index + 1):
            return False
        if self._is(index, "postures") and (
            self._is(index + 1, "prepositions", "places", "side", "side of") or self._text(index - 1) in _COPULAS
        ):
            return True
        return self._is(index, "verbs") and (
            self._text(index + 1) in _DETERMINERS or self._is(index + 1, "count", "count*")
        )

    def _reads_as_attribute(self, index: int) -> bool:
        """Whether a word that names a thing and a property ("orange", "glass") stands for the property."""
        if self._stands_before_noun(index):
            return True
        if not self._is(index, "attribute") or (self._text(index).endswith("s") and self._behind_determiner(index)):
            return False
        before = self._text(index - 1)
        listed = before in _LINKS and self._is(index - 2, "attribute") and not self._is(index - 2, "object")
        made_of = before == "of" and self._text(index - 2) == "made"
        return before in _COPULAS or listed or made_of

    def _stands_before_noun(self, index: int) -> bool:
        """Whether an adjective here would belong to a noun: only other adjectives come between."""
        after = index + 1
        while after < min(index + 10, len(self._units)):
            if self._text(after) in _LINKS:
                after += 1
                if not self._is(after, "attribute"):
                    return False
            elif not self._units[after].joined:
                return False
            if self._is(after, "object", "object*"):
                return True
            if not self._is(after, "attribute", "attribute*") and not self._text(after).endswith("ly"):
                return False
            after += 1
        return False

    def _is_attribute(self, index: int) -> bool:
        if self._text(index + 1) in _ABSTRACT and self._follows(index, index + 1):
            return False
        if self._is(index, "attribute"):
            is_verb = self._is(index, "verbs") and self._text(index + 1) in _DETERMINERS
            return not is_verb
        return self._is(index, "attribute*") and self._stands_before_noun(index)

    def _is_state(self, index: int) -> bool:
        """Whether a posture stands alone: "is sleeping", "flying birds", but not "sat"."""
        if not self._is(index, "postures"):
            return False
        text = self._text(index)
        if not text.endswith(("ing", "ed", "ed up", "ed out")):
            return False
        return (
            self._text(index - 1) in _COPULAS | {"and", "or"}
            or self._is(index - 1, "object", "object*")
            or (self._follows(index, index + 1) and self._is(index + 1, "object", "object*"))
        )

    def _is_count(self, index: int) -> bool:
        if self._is(index, "count"):
            return self._text(index - 1) not in ("how", "so", "too", "as") or self._text(index) not in ("many", "few")
        if not self._is(index, "count*"):
            return False
        head = self._head(index + 1)
        if head is None:
            return False
        return not (self._text(index) == "both" and self._text(head + 1) == "and")

    # Relations

    def _relation_end(self, index: int) -> int | None:
        """The last unit of a relation that begins here, or None."""
        if self._is(index, "verbs") and self._is_verb(index):
            return index
        if self._is_place(index):
            return index
        if self._is(index, "postures", "placed"):
            return self._posture_end(index)
        return None

    def _is_verb(self, index: int) -> bool:
        after = index + 1
        participle = self._text(index).split(" ")[0].endswith("ing")
        counted = self._is(index - 1, "count", "count*") and not participle
        if self._text(index - 1) in _DETERMINERS or counted or not self._follows(index, after):
            return False
        if self._is(index, "attribute") and self._text(after) not in _DETERMINERS:
            return False  # "open windows"
        if self._head(after) is not None:
            return True
        # "wearing a poncho": the thing need not be known where the verb is plain.
        return participle and self._text(after) in _DETERMINERS and self._is_unknown_thing(after + 1)

    def _is_unknown_thing(self, index: int) -> bool:
        if not 0 <= index < len(self._units):
            return False
        text = self._text(index)
        known = self._units[index].classes or text in _ABSTRACT or text in _FUNCTION
        return self._is_word(index) and not known

    def _posture_end(self, index: int) -> int | None:
        """The last unit of "sitting on", "standing quietly next to", "located to the left of"."""
        after = index + 1
        while self._follows(after - 1, after) and after <= index + 3:
            if self._is_place(after):
                return after
            if self._text(after) not in _ADVERBS and not self._text(after).endswith("ly"):
                return None
            after += 1
        return None

    def _is_place(self, index: int) -> bool:
        """Whether a unit says where something is."""
        if self._is(index, "side of"):
            return self._has_object_behind(index, image_too=True)
        if self._is(index, "side"):
            return not self._stands_before_noun(index) and not self._is_unknown_thing_behind(index)
        if self._is(index, "prepositions") and self._has_object_behind(index, image_too=False):
            return True
        return self._is(index, "places")

    def _is_unknown_thing_behind(self, index: int) -> bool:
        """Whether an unknown noun follows: "on the right track"."""
        after = index + 1
        return self._follows(index, after) and self._is_unknown_thing(after) and not self._text(after).endswith("ing")

    def _has_object_behind(self, index: int, image_too: bool) -> bool:
        after = index + 1
        if not self._follows(index, after):
            return False
        if self._text(index) in _ABOUT and self._is(after, "count"):
            return False
        if self._head(after) is not None:
            return True
        if image_too and self._text(after) in _DETERMINERS and self._text(after + 1) in _IMAGES:
            return True
        solid = self._is(index, "solid") and self._text(after) in _DETERMINERS
        return solid and self._is_unknown_thing(after + 1)

    def _head(self, index: int) -> int | None:
        """The object, or pronoun, that a noun phrase beginning here is about; None where it is about neither."""
        unknown = 0
        for place in range(index, min(index + 9, len(self._units))):
            if place > index and not self._units[place].joined:
                return None
            if self._is(place, "object", "object*") or (place == index and self._is_pronoun(place)):
                return place
            if self._text(place) in _DETERMINERS:
                if unknown:
                    return None
            elif not self._modifies(place):
                unknown += 1
                if unknown > 2 or self._ends_phrase(place):
                    return None
        return None

    def _modifies(self, index: int) -> bool:
        """Whether a unit only says more of a noun that follows."""
        text = self._text(index)
        if text in _LINKS:
            return self._is(index - 1, "attribute") and self._is(index + 1, "attribute")
        listed = self._is(index, "attribute", "attribute*", "count", "count*")
        return text not in _ABSTRACT and (listed or text.endswith("ly"))

    def _ends_phrase(self, index: int) -> bool:
        text = self._text(index)
        known = text in _ABSTRACT or text in _FUNCTION or self._is(index, "verbs", "prepositions", "places")
        return known or not self._is_word(index)

    def _is_pronoun(self, index: int) -> bool:
        text, after = self._text(index), self._text(index + 1)
        if text in _EACH_OTHER and after == _EACH_OTHER[text]:
            return True
        return text in _PRONOUNS and not self._is(index + 1, "object", "object*", "attribute", "attribute*")
