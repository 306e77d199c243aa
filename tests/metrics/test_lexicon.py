from pathlib import Path

import pytest

from benchmarks import lexicon as distance
from realign_lightning.metrics import CaptionParser, Lexicon
from tests.metrics import _oracles


def write(folder: Path, text: str) -> Path:
    path = folder / "synonyms.txt"
    path.write_text(text)
    return path


def test_our_list_has_the_categories_of_coco() -> None:
    """80 categories; those that occur in an oracle are spelled as COCO spells them."""
    categories = Lexicon.coco().categories
    assert len(categories) == 80
    images = _oracles.committed("public_chair.json")["images"].values()
    assert {name for image in images for name in image["instances"]} <= set(categories)


def test_our_list_has_no_name_that_its_spelling_hides() -> None:
    """Lower case, trimmed, and every name of two words is a phrase that is joined or ends in a name of its own."""
    lexicon = Lexicon.coco()
    for name, category in lexicon.synonyms.items():
        assert name == name.lower().strip()
        assert len(name.split(" ")) <= 2
        last = name.split(" ")[-1]
        assert name in lexicon.compounds or lexicon.synonyms.get(last, category) == category


def test_file_names_are_taken_as_they_stand(tmp_path: Path) -> None:
    """The blank too many before "motor bike" makes a name that no caption holds, as in the official list."""
    lexicon = Lexicon.from_file(write(tmp_path, "motorcycle, moped,  motor bike \ncell phone, iPhone\n"))
    assert " motor bike" in lexicon.synonyms
    assert "iPhone" in lexicon.synonyms
    mentions = CaptionParser(lexicon).parse("A motor bike, a moped, and an iPhone.").mentions
    assert [mention.word for mention in mentions] == ["moped"]


def test_coco_rules_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "person, baby\nelephant\nsun glasses\n")
    caption = "A baby elephant with sun glasses"
    with_rules = CaptionParser(Lexicon.from_file(path)).parse(caption).mentions
    without = CaptionParser(Lexicon.from_file(path, coco_rules=False)).parse(caption).mentions
    assert [mention.category for mention in with_rules] == ["elephant"]
    assert [mention.category for mention in without] == ["person", "elephant", "sun glasses"]


def test_bad_lists_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: expected a category"):
        Lexicon.from_file(write(tmp_path, "cat\n\ndog\n"))
    with pytest.raises(ValueError, match="'ball' belongs to both 'toy' and 'sport'"):
        Lexicon({"toy": ["ball"], "sport": ["ball"]})
    with pytest.raises(ValueError, match="at least one category"):
        Lexicon({})
    with pytest.raises(ValueError, match="list of names, got the text 'pup'"):
        Lexicon({"dog": "pup"})
    with pytest.raises(ValueError, match="names of 'dog' to be texts that are not empty, got ' '"):
        Lexicon({"dog": [" "]})
    with pytest.raises(KeyError, match="'wolf' is not in the lexicon of 1 categories"):
        Lexicon({"dog": ["pup"]}).category("wolf")


def test_fingerprint_is_that_of_what_is_read() -> None:
    dog = Lexicon({"dog": ["pup"]})
    assert dog.fingerprint() == Lexicon({"dog": ["pup"]}).fingerprint()
    others = [Lexicon({"dog": ["puppy"]}), Lexicon({"dog": ["pup"]}, {"hot dog": "hot dog"})]
    others.append(Lexicon({"dog": ["pup"]}, suppressed={"pup": "seal"}))
    assert len({lexicon.fingerprint() for lexicon in (dog, *others)}) == 4


def test_distance_of_lists_worked_by_hand() -> None:
    """The other list reads a wolf that is not in the image, and no puppy."""
    other = Lexicon({"dog": ["wolf"]})
    rows = [{"caption": "A wolf and a puppy.", "gt_objects": []}, {"caption": "A dog.", "gt_objects": ["dog"]}]
    assert distance.differing_names([row["caption"] for row in rows], other, "original") == {
        "ours": {"puppy (dog)": 1},
        "official": {"wolf (dog)": 1},
    }
    *_, row = distance.scores({"a model": rows}, other, ["original"]).splitlines()
    assert [cell.strip() for cell in row.split("|")] == ["", "original", "a model", *["50.00"] * 4, ""]
