"""The whole build: what becomes of every record, and that nothing is done twice."""

import io
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from realign_lightning.data import ShardDataset
from realign_lightning.data.scan import scan_shard
from realign_lightning.data.schema import decode_sample
from realign_lightning.data.sources import ImageFile, ImageFolder, SourceProblem
from realign_lightning.engines import Answer, EngineError, Policy
from realign_lightning.journal import read_journal
from realign_lightning.preferences import Gate, LexiconMasker, WordOverlap
from tests.conftest import alone
from tests.preferences.building import (
    Eyes,
    Listed,
    Pixels,
    answer_of,
    builder,
    colour,
    file_of,
    number_of,
    picture,
    png,
    record,
)

ROOT = Path(__file__).parent.parent.parent


def samples_of(folder: Path) -> dict:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for stored in scan_shard(shard):
            sample = decode_sample(stored.read())
            found[sample.key] = sample
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def problems_of(output: Path) -> dict[str, dict]:
    lines = (output.parent / f"{output.name}.problems.jsonl").read_text().splitlines()
    return {line["where"]: line for line in map(json.loads, lines)}


def brute_force(numbers: list[int], query: int) -> list[int]:
    """Images by cosine similarity to one of them, most similar first."""
    vectors = Pixels().embed([picture(number) for number in numbers]).double()
    scores = vectors @ vectors[numbers.index(query)]
    return [numbers[place] for place in scores.argsort(descending=True).tolist() if numbers[place] != query]


# ---- what comes out


def test_images_are_tried_in_order_of_similarity_until_a_completion_is_accepted(tmp_path):
    """The policy says what it sees: an image of the same colour gives the answer back, the first other one a pair."""
    numbers = [*range(12), 12, 13, 24, 25]  # 12 and 24 have the colour of 0, 13 and 25 that of 1
    output = tmp_path / "pairs"
    report = builder(top_k=10).build(Listed(*map(record, numbers)), output)
    made = samples_of(output)
    for number in numbers:
        order = brute_force(numbers, number)[:10]
        rank = next(rank for rank, other in enumerate(order) if colour(other) != colour(number))
        sample = made[f"record{number:03d}"]
        assert sample.chosen == answer_of(number, number)
        assert sample.rejected == answer_of(number, order[rank])
        assert number_of(sample.image) == number
        assert number_of(sample.retrieved) == order[rank]
        told, start = sample.provenance, len(f"number {number} is ")
        assert (told["retrieval_rank"], told["retrieved_id"]) == (rank, f"image{order[rank]:03d}")
        assert told["response_similarity"] == pytest.approx(6 / 8, abs=1e-6)  # 7 words each, 6 shared
        assert told["masked"] == f"number {number} is [MASK], says my eye."
        assert told["spans"] == [{"start": start, "end": start + len(colour(number)), "kind": "object"}]
        assert [one["retrieved_id"] for one in told["tried"]] == [f"image{other:03d}" for other in order[: rank + 1]]
        assert [one["verdict"] for one in told["tried"]] == ["unchanged"] * rank + ["accepted"]
        assert told["given"] == ["chosen"]
    assert (report.records, report.pairs, report.left_out, report.faults) == (16, 16, {}, 0)
    assert sum(report.tried_by_rank.values()) == report.calls["complete"]
    assert report.acceptance == 16 / report.calls["complete"]
    assert report.kinds == {"object": 16}


def test_mistakes_on_the_image_itself_come_first(tmp_path):
    """A policy that errs beside odd images: that is the rejected response, and the most similar image the other one."""

    def errs(number: int, prompt: str) -> Answer | None:
        own = prompt.startswith(f"number {number} ") and number % 2
        return Answer(prompt.replace("[MASK]", "mauve")) if own else None

    rows = [*map(record, range(11)), record(11, retrieved=file_of(100)), record(13, rejected="it is a given colour.")]
    numbers = [*range(12), 13]
    output = tmp_path / "pairs"
    report = builder(Eyes(wrong=errs), own_mistakes=True).build(Listed(*rows), output)
    made = samples_of(output)
    for number in range(11):
        best = brute_force(numbers, number)[0]
        sample = made[f"record{number:03d}"]
        told, tried = sample.provenance, sample.provenance["tried"]
        assert number_of(sample.retrieved) == best
        assert (told["retrieval_rank"], told["retrieved_id"]) == (0, f"image{best:03d}")
        assert told["response_similarity"] == pytest.approx(6 / 8, abs=1e-6)
        assert (tried[0]["rank"], tried[0]["retrieved_id"]) == (-1, f"image{number:03d}")
        assert told.get("completed_on") == ("image" if number % 2 else None)
        if number % 2:
            assert sample.rejected == f"number {number} is mauve, says my eye."
            assert [one["verdict"] for one in tried] == ["accepted"]
        else:
            assert sample.rejected == answer_of(number, best)
            assert [(one["rank"], one["verdict"]) for one in tried] == [(-1, "unchanged"), (0, "accepted")]
    assert number_of(made["record011"].retrieved) == 100
    assert made["record011"].rejected == "number 11 is mauve, says my eye."
    assert "tried" not in made["record013"].provenance
    assert (report.tried_by_rank, report.accepted_by_rank) == ({-1: 12, 0: 6}, {-1: 6, 0: 6})
    assert (len(report.similarities), len(report.retrieval_scores), report.calls["complete"]) == (12, 12, 18)
    counts = json.loads((output / "index.json").read_text())["built_with"]["counts"]
    assert counts["accepted_by_rank"] == {"-1": 6, "0": 6}
    assert "| own | 12 | 6 | 50.0% |" in (output / "README.md").read_text()


def test_own_mistakes_without_a_similar_image_make_no_pair(tmp_path):
    eyes = Eyes(wrong=lambda number, prompt: Answer(prompt.replace("[MASK]", "mauve")))
    report = builder(eyes, own_mistakes=True).build(Listed(record(0)), tmp_path / "pairs")
    assert (report.pairs, report.left_out, eyes.asked) == (0, {"no similar image": 1}, [])


def test_own_mistakes_are_told_in_the_index_and_only_where_they_were_taken(tmp_path):
    for own in (False, True):
        builder(own_mistakes=own).build(Listed(*map(record, range(4))), tmp_path / f"{own}")
    told = [json.loads((tmp_path / f"{own}" / "index.json").read_text()) for own in (False, True)]
    assert [one["built_with"]["stages"].get("own_mistakes") for one in told] == [None, True]


def test_a_rejected_yes_becomes_as_frequent_as_a_rejected_no(tmp_path):
    """A yes is rejected six times, a no twice; what turns neither way stays."""
    neither = [("yes, at left", "yes, at right"), ("a dog.", "a cat.")]
    said = [("No.", "Yes, it is.")] * 6 + [("Yes.", "no")] * 2 + neither
    rows = [record(number, chosen=chosen, rejected=rejected) for number, (chosen, rejected) in enumerate(said)]
    output = tmp_path / "pairs"
    report = builder(balance_answers=True).build(Listed(*rows), output)
    kept = [sample.chosen for sample in samples_of(output).values()]
    assert sorted(kept) == ["No."] * 2 + ["Yes."] * 2 + ["a dog.", "yes, at left"]
    assert (report.pairs, report.left_out, report.faults) == (6, {"too many of this answer": 4}, 0)
    told = problems_of(output).values()
    assert [one["reason"] for one in told] == ["too many of this answer"] * 4
    assert json.loads((output / "index.json").read_text())["built_with"]["stages"]["balance_answers"] is True
    drawn = set()
    for seed in range(8):
        builder(balance_answers=True, seed=seed).build(Listed(*rows), output, overwrite=True)
        drawn.add(tuple(samples_of(output)))
    assert len(drawn) > 1, "which ones stay is drawn"
    assert builder().build(Listed(*rows), tmp_path / "all").pairs == 10


def test_answers_that_are_made_are_balanced_too(tmp_path):
    """The policy says yes to every question: nothing is left of these, as no is never rejected for yes."""
    eyes = Eyes(wrong=lambda number, prompt: None if "[MASK]" in prompt else Answer("Yes."))
    rows = [record(number, chosen="no") for number in range(4)] + [record(number) for number in range(4, 8)]
    masker = LexiconMasker({"object": ["no", *map(colour, range(12))]})
    report = builder(eyes, masker=masker, balance_answers=True).build(Listed(*rows), tmp_path / "pairs")
    assert report.left_out == {"too many of this answer": 4}
    assert sorted(samples_of(tmp_path / "pairs")) == [f"record{number:03d}" for number in range(4, 8)]


def test_what_a_record_has_is_kept_and_what_it_lacks_is_built(tmp_path):
    """All eight cases of having a chosen answer, a rejected one and a rejected image."""
    has = [(chosen, rejected, image) for chosen in (1, 0) for rejected in (1, 0) for image in (1, 0)]
    rows = []
    for number, (chosen, rejected, image) in enumerate(has):
        changes = {} if chosen else {"chosen": None}
        changes |= {"rejected": "it is a given colour."} if rejected else {}
        changes |= {"retrieved": file_of(100 + number)} if image else {}
        rows.append(record(number, **changes))
    eyes, output = Eyes(), tmp_path / "pairs"
    report = builder(eyes, responder=eyes).build(Listed(*rows), output)
    made = samples_of(output)
    assert list(made) == [row.key for row in rows]
    for number, (row, (chosen, rejected, image)) in enumerate(zip(rows, has, strict=True)):
        sample = made[row.key]
        assert sample.chosen == answer_of(number, number), "given, or what is seen"
        assert (sample.rejected == "it is a given colour.") == bool(rejected)
        assert (number_of(sample.retrieved) == 100 + number) == bool(image)
        names = ["chosen"] * chosen + ["rejected"] * rejected + ["retrieved"] * image
        assert sample.provenance["given"] == names
        assert ("retrieval_rank" in sample.provenance) == (not image)
        assert ("spans" in sample.provenance) == (not rejected)
        if not rejected:
            assert sample.rejected == answer_of(number, number_of(sample.retrieved))
    assert report.generated == 4
    assert report.calls == {"answer": 4, "complete": len(eyes.asked) - 4}
    assert all(number < 100 for number in (number_of(s.retrieved) for k, s in made.items() if k[-1] in "1357"))


def test_image_files_pass_through_as_they_are(tmp_path):
    photo = io.BytesIO()
    turned = picture(1).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(photo, "JPEG", quality=100, exif=exif)
    cmyk = io.BytesIO()
    picture(2).convert("CMYK").save(cmyk, "JPEG", quality=100)
    rows = [
        record(0, image=ImageFile("turned", data=photo.getvalue()), rejected="a"),
        record(1, image=ImageFile("cmyk", data=cmyk.getvalue()), rejected="a"),
        record(3, rejected="a"),
    ]
    report = builder().build(Listed(*rows), tmp_path / "pairs")
    assert report.pairs == 3
    members = {}
    for stored in scan_shard(next((tmp_path / "pairs").glob("*.tar"))):
        members |= stored.read()
    assert members["record000.image.jpg"] == photo.getvalue()
    assert members["record001.image.jpg"] == cmyk.getvalue()
    assert samples_of(tmp_path / "pairs")["record000"].image.size == (32, 48), "as it is meant to be seen"


def test_known_objects_and_scopes_reach_the_gate(tmp_path):
    rows = [record(0, chosen="a cat sits on a sofa.", objects=("dog",)), record(1, chosen="a cat sits on a sofa.")]
    eyes = Eyes(wrong=lambda number, prompt: Answer(prompt.replace("[MASK]", "dog")))
    settings = {"masker": None, "gate": Gate(WordOverlap(), refuse_true=True, scope="span")}
    report = builder(eyes, **settings).build(Listed(*rows, record(2), record(3)), tmp_path / "pairs")
    made = samples_of(tmp_path / "pairs")
    assert "record000" not in made
    assert "record001" in made
    assert made["record001"].provenance["compared"] == "span"
    assert problems_of(tmp_path / "pairs")["record000"]["reason"] == "no completion accepted"
    assert report.refused["true of the image"] >= 1


def test_the_pool_gives_images_and_no_pairs(tmp_path):
    pool = Listed(record(50), record(51), SourceProblem("pool.jsonl:3", "no image"), record(52, image=broken("x")))
    report = builder().build(Listed(record(0)), tmp_path / "pairs", pool=pool)
    (sample,) = samples_of(tmp_path / "pairs").values()
    assert number_of(sample.retrieved) in (50, 51)
    assert report.records == 1
    assert report.faults == 2
    named = problems_of(tmp_path / "pairs")
    assert named["pool.jsonl:3"]["detail"] == "no image"
    assert "pool/x" in named, "an image of the pool that cannot be used is named"


# ---- what goes wrong


def broken(name: str, data: bytes = b"no image") -> ImageFile:
    return ImageFile(name, data=data)


def bad_images() -> dict[str, ImageFile]:
    whole, frames = png(picture(7)), [picture(number) for number in (1, 2)]
    bomb = png(Image.new("1", (8200, 8200)))
    return {
        "text": broken("text"),
        "empty": broken("empty", b""),
        "truncated png": broken("truncated png", whole[:-20]),
        "truncated jpeg": broken("truncated jpeg", png(picture(7), format="JPEG")[:400]),
        "huge": broken("huge", bomb),
        "animated": broken("animated", png(frames[0], format="WEBP", save_all=True, append_images=frames[1:])),
        "gif": broken("gif", png(picture(3), format="GIF")),
        "narrow": broken("narrow", png(Image.new("RGB", (1, 900)))),
        "missing": ImageFile("missing", path=Path("no/such/file.jpg")),
    }


def test_every_bad_record_is_counted_and_named_and_costs_no_other(tmp_path, tiny_llava):
    from realign_lightning.backbones import AutoBackbone

    images = bad_images()
    rows: list = [record(number) for number in range(6)]
    rows += [record(20 + place, image=image) for place, image in enumerate(images.values())]
    rows += [
        record(40, chosen=" "),
        record(41, chosen="it is red \ud800."),
        record(42, prompt="what\0?"),
        record(43, chosen="it is red </s>."),
        record(44, chosen="nothing to see."),
        record(45, rejected=record(45).chosen),
        record(46, chosen=None),
        record(0, chosen="a second record of this key"),
        record(47, key="not.a.key"),
        SourceProblem("rows.jsonl:9", "no prompt"),
        record(48, retrieved=broken("text")),
    ]
    eyes = Eyes()
    output = tmp_path / "pairs"
    report = builder(eyes).build(Listed(*rows), output, Policy(AutoBackbone(str(tiny_llava))))
    assert list(samples_of(output)) == [f"record{number:03d}" for number in range(6)]
    named = problems_of(output)
    assert report.records == len(rows) == report.pairs + sum(report.left_out.values())
    assert report.left_out == {
        "row cannot be used": 2,
        "image cannot be used": len(images) + 1,
        "text cannot be used": 6,
        "no chosen answer": 1,
        "nothing to mask": 1,
    }
    assert report.faults == len(rows) - 6 - 1, "an answer with nothing to mask is none"
    for place, name in enumerate(images):
        assert named[f"record{20 + place:03d}"]["detail"].startswith(f"{name}: ")
    details = {where: line["detail"] for where, line in named.items()}
    assert "</s>" in details["record043"]
    assert "equal" in details["record045"]
    assert "responder" in details["record046"]
    assert "same key" in details["record000"]
    assert details["rows.jsonl:9"] == "no prompt"
    assert {number for _, number in eyes.asked} <= set(range(6)) | set(range(40, 48)), "no bad image was looked at"


def test_generated_answers_that_are_none_are_left_out(tmp_path):
    answers = {0: Answer("it is", finished=False), 1: Answer("I'm sorry, I cannot see."), 2: Answer("  ")}
    answers[3] = Answer("", False, error="out of order")
    responder = Eyes(wrong=lambda number, prompt: answers.get(number))
    rows = [record(number, chosen=None) for number in range(6)]
    report = builder(responder=responder).build(Listed(*rows), tmp_path / "pairs")
    assert list(samples_of(tmp_path / "pairs")) == ["record004", "record005"]
    assert report.left_out == {"answer not usable": 3, "engine failed": 1}
    assert report.faults == 1
    mended = Eyes()
    report = builder(responder=mended).build(Listed(*rows), tmp_path / "pairs")
    assert report.left_out == {"answer not usable": 3}
    assert {number for _, number in mended.asked} == {3}, "what was answered is kept, what failed is asked again"


def test_fewer_images_than_k_and_none_at_all(tmp_path):
    report = builder(top_k=10).build(Listed(record(0), record(1), record(2)), tmp_path / "three")
    assert (report.pairs, report.short) == (3, 3)
    report = builder(top_k=10).build(Listed(record(0)), tmp_path / "one")
    assert (report.pairs, report.left_out) == (0, {"no similar image": 1})
    assert not (tmp_path / "one").exists()


def test_an_engine_that_fails_now_and_then_costs_only_what_failed(tmp_path):
    failing = Eyes(wrong=lambda number, prompt: Answer("", False, "timed out") if number == 5 else None)
    rows = Listed(*map(record, range(12)))
    report = builder(failing).build(rows, tmp_path / "pairs")
    whole = Eyes()
    expected = builder(whole).build(rows, tmp_path / "whole")
    assert 0 < report.left_out["engine failed"] < 12
    assert report.faults == report.left_out["engine failed"]
    assert all("timed out" in line["detail"] for line in problems_of(tmp_path / "pairs").values())
    mended = Eyes()
    again = builder(mended).build(rows, tmp_path / "pairs")
    assert bytes_of(tmp_path / "pairs") == bytes_of(tmp_path / "whole")
    assert again.pairs == expected.pairs
    answered = {pair for pair in failing.asked if pair[1] != 5}
    assert not answered & set(mended.asked)
    assert not (tmp_path / "pairs.problems.jsonl").exists(), "an earlier run's list is no longer true"


def test_an_engine_that_fails_always_ends_the_build_and_loses_nothing(tmp_path):
    rows = Listed(*map(record, range(80)))
    failing = Eyes(wrong=lambda number, prompt: Answer("", False, "401: no key") if len(failing.asked) > 8 else None)
    with pytest.raises(EngineError, match=r"401: no key.*What was answered is kept"):
        builder(failing).build(rows, tmp_path / "pairs")
    assert len(failing.asked) == 8 + 52, "8 were answered, and no more is asked after 50"
    assert not (tmp_path / "pairs").exists()
    mended = Eyes()
    report = builder(mended).build(rows, tmp_path / "pairs")
    assert report.pairs == 80
    assert not set(failing.asked[:8]) & set(mended.asked)


def test_questions_that_fail_in_every_run_do_not_end_a_repeated_build(tmp_path):
    rows = Listed(*map(record, range(120)))
    refused = Eyes(wrong=lambda number, prompt: Answer("", False, "400: not allowed") if number % 2 else None)
    first = builder(refused, batches=1).build(rows, tmp_path / "pairs")
    before = bytes_of(tmp_path / "pairs")
    assert first.left_out["engine failed"] > 50
    again = builder(refused, batches=1).build(rows, tmp_path / "pairs")
    assert (again.pairs, again.left_out) == (first.pairs, first.left_out)
    assert bytes_of(tmp_path / "pairs") == before


def test_an_image_of_the_pool_that_has_no_embedding_is_named(tmp_path):
    class Blind(Pixels):
        def embed(self, images):
            found = super().embed(images)
            return found * torch.tensor([[0.0 if number_of(image) == 50 else 1.0] for image in images])

    pool = Listed(record(50), record(51))
    report = builder(encoder=Blind()).build(Listed(record(0)), tmp_path / "pairs", pool=pool)
    assert (report.pairs, report.faults) == (1, 1)
    assert problems_of(tmp_path / "pairs")["pool/image050"]["detail"] == "its embedding is zero"


def test_an_image_that_changes_during_the_build_poisons_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    files = {number: tmp_path / "images" / f"{number}.png" for number in range(8)}
    for number, path in files.items():
        path.write_bytes(png(picture(number)))
    rows = Listed(*(record(number, image=ImageFile(path.name, path=path)) for number, path in files.items()))
    expected = builder().build(rows, tmp_path / "whole")
    done = []

    def change(number, prompt):
        if not done:
            done.append(files[6].write_bytes(png(picture(200))))

    report = builder(Eyes(wrong=change)).build(rows, tmp_path / "pairs")
    assert report.faults >= 1
    assert "changed since it was hashed" in problems_of(tmp_path / "pairs")["record006"]["detail"]
    files[6].write_bytes(png(picture(6)))
    assert builder().build(rows, tmp_path / "pairs").pairs == expected.pairs
    assert bytes_of(tmp_path / "pairs") == bytes_of(tmp_path / "whole")


def test_images_of_one_name_in_source_and_pool_are_two(tmp_path):
    pool = Listed(record(61, image=ImageFile("image000", data=png(picture(61)))))
    report = builder().build(Listed(record(0)), tmp_path / "pairs", pool=pool)
    assert report.pairs == 1
    (sample,) = samples_of(tmp_path / "pairs").values()
    assert (number_of(sample.image), number_of(sample.retrieved)) == (0, 61)
    assert sample.provenance["retrieved_id"] == "pool/image000"


def test_a_rejected_image_that_is_the_image_itself_costs_no_question(tmp_path):
    eyes = Eyes()
    rows = Listed(record(0, retrieved=ImageFile("again", data=png(picture(0)))), record(1), record(2))
    report = builder(eyes).build(rows, tmp_path / "pairs")
    assert report.left_out == {"image cannot be used": 1}
    assert "is the image itself" in problems_of(tmp_path / "pairs")["record000"]["detail"]
    assert all("number 0 " not in prompt for prompt, _ in eyes.asked)


def test_a_band_that_cannot_be_calibrated_is_left_open(tmp_path, caplog):
    assert builder(calibrate=True).build(Listed(record(0)), tmp_path / "one").left_out == {"no similar image": 1}
    same = Listed(record(0), record(1, image=ImageFile("copy", data=png(picture(0)))))
    assert builder(calibrate=True).build(same, tmp_path / "same").left_out == {"no similar image": 2}
    assert "not calibrated" in caplog.text
    report = builder(calibrate=True).build(Listed(*map(record, range(12))), tmp_path / "pairs")
    (band,) = (tmp_path / "pairs.work" / "bands").glob("*/*.jsonl")
    ((end, caught, lost),) = json.loads(band.read_text()).values()
    assert all(score < end for score in report.retrieval_scores)
    assert 0 <= lost <= 0.01 <= caught


@pytest.mark.parametrize(("output", "work"), [("pairs", "pairs/work"), ("pairs", "pairs")])
def test_work_inside_of_what_is_replaced_is_refused(tmp_path, output, work):
    with pytest.raises(ValueError, match="Expected `work` outside of the output"):
        builder().build(Listed(record(0)), tmp_path / output, work=tmp_path / work)
    assert not (tmp_path / "pairs").exists()


def test_an_output_among_the_images_of_the_source_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    source = ImageFolder(tmp_path / "images")
    with pytest.raises(ValueError, match="Expected `output` outside of the folder of images"):
        builder().build(source, tmp_path / "images" / "pairs")
    with pytest.raises(ValueError, match="Expected `work` outside of the folder of images"):
        builder().build(source, tmp_path / "pairs", work=tmp_path / "images" / "work")


def test_an_output_of_another_origin_is_left_alone(tmp_path):
    output = tmp_path / "pairs"
    builder().build(Listed(*map(record, range(4))), output)
    before = bytes_of(output)
    eyes = Eyes()
    with pytest.raises(FileExistsError, match="already holds"):
        builder(eyes).build(Listed(*map(record, range(5))), output, work=tmp_path / "other.work")
    (output / "thesis.pdf").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.pdf"):
        builder(eyes).build(Listed(*map(record, range(4))), output, overwrite=True)
    (output / "thesis.pdf").unlink()
    assert eyes.asked == []
    assert bytes_of(output) == before
    builder(eyes).build(Listed(*map(record, range(5))), output, work=tmp_path / "other.work", overwrite=True)
    assert len(samples_of(output)) == 5


def test_without_a_pair_the_output_stays(tmp_path):
    output = tmp_path / "pairs"
    builder().build(Listed(*map(record, range(4))), output)
    before = bytes_of(output)
    strict = builder(gate=Gate(WordOverlap(), tau=0.0))
    report = strict.build(Listed(*map(record, range(4))), output)
    assert (report.pairs, report.left_out) == (0, {"no completion accepted": 4})
    assert bytes_of(output) == before
    assert problems_of(output)["record000"]["detail"].startswith("too similar, too similar")


def test_a_card_that_was_filled_in_is_kept(tmp_path):
    output = tmp_path / "pairs"
    builder().build(Listed(*map(record, range(4))), output, title="Colours")
    card = output / "README.md"
    assert "# Colours" in card.read_text()
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    builder().build(Listed(*map(record, range(5))), output)
    assert "license: mit" in card.read_text()
    assert "5 of 5 source samples" in (output / "README.new.md").read_text()


def test_killed_while_folders_change_places_the_output_is_its_own(tmp_path, monkeypatch):
    """Between any two steps of publishing: noted, the old one away, the new one there."""
    rows, more = Listed(*map(record, range(4))), Listed(*map(record, range(6)))
    builder().build(more, tmp_path / "fresh")
    rename = Path.rename
    for step in range(3):
        output = tmp_path / f"pairs{step}"
        builder().build(rows, output)
        (output / "README.md").write_text("license: mit")
        left = [step]

        def killed(self, target, output=output, left=left):
            if output in (self, Path(target)) and not left[0]:
                raise KeyboardInterrupt
            left[0] -= output in (self, Path(target))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", killed)
        if step < 2:
            with pytest.raises(KeyboardInterrupt):
                builder().build(more, output)
        monkeypatch.setattr(Path, "rename", rename)
        builder().build(more, output)
        assert (output / "README.md").read_text() == "license: mit", "the owner's card is never lost"
        tars = {name: data for name, data in bytes_of(output).items() if not name.startswith("README")}
        assert tars.items() <= bytes_of(tmp_path / "fresh").items()
        assert not [path.name for path in tmp_path.glob(".*pairs*") if not path.name.endswith(".lock")]


def test_what_came_to_lie_in_the_output_meanwhile_is_kept(tmp_path):
    output = tmp_path / "pairs"
    builder().build(Listed(*map(record, range(4))), output)

    def late(number, prompt):
        (output / "thesis.pdf").write_text("mine")

    with pytest.raises(FileExistsError, match=r"thesis\.pdf"):
        builder(Eyes(wrong=late)).build(Listed(*map(record, range(6))), output)
    assert (output / "thesis.pdf").read_text() == "mine"
    (output / "thesis.pdf").unlink()
    eyes = Eyes()
    assert builder(eyes).build(Listed(*map(record, range(6))), output).pairs == 6
    assert eyes.asked == []


def test_an_output_behind_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "pairs").symlink_to(tmp_path / "large_disk")
    for count in (4, 5):
        builder().build(Listed(*map(record, range(count))), tmp_path / "pairs", work=tmp_path / "work")
        assert (tmp_path / "pairs").is_symlink()
        assert len(samples_of(tmp_path / "large_disk")) == count


def test_two_builds_do_not_work_on_one_folder(tmp_path):
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    work = tmp_path / "pairs.work"
    work.mkdir()
    command = [sys.executable, "-c", f"{script}; time.sleep(60)", str(work / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:  # noqa: S603
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="Another build holds"):
            builder().build(Listed(*map(record, range(4))), tmp_path / "pairs")
        with pytest.raises(FileExistsError, match="Another build holds"):
            builder().build(Listed(*map(record, range(4))), tmp_path / "elsewhere", work=work)
        other.kill()
    assert builder().build(Listed(*map(record, range(4))), tmp_path / "pairs").pairs == 4


def test_a_record_that_nobody_can_complete_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="no policy: give `backbone`"):
        builder(completer=None).build(Listed(record(0)), tmp_path / "pairs")
    with pytest.raises(ValueError, match="nobody embeds them"):
        builder(retriever=None).build(Listed(record(0)), tmp_path / "pairs")
    complete = record(0, rejected="a", retrieved=file_of(1))
    assert builder(completer=None, retriever=None).build(Listed(complete), tmp_path / "pairs").pairs == 1
    with pytest.raises(ValueError, match="Expected `batches` to be at least 1, got 0"):
        builder(batches=0)
    with pytest.raises(ValueError, match="Expected `samples_per_shard` to be at least 1, got 0"):
        builder(samples_per_shard=0)


# ---- nothing twice


def test_a_finished_build_does_nothing_again_and_gives_the_same_bytes(tmp_path):
    rows, output = Listed(*map(record, range(30))), tmp_path / "pairs"
    builder(samples_per_shard=7).build(rows, output)
    before = bytes_of(output)
    eyes, encoder = Eyes(), Pixels()
    report = builder(eyes, encoder, samples_per_shard=7).build(rows, output)
    assert (eyes.asked, encoder.embedded, report.calls) == ([], 0, {"complete": 0})
    assert bytes_of(output) == before
    assert {"index.json", "README.md", "shard-000004.tar"} <= before.keys()
    elsewhere = tmp_path / "elsewhere" / "deeper"
    builder(samples_per_shard=7).build(rows, elsewhere)
    assert bytes_of(elsewhere) == before, "nothing of where and when it was built"


def test_a_changed_gate_asks_only_for_what_is_new(tmp_path):
    rows, output = Listed(*map(record, range(20))), tmp_path / "pairs"
    first, second, fresh = Eyes(), Eyes(), Eyes()
    loose = Gate(WordOverlap(), tau=0.76)
    strict = Gate(OneIn(3), tau=0.95)
    builder(first, gate=loose).build(rows, output)
    builder(second, gate=strict).build(rows, output)
    builder(fresh, gate=strict).build(rows, tmp_path / "fresh")
    assert second.asked
    assert not set(first.asked) & set(second.asked)
    assert set(fresh.asked) <= set(first.asked) | set(second.asked)
    assert bytes_of(output) == bytes_of(tmp_path / "fresh")


class OneIn(WordOverlap):
    """Takes two of three completions for equal."""

    def __init__(self, count: int) -> None:
        self.count = count

    def compare(self, first, second):
        return [0.5 if sum(map(ord, one + other)) % self.count == 0 else 1.0 for one, other in zip(first, second)]  # noqa: B905


def test_two_outputs_share_finished_work(tmp_path):
    rows, work = Listed(*map(record, range(12))), tmp_path / "work"
    strict = Gate(OneIn(3))
    for _ in range(2):
        first, second = Eyes(), Eyes()
        builder(first).build(rows, tmp_path / "loose", work=work)
        builder(second, gate=strict).build(rows, tmp_path / "strict", work=work)
    assert first.asked == second.asked == []
    assert samples_of(tmp_path / "loose").keys() >= samples_of(tmp_path / "strict").keys()


def test_an_extended_source_costs_what_is_new_and_gives_what_a_fresh_build_gives(tmp_path):
    output = tmp_path / "pairs"
    first, second, fresh = Eyes(), Eyes(), Eyes()
    encoder = Pixels()
    builder(first).build(Listed(*map(record, range(16))), output)
    builder(second, encoder).build(Listed(*map(record, range(24))), output)
    builder(fresh).build(Listed(*map(record, range(24))), tmp_path / "fresh")
    assert bytes_of(output) == bytes_of(tmp_path / "fresh")
    assert not set(first.asked) & set(second.asked)
    assert len(second.asked) < len(fresh.asked)
    assert encoder.embedded == 8, "new images only"


def test_disk_full_at_any_moment_loses_nothing(tmp_path):
    """Files may not grow beyond a limit, which is raised until the build succeeds."""
    rows = 30
    whole = tmp_path / "whole"
    builder(Eyes(batch_size=2)).build(Listed(*map(record, range(rows))), whole)
    script = tmp_path / "build.py"
    script.write_text(
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.preferences.building import Eyes, Listed, builder, record\n"
        "limit, output, log = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])\n"
        "rows = Listed(*map(record, range(int(sys.argv[4]))))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if limit:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    print(builder(Eyes(log, batch_size=2)).build(rows, output).pairs)\n"
        "except OSError as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    output, logs = tmp_path / "pairs", []
    limits = [2_000, 9_000, 60_000, 0]
    for limit in limits:
        log = tmp_path / f"{limit}.log"
        command = [sys.executable, str(script), str(limit), str(output), str(log), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone(PYTHONPATH=str(ROOT)))  # noqa: S603
        logs.append(log.read_text().splitlines() if log.exists() else [])
        assert (done.returncode == 0) == (limit == 0), done.stderr
        if limit:
            assert "refused: " in done.stderr, done.stderr
            assert not output.exists()
    assert bytes_of(output) == bytes_of(whole)
    counts = Counter(line for log in logs for line in log)
    assert sum(count - 1 for count in counts.values()) <= 2 * (len(limits) - 1), "at most the batch that did not fit"


KILLED = """
import os, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from tests.preferences.building import Eyes, Listed, builder, record

output, log, rows, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
source = Listed(*(record(number, **({"chosen": None} if number % 5 == 0 else {})) for number in range(rows)))

def build():
    eyes = Eyes(log, pause=0.01)
    builder(eyes, responder=eyes, samples_per_shard=9).build(source, output, show_progress=False)

def note(text):
    with log.open("a") as file:
        file.write(f"-- {text}\\n")

generator = np.random.default_rng(seed)
while kills:
    child = os.fork()
    if not child:
        build()
        os._exit(0)
    time.sleep(generator.uniform(0.0, float(os.environ["LONGEST"])))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kills -= 1
        note("killed")
        print(sorted(path.name for path in output.glob("*")) or "nothing", flush=True)
    else:
        assert status == 0, "a build that is not killed comes to its end"
        note("anew")
        shutil.rmtree(output)
        shutil.rmtree(f"{output}.work")
build()
"""


def test_killed_at_twenty_random_moments_the_bytes_are_those_of_the_undisturbed_build(tmp_path):
    """A build that comes to its end before it is killed begins anew, until twenty were killed."""
    rows = 60
    source = [record(number, **({"chosen": None} if number % 5 == 0 else {})) for number in range(rows)]
    eyes = Eyes(pause=0.01)
    whole = builder(eyes, responder=eyes, samples_per_shard=9)
    started = time.monotonic()
    whole.build(Listed(*source), tmp_path / "whole", show_progress=False)
    took = time.monotonic() - started
    script, log, output = tmp_path / "killed.py", tmp_path / "log", tmp_path / "pairs"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(output), str(log), str(rows), "20", "7"]
    settings = alone(PYTHONPATH=str(ROOT), LONGEST=str(min(0.5 * took, 0.6)))
    done = subprocess.run(  # noqa: S603
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=settings,
        timeout=300,
        check=True,
    )
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
    seen = done.stdout.splitlines()
    assert len(seen) == 20
    assert all(line == "nothing" or "index.json" in line for line in seen), "never a half of an output"
    assert known_answers(tmp_path / "pairs.work")
    for life in log.read_text().split("-- anew\n"):
        # What was asked twice was cut off before its batch could be kept: at most a batch for every kill.
        counts = Counter(line for line in life.splitlines() if line != "-- killed")
        assert set(counts) <= {f"{number} {prompt!r}" for prompt, number in eyes.asked}
        assert sum(count - 1 for count in counts.values()) <= eyes.batch_size * life.count("-- killed")


def known_answers(work: Path) -> set[str]:
    return {key for stage in ("answers", "responses") for folder in (work / stage).glob("*") for key in keys_in(folder)}


def keys_in(folder: Path) -> set[str]:
    return {key for line in read_journal(folder) for key in line.value}


def test_shards_of_a_build_can_be_trained_on(tmp_path, tiny_llava):
    from realign_lightning.backbones import AutoBackbone

    report = builder().build(Listed(*map(record, range(6))), tmp_path / "pairs")
    dataset = ShardDataset(str(tmp_path / "pairs"), AutoBackbone(str(tiny_llava)))
    assert len(dataset) == report.pairs == 6
    index = json.loads((tmp_path / "pairs" / "index.json").read_text())
    assert index["built_with"]["counts"]["pairs"] == 6
    assert index["built_with"]["stages"]["gate"]["tau"] == 0.95
