import base64
import hashlib
import json
import re
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest

from realign_lightning.data import ShardError, ShardWriter, encode_members
from realign_lightning.inspection import main, page, write_page
from tests.data.helpers import picture, raw_members, sample, write_shards, write_tar

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&amp;\u2028\u2029]]>\U0001f68c"


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and the texts of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._name = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.elements.append((tag, values))
        self._name = values.get("id", tag) if tag in ("script", "style") else ""
        if self._name:
            assert self._name not in self.texts
            self.texts[self._name] = ""

    def handle_endtag(self, tag):
        self._name = ""

    def handle_data(self, data):
        if self._name:
            self.texts[self._name] += data

    @property
    def facts(self):
        return json.loads(self.texts["facts"])

    @property
    def pairs(self):
        return json.loads(self.texts["pairs"])

    @property
    def pictures(self):
        return {name for name in self.texts if name.startswith("i-")}


def text_of(pieces) -> str:
    return "".join(text for text, *_ in pieces)


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "shards", 6)


def test_every_pair_is_on_the_page_with_its_pictures(shards, tmp_path):
    report = write_page(shards, tmp_path / "page.html")
    read = Page(tmp_path / "page.html")
    assert report[:3] == (6, 6, ())
    assert report.bytes == (tmp_path / "page.html").stat().st_size
    assert [(pair["key"], text_of(pair["chosen"])) for pair in read.pairs] == [
        (f"{number:06d}", f"A cat and {number} dogs .") for number in range(6)
    ]
    assert read.pictures == {f"i-{pair[part]}" for pair in read.pairs for part in ("image", "retrieved")}
    assert len(read.pictures) == 12
    assert read.facts["pairs"] == read.facts["samples"] == 6


def test_data_is_never_markup(tmp_path):
    provenance = {
        "image_id": HOSTILE,
        "tried": [{HOSTILE: HOSTILE}],
        "spans": [{"start": 0, "end": 5, "kind": HOSTILE}],
    }
    hostile = {"prompt": HOSTILE, "chosen": HOSTILE, "rejected": f"{HOSTILE} no", "provenance": provenance}
    folder = tmp_path / "<b>&shards"
    with ShardWriter(folder, built_with={"note": HOSTILE}) as writer:
        writer.write(sample(1, **hostile))
    write_page(folder, tmp_path / "hostile.html")
    write_page(write_shards(tmp_path / "shards", 1), tmp_path / "tame.html")
    read, tame = Page(tmp_path / "hostile.html"), Page(tmp_path / "tame.html")
    (pair,) = read.pairs
    assert (text_of(pair["chosen"]), text_of(pair["rejected"])) == (HOSTILE, f"{HOSTILE} no")
    assert pair["prompt"] == [["user", [HOSTILE]]]
    assert pair["provenance"] == provenance
    assert pair["kinds"] == [HOSTILE]
    assert list(read.facts["built_with"].values()) == [{"note": HOSTILE}]
    assert read.facts["sources"] == [str(folder)]
    # The data adds no element, and nothing between elements.
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in tame.elements]
    assert "alert(1)</script>" not in read.source
    assert not re.search("\u2028|\u2029|<!--", read.source)


def test_the_page_needs_nothing_else_and_runs_its_own_script_only(shards, tmp_path):
    write_page(shards, tmp_path / "page.html")
    read = Page(tmp_path / "page.html")
    outside = {"src", "href", "srcset", "action", "data", "poster", "style"}
    assert not [(tag, values) for tag, values in read.elements if outside & values.keys()]
    assert not [values for _, values in read.elements if any(name.startswith("on") for name in values)]
    assert not {tag for tag, _ in read.elements} & {"link", "iframe", "object", "embed", "base", "img"}
    assert "url(" not in read.texts["style"]
    assert "@import" not in read.texts["style"]
    assert not re.search(
        r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\bfetch\b|import\b", read.texts["script"]
    )
    (policy,) = [values["content"] for tag, values in read.elements if values.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, name in (("script-src", "script"), ("style-src", "style")):
        digest = base64.b64encode(hashlib.sha256(read.texts[name].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    runnable = [values for tag, values in read.elements if tag == "script" and "type" not in values]
    assert len(runnable) == 1


def test_the_policy_stands_before_everything_that_it_governs(shards, tmp_path):
    write_page(shards, tmp_path / "page.html")
    tags = [tag for tag, _ in Page(tmp_path / "page.html").elements]
    assert tags[:4] == ["html", "head", "meta", "meta"]


def test_damaged_samples_and_shards_are_counted_and_named(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [encode_members(sample(1)), raw_members(2, {"image.png": b"garbage"}), raw_members(3, {"retrieved.png": None})],
    )
    (tmp_path / "b.tar").write_bytes(b"")
    report = write_page(tmp_path, tmp_path / "page.html")
    facts = Page(tmp_path / "page.html").facts
    assert (report.pairs, report.samples) == (1, 3)
    assert [(item.shard, item.key) for item in report.skipped] == [
        ("b.tar", ""),
        ("a.tar", "000002"),
        ("a.tar", "000003"),
    ]
    assert (facts["skipped_samples"], facts["skipped_shards"]) == (2, 1)
    assert [tuple(item) for item in facts["skipped"]] == [tuple(item) for item in report.skipped]


def test_an_image_of_several_pairs_is_stored_once(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(40):
            writer.write(sample(number, image=picture(1), retrieved=picture(2)))
    write_page(tmp_path / "shards", tmp_path / "page.html")
    assert len(Page(tmp_path / "page.html").pictures) == 2


def test_a_limit_takes_pairs_from_all_over(shards, tmp_path):
    report = write_page(shards, tmp_path / "page.html", limit=3)
    read = Page(tmp_path / "page.html")
    assert [pair["key"] for pair in read.pairs] == ["000000", "000002", "000004"]
    assert (read.facts["pairs"], read.facts["samples"]) == (report.pairs, report.samples) == (3, 6)


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("thumbnail", 8), ("thumbnail", 10_000)])
def test_options_out_of_range(shards, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        write_page(shards, tmp_path / "page.html", **{name: value})
    assert not (tmp_path / "page.html").exists()


def test_a_page_appears_when_it_is_complete(shards, tmp_path, monkeypatch):
    output = tmp_path / "new" / "page.html"
    write_page(shards, output)
    before = output.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(shards, output, limit=1)
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    monkeypatch.undo()
    write_page(shards, output, limit=1)
    assert len(Page(output).pairs) == 1


def test_other_files_are_not_replaced(shards, tmp_path):
    other = tmp_path / "notes.html"
    other.write_text("my notes")
    with pytest.raises(FileExistsError, match=r"notes\.html is there and is no inspection page"):
        write_page(shards, other)
    assert other.read_text() == "my notes"
    with pytest.raises(FileExistsError):
        write_page(shards, shards)


def test_nothing_to_show(tmp_path):
    write_tar(tmp_path / "a.tar", [raw_members(2, {"image.png": b"garbage"})])
    with pytest.raises(ShardError, match=r"not one pair .* not a readable JPEG"):
        write_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", [encode_members(sample(number)) for number in range(4)])
    write_tar(tmp_path / "b.tar", [raw_members(9, {"json": b"{"})])
    main(["a.tar", "b.tar"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"inspect.html: 4 pairs, {Path('inspect.html').stat().st_size / 1e6:.1f} MB"
    assert second.startswith("1 left out, listed on the page; first: b.tar 000009: the JSON member cannot be read")
    main(["a.tar", "--output", "some.html", "--limit", "2"])
    assert capsys.readouterr().out.startswith("some.html: 2 pairs of 4 samples, spread evenly, ")


def test_two_thousand_pairs_in_bounded_memory_and_time(tmp_path):
    """40 MB of texts go through; what is kept is less than a quarter of it."""
    filler = "x" * 20_000
    one = encode_members(sample(0))
    image, retrieved = (one[f"000000.{part}.png"] for part in ("image", "retrieved"))
    record = json.loads(one["000000.json"])
    members = []
    for number in range(2000):
        text = json.dumps({**record, "note": f"{number} {filler}"}).encode()
        key = f"{number:06d}"
        members.append({f"{key}.image.png": image, f"{key}.retrieved.png": retrieved, f"{key}.json": text})
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", members[shard * 500 : (shard + 1) * 500])
    del members
    start = time.perf_counter()
    tracemalloc.start()
    report = write_page(tmp_path, tmp_path / "page.html")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.pairs == 2000
    assert report.bytes > 40e6
    assert peak < report.bytes / 4
    assert time.perf_counter() - start < 60
