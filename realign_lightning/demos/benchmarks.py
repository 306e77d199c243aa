"""``realign-lightning digit-benchmarks``: digit scenes in the official forms of POPE and CHAIR."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from realign_lightning.demos.quickstart import DigitPOPE
from realign_lightning.demos.scenes import DIGITS, Scene, caption, objects, question


def write_digit_benchmarks(folder: str | Path, scenes: int = 200, seed: int = 0) -> None:
    """Write questions, annotations and images as COCO and POPE have them, about scenes of unseen handwriting.

    Written are ``pope/digits_pope_{random,popular,adversarial}.json``, ``synonyms.txt``, ``images/`` and
    ``annotations/{instances,captions}_digits.json``.

    Args:
        folder: new or empty.
        scenes: images.
        seed: of the scenes.

    Raises:
        FileExistsError: if ``folder`` holds files.
        ValueError: for less than one scene.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"Expected `folder` to be new or empty, got {folder}: choose another one.")
    pope = DigitPOPE(scenes, seed=seed)
    names = {id(scene): f"scene_{number:06}.png" for number, scene in enumerate(pope.scenes)}
    for part in ("images", "annotations", "pope"):
        (folder / part).mkdir(parents=True)
    for scene in pope.scenes:
        scene.image.save(folder / "images" / names[id(scene)])
    for kind, asked in pope.asked.items():
        rows = [
            {"question_id": number, "image": names[id(scene)], "text": question(digit), "label": label}
            for number, (scene, digit, label) in enumerate(asked, 1)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "pope" / f"digits_pope_{kind}.json").write_text(lines)
    _write_annotations(folder, pope.scenes, list(names.values()))
    (folder / "synonyms.txt").write_text("".join(f"{digit}\n" for digit in DIGITS))


def _write_annotations(folder: Path, scenes: Sequence[Scene], names: Sequence[str]) -> None:
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    categories = [{"id": number, "name": digit} for number, digit in enumerate(DIGITS)]
    instances = [
        {"id": 10 * number + place, "image_id": number, "category_id": DIGITS.index(digit)}
        for number, scene in enumerate(scenes)
        for place, digit in enumerate(objects(scene))
    ]
    captions = [{"id": number, "image_id": number, "caption": caption(scene)} for number, scene in enumerate(scenes)]
    for kind, content in (
        ("instances", {"images": images, "annotations": instances, "categories": categories}),
        ("captions", {"images": images, "annotations": captions}),
    ):
        (folder / "annotations" / f"{kind}_digits.json").write_text(json.dumps(content))


def main(args: Sequence[str] | None = None) -> None:
    """Command line of :func:`write_digit_benchmarks`.

    Args:
        args: command-line arguments; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="realign-lightning digit-benchmarks",
        description="Write digit scenes in the official forms of POPE and CHAIR, for recipes/eval/digits_*.yaml.",
    )
    parser.add_argument("folder", type=Path, help="new or empty folder")
    parser.add_argument("--scenes", type=int, default=200, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    given = parser.parse_args(args)
    write_digit_benchmarks(given.folder, given.scenes, given.seed)
    sys.stdout.write(f"Wrote {given.scenes} scenes to {given.folder}\n")
