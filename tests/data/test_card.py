import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from realign_lightning.data import ShardError, ShardWriter
from realign_lightning.data.card import Bars, BuildFacts, draw_bars, size_category, write_card
from tests.data.helpers import sample, write_shards

FACTS = BuildFacts(
    left_out={"nothing to mask": 3, "no image gave a different answer": 5},
    refused={"too similar": 12, "empty": 1},
    accepted_by_rank={0: 8, 1: 4},
    tried_by_rank={0: 20, 1: 10, 2: 3},
    similarities=[0.5, 0.62, 0.9] * 4,
    retrieval_scores=[0.8] * 12,
    kinds={"object": 30, "count": 10},
    settings={"gates": {"tau": 0.95}, "policy": {"path": "some/model"}},
    languages=["en"],
    limits=["Street scenes only."],
)


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "pairs", 12)


def card(folder: Path, facts: BuildFacts = FACTS, **options) -> str:
    return write_card(folder, facts, **options).read_text(encoding="utf-8")


def header(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose heading begins with ``first``, heading and rule left out."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return table


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def test_front_matter_is_what_the_hub_reads(shards):
    read = header(card(shards, title="Streets: wrong & right"))
    assert read["license"] == "unknown"
    assert read["pretty_name"] == "Streets: wrong & right"
    assert read["size_categories"] == ["n<1K"]
    assert read["language"] == ["en"]
    assert read["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    assert "visual-question-answering" in read["task_categories"]
    assert "webdataset" in read["tags"]
    assert "language" not in header(card(shards, BuildFacts()))


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (5_000_000, "1M<n<10M"),
        (10**10, "n>1B"),
    ],
)
def test_size_categories(samples, name):
    assert size_category(samples) == name


def test_counts_and_rates_are_those_of_the_arithmetic(shards):
    """12 pairs and 8 left out are 20; 8 of 20, 4 of 10, 0 of 3 and 12 of 33 were accepted."""
    text = card(shards)
    assert "12 of 20 source samples became pairs (60.0%)" in text
    assert rows(text, "source samples left out") == [
        ["no image gave a different answer", "5", "25.0%"],
        ["nothing to mask", "3", "15.0%"],
    ]
    assert rows(text, "retrieval rank") == [
        ["0", "20", "8", "40.0%"],
        ["1", "10", "4", "40.0%"],
        ["2", "3", "0", "0.0%"],
        ["all", "33", "12", "36.4%"],
    ]
    assert rows(text, "completions refused") == [["too similar", "12", "36.4%"], ["empty", "1", "3.0%"]]
    assert rows(text, "masked spans") == [["object", "30", "75.0%"], ["count", "10", "25.0%"]]
    assert "- Street scenes only." in text
    assert yaml.safe_load(blocks(text, "yaml")[0]) == FACTS.settings
    assert "12 dual-preference pairs" in text
    assert "in 3 shards" in text


def test_pictures_lie_beside_the_card_and_go_with_their_facts(shards):
    text = card(shards)
    named = re.findall(r"!\[[^]]+\]\((card/[^)]+)\)", text)
    assert sorted(named) == ["card/ranks.png", "card/retrieval.png", "card/similarity.png"]
    for name in named:
        with Image.open(shards / name) as picture:
            assert picture.size == (1280, 520)
    text = card(shards, BuildFacts(similarities=[0.1]))
    assert re.findall(r"\((card/[^)]+)\)", text) == ["card/similarity.png"]
    assert [path.name for path in (shards / "card").iterdir()] == ["similarity.png"]


def test_texts_of_the_build_cannot_break_the_card(shards):
    facts = BuildFacts(
        left_out={"a | b\n# <script>*": 1},
        settings={"instruction": "```\n</script> ```` # heading", "title": "---"},
        limits=["[link](x)\n\n# heading"],
    )
    text = card(shards, facts, title="Pairs | [x](y)\n# second")
    assert rows(text, "source samples left out") == [[r"a \| b # \<script\>\*", "1", "7.7%"]]
    (block,) = re.findall(r"^(`{5,})yaml\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block[1]) == facts.settings
    headings = [line for line in text.split("---\n", 2)[2].splitlines() if line.startswith("#")]
    assert headings[0] == r"# Pairs \| \[x\](y) # second"
    assert "# heading" not in headings
    assert header(text)["pretty_name"] == "Pairs | [x](y)\n# second"


def test_what_a_person_wrote_is_left_alone(shards, caplog):
    path = shards / "README.md"
    first = card(shards)
    assert card(shards, BuildFacts(), title="Again") == path.read_text() != first
    path.write_text(path.read_text().replace("license: unknown", "license: cc-by-4.0"))
    edited = path.read_text()
    assert write_card(shards, FACTS).name == "README.new.md"
    assert path.read_text() == edited
    assert (shards / "README.new.md").read_text() == first
    assert "left as it is" in caplog.text
    path.write_text("Our own card.")
    assert write_card(shards, FACTS).name == "README.new.md"
    assert path.read_text() == "Our own card."


def test_facts_that_cannot_be():
    for facts, message in (
        ({"left_out": {"x": -1}}, r"left_out\['x'\] must be a count of at least 0, got -1"),
        ({"accepted_by_rank": {1: 3}, "tried_by_rank": {1: 2}}, r"accepted_by_rank\[1\] is 3, more than were tried"),
        ({"similarities": [0.5, float("nan")]}, "similarities must hold finite numbers"),
        ({"settings": {"path": Path("x")}}, "settings must hold plain JSON values"),
    ):
        with pytest.raises(ValueError, match=message):
            BuildFacts(**facts)


def test_facts_of_another_build_and_folders_without_shards(shards, tmp_path):
    with pytest.raises(ValueError, match=r"tell of 13 pairs, .* hold 12"):
        write_card(shards, BuildFacts(similarities=[0.5] * 13))
    assert not (shards / "README.md").exists()
    with pytest.raises(ShardError, match="does not exist"):
        write_card(tmp_path / "none", FACTS)


def column(picture: Image.Image, x: int) -> list[tuple[int, int, int]]:
    return [picture.getpixel((x, y)) for y in range(picture.height)]


def test_bars_are_as_high_as_their_counts():
    """Plot of 10 units per count: 100 and 50 of 100 over 172 units; the part of the first is a quarter of it."""
    picture = draw_bars(Bars("title", "axis", ["a", "b"], [100, 50], [25, 0]), scale=1)
    dark, light = (0x0A, 0x58, 0xCA), (0xB9, 0xCD, 0xEE)
    first, second = column(picture, 150), column(picture, 500)
    assert (first.count(dark), first.count(light)) == (43, 129)
    assert (second.count(dark), second.count(light)) == (0, 86)
    with pytest.raises(ValueError, match="at least one bar"):
        draw_bars(Bars("title", "axis", [], []))


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.5, 0.5],
        [-1.0, 1.0],
        np.random.default_rng(0).uniform(0.2, 0.95, 5000),
        [0.1, 0.2, 0.3, 0.7, 0.95, 1.0],
        [0.0, 1e9],
    ],
)
def test_histograms_lose_no_value(values, shards, monkeypatch):
    drawn: list[Bars] = []
    monkeypatch.setattr(
        "realign_lightning.data.card.draw_bars", lambda bars: drawn.append(bars) or Image.new("RGB", (1, 1))
    )
    monkeypatch.setattr("realign_lightning.data.card.read_index", lambda _: many)
    many = type(
        "Index", (), {"shards": (type("Shard", (), {"samples": 10**6, "bytes": 1, "name": "shard-000000.tar"}),)}
    )
    write_card(shards, BuildFacts(similarities=values))
    (bars,) = drawn
    assert sum(bars.counts) == len(values)
    assert len(bars.counts) == len(bars.labels) <= 26
    lowest, width = float(bars.labels[0]), float(bars.axis.split()[-1])
    expected = np.histogram(values, lowest + width * np.arange(len(bars.counts) + 1) - 1e-9)[0]
    assert bars.counts == expected.tolist()


def test_code_of_the_card_loads_the_shards(shards, tmp_path):
    """In a process of its own, with nothing but the folder."""
    text = card(shards)
    assert "realign-lightning fit --config recipes/llava7b_lora.yaml --data.train pairs" in blocks(text, "bash")[0]
    stream, datasets = blocks(text, "python")
    code = "\n".join(
        [
            stream.replace('    sample["image.png"]', '    last = sample["__key__"], sample["image.png"]'),
            "print(last[0], last[1].size, last[2:])",
            datasets.rsplit("\n", 1)[0],
            'row = pairs[0]; print(len(pairs), row["image.png"].size, row["json"]["chosen"], row["json"]["rejected"])',
        ]
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    # The stream reads the first shard, of four samples.
    assert lines[0] == "000003 (8, 6) ('A cat and 3 dogs .', 'A bird and 3 dogs .')"
    assert lines[-1] == "12 (8, 6) A cat and 0 dogs . A bird and 0 dogs ."


def test_shards_that_datasets_cannot_read_say_so(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(sample(1))
        writer.image_format = "jpg"
        writer.write(sample(2))
    text = card(tmp_path, BuildFacts())
    assert "Hugging Face datasets cannot read these shards as they are" in text
    assert "load_dataset" not in text
