"""Image ids as targets, and the index built from COCO's annotations."""

import json
from pathlib import Path
from typing import Any

import pytest

from realign_lightning.metrics import CHAIR, CaptionParser, Lexicon
from realign_lightning.metrics.functional.chair import chair, chair_counts
from realign_lightning.metrics.functional.coco import CocoObjects
from tests.metrics.test_chair import ORACLE, SHARED_ROWS, TARGETS

CATEGORIES = {name: number for number, name in enumerate(Lexicon.coco().categories, start=100)}


def write(folder: Path, images: dict[str, Any], split: str) -> tuple[Path, Path]:
    """COCO's two files of a split."""
    listed = [{"id": int(image)} for image in images]
    instances = {
        "images": listed,
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
        "annotations": [
            {"image_id": int(image), "category_id": CATEGORIES[name]}
            for image, content in images.items()
            for name in content["instances"]
        ],
    }
    captions = {
        "images": listed,
        "annotations": [
            {"image_id": int(image), "caption": caption}
            for image, content in images.items()
            for caption in content["reference_captions"]
        ],
    }
    paths = folder / f"instances_{split}.json", folder / f"captions_{split}.json"
    for path, content in zip(paths, (instances, captions), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_index_is_the_ground_truth_of_the_reference(tmp_path: Path) -> None:
    instances, captions = write(tmp_path, ORACLE["images"], "val2014")
    objects = CocoObjects.from_annotations(instances, captions)
    assert dict(objects) == TARGETS
    assert len(objects) == 12


def test_several_files_are_joined_and_images_chosen(tmp_path: Path) -> None:
    images = list(ORACLE["images"].items())
    splits = [write(tmp_path, dict(images[:5]), "train2014"), write(tmp_path, dict(images[5:]), "val2014")]
    instances, captions = zip(*splits, strict=True)
    assert dict(CocoObjects.from_annotations(instances, captions)) == TARGETS
    chosen = CocoObjects.from_annotations(instances, captions, image_ids=[12, "COCO_val2014_000000000020.jpg"])
    assert dict(chosen) == {12: TARGETS[12], 20: TARGETS[20]}


def test_index_is_saved_and_loaded(tmp_path: Path) -> None:
    objects = CocoObjects.from_annotations(*write(tmp_path, ORACLE["images"], "val2014"))
    objects.save(tmp_path / "objects.json")
    loaded = CocoObjects.load(tmp_path / "objects.json")
    assert dict(loaded) == TARGETS
    loaded.check_parser(CaptionParser())


def test_an_image_is_found_by_number_text_and_file_name() -> None:
    objects = CocoObjects({391895: ["dog"], 7: []})
    for name in (391895, "391895", "000000391895.jpg", "COCO_val2014_000000391895.jpg", "COCO_val2014_000000391895"):
        assert name in objects
        assert objects[name] == {"dog"}
    for name in (8, "8", "dog.jpg", "", None, 7.0):
        assert name not in objects


def test_image_ids_score_as_their_objects_do() -> None:
    captions = [row["caption"] for row in SHARED_ROWS]
    images = [row["image_id"] for row in SHARED_ROWS]
    expected = chair_counts(captions, [TARGETS[image] for image in images])
    index = CocoObjects(TARGETS, fingerprint=Lexicon.coco().fingerprint())
    metric = CHAIR(ground_truth=index)
    metric.update(captions, [f"COCO_val2014_{image:012d}.jpg" for image in images])
    assert metric.counts.tolist() == expected.sum(0).tolist()
    assert chair_counts(captions, images, ground_truth=TARGETS).tolist() == expected.tolist()


def test_unknown_images_are_errors_and_change_nothing() -> None:
    """The references count every object of such an image as hallucinated."""
    metric = CHAIR(ground_truth=CocoObjects(TARGETS, fingerprint=Lexicon.coco().fingerprint()))
    with pytest.raises(KeyError, match="knows 12 images, but not 99"):
        metric.update(["A cat.", "A dog."], [12, 99])
    assert not metric.counts.any()
    with pytest.raises(ValueError, match=r"ids beside `ground_truth`, got \{'dog'\} at index 0"):
        metric.update(["A dog."], [{"dog"}])
    with pytest.raises(ValueError, match="image ids need `ground_truth`"):
        chair(["A dog."], ["391895"])


def test_index_of_another_parser_is_refused() -> None:
    with pytest.raises(ValueError, match="normalizer 'original', got that of 'opera'"):
        CHAIR(ground_truth=CocoObjects(TARGETS, "opera", Lexicon.coco().fingerprint()))
    with pytest.raises(ValueError, match="same `synonyms`"):
        CHAIR(synonyms=Lexicon({"dog": []}), ground_truth=CocoObjects(TARGETS))
    with pytest.raises(ValueError, match="same `synonyms`"):
        chair(["A dog."], [12], ground_truth=CocoObjects(TARGETS))


def edit(path: Path, field: str, value: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


def test_bad_annotations_are_named(tmp_path: Path) -> None:
    images = ORACLE["images"]
    instances, captions = write(tmp_path, images, "val2014")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        CocoObjects.from_annotations("nowhere.json", captions)
    with pytest.raises(ValueError, match=r"captions_val2014.json: expected COCO annotations with .*'categories'"):
        CocoObjects.from_annotations(captions, instances)
    with pytest.raises(ValueError, match=r"\('image_id', 'caption'\) in entry 0 of 'annotations', got a dict with"):
        CocoObjects.from_annotations(instances, instances)
    with pytest.raises(ValueError, match=r"does not list .*'zebra'"):
        CocoObjects.from_annotations(instances, captions, Lexicon({"dog": ["puppy"]}))
    with pytest.raises(ValueError, match=r"got \[99\], which are not there"):
        CocoObjects.from_annotations(instances, captions, image_ids=[11, 99])
    other = write(tmp_path, dict(list(images.items())[:3]), "train2014")
    with pytest.raises(ValueError, match=r"\[14, 15, 16, 17, 18\] and 4 more are in one of them alone"):
        CocoObjects.from_annotations(instances, other[1])


def test_images_without_captions_and_unlisted_categories_are_errors(tmp_path: Path) -> None:
    instances, captions = write(tmp_path, ORACLE["images"], "val2014")
    edit(captions, "annotations", json.loads(captions.read_text())["annotations"][3:])
    with pytest.raises(ValueError, match=r"describe every image, got none for \[11\]"):
        CocoObjects.from_annotations(instances, captions)
    assert len(CocoObjects.from_annotations(instances, captions, image_ids=[12])) == 1
    edit(captions, "annotations", [{"image_id": 12, "caption": None}])
    with pytest.raises(ValueError, match="expected texts as captions, got None for image 12"):
        CocoObjects.from_annotations(instances, captions, image_ids=[12])
    edit(instances, "annotations", [{"image_id": 12, "category_id": 1}])
    with pytest.raises(ValueError, match="has the category 1, which"):
        CocoObjects.from_annotations(instances, captions, image_ids=[12])


def test_other_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text("objects")
    with pytest.raises(ValueError, match=r"objects.json: expected JSON"):
        CocoObjects.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"expected what `CocoObjects\.save` writes, got a dict with"):
        CocoObjects.load(path)
    path.write_text(json.dumps({"normalizer": "opera", "fingerprint": "", "objects": []}))
    with pytest.raises(ValueError, match="'objects' of each image"):
        CocoObjects.load(path)
