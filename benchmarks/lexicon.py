"""How far CHAIR with our list of names is from CHAIR with the official one, as tables in Markdown.

From the root of the repository:

    python -m benchmarks.lexicon --captions captions.json --synonyms synonyms.txt

``--captions`` holds captions of models and the objects of their images, as
``{"models": {"a model": {"rows": [{"caption": "A dog.", "gt_objects": ["dog"]}]}}}``; ``--synonyms`` is the official
list, ``data/synonyms.txt`` of LisaAnne/Hallucination. The tables tell the scores by both lists, and the names that one
of them alone reads in these captions.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.report import table
from realign_lightning.metrics import Lexicon
from realign_lightning.metrics.functional.captions import CaptionParser, ChairNormalizer
from realign_lightning.metrics.functional.chair import chair

Rows = Sequence[Mapping[str, Any]]


def scores(models: Mapping[str, Rows], official: Lexicon, normalizers: Sequence[ChairNormalizer]) -> str:
    """CHAIRs and CHAIRi by both lists, in percent.

    Args:
        models: rows of each model, with "caption" and "gt_objects".
        official: the official list.
        normalizers: the dialects of CHAIR.
    """
    lines: list[tuple[str, ...]] = []
    for normalizer in normalizers:
        parsers = [CaptionParser(lexicon, normalizer) for lexicon in (official, Lexicon.coco())]
        for model, rows in models.items():
            captions, target = [row["caption"] for row in rows], [set(row["gt_objects"]) for row in rows]
            theirs, ours = (chair(captions, target, parser) for parser in parsers)
            cells = [100 * result[name].item() for name in ("chair_s", "chair_i") for result in (theirs, ours)]
            lines.append((normalizer, model, *(f"{cell:.2f}" for cell in cells)))
    header = ("normalizer", "model", "CHAIRs official", "CHAIRs ours", "CHAIRi official", "CHAIRi ours")
    return table(header, lines)


def differing_names(captions: Sequence[str], official: Lexicon, normalizer: ChairNormalizer) -> dict[str, Counter[str]]:
    """Names that are read with one list alone, and how often.

    Args:
        captions: the texts.
        official: the official list.
        normalizer: the dialect of CHAIR.

    Returns:
        "ours" and "official": each name with its category, and the number of its mentions.
    """
    ours, theirs = CaptionParser(normalizer=normalizer), CaptionParser(official, normalizer)
    found: dict[str, Counter[str]] = {"ours": Counter(), "official": Counter()}
    for caption in captions:
        read = {"ours": set(ours.parse(caption).mentions), "official": set(theirs.parse(caption).mentions)}
        for name, other in (("ours", "official"), ("official", "ours")):
            found[name].update(f"{mention.word} ({mention.category})" for mention in read[name] - read[other])
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--synonyms", type=Path, required=True)
    parser.add_argument("--normalizers", nargs="+", choices=get_args(ChairNormalizer), default=["original", "opera"])
    args = parser.parse_args()
    models = {name: model["rows"] for name, model in json.loads(args.captions.read_text())["models"].items()}
    official = Lexicon.from_file(args.synonyms)
    print(scores(models, official, args.normalizers))
    captions = [row["caption"] for rows in models.values() for row in rows]
    print("\nNames that one list alone reads, with their mentions:\n")
    for normalizer in args.normalizers:
        for name, counts in differing_names(captions, official, normalizer).items():
            words = ", ".join(f"{word} {count}" for word, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))
            print(f"* `{normalizer}`, {name} alone: {words or 'none'}")


if __name__ == "__main__":
    main()
