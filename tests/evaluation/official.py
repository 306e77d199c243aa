"""Benchmarks in their official forms, a few questions each, about pictures that are made here."""

import json
from collections.abc import Sequence
from pathlib import Path

from realign_lightning.engines.base import Answer, Engine, Question
from tests.conftest import picture

POPE_ROWS = [("a.png", "dog", "yes"), ("a.png", "cat", "no"), ("b.png", "bus", "yes"), ("b.png", "car", "no")]


def write_images(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    return folder


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pope(folder: Path, kinds: Sequence[str] = ("random", "popular", "adversarial")) -> Path:
    """The same four questions in every kind."""
    for kind in kinds:
        rows = [
            {"question_id": number, "image": image, "text": f"Is there a {name} in the image?", "label": label}
            for number, (image, name, label) in enumerate(POPE_ROWS, 1)
        ]
        write_lines(folder / f"coco_pope_{kind}.json", rows)
    write_images(folder / "images", ["a.png", "b.png"])
    return folder


def write_coco(folder: Path) -> Path:
    """Image 1: an annotated dog and a couch in a caption. Image 2: a bus. Image 3: a cat."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012}.jpg"} for number in (1, 2, 3)]
    categories = [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 17, "name": "cat"}]
    instances = [{"id": number, "image_id": number, "category_id": [18, 6, 17][number - 1]} for number in (1, 2, 3)]
    texts = ["A puppy waits beside a sofa.", "A bus.", "A cat."]
    captions = [{"id": number, "image_id": number, "caption": texts[number - 1]} for number in (1, 2, 3)]
    (folder / "instances_val2014.json").write_text(
        json.dumps({"images": images, "annotations": instances, "categories": categories})
    )
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    write_images(folder / "images", [image["file_name"] for image in images])
    return folder


def write_amber(folder: Path) -> Path:
    """One description of an image with a dog, two questions about it."""
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_1.jpg", "query": "Is there a dog in this image?"},
        {"id": 3, "image": "AMBER_1.jpg", "query": "Is the dog white in this image?"},
    ]
    annotations = [
        {"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "yes"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "no"},
    ]
    (folder / "query").mkdir(parents=True)
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    (folder / "query" / "query_generative.json").write_text(json.dumps(queries[:1]))
    (folder / "query" / "query_discriminative.json").write_text(json.dumps(queries[1:]))
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "relation.json").write_text(json.dumps({"dog": ["puppy"], "grass": [], "cat": []}))
    (folder / "safe_words.txt").write_text("image\npicture")
    write_images(folder / "images", ["AMBER_1.jpg"])
    return folder


def write_hallusionbench(folder: Path) -> Path:
    """A question for the original and the edited figure, and one that can be asked without a figure."""

    def row(category: str, subcategory: str, visual: str, figure: str, answer: str, file: str | None) -> dict:
        return {
            "category": category,
            "subcategory": subcategory,
            "visual_input": visual,
            "set_id": "0",
            "figure_id": figure,
            "sample_note": "note",
            "question_id": "0",
            "question": f"Is it so in {category}?",
            "gt_answer_details": "It is." if answer == "1" else "It is not.",
            "gt_answer": answer,
            "filename": file,
        }

    rows = [
        row("VD", "math", "1", "0", "1", "./hallusion_bench/VD/math/0_0.png"),
        row("VD", "math", "2", "1", "0", "./hallusion_bench/VD/math/0_1.png"),
        row("VS", "chart", "0", "0", "1", None),
        row("VS", "chart", "1", "1", "1", "./hallusion_bench/VS/chart/0_1.png"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    write_images(folder / "hallusion_bench" / "VD" / "math", ["0_0.png", "0_1.png"])
    write_images(folder / "hallusion_bench" / "VS" / "chart", ["0_1.png"])
    return folder


def write_mmhal(folder: Path) -> Path:
    """Nine questions, so that the first type comes twice."""
    rows = [
        {
            "question_type": "attribute",
            "question_topic": "indoor",
            "image_id": f"{number:04x}",
            "image_src": f"https://example.org/{number}_o.jpg",
            "image_content": ["Dog"],
            "question": f"What is number {number}?",
            "gt_answer": "A dog.",
            "model_answer": "",
        }
        for number in range(9)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "response_template.json").write_text(json.dumps(rows))
    write_images(folder / "images", [f"{number}_o.jpg" for number in range(8)] + ["0008.png"])
    return folder


class Parrot(Engine):
    """Answers by the words of the question, and remembers what it was asked in which batch.

    Args:
        answers: answer by a word of the question; without one it is "yes".
        log: file that every question is written to.
    """

    def __init__(self, answers: dict[str, str] | None = None, batch_size: int = 4, log: Path | None = None):
        self.answers = answers or {}
        self.batch_size = batch_size
        self.log = log
        self.batches: list[list[Question]] = []

    @property
    def identity(self):
        return {"engine": "parrot", "answers": self.answers}

    def answer(self, questions):
        self.batches.append(list(questions))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write("".join(f"{question.prompt!r}\n" for question in questions))
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        text = next((answer for word, answer in self.answers.items() if word in str(question.prompt)), "yes")
        return Answer("", False, "the parrot sleeps") if text == "ERROR" else Answer(text, True, None, 10, 2)

    @property
    def asked(self) -> int:
        return sum(len(batch) for batch in self.batches)
